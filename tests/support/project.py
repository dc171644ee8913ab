"""Copies of this project in which tests run its real stages."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
STAGES = ["download", "clean", "split", "encode", "train", "evaluate", "benchmark", "register"]


class Project:
    """A copy of this project, and what its commands find in their environment besides."""

    def __init__(self, folder: Path, environment: dict[str, str] | None = None) -> None:
        self.folder = folder
        self.environment = environment or {}

    def fill(self) -> None:
        """Copy this project's files, as Git would take them now."""
        listed = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT,
            capture_output=True,
            check=True,
        )
        for name in listed.stdout.decode().split("\0"):
            if name and (ROOT / name).is_file():
                (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, self.folder / name)
        self.run("git", "init", "--quiet")

    def run(self, *command: str) -> str:
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("DVC_", "MLFLOW_"))}
        environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
        environment["PYTHONPATH"] = str(self.folder / "src")
        environment |= self.environment
        done = subprocess.run(
            command, cwd=self.folder, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        assert done.returncode == 0, done.stdout[-5000:]
        return done.stdout

    def repro(self, *arguments: str) -> list[str]:
        """The stages that `dvc repro` ran."""
        told = self.run(sys.executable, "-m", "dvc", "repro", *arguments)
        return re.findall(r"^Running stage '(\w+)'", told, re.MULTILINE)

    def bestiary(self, *arguments: str) -> str:
        return self.run(sys.executable, "-c", "from bestiary.cli import main; main()", *arguments)

    def report(self, stage: str) -> dict[str, Any]:
        report: dict[str, Any] = json.loads((self.folder / "reports" / f"{stage}.json").read_text())
        return report

    def change(self, **sections: dict[str, Any]) -> None:
        """Set parameters, in the profile where they stand there."""
        path = self.folder / "params.yaml"
        params = yaml.safe_load(path.read_text())
        for name, values in sections.items():
            for key, value in values.items():
                profile = params["profiles"]["sample"]
                holder = profile if key in profile.get(name, {}) else params
                holder[name][key] = value
        path.write_text(yaml.safe_dump(params, sort_keys=False))
