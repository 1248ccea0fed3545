"""`python -m kinetoscope` is `kinetoscope`."""

import sys

from kinetoscope.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
