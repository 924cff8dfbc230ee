"""The roster over sockets: missing processes are named, other connections ignored."""

import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from jaxcoder.errors import ConfigError, JaxcoderError
from jaxcoder.runtime import roster
from jaxcoder.runtime.processes import Processes
from jaxcoder.runtime.roster import gather_roster, report_to_roster


def process(port: int, index: int, count: int, hosts=None) -> Processes:
    return Processes(coordinator=f"127.0.0.1:{port}", count=count, index=index, source="a test", hosts=hosts)


@pytest.fixture
def port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


def test_all_are_released_together(port):
    """In any order; the port is free again for JAX."""
    with ThreadPoolExecutor(8) as pool:
        early = [pool.submit(report_to_roster, process(port, index, 8), 60) for index in (7, 3, 5)]
        time.sleep(0.3)
        gathering = pool.submit(gather_roster, process(port, 0, 8), 60)
        late = [pool.submit(report_to_roster, process(port, index, 8), 60) for index in (1, 2, 4, 6)]
        assert gathering.result() == [socket.gethostname()] * 8
        for answer in early + late:
            assert answer.result() is None
    socket.create_server(("", port)).close()


def test_missing_processes_are_logged_and_named(port, monkeypatch, caplog):
    caplog.set_level("INFO", "jaxcoder")
    monkeypatch.setattr(roster, "FIRST_LOG", 1.5)
    with ThreadPoolExecutor(2) as pool:
        answer = pool.submit(report_to_roster, process(port, 1, 4), 60)
        with pytest.raises(
            JaxcoderError, match=r"processes 2 \(host-c\), 3 \(host-d\) of 4 did not arrive within 3 sec"
        ):
            gather_roster(process(port, 0, 4, ("host-a", "host-b", "host-c", "host-d")), 3)
        with pytest.raises(JaxcoderError, match=r"process 0 reports: processes 2 .* did not arrive"):
            answer.result()
    assert caplog.messages == ["Waiting for processes 2 (host-c), 3 (host-d) of 4."]


def test_two_with_one_index_and_another_count(port):
    for index, count, problem in (
        (1, 3, "two processes have the index 1"),
        (2, 4, "started for 4 processes and process 0"),
    ):
        with ThreadPoolExecutor(3) as pool:
            gathering = pool.submit(gather_roster, process(port, 0, 3), 20)
            first = pool.submit(report_to_roster, process(port, 1, 3), 20)
            time.sleep(0.5)
            other = pool.submit(report_to_roster, process(port, index, count), 20)
            with pytest.raises(ConfigError, match=problem):
                gathering.result()
            for answer in (first, other):
                with pytest.raises(JaxcoderError, match=problem):
                    answer.result()


@pytest.mark.parametrize(
    "noise", [b"", b"GET / HTTP/1.1\r\n\r\n", b"\x00" * 1000, b"jaxcoder x 2 h\n", b"jaxcoder 1 2"]
)
def test_other_connections_are_ignored(port, noise):
    with ThreadPoolExecutor(2) as pool:
        gathering = pool.submit(gather_roster, process(port, 0, 2), 20)
        for _ in range(50):
            try:
                with socket.create_connection(("127.0.0.1", port)) as stranger:
                    stranger.sendall(noise)
                break
            except ConnectionRefusedError:
                time.sleep(0.05)
        answer = pool.submit(report_to_roster, process(port, 1, 2), 20)
        assert len(gathering.result()) == 2 and answer.result() is None


def test_a_process_that_exits_while_waiting_is_missing(port):
    with ThreadPoolExecutor(2) as pool:
        gathering = pool.submit(gather_roster, process(port, 0, 3), 20)
        time.sleep(0.3)
        with socket.create_connection(("127.0.0.1", port)) as dying:
            dying.sendall(b"jaxcoder 1 3 host-b\n")
            time.sleep(0.3)
        answers = [threading.Thread(target=report_to_roster, args=(process(port, index, 3), 20)) for index in (1, 2)]
        for answer in answers:
            answer.start()
        assert len(gathering.result()) == 3
        for answer in answers:
            answer.join()
