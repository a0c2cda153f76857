"""Modules whose infinite-width kernels have reference numbers, for test_infinite_golden.py and test_infinite.py."""

import torch
from torch import nn

SIGMOID_LIKE = 1 / 2.4020563531719796


class Activation(nn.Module):
    def __init__(self, phi) -> None:
        super().__init__()
        self.phi = phi

    def forward(self, x):
        return self.phi(x)


def sigmoid_like(x):
    return 0.5 * torch.erf(SIGMOID_LIKE * x) + 0.5


def activation_module(name: str, slope: float = 0.01) -> nn.Module:
    """As a user would write it; erf, sin and abs have no module in torch."""
    modules = {
        "relu": nn.ReLU(),
        "leaky_relu": nn.LeakyReLU(slope),
        "gelu": nn.GELU(),
        "tanh": nn.Tanh(),
        "sigmoid": nn.Sigmoid(),
        "silu": nn.SiLU(),
        "softplus": nn.Softplus(),
    }
    functions = {"erf": torch.erf, "sin": torch.sin, "abs": torch.abs}
    return modules[name] if name in modules else Activation(functions[name])


def fully_connected(
    depth: int, activation: nn.Module, features: int, width: int = 8, bias: bool = True
) -> nn.Sequential:
    layers, size = [], features
    for _ in range(depth):
        layers += [nn.Linear(size, width, bias=bias), activation]
        size = width
    return nn.Sequential(*layers, nn.Linear(size, 1, bias=bias))


def convolutional(case: dict) -> nn.Sequential:
    height, width, channels = case["shape"]
    padding = 0 if case["padding"] == "VALID" else 1
    mode = "circular" if case["padding"] == "CIRCULAR" else "zeros"
    layers, size = [], channels
    for _ in range(case["depth"]):
        convolution = nn.Conv2d(size, 4, case["filter"], case["strides"], padding, padding_mode=mode)
        layers += [convolution, activation_module(case["activation"])]
        layers += [nn.AvgPool2d(case["avgpool"])] if case.get("avgpool") else []
        size = 4
    layers += [nn.AdaptiveAvgPool2d(1)] if case["top"] == "gap" else []
    body = nn.Sequential(*layers, nn.Flatten())
    return nn.Sequential(body, nn.Linear(body(torch.zeros(1, channels, height, width)).shape[1], 1))


class ResidualBlock(nn.Module):
    """h + Dense(phi(h)), phi(LayerNorm(Dense(h))), or LayerNorm(h + Dense(phi(Dense(h))))."""

    def __init__(self, kind: str, activation: nn.Module, size: int, width: int) -> None:
        super().__init__()
        self.kind, self.activation = kind, activation
        self.first = nn.Linear(size, width)
        self.second = nn.Linear(width, width) if kind == "fc_res_ln" else None
        self.norm = nn.LayerNorm(width, eps=1e-12, elementwise_affine=False)

    def forward(self, h):
        if self.kind == "fc_res":
            return h + self.first(self.activation(h))
        if self.kind == "fc_ln":
            return self.activation(self.norm(self.first(h)))
        return self.norm(h + self.second(self.activation(self.first(h))))


def residual(case: dict, features: int, width: int = 8) -> nn.Sequential:
    kind, activation = case["kind"], activation_module(case["activation"])
    first = [] if kind == "fc_ln" else [nn.Linear(features, width)]
    sizes = [features if kind == "fc_ln" and i == 0 else width for i in range(case["blocks"])]
    blocks = [ResidualBlock(kind, activation, size, width) for size in sizes]
    last = [activation] if kind == "fc_res" else []
    return nn.Sequential(*first, *blocks, *last, nn.Linear(width, 1))


class SameConvolution(nn.Module):
    """A 3x3 convolution that keeps the size, or halves an even one, padding the smaller half first."""

    def __init__(self, channels: int, width: int, stride: int = 1) -> None:
        super().__init__()
        self.pad = nn.ZeroPad2d(1 if stride == 1 else (0, 1, 0, 1))
        self.convolution = nn.Conv2d(channels, width, 3, stride)

    def forward(self, x):
        return self.convolution(self.pad(x))


class WideBlock(nn.Module):
    def __init__(self, width: int, stride: int) -> None:
        super().__init__()
        self.first, self.second = SameConvolution(width, width, stride), SameConvolution(width, width)
        self.shortcut = SameConvolution(width, width, stride)

    def forward(self, x):
        main = self.first(torch.relu(x))
        return self.second(nn.functional.relu(main)) + self.shortcut(x)


class WideResNet(nn.Module):
    """Written as people write them: branches in forward, a mean for the pooling."""

    def __init__(self, channels: int = 3, width: int = 4) -> None:
        super().__init__()
        self.stem = SameConvolution(channels, width)
        self.blocks = nn.Sequential(WideBlock(width, 1), WideBlock(width, 2))
        self.readout = nn.Linear(width, 1)

    def forward(self, x):
        x = self.blocks(self.stem(x))
        return self.readout(x.mean(dim=(2, 3)))
