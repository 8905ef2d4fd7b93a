"""What the targets take of real architectures: every expected layer is written out here by hand."""

import itertools
import re
import warnings
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import nn

from sparsetrain import select_layers

CLASSES = 8
VOCABULARY = 64


def names(*patterns: str) -> set[str]:
    """Write out ``a.{b,c}`` as ``a.b`` and ``a.c``."""
    found = set()
    for pattern in patterns:
        parts = [part.split(",") for part in re.split(r"[{}]", pattern)]
        choices = [part if place % 2 else [",".join(part)] for place, part in enumerate(parts)]
        found |= {"".join(pieces) for pieces in itertools.product(*choices)}
    return found


def transformer(model: str, config: str, **values: object) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import transformers

        return getattr(transformers, model)(getattr(transformers, config)(**values))

    return build


SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "intermediate_size": 32, "num_labels": CLASSES,
}  # fmt: skip
TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
DECODER = {**SIZES, **TOKENS, "num_key_value_heads": 1, "head_dim": 8}
GPT2 = {"vocab_size": VOCABULARY, "n_embd": 16, "n_layer": 1, "n_head": 2, "num_labels": CLASSES, **TOKENS}
T5 = {"vocab_size": VOCABULARY, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
IMAGES = {key: value for key, value in SIZES.items() if key != "vocab_size"} | {"image_size": 16, "patch_size": 8}
DISTIL = {"vocab_size": VOCABULARY, "dim": 16, "hidden_dim": 32, "n_layers": 1, "n_heads": 2, "num_labels": CLASSES}


def timm_model(name: str, **values: object) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import timm

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return timm.create_model(name, **{"num_classes": CLASSES, **values})

    return build


def resnet() -> nn.Module:
    from torchvision.models.resnet import BasicBlock, ResNet

    return ResNet(BasicBlock, [1, 1, 1, 1], num_classes=CLASSES)


def vgg() -> nn.Module:
    from torchvision.models.vgg import VGG, make_layers

    return VGG(make_layers([8, "M", 16, "M"]), num_classes=CLASSES)


def efficientnet() -> nn.Module:
    from torchvision.models.efficientnet import EfficientNet, MBConvConfig

    blocks = [MBConvConfig(1, 3, 1, 16, 8, 1, 1.0, 1.0), MBConvConfig(4, 3, 2, 8, 16, 1, 1.0, 1.0)]
    return EfficientNet(blocks, dropout=0.0, num_classes=CLASSES, last_channel=32)


def convnext() -> nn.Module:
    from torchvision.models.convnext import CNBlockConfig, ConvNeXt

    return ConvNeXt([CNBlockConfig(8, 16, 1), CNBlockConfig(16, None, 1)], num_classes=CLASSES)


def vision_transformer() -> nn.Module:
    from torchvision.models.vision_transformer import VisionTransformer

    return VisionTransformer(16, 8, 1, 2, 16, 32, num_classes=CLASSES)


def inception() -> nn.Module:
    from torchvision.models import inception_v3

    return inception_v3(num_classes=CLASSES, init_weights=False)


class Expected(NamedTuple):
    """What a model's groups take.

    Args:
        build: Makes the model.
        mlp: Names of the feed-forward layers.
        linear: Names of the other linear layers that ``"all-linear"`` takes.
        conv: Names that ``"all-conv"`` takes, or None to compare nothing.
        heads: Names that stay dense as output heads.
        mlp_conv: Names of feed-forward layers that are convolutions.
        experts: Names of stacked experts, which stay dense.
    """

    build: Callable[[], nn.Module]
    mlp: set[str] = frozenset()
    linear: set[str] = frozenset()
    conv: set[str] | None = frozenset()
    heads: set[str] = frozenset()
    mlp_conv: set[str] = frozenset()
    experts: set[str] = frozenset()


def bert_like(model: str, config: str, prefix: str, linear: set[str], heads: set[str], **values: object) -> Expected:
    layer = f"{prefix}encoder.layer.0."
    return Expected(
        transformer(model, config, **SIZES, **values),
        mlp=names(layer + "{intermediate,output}.dense"),
        linear=names(layer + "attention.self.{query,key,value}", layer + "attention.output.dense") | linear,
        heads=heads,
    )


def llama_like(model: str, config: str, head: str = "lm_head", **values: object) -> Expected:
    return Expected(
        transformer(model, config, **DECODER, **values),
        mlp=names("model.layers.0.mlp.{gate,up,down}_proj"),
        linear=names("model.layers.0.self_attn.{q,k,v,o}_proj"),
        heads={head},
    )


ALBERT = "encoder.albert_layer_groups.0.albert_layers.0."
ALBERT_LINEAR = names(
    "albert.encoder.embedding_hidden_mapping_in", f"albert.{ALBERT}attention.{{query,key,value,dense}}"
)
DISTILBERT_LAYER = "distilbert.transformer.layer.0."
DISTILBERT_ATTENTION = names(DISTILBERT_LAYER + "attention.{q,k,v,out}_lin")
T5_MLP = names("encoder.block.0.layer.1.DenseReluDense.{wi,wo}", "decoder.block.0.layer.2.DenseReluDense.{wi,wo}")
T5_ATTENTION = names(
    "encoder.block.0.layer.0.SelfAttention.{q,k,v,o}", "decoder.block.0.layer.0.SelfAttention.{q,k,v,o}",
    "decoder.block.0.layer.1.EncDecAttention.{q,k,v,o}",
)  # fmt: skip
RESNET_CONV = names(
    "layer1.0.conv{1,2}", "layer{2,3,4}.0.conv{1,2}", "layer{2,3,4}.0.downsample.0"
)  # conv1 has three input channels
TIMM_SWIN = {"depths": (1, 1), "num_heads": (2, 2), "embed_dim": 8, "img_size": 16, "patch_size": 2, "window_size": 4}
TIMM_CONVNEXT = {"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 16)}
TIMM_VIT = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}

EXPECTED: dict[str, Expected] = {
    "bert": bert_like("BertModel", "BertConfig", "", {"pooler.dense"}, set()),
    "bert-classifier": bert_like(
        "BertForSequenceClassification", "BertConfig", "bert.", {"bert.pooler.dense"}, {"classifier"}
    ),
    "bert-tokens": bert_like("BertForTokenClassification", "BertConfig", "bert.", set(), {"classifier"}),
    "bert-spans": bert_like("BertForQuestionAnswering", "BertConfig", "bert.", set(), {"qa_outputs"}),
    "bert-pretraining": bert_like(
        "BertForPreTraining", "BertConfig", "bert.", {"bert.pooler.dense", "cls.predictions.transform.dense"},
        {"cls.predictions.decoder", "cls.seq_relationship"},
    ),
    "minilm": bert_like("BertModel", "BertConfig", "", {"pooler.dense"}, set(), max_position_embeddings=32),
    "roberta": bert_like("RobertaModel", "RobertaConfig", "", {"pooler.dense"}, set()),
    "roberta-classifier": bert_like(
        "RobertaForSequenceClassification", "RobertaConfig", "roberta.", {"classifier.dense"}, {"classifier.out_proj"}
    ),
    "roberta-mlm": bert_like(
        "RobertaForMaskedLM", "RobertaConfig", "roberta.", {"lm_head.dense"}, {"lm_head.decoder"}
    ),
    "electra": bert_like(
        "ElectraModel", "ElectraConfig", "", {"embeddings_project"}, set(), embedding_size=8
    ),
    "electra-classifier": bert_like(
        "ElectraForSequenceClassification", "ElectraConfig", "electra.",
        {"electra.embeddings_project", "classifier.dense"}, {"classifier.out_proj"}, embedding_size=8,
    ),
    "electra-mlm": bert_like(
        "ElectraForMaskedLM", "ElectraConfig", "electra.",
        {"electra.embeddings_project", "generator_predictions.dense"}, {"generator_lm_head"}, embedding_size=8,
    ),
    "albert": Expected(
        transformer("AlbertForSequenceClassification", "AlbertConfig", **SIZES, embedding_size=8),
        mlp=names(f"albert.{ALBERT}{{ffn,ffn_output}}"), linear=ALBERT_LINEAR | {"albert.pooler"}, heads={"classifier"},
    ),
    "albert-mlm": Expected(
        transformer("AlbertForMaskedLM", "AlbertConfig", **SIZES, embedding_size=8),
        mlp=names(f"albert.{ALBERT}{{ffn,ffn_output}}"), linear=ALBERT_LINEAR | {"predictions.dense"},
        heads={"predictions.decoder"},
    ),
    "distilbert": Expected(
        transformer("DistilBertForSequenceClassification", "DistilBertConfig", **DISTIL),
        mlp=names(DISTILBERT_LAYER + "ffn.lin{1,2}"), linear=DISTILBERT_ATTENTION | {"pre_classifier"},
        heads={"classifier"},
    ),
    "distilbert-mlm": Expected(
        transformer("DistilBertForMaskedLM", "DistilBertConfig", **DISTIL),
        mlp=names(DISTILBERT_LAYER + "ffn.lin{1,2}"), linear=DISTILBERT_ATTENTION | {"vocab_transform"},
        heads={"vocab_projector"},
    ),
    "llama": llama_like("LlamaForCausalLM", "LlamaConfig"),
    "llama-classifier": llama_like("LlamaForSequenceClassification", "LlamaConfig", "score"),
    "qwen2": llama_like("Qwen2ForCausalLM", "Qwen2Config"),
    "qwen3": llama_like("Qwen3ForCausalLM", "Qwen3Config"),
    "gemma": llama_like("GemmaForCausalLM", "GemmaConfig"),
    "mixtral": Expected(
        transformer("MixtralForCausalLM", "MixtralConfig", **DECODER, num_local_experts=4),
        linear=names("model.layers.0.self_attn.{q,k,v,o}_proj"), heads={"lm_head"},
        experts=names("model.layers.0.mlp.experts.{gate_up,down}_proj"),
    ),
    "qwen2-moe": Expected(
        transformer(
            "Qwen2MoeForCausalLM", "Qwen2MoeConfig", **DECODER, num_experts=4, moe_intermediate_size=8,
            shared_expert_intermediate_size=8,
        ),
        mlp=names("model.layers.0.mlp.shared_expert.{gate,up,down}_proj"),
        linear=names("model.layers.0.self_attn.{q,k,v,o}_proj"), heads={"lm_head"},
        experts=names("model.layers.0.mlp.experts.{gate_up,down}_proj"),
    ),
    "gpt2": Expected(
        transformer("GPT2LMHeadModel", "GPT2Config", **GPT2), mlp=names("transformer.h.0.mlp.c_{fc,proj}"),
        linear=names("transformer.h.0.attn.c_{attn,proj}"), heads={"lm_head"},
    ),
    "gpt2-without-a-head": Expected(
        transformer("GPT2Model", "GPT2Config", **GPT2), mlp=names("h.0.mlp.c_{fc,proj}"),
        linear=names("h.0.attn.c_{attn,proj}"),
    ),
    "gpt2-classifier": Expected(
        transformer("GPT2ForSequenceClassification", "GPT2Config", **GPT2), heads={"score"},
        mlp=names("transformer.h.0.mlp.c_{fc,proj}"), linear=names("transformer.h.0.attn.c_{attn,proj}"),
    ),
    "t5": Expected(
        transformer("T5ForConditionalGeneration", "T5Config", **T5), mlp=T5_MLP, linear=T5_ATTENTION, heads={"lm_head"},
    ),
    "t5-classifier": Expected(
        transformer("T5ForSequenceClassification", "T5Config", **T5, num_labels=CLASSES),
        mlp={f"transformer.{name}" for name in T5_MLP},
        linear={f"transformer.{name}" for name in T5_ATTENTION} | {"classification_head.dense"},
        heads={"classification_head.out_proj"},
    ),
    "vit": Expected(
        transformer("ViTModel", "ViTConfig", **IMAGES), mlp=names("layers.0.mlp.fc{1,2}"),
        linear=names("layers.0.attention.{q,k,v,o}_proj") | {"pooler.dense"},
    ),
    "vit-classifier": Expected(
        transformer("ViTForImageClassification", "ViTConfig", **IMAGES), mlp=names("vit.layers.0.mlp.fc{1,2}"),
        linear=names("vit.layers.0.attention.{q,k,v,o}_proj"), heads={"classifier"},
    ),
    "torchvision-resnet": Expected(resnet, conv=RESNET_CONV, heads={"fc"}),
    "torchvision-vgg": Expected(
        vgg, linear=names("classifier.{0,3}"), conv={"features.3"}, heads={"classifier.6"}
    ),
    "torchvision-efficientnet": Expected(
        efficientnet, heads={"classifier.1"},
        conv=names(
            "features.1.0.block.1.fc{1,2}", "features.1.0.block.2.0", "features.2.0.block.{0,3}.0", "features.3.0"
        ),  # features.2.0.block.2 squeezes to two channels
    ),
    "torchvision-convnext": Expected(
        convnext, mlp=names("features.{1,3}.0.block.{3,5}"), conv={"features.2.1"}, heads={"classifier.2"}
    ),
    "torchvision-vit": Expected(
        vision_transformer, mlp=names("encoder.layers.encoder_layer_0.mlp.{0,3}"), heads={"heads.head"}
    ),
    "torchvision-inception": Expected(inception, conv=None, heads={"AuxLogits.fc", "fc"}),
    "timm-resnet": Expected(timm_model("resnet18"), heads={"fc"}, conv=names(
        "layer{1,2,3,4}.{0,1}.conv{1,2}", "layer{2,3,4}.0.downsample.0"
    )),
    "timm-vgg": Expected(
        timm_model("vgg11"), heads={"head.fc"}, mlp_conv=names("pre_logits.fc{1,2}"),
        conv=names("features.{3,6,8,11,13,16,18}", "pre_logits.fc{1,2}"),
    ),
    "timm-efficientnet": Expected(
        timm_model("test_efficientnet"), heads={"classifier"},
        conv=names(
            "blocks.0.0.conv", "blocks.{1,2}.0.conv_{exp,pwl}", "blocks.{3,4}.0.conv_{pw,pwl}",
            "blocks.{3,4}.0.se.conv_{reduce,expand}", "conv_head",
        ),
    ),
    "timm-convnext": Expected(
        timm_model("convnext_tiny", **TIMM_CONVNEXT), heads={"head.fc"},
        mlp=names("stages.{0,1,2,3}.blocks.0.mlp.fc{1,2}"), conv=names("stages.{1,2,3}.downsample.1"),
    ),
    "timm-convnext-of-convolutions": Expected(
        timm_model("convnext_atto", **TIMM_CONVNEXT), heads={"head.fc"},
        mlp_conv=names("stages.{0,1,2,3}.blocks.0.mlp.fc{1,2}"),
        conv=names("stages.{0,1,2,3}.blocks.0.mlp.fc{1,2}", "stages.{1,2,3}.downsample.1"),
    ),
    "timm-vit": Expected(
        timm_model("vit_tiny_patch16_224", **TIMM_VIT), mlp=names("blocks.0.mlp.fc{1,2}"),
        linear=names("blocks.0.attn.{qkv,proj}"), heads={"head"},
    ),
    "timm-vit-without-a-head": Expected(
        timm_model("vit_tiny_patch16_224", **TIMM_VIT, num_classes=0), mlp=names("blocks.0.mlp.fc{1,2}"),
        linear=names("blocks.0.attn.{qkv,proj}"),
    ),
    "timm-deit": Expected(
        timm_model("deit_tiny_distilled_patch16_224", **TIMM_VIT), mlp=names("blocks.0.mlp.fc{1,2}"),
        linear=names("blocks.0.attn.{qkv,proj}"), heads={"head", "head_dist"},
    ),
    "timm-swin": Expected(
        timm_model("swin_tiny_patch4_window7_224", **TIMM_SWIN), mlp=names("layers.{0,1}.blocks.0.mlp.fc{1,2}"),
        linear=names("layers.{0,1}.blocks.0.attn.{qkv,proj}", "layers.1.downsample.reduction"), heads={"head.fc"},
    ),
}  # fmt: skip

MODELS: dict[str, nn.Module] = {}


@pytest.fixture
def model(architecture: str) -> nn.Module:
    """The model without memory: what is chosen depends on classes, names and sizes."""
    if architecture not in MODELS:
        with torch.device("meta"):
            MODELS[architecture] = EXPECTED[architecture].build()
    return MODELS[architecture]


def sparse(model: nn.Module, targets: str) -> set[str]:
    try:
        return {choice.name for choice in select_layers(model, targets).sparse}
    except ValueError as error:
        assert "matches no layer" in str(error) or "leaves no layer" in str(error)  # noqa: PT017
        return set()


@pytest.mark.parametrize("architecture", EXPECTED)
def test_mlp_takes_feed_forward_layers(model: nn.Module, architecture: str) -> None:
    assert sparse(model, "mlp") == EXPECTED[architecture].mlp | EXPECTED[architecture].mlp_conv


@pytest.mark.parametrize("architecture", EXPECTED)
def test_all_linear_takes_all_but_heads(model: nn.Module, architecture: str) -> None:
    expected = EXPECTED[architecture]
    assert sparse(model, "all-linear") == expected.mlp | expected.linear


@pytest.mark.parametrize("architecture", [name for name, entry in EXPECTED.items() if entry.conv is not None])
def test_all_conv_takes_all_that_fit(model: nn.Module, architecture: str) -> None:
    assert sparse(model, "all-conv") == EXPECTED[architecture].conv


@pytest.mark.parametrize("architecture", EXPECTED)
def test_heads_stay_dense_with_the_reason(model: nn.Module, architecture: str) -> None:
    expected = EXPECTED[architecture]
    targets = ["all-linear"] if expected.mlp | expected.linear else ["all-linear", "all-conv"]
    choices = select_layers(model, targets).choices
    heads = {choice.name: choice.reason for choice in choices if choice.reason.startswith("output head")}
    assert set(heads) == expected.heads
    fits = {name for name in heads if model.get_submodule(name).weight.shape[0] % 4 == 0}
    tied = {name for name in fits if "tied to" in heads[name]}
    for name in fits - tied:
        assert heads[name] == "output head (name it in targets to make it sparse)"
        assert name in sparse(model, name)


@pytest.mark.parametrize("architecture", [name for name, entry in EXPECTED.items() if entry.experts])
def test_stacked_experts_are_listed_and_counted(model: nn.Module, architecture: str) -> None:
    report = select_layers(model, "all-linear")
    listed = {choice.name: choice for choice in report.choices if choice.name in EXPECTED[architecture].experts}
    assert set(listed) == EXPECTED[architecture].experts
    for name, choice in listed.items():
        weight = model.get_parameter(name)
        assert choice.shape == tuple(weight.shape)
        assert choice.count == weight.numel()
        assert choice.reason == "3-D expert weights, which have no masks yet"
    with pytest.raises(ValueError, match="3-D expert weights"):
        select_layers(model, "experts")
