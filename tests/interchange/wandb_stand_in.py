"""A stand-in of W&B's server on this machine: as much of its GraphQL as `wandb.Api` asks to find and download an
artifact, by the names of the queries, as of wandb 0.31."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEY = "0123456789abcdef0123456789abcdef01234567"
TIME = "2026-01-01T00:00:00Z"
Answer = dict[str, Any]


@dataclass
class Server:
    """What it holds, and what it was asked."""

    address: str = ""
    artifacts: dict[str, dict[str, bytes]] = field(default_factory=dict)
    """The files of each `entity/project/name:alias`."""
    queries: list[str] = field(default_factory=list)
    keys: set[str] = field(default_factory=lambda: {KEY})
    """Who is let in."""

    def answer(self, query: str, values: dict[str, str]) -> Answer:
        """The data for a GraphQL query."""
        match = re.search(r"query (\w+)", query)
        assert match is not None
        self.queries.append(match[1])
        answers: dict[str, Callable[[dict[str, str]], Answer]] = {
            "Viewer": _viewer,
            "GetDefaultEntity": _viewer,
            "ServerFeaturesQuery": lambda _: {"serverInfo": {"features": []}},
            "ArtifactMembershipByName": self._membership,
            "FetchArtifactManifest": self._manifest,
            "ArtifactTypeArtifactCollections": self._collections,
            "ArtifactCollectionAliases": self._aliases,
        }
        return answers[match[1]](values)

    def file(self, path: str) -> bytes | None:
        """What is to be downloaded at `path`: a manifest, or a file by its digest."""
        *_, digest, name = path.split("/")
        if path.startswith("/manifest/"):
            contents = {
                file: {"digest": base64.b64encode(hashlib.md5(data).digest()).decode(), "size": len(data)}
                for file, data in self.artifacts[bytes.fromhex(name).decode()].items()
            }
            kept = {"version": 1, "storagePolicy": "wandb-storage-policy-v1", "contents": contents}
            return json.dumps({**kept, "storagePolicyConfig": {"storageLayout": "V2"}}).encode()
        by_digest = {
            hashlib.md5(data).hexdigest(): data for files in self.artifacts.values() for data in files.values()
        }
        return by_digest.get(digest)

    def _membership(self, values: dict[str, str]) -> Answer:
        project, name = f"{values['entity']}/{values['project']}/", values["name"]
        if not any(place.startswith(project) for place in self.artifacts):
            return {"project": None}
        found = _membership(project + name) if project + name in self.artifacts else None
        return {"project": {"artifactCollectionMembership": found}}

    def _manifest(self, values: dict[str, str]) -> Answer:
        url = f"{self.address}/manifest/{_from_id(values['id']).encode().hex()}"
        return {"artifact": {"currentManifest": {"file": {"directUrl": url}}}}

    def _collections(self, values: dict[str, str]) -> Answer:
        project = f"{values['entity']}/{values['project']}/"
        names = dict.fromkeys(place.rpartition(":")[0] for place in self.artifacts if place.startswith(project))
        found = _page([_collection(name) for name in names]) if values["type"] == "model" else _page([])
        return {"project": {"artifactType": {"artifactCollections": found}}}

    def _aliases(self, values: dict[str, str]) -> Answer:
        name = _from_id(values["id"])
        found = [_alias(place) for place in self.artifacts if place.startswith(f"{name}:")]
        return {"artifactCollection": {"__typename": "ArtifactSequence", "aliases": _page(found)}}


def _viewer(_: dict[str, str]) -> Answer:
    who = {"id": "u", "entity": "me", "username": "me", "email": "me@example.org"}
    return {"viewer": {**who, "teams": {"edges": []}, "flags": "{}"}}


def _membership(place: str) -> Answer:
    collection, aliases = _collection(place.rpartition(":")[0]), [_alias(place)]
    artifact = {
        "__typename": "Artifact", "id": _id(place), "artifactSequence": collection, "versionIndex": 0,
        "artifactType": {"name": "model"}, "description": None, "metadata": "{}", "ttlDurationSeconds": -1,
        "ttlIsInherited": True, "tags": [], "historyStep": None, "state": "COMMITTED", "size": 0, "digest": "d",
        "commitHash": "c", "fileCount": 1, "createdAt": TIME, "updatedAt": None, "aliases": aliases,
    }  # fmt: skip
    own = {"__typename": "ArtifactCollectionMembership", "id": "m", "versionIndex": 0, "createdAt": TIME}
    return {**own, "aliases": aliases, "artifactCollection": collection, "artifact": artifact}


def _collection(name: str) -> Answer:
    entity, project, own = name.split("/")
    where = {"id": "p", "internalId": "p", "name": project, "entity": {"name": entity}}
    kind: Answer = {"__typename": "ArtifactSequence", "type": {"name": "model"}, "tags": {"edges": []}}
    times = {"createdAt": TIME, "updatedAt": None}
    return {**kind, **times, "id": _id(name), "name": own, "project": where, "description": None}


def _alias(place: str) -> Answer:
    name, _, alias = place.rpartition(":")
    return {"__typename": "ArtifactAlias", "id": _id(place), "alias": alias, "artifactCollection": _collection(name)}


def _page(nodes: list[Answer]) -> Answer:
    info = {"__typename": "PageInfo", "endCursor": None, "hasNextPage": False}
    return {"totalCount": len(nodes), "pageInfo": info, "edges": [{"node": node} for node in nodes]}


def _id(name: str) -> str:
    return base64.b64encode(name.encode()).decode()


def _from_id(text: str) -> str:
    return base64.b64decode(text).decode()


@contextmanager
def server() -> Iterator[Server]:
    """Runs one until the context ends."""
    state = Server()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
            login = base64.b64decode(self.headers.get("authorization", "").removeprefix("Basic ")).decode()
            if login.partition(":")[2] not in state.keys:
                self._send(json.dumps({"errors": [{"message": "user is not logged in"}]}).encode(), 401)
                return
            self._send(json.dumps({"data": state.answer(asked["query"], asked.get("variables") or {})}).encode())

        def do_GET(self) -> None:
            found = state.file(self.path)
            self._send(found or b"", 200 if found is not None else 404)

        def _send(self, body: bytes, status: int = 200) -> None:
            self.send_response(status)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *_: Any) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        running.daemon_threads = True
        state.address = f"http://127.0.0.1:{running.server_address[1]}"
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        try:
            yield state
        finally:
            running.shutdown()
            thread.join()
