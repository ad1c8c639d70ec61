"""Engine objects that were never started: only their queues are needed."""

import gc
import queue
import threading
from typing import Any

import pytest

from kv_transfer.connector.wake_up import find_wake_up
from tests.kv_transfer.with_vllm import engine_core


def new_engine() -> Any:
    engine = engine_core.EngineCoreProc.__new__(engine_core.EngineCoreProc)
    engine.input_queue = queue.Queue()
    return engine


def test_the_engine_of_this_process_is_found_and_told_to_look_again() -> None:
    engine = new_engine()
    wake_up = find_wake_up()
    wake_up()
    wake_up()
    assert engine.input_queue.qsize() == 2
    assert engine.input_queue.get_nowait() == (engine_core.EngineCoreRequestType.WAKEUP, None)
    del engine, wake_up


def test_a_sleeping_engine_is_woken_by_another_thread() -> None:
    engine = new_engine()
    wake_up = find_wake_up()
    waking = threading.Timer(0.01, wake_up)
    waking.start()
    assert engine.input_queue.get(timeout=5)[0] is engine_core.EngineCoreRequestType.WAKEUP
    waking.join()
    del engine, wake_up, waking


def test_without_an_engine_nothing_happens_but_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    gc.collect()  # those of other tests
    find_wake_up()()
    assert "no EngineCore in this process" in caplog.text


def test_objects_that_run_code_when_asked_for_their_class_are_left_in_peace() -> None:
    class Touchy:
        @property  # type: ignore[misc]
        def __class__(self) -> Any:
            raise AssertionError("touched")

    touchy, engine = Touchy(), new_engine()
    assert any(o is touchy for o in gc.get_objects()), "the test proves nothing"
    find_wake_up()()
    assert engine.input_queue.qsize() == 1
    del engine
