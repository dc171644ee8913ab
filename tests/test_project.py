import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
from support.fast_variant import acceptance
from support.registry import evaluation, make_adapter, submit

from bestiary.diffusion.adapter import adapter_sha256
from bestiary.errors import BestiaryError
from bestiary.evaluation.sweep import write_operating_point
from bestiary.project import (
    drawing_defaults,
    last_acceptance,
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
    assert registration
    assert registration.adapter_sha256 == evaluation.adapter_sha256
    lines = "\n".join(render_results(evaluation, registration, "bestiary"))
    assert f"{evaluation.delta['margin'].mean:+.2f}" in lines
    assert f"models:/{registration.name}/{registration.version}" in lines


def test_results_before_the_first_run_name_the_command(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project)
    with pytest.raises(BestiaryError, match="dvc repro"):
        last_results()


def test_results_outside_a_project_say_where_to_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    with pytest.raises(BestiaryError, match=r"is not in a project\. Run this in the project's folder"):
        last_results()


@pytest.fixture
def evaluated(project: Path, base_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project whose adapter is evaluated and registered, as `dvc repro` leaves it."""
    monkeypatch.chdir(project)
    registration = submit(project, base_folder, make_adapter(base_folder, project / "models" / "adapter", 0))
    write_evaluation(project)
    metrics = project / "reports" / "results"
    (metrics / "register.json").write_text(json.dumps(asdict(registration)))
    return project


def write_evaluation(project: Path) -> None:
    """The report of the adapter in models/adapter."""
    path = project / "reports" / "results" / "evaluate.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(evaluation(adapter_sha256(project / "models" / "adapter")).model_dump_json())


def printed_results() -> str:
    return "\n".join(render_results(*last_results(), "bestiary"))


def test_results_of_an_adapter_that_is_not_registered_show_nothing_of_another_ones_version(
    evaluated: Path, base_folder: Path
) -> None:
    assert "models:/bestiary/1 (champion)\n          The adapter beats the base" in printed_results()
    make_adapter(base_folder, evaluated / "models" / "adapter", 1)
    assert "These scores are of another adapter than the one in models/adapter" in printed_results()
    assert "models:/" not in printed_results()
    write_evaluation(evaluated)  # and the experiment stops here
    assert "The adapter in models/adapter is not registered" in printed_results()
    assert "`dvc repro`" in printed_results()
    assert "models:/" not in printed_results()
    (evaluated / "reports" / "results" / "register.json").unlink()
    assert "The adapter in models/adapter is not registered" in printed_results()


def test_results_of_an_adapter_with_another_weight_are_those_of_the_adapter_that_it_was_made_from(
    evaluated: Path, base_folder: Path
) -> None:
    point = write_operating_point(Path("reports") / "operating_point", Path("models") / "adapter", 0.5, 7.0)
    report = evaluation(point.adapter_sha256)
    weighted = report.operating_point.model_copy(update={"scale": 0.5})
    report = report.model_copy(update={"operating_point": weighted})
    (evaluated / "reports" / "results" / "evaluate.json").write_text(report.model_dump_json())
    assert "The adapter in models/adapter is not registered" in printed_results()
    assert "--adapter models/adapter:0.5 --count 4" in printed_results()
    code = "import sys; from bestiary.cli import cli; cli(['results'], standalone_mode=False); print(*sys.modules)"
    printed, modules = subprocess.check_output([sys.executable, "-c", code], text=True).rstrip().rsplit("\n", 1)
    assert "--adapter models/adapter:0.5 --count 4" in printed
    assert "torch" not in modules.split()
    make_adapter(base_folder, evaluated / "models" / "adapter", 1)
    assert "These scores are of another adapter than the one in models/adapter" in printed_results()


def test_results_show_the_version_as_the_registry_has_it_now(evaluated: Path, base_folder: Path) -> None:
    better = make_adapter(base_folder, evaluated / "better", 1)
    submit(evaluated, base_folder, better, gain=9.0)
    assert "models:/bestiary/1\n" in printed_results()  # no longer the champion
    (evaluated / "mlflow.db").unlink()
    assert "This is how it was registered. There is no registry yet" in printed_results()
    assert "`dvc repro --force --single-item register`" in printed_results()


def test_results_show_the_verdict_on_the_fast_variant_of_this_adapter_only(evaluated: Path) -> None:
    assert "make fast" in printed_results()
    file = evaluated / "reports" / "results" / "accept.json"
    file.write_text(acceptance("1" * 64, "2" * 64).model_dump_json())
    results, registration = last_results()
    assert last_acceptance(results) is None  # it is about another adapter
    file.write_text(acceptance(results.adapter_sha256, "2" * 64).model_dump_json())
    lines = list(render_results(results, registration, "bestiary", last_acceptance(results)))
    assert any(line.startswith("Fast variant accepted: openvino in int8 with the tiny decoder") for line in lines)
    assert any("models:/bestiary@champion --out my-adapter --fast" in line for line in lines)
    assert not any("make fast" in line for line in lines)
