"""The page of a model: what it is, what it scores, what it was made of, and where it fails. Markdown.

The layout is that of a model card on the Hugging Face hub (Mitchell et al. 2019, arXiv:1810.03993), so that it can be
read there too. It lies beside the weights, and its first lines are the description that MLflow's pages show.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import yaml

from llava_pipeline.contracts import Beginning, Evaluation, FetchedBackbone, Interval, TrainedProjector
from llava_pipeline.spec import RunSpec
from llava_pipeline.tracking.content import metric_part, num_learned, spec_digest

PICTURES = ("grid.png", "grounding.png", "loss.png")
WEAK = 0.9  # exact match below which a kind of question is named among the limits
DIGITS = 12  # of a digest
MOVED = {  # by what was trained
    "projector": "Only the projector's weights moved; the frozen parts",
    "lora": "The projector moved, and a LoRA beside the language model was learned; the frozen parts",
    "full": "The projector and all weights of the language model moved; the vision tower's weights",
}


def save_card(folder: Path, answers: Path, text: str) -> None:
    """Write the card, and the pictures it shows, into the folder of a model."""
    (folder / "pictures").mkdir()
    for name in PICTURES:
        (folder / "pictures" / name).write_bytes((answers / name).read_bytes())
    (folder / "README.md").write_text(text, encoding="utf-8")


def headline(evaluation: Evaluation) -> str:
    """What a person wants to know first, in a few sentences."""
    right, shuffled, trained = evaluation.right_image, evaluation.shuffled_image, evaluation.projector
    told = [
        f"{right.exact_match:.1%} of {evaluation.num_questions} held-out questions right; with other pictures "
        f"{shuffled.exact_match:.1%}, untrained {evaluation.untrained.exact_match:.1%}, by guessing "
        f"{evaluation.blind_rate:.1%}."
    ]
    if evaluation.grounding is not None:
        gain = _interval(evaluation.grounding.over_shuffled)
        told.append(f"The right picture is worth {gain} nats per token of the true answer over another picture.")
    told.append(
        f"{num_learned(trained):,} of {trained.model.num_total:,} parameters were trained{_besides(trained)}: "
        f"{trained.num_steps} "
        f"steps over {trained.num_samples:,} samples in {trained.seconds:.0f} s on {trained.device}."
    )
    return " ".join(told)


def card(spec: RunSpec, evaluation: Evaluation, run_id: str, versions: Mapping[str, str]) -> str:
    """The whole page; ``versions`` are those of the libraries that took part, by name."""
    sections = [
        _front(evaluation),
        f"# {spec.registered_model}",
        spec.title,
        headline(evaluation),
        "![Held-out pictures with question, answer and truth](pictures/grid.png)",
        "## Scores",
        _scores(evaluation),
        "![Likelihood of the true answer by kind of question and condition](pictures/grounding.png)",
        "## Limits",
        _limits(evaluation),
        "## Data",
        _data(evaluation),
        "## Training",
        _training(evaluation),
        "![Training loss](pictures/loss.png)",
        "## What it was made of",
        _lineage(spec, evaluation, run_id, versions),
        "## How to ask it",
        _usage(spec, run_id),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _front(evaluation: Evaluation) -> str:
    parts = evaluation.projector.model.backbones
    about = {
        "library_name": "llava-pipeline",
        "pipeline_tag": "image-text-to-text",
        "tags": ["llava", "projector", "frozen-backbones"],
        "base_model": [parts.vision_tower.origin, parts.language_model.origin],
    }
    return f"---\n{yaml.safe_dump(about, sort_keys=False, allow_unicode=True)}---"


def _scores(evaluation: Evaluation) -> str:
    right, shuffled, untrained = evaluation.right_image, evaluation.shuffled_image, evaluation.untrained
    gains = {} if evaluation.grounding is None else evaluation.grounding.by_kind
    lines = [
        "| Kind of question | right picture | another picture | untrained | blind guess | worth of the picture |",
        "|---|---|---|---|---|---|",
        f"| all | {right.exact_match:.3f} | {shuffled.exact_match:.3f} | {untrained.exact_match:.3f} "
        f"| {evaluation.blind_rate:.3f} "
        f"| {'-' if evaluation.grounding is None else _interval(evaluation.grounding.over_shuffled)} |",
    ]
    for kind in sorted(right.by_kind):
        others = (source.get(kind) for source in (shuffled.by_kind, untrained.by_kind, evaluation.blind_by_kind))
        cells = " | ".join("-" if value is None else f"{value:.3f}" for value in others)
        worth = _interval(gains[kind]) if kind in gains else "-"
        lines.append(f"| {metric_part(kind)} | {right.by_kind[kind]:.3f} | {cells} | {worth} |")
    lines += [
        "",
        "Exact match of greedy answers; the worth of a picture is what the true answer gains by it, in nats per token, "
        "with the 95 % interval over pictures.",
    ]
    return "\n".join(lines)


def _limits(evaluation: Evaluation) -> str:
    """What is known not to work; nothing here is general wisdom."""
    health, grounding = evaluation.health, evaluation.grounding
    told = [
        f"Asked about {evaluation.held_out.num_images:,} held-out pictures of the data it was trained on; nothing is "
        "known about other pictures and other kinds of questions."
    ]
    weak = {k: v for k, v in sorted(evaluation.right_image.by_kind.items(), key=lambda item: item[1]) if v < WEAK}
    if weak:
        told.append("Weak at " + ", ".join(f"{metric_part(k)} ({v:.1%})" for k, v in weak.items()) + ".")
    if grounding is None:
        told.append("Too few pictures were held out to say whether it looks at them.")
    elif blind := [metric_part(k) for k, gain in sorted(grounding.by_kind.items()) if gain.low <= 0]:
        told.append(f"It is not sure that it looks at the picture for: {', '.join(blind)}.")
    if evaluation.yes_no is not None:
        told.append(
            f"Says yes to {evaluation.yes_no.yes_rate:.1%} of yes/no questions; it is true of "
            f"{evaluation.yes_no.true_yes_rate:.1%}."
        )
    told.append(
        f"Of its answers {health.empty:.1%} are empty, {health.repeating:.1%} run into a loop and {health.unended:.1%} "
        f"have no end within {evaluation.spec.max_new_tokens} tokens."
    )
    told.append(
        "It knows what its language model knows, and has its faults: it may answer wrongly, and surely of itself."
    )
    return "\n".join(f"- {line}" for line in told)


def _data(evaluation: Evaluation) -> str:
    data, held_out = evaluation.projector.data, evaluation.held_out
    lines = [
        f"- Training: `{data.origin}`, {data.num_kept:,} rows of {data.num_read:,} read, {data.num_images:,} pictures, "
        f"{data.num_supervised_tokens:,} tokens that count (set `{data.rows.digest[:DIGITS]}`).",
        f"- Held out: `{held_out.origin}`, {held_out.num_kept:,} rows, {held_out.num_images:,} pictures (set "
        f"`{held_out.rows.digest[:DIGITS]}`).",
    ]
    if data.rejected:
        refused = ", ".join(f"{number:,} {reason}" for reason, number in sorted(data.rejected.items()))
        lines.append(f"- Refused: {refused}.")
    return "\n".join(lines)


def _training(evaluation: Evaluation) -> str:
    trained = evaluation.projector
    held_out = "" if trained.held_out_loss is None else f", held-out loss {trained.held_out_loss:.3f}"
    cost = f", cost {trained.cost:.2f}" if trained.cost else ""
    return (
        f"{MOVED[trained.learned]} have the digest they had before "
        f"(`{trained.frozen_digest_after[:DIGITS]}`). {trained.num_steps} optimizer steps, {trained.num_samples:,} "
        f"samples, {trained.precision}, {trained.device}, {trained.seconds:.0f} s, "
        f"{trained.peak_memory_bytes / 1e9:.2f} GB{cost}; loss {trained.final_loss:.3f}{held_out} nats per "
        "answer token."
    )


def _lineage(spec: RunSpec, evaluation: Evaluation, run_id: str, versions: Mapping[str, str]) -> str:
    trained, model = evaluation.projector, evaluation.projector.model
    rows = [
        ("Vision tower", _part(model.backbones.vision_tower)),
        ("Language model", _part(model.backbones.language_model)),
        ("Frozen weights", f"`{model.frozen_digest}`"),
        ("Projector", f"`{trained.projector.digest}`"),
        *([] if trained.began_with is None else [("Went on from", _begun(trained.began_with))]),
        ("Answers", f"`{evaluation.answers.digest}`"),
        ("Profile and spec", f"{spec.profile}, `{spec_digest(spec)}` (`spec.yaml` of the run repeats it)"),
        ("MLflow run", f"`{run_id}`"),
        ("Libraries", ", ".join(f"{name} {version}" for name, version in sorted(versions.items()))),
    ]
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])


def _besides(trained: TrainedProjector) -> str:
    return {"projector": "", "lora": " as a LoRA on the language model and the projector"}.get(
        trained.learned, ", the language model whole"
    )


def _begun(beginning: Beginning) -> str:
    version = "" if beginning.version is None else f"version {beginning.version} of {beginning.registered_model}, "
    return f"{version}run `{beginning.run_id}` (`{beginning.projector.digest[:DIGITS]}`)"


def _part(part: FetchedBackbone) -> str:
    return f"`{part.origin}` ({part.weights}, `{part.files.digest[:DIGITS]}`), licence: {part.license}"


def _usage(spec: RunSpec, run_id: str) -> str:
    return (
        "```bash\n"
        f"llava-pipeline chat picture.png 'What is in the picture?' --run {run_id}\n"
        f"mlflow models serve -m runs:/{run_id}/model --env-manager local\n"
        "```"
    )


def _interval(gain: Interval) -> str:
    return f"{gain.mean:.2f} [{gain.low:.2f}, {gain.high:.2f}]"
