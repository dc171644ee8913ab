"""Orders: what is drawn, what is refused, and what happens when several people draw."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import io
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import httpx
import psutil
import pytest
from PIL import Image, ImageChops
from support.app import ORDER, Event, RunningPage, image_of, offerings, pictures
from support.registry import DEFAULTS, make_adapter

from bestiary.app.drawing_queue import Drawing, DrawingQueue
from bestiary.app.errors import Stopped
from bestiary.app.events import Event as AppEvent
from bestiary.app.events import Failed, Picture, Progress, Waiting
from bestiary.app.orders import Order
from bestiary.app.server import create_app
from bestiary.app.studio import Studio, Tell, stoppable
from bestiary.diffusion.merging import Parent, merge
from bestiary.diffusion.stored_adapter import adapter_file
from bestiary.generation import Base, Generator, read_start_image
from bestiary.png_metadata import StartImage, read_settings
from bestiary.samplers import DrawingDefaults, Sampling

ROOT = Path(__file__).parents[2]


def test_the_page_draws_the_same_pixels_as_the_library(
    server: RunningPage, base_folder: Path, adapter_folder: Path
) -> None:
    from bestiary.diffusion.adapter import apply_adapter
    from bestiary.diffusion.base import load_pipeline
    from bestiary.diffusion.sampling import generate

    pipeline = load_pipeline(base_folder)

    def draw() -> Image.Image:
        sampling = Sampling("dpmsolver++", steps=2, guidance_scale=3.0)
        return generate(pipeline, ["a photo of a tiger"], [7], sampling, batch_size=1)[0]

    base = draw()
    apply_adapter(pipeline, adapter_folder)
    adapted = draw()
    drawn = pictures(server.draw(adapter="local:0", animal="老虎", compare=True))
    assert [list(image.get_flattened_data()) for image in drawn] == [
        list(image.get_flattened_data()) for image in (adapted, base)
    ]
    assert drawn[0].info["parameters"].startswith("a photo of a tiger\nSteps: 2, Sampler: DPM++ 2M, CFG scale: 3, Seed")
    assert json.loads(drawn[0].info["bestiary"])["adapter"].endswith("/stripes")
    again = pictures(server.draw())[0]  # the adapter of the previous order is removed
    assert not ImageChops.difference(again, drawn[1]).getbbox()


def test_weight_size_and_negative_prompt_are_drawn_and_recorded(server: RunningPage) -> None:
    order = {"adapter": "local:0", "width": 72, "height": 48, "negative_prompt": " a blurry\nphoto ", "compare": True}
    half, base = pictures(server.draw(**order, adapter_weight=0.5))
    none, base_again = pictures(server.draw(**order, adapter_weight=0))
    trained, _ = pictures(server.draw(**order))
    assert half.size == (72, 48)
    assert none.tobytes() == base.tobytes() == base_again.tobytes()
    assert len({image.tobytes() for image in (half, base, trained)}) == 3
    settings = json.loads(half.info["bestiary"])
    assert (settings["width"], settings["height"], settings["adapter_weight"]) == (72, 48, 0.5)
    assert settings["negative_prompt"] == "a blurry photo"
    assert "<lora:bestiary:0.5>\nNegative prompt: a blurry photo\n" in half.info["parameters"]
    assert "adapter_weight" not in json.loads(base.info["bestiary"])
    assert "<lora" not in trained.info["parameters"] + base.info["parameters"]


def test_a_second_adapter_is_drawn_and_recorded(server: RunningPage) -> None:
    champion = server.client.get("/api/catalog").json()["adapter"]
    order = {"adapter": "local:0", "animal": "", "prompt": "a tiger"}
    (alone,) = pictures(server.draw(**order))
    (one_zero,) = pictures(server.draw(**order, more_adapters=[{"adapter": champion, "weight": 0}]))
    both, base = pictures(server.draw(**order, compare=True, more_adapters=[{"adapter": champion, "weight": 0.5}]))
    assert one_zero.tobytes() == alone.tobytes()
    assert len({image.tobytes() for image in (alone, both, base)}) == 3
    settings, first = (json.loads(image.info["bestiary"]) for image in (both, alone))
    assert {key: settings[key] for key in first} == first
    (second,) = settings["more_adapters"]
    assert (second["adapter"], second["weight"]) == (champion, 0.5)
    assert "more_adapters" not in json.loads(base.info["bestiary"])
    (only,) = pictures(server.draw(**order | {"adapter": "none"}, more_adapters=[{"adapter": "local:0"}]))
    assert only.tobytes() == alone.tobytes()
    twice = server.refusal(**order, more_adapters=[{"adapter": "local:0"}])
    assert "are the same adapter" in twice["message"]
    assert str(ROOT) not in twice["message"]


def test_an_adapter_and_an_uploaded_one_that_contains_it_are_refused_together(
    server: RunningPage, base_folder: Path, adapter_folder: Path, tmp_path: Path
) -> None:
    other = make_adapter(base_folder, tmp_path / "other", 5)
    merged = merge([Parent("stripes", adapter_file(adapter_folder)), Parent("other", adapter_file(other))]).content
    offer = server.client.put("/api/adapters", params={"name": "both.safetensors"}, content=merged.to_bytes()).json()
    refusal = server.refusal(adapter="local:0", more_adapters=[{"adapter": offer["key"]}])
    stripes = "/".join(adapter_folder.parts[-2:])
    assert refusal["message"] == (
        f"both.safetensors already contains {stripes}, which would count twice. Leave out {stripes}."
    )
    assert (refusal["key"], refusal["values"]) == ("containsAdapter", {"outer": "both.safetensors", "inner": stripes})
    assert pictures(server.draw(adapter="local:0", more_adapters=[{"adapter": offer["key"], "weight": 0}]))


def test_the_base_beside_a_few_step_adapter_is_drawn_with_its_default_settings(
    server: RunningPage, base_folder: Path, tmp_path: Path
) -> None:
    file = adapter_file(make_adapter(base_folder, tmp_path / "other", 6))
    offer = server.client.put("/api/adapters", params={"name": "lcm.safetensors"}, content=file.read_bytes()).json()
    few = {"steps": 2, "guidance_scale": 1.0, "scheduler": "lcm"}
    own = DrawingDefaults().sampling
    events = server.draw(adapter=offer["key"], compare=True, **few)
    adapted, base = pictures(events)
    usual = {"steps": own.steps, "guidance_scale": own.guidance_scale, "scheduler": own.sampler}
    (alone,) = pictures(server.draw(**usual, guidance_interval=own.guidance_interval))
    assert base.tobytes() == alone.tobytes()
    settings = [json.loads(image.info["bestiary"]) for image in (adapted, base)]
    assert [{key: its[key] for key in few} for its in settings] == [few, usual]
    done = [(event["done"], event["total"]) for event in events if event["event"] == "progress"]
    assert done[1:3] == [(2, 2 + own.steps), (3, 2 + own.steps)]
    _, base = pictures(server.draw(adapter=offer["key"], adapter_weight=0, compare=True, **few))
    assert json.loads(base.info["bestiary"])["steps"] == 2  # with weight 0, it is the base
    large = few | {"width": 1024, "height": 1024, "count": 16, "steps": 10}  # few enough if the base had 10 steps, too
    refusal = server.refusal(adapter=offer["key"], compare=True, **large)
    assert (refusal["key"], refusal["values"]["steps"]) == ("tooMuchWork", str(16 * (10 + own.steps)))


def test_a_picture_starts_from_an_uploaded_image_as_on_the_command_line(
    server: RunningPage, base_folder: Path, tmp_path: Path
) -> None:
    buffer = io.BytesIO()
    Image.radial_gradient("L").resize((90, 70)).save(buffer, "PNG")
    uploaded = server.client.put("/api/images", params={"name": "../my photo.png"}, content=buffer.getvalue()).json()
    assert uploaded["name"] == "my photo.png"
    order = {"steps": 4, "image": uploaded["key"], "denoise": 0.5}
    events = server.draw(**order)
    assert [event["done"] for event in events if event["event"] == "progress"] == [1, 2]
    (drawn,) = pictures(events)
    (tmp_path / "drawn.png").write_bytes(base64.b64decode(events[-2]["image"].split(",")[1]))
    settings = read_settings(tmp_path / "drawn.png")
    assert settings.start == StartImage(hashlib.sha256(buffer.getvalue()).hexdigest(), 0.5)
    (tmp_path / "photo.png").write_bytes(buffer.getvalue())
    generator = Generator()
    generator.prepare(Base(str(base_folder)), [])
    _, image = read_start_image(tmp_path / "photo.png", 0.5)
    assert generator.draw(settings, image=image).tobytes() == drawn.tobytes()
    assert pictures(server.draw(**order | {"denoise": 1.0}))[0].tobytes() != drawn.tobytes()
    assert server.refusal(image="upload:guessed")["key"] == "goneImage"


@pytest.mark.parametrize("content", [b"", b"GIF89a broken", b"PK\x03\x04" + b"x" * 100])
def test_an_upload_that_is_no_image_is_refused_by_its_name(server: RunningPage, content: bytes) -> None:
    answer = server.client.put("/api/images", params={"name": "photo.png"}, content=content)
    assert (answer.status_code, answer.json()["key"]) == (422, "noImage")
    assert answer.json()["message"] == "photo.png cannot be read as a picture. Choose another file."


def test_the_catalog_lists_registered_versions_with_their_scores(server: RunningPage) -> None:
    catalog = server.client.get("/api/catalog").json()
    champion, local = catalog["adapters"]
    assert champion == {
        "key": "models:/bestiary/1", "kind": "registry", "label": "bestiary 1", "aliases": ["champion"],
        "scores": {"clip_score": 5.0, "margin": 5.0, "top1": 5.0}, "usual": json.loads(DEFAULTS.to_json()),
        "subjects": [
            {"folder": "owl", "name": "owl", "chinese": "猫头鹰"},
            {"folder": "tiger", "name": "tiger", "chinese": "老虎"},
        ],
        "side": 64, "sha256": champion["sha256"], "modules": {}, "few_step": False, "export": False,
    }  # fmt: skip
    assert (local["key"], local["subjects"], local["side"]) == ("local:0", None, None)
    assert catalog["adapter"] == champion["key"]


def test_switching_adapters_does_not_reload_the_base(server: RunningPage) -> None:
    champion = server.client.get("/api/catalog").json()["adapter"]
    server.draw()  # loads the base, unless it is loaded already
    answers = [server.draw(adapter=key) for key in (champion, "local:0", "none", champion)]
    assert not [event for events in answers for event in events if event["event"] == "loading"]
    drawn = [pictures(events)[0] for events in answers]
    assert drawn[0].tobytes() == drawn[3].tobytes()
    assert len({image.tobytes() for image in drawn}) == 3
    settings = json.loads(drawn[0].info["bestiary"])
    assert (settings["adapter"], settings["prompt"]) == (champion, "a drawing of a tiger")


@pytest.mark.slow
def test_the_guidance_interval_changes_the_picture_and_is_recorded_in_it(server: RunningPage) -> None:
    always, never = (pictures(server.draw(guidance_interval=interval))[0] for interval in (None, [900, 901]))
    assert always.tobytes() != never.tobytes() == pictures(server.draw(guidance_scale=1.0))[0].tobytes()
    assert json.loads(never.info["bestiary"])["guidance_interval"] == [900.0, 901.0]


def test_progress_and_previews_arrive_while_drawing(server: RunningPage) -> None:
    events = server.draw(steps=3, count=2)
    progress = [(event["done"], event["total"]) for event in events if event["event"] == "progress"]
    assert progress == [(number, 6) for number in range(1, 7)]
    previews = [event for event in events if event["event"] == "preview"]
    assert previews
    assert image_of(previews[0]).size == (64, 64)
    assert not [event for event in server.draw(preview=False) if event["event"] == "preview"]


@pytest.mark.parametrize("scheduler", ["ddpm", "ddim", "unipc", "euler", "euler-ancestral"])
def test_every_sampler_shows_previews(server: RunningPage, scheduler: str) -> None:
    events = server.draw(scheduler=scheduler)
    assert len(pictures(events)) == 1
    assert [event for event in events if event["event"] == "preview"]


def test_an_unknown_animal_is_drawn_as_written_with_a_hint(server: RunningPage) -> None:
    events = server.draw(animal="tigerr", steps=1)
    assert events[0] == {"event": "note", "unknown": "tigerr", "near": ["tiger"]}
    assert len(pictures(events)) == 1
    events = server.draw(animal="🐯 <b>", steps=1)
    assert next(event for event in events if event["event"] == "picture")["settings"]["prompt"] == "a photo of a 🐯 <b>"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"steps": 0}, "Steps"),
        ({"steps": True}, "Steps"),
        ({"width": 65, "height": 64}, "Width"),
        ({"width": 0}, "Width"),
        ({"height": 4096}, "Height"),
        ({"width": 2048, "height": 520}, "tooManyPixels"),
        ({"adapter_weight": -1}, "Adapter weight"),
        ({"adapter_weight": 3}, "Adapter weight"),
        ({"adapter_weight": "abc"}, "Adapter weight"),
        ({"negative_prompt": "x" * 2000}, "Negative prompt"),
        ({"negative_prompt": "word " * 100}, "tooManyTokens"),
        ({"negative_prompt": "blurry", "guidance_scale": 1}, "negativeUnused"),
        ({"prompt": "a tiger <lora:stripes:1>"}, "loraInPrompt"),
        ({"prompt": "x" * 10_000}, "Prompt"),
        ({"animal": " "}, "missing"),
        ({"scheduler": "magic"}, "Scheduler"),
        ({"seed": -1}, "Seed"),
        ({"count": 1000}, "Count"),
        ({"count": 16, "steps": 400, "width": 1360, "height": 768}, "tooMuchWork"),
        ({"count": 1, "steps": 400, "width": 1024, "height": 1024, "compare": True}, "tooMuchWork"),
        ({"colour": 1}, "Colour"),
        ({"guidance_interval": [0.3]}, "Guidance interval"),
        ({"guidance_interval": [-1, 5]}, "Guidance interval"),
        ({"guidance_interval": [5, 1]}, "Guidance interval"),
        ({"adapter": "/etc/passwd"}, "gone"),
        ({"adapter": "models:/bestiary@champion"}, "gone"),
        ({"adapter": "local:7"}, "gone"),
        ({"base": "/etc"}, "noBase"),
        ({"device": "cuda:9"}, "noDevice"),
        ({"scheduler": "lcm"}, "lcmBase"),
        ({"prompt": "word " * 100}, "tooManyTokens"),
    ],
)
def test_an_invalid_order_is_refused_in_one_sentence(
    server: RunningPage, change: dict[str, object], named: str
) -> None:
    refusal = server.refusal(**change)
    sentence = refusal["message"]
    assert named == refusal["key"] or sentence.startswith(named)
    assert sentence.count("\n") == 0
    assert len(sentence) < 200
    assert str(ROOT) not in sentence


def test_a_malformed_request_is_refused_in_one_sentence(server: RunningPage) -> None:
    for body in (b"", b"[]", b"\xff", b"{" * 1000, b"x" * 100_000):
        response = server.client.post("/api/draw", content=body)
        assert response.status_code == 422
        assert response.json()["message"].endswith(".")


# ---- several people ----


async def order_here(base_folder: Path) -> httpx.Response:
    """Order a picture from a server in this process, whose limits a test can change."""
    transport = httpx.ASGITransport(app=create_app(offerings(base_folder)))
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        return await client.post("/api/draw", json=ORDER)


@dataclass
class Painter:
    """A studio whose pictures cost no time."""

    pictures: int
    drawn: int = 0
    picture = Picture("adapter", "x" * 1000, {}, "", "tiger", "cpu")

    def draw(self, _: Order, tell: Tell, stopped: threading.Event, wants_preview: object) -> Iterator[None]:
        for number in range(self.pictures):
            if stopped.wait(0.02):
                raise Stopped
            tell(Progress(number, self.pictures, 0))
            tell(self.picture)
            self.drawn += 1
            yield


def test_simultaneous_orders_wait_and_each_gets_its_own_picture(server: RunningPage) -> None:
    answers: dict[int, list[Event]] = {}
    threads = [
        threading.Thread(target=lambda seed=seed: answers.update({seed: server.draw(seed=seed, steps=5)}))
        for seed in (1, 2, 3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert any(event["event"] == "waiting" for events in answers.values() for event in events)
    for seed, events in answers.items():
        assert {event["settings"]["seed"] for event in events if event["event"] == "picture"} == {seed}


def test_an_order_is_refused_while_the_queue_is_full(base_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bestiary.app.drawing_queue.MAX_WAITING", 0)

    response = asyncio.run(order_here(base_folder))
    assert response.status_code == 503
    assert response.headers["Retry-After"] == "5"
    assert response.json()["key"] == "queueFull"


def test_no_address_may_have_more_than_its_share_of_orders(base_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bestiary.app.drawing_queue.MAX_OPEN_PER_ADDRESS", 0)
    response = asyncio.run(order_here(base_folder))
    assert response.status_code == 429
    assert response.json()["key"] == "tooManyOpen"


def test_nobody_waits_for_a_reader_who_takes_nothing() -> None:
    async def draw() -> tuple[list[AppEvent], list[AppEvent]]:
        queue = DrawingQueue(cast(Studio, Painter(pictures=3)))
        idle, other = (queue.enter(Order.parse(json.dumps(ORDER).encode()), address) for address in ("a", "b"))
        others = [event async for event in other.events()]  # while nobody reads the first
        own = [event async for event in idle.events()]
        queue.close()
        return own, others

    own, others = asyncio.run(asyncio.wait_for(draw(), 60))
    assert [event.event for event in own if not isinstance(event, Progress)] == ["picture"] * 3 + ["done"]
    assert [event.event for event in others if not isinstance(event, Waiting)][-1] == "done"


def test_orders_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bestiary.app.drawing_queue.TURN_SECONDS", 0.0)
    painter = Painter(pictures=5)
    finished: list[str] = []

    async def draw() -> None:
        queue = DrawingQueue(cast(Studio, painter))
        long, short = (queue.enter(Order.parse(json.dumps(ORDER).encode()), address) for address in ("a", "b"))

        async def read(drawing: Drawing) -> None:
            async for event in drawing.events():
                if isinstance(event, Picture):
                    finished.append(drawing.address)

        await asyncio.gather(read(long), read(short))
        queue.close()

    asyncio.run(asyncio.wait_for(draw(), 60))
    assert "".join(finished) == "ab" * 5


def test_what_nobody_reads_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    painter = Painter(pictures=50)
    monkeypatch.setattr("bestiary.app.drawing_queue.MAX_UNREAD", 5 * len(painter.picture.image))

    async def draw() -> tuple[list[AppEvent], int]:
        queue = DrawingQueue(cast(Studio, painter))
        drawing = queue.enter(Order.parse(json.dumps(ORDER).encode()), "a")
        while not drawing.stopped.is_set():
            await asyncio.sleep(0.01)
        unread = drawing.unread
        events = [event async for event in drawing.events()]
        queue.close()
        return events, unread

    (last,), unread = asyncio.run(asyncio.wait_for(draw(), 60))
    assert isinstance(last, Failed)
    assert last.key == "slowReader"
    assert unread == 0
    assert painter.drawn < 50


def test_the_one_with_the_most_unread_pictures_gives_way(monkeypatch: pytest.MonkeyPatch) -> None:
    painter = Painter(pictures=4)
    monkeypatch.setattr("bestiary.app.drawing_queue.MAX_UNREAD_TOGETHER", 5 * len(painter.picture.image))

    async def draw() -> tuple[str, str]:
        queue = DrawingQueue(cast(Studio, painter))
        drawings = [queue.enter(Order.parse(json.dumps(ORDER).encode()), address) for address in ("a", "b")]
        while not drawings[0].stopped.is_set():
            await asyncio.sleep(0.01)
        ends = [[event.event async for event in drawing.events()][-1] for drawing in drawings]
        queue.close()
        return ends[0], ends[1]

    assert asyncio.run(asyncio.wait_for(draw(), 60)) == ("error", "done")


def test_a_drawing_stops_within_a_step(base_folder: Path) -> None:
    from bestiary.diffusion.base import load_pipeline
    from bestiary.diffusion.sampling import generate

    pipeline = load_pipeline(base_folder)
    calls = 0

    def check() -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise Stopped

    with pytest.raises(Stopped), stoppable(pipeline, check):
        generate(pipeline, ["a tiger"], [1], Sampling(steps=1), batch_size=1, progress=lambda *_: pytest.fail("late"))
    generate(pipeline, ["a tiger"], [1], Sampling(steps=1), batch_size=1)
    assert calls == 3  # nothing is left behind


def test_drawing_stops_when_the_browser_disconnects(server: RunningPage) -> None:
    with server.client.stream("POST", "/api/draw", json=ORDER | {"steps": 400, "count": 16}) as response:
        next(line for line in response.iter_lines() if '"progress"' in line)
    assert len(pictures(server.draw(steps=1))) == 1  # 6,400 steps would have delayed it by minutes


def test_the_server_stores_no_picture(server: RunningPage) -> None:
    server.draw()
    files = [Path(opened.path) for opened in psutil.Process(server.process.pid).open_files()]
    assert not [file for file in files if file.suffix in (".png", ".jpg", ".jpeg")]
    for path in ("/gallery", "/file=/etc/passwd", "/page/../studio.py", "/page/%2e%2e/server.py", "/page//etc/passwd"):
        assert server.client.get(path).status_code == 404


@pytest.mark.slow
def test_memory_stays_flat_over_fifty_generations(server: RunningPage) -> None:
    process = psutil.Process(server.process.pid)
    for number in range(5):
        server.draw(adapter=("local:0", "none")[number % 2], compare=True)
    before = process.memory_info().rss
    for number in range(50):
        server.draw(adapter=("local:0", "none")[number % 2], compare=True, seed=number)
    assert process.memory_info().rss < 1.05 * before
