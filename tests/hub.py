"""A hub on this machine that knows the few words which huggingface_hub needs, and writes down what
it is asked."""

import base64
import hashlib
import json
import os
import re
from collections import Counter
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from socket import SHUT_RDWR
from threading import Event, Thread
from time import time
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_of_a_test"


def commit_of(files):
    "The name of a state of a repository."
    return hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()


def files_in(folder):
    "Name → bytes of all files in a folder."
    every = [f for f in sorted(Path(folder).rglob("*")) if f.is_file()]
    return {f.relative_to(folder).as_posix(): f.read_bytes() for f in every}


def is_large(file):
    "Whether the bytes of a file lie in a store beside the commits, as .gitattributes says there."
    return file.endswith((".safetensors", ".bin", ".pt"))


def sha256(held):
    return hashlib.sha256(held).hexdigest()


def oid_of(file, held):
    "By what the hub knows the bytes of a file."
    if is_large(file):
        return sha256(held)
    return hashlib.sha1(b"blob %d\0" % len(held) + held).hexdigest()


def row(file, held):
    "What the hub lists of a file."
    said = {"type": "file", "path": file, "size": len(held), "oid": hashlib.sha1(held).hexdigest()}
    if is_large(file):
        said["lfs"] = {"oid": sha256(held), "size": len(held), "pointerSize": 130}
    return said


class Repo:
    "A repository: names of commits → files, and branches."

    def __init__(self, private=False, gated=False):
        self.private, self.gated = private, gated
        self.commits, self.branches = {}, {}

    def put(self, files, branch="main"):
        "A further commit on a branch."
        sha = commit_of(files)
        self.commits[sha], self.branches[branch] = files, sha
        return sha

    def at(self, revision):
        sha = self.branches.get(revision, revision)
        return sha, self.commits.get(sha)


class Hub:
    "What is there, and what was asked for."

    def __init__(self):
        self.repos, self.asked = {}, []
        self.sent = Counter()
        self.role, self.address = "write", ""
        self.is_silent, self.is_full, self.ended = False, False, Event()
        # large files by sha256, pieces of such, and how long a piece is; None: they go in one
        self.store, self.pieces, self.piece = {}, {}, None
        # where large files go by Xet: the store of its library; None: it is not for this hub
        self.xet = None
        # file → its large entry, of the last commit; names that a .gitignore has there
        self.named, self.ignored = {}, ()
        # a step of an upload → answers in the place of its own: (status, body), or "close"
        self.faults = {}

    def put(self, name, files, branch="main", **how):
        "Files, or those of a folder, in a repository."
        files = files if isinstance(files, dict) else files_in(files)
        return self.repos.setdefault(name, Repo(**how)).put(files, branch)

    def fetched(self):
        "Files that were downloaded."
        got = [path for how, path in self.asked if how == "GET"]
        found = [re.search(r"/resolve/[^/]+/(.+)", path) for path in got]
        return sorted({m[1] for m in found if m})

    def env(self, home, token=None, offline=False, **more):
        "The environment of somebody who uses this hub."
        env = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
        env |= {
            "HF_ENDPOINT": self.address,
            "HF_HOME": str(home),
            "HF_HUB_OFFLINE": "1" if offline else "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        }
        return env | ({} if token is None else {"HF_TOKEN": token}) | more


class Answers(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_):
        pass

    def reply(self, code, body=b"", **headers):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def body(self):
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        found = b""
        while n := int(self.rfile.readline(), 16):
            found += self.rfile.read(n)
            self.rfile.readline()
        self.rfile.readline()
        return found

    def is_known(self):
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def repo(self, name):
        "A repository that this caller may see; None after an answer that there is none."
        repo = self.hub.repos.get(name)
        if repo is None or (repo.private and not self.is_known()):
            self.reply(404 if self.is_known() else 401, b"", X_Error_Code="RepoNotFound")
            return None
        return repo

    def answer(self):
        path = unquote(urlsplit(self.path).path)
        self.hub.asked.append((self.command, path))
        if self.hub.is_silent:
            self.close_connection = True
            return self.hub.ended.wait()
        if (fault := self.fault(path)) is not None:
            return self.fail(fault)
        for pattern, do in ROUTES:
            if m := re.fullmatch(pattern, path):
                return do(self, *m.groups())
        return self.reply(404)

    do_GET = do_HEAD = do_POST = do_PUT = answer

    def fault(self, path):
        "What is answered in the place of a step of an upload; None: what it should be."
        for step, answers in self.hub.faults.items():
            if answers and step in f"{self.command} {path}":
                return answers.pop(0)
        return None

    def fail(self, fault):
        if fault == "close":
            # in the middle of a file
            self.rfile.read(min(100, int(self.headers.get("Content-Length") or 0)))
            self.close_connection = True
            return self.connection.shutdown(SHUT_RDWR)
        self.body()
        return self.reply(*fault)

    def info(self, name, revision=None):
        if (repo := self.repo(name)) is None:
            return None
        sha, files = repo.at(revision or "main")
        if files is None:
            return self.reply(404, b"", X_Error_Code="RevisionNotFound")
        said = {"id": name, "sha": sha, "private": repo.private, "gated": repo.gated, "tags": []}
        siblings = [{"rfilename": f} for f in files]
        return self.reply(200, {**said, "siblings": siblings, "downloads": 0, "likes": 0})

    def tree(self, name, revision):
        if (repo := self.repo(name)) is None:
            return None
        _, files = repo.at(revision)
        return self.reply(200, [row(f, x) for f, x in files.items()])

    def paths(self, name, revision):
        if (repo := self.repo(name)) is None:
            return None
        _, files = repo.at(revision)
        asked = self.body()
        wanted = json.loads(asked)["paths"] if asked[:1] == b"{" else parse_qs(asked.decode())
        names = wanted["paths"] if isinstance(wanted, dict) else wanted
        return self.reply(200, [row(f, files[f]) for f in names if f in files])

    def may_read(self, name):
        if (repo := self.repo(name)) is None:
            return None
        if repo.gated and not self.is_known():
            return self.reply(403, b"", X_Error_Code="GatedRepo")
        return self.reply(200, {})

    def resolve(self, name, revision, file):
        if (repo := self.repo(name)) is None:
            return None
        if repo.gated and not self.is_known():
            return self.reply(403, b"", X_Error_Code="GatedRepo")
        sha, files = repo.at(revision)
        if files is None or file not in files:
            return self.reply(404, b"", X_Error_Code="EntryNotFound")
        etag = f'"{hashlib.sha1(files[file]).hexdigest()}"'
        held, code = files[file], 200
        span = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range") or "")
        how = {"ETag": etag, "X_Repo_Commit": sha}
        if span:
            how["Content_Range"] = f"bytes {span[1]}-{span[2]}/{len(held)}"
            held, code = held[int(span[1]) : int(span[2]) + 1], 206
        if self.command == "GET":
            self.hub.sent[file] += len(held)
        return self.reply(code, held, **how)

    def whoami(self):
        if not self.is_known():
            return self.reply(401, {"error": "Invalid credentials"})
        said = {"name": "me", "type": "user", "orgs": [{"name": "org"}]}
        auth = {"accessToken": {"displayName": "t", "role": self.hub.role}}
        return self.reply(200, {**said, "auth": auth})

    def create(self):
        asked = json.loads(self.body())
        name = f"{asked.get('organization') or 'me'}/{asked['name']}"
        if name in self.hub.repos:
            return self.reply(409, {"url": f"{self.hub.address}/{name}"})
        is_private = asked.get("private") or asked.get("visibility") == "private"
        self.hub.repos[name] = Repo(private=bool(is_private))
        self.hub.put(name, {".gitattributes": b""})
        return self.reply(200, {"url": f"{self.hub.address}/{name}", "name": name})

    def validate(self):
        self.body()
        return self.reply(200, {"errors": [], "warnings": []})

    def preupload(self, name, revision):
        asked = json.loads(self.body())["files"]
        there = self.hub.repos[name].at(revision)[1]
        said = []
        for file in (f["path"] for f in asked):
            mode = "lfs" if is_large(file) else "regular"
            one = {"path": file, "uploadMode": mode, "shouldIgnore": file in self.hub.ignored}
            said.append(one | ({"oid": oid_of(file, there[file])} if file in there else {}))
        return self.reply(200, {"files": said})

    def batch(self, name):
        "Where large files are sent to, but those that are in the store."
        asked = json.loads(self.body())
        assert asked["operation"] == "upload" and asked["hash_algo"] == "sha256"
        said = [x if x["oid"] in self.hub.store else self.sent_to(**x) for x in asked["objects"]]
        return self.reply(200, {"transfer": "basic", "objects": said})

    def sent_to(self, oid, size):
        place, n = f"{self.hub.address}/store/{oid}", self.hub.piece
        upload = {"href": place}
        if n is not None and size > n:
            parts = {f"{i + 1:05}": f"{place}/{i + 1}" for i in range(-(-size//n))}
            upload = {"href": f"{place}/whole", "header": {"chunk_size": str(n), **parts}}
        verify = {"href": f"{self.hub.address}/store/verify"}
        return {"oid": oid, "size": size, "actions": {"upload": upload, "verify": verify}}

    def xet_token(self, name, revision):
        "Where large files go by Xet, for an hour."
        said = {"casUrl": self.hub.xet, "accessToken": "of a test", "exp": int(time()) + 3600}
        return self.reply(200, said)

    def take(self, oid, piece=None):
        "A large file, or a piece of one."
        held = self.body()
        if piece is not None:
            self.hub.pieces[oid, int(piece)] = held
            return self.reply(200, b"", ETag=f'"{hashlib.md5(held).hexdigest()}"')
        if sha256(held) != oid:
            return self.reply(400, {"error": "other bytes than were announced"})
        self.hub.store[oid] = held
        return self.reply(200, b"")

    def whole(self, oid):
        "A large file of pieces, each as its tag says it."
        held = []
        for part in json.loads(self.body())["parts"]:
            held.append(self.hub.pieces.pop((oid, part["partNumber"])))
            assert part["etag"] == f'"{hashlib.md5(held[-1]).hexdigest()}"'
        held = b"".join(held)
        if sha256(held) != oid:
            return self.reply(400, {"error": "other bytes than were announced"})
        self.hub.store[oid] = held
        return self.reply(200, {})

    def verify(self):
        asked = json.loads(self.body())
        is_there = len(self.hub.store.get(asked["oid"], b"")) == asked["size"]
        return self.reply(200 if is_there else 404, {})

    def commit(self, name, revision):
        if self.hub.is_full:
            self.body()
            return self.reply(403, {"error": "storage quota exceeded"})
        lines = [json.loads(x) for x in self.body().splitlines() if x.strip()]
        repo = self.hub.repos[name]
        files, named = dict(repo.at(revision)[1]), {}
        for line in lines:
            said = line["value"]
            if line["key"] == "file":
                assert not is_large(said["path"])
                files[said["path"]] = base64.b64decode(said["content"])
            if line["key"] == "lfsFile":
                named[said["path"]] = said
                if self.hub.xet is not None:
                    self.hub.store.setdefault(said["oid"], b"by Xet")
                if said["oid"] not in self.hub.store:
                    return self.reply(400, {"error": "your push was rejected: a file is missing"})
                files[said["path"]] = self.hub.store[said["oid"]]
        self.hub.named = named
        sha = repo.put(files, revision)
        url = f"{self.hub.address}/{name}/commit/{sha}"
        return self.reply(200, {"commitUrl": url, "commitOid": sha, "success": True})


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request, client_address):
        "Who asked may be gone by now."


NAME = r"([\w.-]+(?:/[\w.-]+)?)"
ROUTES = [
    (r"/api/whoami-v2", Answers.whoami),
    (r"/api/repos/create", Answers.create),
    (r"/api/validate-yaml", Answers.validate),
    (rf"/api/models/{NAME}/auth-check", Answers.may_read),
    (rf"/api/models/{NAME}/preupload/(.+)", Answers.preupload),
    (rf"/api/models/{NAME}/commit/(.+)", Answers.commit),
    (rf"/{NAME}\.git/info/lfs/objects/batch", Answers.batch),
    (rf"/api/models/{NAME}/xet-write-token/(.+)", Answers.xet_token),
    (r"/store/verify", Answers.verify),
    (r"/store/(\w+)/whole", Answers.whole),
    (r"/store/(\w+)(?:/(\d+))?", Answers.take),
    (rf"/api/models/{NAME}/paths-info/(.+)", Answers.paths),
    (rf"/api/models/{NAME}/tree/([^/]+).*", Answers.tree),
    (rf"/api/models/{NAME}/revision/(.+)", Answers.info),
    (rf"/api/models/{NAME}", Answers.info),
    (rf"/{NAME}/resolve/([^/]+)/(.+)", Answers.resolve),
]


@contextmanager
def running():
    "A hub, while the context lasts."
    hub = Hub()
    server = Server(("127.0.0.1", 0), type("Of", (Answers,), {"hub": hub}))
    hub.address = f"http://127.0.0.1:{server.server_address[1]}"
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        hub.ended.set()
        server.shutdown()
        server.server_close()
