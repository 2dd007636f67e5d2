"""A hub on this machine: serves a folder under the hub's addresses, byte ranges included, and counts what it sends."""

import hashlib
import re
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class Hub(ThreadingHTTPServer):
    """Serves /owner/name/resolve/main/... of a folder; `fault` changes one kind of answer."""

    daemon_threads = True

    def __init__(self, folder: Path):
        self.folder, self.fault, self.bodies, self.requests = folder, None, {}, 0
        super().__init__(("127.0.0.1", 0), HubHandler)

    def handle_error(self, request, client_address):
        """Readers hang up on answers that they did not ask for; that is no news."""

    def sent(self, part: str) -> int:
        return sum(size for name, size in self.bodies.items() if part in name)


class HubHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.do_GET(body=False)

    def do_GET(self, body=True):
        hub = self.server
        hub.requests += 1
        head = "/owner/name/resolve/main/"
        if not self.path.startswith(head):
            return self.answer(404, b"", {"X-Error-Code": "RepoNotFound"}, body)
        path = hub.folder / self.path.removeprefix(head)
        if not path.is_file():
            return self.answer(404, b"", {"X-Error-Code": "EntryNotFound"}, body)
        data = path.read_bytes()
        headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "Accept-Ranges": "bytes"}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if hub.fault == "busy" and wanted:
            return self.answer(503, b"", headers, body)
        if not wanted or hub.fault == "no ranges":
            return self.answer(200, data, headers, body)
        first, last = int(wanted[1]), min(int(wanted[2] or len(data)), len(data) - 1)
        shift = 4 if hub.fault == "another range" and first > 8 else 0
        headers["Content-Range"] = f"bytes {first - shift}-{last - shift}/{len(data)}"
        self.answer(206, data[first - shift : last + 1 - shift], headers, body)

    def answer(self, status: int, data: bytes, headers: dict, body: bool):
        cut = self.server.fault == "cut off" and len(data) > 1000 and body
        self.send_response(status)
        for name, value in (headers | {"X-Repo-Commit": "a" * 40, "Content-Length": str(len(data))}).items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            data = data[: len(data) // 2] if cut else data
            self.server.bodies[self.path] = self.server.bodies.get(self.path, 0) + len(data)
            try:
                self.wfile.write(data)
            except OSError:  # the reader hung up, as it should on an answer that it did not ask for
                pass
        self.close_connection = cut
