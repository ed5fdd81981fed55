"""One question about one picture."""

from __future__ import annotations

import torch
from PIL import Image

from llava_pipeline.evaluation.evaluate import stop_ids
from llava_pipeline.evaluation.generate import answer
from llava_pipeline.model.assemble import Llava
from llava_pipeline.training.features import tower_features


def ask(llava: Llava, picture: Image.Image, question: str, max_new_tokens: int) -> str:
    """The greedy answer to a question about an RGB picture; as in training, the question stands on its own line."""
    pixels = torch.from_numpy(llava.processor.resize(picture).copy())[None].to(llava.model.device)
    features = tower_features(llava.model, llava.processor.normalise(pixels))
    prompt = llava.processor.prompt(f"\n{question}")
    pad = int(llava.model.config.pad_token_id)
    (ids,) = answer(llava.model, [prompt], features, max_new_tokens, stop_ids(llava), pad)
    return llava.processor.decode(ids)
