"""PyTorch's fused encoder layer against masks: declined while a layer inside is masked, and given back afterwards."""

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

from sparsetrain import SparseTraining, export_dense_, select_layers, sparsify_

LEFT = torch.tensor([[0, 0, 0, 0, 0], [0, 0, 0, 1, 1]]) == 1
pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")


def encoder() -> nn.TransformerEncoder:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2)


def tokens() -> Tensor:
    return torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(1))


def fused_calls(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> int:
    """How many layers of an encoder take torch's fused operator in evaluation."""
    calls = []
    operator = torch._transformer_encoder_layer_fwd
    with monkeypatch.context() as patch, torch.inference_mode():
        patch.setattr(torch, "_transformer_encoder_layer_fwd", lambda *args: calls.append(1) or operator(*args))
        model.eval()(tokens())
    model.train()
    return len(calls)


def require_masked(model: nn.Module) -> None:
    """Evaluation computes what training does, which calls every layer."""
    with torch.no_grad():
        expected = model.train()(tokens())
        assert torch.allclose(model.eval()(tokens()), expected, atol=1e-5)
    with torch.inference_mode():
        assert torch.allclose(model(tokens()), expected, atol=1e-5)
    frozen = copy.deepcopy(model).requires_grad_(False)
    assert torch.allclose(frozen(tokens()), expected, atol=1e-5)


def test_a_masked_encoder_evaluates_what_it_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    model = encoder()
    assert fused_calls(model, monkeypatch) == 2
    with torch.no_grad():
        dense = model.eval()(tokens())
    sparsify_(model, verbose=False)
    require_masked(model)
    assert (model.eval()(tokens()) - dense).abs().max() > 0.01
    require_masked(copy.deepcopy(model))
    require_masked(pickle.loads(pickle.dumps(model)))
    require_masked(model.double().float())


def test_only_layers_around_a_mask_decline(monkeypatch: pytest.MonkeyPatch) -> None:
    model = encoder()
    sparsify_(model, r"layers\.1\..*", verbose=False)
    assert fused_calls(model, monkeypatch) == 1


@pytest.mark.parametrize("adapters", [False, True])
def test_the_fused_path_is_back_when_training_is_finished(adapters: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = encoder()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    method = {"preset": "slope", "adapter_rank": 2, "adapter_start": 1} if adapters else "asp_one_shot"
    training = SparseTraining(model, optimizer, method, 2, verbose=False)
    for _ in range(2):
        model(tokens()).square().mean().backward()
        optimizer.step()
        require_masked(model)
    training.finish()
    assert fused_calls(model, monkeypatch) == 2
    assert "_fused_activation" not in vars(model.layers[0])


def test_export_gives_the_fused_path_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model = encoder()
    before = [layer.activation_relu_or_gelu for layer in model.layers]
    sparsify_(model, verbose=False)
    copied = copy.deepcopy(model)
    for each in (model, copied):
        export_dense_(each)
        assert fused_calls(each, monkeypatch) == 2
        assert [layer.activation_relu_or_gelu for layer in each.layers] == before


def test_a_failed_start_leaves_the_fused_path(monkeypatch: pytest.MonkeyPatch) -> None:
    model = encoder()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="state"):
        SparseTraining(model, optimizer, "asp_one_shot", 2, state={"version": -1}, verbose=False)
    assert fused_calls(model, monkeypatch) == 2


def test_nested_tensors_pass_masked_layers() -> None:
    model = encoder()
    sparsify_(model, verbose=False)
    with torch.no_grad():
        trained = model.train()(tokens(), src_key_padding_mask=LEFT)
        evaluated = model.eval()(tokens(), src_key_padding_mask=LEFT)
    assert torch.allclose(evaluated[~LEFT], trained[~LEFT], atol=1e-5)
    assert (evaluated[LEFT] == 0).all()  # torch went by nested tensors


def test_a_compiled_masked_encoder_evaluates_what_it_trains() -> None:
    torch._dynamo.reset()
    model = encoder()
    sparsify_(model, verbose=False)
    with torch.no_grad():
        expected = model.train()(tokens())
        compiled = torch.compile(model.eval(), backend="eager", fullgraph=True)
        assert torch.allclose(compiled(tokens()), expected, atol=1e-5)


def test_attention_keeps_the_projection_that_it_reads() -> None:
    reasons = {choice.name: choice.reason for choice in select_layers(encoder()).choices}
    assert reasons["layers.0.self_attn.out_proj"] == "nn.MultiheadAttention reads its weight itself"
    assert reasons["layers.0.linear1"] == ""
