"""OpenAI's own client draws with the champion by changing its base URL."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from openai import OpenAI
from openai.types import Image as Answer
from PIL import Image
from support.app import RunningPage, pictures

QUICK: dict[str, Any] = {"steps": 2, "guidance_scale": 3.0, "scheduler": "dpmsolver++", "seed": 7}  # ours, in the body
CHAMPION = "models:/bestiary/1"


@pytest.fixture(scope="module")
def client(server: RunningPage) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{server.address}/v1", api_key="unused", max_retries=0) as opened:
        yield opened


def image(answer: Answer) -> Image.Image:
    assert answer.b64_json
    opened = Image.open(io.BytesIO(base64.b64decode(answer.b64_json)))
    opened.load()
    return opened


def test_a_program_that_changes_only_its_base_url_draws_with_the_champion_as_it_was_evaluated(
    client: OpenAI, server: RunningPage
) -> None:
    answer = client.images.generate(model="gpt-image-2", prompt="a drawing of a tiger", size="auto", quality="high")
    (drawn,) = answer.data or []
    settings = json.loads(image(drawn).info["bestiary"])
    assert (settings["adapter"], settings["prompt"]) == (CHAMPION, "a drawing of a tiger")
    assert (settings["scheduler"], settings["steps"], settings["guidance_scale"]) == ("ddim", 5, 3.0)  # as evaluated
    order = {name: settings[name] for name in ("scheduler", "steps", "guidance_scale", "seed", "prompt", "adapter")}
    assert pictures(server.draw(**order))[0].tobytes() == image(drawn).tobytes()


def test_n_pictures_have_the_pages_pixels_and_name_version_hash_and_settings(
    client: OpenAI, server: RunningPage
) -> None:
    answer = client.images.generate(
        model="models:/bestiary@champion",
        prompt="a tiger",
        n=2,
        size="72x48",
        response_format="b64_json",
        extra_body=QUICK | {"adapter_weight": 0.5, "negative_prompt": "a photo"},
    )
    order = {"adapter": CHAMPION, "prompt": "a tiger", "width": 72, "height": 48, "count": 2, "adapter_weight": 0.5}
    expected = pictures(server.draw(**order, negative_prompt="a photo"))
    drawn = [image(each) for each in answer.data or []]
    assert [each.tobytes() for each in drawn] == [each.tobytes() for each in expected]
    assert [each.info for each in drawn] == [each.info for each in expected]
    for number, (each, told) in enumerate(zip(drawn, answer.data or [], strict=True)):
        info = (told.model_extra or {})["info"]
        settings = json.loads(each.info["bestiary"])
        assert {name: info[name] for name in settings} == settings
        assert info["parameters"] == each.info["parameters"]
        assert (info["adapter"], info["seed"], info["adapter_weight"]) == (CHAMPION, 7 + number, 0.5)
        assert len(info["adapter_sha256"]) == 64
    assert answer.output_format == "png"


def test_without_a_seed_each_picture_has_another_one(client: OpenAI) -> None:
    body = QUICK | {"seed": None, "steps": 1}
    seeds = [
        json.loads(image((client.images.generate(prompt="a tiger", extra_body=body).data or [])[0]).info["bestiary"])
        for _ in range(2)
    ]
    assert seeds[0]["seed"] != seeds[1]["seed"]


def test_the_models_are_the_adapters_under_all_their_names_and_the_bases(client: OpenAI) -> None:
    models = {model.id: model.model_extra or {} for model in client.models.list()}
    assert [*models][:2] == [CHAMPION, "models:/bestiary@champion"]
    assert [*models][-1] == "models/base"
    assert len(models) == 4
    assert models[CHAMPION] == models["models:/bestiary@champion"]
    assert models[CHAMPION]["aliases"] == ["champion"]
    one = client.models.retrieve("models:/bestiary@champion")
    assert one.id == "models:/bestiary@champion"
    assert (one.model_extra or {})["adapter_sha256"] == models[CHAMPION]["adapter_sha256"]
    drawn = client.images.generate(model="models/base", prompt="a tiger", extra_body=QUICK | {"steps": 1})
    assert json.loads(image((drawn.data or [])[0]).info["bestiary"])["adapter"] is None


@pytest.mark.parametrize(
    ("change", "field", "word"),
    [
        ({"n": 11}, "n", "10"),
        ({"size": "large"}, "size", "large"),
        ({"size": "70x64"}, "width", "multiple of 8"),
        ({"size": "4096x4096"}, "width", "2048"),
        ({"prompt": "  "}, None, "prompt"),
        ({"prompt": "word " * 100}, None, "tokens"),
        ({"response_format": "url"}, "response_format", "b64_json"),
        ({"output_format": "webp"}, "output_format", "png"),
        ({"background": "transparent"}, "background", "opaque"),
        ({"stream": True}, "stream", "False"),
        ({"seed": -1}, "seed", "0"),
        ({"steps": 401}, "steps", "400"),
        ({"colour": "red"}, "colour", "not permitted"),
        ({"model": "models/base", "adapter_weight": 1.0}, "adapter_weight", "adapter"),
    ],
)
def test_a_bad_request_is_refused_in_openais_form(
    client: OpenAI, change: dict[str, Any], field: str | None, word: str
) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.post("/images/generations", body={"prompt": "a tiger"} | QUICK | change, cast_to=object)
    error = refused.value
    assert (error.type, error.param) == ("invalid_request_error", field)
    assert isinstance(error.body, dict)
    assert word in error.body["message"]
    assert error.body["message"].endswith(".")


def test_an_unknown_model_and_an_unknown_path_are_named(client: OpenAI, server: RunningPage) -> None:
    with pytest.raises(
        openai.NotFoundError, match="models:/bestiary/9 here. Choose one of models:/bestiary/1"
    ) as known:
        client.images.generate(model="models:/bestiary/9", prompt="a tiger")
    assert known.value.param == "model"
    with pytest.raises(openai.NotFoundError, match="POST /v1/chat/completions"):
        client.chat.completions.create(model="any", messages=[])
    with pytest.raises(openai.BadRequestError):
        client.post("/images/generations", body=[1], cast_to=object)
    assert server.client.get("/v1/images/generations").json()["error"]["type"] == "invalid_request_error"
