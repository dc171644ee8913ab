from pathlib import Path

import pytest
from support.registry import submit

from bestiary.errors import BestiaryError
from bestiary.registry.versions import find_version, walk


def test_unknown_versions_aliases_and_names_are_answered_with_the_ones_that_exist(
    project: Path, base_folder: Path, adapters: list[Path]
) -> None:
    submit(project, base_folder, adapters[0])
    with pytest.raises(BestiaryError, match=r"models:/bestiary/7.*: 1 = champion\."):
        find_version("models:/bestiary/7")
    with pytest.raises(BestiaryError, match="models:/bestiary@king"):
        find_version("models:/bestiary@king")
    with pytest.raises(BestiaryError, match=r"'zoo'.*: bestiary"):
        find_version("models:/zoo/1")
    with pytest.raises(BestiaryError, match="models:bestiary "):
        find_version("models:bestiary")


def test_a_server_gives_the_same_versions_as_the_local_database(
    project: Path, base_folder: Path, adapters: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from bestiary.tracking.store import open_client, tracking_uri

    submit(project, base_folder, adapters[0])
    local = find_version("models:/bestiary@champion")
    open_client(tracking_uri(), project).set_tag(local.run_id, "stage", "register")
    walked = walk(local.uri)
    # A registry address of its own is read through MLflow's client, as a server is.
    monkeypatch.setenv("MLFLOW_REGISTRY_URI", f"{tracking_uri()}?")
    assert find_version("models:/bestiary@champion") == local
    assert walk(local.uri) == walked
