"""The champion and challenger aliases: give them, promote a version by hand, and roll back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from bestiary.errors import BestiaryError
from bestiary.registry.gate import CHALLENGER, CHAMPION
from bestiary.registry.tags import whole_number
from bestiary.registry.versions import Version, aliases_of, find_version, open_registry, plain_errors, versions
from bestiary.tracking.store import locked

if TYPE_CHECKING:
    from mlflow import MlflowClient

# Tags of a version.
PROMOTED = "promoted_because"
ROLLED_BACK = "rolled_back_because"
CHAMPION_BEFORE = "champion_before"


def promote(number: int, because: str, name: str = "bestiary") -> Version:
    """Make a version the champion, whatever the gate decided. Its tags record the reason.

    Raises BestiaryError when there is no such version.
    """
    version = find_version(f"models:/{name}/{number}")
    uri, client = open_registry()
    with plain_errors(uri), locked(uri):
        client.set_model_version_tag(name, str(number), PROMOTED, because)
        if ROLLED_BACK in version.tags:
            client.delete_model_version_tag(name, str(number), ROLLED_BACK)
        give_alias(client, name, number, CHAMPION, aliases_of(client, name))
    return version


def rollback(because: str, name: str = "bestiary") -> Version:
    """Make the previous champion the champion again. The tags of the replaced version record the reason.

    Raises BestiaryError when there is no previous champion, or when it was deleted or rolled back itself.
    """
    uri, client = open_registry()
    with plain_errors(uri), locked(uri):
        existing = {version.version: version for version in versions(name)}
        champion = find_version(f"models:/{name}@{CHAMPION}")
        if CHAMPION_BEFORE not in champion.tags:
            raise BestiaryError(f"Version {champion.version} has no previous champion to roll back to.")
        before = whole_number(champion, CHAMPION_BEFORE)
        if before not in existing or ROLLED_BACK in existing[before].tags:
            what = "was rolled back, too" if before in existing else "was deleted"
            raise BestiaryError(
                f"Version {before}, the champion before version {champion.version}, {what}. "
                "Choose a version with `bestiary promote`."
            )
        client.set_registered_model_alias(name, CHAMPION, str(before))
        if CHALLENGER in existing[before].aliases:
            client.delete_registered_model_alias(name, CHALLENGER)
        client.set_model_version_tag(name, str(champion.version), ROLLED_BACK, because)
        # Without this, a second rollback could return to a version that was rolled back.
        client.delete_model_version_tag(name, str(champion.version), CHAMPION_BEFORE)
    return existing[before]


def give_alias(client: MlflowClient, name: str, version: int, alias: str, present: Mapping[str, int]) -> None:
    """Give a version the alias CHAMPION or CHALLENGER; `present` maps the model's aliases to their versions.

    A new champion's tags record the champion before it, and it is no longer the challenger.
    """
    if present.get(alias) != version:
        if alias == CHAMPION and CHAMPION in present:
            client.set_model_version_tag(name, str(version), CHAMPION_BEFORE, str(present[CHAMPION]))
        client.set_registered_model_alias(name, alias, str(version))
    if alias == CHAMPION and present.get(CHALLENGER) == version:
        client.delete_registered_model_alias(name, CHALLENGER)
