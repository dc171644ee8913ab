"""The commands for a project: its animals and captions, a run from photos to a result, and results to compare."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from bestiary.commands.options import FILE, Number
from bestiary.errors import printable
from bestiary.project import (
    last_acceptance,
    last_results,
    project_captions,
    render_results,
    short_path,
    write_project_captions,
)

if TYPE_CHECKING:
    from bestiary.subjects import Kind


@click.command()
def animals() -> None:
    """List the 100 animals.

    Prints the class folder, the English name and the Chinese name of each.
    """
    from bestiary.subjects import ANIMALS

    for animal in ANIMALS:
        click.echo(f"{animal.folder:16}{animal.name:16}{animal.chinese}")


@click.command()
@click.option(
    "--write",
    is_flag=True,
    help="Write captions for images without one, with the captioning model of params.yaml (captioner).",
)
def captions(write: bool) -> None:
    """Show each image's caption before training.

    Also shows token counts and warnings. Needs `dvc repro clean` first.
    """
    from tqdm import tqdm

    for line in write_project_captions() if write else project_captions():
        tqdm.write(printable(line), file=sys.stdout)


@click.command()
@click.argument("photos", type=FILE)
@click.option("--name", required=True, help="Name of the subject in captions and prompts, such as 'sks cat'.")
@click.option("--class", "class_word", default="", metavar="WORD", help="Class of the subject, such as cat.")
@click.option(
    "--kind",
    type=click.Choice(["thing", "style"]),
    default="thing",
    show_default=True,
    help="Whether the subject is a thing or a style.",
)
@click.option(
    "--others",
    type=FILE,
    help="Folder with photos of other individuals of the class, to compare with.",
)
@click.option("--steps", type=click.IntRange(1), help="Training steps.  [default: the profile's]")
@click.option("--profile", help="Profile in params.yaml.  [default: photos on a GPU, else subject]")
@click.option("--replace", is_flag=True, help="Move other data in data/ to put-aside/.")
def learn(
    photos: Path,
    name: str,
    class_word: str,
    kind: Kind,
    others: Path | None,
    steps: int | None,
    profile: str | None,
    replace: bool,
) -> None:
    """Teach one subject from a folder of PHOTOS.

    Puts them into data/, runs the pipeline and shows the result. Run it again to resume.
    """
    from bestiary import learning

    lesson = learning.Lesson(photos, name, class_word, kind, steps, profile, replace, others)
    if not learning.learn(lesson, lambda line: click.echo(printable(line)), learning.estimate_plan):
        click.echo("This has been done already.")
    evaluation, registration = last_results()
    click.echo("\n".join(render_results(evaluation, registration, _program(), last_acceptance(evaluation))))


@click.command("estimate")
@click.option("--profile", help="Profile in params.yaml.  [default: the one chosen there]")
def estimate_run(profile: str | None) -> None:
    """Estimate the time, memory and disk of a run.

    Measures a few steps on this machine.
    """
    from bestiary.estimating import project_estimate
    from bestiary.files import find_project, no_project_error
    from bestiary.learning import params_with_profile

    root = find_project()
    if root is None:
        raise no_project_error()
    for line in project_estimate(root, params_with_profile(root, profile)):
        click.echo(printable(line))


@click.command()
@click.option("--profile", help="Profile in params.yaml.  [default: the one chosen there]")
@click.option(
    "--hours", default=24.0, show_default=True, type=Number(0, min_open=True), help="Longest acceptable run, in hours."
)
@click.pass_context
def preflight(context: click.Context, profile: str | None, hours: float) -> None:
    """Find problems before a long run.

    Checks device, models, services, memory, disk and time. Exits with 1 if the run would fail.
    """
    from bestiary.files import find_project, no_project_error
    from bestiary.learning import params_with_profile
    from bestiary.preflight import checks

    root = find_project()
    if root is None:
        raise no_project_error()
    failed = False
    for check in checks(root, params_with_profile(root, profile), hours):
        click.echo(printable(str(check)))
        failed = failed or check.mark == "FAIL"
    if failed:
        context.exit(1)


@click.command()
def results() -> None:
    """Show the results of the last `dvc repro`."""
    evaluation, registration = last_results()
    click.echo("\n".join(render_results(evaluation, registration, _program(), last_acceptance(evaluation))))


@click.command()
@click.argument("revisions", nargs=-1, metavar="[REV...]")
def compare(revisions: tuple[str, ...]) -> None:
    """Compare results with those of other revisions.

    REV is a commit, a tag, a branch or an experiment. The default is the last commit and its experiments. Shows the
    settings that differ, and the results that matter.
    """
    import shutil

    from bestiary.comparing import read_revisions, render
    from bestiary.files import project_root

    for line in render(read_revisions(project_root(), revisions), shutil.get_terminal_size().columns):
        click.echo(line)


def _program() -> str:
    """How the user's shell starts this program; below make, PATH is the Makefile's."""
    import shutil

    started = Path(sys.argv[0]).absolute()
    found = shutil.which("bestiary")
    by_name = found and Path(found).resolve() == started.resolve() and "MAKELEVEL" not in os.environ
    return "bestiary" if by_name else short_path(started)
