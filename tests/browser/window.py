"""A browser on one site."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from selenium import webdriver
from selenium.common.exceptions import StaleElementReferenceException
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.wait import WebDriverWait

T = TypeVar("T")
PATIENCE = 30  # seconds, for a page to show what it should


@dataclass(frozen=True)
class Window:
    """A browser on one site."""

    driver: webdriver.Chrome
    site: str

    def open(self, path: str) -> None:
        """Go to a page, anew."""
        self.driver.get("about:blank")
        self.driver.get(self.site + path)

    def first(self, selector: str, text: str = "") -> WebElement:
        """The first visible element of a CSS selector whose text holds ``text``, as soon as there is one."""
        return self.until(
            lambda: next(
                (
                    e
                    for e in self.driver.find_elements(By.CSS_SELECTOR, selector)
                    if e.is_displayed() and text in e.text
                ),
                None,
            ),
            f"{selector!r} with {text!r}",
        )

    def until(self, look: Callable[[], T | None], what: str) -> T:
        """What a look gives as soon as it gives anything; pages that are still being drawn are looked at again."""
        wait = WebDriverWait(self.driver, PATIENCE, 0.1, ignored_exceptions=[StaleElementReferenceException])
        found = wait.until(lambda _: look(), f"nothing like {what} at {self.driver.current_url}")
        assert found
        return found
