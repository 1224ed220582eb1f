"""A stub of the Hugging Face hub's API: creates repositories, accepts commits and serves their files, in memory.

Small and large files travel inside commits ("regular" uploads), so that no storage service is needed.
"""

from __future__ import annotations

import base64
import hashlib
import http.server
import json
import re
import threading
from urllib.parse import unquote, urlsplit

import huggingface_hub
import pytest


class Hub:
    """The server.

    Attributes:
        files: content by "OWNER/NAME" and path.
        commits: number of commits by "OWNER/NAME".
        private: names of private repositories.
        requests: method and path of every request.
    """

    def __init__(self) -> None:
        self.files: dict[str, dict[str, bytes]] = {}
        self.commits: dict[str, int] = {}
        self.private: set[str] = set()
        self.requests: list[str] = []
        hub = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                hub.answer(self, None)

            do_HEAD = do_GET

            def do_POST(self):
                hub.answer(self, self.rfile.read(int(self.headers.get("Content-Length", 0))))

            def log_message(self, *arguments):
                pass

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()

    def commit_of(self, repository: str) -> str:
        return hashlib.sha1(f"{repository} {self.commits[repository]}".encode()).hexdigest()

    def answer(self, handler: http.server.BaseHTTPRequestHandler, body: bytes | None) -> None:
        path = unquote(urlsplit(handler.path).path)
        self.requests.append(f"{handler.command} {path}")
        if path == "/api/repos/create":
            send(handler, self.create(json.loads(body or b"")))
        elif path == "/api/validate-yaml":
            send(handler, {"errors": [], "warnings": []})
        elif found := re.fullmatch("/api/models/([^/]+/[^/]+)/preupload/.+", path):
            files = json.loads(body or b"")["files"]
            send(handler, {"files": [{**file, "uploadMode": "regular", "shouldIgnore": False} for file in files]})
        elif found := re.fullmatch("/api/models/([^/]+/[^/]+)/commit/.+", path):
            send(handler, self.commit(found[1], body or b""))
        elif (found := re.fullmatch("/api/models/([^/]+/[^/]+)(/.*)?", path)) and found[1] in self.files:
            siblings = [{"rfilename": name} for name in self.files[found[1]]]
            send(handler, {"id": found[1], "sha": self.commit_of(found[1]), "siblings": siblings, "private": False})
        elif (found := re.fullmatch("/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path)) and found[1] in self.files:
            self.send_file(handler, found[1], found[2])
        else:
            send(handler, {"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})

    def create(self, request: dict) -> dict:
        repository = f"{request.get('organization') or 'someone'}/{request['name']}"
        self.files.setdefault(repository, {})
        self.commits.setdefault(repository, 0)
        if request.get("private") or request.get("visibility") == "private":
            self.private.add(repository)
        return {"url": f"{self.url}/{repository}"}

    def commit(self, repository: str, body: bytes) -> dict:
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                self.files[repository][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            else:
                assert line["key"] == "header", line
        self.commits[repository] += 1
        commit = self.commit_of(repository)
        return {"commitUrl": f"{self.url}/{repository}/commit/{commit}", "commitOid": commit}

    def send_file(self, handler: http.server.BaseHTTPRequestHandler, repository: str, name: str) -> None:
        content = self.files[repository].get(name)
        headers = {"X-Repo-Commit": self.commit_of(repository)}
        if content is None:
            send(handler, {"error": "Entry not found"}, 404, {**headers, "X-Error-Code": "EntryNotFound"})
        else:
            send(handler, content, 200, {**headers, "ETag": f'"{hashlib.sha256(content).hexdigest()}"'})


def send(handler, content, status: int = 200, headers: dict[str, str] | None = None) -> None:
    content = content if isinstance(content, bytes) else json.dumps(content).encode()
    handler.send_response(status)
    for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
        handler.send_header(name, value)
    handler.end_headers()
    if handler.command != "HEAD":
        handler.wfile.write(content)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """Start a stub of the hub, and make huggingface_hub use it, with a token and a cache of its own."""
    server = Hub()
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", server.url)
    monkeypatch.setenv("HF_TOKEN", "hf_of_the_stub")
    yield server
    server.http.shutdown()
