from __future__ import annotations

import io
import sys

import pytest

from llava_pipeline import progress


class Terminal(io.StringIO):
    """A stream a person watches."""

    def isatty(self) -> bool:
        return True


def test_a_log_gets_one_line_for_quick_work(capsys: pytest.CaptureFixture[str]) -> None:
    with progress.bar("counting", 3) as advance:
        advance()
    assert capsys.readouterr().err == "counting (3) ...\n"


def test_a_log_gets_a_second_line_with_time_and_fields_for_slow_work(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "QUIET_SECONDS", -1.0)
    with progress.bar("training", 2) as advance:
        advance(loss=0.123456)
        advance(loss=0.05, rate="high")
    assert capsys.readouterr().err == "training (2) ...\ntraining: done after 0 s loss=0.05 rate=high\n"


def test_work_that_fails_is_not_called_done(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "QUIET_SECONDS", -1.0)
    with pytest.raises(ZeroDivisionError), progress.bar("dividing", None):
        _ = 1 / 0
    assert capsys.readouterr().err == "dividing ...\ndividing: stopped after 0 s\n"


def test_a_terminal_gets_a_bar_with_the_fields(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    with progress.bar("training [1/2]", 2) as advance:
        advance(2, loss=0.5)
    drawn = terminal.getvalue()
    assert "training [1/2]" in drawn
    assert "2/2" in drawn
    assert "loss=0.5" in drawn


def test_a_process_without_stderr_is_left_in_peace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", None)
    with progress.bar("counting", 1) as advance:
        advance()
