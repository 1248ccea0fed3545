"""Packages that register solvers, backends, caches, methods and families: by `--import`, and by entry points."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kinetoscope import VideoGenerator
from kinetoscope.attention import BACKENDS
from kinetoscope.cli import main
from kinetoscope.core import extensions
from kinetoscope.core.errors import ConfigError
from kinetoscope.diffusion.solver import LEVELS, SOLVERS
from kinetoscope.media import read_metadata
from kinetoscope.pipelines.presets import PIPELINES
from kinetoscope.runtime import caches
from kinetoscope.train.methods import METHODS, method_class
from kinetoscope.train.methods.finetune import Finetune
from tiny import make_tiny_wan

SMALL = ["--size", "32x32", "--frames", "5", "--steps", "3", "--device", "cpu", "--dtype", "float32"]
PACKAGE = '''
"""An extension."""
from kinetoscope.attention import register_backend
from kinetoscope.attention.backends import math_attention
from kinetoscope.diffusion.runge_kutta import HeunSolver
from kinetoscope.diffusion.solver import register_solver
from kinetoscope.engine.hooks.caches import FBCache
from kinetoscope.pipelines.presets import register_pipeline
from kinetoscope.pipelines.presets.wan import WanTextToVideo
from kinetoscope.runtime.caches import register_cache
from kinetoscope.train.methods import register_method
from kinetoscope.train.methods.finetune import Finetune


class Late(FBCache):
    name = "late"


class ExtraPipeline(WanTextToVideo):
    """A family of its own name."""


class ExtraFinetune(Finetune):
    """A method of its own name."""


def register():
    register_solver("extra-heun", "tiny_extension:HeunSolver")
    register_backend("extra-math", lambda q, k, v, *, key_bias=None: math_attention(q, k, v, key_bias=key_bias))
    register_cache(Late)
    register_pipeline("ExtraPipeline", ExtraPipeline)
    register_method("extra_finetune", "tiny_extension:ExtraFinetune")
'''
LOOSE = '__version__ = "0.3"\nfrom kinetoscope.diffusion.solver import register_solver\n' + (
    'register_solver("loose-euler", "kinetoscope.diffusion.runge_kutta:EulerSolver")\n'
)


def install(folder: Path, name: str, version: str, source: str, point: str) -> None:
    """Put a package and its .dist-info into a folder, as pip does."""
    (folder / name).mkdir()
    (folder / name / "__init__.py").write_text(source)
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: {version}\n")
    (info / "entry_points.txt").write_text(f"[kinetoscope.extensions]\n{name} = {point}\n")
    (info / "RECORD").write_text("")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    install(folder, "tiny_extension", "1.2", PACKAGE, "tiny_extension:register")
    install(folder, "broken_extension", "0.1", "import no_such_thing\n", "broken_extension")
    install(folder, "leaving_extension", "0.1", "import sys\nsys.exit('bye')\n", "leaving_extension")
    return folder


@pytest.fixture(scope="module")
def wan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_wan(tmp_path_factory.mktemp("wan"))


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A process that has loaded no extension yet, and forgets them afterwards."""
    for registry in (SOLVERS, LEVELS, BACKENDS, caches._CLASSES, PIPELINES, METHODS):
        for name in registry:
            monkeypatch.setitem(registry, name, registry[name])  # pyright: ignore[reportArgumentType]
    registries: list[Any] = [SOLVERS, LEVELS, BACKENDS, caches._CLASSES, PIPELINES, METHODS]
    before = [set(r) for r in registries]
    kept = extensions._searched, dict(extensions._loaded), list(extensions._named), dict(extensions._failed)
    path = list(sys.path)
    extensions._searched = False
    for store in (extensions._loaded, extensions._named, extensions._failed):
        store.clear()
    yield
    extensions._searched = kept[0]
    for store in (extensions._loaded, extensions._named, extensions._failed):
        store.clear()
    extensions._loaded.update(kept[1])
    extensions._named.extend(kept[2])
    extensions._failed.update(kept[3])
    for registry, names in zip(registries, before, strict=True):
        for name in set(registry) - names:
            del registry[name]
    sys.path[:] = path
    for name in [n for n in sys.modules if n.partition(".")[0] in ("tiny_extension", "broken_extension", "loose")]:
        del sys.modules[name]


@pytest.mark.usefixtures("fresh")
def test_installed_extension_is_known_to_every_command_and_a_broken_one_is_left_out(
    site: Path, wan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    monkeypatch.syspath_prepend(site)
    family = shutil.copytree(wan, tmp_path / "family")
    index = json.loads((family / "model_index.json").read_text())
    (family / "model_index.json").write_text(json.dumps({**index, "_class_name": "ExtraPipeline"}))
    video = tmp_path / "a.mp4"
    asked = ["--scheduler", "extra-heun", "--attention", "extra-math", "--cache", "late:threshold=0.01"]
    assert main(["generate", "a red cat", "--model", str(family), "-o", str(video), *asked, *SMALL]) == 0
    told = [r.getMessage() for r in caplog.records if r.name == "kinetoscope.extensions"]
    assert len(told) == 2
    assert "extension 'broken_extension' of broken-extension 0.1 is left out: ModuleNotFoundError" in "".join(told)
    assert "extension 'leaving_extension' of leaving-extension 0.1 is left out: SystemExit: bye" in "".join(told)
    record = read_metadata(video)
    assert record["extensions"] == [{"module": "tiny_extension", "version": "1.2"}]
    assert record["interceptors"] == [] and str(site) not in json.dumps(record)
    assert main(["replay", str(video)]) == 0
    ab = ["--a", "scheduler=heun", "--b", "scheduler=extra-heun", "--prompt", "a", "--warmup", "0", "--min-ssim", "1"]
    assert main(["ab", "--model", str(family), "-o", str(tmp_path / "ab"), *ab, *SMALL]) == 0
    assert "equal" in capsys.readouterr().out
    assert issubclass(method_class("extra_finetune"), Finetune)
    assert main(["doctor", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["extensions"] == {"tiny_extension": "1.2"} and len(facts["failed_extensions"]) == 2


@pytest.mark.usefixtures("fresh")
def test_named_module_of_the_current_folder_is_imported_and_needed_for_replay(
    wan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("loose.py").write_text(LOOSE)
    asked = ["--model", str(wan), "-o", "a.mp4", "--scheduler", "loose-euler", *SMALL]
    assert main(["generate", "a red cat", *asked]) == 1
    assert "unknown scheduler 'loose-euler'" in capsys.readouterr().err
    assert main(["generate", "a red cat", *asked, "--import", "loose"]) == 0
    assert read_metadata("a.mp4")["extensions"] == [{"module": "loose", "version": "0.3"}]
    assert main(["--import=loose", "replay", "a.mp4", "--model", str(wan)]) == 0
    extensions._loaded.clear()  # another process
    capsys.readouterr()
    assert main(["replay", "a.mp4"]) == 1
    told = capsys.readouterr().err
    assert "made with loose 0.3, which this process has not loaded" in told
    assert "kinetoscope --import loose replay FILE" in told


@pytest.mark.usefixtures("fresh")
def test_module_that_cannot_be_imported_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("loose.py").write_text("raise ValueError('not\\ntoday')")
    for module, message in (
        ("no_such.module", "there is no module 'no_such'"),
        ("loose", "--import loose failed: ValueError: not today"),
        ("a/b.py", "is not the name of a module"),
    ):
        assert main(["--import", module, "models"]) == 1
        told = capsys.readouterr().err
        assert message in told and told.count("\n") == 1
    with pytest.raises(SystemExit):
        main(["models", "--import"])
    assert "--import needs the name of a module" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="there is no module"):
        extensions.load_extensions(["no_such"])


@pytest.mark.slow
@pytest.mark.usefixtures("fresh")
def test_worker_process_imports_the_named_modules(wan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker is a fresh interpreter: without the module it would not know the solver."""
    monkeypatch.chdir(tmp_path)
    Path("loose.py").write_text(LOOSE)
    extensions.load_extensions(["loose"])
    size: Any = {"height": 32, "width": 32, "num_frames": 5, "num_inference_steps": 2}
    here = VideoGenerator.from_pretrained(wan, device="cpu", scheduler="loose-euler").generate_video("a", **size)
    with VideoGenerator.from_pretrained(
        wan, device="cpu", scheduler="loose-euler", executor="processes:start=120"
    ) as generator:
        there = generator.generate_video("a", **size)
    assert (there.frames == here.frames).all() and there.record == here.record
