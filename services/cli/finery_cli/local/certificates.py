"""Certificates of one machine's object store: an authority of its own, and one certificate that its processes show each other.

They close the store's gRPC ports to every other program of the machine. Nobody outside the store's folder is meant to trust them.
"""

from __future__ import annotations

import os
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

_YEARS = 20
_LOOPBACK = "127.0.0.1"


def ensure_certificates(folder: Path) -> tuple[Path, Path, Path]:
    """(authority, certificate, key) in `folder`, made where they are missing; the key is readable by its owner alone."""
    files = folder / "grpc-ca.crt", folder / "grpc.crt", folder / "grpc.key"
    if all(file.exists() for file in files):
        return files
    ca_key = ec.generate_private_key(ec.SECP256R1())
    ca = _signed(ca_key, ca_key, issuer="Finery object store", subject="Finery object store", is_ca=True)
    key = ec.generate_private_key(ec.SECP256R1())
    certificate = _signed(key, ca_key, issuer="Finery object store", subject="store", is_ca=False)
    pem = serialization.Encoding.PEM
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    # The authority's key is kept nowhere: nothing else is ever signed. The key comes last, so that half a set is made anew.
    for file, content in zip(files, (ca.public_bytes(pem), certificate.public_bytes(pem), private), strict=True):
        file.unlink(missing_ok=True)
        with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as output:
            output.write(content)
    return files


def _signed(
    key: ec.EllipticCurvePrivateKey, signer: ec.EllipticCurvePrivateKey, *, issuer: str, subject: str, is_ca: bool
) -> x509.Certificate:
    now = datetime.now(UTC)
    builder = (
        x509.CertificateBuilder()
        .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, issuer)]))
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, subject)]))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=365 * _YEARS))
        .add_extension(x509.BasicConstraints(ca=is_ca, path_length=None), critical=True)
    )
    if not is_ca:
        names = [x509.IPAddress(ip_address(_LOOPBACK)), x509.DNSName("localhost")]
        usages = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        builder = builder.add_extension(x509.ExtendedKeyUsage(usages), critical=False)
    return builder.sign(signer, hashes.SHA256())
