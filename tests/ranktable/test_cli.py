"""Commands as users give them; the whole way from tools' output to both forms."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import ranktable
from ranktable.cli import main
from tests.ranktable.outputs import A2_CONF, A2_IPS, A3_IPS, A3_MAP, A3_SDIDS, super_pod_output, vnic_output, write
from tests.ranktable.tables import a2_global, a2_local, device_lists, put


@pytest.fixture
def run(capsys):
    def run(*arguments: object) -> tuple[int, str, str]:
        code = main([str(argument) for argument in arguments])
        return code, *capsys.readouterr()

    return run


def test_a2_from_hccn_conf_to_a_file(run, tmp_path):
    write(tmp_path, conf=A2_CONF)
    out = tmp_path / "local.json"
    command = ("gen", "--generation", "a2", "--server-id", "10.0.0.1", "--hccn-conf", tmp_path / "conf")
    assert run(*command, "--devices", "0-1", "--group-id", "0", "-o", out) == (
        0, f"{out}: local, 1 group, 1 server, 2 devices, A2, form hccl\n", "",
    )  # fmt: skip
    assert json.loads(out.read_text()) == a2_local()
    code, text, _ = run(*command, "--devices", "0-1")
    assert (code, text) == (0, out.read_text())


def test_a3_from_recorded_outputs(run, tmp_path):
    write(tmp_path, vnic="".join(map(vnic_output, A3_IPS)), map=A3_MAP, spod="".join(map(super_pod_output, A3_SDIDS)))
    files = ("--hccn-output", tmp_path / "vnic", "--map-output", tmp_path / "map", "--spod-output", tmp_path / "spod")
    code, text, _ = run("gen", "--generation", "a3", "--server-id", "node-1", "--server-ip", "10.0.0.1", *files)
    table = json.loads(text)
    assert (code, table["version"], len(table["server_list"][0]["device"])) == (0, "1.2", 16)
    assert table["server_list"][0]["device"][15] == {
        "device_id": "15", "device_ip": A3_IPS[15], "super_device_id": str(A3_SDIDS[15]), "rank_id": "15",
    }  # fmt: skip
    assert table["super_pod_list"] == [{"super_pod_id": "0", "server_list": [{"server_id": "node-1"}]}]


def test_tools_are_run_where_no_file_is_given(run, tmp_path):
    code, out, err = run(
        "gen", "--generation", "a2", "--server-id", "h", "--npu-smi", tmp_path / "npu-smi", "-o", tmp_path / "x"
    )
    assert (code, out) == (1, "")
    assert "npu-smi' is not installed; name its path, or give files with its output" in err
    assert not (tmp_path / "x").exists()


def test_a_host_name_is_no_address(run, tmp_path):
    write(tmp_path, conf=A2_CONF)
    _, text, _ = run("gen", "--generation", "a2", "--server-id", "node-1", "--hccn-conf", tmp_path / "conf")
    assert "server_ip" not in text
    assert json.loads(text)["server_list"][0]["device"][7]["device_ip"] == A2_IPS[7]


@pytest.fixture
def locals_(tmp_path):
    return [put(tmp_path, f"{i}.json", a2_local(f"10.0.0.{1 + i}", 8 + 2 * i, group_id="4")) for i in range(3)]


def test_merged_per_instance(run, locals_, tmp_path):
    code, text, _ = run("merge", *locals_[:2])
    table = json.loads(text)
    assert (code, table["group_id"], table["server_count"]) == (0, "4", "2")
    assert [device["rank_id"] for server in table["server_list"] for device in server["device"]] == list("0123")
    assert json.loads(run("merge", *locals_[:2], "--group-id", "7")[1])["group_id"] == "7"


def test_merged_globally_in_either_form(run, locals_, tmp_path):
    roles = ("--prefill", *locals_[:2], "--decode", locals_[2])
    assert json.loads(run("merge", *roles)[1]) == a2_global()
    assert json.loads(run("merge", *roles, "--form", "vllm-ascend")[1]) == device_lists(super_pods=False)


def test_what_cannot_be_merged_is_not_written(run, locals_, tmp_path):
    out = tmp_path / "out.json"
    out.write_text("old")
    code, _, err = run("merge", locals_[0], locals_[0], "-o", out)
    assert (code, out.read_text()) == (1, "old")
    assert len(err.splitlines()) == 6


def test_faults_of_all_files_are_told_before_merging(run, tmp_path):
    paths = [put(tmp_path, f"{i}.json", a2_local() | {"version": "2"}) for i in range(2)]
    code, _, err = run("merge", *paths)
    assert (code, [line.split(": ")[0] for line in err.splitlines()]) == (1, [str(path) for path in paths])


def test_a_folder_that_is_not_there(run, locals_, tmp_path):
    code, _, err = run("merge", locals_[0], "-o", tmp_path / "no" / "x.json")
    assert code == 1
    assert err == (
        f"{tmp_path}/no/x.json: cannot be written (No such file or directory); name a file in a folder of yours\n"
    )


def test_validate_names_file_and_field_and_goes_on(run, tmp_path):
    good = put(tmp_path, "good.json", a2_global())
    value = a2_local()
    value["server_list"][0]["device"][0]["device_ip"] = "x"
    bad = put(tmp_path, "bad.json", value)
    assert run("validate", bad, good) == (
        1,
        f"{good}: valid: global, 3 groups, 3 servers, 6 devices, A2, form hccl\n",
        f"{bad}: server_list[0].device[0].device_ip: 'x' is not an IP address; write one, as 192.168.1.8\n",
    )
    assert run("validate", good)[0] == 0


def test_show_in_the_other_form_and_back(run, tmp_path):
    hccl, lists = put(tmp_path, "a.json", a2_global()), put(tmp_path, "b.json", device_lists(super_pods=False))
    assert json.loads(run("show", hccl, "--form", "vllm-ascend", "--prefill-groups", "2")[1]) == device_lists(
        super_pods=False
    )
    back = json.loads(run("show", lists, "--form", "hccl")[1])
    assert [group["server_count"] for group in back["server_group_list"]] == ["2", "1"]
    assert run("show", hccl, "--form", "vllm-ascend") == (
        1, "", f"{hccl}: server_group_list: does not tell prefill from decode; give --prefill-groups N\n",
    )  # fmt: skip


def test_show_prints_a_table_that_is_not_complete(run, tmp_path):
    path = put(tmp_path, "a.json", a2_local() | {"status": "initializing"})
    code, out, _ = run("show", path)
    assert (code, len(out.splitlines())) == (0, 4)
    assert run("show", path, "--form", "hccl")[0] == 1


def test_the_command_needs_the_standard_library_alone(tmp_path):
    path = put(tmp_path, "a.json", a2_local())
    root = Path(ranktable.__file__).parents[1]
    start = "import sys, runpy; sys.path.insert(0, sys.argv.pop(1)); runpy.run_module('ranktable', run_name='__main__')"
    command = [sys.executable, "-I", "-S", "-c", start, root, "validate", path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"{path}: valid")
