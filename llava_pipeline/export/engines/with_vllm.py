"""vLLM, from the exported folder alone, in the environment where it is installed: this file imports nothing of ours.

vLLM pins other versions than training does, so a person has it in an environment of its own, and this is run by its
Python as a file: ``PYTHON -I with_vllm.py <exported> <work>``, with the files of :mod:`.wire`.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

TOLD_TOKENS = 200  # log-probabilities that are asked for
ROOM = 64  # tokens of the context besides the image and the question
SETTINGS = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB; a card gives what it has
    "VLLM_LOGGING_LEVEL": "WARNING",
}


def main(exported: Path, work: Path) -> None:
    """Ask, and write down what it says; that it does not load the folder is a problem."""
    os.environ.update(SETTINGS)  # read when vLLM is imported
    import vllm

    asked = json.loads((work / "asked.json").read_text(encoding="utf-8"))
    told: dict[str, Any] = {"version": vllm.__version__}
    try:
        told["replies"] = replies(vllm, exported, work, asked)
    except (RuntimeError, ValueError) as error:
        told["problem"] = f"vLLM does not load or run the folder: {(str(error) or repr(error)).splitlines()[0][:200]}"
    (work / "told.json").write_text(json.dumps(told), encoding="utf-8")


def replies(vllm: Any, exported: Path, work: Path, asked: dict[str, Any]) -> list[dict[str, Any]]:
    """What it reads every prompt as, and what it holds likely to follow."""
    from PIL import Image

    longest = max(len(prompt["question"]) for prompt in asked["prompts"])
    engine = vllm.LLM(
        model=str(exported), dtype="float32", enforce_eager=True, max_logprobs=TOLD_TOKENS, max_num_seqs=8,
        max_model_len=asked["num_image_tokens"] + 4 * longest + ROOM,  # a token may be a byte of a letter
        limit_mm_per_prompt={"image": 1},
    )  # fmt: skip
    conversations = []
    for prompt in asked["prompts"]:
        with Image.open(work / prompt["picture"]) as picture:
            image = {"type": "image_pil", "image_pil": picture.convert("RGB")}
        conversations.append([{"role": "user", "content": [image, {"type": "text", "text": prompt["question"]}]}])
    sampling = vllm.SamplingParams(max_tokens=1, temperature=0.0, logprobs=TOLD_TOKENS)
    outputs = engine.chat(conversations, sampling, use_tqdm=False)
    return [reply(output, prompt["tokens"]) for output, prompt in zip(outputs, asked["prompts"], strict=True)]


def reply(output: Any, tokens: list[int]) -> dict[str, Any]:
    """One prompt's."""
    (likely,) = output.outputs[0].logprobs
    known = {int(token): float(told.logprob) for token, told in likely.items()}
    return {
        "input_ids": [int(token) for token in output.prompt_token_ids],
        "first": max(known, key=lambda token: known[token]),
        "logprobs": [known.get(token) for token in tokens],
    }


if __name__ == "__main__":  # vLLM starts processes that import this file
    main(Path(sys.argv[1]), Path(sys.argv[2]))
