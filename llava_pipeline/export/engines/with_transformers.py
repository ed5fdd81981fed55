"""transformers, from the exported folder alone: its model, its processor, its pixels; in float32 on the CPU."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from llava_pipeline.export.engines.wire import Asked, Prompt, Reply, Told, serve


@torch.no_grad()
def answer(exported: Path, work: Path, asked: Asked) -> Told:
    """What it says; a weight that is missing, left over or of another shape is a problem."""
    torch.set_num_threads(asked.num_threads)
    model, loading = AutoModelForImageTextToText.from_pretrained(
        exported, output_loading_info=True, dtype=torch.float32, local_files_only=True
    )
    if odd := {kind: sorted(map(str, keys))[:3] for kind, keys in loading.items() if keys}:
        return Told(version=transformers.__version__, problem=f"the weights do not fit the configuration: {odd}")
    processor = AutoProcessor.from_pretrained(exported, local_files_only=True)
    replies = tuple(_reply(model.eval(), processor, work, prompt) for prompt in asked.prompts)
    return Told(version=transformers.__version__, replies=replies)


def _reply(model: torch.nn.Module, processor: AutoProcessor, work: Path, prompt: Prompt) -> Reply:
    with Image.open(work / prompt.picture) as picture:
        content = [{"type": "image", "image": picture.convert("RGB")}, {"type": "text", "text": prompt.question}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
    )  # fmt: skip
    found = torch.log_softmax(model(**inputs).logits[0, -1].float(), -1)
    return Reply(
        input_ids=tuple(inputs["input_ids"][0].tolist()),
        first=int(found.argmax()),
        logprobs=tuple(found[list(prompt.tokens)].tolist()),
    )


if __name__ == "__main__":
    serve(answer)
