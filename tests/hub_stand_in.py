"""A Hugging Face Hub in a thread: the part of its HTTP API that pushing uses, over real sockets and kept in memory.

Repositories with branches and commits, tokens with rights, Git LFS in one piece and in parts, and faults on demand. It checks what the
Hub checks: digests of what is uploaded, rights, a commit's parent. No Xet storage, unless it is told to offer one.
"""

from __future__ import annotations

import base64
import hashlib
import http.server
import json
import re
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote, urlsplit

LFS_KINDS = (".safetensors", ".gguf", ".bin")
PART_BYTES = 1 << 20
"""An LFS object above it goes up in parts of this size."""


@dataclass(frozen=True)
class Stored:
    """A file of a commit. `sha256` is set for one in LFS, whose bytes are the Hub's objects."""

    content: bytes = b""
    sha256: str = ""
    size_bytes: int = 0

    @property
    def blob_id(self) -> str:
        return _git_sha1(self.content or self.sha256.encode())


@dataclass(frozen=True)
class Commit:
    sha: str
    message: str
    files: dict[str, Stored]


@dataclass
class Repository:
    private: bool
    branches: dict[str, list[Commit]]


@dataclass
class Fault:
    """Befalls the next `times` requests whose method and path match: a status, or the connection is dropped or hangs."""

    method: str
    path: str
    times: int = 1
    status: int = 500
    headers: dict[str, str] = field(default_factory=dict)
    drops: bool = False
    hangs_s: float = 0.0
    after_it_is_done: bool = False
    """The request takes effect, and only its answer is lost."""


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that has gone is no news."""


class HubStandIn:
    """`url` answers from `start` to `stop`. `tokens` maps each token to the owners it may write for."""

    def __init__(self) -> None:
        self.tokens: dict[str, set[str]] = {"hf_good": {"ada", "org"}, "hf_reader": set()}
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.parts: dict[str, dict[int, bytes]] = {}
        self.faults: list[Fault] = []
        self.requests: list[tuple[str, str]] = []
        self.has_verify = True
        self.xet_url = ""
        self.signature = secrets.token_hex(16)
        self.lock = threading.RLock()
        hub = self

        class Handler(_Handler):
            stand_in = hub

        self._server = _Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def start(self) -> None:
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def create(self, name: str, *, private: bool = True) -> Repository:
        """As the Hub does, with a first commit."""
        first = Commit(_sha(), "initial commit", {".gitattributes": Stored(b"*.safetensors filter=lfs\n", size_bytes=26)})
        made = self.repositories[name] = Repository(private, {"main": [first]})
        return made

    def commits(self, name: str, branch: str = "main") -> list[Commit]:
        """Oldest first."""
        return self.repositories[name].branches[branch]

    def content(self, name: str, branch: str = "main") -> dict[str, bytes]:
        """Every file of the branch's newest commit, but for .gitattributes."""
        files = self.commits(name, branch)[-1].files
        return {path: self.objects[item.sha256] if item.sha256 else item.content for path, item in files.items() if path[0] != "."}

    def asked(self, pattern: str) -> list[str]:
        """Paths of the requests that have come so far, answered or not, whose method and path match."""
        return [path for method, path in self.requests if re.search(pattern, f"{method} {path}")]


@contextmanager
def running_hub() -> Iterator[HubStandIn]:
    """A Hub for as long as it is needed."""
    hub = HubStandIn()
    hub.start()
    try:
        yield hub
    finally:
        hub.stop()


class _Refusal(Exception):
    def __init__(self, status: int, text: str, *, code: str = "") -> None:
        super().__init__(text)
        self.status, self.text, self.code = status, text, code


class _Handler(http.server.BaseHTTPRequestHandler):
    stand_in: HubStandIn
    protocol_version = "HTTP/1.1"
    timeout = 30

    def do_GET(self) -> None:
        self._serve()

    do_HEAD = do_POST = do_PUT = do_GET

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        pass

    def _serve(self) -> None:
        hub, path = self.stand_in, urlsplit(self.path).path
        hub.requests.append((self.command, path))
        fault = self._fault(path)
        if fault is not None and not fault.after_it_is_done and self._befalls(fault):
            return
        body = self.rfile.read(int(self.headers.get("content-length") or 0)) if "transfer-encoding" not in self.headers else self._chunks()
        with hub.lock:
            try:
                status, answer, headers = self._answer(path, body)
            except _Refusal as error:
                status, answer = error.status, json.dumps({"error": error.text}).encode()
                headers = {"x-error-message": error.text} | ({"x-error-code": error.code} if error.code else {})
        if fault is not None and fault.after_it_is_done and self._befalls(fault):
            return
        self._send(status, answer, headers)

    def _fault(self, path: str) -> Fault | None:
        with self.stand_in.lock:
            for fault in self.stand_in.faults:
                if fault.times and fault.method == self.command and re.search(fault.path, path):
                    fault.times -= 1
                    return fault
        return None

    def _befalls(self, fault: Fault) -> bool:
        """Does it, and says whether that was the whole answer."""
        time.sleep(fault.hangs_s)
        self.close_connection = True
        if fault.drops:
            if not fault.after_it_is_done:
                # Some of the body is taken, as where a cable is pulled.
                self.rfile.read(min(1000, int(self.headers.get("content-length") or 0)))
            self.connection.shutdown(socket.SHUT_RDWR)
            return True
        if fault.hangs_s:
            return False
        self.rfile.read(int(self.headers.get("content-length") or 0))
        self._send(fault.status, b"<Error><Code>InternalError</Code></Error>", fault.headers)
        return True

    def _send(self, status: int, answer: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in ({"content-length": str(len(answer)), "content-type": "application/json"} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer)

    def _chunks(self) -> bytes:
        data = b""
        while size := int(self.rfile.readline(), 16):
            data += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return data

    def _answer(self, path: str, body: bytes) -> tuple[int, bytes, dict[str, str]]:
        for pattern, answer in _ROUTES:
            if match := re.fullmatch(pattern, f"{self.command} {path}"):
                given = answer(self, body, **{name: unquote(value) for name, value in match.groupdict().items()})
                return given if isinstance(given, tuple) else (200, json.dumps(given).encode(), {})
        raise _Refusal(404, "Sorry, we can't find the page you are looking for.")

    def _may(self, owner: str, *, write: bool) -> None:
        token = (self.headers.get("authorization") or "").removeprefix("Bearer ")
        if token not in self.stand_in.tokens:
            raise _Refusal(401, "Invalid credentials in Authorization header")
        if write and owner not in self.stand_in.tokens[token]:
            raise _Refusal(403, f"You don't have the rights to write under the namespace {owner!r}.")

    def _repository(self, repo: str, *, write: bool = False) -> Repository:
        owner = repo.split("/", maxsplit=1)[0]
        self._may(owner, write=write)
        found = self.stand_in.repositories.get(repo)
        token = (self.headers.get("authorization") or "").removeprefix("Bearer ")
        if found is None or (found.private and owner not in self.stand_in.tokens[token]):
            raise _Refusal(404, "Repository not found", code="RepoNotFound")
        return found

    def _commits(self, repo: str, revision: str, *, write: bool = False) -> list[Commit]:
        found = self._repository(repo, write=write)
        for branch, commits in found.branches.items():
            if revision == branch:
                return commits
            for number, commit in enumerate(commits, start=1):
                if commit.sha == revision:
                    return commits[:number]
        raise _Refusal(404, f"Invalid rev id: {revision}", code="RevisionNotFound")

    def create_repo(self, body: bytes) -> object:
        fields = json.loads(body)
        name = f"{fields['organization']}/{fields['name']}"
        self._may(fields["organization"], write=True)
        if name in self.stand_in.repositories:
            raise _Refusal(409, "You already created this model repo")
        self.stand_in.create(name, private=fields.get("visibility") == "private" or bool(fields.get("private")))
        return {"url": f"{self.stand_in.url}/{name}"}

    def info(self, _: bytes, repo: str, rev: str = "main") -> object:
        commits = self._commits(repo, rev)
        return {"id": repo, "modelId": repo, "sha": commits[-1].sha, "private": self._repository(repo).private, "tags": [], "siblings": []}

    def tree(self, _: bytes, repo: str, rev: str) -> object:
        listed: list[dict[str, object]] = []
        for path, item in self._commits(repo, rev)[-1].files.items():
            entry: dict[str, object] = {"type": "file", "path": path, "size": item.size_bytes, "oid": item.blob_id}
            if item.sha256:
                entry["lfs"] = {"oid": item.sha256, "size": item.size_bytes, "pointerSize": 130}
            listed.append(entry)
        return listed

    def branch(self, body: bytes, repo: str, rev: str) -> object:
        found = self._repository(repo, write=True)
        if rev in found.branches:
            raise _Refusal(409, "Reference already exists")
        found.branches[rev] = list(self._commits(repo, json.loads(body or b"{}").get("startingPoint", "main")))
        return {}

    def validate_yaml(self, body: bytes) -> object:
        if not json.loads(body)["content"].startswith("---\n"):
            return {"warnings": [{"message": "empty or missing yaml metadata in repo card"}]}
        return {}

    def preupload(self, body: bytes, repo: str, rev: str) -> object:
        files = self._commits(repo, rev, write=True)[-1].files
        answer: list[dict[str, object]] = []
        for item in json.loads(body)["files"]:
            in_lfs = item["path"].endswith(LFS_KINDS) or item["size"] > PART_BYTES
            there = files.get(item["path"])
            oid = (there.sha256 or there.blob_id) if there else None
            answer.append({"path": item["path"], "uploadMode": "lfs" if in_lfs else "regular", "shouldIgnore": False, "oid": oid})
        return {"files": answer}

    def batch(self, body: bytes, repo: str) -> object:
        self._repository(repo, write=True)
        objects: list[dict[str, Any]] = []
        for item in json.loads(body)["objects"]:
            oid, size = item["oid"], item["size"]
            entry: dict[str, Any] = {"oid": oid, "size": size}
            if oid not in self.stand_in.objects:
                base, query = f"{self.stand_in.url}/storage/{oid}", f"?X-Amz-Signature={self.stand_in.signature}"
                upload: dict[str, Any] = {"href": base + query}
                if size > PART_BYTES:
                    parts = -(-size // PART_BYTES)
                    header = {str(number): f"{base}/{number}{query}" for number in range(1, parts + 1)}
                    upload = {"href": f"{base}/complete{query}", "header": {"chunk_size": str(PART_BYTES), **header}}
                entry["actions"] = {"upload": upload}
                if self.stand_in.has_verify:
                    entry["actions"]["verify"] = {"href": f"{self.stand_in.url}/{repo}.git/info/lfs/verify"}
            objects.append(entry)
        return {"transfer": "multipart", "objects": objects}

    def store(self, body: bytes, oid: str) -> object:
        self._check_signature()
        if hashlib.sha256(body).hexdigest() != oid:
            raise _Refusal(400, "BadDigest")
        self.stand_in.objects[oid] = body
        return {}

    def store_part(self, body: bytes, oid: str, number: str) -> object:
        self._check_signature()
        self.stand_in.parts.setdefault(oid, {})[int(number)] = body
        return 200, b"", {"etag": hashlib.md5(body, usedforsecurity=False).hexdigest()}

    def complete(self, body: bytes, oid: str) -> object:
        self._check_signature()
        parts = self.stand_in.parts[oid]
        for item in json.loads(body)["parts"]:
            if hashlib.md5(parts[item["partNumber"]], usedforsecurity=False).hexdigest() != item["etag"]:
                raise _Refusal(400, "InvalidPart")
        return self.store(b"".join(parts[number] for number in sorted(parts)), oid)

    def _check_signature(self) -> None:
        if f"X-Amz-Signature={self.stand_in.signature}" not in self.path:
            raise _Refusal(403, "AccessDenied")

    def verify(self, body: bytes, repo: str) -> object:
        self._repository(repo, write=True)
        item = json.loads(body)
        if len(self.stand_in.objects.get(item["oid"], b"")) != item["size"]:
            raise _Refusal(422, "the object is not there")
        return {}

    def commit(self, body: bytes, repo: str, rev: str) -> object:
        commits = self._commits(repo, rev, write=True)
        lines = [json.loads(line) for line in body.splitlines()]
        head = lines[0]["value"]
        if head.get("parentCommit") not in (None, commits[-1].sha):
            raise _Refusal(412, "A commit has happened since. Please refresh and try again.")
        files = dict(commits[-1].files)
        for line in lines[1:]:
            self._change(files, line["key"], line["value"])
        made = Commit(_sha(), head["summary"], files)
        commits.append(made)
        return {
            "success": True,
            "commitOid": made.sha,
            "commitUrl": f"{self.stand_in.url}/{repo}/commit/{made.sha}",
            "pullRequestUrl": None,
        }

    def _change(self, files: dict[str, Stored], key: str, value: dict[str, Any]) -> None:
        if key == "file":
            content = base64.b64decode(value["content"])
            files[value["path"]] = Stored(content, size_bytes=len(content))
        elif key == "lfsFile":
            if value["oid"] not in self.stand_in.objects:
                raise _Refusal(400, f"LFS pointer of {value['path']} points to an object that is not there")
            files[value["path"]] = Stored(sha256=value["oid"], size_bytes=len(self.stand_in.objects[value["oid"]]))
        elif key == "deletedFile":
            del files[value["path"]]

    def resolve(self, _: bytes, repo: str, rev: str, name: str) -> object:
        commit = self._commits(repo, rev)[-1]
        if name not in commit.files:
            raise _Refusal(404, "Entry not found", code="EntryNotFound")
        item = commit.files[name]
        content = self.stand_in.objects[item.sha256] if item.sha256 else item.content
        headers = {"etag": f'"{item.blob_id}"', "x-repo-commit": commit.sha, "content-type": "application/octet-stream"}
        return 200, content, headers

    def xet_token(self, _: bytes, repo: str, rev: str) -> object:
        self._commits(repo, rev, write=True)
        if not self.stand_in.xet_url:
            raise _Refusal(404, "Not Found")
        expires = str(int(time.time()) + 3600)
        headers = {"x-xet-cas-url": self.stand_in.xet_url, "x-xet-access-token": "xet", "x-xet-token-expiration": expires}
        return 200, json.dumps({"casUrl": self.stand_in.xet_url, "accessToken": "xet", "exp": int(expires)}).encode(), headers


_REPO = r"(?P<repo>[^/]+/[^/]+?)"
_ROUTES: list[tuple[str, Callable[..., object]]] = [
    (r"POST /api/repos/create", _Handler.create_repo),
    (r"POST /api/validate-yaml", _Handler.validate_yaml),
    (rf"GET /api/models/{_REPO}", _Handler.info),
    (rf"GET /api/models/{_REPO}/revision/(?P<rev>[^/]+)", _Handler.info),
    (rf"GET /api/models/{_REPO}/tree/(?P<rev>[^/]+)", _Handler.tree),
    (rf"GET /api/models/{_REPO}/xet-write-token/(?P<rev>[^/]+)", _Handler.xet_token),
    (rf"POST /api/models/{_REPO}/branch/(?P<rev>[^/]+)", _Handler.branch),
    (rf"POST /api/models/{_REPO}/preupload/(?P<rev>[^/]+)", _Handler.preupload),
    (rf"POST /api/models/{_REPO}/commit/(?P<rev>[^/]+)", _Handler.commit),
    (rf"POST /{_REPO}\.git/info/lfs/objects/batch", _Handler.batch),
    (rf"POST /{_REPO}\.git/info/lfs/verify", _Handler.verify),
    (r"PUT /storage/(?P<oid>[0-9a-f]{64})", _Handler.store),
    (r"PUT /storage/(?P<oid>[0-9a-f]{64})/(?P<number>\d+)", _Handler.store_part),
    (r"POST /storage/(?P<oid>[0-9a-f]{64})/complete", _Handler.complete),
    (rf"(?:GET|HEAD) /{_REPO}/resolve/(?P<rev>[^/]+)/(?P<name>.+)", _Handler.resolve),
]


def _git_sha1(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def _sha() -> str:
    return secrets.token_hex(20)
