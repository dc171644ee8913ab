"""Read YAML files exactly as DVC does, so that a stage and dvc.lock never differ about a value.

DVC reads YAML 1.2 with ruamel.yaml: there `off` and `yes` are text, `1e-05` is a number and `010` is ten.
"""

from __future__ import annotations

from pathlib import Path

from bestiary.errors import BestiaryError, short

MAX_BYTES = 2**20
# After aliases are written out; params.yaml has 300 values on 5 levels. A kilobyte of aliases can stand for gigabytes.
MAX_VALUES, MAX_DEPTH = 20_000, 40


def read_yaml(path: Path) -> object:
    """The content of a YAML file.

    Raises FileNotFoundError, or BestiaryError when the file is too large, not UTF-8, no YAML, or holds a key twice.
    """
    from ruamel.yaml import YAML
    from ruamel.yaml.error import MarkedYAMLError, YAMLError

    text = _read_text(path)
    try:
        _check_size(text, path)
        return YAML(typ="safe").load(text)
    except MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        problem = " ".join(str(error.problem).split())
        raise BestiaryError(f"{path} is not valid YAML: {line}{problem[:200]}.") from None
    except (YAMLError, ValueError) as error:  # ValueError: `!!int abc`
        raise BestiaryError(f"{path} is not valid YAML: {' '.join(str(error).split())[:200]}.") from None
    except RecursionError:
        raise BestiaryError(f"{path} is nested too deeply.") from None


def _read_text(path: Path) -> str:
    with path.open("rb") as file:
        content = file.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise BestiaryError(f"{path} is larger than {MAX_BYTES // 2**20} MiB, which no settings are.")
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
