"""Where each head looks: from the class token onto the patches, or from one word onto others."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pellucid.measure.cache import pattern
from pellucid.measure.watch import Sighting, Text, has_steps, watch
from pellucid.models.modes import in_eval_mode
from pellucid.steps import MHSA, TSSA, SubspaceStep
from pellucid.steps.mssa import AttentionStep


@dataclass(frozen=True, slots=True)
class Heads:
    """What the heads of one layer make of the tokens, each part computed when it is asked for.

    Attributes:
        layer: from 1.
        prefix: class token and registers, which stand before the patches in this layer.
        features: ``(b, n, K, p)``, of all tokens: the shared projection ``U_k^T z`` where one is query, key
            and value, else the keys.
        reading: ``(b, K, patches)``, see :func:`attention_maps`; None where the step forms no weights.
        shared: whether ``features`` is such a projection.
    """

    layer: int
    prefix: int
    features: Callable[[], Tensor]
    reading: Callable[[], Tensor] | None
    shared: bool


@torch.no_grad()
def attention_maps(
    model: Any, inputs: Tensor | Text, reader: int | None = None
) -> dict[int, Float[Tensor, "b K n"]]:
    """For each layer (from 1) the weights with which every head of the class token reads the patches.

    Without a class token it is the mean over all tokens; in a text the word at the place ``reader``. Rows sum
    to what is left after class token and registers. ToST compares no tokens: for it, the share of each token
    that belongs to each head. Layers that compress without attention are left out, as are those with an
    attention of another kind than timm's plain one.
    """
    maps: dict[int, Tensor] = {}

    def keep(heads: Heads) -> None:
        if heads.reading is not None:
            maps[heads.layer] = heads.reading().cpu()

    watch_heads(model, inputs, keep, reader)
    return maps


@torch.no_grad()
def watch_heads(
    model: Any, inputs: Tensor | Text, see: Callable[[Heads], None], reader: int | None = None
) -> None:
    """One pass; ``see`` is called in each layer that has heads, before its step is taken or just after.

    Those are white-box compression, our own ordinary attention, and timm's plain one. ``reader`` is the place
    of the token that reads where there is no class token; all in the mean unless given.
    """
    prefix = getattr(getattr(model, "embed", model), "num_prefix_tokens", 0)
    class_token = has_class_token(model)

    def read(weights: Tensor | None) -> Tensor:
        assert weights is not None
        place = 0 if class_token else reader
        return (weights.mean(-2) if place is None else weights[:, :, place])[..., prefix:]

    def see_step(sighting: Sighting) -> None:
        record = sighting.record
        assert record is not None
        step, z = record.step, record.z
        if isinstance(step, MHSA):
            see(
                Heads(
                    sighting.layer,
                    prefix,
                    lambda: _rows(step.heads(step.norm(z))[1]),
                    lambda: read(pattern(record)),
                    shared=False,
                )
            )
        elif isinstance(step, SubspaceStep):
            reading = None
            if isinstance(step, AttentionStep):
                reading = lambda: read(pattern(record))
            elif isinstance(step, TSSA):
                reading = lambda: step.membership(step.project(z))[..., prefix:]
            see(Heads(sighting.layer, prefix, lambda: _rows(step.project(z)), reading, shared=True))

    def see_block(layer: int) -> Callable[[nn.Module, Any], None]:
        def before(attention: Any, args: Any) -> None:
            tokens = args[0]
            see(
                Heads(
                    layer,
                    prefix,
                    lambda: _rows(_query_key(attention, tokens)[1]),
                    lambda: read(_vit_attention(attention, tokens)),
                    shared=False,
                )
            )

        return before

    from timm.models.vision_transformer import Attention

    with in_eval_mode(model), ExitStack() as hooks:
        if has_steps(model):
            watch(model, inputs, see_step)
            return
        for layer, block in enumerate(getattr(model, "blocks", []), start=1):
            if type(getattr(block, "attn", None)) is Attention:
                hooks.callback(block.attn.register_forward_pre_hook(see_block(layer)).remove)
        model.forward_features(inputs)


def has_class_token(model: Any) -> bool:
    """Whether the tokens inside the layers begin with one that stands for the image."""
    home, name = (model.embed, "class_token") if hasattr(model, "embed") else (model, "cls_token")
    return getattr(home, name, None) is not None


def _query_key(attention: Any, tokens: Float[Tensor, "b n d"]) -> tuple[Tensor, Tensor]:
    """timm's query and key, each ``(b, K, n, p)``."""
    qkv = attention.qkv(tokens).unflatten(-1, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
    return attention.q_norm(qkv[0]), attention.k_norm(qkv[1])


def _vit_attention(attention: Any, tokens: Float[Tensor, "b n d"]) -> Float[Tensor, "b K n n"]:
    """timm's attention weights, which its fused kernel does not form."""
    q, k = _query_key(attention, tokens)
    return (q @ k.mT * attention.scale).softmax(-1)


def _rows(heads: Float[Tensor, "b K n p"]) -> Float[Tensor, "b n K p"]:
    """Tokens before heads."""
    return heads.transpose(-3, -2)
