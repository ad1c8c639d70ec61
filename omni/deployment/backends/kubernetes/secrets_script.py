"""A script that makes the Secrets: from files that it names, so that no key is in the folder that is rendered."""

from shlex import quote

from omni.deployment.backends.kubernetes.names import Names
from omni.deployment.backends.kubernetes.paths import KEY_NAME
from omni.deployment.backends.kubernetes.proxy import proxy_files
from omni.deployment.plan_types import LaunchPlan

SCRIPT_NAME = "make-secrets.sh"

_SCRIPT = """\
#!/bin/sh
# Written by omni_cli. Makes the Secrets of deployment {deployment}; run it before `kubectl apply`:
#     sh {script} [--namespace NAME and whatever else kubectl shall be told]
# A deployment key that is there already stays: the pods that run have it. To undo it:
#     kubectl delete secret {secrets}
set -eu

if ! kubectl get secret {key_secret} "$@" >/dev/null 2>&1; then
{make_key}
fi
{proxy_secret}"""

_KEY_OF_FILE = """\
    kubectl create secret generic {key_secret} --from-file={key_name}={file} "$@"
"""

# Its own, made here and now; `printf` is the shell's own, so the key is on no command line.
_NEW_KEY = """\
    key=$(openssl rand -hex 32)
    printf '%s\\n' "$key" | kubectl create secret generic {key_secret} --from-file={key_name}=/dev/stdin "$@"
"""

_PROXY = """\

# What changes in these files is taken over by running this again; TLS files need `kubectl rollout restart` too.
kubectl create secret generic {secret} {files} --dry-run=client --output=yaml "$@" |
    kubectl apply --server-side --filename=- "$@"
"""


def secrets_script(plan: LaunchPlan, names: Names) -> str:
    make_key = _NEW_KEY if plan.key_file is None else _KEY_OF_FILE
    files = [f"--from-file={name}={quote(path)}" for name, path in proxy_files(plan).items()]
    return _SCRIPT.format(
        deployment=plan.name,
        script=SCRIPT_NAME,
        secrets=" ".join([names.key_secret, *([names.proxy_secret] if files else [])]),
        key_secret=names.key_secret,
        make_key=make_key.format(
            key_secret=names.key_secret, key_name=KEY_NAME, file=quote(str(plan.key_file))
        ).rstrip(),
        proxy_secret=_PROXY.format(secret=names.proxy_secret, files=" ".join(files)) if files else "",
    )
