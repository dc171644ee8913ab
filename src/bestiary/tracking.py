"""MLflow runs: one a stage, tied to its inputs and outputs by content, recorded beside the work and not in its way.

Importing MLflow and opening its database costs about three seconds, so a process of its own does it on another core,
fed through a pipe. When the pipe ends without a last word, the stage was killed, and its run says so.
What cannot be sent is kept on disk and sent by the next run.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import importlib.util
import json
import os
import platform
import queue
import re
import shutil
import sqlite3
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from fnmatch import translate
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, Any, Protocol

from bestiary.database import StoredRun
from bestiary.errors import BestiaryError
from bestiary.files import project_root

EXPERIMENT = "bestiary"
LOCK_PATIENCE_SECONDS = 5.0
FLUSH_SECONDS = 1.0
SAMPLE_SECONDS = 10.0
RECORDER_PATIENCE_SECONDS = 600.0  # the recorder gives up by itself long before; this is for one that hangs

Message = dict[str, Any]


def tracking_uri() -> str:
    """`MLFLOW_TRACKING_URI`, or SQLite at the project's root."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{project_root() / 'mlflow.db'}"


def switched_off() -> bool:
    """Whether BESTIARY_TRACKING=off says that no stage shall record anything, to measure what recording costs."""
    return os.environ.get("BESTIARY_TRACKING") == "off"


# ---- content ----


def content_hash(path: Path) -> str:
    """DVC's own MD5 of a file or a folder (`....dir`), so that a run and `dvc.lock` speak of the same thing."""
    if not path.is_dir():
        return _md5(path)
    is_ignored = _dvcignore()
    listing = []
    for folder, folders, files in os.walk(path):
        folders[:] = [name for name in folders if not is_ignored(name)]
        inside = "" if Path(folder) == path else f"{Path(folder).relative_to(path).as_posix()}/"
        for name in files:
            if not is_ignored(name):
                listing.append({"md5": _md5(Path(folder, name)), "relpath": inside + name})
    listing.sort(key=lambda entry: entry["relpath"])
    return hashlib.md5(json.dumps(listing, sort_keys=True).encode(), usedforsecurity=False).hexdigest() + ".dir"


def _md5(path: Path) -> str:
    digest = hashlib.md5(usedforsecurity=False)
    with path.open("rb", buffering=0) as file:  # no buffer made for each of many small pictures
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _dvcignore() -> Callable[[str], object]:
    """Tells whether a name is one that .dvcignore has DVC pass over."""
    file = project_root() / ".dvcignore"
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    patterns = [line.strip().rstrip("/") for line in lines if line.strip() and not line.startswith("#")]
    return re.compile("|".join(map(translate, patterns)) or r"(?!)").match


# ---- a run, as its stage sees it ----


class Run:
    """An open run. Its calls return at once; what they say is in MLflow when the run has closed.

    With BESTIARY_TRACKING=off in the environment nothing is recorded; then a run has no id.
    """

    def __init__(self, opening: Message) -> None:
        self._said = [opening]
        self._id: str | None = None
        self._recorder: subprocess.Popen[str] | None = None
        if switched_off():
            return
        package = str(Path(__file__).parents[1])
        search_path = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))
        self._recorder = subprocess.Popen(
            [sys.executable, "-c", "from bestiary.tracking import record; record()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=os.environ | {"PYTHONPATH": search_path},
            start_new_session=True,  # Ctrl-C is for the stage; the recorder then writes that down
        )
        self._replies: queue.Queue[Message | None] = queue.Queue()
        assert self._recorder.stdout is not None
        threading.Thread(target=_listen, args=(self._recorder.stdout, self._replies), daemon=True).start()
        self._send(opening)

    @property
    def id(self) -> str:
        """MLflow's run id. Waits for the recorder; raises BestiaryError when MLflow is switched off or unreachable."""
        if self._recorder is None:
            raise BestiaryError("This needs MLflow, and BESTIARY_TRACKING=off has switched it off.")
        if self._id is None:
            reply = self._reply()
            if "error" in reply:
                raise BestiaryError(reply["error"])
            self._id = self._said[0]["run_id"] = reply["run_id"]
        return str(self._id)

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log numbers by name, at a step when they are points of a curve."""
        self._say({"do": "metrics", "values": _metrics(metrics), "step": step or 0, "time": _now()})

    def log_summary(self, metrics: Mapping[str, float]) -> None:
        """Log a stage's results, here but for those that are a curve, and as `stage.name` in the pipeline's run."""
        self._say({"do": "summary", "values": _metrics(metrics), "step": 0, "time": _now()})

    def log_artifact(self, path: Path | str, folder: str | None = None) -> None:
        """Keep a copy of a file, or of a folder's files, with the run; leave it as it is until the run has closed."""
        self._say({"do": "artifact", "path": str(Path(path).resolve()), "folder": folder})

    def log_image(self, path: Path | str, name: str, step: int) -> None:
        """Keep a picture of a step, which MLflow shows as a series; leave its file until the run has closed."""
        self._say({"do": "image", "path": str(Path(path).resolve()), "name": name, "step": step, "time": _now()})

    def log_outputs(self, outputs: Mapping[str, str]) -> None:
        """Name what the stage made, path by content hash: a later run that takes it as input is tied to this one."""
        self.set_tags({f"output.{path}": content for path, content in outputs.items()})

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Set tags by name."""
        self._say({"do": "tags", "tags": dict(tags)})

    def close(self, status: str, error: str | None = None) -> None:
        """End the run, and wait until it is in MLflow; when it cannot be, keep it on disk and say so."""
        if self._recorder is None:
            return
        self._say({"do": "close", "status": status, "error": error, "time": _now()})
        if self._recorder.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self._recorder.stdin.close()
        reply = self._reply()
        if "run_id" in reply:
            self._said[0]["run_id"] = reply["run_id"]  # what could not be sent goes on in the same run later
            reply = self._reply()
        if "error" in reply:
            kept = _keep(self._said)
            print(f"{reply['error']} The run is kept in {kept} and will be sent by the next one.", file=sys.stderr)
            self._recorder.kill()
        self._recorder.wait()

    def _say(self, message: Message) -> None:
        self._said.append(message)
        self._send(message)

    def _send(self, message: Message) -> None:
        if self._recorder is None:
            return
        with contextlib.suppress(BrokenPipeError):  # the recorder has given up; close() hears why
            assert self._recorder.stdin is not None
            self._recorder.stdin.write(json.dumps(message) + "\n")
            self._recorder.stdin.flush()

    def _reply(self) -> Message:
        try:
            reply = self._replies.get(timeout=RECORDER_PATIENCE_SECONDS)
        except queue.Empty:
            reply = None
        return reply or {"error": "MLflow did not answer."}


@contextlib.contextmanager
def open_run(
    stage: str,
    params: Mapping[str, Any],
    inputs: Sequence[str],
    pipeline_key: str,
    name: str | None = None,
) -> Iterator[Run]:
    """A run of `stage` below the one run of its pipeline, FAILED with its error when the body raises.

    `inputs` are the paths of what it reads, hashed by content while it works; `pipeline_key` is a hash of all that
    decides the pipeline's result, so that runs belong together by content. Raises BestiaryError at once when the
    database is locked, broken or from another version of MLflow.
    """
    uri = tracking_uri()
    if not switched_off():
        check_database(uri)
    experiment = os.environ.get("DVC_EXP_NAME")
    tags = {
        "stage": stage,
        "pipeline": pipeline_key,
        "python": platform.python_version(),
        "platform": platform.platform(),
        **{package: found for package in ("torch", "diffusers", "peft") if (found := _version(package))},
        **({"dvc_exp": experiment} if experiment else {}),
    }
    opening: Message = {
        "uri": uri,
        "root": str(project_root()),
        "name": name or (f"{stage} {experiment}" if experiment else stage),
        "pipeline_name": experiment or f"pipeline {pipeline_key[:8]}",
        "params": {key: str(value)[:6000] for key, value in params.items()},  # MLflow takes no longer ones
        "tags": tags,
        "inputs": list(inputs),
        "time": _now(),
    }
    run = Run(opening)
    try:
        yield run
    except KeyboardInterrupt:
        run.close("KILLED", "stopped by hand")
        raise
    except BaseException as error:
        run.close("FAILED", str(error) if isinstance(error, BestiaryError) else f"{type(error).__name__}: {error}")
        raise
    run.close("FINISHED")


def check_database(uri: str) -> None:
    """Raise BestiaryError, within seconds and without MLflow, when an SQLite database cannot be written as it is."""
    path = sqlite_path(uri)
    if path is None:
        return
    if not path.is_file():
        if not os.access(path.parent, os.W_OK):
            raise BestiaryError(f"The tracking database {path} cannot be made: its folder cannot be written.")
        return
    try:
        with contextlib.closing(sqlite3.connect(path, timeout=LOCK_PATIENCE_SECONDS, isolation_level=None)) as database:
            database.execute("BEGIN IMMEDIATE")
            revision = database.execute("SELECT version_num FROM alembic_version").fetchone()[0]
            database.execute("ROLLBACK")
    except (sqlite3.Error, TypeError) as error:
        raise BestiaryError(explain(error, uri)) from None
    known, newest = _schema_revisions()
    if revision not in known:
        raise BestiaryError(
            f"The tracking database {path} was written by a newer MLflow than this one ({version('mlflow')}): "
            "install that version, or set MLFLOW_TRACKING_URI to another database."
        )
    if revision != newest:
        raise BestiaryError(
            f"The tracking database {path} was written by an older MLflow: "
            f"keep a copy of it, then run `mlflow db upgrade {uri}`."
        )


def sqlite_path(uri: str) -> Path | None:
    """The file behind an SQLite tracking URI; None for any other store."""
    return Path(uri.removeprefix("sqlite:///")) if uri.startswith("sqlite:///") else None


def _schema_revisions() -> tuple[set[str], str]:
    package = importlib.util.find_spec("mlflow")
    assert package is not None
    assert package.origin is not None
    known, replaced = set(), set()
    for script in (Path(package.origin).parent / "store/db_migrations/versions").glob("*.py"):
        text = script.read_text(encoding="utf-8")
        known.update(re.findall(r"^revision\b.*?=\s*[\"'](\w+)[\"']", text, re.MULTILINE))
        replaced.update(re.findall(r"^down_revision\b.*?=\s*[\"'](\w+)[\"']", text, re.MULTILINE))
    return known, (known - replaced).pop()


def explain(error: BaseException, uri: str) -> str:
    """What went wrong with the store at `uri`, in one sentence and without the password that its address may hold."""
    where = sqlite_path(uri) or re.sub(r"//[^/@]*@", "//", uri)  # without the password that may stand in it
    text = re.sub(r"//[^/@\s]*@", "//", " ".join(str(error).split()))
    if "locked" in text:
        return f"The tracking database {where} is locked: another program holds it; close that one and try again."
    if "not a database" in text or "alembic_version" in text or "malformed" in text or isinstance(error, TypeError):
        return f"{where} is no MLflow database: move it away, and a new one will be made."
    if "disk is full" in text or getattr(error, "errno", None) == errno.ENOSPC:
        return f"No space is left for the tracking database {where}."
    if "Max retries exceeded" in text:
        return f"MLflow at {where} cannot be reached: is it running?"
    return f"MLflow at {where} cannot be used: {text[:300]}."


def _metrics(metrics: Mapping[str, float]) -> dict[str, float]:
    return {re.sub(r"[^\w\-. /:]", "_", key): float(value) for key, value in metrics.items()}


def _now() -> int:
    return int(time.time() * 1000)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _listen(lines: IO[str], heard: queue.Queue[Message | None]) -> None:
    for line in lines:
        with contextlib.suppress(json.JSONDecodeError):
            heard.put(json.loads(line))
    heard.put(None)


# ---- the recorder, in its own process ----


def record() -> None:
    """Read a run's messages from standard input and write them to MLflow."""
    heard: queue.Queue[Message | None] = queue.Queue()
    threading.Thread(target=_listen, args=(sys.stdin, heard), daemon=True).start()
    answer = sys.stdout
    sys.stdout = sys.stderr  # MLflow prints; the pipe back carries answers only
    opening = heard.get()
    if opening is None:
        return

    def reply(**message: str) -> None:
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps(message), file=answer, flush=True)

    try:
        for folder in _unsent(Path(opening["root"])):
            with contextlib.suppress(Exception):  # it stays on disk; what is wrong with MLflow this run will say
                _send_again(folder, opening["uri"])
        _record(opening, heard, reply, watch=True)
    except Exception as error:
        reply(error=explain(error, opening["uri"]))
    os._exit(0)  # all is said and stored; unwinding MLflow's modules would keep the stage waiting


def _record(opening: Message, heard: queue.Queue[Message | None], reply: Any, *, watch: bool) -> None:
    """Write one run. With `watch`, the machine's load is sampled into it meanwhile."""
    import mlflow
    from mlflow.entities import Metric, Param, RunTag
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor
    from PIL import Image

    opening = _with_inputs(opening)
    root = Path(opening["root"])
    client = open_client(opening["uri"], root)
    with locked(opening["uri"]):
        experiment = experiment_id(client, opening["uri"], root)
        pipeline = _pipeline_run(client, experiment, opening)
    recorder = {"host": platform.node(), "recorder": str(os.getpid())}
    tags = opening["tags"] | _source(root) | recorder | {"mlflow.parentRunId": pipeline}
    run = _begun(client, opening.get("run_id"), recorder)
    if run is None:
        run = client.create_run(experiment, start_time=opening["time"], tags=tags, run_name=opening["name"]).info.run_id
    _bury(client, experiment)
    params = [Param(key, value) for key, value in opening["params"].items()]
    client.log_batch(run, params=params)
    client.log_batch(pipeline, params=params)
    client.log_inputs(run, _datasets(opening["tags"]))
    reply(run_id=run)
    monitor = None
    if watch:
        mlflow.set_tracking_uri(opening["uri"])  # the monitor has no other way to learn it
        monitor = SystemMetricsMonitor(run, sampling_interval=SAMPLE_SECONDS, samples_before_logging=1)
        monitor.start()

    waiting: list[Message] = []
    curves: set[str] = set()  # a result of the same name would be one more point at their beginning
    flushed = time.monotonic()
    while True:
        try:
            message = heard.get(timeout=FLUSH_SECONDS)
        except queue.Empty:
            message = {"do": "nothing"}
        if message is not None and message["do"] in ("metrics", "summary"):
            waiting.append(message)
            if time.monotonic() - flushed < FLUSH_SECONDS:
                continue
        flushed = time.monotonic()
        curves.update(name for item in waiting if item["do"] == "metrics" for name in item["values"])
        metrics = [
            Metric(name, value, item["time"], item["step"])
            for item in waiting
            for name, value in item["values"].items()
            if item["do"] == "metrics" or name not in curves
        ]
        for start in range(0, len(metrics), 1000):  # MLflow's limit for one batch
            client.log_batch(run, metrics=metrics[start : start + 1000])
        if results := [item for item in waiting if item["do"] == "summary"]:
            stage = opening["tags"]["stage"]
            client.log_batch(
                pipeline,
                metrics=[
                    Metric(f"{stage}.{name}", value, item["time"], 0)
                    for item in results
                    for name, value in item["values"].items()
                ],
            )
        waiting.clear()
        if message is None:
            message = {"do": "close", "status": "KILLED", "error": "the stage was killed", "time": _now()}
        if message["do"] == "artifact":
            log = client.log_artifacts if Path(message["path"]).is_dir() else client.log_artifact
            log(run, message["path"], message["folder"])
        elif message["do"] == "image":
            with Image.open(message["path"]) as image:
                client.log_image(
                    run, image, key=message["name"], step=message["step"], timestamp=message["time"], synchronous=True
                )
        elif message["do"] == "tags":
            client.log_batch(run, tags=[RunTag(key, value) for key, value in message["tags"].items()])
        elif message["do"] == "close":
            if monitor is not None:
                monitor.finish()
            if message["error"]:
                client.set_tag(run, "error", message["error"][:5000])
            client.set_terminated(run, message["status"], message["time"])
            client.set_terminated(pipeline, message["status"], message["time"])
            reply(done=run)
            return


def _with_inputs(opening: Message) -> Message:
    """The opening with its inputs' content hashes among its tags."""
    hashes = {f"input.{path}": content_hash(Path(path)) for path in opening["inputs"] if Path(path).exists()}
    return opening | {"inputs": [], "tags": opening["tags"] | hashes}


def open_client(uri: str, root: Path) -> Any:
    """MLflow's client of the store at `uri`; makes an SQLite database that is not there yet."""
    # Minutes of silent retries help nobody who waits for a stage; these are MLflow's own switches.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
    path = sqlite_path(uri)
    if path is not None and not path.exists():
        with locked(uri):
            if not path.exists():  # another process may have made it while this one waited
                _make_database(path, root)
    from mlflow.tracking import MlflowClient

    return MlflowClient(uri, os.environ.get("MLFLOW_REGISTRY_URI") or uri)


def _make_database(path: Path, root: Path) -> None:
    """Build the database aside, then move it into place: it is whole or not there.

    MLflow's dozens of migrations wait for the disk after each statement, 13 s in all; nothing needs that of a file
    that is not in use yet.
    """
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore
    from sqlalchemy import event
    from sqlalchemy.engine import Engine

    def hurry(connection: Any, _: Any) -> None:
        connection.execute("PRAGMA synchronous = OFF")
        connection.execute("PRAGMA journal_mode = MEMORY")

    unfinished = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
    event.listen(Engine, "connect", hurry)
    try:
        SqlAlchemyStore(f"sqlite:///{unfinished}", str(root / "mlruns")).engine.dispose()
        with unfinished.open("rb") as file:
            os.fsync(file.fileno())
        unfinished.rename(path)
    finally:
        event.remove(Engine, "connect", hurry)
        unfinished.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(uri: str) -> Iterator[None]:
    """One process at a time, on an SQLite store; a server's own transactions have to do elsewhere."""
    path = sqlite_path(uri)
    if path is None:
        yield
        return
    with path.with_name(f"{path.name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def experiment_id(client: Any, uri: str, root: Path) -> str:
    """The id of the project's experiment in the store at `uri`, which is made when it is not there."""
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(EXPERIMENT)
    if found is None:
        # Said in full: MLflow would put a local store's artifacts below whatever folder it was started in.
        place = str(root / "mlruns") if sqlite_path(uri) else None
        try:
            return str(client.create_experiment(EXPERIMENT, artifact_location=place))
        except MlflowException:  # made by somebody else in this moment
            found = client.get_experiment_by_name(EXPERIMENT)
    return str(found.experiment_id)


def _pipeline_run(client: Any, experiment: str, opening: Message) -> str:
    key = opening["tags"]["pipeline"]
    found = client.search_runs(
        [experiment],
        f"tags.pipeline = '{key}' AND tags.stage = 'pipeline'",
        max_results=1,
        order_by=["attributes.start_time ASC"],
    )
    if found:
        return str(found[0].info.run_id)
    tags = {"stage": "pipeline", "pipeline": key, **_source(Path(opening["root"]))}
    run = client.create_run(experiment, start_time=opening["time"], tags=tags, run_name=opening["pipeline_name"])
    return str(run.info.run_id)


def _begun(client: Any, run: str | None, recorder: Mapping[str, str]) -> str | None:
    """The run that could not be sent to its end, taken over; None when there is none in this store."""
    from mlflow.entities import RunTag
    from mlflow.exceptions import MlflowException

    if run is not None:
        with contextlib.suppress(MlflowException):
            client.log_batch(run, tags=[RunTag(key, value) for key, value in recorder.items()])
            return run
    return None


def _bury(client: Any, experiment: str) -> None:
    """Mark the runs of this machine whose recorder went down with it."""
    running = client.search_runs([experiment], f"attributes.status = 'RUNNING' AND tags.host = '{platform.node()}'")
    for run in running:
        try:
            os.kill(int(run.data.tags["recorder"]), 0)
        except ProcessLookupError:
            client.set_tag(run.info.run_id, "error", "the machine went down")
            client.set_terminated(run.info.run_id, "KILLED")
            client.set_terminated(run.data.tags["mlflow.parentRunId"], "KILLED")
        except PermissionError:
            pass  # somebody else's, and alive


def _source(root: Path) -> dict[str, str]:
    """Git's revision, and whether the files were as it has them; MLflow's UI knows the first tag."""

    def git(*arguments: str) -> str | None:
        answer = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=False)
        return answer.stdout.strip() if answer.returncode == 0 else None

    try:
        revision, changes = git("rev-parse", "HEAD"), git("status", "--porcelain")
    except FileNotFoundError:
        return {}
    return {"mlflow.source.git.commit": revision, "git_dirty": str(bool(changes)).lower()} if revision else {}


def _datasets(tags: Mapping[str, str]) -> list[Any]:
    from mlflow.entities import Dataset, DatasetInput

    return [
        DatasetInput(Dataset(name=key.removeprefix("input."), digest=digest, source_type="local", source=key[6:]))
        for key, digest in tags.items()
        if key.startswith("input.")
    ]


# ---- lineage ----


@dataclass(frozen=True)
class Step:
    """A stage's run on the way to a result: what it read (path, content hash, the stage that made it or None)."""

    stage: str
    run_id: str
    started: str
    git: str
    inputs: list[tuple[str, str, str | None]]


class Runs(Protocol):
    """Where lineage looks runs up."""

    def run(self, run_id: str) -> StoredRun: ...

    def maker(self, experiment_id: str, path: str, content: str) -> StoredRun | None: ...


class Server:
    """Runs by MLflow's client."""

    def __init__(self, client: Any) -> None:
        self.client = client

    def run(self, run_id: str) -> StoredRun:
        """The run of this id."""
        return self._plain(self.client.get_run(run_id))

    def maker(self, experiment_id: str, path: str, content: str) -> StoredRun | None:
        """The last finished run that made this content at this path; None for what no stage makes."""
        found = self.client.search_runs(
            [experiment_id],
            f"tags.`output.{path}` = '{content}' AND attributes.status = 'FINISHED'",
            max_results=1,
            order_by=["attributes.start_time DESC"],
        )
        return self._plain(found[0]) if found else None

    def _plain(self, run: Any) -> StoredRun:
        return StoredRun(run.info.run_id, run.info.experiment_id, run.info.start_time, dict(run.data.tags))


def lineage(runs: Runs, run_id: str) -> list[Step]:
    """The runs that `run_id` rests on, itself first, found by the content of what they made and not by when they ran.

    So the walk passes through a stage that DVC took from its cache: the run that once made that content stands there.
    """
    steps: list[Step] = []
    waiting, seen = [runs.run(run_id)], {run_id}
    while waiting:
        run = waiting.pop(0)
        tags = run.tags
        inputs = []
        for key, content in sorted(tags.items()):
            if key.startswith("input."):
                path = key.removeprefix("input.")
                maker = runs.maker(run.experiment_id, path, content)
                inputs.append((path, content, maker.tags["stage"] if maker else None))
                if maker and maker.run_id not in seen:
                    seen.add(maker.run_id)
                    waiting.append(maker)
        started = datetime.fromtimestamp(run.start_time / 1000, UTC).strftime("%Y-%m-%d %H:%M UTC")
        revision = tags.get("mlflow.source.git.commit", "")[:10]
        changed = " with changes" if tags.get("git_dirty") == "true" else ""
        steps.append(Step(tags["stage"], run.run_id, started, revision + changed, inputs))
    return steps


# ---- runs that could not be sent ----


def _keep(said: list[Message]) -> Path:
    """Put a run's messages and copies of its artifacts aside."""
    folder = Path(said[0]["root"]) / "mlruns" / "unsent" / uuid.uuid4().hex
    unfinished = folder.with_name(f".{folder.name}")
    unfinished.mkdir(parents=True)
    with (unfinished / "messages.jsonl").open("w", encoding="utf-8") as file:
        for number, message in enumerate([_with_inputs(said[0]), *said[1:]]):
            if message.get("do") in ("artifact", "image"):
                source = Path(message["path"])
                copy = unfinished / str(number) / source.name
                copy.parent.mkdir()
                shutil.copytree(source, copy) if source.is_dir() else shutil.copy2(source, copy)
                message = message | {"path": str(folder / str(number) / source.name)}
            file.write(json.dumps(message) + "\n")
    return unfinished.rename(folder)


def _unsent(root: Path) -> list[Path]:
    folder = root / "mlruns" / "unsent"
    return sorted(entry for entry in folder.iterdir() if not entry.name.startswith(".")) if folder.is_dir() else []


def _send_again(folder: Path, uri: str) -> None:
    with (folder / "messages.jsonl").open(encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return  # another recorder is at it
        messages: queue.Queue[Message | None] = queue.Queue()
        opening = json.loads(file.readline())
        _listen(file, messages)
        _record(opening | {"uri": uri}, messages, lambda **_: None, watch=False)
        shutil.rmtree(folder)
