"""A hub on this machine: serves a folder under the hub's addresses, byte ranges included, and counts what it sends."""

import hashlib
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from huggingface_hub import constants
from huggingface_hub.utils import close_session


@contextmanager
def serving(folder: Path) -> Iterator["Hub"]:
    hub = Hub(folder)
    thread = threading.Thread(target=partial(hub.serve_forever, poll_interval=0.01), daemon=True)
    thread.start()
    yield hub
    hub.stop()
    thread.join()


def ask_only(hub: "Hub", cache: Path, monkeypatch) -> None:
    """From here on huggingface_hub asks this hub and no other, and keeps files in an empty cache."""
    endpoint = f"http://127.0.0.1:{hub.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    close_session()  # connections to the hub before


class Hub(ThreadingHTTPServer):
    """Serves /owner/name/resolve/main/... of a folder; `fault` changes one kind of answer, as many times as `times`."""

    daemon_threads = True

    def __init__(self, folder: Path):
        self.folder, self.fault, self.times, self.bodies, self.requests = folder, None, float("inf"), {}, []
        super().__init__(("127.0.0.1", 0), HubHandler)

    def handle_error(self, request, client_address):
        """Readers hang up on answers that they did not ask for; that is no news."""

    def sent(self, part: str) -> int:
        return sum(size for name, size in self.bodies.items() if part in name)

    def sent_weights(self) -> int:
        return sum(size for name, size in self.bodies.items() if name.endswith(".safetensors"))

    def strikes(self, fault: str) -> bool:
        """Whether this fault happens now; counts that it did."""
        if self.fault != fault or self.times == 0:
            return False
        self.times -= 1
        return True

    def stop(self) -> None:
        self.shutdown()
        self.server_close()
        close_session()


class HubHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # head and body are two writes: the second would wait 40 ms for an answer

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.do_GET(body=False)

    def do_GET(self, body=True):
        hub = self.server
        hub.requests.append(self.path)
        head = "/owner/name/resolve/main/"
        if not self.path.startswith(head):
            return self.answer(404, b"", {"X-Error-Code": "RepoNotFound"}, body)
        path = hub.folder / self.path.removeprefix(head)
        if not path.is_file():
            return self.answer(404, b"", {"X-Error-Code": "EntryNotFound"}, body)
        data = path.read_bytes()
        headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "Accept-Ranges": "bytes"}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted and hub.strikes("busy"):
            return self.answer(503, b"", headers, body)
        if not wanted or hub.strikes("no ranges"):
            return self.answer(200, data, headers, body)
        first, last = int(wanted[1]), min(int(wanted[2] or len(data)), len(data) - 1)
        shift = 4 if first > 8 and hub.strikes("another range") else 0
        headers["Content-Range"] = f"bytes {first - shift}-{last - shift}/{len(data)}"
        self.answer(206, data[first - shift : last + 1 - shift], headers, body)

    def answer(self, status: int, data: bytes, headers: dict, body: bool):
        cut = body and len(data) > 1000 and self.server.strikes("cut off")
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
