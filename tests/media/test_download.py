"""Pictures from addresses: any address a browser takes, and an InputError for whatever a server does."""

from __future__ import annotations

import io
import threading
import time
from collections.abc import Generator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import pytest
from PIL import Image

from kinetoscope.core.errors import InputError
from kinetoscope.media import download, load_picture

BUFFER = io.BytesIO()
Image.new("RGB", (8, 8)).save(BUFFER, "PNG")
PICTURE = BUFFER.getvalue()


class Handler(BaseHTTPRequestHandler):
    """A server that answers well or badly, as the path says."""

    protocol_version = "HTTP/1.1"
    seen: list[str]

    def log_message(self, *_: object) -> None: ...

    def do_GET(self) -> None:
        self.seen.append(self.path)
        name = unquote(urlsplit(self.path).path)
        if name == "/chunks that are cut":
            self._head({"Transfer-Encoding": "chunked"})
            self._end(b"100\r\n" + PICTURE[:20])
        elif name == "/length that is cut":
            self._head({"Content-Length": "5000"})
            self._end(PICTURE[:20])
        elif name == "/closed":
            self._end(b"")
        elif name == "/not http":
            self._end(b"hello\r\n\r\n")
        elif name == "/drips":
            self._head({"Content-Length": "1000"})
            for _ in range(1000):
                self.wfile.write(b"x")
                self.wfile.flush()
                time.sleep(0.02)
        elif name == "/moved":
            self._head({"Location": "/nach Süden.png".encode().decode("latin-1"), "Content-Length": "0"}, 302)
        elif name == "/around":
            self._head({"Location": "/around", "Content-Length": "0"}, 302)
        elif name == "/to a file":
            self._head({"Location": "file:///etc/hostname", "Content-Length": "0"}, 302)
        elif name == "/missing":
            self._head({"Content-Length": "0"}, 404)
        elif name == "/page":
            self._head({"Content-Length": "6", "Content-Type": "text/html; charset=utf-8"})
            self.wfile.write(b"<html>")
        elif name == "/text":
            self._head({"Content-Length": "5"})
            self.wfile.write(b"hello")
        else:
            self._head({"Content-Length": str(len(PICTURE))})
            self.wfile.write(PICTURE)

    def _head(self, headers: dict[str, str], status: int = 200) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def _end(self, data: bytes) -> None:
        self.wfile.write(data)
        self.wfile.flush()
        self.connection.shutdown(2)
        self.close_connection = True


@pytest.fixture(scope="module")
def root() -> Generator[str]:
    Handler.seen = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.handle_error = lambda *_: None  # pyright: ignore[reportAttributeAccessIssue]  # clients that go away
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("path", "sent"),
    [
        ("/my picture.png", "/my%20picture.png"), ("/картина.png", "/%D0%BA%D0%B0%D1%80%D1%82%D0%B8%D0%BD%D0%B0.png"),
        ("/a%20b.png?q=ä&r=%41#part", "/a%20b.png?q=%C3%A4&r=%41"), ("/[1]|2.png", "/%5B1%5D%7C2.png"),
        ("/moved", "/nach%20S%C3%BCden.png"),
    ],
)  # fmt: skip
def test_addresses_with_spaces_and_other_scripts_are_fetched(root: str, path: str, sent: str) -> None:
    assert load_picture(root + path).size == (8, 8)
    assert Handler.seen[-1] == sent
    assert load_picture(root.replace("http", "HTTP") + path).size == (8, 8)


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("/chunks that are cut", "broke off"), ("/length that is cut", "broke off"), ("/closed", "closed"),
        ("/not http", "hello"), ("/around", "302"), ("/to a file", "302"), ("/missing", "404"),
        ("/page", "sent a page"), ("/text", "known format"),
    ],
)  # fmt: skip
def test_whatever_a_server_does_is_an_input_error(root: str, path: str, says: str) -> None:
    with pytest.raises(InputError, match=says):
        load_picture(root + path)


@pytest.mark.parametrize(
    "address", ["http://", "http:///a.png", "http://[::1", "http://a:b/", "http://a:99999/", "http://" + "ü" * 70 + "/",
                "http://a..b/", "http://\ud800/", "http://127.0.0.1:1/a.png", "http://a b/"],
)  # fmt: skip
def test_addresses_that_are_none_are_input_errors(address: str) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        load_picture(address)


def test_refused_connection_is_told_without_its_number() -> None:
    with pytest.raises(InputError, match="cannot be read: Connection refused; give the address"):
        load_picture("http://127.0.0.1:1/a.png")


def test_downloads_end_at_their_limits(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "TIMEOUT_S", 0.2)
    with pytest.raises(InputError, match=r"longer than 0\.2 s"):
        load_picture(root + "/drips")
    monkeypatch.setattr(download, "TIMEOUT_S", 30)
    monkeypatch.setattr(download, "MAX_BYTES", 20)
    with pytest.raises(InputError, match="is larger than"):
        load_picture(root + "/a.png")
