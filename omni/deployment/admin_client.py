"""The proxy's admin API, as the command line uses it."""

import json
import ssl
from collections.abc import Mapping
from http.client import HTTPException
from typing import Any, Final
from urllib.error import HTTPError
from urllib.parse import quote, urlencode
from urllib.request import HTTPSHandler, ProxyHandler, Request, build_opener

from kv_transfer.auth import DeploymentKey
from omni.deployment.errors import DeploymentError

# The proxy makes the same token of the same key: services.global_proxy.membership.admin_route.admin_token.
_TOKEN_PURPOSE: Final = "omni proxy admin API, bearer token, 1"  # noqa: S105 (no secret)
_TIMEOUT_S: Final = 10.0
_MAX_ANSWER_BYTES: Final = 8 << 20


def admin_token(key: DeploymentKey) -> str:
    """The admin API's bearer token: whoever holds the deployment key can make it."""
    return key.mac(_TOKEN_PURPOSE).hex()


class AdminClient:
    """Args:
    proxy_url: http://HOST:PORT of the proxy, or https://.
    tls: for https; None: certificates that this system trusts.

    Every call raises DeploymentError: the proxy does not answer, or refuses; the message is the proxy's own.
    """

    def __init__(self, proxy_url: str, key: DeploymentKey, tls: ssl.SSLContext | None = None) -> None:
        self._url = f"{proxy_url.rstrip('/')}/admin/v1"
        self._token = admin_token(key)
        # A proxy named by $http_proxy is not to be asked for ours, nor to see the token.
        self._opener = build_opener(ProxyHandler({}), HTTPSHandler(context=tls))

    def state(self) -> dict[str, Any]:
        """Instances with their load, policies, requests in flight and queued."""
        return self._call("GET", "/state")

    def instances(self) -> list[dict[str, Any]]:
        instances: list[dict[str, Any]] = self._call("GET", "/instances")["instances"]
        return instances

    def add(
        self,
        role: str,
        url: str,
        kv_address: str | None = None,
        bootstrap_url: str | None = None,
        kv_events: str | None = None,
    ) -> None:
        fields = {
            "role": role,
            "url": url,
            "kv_address": kv_address,
            "bootstrap_url": bootstrap_url,
            "kv_events": kv_events,
        }
        self._call("POST", "/instances", {name: value for name, value in fields.items() if value is not None})

    def drain(self, name: str) -> dict[str, Any]:
        return self._call("POST", f"/instances/{quote(name, safe='')}/drain")

    def remove(self, name: str, wait_s: float, *, by_force: bool = False) -> None:
        """Returns when it has no requests and is removed."""
        query = urlencode({"wait_s": wait_s, "force": str(by_force).lower()})
        self._call("DELETE", f"/instances/{quote(name, safe='')}?{query}", timeout_s=wait_s + _TIMEOUT_S)

    def _call(
        self, method: str, path: str, body: Mapping[str, object] | None = None, timeout_s: float = _TIMEOUT_S
    ) -> dict[str, Any]:
        headers = {"Authorization": f"Bearer {self._token}"}
        data = None if body is None else json.dumps(body).encode()
        if data is not None:
            headers["Content-Type"] = "application/json"
        try:
            request = Request(self._url + path, data=data, headers=headers, method=method)  # noqa: S310 (http only)
            with self._opener.open(request, timeout=timeout_s) as response:
                answer: dict[str, Any] = json.loads(response.read(_MAX_ANSWER_BYTES) or b"{}")
                return answer
        except HTTPError as error:
            raise DeploymentError(_message(error)) from None
        except (OSError, HTTPException, ValueError) as error:
            raise DeploymentError(f"the proxy's admin API at {self._url} does not answer as one: {error}") from None


def _message(error: HTTPError) -> str:
    with error:
        try:
            return str(json.loads(error.read(_MAX_ANSWER_BYTES))["error"]["message"])
        except (OSError, ValueError, LookupError, TypeError):
            return f"the proxy answered {error.code} {error.reason}: does it run this release, with its admin API on?"
