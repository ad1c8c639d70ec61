"""P's lease ends when D does not take the request. The stand-in P hands off a lease of a real control server."""

from collections.abc import Iterator

import pytest

from kv_transfer.control import ControlServer
from kv_transfer.lease import Lease, LeaseTable
from kv_transfer.protocol import PROTOCOL_VERSION, Fingerprint, HandOff, OmniHandOff, RankEndpoint, Welcome
from tests.services.global_proxy.conftest import Deploy, Deployment, until


class Prefill:
    """What of a real P matters here: a lease table behind a control port."""

    def __init__(self) -> None:
        self.leases = LeaseTable(lease_s=60, tp_size=1, on_change=lambda: None)
        fingerprint = Fingerprint(
            vllm_version="0", model="m", kv_cache_dtype="float32", block_size=16, tp_size=1, layout="x"
        )
        self.control = ControlServer(
            "127.0.0.1", Welcome((RankEndpoint("127.0.0.1", 1, "run"),)), fingerprint, self.leases
        )

    def grant(self) -> tuple[Lease, dict[str, object]]:
        lease = self.leases.grant([1, 2], num_readers=1)
        ours = OmniHandOff(version=PROTOCOL_VERSION, lease_id=lease.lease_id, prompt_digest="0" * 32)
        hand_off = HandOff(
            do_remote_prefill=True,
            do_remote_decode=False,
            remote_engine_id="p",
            remote_request_id="r",
            remote_host="127.0.0.1",
            remote_port=self.control.port,
            remote_block_ids=((1, 2),),
            remote_num_tokens=20,
            tp_size=1,
            omni=ours,
        )
        return lease, hand_off.as_params()


@pytest.fixture
def prefill() -> Iterator[Prefill]:
    prefill = Prefill()
    yield prefill
    prefill.control.close()


async def test_a_request_that_decode_refuses(pd: Deployment, prefill: Prefill) -> None:
    _, pd.prefill[0].params = prefill.grant()
    pd.decode[0].error = (400, "{}")
    assert (await pd.complete())[0] == 400
    await until(lambda: len(prefill.leases) == 0)
    assert prefill.leases.take_counts().released == 1


async def test_a_decode_that_cannot_be_reached(deploy: Deploy, refused_url: str, prefill: Prefill) -> None:
    pd = await deploy(1, 0, extra_decode_urls=(refused_url,))
    _, pd.prefill[0].params = prefill.grant()
    assert (await pd.complete())[0] in (502, 503)
    await until(lambda: len(prefill.leases) == 0)


async def test_an_answered_request_is_left_to_decode(pd: Deployment, prefill: Prefill) -> None:
    _, pd.prefill[0].params = prefill.grant()
    assert (await pd.complete())[0] == 200
    await pd.idle()
    assert len(prefill.leases) == 1


async def test_a_prefill_whose_control_port_is_gone_costs_nothing_but_a_warning(
    pd: Deployment, prefill: Prefill, caplog: pytest.LogCaptureFixture
) -> None:
    _, pd.prefill[0].params = prefill.grant()
    prefill.control.close()
    pd.decode[0].error = (400, "{}")
    assert (await pd.complete())[0] == 400
    await until(lambda: "could not release" in caplog.text)
