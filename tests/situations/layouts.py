"""Inputs of every memory format, dense or not, and of other layouts than strided."""

import re
import warnings

import torch
from torch.utils import mkldnn

from situations.harness import attempt, caught, situation
from situations.parts import batch, numbered, state, step

IMAGES = {
    "channels_last": lambda x: x.to(memory_format=torch.channels_last),
    "every second row": lambda x: x.repeat_interleave(2, 2)[:, :, ::2],
    "every second sample": lambda x: x.repeat_interleave(2, 0)[::2],
    "every second channel": lambda x: x.repeat_interleave(2, 1)[:, ::2],
    "a crop": lambda x: torch.nn.functional.pad(x, (1, 1, 1, 1))[:, :, 1:-1, 1:-1],
    "a crop of channels_last": lambda x: torch.nn.functional.pad(x, (1, 1, 1, 1)).to(
        memory_format=torch.channels_last
    )[:, :, 1:-1, 1:-1],
    "with an offset": lambda x: torch.cat([torch.zeros(1), x.flatten()])[1:].view(x.shape),
    "flipped": lambda x: x.flip(0),
    "expanded over the batch": lambda x: x[:1].expand(4, -1, -1, -1),
    "expanded over the images": lambda x: x[:, :, :1, :1].expand(-1, -1, 2, 2),
    "expanded over the channels": lambda x: x[:, :1].expand(-1, 3, -1, -1),
    "overlapping windows": lambda x: x.flatten().as_strided((4, 3, 2, 2), (3, 5, 2, 1)),
    "a single value everywhere": lambda x: torch.full((1, 1, 1, 1), 2.0).expand(4, 3, 2, 2),
    "ambiguous strides": lambda x: x[:, :, :1, :1],
    "ambiguous strides of channels_last": lambda x: x[:, :, :1, :1].to(
        memory_format=torch.channels_last
    ),
    "channels first in memory": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "images transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "samples last in memory": lambda x: x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
    "conjugated twice": lambda x: x.conj().conj(),
    "with the negative bit": lambda x: torch.complex(x, -x).conj().imag,
    "the real part of a complex tensor": lambda x: torch.complex(x, x + 1).real,
}

for what, lay_out in IMAGES.items():

    @situation(f"memory: {what}", scale=1e-5**-0.5 if what == "a single value everywhere" else 4)
    def _(lib, lay_out=lay_out):
        layer = numbered(lib.BatchNorm2d(3))
        x = lay_out(batch(4, 3, 2, 2))
        return step(layer, x), layer.eval()(x)


@situation("memory: the gradient alone has another format")
def _(lib):
    def run(lay_out):
        layer = numbered(lib.BatchNorm2d(3))
        x = batch(4, 3, 2, 2).requires_grad_()
        y = layer(x)
        (dx,) = torch.autograd.grad(y, x, lay_out(batch(4, 3, 2, 2).cos()))
        return dx

    names = ["channels_last", "every second row", "expanded over the batch", "a crop"]
    return {name: run(IMAGES[name]) for name in names}


@situation("memory: the input alone is channels_last, and its gradient")
def _(lib):
    layer = numbered(lib.BatchNorm2d(3))
    x = IMAGES["channels_last"](batch(4, 3, 2, 2)).requires_grad_()
    return torch.autograd.grad(layer(x), [x, layer.weight], batch(4, 3, 2, 2).cos())


@situation("memory: the gradient of a sum, which is expanded", scale=8)
def _(lib):
    layer = numbered(lib.BatchNorm2d(3))
    x = batch(4, 3, 2, 2).requires_grad_()
    return torch.autograd.grad(layer(x).sum(), [x, layer.weight, layer.bias])


@situation("memory: (N, C) transposed")
def _(lib):
    return step(numbered(lib.BatchNorm1d(3)), batch(3, 8).t())


@situation("memory: (N, L, C) transposed")
def _(lib):
    return step(numbered(lib.BatchNorm1d(3)), batch(4, 5, 3).transpose(1, 2))


@situation("memory: channels_last_3d")
def _(lib):
    x = batch(2, 3, 2, 2, 2).to(memory_format=torch.channels_last_3d)
    return step(numbered(lib.BatchNorm3d(3)), x)


@situation("memory: layer.to(memory_format=channels_last)")
def _(lib):
    layer = numbered(lib.BatchNorm2d(3)).to(memory_format=torch.channels_last)
    return step(layer, IMAGES["channels_last"](batch(4, 3, 2, 2)))


@situation("sparse: COO, CSR, CSC")
def _(lib):
    def run(x, training):
        return attempt(numbered(lib.BatchNorm1d(3)).train(training), x)

    x = batch(4, 3).relu()
    sparse = {"coo": x.to_sparse(), "csr": x.to_sparse_csr(), "csc": x.to_sparse_csc()}
    return {(n, t): caught(run, s, t) for n, s in sparse.items() for t in (True, False)}


@situation("mkldnn: training and evaluation")
def _(lib):
    def run(training):
        layer = numbered(lib.BatchNorm2d(3)).train(training)
        return attempt(layer, batch(4, 3, 2, 2).to_mkldnn()), state(layer)

    return caught(run, True), caught(run, False)


@situation("mkldnn: the layer made by torch.utils.mkldnn")
def _(lib):
    model = lib.switch(torch.nn.Sequential(numbered(torch.nn.BatchNorm2d(3))).eval())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PyTorch's own use of TorchScript, once in a process
        made = mkldnn.to_mkldnn(model)
    return type(made[0]).__name__, made(batch(4, 3, 2, 2).to_mkldnn())


@situation("quantized input")
def _(lib):
    x = torch.quantize_per_tensor(batch(4, 3, 2, 2), 0.1, 0, torch.qint8)
    return [
        caught(attempt, numbered(lib.BatchNorm2d(3)).train(training), x)
        for training in (True, False)
    ]


@situation("nested tensors")
def _(lib):
    def run(layout, training):
        x = torch.nested.nested_tensor([batch(2, 3), batch(5, 3)], layout=layout)
        return attempt(numbered(lib.BatchNorm1d(3)).train(training), x)

    results = {
        (layout, t): caught(run, layout, t)
        for layout in (torch.strided, torch.jagged)
        for t in (True, False)
    }
    for raised in results.values():
        raised.text = re.sub(r"j\d+", "j", raised.text)  # the sizes of jagged tensors are numbered
    return results


@situation("output: its own memory, no view, and its version")
def _(lib):
    layer, x = numbered(lib.BatchNorm2d(3)), batch(4, 3, 2, 2)
    y = layer(x)
    return y.data_ptr() == x.data_ptr(), y._is_view(), y._version, y.storage_offset()


@situation("output: its storage is of its size")
def _(lib):
    y = numbered(lib.BatchNorm2d(3))(batch(4, 3, 2, 2))
    return y.untyped_storage().nbytes(), y.untyped_storage().resizable()


@situation("output: resized and set in place")
def _(lib):
    y = numbered(lib.BatchNorm2d(3)).eval()(batch(4, 3, 2, 2)).detach()
    y.resize_(2, 2)
    z = numbered(lib.BatchNorm2d(3)).eval()(batch(4, 3, 2, 2)).detach()
    z.set_(torch.ones(3))
    return y, z


@situation("output: on shared memory")
def _(lib):
    y = numbered(lib.BatchNorm2d(3))(batch(4, 3, 2, 2)).detach()
    return y.is_shared(), y.share_memory_().is_shared(), y
