"""``llava-pipeline gc | doctor | backup | restore``: keep an installation well."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from llava_pipeline.cli import show
from llava_pipeline.cli.app import AsJson, Profile, app, debugging, read_spec

if TYPE_CHECKING:
    from llava_pipeline.operations.finding import Finding
    from llava_pipeline.operations.garbage import Item

KeepRuns = Annotated[int, typer.Option("--keep-runs", min=0, help="Newest runs whose files are kept whole.")]
STYLES = {"ok": "green", "warning": "yellow", "problem": "bold red"}


@app.command()
def gc(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be deleted, and delete nothing.")] = False,
    keep_runs: KeepRuns = 5,
    as_json: AsJson = False,
) -> None:
    """Delete from the home what no alias, version, running job or newest run needs. All of it can be made anew."""
    from llava_pipeline.operations.garbage import collect
    from llava_pipeline.tracking.settings import load_settings

    items = collect(load_settings(), keep_runs, dry_run=dry_run)
    freed = sum(item.num_bytes for item in items if item.deleted)
    if as_json:
        listed = [item.model_dump(mode="json") for item in items]
        show.document({"dry_run": dry_run, "freed_bytes": freed, "items": listed})
        return
    _show_items(items)
    verb = "would be freed; nothing was deleted" if dry_run else "were freed"
    print(f"{freed / 1e6:,.1f} MB {verb}. MLflow's files of deleted runs are removed by `mlflow gc`.")


@app.command()
def doctor(profile: Profile = "pocket", as_json: AsJson = False) -> None:
    """Look at everything a night needs, and say what to do where something is wrong. Nothing is changed.

    Exit code 1 where there is a problem; warnings do not count.
    """
    spec = read_spec(profile, [])
    from flows.local import local_defaults
    from llava_pipeline.operations.doctor import examine
    from llava_pipeline.tracking.settings import load_settings

    settings = load_settings()
    found = examine(settings, spec)
    local_defaults(debug=debugging())
    from flows.findings import findings

    found += findings(settings.prefect.api_url)
    is_well = not any(finding.status == "problem" for finding in found)
    if as_json:
        show.document({"well": is_well, "findings": [finding.model_dump(mode="json") for finding in found]})
    else:
        _show_findings(found)
    if not is_well:
        raise typer.Exit(1)


@app.command()
def backup(
    folder: Annotated[Path, typer.Argument(help="A new folder; it is there when it is whole.")],
    as_json: AsJson = False,
) -> None:
    """Copy MLflow's and Prefect's databases and all artifacts into a folder, while the servers run."""
    from llava_pipeline.operations.backup import make
    from llava_pipeline.tracking.settings import load_settings

    made = make(folder, load_settings())
    if as_json:
        show.document(made.model_dump(mode="json") | {"folder": str(folder.absolute())})
        return
    size = sum(file.num_bytes for file in made.files.values())
    print(f"{len(made.files)} files, {size / 1e6:,.1f} MB, are in {folder}.")
    for note in made.notes:
        print(f"  note: {note}")


@app.command()
def restore(
    folder: Annotated[Path, typer.Argument(help="What `backup` has made.")],
    replace: Annotated[bool, typer.Option("--replace", help="Put aside what is there.")] = False,
    as_json: AsJson = False,
) -> None:
    """Put databases and artifacts of a backup where the settings say; the servers must be down."""
    from llava_pipeline.operations.restore import put_back
    from llava_pipeline.tracking.settings import load_settings

    done = put_back(folder, load_settings(), replace=replace)
    if as_json:
        show.document(done.model_dump(mode="json"))
        return
    for place in done.restored:
        print(f"restored: {place}")
    for place in done.aside:
        print(f"what was there before is in {place}")
    for note in done.notes:
        print(f"  note: {note}")


def _show_items(items: list[Item]) -> None:
    groups: dict[tuple[str, bool, str], list[int]] = {}
    for item in items:
        # Runs and versions by name would be a line each; the table has their kinds, --json has each.
        why = item.why.split(" (")[0] if item.deleted else _kind_of_reason(item.why)
        groups.setdefault((item.kind, item.deleted, why), []).append(item.num_bytes)
    table = show.table("what", "number", "MB", "", "why")
    for (kind, deleted, why), sizes in sorted(groups.items()):
        fate = "[red]deleted[/]" if deleted else "kept"
        table.add_row(kind, f"{len(sizes):,}", f"{sum(sizes) / 1e6:,.1f}", fate, why)
    Console().print(table)


def _kind_of_reason(why: str) -> str:
    for start, kind in (
        ("needed by version", "needed by a version"),
        ("needed by run", "needed by one of the newest runs"),
    ):
        if why.startswith(start):
            return kind
    return why


def _show_findings(found: list[Finding]) -> None:
    from rich.markup import escape

    table = show.table("what", "", "found")
    table.columns[1].justify = table.columns[2].justify = "left"
    for finding in found:
        style = STYLES[finding.status]
        told = escape(finding.found) + (f"\n[dim]to do:[/] {escape(finding.remedy)}" if finding.remedy else "")
        table.add_row(finding.name, f"[{style}]{finding.status}[/]", told)
    Console().print(table)
