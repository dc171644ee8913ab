from pathlib import Path

import pandas as pd
import pytest
from click.testing import CliRunner
from support.settings import encode_settings

from bestiary.cli import cli
from bestiary.diffusion.base import load_text
from bestiary.diffusion.caption_check import FolderCaptions, check_captions, render_captions
from bestiary.errors import BestiaryError
from bestiary.subjects import Subject, Subjects

ROOT = Path(__file__).parents[2]


def checked(
    base: Path, captions: list[str], name: str = "sks penguin", class_word: str = "penguin", **changes: object
) -> FolderCaptions:
    """The captions of one folder, of an image each; an empty caption stands for none."""
    table = pd.DataFrame(
        [
            {"path": f"pip/{number}.jpg", "class": "pip", "sha256": str(number), "caption": text}
            for number, text in enumerate(captions)
        ]
    )
    subjects = Subjects({"pip": Subject("pip", name, "", class_word=class_word, given=True)})
    (folder,) = check_captions(table, subjects, load_text(base), encode_settings(**changes))
    return folder


def test_each_image_is_shown_with_its_caption_and_its_tokens(base_folder: Path) -> None:
    folder = checked(base_folder, ["a photo of sks penguin", "sks penguin", ""])
    assert [(each.image, each.text) for each in folder.own] == [
        ("pip/0.jpg", "a photo of sks penguin"),
        ("pip/1.jpg", "sks penguin"),
    ]
    tokenizer = load_text(base_folder)[0]
    assert [each.tokens for each in folder.own] == [len(tokenizer(each.text).input_ids) for each in folder.own]
    assert folder.shared[0].text == "a photo of sks penguin"
    assert len(folder.shared) == 7
    assert folder.odd == []
    lines = list(render_captions([folder], 24))
    assert lines[0] == "pip: sks penguin (thing, class penguin), 3 images"
    assert "  1 image without a caption file, with one of these at each step:" in lines
    assert lines[-1] == "The base reads 24 tokens, with the first and the last one. Nothing odd."


@pytest.mark.parametrize(
    ("name", "seen"), [("sks penguin", True), ("xqz penguin", True), ("pip penguin", True), ("hamster penguin", False)]
)
def test_a_name_that_the_text_encoder_hardly_sees_is_odd(name: str, seen: bool, base_folder: Path) -> None:
    odd = checked(base_folder, ["", ""], name).odd
    assert ([name in line and "hardly tells" in line for line in odd] == [True]) is not seen
    assert bool(odd) is not seen


def test_a_missing_name_and_a_long_caption_are_odd(base_folder: Path) -> None:
    odd = checked(base_folder, ["a penguin", "sks penguin " * 20, ""]).odd
    assert odd[0].startswith("pip/0.jpg lacks the name sks penguin")
    assert odd[1].startswith("pip/1.jpg has ")
    assert "encoding will refuse it" in odd[1]
    assert len(odd) == 2


def test_a_name_of_200_tokens_is_odd_and_not_an_error(base_folder: Path) -> None:
    odd = checked(base_folder, [""], "sks " * 200).odd
    assert len(odd) == 7
    assert all("more than the base reads" in line for line in odd)


def test_the_same_caption_everywhere_is_odd(base_folder: Path) -> None:
    assert checked(base_folder, ["sks penguin"] * 3).odd[0].startswith("All captions from files are the same")
    assert checked(base_folder, ["sks penguin", ""]).odd == []


def test_shuffled_versions_are_shown(base_folder: Path) -> None:
    folder = checked(base_folder, ["sks penguin, snow, sea"], shuffle_tags=True, caption_variants=3)
    assert [each.image for each in folder.own] == ["pip/0.jpg"] * 3
    assert folder.shared == []


def test_the_command_shows_the_cleaned_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    with pytest.raises(BestiaryError, match="in the project's folder"):
        CliRunner().invoke(cli, ["captions"], catch_exceptions=False)
    (tmp_path / "params.yaml").write_bytes((ROOT / "params.yaml").read_bytes())
    (tmp_path / "models").symlink_to(ROOT / "models")
    with pytest.raises(BestiaryError, match="dvc repro clean"):
        CliRunner().invoke(cli, ["captions"], catch_exceptions=False)
    (tmp_path / "build" / "clean").mkdir(parents=True)
    table = pd.DataFrame([{"path": "my-cat/1.jpg", "class": "my-cat", "sha256": "0"}])
    table.to_csv(tmp_path / "build" / "clean" / "manifest.csv", index=False)
    told = CliRunner().invoke(cli, ["captions"], catch_exceptions=False).output
    assert told.startswith(
        "my-cat: my cat (thing), 1 image\n  1 image without a caption file, with one of these at each step:\n"
    )
    assert "tokens  a photo of my cat\n" in told
