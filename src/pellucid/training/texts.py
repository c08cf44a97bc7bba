"""Text as a run sees it: a tokenizer, and rows of at most so many words."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from safetensors.torch import save as tensors_to_bytes
from torch import nn

from pellucid.data import StepSampler, TextData, Windows, eval_token_loader, load_text, token_loader
from pellucid.errors import ConfigError
from pellucid.models.language import MODELS, LanguageModel
from pellucid.models.saved import CONFIG, TOKENIZER, WEIGHTS, describe_text_model, tokenizer_of
from pellucid.training.config import TrainConfig
from pellucid.training.material import Material, about_rejects
from pellucid.training.objective import Held, Objective

LOOKED_AT = 256
"""Held-out rows at most that are measured on before the run ends; at its end all of them are."""


class Texts(Material):
    """Documents, cut into rows that the model of a run can read at once.

    Args:
        texts: as ``load_text`` gives them.
        kind: the objective that reads them.
        tokenizer: what the run is to call their tokenizer; its own name unless given.
    """

    unit: ClassVar[str] = "words"
    items: ClassVar[str] = "rows"
    looks: ClassVar[int] = 20

    def __init__(self, texts: TextData, kind: type[Objective], tokenizer: str = "") -> None:
        self.data = self.texts = texts
        self.kind = kind
        self.name, self.notes = texts.name, [*texts.notes, *about_rejects(texts.rejects, "texts")]
        self.fingerprint = f"{texts.fingerprint}-{texts.tokenizer.fingerprint}"
        self.tokenizer = tokenizer or texts.tokenizer.name

    @classmethod
    def load(
        cls,
        data: str | os.PathLike[str] | TextData,
        config: TrainConfig,
        kind: type[Objective],
        resume: bool = False,
    ) -> Texts:
        """With the tokenizer that is asked for, or else that of the weights to begin at, or bytes.

        A run that goes on has one already.
        """
        begun_at = tokenizer_of(config.init_from) if config.init_from else None
        chosen = config.tokenizer or str(begun_at or "bytes")
        kept = Path(config.out) / TOKENIZER
        texts = load_text(
            data,
            tokenizer=str(kept) if resume and kept.is_file() else chosen,
            vocab_size=config.vocab_size,
            labels="required" if kind.needs_labels else "optional",
            download=config.download,
            root=config.data_root,
            max_bad=config.max_bad,
        )
        return cls(texts, kind, chosen)

    def resolved(self, config: TrainConfig) -> TrainConfig:
        model = config.model or f"{self.kind.family}_bytes"
        if model not in MODELS:
            raise ConfigError(
                f"{config.objective} is about text, and {model} reads images - take one of pellucid models "
                f"gpt, such as {self.kind.family}_bytes"
            )
        words, args = self.texts.tokenizer.vocab_size, dict(config.model_args)
        for key, found in (("vocab_size", words), ("num_labels", len(self.texts.class_names))):
            if args.pop(key, found) != found:
                given = config.model_args[key]
                raise ConfigError(f"model_args has {key} {given}, the data has {found} - leave it out")
        out = config.out or f"runs/{Path(config.data).stem}-{model}"
        settled: dict[str, Any] = {"tokenizer": self.tokenizer, "augment": "none", "flip": False}
        return replace(config, model=model, model_args=args, out=out, **settled)

    def model_args(self, config: TrainConfig) -> dict[str, Any]:
        found = {**config.model_args, "vocab_size": self.texts.tokenizer.vocab_size}
        if self.kind.needs_labels:
            found["num_labels"] = len(self.texts.class_names)
        return found

    def cut_for(self, model: nn.Module, config: TrainConfig) -> None:
        assert isinstance(model, LanguageModel)
        self.context = model.context
        self.train, self.test = (
            Windows(
                part,
                self.texts.tokenizer,
                model.context,
                cross_documents=config.cross_documents,
                seed=config.seed,
                **self.kind.reading(config),
            )
            for part in (self.texts.train, self.texts.test)
        )
        places = len(self.train) * model.context
        if config.objective == "causal-lm" and self.train.words < places / 2:
            self.notes = [
                *self.notes,
                f"{1 - self.train.words / places:.0%} of all places stay empty: most texts are shorter than "
                f"the context of {model.context:,} words - take a smaller one, or --cross-documents",
            ]

    def __len__(self) -> int:
        return len(self.train)

    def batches(self, sampler: StepSampler, workers: int, timeout: float = 60) -> Any:
        return token_loader(self.train, sampler, workers=workers, timeout=timeout)

    def held(self, workers: int, final: bool) -> Held:
        limit = None if final else LOOKED_AT
        test = eval_token_loader(self.test, workers=workers, limit=limit)
        return Held(test, words_per_byte=self.test.words / max(1, self.test.text_bytes))

    @property
    def tokens(self) -> float:
        return self.context

    @property
    def units(self) -> int:
        return self.context

    def stamps(self) -> Iterator[tuple[str, str]]:
        for part in (self.texts.train, self.texts.test):
            labels = part.labels.tolist()
            for i in range(len(part)):
                words = part.document(i).tobytes()
                yield part.name(i), f"{labels[i]} {hashlib.blake2b(words, digest_size=8).hexdigest()}"

    @property
    def class_names(self) -> Sequence[str]:
        return self.texts.class_names if self.kind.needs_labels else ()

    def item_name(self, i: int) -> str:
        return self.train.name(i)

    def model_files(self, model: Any) -> dict[str, bytes]:
        weights = {name: value.detach().contiguous() for name, value in model.state_dict().items()}
        model.label_names = list(self.texts.class_names) if self.kind.needs_labels else []
        config = describe_text_model(model, weights)
        return {
            WEIGHTS: tensors_to_bytes(weights, metadata={"format": "pt"}),
            CONFIG: json.dumps(config, indent=1).encode(),
            **self.kept_files(),
        }

    def kept_files(self) -> dict[str, bytes]:
        return {TOKENIZER: self.texts.tokenizer.to_json().encode()}

    def facts(self) -> dict[str, Any]:
        train, test = self.texts.train, self.texts.test
        return {
            "train_documents": len(train),
            "test_documents": len(test),
            "train_bytes": int(train.sizes.sum()),
            "test_bytes": int(test.sizes.sum()),
            "rejects": [reject._asdict() for reject in self.texts.rejects],
        }
