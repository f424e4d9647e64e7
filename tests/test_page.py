"""The page at `/`, used in a browser as people use it."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from helpers import endless, endless_tokenizer
from server import MODEL, Served, SlowEngine, new_store, serving
from test_logprobs import tiny_atlas

from knn_ssd.engine import Engine
from knn_ssd.server.app import ServeSettings
from knn_ssd.server.owners import Owners
from knn_ssd.server.scheduler import Limits
from knn_ssd.testing import tiny_model

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

_CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
_FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
pytestmark = pytest.mark.xdist_group("page")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    driver = pytest.importorskip("playwright.sync_api", reason="needs `pip install playwright`")
    if _CHROMIUM is None:
        pytest.skip("needs a browser: install Chromium (Debian: `apt-get install chromium`)")
    with driver.sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=_CHROMIUM, args=_FLAGS)


def tiny_engine(length: int, kind: type[Engine] = Engine) -> Engine:
    model = endless(tiny_model(seed=3, max_position_embeddings=length))  # its answers begin with a visible token
    return kind(model, endless_tokenizer())


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    """A model that writes 1024 tokens in ten seconds unless it is stopped."""
    yield from serving(ServeSettings(MODEL), tiny_engine(4096, SlowEngine))


@pytest.fixture(scope="module")
def brief() -> Iterator[Served]:
    """A model whose context is soon full, so that answers are short."""
    yield from serving(ServeSettings(MODEL), tiny_engine(128))


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """A page in a fresh browser context; errors in its console fail the test."""
    complaints: list[str] = []
    with browser.new_context(viewport={"width": 1200, "height": 800}) as context:
        page = context.new_page()
        page.set_default_timeout(60_000)  # a busy machine takes long even with tiny models
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda said: complaints.append(said.text) if said.type == "error" else None)
        yield page
    assert not [each for each in complaints if "Failed to load resource" not in each]


def say(page: Page, text: str) -> None:
    page.get_by_label("Message").fill(text)
    page.get_by_label("Message").press("Enter")


def ended(page: Page) -> None:
    page.get_by_role("button", name="Send").wait_for()


def answer(page: Page) -> str:
    return page.locator(".assistant .said").last.text_content() or ""


def reply(served: Served, text: str) -> dict[str, Any]:
    """The server's response without the page."""
    messages = [{"role": "user", "content": text}]
    body = {"model": MODEL, "messages": messages, "temperature": 0, "max_tokens": 1024}
    said: dict[str, Any] = httpx.post(f"{served.url}/v1/chat/completions", json=body, timeout=60).json()
    return said


def test_a_message_is_answered_and_every_token_has_its_source(page: Page, brief: Served) -> None:
    page.goto(brief.url)
    say(page, "a fox")
    ended(page)
    own = reply(brief, "a fox")
    assert answer(page) == own["choices"][0]["message"]["content"]
    sources = {span.get_attribute("data-source") for span in page.locator(".token").all()}
    assert "prefill" in sources
    assert sources - {"prefill"} <= {"self", "lookup", "corrected", "bonus", "plain"}
    assert re.match(r"prefill: ", page.locator(".token").first.get_attribute("title") or "")
    assert float(page.locator("#speed").text_content() or "") > 0
    assert float(page.locator("#perround").text_content() or "") >= 1
    counts = [text for text in page.locator("#legend output").all_text_contents() if text]
    assert sum(map(int, counts)) == own["usage"]["completion_tokens"]
    assert "no atlas" in (page.locator("#route").text_content() or "")
    assert page.locator("#map").is_hidden()
    assert page.get_by_text("Cut at the length limit.").is_visible()


def test_an_answer_comes_piece_by_piece_and_can_be_stopped(page: Page, served: Served) -> None:
    page.goto(served.url)
    say(page, "a fox")
    page.locator(".token").nth(3).wait_for()
    page.get_by_role("button", name="Stop").click()
    ended(page)
    first = answer(page)
    assert 3 < len(first) < 1000
    page.get_by_text("Stopped.").wait_for()
    say(page, "and a goose")
    page.locator(".assistant").nth(1).locator(".token").nth(3).wait_for()
    page.get_by_label("Message").press("Escape")
    ended(page)
    assert page.get_by_text("Stopped.").count() == 2
    while served.scheduler.running:
        page.wait_for_timeout(10)


def test_messages_are_still_there_after_a_reload(page: Page, brief: Served) -> None:
    page.goto(brief.url)
    say(page, "line one")
    ended(page)
    said, tokens = answer(page), page.locator(".token").count()
    page.reload()
    assert page.locator(".user .said").text_content() == "line one"
    assert (answer(page), page.locator(".token").count()) == (said, tokens)
    page.get_by_role("button", name="New chat").click()
    assert page.locator("article").count() == 0
    page.reload()
    assert page.locator("article").count() == 0


def test_an_error_is_a_sentence_and_the_message_is_not_lost(page: Page, brief: Served) -> None:
    page.goto(brief.url)
    say(page, "long " * 60)
    page.get_by_role("alert").filter(has_text="and the model's context is 128").wait_for()
    assert page.get_by_label("Message").input_value() == "long " * 60
    assert page.locator("article").count() == 0
    say(page, "short")
    ended(page)
    assert page.get_by_role("alert").count() == 0
    assert answer(page)


def test_an_error_within_an_answer_is_a_sentence_too(page: Page) -> None:
    settings = ServeSettings(MODEL, limits=Limits(deadline_sec=0.3))
    for own in serving(settings, tiny_engine(4096, SlowEngine)):
        page.goto(own.url)
        say(page, "a fox")
        page.get_by_role("alert").filter(has_text="The request took longer than 0.3 seconds").wait_for()
        ended(page)


def test_an_unreachable_server_is_reported(page: Page) -> None:
    for own in serving(ServeSettings(MODEL)):
        page.goto(own.url)
        page.get_by_text(MODEL, exact=True).wait_for()
    say(page, "a fox")
    page.get_by_role("alert").filter(has_text="The server cannot be reached.").wait_for()
    assert page.get_by_label("Message").input_value() == "a fox"


def test_without_acceleration_nothing_is_drafted_and_both_ways_are_compared(page: Page, brief: Served) -> None:
    page.goto(brief.url)
    comparison = page.locator("#comparison")
    say(page, "a fox")
    ended(page)
    fast = answer(page)
    assert "x plain" not in (comparison.text_content() or "")
    page.get_by_role("button", name="New chat").click()
    page.get_by_role("switch", name="Acceleration").uncheck()
    say(page, "a fox")
    ended(page)
    assert answer(page) == fast
    sources = [span.get_attribute("data-source") for span in page.locator(".token").all()]
    assert sources == ["prefill", *["plain"] * (len(sources) - 1)]
    assert page.get_by_text("Without acceleration.").is_visible()
    assert re.match(r"\d+\.\dx plain on the last answers: .* Measured on this page", comparison.text_content() or "")
    page.reload()
    assert not page.get_by_role("switch", name="Acceleration").is_checked()


def speeds(page: Page) -> list[str]:
    """Which ways the last answer has bars for, the fastest full."""
    bars = page.locator(".assistant .speeds").last.locator(".bar")
    widths = bars.evaluate_all("bars => bars.map(bar => bar.style.width)")
    assert "100%" in widths
    assert all(0 < float(width.removesuffix("%")) <= 100 for width in widths)
    names: list[str] = bars.evaluate_all("bars => bars.map(bar => bar.previousSibling.textContent)")
    return names


def test_an_answer_is_compared_with_plain_decoding_on_demand(page: Page, brief: Served) -> None:
    page.goto(brief.url)
    say(page, "a fox")
    ended(page)
    assert speeds(page) == ["drafted"]
    shown = page.locator(".speeds").text_content() or ""
    assert re.match(r"drafted\d+\.\d tokens/s · \d+\.\d\d per round", shown)
    page.get_by_role("button", name="Compare with plain decoding").click()
    page.get_by_text(re.compile(r"^\d+\.\d\dx plain decoding, and the same text\.$")).wait_for()
    assert speeds(page) == ["drafted", "plain"]
    assert "tokens/s · 1.00 per round" in (page.locator(".speeds").text_content() or "")
    assert page.get_by_role("button", name="Compare").count() == 0
    assert "x plain on the last answers" in (page.locator("#comparison").text_content() or "")
    page.reload()
    assert speeds(page) == ["drafted", "plain"]
    page.get_by_role("button", name="New chat").click()
    page.get_by_role("switch", name="Acceleration").uncheck()
    say(page, "a goose")
    ended(page)
    assert speeds(page) == ["plain"]
    page.get_by_role("button", name="Compare with drafts").click()
    page.get_by_text("plain decoding, and the same text.").wait_for()
    assert speeds(page) == ["drafted", "plain"]


def test_a_comparison_in_which_the_texts_differ_says_so(page: Page, brief: Served) -> None:
    page.goto(brief.url)
    say(page, "a fox")
    ended(page)
    page.route(
        "**/v1/chat/completions", lambda route: route.continue_(post_data=route.request.post_data.replace("fox", "owl"))
    )
    page.get_by_role("button", name="Compare with plain decoding").click()
    page.get_by_text("x plain decoding, but the texts differ.").wait_for()


def test_a_stopped_answer_is_compared_as_far_as_it_goes_and_a_comparison_can_be_stopped(
    page: Page, served: Served
) -> None:
    page.goto(served.url)
    say(page, "a fox")
    page.locator(".token").nth(20).wait_for(state="attached")
    page.get_by_role("button", name="Stop").click()
    ended(page)
    said = answer(page)
    compare = page.get_by_role("button", name="Compare with plain decoding")
    compare.click()
    page.get_by_role("button", name="Stop").click()
    compare.wait_for()
    assert answer(page) == said
    assert speeds(page) == ["drafted"]
    compare.click()
    page.get_by_text("x plain decoding, and the same text.").wait_for()
    assert answer(page) == said


def test_the_queue_is_drawn_while_several_requests_are_there(page: Page) -> None:
    body = {"model": MODEL, "prompt": "a fox", "max_tokens": -1, "stream": True}
    for own in serving(ServeSettings(MODEL, limits=Limits(running=2)), tiny_engine(4096, SlowEngine)):
        page.goto(own.url)
        page.get_by_text(MODEL, exact=True).wait_for()
        queue = page.locator("#queue")
        assert queue.is_hidden()
        with ExitStack() as streams:
            for _ in range(5):
                streams.enter_context(httpx.stream("POST", f"{own.url}/v1/completions", json=body, timeout=60))
            page.get_by_text("2 running together, 3 waiting.").wait_for()
            kinds = page.locator("#places span").evaluate_all("places => places.map(place => place.className)")
            assert kinds == ["runs"] * 2 + ["waits"] * 3
            sizes = page.locator("#places span").evaluate_all("places => places.map(place => place.scrollWidth)")
            assert len(set(sizes)) == 1, "nothing is written in the squares"
        queue.wait_for(state="hidden")


@pytest.mark.parametrize("visibility", ["visible", "hidden"])
def test_the_queue_is_looked_at_only_while_the_page_is_seen(page: Page, brief: Served, visibility: str) -> None:
    page.clock.install()
    page.add_init_script(f"Object.defineProperty(document, 'visibilityState', {{get: () => '{visibility}'}})")
    looks: list[str] = []
    page.on("request", lambda request: looks.append(request.url) if request.url.endswith("/metrics") else None)
    page.goto(brief.url)
    page.get_by_text(MODEL, exact=True).wait_for()
    for _ in range(2):
        page.clock.run_for(2000)
        page.wait_for_load_state("networkidle")
    assert len(looks) == 0 if visibility == "hidden" else len(looks) > 1


def test_everything_is_reached_with_the_keyboard_alone(page: Page, served: Served) -> None:
    page.goto(served.url)
    keyboard = page.keyboard
    page.wait_for_function("document.hasFocus() && document.activeElement.id === 'text'")  # from the beginning
    keyboard.type("one")
    keyboard.press("Shift+Enter")
    keyboard.type("two")
    keyboard.press("Enter")
    page.locator(".token").nth(3).wait_for()
    keyboard.press("Escape")
    ended(page)
    assert page.locator(".user .said").text_content() == "one\ntwo"
    reached = []
    for _ in range(7):
        keyboard.press("Tab")
        focused: dict[str, Any] = page.evaluate(
            "() => { const e = document.activeElement;"
            " return {id: e.id, outline: getComputedStyle(e).outlineStyle, label: e.labels?.[0]?.textContent ?? ''} }"
        )
        reached.append(focused["id"])
        assert focused["id"] in {"", "text"} or focused["outline"] == "solid", focused
        if focused["id"] == "fast":
            assert focused["label"] == "Acceleration"
            keyboard.press("Space")
            assert not page.get_by_role("switch", name="Acceleration").is_checked()
    page.get_by_role("button", name="New chat").focus()
    keyboard.press("Enter")
    assert page.locator("article").count() == 0
    assert {"send", "fast", "colour", "new", "log"} <= set(reached)


def test_the_page_asks_for_an_api_key_once_the_server_needs_one(page: Page) -> None:
    for own in serving(ServeSettings(MODEL, Owners.dividing(keys=["secret"]))):
        page.goto(own.url)
        page.get_by_role("alert").filter(has_text="The API key is missing or wrong").wait_for()
        page.get_by_label("API key").fill("secret")
        page.get_by_label("API key").press("Enter")
        page.get_by_label("API key").wait_for(state="hidden")
        say(page, "a fox")
        page.locator(".token").nth(3).wait_for()
        ended(page)
        page.reload()
        page.get_by_text(MODEL, exact=True).wait_for()
        assert page.get_by_label("API key").is_hidden()


def test_the_nearest_anchor_is_shown_on_the_map(page: Page) -> None:
    engine = Engine(endless(tiny_model()), endless_tokenizer(), tiny_atlas())
    for own in serving(ServeSettings(MODEL), engine):
        page.goto(own.url)
        page.locator("#map circle").nth(1).wait_for()
        assert page.locator("#map .ring").count() == 0
        say(page, "a fox")
        ended(page)
        assert page.locator("#map .ring").count() == 1
        assert page.locator("#map .here").text_content() == "fox"
        assert (page.locator("#route").text_content() or "").startswith("fox at cosine distance 0.000")
        page.get_by_text("Plan: skip MLP 2; drafts up to 4").wait_for()


def test_tokens_from_an_earlier_answer_name_the_request_that_it_answered(page: Page) -> None:
    for own in serving(ServeSettings(MODEL, Owners.dividing(0, new_store)), tiny_engine(128)):
        page.goto(own.url)
        say(page, "a fox")
        ended(page)
        first = answer(page)
        assert page.locator("#neighbours li").count() == 0
        assert page.get_by_text("No earlier request is near this one, or none is kept.").is_visible()
        page.get_by_role("button", name="New chat").click()
        say(page, "a fox")
        ended(page)
        assert answer(page) == first
        copied = page.locator(".token[data-source=retrieval]")
        named = "“a fox” at cosine distance 0.000"
        title = copied.first.get_attribute("title") or ""
        assert title.startswith(f"retrieval: copied from an earlier answer, accepted; it answered {named}; round ")
        about = page.locator("#about")
        assert about.is_hidden()
        copied.first.click()
        assert about.text_content() == title
        number = int(page.locator("#count-retrieval").text_content() or "")
        assert page.locator("#neighbours li").all_text_contents() == [f"{named}: {number} tokens of its answer"]
        page.reload()
        assert page.locator("#neighbours li").all_text_contents() == [f"{named}: {number} tokens of its answer"]
        copied.first.click()
        page.get_by_role("button", name="New chat").click()
        assert about.is_hidden()
        assert page.locator("#neighbours li").count() == 0


def test_every_source_has_a_colour_and_a_line_of_its_own(page: Page, brief: Served) -> None:
    """For those who cannot tell the colours apart, there are the lines."""
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
        page.goto(brief.url)
        looks: list[list[str]] = page.locator("#legend .mark").evaluate_all(
            "marks => marks.map(getComputedStyle).map("
            "s => [s.textDecorationColor, `${s.textDecorationLine} ${s.textDecorationStyle}`])"
        )
        colours, lines = zip(*looks, strict=True)
        assert len(set(lines)) == len(lines) == 7
        assert len(set(colours)) == 7


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_shows_all_of_it_without_scrolling_sideways(page: Page, brief: Served, scheme: Any) -> None:
    page.emulate_media(color_scheme=scheme)
    page.set_viewport_size({"width": 390, "height": 844})
    page.goto(brief.url)
    say(page, "a fox")
    ended(page)
    assert page.get_by_role("switch", name="Acceleration").is_hidden()
    figures = page.locator(".speeds span").nth(2)
    assert figures.evaluate("e => e.getClientRects().length") == 1, "the figures are on one line"
    page.get_by_text("tokens/s,").click()
    assert page.get_by_role("switch", name="Acceleration").is_visible()
    assert page.get_by_role("button", name="Send").is_visible()
    assert page.evaluate("() => document.documentElement.scrollWidth") == 390


def test_a_model_s_output_is_shown_as_text_and_never_as_markup(page: Page, brief: Served) -> None:
    page.goto(brief.url)
    say(page, "<b id=bold>bold</b><img src=x onerror=alert(1)>")
    ended(page)
    assert page.locator("#log b, #log img").count() == 0
    assert (page.locator(".user .said").text_content() or "").startswith("<b id=bold>")


def test_the_page_contacts_no_other_server_and_runs_no_foreign_code(brief: Served) -> None:
    page = httpx.get(brief.url)
    policy = page.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy
    assert "connect-src 'self'" in policy
    for name in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval("):
        assert name not in page.text
    links = re.findall(r"https?://[^\s'\"]+", page.text)
    assert set(links) == {"http://www.w3.org/2000/svg"}  # a name, not a place
    assert not re.findall(r"<[^>]+ (?:style|on\w+)=", page.text)
