"""``torchrun -m llava_pipeline.training SPEC OUT``: one process per card, or a single one without torchrun.

It needs torch, transformers, safetensors and pydantic, and the store (``LLAVA_PIPELINE_HOME``) with what the job names.
Exit codes: 0 done, 1 failed, 2 asked wrongly, 143 stopped after saving.
"""

from __future__ import annotations

import argparse
import ctypes
import logging
import os
import signal
import sys
from pathlib import Path

from llava_pipeline.errors import Interrupted, LlavaPipelineError
from llava_pipeline.training.job import read_job
from llava_pipeline.training.run import StopAsked, Teller, run

STOPPED = 143
PR_SET_PDEATHSIG = 1


class ToTeller(logging.Handler):
    """What is logged, told as notes."""

    def __init__(self, tell: Teller) -> None:
        super().__init__(logging.INFO)
        self.tell = tell

    def emit(self, record: logging.LogRecord) -> None:
        """One note."""
        self.tell("note", level=record.levelname.lower(), text=record.getMessage())


def stop_with_parent() -> None:
    """Be asked to stop when torchrun is killed, which gives every process a session of its own (Linux only)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def main(arguments: list[str] | None = None) -> int:
    """Run one job; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m llava_pipeline.training", description="Train a projector.")
    parser.add_argument("spec", type=Path, metavar="SPEC", help="a training job, as JSON")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder of this training; the same one goes on with it")
    parser.add_argument("--allow-change", action="store_true", help="go on although the job or a library has changed")
    asked = parser.parse_args(arguments)
    stop = StopAsked()
    stop.listen()
    if "TORCHELASTIC_RUN_ID" in os.environ:
        stop_with_parent()
    tell = Teller(sys.stdout, stop)
    logger = logging.getLogger("llava_pipeline")
    logger.setLevel(logging.INFO)
    logger.addHandler(ToTeller(tell))
    logger.propagate = False
    try:
        run(read_job(asked.spec), asked.out, tell, stop, asked.allow_change)
    except LlavaPipelineError as error:
        tell("error", kind=type(error).__name__, text=str(error))
        print(f"error: {error}", file=sys.stderr)
        return STOPPED if isinstance(error, Interrupted) else error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
