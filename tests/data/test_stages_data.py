"""The data stages as DVC runs them: scripts in a project's folder."""

import contextlib
import csv
import hashlib
import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from PIL import Image
from support.planted_faults import NEAR, copy_sample, draw_off_topic, plant, recall
from support.sciencedb_server import ScienceDB, serving

ROOT = Path(__file__).parents[2]
FAULTS = ["500", "429 after", "html", "truncate", "wrong", "hang up", "wrong range", "403"]

pytestmark = pytest.mark.slow


class Project:
    """A project folder with the repository's stages, its own parameters and its own download cache.

    MLflow records its runs if it starts with a `database`.
    """

    def __init__(self, folder: Path, change: Callable[[dict[str, Any]], None], database: Path | None = None) -> None:
        self.folder = folder
        self.tracking = "on" if database else "off"
        (folder / "data").mkdir(parents=True)
        (folder / "settings").mkdir()
        for name in ("stages", "src", "models", "examples"):
            (folder / name).symlink_to(ROOT / name)
        for name in ("dvc.yaml", "overrides.csv", "subjects.yaml"):
            (folder / name).write_bytes((ROOT / name).read_bytes())
        params = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
        change(params)
        (folder / "params.yaml").write_text(yaml.safe_dump(params), encoding="utf-8")
        (folder / ".dvc").mkdir()
        (folder / ".dvc" / "config").write_text("[core]\nno_scm = true\nanalytics = false\n", encoding="utf-8")
        if database:
            shutil.copy2(database, folder / "mlflow.db")
        # Python runs this file first: retries happen as usual, with shorter pauses.
        pauses = "import bestiary.data.sciencedb_client\nbestiary.data.sciencedb_client.FIRST_PAUSE_SECONDS = 0.001\n"
        (folder / "settings" / "sitecustomize.py").write_text(pauses, encoding="utf-8")

    def start(self, *command: str, url: str = "http://127.0.0.1:9") -> subprocess.Popen[str]:
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("DVC_", "MLFLOW_"))},
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": f"{self.folder / 'settings'}{os.pathsep}{ROOT / 'src'}",
            "MLFLOW_TRACKING_URI": f"sqlite:///{self.folder / 'mlflow.db'}",
            "BESTIARY_CACHE": str(self.folder / "cache"),
            "SCIENCEDB_API_URL": url,
            "SCIENCEDB_DOWNLOAD_URL": url,
            "BESTIARY_TRACKING": self.tracking,
        }
        streams: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
        command = (sys.executable, *command)
        return subprocess.Popen(command, cwd=self.folder, env=environment, start_new_session=True, **streams)

    def run(self, *command: str, url: str = "http://127.0.0.1:9") -> tuple[int, str]:
        """Return the exit status and the text of stderr."""
        process = self.start(*command, url=url)
        _, errors = process.communicate()
        return process.returncode, errors

    def report(self, name: str) -> dict[str, Any]:
        content: dict[str, Any] = json.loads((self.folder / "reports" / f"{name}.json").read_text(encoding="utf-8"))
        return content

    def content(self, *folders: str) -> dict[str, str]:
        """Return the hashes of all files below `folders`."""
        files = [path for name in folders for path in (self.folder / name).rglob("*") if path.is_file()]
        digests = {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
        return {path.relative_to(self.folder).as_posix(): digest for path, digest in digests.items()}


@pytest.fixture
def project(tmp_path: Path, empty_database: Path) -> Project:
    """A project with two classes of ten pictures, which cleans without the judge."""
    project = Project(tmp_path / "project", lambda params: params["clean"].update(off_topic="off"), empty_database)
    random = np.random.default_rng(0)
    for name in ("cat", "ladybugs"):
        (project.folder / "data" / name).mkdir(parents=True)
        for number in range(10):
            coarse = Image.fromarray(random.integers(0, 256, (8, 8, 3), dtype=np.uint8))
            path = project.folder / "data" / name / f"{number}.png"
            coarse.resize((96, 96), Image.Resampling.NEAREST).save(path)
    return project


def test_download_clean_and_split_make_two_tables_of_a_folder(project: Project) -> None:
    (project.folder / "data" / "cat" / "broken.jpg").write_bytes(b"<html></html>")
    (project.folder / "overrides.csv").write_text("path,decision\ncat/99.png,drop\n", encoding="utf-8")
    for name in ("download", "clean", "split"):
        status, errors = project.run(f"stages/{name}.py")
        assert status == 0, errors
        assert ("overrides.csv names images that do not exist: cat/99.png" in errors) == (name == "clean")
    download = project.report("download")
    assert download["images"] == 21
    assert download["images_per_second"] > 0
    clean = project.report("clean")
    assert (clean["images_in"], clean["images_kept"], clean["findings"]) == (21, 20, {"unreadable": 1})
    assert clean["images_per_second"] > 0
    assert 20 < clean["peak_memory_mib"] < 2048
    split = project.report("split")
    assert split["leaked_groups"] == 0
    train, val = (pd.read_csv(project.folder / "build" / "split" / f"{side}.csv") for side in ("train", "val"))
    assert len(train) + len(val) == 20
    assert set(val["animal"]) == {"cat", "ladybug"}
    assert (project.folder / "reports" / "clean" / "unreadable.png").exists()
    with contextlib.closing(sqlite3.connect(project.folder / "mlflow.db")) as database:
        rows = database.execute(
            "SELECT tags.value, metrics.key, metrics.value FROM latest_metrics AS metrics "
            "JOIN tags ON tags.run_uuid = metrics.run_uuid AND tags.key = 'stage'"
        ).fetchall()
    logged = {(stage, key): value for stage, key, value in rows}
    for stage, report in (("download", download), ("clean", clean)):
        assert logged[stage, "images_per_second"] == pytest.approx(report["images_per_second"])
    assert logged["clean", "findings.unreadable"] == 1
    assert logged["clean", "near_duplicates_seconds"] == pytest.approx(clean["near_duplicates_seconds"])
    assert logged["clean", "peak_memory_mib"] == pytest.approx(clean["peak_memory_mib"])
    headlines = {key for stage, key in logged if stage == "pipeline"}
    assert headlines >= {"download.images", "download.classes", "clean.images_in", "clean.images_kept"}
    assert "download.images_per_second" not in headlines


def test_an_empty_data_folder_is_an_error_without_a_traceback(project: Project) -> None:
    shutil.rmtree(project.folder / "data")
    (project.folder / "data").mkdir()
    status, errors = project.run("stages/download.py")
    assert status == 1
    assert errors.strip().splitlines()[-1].startswith("download: There are no images in data.")
    assert "Traceback" not in errors
    assert not (project.folder / "build" / "raw").exists()


def real_profile(params: dict[str, Any]) -> None:
    """Choose the real profile, with a short timeout and the bundled judge."""
    params["profile"] = "sciencedb"
    params["profiles"]["sciencedb"]["judge"]["model"] = "models/judge"
    params["profiles"]["sciencedb"]["dataset"]["sciencedb"]["timeout_s"] = 2.0


def as_served(folder: Path) -> dict[str, bytes]:
    return {f"/V1/Animal/Animal/{path.relative_to(folder)}": path.read_bytes() for path in folder.glob("*/*")}


def misbehave(server: ScienceDB, shift: int) -> None:
    server.retry_after = "0"
    server.listing_faults = ["500", "50000", "null", "html", "429 after", "hang up"]
    for number, path in enumerate(sorted(server.files)):
        server.faults[path] = [FAULTS[(number + shift + step) % len(FAULTS)] for step in range(number % 4)]
    server.faults[min(server.files)] = ["hang"]


def test_the_real_profile_gives_the_same_result_twice_from_a_faulty_server(tmp_path: Path) -> None:
    copy_sample(tmp_path / "origin", ("elephant", "flamingo", "ladybugs", "zebra"), 16)
    planted = plant(tmp_path / "origin", 0.04, off_topic=draw_off_topic(4))
    files = as_served(tmp_path / "origin")
    made = ("build/raw", "build/clean", "build/split", "reports/clean")
    results = []
    for attempt in range(2):
        project = Project(tmp_path / str(attempt), real_profile)
        with serving(files) as server:
            misbehave(server, shift=attempt)
            for name in ("download", "clean", "split"):
                status, errors = project.run(f"stages/{name}.py", url=server.url)
                assert status == 0, errors
        assert project.report("download")["fetched_files"] == len(files)
        assert project.report("download")["missing_files"] == 0
        assert project.report("split")["leaked_groups"] == 0
        results.append(project.content(*made))
    assert results[0] == results[1]
    assert sum(path.startswith("build/raw/") for path in results[0]) == len(files)

    found = list(csv.DictReader((project.folder / "reports" / "clean" / "findings.csv").open(encoding="utf-8")))
    gone = {row["path"] for row in found if row["action"] == "quarantined"}
    for kind in ("broken", "exact", *NEAR, "off topic"):
        assert recall(planted[kind], gone) >= 0.75, kind
    for row in found:
        assert (project.folder / "reports" / "clean" / f"{row['kind'].replace(' ', '_')}.png").exists()


def test_downloaded_files_survive_a_kill_and_dvc_deleting_the_output(tmp_path: Path) -> None:
    copy_sample(tmp_path / "origin", ("elephant", "zebra"), 20)
    files = as_served(tmp_path / "origin")
    project = Project(tmp_path / "project", real_profile)
    cached = project.folder / "cache" / "sciencedb" / "files"
    dice = random.Random()
    with serving(files) as server:
        server.bytes_per_second = 20_000
        killed = project.start("-m", "dvc", "repro", "download", url=server.url)
        enough = dice.randrange(8, 32)
        while server.requests.total() < enough and killed.poll() is None:
            time.sleep(0.01)
        time.sleep(dice.uniform(0, 0.1))
        os.killpg(killed.pid, signal.SIGKILL)
        killed.communicate()
        complete = [path for path in cached.glob("*/*") if path.suffix != ".part"]
        assert 0 < len(complete) < len(files)

        server.bytes_per_second = None
        before = server.requests.total()
        status, errors = project.run("-m", "dvc", "repro", "download", url=server.url)
        assert status == 0, errors
        assert server.requests.total() - before == len(files) - len(complete)
        assert project.report("download")["fetched_files"] == len(files) - len(complete)

        before = server.requests.total()
        left_over = project.folder / "build" / "raw" / "left-over"
        left_over.touch()
        status, errors = project.run("-m", "dvc", "repro", "--force", "download", url=server.url)
        assert status == 0, errors
        assert server.requests.total() == before
        assert not left_over.exists()
    raw = project.folder / "build" / "raw"
    assert as_served(raw) == files
