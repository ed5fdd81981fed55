"""Fetches a picture from a host on the allow-list, and from nowhere else.

The name is resolved once, every address it has must be a public one, and the connection goes to that very address:
a name that leads elsewhere a moment later (DNS rebinding) leads nowhere. No redirects, no proxy, no cookies.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
from collections.abc import Callable
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address

import h11

from llava_pipeline.serving.image_urls import (
    Address,
    PictureRejected,
    read_address,
    read_allowed_hosts,
    too_large,
    unsupported,
)

log = logging.getLogger(__name__)
AT_A_TIME = 8  # downloads; each holds at most ``max_bytes``
CHUNK = 1 << 16
_NAT64 = IPv6Network("64:ff9b::/96")


def is_public(address: str) -> bool:
    """Whether an IP address belongs to the public internet, also where it stands for another one."""
    ip = ip_address(address.partition("%")[0])
    if isinstance(ip, IPv6Address):
        inner = _inner(ip)
        if inner is not None:
            return is_public(str(inner))
        if ip.is_site_local:
            return False
    special = ip.is_private or ip.is_loopback or ip.is_link_local or ip.is_multicast or ip.is_reserved
    return ip.is_global and not special and not ip.is_unspecified


def _inner(ip: IPv6Address) -> IPv4Address | None:
    """The IPv4 address that a mapped, 6to4, Teredo or NAT64 address leads to."""
    if ip in _NAT64:
        return IPv4Address(int(ip) & 0xFFFFFFFF)
    return ip.ipv4_mapped or ip.sixtofour or (ip.teredo[1] if ip.teredo else None)


class Remote:
    """Downloads from ``allowed_hosts`` (``name`` or ``name:port``), each within ``seconds`` and ``max_bytes``.

    ``accepts`` and ``tls`` are for tests, which have no public address and no certificate that everybody trusts.
    """

    def __init__(
        self,
        allowed_hosts: frozenset[str],
        *,
        seconds: float,
        max_bytes: int,
        accepts: Callable[[str], bool] = is_public,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self._allowed = read_allowed_hosts(allowed_hosts)
        self._seconds, self._max_bytes, self._accepts, self._tls = seconds, max_bytes, accepts, tls
        self._free = asyncio.Semaphore(AT_A_TIME)

    async def fetch(self, url: str) -> bytes:
        """The bytes at an address.

        Raises:
            PictureRejected: ``unsupported_image_url`` (nothing was sent), ``image_not_fetched`` or ``image_too_large``.
        """
        address = read_address(url, self._allowed)
        try:
            async with asyncio.timeout(self._seconds), self._free:
                return await self._fetch(address)
        except TimeoutError:
            raise _not_fetched(f"within {self._seconds:g} seconds") from None
        except (OSError, h11.ProtocolError) as error:  # ssl.SSLError is an OSError
            log.warning("a picture from %s was not fetched: %s", address.host, error)
            raise _not_fetched("from its host") from None

    async def _fetch(self, address: Address) -> bytes:
        reader, writer = await self._connect(address, await self._resolve(address))
        try:
            return await self._exchange(address, reader, writer)
        finally:
            writer.transport.abort()

    async def _resolve(self, address: Address) -> list[str]:
        found = await asyncio.get_running_loop().getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)
        numbers = list(dict.fromkeys(str(entry[4][0]) for entry in found))
        if not numbers or not all(self._accepts(number) for number in numbers):
            log.warning("%s has an address that is not public: nothing was fetched", address.host)
            raise unsupported()
        return numbers

    async def _connect(self, address: Address, numbers: list[str]) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        secure = address.scheme == "https"
        if secure and self._tls is None:
            self._tls = ssl.create_default_context()
        problem: OSError | None = None
        for number in numbers:
            try:
                return await asyncio.open_connection(
                    number,
                    address.port,
                    limit=CHUNK,
                    ssl=self._tls if secure else None,
                    server_hostname=address.host if secure else None,
                )
            except OSError as error:
                problem = error
        raise problem or OSError("no address")

    async def _exchange(self, address: Address, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bytes:
        connection = h11.Connection(h11.CLIENT)
        writer.write(connection.send(_request(address)) or b"")
        writer.write(connection.send(h11.EndOfMessage()) or b"")
        await writer.drain()
        data = bytearray()
        while True:
            event = connection.next_event()
            if event is h11.NEED_DATA:
                connection.receive_data(await reader.read(CHUNK))
            elif isinstance(event, h11.Response):
                self._check(event)
            elif isinstance(event, h11.Data):
                data += event.data
                if len(data) > self._max_bytes:
                    raise too_large(self._max_bytes)
            elif isinstance(event, h11.EndOfMessage):
                return bytes(data)
            elif not isinstance(event, h11.InformationalResponse):
                raise _not_fetched("from its host")

    def _check(self, response: h11.Response) -> None:
        headers = dict(response.headers)
        if 300 <= response.status_code < 400:
            raise _not_fetched("because its host redirects elsewhere, which is not followed")
        if response.status_code != 200:
            raise _not_fetched(f"because its host answered {response.status_code}")
        if headers.get(b"content-encoding", b"identity").lower() != b"identity":
            raise _not_fetched("because its host packs it")
        if int(headers.get(b"content-length", b"0")) > self._max_bytes:
            raise too_large(self._max_bytes)


def _request(address: Address) -> h11.Request:
    usual = address.port == {"https": 443, "http": 80}[address.scheme]
    host = address.host if usual else f"{address.host}:{address.port}"
    headers = [
        ("Host", host),
        ("Accept", "image/*"),
        ("Accept-Encoding", "identity"),
        ("User-Agent", "llava-pipeline"),
        ("Connection", "close"),
    ]
    return h11.Request(method="GET", target=address.target, headers=headers)


def _not_fetched(how: str) -> PictureRejected:
    return PictureRejected(400, "image_not_fetched", f"The image could not be fetched {how}.")
