"""A hub on this machine: serves a folder under the hub's addresses, byte ranges included, and counts what it sends."""

import hashlib
import itertools
import random
import re
import socket
import struct
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
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    monkeypatch.setenv("no_proxy", "127.0.0.1,localhost")
    close_session()  # connections to the hub before


class Hub(ThreadingHTTPServer):
    """Serves /owner/name/resolve/main/... of a folder; `fault` changes one kind of answer, as many times as `times`.

    "HEAD 503", "GET 429", "range 500": this status, to these questions, with retry_after if that is set
    "no ranges", "another range": the whole file, or other bytes than were asked for
    "cut off", "reset", "silent": after half of the bytes, or as many as `chance` says, the line is closed, reset, dead
    "other bytes", "longer", "shorter": of a file that comes whole; a length that is not the body's, of ranges too
    "late": no answer for a while

    cdn: weights come by a redirect, as the hub does it, from a server whose every answer has an ETag of its own.
    etags: whether answers have one.
    """

    daemon_threads = True

    def __init__(self, folder: Path):
        self.folder, self.fault, self.times, self.bodies, self.requests = folder, None, float("inf"), {}, []
        self.chance: random.Random | None = None
        self.cdn, self.etags, self.retry_after, self.stopped, self.late = False, True, None, threading.Event(), 0.3
        self.answers = itertools.count()
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
        self.stopped.set()
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
        if hub.strikes("late"):
            hub.stopped.wait(hub.late)
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        for status in (429, 500, 502, 503, 504):
            if hub.strikes(f"{'range' if wanted else self.command} {status}"):
                return self.answer(status, b"", {"Retry-After": hub.retry_after} if hub.retry_after else {}, body)
        head, cdn = "/owner/name/resolve/main/", self.path.startswith("/cdn/")
        if not cdn and not self.path.startswith(head):
            return self.answer(404, b"", {"X-Error-Code": "RepoNotFound"}, body)
        name = self.path.removeprefix("/cdn/" if cdn else head)
        if not (hub.folder / name).is_file():
            return self.answer(404, b"", {"X-Error-Code": "EntryNotFound"}, body)
        data = (hub.folder / name).read_bytes()
        content = f'"{hashlib.sha256(data).hexdigest()}"'
        if hub.cdn and not cdn and name.endswith(".safetensors"):
            place = f"http://localhost:{hub.server_port}/cdn/{name}"  # another host than 127.0.0.1
            linked = {"X-Linked-Etag": content, "X-Linked-Size": str(len(data)), "ETag": '"of the redirect"'}
            return self.answer(302, b"", linked | {"Location": place}, body)
        headers = {"ETag": f'"{next(hub.answers)}"' if cdn else content, "Accept-Ranges": "bytes"}
        if not hub.etags:
            del headers["ETag"]
        if not wanted or hub.strikes("no ranges"):
            if body and hub.strikes("other bytes"):
                data = data[:-1] + bytes([data[-1] ^ 1])
            return self.answer(200, data, headers, body)
        first, last = int(wanted[1]), min(int(wanted[2] or len(data)), len(data) - 1)
        shift = 4 if first > 8 and hub.strikes("another range") else 0
        headers["Content-Range"] = f"bytes {first - shift}-{last - shift}/{len(data)}"
        self.answer(206, data[first - shift : last + 1 - shift], headers, body)

    def answer(self, status: int, data: bytes, headers: dict, body: bool):
        hub, ends = self.server, None
        if body and data and (hub.chance or len(data) > 1000):
            ends = next((fault for fault in ("cut off", "reset", "silent") if hub.strikes(fault)), None)
        length = len(data)
        if body and data:
            length += 9 * hub.strikes("longer") - 9 * (len(data) > 1000 and hub.strikes("shorter"))
        self.send_response(status)
        for name, value in (headers | {"X-Repo-Commit": "a" * 40, "Content-Length": str(length)}).items():
            self.send_header(name, value)
        self.end_headers()
        self.close_connection = bool(ends) or length != len(data)
        if not body:
            return
        if ends:
            data = data[: hub.chance.randrange(len(data)) if hub.chance else len(data) // 2]
        hub.bodies[self.path] = hub.bodies.get(self.path, 0) + len(data)
        try:
            self.wfile.write(data)
        except OSError:  # the reader hung up, as it should on an answer that it did not ask for
            pass
        if ends == "silent":
            hub.stopped.wait(20)
        if ends == "reset":  # what the reader has not taken yet is lost, too
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
