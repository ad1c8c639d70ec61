"""What is refused before anything is written."""

from pathlib import Path
from typing import Any

import pytest

from omni.deployment.errors import ConfigError

from ...samples import put
from .samples import in_cluster, on_devices, rendered


def refusal(folder: Path, data: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        rendered(folder, data)
    assert not (folder / "out").exists()
    return str(caught.value)


def test_no_image(tmp_path: Path) -> None:
    data = in_cluster()
    del data["services"]["docker_image"]
    text = refusal(tmp_path, data)
    assert "chat.yaml, line" in text
    assert "services.docker_image: is missing; write the image that the pods run" in text


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("deployment/proxy/control_port", 0, "deployment.proxy.control_port: 0, and the engines in pods join"),
        ("services/kv_transfer", {"transport": "shared_memory"}, "shared_memory works within one host"),
        ("services/kv_transfer", {"transport": "process_vm"}, "write auto or tcp"),
        ("services/http_proxy", "http://me:hunter2@proxy:3128", "services.http_proxy: holds a password"),
        ("services/http_proxy", "me:hunter2@proxy:3128", "services.http_proxy: holds a password"),
        ("services/http_proxy", "http://me:hunter2/@proxy:3128", "services.http_proxy: holds a password"),
        ("deployment/proxy/otlp_endpoint", "http://me:hunter2@c:4318", "deployment.proxy.otlp_endpoint: holds a pass"),
        ("deployment/proxy/extra_args", ["--otlp-endpoint", "http://me:hunter2@c:4318"], "extra_args: --otlp-endpoint"),
        ("deployment/proxy/extra_args", ["--otlp-endpoint=http://me:hunter2@c"], "extra_args: --otlp-endpoint holds"),
        ("deployment/proxy/extra_args", ["--api-keys", "/hunter2"], "and write deployment.proxy.api_keys_file"),
        ("services/prefill/env", {"https_proxy": "me:hunter2@proxy"}, "env.https_proxy: holds a password"),
        ("services/prefill/env", {"INDEX_URL": "https://me:hunter2@pypi"}, "env.INDEX_URL: holds a password"),
        ("services/mixed/env", {"HF_TOKEN": "hunter2"}, "services.mixed.env.HF_TOKEN: is a secret by its name"),
        ("services/mixed/extra_args", ["--api-key", "hunter2"], "services.mixed.extra_args: --api-key is a secret"),
        ("services/prefill/env", {"HF_TOKEN": "hunter2"}, "services.prefill.env.HF_TOKEN: is a secret by its name"),
        ("services/prefill/extra_args", ["--api-key", "hunter2"], "services.prefill.extra_args: --api-key is a secret"),
        ("services/prefill/extra_args", ["--hf-token=hunter2"], "services.prefill.extra_args: --hf-token is a secret"),
    ],
)
def test_what_pods_cannot_do_or_all_could_read(tmp_path: Path, path: str, value: object, words: str) -> None:
    text = refusal(tmp_path, put(in_cluster(2), path, value))
    assert words in text
    assert "hunter2" not in text
    assert len(text.splitlines()) == 1, "what two groups have in common is said once"


def test_a_group_s_own_secret(tmp_path: Path) -> None:
    text = refusal(tmp_path, put(in_cluster(2), "deployment/prefill/group2/env", {"MY_PASSWORD": "hunter2"}))
    assert "deployment.prefill.group2.env.MY_PASSWORD" in text
    assert "kubectl create secret generic omni-chat-env --from-env-file=FILE" in text


def test_a_secret_that_each_group_replaces(tmp_path: Path) -> None:
    """The pods' file still has it."""
    data = put(in_cluster(1), "services/decode/extra_args", ["--api-key", "hunter2"])
    put(data, "services/decode/env", {"HF_TOKEN": "hunter2"})
    put(data, "deployment/decode/group1/extra_args", [])
    put(data, "deployment/decode/group1/env", {"HF_TOKEN": "hunter2"})
    text = refusal(tmp_path, data)
    assert "services.decode.extra_args: --api-key is a secret" in text
    assert "services.decode.env.HF_TOKEN: is a secret" in text
    assert "deployment.decode.group1.env.HF_TOKEN: is a secret" in text
    assert "hunter2" not in text


def test_ranks_that_each_span_pods(tmp_path: Path) -> None:
    data = put(in_cluster(), "deployment/decode/group1/hosts", "a,b,c,d")
    put(data, "deployment/decode/group1/tensor_parallel_size", 2)
    put(data, "services/decode/data_parallel_size", 2)
    text = refusal(tmp_path, data)
    assert "services.decode.data_parallel_size: 2 ranks, each over several nodes" in text
    assert "write 1, and a group for each rank" in text
    assert len(text.splitlines()) == 1


def test_unequal_pods(tmp_path: Path) -> None:
    data = on_devices("10.0.0.1,10.0.0.3")
    put(data, "deployment/prefill/group1/host 10.0.0.3", {"ascend_rt_visible_devices": "0,1"})
    put(data, "deployment/prefill/group1/tensor_parallel_size", 1)
    text = refusal(tmp_path, data)
    assert "deployment.prefill.group1.ascend_rt_visible_devices: 4 on 10.0.0.1, 2 on 10.0.0.3" in text


def test_options_that_look_like_secrets(tmp_path: Path) -> None:
    data = put(in_cluster(), "services/decode/extra_args", ["--long-prefill-token-threshold", "64", "--tokenizer", "t"])
    put(data, "services/decode/env", {"TOKENIZERS_PARALLELISM": "1", "KEYBOARD": "de"})
    put(data, "services/prefill/env", {"CONTACT": "me@example.com", "ENDPOINT": "https://hub.example/models"})
    put(data, "services/http_proxy", "http://proxy:3128/a")
    put(data, "deployment/proxy/otlp_endpoint", "http://collector:4318")
    put(data, "deployment/proxy/extra_args", ["--max-queued", "7"])
    assert rendered(tmp_path, data).manifests
