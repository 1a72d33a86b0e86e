"""Aggregation rules: pure functions that merge the state dicts of several trained models.

A rule takes an ``Update`` and returns the new state and its memory for the next round. All rules
compute in float64, and sum in client order. Buffers (BatchNorm's running statistics and counter)
are averaged by all rules that average, adaptive ones included; integer ones are rounded.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sfl.strategy.ranks import PassOn, add_here

State = Mapping[str, Tensor]
Result = tuple[dict[str, Tensor], dict[str, Tensor]]  # the new state, the rule's memory
NO_AVERAGE = "give one state and one weight a client, not all of weight 0"


@dataclass(frozen=True)
class Update:
    """A rule's input: states with the same names, shapes and dtypes, in client order."""

    states: Sequence[State]
    weights: Sequence[float]  # of each state: number of samples, or 1
    start: State = field(default_factory=dict)  # the state that all were trained from
    trained: Collection[str] = ()  # names of parameters; other entries are buffers
    memory: State = field(default_factory=dict)  # from the rule's last call; empty at first
    pass_on: PassOn = add_here  # for sums that other ranks add to as well


def fed_avg(
    states: Sequence[State],
    weights: Sequence[float],
    like: State | None = None,
    pass_on: PassOn = add_here,
) -> dict[str, Tensor]:
    """Return the weighted average of states.

    FedAvg, McMahan et al. 2017, Algorithm 1: ``w = sum_k (n_k / n) w_k``, with ``weights`` n_k.
    It divides once, so that the average of identical float32 models equals that model exactly, for
    integer weights up to 2^29: n_k * w fits into float64's 53 bits.

    ``like``: a state with the same entries, for a rank without states; ``pass_on``: lets other
    ranks add theirs.
    """
    if like is None and states:
        like = states[0]
    if like is None or len(states) != len(weights) or min(weights, default=0) < 0:
        raise ValueError(NO_AVERAGE)
    sizes = [entry.numel() for entry in like.values()]

    def add(sums: Tensor) -> None:
        sums[0] += sum(weights)
        parts = dict(zip(like, torch.split(sums[1:], sizes), strict=True))
        for state, weight in zip(states, weights, strict=True):
            for name, part in parts.items():
                part += state[name].detach().cpu().double().flatten() * weight

    sums = torch.zeros(1 + sum(sizes), dtype=torch.float64)  # the weights', then each entry's
    pass_on(add, sums)
    if (total := sums[0].item()) <= 0:
        raise ValueError(NO_AVERAGE)
    averages = zip(like.items(), torch.split(sums[1:] / total, sizes), strict=True)
    return {name: _like(entry, value.reshape(entry.shape)) for (name, entry), value in averages}


def _like(entry: Tensor, value: Tensor) -> Tensor:
    """Return a float64 value in the dtype of an entry, rounded if it is an integer dtype."""
    return (value if entry.is_floating_point() else value.round()).to(entry.dtype)


def _fed_avg(update: Update) -> Result:
    return fed_avg(update.states, update.weights, update.start, update.pass_on), {}


Second = Callable[[Tensor, Tensor], Tensor]  # (v, delta) -> v of the next round


def _fed_opt(update: Update, second: Second, *, lr: float, beta1: float, tau: float) -> Result:
    """Return the start moved by an adaptive step along the clients' average change.

    FedOpt, Reddi et al. 2021, Algorithm 2: ``m = b1 m + (1 - b1) D``, ``x += lr m / (sqrt(v) +
    tau)`` with D the clients' average change and v from ``second``, initially tau^2. D is weighted
    by ``weights``, as in their experiments.
    """
    _check(lr > 0 and tau > 0 and 0 <= beta1 < 1, "lr and tau above 0, beta1 in [0, 1)")
    state = fed_avg(update.states, update.weights)
    memory: dict[str, Tensor] = {}
    for name in update.trained:
        start, delta = update.start[name].double(), _change(update, name)
        m = beta1 * update.memory.get(f"m.{name}", torch.zeros_like(delta)) + (1 - beta1) * delta
        v = second(update.memory.get(f"v.{name}", torch.full_like(delta, tau**2)), delta)
        state[name] = _like(state[name], start + lr * m / (v.sqrt() + tau))
        memory |= {f"m.{name}": m, f"v.{name}": v}
    return state, memory


def _change(update: Update, name: str) -> Tensor:
    """Return the weighted average change of one entry since the start, in float64."""
    start = update.start[name].detach().cpu().double()
    changes = [{name: state[name].detach().cpu().double() - start} for state in update.states]
    return fed_avg(changes, update.weights)[name]


def fed_adagrad(
    update: Update, *, lr: float = 0.1, beta1: float = 0.0, tau: float = 1e-3
) -> Result:
    """FedAdagrad, Reddi et al. 2021, Algorithm 2: ``v = v + D^2``."""
    return _fed_opt(update, lambda v, d: v + d**2, lr=lr, beta1=beta1, tau=tau)


def fed_adam(
    update: Update, *, lr: float = 0.1, beta1: float = 0.9, beta2: float = 0.99, tau: float = 1e-3
) -> Result:
    """FedAdam, Reddi et al. 2021, Algorithm 2: ``v = b2 v + (1 - b2) D^2``."""
    _check(0 <= beta2 < 1, "beta2 in [0, 1)")
    second: Second = lambda v, d: beta2 * v + (1 - beta2) * d**2  # noqa: E731
    return _fed_opt(update, second, lr=lr, beta1=beta1, tau=tau)


def fed_yogi(
    update: Update, *, lr: float = 0.1, beta1: float = 0.9, beta2: float = 0.99, tau: float = 1e-3
) -> Result:
    """FedYogi, Reddi et al. 2021, Algorithm 2: ``v = v - (1 - b2) D^2 sign(v - D^2)``."""
    _check(0 <= beta2 < 1, "beta2 in [0, 1)")
    second: Second = lambda v, d: v - (1 - beta2) * d**2 * torch.sign(v - d**2)  # noqa: E731
    return _fed_opt(update, second, lr=lr, beta1=beta1, tau=tau)


def fed_avg_m(update: Update, *, lr: float = 1.0, beta: float = 0.9) -> Result:
    """FedAvgM, Hsu et al. 2019 (arXiv 1909.06335), Section 4.3: ``v = b v + D``, ``x += lr v``."""
    _check(lr > 0 and 0 <= beta < 1, "lr above 0, beta in [0, 1)")
    state = fed_avg(update.states, update.weights)
    memory: dict[str, Tensor] = {}
    for name in update.trained:
        delta = _change(update, name)
        v = beta * update.memory.get(f"v.{name}", torch.zeros_like(delta)) + delta
        state[name] = _like(state[name], update.start[name].double() + lr * v)
        memory[f"v.{name}"] = v
    return state, memory


def _sorted_entries(update: Update) -> dict[str, Tensor]:
    """Return each entry's values (K, ...) in float64, sorted over the K states."""
    return {
        name: torch.stack([s[name].detach().cpu().double() for s in update.states]).sort(0).values
        for name in update.states[0]
    }


def median(update: Update) -> Result:
    """Coordinate-wise median, Yin et al. 2018 (arXiv 1803.01498), Definition 1.

    For an even number of states, the mean of the middle two. Weights are ignored.
    """
    count = len(update.states)
    middle = {
        name: values[(count - 1) // 2 : count // 2 + 1].mean(0)
        for name, values in _sorted_entries(update).items()
    }
    return {name: _like(update.states[0][name], value) for name, value in middle.items()}, {}


def trimmed_mean(update: Update, *, trim: int = 1) -> Result:
    """Coordinate-wise trimmed mean, Yin et al. 2018, Definition 2, with beta = trim / K.

    The ``trim`` smallest and largest values of each coordinate are left out. Weights are ignored.
    """
    count = len(update.states)
    _check(trim >= 0 and 2 * trim < count, f"trim of {count} models below {count / 2:g}")
    kept = {n: v[trim : count - trim].mean(0) for n, v in _sorted_entries(update).items()}
    return {name: _like(update.states[0][name], value) for name, value in kept.items()}, {}


def krum(update: Update, *, faulty: int = 0) -> Result:
    """Krum, Blanchard et al. 2017 (NeurIPS), Section 4: the state nearest to its neighbours.

    The score of a state is the sum of its squared distances, over the parameters, to its
    K - faulty - 2 nearest others. The first state with the smallest score is returned.
    """
    count = len(update.states)
    _check(faulty >= 0 and 2 * faulty + 2 < count, f"2 faulty + 2 below {count} models")
    none = torch.zeros(0, dtype=torch.float64)  # for a segment without trained parameters
    flat = [
        torch.cat([none, *(s[n].detach().cpu().double().flatten() for n in sorted(update.trained))])
        for s in update.states
    ]
    scores = []
    for i, ours in enumerate(flat):
        distances = sorted(float(((ours - o) ** 2).sum()) for j, o in enumerate(flat) if j != i)
        scores.append(sum(distances[: count - faulty - 2]))
    best = update.states[scores.index(min(scores))]
    return {name: entry.detach().cpu().clone() for name, entry in best.items()}, {}


def _check(holds: bool, wanted: str) -> None:
    if not holds:
        raise ValueError(f"wanted: {wanted}")


# A rule's options follow a colon: --aggregation fedadam:lr=0.03,tau=0.01
RULES: dict[str, Callable[..., Result]] = {
    "fedavg": _fed_avg,
    "fedavgm": fed_avg_m,
    "fedadagrad": fed_adagrad,
    "fedadam": fed_adam,
    "fedyogi": fed_yogi,
    "median": median,
    "trimmed-mean": trimmed_mean,
    "krum": krum,
}
