"""Prompts by A1111's rules: emphasis as in `(tiger:1.3)` and `[stripes]`, and more tokens than the text encoder reads.

Rules: https://github.com/AUTOMATIC1111/stable-diffusion-webui/wiki/Features#attentionemphasis, and `prompt_parser.py`
and `sd_hijack_clip.py` there. Round brackets multiply a text's weight by 1.1, square ones divide it by 1.1, and a
backslash makes a bracket literal. Tokens are encoded in chunks of 75, and BREAK starts a new one.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from bestiary.diffusion.base import too_long_error

if TYPE_CHECKING:
    from transformers import CLIPTextModel, CLIPTokenizer

ROUND, SQUARE = 1.1, 1 / 1.1
MAX_CHUNKS = 8
COMMA_TOKENS = 20  # from a chunk's end: a phrase after a comma there moves to the next chunk as a whole
_SYNTAX = re.compile(r"[()\[\]\\]|\bBREAK\b")
_PART = re.compile(r"\\[()\[\]\\]|\\|\(|\[|:\s*([+-]?[.\d]+)\s*\)|\)|\]|[^\\()\[\]:]+|:")
_BREAK = re.compile(r"\s*\bBREAK\b\s*")


@dataclass
class Piece:
    """A part of a prompt with one weight; a break has no text."""

    text: str
    weight: float = 1.0
    is_break: bool = False


@dataclass
class Chunk:
    """Tokens that are encoded together, without those for start and end, and the weight of each."""

    ids: list[int] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)


def needs_rules(tokenizer: CLIPTokenizer, text: str) -> bool:
    """Whether a prompt has emphasis, or more tokens than the text encoder reads."""
    return bool(_SYNTAX.search(text)) or is_long(tokenizer, text)


def is_long(tokenizer: CLIPTokenizer, text: str) -> bool:
    """Whether a text has more tokens than the text encoder reads."""
    longest: int = tokenizer.model_max_length
    return len(tokenizer(text).input_ids) > longest


def escaped(text: str) -> str:
    r"""The prompt that means this text literally.

    >>> escaped("a fox (red)")
    'a fox \\(red\\)'
    """
    return re.sub(r"[()\[\]\\]", r"\\\g<0>", text)


def pieces(prompt: str) -> list[Piece]:
    r"""The parts of a prompt by their weights.

    >>> [(piece.text, round(piece.weight, 3)) for piece in pieces(r"a (red (big:2) tiger) [with] \(stripes\)")]
    [('a ', 1.0), ('red ', 1.1), ('big', 2.2), (' tiger', 1.1), (' ', 1.0), ('with', 0.909), (' (stripes)', 1.0)]
    """
    found: list[Piece] = []
    opened: dict[str, list[int]] = {"(": [], "[": []}  # where each bracket that is still open began

    def multiply(start: int, factor: float) -> None:
        for piece in found[start:]:
            piece.weight *= factor

    for match in _PART.finditer(prompt):
        part, weight = match[0], match[1]
        if len(part) == 2 and part.startswith("\\"):
            found.append(Piece(part[1]))
        elif part in opened:
            opened[part].append(len(found))
        elif weight is not None and opened["("]:
            multiply(opened["("].pop(), _number(weight))
        elif part == ")" and opened["("]:
            multiply(opened["("].pop(), ROUND)
        elif part == "]" and opened["["]:
            multiply(opened["["].pop(), SQUARE)
        else:
            for number, words in enumerate(_BREAK.split(part)):
                found += [Piece("", is_break=True)] * (number > 0) + [Piece(words)]
    for start in opened["("]:
        multiply(start, ROUND)
    for start in opened["["]:
        multiply(start, SQUARE)
    return _joined(found)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:  # 1.2.3
        return 1.0


def _joined(found: Sequence[Piece]) -> list[Piece]:
    """The pieces with neighbours of one weight in one, so that their words are tokenized together."""
    joined: list[Piece] = []
    for piece in found:
        last = joined[-1] if joined else None
        if last and not last.is_break and not piece.is_break and last.weight == piece.weight:
            last.text += piece.text
        elif piece.text or piece.is_break:
            joined.append(Piece(piece.text, piece.weight, piece.is_break))
    return joined


def chunks(tokenizer: CLIPTokenizer, prompt: str) -> list[Chunk]:
    """The prompt's tokens in chunks, at least one.

    Raises BestiaryError when there are more than MAX_CHUNKS.
    """
    size = tokenizer.model_max_length - 2
    comma = tokenizer.convert_tokens_to_ids(",</w>")
    done: list[Chunk] = []
    current, last_comma, total = Chunk(), -1, 0

    def finish() -> None:
        nonlocal current, last_comma
        done.append(current)
        current, last_comma = Chunk(), -1

    for piece in pieces(prompt):
        if piece.is_break:
            finish()
            continue
        for token in tokenizer(piece.text, add_special_tokens=False).input_ids:
            total += 1
            if token == comma:
                last_comma = len(current.ids)
            elif len(current.ids) == size and last_comma != -1 and size - last_comma <= COMMA_TOKENS:
                rest = Chunk(current.ids[last_comma + 1 :], current.weights[last_comma + 1 :])
                current = Chunk(current.ids[: last_comma + 1], current.weights[: last_comma + 1])
                finish()
                current = rest
            if len(current.ids) == size:
                finish()
            current.ids.append(token)
            current.weights.append(piece.weight)
    if current.ids or not done:
        finish()
    if len(done) > MAX_CHUNKS:
        raise too_long_error(prompt, total, MAX_CHUNKS * size)
    return done


@torch.inference_mode()
def encode_prompts(tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel, prompts: Sequence[str]) -> torch.Tensor:
    """The features of each prompt: (B, T, D), with T a multiple of the text encoder's tokens.

    Shorter prompts are continued with empty chunks. Raises BestiaryError when a prompt has more than MAX_CHUNKS.
    """
    found = [chunks(tokenizer, prompt) for prompt in prompts]
    most = max(map(len, found))
    return torch.stack(
        [
            torch.cat([_encode(tokenizer, text_encoder, chunk) for chunk in [*each, *[Chunk()] * (most - len(each))]])
            for each in found
        ]
    )


def _encode(tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel, chunk: Chunk) -> torch.Tensor:
    """The features of a chunk, each multiplied by its token's weight, with the same mean as before: (T, D)."""
    length = tokenizer.model_max_length
    ids = [tokenizer.bos_token_id, *chunk.ids, tokenizer.eos_token_id]
    ids += [tokenizer.pad_token_id] * (length - len(ids))
    features: torch.Tensor = text_encoder(torch.tensor([ids], device=text_encoder.device)).last_hidden_state[0]
    if all(weight == 1 for weight in chunk.weights):
        return features
    weights = torch.ones(length, 1, dtype=features.dtype, device=features.device)
    weights[1 : 1 + len(chunk.weights), 0] = torch.tensor(chunk.weights, dtype=features.dtype, device=features.device)
    weighted = features * weights
    return weighted * (features.mean() / weighted.mean())
