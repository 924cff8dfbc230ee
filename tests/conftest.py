"""What every test starts from: eight virtual CPU devices, so that meshes of any shape up to eight can be made.

Programs that several tests (and the processes they start) compile are kept for the session.
"""

import atexit
import logging
import os
import shutil
import tempfile

import pytest

_cache = tempfile.mkdtemp(prefix="jaxcoder-tests-")
atexit.register(shutil.rmtree, _cache, ignore_errors=True)

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ["JAX_COMPILATION_CACHE_DIR"] = _cache
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.3"
os.environ["NNX_GRAPH_MODE"] = "false"


@pytest.fixture(autouse=True)
def unconfigured_logging():
    """Undoes what a command line in this process has configured, so that `caplog` hears the next test."""
    logger = logging.getLogger("jaxcoder")
    handlers = list(logger.handlers)
    yield
    logger.handlers, logger.propagate = handlers, True
    logger.setLevel(logging.NOTSET)
