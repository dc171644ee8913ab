"""Find problems before a long run: device, models, services, memory, disk and time."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from bestiary.errors import BestiaryError
from bestiary.estimating import Images, Line, duration, estimate, project_images, shown_size, total_line
from bestiary.evaluation.rates import (
    Rates,
    asked_processes,
    launched_processes,
    launches_one,
    leaves_gpu_alone,
    processes_here,
)
from bestiary.files import is_file, is_folder
from bestiary.hub import HubModel, bytes_to_download, is_hub_id
from bestiary.memory import MIB
from bestiary.params import Model, Params, ScienceDB

CPU_SECONDS, GPU_SECONDS = 6.0, 60.0  # time limits for measuring; a GPU must reach the real size
MEMORY_SHARE = 0.95  # of the free memory; the libraries need the rest for themselves
FAR = 8.0  # a measured step this many times smaller than the real one says little about memory
SCIENCEDB_TIMEOUT_SECONDS = 15.0
SHRINK = {
    "encode": "Lower encode.batch_size.",
    "train": (
        "Set train.low_memory to true (docs/real-run.md). If it is true already, lower encode.resolution, or "
        "train.preservation.samples if it preserves any."
    ),
    "evaluate": "Lower evaluate.batch_size.",
    "benchmark": "Lower benchmark.batch_sizes.",
    "register": "Close other programs.",
}
# What a stage does when a GPU's memory is full, but fits its smallest batch.
HALVED = {
    "encode": "It will halve its batches.",
    "train": "It will halve the batches of the sheet.",
    "evaluate": "It will halve its batches.",
    "benchmark": "It will skip the settings that do not fit.",
}


@dataclass(frozen=True)
class Check:
    """The result of one check. FAIL: the run would fail. note: the run would not fail, but the user should know."""

    name: str
    text: str
    mark: Literal["ok", "note", "FAIL"] = "ok"

    def __str__(self) -> str:
        return f"{self.mark:6}{self.name:12} {self.text}"


def checks(root: Path, params: Params, hours: float) -> Iterator[Check]:
    """Check a run of the project at `root`. Yields each result as soon as it is known, the slow checks last."""
    yield _checked("device", _device)
    yield _checked("processes", lambda: _processes(params))
    found: list[Images] = []
    yield _checked("images", lambda: _images(root, params, found))
    sizes: list[int] = []
    for model in _models(params):
        yield _model(root, model, sizes)
    yield _few_step(root, params, sizes)
    if params.dataset.source == "sciencedb" and params.dataset.sciencedb:
        settings = params.dataset.sciencedb
        yield _checked("ScienceDB", lambda: _sciencedb(settings))
    yield _checked("MLflow", lambda: _tracking(root))
    yield _checked("DVC", lambda: _dvc(root))
    if found:
        yield from _measured(root, params, found[0], sum(sizes), hours)


def _checked(name: str, work: Callable[[], str]) -> Check:
    try:
        return Check(name, work())
    except BestiaryError as error:
        return Check(name, str(error), "FAIL")


# ---- this machine ----


def _device() -> str:
    """The device of a run. Only counts GPUs, because using one would take memory, which is measured later."""
    import torch

    if leaves_gpu_alone():
        return f"{torch.get_num_threads()} CPU threads, because of --cpu in BESTIARY_LAUNCH or ACCELERATE_USE_CPU"
    if torch.cuda.is_available():
        count = torch.cuda.device_count()
        return f"{count} GPU{'s' * (count != 1)} that torch {torch.__version__} can use"
    if torch.backends.mps.is_available():
        return "an Apple GPU"
    if os.environ.get("CUDA_VISIBLE_DEVICES") is None and _nvidia_gpus():
        reason = "torch was installed without CUDA" if torch.version.cuda is None else "its driver is too old for torch"
        raise BestiaryError(
            f"torch cannot use this machine's NVIDIA GPU: perhaps {reason}. Install a torch build that fits the driver."
        )
    return f"{torch.get_num_threads()} CPU threads, no GPU"


def _nvidia_gpus() -> bool:
    with contextlib.suppress(OSError):
        return any(Path("/proc/driver/nvidia/gpus").iterdir())
    return False


def _processes(params: Params) -> str:
    from bestiary.diffusion.low_memory import images_at_a_time

    launch = os.environ.get("BESTIARY_LAUNCH", "")
    count = launched_processes()
    if count is None:
        return f"set by the launcher ({launch})"
    images = images_at_a_time(params.train, count)
    _check_gpus()
    each = f"{images} image{'s' * (images != 1)} at a time"
    text = f"{count}, each training on {each} ({launch or 'BESTIARY_LAUNCH is empty'})"
    if launches_one() and (asked_processes() or 1) > 1:
        text += ". Here `accelerate launch` starts one process, whatever its options say; on CPUs, use torchrun"
    return text


def _check_gpus() -> None:
    """Raise BestiaryError when this machine has fewer GPUs than its share of the launched processes."""
    import torch

    here, gpus = processes_here(), torch.cuda.device_count()
    if 0 < gpus < here and not leaves_gpu_alone():
        raise BestiaryError(
            f"BESTIARY_LAUNCH starts {here} processes on this machine, which has {gpus} GPU{'s' * (gpus != 1)} that "
            "torch can use. Start one process for each GPU."
        )


def _images(root: Path, params: Params, found: list[Images]) -> str:
    """Describe the images and append them to `found`."""
    images = project_images(root, params)
    found.append(images)
    about = "about " if params.dataset.source == "sciencedb" else ""
    return f"{about}{images.count} of {images.classes} subject{'s' * (images.classes != 1)} ({params.dataset.source})"


# ---- models ----


@dataclass(frozen=True)
class _Wanted:
    """A model of params.yaml. Every run needs it, unless `only_for` names the only command that does."""

    on_hub: HubModel
    only_for: str = ""


def _models(params: Params) -> list[_Wanted]:
    from bestiary import captioning
    from bestiary.diffusion import base, decoders
    from bestiary.evaluation import image_judge, judge

    def at(model: Model) -> tuple[str, str | None]:
        return model.model, model.revision

    evaluate = params.evaluate
    wanted = [_Wanted(base.on_hub(*at(params.base))), _Wanted(judge.on_hub(*at(params.judge)))]
    if evaluate.second_judge:
        wanted.append(_Wanted(judge.on_hub(*at(evaluate.second_judge))))
    if evaluate.proof and evaluate.proof.image_judge:
        wanted.append(_Wanted(image_judge.on_hub(*at(evaluate.proof.image_judge))))
    if params.tiny_decoder:
        wanted.append(_Wanted(decoders.on_hub(*at(params.tiny_decoder))))
    if params.captioner:
        wanted.append(_Wanted(captioning.on_hub(*at(params.captioner)), "bestiary captions --write"))
    return wanted


def _model(root: Path, wanted: _Wanted, sizes: list[int]) -> Check:
    """Whether a model can be loaded. Appends the bytes to download to `sizes`."""
    on_hub = wanted.on_hub
    name = on_hub.what.replace("captioning model", "captioner").removesuffix(" adapter")  # fits the column
    if is_folder(root / on_hub.model) or is_file(root / on_hub.model):
        return Check(name, on_hub.model)
    fails: Literal["note", "FAIL"] = "note" if wanted.only_for else "FAIL"
    reason = f" Only `{wanted.only_for}` needs it." if wanted.only_for else ""
    if not is_hub_id(on_hub.model):
        return Check(name, f"There is no folder {on_hub.model}. Check {on_hub.key} in params.yaml.{reason}", fails)
    try:
        size = bytes_to_download(on_hub)
    except BestiaryError as error:
        return Check(name, f"{error}{reason}", fails)
    sizes.append(size)
    place = f"{shown_size(size / MIB)} to download" if size else "on this machine"
    if on_hub.revision is None:
        return Check(
            name, f"{on_hub.model}: {place}. It is not pinned, so it may change. Set its revision to a commit.", "note"
        )
    return Check(name, f"{on_hub.model} at {on_hub.revision[:7]}: {place}")


def _few_step(root: Path, params: Params, sizes: list[int]) -> Check:
    """What `make fast` will use as the few-step adapter. The run's other checks do not measure `make fast`."""
    from bestiary.diffusion import few_step_adapter

    chosen = params.distill.from_
    if chosen is None:
        return Check("few-step", "`make fast` distils one here; its memory, disk and time are not measured")
    check = _model(root, _Wanted(few_step_adapter.on_hub(chosen), "make fast"), sizes)
    if check.mark != "ok":
        return check
    used = f"`make fast` adds {chosen.file or 'it'} to the trained adapter with weight {chosen.weight:g}"
    return replace(check, text=f"{check.text}; {used}, and its memory, disk and time are not measured")


# ---- services ----


def _sciencedb(settings: ScienceDB) -> str:
    from bestiary.data.sciencedb_client import Client

    timeout = min(settings.timeout_s, SCIENCEDB_TIMEOUT_SECONDS)
    with Client(settings.model_copy(update={"retries": 1, "timeout_s": timeout})) as client:
        client.check()
        return f"{client.api} lists dataset {settings.dataset_id}, version {settings.version}"


def _tracking(root: Path) -> str:
    from bestiary.tracking.addresses import shown_address, sqlite_path
    from bestiary.tracking.store import check_database, explain, open_client, registry_uri, switched_off, tracking_uri

    if switched_off():
        return "runs are not recorded (BESTIARY_TRACKING=off)"
    uris = list(dict.fromkeys([tracking_uri(), registry_uri()]))
    for uri in uris:
        check_database(uri)
        if sqlite_path(uri) is None:
            try:
                open_client(uri, root).search_experiments(max_results=1)
            except Exception as error:  # MLflow and its HTTP library raise different types
                raise BestiaryError(explain(error, uri)) from None
    return ", ".join(map(shown_address, uris))


def _dvc(root: Path) -> str:
    """Raise BestiaryError when another `dvc` command or a stage is running in this project."""
    import psutil

    busy = "Wait until it finishes, or stop it."
    with contextlib.suppress(OSError, ValueError, AttributeError):
        held = json.loads((root / ".dvc" / "tmp" / "rwlock").read_text(encoding="utf-8"))
        readers = [reader for readers in held.get("read", {}).values() for reader in readers]
        for holder in [*held.get("write", {}).values(), *readers]:
            if psutil.pid_exists(int(holder["pid"])):
                raise BestiaryError(f"`{holder['cmd']}` is running in this project (process {holder['pid']}). {busy}")
    locks = [root / ".dvc" / "tmp" / "lock", *sorted((root / ".cache" / "locks").glob("stage-*"))]
    for path in locks:
        if _is_locked(path):
            raise BestiaryError(
                f"Another program is running in this project: it holds {path.relative_to(root)}. {busy}"
            )
    return "no other command is running in this project"


def _is_locked(path: Path) -> bool:
    try:
        with path.open("r+") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # it does not exist or is not writable
        return False
    return False


# ---- resources, measured with a real step ----


def _measured(root: Path, params: Params, images: Images, download_bytes: int, hours: float) -> Iterator[Check]:
    import torch

    try:
        seconds = GPU_SECONDS if torch.cuda.is_available() and not leaves_gpu_alone() else CPU_SECONDS
        rates, lines = estimate(params, images, seconds)
    except BestiaryError as error:
        yield Check("memory", str(error), "FAIL")
        return
    yield memory(rates, lines)
    yield disk(root, sum(line.disk_bytes for line in lines), download_bytes)
    yield time_needed(params, rates, lines, hours)


def memory(rates: Rates, lines: Sequence[Line], free_mib: float | None = None) -> Check:
    """Whether each stage fits into the free memory. `free_mib` is this machine's free memory; None: measure it."""
    import psutil

    free_mib = psutil.virtual_memory().available / MIB if free_mib is None else free_mib
    shown, problems, fails = [], [], False
    for line in lines:
        on_gpu = line.device_mib is not None and rates.device_free_mib is not None
        need, free = (line.device_mib, rates.device_free_mib) if on_gpu else (line.memory_mib, free_mib)
        if need is None or free is None:
            continue
        if on_gpu == (rates.device_free_mib is not None):
            shown.append(f"{line.stage} {shown_size(need)}")
        if need > free * MEMORY_SHARE:
            least = line.least_device_mib if on_gpu and line.least_device_mib is not None else need
            fits = least <= free * MEMORY_SHARE
            fails = fails or not fits
            smaller = on_gpu and line.stage != "train"  # than one image
            advice = HALVED[line.stage] if fits else "Lower encode.resolution." if smaller else SHRINK[line.stage]
            problems.append(f"{line.stage} needs {shown_size(need)} of {shown_size(free)}. {advice}")
    kind = "GPU memory" if rates.device_free_mib is not None else "memory"
    free = rates.device_free_mib if rates.device_free_mib is not None else free_mib
    how = (
        "measured with a real step"
        if rates.step.scaled_by == 1
        else f"extrapolated from a step of {rates.step.measured_at}"
    )
    graph = f", as a CUDA graph that keeps {shown_size(rates.graph_mib)}" if rates.graph_mib else ""
    text = f"{', '.join(shown)} of {shown_size(free)} free {kind}; training {how}{graph}"
    if problems:
        return Check("memory", f"{' '.join(problems)} ({text})", "FAIL" if fails else "note")
    if rates.step.scaled_by > FAR:
        return Check("memory", f"at least {text}, so it will need more", "note")
    return Check("memory", text)


def disk(root: Path, need: float, download_bytes: float) -> Check:
    """Whether the project's files and the models to download fit onto their disks."""
    from huggingface_hub import constants

    needs: dict[int, tuple[Path, float]] = {}
    locked = []
    for folder, size in ((root, need), (Path(constants.HF_HUB_CACHE), download_bytes)):
        # os.access also answers where Path.exists raises: in a folder that this user must not read.
        place = next(path for path in (folder, *folder.absolute().parents) if os.access(path, os.F_OK))
        if size and not (place.is_dir() and os.access(place, os.W_OK)):
            locked.append(str(place))
        device = place.stat().st_dev
        first, before = needs.get(device, (place, 0.0))
        needs[device] = (first, before + size)
    texts, fails = [], False
    for place, size in needs.values():
        free = shutil.disk_usage(place).free
        texts.append(f"{shown_size(size / MIB)} of {shown_size(free / MIB)} free in {place}")
        fails = fails or size > free
    text = f"the run needs {', '.join(texts)}"
    if locked:
        made = "Make it writable (HF_HOME sets the folder for models)."
        return Check("disk", f"{text}, and {', '.join(locked)} cannot be written. {made}", "FAIL")
    if fails:
        return Check("disk", f"{text}. Free space, or use a larger disk (HF_HOME sets the folder for models).", "FAIL")
    return Check("disk", text)


def time_needed(params: Params, rates: Rates, lines: Sequence[Line], hours: float) -> Check:
    """Whether the run finishes within `hours`."""
    seconds = total_line(lines).seconds
    longest = max(lines, key=lambda line: line.seconds)
    text = f"about {duration(seconds)} on {rates.device}, {duration(longest.seconds)} of it {longest.stage}"
    if params.dataset.source == "sciencedb":
        text += ", besides the download of the images"
    if seconds > hours * 3600:
        return Check(
            "time", f"{text}. This is more than --hours {hours:g}. Use a faster device, or fewer steps.", "FAIL"
        )
    return Check("time", text)
