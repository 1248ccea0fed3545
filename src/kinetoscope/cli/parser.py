"""A parser whose errors are one line with the nearest known name."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from kinetoscope.core.errors import ConfigError
from kinetoscope.core.spec import nearest, unknown

NOT_A_NUMBER = re.compile(r"argument (--[\w-]+)\S*: invalid (int|float) value: (.*)")
"""What argparse says of an option whose value is no number."""


class Parser(argparse.ArgumentParser):
    """An `ArgumentParser` that names the nearest option, and prints one line instead of its usage."""

    def error(self, message: str) -> NoReturn:
        """Print the message and where to read more, and exit with status 2."""
        line = " ".join(message.split())
        if found := NOT_A_NUMBER.fullmatch(line):
            option, kind, value = found.groups()
            line = f"{option}={value} is not a {'whole ' if kind == 'int' else ''}number"
        print(f"error: {line} (see {self.prog} --help)", file=sys.stderr)
        raise SystemExit(2)

    def parse_known_args(self, *args: Any, **kwargs: Any) -> Any:
        """Parse as `ArgumentParser` does; arguments that no option takes are an error here, in the parser they are of.

        A parser of a command is the last to know its own options, so it is the one that can suggest the nearest.
        """
        found, left = super().parse_known_args(*args, **kwargs)
        if left:
            self.error(self._not_taken(left))
        return found, left

    def _not_taken(self, left: Sequence[str]) -> str:
        """Return what is wrong with the arguments that are left over."""
        option = next((word for word in left if word.startswith("-")), None)
        if option is None:
            return f"unexpected {' '.join(left)!r}; write text of several words in quotes"
        near = nearest(option.partition("=")[0], self._option_string_actions)
        return f"unknown option {option}" + (f"; did you mean {near}?" if near else "")


def take_imports(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the modules of every `--import MODULE`, and the other arguments; it may stand before or after the command.

    Raises:
        ConfigError: `--import` is the last argument.
    """
    modules: list[str] = []
    left: list[str] = []
    words = iter(argv)
    for word in words:
        if word == "--":
            left += [word, *words]
        elif word == "--import":
            module = next(words, None)
            if module is None:
                raise ConfigError("--import needs the name of a module")
            modules.append(module)
        elif word.startswith("--import="):
            modules.append(word.partition("=")[2])
        else:
            left.append(word)
    return modules, left


def find_command(argv: Sequence[str], commands: Sequence[str]) -> str | None:
    """Return the message about a command that does not exist; None if the first word is one of `commands`."""
    word = next((a for a in argv if not a.startswith("-")), None)
    return None if word is None or word in commands else unknown("command", word, commands)
