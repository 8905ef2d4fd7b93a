import pytest
import torch
from torch import nn

import sparsetrain as st
from sparsetrain.layers.selection.select_layers import select_layers


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.c_proj = nn.Linear(16, 48), nn.Linear(16, 16)


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c_fc, self.c_proj = nn.Linear(16, 64), nn.Linear(64, 16)


class LinearSubclass(nn.Linear):
    pass


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(32, 16)
        self.blocks = nn.ModuleList(nn.ModuleDict({"attn": Attention(), "mlp": MLP()}) for _ in range(2))
        self.odd = nn.Linear(16, 10)
        self.special = LinearSubclass(16, 16)
        self.lm_head = nn.Linear(16, 32, bias=False)
        self.lm_head.weight = self.embedding.weight


def names(**arguments: object) -> list[str]:
    return [choice.name for choice in select_layers(Transformer(), **arguments).sparse]


def test_all_linear_takes_what_fits_and_says_why_the_rest_stays_dense() -> None:
    report = select_layers(Transformer())
    assert len(report.sparse) == 8
    reasons = {choice.name: choice.reason for choice in report.dense}
    assert reasons["odd"] == "out_features 10 is not a multiple of 4"
    assert reasons["special"] == "subclass of nn.Linear (LinearSubclass)"
    assert "head" in reasons["lm_head"]
    assert "8 of 11" in report.summary()


def test_a_tied_head_that_is_asked_for_stays_dense_with_the_reason() -> None:
    report = select_layers(Transformer(), ["lm_head", "c_fc"])
    assert {choice.name: choice.reason for choice in report.dense}["lm_head"] == "tied to embedding.weight"


def test_an_untied_head_is_sparse_only_if_it_is_named() -> None:
    model = nn.ModuleDict({"body": nn.Linear(8, 8), "head": nn.Linear(8, 8)})
    assert [choice.name for choice in select_layers(model).sparse] == ["body"]
    assert [choice.name for choice in select_layers(model, ["all-linear", "head"]).sparse] == ["body", "head"]


def test_mlp_takes_feed_forward_layers_alone() -> None:
    assert names(targets="mlp") == [f"blocks.{i}.mlp.{name}" for i in range(2) for name in ("c_fc", "c_proj")]
    encoder = nn.TransformerEncoderLayer(16, 2, 32)
    assert [choice.name for choice in select_layers(encoder, "mlp").sparse] == ["linear1", "linear2"]


@pytest.mark.parametrize(
    ("targets", "count"),
    [("c_fc", 2), (["mlp.c_proj"], 2), ("c_proj", 4), (r"blocks\.0\..*", 4), (["c_fc", r".*\.attn\.qkv"], 4)],
)
def test_suffixes_and_regular_expressions(targets: str | list[str], count: int) -> None:
    assert len(names(targets=targets)) == count


def test_a_suffix_ends_at_a_dot() -> None:
    with pytest.raises(ValueError, match="matches no layer"):
        names(targets="_fc")


def test_excludes_win_and_an_exclude_without_a_match_is_warned_about() -> None:
    assert names(exclude=["attn.qkv", r"blocks\.1\..*"]) == [
        "blocks.0.attn.c_proj",
        "blocks.0.mlp.c_fc",
        "blocks.0.mlp.c_proj",
    ]
    with pytest.warns(UserWarning, match="'nowhere' matches no layer"):
        names(exclude="nowhere")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"targets": "c_fcc"}, ["'c_fcc'", "all-linear", "c_fc"]),
        ({"targets": ["c_fc", "nowhere"]}, ["'nowhere'", "matches no layer"]),
        ({"targets": "c_fc", "exclude": "c_fc"}, ["leaves no layer", "excluded"]),
        ({"targets": "odd"}, ["leaves no layer", "multiple of 4"]),
        ({"targets": "("}, ["'('", "regular expression"]),
        ({"targets": []}, ["targets is empty"]),
    ],
)
def test_a_wrong_target_is_an_error_that_leaves_the_model_alone(arguments, words) -> None:
    model = Transformer()
    before = [type(module) for module in model.modules()]
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the words are checked below
        st.sparsify_(model, **arguments)
    assert all(word in str(caught.value) for word in words), caught.value
    assert [type(module) for module in model.modules()] == before


def test_many_layers_that_stay_dense_are_a_short_message() -> None:
    class OwnLinear(nn.Linear):
        pass

    odd = [nn.Linear(4, size) for size in range(5, 11) if size != 8]
    model = nn.Sequential(*(OwnLinear(8, 8) for _ in range(99)), *odd)
    with pytest.raises(ValueError, match=r"subclass of nn\.Linear") as caught:
        st.sparsify_(model, targets=r"\d+")
    assert "'0', '1', '2' and 96 more: subclass of nn.Linear (OwnLinear)" in str(caught.value)
    assert "out_features 5 is not a multiple of 4; " in str(caught.value)
    assert "and 3 more reasons" in str(caught.value)
    assert len(str(caught.value)) < 500


def test_weights_that_are_no_parameters_stay_dense_with_the_reason() -> None:
    model = nn.Sequential(
        nn.Linear(8, 8), torch.nn.utils.spectral_norm(nn.Linear(8, 8)), nn.Linear(8, 8), nn.LazyLinear(8)
    )
    torch.nn.utils.prune.random_unstructured(model[2], "weight", 0.5)
    reasons = [choice.reason for choice in st.select_layers(model).choices]
    assert reasons[0] == ""
    assert reasons[1] == reasons[2] == "weight is no parameter (weight_norm, spectral_norm or prune): remove that first"
    assert reasons[3] == "subclass of nn.Linear (LazyLinear)"


def test_a_model_without_linear_layers_is_named() -> None:
    with pytest.raises(ValueError, match="no linear or convolutional layer"):
        select_layers(nn.Sequential(nn.ReLU()))


def test_a_shared_module_counts_once_and_shared_weights_stay_dense() -> None:
    layer = nn.Linear(8, 8)
    assert len(select_layers(nn.Sequential(layer, layer)).sparse) == 1
    twin = nn.Linear(8, 8)
    twin.weight = layer.weight
    model = nn.Sequential(layer, twin, nn.Linear(8, 8))
    assert [choice.reason for choice in select_layers(model).choices] == ["tied to 1.weight", "tied to 0.weight", ""]


def test_the_table_shows_every_layer(capsys: pytest.CaptureFixture[str]) -> None:
    select_layers(Transformer(), "mlp").print_table()
    shown = capsys.readouterr().out
    assert "blocks.1.mlp.c_fc" in shown
    assert "not in targets" in shown


def test_sparsify_keeps_parameters_hooks_and_keys() -> None:
    model = Transformer()
    calls = []
    model.blocks[0]["mlp"].c_fc.register_forward_hook(lambda *_: calls.append(1))
    parameters, keys = [id(p) for p in model.parameters()], list(model.state_dict())
    st.sparsify_(model, "mlp", verbose=False)
    assert [id(p) for p in model.parameters()] == parameters
    assert list(model.state_dict()) == keys
    layer = model.blocks[0]["mlp"].c_fc
    assert type(layer) is st.SparseLinear
    assert torch.equal(layer.mask, st.transposable_mask(layer.weight.abs()))
    layer(torch.randn(2, 16))
    assert calls == [1]


def test_sparsify_undoes_itself_if_a_later_layer_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    from sparsetrain.layers import sparsify

    model = Transformer()
    before = {name: (type(m), dict(m.__dict__).keys(), list(m._buffers)) for name, m in model.named_modules()}
    calls = iter(range(100))
    original = sparsify.to_sparse_

    def fail_third(*args: object) -> nn.Module:
        if next(calls) == 2:
            raise RuntimeError("no more memory")
        return original(*args)

    monkeypatch.setattr(sparsify, "to_sparse_", fail_third)
    with pytest.raises(RuntimeError, match="no more memory"):
        st.sparsify_(model, verbose=False)
    assert before == {name: (type(m), dict(m.__dict__).keys(), list(m._buffers)) for name, m in model.named_modules()}


def test_export_writes_zeros_or_keeps_the_masters() -> None:
    for zeros in (True, False):
        model = Transformer()
        st.sparsify_(model, "mlp", verbose=False)
        layer = model.blocks[0]["mlp"].c_fc
        mask, master = layer.mask, layer.weight.detach().clone()
        x = torch.randn(3, 16)
        sparse_output = layer(x)
        assert len(st.export_dense_(model, zeros=zeros)) == 4
        assert type(layer) is nn.Linear
        assert "mask_codes" not in dict(layer.named_buffers())
        assert torch.equal(layer.weight, master * mask if zeros else master)
        if zeros:
            torch.testing.assert_close(layer(x), sparse_output)


def test_row_wise_and_random_masks() -> None:
    model = Transformer()
    st.sparsify_(model, "mlp", pattern="row_wise", criterion=st.Random(seed=3), verbose=False)
    mask = model.blocks[0]["mlp"].c_fc.mask
    assert st.is_nm(mask)
    assert not st.is_transposable(mask)
    other = Transformer()
    st.sparsify_(other, "mlp", pattern="row_wise", criterion=st.Random(seed=4), verbose=False)
    assert not torch.equal(mask, other.blocks[0]["mlp"].c_fc.mask)


@pytest.mark.parametrize("name", ["pattern", "criterion", "gradient", "backend"])
def test_an_unknown_name_is_answered_with_the_allowed_ones(name: str) -> None:
    model = Transformer()
    with pytest.raises(ValueError, match=f"{name} is 'nonsense': it must be"):
        st.sparsify_(model, **{name: "nonsense"})
    assert not any(isinstance(module, st.SparseLinear) for module in model.modules())
