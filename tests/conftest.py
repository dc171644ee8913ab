import os
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TESTS = ROOT / "tests"

# The processes that tests start find this checkout, too, whether or not the package is installed.
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT / "src"), os.environ.get("PYTHONPATH")]))

# The same bytes however many cores there are, and pytest-xdist's two processes keep out of each other's way.
os.environ["OMP_NUM_THREADS"] = "1"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """For pytest-xdist: a module's tests share its fixtures, tests/pipeline a whole project; that group begins."""
    for item in items:
        group = item.path.relative_to(TESTS).with_suffix("").parts
        item.add_marker(pytest.mark.xdist_group("pipeline" if group[0] == "pipeline" else ".".join(group)))
    items.sort(key=lambda item: TESTS / "pipeline" not in item.path.parents)


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
