"""The seed's recipe as literally as today's libraries allow: the baseline of the training benchmark.

    pip install accelerate  # the Trainer needs it, this project does not
    python -m benchmarks.seed_recipe --shapes quick --arm literal --steps 3 --json

Arms: "literal" is the article's; "tuned" lets two worker processes decode and tokenise ahead, which costs one line;
"amp" is bfloat16 autocast, which the article does not have and a CPU can do. Each arm takes a process of its own. All
start from the same projector and see the same samples in the same steps of eight.

What today's libraries (transformers 5.23, accelerate 1.15) change, and nothing else is changed:

* ``LlavaProcessor(texts, images)`` is called by keyword: the two have swapped places. ``warmup_ratio=0.05`` is now
  ``warmup_steps=0.05``.
* ``fp16=True`` needs a GPU. On a CPU accelerate 1.15 ignores it without a word (it makes a scaler and an autocast only
  where ``device.type != "cpu"``) and trains in float32, so on a CPU the literal arm asks for float32.
* The Trainer turns off ``use_cache`` and hands the number of labelled tokens of all four micro-batches to the loss: it
  is their mean over the step, where the seed's day had a mean of means.
* The article streams and shuffles nothing; here a sampler gives the order, so that arms can share it.

The article's accidents are kept: every token but padding is labelled (``workload.tokens``), Trainer's clipping of the
gradient at norm 1, the tower run at every step, pictures decoded and resized by the main process. The learning rate
runs through its whole schedule in ``steps``, as it does in the article in 350.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch.utils.data import Dataset, Sampler
from transformers import (
    LlavaForConditionalGeneration,
    LlavaProcessor,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    TrainerCallback,
)
from transformers.trainer_callback import PrinterCallback

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.__main__ import machine
from benchmarks.workload import (
    Labels,
    Sample,
    Shapes,
    Work,
    conversations,
    decoded,
    facts,
    reset_projector,
    tokens,
    workload,
)
from llava_pipeline.model.freeze import PROJECTOR
from llava_pipeline.model.processor import IGNORE_INDEX

Arm = Literal["literal", "tuned", "amp"]
State = dict[str, torch.Tensor]
Batch = dict[str, torch.Tensor]

BATCH, ACCUMULATION = 2, 4
STEP = BATCH * ACCUMULATION


@dataclass(frozen=True)
class SeedResult:
    """What one training showed. Losses are token means over the eight samples of a step."""

    arm: Arm
    labels: Labels
    device: str
    losses: list[float]
    step_seconds: list[float]  # from the end of the step before, so with its data; the first also starts workers
    seconds: float  # the whole of ``trainer.train()``
    waiting_share: float  # of these seconds, spent in asking the loader for batches
    real_tokens: int
    padded_tokens: int  # real ones and padding
    labelled_tokens: int  # that the loss is taken over
    skipped_steps: int  # by the loss scale, where there is one
    start_bytes: int  # before training: on a CPU resident, on a GPU allocated
    peak_bytes: int | None  # while training; None where the CPU's mark cannot be reset
    projector: State

    @property
    def samples_per_second(self) -> float:
        """Over all of the training."""
        return len(self.losses) * STEP / self.seconds


# --------------------------------------------------------------------------------------------- the article's code


class Pictures(Dataset[dict[str, Any]]):
    """Rows as ``datasets`` gives them: the picture is decoded when the row is asked for."""

    def __init__(self, samples: list[Sample]) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, number: int) -> dict[str, Any]:
        sample = self.samples[number]
        return {"messages": sample.messages, "images": [decoded(sample)]}


def get_data_collator(processor: LlavaProcessor, ignore_index: int) -> Callable[[list[dict[str, Any]]], Any]:
    """The article's collator."""

    def collate_examples(examples: list[dict[str, Any]]) -> Any:
        texts = []
        images = []
        for example in examples:
            messages = example["messages"]
            text = processor.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=False)
            texts.append(text)
            images.append(example["images"][0])
        batch = processor(text=texts, images=images, return_tensors="pt", padding=True)
        labels = batch["input_ids"].clone()
        if processor.tokenizer.pad_token_id is not None:
            labels[labels == processor.tokenizer.pad_token_id] = ignore_index
        batch["labels"] = labels
        return batch

    return collate_examples


def precision(arm: Arm) -> torch.dtype:
    """What matrices are multiplied in; the weights are float32 throughout."""
    if arm == "amp":
        return torch.bfloat16
    return torch.float16 if torch.cuda.is_available() else torch.float32


def arguments(arm: Arm, steps: int, folder: str) -> Seq2SeqTrainingArguments:
    """The article's arguments, and what the arm changes."""
    cuda = torch.cuda.is_available()
    workers = {
        "dataloader_num_workers": 2, "dataloader_pin_memory": cuda, "dataloader_prefetch_factor": 2,
        "dataloader_persistent_workers": True,
    }  # fmt: skip
    return Seq2SeqTrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=BATCH,
        gradient_accumulation_steps=ACCUMULATION,
        learning_rate=2e-4,
        max_steps=steps,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr": 2e-5},
        warmup_steps=0.05,
        logging_strategy="steps",
        logging_steps=5,
        fp16=precision(arm) is torch.float16,
        bf16=precision(arm) is torch.bfloat16,
        remove_unused_columns=False,
        optim="adamw_torch",
        report_to="none",
        save_strategy="no",
        use_cpu=not cuda,
        disable_tqdm=True,
        **(workers if arm == "tuned" else {}),
    )


# --------------------------------------------------------------------------------------------- watching it


class Order(Sampler[int]):
    """Numbers of samples, in this order."""

    def __init__(self, order: list[int]) -> None:
        self.order = order

    def __iter__(self) -> Iterator[int]:
        return iter(self.order)

    def __len__(self) -> int:
        return len(self.order)


class Watched(Seq2SeqTrainer):
    """The same trainer, in a given order; it notes every micro-batch's loss and how long it waits for data."""

    def __init__(self, order: list[int], **given: Any) -> None:
        super().__init__(**given)
        self.order = order
        self.micro_losses: list[torch.Tensor] = []
        self.waited = 0.0

    def _get_train_sampler(self, *_: Any, **__: Any) -> Order:
        return Order(self.order)

    def get_batch_samples(self, *given: Any, **named: Any) -> Any:
        started = time.perf_counter()
        found = super().get_batch_samples(*given, **named)
        self.waited += time.perf_counter() - started
        return found

    def training_step(self, *given: Any, **named: Any) -> torch.Tensor:
        loss = super().training_step(*given, **named)
        self.micro_losses.append(loss)  # no .item(): the device need not be waited for
        return loss


class Clock(TrainerCallback):
    """When every step ended, once the device had finished it; and that the recipe is what it says it is."""

    def __init__(self, accelerator: Any) -> None:
        self.accelerator = accelerator
        self.ends: list[float] = []
        self.skipped = 0

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.note()

    def on_pre_optimizer_step(self, *_: Any, model: torch.nn.Module, **__: Any) -> None:
        if len(self.ends) == 1:  # of the first step alone: what holds there holds after it
            check_training(model)

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.note()
        self.skipped += self.accelerator.optimizer_step_was_skipped

    def note(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())

    def steps(self) -> list[float]:
        return [end - start for start, end in zip(self.ends, self.ends[1:], strict=False)]


def check_training(model: torch.nn.Module) -> None:
    """The model is bare and in float32, and only the projector has gradients.

    Raises:
        AssertionError: it is not, or others have.
    """
    assert type(model) is LlavaForConditionalGeneration, f"the model is wrapped in {type(model).__name__}"
    parameters = dict(model.named_parameters())
    assert {parameter.dtype for parameter in parameters.values()} == {torch.float32}
    learning = {name for name, parameter in parameters.items() if parameter.grad is not None}
    assert learning == {name for name in parameters if PROJECTOR in name}, f"gradients: {sorted(learning)}"


class PeakMemory:
    """The most memory in use since the start: of the GPU, or resident, by resetting the kernel's own mark."""

    def __init__(self) -> None:
        self.cuda, self.resettable = torch.cuda.is_available(), True
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
            self.start = torch.cuda.memory_allocated()
            return
        try:
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        except OSError:
            self.resettable = False
        self.start = status_bytes("VmRSS")

    def peak(self) -> int | None:
        if self.cuda:
            return torch.cuda.max_memory_allocated()
        return status_bytes("VmHWM") if self.resettable else None


def status_bytes(field: str) -> int:
    """A line of ``/proc/self/status``, which counts in KiB."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


# --------------------------------------------------------------------------------------------- training


def collator(work: Work, labels: Labels) -> Callable[[list[dict[str, Any]]], Any]:
    """The article's, or the same with only the answers labelled, as our processor marks them."""
    collate = get_data_collator(work.seed_processor, IGNORE_INDEX)
    if labels == "seed":
        return collate

    def collate_answers(examples: list[dict[str, Any]]) -> Any:
        batch = collate(examples)
        batch["labels"].fill_(IGNORE_INDEX)
        for row, example in zip(batch["labels"], examples, strict=True):
            told = work.llava.processor.encode(example["messages"]).labels
            row[: len(told)] = torch.tensor(told)
        return batch

    return collate_answers


def train_seed(work: Work, order: list[int], steps: int, arm: Arm, labels: Labels = "seed") -> SeedResult:
    """Train the projector from its first weights on ``order``, eight samples a step; the model is changed in place.

    Raises:
        ValueError: the order has too few samples.
    """
    if len(order) < steps * STEP:
        raise ValueError(f"{steps} steps take {steps * STEP} samples, the order has {len(order)}")
    reset_projector(work.llava)
    model = work.llava.model
    with tempfile.TemporaryDirectory() as folder:
        trainer = Watched(
            order[: steps * STEP],
            model=model,
            args=arguments(arm, steps, folder),
            data_collator=collator(work, labels),
            train_dataset=Pictures(work.samples),
        )
        trainer.remove_callback(PrinterCallback)  # stdout is for the result
        clock = Clock(trainer.accelerator)
        trainer.add_callback(clock)
        computed: set[torch.dtype] = set()
        hook = model.lm_head.register_forward_hook(lambda module, given, output: computed.add(output.dtype))
        memory = PeakMemory()
        started = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - started
        peak = memory.peak()
    hook.remove()
    # accelerate keeps the precision of a process's first training: a second one of another precision would lie.
    assert computed == {precision(arm)}, f"{arm} was to compute in {precision(arm)}, not in {computed}: a new process"
    # Mixed precision has put an autocast around ``forward``; whoever uses the model next asks for their own.
    trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    losses = torch.stack(trainer.micro_losses).float().view(steps, ACCUMULATION).sum(1)
    return SeedResult(
        arm=arm,
        labels=labels,
        device=str(model.device),
        losses=losses.tolist(),
        step_seconds=clock.steps(),
        seconds=seconds,
        waiting_share=trainer.waited / seconds,
        **counted(work, order[: steps * STEP], labels),
        skipped_steps=clock.skipped,
        start_bytes=memory.start,
        peak_bytes=peak,
        projector={name: value.detach().cpu().clone() for name, value in projector(work).state_dict().items()},
    )


def projector(work: Work) -> torch.nn.Module:
    """The one part that learns."""
    found: torch.nn.Module = work.llava.model.model.multi_modal_projector
    return found


def counted(work: Work, order: list[int], labels: Labels) -> dict[str, int]:
    """Tokens of a training: what two samples are padded to, what is real, what is labelled (a first token never)."""
    encoded = [tokens(work, work.samples[number], labels) for number in order]
    lengths = [len(one.input_ids) for one in encoded]
    pairs = [lengths[start : start + BATCH] for start in range(0, len(lengths), BATCH)]
    return {
        "real_tokens": sum(lengths),
        "padded_tokens": sum(max(pair) * len(pair) for pair in pairs),
        "labelled_tokens": sum(label != IGNORE_INDEX for one in encoded for label in one.labels[1:]),
    }


# --------------------------------------------------------------------------------------------- losses and checks


@torch.no_grad()
def held_out_loss(work: Work, samples: list[Sample], labels: Labels = "seed") -> float:
    """Mean loss of a labelled token through transformers' own forward, in batches of two, in the weights' precision."""
    model, rows, collate = work.llava.model, Pictures(samples), collator(work, labels)
    was_training = model.training
    model.eval()
    total, count = 0.0, 0
    for start in range(0, len(rows), BATCH):
        batch = collate([rows[number] for number in range(start, min(start + BATCH, len(rows)))]).to(model.device)
        labelled = int((batch["labels"][:, 1:] != IGNORE_INDEX).sum())
        total += float(model(**batch).loss) * labelled
        count += labelled
    model.train(was_training)
    return total / count


def check_tokens(work: Work) -> None:
    """The seed's processor and collator give the ids and the labels of ``workload.tokens``, and the same picture size.

    Raises:
        AssertionError: they do not.
    """
    rows = Pictures(work.samples)
    for labels in get_args(Labels):
        collate = collator(work, labels)
        for number, sample in enumerate(work.samples):
            batch, ours = collate([rows[number]]), tokens(work, sample, labels)
            assert batch["input_ids"][0].tolist() == ours.input_ids, f"sample {number}: other ids"
            assert batch["labels"][0].tolist() == ours.labels, f"sample {number}: other {labels} labels"
    for start in range(0, len(rows) - 1, BATCH):  # padded: behind the tokens, and without a label
        batch = collator(work, "seed")([rows[start], rows[start + 1]])
        for row, mask, wanted in zip(
            batch["input_ids"], batch["attention_mask"], work.samples[start : start + BATCH], strict=True
        ):
            ids = tokens(work, wanted, "seed").input_ids
            assert row[: len(ids)].tolist() == ids
            assert mask.tolist() == [1] * len(ids) + [0] * (len(mask) - len(ids))
        assert torch.equal(batch["labels"] == IGNORE_INDEX, batch["attention_mask"] == 0)


def check_first_loss(work: Work, order: list[int], result: SeedResult, tolerance: float) -> None:
    """The first step's loss is the mean over the labelled tokens of its eight samples, from the first projector.

    Raises:
        AssertionError: it is not.
    """
    reset_projector(work.llava)
    wanted = held_out_loss(work, [work.samples[number] for number in order[:STEP]], result.labels)
    assert abs(wanted - result.losses[0]) <= tolerance, f"{result.losses[0]} is not the token mean {wanted}"
    projector(work).load_state_dict(result.projector)


# --------------------------------------------------------------------------------------------- the command


def report(work: Work, result: SeedResult) -> dict[str, Any]:
    """The numbers with what they depend on; the projector only by its norm."""
    steady = sorted(result.step_seconds[1:] or result.step_seconds)
    found = asdict(replace(result, projector={}))  # copies, and the weights need no copy
    del found["projector"]
    versions = {name: version(name) for name in ("torch", "transformers", "accelerate", "tokenizers", "pillow")}
    gpu = {"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
    return {
        "command": " ".join(["python", "-m", "benchmarks.seed_recipe", *sys.argv[1:]]),
        "measured": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine() | gpu | {"threads": torch.get_num_threads(), "versions": versions},
        "shapes": work.shapes,
        "workload": facts(work),
        **found,
        "samples_per_second": result.samples_per_second,
        "median_step_seconds": steady[len(steady) // 2],  # the first left out where there are more
        "padded_to_real": result.padded_tokens / result.real_tokens,
        "projector_norm": math.sqrt(sum(float(value.square().sum()) for value in result.projector.values())),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", choices=get_args(Shapes), default="quick")
    parser.add_argument("--arm", choices=get_args(Arm), default="literal")
    parser.add_argument("--labels", choices=get_args(Labels), default="seed")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--seed", type=int, default=1, help="of the conversations")
    parser.add_argument("--held-out", type=int, default=0, help="samples to measure the loss on before and after")
    parser.add_argument("--check", action="store_true", help="compare tokens, labels and the first loss with our own")
    parser.add_argument("--json", action="store_true", help="one JSON document instead of a line")
    asked = parser.parse_args()
    work = workload(asked.shapes, asked.steps * STEP, asked.seed)
    order = list(range(len(work.samples)))
    held_out = conversations(asked.shapes, asked.held_out, asked.seed, "test")
    if asked.check:
        check_tokens(work)
    reset_projector(work.llava)
    before = held_out_loss(work, held_out, asked.labels) if held_out else None
    result = train_seed(work, order, asked.steps, asked.arm, asked.labels)
    found = report(work, result)
    if before is not None:
        found["held_out_loss"] = {"before": before, "after": held_out_loss(work, held_out, asked.labels)}
    if asked.check:
        check_first_loss(work, order, result, 1e-4 if result.device == "cpu" and asked.arm != "amp" else 0.05)
    if asked.json:
        print(json.dumps(found, indent=1))
        return
    print(
        f"{asked.shapes} {asked.arm}: {result.samples_per_second:.3f} samples/s, "
        f"{found['median_step_seconds']:.2f} s a step, loss {result.losses[0]:.4f} to {result.losses[-1]:.4f}"
    )


if __name__ == "__main__":
    main()
