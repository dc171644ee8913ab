"""`bestiary app`: the web page and the images APIs."""

from __future__ import annotations

from pathlib import Path

import click

from bestiary.commands.options import FILE, NAME
from bestiary.project import (
    drawing_defaults,
    project_base,
    project_params,
    project_tiny_decoder,
    registered_name,
)


@click.command()
@click.option(
    "--adapter",
    "adapters",
    multiple=True,
    type=NAME,
    metavar="WHAT",
    help="File or folder to offer as well. Repeat for several.",
)
@click.option(
    "--base",
    "bases",
    multiple=True,
    type=NAME,
    metavar="MODEL",
    help="Base to offer. Repeat for several; the first is the default.",
)
@click.option(
    "--host", default="127.0.0.1", show_default=True, help="Address to listen on. Any other one needs a password."
)
@click.option("--port", default=7860, show_default=True, type=click.IntRange(0, 65535), help="Port to listen on.")
@click.option(
    "--auth",
    type=FILE,
    metavar="FILE",
    help="File with user:password.  [default: $BESTIARY_AUTH]",
)
@click.option(
    "--token",
    type=FILE,
    metavar="FILE",
    help="File with the token for programs.  [default: $BESTIARY_TOKEN]",
)
def app(
    adapters: tuple[str, ...], bases: tuple[str, ...], host: str, port: int, auth: Path | None, token: Path | None
) -> None:
    """Serve the web page, and image APIs for programs.

    The APIs are OpenAI's images API and A1111's (docs/api.md).
    """
    from bestiary.app.access import read_credentials
    from bestiary.app.offers import Offerings
    from bestiary.app.server import launch
    from bestiary.app.tokens import read_token
    from bestiary.diffusion.export_format import is_export
    from bestiary.diffusion.stored_adapter import adapter_file
    from bestiary.files import project_root
    from bestiary.generation import named_base, no_base_error

    params = project_params()
    named = [base for model in bases if (base := named_base(model))]
    default = named[0] if named else project_base(params)
    if default is None:
        raise no_base_error()
    for file in adapters:
        if not is_export(file):
            adapter_file(file)
    launch(
        Offerings(
            bases=(default, *named[1:]),
            adapters=(*(str(project_root() / "models" / name) for name in ("adapter", "fast")), *adapters),
            defaults=drawing_defaults(params),
            registered_name=params.register_.name if params else registered_name(),
            tiny_decoder=project_tiny_decoder(params),
        ),
        host=host,
        port=port,
        auth=read_credentials(auth),
        token=read_token(token),
        ready=lambda address: click.echo(f"Open {address} in a browser. Ctrl-C stops it."),
    )
