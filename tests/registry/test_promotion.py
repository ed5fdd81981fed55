"""Promotion and rollback: what moves, what is refused, and what is written down."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from llava_pipeline.errors import DamagedArtifact, NoSuchRun, NotPromoted
from llava_pipeline.tracking import promotion, registry
from llava_pipeline.tracking.client import connect
from llava_pipeline.tracking.history import MAX_TEXT, history
from llava_pipeline.tracking.promotion import Moved
from llava_pipeline.tracking.settings import ServingSettings, Settings
from tests.registry.conftest import NAME, Register


def promote(version: str, expected: str | None, settings: Settings, why: str = "why") -> Moved:
    return promotion.promote(NAME, version, expected, settings, who="who", why=why)


def rollback(version: str | None, settings: Settings) -> Moved:
    return promotion.rollback(NAME, version, settings, who="who", why="why")


def outcomes(settings: Settings) -> list[tuple[str, str]]:
    return [(event["action"], event["outcome"]) for event in history(NAME, settings)]


def test_a_promotion_moves_the_aliases_and_is_written_down(register: Register, settings: Settings) -> None:
    for _ in range(2):
        register()
    connect(settings).set_registered_model_alias(NAME, "challenger", "2")
    first = promote("1", None, settings)
    assert (first.champion, first.previous, first.was, first.changed) == ("1", None, None, True)
    second = promote("2", "1", settings, why="better")
    assert (second.champion, second.previous, second.was) == ("2", "1", "1")
    assert registry.aliases(NAME, settings) == {"champion": "2", "previous": "1"}
    tags = connect(settings).get_model_version(NAME, "2").tags
    assert (tags["llava.promoted_over"], tags["llava.promoted_by"]) == ("1", "who")
    newest, oldest = history(NAME, settings)
    assert (newest["from"], newest["to"], newest["who"], newest["why"]) == ("1", "2", "who", "better")
    assert (oldest["from"], oldest["to"], oldest["outcome"]) == (None, "1", "done")
    assert newest["when"] >= oldest["when"]


def test_a_promotion_that_is_repeated_changes_nothing(register: Register, settings: Settings) -> None:
    register()
    promote("1", None, settings)
    again = promote("1", None, settings)
    assert (again.changed, again.champion) == (False, "1")
    assert len(history(NAME, settings)) == 1


def test_a_champion_that_moved_is_not_replaced_and_the_attempt_is_kept(register: Register, settings: Settings) -> None:
    for _ in range(2):
        register()
    promote("1", None, settings)
    with pytest.raises(NotPromoted, match=r"is version 1, but version 2 was compared with none; judge it again"):
        promote("2", None, settings)
    assert registry.aliases(NAME, settings) == {"champion": "1"}
    assert history(NAME, settings)[0]["outcome"].startswith("refused: the champion of")


def test_a_reason_of_any_length_is_kept_as_far_as_it_goes(register: Register, settings: Settings) -> None:
    register()
    promote("1", None, settings, why="wörd ✓ " * 10_000)
    assert history(NAME, settings)[0]["why"] == ("wörd ✓ " * 10_000)[:MAX_TEXT]


def test_what_does_not_exist_is_told(register: Register, settings: Settings) -> None:
    with pytest.raises(NoSuchRun, match="nothing is registered as"):
        promote("1", None, settings)
    register()
    with pytest.raises(NoSuchRun, match=r"no version 9; newest versions: 1; aliases: none"):
        promote("9", None, settings)
    with pytest.raises(NoSuchRun, match="nothing to go back to"):
        rollback(None, settings)
    assert history("llava-projector-other", settings) == []


def test_a_rollback_serves_the_same_files_as_before(register: Register, settings: Settings) -> None:
    for _ in range(2):
        register()
    promote("1", None, settings)
    before = (registry.download_projector("champion", NAME, settings) / "projector.safetensors").read_bytes()
    promote("2", "1", settings)
    moved = rollback(None, settings)
    assert (moved.champion, moved.previous, moved.was) == ("1", "2", "2")
    after = (registry.download_projector("champion", NAME, settings) / "projector.safetensors").read_bytes()
    assert after == before
    forward = rollback(None, settings)
    assert (forward.champion, forward.previous) == ("2", "1")
    assert outcomes(settings) == [("rollback", "done")] * 2 + [("promote", "done")] * 2


def test_only_a_former_champion_is_gone_back_to(register: Register, settings: Settings) -> None:
    for _ in range(3):
        register()
    promote("1", None, settings)
    promote("2", "1", settings)
    with pytest.raises(NotPromoted, match=r"version 3 .* was never champion; .*llava-pipeline promote 3"):
        rollback("3", settings)
    assert rollback("2", settings).changed is False
    assert rollback("1", settings).champion == "1"


def test_a_damaged_target_is_refused_before_anything_moves(register: Register, settings: Settings) -> None:
    for _ in range(2):
        register("1")
    promote("1", None, settings)
    promote("2", "1", settings)
    for version in ("1",):
        source = connect(settings).get_model_version(NAME, version).source
        (Path(source.removeprefix("file://")) / "projector.safetensors").write_bytes(b"changed")
    before = (registry.aliases(NAME, settings), len(history(NAME, settings)))
    with pytest.raises(DamagedArtifact, match="is not the one that was recorded"):
        rollback(None, settings)
    assert (registry.aliases(NAME, settings), len(history(NAME, settings))) == before


def test_a_person_promotes_what_the_gate_passed(register: Register, settings: Settings) -> None:
    register()
    register("1")
    for version in ("1", "2"):
        promotion.promote_by_person(NAME, version, settings, who="ann", why="looks good")
    assert registry.aliases(NAME, settings) == {"champion": "2", "previous": "1"}
    assert history(NAME, settings)[0]["who"] == "ann"


def test_a_person_is_told_which_rules_refused_it(register: Register, settings: Settings) -> None:
    register(gate="refused", looks_at_the_image="refused: +0.001", within_limits="passed: all")
    with pytest.raises(NotPromoted, match=r"refused version 1 .*looks_at_the_image \(\+0.001\); mend that") as told:
        promotion.promote_by_person(NAME, "1", settings, who="ann", why="please")
    assert "within_limits" not in str(told.value)
    moved = promotion.promote_by_person(NAME, "1", settings, who="ann", why="please", despite_gate=True)
    assert moved.champion == "1"
    assert history(NAME, settings)[0]["why"] == "please (despite the gate)"


def test_what_was_not_judged_is_not_promoted(register: Register, settings: Settings) -> None:
    register(gate=None)
    with pytest.raises(NotPromoted, match=r"the gate was not asked .*llava-pipeline gate 1 --profile tiny"):
        promotion.promote_by_person(NAME, "1", settings, who="ann", why="please")


def test_a_verdict_against_a_former_champion_is_not_enough(register: Register, settings: Settings) -> None:
    register()
    register()
    promote("1", None, settings)
    with pytest.raises(NotPromoted, match="was compared with none"):
        promotion.promote_by_person(NAME, "2", settings, who="ann", why="please")


def test_a_version_with_an_alias_is_not_deleted(register: Register, settings: Settings) -> None:
    for _ in range(2):
        register()
    promote("1", None, settings)
    with pytest.raises(NotPromoted, match="version 1 of llava-projector-tiny is champion"):
        promotion.delete_version(NAME, "1", settings, who="who", why="why")
    promotion.delete_version(NAME, "2", settings, who="who", why="old")
    with pytest.raises(NoSuchRun, match="no version 2"):
        promotion.delete_version(NAME, "2", settings, who="who", why="old")
    assert registry.aliases(NAME, settings) == {"champion": "1"}
    assert history(NAME, settings)[0]["action"] == "delete"


# --------------------------------------------------------------------------------------------- serving


@contextmanager
def serving(body: str) -> Iterator[str]:
    class Ready(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Ready)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/readyz"
    finally:
        server.shutdown()
        server.server_close()


def following(settings: Settings, url: str) -> Settings:
    return settings.model_copy(update={"serving": ServingSettings(ready_url=url, timeout_seconds=0.2)})


def test_a_promotion_waits_until_serving_reports_it(register: Register, settings: Settings) -> None:
    register()
    with serving(json.dumps({"version": "1"})) as url:
        assert promote("1", None, following(settings, url)).champion == "1"


@pytest.mark.parametrize("body", ['{"version": "7"}', "[]", "no json", '{"version": null}'])
def test_a_promotion_that_serving_does_not_follow_is_undone(register: Register, settings: Settings, body: str) -> None:
    for _ in range(3):
        register()
    promote("1", None, settings)
    promote("2", "1", settings)
    connect(settings).set_registered_model_alias(NAME, "challenger", "3")
    before = registry.aliases(NAME, settings)
    with serving(body) as url, pytest.raises(NotPromoted, match="did not become champion: serving at"):
        promote("3", "2", following(settings, url))
    assert registry.aliases(NAME, settings) == before
    assert history(NAME, settings)[0]["outcome"].startswith("undone: serving at")


def test_a_first_promotion_waits_for_no_serving_and_the_next_one_does(register: Register, settings: Settings) -> None:
    """Serving begins with the first champion, and taking it back would serve nobody."""
    register()
    register()
    away = following(settings, "http://127.0.0.1:9/readyz")
    promote("1", None, away)
    assert registry.aliases(NAME, settings)["champion"] == "1"
    with pytest.raises(NotPromoted, match="ConnectionError"):
        promote("2", "1", away)
    assert registry.aliases(NAME, settings)["champion"] == "1"


def test_serving_that_answers_with_another_model_is_not_waited_for(register: Register, settings: Settings) -> None:
    register()
    register()
    promote("1", None, settings)
    other = following(settings, "http://127.0.0.1:9/readyz")
    serving = other.serving.model_copy(update={"registered_model": "llava-projector-another"})
    promote("2", "1", other.model_copy(update={"serving": serving}))
    assert registry.aliases(NAME, settings)["champion"] == "2"
