"""Real engines, tiny model: 1P1D, 2P1D and 2P2D over the same engines, and the proofs that they are disaggregated."""

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.error import HTTPError

import pytest

from omni.deployment.embedded_model import ensure_embedded_model
from tests.e2e.deployments import Deployment, Server, deployed, eventually, proxy_over
from tests.e2e.equality import CHAT, COMPLETIONS, AnswersLikePlainVllm, chat, choices, completion
from tests.e2e.prompts import BLOCK_SIZE, prompts

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory, free_ports: Callable[[int], int]) -> Iterator[Deployment]:
    folder = tmp_path_factory.mktemp("tiny")
    with deployed(folder, free_ports, model="embedded:tiny", prefill_groups=2, decode_groups=2) as running:
        yield running


@pytest.fixture(scope="module")
def plain(plain_tiny: Server) -> Server:
    return plain_tiny


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return prompts(lambda text: len(text.encode()))  # each byte is a token


@pytest.fixture(scope="module")
def one_p_one_d(
    deployment: Deployment, tmp_path_factory: pytest.TempPathFactory, free_ports: Callable[[int], int]
) -> Iterator[Server]:
    folder: Path = tmp_path_factory.mktemp("1p1d")
    with proxy_over(folder, free_ports, deployment.prefill[:1], deployment.decode[:1]) as proxy:
        yield proxy


@pytest.fixture(scope="module")
def two_p_one_d(
    deployment: Deployment, tmp_path_factory: pytest.TempPathFactory, free_ports: Callable[[int], int]
) -> Iterator[Server]:
    folder: Path = tmp_path_factory.mktemp("2p1d")
    with proxy_over(folder, free_ports, deployment.prefill, deployment.decode[:1]) as proxy:
        yield proxy


class TestOnePrefillOneDecode(AnswersLikePlainVllm):
    @pytest.fixture
    def served(self, one_p_one_d: Server) -> Server:
        return one_p_one_d


class TestTwoPrefillOneDecode(AnswersLikePlainVllm):
    @pytest.fixture
    def served(self, two_p_one_d: Server) -> Server:
        return two_p_one_d


class TestTwoPrefillTwoDecode(AnswersLikePlainVllm):
    @pytest.fixture
    def served(self, deployment: Deployment) -> Server:
        return deployment.proxy

    def test_many_at_once(self, served: Server, plain: Server, texts: list[str]) -> None:
        expected = [choices(plain.post(COMPLETIONS, completion(text))) for text in texts]
        with ThreadPoolExecutor(10) as pool:
            answers = list(pool.map(lambda text: served.post(COMPLETIONS, completion(text)), texts * 2))
        assert [choices(answer) for answer in answers] == expected * 2


class TestDecodeAlone:
    """D computes a prompt itself, in pieces while it has other requests."""

    def test_a_seeded_prompt_in_pieces_is_answered_as_in_one(self, deployment: Deployment) -> None:
        """vLLM on a CPU would die of it."""
        decode = deployment.decode[0]
        body = completion(list(range(60, 160)), seed=7, temperature=1.0, max_tokens=12, cache_salt="in one")
        alone = choices(decode.post(COMPLETIONS, body))
        with ThreadPoolExecutor(4) as pool:
            pieces = list(pool.map(lambda salt: decode.post(COMPLETIONS, body | {"cache_salt": f"{salt}"}), range(4)))
        assert [choices(answer) for answer in pieces] == [alone] * 4


def test_the_proxy_knows_how_much_kv_there_is(deployment: Deployment) -> None:
    """By default the engines of the file join it and report, and nobody is there twice."""

    def is_told() -> bool:
        instances = json.loads(deployment.cli("scale", "list", "--json").stdout)
        assert {instance["source"] for instance in instances} == {"file"}
        assert len(instances) == len(deployment.prefill) + len(deployment.decode)
        return all((instance["report"] or {}).get("kv_total_tokens", 0) > 0 for instance in instances)

    assert eventually(is_told, 10)
    assert deployment.proxy.metric("omni_proxy_kv_tokens", role="decode", part="total") > 0


class TestDisaggregation:
    """The prompt is computed on P alone, its KV arrives on D as it was, and P is as empty as before."""

    def test_decode_computes_one_prompt_token_and_loads_the_rest(
        self, deployment: Deployment, one_p_one_d: Server
    ) -> None:
        decode = deployment.decode[0]
        prompt_lengths = (1, 2, BLOCK_SIZE, BLOCK_SIZE + 1, 3 * BLOCK_SIZE - 5)
        before = _decode_counts(decode)
        bytes_per_block = _bytes_per_block(deployment)
        for number, length in enumerate(prompt_lengths):
            one_p_one_d.post(COMPLETIONS, completion(_fresh_text(length, number)))
        assert eventually(lambda: _decode_counts(decode)["loads"] - before["loads"] == len(prompt_lengths) - 1, 5)
        counts = {name: value - before[name] for name, value in _decode_counts(decode).items()}
        # D needs the KV of all tokens but the last: that one it computes itself, to sample the next.
        num_blocks = sum(-(-(length - 1) // BLOCK_SIZE) for length in prompt_lengths)
        assert counts["computed"] == len(prompt_lengths)
        assert counts["received"] == sum(prompt_lengths) - len(prompt_lengths)
        assert counts["bytes"] == num_blocks * bytes_per_block

    def test_the_kv_blocks_on_decode_are_those_on_prefill(self, deployment: Deployment, one_p_one_d: Server) -> None:
        num_full_blocks = 5
        one_p_one_d.post(COMPLETIONS, completion(_fresh_text(num_full_blocks * BLOCK_SIZE + 17, 100)))
        prefill, decode = (_block_digests(server) for server in (deployment.prefill[0], deployment.decode[0]))
        blank = max(set(decode), key=decode.count)
        for digests in (prefill, decode):
            assert digests.count(blank) > 10, "most blocks were never used"
        # Blocks are handed out in order here, so the newest prompt's run of blocks stands in both memories alike.
        common = [digest for digest in prefill if digest != blank and digest in set(decode)]
        newest = [digest for digest in prefill if digest != blank][-num_full_blocks - 1 :][:num_full_blocks]
        assert all(digest in common for digest in newest)

    def test_prefill_is_empty_again_within_two_seconds(self, deployment: Deployment, one_p_one_d: Server) -> None:
        for number in range(3):
            one_p_one_d.post(COMPLETIONS, completion(_fresh_text(900, 200 + number)))
        assert eventually(deployment.prefill_is_idle, 2)

    def test_an_idle_deployment_uses_no_cpu(self, deployment: Deployment) -> None:
        import time

        import psutil

        assert eventually(deployment.prefill_is_idle, 35)
        launcher = psutil.Process(deployment.status()["deployment"]["launcher_pid"])
        processes = [launcher, *launcher.children(recursive=True)]
        before = {process.pid: sum(process.cpu_times()[:2]) for process in processes}
        time.sleep(3)
        used_s = {p.pid: sum(p.cpu_times()[:2]) - before[p.pid] for p in processes}
        assert max(used_s.values()) < 0.5, {
            psutil.Process(pid).cmdline()[-1:]: s for pid, s in used_s.items() if s > 0.1
        }


class TestClientErrors:
    """What a client gets wrong is answered as vLLM answers it, and changes nothing."""

    @pytest.mark.parametrize(
        "change",
        [
            {"max_tokens": -1},
            {"temperature": "hot"},
            {"model": "another-model"},
            {"prompt": "x" * 5000},
            {"n": 0},
            {"logprobs": 1_000},
        ],
        ids=lambda change: ",".join(change),
    )
    def test_status_and_body_are_the_engines(
        self, deployment: Deployment, one_p_one_d: Server, plain: Server, change: dict[str, object]
    ) -> None:
        answers = []
        for server in (one_p_one_d, plain):
            with pytest.raises(HTTPError) as raised:
                server.post(COMPLETIONS, {**completion("Hello"), **change})
            answers.append((raised.value.code, json.load(raised.value)))
            raised.value.close()
        assert answers[0] == answers[1]
        assert eventually(deployment.prefill_is_idle, 2)

    @pytest.mark.parametrize(
        "params",
        [
            {"do_remote_prefill": True},
            {"do_remote_prefill": True, "remote_block_ids": [[1, 2, 3]], "remote_host": "127.0.0.1"},
            {"do_remote_prefill": True, "remote_engine_id": 3, "omni": {"version": 1}},
            {"do_remote_decode": "yes"},
            {"do_remote_decode": True, "omni": {"num_readers": -1}},
            {"do_remote_decode": True, "do_remote_prefill": True},
        ],
    )
    def test_forged_hand_offs_are_refused(
        self, deployment: Deployment, plain: Server, params: dict[str, object]
    ) -> None:
        expected = choices(plain.post(COMPLETIONS, completion("Forged?")))
        for engine in (deployment.prefill[0], deployment.decode[0]):
            with pytest.raises(HTTPError) as raised:
                engine.post(COMPLETIONS, {**completion("Forged?"), "kv_transfer_params": params})
            assert raised.value.code == 400
            assert "kv_transfer_params" in json.load(raised.value)["error"]["message"]
            raised.value.close()
            assert choices(engine.post(COMPLETIONS, completion("Forged?"))) == expected

    def test_a_hand_off_for_another_prompt_is_not_used(self, deployment: Deployment, plain: Server) -> None:
        prefilled = deployment.prefill[0].post(
            COMPLETIONS, {**completion("A" * 300), "max_tokens": 1, "kv_transfer_params": {"do_remote_decode": True}}
        )
        stolen = {**completion("B" * 300), "kv_transfer_params": prefilled["kv_transfer_params"]}
        answer = deployment.decode[0].post(COMPLETIONS, stolen)
        assert choices(answer) == choices(plain.post(COMPLETIONS, completion("B" * 300)))


class TestCommandLine:
    def test_status_shows_every_process_ready(self, deployment: Deployment) -> None:
        status = deployment.cli("status", "--json", "--no-completion")
        assert status.returncode == 0
        states = {p["name"]: p["state"] for p in json.loads(status.stdout)["processes"]}
        assert states == dict.fromkeys(
            ["prefill.group1.rank0", "prefill.group2.rank0", "decode.group1.rank0", "decode.group2.rank0", "proxy"],
            "ready",
        )

    def test_a_second_start_is_refused(self, deployment: Deployment) -> None:
        again = deployment.cli("serve", str(deployment.log_folder.parent / "deployment.yaml"))
        assert again.returncode == 2
        assert "running already" in again.stderr or "taken" in again.stderr

    def test_logs_of_one_process(self, deployment: Deployment) -> None:
        logs = deployment.cli("logs", "decode.group2.rank0", "-n", "500")
        assert logs.returncode == 0
        assert "Application startup complete" in logs.stdout

    def test_chat_through_the_openai_client(self, deployment: Deployment) -> None:
        import openai

        with openai.OpenAI(base_url=f"{deployment.proxy.url}/v1", api_key="none") as client:
            assert [model.id for model in client.models.list()] == ["test-model"]
            body = chat("Hello")
            stream = client.chat.completions.create(
                model="test-model", messages=body["messages"], max_tokens=8, temperature=0, stream=True
            )
            streamed = "".join(event.choices[0].delta.content or "" for event in stream)
        whole = deployment.proxy.post(CHAT, {**body, "max_tokens": 8})
        assert streamed == whole["choices"][0]["message"]["content"]


def _fresh_text(length: int, number: int) -> str:
    """So many tokens (bytes), beginning like no other prompt, so that no prefix cache has them."""
    return (
        f"{number:04d}".ljust(length, "abcdefghij"[number % 10])[:length] if length > 4 else chr(65 + number) * length
    )


def _decode_counts(decode: Server) -> dict[str, float]:
    by_source = "vllm:prompt_tokens_by_source_total"
    return {
        "computed": decode.metric(by_source, source="local_compute"),
        "received": decode.metric(by_source, source="external_kv_transfer"),
        "bytes": decode.metric("vllm:omni_kv_loaded_bytes_total"),
        "loads": decode.metric("vllm:omni_kv_load_seconds_count"),
    }


def _bytes_per_block(deployment: Deployment) -> int:
    """What the model's configuration says: K and V of every layer, float32."""
    config = json.loads((ensure_embedded_model("tiny") / "config.json").read_text())
    per_token = 2 * config["num_hidden_layers"] * config["num_key_value_heads"] * config["head_dim"] * 4
    return int(per_token * BLOCK_SIZE)


def _block_digests(server: Server) -> list[str]:
    digests: list[str] = server.post("/collective_rpc", {"method": "kv_block_digests"})["results"][0]
    return digests
