"""Does the gate refuse an honestly better projector by bad luck? Twenty re-seeds against one champion.

    python benchmarks/reseeds.py                        # 20 seeds; goes to benchmarks/results/reseeds.json
    python benchmarks/reseeds.py --home DIR --json      # the runs are kept; again, what was trained is reused
    python benchmarks/reseeds.py --home COPY --seeds 14-20 --add FIRST.json   # some of them, and what is there already

A champion is trained for 60 steps and promoted. Each challenger is trained for 160 steps from other first weights and
in another order, over the same rows, and is weighed by the gate against that same champion: ``registry.approval:
required`` keeps it from taking its place. Everything goes through the commands that people use. The result is written
after every seed, so a benchmark that is interrupted keeps what it has.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.__main__ import COMMAND, RESULTS, machine

CHAMPION_STEPS, STEPS = 60, 160
SCORES = ("exact_match", "exact_match_shuffled", "blind_rate", "likelihood", "loss")
TOLD = ("looks_at_the_image", "better_than_champion", "no_kind_worse_than_champion")


def command(*arguments: str) -> Any:
    """The JSON document that one command prints last."""
    done = subprocess.run([*COMMAND, *arguments, "--json"], stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.strip().splitlines()[-1])


def train(seed: int, steps: int, profile: str) -> dict[str, Any]:
    """A whole run of the pipeline, and what the gate said of it."""
    began = time.monotonic()
    changes = (f"training.max_steps={steps}", f"training.seed={seed}", f"model.projector_seed={seed}")
    row = command("run", "--profile", profile, *(part for change in changes for part in ("--set", change)))
    rules = row["verdict"]["rules"]
    return {
        "seed": seed, "steps": steps, "version": row["verdict"]["version"], "champion": row["verdict"]["champion"],
        "seconds": round(time.monotonic() - began, 1),
        **{name: round(row["metrics"][f"eval/{name}"], 4) for name in SCORES},
        "refused": [rule["name"] for rule in rules if not rule["passed"]],
        "found": {rule["name"]: rule["found"] for rule in rules if rule["name"] in TOLD or not rule["passed"]},
    }  # fmt: skip


def champion(profile: str) -> dict[str, Any]:
    """Train and promote it; where it is there already, its run is told again."""
    told = train(0, CHAMPION_STEPS, profile)
    if not command("history", "--profile", profile):
        why = "the champion of this benchmark"
        command("promote", told["version"], "--profile", profile, "--reason", why, "--despite-gate")
    return told | {"version": command("history", "--profile", profile)[-1]["to"]}


def bench(seeds: range, profile: str, output: Path, added: list[dict[str, Any]]) -> dict[str, Any]:
    """The champion, then seed after seed; what is there is written each time.

    Args:
        added: results of other seeds against the same champion, in a copy of this home.
    """
    result: dict[str, Any] = {
        "command": f"python benchmarks/reseeds.py {' '.join(sys.argv[1:])}".rstrip(),
        "profile": profile, "machine": machine(),
        "threads": os.environ.get("OMP_NUM_THREADS", "all"),
        "measured": datetime.now(UTC).isoformat(timespec="seconds"), "champion": champion(profile), "challengers": [],
    }  # fmt: skip
    for other in added:
        if any(other["champion"][key] != result["champion"][key] for key in ("steps", "version", *SCORES)):
            raise SystemExit("what is added was compared with another champion")
        result["challengers"] += other["challengers"]
    for seed in seeds:
        told = train(seed, STEPS, profile)
        if told["champion"] != result["champion"]["version"]:
            raise SystemExit(f"the champion moved to {told['champion']}; the seeds are not compared with the same one")
        result["challengers"] = sorted([*result["challengers"], told], key=lambda one: one["seed"])
        refused = [one["seed"] for one in result["challengers"] if one["refused"]]
        result |= {"num_challengers": len(result["challengers"]), "num_refused": len(refused), "refused_seeds": refused}
        output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        scores = f"exact match {told['exact_match']}, likelihood {told['likelihood']}"
        by = ", ".join(told["refused"]) or "no rule"
        print(f"seed {seed}: {scores}; refused by {by}; {told['seconds']} s", file=sys.stderr, flush=True)
    return result


def seeds_of(text: str) -> range:
    """``20`` is the first twenty, ``14-20`` seven of them."""
    first, _, last = text.rpartition("-")
    return range(int(first or 1), int(last) + 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=seeds_of, default=range(1, 21), help="20, or 14-20.")
    parser.add_argument("--add", type=Path, action="append", default=[], help="A result of other seeds.")
    parser.add_argument("--profile", default="pocket")
    parser.add_argument("--home", type=Path, help="Where the runs are kept; a folder that is deleted afterwards.")
    parser.add_argument("--output", type=Path, default=RESULTS / "reseeds.json")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "mlflow.yml").write_text("registry: {approval: required}\n", encoding="utf-8")
        os.environ |= {
            "LLAVA_PIPELINE_HOME": str((arguments.home or Path(folder) / "home").absolute()),
            "LLAVA_PIPELINE_SETTINGS": f"{folder}/mlflow.yml",
        }
        for variable in ("MLFLOW_TRACKING_URI", "PREFECT_API_URL", "PREFECT_HOME"):
            os.environ.pop(variable, None)
        added = [json.loads(path.read_text(encoding="utf-8")) for path in arguments.add]
        result = bench(arguments.seeds, arguments.profile, arguments.output, added)
    if arguments.json:
        print(json.dumps(result))
    else:
        print(f"{result['num_refused']} of {result['num_challengers']} were refused")


if __name__ == "__main__":
    main()
