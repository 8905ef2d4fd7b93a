"""Real architectures in miniature, built from their configurations: random weights, no dropout, milliseconds each."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

VOCABULARY = 40
CLASSES = 3


@dataclass(frozen=True)
class Architecture:
    """A model and what to call it with.

    Args:
        model: In training mode; its dropout is 0.
        example: Keyword arguments of its forward.
        has_batch_norm: Whether a forward in training mode changes its buffers.
    """

    model: nn.Module
    example: dict[str, Any] = field(default_factory=dict)
    has_batch_norm: bool = False


def _transformers(name: str, example: dict[str, Any], **values: Any) -> Architecture:
    import transformers

    class_name, config_name = name.split("/")
    config = getattr(transformers, config_name)(**values)
    model = getattr(transformers, class_name)(config)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return _ready(model, example)


def _ready(model: nn.Module, example: dict[str, Any]) -> Architecture:
    norms = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())
    return Architecture(model.train(), example, norms)


def _tokens(length: int = 6) -> torch.Tensor:
    return torch.randint(5, VOCABULARY, (2, length), generator=torch.Generator().manual_seed(1))


def _images(size: int) -> torch.Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))


def _encoder(name: str, **values: Any) -> Callable[[], Architecture]:
    """Build an encoder of BERT's family with a classifier, called with a padded batch."""

    def build() -> Architecture:
        padding = torch.ones(2, 6, dtype=torch.long)
        padding[1, 4:] = 0
        common = {
            "vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
            "intermediate_size": 32, "max_position_embeddings": 16, "num_labels": CLASSES, "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
        }  # fmt: skip
        return _transformers(name, {"input_ids": _tokens(), "attention_mask": padding}, **(common | values))

    return build


def _decoder(name: str, **values: Any) -> Callable[[], Architecture]:
    """Build a decoder of Llama's family with a language-model head, called without a cache."""

    def build() -> Architecture:
        common = {
            "vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
            "num_key_value_heads": 1, "head_dim": 8, "intermediate_size": 32, "max_position_embeddings": 16,
            "attention_dropout": 0.0, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
        }  # fmt: skip
        return _transformers(name, {"input_ids": _tokens(), "use_cache": False}, **(common | values))

    return build


def _distilbert() -> Architecture:
    sizes = {"vocab_size": VOCABULARY, "dim": 16, "hidden_dim": 32, "n_layers": 2, "n_heads": 2}
    rest = {"max_position_embeddings": 16, "dropout": 0.0, "attention_dropout": 0.0, "seq_classif_dropout": 0.0}
    name = "DistilBertForSequenceClassification/DistilBertConfig"
    return _transformers(name, {"input_ids": _tokens()}, num_labels=CLASSES, **sizes, **rest)


def _gpt2() -> Architecture:
    sizes = {"vocab_size": VOCABULARY, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16}
    rest = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 1, "eos_token_id": 2}
    return _transformers("GPT2LMHeadModel/GPT2Config", {"input_ids": _tokens(), "use_cache": False}, **sizes, **rest)


def _t5() -> Architecture:
    sizes = {"vocab_size": VOCABULARY, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    example = {"input_ids": _tokens(), "decoder_input_ids": _tokens(4), "use_cache": False}
    return _transformers("T5ForConditionalGeneration/T5Config", example, dropout_rate=0.0, **sizes)


def _vision(name: str, **values: Any) -> Callable[[], Architecture]:
    """Build a vision transformer of transformers with a classifier for 16×16 images."""

    def build() -> Architecture:
        common = {
            "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
            "image_size": 16, "patch_size": 8, "num_labels": CLASSES, "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
        }  # fmt: skip
        return _transformers(name, {"pixel_values": _images(16)}, **(common | values))

    return build


def _swinv2() -> Architecture:
    sizes = {"image_size": 16, "patch_size": 2, "embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4}
    rates = {"drop_path_rate": 0.0, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    name = "Swinv2ForImageClassification/Swinv2Config"
    return _transformers(name, {"pixel_values": _images(16)}, num_labels=CLASSES, **sizes, **rates)


def _torchvision_resnet() -> Architecture:
    from torchvision.models.resnet import BasicBlock, ResNet

    model = ResNet(BasicBlock, [1, 1, 1, 1], num_classes=CLASSES)
    model.layer3 = model.layer4 = nn.Identity()  # 4.7 of its 4.9 million weights
    model.fc = nn.Linear(128, CLASSES)
    return _ready(model, {"x": _images(32)})


def _torchvision_vgg() -> Architecture:
    from torchvision.models.vgg import VGG, make_layers

    with torch.device("meta"):  # its first linear layer is 25088 × 4096
        model = VGG(nn.Sequential(), num_classes=CLASSES, dropout=0.0)
    model.features = make_layers([8, "M", 16, "M"])
    model.avgpool = nn.AdaptiveAvgPool2d(1)
    for place, sizes in {0: (16, 32), 3: (32, 32), 6: (32, CLASSES)}.items():
        model.classifier[place] = nn.Linear(*sizes)
    return _ready(model, {"x": _images(16)})


def _torchvision_efficientnet() -> Architecture:
    from torchvision.models.efficientnet import EfficientNet, MBConvConfig

    blocks = [MBConvConfig(1, 3, 1, 16, 8, 1, 1.0, 1.0), MBConvConfig(4, 3, 2, 8, 16, 2, 1.0, 1.0)]
    model = EfficientNet(blocks, dropout=0.0, stochastic_depth_prob=0.0, num_classes=CLASSES, last_channel=32)
    return _ready(model, {"x": _images(32)})


def _torchvision_convnext() -> Architecture:
    from torchvision.models.convnext import CNBlockConfig, ConvNeXt

    blocks = [CNBlockConfig(8, 16, 1), CNBlockConfig(16, None, 1)]
    return _ready(ConvNeXt(blocks, stochastic_depth_prob=0.0, num_classes=CLASSES), {"x": _images(32)})


def _torchvision_vit() -> Architecture:
    from torchvision.models.vision_transformer import VisionTransformer

    sizes = {"image_size": 16, "patch_size": 8, "num_layers": 2, "num_heads": 2, "hidden_dim": 16, "mlp_dim": 32}
    model = VisionTransformer(num_classes=CLASSES, **sizes)
    nn.init.normal_(model.heads.head.weight)  # torchvision starts it with zeros
    return _ready(model, {"x": _images(16)})


def _torchvision_swin(version: str) -> Callable[[], Architecture]:
    def build() -> Architecture:
        from torchvision.models import swin_transformer as swin

        parts = (
            {"block": swin.SwinTransformerBlockV2, "downsample_layer": swin.PatchMergingV2} if version == "2" else {}
        )
        model = swin.SwinTransformer(
            [2, 2], 8, [1, 1], [2, 2], [4, 4], stochastic_depth_prob=0.0, num_classes=CLASSES, **parts
        )
        return _ready(model, {"x": _images(16)})

    return build


def _timm_vgg() -> Architecture:
    from timm.layers import ClassifierHead
    from timm.models.vgg import VGG, ConvMlp

    with torch.device("meta"):  # what follows its features has 4096 channels
        model = VGG([], in_chans=16, num_classes=CLASSES)
    model.features = VGG([8, "M", 16, "M"], mlp_ratio=1 / 4096, num_classes=CLASSES).features
    model.pre_logits, model.head = ConvMlp(16, 32, drop_rate=0.0), ClassifierHead(32, CLASSES)
    return _ready(model, {"x": _images(32)})


def _timm(name: str, size: int, **values: Any) -> Callable[[], Architecture]:
    def build() -> Architecture:
        import timm

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = timm.create_model(name, num_classes=CLASSES, drop_path_rate=0.0, **values)
        return _ready(_without_dropout(model), {"x": _images(size)})

    return build


def _without_dropout(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


_TIMM_VIT = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
_TIMM_SWIN = {"img_size": 16, "patch_size": 2, "window_size": 4, "embed_dim": 8, "depths": (1, 1), "num_heads": (2, 2)}

ARCHITECTURES: dict[str, Callable[[], Architecture]] = {
    "bert": _encoder("BertForSequenceClassification/BertConfig"),
    "bert-mlm": _encoder("BertForMaskedLM/BertConfig"),
    "roberta": _encoder("RobertaForSequenceClassification/RobertaConfig"),
    "albert": _encoder("AlbertForSequenceClassification/AlbertConfig", embedding_size=8),
    "electra": _encoder("ElectraForSequenceClassification/ElectraConfig", embedding_size=8),
    "distilbert": _distilbert,
    "gpt2": _gpt2,
    "llama": _decoder("LlamaForCausalLM/LlamaConfig"),
    "qwen2": _decoder("Qwen2ForCausalLM/Qwen2Config"),
    "qwen3": _decoder("Qwen3ForCausalLM/Qwen3Config"),
    "gemma": _decoder("GemmaForCausalLM/GemmaConfig"),
    "mixtral": _decoder("MixtralForCausalLM/MixtralConfig", num_local_experts=2, num_experts_per_tok=1),
    "t5": _t5,
    "vit": _vision("ViTForImageClassification/ViTConfig"),
    "beit": _vision("BeitForImageClassification/BeitConfig", drop_path_rate=0.0),
    "swinv2": _swinv2,
    "torchvision-resnet": _torchvision_resnet,
    "torchvision-vgg": _torchvision_vgg,
    "torchvision-efficientnet": _torchvision_efficientnet,
    "torchvision-convnext": _torchvision_convnext,
    "torchvision-vit": _torchvision_vit,
    "torchvision-swin": _torchvision_swin("1"),
    "torchvision-swinv2": _torchvision_swin("2"),
    "timm-resnet": _timm("test_resnet", 32),
    "timm-vgg": _timm_vgg,
    "timm-efficientnet": _timm("test_efficientnet", 32),
    "timm-convnext": _timm("test_convnext", 32),
    "timm-vit": _timm("vit_tiny_patch16_224", 16, **_TIMM_VIT),
    "timm-beit": _timm("beit_base_patch16_224", 16, **_TIMM_VIT),
    "timm-eva": _timm("eva02_tiny_patch14_224", 16, **_TIMM_VIT),
    "timm-swin": _timm("swin_tiny_patch4_window7_224", 16, **_TIMM_SWIN),
}
"""Name to a function that builds it."""
