"""Validation against a bare loop that only reads, decodes and resizes the same pictures; memory; worker processes.

    python benchmarks/validate.py            # a table
    python benchmarks/validate.py --json     # the raw numbers, which also go to benchmarks/results/validate.json

The pictures are JPEG photographs in all but subject: blurred noise at 640 x 480, as large as photographs.
Both loops run in one process each, one after the other, several times; the ratio of the medians counts. Memory is the
resident set of ``llava-pipeline validate scenes`` and its children, sampled five times a second, with its open files.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageFilter

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.__main__ import RESULTS, machine

COMMAND = str(Path(sys.executable).with_name("llava-pipeline"))
SIDE = 224
ROWS = 1500
ROUNDS = 3
GROUP_ROWS = 100
ANSWER = "A soft grey pattern, lighter towards the upper left corner, with no object that could be named in it."


def make_pictures(path: Path, rows: int) -> int:
    """A Parquet file in the vsft schema with different JPEG pictures; mean bytes of one."""
    random = np.random.default_rng(0)
    total = 0
    schema = None
    writer: pq.ParquetWriter | None = None
    for start in range(0, rows, GROUP_ROWS):
        batch = []
        for number in range(start, min(rows, start + GROUP_ROWS)):
            coarse = Image.fromarray(random.integers(0, 256, (30, 40, 3), dtype=np.uint8)).resize((640, 480))
            grain = Image.fromarray(random.integers(0, 256, (480, 640, 3), dtype=np.uint8))
            picture = Image.blend(coarse, grain.filter(ImageFilter.GaussianBlur(1)), 0.25)
            buffer = io.BytesIO()
            picture.save(buffer, "JPEG", quality=85)
            total += buffer.tell()
            batch.append(row(number, buffer.getvalue()))
        table = pa.Table.from_pylist(batch, schema)
        writer = writer or pq.ParquetWriter(path, schema := table.schema)
        writer.write_table(table)
    assert writer is not None
    writer.close()
    return total // rows


def row(number: int, picture: bytes) -> dict[str, Any]:
    """A conversation of two rounds about a picture."""
    question = [{"type": "image", "text": None}, {"type": "text", "text": f"\nWhat does picture {number} show?"}]
    messages = [
        {"role": "user", "content": question},
        {"role": "assistant", "content": [{"type": "text", "text": ANSWER}]},
        {"role": "user", "content": [{"type": "text", "text": "Is it bright?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": f"Not very; {number % 97} of 100."}]},
    ]
    return {"id": f"picture/{number}", "messages": messages, "images": [{"bytes": picture}]}


def bare(path: Path) -> float:
    """Seconds to read, decode and resize every picture with Pillow, and nothing else."""
    started = time.perf_counter()
    for batch in pq.ParquetFile(path).iter_batches(GROUP_ROWS):
        for item in batch.to_pylist():
            picture = Image.open(io.BytesIO(item["images"][0]["bytes"])).convert("RGB")
            np.asarray(picture.resize((SIDE, SIDE), Image.Resampling.BICUBIC))
    return time.perf_counter() - started


def validated(path: Path, workers: int) -> tuple[float, str]:
    """Seconds to validate the same file into a snapshot, and the snapshot's digest."""
    from llava_pipeline.contracts import Cursor
    from llava_pipeline.data.sources import open_source
    from llava_pipeline.spec import DataSpec, ParquetSource, WorkersSpec
    from llava_pipeline.stages.validate import cached_processor, snapshot
    from llava_pipeline.stages.validate import workers as own_workers

    model = pocket()
    pool = WorkersSpec(kind="processes" if workers > 1 else "threads", num=workers)
    source = ParquetSource(path=str(path))
    spec = DataSpec(source=source, max_samples=ROWS, held_out_share=1e-9, workers=pool)
    cached_processor(model)
    with own_workers(pool) as submit:
        reader = open_source(source, "train")
        warm(submit, model, spec.model_copy(update={"source": reader.source}), reader, workers)
        started = time.perf_counter()
        kept, _ = snapshot(reader, "train", model, spec, ROWS, Cursor(), None, submit)
        seconds = time.perf_counter() - started
    assert kept.num_kept == ROWS, kept
    return seconds, kept.rows.digest


def warm(submit: Any, model: Any, spec: Any, reader: Any, workers: int) -> None:
    """Start the worker processes and load what they load once: a few rows each, not timed."""
    from llava_pipeline.contracts import Cursor

    first = next(reader.pieces(Cursor()))
    pending = [
        submit(model, spec, "train", first.model_copy(update={"start": n, "stop": n + 1})) for n in range(workers * 4)
    ]
    for one in pending:
        one.result()


def pocket() -> Any:
    """The assembled model of the pocket profile."""
    from llava_pipeline.spec import load_spec
    from llava_pipeline.stages.assemble import assemble_and_freeze
    from llava_pipeline.stages.fetch import fetch_backbones

    spec = load_spec("pocket")
    return assemble_and_freeze(fetch_backbones(spec.backbones), spec.model)


class Watch(threading.Thread):
    """Peak resident bytes and open files of a process and its children."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.process, self.samples, self.running = psutil.Process(pid), [], True

    def run(self) -> None:
        while self.running:
            try:
                family = (self.process, *self.process.children(recursive=True))
                self.samples.append((sum(p.memory_info().rss for p in family), sum(p.num_fds() for p in family)))
            except psutil.Error:
                pass
            time.sleep(0.2)


def scenes(rows: int, workers: int = 1) -> dict[str, Any]:
    """The command on so many scenes, in an empty home: seconds, peak memory, open files, digest."""
    with tempfile.TemporaryDirectory() as home:
        command = [COMMAND, "validate", "scenes", "--limit", str(rows), "--workers", str(workers), "--json"]
        started = time.perf_counter()
        process = subprocess.Popen(
            command, env=os.environ | {"LLAVA_PIPELINE_HOME": home}, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        watch = Watch(process.pid)
        watch.start()
        out = process.communicate()[0]
        watch.running = False
        assert process.returncode == 0, command
        told = json.loads(out.splitlines()[-1])
        half = watch.samples[len(watch.samples) // 2 :]
        return {
            "rows": rows, "workers": workers, "seconds": round(time.perf_counter() - started, 1),
            "peak_mb": round(max(memory for memory, _ in watch.samples) / 1e6, 1),
            "peak_open_files": max(files for _, files in half),
            "read": told["train"]["num_read"], "kept": told["train"]["num_kept"],
            "digest": told["train"]["rows"]["digest"], "held_out_digest": told["held_out"]["rows"]["digest"],
        }  # fmt: skip


def measure(sizes: list[int]) -> dict[str, Any]:
    """Everything, each loop several times in turns."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["LLAVA_PIPELINE_HOME"] = folder + "/home"
        path = Path(folder) / "pictures.parquet"
        mean_bytes = make_pictures(path, ROWS)
        bare(path)
        times: dict[str, list[float]] = {"bare": [], "validate": [], "validate_2_processes": []}
        digests = set()
        for _ in range(ROUNDS):
            times["bare"].append(bare(path))
            for name, workers in (("validate", 1), ("validate_2_processes", 2)):
                seconds, digest = validated(path, workers)
                times[name].append(seconds)
                digests.add(digest)
                clear_parts()
    assert len(digests) == 1
    middle = {name: statistics.median(seconds) for name, seconds in times.items()}
    runs = [scenes(rows) for rows in sizes]
    return {
        "machine": machine(), "command": " ".join(("python", *sys.argv)), "picture_bytes": mean_bytes, "rows": ROWS,
        "seconds": {name: [round(s, 3) for s in each] for name, each in times.items()},
        "rows_per_second": {name: round(ROWS / seconds, 1) for name, seconds in middle.items()},
        "ratio_to_bare": round(middle["bare"] / middle["validate"], 3),
        "two_processes_to_one": round(middle["validate"] / middle["validate_2_processes"], 3),
        "scenes": runs, "memory_ratio": round(runs[-1]["peak_mb"] / runs[0]["peak_mb"], 3),
    }  # fmt: skip


def clear_parts() -> None:
    """Forget what was checked, so that the next round checks it again."""
    import shutil

    shutil.rmtree(Path(os.environ["LLAVA_PIPELINE_HOME"]) / "parts", ignore_errors=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--sizes", type=int, nargs="+", default=[2_000, 50_000], help="scene rows for the memory runs")
    asked = parser.parse_args()
    found = measure(asked.sizes)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "validate.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if asked.json:
        print(json.dumps(found))
        return
    for name, rate in found["rows_per_second"].items():
        print(f"{name:22} {rate:7.1f} rows/s")
    print(
        f"validate reaches {found['ratio_to_bare']:.2f} of the bare loop; "
        f"two processes {found['two_processes_to_one']:.2f} x"
    )
    for one in found["scenes"]:
        print(
            f"{one['rows']:7} scenes  {one['peak_mb']:7.1f} MB  {one['peak_open_files']} open files  {one['seconds']} s"
        )


if __name__ == "__main__":
    main()
