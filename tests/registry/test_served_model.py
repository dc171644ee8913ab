"""MLflow draws with a registered version as it was evaluated, from a seed, without this package."""

import ast
import shutil
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image
from support.registry import DEFAULTS, RULES, make_adapter, make_submission, submit

from bestiary.generation import Base, Generator, Weighted, common_settings
from bestiary.registry import registering
from bestiary.registry.registering import register
from bestiary.registry.resolving import resolve
from bestiary.samplers import Sampling
from bestiary.tracking.store import tracking_uri

PROMPT = "a photo of a tiger"
EVALUATED = Sampling("dpmsolver++sde", 6, 7.0, (1.0, 10.0), 64, 64, adapter_weight=0.8, negative_prompt="a cat")


@pytest.fixture(autouse=True)
def _registry(project: Path) -> None:
    import mlflow

    mlflow.set_tracking_uri(tracking_uri())


def test_mlflow_draws_the_pixels_of_generate(project: Path, base_folder: Path) -> None:
    import mlflow

    adapter = make_adapter(base_folder, project / "adapter", 0, strength=0.3)
    defaults = replace(DEFAULTS, sampling=EVALUATED)
    register(replace(make_submission(project, base_folder, adapter), defaults=defaults), RULES)
    model = mlflow.pyfunc.load_model("models:/bestiary/1")
    found = resolve("models:/bestiary/1")
    generator = Generator()
    generator.prepare(Base(str(base_folder)), [found])
    common = common_settings(generator, [found], [Weighted("models:/bestiary/1")], EVALUATED)
    common = generator.prompted(common, PROMPT)
    for seed, sampling in ((7, EVALUATED), (2**40, replace(EVALUATED, steps=1, guidance_scale=3.0, width=72))):
        expected = generator.draw(replace(common, seed=seed, sampling=sampling))
        params = {"seed": seed, "num_inference_steps": sampling.steps, "guidance_scale": sampling.guidance_scale}
        pngs = model.predict({"prompt": [PROMPT, PROMPT]}, params=params | {"width": sampling.width})
        assert [Image.open(BytesIO(png)).tobytes() for png in pngs] == [expected.tobytes()] * 2
    assert len(model.predict({"prompt": PROMPT})) == 1
    refused: list[tuple[dict[str, object], str]] = [
        ({"seed": -1}, "seed is -1"),
        ({"num_inference_steps": 0}, "num_inference_steps is 0"),
        ({"width": 63}, "multiple of 8"),
        ({"negative_prompt": "word " * 100}, "202 tokens"),
    ]
    for changes, word in refused:
        with pytest.raises(mlflow.MlflowException, match=word):
            model.predict({"prompt": PROMPT}, params=changes)
    with pytest.raises(mlflow.MlflowException, match="The prompt is empty"):
        model.predict({"prompt": " "})


def test_the_code_that_is_stored_with_a_version_needs_nothing_of_this_package() -> None:
    tree = ast.parse(registering.SERVED_MODEL.read_text(encoding="utf-8"))
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    named = {alias.name for node in imports for alias in node.names}
    named |= {node.module or "" for node in imports if isinstance(node, ast.ImportFrom)}
    assert {name.partition(".")[0] for name in named} & {"bestiary", ""} == set()


def test_the_base_on_the_hub_is_the_commit_that_was_evaluated(
    project: Path, base_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow

    commit = project / "hub" / ("c" * 40)
    shutil.copytree(base_folder, commit)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(commit))
    monkeypatch.setattr("mlflow.utils.huggingface_utils.get_latest_commit_for_repo", lambda _: "newest")
    submit(project, "someone/base", make_adapter(base_folder, project / "adapter", 0, named_base="someone/base"))
    assert mlflow.diffusers.load_model("models:/bestiary/1").base_model_revision == commit.name
    (served,) = Path(mlflow.artifacts.download_artifacts("models:/bestiary/1")).glob("MLmodel")
    config = mlflow.models.Model.load(str(served)).flavors["python_function"]["config"]
    assert (config["base_model"], config["base_model_revision"]) == ("someone/base", commit.name)
    assert resolve("models:/bestiary/1").base_revision == commit.name
