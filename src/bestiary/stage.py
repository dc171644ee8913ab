"""What every stage does the same way: read params.yaml, open its MLflow run, write its report, fail in one sentence."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import math
import os
import sys
from collections.abc import Iterator, Mapping
from numbers import Integral, Real
from pathlib import Path
from typing import IO, Any

import yaml

from bestiary.errors import BestiaryError
from bestiary.files import project_root, write_atomically
from bestiary.params import Model, Params, load_params
from bestiary.tracking import Run, content_hash, open_run, switched_off

REPORTS = Path("reports")
CACHE = project_root() / ".cache"  # unfinished work; an experiment's own copy of the project goes when it fails
NOT_METRICS = {"per_class", "per_template"}  # hundreds of numbers: they stay in the report and its plots


class StageRun:
    """A stage's MLflow run, and its report; of `accelerate launch`'s processes only the first has and writes them."""

    def __init__(self, stage: str, run: Run | None) -> None:
        self.stage = stage
        self.mlflow = run
        self.is_main = run is not None
        self.held: list[IO[str]] = []

    @property
    def id(self) -> str:
        """MLflow's id of the run. Asking waits until MLflow has started."""
        if self.mlflow is None:
            raise BestiaryError(f"{self.stage} runs as one process: start it without accelerate launch.")
        return self.mlflow.id

    def hold(self, folder: Path) -> Path:
        """`folder` of CACHE, for this run alone until it ends: experiments side by side may be at the same work."""
        from bestiary.diffusion.base import processes

        if self.is_main:
            lock = CACHE / "locks" / "-".join(folder.relative_to(CACHE).parts)
            lock.parent.mkdir(parents=True, exist_ok=True)
            self.held.append(lock.open("w"))
            try:
                fcntl.flock(self.held[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if processes().num_processes > 1:  # the others' patience has an end, and their launcher's
                    raise BestiaryError("Another run is at the same: try again when it has ended.") from None
                print(f"{self.stage}: waiting for another run that is at the same.", file=sys.stderr)
                fcntl.flock(self.held[-1], fcntl.LOCK_EX)
        processes().wait_for_everyone()
        return folder

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log numbers by name, at a step when they are points of a curve."""
        if self.mlflow:
            self.mlflow.log_metrics(metrics, step)

    def log_artifact(self, path: Path | str, folder: str | None = None) -> None:
        """Keep a copy of a file, or of a folder's files, with the run."""
        if self.mlflow:
            self.mlflow.log_artifact(path, folder)

    def log_image(self, path: Path | str, name: str, step: int) -> None:
        """Keep a picture of a step, which MLflow shows as a series."""
        if self.mlflow:
            self.mlflow.log_image(path, name, step)

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Set tags by name."""
        if self.mlflow:
            self.mlflow.set_tags(tags)

    def report(self, content: Mapping[str, Any]) -> None:
        """Write `reports/<stage>.json`, whole or not at all, and log its numbers as metrics.

        Raises BestiaryError when a number is not finite.
        """
        if self.mlflow is None:
            return
        path = REPORTS / f"{self.stage}.json"
        plain = _plain(content, str(path))
        write_atomically(path, (json.dumps(plain, indent=2, ensure_ascii=False) + "\n").encode())
        self.mlflow.log_summary(dict(_numbers(plain)))
        self.log_artifact(path)


@contextlib.contextmanager
def stage(name: str) -> Iterator[tuple[Params, StageRun]]:
    """Run a stage's body with the typed parameters and its MLflow run.

    The run carries the parameters that dvc.yaml names for the stage and DVC's content hashes of all that it reads and
    makes; pictures and tables it leaves below reports/ are kept with it. What a user caused ends in one sentence and
    exit status 1. Of the processes that `accelerate launch` starts, only the first opens a run.
    """
    try:
        params = load_params()
        definition = _definition(name)
        missing = [path for path in definition.get("deps", []) if not Path(path).exists()]
        if missing:
            raise BestiaryError(f"{', '.join(missing)} does not exist; `dvc repro {name}` makes what comes before.")
        if os.environ.get("RANK", "0") != "0":
            yield params, StageRun(name, None)
            return
        inputs = definition.get("deps", [])
        with open_run(name, _section(params, definition), inputs, _pipeline_key(params)) as run:
            yield params, StageRun(name, run)
            outs = _paths(definition.get("outs", []))
            made = [*outs, *_paths(definition.get("metrics", []))]
            if not switched_off():
                run.log_outputs({path: content_hash(Path(path)) for path in made if Path(path).exists()})
            for out in outs:
                if Path(out).parts[0] == REPORTS.name and Path(out).exists():
                    run.log_artifact(out, Path(out).name)
    except BestiaryError as error:
        print(f"{name}: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        print(f"{name}: stopped.", file=sys.stderr)
        raise SystemExit(130) from None
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        print(f"{name}: no space is left for {error.filename or 'its files'}.", file=sys.stderr)
        raise SystemExit(1) from None


def read_report(name: str) -> dict[str, Any]:
    """What a stage before wrote to `reports/<name>.json`. Raises BestiaryError when it is damaged."""
    path = REPORTS / f"{name}.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        content = None
    if not isinstance(content, dict):
        raise BestiaryError(f"{path} is missing or damaged: delete it and run `dvc repro {name}`.")
    return content


def content_of(model: Model) -> str:
    """What changes when a model does: the content of a folder, the id and revision of one from the hub."""
    folder = Path(model.model)
    return content_hash(folder) if folder.is_dir() else f"{model.model}@{model.revision}"


def _definition(name: str) -> dict[str, Any]:
    stages: dict[str, dict[str, Any]] = yaml.safe_load(Path("dvc.yaml").read_text(encoding="utf-8"))["stages"]
    return stages[name]


def _paths(entries: list[str | dict[str, Any]]) -> list[str]:
    """dvc.yaml names a file, or a file with its options."""
    return [entry if isinstance(entry, str) else next(iter(entry)) for entry in entries]


def _section(params: Params, definition: Mapping[str, Any]) -> dict[str, Any]:
    """The stage's own parameters, flat: `clean.min_side`; a profile's keys under the names they have once applied."""
    known = params.model_dump(by_alias=True)
    names = {key.rpartition(".")[2] for key in definition.get("params", [])} | {"profile"}
    return dict(_flat({name: known[name] for name in known if name in names}))


def _pipeline_key(params: Params) -> str:
    """One hash of what decides a pipeline's result: all parameters, the data, the stages."""
    data = Path("data.dvc")
    outs = yaml.safe_load(data.read_text(encoding="utf-8"))["outs"] if data.is_file() else []
    parts = [params.model_dump(by_alias=True), [out.get("md5") for out in outs], Path("dvc.yaml").read_text("utf-8")]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flat(inner, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, value


def _numbers(report: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for key, value in _flat({key: value for key, value in report.items() if key not in NOT_METRICS}):
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            yield key, float(value)
        elif key.endswith("ci95"):
            yield f"{key}.low", value[0]
            yield f"{key}.high", value[1]


def _plain(value: Any, where: str) -> Any:
    """`value` in JSON's own types, NumPy's numbers included, refusing what is not finite."""
    if isinstance(value, Mapping):
        return {str(key): _plain(inner, f"{where}: {key}") for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner, where) for inner in value]
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        if not math.isfinite(value):
            raise BestiaryError(f"{where} is not a finite number.")
        return float(value)
    raise TypeError(f"{where} holds a {type(value).__name__}")
