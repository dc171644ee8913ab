"""Keep what the libraries print for developers off the user's screen."""

from __future__ import annotations

import os
import sys
import warnings

# Each library reads its variable when it is imported.
QUIET = {
    "TRANSFORMERS_VERBOSITY": "error",
    "DIFFUSERS_VERBOSITY": "error",
    "MLFLOW_LOGGING_LEVEL": "ERROR",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "GIT_PYTHON_REFRESH": "quiet",
}


def silence_libraries() -> None:
    """Hide the libraries' warnings and hints, in this process and its children. Errors are still raised.

    Call it before the libraries are imported. What the user's environment asks for (a variable of QUIET,
    PYTHONWARNINGS, python -W) stays.
    """
    for variable, value in QUIET.items():
        os.environ.setdefault(variable, value)
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
