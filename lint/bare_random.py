"""Find random numbers drawn without a generator: `python -m lint.bare_random FOLDER ...`.

torch's global generator couples every piece of code that draws from it, so that one more draw anywhere changes all
videos.
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path

DRAWS = frozenset({"rand", "rand_like", "randint", "randint_like", "randn", "randn_like", "randperm", "normal"})
DRAWS_IN_PLACE = frozenset(
    {"normal_", "uniform_", "bernoulli_", "exponential_", "random_", "log_normal_", "trunc_normal_"}
)


def bare_draws(source: str) -> list[tuple[int, str]]:
    """(line, call) of each draw in `source` that does not pass `generator=`: `torch.randn(...)`, `x.normal_(...)`."""
    found: list[tuple[int, str]] = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        of_torch = isinstance(node.func.value, ast.Name) and node.func.value.id == "torch" and node.func.attr in DRAWS
        if (of_torch or node.func.attr in DRAWS_IN_PLACE) and "generator" not in {k.arg for k in node.keywords}:
            found.append((node.lineno, ast.unparse(node.func)))
        if (
            of_torch
            and isinstance(node.func, ast.Attribute)
            and node.keywords
            and any(_is_none(k) for k in node.keywords)
        ):
            found.append((node.lineno, f"{ast.unparse(node.func)} with generator=None"))
    return found


def _is_none(keyword: ast.keyword) -> bool:
    return keyword.arg == "generator" and isinstance(keyword.value, ast.Constant) and keyword.value.value is None


def main(folders: list[str]) -> int:
    """Print every bare draw; the number found, at most 1, is the exit status."""
    lines = [
        f"{path}:{line}: {call} draws without generator=; use kinetoscope.diffusion.noise or pass one"
        for folder in folders
        for path in sorted(Path(folder).rglob("*.py"))
        for line, call in bare_draws(path.read_text())
    ]
    print("\n".join(lines) or "Random draws: all from a generator.")
    return min(len(lines), 1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
