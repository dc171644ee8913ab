"""Teach Stable Diffusion your own animals, and prove that it worked."""

import os

__version__ = "0.1.0"

# Libraries read these variables when they are imported, and nothing of this package can be imported before this. Set
# one of them yourself to have your own way. `make` and the team's server set the same ones (tests/test_telemetry.py).
NO_TELEMETRY = {
    "DO_NOT_TRACK": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "HF_HUB_DISABLE_TELEMETRY": "true",
    "HF_HUB_DISABLE_UPDATE_CHECK": "true",
    "DVC_NO_ANALYTICS": "true",
}
for _name, _value in NO_TELEMETRY.items():
    os.environ.setdefault(_name, _value)
