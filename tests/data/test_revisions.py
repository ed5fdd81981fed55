"""A branch of a data set is held to the commit it led to when it was first used."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from llava_pipeline.data.revisions import remember
from llava_pipeline.data.sources.hub import HubReader, resolve
from llava_pipeline.errors import DamagedArtifact, DiskFull, NotFound, RevisionMoved
from llava_pipeline.spec import HubSource
from tests.backbones.hub import Hub, follow, running_hub

OLD, NEW = "a" * 40, "b" * 40
MAIN = HubSource(repo_id="owner/data")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub with one data set."""
    import huggingface_hub

    with running_hub() as hub:
        follow(hub, monkeypatch)
        hub.add("owner/data", OLD, {})
        huggingface_hub.close_session()
        yield hub
    huggingface_hub.close_session()


def test_a_branch_is_resolved_to_its_commit_and_remembered(hub: Hub, home: Path) -> None:
    assert [resolve(MAIN), resolve(MAIN)] == [OLD, OLD]
    assert json.loads((home / "revisions.json").read_text()) == {"owner/data@main": OLD}
    assert [path.name for path in home.iterdir()] == ["revisions.json"]


def test_a_branch_that_moved_is_refused_with_both_commits(hub: Hub) -> None:
    resolve(MAIN)
    hub.add("owner/data", NEW, {})
    with pytest.raises(RevisionMoved) as caught:
        HubReader(MAIN, "train", 0)
    assert caught.value.exit_code == 2
    for part in (f"data.source.revision={OLD}", f"data.source.revision={NEW}", "delete 'owner/data@main' from"):
        assert part in str(caught.value)


def test_each_remedy_works(hub: Hub, home: Path) -> None:
    resolve(MAIN)
    hub.add("owner/data", NEW, {})
    assert resolve(MAIN.model_copy(update={"revision": NEW})) == NEW
    assert json.loads((home / "revisions.json").read_text()) == {"owner/data@main": OLD}
    (home / "revisions.json").write_text("{}")
    assert resolve(MAIN) == NEW


@pytest.mark.parametrize("changes", [{"repo_id": "owner/nothing"}, {"revision": "nosuch"}])
def test_a_data_set_that_is_not_there_is_the_person_s_mistake(hub: Hub, changes: dict[str, str]) -> None:
    with pytest.raises(NotFound, match=r"correct data\.source\.repo_id or data\.source\.revision"):
        HubReader(MAIN.model_copy(update=changes), "train", 0)


@pytest.mark.parametrize("content", [b"{", b"[1]", b"\xff"])
def test_notes_that_cannot_be_read_are_told(home: Path, content: bytes) -> None:
    home.mkdir()
    (home / "revisions.json").write_bytes(content)
    with pytest.raises(DamagedArtifact, match="cannot be read; delete it"):
        remember("owner/data", "main", OLD)


def test_a_disk_that_is_full_keeps_the_old_notes(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    remember("owner/data", "main", OLD)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(DiskFull):
        remember("owner/other", "main", OLD)
    assert json.loads((home / "revisions.json").read_text()) == {"owner/data@main": OLD}
    assert len(list(home.iterdir())) == 1
