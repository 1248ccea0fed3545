"""What goes wrong in making data sets: bad clips and lists, full disks, kills, damage; and by whom they are made."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from full_disk import disk_of
from kinetoscope.cli import main
from kinetoscope.core.errors import ConfigError, InputError, OutputError
from kinetoscope.train.data import preprocess as job
from kinetoscope.train.data.preprocess import Summary, claimed, preprocess
from kinetoscope.train.data.sources import open_source
from kinetoscope.train.data.table import DATASET, INDEX, DataSet, Manifest, shard_path
from train.data_sets import SETTINGS, as_csv, as_jsonl, as_tars, film, rows_of, same_files, same_rows

GIVEN = "--size=32x32 --size=32x64 --frames=5 --frames=9 --fps=12 --shard=2 --device=cpu".split()  # noqa: SIM905
"""`SETTINGS` on the command line."""


@pytest.fixture(scope="module")
def bad_clips(clips: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The good clips among ones that give no row."""
    folder = tmp_path_factory.mktemp("bad") / "clips"
    shutil.copytree(clips, folder)
    whole = film(folder / "whole.mp4", 9, 64, 64).read_bytes()
    (folder / "whole.mp4").unlink()
    (folder / "cut.mp4").write_bytes(whole[: len(whole) * 6 // 10])
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "garbage.mp4").write_bytes(b"no video at all" * 100)
    film(folder / "short.mp4", 3, 32, 32)
    film(folder / "tiny.mp4", 9, 16, 16)
    film(folder / "silent.mp4", 9, 32, 32)
    film(folder / "untold.mp4", 9, 32, 32)
    film(folder / "wordy.mp4", 9, 32, 32)
    film(folder / "still.mp4", 1, 32, 32)
    film(folder / "latin.mp4", 9, 32, 32)
    film(folder / "of the same name/a.mp4", 9, 32, 32)
    (folder / "gone.mp4").symlink_to("nowhere.mp4")
    for name in ("cut", "empty", "garbage", "short", "tiny", "still", "gone"):
        (folder / f"{name}.txt").write_text("a cat")
    (folder / "silent.txt").write_text(" \n")
    (folder / "wordy.txt").write_text("cat " * 600)
    (folder / "latin.txt").write_bytes("ein grüner Kreis".encode("latin-1"))
    (folder / "of the same name/a.txt").write_text("")
    return folder


REASONS = {
    "cut.mp4": "truncated", "empty.mp4": "the file is empty", "garbage.mp4": "cannot be read as a video",
    "short.mp4": "3 of the 5 frames that the shortest bucket needs", "tiny.mp4": "16x16, smaller than its bucket",
    "silent.mp4": "its caption is empty", "untold.mp4": "it has no caption", "wordy.mp4": "601 tokens",
    "still.mp4": "1 of the 5 frames", "latin.mp4": "caption cannot be read: 'utf-8'", "gone.mp4": "does not exist",
    "of the same name/a.mp4": "its caption is empty",
}  # fmt: skip


CLIPS = 4 + len(REASONS)


def die(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


# -- what goes wrong --------------------------------------------------------------------------------------------------


def test_damaged_lists(tmp_path: Path) -> None:
    """A line that cannot be read costs that line alone."""
    clip = {"video": "a.mp4", "caption": "ein grüner Kreis"}
    told = json.dumps(clip, ensure_ascii=False)
    lines = ["{", "[1]", '{"caption": "a cat"}', '{"video": "a.mp4", "caption": 3}', '{"video": "a.mp4"}', told]
    (tmp_path / "x.jsonl").write_bytes("\n".join(lines).encode() + b"\n" + told.encode("latin-1"))
    expected = ("not JSON", "no object but a list", "names no video", "text but a int", "", "", "not text in UTF-8")
    items = open_source(str(tmp_path / "x.jsonl")).items
    for item, said in zip(items, expected, strict=True):
        assert said in item.problem and bool(said) == bool(item.problem)
    assert items[5].read_caption() == clip["caption"] and items[6].key == "line 7"
    rows = [
        "video,caption",
        "a.mp4,ein grüner Kreis",
        "a.mp4",
        "",
        "a.mp4,a cat, a dog",
        ",a cat",
        'a.mp4,"a cat, a dog"',
    ]
    (tmp_path / "x.csv").write_bytes("\n".join(rows).encode() + b"\na.mp4,ein gr\xfcner Kreis\n")
    items = open_source(str(tmp_path / "x.csv")).items
    expected = ("", "", "it has 3 fields under a header of 2; quote", "names no video", "", "not text in UTF-8")
    for item, said in zip(items, expected, strict=True):
        assert said in item.problem and bool(said) == bool(item.problem)
    assert [i.read_caption() for i in items] == [clip["caption"], "", "", "", "a cat, a dog", ""]


def test_damaged_archives(clips: Path, tmp_path: Path) -> None:
    """What is whole in an archive that was cut off is kept, and nothing that was cut is taken for whole."""
    tars = as_tars(clips, tmp_path)
    whole = (tars / "1.tar").read_bytes()
    (tmp_path / "y.tar").write_bytes(whole[: (clips / "d.mp4").stat().st_size // 2])
    problems = [i.problem for i in open_source(str(tmp_path / "y.tar")).items]
    assert "ends within" in problems[0] and "damaged after this" in problems[1]
    (tmp_path / "y.tar").write_bytes(whole[: whole.rindex(b"a cat on black") + 5])
    first, second, end = open_source(str(tmp_path / "y.tar")).items
    assert not first.problem and "ends within this sample" in second.problem and "damaged after" in end.problem
    (tars / "0.tar").write_bytes(b"no archive" * 100)
    items = open_source(str(tars)).items
    assert [bool(i.problem) for i in items] == [True, False, False]
    assert items[0].key == "0.tar/" and "it is no archive, a damaged or a compressed one" in items[0].problem
    with pytest.raises(InputError, match=r"0.tar cannot be read as tar: it is no archive"):
        open_source(str(tars / "0.tar"))


def test_sources_that_are_not_there(tmp_path: Path) -> None:
    (tmp_path / "z.csv").write_text("clip,caption\na.mp4,a cat\n")
    (tmp_path / "blank.csv").write_text("")
    (tmp_path / "none").mkdir()
    for source, said in {
        str(tmp_path / "z.csv"): "the header clip, caption has no column video",
        str(tmp_path / "blank.csv"): "it has no column video",
        str(tmp_path / "none"): "holds no clips",
        str(tmp_path / "missing.csv"): "does not exist",
        str(tmp_path / "x.txt"): "give a folder",
        "world:nowhere": "unknown world",
        "world:shapes": "say how many",
    }.items():
        with pytest.raises(InputError, match=said):
            open_source(source)


def test_bad_clips_and_a_full_disk(model: Path, bad_clips: Path, clips: Path, tmp_path: Path) -> None:
    made = preprocess(model, bad_clips, tmp_path / "whole", **SETTINGS)
    reasons = {r["key"]: r["reason"] for r in made.rejected}
    assert reasons.keys() == REASONS.keys() and made.rows == 4 and made.clips == CLIPS
    for name, said in REASONS.items():
        assert said in reasons[name], reasons[name]
    assert DataSet(tmp_path / "whole").rejected() == made.rejected
    preprocess(model, clips, tmp_path / "good", **SETTINGS)
    same_rows(tmp_path / "whole", tmp_path / "good")
    sizes = [shard_path(tmp_path / "whole", n).stat().st_size for n in range(CLIPS // 2)]
    limit = sorted(sizes)[-1] - 1
    at = sizes.index(limit + 1)
    said = rf"cannot be written: File too large; {2 * at} of {CLIPS} clips are done and stay: make room and run"
    with disk_of(limit), pytest.raises(OutputError, match=said):
        preprocess(model, bad_clips, tmp_path / "full", **SETTINGS)
    left = {f.name for f in (tmp_path / "full").iterdir()}
    assert left == {DATASET, *(shard_path(tmp_path, n).name for n in range(at))}
    with pytest.raises(InputError, match="not finished"):
        DataSet(tmp_path / "full")
    preprocess(model, bad_clips, tmp_path / "full", **SETTINGS)
    same_files(tmp_path / "full", tmp_path / "whole")
    more = preprocess(model, bad_clips, tmp_path / "more", **SETTINGS, upscale=True, uncaptioned=True)
    taken = {"tiny.mp4", "silent.mp4", "untold.mp4", "of the same name/a.mp4"}
    assert {r["key"] for r in more.rejected} == REASONS.keys() - taken


def test_a_folder_that_is_removed_meanwhile_ends_the_job(model: Path, clips: Path, tmp_path: Path) -> None:
    """A shard in a folder that was made anew would have no manifest."""
    out = tmp_path / "out"
    with pytest.raises(OutputError, match=r"part-00000.parquet cannot be written: No such file.*; 0 of 4 clips"):
        preprocess(model, clips, out, **SETTINGS, on_count=lambda *_: shutil.rmtree(out, ignore_errors=True))
    assert not out.exists()


@pytest.mark.parametrize("source", ["jsonl", "csv", "tars", "world"])
def test_a_full_disk_under_every_source(
    source: str, model: Path, clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write = {"jsonl": as_jsonl, "csv": as_csv, "tars": as_tars}.get(source)
    given = [str(write(clips, tmp_path))] if write else ["world:shapes"]
    more = [*GIVEN, *([] if write else ["--clips", "4"])]
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert main(["preprocess", str(model), *given, str(whole), *more]) == 0
    sizes = [shard_path(whole, n).stat().st_size for n in range(2)]
    command = ["preprocess", str(model), *given, str(out), *more]
    for limit, done in ((max(sizes) - 1, 2 * sizes.index(max(sizes))), (100, 0)):
        with disk_of(limit):
            assert main(command) == 1
        said = capsys.readouterr().err.splitlines()[-1]
        assert said.startswith("error: ") and "cannot be written: File too large" in said
        assert limit == 100 or f"{done} of 4 clips are done and stay: make room" in said
        assert not any(f.name.startswith(".") for f in out.iterdir()), "nothing half-written is left"
        if limit > 100:
            assert main(command) == 0
            same_files(out, whole)
            shutil.rmtree(out)


def test_killed_at_any_moment(model: Path, clips: Path, tmp_path: Path) -> None:
    """Children that kill themselves: with a shard half written, written but not named, all but the index done, and
    after each shard."""
    preprocess(model, clips, tmp_path / "whole", **SETTINGS)
    out = tmp_path / "out"

    def half(path: Path, rows: Any, *_: Any) -> None:
        path.with_name(f".{path.name}.part").write_bytes(b"PAR1")
        next(iter(rows))
        die()

    def child(target: Any, name: str, action: Callable[..., Any], on_count: Callable[[int, int], None]) -> None:
        """A process that makes the data set, with one function exchanged."""
        pid = os.fork()
        if not pid:
            setattr(target, name, action)
            preprocess(model, clips, out, **SETTINGS, on_count=on_count)
            os._exit(3)
        _, status = os.waitpid(pid, 0)
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        assert not (out / INDEX).exists()

    def after_one(done: int, _: int) -> None:
        if done:
            die()

    child(job, "write_shard", half, print)
    child(os, "fsync", die, print)
    child(job, "__doc__", print, after_one)
    child(os, "fsync", die, print)
    child(job, "write_index", die, print)
    assert {f.name for f in out.iterdir()} == {DATASET, "part-00000.parquet", "part-00001.parquet"}
    seen: list[tuple[int, int]] = []
    preprocess(model, clips, out, **SETTINGS, on_count=lambda *count: seen.append(count))
    assert seen == [(4, 4)], "nothing is encoded twice"
    same_files(out, tmp_path / "whole")


def test_another_job_is_refused(model: Path, clips: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    preprocess(model, clips, out, **SETTINGS)
    before = {f: f.read_bytes() for f in out.iterdir()}
    for changed, said in (({"fps": 6.0}, "fps"), ({"shard": 3}, "shard"), ({"stored": "float16"}, "dtype")):
        with pytest.raises(ConfigError, match=f"made with another {said}"):
            preprocess(model, clips, out, **{**SETTINGS, **changed})
    other = tmp_path / "clips"
    shutil.copytree(clips, other)
    (other / "a.txt").write_text("a cat")
    with pytest.raises(ConfigError, match="another source digest"):
        preprocess(model, other, out, **SETTINGS)
    manifest = Manifest.read(out)
    with claimed(out, manifest), pytest.raises(ConfigError, match="another process is making"):
        preprocess(model, clips, out, **SETTINGS)
    assert {f: f.read_bytes() for f in out.iterdir()} == before
    for settings, said in (({"sizes": [(30, 32)]}, "height=30"), ({"frames": [6]}, "num_frames=6")):
        with pytest.raises(InputError, match=said):
            preprocess(model, clips, tmp_path / "new", **{**SETTINGS, **settings})
    with pytest.raises(ConfigError, match="stored='int8'"):
        preprocess(model, clips, tmp_path / "new", **SETTINGS, stored="int8")
    assert not (tmp_path / "new").exists()


def test_damaged_data_sets(model: Path, clips: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    preprocess(model, clips, out, **SETTINGS)
    shard = shard_path(out, 1)
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-100])
    with pytest.raises(InputError, match=r"part-00001.parquet cannot be read .*delete it if it is there"):
        rows_of(out)
    for at in (len(whole) // 8, whole.index(b"kinetoscope.dataset") + 40, whole.index(b"kinetoscope.rejected") + 30):
        shard.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(InputError, match=r"part-00001.parquet"):
            rows_of(out)
    shard.unlink()
    preprocess(model, clips, out, **SETTINGS)
    assert shard.read_bytes() == whole
    (out / DATASET).write_text((out / DATASET).read_text().replace('"version": 1', '"version": 2'))
    with pytest.raises(InputError, match="version 2"):
        DataSet(out)
    (out / DATASET).unlink()
    with pytest.raises(InputError, match="does not exist"):
        DataSet(out)
    with pytest.raises(ConfigError, match=r"without its dataset.json"):
        preprocess(model, clips, out, **SETTINGS)


def test_the_command(model: Path, bad_clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["preprocess", str(model), str(bad_clips), str(tmp_path / "out"), *GIVEN]
    assert main(command) == 0
    said = capsys.readouterr().out
    for line in (
        f"4 rows of {CLIPS} clips, {len(REASONS)} rejected", "  2 x its caption is empty\n",
        "  1 x it cannot be read as a video: Invalid data found when processing input\n",
        "  5 for other reasons\n", "rejected.jsonl",
    ):  # fmt: skip
        assert line in said
    made: Summary = preprocess(model, bad_clips, tmp_path / "api", **SETTINGS)
    assert made.rows == 4
    same_files(tmp_path / "out", tmp_path / "api")
    assert main([*command, "--aspects", "1:1,16:9"]) == 1
    assert "made with another sizes" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    for place in ("file", "file/within"):
        assert main([*command[:3], str(tmp_path / place), *GIVEN]) == 1
        assert f"{place} cannot be written" in capsys.readouterr().err
    (tmp_path / "one").mkdir()
    shutil.copy(bad_clips / "untold.mp4", tmp_path / "one")
    assert main([*command[:2], str(tmp_path / "one"), str(tmp_path / "none"), *GIVEN]) == 1
    assert "it has no rows" in capsys.readouterr().err and rows_of(tmp_path / "none") == []


@pytest.mark.distributed
def test_several_processes_give_what_one_gives(model: Path, bad_clips: Path, tmp_path: Path) -> None:
    preprocess(model, bad_clips, tmp_path / "one", **SETTINGS, threads=1)
    preprocess(model, bad_clips, tmp_path / "two", **SETTINGS, threads=1, workers=2)
    same_files(tmp_path / "one", tmp_path / "two")


@pytest.mark.distributed
def test_ray_gives_what_one_process_gives(
    model: Path, bad_clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Begun by a process, stopped, finished by Ray; and a folder that is gone is told as it is without Ray."""
    ray = pytest.importorskip("ray")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("RAY_worker_niceness", "0")  # on a busy machine Ray's own 15 starves them
    cluster = importlib.import_module("kinetoscope.parallel.ray_cluster")
    cluster.enter_cluster(None, 2)  # one for both jobs
    settings = {**SETTINGS, "threads": 1}
    whole = preprocess(model, bad_clips, tmp_path / "one", **settings)
    for name in (DATASET, "part-00002.parquet"):
        (tmp_path / "two").mkdir(exist_ok=True)
        shutil.copy(tmp_path / "one" / name, tmp_path / "two" / name)
    seen: list[tuple[int, int]] = []
    made = preprocess(
        model, bad_clips, tmp_path / "two", **settings, workers=2, engine="ray",
        on_count=lambda *count: seen.append(count),
    )  # fmt: skip
    assert (made.rows, made.rejected) == (whole.rows, whole.rejected)
    same_files(tmp_path / "one", tmp_path / "two")
    assert seen == [(done, CLIPS) for done in range(2, CLIPS + 1, 2)]

    def lost(done: int, _: int) -> None:
        shutil.rmtree(tmp_path / "three", ignore_errors=True)

    said = rf"part-0000\d.parquet cannot be written: No such file.*; 0 of {CLIPS} clips are done and stay"
    with pytest.raises(OutputError, match=said):
        preprocess(model, bad_clips, tmp_path / "three", **settings, engine="ray", on_count=lost)
    cluster.leave_cluster()
    assert not ray.is_initialized()


def test_engines_that_are_not_there(
    model: Path, clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["preprocess", str(model), str(clips), str(tmp_path / "out"), "--engine"]
    for engine, said in {
        "rays": "unknown engine 'rays'; did you mean ray?",
        "ray:adress=auto": "unknown setting of engine ray 'adress'; did you mean address?",
        "processes:address=auto": "unknown setting of engine processes 'address'",
    }.items():
        assert main([*command, engine]) == 1
        assert said in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "kinetoscope.train.data.ray_engine", raising=False)
    monkeypatch.delitem(sys.modules, "kinetoscope.parallel.ray_cluster", raising=False)
    assert main([*command, "ray"]) == 1
    assert "engine=ray needs Ray Data" in (said := capsys.readouterr().err)
    assert "pip install 'kinetoscope[ray]'" in said and not (tmp_path / "out").exists()


@pytest.mark.distributed
def test_a_killed_job_takes_its_processes_along(model: Path, clips: Path, tmp_path: Path) -> None:
    """They would write beside those of the next job."""
    out, settings = tmp_path / "out", {**SETTINGS, "shard": 1, "threads": 1}
    preprocess(model, clips, tmp_path / "whole", **settings)
    given = "--size 32x32 --size 32x64 --frames 5 --frames 9 --fps 12 --shard 1 --threads 1 --workers 2 --device cpu"
    command = [sys.executable, "-m", "kinetoscope", "preprocess", str(model), str(clips), str(out), *given.split()]
    process = subprocess.Popen(command)
    wait_for(lambda: any(out.glob("part-*.parquet")) or process.poll() is not None)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert len(children) >= 2
    process.kill()
    process.wait()
    wait_for(lambda: not any(alive(child) for child in children))
    preprocess(model, clips, out, **settings)
    same_files(out, tmp_path / "whole")


def alive(pid: str) -> bool:
    """Whether a process is there and has not ended, reaped or not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_for(condition: Callable[[], bool]) -> None:
    for _ in range(6000):
        if condition():
            return
        time.sleep(0.1)
    raise AssertionError("it did not happen in ten minutes")
