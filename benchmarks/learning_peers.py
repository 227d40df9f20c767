"""The peers of the learning benchmark: their models and losses on batches of this repository's loader."""

import math
import tempfile
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mmfuse.data.decode import SampleDecoder
from mmfuse.data.loader import evaluation_requests, load_batches, training_requests
from mmfuse.data.source import Source
from mmfuse.evaluate.retrieval import EmbeddedSet, evaluate_retrieval
from mmfuse.train.data import TrainingData
from mmfuse.train.evaluation import Evaluator
from mmfuse.train.optim import learning_rate_factor
from mmfuse.train.run import RunConfig
from mmfuse.types import Batch, Features

CLS, SEP = 2, 3
"""Ids of the tiny vocabulary with which every text begins and ends."""
Scores = dict[str, dict[str, dict[str, float]]]
"""By validation set and direction."""
PATCH = 16


class Parts(NamedTuple):
    """What makes a peer."""

    model: nn.Module
    encode: Callable[[str, Features], Tensor]
    """Rows of a modality, not normalised."""
    loss: Callable[[Tensor, Tensor], Tensor]
    """Of L2-normalised rows that belong together, pictures and texts."""
    after_step: Callable[[], Any]


def picture_values(inputs: Features) -> Tensor:
    """Pixels as both models want them."""
    return (inputs["pixels"].float() / 255 - 0.5) / 0.5


def open_clip_parts(run: RunConfig) -> Parts:
    """open_clip's own CLIP with the widths and depths of the preset."""
    import open_clip
    from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg

    image, text = (run.model.modalities[name].model_dump() for name in ("image", "text"))
    vision = CLIPVisionCfg(
        layers=image["num_layers"],
        width=image["hidden_size"],
        head_width=image["hidden_size"] // image["num_heads"],
        patch_size=PATCH,
        image_size=image["image_size"],
    )
    language = CLIPTextCfg(
        context_length=text["max_tokens"],
        vocab_size=text["vocab_size"],
        width=text["hidden_size"],
        heads=text["num_heads"],
        layers=text["num_layers"],
        pool_type="eos",
        eos_id=SEP,
    )
    torch.manual_seed(run.seed)
    model, loss_of = CLIP(run.model.embedding_dim, vision, language), open_clip.ClipLoss()

    def encode(name: str, inputs: Features) -> Tensor:
        if name == "image":
            return model.encode_image(picture_values(inputs))
        ids = inputs["input_ids"]
        return model.encode_text(nn.functional.pad(ids, (0, text["max_tokens"] - ids.shape[1])))

    @torch.no_grad()
    def clamp_scale() -> None:
        model.logit_scale.clamp_(0, math.log(100))

    return Parts(model, encode, lambda *sides: loss_of(*sides, model.logit_scale.exp()), clamp_scale)


def sentence_transformers_parts(run: RunConfig) -> Parts:
    """transformers' CLIP of the same sizes as a SentenceTransformer, with its usual loss for pairs."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules.transformer import Transformer
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

    image, text = (run.model.modalities[name] for name in ("image", "text"))
    width = {"projection_dim": run.model.embedding_dim}
    sizes = [
        {
            "hidden_size": config.hidden_size,  # type: ignore[attr-defined]
            "intermediate_size": 4 * config.hidden_size,  # type: ignore[attr-defined]
            "num_hidden_layers": config.num_layers,  # type: ignore[attr-defined]
            "num_attention_heads": config.num_heads,  # type: ignore[attr-defined]
            **width,
        }
        for config in (image, text)
    ]
    limits = {"vocab_size": text.vocab_size, "max_position_embeddings": text.max_tokens}  # type: ignore[attr-defined]
    ends = {"bos_token_id": CLS, "eos_token_id": SEP, "pad_token_id": 0}
    vision = {**sizes[0], "image_size": image.image_size, "patch_size": PATCH}  # type: ignore[attr-defined]
    torch.manual_seed(run.seed)
    clip = CLIPModel(CLIPConfig(text_config={**sizes[1], **limits, **ends}, vision_config=vision, **width))
    with tempfile.TemporaryDirectory() as folder:  # it opens what has been saved
        clip.save_pretrained(folder)
        tokenizer = text.build_tokenizer()  # type: ignore[attr-defined]
        CLIPProcessor(image_processor=CLIPImageProcessor(), tokenizer=tokenizer).save_pretrained(folder)
        model = SentenceTransformer(modules=[Transformer(folder)])
    loss = MultipleNegativesRankingLoss(model)

    def encode(name: str, inputs: Features) -> Tensor:
        if name == "image":
            features: dict[str, Any] = {"pixel_values": picture_values(inputs)}
        else:
            features = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"].long()}
        return model({**features, "modality": name})["sentence_embedding"]

    def loss_of(pictures: Tensor, texts: Tensor) -> Tensor:
        return loss.compute_loss_from_embeddings([texts, pictures], torch.empty(0))

    return Parts(model, encode, loss_of, lambda: None)


class Peer:
    """Trains and scores one of them on the run's samples."""

    def __init__(self, run: RunConfig, parts: Parts) -> None:
        self.run, self.parts = run, parts
        self.processors = {name: config.build_processor() for name, config in run.model.modality_configs.items()}

    def encode(self, name: str, batch: Batch) -> Tensor:
        """L2-normalised rows of those that have the modality."""
        return nn.functional.normalize(self.parts.encode(name, batch.inputs[name].inputs), dim=-1)

    def train(self) -> None:
        """As open_clip's training does: no decay of gains, biases and the scale."""
        run, data, model = self.run, TrainingData(self.run), self.parts.model.train()
        named = list(model.named_parameters())
        still = [p for name, p in named if p.ndim < 2 or "bn" in name or "ln" in name or "logit_scale" in name]
        rest = [p for _, p in named if all(p is not other for other in still)]
        config = run.optimizer
        groups = [{"params": still, "weight_decay": 0.0}, {"params": rest, "weight_decay": config.weight_decay}]
        optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, eps=config.eps)
        decoder = SampleDecoder(data.sources, self.processors, seed=run.seed)
        for batch in load_batches(decoder, lambda: self._requests(data), num_workers=0):
            for group in optimizer.param_groups:
                factor = learning_rate_factor(batch.step, config=config, total_steps=run.train.steps)
                group["lr"] = config.learning_rate * factor
            both = batch.present.all(1)
            sides = [self.encode(name, batch)[both[batch.inputs[name].rows]] for name in ("image", "text")]
            optimizer.zero_grad()
            self.parts.loss(*sides).backward()
            nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm or torch.inf)
            optimizer.step()
            self.parts.after_step()

    def _requests(self, data: TrainingData):
        return training_requests(data.plan, start=0, stop=self.run.train.steps, rank=0, world_size=1)

    @torch.no_grad()
    def score(self) -> Scores:
        """Of the run's validation sets."""
        self.parts.model.eval()
        return {
            name: evaluate_retrieval(self._embed(source), self.run.evaluation)
            for name, source in Evaluator(self.run, self.run.model).sources.items()
        }

    def _embed(self, source: Source) -> EmbeddedSet:
        decoder = SampleDecoder([source], self.processors, seed=None)
        size, total = self.run.evaluation.batch_size, len(source)
        embeddings: dict[str, list[Tensor]] = {name: [] for name in self.processors}
        present, groups = [], []
        for batch in load_batches(
            decoder, lambda: evaluation_requests(total, batch_size=size, rank=0, world_size=1), num_workers=0
        ):
            for name, parts in embeddings.items():
                rows = torch.zeros(len(batch.present), self.run.model.embedding_dim)
                parts.append(rows.index_copy(0, batch.inputs[name].rows, self.encode(name, batch)))
            present.append(batch.present)
            groups.append(batch.group_id)
        there = torch.cat(present)[:total]
        return EmbeddedSet(
            {name: torch.cat(parts)[:total] for name, parts in embeddings.items()},
            {name: there[:, number] for number, name in enumerate(self.processors)},
            torch.cat(groups)[:total],
        )
