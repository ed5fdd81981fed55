"""What is worth another try."""

from __future__ import annotations

from typing import Any

from llava_pipeline.errors import Interrupted, SourceUnavailable, TrackingUnavailable, TrainerDied

WORTH_ANOTHER_TRY = (SourceUnavailable, TrainerDied, Interrupted, TrackingUnavailable)


def will_pass(task_: Any, task_run: Any, state: Any) -> bool:
    """Retry only what may be better in a minute: a network or a killed process, not a refused row."""
    try:
        state.result()
    except WORTH_ANOTHER_TRY:
        return True
    except Exception:  # whatever it is, asking again will not change it
        return False
    return False
