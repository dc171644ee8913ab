"""dvc.yaml and fast/dvc.yaml list as a stage's dependencies exactly the code that decides its result.

If a module is missing there, DVC keeps an output that the changed code would no longer make.
"""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "bestiary"
STAGES: dict[str, Any] = {
    name: stage
    for file in ("dvc.yaml", "fast/dvc.yaml")
    for name, stage in yaml.safe_load((ROOT / file).read_text(encoding="utf-8"))["stages"].items()
}
# Modules and packages that do not affect any stage's result: they handle errors, files, memory, processes, downloads of
# pinned models and MLflow runs, or read params.yaml, whose values DVC watches by itself. What only they import does not
# affect a result either.
CARRIERS = {
    PACKAGE / name
    for name in (
        "errors.py",
        "files.py",
        "hub.py",
        "memory.py",
        "params.py",
        "stage.py",
        "tracking",
        "worker_processes.py",
        "yaml_file.py",
    )
}


def is_carrier(module: Path) -> bool:
    return bool({module, *module.parents} & CARRIERS)


def imported_names(tree: ast.AST) -> Iterator[str]:
    """The dotted names that a file imports anywhere, except for type checking only.

    `from a import b` gives `a` and `a.b`, because `b` may be a module of the package `a`.
    """
    if isinstance(tree, ast.If) and ast.unparse(tree.test) == "TYPE_CHECKING":
        return
    if isinstance(tree, ast.Import):
        yield from (alias.name for alias in tree.names)
    if isinstance(tree, ast.ImportFrom) and tree.module:
        yield from (tree.module, *(f"{tree.module}.{alias.name}" for alias in tree.names))
    for child in ast.iter_child_nodes(tree):
        yield from imported_names(child)


def imported_modules(path: Path) -> set[Path]:
    """This project's modules that the file at `path` imports. Packages do not count: their __init__.py is empty."""
    names = imported_names(ast.parse(path.read_text(encoding="utf-8")))
    files = (ROOT.joinpath("src", *name.split(".")).with_suffix(".py") for name in names)
    return {file for file in files if file.is_file()}


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_depends_on_all_the_code_that_decides_its_result_and_on_no_other(stage: str) -> None:
    used: set[Path] = set()
    pending = [ROOT / "stages" / f"{stage}.py"]
    while pending:
        new = {module for module in imported_modules(pending.pop()) - used if not is_carrier(module)}
        used |= new
        pending += new
    listed = {ROOT / path for path in STAGES[stage]["deps"] if path.startswith("src/")}
    covered_by = {module: {module, *module.parents} & listed for module in used}
    assert [module for module, entries in covered_by.items() if not entries] == []
    assert set().union(*covered_by.values()) == listed
    for package in {module.parent for module in used} - {PACKAGE}:
        assert (package / "__init__.py").read_text(encoding="utf-8") == "", package


def test_modules_of_a_package_are_found_however_they_are_imported(tmp_path: Path) -> None:
    file = tmp_path / "script.py"
    for line in (
        "from bestiary.tracking import runs",
        "from bestiary.tracking.runs import open_run",
        "import bestiary.tracking.runs",
        "def work():\n    from bestiary.tracking import runs as tracked",
    ):
        file.write_text(line)
        assert imported_modules(file) == {PACKAGE / "tracking" / "runs.py"}
    file.write_text("if TYPE_CHECKING:\n    from bestiary.tracking import runs")
    assert imported_modules(file) == set()
