from pathlib import Path

import pytest

from bestiary.errors import BestiaryError
from bestiary.evaluation.cold_start import cold_start
from bestiary.samplers import Sampling

pytestmark = pytest.mark.slow


def test_a_cold_start_is_measured_in_a_fresh_process(base_folder: Path, adapter: Path) -> None:
    # A guidance interval, a rectangle and a weight: every field of the sampling reaches the process.
    sampling = Sampling("ddim", 2, 3.0, guidance_interval=(0.5, 5.0), width=64, height=32, adapter_weight=0.5)
    start = cold_start(str(base_folder), None, adapter, "a photo of an antelope", sampling)
    parts = (start.parts.import_s, start.parts.load_s, start.parts.first_picture_s)
    assert min(parts) > 0
    assert sum(parts) < start.total_s


def test_a_cold_start_that_fails_names_the_reason(tmp_path: Path, adapter: Path) -> None:
    with pytest.raises(BestiaryError, match="missing"):
        cold_start(str(tmp_path / "missing"), None, adapter, "", Sampling("ddim", 1))
