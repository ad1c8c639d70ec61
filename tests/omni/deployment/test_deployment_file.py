"""Reading a file: what YAML refuses, what every kind of field refuses, and the words for it."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from omni.deployment.deployment_file import load_deployment
from omni.deployment.errors import ConfigError, DeploymentError

from .samples import FIELD_FILE, content, lines, loaded, put

P1, D1 = "deployment/prefill/group1", "deployment/decode/group1"


def test_a_small_file_and_its_defaults(tmp_path: Path) -> None:
    deployment = loaded(tmp_path, content())
    assert deployment.name == "trial"
    assert deployment.effective_platform == "cpu"
    assert deployment.model_name == "smollm2"
    assert deployment.log_folder == Path.cwd() / "logs" / "trial"
    assert deployment.deployment.prefill["group1"].hosts == ("127.0.0.1",)
    assert deployment.deployment.proxy.host == "127.0.0.1"
    assert deployment.services.prefill.max_model_len == 32000
    assert deployment.services.decode.max_model_len == 16384
    transfer = deployment.services.kv_transfer
    assert (transfer.connector, transfer.transport, transfer.mode) == ("omni", "auto", "pull")
    assert (transfer.key_file, transfer.num_connections, transfer.max_lease_s) == (None, 1, 600)
    assert (transfer.lease_s, transfer.load_timeout_s, transfer.load_failure_policy) == (30, 30, "recompute")


def test_numbers_as_text(tmp_path: Path) -> None:
    data = put(content(), f"{P1}/base_api_port", "9000")
    put(data, "services/prefill", {"max_model_len": "2048", "kv_cache_gib": "0.5", "data_parallel_size": "2"})
    deployment = loaded(tmp_path, data)
    assert deployment.deployment.prefill["group1"].base_api_port == 9000
    assert deployment.services.prefill.max_model_len == 2048
    assert deployment.services.prefill.kv_cache_gib == 0.5


def test_the_field_s_own_form_is_accepted_unchanged() -> None:
    deployment = load_deployment(FIELD_FILE)
    assert deployment.effective_platform == "npu"
    assert len(deployment.deployment.prefill) == 4
    decode = deployment.deployment.decode["group1"]
    assert decode.hosts == ("192.0.2.5", "192.0.2.6", "192.0.2.7", "192.0.2.8")
    assert decode.host_overrides["192.0.2.6"].base_api_port == 9100
    assert decode.ascend_rt_visible_devices == tuple(range(16))


def test_group_names_of_both_styles(tmp_path: Path) -> None:
    data = content()
    data["deployment"]["prefill"] = {"p1": {"base_api_port": 9000}}
    data["deployment"]["decode"] = {"d1": {"base_api_port": 9500}}
    assert list(loaded(tmp_path, data).deployment.decode) == ["d1"]


PORT = "is not a port number; write a number from 1024 to 65535"
SIZE = "is not a number from 1 to 4096; write a whole number such as 1"
COUNT = "is not a number of at least 1; write a whole number such as 1"
CONNECTIONS = "is not a number of connections; write a whole number from 1 to 16"
CONTROL_PORT = "is not a port number; write a number from 1024 to 65535, 0 for none, or delete the line"
POSITIVE = "is not a number above 0; write a number such as 30 or 0.5"
HOST = "is not an IPv4 address or host name; write one such as 127.0.0.1"
DEVICES = 'is not a list of device numbers; write them without spaces or a trailing comma: "0,1,2,3"'
LIST = 'is not a list of texts; write a list such as ["--max-num-seqs", "8"]'
BLOCK = 'is not a block of NAME: text lines; write lines such as OMP_PROC_BIND: "true"'


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (f"{P1}/base_api_port", "90x0", f"'90x0' {PORT}"),
        (f"{P1}/base_api_port", 1023, f"1023 {PORT}"),
        (f"{P1}/base_api_port", 65536, f"65536 {PORT}"),
        (f"{P1}/base_api_port", True, f"True {PORT}"),
        (f"{P1}/base_api_port", "9_000", f"'9_000' {PORT}"),
        (f"{D1}/master_port", 80.5, f"80.5 {PORT}"),
        ("deployment/proxy/listen_port", None, f"an empty value {PORT}"),
        ("deployment/proxy/control_port", None, f"an empty value {CONTROL_PORT}"),
        ("deployment/proxy/control_port", 80, f"80 {CONTROL_PORT}"),
        ("deployment/proxy/control_port", -1, f"-1 {CONTROL_PORT}"),
        ("deployment/proxy/control_port", False, f"False {CONTROL_PORT}"),
        ("services/decode/max_model_len", 0, f"0 {COUNT}"),
        ("services/prefill/data_parallel_size", "two", f"'two' {SIZE}"),
        (f"{P1}/tensor_parallel_size", -1, f"-1 {SIZE}"),
        (f"{P1}/data_parallel_size", 4097, f"4097 {SIZE}"),
        ("services/decode/pipeline_parallel_size", 10**9, f"1000000000 {SIZE}"),
        ("deployment/proxy/workers", 4097, f"4097 {SIZE}"),
        ("services/kv_transfer/lease_s", 0, f"0 {POSITIVE}"),
        ("services/kv_transfer/lease_s", ".nan", f"'.nan' {POSITIVE}"),
        ("services/kv_transfer/lease_s", float("nan"), f"nan {POSITIVE}"),
        ("services/decode/kv_cache_gib", [1], f"a list {POSITIVE}"),
        ("services/log_path", "", "'' is empty; write a value or delete the line"),
        ("services/model_path", 3, "3 is not text; put it in quotes"),
        ("deployment/proxy/host", "10.0.0.256", f"'10.0.0.256' {HOST}"),
        (f"{P1}/hosts", "10.0.0.1,", f"'10.0.0.1,' {HOST}"),
        (f"{P1}/hosts", "a_b", f"'a_b' {HOST}"),
        (f"{P1}/hosts", "h1,h1", "'h1,h1' names h1 twice; name each host once"),
        (f"{P1}/hosts", ["h1"], "a list is not a list of hosts; write them with commas between"),
        (f"{P1}/hosts", "0.0.0.0", "'0.0.0.0' holds 0.0.0.0, which nobody can connect to; write this"),
        (f"{P1}/ascend_rt_visible_devices", "0, 1", f"'0, 1' {DEVICES}"),
        (f"{P1}/ascend_rt_visible_devices", "0,1,", f"'0,1,' {DEVICES}"),
        (f"{P1}/ascend_rt_visible_devices", "1,1", "'1,1' names device 1 twice; name"),
        ("services/prefill/extra_args", "--a b", LIST),
        ("services/prefill/extra_args", [True], LIST),
        (f"{D1}/env", {"A B": "x"}, BLOCK),
        (f"{D1}/env", {"A": None}, BLOCK),
        ("name", "a/b", "'a/b' is not a deployment name; write `name:` with at most 64 letters"),
        ("services/kv_transfer/checksum", "maybe", "'maybe' is not true or false; write true or false"),
        ("services/kv_transfer/checksum", None, "an empty value is not true or false; write true or false"),
        (f"{P1}/password", 5, "is not text; put it in quotes"),
        ("deployment/proxy/other_control_addresses", "a:7001", "'a:7001' is not a list; write its parts with commas"),
        ("platform", "tpu", "'tpu' is not known; write cpu, npu or cuda"),
        ("services/dtype", "fp8", "'fp8' is not known; write auto, bfloat16, float16 or float32"),
        ("backend", "ssh", "'ssh' is not known; write local, ansible, ray or kubernetes"),
        ("services/kv_transfer/load_failure_policy", "x", "'x' is not known;"),
        ("services/kv_transfer/connector", "lmcache", "'lmcache' is not known; write omni, nixl or mooncake"),
        (
            "services/kv_transfer/transport",
            "rdma",
            "'rdma' is not known; write auto, shared_memory, process_vm, tcp, hc",
        ),
        ("services/kv_transfer/mode", "push", "'push' is not known; write pull or layerwise"),
        ("services/kv_transfer/num_connections", 0, f"0 {CONNECTIONS}"),
        ("services/kv_transfer/num_connections", "17", f"'17' {CONNECTIONS}"),
        ("services/kv_transfer/num_connections", True, f"True {CONNECTIONS}"),
        ("services/kv_transfer/max_lease_s", 0, f"0 {POSITIVE}"),
        ("services/kv_transfer/key_file", "", "'' is empty; write a value or delete the line"),
        ("services/kv_transfer/key_file", 3, "3 is not text; put it in quotes"),
        (f"{P1}/base_kv_port", 80, f"80 {PORT}"),
        (f"{P1}/host 127.0.0.1/base_kv_port", "x", f"'x' {PORT}"),
        ("services/kv_transfer/key", "x", "is not a known key; known here: connector, transport"),
        ("deployment/prefill", {}, "holds no group; write at least one"),
        ("deployment/decode/d0x", {}, "'d0x' is not a group name; write group1, group2"),
        (P1, "127.0.0.1:9000", "is not a block of keys; write its keys on the following lines, indented"),
        ("services", ["a"], "is not a block of keys; write its keys on the following lines, indented"),
        (f"{P1}/base_api_prot", 1, "is not a known key; did you mean base_api_port?"),
        ("servces", {}, "is not a known key; did you mean services?"),
        (f"{D1}/host_overrides", {}, "is not a known key; known here: data_parallel_size"),
        (f"{P1}/host 127.0.0.1/usr", "x", "is not a known key; did you mean user?"),
        (f"{P1}/host 127.0.0.1/hosts", "x", "is not a known key; known here: user"),
        ("deployment/proxy/zzz", 1, "is not a known key; known here: user, private_key, pass"),
    ],
)
def test_a_refused_field(tmp_path: Path, path: str, value: Any, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        loaded(tmp_path, put(content(), path, value))
    assert lines(caught.value)[0].startswith(f"{path.replace('/', '.')}: {words}")
    file, _, line = caught.value.problems[0].place.rpartition(", line ")
    assert file == str(tmp_path / "trial.yaml")
    assert path.rpartition("/")[2] in Path(file).read_text().splitlines()[int(line) - 1]


def test_every_problem_is_named_on_its_own_line(tmp_path: Path) -> None:
    data = put(put(content(), f"{P1}/base_api_port", "x"), "services/decode/max_model_len", "y")
    del data["services"]["model_path"]
    with pytest.raises(DeploymentError) as caught:
        loaded(tmp_path, data)
    assert isinstance(caught.value, ConfigError)
    assert [problem.field for problem in caught.value.problems] == [
        "deployment.prefill.group1.base_api_port",
        "services.model_path",
        "services.decode.max_model_len",
    ]
    assert "services.model_path: is missing; add it; configs/1p1d.yaml shows a whole file" in lines(caught.value)
    assert len(lines(caught.value)) == 3


def test_passwords_show_nowhere(tmp_path: Path) -> None:
    data = put(content(), f"{P1}/password", "hunter2")
    deployment = loaded(tmp_path, data)
    assert "hunter2" not in repr(deployment) + str(deployment) + deployment.model_dump_json()
    for path, value in (
        (f"{P1}/password", ["hunter2"]),
        (f"{P1}/pasword", "hunter2"),
        (P1, "hunter2"),
        ("services/prefill/extra_args", "--api-key hunter2"),
        ("deployment/proxy/password", {"hunter2": "hunter2"}),
    ):
        with pytest.raises(ConfigError) as caught:
            loaded(tmp_path, put(content(), path, value))
        assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a: [1", "line 1, column 6: not valid YAML (expected ',' or ']'"),
        ("a: 1\nb: x: y\n", "line 2, column 5: not valid YAML (mapping values are not allowed here)"),
        ("a: *hunter2\n", "line 1, column 4: not valid YAML (an alias (*), anchor (&) or tag (!) that does not fit)"),
        ("a: !hunter2 b\n", "line 1, column 4: not valid YAML (an alias (*), anchor (&) or tag (!) that does not fit)"),
        ("a: 1\nb: 2\na: 3\n", "line 3, column 1: the key a stands twice in one block, first on line 1; keep one"),
        ("x:\n  a: 1\n  a: 1\n", "line 3, column 3: the key a stands twice in one block, first on line 2; keep one"),
        ("- a\n", "is not a block of keys; start it with `deployment:`"),
        ("", "is not a block of keys; start it with `deployment:`"),
        ("a: \x01", "holds characters that YAML does not allow; save it as plain text"),
        ("a: 2026-02-30\n", "line 1, column 4: not valid YAML (a date or number that cannot be); check"),
        pytest.param(f"a: {'[' * 9000}{']' * 9000}\n", "has too many blocks inside one another; see", id="deep"),
    ],
)
def test_not_a_deployment_file(tmp_path: Path, text: str, line: str) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_deployment(file)
    assert str(caught.value).startswith(str(file))
    assert line in str(caught.value)
    assert "hunter2" not in str(caught.value)


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml: does not exist; name a deployment file"):
        load_deployment(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match=r"cannot be read \(Is a directory\); make it a file you may read"):
        load_deployment(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"a: \xe9")
    with pytest.raises(ConfigError, match="is not UTF-8 text; save it as UTF-8"):
        load_deployment(tmp_path / "latin.yaml")


def test_a_file_name_that_cannot_be_a_deployment_name(tmp_path: Path) -> None:
    file = tmp_path / "my file.yaml"
    file.write_text("deployment: {}\n")
    with pytest.raises(ConfigError, match=r"my file\.yaml: name: 'my file' is not a deployment name; write `name:`"):
        load_deployment(file)


@pytest.mark.parametrize(
    "address", ["10.0.0.2", "10.0.0.2:", "10.0.0.256:7001", ":7001", "h:0", "h:65536", "h:x", 7001]
)
def test_other_proxies_have_a_host_and_a_port(tmp_path: Path, address: object) -> None:
    with pytest.raises(ConfigError) as caught:
        loaded(tmp_path, put(content(), "deployment/proxy/other_control_addresses", ["proxy-2.example:80", address]))
    assert lines(caught.value) == [
        f"deployment.proxy.other_control_addresses.1: {address!r} is not HOST:PORT; "
        "write an IPv4 address or host name and a port, such as 10.0.0.2:7001"
    ]


def test_numbers_that_look_octal_are_decimal(tmp_path: Path) -> None:
    file = tmp_path / "trial.yaml"
    text = yaml.safe_dump(content())
    file.write_text(text.replace("9000", "020000"))
    assert load_deployment(file).deployment.prefill["group1"].base_api_port == 20000
    file.write_text(text.replace("9000", "150:00"))
    with pytest.raises(ConfigError, match="base_api_port: '150:00' is not a port number"):
        load_deployment(file)
