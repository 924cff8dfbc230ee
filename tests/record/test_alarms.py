"""The three alarms on series of numbers: silent on a healthy run, each raised by its own fault."""

import math
import random

from jaxcoder.record.alarms import Alarms, LanguageRegression, LossSpike, UnstableGradients


def healthy(steps: int, seed: int = 0) -> list[dict[str, float]]:
    """A loss that falls and gradient norms that fall and scatter, as in the first steps of a real run."""
    rng = random.Random(seed)
    return [
        {
            "loss": 5 * math.exp(-step / 300) + 1 + rng.gauss(0, 0.03),
            "grad_norm": (0.4 + 3 * math.exp(-step / 50)) * math.exp(rng.gauss(0, 0.3)),
        }
        for step in range(steps)
    ]


def rules_of(alarms: Alarms, series: list[dict[str, float]], first: int = 1) -> list[tuple[str, int]]:
    return [(a.rule, a.step) for step, metrics in enumerate(series, first) for a in alarms(step, metrics)]


def test_a_healthy_run_is_silent():
    for seed in range(20):
        assert rules_of(Alarms(), healthy(2000, seed)) == []


def test_a_loss_spike():
    series = healthy(1500)
    series[1000]["loss"] += 0.5
    assert rules_of(Alarms(), series) == [("loss_spike", 1001)]
    alarm = LossSpike()
    found = [alarm(step, metrics) for step, metrics in enumerate(series, 1)][1000]
    assert found.message.startswith(f"the loss jumped to {series[1000]['loss']:.4f}, from about 1.2")
    # A loss that stays up becomes the mean and raises no alarm at every step.
    up = series[:1000] + [{"loss": 3.0 + 0.01 * (step % 3)} for step in range(3000)]
    raised = rules_of(Alarms(), up)
    assert 1 <= len(raised) <= 10 and raised[0] == ("loss_spike", 1001)


def test_a_loss_that_is_not_finite_is_ignored():
    series = healthy(1500)
    series[700]["loss"] = math.nan
    series[900]["loss"] = math.inf
    series[1000]["loss"] += 0.5
    assert rules_of(Alarms(), series) == [("loss_spike", 1001)]


def test_gradients_that_grow():
    series = healthy(600)
    for number, metrics in enumerate(series[400:]):
        metrics["grad_norm"] *= 1.03**number
    ((rule, step),) = rules_of(Alarms(), series)[:1]
    assert rule == "unstable_gradients" and 420 < step < 470


def test_gradients_that_jump_repeatedly():
    series = healthy(600)
    for metrics in series[400::3]:
        metrics["grad_norm"] *= 40
    assert rules_of(Alarms(), series)[0] == ("unstable_gradients", 413)  # the fifth jump
    rule = UnstableGradients()
    once = healthy(600)
    once[400]["grad_norm"] *= 1000
    once[500]["grad_norm"] = math.nan
    assert not any(rule(step, metrics) for step, metrics in enumerate(once))


def evaluation(python: float, cobol: float, mean: float) -> dict[str, float]:
    return {
        "eval/bits_per_byte": mean,
        "eval/lang/python/bits_per_byte": python,
        "eval/lang/cobol/bits_per_byte": cobol,
        "eval/lang/python/tokens": 10,
    }


def test_a_language_that_regresses():
    rule = LanguageRegression()
    assert rule(100, evaluation(2.0, 2.0, 2.0)) is None
    assert rule(200, evaluation(1.8, 1.9, 1.85)) is None
    assert rule(300, evaluation(1.6, 1.91, 1.7)) is None  # within the margin
    alarm = rule(400, evaluation(1.5, 1.95, 1.65))
    assert alarm.message == (
        "held-out bits per byte rise while the mean falls: "
        "cobol from 1.9000 (step 200) to 1.9500, mean 1.8500 to 1.6500"
    )
    assert rule(500, evaluation(1.4, 1.96, 1.6)) is None  # raised already
    assert rule(600, evaluation(1.4, 2.1, 1.6)) is not None  # worse still
    assert rule(700, evaluation(1.3, 1.7, 1.4)) is None
    assert rule(800, evaluation(1.5, 1.9, 1.6)) is None  # the mean rises too


def test_quiet_steps_and_restored_state():
    series = healthy(1000)
    for index in (500, 510, 700):
        series[index]["loss"] += 2.0
    assert rules_of(Alarms(), series) == [("loss_spike", 501), ("loss_spike", 701)]
    fresh, caught_up = Alarms(), Alarms()
    caught_up.catch_up({"step": step, **metrics} for step, metrics in enumerate(series[:499], 1))
    assert rules_of(fresh, series[499:510], 500) == []  # it has too few steps
    assert rules_of(caught_up, series[499:510], 500) == [("loss_spike", 501)]
