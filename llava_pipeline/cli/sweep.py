"""``llava-pipeline sweep``: which learning rate, which warm-up, and how much a seed matters."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Annotated

import typer

from llava_pipeline.cli import show
from llava_pipeline.cli.app import AsJson, Overrides, Profile, app, debugging, read_spec

if TYPE_CHECKING:
    from llava_pipeline.contracts import Swept


@app.command()
def sweep(
    rates: Annotated[list[float], typer.Option("--learning-rate", help="Peak learning rate to try. Repeatable.")],
    warmups: Annotated[
        list[float] | None, typer.Option("--warmup", min=0, help="Share that warms up; the profile's. Repeatable.")
    ] = None,
    seeds: Annotated[
        list[int] | None, typer.Option("--seed", min=0, help="Seed of the order; the profile's. Repeatable.")
    ] = None,
    profile: Profile = "pocket",
    overrides: Overrides = [],  # noqa: B006
    as_json: AsJson = False,
) -> None:
    """Train with every combination on the same data and features, and compare; nothing is registered."""
    training = read_spec(profile, overrides).training
    found = run_sweep(
        profile, overrides, rates, warmups or [training.warmup_share], [training.seed] if seeds is None else seeds
    )
    show.document(found.model_dump(mode="json")) if as_json else told(found)


def run_sweep(
    profile: str, overrides: list[str], rates: list[float], warmups: list[float], seeds: list[int]
) -> Swept:  # fmt: skip
    """Run the Prefect flow in this process.

    Raises:
        SpecError: values out of range, or too many combinations.
        TrackingError: MLflow cannot be reached; nothing has been started then.
    """
    from flows.local import local_defaults
    from llava_pipeline.tracking.client import check_reachable
    from llava_pipeline.tracking.settings import load_settings

    check_reachable(load_settings())
    local_defaults(debug=debugging())
    logging.getLogger("llava_pipeline").info("starting Prefect (the first time takes half a minute) ...")
    from flows.sweep import sweep_as_asked

    return sweep_as_asked(profile, overrides, rates, warmups, seeds)


def told(found: Swept) -> None:
    """Every setting, the best one first, what failed, and the command for a night."""
    from rich.console import Console

    from llava_pipeline.stages.sweep import named, number

    console = Console()
    made = show.table("learning rate", "warm-up", "likelihood", "lowest", "highest", "exact match", "trained")
    for one in found.settings:
        made.add_row(
            f"{one.learning_rate:g}", f"{one.warmup_share:g}", number(one.likelihood), number(one.lowest),
            number(one.highest), show.percent(one.exact_match), f"{one.num_seeds} of {one.num_seeds + one.num_failed}",
        )  # fmt: skip
    console.print(made)
    for trial in found.trials:
        if trial.failure:
            console.print(f"{named(trial.combination)} failed: {trial.failure}", highlight=False, markup=False)
    print(f"The best one as a night:\n  {found.night}")
