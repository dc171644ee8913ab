"""Export the few-step adapter, fused into its base, for OpenVINO: the folder models/fast."""

import time
from dataclasses import replace
from pathlib import Path

from bestiary.stage import stage

SPLIT, FEW_STEP, FAST = Path("build/split"), Path("models/few_step"), Path("models/fast")


def main() -> None:
    with stage("export") as (params, run):
        # A mistake in params.yaml is reported before these imports, which take seconds.
        from bestiary.diffusion import export
        from bestiary.diffusion.adapter import check_trained_on
        from bestiary.diffusion.adapter_reading import read_adapter
        from bestiary.diffusion.export_format import MANIFEST, file_sha256
        from bestiary.diffusion.stored_adapter import adapter_file
        from bestiary.errors import BestiaryError
        from bestiary.samplers import DrawingDefaults
        from bestiary.subjects import Subjects, caption
        from bestiary.tables import read_table

        settings, base, tiny = params.export, params.base, params.tiny_decoder
        if settings.decoder == "tiny" and tiny is None:
            raise BestiaryError("export.decoder is tiny, but tiny_decoder is empty. Set it in params.yaml.")
        check_trained_on(FEW_STEP, base.model, base.revision)
        few_step = read_adapter(adapter_file(FEW_STEP)).few_step
        if few_step is None:
            raise BestiaryError(f"The adapter in {FEW_STEP} is not a few-step adapter. Run `dvc repro fast/dvc.yaml`.")
        template = params.evaluate.template
        subjects = Subjects.read_from(SPLIT)
        classes = sorted(read_table(SPLIT / "val.csv")["class"].unique())
        count = settings.calibration_pictures
        prompts = [caption(subjects.of(classes[number % len(classes)]), template) for number in range(count)]
        started = time.monotonic()
        done = export.export(
            export.Fused(
                base=base.model,
                base_revision=base.revision,
                base_name=base.model if not Path(base.model).is_dir() else f"./{base.model}",
                adapter=adapter_file(FEW_STEP),
                adapter_name=str(FEW_STEP),
                weight=few_step.adapter_weight,
                defaults=DrawingDefaults(template, replace(few_step, width=None, height=None)),
                few_step=True,
            ),
            export.Format(
                settings.precision,
                export.TinyDecoder(tiny.model, tiny.revision) if tiny and settings.decoder == "tiny" else None,
            ),
            export.Calibration(prompts, params.seed),
            FAST,
        )
        seconds = time.monotonic() - started
        run.report(
            {
                "precision": settings.precision,
                "decoder": settings.decoder,
                "adapter_sha256": done.manifest.adapter_sha256,
                "export_sha256": file_sha256(FAST / MANIFEST),
                "unet_error": done.unet_error,
                "size_mib": done.mib,
            },
            {"seconds": seconds},
        )


if __name__ == "__main__":
    main()
