from pathlib import Path

import pytest

from bestiary.diffusion.adapter import adapter_sha256
from bestiary.errors import BestiaryError
from bestiary.registry.gate import CHAMPION
from bestiary.registry.migration import migrate
from bestiary.registry.resolving import resolve
from bestiary.registry.versions import find_version, walk
from bestiary.tracking.store import open_client, tracking_uri


@pytest.mark.slow
def test_a_registry_moves_to_a_server_once_with_its_lineage_aliases_and_files(
    old_project: Path, server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    version, steps = walk("models:/bestiary@champion")
    database = old_project / "mlflow.db"
    here = open_client(tracking_uri(), old_project)
    evaluation = next(step.run_id for step in steps if step.stage == "evaluate")
    pipeline = here.get_run(evaluation).data.tags["mlflow.parentRunId"]
    here.set_tag(pipeline, "mlflow.note.content", f"![sheet](get-artifact?path=sheet.png&run_uuid={evaluation})")
    first, again = migrate(database, server), migrate(database, server)
    assert (first.runs, first.runs_there_already, first.versions) == (9, 0, {"bestiary/1": 1})
    assert (again.runs, again.runs_there_already, again.versions) == (0, 9, {"bestiary/1": 1})
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server)
    moved, moved_steps = walk("models:/bestiary@champion")
    assert (moved.version, moved.aliases, moved.tags) == (1, [CHAMPION], version.tags)
    assert [(step.stage, step.started, step.inputs) for step in moved_steps] == [
        (step.stage, step.started, step.inputs) for step in steps
    ]
    assert adapter_sha256(resolve("models:/bestiary/1").file) == version.tags["adapter_sha256"]
    there = open_client(server, old_project)
    moved_evaluation = next(step.run_id for step in moved_steps if step.stage == "evaluate")
    moved_pipeline = there.get_run(moved_evaluation).data.tags["mlflow.parentRunId"]
    description = there.get_run(moved_pipeline).data.tags["mlflow.note.content"]
    assert description == f"![sheet](get-artifact?path=sheet.png&run_uuid={moved_evaluation})"


def test_a_migration_needs_a_database_and_a_servers_address(old_project: Path) -> None:
    with pytest.raises(BestiaryError, match=r"missing\.db"):
        migrate(old_project / "missing.db", "http://127.0.0.1:1")
    with pytest.raises(BestiaryError, match=r"other\.db is not the address"):
        migrate(old_project / "mlflow.db", "sqlite:///other.db")
    assert find_version("models:/bestiary/1").aliases == [CHAMPION]
