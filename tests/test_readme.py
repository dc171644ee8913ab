"""The READMEs tell the truth. Their bestiary and dvc commands are run by tests/pipeline, demo and test by .ci/run."""

import re
import subprocess
from pathlib import Path

import pytest
from click.testing import CliRunner
from support.readme import READMES, ROOT, commands

from bestiary.cli import cli
from bestiary.evaluation.report import as_markdown, read_evaluation


def test_both_readmes_have_the_same_commands() -> None:
    english, chinese = (commands(readme) for readme in READMES)
    assert english == chinese
    assert "make demo" in english


def test_the_tables_are_what_the_committed_reports_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "reports" / "results").mkdir(parents=True)
    for name in ("evaluate", "register"):  # as committed: another machine's run may differ in the last digits
        path = f"reports/results/{name}.json"
        shown = subprocess.run(["git", "show", f"HEAD:{path}"], cwd=ROOT, capture_output=True, check=True)
        (tmp_path / path).write_bytes(shown.stdout)
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    told = CliRunner().invoke(cli, ["results"], catch_exceptions=False).output
    table = told[: told.index("\n\nLook")]
    english, chinese = (readme.read_text(encoding="utf-8") for readme in READMES)
    assert f"```text\n{table}\n```" in english
    evaluation = read_evaluation(tmp_path / "reports/results/evaluate.json")
    assert "<!-- results -->\n" + "\n".join(as_markdown(evaluation, chinese=True)) + "\n\n" in chinese


@pytest.mark.parametrize("readme", READMES, ids=lambda path: path.name)
def test_every_link_leads_to_a_file(readme: Path) -> None:
    text = readme.read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)#]+)\)", text) + re.findall(r'src="([^"]+)"', text)
    targets = [target for target in links if "://" not in target]
    assert targets
    assert [target for target in targets if not (ROOT / target).exists()] == []


@pytest.mark.parametrize("readme", READMES, ids=lambda path: path.name)
def test_every_make_target_exists(readme: Path) -> None:
    named = set(re.findall(r"\bmake ([a-z-]+)", readme.read_text(encoding="utf-8")))
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert {"demo", "test"} <= named <= targets
