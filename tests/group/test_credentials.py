"""Certificates that only the processes of one generation can make."""

from __future__ import annotations

from pathlib import Path

import pytest
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from podquant.group.credentials import PEER_URI_PREFIX, credentials

KEY = b"of a generation" * 2


def certificate(path: str) -> x509.Certificate:
    return x509.load_pem_x509_certificate(Path(path).read_bytes())


def test_each_process_accepts_the_others_of_its_generation_alone() -> None:
    first, second, stranger = credentials(KEY, "rank-0"), credentials(KEY, "rank-1"), credentials(b"guessed", "rank-1")
    for mine, theirs in ((first, second), (second, first)):
        certificate(theirs.certificate).verify_directly_issued_by(certificate(mine.authority))
        with pytest.raises(InvalidSignature):
            certificate(stranger.certificate).verify_directly_issued_by(certificate(mine.authority))
    private = load_pem_private_key(Path(second.private_key).read_bytes(), None)
    assert private.public_key() == certificate(second.certificate).public_key()
    names = certificate(second.certificate).extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.UniformResourceIdentifier) == [PEER_URI_PREFIX + "rank-1"]


def test_nothing_is_on_a_disk() -> None:
    made = credentials(KEY, "rank-0")
    for path in (made.certificate, made.private_key, made.authority):
        assert str(Path(path).readlink()).startswith("/memfd:")
