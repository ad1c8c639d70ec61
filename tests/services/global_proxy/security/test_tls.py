"""TLS: a handshake that works, one that is too old, and files that are wrong."""

import datetime
import ssl
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from services.global_proxy.security.errors import TlsError
from services.global_proxy.security.tls import server_context


def write_pair(folder: Path, name: str, passphrase: bytes | None = None) -> tuple[Path, Path]:
    """A certificate for localhost that vouches for itself, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .sign(key, hashes.SHA256())
    )
    encryption = serialization.BestAvailableEncryption(passphrase) if passphrase else serialization.NoEncryption()
    certificate_file, key_file = folder / f"{name}.crt", folder / f"{name}.key"
    certificate_file.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    key_file.touch(0o600)
    key_file.write_bytes(key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption))
    return certificate_file, key_file


def shake_hands(server: ssl.SSLContext, client: ssl.SSLContext) -> ssl.SSLObject:
    """In memory; returns the client's end."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [
        client.wrap_bio(to_client, to_server, server_hostname="localhost"),
        server.wrap_bio(to_server, to_client, server_side=True),
    ]
    for _ in range(3):
        for end in list(ends):
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                continue
            ends.remove(end)
            ends.append(end)
    return next(end for end in ends if not end.server_side)


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    return write_pair(tmp_path, "server")


def test_handshake(pair: tuple[Path, Path]) -> None:
    client = ssl.create_default_context(cafile=str(pair[0]))
    client.set_alpn_protocols(["h2", "http/1.1"])
    end = shake_hands(server_context(*pair), client)
    assert end.version() in ("TLSv1.2", "TLSv1.3")
    assert end.selected_alpn_protocol() == "http/1.1"


def test_nothing_older_than_tls_1_2(pair: tuple[Path, Path]) -> None:
    assert server_context(*pair).minimum_version == ssl.TLSVersion.TLSv1_2


def test_what_is_wrong_is_named(pair: tuple[Path, Path], tmp_path: Path) -> None:
    certificate_file, key_file = pair
    other_certificate, _ = write_pair(tmp_path, "other")
    _, locked_key = write_pair(tmp_path, "locked", b"secret")
    nonsense = tmp_path / "nonsense"
    nonsense.write_text("x")
    nonsense.chmod(0o600)
    for certificate, key, message in (
        (tmp_path / "none", key_file, "--tls-certificate .*none: No such file"),
        (certificate_file, tmp_path / "none", "--tls-key .*none: No such file"),
        (certificate_file, tmp_path, "Is a directory"),
        (other_certificate, key_file, "not the key of the certificate"),
        (certificate_file, locked_key, "has a passphrase"),
        (nonsense, key_file, "not a certificate"),
        (certificate_file, nonsense, "not a certificate"),
    ):
        with pytest.raises(TlsError, match=message):
            server_context(certificate, key)
    key_file.chmod(0o644)
    with pytest.raises(TlsError, match="chmod 600"):
        server_context(certificate_file, key_file)
