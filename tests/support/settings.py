"""Settings for cleaning, encoding, training and distilling a tiny base, whole as params.yaml has them."""

from bestiary.params import Clean, Distill, Encode, Train

CLEAN: dict[str, object] = {
    "min_side": 32,
    "max_aspect_ratio": 4.0,
    "near_duplicate_bits": 12,
    "blank": "off",
    "blurred": "off",
    "exposure": "off",
    "off_topic": "off",
    "off_topic_threshold": 0.0,
    "caption_without_name": "prepend",
}
ENCODE: dict[str, object] = {
    "flip": True,
    "augmented_variants": 0,
    "rotation_degrees": 0.0,
    "shift": 0.0,
    "zoom": 0.0,
    "brightness": 0.0,
    "aspect_ratio_buckets": False,
    "shuffle_tags": False,
    "keep_tags": 1,
    "tag_dropout": 0.0,
    "caption_variants": 8,
    "compile": False,
    "resolution": 32,
    "batch_size": 4,
}
TRAIN: dict[str, object] = {
    "rank": 2,
    "alpha": 8,
    "dropout": 0.0,
    "targets": ["to_q", "to_k", "to_v", "to_out.0"],
    "use_rslora": False,
    "use_dora": False,
    "caption_dropout": 0.1,
    "min_snr_gamma": 5.0,
    "huber_c": None,
    "noise_offset": 0.0,
    "preservation": {"kind": "none", "weight": 0.3, "samples": 4},
    "timestep_sampling": "uniform",
    "max_grad_norm": 1.0,
    "weight_decay": 0.01,
    "ema_decay": 0.9,
    "learning_rate_schedule": "cosine",
    "accumulation": 1,
    "gradient_checkpointing": False,
    "compile": "never",
    "optimizer": "adamw",
    "low_memory": False,
    "criterion": "val_loss",
    "patience": None,
    "min_delta": 0.0,
    "checkpoint_seconds": 0.0,
    "steps": 8,
    "batch_size": 4,
    "learning_rate": 1e-2,
    "warmup_steps": 2,
    "validate_every": 4,
    "sheet_animals": 2,
    "sheet_seeds": 1,
    "sheet_steps": 2,
    "sheet_guidance_scale": 3.0,
    "keep_checkpoints": False,
}
DISTILL: dict[str, object] = {
    "from": None,
    "timesteps": [999, 699],
    "path_end": 399,
    "teacher_steps": 5,
    "guidance_scale": 3.0,
    "guidance_interval": [2.0, 1000.0],
    "rank": 2,
    "targets": ["to_q", "to_k", "to_v", "to_out.0", "conv1", "conv2", "conv_in"],
    "huber_c": 0.03,
    "ema_decay": 0.9,
    "max_grad_norm": 1.0,
    "learning_rate_schedule": "cosine",
    "gradient_checkpointing": False,
    "checkpoint_seconds": 0.0,
    "steps": 8,
    "batch_size": 4,
    "learning_rate": 1e-2,
    "warmup_steps": 2,
    "validate_every": 4,
    "sheet_animals": 2,
    "sheet_seeds": 1,
}


def clean_settings(**changes: object) -> Clean:
    """Cleaning settings without the optional checks, with these changes."""
    return Clean.model_validate(CLEAN | changes)


def encode_settings(**changes: object) -> Encode:
    """Encode settings for 32 x 32 pixels, with these changes."""
    return Encode.model_validate(ENCODE | changes)


def train_settings(**changes: object) -> Train:
    """Training settings for eight steps, with these changes; a checkpoint is due at every row of the history."""
    return Train.model_validate(TRAIN | changes)


def distill_settings(**changes: object) -> Distill:
    """Distillation settings for eight steps, with these changes; a checkpoint is due at every row of the history."""
    return Distill.model_validate(DISTILL | changes)
