"""The web page's server: the page's files, what it offers, uploaded adapters, drawing, and the programs' APIs.

A picture goes only to the browser that ordered it; the server does not store it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import AsyncIterator, Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from bestiary.app.a1111_api import A1111Api
from bestiary.app.access import AccessControl, Credentials, is_loopback
from bestiary.app.bodies import read_json
from bestiary.app.drawing_queue import Drawing, DrawingQueue
from bestiary.app.errors import retry_headers, status_of
from bestiary.app.events import Failed, to_json
from bestiary.app.limits import address_of
from bestiary.app.offers import Offerings
from bestiary.app.openai_api import OpenAIApi
from bestiary.app.orders import Order
from bestiary.app.program_errors import A1111, OPENAI, disconnected
from bestiary.app.studio import Studio, native_side
from bestiary.app.tokens import Token
from bestiary.app.uploads import Uploads
from bestiary.errors import BestiaryError
from bestiary.memory import keep_freed_memory

if TYPE_CHECKING:
    from starlette.types import Receive, Scope, Send
    from uvicorn import Config

PAGE = Path(__file__).parent / "page"
MAX_UPLOAD_MIB = 256
MAX_NAME_LENGTH = 80  # characters of an uploaded file's name


class Server:
    """The state of one running page, and one method for each route."""

    def __init__(self, offerings: Offerings, max_upload_mib: int) -> None:
        self.studio = Studio(offerings)
        self.queue = DrawingQueue(self.studio)
        self.uploads = Uploads(self.studio.offers, max_upload_mib)

    @contextlib.asynccontextmanager
    async def lifespan(self, _: Starlette) -> AsyncIterator[None]:
        self.queue.warm_up()
        yield
        self.queue.close()
        self.uploads.close()

    async def index(self, _: Request) -> Response:
        return FileResponse(PAGE / "index.html")

    async def catalog(self, _: Request) -> Response:
        return JSONResponse(await asyncio.to_thread(self.studio.catalog))

    async def upload(self, request: Request) -> Response:
        name = Path(request.query_params.get("name", "")).name[:MAX_NAME_LENGTH]
        offer = await self.uploads.receive(name, request.stream(), address_of(request.scope))
        return JSONResponse(offer.public())

    async def upload_image(self, request: Request) -> Response:
        name = Path(request.query_params.get("name", "")).name[:MAX_NAME_LENGTH]
        image = await self.uploads.receive_image(name, request.stream(), address_of(request.scope))
        return JSONResponse({"key": image.key, "name": image.name})

    async def draw(self, request: Request) -> Response:
        order = Order.parse(await read_json(request))
        return EventResponse(self.queue.enter(order, address_of(request.scope)))


class EventResponse(StreamingResponse):
    """Sends a drawing's events, one JSON object a line. Stops the drawing when the browser is gone."""

    def __init__(self, drawing: Drawing) -> None:
        super().__init__(_json_lines(drawing), media_type="application/x-ndjson")
        self._drawing = drawing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._drawing.close()


def create_app(
    offerings: Offerings,
    *,
    auth: Credentials | None = None,
    token: Token | None = None,
    max_upload_mib: int = MAX_UPLOAD_MIB,
) -> Starlette:
    """Return the page and the programs' APIs as an ASGI application.

    Without credentials, it answers only to the names of this machine; with a token, programs need it.
    """
    keep_freed_memory()  # must run before the drawing thread starts
    server = Server(offerings, max_upload_mib)
    return Starlette(
        routes=[
            Route("/", server.index),
            Route("/api/catalog", server.catalog),
            Route("/api/draw", server.draw, methods=["POST"]),
            Route("/api/adapters", server.upload, methods=["PUT"]),
            Route("/api/images", server.upload_image, methods=["PUT"]),
            Mount("/page", StaticFiles(directory=PAGE)),
            Mount(OPENAI, OpenAIApi(server.studio.offers, server.queue).app()),
            Mount(A1111, A1111Api(server.studio.offers, server.queue, server.uploads).app()),
        ],
        middleware=[Middleware(AccessControl, credentials=auth, token=token)],
        exception_handlers={BestiaryError: _refusal, ClientDisconnect: disconnected},
        lifespan=server.lifespan,
    )


def launch(
    offerings: Offerings,
    *,
    host: str = "127.0.0.1",
    port: int = 7860,
    auth: Credentials | None = None,
    token: Token | None = None,
    max_upload_mib: int = MAX_UPLOAD_MIB,
    ready: Callable[[str], None] = print,
) -> None:
    """Serve the page until Ctrl-C, and call `ready` with its address once the port is open.

    Raises BestiaryError when the base is missing, when the port is taken, or when other machines could reach the page
    without a password.
    """
    import uvicorn

    if not is_loopback(host) and auth is None:
        raise BestiaryError(
            f"Other machines can reach the page at {host}, so it needs a password. Put user:password into the "
            "environment variable BESTIARY_AUTH or into a file for --auth."
        )
    native_side(offerings.bases[0])  # checks that the base can be read
    with _listen(host, port) as listening:
        app = create_app(offerings, auth=auth, token=token, max_upload_mib=max_upload_mib)
        config = serving(app)
        shown = f"[{host}]" if ":" in host else host
        ready(f"http://{shown}:{listening.getsockname()[1]}")
        with contextlib.suppress(KeyboardInterrupt):
            uvicorn.Server(config).run(sockets=[listening])


def serving(app: Starlette) -> Config:
    """How uvicorn serves the page: with limits on connections and on lines in the log.

    A proxy's word for the address of a client counts only if the environment variable FORWARDED_ALLOW_IPS says so.
    Otherwise, anybody on this machine could pretend to be many.
    """
    import uvicorn

    from bestiary.app.connections import TALKATIVE_LOGGERS, GuardedProtocol, NoRepetition, possible_connections

    GuardedProtocol.max_connections = possible_connections()
    config = uvicorn.Config(
        app,
        http=GuardedProtocol,
        log_level="warning",
        timeout_graceful_shutdown=1,
        server_header=False,
        proxy_headers="FORWARDED_ALLOW_IPS" in os.environ,
    )
    for name in TALKATIVE_LOGGERS:
        logging.getLogger(name).addFilter(NoRepetition())
    return config


def _listen(host: str, port: int) -> socket.socket:
    listening = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
        listening.listen()  # before the browser opens, so that it waits instead of failing
    except OSError as error:
        listening.close()
        raise BestiaryError(
            f"The page cannot listen on {host}:{port} ({error.strerror}). Choose another host or port."
        ) from None
    return listening


async def _json_lines(drawing: Drawing) -> AsyncIterator[str]:
    async for event in drawing.events():
        yield to_json(event) + "\n"


async def _refusal(_: Request, error: Exception) -> Response:
    assert isinstance(error, BestiaryError)
    status = status_of(error)
    return JSONResponse(asdict(Failed.by(error)), status, retry_headers(status))
