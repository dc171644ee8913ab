"""What recording to MLflow costs a stage, and how long lineage takes among 1,000 runs.

Runs stages of a copy of this project, as `dvc repro` left it, with BESTIARY_TRACKING=off and with recording, in turns.
Two runs of one stage differ by more than recording costs, so that is measured from inside, too: the seconds that the
stage spends hashing files, calling and waiting for its recorder, and the CPU seconds of that process beside it.
The training is cut to TRAINING_STEPS: of the whole one, recording takes a smaller share still. The last line is JSON.
"""

import argparse
import json
import os
import shutil
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]
TRAINING_STEPS = 200
COPIED = ("src", "stages", "models", "build", "reports", "data", "dvc.yaml", "params.yaml", "overrides.csv", "data.dvc")


# Runs a stage and adds up what recording makes it wait for; its last line is JSON.
TIMED = """
import functools, json, resource, runpy, sys, time
sys.path.insert(0, "stages")
from bestiary import stage as pipeline
from bestiary import tracking

spent = [0.0]

def timed(function):
    @functools.wraps(function)
    def call(*arguments, **named):
        started = time.perf_counter()
        before = spent[0]
        try:
            return function(*arguments, **named)
        finally:
            spent[0] = before + time.perf_counter() - started  # what it calls is not counted twice
    return call

for name in ("__init__", "_reply", "_say", "close"):
    setattr(tracking.Run, name, timed(getattr(tracking.Run, name)))
tracking.check_database = timed(tracking.check_database)
pipeline.content_hash = timed(pipeline.content_hash)
runpy.run_path(sys.argv[1], run_name="__main__")
beside = resource.getrusage(resource.RUSAGE_CHILDREN)
print()
print(json.dumps({"waiting_s": spent[0], "recorder_cpu_s": beside.ru_utime + beside.ru_stime}))
"""


def copy_project(target: Path) -> None:
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, target / name)
        elif source.is_file():
            shutil.copy2(source, target / name)
    params = yaml.safe_load((target / "params.yaml").read_text())
    params["profiles"]["sample"]["train"] |= {"steps": TRAINING_STEPS, "validate_every": TRAINING_STEPS // 4}
    (target / "params.yaml").write_text(yaml.safe_dump(params))


def environment(project: Path, recording: bool) -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("DVC_", "MLFLOW_"))}
    switch = {} if recording else {"BESTIARY_TRACKING": "off"}
    return inherited | switch | {"DVC_ROOT": str(project), "PYTHONPATH": str(project / "src")}


def run_stage(project: Path, stage: str, recording: bool) -> dict[str, float]:
    """Seconds that a stage takes, as DVC would start it, with its outputs gone; and what of them recording takes."""
    shutil.rmtree(project / ".cache", ignore_errors=True)  # latents and pictures that the run before has kept
    definition = yaml.safe_load((project / "dvc.yaml").read_text())["stages"][stage]
    for out in definition.get("outs", []):
        name, options = (out, {}) if isinstance(out, str) else next(iter(out.items()))
        if not options.get("persist"):
            shutil.rmtree(project / name, ignore_errors=True)
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", TIMED, f"stages/{stage}.py"],
        cwd=project,
        env=environment(project, recording),
        check=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    return {"seconds": time.perf_counter() - started} | json.loads(done.stdout.splitlines()[-1])


def multiply_runs(database: Path, wanted: int) -> None:
    """Copies of the runs that are there, with other content, until there are as many as wanted."""
    with sqlite3.connect(database) as connection:
        columns = ", ".join(row[1] for row in connection.execute("PRAGMA table_info(runs)") if row[1] != "run_uuid")
        runs = [row[0] for row in connection.execute("SELECT run_uuid FROM runs")]
        for number in range(1, -(-wanted // len(runs))):
            for run in runs:
                new = f"{run[:-4]}-{number}"
                copy = f"INSERT INTO runs (run_uuid, {columns}) SELECT ?, {columns} FROM runs WHERE run_uuid = ?"
                connection.execute(copy, [new, run])
                copy = "INSERT INTO tags (key, value, run_uuid) SELECT key, value || ?, ? FROM tags WHERE run_uuid = ?"
                connection.execute(copy, [f"-{number}", new, run])
    connection.close()


def lineage(project: Path) -> dict[str, float]:
    """Seconds of `bestiary lineage`."""
    command = [sys.executable, "-c", "from bestiary.cli import main; main()", "lineage", "models:/bestiary/1"]
    how = {"cwd": project, "env": environment(project, True), "check": True, "stdout": subprocess.DEVNULL}
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        subprocess.run(command, **how)
        seconds.append(time.perf_counter() - started)
    return {"lineage_s": statistics.median(seconds)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stages", nargs="*", default=["encode", "train"])
    parser.add_argument("--rounds", type=int, default=1)
    arguments = parser.parse_args()
    result: dict[str, object] = {"benchmark": "tracking", "training_steps": TRAINING_STEPS}
    with tempfile.TemporaryDirectory() as folder:
        project = Path(folder)
        copy_project(project)
        run_stage(project, "register", True)  # makes the database
        for stage in arguments.stages:
            laps: dict[bool, list[dict[str, float]]] = {False: [], True: []}
            for _ in range(arguments.rounds):
                for recording in (False, True):
                    laps[recording].append(run_stage(project, stage, recording))
            off, on = (
                {name: statistics.median(lap[name] for lap in laps[recording]) for name in laps[recording][0]}
                for recording in (False, True)
            )
            found = {"off_s": off["seconds"], "recording_s": on["seconds"]}
            found |= {"waiting_s": on["waiting_s"], "waiting_share": on["waiting_s"] / on["seconds"]}
            found |= {"recorder_cpu_s": on["recorder_cpu_s"] - off["recorder_cpu_s"]}  # less the stage's own children
            print(
                f"{stage:10} off {found['off_s']:8.2f} s   recording {found['recording_s']:8.2f} s, "
                f"of which waiting for it {found['waiting_s']:.2f} s = {found['waiting_share']:.2%}"
            )
            result[stage] = found
        multiply_runs(project / "mlflow.db", 1000)
        result |= lineage(project)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
