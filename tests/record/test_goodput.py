"""Goodput from events: categories add up and are not negative, whatever the file contains."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_runs import STARTED, attempt_events, healthy

from jaxcoder.record.events import read_events
from jaxcoder.record.goodput import CATEGORIES, RECORDED, account, over_time


def check_sound(goodput) -> None:
    assert set(goodput.seconds) == set(CATEGORIES)
    assert all(seconds >= 0 for seconds in goodput.seconds.values())
    assert sum(goodput.seconds.values()) == pytest.approx(goodput.wall, rel=1e-6, abs=1e-3)
    assert goodput.share is None or 0 <= goodput.share <= 1 + 1e-9
    for index, attempt in enumerate(goodput.attempts):
        assert all(seconds >= 0 for seconds in attempt.seconds.values()) and attempt.lost_steps >= 0
        assert sum(attempt.seconds.values()) == pytest.approx(attempt.duration, rel=1e-6, abs=1e-3)
        assert goodput.down_before(index) >= 0
    drawn = over_time(goodput, 17)
    assert all((values >= -1e-6 * max(goodput.wall, 1)).all() for values in drawn.values())
    for name in ("step", "lost", "save"):
        assert drawn[name].sum() == pytest.approx(goodput.seconds[name], rel=1e-6, abs=1e-3)


def test_a_run_without_a_failure():
    goodput = account(healthy().events)
    check_sound(goodput)
    assert goodput.seconds["step"] == pytest.approx(999 * 2 * 0.999)
    assert goodput.seconds["compile"] == 30 and goodput.seconds["lost"] == 0 and goodput.seconds["down"] == 0
    assert goodput.wall == pytest.approx(
        9 + 30 + 999 * 2 + 10 * 3.4 + 9
    )  # to the last event: the last save is complete
    assert goodput.attempts[0].reason == "finished" and not goodput.attempts[0].failed


def test_steps_that_a_later_start_repeats_are_lost():
    events = attempt_events("a", STARTED, 0, 250)  # dies at 250, is down for 100 seconds, continues after 200
    died = events[-1]["time"]
    events += attempt_events("b", died + 100, 200, 400, reason="finished")
    goodput = account(events)
    check_sound(goodput)
    assert [attempt.lost_steps for attempt in goodput.attempts] == [50, 0] and goodput.lost_steps == 50
    assert goodput.seconds["lost"] == pytest.approx(50 * 2 * 0.999)
    assert goodput.seconds["step"] == pytest.approx((199 + 199) * 2 * 0.999)
    assert goodput.seconds["down"] == pytest.approx(100)
    assert goodput.attempts[0].reason == "died" and goodput.attempts[0].failed
    assert goodput.share == pytest.approx(goodput.seconds["step"] / (goodput.attempts[1].last_seen - STARTED))


def test_a_restart_from_far_back_loses_steps_of_several_attempts():
    events = attempt_events("a", STARTED, 0, 100)
    events += attempt_events("b", STARTED + 1000, 100, 200)
    events += attempt_events("c", STARTED + 2000, 50, 60)
    goodput = account(events)
    check_sound(goodput)
    assert [attempt.lost_steps for attempt in goodput.attempts] == [50, 100, 0]
    assert goodput.attempts[1].seconds["step"] == 0 and goodput.attempts[2].reason == "open"


def test_an_attempt_that_was_never_ready_is_init():
    events = attempt_events("a", STARTED, 0, 0)[:1]
    events.append(
        {"time": STARTED + 50, "attempt": "a", "event": "end", "step": 0, "reason": "error", "message": "No."}
    )
    goodput = account(events)
    check_sound(goodput)
    assert goodput.seconds["init"] == 50 and goodput.attempts[0].ready is None
    assert goodput.attempts[0].message == "No." and goodput.attempts[0].failed


def test_a_process_that_outlives_its_attempt_does_not_take_time_twice():
    events = attempt_events("a", STARTED, 0, 100)
    began = events[-1]["time"] + 20
    events += attempt_events("b", began, 100, 200)
    events.append({"time": began + 30, "attempt": "a", "event": "end", "step": 100, "reason": "watchdog", "process": 3})
    goodput = account(events)
    check_sound(goodput)
    assert goodput.wall == pytest.approx(goodput.attempts[1].last_seen - STARTED)
    assert goodput.attempts[0].reason == "watchdog"


def test_clocks_that_run_backwards():
    events = attempt_events("a", STARTED, 0, 100) + attempt_events("b", STARTED - 86400, 100, 200)
    check_sound(goodput := account(events))
    assert goodput.seconds["step"] == pytest.approx(198 * 2 * 0.999)
    for event in events:
        event["time"] = STARTED
    check_sound(account(events))
    begin = attempt_events("a", 5.0, 0, 100)[0]  # the clock was set after the process had started
    rest = attempt_events("a", STARTED, 0, 100)[1:]
    assert account([begin | {"time": STARTED + 8}, *rest]).wall < 1000


def test_no_events(tmp_path):
    check_sound(account([]))
    assert account([]).share is None and not account([]).attempts
    assert read_events(tmp_path / "events.jsonl") == []


def test_torn_and_invalid_lines_are_left_out(tmp_path):
    path = tmp_path / "events.jsonl"
    good = attempt_events("a", STARTED, 0, 20, reason="finished")
    lines = [json.dumps(event) for event in good]
    invalid = ["", "nonsense", "[1]", "3", "{}", '{"time": "x"}', '{"time": 1e999, "attempt": "a", "event": "end"}']
    invalid += [
        json.dumps({"time": STARTED, "attempt": 7, "event": "end"}),
        '{"time": NaN, "attempt": "a", "event": "end"}',
    ]
    path.write_text("\n".join([*invalid, *lines, lines[-1][:20]]))
    assert read_events(path) == good
    path.write_bytes(b"\xff\xfe{" + b"[" * 100_000)
    assert read_events(path) == []


def test_unknown_events_extend_an_attempt():
    events = attempt_events("a", STARTED, 0, 20)
    later = {"time": events[-1]["time"] + 100, "attempt": "a", "event": "new", "step": 3}
    assert account([*events, later]).wall == pytest.approx(account(events).wall + 100, abs=10)


numbers = st.one_of(st.floats(), st.integers(-(10**6), 10**6), st.floats(0, 1e5), st.none(), st.text(max_size=2))
event = st.fixed_dictionaries(
    {
        "time": st.floats(0, 1e6) | st.floats(allow_nan=False, allow_infinity=False, min_value=-1e9, max_value=1e10),
        "attempt": st.sampled_from("abc"),
        "event": st.sampled_from(["begin", "ready", "spent", "saved", "end", "other"]),
    },
    optional={
        "process_started": numbers,
        "step": numbers,
        "seconds": st.dictionaries(st.sampled_from([*RECORDED, "new"]), numbers) | numbers,
        "reason": numbers,
        "message": numbers,
        "blocked": numbers,
    },
)


@settings(max_examples=120, deadline=None)
@given(st.lists(event, max_size=25))
def test_any_events_give_a_sound_account(events):
    check_sound(account(events))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_real_history_with_lines_lost_and_moved(data):
    events = attempt_events("a", STARTED, 0, 60) + attempt_events("b", STARTED + 300, 40, 90)
    events += attempt_events("c", STARTED + 700, 90, 120, reason="finished")
    keep = data.draw(st.lists(st.booleans(), min_size=len(events), max_size=len(events)))
    shift = data.draw(st.floats(-1e4, 1e4))
    events = [event | {"time": event["time"] + shift * (event["attempt"] == "b")} for event in events]
    check_sound(goodput := account([event for event, is_kept in zip(events, keep, strict=True) if is_kept]))
    assert goodput.seconds["step"] + goodput.seconds["lost"] <= 2 * 170


def test_drawn_over_time_adds_up():
    events = attempt_events("a", STARTED, 0, 250)
    events += attempt_events("b", events[-1]["time"] + 100, 200, 400, reason="finished")
    goodput = account(events)
    drawn = over_time(goodput, 50)
    for name in CATEGORIES:
        assert drawn[name].sum() == pytest.approx(goodput.seconds[name], rel=0.02, abs=goodput.wall / 50)
    total = np.sum([drawn[name] for name in CATEGORIES], axis=0)
    assert total == pytest.approx(np.full(50, goodput.wall / 50), rel=0.02)
