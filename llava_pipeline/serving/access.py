"""Where questions come from, and who may ask: seen to before anything slow is imported or loaded."""

from __future__ import annotations

import ipaddress
import socket
from dataclasses import dataclass

from llava_pipeline.errors import AddressRefused
from llava_pipeline.serving.guard import ANY_HOST
from llava_pipeline.serving.image_urls import read_allowed_hosts
from llava_pipeline.serving.keys import Keys

BACKLOG = 512
LOOPBACK = ("localhost", "127.0.0.1", "[::1]")


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
        """Names that are answered to: those given and the address, or all where keys are asked and no name is given."""
        if not self.hosts and not is_loopback(self.host):
            return frozenset({ANY_HOST})
        own = f"[{self.host}]" if ":" in self.host else self.host
        return self.hosts | {*LOOPBACK, own}


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def check_image_hosts(hosts: frozenset[str]) -> None:
    """Refuse what is not the name of a host, before anything slow is done.

    Raises:
        AddressRefused: one is none.
    """
    try:
        read_allowed_hosts(hosts)
    except ValueError as error:
        raise AddressRefused(
            f"--image-host: {error}; name hosts, as images.example.org or images.example.org:8443"
        ) from error


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
        bound.listen(BACKLOG)  # so that a second server on the port is told so now; who connects waits for the model
    except OSError as error:
        raise AddressRefused(
            f"cannot serve on {access.host}:{access.port} ({error.strerror}); choose another --host or --port"
        ) from error
    return bound


def address_of(bound: socket.socket) -> str:
    """The URL of a bound socket."""
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
