"""The choice of the moment that is kept, and the alarm."""

import math

from polybit.train.picker import Picker


def probed(flips, kl, name="w3"):
    return {name: {"flips": flips, "kl": kl}}


def test_the_best_by_flips_and_kl_is_kept():
    picker = Picker()
    assert picker.judge(0, probed(0.3, 0.5))
    assert picker.judge(10, probed(0.2, 0.3))
    assert not picker.judge(20, probed(0.25, 0.2999))
    assert picker.best["step"] == 10 and "step 10 is kept" in picker.reason()


def test_fewer_flips_bought_with_kl_are_below_the_start():
    """Hard labels sharpen: flips fall, KL grows. Such a moment is never kept."""
    picker = Picker()
    picker.judge(0, probed(0.3, 0.5))
    assert not picker.judge(10, probed(0.1, 0.8))
    assert picker.best["step"] == 0 and "the start is kept" in picker.reason()


def test_a_run_that_stays_below_its_start_is_stopped_and_says_why():
    picker = Picker(patience=2)
    picker.judge(0, probed(0.3, 0.5))
    picker.judge(10, probed(0.2, 0.4))
    picker.judge(20, probed(0.4, 0.4))
    assert picker.stopped is None
    picker.judge(30, probed(0.5, math.nan))
    assert "below the start for 2 probes" in picker.stopped and "lower learning rate" in picker.stopped
    assert picker.reason().endswith("step 10 is kept")


def test_a_start_a_hair_below_is_no_alarm():
    picker = Picker(patience=2)
    for step, kl in enumerate((0.5, 0.501, 0.502, 0.503)):
        picker.judge(step, probed(0.3, kl))
    assert picker.stopped is None and picker.best["step"] == 0
    assert picker.judge(4, probed(0.3, 0.4))


def test_every_width_is_guarded():
    picker = Picker()
    picker.judge(0, probed(0.3, 0.5) | probed(0.1, 0.02, "w4"))
    assert not picker.judge(10, probed(0.1, 0.1) | probed(0.11, 0.01, "w4"))
    assert picker.history[-1]["worse"].keys() == {"w4"}
    assert picker.judge(20, probed(0.2, 0.3) | probed(0.09, 0.01, "w4"))
    assert picker.stopped is None


def test_history_survives_and_what_came_later_is_forgotten(tmp_path):
    picker = Picker()
    for step in (0, 5, 10):
        picker.judge(step, probed(0.3 - step / 100, 0.5))
    picker.write(tmp_path)
    again = Picker()
    again.read(tmp_path, until=5)
    assert again.history == picker.history[:2]
    fresh = Picker()
    fresh.read(tmp_path / "nothing", until=5)
    assert fresh.history == []


def test_widths_that_are_not_trained_may_lose_what_is_allowed():
    picker = Picker(allowed={"w8": 0.005}, patience=2)
    picker.judge(0, probed(0.3, 0.5) | probed(0.001, 0.0002, "w8"))
    assert picker.judge(10, probed(0.2, 0.3) | probed(0.02, 0.005, "w8"))
    assert picker.history[-1]["score"] == (0.2 / 0.3 + 0.3 / 0.5) / 2  # they count nothing
    assert not picker.judge(20, probed(0.1, 0.2) | probed(0.02, 0.006, "w8"))
    assert picker.history[-1]["worse"].keys() == {"w8"} and picker.best["step"] == 10
    picker.judge(30, probed(0.4, 0.7) | probed(0.001, 0.0002, "w8"))
    picker.judge(40, probed(0.4, 0.7) | probed(0.001, 0.0002, "w8"))
    assert picker.stopped is not None  # every trained width is below its start


def test_a_nearly_exact_width_does_not_hold_back_one_with_more_to_gain():
    start = probed(0.04, 0.1) | probed(0.001, 0.002, "w4")
    strict, lenient = Picker(), Picker(exact=0.005)
    for picker in (strict, lenient):
        picker.judge(0, start)
    assert not strict.judge(10, probed(0.01, 0.02) | probed(0.002, 0.005, "w4"))
    assert lenient.judge(10, probed(0.01, 0.02) | probed(0.002, 0.005, "w4"))
    assert not lenient.judge(20, probed(0.001, 0.001) | probed(0.002, 0.008, "w4"))
    alone = Picker(exact=0.005)  # nobody has more to gain: the guard stays strict
    alone.judge(0, probed(0.001, 0.002, "w4"))
    assert not alone.judge(10, probed(0.001, 0.003, "w4"))


def test_a_run_that_falls_goes_back_and_is_not_stopped():
    picker = Picker(back=0.1, patience=1)
    picker.judge(0, probed(0.3, 0.5))
    assert not picker.goes_back
    picker.judge(5, probed(0.9, 2.5))
    assert picker.goes_back and picker.stopped is None
    assert picker.judge(10, probed(0.2, 0.4)) and not picker.goes_back
    picker.judge(15, probed(0.21, 0.41))
    assert not picker.goes_back  # a little worse than the best moment, and better than the start
    picker.judge(20, probed(0.2, math.nan))
    assert picker.goes_back and picker.best["step"] == 10
    assert picker.reason().endswith("after 2 returns to the best weights at a smaller rate")
