"""`bestiary preflight` finds problems that would end a long run, before it starts."""

import errno
import fcntl
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from diffusers import AutoencoderTiny
from support.hub_server import COMMIT, Hub, Served, hub_server
from support.rates import SAMPLE, measured, rate
from support.sciencedb_server import serving

from bestiary import cli, preflight
from bestiary.errors import BestiaryError
from bestiary.estimating import lines
from bestiary.evaluation.rates import Rate, Rates, StepPart, launched_processes
from bestiary.learning import params_with_profile
from bestiary.params import FewStepModel, Params, load_params
from bestiary.preflight import Check, checks, disk, memory, time_needed

ROOT = Path(__file__).parents[1]


@pytest.fixture
def unmeasured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Checks that use stored rates of two idle cores instead of measuring."""
    monkeypatch.setattr(
        preflight, "estimate", lambda params, images, _: (measured(), lines(params, images, measured()))
    )


@pytest.fixture
def night() -> Params:
    """The profile sciencedb, with so few images that they fit onto the disk of any machine."""
    params = params_with_profile(ROOT, "sciencedb")
    return params.model_copy(update={"dataset": params.dataset.model_copy(update={"images_per_class": 10})})


@pytest.fixture
def hub(night: Params, tmp_path: Path) -> Iterator[Hub]:
    """A hub that has every pinned model of the profile sciencedb, at its revision."""
    assert night.captioner
    assert night.tiny_decoder
    wanted = [night.base, night.judge, night.captioner, night.tiny_decoder]
    AutoencoderTiny(decoder_block_out_channels=(8, 8, 8, 8)).save_pretrained(tmp_path / "decoder")
    folders = [*(ROOT / "models" / name for name in ("base", "judge", "judge")), tmp_path / "decoder"]
    served = {model.model: Served(folder, model.revision or "") for model, folder in zip(wanted, folders, strict=True)}
    with hub_server(served, tmp_path / "hub") as server:
        yield server


def by_name(found: Sequence[Check]) -> dict[str, Check]:
    return {check.name: check for check in found}


def test_a_long_run_is_checked_from_the_hub_to_the_disk(
    night: Params, hub: Hub, project: Path, unmeasured: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving({"/V1/cat/1.jpg": b"\xff\xd8\xff"}) as service:
        monkeypatch.setenv("SCIENCEDB_API_URL", service.url)
        found = by_name(list(checks(project, night, hours=1000)))
        assert [str(check) for check in found.values() if check.mark != "ok"] == []
        assert found["base"].text.startswith("stable-diffusion-v1-5/stable-diffusion-v1-5 at 451f4fe: ")
        assert found["base"].text.endswith(" MiB to download")
        assert set(found) >= {"device", "judge", "tiny decoder", "captioner", "ScienceDB", "MLflow", "DVC", "memory"}
        hub.models[night.judge.model].gated = True
        hub.models.pop(night.captioner.model if night.captioner else "")
        service.listing_faults = ["always html"]
        monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
        found = by_name(list(checks(project, night, hours=0.001)))
    assert {name for name, check in found.items() if check.mark == "FAIL"} == {"judge", "ScienceDB", "MLflow", "time"}
    assert "Accept its licence" in found["judge"].text
    assert found["captioner"].mark == "note"  # only `bestiary captions` needs it


def test_a_few_step_adapter_on_the_hub_is_checked_at_its_revision(night: Params, hub: Hub, tmp_path: Path) -> None:
    def found(revision: str | None = COMMIT) -> Check:
        chosen = FewStepModel(model="someone/lcm-lora", revision=revision, file="lcm.safetensors", weight=1.0)
        distill = night.distill.model_copy(update={"from_": chosen})
        return preflight._few_step(tmp_path, night.model_copy(update={"distill": distill}), [])

    (tmp_path / "lcm").mkdir()
    (tmp_path / "lcm" / "lcm.safetensors").write_bytes(b"x" * 2**20)
    assert found().mark == "note"  # the hub has no such model
    hub.models["someone/lcm-lora"] = served = Served(tmp_path / "lcm")
    assert str(found()) == (
        f"ok    few-step     someone/lcm-lora at {COMMIT[:7]}: 1 MiB to download; `make fast` adds lcm.safetensors to "
        "the trained adapter with weight 1, and its memory, disk and time are not measured"
    )
    assert "It is not pinned" in found(None).text
    assert "revision" in found("f" * 40).text
    served.gated = True
    refused = found()
    assert refused.mark == "note"  # `dvc repro` runs without it
    assert "Accept its licence" in refused.text
    assert refused.text.endswith("Only `make fast` needs it.")
    assert "distils one here" in preflight._few_step(tmp_path, night, []).text


def test_the_command_ends_with_1_when_the_run_would_fail(unmeasured: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("BESTIARY_TRACKING", "off")
    done = CliRunner().invoke(cli.cli, ["preflight"])
    assert done.exit_code == 0, done.output
    assert "ok    base         models/base\n" in done.output
    assert CliRunner().invoke(cli.cli, ["preflight", "--hours", "0.001"]).exit_code == 1


def test_another_dvc_command_is_found(project: Path) -> None:
    held = project / ".dvc" / "tmp" / "rwlock"
    held.parent.mkdir(parents=True)
    held.write_text(json.dumps({"write": {"data": {"pid": os.getpid(), "cmd": "dvc repro"}}, "read": {}}))
    with pytest.raises(BestiaryError, match="`dvc repro` is running"):
        preflight._dvc(project)
    held.unlink()
    lock = held.with_name("lock")
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(BestiaryError, match=r"holds \.dvc/tmp/lock"):
            preflight._dvc(project)
    assert "no other" in preflight._dvc(project)


def test_processes_that_cannot_share_a_batch_or_the_gpus_are_found(
    night: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    def found(launch: str, gpus: int = 0, params: Params = night) -> str:
        monkeypatch.setenv("BESTIARY_LAUNCH", launch)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        return preflight._processes(params)

    for launch, gpus in (("torchrun --nproc-per-node 3", 0), ("accelerate launch --num_processes 3", 3)):
        with pytest.raises(BestiaryError, match="cannot be split evenly over 3 processes"):
            found(launch, gpus)
    assert found("torchrun --nproc-per-node 2").startswith("2, each training on 8 images at a time")
    assert found("torchrun --nproc-per-node 2", params=with_low_memory(night)).startswith("2, each training on 1 image")
    with pytest.raises(BestiaryError, match="starts 2 processes on this machine, which has 1 GPU that"):
        found("torchrun --nproc-per-node 2", gpus=1)
    launch = "accelerate launch --multi_gpu --num_machines 2 --num_processes 2"
    assert found(launch, gpus=1).endswith(f"({launch})")


@pytest.mark.parametrize(
    ("launch", "gpus", "starts"),  # as accelerate 1.15 does
    [
        ("accelerate launch --num_processes 2", 0, 1),
        ("accelerate launch --num_processes 2", 1, 1),
        ("accelerate launch --num_processes 2", 2, 2),
        ("accelerate launch --multi_gpu --num_processes 2", 0, 2),
        ("accelerate launch --num_machines 2 --num_processes 2", 1, 1),
        ("accelerate launch --cpu --num_processes 2", 2, 1),
        ("accelerate launch --cpu", 2, 1),
        ("accelerate launch --cpu --mpirun_hostfile hosts --num_processes 2", 0, 2),
        ("accelerate launch", 2, None),
        ("torchrun --nproc-per-node 2", 0, 2),
    ],
)
def test_accelerate_launch_starts_one_process_without_several_gpus(
    night: Params, monkeypatch: pytest.MonkeyPatch, launch: str, gpus: int, starts: int | None
) -> None:
    monkeypatch.setenv("BESTIARY_LAUNCH", launch)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert launched_processes() == starts
    assert preflight._processes(night).endswith("on CPUs, use torchrun") == (
        starts == 1 and launch != "accelerate launch --cpu"
    )


@pytest.mark.slow
@pytest.mark.parametrize("options", ["--cpu --num_processes 2", "--num_processes 2", "--multi_gpu --num_processes 2"])
def test_accelerate_launch_starts_as_many_processes_as_preflight_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: str
) -> None:
    monkeypatch.setenv("BESTIARY_LAUNCH", f"accelerate launch {options}")
    monkeypatch.setenv("HF_HOME", str(tmp_path))  # has no file of `accelerate config`
    (tmp_path / "program.py").write_text("print('started', flush=True)")
    command = [sys.executable, "-m", "accelerate.commands.launch", *options.split(), "--main_process_port", "0"]
    done = subprocess.run([*command, tmp_path / "program.py"], capture_output=True, text=True, check=True)
    assert done.stdout.split().count("started") == launched_processes()


@pytest.mark.parametrize(
    ("variable", "launch", "alone"),
    [
        ("", "", False),
        ("true", "", True),
        ("true", "torchrun --nproc-per-node 2", True),
        ("true", "accelerate launch --num_processes 1", False),  # which sets the variable to False
        ("", "accelerate launch --cpu", True),
    ],
)
def test_a_gpu_is_left_alone_where_training_leaves_it_alone(
    monkeypatch: pytest.MonkeyPatch, variable: str, launch: str, alone: bool
) -> None:
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    if variable:
        monkeypatch.setenv("ACCELERATE_USE_CPU", variable)
    monkeypatch.setenv("BESTIARY_LAUNCH", launch)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert ("CPU threads" in preflight._device()) == alone
    monkeypatch.setenv("ACCELERATE_USE_CPU", "perhaps")
    if not launch:
        with pytest.raises(BestiaryError, match="neither true nor false"):
            preflight._device()


def on_gpu(**changes: object) -> Rates:
    """Rates of a GPU with 8 GiB, 7 of them free, on which everything needs 2 GiB besides these changes."""
    small = dict.fromkeys(("encode", "row", "single_row", "decode", "step"), needing(2048.0))
    return measured(**{"device_free_mib": 7168.0, **small, **changes})


def needing(device_mib: float, more_for_each_picture: float = 0.0) -> Rate:
    """A rate that was measured at 512 x 512 pixels with one picture and two."""
    known = {number * 512**2: device_mib + (number - 1) * more_for_each_picture for number in (1, 2)}
    return rate(0.1).model_copy(update={"device_mib": known})


def test_the_memory_check_counts_the_gpus_memory_and_says_what_to_lower(night: Params) -> None:
    for train_mib, mark in ((6000.0, "ok"), (9000.0, "FAIL")):
        rates = on_gpu(step=needing(train_mib))
        check = memory(rates, lines(night, SAMPLE, rates))
        assert check.mark == mark
        assert ("train needs 8.8 GiB of 7.0 GiB. Set train.low_memory to true" in check.text) == (mark == "FAIL")
    rates = on_gpu(step=needing(4096.0), graph_mib=3072.0)  # validations compute beside the graph
    check = memory(rates, lines(night, SAMPLE, rates))
    assert "train 5.0 GiB" in check.text
    assert check.text.endswith("training measured with a real step, as a CUDA graph that keeps 3.0 GiB")
    rates = on_gpu(judge_mib=1024.0)  # beside the stages that use it; low_memory has it on the CPU
    assert "train 3.0 GiB, evaluate 3.0 GiB" in memory(rates, lines(night, SAMPLE, rates)).text
    assert "train 2.0 GiB, evaluate 3.0 GiB" in memory(rates, lines(with_low_memory(night), SAMPLE, rates)).text
    rates = measured(step=rate(900.0, scaled_by=1024.0))
    check = memory(rates, lines(night, SAMPLE, rates), free_mib=65536.0)
    assert check.mark == "note"
    assert check.text.startswith("at least ")


def with_low_memory(params: Params) -> Params:
    return params.model_copy(update={"train": params.train.model_copy(update={"low_memory": True})})


def test_batches_that_are_halved_make_no_run_fail(night: Params) -> None:
    def note(params: Params = night, images: int = 4, **changes: object) -> Check:
        rates = on_gpu(part=StepPart(images=images, preserved=0, times=16 / images), **changes)
        return memory(rates, lines(params, SAMPLE, rates))

    assert (note(encode=needing(2048.0, 1024.0)).mark, note(encode=needing(7000.0)).mark) == ("note", "FAIL")
    assert "encode needs 33.0 GiB of 7.0 GiB. It will halve its" in note(encode=needing(2048.0, 1024.0)).text
    # 8 guided pictures of the sheet, 16 of an evaluation, and 8 of a benchmark
    found = note(row=needing(2048.0, 350.0))
    assert found.mark == "note"
    assert "train needs 7.1 GiB of 7.0 GiB. It will halve the batches of the sheet." in found.text
    assert "evaluate needs 12.6 GiB of 7.0 GiB. It will halve its batches." in found.text
    assert "benchmark needs 7.1 GiB of 7.0 GiB. It will skip the settings that do not fit." in found.text
    assert "train 2.3 GiB" in note(with_low_memory(night), 1, row=needing(2048.0, 350.0)).text  # one picture
    preserving = night.train.preservation.model_copy(update={"kind": "noised"})
    kept = night.model_copy(update={"train": night.train.model_copy(update={"preservation": preserving})})
    assert note(kept, row=needing(2048.0, 350.0)).mark == "FAIL"  # 16 predictions at once, which are not halved


def test_disk_and_time_have_limits(tmp_path: Path, night: Params, monkeypatch: pytest.MonkeyPatch) -> None:
    assert disk(tmp_path / "not" / "there", 1e6, 1e6).mark == "ok"
    check = disk(tmp_path, 1e18, 0)
    assert check.mark == "FAIL"
    assert "Free space" in check.text
    (tmp_path / "file").touch()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "file" / "hub"))
    assert disk(tmp_path, 1e6, 0).mark == "ok"  # nothing to download
    check = disk(tmp_path, 1e6, 1e6)
    assert check.mark == "FAIL"
    assert f"{tmp_path}/file cannot be written" in check.text
    found = lines(night, SAMPLE, measured())
    assert time_needed(night, measured(), found, hours=1000).mark == "ok"
    assert "more than --hours 0.01" in time_needed(night, measured(), found, hours=0.01).text


def test_a_cache_in_a_folder_that_this_user_must_not_read_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tests may run as root, who may read everything, so the test refuses in the system's place."""
    locked = tmp_path / "locked"
    locked.mkdir()
    stat, access = Path.stat, os.access

    def refusing(path: Path, **options: bool) -> os.stat_result:
        if locked in path.parents:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return stat(path, **options)

    monkeypatch.setattr(Path, "stat", refusing)
    monkeypatch.setattr(os, "access", lambda path, mode: mode == os.F_OK and access(path, mode))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(locked / "hub"))
    check = disk(tmp_path, 0, 1e6)
    assert check.mark == "FAIL"
    assert f"{locked} cannot be written" in check.text


@pytest.mark.slow
def test_the_sample_is_ready_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BESTIARY_TRACKING", "off")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(preflight, "CPU_SECONDS", 1.0)
    found = list(checks(ROOT, load_params(ROOT / "params.yaml"), hours=24))
    assert [str(check) for check in found if check.mark == "FAIL"] == []
