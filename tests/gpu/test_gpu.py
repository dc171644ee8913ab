"""What a GPU computes, compared with the CPU or with the plain way. `make test-gpu` runs these tests."""

import os
from pathlib import Path

import pandas as pd
import pytest
import torch
from diffusers import UNet2DConditionModel
from support.settings import train_settings
from support.training import adapter_weights

from bestiary.diffusion.adapter import inject, save_adapter, verify_adapter
from bestiary.diffusion.adapter_format import Provenance
from bestiary.diffusion.base import load_pipeline, load_scheduler, load_unet, load_vae
from bestiary.diffusion.encoding import VaeEncoder
from bestiary.diffusion.fast_step import FastPrediction
from bestiary.diffusion.full_memory import Halving
from bestiary.diffusion.latents import LatentCache, Latents
from bestiary.diffusion.progress import TrainingResult
from bestiary.diffusion.sampling import generate
from bestiary.diffusion.training import train
from bestiary.evaluation.judge import Judge
from bestiary.evaluation.judging_ahead import JudgingAhead
from bestiary.evaluation.pictures import Jobs, draw
from bestiary.samplers import Sampling

pytestmark = pytest.mark.skipif(
    not (os.environ.get("BESTIARY_TEST_GPU") and torch.cuda.is_available()), reason="needs a GPU: make test-gpu"
)
HALF = torch.bfloat16


def cache(images: int, unet: UNet2DConditionModel) -> LatentCache:
    """Random latents and captions of the bundled base's shapes."""
    torch.manual_seed(0)
    shape = (images, 1, unet.config.in_channels, 16, 16)
    return LatentCache(
        images=pd.DataFrame({"path": "", "class": ["zebra"] * images, "sha256": ""}),
        captions=pd.DataFrame({"class": ["", "zebra"], "caption": ["", "a zebra"]}),
        features=torch.randn(2, 24, unet.config.cross_attention_dim),
        scaling_factor=1.0,
        base_sha256="",
        data_sha256="",
        shards=[{"mean": torch.randn(shape), "std": torch.ones(shape)}],
    )


def trained(base: Path, dtype: torch.dtype, **changes: object) -> tuple[TrainingResult, UNet2DConditionModel]:
    unet = load_unet(base, dtype=dtype)
    settings = train_settings(steps=20, validate_every=10, batch_size=8, learning_rate=1e-3, rank=4, alpha=4, **changes)
    latents = Latents(cache(32, unet), cache(8, unet))
    return train(unet, load_scheduler(base), latents, settings, seed=0), unet


def test_a_step_as_a_graph_is_the_plain_step(base_folder: Path) -> None:
    unet = load_unet(base_folder, dtype=HALF).to("cuda")
    parameters = inject(unet, rank=4, alpha=4, dropout=0.0, targets=["to_q", "to_v", "conv1"], seed=0)
    for parameter in parameters:
        torch.nn.init.normal_(parameter, std=0.02)
        parameter.data = parameter.data.to(HALF)
    inputs = (
        torch.randn(4, unet.config.in_channels, 16, 16, device="cuda", dtype=HALF),
        torch.tensor([1, 300, 700, 999], device="cuda"),
        torch.randn(4, 24, unet.config.cross_attention_dim, device="cuda", dtype=HALF),
    )
    plain, graph = FastPrediction(unet), FastPrediction(unet)
    graph.use(inputs, compiled=False, graph=True)
    assert graph.fast is not None
    gradients = []
    for predict in (plain, graph):
        for parameter in parameters:
            parameter.grad = None
        predict(*inputs).sample.float().square().mean().backward()
        gradients.append(torch.cat([p.grad.flatten().float() for p in parameters if p.grad is not None]))
    torch.testing.assert_close(graph(*inputs).sample, plain(*inputs).sample, rtol=1e-2, atol=1e-2)
    assert (gradients[0] - gradients[1]).norm() < 0.02 * gradients[0].norm()
    fewer = tuple(tensor[:3] for tensor in inputs)
    assert graph(*fewer).sample.shape[0] == 3


def test_training_learns_as_on_a_cpu_and_the_adapter_is_float32(base_folder: Path, tmp_path: Path) -> None:
    result, unet = trained(base_folder, HALF)
    assert result.val_loss < result.base_val_loss
    assert {weight.dtype for weight in adapter_weights(unet)} == {torch.float32}
    verify_adapter(save_adapter(unet, tmp_path, Provenance()), str(base_folder))
    again, _ = trained(base_folder, HALF, gradient_checkpointing=True)  # without a graph
    assert again.val_loss == pytest.approx(result.val_loss, rel=5e-3)


def test_compiled_training_has_the_loss_of_eager_training(base_folder: Path) -> None:
    eager, _ = trained(base_folder, HALF)
    compiled, _ = trained(base_folder, HALF, compile="always")
    assert compiled.val_loss == pytest.approx(eager.val_loss, rel=5e-3)
    assert compiled.train_loss == pytest.approx(eager.train_loss, rel=5e-3)


def test_the_compiled_autoencoder_gives_the_latents_of_a_cpu(base_folder: Path) -> None:
    pixels = torch.randint(0, 256, (5, 3, 64, 64), dtype=torch.uint8)
    exact, _ = VaeEncoder(load_vae(base_folder), compiled=False)(pixels)
    vae = load_vae(base_folder, dtype=HALF).to("cuda", memory_format=torch.channels_last)
    encode = VaeEncoder(vae, compiled=True)
    with torch.inference_mode():
        for batch in (pixels[:4], pixels[4:]):  # the second one has another shape
            mean, _ = encode(batch.cuda())
            wanted = exact[:4] if len(batch) == 4 else exact[4:]
            assert (mean.float().cpu() - wanted).norm() < 0.03 * wanted.norm()


def test_a_picture_is_drawn(base_folder: Path) -> None:
    pipeline = load_pipeline(base_folder, device="cuda", dtype=HALF)
    (image,) = generate(pipeline, ["a zebra"], [0], Sampling("dpmsolver++", steps=4, guidance_scale=3.0), batch_size=1)
    assert image.size == (64, 64)
    assert len(set(image.convert("L").getdata())) > 20


def test_a_second_thread_judges_on_the_gpu_while_pictures_are_drawn(base_folder: Path, judge_folder: Path) -> None:
    pipeline, judge = load_pipeline(base_folder, device="cuda", dtype=HALF), Judge.load(str(judge_folder), None, "cuda")
    ahead, jobs = JudgingAhead([judge]), Jobs([0] * 6, ["a zebra"] * 6, list(range(6)))
    drawn = draw(pipeline, None, jobs, Sampling("dpmsolver++", steps=4), batch_size=2, on_drawn=ahead.see)
    features = ahead.features(judge, drawn)
    assert len(ahead._known) == 6
    torch.testing.assert_close(features, judge.image_features(drawn), atol=1e-3, rtol=0)


def test_a_batch_that_does_not_fit_into_gpu_memory_is_halved(
    base_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    vae = load_vae(base_folder, dtype=HALF).to("cuda", memory_format=torch.channels_last)
    pixels = torch.randint(0, 256, (64, 3, 256, 256), device="cuda", dtype=torch.uint8)
    encode, halving = VaeEncoder(vae, compiled=False), Halving("Encoding", "encode.batch_size")
    torch.cuda.empty_cache()
    taken = torch.cuda.memory_reserved() + 2**29
    torch.cuda.set_per_process_memory_fraction(taken / torch.cuda.mem_get_info()[1])
    try:
        with torch.inference_mode():
            means = torch.cat([mean for mean, _ in halving.parts(encode, pixels)])
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert len(means) == 64
    assert "Continuing with" in capsys.readouterr().out
