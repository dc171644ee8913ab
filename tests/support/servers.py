"""A team's servers, configured by deploy/compose.yaml but started without containers."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
SECRETS = {
    "POSTGRES_PASSWORD": "aPasswordOfTheDatabase",
    "AWS_ACCESS_KEY_ID": "team",
    "AWS_SECRET_ACCESS_KEY": "aSecretOfTheStore",
    "MLFLOW_ADMIN_PASSWORD": "aPasswordOfTheAdmin",
    "MLFLOW_SECRET_KEY": "aKeyAgainstForgery",
}


@dataclass(frozen=True)
class Servers:
    """The addresses of the servers: URLs of MLflow and of the object store, `host:port` of the database."""

    mlflow: str
    store: str
    database: str


def postgres_folder() -> Path | None:
    """The folder of PostgreSQL's programs; None when it is not installed. Debian does not put it on the PATH."""
    if found := shutil.which("initdb"):
        return Path(found).resolve().parent  # initdb may be a link, without the other programs beside it
    newest = max(Path("/usr/lib/postgresql").glob("*/bin/initdb"), default=None)
    return newest.parent if newest else None


def compose() -> dict[str, Any]:  # foreign YAML
    """The content of deploy/compose.yaml."""
    read: dict[str, Any] = yaml.safe_load((ROOT / "deploy" / "compose.yaml").read_text())
    return read


def filled_in(text: str, values: Mapping[str, str]) -> str:
    """The text with `${NAME}`, `${NAME:?message}` and `${NAME:-default}` replaced as Compose does.

    Raises KeyError when a name without a default has no value.
    """

    def value(match: re.Match[str]) -> str:
        name, default = match[1], match[2]
        return values.get(name, default) if default is not None else values[name]

    return re.sub(r"\$\{(\w+)(?::-([^}]*)|:\?[^}]*)?\}", value, text)


def free_port() -> int:
    """A TCP port of this machine that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextlib.contextmanager
def team_servers(folder: Path) -> Iterator[Servers]:
    """Start PostgreSQL, an S3-compatible store and MLflow with accounts, all configured by deploy/compose.yaml."""
    import boto3
    from moto.server import ThreadedMotoServer

    with postgres(SECRETS["POSTGRES_PASSWORD"]) as database:
        moto = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
        moto.start()
        store = f"127.0.0.1:{moto.get_host_and_port()[1]}"
        keys = {name.lower(): SECRETS[name] for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")}
        client = boto3.client("s3", endpoint_url=f"http://{store}", region_name="us-east-1", **keys)
        for bucket in ("mlflow", "dvc"):
            client.create_bucket(Bucket=bucket)
        try:
            with mlflow_server(folder, database, store) as address:
                yield Servers(address, f"http://{store}", database)
        finally:
            moto.stop()


@contextlib.contextmanager
def mlflow_server(folder: Path, database: str, store: str) -> Iterator[str]:
    """Start MLflow's server with the command, environment and permissions of deploy/compose.yaml. Yields its URL."""
    port = free_port()
    service, config = compose()["services"]["mlflow"], compose()["configs"]["basic_auth"]["content"]

    def local(text: str) -> str:
        """`text` with the secrets and with the addresses of the local servers."""
        return filled_in(text, SECRETS).replace("postgres:5432", database).replace("store:7070", store)

    accounts = folder / "basic_auth.ini"
    accounts.write_text(local(config))
    environment = {name: local(value) for name, value in service["environment"].items()}
    environment["MLFLOW_AUTH_CONFIG_PATH"] = str(accounts)
    local_address = {"--host=0.0.0.0": "--host=127.0.0.1", "--port=5000": f"--port={port}"}
    program, *arguments = (local_address.get(word, local(word)) for word in service["command"])
    assert program == "mlflow"
    log = folder / "mlflow.log"
    with log.open("w") as output:
        server = subprocess.Popen(
            [sys.executable, "-m", "mlflow", *arguments, "--workers=1"],
            cwd=folder,
            env=os.environ | environment,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    address = f"http://127.0.0.1:{port}"
    try:
        wait_for(lambda: urllib.request.urlopen(f"{address}/health", timeout=5).status == 200, server, log)
        yield address
    finally:
        server.terminate()
        server.wait()


@contextlib.contextmanager
def postgres(password: str) -> Iterator[str]:
    """Start a PostgreSQL server with the two databases that deploy/compose.yaml creates. Yields `host:port`."""
    import psycopg2

    programs = postgres_folder()
    assert programs is not None
    user = "postgres" if os.getuid() == 0 else None  # PostgreSQL refuses to run as root
    home = Path(tempfile.mkdtemp(prefix="bestiary-"))  # other users cannot enter pytest's folders
    port = free_port()
    try:
        home.chmod(0o755)
        (home / "password").write_text(password)
        data = home / "data"
        data.mkdir()
        if user:
            shutil.chown(data, user)
        options = [f"--pwfile={home / 'password'}", "--auth=scram-sha-256", "--username=mlflow", "--no-sync"]
        subprocess.run(
            [programs / "initdb", data, *options], user=user, cwd=data, check=True, stdout=subprocess.DEVNULL
        )
        settings = {"port": port, "listen_addresses": "127.0.0.1", "unix_socket_directories": data, "fsync": "off"}
        options = [word for name, value in settings.items() for word in ("-c", f"{name}={value}")]
        with (home / "log").open("w") as log:
            server = subprocess.Popen(
                [programs / "postgres", "-D", data, *options], user=user, cwd=data, stdout=log, stderr=log
            )
        try:
            connect = {"host": "127.0.0.1", "port": port, "user": "mlflow", "password": password, "dbname": "postgres"}
            wait_for(lambda: psycopg2.connect(**connect).close() is None, server, home / "log")
            connection = psycopg2.connect(**connect)
            connection.autocommit = True
            with connection.cursor() as cursor:
                cursor.execute("CREATE DATABASE mlflow")
                cursor.execute(compose()["configs"]["accounts"]["content"])
            connection.close()
            yield f"127.0.0.1:{port}"
        finally:
            server.terminate()
            server.wait()
    finally:
        shutil.rmtree(home, ignore_errors=True)


def wait_for(is_ready: Callable[[], bool], server: subprocess.Popen[bytes], log: Path, seconds: float = 240) -> None:
    """Wait until `is_ready` returns True; an exception counts as False.

    Fails with the end of the log when the server has ended or the time is over.
    """
    end = time.monotonic() + seconds
    while True:
        with contextlib.suppress(Exception):
            if is_ready():
                return
        assert server.poll() is None, log.read_text()[-3000:]
        assert time.monotonic() < end, log.read_text()[-3000:]
        time.sleep(0.2)
