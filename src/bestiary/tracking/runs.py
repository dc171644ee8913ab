"""One MLflow run per stage, recorded without slowing the stage down.

Importing MLflow and opening its database takes about three seconds. A separate process, the recorder, does that on
another core and receives the run's messages through a pipe. If the pipe ends without a `Close`, the stage was killed,
and the recorder marks the run as KILLED. A run that cannot be written goes to the outbox; the next run sends it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import platform
import queue
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from bestiary.errors import BestiaryError
from bestiary.files import project_root
from bestiary.tracking import outbox
from bestiary.tracking.addresses import without_secrets
from bestiary.tracking.content import content_hash
from bestiary.tracking.messages import (
    Artifact,
    Close,
    Description,
    Failed,
    Image,
    Message,
    Metrics,
    Opened,
    Opening,
    Reply,
    Summary,
    Tags,
    decode_reply,
    encode,
    now,
    read_lines,
)
from bestiary.tracking.store import check_database, switched_off, tracking_uri

RECORDER_TIMEOUT_SECONDS = 600.0  # for a recorder that hangs; its own timeouts are far shorter
MAX_PARAM_LENGTH = 6000  # MLflow's limit

log = logging.getLogger(__name__)


class Run:
    """An open run. Its methods return at once; everything is in MLflow when `close` returns.

    With BESTIARY_TRACKING=off in the environment nothing is recorded, and the run has no id.
    `close` logs at DEBUG level how many seconds recording has delayed the stage, as the record's `waited_seconds`.
    """

    def __init__(self, opening: Opening) -> None:
        self.waited_seconds = 0.0
        self._opening = opening
        self._messages: list[Message] = []
        self._recorder: subprocess.Popen[str] | None = None
        if switched_off():
            return
        with self._waiting():
            check_database(opening.uri)
            self._recorder = _start_recorder()
            self._replies: queue.Queue[Reply | None] = queue.Queue()
            assert self._recorder.stdout is not None
            arguments = (self._recorder.stdout, decode_reply, self._replies)
            threading.Thread(target=read_lines, args=arguments, daemon=True).start()
            self._write(opening)

    @property
    def id(self) -> str:
        """MLflow's id of the run. Waits until the recorder has created the run.

        Raises BestiaryError when recording is switched off or MLflow cannot be used.
        """
        if self._recorder is None:
            raise BestiaryError("This needs MLflow, but BESTIARY_TRACKING=off disables it. Unset BESTIARY_TRACKING.")
        if self._opening.run_id is None:
            reply = self._next_reply()
            if isinstance(reply, Failed):
                raise BestiaryError(reply.error)
            if isinstance(reply, Opened):
                self._opening = replace(self._opening, run_id=reply.run_id)
        return str(self._opening.run_id)

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log numbers by name. Give a step when they are points of a curve."""
        self._send(Metrics(_valid_metrics(metrics), step or 0, now()))

    def log_summary(self, metrics: Mapping[str, float], headlines: Sequence[str] | None = None) -> None:
        """Log a stage's final results in this run, and the headlines among them as `<stage>.<name>` in the pipeline's.

        This run skips names that were already logged as a curve. No headlines given: the pipeline's run gets all.
        """
        names = None if headlines is None else [_valid_name(name) for name in headlines]
        self._send(Summary(_valid_metrics(metrics), 0, now(), names))

    def describe_pipeline(self, text: str, picture: str) -> None:
        """Set the description of the pipeline's run: Markdown, and a picture by its path among this run's artifacts."""
        self._send(Description(text, picture))

    def log_artifact(self, path: Path | str, folder: str | None = None) -> None:
        """Store a copy of a file, or of the files in a folder. Do not change them until the run has closed."""
        self._send(Artifact(str(Path(path).resolve()), folder))

    def log_image(self, path: Path | str, name: str, step: int) -> None:
        """Store a picture of one step; MLflow shows those of one name as a series.

        Do not change the file until the run has closed.
        """
        self._send(Image(str(Path(path).resolve()), name, step, now()))

    def log_outputs(self, paths: Iterable[str]) -> None:
        """Tag the run with the content hashes of the existing paths that the stage made.

        A later run with one of them as its input is then linked to this run.
        """
        if self._recorder is None:
            return
        with self._waiting():
            hashes = {f"output.{path}": content_hash(Path(path)) for path in paths if Path(path).exists()}
        self.set_tags(hashes)

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Set tags by name."""
        self._send(Tags(dict(tags)))

    def close(self, status: str, error: str | None = None) -> None:
        """End the run and wait until it is in MLflow. If it cannot be written, keep it on disk and print a warning."""
        if self._recorder is None:
            return
        self._send(Close(status, error and without_secrets(error, self._opening.uri), now()))
        assert self._recorder.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._recorder.stdin.close()
        reply = self._next_reply()
        if isinstance(reply, Opened):
            self._opening = replace(self._opening, run_id=reply.run_id)
            reply = self._next_reply()
        with self._waiting():
            if isinstance(reply, Failed):
                self._recorder.kill()
                try:
                    folder = outbox.keep(self._opening, self._messages)
                    place = outbox.folder(Path(self._opening.root))
                    move = "" if folder.parent == place else f" Make space, then move that folder to {place}."
                    print(
                        f"{reply.error} The run is kept in {folder}, and the next run will send it.{move}",
                        file=sys.stderr,
                    )
                except BestiaryError as lost:
                    print(f"{reply.error} {lost}", file=sys.stderr)
            self._recorder.wait()
        waited = {"waited_seconds": self.waited_seconds}
        log.debug("Recording delayed the stage by %.2f s.", self.waited_seconds, extra=waited)

    def _send(self, message: Message) -> None:
        self._messages.append(message)
        if self._recorder is not None:
            with self._waiting():
                self._write(message)

    def _write(self, message: Opening | Message) -> None:
        assert self._recorder is not None
        assert self._recorder.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # the recorder has given up; `close` receives the reason
            self._recorder.stdin.write(encode(message))
            self._recorder.stdin.flush()

    def _next_reply(self) -> Reply:
        with self._waiting():
            try:
                reply = self._replies.get(timeout=RECORDER_TIMEOUT_SECONDS)
            except queue.Empty:
                reply = None
        return reply or Failed("MLflow did not answer.")

    @contextlib.contextmanager
    def _waiting(self) -> Iterator[None]:
        """Count the time that the body takes as time for which recording delays the stage."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.waited_seconds += time.perf_counter() - started


@contextlib.contextmanager
def open_run(
    stage: str,
    params: Mapping[str, object],
    inputs: Sequence[str],
    pipeline_key: str,
    name: str | None = None,
) -> Iterator[Run]:
    """A run of `stage` below the run of its pipeline. If the body raises, the run is FAILED and carries the error.

    `inputs` are the paths that the stage reads; the recorder hashes their content while the stage works.
    `pipeline_key` is a hash of everything that decides the pipeline's result; runs with the same key share a parent.
    Raises BestiaryError at once when the database is locked, damaged or of another version of MLflow.
    """
    experiment = os.environ.get("DVC_EXP_NAME")
    packages = {package: _installed(package) for package in ("torch", "diffusers", "peft")}
    opening = Opening(
        uri=tracking_uri(),
        root=str(project_root()),
        name=name or (f"{stage} {experiment}" if experiment else stage),
        pipeline_name=experiment or f"pipeline {pipeline_key[:8]}",
        params={key: str(value)[:MAX_PARAM_LENGTH] for key, value in params.items()},
        tags={
            "stage": stage,
            "pipeline": pipeline_key,
            "python": platform.python_version(),
            "platform": platform.platform(),
            **{package: found for package, found in packages.items() if found},
            **({"dvc_exp": experiment} if experiment else {}),
        },
        inputs=list(inputs),
        time=now(),
    )
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


def _start_recorder() -> subprocess.Popen[str]:
    package = str(Path(__file__).parents[2])
    search_path = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))
    return subprocess.Popen(
        [sys.executable, "-c", "from bestiary.tracking.recorder import record; record()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=os.environ | {"PYTHONPATH": search_path},
        start_new_session=True,  # Ctrl-C reaches only the stage; the recorder still has to write that down
    )


def _valid_metrics(metrics: Mapping[str, float]) -> dict[str, float]:
    """The metrics under names that MLflow accepts: other characters become underscores."""
    return {_valid_name(key): float(value) for key, value in metrics.items()}


def _valid_name(key: str) -> str:
    return re.sub(r"[^\w\-. /:]", "_", key)


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
