"""Parsing, and turning errors into one line and an exit code."""

from __future__ import annotations

import logging
import os
import sys
import traceback
from collections.abc import Sequence

from kinetoscope.cli import (
    ab,
    calibrate,
    doctor,
    evaluate,
    explain,
    fit_preview,
    generate,
    info,
    models,
    plan,
    preprocess,
    replay,
    stream,
    train,
)
from kinetoscope.cli.parser import Parser, find_command, take_imports
from kinetoscope.core.errors import ConfigError, KinetoscopeError, RunCancelled
from kinetoscope.core.extensions import load_extensions
from kinetoscope.core.version import __version__

COMMANDS = (
    generate,
    stream,
    models,
    info,
    plan,
    replay,
    doctor,
    ab,
    explain,
    calibrate,
    fit_preview,
    preprocess,
    train,
    evaluate,
)

CHATTY = ("torchao", "torch.utils._pytree", ".".join(("diffusers", "quantizers", "torchao")))
"""Loggers of optional packages that tell, each time they are imported, of kernels that were not built for here."""


def build_parser() -> Parser:
    """The parser of all commands."""
    parser = Parser(prog="kinetoscope", description="Video diffusion with one engine: a prompt becomes a video.")
    parser.add_argument("--version", action="version", version=f"kinetoscope {__version__}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.add_argument(
        "--import", metavar="MODULE",
        help="import a module that registers a family, solver, backend, cache or method (repeatable)",
    )  # fmt: skip  # `take_imports` reads it, wherever it stands
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for module in COMMANDS:
        sub = commands.add_parser(module.NAME, help=module.HELP, description=module.HELP)
        module.add_arguments(sub)
        sub.set_defaults(run=module.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        0 on success, and for the help that is printed without any command; 1 on an error, told in one line; 130 when
        interrupted. A wrong command line exits with 2.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = build_parser()
    try:
        modules, argv = take_imports(argv)
    except ConfigError as error:
        parser.error(str(error))
    if not [word for word in argv if word != "--debug"]:
        parser.print_help()
        return 0
    if wrong := find_command(argv, [module.NAME for module in COMMANDS]):
        parser.error(wrong)
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[_Messages()])
    logger = logging.getLogger("kinetoscope")
    level = logger.level
    logger.setLevel(logging.ERROR if getattr(args, "quiet", False) else logging.INFO)
    for name in CHATTY:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        load_extensions(modules)
        return args.run(args)
    except KeyboardInterrupt:
        print("cancelled", file=sys.stderr)
        return 130
    except RunCancelled as error:
        print(f"cancelled: {_one_line(error)}", file=sys.stderr)
        return 130
    except KinetoscopeError as error:
        if args.debug:
            traceback.print_exc()
        print(f"error: {_one_line(error)}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # whoever read our output went away; nothing is left to tell, not even at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except MemoryError:
        print("error: out of memory; try a smaller --size or fewer --frames", file=sys.stderr)
        return 1
    except Exception as error:  # a fault of ours: still one line, and how to see more
        if args.debug:
            traceback.print_exc()
        print(f"error: {type(error).__name__}: {_one_line(error)} (kinetoscope --debug shows where)", file=sys.stderr)
        return 1
    finally:
        logger.setLevel(level)


class _Messages(logging.Handler):
    """Log lines to what stderr is at that moment: a progress bar puts itself there and lets lines pass above it."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=sys.stderr)


def _one_line(error: BaseException) -> str:
    """The message on one line."""
    return " ".join(str(error).split()) or "no message"
