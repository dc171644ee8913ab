"""Take the README's picture of the web page: run `python page_picture.py` in tools/, after `dvc repro`.

Starts `bestiary app` on this project, draws in a real Chromium and writes docs/pictures/page.jpg.
"""

import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import sync_playwright

ROOT = Path(__file__).parents[1]
PICTURE = ROOT / "docs" / "pictures" / "page.jpg"
APP = [sys.executable, "-c", "from bestiary.cli import main; main()", "app", "--port", "0"]
ANIMALS = ("bee", "owl", "giraffe")
STEP_SECONDS = 300  # the longest that one step in the browser may take, a drawing included
STOP_SECONDS = 30  # the longest that the app may take to stop


def main() -> None:
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        sys.exit("Chromium is not installed. Install Debian's package `chromium`.")
    with (
        running_app() as address,
        sync_playwright() as playwright,
        playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"]) as browser,
    ):
        page = browser.new_page(viewport={"width": 1280, "height": 1100}, locale="en-US")
        page.set_default_timeout(1000 * STEP_SECONDS)
        page.goto(address)
        page.wait_for_selector("body.ready")
        page.fill("#seed", "7")
        for animal in ANIMALS:
            page.fill("#animal", animal)
            page.click("#draw")
            page.wait_for_selector("#draw", state="visible")
        page.locator("#gallery button").last.click()
        page.fill("#animal", ANIMALS[0])
        page.mouse.click(5, 5)
        page.wait_for_timeout(500)
        page.screenshot(path=PICTURE, type="jpeg", quality=85)
    print(PICTURE)


@contextmanager
def running_app() -> Iterator[str]:
    """Run `bestiary app` on this project and give its address. The app is stopped even when a step fails."""
    app = subprocess.Popen(APP, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert app.stdout is not None
    try:
        line = app.stdout.readline()
        if not line:
            sys.exit("`bestiary app` did not start. See its message above.")
        yield line.split()[1]
    finally:
        app.terminate()
        try:
            app.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            app.kill()
            app.wait()
        app.stdout.close()


if __name__ == "__main__":
    main()
