"""Who can reach the page and the programs' APIs.

Either this machine only, or everyone with the user name and password; for programs, also everyone with the token.
"""

from __future__ import annotations

import asyncio
import base64
import ipaddress
import math
import secrets
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import Response

from bestiary.app.errors import RefusedError
from bestiary.app.limits import Guesses, address_of
from bestiary.app.program_errors import is_for_programs, refusal
from bestiary.app.secret_files import read_secret
from bestiary.app.tokens import Token
from bestiary.errors import BestiaryError

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

Credentials = tuple[str, str]  # user name, password

NAMES_OF_THIS_MACHINE = ("127.0.0.1", "localhost", "[::1]")
WRONG_PASSWORD_SECONDS = 1.0  # delay before the answer; `Guesses` slows down clients that do not wait for it
JSON = "application/json"
DEFAULT_PORTS = {"http": 80, "https": 443}
SECURITY_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


class AccessControl:
    """ASGI middleware that refuses requests from elsewhere and adds the security headers to every response.

    Without credentials, only requests to a name of this machine are accepted. With a token, the programs' APIs need
    it; the credentials, if there are any, open them too.
    """

    def __init__(self, app: ASGIApp, credentials: Credentials | None, token: Token | None = None) -> None:
        self.app = app
        self.expected = credentials and base64.b64encode(":".join(credentials).encode())
        self.token = token
        self.guesses = Guesses()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                extra = [(key.lower().encode(), value.encode()) for key, value in SECURITY_HEADERS.items()]
                message["headers"] = [*message.get("headers", []), *extra]
            await send(message)

        headers = Headers(scope=scope)
        refused = _refuse_other_site(scope["path"], headers)
        if refused is None:
            token = self.token if is_for_programs(scope["path"]) else None
            if self.expected or token:
                refused = await self._check_secret(scope, headers, token)
            else:
                refused = _refuse_other_host(scope["path"], headers)
        await (refused or self.app)(scope, receive, send_with_headers)

    async def _check_secret(self, scope: Scope, headers: Headers, token: Token | None) -> Response | None:
        """Check the password, or the `token` where there is one. Returns the refusal of a wrong or missing one."""
        kind, _, given = headers.get("authorization", "").partition(" ")
        if not given:
            return _challenge(scope["path"], token)
        address = address_of(scope)
        if seconds := math.ceil(self.guesses.seconds_to_wait(address)):
            sentence = f"Your address sent wrong passwords. Try again in {seconds} s."
            return refusal(scope["path"], sentence, 429, headers={"Retry-After": str(seconds)})
        if self._is_right(kind.lower(), given.strip(), token):
            return None
        await asyncio.sleep(min(self.guesses.failed(address), WRONG_PASSWORD_SECONDS))
        return _challenge(scope["path"], token)

    def _is_right(self, kind: str, given: str, token: Token | None) -> bool:
        if kind == "bearer":
            return token is not None and token.matches(given)
        return kind == "basic" and bool(self.expected) and secrets.compare_digest(given.encode(), self.expected or b"")


def _challenge(path: str, token: Token | None) -> Response:
    if token:
        challenge, sentence = "Bearer", "Send the server's token as the API key, in the header Authorization: Bearer."
    else:
        challenge, sentence = 'Basic realm="Bestiary", charset="UTF-8"', "Sign in with the user name and the password."
    return refusal(path, sentence, 401, headers={"WWW-Authenticate": challenge})


def _refuse_other_site(path: str, headers: Headers) -> Response | None:
    """Refuse API requests by other sites that are open in the same browser. They may link to the page itself.

    Browsers send Sec-Fetch-Site only over https and to this machine, and Origin with every order and upload.
    """
    if not (path.startswith("/api/") or is_for_programs(path)):
        return None
    host, origins = headers.get("host", ""), headers.getlist("origin")
    if all(site in ("none", "same-origin") for site in headers.getlist("sec-fetch-site")) and all(
        is_same_site(origin, host) for origin in origins
    ):
        return None
    return refusal(path, "Another site sent this request. Open the page at its own address.", 403)


def is_same_site(origin: str, host: str) -> bool:
    """Whether a request's Origin is the host that it was sent to. A proxy may have taken the https off.

    >>> is_same_site("http://studio.example:7860", "studio.example:7860"), is_same_site("null", "studio.example")
    (True, False)
    >>> is_same_site("https://Studio.example", "studio.example:443"), is_same_site("http://a.example", "b.example")
    (True, False)
    """
    try:
        theirs, ours = urlsplit(origin), urlsplit(f"//{host}")
        default = DEFAULT_PORTS[theirs.scheme]
        same_port = (theirs.port or default) == (ours.port or default)
    except (KeyError, ValueError):
        return False
    return bool(theirs.hostname) and theirs.hostname == ours.hostname and same_port


def check_json(headers: Headers) -> None:
    """Raise BestiaryError when a body is not declared as JSON.

    Another site's form can post any text, but not as application/json. A program may leave the type out, and the page
    itself, known by its Origin, may send any.
    """
    kind = headers.get("content-type", JSON).partition(";")[0].strip().lower()
    origin = headers.get("origin")
    if kind != JSON and not (origin and is_same_site(origin, headers.get("host", ""))):
        raise RefusedError("onlyJson", "Send the order as application/json.", status=415)


def _refuse_other_host(path: str, headers: Headers) -> Response | None:
    """Refuse other host names: an attacker's DNS can resolve a name to this machine (DNS rebinding)."""
    host = headers.get("host", "").lower()
    name = host if host.endswith("]") else host.rsplit(":", 1)[0]
    if name in NAMES_OF_THIS_MACHINE:
        return None
    return refusal(path, "The page does not answer to this host name. Open it at localhost.", 403)


def read_credentials(file: Path | None = None) -> Credentials | None:
    """Return the user name and the password from `file`, or else from the environment variable BESTIARY_AUTH, if set.

    Raises BestiaryError when the text is not user:password, or when other users can read the file.
    """
    source, text = read_secret(file, "BESTIARY_AUTH", "user:password")
    if file is None and not text:
        return None
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
