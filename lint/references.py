"""The dotted names a Python file reaches by importing."""

from __future__ import annotations

import ast
from fnmatch import fnmatchcase
from typing import NamedTuple


class Reference(NamedTuple):
    """`name` is reached on `line`; `spelled` if only a string says it, as `importlib.import_module` would take it."""

    name: str
    line: int
    spelled: bool = False


def references(source: str) -> list[Reference]:
    """Every imported dotted name of `source`, extended by the attributes read from it.

    `import a.b` and `from a import b` give `a.b`; `import a` followed by `a.b.c` or `getattr(a, "b")` gives `a`, and
    `a.b.c` or `a.b`; the string "a.b" gives a spelled `a.b`.
    """
    tree = ast.parse(source)
    aliases: dict[str, str] = {}
    found: set[Reference] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for item in node.names:
                found.add(Reference(item.name, node.lineno))
                top = item.name.partition(".")[0]
                aliases[item.asname or top] = item.name if item.asname else top
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for item in node.names:
                name = f"{node.module}.{item.name}"
                found.add(Reference(name, node.lineno))
                aliases[item.asname or item.name] = name
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            if name := _dotted(node, aliases):
                found.add(Reference(name, node.lineno))
        elif isinstance(node, ast.Constant):
            if isinstance(node.value, str) and _spells_name(node.value):
                found.add(Reference(node.value, node.lineno, spelled=True))
        elif isinstance(node, ast.Call) and (name := _getattr(node, aliases)):
            found.add(Reference(name, node.lineno))
    return sorted(found, key=lambda r: (r.line, r.name))


def matches(name: str, pattern: str) -> bool:
    """Whether `name` fits `pattern`, part by part as file names do; a last part `**` is anything below, or nothing."""
    parts, wanted = name.split("."), pattern.split(".")
    if wanted[-1] == "**":
        wanted.pop()
        parts = parts[: len(wanted)]
    return len(parts) == len(wanted) and all(map(fnmatchcase, parts, wanted))


def _dotted(node: ast.AST, aliases: dict[str, str]) -> str | None:
    """The full name of `a.b.c` where `a` was imported, else None."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    if not isinstance(node, ast.Name) or node.id not in aliases:
        return None
    return ".".join([aliases[node.id], *reversed(parts)])


def _getattr(node: ast.Call, aliases: dict[str, str]) -> str | None:
    """The full name of `getattr(a.b, "c")` where `a` was imported, else None."""
    if not isinstance(node.func, ast.Name) or node.func.id != "getattr" or len(node.args) < 2:
        return None
    owner, attribute = _dotted(node.args[0], aliases), node.args[1]
    if owner and isinstance(attribute, ast.Constant) and isinstance(attribute.value, str):
        return f"{owner}.{attribute.value}"
    return None


def _spells_name(text: str) -> bool:
    return "." in text and all(part.isidentifier() for part in text.split("."))
