"""The image gate: untrusted bytes become an upright RGB picture or a named refusal."""

from __future__ import annotations

import io
import struct
import subprocess
import sys
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile, ImageOps

from llava_pipeline.data.checks import REASONS
from llava_pipeline.data.images import FORMATS, MAX_ASPECT, MAX_BYTES, MIN_SIDE, ImageRefused, decode, letterbox, to_rgb
from llava_pipeline.data.stills import MAX_CHUNKS, MAX_SCANS, MAX_SEGMENTS
from tests.data import pictures_made as made
from tests.data.pictures_made import encoded, segment, with_chunks, with_segments
from tests.data.rows import a_picture, a_png, chunk

WIDTH, HEIGHT = 24, 16
RED, GREEN, WHITE = (255, 0, 0), (0, 128, 0), (255, 255, 255)


def a_gradient() -> Image.Image:
    """Every pixel its own colour, so that nothing is turned or shifted unseen."""
    across, down = np.meshgrid(np.arange(WIDTH) * 10, np.arange(HEIGHT) * 15)
    return Image.fromarray(np.stack([across, down, np.full_like(across, 90)], axis=-1).astype(np.uint8))


def reason_of(data: bytes) -> str:
    with pytest.raises(ImageRefused) as caught:
        decode(data)
    return caught.value.reason


# --------------------------------------------------------------------------------------------- what is taken


@pytest.mark.parametrize("format", FORMATS)
def test_every_accepted_format_becomes_rgb(format: str) -> None:
    options = {"WEBP": {"lossless": True}, "JPEG": {"quality": 95}}.get(format, {})
    image = decode(encoded(a_gradient(), format, **options))
    assert (image.mode, image.size) == ("RGB", (WIDTH, HEIGHT))
    difference = np.asarray(image).astype(int) - np.asarray(a_gradient()).astype(int)
    assert np.abs(difference).mean() < 12


@pytest.mark.parametrize("format", ["TIFF", "PPM", "ICO", "TGA", "PDF", "EPS"])
def test_any_other_format_is_refused(format: str) -> None:
    assert reason_of(encoded(a_gradient(), format)) == "image_unreadable"


@pytest.mark.parametrize(
    "data", [b"", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"<svg/>", b"BM", b"RIFF0000WEBP", b"\xff\xd8\xff"]
)
def test_a_mere_beginning_is_refused(data: bytes) -> None:
    assert reason_of(data) == "image_unreadable"


# --------------------------------------------------------------------------------------------- limits


def test_the_byte_cap_comes_before_everything_else() -> None:
    good = a_picture()
    assert decode(good + bytes(MAX_BYTES - len(good))).size == (16, 16)
    assert reason_of(good + bytes(MAX_BYTES - len(good) + 1)) == "image_too_many_bytes"


@pytest.mark.parametrize(
    ("width", "height", "reason"),
    [
        (6325, 6325, "image_too_many_pixels"),
        (12_650, 1_000, "image_too_many_pixels"),
        (1_000, 12_650, "image_too_many_pixels"),
        (2**31 - 1, 2**31 - 1, "image_too_many_pixels"),
        (20_000, 20_000, "image_too_many_pixels"),
        (1, 20_000, "image_too_small"),
        (20_000, 1, "image_too_small"),
        (7, 8, "image_too_small"),
        (8, 161, "image_too_long"),
        (161, 8, "image_too_long"),
    ],
)
def test_a_claimed_size_is_refused_before_a_pixel_is_decoded(width: int, height: int, reason: str) -> None:
    # A decoder would stumble over the data first: there are no pixels in it.
    data = a_png(width, height)
    assert len(data) < 100
    assert reason_of(data) == reason


@pytest.mark.parametrize(
    "size", [(MIN_SIDE, MIN_SIDE), (MIN_SIDE, MIN_SIDE * MAX_ASPECT), (MIN_SIDE * MAX_ASPECT, MIN_SIDE)]
)
def test_the_limits_themselves_are_allowed(size: tuple[int, int]) -> None:
    assert decode(a_picture(size=size)).size == size


def test_a_picture_of_just_the_allowed_pixels_passes_the_header_check() -> None:
    assert reason_of(a_png(6250, 6400)) == "image_unreadable"


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_a_truncated_file_is_refused(format: str, share: float) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    data = encoded(noise, format)
    assert reason_of(data[: int(len(data) * share)]) == "image_unreadable"


# --------------------------------------------------------------------------------------------- broken


def test_what_is_no_picture_is_refused_with_what_it_seems_to_be() -> None:
    tiff = encoded(a_gradient(), "TIFF", save_all=True, append_images=[a_gradient()])
    for data, seen in (
        (b"", "no bytes"),
        (b"<!DOCTYPE html><html>404</html>", "HTML"),
        (b'\xef\xbb\xbf\n<?xml version="1.0"?><svg/>', "SVG"),
        (tiff, "TIFF"),
        (encoded(a_gradient(), "AVIF"), "AVIF"),
        (encoded(a_gradient(), "JPEG2000"), "JPEG 2000"),
        (encoded(a_gradient(), "PDF"), "PDF"),
    ):
        with pytest.raises(ImageRefused, match=f"image_unreadable: .*{seen}.*not one of JPEG, PNG, WEBP, GIF, BMP"):
            decode(data)


def test_a_wrong_checksum_over_right_pixels_is_refused() -> None:
    # Pillow reads over it: what is right in the pixels is luck.
    data = encoded(made.noise())
    decode(data)
    with pytest.raises(ImageRefused, match="a wrong checksum in IDAT"):
        decode(made.with_wrong_checksum(data))


def test_half_a_picture_is_refused_though_the_program_asked_pillow_for_halves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    for format in ("JPEG", "PNG", "BMP"):
        data = encoded(made.noise(), format)
        assert reason_of(data[: len(data) * 2 // 3]) == "image_unreadable"


def test_a_run_length_encoded_bmp_is_refused() -> None:
    with pytest.raises(ImageRefused, match="run-length encoded"):
        decode(made.bmp_of_runs(16))


# --------------------------------------------------------------------------------------------- beside the picture


@cache
def beside_a_jpeg() -> dict[str, bytes]:
    data = encoded(a_gradient(), "JPEG")
    entries = b"".join(struct.pack("<HHII", 0x0100 + entry, 2, 5000, 60_000) for entry in range(60))
    broken = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 60) + entries
    return {
        "icc": with_segments(data, segment(0xE2, b"ICC_PROFILE\0\1\1no profile")),
        "exif that points nowhere": with_segments(data, segment(0xE1, broken)).replace(data[2:20], b""),
        "huge exif": with_segments(data, *[segment(0xE1, b"Exif\0\0" + bytes(65_000))] * 290),
        "mpo index": with_segments(data, segment(0xE2, b"MPF\0II*\0" + bytes(40))),
        "photoshop": with_segments(data, segment(0xED, b"Photoshop 3.0\x008BIM\3\xed")),
        "comment": with_segments(data, segment(0xFE, b"\xff\xd9" * 99)),
        "filling": data[:2] + b"\xff" * 5000 + data[2:],
        "film behind it": data + made.noise(256, 256).tobytes() + b"\xff\xda" * 1000,
    }


@cache
def beside_a_png() -> dict[str, bytes]:
    data = encoded(a_gradient())
    bomb = zlib.compress(bytes(1 << 24), 9)
    return {
        "icc": with_chunks(data, chunk(b"iCCP", b"none\0\0no profile")),
        "icc bomb": with_chunks(data, chunk(b"iCCP", b"none\0\0" + bomb)),
        "text bomb": with_chunks(data, *[chunk(b"zTXt", b"key\0\0" + bomb)] * 90),
        "text bomb of many": with_chunks(
            data, *[chunk(b"zTXt", b"%d\0\0" % n + zlib.compress(bytes(1 << 20))) for n in range(90)]
        ),
        "international text": with_chunks(data, chunk(b"iTXt", b"key\0\1\0\0\0" + bomb)),
        "exif": with_chunks(data, chunk(b"eXIf", b"II*\0" + bytes(1 << 20))),
        "animation of nothing": with_chunks(data, chunk(b"acTL", bytes(8)), chunk(b"acTL", bytes(8))),
        "wrong checksum of a text": with_chunks(data, chunk(b"tEXt", b"a\0b")[:-1] + b"?"),
        "gamma": with_chunks(data, chunk(b"gAMA", b"\0")),
    }


@pytest.mark.parametrize("name", beside_a_jpeg())
def test_what_stands_beside_a_jpeg_does_not_change_it(name: str) -> None:
    shown = told(beside_a_jpeg()[name])
    assert shown is not None
    assert shown.tobytes() == decode(encoded(a_gradient(), "JPEG")).tobytes()


@pytest.mark.parametrize("name", beside_a_png())
def test_what_stands_beside_a_png_does_not_change_it(name: str) -> None:
    shown = told(beside_a_png()[name])
    assert shown is not None
    assert shown.tobytes() == a_gradient().tobytes()


def test_what_stands_beside_a_webp_or_a_gif_does_not_change_it() -> None:
    data = encoded(a_gradient(), "WEBP", lossless=True)
    extended = made.webp(made.webp_head(WIDTH, HEIGHT, 0x2C), made.riff(b"ICCP", b"none"), data[12:])
    assert decode(made.webp(extended[12:], made.riff(b"XMP ", b"<"), made.riff(b"EXIF", b"II"))).tobytes() == (
        a_gradient().tobytes()
    )
    gif = encoded(a_gradient(), "GIF")
    assert decode(made.gif_with(gif, b"!\xfe\2hi\0", b"!\xff\2hi\0", b"?")).tobytes() == decode(gif).tobytes()


@pytest.mark.parametrize(
    ("data", "detail"),
    [
        (made.of_many_scans(16, MAX_SCANS), "scans"),
        (with_segments(encoded(Image.new("RGB", (16, 16)), "JPEG"), *[segment(0xE5, b"")] * MAX_SEGMENTS), "segments"),
        (with_chunks(a_picture(), chunk(b"prVt", b"") * MAX_CHUNKS), "chunks"),
        (made.webp(made.webp_head(16, 16), made.riff(b"none", b"") * MAX_CHUNKS), "chunks"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_more_parts_than_any_encoder_writes_are_refused(data: bytes, detail: str) -> None:
    with pytest.raises(ImageRefused, match=f"image_unreadable: more than [0-9]+ {detail}"):
        decode(data)


def test_a_progressive_picture_of_ten_scans_is_taken() -> None:
    data = encoded(made.noise(), "JPEG", progressive=True)
    assert data.count(b"\xff\xda") >= 10
    assert decode(made.of_many_scans(16, 20)).size == (16, 16)


# --------------------------------------------------------------------------------------------- upright, on white

SHARP: dict[str, dict[str, Any]] = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}}
TURNED = {
    1: lambda pixels: pixels,
    2: lambda pixels: pixels[:, ::-1],
    3: lambda pixels: pixels[::-1, ::-1],
    4: lambda pixels: pixels[::-1],
    5: lambda pixels: pixels.transpose(1, 0, 2),
    6: lambda pixels: np.rot90(pixels, 1),
    7: lambda pixels: pixels[::-1, ::-1].transpose(1, 0, 2),
    8: lambda pixels: np.rot90(pixels, -1),
}
"""What a camera stores for an upright picture, by the orientation it notes."""


@pytest.mark.parametrize("orientation", TURNED)
@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
def test_a_picture_stands_upright_however_the_camera_was_held(orientation: int, format: str) -> None:
    upright = np.asarray(a_gradient())
    stored = Image.fromarray(np.ascontiguousarray(TURNED[orientation](upright)))
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = decode(encoded(stored, format, exif=exif, **SHARP.get(format, {})))
    assert image.size == (WIDTH, HEIGHT)
    assert np.abs(np.asarray(image).astype(int) - upright).max() <= (8 if format == "JPEG" else 0)


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_an_orientation_that_does_not_exist_is_ignored(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert decode(encoded(a_gradient(), exif=exif)).tobytes() == a_gradient().tobytes()


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("kind", [1, 3, 4])
def test_the_orientation_is_read_in_either_byte_order_and_any_whole_number(order: str, kind: int) -> None:
    data = with_chunks(encoded(a_gradient()), chunk(b"eXIf", made.exif(6, order, kind=kind)))
    assert decode(data).tobytes() == a_gradient().transpose(Image.Transpose.ROTATE_270).tobytes()


def test_16_bit_greys_are_scaled_not_clipped() -> None:
    values = np.linspace(0, 65535, WIDTH * HEIGHT).round().astype(np.uint16).reshape(HEIGHT, WIDTH)
    pixels = np.asarray(decode(encoded(Image.fromarray(values))))
    assert pixels.shape == (HEIGHT, WIDTH, 3)
    assert np.array_equal(pixels[..., 0], (values / 257).round())
    assert np.array_equal(pixels[..., 0], pixels[..., 2])


def test_a_dark_16_bit_grey_stays_dark() -> None:
    values = np.full((HEIGHT, WIDTH), 255, dtype=np.uint16)
    assert np.asarray(decode(encoded(Image.fromarray(values)))).max() == 1


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_what_is_transparent_is_white_and_half_of_it_is_half_white(mode: str) -> None:
    image = Image.new(mode, (WIDTH, HEIGHT), (0, 0, 0, 0) if mode == "RGBA" else (0, 0))  # black, hidden
    image.paste((0, 0, 0, 128) if mode == "RGBA" else (0, 128), (0, 0, WIDTH // 2, HEIGHT))
    shown = decode(encoded(image))
    assert shown.getpixel((WIDTH - 1, 0)) == WHITE
    assert shown.getpixel((0, 0)) == (127, 127, 127)


def test_what_a_lossy_webp_hides_is_white() -> None:
    image = Image.new("RGBA", (WIDTH, HEIGHT), (0, 0, 0, 0))
    image.paste((0, 0, 0, 255), (0, 0, WIDTH // 2, HEIGHT))
    data = encoded(image, "WEBP", quality=80)
    assert b"ALPH" in data
    shown = decode(data)
    assert (shown.getpixel((0, 0)), shown.getpixel((WIDTH - 1, 0))) == ((0, 0, 0), WHITE)


@pytest.mark.parametrize("format", ["PNG", "GIF"])
def test_a_transparent_colour_of_a_palette_is_white(format: str) -> None:
    image = Image.new("P", (WIDTH, HEIGHT), 0)
    image.putpalette([0, 0, 0, *RED, *GREEN])
    image.paste(1, (0, 0, WIDTH // 2, HEIGHT))
    shown = decode(encoded(image, format, transparency=0))
    assert (shown.getpixel((0, 0)), shown.getpixel((WIDTH - 1, 0))) == (RED, WHITE)


def test_a_palette_with_degrees_of_transparency_is_blended_on_white() -> None:
    image = Image.new("P", (WIDTH, HEIGHT), 1)
    image.putpalette([*RED, 0, 0, 0])
    image.paste(0, (0, 0, WIDTH // 2, HEIGHT))
    shown = decode(encoded(image, transparency=b"\xff\x80"))
    assert (shown.getpixel((0, 0)), shown.getpixel((WIDTH - 1, 0))) == (RED, (127, 127, 127))


@pytest.mark.parametrize(("mode", "color"), [("RGB", RED), ("L", 7)])
def test_a_colour_named_as_transparent_is_white(mode: str, color: Any) -> None:
    image = Image.new(mode, (WIDTH, HEIGHT), color)
    assert decode(encoded(image, transparency=color)).getpixel((0, 0)) == WHITE


@pytest.mark.parametrize(
    "chunks",
    [
        {"kind": 2, "before": chunk(b"tRNS", b"\x01")},
        {"kind": 3, "before": chunk(b"PLTE", bytes(9)) + chunk(b"tRNS", bytes(range(1, 255)) * 2)},
    ],
)
def test_a_transparency_that_makes_no_sense_is_refused_by_name(chunks: dict[str, Any]) -> None:
    assert reason_of(a_png(16, 16, data=bytes(16 * 49), **chunks)) == "image_unreadable"


@pytest.mark.parametrize(("mode", "color"), [("1", 1), ("L", 255), ("CMYK", (0, 0, 0, 0)), ("YCbCr", (255, 128, 128))])
def test_other_modes_become_rgb(mode: str, color: Any) -> None:
    assert decode(encoded(Image.new(mode, (WIDTH, HEIGHT), color), "JPEG")).getpixel((3, 3)) == WHITE


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG"])
def test_of_a_moving_picture_the_first_frame_is_taken(format: str) -> None:
    frames = [Image.new("RGB", (WIDTH, HEIGHT), color) for color in (RED, GREEN, WHITE)]
    options = {"lossless": True} if format == "WEBP" else {}
    data = encoded(frames[0], format, save_all=True, append_images=frames[1:], duration=40, **options)
    with Image.open(io.BytesIO(data)) as image:
        assert image.n_frames == 3  # type: ignore[attr-defined]
    assert decode(data).getpixel((0, 0)) == RED


@pytest.mark.parametrize(
    ("values", "shown"),
    [
        (np.array([[0.0, 0.5, 1.0]], dtype=np.float32), [0, 128, 255]),
        (np.array([[0.0, 127.6, 300.0]], dtype=np.float32), [0, 128, 255]),
        (np.array([[-5.0, np.nan, 2.0]], dtype=np.float32), [0, 0, 2]),
        (np.array([[0, 128, 255]], dtype=np.int32), [0, 128, 255]),
        (np.array([[0, 32896, 65535]], dtype=np.int32), [0, 128, 255]),
        (np.array([[-70_000, 65535, 2**31 - 1]], dtype=np.int32), [0, 255, 255]),
        (np.array([[0, 32896, 65535]], dtype=np.uint16), [0, 128, 255]),
    ],
)
def test_deep_greys_of_any_kind_land_in_8_bits(values: np.ndarray[Any, Any], shown: list[int]) -> None:
    image = to_rgb(Image.fromarray(values))
    assert [image.getpixel((x, 0)) for x in range(3)] == [(grey, grey, grey) for grey in shown]


RAMP = np.arange(WIDTH * HEIGHT).reshape(HEIGHT, WIDTH)


def means(data: bytes) -> list[float]:
    return np.asarray(decode(data), dtype=float).mean(axis=(0, 1)).tolist()  # type: ignore[no-any-return]


def big_endian(values: np.ndarray[Any, Any]) -> bytes:
    return values.astype(">u2").tobytes()


def test_16_bit_png_of_every_kind_has_the_means_of_its_values() -> None:
    red, green, blue, alpha = RAMP * 170, RAMP * 60, 65535 - RAMP * 170, np.full_like(RAMP, 32768)
    scaled = [(plane / 257).mean() for plane in (red, green, blue)]
    rgb = big_endian(np.stack([red, green, blue], axis=-1))
    assert means(made.png(WIDTH, HEIGHT, 16, 2, rgb)) == pytest.approx(scaled, abs=0.6)
    assert means(made.png(WIDTH, HEIGHT, 16, 0, big_endian(red))) == pytest.approx([scaled[0]] * 3, abs=0.1)
    on_white = [mean / 2 + 127.5 for mean in scaled]
    rgba = big_endian(np.stack([red, green, blue, alpha], axis=-1))
    assert means(made.png(WIDTH, HEIGHT, 16, 6, rgba)) == pytest.approx(on_white, abs=1)
    grey_alpha = big_endian(np.stack([red, alpha], axis=-1))
    assert means(made.png(WIDTH, HEIGHT, 16, 4, grey_alpha)) == pytest.approx([on_white[0]] * 3, abs=1)


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I;16L"])
def test_16_bit_greys_of_any_byte_order_are_scaled(mode: str) -> None:
    values = (RAMP * 170).astype(">u2" if mode == "I;16B" else "<u2")
    image = Image.frombytes(mode, (WIDTH, HEIGHT), values.tobytes())
    assert np.array_equal(np.asarray(to_rgb(image))[..., 1], (RAMP * 170 / 257).round())


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_greys_of_few_bits_are_scaled_and_their_transparent_one_is_white(depth: int) -> None:
    top = 2**depth - 1
    shades = np.arange(8) % (top + 1)
    row = int("".join(f"{shade:0{depth}b}" for shade in shades), 2).to_bytes(depth, "big")
    shown = np.asarray(decode(made.png(8, 8, depth, 0, row * 8)))[0, :, 0]
    assert shown.tolist() == (shades * 255 // top).tolist()
    for transparent in range(top + 1):
        named = made.png(8, 8, depth, 0, row * 8, before=chunk(b"tRNS", struct.pack(">H", transparent)))
        expected = np.where(shades == transparent, 255, shades * 255 // top)
        assert np.asarray(decode(named))[0, :, 0].tolist() == expected.tolist()


def test_a_16_bit_colour_named_as_transparent_is_white() -> None:
    values = np.full((8, 8), 0x1234, dtype=np.uint16)
    values[0] = 0x8080
    grey = made.png(8, 8, 16, 0, big_endian(values), before=chunk(b"tRNS", b"\x12\x34"))
    assert np.asarray(decode(grey))[:2, 0, 0].tolist() == [0x80, 255]
    rgb = big_endian(np.stack([values] * 3, axis=-1))
    assert np.asarray(decode(made.png(8, 8, 16, 2, rgb, before=chunk(b"tRNS", b"\x12\x34" * 3))))[
        :2, 0, 0
    ].tolist() == [0x80, 255]


def planes() -> np.ndarray[Any, Any]:
    """Four smooth planes of 64x64 values, so that JPEG keeps them nearly as they are."""
    across, down = np.meshgrid(np.arange(64), np.arange(64))
    return np.stack([across * 2 + 40, down * 2 + 60, 200 - across, down + 20], axis=-1).astype(np.uint8)


def test_an_inverted_cmyk_jpeg_has_the_colours_of_its_inks() -> None:
    inks = planes()
    data = encoded(Image.fromarray(inks, "CMYK"), "JPEG", quality=100, subsampling=0)
    assert b"Adobe" in data  # Photoshop's convention: stored inverted
    expected = ((255.0 - inks[..., :3]) * (255.0 - inks[..., 3:]) / 255).mean(axis=(0, 1)).tolist()
    assert means(data) == pytest.approx(expected, abs=1.5)
    assert means(made.without_adobe(data)) == pytest.approx(expected, abs=1.5)


def test_a_ycck_jpeg_has_the_colours_of_its_inks() -> None:
    inks = planes()
    wanted = Image.fromarray(inks[..., :3]).convert("YCbCr")
    # Photoshop stores Y, Cb, Cr of the inks and inverted K; Pillow inverts what it writes as CMYK.
    stored = np.concatenate([255 - np.asarray(wanted), inks[..., 3:]], axis=-1)
    data = made.as_ycck(encoded(Image.fromarray(stored, "CMYK"), "JPEG", quality=100, subsampling=0))
    expected = ((255.0 - inks[..., :3]) * (255.0 - inks[..., 3:]) / 255).mean(axis=(0, 1)).tolist()
    assert means(data) == pytest.approx(expected, abs=2)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA"])
def test_a_tall_picture_is_blended_alike_in_every_band(mode: str) -> None:
    image = Image.new("RGBA", (64, 700), (0, 0, 0, 128)).convert("LA" if mode == "PA" else mode)
    if mode == "PA":
        image = Image.new("PA", (64, 700), (0, 128))
    assert np.unique(np.asarray(to_rgb(image))).tolist() == [127]


def test_of_a_picture_for_two_eyes_the_first_is_taken() -> None:
    data = encoded(Image.new("RGB", (WIDTH, HEIGHT), RED), "MPO", save_all=True, append_images=[a_gradient()] * 2)
    assert decode(data).getpixel((3, 3)) == (254, 0, 0)


def test_of_an_animated_png_the_picture_that_every_viewer_shows_is_taken() -> None:
    frames = [Image.new("RGB", (WIDTH, HEIGHT), color) for color in (GREEN, WHITE)]
    data = encoded(Image.new("RGB", (WIDTH, HEIGHT), RED), save_all=True, append_images=frames, default_image=True)
    assert decode(data).getpixel((0, 0)) == RED


@pytest.mark.parametrize("format", ["GIF", "WEBP"])
def test_around_a_first_frame_that_is_smaller_than_its_canvas_is_white(format: str) -> None:
    if format == "WEBP":
        data = made.webp_film(16, 20, made.webp_frame(Image.new("RGB", (4, 6), RED), 2, 8))
    else:
        gif = encoded(Image.new("P", (4, 6), 0), "GIF", palette=[*RED])
        place = gif.index(b",\0\0\0\0")
        screen, corner = struct.pack("<HH", 16, 20), struct.pack("<HH", 2, 8)
        data = gif[:6] + screen + gif[10 : place + 1] + corner + gif[place + 5 :]
    pixels = np.asarray(decode(data))
    expected = np.full((20, 16, 3), 255)
    expected[8:14, 2:6] = RED
    assert np.array_equal(pixels, expected)


def test_frames_that_are_not_shown_may_be_broken() -> None:
    first = made.webp_frame(a_gradient())
    data = made.webp_film(WIDTH, HEIGHT, first, made.riff(b"ANMF", bytes(40)))
    assert decode(data).tobytes() == a_gradient().tobytes()


@pytest.mark.parametrize(
    ("data", "detail"),
    [
        (made.webp_film(8, 8, made.webp_frame(Image.new("RGB", (16, 16)))), "reaches out of its canvas"),
        (
            made.webp_film(99, 99, made.webp_frame(Image.new("RGB", (16, 16)), size=(8, 8))),
            "another size than its frame",
        ),
        (made.webp(made.webp_head(8, 8), encoded(Image.new("RGB", (16, 16)), "WEBP")[12:]), "size than its canvas"),
        (made.webp_film(16, 16), "no picture"),
        (made.webp_film(16, 16, made.riff(b"ANMF", bytes(40))), "no picture in its first frame"),
        (b"GIF89a" + struct.pack("<HHBBB", 16, 16, 0, 0, 0) + b"!\xfe\2hi\0;", "no picture"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_frame_that_contradicts_its_canvas_is_refused(data: bytes, detail: str) -> None:
    with pytest.raises(ImageRefused, match=f"image_unreadable: .*{detail}"):
        decode(data)


@pytest.mark.parametrize("format", ["GIF", "WEBP"])
def test_a_large_canvas_around_a_small_frame_is_refused_by_its_size(format: str) -> None:
    data = made.webp_film(16_384, 16_384, made.webp_frame(a_gradient()))
    if format == "GIF":
        gif = encoded(a_gradient(), "GIF")
        data = gif[:6] + struct.pack("<HH", 60_000, 60_000) + gif[10:]
    assert reason_of(data) == "image_too_many_pixels"


# --------------------------------------------------------------------------------------------- time, memory, threads

CHILD = """
import sys, time
from pathlib import Path
from llava_pipeline.data.images import ImageRefused, decode

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024

def outcome(path):
    try:
        return "x".join(map(str, decode(path.read_bytes()).size))
    except ImageRefused as refused:
        return refused.reason

paths = [Path(name) for name in sys.argv[1:]]
outcome(paths[0])
for path in paths:
    data, before, start = path.read_bytes(), peak(), time.process_time()
    seen = outcome(path)
    print(path.name, seen, f"{time.process_time() - start:.3f} {peak() - before:.1f}", sep="\t")
"""


def hostile() -> dict[str, tuple[str, bytes]]:
    """Files that cost a usual reader seconds or hundreds of megabytes, with what becomes of them."""
    jpeg, png, gif = (encoded(Image.new("RGB", (64, 64), RED), format) for format in ("JPEG", "PNG", "GIF"))
    large = [Image.new("RGB", (1500, 1500), color) for color in (RED, GREEN, WHITE)]
    bomb = chunk(b"zTXt", b"key\0\0" + zlib.compress(bytes(1 << 28), 1))
    return {
        "plain": ("64x64", png),
        "1x20000": ("image_too_small", made.blank_png(1, 20_000)),
        "20000x1": ("image_too_small", made.blank_png(20_000, 1)),
        "8x20000": ("image_too_long", made.blank_png(8, 20_000)),
        "12000x12000": ("image_too_many_pixels", made.blank_png(12_000, 12_000, 0)),
        "20000x20000": ("image_too_many_pixels", a_png(20_000, 20_000)),
        "text bomb": ("64x64", with_chunks(png, bomb)),
        "pixels without end": ("16x16", a_png(16, 16)[:33] + endless()),
        "comments": ("64x64", made.gif_with(gif, b"!\xfe" + b"\2ab" * 2_000_000 + b"\0")),
        "segments": ("image_unreadable", with_segments(jpeg, segment(0xE5, b"") * 3_000_000)),
        "exif": ("64x64", with_segments(jpeg, *[segment(0xE1, b"Exif\0\0" + bytes(65_000))] * 300)),
        "scans": ("image_unreadable", made.of_many_scans(3000, 1000)),
        "runs": ("image_unreadable", made.bmp_of_runs(6300)),
        "canvas": ("6000x6000", made.webp_film(6000, 6000, made.webp_frame(Image.new("RGBA", (2, 2))))),
        "webp film": ("1500x1500", encoded(large[0], "WEBP", save_all=True, append_images=large[1:] * 3, method=0)),
        "gif film": ("1500x1500", encoded(large[0], "GIF", save_all=True, append_images=large[1:] * 2)),
    }


def endless() -> bytes:
    packer = zlib.compressobj(9)
    pixels = b"".join(packer.compress(bytes(1 << 22)) for _ in range(50)) + packer.flush()
    return chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def test_no_hostile_file_costs_a_second_or_200_megabytes(tmp_path: Path) -> None:
    files = hostile()
    for name, (_, data) in files.items():
        (tmp_path / name).write_bytes(data)
    command = [sys.executable, "-W", "always", "-c", CHILD, *(str(tmp_path / name) for name in files)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert done.stderr == ""
    outcomes = {}
    for line in done.stdout.splitlines():
        name, outcome, seconds_and_growth = line.split("\t")
        seconds, growth = map(float, seconds_and_growth.split())
        outcomes[name] = outcome
        assert seconds < 1, line
        assert growth < 200, line
    assert outcomes == {name: outcome for name, (outcome, _) in files.items()}


def test_threads_decode_side_by_side_to_the_same_pixels() -> None:
    alone = [decode(picture).tobytes() for picture in PICTURES]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda picture: decode(picture).tobytes(), PICTURES * 20))
    assert together == alone * 20


def test_a_sound_picture_is_what_pillow_makes_of_it() -> None:
    # Taking the file apart must not change a pixel: the same through Image.open and exif_transpose.
    for picture in PICTURES:
        with Image.open(io.BytesIO(picture)) as image:
            assert decode(picture).tobytes() == to_rgb(ImageOps.exif_transpose(image)).tobytes()


# --------------------------------------------------------------------------------------------- wild bytes


def told(data: bytes) -> Image.Image | None:
    """The picture, or None after a refusal for a listed reason; anything else that is raised fails the test."""
    refused = None
    try:
        with warnings.catch_warnings(action="error"):  # Pillow's are of what is not in the picture: none may be left
            image = decode(data)
    except ImageRefused as refusal:
        refused = refusal
    if refused is not None:
        assert refused.reason in REASONS
        assert "Warning" not in refused.detail
        return None
    assert image.mode == "RGB"
    return image


@settings(deadline=None)
@given(
    data=st.binary(max_size=200),
    start=st.sampled_from([b"", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"BM", b"\xff\xd8\xff\xe0", b"RIFF"]),
)
def test_any_bytes_are_a_picture_or_refused_by_name(data: bytes, start: bytes) -> None:
    told(start + data)


def some_pictures() -> list[bytes]:
    palette = a_gradient().quantize(8)
    grey = Image.fromarray(np.arange(WIDTH * HEIGHT, dtype=np.uint16).reshape(HEIGHT, WIDTH) * 150)
    exif = Image.Exif()
    exif[0x0112] = 6
    return [
        *(
            encoded(a_gradient(), format, **({"exif": exif} if format in ("JPEG", "PNG", "WEBP") else {}))
            for format in FORMATS
        ),
        encoded(palette, "PNG", transparency=b"\x00\x80\xff"),
        encoded(a_gradient(), "JPEG", progressive=True),
        encoded(a_gradient().convert("RGBA")),
        encoded(a_gradient(), transparency=RED),
        encoded(grey),
        encoded(a_gradient(), "WEBP", lossless=True, save_all=True, append_images=[a_gradient()]),
        encoded(a_gradient().convert("RGBA"), "WEBP", quality=60),
        encoded(a_gradient(), "MPO", save_all=True, append_images=[a_gradient()]),
        encoded(a_gradient().convert("CMYK"), "JPEG"),
        encoded(a_gradient(), "GIF", save_all=True, append_images=[Image.new("RGB", (WIDTH, HEIGHT))]),
    ]


PICTURES = some_pictures()


@settings(deadline=None, max_examples=400)
@given(picture=st.sampled_from(PICTURES), changes=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=6))
def test_a_damaged_picture_is_a_picture_or_refused_by_name(picture: bytes, changes: list[tuple[float, int]]) -> None:
    data = bytearray(picture)
    for place, value in changes:
        data[int(place * (len(data) - 1))] = value
    told(bytes(data))


@settings(deadline=None)
@given(picture=st.sampled_from(PICTURES), share=st.floats(0, 1))
@example(picture=PICTURES[0], share=0.999)
def test_a_picture_cut_anywhere_is_the_whole_picture_or_refused(picture: bytes, share: float) -> None:
    cut = told(picture[: int(share * len(picture))])
    assert cut is None or cut.tobytes() == decode(picture).tobytes()


# --------------------------------------------------------------------------------------------- letterbox


@settings(deadline=None)
@given(width=st.integers(1, 40), height=st.integers(1, 40))
def test_a_letterboxed_picture_is_whole_and_centred_on_the_fill(width: int, height: int) -> None:
    pixels = np.arange(width * height * 3).reshape(height, width, 3).astype(np.uint8) % 200
    square = np.asarray(letterbox(Image.fromarray(pixels), (201, 202, 203)))
    side = max(width, height)
    left, top = (side - width) // 2, (side - height) // 2
    assert square.shape == (side, side, 3)
    assert np.array_equal(square[top : top + height, left : left + width], pixels)
    around = np.ones((side, side), dtype=bool)
    around[top : top + height, left : left + width] = False
    assert (square[around] == (201, 202, 203)).all()


def test_a_square_is_left_as_it_is() -> None:
    image = Image.new("RGB", (9, 9))
    assert letterbox(image, RED) is image
