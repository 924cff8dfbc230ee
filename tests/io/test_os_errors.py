"""A full disk, a quota and a limit on the size of files are recognised in every library's errors, and explained."""

import errno
import json
import os
import resource
import subprocess
import sys

import pytest

from jaxcoder.errors import ConversionError, DataError
from jaxcoder.io.os_errors import access_errors, explain_os_error, is_disk_full

TENSORSTORE = ValueError(
    'RESOURCE_EXHAUSTED: Error writing local file "/runs/x/state/_sharding": Failed to write 83 bytes to file 20: '
    "No space left on device [os_error_code='28']"
)
ARROW = OSError("[Errno 28] Error writing bytes to file. Detail: [errno 28] No space left on device")


@pytest.mark.parametrize(
    ("error", "name"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/runs/a"), "'/runs/a'"),
        (OSError(errno.EDQUOT, "Disk quota exceeded", b"/runs/b"), "'/runs/b'"),
        (ARROW, ""),
        (TENSORSTORE, "'/runs/x/state/_sharding'"),
    ],
)
def test_a_full_disk_names_the_file_and_what_is_kept(error, name):
    assert is_disk_full(error)
    message = explain_os_error(error, "jaxcoder train x")
    assert name in message and "kept" in message and "free some space" in message and "jaxcoder train x" in message


def test_a_limit_on_the_size_of_files_is_named():
    error = OSError(errno.EFBIG, os.strerror(errno.EFBIG), "/runs/a")
    assert is_disk_full(error) and "ulimit -f" in explain_os_error(error)
    with pytest.raises(DataError, match=r"Cannot write /runs/a \(File too large\): raise the limit.*ulimit -f"):
        with access_errors("/runs/a", "write"):
            raise error


def test_other_errors():
    assert explain_os_error(ValueError("shapes")) is None and explain_os_error(OSError("without a path")) is None
    assert "Permission denied: '/etc/x'" in explain_os_error(
        PermissionError(errno.EACCES, "Permission denied", "/etc/x")
    )
    with pytest.raises(ConversionError, match="Cannot write /etc/x .Permission denied.: choose another path"):
        with access_errors("/etc/x", "write", ConversionError):
            raise PermissionError(errno.EACCES, "Permission denied")
    with pytest.raises(ZeroDivisionError), access_errors("/etc/x"):
        raise ZeroDivisionError


@pytest.mark.parametrize("limit", [1 << 10, 20 << 10, 100 << 10])
def test_data_build_under_a_limit_blames_the_output(tmp_path, limit):
    """With `ulimit -f` in force, the message names a file of the output, whichever is written first."""
    text = "".join(f"x_{number} = {number * number % 977}\n" for number in range(20_000))
    (tmp_path / "in.jsonl").write_text(json.dumps({"content": text}) + "\n")
    code = (
        "import sys; from jaxcoder.cli.main import main; from jaxcoder.tokenizer.train import train_tokenizer;"
        f"train_tokenizer([{text[:2000]!r}], 300).save({str(tmp_path / 'tokenizer')!r});"
        f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {resource.RLIM_INFINITY}));"
        f"sys.exit(main(['data', 'build', {str(tmp_path / 'in.jsonl')!r}, '--workers', '1',"
        f" '--tokenizer', {str(tmp_path / 'tokenizer')!r}, '--output-dir', {str(tmp_path / 'store')!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert done.returncode == 2, done.stderr
    assert f"Cannot write {tmp_path / 'store'}" in done.stderr and "ulimit -f" in done.stderr, done.stderr
    assert "in.jsonl" not in done.stderr.splitlines()[-1]
