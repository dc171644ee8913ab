"""Run the pipeline's stages as DVC does: scripts in a project's folder."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run_stage(project: Path, name: str) -> subprocess.CompletedProcess[str]:
    """Run stages/<name>.py in the folder `project`, without MLflow: tests/pipeline runs the stages with it."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "BESTIARY_TRACKING": "off"}
    environment.pop("DVC_ROOT", None)
    command = [sys.executable, f"stages/{name}.py"]
    return subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True, check=False)
