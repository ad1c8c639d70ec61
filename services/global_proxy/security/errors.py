"""Refusals at the door.

ProxyError
├── UnauthorizedError       401   no key, or not one of ours
├── NoSuchRouteError        404
└── WrongMethodError        405   `allow` goes into the Allow header
ValueError
├── ApiKeysError            the file of keys; names line and mend
└── TlsError                a certificate or its key; names the file and the mend
"""

from services.global_proxy.errors import ProxyError


class UnauthorizedError(ProxyError):
    """One message for every cause: nobody learns which keys there are."""

    status = 401
    kind = "AuthenticationError"

    def __init__(self) -> None:
        super().__init__("Give a valid API key: Authorization: Bearer KEY")


class NoSuchRouteError(ProxyError):
    status = 404
    kind = "NotFoundError"


class WrongMethodError(ProxyError):
    status = 405
    kind = "MethodNotAllowedError"

    def __init__(self, message: str, allow: str) -> None:
        super().__init__(message)
        self.allow = allow


class ApiKeysError(ValueError):
    """The file of API keys is unusable."""


class TlsError(ValueError):
    """TLS cannot be set up."""
