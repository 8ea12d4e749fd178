"""A web server of folders that answers ranges, and writes down how many bytes of which file it
sent."""

import re
from collections import Counter
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import unquote, urlsplit


class Served:
    "Where it is, and what it sent."

    def __init__(self, folder):
        self.folder, self.address = Path(folder), ""
        self.sent, self.asked = Counter(), []
        self.knows_ranges, self.token = True, None


class Answers(SimpleHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, *args, served, **kwargs):
        self.served = served
        super().__init__(*args, directory=str(served.folder), **kwargs)

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.reply()

    def do_GET(self):
        self.reply()

    def reply(self):
        served, asked = self.served, urlsplit(self.path)
        served.asked.append((self.command, self.path, self.headers.get("Authorization")))
        if served.token is not None and served.token not in asked.query:
            return self.nothing(403)
        file = served.folder/unquote(asked.path).lstrip("/")
        if file.is_dir():
            if not self.path.endswith("/"):
                self.path += "/"
            return super().do_GET() if self.command == "GET" else super().do_HEAD()
        if not file.is_file():
            return self.nothing(404)
        return self.part_of(file)

    def nothing(self, code):
        self.send_response(code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def part_of(self, file):
        "All of a file, or the range that was asked for."
        data, told = file.read_bytes(), file.stat()
        span = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        body, code = data, 200
        if span and self.served.knows_ranges:
            stop = min(int(span[2]) + 1 if span[2] else len(data), len(data))
            body, code = data[int(span[1]) : stop], 206
        self.send_response(code)
        if code == 206:
            last = int(span[1]) + len(body) - 1
            self.send_header("Content-Range", f"bytes {span[1]}-{last}/{len(data)}")
        self.send_header("ETag", f'"{told.st_ino}-{told.st_mtime_ns}"')
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.served.sent[file.name] += len(body)
            self.wfile.write(body)


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request, client_address):
        "Who asked may be gone by now."


@contextmanager
def serving(folder):
    "A server of what is in a folder, while the context lasts."
    served = Served(folder)
    server = Server(("127.0.0.1", 0), partial(Answers, served=served))
    served.address = f"http://127.0.0.1:{server.server_address[1]}"
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield served
    finally:
        server.shutdown()
        server.server_close()
