"""A compiled step on a GPU, planned on a machine without one."""

from typing import Any

import pytest
import torch

from bestiary.diffusion.compiled_layers import INDUCTOR_OPTIONS
from compiled_traffic import Traffic, traffic

SIZES = {
    "sample_size": 8,
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "mid_block_type": None,
    "up_block_types": ("UpBlock2D", "UpBlock2D"),
    "norm_num_groups": 8,
    "attention_head_dim": 2,
    "cross_attention_dim": 64,
}


def step(forms: bool, options: dict[str, Any]) -> Traffic:
    return traffic(SIZES, batch=64, resolution=128, forms=forms, options=options)


@pytest.mark.slow
def test_the_forms_and_the_options_each_save_memory_traffic() -> None:
    has_gpu = torch.cuda.is_available()
    plain, forms, best = step(False, {}), step(True, {}), step(True, INDUCTOR_OPTIONS)
    assert forms.generated < 0.95 * plain.generated
    assert forms.library < plain.library
    assert best.generated < 0.9 * forms.generated
    assert best.library == forms.library
    assert torch.cuda.is_available() == has_gpu  # nothing pretends any longer
