"""The page: what a press of the button answers, and the whole of it driven in a headless browser."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
from exhibits import dark_and_bright
from PIL import Image

import hf_robust
from hf_robust.demo.page import answer, import_gradio
from hf_robust.runs import demo

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
MISSING = [name for name in ("gradio", "playwright") if find_spec(name) is None] + ["chromium"] * (CHROMIUM is None)
SECRET = "hf_" + "S" * 34

EXHIBIT = dark_and_bright()


def test_a_press_of_the_button_shows_message_pictures_and_bars():
    picture = Image.new("RGB", (8, 8), (125, 125, 125))
    message, robust, plain = answer(EXHIBIT, picture, "pgd", "linf", 8, 20)
    assert "The plain model changed its answer from dark to bright; the robust one did not." in message
    assert "PGD-20, L-inf, eps 8/255." in message and "role='status'" in message
    assert "ACL &lt;1&gt;" in robust and plain.count("<img") == 3 and "change \u00d7 10" in plain
    noise = answer(EXHIBIT, picture.resize((40, 20)), "noise", "l2", 255, 1)
    assert "resized to 8 \u00d7 8" in noise[0] and "with noise" in noise[1]
    assert "Without an attack both models say dark." in answer(EXHIBIT, picture, "none", "linf", 8, 20)[0]


@pytest.mark.parametrize(
    ("picture", "levels", "message"),
    [
        (None, 8, "There is no image yet: upload one, or pick one of the examples."),
        (Image.new("RGB", (8, 8)), 5000, "eps must be more than 0 and at most 64 levels of 1/255, got 5000"),
        (Image.new("RGB", (8, 8)), None, "a field is empty: fill in both."),
    ],
)
def test_mistakes_are_sentences_and_nothing_else_is_shown(picture, levels, message):
    said, *rest = answer(EXHIBIT, picture, "pgd", "linf", levels, 20)
    assert message in said and "role='alert'" in said and rest == ["", ""]


def test_without_gradio_one_is_told_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(ImportError, match=re.escape("pip install 'hf_robust[demo]'")):
        import_gradio()
    assert os.environ["GRADIO_ANALYTICS_ENABLED"] == "False"


def test_nothing_named_and_nothing_trained_says_which_command_to_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="python examples/pretrain.py"):
        demo.main([])


def start(folder: Path) -> tuple[subprocess.Popen[bytes], str, Path]:
    """The page, served by a process of its own; its address and its log."""
    log, root = folder / "log.txt", str(Path(hf_robust.__file__).parents[1])
    environment = {**os.environ, "HF_TOKEN": SECRET, "GRADIO_TEMP_DIR": str(folder / "cache")}
    environment["PYTHONPATH"] = os.pathsep.join([root, environment.get("PYTHONPATH", "")])
    with log.open("wb") as out:
        command = [sys.executable, str(Path(__file__).with_name("exhibits.py"))]
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=out, stderr=subprocess.STDOUT)
    until = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < until:
        if found := re.search(r"The demo is at (\S+);", log.read_text()):
            return process, found[1], log
        time.sleep(0.1)
    process.kill()
    process.wait()
    raise AssertionError(log.read_text())


@pytest.mark.skipif(bool(MISSING), reason=f"a browser is driven with these, which are absent: {', '.join(MISSING)}")
def test_the_page_in_a_browser(tmp_path):
    from playwright.sync_api import expect, sync_playwright

    Image.new("RGB", (60, 40), (90, 20, 20)).save(tmp_path / "red.png")
    process, address, log = start(tmp_path)
    elsewhere: list[str] = []
    try:
        with sync_playwright() as tools:
            browser = tools.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
            page = browser.new_page(viewport={"width": 1280, "height": 900})
            page.set_default_timeout(30_000)
            page.on("request", lambda request: elsewhere.append(request.url) if not _own(request.url) else None)
            page.goto(address)
            message, changed = page.locator("#message"), page.locator("#plain figcaption").nth(1)
            expect(message).to_contain_text("PGD-20, L-inf, eps 8/255.", timeout=30_000)
            expect(message).to_contain_text("The plain model changed its answer from dark to bright;")
            expect(changed).to_have_text("change \u00d7 10")
            assert page.locator("#robust img").count() == 3 and page.locator("#plain .fill").count() == 4
            first = page.locator("#robust img").first.get_attribute("src")

            page.locator("#examples button.thumbnail-item").nth(1).click()
            expect(page.locator("#robust img").first).not_to_have_attribute("src", first, timeout=30_000)

            page.locator("#norm label").nth(1).click()
            expect(message).to_contain_text("PGD-20, L2, eps 255/255.", timeout=30_000)
            page.locator("#kind label").nth(1).click()
            expect(message).to_contain_text("Random noise, L2, eps 255/255.", timeout=30_000)

            page.locator(
                "#picture button[aria-label='Remove Image'], #picture .icon-button-wrapper button"
            ).first.click()
            page.locator("#attack").click()
            expect(message.get_by_role("alert")).to_contain_text("There is no image yet", timeout=30_000)
            assert page.locator("#robust img").count() == 0
            page.locator("#picture input[type=file]").set_input_files(tmp_path / "red.png")
            expect(page.locator("#picture img")).to_be_visible(timeout=30_000)
            page.locator("#attack").click()
            expect(message).to_contain_text(
                "60 \u00d7 40 pixels; its middle was cut out and resized to 8", timeout=30_000
            )

            page.set_viewport_size({"width": 420, "height": 900})
            assert page.evaluate("document.documentElement.scrollWidth") <= 420  # nothing sticks out on a telephone
            assert str(tmp_path) not in page.inner_text("body") and SECRET not in page.content()
            browser.close()
    finally:
        process.terminate()
        process.wait(20)
    assert not elsewhere, "the page asks other machines"
    said = log.read_text()
    assert SECRET not in said and "Traceback" not in said


def _own(url: str) -> bool:
    return url.startswith(("http://127.0.0.1:", "http://localhost:", "ws://127.0.0.1:", "data:", "blob:"))
