"""Waiting for messages of vLLM's queue, in a process of its own that imports vLLM."""

import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[4]
TIMEOUT_S = 120

# For each of two waits: the message, the seconds it took to come, and the seconds of CPU that went into it.
WAITS = """
import threading, time
from omni.adaptors.vllm import queue_waits
from vllm.distributed.device_communicators import shm_broadcast
queue_waits.sleep_at_once()
writer = shm_broadcast.MessageQueue(1, 1, max_chunk_bytes=1024, max_chunks=2)
reader = shm_broadcast.MessageQueue.create_from_handle(writer.export_handle(), 0)
ready = threading.Thread(target=writer.wait_until_ready)
ready.start()
reader.wait_until_ready()
ready.join()
writer.enqueue("first")
assert reader.dequeue() == "first"
def wait(message):
    threading.Timer(0.6, writer.enqueue, [message]).start()
    cpu_s, began_s = time.process_time(), time.monotonic()
    print(reader.dequeue(), time.monotonic() - began_s, time.process_time() - cpu_s)
wait("second")
writer._spin_condition.notify = lambda: None
wait("unnotified")
del shm_broadcast.SpinCondition
try:
    queue_waits.sleep_at_once()
except RuntimeError as error:
    print(error)
"""


@pytest.fixture(scope="module")
def lines() -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", WAITS], cwd=REPOSITORY, capture_output=True, text=True, check=False, timeout=TIMEOUT_S
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_a_reader_that_waits_sleeps(lines: list[str]) -> None:
    """vLLM's own takes all of a core."""
    message, took_s, cpu_s = lines[0].split()
    assert message == "second"
    assert float(cpu_s) < float(took_s) / 2


def test_a_lost_notification_is_not_waited_for(lines: list[str]) -> None:
    """vLLM's own readers, when they sleep, look again after 5 s."""
    message, took_s, _ = lines[1].split()
    assert message == "unnotified"
    assert float(took_s) < 3


def test_a_release_that_waits_in_another_way_is_refused(lines: list[str]) -> None:
    assert "SpinCondition is not what it was" in lines[2]
