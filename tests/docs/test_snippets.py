"""What the README and docs say to type works; `docs/blocks.py` has the rules."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from docs.blocks import ROOT, blocks, run

DOCUMENTS = [ROOT / "README.md", ROOT / "ARCHITECTURE.md", *sorted((ROOT / "docs").glob("*.md"))]
ELSEWHERE = {"adding-a-model.md"}  # run, and looked into, by its own test
LINK = re.compile(r"\]\(([^)#]+)(?:#[^)]*)?\)")


def with_blocks(mark: str) -> Any:
    documents = [d for d in DOCUMENTS if blocks(d, mark) and d.name not in ELSEWHERE]
    return pytest.mark.parametrize("document", documents, ids=[d.name for d in documents])


@with_blocks("")
def test_blocks_run(document: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(blocks(document, ""), tmp_path, monkeypatch)


@pytest.mark.slow
@with_blocks("slow")
def test_slow_blocks_run(document: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(blocks(document, "slow"), tmp_path, monkeypatch)


@pytest.mark.parametrize(
    "document", [*DOCUMENTS, ROOT / "CHANGELOG.md", *(ROOT / "docs/decisions").glob("*.md")], ids=str
)
def test_links_lead_somewhere(document: Path) -> None:
    for target in LINK.findall(document.read_text()):
        if not target.startswith(("http://", "https://")):
            assert (document.parent / target).exists(), target


def test_architecture_is_one_page() -> None:
    assert len((ROOT / "ARCHITECTURE.md").read_text().splitlines()) <= 80


def test_figures_are_the_measured_ones() -> None:
    program = (ROOT / "docs/figures.py").read_text()
    figures: dict[str, Any] = {"__name__": "figures", "__file__": str(ROOT / "docs/figures.py")}
    exec(compile(program, "figures", "exec"), figures)
    for page in figures["PAGES"]:
        assert figures["filled"](page.read_text()) == page.read_text(), f"{page.name}: run `python docs/figures.py`"
