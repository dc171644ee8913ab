"""Stored rates of two idle cores for the profile sample, for tests that must not measure."""

from bestiary.estimating import Images
from bestiary.evaluation.rates import Rate, Rates, StepPart

SAMPLE = Images(classes=16, count=661, bytes=6_000_000, some=[])


def rate(seconds: float, scaled_by: float = 1.0) -> Rate:
    return Rate(seconds=seconds, measured_at="1 x 64 x 64 pixels", scaled_by=scaled_by, peak_mib=800.0)


def measured(**changes: object) -> Rates:
    """The rates that two idle cores measured for the profile sample."""
    known = {
        "device": "2 CPU threads",
        "gpus": 1,
        "processes": 1,
        "load_average": 0.1,
        "base_is_stand_in": False,
        "start_s": 4.0,
        "inspect_s": 0.01,
        "judge_s": 0.002,
        "judge_mib": 0.0,
        "judge_is_stand_in": False,
        "encode": rate(0.0026),
        "row": rate(0.0047),
        "single_row": rate(0.011),
        "decode": rate(0.0041),
        "step": rate(0.175),
        "part": StepPart(images=16, preserved=0, times=1),
        "rows_per_step": 1.5,
        "trainable_parameters": 59_136,
        "base_bytes": 17_000_000,
        "caption_bytes": 16 * 128 * 4,
        "value_bytes": 4,
        "latent_factor": 4,
    }
    return Rates.model_validate({**known, **changes})
