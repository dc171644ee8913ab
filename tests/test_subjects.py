import pytest

from bestiary.subjects import ANIMALS, CAPTION_TEMPLATES, caption, find_subject, subject_of


def test_there_are_100_animals_with_different_names() -> None:
    assert len(ANIMALS) == 100
    for attribute in ("folder", "name", "chinese"):
        assert len({getattr(animal, attribute) for animal in ANIMALS}) == 100
    assert [animal.folder for animal in ANIMALS] == sorted(animal.folder for animal in ANIMALS)


@pytest.mark.parametrize(
    ("folder", "phrase", "chinese"),
    [
        ("ladybugs", "a ladybug", "瓢虫"),
        ("pelecaniformes", "a pelican", "鹈鹕"),
        ("antelope", "an antelope", "羚羊"),
        ("octopus", "an octopus", "章鱼"),
        ("eagle", "an eagle", "鹰"),
        ("tiger", "a tiger", "老虎"),
    ],
)
def test_an_animal_has_its_common_names(folder: str, phrase: str, chinese: str) -> None:
    assert subject_of(folder).with_article == phrase
    assert subject_of(folder).chinese == chinese


def test_the_article_follows_the_sound_of_the_name() -> None:
    with_an = {animal.name for animal in ANIMALS if animal.with_article.startswith("an ")}
    assert with_an == {"antelope", "eagle", "elephant", "octopus", "orangutan", "otter", "owl"}


def test_a_subject_outside_the_100_animals_is_named_after_its_folder() -> None:
    assert subject_of("my_red-panda").name == "my red panda"
    assert subject_of("unicorn").with_article == "a unicorn"
    assert subject_of("hourglass_spider").with_article == "an hourglass spider"


def test_every_template_makes_a_correct_caption() -> None:
    assert [caption(subject_of("antelope"), template) for template in CAPTION_TEMPLATES] == [
        "a photo of an antelope",
        "a high quality image of an antelope",
        "a clear picture of an antelope",
        "a realistic image of an antelope",
        "a cute antelope",
        "a wild antelope in its natural habitat",
        "a close-up of an antelope",
    ]


def test_an_article_in_the_template_is_not_doubled() -> None:
    assert caption(subject_of("owl"), "a photo of a {}") == "a photo of an owl"


@pytest.mark.parametrize("text", ["tiger", " Tiger ", "a tiger", "老虎"])
def test_an_animal_is_found_by_any_of_its_names(text: str) -> None:
    assert find_subject(text) == (subject_of("tiger"), None)


def test_an_animal_is_found_by_its_folder_and_by_its_name() -> None:
    assert find_subject("LADYBUGS") == find_subject("ladybug") == find_subject("瓢虫") == (subject_of("ladybugs"), None)


@pytest.mark.parametrize(
    ("text", "similar"),
    [
        ("tigr", ["tiger"]),
        ("elefant", ["elephant"]),
        ("虎", ["老虎"]),
        ("An owlbear", ["bear", "owl"]),
        ("x" * 9999, []),
    ],
)
def test_an_unknown_name_becomes_a_subject_and_similar_animals_are_suggested(text: str, similar: list[str]) -> None:
    subject, suggestions = find_subject(text)
    assert subject.name == text.removeprefix("An ")
    assert suggestions == similar
