"""How a running deployment's proxy is reached: its URL, TLS, the deployment key."""

import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from kv_transfer.auth import default_key_path, load_key
from omni.deployment.admin_client import AdminClient
from omni.deployment.deployment_file import load_deployment
from omni.deployment.errors import DeploymentError
from omni.deployment.run_state import DeploymentState


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
