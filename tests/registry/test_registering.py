import multiprocessing
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from support.registry import DEFAULTS, RULES, evaluation, make_adapter, make_submission, submit

from bestiary.diffusion.stored_adapter import adapter_file
from bestiary.errors import BestiaryError
from bestiary.registry.gate import CHALLENGER, CHAMPION
from bestiary.registry.registering import read_registration, register
from bestiary.registry.resolving import resolve
from bestiary.registry.versions import versions
from bestiary.tracking.store import open_client, tracking_uri


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


def test_an_adapter_of_another_subject_is_not_compared_with_the_champion_unless_it_has_a_name_of_its_own(
    project: Path, base_folder: Path, adapters: list[Path]
) -> None:
    submit(project, base_folder, adapters[0], gain=5.0)
    submission = make_submission(project, base_folder, adapters[1], gain=9.0)
    cat = replace(submission, evaluation=submission.evaluation.model_copy(update={"classes": ("my_cat",)}))
    second = register(cat, RULES)
    assert second.aliases == [CHALLENGER]
    assert "teaches something else (owl, tiger)" in second.reasons[-1]
    alone = register(cat, RULES.model_copy(update={"name": "my-cat"}))
    assert (alone.version, alone.aliases) == (1, [CHAMPION])
    # One subject in common: what decides is whether they were measured alike.
    submission = make_submission(project, base_folder, adapters[2], gain=9.0)
    wider = submission.evaluation.model_copy(update={"classes": ("owl", "my_cat")})
    assert (
        register(replace(submission, evaluation=wider, measured="otherwise"), RULES)
        .reasons[-1]
        .startswith("The champion, version 1, was measured on another base")
    )


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


def test_the_description_has_the_scores_of_the_last_evaluation(
    project: Path, base_folder: Path, adapters: list[Path]
) -> None:
    client = open_client(tracking_uri(), project)
    for gain in (5.0, 6.0):
        submit(project, base_folder, adapters[0], gain=gain)
        description = client.get_model_version("bestiary", "1").description
        assert "A LoRA adapter (rank 2, alpha 4) for `" in description
        (row,) = [line for line in description.splitlines() if line.startswith("| margin over other subjects |")]
        assert f"| {gain:+.2f} (" in row


def test_a_challenger_that_improves_becomes_champion_and_loses_the_challenger_alias(
    project: Path, base_folder: Path, adapters: list[Path]
) -> None:
    assert submit(project, base_folder, adapters[0], gain=-1.0).aliases == [CHALLENGER]
    assert submit(project, base_folder, adapters[0], gain=5.0).aliases == [CHAMPION]


@pytest.mark.parametrize("stage", ["train", "evaluate", "benchmark"])
@pytest.mark.parametrize("reported", ["of another", None], ids=["another", "none"])
def test_a_report_about_another_adapter_is_refused(
    project: Path, base_folder: Path, adapters: list[Path], stage: str, reported: str | None
) -> None:
    submission = make_submission(project, base_folder, adapters[0])
    if stage == "evaluate":
        submission = replace(submission, evaluation=evaluation(reported or ""))
    else:
        submission = replace(submission, reported={stage: reported})
    with pytest.raises(BestiaryError, match=rf"reports/results/{stage}\.json .* `dvc repro {stage}`"):
        register(submission, RULES)
    with pytest.raises(BestiaryError, match="'bestiary'"):
        versions()


def test_an_adapter_that_changes_nothing_is_refused(project: Path, base_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(BestiaryError, match="no effect"):
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
    mlflow.set_tracking_uri(tracking_uri())
    pipeline = mlflow.diffusers.load_model("models:/bestiary@champion").load_pipeline(device="cpu")
    assert pipeline.get_list_adapters() == {"unet": ["default_0"]}


def test_a_version_draws_by_default_as_it_was_evaluated_and_so_does_mlflows_server(
    project: Path, base_folder: Path, adapters: list[Path]
) -> None:
    import mlflow

    submit(project, base_folder, adapters[0])
    assert resolve("models:/bestiary/1").defaults == DEFAULTS
    mlflow.set_tracking_uri(tracking_uri())
    params = mlflow.models.get_model_info("models:/bestiary/1").signature.params.params
    assert {param.name: param.default for param in params} == {
        "seed": 0, "num_inference_steps": 5, "guidance_scale": 3.0, "height": 64, "width": 64, "negative_prompt": "",
    }  # fmt: skip
    swept = replace(DEFAULTS, sampling=replace(DEFAULTS.sampling, guidance_scale=2.0, guidance_interval=(0.5, 5.0)))
    register(replace(make_submission(project, base_folder, adapters[0]), defaults=swept), RULES)  # evaluated again
    assert resolve("models:/bestiary/1").defaults == swept
    client = open_client(tracking_uri(), project)
    client.delete_model_version_tag("bestiary", "1", "usual")  # older versions do not have this tag
    assert resolve("models:/bestiary/1").defaults is None


def test_the_description_and_the_tags_hold_every_score_of_the_report(
    project: Path, base_folder: Path, adapters: list[Path]
) -> None:
    submit(project, base_folder, adapters[0])
    client = open_client(tracking_uri(), project)
    description = client.get_model_version("bestiary", "1").description
    for line in ("| CLIP score | 20.00 | 25.00 | +5.00 (+4.00 to +6.00) | 30.00 |", "| margin over other subjects | "):
        assert line in description
    (version,) = versions()
    for score in ("clip_score", "margin", "top1"):
        scores = [version.tags[f"{row}.{score}"] for row in ("base", "adapter", "delta")]
        assert scores == ["20.0", "25.0", "5.0"]


def test_a_version_names_the_code_that_made_it(project: Path, base_folder: Path, adapters: list[Path]) -> None:
    client = open_client(tracking_uri(), project)
    run = client.create_run("0", tags={"mlflow.source.git.commit": "abc", "git_dirty": "true"}).info.run_id
    register(replace(make_submission(project, base_folder, adapters[0]), run_id=run), RULES)
    (version,) = versions()
    assert (version.tags["git_revision"], version.tags["git_dirty"]) == ("abc", "true")


@pytest.mark.parametrize("lost", ["mlruns", "file", "content"])
def test_registering_again_stores_what_the_registry_has_lost(
    project: Path, base_folder: Path, adapters: list[Path], lost: str
) -> None:
    first = submit(project, base_folder, adapters[0])
    file = resolve("models:/bestiary/1").file
    if lost == "mlruns":
        shutil.rmtree(project / "mlruns")
    elif lost == "file":
        file.unlink()
    else:
        file.chmod(0o644)
        file.write_bytes(b"another")
    with pytest.raises(BestiaryError, match=r"models:/bestiary/1.* `dvc repro --force --single-item register`|adapter"):
        resolve("models:/bestiary/1")
    assert submit(project, base_folder, adapters[0]) == replace(
        first, reasons=[first.reasons[0], "The adapter is the champion already."]
    )
    assert resolve("models:/bestiary@champion").file.read_bytes() == adapter_file(adapters[0]).read_bytes()


def test_a_registration_is_not_reported_when_the_registry_cannot_serve_the_file(
    project: Path, base_folder: Path, adapters: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlflow.tracking.MlflowClient.log_model_artifacts", lambda *_: None)
    monkeypatch.setattr("mlflow.store.artifact.local_artifact_repo.LocalArtifactRepository.log_artifacts", print)
    with pytest.raises(BestiaryError, match=r"cannot serve the file of models:/bestiary/1\."):
        submit(project, base_folder, adapters[0])


def test_a_champion_whose_scores_are_lost_is_not_replaced_and_the_reason_says_so(
    project: Path, base_folder: Path, adapters: list[Path]
) -> None:
    submit(project, base_folder, adapters[0])
    shutil.rmtree(project / "mlruns")
    registration = submit(project, base_folder, adapters[1], gain=9.0)
    assert registration.aliases == [CHALLENGER]
    assert "has lost the scores of the champion, version 1" in registration.reasons[-1]


def test_no_file_that_is_registered_holds_a_path_of_this_machine(
    project: Path, base_folder: Path, adapters: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(base_folder, project / "models" / "base")
    monkeypatch.chdir(project)
    submit(project, "models/base", make_adapter(Path("models/base"), project / "adapter", 3))
    files = [path for path in (project / "mlruns").rglob("*") if path.is_file()]
    assert "MLmodel" in {path.name for path in files}
    assert not [path for path in files if str(project.parent).encode() in path.read_bytes()]


@pytest.mark.parametrize("content", ["", "[]", '{"name": "bestiary", "version": 1}'])
def test_a_damaged_register_report_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "register.json").write_text(content)
    with pytest.raises(BestiaryError, match=r"register\.json"):
        read_registration(tmp_path / "register.json")
    with pytest.raises(BestiaryError, match="dvc repro"):
        read_registration(tmp_path / "missing.json")


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
    # One server process imports what all workers need; each worker is forked from it before MLflow opens anything.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["bestiary.registry.registering", "bestiary.diffusion.adapter", "mlflow.diffusers", "pandas"]
    )
    shares = [distinct[start::4] for start in range(4)]
    workers = [context.Process(target=_submit_all, args=(project, base_folder, share, adapters[1])) for share in shares]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0, 0, 0]
    existing = versions()
    assert [version.version for version in existing] == list(range(1, 21))
    assert len({version.tags["adapter_sha256"] for version in existing}) == 20
    assert sorted(alias for version in existing for alias in version.aliases).count(CHAMPION) == 1
    assert [(version.version, version.aliases) for version in versions("shared")] == [(1, [CHAMPION])]


def changed_copy(adapter: Path, folder: Path, number: int) -> Path:
    """The adapter with other weights."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    from bestiary.diffusion.stored_adapter import adapter_file

    file = adapter_file(adapter)
    with safe_open(file, "pt") as stored:
        weights = {key: stored.get_tensor(key) * (1 + number / 100) for key in stored.keys()}  # noqa: SIM118
        metadata = stored.metadata()
    folder.mkdir()
    save_file(weights, folder / file.name, metadata)
    return folder
