"""The `bestiary` command. Heavy libraries load inside the commands that need them, so that help appears at once."""

from __future__ import annotations

import os
import sys

import click

from bestiary import __version__
from bestiary.commands.adapters import adapter, export_adapter
from bestiary.commands.app import app
from bestiary.commands.drawing import generate
from bestiary.commands.project import animals, captions, compare, estimate_run, learn, preflight, results
from bestiary.commands.registry import lineage, model_card, promote, pull, rollback
from bestiary.commands.tracking import tracking
from bestiary.errors import BestiaryError, system_sentence
from bestiary.libraries import silence_libraries


class Group(click.Group):
    """Commands in the order in which a newcomer needs them."""

    def list_commands(self, _: click.Context) -> list[str]:
        return list(self.commands)


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, message="%(version)s")
def cli() -> None:
    """Teach Stable Diffusion your own animals, and draw them.

    WHAT names an adapter: models:/bestiary@champion, models:/bestiary/3, a folder, a .safetensors file, or none. For
    drawing, add a weight from 0 to 2: WHAT:0.8.
    """


for command in (
    generate,
    pull,
    export_adapter,
    adapter,
    animals,
    captions,
    learn,
    estimate_run,
    preflight,
    results,
    compare,
    model_card,
    app,
    lineage,
    promote,
    rollback,
    tracking,
):
    cli.add_command(command)


def main() -> None:
    """Run the command. A user's mistake ends in one sentence on stderr and a non-zero exit status."""
    silence_libraries()
    try:
        status = cli(standalone_mode=False)
    except click.ClickException as error:
        status = _fail(error.format_message())
    except BestiaryError as error:
        status = _fail(str(error))
    except (click.Abort, KeyboardInterrupt):
        status = _fail("Stopped.", 130)
    except BrokenPipeError:  # `bestiary animals | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 0
    except Exception as error:
        sentence = system_sentence(error)
        if sentence is None:
            raise
        status = _fail(sentence)
    sys.exit(status if isinstance(status, int) else 0)


def _fail(sentence: str, status: int = 1) -> int:
    click.echo(sentence, err=True)
    return status
