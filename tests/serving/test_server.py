"""The serving command as people and programs meet it: a process, a port, HTTP, signals, the registry behind it."""

from __future__ import annotations

import io
import json
import re
import signal
import socket
import subprocess
import threading
import time
from base64 import b64encode
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
from PIL import Image

from tests.serving.served import (
    COMMAND,
    NAME,
    Served,
    copied,
    data_uri,
    point,
    serving,
    settings_of,
)

QUESTIONS = ("Is there a circle?", "What is the color of the shape?", "Describe the picture.", "How many shapes?")
Answer = dict[str, Any]


@pytest.fixture
def server(shared_server: Served) -> Served:
    return shared_server


@pytest.fixture(scope="module")
def own(trained_home: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A server to do bad things to."""
    with serving(copied(trained_home, tmp_path_factory.mktemp("own") / "home")) as served:
        yield served


@pytest.fixture(scope="module")
def picture(shared_server: Served, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("pictures") / "sample.webp"
    path.write_bytes(shared_server.get(shared_server.get("/samples").json()["data"][0]["picture"]).content)
    return data_uri(path, "image/webp")


def events_of(text: str) -> list[dict[str, Any]]:
    """The events of a whole stream."""
    *events, done, nothing = text.split("\n\n")
    assert (done, nothing) == ("data: [DONE]", ""), text[-300:]
    return [json.loads(event.removeprefix("data: ")) for event in events if not event.startswith(":")]


def text_of(answer: httpx.Response) -> str:
    """What was said, whole or in pieces."""
    assert answer.status_code == 200, answer.text
    if answer.headers["content-type"].startswith("text/event-stream"):
        choices = [event["choices"][0]["delta"] for event in events_of(answer.text) if event["choices"]]
        return "".join(delta.get("content") or "" for delta in choices)
    return str(answer.json()["choices"][0]["message"]["content"])


def metric(server: Served, name: str, labels: str = "") -> float:
    """A metric's value, summed over those of its labels that are not told."""
    pattern = rf"^llava_{name}(?:\{{[^}}]*{re.escape(labels)}[^}}]*\}}){'?' if not labels else ''} ([0-9.e+]+)$"
    return sum(map(float, re.findall(pattern, server.get("/metrics").text, re.MULTILINE)))


def num_begun(server: Served) -> float:
    """Questions that the engine has taken, those answered among them."""
    names = ("num_requests_running", "num_requests_waiting", "request_success_total")
    return sum(metric(server, name) for name in names)


def questions(number: int) -> dict[str, Any]:
    """A question about a picture of squares, so that what the projector does shows in the answer."""
    pixels = np.random.default_rng(number % 4).integers(0, 256, (4, 4, 3), dtype=np.uint8).repeat(16, 0).repeat(16, 1)
    kept = io.BytesIO()
    Image.fromarray(pixels).save(kept, "PNG")
    url = f"data:image/png;base64,{b64encode(kept.getvalue()).decode()}"
    return {"text": QUESTIONS[number % 4], "picture": url, "temperature": 1, "seed": number % 8, "max_tokens": 12}


def long(number: int) -> dict[str, Any]:
    """A question that the small model answers with some twenty tokens; it writes no longer ones."""
    return questions(number) | {"text": "Describe the picture.", "seed": number, "max_tokens": 60}


def body_of(question: dict[str, Any], stream: bool = False) -> dict[str, Any]:
    """A question as a request has it."""
    parts = [
        {"type": "image_url", "image_url": {"url": question["picture"]}},
        {"type": "text", "text": question["text"]},
    ]
    more = {name: value for name, value in question.items() if name not in ("picture", "text")}
    return more | {"messages": [{"role": "user", "content": parts}], "stream": stream}


def wait_until(true: Callable[[], bool], seconds: float) -> None:
    until = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < until, "it did not come about in time"
        time.sleep(0.05)


# ---- an answer ----


def test_the_champion_answers_about_a_picture_and_says_which_version_it_is(server: Served, picture: str) -> None:
    answer = server.ask("What is the color of the shape?", picture)
    assert answer.status_code == 200, answer.text
    told = answer.json()
    assert told["model"] == "llava-projector-pocket-v1"
    assert told["choices"][0]["message"]["content"]
    assert answer.headers["x-model-version"] == "1"


def test_an_equal_seed_gives_an_equal_answer_and_another_one_another(server: Served, picture: str) -> None:
    def said(seed: int) -> str:
        return text_of(server.ask("Describe the picture.", picture, temperature=2, seed=seed, max_tokens=40))

    first = [said(seed) for seed in range(4)]
    assert [said(seed) for seed in range(4)] == first
    assert len(set(first)) > 1


def test_an_answer_in_pieces_is_the_whole_one_and_ends_at_a_stop_string_wherever_it_lies(
    server: Served, picture: str
) -> None:
    more = {"temperature": 1, "seed": 11, "max_tokens": 60}
    whole = text_of(server.ask("Describe the picture.", picture, **more))
    assert text_of(server.ask("Describe the picture.", picture, stream=True, **more)) == whole
    assert len(whole) > 12
    for start in range(0, len(whole) - 3, 9):
        stop = whole[start : start + 3]
        for stream in (False, True):
            answer = server.ask("Describe the picture.", picture, stop=[stop], stream=stream, **more)
            assert text_of(answer) == whole[: whole.index(stop)].strip()
            assert '"finish_reason":"stop"' in answer.text


def test_the_longest_answer_is_as_long_as_was_asked(server: Served) -> None:
    answer = server.ask(max_tokens=1).json()
    assert answer["usage"]["completion_tokens"] == 1
    assert answer["choices"][0]["finish_reason"] == "length"


def test_a_stream_is_text_and_json_event_by_event_and_no_proxy_may_hold_it_back(server: Served) -> None:
    said = {"text": "👩‍👩‍👧 日本 ☃ é", "temperature": 2}
    for seed in range(16):
        answer = server.ask(stream=True, **questions(seed) | said | {"seed": seed})
        assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
        assert answer.headers["cache-control"] == "no-cache"
        assert answer.headers["x-accel-buffering"] == "no"
        for event in answer.content.split(b"\n\n"):
            event.decode("utf-8")
        assert len(events_of(answer.text)) >= 2


def test_the_log_tells_who_answered_and_not_what_was_asked(server: Served, picture: str) -> None:
    before = len(server.said())
    secret = "xyzzy plugh"
    answer = server.ask(secret, picture, stream=True)
    told = events_of(answer.text)[0]["id"]
    wait_until(lambda: told in server.said(), 5)
    said = server.said()[before:]
    (line,) = [line for line in said.splitlines() if told in line]
    assert f"{NAME}-v1" in line
    assert secret not in said
    assert picture[40:80] not in said


METRICS = (
    "num_requests_running", "num_requests_waiting", "time_to_first_token_seconds_bucket",
    "inter_token_latency_seconds_bucket", "request_queue_time_seconds_bucket", "request_success_total",
    "request_failed_total", "prompt_tokens_total", "generation_tokens_total", "admission_rejections_total",
    "image_decode_seconds_bucket", "rejected_images_total", "model_version_info", "champion_reloads_total",
    "champion_reload_failures_total",
)  # fmt: skip


def test_the_metrics_have_the_names_that_dashboards_know_and_count(server: Served, picture: str) -> None:
    server.ask("x", "data:image/png;base64,!!!!")
    httpx.post(f"{server.url}/v1/chat/completions", content=b"", timeout=30)
    before = {name: metric(server, name) for name in ("generation_tokens_total", "request_success_total")}
    tokens = sum(server.ask(text, picture).json()["usage"]["completion_tokens"] for text in QUESTIONS)
    assert metric(server, "generation_tokens_total") - before["generation_tokens_total"] == tokens
    assert metric(server, "request_success_total") - before["request_success_total"] == len(QUESTIONS)
    written = server.get("/metrics").text
    for name in METRICS:
        assert re.search(rf"^llava_{name}\b", written, re.MULTILINE), name
    assert 'llava_rejected_images_total{reason="invalid_base64"}' in written
    assert 'llava_model_version_info{alias="champion",digest="' in written
    waits = re.findall(r"^llava_request_queue_time_seconds_count ([0-9.]+)$", written, re.MULTILINE)
    assert float(waits[0]) > 0, "how long questions wait is not told"


# ---- clients that leave ----


NUM_LEAVING = 64  # four times as many as have a row


def asking(server: Served, number: int, stream: bool) -> socket.socket:
    """A connection on which a question was asked and nothing is read."""
    body = json.dumps(body_of(long(number), stream)).encode()
    netloc = server.url.removeprefix("http://")
    host, port = netloc.split(":")
    connection = socket.create_connection((host, int(port)), 30)
    connection.sendall(
        f"POST /v1/chat/completions HTTP/1.1\r\nhost: {netloc}\r\ncontent-type: application/json\r\n"
        f"content-length: {len(body)}\r\n\r\n".encode()
        + body
    )
    return connection


def num_ended(server: Served, *reasons: str) -> float:
    return sum(metric(server, "request_success_total", f'finished_reason="{reason}"') for reason in reasons)


def is_idle(server: Served) -> bool:
    return metric(server, "num_requests_running") + metric(server, "num_requests_waiting") == 0


@pytest.mark.parametrize("stream", [True, False], ids=["in pieces", "whole"])
def test_who_leaves_before_the_end_is_answered_no_further(server: Served, stream: bool) -> None:
    """They leave while they wait, before their first token and within their answers; a moment later all is free."""
    before = num_ended(server, "stop", "length")
    connections = [asking(server, number, stream) for number in range(NUM_LEAVING)]
    wait_until(lambda: metric(server, "num_requests_waiting") >= 16, 20)
    for connection in connections:
        connection.close()
    wait_until(lambda: is_idle(server), 2)
    assert num_ended(server, "stop", "length") - before < NUM_LEAVING - 16
    assert server.ask(max_tokens=1).status_code == 200


def test_who_leaves_within_a_stream_frees_its_row(server: Served) -> None:
    before = num_ended(server, "left")
    for number in range(8):
        connection = asking(server, number, stream=True)
        assert connection.recv(1)  # the first event is on its way
        connection.close()
        wait_until(lambda: is_idle(server), 2)
    wait_until(lambda: num_ended(server, "left") > before, 5)


# ---- who may ask ----


@pytest.fixture(scope="module")
def locked(trained_home: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Served, str]]:
    home = copied(trained_home, tmp_path_factory.mktemp("locked") / "home")
    made = command(home, "key", "someone", "--keys", "keys")
    with serving(home, "--keys", "keys", "--rows", "1", "--waiting", "1") as served:
        yield served, made.stdout.strip()


def command(home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    import os

    environment = os.environ | {"LLAVA_PIPELINE_HOME": str(home), "OMP_NUM_THREADS": "1"}
    whole = [str(COMMAND), *arguments]
    return subprocess.run(whole, capture_output=True, text=True, cwd=home, env=environment, timeout=120)


def test_only_a_key_opens(locked: tuple[Served, str]) -> None:
    server, key = locked
    wrong = [
        {},
        *({"authorization": value} for value in ("Bearer", "Bearer wrong", f"Basic {key}", key, f"Bearer {key}x")),
    ]
    for headers in wrong:
        answer = server.post(body_of(questions(0)), headers=headers)
        assert answer.status_code == 401, headers
        assert answer.json()["error"]["code"] == "invalid_api_key"
        assert answer.headers["www-authenticate"] == "Bearer"
    assert server.get(f"/v1/models?api_key={key}&authorization=Bearer+{key}").status_code == 401
    for scheme in ("Bearer", "bearer"):
        answer = server.post(body_of(questions(0)), headers={"authorization": f"{scheme} {key}"})
        assert answer.status_code == 200, answer.text
    assert "someone" in server.said()
    assert key not in server.said()


def test_the_page_and_health_are_for_everybody_and_nothing_else_is(locked: tuple[Served, str]) -> None:
    server, key = locked
    for path in ("/", "/page.css", "/page.js", "/healthz", "/readyz"):
        assert server.get(path).status_code == 200, path
    for path in ("/metrics", "/v1/models", "/openapi.json", "/samples", "/samples/1/000000.webp"):
        assert server.get(path).status_code == 401, path
        assert server.get(path, headers={"authorization": f"Bearer {key}"}).status_code == 200, path


def test_more_than_there_is_room_for_are_told_to_come_again(locked: tuple[Served, str]) -> None:
    server, key = locked

    def ask(number: int) -> httpx.Response:
        headers = {"authorization": f"Bearer {key}"}
        return server.post(body_of(long(number), number % 2 == 0), headers=headers)

    with ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(ask, range(20)))
    assert {answer.status_code for answer in answers} == {200, 429}
    for answer in answers:
        if answer.status_code == 429:
            assert int(answer.headers["retry-after"]) >= 1
            assert answer.json()["error"]["code"] == "rate_limit_exceeded"
        else:
            text_of(answer)
    assert ask(0).status_code == 200


# ---- starts that are refused ----


def refused(home: Path, *arguments: str) -> str:
    """The one sentence of a start that is refused."""
    done = command(home, "serve", *arguments)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    *_, line = done.stderr.splitlines()
    assert line.startswith("error: ")
    return line


def test_an_address_that_others_reach_wants_keys(trained_home: Path) -> None:
    for host in ("0.0.0.0", "::", "192.0.2.1"):
        assert "--keys" in refused(trained_home, "--host", host, "--port", "0")


def test_a_port_that_is_taken_is_said_before_anything_is_loaded(trained_home: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert f"127.0.0.1:{port}" in refused(trained_home, "--port", str(port))


def test_what_cannot_be_allowed_is_said_before_anything_is_loaded(trained_home: Path) -> None:
    assert "127.0.0.1" in refused(trained_home, "--port", "0", "--image-host", "127.0.0.1")
    assert "keys" in refused(trained_home, "--port", "0", "--keys", "no-such-file")


@pytest.mark.slow
def test_without_a_champion_there_is_nothing_to_serve(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    assert "run the profile first" in refused(home, "--port", "0")


# ---- another champion ----


def test_answers_are_whole_and_of_one_version_while_the_champion_changes(served_home: Path) -> None:
    """Each says which version gave it in three places, and is what that version says when it is asked alone."""
    with serving(served_home, "--also", "challenger", "--waiting", "200") as server:
        alone = {
            version: [text_of(server.ask(model=f"{NAME}-v{version}", **questions(number))) for number in range(8)]
            for version in ("1", "2")
        }
        assert alone["1"] != alone["2"]
        flips = swapping(served_home, server)
        with httpx.Client(timeout=60) as client, ThreadPoolExecutor(8) as pool:

            def ask(number: int) -> httpx.Response:
                body = body_of(questions(number), number % 2 == 0)
                return client.post(f"{server.url}/v1/chat/completions", json=body)

            answers: list[httpx.Response] = []
            until = time.monotonic() + 90  # a busy machine looks at the aliases less often
            while len(answers) < NUM_SWAPPED or not both(answers):
                assert time.monotonic() < until, "the champion was never another one"
                answers += pool.map(ask, range(len(answers), len(answers) + 80))
        flips()
        seen = {check_version(answer, alone, number % 8) for number, answer in enumerate(answers)}
        assert seen == {"1", "2"}
        assert server.end() == 0


NUM_SWAPPED = 240


def both(answers: list[httpx.Response]) -> bool:
    return {answer.headers.get("x-model-version") for answer in answers} >= {"1", "2"}


def swapping(home: Path, server: Served) -> Callable[[], None]:
    """The champion and the challenger change places again and again, until what is given back is called."""
    ending = threading.Event()

    def swap() -> None:
        main, other = "1", "2"
        while not ending.wait(0.5):
            main, other = other, main
            point(home, "champion", main)
            point(home, "challenger", other)

    thread = threading.Thread(target=swap)
    thread.start()

    def end() -> None:
        ending.set()
        thread.join()
        assert metric(server, "champion_reload_failures_total") == 0

    return end


def check_version(answer: httpx.Response, alone: dict[str, list[str]], number: int) -> str:
    """The version that gave an answer, where everything about the answer agrees on it."""
    version = str(answer.headers["x-model-version"])
    assert text_of(answer) == alone[version][number]
    told = events_of(answer.text) if answer.text.startswith("data:") else [answer.json()]
    assert {event["model"] for event in told} == {f"{NAME}-v{version}"}
    assert {event["system_fingerprint"].partition("-")[0] for event in told} == {f"v{version}"}
    return version


@pytest.mark.slow
def test_a_bad_champion_changes_nothing_and_is_told_without_a_path(own: Served) -> None:
    server, home = own, own.log.parent
    before = text_of(server.ask())
    spoil(home, "2")
    point(home, "champion", "2")
    wait_until(lambda: server.ready()["last_error"] is not None, 30)
    ready = server.get("/readyz")
    assert ready.status_code == 200
    check_tells_no_place(ready.json(), home)
    assert ready.json()["version"] == "1"
    assert "version 2" in ready.json()["last_error"]
    assert text_of(server.ask()) == before
    assert metric(server, "champion_reload_failures_total") == 1
    point(home, "champion", "1")
    wait_until(lambda: server.ready()["last_error"] is None, 30)


def spoil(home: Path, version: str) -> None:
    """Some other bytes in the middle of a version's weights, wherever MLflow keeps them."""
    from llava_pipeline.tracking.client import connect

    run = connect(settings_of(home)).get_model_version(NAME, version).run_id
    kept = [path for path in home.rglob("projector.safetensors") if run in str(path)]
    assert kept
    for path in kept:
        data = bytearray(path.read_bytes())
        data[len(data) // 2 : len(data) // 2 + 64] = bytes(64)
        path.write_bytes(data)


def check_tells_no_place(told: Answer, home: Path) -> None:
    error = str(told["last_error"])
    assert str(home) not in error, error
    assert not re.search(r"/(home|tmp|root|var)/|sqlite:|\.db|\.py", error), error


@pytest.mark.slow  # two starts; test_versions has the same without a process
def test_answers_go_on_while_mlflow_is_away_and_also_after_a_start_without_it(served_home: Path) -> None:
    database = served_home / "mlflow.db"
    with serving(served_home) as server:
        before = text_of(server.ask())
        kept = database.read_bytes()
        database.write_bytes(b"gone " * 1000)  # in its place: an open connection goes on reading a renamed file
        wait_until(lambda: server.ready()["last_error"] is not None, 60)
        ready = server.get("/readyz")
        assert ready.status_code == 200
        check_tells_no_place(ready.json(), served_home)
        assert text_of(server.ask()) == before
        assert server.end() == 0
    with serving(served_home) as server:
        assert server.version == "1"
        assert text_of(server.ask()) == before
        database.write_bytes(kept)
        wait_until(lambda: server.ready()["last_error"] is None, 60)
        assert server.end() == 0


# ---- what dies, and what ends ----


def test_a_decoder_that_is_killed_costs_one_picture_at_most(own: Served) -> None:
    server = own
    first = text_of(server.ask(**questions(0)))
    for number in (1, 2):
        children = psutil.Process(server.process.pid).children()
        decoders = [child for child in children if "decoder" in " ".join(child.cmdline())]
        assert decoders
        for decoder in decoders:
            decoder.send_signal(signal.SIGKILL)
        answer = server.ask(**questions(number))
        assert answer.status_code in (200, 503), answer.text
        assert server.ask(**questions(number)).status_code == 200
    assert text_of(server.ask(**questions(0))) == first
    children = psutil.Process(server.process.pid).children()
    assert server.end() == 0
    assert not [child for child in children if child.is_running()]


def is_reached(server: Served) -> bool:
    host, port = server.url.removeprefix("http://").split(":")
    try:
        socket.create_connection((host, int(port)), 5).close()
    except ConnectionRefusedError:
        return False
    return True


def test_told_to_end_it_finishes_what_was_begun_and_takes_nothing_more(served_home: Path) -> None:
    with serving(served_home, "--rows", "1", "--waiting", "40") as server, ThreadPoolExecutor(24) as pool:
        asked = [pool.submit(server.ask, stream=k % 2 == 0, **long(k)) for k in range(24)]
        wait_until(lambda: num_begun(server) == 24, 20)  # one that is still on its way would be turned away
        assert metric(server, "num_requests_waiting") > 0
        server.process.send_signal(signal.SIGTERM)
        wait_until(lambda: "ending" in server.said(), 10)
        wait_until(lambda: not is_reached(server), 5)
        assert server.process.poll() is None
        for answer in asked:
            text_of(answer.result(60))
        assert server.process.wait(60) == 0


@pytest.mark.slow
def test_told_twice_to_end_it_ends_at_once(served_home: Path) -> None:
    with serving(served_home, "--rows", "1", "--waiting", "60") as server, ThreadPoolExecutor(40) as pool:
        asked = [pool.submit(server.ask, **long(k)) for k in range(40)]
        wait_until(lambda: metric(server, "num_requests_waiting") >= 20, 20)
        server.process.send_signal(signal.SIGTERM)
        wait_until(lambda: "ending" in server.said(), 10)
        server.process.send_signal(signal.SIGTERM)
        began = time.monotonic()
        code = server.process.wait(30)
        assert time.monotonic() - began < 8
        assert code == 0
        for answer in asked:
            answer.exception(30)
        assert "Traceback" not in server.said()
