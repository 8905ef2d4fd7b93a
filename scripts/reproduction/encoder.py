"""Fine-tuning a sentence encoder: from which package of the standard library does a piece of source code come?"""

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningDataModule, LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from sparsetrain.hardware.extras import require
from sparsetrain.recipes.data.resumable import ResumableLoader, as_is
from sparsetrain.recipes.data.sources import python_sources
from sparsetrain.recipes.optimization import weight_decay_groups, with_warmup_cosine

from .pretrained import MINILM, folder_of

CLASSES = 10
HELD_OUT = 0.1
RANDOM = {"vocab_size": 256, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
          "intermediate_size": 64}  # fmt: skip
"""Of the encoder that is not pretrained, for tests; its tokens are bytes."""


class EncoderModule(LightningModule):
    """A BERT-like encoder, the mean over positions, and a linear classifier, with AdamW along a cosine.

    Args:
        pretrained: MiniLM from its package; False is a tiny encoder with random weights.
        learning_rate: Peak learning rate; of 1e-4, 3e-4 and 6e-4 the one with which a dense run ended lowest.
        warmup_steps: Optimizer steps of linear warm-up.
        weight_decay: Of matrices.
    """

    def __init__(
        self,
        pretrained: bool = True,
        learning_rate: float = 3e-4,
        warmup_steps: int = 10,
        weight_decay: float = 0.01,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        transformers = require("transformers", "hf", "the encoder")
        options = {"add_pooling_layer": False}
        self.encoder: nn.Module = (
            transformers.AutoModel.from_pretrained(folder_of(MINILM) / "model", **options)
            if pretrained
            else transformers.BertModel(transformers.BertConfig(**RANDOM), **options)
        )
        self.encoder.train()
        self.head = nn.Linear(self.encoder.config.hidden_size, CLASSES)  # type: ignore[union-attr, arg-type]

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits ``[batch, classes]`` of token ids ``[batch, time]``, all of which count."""
        logits: Tensor = self.head(self.encoder(input_ids=tokens).last_hidden_state.mean(1))
        return logits

    def loss(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the mean loss in nats per piece."""
        return F.cross_entropy(self(batch["tokens"]), batch["label"])

    def training_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        """Return the loss of a batch."""
        return self.loss(batch)

    def validation_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        """Log the loss and the accuracy of a batch."""
        logits, label = self(batch["tokens"]), batch["label"]
        values = {
            "val/loss": F.cross_entropy(logits, label),
            "val/accuracy": (logits.argmax(-1) == label).float().mean(),
        }
        self.log_dict(values, batch_size=len(label))

    def configure_optimizers(self) -> Any:
        """Return AdamW and its per-step schedule."""
        groups = weight_decay_groups(self.parameters(), self.hparams["weight_decay"])
        optimizer = torch.optim.AdamW(groups, lr=self.hparams["learning_rate"])
        total = self.trainer.estimated_stepping_batches
        return with_warmup_cosine(optimizer, total, self.hparams["warmup_steps"], 0.0, 1.0)


class Pieces(Dataset[Any]):
    """Pieces of source code: ``tokens`` int64 ``[pieces, time]`` and the ``label`` of each."""

    def __init__(self, tokens: Tensor, label: Tensor) -> None:
        self.tokens, self.label = tokens, label

    def __len__(self) -> int:
        return len(self.label)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"tokens": self.tokens[index], "label": self.label[index]}

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        """Return a batch."""
        return self[torch.tensor(indices)]  # type: ignore[index]


class PackageDataModule(LightningDataModule):
    """Pieces of the ten largest packages of the interpreter's standard library; the end of each file is held out.

    Args:
        context: Tokens of a piece.
        batch_size: Pieces of a batch.
        pieces: At most of a class for training; a tenth of that for validation.
        pretrained: Tokens of MiniLM; False takes bytes.
        seed: Of the order.
    """

    def __init__(
        self, context: int = 64, batch_size: int = 8, pieces: int = 300, pretrained: bool = True, seed: int = 0
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.sides: tuple[Pieces, Pieces] | None = None

    def setup(self, stage: str | None = None) -> None:
        """Read and tokenize; once."""
        if self.sides is not None:
            return
        options = self.hparams
        found: tuple[list[tuple[Tensor, Tensor]], ...] = ([], [])
        for label, files in enumerate(largest_packages(CLASSES)):
            for side, share in enumerate((1.0, HELD_OUT)):
                text = "\n".join(part_of(path, bool(side)) for path in files)
                tokens = self._tokens(text, round(share * options["pieces"]))
                found[side].append((tokens, torch.full((len(tokens),), label)))
        train, held = (Pieces(*map(torch.cat, zip(*parts, strict=True))) for parts in found)
        self.sides = (train, held)

    def train_dataloader(self) -> DataLoader[Any]:
        """Return shuffled batches."""
        assert self.sides is not None
        return ResumableLoader(self.sides[0], self.hparams["batch_size"], self.hparams["seed"])  # type: ignore[arg-type]

    def val_dataloader(self) -> DataLoader[Any]:
        """Return validation batches in order."""
        assert self.sides is not None
        return DataLoader(self.sides[1], 4 * self.hparams["batch_size"], collate_fn=as_is)

    def _tokens(self, text: str, pieces: int) -> Tensor:
        """Return token ids int64 ``[pieces, context]``, spread over the text if it has more."""
        if self.hparams["pretrained"]:
            transformers = require("transformers", "hf", "the encoder's tokens")
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder_of(MINILM) / "model")
            ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        else:
            ids = list(text.encode())
        length = self.hparams["context"]
        blocks = torch.tensor(ids)[: len(ids) // length * length].view(-1, length)
        return blocks[:: max(1, len(blocks) // pieces)][:pieces]


def largest_packages(count: int) -> list[list[Path]]:
    """Return the files of the packages with the most source code in at least four files, by the packages' names."""
    files: dict[str, list[Path]] = defaultdict(list)
    for name in python_sources():
        files[Path(name).parent.name].append(Path(name))
    sizes = {name: sum(path.stat().st_size for path in paths) for name, paths in files.items() if len(paths) > 3}
    largest = sorted(sizes, key=lambda name: -sizes[name])[:count]
    return [files[name] for name in sorted(largest)]


def part_of(path: Path, held_out: bool) -> str:
    """Return a file's text but for the tenth at its end, or that."""
    text = path.read_text(errors="replace")
    cut = round(len(text) * (1 - HELD_OUT))
    return text[cut:] if held_out else text[:cut]
