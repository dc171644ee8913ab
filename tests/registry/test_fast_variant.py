"""A fast variant is stored with the registered version of its adapter, but only if it was accepted."""

import contextlib
import json
import shutil
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from mlflow.exceptions import MlflowException
from mlflow.store.artifact.local_artifact_repo import LocalArtifactRepository
from support.fast_variant import DRAWING, acceptance, make_export
from support.registry import RULES, make_adapter, make_submission, submit

from bestiary.app.offers import Offerings, Offers
from bestiary.cli import cli
from bestiary.diffusion import engines
from bestiary.diffusion.adapter import adapter_sha256
from bestiary.diffusion.export_format import Manifest
from bestiary.engine_choice import Wish, choose_engine
from bestiary.errors import BestiaryError
from bestiary.generation import Base, resolving
from bestiary.png_metadata import read_settings
from bestiary.registry.attaching import Attachment, Candidate, attach
from bestiary.registry.fast_variant import how_to_restore, read_fast_tags
from bestiary.registry.model_card import write
from bestiary.registry.registering import Registration, register
from bestiary.registry.resolving import fast_variant, pull_fast, resolve
from bestiary.registry.versions import find_version, local_files, walk
from bestiary.samplers import SamplingChanges
from bestiary.tracking.store import open_client, tracking_uri

URI = "models:/bestiary/1"


@dataclass(frozen=True)
class Made:
    """A registered adapter and its accepted fast variant."""

    registration: Registration
    candidate: Candidate


def attach_as_stage(made: Made, project: Path) -> Attachment:
    run = open_client(tracking_uri(), project).create_run("0", tags={"stage": "attach", "input.models/fast": "1" * 32})
    return attach(made.registration, made.candidate, run.info.run_id, lambda line: print(line, file=sys.stderr))


def changed(made: Made, folder: Path, **verdict: bool) -> Made:
    """The same registered adapter with another export, and a verdict on it."""
    few_step = made.candidate.few_step
    export = make_export(folder, adapter_sha256(few_step), content="another network")
    report = acceptance(made.registration.adapter_sha256, adapter_sha256(few_step), export, **verdict)
    return replace(made, candidate=replace(made.candidate, export=export, report=report))


def nothing(_: Manifest) -> None:
    """What is against drawing with an export: nothing."""


def fast_folders() -> list[Path]:
    files = local_files(find_version(URI))
    assert files is not None
    return sorted(files.glob("fast-*"))


@pytest.fixture
def made(project: Path, base_folder: Path, adapters: list[Path], tmp_path: Path) -> Made:
    registration = submit(project, base_folder, adapters[0])
    few_step = tmp_path / "few_step"
    shutil.copytree(adapters[1], few_step)
    export = make_export(tmp_path / "fast", adapter_sha256(few_step))
    report = acceptance(registration.adapter_sha256, adapter_sha256(few_step), export)
    file = tmp_path / "accept.json"
    file.write_text(json.dumps(report.results()))
    return Made(registration, Candidate(few_step, export, report, file))


def test_an_accepted_fast_variant_is_stored_with_the_version_and_pulled_whole(
    made: Made, project: Path, tmp_path: Path
) -> None:
    attachment = attach_as_stage(made, project)
    assert (attachment.version, attachment.fast, attachment.stored) == (1, "accepted", True)
    version = find_version(URI)
    assert read_fast_tags(version).defaults == DRAWING
    stored = fast_variant(version)
    assert stored is not None
    assert stored.is_relative_to(project / "mlruns")
    assert adapter_sha256(stored.with_name("few_step")) == adapter_sha256(made.candidate.few_step)

    out = tmp_path / "out"
    done = CliRunner().invoke(cli, ["pull", URI, "--fast", "--out", str(out)], catch_exceptions=False)
    assert done.output.split() == [str(out / "few_step"), str(out / "openvino")]
    files = {path.relative_to(out / "openvino"): path.read_bytes() for path in out.rglob("openvino/**/*.*")}
    assert files == {
        path.relative_to(made.candidate.export): path.read_bytes() for path in made.candidate.export.rglob("*.*")
    }
    assert [path.name for path in out.iterdir() if path.name.startswith(".")] == []
    pull_fast(URI, out)  # replaces it
    (out / "openvino" / "picture.png").touch()
    with pytest.raises(BestiaryError, match=r"openvino contains picture\.png, which would be lost"):
        pull_fast(URI, out)


def test_the_description_and_the_lineage_of_the_version_have_the_fast_variant(
    made: Made, project: Path, base_folder: Path, adapters: list[Path]
) -> None:
    attach_as_stage(made, project)
    client = open_client(tracking_uri(), project)
    client.set_tag(find_version(URI).run_id, "stage", "register")
    assert [step.stage for step in walk(URI)[1]] == ["register", "attach"]
    submit(project, base_folder, adapters[0], gain=7.0)  # evaluated and registered again
    description = client.get_model_version("bestiary", "1").description
    assert "| margin over other subjects |" in description
    assert description.count("Fast variant accepted: openvino in int8 with the tiny decoder, 2 passes") == 1
    attach_as_stage(made, project)
    description = client.get_model_version("bestiary", "1").description
    assert description.count("Fast variant accepted") == 1


def test_the_model_card_has_the_verdict_and_its_table(
    made: Made, project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(project)
    attach_as_stage(made, project)
    open_client(tracking_uri(), project).set_tag(find_version(URI).run_id, "stage", "register")
    write(URI, tmp_path / "card")
    card = (tmp_path / "card" / "README.md").read_text()
    assert "## Fast variant\n\nFast variant accepted: openvino in int8 with the tiny decoder, 2 passes" in card
    assert "| CMMD (lower is better) | 90.00 | 90.00 | 90.00 | +0.25 (-0.25 to +0.75) |" in card
    assert f"`bestiary pull {URI} --fast --out DIR`" in card


def test_another_fast_variant_replaces_the_earlier_one(made: Made, project: Path, tmp_path: Path) -> None:
    attach_as_stage(made, project)
    (first,) = fast_folders()
    attach_as_stage(made, project)
    assert fast_folders() == [first]
    other = changed(made, tmp_path / "other")
    attach_as_stage(other, project)
    (second,) = fast_folders()
    assert second != first
    stored = fast_variant(find_version(URI))
    assert stored is not None
    assert "another network" in (stored / "unet" / "openvino_model.xml").read_text()


@pytest.mark.parametrize(
    "forbidden",
    [MlflowException("no"), NotImplementedError(), PermissionError()],
    ids=lambda error: type(error).__name__,
)
def test_a_warning_names_an_earlier_fast_variant_that_the_registry_does_not_delete(
    made: Made,
    project: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    forbidden: Exception,
) -> None:
    def forbid(*_: object) -> None:
        raise forbidden

    attach_as_stage(made, project)
    (first,) = fast_folders()
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(LocalArtifactRepository, "delete_artifacts", forbid)
    attach_as_stage(changed(made, tmp_path / "other"), project)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(
        f"The registry did not delete an earlier fast variant of models:/bestiary/1 ({first.name}). Nothing"
    )
    assert first in fast_folders()
    assert fast_variant(find_version(URI)) != first / "openvino"


def test_an_earlier_copy_that_cannot_be_removed_is_named(
    made: Made, project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    attach_as_stage(made, project)
    capsys.readouterr()
    monkeypatch.setattr("bestiary.registry.fast_variant.shutil.rmtree", lambda *_, **__: None)
    pull_fast(URI, tmp_path / "out")
    (left,) = (tmp_path / "out").glob(".*")
    assert capsys.readouterr().err == f"{left} cannot be removed. Delete it to free its space.\n"


def test_a_refused_fast_variant_stores_only_its_reasons(made: Made, project: Path, tmp_path: Path) -> None:
    attach_as_stage(made, project)
    attachment = attach_as_stage(changed(made, tmp_path / "other", accepted=False), project)
    assert (attachment.fast, attachment.stored) == ("refused", False)
    assert fast_folders() == []
    version = find_version(URI)
    assert fast_variant(version) is None
    with pytest.raises(BestiaryError, match=r"bestiary/1 was refused: It may lose too much: CLIP score -9.00\."):
        pull_fast(URI, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_version_without_a_fast_variant_says_how_to_make_one(
    project: Path, base_folder: Path, adapters: list[Path], tmp_path: Path
) -> None:
    submit(project, base_folder, adapters[0])
    assert fast_variant(find_version(URI)) is None
    with pytest.raises(BestiaryError, match=r"^models:/bestiary/1 has no fast variant\. Run `make fast`\.$"):
        pull_fast(URI, tmp_path / "out")


def test_lost_and_changed_files_are_refused_and_nothing_is_written(made: Made, project: Path, tmp_path: Path) -> None:
    attach_as_stage(made, project)
    (folder,) = fast_folders()
    network = folder / "openvino" / "unet" / "openvino_model.bin"
    network.write_text("damaged")
    with pytest.raises(BestiaryError, match=r"of models:/bestiary/1 has changed since it was stored.*fast-.*attach`"):
        pull_fast(URI, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    attach_as_stage(made, project)  # repairs it
    assert network.read_text() != "damaged"
    shutil.rmtree(folder)
    with pytest.raises(BestiaryError, match=r"has lost the fast variant of models:/bestiary/1.*fast-.*attach`"):
        fast_variant(find_version(URI))


def test_torch_draws_where_the_fast_variant_is_lost(made: Made, project: Path) -> None:
    attach_as_stage(made, project)
    assert resolve(URI, fast=nothing).export is not None
    shutil.rmtree(fast_folders()[0])
    found = resolve(URI, fast=nothing)
    chosen, note = choose_engine([found], Wish())
    assert chosen == [found]
    assert note is not None
    assert note.startswith("Drawing with torch. The registry has lost the fast variant of models:/bestiary/1")
    with pytest.raises(BestiaryError, match="The registry has lost the fast variant"):
        choose_engine([found], Wish("openvino"))


def test_torch_draws_where_a_network_of_the_fast_variant_is_damaged(
    made: Made, project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("openvino")
    monkeypatch.setattr(engines, "reason_against", lambda _: None)
    monkeypatch.setattr(engines, "check_processor", lambda *_: None)
    monkeypatch.chdir(project)
    attach_as_stage(made, project)
    network = fast_folders()[0] / "openvino" / "unet" / "openvino_model.bin"
    network.write_text("damaged")
    order = ["generate", "zebra", "--adapter", URI, "--out", str(tmp_path / "drawn")]
    done = CliRunner().invoke(cli, order)
    assert done.exit_code == 0, done.output
    assert done.stderr.splitlines()[0] == (
        f"Drawing with torch instead of the fast variant. {network} has changed since it was exported. If the version "
        "is this project's, `dvc repro --force --single-item fast/dvc.yaml:attach` stores it again."
    )
    (picture,) = (tmp_path / "drawn").iterdir()
    assert read_settings(picture).engine == "torch"
    done = CliRunner().invoke(cli, [*order, "--engine", "openvino"])
    assert isinstance(done.exception, BestiaryError)
    assert "openvino_model.bin has changed since it was exported. Export the adapter again." in str(done.exception)


def test_a_damaged_copy_of_a_servers_fast_variant_is_downloaded_again_after_deleting_it(tmp_path: Path) -> None:
    sentence = how_to_restore(tmp_path / "fast-1" / "openvino", cache=tmp_path)
    assert sentence == f"Delete {tmp_path / 'fast-1'} to download it again."


def test_the_page_offers_a_fast_variant_unless_its_tags_make_no_sense(
    made: Made, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bestiary.app.offers.find_spec", lambda _: True)  # openvino
    attach_as_stage(made, project)
    offers = Offers(Offerings(bases=(Base("models/base"),), adapters=()))
    assert [offer.key for offer in offers.listed()] == [URI, f"{URI}#fast"]
    assert offers.resolve(offers.find(f"{URI}#fast")).is_export
    shutil.rmtree(fast_folders()[0])
    with pytest.raises(BestiaryError, match=r"^The files of bestiary 1, fast \(OpenVINO\) are lost or damaged\."):
        offers.resolve(offers.find(f"{URI}#fast"))
    open_client(tracking_uri(), project).set_model_version_tag("bestiary", "1", "fast_usual", "nonsense")
    assert [offer.key for offer in offers.listed()] == [URI]


def test_a_report_about_another_fast_variant_is_refused(
    made: Made, project: Path, base_folder: Path, tmp_path: Path
) -> None:
    other = make_adapter(base_folder, tmp_path / "other", 7)
    candidate = replace(made.candidate, few_step=other)
    with pytest.raises(BestiaryError, match=r"accept\.json does not describe the fast variant .*`dvc repro fast/"):
        attach_as_stage(replace(made, candidate=candidate), project)
    assert "fast" not in find_version(URI).tags


@pytest.mark.slow
def test_a_fast_variant_is_uploaded_to_a_server_and_downloaded_once_and_only_if_it_may_draw(
    made: Made,
    server: str,
    project: Path,
    base_folder: Path,
    adapters: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server)
    monkeypatch.setenv("BESTIARY_CACHE", str(tmp_path / "cache"))
    client = open_client(server, project)
    run = client.create_run(client.create_experiment("team"))  # whose files go through the server
    register(replace(make_submission(project, base_folder, adapters[0]), run_id=run.info.run_id), RULES)
    attach_as_stage(made, project)
    attach_as_stage(changed(made, tmp_path / "other"), project)
    monkeypatch.setattr(engines, "obstacle_here", lambda _: None)
    for wish, gpu, reason in (
        (Wish(changes=SamplingChanges(decoder="full")), "cpu", "the export has only the tiny decoder"),
        (Wish("openvino", SamplingChanges(decoder="full")), "cpu", "the export has only the tiny decoder"),
        (Wish(changes=SamplingChanges(width=20, height=20)), "cpu", "the sides of its pictures are multiples of 8"),
        (Wish(), "cuda", "this machine has a GPU, which torch uses"),
    ):
        monkeypatch.setattr(engines, "device_and_dtype", lambda gpu=gpu: (torch.device(gpu), torch.float32))
        found = resolve(URI, fast=wish.reason_against)
        assert found.export is None
        with contextlib.ExitStack() as stack:
            if wish.engine == "openvino":
                stack.enter_context(pytest.raises(BestiaryError, match=f"cannot draw this: {reason}"))
            assert reason in str(choose_engine([found], wish)[1])
    with resolving(URI, fast=Wish(changes=SamplingChanges(decoder="full")).reason_against) as another_process:
        assert another_process() == replace(found, not_downloaded="the export has only the tiny decoder")
    assert not (tmp_path / "cache" / "fast").exists()
    stored = resolve(URI, fast=Wish("openvino").reason_against).export
    assert stored is not None
    assert stored.is_relative_to(tmp_path / "cache" / "fast")
    kept = sorted((tmp_path / "server" / "artifacts").rglob("fast-*"))
    assert len(kept) == 1  # the first one was replaced
    shutil.rmtree(kept[0])
    assert fast_variant(find_version(URI)) == stored  # not downloaded again
    shutil.rmtree(tmp_path / "cache")
    with pytest.raises(BestiaryError, match=r"has lost the fast variant of models:/bestiary/1: fast-.* on the server"):
        pull_fast(URI, tmp_path / "out")
    assert not (tmp_path / "out").exists()
