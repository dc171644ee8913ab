"""Run the pipeline's stages as DVC does: scripts in a project's folder."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run_stage(project: Path, name: str) -> subprocess.CompletedProcess[str]:
    """Run stages/<name>.py in the folder `project`, whose own database tracks the run."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT / "src"),
        "MLFLOW_TRACKING_URI": f"sqlite:///{project / 'mlflow.db'}",
    }
    environment.pop("DVC_ROOT", None)
    command = [sys.executable, f"stages/{name}.py"]
    return subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True, check=False)
