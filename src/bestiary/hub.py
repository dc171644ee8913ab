"""The Hugging Face hub: download a model's files or look up their size, and explain errors in one sentence.

Downloads resume: complete files stay in the hub's cache, so running the same command again loses nothing.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Collection, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

import httpx

from bestiary.errors import BestiaryError, shown
from bestiary.files import is_folder

KNOCK_SECONDS = 5.0
AGAIN = "Then run the same command again: finished work is kept."


@dataclass(frozen=True)
class HubModel:
    """A model on the hub, and the files that its loader reads.

    what names it in errors, such as "judge". `weights` are patterns for the same weights in several formats, the
    preferred one first. The first format that the hub has is downloaded.
    """

    what: str
    model: str
    revision: str | None
    files: tuple[str, ...] = ("*.json", "*.txt")  # what transformers reads besides the weights
    weights: tuple[str, ...] = ("model*.safetensors", "pytorch_model*.bin")
    key: str = field(default="", compare=False)  # in params.yaml, for errors


def is_hub_id(model: str) -> bool:
    """Whether a name has the form owner/name and is not a path: no folder here has the owner's name.

    >>> is_hub_id("openai/clip-vit-base-patch32"), is_hub_id("/models/base"), is_hub_id("base")
    (True, False, False)
    """
    path = Path(model)
    return not path.is_absolute() and len(path.parts) == 2 and not is_folder(path.parts[0])


def download(wanted: HubModel) -> Path:
    """The folder of the model's files in the hub's cache. Missing files are downloaded.

    A pinned model that is complete in the cache is used without asking the hub. Raises BestiaryError when the hub
    cannot be reached, does not have the model or its revision, or does not let this user download it.
    """
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    complete = is_complete(wanted)  # then there is nothing to show
    try:
        for patterns in _choices(wanted):
            with _quiet() if complete else nullcontext():
                found = huggingface_hub.snapshot_download(
                    wanted.model, revision=wanted.revision, allow_patterns=list(patterns)
                )
            folder = Path(found)
            if not _missing(patterns, _files(folder)):
                return folder
    except Exception as error:  # the hub's client, its HTTP library and the file system raise different types
        raise explain(error, wanted) from error
    # Without a network, the client returns any part of a model of which it has never listed the files.
    bytes_to_download(wanted)  # raises what is wrong, unless the hub answers again
    raise explain(LocalEntryNotFoundError("only a part"), wanted)


def bytes_to_download(wanted: HubModel) -> int:
    """The bytes that `download` would fetch; 0 when the whole model is on this machine. Raises as `download` does."""
    import huggingface_hub

    if is_complete(wanted):
        return 0
    try:
        if not huggingface_hub.constants.HF_HUB_OFFLINE:
            # Fails fast without a network: the hub's own client would retry for half a minute, for each model.
            httpx.head(huggingface_hub.constants.ENDPOINT, timeout=KNOCK_SECONDS)
        for patterns in _choices(wanted):
            with _quiet():
                found = huggingface_hub.snapshot_download(
                    wanted.model, revision=wanted.revision, allow_patterns=list(patterns), dry_run=True
                )
            missing = _missing(patterns, {file.filename for file in found})
            if not missing:
                return sum(int(file.file_size or 0) for file in found if file.will_download)
    except Exception as error:  # as in `download`
        raise explain(error, wanted) from error
    raise _lacks(wanted, " or ".join(wanted.weights) if missing in wanted.weights else missing)


def is_complete(wanted: HubModel) -> bool:
    """Whether all of the model's files are on this machine, as far as the hub's cache can tell."""
    import huggingface_hub

    for patterns in _choices(wanted):
        try:
            with _quiet():
                found = huggingface_hub.snapshot_download(
                    wanted.model, revision=wanted.revision, allow_patterns=list(patterns), local_files_only=True
                )
        except (OSError, ValueError):
            continue
        if not _missing(patterns, _files(Path(found))):
            return True
    return False


def _files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def _missing(patterns: tuple[str, ...], files: Collection[str]) -> str:
    """The first pattern that no file matches, or an empty string. A model may have no *.txt."""
    for pattern in patterns:
        of_depth = (name for name in files if name.count("/") == pattern.count("/"))
        if pattern != "*.txt" and not any(fnmatchcase(name, pattern) for name in of_depth):
            return pattern
    return ""


def _lacks(wanted: HubModel, file: str) -> BestiaryError:
    return BestiaryError(
        f"The {wanted.what} {shown(wanted.model, 200)} has no {file} on the Hugging Face hub. Choose another model."
    )


def _choices(wanted: HubModel) -> Iterator[tuple[str, ...]]:
    """The patterns to request, one weights format after the other."""
    for weights in wanted.weights:
        yield (*wanted.files, weights)
    if not wanted.weights:
        yield wanted.files


def explain(error: BaseException, wanted: HubModel) -> BestiaryError:
    """Turn an error of the hub's client into one that says what to do."""
    from huggingface_hub import constants, errors

    name = f"The {wanted.what} {shown(wanted.model, 200)}"
    where = f"Check {wanted.key} in params.yaml" if wanted.key else "Check its name"
    found = list(_chain(error))

    def has(*kinds: type[BaseException]) -> bool:
        return any(isinstance(each, kinds) for each in found)

    status = next((each.response.status_code for each in found if isinstance(each, errors.HfHubHTTPError)), None)
    if any(getattr(each, "errno", None) in (errno.ENOSPC, errno.EDQUOT) for each in found):
        return BestiaryError(
            f"{name} does not fit onto the disk of {constants.HF_HUB_CACHE}. Free space, or set HF_HOME to a folder on "
            f"a larger disk. {AGAIN}"
        )
    if any(_is_about_a_file(each) for each in found):
        return BestiaryError(
            f"{name} cannot be downloaded, because {constants.HF_HUB_CACHE} cannot be written. Make this folder "
            f"writable, or set HF_HOME to another one. {AGAIN}"
        )
    if has(errors.GatedRepoError):
        return BestiaryError(
            f"{name} is gated, and the Hugging Face hub does not let you download it. Accept its licence at "
            f"{constants.ENDPOINT}/{wanted.model} and log in with `hf auth login`. {AGAIN}"
        )
    if has(errors.RevisionNotFoundError):
        return BestiaryError(
            f"{name} has no revision {shown(str(wanted.revision))} on the Hugging Face hub. {where}. {AGAIN}"
        )
    if has(errors.RepositoryNotFoundError, errors.HFValidationError) or status in (401, 403):
        return BestiaryError(
            f"{name} is not on the Hugging Face hub, or it is private, or your login has expired. {where}, or log in "
            f"with `hf auth login`. {AGAIN}"
        )
    if has(errors.OfflineModeIsEnabled):
        return BestiaryError(
            f"{name} is not complete on this machine, and HF_HUB_OFFLINE forbids downloading it. Unset that variable, "
            f"or name a local folder. {AGAIN}"
        )
    if status:
        return BestiaryError(
            f"{name} cannot be downloaded: the Hugging Face hub answers HTTP {status}. Wait a few minutes. {AGAIN}"
        )
    return BestiaryError(
        f"{name} is not complete on this machine and cannot be downloaded from the Hugging Face hub "
        f"({type(found[-1]).__name__}). Check the network connection, or name a local folder. {AGAIN}"
    )


def _is_about_a_file(error: BaseException) -> bool:
    """Whether the file system raised this error, and not the network, which raises OSError as well."""
    return isinstance(error, OSError) and error.errno is not None and error.filename is not None


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide the hub client's progress bars and retry messages."""
    from huggingface_hub.utils import logging as hub_logging
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    verbosity, shows_bars = hub_logging.get_verbosity(), not are_progress_bars_disabled()
    hub_logging.set_verbosity(logging.ERROR)
    disable_progress_bars()
    try:
        yield
    finally:
        hub_logging.set_verbosity(verbosity)
        if shows_bars:
            enable_progress_bars()


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and its causes, the root cause last."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__
