"""Clients as people have them: the official ``openai`` package, LiteLLM and curl, unchanged, against a real server."""

from __future__ import annotations

import asyncio
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest

from tests.serving.served import COMMAND, Served, copied, serving

MODEL = "llava-projector-pocket-v1"
QUESTION = "What is the color of the shape?"


@pytest.fixture(scope="module")
def home(trained_home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copied(trained_home, tmp_path_factory.mktemp("clients") / "home")


@pytest.fixture(scope="module")
def key(home: Path) -> str:
    command = [str(COMMAND), "key", "tests", "--keys", str(home / "keys")]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture(scope="module")
def server(home: Path, key: str) -> Iterator[Served]:
    """It has one row and one place to wait, so that a third question at once is told to come again."""
    with serving(home, "--also", "challenger", "--keys", str(home / "keys"), "--rows", "1", "--waiting", "1") as served:
        yield served


@pytest.fixture
def client(server: Served, key: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, timeout=60) as made:
        yield made


@pytest.fixture(scope="module")
def picture(server: Served, key: str) -> str:
    from base64 import b64encode

    headers = {"authorization": f"Bearer {key}"}
    first = server.get("/samples", headers=headers).json()["data"][0]["picture"]
    return "data:image/webp;base64," + b64encode(server.get(first, headers=headers).content).decode()


def question(picture: str | None = None, text: str = QUESTION) -> Any:
    if picture is None:
        return {"role": "user", "content": text}
    parts = [{"type": "text", "text": text}, {"type": "image_url", "image_url": {"url": picture}}]
    return {"role": "user", "content": parts}


# ---- openai ----


def test_openai_has_an_answer_whole(client: openai.OpenAI, picture: str) -> None:
    answer = client.chat.completions.create(model="champion", messages=[question(picture)], max_tokens=16)
    assert answer.object == "chat.completion"
    assert answer.id.startswith("chatcmpl-")
    assert abs(answer.created - time.time()) < 60
    assert answer.model == MODEL
    assert answer.system_fingerprint
    assert answer.system_fingerprint.startswith("v1-")
    (choice,) = answer.choices
    assert (choice.index, choice.message.role, choice.message.refusal) == (0, "assistant", None)
    assert choice.message.content
    assert choice.finish_reason in ("stop", "length")
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.usage.prompt_tokens > 16


def test_openai_has_the_same_answer_in_pieces(client: openai.OpenAI, picture: str) -> None:
    asked: dict[str, Any] = {"model": "champion", "messages": [question(picture)], "max_tokens": 16}
    whole = client.chat.completions.create(**asked)
    pieces = list(client.chat.completions.create(**asked, stream=True))
    assert {(piece.id, piece.created, piece.model, piece.object) for piece in pieces} == {
        (pieces[0].id, pieces[0].created, MODEL, "chat.completion.chunk")
    }
    assert all(piece.usage is None for piece in pieces)
    assert pieces[0].choices[0].delta.role == "assistant"
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == whole.choices[0].message.content
    assert [piece.choices[0].finish_reason for piece in pieces[:-1]] == [None] * (len(pieces) - 1)
    assert pieces[-1].choices[0].finish_reason == whole.choices[0].finish_reason


def test_openai_has_the_usage_of_a_stream_where_it_asks_for_it(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "champion", "messages": [question()], "max_tokens": 8}
    *others, last = client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    assert last.choices == []
    assert last.usage == client.chat.completions.create(**asked).usage
    assert all(piece.usage is None and piece.choices for piece in others)


def test_openai_streams_with_its_helper(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(model="champion", messages=[question()], max_tokens=8) as stream:
        final = stream.get_final_completion()
    assert final.choices[0].message.content is not None
    assert final.choices[0].finish_reason in ("stop", "length")


def test_openai_asks_without_waiting(server: Served, key: str) -> None:
    async def both() -> tuple[str, str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key=key, timeout=60) as client:
            asked: dict[str, Any] = {"model": "champion", "messages": [question()], "max_tokens": 8}
            whole = await client.chat.completions.create(**asked)
            stream = await client.chat.completions.create(**asked, stream=True)
            pieces = [piece.choices[0].delta.content or "" async for piece in stream]
            return whole.choices[0].message.content or "", "".join(pieces)

    whole, streamed = asyncio.run(both())
    assert whole == streamed


def test_openai_goes_on_with_the_message_it_was_given(client: openai.OpenAI, picture: str) -> None:
    messages = [{"role": "developer", "content": "Be short."}, question(picture)]
    first = client.chat.completions.create(model="champion", messages=messages, max_tokens=8)
    message = first.choices[0].message
    for said in (message, message.model_dump(), message.model_dump(exclude_none=True)):
        more = [*messages, said, {"role": "user", "content": "Is there a circle?"}]
        second = client.chat.completions.create(model=first.model, messages=more, max_tokens=8)
        assert second.choices[0].message.content is not None
        assert first.usage is not None
        assert second.usage is not None
        assert second.usage.prompt_tokens > first.usage.prompt_tokens


def test_openai_lists_the_models_and_finds_one(client: openai.OpenAI) -> None:
    names = [model.id for model in client.models.list()]
    assert names == ["champion", "challenger", MODEL, "llava-projector-pocket-v2"]
    for name in names:
        model = client.models.retrieve(name)
        assert (model.id, model.object, model.owned_by) == (name, "model", "llava-pipeline")
        assert abs(model.created - time.time()) < 3600
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-5")


def test_every_name_is_answered_by_its_version(client: openai.OpenAI) -> None:
    for name, version in (("champion", "1"), ("challenger", "2"), (MODEL, "1"), ("llava-projector-pocket-v2", "2")):
        raw = client.chat.completions.with_raw_response.create(model=name, messages=[question()], max_tokens=2)
        assert raw.parse().model == f"llava-projector-pocket-v{version}"
        assert raw.headers["x-model-version"] == version
        assert raw.headers["x-request-id"] == raw.parse().id


def test_openais_errors_are_the_right_ones_and_name_the_parameter(
    client: openai.OpenAI, server: Served, key: str
) -> None:
    create = client.chat.completions.create
    with pytest.raises(openai.NotFoundError) as missing:
        create(model="gpt-5", messages=[question()])
    assert (missing.value.code, missing.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.BadRequestError) as hot:
        create(model="champion", messages=[question()], temperature=5)
    assert (hot.value.code, hot.value.param) == ("invalid_value", "temperature")
    assert hot.value.type == "invalid_request_error"
    with pytest.raises(openai.BadRequestError) as several:
        create(model="champion", messages=[question()], n=2, stream=True)
    assert (several.value.code, several.value.param) == ("unsupported_parameter", "n")
    with pytest.raises(openai.BadRequestError) as image:
        create(model="champion", messages=[question("http://127.0.0.1/x.png")])
    assert image.value.param == "messages[0].content[1].image_url.url"
    with pytest.raises(openai.BadRequestError) as long:
        create(model="champion", messages=[question(text="circle " * 2000)])
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.AuthenticationError) as locked:
        client.with_options(api_key=key[:-1] + "_").models.list()
    assert locked.value.code == "invalid_api_key"


@contextmanager
def occupied(server: Served, key: str) -> Iterator[Callable[[], None]]:
    """Both places of the server are taken by requests that have not come whole; who is called lets them go."""
    host, port = server.url.removeprefix("http://").split(":")
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nhost: {host}:{port}\r\nauthorization: Bearer {key}\r\n"
        "content-type: application/json\r\ncontent-length: 100\r\n\r\n{"
    )
    taken = [socket.create_connection((host, int(port)), 10) for _ in range(2)]

    def let_go() -> None:
        for connection in taken:
            connection.close()

    try:
        for connection in taken:
            connection.sendall(head.encode())
        time.sleep(0.5)  # until the server has read it
        yield let_go
    finally:
        let_go()


def test_openai_is_told_to_come_again_and_does_when_it_was_told(server: Served, key: str) -> None:
    asked_at: list[float] = []
    http = httpx2.Client(event_hooks={"request": [lambda _: asked_at.append(time.monotonic())]})
    asked: dict[str, Any] = {"model": "champion", "messages": [question()], "max_tokens": 2}
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, http_client=http, timeout=60) as client:
        with occupied(server, key) as let_go:
            with pytest.raises(openai.RateLimitError) as refused:
                client.with_options(max_retries=0).chat.completions.create(**asked)
            assert refused.value.code == "rate_limit_exceeded"
            assert refused.value.response.headers["retry-after"] == "1"
            asked_at.clear()
            threading.Timer(0.3, let_go).start()
            answer = client.with_options(max_retries=5).chat.completions.create(**asked)
    assert answer.choices[0].message.content is not None
    assert len(asked_at) >= 2
    assert all(after - before >= 0.9 for before, after in pairwise(asked_at))


# ---- LiteLLM ----

ASK_LITELLM = """
import json, os, socket, sys
os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"
connect = socket.socket.connect
def local(self, address):
    if isinstance(address, tuple) and address[0] not in ("127.0.0.1", "::1", "localhost"):
        raise SystemExit(f"it wants {address}")
    return connect(self, address)
socket.socket.connect = local
import litellm
url, key, picture = json.loads(sys.stdin.read())
ask = dict(model="openai/champion", api_base=url + "/v1", api_key=key, max_tokens=8)
parts = [{"type": "text", "text": "What is it?"}, {"type": "image_url", "image_url": {"url": picture}}]
messages = [{"role": "user", "content": parts}]
whole = litellm.completion(messages=messages, **ask)
pieces = list(litellm.completion(messages=messages, stream=True, **ask))
told = {"whole": whole.choices[0].message.content, "pieces": "".join(p.choices[0].delta.content or "" for p in pieces)}
told["tokens"], told["model"] = whole.usage.total_tokens, whole.model
for name, said in (("second", whole.choices[0].message), ("third", whole.choices[0].message.model_dump())):
    more = [*messages, said, {"role": "user", "content": "Is there a circle?"}]
    told[name] = litellm.completion(messages=more, **ask).usage.total_tokens
try:
    litellm.completion(messages=messages, **(ask | {"model": "openai/gpt-5"}), num_retries=0)
except litellm.NotFoundError:
    told["refused"] = True
print(json.dumps(told))
"""


@pytest.mark.slow
def test_litellm_has_an_answer_whole_and_in_pieces_and_goes_on_with_it(
    server: Served, key: str, picture: str, tmp_path: Path
) -> None:
    """In a process of its own, which may connect to this machine alone."""
    asked = json.dumps([server.url, key, picture])
    environment = os.environ | {"HOME": str(tmp_path)}
    command = [sys.executable, "-W", "ignore", "-c", ASK_LITELLM]
    done = subprocess.run(command, input=asked, capture_output=True, text=True, timeout=240, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["whole"]
    assert told["whole"] == told["pieces"]
    assert told["second"] > told["tokens"] > 0
    assert told["third"] == told["second"]
    assert told["refused"]


# ---- curl ----


def shell(script: str, server: Served, key: str, picture: str) -> str:
    environment = os.environ | {"URL": server.url, "KEY": key, "PICTURE": picture}
    done = subprocess.run(["sh", "-ec", script], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_curl_asks_with_what_a_shell_writes(server: Served, key: str, picture: str) -> None:
    script = """curl -sS --fail "$URL/v1/chat/completions" \\
      -H "Authorization: Bearer $KEY" -H "Content-Type: application/json" -d @- <<END
{
  "model": "champion",
  "messages": [{"role": "user", "content": [
    {"type": "image_url", "image_url": {"url": "$PICTURE"}},
    {"type": "text", "text": "What is the color of the shape?"}
  ]}]
}
END
"""
    told = json.loads(shell(script, server, key, picture))
    assert told["model"] == MODEL
    assert told["choices"][0]["message"]["content"]


def test_curl_reads_a_stream_as_it_comes(server: Served, key: str, picture: str) -> None:
    script = """curl -sS -N --fail -D /dev/stderr "$URL/v1/chat/completions" -H "Authorization: Bearer $KEY" \\
      --json '{"stream": true, "messages": [{"role": "user", "content": "Is there a circle?"}]}'"""
    events = shell(script, server, key, picture).split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    told = [json.loads(event.removeprefix("data: ")) for event in events[:-2]]
    assert told[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert told[-1]["choices"][0]["delta"] == {}
    assert told[-1]["choices"][0]["finish_reason"] in ("stop", "length")
    assert all(re.fullmatch(r"chatcmpl-[0-9a-f]{32}", event["id"]) for event in told)
    assert all("usage" not in event for event in told)


def test_curl_without_a_key_is_told_so(server: Served, picture: str) -> None:
    script = """curl -sS -o /dev/null -w '%{http_code}' "$URL/v1/models" """
    assert shell(script, server, "", picture) == "401"
