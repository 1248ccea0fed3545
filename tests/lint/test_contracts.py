"""The lint rules of our own catch what they are for."""

from __future__ import annotations

from pathlib import Path

import pytest
from lint.references import matches, references

TREE = Path(__file__).parents[2] / "src" / "kinetoscope"


def names(source: str) -> set[str]:
    return {r.name for r in references(source)}


@pytest.mark.parametrize(
    "source",
    [
        "import diffusers.pipelines",
        "from diffusers.pipelines import WanPipeline",
        "from diffusers import pipelines",
        "import diffusers\ndiffusers.pipelines.wan",
        "import diffusers as d\nd.pipelines",
        "import diffusers\ngetattr(diffusers, 'pipelines')",
        "import importlib\nimportlib.import_module('diffusers.pipelines')",
    ],
)
def test_every_way_to_reach_a_module_is_seen(source: str) -> None:
    assert any(matches(n, "diffusers.pipelines.**") for n in names(source))


def test_patterns() -> None:
    assert matches("a.b.c", "a.**") and matches("a", "a.**") and matches("a.b", "a.*")
    assert not matches("a.b.c", "a.*") and not matches("ab", "a.**")


def test_no_source_reaches_what_is_ours_to_write() -> None:
    for path in TREE.rglob("*.py"):
        for name in names(path.read_text()):
            assert not matches(name, "diffusers.pipelines.**"), path
            assert not matches(name, "diffusers.models.transformers.**"), path
