"""Captions from files beside the images, from the folder to the manifest."""

import shutil
from pathlib import Path
from typing import Literal

import pytest
from support.settings import clean_settings

from bestiary import params
from bestiary.data.cleaning import ByHand, Outcome, clean
from bestiary.data.local import Taken, take
from bestiary.data.splitting import split
from bestiary.errors import BestiaryError
from bestiary.subjects import Subject, Subjects

SUBJECTS = Subjects({"cat": Subject("cat", "sks cat", "", class_word="cat", given=True)})


def settings(policy: Literal["prepend", "keep", "refuse"] = "prepend") -> params.Clean:
    return clean_settings(caption_without_name=policy)


def take_all(raw: Path) -> Taken:
    return take(raw, raw.parent / "taken", None, None, subjects=SUBJECTS)


def cleaned(raw: Path, policy: Literal["prepend", "keep", "refuse"] = "prepend") -> Outcome:
    take_all(raw)
    return clean(
        raw.parent / "taken", raw.parent / "clean", settings(policy), workers=1, by_hand=ByHand(subjects=SUBJECTS)
    )


def captions_of(outcome: Outcome) -> dict[str, str]:
    table = outcome.manifest
    return {path: text for path, text in zip(table["path"], table["caption"], strict=True) if text}


def findings_of(outcome: Outcome, kind: str) -> dict[str, str]:
    return {finding.path: finding.action for finding in outcome.findings if finding.kind == kind}


def test_without_caption_files_the_manifest_has_no_captions(raw: Path) -> None:
    assert "caption" not in cleaned(raw).manifest.columns
    assert not (raw.parent / "taken" / ".captions.csv").exists()


def test_captions_from_every_kind_of_file_stand_in_the_manifest(raw: Path) -> None:
    (raw / "cat" / "0.txt").write_text("\ufeffSKS cat,\n  asleep ", encoding="utf-8")
    (raw / "cat" / "1.caption").write_text("a photo of sks cat")
    line = '{"file_name": "2.jpg", "text": "a sks cat, \\u732b"}'
    (raw / "cat" / "metadata.jsonl").write_text(f"{line}\n\n")
    (raw / "owl" / "metadata.csv").write_text('file_name,text,more\n3.jpg,"an owl, at night",x\n')
    assert take_all(raw).captioned == 4
    outcome = cleaned(raw)
    assert captions_of(outcome) == {
        "cat/0.jpg": "SKS cat, asleep",
        "cat/1.jpg": "a photo of sks cat",
        "cat/2.jpg": "a sks cat, 猫",
        "owl/3.jpg": "an owl, at night",
    }
    assert outcome.findings == []
    train, val = split(outcome.manifest, val_fraction=0.2, seed=0)
    assert sum(map(bool, [*train["caption"], *val["caption"]])) == 4


def test_a_metadata_file_beside_the_class_folders_names_images_by_folder_and_file(raw: Path) -> None:
    lines = [
        '{"file_name": "cat/0.jpg", "text": "sks cat, asleep"}',
        '{"file_name": ".\\\\owl\\\\3.jpg", "text": "an owl"}',
    ]
    (raw / "metadata.jsonl").write_text("\n".join(lines))
    (raw / "metadata.csv").write_text("file_name,text\ncat/1.jpg,sks cat in snow\n")
    (raw / "cat" / "2.txt").write_text("sks cat, awake")
    taken = take_all(raw)
    assert (taken.captioned, taken.left_out) == (4, [])
    assert captions_of(cleaned(raw)) == {
        "cat/0.jpg": "sks cat, asleep",
        "cat/1.jpg": "sks cat in snow",
        "cat/2.jpg": "sks cat, awake",
        "owl/3.jpg": "an owl",
    }
    assert take(raw, raw.parent / "taken", ["cat"], 4).captioned == 3  # the owl's line is no mistake


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cat/9.jpg", r"raw/metadata\.jsonl, line 1 names 'cat/9\.jpg', and no class folder has such an image"),
        ("0.jpg", r"raw/metadata\.jsonl, line 1 names '0\.jpg'"),
        ("../raw/cat/0.jpg", r"raw/metadata\.jsonl, line 1 names '\.\./raw/cat/0\.jpg'"),
        ("cat/0.jpg", r"raw/metadata\.jsonl and .*raw/cat/0\.txt both have a caption for cat/0\.jpg"),
        ("cat/1.jpg", r"raw/metadata\.jsonl and .*raw/cat/metadata\.csv both have a caption for cat/1\.jpg"),
    ],
)
def test_a_mistake_beside_the_class_folders_is_named(raw: Path, name: str, message: str) -> None:
    (raw / "cat" / "0.txt").write_text("sks cat")
    (raw / "cat" / "metadata.csv").write_text("file_name,text\n1.jpg,sks cat\n")
    (raw / "metadata.jsonl").write_text(f'{{"file_name": "{name}", "text": "sks cat"}}')
    with pytest.raises(BestiaryError, match=message):
        take_all(raw)
    assert not (raw.parent / "taken").exists()


def test_a_caption_follows_its_image_to_another_name(raw: Path) -> None:
    shutil.move(raw / "cat" / "0.jpg", raw / "cat" / "a?.png")  # neither its name nor its format is right
    (raw / "cat" / "a?.txt").write_text("sks cat, asleep")
    (text,) = captions_of(cleaned(raw)).values()
    assert text == "sks cat, asleep"


@pytest.mark.parametrize(
    ("policy", "text", "action"),
    [("prepend", "sks cat, a category", "repaired"), ("keep", "a category", "flagged")],
)
def test_a_caption_without_its_subjects_name_is_a_finding(
    raw: Path, policy: Literal["prepend", "keep"], text: str, action: str
) -> None:
    (raw / "cat" / "0.txt").write_text("a category")
    outcome = cleaned(raw, policy)
    assert captions_of(outcome) == {"cat/0.jpg": text}
    assert findings_of(outcome, "caption without name") == {"cat/0.jpg": action}


def test_a_caption_without_its_subjects_name_can_be_refused(raw: Path) -> None:
    (raw / "cat" / "0.txt").write_text("a cat")
    (raw / "cat" / "1.txt").write_text("a cat")
    with pytest.raises(BestiaryError, match=r"cat/0\.jpg lacks .*: sks cat is not in: a cat \(1 more lacks it too\)"):
        cleaned(raw, "refuse")
    assert not (raw.parent / "clean").exists()


def test_what_is_done_about_captions_is_said(raw: Path) -> None:
    for number, text in enumerate(["", "a cat", "a cat", "sks cat"]):
        (raw / "cat" / f"{number}.txt").write_text(text)
    take_all(raw)
    said: list[str] = []
    for policy in ("prepend", "keep"):
        clean(
            raw.parent / "taken",
            raw.parent / "clean",
            clean_settings(caption_without_name=policy),
            workers=1,
            by_hand=ByHand(subjects=SUBJECTS),
            tell=said.append,
        )
    assert said == [
        "1 caption is empty: the templates are used instead.",
        "2 captions lack the subject's name: it is put in front (clean.caption_without_name).",
        "1 caption is empty: the templates are used instead.",
        "2 captions lack the subject's name: nothing is changed (clean.caption_without_name).",
    ]


def test_an_empty_caption_is_a_finding_and_templates_are_used(raw: Path) -> None:
    (raw / "cat" / "0.txt").write_text(" \n")
    (raw / "cat" / "1.txt").write_text("sks cat")
    outcome = cleaned(raw)
    assert captions_of(outcome) == {"cat/1.jpg": "sks cat"}
    assert findings_of(outcome, "empty caption") == {"cat/0.jpg": "flagged"}


def test_a_caption_without_an_image_is_a_finding(raw: Path) -> None:
    (raw / "cat" / "99.txt").write_text("sks cat")
    assert findings_of(cleaned(raw), "caption without image") == {"cat/99.txt": "left out"}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("metadata.jsonl", b'{"file_name": "9.jpg", "text": "x"}', r"metadata\.jsonl, line 1 names '9\.jpg'"),
        ("metadata.jsonl", b'\n{"file_name": "0.jpg", ', r"metadata\.jsonl, line 2 is not a caption"),
        ("metadata.jsonl", b'{"file_name": "0.jpg", "text": 3}', r"metadata\.jsonl, line 1 is not a caption"),
        ("metadata.jsonl", b"[" * 100_000, r"metadata\.jsonl, line 1 is not a caption"),
        ("metadata.jsonl", b"3", r"metadata\.jsonl, line 1 is not a caption"),
        ("metadata.csv", b"file_name,text\n../owl/0.jpg,x\n", r"metadata\.csv, line 2 names '\.\./owl/0\.jpg'"),
        ("metadata.csv", b"file_name,caption\n0.jpg,x\n", r"metadata\.csv has no columns file_name and text"),
        ("metadata.csv", b"", r"metadata\.csv has no columns"),
        (
            "metadata.csv",
            b"file_name,text\n0.jpg,a cat, asleep\n",
            r"metadata\.csv, line 2 does not have as many",
        ),
        ("metadata.csv", b'file_name,text\n0.jpg,"a cat\n', r"metadata\.csv, line 2 is not CSV.*Check its quotes"),
        ("metadata.csv", b"file_name,text\n0.jpg\n", r"metadata\.csv, line 2 does not have as many"),
        ("metadata.csv", b"file_name,text\n0.jpg,x\n0.jpg,y\n", r"metadata\.csv has two captions for cat/0\.jpg"),
        ("0.txt", "café".encode("latin-1"), r"0\.txt, line 1 is not in UTF-8"),
        ("0.caption", b"sks cat", r"0\.txt and .*0\.caption both|0\.caption and .*0\.txt both"),
    ],
)
def test_a_broken_caption_file_is_named_with_its_line(raw: Path, name: str, content: bytes, message: str) -> None:
    (raw / "cat" / "0.txt").write_text("sks cat") if name == "0.caption" else None
    (raw / "cat" / name).write_bytes(content)
    with pytest.raises(BestiaryError, match=message):
        take_all(raw)
    assert not (raw.parent / "taken").exists()


def test_captions_of_images_that_are_not_chosen_are_no_mistake(raw: Path) -> None:
    (raw / "cat" / "metadata.jsonl").write_text('{"file_name": "5.jpg", "text": "sks cat"}\n')
    assert take(raw, raw.parent / "taken", None, 2).captioned == 0
