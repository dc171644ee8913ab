"""What a program's order is made of, beside what it asks for."""

import shutil
from pathlib import Path

import pytest
from support.app import offerings

from bestiary.app.choices import Wanted, WeightedOffer, make_order
from bestiary.app.offers import Offers
from bestiary.samplers import SamplingChanges


@pytest.mark.parametrize("first", [0, 1])
def test_a_few_step_adapter_beside_another_sets_the_steps_and_the_sampler(
    base_folder: Path, adapter_folder: Path, tmp_path: Path, project: Path, first: int
) -> None:
    fast = tmp_path / "lcm-lora-sdv1-5.safetensors"
    shutil.copy(adapter_folder / "pytorch_lora_weights.safetensors", fast)
    offers = Offers(offerings(base_folder, adapter_folder, fast))
    style, few_step = (WeightedOffer(offer) for offer in offers.listed())
    adapters = [few_step, style] if first else [style, few_step]
    order = make_order(offers, adapters, Wanted("a tiger", SamplingChanges()))
    assert (order.scheduler, order.steps, order.guidance_scale) == ("lcm", 4, 1.0)
    order = make_order(offers, adapters, Wanted("a tiger", SamplingChanges(steps=6)))
    assert (order.scheduler, order.steps) == ("lcm", 6)
    alone = make_order(offers, [style], Wanted("a tiger", SamplingChanges()))
    assert alone.scheduler == offers.defaults.sampling.sampler
