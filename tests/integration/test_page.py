"""The page of `gensr ui` in a real browser (headless Chromium), in front of a real model: what is seen and
what happens on clicks."""

import contextlib
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from fastapi import FastAPI

from tests.runs import make_run
from trainer.serving.app import Options, make_app
from trainer.serving.payloads import MAX_HISTORY
from trainer.serving.recommend import Recommender
from trainer.serving.systems import compared_systems, counted
from trainer.serving.users import Users

try:
    from axe_playwright_python import (  # type: ignore[import-untyped]
        sync_playwright as axe_playwright,
    )
except ImportError:
    axe_playwright = None

pytestmark = pytest.mark.slow
needs_axe = pytest.mark.skipif(axe_playwright is None, reason="no axe-playwright-python: make install")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

# Controls that a screen reader cannot name, lists that are none, headings that skip a level.
WITHOUT_NAME = """() => [...document.querySelectorAll('button, input, select, [role=region], [role=group]')]
  .filter((one) => one.checkVisibility())
  .filter((one) => !(one.getAttribute('aria-label') || one.innerText || (one.labels && one.labels.length)
    || document.getElementById(one.getAttribute('aria-labelledby'))))
  .concat([...document.querySelectorAll('li')].filter((one) => one.parentElement.tagName !== 'OL'))
  .concat([...document.querySelectorAll('[id]')].filter((one) => document.querySelectorAll('#' + one.id)[1]))
  .concat(document.documentElement.lang && document.querySelector('main h2') ? [] : [document.body])
  .map((one) => one.outerHTML.slice(0, 80))"""
# Text below 4.5:1 and bars below 3:1 against what is painted behind them.
LOW_CONTRAST = """() => {
  const numbers = (color) => color.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b].map((v) => v / 255)
    .map((v) => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
  const behind = (one) => {
    for (; one; one = one.parentElement) {
      const color = numbers(getComputedStyle(one).backgroundColor);
      if (color.length === 3 || color[3] === 1) return color;
    }
    return [255, 255, 255];
  };
  const ratio = (a, b) => {
    const [dark, bright] = [light(a), light(b)].sort((p, q) => p - q);
    return (bright + .05) / (dark + .05);
  };
  const low = [];
  for (const one of document.querySelectorAll('body *')) {
    const text = [...one.childNodes].some((n) => n.nodeType === 3 && n.data.trim()) || one.value;
    const color = numbers(getComputedStyle(one).color);
    if (!one.checkVisibility() || one.className === 'unseen') continue;
    const bar = one.matches('.fill, .swatch') && ratio(behind(one), behind(one.parentElement)) < 3;
    if (bar || (text && ratio(color, behind(one)) < 4.5)) low.push(one.outerHTML.slice(0, 80));
  }
  return low;
}"""
SMALL_TARGETS = """() => [...document.querySelectorAll('button, input, select')]
  .filter((one) => one.checkVisibility())
  .filter((one) => one.getBoundingClientRect().height < 24 || one.getBoundingClientRect().width < 24)
  .map((one) => one.outerHTML.slice(0, 80))"""


@contextlib.contextmanager
def served(app: FastAPI) -> Iterator[str]:
    """The application on a free port → its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.02)
        assert thread.is_alive()
    yield f"http://127.0.0.1:{port}/"
    server.should_exit = True
    thread.join()


@pytest.fixture(scope="module")
def recommender(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Recommender:
    return Recommender.from_run(make_run(tmp_path_factory.mktemp("page"), prepared))


@pytest.fixture(scope="module")
def url(recommender: Recommender) -> Iterator[str]:
    others = compared_systems([("runs/second", recommender)], recommender.users)
    with served(make_app(recommender, options=Options(docs=True), others=others)) as url:
        yield url


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
        assert not [text for text in problems if "Failed to load resource" not in text], problems


def test_a_user_comes_with_both_histories_and_recommendations(page: Any) -> None:
    page.wait_for_selector("#items .item")
    assert "items" in page.text_content("#model")
    assert page.locator("#items .item").count() == 10
    num_clicks = page.locator("#history-rec .id").count() + page.locator("#history-src .id").count()
    assert page.text_content("#user-note").startswith(f"{num_clicks} clicks")
    scores = [float(text.split()[-1]) for text in page.locator("#items .score .number").all_text_contents()]
    assert scores == sorted(scores, reverse=True)
    assert "choose an item to see what it weighs" in page.text_content(".legend")


def test_a_chosen_item_shows_what_the_soft_filter_reads(page: Any) -> None:
    """Chosen with the keyboard, as a screen reader does."""
    page.locator(".item").nth(1).focus()
    page.keyboard.press("Enter")
    page.wait_for_selector(".scroll .bar.cf")
    assert page.locator(".item").nth(1).get_attribute("aria-pressed") == "true"
    assert page.locator(".item[aria-pressed=true]").count() == 1
    for view, name in (("cf", "collaborative"), ("semantic", "semantic")):
        texts = [text.split() for text in page.locator(f".scroll .bar.{view} .number").all_text_contents()]
        assert 0 < len(texts) <= 5  # history_max of the run
        assert {word for word, _ in texts} == {name}
        assert abs(sum(float(weight) for _, weight in texts) - 1) < 0.01
    widths = [bar.bounding_box()["width"] for bar in page.locator(".scroll .fill").all()]
    track = page.locator(".scroll .track").first.bounding_box()["width"]
    assert max(widths) == pytest.approx(track, rel=0.01) and min(widths) > 1


def test_a_search_and_a_click_on_its_result_change_the_history(page: Any) -> None:
    before = page.locator("#history-src .id").count()
    page.fill("#query", "red lamp")
    page.get_by_role("button", name="Search", exact=True).click()
    page.wait_for_selector("#message:text-matches('^10 items')")
    page.get_by_role("button", name="add it to the history").first.click()
    page.wait_for_selector(f"#history-src li:nth-child({before + 1})")


def test_an_example_is_asked_and_more_items_are_shown(page: Any) -> None:
    page.wait_for_selector("#message:text-matches('^10 items')")
    assert page.locator("#examples button").count() == 8
    page.locator("#examples button").first.click()
    assert page.input_value("#query") == page.locator("#examples button").first.text_content()
    page.wait_for_selector("#message:text-matches('^10 items')")
    for number in ("20", "50"):
        page.select_option("#how-many", number)
        page.wait_for_selector(f"#message:text-matches('^{number} items')")
        assert page.locator(".item").count() == int(number)
    page.select_option("#how-many", "10")
    page.wait_for_selector("#message:text-matches('^10 items')")


def test_a_mistake_is_told_clears_what_was_shown_and_text_is_never_run(page: Any) -> None:
    page.fill("#user", "<img src=x onerror=alert(1)>")
    page.get_by_role("button", name="Show", exact=True).click()
    page.wait_for_selector("#message.error:text('No user')")
    assert page.locator("#message img").count() == 0
    assert page.locator(".item").count() == page.locator(".bar").count() == 0
    assert page.text_content("#history-rec") == page.text_content("#history-src") == "none"
    page.fill("#query", " ")
    page.get_by_role("button", name="Search", exact=True).click()
    page.wait_for_selector("#message.error:text('Write what you are looking for')")


def test_an_empty_user_is_asked_for(page: Any) -> None:
    page.fill("#user", " ")
    page.get_by_role("button", name="Show", exact=True).click()
    page.wait_for_selector("#message.error:text('Write the id of a user')")


def test_a_change_counts_while_the_answer_is_awaited(page: Any) -> None:
    page.select_option("#how-many", "10")
    held: list[Any] = []
    page.route("**/recommend", lambda route: held.append(route))
    page.click("#recommend")
    page.wait_for_selector("#message:text('One moment')")
    page.unroute("**/recommend")
    page.select_option("#how-many", "20")
    page.wait_for_selector("#message:text-matches('^20 items')")
    page.select_option("#how-many", "10")
    page.wait_for_selector("#message:text-matches('^10 items')")
    page.click("#clear")
    page.select_option("#how-many", "20")  # nothing is asked now
    assert page.text_content("#message") == ""
    page.select_option("#how-many", "10")


def test_of_a_long_history_the_newest_clicks_are_asked_with(page: Any) -> None:
    sizes = page.evaluate(
        """async (most) => {
      const { asked, history, setHistory } = await import("./history.js");
      const before = history.clicks;
      setHistory(Array.from({ length: most + 1 }, (_, place) => ({ item_id: place, task: "rec", text: "" })));
      const clicks = asked({}).history;
      setHistory(before);
      return [clicks.length, clicks[0].item_id];
    }""",
        MAX_HISTORY,
    )
    assert sizes == [MAX_HISTORY, 1]


def test_without_clicks_popular_items_are_shown(page: Any) -> None:
    page.click("#clear")
    assert page.locator("#message.error").count() == 0
    page.click("#recommend")
    page.wait_for_selector("#message:text-matches('^10 items')")


@pytest.mark.parametrize(
    ("status", "body", "shown"),
    [
        (503, '{"error": "too many requests are waiting; try again"}', "Try again in a moment"),
        (504, "<html>gateway</html>", "That took too long"),
        (
            400,
            '{"error": "the request: k must be between 1 and 1000, got 0"}',
            "K must be between 1 and 1000",
        ),
        (200, '{"items": [], "scores": [], "model": {}}', "Nothing was found"),
        (None, "", "The service does not answer"),
    ],
)
def test_failures_are_told_for_people(page: Any, status: int | None, body: str, shown: str) -> None:
    page.click("#recommend")
    page.wait_for_selector("#message:text-matches('^10 items')")
    page.route(
        "**/recommend",
        lambda route: route.abort() if status is None else route.fulfill(status=status, body=body),
    )
    page.click("#recommend")
    page.wait_for_selector(f"#message.error:text('{shown}')")
    assert page.locator(".item").count() == 0
    page.unroute("**/recommend")


def test_two_systems_answer_side_by_side(page: Any) -> None:
    page.reload()
    page.wait_for_selector("#items .item")
    names = page.locator("#compare option").all_text_contents()
    assert names == ["nothing", "GenSR, second", "popularity", "item-kNN", "BM25"]
    page.select_option("#compare", "second")  # the same model: the same answer
    page.wait_for_selector("#other-message:text-matches('^10 items')")
    assert page.locator(".pane h3").all_text_contents() == ["GenSR", "GenSR, second"]
    marks = page.locator("#items .common").all_text_contents()
    assert marks == [f"GenSR, second: {place}" for place in range(1, 11)]
    assert page.locator("#other-items .name").all_text_contents()[0].endswith("GenSR: 1")
    page.locator("#other-items .item").nth(2).click()
    page.wait_for_selector(".scroll .bar.cf")  # its weights
    assert page.locator("#items .item.same").count() == 1
    left, right = (page.locator(name).bounding_box() for name in ("#items", "#other-items"))
    assert left["y"] == right["y"] and left["x"] + left["width"] <= right["x"]


def test_what_is_counted_can_be_compared_with(page: Any) -> None:
    """Each answers its own task, and says so for the other."""
    for name in ("popularity", "item_knn"):
        page.select_option("#compare", name)
        page.click("#recommend")
        page.wait_for_selector("#other-message:text-matches('^10 items')")
        assert page.locator("#other-items .item").count() == 10
        page.locator("#other-items .item").first.click()
        assert page.locator(".bar.cf").count() == 0
    page.select_option("#compare", "bm25")
    page.wait_for_selector("#other-message:text('BM25 answers searches only.')")
    assert page.locator("#other-items .item").count() == 0
    assert page.locator("#other-message.error").count() == 0
    page.locator("#examples button").first.click()
    page.wait_for_selector("#other-message:text-matches('^10 items')")
    page.select_option("#compare", "")
    page.wait_for_selector("#message:text-matches('^10 items')")
    assert page.locator("#of-other").is_hidden()


@pytest.mark.parametrize(
    ("name", "title", "shown", "hidden"),
    [("item_knn", "item-kNN", "#recommend", "#query"), ("bm25", "BM25", "#query", "#recommend")],
)
def test_a_model_of_one_task_without_weights(
    page: Any, recommender: Recommender, name: str, title: str, shown: str, hidden: str
) -> None:
    assert isinstance(recommender.users, Users)
    with served(make_app(counted(name, recommender.users))) as url:
        other = page.context.browser.new_page()
        problems: list[str] = []
        other.on("pageerror", lambda error: problems.append(str(error)))
        other.goto(url)
        other.wait_for_selector("#message:text-matches('items|answers searches')")
        assert title in other.text_content("#model")
        assert other.locator(shown).is_visible() and other.locator(hidden).is_hidden()
        assert other.locator(".legend").is_hidden() and other.locator("#compares").is_hidden()
        if name == "bm25":
            other.locator("#examples button").first.click()
        other.wait_for_selector(".item")
        other.locator(".item").first.click()
        assert other.locator(".bar.cf").count() == 0
        assert "weighs" not in other.text_content("#message")
        assert problems == []
        other.close()


def violations(page: Any) -> list[str]:
    """What axe-core finds, all its rules: of WCAG 2.2 AA and of good practice."""
    found = axe_playwright.Axe().run(page).response["violations"]
    return [f"{rule['id']}: {node['html'][:100]}" for rule in found for node in rule["nodes"]]


@needs_axe
@pytest.mark.parametrize(("width", "scheme"), [(375, "dark"), (1400, "light")])
def test_axe_finds_nothing(page: Any, url: str, width: int, scheme: str) -> None:
    page.set_viewport_size({"width": width, "height": 800})
    page.emulate_media(color_scheme=scheme)
    page.goto(url)
    page.wait_for_selector(".item")
    page.select_option("#compare", "second")
    page.wait_for_selector("#other-message:text-matches('^10 items')")
    page.locator(".item").first.click()
    page.wait_for_selector(".scroll .bar")
    page.mouse.move(0, 0)
    assert violations(page) == []
    page.fill("#user", "nobody")
    page.get_by_role("button", name="Show", exact=True).click()
    page.wait_for_selector("#message.error")
    assert violations(page) == []
    page.goto(f"{url}docs")
    assert violations(page) == []
    page.goto(url)
    page.wait_for_selector(".item")


@needs_axe
def test_axe_finds_what_it_looks_for(page: Any) -> None:
    page.evaluate("document.documentElement.removeAttribute('lang')")
    page.evaluate("document.querySelector('#another').textContent = ''")
    found = {line.split(":")[0] for line in violations(page)}
    assert {"html-has-lang", "button-name"} <= found
    page.reload()
    page.wait_for_selector(".item")


@pytest.mark.parametrize("width", [375, 768, 1400])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_everything_is_named_readable_and_in_reach(page: Any, width: int, scheme: str) -> None:
    """Names for a screen reader, contrast (WCAG 2.2 AA), targets, and the answer on the first screen."""
    page.set_viewport_size({"width": width, "height": 667})
    page.emulate_media(color_scheme=scheme)
    page.reload()
    page.wait_for_selector(".item")
    page.locator(".item").first.click()
    page.wait_for_selector(".scroll .bar")
    page.mouse.move(0, 0)
    assert page.locator(".item").first.bounding_box()["y"] < 400
    assert page.locator(".item .name").first.bounding_box()["width"] >= 180  # not a column of single words
    assert page.evaluate("document.documentElement.scrollWidth") == width
    page_bottom = page.evaluate("document.documentElement.scrollHeight")
    main = page.locator("main").bounding_box()
    assert page_bottom - page.evaluate("scrollY") <= max(667, main["y"] + main["height"] + 1)
    assert page.locator(".scroll").first.bounding_box()["height"] <= 400
    assert page.locator(".legend").bounding_box()["y"] < page.locator(".scroll").first.bounding_box()["y"]
    assert page.locator(".weighs .bar").first.is_visible() == (width < 960)
    assert page.evaluate(WITHOUT_NAME) == []
    assert page.evaluate(LOW_CONTRAST) == []
    assert page.evaluate(SMALL_TARGETS) == []
    page.keyboard.press("Tab")
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") != "none"
    page.emulate_media(color_scheme="light")


def test_the_checks_find_what_they_look_for(page: Any) -> None:
    page.evaluate("document.querySelector('h2').style.color = '#888'")
    page.evaluate("document.querySelector('#another').textContent = ''")
    page.evaluate("document.querySelector('#clear').style.cssText = 'min-height: 0; height: 10px'")
    for script, found in (
        (LOW_CONTRAST, "answer-title"),
        (WITHOUT_NAME, "another"),
        (SMALL_TARGETS, "clear"),
    ):
        assert any(found in text for text in page.evaluate(script)), script
    page.reload()
    page.wait_for_selector(".item")
