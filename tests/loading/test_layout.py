"""Models published without `model_index.json`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kinetoscope.core.errors import ModelLoadError
from kinetoscope.loading import directory, resolve_model
from kinetoscope.loading.directory import Layout, register_layout


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory of the layout "net/ holds the transformer"."""
    monkeypatch.setattr(directory, "_LAYOUTS", [])
    index = {"_class_name": "SomePipeline", "transformer": ["some", "SomeModel"]}
    register_layout(Layout("net", "SomeModel", index, {"transformer": "net"}))
    (tmp_path / "net").mkdir()
    (tmp_path / "net" / "config.json").write_text(json.dumps({"_class_name": "SomeModel", "width": 3}))
    return tmp_path


def test_known_by_the_class_of_a_component(folder: Path) -> None:
    model = resolve_model(folder)
    assert model.model_index["_class_name"] == "SomePipeline"
    assert model.components() == {"transformer": "SomeModel"}
    assert model.folder("transformer") == folder / "net"
    assert model.config("transformer")["width"] == 3


def test_fingerprint_is_of_the_components(folder: Path) -> None:
    before = resolve_model(folder).fingerprint()
    (folder / "README.md").write_text("words")
    assert resolve_model(folder).fingerprint() == before
    (folder / "net" / "config.json").write_text(json.dumps({"_class_name": "SomeModel", "width": 4}))
    assert resolve_model(folder).fingerprint() != before


def test_an_index_comes_first(folder: Path) -> None:
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "Other", "transformer": ["some", "SomeModel"]}))
    model = resolve_model(folder)
    assert model.model_index["_class_name"] == "Other"
    with pytest.raises(ModelLoadError, match="folder of component"):
        model.folder("transformer")


def test_another_class_is_not_that_layout(folder: Path) -> None:
    (folder / "net" / "config.json").write_text(json.dumps({"_class_name": "OtherModel"}))
    with pytest.raises(ModelLoadError, match="model_index"):
        resolve_model(folder)
