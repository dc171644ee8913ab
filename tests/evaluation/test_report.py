import json
from pathlib import Path

import pytest
from support.registry import one_subject

from bestiary.errors import BestiaryError
from bestiary.evaluation.report import as_markdown, as_text, read_evaluation

RESULTS = Path(__file__).parents[2] / "reports" / "results"


def test_a_report_is_written_as_it_was_read(tmp_path: Path) -> None:
    path = RESULTS / "evaluate.json"
    written = json.dumps(read_evaluation(path).results(), indent=2, ensure_ascii=False) + "\n"
    assert written == path.read_text(encoding="utf-8")


def test_every_medium_shows_the_same_scores() -> None:
    report = read_evaluation(RESULTS / "evaluate.json")
    text, markdown = list(as_text(report)), list(as_markdown(report))
    scores = text[1 : 1 + len(report.table)]
    for score, line, row in zip(report.table, scores, markdown[2:], strict=True):
        assert line.startswith(score.title)
        assert row.startswith(f"| {score.title} |")
        assert f"{report.delta[score.key].mean:+.2f}" in line
        assert f"{report.delta[score.key].mean:+.2f}" in row


def test_the_table_is_followed_by_what_looks_copied_or_by_the_proof_of_one_subject() -> None:
    report = read_evaluation(RESULTS / "evaluate.json")
    copied = report.memorisation.adapter.copied.describe()
    assert list(as_text(report))[-1] == f"Pictures that look copied (0: as by chance, 1: all): {copied}."
    lines = list(as_text(one_subject()))
    assert not any(line.startswith("CLIP score") for line in lines)  # of a name that the judge does not know
    assert lines[1].startswith("fidelity to the real photos")
    assert (
        "Fidelity: 0.80 (95 % interval 0.70 to 0.90) of the way from other individuals (0) to the real photos (1)."
        in lines
    )
    assert lines[2].endswith(" -")  # real photos follow no prompt


def test_a_report_of_an_earlier_version_lacks_a_score_and_is_shown_without_it(tmp_path: Path) -> None:
    content = json.loads((RESULTS / "evaluate.json").read_text())
    for row in ("base", "adapter", "delta", "real", "floor"):
        del content[row]["margin"]
    path = tmp_path / "evaluate.json"
    path.write_text(json.dumps(content))
    assert [score.key for score in read_evaluation(path).table] == ["clip_score", "top1", "top5", "cmmd"]


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"images": "many"}'])
def test_a_damaged_report_is_named(tmp_path: Path, content: str) -> None:
    path = tmp_path / "evaluate.json"
    path.write_text(content)
    with pytest.raises(BestiaryError, match=r"evaluate\.json is damaged"):
        read_evaluation(path)


def test_a_missing_report_names_the_command_that_makes_it(tmp_path: Path) -> None:
    with pytest.raises(BestiaryError, match="dvc repro"):
        read_evaluation(tmp_path / "evaluate.json")
