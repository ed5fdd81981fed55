"""uvicorn around the app and its guard: bound before the model is loaded, drained before it ends."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import socket
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType

import uvicorn

from llava_pipeline.errors import AddressRefused, NotServing
from llava_pipeline.serving.answers import Desk
from llava_pipeline.serving.app import PUBLIC, build
from llava_pipeline.serving.guard import ANY_HOST, Guard
from llava_pipeline.serving.keys import Keys
from llava_pipeline.serving.protocol import Protocol

log = logging.getLogger(__name__)
MAX_BODY_BYTES = 12 * 1024 * 1024  # a picture of 9 MB in base64
LOOPBACK = ("localhost", "127.0.0.1", "[::1]")
LAST_WORDS_SECONDS = 5.0  # for telling those who wait that they will not be answered


@dataclass(frozen=True)
class Access:
    """Where questions come from, and who may ask.

    Args:
        hosts: further names in the Host header.
        max_requests: questions under way at once; more are told to come again.
    """

    host: str
    port: int
    keys: Keys | None
    hosts: frozenset[str]
    max_requests: int

    def check(self) -> None:
        """Refuse an address that others reach without a key.

        Raises:
            AddressRefused: it is one.
        """
        if self.keys is None and not is_loopback(self.host):
            raise AddressRefused(
                f"others can reach {self.host}, so keys are needed: make one with `llava-pipeline key NAME --keys "
                "FILE` and add --keys FILE, or serve on 127.0.0.1"
            )

    @property
    def allowed_hosts(self) -> frozenset[str]:
        """Names that are answered to: those given, or every one where the address says nothing and keys are asked."""
        if not self.hosts and not is_loopback(self.host):
            return frozenset({ANY_HOST})
        return self.hosts | {*LOOPBACK}


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def bind(access: Access) -> socket.socket:
    """The socket, before anything slow is done.

    Raises:
        AddressRefused: the address is not this machine's, or the port is taken.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(access.host, access.port, type=socket.SOCK_STREAM)[0]
        # By its protocol asyncio knows that it is TCP, and sends small pieces at once: without it each costs 40 ms.
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        raise AddressRefused(
            f"cannot serve on {access.host}:{access.port} ({error.strerror}); choose another --host or --port"
        ) from error
    return bound


def address_of(bound: socket.socket) -> str:
    """The URL of a bound socket."""
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def serve(desk: Desk, access: Access, bound: socket.socket, seconds: float, ready: Callable[[], None]) -> None:
    """Answer until the process is told to end; then finish what was begun, for so many seconds.

    Args:
        ready: is called once questions are answered.
    """
    app = build(desk)
    guard = Guard(
        app, access.keys, max_body_bytes=MAX_BODY_BYTES, allowed_hosts=access.allowed_hosts, public=PUBLIC,
        max_requests=access.max_requests, refused=lambda code: desk.metrics.refused.labels(code).inc(),
    )  # fmt: skip
    config = uvicorn.Config(
        guard, http=Protocol, ws="none", lifespan="on", server_header=False, date_header=True, access_log=False,
        log_config=None, timeout_graceful_shutdown=int(seconds + LAST_WORDS_SECONDS), backlog=512,
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

    async def _close(self) -> None:
        """Tell those who were not answered in time."""
        await asyncio.sleep(self._seconds)
        await asyncio.to_thread(self._desk.engine.close, 0.0)
