"""The figures of `lint.measure` count what their names say."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from lint.measure import code_lines, is_only_a_shape, measure, public_functions, starts_with_verb, violations

SOURCE = '''"""A module."""

import torch

# a comment
LIMIT = (
    1  # one entry
)
"""The documentation of LIMIT."""


def longest(a, b, c):
    """What is longest."""
    text = """a string that is
    a value"""
    return text


class Net:
    """A network."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the sum."""
        return x

    def _private(self): ...
'''


def test_code_lines_count_no_comments_docstrings_and_blank_lines() -> None:
    lines = [
        "import",
        "LIMIT = (",
        "1",
        ")",
        "def longest",
        "text",
        "a value",
        "return",
        "class",
        "def",
        "return",
        "def",
    ]
    assert code_lines(SOURCE) == len(lines)


def test_public_functions_are_functions_and_methods_without_underscore() -> None:
    assert [f.name for f in public_functions(ast.parse(SOURCE))] == ["longest", "forward"]


@pytest.mark.parametrize(
    ("docstring", "verb"),
    [
        ("Return it.", True),
        ("Returns it.", True),
        ("Copies it.", True),
        ("The longest.", False),
        ("[B, C] -> x", False),
    ],
)
def test_starts_with_verb_reads_both_forms(docstring: str, verb: bool) -> None:
    assert starts_with_verb(docstring) is verb


def test_a_shape_is_no_sentence() -> None:
    assert is_only_a_shape("[B, C, T] -> [B, T]") and is_only_a_shape("x [B, N] -> y [B, M].")
    assert not is_only_a_shape("Return the sum, [B, C].")


def test_measure_counts_each_figure_of_a_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "tiny_measured_package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "a.py").write_text("import tiny_measured_package.b\n" + SOURCE)
    (package / "b.py").write_text("def f():\n    import tiny_measured_package.a\n\nclass Net: ...\n" + "#\n" * 400)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert list(measure(package).values()) == [16, 1, 0, 2, 1, 1, 1, 1, 0, 1, 1]


def test_violations_name_figures_above_and_without_a_limit() -> None:
    assert violations({"a": 2, "b": 3, "c": 0}, {"a": 2, "b": 2}) == ["b: 3, the limit is 2", "c: 0, the limit is None"]
