"""The experiment of effects.py that needs two processes: norms and the number of images in each."""

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import nn

import batchnorm_ext
from effects_runs import Result, X, Y, accuracy

MAKE = {
    "BN": batchnorm_ext.BatchNorm2d,
    "SyncBN": batchnorm_ext.SyncBatchNorm,
    "GN": lambda channels: batchnorm_ext.GroupNorm(4, channels),
    "LN": lambda channels: batchnorm_ext.LayerNorm((channels, 8, 8)),
    "WN": lambda channels: nn.Identity(),  # it is the convolution's
}
BATCHES = (1, 2, 4, 16, 64)


def cnn(norm: str) -> nn.Module:
    layers, width = [nn.Unflatten(1, (1, 8, 8))], 1
    for channels in (16, 32):
        convolution = nn.Conv2d(width, channels, 3, padding=1)
        if norm == "WN":
            batchnorm_ext.weight_norm(convolution)
        layers += [convolution, MAKE[norm](channels), nn.ReLU()]
        width = channels
    return nn.Sequential(*layers, nn.AvgPool2d(2), nn.Flatten(), nn.Linear(width * 16, 10))


def accuracy_of(norm: str, batch: int, rank: int) -> float:
    """After training on two processes, whose gradients are averaged."""
    torch.manual_seed(0)
    model = cnn(norm)
    parallel = nn.parallel.DistributedDataParallel(model)
    images, labels = X[rank::2], Y[rank::2]
    order = torch.Generator().manual_seed(rank)
    optimizer = torch.optim.SGD(parallel.parameters(), 0.02, momentum=0.9)
    for _ in range(min(600, max(60, 2400 // batch))):
        chosen = torch.randint(len(images), (batch,), generator=order)
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
    loss = {norm: values[-1] - values[1] for norm, values in lines.items()}
    return Result(
        "Images per process",
        "BN suffers from small batches; GN, LN, WN and SyncBN less or not",
        "Wu & He 2018, figure 1; Salimans & Kingma 2016",
        "test accuracy at 64 less that at 2 images: "
        + ", ".join(f"{norm} {value:.1%}" for norm, value in loss.items()),
        loss["BN"] > max(loss[norm] for norm in lines if norm != "BN"),
        {"x": BATCHES, "lines": lines},
    )
