"""Report on a run: a summary in the terminal and one page with charts.

    jaxcoder report runs/1b                          a summary here, the page in runs/1b/report.html
    jaxcoder report runs/1b --output 1b.html
    jaxcoder report gs://BUCKET/runs/1b --text       no page

The page is one self-contained HTML file: loss, bits per byte of every corpus and language, throughput and MFU, goodput
over all restarts, checkpoints, memory, hosts, alarms, and the exit reason of every start. The run may still be running.
"""

import argparse

from jaxcoder.formatting import plural


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN_DIR", help="directory of a run, local or gs://, s3://")
    parser.add_argument("--output", metavar="FILE.html", help="the page (default: RUN_DIR/report.html)")
    parser.add_argument("--text", action="store_true", help="print the summary, write no page")


def run(args: argparse.Namespace) -> None:
    from jaxcoder.doctor.diagnose import examine
    from jaxcoder.errors import ConfigError
    from jaxcoder.io.addresses import open_address
    from jaxcoder.io.os_errors import access_errors
    from jaxcoder.models.flops import num_parameters
    from jaxcoder.record.run_record import read_run
    from jaxcoder.report.page import run_page
    from jaxcoder.report.summary import describe

    if args.text and args.output is not None:
        raise ConfigError("--text writes no page and --output names one: give one of them.")
    open_address(args.run)  # a missing client or credentials become a ConfigError
    with access_errors(args.run):
        record = read_run(args.run)
    parameters = num_parameters(record.config.model) if record.config is not None else None
    print(describe(record, parameters))
    if args.text:
        return
    findings = [(finding.severity, finding.what) for finding in examine(record)]
    output = args.output or f"{record.path}/report.html"
    filesystem, inside = open_address(output)
    with access_errors(output, "write to"):
        filesystem.makedirs(filesystem._parent(inside), exist_ok=True)
        filesystem.pipe_file(inside, run_page(record, num_parameters=parameters, findings=findings).encode())
    print(f"\nThe page: {output}")
    if findings:
        print(f"{plural(len(findings), 'finding')}: `jaxcoder doctor {args.run}` gives evidence and remedies.")
