import pytest
from support.settings import train_settings

from bestiary.diffusion.optimization import learning_rate_factor


@pytest.mark.parametrize(("schedule", "middle", "end"), [("constant", 1, 1), ("linear", 0.5, 0), ("cosine", 0.5, 0)])
def test_the_learning_rate_warms_up_and_follows_its_schedule(schedule: str, middle: float, end: float) -> None:
    settings = train_settings(steps=110, warmup_steps=10, learning_rate_schedule=schedule)
    rates = [learning_rate_factor(settings, step) for step in range(111)]
    assert rates[:11] == sorted(rates[:11])
    assert rates[0] > 0
    assert (rates[10], rates[60], rates[110]) == pytest.approx((1, middle, end))
