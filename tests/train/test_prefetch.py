"""Batches are read ahead, and checkpoints have the position of the batches that were used."""

import threading
import time

import grain
import pytest

from train.prefetch import DEPTH, Prefetch


def numbers(failing: int | None = None) -> grain.DatasetIterator:
    def check(number: int) -> int:
        if number == failing:
            raise OSError("cannot be read")
        return number

    options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    return iter(grain.MapDataset.range(100).map(check).to_iter_dataset(options))


def wait_until(condition) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


def test_position_is_that_of_the_returned_batches():
    placed = []

    def place(number):
        placed.append(number)
        return -number

    with Prefetch(numbers(), place) as ahead:
        assert [next(ahead) for _ in range(3)] == [0, -1, -2]
        wait_until(lambda: len(placed) >= 3 + DEPTH)
        again = numbers()
        again.set_state(ahead.get_state())
    assert next(again) == 3
    # The queue is full, and the thread holds one more.
    assert len(placed) <= 3 + DEPTH + 1


def test_first_position_is_that_of_the_iterator():
    batches = numbers()
    batches.set_state({"next_index": 7})
    with Prefetch(batches, lambda number: number) as ahead:
        wait_until(lambda: ahead._ready.full())
        again = numbers()
        again.set_state(ahead.get_state())
        assert next(again) == next(ahead) == 7


def test_errors_of_the_thread_are_raised_after_the_batches_before():
    with Prefetch(numbers(failing=2), lambda number: number) as ahead:
        assert [next(ahead), next(ahead)] == [0, 1]
        with pytest.raises(OSError, match="cannot be read"):
            next(ahead)


def test_thread_ends_with_the_context():
    with Prefetch(numbers(), lambda number: number) as ahead:
        wait_until(lambda: ahead._ready.full())
    assert "prefetch" not in [thread.name for thread in threading.enumerate()]


def test_waiting_is_measured_since_the_last_row():
    def slow(number):
        time.sleep(0.05)
        return number

    with Prefetch(numbers(), slow) as ahead:
        for _ in range(4):
            next(ahead)
        assert ahead.take_waited() >= 0.1
        wait_until(lambda: ahead._ready.full())
        next(ahead)
        assert ahead.take_waited() < 0.05
