"""What the gate said, where people look for it: a page to read, the rules as data, and tags on the version."""

from __future__ import annotations

from collections.abc import Sequence

from llava_pipeline.contracts import Evaluation, Evidence, RecordedRun, Rule, leading
from llava_pipeline.tracking import content
from llava_pipeline.tracking.client import connect, refusals
from llava_pipeline.tracking.settings import Settings

NONE = "none"
LEADING = "llava.gate.leading"  # of a run: the first rule that refused it, or none


def write(run: RecordedRun, evidence: Evidence, rules: tuple[Rule, ...], settings: Settings) -> None:
    """Keep the verdict with the version and the run. Writing it again changes nothing.

    The champion that was compared with is written too: a promotion moves the alias from no other.

    Raises:
        TrackingError: MLflow cannot be reached, or refuses.
    """
    passed = all(rule.passed for rule in rules)
    outcome = "passed" if passed else "refused"
    seen = NONE if evidence.champion is None else evidence.champion.version
    with refusals(f"write the gate's verdict on version {run.version} of {run.registered_model}"):
        client = connect(settings)
        told = {"gate": outcome, "champion": seen, "rules": [rule.model_dump() for rule in rules]}
        client.log_dict(run.run_id, told, "gate.json")
        client.log_text(run.run_id, report(run, evidence, rules), "gate.md")
        client.set_tag(run.run_id, "llava.gate", outcome)
        tags = {f"llava.gate.{rule.name}": _tag(rule) for rule in rules}
        for key, value in (tags | {"llava.gate.champion": seen, "llava.gate": outcome}).items():
            client.set_model_version_tag(run.registered_model, run.version, key, value[: content.MAX_TAG])
        refused_by = leading(rules)
        client.set_tag(run.run_id, LEADING, NONE if refused_by is None else refused_by.name)


def refused_before(run: RecordedRun, settings: Settings) -> str | None:
    """The leading rule that refused the judged run before this one; None where that one passed, or there is none.

    Raises:
        TrackingError: MLflow cannot be reached, or refuses.
    """
    with refusals("look up the verdict before this one"):
        asked = f"tags.`llava.registered_model` = '{run.registered_model}' and tags.`{LEADING}` != ''"
        found = connect(settings).search_runs(
            [run.experiment_id], filter_string=asked, order_by=["attributes.start_time DESC"], max_results=2
        )
    earlier = [str(one.data.tags[LEADING]) for one in found if one.info.run_id != run.run_id]
    return earlier[0] if earlier and earlier[0] != NONE else None


def report(run: RecordedRun, evidence: Evidence, rules: Sequence[Rule]) -> str:
    """The verdict as a page of Markdown: what was decided, what everything stands on, each rule with its numbers."""
    refused = [rule for rule in rules if not rule.passed]
    title = f"Version {run.version} of {run.registered_model}: {'passed' if not refused else 'refused'}"
    lines = [f"# {title}", "", _sentence(run.evaluation, evidence), "", *_scores(run.evaluation, evidence), ""]
    lines += ["| rule | | found | required |", "|---|---|---|---|"]
    lines += [
        f"| {rule.name.replace('_', ' ')} | {'pass' if rule.passed else '**FAIL**'} | {_cell(rule.found)} "
        f"| {_cell(rule.required)} |"
        for rule in rules
    ]
    if refused:
        lines += ["", "## What would have to change", ""]
        lines += [f"- **{rule.name.replace('_', ' ')}**: {rule.remedy}." for rule in refused]
    return "\n".join(lines) + "\n"


def _sentence(evaluation: Evaluation, evidence: Evidence) -> str:
    asked = f"{evaluation.num_questions} held-out questions about {evaluation.held_out.num_images} pictures"
    champion = evidence.champion
    if champion is None:
        other = "there is no champion yet"
    elif champion.problem is not None:
        other = f"version {champion.version}, the champion, was not: {champion.problem}"
    else:
        other = f"version {champion.version}, the champion, was asked the same in the same job"
    return f"It was asked {asked} (set `{evaluation.held_out_digest[:12]}`); {other}."


def _scores(evaluation: Evaluation, evidence: Evidence) -> list[str]:
    """What is compared, side by side."""
    rows: list[tuple[str, float | None, float | None]] = [
        ("right picture", evaluation.right_image.exact_match, evaluation.right_image.likelihood),
        ("another picture", evaluation.shuffled_image.exact_match, evaluation.shuffled_image.likelihood),
        ("no picture", evaluation.blind_rate, evaluation.no_image.likelihood),
        ("untrained", evaluation.untrained.exact_match, evaluation.untrained.likelihood),
    ]
    if evidence.champion is not None:
        rows.append(("champion", evidence.champion.exact_match, evidence.champion.likelihood))
    return ["| | exact match | likelihood of the truth |", "|---|---|---|"] + [
        f"| {name} | {_share(match)} | {_share(likely)} |" for name, match, likely in rows
    ]


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _tag(rule: Rule) -> str:
    return f"{'passed' if rule.passed else 'refused'}: {rule.found}"
