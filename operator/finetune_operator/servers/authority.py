"""Issues the certificates by which pods recognize the operator, with the release's authority.

The authority's key is a file that the kubelet mounts. Certificates, and their keys, are made in
memory, and replaced long before they end. The clock is an argument.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

CERTIFICATE, KEY = "ca.crt", "ca.key"
FORMER_CERTIFICATE, FORMER_KEY = "former-ca.crt", "former-ca.key"
_BACKDATED = timedelta(hours=1)  # for pods whose clocks are late
_MAX_NAME = 64  # of a common name

_SIGNS_CERTIFICATES = x509.KeyUsage(
    digital_signature=False, content_commitment=False, key_encipherment=False, data_encipherment=False,
    key_agreement=False, key_cert_sign=True, crl_sign=True, encipher_only=False, decipher_only=False,
)  # fmt: skip

PrivateKey = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey


@dataclass(frozen=True)
class Issued:
    """A certificate with its chain, and its key, in PEM; `renewal` is when the next one is due."""

    chain: bytes
    key: bytes
    renewal: datetime


@dataclass(frozen=True)
class Authority:
    """An authority, and the one before it, by which pods that have started earlier recognize it."""

    certificate: x509.Certificate
    key: PrivateKey
    former: Authority | None = None

    @property
    def key_identifier(self) -> x509.SubjectKeyIdentifier:
        """The name of the key, by which its certificate is found."""
        try:
            return self.certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
        except x509.ExtensionNotFound:
            return x509.SubjectKeyIdentifier.from_public_key(self.key.public_key())

    @property
    def end(self) -> datetime:
        """When the authority's certificate ends."""
        return self.certificate.not_valid_after_utc

    def issue(self, name: str, lifetime: timedelta, now: datetime) -> Issued:
        """Returns a certificate for a server's name.

        It is valid for `lifetime`, at most as long as the authority is, and due for renewal after
        two thirds of that. If the authority follows another one, the chain has its certificate
        that the former one has signed, too.
        """
        key, end = ec.generate_private_key(ec.SECP256R1()), min(now + lifetime, self.end)
        certificate = (
            _template(name, key.public_key(), now, end, self)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
            .sign(self.key, hashes.SHA256())
        )
        chain = (certificate, *self._recognized_by_earlier_pods(now))
        return Issued(
            b"".join(one.public_bytes(serialization.Encoding.PEM) for one in chain),
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            ),
            now + (end - now) * 2 / 3,
        )

    def _recognized_by_earlier_pods(self, now: datetime) -> tuple[x509.Certificate, ...]:
        """Returns this authority's certificate, signed by the former one, unless that has ended."""
        former = self.former
        if former is None or former.end <= now:
            return ()
        end = min(self.end, former.end)
        return (
            _template("", self.key.public_key(), now, end, former)
            .subject_name(self.certificate.subject)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(self.key_identifier, critical=False)
            .add_extension(_SIGNS_CERTIFICATES, critical=True)
            .sign(former.key, hashes.SHA256()),
        )


def read(folder: Path) -> Authority | None:
    """Returns the authority of a folder; None if its key isn't there.

    Raises OSError or ValueError if a file can't be read.
    """
    if not (folder / KEY).is_file():
        return None
    former = None
    if (folder / FORMER_KEY).is_file() and (folder / FORMER_CERTIFICATE).is_file():
        former = _read(folder / FORMER_CERTIFICATE, folder / FORMER_KEY, None)
    return _read(folder / CERTIFICATE, folder / KEY, former)


def _read(certificate: Path, key: Path, former: Authority | None) -> Authority:
    private = serialization.load_pem_private_key(key.read_bytes(), password=None)
    if not isinstance(private, PrivateKey):
        raise ValueError(f"{key}: a key of this kind can't sign certificates; use ECDSA or RSA")
    return Authority(x509.load_pem_x509_certificate(certificate.read_bytes()), private, former)


def _template(
    name: str, key: ec.EllipticCurvePublicKey | rsa.RSAPublicKey, start: datetime, end: datetime, issuer: Authority
) -> x509.CertificateBuilder:
    builder = (
        x509.CertificateBuilder()
        .issuer_name(issuer.certificate.subject)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(start - _BACKDATED)
        .not_valid_after(end)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(issuer.key_identifier), critical=False
        )
    )
    return (
        builder.subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name[:_MAX_NAME])]))
        if name
        else builder
    )
