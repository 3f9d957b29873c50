"""Serve the Hugging Face Hub's HTTP protocol on the loopback, from memory, to the unmodified `huggingface_hub`."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import secrets
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit


LFS_SUFFIXES = (".bin", ".png", ".pt", ".safetensors")
TASKS = {
    "MaskedLM": "fill-mask",
    "QuestionAnswering": "question-answering",
    "SequenceClassification": "text-classification",
    "TokenClassification": "token-classification",
}
GIT_ATTRIBUTES = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES)


class HubError(Exception):
    """Answer a request with an error, in the headers that `huggingface_hub` turns into its exceptions."""

    def __init__(self, status: int, message: str, code: str = "", **body: Any) -> None:
        super().__init__(message)
        self.status, self.body = status, {"error": message, **body}
        self.headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})


class Account(NamedTuple):
    """Say whose a token is, and its role: `"read"` or `"write"`."""

    user: str
    role: str


class Reply(NamedTuple):
    """Hold an answer before it goes on the wire, which half of it does if it is `cut`."""

    status: int
    body: bytes
    headers: Mapping[str, str]
    cut: bool = False


@dataclass(frozen=True)
class File:
    """Hold one version of a file, stored in git or as a large object (LFS)."""

    data: bytes
    lfs: bool = False

    @property
    def etag(self) -> str:
        """Return the id by which the client tells versions apart: that of the LFS object, or of the git blob."""
        blob = b"blob %d\0%s" % (len(self.data), self.data)
        return hashlib.sha256(self.data).hexdigest() if self.lfs else hashlib.sha1(blob).hexdigest()


@dataclass(frozen=True)
class Commit:
    """Hold one state of a repository, and the commits before it."""

    title: str
    files: Mapping[str, File]
    history: tuple[Commit, ...] = ()
    oid: str = field(default_factory=lambda: secrets.token_hex(20))
    date: str = field(default_factory=lambda: datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.%fZ"))


class Repo:
    """Hold a model repository: its commits, and the branches and pull requests that name them."""

    def __init__(self, name: str, private: bool = False) -> None:
        self.name, self.private = name, private
        first = Commit("initial commit", {".gitattributes": File(GIT_ATTRIBUTES.encode())})
        self.commits, self.refs = {first.oid: first}, {"refs/heads/main": first.oid}

    def ref(self, revision: str) -> str:
        """Return the full name of a branch or a pull request."""
        return revision if revision.startswith("refs/") else f"refs/heads/{revision}"

    def at(self, revision: str) -> Commit:
        """Return the commit that a branch, a pull request or a commit's id names."""
        oid = self.refs.get(self.ref(revision), revision)
        if oid not in self.commits:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return self.commits[oid]


def as_list(value: Any) -> list[Any]:
    """Make a list of what a card may give as a list, as a scalar or not at all."""
    return value if isinstance(value, list) else [] if value is None else [value]


def read_card(files: Mapping[str, File]) -> dict[str, Any]:
    """Read a model card's YAML header as far as the Hub's answers need it: scalars, and lists of scalars."""
    text = files["README.md"].data.decode() if "README.md" in files else ""
    header = re.match(r"---\r?\n(.*?)\r?\n---", text, re.DOTALL)
    card: dict[str, Any] = {}
    key = ""
    for line in header[1].splitlines() if header else ():
        if pair := re.fullmatch(r"([\w-]+):\s*(.*)", line):
            key = pair[1]
            card[key] = pair[2].strip("[]'\"") or []
        elif (item := re.fullmatch(r"\s*- (.*[^:])", line)) and isinstance(card.get(key), list) and ": " not in line:
            card[key].append(item[1].strip("'\""))
    return {key: value for key, value in card.items() if value}


def check_card(files: Mapping[str, File]) -> None:
    """Reject what the Hub rejects in a card: ids that are paths, as a model that was loaded from a folder leaves."""
    card = read_card(files)
    for key, kind in (("base_model", "model"), ("datasets", "dataset")):
        for value in as_list(card.get(key)):
            if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", value):
                message = f'"{key}" with value "{value}" is not valid. Use a {kind} id from https://hf.co/{kind}s.'
                raise HubError(400, message, errors=[{"message": message}])


Handler = Callable[..., Any]
ROUTES: list[tuple[str, re.Pattern[str], Handler]] = []
PARTS = {"repo": "[^/]+(?:/[^/]+)??", "path": ".+"}  # a repository of the Hub's early days has no namespace


def route(method: str, template: str) -> Callable[[Handler], Handler]:
    """Register a handler, which gets the parts of the path that are in braces."""
    pattern = re.sub(r"{(\w+)}", lambda name: f"(?P<{name[1]}>{PARTS.get(name[1], '[^/]+')})", template)

    def register(handler: Handler) -> Handler:
        ROUTES.append((method, re.compile(pattern), handler))
        return handler

    return register


class HubServer:
    """Run a Hub on which `"me"` has two tokens, within a `with` block; `tokens` takes more accounts."""

    def __init__(self) -> None:
        self.write_token, self.read_token = "hf_write", "hf_read"
        self.tokens = {self.write_token: Account("me", "write"), self.read_token: Account("me", "read")}
        self.requests: list[tuple[str, str]] = []
        self.repos: dict[str, Repo] = {}
        self._objects: dict[str, bytes] = {}  # the LFS store, by sha256
        self._uploads: dict[str, str] = {}  # the secret in an upload's address -> the sha256 it is for
        self._failures: list[tuple[str, int]] = []
        self._lock = threading.Lock()
        self._http = _HttpServer(("127.0.0.1", 0), _HttpHandler)
        self._http.hub = self
        self.url = f"http://127.0.0.1:{self._http.server_port}"

    def __enter__(self) -> HubServer:
        # Leaving the block waits for one poll.
        threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._http.server_close()

    def client_env(self, home: Path, token: str) -> dict[str, str]:
        """Return what the environment of a fresh process needs, since the libraries read it when they are imported."""
        env = {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_TOKEN": token, "NO_PROXY": "127.0.0.1"}
        return env | {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}  # Xet is another protocol, elsewhere

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        """Return what a repository holds at a revision."""
        return {path: file.data for path, file in self.repos[repo].at(revision).files.items()}

    def fail_next(self, request: str, *, status: int = 0, times: int = 1) -> None:
        """Fail the next requests whose `"METHOD /path"` contains `request`, and change nothing.

        With a `status` the answer is that error. Without, the connection drops: half way through the answer to a GET,
        before any answer to the rest. After a drop or a 5xx the client repeats an upload five times, a commit never.
        """
        self._failures += [(request, status)] * times

    def answer(self, request: _HttpHandler) -> Reply:
        """Answer a request, or drop its connection."""
        with self._lock:
            self.requests.append((request.command, request.path))
            failure = next((it for it in self._failures if it[0] in f"{request.command} {request.path}"), None)
            try:
                if failure is not None:
                    self._failures.remove(failure)
                    if failure[1]:
                        raise HubError(failure[1], "This failure was asked for")
                    if request.command != "GET":
                        raise ConnectionAbortedError
                result = self._dispatch(request)
            except HubError as error:
                result = Reply(error.status, json.dumps(error.body).encode(), error.headers)
            except (KeyError, ValueError) as error:
                result = Reply(400, json.dumps({"error": f"Malformed request: {error!r}"}).encode(), {})
        if not isinstance(result, Reply):
            result = Reply(200, json.dumps(result).encode(), {"Content-Type": "application/json"})
        return result._replace(cut=failure is not None and failure[1] == 0)

    def _dispatch(self, request: _HttpHandler) -> Any:
        if request.token and request.token not in self.tokens:
            raise HubError(401, "Invalid credentials in Authorization header")
        path, method = urlsplit(request.path).path, request.command.replace("HEAD", "GET")
        for verb, pattern, handler in ROUTES:
            if verb == method and (match := pattern.fullmatch(path)):
                return handler(self, request, **{name: unquote(part) for name, part in match.groupdict().items()})
        raise HubError(404, f"No route for {method} {path}")

    def _open(self, request: _HttpHandler, name: str, *, write: bool = False, pull_request: bool = False) -> Repo:
        """Return a repository if the request may read it, or write to it."""
        account, repo = self.tokens.get(request.token), self.repos.get(name)
        owner = account is not None and account.user == name.split("/")[0]
        if account is None and (repo is None or repo.private or write):
            # The Hub sends no code here: over https, and only there, the client takes every 401 for this one.
            raise HubError(401, "Invalid username or password.", "RepoNotFound")
        if repo is None or (repo.private and not owner):
            raise HubError(404, "Repository not found", "RepoNotFound")
        if write and account is not None and account.role != "write":
            raise HubError(403, "Forbidden: you must use a write token to upload to a repository.")
        if write and not (owner or pull_request):
            raise HubError(403, "Forbidden: pass `create_pr=1` as a query parameter to create a Pull Request")
        return repo

    def _own(self, request: _HttpHandler) -> str:
        """Return the name of a repository to create, if that is the request's to do."""
        account, wanted = self.tokens.get(request.token), request.json()
        if account is None:
            raise HubError(401, "Invalid username or password.")
        namespace = wanted.get("organization") or account.user
        if account != (namespace, "write"):
            raise HubError(403, f'You don\'t have the rights to create a model under the namespace "{namespace}"')
        return f"{namespace}/{wanted['name']}"

    @route("GET", "/api/whoami-v2")
    def _whoami(self, request: _HttpHandler) -> Any:
        if request.token not in self.tokens:
            raise HubError(401, "Invalid username or password.")
        user, role = self.tokens[request.token]
        return {"type": "user", "name": user, "orgs": [], "auth": {"accessToken": {"displayName": role, "role": role}}}

    @route("POST", "/api/repos/create")
    def _create_repo(self, request: _HttpHandler) -> Any:
        name = self._own(request)
        if name in self.repos:
            raise HubError(409, "You already created this model repo", url=f"{self.url}/{name}")
        wanted = request.json()
        self.repos[name] = Repo(name, private=wanted.get("visibility") == "private" or wanted.get("private") is True)
        return {"name": name, "url": f"{self.url}/{name}"}

    @route("POST", "/api/validate-yaml")
    def _validate_card(self, request: _HttpHandler) -> Any:
        files = {"README.md": File(request.json()["content"].encode())}
        check_card(files)
        return {"warnings": [] if read_card(files) else [{"message": "empty or missing yaml metadata in repo card"}]}

    @route("GET", "/api/models/{repo}")
    @route("GET", "/api/models/{repo}/revision/{revision}")
    def _info(self, request: _HttpHandler, repo: str, revision: str = "main") -> Any:
        opened = self._open(request, repo)
        commit = opened.at(revision)
        files, card = commit.files, read_card(commit.files)
        # What the card leaves out the Hub infers from the configuration: `pipeline` asks for both.
        config = json.loads(files["config.json"].data) if "config.json" in files else {}
        task = TASKS.get((config.get("architectures") or [""])[0].rpartition("For")[2])
        library = "peft" if "adapter_config.json" in files else "transformers" if config else None
        library, task = card.get("library_name", library), card.get("pipeline_tag", task)
        labels = [f"{key}:{value}" for key in ("license", "base_model") for value in as_list(card.get(key))]
        info = {"id": repo, "author": repo.split("/")[0], "sha": commit.oid, "lastModified": commit.date}
        return info | {
            "private": opened.private,
            "cardData": card,
            "library_name": library,
            "pipeline_tag": task,
            "tags": [*as_list(library), *as_list(task), *as_list(card.get("tags")), *labels],
            "siblings": [{"rfilename": path, "size": len(file.data)} for path, file in files.items()],
        }

    @route("GET", "/api/models/{repo}/tree/{revision}")
    @route("GET", "/api/models/{repo}/tree/{revision}/{path}")
    def _tree(self, request: _HttpHandler, repo: str, revision: str, path: str = "") -> Any:
        prefix = f"{path}/" if path else ""
        recursive = request.query.get("recursive") == ["true"]
        entries: dict[str, Any] = {}
        for name, file in self._open(request, repo).at(revision).files.items():
            if name.startswith(prefix):
                ends = [len(prefix) + slash.start() for slash in re.finditer("/", name[len(prefix) :])]
                for folder in [name[:end] for end in ends if recursive or end == ends[0]]:
                    entries[folder] = {"type": "directory", "path": folder, "oid": folder.encode().hex(), "size": 0}
                if recursive or not ends:
                    entries[name] = {"type": "file", "path": name, "oid": file.etag, "size": len(file.data)}
                    if file.lfs:
                        entries[name]["lfs"] = {"oid": file.etag, "size": len(file.data), "pointerSize": 134}
        if path and not entries:
            raise HubError(404, f'{path} does not exist on "{revision}"', "EntryNotFound")
        return list(entries.values())

    @route("POST", "/api/models/{repo}/branch/{branch}")
    def _create_branch(self, request: _HttpHandler, repo: str, branch: str) -> Any:
        opened = self._open(request, repo, write=True)
        if opened.ref(branch) in opened.refs:
            raise HubError(409, f"Reference already exists: {branch}")
        opened.refs[opened.ref(branch)] = opened.at(request.json().get("startingPoint", "main")).oid
        return {}

    @route("POST", "/api/models/{repo}/preupload/{revision}")
    def _preupload(self, request: _HttpHandler, repo: str, revision: str) -> Any:
        opened = self._open(request, repo, write=True, pull_request="create_pr" in request.query)
        present = opened.at(revision).files
        files = [{"path": file["path"], "shouldIgnore": False} for file in request.json()["files"]]
        for file in files:
            file["uploadMode"] = "lfs" if file["path"].endswith(LFS_SUFFIXES) else "regular"
            file["oid"] = present[file["path"]].etag if file["path"] in present else None
        return {"files": files}

    @route("POST", r"/{repo}\.git/info/lfs/objects/batch")
    def _lfs_batch(self, request: _HttpHandler, repo: str) -> Any:
        self._open(request, repo, write=True, pull_request=True)
        objects = request.json()["objects"]
        for wanted in objects:
            if wanted["oid"] not in self._objects:
                # The address is the permission, as with the Hub's own storage: the client sends no token there.
                secret = secrets.token_urlsafe()
                self._uploads[secret] = wanted["oid"]
                verify = {"href": f"{self.url}/{repo}.git/info/lfs/verify"}
                wanted["actions"] = {"upload": {"href": f"{self.url}/lfs-upload/{secret}"}, "verify": verify}
        return {"transfer": "basic", "objects": objects}

    @route("PUT", "/lfs-upload/{secret}")
    def _lfs_upload(self, request: _HttpHandler, secret: str) -> Any:
        if hashlib.sha256(request.body).hexdigest() != self._uploads[secret]:
            raise HubError(400, "The content does not match its sha256")
        self._objects[self._uploads[secret]] = request.body
        return {}

    @route("POST", r"/{repo}\.git/info/lfs/verify")
    def _lfs_verify(self, request: _HttpHandler, repo: str) -> Any:
        self._open(request, repo, write=True, pull_request=True)
        return {"size": len(self._objects[request.json()["oid"]])}

    @route("POST", "/api/models/{repo}/commit/{revision}")
    def _commit(self, request: _HttpHandler, repo: str, revision: str) -> Any:
        pull_request = "create_pr" in request.query
        opened = self._open(request, repo, write=True, pull_request=pull_request)
        base, ref = opened.at(revision), opened.ref(revision)
        if pull_request:
            ref = f"refs/pr/{1 + sum(it.startswith('refs/pr/') for it in opened.refs)}"
        elif ref not in opened.refs:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        header, *operations = map(json.loads, request.body.splitlines())
        files = dict(base.files)
        for operation in operations:
            key, value = operation["key"], operation["value"]
            path = value["path"]
            if key == "file":
                files[path] = File(base64.b64decode(value["content"], validate=True))
            elif key == "lfsFile":
                files[path] = File(self._objects[value["oid"]], lfs=True)
            elif gone := [it for it in files if it == path or it.startswith(path.rstrip("/") + "/")]:
                for it in gone:
                    del files[it]
            else:
                raise HubError(404, "A file with this name doesn't exist", "EntryNotFound")
        check_card(files)
        # Only here does anything change: whatever went wrong above left the repository as it was.
        commit = Commit(header["value"]["summary"], files, (base, *base.history))
        opened.commits[commit.oid] = commit
        opened.refs[ref] = commit.oid
        url = f"{self.url}/{repo}/discussions/{ref.split('/')[-1]}" if pull_request else None
        return {"commitOid": commit.oid, "commitUrl": f"{self.url}/{repo}/commit/{commit.oid}", "pullRequestUrl": url}

    @route("GET", "/{repo}/resolve/{revision}/{path}")
    def _resolve(self, request: _HttpHandler, repo: str, revision: str, path: str) -> Any:
        commit = self._open(request, repo).at(revision)
        headers = {"X-Repo-Commit": commit.oid}
        if path not in commit.files:
            error = HubError(404, "Entry not found", "EntryNotFound")
            error.headers |= headers  # by the commit, the client caches the absence too
            raise error
        file = commit.files[path]
        size = len(file.data)
        headers |= {"ETag": f'"{file.etag}"', "Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"}
        if file.lfs:
            headers |= {"X-Linked-Etag": f'"{file.etag}"', "X-Linked-Size": str(size)}
        if span := re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("Range", "")):
            part = range(size)[int(span[1]) : int(span[2] or size) + 1]
            span_served = f"bytes {part[0]}-{part[-1]}/{size}" if part else f"bytes */{size}"
            body = file.data[part.start : part.stop]
            return Reply(206 if part else 416, body, headers | {"Content-Range": span_served})
        return Reply(200, file.data, headers)


class _HttpServer(ThreadingHTTPServer):
    hub: HubServer

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Report a failure of this server, but not that of a connection: those are part of the tests."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class _HttpHandler(BaseHTTPRequestHandler):
    server: _HttpServer
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # head and body in one packet: in two, each answer waits 40 ms for an acknowledgement

    def json(self) -> Any:
        """Parse the request's body."""
        return json.loads(self.body)

    def _serve(self) -> None:
        self.query = parse_qs(urlsplit(self.path).query)
        self.token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        length = int(self.headers.get("Content-Length", 0))
        self.body = self.rfile.read(length)
        if len(self.body) < length:
            raise ConnectionAbortedError
        reply = self.server.hub.answer(self)
        self.send_response(reply.status)
        for name, value in {**reply.headers, "Content-Length": str(len(reply.body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(reply.body[: len(reply.body) // 2] if reply.cut else reply.body)
        if reply.cut:
            raise ConnectionAbortedError

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _serve  # noqa: N815

    def log_message(self, format: str, *args: Any) -> None:
        """Keep quiet: `HubServer.requests` has them."""
