"""Findings about this machine: versions, device, disk, memory, the way to the hub."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, metadata, requires, version

import psutil
import requests
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from llava_pipeline.operations.finding import Finding, problem, warning, well
from llava_pipeline.spec import RunSpec
from llava_pipeline.store import home
from llava_pipeline.tracking.spool import REFUSED, waiting

PACKAGE = "llava-pipeline"
ROWS_BYTES = 1_000_000_000  # for rows, samples and checkpoints of a night, beside downloads and tower features
HUB_SECONDS, DRIVER_SECONDS = 5.0, 20.0
INSTALL = "install as the README says, with deploy/setup.sh, in an environment of its own"


def of_this_machine(spec: RunSpec) -> list[Finding]:
    """Everything about this machine that a run of a spec asks for."""
    from llava_pipeline.model.plan import plan

    planned = plan(spec)
    downloads = sum(item.num_bytes or 0 for item in planned.downloads)
    needed = downloads + ROWS_BYTES
    features = int(spec.training.features_gb * 1e9)
    return [
        python(), *libraries(requires(PACKAGE) or []), device(), disk(needed, needed + features),
        memory(planned.memory_bytes_estimate), hub(),
    ]  # fmt: skip


def python() -> Finding:
    """Whether this Python is one that the package takes."""
    allowed = SpecifierSet(metadata(PACKAGE)["Requires-Python"])
    found = platform.python_version()
    if found in allowed:
        return well("Python", found)
    return problem("Python", f"{found}, which is not in {allowed}", INSTALL)


def libraries(requirements: Sequence[str]) -> list[Finding]:
    """Those that are missing or of another version than is allowed; one finding that all is well where none is."""
    wanted = [Requirement(text) for text in requirements]
    needed = [one for one in wanted if one.marker is None or one.marker.evaluate({"extra": ""})]
    wrong = [finding for one in needed if (finding := _library(one)) is not None]
    return wrong or [well("libraries", f"{len(needed)} of the versions that are allowed")]


def _library(wanted: Requirement) -> Finding | None:
    name = f"library {wanted.name}"
    try:
        found = version(wanted.name)
    except PackageNotFoundError:
        return problem(name, "not installed", INSTALL)
    if wanted.specifier.contains(found, prereleases=True):
        return None
    return problem(name, f"{found}, which is not in {wanted.specifier}", INSTALL)


def device() -> Finding:
    """What is trained on; a card that torch cannot use is told."""
    import torch

    build = f"torch {torch.__version__}"
    if torch.cuda.is_available():
        cards = ", ".join(torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count()))
        return well("device", f"{cards}; {build}; driver {driver() or 'of unknown version'}")
    if (found := driver()) is None:
        return well("device", f"no GPU, the CPU is used ({os.cpu_count()} cores); {build}")
    if torch.version.cuda is None:
        remedy = "install the CUDA build of torch: run deploy/setup.sh on this machine again"
        return warning("device", f"a GPU (driver {found}) that {build} is not built for", remedy)
    remedy = f"update the driver to one for CUDA {torch.version.cuda}, or install a build of torch for this one"
    return problem("device", f"a GPU that {build} cannot use with driver {found}", remedy)


def driver() -> str | None:
    """Version of the GPU's driver; None where there is no GPU, or none that answers."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=DRIVER_SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = done.stdout.split()
    return lines[0] if done.returncode == 0 and lines else None


def disk(needed: int, wanted: int) -> Finding:
    """Space below the home: ``needed`` bytes or a night fails, ``wanted`` for kept tower features besides."""
    folder = next(path for path in (home(), *home().parents) if path.exists())
    free = shutil.disk_usage(folder).free
    found = f"{free / 1e9:.1f} GB free below {home()}"
    remedy = "`llava-pipeline gc`, or point LLAVA_PIPELINE_HOME at a larger disk"
    if free < needed:
        return problem("disk", f"{found}; a run takes about {needed / 1e9:.1f} GB", remedy)
    if free < wanted:
        return warning("disk", f"{found}; with kept tower features a run may take {wanted / 1e9:.1f} GB", remedy)
    return well("disk", found)


def memory(needed: int) -> Finding:
    """Free memory against the plan's estimate."""
    import torch

    if torch.cuda.is_available():
        free, what = torch.cuda.mem_get_info()[0], "of the GPU's memory free"
    else:
        free, what = int(psutil.virtual_memory().available), "of memory available"
    found = f"{free / 1e9:.1f} GB {what}; the plan says {needed / 1e9:.1f} GB"
    if free >= needed:
        return well("memory", found)
    remedy = "end what else runs here, or take a smaller profile or training.tokens_per_pass"
    return warning("memory", found, remedy)


def hub_address() -> str:
    """Of the hub, or of what stands in for it."""
    return (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")


def hub() -> Finding:
    """Whether the hub answers; what is cached needs none."""
    url = hub_address()
    try:
        status = requests.head(url, timeout=HUB_SECONDS, allow_redirects=True).status_code
    except requests.RequestException as error:
        told = "nothing within 5 s" if isinstance(error, requests.Timeout) else "no connection"
        remedy = (
            "none, where parts and data are cached, come with the package or lie in a folder; else check the network"
        )
        return warning("hub", f"{url} does not answer ({told})", remedy)
    if status >= 400:
        return warning("hub", f"{url} answers with status {status}", "check HF_ENDPOINT and the proxy's settings")
    return well("hub", f"{url} answers")


def spool() -> Finding:
    """Nights that were trained while MLflow was away, and wait to be sent."""
    refused = sorted((home() / "spool" / REFUSED).glob("*.json"))
    if refused:
        remedy = "mend what the .txt beside each says, and move it back into the folder above, or delete both"
        return problem("spool", f"{len(refused)} nights could not be recorded: {refused[0].parent}", remedy)
    if not (nights := waiting()):
        return well("spool", "no night waits to be recorded")
    since = datetime.fromtimestamp(nights[0].began, UTC).strftime("%Y-%m-%d %H:%M UTC")
    remedy = "start MLflow; the deployment ship/hourly records them"
    return warning("spool", f"{len(nights)} nights wait to be recorded, since {since}", remedy)
