"""What entries of targets and exclude mean, and which layers of small models are blocks and heads."""

import itertools
from typing import Any

import pytest
import torch
from lightning.fabric import Fabric
from lightning.pytorch import LightningModule
from torch import nn

from sparsetrain import SparseTraining, select_layers, sparsify_
from sparsetrain.layers.selection.select_layers import LayerChoice, SelectionReport


class Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.q_proj, self.o_proj = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)


class Block(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.attn, self.mlp = Attention(width), nn.Sequential(nn.Linear(width, 16), nn.GELU(), nn.Linear(16, width))


class Model(nn.Module):
    """Twelve blocks, so that a number can be the beginning of another."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, 8)
        self.encoder = nn.ModuleDict({"stem": nn.Conv1d(8, 8, 1), "layers": nn.ModuleList(Block() for _ in range(12))})
        self.decoder = nn.Linear(8, 32, bias=False)
        self.decoder.weight = self.embed.weight


LAYER = ["attn.q_proj", "attn.o_proj", "mlp.0", "mlp.2"]


def sparse(model: nn.Module, targets: Any, exclude: Any = ()) -> list[str]:
    return [choice.name for choice in select_layers(model, targets, exclude).sparse]


def layers(*numbers: int, of: list[str] = LAYER) -> list[str]:
    return [f"encoder.layers.{number}.{name}" for number in numbers for name in of]


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ("encoder.layers.3.mlp.0", layers(3, of=["mlp.0"])),
        ("layers.3.mlp.0", layers(3, of=["mlp.0"])),
        ("q_proj", layers(*range(12), of=["attn.q_proj"])),
        ("encoder.layers.1", layers(1)),
        ("layers.1", layers(1)),
        ("attn", layers(*range(12), of=["attn.q_proj", "attn.o_proj"])),
        ("encoder", ["encoder.stem", *layers(*range(12))]),
        ("layers.*.mlp.*", layers(*range(12), of=["mlp.0", "mlp.2"])),
        ("encoder.layers.1.*", layers(1)),
        ("layers.[13].attn.*", layers(1, 3, of=["attn.q_proj", "attn.o_proj"])),
        ("layers.1?", layers(10, 11)),
        ("layers.*.attn", layers(*range(12), of=["attn.q_proj", "attn.o_proj"])),
        ("*_proj", layers(*range(12), of=["attn.q_proj", "attn.o_proj"])),
        (r"encoder\.layers\.(0|11)\..*", layers(0, 11)),
        (r".*\.[02]\.mlp\.\d", layers(0, 2, of=["mlp.0", "mlp.2"])),
        (r"encoder\.layers\.[4-5]", layers(4, 5)),
        (r"encoder\.(stem|layers\.0\.mlp)", ["encoder.stem"]),
    ],
)
def test_names_submodules_globs_and_regular_expressions(entry: str, expected: list[str]) -> None:
    assert sparse(Model(), entry) == expected
    rest = [name for name in ["encoder.stem", *layers(*range(12))] if name not in expected]
    if rest:
        assert sparse(Model(), ["all-linear", "all-conv"], entry) == rest


def test_of_several_readings_the_nearest_is_taken() -> None:
    model = nn.ModuleDict(
        {
            "fc": nn.Linear(8, 8),
            "block": nn.ModuleDict({"fc": nn.ModuleDict({"up": nn.Linear(8, 8)}), "down": nn.Linear(8, 8)}),
            "a": nn.ModuleDict({"b": nn.Linear(8, 8)}),
            "axb": nn.Linear(8, 8),
        }
    )
    assert sparse(model, "fc") == ["fc"]  # the layer before the submodule block.fc
    assert sparse(model, "a.b") == ["a.b"]  # the name before the expression that takes axb as well
    assert sparse(model, "block.*") == ["block.fc.up", "block.down"]
    assert sparse(model, "a.b|a.*b") == ["a.b", "axb"]


@pytest.mark.parametrize("wrap", ["compile", "fabric", "lightning", "twice"])
def test_names_hold_inside_wrappers(wrap: str) -> None:
    class Module(LightningModule):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.net = model

    model, prefix = {
        "compile": lambda: (torch.compile(Model()), "_orig_mod."),
        "fabric": lambda: (Fabric(accelerator="cpu", devices=1).setup_module(Model()), "_forward_module."),
        "lightning": lambda: (Module(Model()), "net."),
        "twice": lambda: (Module(torch.compile(Model())), "net._orig_mod."),
    }[wrap]()
    for entry in ("encoder.layers.1", "layers.1.*", r"(net\.)?encoder\.layers\.1\..*"):
        assert sparse(model, entry) == [prefix + name for name in layers(1)]
    assert sparse(model, "mlp") == [prefix + name for name in layers(*range(12), of=["mlp.0", "mlp.2"])]


@pytest.mark.parametrize("argument", ["targets", "exclude"])
@pytest.mark.parametrize(
    ("value", "error", "words"),
    [
        ("", ValueError, "holds an empty string"),
        (["mlp", ""], ValueError, "holds an empty string"),
        (["mlp", 3], TypeError, "holds 3: its entries must be strings"),
        ([None], TypeError, "holds None"),
        (5, TypeError, "is 5: it must be a string or a list of strings"),
        (None, TypeError, "is None: it must be a string"),
        (b"mlp", TypeError, "is b'mlp': it must be a string"),
        ("(", ValueError, "'\\('.* is no regular expression"),
    ],
)
def test_what_is_no_entry_is_refused(argument: str, value: Any, error: type[Exception], words: str) -> None:
    model = Model()
    with pytest.raises(error, match=f"{argument}.*{words}"):
        sparsify_(model, **{argument: value}, verbose=False)
    assert not [module for module in model.modules() if type(module).__name__.startswith("Sparse")]


@pytest.mark.parametrize(
    ("target", "close"),
    [("q_porj", "'q_proj'"), ("encodr", "'encoder'"), ("layers.12", "'encoder.layers.1"), ("layers.*.ffn.*", "mlp")],
)
def test_a_target_without_a_match_names_the_kinds_and_what_is_close(target: str, close: str) -> None:
    with pytest.raises(ValueError, match="matches no layer") as caught:
        select_layers(Model(), ["mlp", target])
    for kind in ("'all-linear', 'all-conv', 'mlp'", "a layer or of a submodule", "a glob", "regular expression", close):
        assert kind in str(caught.value)


@pytest.mark.parametrize(
    ("targets", "exclude", "said"),
    [
        (["mlp", "decoder"], (), "|| stays dense: 'decoder' (tied to embed.weight)"),
        (["mlp", "dec*"], (), "|| stays dense: 'decoder' (tied to embed.weight)"),
        (["mlp", r"(de)+coder"], (), "|| stays dense: 'decoder' (tied to embed.weight)"),
        (["mlp", "all-linear"], (), None),
        (["mlp", "decoder"], "decoder", None),
        (["mlp", "*coder*"], (), None),  # takes others
    ],
)
def test_a_layer_that_is_named_and_stays_dense_is_said_on_the_summary_line(
    targets: list[str], exclude: Any, said: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    model = Model()
    training = SparseTraining(model, torch.optim.AdamW(model.parameters()), "sr_ste", 4, targets, exclude)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.endswith(said) if said else "stays dense" not in line
    assert training.report.summary() == line


def test_many_named_layers_that_stay_dense_are_counted() -> None:
    model = nn.ModuleDict({f"part{place}": nn.ModuleDict({"fc": nn.Linear(8, 6)}) for place in range(5)})
    model["body"] = nn.Linear(8, 8)
    line = select_layers(model, ["body", "fc"]).summary()
    reason = "(out_features 6 is not a multiple of 4)"
    assert line.endswith(f"|| stays dense: 'part0.fc' {reason}, 'part1.fc' {reason}, 'part2.fc' {reason} and 2 more")


def test_the_report_is_where_it_was() -> None:
    choice = LayerChoice("a", (4, 4))
    assert SelectionReport((choice,)).sparse == (choice,)


def autoencoder() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8))


def network(**parts: nn.Module) -> nn.Module:
    return nn.ModuleDict(parts)


def sized(attribute: str, value: Any, **parts: nn.Module) -> nn.Module:
    model = nn.ModuleDict(parts)
    setattr(model, attribute, value)
    return model


class Config:
    def __init__(self, **values: Any) -> None:
        vars(self).update(values)


class HeadOfAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.key, self.query, self.value = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)


def stages() -> nn.Module:
    return nn.Sequential(nn.Sequential(nn.Conv2d(4, 8, 1)), nn.Sequential(nn.Conv2d(8, 8, 1)))


def linears(*sizes: int) -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(*pair) for pair in itertools.pairwise(sizes)))


@pytest.mark.parametrize(
    ("model", "heads"),
    [
        (autoencoder(), set()),
        (network(encoder=linears(8, 16, 4), decoder=linears(4, 16, 8)), set()),
        (sized("num_classes", 12, body=linears(8, 8), top=nn.Linear(8, 12)), {"top"}),
        (sized("num_classes", 12, body=linears(8, 12), top=nn.Linear(12, 8)), set()),
        (sized("config", Config(vocab_size=32), body=linears(8, 8), top=nn.Linear(8, 32)), {"top"}),
        (sized("config", {"num_labels": 4}, body=linears(8, 8), top=nn.Linear(8, 4)), {"top"}),
        (sized("config", Config(id2label={0: "no", 1: "yes", 2: "both", 3: "none"}), body=nn.Linear(8, 8),
               top=nn.Linear(8, 4)), {"top"}),
        (sized("num_classes", 8, body=linears(8, 16, 8), top=nn.Linear(8, 8)), set()),  # square: no head by its width
        (network(embed=nn.Embedding(32, 8), body=linears(8, 8), top=nn.Linear(8, 32)), {"top"}),
        (network(embed=nn.Embedding(32, 8), positions=nn.Embedding(16, 8), body=linears(8, 16)), set()),
        (network(net=sized("num_classes", 4, body=linears(8, 8), top=nn.Linear(8, 4)), loss=nn.Linear(8, 8)),
         {"net.top"}),
        (network(features=linears(8, 8), heads=nn.ModuleDict({"a": linears(8, 8, 4), "b": nn.Linear(8, 4)})),
         {"heads.a.1", "heads.b"}),
        (network(body=linears(8, 8), policy_head=linears(8, 8, 4), value_head=nn.Linear(8, 4)),
         {"policy_head.1", "value_head"}),
        (network(heads=nn.ModuleList(HeadOfAttention() for _ in range(2)), proj=nn.Linear(16, 8)), set()),
        (network(attention=network(heads=linears(8, 8)), up=nn.Linear(8, 8)), set()),
        (network(net=network(layer1=stages(), fc=nn.Linear(8, 4)), other=nn.Linear(8, 8)), {"net.fc"}),
        (network(blocks=nn.ModuleList(network(conv=nn.Conv2d(4, 4, 1), fc=nn.Linear(8, 8)) for _ in range(2))), set()),
        (network(conv=nn.Conv2d(8, 8, 1), conv_head=nn.Conv2d(8, 16, 1), classifier=nn.Linear(16, 8)), {"classifier"}),
        (network(body=linears(8, 8), pre_classifier=nn.Linear(8, 8), classifier=nn.Linear(8, 4)), {"classifier"}),
    ],
)  # fmt: skip
def test_heads_by_name_place_and_width(model: nn.Module, heads: set[str]) -> None:
    groups = [f"all-{kind}" for kind in ("linear", "conv") if kind in str(model).lower()]
    choices = select_layers(model, groups).choices
    assert {choice.name for choice in choices if choice.reason.startswith("output head")} == heads
    for name in heads:  # an explicit name is always taken
        assert sparse(model, [*groups, name]) == [
            choice.name for choice in choices if choice.is_sparse or choice.name == name
        ]


def test_a_tied_head_says_that_it_is_one_and_what_it_is_tied_to() -> None:
    assert select_layers(Model()).choices[-1].reason == "output head, tied to embed.weight"


class Squeezed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)


class SqueezeExcitation(Squeezed):
    pass


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(torch.ones(2, 16, 8)), nn.Parameter(torch.ones(2, 8, 16))
        self.scale = nn.Parameter(torch.ones(2, 8))


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (autoencoder(), ["0", "2"]),
        (linears(8, 4, 8), []),
        (linears(8, 8, 8), []),
        (network(x=Attention(8)), []),
        (network(x=network(qkv=nn.Linear(8, 24), proj=nn.Linear(24, 8))), []),
        (network(cross_attn2=network(fc1=nn.Linear(8, 16), fc2=nn.Linear(16, 8))), []),
        (network(x=network(gate=nn.Linear(8, 16), up=nn.Linear(8, 16), down=nn.Linear(16, 8))),
         ["x.gate", "x.up", "x.down"]),
        (network(mlp=network(gate=nn.Linear(8, 16), up=nn.Linear(8, 16), down=nn.Linear(16, 8))),
         ["mlp.gate", "mlp.up", "mlp.down"]),
        (network(mlp=network(gate=nn.Linear(8, 4), experts=nn.ModuleList(linears(8, 16, 8) for _ in range(2)))),
         [f"mlp.experts.{expert}.{layer}" for expert in range(2) for layer in range(2)]),
        (network(moe=network(router=network(classifier=nn.Linear(8, 4)), experts=linears(8, 16, 8))),
         ["moe.experts.0", "moe.experts.1"]),
        (network(ffn1=linears(8, 8), feed_forward_2=linears(8, 8)), ["ffn1.0", "feed_forward_2.0"]),
        (network(layer=network(attention=network(output=nn.Linear(8, 8)), intermediate=network(dense=nn.Linear(8, 8)),
                               output=network(dense=nn.Linear(8, 8)))),
         ["layer.intermediate.dense", "layer.output.dense"]),
        (network(output=network(dense=nn.Linear(8, 8))), []),
        (network(x=Squeezed()), ["x.fc1", "x.fc2"]),
        (network(x=SqueezeExcitation()), []),
        (network(conv=nn.Conv2d(8, 16, 1), back=nn.Conv2d(16, 8, 1)), []),
    ],
)  # fmt: skip
def test_feed_forward_blocks_by_name_and_shape(model: nn.Module, expected: list[str]) -> None:
    model = nn.ModuleDict({"net": model})
    if expected:
        assert sparse(model, "mlp") == [f"net.{name}" for name in expected]
    else:
        with pytest.raises(ValueError, match="'mlp' matches no layer"):
            select_layers(model, "mlp")


def test_stacked_experts_are_dense_choices_with_a_reason() -> None:
    model = network(body=nn.Linear(8, 8), experts=Experts())
    report = select_layers(model, "all-linear")
    assert [(choice.name, choice.shape, choice.reason) for choice in report.dense] == [
        (f"experts.{name}", shape, "3-D expert weights, which have no masks yet")
        for name, shape in (("up", (2, 16, 8)), ("down", (2, 8, 16)))
    ]
    assert report.summary().startswith("sparse layers: 1 of 3 || sparse weights: 64 of 576 (11.1 %)")
    assert "|| stays dense: 'experts.up' (3-D expert weights" in select_layers(model, ["body", "experts.up"]).summary()


def test_low_rank_adapters_of_other_libraries_are_left_alone_unless_named() -> None:
    model = network(proj=network(linear=nn.Linear(8, 8), lora_a=nn.Linear(8, 4), lora_b=nn.Linear(4, 8)))
    assert sparse(model, "all-linear") == ["proj.linear"]
    assert sparse(model, ["all-linear", "lora_a"]) == ["proj.linear", "proj.lora_a"]


def test_the_readmes_model_keeps_both_layers() -> None:
    model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))
    assert sparse(model, "all-linear") == sparse(model, "mlp") == ["0", "2"]
