"""What happens to an order while it is drawn, as the page learns of it: one JSON object per line."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import ClassVar, Literal

from bestiary.app.errors import public_sentence, translation
from bestiary.errors import BestiaryError

Role = Literal["adapter", "base"]


@dataclass(frozen=True)
class Waiting:
    """Other orders are drawn first."""

    event: ClassVar = "waiting"
    ahead: int


@dataclass(frozen=True)
class Loading:
    """The base is loaded into memory."""

    event: ClassVar = "loading"


@dataclass(frozen=True)
class Note:
    """The animal is not one of the 100, so it is drawn as written; `near` lists similar names."""

    event: ClassVar = "note"
    unknown: str
    near: tuple[str, ...]


@dataclass(frozen=True)
class Progress:
    """How many of the order's steps are done, over all its pictures."""

    event: ClassVar = "progress"
    done: int
    total: int
    seconds_left: float


@dataclass(frozen=True)
class Preview:
    """What the picture looks like after the current step."""

    event: ClassVar = "preview"
    role: Role
    image: str  # a data URI


@dataclass(frozen=True)
class Picture:
    """A finished picture."""

    event: ClassVar = "picture"
    role: Role
    image: str  # a data URI; the PNG carries the settings too
    settings: Mapping[str, object]  # `PictureSettings.to_dict`
    parameters: str  # the settings in A1111's text form
    animal: str  # empty when the order's prompt was drawn instead
    device: str


@dataclass(frozen=True)
class Done:
    """Every picture of the order is drawn."""

    event: ClassVar = "done"


@dataclass(frozen=True)
class Failed:
    """The order was refused or failed. With a key, the page shows its own translation instead of the message."""

    event: ClassVar = "error"
    message: str
    key: str = ""
    values: Mapping[str, str] = field(default_factory=dict)

    @staticmethod
    def by(error: BestiaryError) -> Failed:
        """The event that tells the page of an error.

        >>> from bestiary.app.errors import RefusedError
        >>> Failed.by(RefusedError("noDevice", "There is no device {device} here.", device="cuda"))
        Failed(message='There is no device cuda here.', key='noDevice', values={'device': 'cuda'})
        """
        return Failed(public_sentence(error), *translation(error))


Event = Waiting | Loading | Note | Progress | Preview | Picture | Done | Failed


def to_json(event: Event) -> str:
    """The event as one line for the page.

    >>> to_json(Waiting(ahead=2))
    '{"event": "waiting", "ahead": 2}'
    """
    return json.dumps({"event": event.event, **asdict(event)})
