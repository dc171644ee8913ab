from dataclasses import replace

import pytest

from bestiary.params import load_params
from bestiary.samplers import DrawingDefaults, Sampling


def test_drawing_defaults_survive_json_and_damaged_ones_are_refused() -> None:
    defaults = DrawingDefaults("a {}", Sampling("ddim", 5, 3, (0.5, 2), 64, 64))
    assert DrawingDefaults.from_json(defaults.to_json()) == defaults
    for text in ("", "[]", '{"steps": "many"}', '{"scheduler": "magic"}', '{"template": "a photo"}'):
        with pytest.raises(ValueError):  # noqa: PT011
            DrawingDefaults.from_json(text)


@pytest.mark.parametrize("change", ['"steps": -1', '"scheduler": "magic"', '"template": "a photo"'])
def test_drawing_defaults_that_cannot_be_drawn_are_refused(change: str) -> None:
    text = DrawingDefaults().to_json()
    with pytest.raises(ValueError):  # noqa: PT011
        DrawingDefaults.from_json(f"{text[:-1]}, {change}}}")


def test_defaults_registered_by_the_first_version_can_still_be_read() -> None:
    tag = (
        '{"template": "a photo of {}", "steps": 13, "guidance_scale": 7.0, "guidance_interval": [2.0, 1000.0], '
        '"scheduler": "dpmsolver++sde", "resolution": 64}'
    )
    defaults = DrawingDefaults.from_json(tag)
    assert defaults.sampling == Sampling("dpmsolver++sde", 13, 7.0, (2.0, 1000.0), 64, 64)


def test_an_evaluation_hands_its_sampling_on_whole() -> None:
    evaluate = load_params().evaluate
    assert evaluate.sampling(64) == Sampling("dpmsolver++sde", 13, 7.0, (2.0, 1000.0), 64, 64)
    assert evaluate.defaults().sampling.width is None


def test_the_timesteps_and_the_decoder_of_a_few_step_adapter_are_stored_and_checked() -> None:
    few_step = DrawingDefaults(sampling=Sampling("lcm", 2, 1, timesteps=(999, 699), decoder="tiny"))
    assert DrawingDefaults.from_json(few_step.to_json()) == few_step
    for timesteps in ((399, 999), (999,), (1000, 0), (999, -1), (500, 500)):
        assert not replace(few_step.sampling, timesteps=timesteps).is_possible
