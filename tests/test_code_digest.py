"""The digest changes with the code that a module can reach and with the libraries beneath it, and with nothing else."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

import llava_pipeline
from llava_pipeline import code_digest as module
from llava_pipeline.code_digest import LIBRARIES, SHIPPED, code_digest, reachable

CODE = {
    "stage": '''\
"""A stage."""

import llava_pipeline.direct as d


def run(x):
    """Do it."""
    from llava_pipeline import lazy  # only when it is needed

    return d.double(lazy.one(x))
''',
    "direct": "from llava_pipeline.inner.deep import factor\n\ndef double(x):\n    return factor * x\n",
    "lazy": "import os.path\nimport llava_pipeline.stage\n\nclass One:\n    pass\n\ndef one(x):\n    return x\n",
    "inner.deep": "factor: int = 2\n",
    "aside": "def unused():\n    return 1\n",
}
Edit = Callable[[str, str, str], None]


@pytest.fixture
def edit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Edit:
    """A package of five modules in place of ours, and a way to edit them."""
    for name, text in CODE.items():
        (tmp_path / f"{name}.py").write_text(text, encoding="utf-8")

    def source(name: str) -> Path | None:
        path = tmp_path / f"{name.removeprefix('llava_pipeline.')}.py"
        return path if path.exists() else None

    def change(name: str, old: str, new: str) -> None:
        text = (tmp_path / f"{name}.py").read_text(encoding="utf-8")
        assert old in text
        (tmp_path / f"{name}.py").write_text(text.replace(old, new), encoding="utf-8")

    monkeypatch.setattr(module, "_source", source)
    return change


def digest() -> str:
    return code_digest("llava_pipeline.stage")


def test_imports_are_followed_wherever_they_stand(edit: Edit) -> None:
    names = {"stage", "direct", "lazy", "inner.deep"}
    assert set(reachable("llava_pipeline.stage")) == {f"llava_pipeline.{name}" for name in names}


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("stage", "d.double(lazy.one(x))", "lazy.one(d.double(x))"),
        ("direct", "factor * x", "factor * x + 0"),
        ("lazy", "return x", "return -x"),
        ("inner.deep", "2", "3"),
        ("inner.deep", "int", "float"),
        ("direct", "def double(x)", "def double(x, /)"),
        ("stage", "    return", "    'no docstring here'[0]\n    return"),
        ("lazy", "import os.path", "import os.path\nimport llava_pipeline.aside"),
    ],
)
def test_a_change_of_reachable_code_changes_the_digest(name: str, old: str, new: str, edit: Edit) -> None:
    before = digest()
    edit(name, old, new)
    assert digest() != before
    edit(name, new, old)
    assert digest() == before


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("stage", '"""A stage."""', '"""A stage, told differently."""'),
        ("stage", '"""Do it."""', '"""Do it, as a long docstring says.\n\n    At length.\n    """'),
        ("stage", "# only when it is needed", "# lazily"),
        ("direct", "\n\ndef", "\n\n\n# what it does\n\ndef"),
        ("direct", "def double(x):\n", "def double(x):\n    '''Twice.'''\n"),
        ("lazy", "class One:\n", 'class One:\n    """One."""\n\n'),
        ("direct", "factor * x", "(factor  *  x)"),
        ("aside", "return 1", "return 2"),
    ],
)
def test_comments_docstrings_layout_and_code_out_of_reach_do_not(name: str, old: str, new: str, edit: Edit) -> None:
    before = digest()
    edit(name, old, new)
    assert digest() == before


def test_a_docstring_in_place_of_a_body_is_as_good_as_pass(edit: Edit) -> None:
    before = digest()
    edit("lazy", "class One:\n    pass", 'class One:\n    """One."""')
    assert digest() == before


def test_weights_that_a_reachable_module_ships_with_take_part(
    edit: Edit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SHIPPED", {"llava_pipeline.direct": "parts", "llava_pipeline.aside": "others"})
    for name in ("parts/tower/weights", "others/weights"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_bytes(b"first")
    before = digest()
    (tmp_path / "others/weights").write_bytes(b"second")
    assert digest() == before
    (tmp_path / "parts/tower/weights").write_bytes(b"second")
    assert digest() != before
    (tmp_path / "parts/tower/weights").write_bytes(b"first")
    assert digest() == before
    (tmp_path / "parts/tower/weights").rename(tmp_path / "parts/tower/other")
    assert digest() != before


def test_the_stage_that_fetches_takes_the_shipped_weights_into_account() -> None:
    assert set(SHIPPED) <= set(reachable("llava_pipeline.stages.fetch"))
    for name, folder in SHIPPED.items():
        path = module._source(name)
        assert path is not None
        assert list((path.parent / folder).rglob("*.safetensors"))


@pytest.mark.parametrize("library", LIBRARIES)
def test_the_version_of_every_library_takes_part(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    version = module.version
    before = code_digest("llava_pipeline.errors")
    monkeypatch.setattr(module, "version", lambda name: "0.0.1" if name == library else version(name))
    assert code_digest("llava_pipeline.errors") != before


def test_the_reader_of_gguf_takes_part_and_what_only_records_does_not() -> None:
    assert "gguf" in LIBRARIES
    assert not {"mlflow", "prefect"} & set(LIBRARIES)


def test_a_library_that_is_absent_takes_part_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> str:
        raise PackageNotFoundError(name)

    before = code_digest("llava_pipeline.errors")
    monkeypatch.setattr(module, "version", absent)
    assert code_digest("llava_pipeline.errors") != before


# --------------------------------------------------------------------------------------------- this package


def test_a_stage_reaches_what_it_works_with_and_no_other_stage() -> None:
    names = set(reachable("llava_pipeline.stages.validate"))
    assert {f"llava_pipeline.{name}" for name in ("data.images", "data.scenes", "model.processor", "store")} < names
    assert not {f"llava_pipeline.{name}" for name in ("training.loop", "stages.train", "tracking.client")} & names


def test_two_stages_have_two_digests_and_each_its_own_again() -> None:
    assert code_digest("llava_pipeline.stages.fetch") != code_digest("llava_pipeline.stages.validate")
    assert code_digest("llava_pipeline.stages.fetch") == code_digest("llava_pipeline.stages.fetch")


def test_no_module_imports_in_a_way_that_is_not_followed() -> None:
    """Relative imports, and modules named by a string, would be out of reach."""
    unseen = []
    for path in Path(llava_pipeline.__path__[0]).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level > 0:
                unseen.append((path.name, node.lineno))
            if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
                unseen.append((path.name, node.lineno))
    assert unseen == []


def test_the_digest_is_taken_without_importing_what_it_reads() -> None:
    code = (
        "import sys, llava_pipeline.code_digest as c; c.code_digest('llava_pipeline.stages.evaluate'); "
        "assert not {'torch', 'numpy', 'mlflow', 'llava_pipeline.stages'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1], timeout=60)
