"""Language models as transformers knows them: its interface around a :class:`LanguageModel`, ``network``.

Padding may stand anywhere. The tokens of a row are moved to its front and back again, so that their places
are counted from the first real one. What comes out at places of padding is zero.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import fields
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    MaskedLMOutput,
    SequenceClassifierOutput,
)
from transformers.utils import can_return_tuple

from pellucid.hf.cache import TextCache
from pellucid.hf.config import CrateConfig, TextConfig, TostConfig
from pellucid.models.language import LanguageModel

CACHE = "cache" if "cache" in {field.name for field in fields(CausalLMOutputWithPast)} else "past_key_values"
"""What this version of transformers calls a cache."""

REFUSED = ("position_ids", "token_type_ids", "head_mask", "encoder_hidden_states", "encoder_attention_mask")
"""What other models take, and would be lost here without a word."""


TIED = {"lm_head.weight": "model.network.embed.words.weight"}
"""What is read off the words."""

WHOLE = ["Layer"]
"""What stays on one device."""


class TextPreTrainedModel(PreTrainedModel):
    """What all of them share: one network, its words, and how it begins."""

    if TYPE_CHECKING:  # transformers takes a class's own annotation for the class of its config
        config: Any
        base_model: Any

    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = WHOLE

    def get_input_embeddings(self) -> nn.Module:
        return self.base_model.network.embed.words

    def set_input_embeddings(self, value: Any) -> None:
        network, size = self.base_model.network, value.num_embeddings
        network.embed.words, network.vocab_size = value, size
        if network.head is not None:
            bias = network.head.bias
            room = bias.new_zeros(size)
            room[: len(bias)] = bias.detach()[:size]
            network.head.bias = nn.Parameter(room, requires_grad=bias.requires_grad)

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """What no file has given begins as in a fresh network."""
        lacking = {name: p for name, p in self.base_model.network.named_parameters() if _is_unset(p)}
        begun = dict(self.base_model.build_network().named_parameters()) if lacking else {}
        for name, parameter in lacking.items():
            parameter.copy_(begun[name])
            parameter._is_hf_initialized = True
        head = self.get_output_embeddings()
        if head is not None and _is_unset(head.weight) and not getattr(head, "_is_hf_initialized", False):
            head.weight.copy_(self.get_input_embeddings().weight)
            head.weight._is_hf_initialized = True

    def _set_gradient_checkpointing(self, *args: Any, **kwargs: Any) -> None:
        if kwargs.get("every_n_layers", 1) != 1:
            raise ValueError("all layers are recomputed or none - leave out every_n_layers")
        super()._set_gradient_checkpointing(*args, **kwargs)


class TextModel(TextPreTrainedModel):
    """Normalised tokens after the last layer.

    Args:
        config: sizes and options.
        num_labels: classes of whole texts; with some, the network has a map to them and none to words.

    Attributes:
        network: the model in this library's terms.
    """

    def __init__(self, config: TextConfig, num_labels: int = 0) -> None:
        super().__init__(config)
        self.num_labels = num_labels
        self.network: LanguageModel = self.build_network()
        for parameter in self.network.parameters():
            parameter._is_hf_initialized = not parameter.is_meta  # type: ignore[attr-defined]
        self.gradient_checkpointing = False
        self.post_init()

    def build_network(self) -> LanguageModel:
        """One with first weights, drawn in float32: an orthogonal matrix cannot be in less."""
        wanted = torch.get_default_dtype()
        torch.set_default_dtype(torch.float32)
        try:
            network = self.config.network_class(**self.config.network_options(), num_labels=self.num_labels)
            return network.to(wanted)
        finally:
            torch.set_default_dtype(wanted)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        cache: TextCache | None = None,
        past_key_values: TextCache | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Tokens of all places; see the module for padding.

        Args:
            input_ids: words (b, n) by their numbers, behind those in ``cache``.
            attention_mask: (b, places), 0 where there is padding; of the cache's places too.
            inputs_embeds: vectors (b, n, d) in place of words.
            cache: of this text so far; ``past_key_values`` is its older name.
            use_cache: give one back; unless given, wherever nothing is trained.
            output_hidden_states: give back the tokens in front of every layer as well, and those behind the
                last once more.
        """
        self._refuse(output_attentions, kwargs)
        words = _words(input_ids, inputs_embeds)
        kept, given_back = self._cache(cache if cache is not None else past_key_values, use_cache)
        front = _front(attention_mask, words, kept)
        again = self.gradient_checkpointing and self.training
        self.network.grad_checkpointing = again and self._gradient_checkpointing_func
        wanted = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        seen: list[Tensor] = []
        with _watched(self.network, seen) if wanted else nullcontext():
            tokens = self._run(words, front, kept)
        hidden = None
        if wanted:
            seen = seen or [tokens] * (self.config.depth + 1)
            inner = seen[:-1] if front is None else map(front.back, seen[:-1])
            hidden = (*inner, tokens)
        outputs: dict[str, Any] = {CACHE: kept if given_back else None}
        return BaseModelOutputWithPast(last_hidden_state=tokens, hidden_states=hidden, **outputs)

    def _run(self, words: Tensor, front: _Front | None, cache: TextCache | None) -> Tensor:
        given = words if front is None else front.take(words)
        counts = None if front is None else front.counts
        if cache is not None:
            memory = cache.memory_for(len(words), words.device)
            if given.shape[1]:
                tokens = self.network.resume(given, memory, counts)
            else:  # rows that all wait
                weight = self.network.embed.words.weight
                tokens = weight.new_zeros(len(words), 1, weight.shape[1])
            cache.arrived(words.shape[1], None if front is None else front.real)
        elif counts is None or self.network.causal:  # in a causal model nothing sees what is padded behind
            tokens = self.network.forward_features(given)
        else:
            real = torch.arange(given.shape[1], device=given.device) < counts[:, None]
            tokens = self.network.forward_features(given, real)
        return tokens if front is None else front.back(tokens)

    def _cache(self, cache: Any, use_cache: bool | None) -> tuple[TextCache | None, bool]:
        """The cache to go on from and to fill, and whether to give it back."""
        if cache is not None and not isinstance(cache, TextCache):
            raise TypeError(
                f"a {type(cache).__name__} cannot hold what these steps keep - give the cache that the model "
                f"gave back, or none"
            )
        if not self.network.causal:
            if cache is not None:
                raise ValueError("a masked model sees all tokens at once - it goes on from no cache")
            return None, False
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if cache is None and use_cache and not (self.gradient_checkpointing and self.training):
            cache = TextCache(self.config)
        return cache, use_cache

    def _refuse(self, output_attentions: bool | None, kwargs: dict[str, Any]) -> None:
        for name in REFUSED:
            if kwargs.get(name) is not None:
                raise ValueError(
                    f"{type(self).__name__} takes no {name}: places are counted from the first real token - "
                    f"leave it out, and say with attention_mask what is padding"
                )
        if self.config.output_attentions if output_attentions is None else output_attentions:
            raise ValueError(
                "attention weights are never formed in a forward pass - leave out output_attentions; those "
                "of CRATE's layer i are network.layers[i]['compress'].attention(tokens)"
            )


class _Headed(TextPreTrainedModel):
    """A :class:`TextModel` with something behind it."""

    model_class: ClassVar[type[TextModel]]

    @property
    def network(self) -> LanguageModel:
        """The model in this library's terms, with the same weights: to be audited, or to write."""
        return self.model.network


class CausalLM(_Headed, GenerationMixin):
    """Scores of the word that follows, at every place."""

    _tied_weights_keys = TIED

    def __init__(self, config: TextConfig) -> None:
        super().__init__(config)
        if not getattr(config, "causal", True):
            raise ValueError("the config is of a masked model (causal=False) - take CrateForMaskedLM")
        self.model = self.model_class(config)
        self.lm_head = nn.Linear(config.embed_dim, config.vocab_size, bias=False)
        self.post_init()

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # of keys and values, which are not what is kept

    def _prepare_cache_for_generation(self, *args: Any, **kwargs: Any) -> Any:
        prepare: Any = GenerationMixin._prepare_cache_for_generation  # warns of what it cannot do
        prepare(self, *args, **kwargs)
        generation_config, model_kwargs = args[:2]
        if generation_config.use_cache is not False and model_kwargs.get(CACHE) is None:
            model_kwargs[CACHE] = TextCache(self.config)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        cache: TextCache | None = None,
        past_key_values: TextCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """As :meth:`TextModel.forward`, to scores.

        Args:
            labels: words (b, n); the mean over all but -100 of the nats that each costs where the word before
                it stands is the loss. ``labels=input_ids`` is what is usually meant.
            logits_to_keep: scores of so many of the last places alone, 0 for all; or of these places.
        """
        found = self.model(
            input_ids,
            attention_mask,
            inputs_embeds,
            cache,
            past_key_values,
            use_cache,
            output_hidden_states,
            output_attentions,
            return_dict=True,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(found.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size, **kwargs)
        outputs: dict[str, Any] = {CACHE: found.get(CACHE)}
        return CausalLMOutputWithPast(loss=loss, logits=logits, hidden_states=found.hidden_states, **outputs)


class MaskedLM(_Headed):
    """Scores of the word that stands there, at every place."""

    _tied_weights_keys = TIED

    def __init__(self, config: TextConfig) -> None:
        super().__init__(config)
        if getattr(config, "causal", True):
            raise ValueError("the config is of a causal model - take CrateForCausalLM, or set causal=False")
        self.model = self.model_class(config)
        self.lm_head = nn.Linear(config.embed_dim, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        **kwargs: Any,
    ) -> MaskedLMOutput:
        """As :meth:`TextModel.forward`, to scores.

        Args:
            labels: the words (b, n) that were hidden, -100 everywhere else; their mean nats are the loss.
        """
        found = self.model(
            input_ids,
            attention_mask,
            inputs_embeds,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            return_dict=True,
            **kwargs,
        )
        head = self.network.head
        assert head is not None
        logits = head(found.last_hidden_state, self.lm_head.weight)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size, **kwargs)
        return MaskedLMOutput(loss=loss, logits=logits, hidden_states=found.hidden_states)


class SequenceClassification(_Headed):
    """Scores of the classes of whole texts, from the mean of their tokens."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__(config)
        self.num_labels = int(config.num_labels or 0)
        self.model = self.model_class(config, num_labels=self.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutput:
        """As :meth:`TextModel.forward`, to classes (b, c).

        Args:
            labels: a class (b,) of each text; or numbers, as ``config.problem_type`` says.
        """
        found = self.model(
            input_ids,
            attention_mask,
            inputs_embeds,
            use_cache=False,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            return_dict=True,
            **kwargs,
        )
        real = None if attention_mask is None or bool(attention_mask.all()) else attention_mask.bool()
        logits = self.network.classify(found.last_hidden_state, real)
        loss = None
        if labels is not None:
            loss = self.loss_function(labels=labels, pooled_logits=logits, config=self.config, **kwargs)
        return SequenceClassifierOutput(loss=loss, logits=logits, hidden_states=found.hidden_states)


class CrateModel(TextModel):
    """CRATE on text, causal or masked, to its tokens."""

    config_class = CrateConfig


class CrateForCausalLM(CausalLM):
    """Causal CRATE, CRATE-alpha, or with ``compression="mhsa"`` a GPT-2."""

    config_class = CrateConfig
    model_class = CrateModel


class CrateForMaskedLM(MaskedLM):
    """Masked CRATE, CRATE-alpha, or with ``compression="mhsa"`` a BERT."""

    config_class = CrateConfig
    model_class = CrateModel


class CrateForSequenceClassification(SequenceClassification):
    """CRATE that tells the classes of texts."""

    config_class = CrateConfig
    model_class = CrateModel


class TostModel(TextModel):
    """ToST on text, to its tokens."""

    config_class = TostConfig


class TostForCausalLM(CausalLM):
    """Causal ToST."""

    config_class = TostConfig
    model_class = TostModel


class TostForSequenceClassification(SequenceClassification):
    """ToST that tells the classes of texts."""

    config_class = TostConfig
    model_class = TostModel


class _Front:
    """The real tokens of padded rows at the front of their rows, in order; and back.

    Attributes:
        real: (b, n), where they stand.
        counts: (b,), how many there are.
    """

    def __init__(self, real: Tensor) -> None:
        self.real, self.counts = real, real.sum(1)
        order = real.int().argsort(dim=1, descending=True, stable=True)
        self._order = order[:, : int(self.counts.max())]
        self._place = (real.cumsum(1) - 1).clamp_min(0)

    def take(self, words: Tensor) -> Tensor:
        """(b, n) or (b, n, d) -> the same with as many places as the longest row has real tokens."""
        if words.dim() == 2:
            return words.gather(1, self._order)
        return words.gather(1, self._order[..., None].expand(-1, -1, words.shape[-1]))

    def back(self, tokens: Tensor) -> Tensor:
        """(b, m, d) -> (b, n, d), zero where there is padding."""
        places = self._place[..., None].expand(-1, -1, tokens.shape[-1])
        return tokens.gather(1, places).masked_fill(~self.real[..., None], 0)


def _front(mask: Tensor | None, words: Tensor, cache: TextCache | None) -> _Front | None:
    """None where nothing that arrives is padding."""
    if mask is None:
        return None
    before = 0 if cache is None else cache.get_seq_length()
    expected = (words.shape[0], before + words.shape[1])
    if tuple(mask.shape) != expected:
        raise ValueError(
            f"attention_mask has shape {tuple(mask.shape)}; expected {expected}: a row for each text, and a "
            f"place for each of {before} tokens in the cache and {words.shape[1]} that arrive"
        )
    real = mask[:, before:].bool()
    return None if bool(real.all()) else _Front(real)


def _words(ids: Tensor | None, vectors: Tensor | None) -> Tensor:
    if (ids is None) == (vectors is None):
        raise ValueError("give either input_ids or inputs_embeds")
    words = vectors if ids is None else ids
    assert words is not None
    return words


@contextmanager
def _watched(network: LanguageModel, seen: list[Tensor]) -> Iterator[None]:
    """What the embedding and every layer give, in order, is put into ``seen`` while the block runs."""
    parts = [network.embed, *network.layers]
    hooks = [part.register_forward_hook(lambda _, __, output: seen.append(output)) for part in parts]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _is_unset(parameter: Tensor) -> bool:
    return not (parameter.is_meta or getattr(parameter, "_is_hf_initialized", False))
