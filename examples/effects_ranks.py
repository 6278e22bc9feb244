"""The experiment of effects.py that needs two processes: norms and the number of images in each."""

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor, nn

import batchnorm_ext
from effects_runs import Result, X, Y, accuracy

MAKE = {  # for channels and the size of their images
    "BN": lambda channels, size: batchnorm_ext.BatchNorm2d(channels),
    "SyncBN": lambda channels, size: batchnorm_ext.SyncBatchNorm(channels),
    "GN": lambda channels, size: batchnorm_ext.GroupNorm(8, channels),
    "LN": lambda channels, size: batchnorm_ext.LayerNorm((channels, size, size)),
    "WN": lambda channels, size: nn.Identity(),  # it is the convolution's
}
BATCHES = (1, 2, 4, 16, 64)
EPOCHS, LR = 3, 0.1  # the rate of the largest batch


def cnn(norm: str) -> nn.Module:
    """Images of 8x8, 4x4 and 2x2: as in networks for photographs the last ones are small."""
    layers, width, size = [nn.Unflatten(1, (1, 8, 8))], 1, 8
    for channels, stride in ((16, 1), (32, 2), (64, 2)):
        convolution = nn.Conv2d(width, channels, 3, stride, padding=1)
        if norm == "WN":
            batchnorm_ext.weight_norm(convolution)
        width, size = channels, size // stride
        layers += [convolution, MAKE[norm](width, size), nn.ReLU()]
    return nn.Sequential(*layers, nn.AvgPool2d(2), nn.Flatten(), nn.Linear(width, 10))


@torch.no_grad()
def initialize_from_data(model: nn.Module, images: Tensor) -> None:
    """So that each convolution gives mean 0 and variance 1 (Salimans & Kingma, section 3)."""
    for layer in model:
        outputs = layer(images)
        if isinstance(layer, nn.Conv2d):
            mean, std = outputs.mean((0, 2, 3)), outputs.std((0, 2, 3))
            layer.parametrizations.weight.original0 /= std[:, None, None, None]
            layer.bias.copy_((layer.bias - mean) / std)
            outputs = layer(images)
        images = outputs


def accuracy_of(norm: str, batch: int, rank: int) -> float:
    """After training on two processes, whose gradients are averaged.

    Whatever the batch, as many images are seen, the learning rate grows with the batch (Goyal et
    al. 2017), and the running statistics are averages over as many images.
    """
    torch.manual_seed(0)
    model, share = cnn(norm), batch / BATCHES[-1]
    if norm == "WN":
        initialize_from_data(model, X[:200])
    for layer in model:
        if hasattr(layer, "momentum"):
            layer.momentum = 0.1 * share
    parallel = nn.parallel.DistributedDataParallel(model)
    images, labels = X[rank::2], Y[rank::2]
    order = torch.Generator().manual_seed(rank)
    optimizer = torch.optim.SGD(parallel.parameters(), LR * share, momentum=0.9)
    for _ in range(EPOCHS):
        for chosen in torch.randperm(len(images), generator=order).split(batch):
            optimizer.zero_grad()
            F.cross_entropy(parallel(images[chosen]), labels[chosen]).backward()
            optimizer.step()
    return accuracy(model)


def _on_rank(rank: int, port: int, results: dict) -> None:
    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    for norm in MAKE:
        for batch in BATCHES:
            results[rank, norm, batch] = accuracy_of(norm, batch, rank)
    dist.destroy_process_group()


def batch_sizes() -> Result:
    port = dist.TCPStore("127.0.0.1", 0, 1, True, wait_for_workers=False).port
    with mp.Manager() as manager:
        results = manager.dict()
        mp.spawn(_on_rank, (port, results), nprocs=2)
        lines = {norm: [results[0, norm, batch] for batch in BATCHES] for norm in MAKE}
    loss = {norm: values[-1] - values[0] for norm, values in lines.items()}
    return Result(
        "Images per process",
        "BN suffers from small batches; GN, LN, WN and SyncBN less or not",
        "Wu & He 2018, figure 1; Salimans & Kingma 2016",
        "test accuracy at 64 less that at 1 image: "
        + ", ".join(f"{norm} {value:.1%}" for norm, value in loss.items()),
        loss["BN"] > 2 * max(0.0, *(loss[norm] for norm in lines if norm != "BN")),
        {"x": BATCHES, "lines": lines},
    )
