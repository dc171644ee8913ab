"""`bestiary tracking`: the MLflow runs."""

from __future__ import annotations

from pathlib import Path

import click

from bestiary.commands.options import FILE


@click.group()
def tracking() -> None:
    """Open MLflow, or copy its runs to a server."""


@tracking.command()
@click.option("--port", default=5000, show_default=True, type=click.IntRange(1, 65535), help="Port of MLflow's page.")
def ui(port: int) -> None:
    """Open MLflow's page on this project's runs."""
    import webbrowser

    from bestiary.tracking.ui import has_display, show_runs

    def ready(address: str) -> None:
        click.echo(f"The runs are at {address}\nCtrl-C stops the page.")
        if has_display():
            webbrowser.open(address)

    show_runs(port, ready)


@tracking.command()
@click.argument("server", envvar="MLFLOW_TRACKING_URI", metavar="[SERVER]")
@click.option(
    "--database",
    type=FILE,
    metavar="FILE",
    help="Database to copy from.  [default: the project's]",
)
def migrate(server: str, database: Path | None) -> None:
    """Copy local runs and versions to a team's server.

    The default server is $MLFLOW_TRACKING_URI.
    """
    from bestiary.files import project_root
    from bestiary.registry.migration import migrate as copy

    done = copy(database or project_root() / "mlflow.db", server)
    already = f", {done.runs_there_already} were there already" if done.runs_there_already else ""
    click.echo(f"{done.runs} runs copied{already}.")
    for here, there in done.versions.items():
        click.echo(f"models:/{here} is version {there} on the server.")
