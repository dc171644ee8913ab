import os
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TESTS = ROOT / "tests"

# Processes that tests start import this checkout, whether or not the package is installed.
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT / "src"), os.environ.get("PYTHONPATH")]))

# The same bytes on any number of cores, and pytest-xdist's two processes do not compete for them.
os.environ["OMP_NUM_THREADS"] = "1"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Group the tests for pytest-xdist: a module's tests share its fixtures, and tests/pipeline shares one project.

    The project's group is the longest, so it starts first.
    """
    for item in items:
        item.add_marker(pytest.mark.xdist_group(_group(item.path)))
    items.sort(key=lambda item: _group(item.path) != "pipeline")


def _group(path: Path) -> str:
    if not path.is_relative_to(TESTS):
        return "doctests"
    parts = path.relative_to(TESTS).with_suffix("").parts
    return "pipeline" if parts[0] == "pipeline" else ".".join(parts)


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
