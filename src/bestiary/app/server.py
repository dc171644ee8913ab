"""The page's server: its files, what it offers, uploads, and a line in which orders wait for the one device.

A picture goes to the browser that ordered it and is kept nowhere else. Only this machine can reach the page, unless it
is told to listen elsewhere, and then only with a user and a password.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import ipaddress
import json
import logging
import os
import secrets
import socket
import tempfile
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from bestiary.app.studio import Order, RefusedError, Stopped, Studio, native_side, said
from bestiary.errors import BestiaryError
from bestiary.memory import keep_freed_memory
from bestiary.settings import Usual

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

Credentials = tuple[str, str]

PAGE = Path(__file__).parent / "page"
LOCAL_NAMES = ("127.0.0.1", "localhost", "[::1]")
LARGEST_ORDER = 64 * 1024  # bytes
MOST_WAITING = 32
MOST_UPLOADS = 16  # the oldest makes room
MOST_UPLOADING = 4  # at once: with those kept, what uploads can take of the disk is bounded
UPLOAD_SECONDS = 300.0  # after which a file that does not arrive makes room
LOOK_SECONDS = 0.2  # how often somebody who waits looks whether it is their turn
WRONG_PASSWORD_SECONDS = 1.0
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}

log = logging.getLogger(__name__)


def create_app(
    base: str,
    revision: str | None = None,
    *,
    usual: Usual | None = None,
    adapters: Sequence[str] = ("models/adapter",),
    bases: Sequence[str] = (),
    registered_name: str = "bestiary",
    auth: Credentials | None = None,
    max_upload_mib: int = 256,
) -> Starlette:
    """The page as an ASGI application that draws with `base`.

    `adapters` are folders or files on offer beside the registered versions, `bases` further bases, `usual` how what is
    not registered is drawn unless told otherwise. Without `auth` it answers only to the names of this machine.
    """
    keep_freed_memory()  # before the thread that draws is there
    studio = Studio(
        base,
        revision,
        usual=usual or Usual(),
        adapters=adapters,
        bases=bases,
        registered_name=registered_name,
    )
    line: list[object] = []  # who waits, in order; the first is being drawn for
    uploading: set[str] = set()
    worker = ThreadPoolExecutor(1, "draw")
    closing = threading.Event()
    folder = tempfile.TemporaryDirectory(prefix="bestiary-uploads-")

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        worker.submit(studio.warm)
        yield
        closing.set()
        worker.shutdown(cancel_futures=True)
        folder.cleanup()

    async def index(_: Request) -> Response:
        return Response((PAGE / "index.html").read_bytes(), media_type="text/html")

    async def catalog(_: Request) -> Response:
        return JSONResponse(await asyncio.to_thread(studio.catalog))

    async def upload(request: Request) -> Response:
        name = Path(request.query_params.get("name", "")).name[:80]
        if not name.lower().endswith(".safetensors"):
            raise RefusedError("onlySafetensors", "Only .safetensors files can be uploaded.")
        if len(uploading) >= MOST_UPLOADING:
            raise RefusedError("uploadsFull", "Other files are being uploaded: try again in a few minutes.")
        key = f"upload:{secrets.token_urlsafe(16)}"  # knowing it is what makes the file yours
        file = Path(folder.name, f"{key.removeprefix('upload:')}.safetensors")
        uploading.add(key)
        try:
            size = 0
            with file.open("wb") as opened:
                async with asyncio.timeout(UPLOAD_SECONDS):
                    async for chunk in request.stream():
                        size += len(chunk)
                        if size > max_upload_mib * 2**20:
                            largest = str(max_upload_mib)
                            raise RefusedError(
                                "tooLarge", "{name} is larger than {largest} MiB.", name=name, largest=largest
                            )
                        await asyncio.to_thread(opened.write, chunk)
            offer = await asyncio.to_thread(studio.add_upload, key, name, file)
        except TimeoutError:
            file.unlink(missing_ok=True)
            limit = f"{UPLOAD_SECONDS / 60:g}"
            raise RefusedError(
                "late", "{name} took longer than {limit} minutes to arrive.", name=name, limit=limit
            ) from None
        except OSError:
            file.unlink(missing_ok=True)
            raise RefusedError("noSpace", "There is no space left here for {name}.", name=name) from None
        except BaseException:  # half a file, the wrong kind, or a browser that went away
            file.unlink(missing_ok=True)
            raise
        finally:
            uploading.remove(key)
        while len(studio.uploads) > MOST_UPLOADS:
            oldest = studio.uploads.pop(next(iter(studio.uploads)))
            Path(oldest.what).unlink(missing_ok=True)
        return JSONResponse(offer.public())

    async def draw(request: Request) -> Response:
        data = b""
        async for chunk in request.stream():
            data += chunk
            if len(data) > LARGEST_ORDER:
                raise RefusedError("longOrder", "This request is too long.")
        order = Order.parse(data)
        if len(line) >= MOST_WAITING:
            raise RefusedError("lineFull", "Too many people are waiting already: try again in a few minutes.")
        return StreamingResponse(_lines(_events(order)), media_type="application/x-ndjson")

    async def _events(order: Order) -> AsyncIterator[dict[str, Any]]:
        """What happens to one order. When its browser goes away, this ends, and the drawing with it."""
        ticket, stopped = object(), threading.Event()
        line.append(ticket)
        try:
            ahead = None
            while line[0] is not ticket:
                if ahead != line.index(ticket):
                    ahead = line.index(ticket)
                    yield {"event": "waiting", "ahead": ahead}
                await asyncio.sleep(LOOK_SECONDS)
            loop = asyncio.get_running_loop()
            events: asyncio.Queue[dict[str, Any]] = asyncio.Queue()

            def tell(event: dict[str, Any]) -> None:
                if closing.is_set():
                    raise Stopped
                loop.call_soon_threadsafe(events.put_nowait, event)

            worker.submit(_draw, studio, order, tell, stopped)
            while True:
                event = await events.get()
                yield event
                if event["event"] in ("done", "error"):
                    return
        finally:
            stopped.set()
            line.remove(ticket)

    app = Starlette(
        routes=[
            Route("/", index),
            Route("/api/catalog", catalog),
            Route("/api/draw", draw, methods=["POST"]),
            Route("/api/adapters", upload, methods=["PUT"]),
            Mount("/page", StaticFiles(directory=PAGE)),
        ],
        middleware=[Middleware(partial(Guard, auth=auth))],
        exception_handlers={BestiaryError: _sentence, ClientDisconnect: _sentence},
        lifespan=lifespan,
    )
    app.state.studio = studio
    return app


def launch(
    base: str,
    revision: str | None = None,
    *,
    host: str = "127.0.0.1",
    port: int = 7860,
    auth: Credentials | None = None,
    ready: Callable[[str], None] = print,
    **options: Any,
) -> None:
    """Serve the page until Ctrl-C; `ready` gets its address. `options` go to `create_app`.

    Raises BestiaryError when the base is missing, the port is taken, or another machine could reach the page without a
    password.
    """
    import uvicorn

    if not _is_loopback(host) and auth is None:
        raise BestiaryError(
            f"With the host {host} other machines can reach the page: put user:password into the environment variable "
            "BESTIARY_AUTH or into a file first."
        )
    native_side(base, revision)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind((host, port))
        except OSError as error:
            raise BestiaryError(f"The page cannot listen on {host}:{port}: {error.strerror}.") from None
        app = create_app(base, revision, auth=auth, **options)
        config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1, server_header=False)
        shown = f"[{host}]" if ":" in host else host
        ready(f"http://{shown}:{listening.getsockname()[1]}")
        with contextlib.suppress(KeyboardInterrupt):
            uvicorn.Server(config).run(sockets=[listening])


def read_credentials(file: Path | None = None) -> Credentials | None:
    """The user and the password: from `file`, else from the environment variable BESTIARY_AUTH, else none.

    Never from an argument: everybody on the machine can read those. Raises BestiaryError when they are not of the form
    user:password, or when others can read the file.
    """
    if file is None:
        source, text = "BESTIARY_AUTH", os.environ.get("BESTIARY_AUTH", "")
        if not text:
            return None
    else:
        source = str(file)
        try:
            text = file.read_text(encoding="utf-8").strip()
            if os.name == "posix" and file.stat().st_mode & 0o077:
                raise BestiaryError(f"Others can read {file}: run `chmod 600 {file}` first.")
        except (OSError, UnicodeDecodeError):
            raise BestiaryError(f"{file} cannot be read.") from None
    user, colon, password = text.partition(":")
    if not (user and colon and password):
        raise BestiaryError(f"{source} must hold user:password.")
    return user, password


class Guard:
    """Lets in who may come in, and tells browsers to load nothing from anywhere else."""

    def __init__(self, app: ASGIApp, auth: Credentials | None) -> None:
        self.app = app
        self.expected = auth and base64.b64encode(":".join(auth).encode())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                extra = [(key.lower().encode(), value.encode()) for key, value in HEADERS.items()]
                message["headers"] = [*message.get("headers", []), *extra]
            await send(message)

        refusal = await self._refusal(scope["path"], dict(scope["headers"]))
        await (refusal or self.app)(scope, receive, send_with_headers)

    async def _refusal(self, path: str, headers: dict[bytes, bytes]) -> Response | None:
        # Another site open in the same browser may link here, and must not order pictures.
        if path.startswith("/api/") and headers.get(b"sec-fetch-site", b"none") not in (b"none", b"same-origin"):
            return PlainTextResponse("Open this page by its own address.", 403)
        if self.expected is None:
            # A name that somebody else's DNS points at this machine is not one of its own.
            host = headers.get(b"host", b"").decode("latin-1")
            name = host if host.endswith("]") else host.rsplit(":", 1)[0]
            return None if name in LOCAL_NAMES else PlainTextResponse("Open this page at localhost.", 403)
        kind, _, given = headers.get(b"authorization", b"").partition(b" ")
        if kind.lower() == b"basic" and secrets.compare_digest(given.strip(), self.expected):
            return None
        if given:
            await asyncio.sleep(WRONG_PASSWORD_SECONDS)
        challenge = {"WWW-Authenticate": 'Basic realm="Bestiary", charset="UTF-8"'}
        return PlainTextResponse("A user and a password are needed.", 401, challenge)


def _draw(studio: Studio, order: Order, tell: Callable[[dict[str, Any]], None], stopped: threading.Event) -> None:
    """In the drawing thread: whatever happens, the last event is `done` or `error`, with a sentence for the page."""
    last: dict[str, Any] = {"event": "done"}
    try:
        studio.draw(order, tell, stopped)
    except Stopped:
        pass
    except BestiaryError as error:
        last = {"event": "error", **said(error)}
    except Exception as error:
        log.exception("a picture failed")
        refused = RefusedError("failure", "The picture could not be drawn: the server's log says more.")
        if "memory" in f"{type(error).__name__} {error}".lower():
            refused = RefusedError("memory", "The device has too little memory for a picture of this size.")
        last = {"event": "error", **said(refused)}
    with contextlib.suppress(Stopped, RuntimeError):  # the server is closing
        tell(last)


async def _lines(events: AsyncIterator[dict[str, Any]]) -> AsyncIterator[str]:
    async with contextlib.aclosing(events):  # type: ignore[type-var]
        async for event in events:
            yield json.dumps(event) + "\n"


def _sentence(_: Request, error: Exception) -> Response | Awaitable[Response]:
    return JSONResponse(said(error), 422)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
