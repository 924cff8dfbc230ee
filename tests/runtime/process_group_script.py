"""One of two processes that use `ProcessGroup`: prints its results, a line each."""

import os
import sys
import time

import jax

from jaxcoder import runtime
from jaxcoder.errors import DataError, JaxcoderError


def main(coordinator: str, index: int) -> None:
    runtime.initialize()
    runtime.initialize_distributed(coordinator=coordinator, num_processes=2, process_id=index, timeout=60)
    assert jax.process_count() == 2
    group = runtime.ProcessGroup(timeout=30)
    with group:
        print("hosts", len(group.hosts))
        print("agreed", group.agree("sum", 10 + index, sum))

        def refuse(everyone: list[int]) -> None:
            raise DataError(f"{group.name(1)} has {everyone[1]} and {group.name(0)} {everyone[0]}.")

        try:
            group.agree("refused", index, refuse)
        except JaxcoderError as error:
            print("refused", type(error).__name__, error)
        group.post_first("who", str(index))
        group.agree("posted", None, lambda _: None)
        print("first", group.read("who"), group.read("nothing"))
        group.post(f"number/{index}", str(index))
        group.agree("numbers", None, lambda _: None)
        print("posted", sorted(group.posted("number").items()))
        if index == 1:
            raise DataError("the store of process 1 is gone")
        began = time.monotonic()
        try:
            group.agree("after the end", None, lambda _: None)
        except JaxcoderError as error:
            print("ended", error.exit_code, time.monotonic() - began < 10, error)
            raise


try:
    main(sys.argv[1], int(sys.argv[2]))
except JaxcoderError as error:
    print("left with", error.exit_code, error)
    sys.stdout.flush()
    os._exit(error.exit_code)
