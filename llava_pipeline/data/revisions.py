"""Which commit each branch of a data set led to when it was first used here: ``<home>/revisions.json``.

A branch moves; numbers measured before and after are not comparable, so a moved one is refused until a person chooses.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from llava_pipeline.errors import DamagedArtifact, RevisionMoved
from llava_pipeline.store import home, tell_disk_full


def remember(repo_id: str, branch: str, commit: str) -> None:
    """Note the first commit of a branch; afterwards, check that it is still the same.

    Raises:
        RevisionMoved: the branch leads to another commit now.
        DamagedArtifact: the notes cannot be read.
        DiskFull: no space left for the note.
    """
    path, name = home() / "revisions.json", f"{repo_id}@{branch}"
    known = _read(path)
    first = known.get(name)
    if first is None:
        _write(path, known | {name: commit})
    elif first != commit:
        raise RevisionMoved(
            f"{branch} of the data set {repo_id} was at {first} and is at {commit} now; choose one with "
            f"--set data.source.revision={first} or --set data.source.revision={commit}, "
            f"or delete {name!r} from {path} to follow the branch"
        )


def _read(path: Path) -> dict[str, str]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError) as error:
        raise DamagedArtifact(f"{path} cannot be read; delete it, and branches are followed anew") from error


def _write(path: Path, known: dict[str, str]) -> None:
    """In one step: a reader sees the old notes or the new ones."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".revisions-", dir=path.parent) as folder:
            new = Path(folder) / path.name
            new.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n", encoding="utf-8")
            new.replace(path)
    except OSError as error:
        tell_disk_full(error, path.parent)
        raise
