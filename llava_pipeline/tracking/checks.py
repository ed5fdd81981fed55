"""Checks of the champion in MLflow: each is a run of its own, and the version says when it was checked last."""

from __future__ import annotations

import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from llava_pipeline.contracts import ChampionCheck, Differences
from llava_pipeline.tracking import content, registry
from llava_pipeline.tracking.client import connect, ensure_experiment, refusals
from llava_pipeline.tracking.registry import Champion
from llava_pipeline.tracking.settings import Settings
from llava_pipeline.tracking.stale import PROCESS, this_process

AS_RECORDED = "as recorded"


def answers_recorded(run_id: str, settings: Settings) -> list[dict[str, Any]]:
    """Every held-out question with what was answered when the run was recorded.

    Raises:
        TrackingError: MLflow cannot be reached, or has none of this run.
        DamagedArtifact: they cannot be read.
    """
    with tempfile.TemporaryDirectory() as folder:
        (path,) = registry.download_files(run_id, ("evaluation/answers.jsonl",), Path(folder), settings)
        return content.read_rows(path)


def record_check(
    profile: str, registered_model: str, champion: Champion, found: Differences | None, serving: str,
    problems: tuple[str, ...], settings: Settings, tags: dict[str, str],
) -> ChampionCheck:  # fmt: skip
    """Record a check as a run, FAILED where there are problems, and note it with the version.

    An attempt that follows one that was cut off writes a run of its own.

    Raises:
        TrackingError: MLflow cannot be reached, or refuses.
    """
    from mlflow.entities import Metric

    now = datetime.now(UTC)
    result = "; ".join(problems)[: content.MAX_TAG] or AS_RECORDED
    known = {
        content.KIND: "check", "llava.profile": profile, "llava.check": result, "llava.check.model": registered_model,
        "llava.check.version": champion.version, "llava.check.trained_in": champion.run_id,
        "llava.check.serving": serving[: content.MAX_TAG], "llava.projector_digest": champion.projector_digest,
        PROCESS: this_process(),
    } | content.library_versions() | {key: value[: content.MAX_TAG] for key, value in tags.items()}  # fmt: skip
    if problems:
        known["llava.failure"] = result
    with refusals(f"record the check of version {champion.version} of {registered_model} in MLflow"):
        client = connect(settings)
        name = f"check-{profile}-v{champion.version}-{now:%Y%m%d-%H%M%S}"
        run = client.create_run(ensure_experiment(client, settings), tags=known, run_name=name)
        run_id = str(run.info.run_id)
        check = ChampionCheck(
            registered_model=registered_model, version=champion.version, run_id=run_id, trained_in=champion.run_id,
            differences=found, serving=serving, problems=problems,
        )  # fmt: skip
        stamp = int(now.timestamp() * 1000)
        client.log_batch(run_id, metrics=[Metric(key, value, stamp, 0) for key, value in metrics(found).items()])
        client.log_text(run_id, report(check), "check.md")
        client.set_tag(run_id, "mlflow.note.content", report(check)[: content.MAX_TAG])
        told = {"checked": result, "checked_at": now.isoformat(timespec="seconds"), "checked_in": run_id}
        for key, value in told.items():
            client.set_model_version_tag(registered_model, champion.version, f"llava.{key}", value)
        client.set_terminated(run_id, "FAILED" if problems else "FINISHED")
    return check


def metrics(found: Differences | None) -> dict[str, float]:
    """The numbers of a check, by name; none where nothing was asked."""
    if found is None:
        return {}
    told = {f"check/{key}": value for key, value in found.model_dump().items()}
    return {key: float(value) for key, value in told.items() if value is not None}


def report(check: ChampionCheck) -> str:
    """A page of Markdown: what is other than recorded, and who is served."""
    title = "regressed" if check.problems else AS_RECORDED
    lines = [f"# Version {check.version} of {check.registered_model}: {title}", ""]
    if (found := check.differences) is not None:
        lines += [
            f"{found.num_questions} questions were asked again; {found.changed_share:.1%} of the answers are other "
            "ones.", "", "| | now | recorded |", "|---|---|---|",
        ]  # fmt: skip
        for name in ("exact_match", "likelihood", "grounding_gain"):
            now, before = (getattr(found, key) for key in (name, f"{name}_recorded"))
            lines.append(f"| {name.replace('_', ' ')} | {_number(now)} | {_number(before)} |")
        lines.append("")
    lines.append(f"Serving: {check.serving}.")
    if check.problems:
        lines += ["", "## What is wrong", "", *(f"- {problem}" for problem in check.problems)]
    return "\n".join(lines) + "\n"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
