"""A recorded version as other engines read it: a checkpoint for transformers, vLLM and MLX-VLM, or two GGUF files."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from llava_pipeline.contracts import Evaluation
from llava_pipeline.data.snapshot import open_rows
from llava_pipeline.errors import ExportDiffers, ExportRefused
from llava_pipeline.export import card as cards
from llava_pipeline.export.card import Facts
from llava_pipeline.export.folder import beside, finish, put_aside, refuse_if_taken, write_json
from llava_pipeline.export.gguf_text import Quantize, write_text
from llava_pipeline.export.huggingface import write_checkpoint
from llava_pipeline.export.mmproj import refuse_what_llama_cpp_lacks, write_mmproj
from llava_pipeline.export.verify import BOUNDS, Check, Question, To, expect, refuse_if_missing, verify
from llava_pipeline.model import adapter, projector
from llava_pipeline.model.assemble import Llava, State, assemble, describe
from llava_pipeline.spec import Frozen, RunSpec
from llava_pipeline.stages.fetch import fetch_backbones
from llava_pipeline.stages.recorded import own_held_out
from llava_pipeline.tracking import registry
from llava_pipeline.tracking.card import headline
from llava_pipeline.tracking.settings import Settings

log = logging.getLogger(__name__)
VERIFICATION = "verification.json"


class Exported(Frozen):
    """What lies in a folder now."""

    name: str
    run_id: str
    folder: str
    to: To
    quantize: Quantize | None  # None for a checkpoint
    num_bytes: int
    files: tuple[str, ...]
    verified: bool
    checks: tuple[Check, ...]
    problem: str = ""  # why it is not verified, though it was asked; empty where it was not asked


def export_recorded(
    which: str, registered_model: str, to: To, folder: Path, quantize: Quantize, num_prompts: int, checked: bool,
    settings: Settings, vllm: Path | None = None,
) -> Exported:  # fmt: skip
    """Export a run, version or alias, and ask the engine it is for beside the model here, and vLLM if its Python is
    named.

    What differs is kept as ``<folder>.unverified``; only what is verified, or was not to be checked, gets the name.

    Raises:
        ExportRefused: the folder is taken, or the engine is missing or does not have such parts.
        NoSuchRun: there is no such run, version or alias.
        TrackingError: MLflow cannot be reached, or refuses.
    """
    refuse_if_taken(folder)
    if checked:
        refuse_if_missing(to, vllm)
    run_id = registry.resolve(which, registered_model, settings)
    spec = registry.recorded_spec(run_id, None, settings)
    evaluation = registry.recorded_evaluation(run_id, settings)
    llava, facts = trained(run_id, registered_model, spec, evaluation, settings)
    questions = held_out_questions(evaluation, spec, num_prompts) if checked else []
    return export(llava, facts, to, folder, quantize, questions, vllm)


def export(
    llava: Llava, facts: Facts, to: To, folder: Path, quantize: Quantize, questions: Sequence[Question],
    vllm: Path | None = None,
) -> Exported:  # fmt: skip
    """Write a model and check it with these questions, in vLLM too if its Python is named; without any question it is
    not checked.

    Raises:
        ExportRefused: the folder is taken, or the engine does not have such parts.
    """
    with beside(folder) as temporary:
        log.info("writing %s ...", folder)
        write(temporary, llava, facts, to, quantize)
        checks: list[Check] = []
        if questions:
            log.info("asking %d questions here and there ...", len(questions))
            bound = BOUNDS["hf" if to == "hf" else quantize]
            checks = verify(temporary, to, bound, llava, questions, expect(llava, questions), vllm)
        write_json(temporary / VERIFICATION, [check.model_dump(mode="json") for check in checks])
        (temporary / "LICENSES.md").write_text(cards.licences(facts), encoding="utf-8")
        (temporary / "README.md").write_text(cards.card(facts, to, checks), encoding="utf-8")
        failed = next((check for check in checks if check.judged and not check.passed), None)
        final = finish(temporary, folder) if failed is None else put_aside(temporary, folder)
    files = sorted(path.name for path in final.iterdir())
    return Exported(
        name=facts.name, run_id=facts.run_id, folder=str(final), to=to, quantize=None if to == "hf" else quantize,
        num_bytes=sum((final / name).stat().st_size for name in files), files=tuple(files),
        verified=bool(checks) and failed is None, checks=tuple(checks),
        problem="" if failed is None else f"{failed.engine} {failed.version}: {failed.first_difference}",
    )  # fmt: skip


def refuse_unverified(exported: Exported) -> None:
    """Raises ExportDiffers where an engine that was asked answered otherwise."""
    if exported.problem:
        raise ExportDiffers(
            f"the export differs from the model here ({exported.problem}); it is kept as {exported.folder} for you to "
            "look at, and another version of the engine may agree"
        )


def write(folder: Path, llava: Llava, facts: Facts, to: To, quantize: Quantize) -> None:
    """The weights and all that an engine needs besides."""
    if to == "hf":
        write_checkpoint(folder, llava)
        return
    refuse_what_llama_cpp_lacks(llava)
    write_text(folder / f"{facts.name}-{quantize}.gguf", llava, facts.name, facts.licence, quantize)
    write_mmproj(folder / f"mmproj-{facts.name}-f16.gguf", llava, facts.name, facts.licence)


def trained(
    run_id: str, registered_model: str, spec: RunSpec, evaluation: Evaluation, settings: Settings
) -> tuple[Llava, Facts]:
    """The live model of a run in float32 on the CPU, an adapter folded into its weights, and what is told of it."""
    backbones = fetch_backbones(spec.backbones)
    llava = assemble(backbones, spec.model)
    state = projector.load(registry.download_projector(run_id, None, settings), describe(llava, backbones, spec.model))
    put_plain(llava, state)
    facts = Facts(
        name=registered_model, title=spec.title, run_id=run_id, profile=spec.profile, headline=headline(evaluation),
        data=evaluation.projector.data.origin, parts=backbones,
    )  # fmt: skip
    return llava, facts


def put_plain(llava: Llava, state: State) -> None:
    """Make a model what was trained, in plain weights: an adapter is folded into them."""
    projector.put(llava.model, state)
    if any(name.startswith(adapter.PREFIX) for name in state):
        adapter.merge(llava.model.model.language_model)


def held_out_questions(evaluation: Evaluation, spec: RunSpec, count: int) -> list[Question]:
    """The first questions of a run's held-out set.

    Raises:
        TrackingError: its source holds other rows now.
        ExportRefused: none of them has a picture.
    """
    rows = open_rows(own_held_out(evaluation.held_out, evaluation.projector.model, spec).rows)
    asked = [k for k in range(len(rows)) if rows.image[k] >= 0][:count]
    if not asked:
        raise ExportRefused("no held-out question has a picture to check with; export unchecked with --no-verify")
    return [Question(rows.questions[k][0].removeprefix("\n"), rows.picture(rows.image[k])) for k in asked]
