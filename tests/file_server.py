"""A local file server that can misbehave: broken, stalled and wrong responses."""

from __future__ import annotations

import hashlib
import http.server
import random
import ssl
import threading
import time
from collections.abc import Callable

CONTENT = random.Random(0).randbytes(300_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Server:
    """Serve CONTENT at every path.

    Attributes:
        behaviors: handlers for the next requests, one per request; further requests are served correctly.
        ranges: the Range header of each request so far.
        etag: validator of the current version of the file.
    """

    def __init__(self, encryption: ssl.SSLContext | None = None):
        self.behaviors: list[Callable[[http.server.BaseHTTPRequestHandler], None]] = []
        self.ranges: list[str | None] = []
        self.etag = '"one"'
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                server.ranges.append(self.headers.get("Range"))
                behavior = server.behaviors.pop(0) if server.behaviors else serve
                behavior(self)

            def log_message(self, *arguments):
                pass

        Handler.server_state = server
        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.origin = f"http://127.0.0.1:{self.http.server_port}"
        if encryption is not None:
            self.http.socket = encryption.wrap_socket(self.http.socket, server_side=True)
            self.origin = f"https://localhost:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()

    def url(self, name: str = "weights.pth") -> str:
        return f"{self.origin}/{name}"


def serve(handler, content=CONTENT, sent=None, accepts_ranges=True):
    """Send the requested part of `content`, cut off after `sent` bytes."""
    state = handler.server_state
    wanted = handler.headers.get("Range")
    offset = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted else 0
    if not accepts_ranges or handler.headers.get("If-Range") != state.etag:
        offset = 0
    handler.send_response(206 if offset else 200)
    if offset:
        handler.send_header("Content-Range", f"bytes {offset}-{len(content) - 1}/{len(content)}")
    handler.send_header("ETag", state.etag)
    handler.send_header("Content-Length", str(len(content) - offset))
    handler.end_headers()
    handler.wfile.write(content[offset:][:sent])
    handler.wfile.flush()
    handler.close_connection = True


def truncated(handler):
    """Send the first third."""
    serve(handler, sent=100_000)


def status(code: int):
    """Return a handler that sends a status without content."""
    return lambda handler: handler.send_error(code)


def stalled(handler):
    """Send the first bytes, then nothing until the client disconnects."""
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(CONTENT)))
    handler.end_headers()
    handler.wfile.write(CONTENT[:1000])
    handler.wfile.flush()
    wait_for_disconnect(handler)


def wait_for_disconnect(handler):
    """Send nothing until the client disconnects."""
    handler.connection.recv(1)


def web_page(handler):
    """Send HTML, like a login page."""
    handler.send_response(200)
    handler.send_header("Content-Type", "text/html; charset=utf-8")
    handler.end_headers()
    handler.wfile.write(b"<html>sign in</html>")


def answer(content: bytes, code: int = 200, **headers: str):
    """Return a handler that sends content and headers as they are, and closes the connection."""

    def send(handler):
        handler.send_response(code)
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        handler.wfile.write(content)
        handler.close_connection = True

    return send


def dripping(handler):
    """Send a byte now and then, for ever."""
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(CONTENT)))
    handler.end_headers()
    for byte in CONTENT:
        try:
            handler.wfile.write(bytes([byte]))
            handler.wfile.flush()
        except OSError:
            return
        time.sleep(0.02)


def chunked(content: bytes, ends: bool = True):
    """Return a handler that sends content in chunks, with or without the end."""

    def send(handler):
        handler.protocol_version = "HTTP/1.1"
        handler.send_response(200)
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        for start in range(0, len(content), 70_000):
            part = content[start : start + 70_000]
            handler.wfile.write(f"{len(part):x}\r\n".encode() + part + b"\r\n")
        handler.wfile.write(b"0\r\n\r\n" if ends else b"")
        handler.close_connection = True

    return send
