"""What the benchmarks share: timing contestants side by side, real code to time them on, and the report.

Rates of what runs on one core are per second of processor time, so that on a machine with other work they stay
comparable; those of training and decoding, which use every core or an accelerator, are per second on the wall. The
contestants take turns in every run, and the median over the runs counts.
"""

import argparse
import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


@dataclasses.dataclass(frozen=True)
class Report:
    """What one benchmark found.

    columns: key in the rows -> heading. targets: what was asked for -> whether it was met. is_test: a target that is
    missed is a failure, and the command's exit code says so.
    """

    title: str
    settings: dict[str, Any]
    columns: dict[str, str]
    rows: list[dict[str, Any]]
    targets: dict[str, bool]
    environment: dict[str, Any]
    is_test: bool = False

    @property
    def exit_code(self) -> int:
        """1 for a test that failed, else 0."""
        return int(self.is_test and not all(self.targets.values()))

    def text(self) -> str:
        """A table for the terminal."""
        cells = [list(self.columns.values())] + [[_shown(row.get(key)) for key in self.columns] for row in self.rows]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        table = [
            "  ".join(cell.rjust(width) if place else cell.ljust(width) for place, (cell, width) in enumerate(line))
            for line in (zip(row, widths, strict=True) for row in cells)
        ]
        said = ", ".join(f"{name} {value}" for name, value in self.settings.items())
        hardware = ", ".join(f"{name} {value}" for name, value in self.environment.items())
        targets = [f"{'met' if met else 'MISSED'}: {target}" for target, met in self.targets.items()]
        return "\n".join([self.title, "", *table, "", *targets, *([""] if targets else []), said, hardware])

    def write(self, path: Path) -> None:
        """The same as JSON, with every figure whole."""
        path.write_text(json.dumps(dataclasses.asdict(self), indent=2) + "\n", encoding="utf-8")


class Reports:
    """Several tables of one run."""

    exit_code = 0

    def __init__(self, reports: Sequence[Report]):
        self.reports = list(reports)

    def text(self) -> str:
        return "\n\n\n".join(report.text() for report in self.reports)

    def write(self, path: Path) -> None:
        figures = [dataclasses.asdict(report) for report in self.reports]
        path.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return "" if value is None else str(value)


def side_by_side(
    contestants: dict[str, Callable[[], object]],
    *,
    runs: int,
    least_seconds: float,
    clock: Callable[[], float] = time.process_time,
) -> dict[str, float]:
    """Median seconds of one call of each by `clock` (processor time), over `runs` runs in which all take turns.

    Short ones are called several times in a row, so that a measurement takes `least_seconds`; each is called once
    before, to warm up.
    """
    calls = {}
    for name, call in contestants.items():
        call()
        calls[name] = max(1, round(least_seconds / max(_seconds(call, 1, clock), 1e-6))) if least_seconds else 1
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(runs):
        for name, call in contestants.items():
            seconds[name].append(_seconds(call, calls[name], clock))
    return {name: statistics.median(values) for name, values in seconds.items()}


def _seconds(call: Callable[[], object], times: int, clock: Callable[[], float]) -> float:
    start = clock()
    for _ in range(times):
        call()
    return (clock() - start) / times


def add_clock_argument(parser: argparse.ArgumentParser) -> None:
    """For benchmarks that use every core, and so are measured on the wall."""
    parser.add_argument(
        "--processor-time",
        action="store_true",
        help="count seconds of processor time: on a busy machine, with OMP_NUM_THREADS=1 (CPUs only)",
    )


def clock_of(args: argparse.Namespace) -> Callable[[], float]:
    return time.process_time if args.processor_time else time.perf_counter


def clock_name(args: argparse.Namespace) -> str:
    return "of processor time" if args.processor_time else "on the wall"


def stdlib_sources(most_bytes: int) -> list[str]:
    """Texts of the running Python's own library, in order of their paths, up to `most_bytes` of them."""
    import sysconfig

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
        if size >= most_bytes:
            break
    return texts


def environment(packages: Sequence[str]) -> dict[str, Any]:
    """The processor, the number of cores, and the versions that the figures belong to."""
    import importlib.metadata
    import os
    import platform

    import jaxcoder

    versions = {name: importlib.metadata.version(name) for name in packages}
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "system": platform.system(),
        "python": ".".join(map(str, sys.version_info[:3])),
        "jaxcoder": jaxcoder.__version__,
        **versions,
    }


def _processor() -> str:
    import platform

    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    except OSError:
        named = []
    return named[0] if named else platform.processor() or platform.machine()
