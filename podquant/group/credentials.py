"""Certificates for JAX's coordinator, so that only the processes of one generation of a group can reach it.

Every rank makes its own from the secret of the generation: nothing is sent, and nothing is written to a disk. Knows
nothing of JAX.
"""

from __future__ import annotations

import datetime
import hmac
import os
from dataclasses import dataclass

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

PEER_URI_PREFIX = "podquant://group/"
"""What a certificate calls its owner begins with this; addresses change, so they are not what is checked."""

_ORDER = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551
"""Of the group of curve P-256 (SEC 2, section 2.4.2): private keys are 1 to this less 1."""

_SINCE, _UNTIL = datetime.datetime(2020, 1, 1), datetime.datetime(9999, 12, 31)
"""The certificates live as long as the secret; hosts' clocks may differ as they like."""


@dataclass(frozen=True)
class Credentials:
    """Paths of PEM files that exist for this process and as long as it runs."""

    certificate: str
    private_key: str
    authority: str


def credentials(key: bytes, owner: str) -> Credentials:
    """For one process of a generation.

    Args:
        key: the secret that the ranks of this generation share; the key of the authority is derived from it.
        owner: what the certificate says behind `PEER_URI_PREFIX`.
    """
    authority_key = ec.derive_private_key(_scalar(key), ec.SECP256R1())
    own_key = ec.generate_private_key(ec.SECP256R1())
    authority, member = _name("podquant group"), _name("podquant member")
    return Credentials(
        _in_memory("certificate", _pem(_certificate(member, own_key, authority, authority_key, owner))),
        _in_memory("private_key", _private_pem(own_key)),
        _in_memory("authority", _pem(_certificate(authority, authority_key, authority, authority_key, "authority"))),
    )


def _scalar(key: bytes) -> int:
    """A private key, as good as uniform: twice as many bits as the order has are reduced by it."""
    wide = b"".join(hmac.digest(key, b"coordinator %d" % part, "sha256") for part in range(2))
    return int.from_bytes(wide) % (_ORDER - 1) + 1


def _certificate(
    subject: x509.Name,
    key: ec.EllipticCurvePrivateKey,
    issuer: x509.Name,
    issuer_key: ec.EllipticCurvePrivateKey,
    owner: str,
) -> x509.Certificate:
    is_authority = subject == issuer
    return (
        x509.CertificateBuilder(issuer, subject, key.public_key(), x509.random_serial_number(), _SINCE, _UNTIL)
        .add_extension(x509.BasicConstraints(is_authority, 0 if is_authority else None), critical=True)
        .add_extension(
            x509.SubjectAlternativeName([x509.UniformResourceIdentifier(PEER_URI_PREFIX + owner)]), critical=False
        )
        .sign(issuer_key, hashes.SHA256())
    )


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, common_name)])


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _private_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _in_memory(name: str, data: bytes) -> str:
    """A file without a place on a disk; it is gone with this process, however that ends."""
    descriptor = os.memfd_create(name)
    os.write(descriptor, data)
    return f"/proc/self/fd/{descriptor}"
