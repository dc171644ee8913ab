import json
import subprocess
from pathlib import Path

import pytest

from bestiary.comparing import WORKSPACE, Revision, read_revisions, render
from bestiary.errors import BestiaryError
from bestiary.stage import METRICS, RESULTS

DVC_YAML = """
stages:
  train:
    cmd: "true"
    params: [train]
    metrics: [{reports/metrics/train.json: {cache: false}}]
  evaluate:
    cmd: "true"
    metrics: [{reports/metrics/evaluate.json: {cache: false}}]
"""


def git(folder: Path, *arguments: str) -> None:
    identity = ("-c", "user.name=ada", "-c", "user.email=ada@example.org")
    subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True)


def write(folder: Path, rank: int, val_loss: float, margin: float) -> None:
    (folder / "params.yaml").write_text(f"seed: 0\ntrain:\n  rank: {rank}\n  patience:\n")
    (folder / METRICS).mkdir(parents=True, exist_ok=True)
    (folder / METRICS / "train.json").write_text(json.dumps({"val_loss": val_loss, "base_val_loss": 1}))
    evaluation = {"adapter": {"margin": {"mean": margin}}, "delta": {"margin": {"mean": margin - 50}}}
    (folder / METRICS / "evaluate.json").write_text(json.dumps(evaluation))


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A project with one commit, tagged v1, and changes since then."""
    git(tmp_path, "init", "--quiet")
    (tmp_path / ".dvc").mkdir()
    (tmp_path / ".dvc" / "config").write_text("[core]\n    analytics = false\n")
    (tmp_path / "dvc.yaml").write_text(DVC_YAML)
    write(tmp_path, rank=4, val_loss=0.21841, margin=76.87)
    git(tmp_path, "add", "--all")
    git(tmp_path, "commit", "--quiet", "--message", "rank 4")
    git(tmp_path, "tag", "v1")
    write(tmp_path, rank=8, val_loss=0.2, margin=80)
    return tmp_path


@pytest.mark.parametrize("names", [[], ["v1"]])
def test_the_settings_that_differ_stand_above_the_results_that_matter(checkout: Path, names: list[str]) -> None:
    lines = list(render(read_revisions(checkout, names), width=100))
    assert [line.split() for line in lines[:3]] == [
        [WORKSPACE, *(names or ["HEAD"])],
        ["train.rank", "8", "4"],
        ["validation", "loss", "0.2000", "0.2184"],
    ]
    assert [line.rsplit(maxsplit=2) for line in lines[3:]] == [  # what no revision has is left out
        ["margin over other subjects", "80.00", "76.87"],
        ["gain: margin over other subjects", "+30.00", "+26.87"],
    ]


def write_acceptance(folder: Path, evaluated: str, measured: str, loss: float) -> None:
    """The reports of `evaluate` and `accept` about adapters with these hashes."""
    (folder / RESULTS).mkdir(parents=True, exist_ok=True)
    (folder / RESULTS / "evaluate.json").write_text(json.dumps({"adapter_sha256": evaluated}))
    differences = {"fast_default": {"clip_score": {"mean": loss}}}
    report = {"adapter_sha256": measured, "accepted": True, "differences": differences}
    (folder / RESULTS / "accept.json").write_text(json.dumps(report))


def test_the_verdict_on_the_fast_variant_is_compared_if_it_is_about_the_evaluated_adapter(checkout: Path) -> None:
    for adapter, loss in (("first", -0.25), ("second", -0.5)):
        write_acceptance(checkout, evaluated=adapter, measured=adapter, loss=loss)
        git(checkout, "add", "--all")
        git(checkout, "commit", "--quiet", "--message", adapter)
    write_acceptance(checkout, evaluated="third", measured="second", loss=-0.5)  # `make fast` has not run again
    lines = list(render(read_revisions(checkout, ["v1", "HEAD~1", "HEAD"]), width=100))
    assert [line.split(maxsplit=3) for line in lines[:1]] == [[WORKSPACE, "v1", "HEAD~1", "HEAD"]]
    assert [line.rsplit(maxsplit=4) for line in lines[-2:]] == [
        ["fast variant accepted", "-", "-", "yes", "yes"],
        ["fast: CLIP score", "-", "-", "-0.25", "-0.50"],
    ]


def test_an_unknown_revision_is_one_sentence(checkout: Path) -> None:
    with pytest.raises(BestiaryError, match="nonsense"):
        read_revisions(checkout, ["nonsense"])


def test_a_folder_without_a_project_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(BestiaryError, match="not inside of a DVC repository"):
        read_revisions(tmp_path, [])


def test_a_table_wider_than_the_terminal_continues_below() -> None:
    metrics = {("train", "val_loss"): 0.25}
    revisions = [Revision(f"experiment-{number}", {"train.rank": number}, metrics) for number in range(4)]
    lines = list(render(revisions, width=46))
    assert max(map(len, lines)) <= 46
    assert [line.split() for line in lines if line.startswith(" ")] == [
        ["experiment-0", "experiment-1"],
        ["experiment-2", "experiment-3"],
    ]
    assert [line.split() for line in lines if line.startswith("train.rank")] == [
        ["train.rank", "0", "1"],
        ["train.rank", "2", "3"],
    ]


def test_a_setting_that_a_revision_lacks_is_a_dash() -> None:
    old, new = Revision("old", {}, {}), Revision("new", {"train.dropout": 0.1}, {})
    assert [line.split() for line in render([old, new], width=80)] == [["old", "new"], ["train.dropout", "-", "0.1"]]
