import pytest

from bestiary.subjects import ANIMALS, CAPTION_TEMPLATES, caption, find_subject, subject_of


def test_there_are_100_animals_with_names_of_their_own() -> None:
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
def test_an_animal_is_called_what_people_call_it(folder: str, phrase: str, chinese: str) -> None:
    assert subject_of(folder).with_article == phrase
    assert subject_of(folder).chinese == chinese


def test_every_animal_has_the_article_that_its_sound_asks_for() -> None:
    with_an = {animal.name for animal in ANIMALS if animal.with_article.startswith("an ")}
    assert with_an == {"antelope", "eagle", "elephant", "octopus", "orangutan", "otter", "owl"}


def test_somebodys_own_subject_is_named_after_its_folder() -> None:
    assert subject_of("my_red-panda").name == "my red panda"
    assert subject_of("unicorn").with_article == "a unicorn"
    assert subject_of("hourglass_spider").with_article == "an hourglass spider"


def test_captions_are_right_english_in_every_template() -> None:
    assert [caption(subject_of("antelope"), template) for template in CAPTION_TEMPLATES] == [
        "a photo of an antelope",
        "a high quality image of an antelope",
        "a clear picture of an antelope",
        "a realistic image of an antelope",
        "a cute antelope",
        "a wild antelope in its natural habitat",
        "a close-up of an antelope",
    ]


def test_an_article_before_the_gap_of_a_template_is_not_doubled() -> None:
    assert caption(subject_of("owl"), "a photo of a {}") == "a photo of an owl"


@pytest.mark.parametrize("text", ["tiger", " Tiger ", "a tiger", "老虎"])
def test_an_animal_is_found_by_any_of_its_names(text: str) -> None:
    assert find_subject(text) == (subject_of("tiger"), None)


def test_an_animal_is_found_by_its_folder_and_by_its_name() -> None:
    assert find_subject("LADYBUGS") == find_subject("ladybug") == find_subject("瓢虫") == (subject_of("ladybugs"), None)


@pytest.mark.parametrize(
    ("text", "near"),
    [
        ("tigr", ["tiger"]),
        ("elefant", ["elephant"]),
        ("虎", ["老虎"]),
        ("An owlbear", ["bear", "owl"]),
        ("x" * 9999, []),
    ],
)
def test_any_other_name_is_an_animal_of_that_name_with_the_nearest_known_ones(text: str, near: list[str]) -> None:
    animal, names = find_subject(text)
    assert animal.name == text.removeprefix("An ")
    assert names == near
