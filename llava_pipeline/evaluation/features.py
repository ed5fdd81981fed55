"""Tower features of the pictures of a snapshot."""

from __future__ import annotations

import torch

from llava_pipeline.data.snapshot import Rows
from llava_pipeline.evaluation.questions import Advance
from llava_pipeline.model.assemble import Llava
from llava_pipeline.model.tower import tower_features


def picture_features(llava: Llava, rows: Rows, pictures: range, batch_size: int, advance: Advance) -> torch.Tensor:
    """(N, P, D_vision) tower features of pictures of a snapshot, in the frozen parts' precision, on the CPU."""
    device = llava.model.device
    out = []
    for start in range(0, len(pictures), batch_size):
        images = pictures[start : start + batch_size]
        pixels = torch.stack([torch.from_numpy(llava.processor.resize(rows.picture(k)).copy()) for k in images])
        out.append(tower_features(llava.model, llava.processor.normalise(pixels.to(device))).cpu())
        advance(len(images))
    return torch.cat(out)
