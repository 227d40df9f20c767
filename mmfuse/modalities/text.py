"""Text: UTF-8 -> WordPiece ids -> a BERT-style encoder from transformers."""

import codecs
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from pydantic import Field, NonNegativeFloat, PositiveInt
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel, BertTokenizer

from mmfuse.config import Settings
from mmfuse.errors import ConfigError, SampleError
from mmfuse.modalities.adaptation.named import NamedModelConfig, named_in, read_structure
from mmfuse.modalities.base import Encoder, Processor, find_layers, masked_mean
from mmfuse.modalities.media.sentences import BETWEEN_SENTENCES
from mmfuse.types import EncoderOutput, Features

EXTENSIONS = ("txt",)
VOCABULARIES = Path(__file__).parent / "vocabulary"


class AugmentConfig(Settings):
    """Training-time transform, seeded by sample."""

    drop_probability: float = Field(default=0.0, ge=0, lt=1)
    """Of leaving a token out; special ones never, and never all others; 0 turns it off."""


class Config(NamedModelConfig):
    """A transformers text encoder; without `pretrained` a BERT of the sizes given here."""

    modality: ClassVar[str] = "text"
    tokenizer: str = "tiny"
    """A vocabulary shipped in `modalities/vocabulary`, a local folder, or a hub id."""
    max_tokens: PositiveInt = 32
    """Longer captions are cut, [CLS] and [SEP] included."""
    max_bytes_per_token: PositiveInt = 32
    """What lies behind this many bytes times `max_tokens` is not even tokenized: that costs 3 us a byte."""
    vocab_size: PositiveInt = 8000
    """At least the tokenizer's length."""
    hidden_size: PositiveInt = 128
    num_layers: PositiveInt = 3
    num_heads: PositiveInt = 4
    dropout: NonNegativeFloat = 0.0
    """Of hidden states and attention, also with `pretrained`. Above 0 the numbers depend on the world size."""
    augment: AugmentConfig = AugmentConfig()

    def build_processor(self) -> Processor:
        return TextProcessor(self)

    def build_encoder(self) -> "TextEncoder":
        return TextEncoder(self)

    def save_files(self, folder: Path) -> None:
        self.build_tokenizer().save_pretrained(folder)
        if self.named:
            read_structure(self.naming_setting, self.named).save_pretrained(folder)

    def with_files(self, folder: Path) -> Self:
        named = str(folder) if self.named else None
        return self.model_copy(update={"tokenizer": str(folder), "pretrained": None, "architecture": named})

    def build_tokenizer(self) -> Any:
        """The transformers tokenizer alone; masked language modelling needs its special ids."""
        shipped = VOCABULARIES / f"{self.tokenizer}.txt"
        if shipped.is_file():
            tokens = shipped.read_text(encoding="utf-8").splitlines()
            tokenizer = BertTokenizer(vocab={token: i for i, token in enumerate(tokens)}, do_lower_case=True)
        else:
            with named_in("text.tokenizer", self.tokenizer):
                tokenizer = AutoTokenizer.from_pretrained(self.tokenizer)
        if len(tokenizer) > self.vocab_size:
            raise ConfigError(f"vocab_size is {self.vocab_size}, but tokenizer {self.tokenizer!r} has {len(tokenizer)}")
        return tokenizer


class TextProcessor:
    """UTF-8 bytes -> `input_ids (L,)`, and `second`: where the second sentence begins, L where there is none."""

    def __init__(self, config: Config) -> None:
        self.tokenizer = config.build_tokenizer()
        self.max_tokens, self.max_bytes = config.max_tokens, config.max_tokens * config.max_bytes_per_token
        self.drop_probability = config.augment.drop_probability

    def __call__(self, data: bytes, *, seed: int | None) -> Features:
        dropping = None
        if seed is not None and self.drop_probability:
            dropping = torch.Generator().manual_seed(seed)
        first, divided, second = data.partition(BETWEEN_SENTENCES)
        encoded = self.tokenizer(
            self._decode(first),
            self._decode(second) if divided else None,
            truncation=True,
            max_length=self.max_tokens,
            return_special_tokens_mask=dropping is not None,
        )
        ids = torch.tensor(encoded["input_ids"], dtype=torch.int64)
        sentence = encoded.sequence_ids() if divided else []
        start = sentence.index(1) if 1 in sentence else len(ids)  # nothing may be left of the second one
        if dropping is not None:
            special = torch.tensor(encoded["special_tokens_mask"], dtype=torch.bool)
            kept = _draw_kept(special, self.drop_probability, dropping)
            ids, start = ids[kept], int(kept[:start].sum())
        return {"input_ids": ids, "second": torch.tensor(start)}

    def to_bytes(self, value: Any) -> bytes:
        """Of a `str`."""
        if not isinstance(value, str):
            raise SampleError(f"expected a str, got {type(value).__name__}")
        return value.encode("utf-8", "replace")

    def _decode(self, data: bytes) -> str:
        data = data.lstrip()
        whole = len(data) <= self.max_bytes
        try:
            # Not `bytes.decode`: the cut may fall inside a character, whose first bytes are then left out.
            text = codecs.getincrementaldecoder("utf-8")().decode(data[: self.max_bytes], final=whole).strip()
        except UnicodeDecodeError as error:
            raise SampleError(f"not UTF-8 text: {error}") from error
        if not text:
            raise SampleError("the text is empty", kind="empty")
        return text

    def collate(self, features: list[Features]) -> Features:
        """Padded to the longest: `input_ids (n, L)`, `attention_mask` bool `(n, L)`; `second (n,)`."""
        ids = [item["input_ids"] for item in features]
        lengths = torch.tensor([len(row) for row in ids])
        padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=self.tokenizer.pad_token_id)
        return {
            "input_ids": padded,
            "attention_mask": torch.arange(padded.shape[1]) < lengths[:, None],
            "second": torch.stack([item["second"] for item in features]),
        }


def _draw_kept(special: Tensor, drop_probability: float, generator: torch.Generator) -> Tensor:
    """bool `(L,)`: tokens that stay; the ordinary one with the largest draw always does."""
    draws = torch.rand(len(special), generator=generator)
    kept = special | (draws >= drop_probability)
    kept[draws.masked_fill(special, -1).argmax()] = True
    return kept


class TextEncoder(Encoder):
    """`input_ids (n, L)`, `attention_mask (n, L)`, `second (n,)` -> BERT's last hidden states."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.bert = _build_transformer(config)
        self.width = self.bert.config.hidden_size
        self.pooling = config.pooling
        self.knows_segments = getattr(self.bert.config, "type_vocab_size", 0) > 1  # RoBERTa, DistilBERT, ... do not

    def forward(self, inputs: Features) -> EncoderOutput:
        mask: Tensor = inputs["attention_mask"]
        segments = {}
        if self.knows_segments:
            place = torch.arange(mask.shape[1], device=mask.device)
            segments["token_type_ids"] = (mask & (place >= inputs["second"][:, None])).long()
        tokens = self.bert(input_ids=inputs["input_ids"], attention_mask=mask.long(), **segments).last_hidden_state
        pooled = tokens[:, 0] if self.pooling == "cls" else masked_mean(tokens, mask)
        return EncoderOutput(tokens, mask, pooled)

    def layers(self) -> Sequence[nn.Module]:
        return find_layers(self.bert, self.bert.config.num_hidden_layers)

    def minimal_inputs(self, device: torch.device) -> Features:
        ids = torch.zeros(1, 1, dtype=torch.int64, device=device)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids, dtype=torch.bool), "second": ids[:, 0] + 1}


def _build_transformer(config: Config) -> Any:
    """A transformer without its pooler: an unused parameter would stop DDP."""
    if config.named:
        settings = read_structure(config.naming_setting, config.named)
        for name, value in settings.to_dict().items():
            if "dropout" in name and isinstance(value, float):  # each family has its own names
                setattr(settings, name, config.dropout)
        # In fp32, whatever the weights are stored in: the run's precision decides what is computed in less.
        with named_in(config.naming_setting, config.named):
            if config.pretrained:
                transformer = AutoModel.from_pretrained(config.pretrained, config=settings, dtype=torch.float32)
            else:
                transformer = AutoModel.from_config(settings, dtype=torch.float32)
        transformer.pooler = None  # not every family takes `add_pooling_layer`
        return transformer
    bert = BertConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        intermediate_size=4 * config.hidden_size,
        hidden_dropout_prob=config.dropout,
        attention_probs_dropout_prob=config.dropout,
        max_position_embeddings=max(512, config.max_tokens),
    )
    return BertModel(bert, add_pooling_layer=False)
