"""The commands. Each checks what it was asked, calls one function of the library or the flow, and shows the result."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from llava_pipeline.cli import show
from llava_pipeline.errors import LlavaPipelineError

if TYPE_CHECKING:
    from llava_pipeline.spec import RunSpec

Stage = Literal["align", "instruct"]  # as in the spec, which is not loaded for a command that needs none

app = typer.Typer(
    name="llava-pipeline",
    help="Teach a frozen language model to see: the projector between a vision tower and a Llama is trained.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Profile = Annotated[str, typer.Option("--profile", "-p", help="A profile's name, or the path of a .yaml file.")]
Overrides = Annotated[list[str], typer.Option("--set", help="Change one value, as training.max_steps=20. Repeatable.")]
StageName = Annotated[Stage, typer.Option("--stage", help="align teaches the projector, instruct more than that.")]
From = Annotated[
    str | None, typer.Option("--from", help="Alias, version or run to go on from; instruct: champion unless told.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document as the last line of stdout.")]
YAML = (".yaml", ".yml")
DEBUG_VARIABLE = "LLAVA_PIPELINE_DEBUG"


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show stack traces and the libraries' own logs.")] = False,
) -> None:
    """Teach a frozen language model to see."""
    if debug:
        os.environ[DEBUG_VARIABLE] = "1"
    tell_on_stderr(debug)


@app.command()
def plan(
    profile: Profile = "pocket",
    overrides: Overrides = [],  # noqa: B006
    stage: StageName = "align",
    device: Annotated[
        list[str], typer.Option("--device", help="here, t4, l4, 3090, 4090, a100-40, a100-80, h100, h200. Repeatable.")
    ] = [],  # noqa: B006
    as_json: AsJson = False,
) -> None:
    """What a run will take: downloads, parameters, tokens, memory by part, time, price. Nothing is downloaded."""
    spec = read_spec(profile, overrides, stage)
    from llava_pipeline.model.plan import plan as make_plan
    from llava_pipeline.model.plan import usual_devices

    made = make_plan(spec, device or usual_devices(spec))
    show.document(made.model_dump(mode="json") | {"spec": spec.model_dump(mode="json")}) if as_json else show.plan(
        made, spec
    )


@app.command()
def run(
    profile: Profile = "pocket",
    overrides: Overrides = [],  # noqa: B006
    stage: StageName = "align",
    begin_with: From = None,
    refresh: Annotated[bool, typer.Option("--refresh", help="Reuse no earlier result.")] = False,
    as_json: AsJson = False,
) -> None:
    """Run the whole pipeline: fetch, assemble, validate, train, evaluate, record, gate."""
    row = run_flow(read_spec(profile, overrides, stage, begin_with), refresh)
    show.document(row) if as_json else show.result(row)


@app.command()
def demo(
    profile: Profile = "pocket",
    overrides: Overrides = [],  # noqa: B006
    folder: Annotated[Path, typer.Option("--folder", help="Where the pictures go.")] = Path("demo"),
    as_json: AsJson = False,
) -> None:
    """Run the pipeline and leave its pictures where you can look at them."""
    spec = read_spec(profile, overrides)
    row = run_flow(spec, refresh=False)
    pictures = save_pictures(row["run_id"], folder)
    if as_json:
        show.document(row | {"pictures": [str(path) for path in pictures]})
        return
    show.result(row)
    show.pages(pictures, spec, row["verdict"]["decision"])


@app.command()
def validate(
    source: Annotated[str, typer.Argument(help="scenes, easy-vqa, a file or folder, or owner/name[@revision].")],
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Rows to accept for training; all.")] = None,
    images: Annotated[str | None, typer.Option("--images", help="Folder that paths in the rows start from.")] = None,
    workers: Annotated[int, typer.Option("--workers", min=1, max=256, help="Processes that check rows.")] = 1,
    profile: Profile = "pocket",
    overrides: Overrides = [],  # noqa: B006
    report: Annotated[Path | None, typer.Option("--report", help="Where the HTML report goes.")] = None,
    as_json: AsJson = False,
) -> None:
    """Check a data set as a run would, without training: what is kept, what is refused and why, and its digest."""
    spec = read_spec(profile, overrides)
    from llava_pipeline.data.snapshot import refuse_if_too_many
    from llava_pipeline.stages.validate_source import validate_source

    data, page = validate_source(spec, source, images, limit, workers, report)
    show.document(data.model_dump(mode="json") | {"report": str(page)}) if as_json else show.validated(data, page)
    for snapshot in (data.train, data.held_out):
        refuse_if_too_many(snapshot, spec.data, at_end=True)


@app.command()
def chat(
    image: Annotated[Path, typer.Argument(help="A picture: PNG, JPEG, WebP, GIF or BMP.")],
    question: Annotated[str, typer.Argument(help="What to ask about it.")],
    profile: Profile = "pocket",
    which: Annotated[str, typer.Option("--run", help="Alias, version or run id of the projector.")] = "champion",
    max_new_tokens: Annotated[int, typer.Option(min=1, max=512, help="Longest answer.")] = 32,
    as_json: AsJson = False,
) -> None:
    """Ask a trained projector about a picture."""
    from llava_pipeline.stages.chat import answer_about
    from llava_pipeline.tracking.settings import load_settings

    told = answer_about(image, question, which, registered_model_of(profile), max_new_tokens, load_settings())
    show.document(told) if as_json else print(told["answer"])


@app.command()
def runs(
    profile: Annotated[str | None, typer.Option("--profile", "-p", help="Only runs of this profile.")] = None,
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, max=1000, help="How many, the newest first.")] = 10,
    as_json: AsJson = False,
) -> None:
    """The recorded runs, the newest first."""
    from llava_pipeline.tracking.listing import runs as list_runs
    from llava_pipeline.tracking.settings import load_settings

    rows = list_runs(load_settings(), profile, limit)
    show.document(rows) if as_json else show.runs(rows)


# --------------------------------------------------------------------------------------------- what commands share


def read_spec(profile: str, overrides: list[str], stage: Stage = "align", begin_with: str | None = None) -> RunSpec:
    """The validated spec. Pydantic takes half of the start-up time, so it is loaded when a command needs it."""
    from llava_pipeline.spec import load_spec

    return load_spec(profile, overrides, stage=stage, begin_with=begin_with)


def registered_model_of(profile: str) -> str:
    """Name of a profile's registered model; a file is read for it, a name needs none."""
    return read_spec(profile, []).registered_model if profile.endswith(YAML) else f"llava-projector-{profile}"


def who_am_i() -> str:
    """Who gives this command, and where: login@host."""
    import getpass
    import socket

    try:
        login = getpass.getuser()
    except (KeyError, OSError):  # a container may run under a number without a name
        login = f"uid {os.getuid()}"
    return f"{login}@{socket.gethostname()}"


def run_flow(spec: RunSpec, refresh: bool) -> dict[str, Any]:
    """Run the Prefect flow in this process, and give its run as the listing tells it, with the gate's verdict.

    Raises:
        TrackingError: MLflow cannot be reached; nothing has been started then.
        NoSuchRun: what it is to begin with is not there; likewise.
        SpecError: this machine is too small for it; nothing has been fetched then.
    """
    from flows.local import local_defaults
    from llava_pipeline.model.fit import refuse_too_small
    from llava_pipeline.tracking.client import check_reachable
    from llava_pipeline.tracking.listing import run as find_run
    from llava_pipeline.tracking.registry import resolve
    from llava_pipeline.tracking.settings import load_settings

    settings = load_settings()
    check_reachable(settings)
    if spec.begin_with is not None:
        resolve(spec.begin_with, spec.registered_model, settings)
    refuse_too_small(spec)
    local_defaults(debug=debugging())
    if refresh:
        os.environ["PREFECT_TASKS_REFRESH_CACHE"] = "true"
    logging.getLogger("llava_pipeline").info("starting Prefect (the first time takes half a minute) ...")
    from flows.train import train

    verdict = train(spec)
    return find_run(settings, verdict.run_id) | {"verdict": verdict.model_dump(mode="json")}


def save_pictures(run_id: str, folder: Path) -> list[Path]:
    """Copy a run's pictures from MLflow into a folder."""
    from llava_pipeline.tracking.registry import download_files
    from llava_pipeline.tracking.settings import load_settings

    names = tuple(f"evaluation/{name}.png" for name in ("grid", "grounding", "loss", "example"))
    return download_files(run_id, names, folder, load_settings())


def debugging() -> bool:
    """Whether ``--debug`` was given."""
    return bool(os.environ.get(DEBUG_VARIABLE))


def tell_on_stderr(debug: bool) -> None:
    """Our own messages to stderr, one line each; the libraries' warnings only when debugging."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger = logging.getLogger("llava_pipeline")
    logger.handlers[:] = [handler]
    logger.setLevel(logging.DEBUG if debug else logging.INFO)
    logger.propagate = False
    if not debug:
        warnings.simplefilter("ignore")


def main() -> None:
    """Entry point. A person's mistake ends with one sentence and exit code 2, a failure with 1."""
    try:
        sys.exit(app(standalone_mode=False))
    except typer.exceptions.TyperException as error:
        format_message = getattr(error, "format_message", error.__str__)  # usage errors name their option in it
        print(f"error: {format_message()}", file=sys.stderr)
        sys.exit(2)
    except (KeyboardInterrupt, typer.Abort):
        print("stopped", file=sys.stderr)
        sys.exit(130)
    except LlavaPipelineError as error:
        sys.exit(report(str(error), error, error.exit_code))
    except Exception as error:
        text = " ".join(str(error).split())[:500]
        told = (
            f"unexpected {type(error).__name__}: {text}; run again as `llava-pipeline --debug ...` for the stack trace"
        )
        sys.exit(report(told, error, 1))


def report(message: str, error: BaseException, exit_code: int) -> int:
    """One sentence on stderr, after the stack trace where one was asked for."""
    if debugging():
        import traceback

        traceback.print_exception(error)
    print(f"error: {message}", file=sys.stderr)
    return exit_code


__all__ = ["app", "main"]
