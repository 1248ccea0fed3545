"""What the README and docs say to type works.

The blocks of a document run in order, in one empty folder and one Python namespace. A comment before a block says
otherwise: `<!-- slow -->` runs in `make slow`, `<!-- network -->` and `<!-- hours -->` never run here.
"""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest

from kinetoscope.cli import main

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", ROOT / "ARCHITECTURE.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"(?:<!-- (slow|network|hours) -->\n)?^```(python|sh)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)#]+)(?:#[^)]*)?\)")


def blocks(document: Path, mark: str) -> list[tuple[str, str]]:
    """(language, text) of the blocks with a mark ("" for none), in order."""
    return [(language, text) for found, language, text in BLOCK.findall(document.read_text()) if found == mark]


def with_blocks(mark: str) -> Any:
    documents = [d for d in DOCUMENTS if blocks(d, mark)]
    return pytest.mark.parametrize("document", documents, ids=[d.name for d in documents])


@with_blocks("")
def test_blocks_run(document: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(blocks(document, ""), tmp_path, monkeypatch)


@pytest.mark.slow
@with_blocks("slow")
def test_slow_blocks_run(document: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(blocks(document, "slow"), tmp_path, monkeypatch)


def run(parts: list[tuple[str, str]], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    Path("recipes").symlink_to(ROOT / "recipes")
    namespace: dict[str, Any] = {"__name__": "snippet"}
    for language, text in parts:
        if language == "python":
            exec(compile(text, "snippet", "exec"), namespace)
            continue
        for line in text.replace("\\\n", " ").splitlines():
            word, *rest = shlex.split(line, comments=True) or [""]
            if word == "kinetoscope":
                assert main(rest) == 0, line
            elif word == "make":
                makefile = (ROOT / "Makefile").read_text()
                assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in rest), line
            elif word:
                subprocess.run(["bash", "-c", line], check=True)


@pytest.mark.parametrize(
    "document", [*DOCUMENTS, ROOT / "CHANGELOG.md", *(ROOT / "docs/decisions").glob("*.md")], ids=str
)
def test_links_lead_somewhere(document: Path) -> None:
    for target in LINK.findall(document.read_text()):
        if not target.startswith(("http://", "https://")):
            assert (document.parent / target).exists(), target


def test_architecture_is_one_page() -> None:
    assert len((ROOT / "ARCHITECTURE.md").read_text().splitlines()) <= 80


def test_figures_of_the_readme_are_the_measured_ones() -> None:
    program = (ROOT / "docs/figures.py").read_text()
    figures: dict[str, Any] = {"__name__": "figures", "__file__": str(ROOT / "docs/figures.py")}
    exec(compile(program, "figures", "exec"), figures)
    text = (ROOT / "README.md").read_text()
    assert figures["filled"](text) == text, "run `python docs/figures.py`"
