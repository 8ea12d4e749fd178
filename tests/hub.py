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
from threading import Event, Thread
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_of_a_test"


def commit_of(files):
    "The name of a state of a repository."
    return hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()


def files_in(folder):
    "Name → bytes of all files in a folder."
    every = [f for f in sorted(Path(folder).rglob("*")) if f.is_file()]
    return {f.relative_to(folder).as_posix(): f.read_bytes() for f in every}


def row(file, held):
    "What the hub lists of a file."
    oid = hashlib.sha1(held).hexdigest()
    return {"type": "file", "path": file, "size": len(held), "oid": oid}


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
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

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
        for pattern, do in ROUTES:
            if m := re.fullmatch(pattern, path):
                return do(self, *m.groups())
        return self.reply(404)

    do_GET = do_HEAD = do_POST = answer

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
        files = json.loads(self.body())["files"]
        said = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]
        return self.reply(200, {"files": said})

    def commit(self, name, revision):
        if self.hub.is_full:
            self.body()
            return self.reply(403, {"error": "storage quota exceeded"})
        lines = [json.loads(x) for x in self.body().splitlines() if x.strip()]
        repo = self.hub.repos[name]
        files = dict(repo.at(revision)[1])
        for line in lines:
            if line["key"] == "file":
                files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
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
