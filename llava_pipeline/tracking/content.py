"""What a run's record holds: parameters, metrics and tags from the spec and the evaluation. MLflow is not needed."""

from __future__ import annotations

import hashlib
import json
import math
import re
import subprocess
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

from llava_pipeline import store
from llava_pipeline.contracts import Beginning, Evaluation, Interval, Likely, Score, Snapshot, TrainedProjector
from llava_pipeline.errors import DamagedArtifact
from llava_pipeline.spec import RunSpec
from llava_pipeline.tracking.reading import CURSOR, READING, reading_id

LIBRARIES = (
    "llava-pipeline",
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "datasets",
    "numpy",
    "mlflow",
    "prefect",
)
STEP_METRICS = (
    "loss",
    "held_out_loss",
    "learning_rate",
    "grad_norm",
    "mfu",
    "useful_flops_per_second",
    "tokens_per_pass",
    "peak_memory_bytes",
    "cost",
)
SAMPLE_COLUMNS = ("kind", "question", "truth", "answer", "answer_shuffled", "correct", "likelihood", "loss", "id")
MAX_PARAMETER = 6000
KIND = "llava.kind"  # of a run that is no night: sweep, trial or check
MAX_TAG = 5000


class Point(NamedTuple):
    """One value of a metric."""

    key: str
    value: float
    step: int
    time: float  # seconds since the epoch


def metric_part(name: str) -> str:
    """A kind of question, or a reason, as part of a metric's name: ``yes/no`` becomes ``yes_no``."""
    return re.sub(r"[^A-Za-z0-9_.-]", "_", name)


def spec_digest(spec: RunSpec) -> str:
    """Digest of a spec: equal for equal content."""
    return hashlib.sha256(json.dumps(spec.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()


def evaluation_digest(evaluation: Evaluation) -> str:
    """Digest of a result: of its answers and of the projector that gave them."""
    return hashlib.sha256(f"{evaluation.answers.digest}{evaluation.projector.projector.digest}".encode()).hexdigest()


def parameters(spec: RunSpec, evaluation: Evaluation | None = None) -> dict[str, str]:
    """The whole spec, flattened below ``spec.``, and what the model turned out to be."""
    found = dict(_flatten("spec", spec.model_dump(mode="json")))
    if evaluation is not None:
        trained, model = evaluation.projector, evaluation.projector.model
        found |= {
            "params.num_total": str(model.num_total),
            "params.num_trainable": str(model.num_trainable),
            "params.num_frozen": str(model.num_frozen),
            "num_image_tokens": str(model.num_image_tokens),
            "backbones.vision_tower.origin": model.backbones.vision_tower.origin,
            "backbones.language_model.origin": model.backbones.language_model.origin,
            "params.num_learned": str(num_learned(trained)),
            "learned": trained.learned,
            "precision": trained.precision,
            "device": trained.device,
        }
    return {key: value[:MAX_PARAMETER] for key, value in found.items()}


def num_learned(trained: TrainedProjector) -> int:
    """Parameters that training changed."""
    return trained.model.num_trainable if trained.num_learned is None else trained.num_learned


def history(evaluation: Evaluation) -> Path:
    """The file with one JSON object per optimizer step."""
    return store.open_artifact(evaluation.projector.history) / "history.jsonl"


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON Lines file.

    Raises:
        DamagedArtifact: the file is missing or a line is not a JSON object.
    """
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise DamagedArtifact(f"cannot read {path} ({error}); run again with --refresh to make it anew") from error
    if not all(isinstance(row, dict) for row in rows):
        raise DamagedArtifact(f"{path} has a line that is not a JSON object; run again with --refresh to make it anew")
    return rows


def training_curve(rows: list[dict[str, Any]], began: float) -> list[Point]:
    """The metrics of every optimizer step, at the time it was taken.

    Steps of an earlier run, whose result is reused, are moved so that the last one is taken ``began``, when the run
    that shows them began.
    """
    times = [float(row.get("time") or 0.0) for row in rows]
    # A step whose pace was lost with the process that noted it stands where the one before it does.
    times = list(accumulate(times, max))
    moved = max(0.0, began - max(times, default=0.0))
    return [
        point
        for row, time in zip(rows, times, strict=True)
        for point in step_points(row | {"time": time or began}, moved)
    ]


def step_points(row: dict[str, Any], moved: float = 0.0) -> Iterator[Point]:
    """The metrics of one step, as the training process told it."""
    seconds = float(row.get("seconds") or 0.0)
    values = {f"train/{key}": row.get(key) for key in STEP_METRICS}
    if seconds > 0:
        values |= {f"train/{unit}_per_second": row[f"num_{unit}"] / seconds for unit in ("samples", "tokens")}
        values["train/data_wait_share"] = float(row.get("data_seconds") or 0.0) / seconds
    for key, value in values.items():
        if value is not None:
            yield Point(key, float(value), int(row["step"]), float(row.get("time") or 0.0) + moved)


def results(evaluation: Evaluation) -> dict[str, float]:
    """Every metric that has one value per run, by name."""
    trained, data = evaluation.projector, evaluation.projector.data
    found: dict[str, float | None] = {
        "train/final_loss": trained.final_loss,
        "train/seconds": trained.seconds,
        "train/num_steps": trained.num_steps,
        "train/num_samples": trained.num_samples,
        "train/num_skipped_steps": trained.num_skipped_steps,
        "train/final_held_out_loss": trained.held_out_loss,
        "train/num_processes": trained.num_processes,
        "train/peak_memory_bytes": trained.peak_memory_bytes,
        "train/predicted_memory_bytes": trained.predicted_memory_bytes,
        "eval/seconds": evaluation.seconds,
        "eval/num_questions": evaluation.num_questions,
        "eval/blind_rate": evaluation.blind_rate,
        "eval/seconds_per_answer": evaluation.scored.seconds_per_answer,
        "eval/peak_memory_bytes": evaluation.scored.peak_memory_bytes,
        "eval/short_share": evaluation.short_share,
        "data/num_read": data.num_read,
        "data/num_kept": data.num_kept,
        "data/num_near_duplicates": data.num_near_duplicates,
        "data/num_supervised_tokens": data.num_supervised_tokens,
    }
    found |= {f"eval/blind_rate/{metric_part(kind)}": rate for kind, rate in evaluation.blind_by_kind.items()}
    found |= {f"data/rejected/{metric_part(reason)}": number for reason, number in data.rejected.items()}
    found |= dict(_of_score("", evaluation.right_image))
    found |= dict(_of_score("_shuffled", evaluation.shuffled_image))
    found |= dict(_of_score("_untrained", evaluation.untrained))
    found |= dict(_of_likely("_no_image", evaluation.no_image))
    found |= dict(_of_interval("eval/over_untrained", evaluation.over_untrained))
    if (grounding := evaluation.grounding) is not None:
        found |= dict(_of_interval("eval/grounding_gain", grounding.over_shuffled))
        found |= dict(_of_interval("eval/grounding_gain_no_image", grounding.over_no_image))
        found |= {f"eval/grounding_gain/{metric_part(kind)}": gain.mean for kind, gain in grounding.by_kind.items()}
    found |= {f"eval/health/{name}": value for name, value in evaluation.health.model_dump().items()}
    if evaluation.yes_no is not None:
        found |= {f"eval/yes_no/{name}": value for name, value in evaluation.yes_no.model_dump().items()}
    return {key: float(value) for key, value in found.items() if value is not None}


def tags_of_spec(spec: RunSpec) -> dict[str, str]:
    """Tags that are known before anything has run."""
    found = {
        "llava.profile": spec.profile,
        "llava.stage": spec.stage,
        "llava.registered_model": spec.registered_model,
        "llava.spec_digest": spec_digest(spec),
    }
    if commit := git_commit(Path(__file__).parent):
        found["mlflow.source.git.commit"] = commit
    return found | library_versions()


def tags_of_evaluation(evaluation: Evaluation) -> dict[str, str]:
    """Digests of everything that went in and came out, and where in the source the next run goes on."""
    trained = evaluation.projector
    data = trained.data
    left = {} if data.num_left is None else {"llava.data.num_left": str(data.num_left)}
    before, after = trained.frozen_digest_before, trained.frozen_digest_after
    return (
        {
            "llava.frozen_digest_before": before,
            "llava.frozen_digest_after": after,
            "llava.frozen_digests_equal": "true" if before == after else "false",
            "llava.projector_digest": trained.projector.digest,
            "llava.snapshot_digest": data.rows.digest,
            "llava.held_out_digest": evaluation.held_out_digest,
            "llava.evaluation_digest": evaluation_digest(evaluation),
            "llava.data.origin": data.origin[:MAX_TAG],
            CURSOR: data.ended.model_dump_json(),
            READING: reading_id(trained.model, data.origin),
        }
        | left
        | tags_of_beginning(trained.began_with)
    )


def tags_of_beginning(beginning: Beginning | None) -> dict[str, str]:
    """Lineage: which run and version a training has gone on from."""
    if beginning is None:
        return {}
    version = {} if beginning.version is None else {"llava.begin.version": beginning.version}
    return {"llava.begin.run_id": beginning.run_id, "llava.begin.model": beginning.registered_model} | version


def tags_of_version(evaluation: Evaluation) -> dict[str, str]:
    """What a registered version says of itself: enough to be looked through without its run."""
    right, grounding = evaluation.right_image, evaluation.grounding
    found = {
        "llava.exact_match": repr(right.exact_match),
        "llava.exact_match_by_kind": json.dumps(right.by_kind, sort_keys=True),
        "llava.exact_match_shuffled": repr(evaluation.shuffled_image.exact_match),
        "llava.blind_rate": repr(evaluation.blind_rate),
        "llava.likelihood": repr(right.likelihood),
        "llava.held_out_digest": evaluation.held_out_digest,
        "llava.projector_digest": evaluation.projector.projector.digest,
        "llava.frozen_digest": evaluation.projector.model.frozen_digest,
        "llava.evaluation_digest": evaluation_digest(evaluation),
        "llava.learned": evaluation.projector.learned,
    } | tags_of_beginning(evaluation.projector.began_with)
    if grounding is not None:
        gain = grounding.over_shuffled
        found["llava.grounding_gain"] = f"{gain.mean:.4f} [{gain.low:.4f}, {gain.high:.4f}]"
    return found


def dataset_profile(snapshot: Snapshot) -> dict[str, int | dict[str, int]]:
    """What a data set holds, in numbers."""
    return {
        "num_rows": snapshot.num_kept,
        "num_read": snapshot.num_read,
        "num_images": snapshot.num_images,
        "num_near_duplicates": snapshot.num_near_duplicates,
        "num_supervised_tokens": snapshot.num_supervised_tokens,
        "num_tokens": snapshot.num_tokens,
        "rejected": snapshot.rejected,
    }


def library_versions() -> dict[str, str]:
    """Tags with the versions of the libraries that are installed."""
    found = {}
    for library in LIBRARIES:
        try:
            found[f"llava.version.{library}"] = version(library)
        except PackageNotFoundError:
            continue
    return found


def git_commit(folder: Path) -> str | None:
    """Commit of the repository that tracks a folder's Python files, or None: a package in site-packages has none."""
    try:
        tracked = _git(folder, "ls-files", "*.py")
        return _git(folder, "rev-parse", "--verify", "HEAD") or None if tracked else None
    except (OSError, subprocess.SubprocessError):
        return None


def table(rows: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """Rows as MLflow keeps a table: names of columns, and rows of cells; what a row does not have is None there."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    return {"columns": columns, "data": [[_cell(row.get(key)) for key in columns] for row in rows]}


def samples(rows: list[dict[str, Any]], folder: Path) -> list[dict[str, Any]]:
    """The answers whose picture is in a folder, as ``<number of the row>.webp``, with the picture as MLflow's tables
    show it: by its place among the run's artifacts."""
    found = []
    for path in sorted(folder.glob("*.webp")):
        place = f"evaluation/{folder.name}/{path.name}"
        picture = {"type": "image", "filepath": place, "compressed_filepath": place}
        found.append({"picture": picture} | {key: rows[int(path.stem)].get(key) for key in SAMPLE_COLUMNS})
    return found


def _cell(value: Any) -> Any:
    if isinstance(value, dict) and value.get("type") == "image":
        return value
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return json.dumps(value) if isinstance(value, dict | list) else value


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=10, check=True)
    return done.stdout.strip()


def _of_interval(name: str, found: Interval | None) -> Iterator[tuple[str, float]]:
    if found is not None:
        yield from ((name, found.mean), (f"{name}_low", found.low), (f"{name}_high", found.high))


def _of_likely(condition: str, likely: Likely) -> Iterator[tuple[str, float | None]]:
    yield f"eval/loss{condition}", likely.loss
    yield f"eval/likelihood{condition}", likely.likelihood
    for kind, value in likely.likelihood_by_kind.items():
        yield f"eval/likelihood{condition}/{metric_part(kind)}", value


def _of_score(condition: str, score: Score) -> Iterator[tuple[str, float | None]]:
    yield f"eval/exact_match{condition}", score.exact_match
    yield f"eval/chrf{condition}", score.chrf
    yield f"eval/rouge_l{condition}", score.rouge_l
    for kind, value in score.by_kind.items():
        yield f"eval/exact_match{condition}/{metric_part(kind)}", value
    yield from _of_likely(condition, score)


def _flatten(prefix: str, value: Any) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from _flatten(f"{prefix}.{re.sub(r'[^A-Za-z0-9_.: /-]', '_', str(key))}", item)
    else:
        yield prefix, value if isinstance(value, str) else json.dumps(value)
