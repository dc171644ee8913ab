"""Read YAML files exactly as DVC does, so that a stage and dvc.lock never differ about a value.

DVC reads YAML 1.2 with ruamel.yaml: there `off` and `yes` are text, `1e-05` is a number and `010` is ten.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from bestiary.errors import BestiaryError, short

MAX_BYTES = 2**20
# After aliases are written out; params.yaml has 300 values on 5 levels. A kilobyte of aliases can stand for gigabytes.
MAX_VALUES, MAX_DEPTH = 20_000, 40

# How a table is written: each entry in one line, in its own order.
WRITTEN = {
    "default_flow_style": None,
    "allow_unicode": True,
    "width": 10_000,
    "sort_base_mapping_type_on_output": False,
}


@dataclass(frozen=True)
class Entry:
    """An entry of a table: its key as written, so that 001 stays "001", its value, and its first line, from 0."""

    key: str
    value: object
    line: int


@dataclass(frozen=True)
class Table:
    """The entries of a file in their order; a key may be there twice. is_inline: all of it is in one pair of braces."""

    entries: Sequence[Entry]
    is_inline: bool = False


def read_yaml(path: Path) -> object:
    """The content of a YAML file.

    Raises FileNotFoundError, or BestiaryError when the file is too large, not UTF-8, no YAML, or holds a key twice.
    """
    from ruamel.yaml import YAML

    text = _read_text(path)
    with _plain_errors(path):
        _check_size(text, path)
        return YAML(typ="safe").load(text)


def read_table(path: Path) -> Table | None:
    """The entries of a YAML file that holds a table; None when it holds something else.

    Raises FileNotFoundError, or BestiaryError when the file is too large, not UTF-8 or no YAML.
    """
    return parse_table(_read_text(path), path)


def parse_table(text: str, path: Path) -> Table | None:
    """The entries of a text that `path` holds or is to hold; see `read_table`."""
    from ruamel.yaml import YAML
    from ruamel.yaml.nodes import MappingNode

    with _plain_errors(path):
        _check_size(text, path)
        node = YAML(typ="safe", pure=True).compose(text)
        if node is None:
            return Table(())
        if not isinstance(node, MappingNode):
            return None
        # A new constructor for each value, because a constructor caches the objects that it made.
        values = [YAML(typ="safe", pure=True).constructor.construct_object(value, deep=True) for _, value in node.value]
    entries = [
        Entry(str(key.value), value, key.start_mark.line) for (key, _), value in zip(node.value, values, strict=True)
    ]
    return Table(entries, bool(node.flow_style))


def format_table(entries: Mapping[str, object]) -> str:
    """A table as YAML with one line for each entry.

    >>> format_table({"my-cat": {"name": "1e-5", "class": "cat"}})
    "my-cat: {name: '1e-5', class: cat}\\n"
    """
    from ruamel.yaml import YAML

    writer, stream = YAML(typ="safe", pure=True), io.StringIO()
    for name, value in WRITTEN.items():  # the attributes have types that some of these values do not have
        setattr(writer, name, value)
    writer.dump(dict(entries), stream)
    return stream.getvalue()


@contextmanager
def _plain_errors(path: Path) -> Iterator[None]:
    """Let the body's errors about the file's text be BestiaryErrors."""
    from ruamel.yaml.error import MarkedYAMLError, YAMLError
    from ruamel.yaml.reader import ReaderError

    try:
        yield
    except MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        problem = " ".join(str(error.problem).split())
        raise BestiaryError(f"{path} is not valid YAML: {line}{problem[:200]}. Correct the line.") from None
    except ReaderError:
        raise BestiaryError(f"{path} is not valid YAML: it has control characters. Remove them.") from None
    except (YAMLError, ValueError) as error:  # ValueError: `!!int abc`
        raise BestiaryError(f"{path} is not valid YAML: {' '.join(str(error).split())[:200]}.") from None
    except RecursionError:
        raise BestiaryError(f"{path} is nested too deeply.") from None


def _read_text(path: Path) -> str:
    with path.open("rb") as file:
        content = file.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise BestiaryError(f"{path} is larger than {MAX_BYTES // 2**20} MiB. Use a smaller file.")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise BestiaryError(f"{path} is not UTF-8. Save it in that encoding.") from None


def _check_size(text: str, path: Path) -> None:
    """Raise BestiaryError when the text has too many levels, or too many values once its aliases are written out."""
    from ruamel.yaml import YAML
    from ruamel.yaml.events import AliasEvent, CollectionEndEvent, CollectionStartEvent, ScalarEvent

    sizes: dict[str, int] = {}  # the number of values behind each anchor
    open_collections: list[tuple[str | None, int]] = []  # the anchor of each, and the number of values before it
    values = 0
    for event in YAML(typ="safe").parse(text):
        if isinstance(event, CollectionStartEvent):
            open_collections.append((event.anchor, values))
            values += 1
        elif isinstance(event, CollectionEndEvent):
            anchor, before = open_collections.pop()
            if anchor:
                sizes[anchor] = values - before
        elif isinstance(event, ScalarEvent):
            values += 1
            if event.anchor:
                sizes[event.anchor] = 1
        elif isinstance(event, AliasEvent):
            if event.anchor not in sizes:
                raise BestiaryError(f"{path}: the alias *{short(event.anchor)[1:-1]} has no value before it.")
            values += sizes[event.anchor]
        if len(open_collections) > MAX_DEPTH:
            raise BestiaryError(f"{path} is nested too deeply.")
        if values > MAX_VALUES:
            raise BestiaryError(
                f"{path} holds more than {MAX_VALUES} values, each alias counted as what it stands for."
            )
