"""One of two processes that stop by SIGTERM: process 0 alone still has a checkpoint to finish, which takes a while."""

import os
import sys
import time

from jaxcoder import runtime
from jaxcoder.config import WatchdogConfig
from jaxcoder.errors import EXIT_SIGTERM, Interrupted, JaxcoderError

SECONDS = 12.0  # longer than any grace


def main(coordinator: str, index: int) -> None:
    runtime.initialize()
    runtime.initialize_distributed(coordinator=coordinator, num_processes=2, process_id=index, timeout=60)
    limits = WatchdogConfig(step_seconds=60.0, start_seconds=60.0)
    with runtime.ProcessGroup() as group, runtime.Watchdog(group, limits, stacks=str, on_end=print) as watchdog:
        watchdog.enter("save", 7)
        if index == 0:
            time.sleep(SECONDS)
            print("COMPLETE", flush=True)
        raise Interrupted("stopped after step 7", exit_code=EXIT_SIGTERM)


try:
    main(sys.argv[1], int(sys.argv[2]))
except JaxcoderError as error:
    sys.stdout.flush()
    os._exit(error.exit_code)
