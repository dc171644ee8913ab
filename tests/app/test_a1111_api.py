"""A1111's client `webuiapi` draws here as in A1111."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from support.app import RunningPage, pictures
from webuiapi import WebUIApi

from bestiary.app.a1111_requests import sampler_key, split_prompt

QUICK: dict[str, Any] = {
    "prompt": "a tiger", "sampler_name": "DPM++ 2M", "steps": 2, "cfg_scale": 3.0, "width": 64, "height": 64, "seed": 7
}  # fmt: skip
CHAMPION = "models:/bestiary/1"


@pytest.fixture(scope="module")
def client(server: RunningPage) -> WebUIApi:
    return WebUIApi(baseurl=f"{server.address}/sdapi/v1")


def until(client: WebUIApi, is_reached: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    """Ask for the progress until it is as wished."""
    end = time.monotonic() + 60
    while not is_reached(told := client.get_progress()):
        assert time.monotonic() < end
        time.sleep(0.02)
    return dict(told)


def refusal(server: RunningPage, **changes: object) -> tuple[int, str]:
    """The status and the sentence by which a txt2img with these changes is refused."""
    response = server.client.post("/sdapi/v1/txt2img", json=QUICK | changes)
    answer = response.json()
    assert set(answer) == {"error", "detail", "body", "errors"}
    assert answer["detail"].endswith(".")
    return response.status_code, answer["detail"]


def test_adapters_in_the_prompt_give_the_pages_pixels_and_info_names_them(
    client: WebUIApi, server: RunningPage
) -> None:
    prompt = "a tiger <lora:bestiary-1:0.8>, wild <lora:stripes>"
    drawn = client.txt2img(**QUICK | {"prompt": prompt, "batch_size": 2, "negative_prompt": "a photo", "width": 72})
    more = [{"adapter": "local:0", "weight": 1.0}]
    order = {"adapter": CHAMPION, "adapter_weight": 0.8, "more_adapters": more, "prompt": "a tiger , wild", "width": 72}
    expected = pictures(server.draw(**order, height=64, negative_prompt="a photo", count=2))
    assert [image.tobytes() for image in drawn.images] == [image.tobytes() for image in expected]
    info = drawn.info
    assert info["all_seeds"] == [7, 8]
    assert (info["width"], info["height"], info["sampler_name"], info["steps"]) == (72, 64, "DPM++ 2M", 2)
    assert info["infotexts"] == [image.info["parameters"] for image in expected]
    assert info["bestiary"] == [json.loads(image.info["bestiary"]) for image in expected]
    assert info["bestiary"][0]["adapter"] == CHAMPION
    assert info["bestiary"][0]["more_adapters"][0]["adapter"].endswith("/stripes")
    assert drawn.parameters["prompt"] == prompt


def test_without_an_adapter_in_the_prompt_the_base_is_drawn(client: WebUIApi, server: RunningPage) -> None:
    (image,) = client.txt2img(**QUICK).images
    assert image.tobytes() == pictures(server.draw(prompt="a tiger"))[0].tobytes()
    assert json.loads(image.info["bestiary"])["adapter"] is None


def test_names_of_the_champion_in_a_prompt(client: WebUIApi) -> None:
    drawn = [
        client.txt2img(**QUICK | {"prompt": f"a tiger <lora:{name}:1>"}) for name in ("bestiary@champion", "bestiary")
    ]
    assert [its.info["bestiary"][0]["adapter"] for its in drawn] == [CHAMPION] * 2
    assert split_prompt("<LORA: a :0.5> a  tiger <lora:b>")[0] == "a tiger"


def test_the_lists_name_what_there_is(client: WebUIApi, server: RunningPage) -> None:
    champion = server.client.get("/api/catalog").json()["adapters"][0]
    first, second = client.get_loras()
    assert (first["name"], first["alias"], first["path"]) == ("bestiary-1", "bestiary@champion", CHAMPION)
    assert first["metadata"]["adapter_sha256"].startswith(champion["sha256"])
    assert second["name"] == "stripes"
    assert client.util_get_model_names() == ["models/base"]
    assert {"DPM++ 2M", "DPM++ 2M SDE Karras", "Euler"} <= set(client.util_get_sampler_names())
    assert client.util_get_scheduler_names() == ["automatic", "karras", "sgm_uniform", "uniform"]
    assert client.get_options()["sd_model_checkpoint"] == "models/base"
    assert client.set_options({"sd_model_checkpoint": "models/base"}) is None
    assert client.get_scripts() == {"txt2img": [], "img2img": []}
    assert client.refresh_checkpoints() is None
    assert client.txt2img(**QUICK, override_settings={"sd_model_checkpoint": "models/base"}).images


def test_a_schedule_type_chooses_the_sampler(client: WebUIApi) -> None:
    drawn = client.txt2img(**QUICK, scheduler="Karras")
    assert drawn.info["sampler_name"] == "DPM++ 2M Karras"


def test_the_clients_own_default_draws_with_euler_a(client: WebUIApi, server: RunningPage) -> None:
    assert client.default_sampler == "Euler a"
    drawn = client.txt2img(**{name: value for name, value in QUICK.items() if name != "sampler_name"})
    assert drawn.info["sampler_name"] == "Euler a"
    (expected,) = pictures(server.draw(prompt="a tiger", scheduler="euler-ancestral"))
    assert drawn.image.tobytes() == expected.tobytes()


@pytest.mark.parametrize(
    ("name", "schedule", "sampler"),
    [
        ("Euler a", None, "euler-ancestral"),
        ("euler_ancestral", "Automatic", "euler-ancestral"),
        ("k_dpmpp_2m", "karras", "dpmsolver++karras"),
        ("DPM++ 2M Karras", "automatic", "dpmsolver++karras"),
        ("dpmsolver++sde", None, "dpmsolver++sde"),
        ("DPM++ 2M SDE", "Karras", "dpmsolver++sde"),
        ("DDIM", "SGM Uniform", "ddim-trailing"),
        ("Euler", "Uniform", "euler"),
        (None, "Karras", None),
    ],
)
def test_names_of_samplers_as_a1111_k_diffusion_and_comfyui_write_them(
    name: str | None, schedule: str | None, sampler: str | None
) -> None:
    assert sampler_key(name, schedule) == sampler


@pytest.mark.parametrize(
    ("change", "status", "word"),
    [
        ({"prompt": ""}, 422, "Prompt"),
        ({"prompt": "<lora:stripes:1>"}, 422, "Prompt"),
        ({"prompt": "a tiger <lora:spots:1>"}, 404, "spots here. Choose one of"),
        ({"prompt": "a tiger <lora:stripes:3>"}, 422, "0 to 2"),
        ({"prompt": "a tiger <lora:stripes:nan>"}, 422, "0 to 2"),
        ({"prompt": "a tiger <lora:stripes:1> <lora:stripes:1>"}, 422, "are the same adapter"),
        ({"prompt": "a tiger <hypernet:fur:1>"}, 422, "hypernet"),
        ({"prompt": "word " * 100}, 422, "tokens"),
        ({"sampler_name": "Magic"}, 422, "Magic here. Choose one of DDPM"),
        ({"scheduler": "exponential"}, 422, "exponential"),
        ({"sampler_name": "UniPC", "scheduler": "karras"}, 422, "karras"),
        ({"steps": 0}, 422, "Steps"),
        ({"width": 70}, 422, "multiple of 8"),
        ({"batch_size": 4, "n_iter": 5}, 422, "16"),
        ({"enable_hr": True}, 422, "enable_hr"),
        ({"tiling": True}, 422, "tiling"),
        ({"alwayson_scripts": {"ControlNet": {"args": []}}}, 422, "alwayson_scripts"),
        ({"override_settings": {"sd_model_checkpoint": "other"}}, 404, "other"),
        ({"override_settings": {"CLIP_stop_at_last_layers": 2}}, 422, "CLIP_stop_at_last_layers"),
        ({"colour": "red"}, 422, "colour"),
    ],
)
def test_a_bad_request_is_refused_in_a1111s_form(
    server: RunningPage, change: dict[str, object], status: int, word: str
) -> None:
    given, sentence = refusal(server, **change)
    assert given == status
    assert word in sentence


def test_image_to_image_is_not_here_yet_and_the_client_is_told_so(client: WebUIApi, server: RunningPage) -> None:
    with pytest.raises(RuntimeError) as refused:
        client.img2img(images=[pictures(server.draw(steps=1))[0]], prompt="a tiger")
    assert refused.value.args[0] == 501
    assert "txt2img" in refused.value.args[1]


def test_an_interrupted_order_ends_and_progress_was_told(client: WebUIApi, server: RunningPage) -> None:
    assert client.get_progress()["state"]["job_count"] == 0
    client.interrupt()  # nothing to interrupt
    ended: list[tuple[int, str]] = []
    long = threading.Thread(target=lambda: ended.append(refusal(server, steps=400, batch_size=2)))
    long.start()
    told = until(client, lambda told: told["progress"] > 0)
    assert told["progress"] < 0.5
    assert (told["state"]["job_count"], told["state"]["sampling_steps"]) == (2, 400)
    page = threading.Thread(target=lambda: ended.append((len(pictures(server.draw(steps=1))), "page")))
    page.start()
    client.interrupt()
    long.join(60)
    page.join(60)  # the page's order is not interrupted
    assert sorted(ended) == [(1, "page"), (409, "The drawing was interrupted before its first picture was finished.")]
    assert client.get_progress()["progress"] == 0


def test_interrupting_keeps_the_pictures_that_are_finished(client: WebUIApi) -> None:
    drawn = []
    long = threading.Thread(target=lambda: drawn.append(client.txt2img(**QUICK | {"steps": 100, "batch_size": 8})))
    long.start()
    until(client, lambda told: told["state"]["job_no"] >= 1)
    client.interrupt()
    long.join(60)
    assert 1 <= len(drawn[0].images) < 8
    assert drawn[0].info["interrupted"]
    assert drawn[0].info["all_seeds"] == list(range(7, 7 + len(drawn[0].images)))
