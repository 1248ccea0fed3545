"""Measure the size, the structure and the docstrings of the package, and hold each figure under its limit.

`python -m lint.measure` prints every figure beside its limit in `limits.json` and fails if one is above it.
`python -m lint.measure --lower` writes the figures that are below their limits into that file: limits only fall.
"""

from __future__ import annotations

import argparse
import ast
import io
import json
import re
import sys
import tokenize
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

import grimp
import networkx

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "kinetoscope"
LIMITS = Path(__file__).with_name("limits.json")
VERBS = frozenset(Path(__file__).with_name("verbs.txt").read_text().split())
LONGEST_FILE, WIDEST_FOLDER, FEW_ARGUMENTS = 400, 15, 3
_NO_CODE = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
_CLAUSE = re.compile(r"(What|Whether|Why|Who|Whom|Whose|Where|When|How|Which|That)\b")
_SHAPE = re.compile(r"\[[A-Za-z0-9_ ,.*+()/-]+\]")

Function = ast.FunctionDef | ast.AsyncFunctionDef


def measure(package: Path = PACKAGE) -> dict[str, int]:
    """Return every figure of a package by name; smaller is better for each of them."""
    sources = {path: path.read_text(encoding="utf-8") for path in sorted(package.rglob("*.py"))}
    trees = {path: ast.parse(source) for path, source in sources.items()}
    modules = Counter(path.parent for path in sources if path.name not in ("__init__.py", "__main__.py"))
    classes = Counter(n.name for t in trees.values() for n in ast.walk(t) if isinstance(n, ast.ClassDef))
    public = [f for tree in trees.values() for f in public_functions(tree)]
    documented = [(f, text) for f in public if (text := ast.get_docstring(f))]
    return {
        "code lines": sum(code_lines(source) for source in sources.values()),
        f"files over {LONGEST_FILE} lines": sum(s.count("\n") > LONGEST_FILE for s in sources.values()),
        f"folders with more than {WIDEST_FOLDER} modules": sum(n > WIDEST_FOLDER for n in modules.values()),
        "modules in a circle of imports": modules_in_circles(package.name),
        "class names defined more than once": sum(n > 1 for n in classes.values()),
        "public functions without a docstring": len(public) - len(documented),
        "docstrings that do not start with a verb": sum(not starts_with_verb(text) for _, text in documented),
        "docstrings that are a What, Whether or Why clause": sum(bool(_CLAUSE.match(text)) for _, text in documented),
        "docstrings that are only a shape": sum(is_only_a_shape(text) for _, text in documented),
        "functions of three or more arguments without an Args section": sum(
            len(arguments(f)) >= FEW_ARGUMENTS and "Args:" not in text for f, text in documented
        ),
        "functions of tensors whose docstring names no shape": sum(
            takes_or_returns_tensor(f) and not _SHAPE.search(text) for f, text in documented
        ),
    }


def code_lines(source: str) -> int:
    """Return the number of lines with code: imports count; comments, docstrings and blank lines do not."""
    lines: set[int] = set()
    previous = tokenize.NEWLINE
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type in _NO_CODE:
            previous = previous if token.type in (tokenize.COMMENT, tokenize.NL) else token.type
            continue
        starts = previous in (tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
        previous = token.type
        if token.type == tokenize.STRING and starts:  # a docstring, or the documentation of an attribute
            continue
        lines.update(range(token.start[0], token.end[0] + 1))
    return len(lines)


def public_functions(tree: ast.Module) -> Iterator[Function]:
    """Yield the functions and methods of a module that a reader may call: no leading underscore, not nested."""
    for node in tree.body:
        members = node.body if isinstance(node, ast.ClassDef) else [node]
        for item in members:
            if isinstance(item, Function) and not item.name.startswith("_") and not _repeats(item):
                yield item


def _repeats(function: Function) -> bool:
    """Return whether the docstring belongs elsewhere: to an overload's implementation, or to the overridden method."""
    names = {ast.unparse(d).rpartition(".")[2] for d in function.decorator_list}
    return bool(names & {"overload", "override", "setter"})


def arguments(function: Function) -> list[str]:
    """Return the names of a function's arguments, without `self`, `cls`, `*args` and `**kwargs`."""
    given = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
    return [a.arg for a in given if a.arg not in ("self", "cls")]


def starts_with_verb(docstring: str) -> bool:
    """Return whether the first word of a docstring is one of `verbs.txt`, in its base form or its third person."""
    word = (re.match(r"[A-Za-z-]+", docstring) or [""])[0].lower()
    return bool({word, word.removesuffix("s"), word.removesuffix("es"), re.sub("ies$", "y", word)} & VERBS)


def is_only_a_shape(docstring: str) -> bool:
    """Return whether a docstring starts with a shape or an arrow of shapes instead of a sentence."""
    first = docstring.partition("\n")[0]
    return bool(_SHAPE.match(first)) or "->" in first.partition(".")[0]


def takes_or_returns_tensor(function: Function) -> bool:
    """Return whether an annotation of the function names `Tensor`."""
    given = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
    annotations = [a.annotation for a in given] + [function.returns]
    return any(a is not None and re.search(r"\bTensor\b", ast.unparse(a)) for a in annotations)


def modules_in_circles(package: str) -> int:
    """Return how many modules import each other in a circle, imports inside functions included."""
    graph = grimp.build_graph(package, exclude_type_checking_imports=True)
    edges = ((m, other) for m in graph.modules for other in graph.find_modules_directly_imported_by(m))
    circles = networkx.strongly_connected_components(networkx.DiGraph(edges))
    return sum(len(circle) for circle in circles if len(circle) > 1)


def lines_by_package(package: Path = PACKAGE) -> dict[str, int]:
    """Return the lines of code of each top-level package, the largest first."""
    counts: Counter[str] = Counter()
    for path in package.rglob("*.py"):
        counts[path.relative_to(package).parts[0].removesuffix(".py")] += code_lines(path.read_text(encoding="utf-8"))
    return dict(counts.most_common())


def violations(figures: Mapping[str, int], limits: Mapping[str, int]) -> list[str]:
    """Return a message for each figure above its limit, or without a limit."""
    return [f"{name}: {n}, the limit is {limits.get(name)}" for name, n in figures.items() if n > limits.get(name, -1)]


def main() -> int:
    """Print the figures; return 1 if one is above its limit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lower", action="store_true", help="write lower figures into limits.json")
    parser.add_argument("--packages", action="store_true", help="print the lines of code of each package too")
    options = parser.parse_args()
    figures = measure()
    limits: dict[str, int] = json.loads(LIMITS.read_text()) if LIMITS.is_file() else {}
    if options.lower:
        limits = {name: min(n, limits.get(name, n)) for name, n in figures.items()}
        LIMITS.write_text(json.dumps(limits, indent=2) + "\n")
    for name, n in figures.items():
        print(f"{n:7,}  of at most {limits.get(name, 0):7,}  {name}")
    if options.packages:
        print(*(f"{n:7,}  {name}" for name, n in lines_by_package().items()), sep="\n")
    wrong = violations(figures, limits)
    print(*wrong, sep="\n", file=sys.stderr)
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
