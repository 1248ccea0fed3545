"""Pictures fetched from http(s) addresses, within limits of size and time."""

from __future__ import annotations

import http.client
import re
import time
import urllib.error
import urllib.parse
import urllib.request

from kinetoscope.core.errors import InputError
from kinetoscope.core.files import system_reason

MAX_BYTES = 64 * 2**20
TIMEOUT_S = 30.0
"""Seconds for a whole download; also the longest silence of a server."""
_CHUNK = 2**16
_SCHEME = re.compile(r"([a-z][a-z0-9+.-]+)://|(data):[^,]*,", re.IGNORECASE)
_SAFE = "/%:@!$&'()*+,;=-._~"


def is_address(source: object) -> bool:
    """Return whether a source is an http(s) address."""
    return isinstance(source, str) and source[:8].casefold().startswith(("http://", "https://"))


def other_scheme(source: object) -> str | None:
    """Return the scheme of an address that is not http(s), such as `ftp` or `data`; None for paths."""
    found = _SCHEME.match(source) if isinstance(source, str) and not is_address(source) else None
    return found[1] or found[2] if found else None


def to_uri(address: str) -> str:
    """Return an address as ASCII: spaces and other letters percent-encoded (RFC 3987), the host in IDNA, no fragment.

    What is percent-encoded already stays.

    Raises:
        ValueError: the address has no host, or one that cannot be encoded.
    """
    parts = urllib.parse.urlsplit(address)
    host = parts.hostname
    if not host:
        raise ValueError("it names no host")
    if not host.isascii():
        host = host.encode("idna").decode("ascii")
    if ":" in host:
        host = f"[{host}]"
    user, at, _ = parts.netloc.rpartition("@")
    port = "" if parts.port is None else f":{parts.port}"
    netloc = urllib.parse.quote(user, _SAFE) + at + host + port
    path = urllib.parse.quote(parts.path, _SAFE)
    query = urllib.parse.quote(parts.query, _SAFE + "?")
    return urllib.parse.urlunsplit((parts.scheme, netloc, path, query, ""))


def fetch_picture(address: str) -> bytes:
    """Return the bytes at an http(s) address.

    Raises:
        InputError: the address is no valid one, the server cannot be reached, fails, breaks off, sends a page instead
            of a picture, or takes longer or sends more than the limits.
    """
    try:
        with urllib.request.urlopen(urllib.request.Request(to_uri(address)), timeout=TIMEOUT_S) as response:
            kind = response.headers.get_content_type()
            if kind == "text/html":
                raise InputError(f"image {address}: the server sent a page ({kind}); give the address of the picture")
            return _read(response, address)
    except urllib.error.HTTPError as error:
        raise InputError(f"image {address} cannot be read: the server answered {error.code} {error.reason}") from error
    except http.client.IncompleteRead as error:
        raise InputError(f"image {address} cannot be read: the server broke off; try again") from error
    except TimeoutError as error:
        raise InputError(f"image {address} cannot be read: the server was silent for {TIMEOUT_S:g} s") from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        why = getattr(error, "reason", None) or error
        why = system_reason(why) if isinstance(why, BaseException) else why
        raise InputError(
            f"image {address} cannot be read: {why}; give the address of a picture, or download it"
        ) from error


def _read(response: http.client.HTTPResponse, address: str) -> bytes:
    """Return a whole body; what it declares as its length is checked."""
    until = time.monotonic() + TIMEOUT_S
    parts: list[bytes] = []
    size = 0
    while part := response.read1(_CHUNK):
        parts.append(part)
        size += len(part)
        if size > MAX_BYTES:
            raise InputError(f"image {address} is larger than {MAX_BYTES >> 20} MB; download and shrink it first")
        if time.monotonic() > until:
            raise InputError(f"image {address} took longer than {TIMEOUT_S:g} s; download it first")
    if response.length:  # what is missing of a declared length
        raise http.client.IncompleteRead(b"", response.length)
    return b"".join(parts)
