"""How an order ends without a picture."""

from __future__ import annotations

import logging
import re
from pathlib import Path

from bestiary.errors import BestiaryError
from bestiary.files import is_folder

log = logging.getLogger(__name__)

RETRY_SECONDS = 5  # wait before retrying a request for which there was no room

# The library's errors that the page translates, by the key of the translation. Groups are the translation's values.
SENTENCES = {
    "tooManyTokens": r"This text has (?P<count>\d+) tokens and the base reads (?P<limit>\d+):",
    "lcmBase": r"The scheduler 'lcm' needs a latent consistency model",
    "negativeUnused": r"A negative prompt has no effect without guidance",
    "loraInPrompt": r"(?P<tag><lora:.*) in a prompt chooses no adapter here",
    "sameAdapter": r"(?P<first>.+?) and (?P<second>.+?) are the same adapter\.",
    "containsAdapter": r"(?P<outer>.+?) already contains (?P<inner>.+?), which would count twice\.",
    "shareAdapter": r"(?P<first>.+?) and (?P<second>.+?) contain the same adapter, which would count twice\.",
    "otherBase": r"(?P<name>.+?) was trained on another base than (?P<model>.+?): on (?P<trained>.+?) with",
}

# An absolute path, alone or in the address of a database. Registry URIs and relative paths do not match.
PATH_START = re.compile(r"(?:(?:sqlite|file):/{2,3}|(?<![\w.:~/-]))/")
ABSOLUTE_PATH = re.compile(PATH_START.pattern + r"(?:[^\s/'\"`,;:()]+/)+[^\s/'\"`,;()]*")
MAX_PATH = 4096  # characters of a path on Linux


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


class InvalidError(BestiaryError):
    """A request that cannot be fulfilled as it is; `field` names the part of it that is wrong, if it is one part."""

    def __init__(self, sentence: str, status: int = 422, field: str | None = None) -> None:
        super().__init__(sentence)
        self.status = status
        self.field = field


def without_machine_paths(sentence: str) -> str:
    """The sentence with each absolute path shortened to the name of its file or folder.

    >>> without_machine_paths("The file of models:/bestiary/1 has changed: /srv/art/m-1/lora.safetensors. Restore it.")
    'The file of models:/bestiary/1 has changed: lora.safetensors. Restore it.'
    >>> without_machine_paths("There is no registry: sqlite:////srv/mlflow.db and ./models/base do not exist.")
    'There is no registry: mlflow.db and ./models/base do not exist.'
    """
    return ABSOLUTE_PATH.sub(lambda found: Path(found[0]).name, _with_plain_folders(sentence))


def _with_plain_folders(sentence: str) -> str:
    """The sentence with the existing folders of each absolute path replaced by `/_`.

    A folder's name may contain spaces and brackets, so only the disk says where it ends in a sentence.
    """
    position = 0
    while found := PATH_START.search(sentence, position):
        start = found.end() - 1
        slashes = [start + each.start() for each in re.finditer("/", sentence[start : start + MAX_PATH])]
        end = next((slash for slash in reversed(slashes[1:]) if is_folder(sentence[start:slash])), None)
        if end is not None:
            sentence = f"{sentence[:start]}/_{sentence[end:]}"
        position = start + 1
    return sentence


def public_sentence(error: BestiaryError) -> str:
    """The error message that users of the page and programs may see.

    The log gets the whole message if it names a path, because whoever runs the server needs it.
    """
    sentence = _public(error)
    if sentence != str(error):
        log.warning("%s", error)
    return sentence


def _public(error: BestiaryError) -> str:
    # Refusals by the page itself quote only what the user sent, so they are not changed.
    is_ours = isinstance(error, RefusedError | InvalidError)
    return str(error) if is_ours else without_machine_paths(str(error))


def status_of(error: BestiaryError) -> int:
    """The HTTP status of a request that ends with this error.

    >>> status_of(InvalidError("There is no such adapter.", 404)), status_of(BestiaryError("The prompt is empty."))
    (404, 422)
    """
    return error.status if isinstance(error, RefusedError | InvalidError) else 422


def retry_headers(status: int) -> dict[str, str]:
    """The headers that tell a client when to try a refused request again, if that helps.

    >>> retry_headers(429), retry_headers(422)
    ({'Retry-After': '5'}, {})
    """
    return {"Retry-After": str(RETRY_SECONDS)} if status in (429, 503) else {}


def translation(error: BestiaryError) -> tuple[str, dict[str, str]]:
    """The key of an error's translation and the values in it; an empty key when the page has none.

    >>> translation(BestiaryError("This text has 90 tokens and the base reads 77: 'a cat'. Shorten it."))
    ('tooManyTokens', {'count': '90', 'limit': '77'})
    """
    if isinstance(error, RefusedError):
        return error.key, error.values
    for key, pattern in SENTENCES.items():
        if found := re.match(pattern, _public(error)):
            return key, found.groupdict()
    return "", {}
