"""``llava-pipeline evaluate`` and ``gate``: what was recorded, asked and judged again."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from llava_pipeline.cli import show
from llava_pipeline.cli.app import AsJson, Profile, app, registered_model_of, who_am_i

if TYPE_CHECKING:
    from llava_pipeline.contracts import Reexamined, Verdict


@app.command()
def evaluate(
    which: Annotated[str, typer.Argument(help="Alias, version or run id of the projector.")],
    on: Annotated[
        str | None, typer.Option("--on", help="Another source: scenes, easy-vqa, a file (POPE's too) or folder.")
    ] = None,
    images: Annotated[str | None, typer.Option("--images", help="Folder that paths in the rows start from.")] = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Rows to ask about; all.")] = None,
    profile: Profile = "pocket",
    as_json: AsJson = False,
) -> None:
    """Ask a recorded projector again: its own held-out questions, or those of another source."""
    from llava_pipeline.stages.recorded import evaluate_recorded
    from llava_pipeline.tracking.settings import load_settings

    found = evaluate_recorded(which, registered_model_of(profile), on, images, limit, load_settings())
    show.document(found.model_dump(mode="json")) if as_json else told(found)


@app.command()
def gate(
    which: Annotated[str, typer.Argument(help="Version to judge, or its alias.")],
    profile: Profile = "pocket",
    as_json: AsJson = False,
) -> None:
    """Judge a version again, against the champion of now; it is promoted as after a training, if it passes."""
    from llava_pipeline.stages.recorded import judge_again
    from llava_pipeline.tracking.settings import load_settings

    verdict = judge_again(which, registered_model_of(profile), who_am_i(), load_settings())
    show.document(verdict.model_dump(mode="json")) if as_json else judged(verdict)


def told(found: Reexamined) -> None:
    """Scores by kind and condition, and what the picture is worth."""
    from rich.console import Console

    console, right, other = Console(), found.right_image, found.shuffled_image
    made = show.table("question", "exact match", "shuffled", "likelihood", "shuffled", "no picture")
    for kind in ["", *sorted(right.by_kind)]:
        likely = [
            part.likelihood_by_kind.get(kind) if kind else part.likelihood for part in (right, other, found.no_image)
        ]
        hits = [score.by_kind[kind] if kind else score.exact_match for score in (right, other)]
        made.add_row(kind or "all", *map(show.percent, hits), *map(show.number, likely), style="" if kind else "bold")
    console.print(made)
    console.print(f"{found.num_questions:,} questions of {found.held_out.origin}.", highlight=False)
    if found.grounding is not None:
        gain = found.grounding.over_shuffled
        console.print(
            f"The right picture is worth {gain.mean:.3f} nats per token over another one "
            f"(95 % interval {gain.low:.3f} to {gain.high:.3f}).", highlight=False,
        )  # fmt: skip
    if (asked := found.yes_no) is not None:
        console.print(
            f"Yes or no, by likelihood: {asked.accuracy:.1%} right of {asked.num_questions:,}; it says yes to "
            f"{asked.yes_rate:.1%}, true is {asked.true_yes_rate:.1%}.", highlight=False,
        )  # fmt: skip


def judged(verdict: Verdict) -> None:
    """Every rule, and what would have to change."""
    from rich.console import Console
    from rich.markup import escape

    console = Console()
    made = show.table("rule", "", "found")
    made.columns[2].justify = "left"
    for rule in verdict.rules:
        # What was found holds intervals in brackets, which rich would take for its markup.
        made.add_row(rule.name.replace("_", " "), "pass" if rule.passed else "[bold red]FAIL[/]", escape(rule.found))
    console.print(made)
    show.refused(console, [rule.model_dump() for rule in verdict.rules])
    outcome = "is champion" if verdict.decision == "promoted" else "passed" if verdict.passed else "was refused"
    console.print(f"Version {verdict.version} of {verdict.registered_model} {outcome}.", highlight=False)
