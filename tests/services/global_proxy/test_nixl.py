"""vLLM's NixlConnector: what P and D are sent, and which requests D serves alone."""

from typing import Any

import pytest

from tests.services.global_proxy.conftest import Deploy, Deployment

# As vLLM 0.32's NixlConnector answers.
PARAMS: dict[str, Any] = {
    "do_remote_prefill": True,
    "do_remote_decode": False,
    "remote_block_ids": [[1, 2]],
    "remote_engine_id": "68479d6a",
    "remote_request_id": "cmpl-97459fc3f2d1f166-0-8306c86e",
    "remote_host": "127.0.0.1",
    "remote_port": 5600,
    "tp_size": 1,
    "dcp_size": 1,
    "pp_size": 1,
    "remote_num_tokens": 156,
    "remote_blocks_expiry_time": None,
    "transfer_mode": "pull",
}


@pytest.fixture
async def pd(deploy: Deploy) -> Deployment:
    pd = await deploy(connector="nixl")
    pd.prefill[0].params = PARAMS
    return pd


@pytest.mark.parametrize("stream", [False, True])
async def test_prefill_keeps_the_blocks_and_decode_is_told_where(pd: Deployment, stream: bool) -> None:
    status, _, headers = await (pd.stream() if stream else pd.complete())
    assert status == 200
    assert headers["x-omni-path"] == "disaggregated"
    (to_prefill,), (to_decode,) = pd.prefill[0].received, pd.decode[0].received
    assert to_prefill.body["kv_transfer_params"] == {
        "do_remote_decode": True,
        "do_remote_prefill": False,
        "remote_engine_id": None,
        "remote_block_ids": None,
        "remote_host": None,
        "remote_port": None,
    }
    assert to_decode.body["kv_transfer_params"] == PARAMS


async def test_several_choices_go_to_decode_alone(pd: Deployment) -> None:
    """P gives the blocks back when the first sequence has read them, whatever the second still reads."""
    status, body, headers = await pd.complete(n=2)
    assert status == 200
    assert len(body["choices"]) == 2
    assert headers["x-omni-path"] == "decode_only"
    assert pd.prefill[0].received == []
    assert "kv_transfer_params" not in pd.decode[0].received[0].body
    assert await pd.metric("omni_proxy_decode_only_total", reason="several_choices") == 1


async def test_a_request_that_decode_refuses_is_left_to_the_engines(pd: Deployment) -> None:
    pd.decode[0].error = (400, "{}")
    assert (await pd.complete())[0] == 400
    await pd.idle()
