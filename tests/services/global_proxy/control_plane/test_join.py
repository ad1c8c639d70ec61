"""Who joins, who is refused, and what the registry then holds; over real sockets, with the real registry."""

import asyncio

import grpc
import pytest

from services.global_proxy.control_plane import control_plane_pb2 as pb
from services.global_proxy.control_plane.handshake import Handshake
from services.global_proxy.control_plane.join_service import MAX_STRANGERS
from services.global_proxy.membership.member import InstanceSpec
from tests.services.global_proxy.control_plane.planes import (
    KEY,
    NAME,
    OTHER_KEY,
    URL,
    EndedError,
    instance,
    plane,
    stream,
    until,
)


async def test_an_instance_joins_reports_and_leaves() -> None:
    async with plane() as proxy, stream(proxy.address) as agent:
        await agent.join(instance(kv_address="10.0.0.1:11000"))
        member = proxy.member()
        assert member is not None
        assert member.spec == InstanceSpec("prefill", URL, kv_address="10.0.0.1:11000")
        assert (member.state, member.source) == ("active", "joined")

        await agent.report(num_running=3, num_waiting=2, kv_used_tokens=700, kv_total_tokens=900)
        await until(lambda: proxy.table.report(member.slot) is not None)
        report = proxy.table.report(member.slot)
        assert report is not None
        assert (report.num_running, report.num_waiting, report.kv_used_tokens, report.kv_total_tokens) == (
            3,
            2,
            700,
            900,
        )

        await agent.seal(pb.InstanceMessage(leave=pb.Leave()))
        with pytest.raises(EndedError) as ended:
            await agent.hear()
        assert ended.value.code is grpc.StatusCode.OK
        assert not proxy.is_there()
        assert proxy.server.num_joined == 0
        assert not proxy.refused


async def _refusal(address: str, *said: pb.FromInstance, half_close: bool = False) -> EndedError:
    """What the proxy says at last to an instance that says this, after its challenge has been heard."""
    async with stream(address) as agent:
        for message in said:
            await agent.call.write(message.SerializeToString())
        if half_close:
            await agent.call.done_writing()
        return await agent.until_ended()


async def test_a_wrong_key_learns_nothing() -> None:
    async with plane() as proxy:
        async with stream(proxy.address) as agent:
            with pytest.raises(EndedError) as ended:
                await agent.join(instance(role="nonsense"), OTHER_KEY)
        assert (ended.value.code, ended.value.details) == (
            grpc.StatusCode.UNAUTHENTICATED,
            "the deployment key was not proven",
        )
        assert not proxy.registry.members()
        assert proxy.refused == {"not_genuine": 1}


@pytest.mark.parametrize(
    "said",
    [
        [pb.FromInstance()],
        [pb.FromInstance(hello=pb.Hello(nonce=b"short")), pb.FromInstance(joining=pb.Joining(instance=b"", mac=b""))],
        [pb.FromInstance(joining=pb.Joining(instance=instance().SerializeToString(), mac=b"m" * 32))] * 2,
        [pb.FromInstance(hello=pb.Hello(nonce=b"n" * 16)), pb.FromInstance(sealed=pb.Sealed(body=b"", mac=b""))],
    ],
    ids=["nothing", "a short nonce", "no hello", "no joining"],
)
async def test_what_is_no_handshake(said: list[pb.FromInstance]) -> None:
    async with plane() as proxy:
        ended = await _refusal(proxy.address, *said, half_close=True)
        assert (ended.code, ended.details) == (grpc.StatusCode.UNAUTHENTICATED, "the deployment key was not proven")
        assert not proxy.registry.members()
        assert proxy.refused == {"not_genuine": 1}


async def test_recorded_words_are_worth_nothing_on_another_stream() -> None:
    async with plane() as proxy:
        async with stream(proxy.address) as agent:
            genuine = await agent.join(instance())
        await until(lambda: proxy.server.num_joined)
        recorded = (
            pb.FromInstance(hello=pb.Hello(nonce=genuine.instance_nonce)),
            pb.FromInstance(joining=pb.Joining(instance=genuine.instance, mac=genuine.join_mac())),
        )
        ended = await _refusal(proxy.address, *recorded)
        assert ended.code is grpc.StatusCode.UNAUTHENTICATED
        # The proxy's own proof, sent back to it, is none of the instance's.
        async with stream(proxy.address) as mirror:
            handshake = Handshake(KEY, *await mirror.greet(), instance().SerializeToString())
            proof = handshake.welcome_mac(0.1)
            await mirror.say(joining=pb.Joining(instance=handshake.instance, mac=proof))
            with pytest.raises(EndedError, match="UNAUTHENTICATED"):
                await mirror.hear()
        assert proxy.refused == {"not_genuine": 2}


@pytest.mark.parametrize("forged", ["another instance", "a repeated message", "a message of the proxy's"])
async def test_each_message_must_be_genuine(forged: str) -> None:
    async with plane() as proxy, stream(proxy.address) as agent:
        handshake = await agent.join(instance())
        assert agent.session is not None
        leave = pb.InstanceMessage(leave=pb.Leave()).SerializeToString()
        report = pb.InstanceMessage(load=pb.LoadReport(num_running=1)).SerializeToString()
        if forged == "another instance":
            sealed = Handshake(OTHER_KEY, b"a" * 16, b"b" * 16, b"").session("instance").seal(leave)
        elif forged == "a repeated message":
            sealed = agent.session.seal(report)
            await agent.say(sealed=sealed)
        else:
            sealed = handshake.session("proxy").seal(leave)
        await agent.say(sealed=sealed)
        with pytest.raises(EndedError, match="UNAUTHENTICATED"):
            await agent.hear()
        assert proxy.is_there()  # only its own agent may take it away, or silence
        assert proxy.refused == {"not_genuine": 1}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"protocol": 2}, "protocol: this proxy speaks 1, the instance 2: run the same omni release"),
        ({"role": "both"}, "role: must be one of prefill, decode, mixed, got 'both'"),
        ({"url": "10.0.0.1:9000"}, "url: must be http://HOST:PORT"),
        ({"start_id": b""}, "start_id: must have 1 to 64 bytes, has 0"),
        ({"facts": {str(n): "" for n in range(33)}}, "facts: there are 33, more than 32"),
    ],
)
async def test_a_proven_instance_is_told_what_is_wrong(changes: dict[str, object], message: str) -> None:
    async with plane() as proxy, stream(proxy.address) as agent:
        with pytest.raises(EndedError) as ended:
            await agent.join(instance(**changes))
        assert ended.value.code is grpc.StatusCode.FAILED_PRECONDITION
        assert message in ended.value.details
        assert not proxy.registry.members()
        assert proxy.refused == {"refused": 1}


async def test_an_instance_that_differs_is_told_in_what() -> None:
    facts = {"model": "m", "vllm": "0.32.0", "rack": "1"}
    async with plane(facts={"model": "m"}) as proxy, stream(proxy.address) as first:
        await first.join(instance(facts=facts))
        for other, what in (
            ({"model": "m", "vllm": "0.31.0"}, f"vllm is '0.31.0' and '0.32.0' in {NAME}."),
            ({"model": "x", "vllm": "0.32.0"}, "model is 'x' and 'm' in this deployment."),
        ):
            async with stream(proxy.address) as agent:
                with pytest.raises(EndedError) as ended:
                    await agent.join(instance(url="http://10.0.0.2:9100", role="decode", facts=other))
            assert what in ended.value.details
        async with stream(proxy.address) as agent:
            await agent.join(instance(url="http://10.0.0.2:9100", role="decode", facts=facts | {"more": "is no harm"}))
        assert len(proxy.registry.members()) == 2


async def test_another_role_than_the_deployment_file_says() -> None:
    async with plane() as proxy, stream(proxy.address) as agent:
        proxy.registry.add(InstanceSpec("decode", URL), "file")
        with pytest.raises(EndedError, match="is a member already, as decode instance"):
            await agent.join(instance())


async def test_strangers_that_say_nothing_do_not_keep_members_from_reporting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.global_proxy.control_plane.join_service.HANDSHAKE_S", 0.5)
    async with plane() as proxy, stream(proxy.address) as member:
        await member.join(instance())
        strangers = [stream(proxy.address) for _ in range(MAX_STRANGERS + 1)]
        ends = await asyncio.gather(*(_silent_stranger(stranger) for stranger in strangers))
        assert ends.count(grpc.StatusCode.RESOURCE_EXHAUSTED) == 1
        assert ends.count(grpc.StatusCode.UNAUTHENTICATED) == MAX_STRANGERS
        await member.report(num_running=5)
        slot = proxy.registry.members()[0].slot
        await until(lambda: (report := proxy.table.report(slot)) is not None and report.num_running == 5)
        async with stream(proxy.address) as late:  # there is room again
            await late.join(instance(url="http://10.0.0.2:9000"))


async def _silent_stranger(opened: object) -> grpc.StatusCode:
    async with opened as stranger:  # type: ignore[attr-defined]
        await stranger.say(hello=pb.Hello(nonce=b"n" * 16))
        return (await stranger.until_ended()).code
