"""An HTTP server on loopback that imitates Science Data Bank, with faults that tests can choose."""

import hashlib
import json
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, quote, urlsplit

Json = dict[str, Any]  # of the service
HTML = b"<!DOCTYPE html><html><body>Too many visitors</body></html>"


class ScienceDB(ThreadingHTTPServer):
    """Serves `files` (path to content). Attributes choose the faults, before or between requests."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, bytes] = {}
        self.ids: dict[str, str] = {}
        for path, content in files.items():
            self.add(path, content)
        self.md5 = True
        self.sizes = True
        self.ranges = True
        self.retry_after = "7"  # seconds or a date
        self.paging = "correct"  # or "repeats": every request gets the first page
        self.max_page = 100_000  # entries
        self.page: list[Json] | None = None  # the folder listing's JSON, instead of that of the files
        # Each request of its kind uses up one fault; "always <fault>" stays.
        self.listing_faults: list[str] = []  # of both listings
        self.folder_faults: list[str] = []  # of the folder listing only
        self.faults: defaultdict[str, list[str]] = defaultdict(list)  # of downloads, by path
        self.bytes_per_second: float | None = None
        self.served: Counter[str] = Counter()  # bytes by path
        self.requests: Counter[str] = Counter()  # downloads by path
        self.ranges_requested: list[str] = []
        self.max_at_once = 0
        self.at_once = 0
        self.lock = threading.Lock()

    def add(self, path: str, content: bytes) -> None:
        self.files[path] = content
        self.ids[hashlib.sha1(path.encode("utf-8", "surrogatepass")).hexdigest()] = path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, *_: object) -> None:
        """Print no traceback: tests let clients hang up."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # otherwise each response waits 40 ms for the client's acknowledgement
    server: ScienceDB

    def log_message(self, *_: object) -> None:
        pass

    def do_POST(self) -> None:
        query = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self._counted():
            if not self._fault(self.server.listing_faults) and not self._fault(self.server.folder_faults):
                self._json({"code": 20000, "message": "OK", "data": self._page(query)})

    def do_GET(self) -> None:
        address = urlsplit(self.path)
        query = parse_qs(address.query)
        with self._counted():
            if address.path.endswith("/getAllUrl"):
                if not self._fault(self.server.listing_faults):
                    self._addresses()
            elif address.path == "/download":  # the service redirects to a delivery network
                self._respond(302, b"", {"Location": f"/cdn?fileId={query['fileId'][0]}"})
            else:
                self._file(self.server.ids.get(query["fileId"][0]))

    @contextmanager
    def _counted(self) -> Iterator[None]:
        with self.server.lock:
            self.server.at_once += 1
            self.server.max_at_once = max(self.server.max_at_once, self.server.at_once)
        try:
            yield
        finally:
            with self.server.lock:
                self.server.at_once -= 1

    def _respond(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        with self.server.lock:  # the client may send its next request as soon as this response ends
            self.server.at_once -= 1
        try:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)
        finally:
            with self.server.lock:
                self.server.at_once += 1

    def _json(self, content: Json) -> None:
        self._respond(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _fault(self, faults: list[str]) -> bool:
        """Respond with the next of the faults; return whether there was one."""
        with self.server.lock:
            if not faults:
                return False
            fault = faults[0].removeprefix("always ")
            if fault == faults[0]:
                faults.pop(0)
        if fault == "null":
            self._json({"code": 20000, "data": None})
        elif fault == "50000":
            self._json({"code": 50000, "message": "internal error", "data": None})
        elif fault == "html":
            self._respond(200, HTML, {"Content-Type": "text/html"})
        elif fault == "429 after":
            self._respond(429, b"", {"Retry-After": self.server.retry_after})
        elif fault == "endless":
            self._without_end(b'{"id": "1", "path": "/V1/a.jpg"},' * 1024, pause=0)
        elif fault == "drip":
            self._without_end(b" ", pause=0.05)
        elif fault == "hang":
            time.sleep(3)
            self.close_connection = True
        elif fault == "hang up":
            self.close_connection = True
        else:
            self._respond(int(fault), b"")
        return True

    def _without_end(self, block: bytes, pause: float) -> None:
        """Send a body that never ends, without its length, until the client hangs up."""
        self.close_connection = True
        self.send_response(200)
        self.end_headers()
        with suppress(OSError):
            for _ in range(4096):
                self.wfile.write(block)
                self.wfile.flush()
                time.sleep(pause)

    def _page(self, query: Json) -> list[Json]:
        if self.server.page is not None:
            return self.server.page
        folder = query["path"].rstrip("/") + "/"
        entries: dict[str, Json] = {}
        for path, content in self.server.files.items():
            if not path.startswith(folder):
                continue
            name, _, below = path[len(folder) :].partition("/")
            if below:
                entries[name] = {"id": f"dir {folder}{name}", "fileName": name, "path": folder + name, "dir": True}
            else:
                file_id = hashlib.sha1(path.encode("utf-8", "surrogatepass")).hexdigest()
                entry: Json = {"id": file_id, "fileName": name, "path": path, "dir": False}
                if self.server.sizes:
                    entry["size"] = len(content)
                if self.server.md5:
                    entry["md5"] = hashlib.md5(content).hexdigest()
                entries[name] = entry
        listed = list(entries.values())
        start = 0 if self.server.paging == "repeats" else query["lastIndex"]
        return listed[start : start + min(query["pageSize"], self.server.max_page)]

    def _addresses(self) -> None:
        lines = [
            f"{self.server.url}/download?fileId={file_id}&path={quote(path) if index % 2 else path}"
            f"&fileName={path.rsplit('/', 1)[-1]}"
            for index, (file_id, path) in enumerate(self.server.ids.items())
        ]
        self._respond(200, "\n".join(lines).encode(), {"Content-Type": "text/plain"})

    def _file(self, path: str | None) -> None:
        if path is None:
            self._respond(404, b"")
            return
        content = self.server.files[path]
        with self.server.lock:
            self.server.requests[path] += 1
            faults = self.server.faults[path]
            special = faults[0] if faults and faults[0] in ("truncate", "wrong", "wrong range") else None
            if special:
                faults.pop(0)
        if not special and self._fault(faults):
            return
        if special == "wrong":
            content = b"x" * len(content)
        start = 0
        wanted = self.headers.get("Range")
        headers = {}
        if wanted:
            with self.server.lock:
                self.server.ranges_requested.append(wanted)
            if self.server.ranges:
                start = int(wanted.removeprefix("bytes=").rstrip("-"))
                if start >= len(content):
                    self._respond(416, b"")
                    return
                first = start + 1 if special == "wrong range" else start
                headers["Content-Range"] = f"bytes {first}-{len(content) - 1}/{len(content)}"
        body = content[start:]
        if special == "truncate":
            headers["Content-Length"] = str(len(body))
            body = body[: max(1, len(body) // 2)]
            self.close_connection = True
        with self.server.lock:
            self.server.served[path] += len(body)
        if self.server.bytes_per_second:
            time.sleep(len(body) / self.server.bytes_per_second)
        self._respond(206 if "Content-Range" in headers else 200, body, headers)


@contextmanager
def serving(files: dict[str, bytes]) -> Iterator[ScienceDB]:
    """Run the server in a thread."""
    server = ScienceDB(files)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
