"""A sweep: which combinations there are, and what their results say together."""

from __future__ import annotations

import json
import math
import shlex
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from llava_pipeline.contracts import Combination, Evaluation, Setting, SweepRun, Swept, Trial
from llava_pipeline.errors import NothingTrained, SpecError
from llava_pipeline.evaluation.score import mean
from llava_pipeline.spec import RunSpec, load_spec
from llava_pipeline.tracking import sweeps
from llava_pipeline.tracking.settings import load_settings

MAX_COMBINATIONS = 64
COLORS = ("#1f4e8c", "#d9a441", "#1a7f37", "#c62828", "#6a51a3", "#9e9e9e")


def combinations(
    spec: RunSpec, learning_rates: Iterable[float], warmup_shares: Iterable[float], seeds: Iterable[int]
) -> list[Combination]:
    """Every learning rate with every warm-up and every seed; what is named twice counts once.

    Raises:
        SpecError: there are more than 64, or a learning rate lies below the one that the cosine ends with.
    """
    axes = [list(dict.fromkeys(values)) for values in (learning_rates, warmup_shares, seeds)]
    number = math.prod(len(axis) for axis in axes)
    if number > MAX_COMBINATIONS:
        counts = " x ".join(str(len(axis)) for axis in axes)
        raise SpecError(
            f"{counts} = {number} combinations of learning rate, warm-up and seed are more than {MAX_COMBINATIONS}; "
            "leave some out"
        )
    training = spec.training
    if training.schedule == "cosine" and (low := [rate for rate in axes[0] if rate < training.min_learning_rate]):
        raise SpecError(
            f"a learning rate of {min(low):g} lies below training.min_learning_rate={training.min_learning_rate:g}, "
            "where the cosine ends; lower that, or leave the rate out"
        )
    return [Combination(learning_rate=r, warmup_share=w, seed=int(s)) for r, w, s in product(*axes)]


def spec_with(spec: RunSpec, combination: Combination) -> RunSpec:
    """The spec with a combination's values in place of its own."""
    return spec.model_copy(update={"training": spec.training.model_copy(update=combination.model_dump())})


def begin_trial(run: SweepRun, spec: RunSpec, combination: Combination) -> str:
    """Id of the run of one combination, whose spec is given; see ``sweeps.begin_trial``."""
    return sweeps.begin_trial(run, spec, named(combination), load_settings())


def record_trial(
    run: SweepRun, run_id: str, spec: RunSpec, combination: Combination, evaluation: Evaluation
) -> Trial:  # fmt: skip
    """Record one combination's result; one whose answers have no likelihood has failed."""
    settings = load_settings()
    trial = trial_of(combination, run_id, evaluation)
    if trial.failure is not None:
        sweeps.fail(run_id, trial.failure, settings)
        return trial
    recorded = sweeps.record_trial(run, run_id, spec, named(combination), evaluation, settings)
    return trial.model_copy(update={"run_id": recorded})


def record_sweep(run: SweepRun, found: Swept) -> None:
    """Write table, page, picture and the best values with the sweep's run."""
    best = found.settings[0]
    metrics = {
        "sweep/num_trials": len(found.trials), "sweep/num_failed": sum(bool(t.failure) for t in found.trials),
        "sweep/best_likelihood": best.likelihood, "sweep/best_learning_rate": best.learning_rate,
        "sweep/best_warmup_share": best.warmup_share,
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        save_picture(found, Path(folder) / "sweep.png")
        there = {key: float(value) for key, value in metrics.items() if value is not None}
        sweeps.finish(run, rows(found), report(found), Path(folder) / "sweep.png", there, load_settings())


def trial_of(combination: Combination, run_id: str, evaluation: Evaluation) -> Trial:
    """The numbers of an evaluation by which combinations are compared; one without a likelihood has failed."""
    right, gain = evaluation.right_image, evaluation.grounding
    if right.likelihood is None or not math.isfinite(right.likelihood):
        return Trial(combination=combination, run_id=run_id, failure="the likelihood of its answers is no number")
    return Trial(
        combination=combination, run_id=run_id, likelihood=right.likelihood, exact_match=right.exact_match,
        grounding_gain=None if gain is None else gain.over_shuffled.mean,
        held_out_loss=_finite(evaluation.projector.held_out_loss),
    )  # fmt: skip


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def swept(run: SweepRun, profile: str, spec: RunSpec, trials: Sequence[Trial]) -> Swept:
    """What all trials say together.

    Args:
        run: the parent in MLflow.
        profile: name or path, as it was asked for.
        spec: that the trials have in common.
        trials: in any order.

    Raises:
        NothingTrained: all have failed.
    """
    if all(trial.failure for trial in trials):
        raise NothingTrained(
            f"none of {len(trials)} combinations could be trained; the first one: {trials[0].failure}; "
            "try lower learning rates"
        )
    settings = ranked(trials)
    return Swept(
        run_id=run.run_id, experiment_id=run.experiment_id, profile=spec.profile, trials=tuple(trials),
        settings=tuple(settings), night=f"llava-pipeline run {arguments(profile, spec, settings[0])}",
    )  # fmt: skip


def arguments(profile: str, spec: RunSpec, best: Setting) -> str:
    """The best setting as arguments of ``llava-pipeline run``, with all else that is not as in the profile."""
    own = load_spec(profile).model_dump(mode="json")
    wanted = spec.model_dump(mode="json")
    wanted["training"] |= {"learning_rate": best.learning_rate, "warmup_share": best.warmup_share}
    said = [f"training.{name}={json.dumps(getattr(best, name))}" for name in ("learning_rate", "warmup_share")]
    said += [one for one in _changes("", own, wanted) if one not in said]
    return shlex.join(["--profile", profile, *(part for one in said for part in ("--set", one))])


def _changes(prefix: str, own: dict[str, Any], wanted: dict[str, Any]) -> Iterator[str]:
    """``a.b=value`` for every value that is another one; what has kinds is named whole where the kind is another."""
    for key, value in wanted.items():
        there = own.get(key)
        if isinstance(value, dict) and isinstance(there, dict) and value.get("kind") == there.get("kind"):
            yield from _changes(f"{prefix}{key}.", there, value)
        elif value != there:
            yield f"{prefix}{key}={json.dumps(value)}"


def ranked(trials: Sequence[Trial]) -> list[Setting]:
    """Every learning rate and warm-up over its seeds, by mean likelihood; one with a seed that failed comes behind."""
    pairs = dict.fromkeys((t.combination.learning_rate, t.combination.warmup_share) for t in trials)
    found = [
        _setting([t for t in trials if (t.combination.learning_rate, t.combination.warmup_share) == pair])
        for pair in pairs
    ]
    return sorted(found, key=lambda one: (one.likelihood is None, one.num_failed > 0, -(one.likelihood or 0.0)))


def _setting(trials: Sequence[Trial]) -> Setting:
    likely = [trial.likelihood for trial in trials if trial.likelihood is not None]
    return Setting(
        learning_rate=trials[0].combination.learning_rate, warmup_share=trials[0].combination.warmup_share,
        num_seeds=len(likely), num_failed=len(trials) - len(likely), likelihood=_mean(likely),
        lowest=min(likely, default=None), highest=max(likely, default=None),
        exact_match=_mean(trial.exact_match for trial in trials),
        held_out_loss=_mean(trial.held_out_loss for trial in trials),
    )  # fmt: skip


def _mean(values: Iterable[float | None]) -> float | None:
    there = [value for value in values if value is not None]
    return mean(there) if there else None


def report(found: Swept) -> str:
    """A page of Markdown: the settings, the best one first, every trial that failed, and the command for a night."""
    lines = [
        f"# Sweep of {found.profile}: {len(found.trials)} combinations", "",
        "| learning rate | warm-up | likelihood | over seeds | exact match | held-out loss | trained |",
        "|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for one in found.settings:
        spread = "-" if one.lowest is None else f"{number(one.lowest)} to {number(one.highest)}"
        lines.append(
            f"| {one.learning_rate:g} | {one.warmup_share:g} | {number(one.likelihood)} | {spread} "
            f"| {number(one.exact_match)} | {number(one.held_out_loss)} "
            f"| {one.num_seeds} of {one.num_seeds + one.num_failed} |"
        )
    failed = [trial for trial in found.trials if trial.failure]
    if failed:
        lines += ["", "## Failed", ""]
        lines += [f"- {named(trial.combination)}: {trial.failure}" for trial in failed]
    lines += [
        "", "The best one as a night. A likelihood that was chosen among many flatters; other rows tell its worth.", "",
        "```bash", found.night, "```",
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def named(combination: Combination) -> str:
    """A combination in words, which is also the name of its run."""
    return f"lr {combination.learning_rate:g}, warm-up {combination.warmup_share:g}, seed {combination.seed}"


def number(value: float | None) -> str:
    """For a table."""
    return "-" if value is None else f"{value:.4f}"


def rows(found: Swept) -> list[dict[str, object]]:
    """One row per trial, for a table that MLflow's pages show."""
    return [
        trial.combination.model_dump() | trial.model_dump(exclude={"combination"}, mode="json")
        for trial in found.trials
    ]


def save_picture(found: Swept, path: Path) -> None:
    """Likelihood over learning rate, one line per warm-up through the means, with the spread over seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(6, 3.6))
    trained = sorted((one for one in found.settings if one.likelihood is not None), key=lambda one: one.learning_rate)
    for place, warmup in enumerate(sorted({one.warmup_share for one in trained})):
        line = [one for one in trained if one.warmup_share == warmup]
        rates, color = [one.learning_rate for one in line], COLORS[place % len(COLORS)]
        means, low, high = ([getattr(one, name) for one in line] for name in ("likelihood", "lowest", "highest"))
        axis.fill_between(rates, low, high, color=color, alpha=0.15, linewidth=0)
        axis.plot(rates, means, color=color, marker="o", markersize=4, label=f"warm-up {warmup:g}")
    for trial in found.trials:
        if trial.likelihood is not None:
            axis.plot(trial.combination.learning_rate, trial.likelihood, ".", color="#9e9e9e", markersize=4, zorder=3)
    axis.set_xscale("log")
    axis.set_xlabel("learning rate")
    axis.set_ylabel("likelihood of the true answer")
    axis.set_title("each point a seed, the lines their means", fontsize=9)
    axis.legend(frameon=False, fontsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
