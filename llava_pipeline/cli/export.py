"""``llava-pipeline export``: a version in the files that other engines read."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llava_pipeline.cli import show
from llava_pipeline.cli.app import AsJson, Profile, app, registered_model_of

if TYPE_CHECKING:
    from llava_pipeline.stages.export import Exported


class To(StrEnum):
    """Layouts."""

    HF = "hf"
    GGUF = "gguf"


class Quantize(StrEnum):
    """Of a GGUF's language model."""

    F16 = "f16"
    Q8_0 = "q8_0"


@app.command()
def export(
    which: Annotated[str, typer.Argument(help="Alias, version or run id of the projector.")],
    folder: Annotated[Path, typer.Argument(help="Where it goes; a new folder, or an empty one.")],
    to: Annotated[To, typer.Option("--to", help="hf: transformers, vLLM, MLX-VLM; gguf: llama.cpp.")] = To.HF,
    quantize: Annotated[Quantize, typer.Option("--quantize", help="Of a GGUF's language model.")] = Quantize.F16,
    prompts: Annotated[int, typer.Option("--prompts", min=1, help="Held-out questions to check with.")] = 100,
    checked: Annotated[bool, typer.Option("--verify/--no-verify", help="Ask the engine it is for.")] = True,
    vllm: Annotated[
        Path | None, typer.Option("--vllm", help="Ask vLLM too: the Python of the environment it is installed in.")
    ] = None,
    profile: Profile = "pocket",
    as_json: AsJson = False,
) -> None:
    """Write a version as other engines read it, and check that they answer as it does here."""
    from llava_pipeline.errors import SpecError
    from llava_pipeline.stages.export import export_recorded, refuse_unverified
    from llava_pipeline.tracking.settings import load_settings

    if to == To.HF and quantize != Quantize.F16:
        raise SpecError(f"--quantize {quantize} is for --to gguf; leave it out, or export to gguf")
    if vllm is not None and (to != To.HF or not checked):
        raise SpecError("--vllm asks vLLM about what --to hf writes; leave it out, or else --to gguf and --no-verify")
    done = export_recorded(
        which, registered_model_of(profile), to.value, folder.absolute(), quantize.value, prompts, checked,
        load_settings(), None if vllm is None else vllm.absolute(),
    )  # fmt: skip
    show.document(done.model_dump(mode="json")) if as_json else told(done)
    refuse_unverified(done)


def told(done: Exported) -> None:
    """Who was asked, and by how much it differs."""
    from rich.console import Console

    console = Console()
    if done.checks:
        made = show.table("engine", "pictures", "same ids", "same first", "first", "top five", "pixel", "")
        for check in done.checks:
            outcome = "pass" if check.passed else "[bold red]FAIL[/]"
            made.add_row(
                check.engine, check.pictures.replace("at the tower's size", "tower's size"),
                f"{check.num_same_ids}/{check.num_prompts}", f"{check.num_same_first}/{check.num_prompts}",
                f"{check.largest_first:.4f}", f"{check.largest_top:.4f}",
                "-" if check.largest_pixel is None else f"{check.largest_pixel:.1f}",
                outcome if check.judged else "told only",
            )  # fmt: skip
        console.print(made)
        asked = " and ".join(dict.fromkeys(f"{check.engine} {check.version}" for check in done.checks))
        console.print(
            f"{asked} beside the model here in float32: prompts with the same token ids and the same first token;\n"
            f"largest difference of a log-probability, of which {done.checks[0].bound} nats are allowed, and of a "
            "pixel in grey levels.", highlight=False,
        )  # fmt: skip
    state = "verified" if done.verified else "NOT verified"
    console.print(f"{done.folder}: {done.num_bytes / 1e6:,.1f} MB, {state}.", highlight=False, soft_wrap=True)
