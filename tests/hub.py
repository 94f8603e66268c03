"""A stand-in for a model hub on 127.0.0.1: the few routes that an upload uses, kept in memory.

Shards come by git LFS, small files inside the commit, as on the real one. What is asked for beyond that gets 404 and is
listed, so that a test fails on it and not on a guess.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

WRITER, READER = "hf_may_write", "hf_may_read"


class Hub:
    """What the stand-in knows.

    Attributes:
        url: its address.
        repos: settings of every repository.
        files: content by path.
        commits: paths of each commit in turn.
        unknown: requests that it has no route for.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self.repos: dict[str, dict[str, Any]] = {}
        self.files: dict[str, bytes] = {}
        self.commits: list[list[str]] = []
        self.unknown: list[str] = []
        self.blobs: dict[str, bytes] = {}

    def answer(self, method: str, path: str, body: bytes, token: str) -> tuple[int, Any]:
        parts = path.strip("/").split("/")
        if method == "PUT" and parts[0] == "lfs":  # a signed address: no token
            self.blobs[hashlib.sha256(body).hexdigest()] = body
            return 200, None
        if token != WRITER:
            return (403, {"error": "no permission"}) if token == READER else (401, {"error": "no token"})
        match method, *parts:
            case "POST", "api", "repos", "create":
                asked = json.loads(body)
                name = f"{asked.get('organization', 'me')}/{asked['name']}"
                self.repos[name] = asked
                return 200, {"url": f"{self.url}/{name}"}
            case "POST", "api", "validate-yaml":
                return 200, {"errors": [], "warnings": []}
            case "GET", "api", "models", _, _, "tree", "main":
                entries = self.files.items()
                return 200, [{"type": "file", "path": p, "size": len(b), "oid": _sha(b)} for p, b in entries]
            case "POST", "api", "models", _, _, "preupload", "main":
                return 200, {"files": [_mode(file["path"]) for file in json.loads(body)["files"]]}
            case "POST", _, _, "info", "lfs", "objects", "batch":
                objects = [self._wanted(entry) for entry in json.loads(body)["objects"]]
                return 200, {"transfer": "basic", "objects": objects}
            case "POST", "api", "models", owner, name, "commit", "main":
                return 200, self._commit(f"{owner}/{name}", [json.loads(line) for line in body.splitlines()])
        self.unknown.append(f"{method} {path}")
        return 404, {"error": "not a route of the stand-in"}

    def _wanted(self, entry: dict[str, Any]) -> dict[str, Any]:
        if entry["oid"] in self.blobs:
            return entry
        return {**entry, "actions": {"upload": {"href": f"{self.url}/lfs/{entry['oid']}"}}}

    def _commit(self, repo: str, lines: list[dict[str, Any]]) -> dict[str, Any]:
        paths = []
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                assert value["encoding"] == "base64"
                self.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                assert len(self.blobs[value["oid"]]) == value["size"]
                self.files[value["path"]] = self.blobs[value["oid"]]
            elif line["key"] == "deletedFile":
                del self.files[value["path"]]
            if line["key"] != "header":
                paths.append(value["path"])
        self.commits.append(paths)
        oid = _sha(json.dumps(lines).encode())
        return {"commitUrl": f"{self.url}/{repo}/commit/{oid}", "commitOid": oid, "success": True}


@contextmanager
def serve() -> Iterator[Hub]:
    """A hub that listens until the block ends."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _do(self) -> None:
            body = self._body()
            token = self.headers.get("Authorization", "").removeprefix("Bearer ")
            status, found = hub.answer(self.command, urlsplit(self.path).path, body, token)
            raw = b"" if found is None else json.dumps(found).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(raw)))
            self.end_headers()
            self.wfile.write(raw)

        do_GET = do_POST = do_PUT = do_HEAD = _do

        def _body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length", 0)))
            chunks = []
            while length := int(self.rfile.readline(), 16):
                chunks.append(self.rfile.read(length))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(chunks)

        def log_message(self, format: str, *args: Any) -> None:
            """Quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub = Hub(f"http://127.0.0.1:{server.server_port}")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


def _mode(path: str) -> dict[str, Any]:
    return {"path": path, "uploadMode": "lfs" if path.endswith(".safetensors") else "regular", "shouldIgnore": False}


def _sha(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()
