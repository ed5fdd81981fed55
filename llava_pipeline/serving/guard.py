"""What stands before the app: nothing reaches it that is not clearly allowed.

Plain ASGI, because what Starlette calls middleware hides ``http.disconnect`` from the app. It looks at the bytes of the
request line and the headers as they came, never at a URL put together from them, and at the path that the app routes.

    Host       one, well-formed, allowed                          400   (DNS rebinding)
    path       in normal form                                     400
    method     GET, HEAD, POST, OPTIONS                           405
    origin     a POST from a page is from a page of ours          403   (a web page driving a server on loopback)
    key        unless there are none, or the path is public       401
    room       a POST, where so many are under way already,       429
               or the server is going                             503
    body       none but of a POST; JSON, not packed               400, 415
               not too long, whole in time                        413, 408
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import unquote_to_bytes

from llava_pipeline.serving.keys import Keys

log = logging.getLogger(__name__)
Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

METHODS = ("GET", "HEAD", "POST", "OPTIONS")
LINGER_SECONDS = 1.0  # what a client still sends after it was refused is thrown away so long, or it never reads why
ANY_HOST = "*"
CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"x-frame-options", b"DENY"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"content-security-policy", CONTENT_SECURITY_POLICY.encode()),
)
_KINDS = {401: "authentication_error", 429: "rate_limit_error"}
_OURS = frozenset(name for name, _ in HEADERS)
_HOST = re.compile(rb"(\[[0-9a-f:.]{2,45}\]|[a-z0-9](?:[a-z0-9_.-]{0,251}[a-z0-9])?)(?::([0-9]{1,5}))?", re.IGNORECASE)
_JSON = re.compile(rb"""application/json(?:\s*;\s*charset\s*=\s*(?:utf-?8|"utf-?8"))?\s*;?""", re.IGNORECASE)
_BEARER = re.compile(rb"bearer +([\x21-\x7e]+) *", re.IGNORECASE)
_PATH = re.compile(rb"/(?:[A-Za-z0-9._~!$&'()*+,;=:@/-]|%[0-9A-Fa-f]{2})*")
_NEVER_ESCAPED = re.compile(rb"[\x00-\x1f\x7f%/\\A-Za-z0-9._~-]")


class Refused(Exception):
    """A request that does not reach the app: status, and code and sentence of the error object."""

    def __init__(self, status: int, code: str, message: str, *headers: tuple[bytes, bytes]):
        super().__init__(code)
        self.status, self.code, self.message, self.headers = status, code, message, headers


class _Gone(Exception):
    """The client left before its request was whole."""


class _NotRead(Exception):
    """The client does not read its answer."""


class Guard:
    """An ASGI app around another. ``max_body_bytes`` and ``body_seconds`` bound the body of a POST.

    ``allowed_hosts`` are names without a port (any port is meant) or with one; ``*`` allows every well-formed one, and
    wants keys. ``public`` are the exact paths that need no key. The name of the key, or None, is in
    ``scope["state"]["key_name"]``. ``probes`` are those of them that are asked by any name, as balancers do by a
    number. ``max_requests`` is how many POSTs may be under way, from their first byte to the last of their answer;
    ``draining`` admits no more of them. ``refused`` is told the code of every refusal. Who does not read within
    ``send_seconds`` is left.
    """

    draining = False

    def __init__(
        self,
        app: App,
        keys: Keys | None,
        *,
        max_body_bytes: int,
        allowed_hosts: frozenset[str],
        public: frozenset[str] = frozenset(),
        body_seconds: float = 30.0,
        max_requests: int | None = None,
        refused: Callable[[str], None] = lambda _: None,
        probes: frozenset[str] = frozenset(),
        send_seconds: float = 60.0,
    ) -> None:
        if keys is None and ANY_HOST in allowed_hosts:
            raise ValueError("a server that answers to every host name needs keys")
        self._app, self._keys, self._public = app, keys, public
        self._max_body_bytes, self._body_seconds = max_body_bytes, body_seconds
        self._hosts = frozenset(host.lower().encode() for host in allowed_hosts)
        self._max_requests, self._num_requests, self._refused = max_requests, 0, refused
        self._probes, self._send_seconds = probes, send_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        elif scope["type"] == "http":
            try:
                await self._http(scope, receive, send)
            except _NotRead:
                log.warning("a client did not read its answer for %g s; it is left", self._send_seconds)

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        begun = False

        async def protected(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun, message = True, {**message, "headers": with_headers(message.get("headers", ()))}
            try:
                async with asyncio.timeout(self._send_seconds):  # who does not read keeps nobody's place for ever
                    await send(message)
            except TimeoutError:
                raise _NotRead from None

        try:
            state = {**scope.get("state", {}), "key_name": self._admit(scope)}
        except Refused as refused:
            await self._refuse(refused, scope, receive, protected)
            return
        counted = scope["method"] == "POST"
        self._num_requests += counted
        try:
            if counted:
                receive = _once(await self._body(scope, receive), receive)
            await self._app({**scope, "state": state}, receive, protected)
        except Refused as refused:
            await self._refuse(refused, scope, receive, protected)
        except _Gone:
            return
        except _NotRead:
            raise
        except Exception:
            if begun:
                raise  # the server cuts the connection: half an answer must not look like one
            log.exception("a request failed")
            await _refuse(Refused(500, "internal_error", "internal error"), scope, None, protected)
        finally:
            self._num_requests -= counted

    async def _refuse(self, refused: Refused, scope: Scope, receive: Receive, send: Send) -> None:
        self._refused(refused.code)
        await _refuse(refused, scope, receive, send)

    def _admit(self, scope: Scope) -> str | None:
        """The name of the key, None where none is needed; nothing of the body is read."""
        headers = _Headers(scope)
        host = self._check_host(headers, scope["path"])
        _check_path(scope)
        if scope["method"] not in METHODS:
            raise Refused(
                405, "method_not_allowed", "This method is not allowed.", (b"allow", ", ".join(METHODS).encode())
            )
        if scope["method"] == "POST":
            _check_origin(headers, host)
        name = self._check_key(scope, headers)
        self._check_body_headers(scope, headers)
        if scope["method"] == "POST":
            self._check_room()
        return name

    def _check_room(self) -> None:
        again = (b"retry-after", b"1")
        if self.draining:
            raise Refused(503, "server_closing", "The server is closing. Try again.", again)
        if self._max_requests is not None and self._num_requests >= self._max_requests:
            raise Refused(429, "rate_limit_exceeded", "As many questions are under way as may. Try again.", again)

    def _check_host(self, headers: _Headers, path: str) -> bytes:
        hosts = headers.all(b"host")
        match = _HOST.fullmatch(hosts[0]) if len(hosts) == 1 else None
        if match is None:
            raise Refused(400, "invalid_host", "The request has no well-formed Host header, or more than one.")
        host = hosts[0].lower()
        if path not in self._probes and not self._hosts & {host, match[1].lower(), ANY_HOST.encode()}:
            raise Refused(400, "unknown_host", "This server does not answer to the name in the Host header.")
        return host

    def _check_key(self, scope: Scope, headers: _Headers) -> str | None:
        if self._keys is None or scope["path"] in self._public:
            return None
        values = headers.all(b"authorization")
        match = _BEARER.fullmatch(values[0]) if len(values) == 1 else None
        name = self._keys.check(match[1].decode("ascii")) if match else None
        if name is None:
            message = "A valid API key is needed, once, in the header Authorization: Bearer KEY."
            raise Refused(401, "invalid_api_key", message, (b"www-authenticate", b"Bearer"))
        return name

    def _check_body_headers(self, scope: Scope, headers: _Headers) -> None:
        lengths = set(headers.all(b"content-length"))
        if len(lengths) > 1 or not all(length.isdigit() and len(length) < 20 for length in lengths):
            raise Refused(400, "invalid_content_length", "The header Content-Length is not one number.")
        length = int(lengths.pop()) if lengths else 0
        if scope["method"] != "POST":
            if length or headers.all(b"transfer-encoding"):
                raise Refused(400, "unexpected_body", "Only a POST may have a body.")
            return
        kinds = headers.all(b"content-type")
        if len(kinds) != 1 or not _JSON.fullmatch(kinds[0].strip()):
            raise Refused(415, "unsupported_content_type", "The Content-Type has to be application/json, in UTF-8.")
        if any(coding.strip().lower() != b"identity" for coding in headers.all(b"content-encoding")):
            raise Refused(415, "unsupported_content_encoding", "The body must not be compressed.")
        if length > self._max_body_bytes:
            raise self._too_large()

    async def _body(self, scope: Scope, receive: Receive) -> bytes:
        try:
            async with asyncio.timeout(self._body_seconds):
                return await self._read(receive)
        except TimeoutError:
            message = f"The body did not arrive within {self._body_seconds:g} seconds."
            raise Refused(408, "request_timeout", message) from None

    async def _read(self, receive: Receive) -> bytes:
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] != "http.request":
                raise _Gone
            body += message.get("body", b"")
            if len(body) > self._max_body_bytes:
                raise self._too_large()
            if not message.get("more_body", False):
                return bytes(body)

    def _too_large(self) -> Refused:
        return Refused(413, "request_too_large", f"The body has more than {self._max_body_bytes} bytes.")


class _Headers:
    """The headers of a request, their names in lower case as ASGI has them."""

    def __init__(self, scope: Scope) -> None:
        self._headers: list[tuple[bytes, bytes]] = list(scope["headers"])

    def all(self, name: bytes) -> list[bytes]:
        """Every value of a header."""
        return [value for key, value in self._headers if key.lower() == name]


def _check_path(scope: Scope) -> None:
    if not is_normal(scope.get("raw_path") or scope["path"].encode("utf-8", "surrogatepass"), scope["path"]):
        raise Refused(400, "invalid_path", "The path is not in its normal form.")


def is_normal(raw: bytes, path: str) -> bool:
    """Whether a path as it came has one reading alone, and is the one that is routed: no empty segment, no ``.`` or
    ``..``, nothing encoded that need not be (letters, dots) or that means something (slashes, NUL), valid UTF-8."""
    if not _PATH.fullmatch(raw) or b"//" in raw:
        return False
    escaped = b"".join(unquote_to_bytes(match) for match in re.findall(rb"%..", raw))
    if _NEVER_ESCAPED.search(escaped) or any(segment in (b".", b"..") for segment in raw.split(b"/")):
        return False
    return unquote_to_bytes(raw) == path.encode("utf-8", "surrogatepass")


def _check_origin(headers: _Headers, host: bytes) -> None:
    """A browser says where a page is from; what is not a browser says nothing."""
    sites = headers.all(b"sec-fetch-site")
    origins = [origin.lower() for origin in headers.all(b"origin")]
    ours = (b"http://" + host, b"https://" + host)
    if any(site not in (b"same-origin", b"none") for site in sites) or any(origin not in ours for origin in origins):
        raise Refused(403, "cross_origin", "Pages of other sites may not use this server.")


def with_headers(given: Any) -> list[tuple[bytes, bytes]]:
    """An answer's headers with ours; the app decides on Cache-Control alone."""
    headers = [(name, value) for name, value in given if name.lower() not in _OURS]
    headers += HEADERS
    if not any(name.lower() == b"cache-control" for name, _ in headers):
        headers.append((b"cache-control", b"no-store"))
    return headers


def error_object(status: int, code: str, message: str, param: str | None = None) -> dict[str, Any]:
    """The body of an error as OpenAI's clients read it."""
    kind = "server_error" if status >= 500 else _KINDS.get(status, "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def _once(body: bytes, receive: Receive) -> Receive:
    """First the whole body, then whatever the server tells: that the client left."""
    given = False

    async def next_message() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return next_message


async def _refuse(refused: Refused, scope: Scope, receive: Receive | None, send: Send) -> None:
    body = json.dumps(error_object(refused.status, refused.code, refused.message)).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        (b"connection", b"close"),
        *refused.headers,
    ]
    await send({"type": "http.response.start", "status": refused.status, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": True})
    if receive is not None and refused.status != 408 and not _Headers(scope).all(b"expect"):
        await _drain(receive)
    await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _drain(receive: Receive) -> None:
    """Throw away what the client is still sending, for a moment: closed at once, it would never read the answer."""
    try:
        async with asyncio.timeout(LINGER_SECONDS):
            while (await receive()).get("more_body", False):
                pass
    except TimeoutError:
        pass
