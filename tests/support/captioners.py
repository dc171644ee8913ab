"""A captioning model of BLIP's kind with random weights, which loads and describes in milliseconds."""

from pathlib import Path

import torch

WORDS = ("a", "cat", "owl", "photo", "of", "on", "the", "snow", "red", "dog", "asleep", "in", "grass", "two", "sofa")


def build_blip(folder: Path) -> Path:
    """Write a tiny BLIP with its processor to `folder`: 32 x 32 pixels, 15 words.

    As in Salesforce/blip-image-captioning-base, the tokenizer lacks the token that begins a caption.
    """
    from transformers import BertTokenizerFast, BlipConfig, BlipForConditionalGeneration, BlipProcessor
    from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

    folder.mkdir(parents=True)
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    (folder / "vocab.txt").write_text("\n".join(tokens))
    tokenizer = BertTokenizerFast.from_pretrained(folder)
    shape = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "projection_dim": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "initializer_range": 1.0,  # smaller weights would describe every image alike
    }
    text = {
        "vocab_size": len(tokens) + 2,
        "encoder_hidden_size": 16,
        "max_position_embeddings": 64,
        "bos_token_id": len(tokens),
        "sep_token_id": 3,
        "pad_token_id": 0,
        **shape,
    }
    torch.manual_seed(0)
    model = BlipForConditionalGeneration(
        BlipConfig(
            text_config=text,
            vision_config={"image_size": 32, "patch_size": 8, **shape},
            projection_dim=16,
            image_text_hidden_size=16,
        )
    )
    model.save_pretrained(folder)
    BlipProcessor(BlipImageProcessorPil(size={"height": 32, "width": 32}), tokenizer).save_pretrained(folder)
    return folder
