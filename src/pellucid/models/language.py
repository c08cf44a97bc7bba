"""Language models: the same steps, on tokens of text.

Causal models predict the next token from those so far; masked ones fill in what was hidden, seeing all. Both
read their scores off the table of words that they began with. :data:`MODELS` are the names; timm's registry
is for images and knows none of them.

**Departs** from the derivations, as published: what CRATE and ToST depart by for images. In a causal model
each token descends an objective of its own prefix, see :class:`~pellucid.steps.mssa.AttentionStep` and
:class:`~pellucid.steps.tssa.CausalTSSA`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from pellucid.errors import ConfigError
from pellucid.models.layer import build_layer, check_options
from pellucid.steps import (
    MLP,
    CausalTSSA,
    Layer,
    Memory,
    OnStep,
    OvercompleteISTA,
    UntiedCausalTSSA,
    UntiedMSSA,
    unroll,
)
from pellucid.steps.blackbox import MHSA

SPOKEN_AT_FIRST = 0.1
"""Of what untied compressions and decoupled dictionaries add to the tokens."""


class TextEmbedding(nn.Module):
    """A vector for each word of the vocabulary, or one that is given in its place, plus one for each place.

    Args:
        vocab_size: how many words there are.
        context: how many places.
        dim: width of a token.
    """

    def __init__(self, vocab_size: int, context: int, dim: int) -> None:
        super().__init__()
        self.words = nn.Embedding(vocab_size, dim)
        self.places = nn.Embedding(context, dim)
        for table in (self.words, self.places):
            nn.init.normal_(table.weight, std=0.02)

    def forward(
        self, ids: Int[Tensor, "b n"] | Float[Tensor, "b n d"], places: Int[Tensor, "#b n"]
    ) -> Float[Tensor, "b n d"]:
        words = ids if ids.is_floating_point() else self.words(ids)
        return words + self.places(places)


class MaskedHead(nn.Module):
    """What stands between the tokens and the words in BERT: one layer more, and a bias for each word."""

    def __init__(self, dim: int, vocab_size: int, norm_eps: float) -> None:
        super().__init__()
        self.dense = nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim, eps=norm_eps)
        self.bias = nn.Parameter(torch.zeros(vocab_size))
        nn.init.normal_(self.dense.weight, std=0.02)
        nn.init.zeros_(self.dense.bias)

    def forward(self, tokens: Float[Tensor, "*b d"], words: Float[Tensor, "v d"]) -> Float[Tensor, "*b v"]:
        return F.linear(self.norm(F.gelu(self.dense(tokens))), words, self.bias)


class LanguageModel(nn.Module):
    """Tokens of text through layers of steps, to a score for every word at every place.

    Args:
        embed: words to tokens.
        layers: each named steps in order.
        norm: applied to the last layer's tokens.
        causal: a token sees itself and those before it; its scores are of the word that follows. Else all see
            all, and the scores are of the word that stands there.
        head: of masked models; a causal one reads its scores off the words directly.
        num_labels: with some, the model classifies whole texts: a linear map of the mean of their tokens
            stands in place of the scores of words.
    """

    def __init__(
        self,
        embed: TextEmbedding,
        layers: Iterable[nn.Module],
        norm: nn.Module,
        *,
        causal: bool,
        head: MaskedHead | None = None,
        num_labels: int = 0,
    ) -> None:
        super().__init__()
        if num_labels < 0:
            raise ValueError(f"num_labels is {num_labels}; 0 leaves the scores of words")
        self.embed = embed
        self.layers = nn.ModuleList(layers)
        self.norm = norm
        self.head = None if num_labels else head
        self.classifier = nn.Linear(embed.words.weight.shape[1], num_labels) if num_labels else None
        self.label_names: list[str] = []
        self.causal = causal
        self.vocab_size, self.embed_dim = embed.words.weight.shape
        self.context = len(embed.places.weight)
        self.num_features = self.embed_dim
        self.grad_checkpointing: bool | Callable[..., Tensor] = False
        self._scale_residual_branches()
        if self.classifier is not None:
            nn.init.normal_(self.classifier.weight, std=0.02)
            nn.init.zeros_(self.classifier.bias)

    def forward(
        self,
        ids: Int[Tensor, "b n"],
        real: Bool[Tensor, "b n"] | None = None,
        on_step: OnStep | None = None,
    ) -> Float[Tensor, "b n v"] | Float[Tensor, "b c"]:
        """Scores of all words at each place, or of all classes for each text, before the softmax.

        Args:
            ids: words by their numbers, no more than ``context``.
            real: which are no padding; all unless given. In a causal model padding comes last.
            on_step: sees every step, as in :func:`~pellucid.steps.unroll`.

        Raises:
            ConfigError: too many tokens, none, numbers that are no words, or padding where it cannot be.
        """
        tokens = self.forward_features(ids, real, on_step)
        return self.forward_head(tokens) if self.classifier is None else self.classify(tokens, real)

    def forward_features(
        self,
        ids: Int[Tensor, "b n"] | Float[Tensor, "b n d"],
        real: Bool[Tensor, "b n"] | None = None,
        on_step: OnStep | None = None,
    ) -> Float[Tensor, "b n d"]:
        """Normalised tokens after the last layer. Vectors may stand in place of the numbers of words."""
        self._check(ids, ids.shape[1], real)
        z = self.embed(ids, torch.arange(ids.shape[1], device=ids.device)[None])
        recompute = torch.is_grad_enabled() and self.grad_checkpointing
        return self.norm(unroll(self.layers, z, on_step=on_step, checkpoint=recompute, real=real))

    def forward_head(self, tokens: Float[Tensor, "*b d"]) -> Float[Tensor, "*b v"]:
        """Scores of all words from normalised tokens."""
        words = self.embed.words.weight
        return F.linear(tokens, words) if self.head is None else self.head(tokens, words)

    def classify(
        self, tokens: Float[Tensor, "b n d"], real: Bool[Tensor, "b n"] | None = None
    ) -> Float[Tensor, "b c"]:
        """Scores of all classes from normalised tokens: of the mean of those that are no padding."""
        if self.classifier is None:
            raise ConfigError("the model gives scores of words, not of classes - build it with num_labels")
        if real is None:
            return self.classifier(tokens.mean(1))
        weights = real.to(tokens.dtype)
        return self.classifier(torch.einsum("bn,bnd->bd", weights / weights.sum(1, keepdim=True), tokens))

    def resume(
        self,
        ids: Int[Tensor, "b n"] | Float[Tensor, "b n d"],
        memory: Memory,
        real: Int[Tensor, " b"] | None = None,
    ) -> Float[Tensor, "b n d"]:
        """Normalised tokens of the words that follow those in ``memory``, which then holds them too.

        Args:
            ids: words that follow, or vectors in place of them, padded behind where ``real`` says so.
            memory: of this batch; a new one begins a text.
            real: how many of each row count, none in rows that wait; all unless given.

        Raises:
            ConfigError: a masked model, or more tokens than ``context``.
        """
        if not self.causal:
            raise ConfigError("a masked model sees all tokens at once - take a causal one to continue a text")
        self._check(ids, memory.longest + ids.shape[1], None)
        z = self.embed(ids, memory.expect(ids.shape[1], real))
        z = unroll(self.layers, z, memory=memory)
        memory.arrive()
        return self.norm(z)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute layers in the backward pass: memory of one layer in place of all."""
        self.grad_checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        """Words, places, and what is one number for each head or coordinate."""
        scalars = ("temperature", "layer_scale", "offset", "embed.words.weight", "embed.places.weight")
        return {name for name, _ in self.named_parameters() if name.endswith(scalars)}

    @property
    def pretrained_cfg(self) -> dict[str, Any]:
        """What models say of the images that they take, and of their classes: whoever asks has images."""
        name = getattr(self, "architecture", type(self).__name__)
        raise ConfigError(f"{name} reads text, not images - take an image model, such as crate_digits")

    num_classes = pretrained_cfg

    @torch.no_grad()
    def _scale_residual_branches(self) -> None:
        """As GPT-2 begins: what black boxes add to the tokens is scaled down by the root of how many do.

        What a step speaks through a matrix of its own begins at a tenth.
        """
        steps = [step for layer in self.layers for step in layer.values()]  # type: ignore[operator]
        for step in steps:
            if isinstance(step, MHSA):
                step.output.weight.mul_(len(steps) ** -0.5)
            elif isinstance(step, MLP):
                step.fc2.weight.mul_(len(steps) ** -0.5)
            elif isinstance(step, UntiedMSSA):
                step.output.weight.mul_(SPOKEN_AT_FIRST)
            elif isinstance(step, OvercompleteISTA) and step.output is not None:
                step.output.mul_(SPOKEN_AT_FIRST)

    def _check(self, ids: Tensor, reached: int, real: Tensor | None) -> None:
        if reached > self.context:
            raise ConfigError(
                f"{reached} tokens, and the model was built for a context of {self.context} - give fewer, "
                f"or build it with a longer context"
            )
        if ids.shape[1] == 0:
            raise ConfigError("no tokens - give at least one to each row, such as the one that begins a text")
        if torch.compiler.is_compiling():
            return
        by_number = ids.device.type == "cpu" and not ids.is_floating_point()
        if by_number and not 0 <= int(ids.min()) <= int(ids.max()) < self.vocab_size:
            raise ConfigError(
                f"tokens from {int(ids.min())} to {int(ids.max())}, and the vocabulary has "
                f"{self.vocab_size} - use the tokenizer that the model was trained with"
            )
        if real is None:
            return
        if not bool(real.any(1).all()):
            raise ConfigError("a row of padding alone - leave it out")
        if self.causal and bool((real[:, 1:] & ~real[:, :-1]).any()):
            raise ConfigError("padding in front of tokens or between them - in a causal model it comes last")


class CRATELM(LanguageModel):
    """CRATE on text, causal as a GPT or masked as BERT.

    Args:
        vocab_size, context: words, and most tokens at once.
        embed_dim, depth, num_heads: as in :class:`~pellucid.models.crate.CRATE`.
        causal: see :class:`LanguageModel`.
        compression: ``"untied"`` (as published), ``"tied"`` (MSSA as derived) or ``"mhsa"`` (a black box).
        sparsification: ``"ista"``, ``"soft"``, ``"mlp"`` (a black box), or ``"none"``: attention only.
        compress_step_size, output_bias, orthonormal, step_size, sparsity, overcomplete, decoupled, residual:
            as in :class:`~pellucid.models.crate.CRATE`.
        recency: heads count a token less that stands further away, each by its own measure, so that what is
            near is met before any place is learnt; see :class:`~pellucid.steps.distance.Distance`.
        own: where query and key are one projection, a token is among those whose mean it moves towards.
        eps: distortion at which R^c is measured.
        norm_eps: of all norms; 1e-5 as published.
        final_norm: a norm behind the last layer; the published complete CRATE has none.
        num_labels: see :class:`LanguageModel`.

    Raises:
        ValueError: sizes or options that do not fit together, naming both.
    """

    def __init__(
        self,
        vocab_size: int = 50304,
        context: int = 1024,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        causal: bool = True,
        compression: Literal["tied", "untied", "mhsa"] = "untied",
        compress_step_size: float = 1.0,
        output_bias: bool = True,
        orthonormal: bool = False,
        sparsification: Literal["ista", "soft", "mlp", "none"] = "ista",
        step_size: float = 0.1,
        sparsity: float = 0.1,
        overcomplete: int = 1,
        decoupled: bool = False,
        residual: bool = False,
        recency: bool = False,
        own: bool = True,
        eps: float = 0.1,
        norm_eps: float = 1e-5,
        final_norm: bool = True,
        num_labels: int = 0,
    ) -> None:
        _check_known("compression", compression, ("tied", "untied", "mhsa"))
        _check_known("sparsification", sparsification, ("ista", "soft", "mlp", "none"))
        halves = "ista" if sparsification == "none" else sparsification
        check_options(compression, halves, overcomplete, decoupled, residual)
        layers = [
            build_layer(
                embed_dim,
                num_heads,
                compression=compression,
                compress_step_size=compress_step_size,
                eps=eps,
                output_bias=output_bias,
                sparsification=halves,
                step_size=step_size,
                sparsity=sparsity,
                overcomplete=overcomplete,
                decoupled=decoupled,
                residual=residual,
                norm_eps=norm_eps,
                orthonormal=orthonormal,
                causal=causal,
                recency=recency,
                own=own,
            )
            for _ in range(depth)
        ]
        if sparsification == "none":
            layers = [Layer({"compress": layer["compress"]}) for layer in layers]
        super().__init__(
            TextEmbedding(vocab_size, context, embed_dim),
            layers,
            nn.LayerNorm(embed_dim, eps=norm_eps) if final_norm else nn.Identity(),
            causal=causal,
            head=None if causal else MaskedHead(embed_dim, vocab_size, norm_eps),
            num_labels=num_labels,
        )


class ToSTLM(LanguageModel):
    """ToST on text: causal, with a state of fixed size.

    Args:
        vocab_size, context, embed_dim, depth, num_heads: as in :class:`CRATELM`.
        compression: ``"untied"`` (as published) or ``"tied"`` (as derived).
        sparsification: ``"mlp"`` (as published) or ``"ista"`` (CRATE-alpha's sparse code).
        bias: of all maps and norms.
        offset: the published learned number for each place of each head (``denom_bias``), which ties the
            model to its context.
        layer_scale: where the learned step sizes begin; 1e-5 as published, which freezes short runs.
        mlp_ratio: width of the MLP, or atoms of the dictionary, for each dimension of a token.
        step_size, sparsity: of ISTA.
        norm_eps: of all norms.
        num_labels: see :class:`LanguageModel`.

    Raises:
        ValueError: sizes or options that do not fit together, naming both.
    """

    def __init__(
        self,
        vocab_size: int = 50304,
        context: int = 1024,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        compression: Literal["tied", "untied"] = "untied",
        sparsification: Literal["mlp", "ista"] = "mlp",
        bias: bool = False,
        offset: bool = True,
        layer_scale: float = 1e-5,
        mlp_ratio: float = 4.0,
        step_size: float = 0.1,
        sparsity: float = 0.1,
        norm_eps: float = 1e-5,
        num_labels: int = 0,
    ) -> None:
        _check_known("compression", compression, ("tied", "untied"))
        _check_known("sparsification", sparsification, ("mlp", "ista"))
        norm = partial(nn.LayerNorm, embed_dim, eps=norm_eps, bias=bias)
        block_size = context if offset else None

        def one_layer() -> Layer:
            compress = (
                CausalTSSA(embed_dim, num_heads, norm=norm(), bias=bias, block_size=block_size)
                if compression == "tied"
                else UntiedCausalTSSA(
                    embed_dim,
                    num_heads,
                    norm=norm(),
                    bias=bias,
                    output_bias=bias,
                    block_size=block_size,
                    layer_scale=layer_scale,
                )
            )
            sparsify = (
                MLP(embed_dim, mlp_ratio, norm=norm(), layer_scale=layer_scale, bias=bias)
                if sparsification == "mlp"
                else OvercompleteISTA(
                    embed_dim,
                    round(mlp_ratio * embed_dim),
                    step_size=step_size,
                    sparsity=sparsity,
                    norm=norm(),
                )
            )
            return Layer({"compress": compress, "sparsify": sparsify})

        super().__init__(
            TextEmbedding(vocab_size, context, embed_dim),
            [one_layer() for _ in range(depth)],
            norm(),
            causal=True,
            num_labels=num_labels,
        )


def _check_known(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name} is {value!r}; known: {', '.join(map(repr, known))}")


@dataclass(frozen=True)
class TextModel:
    """A language model by name.

    Attributes:
        cls: its class.
        meaning: what it is, in a line.
        sizes: arguments of the class.
    """

    cls: type[LanguageModel]
    meaning: str
    sizes: dict[str, Any]


SIZES: dict[str, dict[str, int]] = {
    "small": {"embed_dim": 768, "depth": 12, "num_heads": 12},
    "medium": {"embed_dim": 1024, "depth": 24, "num_heads": 16},
    "large": {"embed_dim": 1280, "depth": 36, "num_heads": 20},
}
"""GPT-2's, in which CRATE and ToST were published."""

ALPHA: dict[str, Any] = {"overcomplete": 4, "decoupled": True, "residual": True, "output_bias": False}
BLACK_BOX: dict[str, Any] = {"compression": "mhsa", "sparsification": "mlp"}
BYTES: dict[str, Any] = {"vocab_size": 257, "context": 256}
"""All bytes, and one that ends a text or hides a byte."""

KINDS: dict[str, tuple[type[LanguageModel], str, dict[str, Any]]] = {
    "crate_gpt": (CRATELM, "Causal CRATE.", {}),
    "crate_overcomplete_gpt": (CRATELM, "Causal CRATE, four atoms for each dimension.", {"overcomplete": 4}),
    "crate_alpha_gpt": (CRATELM, "Causal CRATE-alpha: overcomplete, decoupled, residual.", ALPHA),
    "crate_aot_gpt": (CRATELM, "Causal CRATE of attention alone.", {"sparsification": "none"}),
    "tost_gpt": (ToSTLM, "Causal ToST.", {}),
    "gpt2": (CRATELM, "Attention and MLP as in GPT-2, to stand beside.", BLACK_BOX),
    "crate_bert": (CRATELM, "Masked CRATE.", {"causal": False}),
    "crate_alpha_bert": (CRATELM, "Masked CRATE-alpha.", {"causal": False, **ALPHA}),
    "bert": (CRATELM, "Attention and MLP, masked, to stand beside.", {"causal": False, **BLACK_BOX}),
}

NEAR: dict[str, Any] = {"recency": True, "own": False}
NEAR_TIED: dict[str, Any] = {**NEAR, "compression": "tied"}
NEAR_COMPLETE: dict[str, Any] = {**NEAR_TIED, "compress_step_size": 0.1, "step_size": 1.0}
"""Without a residual around the code, long steps of attention leave nothing of the tokens to learn from."""

NEAR_ALPHA: dict[str, Any] = {**NEAR, "step_size": 1.0}

AT_BYTES: dict[str, dict[str, Any]] = {
    "crate_gpt": {"embed_dim": 256, "depth": 7, "num_heads": 16, **NEAR_COMPLETE},
    "crate_overcomplete_gpt": {"embed_dim": 192, "depth": 5, "num_heads": 16, **NEAR_TIED},
    "crate_alpha_gpt": {"embed_dim": 128, "depth": 6, "num_heads": 16, **NEAR_ALPHA},
    "crate_aot_gpt": {"embed_dim": 320, "depth": 8, "num_heads": 20, **NEAR_TIED},
    "tost_gpt": {"embed_dim": 128, "depth": 6, "num_heads": 4, "offset": False, "layer_scale": 1.0},
    "gpt2": {"embed_dim": 128, "depth": 5, "num_heads": 4, "recency": True},
    "crate_bert": {"embed_dim": 256, "depth": 6, "num_heads": 16, **NEAR_COMPLETE},
    "crate_alpha_bert": {"embed_dim": 128, "depth": 6, "num_heads": 16, **NEAR_ALPHA},
    "bert": {"embed_dim": 128, "depth": 5, "num_heads": 4, "recency": True},
}
"""About a million parameters each, for text as bytes."""


def _models() -> dict[str, TextModel]:
    found: dict[str, TextModel] = {}
    for kind, (cls, meaning, options) in KINDS.items():
        masked = options.get("causal") is False
        for size, sizes in {"base": SIZES["small"]}.items() if masked else SIZES.items():
            published = {"vocab_size": 30522, "context": 512} if masked else {}
            found[f"{kind}_{size}"] = TextModel(cls, meaning, {**options, **published, **sizes})
        of_bytes = f"{meaning.rstrip('.')}, for bytes."
        found[f"{kind}_bytes"] = TextModel(cls, of_bytes, {**options, **BYTES, **AT_BYTES[kind]})
    return found


MODELS = _models()
"""Names that :func:`~pellucid.models.create_model` knows besides timm's registry."""
