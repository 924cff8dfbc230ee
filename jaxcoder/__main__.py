"""`python -m jaxcoder`: the `jaxcoder` command."""

import sys

from jaxcoder.cli import run_command

sys.exit(run_command())
