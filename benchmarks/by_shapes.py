"""What a version gets right on the scenes, by how many shapes a scene has: does it find the one that is asked about?

    python benchmarks/by_shapes.py ANSWERS.jsonl        # of a run on the scenes, MLflow's evaluation/answers.jsonl

With one shape there is nothing to find: what is answered there is read off the picture. With two or three, who reads
but does not find guesses one of them, and is right 1 in 2 or 1 in 3 times; its loss is ln 2 or ln 3.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from llava_pipeline.data.scenes import KINDS, questions_at


def main() -> None:
    """A table of exact match, and of nats a question, by kind and number of shapes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("answers", type=Path)
    found: dict[tuple[str, int], list[tuple[bool, float]]] = defaultdict(list)
    for line in parser.parse_args().answers.read_text(encoding="utf-8").splitlines():
        answer = json.loads(line)
        name, seed, split, index = answer["id"].split("/")
        if (name, split) != ("scenes", "test"):
            sys.exit(f"{answer['id']} is no held-out question about a scene; name the answers of a run on the scenes")
        scene, _ = questions_at(int(seed), "test", int(index))
        found[answer["kind"], len(scene.shapes)].append(
            (answer["correct"], answer["loss"] * answer["num_truth_tokens"])
        )
    print("| Kind | 1 shape | 2 shapes | 3 shapes |\n|---|---|---|---|")
    for kind in KINDS:
        cells = [cell(found[kind, count]) for count in (1, 2, 3)]
        print(f"| {kind} | {' | '.join(cells)} |")


def cell(answers: list[tuple[bool, float]]) -> str:
    """Exact match, nats a question, and of how many."""
    if not answers:
        return ""
    right, loss = (sum(column) / len(answers) for column in zip(*answers, strict=True))
    return f"{right:.0%}, {loss:.2f} ({len(answers)})"


if __name__ == "__main__":
    main()
