"""What the objects of a deployment are called in Kubernetes, and the labels by which they are found.

Names there are DNS labels (RFC 1123), and those of Services begin with a letter. The longest of ours ends up, with 11
more characters, in a label of 63.
"""

import hashlib
import re
from dataclasses import dataclass

from omni.deployment.groups import GroupSettings

_LONGEST = 24
_DIGEST_CHARS = 6

Labels = dict[str, str]


@dataclass(frozen=True)
class Names:
    """Args: deployment: its name, which may hold capitals, dots and underscores."""

    deployment: str

    @property
    def base(self) -> str:
        """`omni-chat`. A name that had to be changed ends in a digest: `Chat` and `chat` stay two deployments."""
        slug = re.sub(r"[^a-z0-9]+", "-", self.deployment.lower()).strip("-")
        if slug != self.deployment or len(slug) > _LONGEST:
            digest = hashlib.sha256(self.deployment.encode()).hexdigest()[:_DIGEST_CHARS]
            slug = f"{slug[: _LONGEST - _DIGEST_CHARS - 1].rstrip('-')}-{digest}"
        return f"omni-{slug}"

    @property
    def proxy(self) -> str:
        return f"{self.base}-proxy"

    @property
    def control(self) -> str:
        """The Service by which engines reach the proxy, whether it is ready or not."""
        return f"{self.base}-control"

    @property
    def config_map(self) -> str:
        return f"{self.base}-config"

    @property
    def key_secret(self) -> str:
        return f"{self.base}-key"

    @property
    def proxy_secret(self) -> str:
        """API keys and TLS files, which no engine needs."""
        return f"{self.base}-proxy-files"

    @property
    def env_secret(self) -> str:
        """Environment variables that nobody may read; there may be none."""
        return f"{self.base}-env"

    def group(self, group: GroupSettings) -> str:
        return f"{self.base}-{group.role}-{group.name}"

    def labels(self, component: str, group: str = "") -> Labels:
        labels = {
            "app.kubernetes.io/name": "omni",
            "app.kubernetes.io/instance": self.base,
            "app.kubernetes.io/component": component,
        }
        return labels | ({"omni/group": group} if group else {})

    @property
    def selector(self) -> str:
        """For `kubectl get pods -l`: everything of this deployment."""
        return f"app.kubernetes.io/name=omni,app.kubernetes.io/instance={self.base}"
