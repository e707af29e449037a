"""A stand-in for the Hub on this machine: the few routes that huggingface_hub's uploads call, and what they left."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_of_the_stand_in"
LARGE = (".safetensors", ".gguf")  # what goes by LFS, as the Hub's own .gitattributes say


@dataclass
class Hub:
    url: str = ""
    repos: dict[str, dict[str, bytes]] = field(default_factory=dict)  # files by their paths, by the repository's name
    private: dict[str, bool] = field(default_factory=dict)
    stored: dict[str, bytes] = field(default_factory=dict)  # LFS objects by their SHA-256
    commits: list[str] = field(default_factory=list)  # their messages
    full: bool = False  # takes nothing any more


@contextmanager
def running() -> Iterator[Hub]:
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), lambda *args: _Handler(hub, *args))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, hub: Hub, *args: Any):
        self.hub = hub
        super().__init__(*args)

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        repo = self.path.removeprefix("/api/models/")
        if not self._known():
            return
        if self.path == "/api/whoami-v2":
            self._answer({"name": "me", "type": "user", "orgs": [{"name": "lab"}]})
        elif repo in self.hub.repos:
            self._answer({"id": repo, "sha": "1" * 40})
        else:
            self._answer({"error": "Repository not found"}, 404)

    def do_PUT(self) -> None:
        content, oid = self._body(), self.path.rpartition("/")[2]
        assert hashlib.sha256(content).hexdigest() == oid
        self.hub.stored[oid] = content
        self._answer({})

    def do_POST(self) -> None:
        body = self._body()
        if not self._known():
            return
        if self.path == "/api/validate-yaml":
            self._answer({"errors": [], "warnings": []})
        elif self.path == "/api/repos/create":
            self._create(json.loads(body))
        elif "/preupload/" in self.path:
            self._preupload(json.loads(body))
        elif self.path.endswith("/objects/batch"):
            self._batch(json.loads(body))
        else:
            self._commit([json.loads(line) for line in body.decode().splitlines()])

    def _create(self, asked: dict[str, Any]) -> None:
        owner = asked.get("organization") or "me"
        repo = f"{owner}/{asked['name']}"
        if owner not in ("me", "lab"):
            self._answer({"error": f"You don't have the rights to create a model under {owner}"}, 403)
            return
        url = f"{self.hub.url}/{repo}"
        if repo in self.hub.repos:
            self._answer({"error": "You already created this model repo", "url": url}, 409)
            return
        self.hub.repos[repo] = {}
        self.hub.private[repo] = asked.get("private") is True or asked.get("visibility") == "private"
        self._answer({"url": url, "name": repo})

    def _preupload(self, asked: dict[str, Any]) -> None:
        files = [
            {"path": f["path"], "uploadMode": "lfs" if f["path"].endswith(LARGE) else "regular", "shouldIgnore": False}
            for f in asked["files"]
        ]
        self._answer({"files": files, "commitOid": "0" * 40})

    def _batch(self, asked: dict[str, Any]) -> None:
        if self.hub.full:
            self._answer({"error": "Storage limit reached"}, 507)
            return
        objects = [
            {**o, "actions": {"upload": {"href": f"{self.hub.url}/lfs/{o['oid']}", "header": {}}}}
            for o in asked["objects"]
        ]
        self._answer({"transfer": "basic", "objects": objects})

    def _commit(self, lines: list[dict[str, Any]]) -> None:
        repo = self.path.removeprefix("/api/models/").partition("/commit/")[0]
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                self.hub.commits.append(value["summary"])
            elif line["key"] == "file":
                assert value["encoding"] == "base64"
                self.hub.repos[repo][value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                content = self.hub.stored[value["oid"]]
                assert len(content) == value["size"]
                self.hub.repos[repo][value["path"]] = content
        url = f"{self.hub.url}/{repo}/commit/{'1' * 40}"
        self._answer({"success": True, "commitOid": "1" * 40, "commitUrl": url})

    def _known(self) -> bool:
        if self.headers.get("authorization") == f"Bearer {TOKEN}":
            return True
        self._answer({"error": "Invalid credentials in Authorization header"}, 401)
        return False

    def _body(self) -> bytes:
        if self.headers.get("transfer-encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("content-length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _answer(self, content: dict[str, Any], status: int = 200) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        if status == 401:
            self.send_header("X-Error-Message", str(content["error"]))
        self.end_headers()
        self.wfile.write(data)
