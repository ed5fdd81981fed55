"""From an alias to a server's parts: the backbones of its version, once, and every projector that answers on them."""

from __future__ import annotations

import logging

from llava_pipeline.errors import LlavaPipelineError, NoSuchRun
from llava_pipeline.model.assemble import assemble, describe
from llava_pipeline.serving.answers import Desk, Limits
from llava_pipeline.serving.engine import Engine
from llava_pipeline.serving.metrics import Metrics
from llava_pipeline.serving.pictures import Pictures
from llava_pipeline.serving.versions import Versions
from llava_pipeline.spec import RunSpec
from llava_pipeline.stages.fetch import fetch_backbones
from llava_pipeline.tracking import bundle as bundles
from llava_pipeline.tracking import registry
from llava_pipeline.tracking.settings import Settings
from llava_pipeline.training.device import choose_device, choose_precision, place

log = logging.getLogger(__name__)


def open_desk(
    registered_model: str, aliases: tuple[str, ...], settings: Settings, max_rows: int, max_waiting: int,
    image_hosts: frozenset[str], decoders: int,
) -> Desk:  # fmt: skip
    """Load the parts of the first alias's version, and the projectors of all aliases.

    Raises:
        NoSuchRun: the first alias points to nothing.
        LlavaPipelineError: its version cannot be loaded, and no other one is kept here.
    """
    spec = _spec(registered_model, aliases[0], settings)
    backbones = fetch_backbones(spec.backbones)
    llava = assemble(backbones, spec.model)
    model = describe(llava, backbones, spec.model)
    device = choose_device("cpu" if spec.training.device == "cpu" else "auto")  # trained on a card, served without
    place(llava.model, device, choose_precision(spec.training.precision, device))
    engine = Engine(llava, max_rows=max_rows, max_waiting=max_waiting)
    versions = Versions(registered_model, aliases, llava, model, engine, settings)
    versions.start()
    processor = llava.processor
    pictures = Pictures(processor.images, allowed_hosts=image_hosts, workers=decoders)
    context = int(llava.model.config.text_config.max_position_embeddings)
    return Desk(versions, engine, pictures, processor, context, Metrics(engine, versions), Limits())


def _spec(name: str, alias: str, settings: Settings) -> RunSpec:
    """Of what an alias points to; where that cannot be had or read, of what answered last."""
    try:
        if (version := registry.aliases(name, settings).get(alias)) is None:
            raise NoSuchRun(f"{name} has no alias {alias!r}; run the profile first, or name another --alias")
        return bundles.fetch(name, version, settings).spec()
    except LlavaPipelineError as error:
        if isinstance(error, NoSuchRun) or (last := bundles.kept(name, alias)) is None:
            raise
        log.warning("%s; version %s answered last", error, last.version)
        return last.spec()
