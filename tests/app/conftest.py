"""One server of the page, which all tests of it share."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.app import RunningPage, offerings
from support.registry import make_adapter, submit


@pytest.fixture(scope="session")
def adapter_folder(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(base_folder, tmp_path_factory.mktemp("adapters") / "stripes", 0, strength=0.3)


@pytest.fixture(scope="session")
def registry_folder(base_folder: Path, empty_database: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project whose registry holds one version: a champion, 5 points better than the base."""
    folder = tmp_path_factory.mktemp("project")
    shutil.copy2(empty_database, folder / "mlflow.db")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DVC_ROOT", str(folder))
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        submit(folder, base_folder, make_adapter(base_folder, folder / "registered", 1, strength=0.3))
    return folder


@pytest.fixture(scope="session")
def server(base_folder: Path, adapter_folder: Path, registry_folder: Path) -> Iterator[RunningPage]:
    running = RunningPage(registry_folder, offerings(base_folder, adapter_folder))
    yield running
    running.stop()
