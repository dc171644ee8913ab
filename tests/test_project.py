from pathlib import Path

import pytest

from bestiary.errors import BestiaryError
from bestiary.project import (
    drawing_defaults,
    last_results,
    project_base,
    project_params,
    registered_name,
    render_results,
)
from bestiary.samplers import DrawingDefaults

ROOT = Path(__file__).parents[1]


def test_outside_a_project_there_are_no_parameters_but_names_and_defaults(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    assert project_params() is None
    assert project_base(None) is None
    assert registered_name() == "bestiary"
    assert drawing_defaults(None) == DrawingDefaults()


def test_a_project_draws_as_it_evaluates(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project)
    (project / "params.yaml").write_text((ROOT / "params.yaml").read_text())
    params = project_params()
    assert params
    assert drawing_defaults(params) == params.evaluate.defaults()
    base = project_base(params)
    assert base
    assert base.model == "models/base"


def test_results_are_read_from_the_projects_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DVC_ROOT", str(ROOT))
    evaluation, registration = last_results()
    assert registration.adapter_sha256 == evaluation.adapter_sha256
    lines = "\n".join(render_results(evaluation, registration, "bestiary"))
    assert f"{evaluation.delta['margin'].mean:+.2f}" in lines
    assert f"models:/{registration.name}/{registration.version}" in lines


def test_results_before_the_first_run_name_the_command(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project)
    with pytest.raises(BestiaryError, match="dvc repro"):
        last_results()
