"""What is wrong with a run, with the evidence and what to try next.

    jaxcoder doctor runs/1b                   one that goes on, or one that died
    jaxcoder doctor runs/1b --verify          also read its checkpoints and compare checksums
    jaxcoder doctor gs://BUCKET/runs/1b --json

Looks at what the run wrote: gradients and spikes (with the files of their batches, when the token store is there),
skipped steps, languages that fall behind, a context that is not used, FIM shares, waits for data, slow hosts,
checkpoints, restarts, the watchdog's stacks, the schedule. Exits with 0 whatever it finds, and 2 when there is no run.
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
    parser.add_argument("--verify", action="store_true", help="read all checkpoints and compare every file's checksum")
    parser.add_argument("--json", action="store_true", help="the findings as a JSON list")


def run(args: argparse.Namespace) -> None:
    import shutil
    from dataclasses import asdict

    from jaxcoder.doctor.diagnose import describe, examine
    from jaxcoder.io.addresses import open_address
    from jaxcoder.io.os_errors import access_errors
    from jaxcoder.record.run_record import read_run

    open_address(args.run)  # a client or credentials that are missing: in one sentence
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
    """What is wrong with each checkpoint, "" for nothing: its manifest and the sizes of its files, or every byte."""
    from etils import epath

    from jaxcoder.checkpoint.discover import CHECKPOINTS, damage_of

    directory = epath.Path(run_dir) / CHECKPOINTS
    return {step: damage_of(directory / str(step), by_size=not verify) or "" for step in steps}


def tracer(record: "RunRecord") -> Callable[[int], list[str]] | None:
    """Lines about the files of a step's batch; None when the run's token stores cannot be read from here."""
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
    files = [
        f"{' '.join(filter(None, (document.repo_name, document.path))) or 'a file without a name'}"
        for document in largest
    ]
    rest = f" and {len(documents) - _MOST_FILES} more" if len(documents) > _MOST_FILES else ""
    return ", ".join(files) + rest
