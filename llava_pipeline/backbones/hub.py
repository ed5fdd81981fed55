"""Files of a model repository on the Hugging Face hub, through its cache on this machine."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import time
from dataclasses import dataclass
from pathlib import Path

from llava_pipeline import store
from llava_pipeline.backbones.layout import SIDE_FILES, shards_of
from llava_pipeline.errors import BackboneUnavailable, DigestMismatch, NotFound
from llava_pipeline.spec import HubBackbone

logger = logging.getLogger(__name__)

REMEDY = (
    "connect this machine, or name a folder laid out as the hub lays it with --set backbones.source=DIR "
    "(DIR/owner/name), or take a profile that downloads nothing, such as pocket"
)
_PASSING_STATUS = (408, 425, 429, 500, 502, 503, 504)
_LONGEST_PAUSE = 8.0
_HEAD_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class _Repository:
    """A hub repository at one commit, with the environment's hub and cache as they are now."""

    repo_id: str
    revision: str
    endpoint: str | None
    cache: Path


def _repository(part: HubBackbone) -> _Repository:
    from huggingface_hub import constants

    # huggingface_hub reads these once, at import, which may have been before they were set.
    if folder := os.environ.get("HF_HUB_CACHE"):
        cache = Path(folder)
    elif folder := os.environ.get("HF_HOME"):
        cache = Path(folder) / "hub"
    else:
        cache = Path(constants.HF_HUB_CACHE)
    endpoint = (os.environ.get("HF_ENDPOINT") or "").rstrip("/") or None
    return _Repository(part.repo_id, part.revision, endpoint, cache.expanduser().absolute())


def hub_files(part: HubBackbone, patience_seconds: float) -> dict[str, Path]:
    """Where the cache holds each file of a part, by name, after downloading what it did not hold.

    Raises:
        BackboneUnavailable: the hub is out of reach or refuses, and the cache does not hold a whole part.
        NotFound: the hub has no such repository, commit or file.
        DigestMismatch: a file is not the pinned one; it is removed from the cache, so that it is downloaded anew.
        DiskFull: no space left for the cache.
    """
    repository = _repository(part)
    files = _all_files(repository, part, patience_seconds)
    files |= _shards(repository, files[part.weights], patience_seconds)
    _check_pins(repository, part, files)
    return files


def _all_files(repository: _Repository, part: HubBackbone, patience_seconds: float) -> dict[str, Path]:
    """Where the cache holds each file the repository has, downloading those it does not hold yet."""
    from huggingface_hub import try_to_load_from_cache

    files: dict[str, Path] = {}
    unknown: list[str] = []
    for name in (*SIDE_FILES, part.weights):
        hit = try_to_load_from_cache(repository.repo_id, name, repository.cache, repository.revision)
        if isinstance(hit, str):
            files[name] = Path(hit)
        elif hit is None:  # anything else is the cache's note that the commit has no such file
            unknown.append(name)
    enough = _is_enough(files, part.weights)
    for position, name in enumerate(unknown):
        try:
            path = _ask_hub(repository, name, 0.0 if enough else patience_seconds)
        except BackboneUnavailable as error:
            if not enough:
                raise
            logger.warning(
                "%s is taken from the cache without asking for %s, because %s",
                *(repository.repo_id, ", ".join(unknown[position:]), error),
            )
            break
        if path is not None:
            files[name] = path
    needed = {part.weights, *part.sha256.keys() & set(SIDE_FILES)}
    if not part.weights.endswith(".gguf"):
        needed.add("config.json")
    if missing := sorted(needed - files.keys()):
        raise NotFound(
            f"{repository.repo_id} at {repository.revision[:12]} has no {', '.join(missing)}; "
            "correct `weights`, `sha256` or `revision` of the part in the spec"
        )
    return files


def _shards(repository: _Repository, weights: Path, patience_seconds: float) -> dict[str, Path]:
    """Where the cache holds the files that an index of weights names, after downloading what it did not hold."""
    from huggingface_hub import try_to_load_from_cache

    found = {}
    for name in shards_of(weights):
        hit = try_to_load_from_cache(repository.repo_id, name, repository.cache, repository.revision)
        path = Path(hit) if isinstance(hit, str) else _ask_hub(repository, name, patience_seconds)
        if path is None:
            raise NotFound(
                f"{repository.repo_id} at {repository.revision[:12]} has no {name}, which its {weights.name} names; "
                "correct `weights` or `revision` of the part in the spec"
            )
        found[name] = path
    return found


def _is_enough(files: dict[str, Path], weights: str) -> bool:
    """Whether what the cache holds makes a whole part, so that a hub out of reach is no reason to stop."""
    if weights not in files:
        return False
    if weights.endswith(".gguf"):
        return True
    if "config.json" not in files:
        return False
    try:
        model_type = str(json.loads(files["config.json"].read_text(encoding="utf-8")).get("model_type", ""))
    except (OSError, ValueError, AttributeError):
        return False
    processors, tokenizers = (
        ("preprocessor_config.json", "processor_config.json"),
        ("tokenizer.json", "tokenizer.model"),
    )
    is_tower = any(kind in model_type for kind in ("clip", "siglip", "dinov2"))
    return any(name in files for name in (processors if is_tower else tokenizers))


def _ask_hub(repository: _Repository, name: str, patience_seconds: float) -> Path | None:
    """One file, now in the cache, or None where the commit has no such file; errors that may pass are waited out."""
    from huggingface_hub import errors

    deadline: float | None = None
    pause = 0.5
    while True:
        try:
            return _download(repository, name)
        except errors.RemoteEntryNotFoundError:
            return None
        # HTTPError is httpx's or httpx2's, by the version of huggingface_hub. RuntimeError is what hf_xet raises.
        except (errors.HTTPError, OSError, RuntimeError) as error:  # type: ignore[attr-defined]
            _raise_local_trouble(error, repository.cache)
            asked = _pause_asked(error)
            if asked is None:
                raise _refusal(error, repository) from error
            now = time.monotonic()
            deadline = now + patience_seconds if deadline is None else deadline
            wait = max(asked, pause)
            if now + wait > deadline:
                raise BackboneUnavailable(
                    f"cannot get {name} of {repository.repo_id}, which is not in the cache at {repository.cache}: "
                    f"{_first_line(error)} (asked for {patience_seconds:g} s); {REMEDY}"
                ) from error
            logger.info(
                "%s of %s did not come (%s); asking again in %.1f s", name, repository.repo_id, _first_line(error), wait
            )
            time.sleep(wait)
            pause = min(pause * 2, _LONGEST_PAUSE)


def _download(repository: _Repository, name: str) -> Path:
    from huggingface_hub import HfApi, errors, hf_hub_download, hf_hub_url

    repo_id, revision, endpoint = repository.repo_id, repository.revision, repository.endpoint
    url = hf_hub_url(repo_id, name, revision=revision, endpoint=endpoint)
    # hf_hub_download asks a hub that is down for half a minute by itself; this asks once, so patience is ours to keep.
    # A file that is not there is left to hf_hub_download, which notes it in the cache.
    with contextlib.suppress(errors.RemoteEntryNotFoundError):
        HfApi(endpoint=endpoint).get_hf_file_metadata(url=url, timeout=_HEAD_SECONDS)
    return Path(hf_hub_download(repo_id, name, revision=revision, endpoint=endpoint, cache_dir=repository.cache))


def _raise_local_trouble(error: Exception, cache: Path) -> None:
    """Trouble of this machine's disk is neither the hub's doing nor cured by asking again."""
    from huggingface_hub import errors

    if not isinstance(error, OSError) or error.errno is None:
        return
    if isinstance(error, ConnectionError | TimeoutError | errors.HfHubHTTPError):
        return
    store.tell_disk_full(error, cache, "HF_HOME")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR):
        raise BackboneUnavailable(
            f"cannot write the hub's cache at {cache} ({error.strerror}); set HF_HOME to a folder that can be written"
        ) from error


def _pause_asked(error: BaseException) -> float | None:
    """The seconds the hub asks to wait (0 if it names none) where an error may pass; None where it will not."""
    from huggingface_hub import errors

    if isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__ is not None:
        return _pause_asked(error.__cause__)
    if isinstance(error, errors.OfflineModeIsEnabled | errors.FileMetadataError):
        return None
    if isinstance(error, errors.HfHubHTTPError):
        if error.response.status_code not in _PASSING_STATUS:
            return None
        asked = error.response.headers.get("Retry-After", "0")
        return float(asked) if asked.isdigit() else 0.0
    return 0.0


def _refusal(error: Exception, repository: _Repository) -> BackboneUnavailable | NotFound:
    """What a final answer of the hub means, and what to do about it."""
    from huggingface_hub import errors

    name = f"{repository.repo_id} at {repository.revision[:12]}"
    match error:
        case errors.GatedRepoError():  # a kind of RepositoryNotFoundError
            why = f"{name} is gated; accept its terms on its page at the hub and set HF_TOKEN"
        case errors.RepositoryNotFoundError():
            return NotFound(
                f"the hub has no public {repository.repo_id}; correct `repo_id`, or set HF_TOKEN, or {REMEDY}"
            )
        case errors.RevisionNotFoundError():
            return NotFound(
                f"{repository.repo_id} has no commit {repository.revision}; correct `revision` of the part in the spec"
            )
        case errors.HfHubHTTPError():
            why = f"the hub refuses {name} with status {error.response.status_code}; set HF_TOKEN if it needs one"
        case errors.OfflineModeIsEnabled():
            why = f"{name} is not in the cache at {repository.cache} and HF_HUB_OFFLINE is set; unset it"
        case _:
            why = f"cannot get {name}: {_first_line(error)}; check HF_ENDPOINT and the proxy's settings"
    return BackboneUnavailable(f"{why}, or {REMEDY}")


def _first_line(error: BaseException) -> str:
    from huggingface_hub import errors

    if isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__ is not None:
        return _first_line(error.__cause__)
    if isinstance(error, errors.HfHubHTTPError):
        return f"the hub answers with status {error.response.status_code}"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def _check_pins(repository: _Repository, part: HubBackbone, files: dict[str, Path]) -> None:
    for name, pinned in part.sha256.items():
        if name not in files:
            continue
        found = store.sha256_of(files[name])
        if found != pinned:
            _forget(files[name], repository.cache)
            raise DigestMismatch(
                f"{name} of {repository.repo_id} at {repository.revision[:12]} has sha256 {found}, pinned is {pinned}; "
                "it was removed from the hub's cache: run again to download it anew, and if it differs again, "
                "correct the pin in the spec or do not trust the server"
            )


def _forget(path: Path, cache: Path) -> None:
    """Remove a cached file: the link of the snapshot and each file it leads to inside the cache."""
    inside = cache.resolve()
    while True:
        target = Path(os.path.normpath(path.parent.resolve() / path.readlink())) if path.is_symlink() else None
        path.unlink(missing_ok=True)
        if target is None or not target.is_relative_to(inside):
            return
        path = target
