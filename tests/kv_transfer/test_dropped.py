import logging
import threading

import pytest

from kv_transfer.dropped import DropCounter


def test_every_message_is_counted_and_few_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    dropped = DropCounter("some port")
    with caplog.at_level(logging.WARNING):
        for index in range(1000):
            dropped.count(ValueError(f"message {index}"))
    assert dropped.take() == 1000
    assert len(caplog.records) == 10
    assert "dropped a message on the some port, 512 so far: message 511" in caplog.text


def test_what_was_taken_is_not_taken_again(caplog: pytest.LogCaptureFixture) -> None:
    dropped = DropCounter("some port")
    assert dropped.take() == 0
    for _ in range(3):
        dropped.count(ValueError())
    assert dropped.take() == 3
    assert dropped.take() == 0
    dropped.count(ValueError())
    assert dropped.take() == 1
    assert len(caplog.records) == 3  # 1, 2, 4: of all that ever came


def test_from_many_threads() -> None:
    dropped, taken = DropCounter("some port"), []
    done = threading.Event()

    def count() -> None:
        for _ in range(2000):
            dropped.count(ValueError())

    def take() -> None:
        while not done.is_set():
            taken.append(dropped.take())

    counting = [threading.Thread(target=count) for _ in range(4)]
    taking = threading.Thread(target=take)
    for thread in (*counting, taking):
        thread.start()
    for thread in counting:
        thread.join(timeout=10)
    done.set()
    taking.join(timeout=10)
    assert sum(taken) + dropped.take() == 8000
