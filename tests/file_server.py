"""A server of files on this machine that misbehaves in every way that servers do."""

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
    """Serves CONTENT at every address; `behaviours` are taken one a request, then requests are served well."""

    def __init__(self, encryption: ssl.SSLContext | None = None):
        self.behaviours: list[Callable[[http.server.BaseHTTPRequestHandler], None]] = []
        self.ranges: list[str | None] = []
        self.etag = '"one"'
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                server.ranges.append(self.headers.get("Range"))
                behaviour = server.behaviours.pop(0) if server.behaviours else serve
                behaviour(self)

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
    """A good answer; of `content` only the first `sent` bytes of what is asked for."""
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
    """The first third."""
    serve(handler, sent=100_000)


def status(code: int):
    """An answer without a file."""
    return lambda handler: handler.send_error(code)


def stalled(handler):
    """A beginning, and then nothing for a while."""
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(CONTENT)))
    handler.end_headers()
    handler.wfile.write(CONTENT[:1000])
    handler.wfile.flush()
    time.sleep(1.5)


def web_page(handler):
    """As where one has to sign in."""
    handler.send_response(200)
    handler.send_header("Content-Type", "text/html; charset=utf-8")
    handler.end_headers()
    handler.wfile.write(b"<html>sign in</html>")
