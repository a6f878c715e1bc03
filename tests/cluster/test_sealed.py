"""What is sealed is opened by its recipient alone."""

from __future__ import annotations

import pytest
from cryptography.exceptions import InvalidTag

from podquant.cluster.sealed import Recipient, seal

SECRET = b"0123456789abcdef"


def test_only_the_recipient_opens_it() -> None:
    recipient, other = Recipient(), Recipient()
    sealed = seal(SECRET, recipient.public)
    assert recipient.open(sealed) == SECRET
    assert SECRET not in sealed
    assert seal(SECRET, recipient.public) != sealed
    with pytest.raises(InvalidTag):
        other.open(sealed)


@pytest.mark.parametrize("place", [0, 31, 32, -1])
def test_what_was_changed_is_refused(place: int) -> None:
    recipient = Recipient()
    sealed = bytearray(seal(SECRET, recipient.public))
    sealed[place] ^= 1
    with pytest.raises(InvalidTag):
        recipient.open(bytes(sealed))
