"""Graphs and streams: bitwise what eager calls one after the other give."""

import pytest
import torch

from batchnorm_ext.modules import BatchNorm2d
from gpu_cases import LARGER, assert_same, every_plan, step
from support import assert_bitwise, make_problem

pytestmark = pytest.mark.only("cuda", reason="a test of the GPU")


@every_plan
@pytest.mark.parametrize("case", LARGER, ids=str)
def test_graph_replay_is_eager(case, plan, device):
    """Captured once, replayed with other inputs and on other streams: bitwise what eager gives."""
    static = make_problem(case, device)
    step(static.clone())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = step(static)
    stream = torch.cuda.Stream()
    for seed in (1, 2, 3):
        fresh = make_problem(case, device, seed)
        static.x.copy_(fresh.x)
        static.dy.copy_(fresh.dy)
        for output in outputs:
            output.fill_(torch.nan)
        eager = static.clone()
        if seed == 3:
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                graph.replay()
            torch.cuda.current_stream().wait_stream(stream)
        else:
            graph.replay()
        assert_same(outputs, step(eager))
        for name, value in eager.state.items():
            assert_bitwise(name, static.state[name], value)


def test_graph_through_autograd(device):
    module = BatchNorm2d(16, device=device)
    x = torch.randn(8, 16, 14, 14, device=device, requires_grad=True)
    leaves = [x, module.weight, module.bias]

    def gradients():
        return torch.autograd.grad(module(x).pow(3).sum(), leaves)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # as the documentation of torch.cuda.graph has it
            gradients()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = gradients()
    for _ in range(2):
        with torch.no_grad():
            x.normal_()
        before = {name: value.clone() for name, value in module.state_dict().items()}
        graph.replay()
        after = {name: value.clone() for name, value in module.state_dict().items()}
        assert after["num_batches_tracked"] == before["num_batches_tracked"] + 1
        module.load_state_dict(before)
        for name, a, b in zip(["dx", "dweight", "dbias"], captured, gradients(), strict=True):
            assert_bitwise(name, a, b)
        for name, value in module.state_dict().items():
            assert_bitwise(name, after[name], value)


@every_plan
def test_streams_at_once(plan, device):
    """Blocks of two launches share the chip: neither may wait for, or write over, the other's."""
    problems = [make_problem(case, device, seed) for seed, case in enumerate(LARGER[-4:-1])]
    expected = [step(problem.clone()) for problem in problems]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in problems]
    results = []
    for _ in range(20):
        for stream, problem, outputs in zip(streams, problems, expected, strict=True):
            with torch.cuda.stream(stream):
                results.append((step(problem.clone()), outputs))
    torch.cuda.synchronize()
    for actual, outputs in results:
        assert_same(actual, outputs)


def test_streams_replaying_graphs_at_once(device):
    problems = [make_problem(case, device, seed) for seed, case in enumerate(LARGER[-4:-1])]
    expected = [step(problem.clone()) for problem in problems]
    graphs, outputs = [], []
    for problem in problems:
        graphs.append(torch.cuda.CUDAGraph())
        with torch.cuda.graph(graphs[-1]):
            outputs.append(step(problem))
    streams = [torch.cuda.Stream() for _ in problems]
    torch.cuda.synchronize()
    for _ in range(20):
        for stream, graph in zip(streams, graphs, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
    torch.cuda.synchronize()
    for actual, wanted in zip(outputs, expected, strict=True):
        assert_same(actual, wanted)
