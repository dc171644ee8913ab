import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image
from support.registry import make_adapter

from bestiary.diffusion.adapter import adapter_sha256
from bestiary.diffusion.adapter_format import Provenance
from bestiary.diffusion.conversion import convert
from bestiary.diffusion.few_step import few_step_sampling
from bestiary.diffusion.few_step_adapter import combine
from bestiary.diffusion.merging import Parent, merge
from bestiary.diffusion.stored_adapter import adapter_file
from bestiary.errors import BestiaryError
from bestiary.generation import (
    Base,
    Generator,
    Weighted,
    base_of_picture,
    choose_base,
    common_settings,
    decisive,
    defaults_of,
    overrides_base,
    portable_base,
    resolving,
    save_picture,
    weight_of,
)
from bestiary.png_metadata import PictureSettings
from bestiary.registry.resolving import Adapter, resolve
from bestiary.samplers import DrawingDefaults, Sampling

SETTINGS = PictureSettings(
    prompt="a photo of a tiger",
    seed=7,
    sampling=Sampling("ddim", steps=1, guidance_scale=3.0, width=64, height=64),
    base="./models/base",
    base_revision=None,
    adapter=None,
    adapter_sha256=None,
)


def adapter_on(base: str | None, tmp_path: Path) -> Adapter:
    return Adapter(tmp_path / "x.safetensors", "x", base, None, None)


def test_the_base_that_the_user_names_wins(tmp_path: Path) -> None:
    chosen = Base("chosen")
    assert choose_base(adapter_on("named", tmp_path), chosen, Base("default")) is chosen
    assert choose_base(None, chosen, None) is chosen


def test_an_adapter_is_drawn_on_the_base_that_it_names(tmp_path: Path) -> None:
    (tmp_path / "named").mkdir()
    named = str(tmp_path / "named")
    assert choose_base(adapter_on(named, tmp_path), None, Base("default")) == Base(named)


def test_a_base_on_the_hub_that_only_an_adapter_names_is_never_fetched(tmp_path: Path) -> None:
    adapter = adapter_on("someone/base", tmp_path)
    with pytest.raises(BestiaryError, match="--base someone/base"):
        choose_base(adapter, None, Base("default"))
    assert choose_base(adapter, None, Base("default"), known=(Base("someone/base"),)) == Base("someone/base")


def test_a_strangers_adapter_does_not_choose_the_base(tmp_path: Path) -> None:
    default = Base("default")
    assert choose_base(adapter_on("someone/base", tmp_path), None, default, trusted=False) is default


def test_an_adapter_that_names_no_base_is_drawn_on_the_default_or_refused(tmp_path: Path) -> None:
    default = Base("default")
    assert choose_base(adapter_on(None, tmp_path), None, default) is default
    with pytest.raises(BestiaryError, match="--base"):
        choose_base(adapter_on(None, tmp_path), None, None)


def test_without_any_base_the_error_names_the_option() -> None:
    with pytest.raises(BestiaryError, match="--base"):
        choose_base(None, None, None)


@pytest.mark.parametrize(
    ("text", "what", "weight"),
    [
        ("models:/bestiary@champion", "models:/bestiary@champion", None),
        ("models:/bestiary@champion:0.8", "models:/bestiary@champion", 0.8),
        ("models:/bestiary/3:2", "models:/bestiary/3", 2.0),
        ("fox.safetensors:0", "fox.safetensors", 0.0),
        ("C:\\adapters\\fox.safetensors", "C:\\adapters\\fox.safetensors", None),
        ("C:\\adapters\\fox.safetensors:.5", "C:\\adapters\\fox.safetensors", 0.5),
        ("at:home", "at:home", None),
        ("at:7", "at:7", None),
        ("at:7:0.5", "at:7", 0.5),
    ],
)
def test_a_weight_follows_the_last_colon_unless_that_belongs_to_the_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, what: str, weight: float | None
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "at:7").mkdir()
    (tmp_path / "models").mkdir()  # beside which models:/ is still an address of the registry
    assert Weighted.parse(text) == Weighted(what, weight)


@pytest.mark.parametrize("weight", ["-1", "3", "abc", "nan", "inf", "", "1,5"])
def test_a_weight_that_is_no_number_from_0_to_2_is_refused(weight: str) -> None:
    with pytest.raises(BestiaryError, match=f"The weight {weight} of models:/x/1 is not a number from 0 to 2"):
        Weighted.parse(f"models:/x/1:{weight}")


def test_no_adapter_has_no_weight() -> None:
    with pytest.raises(BestiaryError, match="--adapter none"):
        Weighted.parse("none:0.5")


def test_no_adapter_is_found_for_none() -> None:
    with resolving("none") as resolved:
        assert resolved() is None


@pytest.mark.slow
def test_a_picture_without_an_adapter_is_the_bases_even_while_one_is_applied(base_folder: Path, tmp_path: Path) -> None:
    generator = Generator()
    base = Base(str(base_folder))
    generator.prepare(base, [])
    plain = generator.draw(SETTINGS).tobytes()
    generator.prepare(base, [resolve(str(make_adapter(base_folder, tmp_path / "adapter", 0)))])
    assert len(generator.adapter_hashes) == 1
    with_adapter = replace(SETTINGS, adapter="adapter", adapter_sha256=generator.adapter_hashes[0])
    weak = replace(with_adapter, sampling=replace(SETTINGS.sampling, adapter_weight=0.0))
    assert generator.draw(SETTINGS).tobytes() == plain
    assert generator.draw(weak).tobytes() == plain
    assert generator.draw(with_adapter).tobytes() != plain
    generator.prepare(base, [])
    assert not generator.adapter_hashes
    assert generator.draw(SETTINGS).tobytes() == plain


def test_the_same_adapter_twice_is_refused_whatever_its_names(base_folder: Path, tmp_path: Path) -> None:
    one = resolve(str(make_adapter(base_folder, tmp_path / "one", 0)))
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    convert(adapter_file(tmp_path / "one"), tmp_path / "two.safetensors", "kohya")
    for copy in (tmp_path / "two", tmp_path / "two.safetensors"):
        with pytest.raises(BestiaryError, match=f"one and {copy} are the same adapter. Name it once, with one weight"):
            Generator().prepare(Base(str(base_folder)), [one, resolve(str(copy))])


def prepared(base_folder: Path) -> Generator:
    """A generator with the base in memory."""
    generator = Generator()
    generator.prepare(Base(str(base_folder)), [])
    return generator


def draw_with(generator: Generator, weighted: Sequence[Weighted]) -> Image.Image:
    """A picture with these adapters."""
    adapters = [resolve(each.what) for each in weighted]
    generator.prepare(generator.base, adapters)
    sampling = replace(SETTINGS.sampling, adapter_weight=weight_of(adapters[0], weighted[0]))
    return generator.draw(replace(common_settings(generator, adapters, weighted, sampling), prompt="a tiger"))


def distilled(folder: Path, style: Path, other: Path) -> Path:
    """Write the few-step adapter that `make fast` would make from a style: its file names the style by its hash."""
    content = combine(style, other, 1.0, Sampling("lcm", 2, 1.0, timesteps=(999, 499)), Provenance())
    facts = {"distilled_from": {"adapter_sha256": adapter_sha256(style)}}
    folder.mkdir()
    data = replace(content, provenance=Provenance.model_validate(facts)).to_bytes()
    (folder / "pytorch_lora_weights.safetensors").write_bytes(data)
    return folder


def test_a_style_and_an_adapter_that_contains_it_are_refused_together(base_folder: Path, tmp_path: Path) -> None:
    style, other, third = (make_adapter(base_folder, tmp_path / name, i) for i, name in enumerate(("style", "b", "c")))
    few_step = distilled(tmp_path / "few_step", style, other)
    again = distilled(tmp_path / "again", style, third)
    parents = [Parent("few_step", adapter_file(few_step)), Parent("c", adapter_file(third))]
    merged = tmp_path / "merged.safetensors"
    merged.write_bytes(merge(parents).content.to_bytes())

    def draw(*paths: Path) -> None:
        draw_with(generator, [Weighted(str(path), 1.0) for path in paths])

    generator = prepared(base_folder)
    for pair in ((style, few_step), (few_step, style)):
        with pytest.raises(BestiaryError) as refused:
            draw(*pair)
        assert str(refused.value) == (
            f"{few_step} already contains {style}, which would count twice. Leave out {style}."
        )
    with pytest.raises(BestiaryError, match=r"few_step and .*again contain the same adapter, which would count twice"):
        draw(few_step, again)
    for inner in (few_step, third, style):
        with pytest.raises(BestiaryError, match=f"merged.safetensors already contains {inner}, "):
            draw(inner, merged)
    kohya = convert(adapter_file(style), tmp_path / "kohya.safetensors", "kohya")
    back = convert(kohya, tmp_path / "back.safetensors", "diffusers")
    of_kohya = tmp_path / "of_kohya.safetensors"
    of_kohya.write_bytes(merge([Parent("kohya", kohya), Parent("c", adapter_file(third))]).content.to_bytes())
    for copy in (kohya, back):
        with pytest.raises(BestiaryError, match=f"few_step already contains {copy}, which would count twice"):
            draw(few_step, copy)
    with pytest.raises(BestiaryError, match=f"of_kohya.safetensors already contains {style}, which would count twice"):
        draw(style, of_kohya)
    with pytest.raises(BestiaryError, match="few already contains style, which would count twice"):
        merge([Parent("few", adapter_file(few_step)), Parent("style", adapter_file(style))])
    draw(few_step, third)


def test_an_adapter_with_weight_0_may_be_contained_in_another_one(base_folder: Path, tmp_path: Path) -> None:
    style, other = (make_adapter(base_folder, tmp_path / name, i) for i, name in enumerate(("style", "other")))
    both = tmp_path / "both.safetensors"
    both.write_bytes(merge([Parent(str(each), adapter_file(each)) for each in (style, other)]).content.to_bytes())
    generator = prepared(base_folder)
    alone = draw_with(generator, [Weighted(str(both), 1.0)])
    assert draw_with(generator, [Weighted(str(both), 1.0), Weighted(str(style), 0.0)]) == alone
    assert draw_with(generator, [Weighted(str(both), 0.0), Weighted(str(style), 1.0)]) != alone
    with pytest.raises(BestiaryError, match="already contains"):  # the same adapters stay loaded
        draw_with(generator, [Weighted(str(both), 0.1), Weighted(str(style), 0.1)])


def test_every_adapter_must_be_for_the_base(base_folder: Path, tmp_path: Path) -> None:
    first = resolve(str(make_adapter(base_folder, tmp_path / "first", 0)))
    second = replace(resolve(str(make_adapter(base_folder, tmp_path / "second", 1))), base_sha256="f" * 64)
    with pytest.raises(BestiaryError, match=r"second was trained on another base than .*f{12}"):
        Generator().prepare(Base(str(base_folder)), [first, second])


def test_the_first_adapter_that_names_a_base_chooses_it(tmp_path: Path) -> None:
    named, unnamed = adapter_on("named", tmp_path), adapter_on(None, tmp_path)
    assert decisive([unnamed, named]) is named
    assert decisive([unnamed]) is unnamed
    assert decisive([]) is None


def test_another_picture_of_the_same_name_is_kept(tmp_path: Path) -> None:
    red, blue = (Image.new("RGB", (64, 64), colour) for colour in ("red", "blue"))
    paths = [save_picture(image, SETTINGS, tmp_path, "tiger") for image in (red, blue, red, blue)]
    assert [path.name for path in paths] == ["tiger.png", "tiger-2.png", "tiger.png", "tiger-2.png"]


def test_a_base_inside_the_project_is_named_from_its_root(project: Path) -> None:
    (project / "models" / "base").mkdir(parents=True)
    assert portable_base(str(project / "models" / "base")) == "./models/base"
    assert portable_base("someone/base") == "someone/base"


COMMIT = "0" * 40


@pytest.fixture
def hub(base_folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A hub that has the embedded base under every name; the names that were asked for."""
    asked: list[str] = []

    def download(model: str, **_: object) -> str:
        asked.append(model)
        return str(base_folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    return asked


def test_a_base_from_the_hub_is_compared_with_the_adapters_hash(
    base_folder: Path, tmp_path: Path, hub: list[str]
) -> None:
    adapter = resolve(str(make_adapter(base_folder, tmp_path / "adapter", 0, named_base="somebody/base")))
    generator, named = Generator(), Base("somebody/base")
    generator.prepare(named, [adapter])
    other = replace(adapter, base_sha256="f" * 64)
    for already_loaded in (Generator(), generator):
        already_loaded._applied = []
        with pytest.raises(BestiaryError, match=r"another base than somebody/base: .*f{12}"):
            already_loaded.prepare(named, [other], any_base=overrides_base(named, other))
    generator.prepare(named, [other], any_base=overrides_base(Base("another/base"), other))


def test_a_base_on_the_hub_that_a_picture_names_is_never_fetched(hub: list[str]) -> None:
    drawn_elsewhere = replace(SETTINGS, base="evil/base")
    with pytest.raises(BestiaryError, match=r"tiger\.png names the base evil/base.* --base evil/base"):
        base_of_picture(drawn_elsewhere, Path("tiger.png"), Base("default"))
    assert base_of_picture(drawn_elsewhere, Path("tiger.png"), Base("evil/base")) == Base("evil/base")
    assert hub == []


def test_naming_the_adapters_own_base_takes_the_revision_that_it_was_trained_on(tmp_path: Path) -> None:
    adapter = replace(adapter_on("somebody/base", tmp_path), base_revision=COMMIT)
    assert choose_base(adapter, Base("somebody/base"), None) == Base("somebody/base", COMMIT)


@pytest.mark.parametrize("name", ["lcm-lora-sdv1-5.safetensors", "LCM_tiger.safetensors"])
def test_an_lcm_lora_is_known_by_its_name_and_drawn_as_it_was_distilled(
    base_folder: Path, tmp_path: Path, name: str
) -> None:
    folder = make_adapter(base_folder, tmp_path / "adapter", 0)
    file = (folder / "pytorch_lora_weights.safetensors").rename(tmp_path / name)
    found = resolve(str(file))
    assert found.defaults is not None
    assert found.defaults.sampling == Sampling("lcm", steps=4, guidance_scale=1.0)
    assert "4 steps" in found.notes[0]
    assert resolve(str(file.rename(tmp_path / "calmcms.safetensors"))).defaults is None


@pytest.mark.parametrize(
    ("name", "sampling"),
    [
        ("pytorch_lora_weights (lcm-lora)", Sampling("lcm", 4, 1.0)),
        ("TCD-SD15-LoRA", Sampling("tcd", 4, 1.0)),
        ("Hyper-SD15-8steps-lora", Sampling("ddim-trailing", 8, 1.0)),
        ("Hyper-SD15-2steps-lora", Sampling("ddim-trailing", 2, 1.0)),
        ("Hyper-SD15-1step-lora", Sampling("tcd", 1, 1.0)),
        ("Hyper-SD15-12steps-CFG-lora", Sampling("ddim-trailing", 12, 5.0)),
        ("hyper_sd_tiger", Sampling("tcd", 4, 1.0)),
        ("calm_tcds", None),
        ("hyperion", None),
    ],
)
def test_each_few_step_adapter_has_its_own_sampler_and_steps(name: str, sampling: Sampling | None) -> None:
    assert few_step_sampling([name]) == sampling


def test_a_few_step_adapter_decides_the_steps_of_a_style_beside_it(base_folder: Path, tmp_path: Path) -> None:
    style, other = (make_adapter(base_folder, tmp_path / name, seed) for seed, name in enumerate(("style", "other")))
    fast = (other / "pytorch_lora_weights.safetensors").rename(tmp_path / "Hyper-SD15-8steps-lora.safetensors")
    evaluated = DrawingDefaults("a drawing of {}", Sampling("euler", 30, 6.0, (0.3, 5.0), 64, 64, 0.8))
    adapters = [replace(resolve(str(style)), defaults=evaluated), resolve(str(fast))]
    expected = Sampling("ddim-trailing", 8, 1.0, None, 64, 64, 0.8)
    assert defaults_of(adapters) == DrawingDefaults("a drawing of {}", expected)
    assert defaults_of(adapters, [0.0, 0.1]) == DrawingDefaults("a drawing of {}", expected)
    assert defaults_of(adapters, [1.0, 0.0]) == defaults_of(adapters[:1]) == evaluated
    assert defaults_of(adapters[1:], [0.0]) is None
    assert defaults_of([resolve(str(style))]) is None
    assert defaults_of([]) is None
