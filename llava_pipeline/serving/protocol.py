"""uvicorn's HTTP/1.1, but patient for a while only, and with our error object for what is not HTTP at all.

uvicorn waits for ever for a request line and headers that do not end; no app sees such a request, so no app can end it.
"""

from __future__ import annotations

import asyncio
import json

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from llava_pipeline.serving.guard import error_object, with_headers


class Protocol(H11Protocol):
    """``uvicorn.Config(http=Protocol, ws="none")``: a connection whose next request has not come with all its headers
    within ``head_seconds`` is closed."""

    head_seconds = 10.0
    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        self._wait_no_more()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._is_answering():
            self._wait_no_more()
        elif self._deadline is None:
            self._wait()

    def send_400_response(self, msg: str) -> None:
        """Answer what is not a request. Within an answer nothing can be said any more."""
        body = json.dumps(error_object(400, "invalid_http", msg)).encode()
        given = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        response = h11.Response(status_code=400, headers=with_headers([*given, (b"connection", b"close")]))
        try:
            for event in (response, h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        except h11.LocalProtocolError:
            pass
        self.transport.close()

    def _is_answering(self) -> bool:
        return bool(self.cycle and not self.cycle.response_complete)

    def _wait(self) -> None:
        self._deadline = asyncio.get_running_loop().call_later(self.head_seconds, self._too_late)

    def _wait_no_more(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _too_late(self) -> None:
        self._deadline = None
        if not self._is_answering():
            self.transport.close()
