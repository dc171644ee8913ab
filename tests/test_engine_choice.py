"""Which engine draws: the user's choice, what an export can draw, and whether it is faster on this machine."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bestiary import generation
from bestiary.app.offers import Offerings, Offers
from bestiary.commands import drawing
from bestiary.diffusion import engines
from bestiary.diffusion.export_format import MANIFEST
from bestiary.engine_choice import Wish, choose_engine
from bestiary.errors import BestiaryError
from bestiary.generation import Base, choose_base
from bestiary.registry.resolving import Adapter, Obstacle, resolve
from bestiary.samplers import DrawingDefaults, Sampling, SamplingChanges

FEW_STEPS = DrawingDefaults("a {}", Sampling("lcm", 2, 1.0, timesteps=(999, 699), decoder="tiny"))


@pytest.fixture
def export(tmp_path: Path) -> Path:
    """The folder of an export, without its networks."""
    manifest = {
        "format": 1,
        "engine": "openvino",
        "precision": "int8",
        "decoder": "tiny",
        "base": "./models/base",
        "base_revision": None,
        "base_sha256": "b",
        "adapter": "models/few_step",
        "adapter_sha256": "a",
        "few_step": True,
        "drawing": FEW_STEPS.to_dict(),
        "side": 64,
        "side_step": 32,
        "processor": "any",
        "versions": {},
        "files": {},
    }
    folder = tmp_path / "fast"
    folder.mkdir()
    (folder / MANIFEST).write_text(json.dumps(manifest))
    return folder


@pytest.fixture
def registered(export: Path, tmp_path: Path) -> Adapter:
    """A registered adapter whose fast variant was accepted."""
    return Adapter(
        tmp_path / "x.safetensors", "models:/bestiary/3", "base", None, None, export=export, has_fast_variant=True
    )


@pytest.fixture(autouse=True)
def gains(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every export is faster on this machine."""
    monkeypatch.setattr(engines, "reason_against", lambda _: None)


def test_auto_draws_with_an_accepted_fast_variant_and_its_settings(registered: Adapter, export: Path) -> None:
    (chosen,), note = choose_engine([registered], Wish())
    assert (chosen.is_export, chosen.export, chosen.uri, note) == (True, export, "models:/bestiary/3", None)
    assert (chosen.defaults, chosen.few_step) == (FEW_STEPS, True)


def test_torch_draws_with_the_adapter_itself(registered: Adapter) -> None:
    assert choose_engine([registered], Wish("torch")) == ([registered], None)


@pytest.mark.parametrize(
    ("wish", "reason"),
    [
        (Wish(has_image=True), "cannot start from an image"),
        (Wish(weighted=True), "cannot have another weight"),
        (Wish(base="other"), "base is part of an export"),
        (Wish(device="cuda"), "on the CPU, not on cuda"),
        (Wish(changes=SamplingChanges(decoder="full")), "has only the tiny decoder"),
        (Wish(changes=SamplingChanges(width=64, height=40)), "sides of its pictures are multiples of 32 pixels"),
    ],
)
def test_requests_that_an_export_cannot_draw_fall_back_to_torch_or_are_refused(
    registered: Adapter, export: Path, wish: Wish, reason: str
) -> None:
    chosen, note = choose_engine([registered], wish)
    assert chosen == [registered]
    assert note is not None
    assert reason in note
    explicit = Wish("openvino", wish.changes, wish.has_image, wish.weighted, wish.base, wish.device)
    with pytest.raises(BestiaryError, match=f"{reason}.*--engine torch"):
        choose_engine([registered], explicit)
    with pytest.raises(BestiaryError, match=reason):
        choose_engine([resolve(str(export))], wish)


def test_auto_says_why_the_export_is_not_faster_on_this_machine(
    registered: Adapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engines, "reason_against", lambda _: "this machine has a GPU, which torch uses")
    chosen, note = choose_engine([registered], Wish())
    assert chosen == [registered]
    assert note == "Drawing with torch instead of the fast variant: this machine has a GPU, which torch uses."


@pytest.mark.parametrize(
    ("wish", "reason"),
    [
        (Wish(changes=SamplingChanges(steps=9)), "its sampler, steps and guidance are fixed"),
        (Wish(changes=SamplingChanges(sampler="ddim")), "its sampler, steps and guidance are fixed"),
        (Wish(changes=SamplingChanges(negative_prompt="fog")), "it takes no negative prompt"),
        (Wish(has_grid=True), "a grid may vary settings that are fixed in it"),
        (Wish(has_image=True), "cannot start from an image"),
        (Wish(weighted=True), "cannot have another weight"),
        (Wish(base="other"), "base is part of an export"),
    ],
)
def test_auto_says_why_torch_draws_with_or_without_the_files_of_the_export(
    registered: Adapter, wish: Wish, reason: str
) -> None:
    for adapter in (registered, replace(registered, export=None)):  # whether or not its files were looked up
        chosen, note = choose_engine([adapter], wish)
        assert chosen == [adapter]
        assert note is not None
        assert note.startswith("Drawing with torch instead of the fast variant: ")
        assert reason in note
    assert choose_engine([registered], replace(wish, engine="torch")) == ([registered], None)


@pytest.mark.parametrize(
    ("options", "looks"),
    [
        ([], True),
        (["--decoder", "tiny"], True),
        (["--engine", "openvino", "--steps", "9"], True),
        (["--engine", "openvino", "--base", "other"], False),
        (["--engine", "openvino", "--adapter", "models:/bestiary/3", "--adapter", "other"], False),
        (["--engine", "torch"], False),
        (["--steps", "9"], False),
        (["--guidance", "5"], False),
        (["--scheduler", "ddim"], False),
        (["--base", "other"], False),
        (["--adapter", "models:/bestiary/3:0.5"], False),
        (["--adapter", "models:/bestiary/3", "--adapter", "other"], False),
        (["--grid", "seed=1,2"], False),
    ],
)
def test_generate_looks_for_a_fast_variant_only_if_it_may_draw_the_request(
    options: list[str], looks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    class LookedUpError(Exception):
        pass

    def resolve_all(_: Sequence[str], *, fast: Obstacle | None) -> None:
        raise LookedUpError(fast is not None)

    monkeypatch.setattr(generation, "resolving_all", resolve_all)
    monkeypatch.setattr(drawing, "find_spec", lambda _: True)  # OpenVINO is installed
    with pytest.raises(LookedUpError, match=f"^{looks}$"):
        drawing.generate.main(["tiger", *options], standalone_mode=False)


def test_auto_says_that_torch_draws_because_of_several_adapters(registered: Adapter, tmp_path: Path) -> None:
    plain = Adapter(tmp_path / "x.safetensors", "x.safetensors", None, None, None)
    for adapters in ([registered, plain], [plain, registered]):
        note = "Drawing with torch instead of the fast variant: it holds only one adapter, and several were chosen."
        assert choose_engine(adapters, Wish()) == (adapters, note)
    assert choose_engine([plain, plain], Wish()) == ([plain, plain], None)


def test_auto_says_that_openvino_is_not_installed_without_looking_for_the_fast_variant(
    registered: Adapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(engines, "device_and_dtype", lambda: (torch.device("cpu"), torch.float32))
    monkeypatch.setattr(engines, "find_spec", lambda _: None)
    note = choose_engine([replace(registered, export=None)], Wish())[1]
    assert note is not None
    assert "the engine openvino is not installed (`pip install" in note


def test_openvino_without_an_export_says_how_to_make_one(tmp_path: Path, registered: Adapter) -> None:
    plain = Adapter(tmp_path / "x.safetensors", "x.safetensors", None, None, None)
    assert choose_engine([plain], Wish()) == ([plain], None)
    with pytest.raises(BestiaryError, match=r"`bestiary export x\.safetensors --to openvino --out DIR`"):
        choose_engine([plain], Wish("openvino"))
    with pytest.raises(BestiaryError, match="draws with an exported adapter"):
        choose_engine([], Wish("openvino"))
    with pytest.raises(BestiaryError, match="one exported adapter"):
        choose_engine([registered, plain], Wish("openvino"))


def test_an_export_is_refused_with_other_adapters_and_with_torch(export: Path, tmp_path: Path) -> None:
    exported = resolve(str(export))
    assert choose_engine([exported], Wish()) == ([exported], None)
    plain = Adapter(tmp_path / "x.safetensors", "x.safetensors", None, None, None)
    with pytest.raises(BestiaryError, match="no other adapter can be applied to it"):
        choose_engine([plain, exported], Wish())
    with pytest.raises(BestiaryError, match="which torch cannot draw with"):
        choose_engine([exported], Wish("torch"))
    with pytest.raises(BestiaryError, match="has no adapter file"):
        exported.check_is_file()


def test_the_page_offers_an_export_by_its_engine_and_decoder(export: Path) -> None:
    offers = Offers(Offerings(bases=(Base("models/base"),), adapters=(str(export),)))
    offer = offers.find("local:0")
    assert offer.label.endswith("/fast (OpenVINO int8, tiny decoder)")
    assert (offer.defaults, offer.few_step, offer.side, offer.public()["export"]) == (FEW_STEPS, True, 64, True)
    assert offers.resolve(offer).is_export
    assert choose_base(offers.resolve(offer), None, Base("another")) == Base("./models/base")
