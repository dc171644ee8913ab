"""A registered version as a folder for the Hugging Face hub: the adapter, its pictures and its model card.

The card's format: https://huggingface.co/docs/hub/model-cards.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from bestiary.errors import BestiaryError
from bestiary.evaluation.acceptance import AcceptanceReport, read_acceptance
from bestiary.evaluation.acceptance import as_markdown as as_fast_markdown
from bestiary.evaluation.report import EvaluationReport, as_markdown, describe_proof, read_evaluation
from bestiary.files import write_atomically
from bestiary.registry.fast_variant import FAST
from bestiary.registry.resolving import resolve
from bestiary.registry.tags import number, read_tags
from bestiary.registry.versions import REGISTER, Version, artifact, parameters, walk
from bestiary.samplers import DrawingDefaults
from bestiary.subjects import Subject, caption, find_subject

if TYPE_CHECKING:
    from bestiary.tracking.lineage import Step

SHEET = "sheet.png"
# An adapter inherits the licence of the base that it changes.
LICENCES = {"stable-diffusion-v1-5/stable-diffusion-v1-5": "creativeml-openrail-m", "./models/base": "mit"}


def write(what: str, out: Path) -> list[Path]:
    """Write the version `what` into the folder `out`: README.md, the adapter, the sheet of pictures. Returns the files.

    Raises BestiaryError when there is no such version, or when the registry holds no evaluation of it.
    """
    version, steps = walk(what)
    runs = {step.stage: step.run_id for step in reversed(steps)}
    with TemporaryDirectory() as folder:
        report, sheet = _evaluation(version, runs, Path(folder))
        acceptance = _acceptance(version, Path(folder))
        adapter = resolve(version.uri).file
        settings: dict[str, dict[str, str]] = {
            stage: parameters(runs[stage]) for stage in ("clean", "train", "evaluate") if stage in runs
        }
        files = {
            out / adapter.name: adapter.read_bytes(),
            **({out / SHEET: sheet.read_bytes()} if sheet else {}),
        }
        card = render(version, steps, report, settings, has_sheet=sheet is not None, acceptance=acceptance)
        files[out / "README.md"] = card.encode()
    for path, data in files.items():
        write_atomically(path, data)
    return list(files)


def render(
    version: Version,
    steps: Sequence[Step],
    report: EvaluationReport,
    settings: Mapping[str, Mapping[str, str]],
    *,
    has_sheet: bool = True,
    acceptance: AcceptanceReport | None = None,
) -> str:
    """The model card of a version: its evaluation's scores, the runs (`steps`) it is based on, and their settings.

    `settings` holds, by stage, the parameters that the stage's run logged. `acceptance` is about the fast variant.
    """
    tags = read_tags(version)
    base = f"`{tags.base}`" + (f" at revision `{tags.base_revision}`" if tags.base_revision else "")
    subjects = {folder: find_subject(folder, tags.subjects)[0] for folder in report.per_class}
    parts = [
        f"---\n{_metadata(version, report, subjects, has_sheet)}\n---",
        f"# {version.name} {version.version}",
        f"A LoRA adapter (rank {number(version, 'rank'):g}, alpha {number(version, 'alpha'):g}) for {base}. It teaches "
        f"the base {len(subjects)} subject{'s' * (len(subjects) > 1)}: "
        f"{', '.join(subject.name for subject in subjects.values())}.",
        f"![The base beside the adapter: same prompts, same seeds]({SHEET})" if has_sheet else "",
        "## Scores",
        f"The base and the adapter each drew {report.images} pictures from the same prompts and seeds. A CLIP model "
        f"scored them. {_judges_part(settings)}",
        "\n".join(as_markdown(report)),
        _strengths(report, subjects),
        "\n".join(f"- {line}" for proof in report.proofs.values() for line in describe_proof(proof)),
        ""
        if report.only_subject  # whose proof says it, by another measure
        else "Share of pictures that look copied from training images (0: no more than by chance, 1: all of them): "
        f"{report.memorisation.adapter.copied.describe()}.",
        f"The registry's gate decided: {version.tags['decision']}" if "decision" in version.tags else "",
        *(_fast_variant(version, acceptance) if acceptance else []),
        "## Use",
        _use(tags.base, tags.defaults, _example(subjects)),
        "## How it was made",
        _provenance(steps),
        *(_settings(stage, values) for stage, values in settings.items() if values),
        f"Registered as `{version.uri}` with the SHA-256 `{tags.adapter_sha256}`, on a base whose files have the "
        f"SHA-256 `{tags.base_sha256}`. The hashes in the table are DVC's content hashes of what each step read.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _evaluation(version: Version, runs: Mapping[str, str], folder: Path) -> tuple[EvaluationReport, Path | None]:
    """The version's evaluation and the sheet of pictures, from the run that evaluated it or that registered it."""
    from bestiary.registry.registering import GATE

    sha256 = read_tags(version).adapter_sha256
    places = [(runs["evaluate"], "evaluate.json", f"evaluate/{SHEET}")] if "evaluate" in runs else []
    places.append((version.run_id, f"{GATE}/evaluate.json", f"{GATE}/{SHEET}"))
    for run_id, report_path, sheet_path in places:
        file = artifact(run_id, report_path, folder)
        report = read_evaluation(file) if file else None
        if report and report.adapter_sha256 == sha256:
            return report, artifact(run_id, sheet_path, folder)
    raise BestiaryError(
        f"The registry holds no evaluation of {version.uri}. If it is the adapter in models/adapter, `{REGISTER}` "
        "stores its evaluation."
    )


def _acceptance(version: Version, folder: Path) -> AcceptanceReport | None:
    """The report about the version's fast variant; None if it has none."""
    if FAST not in version.tags:
        return None
    from bestiary.registry.registering import GATE

    file = artifact(version.run_id, f"{GATE}/accept.json", folder)
    return read_acceptance(file) if file else None


def _fast_variant(version: Version, acceptance: AcceptanceReport) -> list[str]:
    use = (
        f"`bestiary pull {version.uri} --fast --out DIR` copies it: the few-step adapter for torch and the export for "
        "OpenVINO."
    )
    return ["## Fast variant", "\n".join(as_fast_markdown(acceptance)), use if acceptance.accepted else ""]


def _metadata(version: Version, report: EvaluationReport, subjects: Mapping[str, Subject], has_sheet: bool) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    base = read_tags(version).base
    is_on_the_hub = not base.startswith((".", "/"))
    first = next(iter(subjects.values()))
    data = ModelCardData(
        model_name=f"{version.name} {version.version}",
        library_name="diffusers",
        pipeline_tag="text-to-image",
        license=LICENCES.get(base),
        base_model=base if is_on_the_hub else None,
        base_model_relation="adapter" if is_on_the_hub else None,
        widget=[{"text": f"a photo of {first.with_article}", "output": {"url": SHEET}}] if has_sheet else None,
        tags=["text-to-image", "diffusers", "stable-diffusion", "lora"],
        eval_results=[
            EvalResult(
                task_type="text-to-image",
                dataset_type="bestiary",
                dataset_name=f"{report.images} pictures of {len(report.per_class)} subjects",
                metric_type=score.key,
                metric_name=score.title,
                metric_value=round(report.adapter[score.key].mean, 3),
            )
            for score in report.table
        ],
    )
    return str(data.to_yaml())


def _judges_part(settings: Mapping[str, Mapping[str, str]]) -> str:
    """Where the judge was used before scoring: in cleaning, and in choosing the checkpoint."""
    parts = []
    if settings.get("clean", {}).get("clean.off_topic", "off") != "off":
        parts.append("looked for off-topic images in cleaning")
    if settings.get("train", {}).get("train.criterion") == "clip_score":
        parts.append("chose the checkpoint")
    if settings.get("evaluate", {}).get("evaluate.sweep", "None") not in ("None", ""):
        parts.append("chose the adapter weight and the guidance scale, on other seeds")
    return f"It also {' and '.join(parts)}." if parts else "It had no part in cleaning or training."


def _strengths(report: EvaluationReport, subjects: Mapping[str, Subject]) -> str:
    gains = {subjects[folder].name: scores.delta["clip_score"].mean for folder, scores in report.per_class.items()}
    order = sorted(gains, key=lambda name: gains[name], reverse=True)
    if len(order) < 6:
        return ""
    most, least = (", ".join(f"{name} ({gains[name]:+.1f})" for name in names) for names in (order[:3], order[-3:]))
    return f"By CLIP score the adapter gains most on {most}, and least on {least}."


def _example(subjects: Mapping[str, Subject]) -> Subject:
    """The subject that the examples draw."""
    return subjects.get("tiger") or next(iter(subjects.values()))


def _use(base: str, defaults: DrawingDefaults | None, subject: Subject) -> str:
    sampling = defaults.sampling if defaults else None
    how = f", num_inference_steps={sampling.steps}, guidance_scale={sampling.guidance_scale:g}" if sampling else ""
    prompt = caption(subject, defaults.template if defaults else "a photo of {}")
    return (
        "```python\n"
        "import torch\n"
        "from diffusers import StableDiffusionPipeline\n\n"
        f'pipeline = StableDiffusionPipeline.from_pretrained("{base}")\n'
        'pipeline.load_lora_weights("THIS_FOLDER_OR_REPOSITORY")\n'
        "seed = torch.Generator().manual_seed(7)\n"
        f'pipeline({json.dumps(prompt, ensure_ascii=False)}{how}, generator=seed).images[0].save("picture.png")\n'
        "```\n\n" + _other_programs(base, prompt)
    )


def _other_programs(base: str, prompt: str) -> str:
    if base.startswith((".", "/")):
        return "A1111 and ComfyUI cannot load this base, and the adapter fits no other."
    return (
        "For A1111 and ComfyUI, convert the adapter to kohya's format: `bestiary adapter convert THIS_FOLDER "
        f"my-adapter.safetensors --to kohya`. Both need `{base}` as their checkpoint.\n\n"
        f"- A1111: put the file into `models/Lora`, and write the prompt `{prompt} <lora:my-adapter:1>`.\n"
        "- ComfyUI: put the file into `models/loras`, add the node Load LoRA after Load Checkpoint with strength 1, "
        f"and write the prompt `{prompt}`."
    )


def _provenance(steps: Sequence[Step]) -> str:
    rows = ["| step | when | Git | run | read |", "|---|---|---|---|---|"]
    for step in reversed(steps):
        read = ", ".join(f"{path} `{content[:10]}`" for path, content, _ in step.inputs if not path.endswith(".py"))
        git = f"`{step.git}`" if step.git else ""
        rows.append(f"| {step.stage} | {step.started} | {git} | `{step.run_id[:8]}` | {read} |")
    return "\n".join(rows)


def _settings(stage: str, values: Mapping[str, str]) -> str:
    described = ", ".join(f"{key.removeprefix(f'{stage}.')} {value}" for key, value in sorted(values.items()))
    return f"Settings of {stage}: {described}."
