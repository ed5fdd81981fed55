"""A real browser, MLflow's own pages over recorded runs, and the chat page over a server.

``LLAVA_PIPELINE_SCREENSHOTS`` names a folder where the pages are kept as pictures. ``LLAVA_PIPELINE_BROWSED_HOME``
names a home whose pages are looked at instead of small ones made here: two versions, the first one champion, the second
one challenger. Both together make those of docs/.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from PIL import Image
from selenium import webdriver
from selenium.webdriver.chrome.service import Service

from llava_pipeline.contracts import Evidence, Inspection
from llava_pipeline.tracking import promotion, verdict
from llava_pipeline.tracking.client import connect
from llava_pipeline.tracking.gate import decide
from llava_pipeline.tracking.run import record
from llava_pipeline.tracking.settings import FILE_VARIABLE, URI_VARIABLE, Settings
from tests.browser.chat import Chat, ChatServer, serving_chat
from tests.browser.window import Window
from tests.serving.served import copied, trained_home
from tests.tracking.conftest import build_evaluation, migrated_database, tiny_spec
from tests.tracking.server import running

__all__ = ["migrated_database", "trained_home"]
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
HOME, SHOTS = "LLAVA_PIPELINE_BROWSED_HOME", "LLAVA_PIPELINE_SCREENSHOTS"
MAX_SHOT_BYTES = 200_000
Keep = Callable[[str], None]


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    """Headless Chromium that reaches this machine only."""
    if CHROMIUM is None or DRIVER is None:
        say = pytest.fail if os.environ.get("CI") else pytest.skip
        say("no Chromium here; apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in (
        "--headless=new", "--window-size=1900,1000", "--force-device-scale-factor=1", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage",
        f"--user-data-dir={tmp_path_factory.mktemp('chromium')}",
        "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
        *(["--no-sandbox"] if os.geteuid() == 0 else []),
    ):  # fmt: skip
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    own = {"XDG_CONFIG_HOME": str(tmp_path_factory.mktemp("config"))}  # where its crash handler writes
    driver = webdriver.Chrome(options=options, service=Service(DRIVER, env=os.environ | own))
    yield driver
    driver.quit()


@dataclass(frozen=True)
class Pages:
    """MLflow's pages, and whose they are."""

    settings: Settings
    window: Window
    model: str


@pytest.fixture(scope="session")
def pages(
    browser: webdriver.Chrome, migrated_database: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Pages]:
    """A running MLflow server with two versions: the first one champion, the second one challenger."""
    home = Path(os.environ.get(HOME) or tmp_path_factory.mktemp("browsed"))
    with pytest.MonkeyPatch.context() as patch:
        for variable in (URI_VARIABLE, FILE_VARIABLE, "MLFLOW_REGISTRY_URI"):
            patch.delenv(variable, raising=False)
        patch.setenv("LLAVA_PIPELINE_HOME", str(home))
        if HOME not in os.environ:
            shutil.copy(migrated_database, home / "mlflow.db")
        with running(home) as settings:
            if HOME not in os.environ:
                record_two(settings)
            (model,) = connect(settings).search_registered_models()
            yield Pages(settings, Window(browser, settings.tracking.uri or ""), model.name)


def record_two(settings: Settings) -> None:
    """Two recorded runs; the first one passes the gate and is promoted."""
    small = tiny_spec()
    first = record(small, build_evaluation(), settings, {})
    own = first.evaluation.projector.projector.digest
    evidence = Evidence(inspection=Inspection(problem=None, projector_digest=own), champion=None)
    verdict.write(first, evidence, decide(first.evaluation, evidence, None, settings.gate), settings)
    promotion.promote(first.registered_model, first.version, None, settings, who="a test", why="the first one")
    record(small, build_evaluation(weights=b"others", right=0.95), settings, {})


@pytest.fixture
def keep(browser: webdriver.Chrome, tmp_path: Path) -> Keep:
    """Keeps what the browser shows as a picture of at most 200 kB."""
    folder = Path(os.environ.get(SHOTS) or tmp_path)

    def shoot(name: str) -> None:
        path = folder / f"{name}.png"
        browser.save_screenshot(str(path))
        with Image.open(path) as shot:
            shot.convert("RGB").save(path, optimize=True)
        assert path.stat().st_size < MAX_SHOT_BYTES

    return shoot


@pytest.fixture(scope="module")
def chat_server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ChatServer]:
    """A real server over a copy of a home with two versions, which may answer wrongly."""
    known = os.environ.get(HOME)
    home = Path(known) if known else request.getfixturevalue("trained_home")
    with serving_chat(copied(home, tmp_path_factory.mktemp("chat") / "home")) as server:
        yield server


@pytest.fixture
def chat(browser: webdriver.Chrome, chat_server: ChatServer) -> Iterator[Chat]:
    """The chat page, not yet open."""
    page = Chat(Window(browser, chat_server.served.url), chat_server)
    browser.get_log("browser")  # what earlier tests left
    yield page
    page.forget_scripts()
    page.cdp("Emulation.clearDeviceMetricsOverride")
    page.cdp("Emulation.setEmulatedMedia", features=[])
    browser.get("about:blank")


@pytest.fixture
def red(tmp_path: Path) -> Path:
    """A picture."""
    path = tmp_path / "red.png"
    Image.new("RGB", (120, 80), "red").save(path)
    return path
