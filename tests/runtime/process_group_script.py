"""One of two processes that try out `Peers`: prints what it saw, a line each."""

import os
import sys
import time

import jax

from jaxcoder import runtime
from jaxcoder.errors import DataError, JaxcoderError


def main(coordinator: str, index: int) -> None:
    runtime.initialize()
    runtime.join(coordinator=coordinator, num_processes=2, process_id=index, patience=60)
    assert jax.process_count() == 2
    peers = runtime.Peers(patience=30)
    with peers:
        print("hosts", len(peers.hosts))
        print("agreed", peers.agree("sum", 10 + index, sum))

        def refuse(everyone: list[int]) -> None:
            raise DataError(f"{peers.name(1)} has {everyone[1]} and {peers.name(0)} {everyone[0]}.")

        try:
            peers.agree("refused", index, refuse)
        except JaxcoderError as error:
            print("refused", type(error).__name__, error)
        peers.post_first("who", str(index))
        peers.agree("posted", None, lambda _: None)
        print("first", peers.read("who"), peers.read("nothing"))
        peers.post(f"number/{index}", str(index))
        peers.agree("numbers", None, lambda _: None)
        print("posted", sorted(peers.posted("number").items()))
        if index == 1:
            raise DataError("the store of process 1 is gone")
        began = time.monotonic()
        try:
            peers.agree("after the end", None, lambda _: None)
        except JaxcoderError as error:
            print("ended", error.exit_code, time.monotonic() - began < 10, error)
            raise


try:
    main(sys.argv[1], int(sys.argv[2]))
except JaxcoderError as error:
    print("left with", error.exit_code, error)
    sys.stdout.flush()
    os._exit(error.exit_code)
