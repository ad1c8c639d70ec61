"""Where things are inside of a pod."""

CONFIG = "/etc/omni"
STATE = "/run/omni"  # $OMNI_STATE_DIR; in memory, for the deployment key is here
KEY_NAME = "deployment.key"  # as kv_transfer.auth.default_key_path has it
KEY_SECRET = "/run/secrets/omni/key"  # noqa: S105 (a folder)
PROXY_SECRET = "/run/secrets/omni/proxy"  # noqa: S105 (a folder)
API_KEYS_NAME = "api-keys"
CERTIFICATE_NAME = "tls.crt"
TLS_KEY_NAME = "tls.key"
LOGS = "/var/log/omni"
HOME = "/home/omni"
