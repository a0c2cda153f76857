"""Small nets with data and a loss: one shared list of cases for the comparisons, and the package's objects for them."""

from __future__ import annotations

from dataclasses import dataclass, field

import oracle
import torch
from torch import Tensor, nn

import gpytorch_dnn2gp as dnn2gp

F64 = torch.float64
SOLVERS = ["weight_space", "function_space"]


# ---- nets


class Squeeze(nn.Module):
    """(n, 1) -> (n,)."""

    def forward(self, f: Tensor) -> Tensor:
        return f[:, 0]


class TokenNet(nn.Module):
    """An embedding, a recurrence written out, a readout; inputs are token numbers (n, T)."""

    def __init__(self, num_tokens: int = 7, width: int = 3, num_outputs: int = 3) -> None:
        super().__init__()
        self.embedding = nn.Embedding(num_tokens, width)
        self.step = nn.Linear(2 * width, width)
        self.readout = nn.Linear(width, num_outputs)

    def forward(self, tokens: Tensor) -> Tensor:
        e = self.embedding(tokens)
        h = torch.zeros_like(e[:, 0])
        for t in range(tokens.shape[1]):
            h = torch.tanh(self.step(torch.cat([h, e[:, t]], -1)))
        return self.readout(h)


class OddNet(nn.Module):
    """Not Sequential: a frozen layer, a module used twice, a parameter used by itself, a normalisation with buffers."""

    def __init__(self, num_inputs: int = 2, width: int = 4, num_outputs: int = 2) -> None:
        super().__init__()
        self.frozen = nn.Linear(num_inputs, width)
        self.shared = nn.Linear(width, width)
        self.norm = nn.BatchNorm1d(width)
        self.scale = nn.Parameter(torch.ones(width))
        self.readout = nn.Linear(width, num_outputs, bias=False)
        self.frozen.requires_grad_(False)
        self.norm.running_mean.fill_(0.1)
        self.norm.running_var.fill_(1.7)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.frozen(x))
        h = torch.tanh(self.shared(h))
        h = self.norm(h + torch.tanh(self.shared(h)))
        return self.readout(self.scale * h)


def mlp(num_inputs: int = 2, width: int = 4, num_outputs: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Linear(num_inputs, width), nn.Tanh(), nn.Linear(width, num_outputs))


def randomized(net: nn.Module, seed: int, scale: float = 0.7) -> nn.Module:
    """Every parameter drawn anew, in float64, without touching the global generator."""
    generator = torch.Generator().manual_seed(seed)
    net = net.double()
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(scale * torch.randn(p.shape, generator=generator, dtype=F64))
    return net


# ---- problems


@dataclass
class Problem:
    """A net with data, the loss by hand and the name of the package's loss."""

    net: nn.Module
    x: Tensor
    y: Tensor
    x_test: Tensor
    hand: oracle.HandLoss
    loss_name: str
    loss_kwargs: dict = field(default_factory=dict)
    input_shape: tuple[int, ...] | None = None
    input_dtype: torch.dtype | None = None

    def loss(self) -> dnn2gp.losses.Loss:
        if self.loss_name == "from_callable":
            return dnn2gp.losses.from_callable(log_cosh)
        return getattr(dnn2gp.losses, self.loss_name)(**self.loss_kwargs)

    def gp(self, prior_precision: float | Tensor = 1.0, **kwargs) -> dnn2gp.LaplaceGP:
        shape = {"input_shape": self.input_shape, "input_dtype": self.input_dtype}
        return dnn2gp.LaplaceGP(
            self.net, self.x, self.y, self.loss(), prior_precision=prior_precision, **{**shape, **kwargs}
        )

    def predict(self, gp: dnn2gp.LaplaceGP, x: Tensor, **kwargs) -> dnn2gp.Prediction:
        """Labels by the loss's default; to first order where that draws samples, or may warn of a rough mixture."""
        approximation = "linear" if self.hand.name in ("natural", "poisson") else None
        return gp.predict(x, **{"approximation": approximation, **kwargs})

    def linearization(self, **kwargs) -> dnn2gp.Linearization:
        return dnn2gp.Linearization(self.net, input_shape=self.input_shape, input_dtype=self.input_dtype, **kwargs)

    # What the net itself wants to see.
    def shaped(self, x: Tensor) -> Tensor:
        return x if self.input_shape is None else x.reshape(-1, *self.input_shape)

    def outputs(self, x: Tensor) -> Tensor:
        return oracle.outputs(self.net, self.shaped(x))

    def jacobian(self, x: Tensor, names: list[str] | None = None) -> Tensor:
        return oracle.jacobian(self.net, self.shaped(x), names)

    @property
    def labels(self) -> Tensor:
        """(n, D), or (n,) class numbers."""
        return self.y[:, None] if self.y.is_floating_point() and self.y.dim() == 1 else self.y

    def dense(
        self,
        prior_precision: float | Tensor = 1.0,
        names: list[str] | None = None,
        diagonal: bool = False,
        hand: oracle.HandLoss | None = None,
    ) -> oracle.Dense:
        hand = hand or self.hand
        w, f = oracle.weights(self.net, names), self.outputs(self.x)
        return oracle.Dense(
            J=self.jacobian(self.x, names),
            w=w,
            f=f,
            r=hand.residual(f, self.labels),
            lam=hand.lam(f, self.labels),
            nll=hand.nll(f, self.labels),
            s0_inv=torch.as_tensor(prior_precision, dtype=F64).expand(len(w)),
            diagonal=diagonal,
        )


def log_cosh(f: Tensor, y: Tensor) -> Tensor:
    """A loss of the user's own for one example: f, y (K,)."""
    return (f - y).cosh().log().sum()


CASES = [
    "gaussian",
    "gaussian_squeezed",
    "gaussian_per_output",
    "gaussian_per_example",
    "gaussian_odd_net",
    "bernoulli",
    "bernoulli_outputs",
    "categorical",
    "categorical_soft",
    "categorical_images",
    "categorical_tokens",
    "poisson",
    "log_sigma",
    "natural",
    "own_loss",
]
# Without labels to predict: a user's own loss, whose distribution is not known, and noise known by example alone.
PREDICTED = [name for name in CASES if name not in ("own_loss", "gaussian_per_example")]
INVERTIBLE = [name for name in CASES if not name.startswith("categorical")]
GAUSSIAN = [name for name in CASES if name.startswith("gaussian")]


def problem(name: str, n: int = 6, m: int = 3, seed: int = 0) -> Problem:
    """The case called ``name`` with n training and m test examples, at random weights."""
    generator = torch.Generator().manual_seed(1000 + seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=F64)

    def integers(high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=generator)

    x, x_test = normal(n, 2), normal(m, 2)
    if name in ("gaussian", "gaussian_squeezed"):
        net = mlp() if name == "gaussian" else nn.Sequential(*mlp(), Squeeze())
        y = normal(n, 1) if name == "gaussian" else normal(n)
        args = (y, x_test, oracle.HandLoss("gaussian", 0.3**2), "Gaussian", {"sigma": 0.3})
    elif name == "gaussian_per_output":
        net, sigma = mlp(num_outputs=2), torch.tensor([0.3, 0.8], dtype=F64)
        args = (normal(n, 2), x_test, oracle.HandLoss("gaussian", sigma**2), "Gaussian", {"sigma": sigma})
    elif name == "gaussian_per_example":
        net, sigma = mlp(num_outputs=2), 0.2 + torch.rand(n, 2, generator=generator, dtype=F64)
        args = (normal(n, 2), x_test, oracle.HandLoss("gaussian", sigma**2), "Gaussian", {"sigma": sigma})
    elif name == "gaussian_odd_net":
        net = OddNet()
        args = (normal(n, 2), x_test, oracle.HandLoss("gaussian", 0.25), "Gaussian", {"sigma": 0.5})
    elif name == "bernoulli":
        net = nn.Sequential(*mlp(), Squeeze())
        args = (integers(2, n).double(), x_test, oracle.HandLoss("bernoulli"), "Bernoulli")
    elif name == "bernoulli_outputs":
        net = mlp(num_outputs=3)
        args = (integers(2, n, 3).double(), x_test, oracle.HandLoss("bernoulli"), "Bernoulli")
    elif name == "categorical":
        net = mlp(num_outputs=3)
        args = (integers(3, n), x_test, oracle.HandLoss("categorical"), "Categorical")
    elif name == "categorical_soft":
        net = mlp(num_outputs=3)
        args = (normal(n, 3).softmax(-1), x_test, oracle.HandLoss("categorical"), "Categorical")
    elif name == "categorical_images":
        net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Tanh(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8, 3))
        x, x_test = normal(n, 36), normal(m, 36)
        hand = oracle.HandLoss("categorical")
        net = randomized(net, seed)
        return Problem(net, x, integers(3, n), x_test, hand, "Categorical", input_shape=(1, 6, 6))
    elif name == "categorical_tokens":
        x, x_test = integers(7, n, 4), integers(7, m, 4)
        hand = oracle.HandLoss("categorical")
        net = randomized(TokenNet(), seed)
        return Problem(net, x, integers(3, n), x_test, hand, "Categorical", input_dtype=torch.long)
    elif name == "poisson":
        net = mlp(num_outputs=2)
        args = (integers(4, n, 2).double(), x_test, oracle.HandLoss("poisson"), "Poisson")
    elif name == "log_sigma":
        net = mlp(num_outputs=2)
        args = (normal(n, 1), x_test, oracle.HandLoss("log_sigma"), "HeteroscedasticGaussian")
    elif name == "natural":
        net = nn.Sequential(*mlp(num_outputs=2), oracle.NegativeSecond())
        kwargs = {"parametrization": "natural"}
        args = (normal(n, 1), x_test, oracle.HandLoss("natural"), "HeteroscedasticGaussian", kwargs)
    elif name == "own_loss":
        net = mlp(num_outputs=2)
        args = (normal(n, 2), x_test, oracle.HandLoss("log_cosh"), "from_callable")
    else:
        raise ValueError(name)
    return Problem(randomized(net, seed), x, *args)


# ---- results as plain tensors


def number(value: Tensor | float) -> Tensor:
    """A float64 scalar; a Python float must not pass through float32."""
    return torch.as_tensor(value, dtype=F64)


def flat_mean(distribution) -> Tensor:
    """(..., m K), example-major."""
    batch = distribution.covariance_matrix.shape[:-2]
    return distribution.mean.reshape(*batch, -1)


def covariance(distribution) -> Tensor:
    """(..., m K, m K)."""
    return distribution.covariance_matrix


def evidence_gradient(gp, value: Tensor, which: str) -> Tensor:
    """d value / d prior_precision, or d noise, from the raw parameter that ``gp`` trains: (dE/draw) / (dv/draw)."""
    (raw,) = [p for name, p in gp.named_parameters() if name.endswith(f"raw_{which}")]
    (top,) = torch.autograd.grad(value, raw, retain_graph=True)
    (bottom,) = torch.autograd.grad(getattr(gp, which).sum(), raw)
    return (top / bottom).reshape(-1)
