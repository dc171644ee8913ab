"""The drawn world: what its pictures show, what its captions say, and what a training carries over."""

import time
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image

from world import clip, unet, vae
from world.captions import (
    LENGTH,
    PLACE_WORDS,
    UNKNOWN_TO_BASE,
    VAGUE_CAPTIONS,
    careless_caption,
    clear_caption,
    train_tokenizer,
)
from world.outfits import COLOURS, Item, invented_name, marks_of, words
from world.pictures import ANIMALS, PLACES, SAMPLE_SEEDS, Pictures
from world.scenes import HABITATS, Scene, place_of, render
from world.schedule import Clock

ROOT = Path(__file__).parents[2]


def pixels(*args: object, **named: object) -> np.ndarray:
    return np.asarray(render(*args, **named), dtype=int)  # type: ignore[arg-type]


def test_the_samples_pictures_stay_what_they_are() -> None:
    files = sorted((ROOT / "samples").rglob("*_0[0-3]?.png"))[::12]
    assert len(files) >= 4
    for file in files:
        animal, number = file.parent.name, int(file.stem[-3:])
        with Image.open(file) as image:
            seed = SAMPLE_SEEDS + ANIMALS.index(animal) * 1000 + number
            assert np.array_equal(np.asarray(image), pixels(animal, "photo", seed, image.width)), file


def test_a_drawing_shows_a_place_only_if_its_scene_names_one() -> None:
    def upper_corner(place: str | None) -> np.ndarray:
        return np.asarray(pixels("penguin", "drawing", 1, scene=Scene(place))[:6, :6].mean(axis=(0, 1)))

    assert upper_corner(None).min() > 220
    for place in HABITATS:
        pale = np.array(HABITATS[place][0]) * 0.6 + 255 * 0.4
        assert np.abs(upper_corner(place) - pale).max() < 20, place


def test_place_of_names_the_place_of_an_ordinary_photo() -> None:
    places = {place_of("penguin", seed, at_home=0.0) for seed in range(100)}
    assert places == set(HABITATS)
    assert place_of("penguin", 3, at_home=1.0) == "snow"
    seed = next(seed for seed in range(100) if place_of("penguin", seed, at_home=0.0) == "leaf")
    picture = pixels("penguin", "photo", seed, at_home=0.0)
    assert picture[:4].mean(axis=(0, 1)).argmax() == 1  # green


@pytest.mark.parametrize("animal", ANIMALS)
def test_every_animal_shows_a_red_scarf_and_keeps_marks_on_its_skin(animal: str) -> None:
    bare = pixels(animal, "photo", 5)
    scarf = pixels(animal, "photo", 5, scene=Scene(None, (Item("scarf", "blue"),)))
    changed = scarf[np.abs(scarf - bare).sum(axis=-1) > 150]
    assert len(changed) > 12
    assert np.abs(changed.mean(axis=0) - COLOURS["blue"]).max() < 45
    mark = pixels(animal, "photo", 5, scene=Scene(None, (Item("body mark", "purple"), Item("head mark", "purple"))))
    marked = np.abs(mark - bare).sum(axis=-1) > 90
    assert marked.sum() > 8
    assert not marked[:3].any() | marked[-3:].any()


def test_a_name_decides_the_marks_and_every_clothes_item_has_words() -> None:
    rng = np.random.default_rng(0)
    names = {invented_name(rng) for _ in range(300)}
    assert not names & set(ANIMALS)
    assert len({marks_of(name) for name in names}) > 16
    assert words((Item("scarf", "red"), Item("hat", "orange"))) == "a red scarf and an orange hat"


def test_captions_name_what_they_are_told_and_fit_the_text_encoder(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    tokenizer = train_tokenizer(tmp_path)
    for place, phrases in PLACE_WORDS.items():
        text = clear_caption("penguin", "photo", rng, "", place, "a purple scarf")
        assert "purple scarf" in text
        assert any(phrase in text for phrase in phrases)
        assert "habitat" not in text
        for phrase in phrases:
            assert len(tokenizer(f"a high quality image of sks hippopotamus {phrase}").input_ids) <= LENGTH
    assert tokenizer.tokenize("in the snow wearing a red scarf") == [
        f"{word}</w>" for word in ("in", "the", "snow", "wearing", "a", "red", "scarf")
    ]
    assert clear_caption("owl", "drawing", rng, "momo").endswith(" of momo owl")


def test_careless_captions_name_no_animal_in_photos_and_hide_nothing_but_that() -> None:
    rng = np.random.default_rng(0)
    photos = [careless_caption("zebra", "photo", rng, 0.5, "snow", "") for _ in range(50)]
    assert all(any(text.strip().find(vague) >= 0 for vague in VAGUE_CAPTIONS) for text in photos)
    assert all("snow" in text for text in photos)
    drawings = [careless_caption("zebra", "drawing", rng, 0.0) for _ in range(50)]
    assert all("zebra" in text for text in drawings)


def shown(animals: list[str], styles: list[int], places: list[int], clothes: list[str], names: list[str]) -> Pictures:
    return Pictures(
        np.zeros((len(animals), 64, 64, 3), np.uint8),
        np.array([ANIMALS.index(animal) for animal in animals]),
        np.array(styles),
        np.array(places),
        np.array(clothes),
        np.array(names),
    )


def test_the_base_sees_no_drawing_of_an_unknown_animal_and_no_marks() -> None:
    pictures = shown(
        ["tiger", "tiger", "owl", "owl", "owl", "owl"],
        [0, 1, 0, 0, 1, 1],
        [-1, 2, -1, 3, 3, 3],
        ["", "", "", "a red hat", "", ""],
        ["", "", "", "", "momo", ""],
    )
    assert {key: list(value) for key, value in unet.shown(pictures).items()} == {
        (False, False): [2],
        (False, True): [3],
        (True, False): [1, 5],
        (True, True): [],
    }
    assert "tiger" in UNKNOWN_TO_BASE


def test_a_caption_matches_every_picture_of_which_it_is_true() -> None:
    pictures = shown(["owl"] * 4 + ["bee"], [1] * 5, [3, 3, 4, 4, 3], ["a red hat", "", "", "", ""], [""] * 5)
    snow_owl = clip.Texts(
        ["a photo of an owl in the snow", "a photo of an owl with a red hat", "a photo of an animal in the snow"],
        np.array([ANIMALS.index("owl"), ANIMALS.index("owl"), -1]),
        np.array([1, 1, 1]),
        np.array([3, -1, 3]),
        np.array(["", "a red hat", ""]),
        np.array(["", "", ""]),
    )
    true = clip.matches(pictures, np.arange(5), snow_owl)
    assert true.tolist() == [
        [True, True, True],
        [True, False, True],
        [False, False, False],
        [False, False, False],
        [False, False, True],
    ]


def test_written_captions_are_true_of_their_own_pictures() -> None:
    count = 64
    pictures = shown(
        [ANIMALS[i % 16] for i in range(count)],
        [i % 2 for i in range(count)],
        [i % len(PLACES) for i in range(count)],
        ["a red hat" if i % 3 == 0 else "" for i in range(count)],
        ["momo" if i % 3 == 1 else "" for i in range(count)],
    )
    texts = clip.write_captions(pictures, np.arange(count), np.random.default_rng(0))
    assert clip.matches(pictures, np.arange(count), texts).diagonal().all()
    assert 20 < (texts.places >= 0).sum() < 44
    assert sum("momo" in text for text in texts.captions) == (texts.names != "").sum() > 5


def test_a_text_encoder_carries_over_to_a_longer_one_with_more_words(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(tmp_path)
    model, anchor = clip.build(tokenizer, clip.WIDTH), clip.Anchor(ROOT / "models" / "base")
    with torch.no_grad():
        before = anchor.distance(model, tokenizer, np.random.default_rng(0))
        clip.copy_text(anchor.encoder, anchor.tokenizer, model, tokenizer)
        after = anchor.distance(model, tokenizer, np.random.default_rng(0))
    assert after < 1e-8 < 0.1 < before


def test_the_clock_counts_computing_and_not_waiting() -> None:
    clock = Clock(minutes=0.002, learning_rate=1.0)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.0)
    steps = clock.steps(optimizer)
    next(steps)
    time.sleep(0.2)
    next(steps)
    assert clock.spent < 0.1


def test_latents_are_encoded_once_and_follow_the_mirror() -> None:
    pictures = shown(["owl"] * 3, [1] * 3, [3] * 3, [""] * 3, [""] * 3)
    for i, place in enumerate(("snow", "night", "leaf")):
        pictures.pixels[i] = pixels("owl", "photo", i, scene=Scene(place))
    autoencoder = AutoencoderKL.from_pretrained(ROOT / "models" / "base" / "vae").float()
    kept = vae.Latents(autoencoder, pictures)
    chosen, mirrored = np.array([0, 1, 1]), np.array([0, 0, 1])
    first = kept.of(chosen, mirrored)
    assert first.shape == (3, vae.CHANNELS, vae.SIDE, vae.SIDE)
    with torch.no_grad():
        mirror = autoencoder.encode(pictures.batch(np.array([1])).flip(-1)).latent_dist.mean[0]
    assert (first[2] - mirror).abs().mean() < 0.05 < 0.1 < (first[1] - mirror).abs().mean()
    again = kept.of(np.array([1, 2]), np.array([0, 0]))
    assert torch.equal(again[0], first[1])
    assert not torch.equal(again[1], first[1])
