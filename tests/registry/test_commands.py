"""promote, rollback, history and delete as commands."""

from __future__ import annotations

from llava_pipeline.tracking.settings import Settings
from tests.cli.conftest import Command, command
from tests.registry.conftest import Register

__all__ = ["command"]
P = ("--profile", "tiny")


def test_a_person_moves_the_champion_forth_and_back(command: Command, register: Register, settings: Settings) -> None:
    register()
    register("1")
    assert (
        command("promote", "1", "--reason", "first", *P).out == "Version 1 of llava-projector-tiny is now champion.\n"
    )
    told = command("promote", "2", "--reason", "better", *P, "--json").document
    assert (told["champion"], told["previous"], told["changed"]) == ("2", "1", True)
    back = command("rollback", *P)
    assert back.out == "Version 1 of llava-projector-tiny is now champion; version 2 is previous.\n"
    assert command("rollback", "1", *P).out == "Version 1 of llava-projector-tiny is champion already.\n"
    events = command("history", *P, "--json").document
    assert [event["action"] for event in events] == ["rollback", "promote", "promote"]
    assert [event["why"] for event in events] == ["rolled back", "better", "first"]
    assert "@" in events[0]["who"]
    assert "better" in command("history", *P).out


def test_mistakes_end_with_two_and_one_sentence(command: Command, register: Register, settings: Settings) -> None:
    assert command("history", *P).out == "nothing has happened to llava-projector-tiny yet\n"
    register()
    register(gate="refused", looks_at_the_image="refused: +0.001")
    command("promote", "1", "--reason", "first", *P)
    for arguments, told in (
        (("promote", "2", "--reason", "x", *P), "the gate refused version 2"),
        (("promote", "9", "--reason", "x", *P), "no version 9"),
        (("rollback", *P), "nothing to go back to"),
        (("delete", "1", *P), "version 1 of llava-projector-tiny is champion"),
        (("promote", "1"), "Missing option"),
    ):
        ended = command(*arguments)
        assert ended.exit_code == 2
        assert told in ended.error
    assert command("delete", "2", *P, "--json").document == {"registered_model": "llava-projector-tiny", "deleted": "2"}
