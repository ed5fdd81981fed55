"""What a picture is known by: the digest of its pixels, and a perceptual hash that survives re-encoding.

The perceptual hash is the DCT one (Zauner 2010, "pHash"): which of the 64 lowest frequencies of a small grey copy lie
above their median. Two things are added. A frequency counts only if it is more than noise: most of a gradient's are
zero, and JPEG would decide on which side of the median they fall. And alone the hash takes flat drawings for each
other, because it sees neither colours nor small shapes; so two pictures are near duplicates only where small colour
copies of them agree as well. Whole numbers throughout: the same pixels have the same fingerprint on every machine.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

SIDE = 32
CELLS = 8
NEAR_CELL = 20  # no cell's mean colour may differ by more, of 255: re-encoding moves it by less, another shape by more
NEAR_MEAN = 3  # nor may they differ by more on average: another background does, re-encoding does not
BLOCK = 1 << 15  # pictures compared at a time, so that working memory does not grow with what is known
_DCT = np.rint(1024 * np.cos(np.pi * np.outer(np.arange(8), np.arange(SIDE) + 0.5) / SIDE)).astype(np.int64)
_LUMA = np.array([299, 587, 114], dtype=np.int64)
_NOISE = 1000 * 1024**2 * SIDE**2 // 4  # what a wave of one grey level adds to its frequency
_MIRROR = np.array([[1] * 8, [1, -1] * 4], dtype=np.int64)[:, None]  # odd horizontal frequencies change their sign
Bytes = np.ndarray[Any, np.dtype[np.uint8]]
Hashes = np.ndarray[Any, np.dtype[np.uint64]]
Whole = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """``pixels`` is the sha256 of size and RGB values. ``perceptual``, and ``mirrored`` of its mirror image: 64 bits.

    ``cells`` is the mean colour of each of 8 x 8 cells: (8, 8, 3) uint8, as bytes.
    """

    pixels: bytes
    perceptual: int
    mirrored: int
    cells: bytes
    width: int
    height: int


def fingerprint(image: Image.Image) -> Fingerprint:
    """The fingerprint of an RGB picture."""
    pixels = hashlib.sha256(f"{image.width}x{image.height}\n".encode())
    pixels.update(image.tobytes())
    # Not ``reduce`` and then ``resize``: it shifts a copy whose width does not divide, and mirrored the other way.
    small = image.resize((SIDE, SIDE), Image.Resampling.BILINEAR, reducing_gap=2)
    frequencies = _DCT @ (np.asarray(small, dtype=np.int64) @ _LUMA) @ _DCT.T
    perceptual, mirrored = _bits((frequencies * _MIRROR).reshape(2, CELLS**2))
    return Fingerprint(
        pixels=pixels.digest(), perceptual=perceptual, mirrored=mirrored, cells=small.reduce(SIDE // CELLS).tobytes(),
        width=image.width, height=image.height,
    )  # fmt: skip


def _bits(frequencies: Whole) -> list[int]:
    """Of each row of 64, one bit per frequency: whether it lies above the median and above noise."""
    median = np.partition(frequencies, 31)[:, 31:32]
    above = np.packbits(frequencies > np.maximum(median, _NOISE), axis=1)
    return [int.from_bytes(row.tobytes(), "big") for row in above]


class SeenPictures:
    """The pictures seen so far, by the digest of their pixels and by looks: 155 and 200 bytes each."""

    def __init__(self) -> None:
        self.numbers: dict[bytes, int] = {}
        self._blocks: list[tuple[Hashes, Bytes]] = []

    def __len__(self) -> int:
        return len(self.numbers)

    def add(self, seen: Fingerprint) -> int:
        """Remember a picture that is not among ``numbers``; its number, counted from 0."""
        number = len(self.numbers)
        block, place = divmod(number, BLOCK)
        if place == 0:  # blocks are added, never copied
            self._blocks.append((np.empty(BLOCK, dtype=np.uint64), np.empty((BLOCK, CELLS, CELLS, 3), dtype=np.uint8)))
        hashes, cells = self._blocks[block]
        hashes[place] = seen.perceptual
        cells[place] = _cells(seen)
        self.numbers[seen.pixels] = number
        return number

    def near(self, seen: Fingerprint, distance: int) -> int | None:
        """Number of the first picture that looks like this one or like its mirror image; None where none does.

        Their hashes differ in at most ``distance`` of 64 bits.
        """
        cells = _cells(seen).astype(np.int16)
        faces = ((np.uint64(seen.perceptual), cells), (np.uint64(seen.mirrored), cells[:, ::-1]))
        for block, (hashes, looks) in enumerate(self._blocks):
            known = hashes[: len(self) - block * BLOCK]
            found: list[int] = []
            for bits, face in faces:
                likely = np.flatnonzero(np.bitwise_count(known ^ bits) <= distance)
                found += likely[_alike(looks[likely], face)][:1].tolist()
            if found:
                return block * BLOCK + min(found)
        return None


def _cells(seen: Fingerprint) -> Bytes:
    return np.frombuffer(seen.cells, dtype=np.uint8).reshape(CELLS, CELLS, 3)


def _alike(looks: Bytes, face: np.ndarray[Any, np.dtype[np.int16]]) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Which of N small copies (N, 8, 8, 3) agree with one (8, 8, 3), in every cell and on the whole."""
    apart = np.abs(looks - face).reshape(-1, face.size)
    alike: np.ndarray[Any, np.dtype[np.bool_]] = (apart.max(axis=1) <= NEAR_CELL) & (
        apart.sum(axis=1) <= NEAR_MEAN * face.size
    )
    return alike
