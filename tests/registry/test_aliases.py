from pathlib import Path

import pytest
from support.registry import submit

from bestiary.errors import BestiaryError
from bestiary.registry.aliases import promote, rollback
from bestiary.registry.gate import CHALLENGER, CHAMPION
from bestiary.registry.versions import versions
from bestiary.tracking.store import open_client, tracking_uri


def test_a_person_can_promote_and_roll_back_and_the_reasons_are_recorded(
    project: Path, base_folder: Path, adapters: list[Path]
) -> None:
    submit(project, base_folder, adapters[0], gain=5.0)
    submit(project, base_folder, adapters[1], gain=4.0)
    promote(2, "it draws better owls")
    first, second = versions()
    assert (first.aliases, second.aliases) == ([], [CHAMPION])
    assert second.tags["promoted_because"] == "it draws better owls"
    assert rollback("and worse tigers").version == 1
    first, second = versions()
    assert (first.aliases, second.aliases) == ([CHAMPION], [])
    assert second.tags["rolled_back_because"] == "and worse tigers"
    with pytest.raises(BestiaryError, match="Version 1 has no previous champion"):
        rollback("once more")


def test_a_rollback_does_not_return_to_a_version_that_was_rolled_back_or_deleted(
    project: Path, base_folder: Path, adapters: list[Path]
) -> None:
    submit(project, base_folder, adapters[0], gain=4.0)
    submit(project, base_folder, adapters[1], gain=5.0)
    promote(1, "its owls")
    assert rollback("its bees").version == 2
    with pytest.raises(BestiaryError, match=r"Version 1, the champion before version 2, was rolled back"):
        rollback("its cats")
    promote(1, "its owls, after all")
    client = open_client(tracking_uri(), project)
    client.delete_model_version("bestiary", "2")
    with pytest.raises(BestiaryError, match=r"Version 2, the champion before version 1, was deleted"):
        rollback("its bees")
    assert [(version.version, version.aliases) for version in versions()] == [(1, [CHAMPION])]


def test_a_champion_that_returns_is_no_longer_the_challenger(
    project: Path, base_folder: Path, adapters: list[Path]
) -> None:
    submit(project, base_folder, adapters[0], gain=4.0)
    submit(project, base_folder, adapters[1], gain=5.0)
    client = open_client(tracking_uri(), project)
    client.set_registered_model_alias("bestiary", CHALLENGER, "1")
    assert rollback("its bees").version == 1
    assert [version.aliases for version in versions()] == [[CHAMPION], []]


def test_a_version_that_a_person_rolled_back_returns_only_when_a_person_promotes_it(
    project: Path, base_folder: Path, adapters: list[Path]
) -> None:
    submit(project, base_folder, adapters[0], gain=4.0)
    submit(project, base_folder, adapters[1], gain=5.0)
    rollback("it draws owls with teeth")
    again = submit(project, base_folder, adapters[1], gain=5.0)
    assert again.aliases == [CHALLENGER]
    assert len(again.reasons) == 1
    assert "it draws owls with teeth" in again.reasons[0]
    promote(2, "we like the teeth")
    assert submit(project, base_folder, adapters[1], gain=5.0).aliases == [CHAMPION]
