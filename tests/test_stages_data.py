"""The data stages as DVC runs them: scripts in a project's folder."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from PIL import Image

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.slow


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project with the repository's stages and two classes of ten pictures, cleaned without the judge."""
    for name in ("stages", "src", "models"):
        (tmp_path / name).symlink_to(ROOT / name)
    for name in ("dvc.yaml", "overrides.csv"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    params = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    params["clean"]["off_topic"] = "off"
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params), encoding="utf-8")
    random = np.random.default_rng(0)
    for name in ("cat", "ladybugs"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for number in range(10):
            coarse = Image.fromarray(random.integers(0, 256, (8, 8, 3), dtype=np.uint8))
            coarse.resize((96, 96), Image.Resampling.NEAREST).save(tmp_path / "data" / name / f"{number}.png")
    return tmp_path


def run(project: Path, name: str) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "PYTHONPATH": f"{ROOT / 'src'}",
        "MLFLOW_TRACKING_URI": f"sqlite:///{project / 'mlflow.db'}",
        "OMP_NUM_THREADS": "1",
    }
    environment.pop("DVC_ROOT", None)
    command = [sys.executable, f"stages/{name}.py"]
    return subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True, check=False)


def report(project: Path, name: str) -> dict[str, object]:
    content: dict[str, object] = json.loads((project / "reports" / f"{name}.json").read_text(encoding="utf-8"))
    return content


def test_download_clean_split_bring_a_folder_to_two_tables(project: Path) -> None:
    (project / "data" / "cat" / "broken.jpg").write_bytes(b"<html></html>")
    for name in ("download", "clean", "split"):
        done = run(project, name)
        assert done.returncode == 0, done.stderr
    assert report(project, "download")["images"] == 21
    clean = report(project, "clean")
    assert (clean["images_in"], clean["images_kept"], clean["findings"]) == (21, 20, {"unreadable": 1})
    split = report(project, "split")
    assert split["leaked_groups"] == 0
    train, val = (pd.read_csv(project / "build" / "split" / f"{side}.csv") for side in ("train", "val"))
    assert len(train) + len(val) == 20
    assert set(val["animal"]) == {"cat", "ladybug"}
    assert (project / "reports" / "clean" / "unreadable.png").exists()


def test_an_empty_data_folder_ends_in_one_sentence(project: Path) -> None:
    for path in sorted((project / "data").rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    done = run(project, "download")
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith("download: There are no images in data")
    assert "Traceback" not in done.stderr
    assert not (project / "build" / "raw").exists()
