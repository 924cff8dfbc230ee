"""Every test runs on eight virtual CPU devices, so that meshes of any shape up to eight can be made.

Programs are compiled without LLVM's optimizations, since compiling takes longer than running here. They are kept for
the session in one directory, shared by the workers of pytest-xdist and by the processes that tests start.
"""

import atexit
import logging
import os
import shutil
import signal
import tempfile
from collections import Counter

import pytest

# A shell starts background jobs with SIGINT ignored, which every process started from here would inherit.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

if "PYTEST_XDIST_WORKER" not in os.environ:  # a worker has inherited the rest
    _cache = tempfile.mkdtemp(prefix="jaxcoder-tests-")
    atexit.register(shutil.rmtree, _cache, ignore_errors=True)

    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["JAX_NUM_CPU_DEVICES"] = "8"
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_backend_optimization_level=0"
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _cache
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
    os.environ["NNX_GRAPH_MODE"] = "false"


@pytest.fixture(autouse=True)
def unconfigured_logging():
    """Undoes what a command line in this process has configured, so that `caplog` hears the next test."""
    logger = logging.getLogger("jaxcoder")
    handlers = list(logger.handlers)
    yield
    logger.handlers, logger.propagate = handlers, True
    logger.setLevel(logging.NOTSET)


def pytest_terminal_summary(terminalreporter):
    """Prints the seconds spent in each directory of tests/, over all workers."""
    seconds = Counter()
    for reports in terminalreporter.stats.values():
        for report in reports:
            if hasattr(report, "duration"):
                room = report.nodeid.removeprefix("tests/").split("/" if report.nodeid.count("/") > 1 else "::")[0]
                seconds[room] += report.duration
    terminalreporter.section("seconds by directory")
    rooms = [f"{room} {spent:.0f}" for room, spent in seconds.most_common() if spent >= 1]
    terminalreporter.write_line(", ".join([*rooms, f"total {sum(seconds.values()):.0f}"]))
