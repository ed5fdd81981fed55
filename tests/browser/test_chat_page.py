"""The chat page in a real browser, over a real server whose model may well be wrong."""

from __future__ import annotations

import json
from base64 import b64decode
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from PIL import Image
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement

from tests.browser.chat import CHAT, LOOK_AGAIN, NARROW, PHONE, WIDE, Chat, part
from tests.browser.conftest import Keep
from tests.serving.served import point

TOUCH = 44  # CSS pixels
AA = 4.5
HOSTILE = "<script>window.pwned = 1</script><img src=x onerror='window.pwned = 2'><b>bold</b>"


def test_a_picture_is_given_and_asked_about(chat: Chat, red: Path) -> None:
    chat.open()
    chat.has_picture(red)
    assert chat.one("#picture").is_displayed()
    assert "120 × 80" in chat.one("#caption").text
    panel = chat.answer_to("What color is it?")
    assert part(panel, "text").text
    assert part(panel, "alias").text == "Champion"
    assert part(panel, "version").text == "version 1"
    assert panel.get_attribute("data-model") == "llava-projector-pocket-v1"
    meta = part(panel, "meta").text
    assert "tokens" in meta
    assert "first token in" in meta
    kind, sent = chat.asked()[0]["messages"][0]["content"][0]["image_url"]["url"].split(",")
    assert (kind, b64decode(sent)) == ("data:image/png;base64", red.read_bytes())  # small enough to travel as it is
    assert [entry for entry in chat.driver.get_log("browser") if entry["level"] == "SEVERE"] == []


def test_an_answer_is_shown_as_it_comes(chat: Chat, red: Path) -> None:
    chat.open()
    chat.has_picture(red)
    with chat.server.drawn_out():
        chat.ask("What color is it?")
        begun = chat.begins()
        (text,) = chat.all(".text")
        assert text.get_attribute("aria-busy") == "true"
        chat.until(lambda: len(text.text) > len(begun), "more of the answer")
        assert chat.one("#stop").is_displayed()
        chat.server.takes(0)
        (panel,) = chat.answers()
    assert text.text.startswith(begun)
    assert "64 tokens" in part(panel, "meta").text
    assert "stops at 64 tokens" in part(panel, "meta").text
    assert text.text in (chat.one("#status").get_attribute("textContent") or "")  # and to who listens


def test_both_answer_side_by_side(chat: Chat, keep: Keep) -> None:
    chat.open()
    chat.choose("both")
    chat.answers_to(chat.ask_sample, 2)
    first, second = chat.answers_to(lambda: chat.ask("How many shapes are there?"), 2)
    assert [part(panel, "alias").text for panel in (first, second)] == ["Champion", "Challenger"]
    assert [part(panel, "version").text for panel in (first, second)] == ["version 1", "version 2"]
    assert all(part(panel, "text").text for panel in (first, second))
    assert all("first token in" in part(panel, "meta").text for panel in (first, second))
    assert first.rect["y"] == second.rect["y"]
    keep("chat")
    chat.resize(WIDE, dark=True)
    keep("chat-dark")
    chat.choose("challenger")
    assert part(chat.answer_to("What is it?"), "alias").text == "Challenger"
    assert [asked["model"] for asked in chat.asked()] == [
        "champion",
        "challenger",
        "champion",
        "challenger",
        "challenger",
    ]


def test_both_answer_one_below_the_other_on_a_phone(chat: Chat, keep: Keep) -> None:
    chat.open(size=PHONE)
    chat.choose("both")
    first, second = chat.answers_to(chat.ask_sample, 2)
    assert first.rect["x"] == second.rect["x"]
    assert first.rect["y"] + first.rect["height"] <= second.rect["y"]
    below = chat.one("#ask").rect["y"]
    assert second.rect["y"] + second.rect["height"] <= below  # not behind what is asked with
    keep("chat-phone")


def test_a_sample_picture_starts_a_conversation(chat: Chat) -> None:
    chat.open()
    assert chat.window.first(".sample img").get_attribute("alt")
    question = chat.ask_sample()
    chat.window.first(".truth", "The true answer: ")
    assert part(chat.answers()[0], "text").text
    assert chat.one(".question").text == question
    assert not chat.one("#welcome").is_displayed()
    assert chat.focused().tag_name == "button"  # not lost with the sample that went away


def test_the_served_version_its_scores_and_its_run_are_shown(chat: Chat) -> None:
    chat.open()
    chat.window.first("#served", "Champion is version 1")
    (champion, *_) = chat.server.get("/v1/models")["data"]
    right = chat.window.first("#scores tr", "Right answers").text
    assert f"{champion['scores']['exact_match'] * 100:.1f} %" in right
    assert champion["digest"][:12] in chat.one("#about").text
    link = chat.one("#about a")
    assert link.get_attribute("href") == champion["run_url"]
    assert "/runs/" in champion["run_url"]
    assert "noopener" in (link.get_attribute("rel") or "")
    chat.choose("both")
    chat.window.first("#served", "Challenger is version 2")
    assert len(chat.all("#scores tr:first-child td")) == 2


def test_another_champion_is_told_and_answers_on_the_open_page(chat: Chat, red: Path) -> None:
    chat.open()
    chat.has_picture(red)
    chat.window.first("#served", "Champion is version 1")
    assert part(chat.answer_to("What color is it?"), "version").text == "version 1"
    try:
        point(chat.server.home, "champion", "2")
        chat.server.served.wait_for("2")
        chat.run(LOOK_AGAIN)
        chat.window.first("#notice", "Champion: now version 2.")
        assert "Champion is version 2" in chat.one("#served").text
        assert part(chat.answer_to("And now?"), "version").text == "version 2"
    finally:
        point(chat.server.home, "champion", "1")
        chat.server.served.wait_for("1")


def test_a_refused_champion_is_told(chat: Chat) -> None:
    chat.open('"/readyz": () => Response.json({ready: true, version: "1", last_error: window.why ?? null})')
    chat.window.first(".sample")  # what is told comes before these
    assert not chat.one("#notice").is_displayed()
    chat.run('window.why = "Version 3 does not answer."; ' + LOOK_AGAIN)
    chat.window.first("#notice", "Version 1 answers. Version 3 does not answer")
    chat.run("window.why = null; " + LOOK_AGAIN)
    chat.until(lambda: not chat.one("#notice").is_displayed(), "an end of the notice")


def test_hostile_output_is_text(chat: Chat, red: Path) -> None:
    chat.open(CHAT + f"whole({json.dumps(HOSTILE[:12])}, {json.dumps(HOSTILE[12:])})")
    chat.has_picture(red)
    text = part(chat.answer_to(HOSTILE), "text")
    assert text.text == chat.one(".question").text == HOSTILE
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
    assert HOSTILE in chat.window.first("#notice", HOSTILE).text
    chat.has_picture(red.rename(red.with_name("<b>name.png")))
    assert part(chat.answer_to("Why?"), "problem").text == HOSTILE
    assert chat.all("body script, b:not(#invite b), img[src=x], a[href^=javascript]") == []
    assert chat.run("return window.pwned ?? null") is None


UNREADABLE: dict[str, tuple[bytes | None, str]] = {
    "big.png": (None, "50 MB is the most"),
    "photo.heic": (b"\0\0\0\x18ftypheic", "is HEIC"),
    "drawing.svg": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "is SVG"),
    "notes.txt": (b"no picture", "is not a picture"),
    "broken.png": (b"\x89PNG\r\n\x1a\n", "cannot be read"),
    "empty.png": (b"", "cannot be read"),
}


def test_files_that_cannot_be_asked_about_are_refused(chat: Chat, tmp_path: Path) -> None:
    chat.open()
    for name, (content, said) in UNREADABLE.items():
        path = tmp_path / name
        with path.open("wb") as file:
            file.truncate(51_000_000) if content is None else file.write(content)
        chat.give(path)
        assert said in chat.window.first("#refused", name).text
        assert not chat.one("#picture").is_displayed()
    bomb = tmp_path / "bomb.png"
    Image.new("1", (12_000, 12_000)).save(bomb, compress_level=1)
    chat.give(bomb)  # refused by its header: nothing decodes it
    assert "12000 × 12000 pixels, which is too many" in chat.window.first("#refused", "bomb.png").text
    assert not chat.one("#picture").is_displayed()


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
    assert part(chat.answer_to("What color is it?"), "text").text  # and the server reads what the page has made


ARRIVES = """
const [way, done] = arguments
const canvas = Object.assign(document.createElement("canvas"), {width: 30, height: 20})
canvas.toBlob((blob) => {
    const data = new DataTransfer()
    data.items.add(new File([blob], `${way}.png`, {type: "image/png"}))
    const event = way === "paste" ? new ClipboardEvent("paste", {clipboardData: data, bubbles: true, cancelable: true})
        : new DragEvent(way, {dataTransfer: data, bubbles: true, cancelable: true})
    document.getElementById("question").dispatchEvent(event)
    done(event.defaultPrevented)
})
"""
TEXT_ARRIVES = """
const data = new DataTransfer(); data.setData("text/plain", "words")
const event = new ClipboardEvent("paste", {clipboardData: data, bubbles: true, cancelable: true})
document.getElementById("question").dispatchEvent(event)
return event.defaultPrevented
"""
DRAGGED = """
const data = new DataTransfer(); data.items.add(new File(["x"], "x.png", {type: "image/png"}))
document.body.dispatchEvent(new DragEvent(arguments[0], {dataTransfer: data, bubbles: true}))
return document.body.classList.contains("dragging")
"""


def test_a_picture_may_be_pasted_or_dropped(chat: Chat) -> None:
    chat.open()
    assert chat.run(DRAGGED, "dragenter") is True
    assert chat.run(DRAGGED, "dragleave") is False
    for way in ("paste", "drop"):
        assert chat.driver.execute_async_script(ARRIVES, way)  # the browser does not open the file itself
        assert "30 × 20" in chat.window.first("#caption", f"{way}.png").text
    assert chat.run(TEXT_ARRIVES) is False  # text goes where the cursor is
    assert part(chat.answer_to("What color is it?"), "text").text


def test_the_picture_goes_with_the_first_question_alone(chat: Chat, red: Path, tmp_path: Path) -> None:
    chat.open()
    chat.has_picture(red)
    said = part(chat.answer_to("What color?"), "text").text
    assert not part(chat.answer_to("Sure?"), "problem").is_displayed()  # the server takes it so
    one, two = chat.asked()
    kinds = [piece["type"] for piece in one["messages"][0]["content"]]
    assert kinds == ["image_url", "text"]
    first, answer, second = two["messages"]
    assert [piece["type"] for piece in first["content"]] == kinds
    assert answer == {"role": "assistant", "content": said}
    assert second == {"role": "user", "content": "Sure?"}

    blue = tmp_path / "blue.png"  # another picture starts afresh
    Image.new("RGB", (40, 40), "blue").save(blue)
    chat.has_picture(blue)
    chat.window.first(".divider")
    chat.answer_to("And now?")
    assert len(chat.asked()[2]["messages"]) == 1
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
    assert chat.asked() == []


def test_an_answer_that_is_stopped_stops_on_the_server_too(chat: Chat, red: Path) -> None:
    chat.open()
    chat.has_picture(red)
    with chat.server.drawn_out():
        for way in (lambda: chat.press(Keys.ESCAPE), lambda: chat.one("#stop").click()):
            chat.ask("Slowly?")
            begun = chat.begins()
            assert chat.server.measured("llava_num_requests_running") == 1
            way()
            (panel,) = chat.answers()
            assert "stopped" in part(panel, "meta").text
            assert part(panel, "text").text.startswith(begun)
            chat.server.stops()
            assert chat.one("#send").is_displayed()


def test_who_goes_back_in_mid_stream_leaves_no_work_and_comes_back_to_a_page_that_works(chat: Chat, red: Path) -> None:
    chat.open()
    chat.has_picture(red)
    left = 'llava_request_success_total{finished_reason="left"}'
    before = chat.server.measured(left)
    with chat.server.drawn_out():
        chat.ask("Slowly?")
        chat.begins()
        assert chat.server.measured("llava_num_requests_running") == 1
        chat.driver.back()
        chat.server.stops()
    assert chat.server.measured(left) == before + 1
    chat.driver.forward()
    chat.window.first("#question")
    if chat.all(".turn"):  # the page as it was left
        assert "stopped" in chat.answers()[0].text
    chat.has_picture(red)
    assert part(chat.answer_to("What color is it?"), "text").text


def test_everything_can_be_done_by_keyboard(chat: Chat) -> None:
    chat.open()
    chat.window.first(".sample")
    chat.tab_to("#file")
    assert chat.run("return getComputedStyle(document.getElementById('drop')).outlineStyle") == "solid"
    chat.tab_to("#who input")
    chat.press(Keys.ARROW_RIGHT)
    chat.tab_to(".sample")
    with chat.server.drawn_out():
        chat.press(Keys.ENTER)
        chat.begins()
        assert chat.asked()[0]["model"] == "challenger"
        assert chat.focused() == chat.one("#stop")
        chat.press(Keys.ENTER)
        chat.answers()
    assert chat.focused() == chat.one("#send")
    chat.tab_to("#question")
    two_lines = ActionChains(chat.driver).send_keys("Two").key_down(Keys.SHIFT).send_keys(Keys.ENTER)
    two_lines.key_up(Keys.SHIFT).send_keys("lines?", Keys.ENTER).perform()
    chat.until(lambda: len(chat.all(".turn")) == 2, "a turn")
    chat.answers()
    assert chat.all(".question")[-1].text == "Two\nlines?"
    chat.tab_to(".copy")
    chat.tab_to("#anew")


def test_who_is_refused_reads_why_and_can_try_again(chat: Chat, red: Path) -> None:
    chat.open(CHAT + 'asked.length > 1 ? undefined : failed(429, "8 requests wait already.", {"Retry-After": "1"})')
    chat.has_picture(red)
    panel = chat.answer_to("What color?")
    assert part(panel, "problem").text == "The server is busy. 8 requests wait already."
    button = part(panel, "again")
    assert button.text == "Try again in 1 s"
    chat.until(lambda: button.text == "Try again", "an end of the wait")
    button.click()
    chat.until(lambda: part(panel, "text").text, "an answer")
    assert not part(panel, "problem").is_displayed()
    assert not button.is_displayed()


WRONG = [
    ('failed(400, "No such thing.")', "No such thing.", False),
    ('failed(413, "")', "That is too large for the server.", False),
    ('failed(503, "")', "The server is not ready.", True),
    ('new Response("<h1>Bad gateway</h1>", {status: 502})', "The server answered 502.", True),
    ('new Response(sse(piece("Half")))', "The connection ended before the answer did.", True),
    ('new Response(sse({error: {message: "Too late."}}))', "The answer broke off. Too late.", True),
    ('new Response("data: {nonsense\\n\\n")', "The answer broke off.", True),
    ('Promise.reject(new TypeError("network"))', "The server cannot be reached.", True),
]


def test_what_goes_wrong_is_a_sentence_beside_the_question(chat: Chat, red: Path) -> None:
    chat.open()
    chat.has_picture(red)
    for route, said, again in WRONG:
        chat.run(f"routes['/v1/chat/completions'] = (options) => {route}")
        panel = chat.answer_to("What color?")
        assert part(panel, "problem").text == said
        assert part(panel, "again").is_displayed() is again
        assert chat.one("#send").is_displayed()
    chat.run("routes['/v1/chat/completions'] = undefined; question.value = 'Why? '.repeat(700)")
    assert "begin a new conversation" in part(chat.answer_to("So?"), "problem").text  # the server's own refusal
    chat.one("#anew").click()
    assert part(chat.answer_to("What color?"), "text").text  # and nothing of it stays


def test_the_key_is_asked_for_once_and_stays_in_the_tab(chat: Chat, red: Path) -> None:
    chat.open(keyed=False)
    field = chat.window.first("#key-input")
    assert field.get_attribute("type") == "password"
    field.send_keys("wrong", Keys.ENTER)
    chat.window.first("#key-wrong", "not accepted")
    key = chat.server.key
    chat.window.first("#key-input").send_keys(key, Keys.ENTER)
    chat.window.first("#served", "Champion is version 1")
    assert not chat.one("#key").is_displayed()
    chat.has_picture(red)
    assert part(chat.answer_to("What color?"), "text").text
    stored = chat.run("return [Object.values(sessionStorage), Object.values(localStorage), document.cookie]")
    assert stored == [[key], [], ""]
    assert key not in chat.driver.current_url


def test_who_closes_the_key_form_is_asked_again_by_the_next_question_alone(chat: Chat, red: Path) -> None:
    chat.open(keyed=False)
    chat.window.first("#key-input").send_keys(Keys.ESCAPE)
    chat.window.first("#notice", "asks for a key")
    chat.run(LOOK_AGAIN)
    assert not chat.one("#key").is_displayed()
    chat.has_picture(red)
    chat.ask("What color?")
    chat.window.first("#key-input").send_keys(chat.server.key, Keys.ENTER)
    assert part(chat.answers()[0], "text").text
    chat.until(lambda: not chat.one("#notice").is_displayed(), "an end of the notice")


def test_a_server_without_keys_samples_or_scores_still_has_a_page(chat: Chat) -> None:
    chat.open(
        '"/samples": () => Response.json({data: []}),'
        '"/v1/models": () => Response.json({data: [{alias: "champion", version: "7", scores: null, run_url: null}]})',
        keyed=False,
    )
    chat.window.first("#served", "version 7")
    assert not any(chat.one(name).is_displayed() for name in ("#key", "#begin", "#who"))
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


def test_nothing_is_fetched_from_other_hosts_and_scripts_of_others_do_not_run(chat: Chat, red: Path) -> None:
    chat.open()
    chat.window.first(".sample")
    chat.has_picture(red)
    chat.answer_to("What color is it?")
    fetched = chat.run("return performance.getEntriesByType('resource').map((entry) => entry.name)")
    assert {urlsplit(name).path for name in fetched} >= {"/page.css", "/page.js", "/v1/models", "/v1/chat/completions"}
    own = ("blob:", "data:", chat.window.site + "/")
    assert [name for name in fetched if not name.startswith(own)] == []
    assert chat.run("return violations") == []
    chat.run("document.body.append(Object.assign(document.createElement('script'), {textContent: 'window.pwned = 1'}))")
    chat.until(lambda: chat.run("return violations"), "a violation")
    assert chat.run("return window.pwned ?? null") is None


def controls(chat: Chat) -> list[WebElement]:
    found = chat.all("button, input, textarea, select, summary, a[href]")
    return [control for control in found if control.is_displayed()]


def check_controls(chat: Chat) -> None:
    for control in controls(chat):
        name = control.accessible_name
        assert name, control.get_attribute("outerHTML")
        if control.get_attribute("class") == "skip" or control.get_attribute("id") == "file":
            continue  # unseen until focused, and the label around the picture is what is touched
        assert control.rect["height"] >= TOUCH, name
        assert control.rect["width"] >= TOUCH, name


def test_controls_have_names_and_room_for_a_finger(chat: Chat, red: Path) -> None:
    chat.open(size=PHONE)
    chat.window.first(".sample")
    assert chat.one("#file").accessible_name == "Choose a picture"
    chat.one("#served").click()
    check_controls(chat)
    chat.has_picture(red)
    chat.answer_to("What color is it?")
    check_controls(chat)
    ids = [element.get_attribute("id") for element in chat.all("[id]")]
    assert len(ids) == len(set(ids))
    assert all(image.get_attribute("alt") for image in chat.all("img"))
    assert chat.one("html").get_attribute("lang") == "en"
    assert len(chat.all("h1")) == len(chat.all("main")) == 1
    assert chat.one("#status").aria_role == "status"


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
    chat.open()
    chat.run("navigator.clipboard.writeText = async (text) => { window.copied = text }")
    chat.has_picture(red)
    panel = chat.answer_to("What color?")
    part(panel, "copy").click()
    chat.until(lambda: chat.run("return window.copied") == part(panel, "text").text, "a copy")
    assert chat.one("#status").get_attribute("textContent") == "Copied"
