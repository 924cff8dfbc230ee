"""`jaxcoder plan`: messages for bad input, and its output without compiling."""

import json
import sys

import pytest

from jaxcoder.cli.main import main
from jaxcoder.plan import compile as plan_compile
from jaxcoder.plan.topology import parse_topology


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def refused(capsys, command: str) -> str:
    assert main(["plan", *command.split()]) == 2
    text = capsys.readouterr().err
    assert "Traceback" not in text and text.strip().count("\n") == 0
    return text


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("", "CONFIG is missing"),
        ("starcoderbase", "--topology is missing: give one, such as `--topology v5p:8x8x8`"),
        ("starcoderbas --topology v5p:8x8x8", "did you mean `starcoderbase`"),
        ("starcoderbase --topology v5p:8x8x9", "there is no topology `v5p:8x8x9`: the nearest are v5p:8x8x8"),
        ("starcoderbase --topology v5q:8x8x8", "did you mean `v5p`"),
        ("starcoderbase --topology v5p:4x4x4 --mesh.fsdp 60", "is 60 devices and v5p:4x4x4 has 64"),
        ("starcoderbase --topology v5p:4x4x4 --mesh.fsdp 16", "is 16 devices and v5p:4x4x4 has 64"),
        ("starcoderbase --topology v5p:4x4x4 --mesh.tensor 5", "64 devices"),
        ("starcoderbase --topology v5p:4x4x4 --mesh.tensor 32", "num_heads 48"),
        ("starcoderbase --topology v5p:4x4x4 --global-batch-size 32", "global_batch_size 32 is not a multiple of"),
        ("starcoderbase --topology v5p:4x4x4 --microbatch-size 192", "microbatch_size 192 does not divide"),
        ("starcoderbase --topology v5p:4x4x4 --slices 2", "not a multiple of 2 slices"),
        ("starcoderbase --topology v5p:4x4x4 --slices 0", "--slices is 0"),
        ("starcoderbase --topology h100:8x8 --slices 2", "--slices is for TPUs"),
        ("starcoderbase --topology v5p:4x4x4 --minutes 0", "--minutes is 0"),
        ("starcoderbase --topology v5p:4x4x4 --compile-all", "--compile-all is for --search"),
        ("starcoderbase --topology v5p:4x4x4 --search --compile-all --no-compile", "--compile-all is for --search"),
        ("starcoderbase --topology v5p:4x4x12 --search --no-compile", "global_batch_size 512 is not a multiple"),
        ("starcoderbase --topology v5p:4x4x4 --network -1", "--network is -1"),
        ("starcoderbase --topology v5p:4x4x4 --no-compile --json no/place", "--json no/place cannot be written"),
        ("starcoderbase --topology v5p:4x4x4 --mesh.fspd 4", "did you mean `--mesh.fsdp`"),
    ],
)
def test_bad_input_is_one_sentence(capsys, command, expected):
    assert expected in refused(capsys, command)


def test_without_libtpu(capsys, monkeypatch):
    monkeypatch.setattr(plan_compile, "find_spec", lambda name: None)
    monkeypatch.setattr(plan_compile.platform, "system", lambda: "Linux")
    monkeypatch.setattr(plan_compile.platform, "machine", lambda: "x86_64")
    assert "[plan]" in refused(capsys, "smoke --topology v5e:1x1")
    assert "[plan]" in refused(capsys, "smoke --topology v5e:1x1 --search")
    assert "[cuda]" in refused(capsys, "smoke --topology h100:1x8")


def test_where_libtpu_has_no_wheels(capsys, monkeypatch):
    monkeypatch.setattr(plan_compile, "find_spec", lambda name: None)
    monkeypatch.setattr(plan_compile.platform, "system", lambda: "Darwin")
    monkeypatch.setattr(plan_compile.platform, "machine", lambda: "arm64")
    text = refused(capsys, "smoke --topology v5e:1x1")
    assert "wheels for Linux on x86_64 only, and this is Darwin on arm64" in text and "--no-compile" in text
    assert "wheels for Linux on x86_64 and aarch64 only" in refused(capsys, "smoke --topology h100:1x8")


def test_the_model_alone(capsys, tmp_path):
    command = "plan starcoderbase --topology v5p:8x8x8 --no-compile --json plan.json"
    assert main(command.split()) == 0
    text = capsys.readouterr().out
    assert "(compiled" not in text.split("by formula.")[1] and "(modelled)" in text
    for expected in ("15,517,456,384", "1.049e+11 a token", "512 x TPU v5p", "XLA options", "chip hours", "verdict"):
        assert expected in text
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert plan["compiled"] is None and plan["fits"] and plan["topology"]["chips"] == 512
    assert plan["seconds"]["fast"] <= plan["seconds"]["expected"] <= plan["seconds"]["slow"]
    tokens = plan["tokens_per_second_per_chip"] * 512 * plan["days"]["expected"] * 86400
    assert tokens == pytest.approx(plan["tokens"])


def test_what_does_not_fit_gets_a_way_that_does(capsys):
    assert main(["plan", "starcoderbase", "--topology", "v5e:16x16", "--no-compile"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "does not fit" in text
    assert "with --microbatch-size 256 --compute.remat block it does, and should take" in text


def test_what_cannot_fit(capsys):
    command = "plan starcoderbase --topology v5e:2x2 --global-batch-size 4 --no-compile"
    assert main(command.split()) == 1
    assert "take more chips or chips with more memory" in " ".join(capsys.readouterr().out.split())


def test_search_without_compiling(capsys):
    assert main(["plan", "starcoderbase", "--topology", "v6e:8x8", "--search", "--no-compile"]) == 0
    text = capsys.readouterr().out
    assert "should fit" in text and "best" in text and "--compute.remat" in text


def test_calibration(capsys):
    assert main(["plan", "--calibration"]) == 0
    text = capsys.readouterr().out
    assert "Llama 2 7B, 8 x H100" in text and "what is missing" in text


class TestCompilerProcess:
    """Errors of a compiler that writes no answer."""

    def run(self, monkeypatch, program: str, **options):
        monkeypatch.setattr(plan_compile, "check_compiler", lambda topology: None)
        monkeypatch.setattr(plan_compile, "COMPILER", (sys.executable, "-c", program))
        from jaxcoder_configs.smoke import smoke

        with pytest.raises(plan_compile.JaxcoderError) as raised:
            plan_compile.compile_step(smoke(), parse_topology("v5e:1x1"), use_cache=False, **options)
        return str(raised.value)

    def test_that_aborts(self, monkeypatch):
        program = "import os, sys; print('F1121 12:00:00 check failed', file=sys.stderr, flush=True); os.abort()"
        text = self.run(monkeypatch, program)
        assert "compiling for v5e:1x1 failed (exit code -6)" in text and "check failed" in text

    def test_that_is_killed(self, monkeypatch):
        assert "probably out of host memory" in self.run(monkeypatch, "import os; os.kill(os.getpid(), 9)")

    def test_that_takes_too_long(self, monkeypatch):
        text = self.run(monkeypatch, "import time; time.sleep(60)", time_limit=0.5)
        assert "exceeded 0 seconds" in text and "--minutes" in text
