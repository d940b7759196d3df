"""Certificates for Ray's own TLS: a CA, and a certificate for each machine that names its address."""

from __future__ import annotations

import datetime
import ipaddress
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

DAYS = 60


class RayCertificates:
    """Makes them. The CA's key is in memory alone."""

    def __init__(self) -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "cluster")])
        self.ca = self._signed(self._name, self._key.public_key(), None)

    def write(self, folder: Path, address: str) -> dict[str, str]:
        """Write a machine's key and certificates; returns Ray's variables that name them."""
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, address)])
        certificate = self._signed(name, key.public_key(), address)
        files = {
            "RAY_TLS_SERVER_KEY": key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()),
            "RAY_TLS_SERVER_CERT": certificate.public_bytes(Encoding.PEM),
            "RAY_TLS_CA_CERT": self.ca.public_bytes(Encoding.PEM),
        }
        paths = {}
        for variable, data in files.items():
            path = folder / f"{variable.lower()}.pem"
            path.touch(mode=0o600)
            path.write_bytes(data)
            paths[variable] = str(path)
        return {"RAY_USE_TLS": "1", **paths}

    def _signed(self, name: x509.Name, key: ec.EllipticCurvePublicKey, address: str | None) -> x509.Certificate:
        now = datetime.datetime.now(datetime.UTC)
        builder = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(self._name)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(hours=1))
            .not_valid_after(now + datetime.timedelta(days=DAYS))
            .add_extension(x509.BasicConstraints(ca=address is None, path_length=None), critical=True)
        )
        if address is not None:
            names = [x509.IPAddress(ipaddress.ip_address(each)) for each in (address, "127.0.0.1")]
            builder = builder.add_extension(
                x509.SubjectAlternativeName([*names, x509.DNSName("localhost")]), critical=False
            )
        return builder.sign(self._key, hashes.SHA256())
