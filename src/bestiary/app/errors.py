"""How an order ends without a picture."""

from __future__ import annotations

from bestiary.errors import BestiaryError


class Stopped(Exception):  # noqa: N818, because nothing went wrong
    """The browser that ordered the picture closed or cancelled."""


class RefusedError(BestiaryError):
    """A refusal that the page shows in its own language.

    `texts.js` holds the Chinese sentence under the same `key`, with the same `{placeholders}` for `values`.
    `status` is the HTTP status of a request that is refused with it.
    """

    def __init__(self, key: str, sentence: str, status: int = 422, **values: str) -> None:
        super().__init__(sentence.format(**values))
        self.key = key
        self.values = values
        self.status = status
