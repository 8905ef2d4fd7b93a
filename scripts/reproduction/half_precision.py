"""What masked decay does to models whose weights are bfloat16: ``python -m scripts.reproduction.half_precision``.

A small GPT is trained on the interpreter's own sources with float32 weights, and with bfloat16 weights whose decayed
gradients are rounded at random (as the library does), rounded to the nearest number, or rounded to the nearest number
with what is lost kept beside in float32 and added in the next step. Before that, the decay alone: weights without a
gradient under SGD.
"""

import argparse
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsetrain import Method, Phase, Schedule, SparseTraining
from sparsetrain.kernels.tile_codes import unpack_codes
from sparsetrain.layers import layer_group
from sparsetrain.recipes.gpt import GPT

CONTEXT, BATCH = 64, 16
AT_RANDOM = layer_group.add_masked_decays_now_
ROUNDINGS = ("float32 weights", "at random", "to nearest", "remainder beside")


def to_nearest(
    gradients: Sequence[Tensor], weights: Sequence[Tensor], codes: Sequence[Tensor], decay: Tensor, *_: object
) -> None:
    """Add the decay in float32 and round to the nearest number."""
    for gradient, weight, code in zip(gradients, weights, codes, strict=True):
        gradient.copy_(gradient.float() + weight.float().masked_fill(unpack_codes(code), 0) * decay)


class WithRemainder:
    """Adds the decay and what the last step's rounding lost, which it keeps in float32."""

    def __init__(self) -> None:
        self.lost: dict[int, Tensor] = {}

    def __call__(
        self,
        gradients: Sequence[Tensor],
        weights: Sequence[Tensor],
        codes: Sequence[Tensor],
        decay: Tensor,
        numbers: Sequence[int],
        *_: object,
    ) -> None:
        """Change the gradients."""
        for gradient, weight, code, number in zip(gradients, weights, codes, numbers, strict=True):
            pull = weight.float().masked_fill(unpack_codes(code), 0) * decay + self.lost.get(number, 0.0)
            total = gradient.float() + pull
            gradient.copy_(total)
            self.lost[number] = total - gradient.float()


def use(rounding: str) -> torch.dtype:
    """Have the library round in this way, and return the dtype of the weights."""
    replaced = {"to nearest": to_nearest, "remainder beside": WithRemainder()}
    layer_group.add_masked_decays_now_ = replaced.get(rounding, AT_RANDOM)  # type: ignore[assignment]
    return torch.float32 if rounding == ROUNDINGS[0] else torch.bfloat16


def shrink(rounding: str, steps: int, rate: float = 0.1, decay: float = 2e-4) -> float:
    """Return what is left of the mean magnitude of pruned weights that nothing but the decay changes."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 64)).to(use(rounding))
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    method = Method(decay=decay, decay_on="weight", refresh_every=steps, schedule=Schedule((Phase("sparse"),)))
    training = SparseTraining(model, optimizer, method, steps + 1, verbose=False)
    layer = training.masks.layers["0"]
    pruned = ~layer.mask
    before = float(layer.weight.detach()[pruned].double().abs().mean())
    for _ in range(steps):
        layer.weight.grad = torch.zeros_like(layer.weight)
        optimizer.step()
    return float(layer.weight.detach()[pruned].double().abs().mean()) / before


def text(size: int = 2_000_000) -> Tensor:
    """Bytes of the standard library's top-level modules, as int64."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    return torch.frombuffer(bytearray(b"".join(map(Path.read_bytes, files))[:size]), dtype=torch.uint8).long()


def batch(data: Tensor, seed: int) -> Tensor:
    """``[BATCH, CONTEXT + 1]`` tokens from places that depend on the seed alone."""
    starts = torch.randint(len(data) - CONTEXT - 1, (BATCH,), generator=torch.Generator().manual_seed(seed))
    return torch.stack([data[start : start + CONTEXT + 1] for start in starts.tolist()])


def loss_of(model: GPT, tokens: Tensor) -> Tensor:
    """Nats per byte."""
    return F.cross_entropy(model(tokens[:, :-1]).float().flatten(0, 1), tokens[:, 1:].flatten())


def run(rounding: str, decay: float, seed: int, steps: int) -> tuple[float, float, float]:
    """Return the validation loss, the kept fraction and the last flip rate."""
    torch.manual_seed(seed)
    data = text()
    training_data, held_out = data[: len(data) * 9 // 10], data[len(data) * 9 // 10 :]
    model = GPT(width=32, depth=2, context=CONTEXT).to(use(rounding))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.1)
    method = {"preset": "fst", "warmup": 0.15, "dense_tail": 0.0, "decay": decay, "refresh_every": 10}
    training = SparseTraining(model, optimizer, method, steps, "mlp", verbose=False)
    for step in range(steps):
        optimizer.zero_grad()
        loss_of(model, batch(training_data, 1000 * seed + step)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    metrics = training.metrics()
    assert metrics["violations"] == 0
    with torch.no_grad():
        loss = mean(float(loss_of(model, batch(held_out, 10**6 + i))) for i in range(20))
    return loss, metrics["kept_fraction"], metrics["flip_rate"]


def main() -> None:
    """Print a row for every λ and rounding: mean and standard deviation over the seeds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps of a run; default: 200")
    parser.add_argument("--seeds", type=int, default=3, help="runs of a row; default: 3")
    parser.add_argument("--decays", type=float, nargs="+", default=[0.0, 6e-5, 2e-3], help="default: 0 6e-5 2e-3")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print("| sums | left of pruned weights after 2000 steps |\n|---|---|")
    for rounding in ROUNDINGS:
        print(f"| {rounding} | {shrink(rounding, 2000):.4f} |", flush=True)
    print("\n| λ | sums | validation loss | kept fraction | flip rate |\n|---|---|---|---|---|")
    for decay in options.decays:
        for rounding in ROUNDINGS if decay else ROUNDINGS[:2]:
            rows = [run(rounding, decay, seed, options.steps) for seed in range(options.seeds)]
            cells = [
                f"{mean(column):.4f} ± {stdev(column) if len(column) > 1 else 0:.4f}"
                for column in zip(*rows, strict=True)
            ]
            print(f"| {decay:g} | {rounding} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
