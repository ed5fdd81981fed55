"""The routes: chat completions as OpenAI's clients speak them, what is served, how it is, and the page to talk to.

The guard stands around this app (``guard``): keys, hosts, sizes and headers are seen to before a route is.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import AsyncIterator, Coroutine
from pathlib import Path
from typing import Annotated, Any, TypeVar

from fastapi import FastAPI, Request
from fastapi import Path as PathPart
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, Response, StreamingResponse
from prometheus_client import Counter
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

import llava_pipeline
from llava_pipeline.serving import wire
from llava_pipeline.serving.answers import Answer, Desk
from llava_pipeline.serving.engine import Piece
from llava_pipeline.serving.guard import error_object
from llava_pipeline.serving.versions import Version, Versions
from llava_pipeline.serving.wire import ChatRequest, Rejected
from llava_pipeline.tracking.bundle import Bundle

log = logging.getLogger(__name__)
T = TypeVar("T")
Responses = dict[int | str, dict[str, Any]]
PAGE = Path(__file__).with_name("page")
PAGE_FILES = {
    "/": ("index.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
}
PROBES = frozenset({"/healthz", "/readyz"})
PUBLIC = PROBES | {*PAGE_FILES}
PING_SECONDS = 15.0
STUCK_SECONDS = 120.0  # of an engine that does not come round; one step of a large batch takes seconds
MAX_FAILURES = 8  # of the engine, in a row
GONE = 499  # nobody reads it
NUM_SAMPLES = 8
REFUSALS = (400, 401, 403, 404, 405, 408, 413, 415, 429, 503)
ERROR = {"model": wire.ErrorObject}
STREAM = {"content": {"text/event-stream": {"schema": {"type": "string"}}, "application/json": {}}}
METRICS: Responses = {
    200: {"content": {"text/plain": {"schema": {"type": "string"}}}, "description": "Counts and times."}
}
IMAGE: Responses = {200: {"content": {"image/webp": {}}, "description": "A picture."}, 404: ERROR}


class _Left(Exception):
    """The client went away."""


def build(desk: Desk) -> FastAPI:
    """The app. ``app.state.draining`` says that the server is going."""

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await desk.pictures.start()
        yield
        await desk.pictures.close()

    app = FastAPI(
        title="llava-pipeline", version=llava_pipeline.__version__, lifespan=lifespan,
        responses=dict.fromkeys(REFUSALS, ERROR), docs_url=None, redoc_url=None,
        redirect_slashes=False,  # to http:// also where people came by https://, with their key
    )  # fmt: skip
    app.state.draining = False
    _add_refusals(app, desk)
    _add_chat(app, desk)
    _add_models(app, desk)
    _add_health(app, desk)
    _add_page(app, desk)
    _publish(app)
    return app


def _publish(app: FastAPI) -> None:
    """The schema without the one answer that FastAPI adds to it and that is never given."""
    schema = app.openapi()
    for operations in schema["paths"].values():
        for operation in operations.values():
            operation["responses"].pop("422", None)
    for name in ("HTTPValidationError", "ValidationError"):
        schema["components"]["schemas"].pop(name, None)


def _add_chat(app: FastAPI, desk: Desk) -> None:
    @app.post("/v1/chat/completions", response_model=wire.Completion, responses={200: STREAM})
    async def complete(asked: ChatRequest, request: Request) -> Response:
        """Answer; as server-sent events where ``stream`` says so."""
        began = time.monotonic()
        try:
            answer, first = await _unless_left(request.receive, _first(desk, asked))
        except _Left:
            desk.metrics.failed.labels("left").inc()
            return Response(status_code=GONE)
        desk.metrics.queue.observe(answer.waited)
        desk.metrics.time_to_first_token.observe(time.monotonic() - began)
        headers = {"x-request-id": answer.id, "x-model-version": answer.version.bundle.version}
        watched = _watched(desk, answer, first, request.scope["state"].get("key_name"))
        if asked.stream:
            return _Events(_written(answer, watched, asked.with_usage, desk.metrics.failed), answer, headers)
        try:
            told = await _unless_left(request.receive, _whole(answer, watched))
        except _Left:
            return Response(status_code=GONE)
        finally:
            answer.leave()
        return Response(told.model_dump_json(), headers=headers, media_type="application/json")


async def _first(desk: Desk, asked: ChatRequest) -> tuple[Answer, Piece]:
    answer = await desk.begin(asked)
    try:
        return answer, await answer.next()
    except BaseException:
        answer.leave()
        raise


async def _watched(desk: Desk, answer: Answer, piece: Piece, key_name: str | None) -> AsyncIterator[Piece]:
    """An answer's pieces, counted and timed."""
    metrics, last = desk.metrics, time.monotonic()
    ended: str = "left"
    failed = False
    try:
        while True:
            ended = piece.ended or ended  # before it is given out: who has the last piece asks for no more
            yield piece
            if piece.ended is not None:
                return
            before = answer.num_tokens
            piece = await answer.next()
            now = time.monotonic()
            metrics.inter_token.observe((now - last) / max(1, piece.num_tokens - before))
            last = now
    except Rejected as rejected:
        ended, failed = rejected.code, True
        raise
    finally:
        began = last if answer.ask is None else answer.ask.asked_at
        metrics.prompt_tokens.inc(answer.num_prompt_tokens)
        metrics.generated_tokens.inc(answer.num_tokens)
        if not failed:
            metrics.answered.labels(ended).inc()
        log.info(
            "%s %s %s: %d tokens read, %d written, %s after %.2f s", answer.id, answer.version.name, key_name or "-",
            answer.num_prompt_tokens, answer.num_tokens, ended, time.monotonic() - began,
        )  # fmt: skip


async def _whole(answer: Answer, pieces: AsyncIterator[Piece]) -> wire.Completion:
    text, ended = [], None
    async for piece in pieces:
        text.append(piece.text)
        ended = piece.ended
    return wire.Completion(
        id=answer.id, created=answer.created, model=answer.version.name, usage=answer.usage,
        choices=[wire.Choice(message=wire.Answered(content="".join(text)), finish_reason=ended or "stop")],
        system_fingerprint=answer.version.fingerprint,
    )  # fmt: skip


async def _written(
    answer: Answer, pieces: AsyncIterator[Piece], with_usage: bool, failed: Counter
) -> AsyncIterator[str]:  # fmt: skip
    """An answer as server-sent events: who speaks, what it says, why it ends, what it took."""

    def chunk(*choices: wire.ChunkChoice, **more: Any) -> str:
        told = wire.Chunk(
            id=answer.id, created=answer.created, model=answer.version.name, choices=list(choices),
            system_fingerprint=answer.version.fingerprint, **({"usage": None} if with_usage else {}) | more,
        )  # fmt: skip
        whole = told.model_dump(exclude_unset=True) | {"object": told.object}
        return _event({**whole, "choices": [_choice(choice) for choice in choices]})

    yield chunk(wire.ChunkChoice(delta=wire.Delta(role="assistant", content="")))
    try:
        ended = None
        async for piece in _pinged(pieces):
            if piece is None:
                yield ": ping\n\n"
                continue
            if piece.text:
                yield chunk(wire.ChunkChoice(delta=wire.Delta(content=piece.text)))
            ended = piece.ended
    except Rejected as rejected:
        failed.labels(rejected.code).inc()
        yield _event(error_object(rejected.status, rejected.code, rejected.message))
        return
    yield chunk(wire.ChunkChoice(delta=wire.Delta(), finish_reason=ended))
    if with_usage:
        yield chunk(usage=answer.usage)
    yield _event("[DONE]")


def _choice(choice: wire.ChunkChoice) -> dict[str, Any]:
    return {
        "index": 0, "delta": choice.delta.model_dump(exclude_unset=True), "logprobs": None,
        "finish_reason": choice.finish_reason,
    }  # fmt: skip


def _event(data: dict[str, Any] | str) -> str:
    written = data if isinstance(data, str) else json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    return f"data: {written}\n\n"


async def _pinged(pieces: AsyncIterator[Piece]) -> AsyncIterator[Piece | None]:
    """The pieces, and None wherever so long nothing came that a proxy might think nothing will."""
    coming: asyncio.Task[Piece] | None = None
    try:
        while True:
            coming = coming or asyncio.ensure_future(_next(pieces))
            done, _ = await asyncio.wait({coming}, timeout=PING_SECONDS)
            if not done:
                yield None
                continue
            piece, coming = coming.result(), None
            yield piece
            if piece.ended is not None:
                return
    finally:
        if coming is not None:
            coming.cancel()
            await asyncio.gather(coming, return_exceptions=True)
        await pieces.aclose()  # type: ignore[attr-defined]


async def _next(pieces: AsyncIterator[Piece]) -> Piece:
    return await anext(pieces)


class _Events(StreamingResponse):
    """A stream whose answer ends when nobody reads it any more."""

    def __init__(self, events: AsyncIterator[str], answer: Answer, headers: dict[str, str]) -> None:
        more = {"cache-control": "no-cache", "x-accel-buffering": "no"}
        super().__init__(events, headers=headers | more, media_type="text/event-stream")
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with contextlib.suppress(_Left):
            try:
                await _unless_left(receive, self.stream_response(send))
            finally:
                self._answer.leave()


async def _unless_left(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """What comes of some work, which is given up when the client goes away."""
    working, watching = asyncio.ensure_future(work), asyncio.ensure_future(_left(receive))
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise _Left
        return working.result()
    finally:
        for task in (working, watching):
            task.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _add_models(app: FastAPI, desk: Desk) -> None:
    def all_models() -> list[wire.Model]:
        found = desk.versions.by_alias
        main = desk.versions.main
        by_alias = [_model(alias, alias, version, version is main) for alias, version in found.items()]
        once = {version.name: version for version in found.values()}
        return by_alias + [_model(name, None, version, False) for name, version in once.items()]

    @app.get("/v1/models")
    async def models() -> wire.ModelList:
        """Every alias and every version that answers."""
        return wire.ModelList(data=all_models())

    @app.get("/v1/models/{name}")
    async def model(name: Annotated[str, PathPart(max_length=256)]) -> wire.Model:
        """One of them."""
        for one in all_models():
            if one.id == name:
                return one
        raise Rejected(404, "model_not_found", "No model of this name is served here.", "model")


def _model(name: str, alias: str | None, version: Version, default: bool) -> wire.Model:
    bundle = version.bundle
    return wire.Model(
        id=name, created=int(version.loaded_at), alias=alias, default=default, version=bundle.version,
        digest=bundle.projector_digest, run_url=bundle.run_address,
        scores={key: _number(score) for key, score in bundle.scores.items()},
    )  # fmt: skip


def _number(score: str) -> float | str:
    try:
        return float(score)
    except ValueError:
        return score


def _add_health(app: FastAPI, desk: Desk) -> None:
    @app.get("/healthz", responses={503: {"model": wire.Health}})
    async def healthz() -> JSONResponse:
        """Whether the process works: its event loop and the engine's thread come round."""
        asked = time.monotonic()
        await asyncio.sleep(0)
        now = time.monotonic()
        engines = desk.engine.engines
        still = max(now - engine.beat for engine in engines)
        works = all(engine.thread.is_alive() and engine.num_failures < MAX_FAILURES for engine in engines)
        healthy = works and still < STUCK_SECONDS
        told = wire.Health(healthy=healthy, loop_seconds=round(now - asked, 4), engine_seconds=round(still, 1))
        return JSONResponse(told.model_dump(), 200 if healthy else 503)

    @app.get("/readyz", response_model=wire.Ready, responses={503: {"model": wire.Ready}})
    async def readyz() -> JSONResponse:
        """Whether questions are answered, and by what."""
        main = desk.versions.main
        ready = main is not None and not app.state.draining
        told = wire.Ready(
            ready=ready, model=desk.versions.name, version=main and main.bundle.version,
            run_id=main and main.bundle.run_id, digest=main and main.bundle.projector_digest,
            loaded_at=main and main.loaded_at, last_error=_outline(desk.versions),
        )  # fmt: skip
        return JSONResponse(told.model_dump(), 200 if ready else 503)

    @app.get("/metrics", response_class=Response, responses=METRICS)
    async def metrics() -> Response:
        """For Prometheus."""
        return Response(desk.metrics.written(), media_type="text/plain; version=0.0.4; charset=utf-8")


def _outline(versions: Versions) -> str | None:
    """What keeps an alias from being followed. Anybody may read it: paths and addresses stand in the log alone."""
    problems = versions.problems
    told = [f"{alias}: {problems[alias].partition(': ')[0]}" for alias in versions.aliases if alias in problems]
    return f"{', '.join(told)}; the server's log says why" if told else None


def _add_page(app: FastAPI, desk: Desk) -> None:
    for path, (name, kind) in PAGE_FILES.items():
        app.add_api_route(path, _file(PAGE / name, kind), include_in_schema=False)

    @app.get("/samples")
    async def samples() -> wire.Samples:
        """Questions to begin with, of those that the default model was evaluated on."""
        main = desk.versions.main
        return wire.Samples(data=[] if main is None else await asyncio.to_thread(_samples, main.bundle))

    @app.get("/samples/{version}/{name}", response_class=Response, responses=IMAGE)
    async def sample(
        version: Annotated[str, PathPart(pattern=r"^[0-9]{1,9}$")],
        name: Annotated[str, PathPart(pattern=r"^[0-9]{6}\.webp$")],
    ) -> Response:
        """The picture of one, of a version that answers."""
        for one in desk.versions.by_alias.values():
            if one.bundle.version == version:
                with contextlib.suppress(OSError):  # it has no such picture, or no longer
                    data = await asyncio.to_thread((one.bundle.folder / "samples" / name).read_bytes)
                    return Response(data, media_type="image/webp")
        raise Rejected(404, "not_found", "There is no such picture.")


def _file(path: Path, kind: str) -> Any:
    async def serve() -> FileResponse:
        return FileResponse(path, media_type=f"{kind}; charset=utf-8", headers={"cache-control": "no-cache"})

    return serve


def _samples(bundle: Bundle) -> list[wire.Sample]:
    """The first ones of each true answer, answered rightly or not."""
    found: dict[str, wire.Sample] = {}
    try:
        table = json.loads((bundle.folder / "samples.json").read_text(encoding="utf-8"))
        for values in table["data"]:
            row = dict(zip(table["columns"], values, strict=True))
            name = Path(row["picture"]["filepath"]).name
            path = f"/samples/{bundle.version}/{name}"
            if (bundle.folder / "samples" / name).is_file():
                told = wire.Sample(picture=path, question=row["question"], truth=row["truth"])
                found.setdefault(row["truth"], told)
    except (OSError, ValueError, KeyError, TypeError):  # versions of other times have none, or in another form
        log.debug("version %s has no samples", bundle.version, exc_info=True)
    return list(found.values())[:NUM_SAMPLES]


def _add_refusals(app: FastAPI, desk: Desk) -> None:
    """What went wrong as OpenAI's clients read it; each is counted by its code."""

    def told(status: int, code: str, message: str, param: str | None = None, **headers: str) -> Response:
        desk.metrics.failed.labels(code).inc()
        return JSONResponse(error_object(status, code, message, param), status, headers)

    @app.exception_handler(Exception)
    async def unexpected(_: Request, error: Exception) -> Response:
        log.error("a request failed", exc_info=error)
        return told(500, "internal_error", "internal error")

    @app.exception_handler(HTTPException)
    async def no_route(_: Request, error: HTTPException) -> Response:
        code = {400: "invalid_json", 404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "refused")
        message = "The body is not JSON." if error.status_code == 400 else "There is nothing here for this request."
        return told(error.status_code, code, message, **dict(error.headers or {}))

    @app.exception_handler(RequestValidationError)
    async def not_valid(request: Request, error: RequestValidationError) -> Response:
        return await rejected(request, wire.refusal_of(error.errors()[0]))

    @app.exception_handler(Rejected)
    async def rejected(_: Request, error: Rejected) -> Response:
        again = {} if error.retry_after is None else {"retry-after": str(error.retry_after)}
        return told(error.status, error.code, error.message, error.param, **again)
