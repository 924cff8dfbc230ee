"""Alarms: three rules on the metrics of every step, evaluated during the run.

    loss_spike           the loss of a step is far above the steps before it
    unstable_gradients   gradient norms have grown several times, or jump repeatedly
    language_regression  held-out bits per byte of one language rise while the mean over all falls

A rule is called as rule(step, metrics) with the metrics of every step in order (the keys of metrics.jsonl) and returns
an Alarm or None. After a restart `Alarms.catch_up` restores its state from the last records.
"""

import math
import statistics
from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

# Thresholds. "Measured" is over one healthy run: the quickstart, 1,800 steps on two CPU cores.
SPIKE_DEVIATIONS = 8.0  # of the loss from its running mean; measured: at most 2.2
SPIKE_NATS = 0.1  # and at least this, for tiny deviations (a memorized or synthetic corpus)
SPIKE_MEMORY = 0.98  # decay of the running mean: about fifty steps
SPIKE_FIRST_STEPS = 50  # no spike before the mean has so many steps
GROWN_NORM = 3.0  # median of RECENT norms relative to that of the BEFORE norms before them; measured: at most 1.1
SINGLE_NORM = 10.0  # one norm relative to that median; measured: at most 3.0
MANY_SINGLE = 5  # of the RECENT norms
RECENT, BEFORE = 20, 100
REGRESSION = 0.02  # relative rise of bits per byte: see doctor.findings.MARGIN

LANGUAGE_PREFIX, LANGUAGE_SUFFIX = "eval/lang/", "/bits_per_byte"
MEAN = "eval/bits_per_byte"


class Alarm(NamedTuple):
    """rule: its name. step: where it was raised. message: a sentence."""

    rule: str
    step: int
    message: str


class LossSpike:
    """A loss above the running mean by more than SPIKE_DEVIATIONS and SPIKE_NATS (nats per token).

    A spike enters the mean only up to that limit, so each step of a long one is a spike until the mean has reached it.
    """

    name = "loss_spike"

    def __init__(self) -> None:
        self._count, self._mean, self._variance = 0, 0.0, 0.0

    def __call__(self, step: int, metrics: Mapping[str, Any]) -> Alarm | None:
        loss = metrics.get("loss")
        if loss is None or not math.isfinite(loss):
            return None  # such a step is skipped and reported separately
        jump = loss - self._mean
        limit = max(SPIKE_DEVIATIONS * math.sqrt(self._variance), SPIKE_NATS)
        if self._count >= SPIKE_FIRST_STEPS and jump > limit:
            mean = self._mean
            self._mean += (1 - SPIKE_MEMORY) * limit
            return Alarm(self.name, step, f"the loss jumped to {loss:.4f}, from about {mean:.4f}")
        self._count += 1
        share = max(1 - SPIKE_MEMORY, 1 / self._count)  # a plain mean of the first steps
        self._mean += share * jump
        self._variance = (1 - share) * (self._variance + share * jump * jump)
        return None


class UnstableGradients:
    """The median of the last RECENT gradient norms above GROWN_NORM times the median of the BEFORE norms before them,
    or MANY_SINGLE of them above SINGLE_NORM times it."""

    name = "unstable_gradients"

    def __init__(self) -> None:
        self._norms: deque[float] = deque(maxlen=RECENT + BEFORE)

    def __call__(self, step: int, metrics: Mapping[str, Any]) -> Alarm | None:
        norm = metrics.get("grad_norm")
        if norm is None:
            return None
        self._norms.append(norm if math.isfinite(norm) else math.inf)
        if len(self._norms) < RECENT + BEFORE:
            return None
        norms = list(self._norms)
        usual, recent = statistics.median(norms[:BEFORE]), norms[BEFORE:]
        if (now := statistics.median(recent)) > GROWN_NORM * usual:
            message = f"gradient norms have grown from {usual:.3g} to {now:.3g} (medians)"
        elif sum(norm > SINGLE_NORM * usual for norm in recent) >= MANY_SINGLE:
            message = (
                f"{MANY_SINGLE} of the last {RECENT} gradient norms are more than {SINGLE_NORM:g} times {usual:.3g}, "
                "the median before them"
            )
        else:
            return None
        self._norms.clear()  # the next norms are compared with each other
        return Alarm(self.name, step, f"{message}: lower optimizer.peak_learning_rate")


class LanguageRegression:
    """A language whose held-out bits per byte are REGRESSION above their minimum, while the mean over all languages is
    below its value at that minimum. Raised again after a further rise of REGRESSION."""

    name = "language_regression"

    def __init__(self) -> None:
        self._best: dict[str, tuple[float, float, int]] = {}  # language -> its minimum, the mean and the step there
        self._raised: dict[str, float] = {}

    def __call__(self, step: int, metrics: Mapping[str, Any]) -> Alarm | None:
        mean = metrics.get(MEAN)
        if mean is None or not math.isfinite(mean):
            return None
        risen = []
        for language, bits in sorted(languages_of(metrics).items()):
            if not math.isfinite(bits):
                continue
            best, mean_then, step_then = self._best.get(language, (math.inf, math.inf, step))
            if bits < best:
                self._best[language] = (bits, mean, step)
                self._raised.pop(language, None)
            elif mean < mean_then and bits > self._raised.get(language, best) * (1 + REGRESSION):
                self._raised[language] = bits
                risen.append(
                    f"{language} from {best:.4f} (step {step_then:,}) to {bits:.4f}, mean {mean_then:.4f} to {mean:.4f}"
                )
        if not risen:
            return None
        return Alarm(self.name, step, f"held-out bits per byte rise while the mean falls: {'; '.join(risen)}")


def languages_of(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Held-out bits per byte of every language in the metrics of an evaluation."""
    return {
        name[len(LANGUAGE_PREFIX) : -len(LANGUAGE_SUFFIX)]: value
        for name, value in metrics.items()
        if name.startswith(LANGUAGE_PREFIX) and name.endswith(LANGUAGE_SUFFIX)
    }


class Alarms:
    """All rules. After an alarm a rule on steps is silent for `quiet_steps`; the one on evaluations is not."""

    quiet_steps = 100

    def __init__(self) -> None:
        self._rules = (LossSpike(), UnstableGradients(), LanguageRegression())
        self._quiet_until: dict[str, int] = {}

    def __call__(self, step: int, metrics: Mapping[str, Any]) -> list[Alarm]:
        """The alarms on the metrics of a step. Metrics of an evaluation are passed separately, after the step's."""
        alarms = [alarm for rule in self._rules if (alarm := rule(step, metrics)) is not None]
        raised = [alarm for alarm in alarms if step >= self._quiet_until.get(alarm.rule, 0)]
        for alarm in raised:
            if alarm.rule != LanguageRegression.name:
                self._quiet_until[alarm.rule] = step + self.quiet_steps
        return raised

    def catch_up(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Restores the state after a restart from records of `read_metrics`, without raising alarms."""
        for record in records:
            self(record["step"], record)
