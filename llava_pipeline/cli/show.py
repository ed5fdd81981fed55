"""How results look on a terminal: tables where people compare, sentences where they read, JSON for machines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from collections.abc import Sequence

    from llava_pipeline.contracts import ValidatedData
    from llava_pipeline.model.plan import Plan
    from llava_pipeline.spec import RunSpec

CONDITIONS = (("right picture", ""), ("shuffled pictures", "_shuffled"), ("untrained projector", "_untrained"))


def document(content: Any) -> None:
    """One JSON document on one line, the last of stdout."""
    print(json.dumps(content, sort_keys=True, allow_nan=False), flush=True)


def table(*columns: str) -> Table:
    """A table in the house style; every column but the first is for numbers."""
    made = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for number, column in enumerate(columns):
        made.add_column(column, justify="left" if number == 0 else "right", overflow="fold", no_wrap=number == 0)
    return made


def plan(made: Plan, spec: RunSpec) -> None:
    """A plan as tables: parts, facts, memory by part, devices; and what would have to change where it does not fit."""
    console, first = Console(), made.devices[0]
    console.print(f"[bold]{made.profile}[/], stage {made.stage}  {spec.title}", highlight=False)
    parts = table("part", "parameters", "")
    for part, count in made.num_by_part.items():
        parts.add_row(part, f"{count:,}", "trained" if made.trainable_by_part.get(part) else "frozen")
    parts.add_row("all", f"{made.num_total:,}", f"{made.num_trainable:,} trained")
    console.print(parts)
    facts = table("what", "how much")
    facts.add_row("image tokens per picture", str(made.num_image_tokens))
    facts.add_row("tokens per sample (estimate)", str(made.tokens_per_sample_estimate))
    facts.add_row("operations per sample, in all", f"{flops(made.flops_per_sample)}, {flops(made.flops_training)}")
    facts.add_row("training", f"{made.num_steps} steps of {made.samples_per_step} samples")
    for item in made.downloads:
        places = [place for place in (item, item.otherwise) if place is not None]
        sizes = [f"{place.num_bytes / 1e6:,.0f} MB" if place.num_bytes else "size not known before" for place in places]
        told = [f"{size}, {place.source}" for size, place in zip(sizes, places, strict=True)]
        facts.add_row(f"download: {item.what}", "\nor, without the hub, ".join(told))
    if not made.downloads:
        facts.add_row("download", "nothing")
    console.print(facts)
    memory = table(f"memory on {first.title}, {first.precision} (estimate)", "GB")
    for part, count in first.memory_by_part.items():
        memory.add_row(part, f"{count / 1e9:.2f}")
    memory.add_row("all", f"{first.memory_bytes / 1e9:.2f}", style="bold")
    console.print(memory)
    plan_devices(console, made)
    console.print(f"Stated cost: {spec.cost}", highlight=False)


def plan_devices(console: Console, made: Plan) -> None:
    """All devices side by side, and below them what would have to change on those that are too small."""
    devices = table("device (estimates)", "GB", "of", "fits", "training", "evaluation", "price")
    for one in made.devices:
        devices.add_row(
            one.title, f"{one.memory_bytes / 1e9:.1f}", f"{(one.device_memory_bytes - one.reserve_bytes) / 1e9:.1f}",
            "yes" if one.fits else "no", duration(one.training_seconds), duration(one.evaluation_seconds),
            "-" if one.price is None else f"${one.price:,.2f}",
        )  # fmt: skip
    console.print(devices)
    for one in made.devices:
        if one.note:
            console.print(f"{one.title}: {one.note}", highlight=False)
        if one.remedies:
            told = "; then ".join(
                f"{each.change} ({each.memory_bytes / 1e9:.1f} GB{', fits' if each.fits else ''})"
                for each in one.remedies[:-1]
            )
            last = one.remedies[-1]
            console.print(
                f"To fit {one.title}: {told + '; or ' if told else ''}{last.change} ({last.memory_bytes / 1e9:.1f} GB)",
                highlight=False, markup=False,
            )  # fmt: skip
    if not any(one.price_from for one in made.devices):
        return
    machine = max(one.host_memory_bytes for one in made.devices)
    sources = "; ".join(dict.fromkeys(one.price_from for one in made.devices if one.price_from))
    console.print(
        f"The machine itself needs {machine / 1e9:.1f} GB while weights are read. List prices: {sources}.",
        highlight=False,
    )


def flops(count: float) -> str:
    """``1.23 TFLOP``."""
    for unit, size in (("EFLOP", 1e18), ("PFLOP", 1e15), ("TFLOP", 1e12)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count / 1e9:.1f} GFLOP"


def duration(seconds: float) -> str:
    """``45 s``, ``3.2 min`` or ``1.5 h``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def percent(value: float | None) -> str:
    """``93.1 %``, or a dash."""
    return "-" if value is None else f"{100 * value:.1f} %"


def number(value: float | None) -> str:
    """``0.067``, or a dash for what is no number."""
    return "-" if value is None else f"{value:.3f}"


def result(row: dict[str, Any]) -> None:
    """A run's scores by kind and condition, and what the gate said."""
    console, metrics, verdict = Console(), row["metrics"], row["verdict"]
    kinds = [key.removeprefix("eval/exact_match/") for key in metrics if key.startswith("eval/exact_match/")]
    scores = table("exact match", *(name for name, _ in CONDITIONS), "blind guess")
    for kind in ["", *sorted(kinds)]:
        tail = f"/{kind}" if kind else ""
        told = [percent(metrics.get(f"eval/exact_match{suffix}{tail}")) for _, suffix in CONDITIONS]
        scores.add_row(
            kind or "all", *told, percent(metrics.get(f"eval/blind_rate{tail}")), style="" if kind else "bold"
        )
    console.print(scores)
    params = row["params"]
    console.print(
        f"{params.get('num_learned', params['num_trainable']):,} of {params['num_total']:,} parameters were trained; "
        f"the frozen ones are unchanged: {'yes' if row['frozen_digests_equal'] else 'NO'}.\n"
        f"Training took {duration(metrics['train/seconds'])} on {row['device']}, "
        f"loss {number(metrics['train/final_loss'])}; "
        f"held-out loss {number(metrics['eval/loss'])}, "
        f"with shuffled pictures {number(metrics['eval/loss_shuffled'])}.",
        highlight=False,
    )
    if verdict["decision"] == "promoted":
        before = f" in place of version {verdict['previous']}" if verdict["previous"] else ""
        console.print(
            f"Version {verdict['version']} of {verdict['registered_model']} is now champion{before}.", highlight=False
        )
        return
    champion = f"version {verdict['champion']} stays champion" if verdict["champion"] else "there is no champion"
    console.print(
        f"Version {verdict['version']} of {verdict['registered_model']} is a challenger; {champion}.", highlight=False
    )
    refused(console, verdict["rules"])
    if all(rule["passed"] for rule in verdict["rules"]):
        console.print(
            f"It passed the gate and waits for a person: llava-pipeline promote {verdict['version']} --profile "
            f"{row['profile']} --reason ...", highlight=False,
        )  # fmt: skip


def refused(console: Console, rules: list[dict[str, Any]]) -> None:
    """Each rule that was failed: what was found, and what would have to change."""
    for rule in rules:
        if not rule["passed"]:
            told = f"- {rule['name'].replace('_', ' ')}: {rule['found']}.\n  To change: {rule['remedy']}."
            console.print(told, highlight=False, markup=False)


def validated(data: ValidatedData, page: Path) -> None:
    """Both snapshots side by side, and where the report lies."""
    console = Console()
    both = (data.train, data.held_out)
    facts = table("rows", "training", "held out")
    facts.add_row("read", *(f"{snapshot.num_read:,}" for snapshot in both))
    facts.add_row("kept", *(f"{snapshot.num_kept:,}" for snapshot in both), style="bold")
    for reason in sorted({*data.train.rejected, *data.held_out.rejected}):
        facts.add_row(f"refused: {reason}", *(f"{snapshot.rejected.get(reason, 0):,}" for snapshot in both))
    facts.add_row("left in the source", *("-" if s.num_left is None else f"{s.num_left:,}" for s in both))
    facts.add_row("pictures", *(f"{snapshot.num_images:,}" for snapshot in both))
    facts.add_row("of them look like another", *(f"{snapshot.num_near_duplicates:,}" for snapshot in both))
    facts.add_row("tokens", *(f"{snapshot.num_tokens:,}" for snapshot in both))
    facts.add_row("of them supervised", *(f"{snapshot.num_supervised_tokens:,}" for snapshot in both))
    facts.add_row("digest", *(snapshot.rows.digest[:12] for snapshot in both))
    console.print(f"[bold]{data.train.origin}[/]", highlight=False)
    console.print(facts)
    console.print(f"Report: {page}", highlight=False, soft_wrap=True)


def pages(pictures: list[Path], spec: RunSpec, decision: str) -> None:
    """Where to look next."""
    import shlex

    from llava_pipeline.store import home
    from llava_pipeline.tracking.settings import is_server, load_settings, server_environment, tracking_uri, ui_command

    settings = load_settings()
    uri = tracking_uri(settings)
    variables = " ".join(f"{name}={value}" for name, value in server_environment(settings).items())
    own_pages = (
        f"{variables} {shlex.join(['.venv/bin/mlflow', *ui_command(settings)[1:]])}" if not is_server(uri) else ""
    )
    mlflow = own_pages or f"open {uri}"
    prefect = f"PREFECT_HOME={shlex.quote(str(home() / 'prefect'))} .venv/bin/prefect server start"
    ask = f".venv/bin/llava-pipeline chat {shlex.quote(str(pictures[-1]))} 'How many shapes are there?'"
    if spec.profile != "pocket":
        ask += f" --profile {spec.profile}"
    if decision != "promoted":
        ask += " --run challenger"
    print("\nPictures:")
    for path in pictures:
        print(f"  {path}")
    print(f"Runs, curves, answers in MLflow (then open http://{settings.ui.host}:{settings.ui.port}):\n  {mlflow}")
    print(f"The flow's stages in Prefect (then open http://127.0.0.1:4200):\n  {prefect}")
    print(f"Ask it yourself:\n  {ask}")
    serve = ".venv/bin/llava-pipeline serve" + ("" if spec.profile == "pocket" else f" --profile {spec.profile}")
    if decision != "promoted":
        serve += " --alias challenger"
    print(f"Or on a page, and from programs (then open http://127.0.0.1:8000):\n  {serve}")


def serving(told: dict[str, Any], aliases: Sequence[str]) -> None:
    """What answers, where, and how to ask."""
    url = told["url"]
    models = ", ".join(aliases)
    print(f"version {told['version']} of {told['model']} answers; Ctrl-C ends it")
    print(f"  a page to talk to   {url}/")
    print(f"  OpenAI's clients    base_url={url}/v1 model={models}")
    print(f"  is it well?         {url}/readyz {url}/metrics", flush=True)


def stage(row: dict[str, Any]) -> str:
    """A run's stage, and the version or run it has gone on from."""
    if (begin := row.get("began_with")) is None:
        return str(row.get("stage") or "-")
    return f"{row['stage']} from {begin['version'] or begin['run_id'][:8]}"


def runs(rows: list[dict[str, Any]]) -> None:
    """The runs as a table, the newest first."""
    if not rows:
        print("no runs yet; start one with: llava-pipeline run --profile pocket")
        return
    listing = table("run", "stage", "status", "took", "match", "shuffled", "ver.", "alias")
    for row in rows:
        metrics, seconds = row["metrics"], row["duration_seconds"]
        listing.add_row(
            row["name"], stage(row), row["status"], "-" if seconds is None else duration(seconds),
            percent(metrics.get("eval/exact_match")), percent(metrics.get("eval/exact_match_shuffled")),
            row["version"] or "-", ", ".join(row["aliases"]) or "-",
        )  # fmt: skip
    Console().print(listing)
