"""Waiting for a message of vLLM's queue, in a process of its own that imports vLLM."""

import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[4]
TIMEOUT_S = 120

WAITS = """
import threading, time
from omni.adaptors.vllm import queue_naps
from vllm.distributed.device_communicators.shm_broadcast import MessageQueue
queue_naps.take_naps()
writer = MessageQueue(1, 1, max_chunk_bytes=1024, max_chunks=2)
reader = MessageQueue.create_from_handle(writer.export_handle(), 0)
ready = threading.Thread(target=writer.wait_until_ready)
ready.start()
reader.wait_until_ready()
ready.join()
writer.enqueue("first")
assert reader.dequeue() == "first"
threading.Timer(0.6, writer.enqueue, ["second"]).start()
before_s, began_s = time.process_time(), time.monotonic()
print(reader.dequeue(), (time.process_time() - before_s) / (time.monotonic() - began_s))
"""
ANOTHER_RELEASE = """
from omni.adaptors.vllm import queue_naps
from vllm.distributed.device_communicators import shm_broadcast
del shm_broadcast.sched_yield
try:
    queue_naps.take_naps()
except RuntimeError as error:
    print(error)
"""


def run_python(program: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, check=False, timeout=TIMEOUT_S
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_reader_that_waits_sleeps() -> None:
    """vLLM's own wait takes all of a core."""
    message, share_of_a_core = run_python(WAITS).split()
    assert message == "second"
    assert float(share_of_a_core) < 0.5


def test_a_release_that_waits_in_another_way_is_refused() -> None:
    assert "sched_yield is gone" in run_python(ANOTHER_RELEASE)
