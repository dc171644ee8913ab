"""Which tests pytest-xdist gives to the same process, and how long each of these groups takes."""

import csv
from pathlib import Path

import pytest
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

SECONDS = Path(__file__).parents[1] / "seconds.csv"  # `pytest --record-seconds` writes it
ONE_PROJECT = tuple(f"tests/pipeline/test_{name}.py" for name in ("demo", "experiments", "team"))


def group(nodeid: str) -> str:
    """The tests of a module share its fixtures, and three modules of tests/pipeline share one project.

    >>> group("tests/pipeline/test_demo.py::test_a_second_repro_runs_no_stage")
    'tests/pipeline'
    >>> group("tests/pipeline/test_one_subject.py::test_a_folder_of_photos")
    'tests/pipeline/test_one_subject.py'
    >>> group("tests/test_files.py::test_a_suffix[::]")
    'tests/test_files.py'
    >>> group("src/bestiary/files.py::bestiary.files.replace")
    'src'
    """
    path = nodeid.partition("::")[0]
    if path in ONE_PROJECT:
        return "tests/pipeline"
    return "src" if path.startswith("src/") else path


def read_seconds() -> dict[str, float]:
    """The seconds that each group took when they were last recorded."""
    with SECONDS.open(newline="") as file:
        return {row["group"]: float(row["seconds"]) for row in csv.DictReader(file)}


def record_seconds(measured: dict[str, float]) -> None:
    """Replace the seconds of these groups in the table, the longest first."""
    rows = sorted((read_seconds() | measured).items(), key=lambda row: (-round(row[1]), row[0]))
    with SECONDS.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["group", "seconds"])
        writer.writerows((name, round(seconds)) for name, seconds in rows)


class Groups(LoadScopeScheduling):  # type: ignore[misc]
    """Gives each group to one process, in the order in which the groups were collected."""

    def __init__(self, config: pytest.Config, log: Producer) -> None:
        config.option.loadscopereorder = False
        super().__init__(config, log)

    def _split_scope(self, nodeid: str) -> str:
        return group(nodeid)
