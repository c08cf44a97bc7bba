"""From this library's language models to transformers' and back, with the same weights."""

from __future__ import annotations

from typing import Any

from pellucid.errors import ConfigError
from pellucid.hf.config import CrateConfig, TextConfig, TostConfig
from pellucid.hf.modeling import (
    CausalLM,
    CrateForCausalLM,
    CrateForMaskedLM,
    CrateForSequenceClassification,
    MaskedLM,
    SequenceClassification,
    TostForCausalLM,
    TostForSequenceClassification,
)
from pellucid.models.create import create_model
from pellucid.models.language import CRATELM, MODELS, LanguageModel, ToSTLM

CONFIGS: dict[type[LanguageModel], type[TextConfig]] = {CRATELM: CrateConfig, ToSTLM: TostConfig}

Model = CausalLM | MaskedLM | SequenceClassification


def to_transformers(model: LanguageModel) -> Model:
    """The same for transformers: ``CrateForCausalLM`` or whichever of its like, in eval mode, with a copy of
    the weights.

    Raises:
        ConfigError: a model that :func:`~pellucid.models.create_model` did not make.
    """
    name, arguments = getattr(model, "architecture", None), getattr(model, "model_args", None)
    if type(model) not in CONFIGS or name not in MODELS or arguments is None:
        raise ConfigError(
            f"{type(model).__name__} cannot be given to transformers - take a language model that "
            f"pellucid.create_model or pellucid.load made"
        )
    options: dict[str, Any] = {**MODELS[name].sizes, **arguments, "pellucid_model": name}
    options |= {"vocab_size": model.vocab_size}
    labels = options.pop("num_labels", 0)
    if labels:
        names = model.label_names or [f"LABEL_{i}" for i in range(labels)]
        options |= {"id2label": dict(enumerate(names)), "label2id": {n: i for i, n in enumerate(names)}}
    made = _class_of(model)(CONFIGS[type(model)](**options))
    made.network.load_state_dict(model.state_dict())
    return made.to(model.embed.words.weight.dtype).eval()


def to_pellucid(model: Model) -> LanguageModel:
    """The same in this library, with a copy of the weights: to be audited, saved or trained further here.

    Raises:
        ConfigError: scores that are not read off the words, which here they always are.
    """
    config: Any = model.config
    if not config.tie_word_embeddings:
        raise ConfigError("tie_word_embeddings=False: here scores are read off the words - tie them")
    kind = {CrateConfig: "crate_gpt_bytes", TostConfig: "tost_gpt_bytes"}[type(config)]
    arguments = config.network_options()
    if isinstance(model, SequenceClassification):
        arguments["num_labels"] = config.num_labels
    made: Any = create_model(getattr(config, "pellucid_model", kind), **arguments)
    made.load_state_dict(model.network.state_dict())
    if isinstance(model, SequenceClassification):
        made.label_names = [str(config.id2label[i]) for i in range(config.num_labels)]
    return made.to(model.dtype).eval()


def _class_of(model: LanguageModel) -> type[Any]:
    tost = isinstance(model, ToSTLM)
    if model.classifier is not None:
        return TostForSequenceClassification if tost else CrateForSequenceClassification
    if not model.causal:
        return CrateForMaskedLM
    return TostForCausalLM if tost else CrateForCausalLM
