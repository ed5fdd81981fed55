"""Vision towers that are known, by the kind their configuration names: one table, and what follows from it.

A family is what towers of one architecture share: tokens beside the patches, how a checkpoint spells its weights,
which of them are not used, and the colours it was trained on. Nothing here needs torch.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from llava_pipeline.errors import IncompatibleParts
from llava_pipeline.spec import ModelSpec

Colours = tuple[float, float, float]
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
FEWEST_TEXT_TOKENS = 16  # that a conversation about a picture takes beside it
NATIVE_RESOLUTION = ("siglip2", "siglip2_vision_model")


@dataclass(frozen=True)
class Family:
    """Towers of one architecture.

    ``num_first_tokens`` stand before the patches; the first of them is the class token, which the strategy "default"
    drops. ``unused`` are values of the configuration that leave out what nothing reads, ``ignored`` the marks (prefix
    or suffix) of weights that a checkpoint may hold for it. ``renames`` are regular expressions.
    """

    name: str
    mean: Colours
    std: Colours
    num_first_tokens: int
    interpolates: bool = False  # positions, to a picture of another size
    unused: Mapping[str, Any] = field(default_factory=dict)
    ignored: Mapping[str, str] = field(default_factory=dict)
    prefixes: tuple[str, ...] = ()
    renames: Mapping[str, str] = field(default_factory=dict)
    halves: Mapping[str, tuple[str, str]] = field(default_factory=dict)  # one weight that is two, one below the other


def _text_half(whole: str) -> dict[str, str]:
    marks = ("text_model.", "text_projection.", "visual_projection.", "logit_scale", "logit_bias")
    return dict.fromkeys(marks, f"{whole} text half")


CLIP = Family(
    name="CLIP", mean=CLIP_MEAN, std=CLIP_STD, num_first_tokens=1, prefixes=("vision_model.",),
    ignored={**_text_half("CLIP"), "position_ids": "position ids"},
)  # fmt: skip
SIGLIP = Family(
    name="SigLIP", mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), num_first_tokens=0, prefixes=("vision_model.",),
    unused={"vision_use_head": False},
    ignored={**_text_half("SigLIP"), "head.": "pooling head", "position_ids": "position ids"},
)  # fmt: skip
DINOV2 = Family(
    name="DINOv2", mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), num_first_tokens=1, interpolates=True,
    prefixes=("dinov2.", "dinov2_with_registers."), unused={"use_mask_token": False},
    ignored={"embeddings.mask_token": "mask token", "classifier.": "classifier"},
    renames={
        r"\.attention\.attention\.query\.": ".attention.q_proj.",
        r"\.attention\.attention\.key\.": ".attention.k_proj.",
        r"\.attention\.attention\.value\.": ".attention.v_proj.",
        r"\.attention\.output\.dense\.": ".attention.o_proj.",
        r"\.mlp\.weights_out\.": ".mlp.down_proj.",
    },
    halves={".mlp.weights_in.": (".mlp.gate_proj.", ".mlp.up_proj.")},
)  # fmt: skip
FAMILIES = {  # by model_type, of the tower and of the whole model it is a half of
    "clip": CLIP, "clip_vision_model": CLIP, "siglip": SIGLIP, "siglip_vision_model": SIGLIP,
    "dinov2": DINOV2, "dinov2_with_registers": DINOV2,
}  # fmt: skip


def vision_config_of(config: Any, origin: str = "the vision tower") -> Any:
    """The tower's configuration, as it is used here; of a model of pictures and text, its vision half.

    Raises:
        IncompatibleParts: it is no tower of a known family.
    """
    kind = config.model_type
    if kind in NATIVE_RESOLUTION:
        raise IncompatibleParts(
            f"{origin} is a {kind}, which takes pictures of every shape; "
            "choose a SigLIP2 of fixed resolution, whose config.json says siglip"
        )
    config = getattr(config, "vision_config", config)
    if config.model_type not in FAMILIES:
        known = ", ".join(dict.fromkeys(family.name for family in FAMILIES.values()))
        raise IncompatibleParts(f"{origin} is a {kind}, not a vision tower of one of {known}; choose another one")
    config = copy.deepcopy(config)
    for name, value in family_of(config).unused.items():
        if hasattr(config, name):
            setattr(config, name, value)
    return config


def family_of(config: Any) -> Family:
    """The family of a configuration that ``vision_config_of`` gave."""
    return FAMILIES[config.model_type]


def image_side(config: Any, spec: ModelSpec) -> int:
    """Side of the square picture that the tower gets, in pixels.

    Raises:
        IncompatibleParts: another size than its own for a tower that does not interpolate its positions, or a side
            that its patches do not divide.
    """
    own, patch = _one(config.image_size, "image_size"), _one(config.patch_size, "patch_size")
    side = spec.image_size
    if side is None or side == own:
        return own
    family = family_of(config)
    if not family.interpolates:
        raise IncompatibleParts(
            f"model.image_size={side}, but a {family.name} tower has positions for {own} pixels only; "
            f"leave it out, or choose a tower that interpolates, such as DINOv2"
        )
    if side % patch:
        fitting = sorted({max(1, side // patch) * patch, -(-side // patch) * patch})
        raise IncompatibleParts(
            f"model.image_size={side} is not divided by the tower's patches of {patch} pixels; "
            f"set {' or '.join(map(str, fitting))}"
        )
    return side


def _one(size: Any, name: str) -> int:
    sides = {size} if isinstance(size, int) else set(size)
    if len(sides) != 1:
        raise IncompatibleParts(f"the vision tower's {name} is {size}, which is no square; choose another tower")
    return int(sides.pop())


def num_image_tokens(config: Any, spec: ModelSpec) -> int:
    """Image tokens of a picture, from the tower's configuration: 49 for CLIP B/32 without the class token.

    Raises:
        IncompatibleParts: a class token is to be dropped that the tower does not have, or pixel shuffle finds other
            tokens than those of a grid that it divides.
    """
    family, grid = family_of(config), image_side(config, spec) // _one(config.patch_size, "patch_size")
    extra = family.num_first_tokens + getattr(config, "num_register_tokens", 0)
    if spec.vision_feature_select_strategy == "default":
        if not family.num_first_tokens:
            raise IncompatibleParts(
                f"a {family.name} tower has no class token to drop; "
                "set model.vision_feature_select_strategy=full (--set does)"
            )
        extra -= 1
    if (r := spec.pixel_shuffle) == 1:
        return grid * grid + extra
    if extra:
        raise IncompatibleParts(
            f"model.pixel_shuffle={r} joins neighbouring patches, but {extra} of the tower's features "
            f"{'is no patch' if extra == 1 else 'are no patches'} (class token, registers); set "
            "model.vision_feature_select_strategy=default, choose a tower without registers, or set pixel_shuffle=1"
        )
    if grid % r:
        divisors = [str(k) for k in range(1, grid + 1) if grid % k == 0]
        raise IncompatibleParts(
            f"model.pixel_shuffle={r} does not divide the tower's {grid} x {grid} patches; "
            f"set it to one of {', '.join(divisors)}"
        )
    return (grid // r) ** 2


def check_context(text: Any, image_tokens: int) -> None:
    """Whether the language model can read a picture and a short question.

    Raises:
        IncompatibleParts: its context is shorter.
    """
    longest = getattr(text, "max_position_embeddings", None)
    if longest is not None and longest < image_tokens + FEWEST_TEXT_TOKENS:
        raise IncompatibleParts(
            f"a picture takes {image_tokens} tokens and its question some {FEWEST_TEXT_TOKENS} more, but the language "
            f"model reads {longest} at most; set model.pixel_shuffle=2, or choose a tower of fewer patches or a "
            "language model with a longer context"
        )


def tower_keys(state: Mapping[str, Any], family: Family) -> dict[str, Any]:
    """A checkpoint's weights under the names that transformers 5 has for them."""
    out: dict[str, Any] = {}
    for key, value in state.items():
        for prefix in family.prefixes:
            key = key.removeprefix(prefix)
        for pattern, name in family.renames.items():
            key = re.sub(pattern, name, key)
        for whole, names in family.halves.items():
            if whole in key and len(value) % 2 == 0:
                half = len(value) // 2
                out |= {key.replace(whole, name): part for name, part in zip(names, value.split(half), strict=True)}
                break
        else:
            out[key] = value
    return out
