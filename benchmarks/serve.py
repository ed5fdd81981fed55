"""What ``llava-pipeline serve`` does: answers a second, first tokens, swaps under load, overload, and a long run.

    python benchmarks/serve.py                     # trains two versions in a home of its own, then measures
    python benchmarks/serve.py --home DIR --json   # a copy of a home that has two versions
    python benchmarks/serve.py --soak 20           # and twenty minutes at half load
    python benchmarks/serve.py --quick             # small numbers: does the benchmark itself work?

Writes ``benchmarks/results/serve.json``. The baseline is ``benchmarks/plain_server.py``: the same weights under
transformers' ``generate``, one request at a time, with as many threads. Both run at once on this machine and are asked
in turns, in rounds; a ratio is the median over the rounds. Nothing is timed before both give the same answers.

    answers    8 clients, each asking the next short question when it has an answer. Headline: ``known`` pictures, a few
               that are asked about again and again; ``new``: no picture comes twice, so nothing can be kept
    first      seconds to the first words of a stream, one client
    overload   arrivals at half of what was measured with 32 clients, then at twice, then at half again
    swap       the alias moves every two seconds; each reply must be, in every part, one version's own
    soak       memory, file descriptors and threads at half load

The clients share the machine with the servers. ``busy`` tells, in cores, who used the processor meanwhile.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.__main__ import COMMAND, RESULTS, machine
from benchmarks.serve_client import CAPTION_TOKENS, Asked, Reply, ask_all, ask_for, known, new

HERE = Path(__file__).parent
NAME, PROFILE = "llava-projector-pocket", "pocket"
OURS, PLAIN = "ours", "plain"
SERVE = [*COMMAND, "serve", "--profile", PROFILE, "--port", "0", "--json"]
READY_SECONDS, FLAT, FLIP_SECONDS, RECOVERY_SECONDS = 300, 0.05, 2.0, 5.0
FULL = {"rounds": 5, "seconds": 3.0, "firsts": 30, "swap": 5000, "around": 20, "overload": 120, "pictures": 16}
QUICK = {"rounds": 2, "seconds": 1.5, "firsts": 15, "swap": 400, "around": 6, "overload": 10, "pictures": 8}


def say(text: str) -> None:
    """Progress, for people."""
    print(text, file=sys.stderr, flush=True)


# --------------------------------------------------------------------------------------------- servers and processes


class Server:
    """A server in a process of its own; it writes what it logs to a file."""

    def __init__(self, command: list[str], log: Path) -> None:
        self.log, started = log, time.monotonic()
        with log.open("wb") as file:
            self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=file, text=True)
        assert self.process.stdout is not None
        timer = threading.Timer(READY_SECONDS, self.process.kill)
        timer.start()
        line = self.process.stdout.readline()
        timer.cancel()
        if not line:
            raise SystemExit(f"{' '.join(command)} did not start:\n{log.read_text(errors='replace')[-3000:]}")
        self.told: dict[str, Any] = json.loads(line)
        self.seconds_to_ready = round(time.monotonic() - started, 2)
        self.url: str = self.told["url"]
        self.root = psutil.Process(self.process.pid)

    def sizes(self) -> dict[str, float]:
        """Resident megabytes, descriptors, connections and threads of its processes together.

        How many connections there are is the clients' doing, so they are not counted as descriptors.
        """
        found = {"rss_mb": 0.0, "pss_mb": 0.0, "descriptors": 0.0, "connections": 0.0, "threads": 0.0, "processes": 0.0}
        for process in (self.root, *self.root.children(recursive=True)):
            try:
                memory = process.memory_full_info()
                connections = sum(bool(one.raddr) for one in process.net_connections("tcp"))
                found["descriptors"] += process.num_fds() - connections
                found["connections"] += connections
                found["threads"] += process.num_threads()
            except psutil.Error:
                continue
            found["rss_mb"] += memory.rss / 1e6
            found["pss_mb"] += memory.pss / 1e6
            found["processes"] += 1
        return {key: round(value, 1) for key, value in found.items()}

    def stop(self) -> dict[str, float]:
        """End it as a supervisor does."""
        started = time.monotonic()
        self.process.send_signal(signal.SIGTERM)
        try:
            code = self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            code = self.process.wait()
        return {"exit_code": code, "seconds_to_end": round(time.monotonic() - started, 2)}


class Sizes(threading.Thread):
    """Samples a server's sizes until it is stopped."""

    def __init__(self, server: Server, seconds: float) -> None:
        super().__init__(daemon=True)
        self.server, self.seconds, self.ending = server, seconds, threading.Event()
        self.samples: list[tuple[float, dict[str, float]]] = []
        self.start()

    def run(self) -> None:
        while not self.ending.wait(self.seconds):
            self.samples.append((time.monotonic(), self.server.sizes()))

    def stop(self) -> None:
        """Take no more samples."""
        self.ending.set()
        self.join()

    def between(self, start: float, end: float) -> dict[str, float]:
        """Medians between two moments."""
        chosen = [sizes for at, sizes in self.samples if start <= at < end]
        return {key: statistics.median(one[key] for one in chosen) for key in chosen[0]} if chosen else {}


class Busy:
    """Who used how many cores between two moments: each server, this process, and everybody else by name."""

    def __init__(self, **servers: Server) -> None:
        self.servers, self.started = servers, time.monotonic()
        self.before = self._seconds()

    def told(self) -> dict[str, float]:
        """Cores, of processes that are still there."""
        wall, now = time.monotonic() - self.started, self._seconds()
        cores = {name: (now[name] - self.before.get(name, 0.0)) / wall for name in now}
        ours = {"client", "all of the machine", *self.servers}
        return {name: round(some, 2) for name, some in cores.items() if name in ours or some > 0.05}

    def _seconds(self) -> dict[str, float]:
        names = {os.getpid(): "client"}
        for name, server in self.servers.items():
            names |= {process.pid: name for process in (server.root, *server.root.children(recursive=True))}
        whole = psutil.cpu_times()
        found: Counter[str] = Counter()
        found["all of the machine"] = whole.user + whole.nice + whole.system  # type: ignore[assignment]
        for process in psutil.process_iter(["pid", "name", "cmdline", "cpu_times"]):
            times, words = process.info["cpu_times"], process.info["cmdline"] or ["the kernel"]
            other = "other: " + " ".join(Path(word).name for word in words[:3])[:60]
            found[names.get(process.pid, other)] += times.user + times.system if times else 0.0
        return dict(found)


# --------------------------------------------------------------------------------------------- homes and versions


def prepare_home(given: Path | None, folder: Path) -> Path:
    """A home with two versions that may be changed: a copy, or one in which two are trained."""
    home = folder / "home"
    os.environ["LLAVA_PIPELINE_HOME"] = str(home)
    for variable in ("MLFLOW_TRACKING_URI", "PREFECT_API_URL", "PREFECT_HOME", "LLAVA_PIPELINE_SETTINGS"):
        os.environ.pop(variable, None)
    if given is not None:
        shutil.copytree(given, home)
        return home
    for seed, steps in enumerate((60, 160)):
        say(f"no --home: a version is trained for {steps} steps ...")
        changes = (f"training.seed={seed}", f"model.projector_seed={seed}", f"training.max_steps={steps}")
        more = [part for change in changes for part in ("--set", change)]
        subprocess.run([*COMMAND, "run", "--profile", PROFILE, *more], check=True, stdout=sys.stderr)
    return home


class Registry:
    """Moves the alias, as a person with MLflow's client would."""

    def __init__(self) -> None:
        from llava_pipeline.tracking.client import connect
        from llava_pipeline.tracking.settings import load_settings

        self.client = connect(load_settings())
        found = self.client.search_model_versions(f"name = '{NAME}'")
        self.versions = sorted((str(one.version) for one in found), key=int)[:2]
        if len(self.versions) < 2:
            raise SystemExit(f"{NAME} has fewer than two versions; leave out --home, or train another one")

    def point(self, version: str) -> None:
        """Make it champion."""
        self.client.set_registered_model_alias(NAME, "champion", version)


async def wait_for_version(url: str, version: str) -> float:
    """Seconds until the server says that this version answers."""
    started = time.monotonic()
    split = url.removeprefix("http://").split(":")
    while time.monotonic() - started < 60:
        reader, writer = await asyncio.open_connection(split[0], int(split[1]))
        writer.write(b"GET /readyz HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n")
        body = (await reader.read()).partition(b"\r\n\r\n")[2]
        writer.close()
        if f'"version":"{version}"' in body.decode().replace(" ", ""):
            return time.monotonic() - started
        await asyncio.sleep(0.05)
    raise SystemExit(f"the server did not follow the alias to version {version} within a minute: {body.decode()}")


# --------------------------------------------------------------------------------------------- against the plain server


def refuse_unless_whole(replies: list[Reply], what: str) -> None:
    """No number of a server that fails."""
    if failed := [reply for reply in replies if not reply.is_whole]:
        first = failed[0]
        raise SystemExit(f"{what}: {len(failed)} of {len(replies)} failed: {first.status} {first.error} {first.text}")


async def gate(ours: Server, plain: Server, asked: list[Asked]) -> dict[str, Any]:
    """Both servers' greedy answers, plain, streamed, alone and beside others: all of them equal, or no benchmark."""
    told: dict[str, list[str]] = {}
    for name, server, clients, stream in (
        ("plain", plain, 1, False), ("plain, streamed", plain, 1, True), ("ours", ours, 1, False),
        ("ours, streamed", ours, 1, True), ("ours, 8 clients", ours, 8, False), ("ours, 16 streams", ours, 16, True),
    ):  # fmt: skip
        replies = await ask_all(server.url, [one.request(stream=stream) for one in asked], clients)
        refuse_unless_whole(replies, name)
        told[name] = [reply.text.strip() for reply in replies]
    wanted = told["plain"]
    words = [one.body["messages"][0]["content"][1]["text"] for one in asked]
    differing = {
        name: [[word, a, b] for word, a, b in zip(words, wanted, texts, strict=True) if a != b]
        for name, texts in told.items()
    }
    right = Counter(one.kind for one, text in zip(asked, wanted, strict=True) if text == one.truth)
    every = Counter(one.kind for one in asked)
    return {
        "questions": len(asked), "num_right": sum(right.values()),
        "right_by_kind": {kind: f"{right[kind]} of {every[kind]}" for kind in every},
        "num_differing": {name: len(some) for name, some in differing.items()},
        "differing": {name: some[:5] for name, some in differing.items() if some}, "answers": wanted,
    }  # fmt: skip


def percentile(values: list[float], share: float) -> float:
    """Of what was measured, in milliseconds."""
    ordered = sorted(values)
    return round(1000 * ordered[min(len(ordered) - 1, int(share * len(ordered)))], 2) if ordered else float("nan")


async def race(servers: dict[str, Server], asked: list[Asked], sizes: dict[str, Any]) -> dict[str, Any]:
    """Rounds of both servers in turns: answers a second by clients and pictures, and seconds to the first words."""
    newest = new()
    captions = known(sizes["firsts"] // 3, captions=True)
    rates: dict[str, dict[str, list[float]]] = {}
    firsts: dict[str, dict[str, list[float]]] = {}
    cores: dict[str, list[dict[str, float]]] = {}
    num_compared = num_differing = 0
    for number in range(sizes["rounds"]):
        order = (OURS, PLAIN) if number % 2 == 0 else (PLAIN, OURS)
        for clients, pictures in ((8, "known"), (8, "new"), (1, "known"), (32, "known")):
            fresh = [next(newest) for _ in range(int(400 * sizes["seconds"]))] if pictures == "new" else []
            said: dict[str, list[str]] = {}
            for name in order:
                requests = (one.request() for one in (fresh or itertools.cycle(asked)))
                busy = Busy(**servers)
                replies, seconds = await ask_for(servers[name].url, requests, clients, sizes["seconds"])
                refuse_unless_whole(replies, f"{name}, {clients} clients")
                key = f"{clients} clients, {pictures}"
                rates.setdefault(key, {}).setdefault(name, []).append(len(replies) / seconds)
                if number == 0:
                    cores.setdefault(key, []).append({"of": name, **busy.told()})  # type: ignore[dict-item]
                said[name] = [reply.text.strip() for reply in sorted(replies, key=lambda one: one.started)]
            if fresh:  # both were asked the same, in the same order
                both = list(zip(said[OURS], said[PLAIN], strict=False))
                num_compared, num_differing = num_compared + len(both), num_differing + sum(a != b for a, b in both)
        picked = asked[:: max(1, len(asked) // sizes["firsts"])]
        unseen = [next(newest) for _ in range(sizes["firsts"])]
        for name in order:
            for key, some, more in (
                ("short, known", picked, {"stream": True}), ("short, new", unseen, {"stream": True}),
                ("caption, known", captions, {"stream": True}), ("one token, known", picked, {"max_tokens": 1}),
                ("one token, new", [next(newest) for _ in unseen], {"max_tokens": 1}),
            ):  # fmt: skip
                replies = await ask_all(servers[name].url, [one.request(**more) for one in some], 1)
                refuse_unless_whole(replies, f"{name}, {key}")
                times = [reply.seconds_to_first or reply.seconds for reply in replies]
                firsts.setdefault(key, {}).setdefault(name, []).append(statistics.median(times))
        shown = rates["8 clients, known"]
        say(f"round {number + 1}: ours {shown[OURS][-1]:.0f}, plain {shown[PLAIN][-1]:.0f} answers/s at 8 clients")
    return {
        "answers_per_second": {key: compared(both, 1, higher_is_better=True) for key, both in rates.items()},
        "milliseconds_to_first": {key: compared(both, 1000, higher_is_better=False) for key, both in firsts.items()},
        "new_pictures_compared": num_compared, "new_pictures_differing": num_differing, "busy": cores,
    }  # fmt: skip


def compared(both: dict[str, list[float]], scale: float, *, higher_is_better: bool) -> dict[str, Any]:
    """Medians, the median of the rounds' ratios (above 1: ours is better), and every round."""
    pairs = list(zip(both[OURS], both[PLAIN], strict=True))
    ratios = [a / b if higher_is_better else b / a for a, b in pairs]
    rounds = {name: [round(scale * value, 2) for value in values] for name, values in both.items()}
    medians = {name: round(scale * statistics.median(values), 2) for name, values in both.items()}
    return {**medians, "times_better": round(statistics.median(ratios), 2), "lowest": round(min(ratios), 2),
            "rounds": rounds}  # fmt: skip


# --------------------------------------------------------------------------------------------- open-loop load


def load(server: Server, plan: list[tuple[str, float, float]], pairs: list[tuple[Asked, str]], folder: Path) -> Any:
    """Run locust; when it began, and its records."""
    (folder / "bodies.json").write_text(json.dumps([[one.body, answer] for one, answer in pairs]), encoding="utf-8")
    (folder / "records.jsonl").unlink(missing_ok=True)
    command = [
        *(sys.executable, "-m", "locust", "-f", str(HERE / "serve_load.py"), "--headless", "--only-summary"),
        *("--users", "1", "--spawn-rate", "1", "--loglevel", "WARNING", "--host", server.url),
        *("--plan", json.dumps(plan), "--bodies", str(folder / "bodies.json")),
        *("--records", str(folder / "records.jsonl")),
    ]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    path = folder / "records.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    if len(lines) < 2:
        raise SystemExit(f"locust sent nothing:\n{done.stdout[-3000:]}")
    begun, *records = (json.loads(line) for line in lines)
    return begun["begun"], records


def told_of(records: list[dict[str, Any]], seconds: float) -> dict[str, Any]:
    """Statuses, rates and latencies of one phase."""
    times = [record["seconds"] for record in records if record["status"] == 200]
    refused = [record["seconds"] for record in records if record["status"] == 429]
    return {
        "offered_per_second": round(len(records) / seconds, 1), "answered_per_second": round(len(times) / seconds, 1),
        "statuses": {str(key): some for key, some in sorted(Counter(one["status"] for one in records).items())},
        "wrong": sum("wrong" in one for one in records), "p50_ms": percentile(times, 0.5),
        "p95_ms": percentile(times, 0.95), "p95_ms_of_429": percentile(refused, 0.95) if refused else None,
    }  # fmt: skip


def by_second(records: list[dict[str, Any]], start: float, end: float) -> list[float]:
    """p95 milliseconds of what was due in each second."""
    bins: list[list[float]] = [[] for _ in range(round(end - start))]
    for record in records:
        if start <= record["second"] < start + len(bins) and record["status"] == 200:
            bins[int(record["second"] - start)].append(record["seconds"])
    return [percentile(some, 0.95) for some in bins]


def overload(
    server: Server, pairs: list[tuple[Asked, str]], capacity: float, sizes: dict[str, Any], folder: Path
) -> dict[str, Any]:  # fmt: skip
    """Half of the capacity, then twice, then half again."""
    around, long = sizes["around"], sizes["overload"]
    plan = [("before", around, capacity / 2), ("overload", long, capacity * 2), ("after", around, capacity / 2)]
    busy, samples = Busy(server=server), Sizes(server, 0.5)
    begun, records = load(server, plan, pairs, folder)
    samples.stop()
    cores = busy.told()
    of = {name: [record for record in records if record["phase"] == name] for name, _, _ in plan}
    over, end = around + long, around + long + around
    before, during, after = (
        samples.between(begun + a, begun + b) for a, b in ((2, around), (around, over), (over + 5, end))
    )
    calm, then = by_second(records, 0, around), by_second(records, over, end)
    level = 1.5 * statistics.median(calm[2:])
    recovered = next((second for second, value in enumerate(then) if value <= level), None)
    growth = after["rss_mb"] / before["rss_mb"] - 1
    statuses = {record["status"] for record in records}
    return {
        "capacity_per_second": round(capacity, 1),
        "phases": {name: told_of(of[name], seconds) for name, seconds, _ in plan},
        "only_200_and_429": statuses <= {200, 429} and 429 in statuses,
        "wrong": [record["wrong"] for record in records if "wrong" in record][:5],
        "sizes": {"before": before, "during": during, "after": after}, "rss_growth": round(growth, 4),
        "p95_ms_by_second": {"before": calm, "after": then}, "level_ms": round(level, 1),
        "recovered_after_seconds": None if recovered is None else recovered + 1, "busy": cores,
    }  # fmt: skip


def soak(server: Server, pairs: list[tuple[Asked, str]], rate: float, minutes: float, folder: Path) -> dict[str, Any]:
    """Half load for long: what grows?"""
    busy, samples = Busy(server=server), Sizes(server, 5.0)
    begun, records = load(server, [("soak", minutes * 60, rate)], pairs, folder)
    samples.stop()
    within = [(at - begun, one) for at, one in samples.samples if 0 <= at - begun < minutes * 60]
    settled = [(at, one) for at, one in within if at >= min(60.0, minutes * 12)]
    fifth = max(1, len(settled) // 5)
    told: dict[str, Any] = {}
    for key in ("rss_mb", "pss_mb", "descriptors", "threads"):
        values = [one[key] for _, one in settled]
        slope = statistics.linear_regression([at / 60 for at, _ in settled], values).slope if len(values) > 2 else 0.0
        first, last = statistics.median(values[:fifth]), statistics.median(values[-fifth:])
        told[key] = {"first_fifth": first, "last_fifth": last, "most": max(values), "per_minute": round(slope, 4),
                     "growth": round(last / first - 1, 4)}  # fmt: skip
    return {
        "minutes": minutes, "samples": len(within), **told_of(records, minutes * 60), "sizes": told,
        "errors": [record["wrong"] for record in records if "wrong" in record][:5], "busy": busy.told(),
    }  # fmt: skip


# --------------------------------------------------------------------------------------------- swaps


class Flips(threading.Thread):
    """The alias, from one version to the other and back."""

    def __init__(self, registry: Registry) -> None:
        super().__init__(daemon=True)
        self.registry, self.ending = registry, threading.Event()
        self.times: list[tuple[float, str]] = []

    def run(self) -> None:
        for version in itertools.cycle(self.registry.versions):
            if self.ending.wait(FLIP_SECONDS):
                return
            self.registry.point(version)
            self.times.append((time.monotonic(), version))


def mixed(reply: Reply, version: str | None, fingerprints: dict[str, str], answers: dict[str, str]) -> str | None:
    """Why a whole reply is not one version's own in every part; None where it is."""
    if version not in fingerprints:
        return f"header says {version!r}"
    if reply.models != {(f"{NAME}-v{version}", fingerprints[version])}:
        return f"header says {version}, the body {sorted(reply.models)}"
    if reply.text.strip() == answers[version]:
        return None
    of = [other for other, answer in answers.items() if answer == reply.text.strip()]
    return f"named {version}, but version {of[0]}'s answer" if of else f"nobody's answer: {reply.text!r}, not {answers}"


async def swap(registry: Registry, sizes: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Thousands of requests while the alias moves."""
    server = Server([*SERVE, "--poll", "0.2"], folder / "swap.log")
    asked = [*known(6 * sizes["pictures"]), *known(2 * sizes["pictures"], captions=True)]
    alone: dict[str, list[str]] = {}
    fingerprints: dict[str, str] = {}
    for version in registry.versions:
        registry.point(version)
        await wait_for_version(server.url, version)
        replies = await ask_all(server.url, [one.request() for one in asked], 8)
        refuse_unless_whole(replies, f"version {version} alone")
        alone[version] = [reply.text.strip() for reply in replies]
        if len(named := set.union(*(reply.models for reply in replies))) != 1:
            raise SystemExit(f"version {version} alone names itself in several ways: {sorted(named)}")
        fingerprints[version] = named.pop()[1]
    first, second = registry.versions
    chosen = [k for k in range(len(asked)) if alone[first][k] != alone[second][k]]
    if len(chosen) < 8:
        raise SystemExit(f"the two versions differ on {len(chosen)} questions only; a mixed answer would not be seen")
    picked = [chosen[k % len(chosen)] for k in range(sizes["swap"])]
    requests = [asked[k].request(stream=number % 2 == 0) for number, k in enumerate(picked)]
    flips, busy = Flips(registry), Busy(server=server)
    flips.start()
    started = time.monotonic()
    replies = await ask_all(server.url, requests, 8)
    seconds = time.monotonic() - started
    flips.ending.set()
    flips.join()
    cores, ended = busy.told(), server.stop()
    failed = [reply for reply in replies if not reply.is_whole]
    versions = [reply.headers.get("x-model-version") for reply in replies]
    wrong = [
        found for k, reply, version in zip(picked, replies, versions, strict=True) if reply.is_whole
        and (found := mixed(reply, version, fingerprints, {name: alone[name][k] for name in alone}))
    ]  # fmt: skip
    order = sorted(zip((reply.started for reply in replies), versions, replies, strict=True), key=lambda one: one[0])
    changes = [(b[0], b[1]) for a, b in itertools.pairwise(order) if a[1] != b[1]]
    under_way = [sum(at < moment < at + one.seconds and of != version for at, of, one in order)
                 for moment, version in changes]  # fmt: skip
    lags = []
    for at, version in flips.times:
        if later := [moment for moment, of in changes if of == version and moment >= at]:
            lags.append(min(later) - at)
    return {
        "requests": len(replies), "seconds": round(seconds, 1), "answers_per_second": round(len(replies) / seconds, 1),
        "streamed": sum(number % 2 == 0 for number in range(len(replies))), "questions": len(chosen),
        "captions_of_these": sum(asked[k].body["max_tokens"] == CAPTION_TOKENS for k in chosen),
        "alias_moved": len(flips.times), "changes_seen": len(changes), "answers_by_version": dict(Counter(versions)),
        "under_way_at_changes": sum(under_way), "failed": len(failed), "mixed": len(wrong),
        "statuses": {str(key): some for key, some in Counter(reply.status for reply in replies).items()},
        "failures": [f"{reply.status} {reply.error} {reply.text[:200]}" for reply in failed[:5]], "mixtures": wrong[:5],
        "median_seconds_from_alias_to_answers": round(statistics.median(lags), 2) if lags else None,
        "p95_ms": percentile([reply.seconds for reply in replies], 0.95), "busy": cores, "end": ended,
    }  # fmt: skip


# --------------------------------------------------------------------------------------------- all of it


def bench(options: argparse.Namespace, folder: Path) -> Iterator[dict[str, Any]]:
    """Part after part of the result."""
    sizes = QUICK if options.quick else FULL
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    home = prepare_home(options.home, folder)
    registry = Registry()
    registry.point(registry.versions[-1])
    asked = known(sizes["pictures"])
    say("starting both servers ...")
    ours = Server(SERVE, folder / "ours.log")
    plain = Server(
        [sys.executable, str(HERE / "plain_server.py"), "--profile", PROFILE, "--json"], folder / "plain.log"
    )
    try:
        yield {
            "home": "trained here" if options.home is None else "a copy of one with two versions",
            "versions": registry.versions, "champion": registry.versions[-1], "sizes": sizes,
            "threads": options.threads,
            "seconds_to_ready": {OURS: ours.seconds_to_ready, PLAIN: plain.seconds_to_ready},
        }  # fmt: skip
        found = asyncio.run(gate(ours, plain, [*asked, *known(sizes["pictures"], captions=True)]))
        answers = found.pop("answers")
        yield {"gate": found}
        say(f"gate: {found['num_right']} of {found['questions']} right; differing: {found['num_differing']}")
        if any(found["num_differing"].values()):
            say(f"THE SERVERS DIFFER: {found['differing']}")
            if not options.despite_differences:
                raise SystemExit(1)
        yield {"sizes_after_gate": {OURS: ours.sizes(), PLAIN: plain.sizes()}}
        raced = asyncio.run(race({OURS: ours, PLAIN: plain}, asked, sizes))
        yield raced | {"sizes_after_race": {OURS: ours.sizes(), PLAIN: plain.sizes()}}
        plain.stop()
        pairs = list(zip(asked, answers, strict=False))
        capacity = raced["answers_per_second"]["32 clients, known"][OURS]
        if "overload" not in options.skip:
            say(f"overload at {2 * capacity:.0f} requests/s ...")
            yield {"overload": overload(ours, pairs, capacity, sizes, folder)}
        if options.soak:
            say(f"{options.soak:g} minutes at {capacity / 2:.0f} requests/s ...")
            yield {"soak": soak(ours, pairs, capacity / 2, options.soak, folder)}
        yield {"end": ours.stop()}
    finally:
        for server in (ours, plain):
            if server.process.poll() is None:
                server.process.kill()
    if "swap" not in options.skip:
        say(f"{sizes['swap']} requests while the alias moves ...")
        yield {"swap": asyncio.run(swap(registry, sizes, folder))}
    assert home.is_dir()


def verdict(result: dict[str, Any]) -> dict[str, bool]:
    """What was asked of the serving command, and whether it was found."""
    told = {"same_answers": not any(result["gate"]["num_differing"].values())}
    if rates := result.get("answers_per_second"):
        told["three_times_the_answers_known"] = rates["8 clients, known"]["times_better"] >= 3
        told["three_times_the_answers_new"] = rates["8 clients, new"]["times_better"] >= 3
        firsts = result["milliseconds_to_first"]
        told |= {f"first_words_no_later, {key}": both["times_better"] >= 1 for key, both in firsts.items()}
    if over := result.get("overload"):
        told["overload_began_calm"] = set(over["phases"]["before"]["statuses"]) == {"200"}  # or nothing below counts
        told["overload_only_200_and_429"] = over["only_200_and_429"] and not over["wrong"]
        told["overload_memory_flat"] = abs(over["rss_growth"]) <= FLAT
        recovered = over["recovered_after_seconds"]
        told["overload_recovered"] = recovered is not None and recovered <= RECOVERY_SECONDS
    if swapped := result.get("swap"):
        told["swap_none_failed"], told["swap_none_mixed"] = not swapped["failed"], not swapped["mixed"]
        told["swap_happened"] = swapped["changes_seen"] >= 2
    if long := result.get("soak"):
        told["soak_no_errors"] = not long["errors"] and set(long["statuses"]) == {"200"}
        told |= {f"soak_flat, {key}": abs(some["growth"]) <= FLAT for key, some in long["sizes"].items()}
    return told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--home", type=Path, help="A home with two versions of the pocket projector; it is copied.")
    parser.add_argument("--soak", type=float, default=0.0, metavar="MINUTES")
    parser.add_argument("--quick", action="store_true", help="Small numbers; writes nothing unless --output is given.")
    parser.add_argument("--threads", type=int, default=1, help="OMP_NUM_THREADS of both servers.")
    parser.add_argument("--skip", action="append", default=[], choices=("overload", "swap"))
    parser.add_argument("--despite-differences", action="store_true", help="Measure servers that answer differently.")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    output = options.output or (None if options.quick else RESULTS / "serve.json")
    result: dict[str, Any] = {
        "command": " ".join(["python benchmarks/serve.py", *sys.argv[1:]]), "machine": machine(),
        "measured": datetime.now(UTC).isoformat(timespec="seconds"),
        "headline": "answers_per_second, 8 clients, known",
    }  # fmt: skip
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="llava-serve-") as folder:
        for part in bench(options, Path(folder)):
            result |= part
            result |= {"load_after": os.getloadavg()[0], "seconds": round(time.monotonic() - started, 1)}
            if "gate" in result:
                result["verdict"] = verdict(result)
            if output is not None:
                output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if options.json:
        print(json.dumps(result))
        return
    for key, both in (result.get("answers_per_second") or {}).items():
        print(f"{key}: ours {both[OURS]}, plain {both[PLAIN]} answers/s, {both['times_better']} times")
    for key, passed in result["verdict"].items():
        print(f"{'yes' if passed else 'NO '}  {key}")


if __name__ == "__main__":
    main()
