"""Which tests pytest-xdist gives to the same process."""

import pytest
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling


def group(nodeid: str) -> str:
    """The tests of a module share its fixtures, and those of tests/pipeline share one project.

    >>> group("tests/pipeline/test_demo.py::test_a_second_repro_runs_no_stage")
    'tests/pipeline'
    >>> group("tests/test_files.py::test_a_suffix[::]")
    'tests/test_files.py'
    >>> group("src/bestiary/files.py::bestiary.files.replace")
    'src'
    """
    path = nodeid.partition("::")[0]
    shared = (folder for folder in ("tests/pipeline", "src") if path.startswith(f"{folder}/"))
    return next(shared, path)


class Groups(LoadScopeScheduling):  # type: ignore[misc]
    """Gives each group to one process, in the order in which the groups were collected."""

    def __init__(self, config: pytest.Config, log: Producer) -> None:
        config.option.loadscopereorder = False
        super().__init__(config, log)

    def _split_scope(self, nodeid: str) -> str:
        return group(nodeid)
