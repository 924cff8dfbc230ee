"""Hosts that do not agree: each difference is one sentence with both values, in every process, before any step."""

import math
import os
import socket
import subprocess
import sys
import time
from dataclasses import replace

import pytest
from jaxcoder_configs.smoke import smoke

from jaxcoder.config import MeshConfig
from jaxcoder.errors import ConfigError, DataError, JaxcoderError
from jaxcoder.train import host_check
from jaxcoder.train.memory_estimate import abstract_state_on, saved_bytes
from jaxcoder.train.state import flatten_state


class TwoHosts:
    """ProcessGroup whose second process differs as told: `alter` gets what it would have handed in."""

    count, index = 2, 0

    def __init__(self, alter):
        self.alter = alter

    def name(self, index: int) -> str:
        return f"process {index} (host-{'ab'[index]})"

    def agree(self, topic, mine, decide):
        return decide([mine, self.alter(topic, mine)])


def changed(group: str, name: str, value: str):
    def alter(topic, facts):
        return {key: dict(entry) | ({name: value} if key == group else {}) for key, entry in facts.items()}

    return TwoHosts(alter)


@pytest.mark.parametrize(
    ("group", "name", "value", "expected"),
    [
        ("configuration", "optimizer.peak_learning_rate", "0.5",
         r"process 1 \(host-b\) has optimizer.peak_learning_rate 0.5 and process 0 \(host-a\) 0.001. Start all"),
        ("software", "the source of jaxcoder", "abc",
         r"process 1 \(host-b\) has the source of jaxcoder abc and .*Install"),
        ("software", "jax", "0.0.1", r"has jax 0.0.1 and process 0"),
        ("devices", "devices", "3 x TPU v5", r"has devices 3 x TPU v5 and process 0 .* cpu. Give the run hosts"),
    ],
)  # fmt: skip
def test_what_differs_is_named(group, name, value, expected):
    with pytest.raises(ConfigError, match=expected):
        host_check.check_configuration(smoke(), changed(group, name, value), lambda: None)


def test_agreement_goes_on_to_the_decision():
    same = TwoHosts(lambda topic, facts: facts)
    asked: list[int] = []
    host_check.check_configuration(smoke(), same, lambda: asked.append(1))
    assert asked == [1]


def test_other_data_is_named():
    class Store:
        path, manifest = "/data/store", {"files": 1}

    class Held:
        stream = type("Stream", (), {"stores": [Store]})

    with pytest.raises(
        DataError, match=r"process 1 \(host-b\) has another version of the token store /data/store than"
    ):
        host_check.check_data(None, [Held], TwoHosts(lambda topic, facts: dict.fromkeys(facts, "other")))


def test_clocks_are_warned_of_and_no_more(caplog):
    late = TwoHosts(lambda topic, mine: mine if mine is None else mine - 90)
    host_check.check_clocks(late)
    assert caplog.messages == [
        "the clock of process 1 (host-b) is 90 seconds behind that of process 0 (host-a): set both by NTP, or "
        "logs mislead."
    ]


def test_a_disk_without_room_for_one_checkpoint(tmp_path):
    host_check.check_disk(str(tmp_path / "not" / "yet"), 1000)
    host_check.check_disk("gs://bucket/run", 1 << 70)
    with pytest.raises(
        JaxcoderError, match=r"has \d+\.\d GiB free and one checkpoint needs [\d.]+ TiB: free some space"
    ):
        host_check.check_disk(str(tmp_path / "not" / "yet"), 1 << 60)


def test_the_source_is_hashed_whole():
    assert len(host_check.source_hash()) == 12 and host_check.source_hash() == host_check.source_hash()


def test_two_real_processes_with_two_learning_rates(tmp_path):
    """Both say so and end with 2, and nothing has been written."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port = listening.getsockname()[1]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}
    processes = []
    for index, rate in enumerate(("0.001", "0.002")):
        command = [
            sys.executable, "-m", "jaxcoder.cli.main", "train", "smoke", "--data", "synthetic",
            "--output-dir", str(tmp_path / "run"), "--optimizer.peak-learning-rate", rate,
            "--coordinator", f"127.0.0.1:{port}", "--num-processes", "2", "--process-id", str(index),
        ]  # fmt: skip
        processes.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
    began = time.monotonic()
    for process in processes:
        errors = process.communicate(timeout=240)[1]
        expected = "has optimizer.peak_learning_rate 0.002 and process 0"
        assert process.returncode == 2 and expected in errors, errors
    assert not (tmp_path / "run").exists() and time.monotonic() - began < 240


def test_a_checkpoint_has_the_size_that_is_checked():
    config = replace(smoke(), mesh=MeshConfig(data=1, fsdp=1, tensor=1))
    arrays = flatten_state(abstract_state_on(config.mesh, config)).values()
    whole = sum(math.prod(array.shape) * array.dtype.itemsize for array in arrays)
    assert whole == pytest.approx(saved_bytes(config), rel=1e-3)
