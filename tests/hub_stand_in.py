"""A stand-in for the Hub on this machine: the part of its HTTP API that pushing and loading models needs, in memory.

    with HubStandIn() as hub:
        subprocess.run([sys.executable, "script.py"], env={**os.environ, **hub.environment(tmp_path)})
        hub.files("someone/model")["config.json"]

Accounts have tokens and roles in organisations; `hub.fail(…)` breaks connections or answers with an error. A real
`huggingface_hub` client talks to it through `HF_ENDPOINT`, within this process by `hub.api()`. Its environment also sets
`HF_HUB_DISABLE_XET`: with `hf_xet` installed the client would upload by the Xet protocol, which needs a storage server
(`hub.xet_storage` names a folder instead); without it, by Git LFS. Every commit keeps all its files, so that old
revisions stay readable.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml
from huggingface_hub import HfApi

USER = "someone"
TOKEN = "hf_" + "s" * 34
STRANGER_TOKEN = "hf_" + "x" * 34  # of an account that owns nothing
READ_TOKEN = "hf_" + "r" * 34  # of USER, without the right to write
LFS_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth"}
NO_COMMIT = "0" * 40


class HubError(Exception):
    """An answer that isn't a success, with its status and the code by which the client chooses its exception."""

    def __init__(self, status: int, code: str = "", message: str = "", **headers: str):
        super().__init__(message)
        self.status = status
        self.headers = {"X-Error-Code": code, "X-Error-Message": message, **headers}


@dataclass(frozen=True)
class Account:
    name: str
    orgs: dict[str, str] = field(default_factory=dict)  # name → role: read, contributor, write, admin
    writes: bool = True  # whether the token may write

    def reads_as(self, owner: str) -> bool:
        return owner == self.name or owner in self.orgs

    def writes_as(self, owner: str) -> bool:
        return self.writes and (owner == self.name or self.orgs.get(owner) in ("write", "admin"))


@dataclass
class Fault:
    """What happens to requests that match, from the `after`-th on, `times` times."""

    pattern: str  # of "METHOD path"
    answer: int | None  # status; None = the connection breaks
    after: int = 0
    times: int = 1_000_000
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class Repository:
    name: str
    private: bool
    # "auto" or "manual": strangers are told to log in, and who has logged in to ask for access; not the owner
    gated: bool | str = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=lambda: {NO_COMMIT: {}})  # oid → path → content
    messages: dict[str, str] = field(default_factory=dict)  # oid → message, in order
    refs: dict[str, str] = field(default_factory=lambda: {"main": NO_COMMIT})  # branches and refs/pr/N
    tags: dict[str, str] = field(default_factory=dict)
    discussions: dict[int, str] = field(default_factory=dict)  # number → title of a pull request

    @property
    def owner(self) -> str:
        return self.name.partition("/")[0]

    def oid(self, revision: str) -> str:
        oid = {**self.tags, **self.refs}.get(revision, revision)
        if oid not in self.commits:
            raise HubError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return oid

    def commit(self, branch: str, files: dict[str, bytes], message: str) -> str:
        if branch not in self.refs:
            raise HubError(404, "RevisionNotFound", f"Invalid rev id: {branch}")
        oid = hashlib.sha1(f"{self.name} {branch} {len(self.commits)} {message}".encode()).hexdigest()
        self.commits[oid], self.messages[oid], self.refs[branch] = files, message, oid
        return oid


def is_lfs(path: str) -> bool:
    return Path(path).suffix in LFS_SUFFIXES


def content_oid(path: str, content: bytes) -> str:
    """Return the hash that the client compares with its own file: SHA-256 of an LFS file, else the Git blob's SHA-1."""
    if is_lfs(path):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class HubStandIn:
    """The server; `with` starts and stops it."""

    def __init__(self):
        self.repositories: dict[str, Repository] = {}
        self.collections: dict[str, dict[str, Any]] = {}  # slug → what the API tells of it
        self.accounts = {
            TOKEN: Account(USER, {"lab": "write", "readers": "read"}),
            READ_TOKEN: Account(USER, {"lab": "write"}, writes=False),
            STRANGER_TOKEN: Account("stranger"),
        }
        self.faults: list[Fault] = []
        self.part_size: int | None = None  # of multipart uploads; None = files are uploaded whole
        self.parts: dict[tuple[str, int], bytes] = {}
        self.lfs_objects: dict[str, bytes] = {}
        self.xet_storage: Path | None = None  # folder that hf_xet writes into by itself; the server has no part in that
        self.requests: list[str] = []  # "METHOD path", as they came
        self.query: dict[str, list[str]] = {}  # of the request that is being answered
        self.account: Account | None = None  # of its token
        self.lock = threading.Lock()
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.storage_url = (
            f"http://localhost:{self.server.server_port}"  # another host: only then a redirection leaves the Hub
        )

    def __enter__(self) -> "HubStandIn":
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exception: Any) -> None:
        self.server.shutdown()
        self.server.server_close()

    def environment(self, home: Path) -> dict[str, str]:
        """Return the variables of a process that uses this server as the Hub, with its cache under `home`."""
        options = {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_OFFLINE": "0"}
        return {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_TOKEN": TOKEN, **options}

    def api(self, token: str = TOKEN) -> HfApi:
        """Return a client of this server for this process."""
        return HfApi(endpoint=self.url, token=token)

    def fail(self, pattern: str, answer: int | None = None, **options: Any) -> Fault:
        """Break the connections of requests that match "METHOD path", or answer them with a status."""
        fault = Fault(pattern, answer, **options)
        self.faults.append(fault)
        return fault

    def count(self, pattern: str) -> int:
        """Return how many requests matched "METHOD path"."""
        return sum(bool(re.search(pattern, line)) for line in self.requests)

    def files(self, name: str, revision: str = "main") -> dict[str, bytes]:
        repository = self.repositories[name]
        return repository.commits[repository.oid(revision)]

    def history(self, name: str) -> list[tuple[str, str]]:
        """Return (oid, message) of every commit, oldest first."""
        return list(self.repositories[name].messages.items())

    # --- the API: each method answers one route with JSON ---------------------------------------------------------

    def whoami(self, body: bytes) -> dict[str, Any]:
        if self.account is None:
            raise HubError(401, message="Invalid credentials in Authorization header")
        orgs = [{"type": "org", "name": name, "roleInOrg": role} for name, role in self.account.orgs.items()]
        role = "write" if self.account.writes else "read"
        return {"type": "user", "name": self.account.name, "orgs": orgs, "auth": {"accessToken": {"role": role}}}

    def validate_yaml(self, body: bytes) -> dict[str, Any]:
        text = json.loads(body)["content"]
        match = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
        if match is None or not isinstance(yaml.safe_load(match[1]), dict):
            raise HubError(400, message="README.md has no metadata")
        return {"errors": [], "warnings": []}

    def create_repo(self, body: bytes) -> dict[str, Any]:
        wanted = json.loads(body)
        owner = wanted["organization"] or self.account.name
        name = f"{owner}/{wanted['name']}"
        if not self.account.writes_as(owner):
            text = f'You don\'t have the rights to create a model under the namespace "{owner}"'
            raise HubError(403, message=text)
        if name in self.repositories:
            raise HubError(409, message="You already created this model repo", url=f"{self.url}/{name}")
        private = wanted.get("visibility") == "private" or wanted.get("private") is True
        repository = self.repositories[name] = Repository(name, private)
        repository.commit("main", {".gitattributes": b"*.safetensors filter=lfs\n"}, "initial commit")
        return {"url": f"{self.url}/{name}", "name": name}

    def info(self, repository: Repository, body: bytes, revision: str = "main") -> dict[str, Any]:
        oid = repository.oid(revision)
        siblings = [{"rfilename": path} for path in sorted(repository.commits[oid])]
        known = {"private": repository.private, "gated": repository.gated, "tags": []}
        return {"id": repository.name, "sha": oid, "siblings": siblings, **known}

    def settings(self, repository: Repository, body: bytes) -> dict[str, Any]:
        wanted = json.loads(body)
        repository.gated = wanted.get("gated", repository.gated)
        repository.private = wanted.get("visibility", "private" if repository.private else "public") == "private"
        return wanted

    def tree(self, repository: Repository, body: bytes, revision: str, folder: str = "") -> list[dict[str, Any]]:
        """Return all files under `folder`, at any depth, as for `recursive`."""
        files = self.files(repository.name, revision)
        found = {path: data for path, data in files.items() if not folder or path.startswith(f"{folder}/")}
        if folder and not found:
            raise HubError(404, "EntryNotFound", f"{folder} does not exist on {revision}")
        entries = []
        for path, data in found.items():
            entry = {"type": "file", "path": path, "size": len(data), "oid": content_oid("", data)}
            if is_lfs(path):
                entry["lfs"] = {"oid": content_oid(path, data), "size": len(data), "pointerSize": 134}
            entries.append(entry)
        return entries

    def dataset_tree(
        self, repository: Repository, body: bytes, revision: str, folder: str = ""
    ) -> list[dict[str, Any]]:
        """Return what `tree` returns, but one level with its folders unless `recursive` is set; `datasets` walks them."""
        entries = self.tree(repository, body, revision, folder)
        if self.query.get("recursive") in (["True"], ["true"]):
            return entries
        start = len(folder) + 1 if folder else 0
        here = [entry for entry in entries if "/" not in entry["path"][start:]]
        names = {entry["path"][start:].split("/")[0] for entry in entries if "/" in entry["path"][start:]}
        folders = [{"type": "directory", "path": entries[0]["path"][:start] + name, "oid": NO_COMMIT} for name in names]
        return [*folders, *here]

    def paths_info(self, repository: Repository, body: bytes, revision: str) -> list[dict[str, Any]]:
        wanted = parse_qs(body.decode()).get("paths", []) if not body.startswith(b"{") else json.loads(body)["paths"]
        entries = self.tree(repository, body, revision)
        found = [entry for entry in entries if entry["path"] in wanted]
        folders = [name for name in wanted if any(entry["path"].startswith(f"{name}/") for entry in entries)]
        return [*found, *({"type": "directory", "path": name, "oid": NO_COMMIT} for name in folders)]

    def list_refs(self, repository: Repository, body: bytes) -> dict[str, Any]:
        def refs(kind: str, found: dict[str, str]) -> list[dict[str, str]]:
            return [{"name": name, "ref": f"{kind}{name}", "targetCommit": oid} for name, oid in found.items()]

        branches = {name: oid for name, oid in repository.refs.items() if not name.startswith("refs/")}
        return {"branches": refs("refs/heads/", branches), "tags": refs("refs/tags/", repository.tags), "converts": []}

    def create_branch(self, repository: Repository, body: bytes, name: str) -> dict[str, Any]:
        if name.startswith("refs/"):
            raise HubError(400, message=f"Invalid reference for a branch: {name}")
        if name in repository.refs:
            raise HubError(409, message=f"Reference already exists: {name}")
        repository.refs[name] = repository.oid(json.loads(body or b"{}").get("startingPoint") or "main")
        return {}

    def create_tag(self, repository: Repository, body: bytes, revision: str) -> dict[str, Any]:
        tag = json.loads(body)["tag"]
        if tag in repository.tags:
            raise HubError(409, message=f"Tag reference exists already: {tag}")
        repository.tags[tag] = repository.oid(revision)
        return {}

    def preupload(self, repository: Repository, body: bytes, revision: str) -> dict[str, Any]:
        files = self.files(repository.name, revision)
        answer = []
        for wanted in json.loads(body)["files"]:
            path = wanted["path"]
            mode = {"path": path, "uploadMode": "lfs" if is_lfs(path) else "regular", "shouldIgnore": False}
            answer.append({**mode, "oid": content_oid(path, files[path]) if path in files else None})
        return {"files": answer}

    def lfs_batch(self, repository: Repository, body: bytes) -> dict[str, Any]:
        objects = []
        for item in json.loads(body)["objects"]:
            if item["oid"] not in self.lfs_objects:  # without actions the client knows that it need not upload
                upload: dict[str, Any] = {"href": f"{self.url}/lfs/{item['oid']}"}
                if self.part_size is not None and item["size"] > self.part_size:
                    parts = range(1, -(-item["size"] // self.part_size) + 1)
                    addresses = {str(part): f"{self.storage_url}/parts/{item['oid']}/{part}" for part in parts}
                    upload["header"] = {"chunk_size": str(self.part_size), **addresses}
                verify = {"href": f"{self.url}/{repository.name}/lfs-verify"}
                item = {**item, "actions": {"upload": upload, "verify": verify}}
            objects.append(item)
        return {"transfer": "basic", "objects": objects}

    def lfs_verify(self, repository: Repository, body: bytes) -> dict[str, Any]:
        wanted = json.loads(body)
        if len(self.lfs_objects.get(wanted["oid"], b"")) != wanted["size"]:
            raise HubError(404, message=f"{wanted['oid']} has not been uploaded")
        return {}

    def lfs_upload(self, body: bytes, oid: str) -> dict[str, Any]:
        if hashlib.sha256(body).hexdigest() != oid:
            raise HubError(400, message=f"the content sent is not that of {oid}")
        self.lfs_objects[oid] = body
        return {}

    def lfs_complete(self, body: bytes, oid: str) -> dict[str, Any]:
        wanted = [part["partNumber"] for part in json.loads(body)["parts"]]
        return self.lfs_upload(b"".join(self.parts.pop((oid, part)) for part in sorted(wanted)), oid)

    def xet_token(self, repository: Repository, body: bytes, revision: str) -> dict[str, Any]:
        if self.xet_storage is None:
            raise HubError(404, message="no Xet storage")
        return {"casUrl": f"local://{self.xet_storage}", "accessToken": "token", "exp": 2**33}

    def open_discussion(self, repository: Repository, body: bytes) -> dict[str, Any]:
        """Open a pull request without changes, as hf_xet's uploads do before their first commit."""
        number = 1 + sum(name.startswith("refs/pr/") for name in repository.refs)
        repository.refs[f"refs/pr/{number}"] = repository.oid("main")
        repository.discussions[number] = json.loads(body)["title"]
        return {"num": number}

    def discussion(self, repository: Repository, body: bytes, number: str) -> dict[str, Any]:
        known = {"createdAt": "2026-01-01T00:00:00.000Z", "status": "draft", "isPullRequest": True, "events": []}
        known |= {"changes": {"base": "refs/heads/main"}, "filesWithConflicts": [], "author": {"name": USER}}
        repo = {"name": repository.name, "type": "model"}
        return {"num": int(number), "title": repository.discussions[int(number)], "repo": repo, **known}

    def create_collection(self, body: bytes) -> dict[str, Any]:
        wanted = json.loads(body)
        owner, title = wanted["namespace"], wanted["title"]
        if not self.account.writes_as(owner):
            raise HubError(403, message="You don't have the rights to create a collection in this namespace")
        if len(title) > 59:
            raise HubError(400, message="title must be shorter than 60 characters")
        digest = hashlib.sha1(title.encode()).hexdigest()[:24]
        slug = f"{owner}/{re.sub('[^a-z0-9]+', '-', title.lower())}-{digest}"
        if slug in self.collections:
            raise HubError(409, message="You already have a collection with this title", slug=slug)
        known = {"title": title, "private": wanted["private"], "description": wanted.get("description")}
        fixed = {"lastUpdated": "2026-01-01T00:00:00.000Z", "position": 0, "theme": "blue", "upvotes": 0}
        self.collections[slug] = {"slug": slug, "owner": owner, "items": [], **known, **fixed}
        return self.collections[slug]

    def collection(self, body: bytes, slug: str) -> dict[str, Any]:
        if slug not in self.collections:
            raise HubError(404, message="Collection not found")
        return self.collections[slug]

    def add_item(self, body: bytes, slug: str) -> dict[str, Any]:
        wanted, items = json.loads(body), self.collection(b"", slug)["items"]
        item = wanted["item"]
        if item["type"] != "model" or item["id"] not in self.repositories:
            raise HubError(404, message="Item not found")
        if any(there["id"] == item["id"] for there in items):
            raise HubError(409, message="Item already in collection")
        note = {"text": wanted["note"], "html": wanted["note"]} if "note" in wanted else None
        items.append({"_id": f"{len(items):024x}", "position": len(items), "note": note, **item})
        return self.collections[slug]

    def commit(self, repository: Repository, body: bytes, branch: str) -> dict[str, Any]:
        lines = [json.loads(line) for line in body.splitlines()]
        opened = {}
        if self.query.get("create_pr"):
            number = 1 + sum(name.startswith("refs/pr/") for name in repository.refs)
            repository.refs[f"refs/pr/{number}"] = repository.oid(branch)
            branch = f"refs/pr/{number}"
            opened = {"pullRequestUrl": f"{self.url}/{repository.name}/discussions/{number}"}
        files = dict(self.files(repository.name, branch))
        message = ""
        for key, value in ((line["key"], line["value"]) for line in lines):
            path = value.get("path", "")
            if key == "header":
                message = value["summary"]
            elif key == "file":
                files[path] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                files[path] = self.lfs_objects[value["oid"]]
            else:  # deletedFile, deletedFolder
                kept = {name: data for name, data in files.items() if name != path and not name.startswith(f"{path}/")}
                if len(kept) == len(files):
                    raise HubError(404, "EntryNotFound", "A file with this name doesn't exist")
                files = kept
        oid = repository.commit(branch, files, message)
        address = f"{self.url}/{repository.name}/commit/{oid}"
        return {"success": True, "commitOid": oid, "commitUrl": address, **opened}


_NAME = r"(?P<repository>[^/]+/[^/]+)"
_REVISION = r"(?P<revision>[^/]+)"
ROUTES: list[tuple[str, str, Callable]] = [
    ("GET", "/api/whoami-v2", HubStandIn.whoami),
    ("POST", "/api/validate-yaml", HubStandIn.validate_yaml),
    ("POST", "/api/repos/create", HubStandIn.create_repo),
    ("PUT", "/lfs/(?P<oid>[0-9a-f]{64})", HubStandIn.lfs_upload),
    ("POST", "/lfs/(?P<oid>[0-9a-f]{64})", HubStandIn.lfs_complete),
    ("POST", f"/{_NAME}/lfs-verify", HubStandIn.lfs_verify),
    ("POST", "/api/collections", HubStandIn.create_collection),
    ("GET", "/api/collections/(?P<slug>[^/]+/[^/]+)", HubStandIn.collection),
    ("POST", "/api/collections/(?P<slug>[^/]+/[^/]+)/items", HubStandIn.add_item),
    ("PUT", f"/api/models/{_NAME}/settings", HubStandIn.settings),
    ("GET", f"/api/models/{_NAME}/xet-write-token/{_REVISION}", HubStandIn.xet_token),
    ("POST", f"/api/models/{_NAME}/discussions", HubStandIn.open_discussion),
    ("GET", f"/api/models/{_NAME}/discussions/(?P<number>[0-9]+)", HubStandIn.discussion),
    ("POST", rf"/{_NAME}\.git/info/lfs/objects/batch", HubStandIn.lfs_batch),
    ("GET", f"/api/models/{_NAME}", HubStandIn.info),
    ("GET", f"/api/models/{_NAME}/revision/{_REVISION}", HubStandIn.info),
    ("GET", f"/api/models/{_NAME}/tree/{_REVISION}", HubStandIn.tree),
    ("GET", f"/api/models/{_NAME}/tree/{_REVISION}/(?P<folder>.+)", HubStandIn.tree),
    ("GET", f"/api/datasets/{_NAME}", HubStandIn.info),
    ("GET", f"/api/datasets/{_NAME}/revision/{_REVISION}", HubStandIn.info),
    ("GET", f"/api/datasets/{_NAME}/tree/{_REVISION}", HubStandIn.dataset_tree),
    ("GET", f"/api/datasets/{_NAME}/tree/{_REVISION}/(?P<folder>.+)", HubStandIn.dataset_tree),
    ("POST", f"/api/datasets/{_NAME}/paths-info/{_REVISION}", HubStandIn.paths_info),
    ("GET", f"/api/models/{_NAME}/refs", HubStandIn.list_refs),
    ("POST", f"/api/models/{_NAME}/branch/(?P<name>[^/]+)", HubStandIn.create_branch),
    ("POST", f"/api/models/{_NAME}/tag/{_REVISION}", HubStandIn.create_tag),
    ("POST", f"/api/models/{_NAME}/preupload/{_REVISION}", HubStandIn.preupload),
    ("POST", f"/api/models/{_NAME}/commit/(?P<branch>[^/]+)", HubStandIn.commit),
]
RESOLVE = re.compile(f"/(?:datasets/)?{_NAME}/resolve/{_REVISION}/(?P<path>.+)")
STORAGE = re.compile("/storage/(?P<oid>[0-9a-f]{64})")
PART = re.compile("/parts/(?P<oid>[0-9a-f]{64})/(?P<number>[0-9]+)")
# What changes a repository, and what a pull request may do too.
WRITES = (HubStandIn.create_branch, HubStandIn.create_tag, HubStandIn.settings)
PROPOSALS = (HubStandIn.preupload, HubStandIn.commit)


class _Handler(BaseHTTPRequestHandler):
    hub: HubStandIn
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_PUT = do_GET

    def log_message(self, *args: Any) -> None:
        """Log nothing to stderr."""

    def _answer(self) -> None:
        path, body = urlsplit(self.path).path, self._body()
        with self.hub.lock:
            self.hub.requests.append(f"{self.command} {path}")
            self.hub.query = parse_qs(urlsplit(self.path).query)
            self.hub.account = self.hub.accounts.get(self.headers.get("Authorization", "").removeprefix("Bearer "))
            try:
                if (fault := self._fault(f"{self.command} {path}")) is not None:
                    if fault.answer is None:
                        self.close_connection = True  # without an answer
                        return
                    raise HubError(fault.answer, message="as the test wants it", **fault.headers)
                if match := PART.fullmatch(path):
                    self.hub.parts[match["oid"], int(match["number"])] = body
                    self._send(200, b"", {"ETag": f'"{match["number"]}"'})
                elif match := RESOLVE.fullmatch(path):
                    self._resolve(**{key: unquote(value) for key, value in match.groupdict().items()})
                elif match := STORAGE.fullmatch(path):
                    self._send_range(self.hub.lfs_objects[match["oid"]])
                else:
                    self._send(200, json.dumps(self._call(path, body)).encode())
            except HubError as error:
                self._send(error.status, json.dumps({"error": str(error), **error.headers}).encode(), error.headers)

    def _fault(self, request: str) -> Fault | None:
        for fault in self.hub.faults:
            if re.search(fault.pattern, request):
                fault.after -= 1
                if fault.after < 0 and fault.times > 0:
                    fault.times -= 1
                    return fault
        return None

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _call(self, path: str, body: bytes) -> Any:
        for method, pattern, call in ROUTES:
            if method == self.command and (match := re.fullmatch(pattern, path)):
                arguments = {key: unquote(value) for key, value in match.groupdict().items()}
                if "Authorization" in self.headers and self.hub.account is None:
                    raise HubError(401, message="Invalid credentials in Authorization header")
                is_presigned = path.startswith("/lfs/")
                if self.command == "POST" and self.hub.account is None and not is_presigned:
                    raise HubError(401, message="Invalid username or password.")
                if "repository" in arguments:
                    arguments["repository"] = self._repository(arguments["repository"])
                    self._check_rights(call, arguments["repository"])
                return call(self.hub, body=body, **arguments)
        raise HubError(404, message=f"the stand-in has no route {self.command} {path}")

    def _check_rights(self, call: Callable, repository: Repository) -> None:
        """Refuse what only the owner may do; anyone who is logged in may open a pull request."""
        may_write = self.hub.account is not None and self.hub.account.writes_as(repository.owner)
        is_proposal = bool(self.hub.query.get("create_pr")) or "refs%2Fpr%2F" in self.path
        if call in WRITES and not may_write:
            raise HubError(403, message="You don't have the required permissions to perform this action")
        if call in PROPOSALS and not may_write and not is_proposal:
            raise HubError(403, message="pass `create_pr=1` as a query parameter to create a Pull Request")

    def _repository(self, name: str) -> Repository:
        repository, account = self.hub.repositories.get(name), self.hub.account
        if repository is None or (repository.private and not (account and account.reads_as(repository.owner))):
            raise HubError(404 if account else 401, "RepoNotFound", f"{name} not found")
        return repository

    def _resolve(self, repository: str, revision: str, path: str) -> None:
        """Send the file, or for LFS files a redirection to the storage, as the Hub does."""
        repo = self._repository(repository)
        account = self.hub.account
        if repo.gated and not (account and account.reads_as(repo.owner)):
            status, reason = (403, "not in the authorized list") if account else (401, "must be authenticated")
            raise HubError(status, "GatedRepo", f"Access to {repository} is restricted: you are {reason}.")
        oid = repo.oid(revision)
        if path not in repo.commits[oid]:
            raise HubError(404, "EntryNotFound", "Entry not found", **{"X-Repo-Commit": oid})
        content = repo.commits[oid][path]
        etag = content_oid(path, content)
        headers = {"X-Repo-Commit": oid, "ETag": f'"{etag}"'}
        if is_lfs(path):
            linked = {"X-Linked-ETag": f'"{etag}"', "X-Linked-Size": str(len(content))}
            self._send(302, b"", {**headers, **linked, "Location": f"{self.hub.storage_url}/storage/{etag}"})
        else:
            self._send_range(content, headers)

    def _send_range(self, content: bytes, headers: dict[str, str] | None = None) -> None:
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if match is None:
            self._send(200, content, headers)
            return
        start, stop = int(match[1]), min(int(match[2] or len(content)) + 1, len(content))
        span = f"bytes {start}-{stop - 1}/{len(content)}"
        self._send(206, content[start:stop], {**(headers or {}), "Content-Range": span})

    def _send(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)
