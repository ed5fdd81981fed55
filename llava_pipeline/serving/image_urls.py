"""What the ``url`` of an image part may be: a data URI with a picture in base64, or an address on the allow-list.

Read strictly, because every leniency is a second way to write the same thing: a data URI is ``data:``, a type, its
parameters, ``;base64,`` and padded base64 of the standard alphabet, without a blank in it. Scheme, type and
``base64`` may be in capitals. What a client would usually get wrong has a sentence of its own.
"""

from __future__ import annotations

import binascii
import re
from dataclasses import dataclass
from ipaddress import ip_address
from urllib.parse import urlsplit

PICTURE_TYPES = frozenset(
    {
        "application/octet-stream", "image/png", "image/apng", "image/jpeg", "image/jpg", "image/pjpeg", "image/webp",
        "image/gif", "image/bmp", "image/x-bmp", "image/x-ms-bmp",
    }
)  # fmt: skip
"""Types that may be declared; the bytes alone decide what the picture is."""
MAX_HEAD = 256  # characters before the comma of a data URI
MAX_ADDRESS = 2048  # characters of an address
DEFAULT_PORTS = {"https": 443, "http": 80}
_PARAMETER = re.compile(r"[a-z0-9!#$&^_.+-]+=[a-z0-9!#$&^_.+'()*%~-]*", re.IGNORECASE)
_HOST_NAME = re.compile(r"(?=.{1,253}(?::\d+)?$)[a-z0-9](?:[a-z0-9-]*[a-z0-9])?(?:\.[a-z0-9](?:[a-z0-9-]*[a-z0-9])?)*")
_NUMBER = re.compile(r"\d+|0x[0-9a-f]*")
_PRINTABLE = re.compile(r"[!-~]+")
_BLANK = re.compile(r"\s")


class PictureRejected(Exception):
    """A picture that is not looked at.

    ``status`` is 400, 413, 415 or 503; ``code`` is short, for programs; ``message`` is a sentence that may be shown to
    anybody. The codes: ``invalid_image_url``, ``invalid_base64``, ``unsupported_image_url``, ``image_not_fetched``,
    ``invalid_image``, ``image_too_slow`` (400), ``image_too_large`` (413), ``unsupported_image_type`` (415) and
    ``decoder_unavailable`` (503, worth another try).
    """

    def __init__(self, status: int, code: str, message: str):
        super().__init__(f"{code}: {message}")
        self.status, self.code, self.message = status, code, message


@dataclass(frozen=True, slots=True)
class Address:
    """An address on the allow-list. ``target`` is path and query."""

    scheme: str
    host: str
    port: int
    target: str


def is_data_uri(url: str) -> bool:
    """Whether it says that it is one."""
    return url[:5].lower() == "data:"


def base64_of(data_uri: str, max_bytes: int) -> str:
    """What stands behind the comma of a data URI, of at most ``max_bytes`` when it is decoded.

    Raises:
        PictureRejected: ``invalid_image_url``, ``unsupported_image_type`` or ``image_too_large``.
    """
    comma = data_uri.find(",", 5, 5 + MAX_HEAD + 1)
    if comma < 0:
        raise _malformed(f"has no comma within its first {MAX_HEAD} characters")
    _check_head(data_uri[5:comma])
    if (len(data_uri) - comma - 1) // 4 * 3 - data_uri.endswith("=") - data_uri.endswith("==") > max_bytes:
        raise too_large(max_bytes)
    if len(data_uri) == comma + 1:
        raise _malformed("has nothing behind its comma")
    return data_uri[comma + 1 :]


def _check_head(head: str) -> None:
    kind, *parameters = head.split(";")
    if not parameters or parameters[-1].lower() != "base64":
        raise _malformed("has no ';base64' right before its comma")
    if not all(_PARAMETER.fullmatch(parameter) for parameter in parameters[:-1]):
        raise _malformed("has a parameter that is not of the form name=value")
    if kind.lower() not in PICTURE_TYPES:
        raise PictureRejected(
            415, "unsupported_image_type", "The image is not declared as image/png, jpeg, webp, gif or bmp."
        )


def from_base64(text: str) -> bytes:
    """Bytes of padded base64 in the standard alphabet, and of nothing else; 5 ms a megabyte.

    Raises:
        PictureRejected: ``invalid_base64``.
    """
    try:
        if len(text) % 4 or text.endswith("==="):  # which the strict mode lets pass
            raise binascii.Error
        return binascii.a2b_base64(text, strict_mode=True)
    except ValueError:  # also what is not ASCII
        raise PictureRejected(400, "invalid_base64", _what_is_wrong(text)) from None


def _what_is_wrong(text: str) -> str:
    if _BLANK.search(text):
        return "The base64 of the image has blanks or line breaks in it; write it in one line (base64 -w0)."
    if "%" in text:
        return "The base64 of the image is percent-encoded; write it as it is."
    if "-" in text or "_" in text:
        return "The base64 of the image is in the URL-safe alphabet; use the standard one, with + and /."
    return "The image is not valid base64, with its padding."


def read_address(url: str, allowed: frozenset[tuple[str, int | None]]) -> Address:
    """An http(s) address whose host and port are allowed, without a name or password in it.

    Raises:
        PictureRejected: ``unsupported_image_url``, whatever is not allowed or not clear.
    """
    if len(url) > MAX_ADDRESS or not _PRINTABLE.fullmatch(url) or "\\" in url:
        raise unsupported()
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
    except ValueError:
        raise unsupported() from None
    default = DEFAULT_PORTS.get(parts.scheme)
    if default is None or "@" in parts.netloc:
        raise unsupported()
    port = default if port is None else port
    if (host, port) not in allowed and not ((host, None) in allowed and port == default):
        raise unsupported()
    target = parts.path or "/"
    return Address(parts.scheme, host, port, f"{target}?{parts.query}" if parts.query else target)


def read_allowed_hosts(hosts: frozenset[str]) -> frozenset[tuple[str, int | None]]:
    """Names and ports of an allow-list. Without a port, 443 for https and 80 for http are meant.

    Raises:
        ValueError: an entry that is not ``name`` or ``name:port``; addresses in numbers are none.
    """
    return frozenset(_allowed_host(entry) for entry in hosts)


def _allowed_host(entry: str) -> tuple[str, int | None]:
    host, colon, port = entry.lower().partition(":")
    known_port = port.isascii() and port.isdigit() and 0 < int(port) < 65536
    if not _HOST_NAME.fullmatch(host) or _is_number(host) or (colon and not known_port):
        raise ValueError(f"{entry!r} is not a host name, or a host name with a port")
    return host, int(port) if colon else None


def _is_number(host: str) -> bool:
    """Whether a resolver may take the name for an address in numbers: 127.1, 0x7f000001, 2130706433."""
    try:
        ip_address(host)
    except ValueError:
        return _NUMBER.fullmatch(host.rpartition(".")[2]) is not None
    return True


def unsupported() -> PictureRejected:
    """One answer for every address that is not fetched, so that it tells nothing of the network."""
    return PictureRejected(
        400, "unsupported_image_url", "The image url is not one this server fetches; send the image as a data URI."
    )


def too_large(max_bytes: int) -> PictureRejected:
    """The answer to too many bytes."""
    return PictureRejected(413, "image_too_large", f"The image has more than {max_bytes} bytes.")


def _malformed(how: str) -> PictureRejected:
    return PictureRejected(400, "invalid_image_url", f"The data URI of the image {how}.")
