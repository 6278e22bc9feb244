"""Counters are shared by launches that never run at once, and graphs that are gone leave none."""

from __future__ import annotations

from pathlib import Path

import pytest

from emulator.harness import HERE, build, run
from programs import CSRC, MODES, Result, skip_without

CASES = [
    "launches_on_a_stream_share_counters",
    "graphs_that_are_gone_leave_nothing",
    "graphs_that_are_there_share_nothing",
    "branches_of_a_graph_share_nothing",
    "what_is_outgrown_is_in_use_until_the_graph_is_gone",
    "counters_stay_on_their_device",
    "failure_leaves_the_counters_to_the_next_launch",
    "graphs_may_end_in_any_thread",
]


@pytest.fixture(scope="module", params=MODES)
def program(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    skip_without(request.param)
    directory = tmp_path_factory.mktemp("counters")
    return build(HERE / "counters.cpp", request.param, include=[CSRC], directory=directory)


@pytest.mark.parametrize("case", CASES)
def test_counters(program, case):
    assert run(program, case) == Result(0, "", "")
