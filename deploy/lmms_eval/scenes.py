"""Held-out scenes as a file that lmms-eval reads: ``python scenes.py FILE``; 500 pictures, a question about each."""

from __future__ import annotations

import io
import sys

import pyarrow as pa
import pyarrow.parquet as pq

from llava_pipeline.data import scenes

NUM_SCENES = 500


def main() -> None:
    rows = []
    for index in range(NUM_SCENES):
        scene, questions = scenes.questions_at(1, "test", index)
        png = io.BytesIO()
        scenes.draw(scene).save(png, "PNG")
        rows += [{"image": png.getvalue(), "question": one.text, "answer": one.answer} for one in questions]
    pq.write_table(pa.Table.from_pylist(rows), sys.argv[1])


if __name__ == "__main__":
    main()
