"""``llava-pipeline serve | key``: the champion answers over HTTP, and who may ask."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated

import typer

from llava_pipeline.cli import show
from llava_pipeline.cli.app import AsJson, Profile, app, registered_model_of
from llava_pipeline.errors import SpecError

DRAIN_SECONDS = 30.0
ALIAS = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@app.command()
def serve(
    profile: Profile = "pocket",
    alias: Annotated[str | None, typer.Option("--alias", help="Who answers by default; the champion.")] = None,
    also: Annotated[list[str], typer.Option("--also", help="A further alias, by its own name. Repeatable.")] = [],  # noqa: B006
    host: Annotated[str, typer.Option("--host", help="Address; others than loopback want --keys.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="Port; 0 takes a free one.")] = 8000,
    keys: Annotated[Path | None, typer.Option("--keys", help="File of API keys, made by `key`.")] = None,
    hosts: Annotated[list[str], typer.Option("--allowed-host", help="A further name in the Host header.")] = [],  # noqa: B006
    image_hosts: Annotated[list[str], typer.Option("--image-host", help="A host to fetch pictures from.")] = [],  # noqa: B006
    poll: Annotated[float, typer.Option("--poll", min=0.1, help="Seconds between two looks at the aliases.")] = 5.0,
    rows: Annotated[int, typer.Option("--rows", min=1, max=1024, help="Questions answered together.")] = 16,
    waiting: Annotated[int, typer.Option("--waiting", min=0, max=100_000, help="Further ones that may wait.")] = 64,
    wait: Annotated[bool, typer.Option("--wait", help="Wait until the alias points to something.")] = False,
    decoders: Annotated[int, typer.Option("--decoders", min=1, max=64, help="Processes that decode pictures.")] = 1,
    as_json: AsJson = False,
) -> None:
    """Answer questions about pictures as OpenAI's chat completions, with whatever is champion."""
    from llava_pipeline.serving import access as accesses
    from llava_pipeline.serving.keys import Keys
    from llava_pipeline.tracking.settings import load_settings

    settings = load_settings()
    access = accesses.Access(host, port, Keys.read(keys) if keys else None, frozenset(hosts), rows + waiting)
    access.check()
    accesses.check_image_hosts(frozenset(image_hosts))
    aliases = tuple(dict.fromkeys((alias or settings.registry.champion, *also)))
    for name in aliases:
        if not ALIAS.fullmatch(name):
            raise SpecError(f"{name!r} is no alias; it has letters, digits, dots, hyphens and underscores")
    if wait:  # not with the port taken: whoever asks meanwhile is refused, and need not wait as well
        from llava_pipeline.stages.first_champion import wait_for_alias

        wait_for_alias(registered_model_of(profile), aliases[0], settings, poll)
    with accesses.bind(access) as bound:
        from llava_pipeline.serving import server
        from llava_pipeline.serving.versions import Follower
        from llava_pipeline.stages.serve import open_desk

        desk = open_desk(
            registered_model_of(profile), aliases, settings, rows, max(waiting, 1), frozenset(image_hosts), decoders
        )
        follower = Follower(desk.versions.look, poll)

        def ready() -> None:
            main = desk.versions.main
            told = {
                "url": accesses.address_of(bound), "model": desk.versions.name,
                "version": main and main.bundle.version, "pid": os.getpid(),
            }  # fmt: skip
            show.document(told) if as_json else show.serving(told, aliases)

        try:
            server.serve(desk, access, bound, DRAIN_SECONDS, ready)
        finally:
            follower.close()


@app.command()
def key(
    name: Annotated[str, typer.Argument(help="Whose key it is; it stands in the log.")],
    keys: Annotated[Path, typer.Option("--keys", help="File that keeps its hash; made if there is none.")],
    as_json: AsJson = False,
) -> None:
    """Make an API key for `serve --keys`. It is shown once; the file keeps a hash of it."""
    from llava_pipeline.serving.keys import add_key

    made = add_key(keys, name)
    show.document({"name": name, "key": made, "file": str(keys)}) if as_json else print(made)
