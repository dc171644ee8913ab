"""The commands for registered versions: pull, model-card, lineage, promote and rollback."""

from __future__ import annotations

import json
from pathlib import Path

import click

from bestiary.commands.options import FOLDER, NAME, base_option, champion
from bestiary.errors import BestiaryError, printable
from bestiary.project import known_bases, registered_name


@click.command()
@click.argument("what", metavar="URI", type=NAME)
@base_option
@click.option("--fast", is_flag=True, help="Copy the fast variant instead, to OUT/few_step and OUT/openvino.")
@click.option("--out", required=True, type=FOLDER, help="Folder for the adapter.")
def pull(what: str, base: str | None, fast: bool, out: Path) -> None:
    """Copy a registered adapter to disk and verify it."""
    from bestiary.registry import resolving

    if fast and base:
        raise BestiaryError("The fast variant needs no base. Leave out --base.")
    for path in resolving.pull_fast(what, out) if fast else [resolving.pull(what, out, base, known_bases())]:
        click.echo(path)


@click.command("model-card")
@click.argument("what", metavar="[URI]", type=NAME, default=champion)
@click.option("--out", required=True, type=FOLDER, help="Folder to write, ready for the Hugging Face hub.")
def model_card(what: str, out: Path) -> None:
    """Write a registered adapter with its model card.

    The card has scores, pictures and provenance.
    """
    from bestiary.registry import model_card as card

    for path in card.write(what, out):
        click.echo(path)


@click.command()
@click.argument("what", metavar="[URI]", type=NAME, default=champion)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def lineage(what: str, as_json: bool) -> None:
    """Show the runs and data that made a registered version."""
    from dataclasses import asdict

    from bestiary.registry.versions import walk

    version, steps = walk(what)
    uri = f"models:/{version.name}/{version.version}"
    if as_json:
        click.echo(json.dumps({"version": uri, "aliases": version.aliases, "steps": [asdict(step) for step in steps]}))
        return
    click.echo(f"{uri}{' = ' if version.aliases else ''}{', '.join(version.aliases)}")
    for step in steps:
        git = f"git {step.git}" if step.git else ""
        click.echo("\n" + printable(f"{step.stage:12}{step.started}   run {step.run_id}   {git}".rstrip()))
        for path, content, maker in step.inputs:
            click.echo(printable(f"    {path:40} {content[:10]}   {'from ' + maker if maker else ''}".rstrip()))


def _reason(_context: click.Context, _option: click.Parameter, words: str) -> str:
    if not words.strip():
        raise click.BadParameter("give a reason in a few words.")
    return words.strip()


because_option = click.option(
    "--because", required=True, metavar="WORDS", callback=_reason, help="The reason, stored with the version."
)


@click.command()
@click.argument("version", type=click.IntRange(1))
@because_option
def promote(version: int, because: str) -> None:
    """Make a version the champion by hand."""
    from bestiary.registry import aliases

    chosen = aliases.promote(version, because, registered_name())
    click.echo(f"models:/{chosen.name}/{chosen.version} is now the champion.")


@click.command()
@because_option
def rollback(because: str) -> None:
    """Make the previous champion the champion again."""
    from bestiary.registry import aliases

    chosen = aliases.rollback(because, registered_name())
    click.echo(f"models:/{chosen.name}/{chosen.version} is the champion again.")
