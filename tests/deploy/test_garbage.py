"""What ``llava-pipeline gc`` deletes, and that nothing is missed afterwards: a real home, real MLflow."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as examples
from hypothesis import strategies as st
from PIL import Image

from llava_pipeline import store
from llava_pipeline.backbones.converted import plain
from llava_pipeline.backbones.fetch import fetch
from llava_pipeline.errors import TrackingError, TrackingUnavailable
from llava_pipeline.operations.garbage import LOG_BYTES, Item, Look, collect
from llava_pipeline.spec import FolderBackbone
from llava_pipeline.stages.chat import answer_about
from llava_pipeline.stages.recorded import evaluate_recorded
from llava_pipeline.stages.weigh import ask_champion
from llava_pipeline.tracking import bundle, registry, spool
from llava_pipeline.tracking.client import connect, ensure_experiment
from llava_pipeline.tracking.references import Recorded, Reference, Referrer
from llava_pipeline.tracking.settings import Settings, TrackingSettings
from llava_pipeline.tracking.stale import PROCESS, this_process
from tests.backbones.test_weights import write_tiny_gguf
from tests.cli.conftest import Command
from tests.deploy.recorded import ALIASES, NAME, SPEC, age, files_below, record_here, train_here

MLFLOW = "mlflow.db"
HOLD = """
import fcntl, sys, time
lock = open(sys.argv[1], "w")
fcntl.flock(lock, fcntl.LOCK_EX)
print("held", flush=True)
time.sleep(600)
"""


def deleted(items: list[Item]) -> set[str]:
    return {item.path for item in items if item.deleted}


def kept(items: list[Item]) -> dict[str, str]:
    return {item.path: item.why for item in items if not item.deleted}


def of_store(kind: str) -> list[str]:
    return sorted(f"store/{kind}/{path.name}" for path in (store.home() / "store" / kind).iterdir())


def test_a_dry_run_deletes_nothing_and_tells_exactly_what_the_real_one_deletes(own_home: Path) -> None:
    (own_home / "services").mkdir()
    before = files_below(own_home, MLFLOW)
    told = collect(Settings(), keep_runs=1, dry_run=True)
    assert files_below(own_home, MLFLOW) == before
    done = collect(Settings(), keep_runs=1, dry_run=False)
    assert done == told
    assert deleted(done)
    assert not [path for path in deleted(done) if (own_home / path).exists()]
    assert not [path for path in kept(done) if not (own_home / path).exists()]
    left = {path for path in before if not path.startswith(tuple(deleted(done)))}
    assert set(files_below(own_home, MLFLOW)) == left
    assert deleted(collect(Settings(), keep_runs=1, dry_run=False)) == set()


def test_what_no_run_needs_is_deleted_and_what_versions_and_aliases_need_is_kept(own_home: Path) -> None:
    items = collect(Settings(), keep_runs=0, dry_run=True)
    by_kind = {kind: len(of_store(kind)) for kind in ("answers", "projector", "snapshot", "samples", "scores")}
    assert (by_kind["answers"], by_kind["projector"], by_kind["snapshot"]) == (4, 5, 4)
    gone = deleted(items)
    # The answers and the weights of version 3, which has no alias, are in MLflow; the unrecorded projector is nowhere.
    assert len(gone & set(of_store("answers"))) == 1
    assert len(gone & set(of_store("projector"))) == 2
    assert len(gone & set(of_store("snapshot"))) == 2
    assert gone >= set(of_store("samples"))
    assert not gone & set(of_store("backbone"))
    needed_by_three = [path for path, why in kept(items).items() if "version 3" in why]
    assert [path.split("/")[1] for path in needed_by_three] == ["scores"]


@pytest.mark.slow
def test_every_alias_and_every_version_answers_afterwards_and_the_next_run_works(own_home: Path) -> None:
    collect(Settings(), keep_runs=0, dry_run=False)
    Image.new("RGB", (32, 32), "red").save(own_home / "red.png")
    for alias in ALIASES:
        assert answer_about(own_home / "red.png", "What color?", alias, NAME, 4, Settings())["run_id"]
    digest = evaluate_recorded("3", NAME, None, None, None, Settings()).held_out.rows.digest
    assert f"store/snapshot/{digest}" in of_store("snapshot")
    _, data, trained = train_here()
    run = record_here(trained, data, Settings())
    assert run.version == "5"
    champion = registry.champion(NAME, Settings())
    assert champion is not None
    asked = ask_champion(run, champion, Settings())
    assert (asked.version, asked.problem) == ("2", None)


def test_the_newest_runs_keep_their_training_rows(own_home: Path) -> None:
    """Version 4 needs its rows as challenger; without aliases only a newest run does."""
    for alias in ALIASES:
        connect(Settings()).delete_registered_model_alias(NAME, alias)
    all_gone = deleted(collect(Settings(), keep_runs=0, dry_run=True)) & set(of_store("snapshot"))
    kept_one = deleted(collect(Settings(), keep_runs=1, dry_run=True)) & set(of_store("snapshot"))
    assert len(all_gone - kept_one) == 1


def test_a_gguf_that_nobody_reads_any_more_is_kept_neither_whole_nor_converted(own_home: Path) -> None:
    (own_home / "named").mkdir()
    write_tiny_gguf(own_home / "named" / "tiny.gguf")
    part = fetch(FolderBackbone(path=str(own_home / "named"), weights="tiny.gguf"), None, 1)
    converted = plain(part)[0]
    (remembered,) = (own_home / "cache" / "gguf").iterdir()
    mine = {path.relative_to(own_home).as_posix() for path in (converted, remembered)}
    why = kept(collect(Settings(), keep_runs=0, dry_run=True))
    assert {why[path] for path in mine} == {"changed in the last 24 hours", "its files are in the store"}
    age(own_home, 2)
    assert deleted(collect(Settings(), keep_runs=0, dry_run=False)) >= mine
    assert deleted(collect(Settings(), keep_runs=0, dry_run=False)) == set()
    assert not remembered.exists()


def test_nothing_is_deleted_while_mlflow_is_away_or_its_artifacts_are(own_home: Path) -> None:
    before = files_below(own_home, MLFLOW)
    away = Settings(tracking=TrackingSettings(uri="http://127.0.0.1:9", timeout_seconds=1))
    with pytest.raises(TrackingUnavailable, match="does not answer"):
        collect(away, keep_runs=0, dry_run=False)
    other = Settings(tracking=TrackingSettings(experiment="of somebody else"))
    with pytest.raises(TrackingError, match="nothing says what of"):
        collect(other, keep_runs=0, dry_run=False)
    (own_home / "mlartifacts").rename(own_home / "unmounted")
    with pytest.raises(TrackingError, match=r"has no evaluation/evaluation\.json"):
        collect(Settings(), keep_runs=0, dry_run=False)
    (own_home / "unmounted").rename(own_home / "mlartifacts")
    assert files_below(own_home, MLFLOW) == before


def test_a_home_without_records_and_without_a_store_is_nothing_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLAVA_PIPELINE_HOME", str(tmp_path / "empty"))
    assert collect(Settings(), keep_runs=5, dry_run=False) == []
    assert not (tmp_path / "empty" / MLFLOW).exists()


def test_what_is_younger_than_a_day_or_than_a_running_job_is_kept(own_home: Path) -> None:
    (samples, *_) = of_store("samples")
    os.utime(own_home / samples)
    assert kept(collect(Settings(), keep_runs=0, dry_run=True))[samples] == "changed in the last 24 hours"
    client = connect(Settings())
    experiment = ensure_experiment(client, Settings())
    began = int((time.time() - 4 * 24 * 60 * 60) * 1000)
    client.create_run(experiment, start_time=began, tags={PROCESS: this_process()})
    items = collect(Settings(), keep_runs=0, dry_run=True)
    assert deleted(items) == set()
    assert kept(items)[samples] == "changed since a running job began"


@pytest.fixture
def hold() -> Iterator[Callable[[Path], None]]:
    """Holds a training's lock in a process of its own."""
    processes = []

    def take(lock: Path) -> None:
        processes.append(subprocess.Popen([sys.executable, "-c", HOLD, str(lock)], stdout=subprocess.PIPE, text=True))
        assert processes[-1].stdout is not None
        assert processes[-1].stdout.readline() == "held\n"

    yield take
    for process in processes:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def training(home: Path, name: str, samples: str, days: float) -> Path:
    """A training's folder, so many days old."""
    folder = home / "training" / name
    folder.mkdir(parents=True)
    _, kind, digest = samples.split("/")
    job = {"train": {"kind": kind, "digest": digest, "num_bytes": 1}, "held_out": None}
    (folder / "job.json").write_text(json.dumps(job))
    (folder / "lock").touch()
    age(folder, days)
    return folder


def test_a_training_that_runs_or_can_be_gone_on_with_keeps_its_folder_and_what_it_reads(
    own_home: Path, hold: Callable[[Path], None]
) -> None:
    gone = deleted(collect(Settings(), keep_runs=0, dry_run=True))
    (samples,) = of_store("samples")
    rows, other_rows = sorted(gone & set(of_store("snapshot")))
    training(own_home, "runs", samples, days=30)
    training(own_home, "stopped", rows, days=3)
    training(own_home, "forgotten", other_rows, days=30)
    finished = training(own_home, "finished", other_rows, days=3)
    (finished / "result" / "000000002").mkdir(parents=True)
    age(finished, days=3)
    hold(own_home / "training" / "runs" / "lock")
    age(own_home / "training" / "runs", days=30)
    items = collect(Settings(), keep_runs=0, dry_run=False)
    assert sorted(path.name for path in (own_home / "training").iterdir()) == ["runs", "stopped"]
    assert kept(items)["training/runs"] == "it is running"
    assert [(own_home / path).is_dir() for path in (samples, rows, other_rows)] == [True, True, False]


def test_a_night_that_waits_to_be_recorded_keeps_what_it_names(own_home: Path) -> None:
    """Version 3 has no alias, so nothing else needs its answers and its rows."""
    evaluation = registry.recorded_evaluation(registry.run_of_version(NAME, "3", Settings()), Settings())
    named = [f"store/{ref.kind}/{ref.digest}" for ref in (evaluation.answers, evaluation.projector.projector)]
    assert set(named) <= deleted(collect(Settings(), keep_runs=0, dry_run=True))
    spool.keep(SPEC, evaluation, {"prefect.flow_run_id": "a-night"}, time.time())
    age(own_home, days=3)
    items = kept(collect(Settings(), keep_runs=0, dry_run=False))
    assert [items[path] for path in named] == ["needed by a night that waits to be recorded"] * 2
    assert len(spool.waiting()) == 0  # this process is at it
    assert (own_home / "spool" / "a-night.json").exists()


def test_what_killed_writers_left_is_removed_and_what_is_being_written_is_not(own_home: Path) -> None:
    for name in ("old", "new"):
        folder = own_home / "store" / "snapshot" / f".writing-{name}"
        folder.mkdir()
        (folder / "rows.parquet").write_bytes(b"half")
    (own_home / "parts" / "key").mkdir(parents=True)
    (own_home / "parts" / "key" / ".writing-x").write_bytes(b"half")
    age(own_home, days=3)
    (own_home / "store" / "snapshot" / ".writing-new" / "rows.parquet").touch()
    os.utime(own_home / "parts" / "key")  # parts that are in use
    items = collect(Settings(), keep_runs=0, dry_run=False)
    assert {"store/snapshot/.writing-old", "parts/key/.writing-x"} <= deleted(items)
    assert (own_home / "store" / "snapshot" / ".writing-new").is_dir()
    assert list((own_home / "parts" / "key").iterdir()) == []


def test_kept_features_parts_bundles_and_downloads_go_when_nobody_uses_them(own_home: Path) -> None:
    for folder in ("features/tower", "parts/key"):
        (own_home / folder).mkdir(parents=True)
        (own_home / folder / "file").write_bytes(b"x" * 5000)
    bundle.keep("champion", bundle.fetch(NAME, "2", Settings()))
    bundle.fetch(NAME, "3", Settings())
    age(own_home, days=3)
    gone = deleted(collect(Settings(), keep_runs=0, dry_run=False))
    assert {"features/tower", "parts/key"} <= gone
    versions = [path.name.split("-")[0] for path in (own_home / "serving" / NAME).iterdir() if path.is_dir()]
    assert versions == ["2"]
    assert bundle.kept(NAME, "champion") is not None


def test_a_bundle_that_a_server_is_loading_is_kept(own_home: Path) -> None:
    fetched = bundle.fetch(NAME, "3", Settings())
    age(own_home, days=3)
    with bundle.in_use(NAME):
        items = collect(Settings(), keep_runs=0, dry_run=False)
    assert fetched.folder.is_dir()
    assert "a server is loading a version" in kept(items).values()


def test_a_result_of_prefects_goes_with_the_artifact_that_it_names(own_home: Path) -> None:
    results = own_home / "prefect" / "storage"
    results.mkdir(parents=True)
    items = {item.path: item for item in collect(Settings(), keep_runs=0, dry_run=True)}
    lost = next(path for path in of_store("snapshot") if items[path].deleted)
    held = next(path for path in of_store("snapshot") if not items[path].deleted)
    for name, path in (("lost", lost), ("held", held), ("missing", "store/snapshot/" + "0" * 64)):
        _, kind, digest = path.split("/")
        rows = {"rows": {"kind": kind, "digest": digest, "num_bytes": 1}}
        result = {"__class__": "llava_pipeline.contracts.Snapshot", "data": rows}
        (results / name).write_text(json.dumps({"metadata": {}, "result": json.dumps(result)}))
    (results / "verdict").write_text(json.dumps({"metadata": {}, "result": '"promoted"'}))
    age(results, days=3)
    collect(Settings(), keep_runs=0, dry_run=False)
    assert sorted(path.name for path in results.iterdir()) == ["held", "verdict"]


def test_a_log_keeps_its_end_and_its_writer_goes_on_behind_it(own_home: Path) -> None:
    log = own_home / "services" / "mlflow.log"
    log.parent.mkdir()
    with log.open("ab") as writer:
        writer.write(b"line of a log\n" * (LOG_BYTES // 14 + 1000))
        writer.flush()
        collect(Settings(), keep_runs=0, dry_run=False)
        writer.write(b"the newest line\n")
    lines = log.read_bytes().splitlines()
    assert log.stat().st_size < 2_000_000
    assert set(lines[:-1]) == {b"line of a log"}
    assert lines[-1] == b"the newest line"


def test_the_command_tells_a_table_or_json_and_counts_what_is_freed(own_home: Path, command: Command) -> None:
    told = command("gc", "--dry-run", "--keep-runs", "0", "--json").document
    assert told["dry_run"] is True
    assert told["freed_bytes"] == sum(item["num_bytes"] for item in told["items"] if item["deleted"]) > 0
    table = command("gc", "--keep-runs", "0")
    assert (table.exit_code, "were freed" in table.out, "mlflow gc" in table.out) == (0, True, True)
    assert command("gc", "--keep-runs", "0", "--json").document["freed_bytes"] == 0


names = st.sampled_from([f"{number:064x}" for number in range(6)])


@examples(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(there=st.dictionaries(names, st.floats(0, 72)), needed=st.sets(names), began=st.none() | st.floats(0, 72))
def test_an_artifact_goes_if_and_only_if_nobody_needs_it_and_it_is_older_than_everything_that_runs(
    tmp_path_factory: pytest.TempPathFactory, there: dict[str, float], needed: set[str], began: float | None
) -> None:
    home, now = tmp_path_factory.mktemp("home"), time.time()
    for name, hours in there.items():
        (home / "store" / "answers" / name).mkdir(parents=True)
        os.utime(home / "store" / "answers" / name, (now - 3600 * hours,) * 2)
    needs = tuple(Reference(kind="answers", digest=name, place="answers") for name in sorted(needed))
    told = Recorded(
        referrers=(Referrer(who="version 1", role="alias", run_id="1", needs=needs),),
        running_since=None if began is None else now - 3600 * began,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLAVA_PIPELINE_HOME", str(home))
        gone = {item.path.rpartition("/")[2] for item in Look(told, now).items() if item.deleted}
    oldest = max(24.0, began or 0.0)
    assert gone == {name for name, hours in there.items() if name not in needed and hours > oldest}
