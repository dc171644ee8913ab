"""What recording to MLflow costs a stage, and how long lineage takes among 1,000 runs.

Runs stages of a copy of this project, as `dvc repro` left it, with BESTIARY_TRACKING=off and with recording, in turns.
The last line is JSON.
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
COPIED = ("src", "stages", "models", "build", "reports", "data", "dvc.yaml", "params.yaml", "overrides.csv", "data.dvc")


def copy_project(target: Path) -> None:
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, target / name)
        elif source.is_file():
            shutil.copy2(source, target / name)


def environment(project: Path, recording: bool) -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("DVC_", "MLFLOW_"))}
    switch = {} if recording else {"BESTIARY_TRACKING": "off"}
    return inherited | switch | {"DVC_ROOT": str(project), "PYTHONPATH": str(project / "src")}


def run_stage(project: Path, stage: str, recording: bool) -> float:
    """Seconds that a stage takes, as DVC would start it: with its outputs gone."""
    definition = yaml.safe_load((project / "dvc.yaml").read_text())["stages"][stage]
    for out in definition.get("outs", []):
        name, options = (out, {}) if isinstance(out, str) else next(iter(out.items()))
        if not options.get("persist"):
            shutil.rmtree(project / name, ignore_errors=True)
    started = time.perf_counter()
    subprocess.run(
        [sys.executable, f"stages/{stage}.py"],
        cwd=project,
        env=environment(project, recording),
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    return time.perf_counter() - started


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
    """Seconds of `bestiary lineage`, whole and of the walk alone."""
    command = [sys.executable, "-c", "from bestiary.cli import main; main()", "lineage", "models:/bestiary/1"]
    how = {"cwd": project, "env": environment(project, True), "check": True, "stdout": subprocess.DEVNULL}
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        subprocess.run(command, **how)
        seconds.append(time.perf_counter() - started)
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", "from mlflow.tracking import MlflowClient"], **how)
    return {"lineage_s": statistics.median(seconds), "of_which_importing_mlflow_s": time.perf_counter() - started}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stages", nargs="*", default=["split", "encode"])
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    result: dict[str, object] = {}
    with tempfile.TemporaryDirectory() as folder:
        project = Path(folder)
        copy_project(project)
        run_stage(project, "register", True)  # makes the database
        for stage in arguments.stages:
            times: dict[bool, list[float]] = {False: [], True: []}
            for _ in range(arguments.rounds):
                for recording in (False, True):
                    times[recording].append(run_stage(project, stage, recording))
            off, on = (statistics.median(times[recording]) for recording in (False, True))
            print(f"{stage:10} off {off:8.2f} s   recording {on:8.2f} s   {100 * (on / off - 1):+.1f} %")
            result[stage] = {"off_s": off, "recording_s": on}
        multiply_runs(project / "mlflow.db", 1000)
        result |= lineage(project)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
