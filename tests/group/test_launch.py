"""Which member of which group runs where, and that each generation has a key of its own."""

from __future__ import annotations

import pytest

from podquant.errors import ConfigError
from podquant.group.launch import Member, members_on, new_nonce, step_key


def test_every_host_has_its_members() -> None:
    assert members_on(0, 1, 1) == [Member(0, 0, 1)]
    assert [members_on(host, 4, 1) for host in range(4)] == [[Member(0, rank, 4)] for rank in range(4)]
    assert [members_on(host, 4, 2)[0] for host in range(4)] == [
        Member(0, 0, 2),
        Member(0, 1, 2),
        Member(1, 0, 2),
        Member(1, 1, 2),
    ]
    assert members_on(1, 2, 4) == [Member(2, 0, 1, 0, 2), Member(3, 0, 1, 1, 2)]


@pytest.mark.parametrize(("hosts", "groups"), [(4, 3), (3, 2), (2, 3)])
def test_groups_that_hosts_cannot_share_evenly_are_refused(hosts: int, groups: int) -> None:
    message = f"--dp-size and --nnodes must divide one another, got --dp-size {groups} and --nnodes {hosts}"
    with pytest.raises(ConfigError, match=message):
        members_on(0, hosts, groups)


def test_each_generation_has_its_key() -> None:
    nonce = new_nonce()
    assert len({step_key(b"s", nonce), step_key(b"s", new_nonce()), step_key(b"t", nonce)}) == 3
