"""Open-loop load on a serving command, for ``benchmarks/serve.py``: requests come when they come, answered or not.

    python -m locust -f benchmarks/serve_load.py --headless --users 1 --host http://127.0.0.1:8000 \\
        --bodies bodies.json --plan '[["before", 20, 50], ["overload", 120, 200]]' --records records.jsonl

``--plan`` are phases with their seconds and requests per second; arrivals are a Poisson process. ``--bodies`` is a
list of [body, answer]: what is answered otherwise is wrong. ``--records`` begins with the monotonic time at which the
plan began; then every request leaves a line: phase, second it was due in, status, seconds, and what was wrong. One user
sends them all, each in a greenlet of its own: a locust user that waits for its answer before it asks again would slow
down just when the server does.
"""

from __future__ import annotations

import json
import random
import time
from argparse import ArgumentParser
from pathlib import Path
from typing import Any

import gevent
from gevent.pool import Pool
from locust import FastHttpUser, events, task

MOST_AT_ONCE = 2048


@events.init_command_line_parser.add_listener
def options(parser: ArgumentParser) -> None:
    """What a load is."""
    parser.add_argument("--plan", type=json.loads, default=[["load", 10, 10]])
    parser.add_argument("--bodies", type=Path)
    parser.add_argument("--records", type=Path)


class Arrivals(FastHttpUser):
    """Everybody who asks."""

    concurrency = MOST_AT_ONCE
    network_timeout = connection_timeout = 60.0

    def on_start(self) -> None:
        """Read what is asked."""
        chosen = self.environment.parsed_options
        self.plan = chosen.plan
        self.bodies = [(json.dumps(body), answer) for body, answer in json.loads(chosen.bodies.read_text())]
        self.records = chosen.records.open("w", encoding="utf-8")
        self.random = random.Random(0)
        self.asking = Pool()

    @task
    def everything(self) -> None:
        """The whole plan, and what is still under way when it ends."""
        due = begun = time.monotonic()
        ends = begun
        self.records.write(json.dumps({"begun": begun}) + "\n")
        for name, seconds, rate in self.plan:
            ends += seconds
            while (due := due + self.random.expovariate(rate)) < ends:
                if (wait := due - time.monotonic()) > 0:
                    gevent.sleep(wait)
                self.asking.spawn(self.ask, name, due - begun, due, *self.random.choice(self.bodies))
            due = ends
        self.asking.join(timeout=60)
        self.records.close()
        self.environment.runner.quit()

    def ask(self, phase: str, second: float, due: float, body: str, answer: str) -> None:
        """One request. Its seconds begin when it was due: a load generator that is late hides nothing."""
        headers = {"Content-Type": "application/json"}
        record: dict[str, Any] = {"phase": phase, "second": round(second, 3), "status": 0}
        with self.client.post(
            "/v1/chat/completions", data=body, headers=headers, name=phase, catch_response=True
        ) as response:  # fmt: skip
            record |= {"status": response.status_code, "seconds": round(time.monotonic() - due, 4)}
            wrong = _wrong(response, answer)
            response.failure(wrong) if wrong else response.success()
        if wrong:
            record["wrong"] = wrong
        self.records.write(json.dumps(record) + "\n")


def _wrong(response: Any, answer: str) -> str:
    """Why a reply may not be; empty where it is what it should be."""
    if response.status_code == 429:
        return "" if response.headers.get("Retry-After", "").isdigit() else "429 without Retry-After"
    if response.status_code != 200:
        return f"{response.status_code} {response.error or response.text or ''}"[:200]
    said = response.json()["choices"][0]["message"]["content"]
    return "" if said == answer else f"said {said!r}, not {answer!r}"
