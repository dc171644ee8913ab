from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from bestiary.diffusion.sampling import generate
from bestiary.evaluation import profiling
from bestiary.samplers import Sampling

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline
    from PIL.Image import Image

PROMPTS = ["a photo of an antelope", "a photo of a tiger"]


def test_time_is_split_into_text_denoising_and_decoding(pipeline: StableDiffusionPipeline) -> None:
    slow = pipeline.unet.register_forward_hook(lambda *_: time.sleep(0.2))
    with profiling.stopwatch(pipeline) as seconds:
        generate(pipeline, PROMPTS[:1], [0], Sampling("ddim", steps=3, guidance_scale=3.0), batch_size=1)
    slow.remove()
    assert seconds.denoise > 0.4
    assert seconds.text > 0
    assert seconds.decode > 0
    assert seconds.text + seconds.denoise + seconds.decode <= seconds.total


def test_the_cost_of_calls_is_that_of_a_call_and_of_its_pictures(pipeline: StableDiffusionPipeline) -> None:
    sampling = Sampling("ddim", steps=1, guidance_scale=1.0, width=32, height=32)

    def call() -> list[Image]:
        return generate(pipeline, PROMPTS, [0, 1], sampling, batch_size=2)

    cost, images = profiling.measure(pipeline, [call, call])
    assert [len(drawn) for drawn in images] == [2, 2]
    assert 0 < cost.denoise_s < cost.p50_s <= cost.p95_s
    assert cost.images_per_second == pytest.approx(2 / cost.p50_s)
    assert cost.peak_memory_mib > 50
    assert (cost.peak_device_memory_mib is None) == (pipeline.device.type == "cpu")


def test_the_environment_names_what_the_numbers_depend_on() -> None:
    environment = profiling.environment()
    assert environment.dtype in ("float32", "bfloat16", "float16")
    assert environment.threads >= 1
    assert environment.device
    for library in (environment.torch, environment.diffusers, environment.peft, environment.transformers):
        assert library[0].isdigit()
    assert environment.python.startswith("3.")


def test_a_machine_can_compile_when_it_has_a_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CXX", "my-compiler")
    assert not profiling.this_machine("cpu").can_compile
    (tmp_path / "my-compiler").touch(mode=0o755)
    assert profiling.this_machine("cpu").can_compile


def test_a_cpu_has_bfloat16_when_its_flags_name_the_instructions() -> None:
    file = Path("/proc/cpuinfo")
    if not file.is_file():
        pytest.skip("only Linux lists a CPU's instructions")
    flags = file.read_text().split()
    assert profiling.this_machine("cpu").has_bfloat16 == ("avx512_bf16" in flags or "amx_bf16" in flags)
