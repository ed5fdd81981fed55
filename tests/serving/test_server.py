"""The serving command as people and programs meet it: a process, a port, HTTP."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.serving.served import Served, copied, data_uri, point, served_home, serving, trained_home

__all__ = ["served_home", "trained_home"]


@pytest.fixture(scope="module")
def server(trained_home: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    home = copied(trained_home, tmp_path_factory.mktemp("served") / "home")
    with serving(home, "--also", "challenger") as served:
        yield served


@pytest.fixture(scope="module")
def picture(server: Served, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("pictures") / "sample.webp"
    path.write_bytes(server.get(server.get("/samples").json()["data"][0]["picture"]).content)
    return data_uri(path, "image/webp")


def test_the_champion_answers_about_a_picture_and_says_which_version_it_is(server: Served, picture: str) -> None:
    answer = server.ask("What is the color of the shape?", picture)
    assert answer.status_code == 200, answer.text
    told = answer.json()
    assert told["model"] == "llava-projector-pocket-v1"
    assert told["choices"][0]["message"]["content"]
    assert answer.headers["x-model-version"] == "1"


def test_a_new_champion_answers_without_a_restart(served_home: Path) -> None:
    with serving(served_home) as server:
        assert server.ready()["version"] == "1"
        point(served_home, "champion", "2")
        server.wait_for("2")
        assert server.ask().json()["model"] == "llava-projector-pocket-v2"
        assert server.end() == 0
