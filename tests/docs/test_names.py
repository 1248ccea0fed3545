"""The page of FastVideo's names: each of ours exists."""

from __future__ import annotations

import re

from docs.blocks import ROOT

ROW = re.compile(r"^\| (?!RFC|---).*? \| (.*?) \| .*\|$", re.MULTILINE)


def test_names_of_the_page_exist() -> None:
    source = "\n".join(f.read_text(encoding="utf-8") for f in (ROOT / "src").rglob("*.py"))
    cells = ROW.findall((ROOT / "docs/fastvideo-names.md").read_text(encoding="utf-8"))
    paths = [code.partition("(")[0] for cell in cells for code in re.findall(r"`([^`]+)`", cell)]
    names = {name for path in paths if "=" not in path for name in re.findall(r"[A-Za-z_]\w+", path)}
    defined = r"(?:class|def) {0}\b|\b{0}: |\b{0} = |\"{0}\"|\b{0}\."
    assert len(cells) > 25 and len(names) > 45
    assert [n for n in sorted(names) if not re.search(defined.format(n), source)] == []
