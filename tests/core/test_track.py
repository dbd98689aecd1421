"""Property: progress costs nothing where nobody watches."""

import threading

from polybit.core.runtime import progress, seconds_left, track


def test_no_thread_stays_behind():
    before = threading.active_count()
    for _ in range(20):
        assert list(track(range(3), "steps")) == [0, 1, 2]
    assert threading.active_count() == before


def bar_of(monkeypatch, clock):
    """A progress bar on a terminal that is not there, and the text of its ETA."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setattr("rich.console.Console.is_terminal", True)
    shown = []
    monkeypatch.setattr("rich.progress.Progress.update", lambda bar, task, *, eta: shown.append(eta), raising=True)
    return progress("blocks", 10, clock=clock), shown


def test_there_is_an_eta_from_the_first_part_of_a_step(monkeypatch):
    now = [0.0]
    bar, shown = bar_of(monkeypatch, lambda: now[0])
    with bar as step:
        now[0] = 30.0
        step(0.1)  # a tenth of the first of ten blocks in half a minute: 9.9 blocks of 300 s are left
        assert shown[-1] == "0:49:30"
        now[0] = 300.0
        step(0.9)
        assert shown[-1] == "0:45:00"
        now[0] = 303.0
        step(5, found=True)  # an earlier run's: they say nothing of the speed
        assert shown[-1] == "0:20:12"
        now[0] = 600.0
        step(1)
        assert shown[-1] == "0:15:00"


def test_nothing_is_said_before_anything_is_known():
    assert seconds_left(10.0, 0.0, 5.0) is None and seconds_left(10.0, 2.0, 4.0) == 20.0


def test_without_a_terminal_a_line_now_and_then(capsys):
    now = [0.0]
    with progress("questions", 100, clock=lambda: now[0]) as step:
        for now[0] in (10.0, 40.0, 60.0, 80.0, 90.0):
            step(20)
    assert capsys.readouterr().err.splitlines() == [
        "polybit: questions: 40 of 100, 0:01:00 left",
        "polybit: questions: 80 of 100, 0:00:20 left",
    ]
