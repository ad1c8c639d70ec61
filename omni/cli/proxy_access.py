"""How the command line reaches a running deployment's proxy: its URL, TLS, keys."""

import os
import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from kv_transfer.auth import default_key_path, load_key
from omni.deployment.admin_client import AdminClient
from omni.deployment.deployment_file import load_deployment
from omni.deployment.errors import ConfigError, DeploymentError, Problem
from omni.deployment.run_state import DeploymentState

_KEY_VARIABLE = "OMNI_API_KEY"


@dataclass(frozen=True, kw_only=True)
class ProxyAccess:
    """Attributes:
    url: http://HOST:PORT, https:// where the deployment file has a certificate.
    certificate_file: of the proxy, which is trusted as it is.
    asks_for_keys: requests need an API key.
    key_file: the deployment key's, as written; None: this user's own.
    """

    url: str
    certificate_file: Path | None
    asks_for_keys: bool
    key_file: Path | None

    @classmethod
    def of(cls, deployment: DeploymentState) -> Self:
        """Raises ConfigError: its deployment file cannot be read any more."""
        written = load_deployment(Path(deployment.config_file))
        proxy = written.deployment.proxy
        has_tls = proxy.tls_certificate_file is not None
        return cls(
            url=deployment.proxy_url.replace("http://", "https://", 1) if has_tls else deployment.proxy_url,
            certificate_file=proxy.tls_certificate_file,
            asks_for_keys=proxy.api_keys_file is not None,
            key_file=written.services.kv_transfer.key_file,
        )

    def admin_client(self) -> AdminClient:
        """Raises DeploymentError: the deployment key, or the certificate, cannot be had."""
        try:
            key = load_key(self.key_file or default_key_path())
        except ValueError as error:
            raise DeploymentError(str(error)) from None
        try:
            return AdminClient(self.url, key, self.ssl_context())
        except OSError as error:
            raise DeploymentError(f"the proxy's certificate {self.certificate_file}: {error}") from None

    def ssl_context(self) -> ssl.SSLContext | None:
        """Trusts the deployment's own certificate, whatever host it names. Raises OSError."""
        if self.certificate_file is None:
            return None
        context = ssl.create_default_context(cafile=self.certificate_file)
        context.check_hostname = False  # the certificate is pinned, and the address comes from our own file
        context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
        return context


def api_key(file: Path | None) -> str | None:
    """From this file, else from $OMNI_API_KEY: on the command line every user of the machine could read it.

    Raises:
        ConfigError: the file has none.
    """
    place = str(file) if file is not None else f"${_KEY_VARIABLE}"
    try:
        key = file.read_text().strip() if file is not None else os.environ.get(_KEY_VARIABLE, "").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError([Problem(place, f"cannot be read ({error})", "name a file with one API key")]) from None
    if not key and file is None:
        return None
    if not key or not key.isascii() or not key.isprintable() or " " in key:  # it is not shown: it may be a secret
        raise ConfigError([Problem(place, "has no API key", "write one key of printable characters, and nothing else")])
    return key
