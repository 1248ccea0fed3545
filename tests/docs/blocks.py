"""The code blocks of a document, and running them.

The blocks of a document run in order, in one empty folder and one Python namespace. A comment before a block says
otherwise: `<!-- file PATH -->` writes it to a file instead, `<!-- slow -->` runs in `make slow`, `<!-- network -->` and
`<!-- hours -->` never run here.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kinetoscope.cli import main

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(
    r"(?:<!-- (slow|network|hours|file \S+) -->\n)?^```(python|sh)\n(.*?)^```$", re.MULTILINE | re.DOTALL
)


def blocks(document: Path, mark: str) -> list[tuple[str, str]]:
    """(language or file mark, text) of the blocks with a mark ("" for none, and for files), in order."""
    return [
        (found if found.startswith("file ") else language, text)
        for found, language, text in BLOCK.findall(document.read_text())
        if found == mark or (not mark and found.startswith("file "))
    ]


def execute(text: str, namespace: dict[str, Any]) -> dict[str, Any]:
    """`namespace` after Python source ran in it, without this module's own `__future__` flags."""
    exec(compile(text, "snippet", "exec", dont_inherit=True), namespace)
    return namespace


def run(parts: list[tuple[str, str]], folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Run blocks in `folder`; returns the namespace of the Python ones."""
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)
    Path("recipes").symlink_to(ROOT / "recipes")
    namespace: dict[str, Any] = {"__name__": "snippet"}
    for language, text in parts:
        if language.startswith("file "):
            path = Path(language.removeprefix("file "))
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
            continue
        if language == "python":
            execute(text, namespace)
            continue
        for line in text.replace("\\\n", " ").splitlines():
            word, *rest = shlex.split(line, comments=True) or [""]
            if word == "kinetoscope":
                assert main(rest) == 0, line
            elif word == "make":
                makefile = (ROOT / "Makefile").read_text()
                assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in rest), line
            elif word:
                subprocess.run(["bash", "-c", line], check=True, env=environment())
    return namespace


def environment() -> dict[str, str]:
    """A shell's, in which `python` is this one and finds this package and the tests' helpers."""
    own = dict(os.environ)  # noqa: TID251 - a test's child process
    own["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{own.get('PATH', '')}"
    own["PYTHONPATH"] = os.pathsep.join([str(ROOT / "tests"), str(ROOT / "src")])
    return own
