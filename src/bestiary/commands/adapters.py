"""`bestiary export` and `bestiary adapter`: check, change and export adapters."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from bestiary.commands.options import FILE, NAME, Number, base_option, champion
from bestiary.errors import BestiaryError, printable
from bestiary.project import drawing_defaults, known_bases, project_base, project_params, project_tiny_decoder
from bestiary.samplers import Decoder

if TYPE_CHECKING:
    from bestiary.diffusion.export_format import Precision
    from bestiary.generation import Weighted


@click.command("export")
@click.argument("what", metavar="WHAT[:WEIGHT]", type=NAME, default=champion)
@click.option("--to", required=True, type=click.Choice(["openvino"]), help="Engine to export for.")
@click.option("--int8", "precision", flag_value="int8", help="Quantize the UNet. Fastest with VNNI or AMX.")
@click.option("--bf16", "precision", flag_value="bf16", help="bfloat16, for AVX512-BF16 or AMX.")
@click.option("--fp32", "precision", flag_value="fp32", help="float32.  [default: the fastest for this processor]")
@click.option(
    "--decoder", type=click.Choice(["full", "tiny"]), default="full", show_default=True, help="Decoder to export."
)
@base_option
@click.option("--out", required=True, type=FILE, help="Folder for the export.")
def export_adapter(
    what: str, to: Literal["openvino"], precision: Precision | None, decoder: Decoder, base: str | None, out: Path
) -> None:
    """Export an adapter, fused into its base, for OpenVINO.

    `bestiary generate --adapter OUT` draws with the export. OpenVINO's own pipelines can draw with it, too.
    """
    from bestiary.exporting import ExportRequest, Surroundings
    from bestiary.exporting import export_adapter as export

    params = project_params()
    project = Surroundings(project_base(params), project_tiny_decoder(params), drawing_defaults(params))
    done = export(ExportRequest(what, out, precision, decoder, base), project)
    form = done.manifest
    click.echo(
        f"{out}: exported for {to} in {form.precision} with the {form.decoder} decoder, {done.mib:.0f} MiB, "
        f"error of the UNet {done.unet_error:.2%}"
    )


@click.group()
def adapter() -> None:
    """Verify, inspect, convert, merge and resize adapters."""


@adapter.command()
@click.argument("what", metavar="PATH", type=NAME)
@base_option
def verify(what: str, base: str | None) -> None:
    """Prove that an adapter applies to its base.

    Prints what was proved.
    """
    from bestiary.registry import resolving

    found = resolving.resolve(what)
    found.check_is_file()
    from bestiary.diffusion.adapter import verify_adapter  # torch, which a refusal does not wait for

    model = resolving.find_base(found, base, known_bases())
    proof = verify_adapter(found.file, model, None if base else found.base_revision)
    trained_on = {True: "yes", False: f"no, it was trained on {found.base}", None: "the file does not say"}
    for label, value in (
        ("adapter", found.file),
        ("sha256", proof.sha256),
        ("rank, alpha", f"{proof.ranks}, {proof.alphas}{f' ({proof.alpha_rule})' if proof.alpha_rule else ''}"),
        ("base", model),
        ("trained on this base", trained_on[proof.base_is_the_trained_one]),
        ("modules", str(proof.applied).removeprefix("applied ")),
        ("weights in place", f"{proof.keys} of {proof.keys}"),
        ("weight 0 equals the base", "yes, exactly"),
        ("weight 1 differs from the base", "yes"),
        ("a reload gives the same", "yes, exactly"),
    ):
        click.echo(printable(f"{label:32} {value}"))


@adapter.command()
@click.argument("source", metavar="SRC", type=FILE)
@click.argument("target", metavar="DST", type=FILE)
@click.option("--to", required=True, type=click.Choice(["diffusers", "kohya"]), help="Format to write.")
@click.option("--alpha", type=Number(0, min_open=True), help="Alpha, if the file stores none.")
def convert(source: Path, target: Path, to: Literal["diffusers", "kohya"], alpha: float | None) -> None:
    """Write an adapter in another format.

    Reads the files of diffusers, PEFT, kohya, other trainers and the original system (docs/adapters.md).
    """
    from bestiary.diffusion.stored_adapter import adapter_file, check_size, target_file

    target_file(target)
    check_size(adapter_file(source))
    from bestiary.diffusion import conversion  # torch, which a refusal does not wait for

    click.echo(conversion.convert(source, target, to, alpha, lambda note: click.echo(note, err=True)))


@adapter.command()
@click.argument("named", metavar="WHAT[:WEIGHT]...", type=NAME, nargs=-1, required=True)
@click.argument("target", metavar="OUT", type=FILE)
@click.option("--rank", type=click.IntRange(1), help="Lower the rank and print the error.  [default: exact]")
@base_option
def merge(named: tuple[str, ...], target: Path, rank: int | None, base: str | None) -> None:
    """Write one adapter that has the effect of several.

    The result is verified.
    """
    from bestiary.generation import Weighted

    _merge([Weighted.parse(text) for text in named], target, rank, base)


@adapter.command()
@click.argument("source", metavar="SRC", type=NAME)
@click.argument("target", metavar="OUT", type=FILE)
@click.option("--rank", required=True, type=click.IntRange(1), help="Rank to write.")
@base_option
def resize(source: str, target: Path, rank: int, base: str | None) -> None:
    """Write an adapter with a lower rank.

    The result is verified, and the error is printed.
    """
    from bestiary.generation import Weighted

    _merge([Weighted(source, 1.0)], target, rank, base)


def _merge(weighted: Sequence[Weighted], target: Path, rank: int | None, base: str | None) -> None:
    from bestiary import generation
    from bestiary.diffusion.stored_adapter import target_file
    from bestiary.registry import resolving

    file = target_file(target)
    with generation.resolving_all([each.what for each in weighted]) as resolved:
        found = resolved()
    chosen = generation.decisive(found)
    if chosen is None:
        raise BestiaryError("none is no adapter. Name one that can be merged.")
    model = resolving.find_base(chosen, base, known_bases())
    from bestiary.diffusion import merging  # torch, which a refusal does not wait for

    parents = [
        merging.Parent(adapter.uri, adapter.file, generation.weight_of(adapter, each))
        for adapter, each in zip(found, weighted, strict=True)
    ]
    merged = merging.merge(parents, rank)
    proof = merging.write_verified(merged, file, model, None if base else chosen.base_revision)
    click.echo(f"{file}: rank {proof.rank}, {proof.keys} weights in place, sha256 {proof.sha256}")
    if merged.worst_module:
        click.echo(
            f"error {merged.error:.2%} of the change, at most {merged.largest_error:.2%} in {merged.worst_module}"
        )


@adapter.command("inspect")
@click.argument("what", metavar="FILE", type=NAME)
@base_option
def inspect_adapter(what: str, base: str | None) -> None:
    """Show what an adapter's file holds.

    Also shows which parts would be applied to the base.
    """
    from bestiary.diffusion.stored_adapter import adapter_file, check_size
    from bestiary.generation import named_base, portable_base
    from bestiary.registry import resolving

    file = resolving.resolve(what).file if what.startswith("models:") else adapter_file(what)
    check_size(file)
    from bestiary.diffusion.adapter_summary import BaseToTry, summarize  # torch, which a refusal does not wait for

    found = named_base(base) or project_base(project_params())
    tried = BaseToTry(found.model, found.revision, portable_base(found.model)) if found else None
    for label, value in summarize(file, tried):
        click.echo(printable(f"{label:32} {value}"))
