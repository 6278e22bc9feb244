"""Train a small residual network on scikit-learn's handwritten digits.

    python examples/train.py --norm ours --epochs 8 --json run.json

The data are the 1797 real 8x8 images of `sklearn.datasets.load_digits` (the test set of Alpaydin
and Kaynak, Optical Recognition of Handwritten Digits, UCI, 1998), shown at 32x32. The network
follows He et al., Deep Residual Learning for Image Recognition, 2015 (section 4.2), and Batch
Normalization is that of Ioffe and Szegedy, 2015. `demo.py` imports everything from here.
"""

import argparse
import json
import os
import re
import statistics
import time
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile, record_function
from tqdm import tqdm

import batchnorm_ext

NORMS = ("native", "ours", "none")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Digits(NamedTuple):
    """Images `[N, 1, 32, 32]` in fp32 and labels `[N]`, split into training and test set."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor


def load_data(seed: int, size: int = 32) -> Digits:
    """Load, upsample and standardise the digits; `seed` alone decides the 80/20 split."""
    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8)
    x = F.interpolate(x, size=size, mode="bilinear", align_corners=False)
    y = torch.tensor(labels)
    train, test = train_test_split(
        torch.arange(len(y)), test_size=0.2, random_state=seed, stratify=labels
    )
    std, mean = torch.std_mean(x[train])
    x = (x - mean) / std
    return Digits(x[train], y[train], x[test], y[test])


def conv_norm(inputs: int, outputs: int, kernel: int, stride: int, norm: bool) -> nn.Sequential:
    """A convolution and its norm; without the norm the convolution has a bias in its place."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)
    # He et al., Delving Deep into Rectifiers, 2015: the run without a norm could not learn at all
    # from torch's default, with which the signal fades from layer to layer.
    nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
    if norm:
        return nn.Sequential(conv, nn.BatchNorm2d(outputs))
    # At zero, as BN's own bias: a random one would shift the draws of all later weights.
    conv.bias = nn.Parameter(torch.zeros(outputs))
    return nn.Sequential(conv, nn.Identity())


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut, which is projected where the shape changes.

    The activation is smooth (SiLU): at the kink of ReLU differences as small as rounding flip
    gradients on and off, so that two correct runs part after a few steps.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, norm: bool):
        super().__init__()
        self.first = conv_norm(inputs, outputs, 3, stride, norm)
        self.second = conv_norm(outputs, outputs, 3, 1, norm)
        same = inputs == outputs and stride == 1
        self.shortcut = nn.Identity() if same else conv_norm(inputs, outputs, 1, stride, norm)

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(self.second(F.silu(self.first(x))) + self.shortcut(x))


def build_model(norm: str, seed: int, width: int = 16, blocks: int = 2) -> nn.Module:
    """Build the network with `norm` out of `NORMS`; a seed gives all three the same weights."""
    torch.manual_seed(seed)
    has_norm = norm != "none"
    layers: list[nn.Module] = [conv_norm(1, width, 3, 1, has_norm), nn.SiLU()]
    channels = width
    for stage in range(3):
        for block in range(blocks):
            stride = 2 if stage > 0 and block == 0 else 1
            layers.append(Block(channels, width * 2**stage, stride, has_norm))
            channels = width * 2**stage
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10))
    return batchnorm_ext.convert(model) if norm == "ours" else model


@dataclass
class History:
    """What a run has recorded so far: a loss per step, the rest per epoch."""

    losses: list[float] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    norm_share: float = 0.0

    @property
    def epoch_seconds(self) -> float:
        """Median training time of an epoch; the first, which warms caches up, weighs little."""
        return statistics.median(self.seconds)

    @property
    def norm_seconds(self) -> float:
        """The part of `epoch_seconds` spent in BN."""
        return self.norm_share * self.epoch_seconds


class Trainer:
    """One training run that its caller advances epoch by epoch.

    Args:
        norm: one of `NORMS`.
        options: the parsed options of `add_arguments`.
        data: the result of `load_data`.
    """

    def __init__(self, norm: str, options: argparse.Namespace, data: Digits):
        self.norm = norm
        self.options = options
        self.device = torch.device(options.device)
        layout = torch.channels_last if options.channels_last else torch.contiguous_format
        self.model = build_model(norm, options.seed).to(self.device, memory_format=layout)
        self.data = Digits(*(part.to(self.device) for part in data))
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=options.lr, momentum=0.9)
        self.order = torch.Generator().manual_seed(options.seed)
        self.history = History()

    @property
    def steps_per_epoch(self) -> int:
        """Full batches only: a rest of a few images would give BN poor statistics."""
        return len(self.data.train_x) // self.options.batch_size

    def _logits(self, x: Tensor) -> Tensor:
        dtype = DTYPES[self.options.dtype]
        low = dtype != torch.float32
        with torch.autocast(self.device.type, dtype=dtype if low else None, enabled=low):
            return self.model(x)

    def _step(self, index: Tensor) -> Tensor:
        x, y = self.data.train_x[index], self.data.train_y[index]
        loss = F.cross_entropy(self._logits(x).float(), y)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def _batches(self) -> tuple[Tensor, ...]:
        index = torch.randperm(len(self.data.train_x), generator=self.order).to(self.device)
        return index.split(self.options.batch_size)[: self.steps_per_epoch]

    def train_epoch(self, progress: tqdm) -> None:
        """Train for an epoch and record losses, time and test accuracy; advances `progress`."""
        self.model.train()
        losses = []
        start = time.perf_counter()
        for index in self._batches():
            losses.append(self._step(index))
            progress.update()
        values = torch.stack(losses).tolist()  # waits for the device: before the clock is read
        self.history.seconds.append(time.perf_counter() - start)
        self.history.losses += values
        self.history.accuracy.append(self.test_accuracy())
        mean, accuracy = statistics.fmean(values), self.history.accuracy[-1]
        progress.set_postfix_str(f"{self.norm}: loss {mean:.2g}, accuracy {accuracy:.1%}")

    @torch.no_grad()
    def test_accuracy(self) -> float:
        """Share of the test images that are classified correctly, in eval mode."""
        self.model.eval()
        hits = self._logits(self.data.test_x).argmax(1) == self.data.test_y
        return hits.float().mean().item()

    def measure_norm_share(self) -> None:
        """Profile some more training steps and record the share of their time spent in BN.

        The time of BN is that of the outermost events named after it, forward and backward,
        whatever op runs beneath; of the CPU, or of the kernels on an accelerator.
        """
        # Read when the first profile starts, which prints two lines to stderr at other levels.
        os.environ.setdefault("KINETO_LOG_LEVEL", "6")
        self.model.train()
        activities = [ProfilerActivity.CPU]
        clock = "cpu_time_total"
        if self.device.type != "cpu":
            activities.append(ProfilerActivity.CUDA)
            clock = "device_time_total"
        with profile(activities=activities) as profiler:
            for index in self._batches()[:8]:
                with record_function("training step"):
                    self._step(index)
        events = profiler.events()
        total = sum(getattr(event, f"self_{clock}") for event in events)
        norm = sum(getattr(event, clock) for event in events if _is_outermost_norm(event))
        self.history.norm_share = norm / total


def _is_outermost_norm(event) -> bool:
    def named(event) -> bool:
        return re.search("batch_?norm", event.name, re.IGNORECASE) is not None

    if not named(event):
        return False
    parent = event.cpu_parent
    while parent is not None and not named(parent):
        parent = parent.cpu_parent
    return parent is None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that a training run depends on, except for the norm."""
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=0.02, help="learning rate (SGD, momentum 0.9)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="by autocast")
    parser.add_argument("--channels-last", action="store_true")


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Train a small residual network on handwritten digits.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--norm", choices=NORMS, default="ours")
    add_arguments(parser)
    parser.add_argument("--json", help="write the options and the recorded figures here")
    options = parser.parse_args()

    trainer = Trainer(options.norm, options, load_data(options.seed))
    with tqdm(total=options.epochs * trainer.steps_per_epoch, unit="step") as progress:
        for _ in range(options.epochs):
            trainer.train_epoch(progress)
    trainer.measure_norm_share()
    history = trainer.history
    print(
        f"accuracy {history.accuracy[-1]:.2%}, {history.epoch_seconds:.2f} s per epoch, "
        f"{history.norm_share:.0%} of it in BatchNorm"
    )
    if options.json:
        with open(options.json, "w") as file:
            json.dump(vars(options) | vars(history), file, indent=1)


if __name__ == "__main__":
    main()
