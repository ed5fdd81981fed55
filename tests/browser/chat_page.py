"""The chat page in a real browser, over a real server.

Answers that no small model can be made to give come from a fetch of our own, put into the page before its script runs.
"""

from __future__ import annotations

import json
from base64 import b64decode
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

import pytest
from PIL import Image
from selenium import webdriver
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement

from tests.browser.conftest import Keep, Window

WIDE, PHONE, NARROW = (1280, 860), (390, 844), (320, 640)
TOUCH = 44  # CSS pixels
AA = 4.5
HOSTILE = "<script>window.pwned = 1</script><img src=x onerror='window.pwned = 2'><b>bold</b>"

# Answers by path where a test gives any; the server's own else. `asked` keeps what was sent to the chat endpoint.
FETCH = """
window.asked = []; window.violations = []
addEventListener("securitypolicyviolation", (event) =>
  violations.push(`${event.blockedURI} ${event.violatedDirective}`))
const served = window.fetch
const sse = (part) => `data: ${typeof part === "string" ? part : JSON.stringify(part)}\\n\\n`
const piece = (content) => ({model: "fake-v7", choices: [{index: 0, delta: {content}, finish_reason: null}]})
const last = {model: "fake-v7", choices: [], usage: {prompt_tokens: 9, completion_tokens: 3, total_tokens: 12}}
const whole = (...contents) => new Response(": ping\\n\\n" + [...contents.map(piece), last, "[DONE]"].map(sse).join(""))
const failed = (status, message, headers = {}) =>
    new Response(JSON.stringify({error: {message, type: "t", param: null, code: null}}), {status, headers})
// Says one piece, then nothing until it is told to go on or is aborted.
const slow = (options) => new Response(new ReadableStream({start(controller) {
    const say = (part) => controller.enqueue(new TextEncoder().encode(sse(part)))
    say(piece("One moment"))
    window.goOn = () => { say(piece(" more.")); say(last); say("[DONE]"); controller.close() }
    options.signal.addEventListener("abort", () => {
        sessionStorage.aborted = Number(sessionStorage.aborted ?? 0) + 1
        controller.error(new DOMException("aborted", "AbortError"))
    })
}}))
const routes = {%s}
window.fetch = async (path, options = {}) => {
    const at = new URL(path, location.href).pathname
    if (at === "/v1/chat/completions") asked.push({...JSON.parse(options.body), key: options.headers.Authorization})
    return routes[at]?.(options) ?? served(path, options)
}
"""
CHAT = '"/v1/chat/completions": (options) => '


class ChatServer(Protocol):
    """What serves the page: a champion, a challenger and sample pictures."""

    @property
    def url(self) -> str: ...


@dataclass
class Chat:
    """The page, and what a person does on it."""

    window: Window
    scripts: list[str] = field(default_factory=list)

    @property
    def driver(self) -> webdriver.Chrome:
        return self.window.driver

    def cdp(self, command: str, **parameters: Any) -> dict[str, Any]:
        return dict(self.driver.execute_cdp_cmd(command, parameters))

    def run(self, script: str, *arguments: object) -> Any:
        return self.driver.execute_script(script, *arguments)

    def open(self, routes: str = "", size: tuple[int, int] = WIDE, *, dark: bool = False) -> None:
        """Open the page with answers of our own: ``"/path": (options) => response``."""
        added = self.cdp("Page.addScriptToEvaluateOnNewDocument", source=FETCH % routes)
        self.scripts.append(added["identifier"])
        self.resize(size, dark=dark)
        self.window.open("/")
        self.until(lambda: self.run("return document.readyState") == "complete", "the page")

    def resize(self, size: tuple[int, int], *, dark: bool = False) -> None:
        width, height = size
        self.cdp(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        features = [
            {"name": "prefers-color-scheme", "value": "dark" if dark else "light"},
            {"name": "prefers-reduced-motion", "value": "reduce"},
        ]
        self.cdp("Emulation.setEmulatedMedia", features=features)

    def until(self, look: Callable[[], Any], what: str) -> Any:
        return self.window.until(look, what)

    def all(self, selector: str) -> list[WebElement]:
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def one(self, selector: str) -> WebElement:
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def give(self, path: Path) -> None:
        self.one("#file").send_keys(str(path))

    def has_picture(self, path: Path) -> None:
        self.give(path)
        self.window.first("#caption", path.name)

    def ask(self, question: str) -> None:
        self.one("#question").send_keys(question, Keys.ENTER)

    def answers(self, count: int = 1) -> list[WebElement]:
        """The panels of the last question, once every answer is whole."""

        def look() -> list[WebElement] | None:
            panels = self.all(".turn:last-of-type .answer")
            busy = self.all(".turn:last-of-type .text[aria-busy=true]")
            return panels if len(panels) == count and not busy else None

        found: list[WebElement] = self.until(look, f"{count} whole answers")
        return found

    def choose(self, value: str) -> None:
        self.window.first("#who", "Side by side")
        self.one(f"#who input[value={value}]").find_element(By.XPATH, "..").click()

    def asked(self) -> list[dict[str, Any]]:
        return list(self.run("return asked"))

    def focused(self) -> WebElement:
        return self.driver.switch_to.active_element

    def press(self, *keys: str) -> None:
        ActionChains(self.driver).send_keys(*keys).perform()

    def tab_to(self, selector: str) -> None:
        """Go there by the Tab key alone."""
        for _ in range(40):
            if self.focused() in self.all(selector):
                return
            self.press(Keys.TAB)
        pytest.fail(f"the Tab key never comes to {selector}")


@pytest.fixture
def chat(browser: webdriver.Chrome, chat_server: ChatServer) -> Iterator[Chat]:
    page = Chat(Window(browser, chat_server.url.rstrip("/")))
    browser.get_log("browser")  # what earlier tests left
    yield page
    for script in page.scripts:
        page.cdp("Page.removeScriptToEvaluateOnNewDocument", identifier=script)
    page.cdp("Emulation.clearDeviceMetricsOverride")
    page.cdp("Emulation.setEmulatedMedia", features=[])
    browser.get(page.window.site + "/page.css")
    browser.execute_script("sessionStorage.clear()")
    browser.get("about:blank")


@pytest.fixture
def red(tmp_path: Path) -> Path:
    path = tmp_path / "red.png"
    Image.new("RGB", (120, 80), "red").save(path)
    return path


def test_a_picture_is_given_and_asked_about(chat: Chat, red: Path) -> None:
    chat.open()
    chat.has_picture(red)
    assert chat.one("#picture").is_displayed()
    assert "120 × 80" in chat.one("#caption").text
    chat.ask("What color is it?")
    (panel,) = chat.answers()
    assert panel.find_element(By.CSS_SELECTOR, ".text").text
    assert panel.find_element(By.CSS_SELECTOR, ".alias").text == "Champion"
    assert panel.find_element(By.CSS_SELECTOR, ".version").text.startswith("version ")
    meta = panel.find_element(By.CSS_SELECTOR, ".meta").text
    assert "tokens" in meta
    assert "first token in" in meta
    assert chat.run("return violations") == []
    assert [entry for entry in chat.driver.get_log("browser") if entry["level"] == "SEVERE"] == []


def test_an_answer_is_shown_as_it_comes(chat: Chat, red: Path) -> None:
    chat.open(CHAT + "slow(options)")
    chat.has_picture(red)
    chat.ask("Slowly?")
    assert chat.window.first(".text", "One moment").get_attribute("aria-busy") == "true"
    chat.run("goOn()")
    (panel,) = chat.answers()
    assert panel.find_element(By.CSS_SELECTOR, ".text").text == "One moment more."
    assert "version 7" in panel.text
    assert "3 tokens" in panel.text
    assert "One moment more." in (chat.one("#status").get_attribute("textContent") or "")  # and to who listens


def test_the_challenger_answers_when_chosen(chat: Chat, red: Path) -> None:
    chat.open()
    chat.has_picture(red)
    chat.choose("challenger")
    chat.ask("What is it?")
    (panel,) = chat.answers()
    assert panel.find_element(By.CSS_SELECTOR, ".alias").text == "Challenger"
    assert chat.asked()[-1]["model"] == "challenger"


def test_both_answer_side_by_side(chat: Chat, keep: Keep) -> None:
    chat.open()
    chat.window.first(".sample").click()
    chat.answers()
    chat.choose("both")
    chat.ask("How many shapes are there?")
    first, second = chat.answers(2)
    assert [panel.get_attribute("data-alias") for panel in (first, second)] == ["champion", "challenger"]
    assert all(panel.find_element(By.CSS_SELECTOR, ".text").text for panel in (first, second))
    assert first.get_attribute("data-model") != second.get_attribute("data-model")
    assert first.rect["y"] == second.rect["y"]
    keep("chat")
    chat.resize(WIDE, dark=True)
    keep("chat-dark")
    chat.resize(PHONE)
    assert first.rect["x"] == second.rect["x"]
    keep("chat-phone")


def test_a_sample_picture_starts_a_conversation(chat: Chat) -> None:
    chat.open()
    sample = chat.window.first(".sample")
    assert sample.find_element(By.TAG_NAME, "img").get_attribute("alt")
    question = sample.text
    sample.click()
    (panel,) = chat.answers()
    assert panel.find_element(By.CSS_SELECTOR, ".text").text
    assert chat.one(".question").text == question
    assert chat.one(".truth").is_displayed()
    assert not chat.one("#welcome").is_displayed()
    assert chat.focused().tag_name == "button"  # not lost with the sample that went away


def test_the_served_version_its_scores_and_its_run_are_shown(chat: Chat) -> None:
    chat.open()
    assert "Champion is version" in chat.window.first("#served").text
    assert "Right answers" in chat.one("#about").text
    link = chat.one("#about a")
    assert "/runs/" in (link.get_attribute("href") or "")
    assert "noopener" in (link.get_attribute("rel") or "")


def test_hostile_output_is_text(chat: Chat, red: Path) -> None:
    chat.open(CHAT + f"whole({json.dumps(HOSTILE[:12])}, {json.dumps(HOSTILE[12:])})")
    chat.has_picture(red)
    chat.ask(HOSTILE)
    (panel,) = chat.answers()
    text = panel.find_element(By.CSS_SELECTOR, ".text")
    assert text.text == HOSTILE
    assert chat.one(".question").text == HOSTILE
    assert text.find_elements(By.CSS_SELECTOR, "*") == []
    assert chat.all("#turns script, #turns img, #turns b") == []
    assert chat.run("return window.pwned ?? null") is None


def test_hostile_names_and_errors_are_text(chat: Chat, red: Path) -> None:
    model = {"id": "champion", "alias": HOSTILE, "version": HOSTILE, "run_url": "javascript:alert(1)", "scores": None}
    chat.open(
        CHAT + f"failed(400, {json.dumps(HOSTILE)}),"
        f'"/v1/models": () => Response.json({{data: [{json.dumps(model)}]}}),'
        f'"/readyz": () => Response.json({{ready: true, version: "7", last_error: {json.dumps(HOSTILE)}}})'
    )
    assert HOSTILE in chat.window.first("#notice").text
    chat.has_picture(red.rename(red.with_name("<b>name.png")))
    chat.ask("Why?")
    (panel,) = chat.answers()
    assert panel.find_element(By.CSS_SELECTOR, ".problem").text == HOSTILE
    assert chat.all("body script, b:not(#invite b), img[src=x], a[href^=javascript]") == []
    assert chat.run("return window.pwned ?? null") is None


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("big.png", None, "50 MB is the most"),
        ("photo.heic", b"\0\0\0\x18ftypheic", "is HEIC"),
        ("drawing.svg", b"<svg xmlns='http://www.w3.org/2000/svg'/>", "is SVG"),
        ("notes.txt", b"no picture", "is not a picture"),
        ("broken.png", b"\x89PNG\r\n\x1a\n", "cannot be read"),
        ("empty.png", b"", "cannot be read"),
    ],
)
def test_files_that_cannot_be_asked_about_are_refused(
    chat: Chat, tmp_path: Path, name: str, content: bytes | None, said: str
) -> None:
    path = tmp_path / name
    with path.open("wb") as file:
        file.truncate(51_000_000) if content is None else file.write(content)
    chat.open()
    chat.give(path)
    assert name in chat.window.first("#refused", said).text
    assert not chat.one("#picture").is_displayed()


def test_a_picture_of_too_many_pixels_is_refused_undecoded(chat: Chat, tmp_path: Path) -> None:
    path = tmp_path / "bomb.png"
    Image.new("1", (20_000, 20_000)).save(path)
    chat.open()
    chat.give(path)
    assert "20000 × 20000" in chat.window.first("#refused", "too many").text


def test_a_large_picture_is_scaled_and_stands_upright(chat: Chat, tmp_path: Path) -> None:
    path = tmp_path / "lying.jpg"
    image = Image.new("RGB", (3000, 2000), "green")
    exif = image.getexif()
    exif[0x0112] = 6  # turned by a quarter
    image.save(path, exif=exif.tobytes())
    chat.open()
    chat.give(path)
    assert "2000 × 3000, sent as 1045 × 1568" in chat.window.first("#caption", "lying.jpg").text
    assert chat.run("return [picture.naturalWidth, picture.naturalHeight]") == [1045, 1568]


def test_a_small_picture_travels_unchanged(chat: Chat, red: Path) -> None:
    chat.open(CHAT + "whole('red')")
    chat.has_picture(red)
    chat.ask("What color?")
    chat.answers()
    kind, sent = chat.asked()[0]["messages"][0]["content"][0]["image_url"]["url"].split(",")
    assert kind == "data:image/png;base64"
    assert b64decode(sent) == red.read_bytes()


PASTED = """
const done = arguments[0]
const canvas = Object.assign(document.createElement("canvas"), {width: 30, height: 20})
canvas.toBlob((blob) => {
    const data = new DataTransfer()
    data.items.add(new File([blob], "pasted.png", {type: "image/png"}))
    const event = "%s" === "paste" ? new ClipboardEvent("paste", {clipboardData: data, bubbles: true, cancelable: true})
        : new DragEvent("%s", {dataTransfer: data, bubbles: true, cancelable: true})
    document.getElementById("question").dispatchEvent(event)
    done(event.defaultPrevented)
})
"""


@pytest.mark.parametrize("way", ["paste", "drop"])
def test_a_picture_may_be_pasted_or_dropped(chat: Chat, way: str) -> None:
    chat.open()
    assert chat.driver.execute_async_script(PASTED % (way, way))  # the browser does not open the file itself
    assert "30 × 20" in chat.window.first("#caption", "pasted.png").text


def test_pasted_text_goes_where_the_cursor_is(chat: Chat) -> None:
    chat.open()
    prevented = chat.run(
        'const data = new DataTransfer(); data.setData("text/plain", "words");'
        'const event = new ClipboardEvent("paste", {clipboardData: data, bubbles: true, cancelable: true});'
        'document.getElementById("question").dispatchEvent(event); return event.defaultPrevented'
    )
    assert prevented is False


def test_a_file_dragged_over_the_page_is_awaited(chat: Chat) -> None:
    chat.open()
    drag = (
        'const data = new DataTransfer(); data.items.add(new File(["x"], "x.png", {type: "image/png"}));'
        "document.body.dispatchEvent(new DragEvent(arguments[0], {dataTransfer: data, bubbles: true}));"
        'return document.body.classList.contains("dragging")'
    )
    assert chat.run(drag, "dragenter") is True
    assert chat.run(drag, "dragleave") is False


def test_the_picture_goes_with_the_first_question_alone(chat: Chat, red: Path) -> None:
    chat.open(CHAT + "whole('re', 'd')")
    chat.has_picture(red)
    for question in ("What color?", "Sure?"):
        chat.ask(question)
        chat.answers()
    kinds = [part["type"] for part in chat.asked()[0]["messages"][0]["content"]]
    assert kinds == ["image_url", "text"]
    first, answer, second = chat.asked()[1]["messages"]
    assert [part["type"] for part in first["content"]] == kinds
    assert answer == {"role": "assistant", "content": "red"}
    assert second == {"role": "user", "content": "Sure?"}


def test_another_picture_and_a_new_conversation_start_afresh(chat: Chat, red: Path, tmp_path: Path) -> None:
    chat.open(CHAT + "whole('red')")
    chat.has_picture(red)
    chat.ask("What color?")
    chat.answers()
    blue = tmp_path / "blue.png"
    Image.new("RGB", (40, 40), "blue").save(blue)
    chat.has_picture(blue)
    chat.window.first(".divider")
    chat.ask("And now?")
    chat.answers()
    assert len(chat.asked()[1]["messages"]) == 1
    chat.one("#anew").click()
    assert chat.all(".turn") == []
    assert chat.one("#welcome").is_displayed()
    assert chat.focused() == chat.one("#question")


def test_a_question_needs_a_picture(chat: Chat) -> None:
    chat.open()
    chat.ask("What color?")
    chat.window.first("#refused", "Choose a picture first")
    assert chat.one("#question").get_attribute("value") == "What color?"
    assert chat.focused() == chat.one("#file")


@pytest.mark.parametrize("way", ["escape", "button"])
def test_an_answer_can_be_stopped(chat: Chat, red: Path, way: str) -> None:
    chat.open(CHAT + "slow(options)")
    chat.has_picture(red)
    chat.ask("Slowly?")
    chat.window.first(".text", "One moment")
    chat.press(Keys.ESCAPE) if way == "escape" else chat.one("#stop").click()
    (panel,) = chat.answers()
    assert "stopped" in panel.text
    assert panel.find_element(By.CSS_SELECTOR, ".text").text == "One moment"
    assert chat.run("return sessionStorage.aborted") == "1"
    assert chat.one("#send").is_displayed()


def test_the_way_back_in_mid_stream_leaves_a_page_that_works(chat: Chat, red: Path) -> None:
    chat.open('"/v1/chat/completions": (options) => options.body.includes("Slowly") ? slow(options) : undefined')
    chat.has_picture(red)
    chat.ask("Slowly?")
    chat.window.first(".text", "One moment")
    chat.driver.get(chat.window.site + "/page.css")
    assert chat.run("return sessionStorage.aborted") == "1"
    chat.driver.back()
    chat.window.first("#question")
    if chat.all(".turn"):  # the page as it was left
        assert "stopped" in chat.answers()[0].text
    chat.has_picture(red)
    chat.ask("What color is it?")
    assert chat.answers()[0].find_element(By.CSS_SELECTOR, ".text").text


def test_everything_can_be_done_by_keyboard(chat: Chat) -> None:
    chat.open(CHAT + "slow(options)")
    chat.window.first(".sample")
    chat.tab_to("#file")
    assert chat.run("return getComputedStyle(document.getElementById('drop')).outlineStyle") == "solid"
    chat.tab_to("#who input")
    chat.press(Keys.ARROW_RIGHT)
    chat.tab_to(".sample")
    chat.press(Keys.ENTER)
    chat.window.first(".text", "One moment")
    assert chat.asked()[0]["model"] == "challenger"
    assert chat.focused() == chat.one("#stop")
    chat.press(Keys.ENTER)
    chat.answers()
    assert chat.focused() == chat.one("#send")
    chat.tab_to("#question")
    two_lines = ActionChains(chat.driver).send_keys("Two").key_down(Keys.SHIFT).send_keys(Keys.ENTER)
    two_lines.key_up(Keys.SHIFT).send_keys("lines?", Keys.ENTER).perform()
    chat.window.first(".turn:last-of-type .text", "One moment")
    assert chat.all(".question")[-1].text == "Two\nlines?"
    chat.run("goOn()")
    chat.answers()
    chat.tab_to(".copy")
    chat.tab_to("#anew")


def test_who_is_refused_reads_why_and_can_try_again(chat: Chat, red: Path) -> None:
    again = 'asked.length > 1 ? whole("red") : failed(429, "8 requests wait already.", {"Retry-After": "1"})'
    chat.open(CHAT + again)
    chat.has_picture(red)
    chat.ask("What color?")
    (panel,) = chat.answers()
    assert panel.find_element(By.CSS_SELECTOR, ".problem").text == "The server is busy. 8 requests wait already."
    button = panel.find_element(By.CSS_SELECTOR, ".again")
    assert button.text == "Try again in 1 s"
    chat.until(lambda: button.text == "Try again", "an end of the wait")
    button.click()
    chat.until(lambda: chat.all(".turn .text")[0].text == "red", "an answer")
    assert not panel.find_element(By.CSS_SELECTOR, ".problem").is_displayed()
    assert not button.is_displayed()


@pytest.mark.parametrize(
    ("route", "said", "again"),
    [
        ('failed(400, "No such thing.")', "No such thing.", False),
        ('failed(413, "")', "That is too large for the server.", False),
        ('failed(503, "")', "The server is not ready.", True),
        ('new Response("<h1>Bad gateway</h1>", {status: 502})', "The server answered 502.", True),
        ('new Response(sse(piece("Half")))', "The connection ended before the answer did.", True),
        ('new Response(sse({error: {message: "Too late."}}))', "The answer broke off. Too late.", True),
        ('new Response("data: {nonsense\\n\\n")', "The answer broke off.", True),
        ('Promise.reject(new TypeError("network"))', "The server cannot be reached.", True),
    ],
)
def test_what_goes_wrong_is_a_sentence_beside_the_question(
    chat: Chat, red: Path, route: str, said: str, again: bool
) -> None:
    chat.open(CHAT + route)
    chat.has_picture(red)
    chat.ask("What color?")
    (panel,) = chat.answers()
    assert panel.find_element(By.CSS_SELECTOR, ".problem").text == said
    assert panel.find_element(By.CSS_SELECTOR, ".again").is_displayed() is again
    assert chat.one("#send").is_displayed()


KEYED = """
"/v1/models": (options) => keyed(options) ?? Response.json({data: [{alias: "champion", version: "7", default: true}]}),
"/samples": (options) => keyed(options) ?? Response.json({data: []}),
"/v1/chat/completions": (options) => keyed(options) ?? whole("red")};
function keyed(options) { if (options.headers.Authorization !== "Bearer right") return failed(401, "No valid key.") }
const nothing = {
"""


def test_the_key_is_asked_for_once_and_stays_in_the_tab(chat: Chat, red: Path) -> None:
    chat.open(KEYED)
    field = chat.window.first("#key-input")
    assert field.get_attribute("type") == "password"
    field.send_keys("wrong", Keys.ENTER)
    chat.window.first("#key-wrong", "not accepted")
    chat.window.first("#key-input").send_keys("right", Keys.ENTER)
    chat.window.first("#served", "Champion is version 7")
    assert not chat.one("#key").is_displayed()
    chat.has_picture(red)
    chat.ask("What color?")
    assert "red" in chat.answers()[0].text
    assert chat.asked()[0]["key"] == "Bearer right"
    stored = chat.run("return [Object.values(sessionStorage), Object.values(localStorage), document.cookie]")
    assert stored == [["right"], [], ""]
    assert "right" not in chat.driver.current_url


def test_who_closes_the_key_form_is_asked_again_by_the_next_question_alone(chat: Chat, red: Path) -> None:
    chat.open(KEYED)
    chat.window.first("#key-input").send_keys(Keys.ESCAPE)
    chat.window.first("#notice", "asks for a key")
    chat.run('document.dispatchEvent(new Event("visibilitychange", {bubbles: true}))')
    assert not chat.one("#key").is_displayed()
    chat.has_picture(red)
    chat.ask("What color?")
    chat.window.first("#key-input").send_keys("right", Keys.ENTER)
    assert "red" in chat.answers()[0].text


def test_a_swap_and_a_refused_version_are_told_quietly(chat: Chat) -> None:
    chat.open(
        'served: null, "/v1/models": () => Response.json({data: [{alias: "champion", version: window.now ?? "7"}]}),'
        '"/readyz": () => Response.json({ready: true, version: "8", last_error: window.now ? "Not finite." : null})'
    )
    chat.window.first("#served", "version 7")
    assert not chat.one("#notice").is_displayed()
    chat.run('window.now = "8"; document.dispatchEvent(new Event("visibilitychange", {bubbles: true}))')
    chat.window.first("#notice", "Champion: now version 8.")
    chat.window.first("#notice", "Still serving version 8: the newer one was refused. Not finite.")
    assert "version 8" in chat.one("#served").text


def test_a_server_without_samples_or_scores_still_has_a_page(chat: Chat) -> None:
    chat.open(
        '"/samples": () => Response.json({data: []}),'
        '"/v1/models": () => Response.json({data: [{alias: "champion", version: "7", scores: null, run_url: null}]})'
    )
    chat.window.first("#served", "version 7")
    assert not chat.one("#begin").is_displayed()
    assert not chat.one("#who").is_displayed()
    assert chat.one("#welcome").is_displayed()


def test_nothing_scrolls_sideways_on_the_smallest_phone(chat: Chat, red: Path) -> None:
    chat.open(CHAT + "whole('x'.repeat(600))", NARROW)
    chat.window.first(".sample")
    wide = "return [document.documentElement.scrollWidth, document.body.scrollWidth]"
    assert chat.run(wide) == [320, 320]
    chat.one("#served").click()
    chat.choose("both")
    assert chat.run(wide) == [320, 320]
    chat.has_picture(red.rename(red.with_name("n" * 120 + ".png")))
    chat.ask("y" * 200)
    chat.answers(2)
    assert chat.run(wide) == [320, 320]


def test_nothing_is_fetched_from_other_hosts(chat: Chat, red: Path) -> None:
    chat.open()
    chat.window.first(".sample")
    chat.has_picture(red)
    chat.ask("What color is it?")
    chat.answers()
    fetched = chat.run("return performance.getEntriesByType('resource').map((entry) => entry.name)")
    assert {urlsplit(name).path for name in fetched} >= {"/page.css", "/page.js", "/v1/models", "/v1/chat/completions"}
    own = ("blob:", "data:", chat.window.site + "/")
    assert [name for name in fetched if not name.startswith(own)] == []
    assert chat.run("return violations") == []


def test_the_policy_forbids_scripts_of_others(chat: Chat) -> None:
    chat.open()
    chat.run("document.body.append(Object.assign(document.createElement('script'), {textContent: 'window.pwned = 1'}))")
    assert chat.run("return window.pwned ?? null") is None
    chat.until(lambda: chat.run("return violations"), "a violation")


def controls(chat: Chat) -> list[WebElement]:
    found = chat.all("button, input, textarea, select, summary, a[href]")
    return [control for control in found if control.is_displayed()]


@pytest.mark.parametrize("size", [WIDE, PHONE])
def test_controls_have_names_and_room_for_a_finger(chat: Chat, red: Path, size: tuple[int, int]) -> None:
    chat.open(size=size)
    chat.window.first(".sample")
    assert chat.one("#file").accessible_name == "Choose a picture"
    for _ in range(2):
        for control in controls(chat):
            name = control.accessible_name
            assert name, control.get_attribute("outerHTML")
            if control.get_attribute("class") == "skip" or control.get_attribute("id") == "file":
                continue  # unseen until focused, and the label around the picture is what is touched
            assert control.rect["height"] >= TOUCH, name
            assert control.rect["width"] >= TOUCH, name
        chat.has_picture(red)
        chat.ask("What color is it?")
        chat.answers()
    ids = [element.get_attribute("id") for element in chat.all("[id]")]
    assert len(ids) == len(set(ids))
    assert all(image.get_attribute("alt") for image in chat.all("img"))
    assert chat.one("html").get_attribute("lang") == "en"
    assert len(chat.all("h1")) == len(chat.all("main")) == 1
    assert {chat.one(f"#{live}").aria_role for live in ("status",)} == {"status"}


CONTRAST = """
const canvas = document.createElement("canvas").getContext("2d", {willReadFrequently: true})
const rgb = (color) => {
    canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = color; canvas.fillRect(0, 0, 1, 1)
    return [...canvas.getImageData(0, 0, 1, 1).data]
}
const light = (color) => rgb(color).slice(0, 3).map((v) => v / 255)
    .map((v) => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0)
const behind = (element) => {
    for (let at = element; at; at = at.parentElement) {
        const color = getComputedStyle(at).backgroundColor
        if (rgb(color)[3] === 255) return color
    }
    return "white"
}
return [...document.querySelectorAll("body *")].filter((element) => element.checkVisibility()
    && [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim())).map((element) => {
    const [a, b] = [light(getComputedStyle(element).color), light(behind(element))].sort((x, y) => y - x)
    return [element.textContent.trim().slice(0, 40), (a + 0.05) / (b + 0.05)]
})
"""


@pytest.mark.parametrize("dark", [False, True])
def test_text_is_readable_by_day_and_in_the_dark(chat: Chat, red: Path, dark: bool) -> None:
    chat.open(CHAT + "asked.length > 1 ? failed(503, '') : whole('red')", dark=dark)
    chat.window.first(".sample")
    measured = chat.run(CONTRAST)
    chat.one("#question").send_keys("No picture yet?", Keys.ENTER)
    chat.window.first("#refused")
    measured += chat.run(CONTRAST)
    chat.has_picture(red)
    chat.one("#question").send_keys(Keys.ENTER)
    chat.answers()
    chat.ask("Again?")
    chat.window.first(".problem")
    measured += chat.run(CONTRAST)
    assert len(measured) > 30
    assert [(text, ratio) for text, ratio in measured if ratio < AA] == []
    red_part = int(chat.run("return getComputedStyle(document.body).backgroundColor").split("(")[1].split(",")[0])
    assert (red_part < 64) is dark


def test_an_answer_can_be_copied(chat: Chat, red: Path) -> None:
    chat.open(CHAT + "whole('re', 'd')")
    chat.run("navigator.clipboard.writeText = async (text) => { window.copied = text }")
    chat.has_picture(red)
    chat.ask("What color?")
    chat.answers()[0].find_element(By.CSS_SELECTOR, ".copy").click()
    chat.until(lambda: chat.run("return window.copied") == "red", "a copy")
    assert chat.one("#status").get_attribute("textContent") == "Copied"
