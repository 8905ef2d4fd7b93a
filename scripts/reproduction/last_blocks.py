"""Fine-tuning the last blocks of a pretrained language model on Python source code; the others are frozen."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from sparsetrain.hardware.extras import require
from sparsetrain.recipes.data.resumable import ResumableLoader, as_is
from sparsetrain.recipes.data.sources import python_sources
from sparsetrain.recipes.optimization import weight_decay_groups, with_warmup_cosine

from .pretrained import SMOLLM2, folder_of, gguf_options

RANDOM = {"vocab_size": 256, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3,
          "num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": True}  # fmt: skip
"""Of the model that is not pretrained, for tests; its tokens are bytes."""


def language_model(pretrained: bool) -> nn.Module:
    """Return SmolLM2-135M in float32, or a tiny Llama with the same random weights each time."""
    transformers = require("transformers", "hf", "the language model")
    if pretrained:
        folder, options = folder_of(SMOLLM2), {"dtype": torch.float32, **gguf_options()}
        model: nn.Module = transformers.AutoModelForCausalLM.from_pretrained(folder, **options)
        return model
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**RANDOM))  # type: ignore[no-any-return]


def tail_of(model: Any, blocks: int) -> nn.Module:
    """Return a model of the last blocks and the head, with copies of their weights; it takes the others' outputs."""
    config = type(model.config)(**{**model.config.to_dict(), "num_hidden_layers": blocks})
    tail = type(model)(config)
    for own, layer in zip(tail.model.layers, model.model.layers[-blocks:], strict=True):
        own.load_state_dict(layer.state_dict())
    tail.model.norm.load_state_dict(model.model.norm.state_dict())
    tail.model.embed_tokens.load_state_dict(model.model.embed_tokens.state_dict())
    tail.lm_head.load_state_dict(model.lm_head.state_dict())
    return tail  # type: ignore[no-any-return]


class LastBlocksModule(LightningModule):
    """The last blocks of a Llama, trained with AdamW along a cosine; norm and head stay as they are.

    Args:
        blocks: How many are trained.
        pretrained: SmolLM2-135M from its package; False is a tiny Llama with random weights.
        learning_rate: Peak learning rate.
        warmup_steps: Optimizer steps of linear warm-up.
        weight_decay: Of matrices.
    """

    def __init__(
        self,
        blocks: int = 4,
        pretrained: bool = True,
        learning_rate: float = 2e-4,
        warmup_steps: int = 10,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.tail: Any = tail_of(language_model(pretrained), blocks)
        self.tail.requires_grad_(False)
        self.tail.model.layers.requires_grad_(True)

    def loss(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the mean loss in nats per token."""
        loss: Tensor = self.tail(inputs_embeds=batch["hidden"].float(), labels=batch["tokens"].long()).loss
        return loss

    def training_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        """Return the loss of a batch."""
        return self.loss(batch)

    def validation_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        """Log the loss of a batch."""
        self.log("val/loss", self.loss(batch), batch_size=len(batch["tokens"]))

    def configure_optimizers(self) -> Any:
        """Return AdamW and its per-step schedule."""
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        groups = weight_decay_groups(trained, self.hparams["weight_decay"])
        optimizer = torch.optim.AdamW(groups, lr=self.hparams["learning_rate"])
        total = self.trainer.estimated_stepping_batches
        return with_warmup_cosine(optimizer, total, self.hparams["warmup_steps"], 0.0, 1.0)


class Sequences(Dataset[Any]):
    """Sequences as the frozen blocks see them: ``tokens`` ``[sequences, time]``, ``hidden`` ``[..., width]``."""

    def __init__(self, tokens: Tensor, hidden: Tensor) -> None:
        self.tokens, self.hidden = tokens, hidden

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"tokens": self.tokens[index], "hidden": self.hidden[index]}

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        """Return a batch."""
        return self[torch.tensor(indices)]  # type: ignore[index]


class HiddenStateDataModule(LightningDataModule):
    """Sequences of Python source code behind the frozen blocks, which run once in a process.

    Args:
        blocks: Blocks that are trained, so not of them.
        context: Tokens of a sequence.
        batch_size: Sequences of a batch.
        sequences: For training; a sixth of that on top for validation.
        pretrained: SmolLM2-135M and its tokens; False takes a tiny Llama and bytes.
        seed: Of the order.
    """

    _made: ClassVar[dict[tuple[Any, ...], tuple[Sequences, Sequences]]] = {}

    def __init__(
        self,
        blocks: int = 4,
        context: int = 128,
        batch_size: int = 2,
        sequences: int = 160,
        pretrained: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()

    @property
    def sides(self) -> tuple[Sequences, Sequences]:
        """Sequences for training and for validation."""
        key = tuple(self.hparams[name] for name in ("blocks", "context", "sequences", "pretrained"))
        if key not in self._made:
            self._made[key] = self._run(*key)
        return self._made[key]

    def setup(self, stage: str | None = None) -> None:
        """Run the frozen blocks, unless that was done."""
        assert self.sides

    def train_dataloader(self) -> DataLoader[Any]:
        """Return shuffled batches."""
        return ResumableLoader(self.sides[0], self.hparams["batch_size"], self.hparams["seed"])  # type: ignore[arg-type]

    def val_dataloader(self) -> DataLoader[Any]:
        """Return validation batches in order."""
        return DataLoader(self.sides[1], self.hparams["batch_size"], collate_fn=as_is)

    @staticmethod
    @torch.no_grad()
    def _run(blocks: int, context: int, sequences: int, pretrained: bool) -> tuple[Sequences, Sequences]:
        model: Any = language_model(pretrained).eval()
        model.model.layers = model.model.layers[:-blocks]
        model.model.norm = nn.Identity()
        tokens = _tokens(context, sequences + sequences // 6, pretrained)
        hidden = torch.cat([model.model(input_ids=part).last_hidden_state.half() for part in tokens.split(4)])
        return Sequences(tokens[:sequences], hidden[:sequences]), Sequences(tokens[sequences:], hidden[sequences:])


def _tokens(context: int, count: int, pretrained: bool) -> Tensor:
    """Return the first so many sequences of the interpreter's standard library, int64 ``[count, context]``."""
    encode: Any = lambda text: list(text.encode())  # noqa: E731
    if pretrained:
        transformers = require("transformers", "hf", "the language model's tokens")
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder_of(SMOLLM2), **gguf_options())
        encode = lambda text: tokenizer(text, verbose=False)["input_ids"]  # noqa: E731
    ids: list[int] = []
    for path in python_sources():
        with open(path, errors="replace") as file:
            ids += encode(file.read())
        if len(ids) >= count * context:
            break
    return torch.tensor(ids[: count * context]).view(count, context)
