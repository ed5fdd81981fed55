"""Nothing reaches the app that is not clearly allowed: against a real uvicorn on loopback, byte by byte."""

from __future__ import annotations

import asyncio
import gzip
import hashlib
import json
import logging
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote, unquote

import httpx
import pytest
import uvicorn
from hypothesis import given, settings
from hypothesis import strategies as st

from llava_pipeline.serving.guard import CONTENT_SECURITY_POLICY, Guard, Message, Receive, Scope, Send, is_normal
from llava_pipeline.serving.keys import Keys
from llava_pipeline.serving.protocol import Protocol

CAP = 100_000
BODY_SECONDS = 0.6
HEAD_SECONDS = 0.7
KEY = "llava-secret"
KEYS = Keys({"other": hashlib.sha256(b"llava-other").hexdigest(), "laptop": hashlib.sha256(KEY.encode()).hexdigest()})


@dataclass
class Tiny:
    """An app that notes what reaches it."""

    seen: list[dict[str, Any]] = field(default_factory=list)
    left: threading.Event = field(default_factory=threading.Event)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        first = await receive() if scope["method"] == "POST" else {"body": b"", "more_body": False}
        self.seen.append({"path": scope["path"], "key": scope["state"]["key_name"], **first})
        if scope["path"] == "/boom":
            raise RuntimeError("secret at 0x7f00dead in /srv/secret.py")
        if scope["path"] == "/wait":
            assert (await receive())["type"] == "http.disconnect"
            self.left.set()
            return
        headers = [(b"content-type", b"text/plain"), (b"x-frame-options", b"ALLOWALL")]
        if scope["path"] == "/cached":
            headers.append((b"Cache-Control", b"max-age=60"))
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        if scope["path"] == "/half":
            await send({"type": "http.response.body", "body": b"half", "more_body": True})
            raise RuntimeError("secret")
        await send({"type": "http.response.body", "body": str(len(first["body"])).encode()})


@dataclass
class Served:
    """A server on loopback."""

    port: int
    app: Tiny

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self.port}"

    def send(self, *parts: bytes, pause: float = 0.0, seconds: float = 8.0) -> Answer:
        """Send bytes, with pauses between, and read until the server closes."""
        before, started = len(self.app.seen), time.monotonic()
        with socket.create_connection(("127.0.0.1", self.port), timeout=seconds) as connection:
            for number, part in enumerate(parts):
                time.sleep(pause if number else 0)
                try:
                    connection.sendall(part)
                except OSError:
                    break
            data = b""
            try:
                while chunk := connection.recv(1 << 16):
                    data += chunk
            except ConnectionResetError:
                pass
        return Answer(data, len(self.app.seen) - before, time.monotonic() - started)

    def ask(self, method: str = "GET", target: str = "/ok", *headers: str, body: bytes = b"", **how: Any) -> Answer:
        """A request whose headers are these, Host and Connection: close too unless they are among them."""
        lines = [f"{method} {target} HTTP/1.1", *headers]
        if not any(header.lower().startswith("host:") for header in headers):
            lines.append(f"Host: {self.host}")
        lines.append("Connection: close")
        return self.send("\r\n".join([*lines, "", ""]).encode("latin-1") + body, **how)

    def post(self, *headers: str, body: bytes = b"{}", target: str = "/ok", kind: str | None = "application/json"):
        own = [f"Content-Length: {len(body)}"] if not any("length" in header.lower() for header in headers) else []
        own += [f"Content-Type: {kind}"] if kind else []
        return self.ask("POST", target, *headers, *own, body=body)


@dataclass
class Answer:
    """What came back, how many requests reached the app meanwhile, and the seconds it took."""

    data: bytes
    reached: int
    seconds: float

    @property
    def status(self) -> int:
        return int(self.data.split(b" ", 2)[1])

    @property
    def headers(self) -> dict[str, str]:
        lines = self.data.partition(b"\r\n\r\n")[0].decode("latin-1").split("\r\n")[1:]
        return {line.partition(":")[0].lower(): line.partition(":")[2].strip() for line in lines}

    @property
    def body(self) -> bytes:
        return self.data.partition(b"\r\n\r\n")[2]

    @property
    def code(self) -> str:
        """The code of the error object; everything that an error has to have is looked at."""
        error = json.loads(self.body)
        assert list(error) == ["error"]
        assert set(error["error"]) == {"message", "type", "param", "code"}
        kinds = {401: "authentication_error", 429: "rate_limit_error", 500: "server_error", 503: "server_error"}
        kind = kinds.get(self.status, "invalid_request_error")
        assert (error["error"]["type"], error["error"]["param"]) == (kind, None)
        assert self.headers["content-type"] == "application/json"
        assert self.headers["connection"] == "close"
        assert self.headers["x-content-type-options"] == "nosniff"
        return str(error["error"]["code"])


class Hasty(Protocol):
    """One that does not wait long."""

    head_seconds = HEAD_SECONDS


def serve(app: Tiny, keys: Keys | None, **changes: Any) -> Iterator[Served]:
    guard = Guard(
        app,
        keys,
        max_body_bytes=CAP,
        allowed_hosts=frozenset({"127.0.0.1", "[::1]", "localhost", "Pictures.example:8443"}),
        public=frozenset({"/healthz"}),
        body_seconds=BODY_SECONDS,
        **changes,
    )
    config = uvicorn.Config(guard, http=Hasty, ws="none", lifespan="off", log_config=None, timeout_keep_alive=1)
    server = uvicorn.Server(config)
    listener = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield Served(listener.getsockname()[1], app)
    server.should_exit = True
    thread.join(10)
    listener.close()


@pytest.fixture(scope="module")
def open_server() -> Iterator[Served]:
    """Without keys, as on loopback."""
    yield from serve(Tiny(), None)


@pytest.fixture(scope="module")
def locked() -> Iterator[Served]:
    """With keys."""
    yield from serve(Tiny(), KEYS)


@pytest.fixture(autouse=True)
def _the_next_request_is_answered(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    for name in {"open_server", "locked"} & set(request.fixturenames):
        answer = request.getfixturevalue(name).ask("GET", "/healthz")
        assert (answer.status, answer.reached) == (200, 1)


# --------------------------------------------------------------------------------------------- what is answered


def test_a_request_reaches_the_app_whole_and_without_a_key_where_there_are_none(open_server: Served) -> None:
    body = json.dumps({"text": "x" * 50_000}).encode()
    assert open_server.post(body=body).status == 200
    seen = open_server.app.seen[-1]
    assert (seen["body"], seen["more_body"], seen["key"]) == (body, False, None)


def test_every_answer_has_the_headers_of_a_careful_server_and_none_for_other_sites(open_server: Served) -> None:
    for answer in (open_server.ask("GET", "/ok", "Origin: http://evil.example"), open_server.ask("GET", "//")):
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer"
        assert answer.headers["x-frame-options"] == "DENY"
        assert answer.headers["cross-origin-resource-policy"] == "same-origin"
        assert answer.headers["content-security-policy"] == CONTENT_SECURITY_POLICY
        assert answer.headers["cache-control"] == "no-store"
        assert not [name for name in answer.headers if name.startswith("access-control")]
    assert open_server.ask("GET", "/cached").headers["cache-control"] == "max-age=60"


def test_connections_are_kept_open_between_requests_that_are_allowed(open_server: Served) -> None:
    with httpx.Client(base_url=f"http://{open_server.host}") as client:
        for _ in range(3):
            assert client.post("/ok", json={}).headers.get("connection") != "close"


def test_a_client_that_leaves_is_told_to_the_app(open_server: Served) -> None:
    open_server.app.left.clear()
    with socket.create_connection(("127.0.0.1", open_server.port)) as connection:
        head = f"POST /wait HTTP/1.1\r\nHost: {open_server.host}\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Content-Length: 2\r\n\r\n{{}}".encode())
        time.sleep(0.2)
        assert not open_server.app.left.is_set()
    assert open_server.app.left.wait(2)


# --------------------------------------------------------------------------------------------- host


@pytest.mark.parametrize("host", ["127.0.0.1:80", "LOCALHOST", "[::1]:1", "localhost:8443", "pictures.EXAMPLE:8443"])
def test_a_host_that_is_allowed_is_answered(open_server: Served, host: str) -> None:
    assert open_server.ask("GET", "/ok", f"Host: {host}").status == 200


@pytest.mark.parametrize(
    "host",
    [
        "", " ", "a/?x=", "x#", "localhost/", "localhost?", "localhost:", "localhost:x", "localhost:123456", "a b",
        "user@localhost", "localhost@evil.example", "localhost, evil.example", "[::1", "::1", "%6cocalhost", "*",
        ".localhost", "localhost.", "locälhost",
    ],
)  # fmt: skip
def test_a_host_that_is_not_well_formed_is_refused(open_server: Served, host: str) -> None:
    answer = open_server.ask("GET", "/ok", f"Host: {host}")
    assert (answer.status, answer.reached) == (400, 0)


@pytest.mark.parametrize(
    "host", ["evil.example", "localhost.evil.example", "127.0.0.2", "pictures.example", "pictures.example:1"]
)
def test_a_host_that_is_not_ours_is_refused(open_server: Served, host: str) -> None:
    answer = open_server.ask("GET", "/ok", f"Host: {host}")
    assert (answer.status, answer.code, answer.reached) == (400, "unknown_host", 0)


def test_two_hosts_or_none_are_refused(open_server: Served) -> None:
    for text in (
        "GET /ok HTTP/1.1\r\nHost: localhost\r\nHost: localhost\r\n\r\n",
        "GET /ok HTTP/1.1\r\nConnection: close\r\n\r\n",
        "GET /ok HTTP/1.0\r\n\r\n",
    ):
        answer = open_server.send(text.encode())
        assert (answer.status, answer.reached) == (400, 0)


def test_any_host_is_allowed_only_with_keys() -> None:
    how: dict[str, Any] = {"max_body_bytes": 1, "allowed_hosts": frozenset({"*"})}
    with pytest.raises(ValueError, match="needs keys"):
        Guard(Tiny(), None, **how)
    Guard(Tiny(), KEYS, **how)


# --------------------------------------------------------------------------------------------- path and method


@pytest.mark.parametrize(
    "target",
    [
        "//v1", "/v1//models", "/v1/../metrics", "/v1/..", "/./metrics", "/v1/.", "/%2e%2e/metrics", "/v1/.%2E/metrics",
        "/v1%2fmodels", "/v1%2Fmodels", "/v1%5cmodels", "/v1\\models", "/a%00", "/a%0d%0ab", "/%252e", "/%6detrics",
        "/a%", "/a%2", "/a%zz", "/%ff", "*", "http://127.0.0.1/metrics", "http://evil.example/ok", "ok", "/a|b",
        "/a<b>", "/a#b", "/ä",
    ],
)  # fmt: skip
def test_a_path_that_is_not_in_normal_form_is_refused(locked: Served, target: str) -> None:
    for key in ((), (f"Authorization: Bearer {KEY}",)):
        answer = locked.ask("GET", target, *key)
        assert (answer.status, answer.reached) == (400, 0)


@pytest.mark.parametrize(
    "target", ["/", "/ok?a=//../%2e", "/v1/models/llava%20pocket@3", "/a/", "/a...b/.c", "/%C3%A4"]
)
def test_a_path_in_normal_form_is_routed_as_it_is(open_server: Served, target: str) -> None:
    assert open_server.ask("GET", target).status == 200
    assert open_server.app.seen[-1]["path"] == unquote(target.partition("?")[0])


@given(st.text(st.characters(codec="utf-8"), max_size=20), st.booleans())
def test_a_path_that_is_accepted_has_one_reading(text: str, quoted: bool) -> None:
    raw = ("/" + (quote(text, safe="/") if quoted else text)).encode()
    if is_normal(raw, unquote(raw.decode())):
        path = unquote(raw.decode("ascii"))
        segments = path.split("/")[1:]
        assert not {".", ".."} & set(segments)
        assert "" not in segments[:-1]
        assert not set(path) & {"\0", "\\", "%", "\r", "\n"}
        assert len(segments) == raw.count(b"/")


@given(st.binary(max_size=30))
def test_a_path_of_any_bytes_is_judged_and_never_fails(raw: bytes) -> None:
    assert is_normal(raw, unquote(raw.decode("latin-1"))) in (True, False)
    assert not is_normal(raw, "/another")


@pytest.mark.parametrize("method", ["PUT", "DELETE", "PATCH", "TRACE", "PROPFIND", "post", "X"])
def test_another_method_is_refused(open_server: Served, method: str) -> None:
    answer = open_server.ask(method)
    assert (answer.status, answer.code, answer.reached) == (405, "method_not_allowed", 0)
    assert answer.headers["allow"] == "GET, HEAD, POST, OPTIONS"


def test_a_websocket_is_refused(locked: Served) -> None:
    headers = ["Upgrade: websocket", "Connection: Upgrade", "Sec-WebSocket-Version: 13"]
    text = "\r\n".join(
        ["GET /healthz HTTP/1.1", f"Host: {locked.host}", *headers, "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA=="]
    )
    answer = locked.send(f"{text}\r\n\r\n".encode())
    assert (answer.status, answer.reached) == (200, 1)  # the server knows no websockets: a plain GET
    messages: list[Message] = []

    async def send(message: Message) -> None:
        messages.append(message)

    guard = Guard(Tiny(), None, max_body_bytes=1, allowed_hosts=frozenset({"localhost"}))
    asyncio.run(guard({"type": "websocket", "path": "/healthz", "headers": []}, None, send))  # type: ignore[arg-type]
    assert messages == [{"type": "websocket.close", "code": 1008}]


# --------------------------------------------------------------------------------------------- keys


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER", "bEaReR "])
def test_a_key_opens_and_its_name_is_told(locked: Served, scheme: str) -> None:
    assert locked.post(f"Authorization: {scheme} {KEY}").status == 200
    assert locked.app.seen[-1]["key"] == "laptop"


@pytest.mark.parametrize(
    "headers",
    [
        [], ["Authorization:"], ["Authorization: Bearer"], ["Authorization: Bearer "], [f"Authorization: {KEY}"],
        ["Authorization: Bearer llava-wrong"], [f"Authorization: Basic {KEY}"], [f"Authorization: Bearer {KEY}x"],
        [f"Authorization: Bearer {KEY} {KEY}"], [f"Authorization: Bearer,{KEY}"], [f"Authorization: Bearer \xe4{KEY}"],
        [f"Authorization: Bearer {KEY}", f"Authorization: Bearer {KEY}"], [f"X-Api-Key: {KEY}"],
        [f"Authorization: Bearer {KEY}", "Authorization: Bearer llava-wrong"], [f"Cookie: key={KEY}"],
        [f"Authorization: Bearer {hashlib.sha256(KEY.encode()).hexdigest()}"], [f"X-Authorization: Bearer {KEY}"],
    ],
)  # fmt: skip
def test_without_one_valid_key_nothing_is_answered(locked: Served, headers: list[str]) -> None:
    for answer in (locked.ask("GET", f"/ok?key={KEY}&api_key={KEY}", *headers), locked.post(*headers)):
        assert (answer.status, answer.code, answer.reached) == (401, "invalid_api_key", 0)
        assert answer.headers["www-authenticate"] == "Bearer"
        assert KEY.encode() not in answer.data


@pytest.mark.parametrize("target", ["/", "/docs", "/openapi.json", "/metrics", "/v1/models", "/healthz/", "/Healthz"])
def test_every_path_but_the_exact_public_ones_wants_a_key(locked: Served, target: str) -> None:
    for method in ("GET", "HEAD", "OPTIONS", "POST"):
        assert locked.ask(method, target).status == 401
    assert locked.ask("GET", "/healthz?x=1").status == 200
    assert locked.app.seen[-1]["key"] is None


def test_a_body_without_a_key_is_not_waited_for(locked: Served) -> None:
    answer = locked.ask("POST", "/ok", "Content-Length: 50000", "Content-Type: application/json")
    assert answer.status == 401
    assert answer.seconds < 3


# --------------------------------------------------------------------------------------------- origin


@pytest.mark.parametrize(
    "header",
    [
        "Origin: http://evil.example", "Origin: null", "Origin:", "Origin: http://127.0.0.1", "Origin: http://127.0.0.1:1",
        "Sec-Fetch-Site: cross-site", "Sec-Fetch-Site: same-site", "Origin: ftp://{host}", "Origin: http://{host}/",
        "Sec-Fetch-Site: Cross-Site",
    ],
)  # fmt: skip
def test_a_page_of_another_site_may_not_post(open_server: Served, header: str) -> None:
    for more in ([], ["Origin: http://{host}"]):
        answer = open_server.post(*(line.format(host=open_server.host) for line in [header, *more]))
        assert (answer.status, answer.code, answer.reached) == (403, "cross_origin", 0)


def test_our_own_page_may_post_and_so_may_what_is_no_browser(open_server: Served) -> None:
    own = (f"Origin: http://{open_server.host}", "Sec-Fetch-Site: same-origin")
    for headers in ((), own, (f"Origin: https://{open_server.host}".upper(),), ("Sec-Fetch-Site: none",)):
        assert open_server.post(*headers).status == 200


# --------------------------------------------------------------------------------------------- body


@pytest.mark.parametrize(
    "kind",
    ["application/json", "Application/JSON; charset=UTF-8", 'application/json;charset="utf-8"', "application/json;"],
)
def test_json_is_accepted(open_server: Served, kind: str) -> None:
    assert open_server.post(kind=kind).status == 200


@pytest.mark.parametrize(
    "kind",
    [
        None, "text/plain", "application/json; charset=latin-1", "application/jsonx",
        "application/x-www-form-urlencoded",
        "multipart/form-data; boundary=x", "text/json", "application/json, text/plain", "application/json; a=b",
    ],
)  # fmt: skip
def test_another_content_type_is_refused(open_server: Served, kind: str | None) -> None:
    answer = open_server.post(kind=kind)
    assert (answer.status, answer.code, answer.reached) == (415, "unsupported_content_type", 0)


@pytest.mark.parametrize("coding", ["gzip", "deflate", "br", "zstd", "identity, gzip", "x", ""])
def test_a_packed_body_is_refused_and_never_unpacked(open_server: Served, coding: str) -> None:
    bomb = gzip.compress(bytes(10_000_000))
    answer = open_server.post(f"Content-Encoding: {coding}", body=bomb)
    assert (answer.status, answer.code, answer.reached) == (415, "unsupported_content_encoding", 0)
    assert open_server.post("Content-Encoding: Identity").status == 200


def test_a_length_over_the_cap_is_refused_at_once_and_unread(open_server: Served) -> None:
    for length in (CAP + 1, 13_000_000, 10**18):
        answer = open_server.ask("POST", "/ok", f"Content-Length: {length}", "Content-Type: application/json")
        assert (answer.status, answer.code, answer.reached) == (413, "request_too_large", 0)
    with socket.create_connection(("127.0.0.1", open_server.port), timeout=5) as connection:
        head = f"POST /ok HTTP/1.1\r\nHost: {open_server.host}\r\nContent-Type: application/json\r\n"
        started = time.monotonic()
        connection.sendall(f"{head}Content-Length: 13000000\r\n\r\n".encode())
        assert connection.recv(100).startswith(b"HTTP/1.1 413")
        assert time.monotonic() - started < 0.5


def test_a_client_that_sends_on_reads_why_it_was_refused(open_server: Served) -> None:
    with httpx.Client(base_url=f"http://{open_server.host}", timeout=10) as client:
        for _ in range(3):
            answer = client.post("/ok", content=bytes(13_000_000), headers={"content-type": "application/json"})
            assert answer.status_code == 413


def test_curl_that_waits_to_be_told_to_continue_is_refused_without_being_told(open_server: Served) -> None:
    headers = ("Content-Length: 13000000", "Content-Type: application/json", "Expect: 100-continue")
    answer = open_server.ask("POST", "/ok", *headers)
    assert (answer.status, answer.code) == (413, "request_too_large")
    assert answer.seconds < 0.5


@pytest.mark.parametrize("length", ["-1", "x", "1, 2", "1_0", "0x10", "9" * 30])
def test_a_length_that_is_no_number_is_refused(open_server: Served, length: str) -> None:
    answer = open_server.ask("POST", "/ok", f"Content-Length: {length}", "Content-Type: application/json")
    assert (answer.status, answer.reached) in {(400, 0), (413, 0)}


def test_a_body_in_chunks_without_a_length_is_counted_as_it_comes(open_server: Served) -> None:
    headers = ("Transfer-Encoding: chunked", "Content-Type: application/json")
    chunk = b"1000\r\n" + bytes(4096) + b"\r\n"
    assert open_server.ask("POST", "/ok", *headers, body=chunk * 20 + b"0\r\n\r\n").status == 200
    assert len(open_server.app.seen[-1]["body"]) == 20 * 4096
    answer = open_server.ask("POST", "/ok", *headers, body=chunk * 2000)
    assert (answer.status, answer.code, answer.reached) == (413, "request_too_large", 0)
    exact = f"{CAP:x}\r\n".encode() + bytes(CAP) + b"\r\n0\r\n\r\n"
    assert open_server.ask("POST", "/ok", *headers, body=exact).status == 200


def test_a_body_that_drips_is_refused_in_time(open_server: Served) -> None:
    head = f"POST /ok HTTP/1.1\r\nHost: {open_server.host}\r\nContent-Type: application/json\r\n"
    head += "Content-Length: 100\r\n\r\n"
    answer = open_server.send(head.encode(), *[b"x"] * 30, pause=0.1)
    assert (answer.status, answer.code, answer.reached) == (408, "request_timeout", 0)
    chunked = head.replace("Content-Length: 100", "Transfer-Encoding: chunked")
    answer = open_server.send(chunked.encode(), *[b"1\r\nx\r\n"] * 30, pause=0.1)
    assert (answer.status, answer.code, answer.reached) == (408, "request_timeout", 0)


def test_a_client_that_leaves_within_its_body_never_reaches_the_app(open_server: Served) -> None:
    before = len(open_server.app.seen)
    with socket.create_connection(("127.0.0.1", open_server.port)) as connection:
        head = f"POST /ok HTTP/1.1\r\nHost: {open_server.host}\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Content-Length: 100\r\n\r\n{{".encode())
        time.sleep(0.1)
    time.sleep(0.2)
    assert len(open_server.app.seen) == before


@pytest.mark.parametrize("method", ["GET", "HEAD", "OPTIONS"])
def test_only_a_post_has_a_body(open_server: Served, method: str) -> None:
    for header in ("Content-Length: 2", "Transfer-Encoding: chunked"):
        answer = open_server.ask(method, "/ok", header, body=b"{}" if "2" in header else b"0\r\n\r\n")
        assert (answer.status, answer.reached) == (400, 0)
    assert open_server.ask(method, "/ok", "Content-Length: 0").status == 200


# --------------------------------------------------------------------------------------------- the connection


def test_headers_that_do_not_end_in_time_end_the_connection(open_server: Served) -> None:
    request = f"GET /ok HTTP/1.1\r\nHost: {open_server.host}\r\n"
    for parts in ([], [request.encode()], [b"G"] + [b"E"] * 40, [request.encode(), *[b"x: 1\r\n"] * 40]):
        answer = open_server.send(*parts, pause=0.05)
        assert (answer.data, answer.reached) in {(b"", 0)} or answer.status == 400
        assert answer.seconds < 3
    answer = open_server.send(f"{request}\r\n".encode(), *[b"G"] + [b"E"] * 40, pause=0.05)  # the second request
    assert (answer.status, answer.reached) == (200, 1)


def test_a_connection_may_live_longer_than_headers_may_take(open_server: Served) -> None:
    request = f"GET /ok HTTP/1.1\r\nHost: {open_server.host}\r\n\r\n".encode()
    answer = open_server.send(*[request] * 6, pause=0.6 * HEAD_SECONDS)
    assert answer.data.count(b"HTTP/1.1 200") == answer.reached == 6


def test_nonsense_after_a_refusal_is_not_an_error_of_the_server(
    open_server: Served, caplog: pytest.LogCaptureFixture
) -> None:
    head = f"POST /ok HTTP/1.1\r\nHost: {open_server.host}\r\nContent-Type: application/json\r\n"
    head += "Transfer-Encoding: chunked\r\n\r\n"
    chunk = f"{CAP + 1:x}\r\n".encode() + bytes(CAP + 1) + b"\r\n"
    answer = open_server.send(head.encode() + chunk, b"zz\r\n", pause=0.3)
    assert (answer.status, answer.code) == (413, "request_too_large")
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


def test_an_answer_may_take_longer_than_headers_may(open_server: Served) -> None:
    open_server.app.left.clear()
    with socket.create_connection(("127.0.0.1", open_server.port)) as connection:
        head = f"POST /wait HTTP/1.1\r\nHost: {open_server.host}\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Content-Length: 2\r\n\r\n{{}}".encode())
        assert not open_server.app.left.wait(2 * HEAD_SECONDS)


@pytest.mark.parametrize(
    "request_line",
    [
        b"\x16\x03\x01\x02\x00\x01\r\n\r\n",
        b"GET /ok\r\n\r\n",
        b"GET /a b HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"\0" * 99,
    ],
)
def test_what_is_not_http_is_answered_with_an_error_object(open_server: Served, request_line: bytes) -> None:
    answer = open_server.send(request_line)
    assert answer.data == b"" or (answer.status, answer.code) == (400, "invalid_http")
    assert answer.reached == 0


def test_a_body_that_is_not_in_chunks_as_it_says_is_answered_once(open_server: Served) -> None:
    headers = ("Transfer-Encoding: chunked", "Content-Type: application/json")
    for body in (b"zz\r\n", b"5\r\nabc", b"-1\r\n", b"3\r\nabcd\r\n"):
        answer = open_server.ask("POST", "/ok", *headers, body=body)
        assert answer.status in (400, 408)
        assert answer.code
        assert (answer.data.count(b"HTTP/1.1"), answer.reached) == (1, 0)


# --------------------------------------------------------------------------------------------- the app fails


def test_a_failure_of_the_app_is_told_to_the_log_alone(open_server: Served, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR, "llava_pipeline.serving.guard"):
        answer = open_server.post(target="/boom")
    assert (answer.status, answer.code) == (500, "internal_error")
    assert not [word for word in (b"secret", b"0x7f", b"Traceback", b"RuntimeError") if word in answer.data]
    assert "secret at 0x7f00dead" in caplog.text
    assert "Traceback" in caplog.text


def test_half_an_answer_is_cut_and_does_not_look_whole(open_server: Served) -> None:
    answer = open_server.post(target="/half")
    assert answer.status == 200
    assert b"0\r\n\r\n" not in answer.data
    assert b"secret" not in answer.data


# --------------------------------------------------------------------------------------------- any request


def _judged(
    scope: dict[str, Any], body: list[bytes], events: list[str] | None = None, draining: bool = False
) -> list[Message]:
    """What the guard answers to a request, without a server; ``events`` tells what it read and sent, in order."""
    app, sent = Tiny(), []
    events = [] if events is None else events
    messages = [{"type": "http.request", "body": part, "more_body": n < len(body) - 1} for n, part in enumerate(body)]

    async def receive() -> Message:
        events.append("read")
        return messages.pop(0) if messages else {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        events.append("end" if message.get("more_body") is False else "sent")
        sent.append(message)

    guard = Guard(app, KEYS, max_body_bytes=10, allowed_hosts=frozenset({"localhost"}), body_seconds=1)
    guard.draining = draining
    asyncio.run(guard(scope, receive, send))
    assert bool(app.seen) == (bool(sent) and sent[0]["status"] == 200)
    return sent


HEADERS = [(b"host", b"localhost"), (b"authorization", b"Bearer llava-secret"), (b"content-type", b"application/json")]


def scope_of(*headers: tuple[bytes, bytes]) -> dict[str, Any]:
    return {"type": "http", "method": "POST", "path": "/ok", "raw_path": b"/ok", "headers": list(headers)}


def test_two_of_a_header_are_refused_also_by_themselves() -> None:
    assert _judged(scope_of(*HEADERS), [b"{}"])[0]["status"] == 200
    for doubled, status in zip(HEADERS, (400, 401, 415), strict=True):
        assert _judged(scope_of(*HEADERS, doubled), [b"{}"])[0]["status"] == status


def test_a_refusal_is_said_before_the_rest_of_the_body_is_thrown_away_and_ends_after_it() -> None:
    events: list[str] = []
    _judged(scope_of(*HEADERS, (b"content-length", b"11")), [b"1", b"2", b"3"], events)
    assert events == ["sent", "sent", "read", "read", "read", "end"]
    events.clear()
    _judged(scope_of(*HEADERS, (b"content-length", b"11"), (b"expect", b"100-continue")), [b"1"], events)
    assert events == ["sent", "sent", "end"]


# --------------------------------------------------------------------------------------------- where there is no room


@pytest.fixture
def narrow() -> Iterator[tuple[Served, list[str]]]:
    """Room for one POST."""
    codes: list[str] = []
    for served in serve(Tiny(), None, max_requests=1, refused=codes.append):
        yield served, codes


def test_who_finds_no_room_is_told_to_come_again_before_the_body_is_read_and_does_then(
    narrow: tuple[Served, list[str]],
) -> None:
    server, codes = narrow
    with socket.create_connection(("127.0.0.1", server.port), timeout=8) as waiting:
        head = f"POST /wait HTTP/1.1\r\nHost: {server.host}\r\nContent-Type: application/json\r\n"
        waiting.sendall(f"{head}Content-Length: 2\r\n\r\n{{}}".encode())
        _until(lambda: bool(server.app.seen))
        answer = server.post("Content-Length: 90000", body=b"")
        assert (answer.status, answer.code, answer.reached) == (429, "rate_limit_exceeded", 0)
        assert answer.headers["retry-after"] == "1"
        assert server.ask("GET", "/ok").status == 200  # who only looks is always let in
    assert server.app.left.wait(8)
    _until(lambda: server.post().status == 200)
    assert set(codes) == {"rate_limit_exceeded"}


def test_a_request_that_fails_or_is_refused_gives_its_room_back(narrow: tuple[Served, list[str]]) -> None:
    server, _ = narrow
    for target, length, status in (("/boom", 2, 500), ("/ok", CAP + 1, 413), ("/half", 2, 200), ("/ok", 2, 200)):
        assert server.post(f"Content-Length: {length}", target=target).status == status
    slow = server.post("Content-Length: 10", body=b"{")
    assert (slow.status, slow.code) == (408, "request_timeout")
    assert server.post().status == 200


def test_a_server_that_is_going_takes_no_more_questions_but_tells_how_it_is() -> None:
    start, body = _judged(scope_of(*HEADERS), [b"{}"], draining=True)[:2]
    assert start["status"] == 503
    assert (b"retry-after", b"1") in start["headers"]
    assert json.loads(body["body"])["error"]["code"] == "server_closing"
    assert _judged(scope_of(*HEADERS) | {"method": "GET"}, [b""], draining=True)[0]["status"] == 200


@pytest.fixture
def impatient() -> Iterator[Served]:
    """Room for one POST, whose answer is to be read at once."""
    yield from serve(Large(), None, max_requests=1, send_seconds=0.5)


def test_who_does_not_read_its_answer_keeps_nobodys_place(impatient: Served) -> None:
    with socket.create_connection(("127.0.0.1", impatient.port), timeout=8) as idle:
        head = f"POST /ok HTTP/1.1\r\nHost: {impatient.host}\r\nContent-Type: application/json\r\n"
        idle.sendall(f"{head}Content-Length: 2\r\n\r\n{{}}".encode())
        _until(lambda: bool(impatient.app.seen))
        assert impatient.post().status == 429
        _until(lambda: impatient.post().status == 200)


class Large(Tiny):
    """Its first answer is larger than every buffer between."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self.seen:
            return await super().__call__(scope, receive, send)
        self.seen.append({})
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for _ in range(2000):
            await send({"type": "http.response.body", "body": bytes(1 << 16), "more_body": True})


@pytest.mark.parametrize("path", ["/healthz", "/ok"])
def test_only_a_probe_may_name_any_host(path: str) -> None:
    for server in serve(Tiny(), None, probes=frozenset({"/healthz"})):
        assert server.ask("GET", path, "Host: 10.1.2.3:80").status == (200 if path == "/healthz" else 400)
        assert server.ask("GET", path, "Host: a/b").status == 400


def _until(look: Any, seconds: float = 8.0) -> None:
    until = time.monotonic() + seconds
    while not look():
        assert time.monotonic() < until
        time.sleep(0.02)


@settings(max_examples=150, deadline=None)
@given(
    method=st.sampled_from(["GET", "POST", "PUT"]),
    raw=st.one_of(st.binary(max_size=12), st.sampled_from([b"/ok", b"/../ok", b"//ok"])),
    headers=st.lists(
        st.tuples(
            st.sampled_from([b"host", b"authorization", b"content-type", b"content-length", b"origin", b"x"]),
            st.one_of(
                st.binary(max_size=12),
                st.sampled_from([b"localhost", b"Bearer llava-secret", b"application/json", b"3", b"http://localhost"]),
            ),
        ),
        max_size=6,
    ),
    body=st.lists(st.binary(max_size=8), min_size=1, max_size=3),
)
def test_any_request_has_one_answer_and_none_is_a_failure(
    method: str, raw: bytes, headers: list[tuple[bytes, bytes]], body: list[bytes]
) -> None:
    path = unquote(raw.decode("latin-1"))
    scope = {"type": "http", "method": method, "path": path, "raw_path": raw, "headers": headers}
    sent = _judged(scope, body)
    assert next(message["status"] for message in sent if "status" in message) < 500
    assert sent[-1].get("more_body", False) is False
    if sent[0]["status"] == 200:
        assert (b"authorization", b"Bearer llava-secret") in headers
        assert (b"host", b"localhost") in headers
        assert len(b"".join(body)) <= 10 or method == "GET"
