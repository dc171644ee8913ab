"""Scores the adapter against its base, on the same prompts and the same noise, by the judge."""

from pathlib import Path

from pipeline import REPORTS, stage

CLEAN, SPLIT, ADAPTER = Path("build/clean"), Path("build/split"), Path("models/adapter")
SHEET_SEEDS = 4

with stage("evaluate") as (params, run):
    from bestiary.animals import by_folder, caption
    from bestiary.data.images import open_rgb
    from bestiary.diffusion.adapter import adapter_sha256
    from bestiary.diffusion.base import device_and_dtype, load_pipeline
    from bestiary.evaluation import pictures, plots, scoring
    from bestiary.evaluation.judge import Judge

    settings = params.evaluate
    train, validation = pictures.read_manifests(SPLIT)
    classes = sorted(train["class"].unique())
    labels = [index for index in range(len(classes)) for _ in range(settings.seeds)]
    prompts = [caption(by_folder(classes[label]), settings.template) for label in labels]
    seeds = [params.seed + index for index in range(len(labels))]  # no two pictures share their noise
    judge = Judge.load(params.judge.model, params.judge.revision, device=device_and_dtype()[0].type)
    words = pictures.read_words(judge, classes, settings.template)
    real, trained_on = (pictures.view_files(judge, CLEAN, table, classes) for table in (validation, train))

    drawn = pictures.draw(
        load_pipeline(params.base.model, params.base.revision),
        ADAPTER,
        prompts,
        seeds,
        **settings.model_dump(include={"steps", "guidance_scale", "scheduler", "batch_size"}),
    )
    base, adapter = (pictures.view(judge, images, labels) for images in drawn)
    report = scoring.compare(
        base, adapter, real, trained_on.features, words, resamples=settings.bootstrap_resamples, seed=params.seed
    )

    folder = REPORTS / "evaluate"
    rows = []
    for name in scoring.worst_classes(report["per_class"]):
        first = classes.index(name) * settings.seeds
        shown = slice(first, first + min(SHEET_SEEDS, settings.seeds))
        rows.append((by_folder(name).name, drawn[0][shown], drawn[1][shown]))
    plots.base_beside_adapter(rows, folder / "sheet.png")
    pairs = [
        (cosine, drawn[1][picture], open_rgb(CLEAN / train["path"].iloc[reference]))
        for picture, reference, cosine in scoring.closest_pairs(adapter.features, trained_on.features, 10)
    ]
    plots.closest(pairs, folder / "memorisation.png")
    plots.confusion_matrix(scoring.confusion(adapter, words), folder / "confusion.png")
    plots.class_differences(report["per_class"], folder / "per_class.png")
    plots.save_table(scoring.class_table(report["per_class"]), folder / "per_class.csv")
    plots.save_table(scoring.picture_table(base, adapter, words, prompts, seeds), folder / "pictures.csv")
    run.report(report | {"adapter_sha256": adapter_sha256(ADAPTER)})
