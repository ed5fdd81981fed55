"""``llava-pipeline promote | rollback | history | delete``: who is champion, who was, and who said so."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from llava_pipeline.cli import show
from llava_pipeline.cli.app import AsJson, Profile, app, registered_model_of, who_am_i

if TYPE_CHECKING:
    from llava_pipeline.tracking.promotion import Moved

Reason = Annotated[str, typer.Option("--reason", help="Why; it stands in the history.")]


@app.command()
def promote(
    version: Annotated[str, typer.Argument(help="Version to make champion.")],
    reason: Reason,
    profile: Profile = "pocket",
    despite_gate: Annotated[bool, typer.Option("--despite-gate", help="Though the gate did not pass it.")] = False,
    as_json: AsJson = False,
) -> None:
    """Make a version the champion that the gate has passed; it is compared with the champion that the gate saw."""
    from llava_pipeline.tracking.promotion import promote_by_person
    from llava_pipeline.tracking.settings import load_settings

    moved = promote_by_person(
        registered_model_of(profile), version, load_settings(), who=who_am_i(), why=reason, despite_gate=despite_gate
    )
    show.document(moved.model_dump(mode="json")) if as_json else told(moved)


@app.command()
def rollback(
    version: Annotated[str | None, typer.Argument(help="A former champion; the previous one.")] = None,
    reason: Reason = "rolled back",
    profile: Profile = "pocket",
    as_json: AsJson = False,
) -> None:
    """Make a former champion the champion again."""
    from llava_pipeline.tracking import promotion
    from llava_pipeline.tracking.settings import load_settings

    moved = promotion.rollback(registered_model_of(profile), version, load_settings(), who=who_am_i(), why=reason)
    show.document(moved.model_dump(mode="json")) if as_json else told(moved)


@app.command()
def history(
    profile: Profile = "pocket",
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, help="How many, the newest first.")] = 20,
    as_json: AsJson = False,
) -> None:
    """Who moved the champion, when, why, from where to where."""
    from llava_pipeline.tracking.history import history as read_history
    from llava_pipeline.tracking.settings import load_settings

    name = registered_model_of(profile)
    events = read_history(name, load_settings())[:limit]
    if as_json:
        show.document(events)
        return
    if not events:
        print(f"nothing has happened to {name} yet")
        return
    from rich.console import Console

    columns = ("when", "action", "from", "to", "who", "why", "outcome")
    made = show.table(*columns)
    for event in events:
        made.add_row(*(str(event.get(column) or "-") for column in columns))
    Console().print(made)


@app.command()
def delete(
    version: Annotated[str, typer.Argument(help="Version to delete; its run stays.")],
    reason: Reason = "deleted",
    profile: Profile = "pocket",
    as_json: AsJson = False,
) -> None:
    """Delete a version that no alias points to."""
    from llava_pipeline.tracking.promotion import delete_version
    from llava_pipeline.tracking.settings import load_settings

    name = registered_model_of(profile)
    delete_version(name, version, load_settings(), who=who_am_i(), why=reason)
    if as_json:
        show.document({"registered_model": name, "deleted": version})
    else:
        print(f"Version {version} of {name} is deleted.")


def told(moved: Moved) -> None:
    """One sentence on what moved."""
    if not moved.changed:
        print(f"Version {moved.champion} of {moved.registered_model} is champion already.")
        return
    previous = f"; version {moved.previous} is previous" if moved.previous else ""
    print(f"Version {moved.champion} of {moved.registered_model} is now champion{previous}.")
