"""Files of many kinds show the same pictures whoever reads them, or are refused by name."""

from __future__ import annotations

import struct
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from av.video.reformatter import ColorRange

from kinetoscope.core.errors import InputError
from kinetoscope.media import decoding, load_clip, load_frames, read_video, write_video
from kinetoscope.media.decoding import open_video
from kinetoscope.train.data.clips import read_pictures
from kinetoscope.train.data.sources import Item, Place

Array = np.ndarray[Any, Any]
COLOUR = (200, 120, 40)
FLAT = np.full((2, 64, 96, 3), COLOUR, np.uint8)


def encode(
    path: Path, frames: Array, codec: str = "libx264", pix_fmt: str = "yuv420p", *, matrix: int = 2, full: bool = False,
    transfer: int = 2, primaries: int = 2, aspect: Fraction | None = None, rate: int = 12, **options: str,
) -> Path:  # fmt: skip
    """Write frames [T, H, W, 3 or 4] with these tags; numbers are of H.273, 2 is no tag and encoded as BT.601."""
    limits = ColorRange.JPEG if full else ColorRange.MPEG
    with av.open(str(path), "w") as file:
        stream: Any = file.add_stream(codec, rate=rate, options=options)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], pix_fmt
        context = stream.codec_context
        context.colorspace, context.color_range = matrix, limits if full else 0
        context.color_trc, context.color_primaries = transfer, primaries
        if aspect:
            context.sample_aspect_ratio = aspect
        for frame in frames:
            rgb = av.VideoFrame.from_ndarray(
                np.ascontiguousarray(frame), format="rgba" if frame.shape[2] == 4 else "rgb24"
            )
            how = {} if not pix_fmt.startswith("yuv") else {
                "src_color_range": ColorRange.JPEG, "dst_color_range": limits,
                "dst_colorspace": {2: 5, 6: 5}.get(matrix, matrix),
            }  # fmt: skip
            file.mux(stream.encode(rgb.reformat(format=pix_fmt, **how)))
        file.mux(stream.encode())
    return path


def readings(path: Path) -> dict[str, Array]:
    """The first frame as every reader gives it."""
    return {
        "--video": np.asarray(load_clip(path)[0]),
        "replay, ab": read_video(path)[0][0],
        "preprocess": np.asarray(read_pictures(Item("a", Place(str(path)), "c"), 12)[1][0]),
    }


@pytest.mark.parametrize("height", [64, 720])
@pytest.mark.parametrize("matrix", [1, 5, 6, 7, 9])
@pytest.mark.parametrize("full", [False, True])
def test_tagged_colours_are_read_by_their_tags(tmp_path: Path, height: int, matrix: int, full: bool) -> None:
    path = encode(tmp_path / "a.mp4", np.full((1, height, 64, 3), COLOUR, np.uint8), matrix=matrix, full=full)
    for frame in readings(path).values():
        assert np.abs(frame[8, 8].astype(int) - COLOUR).max() <= 2


def test_colours_without_a_tag_are_read_as_players_do() -> None:
    """BT.601 below 720 lines, BT.709 from there on."""
    for height, matrix in ((718, 5), (720, 1)):
        rgb = av.VideoFrame.from_ndarray(np.full((height, 64, 3), COLOUR, np.uint8), format="rgb24")
        limits = {"src_color_range": ColorRange.JPEG, "dst_color_range": ColorRange.MPEG}
        frame = rgb.reformat(format="yuv420p", dst_colorspace=matrix, **limits)
        frame.colorspace, frame.color_range = 2, 0
        assert np.abs(decoding.to_rgb(frame)[8, 8].astype(int) - COLOUR).max() <= 2


@pytest.mark.parametrize("height", [64, 720])
def test_written_colours_agree_with_their_tags(tmp_path: Path, height: int) -> None:
    path = write_video(tmp_path / "a.mp4", np.full((1, height, 64, 3), COLOUR, np.uint8), 24)
    with av.open(str(path)) as file:
        frame = next(file.decode(video=0))
    assert (frame.colorspace, frame.color_primaries, frame.color_trc, frame.color_range) == (1, 1, 1, ColorRange.MPEG)
    y, u, v = (int(np.asarray(p)[0]) for p in (memoryview(plane) for plane in frame.planes))
    r, g, b = (c / 255 for c in COLOUR)
    luma = 0.2126 * r + 0.7152 * g + 0.0722 * b
    expected = 16 + 219 * luma, 128 + 224 * (b - luma) / 1.8556, 128 + 224 * (r - luma) / 1.5748
    assert np.abs(np.subtract((y, u, v), expected)).max() <= 1.5


@pytest.mark.parametrize(
    ("suffix", "codec", "pix_fmt"),
    [
        ("mp4", "libx264", "yuv420p10le"), ("mp4", "libx264", "yuv444p"), ("mp4", "libx264rgb", "rgb24"),
        ("webm", "libvpx-vp9", "yuv420p"), ("mkv", "ffv1", "yuv422p"), ("avi", "mpeg4", "yuv420p"),
        ("avi", "rawvideo", "yuv420p"),
    ],
)  # fmt: skip
def test_other_formats_are_read(tmp_path: Path, suffix: str, codec: str, pix_fmt: str) -> None:
    path = encode(tmp_path / f"a.{suffix}", FLAT, codec, pix_fmt)
    for frame in readings(path).values():
        assert np.abs(frame[8, 8].astype(int) - COLOUR).max() <= 3
    assert len(load_clip(path)) == 2


def test_full_range_and_greys_are_read(tmp_path: Path) -> None:
    path = encode(tmp_path / "a.avi", FLAT, "mjpeg", "yuvj420p", matrix=6, full=True)
    assert np.abs(read_video(path)[0][0, 8, 8].astype(int) - COLOUR).max() <= 3
    grey = read_video(encode(tmp_path / "a.mkv", FLAT, "ffv1", "gray"))[0][0, 8, 8]
    assert np.ptp(grey) == 0 and abs(int(grey[0]) - 135) <= 1


def test_transparency_of_videos_is_black(tmp_path: Path) -> None:
    half = np.concatenate([FLAT, np.full((2, 64, 96, 1), 128, np.uint8)], -1)
    for name, codec, pix_fmt in (("a.mov", "png", "rgba"), ("b.mov", "prores_ks", "yuva444p10le")):
        shown = read_video(encode(tmp_path / name, half, codec, pix_fmt))[0][0, 8, 8]
        assert np.abs(shown - np.multiply(COLOUR, 128 / 255)).max() <= 2


@pytest.mark.parametrize(
    ("tags", "says"),
    [
        ({"transfer": 16}, r"HDR \(PQ\)"), ({"transfer": 18}, r"HDR \(HLG\)"), ({"primaries": 9}, r"HDR \(BT.2020\)"),
        ({"x264-params": "interlaced=1", "flags": "+ilme+ildct"}, "interlaced; deinterlace"),
        ({"codec": "libvpx-vp9", "pix_fmt": "yuva420p"}, "alpha_mode"),
    ],
)  # fmt: skip
def test_what_would_be_shown_wrong_is_refused_by_name(tmp_path: Path, tags: dict[str, Any], says: str) -> None:
    path = tmp_path / ("a.webm" if "codec" in tags else "a.mp4")
    frames = np.concatenate([FLAT, FLAT[..., :1]], -1) if "codec" in tags else FLAT
    encode(path, frames, **tags)
    for read in (load_clip, read_video, lambda p: read_pictures(Item("a", Place(str(p)), "c"), 12)):
        with pytest.raises(InputError, match=says):
            read(path)


CORNER = np.zeros((64, 96, 3), np.uint8)
CORNER[:16, :24] = (255, 0, 0)
MATRICES = {  # a, b, c, d of the display matrix, and what shows the same
    "as it is": ((1, 0, 0, 1), lambda f: f),
    "left and right mirrored": ((-1, 0, 0, 1), lambda f: f[:, ::-1]),
    "upper and lower mirrored": ((1, 0, 0, -1), lambda f: f[::-1]),
    "half a turn": ((-1, 0, 0, -1), lambda f: f[::-1, ::-1]),
    "a quarter turn clockwise": ((0, 1, -1, 0), lambda f: np.rot90(f, -1)),
    "a quarter turn counterclockwise": ((0, -1, 1, 0), lambda f: np.rot90(f, 1)),
    "transposed": ((0, 1, 1, 0), lambda f: f.transpose(1, 0, 2)),
    "transposed along the other diagonal": ((0, -1, -1, 0), lambda f: np.rot90(f, 2).transpose(1, 0, 2)),
}


def with_matrix(path: Path, a: float, b: float, c: float, d: float) -> None:
    data = bytearray(path.read_bytes())
    at = data.find(b"tkhd") + 44
    one = 1 << 16
    corners = [(a * x + c * y, b * x + d * y) for x in (0, 96) for y in (0, 64)]
    x, y = (-round(min(p[i] for p in corners)) * one for i in (0, 1))
    numbers = (round(a * one), round(b * one), 0, round(c * one), round(d * one), 0, x, y, 1 << 30)
    data[at : at + 36] = struct.pack(">9i", *numbers)
    path.write_bytes(data)


@pytest.mark.parametrize("name", MATRICES)
def test_display_matrix_turns_and_mirrors(tmp_path: Path, name: str) -> None:
    numbers, shown = MATRICES[name]
    path = write_video(tmp_path / "a.mp4", np.stack([CORNER] * 2), 12)
    plain = read_video(path)[0][0]
    with_matrix(path, *numbers)
    for frame in readings(path).values():
        assert np.array_equal(frame, shown(plain))


def test_display_matrix_of_another_angle_is_refused(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", np.stack([CORNER] * 2), 12)
    with_matrix(path, 0.8, 0.6, -0.6, 0.8)
    with pytest.raises(InputError, match="no quarter turn"):
        load_clip(path)


def test_pixels_are_made_square(tmp_path: Path) -> None:
    for aspect, size in ((Fraction(2), (64, 192)), (Fraction(1, 2), (128, 96)), (Fraction(1), (64, 96))):
        path = encode(tmp_path / "a.mp4", FLAT, aspect=aspect)
        assert {f.shape[:2] for f in readings(path).values()} == {size}
    path = encode(tmp_path / "a.mp4", np.stack([CORNER] * 2), aspect=Fraction(2))
    with_matrix(path, 0, 1, -1, 0)  # pixels are stretched before the frame is turned
    assert {f.shape[:2] for f in readings(path).values()} == {(192, 64)}


def cut_without_encoding(source: Path, path: Path, seconds: float) -> Path:
    """As `ffmpeg -ss SECONDS -i SOURCE -c copy PATH`: an edit list hides what is before the cut."""
    with av.open(str(source)) as old, av.open(str(path), "w") as new:
        stream = old.streams.video[0]
        target = new.add_stream_from_template(stream)
        assert stream.time_base
        shift = int(seconds / stream.time_base)
        for packet in old.demux(stream):
            if packet.dts is not None and packet.pts is not None:
                packet.pts, packet.dts, packet.stream = packet.pts - shift, packet.dts - shift, target
                new.mux(packet)
    return path


def test_a_clip_cut_without_encoding_is_whole(tmp_path: Path) -> None:
    frames = np.stack([np.full((64, 64, 3), 8 * i, np.uint8) for i in range(24)])
    source = write_video(tmp_path / "a.mp4", frames, 12)
    path = cut_without_encoding(source, tmp_path / "b.mp4", 0.5)
    first = {k: (len(v), int(v[0].mean())) for k, v in {
        "--video": [np.asarray(f) for f in load_clip(path)], "replay": read_video(path)[0],
        "preprocess": [np.asarray(f) for f in read_pictures(Item("a", Place(str(path)), "c"), 12)[1]],
    }.items()}  # fmt: skip
    assert all(count == 18 and abs(grey - 48) <= 2 for count, grey in first.values()), first


def test_a_clip_cut_at_a_key_frame_is_whole(tmp_path: Path) -> None:
    """What lies before the key frame is not even read; the file says that it has 24 frames, and 12 are its video."""
    frames = np.stack([np.full((64, 64, 3), 8 * i, np.uint8) for i in range(24)])
    source = encode(tmp_path / "a.mp4", frames, g="6", bf="0")
    path = cut_without_encoding(source, tmp_path / "b.mp4", 1.0)
    with av.open(str(path)) as file:
        assert file.streams.video[0].frames == 24
    assert len(load_clip(path)) == len(read_video(path)[0]) == 12


def test_a_truncated_clip_is_refused_only_where_its_end_is_needed(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (12, 64, 64, 3), np.uint8)
    path = write_video(tmp_path / "a.mp4", noise, 12)
    path.write_bytes(path.read_bytes()[:-20000])
    assert len(load_clip(path, 2)) == 2
    for read in (load_clip, read_video):
        with pytest.raises(InputError, match="truncated or damaged"):
            read(path)


def test_names_that_ffmpeg_would_misread_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("12:30:00.mp4", "http:.mp4", "-i.mp4", "%03d.mp4", "concat:a|b.mp4", "картина 1.mp4", "\udcff.mp4"):
        write_video(name, FLAT, 12)
        assert len(load_clip(name)) == len(read_video(name)[0]) == 2
    with pytest.raises(InputError, match="null character"):
        load_clip("a\0b.mp4")
    with pytest.raises(InputError, match="addresses are read for pictures"):
        load_clip("https://localhost/a.mp4")


def test_playlists_open_no_other_files(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", FLAT, 12)
    (tmp_path / "list.m3u8").write_text(
        f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{tmp_path}/a.mp4\n#EXT-X-ENDLIST\n"
    )
    (tmp_path / "list.txt").write_text("ffconcat version 1.0\nfile a.mp4\n")
    for name in ("list.m3u8", "list.txt"):
        with pytest.raises(InputError, match="cannot be read"):
            load_clip(tmp_path / name)


def test_frames_of_too_many_pixels_are_refused_before_they_are_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_video(tmp_path / "a.mp4", FLAT, 12)
    monkeypatch.setattr(decoding, "MAX_PIXELS", 64 * 96 - 1)
    with pytest.raises(InputError, match=r"frames have 96x64 pixels.*scale it down"), open_video(path):
        pass
    monkeypatch.setattr(decoding, "MAX_PIXELS", 64 * 96)
    with open_video(path) as video:
        assert sum(1 for _ in video) == 2


def test_a_clip_of_too_many_frames_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_video(tmp_path / "a.mp4", np.concatenate([FLAT] * 3), 12)
    monkeypatch.setattr("kinetoscope.media.clips.MAX_BYTES", 4 * 64 * 96 * 3)
    with pytest.raises(InputError, match=r"more than 4 frames of 96x64.*num_frames"):
        load_clip(path)
    assert len(load_clip(path, 6)) == 6
    assert len(load_frames(path, 32, 48, fps=12)) == 6  # their size counts as they are kept
    assert len(load_frames(path, 64, 96, fps=12, last=3)) == 3


def test_a_long_clip_is_held_at_the_size_that_is_needed(tmp_path: Path) -> None:
    """At no time more decoded frames than a few are alive."""
    import tracemalloc

    path = encode(tmp_path / "a.mp4", np.zeros((60, 256, 256, 3), np.uint8), preset="ultrafast")
    tracemalloc.start()
    frames = load_frames(path, 32, 32, fps=12)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(frames) == 60 and peak < 8 * 256 * 256 * 3


def test_frames_are_taken_by_time_where_a_rate_is_asked_for(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    greys = np.stack([np.full((64, 64, 3), 10 * i, np.uint8) for i in range(24)])
    path = write_video(tmp_path / "a.mp4", greys, 24)
    caplog.set_level("INFO", "kinetoscope")

    def seen(**how: Any) -> list[int]:
        return [round(float(f.mean()) / 10) for f in load_frames(path, 64, 64, **how)]

    assert seen(fps=24) == list(range(24)) and not caplog.records
    assert seen(fps=12) == list(range(0, 24, 2))
    assert "has 24 frames a second and the request 12" in caplog.text
    assert seen(fps=48)[:6] == [0, 1, 1, 2, 2, 3] and len(seen(fps=48)) == 48
    assert seen(fps=8, limit=4) == [0, 3, 6, 9] and seen(fps=8, last=2) == [18, 21]
    assert len(load_frames(greys, 64, 64, fps=12)) == 24  # an array has no rate
