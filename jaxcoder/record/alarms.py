"""Three rules that watch the numbers of a run, and say in words what looks wrong.

    loss_spike           the loss of a step stands far out of the steps before it
    unstable_gradients   gradient norms have grown to several times what they were, or jump again and again
    language_regression  held-out bits per byte of one language rise while the mean over all falls

A rule sees the metrics of every step in order, as a dictionary (those of metrics.jsonl), and remembers little, so that
after a restart it is brought up to date by the records of the last steps.
"""

import math
import statistics
from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, Protocol

LANGUAGE_PREFIX, LANGUAGE_SUFFIX = "eval/lang/", "/bits_per_byte"
MEAN = "eval/bits_per_byte"


class Alarm(NamedTuple):
    """rule: its name. step: where it was noticed. message: what is wrong, in words."""

    rule: str
    step: int
    message: str


class Rule(Protocol):
    name: str

    def __call__(self, step: int, metrics: Mapping[str, Any]) -> Alarm | None:
        """What these metrics of a step, the next in order, give reason to say."""


class LossSpike:
    """A loss above the running mean of about fifty steps by more than eight of their deviations and 0.1 nats.

    A spike does not enter the mean, so a run of them is noticed as one; a loss that stays up becomes the usual one.
    """

    name = "loss_spike"
    memory = 0.98  # of the running mean and deviation
    first_steps = 50  # the loss falls too fast to say anything
    deviations = 8.0
    least_jump = 0.1  # nats per token

    def __init__(self):
        self._count, self._mean, self._variance = 0, 0.0, 0.0

    def __call__(self, step: int, metrics: Mapping[str, Any]) -> Alarm | None:
        loss = metrics.get("loss")
        if loss is None or not math.isfinite(loss):
            return None  # such a step is skipped and reported by itself
        jump = loss - self._mean
        limit = max(self.deviations * math.sqrt(self._variance), self.least_jump)
        if self._count >= self.first_steps and jump > limit:
            usual = self._mean
            self._mean += (1 - self.memory) * limit
            return Alarm(self.name, step, f"the loss jumped to {loss:.4f}, from about {usual:.4f}")
        self._count += 1
        share = max(1 - self.memory, 1 / self._count)
        self._mean += share * jump
        self._variance = (1 - share) * (self._variance + share * jump * jump)
        return None


class UnstableGradients:
    """The last 20 gradient norms against the median of the 100 before them, once there are so many.

    Noticed when their own median is above 3 times that, or when 5 of them are above 10 times.
    """

    name = "unstable_gradients"
    recent, before = 20, 100
    grown, jumped, jumps = 3.0, 10.0, 5

    def __init__(self):
        self._norms: deque[float] = deque(maxlen=self.recent + self.before)

    def __call__(self, step: int, metrics: Mapping[str, Any]) -> Alarm | None:
        norm = metrics.get("grad_norm")
        if norm is None:
            return None
        self._norms.append(norm if math.isfinite(norm) else math.inf)
        if len(self._norms) < self.recent + self.before:
            return None
        norms = list(self._norms)
        usual = statistics.median(norms[: self.before])
        recent = norms[self.before :]
        if (now := statistics.median(recent)) > self.grown * usual:
            return self._noticed(step, f"gradient norms have grown from {usual:.3g} to {now:.3g} (medians)")
        if sum(norm > self.jumped * usual for norm in recent) >= self.jumps:
            text = f"{self.jumps} of the last {self.recent} gradient norms are more than {self.jumped:.0f} times"
            return self._noticed(step, f"{text} {usual:.3g}, the median before them")
        return None

    def _noticed(self, step: int, text: str) -> Alarm:
        self._norms.clear()  # what comes next is compared with itself
        return Alarm(self.name, step, f"{text}: a lower optimizer.peak_learning_rate is the usual cure")


class LanguageRegression:
    """A language whose held-out bits per byte are more than 2 % above their best, reached earlier, while the mean over
    all languages is now below what it was then. Said again only when it has risen by 2 % more."""

    name = "language_regression"
    margin = 1.02

    def __init__(self):
        self._best: dict[str, tuple[float, float, int]] = {}  # language -> its best, the mean then, the step
        self._said: dict[str, float] = {}

    def __call__(self, step: int, metrics: Mapping[str, Any]) -> Alarm | None:
        mean = metrics.get(MEAN)
        if mean is None or not math.isfinite(mean):
            return None
        risen = []
        for language, bits in sorted(languages_of(metrics).items()):
            best, mean_then, step_then = self._best.get(language, (math.inf, math.inf, step))
            if not math.isfinite(bits):
                continue
            if bits < best:
                self._best[language] = (bits, mean, step)
                self._said.pop(language, None)
            elif mean < mean_then and bits > self._said.get(language, best) * self.margin:
                self._said[language] = bits
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
    """All rules; a rule that has spoken is quiet for `quiet_steps`, those of evaluations are not."""

    quiet_steps = 100

    def __init__(self):
        self._rules: list[Rule] = [LossSpike(), UnstableGradients(), LanguageRegression()]
        self._quiet_until: dict[str, int] = {}

    def __call__(self, step: int, metrics: Mapping[str, Any]) -> list[Alarm]:
        """The alarms that the metrics of a step raise. Evaluations come with metrics of their own, after the step's."""
        found = [alarm for rule in self._rules if (alarm := rule(step, metrics)) is not None]
        said = [alarm for alarm in found if step >= self._quiet_until.get(alarm.rule, 0)]
        for alarm in said:
            if alarm.rule != LanguageRegression.name:
                self._quiet_until[alarm.rule] = step + self.quiet_steps
        return said

    def catch_up(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Sees what was recorded before a restart, and says nothing of it. Records are those of `read_metrics`."""
        for record in records:
            self(record["step"], record)
