"""What a user sees on the screen: bars with names, and no hints from libraries that are meant for developers."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.readme import ROOT

CODE = [*sorted((ROOT / "src").rglob("*.py")), *sorted((ROOT / "stages").glob("*.py"))]
# Each call that shows a progress bar, and the position of the bar's name among its arguments.
BARS = {"tqdm": ("desc", 1), "trange": ("desc", None), "map_across_processes": ("task", 2)}
# Functions that hand a bar's name on: their callers, and their defaults, name it.
NAMED_BY_THE_CALLER = {"task"}


def names_of_bars(path: Path) -> Iterator[tuple[int, str | None]]:
    """The line of each progress bar and its name; None when it has none."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and getattr(node.func, "id", None) in BARS:
            keyword, position = BARS[node.func.id]  # type: ignore[attr-defined]
            given = {argument.arg: argument.value for argument in node.keywords}
            name = given.get(keyword)
            if name is None and position is not None and len(node.args) > position:
                name = node.args[position]
            if isinstance(name, ast.Name) and name.id in NAMED_BY_THE_CALLER:
                continue
            yield node.lineno, ast.unparse(name).strip("f\"'") if name else None
        if isinstance(node, ast.FunctionDef):
            arguments = [*node.args.args, *node.args.kwonlyargs]
            defaults = [*node.args.defaults, *node.args.kw_defaults]
            for argument, default in zip(reversed(arguments), reversed(defaults), strict=False):
                if argument.arg in NAMED_BY_THE_CALLER and isinstance(default, ast.Constant):
                    yield node.lineno, str(default.value)


def test_every_progress_bar_says_what_is_done_to_what() -> None:
    bars = [(path.relative_to(ROOT), line, name) for path in CODE for line, name in names_of_bars(path)]
    assert len(bars) >= 10
    assert [bar for bar in bars if bar[2] is None or len(bar[2].split()) < 2] == []


def test_loading_base_and_judge_prints_nothing() -> None:
    code = """
from bestiary.libraries import silence_libraries
silence_libraries()
from bestiary.diffusion.base import load_pipeline
from bestiary.evaluation.judge import Judge
Judge.load("models/judge")
load_pipeline("models/base", device="cpu")
Judge.load("models/judge")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")


@pytest.mark.parametrize("asked", [None, "DEBUG"])
def test_mlflow_prints_errors_only_unless_the_user_asks_for_more(asked: str | None) -> None:
    code = """
from bestiary.libraries import silence_libraries
silence_libraries()
import logging, warnings, mlflow
logging.getLogger("mlflow.utils.requirements_utils").warning("Found torch version (2.13.0+cpu) contains a label")
logging.getLogger("mlflow").error("an error")
warnings.warn("a library changes in its next release", FutureWarning)
"""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONWARNINGS"}
    environment |= {"MLFLOW_LOGGING_LEVEL": asked} if asked else {}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert "an error" in done.stderr
    assert ("contains a label" in done.stderr) == bool(asked)
    assert "next release" not in done.stderr
