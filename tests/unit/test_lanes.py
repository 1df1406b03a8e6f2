"""tests.support.lanes: which worker is given which file."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace

import pytest

from tests.support.lanes import Lanes

SLOW, NOMAD = "tests/contract/test_slow_clocks.py", "tests/e2e/test_nomad.py"
QUICK = ("tests/unit/test_a.py", "tests/unit/test_b.py", "tests/unit/test_c.py")


class Worker:
    """Notes what it is given, as xdist's controllers send it."""

    def __init__(self, tests: Sequence[str]) -> None:
        self.tests = tests
        self.given: list[str] = []
        self.shutting_down = False
        self.gateway = SimpleNamespace(id=f"worker-{id(self)}")

    def send_runtest_some(self, indices: Sequence[int]) -> None:
        self.given += [self.tests[index] for index in indices]

    def shutdown(self) -> None:
        self.shutting_down = True

    @property
    def files(self) -> list[str]:
        return list(dict.fromkeys(test.partition("::")[0] for test in self.given))


def started(config: pytest.Config, workers: int, *files: str, each: int = 3) -> tuple[Lanes, list[Worker]]:
    tests = [f"{file}::test_{number}" for file in files for number in range(each)]
    lanes, nodes = Lanes(config), [Worker(tests) for _ in range(workers)]
    lanes.numnodes = workers
    for node in nodes:
        lanes.add_node(node)
        lanes.add_node_collection(node, tests)
    lanes.schedule()
    return lanes, nodes


def run(lanes: Lanes, *nodes: Worker) -> None:
    """Have each worker run all that it is given, by turns, a test at a time."""
    done = dict.fromkeys(nodes, 0)
    while any(done[node] < len(node.given) for node in nodes):
        for node in nodes:
            if done[node] < len(node.given):
                done[node] += 1
                lanes.mark_test_complete(node, node.tests.index(node.given[done[node] - 1]))


@pytest.fixture
def config(pytestconfig: pytest.Config, monkeypatch: pytest.MonkeyPatch) -> pytest.Config:
    for name, value in {"tx": ["popen"], "loadscopereorder": False}.items():
        monkeypatch.setattr(pytestconfig.option, name, value)
    return pytestconfig


def test_what_waits_has_a_worker_of_its_own(config: pytest.Config) -> None:
    lanes, (first, second, waiter) = started(config, 3, SLOW, QUICK[0], NOMAD, *QUICK[1:])
    run(lanes, waiter)
    run(lanes, first, second)
    assert waiter.files == [SLOW, NOMAD]
    assert sorted(first.files + second.files) == sorted(QUICK)
    assert all(node.shutting_down for node in (first, second, waiter))


def test_a_worker_that_waited_takes_nothing_else_when_it_is_done(config: pytest.Config) -> None:
    lanes, (worker, waiter) = started(config, 2, *QUICK, SLOW)
    run(lanes, waiter)
    assert waiter.files == [SLOW] and waiter.shutting_down
    lanes.remove_node(waiter)
    run(lanes, worker)
    assert worker.files == list(QUICK)


def test_the_others_help_with_what_waits_at_the_end(config: pytest.Config) -> None:
    lanes, (worker, waiter) = started(config, 2, QUICK[0], SLOW, NOMAD)
    run(lanes, worker)
    assert worker.files == [QUICK[0], NOMAD]
    assert waiter.files == [SLOW]


def test_one_worker_runs_everything(config: pytest.Config) -> None:
    lanes, (worker,) = started(config, 1, SLOW, *QUICK)
    run(lanes, worker)
    assert sorted(worker.files) == sorted((SLOW, *QUICK))


def test_without_anything_that_waits_the_rest_is_shared_as_ever(config: pytest.Config) -> None:
    lanes, (first, second, waiter) = started(config, 3, *QUICK)
    run(lanes, first, second, waiter)
    assert sorted(first.files + second.files) == sorted(QUICK)
    assert waiter.files == [] and waiter.shutting_down


def test_what_a_worker_left_undone_goes_to_the_one_in_its_place(config: pytest.Config) -> None:
    lanes, (worker, waiter) = started(config, 2, QUICK[0], SLOW)
    assert lanes.remove_node(worker) == f"{QUICK[0]}::test_0"
    new = Worker(worker.tests)
    lanes.add_node(new)
    lanes.add_node_collection(new, worker.tests)
    lanes.schedule()
    run(lanes, new, waiter)
    assert new.files == [QUICK[0]] and waiter.files == [SLOW]
