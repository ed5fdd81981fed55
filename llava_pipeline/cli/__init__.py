"""The command line, ``llava-pipeline``: plan, run, demo, validate, chat, runs; evaluate, gate; promote, rollback,
history, delete; export; serve, key; sweep; up, down, status, deploy, ship, mlflow-server, prefect-server,
worker; gc, doctor, backup, restore.

Nothing heavy is imported until a command needs it. Progress and messages go to stderr; with ``--json`` the last line
of stdout is one JSON document. Exit codes: 0 done, 1 something failed, 2 the request cannot be met as asked.
"""

from __future__ import annotations

# Each brings its commands.
from llava_pipeline.cli import care, evaluation, export, installation, registry, serve, sweep  # noqa: F401
from llava_pipeline.cli.app import main

__all__ = ["main"]
