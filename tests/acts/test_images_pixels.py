"""One image file of any kind: the pixels that Pillow shows, upright, opaque, 8 bits; or one line that names it."""

import io

import numpy as np
import pytest
from PIL import Image

from wsae.acts.images.pixels import ImageError, decoded

RNG = np.random.default_rng(0)


def read(data: bytes) -> np.ndarray:
    image = decoded(data, "here", 7)
    assert image.mode == "RGB"
    return np.asarray(image)


def saved(image: Image.Image, kind: str, **options) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def noise(*shape: int, top: int = 256, dtype=np.uint8) -> np.ndarray:
    return RNG.integers(0, top, shape, dtype=dtype)


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM", "WEBP"])
def test_lossless_rgb_is_kept(kind):
    pixels = noise(9, 7, 3)
    options = {"lossless": True} if kind == "WEBP" else {}
    assert np.array_equal(read(saved(Image.fromarray(pixels), kind, **options)), pixels)


def test_jpeg_is_near():
    smooth = np.broadcast_to(np.arange(64, dtype=np.uint8)[:, None, None] * 3, (64, 64, 3))
    data = saved(Image.fromarray(np.ascontiguousarray(smooth)), "JPEG", quality=95)
    assert np.abs(read(data).astype(int) - smooth).max() < 6


def test_grey_and_one_bit_become_three_equal_channels():
    grey = noise(5, 6)
    assert np.array_equal(read(saved(Image.fromarray(grey), "PNG")), np.stack([grey] * 3, 2))
    bits = noise(8, 8, top=2) * 255
    assert np.array_equal(
        read(saved(Image.fromarray(bits).convert("1"), "PNG")), np.stack([bits] * 3, 2)
    )


def test_sixteen_bits_lose_the_lower_byte():
    wide = noise(5, 6, top=65536, dtype=np.uint16)
    expected = np.stack([(wide // 256).astype(np.uint8)] * 3, 2)
    assert np.array_equal(read(saved(Image.fromarray(wide), "PNG")), expected)
    assert np.array_equal(read(saved(Image.fromarray(wide), "TIFF")), expected)


def test_alpha_lies_over_white():
    rgba = noise(16, 16, 4)
    colour, alpha = rgba[..., :3].astype(float), rgba[..., 3:] / 255
    expected = colour * alpha + 255 * (1 - alpha)
    assert np.abs(read(saved(Image.fromarray(rgba), "PNG")) - expected).max() <= 1
    la = rgba[..., [0, 3]]
    expected = colour[..., :1] * alpha + 255 * (1 - alpha)
    assert np.abs(read(saved(Image.fromarray(la), "PNG")) - expected).max() <= 1


def test_palettes_also_with_a_transparent_entry():
    picture = Image.fromarray(noise(6, 6, top=3), "P")
    picture.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    numbers = np.asarray(picture)
    colours = np.array([[10, 20, 30], [40, 50, 60], [70, 80, 90]], dtype=np.uint8)
    assert np.array_equal(read(saved(picture, "PNG")), colours[numbers])
    colours[1] = 255
    assert np.array_equal(read(saved(picture, "PNG", transparency=1)), colours[numbers])
    assert np.array_equal(read(saved(picture, "GIF", transparency=1)), colours[numbers])


def test_cmyk_is_what_pillow_shows():
    picture = Image.fromarray(noise(8, 8, 3)).convert("CMYK")
    expected = np.asarray(picture.convert("RGB"))
    assert np.array_equal(read(saved(picture, "TIFF")), expected)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_obeyed(orientation):
    upright = noise(4, 6, 3)
    turns = {
        1: lambda x: x,
        2: lambda x: x[:, ::-1],
        3: lambda x: x[::-1, ::-1],
        4: lambda x: x[::-1],
        5: lambda x: x.swapaxes(0, 1),
        6: lambda x: np.rot90(x, 1),
        7: lambda x: x[::-1, ::-1].swapaxes(0, 1),
        8: lambda x: np.rot90(x, -1),
    }
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture = Image.fromarray(np.ascontiguousarray(turns[orientation](upright)))
    assert np.array_equal(read(saved(picture, "PNG", exif=exif)), upright)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP"])
def test_every_cut_of_a_file_is_an_image_error_or_harmless(kind):
    data = saved(Image.fromarray(noise(40, 40, 3)), kind)
    for share in (0.0, 0.02, 0.3, 0.6):
        with pytest.raises(ImageError, match="^here: ") as caught:
            read(data[: int(len(data) * share)])
        assert caught.value.index == 7
        assert "\n" not in str(caught.value)


def test_flipped_bytes_never_end_in_another_exception():
    whole = saved(Image.fromarray(noise(24, 24, 3)), "PNG")
    refused = 0
    for _ in range(200):
        data = bytearray(whole)
        data[int(RNG.integers(8, len(data)))] ^= int(RNG.integers(1, 256))
        try:
            decoded(bytes(data), "here", 0)
        except ImageError:
            refused += 1
    assert refused > 100


def test_bombs_floats_and_missing_files_are_refused(tmp_path, monkeypatch):
    data = saved(Image.fromarray(noise(30, 30, 3)), "PNG")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 899)  # Pillow itself only warns below twice that
    with pytest.raises(ImageError, match="decompression bomb"):
        read(data)
    monkeypatch.undo()
    with pytest.raises(ImageError, match="floating-point pixels"):
        read(saved(Image.fromarray(np.ones((3, 3), np.float32)), "TIFF"))
    with pytest.raises(ImageError, match=r"gone\.png: cannot be read \(No such file"):
        decoded(tmp_path / "gone.png", str(tmp_path / "gone.png"), 3)
    with pytest.raises(ImageError, match="not an image that Pillow can read"):
        read(b"hello")
