"""What recording to MLflow costs a stage, and how long lineage takes among 1,000 runs.

Runs stages of a copy of this project, as `dvc repro` left it: in turns with BESTIARY_TRACKING=off and with recording.
Two runs of one stage differ by more than recording costs. So the cost is also measured inside the stage: the seconds
for which its run delayed it (hashing outputs, sending messages, waiting for the recorder), which the package logs when
the run closes, and the CPU seconds of the recorder process.
The training is cut to TRAINING_STEPS; in a whole training, recording takes a smaller share. The last line is JSON.
"""

import argparse
import json
import logging
import os
import resource
import runpy
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="*", default=["encode", "train"])
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--script", type=Path, help="run this stage script here and print what recording costs it")
    arguments = parser.parse_args()
    if arguments.script:
        measure_script(arguments.script)
        return
    result: dict[str, object] = {"benchmark": "tracking", "training_steps": TRAINING_STEPS}
    with tempfile.TemporaryDirectory() as folder:
        project = Path(folder)
        copy_project(project)
        run_stage(project, "register", recording=True)  # creates the database
        for stage in arguments.stages:
            result[stage] = compare(project, stage, arguments.rounds)
        multiply_runs(project / "mlflow.db", 1000)
        result["lineage_s"] = lineage_seconds(project)
    print(json.dumps(result))


def compare(project: Path, stage: str, rounds: int) -> dict[str, float]:
    """Medians over the rounds of a stage without and with recording."""
    measured: dict[bool, list[dict[str, float]]] = {False: [], True: []}
    for _ in range(rounds):
        for recording in (False, True):
            measured[recording].append(run_stage(project, stage, recording))
    off, on = (
        {name: statistics.median(round_[name] for round_ in measured[recording]) for name in measured[recording][0]}
        for recording in (False, True)
    )
    found = {
        "off_s": off["seconds"],
        "recording_s": on["seconds"],
        "waiting_s": on["waiting_s"],
        "waiting_share": on["waiting_s"] / on["seconds"],
        "recorder_cpu_s": on["children_cpu_s"] - off["children_cpu_s"],  # without the stage's own child processes
    }
    print(
        f"{stage:10} off {found['off_s']:8.2f} s   recording {found['recording_s']:8.2f} s, "
        f"of which waiting for it {found['waiting_s']:.2f} s = {found['waiting_share']:.2%}"
    )
    return found


def copy_project(target: Path) -> None:
    """Copy what the stages read, with a shorter training."""
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
    """This process's environment for a command in `project`."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("DVC_", "MLFLOW_"))}
    switch = {} if recording else {"BESTIARY_TRACKING": "off"}
    return inherited | switch | {"DVC_ROOT": str(project), "PYTHONPATH": str(project / "src")}


def run_stage(project: Path, stage: str, recording: bool) -> dict[str, float]:
    """Run a stage as DVC does, with its outputs deleted: the seconds that it takes, and what recording costs it."""
    shutil.rmtree(project / ".cache", ignore_errors=True)  # latents and pictures of the run before
    definition = yaml.safe_load((project / "dvc.yaml").read_text())["stages"][stage]
    for out in definition.get("outs", []):
        name, options = (out, {}) if isinstance(out, str) else next(iter(out.items()))
        if not options.get("persist"):
            shutil.rmtree(project / name, ignore_errors=True)
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, __file__, "--script", f"stages/{stage}.py"],
        cwd=project,
        env=environment(project, recording),
        check=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    costs: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return {"seconds": time.perf_counter() - started} | costs


class RecordingCost(logging.Handler):
    """Adds up the seconds for which closed runs report that they delayed their stage."""

    seconds = 0.0

    def emit(self, record: logging.LogRecord) -> None:
        self.seconds += record.__dict__.get("waited_seconds", 0.0)


def measure_script(script: Path) -> None:
    """Run a stage script in this process. The last line is what recording has cost it, as JSON."""
    cost = RecordingCost()
    logger = logging.getLogger("bestiary.tracking")
    logger.setLevel(logging.DEBUG)
    logger.addHandler(cost)
    sys.path[0] = str(script.parent)  # as when Python starts the script itself
    runpy.run_path(str(script), run_name="__main__")
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    print()
    print(json.dumps({"waiting_s": cost.seconds, "children_cpu_s": children.ru_utime + children.ru_stime}))


def multiply_runs(database: Path, wanted: int) -> None:
    """Copy the runs with other content until there are at least `wanted`."""
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


def lineage_seconds(project: Path) -> float:
    """The median seconds of three calls of `bestiary lineage`."""
    command = [sys.executable, "-c", "from bestiary.cli import main; main()", "lineage", "models:/bestiary/1"]
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        subprocess.run(command, cwd=project, env=environment(project, True), check=True, stdout=subprocess.DEVNULL)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


if __name__ == "__main__":
    main()
