"""The experiments of effects.py: what is trained and measured, without drawing.

Each returns a Result. Everything is trained on scikit-learn's handwritten digits, 8x8 pixels.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import batchnorm_ext
from batchnorm_ext.preprocessing import StandardScaler

IOFFE = "Ioffe & Szegedy 2015"
STEPS, BATCH, LR = 400, 60, 0.1


@dataclass
class Result:
    """A claim, where it was made, what was found, and what is to be drawn."""

    title: str
    claim: str
    source: str
    found: str
    confirmed: bool
    data: dict = field(default_factory=dict)


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images and labels to train on, and to test on; pixels from 0 to 1."""
    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    x = torch.tensor(images, dtype=torch.float32)[order] / 16
    y = torch.tensor(labels)[order]
    return x[:1400], y[:1400], x[1400:], y[1400:]


X, Y, X_TEST, Y_TEST = digits()


def mlp(norm: bool, scale: float = 1.0, depth: int = 3, activation: type = nn.Sigmoid) -> nn.Module:
    """The network of section 4.1 of the paper: layers of 100 sigmoids."""
    layers, width = [], X.size(1)
    for _ in range(depth):
        linear = nn.Linear(width, 100, bias=not norm)
        nn.init.normal_(linear.weight, std=scale / math.sqrt(width))
        layers += [linear, *([batchnorm_ext.BatchNorm1d(100)] if norm else []), activation()]
        width = 100
    return nn.Sequential(*layers, nn.Linear(width, 10))


def train(
    model: nn.Module,
    lr: float = LR,
    steps: int = STEPS,
    batch: int = BATCH,
    after_step: Callable[[int], None] = lambda step: None,
    inputs: Tensor = X,
) -> list[float]:
    """Plain SGD with momentum; the loss of each step."""
    order = torch.Generator().manual_seed(1)
    optimizer = torch.optim.SGD(model.parameters(), lr, momentum=0.9)
    losses = []
    for step in range(steps):
        chosen = torch.randint(len(inputs), (batch,), generator=order)
        loss = F.cross_entropy(model(inputs[chosen]), Y[chosen])
        optimizer.zero_grad()
        loss.backward()
        after_step(step)
        optimizer.step()
        losses.append(loss.item())
    return losses


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor = X_TEST, y: Tensor = Y_TEST) -> float:
    model.eval()
    right = (model(x).argmax(1) == y).float().mean().item()
    model.train()
    return right


def _final(losses: list[float]) -> float:
    """Mean of the last tenth; what diverged counts as the loss of a guess."""
    last = losses[-len(losses) // 10 :]
    mean = sum(last) / len(last)
    return mean if math.isfinite(mean) else math.log(10)


def _pair(**options) -> dict[str, nn.Module]:
    models = {}
    for name, norm in (("with BN", True), ("without", False)):
        torch.manual_seed(0)
        models[name] = mlp(norm, **options)
    return models


def learning_rates() -> Result:
    rates = [0.01, 0.1, 0.5, 2.0, 8.0]
    final = {name: [] for name in ("with BN", "without")}
    for lr in rates:
        for name, model in _pair().items():
            final[name].append(_final(train(model, lr)))
    usable = {name: sum(loss < 0.5 for loss in losses) for name, losses in final.items()}
    return Result(
        "Learning rates",
        "BN trains at much higher learning rates",
        f"{IOFFE}, section 3.3",
        f"loss < 0.5 at {usable['with BN']} of {len(rates)} rates with BN, "
        f"{usable['without']} without",
        usable["with BN"] > usable["without"],
        {"x": rates, "lines": final},
    )


def initial_scales() -> Result:
    scales = [0.01, 0.1, 1.0, 10.0, 100.0]
    final = {name: [] for name in ("with BN", "without")}
    for scale in scales:
        for name, model in _pair(scale=scale).items():
            final[name].append(_final(train(model)))
    spread = {name: max(losses) - min(losses) for name, losses in final.items()}
    return Result(
        "Scale of the initial weights",
        "BN makes training independent of the scale of the weights",
        f"{IOFFE}, section 3.3: BN(Wu) = BN((aW)u)",
        f"final losses differ by {spread['with BN']:.2f} with BN, {spread['without']:.2f} without",
        spread["with BN"] < spread["without"] / 2,
        {"x": scales, "lines": final},
    )


def gradient_norms() -> Result:
    ratios, curves = {}, {}
    for name, model in _pair(depth=6).items():
        linears = [layer for layer in model if isinstance(layer, nn.Linear)]
        norms = [[] for _ in linears]

        def keep(step: int, linears=linears, norms=norms) -> None:
            for kept, layer in zip(norms, linears, strict=True):
                kept.append(layer.weight.grad.norm().item())

        train(model, after_step=keep)
        curves[name] = norms
        first = [sum(kept[:50]) for kept in norms]
        ratios[name] = first[0] / first[-1]
    return Result(
        "Gradients by layer",
        "BN keeps gradients from vanishing in the lower layers",
        f"{IOFFE}, section 1",
        f"first / last of 7 layers, first 50 steps: {ratios['with BN']:.2g} with BN, "
        f"{ratios['without']:.2g} without",
        ratios["with BN"] > 10 * ratios["without"],
        {"curves": curves},
    )


def input_distribution() -> Result:
    curves, drift = {}, {}
    for name, model in _pair().items():
        at = len(model) - 2  # the last sigmoid
        quantiles = []

        def keep(step: int, model=model, at=at, quantiles=quantiles) -> None:
            with torch.no_grad():
                seen = model[:at](X[:200])[:, 0]
            quantiles.append(seen.quantile(torch.tensor([0.15, 0.5, 0.85])).tolist())

        train(model, after_step=keep)
        curves[name] = quantiles
        medians = torch.tensor(quantiles)[:, 1]
        drift[name] = (medians.max() - medians.min()).item()
    return Result(
        "Input of a sigmoid over training",
        "BN keeps the distribution of a layer's input stable",
        f"{IOFFE}, figure 1 (b, c)",
        f"the median moves by {drift['with BN']:.2f} with BN, {drift['without']:.2f} without",
        drift["with BN"] < drift["without"],
        {"curves": curves},
    )


def regularization() -> Result:
    found = {}
    for name, model in _pair(activation=nn.ReLU).items():
        train(model, steps=2 * STEPS)
        found[name] = accuracy(model, X, Y) - accuracy(model), accuracy(model)
    gap = {name: values[0] for name, values in found.items()}
    return Result(
        "Training and test accuracy",
        "BN regularizes: the gap between training and test is smaller",
        f"{IOFFE}, section 3.4",
        f"gap {gap['with BN']:.1%} with BN, {gap['without']:.1%} without",
        gap["with BN"] < gap["without"],
        {"bars": gap},
    )


def population() -> Result:
    momentum = 0.01
    torch.manual_seed(0)
    model = mlp(True)
    for layer in model:
        if isinstance(layer, batchnorm_ext.BatchNorm1d):
            layer.momentum = momentum
    train(model, steps=60)
    running = accuracy(model)
    batchnorm_ext.update_population_stats(model, X.split(100))
    measured = accuracy(model)
    return Result(
        "Statistics for evaluation",
        "Running averages lag at small momentum; statistics of the data set do not",
        "Wu & Johnson 2021, section 3",
        f"test accuracy {running:.1%} by running, {measured:.1%} by population statistics",
        measured > running,
        {"bars": {f"running,\nmomentum {momentum}": running, "population": measured}},
    )


def clouds() -> Result:
    """Two clouds along different directions, far from the origin, wider than high."""
    torch.manual_seed(0)
    first = torch.randn(300, 2) @ torch.tensor([[1.2, 0.3], [-0.2, 0.1]]) + torch.tensor([6.0, 4.0])
    second = torch.randn(300, 2) @ torch.tensor([[1.6, -0.2], [0.2, 0.1]]) + torch.tensor([12, 4.8])
    points = torch.cat([first, second]).double()
    scaled = StandardScaler().fit_transform(points)
    difference = (torch.corrcoef(points.T) - torch.corrcoef(scaled.T)).abs().max().item()
    ratio = (points.std(0) / scaled.std(0)).tolist()
    return Result(
        "Standardization of two point clouds",
        "z-scores move clouds to the origin and scale the axes; their shape stays",
        "an affine map of each feature",
        f"the axes are divided by {ratio[0]:.2g} and {ratio[1]:.2g}; the correlation of the "
        f"features changes by {difference:.0e}",
        difference < 1e-12,
        {"before": points.chunk(2), "after": scaled.chunk(2)},
    )


def descent() -> Result:
    """Least squares on two features, one of which is four times as large as the other."""
    torch.manual_seed(0)
    features = torch.randn(200, 2, dtype=torch.float64) * torch.tensor([1.0, 4.0])
    target = features @ torch.tensor([2.0, 1.0], dtype=torch.float64)
    paths, steps = {}, {}
    for name, x in (("raw", features), ("scaled", StandardScaler().fit_transform(features))):
        hessian = 2 * x.T @ x / len(x)
        rate = 2 / torch.linalg.eigvalsh(hessian)[[0, -1]].sum()  # the best constant one
        w, path = torch.zeros(2, dtype=torch.float64), []
        centred = target - target.mean()
        best = torch.linalg.lstsq(x, centred[:, None]).solution[:, 0]
        while (w - best).norm() > 1e-3 * best.norm() and len(path) < 5000:
            path.append(w.clone())
            w = w - rate * 2 * x.T @ (x @ w - centred) / len(x)
        paths[name] = (torch.stack(path), hessian, best)
        steps[name] = len(path)
    return Result(
        "Gradient descent and the scale of features",
        "Descent converges faster on scaled features",
        "LeCun et al. 1998, Efficient BackProp, section 4.3",
        f"{steps['raw']} steps on raw features, {steps['scaled']} on scaled ones, to 0.1 %",
        steps["scaled"] < steps["raw"] / 2,
        {"paths": paths},
    )
