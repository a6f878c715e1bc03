"""What holds for a publication of either kind: picked by its URI, and gone on with after a run that did not end."""

from __future__ import annotations

from pathlib import Path

import pytest

from podquant.errors import StorageError
from podquant.storage.publication import Publication, open_publication
from podquant.storage.store import open_store
from tests.storage.gcs.emulator import GcsEmulator


@pytest.fixture(params=["local", "gs"])
def target(request: pytest.FixtureRequest, tmp_path: Path, emulator: GcsEmulator) -> str:
    assert emulator.url
    return "gs://b/deep/out" if request.param == "gs" else str(tmp_path / "deep" / "out")


def stage(publication: Publication, name: str, data: bytes) -> None:
    writer = publication.staging.writer(name)
    writer.write(data)
    writer.close()


def stop_half_way(target: str, *, keep: bool) -> None:
    with open_publication(target, keep=keep) as publication:
        assert publication.staged() is None
        stage(publication, "a/one", b"1")
        stage(publication, "receipts/one", b"{}")
        publication.staging.writer("a/two").write(b"not closed")
        publication.write_small("never", b"2")
        raise KeyboardInterrupt


def test_a_run_goes_on_where_the_last_one_stopped(target: str) -> None:
    with pytest.raises(KeyboardInterrupt):
        stop_half_way(target, keep=True)
    with open_publication(target, keep=True) as publication:
        assert not publication.exists()
        staged = publication.staged()
        assert staged is not None
        assert {name: size for name, size in staged.list().items() if name != "never"} == {
            "a/one": 1,
            "receipts/one": 2,
        }
        assert staged.read("receipts/one", 99) == b"{}"
        stage(publication, "a/one", b"1")
        stage(publication, "a/two", b"22")
        publication.discard(["receipts/one", "never"])
        publication.write_small("manifest", b"{1}")
        publication.publish()
    assert open_store(target).list() == {"a/one": 1, "a/two": 2, "manifest": 3}
    with pytest.raises(StorageError, match="already exists"):
        open_publication(target, keep=True).__enter__()


@pytest.mark.parametrize("keep", [True, False])
def test_a_run_that_does_not_keep_starts_anew(target: str, keep: bool) -> None:
    with pytest.raises(KeyboardInterrupt):
        stop_half_way(target, keep=keep)
    with open_publication(target) as publication:
        assert publication.staged() is None
        publication.write_small("manifest", b"{1}")
        publication.publish()
    assert open_store(target).list() == {"manifest": 3}


def test_small_files_of_a_run_that_ended_while_it_published_are_written_anew(target: str) -> None:
    with open_publication(target, keep=True) as publication:
        stage(publication, "config", b"of an older version")
    with open_publication(target, keep=True) as publication:
        publication.write_small("config", b"{}")
        with pytest.raises(StorageError, match="config: cannot create"):
            publication.write_small("config", b"{}")
        publication.write_small("manifest", b"{1}")
        publication.publish()
    assert open_store(target).read("config", 99) == b"{}"


def test_names_to_discard_stay_inside(target: str) -> None:
    with open_publication(target) as publication, pytest.raises(StorageError, match="is not a name inside"):
        publication.discard(["../a"])


def test_what_to_keep_may_be_decided_late(target: str) -> None:
    with open_publication(target, keep=True) as publication:
        stage(publication, "a/one", b"1")
        publication.keep = False
    with open_publication(target, keep=True) as publication:
        assert publication.staged() is None
