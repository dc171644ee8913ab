"""A registered version as a folder that the Hugging Face hub takes as it is: adapter, pictures, and their model card.

The card's format: https://huggingface.co/docs/hub/model-cards.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from bestiary import registry
from bestiary.errors import BestiaryError
from bestiary.files import write_atomically
from bestiary.subjects import subject_of

if TYPE_CHECKING:
    from bestiary.registry import Version
    from bestiary.settings import Usual
    from bestiary.tracking.lineage import Step

SHEET = "sheet.png"
SCORES = {
    "clip_score": "CLIP score",
    "top1": "animal recognised, %",
    "top5": "in five guesses, %",
    "cmmd": "CMMD, lower is better",
}
# An adapter inherits the licence of the base that it changes.
LICENCES = {"stable-diffusion-v1-5/stable-diffusion-v1-5": "creativeml-openrail-m", "./models/base": "mit"}


def write(what: str, out: Path) -> list[Path]:
    """Write the version `what` into the folder `out`: README.md, the adapter, the sheet of pictures. Returns the files.

    Raises BestiaryError when there is no such version, or no evaluation of it in the registry.
    """
    version, steps = registry.walk(what)
    uri = f"models:/{version.name}/{version.version}"
    runs = {step.stage: step.run_id for step in reversed(steps)}
    with TemporaryDirectory() as folder:
        report = _evaluation(version, runs, Path(folder))
        sheet = registry.artifact(runs["evaluate"], f"evaluate/{SHEET}", Path(folder))
        adapter = registry.resolve(uri).file
        settings: dict[str, dict[str, str]] = {
            stage: registry.parameters(runs[stage]) for stage in ("train", "evaluate") if stage in runs
        }
        files = {
            out / adapter.name: adapter.read_bytes(),
            **({out / SHEET: sheet.read_bytes()} if sheet else {}),
            out / "README.md": render(version, steps, report, settings, has_sheet=sheet is not None).encode(),
        }
    for path, data in files.items():
        write_atomically(path, data)
    return list(files)


def render(
    version: Version,
    steps: Sequence[Step],
    report: Mapping[str, Any],
    settings: Mapping[str, Mapping[str, str]],
    *,
    has_sheet: bool = True,
) -> str:
    """The card of a version that rests on `steps`, by its evaluation's `report` and the settings of its stages."""
    uri, tags = f"models:/{version.name}/{version.version}", version.tags
    base = f"`{tags['base']}`" + (f" at revision `{tags['base_revision']}`" if tags["base_revision"] else "")
    animals = [subject_of(folder).name for folder in report["per_class"]]
    parts = [
        f"---\n{_metadata(version, report, animals, has_sheet)}\n---",
        f"# {version.name} {version.version}",
        f"A LoRA adapter (rank {tags['rank']}, alpha {float(tags['alpha']):g}) for {base}, which teaches it "
        f"{len(animals)} animals: {', '.join(animals)}.",
        f"![The base beside the adapter: same prompts, same seeds]({SHEET})" if has_sheet else "",
        "## Scores",
        f"{report['images']} pictures by the base and by the adapter from the same prompts and the same seeds, seen by "
        "a CLIP model that had no part in training. Intervals are 95 %.",
        _scores(report),
        _strengths(report),
        "Share of pictures whose nearest real picture is one that it was trained on, beyond chance: "
        f"{_told(report['memorisation']['adapter']['copied'])}, where 1 would be all.",
        f"The registry's gate: {tags['decision']}" if "decision" in tags else "",
        "## Use",
        _use(tags["base"], registry.usual_of(version)),
        "## How it was made",
        _provenance(steps),
        *(_settings(stage, values) for stage, values in settings.items() if values),
        f"Registered as `{uri}` with the SHA-256 `{tags['adapter_sha256']}`, on a base whose files have the SHA-256 "
        f"`{tags['base_sha256']}`. The hashes in the table are DVC's, of what each step read.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _evaluation(version: Version, runs: Mapping[str, str], folder: Path) -> dict[str, Any]:
    file = registry.artifact(runs["evaluate"], "evaluate.json", folder) if "evaluate" in runs else None
    report: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file else {}
    if report.get("adapter_sha256") != version.tags["adapter_sha256"]:
        raise BestiaryError(f"The registry holds no evaluation of {version.name} {version.version}.")
    return report


def _metadata(version: Version, report: Mapping[str, Any], animals: Sequence[str], has_sheet: bool) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    named = version.tags["base"]
    first = subject_of(next(iter(report["per_class"])))
    on_the_hub = not named.startswith((".", "/"))
    more: dict[str, Any] = {}
    if on_the_hub:
        more["base_model_relation"] = "adapter"
    if has_sheet:
        more["widget"] = [{"text": f"a photo of {first.with_article}", "output": {"url": SHEET}}]
    data = ModelCardData(
        model_name=f"{version.name} {version.version}",
        library_name="diffusers",
        pipeline_tag="text-to-image",
        license=LICENCES.get(named),
        base_model=named if on_the_hub else None,
        tags=["text-to-image", "diffusers", "stable-diffusion", "lora"],
        eval_results=[
            EvalResult(
                task_type="text-to-image",
                dataset_type="bestiary",
                dataset_name=f"{report['images']} pictures of {len(animals)} animals",
                metric_type=score,
                metric_name=label,
                metric_value=round(report["adapter"][score]["mean"], 3),
            )
            for score, label in SCORES.items()
            if score in report["adapter"]
        ],
        **more,
    )
    return str(data.to_yaml())


def _scores(report: Mapping[str, Any]) -> str:
    rows = ["| | base | with the adapter | difference | real pictures |", "|---|---|---|---|---|"]
    for score, label in SCORES.items():
        if score in report["delta"]:
            cells = [_told(report[who][score]) for who in ("base", "adapter")]
            real = f"{report['real'][score]['mean']:.2f}" if score in report.get("real", {}) else ""
            rows.append(f"| {label} | {' | '.join(cells)} | {_told(report['delta'][score], sign='+')} | {real} |")
    return "\n".join(rows)


def _strengths(report: Mapping[str, Any]) -> str:
    gains = {
        subject_of(folder).name: scores["delta"]["clip_score"]["mean"] for folder, scores in report["per_class"].items()
    }
    order = sorted(gains, key=lambda name: gains[name], reverse=True)
    if len(order) < 6:
        return ""
    most, least = (", ".join(f"{name} ({gains[name]:+.1f})" for name in names) for names in (order[:3], order[-3:]))
    return f"By CLIP score it gains most on {most}, and least on {least}."


def _use(base: str, usual: Usual | None) -> str:
    how = f", num_inference_steps={usual.steps}, guidance_scale={usual.guidance_scale:g}" if usual else ""
    return (
        "```python\n"
        "from diffusers import StableDiffusionPipeline\n\n"
        f'pipeline = StableDiffusionPipeline.from_pretrained("{base}")\n'
        'pipeline.load_lora_weights("THIS_FOLDER_OR_REPOSITORY")\n'
        f'pipeline("a photo of a tiger"{how}).images[0].save("tiger.png")\n'
        "```\n\n"
        "For A1111 and others that read kohya's format: `bestiary adapter convert THIS_FOLDER adapter.safetensors "
        "--to kohya`; ComfyUI reads either."
    )


def _provenance(steps: Sequence[Step]) -> str:
    rows = ["| step | when | Git | run | read |", "|---|---|---|---|---|"]
    for step in reversed(steps):
        read = ", ".join(f"{path} `{content[:10]}`" for path, content, _ in step.inputs if not path.endswith(".py"))
        git = f"`{step.git}`" if step.git else ""
        rows.append(f"| {step.stage} | {step.started} | {git} | `{step.run_id[:8]}` | {read} |")
    return "\n".join(rows)


def _settings(stage: str, values: Mapping[str, str]) -> str:
    told = ", ".join(f"{key.removeprefix(f'{stage}.')} {value}" for key, value in sorted(values.items()))
    return f"Settings of {stage}: {told}."


def _told(estimate: Mapping[str, Any], sign: str = "") -> str:
    low, high = estimate["ci95"]
    return f"{estimate['mean']:{sign}.2f} ({low:{sign}.2f} to {high:{sign}.2f})"
