"""Train on as many GPUs as torchrun starts: ``torchrun -m sparsetrain.recipes.llama_fsdp2 --help``."""

import math
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer

from sparsetrain.hardware.extras import require

from ..cli.messages import explain
from ..optimization import WarmupCosine
from .checkpoints import save_run
from .options import Options, read_options
from .sharding import make_mesh, whole
from .starting import Run, set_up


def main(arguments: Sequence[str] | None = None) -> int:
    """Train what a command line says, on the ranks that torchrun started; 2 if it is wrong."""
    try:
        try:
            options = read_options(sys.argv[1:] if arguments is None else arguments)
            run = set_up(options, start(options))
        except Exception as error:
            sys.stderr.write(f"llama_fsdp2: error: {explain(str(error))}\n")  # at once: every rank writes
            return 2
        train(options, run)
        return 0
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def start(options: Options) -> DeviceMesh:
    """Join the other ranks, and return their mesh.

    Raises:
        ValueError: If torchrun did not start this process, there is no GPU for it, or the replicas do not fit.
    """
    if "LOCAL_RANK" not in os.environ:
        raise ValueError("LOCAL_RANK is not set: start the recipe by torchrun --nproc-per-node N -m …, for N = 1 too.")
    local = int(os.environ["LOCAL_RANK"])
    if options.device == "cuda":
        if local >= torch.cuda.device_count():
            raise ValueError(
                f"device is 'cuda', but rank {local} of this machine finds {torch.cuda.device_count()} GPUs: start "
                "fewer ranks, or pass --device cpu."
            )
        torch.cuda.set_device(local)
    dist.init_process_group("nccl" if options.device == "cuda" else "gloo")
    return make_mesh(options)


def train(options: Options, run: Run) -> None:
    """Take the steps that a run has not taken before."""
    model, optimizer, data, training, first = run
    log = Log(options, first)
    rate = WarmupCosine(options.warmup_steps, options.steps, options.min_lr_ratio)
    for step, batch in zip(range(first, options.steps), data, strict=False):
        for group in optimizer.param_groups:
            group["lr"] = options.learning_rate * rate(step)
        loss, norm = train_step(model, optimizer, batch.to(options.device, torch.long), options.clip)
        done = step + 1
        if done % options.log_every == 0 or done == options.steps:
            values = {"loss": mean(loss), "norm": float(whole(norm)), "lr": options.learning_rate * rate(step)}
            log(done, values | (training.metrics() if training else {}))  # a collective: every rank takes part
        if done % options.checkpoint_every == 0 or done == options.steps:
            save_run(options.output, done, model, optimizer, data, training)
    if training:
        training.finish()
    save({"model": get_model_state_dict(model)}, checkpoint_id=f"{options.output}/model")
    log.finish()


def train_step(model: nn.Module, optimizer: Optimizer, tokens: Tensor, clip: float | None) -> tuple[Tensor, Tensor]:
    """Take a step on token ids ``[batch, time + 1]``; return the loss of this rank and the norm of all gradients."""
    logits = model(tokens[:, :-1])
    loss = F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())
    loss.backward()  # type: ignore[no-untyped-call]
    norm = clip_grad_norm_(model.parameters(), math.inf if clip is None else clip)
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach(), norm


def mean(value: Tensor) -> float:
    """Return the mean of a scalar over all ranks."""
    dist.all_reduce(value)
    return float(value) / dist.get_world_size()


class Log:
    """Lines of rank 0, and the same values to Weights & Biases if that is asked for.

    Args:
        options: Of the run.
        first: Steps that were taken before.
    """

    def __init__(self, options: Options, first: int) -> None:
        self._options, self._done, self._time = options, first, time.perf_counter()
        self._writes = dist.get_rank() == 0
        self._run: Any | None = None
        if self._writes and options.wandb:
            wandb = require("wandb", "wandb", "--wandb")
            self._run = wandb.init(project=options.wandb, config=asdict(options))
        if self._writes and first:
            print(f"goes on after step {first}")

    def __call__(self, done: int, values: dict[str, Any]) -> None:
        """Write the values of a step, and the tokens a second since the last line."""
        now, tokens = time.perf_counter(), self._options.batch_size * self._options.context * dist.get_world_size()
        values = {**values, "tokens/s": tokens * (done - self._done) / (now - self._time)}
        self._done, self._time = done, now
        if self._writes:
            shown = (f"{name} {value:.4g}" for name, value in values.items() if isinstance(value, int | float))
            print(f"step {done} | " + " | ".join(shown), flush=True)
        if self._run:
            self._run.log(values, step=done)

    def finish(self) -> None:
        """Close the run at Weights & Biases."""
        if self._run:
            self._run.finish()


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # gloo's threads may abort an orderly exit
