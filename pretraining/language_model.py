"""Pretrain the pocket language model on text alone: it reads descriptions of scenes and answers questions about them.

    python -m pretraining.language_model --out llava_pipeline/backbones/pocket/language_model

Two ways of writing a scene are mixed. As *text*, a caption stands before the questions. As *merged embeddings*, the
caption's place is taken by sixteen vectors, as many as the pocket tower has patches: each shape is one to four of
them, every one the noisy sum of the embeddings of that shape's words, and the rest is noise. A patch of a picture,
once projected, is such a thing, so the frozen language model already knows how to read what a projector will say.
No picture is used here. The same seed, number of steps and threads give the same weights on the same machine.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import random
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from llava_pipeline.data import scenes
from pretraining.card import write_card
from pretraining.questions import sample_questions

NUM_SLOTS = 16
MAX_WORDS = 6
IGNORE_INDEX = -100
SPECIAL = ("<unk>", "<s>", "</s>", "<pad>", "<|user|>", "<|assistant|>")
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}<|user|>{% for item in message['content'] %}"
    "{% if item['type'] == 'image' %}<image>{% else %}{{ item['text'] }}{% endif %}{% endfor %}"
    "{% else %}<|assistant|>{% generation %} {% for item in message['content'] %}{{ item['text'] }}{% endfor %}"
    "{{ eos_token }}{% endgeneration %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
ATOMS = (*scenes.COLORS, *scenes.SHAPES, *scenes.SIZES, *scenes.COUNTS, "top", "bottom", "left", "right", "yes", "no")


# --------------------------------------------------------------------------------------------- tokenizer


def train_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE over scene language: every attribute is one token, every other text is still spelled."""
    rng = random.Random(seed)
    lines = []
    for _ in range(20_000):
        scene = scenes.sample_scene(rng)
        lines += [f"{scene.caption}.\n{q.text} {q.answer}" for q in sample_questions(rng, scene, 4)]
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=640, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator(lines, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>",
        additional_special_tokens=["<|user|>", "<|assistant|>"], model_max_length=512,
        clean_up_tokenization_spaces=False, padding_side="right",
    )  # fmt: skip
    tokenizer.chat_template = CHAT_TEMPLATE
    for word in ATOMS:
        if len(tokenizer(" " + word, add_special_tokens=False)["input_ids"]) != 1:
            raise ValueError(f"{word!r} is not one token; raise vocab_size")
    return tokenizer


# --------------------------------------------------------------------------------------------- batches


Slot = list[tuple[int, float]]  # the words of one merged embedding with their weights; empty is background


@dataclass
class Conversation:
    """Token ids with labels; ``slots`` where the scene is merged embeddings; the kind of every labelled answer."""

    ids: list[int]
    labels: list[int]
    kinds: list[str]
    slots: list[Slot] | None = None


@dataclass
class Batch:
    """Right-padded conversations (B, T), merged ones first; ``words`` and ``weights`` are (M, NUM_SLOTS, MAX_WORDS)."""

    ids: torch.Tensor
    labels: torch.Tensor
    kinds: list[list[str]]
    words: torch.Tensor
    weights: torch.Tensor


class Batches:
    """Endless conversations about scenes of one split."""

    first_slot = 2  # after <s> and <|user|>

    def __init__(self, tokenizer: PreTrainedTokenizerFast, split: scenes.Split, seed: int):
        self.tokenizer, self.split, self.seed, self.index = tokenizer, split, seed, 0
        self.known: dict[str, list[int]] = {}
        self.user, self.assistant = tokenizer.convert_tokens_to_ids(["<|user|>", "<|assistant|>"])

    def encode(self, text: str) -> list[int]:
        """Ids of a text, word by word: byte-level BPE never merges across a space."""
        head, *tail = text.split(" ")
        return [i for word in (head, *(" " + word for word in tail)) for i in self._word(word)]

    def _word(self, word: str) -> list[int]:
        if word not in self.known:
            self.known[word] = self.tokenizer(word, add_special_tokens=False)["input_ids"] if word else []
        return self.known[word]

    def slots(self, rng: random.Random, scene: scenes.Scene) -> list[Slot]:
        """Each shape in one to four of the slots: all its words in the first, most of them in its copies."""
        slots: list[Slot] = [[] for _ in range(NUM_SLOTS)]
        free = rng.sample(range(NUM_SLOTS), NUM_SLOTS)
        for shape in scene.shapes:
            words = self.encode(f" {shape.size} {shape.color} {shape.shape} {shape.place}")
            for copy_number in range(rng.choice((1, 1, 2, 2, 3, 4))):
                drop = 0.15 if copy_number else 0.0
                slots[free.pop()] = [(word, rng.uniform(0.6, 1.2)) for word in words if rng.random() >= drop]
        return slots

    def conversation(self, rng: random.Random, merged: bool, num_questions: int, lookups_only: bool) -> Conversation:
        """The next scene and questions about it; for lookups, the next scene of more than one shape."""
        scene, scene_rng = scenes.scene_at(self.seed, self.split, self.index)
        self.index += 1
        while lookups_only and len(scene.shapes) == 1:
            scene, scene_rng = scenes.scene_at(self.seed, self.split, self.index)
            self.index += 1
        ids, slots = [self.tokenizer.bos_token_id, self.user], None
        if merged:
            slots = self.slots(scene_rng, scene)
            ids += [self.tokenizer.unk_token_id] * NUM_SLOTS
        else:
            phrases = [shape.phrase for shape in scene.shapes]
            rng.shuffle(phrases)
            ids += self.encode(" " + " and ".join(phrases) + ".")
        ids += self.encode("\n")
        labels, kinds = [IGNORE_INDEX] * len(ids), []
        for number, question in enumerate(sample_questions(scene_rng, scene, num_questions, lookups_only)):
            asked = [*([self.user] if number else []), *self.encode(question.text), self.assistant]
            answer = [*self.encode(" " + question.answer), self.tokenizer.eos_token_id]
            ids += asked + answer
            labels += [IGNORE_INDEX] * len(asked) + answer
            kinds.append(question.kind)
        return Conversation(ids, labels, kinds, slots)

    def batch(self, size: int, merged_share: float, num_questions: int, lookups_only: bool = False) -> Batch:
        """``size`` conversations, padded."""
        rng = random.Random(f"{self.seed}/{self.split}/{self.index}")
        rows = [self.conversation(rng, rng.random() < merged_share, num_questions, lookups_only) for _ in range(size)]
        rows.sort(key=lambda row: row.slots is None)
        width = max(len(row.ids) for row in rows)
        ids = torch.full((size, width), self.tokenizer.pad_token_id)
        labels = torch.full((size, width), IGNORE_INDEX)
        num_merged = sum(row.slots is not None for row in rows)
        words = torch.zeros((num_merged, NUM_SLOTS, MAX_WORDS), dtype=torch.long)
        weights = torch.zeros((num_merged, NUM_SLOTS, MAX_WORDS))
        for b, row in enumerate(rows):
            ids[b, : len(row.ids)] = torch.tensor(row.ids)
            labels[b, : len(row.labels)] = torch.tensor(row.labels)
            for s, slot in enumerate(row.slots or []):
                for j, (word, weight) in enumerate(slot):
                    words[b, s, j], weights[b, s, j] = word, weight
        return Batch(ids, labels, [row.kinds for row in rows], words, weights)


def embed(model: LlamaForCausalLM, batch: Batch, generator: torch.Generator, noise: float) -> torch.Tensor:
    """(B, T, D) embeddings, merged slots over their placeholders; ``noise`` is in units of an embedding's rms."""
    table = model.get_input_embeddings()
    out = table(batch.ids)
    num_merged, first = len(batch.words), Batches.first_slot
    if num_merged:
        rms = table.weight.detach().pow(2).mean().sqrt()
        slots = (table(batch.words) * batch.weights[..., None]).sum(2)
        level = noise * torch.rand(num_merged, 1, 1, generator=generator) * rms
        slots = slots + torch.randn(slots.shape, generator=generator) * level
        slots = slots * torch.exp(0.3 * torch.randn(num_merged, 1, 1, generator=generator))
        rows = torch.cat([out[:num_merged, :first], slots, out[:num_merged, first + NUM_SLOTS :]], 1)
        out = torch.cat([rows, out[num_merged:]])
    return out


# --------------------------------------------------------------------------------------------- scores


@torch.no_grad()
def evaluate(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, form: str, num_batches: int = 12
) -> dict[str, float]:
    """Share of held-out questions, by kind, of which every answer token is the likeliest."""
    batches, generator = Batches(tokenizer, "test", seed=99), torch.Generator().manual_seed(0)
    right: dict[str, list[float]] = defaultdict(list)
    for _ in range(num_batches):
        batch = batches.batch(64, float(form == "merged"), 4)
        logits = model(inputs_embeds=embed(model, batch, generator, 0.3)).logits
        hit = (logits[:, :-1].argmax(-1) == batch.labels[:, 1:]) | (batch.labels[:, 1:] == IGNORE_INDEX)
        for b, kinds in enumerate(batch.kinds):
            start = 0
            for kind, end in zip(
                kinds, (batch.labels[b] == tokenizer.eos_token_id).nonzero().flatten().tolist(), strict=True
            ):
                right[kind].append(float(hit[b, start:end].all()))
                start = end
    scores = {kind: sum(hits) / len(hits) for kind, hits in sorted(right.items())}
    scores["all"] = sum(map(sum, right.values())) / sum(map(len, right.values()))
    return {kind: round(score, 4) for kind, score in scores.items()}


# --------------------------------------------------------------------------------------------- training


def new_model(tokenizer: PreTrainedTokenizerFast, width: int, layers: int, head: int) -> LlamaForCausalLM:
    """A small Llama with tied embeddings, whose attention begins by matching and copying."""
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=width * 8 // 3, num_hidden_layers=layers,
        num_attention_heads=width // head, num_key_value_heads=width // head, head_dim=head,
        max_position_embeddings=512,
        tie_word_embeddings=True, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    ))  # fmt: skip
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(5.0)
    for layer in model.model.layers:
        match_and_copy(layer.self_attn)
    return model


@torch.no_grad()
def match_and_copy(attention: torch.nn.Module, scale: float = 2.0) -> None:
    """Equal query and key weights, output weights that undo the values': a word looks for itself and copies the find.

    After Trockman and Kolter 2023, "Mimetic initialization of self-attention layers", arXiv 2305.09828. From random
    weights, questions that need a word to be found in the scene stay at chance for the first thousand steps.
    """
    attention.q_proj.weight.mul_(scale)
    attention.k_proj.weight.copy_(attention.q_proj.weight)
    attention.o_proj.weight.copy_(attention.v_proj.weight.T)


@dataclass(frozen=True)
class Lesson:
    """What is taught at one moment. ``noise`` is in units of an embedding's root mean square."""

    lookups_only: bool
    merged_share: float
    noise: float
    rate: float


def lesson_at(share: float, noise: float, rate: float) -> Lesson:
    """The lesson after ``share`` of the steps.

    Finding a shape by a word comes first, in clean merged scenes of several shapes: one hop reads them, and nothing
    can be guessed. Then every question, text, and the noise of a projector that is still learning. Mixed from the
    start, matching words stayed at chance for as long as was tried (docs/decisions.md).
    """
    warm, cooled = min(1.0, share / 0.01), max(0.0, (share - 0.5) / 0.5)
    return Lesson(
        lookups_only=share < 0.2,
        merged_share=1.0 if share < 0.25 else 0.6,
        noise=noise * min(1.0, max(0.0, share - 0.2) / 0.3),
        rate=rate * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * cooled))),
    )


def train(args: argparse.Namespace) -> None:
    """Train for ``--steps`` and write model, tokenizer and card; scores are printed on the way."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    tokenizer = train_tokenizer(args.seed)
    model = new_model(tokenizer, args.width, args.layers, args.head)
    num_parameters = sum(p.numel() for p in model.parameters())
    print(f"{num_parameters:,} parameters, {len(tokenizer)} tokens", flush=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.98), weight_decay=0.01)
    batches, generator = Batches(tokenizer, "train", args.seed), torch.Generator().manual_seed(args.seed)
    started = time.monotonic()
    for step in range(args.steps):
        lesson = lesson_at(step / args.steps, args.noise, args.lr)
        for group in optimizer.param_groups:
            group["lr"] = lesson.rate
        batch = batches.batch(args.batch, lesson.merged_share, args.questions, lesson.lookups_only)
        hidden = model.model(inputs_embeds=embed(model, batch, generator, lesson.noise)).last_hidden_state
        kept = batch.labels[:, 1:] != IGNORE_INDEX
        loss = torch.nn.functional.cross_entropy(model.lm_head(hidden[:, :-1][kept]), batch.labels[:, 1:][kept])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if (step + 1) % 50 == 0:
            print(f"step {step + 1} loss {loss.item():.4f} {time.monotonic() - started:.0f} s", flush=True)
        if (step + 1) % args.every == 0:
            for form in ("merged", "text"):
                print(form, evaluate(model, tokenizer, form, 4), flush=True)
    minutes = (time.monotonic() - started) / 60
    scores = {form: evaluate(model, tokenizer, form, 24) for form in ("merged", "text")}
    facts = {
        "num_parameters": num_parameters,
        "steps": args.steps,
        "minutes": round(minutes, 1),
        "threads": args.threads,
    }
    save(model, tokenizer, args.out, {"scores": scores, "seed": args.seed, "torch": torch.__version__, **facts})
    print(json.dumps(scores, indent=1))


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path, card: dict) -> None:
    """Half-precision safetensors, configuration and tokenizer in the layout of the hub; the card last."""
    copy.deepcopy(model).half().save_pretrained(out)
    tokenizer.save_pretrained(out)
    write_card(out, card)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--every", type=int, default=500, help="steps between scores")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--layers", type=int, default=5)
    parser.add_argument("--head", type=int, default=32)
    parser.add_argument("--batch", type=int, default=24)
    parser.add_argument("--questions", type=int, default=5)
    parser.add_argument("--noise", type=float, default=0.7)
    parser.add_argument("--lr", type=float, default=2e-3)
    train(parser.parse_args())
