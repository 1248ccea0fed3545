"""The command line: `kinetoscope COMMAND`, one module a command."""

from kinetoscope.cli.main import main

__all__ = ["main"]
