"""MLflow's page, opened where the project's runs are: its own start page is about other things."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable

from bestiary.errors import BestiaryError
from bestiary.files import project_root
from bestiary.tracking.addresses import sqlite_path
from bestiary.tracking.store import EXPERIMENT, check_database, open_client, tracking_uri

START_SECONDS = 180.0  # for a server that hangs; it starts in about ten
STOP_SECONDS = 10.0  # a worker that is told to end while it starts can miss it
HOST = "127.0.0.1"


def show_runs(port: int, ready: Callable[[str], None]) -> None:
    """Call `ready` with the address of the project's runs in MLflow's page. Serves a local database until Ctrl-C.

    Raises BestiaryError when there are no runs yet, the port is taken, or MLflow does not start.
    """
    uri = tracking_uri()
    path = sqlite_path(uri)
    if path is None:
        ready(address_of_runs(uri.rstrip("/"), _experiment(uri)))
        return
    if not path.is_file():
        raise BestiaryError(f"There are no runs yet: {path} does not exist. Run `dvc repro`.")
    check_database(uri)
    _check_port(port)
    # One worker is enough for one reader, and starts and stops sooner than MLflow's four.
    command = [sys.executable, "-m", "mlflow", "ui", "--backend-store-uri", uri, "--host", HOST, "--port", str(port)]
    command += ["--workers", "1"]
    with tempfile.TemporaryFile() as log:  # what the server prints is for developers, unless it does not start
        # The server would start eight more processes for jobs, which a page does not use.
        environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        server = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True, env=environment
        )
        try:
            address = address_of_runs(f"http://{HOST}:{port}", _experiment(uri))
            if not _answers(f"http://{HOST}:{port}/health", server):
                log.seek(0)
                lines = log.read().decode(errors="replace").strip().splitlines()
                raise BestiaryError(f"MLflow's page does not start: {lines[-1] if lines else 'it gives no reason'}")
            ready(address)
            server.wait()
        finally:
            _stop(server)


def address_of_runs(server: str, experiment: str) -> str:
    """The address of an experiment's runs at an MLflow server.

    >>> address_of_runs("http://127.0.0.1:5000", "1")
    'http://127.0.0.1:5000/#/experiments/1/runs?workflowType=machine_learning'
    """
    return f"{server}/#/experiments/{experiment}/runs?workflowType=machine_learning"


def _stop(server: subprocess.Popen[bytes]) -> None:
    """End the server and its workers; one that does not end when asked is killed."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(server.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(STOP_SECONDS)
        os.killpg(server.pid, signal.SIGKILL)
    server.wait()


def has_display() -> bool:
    """Whether a browser's window can open."""
    return sys.platform in ("darwin", "win32") or bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))


def _experiment(uri: str) -> str:
    found = open_client(uri, project_root()).get_experiment_by_name(EXPERIMENT)
    if found is None:
        raise BestiaryError(f"There are no runs of {EXPERIMENT!r} yet. Run `dvc repro`.")
    return str(found.experiment_id)


def _check_port(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a server that has just ended leaves it waiting
        try:
            probe.bind((HOST, port))
        except OSError:
            raise BestiaryError(f"Port {port} is in use. Choose another one: make mlflow PORT={port + 1}") from None


def _answers(address: str, server: subprocess.Popen[bytes]) -> bool:
    """Wait until the server answers. False when it ends, or does not answer in time."""
    deadline = time.monotonic() + START_SECONDS
    while server.poll() is None and time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(address, timeout=5):
                return True
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    return False
