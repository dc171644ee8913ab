import csv
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageOps
from support.planted_faults import NEAR, SAMPLE_FAULTS, faulty_paths, plant, recall
from support.settings import clean_settings

from bestiary import params
from bestiary.data.cleaning import ByHand, Outcome, clean
from bestiary.data.findings import Decision
from bestiary.data.images import open_rgb
from bestiary.data.off_topic import AskJudge
from bestiary.errors import BestiaryError

ROOT = Path(__file__).parents[2]

Draw = Callable[..., Image.Image]

SETTINGS = clean_settings(blank="quarantine", blurred="flag", exposure="flag", off_topic_threshold=0.05)


def run(
    raw: Path,
    settings: params.Clean = SETTINGS,
    judge: AskJudge | None = None,
    overrides: Mapping[str, Decision] | None = None,
    report: Path | None = None,
    workers: int | None = None,
) -> Outcome:
    target = raw.parent / "clean"
    by_hand = ByHand(overrides or {})
    return clean(raw, target, settings, judge=judge, by_hand=by_hand, report=report, workers=workers)


def findings_of(outcome: Outcome, path: str) -> list[tuple[str, str]]:
    return [(finding.kind, finding.action) for finding in outcome.findings if finding.path == path]


def quarantined(outcome: Outcome) -> set[str]:
    return {finding.path for finding in outcome.findings if finding.action == "quarantined"}


def test_good_images_are_kept_with_their_bytes(raw: Path) -> None:
    outcome = run(raw)
    assert outcome.findings == []
    assert outcome.images_in == len(outcome.manifest) == 12
    for path in raw.glob("*/*"):
        assert (raw.parent / "clean" / path.relative_to(raw)).samefile(path)


def test_the_manifest_lists_every_kept_image(raw: Path) -> None:
    outcome = run(raw)
    table = list(csv.DictReader((raw.parent / "clean" / "manifest.csv").open()))
    assert list(table[0]) == ["path", "class", "animal", "group", "width", "height", "sha256"]
    assert [row["path"] for row in table] == sorted(path.relative_to(raw).as_posix() for path in raw.glob("*/*"))
    assert (table[0]["class"], table[0]["animal"], table[0]["width"], table[0]["height"]) == (
        "cat",
        "cat",
        "160",
        "120",
    )
    assert len(set(outcome.manifest["group"])) == 12


def test_broken_files_are_quarantined_and_do_not_end_the_run(raw: Path) -> None:
    content = (raw / "cat" / "0.jpg").read_bytes()
    (raw / "cat" / "empty.jpg").touch()
    (raw / "cat" / "page.jpg").write_bytes(b"<!doctype html><html></html>")
    (raw / "cat" / "half.jpg").write_bytes(content[: len(content) // 2])
    outcome = run(raw)
    for name in ("empty", "page", "half"):
        assert findings_of(outcome, f"cat/{name}.jpg") == [("unreadable", "quarantined")]
    assert len(outcome.manifest) == 12


def test_a_wrong_extension_is_repaired_and_the_bytes_are_kept(raw: Path, picture: Draw) -> None:
    picture(50).save(raw / "cat" / "really a png.jpg", "PNG")
    outcome = run(raw)
    assert findings_of(outcome, "cat/really a png.jpg") == [("wrong extension", "repaired")]
    assert (raw.parent / "clean/cat/really a png.png").samefile(raw / "cat" / "really a png.jpg")


def test_other_images_become_upright_rgb(raw: Path, picture: Draw) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(51).save(raw / "cat" / "lying.jpg", exif=exif)
    picture(52).convert("RGBA").save(raw / "cat" / "alpha.png")
    picture(53).convert("CMYK").save(raw / "cat" / "print.jpg")
    picture(54).save(raw / "cat" / "moving.gif", save_all=True, append_images=[picture(55)])
    outcome = run(raw)
    assert findings_of(outcome, "cat/lying.jpg") == [("orientation", "converted")]
    for name in ("lying.jpg", "alpha.png", "print.jpg", "moving.png"):
        with Image.open(raw.parent / "clean" / "cat" / name) as image:
            assert image.mode == "RGB"
            assert image.getexif().get(0x0112, 1) == 1
    assert open_rgb(raw.parent / "clean" / "cat" / "lying.jpg").size == (120, 160)
    row = outcome.manifest.set_index("path").loc["cat/lying.jpg"]
    assert (row["width"], row["height"]) == (120, 160)


def test_two_images_with_the_same_repaired_name_are_both_kept(raw: Path, picture: Draw) -> None:
    picture(51).save(raw / "cat" / "one.png", "PNG")
    picture(52).save(raw / "cat" / "one.jpg", "PNG")
    outcome = run(raw)
    names = [path for path in outcome.manifest["path"] if "one" in path]
    assert len(names) == 2
    assert "cat/one.png" in names


def test_small_narrow_and_blank_images_are_quarantined(raw: Path, picture: Draw) -> None:
    picture(51, (200, 31)).save(raw / "cat" / "small.png")
    picture(52, (200, 40)).save(raw / "cat" / "strip.png")
    Image.new("RGB", (160, 120), "beige").save(raw / "cat" / "blank.png")
    outcome = run(raw)
    assert findings_of(outcome, "cat/small.png") == [("too small", "quarantined")]
    assert findings_of(outcome, "cat/strip.png") == [("extreme aspect ratio", "quarantined")]
    assert findings_of(outcome, "cat/blank.png") == [("blank", "quarantined")]


def test_the_parameters_decide_what_happens_to_blurred_dark_and_bright_images(raw: Path, picture: Draw) -> None:
    picture(51, (8, 6)).resize((160, 120), Image.Resampling.BICUBIC).save(raw / "cat" / "blurred.png")
    picture(52).point(lambda level: level // 8).save(raw / "cat" / "dark.png")
    bright = Image.new("RGB", (160, 120), "white")
    bright.paste(picture(53, (40, 30)))
    bright.save(raw / "cat" / "bright.png")
    outcome = run(raw)
    assert findings_of(outcome, "cat/blurred.png") == [("blurred", "flagged")]
    assert findings_of(outcome, "cat/dark.png") == [("dark", "flagged")]
    assert findings_of(outcome, "cat/bright.png") == [("bright", "flagged")]
    strict = SETTINGS.model_copy(update={"blurred": "quarantine", "exposure": "off"})
    outcome = run(raw, settings=strict)
    assert findings_of(outcome, "cat/blurred.png") == [("blurred", "quarantined")]
    assert findings_of(outcome, "cat/dark.png") == []


def test_the_first_of_exact_duplicates_is_kept(raw: Path) -> None:
    shutil.copyfile(raw / "cat" / "3.jpg", raw / "cat" / "0 copy.jpg")
    outcome = run(raw)
    assert quarantined(outcome) == {"cat/3.jpg"}
    assert findings_of(outcome, "cat/3.jpg") == [("exact duplicate", "quarantined")]


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("near duplicate", lambda image: image.resize((96, 72))),
        ("near duplicate", lambda image: image.crop((6, 5, 155, 118))),
        ("near duplicate", lambda image: image.convert("L")),
        ("mirror image", ImageOps.mirror),
    ],
)
def test_the_largest_of_near_duplicates_is_kept(
    raw: Path, kind: str, change: Callable[[Image.Image], Image.Image]
) -> None:
    with Image.open(raw / "cat" / "3.jpg") as image:
        change(image).save(raw / "cat" / "version.jpg", quality=60)
    outcome = run(raw)
    assert quarantined(outcome) == {"cat/version.jpg"}
    assert findings_of(outcome, "cat/version.jpg")[-1] == (kind, "quarantined")


def test_a_larger_version_replaces_a_smaller_one(raw: Path, picture: Draw) -> None:
    large = picture(3, (320, 240))
    large.save(raw / "cat" / "large.jpg", quality=92)
    large.resize((160, 120), Image.Resampling.LANCZOS).save(raw / "cat" / "3.jpg", quality=92)
    assert quarantined(run(raw)) == {"cat/3.jpg"}


def test_an_enlarged_or_framed_copy_does_not_replace_its_original(raw: Path) -> None:
    with Image.open(raw / "cat" / "3.jpg") as image:
        image.resize((320, 240), Image.Resampling.LANCZOS).save(raw / "cat" / "large.jpg")
    with Image.open(raw / "cat" / "4.jpg") as image:
        ImageOps.expand(image, 12, "white").save(raw / "cat" / "framed.jpg", quality=97)
    outcome = run(raw)
    assert quarantined(outcome) == {"cat/framed.jpg", "cat/large.jpg"}
    assert all(finding.score is not None and 0 <= finding.score <= 1 for finding in outcome.findings)


@pytest.mark.parametrize("change", [lambda image: image, lambda image: image.resize((96, 72)), ImageOps.mirror])
def test_without_a_judge_a_picture_in_two_classes_is_quarantined_in_both(
    raw: Path, change: Callable[[Image.Image], Image.Image]
) -> None:
    with Image.open(raw / "cat" / "3.jpg") as image:
        change(image).save(raw / "owl" / "cat.jpg")
    outcome = run(raw)
    assert quarantined(outcome) == {"cat/3.jpg", "owl/cat.jpg"}
    assert {finding.kind for finding in outcome.findings} == {"conflict"}


def _colour_judge(images: Sequence[Image.Image], texts: Sequence[str]) -> NDArray[np.float32]:
    """Takes red images for owls and all others for cats."""
    cat, owl = texts.index("a photo of a cat"), texts.index("a photo of an owl")
    table = np.zeros((len(images), len(texts)), np.float32)
    for row, image in zip(table, images, strict=True):
        red, _, blue = np.asarray(image, float).mean(axis=(0, 1))
        row[owl if red > blue + 60 else cat] = 1.0
    return table


def _no_features(images: Sequence[Image.Image]) -> NDArray[np.float32]:
    raise AssertionError("the folders are the animals, so the judge is asked by their prompts")


def _redden(folder: Path) -> None:
    for path in folder.iterdir():
        image = np.asarray(Image.open(path)).copy()
        image[..., 0] = image[..., 0] // 2 + 127
        image[..., 2] //= 4
        Image.fromarray(image).save(path, quality=92)


def test_the_judge_decides_between_two_classes(raw: Path) -> None:
    _redden(raw / "owl")
    shutil.copyfile(raw / "owl" / "3.jpg", raw / "cat" / "owl.jpg")
    settings = SETTINGS.model_copy(update={"off_topic": "quarantine"})
    outcome = run(raw, settings=settings, judge=AskJudge(_colour_judge, _no_features))
    assert quarantined(outcome) == {"cat/owl.jpg"}
    assert findings_of(outcome, "cat/owl.jpg") == [("conflict", "quarantined")]


@pytest.mark.parametrize(("policy", "action"), [("quarantine", "quarantined"), ("flag", "flagged")])
def test_an_image_that_the_judge_takes_for_another_class_is_off_topic(
    raw: Path, picture: Draw, policy: str, action: str
) -> None:
    _redden(raw / "owl")
    picture(60).save(raw / "owl" / "cat.jpg")
    settings = SETTINGS.model_copy(update={"off_topic": policy})
    outcome = run(raw, settings=settings, judge=AskJudge(_colour_judge, _no_features))
    assert findings_of(outcome, "owl/cat.jpg") == [("off topic", action)]
    assert len(outcome.findings) == 1


@pytest.mark.slow
def test_the_result_depends_neither_on_the_number_of_workers_nor_on_the_order_of_the_files(
    raw: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(raw, 0.1)
    alone = run(raw, workers=1)
    together = run(raw, workers=3)
    assert alone.findings == together.findings
    assert alone.manifest.equals(together.manifest)
    iterdir = Path.iterdir
    monkeypatch.setattr(Path, "iterdir", lambda folder: iter(sorted(iterdir(folder), reverse=True)))
    backwards = run(raw, workers=1)
    assert alone.findings == backwards.findings
    assert alone.manifest.equals(backwards.manifest)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ({"cat/5.jpg": "drop"}, {"cat/5.jpg"}),
        ({"cat/3 copy.jpg": "keep", "cat/3.jpg": "keep"}, set()),
        ({"cat/3 small.jpg": "keep"}, {"cat/3.jpg"}),
    ],
)
def test_overrides_win_over_every_check(raw: Path, overrides: Mapping[str, Decision], expected: set[str]) -> None:
    if "cat/3 copy.jpg" in overrides:
        shutil.copyfile(raw / "cat" / "3.jpg", raw / "cat" / "3 copy.jpg")
    if "cat/3 small.jpg" in overrides:
        with Image.open(raw / "cat" / "3.jpg") as image:
            image.resize((96, 72)).save(raw / "cat" / "3 small.jpg")
    outcome = run(raw, overrides=overrides)
    assert quarantined(outcome) == expected


def test_two_versions_kept_by_override_share_a_group(raw: Path) -> None:
    with Image.open(raw / "cat" / "3.jpg") as image:
        image.resize((96, 72)).save(raw / "cat" / "small.jpg")
    outcome = run(raw, overrides={"cat/3.jpg": "keep", "cat/small.jpg": "keep"})
    groups = outcome.manifest.set_index("path")["group"]
    assert groups["cat/3.jpg"] == groups["cat/small.jpg"]
    assert len(set(groups)) == 12


def test_adding_a_smaller_copy_does_not_rename_a_group(raw: Path) -> None:
    before = run(raw).manifest
    for path in list(raw.glob("*/*")):
        with Image.open(path) as image:
            image.resize((96, 72)).save(path.with_name(f"a smaller {path.name}"))
    after = run(raw)
    assert len(quarantined(after)) == 12
    assert after.manifest.equals(before)


def test_a_sheet_shows_a_copy_beside_its_original(raw: Path) -> None:
    for name in ("cat", "owl"):
        shutil.copyfile(raw / name / "3.jpg", raw / name / "4 copy.jpg")
    run(raw, report=raw.parent / "report")
    kept, copy = (raw / "cat" / name for name in ("3.jpg", "4 copy.jpg"))
    sheet = np.asarray(Image.open(raw.parent / "report" / "exact_duplicate.png").convert("RGB"), int)
    picture = np.asarray(Image.open(kept), int)
    height, width = picture.shape[:2]
    spots = [
        (y, x)
        for y in range(sheet.shape[0] - height + 1)
        for x in range(sheet.shape[1] - width + 1)
        if (sheet[y, x] == picture[0, 0]).all() and (sheet[y : y + height, x : x + width] == picture).all()
    ]
    assert kept.read_bytes() == copy.read_bytes()
    assert len(spots) == 2


def test_findings_sheets_and_quarantined_images_are_written(raw: Path) -> None:
    plant(raw, 0.2)
    outcome = run(raw, report=raw.parent / "report")
    table = list(csv.DictReader((raw.parent / "report" / "findings.csv").open()))
    assert list(table[0]) == ["path", "class", "kind", "detail", "action", "score"]
    assert len(table) == len(outcome.findings)
    for finding in outcome.findings:
        assert (raw.parent / "report" / f"{finding.kind.replace(' ', '_')}.png").exists()
    for path in quarantined(outcome):
        assert (raw.parent / "report" / "quarantine" / path).samefile(raw / path)


def test_rejecting_all_images_is_an_error_and_writes_nothing(raw: Path) -> None:
    for path in raw.glob("*/*"):
        path.write_bytes(b"gone")
    with pytest.raises(BestiaryError, match=r"cat lost 6 of 6 images \(6 unreadable\); owl lost 6 of 6"):
        run(raw)
    assert [path.name for path in raw.parent.iterdir()] == ["raw"]


def test_planted_faults_are_found_and_good_images_are_kept(tmp_path: Path, picture: Draw) -> None:
    for name in ("cat", "dog", "owl", "pig"):
        (tmp_path / "raw" / name).mkdir(parents=True)
        for number in range(25):
            seed = sum(map(ord, name)) * 1000 + number
            picture(seed, (128, 96)).save(tmp_path / "raw" / name / f"{number}.jpg", quality=90)
    planted = plant(tmp_path / "raw", 0.06)
    rejected = quarantined(run(tmp_path / "raw"))
    assert recall(planted["broken"], rejected) >= 0.95
    assert recall(planted["exact"], rejected) >= 0.95
    for kind in NEAR:
        assert recall(planted[kind], rejected) >= 0.9, kind
    assert rejected <= faulty_paths(planted)


@pytest.mark.slow
def test_the_faults_of_the_bundled_sample_are_found_and_its_good_images_are_kept(tmp_path: Path) -> None:
    (tmp_path / "raw").symlink_to(ROOT / "samples")
    outcome = run(tmp_path / "raw")
    rejected = quarantined(outcome)
    touched = {finding.path for finding in outcome.findings}
    planted = list(csv.DictReader(SAMPLE_FAULTS.open(encoding="utf-8")))
    seen = {
        row["path"]: row["path"] in touched or row["of"] in rejected
        for row in planted
        if row["fault"] != "off_topic"  # only the judge finds these
    }
    assert sum(seen.values()) >= 0.95 * len(seen), [path for path, found in seen.items() if not found]
    good = {finding.path for finding in outcome.findings} - {row[key] for row in planted for key in ("path", "of")}
    assert len(good & rejected) <= 0.01 * outcome.images_in
