"""The page of `gensr ui` in a real browser (headless Chromium), in front of a real model: what is seen and
what happens on clicks."""

import shutil
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from tests.runs import make_run
from trainer.serving.app import make_app
from trainer.serving.recommend import Recommender

pytestmark = pytest.mark.slow
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def url(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    recommender = Recommender.from_run(make_run(tmp_path_factory.mktemp("page"), prepared))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = uvicorn.Server(
        uvicorn.Config(make_app(recommender), host="127.0.0.1", port=port, log_level="warning")
    )
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.02)
        assert thread.is_alive()
    yield f"http://127.0.0.1:{port}/"
    server.should_exit = True
    thread.join()


@pytest.fixture(scope="module")
def page(url: str) -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("no Chromium here: apt-get install chromium")
    api = pytest.importorskip("playwright.sync_api")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 800})
        page.set_default_timeout(60_000)
        problems: list[str] = []
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
        page.goto(url)
        yield page
        browser.close()
        assert not [text for text in problems if "400 (Bad Request)" not in text], problems


def test_a_user_comes_with_both_histories_and_recommendations(page: Any) -> None:
    page.wait_for_selector("#items li")
    assert "items" in page.text_content("#model")
    assert page.locator("#items li").count() == 10
    num_clicks = page.locator("#history-rec li").count() + page.locator("#history-src li").count()
    assert page.text_content("#user-note").startswith(f"{num_clicks} clicks")
    scores = [float(text) for text in page.locator("#items .score").all_text_contents()]
    assert scores == sorted(scores, reverse=True)


def test_a_chosen_item_shows_what_the_soft_filter_reads(page: Any) -> None:
    page.locator("#items li").nth(1).click()
    page.wait_for_selector("li .bar.cf")
    shown = page.locator("li .bar.cf").count()
    assert 0 < shown <= 5  # history_max of the run
    assert page.locator("li .bar.semantic").count() == shown
    weights = [float(bar.get_attribute("title").split()[1]) for bar in page.locator("li .bar.cf").all()]
    assert abs(sum(weights) - 1) < 0.01


def test_a_search_and_a_click_on_its_result_change_the_history(page: Any) -> None:
    before = page.locator("#history-src li").count()
    page.fill("#query", "red lamp")
    page.get_by_role("button", name="Search", exact=True).click()
    page.wait_for_selector("#message:text-matches('^10 items')")
    page.locator("#items button").first.click()
    page.wait_for_selector(f"#history-src li:nth-child({before + 1})")


def test_a_mistake_is_told_and_text_is_never_run(page: Any) -> None:
    page.fill("#user", "<img src=x onerror=alert(1)>")
    page.get_by_role("button", name="Show", exact=True).click()
    page.wait_for_selector("#user-note:text('no user')")
    assert page.locator("#user-note img").count() == 0
    page.click("#clear")
    page.click("#recommend")
    page.wait_for_selector("#message.error")
    assert "history is empty" in page.text_content("#message")
