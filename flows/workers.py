"""Who checks the pieces of a stream: a Prefect task each, run by the threads, processes or cluster that the spec names.

They belong to a flow run of their own, ``validate-pieces``, below the stage: the story's graph keeps one node a stage,
however many pieces there are, and Prefect starts and stops the workers with that flow run.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import prefect
from prefect.cache_policies import NO_CACHE
from prefect.context import FlowRunContext
from prefect.runtime import task_run
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.task_runners import ProcessPoolTaskRunner, TaskRunner, ThreadPoolTaskRunner
from prefect.tasks import exponential_backoff

from flows.retries import will_pass
from llava_pipeline.contracts import AssembledModel, CheckedPiece, Piece, ValidatedData
from llava_pipeline.errors import MissingArtifact, SpecError, WorkerDied
from llava_pipeline.spec import DataSpec, Split, WorkersSpec

AnyRunner = TaskRunner[Any]


def task_runner(spec: WorkersSpec) -> AnyRunner:
    """Prefect's task runner for a spec; a cluster's library is imported only here.

    Raises:
        SpecError: the extra that brings the cluster's library is not installed, or a cluster's address is given to
            workers of this machine.
    """
    if spec.address is not None and spec.kind in ("threads", "processes"):
        raise SpecError(
            f"data.workers.address={spec.address} names a cluster, but data.workers.kind={spec.kind} are of this "
            "machine; set the kind to dask or ray, or leave the address out"
        )
    if spec.kind == "threads":
        return ThreadPoolTaskRunner(max_workers=spec.num)
    if spec.kind == "processes":
        return ProcessPoolTaskRunner(max_workers=spec.num)
    try:
        return dask_runner(spec) if spec.kind == "dask" else ray_runner(spec)
    except ImportError as error:
        raise SpecError(
            f"data.workers.kind={spec.kind} needs a package that is not installed ({error.name or error}); "
            f"pip install 'llava-pipeline[{spec.kind}]'"
        ) from error


def dask_runner(spec: WorkersSpec) -> AnyRunner:
    """The cluster at the spec's address, or one of this machine: ``num`` processes of one thread."""
    from prefect_dask.task_runners import DaskTaskRunner

    logging.getLogger("distributed").setLevel(logging.ERROR)  # a cluster of ours tells every coming and going
    if spec.address is not None:
        return DaskTaskRunner(address=spec.address)
    cluster = {
        "n_workers": spec.num,
        "threads_per_worker": 1,
        "dashboard_address": "127.0.0.1:0",  # not Dask's one port for everybody, open to the network
        # Dask would run a dead worker's piece again; as a task run of Prefect 3.8 it then closes the next worker too,
        # and in the end the run waits for ever.
        "scheduler_kwargs": {"allowed_failures": 0},
    }
    return DaskTaskRunner(cluster_kwargs=cluster)


def ray_runner(spec: WorkersSpec) -> AnyRunner:
    """The cluster at the spec's address, or one of this machine with ``num`` cores."""
    from prefect_ray.task_runners import RayTaskRunner

    here = {"num_cpus": spec.num, "include_dashboard": False}
    runner: AnyRunner = RayTaskRunner(address=spec.address, init_kwargs=here if spec.address is None else {})
    return runner


def piece_name() -> str:
    """``test scenes 0-511``: the name of a task run, from what it is given."""
    piece: Piece = task_run.parameters["piece"]
    last = "end" if piece.stop is None else piece.stop - 1
    return f"{task_run.parameters['split']} {piece.name} {piece.start}-{last}"


@prefect.task(
    name="check-piece",
    task_run_name=piece_name,
    retries=2,
    retry_delay_seconds=exponential_backoff(1),
    retry_jitter_factor=0.5,
    retry_condition_fn=will_pass,
    cache_policy=NO_CACHE,
    persist_result=False,
    tags=["llava-pipeline"],
)
def check_piece(model: AssembledModel, spec: DataSpec, split: Split, piece: Piece) -> CheckedPiece:
    """One piece, in whatever thread, process or machine this is.

    Raises:
        SpecError: this worker does not see the run's store.
    """
    from llava_pipeline.stages import validate
    from llava_pipeline.store import home

    try:
        return validate.check_piece(model, spec, split, piece)
    except MissingArtifact as error:
        if spec.workers.kind not in ("dask", "ray"):
            raise
        raise SpecError(
            f"the worker on {socket.gethostname()} does not see the store of this run at {home()}; point "
            "LLAVA_PIPELINE_HOME of the run and of every worker at one shared folder"
        ) from error


@prefect.flow(
    name="validate-pieces",
    flow_run_name="{spec.source.kind} by {spec.workers.num} {spec.workers.kind}",
    persist_result=False,
    validate_parameters=False,
)
def validate_pieces(model: AssembledModel, spec: DataSpec, num_held_out: int) -> ValidatedData:
    """The stage's work with every piece a task run; the task runner is put in by ``validate_with_workers``."""
    from llava_pipeline.stages import validate
    from llava_pipeline.stages.last_place import where_the_last_run_stopped

    return validate.validate_stream(model, spec, num_held_out, where_the_last_run_stopped, check_piece.submit)


def validate_with_workers(model: AssembledModel, spec: DataSpec, num_held_out: int) -> ValidatedData:
    """Both snapshots, checked by the spec's workers; the same ones whoever checks.

    Raises:
        SpecError: see ``task_runner``.
        WorkerDied: a worker was killed.
        Whatever ``validate_stream`` raises.
    """
    checked = validate_pieces.with_options(task_runner=task_runner(spec.workers))
    try:
        with one_server_for_all():
            return checked(model, spec, num_held_out)
    except Exception as error:
        if type(error).__name__ != "KilledWorker":  # Dask's, and Dask may not be installed
            raise
        raise WorkerDied(
            "a worker of the Dask cluster was killed while it checked a piece, perhaps for its memory; run again (what "
            "is checked is kept), with fewer workers if it happens again"
        ) from error


@contextmanager
def one_server_for_all() -> Iterator[None]:
    """Tell workers the address of the server that Prefect started for this run, where the settings name none.

    Without it every worker process starts a server of its own, all on one SQLite file.
    """
    context = FlowRunContext.get()
    if PREFECT_API_URL.value() or context is None:
        yield
        return
    with temporary_settings({PREFECT_API_URL: str(context.client.api_url)}):
        yield
