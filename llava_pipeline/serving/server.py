"""uvicorn around the app and its guard, drained before it ends."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable
from types import FrameType

import uvicorn

from llava_pipeline.errors import NotServing
from llava_pipeline.serving.access import BACKLOG, Access
from llava_pipeline.serving.answers import Desk
from llava_pipeline.serving.app import PROBES, PUBLIC, build
from llava_pipeline.serving.guard import Guard
from llava_pipeline.serving.protocol import Protocol

log = logging.getLogger(__name__)
MAX_BODY_BYTES = 12 * 1024 * 1024  # a picture of 9 MB in base64
LAST_WORDS_SECONDS = 5.0  # for telling those who wait that they will not be answered


def serve(desk: Desk, access: Access, bound: socket.socket, seconds: float, ready: Callable[[], None]) -> None:
    """Answer until the process is told to end; then finish what was begun, for so many seconds.

    Args:
        ready: is called once questions are answered.
    """
    app = build(desk)
    guard = Guard(
        app, access.keys, max_body_bytes=MAX_BODY_BYTES, allowed_hosts=access.allowed_hosts, public=PUBLIC,
        probes=PROBES, max_requests=access.max_requests, refused=lambda code: desk.metrics.refused.labels(code).inc(),
    )  # fmt: skip
    config = uvicorn.Config(
        guard, http=Protocol, ws="none", lifespan="on", server_header=False, date_header=True, access_log=False,
        log_config=None, timeout_graceful_shutdown=int(seconds + LAST_WORDS_SECONDS), backlog=BACKLOG,
    )  # fmt: skip

    def draining() -> None:
        app.state.draining = guard.draining = True

    server = Server(config, desk, seconds, ready, draining)
    server.run(sockets=[bound])
    if not server.started:
        raise NotServing("the server did not start; what kept it from starting stands above")


class Server(uvicorn.Server):
    """Told to end once, it finishes what was begun; told twice, it ends."""

    def __init__(
        self, config: uvicorn.Config, desk: Desk, seconds: float, ready: Callable[[], None],
        draining: Callable[[], None],
    ) -> None:  # fmt: skip
        super().__init__(config)
        self._desk, self._seconds, self._ready, self._draining = desk, seconds, ready, draining

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Not noted for later, as uvicorn does: who was told to end has ended well."""
        self.force_exit = self.should_exit
        self.should_exit = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        log.info("ending: what was begun is finished, for %g s at most", self._seconds)
        self._draining()
        closing = asyncio.ensure_future(self._close())
        try:
            await super().shutdown(sockets)
        finally:
            closing.cancel()
            await asyncio.to_thread(self._desk.engine.close, 0.0)
            if self.force_exit:  # uvicorn leaves it out then, and the decoders would be cut off
                await self.lifespan.shutdown()

    async def _close(self) -> None:
        """Tell those who were not answered in time."""
        await asyncio.sleep(self._seconds)
        await asyncio.to_thread(self._desk.engine.close, 0.0)
