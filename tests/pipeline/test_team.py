"""A team on one server: what one member made, another member gets with nothing but the server's address."""

import json
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from support.project import Project
from support.servers import SECRETS, Servers, compose, filled_in, postgres_folder, team_servers

ADMIN = ("admin", SECRETS["MLFLOW_ADMIN_PASSWORD"])
BOBS_PASSWORD = "bobsOwnLongPassword"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        postgres_folder() is None, reason="PostgreSQL is not installed (Debian: apt install postgresql)"
    ),
]


@dataclass
class Team:
    servers: Servers
    ada: Project  # ran the pipeline alone, then moved to the server
    bob: Project  # cloned Ada's project afterwards
    lineage: dict[str, Any]  # of Ada's version before she moved
    migration: str  # what `bestiary tracking migrate` printed


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    with team_servers(tmp_path_factory.mktemp("servers")) as servers:
        made = httpx.post(
            f"{servers.mlflow}/api/2.0/mlflow/users/create",
            json={"username": "bob", "password": BOBS_PASSWORD},
            auth=ADMIN,
            timeout=60,
        )
        assert made.status_code == 200, made.text
        yield servers


@pytest.fixture(scope="module")
def team(servers: Servers, finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Team:
    def environment(user: str, password: str) -> dict[str, str]:
        keys = {name: SECRETS[name] for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")}
        names = {f"GIT_{who}_NAME": user for who in ("AUTHOR", "COMMITTER")}
        return {
            "MLFLOW_TRACKING_URI": servers.mlflow,
            "MLFLOW_TRACKING_USERNAME": user,
            "MLFLOW_TRACKING_PASSWORD": password,
            **keys,
            **names,
            "EMAIL": f"{user}@example.org",
        }

    folder = tmp_path_factory.mktemp("team")
    ada = Project(Path(shutil.copytree(finished, folder / "ada")), environment(*ADMIN))
    bob = Project(folder / "bob", environment("bob", BOBS_PASSWORD))
    before = json.loads(Project(ada.folder).bestiary("lineage", "models:/bestiary/1", "--json"))
    migration = ada.bestiary("tracking", "migrate")
    ada.bestiary("promote", "1", "--because", "six steps do not earn it")
    ada.run("sh", "-c", "rm data.dvc && git rm -rq --cached --ignore-unmatch samples && rm -r samples")
    dvc(ada, "add --quiet data")
    dvc(ada, "remote add --default team s3://dvc/bestiary")
    dvc(ada, f"remote modify team endpointurl {servers.store}")
    ada.run("git", "add", "--all")
    ada.run("git", "commit", "--quiet", "--message", "The team's store")
    dvc(ada, "push --quiet")
    ada.run("git", "clone", "--quiet", str(ada.folder), str(bob.folder))
    return Team(servers, ada, bob, before, migration)


def dvc(project: Project, words: str) -> str:
    return project.run(sys.executable, "-m", "dvc", *shlex.split(words))


def test_without_an_account_nobody_reads_or_writes(servers: Servers) -> None:
    with httpx.Client(base_url=f"{servers.mlflow}/api/2.0", timeout=60) as anonymous:
        for method, path in (
            ("POST", "mlflow/experiments/create"),
            ("POST", "mlflow/runs/create"),
            ("POST", "mlflow/registered-models/create"),
            ("POST", "mlflow/users/create"),
            ("PUT", "mlflow-artifacts/artifacts/1/note.txt"),
            ("GET", "mlflow/experiments/search?max_results=1"),
        ):
            assert anonymous.request(method, path, content=b"{}").status_code == 401, path
        search = "mlflow/experiments/search?max_results=1"
        assert anonymous.get(search, auth=("admin", "password1234")).status_code == 401  # MLflow's default password
        assert anonymous.get(search, auth=ADMIN).status_code == 200


def test_a_local_database_moves_to_the_server_without_losing_a_run(team: Team) -> None:
    count = int(re.findall(r"^(\d+) runs copied\.$", team.migration, re.MULTILINE)[0])
    assert count >= 9  # eight stages and their pipeline
    assert "models:/bestiary/1 is version 1 on the server." in team.migration
    assert f"0 runs copied, {count} were there already." in team.ada.bestiary("tracking", "migrate")
    after = json.loads(team.ada.bestiary("lineage", "models:/bestiary/1", "--json"))
    for walk in (team.lineage, after):
        walk["aliases"] = []  # Ada has promoted the version since
        for step in walk["steps"]:
            del step["run_id"]
    assert after == team.lineage


def test_the_same_content_is_the_same_version_on_the_server(team: Team) -> None:
    team.ada.run(sys.executable, "stages/register.py")
    assert team.ada.report("register")["version"] == 1
    assert team.ada.report("register")["aliases"] == ["champion"]


def test_a_second_clone_has_data_adapter_lineage_and_pictures(team: Team) -> None:
    ada, bob = team.ada, team.bob
    assert not (bob.folder / "data").exists()
    assert not (bob.folder / "mlflow.db").exists()

    dvc(bob, "pull --quiet models/adapter data.dvc")  # DVC 3.67 skips a folder that is named after a file
    for path in ("data", "models/adapter"):
        files = [file.relative_to(ada.folder) for file in (ada.folder / path).rglob("*") if file.is_file()]
        assert files
        assert all((bob.folder / file).read_bytes() == (ada.folder / file).read_bytes() for file in files)
    lineage = json.loads(bob.bestiary("lineage", "--json"))
    stages = {step["stage"] for step in lineage["steps"]}
    assert {"register", "train", "encode", "split", "clean", "download"} <= stages
    bob.bestiary("pull", "models:/bestiary@champion", "--out", "mine")
    shutil.rmtree(bob.folder / "models" / "adapter")
    printed = bob.bestiary("generate", "tiger", "--steps", "2")
    assert (bob.folder / re.findall(r"^pictures/.*\.png$", printed, re.MULTILINE)[0]).is_file()
    assert not (bob.folder / "mlflow.db").exists()


def test_a_backup_restores_every_run_version_and_account(team: Team, tmp_path: Path) -> None:
    import psycopg2

    programs = postgres_folder()
    assert programs is not None
    host, port = team.servers.database.split(":")
    login = {"host": host, "port": port, "user": "mlflow", "password": SECRETS["POSTGRES_PASSWORD"]}
    here = Project(tmp_path, {"PGHOST": host, "PGPORT": port, "PGPASSWORD": login["password"], "PGUSER": "mlflow"})

    def content(database: str, query: str) -> list[Any]:
        connection = psycopg2.connect(**login, dbname=database)
        with connection.cursor() as cursor:
            cursor.execute(query)
            rows: list[Any] = cursor.fetchall()
        connection.close()
        return rows

    for database, least, query in (
        ("mlflow", 9, "SELECT run_uuid, status FROM runs ORDER BY run_uuid"),
        ("mlflow", 1, "SELECT name, version, storage_location FROM model_versions ORDER BY version"),
        ("accounts", 2, "SELECT username, password_hash FROM users ORDER BY username"),
    ):
        before = content(database, query)
        assert len(before) >= least
        here.run(f"{programs}/pg_dump", "--format=custom", f"--file={tmp_path / database}.dump", database)
        here.run(f"{programs}/dropdb", "--if-exists", "restored")
        here.run(f"{programs}/createdb", "restored")
        options = ("--dbname=restored", "--clean", "--if-exists")
        here.run(f"{programs}/pg_restore", *options, f"{tmp_path / database}.dump")
        assert content("restored", query) == before


# ---- deploy/compose.yaml ----


def test_every_image_is_pinned_and_every_server_has_a_health_check() -> None:
    for name, service in compose()["services"].items():
        assert re.search(r":v?\d+\.\d+", service["image"]) if "image" in service else "build" in service, name
        assert "healthcheck" in service or name == "buckets", name
    dockerfile = (Path(__file__).parents[2] / "deploy" / "Dockerfile").read_text()
    assert re.search(r"^FROM \S+:\d+\.\d+\.\d+", dockerfile, re.MULTILINE)
    pinned = (Path(__file__).parents[2] / "constraints.txt").read_text().lower()
    installed = re.findall(r"--constraint \S+ (.*)", dockerfile)[0].split()
    assert [package for package in installed if f"\n{package.lower()}==" not in pinned] == []


def test_no_command_contains_a_password() -> None:
    for name, service in compose()["services"].items():
        command = " ".join(service.get("command", []))  # every user of the machine sees it in the process list
        assert not [secret for secret in SECRETS if secret in command], name


@pytest.mark.parametrize("name", list(SECRETS))
def test_there_is_no_default_password(name: str) -> None:
    text = (Path(__file__).parents[2] / "deploy" / "compose.yaml").read_text()
    assert f"${{{name}:?" in text
    with pytest.raises(KeyError, match=name):
        filled_in(text, {other: value for other, value in SECRETS.items() if other != name})
    example = (Path(__file__).parents[2] / "deploy" / "env.example").read_text()
    assert f"\n{name}=\n" in example
