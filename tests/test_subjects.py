import pytest

from bestiary.errors import BestiaryError
from bestiary.subjects import (
    ANIMALS,
    CAPTION_TEMPLATES,
    Subject,
    caption,
    check_folders,
    find_subject,
    subject_of,
    words_of,
)


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


@pytest.mark.parametrize(
    "text", ["my_owl", "my-owl", "my owl", " my  owl ", "My_Owl", "MY OWL", "my__owl", "my_owl_", "ｍｙ owl"]
)
def test_a_folder_and_a_typed_name_of_any_spelling_have_one_subject(text: str) -> None:
    assert subject_of(text).key == find_subject(text)[0].key == subject_of("my_owl").key
    assert find_subject(text)[0].name == subject_of(text).name


@pytest.mark.parametrize("text", ["Tiger", "TIGER", "老虎", "a_tiger", "the-tiger", "10_tiger"])
def test_a_folder_is_an_animal_by_each_of_its_names(text: str) -> None:
    assert subject_of(text) is subject_of("tiger")
    assert find_subject(text) == (subject_of("tiger"), None)


@pytest.mark.parametrize(
    ("folder", "phrase", "captions"),
    [
        ("my_owl", "my owl", ["a photo of my owl", "my cute owl", "my wild owl in its natural habitat"]),
        ("our-old-dog", "our old dog", ["a photo of our old dog", "our cute old dog", None]),
        ("Anna's cat", "Anna's cat", ["a photo of Anna's cat", "Anna's cute cat", None]),
        ("mystery_bird", "a mystery bird", ["a photo of a mystery bird", "a cute mystery bird", None]),
        ("itsy", "an itsy", ["a photo of an itsy", "a cute itsy", None]),
        ("my", "a my", ["a photo of a my", "a cute my", None]),
        ("8_ball python", "a ball python", ["a photo of a ball python", None, None]),
        ("8 ball", "an 8 ball", ["a photo of an 8 ball", None, None]),
        ("écureuil", "an écureuil", ["a photo of an écureuil", None, None]),
        ("001", "a 001", ["a photo of a 001", "a cute 001", None]),
    ],
)
def test_a_possessive_takes_the_place_of_the_article(folder: str, phrase: str, captions: list[str | None]) -> None:
    subject = subject_of(folder)
    assert subject.with_article == phrase
    templates = ("a photo of a {}", "a cute {name}", "a wild {name} in its natural habitat")
    for template, expected in zip(templates, captions, strict=True):
        assert expected is None or caption(subject, template) == expected


def test_a_name_with_braces_is_not_filled_again() -> None:
    assert caption(Subject("x", "{name} {}", ""), "a photo of {} and {name}") == "a photo of a {name} {} and {name} {}"


@pytest.mark.parametrize(
    ("folders", "named"),
    [
        (["my owl", "my-owl", "my_owl", "cat"], "my owl, my-owl, my_owl .* my owl"),
        (["Cat", "cat"], "Cat, cat .* cat"),
        (["ladybug", "ladybugs"], "ladybug, ladybugs"),
        (["老虎", "tiger"], "tiger, 老虎"),
        (["the_mug", "mug"], "mug, the_mug"),
        (["Straße", "STRASSE"], "STRASSE, Straße"),
        (["cafe\u0301", "café"], "café"),
        (["10_tiger", "cat"], '10_tiger .* "tiger", or to "10 tiger"'),
        (["001_black_swan", "cat"], '001_black_swan .* "black swan", or to "001 black swan"'),
        (["___", "cat"], "___"),
    ],
)
def test_folders_that_stand_for_no_subject_of_their_own_are_refused_by_name(folders: list[str], named: str) -> None:
    with pytest.raises(BestiaryError, match=named):
        check_folders(folders)


def test_numbers_and_words_that_tables_misread_are_names() -> None:
    check_folders(["001", "002", "1", "NA", "null", "None", "nan", "true", "10 tiger", "tiger"])
    assert [words_of(name) for name in ("001", "NA", "10 tiger")] == ["001", "NA", "10 tiger"]


def test_a_subject_that_was_taught_keeps_its_words_and_needs_no_hint() -> None:
    taught = [Subject("my_owl", "a grumpy owl", ""), Subject("tiger", "tiger", "")]
    assert find_subject("My-Owl", taught) == (taught[0], None)
    assert find_subject("grumpy owl", taught)[0].name == "grumpy owl"
    assert find_subject("老虎", taught) == (taught[1], None)
    assert find_subject("my owk", [Subject("my_owl", "my owl", "")])[1] == ["my owl"]
