"""Pretrain the pocket language model on text alone: it reads descriptions of scenes and answers questions about them.

    python -m pretraining.language_model --minutes 40 --out llava_pipeline/backbones/pocket/language_model

Two ways of writing a scene are mixed. As *text*, a caption stands before the questions. As *merged embeddings*, the
caption's place is taken by sixteen vectors, as many as the pocket tower has patches: each shape is one to four of
them, every one the noisy sum of the embeddings of that shape's words, and the rest is noise. A patch of a picture,
once projected, is such a thing, so the frozen language model already knows how to read what a projector will say.
No picture is used here. Deterministic by ``--seed`` but for the wall clock that ends it.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections import defaultdict
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from llava_pipeline.data import scenes

NUM_SLOTS = 16
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}USER: {% for item in message['content'] %}"
    "{% if item['type'] == 'image' %}<image>{% else %}{{ item['text'] }}{% endif %}{% endfor %}"
    "{% else %} ASSISTANT:{% generation %} {% for item in message['content'] %}{{ item['text'] }}{% endfor %}"
    "{{ eos_token }}{% endgeneration %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %} ASSISTANT:{% endif %}"
)


# --------------------------------------------------------------------------------------------- questions


def easy_question(rng: random.Random, scene: scenes.Scene) -> scenes.Question | None:
    """A question in the wording of the easy-VQA data set (its words only: none of its pictures or rows)."""
    form = rng.choice(("color", "shape", "is", "is", "not", "not"))
    if form == "color":
        if len(scene.shapes) == 1:
            name = rng.choice(("shape", scene.shapes[0].shape))
        elif found := scenes.unique(scene, "shape"):
            name = rng.choice(found).shape
        else:
            return None
        target = next(s for s in scene.shapes if name in ("shape", s.shape))
        text = rng.choice((f"what color is the {name}?", f"what is the color of the {name}?"))
        return scenes.Question("color", text, target.color)
    if form == "shape":
        if len(scene.shapes) == 1 and rng.random() < 0.6:
            text = rng.choice(("what shape is in the image?", "what shape does the image contain?", "what shape is present?"))
            return scenes.Question("shape", text, scene.shapes[0].shape)
        if not (found := scenes.unique(scene, "color")):
            return None
        target = rng.choice(found)
        return scenes.Question("shape", f"what is the {target.color} shape?", target.shape)
    present = rng.random() < 0.5
    if rng.random() < 0.6:
        have = sorted({f"{s.color} shape" for s in scene.shapes})
        every = [f"{c} shape" for c in scenes.COLORS]
    else:
        have = sorted({s.shape for s in scene.shapes})
        every = list(scenes.SHAPES)
    thing = rng.choice(have if present else [t for t in every if t not in have])
    positive = ("is there a {}?", "is a {} present?", "is there a {} in the image?", "does the image contain a {}?")
    negative = (
        *("is there not a {}?", "is no {} present?", "is there not a {} in the image?"),
        "does the image not contain a {}?",
    )
    text = rng.choice(positive if form == "is" else negative).format(thing)
    return scenes.Question("negation" if form == "not" else "yes/no", text, "yes" if present == (form == "is") else "no")


def sample_questions(rng: random.Random, scene: scenes.Scene, count: int) -> list[scenes.Question]:
    """``count`` questions in random order; a caption, if any, comes last (it would answer what follows)."""
    questions: list[scenes.Question] = []
    while len(questions) < count:
        if rng.random() < 0.4:
            question = easy_question(rng, scene)
        else:
            question = scenes.ASK[rng.choice(scenes.KINDS)](rng, scene)
            if question is not None and rng.random() < 0.2:
                question = scenes.Question(question.kind, question.text.lower(), question.answer)
        if question is not None and question.text not in {q.text for q in questions}:
            questions.append(question)
    if rng.random() < 0.4:
        questions[-1] = scenes.ask_caption(rng, scene)
    return questions


# --------------------------------------------------------------------------------------------- tokenizer


def train_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE over scene language: every attribute is one token, every other text is still spelled."""
    rng = random.Random(seed)
    lines = []
    for _ in range(20_000):
        scene = scenes.sample_scene(rng)
        for q in sample_questions(rng, scene, 4):
            lines.append(f"USER: {scene.caption}.\n{q.text} ASSISTANT: {q.answer}")
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=640,
        special_tokens=["<unk>", "<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(lines, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>",
        model_max_length=512, clean_up_tokenization_spaces=False, padding_side="right",
    )  # fmt: skip
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


# --------------------------------------------------------------------------------------------- batches


class Batches:
    """Endless batches: ids, labels, and for merged scenes the words that make each slot."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, split: scenes.Split, seed: int):
        self.tokenizer, self.split, self.seed, self.index = tokenizer, split, seed, 0
        self.cache: dict[str, list[int]] = {}

    def ids(self, text: str) -> list[int]:
        if text not in self.cache:
            self.cache[text] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return self.cache[text]

    def slots(self, rng: random.Random, scene: scenes.Scene) -> list[list[tuple[int, float]]]:
        """(word id, weight) lists, one per slot; empty means background."""
        slots: list[list[tuple[int, float]]] = [[] for _ in range(NUM_SLOTS)]
        free = rng.sample(range(NUM_SLOTS), NUM_SLOTS)
        for shape in scene.shapes:
            words = [i for part in (shape.size, shape.color, shape.shape, shape.place) for i in self.ids(" " + part)]
            for copy in range(rng.choice((1, 1, 2, 2, 3, 4))):
                slots[free.pop()] = [
                    (word, rng.uniform(0.6, 1.2)) for word in words if copy == 0 or rng.random() > 0.15
                ]  # fmt: skip
        return slots

    def sample(self, form: str, num_questions: int):
        """One conversation: ids, labels, slots (merged form only), kinds of the labelled answers."""
        scene, rng = scenes.scene_at(self.seed, self.split, self.index)
        self.index += 1
        questions = sample_questions(rng, scene, num_questions)
        ids, labels, kinds = [self.tokenizer.bos_token_id, *self.ids("USER:")], [], []
        slots = None
        if form == "merged":
            ids += self.ids(" ")
            slots = (len(ids), self.slots(rng, scene))
            ids += [self.tokenizer.unk_token_id] * NUM_SLOTS
        else:
            phrases = [s.phrase for s in scene.shapes]
            rng.shuffle(phrases)
            ids += [i for part in (" " + " and ".join(phrases) + ".").split(" ")[1:] for i in self.ids(" " + part)]
        ids += self.ids("\n")
        labels = [-100] * len(ids)
        for k, q in enumerate(questions):
            prompt = ("" if k == 0 else "USER: ") + q.text + " ASSISTANT:"
            pieces = [p if j == 0 else " " + p for j, p in enumerate(prompt.split(" "))]
            prompt_ids = [i for p in pieces for i in self.ids(p)]
            answer = [*(i for p in q.answer.split(" ") for i in self.ids(" " + p)), self.tokenizer.eos_token_id]
            ids += prompt_ids + answer
            labels += [-100] * len(prompt_ids) + answer
            kinds.append(q.kind)
        return ids, labels, slots, kinds

    def batch(self, size: int, merged_share: float, num_questions: int):
        rng = random.Random(f"{self.seed}/{self.split}/{self.index}")
        rows = [
            self.sample("merged" if rng.random() < merged_share else "text", num_questions) for _ in range(size)
        ]
        rows.sort(key=lambda row: row[2] is None)
        width = max(len(row[0]) for row in rows)
        ids = torch.full((size, width), self.tokenizer.pad_token_id)
        labels = torch.full((size, width), -100)
        num_merged = sum(row[2] is not None for row in rows)
        words = torch.zeros((num_merged, NUM_SLOTS, 6), dtype=torch.long)
        weights = torch.zeros((num_merged, NUM_SLOTS, 6))
        start = 0
        for b, (row_ids, row_labels, slots, _) in enumerate(rows):
            ids[b, : len(row_ids)] = torch.tensor(row_ids)
            labels[b, : len(row_labels)] = torch.tensor(row_labels)
            if slots is not None:
                start = slots[0]
                for s, slot in enumerate(slots[1]):
                    for j, (word, weight) in enumerate(slot):
                        words[b, s, j], weights[b, s, j] = word, weight
        return ids, labels, (start, words, weights), [row[3] for row in rows]


def embed(model: LlamaForCausalLM, ids: torch.Tensor, merged, generator: torch.Generator, noise: float) -> torch.Tensor:
    """(B, T, D) input embeddings with the merged slots written over the placeholder tokens."""
    table = model.get_input_embeddings()
    out = table(ids)
    start, words, weights = merged
    if len(words):
        rms = table.weight.detach().pow(2).mean().sqrt()
        slots = (table(words) * weights[..., None]).sum(2)
        level = noise * torch.rand(len(words), 1, 1, generator=generator) * rms
        slots = slots + torch.randn(slots.shape, generator=generator) * level
        scale = torch.exp(0.5 * torch.randn(len(words), 1, 1, generator=generator)) if noise else 1.0
        slots = slots * scale
        out = torch.cat([out[: len(words), :start], slots, out[: len(words), start + NUM_SLOTS :]], 1) if len(words) == len(ids) else torch.cat(
            [torch.cat([out[: len(words), :start], slots, out[: len(words), start + NUM_SLOTS :]], 1), out[len(words) :]]
        )  # fmt: skip
    return out


@torch.no_grad()
def evaluate(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, form: str, num_batches: int = 12) -> dict[str, float]:
    """Share of first questions, by kind, whose every answer token is the likeliest (teacher forced)."""
    batches = Batches(tokenizer, "test", seed=99)
    right: dict[str, list[float]] = defaultdict(list)
    generator = torch.Generator().manual_seed(0)
    for _ in range(num_batches):
        ids, labels, merged, kinds = batches.batch(64, 1.0 if form == "merged" else 0.0, 3)
        logits = model(inputs_embeds=embed(model, ids, merged, generator, 0.3)).logits
        hit = (logits[:, :-1].argmax(-1) == labels[:, 1:]) | (labels[:, 1:] == -100)
        for b in range(len(ids)):
            spans = (labels[b] == tokenizer.eos_token_id).nonzero().flatten().tolist()
            low = 0
            for kind, end in zip(kinds[b], spans, strict=True):
                right[kind].append(float(hit[b, low:end].all()))
                low = end
    scores = {kind: sum(v) / len(v) for kind, v in sorted(right.items())}
    scores["all"] = sum(sum(v) for v in right.values()) / sum(len(v) for v in right.values())
    return scores


def train(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    tokenizer = train_tokenizer(args.seed)
    for word in (*scenes.COLORS, *scenes.SHAPES, *scenes.SIZES, *scenes.COUNTS, "top", "left", "yes", "no"):
        assert len(tokenizer(" " + word, add_special_tokens=False)["input_ids"]) == 1, word
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=args.width, intermediate_size=args.width * 8 // 3, num_hidden_layers=args.layers,
        num_attention_heads=args.width // 64, num_key_value_heads=args.width // 64, max_position_embeddings=512,
        tie_word_embeddings=True, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(tokenizer)} tokens", flush=True)
    # Muon (Jordan et al. 2024) for the matrices inside the layers, AdamW for the rest: see docs/decisions.md
    inside = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed_tokens" not in name]
    outside = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed_tokens" in name]
    optimizers = [
        torch.optim.Muon(inside, lr=args.lr, momentum=0.95, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(outside, lr=args.lr, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    batches, generator = Batches(tokenizer, "train", args.seed), torch.Generator().manual_seed(args.seed)
    started, step, last = time.monotonic(), 0, 0.0
    while (share := (time.monotonic() - started) / (60 * args.minutes)) < 1:
        rate = args.lr * min(1.0, (step + 1) / 100) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * share)))
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = rate
        ids, labels, merged, _ = batches.batch(args.batch, args.merged_share, args.questions)
        with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
            hidden = model.model(inputs_embeds=embed(model, ids, merged, generator, args.noise)).last_hidden_state
            kept = labels[:, 1:] != -100
            logits = model.lm_head(hidden[:, :-1][kept]).float()
        loss = torch.nn.functional.cross_entropy(logits, labels[:, 1:][kept])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        step += 1
        if step % 50 == 0:
            print(f"step {step} {share:6.1%} loss {loss.item():.4f} lr {rate:.2e} {time.monotonic() - started:.0f} s", flush=True)
        if time.monotonic() - last > 180:
            last = time.monotonic()
            for form in ("merged", "text"):
                print(form, {k: round(v, 3) for k, v in evaluate(model, tokenizer, form, 4).items()}, flush=True)
            save(model, tokenizer, args.out, {})
    scores = {form: evaluate(model, tokenizer, form, 24) for form in ("merged", "text")}
    print(json.dumps(scores, indent=1))
    save(model, tokenizer, args.out, {"scores": scores, "steps": step, "minutes": args.minutes, "seed": args.seed})


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path, card: dict) -> None:
    """Half-precision safetensors, configuration and tokenizer in the layout of the hub."""
    out.mkdir(parents=True, exist_ok=True)
    import copy

    copy.deepcopy(model).half().save_pretrained(out)
    tokenizer.save_pretrained(out)
    (out / "pretraining.json").write_text(json.dumps(card, indent=1) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=5)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--questions", type=int, default=5)
    parser.add_argument("--merged-share", type=float, default=0.65)
    parser.add_argument("--noise", type=float, default=0.7)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--bf16", action="store_true")
    train(parser.parse_args())
