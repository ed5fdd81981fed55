"""Keys are kept as hashes, in a file that its owner alone can write, and told apart in constant time."""

from __future__ import annotations

import hashlib
import hmac
import os
import stat
import threading
from pathlib import Path

import pytest

from llava_pipeline.errors import KeyFileRefused, NotFound, UserError
from llava_pipeline.serving import keys as module
from llava_pipeline.serving.keys import PREFIX, Keys, add_key, new_key

HASH = hashlib.sha256(b"llava-one").hexdigest()
OTHER = hashlib.sha256(b"llava-two").hexdigest()


def a_file(folder: Path, text: str, mode: int = 0o600) -> Path:
    path = folder / "keys"
    path.write_text(text)
    path.chmod(mode)
    return path


def refusal(path: Path) -> str:
    with pytest.raises(KeyFileRefused) as caught:
        Keys.read(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_new_key_has_256_random_bits_and_no_character_that_needs_quoting() -> None:
    made = {new_key() for _ in range(200)}
    assert len(made) == 200
    for key in made:
        assert key.startswith(PREFIX)
        assert len(key) == len(PREFIX) + 43
        assert set(key) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_")


def test_a_key_is_known_by_its_name_and_nothing_else_is(tmp_path: Path) -> None:
    keys = Keys.read(a_file(tmp_path, f"# ours\n\n  one {HASH}  \ntwo\t{OTHER}"))
    assert keys.check("llava-one") == "one"
    assert keys.check("llava-two") == "two"
    for wrong in ("", "llava-", "llava-One", "llava-one ", HASH, "one", "\udcff", "é", "x" * 100_000):
        assert keys.check(wrong) is None


def test_every_entry_is_compared_in_constant_time_whichever_matches(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[bytes] = []
    compare = hmac.compare_digest

    def noted(known: bytes, asked: bytes) -> bool:
        compared.append(known)
        return compare(known, asked)

    monkeypatch.setattr(module.hmac, "compare_digest", noted)
    keys = Keys({f"k{n}": hashlib.sha256(f"key{n}".encode()).hexdigest() for n in range(5)})
    for token in ("key0", "key4", "none"):
        compared.clear()
        keys.check(token)
        assert len(compared) == 5


@pytest.mark.parametrize(
    "line",
    [
        "one",
        HASH,
        f"one {HASH[:-1]}",
        f"one {HASH}0",
        f"one {HASH.upper()}",
        f"one {HASH} more",
        f"one: {HASH}",
        f"-one {HASH}",
        f"{'n' * 65} {HASH}",
        f"o\0ne {HASH}",
        "one llava-this-is-the-key-itself",
        f"one\r{HASH}",
    ],
)
def test_a_line_that_is_no_key_is_refused_by_its_number_and_never_shown(tmp_path: Path, line: str) -> None:
    message = refusal(a_file(tmp_path, f"# first\n{line}\n"))
    assert "line 2" in message
    assert line not in message


@pytest.mark.parametrize("text", ["", "\n\n", "# one\n"])
def test_a_file_without_a_key_is_refused(tmp_path: Path, text: str) -> None:
    assert "has no key" in refusal(a_file(tmp_path, text))


def test_a_name_that_comes_twice_is_refused(tmp_path: Path) -> None:
    assert "came before: one" in refusal(a_file(tmp_path, f"one {HASH}\none {OTHER}\n"))


@pytest.mark.parametrize("mode", [0o620, 0o602, 0o666, 0o660])
def test_a_file_that_others_can_write_is_refused(tmp_path: Path, mode: int) -> None:
    assert "others can write" in refusal(a_file(tmp_path, f"one {HASH}\n", mode))


@pytest.mark.parametrize("mode", [0o600, 0o400, 0o640, 0o644])
def test_a_file_that_others_can_only_read_is_accepted(tmp_path: Path, mode: int) -> None:
    assert Keys.read(a_file(tmp_path, f"one {HASH}\n", mode)).check("llava-one") == "one"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_a_file_of_another_user_is_accepted_from_nobody_but_root(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = a_file(tmp_path, f"one {HASH}\n")
    os.chown(path, 12345, -1)
    assert "belongs to another user" in refusal(path)
    os.chown(path, 0, -1)
    monkeypatch.setattr(module.os, "geteuid", lambda: 12345)
    assert Keys.read(path).check("llava-one") == "one"


def test_what_is_no_file_of_keys_is_refused_without_waiting_for_it(tmp_path: Path) -> None:
    pipe, binary, large = tmp_path / "pipe", tmp_path / "binary", tmp_path / "large"
    os.mkfifo(pipe, 0o600)
    binary.write_bytes(b"\xff\xfe")
    large.write_bytes(b"#" * (module.MAX_FILE_BYTES + 1))
    for path, words in ((tmp_path, "not a file"), (pipe, "not a file"), (binary, "not text"), (large, "bytes")):
        path.chmod(0o700)
        assert words in refusal(path)
    with pytest.raises(NotFound, match="add a key first"):
        Keys.read(tmp_path / "absent")
    assert issubclass(KeyFileRefused, UserError)


def test_a_key_is_added_with_mode_600_beside_what_was_there(tmp_path: Path) -> None:
    path = a_file(tmp_path, f"# ours\none {HASH}", 0o644)
    key = add_key(path, "laptop-2")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert path.read_text().startswith(f"# ours\none {HASH}\nlaptop-2 ")
    assert key not in path.read_text()
    keys = Keys.read(path)
    assert (keys.check(key), keys.check("llava-one")) == ("laptop-2", "one")
    assert [file.name for file in tmp_path.iterdir()] == ["keys"]


def test_the_first_key_makes_the_file_and_a_link_stays_one(tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "keys")
    key = add_key(link, "first")
    assert link.is_symlink()
    assert Keys.read(tmp_path / "keys").check(key) == "first"


@pytest.mark.parametrize("name", ["", "two words", "a\nb", "#x", "é", "n" * 65, "one"])
def test_a_name_that_is_none_or_is_taken_is_refused_and_the_file_stays(tmp_path: Path, name: str) -> None:
    path = a_file(tmp_path, f"one {HASH}\n")
    with pytest.raises(KeyFileRefused):
        add_key(path, name)
    assert path.read_text() == f"one {HASH}\n"
    assert len(list(tmp_path.iterdir())) == 1


def test_a_key_is_not_added_where_it_cannot_be_written_or_others_could(tmp_path: Path) -> None:
    with pytest.raises(KeyFileRefused, match="cannot write in"):
        add_key(tmp_path / "absent" / "keys", "one")
    with pytest.raises(KeyFileRefused, match="others can write"):
        add_key(a_file(tmp_path, "", 0o666), "one")


def test_keys_that_are_added_at_the_same_time_are_all_there(tmp_path: Path) -> None:
    path, made = tmp_path / "keys", {}
    threads = [
        threading.Thread(target=lambda name=f"k{n}": made.update({name: add_key(path, name)})) for n in range(12)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    keys = Keys.read(path)
    assert {name: keys.check(key) for name, key in made.items()} == {f"k{n}": f"k{n}" for n in range(12)}
