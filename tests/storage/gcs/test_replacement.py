"""Putting a published directory of a bucket in the place of another."""

from __future__ import annotations

import pytest

from podquant.errors import StorageError
from podquant.storage.gcs.client import GcsClient
from podquant.storage.gcs.publication import GcsPublication
from podquant.storage.gcs.replacement import replace_objects
from podquant.storage.space import bytes_free
from tests.storage.gcs.emulator import GcsEmulator


def publish(uri: str, client: GcsClient, **files: bytes) -> None:
    with GcsPublication(uri, client) as publication:
        for name, data in files.items():
            publication.write_small(name, data)
        publication.publish()


def test_a_directory_is_replaced_whole_and_counts_as_published(emulator: GcsEmulator, client: GcsClient) -> None:
    publish("gs://b/m", client, old=b"1", manifest=b"old")
    publish("gs://b/m.new", client, a=b"2", manifest=b"new")
    emulator.log.clear()
    replace_objects("gs://b/m.new", "gs://b/m", (), client)
    assert emulator.data("b") == {"m/a": b"2", "m/manifest": b"new"}
    changes = [record.request.partition("?")[0] for record in emulator.requests("^(DELETE|POST.*rewriteTo)")]
    old = "DELETE /storage/v1/b/b/o/m/"
    copy = "POST /storage/v1/b/b/o/m.new/{0}/rewriteTo/b/b/o/m/{0}"
    assert changes[:4] == [f"{old}manifest", f"{old}old", copy.format("a"), copy.format("manifest")]
    with pytest.raises(StorageError, match="gs://b/m: already exists"):
        publish("gs://b/m", client, manifest=b"")


def test_a_run_that_ends_half_way_leaves_the_new_one_and_a_place_to_write_to(
    emulator: GcsEmulator, client: GcsClient
) -> None:
    publish("gs://b/m", client, old=b"1", manifest=b"old")
    publish("gs://b/m.new", client, a=b"2", manifest=b"new")
    emulator.fail("status", "m.new/manifest/rewriteTo", status=403)
    with pytest.raises(StorageError, match=r"gs://b/m.new/manifest: cannot copy to gs://b/m/manifest: .*HTTP 403"):
        replace_objects("gs://b/m.new", "gs://b/m", (), client)
    assert emulator.data("b") == {"m/a": b"2", "m.new/a": b"2", "m.new/manifest": b"new"}
    assert not GcsPublication("gs://b/m", client).exists()
    publish("gs://b/m", client, manifest=b"3")
    assert emulator.data("b")["m/manifest"] == b"3"


def test_only_what_was_published_replaces(emulator: GcsEmulator, client: GcsClient) -> None:
    publish("gs://b/m", client, manifest=b"old")
    emulator.put("b", "m.new/a", b"1")
    with pytest.raises(StorageError, match=r"expected one file there that was published last, found 0\. Nothing was"):
        replace_objects("gs://b/m.new", "gs://b/m", (), client)
    with pytest.raises(StorageError, match="another bucket"):
        replace_objects("gs://c/m.new", "gs://b/m", (), client)
    assert emulator.data("b") == {"m/manifest": b"old", "m.new/a": b"1"}


def test_a_bucket_has_no_limit() -> None:
    assert bytes_free("gs://b/m") is None
