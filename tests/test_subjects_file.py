"""subjects.yaml: what the folders of data/ show, in their owner's words."""

from pathlib import Path

import pytest

from bestiary.errors import BestiaryError
from bestiary.registry.tags import SUBJECTS_TAG, subjects_of, subjects_tag
from bestiary.registry.versions import Version
from bestiary.subjects import (
    CAPTION_TEMPLATES,
    STYLE_TEMPLATES,
    THING_TEMPLATES,
    Subjects,
    caption,
    check_folders,
    find_subject,
    subject_of,
    templates_of,
)

ROOT = Path(__file__).parents[1]


def read(folder: Path, text: str) -> Subjects:
    (folder / "subjects.yaml").write_text(text, encoding="utf-8")
    return Subjects.read(folder / "subjects.yaml")


def test_the_file_in_the_repository_describes_nothing_and_may_be_missing(tmp_path: Path) -> None:
    assert Subjects.read(ROOT / "subjects.yaml") == Subjects.read(tmp_path / "subjects.yaml") == Subjects()


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ("{name: sks cat, class: cat}", ["a photo of sks cat", "a cute sks cat", "a good photo of sks cat"]),
        ("{name: Momo}", ["a photo of Momo", "a cute Momo", "a good photo of Momo"]),
        ("{class: cat}", ["a photo of my cat", "my cute cat", "a good photo of my cat"]),
        ("{name: 小白}", ["a photo of 小白", "a cute 小白", "a good photo of 小白"]),
    ],
)
def test_a_given_name_stands_in_captions_as_it_is(entry: str, expected: list[str], tmp_path: Path) -> None:
    subject = read(tmp_path, f"my-cat: {entry}\n").of("my-cat")
    templates = ("a photo of a {}", "a cute {name}", "a good photo of {}")
    assert [caption(subject, template) for template in templates] == expected


@pytest.mark.parametrize("entry", ["{kind: style}", "{name: watercolour style, kind: style}"])
def test_a_style_is_what_pictures_are_in(entry: str, tmp_path: Path) -> None:
    subject = read(tmp_path, f"watercolour: {entry}\n").of("watercolour")
    assert caption(subject, "a photo of {}") == "a photo in watercolour style"
    assert caption(subject, "a photo of a {} at night") == "a photo in watercolour style at night"
    assert templates_of([subject]) == STYLE_TEMPLATES
    assert [caption(subject, template) for template in STYLE_TEMPLATES[:2]] == [
        "a picture in watercolour style",
        "an image in watercolour style",
    ]


def test_only_animals_are_wild_in_their_natural_habitat(tmp_path: Path) -> None:
    subjects = read(tmp_path, "mug: {name: sks mug, class: mug}\n")
    assert templates_of([subjects.of("owl"), subjects.of("tiger")]) == CAPTION_TEMPLATES
    for folders in (["mug"], ["mug", "owl"], ["my-cat"]):
        assert templates_of([subjects.of(folder) for folder in folders]) == THING_TEMPLATES
    assert not [template for template in THING_TEMPLATES if "wild" in template or "cute" in template]


def test_a_folder_without_an_entry_keeps_its_words(tmp_path: Path) -> None:
    subjects = read(tmp_path, "mug: {name: sks mug}\n")
    assert subjects.of("ladybugs") is subject_of("ladybugs")
    assert subjects.of("my-cat") == subject_of("my-cat")


def test_the_chinese_name_is_the_given_one(tmp_path: Path) -> None:
    subjects = read(tmp_path, "mug: {name: sks mug, chinese: 我的杯子}\ntiger: {class: animal}\n")
    assert (subjects.of("mug").chinese, subjects.of("tiger").chinese) == ("我的杯子", "老虎")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- mug", r"subjects\.yaml must map folders"),
        ("mug: sks mug", r"subjects\.yaml: mug must be followed by keys"),
        ("mug: {name: sks mug", r"subjects\.yaml is not valid YAML: line 1: expected .*\. Correct the line"),
        ("mug: {nmae: sks mug}", "mug: the key nmae is unknown. Use name, class, kind, chinese and others"),
        ("mug: {1: sks mug}", "mug: the key 1 is unknown"),
        ("mug: {kind: person}", r"mug\.kind is 'person'\. Choose thing or style"),
        ("mug: {name: 001}", r"mug\.name is 1, which is no text\. Put the words between quotes"),
        ("mug: {name: ' '}", r"mug\.name is empty"),
        ("mug: {name: 'sks {} mug'}", r"mug\.name has \{ or \} in it"),
        (f"mug: {{name: {'sks ' * 200}}}", r"mug\.name has more than 100 characters\. Shorten it"),
        ("mug: {chinese: [杯子]}", r"mug\.chinese is \['杯子'\], which is no text"),
        ('mug: {name: "sks \\e[31m mug"}', r"mug\.name has characters that cannot be printed"),
        ('mug: {name: "sks \\ud800 mug"}', r"mug\.name has characters that no text has"),
        ("mug: {name: sks \a mug}", r"subjects\.yaml is not valid YAML: it has control characters"),
        ("mug: {name: Cat, class: cat}", "mug: name and class are both 'Cat'.*sks cat"),
        ("penguin: {class: penguin}", "penguin: name and class are both 'penguin'"),
        ("mug: {kind: style, class: mug}", "mug: a style has no class"),
        ("mug: {name: a}\nmug: {name: b}", "describes the folder mug twice"),
    ],
)
def test_a_mistake_is_named_with_its_folder_and_key(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(BestiaryError, match=message):
        read(tmp_path, text)


def test_a_file_in_another_encoding_is_named(tmp_path: Path) -> None:
    (tmp_path / "subjects.yaml").write_bytes("mug: {name: café}".encode("latin-1"))
    with pytest.raises(BestiaryError, match=r"subjects\.yaml is not UTF-8"):
        Subjects.read(tmp_path / "subjects.yaml")


def test_an_unknown_folder_is_named_with_the_one_that_may_be_meant(tmp_path: Path) -> None:
    subjects = read(tmp_path, "my-cta: {name: sks cat}\n")
    with pytest.raises(BestiaryError, match=r"describes the folder my-cta, .* Is it my-cat\?"):
        subjects.check_known(["my-cat", "my-dog"])
    subjects.check_known(["my-cta"])


def test_two_folders_of_one_name_are_refused(tmp_path: Path) -> None:
    subjects = read(tmp_path, "cat1: {name: sks cat}\ncat2: {name: SKS cat}\n10_mug: {name: xqz mug}\n")
    with pytest.raises(BestiaryError, match="cat1, cat2 stand for the same subject, sks cat"):
        check_folders(["cat1", "cat2"], subjects)
    check_folders(["cat1", "10_mug"], subjects)  # kohya's folder has a name of its own


def test_subjects_survive_a_folder_and_a_registered_version(tmp_path: Path) -> None:
    subjects = read(tmp_path, "😀: {name: sks cat, class: cat}\nink: {kind: style}\n")
    subjects.write_to(tmp_path)
    assert Subjects.read_from(tmp_path) == subjects
    Subjects().write_to(tmp_path)
    assert Subjects.read_from(tmp_path) == Subjects()
    tag = subjects_tag(["😀", "ink", "ladybugs"], subjects)
    taught = subjects_of(Version("bestiary", 1, [], {SUBJECTS_TAG: tag}, "run"))
    assert taught == (subjects.of("😀"), subjects.of("ink"), subject_of("ladybugs"))
    assert find_subject("SKS Cat", taught)[0].with_article == "sks cat"


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "subjects.json").write_text('{"folder": 1}')
    with pytest.raises(BestiaryError, match=r"subjects\.json is damaged"):
        Subjects.read_from(tmp_path)


def test_a_folder_of_others_is_no_subject(tmp_path: Path) -> None:
    subjects = read(tmp_path, "my-cat: {name: sks cat, class: cat, others: other-cats}")
    assert subjects.folders_of_others == {"my-cat": "other-cats"}
    subjects.check_known(["my-cat", "other-cats"])
    with pytest.raises(BestiaryError, match="describes the folder other-cats, and the data has no such folder"):
        subjects.check_known(["my-cat", "cats"])
    assert Subjects.from_json(subjects.to_json()) == subjects


def test_others_cannot_come_from_sciencedb_which_trains_on_every_class(tmp_path: Path) -> None:
    read(tmp_path, "my-cat: {name: sks cat}").check_without_others()
    with pytest.raises(BestiaryError, match=r"gives my-cat the others cats.* source folder"):
        read(tmp_path, "my-cat: {name: sks cat, others: cats}").check_without_others()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("my-cat: {name: sks cat, others: my-cat}", "my-cat.others names the folder itself"),
        ("a: {name: sks cat, others: b}\nb: {name: sks dog}", "a.others names the folder b, which is a subject itself"),
    ],
)
def test_others_that_would_be_trained_on_are_refused(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(BestiaryError, match=message):
        read(tmp_path, text)


def test_words_are_read_as_dvc_reads_them(tmp_path: Path) -> None:
    """YAML 1.2 has no other words for true and false, and a folder's name is text whatever it looks like."""
    described = read(tmp_path, "001: {name: off, class: no}\non: {name: yes, class: mug}\n").described
    assert {folder: (each.name, each.class_word) for folder, each in described.items()} == {
        "001": ("off", "no"),
        "on": ("yes", "mug"),
    }
