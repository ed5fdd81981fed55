"""A digest of the code a stage can reach, so that a cached result is never older than the code that made it.

Prefect's own policies hash a task's lines, not what those lines call. Here the modules of this package that a module
imports, directly or through others, are parsed and hashed without comments and docstrings; the weights shipped with
this package, where a module reads them, and the versions of the libraries that compute are added.
"""

from __future__ import annotations

import ast
import hashlib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGE = "llava_pipeline"
SHIPPED = {"llava_pipeline.backbones.fetch": "pocket"}  # the folder beside a module whose files it reads
LIBRARIES = (
    "torch",
    "transformers",
    "tokenizers",
    "peft",
    "bitsandbytes",
    "safetensors",
    "pillow",
    "gguf",
    "datasets",
    "pyarrow",
    "numpy",
    "torchmetrics",
)


def _source(module: str) -> Path | None:
    """A module's file, if the name is a module's at all. ``find_spec`` would import what lies above the name."""
    path = Path(__file__).parent.joinpath(*module.split(".")[1:])
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None)


def _without_docstrings(tree: ast.AST) -> ast.AST:
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            body = node.body
            if body and isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
                node.body = body[1:] or [ast.Pass()]
    return tree


def _imports(tree: ast.AST) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names.add(node.module)
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in names if name.split(".")[0] == PACKAGE}


def reachable(module: str) -> dict[str, str]:
    """Digest of every module of this package that ``module`` can reach, itself included, by name."""
    digests: dict[str, str] = {}
    waiting = [module]
    while waiting:
        name = waiting.pop()
        path = _source(name)
        if name in digests or path is None:
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        waiting += sorted(_imports(tree))
        digests[name] = hashlib.sha256(ast.dump(_without_docstrings(tree)).encode()).hexdigest()
    return digests


def _shipped(module: str) -> str:
    """Name and digest of every file that a module reads of this package."""
    path = _source(module)
    if path is None or module not in SHIPPED:
        return ""
    files = sorted(file for file in (path.parent / SHIPPED[module]).rglob("*") if file.is_file())
    return "".join(
        f"{file.relative_to(path.parent)} {hashlib.sha256(file.read_bytes()).hexdigest()}\n" for file in files
    )


def code_digest(module: str) -> str:
    """One digest for all the code ``module`` can reach, what it ships with, and the libraries beneath it."""
    text = hashlib.sha256()
    for name, digest in sorted(reachable(module).items()):
        text.update(f"{name} {digest}\n{_shipped(name)}".encode())
    for library in LIBRARIES:
        try:
            text.update(f"{library} {version(library)}\n".encode())
        except PackageNotFoundError:
            text.update(f"{library} absent\n".encode())
    return text.hexdigest()
