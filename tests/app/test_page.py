"""The page itself: its texts, and how it behaves in a real Chromium."""

from __future__ import annotations

import json
import pickle
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image, ImageChops, ImageEnhance
from support.app import RunningPage

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


def test_both_languages_have_every_text_that_the_page_uses() -> None:
    english, chinese = (APP / "page" / "texts.js").read_text(encoding="utf-8").split("\n  zh: {")
    keys = [set(re.findall(r"(?:^|[{,])\s*(\w+): ['\"‘]", part, re.M)) for part in (english, chinese)]
    python = "".join(file.read_text(encoding="utf-8") for file in APP.glob("*.py"))
    refusals = set(re.findall(r'\bRefusedError\(\s*"(\w+)"', python))
    assert keys[0] | refusals == keys[1]
    html = (APP / "page" / "index.html").read_text(encoding="utf-8")
    scripts = "".join(file.read_text(encoding="utf-8") for file in (APP / "page").glob("*.js"))
    used = set(re.findall(r'data-(?:text|placeholder)="(\w+)"', html)) | set(re.findall(r"\btext\('(\w+)'", scripts))
    assert used <= keys[0]


def test_both_languages_fill_in_the_same_values() -> None:
    texts = (APP / "page" / "texts.js").read_text(encoding="utf-8").split("\n  zh: {")
    english, chinese = (dict(re.findall(r"(\w+): '([^']*)'", part)) for part in texts)
    python = "".join(file.read_text(encoding="utf-8") for file in APP.glob("*.py"))
    refusals = dict(re.findall(r'\bRefusedError\(\s*"(\w+)",\s*"([^"]*)"', python))
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
        page.get_by_role("button", name=f"Save {kind}").nth(number).click()
    image = Image.open(download.value.path())
    image.load()
    return download.value.suggested_filename, image


@pytest.mark.slow
def test_a_user_draws_adjusts_colours_and_saves(browser: Browser, server: RunningPage) -> None:
    tab = open_tab(browser, server)
    page = tab.page
    assert page.input_value("#adapter") == "models:/bestiary/1"
    assert page.inner_text("#scores") == (
        "Compared with the base: CLIP score +5.0 · margin over other subjects +5.0 · recognised (top-1) +5.0 %"
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
    assert page.locator("#animals li").first.inner_text().split() == ["羚羊", "antelope"]
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
    page.fill("#prompt", "word " * 100)
    draw_in(page)
    assert "tokens and the base reads" in page.inner_text("#message")
    page.fill("#prompt", "")
    draw_in(page)
    assert page.locator("#stage img[src=x], #gallery img[src=x]").count() == 0
    assert "not one of the 100 animals" in page.inner_text("#note")
    assert [error for error in tab.errors if "422" not in error] == []


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
