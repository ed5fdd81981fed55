"""The image gate: from untrusted bytes to an upright RGB picture, or a named refusal; then letterboxed to a square.

Limits are checked before anything is decoded: a 157-byte PNG of 1x20000 pixels costs the usual processor 10 GB.
"""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, ImageOps

MAX_BYTES = 20 * 1024 * 1024
MAX_PIXELS = 40_000_000
MAX_ASPECT = 20
MIN_SIDE = 8
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")


class ImageRefused(Exception):
    """An image that is not accepted. ``reason`` is a name people can search for."""

    def __init__(self, reason: str, detail: str):
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


def decode(data: bytes) -> Image.Image:
    """Bytes of a picture to an upright RGB image: first frame, alpha on white, 16 bits scaled to 8.

    Raises:
        ImageRefused: ``image_too_many_bytes``, ``image_unreadable``, ``image_too_many_pixels``, ``image_too_long`` or
            ``image_too_small``.
    """
    if len(data) > MAX_BYTES:
        raise ImageRefused("image_too_many_bytes", f"{len(data)} bytes, at most {MAX_BYTES}")
    try:
        image: Image.Image = Image.open(io.BytesIO(data), formats=FORMATS)
        check_size(*image.size)
        image.load()
        return to_rgb(ImageOps.exif_transpose(image))
    except ImageRefused:
        raise
    except Image.DecompressionBombError as error:
        raise ImageRefused("image_too_many_pixels", f"at most {MAX_PIXELS} pixels") from error
    except Exception as error:  # Pillow's decoders raise whatever they stumble over in damaged bytes
        raise ImageRefused("image_unreadable", type(error).__name__) from error


def check_size(width: int, height: int) -> None:
    """Refuse what would be costly or empty, by its header alone."""
    if width * height > MAX_PIXELS:
        raise ImageRefused("image_too_many_pixels", f"{width}x{height}, at most {MAX_PIXELS} pixels")
    if min(width, height) < MIN_SIDE:
        raise ImageRefused("image_too_small", f"{width}x{height}, at least {MIN_SIDE} on a side")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise ImageRefused("image_too_long", f"{width}x{height}, at most {MAX_ASPECT}:1")


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode to RGB without the surprises: Pillow clips 16-bit greys to white and shows hidden colours of alpha."""
    if image.mode.startswith("I"):
        grey = np.asarray(image).astype(np.float64)
        top = 255.0 if image.mode == "I" and grey.max() <= 255 else 65535.0  # "I" alone does not tell how deep it is
        return Image.fromarray((grey / top * 255).clip(0, 255).round().astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        grey = np.nan_to_num(np.asarray(image, dtype=np.float64))
        top = 1.0 if grey.max() <= 1 else 255.0
        return Image.fromarray((grey / top * 255).clip(0, 255).round().astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def letterbox(image: Image.Image, fill: tuple[int, int, int]) -> Image.Image:
    """The image centred on the smallest square that holds it; nothing is cropped, nothing is stretched."""
    side = max(image.size)
    if image.size == (side, side):
        return image
    square = Image.new("RGB", (side, side), fill)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square
