from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from bestiary import params
from bestiary.errors import BestiaryError
from bestiary.params import Params, Section, Split, load_params

PARAMS = Path(__file__).parents[1] / "params.yaml"

Edit = Callable[[dict[str, Any]], None]


@pytest.fixture
def edited(tmp_path: Path) -> Callable[[Edit], Path]:
    """A copy of the project's params.yaml with something changed in it."""

    def edit(change: Edit) -> Path:
        content = yaml.safe_load(PARAMS.read_text(encoding="utf-8"))
        change(content)
        path = tmp_path / "params.yaml"
        path.write_text(yaml.safe_dump(content), encoding="utf-8")
        return path

    return edit


@pytest.mark.parametrize("profile", ["sample", "subject", "sciencedb", "photos"])
def test_all_profiles_are_valid(edited: Callable[[Edit], Path], profile: str) -> None:
    params = load_params(edited(lambda content: content.update(profile=profile)))
    assert params.profile == profile
    assert params.dataset.source == ("sciencedb" if profile == "sciencedb" else "folder")
    assert params.train.rank > 0


def test_the_original_recipe_takes_the_place_of_the_profiles_settings(edited: Callable[[Edit], Path]) -> None:
    default, original = (
        load_params(edited(partial(dict.update, profile="sciencedb", recipe=recipe)))
        for recipe in ("default", "original")
    )
    assert (default.encode.resolution, original.encode.resolution) == (512, 256)
    settings = original.train
    assert (settings.rank, settings.alpha, settings.learning_rate) == (2, 16, 1e-5)
    assert (settings.batch_size, settings.accumulation, settings.max_grad_norm) == (4, 4, 0.5)
    assert (settings.criterion, settings.patience, settings.min_delta) == ("clip_score", 5, 0.02)
    assert settings.targets == default.train.targets
    assert original.evaluate == default.evaluate


def test_the_profile_for_one_subject_has_the_measured_settings(edited: Callable[[Edit], Path]) -> None:
    params = load_params(edited(partial(dict.update, profile="subject")))
    settings = params.train
    assert (settings.rank, settings.alpha, settings.learning_rate) == (8, 8, 3e-3)
    assert (settings.steps, settings.batch_size, settings.warmup_steps, settings.ema_decay) == (300, 8, 10, 0.95)
    assert settings.preservation.model_dump() == {"kind": "noised", "weight": 0.3, "samples": 4}
    assert not params.encode.flip
    assert load_params(PARAMS).train.preservation.kind == "none"


def test_no_parameter_has_a_default_in_the_code() -> None:
    sections = {value for value in vars(params).values() if isinstance(value, type) and issubclass(value, Section)}
    assert Params in sections
    assert not [
        f"{section.__name__}.{name}"
        for section in sections
        for name, field in section.model_fields.items()
        if not field.is_required()
    ]


def test_the_sample_is_the_default() -> None:
    assert load_params(PARAMS).profile == "sample"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content["train"].update(rnak=4), r"train\.rnak .*unknown"),
        (lambda content: content["train"].update(rnak=content["train"].pop("rank")), r"train\.rnak .*unknown"),
        (lambda content: content.update(colour="red"), "colour .*unknown"),
        (lambda content: content["profiles"]["sample"]["encode"].update(size=1), r"encode\.size .*unknown"),
        (lambda content: content["train"].update(rank="four"), r"train\.rank .*integer.* not 'four'"),
        (lambda content: content["train"].update(rank=4.5), r"train\.rank .*4\.5"),
        (
            lambda content: content["train"]["preservation"].update(kind="prior"),
            r"train\.preservation\.kind .*'noised'.*'prior'",
        ),
        (lambda content: content["train"]["preservation"].update(weight=0), r"train\.preservation\.weight .*than 0"),
        (lambda content: content["train"]["preservation"].pop("samples"), r"train\.preservation\.samples .*missing"),
        (lambda content: content["train"].update(low_memory=True, compile="always"), r"train .*low_memory .*compile"),
        (lambda content: content["train"].update(rank=0), r"train\.rank .*greater than 0"),
        (lambda content: content["split"].update(val_fraction=1.5), r"split\.val_fraction"),
        (lambda content: content["clean"].update(off_topic="maybe"), r"clean\.off_topic .*'maybe'"),
        (lambda content: content["evaluate"].update(template="a photo"), r"evaluate\.template"),
        (
            lambda content: content["evaluate"].update(
                sweep={
                    "scales": [1.0, 1.0],
                    "guidance_scales": [3.0],
                    "checkpoints": False,
                    "seeds": 1,
                    "score": "top1",
                }
            ),
            r"evaluate\.sweep\.scales .*listed once",
        ),
        (
            lambda content: content["profiles"]["sample"]["evaluate"].update(guidance_interval=[5.0, 1.0]),
            r"evaluate\.guidance_interval .*first noise level must be below the second",
        ),
        (lambda content: content["register"].update(name="pets/cats"), r"register\.name .*holds no /, : or @"),
        (
            lambda content: content["profiles"]["sample"]["evaluate"].update(guidance_scale=float("inf")),
            r"evaluate\.guidance_scale .*finite",
        ),
        (lambda content: content["train"].pop("dropout"), r"train\.dropout .*missing"),
        (lambda content: content.pop("seed"), r"seed .*missing"),
        (
            lambda content: content.update(profile="samples"),
            "no profile 'samples'; choose one of photos, sample, sciencedb, subject",
        ),
        (lambda content: content.pop("profile"), "no profile None"),
        *(
            (lambda content, folder=folder: content["dataset"].update(folder=folder), r"dataset\.folder .*DVC watches")
            for folder in ("pictures", "data/cats", "../data", "examples/../..", "")
        ),
        (lambda content: content.update(recipe="mine"), "no recipe 'mine'; choose one of default, original"),
        (lambda content: content["recipes"]["default"].update(train={"rnak": 4}), r"train\.rnak .*unknown"),
        (lambda content: content["recipes"]["default"].update(train=4), r"recipes\.default\.train must be a table"),
        (lambda content: content["profiles"]["sample"]["benchmark"].update(batch_sizes=[0]), r"batch_sizes\.0 .*not 0"),
        (
            lambda content: content["profiles"]["sample"]["benchmark"].update(steps=[-5]),
            r"benchmark\.steps\.0 .*not -5",
        ),
        (lambda content: content["profiles"]["sample"]["evaluate"].update(steps=1001), r"evaluate\.steps .*1000"),
        (lambda content: content["profiles"]["sample"]["evaluate"].update(guidance_scale=51.0), r"guidance_scale .*50"),
        (
            lambda content: content["profiles"]["sample"]["evaluate"].update(guidance_interval=[-1.0, 1.0]),
            r"evaluate\.guidance_interval .*not negative",
        ),
        (lambda content: content["train"].update(sheet_steps=0), r"train\.sheet_steps .*not 0"),
        (lambda content: content["train"].update(targets=[""]), r"train\.targets\.0 "),
        (lambda content: content["dataset"].update(classes=[]), r"dataset\.classes .*at least 1"),
        (lambda content: content["register"].update(name="pet's"), r"register\.name .*no quotes"),
        (lambda content: content.update(profile=["sample"]), r"no profile \['sample'\]; choose one of photos"),
        (lambda content: content.update(profiles=[1]), "profiles must be a table"),
        (lambda content: content["profiles"].update(sample=[1]), r"profiles\.sample must be a table"),
        (
            lambda content: content["profiles"]["sample"]["dataset"].update(source="sciencedb"),
            "the source sciencedb needs the section dataset.sciencedb",
        ),
        (lambda content: content["profiles"]["sample"].update(train=3), r"profiles\.sample\.train must be a table"),
    ],
)
def test_a_mistake_is_named_with_its_key(edited: Callable[[Edit], Path], change: Edit, message: str) -> None:
    with pytest.raises(BestiaryError, match=message) as caught:
        load_params(edited(change))
    assert "\n" not in str(caught.value)


def test_a_value_in_the_shared_part_overrides_the_profile(edited: Callable[[Edit], Path]) -> None:
    # `dvc exp run -S train.steps=60` writes it there.
    def change(content: dict[str, Any]) -> None:
        content["train"]["steps"] = 60
        content["evaluate"]["guidance_interval"] = [1.0, 5.0]

    params = load_params(edited(change))
    assert params.train.steps == 60
    assert params.evaluate.guidance_interval == (1.0, 5.0)
    assert params.train.batch_size == load_params(PARAMS).train.batch_size


def test_an_override_that_the_recipe_would_override_is_refused(edited: Callable[[Edit], Path]) -> None:
    def change(content: dict[str, Any]) -> None:
        content["recipe"] = "original"
        content["train"]["steps"] = 60

    with pytest.raises(BestiaryError, match=r"train\.steps has no effect: recipes\.original\.train sets it"):
        load_params(edited(change))


def test_a_table_of_settings_can_stand_in_the_shared_part_where_the_profile_has_none(
    edited: Callable[[Edit], Path],
) -> None:
    content = yaml.safe_load(PARAMS.read_text(encoding="utf-8"))
    proof = content["profiles"]["subject"]["evaluate"]["proof"]
    found = load_params(edited(lambda content: content["evaluate"].update(proof=proof))).evaluate.proof
    assert found
    assert found.contexts == proof["contexts"]


def test_one_picture_is_no_proof(edited: Callable[[Edit], Path]) -> None:
    def change(content: dict[str, Any]) -> None:
        content["profile"] = "subject"
        content["profiles"]["subject"]["evaluate"]["proof"] |= {"unrelated": ["a crab"], "seeds": 1}

    with pytest.raises(BestiaryError, match=r"evaluate\.proof .*unrelated and seeds together make one picture"):
        load_params(edited(change))


def test_every_setting_of_a_profile_can_be_overridden_in_the_shared_part() -> None:
    content = yaml.safe_load(PARAMS.read_text(encoding="utf-8"))

    def check(profile: dict[str, Any], shared: dict[str, Any], where: str) -> None:
        assert set(profile) - set(shared) == set(), where
        for key, value in profile.items():
            if isinstance(value, dict) and isinstance(shared[key], dict):
                check(value, shared[key], f"{where}.{key}")
            else:
                assert shared[key] is None, f"{where}.{key}"

    for name, profile in content["profiles"].items():
        for section in set(profile) - {
            "base",
            "judge",
            "captioner",
            "tiny_decoder",
        }:  # a model and its revision belong together
            check(profile[section], content[section], f"profiles.{name}.{section}")


@pytest.mark.parametrize("value", ["x" * 10_000_000, ["x" * 1000] * 1000], ids=["text", "list"])
def test_a_message_prints_less_than_a_line_of_a_value_or_a_key(value: Any) -> None:
    with pytest.raises(ValidationError) as caught:
        Split.model_validate({"val_fraction": value})
    assert len(params._explain(caught.value.errors()[0])) < 200


def test_a_long_key_is_cut(edited: Callable[[Edit], Path]) -> None:
    with pytest.raises(BestiaryError, match="unknown") as caught:
        load_params(edited(lambda content: content["train"].update({"x" * 100_000: 1})))
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("text", "message"), [("a: [1,", "not valid YAML"), ("", "holds no parameters"), ("- 1", "holds no parameters")]
)
def test_a_file_that_is_no_table_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "params.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(BestiaryError, match=message):
        load_params(path)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BestiaryError, match="does not exist"):
        load_params(tmp_path / "params.yaml")
