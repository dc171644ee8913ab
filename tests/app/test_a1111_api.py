"""A1111's client `webuiapi` draws here as in A1111."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
import time
from collections.abc import Callable
from io import BytesIO
from typing import Any

import pytest
from PIL import Image
from support.app import MAX_UPLOAD_MIB, RunningPage, pictures
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


def eventually(is_so: Callable[[], bool]) -> None:
    """Wait for what a server does after it has answered."""
    end = time.monotonic() + 10
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.01)


def refusal(server: RunningPage, changes: dict[str, object], way: str = "txt2img") -> tuple[int, str]:
    """The status and the sentence by which a request with these changes is refused."""
    response = server.client.post(f"/sdapi/v1/{way}", json=QUICK | changes)
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
    given, sentence = refusal(server, change)
    assert given == status
    assert word in sentence


def photo(width: int = 96, height: int = 64) -> Image.Image:
    return Image.radial_gradient("L").resize((width, height)).convert("RGB")


def encoded(image: Image.Image) -> str:
    buffer = BytesIO()
    image.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def test_image_to_image_gives_the_pages_pixels_and_stores_nothing(client: WebUIApi, server: RunningPage) -> None:
    stored = server.stored_uploads()
    drawn = client.img2img(
        images=[photo()], **QUICK | {"prompt": "a tiger <lora:stripes:0.8>", "steps": 4, "batch_size": 2},
        denoising_strength=0.5, resize_mode=1,
    )  # fmt: skip
    eventually(lambda: server.stored_uploads() == stored)
    content = base64.b64decode(encoded(photo()))
    key = server.client.put("/api/images", params={"name": "photo.png"}, content=content).json()["key"]
    order = {"adapter": "local:0", "adapter_weight": 0.8, "prompt": "a tiger", "steps": 4, "count": 2}
    expected = pictures(server.draw(**order, width=64, height=64, image=key, denoise=0.5))
    assert [image.tobytes() for image in drawn.images] == [image.tobytes() for image in expected]
    assert drawn.images[0].tobytes() != drawn.images[1].tobytes()
    assert drawn.info["denoising_strength"] == 0.5
    assert drawn.info["bestiary"][0]["image_sha256"] == hashlib.sha256(content).hexdigest()
    assert "Denoising strength: 0.5" in drawn.info["infotexts"][0]
    assert drawn.parameters["init_images"] is None


def test_an_image_is_not_stretched_and_its_file_may_have_a_data_uri_and_line_breaks(server: RunningPage) -> None:
    content = encoded(photo(128, 96))
    stretched = QUICK | {"init_images": [f"data:image/png;base64,{content}"], "resize_mode": 0}
    status, sentence = refusal(server, stretched, "img2img")
    assert (status, "resize_mode 1" in sentence) == (422, True)
    lines = "\n".join(content[start : start + 76] for start in range(0, len(content), 76))
    for changes in ({"width": 128, "height": 96}, {"resize_mode": 1, "init_images": [lines]}):
        assert server.client.post("/sdapi/v1/img2img", json=stretched | changes).status_code == 200


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"init_images": []}, "init_images holds 0 images"),
        ({"init_images": [encoded(photo())] * 2}, "init_images holds 2 images"),
        ({"init_images": ["not base64!"]}, "init_images[0] is not an image in base64"),
        ({"init_images": ["https://example.com/photo.png"]}, "addresses are not fetched"),
        ({"init_images": [""]}, "init_images[0] is not"),
        ({"init_images": [base64.b64encode(b"<html>").decode()]}, "init_images[0] cannot be read as a picture"),
        ({"init_images": encoded(photo())}, "Init images: input should be a valid"),
        ({"init_images": [base64.b64encode(bytes(MAX_UPLOAD_MIB * 2**20 + 1)).decode()]}, "larger than 1 MiB"),
        ({"init_images": ["A" * 2 * MAX_UPLOAD_MIB * 2**20]}, "Send an image of at most 1 MiB"),
        ({"denoising_strength": 0}, "Denoising strength"),
        ({"denoising_strength": 1.1}, "Denoising strength"),
        ({"denoising_strength": "much"}, "Denoising strength"),
        ({"mask": encoded(photo())}, "There are no masks here"),
        ({"resize_mode": 3}, "Resize mode"),
        ({"initial_noise_multiplier": 1.2}, "initial_noise_multiplier"),
        ({"prompt": ""}, "Prompt"),
        ({"steps": 0}, "Steps"),
    ],
)
def test_a_bad_image_to_image_request_is_refused_and_leaves_nothing_behind(
    server: RunningPage, change: dict[str, object], word: str
) -> None:
    stored = server.stored_uploads()
    status, sentence = refusal(server, {"init_images": [encoded(photo())], "resize_mode": 1} | change, "img2img")
    assert status == 422
    assert word in sentence
    eventually(lambda: server.stored_uploads() == stored)


def test_an_interrupted_order_ends_and_progress_was_told(client: WebUIApi, server: RunningPage) -> None:
    assert client.get_progress()["state"]["job_count"] == 0
    client.interrupt()  # nothing to interrupt
    ended: list[tuple[int, str]] = []
    long = threading.Thread(target=lambda: ended.append(refusal(server, {"steps": 400, "batch_size": 2})))
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


def test_progress_shows_a_preview_to_those_who_ask_for_it(client: WebUIApi, server: RunningPage) -> None:
    long = threading.Thread(target=lambda: client.txt2img(**QUICK | {"steps": 400}))
    long.start()
    shown = until(client, lambda told: told["current_image"] is not None)
    with Image.open(BytesIO(base64.b64decode(shown["current_image"]))) as preview:
        assert preview.size == (64, 64)
    without = server.client.get("/sdapi/v1/progress", params={"skip_current_image": "true"}).json()
    client.interrupt()
    long.join(60)
    assert without["progress"] > 0
    assert without["current_image"] is None


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
