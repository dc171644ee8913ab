"""The `bestiary` command. Heavy libraries load inside the commands that need them, so that help comes at once."""

from __future__ import annotations

import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from bestiary import __version__
from bestiary.errors import BestiaryError
from bestiary.settings import SAMPLERS, Settings, Usual, finish, read_settings

if TYPE_CHECKING:
    from bestiary.params import Params
    from bestiary.registry import Adapter
    from bestiary.subjects import Subject

CHAMPION = "models:/bestiary@champion"  # where register.name is as it comes
FOLDER = click.Path(file_okay=False, writable=True, path_type=Path)
SCORE_NAMES = {
    "clip_score": "CLIP score",
    "margin": "over the other animals",
    "top1": "animal recognised, %",
    "top5": "in five guesses, %",
    "cmmd": "CMMD (lower is better)",
}


class Group(click.Group):
    """Commands in the order in which a newcomer needs them."""

    def list_commands(self, _: click.Context) -> list[str]:
        return list(self.commands)


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, message="%(version)s")
def cli() -> None:
    """Teach Stable Diffusion your own animals, and draw them.

    WHAT names an adapter: models:/bestiary@champion, models:/bestiary/3, a folder, a .safetensors file, or none.
    """


class Number(click.FloatRange):
    """A finite number in a range; click's own lets nan pass."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is not a number.", param, ctx)
        return number


def _champion() -> str:
    return f"models:/{_registered_name()}@champion"


base_option = click.option("--base", metavar="MODEL", help="Base to use instead of the one that the adapter names.")


def colour_option(name: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    return click.option(f"--{name}", default=1.0, type=Number(0.1, 3), help=f"{name.capitalize()}, 0.1 to 3.")


def _rising(_context: click.Context, _option: click.Parameter, interval: tuple[float, float] | None) -> Any:
    if interval and interval[0] >= interval[1]:
        raise click.BadParameter("the first noise level must be below the second.")
    return interval


@cli.command()
@click.argument("animals", nargs=-1, metavar="[ANIMAL...]")
@click.option("--prompt", metavar="TEXT", help="Draw this text instead of animals.")
@click.option(
    "--like", type=click.Path(path_type=Path), metavar="PNG", help="Make this picture again, by its settings."
)
@click.option(
    "--adapter", "what", default=_champion, show_default=CHAMPION, metavar="WHAT", help="Adapter to draw with."
)
@base_option
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0, 2**63 - 1), help="The first picture's.")
@click.option("--count", default=1, show_default=True, type=click.IntRange(1, 10_000), help="Pictures of each.")
@click.option("--steps", type=click.IntRange(1, 1000), help="Denoising steps.  [default: as evaluated]")
@click.option("--guidance", type=Number(1, 50), help="Guidance scale.  [default: as evaluated]")
@click.option(
    "--guidance-interval",
    "interval",
    type=(Number(0, 1e6), Number(0, 1e6)),
    metavar="LOW HIGH",
    callback=_rising,
    help="Guide the steps between these noise levels only; 0 1000 guides all.  [default: as evaluated]",
)
@click.option("--scheduler", type=click.Choice(list(SAMPLERS)), help="Sampler.  [default: as evaluated]")
@click.option(
    "--resolution", type=click.IntRange(8, 4096), help="Pixels a side.  [default: as evaluated, or the base's]"
)
@colour_option("contrast")
@colour_option("saturation")
@colour_option("brightness")
@click.option("--out", default="pictures", show_default=True, type=FOLDER, help="Folder for them.")
@click.pass_context
def generate(
    context: click.Context,
    animals: tuple[str, ...],
    prompt: str | None,
    like: Path | None,
    what: str,
    base: str | None,
    seed: int,
    count: int,
    steps: int | None,
    guidance: float | None,
    interval: tuple[float, float] | None,
    scheduler: str | None,
    resolution: int | None,
    contrast: float,
    saturation: float,
    brightness: float,
    out: Path,
) -> None:
    """Draw animals, named in English or Chinese. The same seed gives the same picture."""
    from bestiary.subjects import caption

    if prompt is not None and not prompt.strip():
        raise BestiaryError("Name animals, or write a prompt.")
    if [bool(animals), prompt is not None, like is not None].count(True) != 1:
        raise BestiaryError("Name animals, or give one of --prompt and --like.")
    try:
        "".join([*animals, prompt or ""]).encode()
    except UnicodeEncodeError:
        raise BestiaryError("A name or prompt is not written in UTF-8.") from None
    made = read_settings(like) if like else None
    params = _params()
    wanted = list(dict.fromkeys(_find(animal) for animal in animals))
    if made:
        what = _adapter_of(made, like, what, _given(context))
    quiet()
    with _resolving(what) as resolved:
        from tqdm import tqdm

        from bestiary import registry
        from bestiary.diffusion.adapter import adapter_sha256, apply_adapter
        from bestiary.diffusion.base import load_pipeline
        from bestiary.diffusion.sampling import generate as draw
        from bestiary.files import write_atomically

        adapter = resolved()
    sha256 = adapter_sha256(adapter.file) if adapter else None
    if made and sha256 != made.adapter_sha256:
        raise BestiaryError(f"{like} was drawn with another adapter than the one that is now at {what}.")
    if made and not base:
        model, revision = registry.locate_base(made.base), made.base_revision
    elif adapter and not base:
        model, revision = registry.find_base(adapter), adapter.base_revision
    else:
        model, revision = _plain_base(base, params)
    if adapter and not base:
        registry.check_base(adapter, model)
    pipeline = load_pipeline(model, revision)
    if adapter:
        apply_adapter(pipeline, adapter.file)
    if made and like:
        jobs = [(like.stem, made)]
    else:
        usual = (adapter and adapter.usual) or _usual(params)
        # What to draw: the file's name and the prompt.
        texts = [(_file_name(animal.name), caption(animal, usual.template)) for animal in wanted]
        settings = Settings(
            prompt=prompt or "",
            seed=seed,
            steps=steps or usual.steps,
            guidance_scale=guidance or usual.guidance_scale,
            guidance_interval=interval or usual.guidance_interval,
            scheduler=scheduler or usual.scheduler,
            resolution=resolution or usual.resolution or pipeline.unet.config.sample_size * pipeline.vae_scale_factor,
            base=_portable(model),
            base_revision=revision,
            adapter=adapter.uri if adapter else None,
            adapter_sha256=sha256,
            contrast=contrast,
            saturation=saturation,
            brightness=brightness,
        )
        jobs = [
            (f"{name}-{seed + number}", replace(settings, prompt=text, seed=seed + number))
            for name, text in (texts or [("prompt", settings.prompt)])
            for number in range(count)
        ]
    with tqdm(total=sum(job.steps for _, job in jobs), unit="step", leave=False) as bar:

        def step_done(_done: int, _total: int) -> None:
            bar.update()

        for name, job in jobs:
            images = draw(
                pipeline,
                [job.prompt],
                [job.seed],
                steps=job.steps,
                guidance_scale=job.guidance_scale,
                guidance_interval=job.guidance_interval,
                scheduler=job.scheduler,
                batch_size=1,  # in a larger batch the same seed would not give the same last bits
                resolution=job.resolution,
                progress=step_done,
            )
            data = finish(images[0], job)
            path = _free_path(out, name, data)
            write_atomically(path, data)
            bar.write(str(path), file=sys.stdout)


@cli.command()
@click.argument("what", metavar="URI")
@base_option
@click.option("--out", required=True, type=FOLDER, help="Folder for the adapter.")
def pull(what: str, base: str | None, out: Path) -> None:
    """Put a registered adapter, verified, on this disk."""
    quiet()
    from bestiary import registry

    click.echo(registry.pull(what, out, base))


@cli.group()
def adapter() -> None:
    """Prove that an adapter applies; convert it."""


@adapter.command()
@click.argument("what", metavar="PATH")
@base_option
def verify(what: str, base: str | None) -> None:
    """Prove that an adapter applies, and print what was proved."""
    quiet()
    from bestiary import registry
    from bestiary.diffusion.adapter import verify_adapter

    found = registry.resolve(what)
    model = registry.find_base(found, base)
    proof = verify_adapter(found.file, model, None if base else found.base_revision)
    trained_on = {True: "yes", False: f"no, it was trained on {found.base}", None: "the file does not say"}
    for label, value in (
        ("adapter", found.file),
        ("sha256", proof.sha256),
        ("rank, alpha", f"{proof.rank}, {proof.alpha:g}"),
        ("base", model),
        ("trained on this base", trained_on[proof.base_is_the_trained_one]),
        ("weights in place", f"{proof.keys} of {proof.keys}"),
        ("scale 0 gives the base's output", "yes, exactly"),
        ("scale 1 gives another", "yes"),
        ("a reload gives the same", "yes, exactly"),
    ):
        click.echo(f"{label:32} {value}")


@adapter.command()
@click.argument("source", metavar="SRC", type=click.Path(path_type=Path))
@click.argument("target", metavar="DST", type=click.Path(path_type=Path))
@click.option("--to", required=True, type=click.Choice(["diffusers", "kohya"]), help="Format to write.")
@click.option("--alpha", type=Number(0, min_open=True), help="Alpha of a file that does not store its own.")
def convert(source: Path, target: Path, to: Literal["diffusers", "kohya"], alpha: float | None) -> None:
    """Write an adapter in another format; reads diffusers, PEFT, kohya and the original system's files."""
    quiet()
    from bestiary.diffusion import conversion

    if source.resolve() == target.resolve():
        raise BestiaryError(f"{target} would be written over itself: name another place.")
    click.echo(conversion.convert(source, target, to, alpha))


@cli.command()
def animals() -> None:
    """List the 100 animals: class folder, English name, Chinese name."""
    from bestiary.subjects import ANIMALS

    for animal in ANIMALS:
        click.echo(f"{animal.folder:16}{animal.name:16}{animal.chinese}")


@cli.command()
def results() -> None:
    """Show what the last `dvc repro` reached."""
    from bestiary.files import project_root

    root = project_root()
    evaluation, registration = (_report(root, name) for name in ("evaluate", "register"))
    try:
        lines = list(_told(root, evaluation, registration))
    except (LookupError, TypeError, ValueError, AttributeError):
        folder = _short(root / "reports")
        raise BestiaryError(
            f"{folder}/evaluate.json or {folder}/register.json is damaged: delete it and run `dvc repro`."
        ) from None
    click.echo("\n".join(lines))


def _told(root: Path, evaluation: Mapping[str, Any], registration: Mapping[str, Any]) -> Iterator[str]:
    yield f"The judge on {evaluation['images']} pictures by the base and by the adapter, same prompts, same seeds:\n"
    yield f"{'':24}{'base':>8}{'adapter':>10}{'difference':>13}   95 % interval{'real pictures':>20}"
    for score, label in SCORE_NAMES.items():
        if score not in evaluation["delta"]:  # a report from before there was this score
            continue
        base, with_adapter, delta, real = (evaluation[who][score] for who in ("base", "adapter", "delta", "real"))
        interval = "{:+.2f} to {:+.2f}".format(*delta["ci95"])
        yield (
            f"{label:24}{base['mean']:8.2f}{with_adapter['mean']:10.2f}{delta['mean']:+13.2f}   {interval:17}"
            f"{real['mean']:16.2f}"
        )
    program = _program()
    aliases = f" ({', '.join(registration['aliases'])})" if registration["aliases"] else ""
    yield f"\nLook      {_short(root / 'reports' / 'evaluate' / 'sheet.png')}: the base beside the adapter"
    yield f"Version   models:/{registration['name']}/{registration['version']}{aliases}"
    for reason in registration["reasons"]:
        yield f"          {reason}"
    yield "\nNext"
    for command, purpose in (
        (f"{program} generate tiger panda --count 4", "draw with it"),
        ("make mlflow", "see every run in the browser"),
        (f"{program} pull models:/{registration['name']}@champion --out my-adapter", "take it along"),
    ):
        yield f"  {command:70}{purpose}"


@cli.command("model-card")
@click.argument("what", metavar="[URI]", default=_champion)
@click.option("--out", required=True, type=FOLDER, help="Folder for it, as the hub takes it.")
def model_card(what: str, out: Path) -> None:
    """Write a registered adapter with its model card: scores, pictures, provenance."""
    quiet()
    from bestiary import card

    for path in card.write(what, out):
        click.echo(path)


@cli.command()
@click.option("--adapter", "adapters", multiple=True, metavar="WHAT", help="File or folder to offer, too; repeatable.")
@click.option("--base", "bases", multiple=True, metavar="MODEL", help="Base to offer; the first is the default.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on; others need a password.")
@click.option("--port", default=7860, show_default=True, type=click.IntRange(0, 65535), help="Port to listen on.")
@click.option("--auth", type=click.Path(path_type=Path), metavar="FILE", help="Password file, else $BESTIARY_AUTH.")
def app(adapters: tuple[str, ...], bases: tuple[str, ...], host: str, port: int, auth: Path | None) -> None:
    """Draw in the browser."""
    quiet()
    from bestiary.app.access import read_credentials
    from bestiary.app.server import launch
    from bestiary.app.studio import Base, Offerings
    from bestiary.diffusion.adapter import adapter_file
    from bestiary.files import project_root
    from bestiary.registry import locate_base

    params = _params()
    model, revision = _plain_base(bases[0] if bases else None, params)
    for named in adapters:
        adapter_file(named)
    offerings = Offerings(
        bases=(Base(model, revision), *(Base(locate_base(named)) for named in bases[1:])),
        adapters=(str(project_root() / "models" / "adapter"), *adapters),
        registered_name=params.register_.name if params else Offerings.registered_name,
        defaults=_usual(params),
    )
    launch(
        offerings,
        host=host,
        port=port,
        auth=read_credentials(auth),
        ready=lambda address: click.echo(f"Open {address} in a browser; Ctrl-C stops it."),
    )


@cli.command()
@click.argument("what", metavar="[URI]", default=_champion)
@click.option("--json", "as_json", is_flag=True, help="Print it as JSON.")
def lineage(what: str, as_json: bool) -> None:
    """Show which runs and which data a registered version comes from."""
    from dataclasses import asdict

    from bestiary import registry

    version, steps = registry.walk(what)
    uri = f"models:/{version.name}/{version.version}"
    if as_json:
        click.echo(json.dumps({"version": uri, "aliases": version.aliases, "steps": [asdict(step) for step in steps]}))
        return
    click.echo(f"{uri}{' = ' if version.aliases else ''}{', '.join(version.aliases)}")
    for step in steps:
        click.echo(
            f"\n{step.stage:12}{step.started}   run {step.run_id}   {'git ' + step.git if step.git else ''}".rstrip()
        )
        for path, content, maker in step.inputs:
            click.echo(f"    {path:40} {content[:10]}   {'from ' + maker if maker else ''}".rstrip())


def _reason(_context: click.Context, _option: click.Parameter, words: str) -> str:
    if not words.strip():
        raise click.BadParameter("say why, in a few words.")
    return words.strip()


because_option = click.option(
    "--because", required=True, metavar="WORDS", callback=_reason, help="The reason, kept with the version."
)


@cli.command()
@click.argument("version", type=click.IntRange(1))
@because_option
def promote(version: int, because: str) -> None:
    """Make a version the champion by hand."""
    from bestiary import registry

    chosen = registry.promote(version, because, _registered_name())
    click.echo(f"models:/{chosen.name}/{chosen.version} is the champion now.")


@cli.command()
@because_option
def rollback(because: str) -> None:
    """Make the champion before this one the champion again."""
    from bestiary import registry

    chosen = registry.rollback(because, _registered_name())
    click.echo(f"models:/{chosen.name}/{chosen.version} is the champion again.")


@cli.group()
def tracking() -> None:
    """Look after the MLflow runs."""


@tracking.command()
@click.argument("server", envvar="MLFLOW_TRACKING_URI", metavar="[SERVER]")
@click.option("--database", type=click.Path(path_type=Path), metavar="FILE", help="Other database than the project's.")
def migrate(server: str, database: Path | None) -> None:
    """Copy the local runs and registered versions to a team's MLflow server; $MLFLOW_TRACKING_URI when not given."""
    from bestiary.files import project_root
    from bestiary.migration import migrate as copy

    done = copy(database or project_root() / "mlflow.db", server)
    already = f", {done.runs_there_already} were there already" if done.runs_there_already else ""
    click.echo(f"{done.runs} runs copied{already}.")
    for here, there in done.versions.items():
        click.echo(f"models:/{here} is version {there} there.")


def main() -> None:
    """Run the command; what a user caused ends in one sentence and a non-zero status."""
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
    sys.exit(status if isinstance(status, int) else 0)


def _fail(sentence: str, status: int = 1) -> int:
    click.echo(sentence, err=True)
    return status


def quiet() -> None:
    """Keep the libraries' advice to developers off a user's screen."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")


def _params() -> Params | None:
    """The project's parameters; None outside a project."""
    from bestiary.files import project_root
    from bestiary.params import load_params

    path = project_root() / "params.yaml"
    return load_params(path) if path.is_file() else None


def _registered_name() -> str:
    params = _params()
    return params.register_.name if params else "bestiary"


def _usual(params: Params | None) -> Usual:
    """How to draw what no registered version says it of: as this project evaluates."""
    return Usual.of(params.evaluate) if params else Usual()


def _plain_base(base: str | None, params: Params | None) -> tuple[str, str | None]:
    from bestiary.registry import locate_base

    if base:
        return locate_base(base), None
    if params is None:
        raise BestiaryError("There is no params.yaml here that names a base: name one with --base.")
    return locate_base(params.base.model), params.base.revision


def _portable(base: str) -> str:
    """A base's name that means the same in another clone: a folder of the project by its path from the root."""
    from bestiary.files import project_root

    root = project_root().resolve()
    folder = Path(base)
    inside = folder.is_dir() and folder.is_relative_to(root)
    return f"./{folder.relative_to(root).as_posix()}" if inside else base


def _find(name: str) -> Subject:
    """The animal of this name; one outside the 100 comes with a hint on the screen."""
    from bestiary.subjects import find_subject

    animal, near = find_subject(name)
    if not animal.name:
        raise BestiaryError("An animal needs a name.")
    if near is not None:
        meant = f" Did you mean {' or '.join(near)}?" if near else ""
        shown = animal.name if len(animal.name) <= 60 else f"{animal.name[:60]}…"
        click.echo(f"{shown} is none of the 100 animals, so it is drawn as written.{meant}", err=True)
    return animal


def _file_name(name: str) -> str:
    """A name that every disk takes: letters and digits of any script, joined by hyphens."""
    return re.sub(r"[\W_]+", "-", name.lower()).strip("-")[:60] or "picture"


@contextmanager
def _resolving(what: str) -> Iterator[Callable[[], Adapter | None]]:
    """Find an adapter, where that takes MLflow in a process beside this one, which imports torch meanwhile.

    Yields a function that waits for the adapter; what it raises is what `registry.resolve` raised.
    """
    from bestiary.registry import needs_mlflow

    if not needs_mlflow(what):
        adapter = None if what == "none" else _resolve(what)
        yield lambda: adapter
        return
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import get_context

    with ProcessPoolExecutor(1, get_context("spawn"), _leave_interrupts_to_the_parent) as beside:
        yield beside.submit(_resolve, what).result


def _leave_interrupts_to_the_parent() -> None:
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _resolve(what: str) -> Adapter:
    from bestiary import registry

    return registry.resolve(what)


def _report(root: Path, stage: str) -> dict[str, Any]:
    path = root / "reports" / f"{stage}.json"
    try:
        report: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BestiaryError(f"There are no results yet ({_short(path)} does not exist): run `dvc repro`.") from None
    except ValueError:
        raise BestiaryError(f"{_short(path)} is damaged: delete it and run `dvc repro`.") from None
    return report


def _free_path(folder: Path, stem: str, data: bytes) -> Path:
    """`folder/stem.png`, numbered where another picture has that name; the same picture keeps its name."""
    path, number = folder / f"{stem}.png", 1
    while path.exists() and not (path.is_file() and path.read_bytes() == data):
        number += 1
        path = folder / f"{stem}-{number}.png"
    return path


def _given(context: click.Context) -> dict[str, str]:
    """The options on the command line, the way they are written, by parameter."""
    typed = click.core.ParameterSource.COMMANDLINE
    return {
        option.name: option.opts[0]
        for option in context.command.params
        if option.name and context.get_parameter_source(option.name) is typed
    }


def _adapter_of(made: Settings, like: Path | None, what: str, given: dict[str, str]) -> str:
    """The adapter to draw a picture again with. Raises BestiaryError for options that would be passed over."""
    idle = [option for name, option in given.items() if name not in ("like", "what", "base", "out")]
    if idle:
        raise BestiaryError(f"--like repeats the picture's own settings: leave out {', '.join(idle)}.")
    if "what" in given:
        return what
    named = made.adapter or "none"
    if named != "none" and not named.startswith("models:") and not Path(named).exists():
        raise BestiaryError(f"{like} was drawn with {named}, which is not here: say where it is with --adapter.")
    return named


def _short(path: Path) -> str:
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)


def _program() -> str:
    """How to call this program from the user's shell; below make, PATH is the Makefile's."""
    import shutil

    started = Path(sys.argv[0]).absolute()
    found = shutil.which("bestiary")
    by_name = found and Path(found).resolve() == started.resolve() and "MAKELEVEL" not in os.environ
    return "bestiary" if by_name else _short(started)
