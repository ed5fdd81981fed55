"""Every export is asked by the engines that it is for, beside the model that it was made of.

Asked are held-out questions about their pictures. An export is verified when, for every one, an engine reads the same
token ids, holds the same token most likely to follow, and gives our most likely tokens the same log-probability to
within a bound. Tokens that are next to impossible here do not count: engines round where the odds are millions to one.
"""

from __future__ import annotations

import importlib.util
import math
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from PIL import Image

from llava_pipeline.errors import ExportRefused
from llava_pipeline.export.engines.wire import ASKED, TOLD, Asked, Prompt, Reply, Told
from llava_pipeline.model.assemble import Llava
from llava_pipeline.model.processor import IMAGE_TOKEN
from llava_pipeline.spec import Frozen

if TYPE_CHECKING:
    from transformers import BaseImageProcessor

BOUNDS = {"hf": 0.05, "f16": 0.05, "q8_0": 0.5}  # of a log-probability, in nats
TOP, LEAST = 5, 1e-3  # of the likeliest tokens, and the probability that all but the first have to have
XLLAMACPP = "xllamacpp"
PADS_WITH = (122, 116, 104)  # llama.cpp, whatever the tower's mean colour is
TIMEOUT_SECONDS = 3600
PART = "\ufffd"  # what a tokenizer writes for bytes that are no whole letter
To = Literal["hf", "gguf"]
Pictures = Literal["as they are", "at the tower's size"]


@dataclass(frozen=True, slots=True)
class Engine:
    """Who reads what was exported, and the command of its process; the folder and what is asked come after it."""

    title: str
    command: tuple[str, ...]


TRANSFORMERS = Engine("transformers", (sys.executable, "-m", "llava_pipeline.export.engines.with_transformers"))
LLAMA_CPP = Engine("llama.cpp", (sys.executable, "-m", "llava_pipeline.export.engines.with_llama_cpp"))


def vllm_of(python: Path) -> Engine:
    """vLLM in the environment of this Python, which runs a file of ours and finds none of our packages."""
    return Engine("vLLM", (str(python), "-I", str(Path(__file__).parent / "engines" / "with_vllm.py")))


@dataclass(frozen=True, slots=True)
class Question:
    """A question and its picture, upright and in RGB."""

    text: str
    picture: Image.Image


class Check(Frozen):
    """One engine beside the model here."""

    engine: str
    version: str
    pictures: Pictures
    judged: bool  # False: told only
    bound: float
    num_prompts: int
    num_same_ids: int
    num_same_first: int
    num_ties: int  # another first token, which is as likely here to within the bound; counted as the same
    largest_first: float  # difference of the log-probability of our first token
    largest_top: float  # of our likeliest tokens
    largest_pixel: float | None  # grey levels between our picture and the engine's; None where it does not show it
    first_difference: str  # empty where there is none

    @property
    def passed(self) -> bool:
        """Whether the engine answers as the model here does."""
        return not self.first_difference


@dataclass(frozen=True, slots=True)
class Expected:
    """What the model here reads and holds likely."""

    input_ids: tuple[int, ...]
    tokens: tuple[int, ...]  # the TOP likeliest, those but the first that have LEAST
    logprobs: torch.Tensor  # of all tokens


def refuse_if_missing(to: To, vllm: Path | None = None) -> None:
    """Raises ExportRefused where an engine is not installed that an export is verified with."""
    if to == "gguf" and importlib.util.find_spec(XLLAMACPP) is None:
        raise ExportRefused(
            f"the files would be checked in llama.cpp, but {XLLAMACPP} is not installed; `pip install {XLLAMACPP}`, or "
            "export unchecked with --no-verify"
        )
    if vllm is not None and not _has_vllm(vllm):
        raise ExportRefused(
            f"{vllm} is not a Python that finds vLLM; name the one of the environment where it is installed, such as "
            "--vllm .venv-vllm/bin/python (docs/export.md says how to make one), or leave --vllm out"
        )


def _has_vllm(python: Path) -> bool:
    looks = "import importlib.util, sys; sys.exit(importlib.util.find_spec('vllm') is None)"
    try:
        return subprocess.run([python, "-I", "-c", looks], capture_output=True, timeout=60).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


@torch.no_grad()
def expect(llava: Llava, questions: Sequence[Question]) -> list[Expected]:
    """What the model answers here, in the precision it is in."""
    found = []
    for question in questions:
        ids = llava.processor.prompt(f"\n{question.text}")
        pixels = torch.from_numpy(llava.processor.resize(question.picture).copy())[None]
        pixel_values = llava.processor.normalise(pixels)
        logits = llava.model(input_ids=torch.tensor([ids]), pixel_values=pixel_values).logits[0, -1].float()
        logprobs = torch.log_softmax(logits, -1)
        values, tokens = logprobs.topk(min(TOP, len(logprobs)))
        num_likely = max(1, int((values >= math.log(LEAST)).sum()))
        found.append(Expected(tuple(ids), tuple(tokens[:num_likely].tolist()), logprobs))
    return found


def verify(
    exported: Path, to: To, bound: float, llava: Llava, questions: Sequence[Question], expected: Sequence[Expected],
    vllm: Path | None = None,
) -> list[Check]:  # fmt: skip
    """Ask the engine that a folder is for, and vLLM if its Python is named. llama.cpp is judged on pictures of the
    tower's size, and told on others: how it pads is its own.

    Raises:
        ExportRefused: no question can be asked there.
    """
    looks: list[tuple[Engine, Pictures, bool]]
    if to == "hf":
        engines = [TRANSFORMERS] if vllm is None else [TRANSFORMERS, vllm_of(vllm)]
        looks = [(engine, "as they are", True) for engine in engines]
    else:
        looks = [(LLAMA_CPP, "at the tower's size", True), (LLAMA_CPP, "as they are", False)]
        # Of an answer that begins with a part of a letter it tells nothing.
        whole = [k for k, ours in enumerate(expected) if PART not in llava.processor.words([ours.tokens[0]])]
        questions, expected = [questions[k] for k in whole], [expected[k] for k in whole]
        if not whole:
            raise ExportRefused(
                "every answer begins with a part of a letter, of which llama.cpp tells no probabilities; ask more "
                "questions with --prompts, or export unchecked with --no-verify"
            )
    checks = []
    for engine, kind, judged in looks:
        told = ask(exported, engine, kind, llava, questions, expected)
        shows = engine is TRANSFORMERS and not told.problem
        pixel = picture_difference(exported, llava, questions) if shows else None
        checks.append(compare(engine.title, told, kind, judged, bound, pixel, expected, questions))
        if told.problem:
            break
    return checks


def ask(
    exported: Path, engine: Engine, kind: Pictures, llava: Llava, questions: Sequence[Question],
    expected: Sequence[Expected],
) -> Told:  # fmt: skip
    """One engine's answers, from a fresh process."""
    with tempfile.TemporaryDirectory(prefix="llava-pipeline-verify-") as temporary:
        work, prompts = Path(temporary), []
        for number, (question, ours) in enumerate(zip(questions, expected, strict=True)):
            shown = question.picture
            if kind == "at the tower's size":
                shown = Image.fromarray(llava.processor.resize(shown))
            shown.save(work / f"{number}.png")
            prompts.append(Prompt(picture=f"{number}.png", question=question.text, tokens=ours.tokens))
        asked = Asked(
            image_token=IMAGE_TOKEN, image_token_id=llava.processor.image_token_id,
            num_image_tokens=llava.processor.num_image_tokens, num_threads=torch.get_num_threads(),
            prompts=tuple(prompts),
        )  # fmt: skip
        (work / ASKED).write_text(asked.model_dump_json(), encoding="utf-8")
        command = [*engine.command, str(exported), str(work)]
        try:
            ended = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_SECONDS)
        except subprocess.TimeoutExpired:
            return Told(
                version="", problem=f"the engine did not answer within {TIMEOUT_SECONDS} s; ask fewer --prompts"
            )
        if ended.returncode or not (work / TOLD).is_file():
            lines = [line for line in ended.stderr.strip().splitlines() if line.strip()]
            reason = lines[-1] if lines else f"it ended with {ended.returncode}"
            return Told(version="", problem=f"the engine's process failed: {reason[:300]}")
        return Told.model_validate_json((work / TOLD).read_text(encoding="utf-8"))


def compare(
    engine: str, told: Told, kind: Pictures, judged: bool, bound: float, pixel: float | None,
    expected: Sequence[Expected], questions: Sequence[Question],
) -> Check:  # fmt: skip
    """An engine's answers beside ours, and the first difference in words."""
    difference, same_ids, same_first, ties, first, top = told.problem, 0, 0, 0, 0.0, 0.0
    for question, ours, theirs in zip(questions, expected, told.replies, strict=False):
        reasons = []
        if ours.input_ids == theirs.input_ids:
            same_ids += 1
        else:
            reasons.append(_other_ids(ours.input_ids, theirs.input_ids))
        likeliest = float(ours.logprobs[ours.tokens[0]])
        if theirs.first == ours.tokens[0]:
            same_first += 1
        elif 0 <= theirs.first < len(ours.logprobs) and likeliest - float(ours.logprobs[theirs.first]) <= bound:
            same_first, ties = same_first + 1, ties + 1
        else:
            reasons.append(f"its first token is {theirs.first}, here it is {ours.tokens[0]}")
        distances = _distances(ours, theirs)
        first, top = max(first, distances[0]), max(top, *distances)
        if max(distances) > bound:
            reasons.append(f"a log-probability differs by {max(distances):.3f}, more than {bound}")
        if reasons and not difference:
            difference = f"asked {question.text!r}, {reasons[0]}"
    if not difference and len(told.replies) != len(expected):
        difference = f"it answered {len(told.replies)} of {len(expected)} questions"
    return Check(
        engine=engine, version=told.version, pictures=kind, judged=judged, bound=bound, num_prompts=len(expected),
        num_same_ids=same_ids, num_same_first=same_first, num_ties=ties, largest_first=_finite(first),
        largest_top=_finite(top), largest_pixel=pixel, first_difference=difference,
    )  # fmt: skip


def _distances(ours: Expected, theirs: Reply) -> list[float]:
    """Of the log-probabilities of our likeliest tokens; infinite where the engine does not hold one likely at all."""
    return [
        math.inf if told is None or not math.isfinite(told) else abs(told - float(ours.logprobs[token]))
        for token, told in zip(ours.tokens, theirs.logprobs, strict=True)
    ]


def _finite(value: float) -> float:
    """JSON has no infinity."""
    return value if math.isfinite(value) else 1e9


def _other_ids(ours: tuple[int, ...], theirs: tuple[int, ...]) -> str:
    place = next((k for k, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))
    here, there = ours[place : place + 1] or "its end", theirs[place : place + 1] or "its end"
    return f"token {place} of {len(ours)} is {there} there and {here} here ({len(theirs)} tokens there)"


def picture_difference(exported: Path, llava: Llava, questions: Sequence[Question]) -> float:
    """Most grey levels by which a pixel of the exported image processor differs from ours."""
    from transformers import AutoImageProcessor

    theirs: BaseImageProcessor = AutoImageProcessor.from_pretrained(exported, local_files_only=True)
    deviation = np.asarray(llava.processor.images.std, dtype=np.float32)[:, None, None]
    largest = 0.0
    for question in questions:
        pixels = torch.from_numpy(llava.processor.resize(question.picture).copy())[None]
        ours = llava.processor.normalise(pixels)[0].numpy()
        found = np.asarray(theirs(images=question.picture)["pixel_values"][0], dtype=np.float32)
        if found.shape != ours.shape:
            return 255.0
        largest = max(largest, float((np.abs(found - ours) * deviation).max() * 255))
    return largest
