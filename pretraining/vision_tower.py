"""Pretrain the pocket vision tower on pictures and captions.

    python -m pretraining.vision_tower --out llava_pipeline/backbones/pocket/vision_tower

Every patch learns to tell the words of the caption of what lies under it (a bag of words read by one linear layer,
after Joulin et al. 2016, "Learning visual features from large weakly supervised data", arXiv 1511.02251, with region
captions), and the class token the words of the whole caption. The reading layers are thrown away. Because they are
linear, what they could read is what a projector can reach. Both the last and the penultimate layer are read: LLaVA
uses the penultimate one. The same seed, number of steps and threads give the same weights on the same machine.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import random
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

from llava_pipeline.data import scenes
from pretraining.card import write_card
from pretraining.muon import new_optimizers

SIDE, PATCH = 64, 16
GRID = SIDE // PATCH
PLACE_WORDS = ("top", "bottom", "left", "right", "center")
WORDS = (*scenes.SIZES, *scenes.COLORS, *scenes.SHAPES, *PLACE_WORDS, "picture")
WORD_INDEX = {word: k for k, word in enumerate(WORDS)}
MEAN, STD = [0.5, 0.5, 0.5], [0.25, 0.25, 0.25]


def region_words(shape: scenes.Shape) -> list[int]:
    """The words of one shape's phrase."""
    return [WORD_INDEX[w] for w in (shape.size, shape.color, shape.shape, *shape.place.split(" "))]


def free_scene(rng: random.Random) -> scenes.Scene:
    """One shape anywhere and of any size: the composition of other people's toy pictures."""
    radius = rng.uniform(0.07, 0.27)
    x, y = rng.uniform(radius, 1 - radius), rng.uniform(radius, 1 - radius)
    place = scenes.PLACES[min(2, int(y * 3)) * 3 + min(2, int(x * 3))]
    size = "small" if radius < 0.125 else "large"
    aspect = math.exp(rng.uniform(-1.1, 1.1))
    shape = scenes.Shape(rng.choice(scenes.SHAPES), rng.choice(tuple(scenes.COLORS)), size, place, x, y, radius, aspect)
    return scenes.Scene((shape,), scenes.sample_background(rng))


def as_pixels(picture: Image.Image) -> np.ndarray:
    """(S, S, 3) in [0, 1], resized as the image processor does."""
    return np.asarray(picture.resize((SIDE, SIDE), Image.Resampling.BICUBIC), dtype=np.float32) / 255


def sample(rng: random.Random, index: int, split: scenes.Split, seed: int):
    """(pixels (3, H, W), patch words (P, W), caption words (W,)) of one scene, colours jittered."""
    scene = free_scene(rng) if rng.random() < 0.35 else scenes.scene_at(seed, split, index)[0]
    pixels = as_pixels(scenes.draw(scene))
    pixels = pixels + np.asarray([rng.gauss(0, 0.03) for _ in range(3)], dtype=np.float32)
    patches = np.zeros((GRID * GRID, len(WORDS)), dtype=np.float32)
    caption = np.zeros(len(WORDS), dtype=np.float32)
    for shape in scene.shapes:
        words = region_words(shape)
        caption[words] = 1
        mask = np.asarray(
            scenes.draw(scenes.Scene((shape,), (255, 255, 255)), side=SIDE).convert("RGB"), dtype=np.int16
        )
        covered = (np.abs(mask - 255).max(-1) > 60).reshape(GRID, PATCH, GRID, PATCH).mean((1, 3)).reshape(-1)
        under = covered > 0.06
        under[covered.argmax()] = True
        for word in words:
            patches[under, word] = 1
    return pixels.transpose(2, 0, 1), patches, caption


class Pictures(torch.utils.data.IterableDataset):
    """Endless pictures; worker ``w`` of ``n`` draws every ``n``-th."""

    def __init__(self, split: scenes.Split, seed: int, batch: int):
        self.split, self.seed, self.batch = split, seed, batch

    def __iter__(self):
        info = torch.utils.data.get_worker_info()
        index, stride = (info.id, info.num_workers) if info else (0, 1)
        while True:
            rows = []
            for _ in range(self.batch):
                rows.append(
                    sample(random.Random(f"tower/{self.seed}/{self.split}/{index}"), index, self.split, self.seed)
                )
                index += stride
            yield tuple(torch.from_numpy(np.stack(part)) for part in zip(*rows, strict=True))


def normalise(pixels: torch.Tensor) -> torch.Tensor:
    """As the image processor does."""
    return (pixels - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "size": scenes.SIZES, "color": tuple(scenes.COLORS), "shape": scenes.SHAPES, "place": scenes.PLACES,
}  # fmt: skip


@torch.no_grad()
def patches_of_shapes(
    tower: CLIPVisionModel, split: scenes.Split, num_scenes: int
) -> tuple[torch.Tensor, list[scenes.Shape]]:
    """(N, D) penultimate features of the patch under each shape's centre, and the N shapes."""
    features, shapes = [], []
    for start in range(0, num_scenes, 64):
        batch = [scenes.scene_at(7, split, index)[0] for index in range(start, min(start + 64, num_scenes))]
        pixels = torch.from_numpy(np.stack([as_pixels(scenes.draw(scene)) for scene in batch])).permute(0, 3, 1, 2)
        hidden = tower(normalise(pixels), output_hidden_states=True).hidden_states[-2][:, 1:]
        for states, scene in zip(hidden, batch, strict=True):
            for shape in scene.shapes:
                features.append(states[int(shape.y * GRID) * GRID + int(shape.x * GRID)])
                shapes.append(shape)
    return torch.stack(features), shapes


def probe(tower: CLIPVisionModel, num_train: int = 2048, num_test: int = 1024) -> dict[str, float]:
    """Held-out accuracy of a linear reader (logistic regression) fitted on the frozen tower, attribute by attribute.

    ``all`` is the share of shapes of which every attribute is read right.
    """
    inputs, shapes = patches_of_shapes(tower, "train", num_train)
    questions, asked = patches_of_shapes(tower, "test", num_test)
    mean, std = inputs.mean(0), inputs.std(0) + 1e-6
    inputs, questions = (inputs - mean) / std, (questions - mean) / std
    right = {}
    for attribute, values in ATTRIBUTES.items():
        reader = fit_reader(
            inputs, torch.tensor([values.index(getattr(shape, attribute)) for shape in shapes]), len(values)
        )
        truth = torch.tensor([values.index(getattr(shape, attribute)) for shape in asked])
        right[attribute] = reader(questions).argmax(1) == truth
    scores = {attribute: float(hits.float().mean()) for attribute, hits in right.items()}
    scores["all"] = float(torch.stack(list(right.values())).all(0).float().mean())
    return {attribute: round(score, 4) for attribute, score in scores.items()}


def fit_reader(inputs: torch.Tensor, targets: torch.Tensor, num_classes: int) -> torch.nn.Linear:
    """Logistic regression with a little weight decay, by L-BFGS."""
    reader = torch.nn.Linear(inputs.shape[1], num_classes)
    optimizer = torch.optim.LBFGS(reader.parameters(), max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(reader(inputs), targets) + 1e-3 * reader.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return reader.requires_grad_(False)


def rate_at(share: float, peak: float) -> float:
    """Learning rate after ``share`` of the steps: a warm-up, then a cosine to a fiftieth."""
    return peak * min(1.0, share / 0.03) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * share)))


def train(args: argparse.Namespace) -> None:
    """Train for ``--steps`` and write tower, image settings and card; scores are printed on the way."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    config = CLIPVisionConfig(
        hidden_size=args.width, intermediate_size=args.width * 4, num_hidden_layers=args.layers,
        num_attention_heads=args.width // 32, image_size=SIDE, patch_size=PATCH, hidden_act="quick_gelu",
        projection_dim=args.width,
    )  # fmt: skip
    tower = CLIPVisionModel(config)
    names = ("patch", "last", "caption")
    heads = torch.nn.ModuleDict({name: torch.nn.Linear(args.width, len(WORDS)) for name in names})
    parameters = [*tower.parameters(), *heads.parameters()]
    num_parameters = sum(p.numel() for p in tower.parameters())
    print(f"{num_parameters:,} parameters", flush=True)
    optimizers = new_optimizers([tower, heads], args.lr, weight_decay=0.02)
    pictures = Pictures("train", args.seed, args.batch)
    loader = iter(torch.utils.data.DataLoader(pictures, batch_size=None, num_workers=args.workers))
    bce = torch.nn.functional.binary_cross_entropy_with_logits
    started = time.monotonic()
    for step in range(args.steps):
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = rate_at(step / args.steps, args.lr)
        pixels, patches, caption = next(loader)
        states = tower(normalise(pixels), output_hidden_states=True).hidden_states
        guess = heads["patch"](states[-2][:, 1:]), heads["last"](states[-1][:, 1:]), heads["caption"](states[-1][:, 0])
        losses = [bce(told, want) for told, want in zip(guess, (patches, patches, caption), strict=True)]
        loss = losses[0] + 0.3 * losses[1] + 0.3 * losses[2]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if (step + 1) % 50 == 0:
            told = f"step {step + 1} loss {loss.item():.4f} patch {losses[0].item():.4f}"
            print(f"{told} {time.monotonic() - started:.0f} s", flush=True)
        if (step + 1) % args.every == 0:
            print(probe(tower, 1024, 256), flush=True)
    minutes = (time.monotonic() - started) / 60
    scores = probe(tower)
    facts = {"num_parameters": num_parameters, "steps": args.steps, "pictures": args.steps * args.batch}
    facts |= {"minutes": round(minutes, 1), "threads": args.threads, "torch": torch.__version__}
    save(tower, args.out, {"scores": scores, "seed": args.seed, **facts})
    print(json.dumps(scores))


def save(tower: CLIPVisionModel, out: Path, card: dict) -> None:
    """Half-precision safetensors, configuration and image processor in the layout of the hub; the card last."""
    copy.deepcopy(tower).half().save_pretrained(out)
    CLIPImageProcessor(
        size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}, image_mean=MEAN, image_std=STD
    ).save_pretrained(out)
    write_card(out, card)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--every", type=int, default=250, help="steps between scores")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--layers", type=int, default=7)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--lr", type=float, default=2e-3)
    train(parser.parse_args())
