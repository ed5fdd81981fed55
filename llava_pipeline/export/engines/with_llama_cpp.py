"""llama.cpp through xllamacpp: its server in this process, asked over HTTP as its users ask it."""

from __future__ import annotations

import base64
from importlib.metadata import version
from pathlib import Path
from typing import Any

import requests
import xllamacpp

from llava_pipeline.export.engines.wire import Asked, Prompt, Reply, Told, serve

PACKAGE = "xllamacpp"
TOLD_TOKENS = 200  # log-probabilities that are asked for
ROOM = 64  # tokens of the context besides the image and the question
SECONDS = 300.0
MMPROJ = "mmproj-"
NO_TOKEN = -1


def answer(exported: Path, work: Path, asked: Asked) -> Told:
    """What it says; that it does not start is a problem."""
    files = sorted(exported.glob("*.gguf"))
    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(next(path for path in files if not path.name.startswith(MMPROJ)))
    parameters.mmproj.path = str(next(path for path in files if path.name.startswith(MMPROJ)))
    longest = max(len(prompt.question) for prompt in asked.prompts)
    parameters.n_ctx = asked.num_image_tokens + 4 * longest + 4 * ROOM  # a token may be a byte of a letter
    parameters.n_parallel = 1
    parameters.n_gpu_layers = 0
    parameters.cpuparams.n_threads = asked.num_threads
    parameters.use_jinja = True
    parameters.warmup = False
    # The files are asked about, not its fast attention, which reckons in 16 bits and moves likely tokens by 0.05 nats.
    parameters.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    parameters.cache_type_k = parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    parameters.verbosity = -1
    try:
        server = xllamacpp.Server(parameters)
    except RuntimeError as error:
        return Told(version=version(PACKAGE), problem=f"llama.cpp does not load the files: {error}")
    client = _Client(server.listening_address)
    return Told(version=version(PACKAGE), replies=tuple(_reply(client, work, asked, one) for one in asked.prompts))


class _Client:
    """A server and how it marks a picture in a text."""

    def __init__(self, address: str) -> None:
        self.address, self.session = address, requests.Session()
        self.session.trust_env = False  # no proxy stands before one's own process
        self.mark = str(self.get("/props")["media_marker"])

    def get(self, path: str) -> Any:
        reply = self.session.get(self.address + path, timeout=SECONDS)
        reply.raise_for_status()
        return reply.json()

    def post(self, path: str, body: dict[str, Any]) -> Any:
        reply = self.session.post(self.address + path, json=body, timeout=SECONDS)
        reply.raise_for_status()
        return reply.json()


def _reply(client: _Client, work: Path, asked: Asked, prompt: Prompt) -> Reply:
    data = base64.b64encode((work / prompt.picture).read_bytes()).decode()
    image = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}
    messages = [{"role": "user", "content": [image, {"type": "text", "text": prompt.question}]}]
    text = str(client.post("/apply-template", {"messages": messages})["prompt"])
    ids = _input_ids(client, text, asked)
    # Its chat tells no probabilities of an answer that ends at once.
    told = client.post("/completion", {
        "prompt": {"prompt_string": text, "multimodal_data": [data]}, "n_predict": 1, "temperature": 0.0,
        "n_probs": TOLD_TOKENS, "cache_prompt": False,
    })  # fmt: skip
    if len(ids) != (read := int(told["tokens_evaluated"])):  # what was tokenised apart is not what was read
        ids = (*ids[:read], *[NO_TOKEN] * (read - len(ids)))
    likely = [token for one in told.get("completion_probabilities", ())[:1] for token in one["top_logprobs"]]
    known = {int(token["id"]): float(token["logprob"]) for token in likely}
    first = max(known, key=lambda token: known[token], default=NO_TOKEN)
    return Reply(input_ids=ids, first=first, logprobs=tuple(known.get(token) for token in prompt.tokens))


def _input_ids(client: _Client, text: str, asked: Asked) -> tuple[int, ...]:
    """Its tokenizer on what is between the pictures of a text that its template has made."""
    ids: list[int] = []
    for number, piece in enumerate(text.split(client.mark)):
        if number:
            ids += [asked.image_token_id] * asked.num_image_tokens
        body = {"content": piece, "add_special": number == 0, "parse_special": True}
        ids += client.post("/tokenize", body)["tokens"]
    return tuple(ids)


if __name__ == "__main__":
    serve(answer)
