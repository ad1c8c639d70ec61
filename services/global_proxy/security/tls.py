"""TLS for the listening socket."""

import os
import ssl
import stat
from pathlib import Path

from services.global_proxy.security.errors import TlsError


def server_context(certificate_file: Path, key_file: Path) -> ssl.SSLContext:
    """TLS 1.2 or newer, with the interpreter's choice of ciphers, for HTTP/1.1.

    Args:
        certificate_file: PEM, the server's certificate first, then those that vouch for it.
        key_file: PEM, without a passphrase, closed to other users.

    Raises:
        TlsError: a file is unusable; the message names it and says what to do.
    """
    for option, path in (("--tls-certificate", certificate_file), ("--tls-key", key_file)):
        try:
            with path.open("rb") as file:
                mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
        except OSError as error:
            raise TlsError(f"{option} {path}: {error.strerror}; name a PEM file that this user can read") from None
    if mode & (stat.S_IRWXO | stat.S_IWGRP):  # of the last one
        raise TlsError(f"--tls-key {key_file}: open to other users (mode {mode:o}); chmod 600 {key_file}")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_COMPRESSION
    context.set_alpn_protocols(["http/1.1"])
    try:
        context.load_cert_chain(certificate_file, key_file, _no_passphrase)
    except _PassphraseError:
        raise TlsError(
            f"--tls-key {key_file}: it has a passphrase; take it off with `openssl pkey -in {key_file} -out NEW`"
        ) from None
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise TlsError(f"--tls-key {key_file}: not the key of the certificate in {certificate_file}") from None
        files = f"--tls-certificate {certificate_file}, --tls-key {key_file}"
        raise TlsError(f"{files}: not a certificate and its key in PEM ({error})") from None
    return context


class _PassphraseError(Exception):
    """OpenSSL would ask on the terminal."""


def _no_passphrase() -> str:
    raise _PassphraseError
