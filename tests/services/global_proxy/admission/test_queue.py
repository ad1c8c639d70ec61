"""Who goes in, who waits, who is refused; nobody leaves a trace."""

import asyncio
import gc
from dataclasses import dataclass

import pytest

from services.global_proxy.admission.errors import OverloadedError, QueueTimeoutError
from services.global_proxy.admission.kv_budget import KvBudget
from services.global_proxy.admission.queue import AdmissionQueue, Elsewhere, QueueSettings
from tests.services.global_proxy.admission.clock import now_s, run


@dataclass
class Ask:
    num_tokens: int = 10
    max_new_tokens: int = 9


ASK = Ask()  # needs 20 tokens


def make(
    limit: int = 1,
    capacity_tokens: int | None = None,
    elsewhere: Elsewhere | None = None,
    max_waiting: int = 1024,
) -> AdmissionQueue:
    settings = QueueSettings(max_waiting=max_waiting, max_wait_s=30)
    return AdmissionQueue(limit, KvBudget(capacity_tokens), settings, elsewhere, now_s)


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def num_timers() -> int:
    return sum(not timer.cancelled() for timer in asyncio.get_running_loop()._scheduled)  # type: ignore[attr-defined]


def is_as_new(queue: AdmissionQueue) -> bool:
    return num_timers() == 0 and (
        queue.num_in_flight,
        queue.num_waiting,
        queue.kv.reserved_tokens,
        queue.kv.in_transit_tokens,
    ) == (
        0,
        0,
        0,
        0,
    )


def test_order_is_by_priority_then_by_arrival() -> None:
    async def main() -> None:
        queue = make()
        order: list[str] = []

        async def ask(name: str, priority: int) -> None:
            reserved = await queue.enter(ASK, priority)
            order.append(name)
            queue.leave(reserved, has_arrived=False)

        reserved = queue.try_enter(ASK)
        assert reserved == 20
        asks = [asyncio.create_task(ask(*a)) for a in (("b", 0), ("d", 5), ("a", -1), ("c", 0))]
        await settle()
        assert queue.num_waiting == 4
        assert order == []
        queue.leave(reserved, has_arrived=False)
        await asyncio.gather(*asks)
        assert order == ["a", "b", "c", "d"]
        assert is_as_new(queue)

    run(main())


def test_nobody_overtakes_those_who_wait() -> None:
    async def main() -> None:
        queue = make(limit=9, capacity_tokens=100)
        small = queue.try_enter(ASK)
        large = asyncio.create_task(queue.enter(Ask(900, 0)))
        await settle()
        assert queue.try_enter(ASK) == 0
        queue.leave(small, has_arrived=False)
        queue.leave(await large, has_arrived=False)
        assert is_as_new(queue)

    run(main())


def test_limits_are_on_requests_and_on_kv() -> None:
    async def main() -> None:
        assert [bool(make(limit=3).try_enter(ASK))] == [True]
        queue = make(limit=3)
        assert [bool(queue.try_enter(ASK)) for _ in range(4)] == [True, True, True, False]
        queue = make(limit=99, capacity_tokens=59)
        assert [bool(queue.try_enter(ASK)) for _ in range(3)] == [True, True, False]
        assert make(capacity_tokens=5).try_enter(ASK), "what is larger than the whole budget runs alone"
        assert make(capacity_tokens=5, elsewhere=lambda: (0, 0)).try_enter(ASK)
        assert not make(limit=2, capacity_tokens=5, elsewhere=lambda: (1, 20)).try_enter(ASK)

    run(main())


def test_the_reports_of_decode_count() -> None:
    async def main() -> None:
        queue = make(limit=99, capacity_tokens=100)
        first = queue.try_enter(ASK)
        queue.arrived(first)
        queue.kv.report(100, used_tokens=80)  # ours among them: nothing is on its way
        second = queue.try_enter(ASK)
        assert second
        assert queue.try_enter(ASK) == 0, "the second is on its way, and reported by nobody"
        queue.leave(second, has_arrived=False)
        queue.leave(first, has_arrived=True)
        assert is_as_new(queue)

    run(main())


def test_limits_change_while_requests_wait() -> None:
    async def main() -> None:
        queue = make(limit=1)
        queue.try_enter(ASK)
        waiting = [asyncio.create_task(queue.enter(ASK)) for _ in range(3)]
        await settle()
        queue.max_in_flight = 3
        queue.look()
        await settle()
        assert [task.done() for task in waiting] == [True, True, False]
        queue.max_in_flight = 1
        queue.leave(20, has_arrived=False)
        await settle()
        assert not waiting[2].done()
        waiting[2].cancel()

    run(main())


def test_full_queue_refuses_at_once() -> None:
    async def main() -> None:
        queue = make(max_waiting=1)
        queue.try_enter(ASK)
        task = asyncio.create_task(queue.enter(ASK))
        await settle()
        with pytest.raises(OverloadedError) as caught:
            await queue.enter(ASK, priority=-5)
        assert caught.value.status == 503
        assert caught.value.retry_after_s == 1
        assert now_s() == 0
        task.cancel()

    run(main())


def test_hopeless_wait_is_refused_at_once() -> None:
    async def main() -> None:
        queue = make(limit=2)
        queue.ended_well(service_s=8, num_new_tokens=None, max_new_tokens=1)
        queue.try_enter(ASK)
        queue.try_enter(ASK)
        waiting = [asyncio.create_task(queue.enter(ASK)) for _ in range(3)]  # each begins 4 s after the other
        await settle()
        with pytest.raises(OverloadedError) as caught:
            await queue.enter(ASK, deadline_s=now_s() + 15)
        assert caught.value.retry_after_s == 1
        first = asyncio.create_task(queue.enter(ASK, priority=-1, deadline_s=now_s() + 5))
        await settle()
        assert not first.done(), "who goes before the others waits for less"
        for task in (*waiting, first):
            task.cancel()

    run(main())


def test_deadline_and_longest_wait() -> None:
    async def main() -> None:
        queue = make()
        reserved = queue.try_enter(ASK)
        for deadline_s, until_s in ((7.0, 7.0), (1e9, 37.0)):
            with pytest.raises(QueueTimeoutError):
                await queue.enter(ASK, deadline_s=deadline_s)
            assert now_s() == until_s
        queue.leave(reserved, has_arrived=False)
        assert is_as_new(queue)

    run(main())


def test_who_times_out_makes_way() -> None:
    async def main() -> None:
        queue = make(limit=9, capacity_tokens=100)
        first = queue.try_enter(ASK)
        large = asyncio.create_task(queue.enter(Ask(90, 0), deadline_s=5.0))
        small = asyncio.create_task(queue.enter(ASK))
        await asyncio.wait([large])
        await settle()
        assert isinstance(large.exception(), QueueTimeoutError)
        queue.leave(await small, has_arrived=False)
        assert now_s() == 5.0
        queue.leave(first, has_arrived=False)
        assert is_as_new(queue)

    run(main())


@pytest.mark.parametrize("when", ["waiting", "let in", "about to be let in"])
def test_cancelled_waiter_leaves_no_trace(when: str) -> None:
    async def main() -> None:
        queue = make()
        reserved = queue.try_enter(ASK)
        gone = asyncio.create_task(queue.enter(ASK))
        stays = asyncio.create_task(queue.enter(ASK))
        await settle()
        if when == "let in":
            queue.leave(reserved, has_arrived=False)
            gone.cancel()
        else:
            gone.cancel()
            if when == "waiting":
                await settle()
                assert queue.num_waiting == 1
            queue.leave(reserved, has_arrived=False)
        queue.leave(await stays, has_arrived=False)
        assert gone.cancelled()
        assert is_as_new(queue)

    run(main())


def test_cancelled_at_the_moment_of_its_timeout(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        queue = make()
        reserved = queue.try_enter(ASK)
        task = asyncio.create_task(queue.enter(ASK))
        await settle()
        asyncio.get_running_loop().call_at(30.0 + 1e-10, task.cancel)  # later in the same turn of the loop
        await asyncio.sleep(31)
        assert task.done()
        queue.leave(reserved, has_arrived=False)
        assert is_as_new(queue)

    run(main())
    gc.collect()
    assert caplog.text == "", "asyncio complains of exceptions that nobody looked at"


def test_other_workers_make_room_without_saying_so() -> None:
    others = [(1, 20)]

    async def main() -> None:
        queue = make(limit=2, elsewhere=lambda: others[0])
        reserved = queue.try_enter(ASK)
        task = asyncio.create_task(queue.enter(ASK))
        await asyncio.sleep(1)
        assert not task.done()
        for _ in range(9):
            queue.look()
        assert num_timers() == 2, "one for the deadline, one to look again"
        others[0] = (0, 0)
        await asyncio.sleep(0.01)
        queue.leave(await task, has_arrived=False)
        queue.leave(reserved, has_arrived=False)
        await asyncio.sleep(0.01)
        assert queue._look_again is None, "with an empty queue nothing runs"
        others[0] = (1, 100)
        queue.kv.report(119, 0)
        assert queue.try_enter(ASK) == 0

    run(main())


def test_settings_name_what_is_wrong() -> None:
    with pytest.raises(ValueError, match="max_wait_s"):
        QueueSettings(max_wait_s=-1)
    with pytest.raises(ValueError, match="max_waiting"):
        QueueSettings(max_waiting=-1)
