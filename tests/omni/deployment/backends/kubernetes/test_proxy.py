"""The proxy's Deployment and Services."""

from pathlib import Path
from typing import Any

import pytest

from services.global_proxy.arguments import parse_arguments
from services.global_proxy.settings import Settings

from ...samples import put
from .samples import Rendered, engine, in_cluster, rendered

EXTRA = ["--max-queued", "7", "--no-continued-streams", "--drain-timeout-s=90"]


def settings(result: Rendered) -> tuple[str, int, Settings]:
    return parse_arguments(engine(result.pod("proxy"))["command"][3:])


@pytest.mark.parametrize("kv_transfer", [{}, {"mode": "layerwise"}, {"connector": "mooncake"}, {"connector": "nixl"}])
def test_the_proxy_takes_its_command_line(tmp_path: Path, kv_transfer: dict[str, Any]) -> None:
    data = put(in_cluster(2), "services/kv_transfer", kv_transfer)
    put(data, "services/prefill/kv_events", True)
    host, port, parsed = settings(rendered(tmp_path, data))
    assert (host, port, parsed.control_port) == ("0.0.0.0", 7000, 7001)
    assert {parsed.prefill_urls, parsed.decode_urls, parsed.kv_addresses, parsed.bootstrap_urls} == {()}
    assert parsed.mode == kv_transfer.get("mode", "pull")
    assert parsed.connector == kv_transfer.get("connector", "omni")


def test_options_and_files(tmp_path: Path) -> None:
    data = put(in_cluster(), "services/kv_transfer", {"key_file": "/elsewhere/key"})
    data["deployment"]["proxy"].update(
        workers=3,
        prefill_policy="round_robin",
        api_keys_file="/k/keys",
        tls_certificate_file="/k/crt",
        tls_key_file="/k/key",
        extra_args=EXTRA,
    )
    result = rendered(tmp_path, data)
    _, _, parsed = settings(result)
    assert (parsed.num_workers, parsed.prefill_policy, parsed.max_queued) == (3, "round_robin", 7)
    assert parsed.continue_streams is False
    pod = result.pod("proxy")
    folder = next(m["mountPath"] for m in engine(pod)["volumeMounts"] if m["name"] == "files")
    assert str(parsed.api_keys_file) == f"{folder}/api-keys"
    assert (str(parsed.tls_certificate_file), str(parsed.tls_key_file)) == (f"{folder}/tls.crt", f"{folder}/tls.key")
    assert "/elsewhere" not in str(engine(pod))
    probes = [engine(pod)[name]["httpGet"] for name in ("startupProbe", "livenessProbe", "readinessProbe")]
    assert [(probe["path"], probe["scheme"]) for probe in probes] == [
        (p, "HTTPS") for p in ("/live", "/live", "/health")
    ]
    assert pod["terminationGracePeriodSeconds"] > 90
    assert engine(pod)["resources"]["requests"]["cpu"] == "3"


def test_services_lead_to_the_pod_and_to_its_ports(tmp_path: Path) -> None:
    result = rendered(tmp_path, put(in_cluster(), "deployment/proxy/control_port", 7777))
    deployment = result.named("Deployment", "proxy")
    template = deployment["spec"]["template"]
    names = {port["name"]: port["containerPort"] for port in engine(template["spec"])["ports"]}
    assert names == {"api": 7000, "control": 7777}
    for service in result.of_kind("Service"):
        assert service["spec"]["selector"].items() <= template["metadata"]["labels"].items()
        for port in service["spec"]["ports"]:
            assert names[port["targetPort"]] == port["port"]
    joined = engine(result.pod("prefill-group1"))["command"][-1]
    control = result.named("Service", "control")
    assert joined == f"{control['metadata']['name']}:7777"


def test_engines_reach_a_proxy_that_is_not_ready(tmp_path: Path) -> None:
    """It is ready once engines have joined; clients wait until then."""
    result = rendered(tmp_path, in_cluster())
    assert result.named("Service", "control")["spec"]["publishNotReadyAddresses"] is True
    assert "publishNotReadyAddresses" not in result.named("Service", "proxy")["spec"]


def test_the_way_outside(tmp_path: Path) -> None:
    container = engine(rendered(tmp_path, put(in_cluster(), "services/http_proxy", "http://out:3128")).pod("proxy"))
    env = {entry["name"]: entry.get("value") for entry in container["env"]}
    assert (env["http_proxy"], env["https_proxy"]) == ("http://out:3128", "http://out:3128")
    assert env["no_proxy"] == "localhost,127.0.0.1,.svc,.cluster.local"


@pytest.mark.parametrize("extra", [["--drain-timeout-s", "soon"], ["--drain-timeout-s"], []])
def test_a_drain_time_that_is_none(tmp_path: Path, extra: list[str]) -> None:
    pod = rendered(tmp_path, put(in_cluster(), "deployment/proxy/extra_args", extra)).pod("proxy")
    assert pod["terminationGracePeriodSeconds"] == 45
