"""How every verb that computes begins."""

import argparse
import logging

logger = logging.getLogger(__name__)


def start_jax(*, debug: bool) -> None:
    """Sets JAX's options, and warns where this machine has an accelerator that JAX cannot see."""
    from jaxcoder import runtime

    runtime.initialize(debug=debug)
    _warn_of_unseen()


def add_process_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of a verb that several processes can share."""
    group = parser.add_argument_group(
        "several processes", "Not needed under SLURM, on TPU pods and with the files of `jaxcoder launch`."
    )
    group.add_argument("--coordinator", metavar="HOST:PORT", help="where process 0 is met, on a port that is free")
    group.add_argument("--num-processes", type=int, metavar="N", help="how many processes share the run")
    group.add_argument("--process-id", type=int, metavar="I", help="which of them this is, from 0")
    group.add_argument(
        "--join-seconds", type=float, default=900.0, metavar="S", help="so long to wait for the others (900)"
    )


def start_processes(args: argparse.Namespace) -> int:
    """`start_jax` for a verb with the options above: meets the other processes. Returns the index of this one."""
    from jaxcoder import runtime
    from jaxcoder.record.console import configure_logging

    runtime.initialize(debug=args.debug)
    index = runtime.join(
        coordinator=args.coordinator,
        num_processes=args.num_processes,
        process_id=args.process_id,
        patience=args.join_seconds,
    )
    if index == 0:
        _warn_of_unseen()
    else:
        configure_logging("error")  # process 0 logs for all
    return index


def _warn_of_unseen() -> None:
    from jaxcoder import runtime

    unseen = runtime.check_accelerator()
    if unseen:
        logger.warning(unseen)
