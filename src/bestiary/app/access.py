"""Who can reach the page: this machine alone, or everyone who knows the user name and the password."""

from __future__ import annotations

import asyncio
import base64
import ipaddress
import os
import secrets
from pathlib import Path
from typing import TYPE_CHECKING

from starlette.responses import PlainTextResponse, Response

from bestiary.errors import BestiaryError

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

Credentials = tuple[str, str]  # user name, password

NAMES_OF_THIS_MACHINE = ("127.0.0.1", "localhost", "[::1]")
WRONG_PASSWORD_SECONDS = 1.0  # delay before the answer, which slows guessing down
SECURITY_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


class AccessControl:
    """ASGI middleware that refuses requests from elsewhere and adds the security headers to every response.

    Without credentials, only requests to a name of this machine are accepted.
    """

    def __init__(self, app: ASGIApp, credentials: Credentials | None) -> None:
        self.app = app
        self.expected = credentials and base64.b64encode(":".join(credentials).encode())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                extra = [(key.lower().encode(), value.encode()) for key, value in SECURITY_HEADERS.items()]
                message["headers"] = [*message.get("headers", []), *extra]
            await send(message)

        headers = dict(scope["headers"])
        refusal = _refuse_other_site(scope["path"], headers)
        refusal = refusal or (await self._check_password(headers) if self.expected else _refuse_other_host(headers))
        await (refusal or self.app)(scope, receive, send_with_headers)

    async def _check_password(self, headers: dict[bytes, bytes]) -> Response | None:
        kind, _, given = headers.get(b"authorization", b"").partition(b" ")
        if self.expected and kind.lower() == b"basic" and secrets.compare_digest(given.strip(), self.expected):
            return None
        if given:
            await asyncio.sleep(WRONG_PASSWORD_SECONDS)
        challenge = {"WWW-Authenticate": 'Basic realm="Bestiary", charset="UTF-8"'}
        return PlainTextResponse("Sign in with the user name and the password.", 401, challenge)


def _refuse_other_site(path: str, headers: dict[bytes, bytes]) -> Response | None:
    """Refuse API requests by other sites that are open in the same browser. They may link to the page itself."""
    if path.startswith("/api/") and headers.get(b"sec-fetch-site", b"none") not in (b"none", b"same-origin"):
        return PlainTextResponse("Another site sent this request. Open the page at its own address.", 403)
    return None


def _refuse_other_host(headers: dict[bytes, bytes]) -> Response | None:
    """Refuse other host names: an attacker's DNS can resolve a name to this machine (DNS rebinding)."""
    host = headers.get(b"host", b"").decode("latin-1")
    name = host if host.endswith("]") else host.rsplit(":", 1)[0]
    if name in NAMES_OF_THIS_MACHINE:
        return None
    return PlainTextResponse("The page does not answer to this host name. Open it at localhost.", 403)


def read_credentials(file: Path | None = None) -> Credentials | None:
    """Return the user name and the password from `file`, or else from the environment variable BESTIARY_AUTH, if set.

    They are not command-line arguments, because any user can see those in the process list.

    Raises BestiaryError when the text is not user:password, or when other users can read the file.
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
                raise BestiaryError(f"Other users can read {file}. Run `chmod 600 {file}`, then try again.")
        except (OSError, UnicodeDecodeError):
            raise BestiaryError(f"{file} cannot be read. Name a UTF-8 text file that holds user:password.") from None
    user, colon, password = text.partition(":")
    if not (user and colon and password):
        raise BestiaryError(f"{source} is not of the form user:password. Write both, with a colon between them.")
    return user, password


def is_loopback(host: str) -> bool:
    """Return whether only this machine can reach the host's address.

    >>> is_loopback("127.0.0.1"), is_loopback("localhost"), is_loopback("0.0.0.0")
    (True, True, False)
    """
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
