"""Property: progress costs nothing where nobody watches."""

import threading

from polybit.core.runtime import track


def test_no_thread_stays_behind():
    before = threading.active_count()
    for _ in range(20):
        assert list(track(range(3), "steps")) == [0, 1, 2]
    assert threading.active_count() == before
