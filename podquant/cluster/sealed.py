"""Secrets passed through what others may read: only the process that a text was sealed for can open it.

For Ray's messages and stores, which are authenticated at best and end up in logs. Against whoever can run code in the
cluster, or change its messages, this does not help. Knows nothing of Ray.
"""

from __future__ import annotations

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

_PUBLIC_BYTES = 32
_NONCE = bytes(12)  # each key encrypts once


class Recipient:
    """Who opens what was sealed for `public`, a key of 32 bytes that may be told to anybody."""

    def __init__(self) -> None:
        self._private = X25519PrivateKey.generate()
        self.public = self._private.public_key().public_bytes_raw()

    def open(self, sealed: bytes) -> bytes:
        """What was sealed. Raises cryptography.exceptions.InvalidTag if it was sealed for another, or changed."""
        sender, box = sealed[:_PUBLIC_BYTES], sealed[_PUBLIC_BYTES:]
        shared = self._private.exchange(X25519PublicKey.from_public_bytes(sender))
        return _cipher(shared, sender, self.public).decrypt(_NONCE, box, None)


def seal(secret: bytes, public: bytes) -> bytes:
    """A secret for the recipient with this public key: an ephemeral X25519 key, then ChaCha20-Poly1305 (RFC 8439)."""
    ephemeral = X25519PrivateKey.generate()
    sender = ephemeral.public_key().public_bytes_raw()
    shared = ephemeral.exchange(X25519PublicKey.from_public_bytes(public))
    return sender + _cipher(shared, sender, public).encrypt(_NONCE, secret, None)


def _cipher(shared: bytes, sender: bytes, recipient: bytes) -> ChaCha20Poly1305:
    """Both public keys go into the key, as RFC 7748, section 6.1, asks for."""
    info = b"podquant sealed 1" + sender + recipient
    return ChaCha20Poly1305(HKDF(hashes.SHA256(), length=32, salt=None, info=info).derive(shared))
