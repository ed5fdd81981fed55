"""A small hub on loopback that speaks huggingface_hub's protocol, and misbehaves when told to.

Small files come straight from ``/resolve``; weights and Parquet are answered with a redirect to another origin, as the
hub's storage is, where byte ranges work. Data sets have their addresses below ``/datasets``, and a tree of folders.
"""

from __future__ import annotations

import hashlib
import json
import re
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import lru_cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs

if TYPE_CHECKING:
    import pytest

LARGE = (".safetensors", ".bin", ".gguf", ".parquet", ".tar")
DRIP_SECONDS = 0.05  # between two bytes of a slow body


@dataclass
class Fault:
    """What goes wrong with the next ``times`` requests for files whose name ends in ``file``.

    ``kind`` is a status code, of the hub or with ``stored`` of its storage; or, of a body: ``cut`` (the connection ends
    early), ``short`` (an early end that claims to be whole), ``garbled`` (right length, wrong bytes), ``slow`` (a byte
    now and then), ``silent`` (no answer at all). With ``listing`` it meets what is asked about a repository instead.
    """

    kind: int | str
    times: int = 1
    file: str = ""
    headers: dict[str, str] = field(default_factory=dict)
    stored: bool = False
    listing: bool = False

    def takes(self, name: str, has_body: bool, listing: bool = False) -> bool:
        """Use the fault up on a request it fits."""
        of_body = isinstance(self.kind, str) or self.stored
        if self.times <= 0 or not name.endswith(self.file) or self.listing != listing:
            return False
        if of_body != has_body and not listing:
            return False
        self.times -= 1
        return True


class Hub:
    """Model repositories at one commit each, and the requests that came for them."""

    def __init__(self) -> None:
        self.repositories: dict[str, tuple[str, dict[str, bytes]]] = {}
        self.faults: list[Fault] = []
        self.requests: list[tuple[str, str]] = []
        self.sent: list[tuple[str, int, int]] = []
        """Name, first byte and number of bytes of every part of a file that was sent."""
        self.stopped = threading.Event()
        self.gated: set[str] = set()
        self.port = 0
        self.connections: list[socket.socket] = []
        self._server: ThreadingHTTPServer | None = None

    @property
    def endpoint(self) -> str:
        """What HF_ENDPOINT is set to."""
        return f"http://127.0.0.1:{self.port}"

    def add(self, repo_id: str, revision: str, files: dict[str, bytes]) -> None:
        """Publish a repository."""
        self.repositories[repo_id] = (revision, files)

    def start(self) -> None:
        """Listen on a free port, or on the one it had."""
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", self.port), handler)
        self._server.daemon_threads = True
        self.stopped.clear()
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self) -> None:
        """Go down: open connections end, new ones are refused."""
        self.stopped.set()
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None
        for connection in self.connections:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def downloads(self) -> list[str]:
        """Names of the files whose bytes were asked for."""
        return [path.rsplit("/", 1)[-1] for method, path in self.requests if method == "GET"]


@contextmanager
def running_hub() -> Iterator[Hub]:
    """A hub that listens during the block."""
    hub = Hub()
    hub.start()
    try:
        yield hub
    finally:
        hub.stop()


def follow(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make this process's libraries take a hub for theirs: they read HF_ENDPOINT once, when they are imported."""
    import datasets.config
    import huggingface_hub

    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", hub.endpoint)
    monkeypatch.setattr(
        datasets.config, "HUB_DATASETS_URL", hub.endpoint + "/datasets/{repo_id}/resolve/{revision}/{path}"
    )
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_URL_HOSTS", constants.HF_URL_HOSTS | {"127.0.0.1"})


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else a body waits 40 ms for its headers to be acknowledged

    def setup(self) -> None:
        """Remember the connection, so that the hub can end it."""
        super().setup()
        self.hub.connections.append(self.connection)

    def do_GET(self) -> None:
        self._serve(body=True)

    def do_HEAD(self) -> None:
        self._serve(body=False)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""

    def do_POST(self) -> None:
        self._serve(body=True)

    def _serve(self, body: bool) -> None:
        path = self.path.split("?")[0]
        self.hub.requests.append((self.command, path))
        form = parse_qs(self.rfile.read(int(self.headers.get("Content-Length", 0))).decode())
        if match := re.fullmatch(r"/(?:datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self._resolve(match[1], match[2], match[3], body)
        elif match := re.fullmatch(r"/storage/([^/]+/[^/]+)/(.+)", path):
            self._send_file(self.hub.repositories[match[1]][1][match[2]], match[2], {}, body)
        elif match := re.fullmatch(
            r"/api/(?:models|datasets)/([^/]+/[^/]+)(?:/(revision|tree|paths-info)/([^/]+)(?:/(.+))?)?", path
        ):
            recursive = parse_qs(self.path.partition("?")[2]).get("recursive", [""])[0].lower() in ("true", "1")
            self._describe(match[1], match[2], match[3], (match[4] or "", recursive), form.get("paths", []))
        else:
            self._refuse(404, {})

    def _resolve(self, repo_id: str, revision: str, name: str, body: bool) -> None:
        if (fault := self._fault(name, has_body=False)) is not None:
            self._refuse(int(fault.kind), fault.headers)
            return
        if (files := self._files(repo_id, revision)) is None:
            return
        commit = self.hub.repositories[repo_id][0]
        if name not in files:
            self._refuse(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
            return
        digest = _sha256(files[name])
        headers = {"X-Repo-Commit": commit, "ETag": f'"{digest[:40]}"'}
        if name.endswith(LARGE):
            headers |= {"X-Linked-Size": str(len(files[name])), "X-Linked-ETag": f'"{digest}"', "Content-Length": "0"}
            headers["Location"] = f"http://localhost:{self.hub.port}/storage/{repo_id}/{name}"
            self._send(302, headers, b"")
        else:
            self._send_file(files[name], name, headers, body)

    def _files(self, repo_id: str, revision: str) -> dict[str, bytes] | None:
        """The repository's files, or None after an answer that says why not."""
        if repo_id in self.hub.gated:
            self._refuse(403, {"X-Error-Code": "GatedRepo"})
        elif repo_id not in self.hub.repositories:
            self._refuse(401, {"X-Error-Code": "RepoNotFound"})
        elif revision not in ("main", self.hub.repositories[repo_id][0]):
            self._refuse(404, {"X-Error-Code": "RevisionNotFound"})
        else:
            return self.hub.repositories[repo_id][1]
        return None

    def _send_file(self, content: bytes, name: str, headers: dict[str, str], body: bool) -> None:
        fault = self._fault(name, has_body=True) if body else None
        if fault is not None and isinstance(fault.kind, int):
            self._refuse(fault.kind, fault.headers)
            return
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        start = int(match[1]) if match else 0
        stop = min(len(content), int(match[2]) + 1) if match and match[2] else len(content)
        if fault is not None and fault.kind == "silent":
            self._say_nothing()
            return
        part = content[start:stop]
        if fault is not None and fault.kind == "garbled":
            part = bytes(255 - byte for byte in part)
        stated = part[: len(part) // 2] if fault is not None and fault.kind == "short" else part
        headers = headers | {"Content-Length": str(len(stated)), "Accept-Ranges": "bytes"}
        if match:
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(content)}"
        sent = stated[: len(stated) // 2] if fault is not None and fault.kind == "cut" else stated
        if body:
            self.hub.sent.append((name, start, len(sent)))
        self._send(206 if match else 200, headers, sent if body else b"", fault is not None and fault.kind == "slow")
        self.close_connection = self.close_connection or sent is not stated

    def _describe(
        self, repo_id: str, what: str | None, revision: str | None, below: tuple[str, bool], paths: list[str]
    ) -> None:
        fault = self._fault("", has_body=False, listing=True)
        if fault is not None and isinstance(fault.kind, int):
            self._refuse(fault.kind, fault.headers)
            return
        if fault is not None and fault.kind == "silent":
            self._say_nothing()
            return
        if (files := self._files(repo_id, revision or "main")) is None:
            return
        commit = self.hub.repositories[repo_id][0]
        listing: Any = {"id": repo_id, "sha": commit, "siblings": [{"rfilename": name} for name in sorted(files)]}
        if what == "tree":
            listing = _tree(files, *below)
            if below[0] and not listing:
                self._refuse(404, {"X-Error-Code": "EntryNotFound"})
                return
        elif what == "paths-info":
            listing = [_entry(path, files[path]) for path in paths if path in files]
        content = json.dumps(listing).encode()
        if fault is not None and fault.kind == "garbled":
            content = bytes(255 - byte for byte in content)
        self._send(200, {"Content-Type": "application/json", "Content-Length": str(len(content))}, content)

    def _say_nothing(self) -> None:
        """Keep the connection open and never answer."""
        self.hub.stopped.wait(30)
        self.close_connection = True

    def _fault(self, name: str, has_body: bool, listing: bool = False) -> Fault | None:
        return next((fault for fault in self.hub.faults if fault.takes(name, has_body, listing)), None)

    def _refuse(self, status: int, headers: dict[str, str]) -> None:
        self._send(status, {"Content-Length": "0"} | headers, b"")

    def _send(self, status: int, headers: dict[str, str], content: bytes, slowly: bool = False) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        for place in range(len(content) if slowly else 0):
            self.wfile.write(content[place : place + 1])
            if self.hub.stopped.wait(DRIP_SECONDS):
                return
        if not slowly:
            self.wfile.write(content)


@lru_cache(64)
def _sha256(content: bytes) -> str:
    """Digest of a file, reckoned once: many requests ask for it."""
    return hashlib.sha256(content).hexdigest()


def _tree(files: dict[str, bytes], folder: str, recursive: bool) -> list[dict[str, Any]]:
    """What lies in a folder, as the hub lists it."""
    start = f"{folder}/" if folder else ""
    found: dict[str, dict[str, Any]] = {}
    for path in sorted(files):
        if not path.startswith(start):
            continue
        parts = path[len(start) :].split("/")
        for depth in range(1, len(parts) if recursive else min(2, len(parts))):
            parent = start + "/".join(parts[:depth])
            found[parent] = {"type": "directory", "path": parent, "size": 0, "oid": "0" * 40}
        if recursive or len(parts) == 1:
            found[path] = _entry(path, files[path])
    return list(found.values())


def _entry(path: str, content: bytes) -> dict[str, Any]:
    """One file: git's name for its content, or for the pointer to it where the content lies in the storage."""
    entry: dict[str, Any] = {"type": "file", "path": path, "size": len(content)}
    if path.endswith(LARGE):
        digest = _sha256(content)
        entry["lfs"] = {"oid": digest, "size": len(content), "pointerSize": 130}
        content = f"version https://git-lfs.github.com/spec/v1\noid sha256:{digest}\nsize {len(content)}\n".encode()
    return entry | {"oid": hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()}
