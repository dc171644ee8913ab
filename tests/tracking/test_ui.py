import contextlib
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path
from urllib.request import urlopen

import pytest
from support.example_runs import one_run

from bestiary.errors import BestiaryError
from bestiary.tracking.ui import has_display, show_runs


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.mark.slow
def test_the_page_opens_on_the_runs_of_the_experiment(project: Path) -> None:
    with one_run():
        pass
    # A shell's background jobs ignore Ctrl-C, and so would a program that a test in one starts.
    take_interrupts = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    command = f"{take_interrupts}; from bestiary.cli import main; main()"
    port = free_port()
    page = subprocess.Popen(
        [sys.executable, "-c", command, "tracking", "ui", "--port", str(port)],
        cwd=project,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        assert page.stdout is not None
        printed = page.stdout.readline()  # and nothing of what MLflow's server prints
        (address,) = re.findall(r"http://\S+", printed)
        assert address == f"http://127.0.0.1:{port}/#/experiments/1/runs?workflowType=machine_learning"
        with urlopen(address) as answer:
            assert answer.status == 200
    finally:
        page.send_signal(signal.SIGINT)
        page.wait(60)
    with contextlib.closing(socket.socket()) as probe:
        assert probe.connect_ex(("127.0.0.1", port)) != 0  # the server has ended with the command


def test_a_taken_port_and_a_missing_database_are_one_sentence(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(BestiaryError, match=f"Port {port} is in use.*PORT={port + 1}"):
            show_runs(port, print)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{project / 'gone.db'}")
    with pytest.raises(BestiaryError, match=r"gone\.db does not exist"):
        show_runs(port, print)


def test_a_browser_opens_only_where_there_is_a_display(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    assert not has_display()
    monkeypatch.setenv("DISPLAY", ":0")
    assert has_display()
