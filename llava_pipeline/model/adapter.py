"""A LoRA on the language model, through peft: put beside the frozen weights, asked, taken away, or folded into them.

Its weights are ``adapter.<layer>.lora_A.weight`` (rank, in) and ``adapter.<layer>.lora_B.weight`` (out, rank) in what a
training leaves behind, with ``adapter.scale`` (), so that a state says all that it takes to apply it. Several may lie
beside the same weights under names; each conversation of a batch may ask another one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from llava_pipeline.errors import IncompatibleParts, WeightsMismatch
from llava_pipeline.spec import LoraSpec

State = dict[str, Tensor]
PREFIX, SCALE = "adapter.", "adapter.scale"
ONE = "one"  # name of the adapter where there is one at a time
NONE = "__base__"  # what peft calls none


def layers(language_model: nn.Module) -> dict[str, Any]:
    """Its matrices that have a place for an adapter, by name; empty before the first one is put."""
    from peft.tuners.lora import LoraLayer

    return {name: module for name, module in language_model.named_modules() if isinstance(module, LoraLayer)}


def inject(language_model: nn.Module, lora: LoraSpec, seed: int) -> None:
    """A fresh adapter, in float32, that changes nothing yet: its second matrices are zeros.

    Raises:
        IncompatibleParts: the model has none of the targets.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        _inject(language_model, ONE, lora.rank, lora.alpha, lora.targets)
    for layer in layers(language_model).values():
        for half in (layer.lora_A, layer.lora_B):
            half[ONE].float()


def _inject(language_model: nn.Module, name: str, rank: int, alpha: float, targets: Sequence[str]) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(targets), lora_dropout=0.0)  # type: ignore[arg-type]
    try:
        inject_adapter_in_model(config, language_model, name)
        del language_model.peft_config  # what peft notes of itself: with it there it warns of a second adapter
    except ValueError as error:  # peft's only sign that no module has such a name
        raise IncompatibleParts(
            f"the language model has no matrix named {' or '.join(targets)}; set training.lora.targets to names it has"
        ) from error


def check(language_model: nn.Module, lora: LoraSpec) -> None:
    """Raises:
    IncompatibleParts: the adapter that is there is not the one that is asked for.
    """
    found = layers(language_model)
    on = {name.rpartition(".")[2] for name in found}
    leaves = {name.rpartition(".")[2] for name, _ in language_model.named_modules()}
    wanted = (lora.rank, lora.alpha / lora.rank, leaves.intersection(lora.targets))
    for layer in found.values():
        had = (layer.r[ONE], float(layer.scaling[ONE]), on)
        if had != wanted:
            raise IncompatibleParts(
                f"it begins with an adapter of rank {had[0]} and scale {had[1]:g} on {', '.join(sorted(on))}, the spec "
                f"asks for rank {wanted[0]} and scale {wanted[1]:g} on {', '.join(sorted(wanted[2]))}; "
                "set training.lora to the same"
            )


def parameters(language_model: nn.Module) -> dict[str, nn.Parameter]:
    """What of the adapter is learned, by its name in a state."""
    found = {}
    for name, layer in layers(language_model).items():
        for half in ("lora_A", "lora_B"):
            if ONE in getattr(layer, half):
                found[f"{PREFIX}{name}.{half}.weight"] = getattr(layer, half)[ONE].weight
    return found


def scale(language_model: nn.Module) -> Tensor:
    """() alpha / rank of the adapter."""
    return torch.tensor(float(next(iter(layers(language_model).values())).scaling[ONE]))


def put(language_model: nn.Module, state: State, name: str = ONE) -> None:
    """Put the adapter of a state in place of the one of this name; without one in it, take that away.

    Raises:
        WeightsMismatch: it does not fit the model.
    """
    remove(language_model, name)
    first = {key: value for key, value in state.items() if key.endswith(".lora_A.weight")}
    if not first:
        return
    rank, targets = len(next(iter(first.values()))), [_layer_of(key) for key in first]
    known = dict(language_model.named_modules())
    if unknown := [target for target in targets if target not in known]:
        raise WeightsMismatch(
            f"the adapter is for {unknown[0]}, which the language model does not have; train it again"
        )
    _inject(language_model, name, rank, float(state[SCALE]) * rank, targets)
    try:
        _fill(language_model, state, name, targets)
    except WeightsMismatch:
        remove(language_model, name)
        raise


def _fill(language_model: nn.Module, state: State, name: str, targets: Sequence[str]) -> None:
    with torch.no_grad():
        for target in targets:
            layer: Any = language_model.get_submodule(target)
            for half in ("lora_A", "lora_B"):
                weight, value = getattr(layer, half)[name], state.get(f"{PREFIX}{target}.{half}.weight")
                if value is None or value.shape != weight.weight.shape:
                    found, wanted = None if value is None else tuple(value.shape), tuple(weight.weight.shape)
                    raise WeightsMismatch(
                        f"the adapter of {target} is {found}, the model asks for {wanted}; train it again"
                    )
                weight.float().weight.copy_(value)
    for parameter in language_model.parameters():
        parameter.requires_grad_(False)


def _layer_of(key: str) -> str:
    return key.removeprefix(PREFIX).removesuffix(".lora_A.weight")


def remove(language_model: nn.Module, name: str = ONE) -> None:
    """Take an adapter away; with the last one its places go too, and the model is as it was."""
    found = layers(language_model)
    others = False
    for layer in found.values():
        if name in layer.lora_A:
            layer.delete_adapter(name)
        others = others or len(layer.lora_A) > 0
    if found and not others:
        for path, layer in found.items():
            parent, _, leaf = path.rpartition(".")
            setattr(language_model.get_submodule(parent), leaf, layer.get_base_layer())


def remove_all(language_model: nn.Module) -> None:
    """Take every adapter away."""
    for name in {name for layer in layers(language_model).values() for name in layer.lora_A}:
        remove(language_model, name)


def merge(language_model: nn.Module) -> None:
    """Fold the adapter into the weights, in float32, and leave plain matrices."""
    found = layers(language_model)
    with torch.no_grad():
        for layer in found.values():
            if ONE in layer.lora_A:
                weight = layer.get_base_layer().weight
                difference = layer.lora_B[ONE].weight @ layer.lora_A[ONE].weight * layer.scaling[ONE]
                weight.copy_(weight.float() + difference.to(weight.device))
    remove(language_model)


@contextmanager
def asked(language_model: nn.Module, names: Sequence[str | None]) -> Iterator[None]:
    """Within, row ``k`` of a batch is read with the adapter ``names[k]``, or with none."""
    found = list(layers(language_model).values())
    if len(different := set(names)) <= 1:
        name = next(iter(different), None)
        for layer in found:
            layer._disable_adapters = name is None
            layer._active_adapter = [] if name is None else [name]
        yield
        return
    rows = [NONE if name is None else name for name in names]

    def told(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, kwargs | {"adapter_names": rows}

    for layer in found:
        layer._disable_adapters = False
    hooks = [layer.register_forward_pre_hook(told, with_kwargs=True) for layer in found]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
