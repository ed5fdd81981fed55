"""The baseline of ``benchmarks/serve.py``: transformers' ``generate`` behind FastAPI, one request at a time.

    python benchmarks/plain_server.py --alias champion --port 0 --json

As people write it: the same parts, projector, precision and prompt as ``llava-pipeline serve`` answers with, a lock
around ``generate``, ``TextIteratorStreamer`` where a client asks for a stream. No queue, no batching, nothing kept
between two requests, and no defence of any kind, which makes it a little faster than it may be.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import os
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import uvicorn
from fastapi import FastAPI
from fastapi.responses import StreamingResponse
from PIL import Image
from transformers import TextIteratorStreamer

sys.path.insert(0, str(Path(__file__).parents[1]))
from llava_pipeline.evaluation.read import stop_ids
from llava_pipeline.spec import load_spec
from llava_pipeline.stages.answering import Answering
from llava_pipeline.tracking.registry import download_projector, recorded_spec, version_by_alias
from llava_pipeline.tracking.settings import load_settings


class Plain:
    """One model, one lock."""

    def __init__(self, profile: str, alias: str) -> None:
        settings, name = load_settings(), load_spec(profile, []).registered_model
        self.name = f"{name}-v{version_by_alias(name, alias, settings)}"
        folder = download_projector(alias, name, settings)
        self.llava = Answering(folder, recorded_spec(alias, name, settings)).llava
        self.model, self.processor = self.llava.model, self.llava.processor
        self.lock = threading.Lock()

    def inputs(self, body: dict[str, Any]) -> dict[str, Any]:
        """Arguments of ``generate`` for one question about one picture, or about none."""
        parts = body["messages"][0]["content"]
        words = "".join(part["text"] for part in parts if part["type"] == "text")
        urls = [part["image_url"]["url"] for part in parts if part["type"] == "image_url"]
        ids = torch.tensor([self.processor.prompt(f"\n{words}" if urls else words, with_image=bool(urls))])
        given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if urls:
            with Image.open(io.BytesIO(base64.b64decode(urls[0].partition(",")[2]))) as image:
                pixels = torch.from_numpy(self.processor.resize(image.convert("RGB")).copy())[None]
            given["pixel_values"] = self.processor.normalise(pixels).to(self.model.dtype)
        given = {key: value.to(self.model.device) for key, value in given.items()}
        return given | {
            "max_new_tokens": body.get("max_tokens", 64), "do_sample": False, "use_cache": True,
            "eos_token_id": sorted(stop_ids(self.llava)), "pad_token_id": self.processor.tokenizer.pad_token_id,
        }  # fmt: skip

    @torch.inference_mode()
    def answer(self, body: dict[str, Any]) -> str:
        """The whole answer."""
        given = self.inputs(body)
        with self.lock:
            ids = self.model.generate(**given)
        return str(self.processor.decode(ids[0, given["input_ids"].shape[1] :].tolist()))

    def pieces(self, body: dict[str, Any]) -> Iterator[str]:
        """The answer as it comes."""
        given = self.inputs(body)
        streamer = TextIteratorStreamer(self.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        with self.lock:
            thread = threading.Thread(target=self._generate, args=({**given, "streamer": streamer},))
            thread.start()
            yield from streamer
            thread.join()

    @torch.inference_mode()
    def _generate(self, given: dict[str, Any]) -> None:
        self.model.generate(**given)


def make_app(plain: Plain) -> FastAPI:
    """Chat completions, as far as the benchmark asks for them."""
    app = FastAPI()

    @app.post("/v1/chat/completions", response_model=None)
    def complete(body: dict[str, Any]) -> dict[str, Any] | StreamingResponse:
        if body.get("stream"):
            return StreamingResponse(events(body), media_type="text/event-stream")
        message = {"role": "assistant", "content": plain.answer(body)}
        return {"object": "chat.completion", "model": plain.name, "choices": [{"index": 0, "message": message}]}

    def events(body: dict[str, Any]) -> Iterator[str]:
        begun = False
        for piece in plain.pieces(body):
            text = piece if begun else piece.lstrip()
            begun = begun or bool(text)
            if text:
                chunk = {"object": "chat.completion.chunk", "model": plain.name}
                yield f"data: {json.dumps(chunk | {'choices': [{'index': 0, 'delta': {'content': text}}]})}\n\n"
        yield "data: [DONE]\n\n"

    return app


class Server(uvicorn.Server):
    """Says where it is once it can be asked."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        port = (sockets or [])[0].getsockname()[1]
        print(json.dumps({"url": f"http://127.0.0.1:{port}", "pid": os.getpid()}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", default="pocket")
    parser.add_argument("--alias", default="champion")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="Always so: one line with the address.")
    arguments = parser.parse_args()
    app = make_app(Plain(arguments.profile, arguments.alias))
    server = Server(uvicorn.Config(app, log_level="warning", access_log=False))
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP) as listener:  # named, or no TCP_NODELAY
        listener.bind(("127.0.0.1", arguments.port))
        server.run(sockets=[listener])


if __name__ == "__main__":
    main()
