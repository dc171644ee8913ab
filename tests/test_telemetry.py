"""Nothing that this project starts looks up another machine's name unless the user asked for it."""

import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from support.registry import make_adapter, submit

from bestiary import NO_TELEMETRY

ROOT = Path(__file__).parents[1]
HOOK = ROOT / "tests" / "support" / "no_lookups"
# MLflow takes these for a test run, in which it sends nothing.
TEST_VARIABLES = ("CI", "GITHUB_ACTIONS", "PYTEST_CURRENT_TEST", *NO_TELEMETRY)
BESTIARY = "from bestiary.cli import main; main()"


class Watched:
    """Starts programs in a folder and collects which names they look up."""

    def __init__(self, folder: Path, log: Path) -> None:
        self.folder, self.log = folder, log
        log.touch()

    def run(self, *command: str, **variables: str) -> str:
        """What the program printed on stdout."""
        environment = {name: value for name, value in os.environ.items() if name not in TEST_VARIABLES}
        environment["PYTHONPATH"] = os.pathsep.join([str(HOOK), str(ROOT / "src")])
        environment |= {"LOOKUPS_LOG": str(self.log), **variables}
        done = subprocess.run(
            [sys.executable, *command], cwd=self.folder, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    @property
    def lookups(self) -> str:
        return self.log.read_text()


@pytest.fixture
def watched(project: Path, tmp_path: Path, base_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Watched:
    """A project with the stages of this one, a manifest that can be split, and a registered adapter."""
    for name in ("stages", "src", "examples"):
        (project / name).symlink_to(ROOT / name)
    for name in ("dvc.yaml", "params.yaml", "overrides.csv", "subjects.yaml"):
        shutil.copy2(ROOT / name, project / name)
    (project / "models").mkdir()
    (project / "models" / "base").symlink_to(base_folder)
    (project / "models" / "judge").symlink_to(ROOT / "models" / "judge")
    (project / ".dvc").mkdir()
    (project / ".dvc" / "config").write_text(
        (ROOT / ".dvc" / "config").read_text().replace("[core]", "[core]\n    no_scm = true")
    )
    for animal in ("tiger", "owl"):
        folder = project / "data" / animal
        folder.mkdir(parents=True)
        for file in sorted((ROOT / "samples" / animal).iterdir())[:6]:
            shutil.copy2(file, folder)
    monkeypatch.chdir(project)
    submit(project, "models/base", make_adapter(base_folder, project / "models" / "adapter", 0))
    return Watched(project, tmp_path / "lookups")


def test_the_watch_sees_a_look_up(tmp_path: Path) -> None:
    watched = Watched(tmp_path, tmp_path / "lookups")
    code = "import socket, contextlib\nwith contextlib.suppress(OSError): socket.getaddrinfo('example.org', 443)"
    watched.run("-c", code)
    assert watched.lookups.startswith("example.org by ")


@pytest.mark.slow
def test_small_runs_of_stages_and_commands_look_up_no_name(watched: Watched) -> None:
    for stage in ("download", "clean", "split"):
        watched.run(f"stages/{stage}.py")
    watched.run("-m", "dvc", "status")
    watched.run("-c", BESTIARY, "generate", "tiger", "--steps", "1")
    watched.run("-c", BESTIARY, "adapter", "verify", "models:/bestiary@champion")
    watched.run("-c", BESTIARY, "pull", "models:/bestiary@champion", "--out", "mine")
    watched.run("-c", BESTIARY, "promote", "1", "--because", "test")
    # Importing MLflow starts a thread that asks its telemetry's host; the pause lets it.
    watched.run("-c", "import bestiary.stage, mlflow, mlflow.diffusers, diffusers, transformers, time; time.sleep(2)")
    if find_spec("openvino"):
        code = "import torch, time; from bestiary.diffusion.engines import openvino; "
        code += "openvino().convert_model(torch.nn.Linear(2, 2), example_input=torch.ones(1, 2)); time.sleep(2)"
        watched.run("-c", code)
    assert watched.lookups == ""


@pytest.mark.parametrize("name", NO_TELEMETRY)
def test_make_and_the_teams_server_switch_off_the_same_telemetry(name: str) -> None:
    assert f"\nexport {name} ?= {NO_TELEMETRY[name]}\n" in (ROOT / "Makefile").read_text()
    assert re.search(rf"\b{name}={NO_TELEMETRY[name]}\b", (ROOT / "deploy" / "Dockerfile").read_text())


def test_dvc_sends_no_statistics_and_looks_for_no_update() -> None:
    config = (ROOT / ".dvc" / "config").read_text()
    assert "analytics = false" in config
    assert "check_update = false" in config


def test_a_user_can_decide_otherwise() -> None:
    code = "import bestiary, os; print(os.environ['DO_NOT_TRACK'])"
    environment = os.environ | {"DO_NOT_TRACK": "false"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "false\n"
