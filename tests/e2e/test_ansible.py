"""A deployment on four hosts that Ansible reaches by ssh: namespaces with an address each, the tiny model, 2P1D."""

import json
import os
import shutil
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import yaml

from omni.deployment.embedded_model import ensure_embedded_model
from tests.e2e import hosts_in_namespaces
from tests.e2e.deployments import Server, eventually, omni_cli
from tests.e2e.hosts_in_namespaces import PASSWORD, Site, site_of

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(hosts_in_namespaces.missing() is not None, reason=str(hosts_in_namespaces.missing())),
]

_PROMPT = "Ten green bottles hanging on the wall, " * 8


class Running:
    """The deployment, and what one sees of it from the machine that drives the hosts."""

    def __init__(self, folder: Path, site: Site) -> None:
        self.site = site
        self.env = {**os.environ, **site.env}
        self.config = folder / "hosts.yml"
        self.log_path = site.path / "logs"
        shutil.copytree(ensure_embedded_model("tiny"), folder / "model")
        self.config.write_text(yaml.safe_dump(self._content(folder / "model")))
        self.proxy = Server(f"http://{site.host('c0').address}:7000")
        self.rendered = folder / "state/hosts/rendered"

    def cli(self, *arguments: str) -> str:
        """What a command prints; it must succeed."""
        done = omni_cli(self.env, *arguments)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def playbook(self, *arguments: str) -> dict[str, dict[str, int]]:
        """Run by hand, without omni: what each host counts in the end."""
        command = [str(Path(sys.executable).with_name("ansible-playbook")), "-i", "inventory.yml", "playbook.yml"]
        done = subprocess.run(
            [*command, *arguments], env=self.env, cwd=self.rendered, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        lines = done.stdout.partition("PLAY RECAP")[2].splitlines()[1:]
        counts = {line.partition(" : ")[0].strip(): line.partition(" : ")[2].split() for line in lines if " : " in line}
        return {host: {k: int(v) for k, v in (word.split("=") for word in words)} for host, words in counts.items()}

    def states(self) -> dict[str, dict[str, object]]:
        done = omni_cli(self.env, "status", "--json", "--no-completion", "hosts")
        return {state["name"]: state for state in json.loads(done.stdout)["processes"]}

    def answers(self) -> bool:
        body = {"model": "test-model", "prompt": _PROMPT, "max_tokens": 4, "temperature": 0}
        return bool(self.proxy.post("/v1/completions", body)["choices"][0]["text"])

    def _content(self, model: Path) -> dict[str, object]:
        key = {"user": "root", "private_key": str(self.site.private_key)}
        with_password = {"user": "root", "password": PASSWORD}

        def group(host: str, access: dict[str, str]) -> dict[str, object]:
            return {**access, "hosts": self.site.host(host).address, "base_api_port": 9000}

        role = {"kv_cache_gib": 0.1, "max_model_len": 1024}
        return {
            "name": "hosts",
            "platform": "cpu",
            "deployment": {
                "prefill": {"group1": group("p1", key), "group2": group("p2", with_password)},
                "decode": {"group1": group("d1", key)},
                "proxy": {**key, "host": self.site.host("c0").address, "extra_args": ["--min-prefill-tokens", "0"]},
            },
            "services": {
                "model_path": str(model),
                "served_model_name": "test-model",
                "dtype": "float32",
                "log_path": str(self.log_path),
                "runtime": "host",
                "venv_path": sys.prefix,
                "prefill": role,
                "decode": role,
            },
        }


class Watch:
    """Looks for a text in every command line of this machine and its hosts, as long as it is entered."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self.found: set[str] = set()
        self.num_looks = 0

    def __enter__(self) -> "Watch":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join(timeout=30)

    def _look(self) -> None:
        while not self._is_over.wait(0.2):
            self.num_looks += 1
            for process in psutil.process_iter():
                try:
                    line = " ".join(process.cmdline())
                except psutil.Error:
                    continue
                if self._text in line:
                    self.found.add(line)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with site_of(tmp_path_factory.mktemp("hosts"), ("p1", "p2", "d1", "c0")) as site:
        yield site


@pytest.fixture(scope="module")
def running(site: Site, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """Served while somebody watches for the password; nothing of it is left on the hosts after the tests."""
    folder = site.private_key.parents[1]
    running = Running(folder, site)
    with Watch(PASSWORD) as watch:
        running.cli("serve", str(running.config))
    assert watch.num_looks > 5
    assert not watch.found
    yield running
    running.cli("stop", "hosts")
    for host in site.hosts:
        assert eventually(lambda host=host: not host.processes(), 60), host.processes()
    assert not running.rendered.exists()


def test_a_request_is_answered_by_engines_on_other_hosts(running: Running) -> None:
    assert running.answers()
    decode = Server(f"http://{running.site.host('d1').address}:9000")
    assert eventually(lambda: decode.metric("vllm:omni_kv_loaded_bytes_total") > 0, 10)
    hosts = {name: state["host"] for name, state in running.states().items()}
    assert hosts == {
        "prefill.group1.rank0": running.site.host("p1").address,
        "prefill.group2.rank0": running.site.host("p2").address,
        "decode.group1.rank0": running.site.host("d1").address,
        "proxy": running.site.host("c0").address,
    }
    assert {state["state"] for state in running.states().values()} == {"ready"}


def test_the_same_two_files_by_hand_change_nothing_and_interrupt_nobody(running: Running) -> None:
    before = {name: (state["pid"], state["restarts"]) for name, state in running.states().items()}
    counts = running.playbook()
    assert {host: count["changed"] for host, count in counts.items()} == dict.fromkeys(("p1", "p2", "d1", "c0"), 0)
    assert {name: (state["pid"], state["restarts"]) for name, state in running.states().items()} == before


def test_a_host_that_was_lost_is_brought_back(running: Running) -> None:
    lost = running.site.host("p1")
    others = {name: state["pid"] for name, state in running.states().items() if name != "prefill.group1.rank0"}
    lost.kill()
    states = running.states()
    assert states["prefill.group1.rank0"]["state"] == "failed"
    assert "cannot be reached" in str(states["prefill.group1.rank0"]["message"])
    assert running.answers()  # the other P does it all
    lost.start()
    running.cli("serve", str(running.config))
    states = running.states()
    assert {state["state"] for state in states.values()} == {"ready"}
    assert {name: state["pid"] for name, state in states.items() if name in others} == others
    assert running.answers()


def test_logs_are_fetched(running: Running, tmp_path: Path) -> None:
    running.cli("logs", "--deployment", "hosts", "--output", str(tmp_path / "logs"))
    names = {path.name for path in (tmp_path / "logs").iterdir()}
    assert {"prefill.group1.rank0.log", "prefill.group2.rank0.log", "decode.group1.rank0.log", "proxy.log"} <= names
    assert PASSWORD not in "".join(path.read_text(errors="replace") for path in (tmp_path / "logs").iterdir())


def test_a_password_is_in_no_file_but_its_own(running: Running) -> None:
    folder = running.site.private_key.parents[1]
    files = [path for path in folder.rglob("*") if path.is_file() and not path.is_relative_to(folder / "model")]
    holding = [path for path in files if PASSWORD.encode() in path.read_bytes()]
    assert sorted(holding) == sorted([running.config, running.rendered / "host_vars/p2/passwords.yml"])
    assert stat.S_IMODE(holding[-1].stat().st_mode) == 0o600


def test_every_host_has_the_same_key_for_itself_alone(running: Running) -> None:
    keys = {host.run("cat", "/root/.omni/hosts/deployment.key") for host in running.site.hosts}
    assert len(keys) == 1
    modes = {host.run("stat", "-c", "%a", "/root/.omni/hosts/deployment.key").strip() for host in running.site.hosts}
    assert modes == {"600"}


def test_one_process_is_restarted_and_no_other(running: Running) -> None:
    before = running.states()
    running.cli("restart", "--yes", "--deployment", "hosts", "prefill.group2.rank0")
    after = running.states()
    changed = {name for name in before if before[name]["pid"] != after[name]["pid"]}
    assert changed == {"prefill.group2.rank0"}
    assert running.answers()


def test_fewer_groups_and_more_again(running: Running) -> None:
    running.cli("scale", "prefill=1", "--deployment", "hosts")
    assert "prefill.group2.rank0" not in running.states()
    assert eventually(lambda: not running.site.host("p2").processes(), 60)
    assert running.answers()
    running.cli("scale", "prefill=2", "--deployment", "hosts")
    assert running.states()["prefill.group2.rank0"]["state"] == "ready"
    assert running.answers()


def test_hosts_that_do_not_answer_are_named_before_anything_is_touched(running: Running, tmp_path: Path) -> None:
    content = yaml.safe_load(running.config.read_text())
    content["name"] = "other"
    content["deployment"]["prefill"]["group2"]["password"] = "wrong"  # noqa: S105
    config = tmp_path / "other.yml"
    config.write_text(yaml.safe_dump(content))
    # A connection that is kept from the tests before would need no password.
    env = running.env | {"ANSIBLE_SSH_CONTROL_PATH_DIR": running.env["ANSIBLE_SSH_CONTROL_PATH_DIR"] + "2"}
    done = omni_cli(env, "serve", str(config))
    assert done.returncode != 0
    address = running.site.host("p2").address
    assert f"p2 ({address}): cannot be reached" in done.stdout + done.stderr
    assert "Nothing was started" in done.stdout + done.stderr
    assert "wrong" not in done.stdout + done.stderr
    assert not (running.site.host("p1").folder / "root/.omni/other").exists()
    assert not (running.rendered.parents[1] / "other").exists()
