"""What every pipeline stage has in common: typed parameters, an MLflow run, a report, and one-line errors."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import math
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import Any, TypeAlias

from pydantic import BaseModel, ValidationError

from bestiary.errors import BestiaryError, system_sentence
from bestiary.files import project_root, write_atomically
from bestiary.libraries import silence_libraries
from bestiary.params import Model, Params, load_params
from bestiary.tracking.content import content_hash
from bestiary.tracking.runs import Run, open_run
from bestiary.yaml_file import read_yaml

# reports/<stage>.json is everything that a stage reports. Git ignores it, because seconds and memory differ every time.
# reports/results/<stage>.json has the results alone. Git and DVC track it, and later stages read it.
# reports/metrics/<stage>.json has the few of them that are DVC's metrics: what to compare between two runs.
REPORTS = Path("reports")
RESULTS = REPORTS / "results"
METRICS = REPORTS / "metrics"
FAST_PIPELINE = Path("fast") / "dvc.yaml"  # the stages that make the fast variant; `dvc repro` leaves them out
# Unfinished work. Relative to the project's root, as StageRun.hold resolves it: DVC deletes the copy of the project
# that a queued experiment runs in, but the work must survive it.
CACHE = Path(".cache")
SHELLS = {"sh", "bash", "dash", "zsh", "fish", "ksh"}  # that DVC starts a stage with
NOT_METRICS = {"per_class", "per_template"}  # hundreds of numbers each: they stay in the report and its plots

Json: TypeAlias = "bool | int | float | str | list[Json] | dict[str, Json] | None"


# ---- running a stage ----


@contextlib.contextmanager
def stage(name: str) -> Iterator[tuple[Params, StageRun]]:
    """Run the body as the stage `name`, with the typed parameters and its MLflow run. The working folder is a project.

    The run carries the parameters that dvc.yaml lists for the stage, and DVC's content hashes of its dependencies and
    outputs. Outputs below reports/ are stored with the run. A user's mistake ends in one line on standard error and
    exit status 1. When `accelerate launch` starts several processes, only the first one opens a run.
    """
    silence_libraries()
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str((CACHE / "compile").resolve()))
    with _one_line_errors(name):
        params = load_params()
        definition = _read_definition(name)
        if missing := [path for path in definition.deps if not Path(path).exists()]:
            raise BestiaryError(
                f"{', '.join(missing)} does not exist. "
                f"`dvc repro {definition.address}` runs the stages before this one."
            )
        if os.environ.get("RANK", "0") != "0":
            yield params, StageRun(name, None)
            return
        settings = _settings_of(definition, params)
        _end_with_dvc()
        # The locks come first, so that they are released last, when the run is in MLflow.
        with contextlib.ExitStack() as locks:
            _take_turn(name, definition, locks)
            with open_run(name, settings, definition.deps, _pipeline_key(params)) as run:
                yield params, StageRun(name, run, locks)
                run.log_outputs([*definition.outs, *definition.metrics])
                for out in definition.outs:
                    if Path(out).parts[0] == REPORTS.name and Path(out).is_dir():
                        run.log_artifact(out, Path(out).name)


def _end_with_dvc() -> None:
    """End this process soon after the `dvc` command that started it, which may be killed without its stages."""
    stage = os.environ.get("DVC_STAGE")
    if stage is None:
        return
    import psutil

    def belongs_to_stage(process: psutil.Process) -> bool:
        """Whether DVC gave this process its stage's environment: its shell, or the launcher of BESTIARY_LAUNCH."""
        if process.name() in SHELLS:  # on macOS, the environment of the system's shells cannot be read
            return True
        with contextlib.suppress(psutil.AccessDenied):
            return process.environ().get("DVC_STAGE") == stage
        return False

    def watch() -> None:
        with contextlib.suppress(psutil.NoSuchProcess):  # an ancestor that ends during the search was DVC, too
            dvc = next((parent for parent in psutil.Process().parents() if not belongs_to_stage(parent)), None)
            if dvc is None:
                return
            while dvc.status() != psutil.STATUS_ZOMBIE:
                time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def _take_turn(name: str, definition: _Definition, locks: contextlib.ExitStack) -> None:
    """Wait until no other process of this project runs the stage, and delete what it wrote meanwhile, as DVC does."""

    def on_wait() -> None:
        print(f"{name}: an earlier run of this stage has not ended yet. Waiting for it.", file=sys.stderr)

    # In the working folder, where the outputs are.
    if _lock(CACHE / "locks" / f"stage-{name}", locks, on_wait):
        for out in map(Path, [*definition.outs, *definition.metrics]):
            if str(out) not in definition.persistent:
                shutil.rmtree(out) if out.is_dir() else out.unlink(missing_ok=True)


def _lock(path: Path, locks: contextlib.ExitStack, on_wait: Callable[[], None]) -> bool:
    """Lock a file until `locks` closes. If another process holds it, call `on_wait`, then wait; return whether so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = locks.enter_context(path.open("w"))
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        on_wait()
        fcntl.flock(file, fcntl.LOCK_EX)
        return True
    return False


class StageRun:
    """A running stage: its MLflow run and its report.

    Of the processes that `accelerate launch` starts, only the first (`is_main`) has a run and writes the report; in the
    others the methods that log or write do nothing.
    """

    def __init__(self, stage: str, run: Run | None, locks: contextlib.ExitStack | None = None) -> None:
        self.stage = stage
        self.mlflow = run
        self.is_main = run is not None
        self._locks = locks or contextlib.ExitStack()

    @property
    def id(self) -> str:
        """MLflow's id of the run. Waits until MLflow has started.

        Raises BestiaryError in a process without a run, or when MLflow cannot be used.
        """
        if self.mlflow is None:
            raise BestiaryError(f"{self.stage} cannot run in several processes. Start it without accelerate launch.")
        return self.mlflow.id

    def hold(self, folder: Path) -> Path:
        """Lock `folder`, a path below CACHE, until the stage ends. Returns the folder's absolute path.

        Experiments that run side by side may do the same work; then the second one waits for the first.
        Raises BestiaryError instead of waiting when the stage runs in several processes.
        """
        from bestiary.diffusion.base import processes

        folder, cache = project_root() / folder, project_root() / CACHE
        if self.is_main:

            def on_wait() -> None:
                if processes().num_processes > 1:  # the other processes, and their launcher, would time out
                    raise BestiaryError("Another run is already doing this work. Try again when it finishes.")
                print(f"{self.stage}: another run is already doing this work. Waiting for it.", file=sys.stderr)

            _lock(cache / "locks" / "-".join(folder.relative_to(cache).parts), self._locks, on_wait)
        processes().wait_for_everyone()
        return folder

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log numbers by name. Give a step when they are points of a curve."""
        if self.mlflow:
            self.mlflow.log_metrics(metrics, step)

    def log_artifact(self, path: Path | str, folder: str | None = None) -> None:
        """Store a copy of a file, or of the files in a folder, with the run."""
        if self.mlflow:
            self.mlflow.log_artifact(path, folder)

    def log_image(self, path: Path | str, name: str, step: int) -> None:
        """Store a picture of one step; MLflow shows those of one name as a series."""
        if self.mlflow:
            self.mlflow.log_image(path, name, step)

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Set tags by name."""
        if self.mlflow:
            self.mlflow.set_tags(tags)

    def describe_pipeline(self, text: str, picture: str) -> None:
        """Set the description of the pipeline's run: Markdown, and a picture by its path among this run's artifacts."""
        if self.mlflow:
            self.mlflow.describe_pipeline(text, picture)

    def report(
        self,
        results: Mapping[str, object],
        costs: Mapping[str, object] | None = None,
        *,
        headlines: Sequence[str] = (),
    ) -> None:
        """Write the results to `reports/results/<stage>.json`, and both to `reports/<stage>.json` and to MLflow.

        Results are what the same inputs give again on the same machine; costs are seconds, memory and speed.
        `headlines` are the results to compare between two runs, as keys joined by dots: they are written to
        `reports/metrics/<stage>.json`, and the pipeline's run in MLflow has no others. Each file is written completely
        or not at all. Raises BestiaryError when a number is not finite.
        """
        if self.mlflow is None:
            return
        path = REPORTS / f"{self.stage}.json"
        everything = {**results, **(costs or {})}
        report = {str(key): _to_json(value, f"{path}: {key}") for key, value in everything.items()}
        _write_json(path, report)
        _write_json(RESULTS / path.name, {key: report[key] for key in results})
        if headlines:
            _write_json(METRICS / path.name, pick(report, headlines))
        self.mlflow.log_summary(dict(_metrics_of(report)), list(headlines))
        self.log_artifact(path)


@contextlib.contextmanager
def _one_line_errors(name: str) -> Iterator[None]:
    """Print an error that the user can correct as one line and exit; let every other exception through."""
    try:
        yield
    except BestiaryError as error:
        print(f"{name}: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        print(f"{name}: stopped.", file=sys.stderr)
        raise SystemExit(130) from None
    except Exception as error:
        sentence = system_sentence(error)
        if sentence is None:
            raise
        print(f"{name}: {sentence}", file=sys.stderr)
        raise SystemExit(1) from None


# ---- what a stage reads ----


def read_report(name: str) -> dict[str, Any]:  # the keys differ from stage to stage
    """The results that an earlier stage wrote to `reports/results/<name>.json`.

    Raises BestiaryError when it is missing or damaged.
    """
    path = RESULTS / f"{name}.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        content = None
    if not isinstance(content, dict):
        raise BestiaryError(f"{path} is missing or damaged: delete it and run `dvc repro {name}`.")
    return content


def content_of(model: Model) -> str:
    """Text that changes when the model does: a folder's content hash, or the id and revision of a model on the hub.

    >>> content_of(Model(model="openai/clip-vit-base-patch32", revision="3d74acf"))
    'openai/clip-vit-base-patch32@3d74acf'
    """
    folder = Path(model.model)
    return content_hash(folder) if folder.is_dir() else f"{model.model}@{model.revision}"


@dataclass(frozen=True)
class _Definition:
    """What dvc.yaml says about a stage: paths, and the keys of params.yaml that the stage depends on."""

    deps: list[str]
    params: list[str]
    outs: list[str]
    metrics: list[str]
    persistent: list[str]  # the outs that DVC does not delete before a run
    address: str  # the stage's name for `dvc repro`


Entry: TypeAlias = "str | dict[str, object]"  # `path` or `path: {options}`


class _Stage(BaseModel):
    """The part of a stage in dvc.yaml that is read here."""

    deps: list[Entry] = []
    params: list[Entry] = []
    outs: list[Entry] = []
    metrics: list[Entry] = []


class _DvcYaml(BaseModel):
    stages: dict[str, _Stage]


class _DataDvc(BaseModel):
    outs: list[dict[str, object]]


def _read_definition(name: str) -> _Definition:
    address = name
    try:
        stages = _DvcYaml.model_validate(read_yaml(Path("dvc.yaml"))).stages
        if name not in stages and FAST_PIPELINE.exists():
            stages = _DvcYaml.model_validate(read_yaml(FAST_PIPELINE)).stages
            address = f"{FAST_PIPELINE}:{name}"
        stage = stages[name]
    except FileNotFoundError:
        raise BestiaryError("There is no dvc.yaml here. Run this in the project's folder.") from None
    except (KeyError, ValidationError):
        raise BestiaryError(f"dvc.yaml does not describe the stage {name}. Restore it from Git.") from None
    persistent = [path for path, options in map(_named, stage.outs + stage.metrics) if options.get("persist")]
    deps, params, outs, metrics = (
        [path for path, _ in map(_named, entries)] for entries in (stage.deps, stage.params, stage.outs, stage.metrics)
    )
    return _Definition(deps, params, outs, metrics, persistent, address)


def _named(entry: Entry) -> tuple[str, Mapping[str, object]]:
    """The path of an entry and its options."""
    if isinstance(entry, str):
        return entry, {}
    path, options = next(iter(entry.items()))
    return path, options if isinstance(options, dict) else {}


def _settings_of(definition: _Definition, params: Params) -> dict[str, object]:
    """The stage's parameters by flat keys such as `clean.min_side`, those of the profile and the recipe included."""
    sections = params.model_dump(by_alias=True)
    wanted = {key.rpartition(".")[2] for key in definition.params} | {"profile"}
    return dict(_flatten({name: section for name, section in sections.items() if name in wanted}))


def _pipeline_key(params: Params) -> str:
    """A hash of everything that decides the pipeline's result: all parameters, the data and dvc.yaml."""
    data = Path("data.dvc")
    try:
        outs = _DataDvc.model_validate(read_yaml(data)).outs if data.is_file() else []
    except ValidationError:
        raise BestiaryError(f"{data} is damaged. Make it again with `dvc add data`.") from None
    parts = [params.model_dump(by_alias=True), [out.get("md5") for out in outs], Path("dvc.yaml").read_text("utf-8")]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


# ---- reports ----


def _to_json(value: object, where: str) -> Json:
    """`value` in JSON's types; NumPy's numbers become Python's. `where` names the value in errors."""
    if isinstance(value, Mapping):
        return {str(key): _to_json(inner, f"{where}: {key}") for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_to_json(inner, where) for inner in value]
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        if not math.isfinite(value):
            raise BestiaryError(f"{where} is not a finite number.")
        return float(value)
    raise TypeError(f"{where} is a {type(value).__name__}, which JSON cannot hold")


def pick(report: Mapping[str, Json], keys: Iterable[str]) -> dict[str, Json]:
    """The part of a report that has these keys, which are joined by dots. Raises KeyError when one is missing.

    >>> pick({"delta": {"margin": {"mean": 18.2, "ci95": [15.1, 21.4]}}, "images": 384}, ["delta.margin.mean"])
    {'delta': {'margin': {'mean': 18.2}}}
    """
    picked: dict[str, Json] = {}
    for key in keys:
        *outer, last = key.split(".")
        source, target = report, picked
        for name in outer:
            inner = source[name]
            assert isinstance(inner, Mapping), f"{key} leads into {name}, which is not a table"
            source, holder = inner, target.setdefault(name, {})
            assert isinstance(holder, dict)
            target = holder
        target[last] = source[last]
    return picked


def _write_json(path: Path, content: Mapping[str, Json]) -> None:
    write_atomically(path, f"{json.dumps(content, indent=2, ensure_ascii=False)}\n".encode())


def _metrics_of(report: Mapping[str, Json]) -> Iterator[tuple[str, float]]:
    """The report's numbers by flat keys, for MLflow; the bounds of a confidence interval are two metrics."""
    for key, value in _flatten({key: value for key, value in report.items() if key not in NOT_METRICS}):
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            yield key, float(value)
        elif key.endswith("ci95") and isinstance(value, list):
            for bound, number in zip(("low", "high"), value, strict=True):
                yield f"{key}.{bound}", float(number)


def _flatten(value: object, prefix: str = "") -> Iterator[tuple[str, object]]:
    """The leaves of nested mappings, each with the keys that lead to it joined by dots."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flatten(inner, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, value
