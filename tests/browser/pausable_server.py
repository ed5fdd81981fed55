"""``llava-pipeline serve``, whose answers are drawn out while a file says so.

The pocket model says a word or two within milliseconds: nobody could stop that, or leave in the middle of it. The file
that PACE names holds the seconds that a token takes while it is there; meanwhile no answer comes to an end by itself.
Only the choice of a token is touched: all else is the real server.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

PACE = "LLAVA_PIPELINE_TEST_PACE"


def draw_out(pace: Path) -> None:
    """Put our choice of a token in the place of the engine's."""
    from llava_pipeline.serving import engine

    stop_ids, choose = engine.stop_ids, engine.choose
    ends: list[int] = []

    def remembered(*arguments: Any) -> Any:
        found = stop_ids(*arguments)
        ends[:] = found
        return found

    def drawn_out(logits: Tensor, *arguments: Sequence[Any]) -> list[int]:
        if pace.is_file():
            time.sleep(float(pace.read_text()))
            logits = logits.index_fill(-1, torch.tensor(ends), float("-inf"))
        return choose(logits, *arguments)

    engine.stop_ids, engine.choose = remembered, drawn_out


if __name__ == "__main__":
    from llava_pipeline.cli import main

    draw_out(Path(os.environ[PACE]))
    main()
