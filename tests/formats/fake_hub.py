"""A small Hugging Face hub on loopback: listings, resolve with ranges, and the faults that real ones have.

Written from the hub's documented HTTP interface: /api/models/REPO?blobs=true, HEAD and GET /REPO/resolve/REV/FILE
with ETag, X-Repo-Commit, X-Linked-Etag and X-Linked-Size.
"""

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

COMMIT = "c0ffee" * 6 + "c0de"


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    first_byte: int | None  # of the Range header
    authorization: str | None
    user_agent: str


@dataclass
class FakeHub:
    """Change the fields between requests; `requests` says what was asked."""

    repo: str
    files: dict[str, bytes]
    endpoint: str = ""
    status: int | None = None  # answer everything so
    error_code: str | None = None  # X-Error-Code of that answer
    cuts: list[int] = field(default_factory=list)  # of the next file answers: end each after so many bytes
    sent_instead: dict[str, bytes] = field(default_factory=dict)  # what is sent is not what is listed
    knows_ranges: bool = True
    outside_large_storage: bool = False  # list files by git hash, as small text files are
    redirect_to: str | None = None  # another host for the bytes, like a content network
    requests: list[Request] = field(default_factory=list)

    def oid(self, file: str) -> str:
        data = self.files[file]
        if self.outside_large_storage:
            return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        return hashlib.sha256(data).hexdigest()

    def listing(self) -> dict[str, object]:
        siblings = []
        for file, data in self.files.items():
            entry: dict[str, object] = {"rfilename": file, "size": len(data), "blobId": "0" * 40}
            if self.outside_large_storage:
                entry["blobId"] = self.oid(file)
            else:
                entry["lfs"] = {"sha256": self.oid(file), "size": len(data), "pointerSize": 130}
            siblings.append(entry)
        tags = ["gguf", "license:apache-2.0"]
        return {"id": self.repo, "modelId": self.repo, "sha": COMMIT, "tags": tags, "siblings": siblings}

    def downloads(self, file: str) -> list[int]:
        """The first byte asked for by each GET of the file."""
        return [r.first_byte or 0 for r in self.requests if r.method == "GET" and r.path.endswith("/" + file)]


@contextmanager
def serve(hub: FakeHub) -> Iterator[FakeHub]:
    """Answers on a free port of 127.0.0.1, and puts the address into `hub.endpoint`."""

    class Handler(_Handler):
        fake = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    fake: FakeHub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def log_message(self, *args: object) -> None:
        pass

    def _answer(self) -> None:
        hub, path = self.fake, urlsplit(self.path).path
        first = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        hub.requests.append(
            Request(
                self.command,
                path,
                int(first[1]) if first else None,
                self.headers.get("Authorization"),
                self.headers.get("User-Agent", ""),
            )
        )
        if hub.status is not None:
            self._send(hub.status, {"X-Error-Code": hub.error_code} if hub.error_code else {})
        elif path in (f"/api/models/{hub.repo}", f"/api/models/{hub.repo}/revision/main"):
            self._send(200, {"Content-Type": "application/json"}, json.dumps(hub.listing()).encode())
        elif (found := re.fullmatch(rf"(?:/elsewhere)?/{re.escape(hub.repo)}/resolve/(\w+)/(.+)", path)) and (
            found[1] in ("main", COMMIT) and found[2] in hub.files
        ):
            self._send_file(found[2], int(first[1]) if first and hub.knows_ranges else None)
        else:
            self._send(404, {"X-Error-Code": "RepoNotFound" if path.startswith("/api/") else "EntryNotFound"})

    def _send_file(self, file: str, first_byte: int | None) -> None:
        hub = self.fake
        headers = {"ETag": f'"{hub.oid(file)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        headers |= {"X-Linked-Etag": f'"{hub.oid(file)}"', "X-Linked-Size": str(len(hub.files[file]))}
        if hub.redirect_to and not self.path.startswith("/elsewhere/"):
            self._send(302, {**headers, "Location": f"{hub.redirect_to}/elsewhere{self.path}"})
            return
        data = hub.sent_instead.get(file, hub.files[file])
        if first_byte is not None:
            headers["Content-Range"] = f"bytes {first_byte}-{len(data) - 1}/{len(data)}"
        status = 200 if first_byte is None else 206
        rest = data[first_byte or 0 :]
        cut = hub.cuts.pop(0) if hub.cuts and self.command == "GET" else None
        self._send(status, headers, rest, cut)

    def _send(self, status: int, headers: dict[str, str], body: bytes = b"", cut: int | None = None) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[:cut])
        if cut is not None:
            self.close_connection = True
