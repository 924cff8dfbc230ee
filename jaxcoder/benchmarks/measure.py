"""Shared by the benchmarks: timing in turns, real source code as input, and the report.

Work on one core is measured in seconds of processor time, so that figures stay comparable on a machine with other load.
Training and decoding, which use every core or an accelerator, are measured in wall-clock time. All candidates take
turns in every run, and the median over the runs is reported.
"""

import argparse
import dataclasses
import importlib.metadata
import json
import os
import platform
import statistics
import sysconfig
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jaxcoder
from jaxcoder.errors import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """The figures of one benchmark.

    columns: key in the rows -> heading. targets: requirement -> whether it is met. is_test: an unmet target is a
    failure, with exit code 1.
    """

    title: str
    columns: dict[str, str]
    rows: list[dict[str, Any]]
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    targets: dict[str, bool] = dataclasses.field(default_factory=dict)
    environment: dict[str, Any] = dataclasses.field(default_factory=dict)
    is_test: bool = False

    @property
    def exit_code(self) -> int:
        return int(self.is_test and not all(self.targets.values()))

    def text(self) -> str:
        """A table for the terminal."""
        cells = [list(self.columns.values())] + [[_cell(row.get(key)) for key in self.columns] for row in self.rows]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        table = [
            "  ".join(cell.rjust(width) if i else cell.ljust(width) for i, (cell, width) in enumerate(line)).rstrip()
            for line in (zip(row, widths, strict=True) for row in cells)
        ]
        footers = [", ".join(f"{k} {v}" for k, v in pairs.items()) for pairs in (self.settings, self.environment)]
        targets = [f"{'met' if met else 'MISSED'}: {target}" for target, met in self.targets.items()]
        return "\n".join([self.title, "", *table, "", *targets, *([""] if targets else []), *footers])

    def figures(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


class Reports:
    """Several tables of one run."""

    exit_code = 0

    def __init__(self, reports: Sequence[Report]):
        self.reports = list(reports)

    def text(self) -> str:
        return "\n\n\n".join(report.text() for report in self.reports)

    def figures(self) -> list[dict[str, Any]]:
        return [report.figures() for report in self.reports]


def publish(report: Report | Reports, output: Path | None) -> int:
    """Prints a report, writes its figures to `output` as JSON, and returns the exit code."""
    print(report.text())
    if output is not None:
        output.write_text(json.dumps(report.figures(), indent=2) + "\n", encoding="utf-8")
        print(f"\nWrote {output}")
    return report.exit_code


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return "" if value is None else str(value)


def time_in_turns(
    calls: Mapping[str, Callable[[], object]],
    *,
    runs: int,
    min_seconds: float = 0.0,
    clock: Callable[[], float] = time.process_time,
) -> dict[str, float]:
    """Median seconds of one call of each by `clock`, over `runs` runs in which all take turns.

    Short calls are repeated so that a measurement takes `min_seconds`; each is called once first, to warm up.
    """
    repeats = {}
    for name, call in calls.items():
        call()
        repeats[name] = max(1, round(min_seconds / max(_seconds(call, 1, clock), 1e-6))) if min_seconds else 1
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(runs):
        for name, call in calls.items():
            seconds[name].append(_seconds(call, repeats[name], clock))
    return {name: statistics.median(values) for name, values in seconds.items()}


def _seconds(call: Callable[[], object], repeats: int, clock: Callable[[], float]) -> float:
    start = clock()
    for _ in range(repeats):
        call()
    return (clock() - start) / repeats


def add_output_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", type=Path, metavar="FILE", help="also write the figures as JSON")


def add_runs_argument(parser: argparse.ArgumentParser, default: int = 5) -> None:
    parser.add_argument("--runs", type=int, default=default, help="the median of so many runs (default %(default)s)")


def add_clock_argument(parser: argparse.ArgumentParser) -> None:
    """For benchmarks that use every core, and are measured in wall-clock time."""
    parser.add_argument(
        "--processor-time",
        action="store_true",
        help="measure processor time: on a busy machine, with OMP_NUM_THREADS=1 (CPUs only)",
    )


def clock_of(args: argparse.Namespace) -> Callable[[], float]:
    return time.process_time if args.processor_time else time.perf_counter


def clock_name(args: argparse.Namespace) -> str:
    return "of processor time" if args.processor_time else "wall-clock"


def check_at_least(least: int, **options: int) -> None:
    """ConfigError for an option below `least`."""
    for name, value in options.items():
        if value < least:
            raise ConfigError(f"--{name.replace('_', '-')} is {value}: give at least {least}.")


def stdlib_sources(max_bytes: int) -> list[str]:
    """Texts of the running Python's own library, in order of their paths, up to `max_bytes` of them."""
    texts, size = [], 0
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        if "site-packages" in path.relative_to(root).parts:
            continue
        try:
            text = path.read_bytes().decode()
        except (UnicodeDecodeError, OSError):
            continue  # a few files test other encodings
        if text:
            texts.append(text)
            size += len(text.encode())
        if size >= max_bytes:
            break
    return texts


def environment(packages: Sequence[str]) -> dict[str, Any]:
    """The processor, the number of cores, and the versions that the figures belong to."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "system": platform.system(),
        "python": platform.python_version(),
        "jaxcoder": jaxcoder.__version__,
        **{name: importlib.metadata.version(name) for name in packages},
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
