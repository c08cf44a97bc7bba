"""Where each head looks: from the class token onto the patches, or from one word onto others."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from pellucid.measure.cache import pattern
from pellucid.measure.watch import Sighting, Text, has_steps, watch
from pellucid.models.modes import in_eval_mode
from pellucid.steps import TSSA


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
    prefix = getattr(getattr(model, "embed", model), "num_prefix_tokens", 0)
    class_token = _has_class_token(model)
    maps: dict[int, Tensor] = {}

    def keep(layer: int, weights: Tensor) -> None:
        place = 0 if class_token else reader
        read = weights.mean(-2) if place is None else weights[:, :, place]
        maps[layer] = read[..., prefix:].cpu()

    def see(sighting: Sighting) -> None:
        record = sighting.record
        if record is None:
            return
        step, weights = record.step, pattern(record)
        if weights is not None:
            keep(sighting.layer, weights)
        elif isinstance(step, TSSA):
            maps[sighting.layer] = step.membership(step.project(record.z))[..., prefix:].cpu()

    from timm.models.vision_transformer import Attention

    with in_eval_mode(model):
        if has_steps(model):
            watch(model, inputs, see)
            return maps
        hooks = [
            block.attn.register_forward_pre_hook(
                lambda module, args, layer=layer: keep(layer, _vit_attention(module, args[0]))
            )
            for layer, block in enumerate(getattr(model, "blocks", []), start=1)
            if type(getattr(block, "attn", None)) is Attention
        ]
        try:
            model.forward_features(inputs)
        finally:
            for hook in hooks:
                hook.remove()
    return maps


def _has_class_token(model: Any) -> bool:
    home, name = (model.embed, "class_token") if hasattr(model, "embed") else (model, "cls_token")
    return getattr(home, name, None) is not None


def _vit_attention(attention: Any, tokens: Float[Tensor, "b n d"]) -> Float[Tensor, "b K n n"]:
    """timm's attention weights, which its fused kernel does not form."""
    qkv = attention.qkv(tokens).unflatten(-1, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
    q, k = attention.q_norm(qkv[0]), attention.k_norm(qkv[1])
    return (q @ k.mT * attention.scale).softmax(-1)
