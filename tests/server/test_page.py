"""The chat page: what comes with it, what it may run, and that it chats."""

import base64
import hashlib
import json
import re
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import httpx
import pytest
from serving import Serving
from tiny_models import write_tiny

from isotherm.types import QuantType

CHROMIUMS = ("chromium", "chromium-browser", "google-chrome")
TELLS = "addEventListener('securitypolicyviolation', (event) => console.error('CSP: ' + event.violatedDirective));"


class Inline(HTMLParser):
    """Text of the inline script and style, and every address that an attribute names."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: dict[str, str] = {}
        self.addresses: list[str] = []
        self.attributes: set[str] = set()
        self._inside = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._inside = tag
        self.attributes |= {name for name, _ in attrs}
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "action", "srcset")]

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside in ("script", "style"):
            self.texts[self._inside] = self.texts.get(self._inside, "") + data


@pytest.fixture(scope="module")
def page(server: Serving) -> httpx.Response:
    return httpx.get(f"{server.url}/")


def test_headers(page: httpx.Response, server: Serving) -> None:
    assert page.status_code == 200
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert page.headers["x-content-type-options"] == "nosniff"
    assert page.headers["referrer-policy"] == "no-referrer"
    assert page.headers["cross-origin-opener-policy"] == "same-origin"
    head = httpx.head(f"{server.url}/")
    assert head.status_code == 200
    assert head.content == b""
    assert head.headers["content-security-policy"] == page.headers["content-security-policy"]
    assert httpx.post(f"{server.url}/", json={}).status_code == 405


def test_nothing_runs_but_what_is_in_the_page(page: httpx.Response) -> None:
    parts = (part.split() for part in page.headers["content-security-policy"].split(";"))
    policy = {name: values for name, *values in parts}
    inline = Inline()
    inline.feed(page.text)
    for name in ("script", "style"):
        digest = base64.b64encode(hashlib.sha256(inline.texts[name].encode()).digest()).decode()
        assert policy.pop(f"{name}-src") == [f"'sha256-{digest}'"]
    assert policy.pop("connect-src") == ["'self'"]
    assert policy.pop("img-src") == ["data:"]
    nothing = {"default-src", "base-uri", "form-action", "frame-ancestors"}
    assert policy == {name: ["'none'"] for name in nothing}
    assert not [name for name in inline.attributes if name == "style" or name.startswith("on")]
    assert inline.addresses == ["data:,"]
    outside = r"https?:|//\w|@import|url\(|innerHTML|outerHTML|insertAdjacent|document\.write|eval\("
    assert not re.search(outside, page.text)


def test_no_page_where_none_is_wanted(tiny: Path, tmp_path: Path) -> None:
    with Serving([str(tiny), "--no-page"], tmp_path) as server:
        server.wait_healthy()
        assert httpx.get(f"{server.url}/").text == "Isotherm is running"


# --- in a browser -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with sync_api.sync_playwright() as driver:
        found = next(filter(None, map(shutil.which, CHROMIUMS)), driver.chromium.executable_path)
        if not Path(found).exists():
            pytest.skip("there is no chromium")
        opened = driver.chromium.launch(executable_path=found)
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that is slow to come to the end of its context, and does not end by itself."""
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
    path = tmp_path_factory.mktemp("endless") / "endless.gguf"
    metadata = {"tokenizer.chat_template": template}
    return write_tiny(path, "llama", QuantType.Q4_0, metadata=metadata, context_tokens=16384, num_layers=12)


def visit(browser: Any, url: str, complaints: list[str]) -> Any:
    context = browser.new_context()
    context.set_default_timeout(30_000)
    context.add_init_script(TELLS)
    page = context.new_page()
    page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: complaints.append(request.url) if not request.url.startswith(url) else None)
    page.goto(url)
    return page


def say(page: Any, text: str) -> None:
    page.get_by_label("Your message").fill(text)
    page.get_by_label("Your message").press("Enter")


@pytest.mark.slow
def test_it_chats_and_stops(browser: Any, endless: Path, tmp_path: Path) -> None:
    complaints: list[str] = []
    with Serving([str(endless), "--ctx", "16384"], tmp_path) as server:
        server.wait_healthy()
        page = visit(browser, server.url, complaints)
        page.locator("#model option").wait_for(state="attached")
        box = page.get_by_label("Your message")
        box.fill("the rain in")
        box.press("Shift+Enter")
        box.press_sequentially("<b>the</b> hour")
        box.press("Enter")
        answer = page.locator("article.assistant .text")
        answer.filter(has_text=re.compile(r"\S")).wait_for()
        assert page.locator("article.assistant").get_attribute("aria-busy") == "true"
        early = len(answer.inner_text())
        page.wait_for_timeout(200)
        assert len(answer.inner_text()) > early, "the text comes as it is made"
        assert page.locator("article.user .text").inner_text() == "the rain in\n<b>the</b> hour"

        page.get_by_role("button", name="Stop").click()
        page.get_by_text("Stopped", exact=True).wait_for()
        assert "(cancelled)" in server.wait_line("(cancelled)")
        assert "first token after" in page.locator("article.assistant .facts").inner_text()

        say(page, "and again")
        page.get_by_text("Answering", exact=True).wait_for()
        page.keyboard.press("Escape")
        page.get_by_text("Stopped", exact=True).wait_for()
        assert page.locator("article").count() == 4

        page.get_by_role("button", name="New conversation").click()
        assert page.locator("article").count() == 0
        assert complaints == []

        assert server.stop() == 0
        say(page, "is anybody there")
        page.get_by_text("The server cannot be reached").wait_for()
        assert box.input_value() == "is anybody there"


@pytest.mark.slow
def test_it_asks_for_the_key_and_says_how_fast(browser: Any, tiny: Path, tmp_path: Path) -> None:
    complaints: list[str] = []
    with Serving([str(tiny)], tmp_path, {"ISOTHERM_API_KEY": "sesame"}) as server:
        server.wait_healthy()
        page = visit(browser, server.url, complaints)
        for key, says in (("wrong", "The API key is wrong"), ("sesame", "")):
            page.get_by_label("API key").fill(key)
            page.get_by_role("button", name="Use this key").click()
            if says:
                page.get_by_text(says).wait_for()
        page.locator("#model option").wait_for(state="attached")
        page.reload()
        page.locator("#model option").wait_for(state="attached")
        assert not page.get_by_label("API key").is_visible()
        say(page, "the rain")
        page.locator("article.assistant .facts", has_text="tokens/s").wait_for()
        facts = page.locator("article.assistant .facts").inner_text()
        assert re.search(r"^\d+ tokens · [\d.]+ tokens/s · first token after [\d.]+ s · \d+ of \d+ prompt", facts)
        assert [text for text in complaints if "401" not in text] == []
        say(page, "a b c d " * 400)
        page.get_by_text("too many").wait_for()
        assert page.get_by_label("Your message").input_value().startswith("a b c d")
        assert page.locator("article").count() == 2


@pytest.mark.slow
def test_what_comes_is_text(browser: Any, server: Serving) -> None:
    """Parts of an answer as an evil model may send them, and a failure in the middle."""
    deltas: list[dict[str, str]] = [
        {"reasoning_content": "<i>hm</i>"},
        {"content": "a **bold** `x < y` <img src=x onerror=alert(1)>\n```py"},
        {"content": "thon\nprint('<b>')\n"},
        {"content": "```\nafter <script>alert(2)</script>"},
    ]
    events = [{"choices": [{"index": 0, "delta": delta, "finish_reason": None}]} for delta in deltas]
    lines = [json.dumps(event) for event in (*events, {"error": {"message": "the model was unloaded"}})]
    body = "".join(f"data: {line}\n\n" for line in lines)
    complaints: list[str] = []
    page = visit(browser, server.url, complaints)
    page.route("**/v1/chat/completions", lambda route: route.fulfill(content_type="text/event-stream", body=body))
    page.locator("#model option").wait_for(state="attached")
    say(page, "well?")
    page.get_by_text("the model was unloaded", exact=True).wait_for()
    answer = page.locator("article.assistant")
    assert not answer.locator("details > div").is_visible()
    answer.get_by_text("Reasoning").click()
    assert answer.locator("details > div").inner_text() == "<i>hm</i>"
    assert answer.locator("strong").inner_text() == "bold"
    assert answer.locator("div > code").inner_text() == "x < y"
    assert answer.locator("pre").inner_text().strip() == "print('<b>')"
    assert "<img src=x onerror=alert(1)>" in answer.inner_text()
    assert "after <script>alert(2)</script>" in answer.inner_text()
    assert answer.locator("img, script, b, i").count() == 0
    assert complaints == []
