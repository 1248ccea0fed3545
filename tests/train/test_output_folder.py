"""The output folder of a training: claimed by a start that succeeds, held by one process, resumed on its inputs."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from kinetoscope.core.errors import ConfigError, InputError, KinetoscopeError
from kinetoscope.train import run_inputs
from kinetoscope.train.data.preprocess import preprocess
from kinetoscope.train.data.table import INDEX, DataSet, shard_path
from kinetoscope.train.output_folder import OutputFolder
from kinetoscope.train.post import load_post_recipe
from kinetoscope.train.post_run import run_post_recipe
from kinetoscope.train.run_inputs import FileDigests, sampled_digest
from tiny import make_tiny_wan
from train.post_runs import write_recipe

MISTAKES = [
    "models.student.init_from=nowhere/at-all",
    "models.student.lora={targets: [no_such_layer]}",
    "models.student.transformer=nowhere.safetensors",
    "models.student.attention=vsa:sparsity=0.5,tile=no",
    "method={name: finetune, min_snr: 5.0}",
    "data={source: latents, path: nowhere}",
    "data.frames=4",
    "callbacks.validation={every: 1, prompts: [a red circle], params: {num_frames: 4}}",
    "export.scheduler={flow_shift: 2.0}",
    "device=abacus",
]
"""Each fails at another place before the first step."""


def test_a_failed_start_leaves_the_folder_to_another_recipe(model: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, model, loop={"steps": 1})
    bare = shutil.copytree(model, tmp_path / "bare")
    index = json.loads((bare / "model_index.json").read_text())
    del index["scheduler"]
    (bare / "model_index.json").write_text(json.dumps(index))
    for override in MISTAKES:
        with pytest.raises(KinetoscopeError):
            run_post_recipe(recipe, [override, *([f"models.student.init_from={bare}"] if "export" in override else [])])
        assert not (tmp_path / "run" / "recipe.json").exists(), override
    run_post_recipe(recipe)
    with pytest.raises(ConfigError, match="another seed"):
        run_post_recipe(recipe, ["seed=1"])
    with pytest.raises(ConfigError, match="already holds a run"):
        run_post_recipe(recipe, fresh=True)


def test_a_causal_start_of_a_failed_start_is_not_used(model: Path, tmp_path: Path) -> None:
    start = {"init_from": str(model), "trainable": True, "causal": {"num_frames_per_block": 1}}
    recipe = write_recipe(tmp_path, model, models={"student": start}, loop={"steps": 1})
    with pytest.raises(KinetoscopeError):
        run_post_recipe(recipe, ["data={source: latents, path: nowhere}"])
    run_post_recipe(recipe, ["models.student.causal.num_frames_per_block=2"])
    config = json.loads((tmp_path / "run" / "causal" / "student" / "transformer" / "config.json").read_text())
    assert config["num_frames_per_block"] == 2


def test_a_second_process_is_refused_while_one_trains(model: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, model, loop={"steps": 1})
    with OutputFolder(tmp_path / "run", load_post_recipe(recipe)).held():
        with pytest.raises(ConfigError, match=r"output=.*run: another process trains in this folder; wait for it"):
            run_post_recipe(recipe)
        with pytest.raises(ConfigError, match="holds no checkpoint yet"):
            run_post_recipe(recipe, export_only=True)
    run_post_recipe(recipe)


CONSTANT = {"learning_rate": 0.01, "warmup": 0, "final_fraction": 1.0}
"""An optimizer whose run may be given more steps."""


def test_a_resume_is_refused_when_the_data_set_was_replaced(model: Path, tmp_path: Path) -> None:
    made = {"sizes": [(16, 32)], "frames": [5], "shard": 2}
    preprocess(model, "world:shapes", tmp_path / "latents", clips=3, **made)
    data = {"source": "latents", "path": str(tmp_path / "latents"), "batch": 2}
    recipe = write_recipe(tmp_path, model, data=data, optimizer=CONSTANT)
    run_post_recipe(recipe, ["loop.steps=1"])
    shutil.rmtree(tmp_path / "latents")
    preprocess(model, "world:shapes", tmp_path / "latents", clips=4, **made)
    with pytest.raises(ConfigError, match=r"changed since this run began: data rows; put back .*output=FOLDER"):
        run_post_recipe(recipe, ["loop.steps=2"])
    shutil.rmtree(tmp_path / "latents")
    preprocess(model, "world:shapes", tmp_path / "latents", clips=3, **made)
    run_post_recipe(recipe, ["loop.steps=2"])


def test_a_resume_is_refused_when_base_weights_were_replaced(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = make_tiny_wan(tmp_path / "model")
    lora = {"student": {"init_from": str(model), "trainable": True, "lora": {"rank": 2}}}
    recipe = write_recipe(tmp_path, model, models=lora, optimizer=CONSTANT)
    run_post_recipe(recipe, ["loop.steps=1"])
    file = next((model / "transformer").glob("*.safetensors"))
    kept, weights = file.read_bytes(), load_file(file)
    weights["proj_out.bias"] += 1
    save_file(weights, file)
    for export in (False, True):
        with pytest.raises(ConfigError, match=r"changed since this run began: models\.student transformer;"):
            run_post_recipe(recipe, ["loop.steps=2"], export_only=export)
    file.write_bytes(kept)
    vae = next((model / "vae").glob("*.safetensors"))
    of_vae = vae.read_bytes()
    vae.write_bytes(of_vae[:-1] + bytes([of_vae[-1] ^ 1]))
    with pytest.raises(ConfigError, match=r"began: models\.student vae;"):
        run_post_recipe(recipe, ["loop.steps=2"])
    vae.write_bytes(of_vae)
    with caplog.at_level(logging.WARNING, "kinetoscope.train"):
        run_post_recipe(recipe, ["loop.steps=2", "threads=1"])
        assert not caplog.messages
        (tmp_path / "run" / "inputs.json").unlink()  # as a run of an earlier version
        run_post_recipe(recipe, ["loop.steps=3"])
        assert "recorded no digests of its inputs" in caplog.text and (tmp_path / "run" / "inputs.json").exists()
        caplog.clear()
        record = json.loads((tmp_path / "run" / "inputs.json").read_text())
        record["environment"]["torch"] = "1.0"
        (tmp_path / "run" / "inputs.json").write_text(json.dumps(record))
        run_post_recipe(recipe, ["loop.steps=4"])
        assert f"not to the same bits: torch={torch.__version__} (was 1.0)" in caplog.text


def test_digests_of_files_are_taken_once_while_the_files_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_bytes(b"one")
    first = FileDigests()
    digest = first.of(tmp_path / "a")
    monkeypatch.setattr(run_inputs, "file_digest", lambda file: pytest.fail("it must not be read again"))
    assert FileDigests(first.used).of(tmp_path / "a") == digest
    monkeypatch.undo()
    (tmp_path / "a").write_bytes(b"two")
    assert FileDigests(first.used).of(tmp_path / "a") != digest


@pytest.mark.parametrize("size", [100, 1000])
def test_sampled_digests_tell_files_of_random_data_apart(
    tmp_path: Path, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_inputs, "SAMPLED_BYTES", 400)
    monkeypatch.setattr(run_inputs, "PIECE", 20)
    found: set[str] = set()
    for number in range(4):
        data = np.random.default_rng(number // 2).bytes(size + number % 2)
        (tmp_path / "file").write_bytes(data)
        found.add(sampled_digest(tmp_path / "file"))
        (tmp_path / "file").write_bytes(data[:-1] + b"?")  # the end is always read
        found.add(sampled_digest(tmp_path / "file"))
    assert len(found) == 8


def test_the_digest_of_a_data_set_is_that_of_its_rows(model: Path, clips: Path, tmp_path: Path) -> None:
    made = {"sizes": [(32, 32)], "frames": [5], "shard": 2, "fps": 12.0}
    folders = [tmp_path / name for name in ("a", "b", "c")]
    for folder in folders[:2]:
        preprocess(model, clips, folder, **made)
    other = shutil.copytree(clips, tmp_path / "clips")
    (other / "a.txt").write_text("a red square")
    preprocess(model, other, folders[2], **made)
    digests = [DataSet(folder).digest() for folder in folders]
    assert digests[0] == digests[1] != digests[2]
    index = json.loads((folders[0] / INDEX).read_text())
    assert len(index["content"]) == len(index["rows"])
    del index["content"]  # as an earlier version wrote it
    (folders[0] / INDEX).write_text(json.dumps(index))
    old = DataSet(folders[0])
    assert old.digest() != digests[0] and len(list(old)) == len(old)
    one, two = (shard_path(folders[1], n) for n in (0, 1))
    one.write_bytes(two.read_bytes())
    with pytest.raises(InputError, match=r"part-00000\.parquet holds other rows than index\.json"):
        list(DataSet(folders[1]))
