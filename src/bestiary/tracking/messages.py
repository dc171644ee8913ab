"""What a stage and its recorder process send each other: one JSON object per line.

The stage sends an `Opening`, then messages, then a `Close`. The recorder replies `Opened`, then `Done` or `Failed`.
An unsent run is kept on disk in the same form (`mlruns/unsent/*/messages.jsonl`), and a later version of this package
may read it. So do not rename or remove a field of a message, and give a new one a default.
"""

from __future__ import annotations

import json
import queue
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields
from typing import TypeVar


@dataclass(frozen=True)
class Opening:
    """Everything that is known of a run when it starts.

    `root` is the project's folder; `inputs` are paths that are still to be hashed; `time` is in milliseconds since
    1970, as in MLflow. `run_id` is set once the run exists in MLflow, so that an interrupted run resumes.
    """

    uri: str
    root: str
    name: str
    pipeline_name: str
    params: dict[str, str]
    tags: dict[str, str]
    inputs: list[str]
    time: int
    run_id: str | None = None


@dataclass(frozen=True)
class Metrics:
    """Points of curves at one step."""

    values: dict[str, float]
    step: int
    time: int


@dataclass(frozen=True)
class Summary:
    """A stage's final results. `step` is 0. The pipeline's run gets those named in `headlines`; None: all of them."""

    values: dict[str, float]
    step: int
    time: int
    headlines: list[str] | None = None


@dataclass(frozen=True)
class Artifact:
    """A file or a folder to copy into `folder` of the run's artifacts, or to their top level."""

    path: str
    folder: str | None


@dataclass(frozen=True)
class Image:
    """A picture of one step of the series `name`."""

    path: str
    name: str
    step: int
    time: int


@dataclass(frozen=True)
class Tags:
    """Tags to set."""

    tags: dict[str, str]


@dataclass(frozen=True)
class Description:
    """The description of the pipeline's run: Markdown, and a picture by its path among this run's artifacts."""

    text: str
    picture: str


@dataclass(frozen=True)
class Close:
    """The end of a run: FINISHED, FAILED or KILLED, and the error that ended it."""

    status: str
    error: str | None
    time: int


@dataclass(frozen=True)
class Opened:
    """The recorder's reply once the run exists in MLflow."""

    run_id: str


@dataclass(frozen=True)
class Done:
    """The recorder's last reply when the whole run is in MLflow."""


@dataclass(frozen=True)
class Failed:
    """The recorder's last reply when the run, or its rest, cannot be written to MLflow."""

    error: str


Message = Metrics | Summary | Artifact | Image | Tags | Description | Close
Reply = Opened | Done | Failed

MESSAGES: dict[str, type[Message]] = {
    "metrics": Metrics,
    "summary": Summary,
    "artifact": Artifact,
    "image": Image,
    "tags": Tags,
    "description": Description,
    "close": Close,
}
REPLIES: dict[str, type[Reply]] = {"opened": Opened, "done": Done, "failed": Failed}
KEYWORDS = {kind: keyword for keyword, kind in (MESSAGES | REPLIES).items()}

T = TypeVar("T")


def encode(message: Opening | Message | Reply) -> str:
    """One line of JSON, with its line break.

    >>> encode(Tags({"output.data": "1234.dir"}))
    '{"do": "tags", "tags": {"output.data": "1234.dir"}}\\n'
    """
    absent = {field.name for field in fields(message) if field.default is None and getattr(message, field.name) is None}
    content = {name: value for name, value in asdict(message).items() if name not in absent}
    if not isinstance(message, Opening):
        content = {"do": KEYWORDS[type(message)], **content}
    return json.dumps(content) + "\n"


def decode_opening(line: str) -> Opening:
    """The `Opening` of a line that `encode` wrote."""
    return Opening(**json.loads(line))


def decode_message(line: str) -> Message:
    """The message of a line that `encode` wrote."""
    content = json.loads(line)
    return MESSAGES[content.pop("do")](**content)


def decode_reply(line: str) -> Reply:
    """The reply of a line that `encode` wrote."""
    content = json.loads(line)
    return REPLIES[content.pop("do")](**content)


def read_lines(lines: Iterable[str], decode: Callable[[str], T], inbox: queue.Queue[T | None]) -> None:
    """Put what each line holds into `inbox`, and None after the last one.

    Skips lines that are not JSON: a killed process may leave half a line, and a library may print one.
    """
    try:
        for line in lines:
            try:
                inbox.put(decode(line))
            except json.JSONDecodeError:
                continue
    finally:
        inbox.put(None)


def now() -> int:
    """The time in milliseconds since 1970, as MLflow counts it."""
    return int(time.time() * 1000)
