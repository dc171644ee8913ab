"""dvc.yaml: a stage depends on the code that decides its result, or DVC would keep what that code no longer makes."""

import ast
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
STAGES: dict[str, Any] = yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
# They decide no result: sentences, files, memory, the values of params.yaml (which DVC watches), MLflow runs.
CARRIERS = {
    ROOT / "src/bestiary" / f"{name}.py" for name in ("errors", "files", "memory", "params", "database", "tracking")
}


def imported(path: Path) -> set[Path]:
    """The modules of this project that the file at `path` imports, at its top or later, though not for types alone."""
    found: set[Path] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            return
        if isinstance(node, ast.ImportFrom) and node.module:
            for name in (node.module, *(f"{node.module}.{alias.name}" for alias in node.names)):
                file = ROOT.joinpath("src", *name.split(".")).with_suffix(".py")
                if file.is_file():
                    found.add(file)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text(encoding="utf-8")))
    return found


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_depends_on_all_that_it_imports_and_on_nothing_else(stage: str) -> None:
    used: set[Path] = set()
    waiting = [ROOT / "stages" / f"{stage}.py"]
    while waiting:
        new = imported(waiting.pop()) - used
        used |= new
        waiting += new
    named = {ROOT / path for path in STAGES[stage]["deps"] if path.startswith("src/")}
    covered = {module: {module, *module.parents} & named for module in used}
    assert {module for module, by in covered.items() if not by} <= CARRIERS
    assert set().union(*covered.values()) == named
