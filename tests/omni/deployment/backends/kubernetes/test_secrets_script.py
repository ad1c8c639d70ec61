"""The script, run by a real shell with a stand-in for kubectl that notes what it is told."""

import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from ...samples import put
from .samples import Rendered, engine, in_cluster, rendered

STAND_IN = """\
#!/bin/sh
input=
case "$*" in *stdin*|*filename=-*) input=$(cat);; esac
printf '%s\\t%s\\n' "$*" "$input" >> "$NOTED"
case "$*" in "get secret"*) exit "$GET_CODE";; *output=yaml*) echo "kind: Secret";; esac
"""


@pytest.fixture
def run(tmp_path: Path) -> Any:
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "kubectl").write_text(STAND_IN)
    (tools / "kubectl").chmod(0o755)

    def run(result: Rendered, *arguments: str, is_there: bool = False, path: str = "") -> list[list[str]]:
        """What kubectl was called with, and what it was given to read."""
        noted = tmp_path / "noted"
        noted.write_text("")
        env = {"PATH": path or f"{tools}:{os.environ['PATH']}", "NOTED": str(noted), "GET_CODE": "01"[not is_there]}
        script = str(tmp_path / "out/make-secrets.sh")
        subprocess.run(["/bin/sh", script, *arguments], check=True, timeout=20, env=env)
        return [line.split("\t") for line in noted.read_text().splitlines()]

    return run


def secret_names(result: Rendered) -> set[str]:
    volumes = [volume for template in result.templates() for volume in template["spec"]["volumes"]]
    return {volume["secret"]["secretName"] for volume in volumes if "secret" in volume}


def test_a_key_of_its_own(tmp_path: Path, run: Any) -> None:
    result = rendered(tmp_path, in_cluster())
    _, (create, key) = run(result, "--namespace", "a b")
    assert create == "create secret generic omni-chat-key --from-file=deployment.key=/dev/stdin --namespace a b"
    assert re.fullmatch(r"[0-9a-f]{64}", key)
    assert secret_names(result) == {"omni-chat-key"}
    assert run(result, "--namespace", "a b")[1][1] != key


def test_a_key_that_is_there_stays(tmp_path: Path, run: Any) -> None:
    assert run(rendered(tmp_path, in_cluster()), is_there=True) == [["get secret omni-chat-key", ""]]


def test_without_openssl_no_empty_key_is_made(tmp_path: Path, run: Any) -> None:
    result = rendered(tmp_path, in_cluster())
    with pytest.raises(subprocess.CalledProcessError):
        run(result, path=str(tmp_path / "bin"))
    assert "create" not in (tmp_path / "noted").read_text()


def test_the_file_s_own_key_and_the_proxy_s_files(tmp_path: Path, run: Any) -> None:
    data = put(in_cluster(), "services/kv_transfer", {"key_file": "/keys/it's mine"})
    proxy = {"api_keys_file": "/keys/api", "tls_certificate_file": "/keys/crt", "tls_key_file": "/keys/tls"}
    data["deployment"]["proxy"].update(proxy)
    result = rendered(tmp_path, data)
    calls = [call for call, _ in run(result)]
    assert calls[1] == "create secret generic omni-chat-key --from-file=deployment.key=/keys/it's mine"
    assert "--from-file=api-keys=/keys/api --from-file=tls.crt=/keys/crt --from-file=tls.key=/keys/tls" in calls[2]
    assert calls[3] == "apply --server-side --filename=-"
    assert secret_names(result) == {"omni-chat-key", "omni-chat-proxy-files"}
    script = (tmp_path / "out/make-secrets.sh").read_text()
    assert "kubectl delete secret omni-chat-key omni-chat-proxy-files" in script


def test_engines_have_no_part_in_the_proxy_s_files(tmp_path: Path) -> None:
    data = put(in_cluster(), "deployment/proxy/api_keys_file", "/keys/api")
    assert "proxy-files" not in json.dumps(rendered(tmp_path, data).pod("prefill-group1"))


def test_everybody_reads_the_secret_with_variables_if_it_is_there(tmp_path: Path) -> None:
    for template in rendered(tmp_path, in_cluster()).templates():
        assert engine(template["spec"])["envFrom"] == [{"secretRef": {"name": "omni-chat-env", "optional": True}}]
