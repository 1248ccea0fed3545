"""Pictures and clips of users: orientation, cutting, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kinetoscope.core.errors import InputError
from kinetoscope.media import fit_picture, load_clip, load_picture, write_video


def quarters() -> Image.Image:
    """20 x 10 pixels: red, green / blue, white quarters."""
    array = np.zeros((10, 20, 3), np.uint8)
    array[:5, :10], array[:5, 10:], array[5:, :10], array[5:, 10:] = (
        (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255),
    )  # fmt: skip
    return Image.fromarray(array)


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn clockwise to see it upright
    quarters().save(tmp_path / "turned.png", exif=exif)
    image = load_picture(tmp_path / "turned.png")
    assert image.size == (10, 20)
    assert image.getpixel((1, 1)) == (0, 0, 255) and image.getpixel((8, 1)) == (255, 0, 0)


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "1", "CMYK", "I;16"])
def test_every_mode_becomes_rgb(tmp_path: Path, mode: str) -> None:
    image = quarters().convert("L").convert("I;16") if mode == "I;16" else quarters().convert(mode)
    path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    image.save(path)
    assert load_picture(path).mode == "RGB"


def test_greys_of_16_bits_keep_their_shades(tmp_path: Path) -> None:
    shades = np.linspace(0, 65535, 256).round().astype(np.uint16).reshape(16, 16)
    Image.fromarray(shades).save(tmp_path / "deep.png")
    assert np.array_equal(np.asarray(load_picture(tmp_path / "deep.png"))[..., 0], np.arange(256).reshape(16, 16))


def test_greys_of_32_bits_are_scaled_or_refused(tmp_path: Path) -> None:
    shades = np.linspace(0, 65535, 256).round().reshape(16, 16)
    deep = Image.fromarray(shades.astype(np.int32))
    assert np.array_equal(np.asarray(load_picture(deep))[..., 0], np.arange(256).reshape(16, 16))
    (floats := Image.fromarray((shades / 65535).astype(np.float32))).save(tmp_path / "a.tif")
    assert floats.mode == "F"
    assert np.array_equal(np.asarray(load_picture(tmp_path / "a.tif"))[..., 0], np.arange(256).reshape(16, 16))
    for values in (np.full((2, 2), 70_000, np.int32), np.full((2, 2), 2.0, np.float32), np.full((2, 2), np.nan)):
        with pytest.raises(InputError, match="32-bit greys holds values outside"):
            load_picture(Image.fromarray(values.astype(np.float32) if values.dtype == float else values))


def test_a_picture_without_pixels_is_refused() -> None:
    with pytest.raises(InputError, match="no pixels"):
        load_picture(Image.new("RGB", (0, 2)))


def test_premultiplied_transparency_is_black() -> None:
    half = Image.new("RGBA", (2, 2), (200, 100, 50, 128))
    plain = np.asarray(load_picture(half)).astype(int)
    assert np.abs(plain - np.asarray(load_picture(half.convert("RGBa")))).max() <= 2
    assert np.abs(plain[0, 0] - (100, 50, 25)).max() <= 1


def test_the_first_picture_of_an_animation_is_taken(tmp_path: Path) -> None:
    pages = [Image.new("RGB", (4, 4), c) for c in ("red", "blue")]
    for name in ("a.gif", "a.png", "a.tif"):
        pages[0].save(tmp_path / name, save_all=True, append_images=pages[1:])
        assert load_picture(tmp_path / name).getpixel((0, 0)) == (255, 0, 0)


def test_pictures_of_too_many_pixels_are_refused_before_they_are_decoded(tmp_path: Path) -> None:
    for mode, side in (("1", 12_000), ("1", 20_000)):  # beyond our limit, and beyond Pillow's own; a few kB each
        Image.new(mode, (side, side)).save(tmp_path / "a.png")
        with pytest.raises(InputError, match=r"000 pixels.*scale it down|exceeds limit"):
            load_picture(tmp_path / "a.png")


def test_an_open_image_whose_file_is_damaged(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(data[: len(data) // 2])
    with pytest.raises(InputError, match="cannot be read"):
        load_picture(Image.open(tmp_path / "a.png"))


def test_transparency_is_black() -> None:
    clear = Image.new("RGBA", (2, 2), (255, 0, 0, 0))
    assert load_picture(clear).getpixel((0, 0)) == (0, 0, 0)


def test_the_same_size_is_untouched() -> None:
    assert np.array_equal(fit_picture(quarters(), 10, 20), np.asarray(quarters()))


def test_it_covers_and_cuts_evenly() -> None:
    square = fit_picture(quarters(), 10, 10)  # the middle half of the width
    assert np.array_equal(square, np.asarray(quarters())[:, 5:15])
    wide = fit_picture(quarters(), 8, 64)
    assert wide.shape == (8, 64, 3)
    assert tuple(wide[0, 0]) == (255, 0, 0) and tuple(wide[-1, -1]) == (255, 255, 255)


def test_a_very_thin_picture_is_cut_before_it_is_scaled() -> None:
    thin = Image.new("RGB", (1, 20_000), (9, 8, 7))
    assert np.array_equal(fit_picture(thin, 64, 512), np.full((64, 512, 3), (9, 8, 7), np.uint8))


def test_arrays_of_bytes_and_floats() -> None:
    bytes_ = np.asarray(quarters())
    assert np.array_equal(np.asarray(load_picture(bytes_)), bytes_)
    assert np.array_equal(np.asarray(load_picture(bytes_ / 255.0)), bytes_)
    assert np.asarray(load_picture(bytes_[..., 0])).shape == (10, 20, 3)


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("missing.png", "cannot be read"),
        (np.zeros((2, 2, 4), np.uint8), r"\[2, 2, 4\]"),
        (np.zeros((0, 2, 3), np.uint8), "should be"),
        (np.full((2, 2, 3), np.nan), "outside"),
        (None, "NoneType"),
    ],
)
def test_what_is_no_picture(source: object, says: str) -> None:
    with pytest.raises(InputError, match=says):
        load_picture(source)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("source", ["file:///a.png", "FTP://host/a.png", "data:image/png;base64,AAAA", "s3://a/b.png"])
def test_addresses_of_another_scheme_are_refused_by_their_scheme(source: str) -> None:
    with pytest.raises(InputError, match=rf"addresses are http:// or https://, not {source.partition(':')[0]}:"):
        load_picture(source)


def test_a_file_whose_name_looks_like_an_address_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data:1,2.png").write_bytes(b"")
    Image.new("RGB", (4, 4)).save(tmp_path / "data:1,2.png")
    assert load_picture("data:1,2.png").size == (4, 4)


def test_a_damaged_file(tmp_path: Path) -> None:
    path = tmp_path / "cut.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(InputError, match=r"cut\.png"):
        load_picture(path)
    (tmp_path / "text.png").write_text("hello")
    with pytest.raises(InputError, match="known format"):
        load_picture(tmp_path / "text.png")
    with pytest.raises(InputError, match="cannot be read"):
        load_picture(tmp_path)
    with pytest.raises(InputError) as error:
        load_picture(tmp_path)
    assert str(error.value) == f"image {tmp_path} cannot be read: Is a directory"


def test_clips(tmp_path: Path) -> None:
    frames = np.stack([np.full((16, 32, 3), 20 * i, np.uint8) for i in range(6)])
    write_video(tmp_path / "a.mp4", frames, 8)
    assert len(load_clip(tmp_path / "a.mp4")) == 6
    first = load_clip(tmp_path / "a.mp4", 2)
    assert len(first) == 2 and first[0].size == (32, 16)
    assert [np.asarray(f).max() for f in load_clip(frames, 3)] == [0, 20, 40]
    assert len(load_clip([quarters(), quarters()])) == 2


@pytest.mark.parametrize(
    ("source", "says"), [("missing.mp4", "does not exist"), ([], "no frame"), (3, "type int"), (np.zeros(3), "shape")]
)
def test_what_is_no_clip(source: object, says: str) -> None:
    with pytest.raises(InputError, match=says):
        load_clip(source)  # pyright: ignore[reportArgumentType]


def test_a_clip_that_is_no_video(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_text("hello")
    with pytest.raises(InputError, match="cannot be read"):
        load_clip(tmp_path / "a.mp4")
