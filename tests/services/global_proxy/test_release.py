"""P's lease ends when D does not take the request. The stand-in P hands off a lease of a real control server."""

import pytest

from kv_transfer.auth import DeploymentKey
from tests.services.global_proxy.conftest import Deploy, Deployment, until
from tests.standins.lease_holder import LeaseHolder


async def test_a_request_that_decode_refuses(pd: Deployment, lease_holder: LeaseHolder) -> None:
    pd.prefill[0].params = lease_holder.grant()
    pd.decode[0].error = (400, "{}")
    assert (await pd.complete())[0] == 400
    await until(lambda: len(lease_holder.leases) == 0)
    assert lease_holder.leases.take_counts().released == 1


async def test_a_decode_that_cannot_be_reached(deploy: Deploy, refused_url: str, lease_holder: LeaseHolder) -> None:
    pd = await deploy(1, 0, extra_decode_urls=(refused_url,))
    pd.prefill[0].params = lease_holder.grant()
    assert (await pd.complete())[0] in (502, 503)
    await until(lambda: len(lease_holder.leases) == 0)


async def test_an_answered_request_is_left_to_decode(pd: Deployment, lease_holder: LeaseHolder) -> None:
    pd.prefill[0].params = lease_holder.grant()
    assert (await pd.complete())[0] == 200
    await pd.idle()
    assert len(lease_holder.leases) == 1


async def test_parameters_that_another_deployment_signed_end_nothing(pd: Deployment, lease_holder: LeaseHolder) -> None:
    """They may name any host and port: the proxy asks only those that hold its key."""
    pd.decode[0].error = (400, "{}")
    for key in (DeploymentKey(b"x" * 32), None):
        pd.prefill[0].params = lease_holder.grant(key)
        assert (await pd.complete())[0] == 400
    await until(
        lambda: len(lease_holder.leases) == 1
    )  # the second request's lease has ended, so the first was looked at


async def test_a_prefill_whose_control_port_is_gone_costs_nothing_but_a_warning(
    pd: Deployment, lease_holder: LeaseHolder, caplog: pytest.LogCaptureFixture
) -> None:
    pd.prefill[0].params = lease_holder.grant()
    lease_holder.close()
    pd.decode[0].error = (400, "{}")
    assert (await pd.complete())[0] == 400
    await until(lambda: "could not release" in caplog.text)
