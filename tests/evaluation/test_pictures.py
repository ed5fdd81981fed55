"""What people look at can be looked at."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from llava_pipeline.evaluation.pictures import Shown, save_grid, save_loss_curve


def looked_at(path: Path) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    with Image.open(path) as image:
        assert image.format == "PNG"
        image.load()
        return np.asarray(image.convert("RGB"))


def cell(number: int, right: bool = True, question: str = "What color is it?", answer: str = "red") -> Shown:
    picture = Image.new("RGB", (40, 20 + number), (number * 19 % 256, 80, 200))
    return Shown(picture, question, answer, "blue", right)


@pytest.mark.parametrize(("count", "columns", "rows"), [(0, 1, 1), (1, 1, 1), (6, 6, 1), (13, 6, 3)])
def test_a_grid_has_six_pictures_a_row(tmp_path: Path, count: int, columns: int, rows: int) -> None:
    save_grid([cell(k) for k in range(count)], "12 of 13 right", tmp_path / "grid.png")
    pixels = looked_at(tmp_path / "grid.png")
    assert pixels.std() > 0
    cell_height, cell_width = pixels.shape[0] / rows, pixels.shape[1] / columns
    assert 1.2 < cell_height / cell_width < 1.3
    blues = [(pixels == np.array([k * 19 % 256, 80, 200])).all(-1).any() for k in range(count)]
    assert all(blues)


def test_right_is_green_and_wrong_is_red(tmp_path: Path) -> None:
    def has(pixels: np.ndarray[tuple[int, ...], np.dtype[np.uint8]], colour: tuple[int, int, int]) -> bool:
        return bool((pixels == np.array(colour)).all(-1).any())

    for right in (True, False):
        save_grid([cell(0, right)], "", tmp_path / "grid.png")
        pixels = looked_at(tmp_path / "grid.png")
        assert has(pixels, (0x1A, 0x7F, 0x37)) == right
        assert has(pixels, (0xC6, 0x28, 0x28)) != right


@pytest.mark.parametrize(
    "text",
    ["", "costs $5 or $6", r"$\frac$", r"$\nothing{$", "{% raw %}", "\u00e9t\u00e9", "a\nb", "long " * 90, "x" * 300],
)
def test_any_text_is_drawn(tmp_path: Path, text: str) -> None:
    cells = [cell(0, question=text), cell(1, right=False, answer=text)]
    save_grid(cells, text[:40], tmp_path / "grid.png")
    assert looked_at(tmp_path / "grid.png").std() > 0


@pytest.mark.parametrize("count", [0, 1, 13, 400])
def test_a_loss_curve_is_drawn(tmp_path: Path, count: int) -> None:
    save_loss_curve([3 / (k + 1) for k in range(count)], tmp_path / "loss.png")
    assert looked_at(tmp_path / "loss.png").std() > 0


@pytest.mark.parametrize("losses", [[1.0, math.nan, 0.5], [math.nan], [math.inf, 1.0], [-0.0, 0.0]])
def test_a_loss_curve_of_odd_numbers_is_drawn(tmp_path: Path, losses: list[float]) -> None:
    save_loss_curve(losses, tmp_path / "loss.png")
    assert looked_at(tmp_path / "loss.png").std() > 0


def test_the_loss_is_in_the_curve(tmp_path: Path) -> None:
    drawn = []
    for losses in ([2.0, 1.0, 0.5], [2.0, 1.0, 1.5]):
        save_loss_curve(losses, tmp_path / "loss.png")
        drawn.append(looked_at(tmp_path / "loss.png"))
    assert (drawn[0] != drawn[1]).any()
