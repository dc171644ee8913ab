import errno
import json
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from bestiary.errors import BestiaryError
from bestiary.stage import REPORTS, StageRun, stage
from bestiary.tracking import Run, content_hash, open_client, tracking_uri

ROOT = Path(__file__).parents[1]
DVC_YAML = """
stages:
  split:
    cmd: python stages/split.py
    deps: [data]
    params: [seed, split, "profiles.${profile}.encode"]
    outs: [build/split, reports/split]
    metrics: [{reports/split.json: {cache: false}}]
"""


@pytest.fixture
def workspace(project: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project with one stage that depends on its data."""
    (project / "params.yaml").write_text((ROOT / "params.yaml").read_text())
    (project / "dvc.yaml").write_text(DVC_YAML)
    (project / "data").mkdir()
    (project / "data" / "a.txt").write_text("a")
    monkeypatch.chdir(project)
    return project


def stored_run(project: Path) -> Any:
    client = open_client(tracking_uri(), project)
    experiment = client.get_experiment_by_name("bestiary").experiment_id
    return client.search_runs([experiment], "tags.stage = 'split'", order_by=["start_time DESC"])[0]


def test_a_stage_leaves_its_report_and_a_run_tied_to_what_it_read_and_made(workspace: Path) -> None:
    with stage("split") as (params, run):
        (workspace / "build" / "split").mkdir(parents=True)
        (workspace / "build" / "split" / "train.csv").write_text("path\n")
        (workspace / "reports" / "split").mkdir(parents=True)
        (workspace / "reports" / "split" / "table.csv").write_text("x\n")
        run.report({"train": np.int64(3), "score": {"mean": np.float32(0.5), "ci95": (0.0, 1.0)}, "names": ["a", None]})
    assert params.split.val_fraction == 0.2
    report = json.loads((workspace / "reports" / "split.json").read_text())
    assert report == {"train": 3, "score": {"mean": 0.5, "ci95": [0.0, 1.0]}, "names": ["a", None]}
    stored = stored_run(workspace)
    assert stored.data.metrics == {"train": 3, "score.mean": 0.5, "score.ci95.low": 0, "score.ci95.high": 1}
    assert {"split.val_fraction", "seed", "profile", "encode.flip", "encode.resolution"} <= stored.data.params.keys()
    assert "train.rank" not in stored.data.params
    assert stored.data.tags["input.data"] == content_hash(Path("data"))
    assert stored.data.tags["output.build/split"] == content_hash(Path("build/split"))
    artifacts = workspace / "mlruns" / stored.info.run_id / "artifacts"
    assert (artifacts / "split.json").is_file()
    assert (artifacts / "split" / "table.csv").is_file()


def test_the_other_processes_of_a_launch_open_no_run_and_write_no_report(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    with stage("split") as (params, run):
        assert params.split.val_fraction == 0.2
        run.log_metrics({"loss": 1.0}, 1)
        run.log_artifact(workspace / "data" / "a.txt")
        run.set_tags({"a": "b"})
        run.report({"train": 3})
        assert not run.is_main
        with pytest.raises(BestiaryError, match="split runs as one process"):
            _ = run.id
    assert not (workspace / REPORTS).exists()
    client = open_client(tracking_uri(), workspace)
    experiment = client.get_experiment_by_name("bestiary")
    assert experiment is None or not client.search_runs([experiment.experiment_id])


def test_a_users_error_ends_in_one_sentence_and_a_failed_run(
    workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended, stage("split"):
        raise BestiaryError("One class only: nothing to tell apart.")
    assert ended.value.code == 1
    assert capsys.readouterr().err == "split: One class only: nothing to tell apart.\n"
    assert stored_run(workspace).info.status == "FAILED"


def test_a_number_that_is_not_finite_is_refused_and_nothing_is_written(
    workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit), stage("split") as (_, run):
        run.report({"loss": {"train": float("nan")}})
    assert "reports/split.json: loss: train is not a finite number." in capsys.readouterr().err
    assert not (workspace / REPORTS).exists()


def test_a_full_disk_is_one_sentence(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit), stage("split"):
        raise OSError(errno.ENOSPC, "No space left on device", "build/split/train.csv")
    assert capsys.readouterr().err == "split: no space is left for build/split/train.csv.\n"


def test_missing_input_names_it_and_what_makes_it(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (workspace / "data" / "a.txt").unlink()
    (workspace / "data").rmdir()
    with pytest.raises(SystemExit), stage("split"):
        pytest.fail("the body must not run")
    assert capsys.readouterr().err == "split: data does not exist; `dvc repro split` makes what comes before.\n"


@pytest.mark.slow
def test_other_params_make_another_pipeline_and_the_same_ones_do_not(workspace: Path) -> None:
    keys = []
    for seed in (0, 1, 0):
        text = (ROOT / "params.yaml").read_text().replace("seed: 0", f"seed: {seed}")
        (workspace / "params.yaml").write_text(text)
        with stage("split"):
            pass
        keys.append(stored_run(workspace).data.tags["pipeline"])
    assert keys[0] == keys[2] != keys[1]


def test_a_wrong_parameter_stops_a_stage_before_any_run(workspace: Path) -> None:
    (workspace / "params.yaml").write_text((ROOT / "params.yaml").read_text().replace("val_fraction", "val_fractoin"))
    (workspace / "split.py").write_text("from bestiary.stage import stage\nwith stage('split'): raise RuntimeError\n")
    paths = f"{ROOT / 'stages'}:{ROOT / 'src'}"
    done = subprocess.run(
        [sys.executable, "split.py"], capture_output=True, text=True, check=False, env={"PYTHONPATH": paths}
    )
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "val_fractoin" in done.stderr or "val_fraction" in done.stderr


def test_two_runs_at_the_same_work_take_turns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("BESTIARY_TRACKING", "off")
    monkeypatch.setattr("bestiary.stage.CACHE", tmp_path)
    first, second = (StageRun("train", Run({})) for _ in range(2))
    assert first.hold(tmp_path / "train" / "key") == tmp_path / "train" / "key"
    second.hold(tmp_path / "train" / "other")  # at other work
    with monkeypatch.context() as several:  # whose launcher gives up on a barrier that takes long
        several.setattr("bestiary.diffusion.base.processes", lambda: SimpleNamespace(num_processes=2))
        with pytest.raises(BestiaryError, match="Another run is at the same"):
            StageRun("train", Run({})).hold(tmp_path / "train" / "key")
    waiting = threading.Thread(target=second.hold, args=[tmp_path / "train" / "key"])
    waiting.start()
    waiting.join(1)
    assert waiting.is_alive()
    assert capsys.readouterr().err == "train: waiting for another run that is at the same.\n"
    first.held[0].close()  # as its end does
    waiting.join(30)
    assert not waiting.is_alive()
