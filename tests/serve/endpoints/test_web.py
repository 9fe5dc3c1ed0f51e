"""The page at `/`, used in Debian's Chromium as people do: by hand, by keyboard, on a phone, with and without a key."""

from __future__ import annotations

import os
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from playwright.sync_api import Browser, Locator, Page, expect, sync_playwright

from tests.serve.conftest import Server, running, wait_for
from wan_runtime.serve import keys
from wan_runtime.serve.endpoints.web import PAGES, POLICY

CHROMIUM = shutil.which("chromium")
SECONDS = 120_000  # milliseconds, for a clip on a busy machine
PROMPT = "a large red circle moving right on a black background"
Open = Callable[..., Any]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip(
            "there is no `chromium` on this machine, so the page is not looked at (apt install chromium)"
        )
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@contextmanager
def visit(browser: Browser, server: Server, **options: Any) -> Iterator[Page]:
    """The page in a fresh profile. It must ask nobody but the server, and nothing may be wrong with it at the end."""
    context = browser.new_context(viewport={"width": 1200, "height": 800}, **options)
    page = context.new_page()
    wrong: list[str] = []
    foreign: list[str] = []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda said: wrong.append(said.text) if said.type in ("error", "warning") else None)
    page.on(
        "request",
        lambda sent: None if sent.url.startswith((server.url, "blob:")) else foreign.append(sent.url),
    )
    page.goto(server.url)
    yield page
    context.close()
    refused = "the server responded with a status of"  # the page says itself what was refused, and why
    assert [text for text in wrong if refused not in text] == []
    assert foreign == []


def ask(page: Page, prompt: str = PROMPT, *, steps: int = 2, frames: int = 5) -> None:
    """Fills the slate for a quick clip."""
    expect(page.locator("#roll")).to_be_enabled(timeout=SECONDS)
    page.fill("#prompt", prompt)
    page.locator("summary").click()
    for name, value in (("num_inference_steps", steps), ("width", 64), ("height", 64)):
        page.fill(f"#{name}", str(value))
    page.locator("#num_frames").fill(str(frames))
    page.locator("summary").click()


def only(page: Page, prompt: str, kind: str = "done") -> Locator:
    """The one take of this prompt, once it is of this kind."""
    take = page.locator(f"#takes .take.{kind}").filter(has_text=prompt)
    expect(take).to_have_count(1, timeout=SECONDS)
    return take


def plays(take: Locator) -> bool:
    """Whether the clip's frames can be shown and time goes on."""
    script = "v => v.play().then(() => new Promise(done => v.addEventListener('timeupdate', () => done(v.videoWidth))))"
    return bool(take.locator("video").evaluate(script) == 64)


def test_a_clip_is_asked_for_watched_played_and_saved(
    browser: Browser, server: Server, tmp_path: Path
) -> None:
    with visit(browser, server, accept_downloads=True) as page:
        ask(page, f"{PROMPT}, watched", steps=30)
        page.get_by_role("button", name="Roll").click()
        running = only(page, f"{PROMPT}, watched", "going")
        expect(running.locator(".state")).to_contain_text(re.compile(r"step \d+ of 30"), timeout=SECONDS)
        bar = running.get_by_role("progressbar")
        assert 0 <= int(bar.get_attribute("aria-valuenow") or -1) <= 30
        done = only(page, f"{PROMPT}, watched")
        assert plays(done)
        with page.expect_download() as download:
            done.get_by_role("button", name="Download").click()
        download.value.save_as(tmp_path / "clip.mp4")
        assert (tmp_path / "clip.mp4").read_bytes()[4:8] == b"ftyp"
        done.get_by_role("button", name="Delete").click()
        expect(page.locator(".take").filter(has_text="watched")).to_have_count(0)


def test_a_reload_in_the_middle_loses_nothing(browser: Browser, server: Server) -> None:
    with visit(browser, server) as page:
        ask(page, f"{PROMPT}, reloaded", steps=80)
        page.get_by_role("button", name="Roll").click()
        going = only(page, f"{PROMPT}, reloaded", "going")
        expect(going.locator(".state")).to_contain_text("step", timeout=SECONDS)
        page.reload()
        going = only(page, f"{PROMPT}, reloaded", "going")
        expect(going.locator(".state")).to_contain_text("step", timeout=SECONDS)
        expect(page.locator("#prompt")).to_have_value(f"{PROMPT}, reloaded")
        assert plays(only(page, f"{PROMPT}, reloaded"))


def test_the_keyboard_is_enough_and_a_take_can_be_made_again_with_its_seed(
    browser: Browser, server: Server
) -> None:
    with visit(browser, server) as page:
        ask(page, "")
        page.locator("body").focus()
        page.keyboard.press("/")
        expect(page.locator("#prompt")).to_be_focused()
        page.keyboard.type(f"{PROMPT}, typed")
        page.fill("#seed", "4711")
        page.keyboard.press("Control+Enter")
        done = only(page, f"{PROMPT}, typed")
        page.fill("#seed", "")
        page.fill("#prompt", "something else")
        again = done.get_by_role("button", name="Again with this seed")
        again.focus()
        page.keyboard.press("Enter")
        expect(page.locator("#seed")).to_have_value("4711")
        expect(page.locator("#prompt")).to_have_value(f"{PROMPT}, typed")
        expect(page.locator("#prompt")).to_be_focused()
        shape = page.get_by_role("radio").first
        shape.focus()
        page.keyboard.press("Space")
        assert (shape.get_attribute("value") or "").startswith(page.locator("#width").input_value())


def test_a_running_job_is_cancelled(browser: Browser, server: Server) -> None:
    with visit(browser, server) as page:
        ask(page, f"{PROMPT}, cancelled", steps=200, frames=17)
        page.get_by_role("button", name="Roll").click()
        going = only(page, f"{PROMPT}, cancelled", "going")
        going.get_by_role("button", name="Cancel").click()
        expect(only(page, f"{PROMPT}, cancelled", "failed").locator(".state")).to_have_text("cancelled")


def test_what_the_server_refuses_is_said_beside_the_form(browser: Browser, server: Server) -> None:
    with visit(browser, server) as page:
        ask(page)
        page.fill("#width", "8192")
        page.get_by_role("button", name="Roll").click()
        expect(page.get_by_role("alert").filter(has_text="8192")).to_be_visible()
        expect(page.locator("#width")).to_be_focused()


def test_a_prompt_is_text_whatever_it_looks_like(browser: Browser, server: Server) -> None:
    hostile = "<img src=x onerror=document.title=1> <script>document.title=2</script>"
    with visit(browser, server) as page:
        ask(page, hostile)
        page.get_by_role("button", name="Roll").click()
        take = only(page, hostile)
        assert take.locator("h3").inner_text() == hostile
        assert (page.title(), take.locator("h3 *").count()) == ("wan-serve", 0)


def test_a_phone_shows_everything_in_its_width(browser: Browser, server: Server) -> None:
    with visit(browser, server, is_mobile=True, has_touch=True, color_scheme="dark") as page:
        page.set_viewport_size({"width": 360, "height": 740})
        ask(page, "w" * 300)
        assert page.evaluate("document.documentElement.scrollWidth") == 360
        page.get_by_role("button", name="Roll").tap()
        assert plays(only(page, "w" * 300))
        assert page.evaluate("document.documentElement.scrollWidth") == 360


@pytest.mark.long
def test_with_keys_the_page_asks_for_one_and_shows_the_keys_own_clips(
    browser: Browser, tmp_path: Path
) -> None:
    file = tmp_path / "keys.json"
    key, record = keys.make("alice")
    keys.add(file, record)
    with running(tmp_path / "data", "--api-keys", str(file)) as server, visit(browser, server) as page:
        page.get_by_label("Key", exact=True).fill("wan_wrong")
        page.get_by_role("button", name="Use it").click()
        expect(page.get_by_role("alert")).to_have_text("The server does not know this key.", timeout=SECONDS)
        page.get_by_label("Key", exact=True).fill(key)
        page.get_by_role("button", name="Use it").click()
        ask(page)
        page.get_by_role("button", name="Roll").click()
        done = only(page, PROMPT)
        expect(done.locator("video")).to_have_attribute("src", re.compile("^blob:"))
        assert plays(done)
        page.reload()  # the key is kept for this tab, and no longer
        only(page, PROMPT)
        assert page.evaluate("localStorage.length") == 0


def test_what_the_page_says_of_the_worker_is_kept_up(browser: Browser, tmp_path: Path) -> None:
    with running(tmp_path) as server:
        server.wait_ready()
        os.kill(server.worker(), signal.SIGKILL)
        wait_for(lambda: server.get("/readyz").status_code == 503, "the worker's end")
        with visit(browser, server) as page:
            expect(page.locator("#model")).to_contain_text(re.compile("starting|importing|loading|warming"))
            expect(page.locator("#model")).to_contain_text("ready", timeout=SECONDS)


def test_the_page_is_light_and_dark(browser: Browser, server: Server) -> None:
    grounds = {}
    for scheme in ("light", "dark"):
        with visit(browser, server, color_scheme=scheme) as page:
            paper, ink = page.locator("body").evaluate(
                "e => [getComputedStyle(e).backgroundColor, getComputedStyle(e).color]"
            )
            grounds[scheme] = [sum(map(int, re.findall(r"\d+", colour))) for colour in (paper, ink)]
    assert grounds["light"][0] > grounds["light"][1] and grounds["dark"][0] < grounds["dark"][1]


def test_the_policy_lets_nothing_inline_run_and_nothing_outside_load(server: Server) -> None:
    answer = server.get("/")
    assert answer.headers["content-security-policy"] == POLICY
    assert "unsafe" not in POLICY and "http" not in POLICY and "*" not in POLICY
    assert not re.search(r"<style|style=|\son\w+=|<script(?![^>]*src=)", answer.text)
    for name, page in PAGES.items():
        addresses = set(re.findall(rb"(?:https?:)?//[a-z][\w.-]+\.[a-z]+", page.body))
        assert addresses <= {b"http://www.w3.org"}, name  # SVG's namespace, which nobody fetches


def test_parts_of_the_page_are_named_and_nothing_else_is_served(server: Server) -> None:
    assert set(PAGES) == {"index.html", "page.css", "page.js", "materials.js", "icon.svg"}
    first = server.get("/web/page.js")
    assert (first.status_code, first.headers["content-type"]) == (200, "text/javascript; charset=utf-8")
    unchanged = httpx.get(f"{server.url}/web/page.js", headers={"if-none-match": first.headers["etag"]})
    assert (unchanged.status_code, unchanged.content) == (304, b"")
    for name in ("cli.py", "..%2fcli.py", "", "page.js.map"):
        assert server.get(f"/web/{name}").status_code == 404
