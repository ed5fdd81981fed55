"""A real PostgreSQL of the distribution's packages: a cluster of its own in a temporary folder, dropped at the end."""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROLE, PASSWORD = "llava", "s3cret-not:simple"
QUOTED = "s3cret-not%3Asimple"  # as it stands in an address
OWNER = "postgres"


def free_port() -> int:
    """A port of loopback that nothing listens on now."""
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return int(opened.getsockname()[1])


def missing() -> str | None:
    """Why no cluster can be made here, or None. Whoever is not root needs sudo without a password."""
    if shutil.which("pg_createcluster") is None:
        return "PostgreSQL is not installed: bash deploy/test_services.sh"
    if os.getuid() and (shutil.which("sudo") is None or subprocess.run(["sudo", "-n", "true"]).returncode):
        return "clusters are made by root, and sudo asks for a password"
    return None


class Cluster:
    """A cluster that runs on a port of loopback."""

    def __init__(self, version: str, name: str, port: int) -> None:
        self.version, self.name, self.port = version, name, port

    def control(self, action: str) -> None:
        """Start, stop or restart it as an administrator does."""
        _as_root("pg_ctlcluster", self.version, self.name, action, *(("-m", "fast") if action != "start" else ()))

    def database(self, name: str) -> None:
        """Make an empty database that the role owns."""
        self.query(f'CREATE DATABASE "{name}" OWNER {ROLE}', "postgres")

    def query(self, statement: str, database: str) -> str:
        """What a database answers its superuser."""
        psql = (
            "psql",
            "-X",
            "-A",
            "-t",
            "-p",
            str(self.port),
            "-h",
            "/var/run/postgresql",
            "-d",
            database,
            "-c",
            statement,
        )
        return _as_owner(*psql).strip()

    def url(self, database: str, driver: str = "") -> str:
        """The SQLAlchemy address of a database; ``driver`` as in ``+asyncpg``."""
        return f"postgresql{driver}://{ROLE}:{QUOTED}@127.0.0.1:{self.port}/{database}"


@contextmanager
def cluster(*databases: str) -> Iterator[Cluster]:
    """A running cluster with these databases, in a folder that PostgreSQL's own user can reach."""
    version = max((path.parent.parent.name for path in Path("/usr/lib/postgresql").glob("*/bin/postgres")), key=float)
    folder = Path(tempfile.mkdtemp(prefix="llava-pipeline-postgres-"))
    folder.chmod(0o755)
    made = Cluster(version, f"test{os.getpid()}x{folder.name[-6:].replace('_', 'u')}", free_port())
    try:
        _as_root(
            *("pg_createcluster", version, made.name, "--port", str(made.port), "--datadir", str(folder / "data")),
            *("--logfile", str(folder / "log"), "--user", OWNER, "--", "--no-sync"),
        )  # fmt: skip
        made.control("start")
        made.query(f"CREATE ROLE {ROLE} LOGIN PASSWORD '{PASSWORD}'", "postgres")
        for name in databases:
            made.database(name)
        yield made
    finally:
        _as_root("pg_dropcluster", "--stop", version, made.name, check=False)
        shutil.rmtree(folder, ignore_errors=True)


def _as_root(*command: str, check: bool = True) -> str:
    return _said(("sudo", "-n", *command) if os.getuid() else command, check)


def _as_owner(*command: str) -> str:
    """As PostgreSQL's own user, in a folder that it can enter."""
    account = pwd.getpwnam(OWNER)
    if os.getuid():
        return _said(("sudo", "-n", "-u", OWNER, *command), True)
    done = subprocess.run(
        command, capture_output=True, text=True, cwd="/", user=account.pw_uid, group=account.pw_gid, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def _said(command: tuple[str, ...], check: bool) -> str:
    done = subprocess.run(command, capture_output=True, text=True, cwd="/", timeout=120)
    assert not check or done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
    return done.stdout
