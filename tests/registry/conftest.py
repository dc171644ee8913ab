import shutil
import socket
import sqlite3
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import httpx
import pytest
from support.registry import make_adapter

ARCHIVE = Path(__file__).parents[1] / "fixtures" / "registry-0.1" / "registry.tar.xz"
# The columns of MLflow's database that hold paths.
LOCATIONS = {
    "experiments": ["artifact_location"],
    "runs": ["artifact_uri"],
    "logged_models": ["artifact_location"],
    "model_versions": ["source", "storage_location"],
}


@pytest.fixture(scope="session")
def adapters(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three different adapters of the bundled base."""
    folder = tmp_path_factory.mktemp("adapters")
    return [make_adapter(base_folder, folder / str(seed), seed) for seed in range(3)]


@pytest.fixture
def old_project(tmp_path: Path, base_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project with the registry that version 0.1.0 wrote, its paths rewritten to where it was unpacked."""
    root = tmp_path / "project"
    with tarfile.open(ARCHIVE) as archive:
        # Python before 3.11.4 has no filters, and extracts this project's own archive without one.
        archive.extraction_filter = getattr(tarfile, "data_filter", None)
        archive.extractall(root)
    with closing(sqlite3.connect(root / "mlflow.db")) as database, database:
        for table, columns in LOCATIONS.items():
            for column in columns:
                database.execute(f"UPDATE {table} SET {column} = replace({column}, '/project', ?)", [str(root)])
    for file in root.rglob("MLmodel"):
        file.write_text(file.read_text().replace("/project", str(root)))
    (root / "dvc.yaml").write_text("stages: {}")
    (root / "models").mkdir()
    (root / "models" / "base").symlink_to(base_folder)
    monkeypatch.setenv("DVC_ROOT", str(root))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("MLFLOW_REGISTRY_URI", raising=False)
    monkeypatch.chdir(root)
    return root


@pytest.fixture
def server(tmp_path: Path, empty_database: Path) -> Iterator[str]:
    """The address of an empty MLflow server."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folder = tmp_path / "server"
    folder.mkdir()
    shutil.copy2(empty_database, folder / "mlflow.db")
    stores = [
        f"--backend-store-uri=sqlite:///{folder / 'mlflow.db'}",
        f"--artifacts-destination={folder / 'artifacts'}",
    ]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "mlflow", "server", *stores, "--host=127.0.0.1", f"--port={port}", "--workers=1"],
            cwd=folder,
            stdout=log,
            stderr=log,
        )
    try:
        deadline = time.monotonic() + 600  # seconds; generous, because the machine may be busy
        while process.poll() is None and time.monotonic() < deadline:
            try:
                httpx.get(f"http://127.0.0.1:{port}/health").raise_for_status()
                break
            except httpx.HTTPError:
                time.sleep(0.2)
        else:
            pytest.fail((folder / "log").read_text()[-3000:])
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()
