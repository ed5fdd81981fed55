"""What each step buys: projector alone, a LoRA, the language model whole; small and larger parts; tokens per picture.

    python benchmarks/stages.py                          # every arm in a home of its own, about two hours on 2 cores
    python benchmarks/stages.py --only smol,smol-lora    # some arms, in order; the others' rows stay
    python benchmarks/stages.py --home DIR --json        # a home that is kept: what was trained there is reused

Each arm is a run of the pipeline as a person would start it; ``-lora`` and ``-full`` go on from the version of the arm
before the dash. The raw rows go to benchmarks/results/stages.json.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.__main__ import RESULTS, machine

INTO = RESULTS / "stages.json"
WHOLE = ("training.language_model.mode=full", "training.learning_rate=3.0e-4", "training.min_learning_rate=3.0e-5")


class Arm(NamedTuple):
    """A run: of which profile, going on from which arm, with what changed."""

    profile: str
    after: str | None = None
    overrides: tuple[str, ...] = ()


ARMS = {
    "pocket": Arm("pocket"),
    "pocket-lora": Arm("pocket", "pocket"),
    "pocket-full": Arm("pocket", "pocket", WHOLE),
    "pocket-4-tokens": Arm("pocket", None, ("model.pixel_shuffle=2",)),  # of 16
    "smol": Arm("smol"),
    "smol-lora": Arm("smol", "smol"),
    "real-cpu": Arm("real-cpu"),
    "real-cpu-lora": Arm("real-cpu", "real-cpu"),
}
KIND = "eval/exact_match/"
KEPT = ("eval/exact_match", "eval/exact_match_shuffled", "eval/blind_rate", "eval/loss", "eval/grounding_gain",
        "eval/grounding_gain_low", "eval/grounding_gain_high", "train/seconds", "train/final_loss",
        "train/peak_memory_bytes")  # fmt: skip


def run(name: str, home: str, versions: dict[str, str]) -> dict[str, Any]:
    """One arm; which version it became is noted."""
    arm = ARMS[name]
    program = str(Path(sys.executable).with_name("llava-pipeline"))
    command = [program, "run", "--profile", arm.profile]
    if arm.after is not None:
        command += ["--stage", "instruct", "--from", versions[arm.after]]
    for override in arm.overrides:
        command += ["--set", override]
    started = time.monotonic()
    done = subprocess.run(
        [*command, "--json"], env=os.environ | {"LLAVA_PIPELINE_HOME": home}, stdout=subprocess.PIPE, text=True
    )
    if done.returncode:
        return {"arm": name, "failed": done.returncode}
    row = json.loads(done.stdout.splitlines()[-1])
    versions[name] = row["version"]
    return {
        "arm": name, "profile": arm.profile, "stage": row["stage"], "learned": row["learned"],
        "version": row["version"],
        "began_with": row["began_with"], "num_learned": row["params"]["num_learned"],
        "num_image_tokens": row["params"]["num_image_tokens"], "precision": row["precision"],
        "wall_seconds": round(time.monotonic() - started, 1), "verdict": row["verdict"]["decision"],
        "refused_by": [rule["name"] for rule in row["verdict"]["rules"] if not rule["passed"]],
        "command": " ".join(["llava-pipeline", *command[1:]]),
        **{key: row["metrics"].get(key) for key in KEPT},
        "exact_match_by_kind": {
            key.removeprefix(KIND): value for key, value in row["metrics"].items() if key.startswith(KIND)
        },
    }  # fmt: skip


def main() -> None:
    """Run the arms and write their rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default=",".join(ARMS), help="arms, separated by commas")
    parser.add_argument("--home", help="a home that is kept")
    parser.add_argument("--json", action="store_true", help="print the rows")
    asked = parser.parse_args()
    known = json.loads(INTO.read_text()) if INTO.exists() else {"rows": []}
    rows = {row["arm"]: row for row in known["rows"]}
    versions = {name: str(row["version"]) for name, row in rows.items() if "version" in row and asked.home}
    with tempfile.TemporaryDirectory() as temporary:
        for name in asked.only.split(","):
            rows[name] = run(name, asked.home or temporary, versions)
            print(name, rows[name], file=sys.stderr, flush=True)
            found = {"machine": machine(), "rows": [rows[arm] for arm in ARMS if arm in rows]}
            INTO.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if asked.json:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
