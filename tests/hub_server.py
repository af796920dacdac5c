"""A small Hub on 127.0.0.1 for tests: what `huggingface_hub` asks of the real one, and the ways in which it can fail.

    with HubServer() as hub:
        hub.fail("POST /api/models/.*/commit/", times=2)
        subprocess.run([...], env=hub.environment(home))   # the client reads HF_ENDPOINT when it is imported

Models and data sets live in memory. Large files (`lfs`) go through the LFS protocol, all others inside the commit. As
a program, `python tests/hub_server.py --port 8377`, it serves until it is stopped, to try the commands by hand.
"""

from __future__ import annotations

import argparse
import base64
import fnmatch
import hashlib
import json
import os
import re
import socket
import struct
import sys
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import huggingface_hub
import yaml

TOKEN = "hf_" + "WriteSecret" * 3  # looks like a real one, so that filters for real ones meet it
READ_TOKEN = "hf_" + "ReadSecret" * 3
LFS_FILES = ("*.safetensors", "*.parquet", "*.png", "*.bin")
KINDS = {"models": "model", "datasets": "dataset", "spaces": "space"}
_FRONT = re.compile(r"^---\r?\n(.*?)\r?\n---", re.S)
_REPO = r"([^/]+/[^/]+)"


@dataclass
class Commit:
    """One state of a branch: every file as (content, sha256 of a large one)."""

    oid: str
    title: str
    files: dict[str, tuple[bytes, str | None]]


@dataclass
class Repository:
    """Commits and the branches that point at them."""

    id: str
    kind: str
    private: bool
    commits: list[Commit] = field(default_factory=list)
    branches: dict[str, Commit] = field(default_factory=dict)

    def commit(self, title: str, files: dict[str, tuple[bytes, str | None]], branch: str = "main") -> Commit:
        oid = hashlib.sha1(f"{self.kind} {self.id} {len(self.commits)} {title}".encode()).hexdigest()
        self.commits.append(Commit(oid, title, files))
        self.branches[branch] = self.commits[-1]
        return self.commits[-1]

    def at(self, revision: str) -> Commit | None:
        by_oid = (c for c in self.commits if len(revision) >= 7 and c.oid.startswith(revision))
        return self.branches.get(revision) or next(by_oid, None)

    def contents(self, branch: str = "main") -> dict[str, bytes]:
        """What the branch holds, without the file that every repository begins with."""
        return {k: data for k, (data, _) in self.branches[branch].files.items() if k != ".gitattributes"}


@dataclass
class Fault:
    """What happens to the next `times` requests whose "METHOD /path" matches."""

    pattern: str
    times: int
    kind: str  # "fail", "hang", "cut"
    status: int = 500
    seconds: float = 0.0
    after: int = 0
    body: bytes = b'{"error": "Internal Error"}'


@dataclass
class Entry:
    """One line of the log."""

    method: str
    path: str
    size: int
    status: int = 0
    fault: str = ""


class _Gone(Exception):
    """The connection was cut on purpose."""


class _Refused(Exception):
    """An answer other than success."""

    def __init__(self, status: int, code: str = "", message: str = "", **headers: str) -> None:
        super().__init__(message)
        self.status, self.body, self.headers = status, {"error": message or code}, headers
        if code:
            self.headers["X-Error-Code"] = code
        if message:
            self.headers["X-Error-Message"] = message


def blob_id(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class HubServer:
    """The server; used as a context manager.

    Args:
        lfs: Files, by pattern, that go through the LFS protocol; needs `HF_HUB_DISABLE_XET=1`.
        user: Whom the tokens belong to.
        port: 0 for any free one.
    """

    def __init__(self, lfs: tuple[str, ...] = LFS_FILES, user: str = "robust", port: int = 0) -> None:
        self.lfs, self.user, self.port = lfs, user, port
        self.tokens = {TOKEN: "write", READ_TOKEN: "read"}
        self.namespaces = {user, "lab"}
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.blobs: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.log: list[Entry] = []
        self.lock = threading.RLock()
        self.stopped = threading.Event()

    def __enter__(self) -> HubServer:
        handler = type("HubHandler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", self.port), handler)
        self.server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.stopped.set()
        self.server.shutdown()
        self.server.server_close()

    def environment(self, home: Path | str, token: str | None = TOKEN, **more: str) -> dict[str, str]:
        """Environment of a client process: this server, an empty cache, a token."""
        values = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING", "TRANSFORMERS_"))}
        values |= {"HF_ENDPOINT": self.endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
        values |= {"HF_HUB_DISABLE_TELEMETRY": "1", "OMP_NUM_THREADS": "1", "NO_PROXY": "127.0.0.1"}
        return values | ({"HF_TOKEN": token} if token else {}) | more

    # ------------------------------------------------------------------ faults
    def fail(self, pattern: str, times: int = 1, status: int = 500, body: bytes | None = None) -> None:
        """Answer with an error, without doing anything."""
        self.faults.append(Fault(pattern, times, "fail", status, body=body or Fault.body))

    def hang(self, pattern: str, times: int = 1, seconds: float = 30.0) -> None:
        """Give no sign of life for so long, then cut the connection."""
        self.faults.append(Fault(pattern, times, "hang", seconds=seconds))

    def cut(self, pattern: str, times: int = 1, after: int = 100) -> None:
        """Cut the connection after so many bytes of the request's body or, where it has none, of the answer's."""
        self.faults.append(Fault(pattern, times, "cut", after=after))

    def heal(self) -> None:
        """No more faults."""
        self.faults.clear()

    def seen(self, pattern: str) -> list[Entry]:
        """Logged requests whose "METHOD /path" matches."""
        return [e for e in self.log if re.match(pattern, f"{e.method} {e.path}")]

    def repository(self, name: str, kind: str = "model") -> Repository:
        return self.repositories[kind, name]

    def take_fault(self, line: str) -> Fault | None:
        with self.lock:
            found = next((f for f in self.faults if f.times > 0 and re.match(f.pattern, line)), None)
            if found is not None:
                found.times -= 1
            return found


def connect(monkeypatch: Any, hub: HubServer, home: Path, token: str | None = TOKEN) -> HubServer:
    """Let the client of this process talk to the server; what it reads when it is imported is set here instead."""
    constants = huggingface_hub.constants
    for name, value in {"ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True}.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    huggingface_hub.close_session()
    return hub


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: HubServer
    entry: Entry

    def log_message(self, *_: Any) -> None:
        """Nothing on standard error: `HubServer.log` holds it."""

    def _answer(self) -> None:
        url = urlsplit(self.path)
        size = int(self.headers.get("Content-Length") or 0)
        self.entry = Entry(self.command, self.path, size)
        with self.hub.lock:
            self.hub.log.append(self.entry)
        fault = self.hub.take_fault(f"{self.command} {self.path}")
        self.cut_after = None
        try:
            if fault is not None:
                self.entry.fault = fault.kind
                if fault.kind == "hang":
                    self._read(size)
                    self.hub.stopped.wait(fault.seconds)  # tests may have replaced time.sleep
                    raise _Gone
                if fault.kind == "cut":
                    if size:
                        self.rfile.read(min(size, fault.after))
                        raise _Gone
                    self.cut_after = fault.after
            body = self._read(size)
            if fault is not None and fault.kind == "fail":
                return self._send(fault.status, fault.body)
            try:
                with self.hub.lock:
                    self._route(url.path, parse_qs(url.query), body)
            except _Refused as refused:
                self._send(refused.status, refused.body, headers=refused.headers)
        except (_Gone, BrokenPipeError, ConnectionResetError, TimeoutError):
            self._hang_up()

    do_GET = do_POST = do_PUT = do_DELETE = do_HEAD = _answer

    def _hang_up(self) -> None:
        self.close_connection = True
        try:  # a reset, not a polite end
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
        except OSError:
            pass

    def _read(self, size: int) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(size)
        out = b""
        while count := int(self.rfile.readline().split(b";")[0], 16):
            out += self.rfile.read(count)
            self.rfile.readline()
        self.rfile.readline()
        return out

    def _send(
        self, status: int, body: Any = b"", kind: str = "application/json", headers: dict[str, str] | None = None
    ) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.entry.status = status
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        self.wfile.write(data if self.cut_after is None else data[: self.cut_after])
        if self.cut_after is not None:
            self.wfile.flush()
            raise _Gone

    # ------------------------------------------------------------------ who may do what
    @property
    def role(self) -> str:
        """ "write", "read" or nothing; a wrong token is worse than none."""
        token = self.headers.get("Authorization", "").removeprefix("Bearer ").strip()
        if not token:
            return ""
        if token not in self.hub.tokens:
            raise _Refused(401, "", "Invalid credentials in Authorization header")
        return self.hub.tokens[token]

    def _may_write(self, name: str) -> None:
        if not self.role:
            raise _Refused(401, "", "Invalid username or password.")
        if self.role != "write" or name.split("/")[0] not in self.hub.namespaces:
            raise _Refused(403, "", "You don't have the rights to write here")

    def _find(self, kind: str, name: str) -> Repository:
        found = self.hub.repositories.get((kind, name))
        if found is None or found.private and not self.role:
            raise _Refused(404 if self.role else 401, "RepoNotFound", "Repository not found")
        return found

    def _at(self, repository: Repository, revision: str) -> Commit:
        found = repository.at(revision)
        if found is None:
            raise _Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return found

    # ------------------------------------------------------------------ routes
    def _route(self, path: str, query: dict[str, list[str]], body: bytes) -> None:
        plain = {
            "/api/whoami-v2": self._whoami,
            "/api/validate-yaml": self._validate_yaml,
            "/api/repos/create": self._create,
            "/api/repos/delete": self._delete,
            "/lfs/verify": self._verify,
        }
        if path in plain:
            return plain[path](body)
        if found := re.fullmatch(r"/lfs/([0-9a-f]{64})", path):
            return self._large_file(found[1], body)
        if found := re.fullmatch(rf"/(?:(datasets|spaces)/)?{_REPO}\.git/info/lfs/objects/batch", path):
            return self._batch(found[2], json.loads(body))
        if found := re.fullmatch(rf"/api/(models|datasets|spaces)/{_REPO}(?:/([^/]+))?(?:/(.*))?", path):
            kind, name, operation, rest = KINDS[found[1]], found[2], found[3] or "revision", found[4] or ""
            method = getattr(self, f"_api_{operation.replace('-', '_')}", None)
            if method is None:
                raise _Refused(404, "", f"no such operation {operation}")
            return method(self._find(kind, name), unquote(rest) if operation != "tree" else rest, query, body)
        if found := re.fullmatch(rf"/(?:(datasets|spaces)/)?{_REPO}/resolve/([^/]+)/(.+)", path):
            repository = self._find(KINDS[found[1]] if found[1] else "model", found[2])
            return self._resolve(repository, unquote(found[3]), unquote(found[4]))
        raise _Refused(404, "", f"no route {self.command} {path}")

    def _whoami(self, _: bytes) -> None:
        if not self.role:
            raise _Refused(401, "", "Invalid username or password.")
        access = {"accessToken": {"displayName": "test", "role": self.role}}
        self._send(200, {"type": "user", "name": self.hub.user, "orgs": [{"name": "lab"}], "auth": access})

    def _validate_yaml(self, body: bytes) -> None:
        front = _FRONT.match(json.loads(body)["content"])
        if not front:
            return self._send(200, {"errors": [], "warnings": [{"message": "empty or missing yaml metadata"}]})
        try:
            yaml.safe_load(front[1])
        except yaml.YAMLError as error:
            return self._send(400, {"errors": [{"message": str(error)}], "warnings": []})
        self._send(200, {"errors": [], "warnings": []})

    def _create(self, body: bytes) -> None:
        wanted = json.loads(body)
        name, kind = f"{wanted.get('organization') or self.hub.user}/{wanted['name']}", wanted.get("type") or "model"
        self._may_write(name)
        url = f"{self.hub.endpoint}/{'' if kind == 'model' else kind + 's/'}{name}"
        if (kind, name) in self.hub.repositories:
            message = "You already created this repo"
            return self._send(409, {"error": message, "url": url}, headers={"X-Error-Message": message})
        private = bool(wanted.get("visibility") == "private" or wanted.get("private"))
        repository = self.hub.repositories[kind, name] = Repository(name, kind, private)
        repository.commit("initial commit", {".gitattributes": (b"*.safetensors filter=lfs\n", None)})
        self._send(200, {"url": url, "name": name, "id": name})

    def _delete(self, body: bytes) -> None:
        wanted = json.loads(body)
        name = f"{wanted.get('organization') or self.hub.user}/{wanted['name']}"
        self._may_write(name)
        if self.hub.repositories.pop((wanted.get("type") or "model", name), None) is None:
            raise _Refused(404, "RepoNotFound")
        self._send(200, {})

    # ------------------------------------------------------------------ large files
    def _batch(self, name: str, wanted: dict[str, Any]) -> None:
        self._may_write(name)
        objects = []
        for each in wanted["objects"]:
            entry: dict[str, Any] = {"oid": each["oid"], "size": each["size"]}
            if each["oid"] not in self.hub.blobs:
                base = f"{self.hub.endpoint}/lfs"
                entry["actions"] = {"upload": {"href": f"{base}/{each['oid']}"}, "verify": {"href": f"{base}/verify"}}
            objects.append(entry)
        self._send(200, {"transfer": "basic", "objects": objects}, "application/vnd.git-lfs+json")

    def _large_file(self, oid: str, body: bytes) -> None:
        if self.command != "PUT":
            return self._send(200, self.hub.blobs[oid], "application/octet-stream")
        if hashlib.sha256(body).hexdigest() != oid:
            raise _Refused(400, "", "the content has another sha256")
        self.hub.blobs[oid] = body
        self._send(200, b"")

    def _verify(self, body: bytes) -> None:
        wanted = json.loads(body)
        whole = len(self.hub.blobs.get(wanted["oid"], b"")) == wanted["size"]
        self._send(200 if whole else 404, {})

    # ------------------------------------------------------------------ of one repository
    def _api_revision(self, repository: Repository, revision: str, *_: Any) -> None:
        commit = self._at(repository, revision or "main")
        front = _FRONT.match(commit.files.get("README.md", (b"", None))[0].decode())
        card = (yaml.safe_load(front[1]) if front else None) or {}
        day = "2026-01-01T00:00:00.000Z"
        about: dict[str, Any] = {
            "_id": repository.id,
            "id": repository.id,
            "author": repository.id.split("/")[0],
            "sha": commit.oid,
        }
        about |= {"modelId": repository.id} if repository.kind == "model" else {}
        about |= {"lastModified": day, "createdAt": day, "gated": False, "disabled": False, "downloads": 0, "likes": 0}
        about |= {key: card[key] for key in ("library_name", "pipeline_tag", "model-index") if key in card}
        files = [{"rfilename": name} for name in commit.files]
        tags = list(card.get("tags") or [])
        self._send(200, {**about, "private": repository.private, "tags": tags, "cardData": card, "siblings": files})

    def _api_preupload(self, repository: Repository, revision: str, _: Any, body: bytes) -> None:
        self._may_write(repository.id)
        commit, out = self._at(repository, revision), []
        for file in json.loads(body)["files"]:
            large = any(fnmatch.fnmatch(file["path"], pattern) for pattern in self.hub.lfs)
            there = commit.files.get(file["path"])
            oid = (there[1] or blob_id(there[0])) if there else None
            mode = "lfs" if large else "regular"
            out.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self._send(200, {"files": out})

    def _api_commit(self, repository: Repository, branch: str, _: Any, body: bytes) -> None:
        self._may_write(repository.id)
        if branch not in repository.branches:
            raise _Refused(404, "RevisionNotFound", f"Invalid rev id: {branch}")
        files, title = dict(repository.branches[branch].files), ""
        for line in body.splitlines():
            item = json.loads(line)
            value, path = item["value"], item["value"].get("path", "")
            if item["key"] == "header":
                title = value["summary"]
            elif item["key"] == "file":
                files[path] = (base64.b64decode(value["content"]), None)
            elif item["key"] == "lfsFile":
                if value["oid"] not in self.hub.blobs:
                    raise _Refused(400, "", f"no large file {value['oid']}")
                files[path] = (self.hub.blobs[value["oid"]], value["oid"])
            elif item["key"] == "deletedFile" and path not in files:
                raise _Refused(404, "EntryNotFound", "A file with this name doesn't exist")
            elif item["key"] == "deletedFile":
                del files[path]
            elif item["key"] == "deletedFolder":
                files = {k: v for k, v in files.items() if not k.startswith(path.rstrip("/") + "/")}
        commit = repository.commit(title, files, branch)
        url = f"{self.hub.endpoint}/{repository.id}/commit/{commit.oid}"
        self._send(200, {"success": True, "commitOid": commit.oid, "commitUrl": url, "hookOutput": ""})

    def _api_tree(self, repository: Repository, rest: str, query: dict[str, list[str]], _: Any) -> None:
        revision, _, folder = rest.partition("/")
        commit, folder = self._at(repository, unquote(revision)), unquote(folder).strip("/")
        deep = query.get("recursive", ["false"])[0].lower() in ("true", "1")
        start, listed = (f"{folder}/" if folder else ""), {}
        for path, (data, large) in sorted(commit.files.items()):
            if not path.startswith(start):
                continue
            parts = path.removeprefix(start).split("/")
            for depth in range(1, len(parts) if deep else min(2, len(parts))):
                inner = start + "/".join(parts[:depth])
                listed[inner] = {"type": "directory", "path": inner, "size": 0, "oid": blob_id(inner.encode())}
            if deep or len(parts) == 1:
                listed[path] = self._listed(path, data, large)
        if folder and not listed:
            raise _Refused(404, "EntryNotFound", f"{folder} does not exist")
        self._send(200, list(listed.values()))

    def _api_paths_info(self, repository: Repository, revision: str, _: Any, body: bytes) -> None:
        commit, form = self._at(repository, revision), "json" not in self.headers.get("Content-Type", "")
        paths = parse_qs(body.decode()).get("paths", []) if form else json.loads(body)["paths"]
        paths = [paths] if isinstance(paths, str) else paths
        self._send(200, [self._listed(p, *commit.files[p]) for p in paths if p in commit.files])

    def _api_refs(self, repository: Repository, *_: Any) -> None:
        branches = [
            {"name": name, "ref": f"refs/heads/{name}", "targetCommit": commit.oid}
            for name, commit in repository.branches.items()
        ]
        self._send(200, {"branches": branches, "converts": [], "tags": []})

    def _api_commits(self, repository: Repository, *_: Any) -> None:
        day = "2026-01-01T00:00:00.000Z"
        commits = [
            {"id": c.oid, "title": c.title, "message": "", "date": day, "authors": []} for c in repository.commits
        ]
        self._send(200, commits[::-1])

    def _api_branch(self, repository: Repository, branch: str, *_: Any) -> None:
        self._may_write(repository.id)
        if branch in repository.branches:
            raise _Refused(409, "", "Reference already exists")
        repository.branches[branch] = repository.branches["main"]
        self._send(201, {})

    @staticmethod
    def _listed(path: str, data: bytes, large: str | None) -> dict[str, Any]:
        entry: dict[str, Any] = {"type": "file", "path": path, "size": len(data), "oid": blob_id(data)}
        return entry | ({"lfs": {"oid": large, "size": len(data), "pointerSize": 134}} if large else {})

    def _resolve(self, repository: Repository, revision: str, path: str) -> None:
        commit = self._at(repository, revision)
        if path not in commit.files:
            raise _Refused(404, "EntryNotFound", "Entry not found", **{"X-Repo-Commit": commit.oid})
        data, large = commit.files[path]
        headers = {"X-Repo-Commit": commit.oid, "ETag": f'"{large or blob_id(data)}"', "Accept-Ranges": "bytes"}
        if large:
            headers |= {"X-Linked-Etag": f'"{large}"', "X-Linked-Size": str(len(data))}
        part = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if part and self.command == "GET":
            first, last = int(part[1]), min(int(part[2] or len(data) - 1), len(data) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
            return self._send(206, data[first : last + 1], "application/octet-stream", headers)
        self._send(200, data, "application/octet-stream", headers)


def main() -> None:
    """Serve until stopped."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, default=8377)
    port = parser.parse_args().port
    with HubServer(user="user", port=port) as hub:
        sys.stdout.write(
            f"export HF_ENDPOINT={hub.endpoint} HF_TOKEN={TOKEN} HF_HOME=$(mktemp -d) "
            "HF_HUB_DISABLE_XET=1 HF_HUB_OFFLINE=0\n"
        )
        sys.stdout.flush()
        hub.thread.join()


if __name__ == "__main__":
    main()
