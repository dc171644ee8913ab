import shutil
from pathlib import Path

import pytest
from support.project import STAGES, Project

CLASSES, PICTURES = ("panda", "tiger", "zebra"), 12


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project in which `dvc repro` has run. Its tests change it."""
    project = Project(tmp_path_factory.mktemp("bestiary"))
    project.fill()
    for folder in (project.folder / "samples").iterdir():
        for number, picture in enumerate(sorted(folder.iterdir())):
            if folder.name not in CLASSES or number >= PICTURES:
                picture.unlink()
        if folder.name not in CLASSES:
            folder.rmdir()
    project.change(
        clean={"off_topic": "flag"},
        train={
            "steps": 6,
            "batch_size": 4,
            "warmup_steps": 1,
            "validate_every": 3,
            "sheet_animals": 2,
            "sheet_steps": 2,
        },
        evaluate={"seeds": 2, "steps": 2, "batch_size": 6, "bootstrap_resamples": 200},
        benchmark={"schedulers": ["dpmsolver++sde"], "steps": [2], "repeats": 5, "guidance": [], "pictures": 5},
    )
    assert project.repro() == STAGES
    shutil.copytree(project.folder, project.folder.with_name("bestiary-finished"))
    return project


@pytest.fixture(scope="session")
def finished(demo: Project) -> Path:
    """A copy of that project as `dvc repro` left it."""
    return demo.folder.with_name("bestiary-finished")
