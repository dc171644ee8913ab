"""The web page, on a real server, and in a real Chromium where there is one."""

from __future__ import annotations

import asyncio
import base64
import errno
import io
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from PIL import Image, ImageChops, ImageEnhance
from support.registry import USUAL, make_adapter, submit

from bestiary.app import create_app, launch, read_credentials
from bestiary.app.server import MOST_UPLOADING
from bestiary.errors import BestiaryError
from bestiary.subjects import ANIMALS

ROOT = Path(__file__).parents[1]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = [
    f"--{flag}"
    for flag in (
        "no-sandbox",
        "disable-gpu",
        "disable-quic",
        "no-first-run",
        "disable-background-networking",
        "disable-component-update",
        "disable-sync",
    )
]
ORDER = {"animal": "tiger", "steps": 2, "guidance_scale": 3.0, "scheduler": "dpmsolver++", "seed": 7}
SERVE = """
import json, sys
from bestiary.app import launch
launch(ready=lambda address: print(address, flush=True), **json.loads(sys.argv[1]))
"""


class Server:
    """The page's server in a process of its own, as a user starts it."""

    def __init__(self, folder: Path, **options: Any) -> None:
        self.log = folder / "server.log"
        environment = {**os.environ, "DVC_ROOT": str(folder)}
        environment.pop("MLFLOW_TRACKING_URI", None)
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", SERVE, json.dumps({"port": 0, **options})],
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=environment,
            )
        assert self.process.stdout is not None
        self.address = self.process.stdout.readline().strip()
        assert self.address.startswith("http"), self.log.read_text()
        self.client = httpx.Client(base_url=self.address, timeout=300)

    def draw(self, **changes: Any) -> list[dict[str, Any]]:
        response = self.client.post("/api/draw", json=ORDER | changes)
        assert response.status_code == 200, response.text
        return [json.loads(line) for line in response.text.splitlines()]

    def refusal(self, **changes: Any) -> str:
        """The one sentence with which an order is refused, at once or while it is drawn."""
        response = self.client.post("/api/draw", json=ORDER | changes)
        if response.status_code == 200:
            last = json.loads(response.text.splitlines()[-1])
            assert last["event"] == "error"
        else:
            assert response.status_code == 422
            last = response.json()
        assert "Traceback" not in response.text
        return str(last["message"])

    def stop(self) -> None:
        self.client.close()
        self.process.send_signal(signal.SIGINT)
        self.process.wait(120)


def pictures(events: list[dict[str, Any]]) -> list[Image.Image]:
    assert events[-1]["event"] == "done", events[-1]
    return [image_of(event) for event in events if event["event"] == "picture"]


def image_of(event: dict[str, Any]) -> Image.Image:
    image = Image.open(io.BytesIO(base64.b64decode(event["image"].split(",")[1])))
    image.load()
    return image


@pytest.fixture(scope="module")
def adapter_folder(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    import torch

    from bestiary.diffusion.adapter import inject, save_adapter
    from bestiary.diffusion.base import load_unet

    folder = tmp_path_factory.mktemp("adapters") / "stripes"
    unet = load_unet(base_folder)
    generator = torch.Generator().manual_seed(0)
    for parameter in inject(unet, rank=2, alpha=4, dropout=0.0, targets=["to_q", "to_v"], seed=0):
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    save_adapter(unet, folder, {"base": str(base_folder)})
    return folder


@pytest.fixture(scope="module")
def registry_folder(base_folder: Path, empty_database: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project whose registry holds one version: a champion, 5 points better than the base."""
    folder = tmp_path_factory.mktemp("project")
    shutil.copy2(empty_database, folder / "mlflow.db")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DVC_ROOT", str(folder))
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        submit(folder, base_folder, make_adapter(base_folder, folder / "registered", 1, strength=0.3))
    return folder


@pytest.fixture(scope="module")
def server(base_folder: Path, adapter_folder: Path, registry_folder: Path) -> Iterator[Server]:
    server = Server(registry_folder, base=str(base_folder), adapters=[str(adapter_folder)], max_upload_mib=1)
    yield server
    server.stop()


# ---- drawing ----


def test_a_picture_from_the_page_is_the_one_that_the_library_draws(
    server: Server, base_folder: Path, adapter_folder: Path
) -> None:
    from bestiary.diffusion.adapter import apply_adapter
    from bestiary.diffusion.base import load_pipeline
    from bestiary.diffusion.sampling import generate

    pipeline = load_pipeline(base_folder)
    arguments: dict[str, Any] = {
        "steps": 2, "guidance_scale": 3.0, "scheduler": "dpmsolver++", "batch_size": 1,
    }  # fmt: skip
    base = generate(pipeline, ["a photo of a tiger"], [7], **arguments)[0]
    apply_adapter(pipeline, adapter_folder)
    adapted = generate(pipeline, ["a photo of a tiger"], [7], **arguments)[0]
    drawn = pictures(server.draw(adapter="local:0", animal="老虎", compare=True))
    assert [list(image.get_flattened_data()) for image in drawn] == [
        list(image.get_flattened_data()) for image in (adapted, base)
    ]
    assert drawn[0].info["parameters"].startswith("a photo of a tiger\nSteps: 2, Sampler: DPM++ 2M, CFG scale: 3, Seed")
    assert json.loads(drawn[0].info["bestiary"])["adapter"].endswith("/stripes")
    again = pictures(server.draw())[0]  # without an adapter: nothing of the last order is left
    assert not ImageChops.difference(again, drawn[1]).getbbox()


def test_a_registered_version_is_offered_with_its_scores_and_switching_adapters_keeps_the_base(server: Server) -> None:
    catalog = server.client.get("/api/catalog").json()
    champion, local = catalog["adapters"]
    assert champion == {
        "key": "models:/bestiary/1", "kind": "registry", "label": "bestiary 1", "aliases": ["champion"],
        "scores": {"clip_score": "5.0", "top1": "5.0"}, "usual": json.loads(USUAL.to_json()),
    }  # fmt: skip
    assert local["key"] == "local:0"
    assert catalog["adapter"] == champion["key"]
    server.draw()  # by now the base is there
    answers = [server.draw(adapter=key) for key in (champion["key"], "local:0", "none", champion["key"])]
    assert not [event for events in answers for event in events if event["event"] == "loading"]
    drawn = [pictures(events)[0] for events in answers]
    assert drawn[0].tobytes() == drawn[3].tobytes()
    assert len({image.tobytes() for image in drawn}) == 3
    settings = json.loads(drawn[0].info["bestiary"])
    assert (settings["adapter"], settings["prompt"]) == (champion["key"], "a drawing of a tiger")


@pytest.mark.slow
def test_an_interval_of_guidance_makes_another_picture_and_is_kept_with_it(server: Server) -> None:
    always, never = (pictures(server.draw(guidance_interval=interval))[0] for interval in (None, [900, 901]))
    assert always.tobytes() != never.tobytes() == pictures(server.draw(guidance_scale=1.0))[0].tobytes()
    assert json.loads(never.info["bestiary"])["guidance_interval"] == [900.0, 901.0]


def test_progress_previews_and_time_left_are_told_on_the_way(server: Server) -> None:
    events = server.draw(steps=3, count=2)
    progress = [(event["done"], event["total"]) for event in events if event["event"] == "progress"]
    assert progress == [(number, 6) for number in range(1, 7)]
    previews = [event for event in events if event["event"] == "preview"]
    assert previews
    assert image_of(previews[0]).size == (64, 64)
    assert not [event for event in server.draw(preview=False) if event["event"] == "preview"]


@pytest.mark.parametrize("scheduler", ["ddpm", "ddim", "unipc", "euler"])
def test_every_scheduler_has_a_preview(server: Server, scheduler: str) -> None:
    events = server.draw(scheduler=scheduler)
    assert len(pictures(events)) == 1
    assert [event for event in events if event["event"] == "preview"]


def test_an_unknown_animal_is_drawn_as_written_with_a_hint(server: Server) -> None:
    events = server.draw(animal="tigerr", steps=1)
    assert events[0] == {"event": "note", "unknown": "tigerr", "near": ["tiger"]}
    assert len(pictures(events)) == 1
    events = server.draw(animal="🐯 <b>", steps=1)
    assert next(event for event in events if event["event"] == "picture")["settings"]["prompt"] == "a photo of a 🐯 <b>"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"steps": 0}, "Steps"),
        ({"steps": True}, "Steps"),
        ({"resolution": 257}, "Resolution"),
        ({"resolution": 4096}, "Resolution"),
        ({"prompt": "x" * 10_000}, "Prompt"),
        ({"animal": " "}, "Name an animal"),
        ({"scheduler": "magic"}, "Scheduler"),
        ({"seed": -1}, "Seed"),
        ({"count": 1000}, "Count"),
        ({"colour": 1}, "Colour"),
        ({"guidance_interval": [0.3]}, "Guidance interval"),
        ({"guidance_interval": [-1, 5]}, "Guidance interval"),
        ({"guidance_interval": [5, 1]}, "Guidance interval: the first noise level must be below the second"),
        ({"adapter": "/etc/passwd"}, "not here"),
        ({"adapter": "models:/bestiary@champion"}, "not here"),
        ({"adapter": "local:7"}, "not here"),
        ({"base": "/etc"}, "not on offer"),
        ({"device": "cuda:9"}, "no device"),
    ],
)
def test_an_order_that_cannot_be_filled_gets_one_sentence(server: Server, change: dict[str, Any], says: str) -> None:
    sentence = server.refusal(**change)
    assert says in sentence
    assert sentence.count("\n") == 0
    assert len(sentence) < 200
    assert str(ROOT) not in sentence


def test_nonsense_instead_of_an_order_gets_one_sentence(server: Server) -> None:
    for body in (b"", b"[]", b"\xff", b"{" * 1000, b"x" * 100_000):
        response = server.client.post("/api/draw", content=body)
        assert response.status_code == 422
        assert response.json()["message"].endswith(".")


# ---- several people ----


def test_one_picture_is_drawn_at_a_time_and_each_goes_to_who_ordered_it(server: Server) -> None:
    answers: dict[int, list[dict[str, Any]]] = {}
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


def test_the_drawing_stops_when_its_browser_goes_away(server: Server) -> None:
    with server.client.stream("POST", "/api/draw", json=ORDER | {"steps": 400, "count": 16}) as response:
        next(line for line in response.iter_lines() if '"progress"' in line)
    assert len(pictures(server.draw(steps=1))) == 1  # 6,400 steps would have held it up for minutes


def test_the_server_keeps_no_picture(server: Server) -> None:
    server.draw()
    files = [Path(opened.path) for opened in psutil.Process(server.process.pid).open_files()]
    assert not [file for file in files if file.suffix in (".png", ".jpg", ".jpeg")]
    for path in ("/gallery", "/file=/etc/passwd", "/page/../studio.py", "/page/%2e%2e/server.py", "/page//etc/passwd"):
        assert server.client.get(path).status_code == 404


@pytest.mark.slow
def test_memory_stays_flat_over_fifty_generations(server: Server) -> None:
    process = psutil.Process(server.process.pid)
    for number in range(5):
        server.draw(adapter=("local:0", "none")[number % 2], compare=True)
    before = process.memory_info().rss
    for number in range(50):
        server.draw(adapter=("local:0", "none")[number % 2], compare=True, seed=number)
    assert process.memory_info().rss < 1.05 * before


# ---- uploads ----


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch /tmp/bestiary-was-here",)


def test_an_uploaded_adapter_draws_for_who_uploaded_it_only(server: Server, adapter_folder: Path) -> None:
    data = (adapter_folder / "pytorch_lora_weights.safetensors").read_bytes()
    response = server.client.put("/api/adapters", params={"name": "../../my lora.safetensors"}, content=data)
    offer = response.json()
    assert offer["label"] == "my lora.safetensors"
    mine = pictures(server.draw(adapter=offer["key"]))[0]
    local = pictures(server.draw(adapter="local:0"))[0]
    assert not ImageChops.difference(mine, local).getbbox()
    assert offer["key"] not in server.client.get("/api/catalog").text


def test_an_uploaded_file_of_kohyas_kind_draws_the_same(server: Server, adapter_folder: Path, tmp_path: Path) -> None:
    from bestiary.diffusion.conversion import convert

    data = convert(adapter_folder, tmp_path / "kohya.safetensors", "kohya").read_bytes()
    offer = server.client.put("/api/adapters", params={"name": "kohya.safetensors"}, content=data).json()
    uploaded, local = (pictures(server.draw(adapter=key))[0] for key in (offer["key"], "local:0"))
    assert not ImageChops.difference(uploaded, local).getbbox()


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", pickle.dumps(Evil()), b"\x08" + b"\0" * 7 + b"{}      "])
def test_a_file_that_is_no_adapter_is_refused(server: Server, content: bytes) -> None:
    response = server.client.put("/api/adapters", params={"name": "evil.safetensors"}, content=content)
    assert response.status_code == 422
    assert "evil.safetensors" in response.json()["message"]
    assert "/tmp" not in response.text
    assert not Path("/tmp/bestiary-was-here").exists()


def test_an_upload_onto_a_full_disk_gets_a_sentence(base_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    async def upload() -> httpx.Response:
        transport = httpx.ASGITransport(app=create_app(str(base_folder), adapters=[]))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            monkeypatch.setattr(Path, "open", full)
            return await client.put("/api/adapters", params={"name": "a.safetensors"}, content=b"x")

    response = asyncio.run(upload())
    assert response.status_code == 422
    assert response.json()["message"] == "There is no space left here for a.safetensors."


def test_an_upload_for_another_base_is_said_and_drawn_when_the_base_is_chosen(
    server: Server, adapter_folder: Path
) -> None:
    from safetensors import safe_open
    from safetensors.torch import save

    with safe_open(adapter_folder / "pytorch_lora_weights.safetensors", "pt") as file:
        about = file.metadata() | {"bestiary": json.dumps({"base": "somebody/else", "base_sha256": "0" * 64})}
        data = save({key: file.get_tensor(key) for key in file.keys()}, about)  # noqa: SIM118
    key = server.client.put("/api/adapters", params={"name": "far.safetensors"}, content=data).json()["key"]
    sentence = server.refusal(adapter=key)
    assert sentence.startswith("far.safetensors was trained on another base than models/base: on somebody/else with")
    assert len(pictures(server.draw(adapter=key, base="models/base"))) == 1


def test_another_kind_of_file_or_a_large_one_is_refused(server: Server) -> None:
    response = server.client.put("/api/adapters", params={"name": "lora.pt"}, content=b"x")
    assert response.json()["message"] == "Only .safetensors files can be uploaded."
    response = server.client.put("/api/adapters", params={"name": "a.safetensors"}, content=b"x" * (2**20 + 1))
    assert response.json()["message"] == "a.safetensors is larger than 1 MiB."


def test_only_some_may_upload_at_once(base_folder: Path) -> None:
    async def upload() -> list[str]:
        transport = httpx.ASGITransport(app=create_app(str(base_folder), adapters=[]))
        everybody_is_here = asyncio.Event()
        arrived = 0

        async def slowly() -> AsyncIterator[bytes]:
            nonlocal arrived
            arrived += 1
            if arrived == MOST_UPLOADING:
                everybody_is_here.set()
            await everybody_is_here.wait()
            yield b"x"

        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            responses = await asyncio.gather(
                *(
                    client.put("/api/adapters", params={"name": f"{n}.safetensors"}, content=slowly())
                    for n in range(MOST_UPLOADING + 1)
                )
            )
            again = await client.put("/api/adapters", params={"name": "late.safetensors"}, content=b"x")
        return [response.json()["message"] for response in [*responses, again]]

    *tried, refused, late = asyncio.run(asyncio.wait_for(upload(), 60))
    assert refused == "Other files are being uploaded: try again in a few minutes."
    assert all("safetensors" in message for message in [*tried, late])  # no adapter, but looked at


def test_an_upload_that_does_not_arrive_makes_room(base_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bestiary.app.server.UPLOAD_SECONDS", 0.3)

    async def silent() -> AsyncIterator[bytes]:
        yield b"x"
        await asyncio.sleep(30)

    async def upload() -> str:
        transport = httpx.ASGITransport(app=create_app(str(base_folder), adapters=[]))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            response = await client.put("/api/adapters", params={"name": "slow.safetensors"}, content=silent())
        return str(response.json()["message"])

    assert asyncio.run(asyncio.wait_for(upload(), 20)) == "slow.safetensors took longer than 0.005 minutes to arrive."


# ---- who may come in ----


def test_another_host_demands_a_password(base_folder: Path) -> None:
    with pytest.raises(BestiaryError, match="BESTIARY_AUTH"):
        launch(str(base_folder), host="0.0.0.0")


def test_a_missing_base_and_a_taken_port_are_told(server: Server, base_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(BestiaryError, match="does not exist"):
        launch(str(tmp_path / "missing"))
    with pytest.raises(BestiaryError, match="cannot listen"):
        launch(str(base_folder), port=int(server.address.rsplit(":", 1)[1]))


@pytest.mark.slow
def test_with_a_password_nothing_is_shown_without_it(base_folder: Path, tmp_path: Path) -> None:
    guarded = Server(tmp_path, base=str(base_folder), host="0.0.0.0", auth=["ada", "pass:wörd"])
    try:
        address = guarded.address.replace("0.0.0.0", "127.0.0.1")
        for path in ("/", "/api/catalog", "/page/page.js"):
            assert httpx.get(address + path).status_code == 401
        assert httpx.get(address, auth=("ada", "wrong")).status_code == 401
        assert httpx.get(address, auth=("ada", "pass:wörd")).status_code == 200
    finally:
        guarded.stop()


def test_credentials_come_from_the_environment_or_a_private_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("BESTIARY_AUTH", raising=False)
    assert read_credentials() is None
    monkeypatch.setenv("BESTIARY_AUTH", "ada:pass:word")
    assert read_credentials() == ("ada", "pass:word")
    file = tmp_path / "auth"
    file.write_text("eve:secret\n")
    file.chmod(0o644)
    with pytest.raises(BestiaryError, match="chmod 600"):
        read_credentials(file)
    file.chmod(0o600)
    assert read_credentials(file) == ("eve", "secret")
    file.write_text("nonsense")
    with pytest.raises(BestiaryError, match="user:password"):
        read_credentials(file)
    with pytest.raises(BestiaryError, match="cannot be read"):
        read_credentials(tmp_path / "missing")


def test_other_sites_and_foreign_names_are_kept_out(server: Server) -> None:
    assert server.client.get("/", headers={"Host": "evil.example"}).status_code == 403
    assert server.client.get("/api/catalog", headers={"Sec-Fetch-Site": "cross-site"}).status_code == 403
    assert server.client.get("/", headers={"Sec-Fetch-Site": "cross-site"}).status_code == 200  # a link
    policy = server.client.get("/").headers["content-security-policy"]
    assert policy.startswith("default-src 'none'")


# ---- the page's words ----


def test_both_languages_have_every_word_that_the_page_uses() -> None:
    page = ROOT / "src" / "bestiary" / "app" / "page"
    words = (page / "texts.js").read_text(encoding="utf-8")
    english, chinese = words.split("\n  zh: {")
    keys = [set(re.findall(r"(?:^|[{,])\s*(\w+): ['\"‘]", part, re.M)) for part in (english, chinese)]
    python = "".join((page.parent / name).read_text(encoding="utf-8") for name in ("server.py", "studio.py"))
    refusals = set(re.findall(r'\bRefusedError\(\s*"(\w+)"', python))
    assert keys[0] | refusals == keys[1]
    html, script = ((page / name).read_text(encoding="utf-8") for name in ("index.html", "page.js"))
    used = set(re.findall(r'data-(?:text|placeholder)="(\w+)"', html)) | set(re.findall(r"\btext\('(\w+)'", script))
    assert used <= keys[0]


# ---- in Chromium ----


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("there is no Chromium here")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


def open_page(browser: Any, server: Server, **options: Any) -> Any:
    page = browser.new_context(**{"locale": "en-US", **options}).new_page()
    page.set_default_timeout(600_000)  # milliseconds; on a machine that does other work too
    page.elsewhere, page.errors = [], []
    page.on(
        "request",
        lambda request: (
            None if request.url.startswith((server.address, "blob:", "data:")) else page.elsewhere.append(request.url)
        ),
    )
    page.on("pageerror", lambda error: page.errors.append(str(error)))
    page.on("console", lambda message: page.errors.append(message.text) if message.type == "error" else None)
    page.goto(server.address)
    page.wait_for_selector("body.ready")
    page.fill("#steps", "2")
    return page


def draw_in(page: Any) -> None:
    page.click("#draw")  # which hides it until the drawing is done
    page.wait_for_selector("#draw", state="visible")


def save(page: Any, kind: str, number: int = 0) -> tuple[str, Image.Image]:
    with page.expect_download() as download:
        page.get_by_role("button", name=f"Save {kind}").nth(number).click()
    image = Image.open(download.value.path())
    image.load()
    return download.value.suggested_filename, image


@pytest.mark.slow
def test_a_user_draws_colours_and_saves(browser: Any, server: Server, tmp_path: Path) -> None:
    page = open_page(browser, server)
    assert page.input_value("#adapter") == "models:/bestiary/1"
    assert page.inner_text("#scores") == "Against the base: CLIP score +5.0 · named right +5.0 %"
    page.select_option("#adapter", "local:0")
    assert page.locator("#scores").is_hidden()
    # What nobody has set follows the adapter: a registered one is drawn as it was evaluated.
    assert page.input_value("#guidance") == "7.5"
    page.select_option("#adapter", "models:/bestiary/1")
    assert (page.input_value("#guidance"), page.input_value("#scheduler")) == ("3", "ddim")
    assert page.input_value("#steps") == "2"  # which open_page has set
    page.select_option("#adapter", "local:0")
    page.fill("#animal", "瓢")  # with the keyboard alone
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    assert page.input_value("#animal") == "ladybug"
    page.fill("#seed", "7")
    assert not page.is_checked("#random")
    page.fill("#count", "2")
    draw_in(page)
    assert page.locator("#gallery li").count() == 2
    assert page.locator("#pictures canvas").count() == 2  # the base beside the adapter
    name, original = save(page, "PNG")
    assert name == "ladybug-8.png"
    assert json.loads(original.info["bestiary"])["prompt"] == "a photo of a ladybug"

    for colour, value in (("contrast", "1.5"), ("saturation", "0.3"), ("brightness", "1.2")):
        page.locator(f"#{colour}").fill(value)
    _, coloured = save(page, "PNG")
    expected = original.convert("RGB")
    for enhance, factor in ((ImageEnhance.Contrast, 1.5), (ImageEnhance.Color, 0.3), (ImageEnhance.Brightness, 1.2)):
        expected = enhance(expected).enhance(factor)
    difference = ImageChops.difference(coloured.convert("RGB"), expected).getextrema()
    assert max(high for _, high in difference) <= 3  # Pillow rounds after each of the three
    assert json.loads(coloured.info["bestiary"])["saturation"] == 0.3
    assert coloured.info["parameters"] == original.info["parameters"]
    name, jpeg = save(page, "JPEG", 1)
    assert (name, jpeg.format, jpeg.size) == ("ladybug-8-base.jpg", "JPEG", original.size)

    page.locator("#gallery button").nth(1).click()  # the older one, with its own settings and colours
    page.locator("#settings dd", has_text=re.compile("^7$")).wait_for()
    assert page.input_value("#contrast") == "1"
    page.click("#reuse")
    assert page.input_value("#seed") == "7"
    assert page.elsewhere == []
    assert page.errors == []


@pytest.mark.slow
def test_the_language_is_the_browsers_and_can_be_switched(browser: Any, server: Server) -> None:
    page = open_page(browser, server, locale="zh-CN")
    assert page.inner_text("#draw") == "开始绘制"
    page.click("#animal")
    assert page.locator("#animals li").count() == len(ANIMALS)
    assert page.locator("#animals li").first.inner_text().split() == ["羚羊", "antelope"]
    page.set_input_files("#upload", {"name": "a.pt", "mimeType": "", "buffer": b"x"})
    page.locator("#message", has_text="只能上传 .safetensors 文件。").wait_for()
    page.click("#language")
    assert page.inner_text("#draw") == "Draw"
    page.reload()
    page.wait_for_selector("body.ready")
    assert page.inner_text("#draw") == "Draw"  # it remembers


@pytest.mark.slow
def test_cancelling_stops_and_the_next_drawing_works(browser: Any, server: Server) -> None:
    page = open_page(browser, server)
    page.fill("#animal", "tiger")
    page.fill("#steps", "400")
    page.fill("#count", "16")
    page.click("#draw")
    page.wait_for_selector(".forming img")
    page.keyboard.press("Escape")
    page.wait_for_selector("#draw", state="visible")
    assert "Cancelled." in page.inner_text("#note")
    page.fill("#steps", "1")
    page.fill("#count", "1")
    draw_in(page)
    assert page.locator("#pictures canvas").count() == 2


@pytest.mark.slow
def test_what_goes_wrong_is_told_in_the_page(browser: Any, server: Server) -> None:
    page = open_page(browser, server)
    page.click("#draw")
    assert page.inner_text("#message") == "Name an animal, or write a prompt."
    page.fill("#animal", "<img src=x>")
    page.click("details summary")
    page.fill("#steps", "0")
    page.click("#draw")
    assert page.inner_text("#message") == "Steps must be between 1 and 400."
    page.set_input_files("#upload", {"name": "a.safetensors", "mimeType": "", "buffer": pickle.dumps(Evil())})
    page.locator("#message", has_text="a.safetensors").wait_for()
    page.fill("#steps", "1")
    page.fill("#prompt", "x" * 10_000)
    page.click("#draw")
    assert page.inner_text("#message") == "Prompt is too long: 1000 characters at most."
    page.fill("#prompt", "word " * 100)
    draw_in(page)
    assert "tokens and the base reads" in page.inner_text("#message")
    page.fill("#prompt", "")
    draw_in(page)
    assert page.locator("#stage img[src=x], #gallery img[src=x]").count() == 0
    assert "none of the 100 animals" in page.inner_text("#note")
    assert [error for error in page.errors if "422" not in error] == []


@pytest.mark.slow
def test_two_browsers_see_only_their_own_pictures(browser: Any, server: Server) -> None:
    pages = [open_page(browser, server) for _ in range(2)]
    for page, animal in zip(pages, ("tiger", "zebra"), strict=True):
        page.fill("#animal", animal)
        page.fill("#steps", "10")
        page.click("#draw")
    for page, animal in zip(pages, ("tiger", "zebra"), strict=True):
        page.wait_for_selector("#draw", state="visible")
        assert page.locator("#gallery li").count() == 1
        assert animal in page.inner_text("#gallery")


@pytest.mark.slow
def test_a_phone_shows_everything_without_scrolling_sideways(browser: Any, server: Server) -> None:
    page = open_page(browser, server, viewport={"width": 360, "height": 740}, has_touch=True, is_mobile=True)
    page.tap("#animal")
    page.locator("#animals li").nth(3).tap()
    draw_in(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    assert page.locator("#pictures canvas").first.bounding_box()["width"] > 120
