"""Adapters, reports and registrations for tests of the model registry."""

import csv
import os
from pathlib import Path

from bestiary.evaluation.report import (
    ClassScores,
    Copying,
    Estimate,
    EvaluationReport,
    Fidelity,
    InContext,
    Leakage,
    Memorisation,
    MemorisationRows,
    OperatingPointReport,
    ScaleZero,
    SubjectProof,
    TemplateScores,
)
from bestiary.params import Register
from bestiary.registry.registering import Registration, Submission, register
from bestiary.samplers import DrawingDefaults, Sampling
from bestiary.tracking.store import open_client, tracking_uri

RULES = Register(
    name="bestiary",
    champion_score="margin",
    max_copied=0.1,
    max_prompt_loss=2.0,
    max_leakage=30.0,
)
DEFAULTS = DrawingDefaults(
    "a drawing of {}", Sampling("ddim", steps=5, guidance_scale=3.0, guidance_interval=None, width=64, height=64)
)
SCORES = ("clip_score", "margin", "top1")


def evaluation(
    sha256: str = "",
    gain: float = 5.0,
    half_width: float = 1.0,
    copied: float = 0.0,
    gains_by_class: dict[str, float] | None = None,
) -> EvaluationReport:
    """The evaluation report of an adapter whose scores beat the base's by `gain`."""

    def estimate(mean: float, half_width: float = half_width) -> Estimate:
        return Estimate(mean=mean, ci95=(mean - half_width, mean + half_width))

    def memorisation(copied: float) -> Memorisation:
        cosine = estimate(0.5, 0.1)
        return Memorisation(
            nearest_train=cosine, nearest_validation=cosine, gap=estimate(0, 0.1), copied=estimate(copied, 0.1)
        )

    return EvaluationReport(
        images=4,
        base=dict.fromkeys(SCORES, estimate(20.0)),
        adapter=dict.fromkeys(SCORES, estimate(20.0 + gain)),
        delta=dict.fromkeys(SCORES, estimate(gain)),
        real=dict.fromkeys(SCORES, estimate(30.0)),
        floor=dict.fromkeys(SCORES, estimate(10.0)),
        per_template={},
        per_class={
            name: ClassScores(
                base=dict.fromkeys(SCORES, 20.0),
                adapter=dict.fromkeys(SCORES, 20.0 + gain),
                delta=dict.fromkeys(SCORES, estimate(gain)),
            )
            for name, gain in (gains_by_class or {"owl": gain, "tiger": gain}).items()
        },
        worst_classes=("owl",),
        memorisation=MemorisationRows(base=memorisation(0.0), adapter=memorisation(copied)),
        classes=("owl", "tiger"),
        scale_zero=ScaleZero(pictures=1, different=0),
        operating_point=OperatingPointReport(checkpoint="models/adapter", scale=1.0, guidance_scale=3.0),
        seconds={"draw": 1.0},
        adapter_sha256=sha256,
    )


def one_subject(**changes: tuple[float, float] | None) -> EvaluationReport:
    """The report of an adapter of one subject that passes the gate, but for `changes`: intervals by what they measure.

    None stands for what could not be measured.
    The keys are way, above_half, gain, in_context, prompt, leakage and copying.
    """

    def estimate(key: str, low: float, high: float) -> Estimate:
        interval = changes.get(key) or (low, high)
        return Estimate(mean=sum(interval) / 2, ci95=interval)

    some = estimate("", 0.0, 1.0)
    leakage = Leakage(pictures=16, moved=estimate("leakage", 5.0, 12.0), nearer=some)
    share = None if changes.get("copying", ()) is None else estimate("copying", -0.2, 0.4)
    proof = SubjectProof(
        name="sks penguin",
        class_word="penguin",
        training_photos=12,
        held_out_photos=4,
        others_from="photos",
        photos_sha256="0" * 64,
        fidelity=Fidelity(
            base=some,
            adapter=some,
            gain=estimate("gain", 5.0, 9.0),
            others=some,
            ceiling=some,
            way=None if changes.get("way", ()) is None else estimate("way", 0.7, 0.9),
            above_half=estimate("above_half", 2.0, 6.0),
        ),
        in_context=InContext(
            pictures=16,
            prompt_following=TemplateScores(base=some, adapter=some),
            prompt_difference=estimate("prompt", -1.0, 3.0),
            fidelity=some,
            plain_fidelity=some,
            fidelity_gain=estimate("in_context", 10.0, 20.0),
        ),
        class_leakage=leakage,
        unrelated_leakage=leakage,
        copying=Copying(gap=some, copies=some, fresh=some, share=share),
    )
    several = evaluation()
    rows = {name: {"clip_score": getattr(several, name)["clip_score"]} for name in ("base", "adapter", "delta", "real")}
    update = {**rows, "floor": {}, "classes": ("pip",), "proofs": {"pip": proof}}
    return several.model_copy(update=update).with_rows(proof)


def write_pictures(path: Path, gain: float, seeds: int = 8) -> Path:
    """The table of judged pictures that goes with a report: the margin of each picture."""
    with path.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["class", "prompt", "seed", "adapter_margin", "adapter_predicted"])
        table.writerows(["cat", "a photo of a cat", seed, 20 + gain + seed / 10, "cat"] for seed in range(seeds))
    return path


def make_adapter(base: Path, folder: Path, seed: int, strength: float = 0.1, named_base: str | None = None) -> Path:
    """Save a rank-2 adapter with random weights; its metadata names `named_base`, or else `base`."""
    import torch

    from bestiary.diffusion.adapter import inject, save_adapter
    from bestiary.diffusion.adapter_format import Provenance
    from bestiary.diffusion.base import base_sha256, load_unet

    unet = load_unet(base)
    parameters = inject(unet, rank=2, alpha=4, dropout=0.0, targets=["to_q", "to_v"], seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        parameter.data = strength * torch.randn(parameter.shape, generator=generator)
    save_adapter(unet, folder, Provenance(base=named_base or str(base), base_sha256=base_sha256(base)))
    return folder


def make_submission(project: Path, base: Path | str, adapter: Path, gain: float = 5.0) -> Submission:
    """The adapter with a report in which it beats the base by `gain`, and with a run of its own."""
    from bestiary.diffusion.adapter import adapter_sha256

    client = open_client(tracking_uri(), project)
    folder = project / f"of-process-{os.getpid()}"
    folder.mkdir(exist_ok=True)
    return Submission(
        adapter=adapter,
        base=str(base),
        base_revision=None,
        evaluation=evaluation(adapter_sha256(adapter), gain),
        reported={},
        pictures=write_pictures(folder / "pictures.csv", gain),
        defaults=DEFAULTS,
        measured="alike",
        run_id=client.create_run("0").info.run_id,
    )


def submit(project: Path, base: Path | str, adapter: Path, gain: float = 5.0, name: str = "bestiary") -> Registration:
    """Register the adapter with a report in which it beats the base by `gain`."""
    rules = RULES.model_copy(update={"name": name})
    return register(make_submission(project, base, adapter, gain), rules)
