"""Refuse and log every look-up of another machine's name, in each Python process that finds this file on its path."""

import os
import socket
import sys
from pathlib import Path
from typing import Any

OWN = {"", "localhost", "localhost.localdomain", socket.gethostname().lower(), "::1", "0.0.0.0", "::"}


def watch(event: str, arguments: tuple[Any, ...]) -> None:
    """An audit hook (PEP 578), which no library can go around."""
    if event not in ("socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyname_ex"):
        return
    name = arguments[0].decode("ascii", "replace") if isinstance(arguments[0], bytes) else str(arguments[0] or "")
    if name.lower().strip("[]") in OWN or name.startswith("127."):
        return
    with Path(os.environ["LOOKUPS_LOG"]).open("a", encoding="utf-8") as log:
        log.write(f"{name} by {' '.join(sys.orig_argv[1:])[:80]}\n")
    raise socket.gaierror(socket.EAI_NONAME, "this name is not looked up here")


if "LOOKUPS_LOG" in os.environ:
    sys.addaudithook(watch)
