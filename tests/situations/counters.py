"""num_batches_tracked of every type and size."""

import torch

from situations.harness import attempt, caught, situation
from situations.parts import batch, numbered, step

COUNTERS = {
    "float": lambda: torch.tensor(2.5),
    "int32": lambda: torch.tensor(2, dtype=torch.int32),
    "uint8 about to overflow": lambda: torch.tensor(255, dtype=torch.uint8),
    "bool": lambda: torch.tensor(False),
    "half": lambda: torch.tensor(2.0).half(),
    "double": lambda: torch.tensor(2.0).double(),
    "one element in one dimension": lambda: torch.tensor([2]),
    "one element in two dimensions": lambda: torch.tensor([[2]]),
    "three elements": lambda: torch.tensor([2, 3, 4]),
    "none": lambda: torch.tensor([], dtype=torch.int64),
    "None": lambda: None,
    "on meta": lambda: torch.tensor(2, device="meta"),
    "a view": lambda: torch.arange(6)[2],
    "with a gradient": lambda: torch.tensor(2.0, requires_grad=True),
    "in shared memory": lambda: torch.tensor(2).share_memory_(),
    "complex": lambda: torch.tensor(2 + 0j),
}

for what, make in COUNTERS.items():

    @situation(f"counter: {what}")
    def _(lib, make=make):
        def run(momentum, training):
            layer = numbered(lib.BatchNorm1d(3, momentum=momentum)).train(training)
            layer.num_batches_tracked = make()
            y = attempt(layer, batch(4, 3))
            return {"y": y, "buffers": dict(layer.named_buffers())}

        return {
            (momentum, training): caught(run, momentum, training)
            for momentum in (0.1, None)
            for training in (True, False)
        }


@situation("counter: a number in place of a buffer")
def _(lib):
    def run(value):
        layer = lib.BatchNorm1d(3)
        del layer.num_batches_tracked
        layer.num_batches_tracked = value
        return layer(batch(4, 3))

    return [caught(run, value) for value in (0, 0.5)]


@situation("counter: at the largest int64")
def _(lib):
    layer = lib.BatchNorm1d(3)
    layer.num_batches_tracked.fill_(torch.iinfo(torch.int64).max)
    return step(layer, batch(4, 3))


@situation("counter: is the same tensor after a step")
def _(lib):
    layer = lib.BatchNorm1d(3)
    before = layer.num_batches_tracked
    layer(batch(4, 3))
    return layer.num_batches_tracked is before, before, before._version
