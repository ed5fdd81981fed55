"""The image gate: untrusted bytes become an upright RGB picture or a named refusal."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from llava_pipeline.data.checks import REASONS
from llava_pipeline.data.images import FORMATS, MAX_ASPECT, MAX_BYTES, MIN_SIDE, ImageRefused, decode, letterbox, to_rgb
from tests.data.rows import a_picture, a_png, chunk

WIDTH, HEIGHT = 24, 16
RED, GREEN, WHITE = (255, 0, 0), (0, 128, 0), (255, 255, 255)


def encoded(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


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


# --------------------------------------------------------------------------------------------- upright, on white

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
@pytest.mark.parametrize("format", ["PNG", "JPEG"])
def test_a_picture_stands_upright_however_the_camera_was_held(orientation: int, format: str) -> None:
    upright = np.asarray(a_gradient())
    stored = Image.fromarray(np.ascontiguousarray(TURNED[orientation](upright)))
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = decode(
        encoded(stored, format, exif=exif, **({"quality": 100, "subsampling": 0} if format == "JPEG" else {}))
    )
    assert image.size == (WIDTH, HEIGHT)
    assert np.abs(np.asarray(image).astype(int) - upright).max() <= (8 if format == "JPEG" else 0)


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_an_orientation_that_does_not_exist_is_ignored(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert decode(encoded(a_gradient(), exif=exif)).tobytes() == a_gradient().tobytes()


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
        {"kind": 2, "after": chunk(b"iCCP", b"no profile\0")},
    ],
)
def test_side_information_that_makes_no_sense_is_refused_by_name(chunks: dict[str, Any]) -> None:
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


# --------------------------------------------------------------------------------------------- wild bytes


QUIETLY = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::PIL.Image.DecompressionBombWarning")


def told(data: bytes) -> Image.Image | None:
    """The picture, or None after a refusal for a listed reason; anything else that is raised fails the test."""
    reason = None
    try:
        image = decode(data)
    except ImageRefused as refusal:
        reason = refusal.reason
    if reason is not None:
        assert reason in REASONS
        return None
    assert image.mode == "RGB"
    return image


@QUIETLY
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
    ]


PICTURES = some_pictures()


@QUIETLY
@settings(deadline=None, max_examples=400)
@given(picture=st.sampled_from(PICTURES), changes=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=6))
def test_a_damaged_picture_is_a_picture_or_refused_by_name(picture: bytes, changes: list[tuple[float, int]]) -> None:
    data = bytearray(picture)
    for place, value in changes:
        data[int(place * (len(data) - 1))] = value
    told(bytes(data))


@QUIETLY
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
