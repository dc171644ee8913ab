"""OpenVINO as an engine: an export draws what torch draws, and every problem with it is reported in one sentence."""

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import yaml
from diffusers import AutoencoderTiny, StableDiffusionPipeline
from PIL.Image import Image
from support.adapters import make_adapter

from bestiary import cli
from bestiary.commands import drawing
from bestiary.diffusion import engines
from bestiary.diffusion.adapter import apply_adapter
from bestiary.diffusion.adapter_format import FILE_NAME, Provenance
from bestiary.diffusion.adapter_reading import read_adapter
from bestiary.diffusion.base import base_sha256, load_pipeline, load_unet
from bestiary.diffusion.engines import Processor, is_exported, open_export
from bestiary.diffusion.export import Calibration, Exported, Format, Fused, TinyDecoder, export
from bestiary.diffusion.export_format import MANIFEST, check_files, file_sha256, read_manifest
from bestiary.diffusion.sampling import generate
from bestiary.errors import BestiaryError
from bestiary.evaluation import pictures
from bestiary.evaluation.pictures import Jobs, draw_as_loaded
from bestiary.files import write_atomically
from bestiary.png_metadata import as_a1111, read_settings
from bestiary.registry.resolving import Adapter
from bestiary.samplers import DrawingDefaults, Sampling

if not all(map(find_spec, ("openvino", "openvino_tokenizers", "nncf"))):  # not imported: that would count as a use
    pytest.skip("the extra openvino is not installed", allow_module_level=True)

ROOT = Path(__file__).parents[2]
FEW_STEPS = Sampling("lcm", steps=2, guidance_scale=1.0)
GUIDED = Sampling("ddim", steps=2, guidance_scale=3.0, width=40, height=32)
PROMPTS = ["zebra", "antelope"]


@pytest.fixture(scope="module")
def fused(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Fused:
    adapter = make_adapter(load_unet(base), tmp_path_factory.mktemp("adapter"))
    defaults = DrawingDefaults("a {}", FEW_STEPS)
    return Fused(str(base), None, "./models/base", adapter, "models/few_step", 0.5, defaults, few_step=True)


@pytest.fixture(scope="module")
def exported(fused: Fused, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Exported]:
    folder = tmp_path_factory.mktemp("exports") / "fp32"
    return folder, export(fused, Format("fp32"), Calibration(PROMPTS), folder)


@pytest.fixture
def folder(exported: tuple[Path, Exported], tmp_path: Path) -> Path:
    """A copy of the export, to damage."""
    return Path(shutil.copytree(exported[0], tmp_path / "copy"))


@pytest.fixture(scope="module")
def opened(exported: tuple[Path, Exported]) -> StableDiffusionPipeline:
    return open_export(exported[0])


@pytest.fixture(scope="module")
def torch_pipeline(fused: Fused) -> StableDiffusionPipeline:
    pipeline = load_pipeline(fused.base)
    apply_adapter(pipeline, fused.adapter, fused.weight)
    return pipeline


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BESTIARY_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


def difference(images: list[Image], others: list[Image]) -> float:
    """The largest difference of two pictures' bytes."""
    return max(
        float(np.abs(np.asarray(a, int) - np.asarray(b, int)).max()) for a, b in zip(images, others, strict=True)
    )


@pytest.mark.parametrize("sampling", [FEW_STEPS, GUIDED], ids=["few steps", "guided, oblong"])
def test_an_export_draws_what_torch_draws(
    opened: StableDiffusionPipeline, torch_pipeline: StableDiffusionPipeline, sampling: Sampling
) -> None:
    assert is_exported(opened)
    assert not is_exported(torch_pipeline)
    seeds = range(2)
    expected = generate(torch_pipeline, PROMPTS, seeds, sampling, batch_size=1)
    assert difference(generate(opened, PROMPTS, seeds, sampling, batch_size=1), expected) <= 1
    assert difference(generate(opened, PROMPTS, seeds, sampling, batch_size=2), expected) <= 1


def test_an_export_draws_a_long_series_in_this_process(
    opened: StableDiffusionPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pictures, "MANY_STEPS", 1)
    drawn = draw_as_loaded(opened, Jobs([0, 1], PROMPTS, [0, 1]), FEW_STEPS, batch_size=1, task="draw")
    assert difference(drawn, generate(opened, PROMPTS, range(2), FEW_STEPS, batch_size=1)) == 0


def test_an_export_records_its_lineage(fused: Fused, exported: tuple[Path, Exported]) -> None:
    folder, done = exported
    manifest = read_manifest(folder)
    assert manifest == done.manifest
    assert manifest.base_sha256 == base_sha256(fused.base)
    assert manifest.adapter_weight == 0.5
    assert manifest.defaults == replace(fused.defaults, sampling=replace(FEW_STEPS, adapter_weight=1.0))
    assert {"openvino", "nncf", "torch", "bestiary"} <= manifest.versions.keys()
    assert done.unet_error < 1e-4
    check_files(folder, manifest)
    for config in folder.rglob("*.json"):  # the same export on every machine, without the names of its folders
        assert str(Path(fused.base).parent) not in config.read_text(), config


def test_an_export_has_the_files_that_openvinos_own_pipelines_read(exported: tuple[Path, Exported]) -> None:
    folder = exported[0]
    networks = [
        f"{part}/openvino_model.{kind}" for part in ("text_encoder", "unet", "vae_decoder") for kind in ("xml", "bin")
    ]
    for name in (*networks, "unet/config.json", "tokenizer/openvino_tokenizer.xml", "tokenizer/tokenizer_config.json"):
        assert (folder / name).is_file(), name
    assert json.loads((folder / "model_index.json").read_bytes())["unet"] == ["diffusers", "UNet2DConditionModel"]
    assert json.loads((folder / "scheduler" / "scheduler_config.json").read_bytes())["_class_name"] == "LCMScheduler"


@pytest.mark.slow
def test_int8_is_smaller_and_draws_nearly_the_same(
    fused: Fused, exported: tuple[Path, Exported], torch_pipeline: StableDiffusionPipeline, tmp_path: Path
) -> None:
    done = export(fused, Format("int8"), Calibration(PROMPTS), tmp_path / "int8")
    assert 1e-4 < done.unet_error < 0.5  # random weights suffer more than trained ones
    weights = [(folder / "unet" / "openvino_model.bin").stat().st_size for folder in (tmp_path / "int8", exported[0])]
    assert weights[0] < weights[1] / 2
    drawn = generate(open_export(tmp_path / "int8"), PROMPTS, range(2), FEW_STEPS, batch_size=1)
    expected = generate(torch_pipeline, PROMPTS, range(2), FEW_STEPS, batch_size=1)
    assert 0 < difference(drawn, expected) < 128


def test_a_tiny_decoder_is_part_of_the_export_and_never_silent(
    fused: Fused, torch_pipeline: StableDiffusionPipeline, tmp_path: Path
) -> None:
    AutoencoderTiny(
        encoder_block_out_channels=(8,) * 3,
        decoder_block_out_channels=(8,) * 3,
        num_encoder_blocks=(1,) * 3,
        num_decoder_blocks=(1,) * 3,
    ).save_pretrained(tmp_path / "tiny")
    done = export(fused, Format("fp32", TinyDecoder(str(tmp_path / "tiny"))), Calibration(PROMPTS), tmp_path / "out")
    assert done.manifest.defaults.sampling.decoder == "tiny"
    pipeline = open_export(tmp_path / "out")
    with pytest.raises(BestiaryError, match="has only the tiny decoder"):
        generate(pipeline, PROMPTS[:1], [0], FEW_STEPS, batch_size=1)
    with pytest.raises(BestiaryError, match="no tiny decoder for this base"):
        generate(torch_pipeline, PROMPTS[:1], [0], replace(FEW_STEPS, decoder="tiny"), batch_size=1)
    (image,) = generate(pipeline, PROMPTS[:1], [0], replace(FEW_STEPS, decoder="tiny"), batch_size=1)
    assert image.size == (32, 32)


def test_a_failed_export_leaves_nothing_behind(fused: Fused, tmp_path: Path) -> None:
    with pytest.raises(BestiaryError, match="cannot be loaded"):
        export(fused, Format("fp32", TinyDecoder(str(tmp_path / "none"))), Calibration(PROMPTS), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "notes.txt").touch()
    with pytest.raises(BestiaryError, match="exists and is no export"):
        export(fused, Format("fp32"), Calibration(PROMPTS), tmp_path)
    with pytest.raises(BestiaryError, match=r"notes\.txt cannot be written .* is a file, not a folder"):
        export(fused, Format("fp32"), Calibration(PROMPTS), tmp_path / "notes.txt" / "out")


def test_an_export_takes_the_place_of_an_older_one_and_of_nothing_else(
    fused: Fused, folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "link").symlink_to(folder)
    picture = folder / "zebra-0.png"  # drawn with `--out` of the same name
    picture.touch()
    with pytest.raises(BestiaryError, match=r"contains zebra-0\.png, which is not part of an export"):
        export(fused, Format("fp32"), Calibration(PROMPTS), tmp_path / "link")
    picture.unlink()
    remove_a_file(folder)
    export(fused, Format("fp32"), Calibration(PROMPTS), tmp_path / "link")
    check_files(folder, read_manifest(folder))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy", "link"]


def remove_a_file(folder: Path) -> None:
    (folder / "unet" / "openvino_model.bin").unlink()


def change_a_file(folder: Path) -> None:
    with (folder / "unet" / "openvino_model.bin").open("ab") as file:
        file.write(b"x")


def manifest_with(**changes: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / MANIFEST
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def without(name: str) -> Callable[[Path], None]:
    """Remove a file that the manifest does not name."""

    def change(folder: Path) -> None:
        manifest_with(files={})(folder)
        (folder / name).unlink()

    return change


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (remove_a_file, r"has no unet/openvino_model\.bin\. Export the adapter again"),
        (change_a_file, r"openvino_model\.bin has changed since it was exported"),
        (manifest_with(format=2), "has format 2, but this version reads format 1. Export it again"),
        (manifest_with(precision="int4"), r"bestiary\.json in .* is damaged"),
        (manifest_with(drawing={}), r"bestiary\.json in .* is damaged"),
        (manifest_with(files={"../x": "0"}), "which is outside of it"),
        (lambda folder: (folder / MANIFEST).write_text("{"), r"bestiary\.json in .* is damaged"),
        (lambda folder: (folder / MANIFEST).write_text("[" * 100_000), r"bestiary\.json in .* is damaged"),
        (without("unet/config.json"), "cannot be loaded. Export the adapter again"),
        (without("scheduler/scheduler_config.json"), "cannot be loaded. Export the adapter again"),
        (lambda folder: (folder / MANIFEST).unlink(), r"has no bestiary\.json, so it is not an export"),
    ],
)
def test_a_damaged_export_is_refused(folder: Path, damage: Callable[[Path], None], sentence: str) -> None:
    damage(folder)
    with pytest.raises(BestiaryError, match=sentence):
        open_export(folder)


def test_a_network_that_openvino_cannot_read_is_refused(folder: Path) -> None:
    without("unet/openvino_model.bin")(folder)
    with pytest.raises(BestiaryError, match=r"cannot compute .*unet/openvino_model\.xml\. Export the adapter again"):
        generate(open_export(folder), PROMPTS[:1], [0], FEW_STEPS, batch_size=1)


def test_an_export_draws_only_sizes_that_its_unet_halves_without_a_rest(
    opened: StableDiffusionPipeline, exported: tuple[Path, Exported], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert exported[1].manifest.side_step == opened.unet.side_step == 8  # 4 pixels a latent, halved once
    monkeypatch.setattr(opened.unet, "side_step", 16)
    with pytest.raises(BestiaryError, match="The resolution 40 is not a multiple of 16"):
        generate(opened, PROMPTS[:1], [0], replace(FEW_STEPS, width=48, height=40), batch_size=1)


def test_an_export_draws_without_a_cache(
    exported: tuple[Path, Exported], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("BESTIARY_CACHE", str(tmp_path / "file"))
    (image,) = generate(open_export(exported[0]), PROMPTS[:1], [0], FEW_STEPS, batch_size=1)
    assert image.size == (32, 32)


def test_the_error_on_a_processor_without_the_instructions_says_what_to_do(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Processor, "here", lambda: Processor(frozenset({"avx2"}), "old"))
    assert is_exported(open_export(folder))  # float32 runs everywhere
    manifest_with(precision="int8")(folder)
    with pytest.raises(BestiaryError, match=r"in int8, for which this processor has no instructions.*--fp32"):
        open_export(folder)
    assert engines.reason_against(read_manifest(folder)) == "this processor has no instructions for int8"
    assert Processor.here().best() == "fp32"
    assert Processor(frozenset({"avx512_bf16"})).best() == "bf16"
    assert Processor(None).best() == "int8"


def test_without_openvino_the_error_says_what_to_install(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "find_spec", lambda _: None)
    with pytest.raises(BestiaryError, match=r"not installed. Install it with `pip install 'bestiary\[openvino\]'`"):
        open_export(folder)
    assert "not installed" in str(engines.reason_against(read_manifest(folder)))


def test_openvino_sends_no_statistics() -> None:
    # A new process, because a library that another test uses may have imported openvino_telemetry in this one.
    code = (
        "import sys; from bestiary.diffusion import engines; engines.openvino(); "
        "print(sys.modules['openvino_telemetry'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "None\n"


def test_compiled_networks_are_cached_for_the_next_process_without_a_copy_of_the_weights(
    exported: tuple[Path, Exported], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BESTIARY_CACHE", str(tmp_path))

    def draw() -> list[Image]:
        return generate(open_export(exported[0]), PROMPTS[:1], [0], FEW_STEPS, batch_size=1)

    first = draw()
    blobs = {path: path.read_bytes() for path in engines.compiled_cache().iterdir()}
    assert len(blobs) == 3
    weights = (exported[0] / "unet" / "openvino_model.bin").read_bytes()
    assert not any(weights[start : start + 1000] in blob for start in (0, len(weights) // 2) for blob in blobs.values())
    with monkeypatch.context() as cached:
        cached.delattr(engines._Network, "_compile")
        assert draw() == first
    for path in blobs:
        path.write_bytes(b"damaged")
    assert draw() == first
    assert all(path.read_bytes() != b"damaged" for path in blobs)


def test_compiled_networks_that_are_unused_for_30_days_are_removed_and_nothing_else(
    exported: tuple[Path, Exported], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BESTIARY_CACHE", str(tmp_path))
    cache = engines.compiled_cache()

    def draw(sampling: Sampling) -> None:
        generate(open_export(exported[0]), PROMPTS[:1], [0], sampling, batch_size=1)

    def age(days: float, *paths: Path) -> None:
        for path in paths:
            os.utime(path, (time.time() - days * 86_400,) * 2, follow_symlinks=False)

    draw(FEW_STEPS)
    used = set(cache.iterdir())
    unused, recent = cache / f"{'0' * 64}.blob", cache / f"{'1' * 64}.blob"
    others = [cache / "notes.txt", cache / "mine.blob", cache / f"{'2' * 64}.blob", cache / f"{'3' * 64}.blob"]
    for file in (unused, recent, *others[:2]):
        file.touch()
    others[2].symlink_to(exported[0] / MANIFEST)
    others[3].mkdir()
    age(29, recent)
    age(31, unused, *others, *used)
    draw(FEW_STEPS)  # uses the cached networks and adds none
    assert unused.exists()
    draw(replace(FEW_STEPS, width=40, height=40))  # adds networks of another size
    left = set(cache.iterdir())
    assert unused not in left
    assert {recent, *others, *used} < left
    assert (exported[0] / MANIFEST).exists()


def command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["bestiary", "generate", "--prompt", "zebra", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


def test_the_command_draws_with_an_export_and_repeats_its_picture(
    exported: tuple[Path, Exported], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)  # where there is no base
    folder, done = exported
    assert command(monkeypatch, "--adapter", str(folder), "--out", "drawn") == 0
    (picture,) = Path("drawn").iterdir()
    settings = read_settings(picture)
    assert (settings.engine, settings.export_sha256) == ("openvino-fp32", file_sha256(folder / MANIFEST))
    assert (settings.base, settings.adapter_sha256) == ("./models/base", done.manifest.adapter_sha256)
    assert settings.sampling == replace(FEW_STEPS, width=32, height=32)
    assert "Engine: openvino-fp32" in as_a1111(settings)

    monkeypatch.setattr(sys, "argv", ["bestiary", "generate", "--like", str(picture), "--out", "again"])
    with pytest.raises(SystemExit):
        cli.main()
    assert Path("again", picture.name).read_bytes() == picture.read_bytes()
    assert command(monkeypatch, "--adapter", str(folder), "--grid", "seed=0,1", "--out", "grid") == 0
    assert [path.name for path in Path("grid").iterdir()] == ["prompt-0-grid.png"]

    capsys.readouterr()
    for options, sentence in (
        (["--adapter", f"{folder}:0.5"], "cannot have another weight"),
        (["--adapter", str(folder), "--engine", "torch"], "which torch cannot draw with"),
        (["--adapter", str(folder), "--resolution", "36"], "sides of its pictures are multiples of 8 pixels"),
        (["--adapter", str(folder), "--decoder", "tiny"], "has only the full decoder"),
    ):
        assert command(monkeypatch, *options, "--out", "none") == 1
        assert sentence in capsys.readouterr().err
    assert not Path("none").exists()


def damage_a_network(folder: Path, _: pytest.MonkeyPatch) -> None:
    manifest_with(files={})(folder)
    network = folder / "unet" / "openvino_model.xml"
    network.write_bytes(network.read_bytes()[:5000])


def damage_the_decoders_weights(folder: Path, _: pytest.MonkeyPatch) -> None:
    manifest_with(files={})(folder)
    (folder / "vae_decoder" / "openvino_model.bin").write_bytes(b"damaged")


def fail_to_run(_: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(_: object) -> None:
        raise RuntimeError("[CPU] out of memory\nat src/plugins/intel_cpu/node.cpp:1")

    monkeypatch.setattr(engines._Network, "_cached", lambda *_: run)


def fail_to_import(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = folder.with_name("site-packages")
    broken.mkdir()
    (broken / "openvino.py").write_text("raise ImportError('libopenvino.so: cannot open shared object file')")
    monkeypatch.delitem(sys.modules, "openvino")
    monkeypatch.syspath_prepend(broken)


def fail_to_import_with_another_numpy(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_to_import(folder, monkeypatch)
    (folder.with_name("site-packages") / "openvino.py").write_text("raise ValueError('numpy.dtype size changed')")


def fail_to_start(_: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def start() -> None:
        raise RuntimeError("Failed to create plugin CPU")

    monkeypatch.setattr(engines.openvino(), "Core", start)


def fail_to_compile(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Core(engines.openvino().Core):  # type: ignore[misc]
        def compile_model(self, *_: object) -> None:
            raise MemoryError("std::bad_alloc")

    manifest_with(files={})(folder)  # no compiled network can be cached
    monkeypatch.setattr(engines.openvino(), "Core", Core)


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (damage_a_network, r"The installed version of OpenVINO cannot compute .*unet/openvino_model\.xml\."),
        (damage_the_decoders_weights, r"The installed version of OpenVINO cannot compute .*vae_decoder.*\.xml\."),
        (fail_to_run, r"OpenVINO failed to run .*text_encoder/openvino_model\.xml\."),
        (fail_to_import, r"The installed OpenVINO cannot be imported\."),
        (fail_to_import_with_another_numpy, r"The installed OpenVINO cannot be imported\."),
        (fail_to_start, r"OpenVINO cannot be started\."),
        (fail_to_compile, r"The installed version of OpenVINO cannot compute .*text_encoder.*\.xml\."),
    ],
)
def test_torch_draws_where_openvino_fails_at_the_first_picture_unless_openvino_was_chosen(
    fused: Fused,
    folder: Path,
    damage: Callable[[Path, pytest.MonkeyPatch], None],
    problem: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    registered = Adapter(
        fused.adapter, "models:/bestiary/1", fused.base, None, None, export=folder, has_fast_variant=True
    )
    monkeypatch.setattr(drawing, "_resolve", lambda *_, **__: [registered])
    monkeypatch.setattr(engines, "reason_against", lambda _: None)
    damage(folder, monkeypatch)
    monkeypatch.chdir(tmp_path)
    assert command(monkeypatch, "--count", "2", "--out", "drawn") == 0
    (note,) = (line for line in capsys.readouterr().err.splitlines() if "torch" in line)
    assert re.fullmatch(rf"Drawing with torch instead of the fast variant\. {problem}", note)
    assert [read_settings(Path("drawn", f"prompt-{seed}.png")).engine for seed in (0, 1)] == ["torch", "torch"]

    assert command(monkeypatch, "--engine", "openvino", "--out", "none") == 1
    assert re.fullmatch(rf"{problem} \w.*\.", capsys.readouterr().err.splitlines()[-1])
    assert not Path("none").exists()


@pytest.mark.slow
def test_the_stage_exports_the_few_step_adapter(
    base: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("stages", "src", "fast"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "dvc.yaml").write_bytes((ROOT / "dvc.yaml").read_bytes())
    (tmp_path / "models").mkdir()
    (tmp_path / "build").mkdir()
    (tmp_path / "models" / "base").symlink_to(base)
    (tmp_path / "models" / "tiny_decoder").symlink_to(ROOT / "models" / "tiny_decoder")
    (tmp_path / "build" / "split").symlink_to(pictures)
    trained = read_adapter(make_adapter(load_unet(base), tmp_path / "trained"))
    distilled = Provenance.model_validate(
        {"base_sha256": base_sha256(base), "distilled_from": {"adapter_sha256": "of the adapter"}}
    )
    few_step = replace(trained, few_step=replace(FEW_STEPS, timesteps=(999, 699)), provenance=distilled)
    write_atomically(tmp_path / "models" / "few_step" / FILE_NAME, few_step.to_bytes())
    params = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    params["export"] |= {"precision": "fp32", "decoder": "full"}
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params), encoding="utf-8")
    monkeypatch.setenv("BESTIARY_TRACKING", "off")
    monkeypatch.delenv("DVC_ROOT", raising=False)
    monkeypatch.chdir(tmp_path)
    runpy.run_path("stages/export.py", run_name="__main__")
    report = json.loads(Path("reports/results/export.json").read_text())
    manifest = read_manifest(Path("models/fast"))
    assert manifest.distilled_from_sha256 == "of the adapter"
    assert manifest.defaults.sampling == few_step.few_step
    assert report["export_sha256"] == file_sha256(Path("models/fast") / MANIFEST)
    assert report["unet_error"] < 1e-3
