import copy
import gc
import importlib
import inspect
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import DistributedType
from oracles import two_of_four
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

import sparsetrain as st
from sparsetrain.callbacks import HuggingFaceSparseTraining, SparseTrainingCallback

MOVING = {"preset": "fst", "refresh_every": 3, "decay": 0.05, "dense_tail": 0, "warmup": 2}
SLOPE = {"preset": "slope", "adapter_start": 3, "adapter_rank": 2}
UP = "model.layers.0.mlp.up_proj"

TOKENS = torch.randint(0, 32, (24, 8), generator=torch.Generator().manual_seed(0))
ROWS = [{"input_ids": row, "labels": row} for row in TOKENS]


@pytest.fixture(autouse=True, scope="module")
def _quick_collections() -> Iterator[None]:
    """The trainer collects garbage when it begins, which takes longer than these runs with all that is imported."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def llama(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=2, max_position_embeddings=16,
        )
    )  # fmt: skip


def trainer(
    folder: Path, *callbacks: TrainerCallback, model: nn.Module | None = None, steps: int = 8,
    kind: type[Trainer] = Trainer, **options: Any,
) -> Trainer:  # fmt: skip
    defaults: dict[str, Any] = {
        "max_steps": steps, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_grad_norm": 0.5,
        "learning_rate": 2e-2, "use_cpu": True, "save_steps": 4, "logging_steps": 100, "disable_tqdm": True,
        "optim": "adamw_torch", "seed": 1,
    }  # fmt: skip
    return kind(
        model or llama(), TrainingArguments(str(folder), **{**defaults, **options}), train_dataset=ROWS,
        eval_dataset=ROWS[:4], callbacks=list(callbacks),
    )  # fmt: skip


def logits(model: nn.Module) -> Tensor:
    training = model.training
    with torch.no_grad():
        found = model.eval()(TOKENS[:2]).logits
    model.train(training)
    return found


def two_of_every_four(weight: Tensor) -> bool:
    """At most two, as a soft threshold may leave less."""
    kept = weight != 0
    return bool((kept.unflatten(1, (-1, 4)).sum(2) <= 2).all())


class AtSave(TrainerCallback):
    """Looks at the model when checkpoints are written."""

    def __init__(self, callback: HuggingFaceSparseTraining, folder: Path) -> None:
        self.callback, self.folder = callback, folder
        self.logits: dict[int, Tensor] = {}
        self.masters: dict[int, Tensor] = {}

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        model = kwargs["model"]
        self.logits[state.global_step] = logits(model)
        self.masters[state.global_step] = model.get_submodule(UP).weight.detach().clone()
        model.save_pretrained(self.folder / f"by_hand-{state.global_step}")
        torch.save(model.state_dict(), self.folder / f"by_hand-{state.global_step}.pt")


class Stop(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 6:
            raise KeyboardInterrupt


def contents(folder: Path) -> Any:
    """What resuming goes on from: weights, the optimizer with the engine's state, the learning rate."""
    files = [torch.load(folder / name, weights_only=True) for name in ("optimizer.pt", "scheduler.pt")]
    weights = LlamaForCausalLM.from_pretrained(folder).state_dict()
    return {"weights": dict(weights), "optimizer": files[0], "schedule": files[1]}


def require_equal(first: Any, second: Any, path: str = "") -> None:
    assert type(first) is type(second), path
    if isinstance(first, dict):
        assert first.keys() == second.keys(), path
        for key in first:
            require_equal(first[key], second[key], f"{path}/{key}")
    elif isinstance(first, (list, tuple)):
        assert len(first) == len(second), path
        for number, (left, right) in enumerate(zip(first, second, strict=True)):
            require_equal(left, right, f"{path}/{number}")
    elif isinstance(first, Tensor):
        assert torch.equal(first, second), path
    else:
        assert first == second, path


METHODS: dict[str, Any] = {
    "masks move, mid-period": MOVING,
    "frozen": {"preset": "asp_one_shot", "prune_at": 3},
    "learning rate restarts": {"preset": "asp_one_shot", "prune_at": 5, "restart_lr": True},
    "soft threshold": {"preset": "s_ste", "refresh_every": 3},
    "adapters": SLOPE,
    "frozen moments": {"preset": "step", "latest": 3, "earliest": None},
}


@pytest.mark.parametrize("name", METHODS)
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(name: str, tmp_path: Path) -> None:
    method = METHODS[name]
    whole = trainer(tmp_path / "whole", HuggingFaceSparseTraining(method))
    whole.train()
    # the checkpoint is elsewhere than where the run writes to, and in front of it is another model
    shutil.copytree(tmp_path / "whole" / "checkpoint-4", tmp_path / "moved")
    resumed = trainer(tmp_path / "rest", HuggingFaceSparseTraining(method), model=llama(seed=5))
    resumed.train(resume_from_checkpoint=str(tmp_path / "moved"))
    require_equal(dict(whole.model.state_dict()), dict(resumed.model.state_dict()))
    first, second = (contents(tmp_path / part / "checkpoint-8") for part in ("whole", "rest"))
    assert first["optimizer"]["param_groups"][0]["sparsetrain"]["clock"] == 8
    require_equal(first, second)
    linear = whole.model.get_submodule(UP)
    assert type(linear) is nn.Linear
    assert two_of_every_four(linear.weight) == (name != "adapters")


def test_a_run_that_died_goes_on_with_the_same_trainer_or_another(tmp_path: Path) -> None:
    whole = trainer(tmp_path / "whole", HuggingFaceSparseTraining(SLOPE), save_strategy="no")
    whole.train()
    died = trainer(tmp_path / "died", HuggingFaceSparseTraining(SLOPE), Stop())
    with pytest.raises(KeyboardInterrupt):
        died.train()
    shutil.copytree(tmp_path / "died", tmp_path / "copy")
    died.remove_callback(Stop)
    died.train(resume_from_checkpoint=True)  # its optimizer has the adapters still, which the checkpoint has apart
    other = trainer(tmp_path / "copy", HuggingFaceSparseTraining(SLOPE), model=llama(seed=5))
    other.train(resume_from_checkpoint=True)
    for resumed in (died, other):
        require_equal(dict(whole.model.state_dict()), dict(resumed.model.state_dict()))


def test_the_callback_gives_the_same_weights_as_the_engine_on_the_bare_optimizer(tmp_path: Path) -> None:
    with_callback = trainer(tmp_path, HuggingFaceSparseTraining(MOVING), save_strategy="no")
    with_callback.train()
    model = llama()
    bare = trainer(tmp_path, model=model, save_strategy="no")
    training = st.SparseTraining(model, bare.create_optimizer(), MOVING, 8, verbose=False)
    bare.train()
    assert training.clock == 8
    training.finish()
    require_equal(dict(with_callback.model.state_dict()), dict(model.state_dict()))


@pytest.mark.parametrize(
    "method", [MOVING, {"preset": "s_ste", "refresh_every": 3}, SLOPE], ids=["fst", "s_ste", "slope"]
)
def test_everything_that_is_saved_is_the_model_that_is_evaluated(method: Any, tmp_path: Path) -> None:
    callback = HuggingFaceSparseTraining(method)
    looker = AtSave(callback, tmp_path)
    run = trainer(tmp_path, callback, looker, eval_strategy="steps", eval_steps=4, save_total_limit=1)
    run.train()
    assert not (tmp_path / "checkpoint-4").exists()  # rotated away
    run.save_model(tmp_path / "end")
    losses = {entry["step"]: entry["eval_loss"] for entry in run.state.log_history if "eval_loss" in entry}
    for folder, step in (("by_hand-4", 4), ("by_hand-8", 8), ("checkpoint-8", 8), ("end", 8)):
        saved = LlamaForCausalLM.from_pretrained(tmp_path / folder)
        if folder != "end" or method is MOVING:  # others end as their cards say
            torch.testing.assert_close(logits(saved), looker.logits[step], rtol=1e-4, atol=1e-5)
            tokens = TOKENS[:4]
            with torch.no_grad():
                assert float(saved.eval()(tokens, labels=tokens).loss) == pytest.approx(losses[step], rel=1e-5)
        weight = saved.get_submodule(UP).weight
        if method is not SLOPE:
            assert two_of_every_four(weight)
            if method is MOVING:
                assert two_of_every_four(weight.T)
    for step in (4, 8):
        by_hand = torch.load(tmp_path / f"by_hand-{step}.pt", weights_only=True)
        saved = LlamaForCausalLM.from_pretrained(tmp_path / f"by_hand-{step}")
        require_equal(dict(saved.state_dict()), dict(by_hand))
    if method is MOVING:
        assert looker.masters[8].count_nonzero() == 512


def test_the_state_has_masters_that_the_weights_lack(tmp_path: Path) -> None:
    callback = HuggingFaceSparseTraining(MOVING)
    looker = AtSave(callback, tmp_path)
    trainer(tmp_path, callback, looker, steps=4).train()
    files = torch.load(tmp_path / "checkpoint-4" / "optimizer.pt", weights_only=True)
    mask = st.read_masks(files["param_groups"][0])[UP]
    saved = LlamaForCausalLM.from_pretrained(tmp_path / "checkpoint-4").get_submodule(UP).weight
    pruned = files["param_groups"][0]["sparsetrain"]["pruned_weights"][UP]
    assert torch.equal(looker.masters[4][mask], saved[mask])
    assert torch.equal(looker.masters[4][~mask], pruned)
    assert not saved[~mask].any()


@pytest.mark.parametrize("warmup", [1, 5])
def test_the_best_model_is_loaded_as_it_was_saved(warmup: int, tmp_path: Path) -> None:
    method = {**MOVING, "warmup": warmup, "refresh_every": 1, "decay": 0.0}
    run = trainer(
        tmp_path, HuggingFaceSparseTraining(method), eval_strategy="steps", eval_steps=4, save_total_limit=2,
        load_best_model_at_end=True, metric_for_best_model="eval_loss", greater_is_better=True,
    )  # fmt: skip
    if warmup == 5:
        with pytest.warns(UserWarning, match=r"the best model, .*checkpoint-4, has 7 dense layers, such as 'model"):
            run.train()
    else:
        run.train()
    assert run.state.best_global_step == 4
    best, last = (LlamaForCausalLM.from_pretrained(tmp_path / f"checkpoint-{step}").state_dict() for step in (4, 8))
    require_equal(dict(run.model.state_dict()), dict(best))
    changed = [key for key in best if bool(((best[key] != 0) & (last[key] == 0)).any())]
    assert changed  # what the last masks would have spoilt
    assert two_of_every_four(best[f"{UP}.weight"]) == (warmup == 1)


def test_without_a_state_the_schedule_covers_the_steps_that_are_left(tmp_path: Path) -> None:
    options: dict[str, Any] = {"save_only_model": True}
    trainer(tmp_path / "dense", steps=4, **options).train()
    run = trainer(tmp_path / "rest", HuggingFaceSparseTraining({"preset": "asp_one_shot", "prune_at": 0.5}), **options)
    with pytest.warns(UserWarning, match="starts now, at step 4 of the trainer, and covers the 4 steps that are left"):
        run.train(resume_from_checkpoint=str(tmp_path / "dense" / "checkpoint-4"))
    assert two_of_every_four(run.model.get_submodule(UP).weight)
    run.train()  # once more, from where it is: no state of the run before is left
    assert two_of_every_four(run.model.get_submodule(UP).weight)


class Reporter(TrainerCallback):
    """Stands for a trainer's own logger."""

    def __init__(self) -> None:
        self.rows: dict[int, dict[str, float]] = {}

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.rows.setdefault(state.global_step, {}).update(copy.deepcopy(logs))


def test_metrics_reach_the_log_and_attached_callbacks_every_logger(tmp_path: Path) -> None:
    callback, reporter = HuggingFaceSparseTraining(MOVING, per_layer_metrics=True), Reporter()
    run = trainer(
        tmp_path, reporter, callback, save_strategy="no", logging_steps=7, eval_strategy="steps", eval_steps=4
    )
    assert callback.attach(run) is callback
    assert run.callback_handler.callbacks.count(callback) == 1
    run.train()
    # refreshes at 2, 5 and 8, and in the dense phase at none; the logging step is 7
    logged = {entry["step"]: entry for entry in run.state.log_history if "sparsity/clock" in entry}
    assert {step: entry["sparsity/clock"] for step, entry in logged.items()} == {2: 2, 5: 5, 7: 7, 8: 8}
    for step, entry in logged.items():
        assert {key: reporter.rows[step][key] for key in entry if key.startswith("sparsity/")}.items() <= entry.items()
        assert entry["sparsity/violations"] == 0
        assert entry["sparsity/sparse_layers"] == 7
    assert "sparsity/flip_rate" in reporter.rows[5]
    assert f"sparsity/layer/{UP}/kept_fraction" in reporter.rows[5]
    assert not any(key.startswith("sparsity/") for key in reporter.rows[4])  # an evaluation


@pytest.mark.parametrize("part", ["pruned_weights", "values", "codes"])
def test_a_damaged_state_is_refused_and_leaves_plain_layers(part: str, tmp_path: Path) -> None:
    trainer(tmp_path, HuggingFaceSparseTraining(MOVING), steps=3, save_steps=3).train()
    path = tmp_path / "checkpoint-3" / "optimizer.pt"
    files = torch.load(path, weights_only=True)
    state = files["param_groups"][0]["sparsetrain"]
    if part == "values":
        state["pruned_weights"][UP] = state["pruned_weights"][UP][1:]
    else:
        del state[part]
    torch.save(files, path)
    run = trainer(tmp_path, HuggingFaceSparseTraining(MOVING), model=llama(seed=5))
    with pytest.raises(ValueError, match=part if part != "values" else "do not fit its mask"):
        run.train(resume_from_checkpoint=True)
    assert type(run.model.get_submodule(UP)) is nn.Linear


@pytest.mark.filterwarnings("ignore:ends dense. the schedule stopped at step 1")
def test_loggers_that_are_not_reached_are_named(tmp_path: Path) -> None:
    run = trainer(tmp_path, HuggingFaceSparseTraining(MOVING), steps=1, save_strategy="no")
    run.args.report_to = ["wandb"]
    with pytest.warns(UserWarning, match=r"do not reach wandb: call HuggingFaceSparseTraining\(...\)\.attach"):
        run.train()


class Distilling(Trainer):
    def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:  # type: ignore[override]
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        training = next(
            entry.training for entry in self.callback_handler.callbacks if isinstance(entry, HuggingFaceSparseTraining)
        )
        loss = training.distilled(loss)
        return (loss, outputs) if return_outputs else loss


def test_distillation_is_the_loss_of_the_trainer(tmp_path: Path) -> None:
    method = {"preset": "dense_to_sparse_finetune", "distillation": 0.5}
    options: dict[str, Any] = {"steps": 3, "save_strategy": "no", "gradient_accumulation_steps": 1, "logging_steps": 1}
    run = trainer(tmp_path, HuggingFaceSparseTraining(method), kind=Distilling, **options)
    run.train()
    assert run.state.log_history[-2]["sparsity/distillation"] > 0
    with pytest.raises(RuntimeError, match=r"distilled\(\) was not called"):
        trainer(tmp_path, HuggingFaceSparseTraining(method), **options).train()


@pytest.mark.parametrize(
    ("values", "words"),
    [({"deepspeed": "zero.json"}, "deepspeed is 'zero.json', but .* flat partitions"),
     ({"fsdp": "full_shard"}, "fsdp is 'full_shard', but .* ModelParallelStrategy"),
     ({"distributed_state": SimpleNamespace(distributed_type=DistributedType.DEEPSPEED)}, "deepspeed is 'on'"),
     ({"distributed_state": SimpleNamespace(distributed_type=DistributedType.FSDP)}, "weights are sharded, but"),
     ({"n_gpu": 2}, "copies the model to 2 GPUs")],
)  # fmt: skip
def test_sharded_and_copied_models_are_refused_before_anything_changes(values: Any, words: str) -> None:
    model = llama()
    args: Any = SimpleNamespace(**{"deepspeed": None, "fsdp": None, "n_gpu": 1, **values})
    with pytest.raises(ValueError, match=words):
        HuggingFaceSparseTraining().on_train_begin(args, SimpleNamespace(), None, model=model, optimizer=None)  # type: ignore[arg-type]
    assert type(model.get_submodule(UP)) is nn.Linear


def test_the_twins_have_the_same_arguments() -> None:
    here, there = (inspect.signature(kind).parameters for kind in (HuggingFaceSparseTraining, SparseTrainingCallback))
    assert list(here) == [name for name in there if name != "gather"]  # of shards, which Hugging Face's refuses
    assert all(here[name].default == there[name].default for name in here if name != "method")
    assert here["method"].default == "recommended"


@pytest.mark.parametrize(
    ("absent", "name"), [("lightning", "HuggingFaceSparseTraining"), ("transformers", "SparseTrainingCallback")]
)
def test_each_callback_is_importable_without_the_other_ones_trainer(
    absent: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in [entry for entry in sys.modules if entry.split(".")[0] == absent]:
        monkeypatch.setitem(sys.modules, module, None)  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, absent, None)  # type: ignore[arg-type]
    for module in [entry for entry in sys.modules if entry.startswith("sparsetrain.callbacks")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setattr(st, "callbacks", None)
    callbacks = importlib.import_module("sparsetrain.callbacks")
    assert getattr(callbacks, name).__name__ == name
    assert dir(callbacks).count("HuggingFaceSparseTraining") == 1
    if absent == "transformers":
        with pytest.raises(ImportError, match=r'HuggingFaceSparseTraining needs transformers: .*"sparsetrain\[hf\]"'):
            _ = callbacks.HuggingFaceSparseTraining
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = callbacks.nonsense


def test_two_of_four_is_what_the_oracle_says() -> None:
    weight = torch.randn(4, 8)
    assert two_of_every_four(weight * two_of_four(weight))
    assert not two_of_every_four(weight)
