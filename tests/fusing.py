"""Small networks that fusing has to get right, and the comparison with what they were."""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import batchnorm_ext
from batchnorm_ext._graph import Report
from support import assert_within

C = 6
# float64 on both sides: sums of some hundred terms in another order, a few 1e-16 of the largest
# each, which normalization over a small batch multiplies in each of some ten layers.
EXACT = 1e-10
# PyTorch's backward of hardsigmoid multiplies by 1/6 in float32, which is off by 3e-8, always.
OF_HARDSIGMOID = 1e-7


class Model(nn.Module):
    """Layers by name, with a forward that a test gives it."""

    def __init__(self, run, **layers):
        super().__init__()
        self.run = run
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x):
        return self.run(self, x)


def block(run, **layers) -> Model:
    """``conv1, bn1, conv2, bn2, relu`` and what a test adds, or puts in their place."""
    given = {"conv1": conv(), "bn1": norm(), "conv2": conv(), "bn2": norm(), "relu": nn.ReLU()}
    return Model(run, **given | layers)


def conv(c_in: int = C, c_out: int = C, stride: int = 1) -> nn.Module:
    return nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False)


def norm(channels: int = C) -> nn.Module:
    return nn.BatchNorm2d(channels)


def image(channels: int = C) -> Tensor:
    return torch.randn(3, channels, 8, 8, dtype=torch.float64)


def randomized(model: nn.Module) -> nn.Module:
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1 and name.endswith("weight"):
            nn.init.uniform_(parameter, 0.5, 1.5)
        elif name.endswith("bias"):
            nn.init.normal_(parameter)
    return model.double()


def pair(model: nn.Module) -> tuple[nn.Module, nn.Module, Report]:
    """The model with parameters at random, a fused copy of it, and what was fused."""
    randomized(model)
    return model, *batchnorm_ext.fuse(copy.deepcopy(model), report=True)


def outcome(model: nn.Module, x: Tensor, backward: bool = True) -> dict[str, Tensor]:
    """Outputs, gradients of input and parameters, and buffers after one step."""
    x = x.clone().requires_grad_(backward)
    for parameter in model.parameters():
        parameter.grad = None
    with torch.set_grad_enabled(backward):
        outputs = model(x * 1)  # a value that the model may write to
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    found = {f"output {place}": output for place, output in enumerate(outputs)}
    if backward:
        sum(output.cos().sum() for output in outputs).backward()
        parameters = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        found |= {"dx": x.grad} | {f"gradient of {n}": grad for n, grad in parameters.items()}
    return found | {name: buffer.clone() for name, buffer in model.named_buffers()}


def assert_same(
    model: nn.Module,
    original: nn.Module,
    x: Tensor,
    tolerance: float = EXACT,
    backward: bool = True,
) -> None:
    torch.manual_seed(1)
    expected = outcome(original, x, backward)
    torch.manual_seed(1)
    found = outcome(model, x, backward)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert_within(name, found[name], value, tolerance * max(1, value.abs().max().item()))


def assert_fuses(
    model: nn.Module, x: Tensor, done: int, left: int = 0, tolerance: float = EXACT
) -> nn.Module:
    """Fuse a copy: this many norms, the same names, and the same numbers in both modes."""
    model, fused, report = pair(model)
    assert (len(report.done), len(report.left)) == (done, left), str(report)
    assert list(fused.state_dict()) == list(model.state_dict())
    assert_same(fused, model, x, tolerance)
    assert_same(fused.eval(), model.eval(), x, tolerance)
    with torch.no_grad():
        y, expected = fused(x), model(x)
    for place, value in enumerate(expected if isinstance(expected, tuple) else [expected]):
        own = y[place] if isinstance(y, tuple) else y
        assert_within("without gradients", own, value, tolerance * value.abs().max())
    model.train(), fused.train()
    return fused


def assert_leaves(model: nn.Module, reason: str, name: str = "bn1", backward: bool = True) -> None:
    """Fuse a copy: not that norm, for that reason, and the same numbers."""
    model, fused, report = pair(model)
    assert name not in report.done and reason in report.left[name], str(report)
    assert_same(fused, model, image(), backward=backward)


# Networks


class BasicBlock(nn.Module):
    """ResNet's, as torchvision writes it: one ReLU for both, in place."""

    def __init__(self, c_in, c_out, stride=1):
        super().__init__()
        self.conv1, self.bn1 = conv(c_in, c_out, stride), norm(c_out)
        self.relu = nn.ReLU(inplace=True)
        self.conv2, self.bn2 = conv(c_out, c_out), norm(c_out)
        self.downsample = None
        if stride > 1 or c_in != c_out:
            self.downsample = nn.Sequential(nn.Conv2d(c_in, c_out, 1, stride), norm(c_out))

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.conv1(x)
        out = self.bn1(out)
        out = self.relu(out)
        out = self.conv2(out)
        out = self.bn2(out)
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        out = self.relu(out)
        return out


class ResNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.bn1, self.relu = conv(3, C), norm(), nn.ReLU(inplace=True)
        self.layer1 = nn.Sequential(BasicBlock(C, C), BasicBlock(C, C))
        self.layer2 = nn.Sequential(BasicBlock(C, 8, 2), BasicBlock(8, 8))
        self.fc = nn.Linear(8, 4)

    def forward(self, x):
        x = self.layer2(self.layer1(self.relu(self.bn1(self.conv1(x)))))
        return self.fc(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


class PreActivation(nn.Module):
    """The shortcut starts before the norm; the second norm is before a ReLU, too."""

    def __init__(self):
        super().__init__()
        self.bn1, self.conv1, self.bn2, self.conv2 = norm(), conv(), norm(), conv()

    def forward(self, x):
        out = self.conv1(F.relu(self.bn1(x), inplace=True))
        out = self.conv2(torch.relu_(self.bn2(out)))
        return out + x


class DenseLayer(nn.Module):
    """As torchvision's: takes the list of all values before it."""

    def __init__(self, c_in):
        super().__init__()
        self.norm1, self.relu1, self.conv1 = norm(c_in), nn.ReLU(inplace=True), conv(c_in, 4)
        self.norm2, self.relu2, self.conv2 = norm(4), nn.ReLU(inplace=True), conv(4, 2)
        self.drop_rate = 0.0

    def bottleneck(self, inputs):
        return self.conv1(self.relu1(self.norm1(torch.cat(inputs, 1))))

    def forward(self, input):
        features = [input] if isinstance(input, Tensor) else input
        new = self.conv2(self.relu2(self.norm2(self.bottleneck(features))))
        if self.drop_rate > 0:
            new = F.dropout(new, p=self.drop_rate, training=self.training)
        return new


class DenseBlock(nn.ModuleDict):
    def __init__(self, layers):
        super().__init__({f"layer{i}": DenseLayer(C + 2 * i) for i in range(layers)})

    def forward(self, x):
        features = [x]
        for _, layer in self.items():
            features.append(layer(features))
        return torch.cat(features, 1)


class SqueezeExcitation(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.fc1, self.fc2 = nn.Conv2d(channels, 2, 1), nn.Conv2d(2, channels, 1)

    def forward(self, x):
        return x * F.hardsigmoid(self.fc2(F.relu(self.fc1(x.mean((2, 3), keepdim=True)))))


class InvertedResidual(nn.Module):
    """MobileNetV3's: hard swish, squeeze and excitation, a norm before the addition."""

    def __init__(self, c_in, c_out):
        super().__init__()
        self.use_shortcut = c_in == c_out
        self.block = nn.Sequential(
            nn.Sequential(nn.Conv2d(c_in, 8, 1), norm(8), nn.Hardswish(inplace=True)),
            nn.Sequential(nn.Conv2d(8, 8, 3, 1, 1, groups=8), norm(8), nn.Hardswish(inplace=True)),
            SqueezeExcitation(8),
            nn.Sequential(nn.Conv2d(8, c_out, 1), norm(c_out)),
        )

    def forward(self, input):
        result = self.block(input)
        if self.use_shortcut:
            result += input
        return result


class UNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.down, self.inner = self._double(C, C), self._double(C, 2 * C)
        self.up = nn.ConvTranspose2d(2 * C, C, 2, 2)
        self.merge = self._double(2 * C, C)

    def _double(self, c_in, c_out):
        def act():
            return nn.LeakyReLU(0.1, inplace=True)

        layers = conv(c_in, c_out), norm(c_out), act(), conv(c_out, c_out), norm(c_out), act()
        return nn.Sequential(*layers)

    def forward(self, x):
        skip = self.down(x)
        y = self.up(self.inner(F.max_pool2d(skip, 2)))
        return self.merge(torch.cat([skip, y], 1))


class DropPath(nn.Module):
    def forward(self, x):
        if not self.training:
            return x
        return x * x.new_empty(x.shape[0], 1, 1, 1).bernoulli_(0.5)
