"""The recorder: the process beside a stage that writes the stage's run to MLflow."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import platform
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from bestiary.tracking import outbox
from bestiary.tracking.addresses import shown_address
from bestiary.tracking.messages import (
    Artifact,
    Close,
    Description,
    Done,
    Failed,
    Image,
    Message,
    Metrics,
    Opened,
    Opening,
    Reply,
    Summary,
    Tags,
    decode_message,
    decode_opening,
    encode,
    now,
    read_lines,
)
from bestiary.tracking.store import experiment_id, explain, locked, open_client

if TYPE_CHECKING:
    from mlflow.entities import DatasetInput
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor
    from mlflow.tracking import MlflowClient

FLUSH_SECONDS = 1.0
SYSTEM_METRICS_SECONDS = 10.0
MAX_METRICS_PER_BATCH = 1000  # MLflow's limit
MAX_ERROR_LENGTH = 5000  # MLflow's limit for a tag

Inbox = queue.Queue[Message | None]  # None after the last message


def record() -> None:
    """Write the run that arrives on standard input to MLflow, and reply on standard output. Ends the process.

    Sends unsent runs of the project first.
    """
    replies = sys.stdout
    sys.stdout = sys.stderr  # MLflow prints to stdout, which must carry replies only
    try:
        opening = decode_opening(sys.stdin.readline())
    except json.JSONDecodeError:
        return  # the stage was killed before it had sent a whole line
    inbox: Inbox = queue.Queue()
    threading.Thread(target=read_lines, args=(sys.stdin, decode_message, inbox), daemon=True).start()

    def reply(message: Reply) -> None:
        with contextlib.suppress(BrokenPipeError):
            replies.write(encode(message))
            replies.flush()

    def resend(kept: Opening, messages: Inbox) -> None:
        write_run(replace(kept, uri=opening.uri, root=opening.root), messages)

    try:
        for folder in outbox.unsent(Path(opening.root)):
            with contextlib.suppress(Exception):  # it stays on disk; this run will report what is wrong with MLflow
                outbox.send(folder, resend)
        write_run(opening, inbox, lambda run_id: reply(Opened(run_id)), system_metrics=True)
        reply(Done())
    except Exception as error:
        reply(Failed(explain(error, opening.uri)))
    os._exit(0)  # everything is stored; a normal exit unloads MLflow's modules, and the stage would wait for that


def write_run(
    opening: Opening, inbox: Inbox, on_opened: Callable[[str], None] = lambda _: None, *, system_metrics: bool = False
) -> None:
    """Write one run to MLflow until its `Close` arrives. Calls `on_opened` with the run's id once the run exists.

    An inbox that ends without a `Close` means that the stage was killed. `system_metrics` adds the machine's load.
    """
    writer = RunWriter(opening)
    on_opened(writer.run_id)
    if system_metrics:
        writer.start_system_metrics()
    message: Message | None = None
    while not isinstance(message, Close):
        try:
            message = inbox.get(timeout=FLUSH_SECONDS)
        except queue.Empty:
            writer.flush()
            continue
        if message is None:
            message = Close("KILLED", "the stage was killed", now())
        writer.write(message)


class RunWriter:
    """Writes the messages of one run. Metrics are collected and written in batches."""

    def __init__(self, opening: Opening) -> None:
        """Create the run, or resume it, below the run of its pipeline."""
        from mlflow.entities import Param

        opening = outbox.with_input_hashes(opening)
        root = Path(opening.root)
        self.uri, self.stage = opening.uri, opening.tags["stage"]
        self.client = open_client(opening.uri, root)
        source = _git_tags(root)
        with locked(opening.uri):
            experiment = experiment_id(self.client, opening.uri, root)
            self.pipeline_id = _pipeline_run(self.client, experiment, opening, source)
        host = {"host": platform.node()}
        tags = opening.tags | source | host | {"mlflow.parentRunId": self.pipeline_id}
        run_id = _resumed_run(self.client, opening.run_id, host)
        if run_id is None:
            run = self.client.create_run(experiment, start_time=opening.time, tags=tags, run_name=opening.name)
            run_id = run.info.run_id
        self.run_id = str(run_id)
        self._liveness = Liveness(root, opening.uri, self.run_id)
        _mark_orphaned_runs(self.client, root, opening.uri)
        params = [Param(key, value) for key, value in opening.params.items()]
        self.client.log_batch(self.run_id, params=params)
        self.client.log_batch(self.pipeline_id, params=params)
        self.client.log_inputs(self.run_id, _datasets(opening.tags))
        self._monitor: SystemMetricsMonitor | None = None
        self._pending: list[Metrics | Summary] = []
        self._curves: set[str] = set()
        self._flushed = time.monotonic()

    def start_system_metrics(self) -> None:
        """Log the machine's load to the run until it closes."""
        import mlflow
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        mlflow.set_tracking_uri(self.uri)  # the monitor takes no client
        self._monitor = SystemMetricsMonitor(
            self.run_id, sampling_interval=SYSTEM_METRICS_SECONDS, samples_before_logging=1
        )
        self._monitor.start()

    def write(self, message: Message) -> None:
        """Write one message. Metrics wait for the next flush, which every other message causes."""
        if isinstance(message, (Metrics, Summary)):
            self._pending.append(message)
            if time.monotonic() - self._flushed >= FLUSH_SECONDS:
                self.flush()
            return
        self.flush()
        match message:
            case Artifact() | Image() if not Path(message.path).exists():
                # A full disk kept the run without copies of its artifacts, and they were deleted since.
                self.client.set_tag(self.run_id, f"lost.{Path(message.path).name}", "the file was deleted")
            case Artifact():
                log = self.client.log_artifacts if Path(message.path).is_dir() else self.client.log_artifact
                log(self.run_id, message.path, message.folder)
            case Image():
                self._write_image(message)
            case Tags():
                self._write_tags(message)
            case Description():
                self._describe_pipeline(message)
            case Close():
                self._close(message)

    def flush(self) -> None:
        """Write the pending metrics."""
        from mlflow.entities import Metric

        self._flushed = time.monotonic()
        summaries = [item for item in self._pending if isinstance(item, Summary)]
        self._curves.update(name for item in self._pending if isinstance(item, Metrics) for name in item.values)
        metrics = [
            Metric(name, value, item.time, item.step)
            for item in self._pending
            for name, value in item.values.items()
            if isinstance(item, Metrics) or name not in self._curves  # it would add a point at the start of the curve
        ]
        for start in range(0, len(metrics), MAX_METRICS_PER_BATCH):
            self.client.log_batch(self.run_id, metrics=metrics[start : start + MAX_METRICS_PER_BATCH])
        if summaries:
            results = [
                Metric(f"{self.stage}.{name}", value, item.time, 0)
                for item in summaries
                for name, value in item.values.items()
                if item.headlines is None or name in item.headlines
            ]
            self.client.log_batch(self.pipeline_id, metrics=results)
        self._pending.clear()

    def _write_image(self, message: Image) -> None:
        import PIL.Image

        with PIL.Image.open(message.path, formats=("PNG", "JPEG")) as image:
            self.client.log_image(
                self.run_id, image, key=message.name, step=message.step, timestamp=message.time, synchronous=True
            )

    def _write_tags(self, message: Tags) -> None:
        from mlflow.entities import RunTag

        self.client.log_batch(self.run_id, tags=[RunTag(key, value) for key, value in message.tags.items()])

    def _describe_pipeline(self, message: Description) -> None:
        from urllib.parse import urlencode

        from mlflow.utils.mlflow_tags import MLFLOW_RUN_NOTE

        # Relative to the UI's own address, wherever a server offers it.
        query = urlencode({"path": message.picture, "run_uuid": self.run_id})
        text = f"{message.text}\n\n![The base beside the adapter](get-artifact?{query})\n"
        self.client.set_tag(self.pipeline_id, MLFLOW_RUN_NOTE, text)

    def _close(self, message: Close) -> None:
        if self._monitor is not None:
            self._monitor.finish()
        if message.error:
            self.client.set_tag(self.run_id, "error", message.error[:MAX_ERROR_LENGTH])
        self.client.set_terminated(self.run_id, message.status, message.time)
        self.client.set_terminated(self.pipeline_id, message.status, message.time)
        self._liveness.end()


class Liveness:
    """A locked file that tells other processes that a run's recorder is alive.

    Process ids mean nothing in another container or on another machine. The system releases the lock however the
    recorder ends, and everybody who shares the project's folder can see it. The file holds the store's address.
    """

    def __init__(self, root: Path, uri: str, run_id: str) -> None:
        """Lock the file of a run until `end`, or until the process ends."""
        self.path = running_runs(root) / run_id
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_name(f".{run_id}")  # it gets its name when it is locked
        self._file = temporary.open("w", encoding="utf-8")
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        self._file.write(shown_address(uri))
        self._file.flush()
        temporary.rename(self.path)

    def end(self) -> None:
        """Remove the file."""
        self.path.unlink(missing_ok=True)
        self._file.close()


def running_runs(root: Path) -> Path:
    """The folder with a locked file for each run of the project that is being recorded."""
    return root / ".cache" / "running"


def _mark_orphaned_runs(client: MlflowClient, root: Path, uri: str) -> None:
    """Mark this project's runs as KILLED whose recorder no longer runs, for example after a power failure."""
    from mlflow.exceptions import MlflowException

    for path in running_runs(root).glob("[!.]*"):
        with contextlib.suppress(OSError, MlflowException), path.open("r+", encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # raises while the recorder is alive
            if file.read() != shown_address(uri):
                continue  # a run of another store
            path.unlink()
            run = client.get_run(path.name)
            if run.info.status == "RUNNING":
                client.set_tag(path.name, "error", "the machine went down")
                client.set_terminated(path.name, "KILLED")
                if parent := run.data.tags.get("mlflow.parentRunId"):
                    client.set_terminated(parent, "KILLED")


def _pipeline_run(client: MlflowClient, experiment: str, opening: Opening, source: Mapping[str, str]) -> str:
    """The id of the run that all stages of one pipeline share. Creates the run when it does not exist."""
    key = opening.tags["pipeline"]
    found = client.search_runs(
        [experiment],
        f"tags.pipeline = '{key}' AND tags.stage = 'pipeline'",
        max_results=1,
        order_by=["attributes.start_time ASC"],
    )
    if found:
        return str(found[0].info.run_id)
    tags = {"stage": "pipeline", "pipeline": key, **source}
    run = client.create_run(experiment, start_time=opening.time, tags=tags, run_name=opening.pipeline_name)
    return str(run.info.run_id)


def _resumed_run(client: MlflowClient, run_id: str | None, recorder: Mapping[str, str]) -> str | None:
    """`run_id` when that run is in this store; its tags then name this recorder. None otherwise."""
    from mlflow.entities import RunTag
    from mlflow.exceptions import MlflowException

    if run_id is not None:
        with contextlib.suppress(MlflowException):
            client.log_batch(run_id, tags=[RunTag(key, value) for key, value in recorder.items()])
            return run_id
    return None


def _git_tags(root: Path) -> dict[str, str]:
    """Tags with Git's revision and whether files differ from it. MLflow's UI shows the first one as the source."""

    def git(*arguments: str) -> str | None:
        answer = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=False)
        return answer.stdout.strip() if answer.returncode == 0 else None

    try:
        revision, changes = git("rev-parse", "HEAD"), git("status", "--porcelain")
    except FileNotFoundError:
        return {}  # Git is not installed
    return {"mlflow.source.git.commit": revision, "git_dirty": str(bool(changes)).lower()} if revision else {}


def _datasets(tags: Mapping[str, str]) -> list[DatasetInput]:
    """MLflow's dataset inputs for the tags that name an input's content."""
    from mlflow.entities import Dataset, DatasetInput

    inputs = {key.removeprefix("input."): digest for key, digest in tags.items() if key.startswith("input.")}
    return [
        DatasetInput(Dataset(name=path, digest=digest, source_type="local", source=path))
        for path, digest in inputs.items()
    ]
