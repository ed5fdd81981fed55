"""The image gate: from untrusted bytes to an upright RGB picture, or a named refusal; then letterboxed to a square.

Limits are checked before anything is decoded: a 157-byte PNG of 1x20000 pixels costs the usual processor 10 GB. What
costs time or memory beside the pixels (profiles, texts, further frames) never reaches a decoder: see ``stills``.
A picture of 640x480 takes about 3 MB, the largest that is allowed about 330 MB (a WebP 640 MB: 16 bytes a pixel).
"""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image, ImageFile
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from llava_pipeline.data.stills import FORMATS as FORMATS
from llava_pipeline.data.stills import NoStill, Still, first_still

MAX_BYTES = 20 * 1024 * 1024
MAX_PIXELS = 40_000_000
MAX_SQUARE = 4 * MAX_PIXELS  # of the square that a long picture is put on: 480 MB
MAX_ASPECT = 20
MIN_SIDE = 8
BAND = 256  # rows that are blended at a time, so that a large picture is not held four times over
READERS: dict[str, Callable[[io.BytesIO], ImageFile.ImageFile]] = {
    "JPEG": JpegImageFile, "PNG": PngImageFile, "WEBP": WebPImageFile, "GIF": GifImageFile, "BMP": BmpImageFile,
}  # fmt: skip
"""Pillow's readers themselves: ``Image.open`` would warn of sizes and of broken MPO indexes that do not matter here."""
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What sets a picture upright, by the orientation that EXIF notes."""
_UPPER_BYTE = np.rint(np.arange(65536) / 257).astype(np.uint8)


class ImageRefused(Exception):
    """An image that is not accepted. ``reason`` is a name people can search for."""

    def __init__(self, reason: str, detail: str):
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


def decode(data: bytes) -> Image.Image:
    """Bytes of a picture to an upright RGB image: first frame, alpha on white, 16 bits scaled to 8.

    Bytes decide alone, not a warning filter or Pillow's LOAD_TRUNCATED_IMAGES. Threads may decode side by side.

    Raises:
        ImageRefused: ``image_too_many_bytes``, ``image_unreadable``, ``image_too_many_pixels``, ``image_too_long`` or
            ``image_too_small``. Nothing else, whatever the bytes are.
    """
    if len(data) > MAX_BYTES:
        raise ImageRefused("image_too_many_bytes", f"{len(data)} bytes, at most {MAX_BYTES}")
    try:
        still = first_still(data)
    except NoStill as error:
        raise ImageRefused("image_unreadable", str(error)) from error
    try:
        return _decoded(still)
    except ImageRefused:
        raise
    except Exception as error:  # Pillow's decoders raise whatever they stumble over in damaged bytes
        detail = f"{still.format} that is damaged or cut short ({type(error).__name__})"
        raise ImageRefused("image_unreadable", detail) from error


def _decoded(still: Still) -> Image.Image:
    if still.canvas is not None:
        check_size(*still.canvas)
    # A program that sets this for its own pictures would have us train on halves of them.
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    image = READERS[still.format](io.BytesIO(still.data))
    if still.canvas is None:
        check_size(*image.size)
    image.load()
    shown = to_rgb(image)
    if still.canvas not in (None, shown.size):
        frame, shown = shown, Image.new("RGB", still.canvas, "white")
        shown.paste(frame, still.corner)
    turn = UPRIGHT.get(still.orientation)
    return shown if turn is None else shown.transpose(turn)


def check_size(width: int, height: int) -> None:
    """Refuse what would be costly or empty, by its header alone."""
    if width * height > MAX_PIXELS:
        raise ImageRefused("image_too_many_pixels", f"{width}x{height}, at most {MAX_PIXELS} pixels")
    if min(width, height) < MIN_SIDE:
        raise ImageRefused("image_too_small", f"{width}x{height}, at least {MIN_SIDE} on a side")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise ImageRefused("image_too_long", f"{width}x{height}, at most {MAX_ASPECT}:1")
    if max(width, height) ** 2 > MAX_SQUARE:
        raise ImageRefused(
            "image_too_many_pixels", f"{width}x{height}, at most {MAX_SQUARE} pixels once it is a square"
        )


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode to RGB without the surprises: Pillow clips 16-bit greys to white and shows hidden colours of alpha."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image if not isinstance(image, WebPImageFile) else image.copy()  # which keeps two canvases alive
    if image.mode.startswith("I;16"):
        return _grey_16(np.asarray(image), image.info.get("transparency"))
    if image.mode == "I":
        grey = np.asarray(image)
        top = 255.0 if grey.max() <= 255 else 65535.0  # the mode alone does not tell how deep it is
        return _grey(grey.astype(np.float64) / top)
    if image.mode == "F":
        shade = np.nan_to_num(np.asarray(image, dtype=np.float64))
        return _grey(shade / (1.0 if shade.max() <= 1 else 255.0))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        return _on_white(image)
    return image.convert("RGB")


def _grey_16(grey: np.ndarray[Any, np.dtype[np.uint16]], transparent: int | None) -> Image.Image:
    shown = _UPPER_BYTE[grey]
    if transparent is not None:
        shown[grey == transparent] = 255
    return Image.fromarray(shown).convert("RGB")


def _grey(shade: np.ndarray[Any, np.dtype[np.float64]]) -> Image.Image:
    return Image.fromarray((shade * 255).clip(0, 255).round().astype(np.uint8)).convert("RGB")


def _on_white(image: Image.Image) -> Image.Image:
    shown = Image.new("RGB", image.size, "white")
    for top in range(0, image.height, BAND):
        band = image.crop((0, top, image.width, min(top + BAND, image.height))).convert("RGBA")
        shown.paste(band, (0, top), band)
    return shown


def letterbox(image: Image.Image, fill: tuple[int, int, int]) -> Image.Image:
    """The image centred on the smallest square that holds it; nothing is cropped, nothing is stretched."""
    side = max(image.size)
    if image.size == (side, side):
        return image
    square = Image.new("RGB", (side, side), fill)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square
