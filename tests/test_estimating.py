"""`bestiary estimate`: what a run takes, from measured rates."""

import io
import re
import runpy
import sys
import weakref
from pathlib import Path
from typing import NoReturn

import pytest
import torch
from diffusers import UNet2DConditionModel
from support.rates import SAMPLE, measured, rate
from support.settings import train_settings
from transformers import CLIPConfig

from bestiary.diffusion.half_precision import TrainedWeights
from bestiary.diffusion.low_memory import low_memory
from bestiary.diffusion.optimization import start_adapter
from bestiary.errors import BestiaryError
from bestiary.estimating import estimate, images_of, lines, render
from bestiary.evaluation import rates as measuring
from bestiary.evaluation.rates import Request, StepPart, growing
from bestiary.learning import params_with_profile
from bestiary.params import Params, Train, load_params

ROOT = Path(__file__).parents[1]
# On two idle cores, each found by a run of its own.
STAGE_SECONDS = {"clean": 14.2, "encode": 6.4, "train": 131.3, "evaluate": 71.5, "benchmark": 41.1}


def start_on_cpu(unet: UNet2DConditionModel, train: Train, *, seed: int, device: torch.device) -> TrainedWeights:
    return start_adapter(unet, train, seed=seed, device=torch.device("cpu"))


def sample() -> Params:
    return load_params(ROOT / "params.yaml")


def test_the_sample_is_estimated_within_a_quarter_of_what_its_stages_took() -> None:
    found = {line.stage: line.seconds for line in lines(sample(), SAMPLE, measured())}
    total = sum(found[stage] for stage in STAGE_SECONDS)
    assert 0.75 < total / sum(STAGE_SECONDS.values()) < 1.25
    assert 0.7 < found["train"] / STAGE_SECONDS["train"] < 1.3
    assert 0.6 < found["evaluate"] / STAGE_SECONDS["evaluate"] < 1.4


def test_training_time_grows_with_its_steps_and_with_what_it_preserves() -> None:
    params = sample()
    longer = params.model_copy(update={"train": params.train.model_copy(update={"steps": 1400})})
    kept, drawn = (
        params.model_copy(update={"train": params.train.model_copy(update={"preservation": preserving})})
        for preserving in (params.train.preservation.model_copy(update={"kind": kind}) for kind in ("noised", "drawn"))
    )
    train, of_longer, of_kept, of_drawn = (
        next(line for line in lines(each, SAMPLE, measured()) if line.stage == "train").seconds
        for each in (params, longer, kept, drawn)
    )
    assert of_longer - train == pytest.approx(700 * 0.175 + 4 * (8 * (20 * 0.0047 + 0.0041) + 133 * 0.0047))
    assert of_kept - train == pytest.approx(384 * 0.0047)
    assert of_drawn - of_kept == pytest.approx(48 * (20 * 0.0047 + 0.0041))


def test_a_gpu_must_hold_the_guided_pictures_that_training_draws_to_preserve_the_base() -> None:
    known = {rows * 64**2: 100.0 * rows for rows in (1, 2)}
    small = rate(0.1).model_copy(update={"device_mib": {64**2: 1.0, 2 * 64**2: 2.0}})
    row, part = rate(0.1).model_copy(update={"device_mib": known}), StepPart(images=1, preserved=0, times=1)
    rates = measured(row=row, part=part, step=small, decode=small, encode=small)

    def least(kind: str, **changes: object) -> float | None:
        kept = {"kind": kind, "weight": 0.3, "samples": 4}
        train = Train.model_validate(sample().train.model_dump() | {"preservation": kept} | changes)
        found = lines(sample().model_copy(update={"train": train}), SAMPLE, rates)
        return next(line.least_device_mib for line in found if line.stage == "train")

    assert least("noised") == pytest.approx(16 * 100)
    assert least("drawn") == least("both") == pytest.approx(2 * 16 * 100)
    assert least("drawn", low_memory=True) == pytest.approx(2 * 100)


def test_several_gpus_share_the_images_and_the_pictures() -> None:
    rates = measured(start_s=0.0)
    one, four = (
        {line.stage: line.seconds for line in lines(sample(), SAMPLE, rates.model_copy(update={"gpus": gpus}))}
        for gpus in (1, 4)
    )
    assert {stage for stage in one if four[stage] == pytest.approx(one[stage] / 4)} >= {"encode", "evaluate"}
    assert four["benchmark"] == one["benchmark"]  # one process


def test_each_process_needs_memory_of_its_own() -> None:
    one, two = (
        {line.stage: line.memory_mib for line in lines(sample(), SAMPLE, measured(processes=count))} for count in (1, 2)
    )
    assert one["train"] == 800
    assert {stage for stage in one if one[stage] != two[stage]} == {"encode", "train", "evaluate"}
    assert two["train"] == 2 * 800


def test_the_table_adds_times_and_disk_and_takes_the_largest_memory() -> None:
    rates = measured(step=rate(0.175).model_copy(update={"peak_mib": 1536.0}))
    found = lines(sample(), SAMPLE, rates)
    *_, total, note = render(sample(), SAMPLE, rates, found)
    assert total.split()[0] == "total"
    assert "1.5 GiB" in total
    minutes = sum(line.seconds for line in found) / 60
    assert f"{minutes:.1f} min" in total
    assert note == "Profile sample, 661 images of 16 subjects, on 2 CPU threads."


def test_what_was_not_measured_as_it_is_is_said() -> None:
    rates = measured(base_is_stand_in=True, load_average=99.0, step=rate(3.0, scaled_by=16.0))
    text = "\n".join(render(sample(), SAMPLE, rates, lines(sample(), SAMPLE, rates)))
    assert "Scaled: training was measured at 1 x 64 x 64 pixels, and multiplied by 16.0." in text
    assert "random weights" in text
    assert "load 99.0" in text
    assert text.count("Scaled") == 1


@pytest.fixture
def small_base(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for a base that is not here, of a size that a test can measure."""
    unet = {
        "block_out_channels": (32, 32),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "layers_per_block": 1,
        "cross_attention_dim": 16,
    }
    vae = {"block_out_channels": (32, 32), "down_block_types": ("DownEncoderBlock2D",) * 2}
    monkeypatch.setattr(measuring, "UNET", unet)
    monkeypatch.setattr(measuring, "VAE", {**vae, "up_block_types": ("UpDecoderBlock2D",) * 2})


@pytest.mark.usefixtures("small_base")
def test_models_of_an_interrupted_download_are_measured_by_stand_ins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    judge = CLIPConfig.from_pretrained(ROOT / "models" / "judge")
    monkeypatch.setattr("transformers.CLIPConfig", lambda: judge)
    params = params_with_profile(ROOT, "photos")
    weights = "unet/diffusion_pytorch_model.safetensors"
    for model, whole, file in ((params.base, "base", weights), (params.judge, "judge", "config.json")):
        folder = tmp_path / f"models--{model.model.replace('/', '--')}" / "snapshots" / (model.revision or "")
        (folder / file).parent.mkdir(parents=True)
        (folder / file).symlink_to(ROOT / "models" / whole / file)
    assert measuring._Bench(params, 1.0).is_stand_in
    assert measuring._judge(params, "cpu")[1]
    for missing in ("model.safetensors", "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json"):
        (folder / missing).symlink_to(ROOT / "models" / "judge" / missing)
    assert not measuring._judge(params, "cpu")[1]


def test_measuring_never_asks_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*_: object, env: dict[str, str], **__: object) -> NoReturn:
        raise BestiaryError(f"offline: {env['HF_HUB_OFFLINE']}")

    monkeypatch.setattr("subprocess.run", run)
    with pytest.raises(BestiaryError, match="offline: 1"):
        measuring.measure_rates(sample(), [], 1.0)


BUSY = "CUDA error: CUDA-capable device(s) is/are busy or unavailable"
MORE = "\nCUDA kernel errors might be asynchronously reported.\nCompile with `TORCH_USE_CUDA_DSA`.\n"
FULL = "The GPU's memory is full or the GPU is busy: "


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (RuntimeError(f"CUDA error: out of memory{MORE}"), f"{FULL}CUDA error: out of memory. Close other"),
        (
            RuntimeError(f"CUDA error: CUDA-capable device(s) is/are busy or unavailable{MORE}"),
            f"{FULL}CUDA error: ",
        ),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."), f"{FULL}CUDA out of memory. Close"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), FULL),
        (
            RuntimeError(f"CUDA error: an illegal memory access{MORE}"),
            "The measurement failed with RuntimeError: CUDA",
        ),
        (ValueError("not\nthis"), "The measurement failed with ValueError: not."),
        (MemoryError(), "The measurement failed with MemoryError."),
        (BestiaryError("Choose another base."), "Choose another base."),
    ],
)
def test_an_error_while_measuring_ends_in_one_sentence(
    monkeypatch: pytest.MonkeyPatch, error: Exception, sentence: str
) -> None:
    """The first use of the GPU fails in the program that `measure_rates` starts."""

    def full() -> NoReturn:
        raise error

    request = Request(params=sample().model_dump_json(by_alias=True), photos=[], seconds=1.0)
    monkeypatch.setattr("sys.stdin", io.StringIO(request.model_dump_json()))
    monkeypatch.setattr("bestiary.diffusion.base.device_and_dtype", lambda: (torch.device("cuda"), torch.bfloat16))
    monkeypatch.setattr(torch.cuda, "mem_get_info", full)
    monkeypatch.delitem(sys.modules, "bestiary.evaluation.rates")
    with pytest.raises(SystemExit, match=f"^{re.escape(sentence)}[^\n]*$"):
        runpy.run_module("bestiary.evaluation.rates", run_name="__main__")


@pytest.mark.slow
@pytest.mark.usefixtures("small_base")
def test_a_base_that_is_not_here_is_measured_by_random_weights_and_scaled() -> None:
    params = params_with_profile(ROOT, "photos")
    base = params.base.model_copy(update={"model": "nobody/nothing", "revision": None})
    params = params.model_copy(update={"base": base})
    rates = measuring._run(Request(params=params.model_dump_json(by_alias=True), photos=[], seconds=0.5))
    assert rates.base_is_stand_in
    assert rates.encode.scaled_by > 1  # half a second does not suffice for 512 pixels
    assert rates.rows_per_step == 2
    assert rates.trainable_parameters > 0


def test_sizes_grow_to_the_real_one() -> None:
    assert [str(size) for size in growing(measuring.Size(3, 512), 64)] == [
        *(f"1 x {side} x {side} pixels" for side in (64, 128, 256, 512)),
        "3 x 512 x 512 pixels",
    ]


def test_each_process_of_training_takes_its_share_of_a_step() -> None:
    def share(processes: int, preserved: int = 0, **changes: object) -> StepPart:
        kept = {"kind": "noised" if preserved else "none", "weight": 0.3, "samples": preserved or 4}
        settings = train_settings(**{"batch_size": 16, "preservation": kept, **changes})
        return StepPart.of(low_memory(settings, processes), processes)

    assert share(1) == StepPart(images=16, preserved=0, times=1)
    assert share(2) == StepPart(images=8, preserved=0, times=1)
    assert share(2, accumulation=4) == StepPart(images=2, preserved=0, times=4)
    assert share(2, preserved=4) == StepPart(images=8, preserved=2, times=1)
    assert share(2, low_memory=True) == StepPart(images=1, preserved=0, times=8)
    assert share(2, preserved=4, low_memory=True) == StepPart(images=1, preserved=1, times=5)
    assert share(1, preserved=4, low_memory=True, batch_size=1) == StepPart(images=1, preserved=4, times=1)


@pytest.mark.parametrize(("launch", "graph"), [("", True), ("torchrun --nproc-per-node 2", False)])
def test_the_memory_that_a_training_steps_graph_keeps_is_measured(
    monkeypatch: pytest.MonkeyPatch, launch: str, graph: bool
) -> None:
    """Without a GPU nothing captures a graph, so the test replaces the capture and the reading of reserved memory."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("BESTIARY_LAUNCH", launch)
    kept: weakref.WeakKeyDictionary[torch.nn.Module, int] = weakref.WeakKeyDictionary()  # forgets a dropped graph

    def captured(module: torch.nn.Module, example: tuple[torch.Tensor, ...]) -> torch.nn.Module:
        kept[module] = len(example[0]) * 2**20
        return module

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", captured)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 2**30 + sum(kept.values()))
    bench = measuring._Bench(sample(), 1.0)
    monkeypatch.setattr(bench, "device", torch.device("cuda"))
    monkeypatch.setattr("bestiary.diffusion.optimization.start_adapter", start_on_cpu)
    step = measuring._TrainingStep(bench, StepPart(images=3, preserved=1, times=1))
    assert step.is_graph == graph
    bench.device = torch.device("cpu")
    for batch in (4, 8):
        size = measuring.Size(batch, 64)
        assert step.prepare(size) == (batch * 3 / 4 if graph else 0)  # only the images are in the graph
        step(size)
    assert step.graph_mib(measuring.Size(16, 64)) == (12 if graph else 0)  # extrapolated
    assert (step.predict.fast is not None) == graph


@pytest.mark.slow
def test_the_bundled_base_is_measured_at_its_real_sizes() -> None:
    photos = sorted((ROOT / "examples" / "pip" / "photos").rglob("*.png"))
    params = params_with_profile(ROOT, "subject")
    rates, found = estimate(params, images_of({"pip": photos}, proved=1), seconds=20)
    assert not rates.base_is_stand_in
    assert rates.step.scaled_by == rates.row.scaled_by == 1
    assert 1 < rates.rows_per_step < 2  # only some steps are guided
    assert rates.latent_factor == 4
    assert {line.stage for line in found} >= {"train", "evaluate", "benchmark"}
