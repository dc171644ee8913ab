"""Models from the Hugging Face hub: its errors during a run, and what a resumed run still has."""

import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderTiny
from support.hub_server import COMMIT, Hub, Served, hub_server
from support.settings import train_settings

from bestiary.captioning import Captioner
from bestiary.diffusion.base import base_commit, load_scheduler, load_unet, on_hub
from bestiary.diffusion.decoders import find_tiny_decoder
from bestiary.diffusion.latents import Latents
from bestiary.diffusion.training import train
from bestiary.errors import BestiaryError
from bestiary.evaluation.image_judge import ImageJudge
from bestiary.evaluation.judge import Judge
from bestiary.hub import HubModel, bytes_to_download, download, is_complete

ROOT = Path(__file__).parents[2]
BASE, JUDGE = "some-org/base", "some-org/judge"
LOADERS: dict[str, Callable[[str], object]] = {
    "base": lambda model: load_unet(model, COMMIT),
    "judge": lambda model: Judge.load(model, COMMIT),
    "image judge": lambda model: ImageJudge.load(model, COMMIT),
    "captioning model": lambda model: Captioner.load(model, COMMIT),
    "tiny decoder": lambda model: find_tiny_decoder(model, COMMIT),
}


@pytest.fixture
def hub(tmp_path: Path, base: Path) -> Iterator[Hub]:
    """A hub with a tiny base, the embedded judges and a distilled decoder."""
    AutoencoderTiny(latent_channels=4, decoder_block_out_channels=(8, 8, 8, 8)).save_pretrained(tmp_path / "decoder")
    models = {
        BASE: Served(base),
        JUDGE: Served(ROOT / "models" / "judge"),
        "some-org/image-judge": Served(ROOT / "models" / "image_judge"),
        "some-org/decoder": Served(tmp_path / "decoder"),
    }
    with hub_server(models, tmp_path / "hub") as server:
        yield server


def judge(revision: str = COMMIT) -> HubModel:
    return HubModel("judge", JUDGE, revision, key="judge")


def test_a_downloaded_model_loads_without_the_hub(hub: Hub) -> None:
    expected = sum(file.stat().st_size for file in hub.models[JUDGE].folder.iterdir() if file.suffix != ".md")
    assert bytes_to_download(judge()) == expected
    assert not is_complete(judge())
    loaded = {"base": BASE, "judge": JUDGE, "image judge": "some-org/image-judge", "tiny decoder": "some-org/decoder"}
    for kind, model in loaded.items():
        LOADERS[kind](model)
    assert base_commit(BASE, COMMIT) == COMMIT
    hub.gone, before = True, len(hub.requests)
    for kind, model in loaded.items():
        LOADERS[kind](model)
    assert is_complete(judge())
    assert bytes_to_download(judge()) == 0
    assert len(hub.requests) == before


@pytest.mark.parametrize("kind", LOADERS)
def test_each_loader_says_what_to_do_when_the_hub_does_not_answer(hub: Hub, kind: str) -> None:
    hub.gone = True
    with pytest.raises(BestiaryError, match=f"^The {kind} some-org/x is not complete on this machine .* network"):
        LOADERS[kind]("some-org/x")


def test_gated_missing_and_busy_models_get_different_errors(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.models[JUDGE].gated = True
    for ask in (bytes_to_download, lambda wanted: Judge.load(wanted.model, wanted.revision)):
        with pytest.raises(BestiaryError, match=rf"is gated.*{hub.url}/{JUDGE} .*`hf auth login`.*again"):
            ask(judge())
    with pytest.raises(BestiaryError, match=rf"has no revision {'f' * 40} .*Check judge in params.yaml"):
        bytes_to_download(judge("f" * 40))
    with pytest.raises(BestiaryError, match=r"some-org/other is not on the Hugging Face hub, or it is private"):
        bytes_to_download(HubModel("judge", "some-org/other", COMMIT))
    hub.status = 503
    with pytest.raises(BestiaryError, match=r"answers HTTP 503\. Wait a few minutes"):
        bytes_to_download(judge())
    hub.status = None
    monkeypatch.setenv("HF_TOKEN", "hf_ofSomebodyWhoAcceptedTheLicence")
    assert Judge.load(JUDGE, COMMIT)


def test_a_folder_that_cannot_be_written_and_a_wrong_id_are_not_taken_for_a_missing_network(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "file" / "hub"))
    with pytest.raises(BestiaryError, match=r"because .*/file/hub cannot be written\. .* set HF_HOME"):
        download(judge())
    for act in (download, bytes_to_download):
        with pytest.raises(BestiaryError, match="open ai/x is not on the Hugging Face hub"):
            act(HubModel("judge", "open ai/x", COMMIT))
    hub.gone = True
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for act in (download, bytes_to_download):
        with pytest.raises(BestiaryError, match="HF_HUB_OFFLINE forbids"):
            act(judge())


def test_a_partial_file_is_never_loaded_and_the_next_download_completes_it(hub: Hub) -> None:
    hub.breaks_off = {"model.safetensors"}
    with pytest.raises(BestiaryError, match="is not complete on this machine"):
        Judge.load(JUDGE, COMMIT)
    hub.gone = True
    with pytest.raises(BestiaryError, match="is not complete on this machine"):
        Judge.load(JUDGE, COMMIT)  # although a part of it is on this machine
    hub.gone, hub.breaks_off = False, set()
    assert Judge.load(JUDGE, COMMIT)
    files = [request for request in hub.requests if request.startswith("GET") and "/config.json" in request]
    assert len(files) == 1


@pytest.mark.parametrize(
    ("kind", "model", "file"), [("judge", JUDGE, "config.json"), ("base", BASE, "unet/config.json")]
)
def test_a_part_that_another_tool_downloaded_is_not_taken_for_the_model(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, model: str, file: str
) -> None:
    """Without the list of the model's files, the hub's client returns the folder of such a part as if it were whole."""
    part = tmp_path / "hub" / f"models--{model.replace('/', '--')}" / "snapshots" / COMMIT / file
    part.parent.mkdir(parents=True)
    part.write_bytes((hub.models[model].folder / file).read_bytes())
    with monkeypatch.context() as nowhere:
        nowhere.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
        with pytest.raises(BestiaryError, match=f"^The {kind} {model} is not complete on this machine .* network"):
            LOADERS[kind](model)
        nowhere.setattr("bestiary.hub.bytes_to_download", lambda _: 1)  # the network is back a moment later
        with pytest.raises(BestiaryError, match=r"is not complete on this machine .* run the same command again"):
            LOADERS[kind](model)
    hub.models[model].gated, hub.status = True, 503
    with pytest.raises(BestiaryError, match="answers HTTP 503"):
        LOADERS[kind](model)
    hub.status = None
    with monkeypatch.context() as offline:
        offline.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        with pytest.raises(BestiaryError, match="HF_HUB_OFFLINE forbids"):
            LOADERS[kind](model)
    with pytest.raises(BestiaryError, match="is gated"):
        LOADERS[kind](model)
    hub.models[model].gated = False
    LOADERS[kind](model)  # downloads the rest


@pytest.mark.parametrize("missing", ["vae/config.json", "tokenizer/*"])
def test_a_model_on_the_hub_that_lacks_a_file_is_refused(hub: Hub, tmp_path: Path, missing: str) -> None:
    served = hub.models[BASE].folder = tmp_path / "lacking"
    shutil.copytree(ROOT / "models" / "base", served)
    for path in served.glob(missing):
        path.unlink()
    for act in (bytes_to_download, download):
        with pytest.raises(BestiaryError, match=rf"^The base {BASE} has no {re.escape(missing)} on the Hugging"):
            act(on_hub(BASE, COMMIT))


def test_a_model_with_weights_of_its_parts_only_is_no_judge(hub: Hub) -> None:
    hub.models[BASE].folder = ROOT / "models" / "base"
    for act in (bytes_to_download, download):
        with pytest.raises(BestiaryError, match=r"has no model\*\.safetensors or pytorch_model\*\.bin on"):
            act(HubModel("judge", BASE, COMMIT))  # text_encoder/model.safetensors


def test_training_stopped_by_a_hub_error_resumes_from_its_checkpoint(
    hub: Hub, tmp_path: Path, latents: Latents
) -> None:
    def trained_batches() -> int:
        """Train twelve steps with a judge that is loaded after the eighth, counting the batches."""
        unet, batches = load_unet(BASE, COMMIT), 0

        def count(module: torch.nn.Module, _inputs: object) -> None:
            nonlocal batches
            batches += module.training

        unet.register_forward_pre_hook(count)

        def watch(step: int) -> None:
            if step == 8:
                Judge.load(JUDGE, COMMIT)

        settings, scheduler = train_settings(steps=12), load_scheduler(BASE, COMMIT)
        train(unet, scheduler, latents, settings, seed=0, on_validation=watch, checkpoints=tmp_path / "checkpoints")
        return batches

    hub.models[JUDGE].gated = True
    with pytest.raises(BestiaryError, match="is gated"):
        trained_batches()
    hub.models[JUDGE].gated = False
    hub.models.pop(BASE)  # it is not requested again
    assert trained_batches() == 8  # the checkpoint is of step 4
