"""Diagnose a run: what is wrong, the evidence, and what to try next.

    jaxcoder doctor runs/1b                   running, or ended
    jaxcoder doctor runs/1b --verify          also read its checkpoints and compare checksums
    jaxcoder doctor gs://BUCKET/runs/1b --json

Reads what the run recorded: loss and gradients (with the files of the batches, if the token store can be read), skipped
steps, languages that fall behind, a context that is not used, FIM shares, waiting for data, slow hosts, checkpoints,
restarts, the watchdog's stacks, the schedule. Exits with 0 whatever it finds, and with 2 when there is no run.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jaxcoder.data.trace import TracedDocument
    from jaxcoder.record.run_record import RunRecord

_MOST_DOCUMENTS = 20_000_000  # the table of more would take gigabytes of memory
_MOST_FILES = 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN_DIR", help="directory of a run, local or gs://, s3://")
    parser.add_argument("--verify", action="store_true", help="read all checkpoints and verify every checksum")
    parser.add_argument("--json", action="store_true", help="the findings as a JSON list")


def run(args: argparse.Namespace) -> None:
    import shutil
    from dataclasses import asdict

    from jaxcoder.doctor.diagnose import describe, examine
    from jaxcoder.io.addresses import open_address
    from jaxcoder.io.os_errors import access_errors
    from jaxcoder.record.run_record import read_run

    open_address(args.run)  # a missing client or credentials become a ConfigError
    with access_errors(args.run):
        record = read_run(args.run)
        if record.checkpoints:
            record = read_run(args.run, damage=damage(args.run, list(record.checkpoints), verify=args.verify))
    findings = examine(record)
    if any(finding.traced for finding in findings) and (trace := tracer(record)) is not None:
        findings = examine(record, trace)
    if args.json:
        print(json.dumps([asdict(finding) for finding in findings], indent=1))
        return
    print(describe(record, findings, width=min(shutil.get_terminal_size().columns, 110)))


def damage(run_dir: str, steps: Sequence[int], *, verify: bool) -> dict[int, str]:
    """Step -> what is damaged in its checkpoint, "" for nothing; checks sizes, with `verify` checksums."""
    from etils import epath

    from jaxcoder.checkpoint.discover import CHECKPOINTS, damage_of

    directory = epath.Path(run_dir) / CHECKPOINTS
    return {step: damage_of(directory / str(step), by_size=not verify) or "" for step in steps}


def tracer(record: "RunRecord") -> Callable[[int], list[str]] | None:
    """A function from a step to lines that name the files of its batch; None if the token stores cannot be read."""
    if record.config is None or record.is_synthetic:
        return None
    from jaxcoder.data.open import open_stream
    from jaxcoder.data.schedule import StepHistory
    from jaxcoder.data.trace import Tracer
    from jaxcoder.errors import JaxcoderError

    config = record.config
    samples = record.columns["samples"].finite()
    logged = list(zip(samples.steps.tolist(), samples.values.astype(int).tolist(), strict=True))
    try:
        stream = open_stream(config)
    except (JaxcoderError, OSError):
        return None
    if sum(store.num_documents for store in stream.stores) > _MOST_DOCUMENTS:
        return None
    history = StepHistory(config.global_batch_size, config.data.stages, logged)
    trace = Tracer(stream, history, max(config.num_steps, record.last_step))

    def lines(step: int) -> list[str]:
        try:
            return [f"step {step:,}, row {traced.row}: {named(traced.documents)}" for traced in trace.batch(step)]
        except JaxcoderError as error:
            return [f"step {step:,} cannot be traced: {error}"]

    return lines


def named(documents: "Sequence[TracedDocument]") -> str:
    """The files of a row, those with most tokens in it first."""
    largest = sorted(documents, key=lambda document: document.start - document.stop)[:_MOST_FILES]
    files = [" ".join(filter(None, (each.repo_name, each.path))) or "a file without a name" for each in largest]
    rest = f" and {len(documents) - _MOST_FILES} more" if len(documents) > _MOST_FILES else ""
    return ", ".join(files) + rest
