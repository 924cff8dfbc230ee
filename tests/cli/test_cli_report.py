"""`jaxcoder report` and `jaxcoder doctor`: on a trained run, with injected damage, and their errors."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from jaxcoder.cli.main import main


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of the smallest configuration on random tokens: twelve steps, saved every six."""
    path = tmp_path_factory.mktemp("report") / "run"
    options = ["--steps", "12", "--checkpoint.save-every-steps", "6", "--output-dir", str(path)]
    command = [sys.executable, "-m", "jaxcoder.cli.main", "train", "smoke", "--data", "synthetic", *options]
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": "1"}  # one device: a program that compiles quickly
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stderr
    return path


@pytest.fixture
def run(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "run")


def printed(capsys, *arguments) -> str:
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 0
    return capsys.readouterr().out


def test_report_of_a_run(run, capsys):
    out = printed(capsys, "report", run)
    page = (run / "report.html").read_text()
    assert str(run / "report.html") in out and "12 of 12 (100%)" in out and "parameters" in out
    assert page.startswith("<!DOCTYPE html>") and page.count("<svg") >= 5 and "12 of 12 (100%)" in page
    loss = json.loads((run / "metrics.jsonl").read_text().split("\n")[0])["loss"]
    assert f"{loss:.1f}"[:2] in out


def test_report_elsewhere_and_text_alone(run, tmp_path, capsys):
    printed(capsys, "report", run, "--output", tmp_path / "new" / "page.html")
    assert (tmp_path / "new" / "page.html").is_file() and not (run / "report.html").exists()
    assert "The page" not in printed(capsys, "report", run, "--text") and not (run / "report.html").exists()


def test_doctor_of_an_undamaged_run(run, capsys):
    out = printed(capsys, "doctor", run, "--verify")
    assert "smoke" in out and "ERROR" not in out and "damaged_checkpoints" not in out


def test_doctor_finds_injected_damage(run, capsys):
    (run / "checkpoints" / "6" / "manifest.json").unlink()
    torn = max((run / "checkpoints" / "12" / "state").rglob("*"), key=lambda path: path.stat().st_size)
    torn.write_bytes(torn.read_bytes()[:-7])
    lines = (run / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    for record in records:
        if record.get("step") in (4, 5) and "loss" in record:
            record |= {"loss": "NaN", "skipped": 1}
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    out = printed(capsys, "doctor", run)
    assert "2 checkpoints of 2 cannot be used." in out and "none is complete" in out
    assert "step 4 to 5" in out and f"jaxcoder data trace {run} --step 4" in out
    found = json.loads(printed(capsys, "doctor", run, "--json"))
    assert {finding["rule"] for finding in found} >= {"damaged_checkpoints", "skipped_steps"}
    assert found[0]["severity"] == "error" and all(finding["try_next"] for finding in found)


def test_a_flipped_byte_needs_verify(run, capsys):
    file = max((run / "checkpoints" / "12" / "state").rglob("*"), key=lambda path: path.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(bytes(content))
    assert "damaged_checkpoints" not in printed(capsys, "doctor", run)
    assert "was altered" in " ".join(printed(capsys, "doctor", run, "--verify").split())


@pytest.mark.parametrize("verb", ["report", "doctor"])
def test_not_a_run(verb, tmp_path, capsys):
    for place in (tmp_path, tmp_path / "nowhere"):
        assert main([verb, str(place)]) == 2
        error = capsys.readouterr().err
        assert "is no run" in error and error.strip().count("\n") == 0 and "Traceback" not in error


def test_options_that_exclude_each_other(run, capsys):
    assert main(["report", str(run), "--text", "--output", "x.html"]) == 2
    assert "give one of them" in capsys.readouterr().err


def test_an_output_that_cannot_be_written(run, capsys):
    (run / "file").write_text("")
    assert main(["report", str(run), "--output", str(run / "file" / "page.html")]) == 2
    assert "Cannot write to" in capsys.readouterr().err


@pytest.fixture
def bucket(monkeypatch, tmp_path):
    """The address of an empty bucket on an S3-compatible server of this machine."""
    s3fs = pytest.importorskip("s3fs", reason="needs the extra `s3`")
    server = pytest.importorskip("moto.server", reason="needs moto, a local S3-compatible server")
    server = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    settings = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "someone",
        "AWS_SECRET_ACCESS_KEY": "something",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": str(tmp_path / "none"),
        "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "none"),
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    s3fs.S3FileSystem().mkdir("test-runs")
    yield "s3://test-runs"
    s3fs.S3FileSystem.clear_instance_cache()
    server.stop()


def test_a_run_in_a_bucket(run, bucket, capsys):
    import fsspec

    filesystem, inside = fsspec.url_to_fs(f"{bucket}/run")
    filesystem.put(f"{run}/", inside, recursive=True)
    assert f"The page: {bucket}/run/report.html" in printed(capsys, "report", f"{bucket}/run")
    assert filesystem.cat_file(f"{inside}/report.html").startswith(b"<!DOCTYPE html>")
    filesystem.rm_file(f"{inside}/checkpoints/6/manifest.json")
    out = printed(capsys, "doctor", f"{bucket}/run")
    assert "1 checkpoint of 2 cannot be used." in out and "step 6: it has no manifest.json" in out
    assert main(["doctor", f"{bucket}/nothing"]) == 2 and "is no run" in capsys.readouterr().err
