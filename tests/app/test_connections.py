"""What a client may cost the server: connections, time and log lines."""

from __future__ import annotations

import contextlib
import json
import logging
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import uvicorn
from support.app import ORDER, offerings

from bestiary.app import connections
from bestiary.app.connections import NoRepetition, possible_connections
from bestiary.app.server import create_app, serving


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every time limit short."""
    monkeypatch.setattr(connections, "REQUEST_SECONDS", 0.5)
    monkeypatch.setattr(connections, "READING_SECONDS", 0.5)


@contextlib.contextmanager
def running(base_folder: Path) -> Iterator[int]:
    """Serve the page from a thread of this process, whose limits a test can change. Gives the port."""
    server = uvicorn.Server(serving(create_app(offerings(base_folder))))
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # so that little fills what a reader leaves
        thread = threading.Thread(target=server.run, args=([listening],))
        thread.start()
        while not server.started:
            time.sleep(0.01)
        try:
            yield listening.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join(60)


def connect(port: int, sent: bytes = b"") -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", port), timeout=30)
    connection.sendall(sent)
    return connection


def is_closed(connection: socket.socket) -> bool:
    """Whether the server ends the connection within the socket's timeout."""
    try:
        while connection.recv(65536):
            pass
    except ConnectionResetError:
        return True
    except TimeoutError:
        return False
    return True


HEAD = b"POST /api/draw HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n"


@pytest.mark.parametrize("sent", [b"", b"GET / HTTP/1.1\r\nHost: loc", HEAD, HEAD + b"{"])
def test_a_half_finished_request_is_dropped(base_folder: Path, quick: None, sent: bytes) -> None:
    with running(base_folder) as port, connect(port, sent) as connection:
        assert is_closed(connection)


def test_a_request_that_drips_in_is_dropped(base_folder: Path, quick: None) -> None:
    with running(base_folder) as port, connect(port, HEAD) as connection:
        started = time.monotonic()
        with contextlib.suppress(OSError):
            while time.monotonic() - started < 20:
                connection.sendall(b" ")
                time.sleep(0.1)
        assert time.monotonic() - started < 10


@pytest.mark.parametrize("path", [b"PUT /api/images", b"POST /sdapi/v1/img2img"])
def test_an_image_may_take_longer_to_arrive_than_an_order(base_folder: Path, quick: None, path: bytes) -> None:
    head = HEAD.replace(b"POST /api/draw", path).replace(b"99", b"6")
    with running(base_folder) as port, connect(port, head) as connection:
        for _ in range(6):
            connection.sendall(b"x")
            time.sleep(0.15)
        assert connection.recv(65536).startswith(b"HTTP/1.1 422 ")


def test_half_finished_requests_make_room_for_others(base_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "MAX_CONNECTIONS_PER_ADDRESS", 20)
    with running(base_folder) as port, contextlib.ExitStack() as stack:
        half = [stack.enter_context(connect(port, HEAD)) for _ in range(60)]
        for _ in range(3):
            assert httpx.get(f"http://127.0.0.1:{port}/").status_code == 200
        assert is_closed(half[0])
        half[-1].settimeout(0.2)
        assert not is_closed(half[-1])


def test_a_reader_that_stops_is_dropped_and_the_picture_is_not_drawn_on(
    base_folder: Path, quick: None, caplog: pytest.LogCaptureFixture
) -> None:
    body = json.dumps(ORDER | {"steps": 1, "count": 16, "width": 256, "height": 256, "preview": False}).encode()
    order = HEAD.replace(b"99", str(len(body)).encode()) + body
    with running(base_folder) as port, socket.socket() as reader:
        reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        reader.connect(("127.0.0.1", port))
        reader.sendall(order)
        answer = httpx.post(f"http://127.0.0.1:{port}/api/draw", json=ORDER | {"steps": 1}, timeout=300)
        assert answer.text.splitlines()[-1] == '{"event": "done"}'
        reader.settimeout(60)
        time.sleep(2)
        assert is_closed(reader)
    assert not caplog.records


def test_a_server_with_few_files_answers_and_does_not_fill_the_log(
    base_folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """accept() fails as if no file could be opened; asyncio alone logs 2,048 lines a second."""
    real, failing = socket.socket.accept, threading.Event()

    def accept(listening: socket.socket) -> tuple[socket.socket, object]:
        if failing.is_set():
            raise OSError(24, "Too many open files")
        return real(listening)

    def told() -> list[str]:
        return [record.getMessage() for record in caplog.records if "accept" in record.getMessage()]

    caplog.set_level(logging.ERROR, logger="asyncio")  # DVC, which other tests import, sets it to CRITICAL
    monkeypatch.setattr(socket.socket, "accept", accept)
    with running(base_folder) as port:
        failing.set()
        with connect(port):
            for _ in range(300):
                if told():
                    break
                time.sleep(0.1)
            time.sleep(1.5)  # asyncio tries again after a second
        failing.clear()
        assert httpx.get(f"http://127.0.0.1:{port}/", timeout=30).status_code == 200
    assert len(told()) == 1, told()


def test_equal_log_lines_are_written_once_a_minute() -> None:
    lines = NoRepetition()
    first, same, other = (logging.LogRecord("a", 30, "", 0, text, (), None) for text in ("x", "x", "y"))
    assert [lines.filter(record) for record in (first, same, other)] == [True, False, True]


def test_connections_leave_files_for_everything_else(monkeypatch: pytest.MonkeyPatch) -> None:
    resource = pytest.importorskip("resource")
    raised: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "setrlimit", lambda _, limits: raised.append(limits))
    found = []
    for limits in ((1024, 4096), (256, 4096), (256, 256), (16, 16)):
        monkeypatch.setattr(resource, "getrlimit", lambda _, limits=limits: limits)
        found.append(possible_connections())
    assert found == [512, 512, 160, 8]
    assert raised == [(608, 4096), (256, 256), (16, 16)]
