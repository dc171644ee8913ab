"""Click types and options that several commands share."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from bestiary.errors import BestiaryError, shown
from bestiary.files import check_writable
from bestiary.project import registered_name
from bestiary.samplers import MAX_SIDE, MIN_SIDE, SIDE_STEP

CHAMPION = "models:/bestiary@champion"  # shown in help; the name comes from register.name in params.yaml
Command = Callable[..., None]
Decorator = Callable[[Command], Command]


class _File(click.Path):
    """A path. An empty one is an error: it would mean the current folder."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return super().convert(_filled(self, value, param, ctx), param, ctx)


class _Folder(_File):
    """A folder to write files to. One that cannot be written is an error before any work begins."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        folder = super().convert(value, param, ctx)
        try:
            check_writable(folder)
        except BestiaryError as error:
            self.fail(str(error), param, ctx)
        return folder


class _Name(click.types.StringParamType):
    """A model's or an adapter's name, path or address. An empty one is an error."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return super().convert(_filled(self, value, param, ctx), param, ctx)


def _filled(kind: click.ParamType[Any], value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
    if not str(value).strip():
        kind.fail("It is empty. Name a file, a folder or a model.", param, ctx)
    return value


FILE = _File(path_type=Path)
FOLDER = _Folder(file_okay=False, path_type=Path)
NAME = _Name()


class Size(click.ParamType[tuple[int, int]]):
    """A picture's width and height in pixels, as in 768x512."""

    name = "WIDTHxHEIGHT"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        found = re.fullmatch(r"([0-9]{1,6})\s*[x×*]\s*([0-9]{1,6})", value.strip(), re.IGNORECASE)
        if not found:
            self.fail(f"{shown(value)} is not a size. Write the width and the height in pixels, as in 768x512.")
        width, height = int(found[1]), int(found[2])
        for side in (width, height):
            if not MIN_SIDE <= side <= MAX_SIDE or side % SIDE_STEP:
                self.fail(f"{side} is not a multiple of {SIDE_STEP} between {MIN_SIDE} and {MAX_SIDE}.")
        return width, height


class Number(click.FloatRange):
    """A finite number in a range; click's own type accepts nan."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is not a number.", param, ctx)
        return number


def option_group(name: str, build: Callable[..., object], **options: Decorator) -> Decorator:
    """Several options that reach the command as one argument `name`, made by `build` from their values by name."""

    def decorate(command: Command) -> Command:
        @functools.wraps(command)
        def grouped(*arguments: Any, **values: Any) -> None:  # click passes whatever the command declares
            group = build(**{option: values.pop(option) for option in options})
            command(*arguments, **values, **{name: group})

        decorated: Command = grouped
        for option in reversed(options.values()):
            decorated = option(decorated)
        return decorated

    return decorate


def champion() -> str:
    """The adapter to take when the user names none."""
    return f"models:/{registered_name()}@champion"


base_option = click.option(
    "--base", type=NAME, metavar="MODEL", help="Base to use instead of the one that the adapter names."
)
