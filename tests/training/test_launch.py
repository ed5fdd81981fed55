"""Whoever starts a training hears what it tells, learns how it ended, and leaves no process behind.

Stand-ins speak for the training where the claim is about the one who starts it; the real one is started at the end.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from llava_pipeline.contracts import AssembledModel
from llava_pipeline.errors import Diverged, Interrupted, LlavaPipelineError, OtherTraining, TrainerDied
from llava_pipeline.model.processor import Processor
from llava_pipeline.training import launch as room
from llava_pipeline.training.launch import Event, launch
from tests.conftest import ROOT
from tests.training.job import QUICK, a_job, checkpoints, history, outcome, train, uninterrupted, write_job

StandIn = Callable[..., list[Event]]
STAND_IN = """
import json, os, signal, subprocess, sys, time

def tell(event, **fields):
    print(json.dumps({"event": event, **fields}), flush=True)

asked = []
def listen():
    signal.signal(signal.SIGTERM, lambda *_: asked.append(1))

def saved():
    open(os.path.join(sys.argv[2], "saved-" + os.environ.get("RANK", "0")), "w").close()

exec(open(sys.argv[1]).read())
"""
UNTIL_ASKED = """
listen()
step = 0
while not asked:
    step += 1
    if os.environ.get("RANK", "0") == "0":
        tell("step", step=step)
    time.sleep(0.01)
saved()
tell("error", kind="Interrupted", text="stopped")
sys.exit(143)
"""


@pytest.fixture
def out(tmp_path: Path) -> Iterator[Path]:
    """Where the training under test is; its processes have this path among their arguments, and end with the test."""
    (tmp_path / "out").mkdir()
    yield tmp_path / "out"
    for pid in processes_of(tmp_path / "out"):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


@pytest.fixture
def stand_in(tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> StandIn:
    """Launch a few lines of Python as if they were the training; the events that were followed."""
    (tmp_path / "stand_in.py").write_text(STAND_IN, encoding="utf-8")
    monkeypatch.setattr(room, "MODULE", "stand_in")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    def launched(
        code: str, num_processes: int = 1, follow: Callable[[Event], None] = lambda event: None
    ) -> list[Event]:
        job = tmp_path / "job.py"
        job.write_text(textwrap.dedent(code), encoding="utf-8")
        followed: list[Event] = []

        def both(event: Event) -> None:
            followed.append(event)
            follow(event)

        launch(job, out, num_processes, both)
        return followed

    return launched


def processes_of(out: Path, argument: str = "") -> dict[int, str]:
    """Command lines of what runs with this folder, and this, among its arguments."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            arguments = path.read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue
        if str(out) in arguments and argument in (*arguments, ""):
            found[int(path.parent.name)] = " ".join(arguments)
    return found


def wait_until_gone(out: Path, seconds: float) -> None:
    """Until nothing runs there any more."""
    end = time.monotonic() + seconds
    while processes_of(out):
        assert time.monotonic() < end, processes_of(out)
        time.sleep(0.02)


class Cancelled(BaseException):
    """What an orchestrator throws into the one who follows."""


def cancel_at(step: int) -> Callable[[Event], None]:
    def follow(event: Event) -> None:
        if event.get("step") == step:
            raise Cancelled

    return follow


# --------------------------------------------------------------------------------------------- what is told


def test_events_are_followed_in_order(stand_in: StandIn) -> None:
    code = """
    for step in range(1, 4):
        tell("step", step=step)
    tell("note", level="info", text="µ")
    tell("done")
    """
    followed = stand_in(code)
    assert followed == [
        *({"event": "step", "step": step} for step in (1, 2, 3)),
        {"event": "note", "level": "info", "text": "µ"},
        {"event": "done"},
    ]


@pytest.mark.parametrize(
    "noise",
    [
        pytest.param("print('Loading checkpoint shards: 100%')", id="text"),
        pytest.param("print('[1, 2]'); print('7'); print('null'); print(json.dumps({'loss': 1}))", id="other JSON"),
        pytest.param("print(); print('{\"event\": ')", id="half an event"),
        pytest.param("sys.stdout.buffer.write(b'\\xff\\xfe\\n'); sys.stdout.flush()", id="no text"),
        pytest.param("print('x' * 1_000_000)", id="a long line"),
        pytest.param("sys.stderr.write('warning ' * 200_000)", id="many complaints"),
        pytest.param("sys.stderr.buffer.write(b'\\xff' * 10)", id="complaints that are no text"),
    ],
)
def test_noise_is_passed_over(stand_in: StandIn, noise: str) -> None:
    assert stand_in(f"{noise}\ntell('step', step=1)") == [{"event": "step", "step": 1}]


# --------------------------------------------------------------------------------------------- how it ended


@pytest.mark.parametrize(("kind", "code", "expected"), [("Diverged", 1, Diverged), ("OtherTraining", 2, OtherTraining)])
def test_an_error_of_the_training_is_raised_as_what_it_is(
    stand_in: StandIn, kind: str, code: int, expected: type[LlavaPipelineError]
) -> None:
    with pytest.raises(expected) as raised:
        stand_in(f"tell('step', step=1); tell('error', kind='{kind}', text='loss nan at step 3'); sys.exit({code})")
    assert type(raised.value) is expected
    assert str(raised.value) == "loss nan at step 3"


def test_an_error_is_not_followed_as_an_event(stand_in: StandIn) -> None:
    followed: list[Event] = []
    with pytest.raises(Diverged):
        stand_in("tell('error', kind='Diverged', text='x'); sys.exit(1)", follow=followed.append)
    assert followed == []


@pytest.mark.parametrize("kind", ["SystemExit", "annotations", "NoSuchError", "", None])
def test_an_error_that_is_none_of_ours_is_a_dead_trainer(stand_in: StandIn, kind: str | None) -> None:
    with pytest.raises(TrainerDied, match="code 1: out of luck"):
        stand_in(f"tell('error', kind={kind!r}, text='x'); print('out of luck', file=sys.stderr); sys.exit(1)")


def test_a_killed_training_is_told_as_such(stand_in: StandIn) -> None:
    with pytest.raises(TrainerDied, match="was killed, perhaps for its memory; it goes on when started again"):
        stand_in("tell('step', step=1); os.kill(os.getpid(), signal.SIGKILL)")


def test_a_crash_is_told_with_its_last_words(stand_in: StandIn) -> None:
    with pytest.raises(TrainerDied, match=r"ended with code 1: ZeroDivisionError: division by zero; run with --debug"):
        stand_in("1 / 0")
    with pytest.raises(TrainerDied, match="ended with code 3: no message"):
        stand_in("os._exit(3)")
    with pytest.raises(TrainerDied, match="ended with code -11"):
        stand_in("os.kill(os.getpid(), signal.SIGSEGV)")


def test_one_that_no_longer_tells_is_waited_for(stand_in: StandIn, out: Path) -> None:
    stand_in("tell('done'); os.close(1); time.sleep(0.3); saved(); os._exit(0)")
    assert (out / "saved-0").exists()


# --------------------------------------------------------------------------------------------- cancelled


def test_cancelled_it_is_asked_to_save_and_leaves_nothing_behind(stand_in: StandIn, out: Path) -> None:
    helper = "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)', sys.argv[2]])\n"
    with pytest.raises(Cancelled):
        stand_in(helper + UNTIL_ASKED, follow=cancel_at(3))
    assert (out / "saved-0").exists()
    wait_until_gone(out, 1)


def test_cancelled_by_an_error_of_the_one_who_follows_it_saves_too(stand_in: StandIn, out: Path) -> None:
    def follow(event: Event) -> None:
        raise OSError("the disk of the one who follows is full")

    with pytest.raises(OSError, match="who follows"):
        stand_in(UNTIL_ASKED, follow=follow)
    assert (out / "saved-0").exists()
    wait_until_gone(out, 1)


def test_one_that_does_not_stop_is_killed(stand_in: StandIn, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "SECONDS_TO_SAVE", 0.3)
    with pytest.raises(Cancelled):
        stand_in("listen()\ntell('step', step=1)\nwhile True: time.sleep(1)", follow=cancel_at(1))
    wait_until_gone(out, 1)


def test_cancelled_with_much_untold_it_still_saves(
    stand_in: StandIn, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever follows was slow, the pipe is full, and the training waits for somebody to read it."""
    monkeypatch.setattr(room, "SECONDS_TO_SAVE", 3.0)
    code = """
    listen()
    step = 0
    try:
        while not asked:
            step += 1
            tell("step", step=step, more="x" * 500)
    except BrokenPipeError:
        pass
    saved()
    os._exit(143)
    """

    def follow(event: Event) -> None:
        time.sleep(0.5)
        raise Cancelled

    with pytest.raises(Cancelled):
        stand_in(code, follow=follow)
    assert (out / "saved-0").exists()


def test_two_processes_are_both_asked_and_both_gone(stand_in: StandIn, out: Path) -> None:
    # Rank 0 begins when both listen: who is asked to stop before it does dies of it, which is not what is tested.
    both = """
listen()
from pathlib import Path
out = Path(sys.argv[2])
(out / f"listens-{os.environ['RANK']}").touch()
while len(list(out.glob("listens-*"))) < 2:
    time.sleep(0.01)
"""
    with pytest.raises(Cancelled):
        stand_in(both + UNTIL_ASKED, 2, cancel_at(3))
    assert {path.name for path in out.glob("saved-*")} == {"saved-0", "saved-1"}
    wait_until_gone(out, 1)


def test_of_two_processes_one_may_tell_the_error(stand_in: StandIn, out: Path) -> None:
    code = """
    if os.environ["RANK"] == "0":
        tell("error", kind="Diverged", text="loss nan"); sys.exit(1)
    time.sleep(60)
    """
    with pytest.raises(Diverged, match="loss nan"):
        stand_in(code, 2)
    wait_until_gone(out, 1)


def test_of_two_processes_a_crash_is_told_with_its_last_words(stand_in: StandIn) -> None:
    with pytest.raises(TrainerDied, match="ZeroDivisionError: division by zero"):
        stand_in("1 / 0", 2)


@pytest.mark.slow
def test_a_killed_starter_of_two_processes_leaves_none_of_them(stand_in: StandIn, out: Path) -> None:
    """torchrun gives every process a session of its own: its group is not theirs."""

    def follow(event: Event) -> None:
        if event["step"] == 3:
            (starter,) = processes_of(out, "torch.distributed.run")
            os.kill(starter, signal.SIGKILL)
            raise Cancelled

    code = UNTIL_ASKED.replace('if os.environ.get("RANK", "0") == "0":', "if False:")
    with pytest.raises(Cancelled):
        stand_in("tell('step', step=3)\n" + code, 2, follow)
    wait_until_gone(out, 5)


# --------------------------------------------------------------------------------------------- the real one

PARENT = """
import sys
from pathlib import Path
from llava_pipeline.training.launch import launch
launch(Path(sys.argv[1]), Path({out!r}), {num}, lambda event: print(event.get("step", ""), flush=True))
"""


def kill_parent(job: Path, out: Path, num_processes: int, step: int) -> None:
    """Launch from another process, and SIGKILL that one after a step."""
    code = PARENT.format(out=str(out), num=num_processes)
    parent = subprocess.Popen(
        [sys.executable, "-c", code, str(job)], cwd=ROOT, env=os.environ | QUICK, stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    for line in parent.stdout:
        if line.strip() == str(step):
            break
    parent.kill()
    parent.wait()
    parent.stdout.close()


@pytest.fixture
def job(assembled: AssembledModel, processor: Processor, tmp_path: Path) -> Path:
    """A real one, long enough to be ended in the middle, which saves only when it is told to."""
    return write_job(a_job(assembled, processor, max_steps=150, checkpoint_seconds=1000), tmp_path)


@pytest.mark.slow
def test_with_its_parent_killed_a_training_saves_ends_and_can_be_gone_on_with(job: Path, out: Path) -> None:
    kill_parent(job, out, 1, step=5)
    wait_until_gone(out, 10)
    (saved,) = checkpoints(out)
    assert 5 <= int(saved.name) < 150
    assert train(job, out).steps == list(range(int(saved.name) + 1, 151))
    assert outcome(out, optimizer=False) == uninterrupted(job, optimizer=False)


@pytest.mark.slow
def test_two_real_processes_are_followed_cancelled_killed_and_gone_on_with(
    job: Path, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with pytest.raises(Cancelled):
        launch(job, out, 2, cancel_at(4))
    wait_until_gone(out, 1)
    first = int(checkpoints(out)[-1].name)
    assert 4 <= first < 150
    kill_parent(job, out, 2, step=first + 4)
    wait_until_gone(out, 40)
    second = int(checkpoints(out)[-1].name)
    assert first < second < 150
    followed: list[Event] = []
    launch(job, out, 2, followed.append)
    assert [event["step"] for event in followed if event["event"] == "step"] == list(range(second + 1, 151))
    assert followed[-1] == {"event": "done"}
    launch(job, tmp_path / "whole", 2, lambda event: None)
    assert outcome(out, optimizer=False) == outcome(tmp_path / "whole", optimizer=False)


@pytest.mark.slow
def test_a_real_training_that_is_stopped_or_refused_is_raised_as_such(
    job: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    def stop(event: Event) -> None:
        if event.get("step") == 3:
            (pid,) = processes_of(out)
            os.kill(pid, signal.SIGTERM)

    with pytest.raises(Interrupted, match=r"stopped after step \d+; start it again to go on from there"):
        launch(job, out, 1, stop)
    other = job.with_name("other.json")
    other.write_text(job.read_text(encoding="utf-8").replace('"seed":0,"held', '"seed":3,"held'), encoding="utf-8")
    for num_processes in (1, 2):
        with pytest.raises(OtherTraining, match=r"seed=0 \(now 3\)"):
            launch(other, out, num_processes, lambda event: None)
        wait_until_gone(out, 1)
    assert history(out)[-1]["step"] >= 3
