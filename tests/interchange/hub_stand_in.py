"""A stand-in for the hub: repositories in memory, behind what of its HTTP interface pushing and fetching use."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_" + "standin" * 5
REVISION_NOT_FOUND = {"X-Error-Code": "RevisionNotFound"}


@dataclass
class Repository:
    """Branches, each with its commit's id and its files: path to bytes."""

    private: bool
    branches: dict[str, tuple[str, dict[str, bytes]]] = field(default_factory=lambda: {"main": ("0" * 40, {})})
    commits: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"0" * 40: {}})

    def files(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        if revision in self.branches:
            return self.branches[revision]
        return (revision, self.commits[revision]) if revision in self.commits else None

    def commit(self, branch: str, files: dict[str, bytes]) -> str:
        parent = self.branches[branch][0]
        content = [parent, *(f"{path} {hashlib.sha1(data).hexdigest()}" for path, data in sorted(files.items()))]
        sha = hashlib.sha1("\n".join(content).encode()).hexdigest()
        self.branches[branch] = sha, files
        self.commits[sha] = files
        return sha


class Hub(ThreadingHTTPServer):
    """Listens on 127.0.0.1. `*.safetensors` go to large file storage, all else into the commit."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, Repository] = {}
        self.large: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.messages: list[str] = []

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


@contextmanager
def hub() -> Iterator[Hub]:
    """A running stand-in."""
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None: ...

    def do_POST(self) -> None:
        body = self._body()
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append(f"POST {path}")
        if path == "/api/validate-yaml":
            return self._json({"errors": [], "warnings": []})
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._json({"error": "Invalid username or password."}, 401)
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if found := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            return self._batch(json.loads(body))
        found = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(preupload|commit|branch)/(.+)", path)
        repository = self.server.repositories.get(found[1]) if found else None
        if found is None or repository is None:
            return self._json({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
        if found[2] == "branch":
            repository.branches.setdefault(found[3], repository.branches["main"])
            return self._json({})
        if found[3] not in repository.branches:
            return self._json({"error": f"Invalid rev id: {found[3]}"}, 404, REVISION_NOT_FOUND)
        if found[2] == "preupload":
            return self._preupload(json.loads(body))
        return self._commit(found[1], repository, found[3], body)

    def do_PUT(self) -> None:
        self.server.requests.append(f"PUT {self.path}")
        self.server.large[self.path.rsplit("/", 1)[-1]] = self._body()
        self._json({})

    def do_GET(self) -> None:
        self._read(with_body=True)

    def do_HEAD(self) -> None:
        self._read(with_body=False)

    def _read(self, with_body: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append(f"{self.command} {path}")
        info = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?", path)
        file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        name = info[1] if info else file[1] if file else ""
        repository = self.server.repositories.get(name)
        authorized = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if repository is None or (repository.private and not authorized):
            return self._json({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
        state = repository.files((info[3] if info else file[2] if file else "") or "main")
        if state is None:
            return self._json({"error": "Invalid rev id"}, 404, REVISION_NOT_FOUND)
        sha, files = state
        if info and info[2] == "tree":
            return self._json([self._entry(path, data) for path, data in sorted(files.items())])
        if info:
            siblings = [{"rfilename": path} for path in sorted(files)]
            return self._json({"id": name, "sha": sha, "private": repository.private, "siblings": siblings})
        assert file is not None
        data = files.get(file[3])
        headers = {"X-Repo-Commit": sha}
        if data is None:
            return self._json({"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound", **headers})
        entry = self._entry(file[3], data)
        etag = entry["lfs"]["oid"] if "lfs" in entry else entry["oid"]
        return self._send(data, 200, {"ETag": f'"{etag}"', **headers}, "application/octet-stream", with_body)

    def _entry(self, path: str, data: bytes) -> dict[str, Any]:
        blob = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        entry: dict[str, Any] = {"type": "file", "path": path, "size": len(data), "oid": blob}
        if path.endswith(".safetensors"):
            entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
        return entry

    def _create(self, asked: dict[str, Any]) -> None:
        organization = asked.get("organization") or "me"
        if organization == "others":
            return self._json({"error": "You don't have the rights to create a model under others"}, 403)
        name = f"{organization}/{asked['name']}"
        status = 409 if name in self.server.repositories else 200
        private = bool(asked.get("private")) or asked.get("visibility") == "private"
        self.server.repositories.setdefault(name, Repository(private))
        return self._json({"url": f"{self.server.endpoint}/{name}", "name": name}, status)

    def _preupload(self, asked: dict[str, Any]) -> None:
        modes = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                "shouldIgnore": False,
            }
            for file in asked["files"]
        ]
        self._json({"files": modes})

    def _batch(self, asked: dict[str, Any]) -> None:
        objects = [
            {**item, "actions": {"upload": {"href": f"{self.server.endpoint}/large/{item['oid']}"}}}
            if item["oid"] not in self.server.large
            else item
            for item in asked["objects"]
        ]
        self._json({"transfer": "basic", "objects": objects})

    def _commit(self, name: str, repository: Repository, branch: str, body: bytes) -> None:
        files = dict(repository.branches[branch][1])
        for line in map(json.loads, body.decode().splitlines()):
            value = line["value"]
            if line["key"] == "header":
                self.server.messages.append(value["summary"])
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.large[value["oid"]]
        sha = repository.commit(branch, files)
        url = f"{self.server.endpoint}/{name}/commit/{sha}"
        self._json({"commitUrl": url, "commitOid": sha, "success": True})

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline().strip(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _json(self, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        body = json.dumps(value).encode()
        self._send(body, status, headers or {}, "application/json", self.command != "HEAD")

    def _send(self, body: bytes, status: int, headers: dict[str, str], kind: str, with_body: bool) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if with_body:
            self.wfile.write(body)
