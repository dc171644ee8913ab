from pathlib import Path

import pytest
from support.registry import submit

from bestiary.errors import BestiaryError
from bestiary.registry import model_card
from bestiary.registry.aliases import rollback
from bestiary.registry.resolving import resolve
from bestiary.registry.tags import read_tags
from bestiary.registry.versions import Version, versions
from bestiary.tracking.store import open_client, tracking_uri

HASH = "0" * 64
TAGS = {"adapter_sha256": HASH, "base": "./models/base", "base_revision": "", "base_sha256": HASH}


def version(**tags: str) -> Version:
    return Version("bestiary", 3, [], TAGS | tags, "run")


@pytest.mark.parametrize("key", ["adapter_sha256", "base", "base_sha256"])
def test_a_missing_tag_is_named(key: str) -> None:
    tags = {name: value for name, value in TAGS.items() if name != key}
    with pytest.raises(BestiaryError, match=f"models:/bestiary/3 has no tag {key}"):
        read_tags(Version("bestiary", 3, [], tags, "run"))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("adapter_sha256", "abc"),
        ("adapter_sha256", "A" * 64),
        ("base", ""),
        ("base", "x" * 5000),
        ("base", "models/base\x1b[2J"),
        ("base_revision", "a b\n"),
        ("base_sha256", "0" * 63),
        ("usual", "{}"),
        ("usual", "[" * 100_000),
        ("usual", '{"template": "{}", "steps": -1, "guidance_scale": 3, "scheduler": "ddim", "resolution": 64}'),
        ("usual", '{"template": "{}", "steps": 5, "guidance_scale": 1e999, "scheduler": "ddim", "resolution": 64}'),
    ],
)
def test_an_odd_tag_is_one_sentence_that_names_it(key: str, value: str) -> None:
    with pytest.raises(BestiaryError, match=f"The tag {key} of models:/bestiary/3 is ") as caught:
        read_tags(version(**{key: value}))
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 400


def test_a_version_from_before_the_defaults_were_stored_is_read() -> None:
    assert read_tags(version()).defaults is None
    assert read_tags(version()).base_revision is None


def test_odd_tags_stop_what_needs_them(project: Path, base_folder: Path, adapters: list[Path]) -> None:
    submit(project, base_folder, adapters[0])
    client = open_client(tracking_uri(), project)
    client.set_tag(versions()[0].run_id, "stage", "register")
    client.set_model_version_tag("bestiary", "1", "rank", "four")
    with pytest.raises(BestiaryError, match="The tag rank of models:/bestiary/1 is 'four'"):
        model_card.write("models:/bestiary/1", project / "out")
    client.set_model_version_tag("bestiary", "1", "champion_before", "abc")
    with pytest.raises(BestiaryError, match="The tag champion_before of models:/bestiary/1 is 'abc'"):
        rollback("it is worse")
    client.delete_model_version_tag("bestiary", "1", "adapter_sha256")
    with pytest.raises(BestiaryError, match="models:/bestiary/1 has no tag adapter_sha256"):
        resolve("models:/bestiary/1")
    client.delete_tag(versions()[0].run_id, "stage")
    with pytest.raises(BestiaryError, match="has no tag stage"):
        model_card.write("models:/bestiary/1", project / "out")
