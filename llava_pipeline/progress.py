"""Progress on stderr: a bar where a person watches, two plain lines where a log does."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

QUIET_SECONDS = 2.0


@contextmanager
def bar(description: str, total: float | None = None) -> Iterator[Callable[..., None]]:
    """A bar; the value is ``advance(n=1, **fields)``, whose fields (``loss=0.5``) stand at the bar's end."""
    drawn = _terminal_bar if sys.stderr is not None and sys.stderr.isatty() else _plain_lines
    with drawn(description, total) as advance:
        yield advance


@contextmanager
def _terminal_bar(description: str, total: float | None) -> Iterator[Callable[..., None]]:
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[shown]}", markup=False),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(escape(description), total=total, shown="")

        def advance(n: float = 1, **fields: object) -> None:
            if fields:
                progress.update(task, shown=_shown(fields))
            progress.advance(task, n)

        yield advance


@contextmanager
def _plain_lines(description: str, total: float | None) -> Iterator[Callable[..., None]]:
    started = time.monotonic()
    last: dict[str, object] = {}
    _say(f"{description} ({total:g}) ..." if total is not None else f"{description} ...")

    def advance(n: float = 1, **fields: object) -> None:
        last.update(fields)

    ended = "stopped"
    try:
        yield advance
        ended = "done"
    finally:
        seconds = time.monotonic() - started
        if seconds > QUIET_SECONDS:
            _say(f"{description}: {ended} after {seconds:.0f} s {_shown(last)}".rstrip())


def _say(line: str) -> None:
    if sys.stderr is not None:
        print(line, file=sys.stderr, flush=True)


def _shown(fields: dict[str, object]) -> str:
    return " ".join(f"{key}={f'{value:.4g}' if isinstance(value, float) else value}" for key, value in fields.items())
