"""One picture that a person names: a file, or an address on the web."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from llava_pipeline.data.images import MAX_BYTES, ImageRefused, decode
from llava_pipeline.errors import PictureRefused

TIMEOUT_SECONDS = 20


def load_picture(where: str) -> Image.Image:
    """The picture at a path or an ``http(s)://`` address, upright RGB, through the same gate as training's pictures.

    Raises:
        PictureRefused: it cannot be read, or the gate does not accept it.
    """
    data = _download(where) if where.startswith(("http://", "https://")) else _read(Path(where))
    try:
        return decode(data)
    except ImageRefused as error:
        raise PictureRefused(
            f"{where} is not accepted ({error}); give a PNG, JPEG, WebP, GIF or BMP picture"
        ) from error


def _read(path: Path) -> bytes:
    try:
        with path.expanduser().open("rb") as file:
            return file.read(MAX_BYTES + 1)
    except OSError as error:
        raise PictureRefused(f"cannot read {path} ({error.strerror}); check the path") from error


def _download(address: str) -> bytes:
    import requests

    data = bytearray()
    try:
        with requests.get(address, stream=True, timeout=TIMEOUT_SECONDS) as response:
            response.raise_for_status()
            for chunk in response.iter_content(1 << 16):
                data += chunk
                if len(data) > MAX_BYTES:
                    break
    except requests.RequestException as error:
        raise PictureRefused(f"cannot fetch {address} ({type(error).__name__}); give a file, or connect") from error
    return bytes(data)
