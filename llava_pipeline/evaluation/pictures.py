"""What people look at: a grid of held-out pictures with question, answer and truth, and the loss curve."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

BAR_COLORS = ("#1f4e8c", "#b0c4de", "#d9a441", "#9e9e9e")


@dataclass(frozen=True, slots=True)
class Shown:
    """One cell of the grid."""

    picture: Image.Image
    question: str
    answer: str
    truth: str
    right: bool


def save_grid(cells: Sequence[Shown], title: str, path: Path) -> None:
    """A PNG with six pictures a row; a right answer is green, a wrong one red with the truth beside it.

    What people and models write is drawn as it is: a dollar sign starts no formula.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = min(6, max(1, len(cells)))
    rows = max(1, -(-len(cells) // columns))
    figure, axes = pyplot.subplots(rows, columns, figsize=(2.3 * columns, 2.9 * rows), squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for axis, cell in zip(axes.flat, cells, strict=False):
        axis.imshow(cell.picture)
        told = cell.answer or "(nothing)"
        text = told if cell.right else f"{told}  (truth: {cell.truth})"
        axis.set_title(_wrap(cell.question), fontsize=8, pad=4, parse_math=False)
        axis.text(
            *(0.5, -0.05, _wrap(text)), transform=axis.transAxes, ha="center", va="top", fontsize=9, weight="bold",
            color="#1a7f37" if cell.right else "#c62828", parse_math=False,
        )  # fmt: skip
    figure.suptitle(title, fontsize=10, parse_math=False)
    figure.tight_layout(h_pad=1.6)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _wrap(text: str, width: int = 30) -> str:
    import textwrap

    return "\n".join(textwrap.wrap(text, width)[:4])


def save_loss_curve(losses: Sequence[float], path: Path) -> None:
    """Training loss per step, and its running mean."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    window = max(1, len(losses) // 25)
    smooth = [sum(losses[max(0, k - window + 1) : k + 1]) / min(window, k + 1) for k in range(len(losses))]
    figure, axis = pyplot.subplots(figsize=(6, 3.2))
    axis.plot(range(1, len(losses) + 1), losses, color="#b0c4de", linewidth=0.8, label="each step")
    axis.plot(range(1, len(losses) + 1), smooth, color="#1f4e8c", linewidth=1.6, label=f"mean of {window}")
    axis.set_xlabel("optimizer step")
    axis.set_ylabel("loss (nats per answer token)")
    axis.set_ylim(bottom=0)
    axis.legend(frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def save_grounding(conditions: Mapping[str, Mapping[str, float]], path: Path) -> None:
    """How likely the truth is in each condition, kind by kind: where the bars are level, nobody looked."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    kinds = sorted(next(iter(conditions.values())))
    figure, axis = pyplot.subplots(figsize=(max(5.0, 1.1 * len(kinds) + 2), 3.2))
    width = 0.8 / len(conditions)
    for place, ((name, by_kind), color) in enumerate(zip(conditions.items(), BAR_COLORS, strict=False)):
        at = [k + (place - (len(conditions) - 1) / 2) * width for k in range(len(kinds))]
        axis.bar(at, [by_kind[kind] for kind in kinds], width, label=name, color=color)
    axis.set_xticks(range(len(kinds)), [_wrap(kind, 14) for kind in kinds], fontsize=8, parse_math=False)
    axis.set_ylabel("likelihood of the true answer")
    axis.set_ylim(0, 1)
    axis.legend(frameon=False, fontsize=8, ncols=len(conditions), loc="lower center", bbox_to_anchor=(0.5, 1.0))
    axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
