import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from bestiary.errors import BestiaryError, system_sentence
from bestiary.params import Model
from bestiary.stage import CACHE, METRICS, REPORTS, RESULTS, content_of, read_report, stage
from bestiary.tracking.content import content_hash
from bestiary.tracking.store import open_client, tracking_uri

ROOT = Path(__file__).parents[1]
DVC_YAML = """
stages:
  split:
    cmd: python stages/split.py
    deps: [data]
    params: [seed, split, "profiles.${profile}.encode"]
    outs: [build/split, reports/split, {reports/results/split.json: {cache: false}}]
    metrics: [{reports/metrics/split.json: {cache: false}}]
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


def stored_run(project: Path) -> Any:  # an mlflow.entities.Run, whose package has no type hints
    """The newest run of the stage `split`."""
    client = open_client(tracking_uri(), project)
    experiment = client.get_experiment_by_name("bestiary").experiment_id
    return client.search_runs([experiment], "tags.stage = 'split'", order_by=["start_time DESC"])[0]


def test_a_stage_writes_its_report_and_a_run_with_its_inputs_and_outputs(workspace: Path) -> None:
    with stage("split") as (params, run):
        (workspace / "build" / "split").mkdir(parents=True)
        (workspace / "build" / "split" / "train.csv").write_text("path\n")
        (workspace / "reports" / "split").mkdir(parents=True)
        (workspace / "reports" / "split" / "table.csv").write_text("x\n")
        results = {"train": np.int64(3), "score": {"mean": np.float32(0.5), "ci95": (0.0, 1.0)}, "names": ["a", None]}
        run.report(results, costs={"seconds": 2.5}, headlines=["train", "score.mean"])
    assert params.split.val_fraction == 0.2
    expected = {"train": 3, "score": {"mean": 0.5, "ci95": [0.0, 1.0]}, "names": ["a", None]}
    assert json.loads((workspace / RESULTS / "split.json").read_text()) == expected
    assert json.loads((workspace / METRICS / "split.json").read_text()) == {"train": 3, "score": {"mean": 0.5}}
    assert json.loads((workspace / REPORTS / "split.json").read_text()) == expected | {"seconds": 2.5}
    stored = stored_run(workspace)
    logged = {"train": 3, "score.mean": 0.5, "score.ci95.low": 0, "score.ci95.high": 1, "seconds": 2.5}
    assert stored.data.metrics == logged
    client = open_client(tracking_uri(), workspace)
    pipeline = client.get_run(stored.data.tags["mlflow.parentRunId"])
    assert pipeline.data.metrics == {"split.train": 3, "split.score.mean": 0.5}
    assert {"split.val_fraction", "seed", "profile", "encode.flip", "encode.resolution"} <= stored.data.params.keys()
    assert "train.rank" not in stored.data.params
    assert stored.data.tags["input.data"] == content_hash(Path("data"))
    assert stored.data.tags["output.build/split"] == content_hash(Path("build/split"))
    artifacts = workspace / "mlruns" / stored.info.run_id / "artifacts"
    assert (artifacts / "split.json").is_file()
    assert (artifacts / "split" / "table.csv").is_file()


def test_only_the_first_process_of_a_launch_opens_a_run_and_writes_the_report(
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
        with pytest.raises(BestiaryError, match="split"):
            _ = run.id
    assert not (workspace / REPORTS).exists()
    client = open_client(tracking_uri(), workspace)
    experiment = client.get_experiment_by_name("bestiary")
    assert experiment is None or not client.search_runs([experiment.experiment_id])


def test_a_users_mistake_ends_in_one_line_and_a_failed_run(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended, stage("split"):
        raise BestiaryError("There is only one class.")
    assert ended.value.code == 1
    assert capsys.readouterr().err == "split: There is only one class.\n"
    assert stored_run(workspace).info.status == "FAILED"


def test_a_report_with_a_number_that_is_not_finite_is_rejected_and_not_written(
    workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit), stage("split") as (_, run):
        run.report({"loss": {"train": float("nan")}})
    assert "reports/split.json: loss: train" in capsys.readouterr().err
    assert not (workspace / REPORTS).exists()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.EROFS])
def test_a_file_that_cannot_be_written_ends_in_one_line_that_names_it(
    number: int, workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended, stage("split"):
        raise OSError(number, os.strerror(number), "build/split/train.csv")
    assert ended.value.code == 1
    printed = capsys.readouterr().err
    assert printed.startswith("split: ")
    assert "build/split/train.csv" in printed
    assert printed.count("\n") == 1


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."),
        RuntimeError("CUDA error: out of memory\nCompile with `TORCH_USE_CUDA_DSA` to enable device-side assertions."),
        MemoryError(),
    ],
)
def test_a_full_memory_ends_in_one_line(error: Exception, workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended, stage("split"):
        raise error
    assert ended.value.code == 1
    assert re.fullmatch(r"split: .* memory is full\. Close other programs.*\n", capsys.readouterr().err)
    assert stored_run(workspace).info.status == "FAILED"


def test_a_full_gpu_is_distinguished_from_a_full_machine() -> None:
    with pytest.raises(RuntimeError) as full:
        torch.empty(2**55)
    assert "This machine's memory is full" in str(system_sentence(full.value))
    assert system_sentence(RuntimeError("no out variant")) is None


def test_a_stage_that_is_interrupted_leaves_a_killed_run(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended, stage("split"):
        raise KeyboardInterrupt
    assert ended.value.code == 130
    assert capsys.readouterr().err.startswith("split: ")
    assert stored_run(workspace).info.status == "KILLED"


def test_a_bug_keeps_its_traceback_and_leaves_a_failed_run(workspace: Path) -> None:
    with pytest.raises(ZeroDivisionError), stage("split"):
        _ = 1 / 0
    assert stored_run(workspace).data.tags["error"] == "ZeroDivisionError: division by zero"


def test_a_missing_input_is_named_with_the_command_that_makes_it(
    workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (workspace / "data" / "a.txt").unlink()
    (workspace / "data").rmdir()
    with pytest.raises(SystemExit), stage("split"):
        pytest.fail("the body must not run")
    printed = capsys.readouterr().err
    assert printed.startswith("split: data does not exist")
    assert "`dvc repro split`" in printed
    assert printed.count("\n") == 1


def test_a_stage_reads_the_report_of_an_earlier_one_and_rejects_a_damaged_one(workspace: Path) -> None:
    (workspace / RESULTS).mkdir(parents=True)
    (workspace / RESULTS / "train.json").write_text('{"steps": 3}')
    assert read_report("train") == {"steps": 3}
    for damaged in ('{"steps": ', "[]"):
        (workspace / RESULTS / "train.json").write_text(damaged)
        with pytest.raises(BestiaryError, match=r"reports/results/train\.json"):
            read_report("train")
    with pytest.raises(BestiaryError, match="`dvc repro evaluate`"):
        read_report("evaluate")


def test_the_content_of_a_model_is_that_of_its_folder_or_its_revision_on_the_hub(workspace: Path) -> None:
    assert content_of(Model(model="data", revision=None)) == content_hash(Path("data"))
    assert content_of(Model(model="openai/clip", revision="3d74acf")) == "openai/clip@3d74acf"


@pytest.mark.slow
def test_the_pipeline_key_changes_exactly_when_the_parameters_do(workspace: Path) -> None:
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
    done = subprocess.run(
        [sys.executable, "split.py"],
        capture_output=True,
        text=True,
        check=False,
        env={"PYTHONPATH": str(ROOT / "src")},
    )
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "val_fractoin" in done.stderr or "val_fraction" in done.stderr


def first_output(capsys: pytest.CaptureFixture[str]) -> str:
    """What is printed on standard error first, awaited for up to a minute."""
    for _ in range(600):
        if printed := capsys.readouterr().err:
            return printed
        time.sleep(0.1)
    pytest.fail("nothing was printed")


def test_two_experiments_that_do_the_same_work_take_turns(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("BESTIARY_TRACKING", "off")
    with stage("split") as (_, second):
        monkeypatch.chdir(shutil.copytree(workspace, tmp_path / "experiment"))
        with stage("split") as (_, first):
            assert first.hold(CACHE / "train" / "key") == workspace / ".cache" / "train" / "key"
            second.hold(CACHE / "train" / "other")  # other work is not locked
            waiting = threading.Thread(target=second.hold, args=[CACHE / "train" / "key"])
            waiting.start()
            assert first_output(capsys).startswith("split: another run is already doing this work")
            assert waiting.is_alive()
        waiting.join(30)
        assert not waiting.is_alive()


def test_a_run_in_several_processes_does_not_wait_for_another_run(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("BESTIARY_TRACKING", "off")
    with stage("split") as (_, first):
        first.hold(CACHE / "train")
        monkeypatch.chdir(shutil.copytree(workspace, tmp_path / "experiment"))
        with monkeypatch.context() as several:
            several.setattr("bestiary.diffusion.base.processes", lambda: SimpleNamespace(num_processes=2))
            with pytest.raises(SystemExit), stage("split") as (_, second):
                second.hold(CACHE / "train")
        assert "Another run is already doing this work" in capsys.readouterr().err


def test_a_stage_waits_for_an_earlier_run_of_it_and_deletes_what_that_wrote(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("BESTIARY_TRACKING", "off")
    seen: list[bool] = []

    def run_again() -> None:
        with stage("split"):
            seen.append((workspace / "build" / "split").exists())

    again = threading.Thread(target=run_again)
    with stage("split"):
        again.start()
        assert first_output(capsys).startswith("split: an earlier run of this stage has not ended yet")
        (workspace / "build" / "split").mkdir(parents=True)
    again.join(30)
    assert seen == [False]


@pytest.mark.slow
@pytest.mark.parametrize(
    "launch", ["python", "torchrun --standalone --nproc-per-node 2", "accelerate launch --cpu --num_processes 1"]
)
def test_a_stage_ends_when_dvc_is_killed(launch: str, workspace: Path) -> None:
    script = workspace / "stage.py"
    script.write_text(
        "import time; from bestiary.stage import stage\n"
        "with stage('split') as (_, run):\n if run.is_main: print('begun', flush=True)\n time.sleep(120)"
    )
    start = f"""
import os, subprocess  # in DVC's place
subprocess.run(["sh", "-c", "{launch} {script}; exit"], env={{**os.environ, "DVC_STAGE": "split"}})
"""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "BESTIARY_TRACKING": "off"}
    dvc = subprocess.Popen([sys.executable, "-c", start], env=environment, stdout=subprocess.PIPE, text=True)
    assert dvc.stdout is not None
    assert dvc.stdout.readline() == "begun\n"
    dvc.send_signal(signal.SIGKILL)
    # The output ends when nobody can write to it any more: all processes have ended.
    assert dvc.communicate(timeout=60)[0] == ""
