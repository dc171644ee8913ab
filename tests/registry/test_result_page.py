"""The page with the result that register writes."""

from __future__ import annotations

import base64
import io
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image
from support.fast_variant import acceptance
from support.registry import DEFAULTS, evaluation, make_adapter, make_submission, one_subject

from bestiary.diffusion.adapter import adapter_sha256
from bestiary.diffusion.base import base_sha256
from bestiary.errors import BestiaryError
from bestiary.evaluation.report import EvaluationReport, describe_proof, read_evaluation, table_rows
from bestiary.project import render_results
from bestiary.registry.registering import Registration, read_registration
from bestiary.registry.result_page import page as result_page
from bestiary.registry.result_page.fast_page import write_fast_page
from bestiary.registry.result_page.page import Source, render, write_page

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "reports" / "results"
SOURCE = Source("models/base", None, "b" * 64, "d" * 64)
CHALLENGER = Registration("bestiary", 2, ["challenger"], "a" * 64, "challenger", ["It is <b>not</b> better."])


class Parsed(HTMLParser):
    """A page's text, its table's rows, its tags, and the addresses in it."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.rows: list[list[str]] = []
        self.words: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for key, value in attributes if key in ("src", "href", "srcset", "action")]
        if tag == "tr":
            self.rows.append([])

    def handle_data(self, data: str) -> None:
        self.words += data.split()
        if self.rows and data.strip() and "table" in self.tags and self.lasttag in ("th", "td"):
            self.rows[-1].append(data.strip())

    @property
    def text(self) -> str:
        return " ".join(self.words)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """The sheets that evaluate draws, of one grey each."""
    folder = tmp_path / "evaluate"
    for grey, name in enumerate(("sheet.png", "memorisation.png", "contexts/pip.png")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (40, 30), 50 * grey).save(folder / name)
    return folder


def greys(page: Parsed) -> list[int]:
    """The grey of each picture in the page."""
    found: list[int] = []
    for address in page.addresses:
        kind, _, data = address.partition(",")
        assert kind == "data:image/jpeg;base64"
        pixel = Image.open(io.BytesIO(base64.b64decode(data))).convert("L").getpixel((0, 0))
        assert isinstance(pixel, int)
        found.append(pixel)
    return found


def test_the_page_of_several_classes_shows_the_reports_numbers_and_nothing_from_elsewhere(pictures: Path) -> None:
    report, registration = read_evaluation(RESULTS / "evaluate.json"), read_registration(RESULTS / "register.json")
    page = Parsed(render(report, registration, SOURCE, DEFAULTS, pictures))
    expected = [[*row[:4], "better", row[4]] for row in table_rows(report)]
    assert page.rows[1:] == expected
    assert greys(page) == [0, 50]
    assert "script" not in page.tags
    assert "link" not in page.tags
    assert "teaches the base 16 subjects: bee, butterfly, crab" in page.text
    assert f"all of them): {report.memorisation.adapter.copied.describe()}." in page.text
    for reason in registration.reasons:
        assert reason in page.text
    for hash_ in (registration.adapter_sha256, "b" * 64, "d" * 64):
        assert hash_ in page.text
    assert f"bestiary pull models:/bestiary/{registration.version} --out my-adapter" in page.text


def test_the_page_of_one_subject_shows_its_proof_and_its_contexts(pictures: Path) -> None:
    report = one_subject()
    proof = report.only_subject
    assert proof
    page = Parsed(render(report, CHALLENGER, SOURCE, DEFAULTS, pictures))
    for sentence in describe_proof(proof):
        assert sentence in page.text
    assert [row[4] for row in page.rows[1:]] == ["better", "no certain difference"]
    assert greys(page) == [0, 100, 50]
    assert "bestiary generate 'sks penguin' --adapter models:/bestiary/2 --count 4" in page.text
    assert proof.photos_sha256 in page.text
    assert "The gate's decision: challenger" in page.text


def test_names_and_reasons_are_shown_as_text(pictures: Path) -> None:
    report = evaluation(gains_by_class={"<script>alert(1)</script>": 5.0})
    html = render(report, CHALLENGER, SOURCE, DEFAULTS, pictures)
    page = Parsed(html)
    assert "script" not in page.tags
    assert "b" not in page.tags
    assert "<script>" in page.text
    assert "It is <b>not</b> better." in page.text


def test_without_network_and_in_every_theme(pictures: Path) -> None:
    html = render(one_subject(), CHALLENGER, SOURCE, DEFAULTS, pictures)
    assert re.findall(r"https?://|url\(|@import", html) == []
    assert "prefers-color-scheme: dark" in html


def test_a_sheet_of_a_hundred_classes_keeps_the_page_small(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert 3 * result_page.PICTURE_BYTES * 4 / 3 < 2e6
    monkeypatch.setattr(result_page, "PICTURE_BYTES", 20_000)
    Image.effect_noise((400, 300), 80).save(pictures / "sheet.png")
    assert len(render(one_subject(), CHALLENGER, SOURCE, DEFAULTS, pictures)) < 50_000


@pytest.mark.slow
def test_register_writes_the_page_and_results_name_it_for_this_adapter_only(
    project: Path, base_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(project)
    submission = make_submission(project, base_folder, make_adapter(base_folder, project / "models" / "adapter", 0))
    registration = replace(CHALLENGER, adapter_sha256=adapter_sha256(submission.adapter))
    path = project / "reports" / "index.html"
    write_page(path, submission, registration)
    page = Parsed(path.read_text(encoding="utf-8"))
    assert page.addresses == []  # this evaluation drew no sheets
    assert adapter_sha256(submission.adapter) in page.text
    assert base_sha256(str(base_folder), None) in page.text
    assert "data, SHA-256 not stored in the adapter" in page.text

    def printed(report: EvaluationReport) -> str:
        return "\n".join(render_results(report, registration, "bestiary"))

    assert "reports/index.html: the result as one page" in printed(submission.evaluation)
    other = submission.evaluation.model_copy(update={"adapter_sha256": "0" * 64})
    assert "index.html" not in printed(other)


def test_the_page_gets_a_section_about_the_fast_variant(pictures: Path, tmp_path: Path) -> None:
    page, out = tmp_path / "index.html", tmp_path / "fast.html"
    page.write_text(render(evaluation("a" * 64), CHALLENGER, SOURCE, DEFAULTS, pictures), encoding="utf-8")
    write_fast_page(out, page, CHALLENGER, acceptance("a" * 64, "f" * 64), pictures / "sheet.png")
    before, after = (Parsed(path.read_text(encoding="utf-8")) for path in (page, out))
    assert len(after.rows) == len(before.rows) + 6
    assert "The fast variant: accepted Fast variant accepted: openvino in int8 with the tiny decoder" in after.text
    assert "bestiary pull models:/bestiary/2 --fast --out my-fast-variant" in after.text
    assert result_page.is_about(out, "a" * 64)
    with pytest.raises(BestiaryError, match=r"index\.html is missing or about another adapter"):
        write_fast_page(out, page, CHALLENGER, acceptance("b" * 64, "f" * 64), pictures / "sheet.png")
