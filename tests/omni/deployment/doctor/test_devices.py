"""NPUs and GPUs, asked of tools that print what the references show."""

from pathlib import Path

import pytest

from omni.deployment.doctor import devices, tool
from omni.deployment.doctor.devices import gpu_findings, npu_findings, parse_gpus
from tests.ranktable.outputs import A2_MAP, A3_MAP

from .tools import only_tools

UP, DOWN = "link status: UP", "link status: DOWN"
HEALTHY = "\tNPU ID        : 0\n\tChip Count    : 1\n\n\tHealth        : {}\n\tChip ID       : 0"


@pytest.fixture(autouse=True)
def no_driver(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tool, "DRIVER_TOOLS", str(tmp_path / "no driver"))
    for name in ("ASCEND_HOME_PATH", "ASCEND_TOOLKIT_HOME"):
        monkeypatch.delenv(name, raising=False)


def npu_smi(chip_map: str, chips: list[tuple[int, int]], **states: str) -> dict[str, str]:
    health = {f"info -t health -i {npu} -c {chip}": HEALTHY.format("OK") for npu, chip in chips}
    return {"info -m": chip_map} | health | {key.replace("_", " "): text for key, text in states.items()}


def links(*states: str) -> dict[str, str]:
    return {f"-i {index} -link -g": state for index, state in enumerate(states)}


A3_CHIPS = [(npu, chip) for npu in range(8) for chip in (0, 1)]


def test_without_tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    only_tools(tmp_path / "bin", monkeypatch, {})
    assert list(npu_findings((), is_needed=False)) == []
    assert list(gpu_findings(0, is_needed=False)) == []
    (npu,) = npu_findings((0,), is_needed=True)
    (gpu,) = gpu_findings(1, is_needed=True)
    for finding, name in ((npu, "npu-smi"), (gpu, "nvidia-smi")):
        assert (finding.level, finding.subject, finding.found) == ("problem", name, "not on the PATH")


def test_a_good_a3_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tools = {"npu-smi": npu_smi(A3_MAP, A3_CHIPS), "hccn_tool": links(*[UP] * 16)}
    only_tools(tmp_path / "bin", monkeypatch, tools)
    monkeypatch.setenv("ASCEND_HOME_PATH", "/usr/local/Ascend/latest")
    findings = list(npu_findings(tuple(range(16)), is_needed=True))
    assert [(f.subject, f.found) for f in findings] == [
        ("NPUs", "16 NPUs: 0-15"),
        ("NPU health", "16 are OK"),
        ("NPU links", "16 are up"),
    ]
    assert {f.level for f in findings} == {"ok"}


def test_links_are_asked_for_by_logical_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tools = {"npu-smi": npu_smi(A3_MAP, A3_CHIPS), "hccn_tool": links(*[UP] * 13, DOWN, UP, UP)}
    only_tools(tmp_path / "bin", monkeypatch, tools)
    assert "not up: 13" in [finding.found for finding in npu_findings((), is_needed=False)]


def test_what_is_wrong_with_an_a2_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    smi = npu_smi(A2_MAP, [(npu, 0) for npu in range(8)])
    smi["info -t health -i 2 -c 0"] = HEALTHY.format("Alarm")
    smi["info -t health -i 4 -c 0"] = "nothing that is known"
    only_tools(tmp_path / "bin", monkeypatch, {"npu-smi": smi, "hccn_tool": links(UP, DOWN, UP, "?", *[DOWN] * 4)})
    findings = {f.subject: f for f in npu_findings((0, 1, 2, 3, 4, 9, 11), is_needed=True)}
    assert {f.level for f in findings.values()} == {"problem"}
    assert findings["NPUs"].found == "8 NPUs: 0-7; 9,11 of ascend_rt_visible_devices are not here"
    assert findings["NPU health"].found == "2: Alarm, 4: no answer that is known"
    assert findings["NPU links"].found == "not up: 1,3-4"  # of those that the file names
    assert findings["CANN toolkit"].mend.startswith("source /usr/local/Ascend/ascend-toolkit/set_env.sh")


@pytest.mark.parametrize(
    ("program", "said"),
    [
        ("echo no driver >&2; exit 7", "`npu-smi info -m` ended with status 7: no driver"),
        ("echo hello", "`npu-smi info -m`: 'hello' is not the heading"),
        ("exec sleep 100", "`npu-smi info -m` gave no answer within 0.2 s"),
    ],
)
def test_a_driver_that_is_ill(program: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tool.Tool.ask, "__kwdefaults__", {"timeout_s": 0.2 if "sleep" in program else 10.0})
    only_tools(tmp_path / "bin", monkeypatch, {"npu-smi": f"PATH=/usr/bin:/bin; {program}"})
    (finding,) = npu_findings((), is_needed=False)
    assert finding.level == "problem"
    assert said in finding.found


def test_a_file_that_cannot_be_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    only_tools(tmp_path / "bin", monkeypatch, {"npu-smi": ""})
    (tmp_path / "bin" / "npu-smi").write_text("#!/no/such/interpreter\n")
    (finding,) = npu_findings((), is_needed=True)
    assert finding.found == "`npu-smi info -m` cannot be run (No such file or directory)"


def test_tools_that_want_root_are_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    only_tools(tmp_path / "bin", monkeypatch, {"npu-smi": {"info -m": A2_MAP}, "hccn_tool": {}})
    findings = {f.subject: f for f in npu_findings((), is_needed=False)}
    assert findings["NPU health"].level == findings["NPU links"].level == "warning"
    assert "CANN toolkit" not in findings, "no engine of this host needs it"
    (tmp_path / "bin" / "hccn_tool").unlink()
    assert {f.subject: f.level for f in npu_findings((), is_needed=False)}["hccn_tool"] == "warning"


class TestGpus:
    QUERY = "--query-gpu=index,name,memory.total,memory.free --format=csv,noheader,nounits"

    def test_two(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        rows = "0, NVIDIA H200, 143771, 143000\n1, NVIDIA H200, 143771, 1000\n"
        only_tools(tmp_path / "bin", monkeypatch, {"nvidia-smi": {self.QUERY: rows}})
        present, first, second = gpu_findings(2, is_needed=True)
        assert (present.level, present.found) == ("ok", "2 GPUs: 0-1")
        assert (first.level, first.found) == ("ok", "NVIDIA H200, 139.6 GiB of 140.4 GiB free")
        assert (second.level, second.subject) == ("warning", "GPU 1")
        assert [f.level for f in gpu_findings(1, is_needed=True)] == ["ok", "ok", "ok"], "nobody uses the second"
        assert (
            next(gpu_findings(4, is_needed=True)).found == "2 GPUs: 0-1; 2-3 of the file's parallel sizes are not here"
        )

    @pytest.mark.parametrize("text", ["", "No devices were found", "0, H200, [N/A], 3", "0, H200, 5"])
    def test_other_words(self, text: str) -> None:
        with pytest.raises(ValueError, match="nvidia-smi"):
            parse_gpus(text)

    def test_no_driver(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        only_tools(tmp_path / "bin", monkeypatch, {"nvidia-smi": {}})
        (finding,) = gpu_findings(0, is_needed=False)
        assert finding.level == "problem"


@pytest.mark.parametrize(
    ("numbers", "text"), [([], ""), ([3], "3"), ([0, 1, 2], "0-2"), ([5, 0, 1, 3, 6], "0-1,3,5-6")]
)
def test_numbers(numbers: list[int], text: str) -> None:
    assert devices._numbers(numbers) == text
