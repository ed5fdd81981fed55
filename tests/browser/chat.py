"""The chat page as a person uses it, and the server it comes from.

Answers that no small model can be made to give come from a fetch of our own, put into the page before its script runs.
"""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
from selenium import webdriver
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement

from llava_pipeline.serving.keys import add_key
from tests.browser import pausable_server
from tests.browser.window import Window
from tests.serving import served
from tests.serving.served import Served

WIDE, PHONE, NARROW = (1280, 860), (390, 844), (320, 640)
LOOK_AGAIN = 'document.dispatchEvent(new Event("visibilitychange", {bubbles: true}))'  # sooner than by itself

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
window.routes = {%s}
window.fetch = async (path, options = {}) => {
    const at = new URL(path, location.href).pathname
    if (at === "/v1/chat/completions") asked.push({...JSON.parse(options.body), key: options.headers.Authorization})
    return routes[at]?.(options) ?? served(path, options)
}
"""
STORED = """
if (location.pathname === "/") sessionStorage.clear()
if (location.pathname === "/" && "%(key)s") sessionStorage.setItem("api-key", "%(key)s")
"""
CHAT = '"/v1/chat/completions": (options) => '


@dataclass(frozen=True)
class ChatServer:
    """A server with a champion, a challenger, sample pictures and one key."""

    served: Served
    home: Path
    key: str
    pace: Path

    @contextmanager
    def drawn_out(self, seconds: float = 0.1) -> Iterator[None]:
        """Answers that take so long for each token, and do not end before their longest."""
        self.takes(seconds)
        try:
            yield
        finally:
            self.pace.unlink()

    def takes(self, seconds: float) -> None:
        """So long for each token, from now on."""
        written = self.pace.with_suffix(".new")
        written.write_text(str(seconds))
        written.replace(self.pace)

    def get(self, path: str) -> Any:
        """What the server tells who has the key."""
        return self._get(path).json()

    def _get(self, path: str) -> httpx.Response:
        return self.served.get(path, headers={"authorization": f"Bearer {self.key}"}).raise_for_status()

    def measured(self, name: str) -> float:
        """A number of the server's own; 0 where it has not counted any."""
        lines = [line.rsplit(" ", 1) for line in self._get("/metrics").text.splitlines()]
        return sum(float(value) for key, value in lines if key == name)

    def stops(self, seconds: float = 3.0) -> None:
        """Wait until nothing is being answered: sooner than the answer would have ended by itself."""
        until = time.monotonic() + seconds
        while self.measured("llava_num_requests_running"):
            assert time.monotonic() < until, "the server goes on for nobody"
            time.sleep(0.05)


@contextmanager
def serving_chat(home: Path) -> Iterator[ChatServer]:
    """The real server, with answers that can be drawn out."""
    launcher, pace, keys = home / "serve", home / "pace", home / "keys.json"
    # By a shell: the first line of a script has no room for a Python whose path has a space.
    command = shlex.join([sys.executable, "-P", str(pausable_server.__file__)])
    launcher.write_text(f'#!/bin/sh\nexec {command} "$@"\n', encoding="utf-8")
    launcher.chmod(0o755)
    key = add_key(keys, "browser")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(served, "COMMAND", launcher)
        environment = {pausable_server.PACE: str(pace)}
        with served.serving(home, "--also", "challenger", "--keys", str(keys), **environment) as one:
            yield ChatServer(one, home, key, pace)


@dataclass
class Chat:
    """The page, and what a person does on it."""

    window: Window
    server: ChatServer
    scripts: list[str] = field(default_factory=list)

    @property
    def driver(self) -> webdriver.Chrome:
        return self.window.driver

    def cdp(self, command: str, **parameters: Any) -> dict[str, Any]:
        return dict(self.driver.execute_cdp_cmd(command, parameters))

    def run(self, script: str, *arguments: object) -> Any:
        return self.driver.execute_script(script, *arguments)

    def open(
        self, routes: str = "", size: tuple[int, int] = WIDE, *, dark: bool = False, keyed: bool = True
    ) -> None:  # fmt: skip
        """Open the page with answers of our own (``"/path": (options) => response``), by who has typed the key."""
        self.forget_scripts()
        script = FETCH % routes + STORED % {"key": self.server.key if keyed else ""}
        self.scripts.append(self.cdp("Page.addScriptToEvaluateOnNewDocument", source=script)["identifier"])
        self.resize(size, dark=dark)
        self.window.open("/")
        self.until(lambda: self.run("return document.readyState") == "complete", "the page")

    def forget_scripts(self) -> None:
        while self.scripts:
            self.cdp("Page.removeScriptToEvaluateOnNewDocument", identifier=self.scripts.pop())

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

    def answer_to(self, question: str) -> WebElement:
        """Ask, and wait for the panel of the one answer."""
        return self.answers_to(lambda: self.ask(question))[0]

    def answers_to(self, ask: Callable[[], None], count: int = 1) -> list[WebElement]:
        """The panels of the turn that something begins."""
        before = len(self.all(".turn"))
        ask()
        self.until(lambda: len(self.all(".turn")) == before + 1, "a turn")
        return self.answers(count)

    def ask_sample(self) -> str:
        """Begin with the first sample picture; its question."""
        sample = self.window.first(".sample")
        self.run("arguments[0].scrollIntoView({block: 'center'})", sample)
        question = sample.text
        sample.click()
        return question

    def begins(self) -> str:
        """What the answer under way has said so far, as soon as it has said anything."""

        def look() -> str | None:
            said = [text.text for text in self.all(".text[aria-busy=true]")]
            return said[0] if said else None

        return str(self.until(look, "the beginning of an answer"))

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


def part(panel: WebElement, name: str) -> WebElement:
    """A part of an answer's panel."""
    return panel.find_element(By.CSS_SELECTOR, f".{name}")
