"""How an order ends without a picture."""

from __future__ import annotations

import re

from bestiary.errors import BestiaryError

# Sentences of the library that users of the page meet, by the key of their translation. Groups are its values.
SENTENCES = {
    "tooManyTokens": r"This text has (?P<count>\d+) tokens and the base reads (?P<limit>\d+):",
    "lcmBase": r"The scheduler 'lcm' needs a latent consistency model",
    "negativeUnused": r"A negative prompt has no effect without guidance",
    "sameAdapter": r"(?P<first>.+?) and (?P<second>.+?) are the same adapter\.",
    "otherBase": r"(?P<name>.+?) was trained on another base than (?P<model>.+?): on (?P<trained>.+?) with",
}


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


def translation(error: BestiaryError) -> tuple[str, dict[str, str]]:
    """The key of an error's translation and the values in it; an empty key when the page has none.

    >>> translation(BestiaryError("This text has 90 tokens and the base reads 77: 'a cat'. Shorten it."))
    ('tooManyTokens', {'count': '90', 'limit': '77'})
    """
    if isinstance(error, RefusedError):
        return error.key, error.values
    for key, pattern in SENTENCES.items():
        if found := re.match(pattern, str(error)):
            return key, found.groupdict()
    return "", {}
