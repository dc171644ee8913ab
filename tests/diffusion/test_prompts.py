from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline

from bestiary.diffusion.base import encode_text, load_pipeline
from bestiary.diffusion.prompts import MAX_CHUNKS, Chunk, chunks, encode_prompts, escaped, needs_rules, pieces
from bestiary.diffusion.sampling import generate
from bestiary.diffusion.single_file import clip_tokenizer
from bestiary.errors import BestiaryError
from bestiary.generation import Base, Generator
from bestiary.png_metadata import PictureSettings
from bestiary.samplers import Sampling


@pytest.fixture(scope="module")
def pipeline(base: Path) -> StableDiffusionPipeline:
    return load_pipeline(base, device="cpu")


@pytest.mark.parametrize(
    ("prompt", "parts"),  # from the tests in A1111's prompt_parser.py
    [
        ("normal text", [("normal text", 1.0)]),
        ("an (important) word", [("an ", 1.0), ("important", 1.1), (" word", 1.0)]),
        ("(unbalanced", [("unbalanced", 1.1)]),
        (r"\(literal\]", [("(literal]", 1.0)]),
        ("(unnecessary)(parens)", [("unnecessaryparens", 1.1)]),
        (
            "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).",
            [
                ("a ", 1.0),
                ("house", 1.573),
                (" ", 1.1),
                ("on", 1.0),
                (" a ", 1.1),
                ("hill", 0.55),
                (", sun, ", 1.1),
                ("sky", 1.4641),
                (".", 1.1),
            ],
        ),
        ("a: b) c]", [("a: b) c]", 1.0)]),
        ("(a:1.2.3)", [("a", 1.0)]),
        ("", []),
    ],
)
def test_emphasis_is_read_as_a1111_reads_it(prompt: str, parts: list[tuple[str, float]]) -> None:
    assert [(piece.text, round(piece.weight, 6)) for piece in pieces(prompt)] == parts


def test_an_escaped_text_means_itself() -> None:
    text = r"a [fox] (red:2) \ and :-)"
    assert [(piece.text, piece.weight) for piece in pieces(escaped(text))] == [(text, 1.0)]


def test_tokens_are_cut_into_chunks_of_75_at_a_comma_that_is_near() -> None:
    tokenizer = clip_tokenizer()

    def lengths(prompt: str) -> list[int]:
        return [len(chunk.ids) for chunk in chunks(tokenizer, prompt)]

    assert lengths("") == [0]
    assert lengths("cat " * 75) == [75]
    assert lengths("cat " * 80) == [75, 5]
    assert lengths("cat " * 60 + ", " + "dog " * 20) == [61, 20]  # the phrase after the comma moves as a whole
    assert lengths("cat " * 50 + ", " + "dog " * 30) == [75, 6]  # too far from the end
    assert lengths("cat BREAK dog dog") == [1, 2]
    first, second = chunks(tokenizer, "cat " * 74 + "(dog dog:1.5)")
    assert (first.weights, second.weights) == ([1.0] * 74 + [1.5], [1.5])
    with pytest.raises(BestiaryError, match=f"has 601 tokens and the base reads {MAX_CHUNKS * 75}"):
        chunks(tokenizer, "cat " * 601)


def test_a_chunk_is_weighted_token_by_token_and_keeps_its_mean(pipeline: StableDiffusionPipeline) -> None:
    tokenizer, encoder = pipeline.tokenizer, pipeline.text_encoder
    plain = encode_text(tokenizer, encoder, ["a b c"])[0]
    weighted = encode_prompts(tokenizer, encoder, ["a (b:1.5) c"])[0]
    expected = plain * torch.tensor([1, 1, 1.5, 1, *[1] * 73])[:, None]  # start, a, b, c, end, padding
    torch.testing.assert_close(weighted, expected * (plain.mean() / expected.mean()))


def test_long_prompts_are_encoded_chunk_by_chunk(pipeline: StableDiffusionPipeline) -> None:
    tokenizer, encoder = pipeline.tokenizer, pipeline.text_encoder
    both = encode_prompts(tokenizer, encoder, ["a " * 75 + "b " * 3, ""])
    assert both.shape == (2, 154, 32)
    for number, text in enumerate(("a " * 75, "b " * 3)):
        assert torch.equal(both[0, 77 * number : 77 * (number + 1)], encode_text(tokenizer, encoder, [text])[0])
    empty = encode_text(tokenizer, encoder, [""])[0]
    assert torch.equal(both[1], torch.cat([empty, empty]))


def test_plain_short_prompts_draw_the_same_pixels_by_either_rule(pipeline: StableDiffusionPipeline) -> None:
    sampling = Sampling("ddim", steps=2, guidance_scale=3.0, negative_prompt="blurry")
    drawn = [
        generate(pipeline, [prompt], [0], sampling, batch_size=1, a1111_prompts=rules)[0].tobytes()
        for prompt, rules in (
            ("a zebra, b", False),
            ("a zebra, b", True),
            (escaped("a (zebra)"), True),
            ("a (zebra)", False),
            ("a (zebra)", True),
            ("a zebra " * 20, True),
        )
    ]
    assert drawn[0] == drawn[1]
    assert drawn[2] == drawn[3]
    assert len(set(drawn)) == 4


def test_only_a_prompt_that_needs_the_rules_is_read_by_them(base: Path) -> None:
    generator = Generator()
    generator.prepare(Base(str(base)), [])
    settings = PictureSettings("", 0, Sampling(), str(base), None, None, None)
    assert not needs_rules(generator.pipeline.tokenizer, "a zebra, b")
    assert not generator.prompted(settings, "a zebra").a1111_prompt
    assert generator.prompted(settings, "a (zebra)").a1111_prompt
    assert generator.prompted(settings, "a " * 100).a1111_prompt
    fox = generator.prompted(settings, "a fox (red)", literal=True)
    assert (fox.prompt, fox.a1111_prompt) == ("a fox (red)", False)
    negative = PictureSettings("", 0, Sampling(negative_prompt="[blurry]"), str(base), None, None, None)
    fox = generator.prompted(negative, "a fox (red)", literal=True)
    assert (fox.prompt, fox.a1111_prompt) == (r"a fox \(red\)", True)
    assert chunks(generator.pipeline.tokenizer, "") == [Chunk()]
