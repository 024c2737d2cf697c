"""One thread has the turn at a time, unless it passes it on."""

import threading
import time

from explib.training import turns


def test_threads_with_a_turn_run_one_at_a_time_but_where_they_pass_it():
    inside, seen, beside = [], [], []

    def work():
        for _ in range(20):
            with turns.held():
                inside.append(1)
                time.sleep(0.0005)
                seen.append(len(inside))
                inside.pop()
                with turns.passed():
                    beside.append(1)
                    time.sleep(0.002)
                    seen_beside.append(len(beside))
                    beside.pop()

    seen_beside: list[int] = []
    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(seen) == {1} and max(seen_beside) > 1


def test_without_a_turn_there_is_none_to_pass():
    with turns.held():
        done = []

        def work():
            with turns.passed():
                done.append(1)

        thread = threading.Thread(target=work)
        thread.start()
        thread.join(5)
        assert done == [1]


def test_the_turn_comes_back_after_an_error():
    for error in (ValueError, KeyboardInterrupt):
        try:
            with turns.held(), turns.passed():
                raise error
        except error:
            pass
    with turns.held():
        pass
