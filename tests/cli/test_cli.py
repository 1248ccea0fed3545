"""The command line in process: what is parsed, what is printed, and that every error is one line and a code."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import huggingface_hub
import pytest
from safetensors.torch import load_file, save_file

from kinetoscope.cli import main
from kinetoscope.cli.main import COMMANDS, build_parser
from kinetoscope.cli.options import parse_size
from kinetoscope.core.cpu import CpuLevel, cpu_level
from kinetoscope.media import read_metadata, read_video
from kinetoscope.reference import embedded_models
from tiny import make_tiny_wan

SMALL = ["--size", "32x48", "--frames", "5", "--steps", "2"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_wan(tmp_path_factory.mktemp("wan"))


@pytest.fixture
def copy(tiny: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny, tmp_path / "copy"))


def fails(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    """The one line that a failing command prints."""
    assert main([str(a) for a in argv]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1, (out, err)
    return err


def test_generate_writes_a_video_and_says_where_and_how_long(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "new" / "a.mp4"
    assert main(["generate", "a red cat", "--model", str(tiny), "--seed", "3", "-o", str(path), "--trace", *SMALL]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"{path}  32x48, 5 frames, 2 steps, seed 3")
    assert "denoising" in lines[-1] and "decoding" in lines[-1]
    frames, _ = read_video(path)
    assert frames.shape == (5, 32, 48, 3)
    assert read_metadata(path)["prompt"] == "a red cat"
    trace = json.loads((tmp_path / "new" / "a.trace.json").read_text())
    assert [r["step"] for r in trace] == [0, 1] and {"sigma", "cosine", "ms"} <= set(trace[0])
    assert {p.name for p in path.parent.iterdir()} == {"a.mp4", "a.trace.json"}


def test_several_prompts_and_videos_are_numbered(tiny: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red cat\n\n a circle \n")
    argv = ["generate", "--prompts-file", str(prompts), "--num-videos", "2", "--model", str(tiny), "--seed", "5"]
    assert main([*argv, "--output", str(tmp_path / "out"), *SMALL]) == 0
    names = ["0-a-red-cat-5.mp4", "1-a-red-cat-6.mp4", "2-a-circle-5.mp4", "3-a-circle-6.mp4"]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == names


def test_replay_is_bit_for_bit(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = tmp_path / "a.mp4", tmp_path / "b.mp4"
    assert main(["generate", "a cat", "--model", str(tiny), "--scheduler", "euler", "-o", str(first), *SMALL]) == 0
    assert main(["replay", str(first), "--output", str(second), "--model", str(tiny)]) == 0
    assert "identical" in capsys.readouterr().out
    assert first.read_bytes() == second.read_bytes()


def test_info_and_models_and_doctor(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(tiny), "--size", "64x64", "--frames", "33", "--steps", "10"]) == 0
    told = capsys.readouterr().out
    parts = ("transformer", "AutoencoderKLWan", "16 x 9 x 8 x 8", "144 a row, 20 rows", "PFLOP", "one forward, about")
    for part in parts:
        assert part in told
    assert main(["models"]) == 0
    assert "Wan-AI/Wan2.1-T2V-1.3B-Diffusers" in capsys.readouterr().out
    assert main(["doctor", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert set(facts["attention"]["float32"]["roles"]) == {"self", "cross"}
    assert facts["cpu"] == cpu_level().name
    assert ("bfloat16" in facts["slow_dtypes"]) == (cpu_level() < CpuLevel.AVX512_BF16)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--size", "32x50"], "width=50"),
        (["--size", "0x48"], "height=0"),
        (["--frames", "6"], "nearest: 5 or 9"),
        (["--frames", "-3"], "num_frames=-3"),
        (["--steps", "0"], "num_inference_steps=0"),
        (["--steps", "100000"], "num_inference_steps"),
        (["--guidance-scale", "nan"], "guidance_scale"),
        (["--guidance-scale", "-1"], "guidance_scale"),
        (["--flow-shift", "0"], "flow_shift"),
        (["--fps", "0"], "fps"),
        (["--seed", "-1"], "seed"),
        (["--seed", str(2**63 - 1), "--num-videos", "2"], "seed"),
        (["--num-videos", "0"], "num-videos"),
        (["--scheduler", "ddim"], "unipc, euler, dpm++"),
        (["--device", "tpu"], "tpu"),
        (["--dtype", "int3"], "int3"),
        (["--attention", "magic"], "magic"),
        (["--cfg", "sideways"], "sideways"),
        (["--threads", "0"], "threads"),
        (["--set", "seed=2"], "seed is of every request"),
        (["--set", "prompt=x"], "prompt is of every request"),
        (["--set", "height=64"], "height is of every request"),
        (["--set", "on_event=1"], "on_event is of every request"),
        (["--output", "a.avi"], ".mp4"),
        (["--output", "/dev/null/a.mp4"], "/dev/null"),
        (["--output", "/proc/nowhere/a.mp4"], "cannot write in /proc"),
    ],
)
def test_bad_options(tiny: Path, capsys: pytest.CaptureFixture[str], options: list[str], says: str) -> None:
    assert says in fails(capsys, "generate", "a cat", "--model", tiny, *SMALL, *options)


def test_bad_prompts(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    rest = ["--model", tiny, "-o", out, *SMALL]
    assert "empty" in fails(capsys, "generate", "", *rest)
    assert "empty" in fails(capsys, "generate", "  \n", *rest)
    assert "512" in fails(capsys, "generate", "cat " * 10_000, *rest)
    assert "not both" in fails(capsys, "generate", "a cat", "--prompts-file", "x", *rest)
    assert "cannot be read" in fails(capsys, "generate", "--prompts-file", tmp_path / "none", *rest)
    (tmp_path / "blank").write_text("\n \n")
    assert "no prompt" in fails(capsys, "generate", "--prompts-file", tmp_path / "blank", *rest)
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    assert "cannot be read" in fails(capsys, "generate", "--prompts-file", tmp_path / "binary", *rest)
    assert not out.exists()


def test_unwritable_output_is_refused_before_anything_loads(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for file in copy.glob("*/*.safetensors"):
        file.unlink()
    for output in (copy, copy / "model_index.json" / "a.mp4"):
        said = fails(capsys, "generate", "a cat", "--model", copy, "-o", output / "a.webm", *SMALL)
        assert str(output) in said
    assert "missing" not in fails(capsys, "generate", "a cat", "--model", copy, "-o", "/dev/null/a.mp4", *SMALL)


def damage_weights(folder: Path, change: object) -> None:
    file = next((folder / "transformer").glob("*.safetensors"))
    tensors = load_file(file)
    change(tensors)  # type: ignore[operator]
    save_file(tensors, file, {"format": "pt"})


def test_damaged_models(copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    argv = ["generate", "a cat", "--model", copy, "-o", out, *SMALL]
    file = next((copy / "transformer").glob("*.safetensors"))
    whole = file.read_bytes()
    name = "proj_out.weight"

    damage_weights(copy, lambda t: t.pop(name))
    assert name in fails(capsys, *argv)
    file.write_bytes(whole)
    damage_weights(copy, lambda t: t.update({name: t[name][:2].clone()}))
    assert name in fails(capsys, *argv)
    file.write_bytes(whole)
    damage_weights(copy, lambda t: t[name].fill_(float("nan")))
    fails(capsys, *argv)
    file.write_bytes(whole[: len(whole) // 2])
    assert str(file) in fails(capsys, *argv)
    file.unlink()
    fails(capsys, *argv)
    file.write_bytes(whole)

    index = copy / "model_index.json"
    listing = json.loads(index.read_text())
    index.write_text(json.dumps({k: v for k, v in listing.items() if k != "vae"}))
    assert "vae" in fails(capsys, *argv)
    index.write_text(json.dumps(listing | {"transformer": ["diffusers", "NoSuchTransformer"]}))
    assert "NoSuchTransformer" in fails(capsys, *argv)
    index.write_text(json.dumps(listing | {"_class_name": "FluxPipeline"}))
    assert "FluxPipeline" in fails(capsys, *argv)
    index.write_text("{")
    assert "JSON" in fails(capsys, *argv)
    assert not out.exists()


def test_unknown_models_and_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no-such-model" in fails(capsys, "generate", "a cat", "--model", "no-such-model")
    assert "no-such-model" in fails(capsys, "info", "no-such-model")
    assert "does not exist" in fails(capsys, "replay", tmp_path / "none.mp4")
    (tmp_path / "text.mp4").write_text("no video")
    assert "not a readable video" in fails(capsys, "replay", tmp_path / "text.mp4")
    assert "tpu" in fails(capsys, "doctor", "--device", "tpu")


def test_eval_and_train_refuse_what_they_cannot_do(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "--n=0" in fails(capsys, "eval", tiny, "--n", "0")
    assert ".json" in fails(capsys, "eval", tiny, "--json", tmp_path / "scores.txt")
    assert "/dev/null" in fails(capsys, "eval", tiny, "--sheet", "/dev/null/sheet.png")
    assert ".png" in fails(capsys, "eval", tiny, "--drift", tmp_path / "drift.txt")
    assert "no world" in fails(capsys, "eval", tiny, "--n", "1")
    assert "cannot be read" in fails(capsys, "train", tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("name: [")
    assert "YAML" in fails(capsys, "train", tmp_path / "bad.yaml")


def test_eval_scores_writes_and_fills_the_card(copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (copy / "kinetoscope.json").write_text(json.dumps({"world": "shapes"}))
    (copy / "README.md").write_text("# A model\n\nKept.\n\n## Scores\n\nold\n")
    files = ["--json", str(tmp_path / "s.json"), "--sheet", str(tmp_path / "s.png"), "--card"]
    drift = ["--drift", str(tmp_path / "d.png"), "--drift-frames", "2"]
    argv = ["eval", str(copy), "--n", "2", "--size", "64x64", "--frames", "5", "--steps", "1", *files, *drift]
    assert main(argv) == 0
    told = capsys.readouterr().out
    assert "ground truth" in told and "shuffled captions" in told and "all correct" in told
    scores = json.loads((tmp_path / "s.json").read_text())
    assert scores["n"] == 2 and 0 <= scores["model"]["colour"]["value"] <= 1
    assert scores["drift"]["spans"] == [[0, 1], [1, 3], [3, 5]] and "| frames 0-0 | frames 3-4 |" in told
    assert all((tmp_path / f"{n}.png").read_bytes().startswith(b"\x89PNG") for n in "sd")
    card = (copy / "README.md").read_text()
    assert "Kept." in card and "old" not in card and "--n 2 --seed 0 --size 64x64" in card


def test_a_fault_of_ours_is_one_line_and_debug_shows_more(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from kinetoscope.pipelines import catalogue

    def broken() -> None:
        raise RuntimeError("two\nlines")

    monkeypatch.setattr(catalogue, "known_models", broken)
    assert "RuntimeError: two lines (kinetoscope --debug shows where)" in fails(capsys, "models")
    assert main(["--debug", "models"]) == 1
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv",
    [
        ["no-such-command"],
        ["generate", "--size", "64"],
        ["generate", "--size", "64xx64"],
        ["generate", "--size", "-1x64"],
        ["generate", "--size", "²x64"],
        ["generate", "--steps", "1.5"],
        ["generate", "--seed", "x"],
        ["generate", "--no-such-option"],
        ["replay"],
    ],
)
def test_misuse_exits_with_2(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.endswith(" --help)\n") and err.count("\n") == 1


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["genrate", "a cat"], "unknown command 'genrate'; did you mean generate?"),
        (["generate", "--promt", "a cat"], "unknown option --promt; did you mean --prompt? (see kinetoscope generate"),
        (["generate", "--sed=3"], "unknown option --sed=3; did you mean --seed?"),
        (["generate", "a", "red", "cat"], "unexpected 'red cat'; write text of several words in quotes"),
        (["--debugg", "models"], "unknown option --debugg; did you mean --debug?"),
    ],
)
def test_misspelt_words_get_a_suggestion(argv: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(argv)
    assert says in capsys.readouterr().err


@pytest.mark.parametrize("argv", [[], ["--debug"]])
def test_help_is_printed_without_a_command(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 0
    out, err = capsys.readouterr()
    assert err == "" and all(command.NAME in out for command in COMMANDS)


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("tiny-t2", "tiny-t2v"),
        ("Tiny-T2V", "tiny-t2v"),
        ("Wan-AI/Wan2.1-T2V-1.3B", "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"),
        ("wan-ai/wan2.2-t2v-a14b-diffuser", "Wan-AI/Wan2.2-T2V-A14B-Diffusers"),
    ],
)
def test_misspelt_models_get_a_suggestion(
    name: str, near: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", no_network)
    for command in (
        ["generate", "a cat", "--model", name],
        ["info", name],
        ["ab", "--model", name, "--b", "cfg=batched"],
    ):
        assert f"did you mean {near!r}?" in fails(capsys, *command)


def no_network(*args: object, **options: object) -> None:
    raise ConnectionError("no network")


def test_weights_of_another_layout_are_not_downloaded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The repository of that name exists on the hub, in the layout of its authors."""
    asked: list[list[str]] = []

    def download(repository: str, *, allow_patterns: list[str], local_files_only: bool) -> str:
        asked.append(allow_patterns)
        (tmp_path / "config.json").write_text("{}")
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    line = fails(capsys, "generate", "a cat", "--model", "Wan-AI/Wan2.1-T2V-1.3B")
    assert "has no model_index.json" in line and "did you mean 'Wan-AI/Wan2.1-T2V-1.3B-Diffusers'?" in line
    assert asked == [["*.json", "*/*.json"]]


def test_sizes_are_height_by_width() -> None:
    assert parse_size("480x832") == (480, 832) == parse_size("480X832")


def test_every_command_has_help(capsys: pytest.CaptureFixture[str]) -> None:
    for command in COMMANDS:
        with pytest.raises(SystemExit) as stop:
            build_parser().parse_args([command.NAME, "--help"])
        assert stop.value.code == 0 and command.HELP[:30] in capsys.readouterr().out


# -- model cards ------------------------------------------------------------------------------------------------------

CARD_COMMANDS = [
    (name, " ".join(found.split()))
    for name, folder in embedded_models().items()
    for found in re.findall(r"`(kinetoscope [^`]+)`", (folder / "README.md").read_text(encoding="utf-8"))
]


@pytest.mark.parametrize(("name", "line"), CARD_COMMANDS, ids=[f"{n}-{line.split()[1]}" for n, line in CARD_COMMANDS])
def test_commands_of_model_cards_are_command_lines(name: str, line: str) -> None:
    words = shlex.split(line)[1:]
    args = build_parser().parse_args(words)
    if words[0] == "train":
        assert (Path(__file__).parents[2] / args.recipe).is_file()
    else:
        assert args.model == name


@pytest.mark.parametrize("name", list(embedded_models()))
def test_first_command_of_a_model_card_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    line = next(line for n, line in CARD_COMMANDS if n == name)
    assert main(shlex.split(line)[1:]) == 0
    assert any(f.suffix in (".mp4", ".png") for f in tmp_path.rglob("*"))


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ("generate --steps ten", "--steps='ten' is not a whole number"),
        ("generate --guidance-scale x", "--guidance-scale='x' is not a number"),
        ("generate x --scheduler eulr", "unknown scheduler 'eulr'; did you mean euler? Known: "),
        ("generate x --cfg batchd", "unknown cfg plan 'batchd'; did you mean batched? Known: "),
        ("generate x --set sampling.num_inference_step=3", "did you mean num_inference_steps? This model's own"),
        ("plan Wan-AI/Wan2.1-T2V-13B-Diffusers", "did you mean Wan-AI/Wan2.1-T2V-1.3B-Diffusers?"),
        ("generate --config empty.yaml", "configuration empty.yaml is empty"),
        ("train broken.yaml", "recipe broken.yaml is not valid YAML: line 2, column 1: "),
        ("generate --prompts-file bytes.txt", "prompts file bytes.txt cannot be read: it is not text in UTF-8"),
        ("generate --prompts-file .", "prompts file . cannot be read: Is a directory"),
        ("stream x --model tiny-causal --blocks 0", "blocks=0 is not a positive whole number"),
    ],
)
def test_wrong_command_lines_are_one_clear_line(
    argv: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", no_network)
    for name, content in {"empty.yaml": b"", "broken.yaml": b"a: [\n", "bytes.txt": b"\xff\xfe"}.items():
        (tmp_path / name).write_bytes(content)
    try:
        assert main(argv.split()) == 1
    except SystemExit as stop:
        assert stop.code == 2
    out, err = capsys.readouterr()
    assert out == "" and says in err and err.count("\n") == 1
