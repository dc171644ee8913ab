"""The evaluate and benchmark stages as DVC runs them: scripts in a project's folder."""

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

from bestiary.diffusion.adapter import inject, save_adapter
from bestiary.diffusion.base import load_unet
from bestiary.evaluation.sweep import settle

ROOT = Path(__file__).parents[2]
CLASSES = ("antelope", "tiger")
RESOLUTION = 32  # half of the base's own
ANY_LCM = {
    "scheduler": "lcm",
    "batch": 1,
    "fused": False,
    "guidance": "interval",
    "dtype": "float32",
    "compiled": False,
    "vae": "full",
}

pytestmark = pytest.mark.slow


@pytest.fixture
def project(tmp_path: Path, adapter: Path) -> Path:
    """A project up to its trained adapter: two classes of random pictures, everything as small as it can be."""
    for name in ("stages", "src", "models/base", "models/judge"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "models" / "adapter").symlink_to(adapter)
    (tmp_path / "dvc.yaml").write_bytes((ROOT / "dvc.yaml").read_bytes())
    params = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    params["profiles"]["sample"]["encode"]["resolution"] = RESOLUTION
    params["profiles"]["sample"]["evaluate"] |= {"seeds": 2, "steps": 1, "batch_size": 4}
    params["profiles"]["sample"]["benchmark"] |= {"schedulers": ["ddim", "lcm"], "steps": [1, 2], "repeats": 5}
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params), encoding="utf-8")
    random = np.random.default_rng(0)
    split = tmp_path / "build" / "split"
    split.mkdir(parents=True)
    for name, count in (("train", 4), ("val", 2)):
        rows = []
        for folder in CLASSES:
            for number in range(count):
                path = f"{folder}/{name}{number}.png"
                (tmp_path / "build" / "clean" / folder).mkdir(parents=True, exist_ok=True)
                pixels = random.integers(0, 256, (64, 64, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / "build" / "clean" / path)
                rows.append({"path": path, "class": folder})
        pd.DataFrame(rows).to_csv(split / f"{name}.csv", index=False)
    return tmp_path


def run(project: Path, name: str) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "PYTHONPATH": f"{ROOT / 'src'}",
        "MLFLOW_TRACKING_URI": f"sqlite:///{project / 'mlflow.db'}",
    }
    environment.pop("DVC_ROOT", None)
    command = [sys.executable, f"stages/{name}.py"]
    return subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True, check=False)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_evaluate_reports_every_row_and_keeps_its_report_when_the_next_run_fails(project: Path) -> None:
    done = run(project, "evaluate")
    assert done.returncode == 0, done.stderr
    report = json.loads((project / "reports" / "evaluate.json").read_text())
    assert report["images"] == 4
    assert len(report["adapter_sha256"]) == 64
    assert list(report["per_class"]) == list(CLASSES)
    files = contents(project / "reports" / "evaluate")
    assert set(files) == {
        "pictures/antelope.jpg",
        "pictures/tiger.jpg",
        "sheet.png",
        "memorisation.png",
        "confusion.png",
        "per_class.png",
        "per_class.csv",
        "pictures.csv",
    }
    with Image.open(project / "reports" / "evaluate" / "pictures" / "tiger.jpg") as sheet:
        assert sheet.height < 4 * RESOLUTION  # base above adapter, at the size that the adapter was trained at
    earlier = (project / "reports" / "evaluate.json").read_bytes()
    (project / "build" / "split" / "val.csv").write_text("path,class\n")
    done = run(project, "evaluate")
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith("evaluate: There are no validation images")
    assert "Traceback" not in done.stderr
    assert (project / "reports" / "evaluate.json").read_bytes() == earlier
    assert contents(project / "reports" / "evaluate") == files


@pytest.mark.parametrize("name", ["evaluate", "benchmark"])
def test_an_adapter_for_another_base_is_a_plain_sentence_and_leaves_the_earlier_reports(
    name: str, project: Path, base_folder: Path, tmp_path: Path
) -> None:
    adapter = tmp_path / "models" / "adapter"
    adapter.unlink()
    unet = load_unet(base_folder)
    inject(unet, rank=2, alpha=4, dropout=0.0, targets=["to_q"], seed=0)
    save_adapter(unet, adapter, {"base_sha256": "0" * 64})
    settle(project / "reports" / "operating_point", adapter, 1.0, 3.0)
    earlier = contents(project / "reports")
    done = run(project, name)
    assert done.returncode == 1
    said = done.stderr.strip().splitlines()[-1]
    assert said.startswith(f"{name}: The adapter in ")
    assert said.endswith("was trained on another base than models/base: run `dvc repro`.")
    assert "Traceback" not in done.stderr
    assert contents(project / "reports") == earlier


def test_register_names_a_damaged_report(project: Path) -> None:
    settle(project / "reports" / "operating_point", project / "models" / "adapter", 1.0, 3.0)
    (project / "reports" / "evaluate").mkdir()
    for name in ("train", "evaluate", "benchmark"):
        (project / "reports" / f"{name}.json").write_text("{}")
    (project / "reports" / "evaluate.json").write_text("<<<<<<< HEAD")
    done = run(project, "register")
    assert done.returncode == 1
    said = "register: reports/evaluate.json is missing or damaged: delete it and run `dvc repro evaluate`."
    assert done.stderr.strip().splitlines()[-1] == said
    (project / "reports" / "operating_point" / "operating_point.json").write_text("{}")
    said = run(project, "register").stderr.strip().splitlines()[-1]
    assert said.startswith("register: reports/operating_point/operating_point.json is damaged: delete it and run")


def test_benchmark_reports_its_environment_its_cold_start_and_every_setting(project: Path) -> None:
    point = settle(project / "reports" / "operating_point", project / "models" / "adapter", 1.0, 3.0)
    done = run(project, "benchmark")
    assert done.returncode == 0, done.stderr
    report = json.loads((project / "reports" / "benchmark.json").read_text())
    settings = {(row["scheduler"], row["steps"], row["fused"]) for row in report["rows"]}
    assert settings >= {
        ("ddim", 1, False),
        ("ddim", 2, False),
        ("dpmsolver++sde", 1, False),
        ("dpmsolver++sde", 1, True),
    }
    assert report["cold_start_s"] > sum(report["cold_start"].values()) > 0
    assert report["fastest_good"] in report["rows"]
    assert report["environment"]["torch"]
    assert report["resolution"] == RESOLUTION
    assert report["adapter_sha256"] == point.adapter_sha256
    assert {row["guidance"] for row in report["rows"]} == {"always", "interval", "never"}
    assert report["skipped"] == [
        {**ANY_LCM, "steps": steps, "reason": "the base is no latent consistency model"} for steps in (1, 2)
    ]
    for row in report["rows"]:
        assert row["with_loading_s"] == pytest.approx(
            report["cold_start"]["import_s"] + report["cold_start"]["load_s"] + row["p50_s"]
        )
    assert (project / "reports" / "benchmark" / "quality_against_cost.png").is_file()
