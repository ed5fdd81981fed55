"""The champion asked again: does it still answer as it was recorded, and is it what is served?"""

from __future__ import annotations

import base64
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import requests

from llava_pipeline.contracts import Differences, Evaluation, Reexamined
from llava_pipeline.evaluation.lines import Line
from llava_pipeline.evaluation.score import mean
from llava_pipeline.spec import Frozen
from llava_pipeline.stages.examine import lines_of
from llava_pipeline.stages.recorded import evaluate_recorded
from llava_pipeline.tracking import registry
from llava_pipeline.tracking.checks import answers_recorded
from llava_pipeline.tracking.registry import Champion
from llava_pipeline.tracking.served import wait_until_served
from llava_pipeline.tracking.settings import Settings, load_settings, ready_url_of

SECONDS_BETWEEN = 1.0
MAX_SECONDS_FOR_AN_ANSWER = 60.0
KEY_WANTED = (401, 403)
NOT_NOW = (429, 502, 503, 504)


class Tolerance(Frozen):
    """By how much the arithmetic of another machine may move a whole held-out set."""

    likelihood: float
    changed_share: float  # of answers; one answer may always be another one
    grounding_gain: float  # nats per token


# The same projector in float32, bfloat16 and float16, in batches of 100, 7 and 1, on one thread and two, asked 400
# questions (`pocket`): no answer changed; likelihoods moved by 1e-8 within float32, and by 9e-5 between bfloat16 and
# float32; grounding gains by 1e-7 and 8e-4. These are more than fifty times that.
TOLERANCES = {"float32": Tolerance(likelihood=0.002, changed_share=0.005, grounding_gain=0.01)}
TOLERANCE_OF_HALF = Tolerance(likelihood=0.005, changed_share=0.02, grounding_gain=0.05)


def ask_again(champion: Champion, registered_model: str) -> tuple[Differences, tuple[str, ...]]:
    """Put the champion's own held-out questions to it afresh; what is other than recorded, and what of it is too much.

    Raises:
        TrackingError: MLflow cannot be reached, refuses, or does not hold what was recorded.
        DamagedArtifact, WeightsMismatch, IncompatibleParts: the champion cannot be loaded any more.
    """
    settings = load_settings()
    recorded = registry.recorded_evaluation(champion.run_id, settings)
    now = evaluate_recorded(champion.run_id, registered_model, None, None, None, settings, afresh=True)
    lines, before = lines_of(now.scored), answers_recorded(champion.run_id, settings)
    found = differences(now, lines, recorded, before)
    return found, too_much(found, TOLERANCES.get(recorded.projector.precision, TOLERANCE_OF_HALF))


def differences(
    now: Reexamined, lines: Sequence[Line], recorded: Evaluation, before: Sequence[Line]
) -> Differences:  # fmt: skip
    """Two results over the same questions, side by side; a question that one of them lacks is one that changed."""
    said = {line["id"]: line["answer"] for line in before}
    gains = [None if one.grounding is None else one.grounding.over_shuffled.mean for one in (now, recorded)]
    return Differences(
        num_questions=now.num_questions,
        changed_share=mean(said.get(line["id"]) != line["answer"] for line in lines),
        exact_match=now.right_image.exact_match, exact_match_recorded=recorded.right_image.exact_match,
        likelihood=now.right_image.likelihood or 0.0, likelihood_recorded=recorded.right_image.likelihood or 0.0,
        grounding_gain=gains[0], grounding_gain_recorded=gains[1],
    )  # fmt: skip


def too_much(found: Differences, allowed: Tolerance) -> tuple[str, ...]:
    """What differs by more than another machine's arithmetic explains, in sentences; what is no number does."""
    problems = []
    if not abs(found.likelihood - found.likelihood_recorded) <= allowed.likelihood:
        problems.append(
            f"the likelihood of the true answers is {found.likelihood:.4f}, {found.likelihood_recorded:.4f} was "
            f"recorded ({allowed.likelihood:g} is allowed)"
        )
    if not found.changed_share <= max(allowed.changed_share, 1 / max(1, found.num_questions)):
        problems.append(
            f"{found.changed_share:.1%} of {found.num_questions} answers are other ones than recorded "
            f"({allowed.changed_share:.1%} or one are allowed); exact match is {found.exact_match:.1%}, "
            f"{found.exact_match_recorded:.1%} was recorded"
        )
    gain, before = found.grounding_gain, found.grounding_gain_recorded
    if gain is not None and before is not None and not abs(gain - before) <= allowed.grounding_gain:
        problems.append(
            f"the right picture is worth {gain:.4f} nats per token, {before:.4f} were recorded "
            f"({allowed.grounding_gain:g} is allowed)"
        )
    return tuple(problems)


def ask_serving(champion: Champion, registered_model: str) -> tuple[str, str | None]:
    """Ask who is served, and one golden question; what was found, and what is wrong with it or None.

    Raises:
        TrackingError: MLflow cannot be reached, or refuses.
    """
    settings = load_settings()
    url = ready_url_of(registered_model, settings)
    if url is None:
        return "no serving address is known (serving.ready_url); nobody was asked", None
    seconds = settings.serving.timeout_seconds
    deadline = time.monotonic() + seconds
    told = wait_until_served(url, registered_model, champion.version, seconds)
    if isinstance(told, str):
        return told, told
    if told.get("model") not in (None, registered_model):
        return f"{url} serves {told['model']}, not {registered_model}; it was not asked", None
    with tempfile.TemporaryDirectory() as folder:
        golden = a_golden_question(champion.run_id, Path(folder), settings)
        if golden is None:
            return f"{url} reports version {champion.version}; the version has no golden question", None
        spec = registry.recorded_spec(champion.run_id, None, settings)
        body = question(f"{registered_model}-v{champion.version}", golden, Path(folder), spec.evaluation.max_new_tokens)
    said = answer(f"{url.removesuffix('/readyz').rstrip('/')}/v1/chat/completions", body, deadline)
    if said is None:
        return f"{url} reports version {champion.version}; it asks for a key, so no question was put to it", None
    asked, recorded = golden["question"], golden["answer"]
    if said == recorded:
        return f"{url} reports version {champion.version} and answers {said!r} to {asked!r}, as recorded", None
    wrong = f"{url} serves version {champion.version}, which answers {said!r} to {asked!r}, {recorded!r} was recorded"
    return wrong, wrong


def a_golden_question(run_id: str, folder: Path, settings: Settings) -> dict[str, str] | None:
    """The one that was answered most surely, with its picture in ``folder``; None where the run has none."""
    (path,) = registry.download_files(run_id, ("evaluation/golden/questions.json",), folder, settings)
    golden: list[dict[str, str]] = json.loads(path.read_text(encoding="utf-8"))
    if not golden:
        return None
    registry.download_files(run_id, (f"evaluation/golden/{golden[0]['picture']}",), folder, settings)
    return golden[0]


def question(model: str, golden: dict[str, str], folder: Path, max_tokens: int) -> dict[str, Any]:
    """A golden question as OpenAI's clients send it."""
    picture = base64.b64encode((folder / golden["picture"]).read_bytes()).decode()
    parts = [
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{picture}"}},
        {"type": "text", "text": golden["question"]},
    ]
    return {"model": model, "messages": [{"role": "user", "content": parts}], "max_tokens": max_tokens}


def answer(url: str, body: dict[str, Any], deadline: float) -> str | None:
    """What is said, or in words why nothing is; None where a key is asked for. One who is busy is asked again."""
    while True:
        try:
            told = requests.post(url, json=body, timeout=MAX_SECONDS_FOR_AN_ANSWER)
            if told.status_code in KEY_WANTED:
                return None
            if told.ok:
                return str(told.json()["choices"][0]["message"]["content"])
            reported = f"HTTP {told.status_code}"
            busy = told.status_code in NOT_NOW
        except (requests.RequestException, ValueError, LookupError, TypeError) as error:
            reported, busy = type(error).__name__, isinstance(error, requests.RequestException)
        if not busy or time.monotonic() >= deadline:
            return f"nothing ({reported})"
        time.sleep(SECONDS_BETWEEN)
