"""Disturb a real training run in every way that a pod does, and see what survives.

    jaxcoder drill                              50 faults, some 25 minutes on two cores
    jaxcoder drill --faults 3                   a minute or two
    jaxcoder drill --only kill-one,stop-one --faults 10 --seed 7

A small model is trained by several real processes over loopback, once undisturbed and once under fire: killed, stopped,
their checkpoints damaged, their disk full, their batches spoilt. After every fault the same command starts the run
again, and in the end its weights must be those of the undisturbed run, bit for bit. `jaxcoder drill --kinds` lists what
is done. Exit code 1 if anything did not survive; its directory is then left as it is.
"""

import argparse
import logging
import secrets
import shutil
import time
from pathlib import Path

from jaxcoder.cli.start import add_process_arguments, start_processes

logger = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--faults", type=int, default=50, metavar="N", help="how many (default %(default)s)")
    parser.add_argument("--seed", type=int, help="which ones, and when (default: another one each time, and said)")
    parser.add_argument("--only", metavar="KIND,...", help="only these kinds, in turn")
    parser.add_argument("--processes", type=int, default=2, metavar="N", help="of the run (default %(default)s)")
    parser.add_argument("--output-dir", type=Path, metavar="DIR", help="new (default: runs/drill-DATE-TIME)")
    parser.add_argument("--keep", action="store_true", help="keep the runs, their logs and checkpoints in any case")
    parser.add_argument("--kinds", action="store_true", help="list the kinds of faults and stop")
    # A process of the drill's own run: the trainer, with the batches that go bad.
    parser.add_argument("--process-of", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--mesh", help=argparse.SUPPRESS)
    add_process_arguments(parser)


def run(args: argparse.Namespace) -> int:
    if args.process_of is not None:
        return _train(args)

    if args.kinds:
        from jaxcoder.drill.faults import fault_kinds

        for name, kind in fault_kinds(args.processes).items():
            print(f"{name:<14} {kind.what}")
        return 0
    from jaxcoder import runtime
    from jaxcoder.drill.drill import FaultSchedule, clean_up, drill
    from jaxcoder.errors import Interrupted

    seed = secrets.randbelow(1_000_000) if args.seed is None else args.seed
    only = args.only.split(",") if args.only else ()
    plan = FaultSchedule.draw(args.faults, seed, only=only, processes=args.processes)
    directory = args.output_dir or Path("runs") / time.strftime("drill-%Y%m%d-%H%M%S")
    try:
        report = drill(directory, plan, seed=seed)
    except KeyboardInterrupt as stop:
        _, code = runtime.signal_of(stop)
        if not args.keep:
            shutil.rmtree(directory, ignore_errors=True)
        left = f"what they left is in {directory}" if args.keep else f"{directory} is removed"
        message = f"the drill was stopped; its processes are ended, {left}."
        raise Interrupted(message, exit_code=code) from stop
    print(report.text())
    if report.has_failed:
        logger.info(f"The runs, their logs and checkpoints are in {directory}.")
        return 1
    if not args.keep:
        clean_up(directory)
    logger.info(f"Wrote {directory / 'drill.json'}")
    return 0


def _train(args: argparse.Namespace) -> int:
    """What `jaxcoder train` does, on the drill's configuration."""
    from jaxcoder.drill.setup import read

    config, bad_batches = read(args.process_of, str(args.output_dir), [int(size) for size in args.mesh.split(",")])
    start_processes(args)
    from jaxcoder.recipes.pretrain import pretrain

    pretrain(config, alter_batch=bad_batches)
    return 0
