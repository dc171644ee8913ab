"""Addresses of MLflow stores and of their files: where they point to, and how to print them without a password."""

from __future__ import annotations

import os
import re
from pathlib import Path
from urllib.parse import parse_qsl, quote, unquote, urlsplit
from urllib.request import url2pathname

SQLITE = ("sqlite:///", "sqlite+pysqlite:///")
# Libraries read further secrets from these variables, and some put them into their error messages.
SECRET_VARIABLES = ("MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")
HIDDEN = "***"


def absolute(uri: str, root: Path) -> str:
    """The address of a local store with its path read from the folder `root`; any other address as it is.

    >>> absolute("sqlite:///mlflow.db", Path("/project")), absolute("./mlruns", Path("/project"))
    ('sqlite:////project/mlflow.db', '/project/mlruns')
    >>> absolute("https://mlflow.example.org", Path("/project"))
    'https://mlflow.example.org'
    """
    if uri.startswith(SQLITE):
        text, mark, options = uri.partition(":///")[2].partition("?")
        path = root / text
        if "%" in text and not path.parent.is_dir():  # SQLAlchemy reads %20 as a space
            path = root / unquote(text)
        return sqlite_uri(path) + mark + options
    local = None if uri.startswith("databricks") else local_path(uri)
    return location_of(root / local) if local else uri


def is_valid(uri: str) -> bool:
    """Whether the address of a server means the same to every library.

    A library that splits it elsewhere could take a part of the password for the host, and print it.

    >>> is_valid("https://ada:secret@mlflow.example.org"), is_valid("https://ada:se/cret@mlflow.example.org")
    (True, False)
    """
    try:
        parts = urlsplit(uri)
        complete = bool(parts.scheme and parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        return False
    after = uri.partition("://")[2]
    beyond_host = re.split(r"[/?#\\]", after, maxsplit=1)[1:]
    return complete and after.count("@") < 2 and "@" not in "".join(beyond_host) and not re.search(r"\s", uri)


def sqlite_uri(path: Path) -> str:
    """The address of an SQLite database, readable by MLflow whatever characters its path contains.

    >>> sqlite_uri(Path("/project/mlflow.db")), sqlite_uri(Path("/50%20off/mlflow.db"))
    ('sqlite:////project/mlflow.db', 'sqlite+pysqlite:////50%2520off/mlflow.db')
    """
    quoted = quote(str(path))
    if unquote(str(path)) == str(path) and not set("?#") & set(str(path)):
        return f"sqlite:///{path}"
    # For "sqlite:" MLflow would make the folder that the quoted path names; SQLAlchemy takes both for the same.
    return f"sqlite+pysqlite:///{quoted}"


def sqlite_path(uri: str) -> Path | None:
    """The file of an SQLite tracking URI; None for any other store.

    >>> sqlite_path("sqlite:////project/mlflow.db"), sqlite_path("sqlite+pysqlite:////50%2520off/mlflow.db")
    (PosixPath('/project/mlflow.db'), PosixPath('/50%20off/mlflow.db'))
    >>> sqlite_path("https://mlflow.example.org") is None
    True
    """
    return Path(unquote(uri.partition(":///")[2].partition("?")[0])) if uri.startswith(SQLITE) else None


def location_of(folder: Path) -> str:
    """How MLflow stores the location of a folder: its path, or a file: address if the path has odd characters.

    >>> location_of(Path("/project/mlruns")), location_of(Path("/50%20off/mlruns"))
    ('/project/mlruns', 'file:///50%2520off/mlruns')
    """
    return str(folder) if quote(str(folder)) == str(folder) else folder.as_uri()


def local_path(location: str) -> Path | None:
    """The path of a location that MLflow stored; None when it is not on this disk.

    >>> local_path("/project/mlruns"), local_path("file:///50%2520off/mlruns")
    (PosixPath('/project/mlruns'), PosixPath('/50%20off/mlruns'))
    >>> local_path("s3://bucket/mlruns") is None
    True
    """
    if location.startswith("file:"):
        return Path(url2pathname(re.sub(r"^file:(//[^/]*(?=/))?", "", location)))
    return None if re.match(r"[A-Za-z][\w+.-]*:", location) else Path(url2pathname(location))


def shown_address(uri: str) -> str:
    """An address for people: without user, password and options. An SQLite database is shown by its path.

    >>> shown_address("https://ada:se/cr@t@mlflow.example.org/path?token=1"), shown_address("ada:secret@mlflow:5000")
    ('https://mlflow.example.org/path', 'mlflow:5000')
    """
    if path := sqlite_path(uri):
        return str(path)
    scheme = re.match(r"\s*[A-Za-z][\w+.-]*:/*(?=\S)", uri) if "://" in uri or "@" not in uri else None
    rest = uri[scheme.end() :] if scheme else uri
    rest = re.split(r"[?#]", rest.rpartition("@")[2])[0].strip()
    return f"{scheme[0].strip() if scheme else ''}{rest}"


def without_secrets(text: str, *uris: str) -> str:
    """`text` with every user and password hidden that the addresses or the environment contain.

    >>> without_secrets("no route to https://ada:s3cret@host", "https://ada:s3cret@host")
    'no route to https://***@host'
    """
    secrets = {os.environ.get(variable, "") for variable in SECRET_VARIABLES}
    for uri in uris:
        secrets |= _secrets_of(uri)
    for secret in sorted(secrets - {"", HIDDEN}, key=len, reverse=True):
        text = re.sub(re.escape(secret), HIDDEN, text, flags=re.IGNORECASE)
    return re.sub(r"//[^/@\s]*@", f"//{HIDDEN}@", text)


def _secrets_of(uri: str) -> set[str]:
    """The user with the password, the password, and its parts, as written and as decoded."""
    if uri.startswith(SQLITE):
        return set()
    user = re.sub(r"^\s*[A-Za-z][\w+.-]*:/+", "", uri).rpartition("@")[0]
    values = [user.partition(":")[2] or user, *(value for _, value in parse_qsl(uri.partition("?")[2]))]
    # A library that splits the address elsewhere prints a part of one of them.
    found = {secret for value in values for secret in (value, *re.split(r"\W+", value)) if len(secret) > 2} | {user}
    return found | {unquote(secret) for secret in found} | {quote(secret, safe="") for secret in found}
