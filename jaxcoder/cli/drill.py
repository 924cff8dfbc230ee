"""Inject faults into a real training run and check that it recovers.

    jaxcoder drill                              50 faults, about 25 minutes on two cores
    jaxcoder drill --faults 3                   about two minutes
    jaxcoder drill --only kill-one,stop-one --faults 10 --seed 7

A small model is trained by several processes on this machine, once without faults and once with: killed or stopped
processes, damaged checkpoints, a full disk, bad batches. After every fault the same command resumes the run, and the
final weights must be bit-identical to those of the run without faults. `jaxcoder drill --kinds` lists the faults. The
exit code is 1 if a check failed; the directory is then kept.
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
    parser.add_argument("--faults", type=int, default=50, metavar="N", help="number of faults (default %(default)s)")
    parser.add_argument("--seed", type=int, help="seed of the schedule of faults (default: random, logged)")
    parser.add_argument("--only", metavar="KIND,...", help="only these kinds, in turns")
    parser.add_argument(
        "--processes", type=int, default=2, metavar="N", help="processes of the run (default %(default)s)"
    )
    parser.add_argument("--output-dir", type=Path, metavar="DIR", help="new directory (default: runs/drill-DATE-TIME)")
    parser.add_argument("--keep", action="store_true", help="keep runs, logs and checkpoints after a success too")
    parser.add_argument("--kinds", action="store_true", help="list the kinds of faults and exit")
    # Used by the drill for its own training processes.
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
        left = f"their files are in {directory}" if args.keep else f"{directory} was removed"
        message = f"the drill was stopped, its processes were ended; {left}."
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
    """`jaxcoder train` with the configuration and the bad batches of a drill."""
    from jaxcoder.drill.setup import read

    config, bad_batches = read(args.process_of, str(args.output_dir), [int(size) for size in args.mesh.split(",")])
    start_processes(args)
    from jaxcoder.recipes.pretrain import pretrain

    pretrain(config, alter_batch=bad_batches)
    return 0
