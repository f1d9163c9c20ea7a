"""A small Hub on loopback that keeps repositories on disk and talks to huggingface_hub's own client.

It knows what the client asks when a repository is created, uploaded to, tagged, listed and read. Faults can be ordered, so that
tests see what a broken connection leaves behind.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass
from dataclasses import field
from http.server import BaseHTTPRequestHandler
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote
from urllib.parse import urlsplit

TOKENS = {"hf_writer": ("org", "write"), "hf_reader": ("org", "read"), "hf_stranger": ("stranger", "write")}


@dataclass
class Fault:
    """What happens to the next matching requests: the connection is dropped before or after they are served, or a status."""

    pattern: str
    kind: str
    times: int


@dataclass
class Hub:
    """The server's state; repositories live in `root/<org>/<name>`, a JSON file of commits and a folder of contents each."""

    root: Path
    url: str = ""
    faults: list[Fault] = field(default_factory=list)
    log: list[str] = field(default_factory=list)

    def fail(self, pattern: str, kind: str, times: int = 1) -> None:
        self.faults.append(Fault(pattern, kind, times))

    def fault_of(self, line: str) -> str | None:
        for fault in self.faults:
            if fault.times and re.search(fault.pattern, line):
                fault.times -= 1
                return fault.kind
        return None

    def state_file(self, repo: str) -> Path:
        return self.root / repo / "repository.json"

    def load(self, repo: str) -> dict[str, Any] | None:
        path = self.state_file(repo)
        return json.loads(path.read_text()) if path.is_file() else None

    def save(self, repo: str, state: dict[str, Any]) -> None:
        self.state_file(repo).parent.mkdir(parents=True, exist_ok=True)
        self.state_file(repo).write_text(json.dumps(state))

    def content(self, repo: str, oid: str) -> Path:
        return self.root / repo / "contents" / oid

    def commits(self, repo: str) -> list[dict[str, Any]]:
        state = self.load(repo)
        return [] if state is None else state["commits"]

    def files(self, repo: str, branch: str = "main") -> dict[str, bytes]:
        """Return what a branch's newest commit holds."""
        state = self.load(repo)
        commits = [] if state is None else [each for each in state["commits"] if each["oid"] == state["branches"].get(branch)]
        files = commits[-1]["files"] if commits else {}
        return {path: self.content(repo, entry["oid"]).read_bytes() for path, entry in files.items()}


def serve(root: Path) -> tuple[Hub, ThreadingHTTPServer]:
    """Start a Hub on a free port of this machine; the caller shuts the server down."""
    hub = Hub(root)

    class Handler(HubHandler):
        pass

    Handler.hub = hub
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return hub, server


class HubError(Exception):
    def __init__(self, status: int, code: str, message: str, **more: Any) -> None:
        super().__init__(message)
        self.status, self.code, self.more = status, code, more


class HubHandler(BaseHTTPRequestHandler):
    """One request."""

    hub: Hub
    protocol_version = "HTTP/1.1"
    lock = threading.RLock()

    def log_message(self, *arguments: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._serve()

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    def _serve(self) -> None:
        path = unquote(urlsplit(self.path).path)
        line = f"{self.command} {path}"
        body = self._body()
        with self.lock:
            self.hub.log.append(line)
            fault = self.hub.fault_of(line)
            if fault == "drop":
                return self._drop()
            if fault is not None and fault.isdecimal():
                return self._answer(int(fault), {"error": "ordered by the test"})
            try:
                self._route(path, body, is_heard=fault != "drop after")
            except HubError as error:
                self._answer(
                    error.status,
                    {"error": str(error), **error.more},
                    {"X-Error-Code": error.code, "X-Error-Message": str(error)},
                )
            if fault == "drop after":
                self._drop()

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _drop(self) -> None:
        self.close_connection = True
        self.connection.close()

    def _answer(self, status: int, payload: Any, headers: dict[str, str] | None = None) -> None:
        data = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _route(self, path: str, body: bytes, *, is_heard: bool) -> None:
        answer: Callable[..., None] = self._answer if is_heard else lambda *arguments: None
        routes: list[tuple[str, str, Callable[..., Any]]] = [
            ("GET", r"/api/whoami-v2", self._whoami),
            ("POST", r"/api/validate-yaml", lambda: {"errors": [], "warnings": []}),
            ("POST", r"/api/repos/create", lambda: self._create(json.loads(body))),
            ("GET", r"/api/models/([^/]+/[^/]+)", self._info),
            ("GET", r"/api/models/([^/]+/[^/]+)/revision/(.+)", self._info),
            ("GET", r"/api/models/([^/]+/[^/]+)/tree/([^/]+)/?(.*)", self._tree),
            ("GET", r"/api/models/([^/]+/[^/]+)/refs", self._refs),
            ("POST", r"/api/models/([^/]+/[^/]+)/preupload/(.+)", lambda *a: self._preupload(*a, json.loads(body))),
            ("POST", r"/api/models/([^/]+/[^/]+)/commit/(.+)", lambda *a: self._commit(*a, body)),
            ("POST", r"/api/models/([^/]+/[^/]+)/tag/(.+)", lambda *a: self._tag(*a, json.loads(body))),
            ("POST", r"/api/models/([^/]+/[^/]+)/branch/(.+)", self._branch),
            ("POST", r"/(.+)\.git/info/lfs/objects/batch", lambda repo: self._batch(repo, json.loads(body))),
            ("PUT", r"/lfs/([^/]+/[^/]+)/(.+)", lambda *a: self._store(*a, body)),
        ]
        if self.command in ("GET", "HEAD") and (match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)):
            return self._resolve(*match.groups())
        for command, pattern, serve_it in routes:
            if command == self.command and (match := re.fullmatch(pattern, path)):
                return answer(200, serve_it(*match.groups()))
        return answer(404, {"error": f"no such route: {self.command} {path}"})

    def _user(self) -> tuple[str, str] | None:
        return TOKENS.get(self.headers.get("Authorization", "").removeprefix("Bearer "))

    def _whoami(self) -> dict[str, Any]:
        if (user := self._user()) is None:
            raise HubError(401, "", "Invalid username or password.")
        return {"name": user[0], "type": "user", "orgs": [], "auth": {"accessToken": {"role": user[1]}}}

    def _repository(self, repo: str, *, writes: bool = False) -> dict[str, Any]:
        state, user = self.hub.load(repo), self._user()
        name = repo.split("/")[0]
        if state is None or (state["private"] and (user is None or user[0] != name)):
            raise HubError(401 if user is None else 404, "RepoNotFound", "Repository not found")
        if writes:
            self._check_writer(name)
        return state

    def _check_writer(self, name: str) -> None:
        if (user := self._user()) is None:
            raise HubError(401, "", "Invalid username or password.")
        if user != (name, "write"):
            raise HubError(403, "", f"You don't have the rights to write to {name}")

    def _create(self, wanted: dict[str, Any]) -> dict[str, Any]:
        user = self._user()
        name = wanted.get("organization") or (user[0] if user else "")
        self._check_writer(name)
        repo = f"{name}/{wanted['name']}"
        place = {"url": f"{self.hub.url}/{repo}", "id": repo, "name": repo}
        if self.hub.load(repo) is not None:
            raise HubError(409, "", "You already created this model repo", **place)
        is_private = wanted.get("visibility") == "private" or bool(wanted.get("private"))
        first = _commit_of({}, "initial commit", [])
        self.hub.save(repo, {"private": is_private, "commits": [first], "tags": {}, "branches": {"main": first["oid"]}})
        return place

    def _commit_at(self, repo: str, revision: str) -> dict[str, Any]:
        state = self._repository(repo)
        oid = state["branches"].get(revision) or state["tags"].get(revision, revision)
        for commit in reversed(state["commits"]):
            if commit["oid"] == oid:
                return commit
        raise HubError(404, "RevisionNotFound", f"Invalid rev id: {revision}")

    def _info(self, repo: str, revision: str = "main") -> dict[str, Any]:
        state, commit = self._repository(repo), self._commit_at(repo, revision)
        siblings = [{"rfilename": path} for path in commit["files"]]
        return {"id": repo, "sha": commit["oid"], "private": state["private"], "siblings": siblings, "tags": []}

    def _tree(self, repo: str, revision: str, folder: str) -> list[dict[str, Any]]:
        files = self._commit_at(repo, revision)["files"]
        inside = {path: entry for path, entry in files.items() if not folder or path.startswith(f"{folder}/")}
        if folder and not inside:
            raise HubError(404, "EntryNotFound", f"{folder} does not exist")
        return [{"type": "file", "path": path, "size": e["size"], "oid": e["oid"]} for path, e in inside.items()]

    def _refs(self, repo: str) -> dict[str, Any]:
        state = self._repository(repo)
        tags = [{"name": n, "ref": f"refs/tags/{n}", "targetCommit": oid} for n, oid in state["tags"].items()]
        heads = [{"name": n, "ref": f"refs/heads/{n}", "targetCommit": oid} for n, oid in state["branches"].items()]
        return {"branches": heads, "tags": tags, "converts": []}

    def _branch(self, repo: str, branch: str) -> dict[str, Any]:
        state = self._repository(repo, writes=True)
        if branch in state["branches"]:
            raise HubError(409, "", "Reference already exists")
        state["branches"][branch] = state["branches"]["main"]
        self.hub.save(repo, state)
        return {}

    def _preupload(self, repo: str, revision: str, wanted: dict[str, Any]) -> dict[str, Any]:
        self._repository(repo, writes=True)
        known = self._commit_at(repo, revision)["files"]
        modes = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                "shouldIgnore": False,
                "oid": known.get(file["path"], {}).get("oid"),
            }
            for file in wanted["files"]
        ]
        return {"files": modes}

    def _batch(self, repo: str, wanted: dict[str, Any]) -> dict[str, Any]:
        self._repository(repo, writes=True)
        objects = []
        for each in wanted["objects"]:
            upload = {"upload": {"href": f"{self.hub.url}/lfs/{repo}/{each['oid']}", "header": {}}}
            has_it = self.hub.content(repo, each["oid"]).is_file()
            objects.append({**each} if has_it else {**each, "actions": upload})
        return {"transfer": "basic", "objects": objects}

    def _store(self, repo: str, oid: str, body: bytes) -> dict[str, Any]:
        if hashlib.sha256(body).hexdigest() != oid:
            raise HubError(400, "", "the content is not what its name says")
        _write(self.hub.content(repo, oid), body)
        return {}

    def _commit(self, repo: str, revision: str, body: bytes) -> dict[str, Any]:
        state = self._repository(repo, writes=True)
        lines = [json.loads(line) for line in body.splitlines() if line]
        files = dict(self._commit_at(repo, revision)["files"])
        for each in lines:
            value = each["value"]
            if each["key"] == "file":
                content = base64.b64decode(value["content"])
                oid = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
                _write(self.hub.content(repo, oid), content)
                files[value["path"]] = {"oid": oid, "size": len(content)}
            elif each["key"] == "lfsFile":
                if not self.hub.content(repo, value["oid"]).is_file():
                    raise HubError(400, "", "the content was never uploaded")
                files[value["path"]] = {"oid": value["oid"], "size": value["size"]}
            elif each["key"] == "deletedFile":
                files.pop(value["path"])
        commit = _commit_of(files, lines[0]["value"]["summary"], state["commits"])
        state["commits"].append(commit)
        url = {"success": True, "commitOid": commit["oid"], "commitUrl": f"{self.hub.url}/{repo}/commit/{commit['oid']}"}
        if "create_pr=1" in self.path:
            number = sum(name.startswith("refs/pr/") for name in state["branches"]) + 1
            revision = f"refs/pr/{number}"
            url["pullRequestUrl"] = f"{self.hub.url}/{repo}/discussions/{number}"
        state["branches"][revision] = commit["oid"]
        self.hub.save(repo, state)
        return url

    def _tag(self, repo: str, revision: str, wanted: dict[str, Any]) -> dict[str, Any]:
        state = self._repository(repo, writes=True)
        if wanted["tag"] in state["tags"]:
            raise HubError(409, "", "Tag already exists")
        state["tags"][wanted["tag"]] = self._commit_at(repo, revision)["oid"]
        self.hub.save(repo, state)
        return {}

    def _resolve(self, repo: str, revision: str, path: str) -> None:
        commit = self._commit_at(repo, revision)
        if path not in commit["files"]:
            error = {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit["oid"]}
            return self._answer(404, {"error": "Entry not found"}, error)
        entry = commit["files"][path]
        headers = {"X-Repo-Commit": commit["oid"], "ETag": f'"{entry["oid"]}"', "Accept-Ranges": "none"}
        return self._answer(200, self.hub.content(repo, entry["oid"]).read_bytes(), headers)


def _commit_of(files: dict[str, Any], title: str, earlier: list[Any]) -> dict[str, Any]:
    oid = hashlib.sha1(json.dumps([files, title, len(earlier)], sort_keys=True).encode()).hexdigest()
    return {"oid": oid, "title": title, "files": files}


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
