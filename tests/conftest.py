from __future__ import annotations

import gc
import itertools
import math
import os
import shutil
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from support.scheduling import Groups, group, read_seconds, record_seconds

if TYPE_CHECKING:
    from _pytest.terminal import TerminalReporter
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

# Importing what the tests import makes millions of objects, none of them garbage. Looking through them takes seconds.
gc.disable()


def pytest_collection_finish() -> None:
    """Collect garbage from here on, but never look again at what the imports made."""
    gc.freeze()
    gc.enable()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> Scheduling | None:
    """Let one process run the whole of a group; with `--dist loadgroup` only.

    pytest-xdist 3.8 writes its groups into node ids in a way that pytest 9.2 does not read.
    """
    return Groups(config, log) if config.getoption("dist") == "loadgroup" else None


def pytest_addoption(parser: pytest.Parser) -> None:
    text = "write the seconds of each group of tests to tests/seconds.csv; run whole modules, on a machine that is idle"
    parser.addoption("--record-seconds", action="store_true", help=text)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start the groups that take longest first, and before them those that nobody has timed.

    Two processes then end at about the same time.
    """
    seconds = read_seconds()
    items.sort(key=lambda item: -seconds.get(group(item.nodeid), math.inf))


def pytest_terminal_summary(terminalreporter: TerminalReporter, config: pytest.Config) -> None:
    if config.getoption("record_seconds"):
        measured: dict[str, float] = defaultdict(float)
        for report in itertools.chain.from_iterable(terminalreporter.stats.values()):
            if isinstance(report, pytest.TestReport):
                measured[group(report.nodeid)] += report.duration
        record_seconds(measured)


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
