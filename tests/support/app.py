"""The web page's server in a process of its own, as a user starts it."""

from __future__ import annotations

import base64
import io
import json
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
from PIL import Image

from bestiary.app.access import Credentials
from bestiary.app.offers import Offerings
from bestiary.app.tokens import Token
from bestiary.generation import Base

Event = dict[str, Any]  # JSON, as a browser receives it

ORDER = {"animal": "tiger", "steps": 2, "guidance_scale": 3.0, "scheduler": "dpmsolver++", "seed": 7}
MAX_UPLOAD_MIB = 1
SERVE = """
import pickle, sys
from bestiary.app.server import launch
launch(port=0, ready=lambda address: print(address, flush=True), **pickle.loads(bytes.fromhex(sys.argv[1])))
"""


def offerings(base: Path, *adapters: Path) -> Offerings:
    """What a page with one base and these adapters offers."""
    return Offerings(bases=(Base(str(base)),), adapters=tuple(map(str, adapters)))


class RunningPage:
    """A server of the page, and what a browser does with it."""

    def __init__(
        self,
        project: Path,
        offered: Offerings,
        *,
        host: str = "127.0.0.1",
        auth: Credentials | None = None,
        token: Token | None = None,
    ) -> None:
        self.log = project / "server.log"
        self.folder = project
        environment = {**os.environ, "DVC_ROOT": str(project), "TMPDIR": str(project)}
        environment.pop("MLFLOW_TRACKING_URI", None)
        arguments = {"offerings": offered, "host": host, "auth": auth, "token": token}
        arguments["max_upload_mib"] = MAX_UPLOAD_MIB
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", SERVE, pickle.dumps(arguments).hex()],
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=environment,
            )
        assert self.process.stdout is not None
        self.address = self.process.stdout.readline().strip()
        assert self.address.startswith("http"), self.log.read_text()
        self.client = httpx.Client(base_url=self.address, timeout=300)

    def draw(self, **changes: object) -> list[Event]:
        """Send ORDER with changes and return every event until the order is done."""
        response = self.client.post("/api/draw", json=ORDER | changes)
        assert response.status_code == 200, response.text
        return [json.loads(line) for line in response.text.splitlines()]

    def refusal(self, **changes: object) -> Event:
        """Return how ORDER with changes is refused, at once or while it is drawn: message, key and values."""
        response = self.client.post("/api/draw", json=ORDER | changes)
        if response.status_code == 200:
            last: Event = json.loads(response.text.splitlines()[-1])
            assert last["event"] == "error"
        else:
            assert response.status_code == 422
            last = response.json()
        assert "Traceback" not in response.text
        return last

    def stored_uploads(self) -> list[str]:
        """Return the names of the uploaded files that the server stores now."""
        return sorted(file.name for file in self.folder.glob("bestiary-uploads-*/*"))

    def stop(self) -> None:
        self.client.close()
        self.process.send_signal(signal.SIGINT)
        self.process.wait(120)


def pictures(events: list[Event]) -> list[Image.Image]:
    """Return the finished pictures of an order that succeeded."""
    assert events[-1]["event"] == "done", events[-1]
    return [image_of(event) for event in events if event["event"] == "picture"]


def image_of(event: Event) -> Image.Image:
    image = Image.open(io.BytesIO(base64.b64decode(event["image"].split(",")[1])))
    image.load()
    return image
