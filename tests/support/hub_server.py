"""An HTTP server on loopback with the parts of the Hugging Face hub's protocol that downloads need."""

import hashlib
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Served:
    """A model: the folder of its files, and whether its licence must be accepted first."""

    folder: Path
    commit: str = COMMIT
    gated: bool = False


class Hub(ThreadingHTTPServer):
    """Serves `models` by owner/name. Attributes choose the faults, before or between requests."""

    daemon_threads = True

    def __init__(self, models: dict[str, Served]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.models = models
        self.gone = False  # close the connection on every request, like a failing network
        self.status: int | None = None  # the status for every request
        self.breaks_off: set[str] = set()  # files that are cut off after the first half
        self.requests: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, *_: object) -> None:
        """Print no traceback when a client closes the connection."""


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, with_body: bool) -> None:
        path = unquote(urlsplit(self.path).path).strip("/")
        self.server.requests.append(f"{self.command} {path}")
        if self.server.gone:
            self.close_connection = True
            return
        if self.server.status or not path:
            self._send(self.server.status or 200, b"")
            return
        owner, name, *rest = path.removeprefix("api/models/").split("/")
        model = self.server.models.get(f"{owner}/{name}")
        if model is None:
            self._send(404, b"", {"X-Error-Code": "RepoNotFound"})
        elif len(rest) > 1 and rest[1] not in (model.commit, "main"):
            self._send(404, b"", {"X-Error-Code": "RevisionNotFound"})
        elif path.startswith("api/models/"):
            self._send(200, json.dumps(_tree(model) if rest[:1] == ["tree"] else {"id": name, "sha": model.commit}))
        elif model.gated and self.headers.get("Authorization") is None:
            self._send(401, b"", {"X-Error-Code": "GatedRepo"})
        else:
            self._file(model, "/".join(rest[2:]), with_body)

    def _file(self, model: Served, file: str, with_body: bool) -> None:
        path = model.folder / file
        if not path.is_file():
            self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": model.commit})
            return
        content = path.read_bytes()
        headers = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": model.commit}
        sent = content[: len(content) // 2] if file in self.server.breaks_off else content
        self._send(200, sent if with_body else b"", headers, length=len(content))

    def _send(
        self, status: int, body: bytes | str, headers: dict[str, str] | None = None, length: int | None = None
    ) -> None:
        content = body.encode() if isinstance(body, str) else body
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content) if length is None else length))
        self.end_headers()
        self.wfile.write(content)


def _tree(model: Served) -> list[dict[str, str | int]]:
    files = sorted(path for path in model.folder.rglob("*") if path.is_file())
    return [
        {
            "type": "file",
            "path": path.relative_to(model.folder).as_posix(),
            "size": path.stat().st_size,
            "oid": hashlib.sha1(path.read_bytes()).hexdigest(),
        }
        for path in files
    ]


@contextmanager
def hub_server(models: dict[str, Served], cache: Path) -> Iterator[Hub]:
    """Serve the models to this process, which downloads to the folder `cache`. Retries do not wait."""
    hub = Hub(models)
    threading.Thread(target=hub.serve_forever, args=(0.02,), daemon=True).start()
    constants = {
        "ENDPOINT": hub.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(cache),
        "HF_TOKEN_PATH": str(cache / "token"),
        "HF_HUB_DISABLE_XET": True,
    }
    patches = [patch(f"huggingface_hub.constants.{name}", value) for name, value in constants.items()]
    impatient = SimpleNamespace(**{**vars(time), "sleep": lambda _seconds: None})
    patches += [patch(f"huggingface_hub.{module}.time", impatient) for module in ("utils._http", "file_download")]
    for each in patches:
        each.start()
    try:
        yield hub
    finally:
        for each in patches:
            each.stop()
        hub.shutdown()
        hub.server_close()
