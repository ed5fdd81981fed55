"""A picture that a client names becomes the pixels that training would see, or a refusal; whatever it is, it costs no
more than itself, and nothing is fetched that is not on the list."""

from __future__ import annotations

import asyncio
import base64
import datetime
import hashlib
import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from llava_pipeline.data.images import decode
from llava_pipeline.model.processor import IMAGE_TOKEN, ImageSettings, Processor
from llava_pipeline.serving import image_urls
from llava_pipeline.serving.image_urls import base64_of, from_base64, read_address, read_allowed_hosts
from llava_pipeline.serving.pictures import Picture, PictureRejected, Pictures, picture_of
from llava_pipeline.serving.remote import Remote, is_public
from tests.data import pictures_made as made
from tests.data.pictures_made import encoded, noise

IMAGES = ImageSettings(32, (0.48, 0.46, 0.41), (0.27, 0.26, 0.28))
CAP = 200_000
T = TypeVar("T")


def uri(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


SMALL = uri(encoded(noise()))


class Loop:
    """A loop that stays between calls, as a server's does, and pictures on it."""

    def __init__(self, **changes: Any) -> None:
        self._runner = asyncio.Runner()
        self.pictures = self.run(self._made(changes))

    async def _made(self, changes: dict[str, Any]) -> Pictures:
        return Pictures(IMAGES, **changes)

    def run(self, work: Awaitable[T]) -> T:
        async def waited() -> T:
            return await work

        return self._runner.run(waited())

    def load(self, url: str) -> Picture:
        return self.run(self.pictures.load(url))

    def refusal(self, url: str) -> PictureRejected:
        with pytest.raises(PictureRejected) as caught:
            self.load(url)
        error = caught.value
        assert error.status in (400, 413, 415, 503)
        assert error.message.endswith(".")
        secrets = ("at 0x", "/work", "/tmp", ".py", "Traceback", "\n", "127.0")
        assert not [word for word in secrets if word in error.message]
        return error

    def pids(self) -> list[int]:
        return [decoder._process.pid for decoder in self.pictures._running]

    def close(self) -> None:
        self.run(self.pictures.close())
        self._runner.close()


@pytest.fixture(scope="module")
def loop() -> Iterator[Loop]:
    loop = Loop(max_bytes=2 * CAP)
    yield loop
    loop.close()


@pytest.fixture
def make() -> Iterator[Callable[..., Loop]]:
    """Pictures of one test alone."""
    loops: list[Loop] = []

    def made_loop(**changes: Any) -> Loop:
        loops.append(Loop(**changes))
        return loops[-1]

    yield made_loop
    for each in loops:
        each.close()


def gone(pid: int, seconds: float = 5.0) -> bool:
    """Whether a process ends in time."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.02)
    return False


# --------------------------------------------------------------------------------------------- the same pixels


def some_pictures() -> dict[str, bytes]:
    turned = noise(40, 24).getexif()
    turned[0x0112] = 6
    grey = Image.fromarray(np.linspace(0, 65535, 40 * 30).astype(np.uint16).reshape(30, 40))
    return {
        "png": encoded(noise(40, 24)),
        "jpeg turned by EXIF": encoded(noise(40, 24), "JPEG", exif=turned),
        "alpha": encoded(noise(20, 50).convert("RGBA").resize((9, 90))),
        "16 bits": encoded(grey),
        "webp": encoded(noise(50, 50), "WEBP", lossless=True),
        "gif": encoded(noise(33, 17).quantize(16), "GIF"),
        "bmp": encoded(noise(100, 8), "BMP"),
        "cmyk": encoded(noise(31, 40).convert("CMYK"), "JPEG"),
        "of the very size": encoded(noise(32, 32)),
    }


@pytest.fixture(scope="module")
def processor() -> Processor:
    """One as training has it, of the smallest tokenizer."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel({"a": 0, "?": 1, IMAGE_TOKEN: 2}, unk_token="?")),
        additional_special_tokens=[IMAGE_TOKEN],
    )
    return Processor(tokenizer, "", IMAGES, 4)


@pytest.mark.parametrize("name", some_pictures())
def test_pixels_are_those_that_training_sees(loop: Loop, processor: Processor, name: str) -> None:
    data = some_pictures()[name]
    picture = loop.load(uri(data))
    expected = processor.resize(decode(data))
    assert picture.pixels.dtype == np.uint8
    assert np.array_equal(picture.pixels, expected)
    assert not picture.pixels.flags.writeable


def test_a_digest_is_of_the_pixels_and_not_of_the_file(loop: Loop) -> None:
    image = noise(32, 32)
    png, bmp = loop.load(uri(encoded(image))), loop.load(uri(encoded(image, "BMP"), "image/bmp"))
    assert png.digest == bmp.digest == loop.load(uri(encoded(image))).digest
    assert png.digest != loop.load(uri(encoded(noise(32, 32, seed=1)))).digest
    assert png.digest == hashlib.sha256(b"(32, 32, 3)" + png.pixels.tobytes()).hexdigest()
    pixels = png.pixels.copy()
    assert (
        picture_of(pixels).digest
        == picture_of(pixels.transpose(1, 0, 2).copy().transpose(1, 0, 2)).digest
        == png.digest
    )
    assert (pixels.flags.writeable, picture_of(pixels).pixels.flags.writeable) == (True, False)
    assert picture_of(pixels.reshape(16, 64, 3)).digest != png.digest


def test_pictures_of_equal_bytes_and_another_size_differ(loop: Loop) -> None:
    wide, high = (encoded(Image.new("RGB", size, "red")) for size in ((32, 16), (16, 32)))
    assert loop.load(uri(wide)).digest != loop.load(uri(high)).digest


# --------------------------------------------------------------------------------------------- data URIs


@pytest.mark.parametrize(
    "head",
    [
        "data:image/png;base64", "DATA:IMAGE/PNG;BASE64", "Data:image/jpeg;base64", "data:image/jpg;base64",
        "data:image/png;charset=utf-8;name=a%20b.png;base64", "data:image/webp;base64",
        "data:application/octet-stream;base64",
    ],
)  # fmt: skip
def test_a_data_uri_may_be_written_so_and_its_bytes_decide(loop: Loop, head: str) -> None:
    assert loop.load(f"{head},{SMALL.partition(',')[2]}").digest == loop.load(SMALL).digest


GOOD = SMALL.partition(",")[2]


@pytest.mark.parametrize(
    ("url", "status", "code", "words"),
    [
        ("data:", 400, "invalid_image_url", "no comma"),
        ("data:image/png;base64", 400, "invalid_image_url", "no comma"),
        (f"data:image/png;base64;{GOOD}", 400, "invalid_image_url", "no comma"),
        (f"data:image/png;name={'x' * 300};base64,{GOOD}", 400, "invalid_image_url", "no comma"),
        ("data:image/png;base64,", 400, "invalid_image_url", "nothing behind"),
        (f"data:image/png,{GOOD}", 400, "invalid_image_url", "no ';base64'"),
        (f"data:,{GOOD}", 400, "invalid_image_url", "no ';base64'"),
        (f"data:image/png;base64;a=b,{GOOD}", 400, "invalid_image_url", "no ';base64'"),
        (f"data:image/png; base64,{GOOD}", 400, "invalid_image_url", "no ';base64'"),
        (f"data:image/png;charset;base64,{GOOD}", 400, "invalid_image_url", "name=value"),
        (f"data:;base64,{GOOD}", 415, "unsupported_image_type", "not declared"),
        (f"data:base64,{GOOD}", 400, "invalid_image_url", "no ';base64'"),
        (f"data: image/png;base64,{GOOD}", 415, "unsupported_image_type", "not declared"),
        (f"data:image/svg+xml;base64,{GOOD}", 415, "unsupported_image_type", "not declared"),
        (f"data:text/html;base64,{GOOD}", 415, "unsupported_image_type", "not declared"),
        (f"data:image/tiff;base64,{GOOD}", 415, "unsupported_image_type", "not declared"),
        (f"data:image/png;base64,{GOOD}\n", 400, "invalid_base64", "blanks"),
        (f"data:image/png;base64, {GOOD}", 400, "invalid_base64", "blanks"),
        (f"data:image/png;base64,{GOOD[:76]}\r\n{GOOD[76:]}", 400, "invalid_base64", "blanks"),
        ("data:image/png;base64,iVBORw0K-_8=", 400, "invalid_base64", "URL-safe"),
        ("data:image/png;base64,iVBORw0K%2B", 400, "invalid_base64", "percent"),
        ("data:image/png;base64,iVBORw0", 400, "invalid_base64", "padding"),
        ("data:image/png;base64,iVBO=Rw0", 400, "invalid_base64", "padding"),
        ("data:image/png;base64,iVBORw0K====", 400, "invalid_base64", "padding"),
        ("data:image/png;base64,=", 400, "invalid_base64", "padding"),
        ("data:image/png;base64,!!!!", 400, "invalid_base64", "padding"),
        ("data:image/png;base64,äöü¥", 400, "invalid_base64", "padding"),
        ("data:image/png;base64,\ud800\udc00aa", 400, "invalid_base64", "padding"),
        ("data:image/png;base64,\0\0\0\0", 400, "invalid_base64", "padding"),
        (uri(b"<svg/>"), 400, "invalid_image", "text"),
        (uri(b"GIF89a"), 400, "invalid_image", "cut short"),
        (uri(encoded(noise())[:-20]), 400, "invalid_image", "cut short"),
        (uri(made.with_wrong_checksum(encoded(noise()))), 400, "invalid_image", "checksum"),
        (uri(encoded(Image.new("RGB", (400, 8)))), 400, "invalid_image", "image_too_long"),
        (uri(encoded(Image.new("RGB", (1, 1)))), 400, "invalid_image", "image_too_small"),
        (uri(made.blank_png(9000, 9000, 0)), 413, "image_too_large", "9000x9000"),
        (f"data:image/png;base64,{'A' * (CAP * 8 // 3 // 4 * 4 + 8)}", 413, "image_too_large", "bytes"),
    ],
)
def test_what_is_no_picture_is_refused_by_name(loop: Loop, url: str, status: int, code: str, words: str) -> None:
    error = loop.refusal(url)
    assert (error.status, error.code) == (status, code)
    assert words in error.message
    assert loop.load(SMALL)


def test_the_cap_is_exact_and_looked_at_before_the_base64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_urls.binascii, "a2b_base64", None)
    for size in (97, 98, 99, 100):
        text = base64.b64encode(bytes(size)).decode()
        assert base64_of(f"data:image/png;base64,{text}", size) == text
        with pytest.raises(PictureRejected, match="image_too_large"):
            base64_of(f"data:image/png;base64,{text}", size - 1)


def read(url: str, cap: int = 10**6) -> bytes:
    return from_base64(base64_of(url, cap))


@given(
    st.binary(min_size=1), st.sampled_from(sorted(image_urls.PICTURE_TYPES)), st.sampled_from(["data", "DATA", "dAtA"])
)
def test_every_picture_that_is_written_properly_is_read_as_it_was(data: bytes, kind: str, scheme: str) -> None:
    assert read(f"{scheme}:{kind};base64,{base64.b64encode(data).decode()}") == data


@given(st.text(max_size=60), st.sampled_from(["data:", "data:image/png;base64,", "data:image/png;", "data:image/png,"]))
def test_whatever_a_data_uri_is_it_is_read_in_one_way_or_refused(text: str, start: str) -> None:
    try:
        data = read(start + text)
    except PictureRejected:
        return
    payload = (start + text).partition(",")[2]
    assert base64.b64decode(payload, validate=True) == data
    assert len(payload) % 4 == 0


@given(st.binary(min_size=1, max_size=40), st.integers(0, 60), st.sampled_from(" \n\r\t-_%=*\0é,;"))
def test_a_stray_character_in_base64_is_never_skipped(data: bytes, place: int, stray: str) -> None:
    text = base64.b64encode(data).decode()
    place %= len(text) + 1
    with pytest.raises(PictureRejected):
        read(f"data:image/png;base64,{text[:place]}{stray}{text[place:]}")


# --------------------------------------------------------------------------------------------- processes


def test_neither_the_server_s_half_nor_the_process_imports_torch(loop: Loop) -> None:
    for module in ("pictures", "decoder"):
        heavy = "{'torch', 'transformers', 'mlflow'}"
        program = f"import sys, llava_pipeline.serving.{module}; print({heavy} & set(sys.modules))"
        assert subprocess.check_output([sys.executable, "-c", program], text=True).strip() == "set()"
    loop.load(SMALL)
    (pid,) = loop.pids()
    assert "torch" not in Path(f"/proc/{pid}/maps").read_text()
    assert psutil.Process(pid).memory_info().rss < 90e6


def test_a_process_has_limits_and_none_of_the_server_s_secrets(
    make: Callable[..., Loop], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "secret")
    loop = make(memory_bytes=100 << 20)
    loop.load(SMALL)
    process = psutil.Process(loop.pids()[0])
    assert "secret" not in process.environ().values()
    (soft, hard) = process.rlimit(psutil.RLIMIT_AS)
    assert soft == hard
    assert (100 << 20) < soft < (500 << 20)
    assert process.rlimit(psutil.RLIMIT_FSIZE) == (0, 0)
    assert process.rlimit(psutil.RLIMIT_CORE) == (0, 0)
    assert os.getsid(process.pid) == process.pid


def test_a_picture_that_takes_too_much_memory_is_refused_and_the_process_goes_on(make: Callable[..., Loop]) -> None:
    loop = make(memory_bytes=48 << 20)
    loop.load(SMALL)
    pids = loop.pids()
    for large in (made.blank_png(5000, 5000), made.blank_png(5000, 300)):  # the second as a square alone
        error = loop.refusal(uri(large))
        assert (error.status, error.code) == (413, "image_too_large")
        assert loop.load(SMALL)
    assert loop.pids() == pids


def test_a_picture_that_is_too_slow_is_refused_and_its_process_replaced(make: Callable[..., Loop]) -> None:
    loop = make(seconds=0.05)
    loop.run(loop.pictures.start())
    pids = loop.pids()
    started = time.monotonic()
    error = loop.refusal(uri(made.blank_png(6300, 6300)))
    assert (error.status, error.code) == (400, "image_too_slow")
    assert time.monotonic() - started < 2
    assert gone(pids[0])
    loop.run(loop.pictures.start())
    assert loop.pids() != pids


async def stopped(pictures: Pictures) -> tuple[int, asyncio.Task[Picture]]:
    """A picture under way in a process that stands still, as one does in an endless loop."""
    await pictures.start()
    (decoder,) = pictures._running
    os.kill(decoder._process.pid, signal.SIGSTOP)
    task = asyncio.create_task(pictures.load(SMALL))
    await asyncio.sleep(0.1)
    return decoder._process.pid, task


def outcomes(results: list[Any]) -> list[str]:
    return [result.code if isinstance(result, PictureRejected) else type(result).__name__ for result in results]


@pytest.mark.parametrize(("kill", "code"), [(True, "decoder_unavailable"), (False, "image_too_slow")])
def test_a_process_that_is_killed_or_hangs_costs_one_picture_and_no_other(
    make: Callable[..., Loop], kill: bool, code: str
) -> None:
    loop = make(seconds=1.0)

    async def story() -> list[Any]:
        pid, victim = await stopped(loop.pictures)
        others = [asyncio.create_task(loop.pictures.load(SMALL)) for _ in range(5)]
        await asyncio.sleep(0.1)
        if kill:
            os.kill(pid, signal.SIGKILL)
        return list(await asyncio.gather(victim, *others, return_exceptions=True))

    results = loop.run(story())
    assert outcomes(results) == [code] + ["Picture"] * 5
    assert results[0].status == (503 if kill else 400)


def test_a_process_that_died_while_nobody_asked_costs_nothing(make: Callable[..., Loop]) -> None:
    loop = make(workers=2)
    loop.run(loop.pictures.start())
    for pid in loop.pids():
        os.kill(pid, signal.SIGKILL)

    async def later() -> list[Picture]:
        await asyncio.sleep(0.3)
        return list(await asyncio.gather(*(loop.pictures.load(SMALL) for _ in range(4))))

    assert len({picture.digest for picture in loop.run(later())}) == 1


def test_a_picture_that_nobody_waits_for_any_more_frees_its_place(make: Callable[..., Loop]) -> None:
    loop = make(seconds=30.0)

    async def story() -> Picture:
        pid, task = await stopped(loop.pictures)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert gone(pid)
        return await loop.pictures.load(SMALL)

    assert loop.run(story())


def test_a_picture_does_not_wait_for_ever_behind_others(make: Callable[..., Loop]) -> None:
    loop = make(seconds=0.2)

    async def story() -> None:
        busy = await loop.pictures._free.get()
        started = time.monotonic()
        with pytest.raises(PictureRejected, match="too many images are waiting"):
            await loop.pictures.load(SMALL)
        assert 0.5 < time.monotonic() - started < 1.5
        loop.pictures._free.put_nowait(busy)

    loop.run(story())
    loop.run(loop.pictures.start())
    assert loop.load(SMALL)


def test_pictures_under_way_are_refused_when_the_server_closes(make: Callable[..., Loop]) -> None:
    loop = make()

    async def story() -> tuple[int, list[Any]]:
        pid, task = await stopped(loop.pictures)
        waiting = asyncio.create_task(loop.pictures.load(SMALL))
        await asyncio.sleep(0.05)
        await loop.pictures.close()
        late = asyncio.create_task(loop.pictures.load(SMALL))
        return pid, list(await asyncio.gather(task, waiting, late, return_exceptions=True))

    pid, results = loop.run(story())
    assert outcomes(results) == ["decoder_unavailable"] * 3
    assert gone(pid)
    assert loop.pids() == []


def test_a_process_that_does_not_start_is_a_refusal_and_the_next_one_may(
    make: Callable[..., Loop], monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = make()
    for executable in ("/absent/python", "/bin/true"):
        monkeypatch.setattr(sys, "executable", executable)
        assert loop.refusal(SMALL).code == "decoder_unavailable"
        with pytest.raises(PictureRejected):
            loop.run(loop.pictures.start())
    monkeypatch.undo()
    assert loop.load(SMALL)


def test_files_processes_and_threads_do_not_grow_with_pictures_or_deaths(make: Callable[..., Loop]) -> None:
    loop = make(workers=2)
    me = psutil.Process()

    async def kill_one() -> None:
        first = next(decoder for decoder in loop.pictures._running if decoder.alive)
        os.kill(first._process.pid, signal.SIGKILL)
        await asyncio.sleep(0.05)

    def counted() -> tuple[int, int]:
        loop.run(loop.pictures.start())
        loop.run(asyncio.sleep(0.1))
        return me.num_fds(), len(me.children(recursive=True))

    before = counted()
    for _ in range(4):
        loop.run(kill_one())
        loop.load(SMALL)
        loop.refusal(uri(b"nothing"))
    for _ in range(100):
        loop.load(SMALL)
    assert counted() == before


SERVER = """
import asyncio, os, signal, sys
from llava_pipeline.model.processor import ImageSettings
from llava_pipeline.serving.pictures import Pictures

async def main():
    pictures = Pictures(ImageSettings(32, (0.5,) * 3, (0.5,) * 3), workers=2)
    await pictures.start()
    pids = [decoder._process.pid for decoder in pictures._running]
    print(*pids, flush=True)
    await asyncio.sleep(60)

asyncio.run(main())
"""


def test_processes_die_with_a_server_that_is_killed() -> None:
    with subprocess.Popen([sys.executable, "-c", SERVER], stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        pids = [int(pid) for pid in server.stdout.readline().split()]
        assert len(pids) == 2
        assert all(psutil.pid_exists(pid) for pid in pids)
        os.kill(pids[0], signal.SIGSTOP)  # one that will never see its pipe close
        server.kill()
    assert all(gone(pid) for pid in pids)


# --------------------------------------------------------------------------------------------- addresses


@dataclass
class Host:
    """A host on loopback that answers every connection in the same way, and notes what it was sent."""

    answer: bytes
    drip: float = 0.0
    tls: ssl.SSLContext | None = None
    connections: int = 0
    asked: list[bytes] = field(default_factory=list)

    def __enter__(self) -> Host:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._serve, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            try:
                connection.settimeout(5)
                self._answer(self.tls.wrap_socket(connection, server_side=True) if self.tls else connection)
            except OSError:
                pass

    def _answer(self, connection: socket.socket) -> None:
        with connection:
            self.asked.append(connection.recv(1 << 16))
            for place in range(0, len(self.answer), 1 if self.drip else len(self.answer) or 1):
                connection.sendall(self.answer[place : place + 1] if self.drip else self.answer)
                time.sleep(self.drip)


def response(body: bytes, *headers: str, status: str = "200 OK", length: bool = True) -> bytes:
    lines = [f"HTTP/1.1 {status}", *headers, *([f"Content-Length: {len(body)}"] if length else [])]
    return "\r\n".join([*lines, "", ""]).encode() + body


def fetch(host: Host, url: str | None = None, *, allowed: str = "localhost", **changes: Any) -> bytes:
    how: dict[str, Any] = {"seconds": 2.0, "max_bytes": CAP, "accepts": lambda address: True} | changes

    async def story() -> bytes:
        remote = Remote(frozenset({f"{allowed}:{host.port}"}), **how)
        return await remote.fetch(url or f"http://localhost:{host.port}/a.png?b=1#c")

    return asyncio.run(story())


def not_fetched(host: Host, url: str | None = None, **changes: Any) -> PictureRejected:
    with pytest.raises(PictureRejected) as caught:
        fetch(host, url, **changes)
    assert "127.0.0.1" not in caught.value.message
    assert caught.value.status in (400, 413)
    return caught.value


PNG = encoded(noise())


def test_a_picture_on_an_allowed_host_is_fetched_and_decoded(make: Callable[..., Loop]) -> None:
    with Host(response(PNG)) as host:
        remote = Remote(frozenset({f"localhost:{host.port}"}), seconds=2, max_bytes=CAP, accepts=lambda address: True)
        loop = make(remote=remote)
        url = f"http://LOCALHOST:{host.port}/a.png?b=1#c"
        assert loop.load(url).digest == loop.load(SMALL).digest
    lines = host.asked[0].decode().split("\r\n")
    assert lines[0] == "GET /a.png?b=1 HTTP/1.1"
    assert {line.partition(":")[0].lower() for line in lines[1:] if line} == {
        "host", "accept", "accept-encoding", "user-agent", "connection",
    }  # fmt: skip
    assert f"Host: localhost:{host.port}" in lines


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1:{port}/", "http://localhost:{port}/", "http://2130706433:{port}/", "http://0x7f000001:{port}/",
        "http://0177.0.0.1:{port}/", "http://127.1:{port}/", "http://0.0.0.0:{port}/", "http://0:{port}/",
        "http://[::1]:{port}/", "http://[::ffff:127.0.0.1]:{port}/", "http://[::]:{port}/", "http://169.254.169.254/",
        "https://localhost:{port}/", "http://pictures.example@localhost:{port}/", "http://localhost:{port}@pictures.example/",
        "http://user:password@pictures.example/", "http://@pictures.example/", "http://pictures.example:{port}/",
        "http://pictures.example./", "http://pictures.example.localhost:{port}/", "http://localhost:{port}#pictures.example",
        "http://localhost:{port}\\@pictures.example/", "http:\\\\localhost:{port}/", "http:/localhost:{port}/",
        "http:localhost:{port}", "//localhost:{port}/", "localhost:{port}", "/etc/passwd", "file:///etc/passwd",
        "file://localhost:{port}/etc/passwd", "ftp://localhost:{port}/a.png", "gopher://localhost:{port}/", "",
        "javascript:alert(1)", "blob:http://localhost:{port}/", " http://localhost:{port}/", "http://local\thost:{port}/",
        "http://localhost:{port}/\r\nHost: x", "http://ⓛocalhost:{port}/", "http://localhost:99999/", "http://localhost:-1/",
        "http://[::1", "ws://localhost:{port}/", "HTTP://LOCALHOST:{port}/",
    ],
)  # fmt: skip
def test_what_is_not_allowed_is_refused_and_no_packet_is_sent(make: Callable[..., Loop], url: str) -> None:
    with Host(response(PNG)) as host:
        plain, listed = make(), make(allowed_hosts=frozenset({"pictures.example"}), seconds=2)
        for loop in (plain, listed):
            assert loop.refusal(url.format(port=host.port)).code == "unsupported_image_url"
        assert (plain.pids(), listed.pids(), host.connections) == ([], [], 0)


def test_a_name_on_the_list_that_leads_inside_is_refused_and_no_packet_is_sent() -> None:
    with Host(response(PNG)) as host:
        assert not_fetched(host, accepts=is_public).code == "unsupported_image_url"
        assert host.connections == 0


def leads_to(monkeypatch: pytest.MonkeyPatch, *answers: list[str]) -> list[str]:
    """Names lead to these addresses, each time to the next ones; the names that were asked for come back."""
    asked: list[str] = []

    def getaddrinfo(name: str, port: int, *_: Any, **__: Any) -> list[Any]:
        asked.append(name)
        numbers = answers[min(len(asked), len(answers)) - 1]
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (number, port)) for number in numbers]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    return asked


@pytest.mark.parametrize("numbers", [["93.184.215.14", "127.0.0.1"], ["127.0.0.1", "93.184.215.14"], ["10.0.0.1"], []])
def test_one_address_inside_is_enough_to_refuse(monkeypatch: pytest.MonkeyPatch, numbers: list[str]) -> None:
    with Host(response(PNG)) as host:
        leads_to(monkeypatch, numbers)
        url = f"http://pictures.example:{host.port}/"
        assert not_fetched(host, url, allowed="pictures.example", accepts=is_public).code == "unsupported_image_url"
        assert host.connections == 0


def test_a_name_is_resolved_once_and_the_connection_goes_there(monkeypatch: pytest.MonkeyPatch) -> None:
    with Host(response(PNG)) as host:
        asked = leads_to(monkeypatch, ["127.0.0.1"], ["10.255.255.1"])
        looked_at: list[str] = []
        how = {"allowed": "pictures.example", "accepts": lambda number: looked_at.append(number) is None}
        assert fetch(host, f"http://pictures.example:{host.port}/", **how) == PNG
    assert (asked, looked_at) == (["pictures.example"], ["127.0.0.1"])
    assert f"Host: pictures.example:{host.port}".encode() in host.asked[0]


@pytest.mark.parametrize(
    "address",
    [
        "0.0.0.0", "0.1.2.3", "10.1.2.3", "100.64.0.1", "127.0.0.1", "127.255.0.1", "169.254.169.254", "172.16.0.1",
        "192.0.0.1", "192.0.2.1", "192.168.1.1", "198.18.0.1", "198.51.100.1", "203.0.113.1", "224.0.0.1", "240.0.0.1",
        "255.255.255.255", "::", "::1", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "::127.0.0.1", "fe80::1", "fe80::1%eth0",
        "fc00::1", "fd12::1", "ff02::1", "2001:db8::1", "64:ff9b::7f00:1", "64:ff9b::a00:1", "2002:7f00:1::",
        "2002:a00:1::1", "fec0::1", "100::1", "64:ff9b:1::1",
    ],
)  # fmt: skip
def test_an_address_that_is_not_of_the_public_internet_is_known(address: str) -> None:
    assert not is_public(address)


def test_addresses_of_the_public_internet_are_known() -> None:
    for address in ("1.1.1.1", "93.184.215.14", "2606:4700::1111", "64:ff9b::101:101", "::ffff:1.1.1.1"):
        assert is_public(address)


@given(st.ip_addresses())
def test_no_address_that_python_calls_private_is_public(address: Any) -> None:
    if ip_address(address).is_private:
        assert not is_public(str(address)) or address.version == 6


@pytest.mark.parametrize("status", ["301 Moved", "302 Found", "303 See Other", "307 Temporary", "308 Permanent"])
def test_a_redirect_is_not_followed(status: str) -> None:
    with Host(response(PNG)) as inside, Host(b"") as host:
        host.answer = response(b"", f"Location: http://localhost:{inside.port}/", status=status)
        assert "redirects" in not_fetched(host).message
        assert inside.connections == 0


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        (response(b"", status="404 Not Found"), "image_not_fetched"),
        (response(PNG, status="206 Partial"), "image_not_fetched"),
        (response(PNG, "Content-Encoding: gzip"), "image_not_fetched"),
        (response(PNG)[:-1], "image_not_fetched"),
        (b"", "image_not_fetched"),
        (b"SSH-2.0-OpenSSH_9.6\r\n", "image_not_fetched"),
        (b"HTTP/1.1 200 OK\r\nX: " + b"x" * 200_000, "image_not_fetched"),
        (response(b"", "Content-Length: 200001", length=False), "image_too_large"),
        (response(bytes(CAP + 1), length=False), "image_too_large"),
        (response(b"30d41\r\n" + bytes(200_001), "Transfer-Encoding: chunked", length=False), "image_too_large"),
    ],
)
def test_a_host_that_answers_otherwise_is_a_refusal(answer: bytes, code: str) -> None:
    with Host(answer) as host:
        assert not_fetched(host).code == code


def test_a_host_may_send_in_chunks_and_without_a_length() -> None:
    chunked = b"3\r\n" + PNG[:3] + b"\r\n" + f"{len(PNG) - 3:x}\r\n".encode() + PNG[3:] + b"\r\n0\r\n\r\n"
    for answer in (response(chunked, "Transfer-Encoding: chunked", length=False), response(PNG, length=False)):
        with Host(answer) as host:
            assert fetch(host) == PNG


def test_a_host_that_drips_or_says_nothing_is_left_in_time() -> None:
    for answer, drip in ((response(PNG), 0.05), (b"HTTP", 5.0)):
        with Host(answer, drip=drip) as host:
            started = time.monotonic()
            assert "within 0.5 seconds" in not_fetched(host, seconds=0.5).message
            assert time.monotonic() - started < 1.5


def test_nobody_there_is_a_refusal() -> None:
    with Host(b"") as host:
        pass
    assert not_fetched(host).code == "image_not_fetched"


def test_a_proxy_in_the_environment_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    with Host(response(PNG)) as host, Host(response(b"")) as proxy:
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.port}")
        assert fetch(host) == PNG
        assert proxy.connections == 0


def certificate(folder: Path, name: str) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """What a server of this name shows, and what a client that trusts it has."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key, subject = ec.generate_private_key(ec.SECP256R1()), x509.Name.from_rfc4514_string(f"CN={name}")
    now = datetime.datetime.now(datetime.UTC)
    builder = x509.CertificateBuilder(subject, subject, key.public_key(), x509.random_serial_number())
    builder = builder.not_valid_before(now - datetime.timedelta(1)).not_valid_after(now + datetime.timedelta(1))
    builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), False)
    signed = builder.sign(key, hashes.SHA256())
    file = folder / f"{name}.pem"
    encoding, private = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    file.write_bytes(key.private_bytes(encoding, private, serialization.NoEncryption()) + signed.public_bytes(encoding))
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(file)
    return server, ssl.create_default_context(cadata=signed.public_bytes(encoding).decode())


def test_https_goes_to_the_address_and_checks_the_certificate_of_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, client = certificate(tmp_path, "pictures.example")
    names: list[str | None] = []
    server.sni_callback = lambda _, name, __: names.append(name)
    leads_to(monkeypatch, ["127.0.0.1"])
    with Host(response(PNG), tls=server) as host:
        for name in ("pictures.example", "other.example"):
            url, how = f"https://{name}:{host.port}/", {"allowed": name, "tls": client}
            if name == "pictures.example":
                assert fetch(host, url, **how) == PNG
                assert not_fetched(host, url, allowed=name).code == "image_not_fetched"  # trusted by nobody else
            else:
                assert not_fetched(host, url, **how).code == "image_not_fetched"
        assert len(host.asked) == 1
    assert names == ["pictures.example", "pictures.example", "other.example"]


@pytest.mark.parametrize(
    "entry",
    [
        "", "*", "*.example", "http://a.example", "a.example/", "127.0.0.1", "[::1]", "::1", "127.1", "2130706433",
        "0x7f1", "a.example:", "a.example:0", "a.example:65536", "a.example:x", "a b", "-a.example", "a..b",
        "a.example.", "é.example", "a.example:٣",
    ],
)  # fmt: skip
def test_an_entry_of_the_list_that_is_no_host_name_is_an_error_at_the_start(entry: str) -> None:
    with pytest.raises(ValueError, match="host name"):
        read_allowed_hosts(frozenset({entry}))


def test_an_entry_without_a_port_means_the_usual_ones() -> None:
    allowed = read_allowed_hosts(frozenset({"A.example", "b.example:8443"}))
    for url in ("https://a.example/x", "http://a.example", "https://a.example:443/", "https://b.example:8443/"):
        assert read_address(url, allowed)
    for url in ("http://a.example:443/", "https://a.example:80/", "https://a.example:8443/", "https://b.example/"):
        with pytest.raises(PictureRejected, match="unsupported_image_url"):
            read_address(url, allowed)


@given(st.text(max_size=40), st.sampled_from(["", "http://", "https://", "http://a.example", "https://a.example/"]))
def test_whatever_an_address_is_it_leads_to_a_host_on_the_list_or_is_refused(text: str, start: str) -> None:
    try:
        address = read_address(start + text, read_allowed_hosts(frozenset({"a.example"})))
    except PictureRejected:
        return
    assert (address.host, address.port) in {("a.example", 80), ("a.example", 443)}
    assert address.target.startswith("/")
