"""peft's adapters over sparse layers: what is pruned, what training leaves alone, and what merging does."""

import copy
import warnings
from typing import Any

import peft
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from simulated_backend import SimulatedBackend
from torch import Tensor, nn
from torch.utils.data import DataLoader

from sparsetrain import SparseTraining, export_dense_, is_transposable, select_layers, sparsify_
from sparsetrain.backends import BACKENDS
from sparsetrain.callbacks import SparseTrainingCallback

PREFIX = "base_model.model.model.layers.0.mlp."
MLP = [f"{PREFIX}{name}" for name in ("gate_proj", "up_proj.base_layer", "down_proj.base_layer")]
PRUNE_AT_ONCE = {"preset": "asp_one_shot", "prune_at": 0}

FROZEN_BASE = pytest.mark.filterwarnings("ignore:weights of sparse layers have requires_grad=False:UserWarning")


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    return LlamaForCausalLM(LlamaConfig(vocab_size=32, num_key_value_heads=1, **sizes))


def lora(model: nn.Module, **values: Any) -> nn.Module:
    torch.manual_seed(1)
    arguments = {"r": 4, "target_modules": ["up_proj", "down_proj", "q_proj"], "init_lora_weights": False, **values}
    return peft.get_peft_model(model, peft.LoraConfig(**arguments))


def tokens(step: int) -> Tensor:
    return torch.randint(0, 32, (2, 6), generator=torch.Generator().manual_seed(step))


def trained(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, start: int = 0) -> None:
    for step in range(start, start + steps):
        optimizer.zero_grad()
        model(input_ids=tokens(step), labels=tokens(step)).loss.backward()
        optimizer.step()


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=1e-2)


def weights(model: nn.Module, names: list[str]) -> dict[str, Tensor]:
    return {name: model.get_submodule(name).weight.detach().clone() for name in names}


def adapters_are_dense(model: nn.Module) -> bool:
    parts = [(name, part) for name, part in model.named_modules() if ".lora_" in name and isinstance(part, nn.Linear)]
    return len(parts) == 6 and all(type(part) is nn.Linear and bool((part.weight != 0).all()) for _, part in parts)


def sparse_base() -> nn.Module:
    """A base that was trained sparse and finished: its zeros are in place."""
    model = llama()
    optimizer = adamw(model)
    training = SparseTraining(model, optimizer, PRUNE_AT_ONCE, 3, "mlp", verbose=False)
    trained(model, optimizer, 3)
    training.finish()
    return model


@pytest.mark.parametrize("targets", ["mlp", "all-linear", ".*", "model.layers.0", "*"])
def test_adapters_are_left_alone_and_their_base_layers_are_pruned(targets: str) -> None:
    report = select_layers(lora(llama()), targets)
    assert set(MLP) <= {choice.name for choice in report.sparse}
    assert not [choice.name for choice in report.sparse if "lora_" in choice.name]
    adapters = {choice.name: choice.reason for choice in report.dense if "lora_" in choice.name}
    assert len(adapters) == 6
    in_mlp = [reason for name, reason in adapters.items() if ".mlp." in name]
    assert in_mlp == ["peft adapter"] * 4


@pytest.mark.parametrize(
    ("target", "names"),
    [
        ("up_proj", ["up_proj.base_layer"]),
        ("mlp.up_proj", ["up_proj.base_layer"]),
        ("model.layers.0.mlp.up_proj", ["up_proj.base_layer"]),
        (r"model\.layers\.\d\.mlp\.(up|gate)_proj", ["gate_proj", "up_proj.base_layer"]),
        ("model.layers.*.mlp.*_proj", ["gate_proj", "up_proj.base_layer", "down_proj.base_layer"]),
        ("model.layers.0.mlp", ["gate_proj", "up_proj.base_layer", "down_proj.base_layer"]),
        (PREFIX + "up_proj.base_layer", ["up_proj.base_layer"]),
    ],
)
def test_names_match_without_what_peft_puts_into_them(target: str, names: list[str]) -> None:
    assert [choice.name for choice in select_layers(lora(llama()), target).sparse] == [PREFIX + name for name in names]


def test_a_head_that_peft_trains_a_copy_of_stays_dense_and_is_found_by_its_name() -> None:
    model = lora(llama(), modules_to_save=["lm_head"])
    copied, original = (f"base_model.model.lm_head.{part}" for part in ("modules_to_save.default", "original_module"))
    reasons = {choice.name: choice.reason for choice in select_layers(model).choices}
    assert reasons[copied] == "output head (name it in targets to make it sparse)"
    assert reasons[original] == "peft keeps it as it was and trains a copy"
    assert [choice.name for choice in select_layers(model, "lm_head").sparse] == [copied]


def test_only_adapters_asked_for_is_an_error_with_the_reason() -> None:
    with pytest.raises(ValueError, match=r"leaves no layer.*peft adapter"):
        select_layers(lora(llama()), "lora_A")


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 16))


CONFIGS = {
    "adalora": peft.AdaLoraConfig(target_modules=["0", "2"], total_step=10),
    "delora": peft.DeloraConfig(target_modules=["0", "2"]),
    "gralora": peft.GraloraConfig(target_modules=["0", "2"]),
    "ia3": peft.IA3Config(target_modules=["0", "2"], feedforward_modules=["2"]),
    "lily": peft.LilyConfig(target_modules=["0", "2"]),
    "loha": peft.LoHaConfig(target_modules=["0", "2"]),
    "lokr": peft.LoKrConfig(target_modules=["0", "2"]),
    "lora": peft.LoraConfig(target_modules=["0", "2"]),
    "oft": peft.OFTConfig(target_modules=["0", "2"]),
    "randlora": peft.RandLoraConfig(target_modules=["0", "2"]),
    "vera": peft.VeraConfig(target_modules=["0", "2"]),
}
WITH_ITS_WEIGHT = {
    "dora": peft.LoraConfig(target_modules=["0", "2"], use_dora=True),
    "hira": peft.HiraConfig(target_modules=["0", "2"]),
    "hra": peft.HRAConfig(target_modules=["0", "2"]),
}


def filled(model: nn.Module) -> nn.Module:
    """Give every adapter numbers that do something."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "base_layer" not in name:
                weight.add_(0.1 * torch.randn(weight.shape, generator=generator))
    return model


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", CONFIGS)
def test_methods_whose_base_layers_are_pruned_compute_with_the_mask(method: str) -> None:
    wrapped = filled(peft.get_peft_model(small(), CONFIGS[method]))
    by_hand = copy.deepcopy(wrapped)
    names = [f"base_model.model.{place}.base_layer" for place in (0, 2)]
    report = sparsify_(wrapped, verbose=False)
    assert [choice.name for choice in report.sparse] == names
    for name in names:
        mask = wrapped.get_submodule(name).mask
        assert is_transposable(mask)
        by_hand.get_submodule(name).weight.data.mul_(mask)
    x = torch.randn(4, 16)
    for mode in (True, False):
        torch.testing.assert_close(wrapped.train(mode)(x), by_hand.train(mode)(x))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", WITH_ITS_WEIGHT)
def test_methods_that_read_their_base_layers_weight_stay_dense_with_the_reason(method: str) -> None:
    wrapped = peft.get_peft_model(nn.Sequential(*small(), nn.Linear(16, 16)), WITH_ITS_WEIGHT[method])
    report = select_layers(wrapped)
    assert [choice.name for choice in report.sparse] == ["base_model.model.3"]
    reasons = {choice.name: choice.reason for choice in report.dense}
    expected = f"peft's {method} computes with its weight itself: merge the adapter first"
    assert reasons["base_model.model.0.base_layer"] == reasons["base_model.model.2.base_layer"] == expected


@FROZEN_BASE
def test_lora_over_a_sparse_base_leaves_the_base_bit_for_bit_and_merging_keeps_the_masks() -> None:
    base = sparse_base()
    model = lora(base)
    before = weights(model, MLP)
    kept = {name: weight != 0 for name, weight in before.items()}
    assert all(is_transposable(mask) for mask in kept.values())
    adapter = model.get_submodule(PREFIX + "up_proj.lora_B.default").weight
    adapter_before = adapter.detach().clone()
    optimizer = adamw(model)
    training = SparseTraining(model, optimizer, PRUNE_AT_ONCE, 6, "mlp", verbose=False)
    trained(model, optimizer, 6)
    for name, weight in weights(model, MLP).items():
        assert torch.equal(weight, before[name])
    assert not torch.equal(adapter, adapter_before)
    assert adapters_are_dense(model)
    merged = model.merge_and_unload()
    training.finish()
    after = weights(merged, [name.removeprefix("base_model.model.").replace(".base_layer", "") for name in MLP])
    for weight, mask in zip(after.values(), kept.values(), strict=True):
        assert torch.equal(weight != 0, mask)
    assert not torch.equal(list(after.values())[1], before[MLP[1]])  # the adapter's part is in it


def test_merging_while_masks_are_frozen_keeps_them_and_unmerging_gives_the_weights_back() -> None:
    model = lora(llama())
    for name in MLP:
        model.get_submodule(name).weight.requires_grad_(True)
    optimizer = adamw(model)
    training = SparseTraining(model, optimizer, PRUNE_AT_ONCE, 8, "mlp", verbose=False)
    trained(model, optimizer, 3)
    masks = {name: model.get_submodule(name).mask for name in MLP}
    before = weights(model, MLP)
    assert all(torch.equal(before[name] != 0, masks[name]) for name in MLP)
    layer = model.get_submodule(MLP[1])
    wrapper = model.get_submodule(MLP[1].removesuffix(".base_layer"))
    expected = before[MLP[1]] + wrapper.get_delta_weight("default").detach() * masks[MLP[1]]
    model.merge_adapter()
    x = torch.randn(3, 16)
    torch.testing.assert_close(wrapper(x), x @ expected.T)  # products see merged weights through the mask
    training.apply_masks_()
    torch.testing.assert_close(layer.weight, expected)
    assert training.metrics()["violations"] == 0
    model.unmerge_adapter()
    trained(model, optimizer, 1, start=3)
    assert all(torch.equal(weight != 0, masks[name]) for name, weight in weights(model, MLP).items())
    model.merge_and_unload()
    training.finish()
    for name, mask in masks.items():
        weight = model.get_base_model().get_submodule(name.removeprefix("base_model.model.").replace(".base_layer", ""))
        assert torch.equal(weight.weight != 0, mask)


@FROZEN_BASE
def test_finishing_before_merging_warns_and_masks_can_be_applied_afterwards() -> None:
    model = lora(llama())
    optimizer = adamw(model)
    training = SparseTraining(model, optimizer, PRUNE_AT_ONCE, 4, "mlp", verbose=False)
    trained(model, optimizer, 4)
    masks = {name: model.get_submodule(name).mask for name in MLP}
    with pytest.warns(UserWarning, match=r"up_proj.*down_proj.*merge_and_unload\(\) before finish"):
        training.finish()
    merged = model.merge_and_unload()
    plain = {name: name.removeprefix("base_model.model.").replace(".base_layer", "") for name in MLP}
    filled_in = merged.get_submodule(plain[MLP[1]]).weight
    assert (filled_in != 0).all()
    training.apply_masks_()
    for name, mask in masks.items():
        assert torch.equal(merged.get_submodule(plain[name]).weight != 0, mask)
        assert type(merged.get_submodule(plain[name])) is nn.Linear


def test_packed_weights_follow_a_merge(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BACKENDS, "simulated", SimulatedBackend())
    model = peft.get_peft_model(small(), peft.LoraConfig(target_modules=["0", "2"], init_lora_weights=False))
    training = SparseTraining(model, adamw(model), PRUNE_AT_ONCE, 4, backend="simulated", verbose=False)
    wrapper = model.get_submodule("base_model.model.0").eval()
    layer, x = wrapper.base_layer, torch.randn(4, 16)
    wrapper(x)
    assert layer.operands.bytes > 0
    expected = nn.functional.linear(
        x, (layer.weight + wrapper.get_delta_weight("default")).detach() * layer.mask, layer.bias
    )
    wrapper.merge()
    training.apply_masks_()
    torch.testing.assert_close(wrapper(x), expected)


def test_finishing_warns_of_nothing_where_merging_keeps_the_zeros() -> None:
    wrapped = filled(peft.get_peft_model(small(), CONFIGS["ia3"]))
    optimizer = adamw(wrapped)
    training = SparseTraining(wrapped, optimizer, PRUNE_AT_ONCE, 2, verbose=False)
    for _ in range(2):
        optimizer.zero_grad()
        wrapped(torch.randn(4, 16)).square().mean().backward()
        optimizer.step()
    masks = [wrapped.base_model.model[place].base_layer.mask for place in (0, 2)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        training.finish()
    merged = wrapped.merge_and_unload()
    assert all(torch.equal(merged[place].weight != 0, mask) for place, mask in zip((0, 2), masks, strict=True))


def test_a_sparse_model_can_be_wrapped_saved_merged_and_exported(tmp_path: Any) -> None:
    model = llama()
    sparsify_(model, "mlp", verbose=False)
    layer = model.model.layers[0].mlp.up_proj
    master, mask = layer.weight.detach().clone(), layer.mask
    wrapped = lora(model)
    adapter = wrapped.get_submodule(PREFIX + "up_proj")
    assert adapter.base_layer is layer
    delta = adapter.get_delta_weight("default").detach()
    x = torch.randn(3, 16)
    torch.testing.assert_close(adapter(x), x @ (master * mask + delta).T)
    assert torch.equal(wrapped.state_dict()[PREFIX + "up_proj.base_layer.weight"], master)
    wrapped.save_pretrained(tmp_path)
    fresh = llama()
    sparsify_(fresh, "mlp", verbose=False)
    again = peft.PeftModel.from_pretrained(fresh, tmp_path)
    torch.testing.assert_close(again(input_ids=tokens(0)).logits, wrapped(input_ids=tokens(0)).logits)
    merged = wrapped.merge_and_unload()
    assert merged.model.layers[0].mlp.up_proj is layer
    torch.testing.assert_close(layer.weight, master + delta)
    torch.testing.assert_close(layer(x), x @ ((master + delta) * mask).T)
    assert len(export_dense_(merged)) == 3
    assert torch.equal(layer.weight != 0, mask)


def test_wrapping_in_mid_run_goes_on_with_the_masks() -> None:
    model = llama()
    optimizer = adamw(model)
    training = SparseTraining(model, optimizer, PRUNE_AT_ONCE, 4, "mlp", verbose=False)
    trained(model, optimizer, 2)
    wrapped = lora(model)
    masks = {name: wrapped.get_submodule(name).mask for name in MLP}
    optimizer.add_param_group({"params": [p for n, p in wrapped.named_parameters() if "lora_" in n]})
    trained(wrapped, optimizer, 2, start=2)
    wrapped.merge_and_unload()
    training.finish()
    plain = [name.removeprefix("base_model.model.").replace(".base_layer", "") for name in MLP]
    for name, mask in zip(plain, masks.values(), strict=True):
        assert torch.equal(model.get_submodule(name).weight != 0, mask)


class LoraModule(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = lora(llama())

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.model(input_ids=batch, labels=batch).loss

    def on_train_end(self) -> None:
        self.model.merge_adapter()  # before the callback's on_fit_end gives plain layers back

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return adamw(self)


@FROZEN_BASE
def test_the_callback_trains_adapters_over_a_frozen_base_and_ends_sparse_after_merging() -> None:
    module = LoraModule()
    callback = SparseTrainingCallback(PRUNE_AT_ONCE, targets="mlp")
    trainer = Trainer(
        max_steps=4, accelerator="cpu", callbacks=[callback], logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, DataLoader([tokens(step)[0] for step in range(8)], batch_size=2))
    assert adapters_are_dense(module.model)
    for name in MLP:
        weight = module.model.get_submodule(name).weight
        assert type(module.model.get_submodule(name)) is nn.Linear
        assert is_transposable(weight != 0)


def test_adapters_over_transposed_linear_layers_are_merged_under_the_masks() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 8}
    base = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=1, eos_token_id=2))
    model = lora(base, target_modules=["c_fc", "mlp.c_proj"], fan_in_fan_out=True)
    names = [f"base_model.model.transformer.h.0.mlp.{name}.base_layer" for name in ("c_fc", "c_proj")]
    optimizer = adamw(model)
    training = SparseTraining(model, optimizer, PRUNE_AT_ONCE, 2, "mlp", verbose=False)
    assert [choice.name for choice in training.report.sparse] == names
    before = weights(model, names)
    masks = [model.get_submodule(name).mask for name in names]
    trained(model, optimizer, 2)
    assert all(torch.equal(weight, before[name]) for name, weight in weights(model, names).items())
    merged = model.merge_and_unload()
    training.finish()
    for name, mask in zip(("c_fc", "c_proj"), masks, strict=True):
        layer = getattr(merged.transformer.h[0].mlp, name)
        assert type(layer) is Conv1D
        assert torch.equal(layer.weight != 0, mask)
        assert is_transposable((layer.weight != 0).T)
