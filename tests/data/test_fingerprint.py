"""Fingerprints: the same pixels have the same, copies are found by their looks, other pictures are not."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import sklearn
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from llava_pipeline.data import scenes
from llava_pipeline.data.fingerprint import BLOCK, CELLS, Fingerprint, SeenPictures, fingerprint
from llava_pipeline.data.images import decode
from tests.data.pictures_made import encoded, noise

NEAR = 4
PHOTOGRAPHS = (
    Path(sklearn.__file__).parent / "datasets/images/china.jpg",
    Path(sklearn.__file__).parent / "datasets/images/flower.jpg",
    Path(matplotlib.__file__).parent / "mpl-data/sample_data/grace_hopper.jpg",
)
Change = Callable[[Image.Image], Image.Image]


# --------------------------------------------------------------------------------------------- pictures to copy


def sections(number: int) -> list[Image.Image]:
    """Parts of real photographs, of many sizes and shapes."""
    rng = np.random.default_rng(0)
    whole, parts = [Image.open(path).convert("RGB") for path in PHOTOGRAPHS], []
    for k in range(number):
        image = whole[k % len(whole)]
        width, height = (int(rng.integers(120, 300)) for side in image.size)
        left, top = int(rng.integers(0, image.width - width)), int(rng.integers(0, image.height - height))
        parts.append(image.crop((left, top, left + width, top + height)))
    return parts


def clouds(number: int) -> list[Image.Image]:
    """Noise blurred at several scales: the spectrum of a photograph."""
    rng, pictures = np.random.default_rng(1), []
    for _ in range(number):
        size = (int(rng.integers(150, 400)), int(rng.integers(150, 400)))
        total = np.zeros((size[1], size[0], 3))
        for grains in (2, 4, 8, 16, 64):
            grain = Image.fromarray(rng.integers(0, 256, (grains, grains, 3), dtype=np.uint8))
            total += np.asarray(grain.resize(size, Image.Resampling.BICUBIC)) / grains**0.5
        pictures.append(Image.fromarray(((total - total.min()) / np.ptp(total) * 255).astype(np.uint8)))
    return pictures


def gradients(number: int) -> list[Image.Image]:
    """Four corners' colours, and between them."""
    rng = np.random.default_rng(2)
    return [
        Image.fromarray(rng.integers(0, 256, (2, 2, 3), dtype=np.uint8)).resize(
            (int(rng.integers(100, 400)), int(rng.integers(100, 400))), Image.Resampling.BILINEAR
        )
        for _ in range(number)
    ]


def drawings(number: int) -> list[Image.Image]:
    return [scenes.draw(scenes.scene_at(7, "train", index)[0]) for index in range(number)]


@cache
def originals(kind: str) -> list[tuple[Image.Image, Fingerprint]]:
    made = {"photographs": sections, "clouds": clouds, "gradients": gradients, "scenes": drawings}[kind](30)
    return [(image, fingerprint(image)) for image in made]


def again(format: str, quality: int, image: Image.Image) -> Image.Image:
    """Encoded and decoded."""
    return decode(encoded(image, format, quality=quality))


def scaled(factor: float, image: Image.Image, how: Image.Resampling = Image.Resampling.BICUBIC) -> Image.Image:
    return image.resize((round(image.width * factor), round(image.height * factor)), how)


def mirrored(image: Image.Image) -> Image.Image:
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)


COPIES: dict[str, Change] = {
    **{f"jpeg {quality}": partial(again, "JPEG", quality) for quality in (95, 85, 75, 60, 40)},
    **{f"webp {quality}": partial(again, "WEBP", quality) for quality in (80, 40)},
    **{f"x {factor}": partial(scaled, factor) for factor in (0.5, 0.75, 1.37, 2, 3)},
    "x 0.5, sharp": partial(scaled, 0.5, how=Image.Resampling.LANCZOS),
    "x 3, blocks": partial(scaled, 3, how=Image.Resampling.NEAREST),
    "mirrored": mirrored,
    "mirrored, jpeg 60": lambda image: again("JPEG", 60, mirrored(image)),
    "mirrored, x 0.5, jpeg 75": lambda image: again("JPEG", 75, scaled(0.5, mirrored(image))),
    "x 3, jpeg 40": lambda image: again("JPEG", 40, scaled(3, image)),
}


@pytest.mark.parametrize("kind", ["photographs", "clouds", "gradients", "scenes"])
@pytest.mark.parametrize("copy", COPIES)
def test_a_copy_is_found(kind: str, copy: str) -> None:
    found = 0
    for image, known in originals(kind):
        seen = SeenPictures()
        seen.add(known)
        found += seen.near(fingerprint(COPIES[copy](image)), NEAR) == 0
    assert found >= 0.99 * len(originals(kind))


@pytest.mark.parametrize("kind", ["photographs", "clouds", "gradients"])
def test_other_pictures_are_not_taken_for_copies(kind: str) -> None:
    many = {"photographs": 3, "clouds": 150, "gradients": 150}[kind]
    made = [Image.open(path).convert("RGB") for path in PHOTOGRAPHS] if kind == "photographs" else None
    seen = SeenPictures()
    for image in made or {"clouds": clouds, "gradients": gradients}[kind](many):
        known = fingerprint(image)
        assert seen.near(known, NEAR) is None
        seen.add(known)
    assert len(seen) == many


def test_flat_drawings_are_near_only_where_they_look_alike() -> None:
    # The nearest pairs of 1,500 scenes: shapes of one colour at one place, or mirrored, on much the same ground.
    seen, pairs = SeenPictures(), []
    for index, image in enumerate(drawings(1500)):
        known = fingerprint(image)
        if (number := seen.near(known, NEAR)) is not None:
            pairs.append((number, index))
        seen.add(known)
    assert len(pairs) <= 3
    for pair in pairs:
        first, second = (scenes.scene_at(7, "train", index)[0] for index in pair)
        assert [shape.color for shape in first.shapes] == [shape.color for shape in second.shapes]
        grounds = np.array([first.background, second.background], dtype=int)
        assert np.abs(grounds[0] - grounds[1]).max() <= 8


def test_the_same_drawing_on_another_ground_is_another_picture() -> None:
    pictures = [Image.new("RGB", (128, 128), ground) for ground in ((250, 240, 230), (250, 240, 230), (240, 240, 245))]
    for picture in pictures:
        picture.paste((230, 25, 25), (20, 20, 60, 60))
    same, again_same, other = map(fingerprint, pictures)
    seen = SeenPictures()
    seen.add(same)
    assert seen.near(again_same, 0) == 0
    assert seen.near(other, 64) is None


@pytest.mark.parametrize("size", [(8, 8), (8, 160), (160, 8), (33, 31), (65, 127), (701, 203)])
def test_a_mirror_image_has_the_hashes_of_its_original_the_other_way_round(size: tuple[int, int]) -> None:
    image = noise(17, 17).resize(size, Image.Resampling.BICUBIC)
    one, other = fingerprint(image), fingerprint(mirrored(image))
    assert (one.perceptual ^ other.mirrored).bit_count() <= 1
    assert (one.mirrored ^ other.perceptual).bit_count() <= 1
    cells, back = (np.frombuffer(known.cells, np.uint8).reshape(CELLS, CELLS, 3).astype(int) for known in (one, other))
    assert np.abs(cells - back[:, ::-1]).max() <= 1


# --------------------------------------------------------------------------------------------- exactly the same


@pytest.mark.parametrize(("format", "options"), [("PNG", {}), ("BMP", {}), ("WEBP", {"lossless": True})])
def test_the_same_pixels_have_the_same_fingerprint_whatever_holds_them(format: str, options: dict[str, bool]) -> None:
    image = noise(97, 41)
    assert fingerprint(decode(encoded(image, format, **options))) == fingerprint(image)


def test_one_level_of_one_pixel_makes_another_picture() -> None:
    image, other = noise(), noise()
    red, green, blue = np.asarray(image)[3, 3].tolist()
    other.putpixel((3, 3), (red ^ 1, green, blue))
    assert fingerprint(image).pixels != fingerprint(other).pixels


def test_the_same_bytes_in_another_shape_are_another_picture() -> None:
    image = noise(32, 16)
    assert fingerprint(image).pixels != fingerprint(Image.frombytes("RGB", (16, 32), image.tobytes())).pixels


def test_the_fingerprint_is_the_same_on_every_machine() -> None:
    # Golden: snapshots that were made elsewhere hold these. A change here is a new version of every snapshot's digest.
    down, across = np.mgrid[:75, :123]
    pixels = np.stack([across * 2, down * 3, (across * down) % 256], axis=-1).astype(np.uint8)
    known = fingerprint(Image.fromarray(pixels))
    assert known.pixels.hex() == "1f5cdb6ce5823488b47b5239c17ae77dce87e564f0d3204fabcd0329e3761a28"
    assert (f"{known.perceptual:016x}", f"{known.mirrored:016x}") == ("8000000000000000", "d500000000000000")
    assert known.cells[:12].hex() == "0f0d1f2d0d5e4c0d686b0d70"
    assert (known.width, known.height, len(known.cells)) == (123, 75, CELLS * CELLS * 3)


# --------------------------------------------------------------------------------------------- what was seen


def a_fingerprint(number: int, perceptual: int, cells: bytes = bytes(192), mirror: int = 0) -> Fingerprint:
    return Fingerprint(number.to_bytes(32, "big"), perceptual, mirror, cells, 9, 9)


def test_the_first_of_several_look_alikes_is_named() -> None:
    seen = SeenPictures()
    for number, bits in enumerate((0xFF00, 0b111, 0b1, 0b0)):
        assert seen.add(a_fingerprint(number, bits)) == number
    assert seen.near(a_fingerprint(9, 0, mirror=0xFF00), 2) == 0  # by its mirror image
    assert seen.near(a_fingerprint(9, 0, mirror=0xAAAA), 2) == 2
    assert seen.near(a_fingerprint(9, 0, mirror=0xAAAA), 3) == 1
    assert seen.near(a_fingerprint(9, 0xF0F0F0, mirror=0xF0F0F0), 2) is None
    assert SeenPictures().near(a_fingerprint(9, 0), 64) is None


@settings(deadline=None, max_examples=30)
@given(
    bits=st.lists(st.integers(0, 2**64 - 1) | st.sampled_from([0, 2**63, 2**64 - 1]), max_size=20),
    wanted=st.integers(0, 2**64 - 1),
    distance=st.integers(0, 64),
)
def test_near_is_the_first_within_the_distance(bits: list[int], wanted: int, distance: int) -> None:
    seen = SeenPictures()
    for number, each in enumerate(bits):
        seen.add(a_fingerprint(number, each))
    expected = next((n for n, each in enumerate(bits) if (each ^ wanted).bit_count() <= distance), None)
    assert seen.near(a_fingerprint(99, wanted, mirror=wanted), distance) == expected


def test_what_is_known_grows_by_blocks_and_comparing_takes_no_more_memory() -> None:
    seen = SeenPictures()
    different = bytes([255]) * 192
    for number in range(BLOCK + 3):
        seen.add(a_fingerprint(number, 0, different if number < BLOCK + 2 else bytes(192)))
    assert len(seen) == BLOCK + 3
    tracemalloc.start()  # every hash agrees: the worst case, all small copies are compared
    assert seen.near(a_fingerprint(0, 0), NEAR) == BLOCK + 2
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < BLOCK * 192 * 6  # of one block, not of two
