"""A small hub on loopback that speaks huggingface_hub's protocol, and misbehaves when told to.

Small files come straight from ``/resolve``; weights are answered with a redirect to another origin, as the hub's
storage is, where byte ranges work.
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
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

LARGE = (".safetensors", ".bin", ".gguf")


@dataclass
class Fault:
    """What goes wrong with the next ``times`` requests for files whose name ends in ``file``.

    ``kind`` is a status code, of the hub or with ``stored`` of its storage; or, of a body: ``cut`` (the connection ends
    early), ``short`` (an early end that claims to be whole), ``garbled`` (right length, wrong bytes).
    """

    kind: int | str
    times: int = 1
    file: str = ""
    headers: dict[str, str] = field(default_factory=dict)
    stored: bool = False

    def takes(self, name: str, has_body: bool) -> bool:
        """Use the fault up on a request it fits."""
        of_body = isinstance(self.kind, str) or self.stored
        if self.times <= 0 or not name.endswith(self.file) or of_body != has_body:
            return False
        self.times -= 1
        return True


class Hub:
    """Model repositories at one commit each, and the requests that came for them."""

    def __init__(self) -> None:
        self.repositories: dict[str, tuple[str, dict[str, bytes]]] = {}
        self.faults: list[Fault] = []
        self.requests: list[tuple[str, str]] = []
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
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self) -> None:
        """Go down: open connections end, new ones are refused."""
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


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

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

    def _serve(self, body: bool) -> None:
        path = self.path.split("?")[0]
        self.hub.requests.append((self.command, path))
        if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self._resolve(match[1], match[2], match[3], body)
        elif match := re.fullmatch(r"/storage/([^/]+/[^/]+)/(.+)", path):
            self._send_file(self.hub.repositories[match[1]][1][match[2]], match[2], {}, body)
        elif match := re.fullmatch(r"/api/(?:models|datasets)/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?", path):
            self._describe(match[1], match[2], match[3])
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
        digest = hashlib.sha256(files[name]).hexdigest()
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
        start = int(match[1]) if (match := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))) else 0
        part = content[start:]
        if fault is not None and fault.kind == "garbled":
            part = bytes(255 - byte for byte in part)
        stated = part[: len(part) // 2] if fault is not None and fault.kind == "short" else part
        headers = headers | {"Content-Length": str(len(stated)), "Accept-Ranges": "bytes"}
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        sent = stated[: len(stated) // 2] if fault is not None and fault.kind == "cut" else stated
        self._send(206 if start else 200, headers, sent if body else b"")
        self.close_connection = self.close_connection or sent is not stated

    def _describe(self, repo_id: str, what: str | None, revision: str | None) -> None:
        if (files := self._files(repo_id, revision or "main")) is None:
            return
        commit = self.hub.repositories[repo_id][0]
        listing: Any = {"id": repo_id, "sha": commit, "siblings": [{"rfilename": name} for name in sorted(files)]}
        if what == "tree":
            listing = [
                {"type": "file", "path": name, "size": len(files[name]), "oid": commit} for name in sorted(files)
            ]
        content = json.dumps(listing).encode()
        self._send(200, {"Content-Type": "application/json", "Content-Length": str(len(content))}, content)

    def _fault(self, name: str, has_body: bool) -> Fault | None:
        return next((fault for fault in self.hub.faults if fault.takes(name, has_body)), None)

    def _refuse(self, status: int, headers: dict[str, str]) -> None:
        self._send(status, {"Content-Length": "0"} | headers, b"")

    def _send(self, status: int, headers: dict[str, str], content: bytes) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)
