"""``llava-pipeline backup`` and ``restore`` on SQLite and a folder; PostgreSQL and S3 stand in test_databases.py."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llava_pipeline import store
from llava_pipeline.addresses import Addresses, write_addresses
from llava_pipeline.errors import BackupFailed, BackupRefused
from llava_pipeline.operations import backup, restore
from llava_pipeline.tracking import registry
from llava_pipeline.tracking.client import connect
from llava_pipeline.tracking.settings import FILE_VARIABLE, Settings
from tests.cli.conftest import Command
from tests.deploy.recorded import NAME
from tests.serving.served import COMMAND

COUNT = "SELECT count(*) FROM flow_run"
WRITE = """
import sqlite3, sys, time
database = sqlite3.connect(sys.argv[1], timeout=60)
database.execute("PRAGMA journal_mode=WAL")
number = 0
while True:
    with database:
        database.execute("INSERT INTO flow_run VALUES (?, 'begun')", (f"w{number}",))
        database.execute("UPDATE flow_run SET name = 'whole' WHERE id = ?", (f"w{number}",))
    number += 1
    print(number, flush=True)
"""


def facts(home: Path) -> dict[str, Any]:
    """Runs, versions, aliases and metrics as MLflow's client tells them of a copy, so that the database is free."""
    copy = home.parent / f"asked-{time.monotonic_ns()}.db"
    with sqlite3.connect(home / "mlflow.db") as source, sqlite3.connect(copy) as target:
        source.backup(target)
    source.close()
    settings = Settings.model_validate({"tracking": {"uri": f"sqlite:///{copy}"}})
    client = connect(settings)
    runs = client.search_runs(["1"])
    versions = client.search_model_versions(f"name = '{NAME}'")
    return {
        "runs": {run.info.run_id: (run.info.status, run.data.params, run.data.metrics, run.data.tags) for run in runs},
        "versions": {version.version: (version.run_id, version.tags) for version in versions},
        "aliases": registry.aliases(NAME, settings),
        "curve": {
            run.info.run_id: [
                (point.step, point.value) for point in client.get_metric_history(run.info.run_id, "train/loss")
            ]
            for run in runs
        },
    }


@pytest.fixture
def home(own_home: Path) -> Path:
    """With a database as Prefect has one."""
    (own_home / "prefect").mkdir()
    with sqlite3.connect(own_home / "prefect" / "prefect.db") as database:
        database.execute("CREATE TABLE flow_run (id TEXT PRIMARY KEY, name TEXT)")
        database.executemany("INSERT INTO flow_run VALUES (?, ?)", [("1", "nightly-1"), ("2", "nightly-2")])
    database.close()
    return own_home


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Path]:
    """Go on in a home where nothing is."""

    def go() -> Path:
        monkeypatch.setenv("LLAVA_PIPELINE_HOME", str(tmp_path / "elsewhere"))
        return tmp_path / "elsewhere"

    return go


def flow_runs(home: Path) -> list[tuple[str, str]]:
    with sqlite3.connect(home / "prefect" / "prefect.db") as database:
        return list(database.execute("SELECT id, name FROM flow_run ORDER BY id"))


def test_a_home_restored_elsewhere_has_the_same_runs_versions_aliases_and_files(
    home: Path, tmp_path: Path, elsewhere: Callable[[], Path]
) -> None:
    before, flows = facts(home), flow_runs(home)
    backup.make(tmp_path / "backup", Settings())
    home.rename(tmp_path / "gone")
    other = elsewhere()
    done = restore.put_back(tmp_path / "backup", Settings(), replace=False)
    assert done.aside == ()
    assert facts(other) == before
    assert len(before["runs"]) == len(before["versions"]) == 4
    assert all(len(curve) == 2 for curve in before["curve"].values())
    assert flow_runs(other) == flows
    folder = registry.download_projector("champion", NAME, Settings())  # its digest is checked
    assert folder.is_relative_to(other)
    assert registry.recorded_evaluation(registry.resolve("3", NAME, Settings()), Settings()).num_questions > 0


def test_a_home_restored_in_place_after_it_was_lost_is_as_before(home: Path, tmp_path: Path, command: Command) -> None:
    before = facts(home)
    made = command("backup", str(tmp_path / "backup"), "--json")
    assert made.document["artifacts"] == {"kind": "folder", "address": str(home / "mlartifacts")}
    refused = command("restore", str(tmp_path / "backup"))
    assert (refused.exit_code, "say --replace" in refused.error) == (2, True)
    with sqlite3.connect(home / "mlflow.db") as database:
        database.execute("DELETE FROM registered_model_aliases")
    database.close()
    assert facts(home)["aliases"] == {}
    done = command("restore", str(tmp_path / "backup"), "--replace", "--json")
    assert done.exit_code == 0
    assert facts(home) == before
    assert sorted(Path(place).name.split(".before")[0] for place in done.document["aside"]) == [
        "mlartifacts", "mlflow.db", "prefect.db",
    ]  # fmt: skip
    assert all(Path(place).exists() for place in done.document["aside"])


def test_a_database_that_is_written_to_meanwhile_is_copied_as_it_was_at_one_moment(home: Path, tmp_path: Path) -> None:
    source = home / "prefect" / "prefect.db"
    writer = subprocess.Popen([sys.executable, "-c", WRITE, str(source)], stdout=subprocess.PIPE, text=True)
    assert writer.stdout is not None
    try:
        while int(writer.stdout.readline()) < 50:
            pass
        backup.make(tmp_path / "backup", Settings())
    finally:
        writer.kill()
        writer.wait()
        writer.stdout.close()
    with sqlite3.connect(tmp_path / "backup" / "prefect.db") as copy:
        names = dict(copy.execute("SELECT name, count(*) FROM flow_run GROUP BY name"))
        assert copy.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    assert names["whole"] >= 50
    assert "begun" not in names
    assert [path.name for path in (tmp_path / "backup").glob("prefect.db*")] == ["prefect.db"]


def test_a_flipped_byte_a_missing_and_a_foreign_file_are_refused(
    home: Path, tmp_path: Path, elsewhere: Callable[[], Path]
) -> None:
    folder = tmp_path / "backup"
    backup.make(folder, Settings())
    other = elsewhere()

    def refused(told: str) -> None:
        with pytest.raises(BackupRefused, match=told):
            restore.put_back(folder, Settings(), replace=True)
        assert not other.exists()

    some = next(path for path in (folder / "artifacts").rglob("*.safetensors"))
    for victim in (some, folder / "mlflow.db"):
        whole = victim.read_bytes()
        middle = len(whole) // 2
        victim.write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
        refused(f"{victim.name} was changed")
        victim.write_bytes(whole)
    (folder / "artifacts" / "more").write_text("x")
    refused("artifacts/more was added")
    (folder / "artifacts" / "more").unlink()
    some.rename(tmp_path / "taken")
    refused(f"{some.name} is missing")
    (tmp_path / "taken").rename(some)
    manifest = folder / store.MANIFEST
    text = manifest.read_text()
    manifest.write_text(text.replace(str(home / "mlartifacts"), "/tmp/else"))
    refused("its MANIFEST.json was changed")
    manifest.unlink()
    refused("is no whole backup")
    manifest.write_text(text)
    restore.put_back(folder, Settings(), replace=False)


def test_killed_in_the_middle_it_leaves_no_folder_that_looks_whole(home: Path, tmp_path: Path) -> None:
    for number in range(40):  # so that copying takes a while
        (home / "mlartifacts" / f"large-{number}").write_bytes(os.urandom(8_000_000))
    folder = tmp_path / "into" / "backup"
    environment = os.environ | {"LLAVA_PIPELINE_HOME": str(home)}
    process = subprocess.Popen([str(COMMAND), "backup", str(folder)], env=environment, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list(folder.parent.glob(".backup-writing-*/backup/artifacts/large-*")):
        assert process.poll() is None, "it has ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not folder.exists()
    (half,) = folder.parent.glob(".backup-writing-*/backup")
    with pytest.raises(BackupRefused, match="is no whole backup"):
        restore.put_back(half, Settings(), replace=True)
    assert facts(home)["aliases"]  # nothing was touched


def test_a_place_in_use_is_refused_before_anything_is_touched(home: Path, tmp_path: Path) -> None:
    folder = tmp_path / "backup"
    backup.make(folder, Settings())
    user = sqlite3.connect(home / "prefect" / "prefect.db")
    user.execute(COUNT)
    with pytest.raises(BackupRefused, match=rf"prefect\.db is in use by .* \(process {os.getpid()}\)"):
        restore.put_back(folder, Settings(), replace=True)
    user.close()
    assert not list(home.rglob("*.before-restore-*"))


def test_servers_that_answer_are_refused_and_addresses_of_dead_ones_are_not(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "backup"
    backup.make(folder, Settings())
    known = {"prefect": "http://127.0.0.1:9/api", "serving": None, "profile": "tiny", "registered_model": NAME}
    server = [sys.executable, "-u", "-m", "http.server", "0", "--bind", "127.0.0.1", "--directory", str(tmp_path)]
    (tmp_path / "health").write_text("OK")
    with subprocess.Popen(server, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        port = process.stdout.readline().split("port ")[1].split()[0]
        write_addresses(Addresses(mlflow=f"http://127.0.0.1:{port}", **known))
        with pytest.raises(BackupRefused, match="say `llava-pipeline down` first"):
            restore.put_back(folder, Settings(), replace=True)
        process.terminate()
    restore.put_back(folder, Settings(), replace=True)


def test_nothing_to_back_up_an_existing_folder_and_a_damaged_database_are_told(
    home: Path, tmp_path: Path, elsewhere: Callable[[], Path]
) -> None:
    with pytest.raises(BackupRefused, match="exists already"):
        backup.make(home, Settings())
    database = home / "prefect" / "prefect.db"
    database.write_bytes(b"no database at all" * 1000)
    with pytest.raises(BackupFailed, match=r"prefect\.db"):
        backup.make(tmp_path / "backup", Settings())
    assert not (tmp_path / "backup").exists()
    assert not list(tmp_path.glob(".backup-writing-*"))
    elsewhere()
    with pytest.raises(BackupRefused, match="nothing to back up"):
        backup.make(tmp_path / "backup", Settings())


def test_the_settings_file_goes_along_and_others_cannot_read_the_folder(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "work" / "mlflow.yml"
    file.write_text("tracking: {experiment: llava-pipeline}\n")
    monkeypatch.setenv(FILE_VARIABLE, str(file))
    manifest = backup.make(tmp_path / "backup", Settings())
    assert manifest.settings == str(file)
    assert (tmp_path / "backup" / "mlflow.yml").read_text() == file.read_text()
    assert (tmp_path / "backup").stat().st_mode & 0o077 == 0
