from __future__ import annotations

import os
import shutil
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from support.scheduling import Groups, group

if TYPE_CHECKING:
    from xdist.remote import Producer
    from xdist.scheduler import Scheduling

ROOT = Path(__file__).parents[1]

# Processes that tests start import this checkout, whether or not the package is installed.
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT / "src"), os.environ.get("PYTHONPATH")]))

# The tests compare what a CPU computes in float32, to the bit. Those in tests/gpu want a GPU: `make test-gpu`.
if not os.environ.get("BESTIARY_TEST_GPU"):
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

# The same bytes on any number of cores, and pytest-xdist's two processes do not compete for them.
os.environ["OMP_NUM_THREADS"] = "1"

# MLflow's server would start eight more processes, for jobs that the project does not use: 16 s of processor time.
os.environ["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] = "false"


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> Scheduling | None:
    """Let one process run the whole of a group; with `--dist loadgroup` only.

    pytest-xdist 3.8 writes its groups into node ids in a way that pytest 9.2 does not read.
    """
    return Groups(config, log) if config.getoption("dist") == "loadgroup" else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the groups that take longest first: the shared project, then the modules with the most slow tests.

    Two processes then end at about the same time.
    """
    slow = Counter(group(item.nodeid) for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: (group(item.nodeid) != "tests/pipeline", -slow[group(item.nodeid)]))


@pytest.fixture(scope="session")
def base_folder() -> Path:
    return ROOT / "models" / "base"


@pytest.fixture(scope="session")
def judge_folder() -> Path:
    return ROOT / "models" / "judge"


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh MLflow database: making one takes seconds, copying it does not."""
    from bestiary.tracking.store import open_client

    folder = tmp_path_factory.mktemp("mlflow")
    open_client(f"sqlite:///{folder / 'mlflow.db'}", folder)
    return folder / "mlflow.db"


@pytest.fixture
def project(tmp_path: Path, empty_database: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project's root with its own tracking database."""
    root = tmp_path / "project"
    root.mkdir()
    shutil.copy2(empty_database, root / "mlflow.db")
    monkeypatch.setenv("DVC_ROOT", str(root))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("MLFLOW_REGISTRY_URI", raising=False)
    return root
