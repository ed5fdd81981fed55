"""API keys. A file holds their hashes, a line each: ``name sha256hex``; a key itself is shown once and kept nowhere.

A key has 256 random bits, so a plain hash tells nothing of it: no salt, no slow hashing.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import hmac
import os
import re
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path

from llava_pipeline.errors import KeyFileRefused, NotFound

PREFIX = "llava-"
MAX_FILE_BYTES = 1 << 20
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_LINE = re.compile(rf"({_NAME.pattern})[ \t]+([0-9a-f]{{64}})")


def new_key() -> str:
    """A new key: ``llava-`` and 32 random bytes, URL-safe."""
    return PREFIX + secrets.token_urlsafe(32)


class Keys:
    """The keys that a server accepts, as hashes by name."""

    def __init__(self, hashes: dict[str, str]) -> None:
        self._hashes = tuple((name, bytes.fromhex(digest)) for name, digest in hashes.items())

    @classmethod
    def read(cls, path: Path) -> Keys:
        """The keys in a file.

        Raises:
            NotFound: there is no such file.
            KeyFileRefused: others can write it, a line is no key and no comment, a name comes twice, or there is none.
        """
        hashes = _parse(path, _read(path))
        if not hashes:
            raise KeyFileRefused(f"{path} has no key in it; add one")
        return cls(hashes)

    def check(self, token: str) -> str | None:
        """The name of a key, or None. It takes as long whichever key it is, and whether it is one."""
        asked = _digest(token)
        found: str | None = None
        for name, known in self._hashes:
            if hmac.compare_digest(known, asked):
                found = name
        return found


def add_key(path: Path, name: str) -> str:
    """Make a key, note its hash under a name, and return it. The file is replaced whole, with mode 600.

    Raises:
        KeyFileRefused: the name is not one or is taken, or the file is not one of keys.
    """
    if not _NAME.fullmatch(name):
        raise KeyFileRefused(f"{name!r} is no name for a key; use up to 64 letters, digits, dots, hyphens, underscores")
    path = path.resolve()
    with _locked(path.parent):
        text = _read(path) if path.exists() else ""
        if name in _parse(path, text):
            raise KeyFileRefused(f"{path} already has a key named {name}; remove its line first")
        key = new_key()
        between = "" if not text or text.endswith("\n") else "\n"
        _replace(path, f"{text}{between}{name} {_digest(key).hex()}\n")
    return key


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).digest()


def _read(path: Path) -> str:
    try:
        # Not waiting for a pipe's other end: it is looked at, and refused, when it is open.
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError as error:
        raise NotFound(f"there is no file of API keys at {path}; add a key first") from error
    except OSError as error:
        raise KeyFileRefused(f"cannot read {path} ({error.strerror})") from error
    try:
        _check_owner(path, os.fstat(handle))
        with open(handle, "rb", closefd=False) as file:
            data = file.read(MAX_FILE_BYTES + 1)
    finally:
        os.close(handle)
    if len(data) > MAX_FILE_BYTES:
        raise KeyFileRefused(f"{path} has more than {MAX_FILE_BYTES} bytes; it is not a file of API keys")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise KeyFileRefused(f"{path} is not text; it is not a file of API keys") from error


def _check_owner(path: Path, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise KeyFileRefused(f"{path} is not a file")
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise KeyFileRefused(f"others can write {path}; chmod 600 it")
    if status.st_uid not in (0, os.geteuid()):
        raise KeyFileRefused(f"{path} belongs to another user, who can write it; chown it")


def _parse(path: Path, text: str) -> dict[str, str]:
    hashes: dict[str, str] = {}
    for number, line in enumerate(text.split("\n"), 1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        match = _LINE.fullmatch(line)
        if match is None:  # not shown: it may be a key that somebody pasted
            raise KeyFileRefused(f"line {number} of {path} is not a name and a SHA-256 in hexadecimal")
        if match[1] in hashes:
            raise KeyFileRefused(f"line {number} of {path} has a name that came before: {match[1]}")
        hashes[match[1]] = match[2]
    return hashes


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Alone in changing keys in this folder."""
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise KeyFileRefused(f"cannot write in {folder} ({error.strerror})") from error
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
        os.fsync(handle)
    finally:
        os.close(handle)


def _replace(path: Path, text: str) -> None:
    new = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        with open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        new.replace(path)
    except OSError as error:
        raise KeyFileRefused(f"cannot write {path} ({error.strerror})") from error
    finally:
        new.unlink(missing_ok=True)
