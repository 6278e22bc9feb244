"""ResNet-50 (He et al. 2015, https://arxiv.org/abs/1512.03385), with the stride in the 3x3
convolution, and MobileNetV2 (Sandler et al. 2018, https://arxiv.org/abs/1801.04381) of width 1."""

from torch import Tensor, nn


def conv_norm(
    c_in: int, c_out: int, kernel: int, stride: int = 1, groups: int = 1, act: type | None = nn.ReLU
) -> nn.Sequential:
    conv = nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(c_out), *([act(inplace=True)] if act else []))


class Residual(nn.Module):
    def __init__(self, body: nn.Module, shortcut: nn.Module, act: nn.Module):
        super().__init__()
        self.body, self.shortcut, self.act = body, shortcut, act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.body(x) + self.shortcut(x))


def bottleneck(c_in: int, width: int, stride: int) -> nn.Module:
    """1x1 reduce, 3x3, 1x1 expand by four, added to the (projected) input."""
    c_out = 4 * width
    layers = conv_norm(c_in, width, 1), conv_norm(width, width, 3, stride)
    body = nn.Sequential(*layers, conv_norm(width, c_out, 1, act=None))
    same = c_in == c_out and stride == 1
    shortcut = nn.Identity() if same else conv_norm(c_in, c_out, 1, stride, act=None)
    return Residual(body, shortcut, nn.ReLU(inplace=True))


def inverted_residual(c_in: int, c_out: int, stride: int, expansion: int) -> nn.Module:
    """1x1 expand, 3x3 depthwise, linear 1x1 project; added to the input where the shapes agree."""
    width = c_in * expansion
    expand = [conv_norm(c_in, width, 1, act=nn.ReLU6)] if expansion != 1 else []
    depthwise = conv_norm(width, width, 3, stride, groups=width, act=nn.ReLU6)
    body = nn.Sequential(*expand, depthwise, conv_norm(width, c_out, 1, act=None))
    same = c_in == c_out and stride == 1
    return Residual(body, nn.Identity(), nn.Identity()) if same else body


def head(channels: int) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 1000)]


def resnet50() -> nn.Module:
    layers, c_in = [conv_norm(3, 64, 7, 2), nn.MaxPool2d(3, 2, 1)], 64
    for width, depth, stride in [(64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)]:
        for i in range(depth):
            layers.append(bottleneck(c_in, width, stride if i == 0 else 1))
            c_in = 4 * width
    return nn.Sequential(*layers, *head(c_in))


# expansion, channels, depth, stride
MOBILENET = [(1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1)]
MOBILENET += [(6, 160, 3, 2), (6, 320, 1, 1)]


def mobilenetv2() -> nn.Module:
    layers, c_in = [conv_norm(3, 32, 3, 2, act=nn.ReLU6)], 32
    for expansion, channels, depth, stride in MOBILENET:
        for i in range(depth):
            layers.append(inverted_residual(c_in, channels, stride if i == 0 else 1, expansion))
            c_in = channels
    return nn.Sequential(*layers, conv_norm(c_in, 1280, 1, act=nn.ReLU6), *head(1280))


NETWORKS = {"resnet50": resnet50, "mobilenetv2": mobilenetv2}
