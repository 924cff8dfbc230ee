"""JAX initialization for the verbs that compute."""

import argparse
import logging

logger = logging.getLogger(__name__)


def start_jax(*, debug: bool) -> None:
    """Sets JAX's options, and warns if this machine has an accelerator that JAX cannot see."""
    from jaxcoder import runtime

    runtime.initialize(debug=debug)
    _warn_of_unused_accelerator()


def add_process_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of a verb that can run in several processes."""
    group = parser.add_argument_group(
        "several processes", "Not needed under SLURM, on TPU pods and with the files of `jaxcoder launch`."
    )
    group.add_argument("--coordinator", metavar="HOST:PORT", help="address of process 0, with a free port")
    group.add_argument("--num-processes", type=int, metavar="N", help="number of processes of the run")
    group.add_argument("--process-id", type=int, metavar="I", help="index of this process, from 0")
    group.add_argument(
        "--initialization-timeout",
        type=float,
        default=900.0,
        metavar="S",
        help="timeout for the other processes (default: 900)",
    )


def start_processes(args: argparse.Namespace) -> int:
    """`start_jax` for a verb with the options above: also connects to the other processes. Returns this one's index."""
    from jaxcoder import runtime
    from jaxcoder.record.console import configure_logging

    runtime.initialize(debug=args.debug)
    index = runtime.initialize_distributed(
        coordinator=args.coordinator,
        num_processes=args.num_processes,
        process_id=args.process_id,
        timeout=args.initialization_timeout,
    )
    if index == 0:
        _warn_of_unused_accelerator()
    else:
        configure_logging("error")  # process 0 logs for all
    return index


def _warn_of_unused_accelerator() -> None:
    from jaxcoder import runtime

    if warning := runtime.check_accelerator():
        logger.warning(warning)
