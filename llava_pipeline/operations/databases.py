"""The databases of MLflow and Prefect: where they are, a copy of one while its server runs, and the way back.

SQLite is copied through its own online backup, PostgreSQL through ``pg_dump`` and ``pg_restore``. A password is given
to those in their environment: everybody on a machine can read a command line.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Literal
from urllib.parse import parse_qsl, unquote, urlsplit

import psutil

from llava_pipeline import store
from llava_pipeline.errors import BackupFailed, BackupRefused
from llava_pipeline.operations import services
from llava_pipeline.spec import Frozen
from llava_pipeline.tracking.settings import DATABASE_VARIABLE, Settings, is_server

PREFECT_VARIABLE = services.DATABASE_VARIABLE
SECONDS_FOR_A_LOCK = 60.0
UPDATE = (
    "UPDATE {0} SET {1} = {new} || substr({1}, length({old}) + 1) "
    "WHERE {1} = {old} OR substr({1}, 1, length({old}) + 1) = {old} || '/'"
)
BESIDES = ("-wal", "-shm", "-journal")  # what SQLite keeps beside a database


class Database(Frozen):
    """One database by its SQLAlchemy address."""

    name: Literal["mlflow", "prefect", "mlflow-people"]
    url: str

    @property
    def kind(self) -> Literal["sqlite", "postgresql"]:
        """Which of the two that can be backed up.

        Raises:
            BackupRefused: another one.
        """
        scheme = urlsplit(self.url).scheme.split("+")[0]
        if scheme == "sqlite":
            return "sqlite"
        if scheme in ("postgresql", "postgres"):
            return "postgresql"
        raise BackupRefused(
            f"{self.name}'s database is {scheme or 'of no known kind'}; sqlite and postgresql can be backed up here, "
            "use that database's own tools"
        )

    @property
    def path(self) -> Path:
        """The file of an SQLite database."""
        return Path(unquote(self.url.partition(":///")[2].partition("?")[0])).absolute()

    @property
    def file(self) -> str:
        """Its name in a backup."""
        return f"{self.name}.db" if self.kind == "sqlite" else f"{self.name}.dump"

    @property
    def place(self) -> str:
        """Where it is, for people: without a password."""
        if self.kind == "sqlite":
            return str(self.path)
        parts = urlsplit(self.url)
        return f"postgresql://{parts.hostname or 'localhost'}{f':{parts.port}' if parts.port else ''}{parts.path}"


def mlflow_database(settings: Settings) -> Database:
    """Of the tracking server, or the one that runs are recorded in without a server."""
    own = None if is_server(settings.tracking.uri or "http://") else settings.tracking.uri
    url = os.environ.get(DATABASE_VARIABLE) or settings.server.backend_store_uri or own
    return Database(name="mlflow", url=url or f"sqlite:///{store.home() / 'mlflow.db'}")


def prefect_database(settings: Settings) -> Database:
    """Of the server that schedules."""
    url = os.environ.get(PREFECT_VARIABLE) or settings.prefect.database_url
    return Database(name="prefect", url=url or f"sqlite:///{store.home() / 'prefect' / 'prefect.db'}")


def people_database() -> Database:
    """Of MLflow's logins, where ``server.auth`` has asked for them."""
    return Database(name="mlflow-people", url=f"sqlite:///{services.people_file()}")


def is_empty(database: Database) -> bool:
    """Whether it does not exist, or has no table."""
    if database.kind == "sqlite":
        if not database.path.exists():
            return True
        with contextlib.closing(_open(database.path)) as opened:
            try:
                return int(opened.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]) == 0
            except sqlite3.DatabaseError:  # damaged, so something is there
                return False
    return _ask(database, "SELECT count(*) FROM pg_tables WHERE schemaname = 'public'") == "0"


def users_of(database: Database) -> str | None:
    """Who has it open, in words; None where nobody does."""
    if database.kind == "sqlite":
        return _processes_with(database.path) if database.path.exists() else None
    others = _ask(
        database,
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
        " AND backend_type = 'client backend'",
    )
    return None if others == "0" else f"{others} connections"


def dump(database: Database, folder: Path) -> None:
    """Copy a database into a folder, as it is at one moment; its server may be running.

    Raises:
        BackupFailed: it cannot be read, or the copy is not whole.
    """
    target = folder / database.file
    if database.kind == "sqlite":
        _copy_sqlite(database.path, target)
        return
    tables = ["--format=custom", "--no-owner", "--no-privileges", f"--file={target}"]
    _run(database, ["pg_dump", *tables])


def load(database: Database, folder: Path) -> None:
    """Put a copy where nothing is.

    Raises:
        BackupFailed: it cannot be written.
    """
    source = folder / database.file
    if database.kind == "sqlite":
        database.path.parent.mkdir(parents=True, exist_ok=True)
        new = database.path.with_name(f".writing-{database.path.name}")
        shutil.copyfile(source, new)
        new.replace(database.path)
        return
    whole = ["--no-owner", "--no-privileges", "--exit-on-error", "--single-transaction"]
    _run(database, ["pg_restore", *whole, f"--dbname={_name(database)}", str(source)])


def put_aside(database: Database, suffix: str) -> str:
    """Make room: an SQLite file is renamed, a PostgreSQL database dumped to the home and emptied; gives the place."""
    if database.kind == "sqlite":
        aside = database.path.with_name(database.path.name + suffix)
        for ending in BESIDES:
            with contextlib.suppress(FileNotFoundError):
                Path(f"{database.path}{ending}").replace(f"{aside}{ending}")
        database.path.replace(aside)
        return str(aside)
    folder = store.home() / f"{database.name}.dump{suffix}"
    folder.mkdir(parents=True)
    dump(database, folder)
    _ask(database, "DROP SCHEMA public CASCADE; CREATE SCHEMA public")
    return str(folder / database.file)


def move_paths(database: Database, columns: Sequence[tuple[str, str]], old: str, new: str) -> None:
    """In these tables' columns, let what lies in one folder lie in another one."""
    if database.kind == "sqlite":
        with contextlib.closing(_open(database.path)) as opened, opened:
            for table, column in columns:
                opened.execute(UPDATE.format(table, column, old=":old", new=":new"), {"old": old, "new": new})
        return
    updates = [UPDATE.format(table, column, old=":'old'", new=":'new'") for table, column in columns]
    _ask(database, "BEGIN; " + "; ".join(updates) + "; COMMIT;", old=old, new=new)


def _open(path: Path) -> sqlite3.Connection:
    return sqlite3.connect(f"{path.as_uri()}?mode=rw", uri=True, timeout=SECONDS_FOR_A_LOCK)


def _copy_sqlite(path: Path, target: Path) -> None:
    try:
        with contextlib.closing(_open(path)) as source, contextlib.closing(sqlite3.connect(target)) as copy:
            source.backup(copy)
            copy.execute("PRAGMA journal_mode=DELETE")  # one file, without a log beside it
            told = copy.execute("PRAGMA integrity_check").fetchone()[0]
    except sqlite3.Error as error:
        raise BackupFailed(
            f"cannot copy {path} ({error}); see whether it is an SQLite database that is whole"
        ) from error
    if told != "ok":
        raise BackupFailed(f"{path} is damaged ({str(told)[:200]}); restore it from an earlier backup")


def _processes_with(path: Path) -> str | None:
    """Processes that have a file open, as far as this user may see."""
    wanted, found = {str(path), *(f"{path}{ending}" for ending in BESIDES)}, []
    for process in psutil.process_iter(["pid", "name"]):
        with contextlib.suppress(psutil.Error):
            if any(one.path in wanted for one in process.open_files()):
                found.append(f"{process.info['name']} (process {process.info['pid']})")
    return ", ".join(found) or None


def _name(database: Database) -> str:
    return unquote(urlsplit(database.url).path.lstrip("/"))


def _environment(database: Database) -> dict[str, str]:
    """An address as libpq's programs take it."""
    parts = urlsplit(database.url)
    more = dict(parse_qsl(parts.query))
    known = {
        "PGHOST": more.get("host") or parts.hostname, "PGPORT": str(parts.port or more.get("port") or ""),
        "PGUSER": unquote(parts.username or ""), "PGPASSWORD": unquote(parts.password or ""),
        "PGDATABASE": _name(database), "PGSSLMODE": more.get("sslmode") or more.get("ssl"), "PGCONNECT_TIMEOUT": "15",
    }  # fmt: skip
    return {name: value for name, value in known.items() if value}


def _ask(database: Database, statements: str, **variables: str) -> str:
    """What a database answers."""
    given = [part for name, value in variables.items() for part in ("--set", f"{name}={value}")]
    command = ["psql", "--no-psqlrc", "--no-align", "--tuples-only", "--quiet", "--set", "ON_ERROR_STOP=1"]
    return _run(database, [*command, *given, "--file=-"], statements).strip()


def _run(database: Database, command: list[str], given: str = "") -> str:
    """Run one of PostgreSQL's programs.

    Raises:
        BackupFailed: it is not installed, or fails.
    """
    try:
        done = subprocess.run(
            command, input=given, capture_output=True, text=True, env=os.environ | _environment(database)
        )
    except FileNotFoundError as error:
        raise BackupFailed(
            f"{command[0]} is not installed; install PostgreSQL's client programs (postgresql-client) of the server's "
            "version or a later one"
        ) from error
    if done.returncode != 0:
        said = " ".join(done.stderr.split())[-400:]
        raise BackupFailed(f"{command[0]} failed on {database.place}: {said}")
    return done.stdout
