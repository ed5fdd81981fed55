"""What an engine is asked, and what it tells: JSON files between two processes."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

from llava_pipeline.spec import Frozen

ASKED, TOLD = "asked.json", "told.json"


class Prompt(Frozen):
    """One question about one picture."""

    picture: str  # a PNG beside this file
    question: str
    tokens: tuple[int, ...]  # whose log-probabilities are wanted


class Asked(Frozen):
    """All questions."""

    image_token: str
    image_token_id: int
    num_image_tokens: int
    num_threads: int
    prompts: tuple[Prompt, ...]


class Reply(Frozen):
    """What an engine reads a prompt as, and what it holds likely to follow."""

    input_ids: tuple[int, ...]  # every image token
    first: int  # the most likely token
    logprobs: tuple[float | None, ...]  # of the tokens that are wanted; None where the engine does not tell


class Told(Frozen):
    """An engine's answers."""

    version: str
    problem: str = ""  # why there are none
    replies: tuple[Reply, ...] = ()


def serve(answer: Callable[[Path, Path, Asked], Told]) -> None:
    """The main function of an engine's process."""
    exported, work = Path(sys.argv[1]), Path(sys.argv[2])
    asked = Asked.model_validate_json((work / ASKED).read_text(encoding="utf-8"))
    told = answer(exported, work, asked)
    (work / TOLD).write_text(json.dumps(told.model_dump(mode="json")), encoding="utf-8")
