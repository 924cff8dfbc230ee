"""Files of synthetic runs: a healthy one, into which tests inject faults."""

import json
import math
import random
from dataclasses import dataclass, field
from pathlib import Path

from jaxcoder.config import serialize
from jaxcoder.config.load import load_run
from jaxcoder.record.run_record import RunRecord, read_run

STARTED = 1_790_000_000.0
STEP_SECONDS = 2.0
LANGUAGES = ("python", "java", "haskell")
BUCKETS = ((0, 63), (64, 127), (128, 255), (256, 511), (512, 1023))


@dataclass
class MadeRun:
    """metrics and events are lists of records, in the order of the files."""

    config: object
    metrics: list[dict] = field(default_factory=list)
    events: list[dict] = field(default_factory=list)
    stacks: dict[str, str] = field(default_factory=dict)
    checkpoints: dict[int, bool] = field(default_factory=dict)
    """Step -> whether it has a manifest."""
    now: float = STARTED + 4000.0

    def write(self, path: Path) -> Path:
        path.mkdir(parents=True, exist_ok=True)
        if self.config is not None:
            (path / "config.json").write_text(serialize.to_json(self.config))
        (path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in self.metrics))
        (path / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in self.events))
        for name, text in self.stacks.items():
            (path / "stacks").mkdir(exist_ok=True)
            (path / "stacks" / name).write_text(text)
        for step, is_complete in self.checkpoints.items():
            (path / "checkpoints" / str(step)).mkdir(parents=True, exist_ok=True)
            if is_complete:
                (path / "checkpoints" / str(step) / "manifest.json").write_text("{}")
        return path

    def read(self, path: Path) -> RunRecord:
        return read_run(str(self.write(path)), now=self.now)

    def steps(self) -> list[dict]:
        """The records of steps, without those of evaluations and saves."""
        return [record for record in self.metrics if "loss" in record]

    def evaluations(self) -> list[dict]:
        return [record for record in self.metrics if "eval/loss" in record]

    def of(self, event: str) -> list[dict]:
        return [record for record in self.events if record["event"] == event]


def healthy(num_steps: int = 1000, *, seed: int = 0) -> MadeRun:
    """One start, that trained `num_steps` steps of two seconds and finished; an evaluation and a save every tenth."""
    draw = random.Random(seed)
    config = serialize.from_json(json.dumps(plain_config(num_steps)))
    run = MadeRun(config)
    for step in range(1, num_steps + 1):
        run.metrics.append(step_record(config, step, draw))
        if step % (num_steps // 10) == 0:
            run.metrics.append(evaluation(config, step))
            run.metrics.append({"step": step, "checkpoint_seconds": 0.4})
        if step % (num_steps // 20) == 0:
            run.metrics.append(hosts(step, f"host-{draw.randrange(4)}", 0.06))
    run.checkpoints = {num_steps - num_steps // 10: True, num_steps: True}
    run.events = attempt_events("a1", STARTED, 0, num_steps, save_every=num_steps // 10, reason="finished")
    return run


def plain_config(num_steps: int) -> dict:
    plain = serialize.to_dict(load_run("smoke"))
    plain |= {"name": "made", "num_steps": num_steps, "global_batch_size": 8}
    plain["model"] |= {"max_seq_len": 1024, "vocab_size": 4096}
    plain["data"] |= {"store": "no/store", "fim_rate": 0.5, "fim_spm_rate": 0.5}
    plain["optimizer"] |= {"warmup_steps": num_steps // 10, "peak_learning_rate": 3e-4, "final_learning_rate": 3e-5}
    plain["optimizer"] |= {"decay_steps": None}
    plain["checkpoint"] |= {"save_every_steps": num_steps // 10, "save_every_seconds": None}
    plain["eval"] |= {"every_steps": num_steps // 10}
    return plain


def learning_rate(config, step: int) -> float:
    optimizer = config.optimizer
    if step < optimizer.warmup_steps:
        return optimizer.peak_learning_rate * step / optimizer.warmup_steps
    progress = min((step - optimizer.warmup_steps) / (config.num_steps - optimizer.warmup_steps), 1.0)
    span = optimizer.peak_learning_rate - optimizer.final_learning_rate
    return optimizer.final_learning_rate + 0.5 * span * (1 + math.cos(math.pi * progress))


def loss_at(config, step: int) -> float:
    return 1.4 + 6.9 * math.exp(-12 * step / config.num_steps) + 0.5 * math.exp(-3 * step / config.num_steps)


def step_record(config, step: int, draw: random.Random) -> dict:
    loss = loss_at(config, step) + draw.gauss(0, 0.02)
    seconds = STEP_SECONDS * draw.uniform(0.98, 1.02)
    pieces = 40
    fim = sum(draw.random() < 0.49 for _ in range(pieces))
    return {
        "step": step,
        "loss": loss,
        "bits_per_byte": loss / 2.2,
        "grad_norm": 0.5 * math.exp(draw.gauss(0, 0.15)),
        "learning_rate": learning_rate(config, step),
        "skipped": 0,
        "skipped_steps": 0,
        "tokens": 8000.0,
        "samples": 8 * step,
        "step_time": seconds,
        "data_wait": 0.002,
        "tokens_per_second": 8000 / seconds,
        "flops_per_second_per_device": 4e13 / seconds,
        "mfu": 0.9 / seconds,
        "host_memory": int(4e9 * draw.uniform(0.99, 1.01)),
        "device_memory": int(9e9),
        "device_memory_peak": int(12e9),
        "batch_hash": draw.randrange(2**32),
        "fim_share": fim / pieces,
        "fim_spm_share": sum(draw.random() < 0.5 for _ in range(fim)) / max(fim, 1),
        "pieces": pieces,
    }


def evaluation(config, step: int) -> dict:
    loss = loss_at(config, step) + 0.05
    record = {"step": step, "eval/loss": loss, "eval/bits_per_byte": loss / 2.2, "eval/tokens": 50000}
    for number, name in enumerate(LANGUAGES):
        own = loss * (0.9 + 0.1 * number)
        record |= {f"eval/lang/{name}/loss": own, f"eval/lang/{name}/bits_per_byte": own / 2.2}
        record |= {f"eval/lang/{name}/tokens": 20000 >> number}
    for number, name in enumerate(("code", "issues")):
        own = loss * (0.95 + 0.1 * number)
        record |= {f"eval/corpus/{name}/loss": own, f"eval/corpus/{name}/bits_per_byte": own / 2.2}
    for number, (first, last) in enumerate(BUCKETS):
        record[f"eval/position/{first}-{last}/loss"] = loss * (1.1 - 0.04 * number)
        record[f"eval/position/{first}-{last}/tokens"] = (last - first + 1) * 64
    return record | {"eval_seconds": 3.0}


def hosts(step: int, name: str, seconds: float) -> dict:
    own = {"step": step, "hosts/slowest": int(name[-1]), "hosts/slowest_name": name, "hosts/slowest_seconds": seconds}
    return own | {"hosts/median_seconds": 0.05, "hosts/count": 4}


def attempt_events(
    name: str,
    began: float,
    ready: int,
    last: int,
    *,
    save_every: int = 100,
    reason: str | None = None,
    message: str = "",
    compile_seconds: float = 30.0,
    step_seconds: float = STEP_SECONDS,
) -> list[dict]:
    """The events of a start at `began` that took the steps ready + 1 .. last; without `reason` it has no end event."""
    mine = {"attempt": name}
    begin = {
        "process_started": began, "processes": 4, "devices": 32, "device_kind": "TPU v5p",
        "mesh": {"data": 1, "fsdp": 32}, "hosts": [f"host-{number}" for number in range(4)],
        "version": "0.1", "code": "c0de", "jax": "0.10",
        "command": "jaxcoder train made --data store",
    }  # fmt: skip
    spent = {"init": 8.0, "restore": 4.0 * (ready > 0), "compile": 0.0, "step": 0.0, "data_wait": 0.0, "save": 0.0}
    spent |= {"evaluate": 0.0}
    clock = began + 9.0 + spent["restore"]
    events = [mine | {"time": began + 8.0, "event": "begin"} | begin]
    events.append(mine | {"time": clock, "event": "ready", "step": ready, "samples": 8 * ready})
    for step in range(ready + 1, last + 1):
        is_first = step == ready + 1
        spent["compile" if is_first else "step"] += compile_seconds if is_first else step_seconds * 0.999
        spent["data_wait"] += 0 if is_first else step_seconds * 0.001
        clock += compile_seconds if is_first else step_seconds
        if step % save_every == 0:
            spent["save"], spent["evaluate"], clock = spent["save"] + 0.4, spent["evaluate"] + 3.0, clock + 3.4
            saved = {"step": step, "blocked": 0.4, "seconds": 9.0, "bytes": 14 * 10**9}
            events.append(mine | {"time": clock + 9, "event": "saved"} | saved)
        if step % 5 == 0 or step == last:
            events.append(mine | {"time": clock, "event": "spent", "step": step, "seconds": dict(spent)})
    if reason is not None:
        text = {"message": message} if message else {}
        events.append(mine | {"time": clock + 1, "event": "end", "step": last, "reason": reason} | text)
    return events
