"""What a person finds in MLflow's pages, where they would look for it."""

from __future__ import annotations

import pytest
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from llava_pipeline.tracking import promotion, registry
from llava_pipeline.tracking.client import connect, ensure_experiment
from tests.browser.conftest import Keep, Pages
from tests.browser.window import Window

pytestmark = pytest.mark.slow  # every one of them shares what takes long to come up

CHART = "[data-testid=experiment-view-compare-runs-card]"


def experiment_page(pages: Pages) -> str:
    return f"/#/experiments/{ensure_experiment(connect(pages.settings), pages.settings)}/runs"


def run_page(pages: Pages, tab: str) -> str:
    champion = registry.aliases(pages.model, pages.settings)["champion"]
    run_id = registry.run_of_version(pages.model, champion, pages.settings)
    return f"{experiment_page(pages)}/{run_id}/{tab}"


def without_the_assistant(window: Window) -> None:
    """MLflow's own assistant takes a third of the page until it is closed."""
    if window.driver.find_elements(By.XPATH, "//*[text()='MLflow Assistant']"):
        for button in window.driver.find_elements(By.CSS_SELECTOR, "button[aria-label='Close']"):
            button.click()


def test_the_run_is_listed_with_its_trainable_count(pages: Pages, keep: Keep) -> None:
    window = pages.window
    window.open(experiment_page(pages))
    runs = connect(pages.settings).search_runs([experiment_page(pages).split("/")[3]])
    for run in runs:
        window.first("[role=gridcell] a", run.info.run_name)
    without_the_assistant(window)
    window.first("button", "Columns").click()
    search = window.first("input[placeholder*='Search columns']")
    search.send_keys("num_trainable")
    window.first(".du-bois-light-tree-title", "params.num_trainable").click()
    search.send_keys(Keys.ESCAPE)
    window.first("[role=columnheader]", "num_trainable")
    counts = [run.data.params["params.num_trainable"] for run in runs]
    window.until(lambda: sorted(cells(window, "num_trainable")) == sorted(counts), f"cells with {counts}")
    keep("mlflow-runs")


def cells(window: Window, column: str) -> list[str]:
    """The texts below a column's head, whose name ends like this."""
    return [cell.text for cell in window.driver.find_elements(By.CSS_SELECTOR, f"[role=gridcell][col-id*='{column}']")]


def test_the_curve_of_the_loss_has_points(pages: Pages, keep: Keep) -> None:
    window = pages.window
    window.open(run_page(pages, "model-metrics"))
    window.first("input[placeholder*='Search metric charts']").send_keys("train/loss")
    without_the_assistant(window)
    line = window.until(
        lambda: next(
            (
                path
                for card in window.driver.find_elements(By.CSS_SELECTOR, CHART)
                if "(train/loss)" in card.text
                for path in card.find_elements(By.CSS_SELECTOR, "path.js-line")
            ),
            None,
        ),
        "a line of train/loss",
    )
    champion = registry.aliases(pages.model, pages.settings)["champion"]
    run_id = registry.run_of_version(pages.model, champion, pages.settings)
    points = len(connect(pages.settings).get_metric_history(run_id, "train/loss"))
    assert points > 2
    assert (line.get_attribute("d") or "").count("L") == points - 1
    keep("mlflow-curves")


def test_the_table_of_samples_shows_pictures(pages: Pages, keep: Keep) -> None:
    window = pages.window
    window.open(run_page(pages, "artifacts/evaluation/samples.json"))
    window.first("[role=columnheader], th", "answer_shuffled")
    without_the_assistant(window)
    window.until(
        lambda: len(loaded_pictures(window, "evaluation%2Fsamples%2F", "evaluation/samples/")) >= 2, "two pictures"
    )
    keep("mlflow-table")


def loaded_pictures(window: Window, *places: str) -> list[str]:
    """Addresses of the pictures that are shown, have been loaded and come from one of some places."""
    return [
        address
        for picture in window.driver.find_elements(By.CSS_SELECTOR, "img")
        if int(picture.get_attribute("naturalWidth") or 0) > 0
        and any(place in (address := picture.get_attribute("src") or "") for place in places)
    ]


def test_the_sheet_of_pictures_is_shown(pages: Pages) -> None:
    window = pages.window
    window.open(run_page(pages, "artifacts/evaluation/grid.png"))
    window.until(lambda: loaded_pictures(window, "grid.png", "blob:"), "the sheet")


def test_the_run_says_what_it_scored_in_its_description(pages: Pages) -> None:
    window = pages.window
    window.open(run_page(pages, ""))
    window.first("p", "held-out questions right")


def test_the_champion_alias_stands_on_its_version_and_moves_with_a_promotion(pages: Pages, keep: Keep) -> None:
    was = registry.aliases(pages.model, pages.settings)
    assert was["champion"] == "1"
    assert shown_aliases(pages) == {version: {alias} for alias, version in was.items()}
    told = {"who": "a test", "why": "the pages should follow"}
    promotion.promote_by_person(pages.model, "2", pages.settings, despite_gate=True, **told)
    try:
        assert shown_aliases(pages) == {"1": {"previous"}, "2": {"champion"}}
        without_the_assistant(pages.window)
        versions = pages.window.first("div, h3", "Versions")
        pages.window.driver.execute_script("arguments[0].scrollIntoView()", versions)
        keep("mlflow-champion")
    finally:
        promotion.rollback(pages.model, None, pages.settings, **told)
    assert shown_aliases(pages) == {"1": {"champion"}, "2": {"previous"}}


def shown_aliases(pages: Pages) -> dict[str, set[str]]:
    """The aliases beside every version on the page of the model."""
    window = pages.window
    window.open(f"/#/models/{pages.model}")
    window.first("[role=row], tr", "Version 2")
    found = {}
    for row in window.driver.find_elements(By.CSS_SELECTOR, "[role=row], tr"):
        if "Version " in row.text and "Registered at" not in row.text:
            number = row.text.split("Version ")[1].split()[0]
            found[number] = {word for word in ("champion", "challenger", "previous") if f"@ {word}" in row.text}
    return found
