"""One question about one picture."""

from __future__ import annotations

import torch
from PIL import Image

from llava_pipeline.evaluation.questions import Question, cut
from llava_pipeline.evaluation.read import Job, Limits, read, stop_ids
from llava_pipeline.model.assemble import Llava
from llava_pipeline.model.tower import tower_features


def ask(llava: Llava, picture: Image.Image, question: str, max_new_tokens: int) -> str:
    """The greedy answer to a question about an RGB picture; as in training, the question stands on its own line."""
    pixels = torch.from_numpy(llava.processor.resize(picture).copy())[None].to(llava.model.device)
    features = tower_features(llava.model, llava.processor.normalise(pixels))
    prefix, suffix = cut(llava.processor.prompt(f"\n{question}"), llava.processor.image_token_id)
    stops = stop_ids(llava)
    asked = Question(0, prefix, suffix, truth=(min(stops, default=0),))
    (told,) = read(llava, [Job(asked, 0, True)], features, Limits(1, max_new_tokens, stops), lambda _: None)
    return llava.processor.decode(list(told.answer or ()))
