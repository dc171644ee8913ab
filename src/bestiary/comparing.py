"""Settings and results of several revisions of a project, side by side: the few numbers that matter."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bestiary.errors import BestiaryError
from bestiary.evaluation.acceptance import SCORES
from bestiary.evaluation.report import BY_KEY, HEADLINES, TABLE
from bestiary.stage import METRICS, RESULTS

WORKSPACE = "workspace"  # DVC's name for the files as they are now
GAP = "  "


@dataclass(frozen=True)
class Row:
    """A result to compare: its label, the stage and the dotted key of its metric, and how it is written."""

    label: str
    stage: str
    key: str
    form: str = ".2f"


ROWS = (
    Row("images kept", "clean", "images_kept", "d"),
    Row("validation loss", "train", "val_loss", ".4f"),
    *(Row(score.title, "evaluate", f"adapter.{score.key}.mean") for score in TABLE),
    *(Row(f"gain: {BY_KEY[key].difference_title}", "evaluate", f"delta.{key}.mean", "+.2f") for key in HEADLINES),
    Row("copied training images, 0 to 1", "evaluate", "memorisation.adapter.copied.mean"),
    Row("registered version", "register", "version", "d"),
    Row("alias earned", "register", "decision", "s"),
    Row("fast variant accepted", "accept", "accepted", "s"),
    *(
        Row(f"fast: {score.difference_title}", "accept", f"differences.fast_default.{key}.mean", "+.2f")
        for key, score in SCORES.items()
    ),
)


@dataclass(frozen=True)
class Revision:
    """A revision's name, its settings by flat keys, and its metrics by (stage, flat key)."""

    name: str
    settings: Mapping[str, object]
    metrics: Mapping[tuple[str, str], object]


def read_revisions(root: Path, names: Sequence[str]) -> list[Revision]:
    """The project's files as they are now, then these revisions: commits, tags, branches and experiments.

    Without names: the last commit, and the experiments that started from it. Raises BestiaryError for an unknown
    revision, or when `root` is not a project under Git and DVC.
    """
    from dvc.exceptions import DvcException
    from dvc.repo import Repo
    from scmrepo.exceptions import SCMError

    try:
        with Repo(str(root)) as repo:
            if not names:
                experiments = repo.experiments.ls().values()
                names = ["HEAD", *(name for found in experiments for name, _ in found)]
            asked = list(dict.fromkeys(names))
            metrics = repo.metrics.show(revs=asked, hide_workspace=False)
            # The stages of fast/dvc.yaml have no metrics, so their reports are read as files.
            reports = [str(root / RESULTS / f"{stage}.json") for stage in ("evaluate", "accept")]
            of_fast = repo.metrics.show(targets=reports, revs=asked, hide_workspace=False)
            settings = repo.params.show(revs=asked, hide_workspace=False)
    except (DvcException, SCMError) as error:
        raise BestiaryError(f"These revisions cannot be compared: {str(error).rstrip('.')}.") from None
    return [
        Revision(
            name,
            _settings(_file(found, "params.yaml")),
            {
                (row.stage, row.key): value
                for row in ROWS
                if (value := _value(_report(row.stage, metrics[name], of_fast[name]), row.key)) is not None
            },
        )
        for name, found in settings.items()
    ]


def render(revisions: Sequence[Revision], width: int) -> Iterator[str]:
    """The lines of the comparison: the settings that differ, then the results. Wide tables continue below."""
    differing = [
        key
        for key in dict.fromkeys(key for revision in revisions for key in revision.settings)
        if len({repr(revision.settings.get(key)) for revision in revisions}) > 1
    ]
    table = [["", *(revision.name for revision in revisions)]]
    table += [[key, *(_written(revision.settings.get(key)) for revision in revisions)] for key in differing]
    results = [
        [row.label, *(_written(revision.metrics.get((row.stage, row.key)), row.form) for revision in revisions)]
        for row in ROWS
    ]
    table += [row for row in results if set(row[1:]) != {"-"}]
    labels = max(len(row[0]) for row in table)
    columns = [max(len(row[column]) for row in table) for column in range(1, len(table[0]))]
    start = 0
    while start < len(columns):
        end, used = start + 1, labels + len(GAP) + columns[start]
        while end < len(columns) and used + len(GAP) + columns[end] <= width:
            used += len(GAP) + columns[end]
            end += 1
        if start:
            yield ""
        for row in table:
            cells = [row[column + 1].rjust(columns[column]) for column in range(start, end)]
            yield GAP.join([row[0].ljust(labels), *cells]).rstrip()
        start = end


def _settings(params: object) -> dict[str, object]:
    """The settings in params.yaml by dotted keys. Empty ones have the value that the chosen profile gives them.

    >>> params = {"profile": "small", "train": {"rank": None}, "profiles": {"small": {"train": {"rank": 4}}}}
    >>> _settings(params)
    {'profile': 'small', 'train.rank': 4}
    """
    written = dict(_flatten(params))
    chosen = f"profiles.{written.get('profile')}."
    of_profile = {key.removeprefix(chosen): value for key, value in written.items() if key.startswith(chosen)}
    return {
        key: of_profile.get(key) if value is None else value
        for key, value in {**written, **of_profile, **written}.items()
        if not key.startswith(chosen)
    }


def _file(found: Mapping[str, object], path: str) -> object:
    """The content of one file in what DVC returns for a revision; None when the revision lacks it."""
    files = found.get("data") or {}
    assert isinstance(files, Mapping)
    return (files.get(path) or {}).get("data")


def _report(stage: str, metrics: Mapping[str, object], of_fast: Mapping[str, object]) -> object:
    """A stage's report at a revision. None if `accept` measured another adapter than `evaluate`."""
    if stage != "accept":
        return _file(metrics, f"{METRICS}/{stage}.json")
    evaluated, accepted = (_file(of_fast, f"{RESULTS}/{name}.json") for name in ("evaluate", stage))
    is_of_this = _value(accepted, "adapter_sha256") == _value(evaluated, "adapter_sha256")
    return accepted if is_of_this else None


def _value(content: object, key: str) -> object:
    """The value at a dotted key; None when there is none."""
    for name in key.split("."):
        content = content.get(name) if isinstance(content, Mapping) else None
    return content


def _flatten(value: object, prefix: str = "") -> Iterator[tuple[str, object]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flatten(inner, f"{prefix}.{key}" if prefix else str(key))
    elif prefix:
        yield prefix, value


def _written(value: object, form: str = "") -> str:
    """A value as text. A setting that is empty, or that a revision lacks, is a dash, as a missing result is."""
    if value is None:
        return "-"
    if isinstance(value, bool) and form:
        return "yes" if value else "no"
    try:
        return format(value, form)
    except (TypeError, ValueError):  # another version of this package may have written something else
        return str(value)
