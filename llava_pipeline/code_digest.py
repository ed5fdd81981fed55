"""A digest of the code a stage can reach, so that a cached result is never older than the code that made it.

Prefect's own policies hash a task's lines, not what those lines call. Here the modules of this package that a module
imports, directly or through others, are parsed and hashed without comments and docstrings; the versions of the
libraries that compute are added.
"""

from __future__ import annotations

import ast
import hashlib
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

PACKAGE = "llava_pipeline"
LIBRARIES = ("torch", "transformers", "tokenizers", "safetensors", "pillow", "datasets", "pyarrow", "numpy", "mlflow")


@cache
def _source(module: str) -> Path | None:
    try:
        spec = find_spec(module)
    except ModuleNotFoundError:
        return None
    return Path(spec.origin) if spec and spec.origin and spec.origin.endswith(".py") else None


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


def code_digest(module: str) -> str:
    """One digest for all the code ``module`` can reach and the versions of the libraries beneath it."""
    text = hashlib.sha256()
    for name, digest in sorted(reachable(module).items()):
        text.update(f"{name} {digest}\n".encode())
    for library in LIBRARIES:
        try:
            text.update(f"{library} {version(library)}\n".encode())
        except PackageNotFoundError:
            text.update(f"{library} absent\n".encode())
    return text.hexdigest()
