"""Imports point one way, and only some rooms know MLflow, the web toolkit, click or torch."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
LINT = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True, no_logo=True))"


def test_imports_keep_the_contracts_in_pyproject() -> None:
    # Not in the tests' own process: import-linter disables all loggers there.
    result = subprocess.run([sys.executable, "-c", LINT], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
