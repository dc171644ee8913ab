import multiprocessing
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.registry import RULES, USUAL, evaluation, make_adapter, submit

from bestiary import tracking
from bestiary.errors import BestiaryError
from bestiary.registry import (
    CHALLENGER,
    CHAMPION,
    Comparison,
    decide,
    find_version,
    promote,
    pull,
    resolve,
    rollback,
    versions,
)

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def adapters(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("adapters")
    return [make_adapter(base_folder, folder / str(seed), seed) for seed in range(3)]


# ---- the decision ----


def test_an_adapter_that_beats_the_base_for_certain_becomes_the_champion() -> None:
    decision, reasons = decide(evaluation(gain=5.0), RULES, None)
    assert decision == CHAMPION
    assert reasons == [
        "It beats the base: margin +5.00 (95 % interval +4.00 to +6.00).",
        "There was no champion before it.",
    ]


def test_an_interval_that_touches_zero_is_not_enough() -> None:
    decision, reasons = decide(evaluation(gain=1.0, half_width=1.0), RULES, None)
    assert decision == CHALLENGER
    assert reasons == ["It does not beat the base for certain: margin +1.00 (95 % interval +0.00 to +2.00)."]


def test_a_memoriser_stays_challenger() -> None:
    decision, reasons = decide(evaluation(copied=0.5), RULES, None)
    assert decision == CHALLENGER
    assert reasons == [
        "It copies its training images: 50% of its pictures (95 % interval 40% to 60%), and 10% may be copies."
    ]


@pytest.mark.parametrize(
    ("mean", "decision", "words"), [(0.5, CHAMPION, "not worse than the champion"), (-0.5, CHALLENGER, "is better")]
)
def test_the_champion_gives_way_only_to_one_that_is_not_worse(mean: float, decision: str, words: str) -> None:
    rival = Comparison(3, {"mean": mean, "ci95": [mean - 1, mean + 1]})
    got, reasons = decide(evaluation(), RULES, rival)
    assert got == decision
    assert words in reasons[-1]
    assert "version 3" in reasons[-1]


def test_a_champion_that_was_measured_otherwise_is_not_replaced() -> None:
    decision, reasons = decide(evaluation(), RULES, Comparison(3, None))
    assert decision == CHALLENGER
    assert "nothing says which is better" in reasons[0]


@pytest.fixture(scope="module")
def seen(judge_folder: Path) -> dict[str, Any]:
    """Four animals' real images as the judge sees them, and what it makes of other pictures of them."""
    import numpy as np
    from PIL import Image

    from bestiary.evaluation import pictures
    from bestiary.evaluation.judge import Judge

    judge, classes, count = Judge.load(str(judge_folder)), ["owl", "panda", "tiger", "zebra"], 8
    labels = np.repeat(np.arange(len(classes)), count)

    def take(first: int) -> Any:
        files = [sorted((ROOT / "samples" / name).glob("*.jpg"))[first : first + count] for name in classes]
        return pictures.view(judge, [Image.open(file).convert("RGB") for row in files for file in row], labels)

    words = pictures.read_words(judge, classes, "a photo of {}")
    drawn = take(2 * count)
    wrong = np.roll(drawn.features, count, axis=0)  # the animal before
    base = type(drawn)(np.where(np.arange(len(labels))[:, None] % 2, drawn.features, wrong), labels)
    return {"words": words, "train": take(0), "real": take(count), "drawn": drawn, "base": base}


def judged(seen: dict[str, Any], adapter: Any) -> tuple[str, list[str]]:
    """What the gate says when the adapter draws like this and every other picture of the base is of another animal."""
    from bestiary.evaluation.scoring import compare

    base, real, train, words = seen["base"], seen["real"], seen["train"], seen["words"]
    return decide(compare(base, adapter, real, train.features, words, resamples=500, seed=0), RULES, None)


def test_an_adapter_that_draws_the_animals_passes_the_gate(seen: dict[str, Any]) -> None:
    assert judged(seen, seen["drawn"])[0] == CHAMPION


def test_an_adapter_that_learned_shuffled_captions_draws_well_and_is_refused(seen: dict[str, Any]) -> None:
    import numpy as np

    drawn = seen["drawn"]
    wrong = type(drawn)(np.roll(drawn.features, 8, axis=0), drawn.labels)  # each animal under the next one's name
    decision, reasons = judged(seen, wrong)
    assert decision == CHALLENGER
    assert len(reasons) == 1
    assert reasons[0].startswith("It does not beat the base for certain: margin -")


def test_an_adapter_that_draws_its_training_images_beats_the_base_and_is_refused(seen: dict[str, Any]) -> None:
    decision, reasons = judged(seen, seen["train"])
    assert decision == CHALLENGER
    assert reasons == [
        "It copies its training images: 100% of its pictures (95 % interval 100% to 100%), and 10% may be copies."
    ]


# ---- the registry ----


def test_first_good_adapter_is_champion_and_a_better_one_replaces_it(
    project: Path, base_folder: Path, adapters: list[Path]
) -> None:
    first = submit(project, base_folder, adapters[0], gain=5.0)
    worse = submit(project, base_folder, adapters[1], gain=4.0)
    better = submit(project, base_folder, adapters[2], gain=6.0)
    assert (first.version, first.aliases) == (1, [CHAMPION])
    assert (worse.version, worse.aliases) == (2, [CHALLENGER])
    assert (better.version, better.aliases) == (3, [CHAMPION])
    assert "version 1" in better.reasons[-1]
    assert [version.aliases for version in versions()] == [[], [CHALLENGER], [CHAMPION]]
    assert versions()[2].tags["champion_before"] == "1"


def test_the_same_content_registers_once_and_keeps_its_alias(
    project: Path, base_folder: Path, adapters: list[Path]
) -> None:
    first = submit(project, base_folder, adapters[0])
    again = submit(project, base_folder, adapters[0])
    doubtful = submit(project, base_folder, adapters[0], gain=-1.0)
    assert first.version == again.version == doubtful.version == 1
    assert again.aliases == doubtful.aliases == [CHAMPION]
    assert "already" in again.reasons[-1]
    assert len(versions()) == 1


def test_a_challenger_that_is_evaluated_better_becomes_champion_and_is_challenger_no_more(
    project: Path, base_folder: Path, adapters: list[Path]
) -> None:
    assert submit(project, base_folder, adapters[0], gain=-1.0).aliases == [CHALLENGER]
    assert submit(project, base_folder, adapters[0], gain=5.0).aliases == [CHAMPION]


@pytest.mark.parametrize("stage", ["train", "evaluate", "benchmark"])
@pytest.mark.parametrize("told", [{"adapter_sha256": "of another"}, {}], ids=["another", "none"])
def test_a_report_about_another_adapter_is_refused(
    project: Path, base_folder: Path, adapters: list[Path], stage: str, told: dict[str, str]
) -> None:
    with pytest.raises(
        BestiaryError, match=rf"reports/{stage}\.json is not about the adapter in .*: run `dvc repro {stage}`"
    ):
        submit(project, base_folder, adapters[0], reports={stage: told})
    with pytest.raises(BestiaryError, match="no registered model"):
        versions()


def test_an_adapter_that_changes_nothing_is_refused(project: Path, base_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(BestiaryError, match="changes nothing"):
        submit(project, base_folder, make_adapter(base_folder, tmp_path / "zero", 0, strength=0.0))


def test_an_adapter_of_another_base_is_refused(project: Path, base_folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(base_folder, other)
    (other / "scheduler" / "scheduler_config.json").write_text("{}")
    with pytest.raises(BestiaryError, match="trained on another base"):
        submit(project, base_folder, make_adapter(other, tmp_path / "adapter", 0))


def test_standard_mlflow_loads_the_registered_adapter_into_a_pipeline(
    project: Path, base_folder: Path, adapters: list[Path]
) -> None:
    import mlflow

    submit(project, base_folder, adapters[0])
    mlflow.set_tracking_uri(tracking.tracking_uri())
    pipeline = mlflow.diffusers.load_model("models:/bestiary@champion").load_pipeline(device="cpu")
    assert pipeline.get_list_adapters() == {"unet": ["default_0"]}


def test_a_version_says_how_it_was_evaluated_and_a_served_one_draws_so(
    project: Path, base_folder: Path, adapters: list[Path]
) -> None:
    import mlflow

    submit(project, base_folder, adapters[0])
    assert resolve("models:/bestiary/1").usual == USUAL
    mlflow.set_tracking_uri(tracking.tracking_uri())
    params = mlflow.models.get_model_info("models:/bestiary/1").signature.params.params
    assert {param.name: param.default for param in params} == {
        "num_inference_steps": 5, "guidance_scale": 3.0, "height": 64, "width": 64, "negative_prompt": "",
    }  # fmt: skip
    swept = replace(USUAL, guidance_scale=2.0, guidance_interval=(0.5, 5.0))
    submit(project, base_folder, adapters[0], usual=swept)  # evaluated again, otherwise
    assert resolve("models:/bestiary/1").usual == swept
    client = tracking.open_client(tracking.tracking_uri(), project)
    client.delete_model_version_tag("bestiary", "1", "usual")  # one from before there was this tag
    assert resolve("models:/bestiary/1").usual is None


def test_pull_from_another_folder_of_the_project_gives_the_same_bytes(
    project: Path, base_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(base_folder, project / "models" / "base")
    (project / "dvc.yaml").write_text("stages: {}")
    adapter = make_adapter(project / "models" / "base", project / "models" / "adapter", 0, told_base="models/base")
    monkeypatch.chdir(project)
    submit(project, "models/base", adapter)
    (project / "elsewhere").mkdir()
    monkeypatch.chdir(project / "elsewhere")
    file = pull("models:/bestiary@champion", Path("mine"))
    assert file.read_bytes() == (adapter / file.name).read_bytes()


def test_a_base_that_is_not_here_is_said_in_words(
    project: Path, base_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(base_folder, project / "models" / "base")
    adapter = make_adapter(base_folder, project / "adapter", 0)
    monkeypatch.chdir(project)
    submit(project, "models/base", adapter)
    (project / "models" / "base").rename(project / "moved")
    with pytest.raises(BestiaryError, match=r"The base \./models/base .* is not here: run this in a clone"):
        pull("models:/bestiary@champion", project / "out")
    assert not (project / "out").exists()
    assert pull("models:/bestiary@champion", project / "out", base=str(project / "moved")).is_file()


def test_a_changed_file_in_the_registry_is_not_handed_out(
    project: Path, base_folder: Path, adapters: list[Path]
) -> None:
    submit(project, base_folder, adapters[0])
    file = resolve("models:/bestiary/1").file
    file.chmod(0o644)
    file.write_bytes((adapters[1] / file.name).read_bytes())
    with pytest.raises(BestiaryError, match="is not the one that was registered"):
        resolve("models:/bestiary/1")


def test_unknown_versions_and_aliases_say_what_there_is(project: Path, base_folder: Path, adapters: list[Path]) -> None:
    submit(project, base_folder, adapters[0])
    with pytest.raises(BestiaryError, match=r"There is no models:/bestiary/7; the versions .* are: 1 = champion\."):
        find_version("models:/bestiary/7")
    with pytest.raises(BestiaryError, match="There is no models:/bestiary@king"):
        find_version("models:/bestiary@king")
    with pytest.raises(BestiaryError, match="There is no registered model 'zoo'; there is bestiary"):
        find_version("models:/zoo/1")
    with pytest.raises(BestiaryError, match="names no registered version"):
        find_version("models:bestiary")


def test_without_a_registry_nothing_is_made_and_the_way_to_one_is_told(
    project: Path,
) -> None:
    (project / "mlflow.db").unlink()
    with pytest.raises(BestiaryError, match="There is no registry yet"):
        resolve("models:/bestiary@champion")
    assert list(project.iterdir()) == []


def test_a_version_says_which_code_made_it(project: Path, base_folder: Path, adapters: list[Path]) -> None:
    client = tracking.open_client(tracking.tracking_uri(), project)
    run = client.create_run("0", tags={"mlflow.source.git.commit": "abc", "git_dirty": "true"}).info.run_id
    submit(project, base_folder, adapters[0], run_id=run)
    (version,) = versions()
    assert (version.tags["git_revision"], version.tags["git_dirty"]) == ("abc", "true")


def test_a_person_can_promote_and_roll_back_and_the_reasons_stay(
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
    with pytest.raises(BestiaryError, match="no champion before version 1"):
        rollback("once more")


def test_a_rollback_does_not_go_back_to_what_was_rolled_back_or_deleted(
    project: Path, base_folder: Path, adapters: list[Path]
) -> None:
    submit(project, base_folder, adapters[0], gain=4.0)
    submit(project, base_folder, adapters[1], gain=5.0)
    promote(1, "its owls")
    assert rollback("its bees").version == 2
    with pytest.raises(BestiaryError, match=r"Version 1, the champion before version 2, has been rolled back, too"):
        rollback("its cats")
    promote(1, "its owls, after all")
    client = tracking.open_client(tracking.tracking_uri(), project)
    client.delete_model_version("bestiary", "2")
    with pytest.raises(BestiaryError, match=r"Version 2, the champion before version 1, has been deleted"):
        rollback("its bees")
    assert [(version.version, version.aliases) for version in versions()] == [(1, [CHAMPION])]


def test_a_champion_that_comes_back_is_no_challenger_any_more(
    project: Path, base_folder: Path, adapters: list[Path]
) -> None:
    submit(project, base_folder, adapters[0], gain=4.0)
    submit(project, base_folder, adapters[1], gain=5.0)
    client = tracking.open_client(tracking.tracking_uri(), project)
    client.set_registered_model_alias("bestiary", CHALLENGER, "1")
    assert rollback("its bees").version == 1
    assert [version.aliases for version in versions()] == [[CHAMPION], []]


def test_what_a_person_rolled_back_comes_back_by_a_persons_hand_only(
    project: Path, base_folder: Path, adapters: list[Path]
) -> None:
    submit(project, base_folder, adapters[0], gain=4.0)
    submit(project, base_folder, adapters[1], gain=5.0)
    rollback("it draws owls with teeth")
    again = submit(project, base_folder, adapters[1], gain=5.0)
    assert again.aliases == [CHALLENGER]
    assert again.reasons == ["It was the champion once and was rolled back: it draws owls with teeth"]
    promote(2, "we like the teeth")
    assert submit(project, base_folder, adapters[1], gain=5.0).aliases == [CHAMPION]


def _submit_all(project: Path, base: Path, mine: list[Path], shared: Path) -> None:
    for adapter in mine:
        submit(project, base, adapter)
    for _ in mine:
        submit(project, base, shared, name="shared")


@pytest.mark.slow
def test_twenty_registrations_from_four_processes_make_one_version_for_each_content(
    project: Path, base_folder: Path, adapters: list[Path], tmp_path: Path
) -> None:
    distinct = [changed_copy(adapters[0], tmp_path / str(number), number) for number in range(20)]
    # One server process imports what all need; each worker is forked from it before MLflow has opened anything.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["bestiary.registry", "bestiary.diffusion.adapter", "mlflow.diffusers", "pandas"])
    shares = [distinct[start::4] for start in range(4)]
    workers = [context.Process(target=_submit_all, args=(project, base_folder, share, adapters[1])) for share in shares]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0, 0, 0]
    there = versions()
    assert [version.version for version in there] == list(range(1, 21))
    assert len({version.tags["adapter_sha256"] for version in there}) == 20
    assert sorted(alias for version in there for alias in version.aliases).count(CHAMPION) == 1
    assert [(version.version, version.aliases) for version in versions("shared")] == [(1, [CHAMPION])]


def changed_copy(adapter: Path, folder: Path, number: int) -> Path:
    """The adapter with other weights."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    from bestiary.diffusion.adapter import adapter_file

    file = adapter_file(adapter)
    with safe_open(file, "pt") as stored:
        weights = {key: stored.get_tensor(key) * (1 + number / 100) for key in stored.keys()}  # noqa: SIM118
        about = stored.metadata()
    folder.mkdir()
    save_file(weights, folder / file.name, about)
    return folder
