"""Videos survive the round trip, repeat byte for byte, and never leave half a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from kinetoscope.core.errors import InputError, OutputError
from kinetoscope.media import check_output, contact_sheet, read_metadata, read_video, write_video
from kinetoscope.media.video import VideoWriter
from kinetoscope.worlds import get_world

FRAMES = get_world("shapes").sample(0, num_frames=9).frames


def test_round_trip(tmp_path: Path) -> None:
    path = write_video(
        tmp_path / "deep" / "er" / "a.mp4", FRAMES, 12.5, metadata={"prompt": "ein rötes Ding", "n": [1]}
    )
    frames, fps = read_video(path)
    assert frames.shape == FRAMES.shape and fps == 12.5
    assert np.abs(frames.astype(int) - FRAMES).mean() < 4  # colour is stored at half resolution
    assert read_metadata(path) == {"prompt": "ein rötes Ding", "n": [1]}
    assert [p.name for p in path.parent.iterdir()] == ["a.mp4"]


def test_same_frames_same_bytes(tmp_path: Path) -> None:
    """Whatever memory held before: in frames of other noise each x264 was seen to differ."""
    rng = np.random.default_rng(0)
    for frames in (FRAMES, *rng.integers(0, 256, (8, 5, 32, 32, 3), np.uint8)):
        made: set[bytes] = set()
        for _ in range(5):
            dirt = [np.full(size, rng.integers(256), np.uint8) for size in rng.integers(100, 200_000, 500)]
            del dirt
            made.add(write_video(tmp_path / "a.mp4", frames, 8, metadata={"a": 1}).read_bytes())
        assert len(made) == 1


def test_long_metadata(tmp_path: Path) -> None:
    record = {"prompts": ["x" * 5000] * 20}
    assert read_metadata(write_video(tmp_path / "a.mp4", FRAMES, 8, metadata=record)) == record


def test_one_frame(tmp_path: Path) -> None:
    assert read_video(write_video(tmp_path / "a.mp4", FRAMES[:1], 8))[0].shape == (1, 64, 64, 3)


@pytest.mark.parametrize(
    "frames",
    [FRAMES.astype(np.float32), FRAMES[0], FRAMES[..., :2], FRAMES[:0], FRAMES[:, :63]],
)
def test_frames_that_are_no_video(tmp_path: Path, frames: Any) -> None:
    with pytest.raises(InputError):
        write_video(tmp_path / "a.mp4", frames, 8)
    assert list(tmp_path.iterdir()) == []


def test_outputs_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.mp4").mkdir()
    for path, says in [
        (tmp_path / "a.avi", r"\.avi.*\.mp4"),
        (tmp_path / "a", "suffix"),
        (tmp_path / "folder.mp4", "directory"),
        (tmp_path / "file" / "a.mp4", "file"),
        (Path("/proc/nowhere/a.mp4"), "/proc"),
    ]:
        with pytest.raises(OutputError, match=says):
            check_output(path)
        with pytest.raises(OutputError, match=says):
            write_video(path, FRAMES, 8)


def test_a_full_disk_leaves_nothing(tmp_path: Path) -> None:
    import resource
    import signal

    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (40, 128, 128, 3)).astype(np.uint8)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(OutputError, match=r"a\.mp4"):
            write_video(tmp_path / "a.mp4", noise, 8)
        with pytest.raises(OutputError) as error, VideoWriter(tmp_path / "b.mp4", 8) as writer:
            writer.write(noise)
            writer.finish()
        assert str(error.value) == f"{tmp_path / 'b.mp4'} cannot be written: File too large"
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, previous)
    assert list(tmp_path.iterdir()) == []


def test_files_that_are_no_video(tmp_path: Path) -> None:
    good = write_video(tmp_path / "a.mp4", FRAMES, 8)
    plain = tmp_path / "b.mp4"
    plain.write_text("no video")
    cut = tmp_path / "c.mp4"
    cut.write_bytes(good.read_bytes()[:100])
    for path in (tmp_path / "missing.mp4", tmp_path, plain, cut):
        for read in (read_video, read_metadata):
            with pytest.raises(InputError, match=path.name):
                read(path)
    with pytest.raises(InputError, match="no record"):
        read_metadata(good)


def test_contact_sheet(tmp_path: Path) -> None:
    path = contact_sheet([FRAMES, FRAMES[::-1]], tmp_path / "s" / "a.png", labels=["one", "two"], columns=4, scale=2)
    image = Image.open(path)
    assert image.size == (4 * 132 + 4, 2 * (128 + 18) + 4)
    with pytest.raises(InputError):
        contact_sheet([FRAMES], tmp_path / "b.png", labels=["one", "two"])
    with pytest.raises(InputError):
        contact_sheet([], tmp_path / "b.png")
    with pytest.raises(OutputError):
        contact_sheet([FRAMES], Path("/proc/nowhere/a.png"))
