"""Real trainings of the tiny model, each in a process of its own, to be killed, starved and started again.

Importing torch and transformers takes ten seconds of a core, so most processes are forks of one that has imported them
(``nursery``): each runs ``python -m llava_pipeline.training``'s own ``main`` to a real exit.
"""

from __future__ import annotations

import atexit
import contextlib
import itertools
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from safetensors.torch import save_file

from llava_pipeline.contracts import ArtifactRef, AssembledModel
from llava_pipeline.model.processor import IGNORE_INDEX, Processor
from llava_pipeline.spec import TrainingSpec
from llava_pipeline.store import writing
from llava_pipeline.training.job import PIXELS, TOKENS, TrainingJob
from tests.conftest import ROOT
from tests.tiny import CONVERSATIONS, talk

Event = dict[str, Any]
Fault = tuple[str | float, ...]
NUM_SAMPLES, NUM_PICTURES, NUM_HELD_OUT = 22, 9, 5
RUNS = torch.arange(NUM_SAMPLES + 1)  # no two samples about one picture follow each other
QUICK = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
names = itertools.count()
Make = Callable[..., Path]


# --------------------------------------------------------------------------------------------- jobs


def a_spec(**changes: Any) -> TrainingSpec:
    """Eleven steps: two epochs, the end of the first inside a step."""
    values = {
        "max_steps": 11, "samples_per_step": 4, "learning_rate": 1e-2, "device": "cpu", "precision": "fp32",
        "checkpoint_seconds": 0, "held_out_every": 4, "held_out_samples": NUM_HELD_OUT,
    }  # fmt: skip
    return TrainingSpec(**(values | changes))


def samples_artifact(
    processor: Processor, count: int, seed: int = 0, masked: int | None = None, pictures: bool = True
) -> ArtifactRef:
    """Samples as ``stages.train.prepare`` writes them; of ``masked`` no token is supervised. Every fourth, or every
    one, has no picture."""
    rows = []
    for k in range(count):
        first, *rest = CONVERSATIONS[k % len(CONVERSATIONS)]
        messages = talk(f"{first} {k}", *rest)
        if not pictures or k % 4 == 3:
            messages[0]["content"] = [{"type": "text", "text": f"{first} {k}"}]
        rows.append(processor.encode(messages))
    labels = [torch.tensor(row.labels) for row in rows]
    if masked is not None:
        labels[masked] = torch.full_like(labels[masked], IGNORE_INDEX)
    side, generator = processor.images.side, torch.Generator().manual_seed(seed)
    tokens = {
        "ids": torch.tensor([token for row in rows for token in row.input_ids]),
        "labels": torch.cat(labels),
        "begins": torch.tensor([0, *(len(row.input_ids) for row in rows)]).cumsum(0),
        "image": torch.tensor([-1 if not pictures or k % 4 == 3 else k % NUM_PICTURES for k in range(count)]),
    }
    pixels = torch.randint(
        0, 256, (NUM_PICTURES if pictures else 0, side, side, 3), generator=generator, dtype=torch.uint8
    )
    with writing("samples") as (folder, done):
        save_file(tokens, folder / TOKENS)
        save_file({"pixels": pixels}, folder / PIXELS)
    return done[0]


def a_job(assembled: AssembledModel, processor: Processor, **changes: Any) -> TrainingJob:
    """The tiny model, 22 samples, and a spec with these changes."""
    train, held_out = samples_artifact(processor, NUM_SAMPLES), samples_artifact(processor, NUM_HELD_OUT, seed=1)
    return TrainingJob(model=assembled, train=train, held_out=held_out, spec=a_spec(**changes))


def write_job(job: TrainingJob, folder: Path) -> Path:
    """The job as a file."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"job-{next(names)}.json"
    path.write_text(job.model_dump_json(), encoding="utf-8")
    return path


# --------------------------------------------------------------------------------------------- what is on disk


def history(out: Path) -> list[dict[str, Any]]:
    """Every line of the history; a half line is an error."""
    text = (out / "history.jsonl").read_text(encoding="utf-8")
    assert text.endswith("\n")
    return [json.loads(line) for line in text.splitlines()]


def samples_seen(out: Path) -> list[int]:
    """Sample numbers in the order in which they were trained on."""
    return [sample for row in history(out) for sample in row["samples"]]


def checkpoints(out: Path) -> list[Path]:
    """Its checkpoints, the newest last."""
    return sorted((out / "checkpoints").glob("[0-9]*"))


def outcome(out: Path, optimizer: bool = True) -> dict[str, bytes]:
    """Bytes that every run of a job has in common: history, projector and, saved after the last step, optimizer."""
    (result,) = (out / "result").glob("[0-9]*")
    found = {"history": (out / "history.jsonl").read_bytes(), "projector": (result / "state.safetensors").read_bytes()}
    if optimizer:
        last = checkpoints(out)[-1]
        assert last.name == result.name
        found["optimizer"] = (last / "state.safetensors").read_bytes()
    return found


def left_over(out: Path) -> list[Path]:
    """Temporary files and folders below a training's."""
    return list(out.rglob(".writing-*"))


# --------------------------------------------------------------------------------------------- processes


class Trainer:
    """A training process as the one who started it sees it."""

    def __init__(self, pid: int, stdout: int, complaints: Path, wait: Callable[[], int]) -> None:
        self.pid, self.complaints, self._wait = pid, complaints, wait
        self.stdout = os.fdopen(stdout, encoding="utf-8")
        self.events: list[Event] = []

    def __iter__(self) -> Iterator[Event]:
        for line in self.stdout:
            self.events.append(json.loads(line))
            yield self.events[-1]

    def until(self, step: int) -> None:
        """Wait for a step of this run, counted from 1."""
        for count, _ in enumerate((event for event in self if event["event"] == "step"), 1):
            if count == step:
                return
        raise AssertionError(f"it ended before that: {self.end()}, {self.events[-3:]}, {self.complaint}")

    def until_note(self, text: str) -> None:
        """Wait for it to say something."""
        if not any(text in str(event.get("text")) for event in self):
            raise AssertionError(f"it ended before it said {text}: {self.end()}, {self.complaint}")

    def send(self, number: signal.Signals) -> None:
        """Send a signal, if it is still there."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def end(self) -> int:
        """Read all that it tells, and its return code: negative for a signal."""
        list(self)
        self.stdout.close()
        return self._wait()

    def kill(self) -> int:
        """SIGKILL, now."""
        self.send(signal.SIGKILL)
        self.stdout.close()
        return self._wait()

    @property
    def complaint(self) -> str:
        """Its standard error."""
        return self.complaints.read_text(encoding="utf-8")

    def notes(self, level: str = "warning") -> list[str]:
        """What it logged at a level."""
        return [event["text"] for event in self.events if event["event"] == "note" and event["level"] == level]

    @property
    def error(self) -> Event:
        """The error that it told."""
        (found,) = (event for event in self.events if event["event"] == "error")
        return found

    @property
    def steps(self) -> list[int]:
        """Numbers of the steps that this run made."""
        return [event["step"] for event in self.events if event["event"] == "step"]


class Nursery:
    """A process that has imported everything, and forks trainings."""

    def __init__(self) -> None:
        command = [sys.executable, "-c", "from tests.training.job import serve; serve()"]
        self.process = subprocess.Popen(
            command, cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=os.environ | QUICK
        )
        atexit.register(self.close)

    def ask(self, **request: Any) -> int:
        """Send a request; its answer."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(json.dumps(request), file=self.process.stdin, flush=True)
        return int(self.process.stdout.readline())

    def start(
        self, job: Path, out: Path, *arguments: str, faults: Sequence[Fault] = (), env: dict[str, str] | None = None,
        whole_exit: bool = False,
    ) -> Trainer:  # fmt: skip
        """A training in a fork, with ``faults`` (see ``FAULTS``) put into it."""
        number = next(names)
        pipe, complaints = job.parent / f"stdout-{number}", job.parent / f"stderr-{number}"
        os.mkfifo(pipe)
        stdout = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
        os.set_blocking(stdout, True)
        home = {"LLAVA_PIPELINE_HOME": os.environ["LLAVA_PIPELINE_HOME"]}
        pid = self.ask(
            fork=[str(job), str(out), *arguments], faults=faults, stdout=str(pipe), stderr=str(complaints),
            env=home | (env or {}), whole_exit=whole_exit,
        )  # fmt: skip
        return Trainer(pid, stdout, complaints, lambda: self.ask(wait=pid))

    def close(self) -> None:
        """End it."""
        if self.process.stdin is not None:
            self.process.stdin.close()
        self.process.wait()


def train(job: Path, out: Path, *arguments: str, faults: Sequence[Fault] = (), code: int = 0) -> Trainer:
    """A training to its end, which has this return code."""
    trainer = nursery().start(job, out, *arguments, faults=faults)
    found = trainer.end()
    assert found == code, (found, trainer.events[-2:], trainer.complaint[-2000:])
    return trainer


def train_together(
    job: Path, out: Path, *arguments: str, faults: Sequence[Fault] = (), code: int | tuple[int, int] = 0,
    meanwhile: Callable[[list[Trainer]], None] = lambda ranks: None,
) -> list[Trainer]:  # fmt: skip
    """A training by two processes, to its end; both have this return code, or each its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_RANK": "0"}
    ranks = [
        nursery().start(job, out, *arguments, faults=faults, env=address | {"RANK": str(rank)}) for rank in range(2)
    ]
    meanwhile(ranks)
    for trainer, expected in zip(ranks, code if isinstance(code, tuple) else (code, code), strict=True):
        found = trainer.end()
        assert found == expected, (found, trainer.events[-2:], trainer.complaint[-2000:])
    return ranks


_uninterrupted: dict[str, dict[str, bytes]] = {}


def uninterrupted(job: Path, optimizer: bool = True) -> dict[str, bytes]:
    """The outcome of a job that nothing disturbs; with the optimizer it saves after every step."""
    told = TrainingJob.model_validate_json(job.read_text(encoding="utf-8"))
    seconds = 0.0 if optimizer else 1000.0
    told = told.model_copy(update={"spec": told.spec.model_copy(update={"checkpoint_seconds": seconds})})
    key = told.model_dump_json()
    if key not in _uninterrupted:
        out = job.parent / f"uninterrupted-{next(names)}"
        train(write_job(told, job.parent), out)
        _uninterrupted[key] = outcome(out, optimizer)
    return _uninterrupted[key]


@cache
def nursery() -> Nursery:
    """The one of this test session."""
    return Nursery()


def serve() -> None:
    """The nursery's side: a fork per request, or how one ended."""
    from llava_pipeline.training import __main__, run

    run.measured_flops = lambda *_: 1e9  # a fifth of a second that no claim is about
    torch.set_num_threads(1)
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            print(os.waitstatus_to_exitcode(os.waitpid(request["wait"], 0)[1]), file=answers, flush=True)
            continue
        opened = os.open(request["stdout"], os.O_WRONLY)  # here: the reader must not find a pipe without a writer
        if pid := os.fork():
            os.close(opened)
            print(pid, file=answers, flush=True)
            continue
        os.close(answers.fileno())
        os.dup2(opened, 1)
        os.close(opened)
        os.dup2(os.open(request["stderr"], os.O_WRONLY | os.O_CREAT), 2)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.environ.update(request["env"])
        for name, *arguments in request["faults"]:
            FAULTS[name](*arguments)
        if request["whole_exit"]:
            sys.exit(__main__.main(request["fork"]))
        exit_with(__main__.main, request["fork"])


def exit_with(main: Callable[[list[str]], int], arguments: list[str]) -> None:
    """As Python ends a program, without the 1.5 s that it takes to clear away every module."""
    code = 1
    try:
        code = main(arguments)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


# --------------------------------------------------------------------------------------------- faults


def die_at_line(files: tuple[str, ...], number: int, function: str = "", after: int = 0) -> None:
    """SIGKILL to oneself before the ``number``-th line of these files that this thread runs, from the ``after``-th call
    of a function on, itself included."""
    lines, calls = itertools.count(1), itertools.count(1)
    begun = not function

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal begun
        if event == "call" and frame.f_code.co_name == function and frame.f_code.co_filename.endswith(files[0]):
            begun = begun or next(calls) == after
        if not begun:
            return None
        if event == "line" and frame.f_code.co_filename.endswith(files) and next(lines) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return trace if event != "call" or frame.f_code.co_filename.endswith(files) else None

    sys.settrace(trace)


SAVING = ("training/checkpoint.py", "shutil.py")


def die_in_save(which: int, line: int) -> None:
    """SIGKILL at a line of the ``which``-th checkpoint's writing."""
    die_at_line(SAVING, line, "write", which)


def die_in(file: str, function: str, line: int) -> None:
    """SIGKILL at a line of a function's first call."""
    die_at_line((file,), line, function, 1)


def limit_file_size(num_bytes: int) -> None:
    """No file grows beyond this: as a full disk, which ends some writes in the middle."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, num_bytes))


def limit_memory(more_bytes: int) -> None:
    """No more address space than is taken now, and this much."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    limit = pages * resource.getpagesize() + more_bytes
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def other_versions(version: str) -> None:
    """Every library says it is this version."""
    from llava_pipeline.training import job

    job.version = lambda name: version


def reads_otherwise() -> None:
    """The second process fits a projector that begins with words to something else."""
    from llava_pipeline.training import words

    if os.environ.get("RANK") == "1":
        words.RIDGE = 10.0


def no_number_from(step: int) -> None:
    """The loss is no number from a step on."""
    from llava_pipeline.training import loop

    apply = loop.apply

    def worse(learner: Any, total: float, spec: Any, place: Any) -> Any:
        return apply(learner, total if place.used.steps + 1 < step else float("nan"), spec, place)

    loop.apply = worse


def sleep_in_steps(seconds: float) -> None:
    """Every step takes this much longer."""
    from llava_pipeline.training import loop

    apply = loop.apply

    def slow(*arguments: Any) -> Any:
        threading.Event().wait(seconds)
        return apply(*arguments)

    loop.apply = slow


FAULTS: dict[str, Callable[..., None]] = {
    "die_in_save": die_in_save,
    "die_in": die_in,
    "limit_file_size": limit_file_size,
    "limit_memory": limit_memory,
    "threads": torch.set_num_threads,
    "other_versions": other_versions,
    "no_number_from": no_number_from,
    "reads_otherwise": reads_otherwise,
    "sleep_in_steps": sleep_in_steps,
}
