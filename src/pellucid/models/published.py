"""Published checkpoints: the one place that knows their key names and constants.

CRATE (Yu et al. 2023, the authors' PyTorch program): ``pos_embedding``, ``cls_token``,
``to_patch_embedding.{1,2,3}``, ``transformer.layers.I.{0,1}``, ``mlp_head.{0,1}``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from pellucid.errors import CheckpointError
from pellucid.models.crate import CRATE
from pellucid.models.saved import load_matched

_WRAPPERS = re.compile(r"^(module\.|_orig_mod\.)+")

_CRATE_KEYS = [
    (r"pos_embedding", "embed.pos_embed"),
    (r"cls_token", "embed.class_token"),
    (r"to_patch_embedding\.1\.", "embed.stem.norm_in."),
    (r"to_patch_embedding\.2\.", "embed.stem.proj."),
    (r"to_patch_embedding\.3\.", "embed.stem.norm_out."),
    (r"transformer\.layers\.(\d+)\.0\.norm\.", r"layers.\1.compress.norm."),
    (r"transformer\.layers\.(\d+)\.0\.fn\.qkv\.", r"layers.\1.compress.subspaces."),
    (r"transformer\.layers\.(\d+)\.0\.fn\.to_out\.0\.", r"layers.\1.compress.output."),
    (r"transformer\.layers\.(\d+)\.1\.norm\.", r"layers.\1.sparsify.enter."),
    (r"transformer\.layers\.(\d+)\.1\.fn\.weight", r"layers.\1.sparsify.dictionary"),
    (r"mlp_head\.0\.", "norm."),
    (r"mlp_head\.1\.", "head."),
]


def from_published(state_dict: Mapping[str, Any], **hints: Any) -> CRATE:
    """Our model from a published state dict. Knows CRATE.

    Sizes are read from shapes. ``hints`` are what keys cannot tell, under our constructor's names:
    ``num_heads`` (``embed_dim // 64`` unless given), ``img_size`` (square), ``in_chans``, ``step_size``,
    ``sparsity``.

    Raises:
        CheckpointError: an unknown layout, or keys missing, unexpected or of the wrong shape, all listed.
    """
    state = {_WRAPPERS.sub("", key): value for key, value in state_dict.items()}
    needed = ("to_patch_embedding.2.weight", "pos_embedding", "transformer.layers.0.1.fn.weight")
    if any(key not in state for key in needed):
        some = ", ".join(list(state)[:3]) or "none"
        raise CheckpointError(
            f"not a known published layout (first keys: {some}) - known: CRATE, "
            f"whose checkpoints hold to_patch_embedding.2.weight under 'state_dict'"
        )
    model = CRATE(**{**_crate_sizes(state), **hints})
    load_matched(model, {_rename(key): value for key, value in state.items()})
    return model


def _rename(key: str) -> str:
    for pattern, ours in _CRATE_KEYS:
        renamed, hit = re.subn(f"^{pattern}", ours, key)
        if hit:
            return renamed
    return key


def _crate_sizes(state: Mapping[str, Tensor]) -> dict[str, Any]:
    dim, patch_dim = state["to_patch_embedding.2.weight"].shape
    in_chans = 3 if patch_dim % 3 == 0 else 1
    patch_size = round((patch_dim / in_chans) ** 0.5)
    grid = round((state["pos_embedding"].shape[1] - 1) ** 0.5)
    depth = 1 + max(int(m[1]) for key in state if (m := re.match(r"transformer\.layers\.(\d+)\.", key)))
    return {
        "img_size": grid * patch_size,
        "patch_size": patch_size,
        "in_chans": in_chans,
        "num_classes": len(state["mlp_head.1.weight"]) if "mlp_head.1.weight" in state else 0,
        "embed_dim": dim,
        "depth": depth,
        "num_heads": max(1, dim // 64),
        "compression": "untied",
    }
