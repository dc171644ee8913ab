"""The page itself: its texts, and how it behaves in a real Chromium."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import pickle
import re
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image, ImageChops, ImageEnhance
from support.app import RunningPage
from support.registry import DEFAULTS

from bestiary.app.errors import SENTENCES
from bestiary.png_metadata import PictureSettings, read_settings, write_png
from bestiary.samplers import DrawingDefaults, Sampling
from bestiary.subjects import ANIMALS

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

APP = Path(__file__).parents[2] / "src" / "bestiary" / "app"
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

CHAMPION_STEPS = DEFAULTS.sampling.steps


def test_both_languages_have_every_text_that_the_page_uses() -> None:
    english, chinese = (APP / "page" / "texts.js").read_text(encoding="utf-8").split("\n  zh: {")
    keys = [set(re.findall(r"(?:^|[{,])\s*(\w+): ['\"‘]", part, re.M)) for part in (english, chinese)]
    python = "".join(file.read_text(encoding="utf-8") for file in APP.glob("*.py"))
    refusals = set(re.findall(r'\bRefusedError\(\s*"(\w+)"', python))
    assert keys[0] | refusals | set(SENTENCES) == keys[1]
    html = (APP / "page" / "index.html").read_text(encoding="utf-8")
    scripts = "".join(file.read_text(encoding="utf-8") for file in (APP / "page").glob("*.js"))
    used = set(re.findall(r'data-(?:text|placeholder)="(\w+)"', html)) | set(re.findall(r"\btext\('(\w+)'", scripts))
    assert used <= keys[0]


def test_both_languages_fill_in_the_same_values() -> None:
    texts = (APP / "page" / "texts.js").read_text(encoding="utf-8").split("\n  zh: {")
    english, chinese = (dict(re.findall(r"(\w+): '([^']*)'", part)) for part in texts)
    python = "".join(file.read_text(encoding="utf-8") for file in APP.glob("*.py"))
    refusals = dict(re.findall(r'\bRefusedError\(\s*"(\w+)",\s*"([^"]*)"', python))
    for key, pattern in SENTENCES.items():
        assert set(re.findall(r"{(\w+)}", chinese[key])) <= set(re.compile(pattern).groupindex), key
    for key, sentence in {**english, **refusals}.items():
        assert set(re.findall(r"{\w+}", sentence)) == set(re.findall(r"{\w+}", chinese[key])), key


# ---- in Chromium ----


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    sync_api = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("Chromium is not installed")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@dataclass
class Tab:
    """A browser tab with the page, and what went wrong in it."""

    page: Page
    errors: list[str] = field(default_factory=list)  # of scripts, and on the console
    requests_elsewhere: list[str] = field(default_factory=list)


def open_tab(browser: Browser, server: RunningPage, **options: Any) -> Tab:  # options of Playwright's new_context
    page = browser.new_context(**{"locale": "en-US", **options}).new_page()
    page.set_default_timeout(600_000)  # milliseconds; the machine may be busy
    tab = Tab(page)

    def check_address(url: str) -> None:
        if not url.startswith((server.address, "blob:", "data:")):
            tab.requests_elsewhere.append(url)

    page.on("request", lambda request: check_address(request.url))
    page.on("pageerror", lambda error: tab.errors.append(str(error)))
    page.on("console", lambda message: tab.errors.append(message.text) if message.type == "error" else None)
    page.goto(server.address)
    page.wait_for_selector("body.ready")
    page.fill("#steps", "2")
    return tab


def open_page(browser: Browser, server: RunningPage, **options: Any) -> Page:
    return open_tab(browser, server, **options).page


def draw_in(page: Page) -> None:
    page.click("#draw")  # hidden until the drawing is done
    page.wait_for_selector("#draw", state="visible")


def save(page: Page, kind: str, number: int = 0) -> tuple[str, Image.Image]:
    with page.expect_download() as download:
        chosen = page.locator(".entry.chosen, .entry:only-child")
        chosen.get_by_role("button", name=f"Save {kind}").nth(number).click()
    image = Image.open(download.value.path())
    image.load()
    return download.value.suggested_filename, image


@pytest.mark.slow
def test_a_user_draws_adjusts_colours_and_saves(browser: Browser, server: RunningPage) -> None:
    tab = open_tab(browser, server)
    page = tab.page
    assert page.input_value("#adapter") == "models:/bestiary/1"
    assert page.inner_text("#scores") == (
        "Compared with the base: CLIP score +5.0 · margin over other subjects +5.0 · recognised (top-1) +5.0\u00a0%"
    )
    page.select_option("#adapter", "local:0")
    assert page.locator("#scores").is_hidden()
    # Fields that the user has not changed follow the adapter: a registered one draws as it was evaluated.
    assert page.input_value("#guidance") == "7.5"
    page.select_option("#adapter", "models:/bestiary/1")
    assert (page.input_value("#guidance"), page.input_value("#scheduler")) == ("3", "ddim")
    assert page.input_value("#steps") == "2"  # set by open_page
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
    assert page.locator("#pictures canvas").count() == 4  # the base beside the adapter, twice
    page.locator("#gallery button").first.click()
    page.locator("#pictures .entry.chosen", has_text="8").wait_for()
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
    assert np.max(difference) <= 3  # Pillow rounds after each of the three
    assert json.loads(coloured.info["bestiary"])["saturation"] == 0.3
    assert coloured.info["parameters"] == original.info["parameters"]
    name, jpeg = save(page, "JPEG", 1)
    assert (name, jpeg.format, jpeg.size) == ("ladybug-8-base.jpg", "JPEG", original.size)

    page.locator("#gallery button").nth(1).click()  # the older one, with its own settings and colours
    page.locator("#settings dd", has_text=re.compile("^7$")).wait_for()
    assert page.input_value("#contrast") == "1"
    page.click("#reuse")
    assert page.input_value("#seed") == "7"
    assert tab.requests_elsewhere == []
    assert tab.errors == []


@pytest.mark.slow
def test_the_page_starts_in_the_browsers_language_and_remembers_a_switch(browser: Browser, server: RunningPage) -> None:
    page = open_page(browser, server, locale="zh-CN")
    assert page.inner_text("#draw") == "开始绘制"
    page.click("#animal")
    assert page.locator("#animals li").count() == len(ANIMALS)
    assert page.locator("#animals li").first.inner_text().split() == ["猫头鹰", "owl"]  # taught, so it comes first
    page.set_input_files("#upload", {"name": "a.pt", "mimeType": "", "buffer": b"x"})
    page.locator("#message", has_text="只能上传 .safetensors 文件").wait_for()
    page.click("#language")
    assert page.inner_text("#draw") == "Draw"
    page.reload()
    page.wait_for_selector("body.ready")
    assert page.inner_text("#draw") == "Draw"


@pytest.mark.slow
def test_the_next_drawing_works_after_a_cancelled_one(browser: Browser, server: RunningPage) -> None:
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
def test_mistakes_are_explained_on_the_page(browser: Browser, server: RunningPage) -> None:
    tab = open_tab(browser, server)
    page = tab.page
    page.click("#draw")
    assert page.inner_text("#message") == "Name an animal or write a prompt."
    page.fill("#animal", "<img src=x>")
    page.click("details summary")
    page.fill("#steps", "0")
    page.click("#draw")
    assert page.inner_text("#message") == "Steps must be between 1 and 400."
    page.set_input_files("#upload", {"name": "a.safetensors", "mimeType": "", "buffer": pickle.dumps({})})
    page.locator("#message", has_text="a.safetensors").wait_for()
    page.fill("#steps", "1")
    page.fill("#prompt", "x" * 10_000)
    page.click("#draw")
    assert page.inner_text("#message") == "Prompt is too long. Use at most 1000 characters."
    page.fill("#prompt", "x," * 400)
    draw_in(page)
    assert "tokens and the base reads" in page.inner_text("#message")
    page.fill("#prompt", "")
    draw_in(page)
    assert page.locator("#stage img[src=x], #gallery img[src=x]").count() == 0
    assert "not one of the 100 animals" in page.inner_text("#note")
    assert [error for error in tab.errors if "422" not in error] == []


@pytest.mark.slow
def test_subjects_that_the_adapter_was_taught_come_first(browser: Browser, server: RunningPage) -> None:
    page = open_page(browser, server)
    assert page.get_attribute("#animal", "placeholder") == "owl, tiger, …"
    page.click("#animal")
    names = page.locator("#animals li").all_inner_texts()
    assert [name.split() for name in names[:2]] == [["owl", "猫头鹰"], ["tiger", "老虎"]]
    assert len(names) == len(ANIMALS)
    assert all("not taught" in name for name in names[2:])
    page.fill("#animal", "A Tiger")
    page.keyboard.press("Tab")
    assert page.locator("#untaught").is_hidden()
    page.fill("#animal", "ti")
    assert page.locator("#untaught").is_hidden()  # it may become a tiger
    page.fill("#animal", "zebra")
    page.keyboard.press("Tab")
    assert "bestiary 1 was not taught “zebra”" in page.inner_text("#untaught")
    page.click("#language")
    assert "bestiary 1 没有学过“zebra”" in page.inner_text("#untaught")
    page.select_option("#adapter", "local:0")  # nobody knows what it was taught
    assert page.locator("#untaught").is_hidden()
    page.click("#animal")
    assert "未教过" not in page.inner_text("#animals")


@pytest.mark.slow
def test_a_size_far_from_the_trained_one_is_warned_of(browser: Browser, server: RunningPage) -> None:
    page = open_page(browser, server)
    assert page.locator("#size-warning").is_hidden()
    page.select_option("#resolution", "128")
    assert "This adapter was trained at 64 px. At 128 px" in page.inner_text("#size-warning")
    page.select_option("#adapter", "none")
    assert "The base was trained at 64 px" in page.inner_text("#size-warning")
    page.select_option("#resolution", "64")
    assert page.locator("#size-warning").is_hidden()


@pytest.mark.slow
def test_weight_shape_and_negative_prompt_are_drawn_and_used_again(browser: Browser, server: RunningPage) -> None:
    page = browser.new_page(locale="en-GB")
    page.goto(server.address)
    page.wait_for_selector("body.ready")
    page.select_option("#adapter", "local:0")
    page.click("summary")
    assert page.inner_text("output[for=weight]") == "1.00"
    page.fill("#weight", "0.5")
    assert page.inner_text("output[for=weight]") == "0.50"
    assert page.inner_text("#shape option:checked") == "1:1 · 64 × 64 px"
    page.select_option("#shape", "3:2")
    page.fill("#negative", "a blurry photo")
    page.fill("#animal", "tiger")
    page.fill("#steps", "2")
    page.click("#draw")
    page.wait_for_selector("#draw:visible")
    shown = page.inner_text("#settings")
    assert "72 × 48 px" in shown
    assert "a blurry photo" in shown
    assert page.eval_on_selector("#pictures canvas", "canvas => [canvas.width, canvas.height]") == [72, 48]
    page.fill("#negative", "")
    page.fill("#weight", "1")
    page.select_option("#shape", "9:16")
    page.click("#reuse")
    values = [page.input_value(f"#{field}") for field in ("weight", "shape", "negative")]
    assert values == ["0.5", "3:2", "a blurry photo"]
    page.select_option("#adapter", "none")
    assert page.is_disabled("#weight")
    page.close()


@pytest.mark.slow
def test_a_second_adapter_is_drawn_and_used_again(browser: Browser, server: RunningPage) -> None:
    page = open_page(browser, server)
    page.click("summary")
    assert page.locator("#second-weight").is_hidden()
    page.select_option("#second", "local:0")
    page.fill("#second-weight", "0.5")
    assert page.inner_text("output[for=second-weight]") == "0.50"
    page.fill("#animal", "tiger")
    page.fill("#seed", "7")
    draw_in(page)
    shown = page.inner_text("#settings")
    assert re.search(r"Second adapter\s+.*/stripes · \w{8}\s+Weight of the second adapter\s+0\.5", shown)
    assert re.match(r"bestiary 1 \+ .*/stripes · \w{8} · 7$", page.inner_text("#gallery .by"))
    page.select_option("#second", "none")
    assert page.locator("#second-weight").is_hidden()
    page.click("#reuse")
    assert (page.input_value("#second"), page.input_value("#second-weight")) == ("local:0", "0.5")
    page.select_option("#second", "models:/bestiary/1")
    draw_in(page)
    assert "are the same adapter" in page.inner_text("#message")


@pytest.mark.slow
def test_a_few_step_adapter_chosen_second_sets_the_steps_and_the_sampler(
    browser: Browser, server: RunningPage, adapter_folder: Path
) -> None:
    page = open_page(browser, server)
    page.fill("#steps", str(CHAMPION_STEPS))  # as the champion was evaluated, so the page may change it
    page.click("summary")
    fast = (adapter_folder / "pytorch_lora_weights.safetensors").read_bytes()
    page.set_input_files("#upload", {"name": "TCD-fast.safetensors", "mimeType": "", "buffer": fast})
    page.wait_for_selector("#note:has-text('changes modules')")
    uploaded = page.input_value("#adapter")
    fields = ("steps", "guidance", "scheduler")
    page.select_option("#adapter", "models:/bestiary/1")
    alone = [page.input_value(f"#{field}") for field in fields]
    assert alone == [str(CHAMPION_STEPS), "3", "ddim"]
    page.select_option("#second", uploaded)
    assert [page.input_value(f"#{field}") for field in fields] == ["4", "1", "tcd"]
    page.fill("#animal", "tiger")
    page.check("#compare")
    draw_in(page)
    own = DrawingDefaults().sampling
    captions = page.locator("#pictures figcaption span").all_inner_texts()
    assert captions == [
        "With the adapter",
        f"Base only, with its default settings: {own.steps} steps, guidance scale {own.guidance_scale:g}",
    ]
    assert sampling_by_weight(page, "secondWeight") == [[CHAMPION_STEPS, 3, "ddim"], [4, 1, "tcd"]]
    page.select_option("#second", "none")
    assert [page.input_value(f"#{field}") for field in fields] == alone
    page.select_option("#adapter", uploaded)
    assert sampling_by_weight(page, "weight") == [[own.steps, own.guidance_scale, own.sampler], [4, 1, "tcd"]]
    page.close()


def sampling_by_weight(page: Page, axis: str) -> list[list[object]]:
    """The steps, guidance scale and sampler that the page orders for the weights 0 and 1 of an adapter."""
    page.select_option("#axis", axis)
    page.fill("#values", "0, 1")
    found: list[list[object]] = page.evaluate("""async () => {
        const { ordersOf } = await import('/page/comparing.js'), { readOrder } = await import('/page/order.js');
        return ordersOf(readOrder()).map(([order]) => [order.steps, order.guidance_scale, order.scheduler]);
    }""")
    return found


@pytest.mark.slow
def test_an_export_is_ordered_as_it_can_be_drawn(browser: Browser, server: RunningPage) -> None:
    page = open_page(browser, server)
    catalog = page.request.get(f"{server.address}/api/catalog").json()
    key = catalog["adapters"][0]["key"]
    catalog["adapters"][0]["export"] = True
    catalog["devices"] = ["cuda", "cpu"]
    page.route("**/api/catalog", lambda route: route.fulfill(json=catalog))
    page.route("**/api/draw", lambda route: route.abort())
    page.reload()
    page.wait_for_selector("body.ready")
    assert page.is_checked("#compare")
    page.select_option("#adapter", "none")
    assert page.is_enabled("#compare")
    page.select_option("#adapter", key)
    assert page.is_disabled("#compare")
    assert page.is_disabled("#weight")
    page.fill("#animal", "tiger")
    with page.expect_request("**/api/draw") as sent:
        page.click("#draw")
    order = sent.value.post_data_json
    assert order is not None
    assert (order["adapter"], order["compare"], order["adapter_weight"], order["device"]) == (key, False, 1, "cpu")
    page.close()


def drop(page: Page, onto: str, name: str, content: bytes, kind: str = "image/png") -> None:
    """Drop a file on an element, as somebody who drags it from a folder."""
    make = """([name, kind, content]) => {
        const files = new DataTransfer();
        files.items.add(new File([Uint8Array.from(atob(content), (each) => each.charCodeAt(0))], name, { type: kind }));
        return files;
    }"""
    dropped = page.evaluate_handle(make, [name, kind, base64.b64encode(content).decode()])
    page.dispatch_event(onto, "dragenter", {"dataTransfer": dropped})
    assert page.locator("#drop-hint").is_visible()
    page.dispatch_event(onto, "drop", {"dataTransfer": dropped})
    page.locator("#drop-hint").wait_for(state="hidden")


@pytest.mark.slow
def test_a_dropped_picture_is_what_drawing_starts_from(browser: Browser, server: RunningPage) -> None:
    tab = open_tab(browser, server)
    page, buffer = tab.page, io.BytesIO()
    Image.radial_gradient("L").save(buffer, "PNG")
    assert page.locator("#start").is_hidden()  # behind More settings
    drop(page, "#pictures", "photo.png", buffer.getvalue())
    page.locator("#start-image").wait_for()
    page.fill("#denoise", "0.3")
    page.fill("#steps", "4")
    page.fill("#animal", "tiger")
    page.fill("#seed", "7")
    draw_in(page)
    assert re.search(r"Denoising strength.*\s+0\.3", page.inner_text("#settings"))
    _, first = save(page, "PNG")
    page.click("#image-clear")
    assert page.locator("#denoise").is_hidden()
    draw_in(page)
    assert "Denoising" not in page.inner_text("#settings")
    page.locator("#gallery button").nth(1).click()
    page.locator("#settings", has_text="Denoising").wait_for()
    page.click("#reuse")
    assert page.input_value("#denoise") == "0.3"
    draw_in(page)
    assert save(page, "PNG")[1].tobytes() == first.tobytes()
    drop(page, "#pictures", "notes.txt", b"words", "text/plain")
    page.locator("#message", has_text="notes.txt is neither a .safetensors file nor a picture.").wait_for()
    assert tab.requests_elsewhere == tab.errors == []


@pytest.mark.slow
def test_a_dropped_picture_of_bestiary_loads_its_settings_and_a_dropped_adapter_is_chosen(
    browser: Browser, server: RunningPage, adapter_folder: Path
) -> None:
    page = open_page(browser, server)
    page.click("summary")
    page.fill("#animal", "老虎")
    page.fill("#seed", "11")
    page.select_option("#second", "local:0")
    page.fill("#second-weight", "0.5")
    page.fill("#weight", "0.8")
    page.select_option("#shape", "3:2")
    page.fill("#negative", "模糊")
    page.click("#draw")
    page.wait_for_selector("#draw", state="visible")
    with page.expect_download() as download:
        page.get_by_role("button", name="Save PNG").first.click()
    picture = Path(download.value.path()).read_bytes()
    drawn = Image.open(io.BytesIO(picture))
    page.reload()
    page.wait_for_selector("body.ready")
    drop(page, "#stage", "tiger.png", picture)
    page.locator("#note", has_text="The settings of tiger.png are loaded.").wait_for()
    fields = (
        "adapter",
        "second",
        "weight",
        "second-weight",
        "shape",
        "negative",
        "seed",
        "prompt",
        "steps",
        "guidance",
    )
    assert [page.input_value(f"#{each}") for each in fields] == [
        "models:/bestiary/1", "local:0", "0.8", "0.5", "3:2", "模糊", "11", "a drawing of a tiger", "2", "3",
    ]  # fmt: skip
    draw_in(page)
    assert save(page, "PNG")[1].tobytes() == drawn.tobytes()
    drop(page, "#start", "tiger.png", picture)
    page.locator("#start-image").wait_for()
    odd = write_png(drawn, replace(read_settings_of(picture), sampling=Sampling("ddim", 3, width=88, height=40)))
    drop(page, "#stage", "odd.png", odd)
    page.locator("#note", has_text="odd.png").wait_for()
    assert page.inner_text("#shape option:checked") == "88 × 40 px"
    settings = read_settings_of(picture)
    third = replace(settings, more_adapters=(*settings.more_adapters, settings.adapters[0]))
    drop(page, "#stage", "three.png", write_png(drawn, third))
    page.locator("#note", has_text="so it leaves out models:/bestiary/1.").wait_for()
    drop(page, "#stage", "mine.safetensors", (adapter_folder / "pytorch_lora_weights.safetensors").read_bytes(), "")
    page.locator("#adapter option:checked", has_text="mine.safetensors").wait_for(state="attached")


def read_settings_of(picture: bytes) -> PictureSettings:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "picture.png")
        file.write_bytes(picture)
        return read_settings(file)


@pytest.mark.slow
def test_values_of_a_setting_are_compared_side_by_side_and_saved_as_one_picture(
    browser: Browser, server: RunningPage
) -> None:
    tab = open_tab(browser, server)
    page = tab.page
    page.click("summary")
    page.select_option("#axis", "weight")
    page.fill("#animal", "tiger")
    page.fill("#seed", "7")
    page.fill("#count", "2")
    for values, words in (("", "Write 1 to 8 values"), ("0.4, 3", "must be between 0 and 2")):
        page.fill("#values", values)
        page.click("#draw")
        assert words in page.inner_text("#message")
    page.fill("#values", "0, 0.5,1")
    draw_in(page)
    captions = page.locator("#pictures figcaption span").all_inner_texts()
    assert captions == [f"Adapter weight {weight} · {seed}" for weight in ("0", "0.5", "1") for seed in (7, 8)]
    places = [page.locator("#pictures canvas").nth(number).bounding_box() for number in range(6)]
    assert all(places)
    columns, rows = ([round(place[side] / 4) for place in places if place] for side in ("x", "y"))
    assert columns[0] == columns[1] < columns[2] == columns[3] < columns[4] == columns[5]
    assert rows[0] == rows[2] == rows[4] < rows[1] == rows[3] == rows[5]
    with page.expect_download() as download:
        page.click("#save-grid")
    assert download.value.suggested_filename == "tiger-7-grid.png"
    grid = Image.open(download.value.path())
    assert grid.size == (140 + 3 * (64 + 8), 40 + 2 * (64 + 8))
    page.locator("#gallery button").nth(0).click()  # weight 1, seed 8
    _, last = save(page, "PNG")
    assert grid.convert("RGB").crop((284, 112, 348, 176)).tobytes() == last.convert("RGB").tobytes()
    page.click("#reuse")
    assert (page.input_value("#axis"), page.input_value("#weight"), page.input_value("#seed")) == ("", "1", "8")
    assert tab.errors == []


@pytest.mark.slow
def test_a_prompt_that_wins_over_the_subject_is_visible(browser: Browser, server: RunningPage) -> None:
    page = open_page(browser, server)
    page.fill("#animal", "tiger")
    page.click("details summary")
    page.fill("#prompt", "a <b>red</b> kite")
    page.click("details summary")  # closed: the field itself is hidden
    assert "a <b>red</b> kite" in page.inner_text("#prompt-wins")
    draw_in(page)
    assert "a <b>red</b> kite" in page.inner_text("#gallery")
    assert "tiger" not in page.inner_text("#gallery")
    page.click("#prompt-clear")
    assert page.locator("#prompt-wins").is_hidden()
    draw_in(page)
    assert page.locator("#gallery .name").all_inner_texts() == ["tiger", "a <b>red</b> kite"]


@pytest.mark.slow
def test_all_pictures_of_an_order_are_shown_and_cards_tell_their_adapters_apart(
    browser: Browser, server: RunningPage, adapter_folder: Path
) -> None:
    tab = open_tab(browser, server)
    page = tab.page
    page.fill("#animal", "tiger")
    page.fill("#seed", "7")
    page.fill("#count", "5")
    draw_in(page)
    captions = page.locator("#pictures figcaption span").all_inner_texts()
    assert captions == [f"{kind} · {seed}" for seed in range(7, 12) for kind in ("With the adapter", "Base only")]
    page.fill("#count", "1")
    page.select_option("#adapter", "local:0")
    draw_in(page)
    page.set_input_files("#upload", str(adapter_folder / "pytorch_lora_weights.safetensors"))
    page.locator("#adapter option:checked", has_text="pytorch_lora_weights.safetensors").wait_for(state="attached")
    draw_in(page)
    page.select_option("#adapter", "none")
    draw_in(page)
    assert page.locator("#pictures canvas").count() == 1
    sha = hashlib.sha256((adapter_folder / "pytorch_lora_weights.safetensors").read_bytes()).hexdigest()[:8]
    local = f"{adapter_folder.parent.name}/{adapter_folder.name} · {sha} · 7"
    by = page.locator("#gallery .by").all_inner_texts()
    assert by[:4] == ["Base only · 7", f"pytorch_lora_weights.safetensors · {sha} · 7", local, "bestiary 1 · 11"]
    page.locator("#gallery button").nth(4).click()
    page.locator(".chosen figcaption span", has_text="With the adapter · 10").wait_for()
    assert page.locator("#pictures canvas").count() == 10
    page.locator("#pictures .entry").first.click(position={"x": 20, "y": 20})
    page.locator("#settings dd", has_text=re.compile("^7$")).wait_for()
    cut = """[...document.querySelectorAll('#gallery .name, #gallery .by, figcaption span, #settings dd')]
        .filter((node) => node.scrollWidth > node.clientWidth + 1).map((node) => node.textContent)"""
    assert page.evaluate(cut) == []
    fits = "[...document.querySelectorAll('#gallery img')].map((image) => getComputedStyle(image).objectFit)"
    assert set(page.evaluate(fits)) == {"contain"}
    assert tab.errors == []


@pytest.mark.slow
def test_two_adapters_of_one_name_can_be_told_apart_in_the_list(
    browser: Browser, server: RunningPage, adapter_folder: Path, registry_folder: Path
) -> None:
    page = open_page(browser, server)
    for folder in (adapter_folder, registry_folder / "registered"):
        page.set_input_files("#upload", str(folder / "pytorch_lora_weights.safetensors"))
        page.wait_for_timeout(500)
    texts = page.locator("#adapter option").all_inner_texts()
    assert len(set(texts)) == len(texts) == 5


@pytest.mark.slow
def test_an_error_is_shown_in_the_language_chosen_even_later(browser: Browser, server: RunningPage) -> None:
    page = open_page(browser, server, locale="zh-CN")
    page.click("details summary")
    for order, chinese, english in (
        ({"#prompt": "x," * 400}, "个词元", "tokens and the base reads"),
        ({"#prompt": "x" * 2000}, "提示词太长", "Prompt is too long"),
        ({"#prompt": "x", "#steps": "400", "#count": "16"}, "一次请求的所有图片", "All pictures of an order"),
    ):
        for field_, value in order.items():
            page.fill(field_, value)
        page.select_option("#resolution", "1024")
        draw_in(page)
        page.locator("#message", has_text=chinese).wait_for()
        page.click("#language")
        assert english in page.inner_text("#message")
        page.click("#language")
        assert chinese in page.inner_text("#message")
    page.set_input_files(
        "#upload", {"name": "a.safetensors", "mimeType": "", "buffer": b"\x08" + b"\0" * 7 + b"{}      "}
    )
    page.locator("#message", has_text="无法使用这个文件").wait_for()


@pytest.mark.slow
def test_two_browsers_see_only_their_own_pictures(browser: Browser, server: RunningPage) -> None:
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
def test_a_phone_needs_no_sideways_scrolling(browser: Browser, server: RunningPage) -> None:
    page = open_page(browser, server, viewport={"width": 360, "height": 740}, has_touch=True, is_mobile=True)
    page.tap("#animal")
    page.locator("#animals li").nth(3).tap()
    draw_in(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    box = page.locator("#pictures canvas").first.bounding_box()
    assert box
    assert box["width"] > 120
