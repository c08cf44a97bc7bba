"""Published checkpoints: the one place that knows their key names and constants.

Each layout is one :class:`Family` in :data:`FAMILIES`. A new one is one entry: which keys give it away, what
they are called here, how sizes are read from shapes.
"""

from __future__ import annotations

import math
import os
import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pellucid.errors import CheckpointError, ConfigError, PellucidError
from pellucid.models import crate, language, mae, tost
from pellucid.models.create import create_model
from pellucid.models.foreign import read_foreign
from pellucid.models.saved import _NOT_SIZES, load_matched, short

State = dict[str, Tensor]

_WRAPPERS = re.compile(r"^((module|_orig_mod|backbone)\.)+")
"""What DistributedDataParallel, torch.compile and DINO's model with a head put before names, in any order."""

HEAD_SIZE = 64
"""Width of a head in the published sizes; ``num_heads`` is told by no key."""


@dataclass(frozen=True)
class Family:
    """A published layout.

    Attributes:
        name: as people call it.
        signature: regular expressions; a file is of this family if each is the whole of some key.
        keys: regular expressions for the beginnings of their names, and ours in their place.
        sizes: arguments of the model, from the tensors under their names and the hints.
        architecture: a name that ``create_model`` knows, from those arguments.
        ignored: regular expressions for whole keys that are of no use to the model, and may be there.
        adapt: what is stored in another form, made ours; after the renaming.
    """

    name: str
    signature: tuple[str, ...]
    keys: tuple[tuple[str, str], ...]
    sizes: Callable[[State, Mapping[str, Any]], dict[str, Any]]
    architecture: Callable[[Mapping[str, Any]], str]
    ignored: tuple[str, ...] = ()
    adapt: Callable[[State], State] = lambda state: state


@dataclass(frozen=True)
class Published:
    """A published checkpoint as it was understood.

    Attributes:
        model: ours or timm's, with ``architecture`` and ``model_args`` that make it again.
        family: name of its layout.
        ignored: keys that were left out, as they are named in the file.
    """

    model: Any
    family: str
    ignored: tuple[str, ...]


def from_published(state_dict: Mapping[str, Any], **hints: Any) -> nn.Module:
    """A model from a published state dict.

    Known are CRATE, CRATE-alpha, CRATE-MAE, ToST, the language models of CRATE (crate-lm) and ToST, and the
    ViTs of DINO, DINOv2, SimDINO and SimDINOv2.

    The layout is recognised by its keys, sizes are read from shapes. A DINO backbone becomes timm's
    ``VisionTransformer`` without a classifier.

    Args:
        state_dict: names and tensors, such as :func:`read_published` gives.
        hints: what keys cannot tell, under the constructor's names: ``num_heads`` (``embed_dim // 64``
            unless given or known from the published sizes), ``img_size`` (square unless given; 224 for ToST,
            whose keys do not tell), ``in_chans``, ``step_size``, ``sparsity``, ``norm_pix_loss``.

    Raises:
        CheckpointError: an unknown layout, NaN or infinity, or keys missing, unexpected or of the wrong
            shape, all listed.
        ConfigError: a hint that the architecture does not take.
    """
    return open_published(state_dict, **hints).model


def read_published(path: str | os.PathLike[str], key: str | None = None) -> dict[str, Tensor]:
    """The state dict in a published file, for :func:`from_published`. Nothing in the file is run.

    Args:
        path: ``.pth``, ``.pt``, ``.bin``, ``.npz`` or ``.safetensors``.
        key: the part to take where there are several: the first of ``teacher``, ``student``,
            ``state_dict``, ``model``, ``model_ema`` unless given. Warns if others were left.

    Raises:
        CheckpointError: see :func:`~pellucid.models.foreign.read_foreign`.
    """
    weights = read_foreign(path, key)
    if weights.others and key is None:
        warnings.warn(
            f"{path}: took '{weights.part or 'the whole'}'; key= takes another: {', '.join(weights.others)}",
            stacklevel=2,
        )
    return weights.tensors


def open_published(state_dict: Mapping[str, Any], **hints: Any) -> Published:
    """As :func:`from_published`, with what was recognised and what was left out."""
    foreign = sorted(_NOT_SIZES & hints.keys())
    if foreign:
        raise ConfigError(f"{', '.join(foreign)}: not a size of the model - leave it out")
    strange = [str(key) for key, value in state_dict.items() if not isinstance(value, Tensor)]
    if strange:
        raise CheckpointError(
            f"not all of it are tensors: {_some(strange)} - give the state dict inside, under a key such as "
            f"'state_dict', 'model' or 'teacher'"
        )
    state = _rekeyed(state_dict, lambda key: _WRAPPERS.sub("", key))
    family = _recognise(state)
    ignored = {key for key in state if _any_matches(family.ignored, key)}
    theirs = {key: value for key, value in state.items() if key not in ignored}
    try:
        arguments = {**family.sizes(theirs, hints), **hints}
        name = family.architecture(arguments)
        ours = family.adapt(_rekeyed(theirs, lambda key: _rename(key, family.keys)))
        _refuse_non_finite(ours)
        # Without memory first: sizes that some tensors claim and others do not have could ask for any amount.
        with torch.device("meta"), warnings.catch_warnings(action="ignore"):
            load_matched(create_model(name, **arguments), ours)
    except PellucidError:
        raise
    except Exception as error:
        raise CheckpointError(
            f"keys of {family.name}, but not its shapes ({short(error)}) - get it again"
        ) from error
    model: Any = create_model(name, **arguments)
    load_matched(model, ours)
    left = tuple(key for key in state_dict if _WRAPPERS.sub("", key) in ignored)
    return Published(model, family.name, left)


def _recognise(state: State) -> Family:
    for family in FAMILIES:
        if _has_all(state, family.signature):
            return family
    for name, signature, reason in REFUSED:
        if _has_all(state, signature):
            raise CheckpointError(f"this is {name}: {reason}")
    some = ", ".join(short(name, 60) for name in list(state)[:3]) or "none"
    known = ", ".join(family.name for family in FAMILIES)
    raise CheckpointError(f"not a known published layout (first keys: {some}) - known: {known}")


def _has_all(state: State, signature: Iterable[str]) -> bool:
    return all(any(re.fullmatch(pattern, key) for key in state) for pattern in signature)


def _any_matches(patterns: Iterable[str], key: str) -> bool:
    return any(re.fullmatch(pattern, key) for pattern in patterns)


def _rekeyed(state: Mapping[str, Any], rename: Callable[[str], str]) -> State:
    """The same under other names, no two of which may become one."""
    renamed: State = {}
    for key, value in state.items():
        name = rename(key)
        if name in renamed:
            raise CheckpointError(
                f"two keys of the file mean the same: {short(name, 60)} - take one part of the file only"
            )
        renamed[name] = value
    return renamed


def _rename(key: str, keys: Iterable[tuple[str, str]]) -> str:
    for pattern, ours in keys:
        renamed, hit = re.subn(f"^{pattern}", ours, key)
        if hit:
            return renamed
    return key


def _refuse_non_finite(state: State) -> None:
    bad = [key for key, value in state.items() if value.is_floating_point() and not _is_finite(value)]
    if bad:
        raise CheckpointError(f"NaN or infinity in {len(bad)} tensors: {_some(bad)} - get another checkpoint")


def _is_finite(value: Tensor) -> bool:
    return bool(value.float().isfinite().all()) if value.element_size() < 2 else bool(value.isfinite().all())


def _some(names: list[str]) -> str:
    return ", ".join(short(name, 60) for name in names[:5]) + (", ..." if len(names) > 5 else "")


def _count(state: State, pattern: str) -> int:
    """Number of layers, from the largest index that the pattern's group finds."""
    count = 1 + max((int(m[1]) for key in state if (m := re.match(pattern, key))), default=-1)
    if count > len(state):
        raise CheckpointError(f"there is a layer {count - 1} among {len(state)} tensors - get the file again")
    return count


def _img_size(positions: int, patch_size: tuple[int, int], hints: Mapping[str, Any]) -> tuple[int, int]:
    """Height and width, from the number of patches; square, as all published ones are, unless hinted."""
    side = math.isqrt(positions)
    if side * side != positions and "img_size" not in hints:
        raise CheckpointError(
            f"positions for {positions} patches, which is not a square - give img_size=(height, width)"
        )
    return side * patch_size[0], side * patch_size[1]


def _heads(dim: int, sizes: Mapping[str, Mapping[str, int]]) -> int:
    """Heads of the published size of this width, which no key tells; of ``HEAD_SIZE`` each for another."""
    return {size["embed_dim"]: size["num_heads"] for size in sizes.values()}.get(
        dim, max(1, dim // HEAD_SIZE)
    )


def _size_name(dim: int, sizes: Mapping[str, Mapping[str, int]]) -> str:
    """The published size of this width, or base, whose every size is then overridden."""
    return next((name for name, size in sizes.items() if size["embed_dim"] == dim), "base")


def _plain(size: tuple[int, int]) -> int | tuple[int, int]:
    return size[0] if size[0] == size[1] else size


# --- CRATE (Yu et al. 2023, the authors' PyTorch program) -------------------------------------------------


def _crate_sizes(state: State, hints: Mapping[str, Any]) -> dict[str, Any]:
    dim, patch_dim = state["to_patch_embedding.2.weight"].shape
    in_chans = hints.get("in_chans", 3 if patch_dim % 3 == 0 else 1)
    patch_size = math.isqrt(patch_dim // in_chans)
    return {
        "img_size": _plain(_img_size(state["pos_embedding"].shape[1] - 1, (patch_size, patch_size), hints)),
        "patch_size": patch_size,
        "in_chans": in_chans,
        "num_classes": len(state["mlp_head.1.weight"]) if "mlp_head.1.weight" in state else 0,
        "embed_dim": dim,
        "depth": _count(state, r"transformer\.layers\.(\d+)\."),
        "num_heads": _heads(dim, crate.CRATE_SIZES),
        **crate.PUBLISHED,
    }


_CRATE_KEYS = (
    (r"pos_embedding", "embed.pos_embed"),
    (r"cls_token", "embed.class_token"),
    (r"transformer\.layers\.(\d+)\.0\.norm\.", r"layers.\1.compress.norm."),
    (r"transformer\.layers\.(\d+)\.0\.fn\.qkv\.", r"layers.\1.compress.subspaces."),
    (r"transformer\.layers\.(\d+)\.0\.fn\.to_out\.0\.", r"layers.\1.compress.output."),
    (r"mlp_head\.0\.", "norm."),
    (r"mlp_head\.1\.", "head."),
)
"""What CRATE-alpha kept."""

_CRATE = Family(
    name="CRATE",
    signature=(
        r"to_patch_embedding\.2\.weight",
        r"pos_embedding",
        r"transformer\.layers\.0\.1\.fn\.weight",
    ),
    keys=(
        *_CRATE_KEYS,
        (r"to_patch_embedding\.1\.", "embed.stem.norm_in."),
        (r"to_patch_embedding\.2\.", "embed.stem.proj."),
        (r"to_patch_embedding\.3\.", "embed.stem.norm_out."),
        (r"transformer\.layers\.(\d+)\.1\.norm\.", r"layers.\1.sparsify.enter."),
        (r"transformer\.layers\.(\d+)\.1\.fn\.weight", r"layers.\1.sparsify.dictionary"),
    ),
    sizes=_crate_sizes,
    architecture=lambda sizes: f"crate_{_size_name(sizes['embed_dim'], crate.CRATE_SIZES)}_patch16_224",
)


# --- CRATE-alpha (Yang et al. 2024, the authors' PyTorch inference program) -------------------------------


def _alpha_sizes(state: State, hints: Mapping[str, Any]) -> dict[str, Any]:
    dim, in_chans, *patch = state["conv1.weight"].shape
    return {
        "img_size": _plain(_img_size(state["pos_embedding"].shape[1] - 1, (patch[0], patch[1]), hints)),
        "patch_size": _plain((patch[0], patch[1])),
        "in_chans": in_chans,
        "num_classes": len(state["mlp_head.1.weight"]) if "mlp_head.1.weight" in state else 0,
        "embed_dim": dim,
        "depth": _count(state, r"transformer\.layers\.(\d+)\."),
        "num_heads": _heads(dim, crate.ALPHA_SIZES),
        **crate.ALPHA,
        "overcomplete": state["transformer.layers.0.1.fn.D"].shape[1] // dim,
    }


_ALPHA = Family(
    name="CRATE-alpha",
    signature=(
        r"conv1\.weight",
        r"pos_embedding",
        r"transformer\.layers\.0\.1\.fn\.D",
        r"transformer\.layers\.0\.1\.fn\.D1",
    ),
    keys=(
        *_CRATE_KEYS,
        (r"conv1\.", "embed.stem.proj."),
        (r"transformer\.layers\.(\d+)\.1\.norm\.", r"layers.\1.sparsify.norm."),
        (r"transformer\.layers\.(\d+)\.1\.fn\.D1$", r"layers.\1.sparsify.output"),
        (r"transformer\.layers\.(\d+)\.1\.fn\.D$", r"layers.\1.sparsify.coder.dictionary"),
    ),
    sizes=_alpha_sizes,
    architecture=lambda sizes: f"crate_alpha_{_size_name(sizes['embed_dim'], crate.ALPHA_SIZES)}_patch16_224",
)


# --- CRATE-MAE (Pai et al. 2023, the authors' PyTorch program) --------------------------------------------
#
# The position that its encoder adds is called decoder_pos_embed; pos_embed and decoder_embed are never used.


def _mae_sizes(state: State, hints: Mapping[str, Any]) -> dict[str, Any]:
    dim, in_chans, *patch = state["patch_embed.proj.weight"].shape
    positions = state["decoder_pos_embed"].shape[1] - 1
    return {
        "img_size": _plain(_img_size(positions, (patch[0], patch[1]), hints)),
        "patch_size": _plain((patch[0], patch[1])),
        "in_chans": in_chans,
        "num_classes": 0,
        "embed_dim": dim,
        "depth": _count(state, r"blocks\.(\d+)\."),
        "decoder_depth": _count(state, r"decoder_blocks\.(\d+)\."),
        "num_heads": _heads(dim, crate.CRATE_SIZES),
        **mae.PUBLISHED,
    }


_MAE = Family(
    name="CRATE-MAE",
    signature=(
        r"mask_token",
        r"decoder_pos_embed",
        r"blocks\.0\.layers\.0\.1\.fn\.weight",
        r"decoder_blocks\.0\.layers\.0\.0\.fn\.weight",
    ),
    keys=(
        (r"decoder_pos_embed", "embed.pos_embed"),
        (r"cls_token", "embed.class_token"),
        (r"patch_embed\.", "embed.stem."),
        (r"blocks\.(\d+)\.layers\.0\.0\.norm\.", r"layers.\1.compress.norm."),
        (r"blocks\.(\d+)\.layers\.0\.0\.fn\.qkv\.", r"layers.\1.compress.subspaces."),
        (r"blocks\.(\d+)\.layers\.0\.0\.fn\.to_out\.0\.", r"layers.\1.compress.output."),
        (r"blocks\.(\d+)\.layers\.0\.1\.norm\.", r"layers.\1.sparsify.enter."),
        (r"blocks\.(\d+)\.layers\.0\.1\.fn\.weight", r"layers.\1.sparsify.dictionary"),
        (r"decoder_blocks\.(\d+)\.layers\.0\.0\.norm\.", r"decoder_layers.\1.synthesise.enter."),
        (r"decoder_blocks\.(\d+)\.layers\.0\.0\.fn\.weight", r"decoder_layers.\1.synthesise.dictionary"),
        (r"decoder_blocks\.(\d+)\.layers\.0\.1\.norm\.", r"decoder_layers.\1.decompress.norm."),
        (r"decoder_blocks\.(\d+)\.layers\.0\.1\.fn\.qkv\.", r"decoder_layers.\1.decompress.subspaces."),
        (r"decoder_blocks\.(\d+)\.layers\.0\.1\.fn\.to_out\.0\.", r"decoder_layers.\1.decompress.output."),
        (r"decoder_pred\.", "decoder_head."),
    ),
    sizes=_mae_sizes,
    architecture=lambda sizes: f"crate_mae_{_size_name(sizes['embed_dim'], crate.CRATE_SIZES)}_patch16_224",
    ignored=(r"pos_embed", r"decoder_embed\.(weight|bias)"),
)


# --- ToST for vision (Wu et al. 2024, the authors' PyTorch program) ---------------------------------------


def _tost_sizes(state: State, hints: Mapping[str, Any]) -> dict[str, Any]:
    convolutions = [key for key in state if re.fullmatch(r"patch_embed\.proj\.\d+\.0\.weight", key)]
    return {
        "img_size": hints.get("img_size", 224),  # told by no key: its positions are of any size
        "patch_size": 2 ** len(convolutions),
        "in_chans": state["patch_embed.proj.0.0.weight"].shape[1],
        "num_classes": len(state["head.weight"]) if "head.weight" in state else 0,
        "embed_dim": state["cls_token"].shape[-1],
        "depth": _count(state, r"blocks\.(\d+)\."),
        "num_heads": len(state["blocks.0.attn.temp"]),
        "class_depth": _count(state, r"cls_attn_blocks\.(\d+)\."),
    }


def _tost_adapt(state: State) -> State:
    """Temperatures as a vector; query, key and value of class attention apart."""
    adapted: State = {}
    for key, value in state.items():
        joint = re.fullmatch(r"(class_attention\.\d+\.attn)\.qkv\.(weight|bias)", key)
        if joint:
            parts = zip("qkv", value.chunk(3), strict=True)
            adapted |= {f"{joint[1]}.{name}.{joint[2]}": part.clone() for name, part in parts}
        else:
            adapted[key] = value.flatten() if key.endswith(".temperature") else value
    return adapted


def _tost_architecture(sizes: Mapping[str, Any]) -> str:
    of_width = {size["embed_dim"]: name.split("_")[0] for name, size in tost.SIZES.items()}
    name = f"{of_width.get(sizes['embed_dim'], 'tiny')}_{sizes['depth']}"
    return f"tost_{name if name in tost.SIZES else 'tiny_12'}_patch16_224"


_TOST = Family(
    name="ToST",
    signature=(
        r"cls_token",
        r"patch_embed\.proj\.0\.0\.weight",
        r"blocks\.0\.attn\.temp",
        r"pos_embeder\.token_projection\.weight",
    ),
    keys=(
        (r"cls_token", "class_token"),
        (r"patch_embed\.", "embed.stem."),
        (r"pos_embeder\.", "embed.fourier."),
        (r"blocks\.(\d+)\.gamma1", r"layers.\1.compress.layer_scale"),
        (r"blocks\.(\d+)\.norm1\.", r"layers.\1.compress.norm."),
        (r"blocks\.(\d+)\.attn\.temp", r"layers.\1.compress.temperature"),
        (r"blocks\.(\d+)\.attn\.qkv\.", r"layers.\1.compress.subspaces."),
        (r"blocks\.(\d+)\.attn\.to_out\.0\.", r"layers.\1.compress.output."),
        (r"blocks\.(\d+)\.gamma2", r"layers.\1.sparsify.layer_scale"),
        (r"blocks\.(\d+)\.norm2\.", r"layers.\1.sparsify.norm."),
        (r"blocks\.(\d+)\.mlp\.", r"layers.\1.sparsify."),
        (r"cls_attn_blocks\.", "class_attention."),
    ),
    sizes=_tost_sizes,
    architecture=_tost_architecture,
    adapt=_tost_adapt,
)


# --- ViT of DINO, SimDINO (Caron et al. 2021, Wu et al. 2025) and of their second versions ----------------
#
# Beside timm's names they differ in three things, each of which is silent when it is missed:
# blocks are numbered through, but in chunks (blocks.CHUNK.I.); there are layer scales (ls1.gamma); registers
# stand behind the class token and have no position, which timm has only together with a class token that has
# none either. There the class token's own position, the first row, is added to it for good.

_BLOCK = r"blocks\.(?:\d+\.)?"


def _vit_sizes(state: State, hints: Mapping[str, Any]) -> dict[str, Any]:
    dim, in_chans, *patch = state["patch_embed.proj.weight"].shape
    block = next(key for key in state if re.fullmatch(_BLOCK + r"0\.norm1\.weight", key))
    block = block.removesuffix("norm1.weight")
    registers = state["register_tokens"].shape[1] if "register_tokens" in state else 0
    return {
        "img_size": _plain(_img_size(state["pos_embed"].shape[1] - 1, (patch[0], patch[1]), hints)),
        "patch_size": _plain((patch[0], patch[1])),
        "in_chans": in_chans,
        "num_classes": len(state["head.weight"]) if "head.weight" in state else 0,
        "embed_dim": dim,
        "depth": _count(state, _BLOCK + r"(\d+)\.norm1\."),
        "num_heads": max(1, dim // HEAD_SIZE),
        "mlp_ratio": len(state[f"{block}mlp.fc1.weight"]) / dim if f"{block}mlp.fc1.weight" in state else 4.0,
        "qkv_bias": f"{block}attn.qkv.bias" in state,
        "init_values": 1e-5 if f"{block}ls1.gamma" in state else None,  # of fresh layer scales; theirs come
        "reg_tokens": registers,
        "no_embed_class": registers > 0,
    }


def _split_positions(state: State) -> State:
    """The class token's position into the class token, where there are registers."""
    if "reg_token" not in state:
        return state
    positions = state["pos_embed"]
    return {**state, "cls_token": state["cls_token"] + positions[:, :1], "pos_embed": positions[:, 1:]}


_VIT_KEYS = (
    (_BLOCK + r"(\d+)\.", r"blocks.\1."),
    (r"register_tokens", "reg_token"),
)
_VIT_SIGNATURE = (
    r"cls_token",
    r"pos_embed",
    r"patch_embed\.proj\.weight",
    _BLOCK + r"0\.norm1\.weight",
    _BLOCK + r"0\.attn\.qkv\.weight",
)
_DINO_HEADS = (
    r"(head|dino_head|ibot_head)\.mlp\.\d+\.(weight|bias|running_mean|running_var|num_batches_tracked)",
    r"(head|dino_head|ibot_head)\.mlp\.(weight|bias)",
    r"(head|dino_head|ibot_head)\.last_layer\.(weight|weight_g|weight_v|parametrizations\.weight\.original[01])",
)


def _vit_architecture(sizes: Mapping[str, Any]) -> str:
    names = {192: "tiny", 384: "small", 1024: "large"}
    return f"vit_{names.get(sizes['embed_dim'], 'base')}_patch16_224"


_DINOV2 = Family(
    name="DINOv2 / SimDINOv2 ViT",
    signature=(*_VIT_SIGNATURE, r"mask_token"),
    keys=_VIT_KEYS,
    sizes=_vit_sizes,
    architecture=_vit_architecture,
    ignored=(r"mask_token", *_DINO_HEADS),
    adapt=_split_positions,
)
_DINO = Family(
    name="DINO / SimDINO ViT",
    signature=_VIT_SIGNATURE,
    keys=_VIT_KEYS,
    sizes=_vit_sizes,
    architecture=_vit_architecture,
    ignored=_DINO_HEADS,
    adapt=_split_positions,
)

# --- language models of CRATE (Bai and Ma 2024, crate-lm) and ToST (Wu et al. 2024) -----------------------
#
# Both are laid out as GPT-2. The words that scores are read off are stored twice, under two names.


def _tied(state: State) -> State:
    """Words once."""
    words = state.pop("lm_head.weight", None)
    if words is not None and not torch.equal(words, state.get("embed.words.weight", words)):
        raise CheckpointError(
            "lm_head.weight differs from transformer.wte.weight: here scores are read off the words "
            "themselves - take a checkpoint in which the two are tied"
        )
    return state


def _text_sizes(state: State) -> dict[str, Any]:
    vocab_size, dim = state["transformer.wte.weight"].shape
    return {
        "vocab_size": vocab_size,
        "context": len(state["transformer.wpe.weight"]),
        "embed_dim": dim,
        "depth": _count(state, r"transformer\.h\.(\d+)\."),
    }


def _text_name(kind: str, sizes: Mapping[str, Any]) -> str:
    size = _size_name(sizes["embed_dim"], language.SIZES)
    return f"{kind}_{'small' if size == 'base' else size}"


def _crate_lm_sizes(state: State, hints: Mapping[str, Any]) -> dict[str, Any]:
    sizes = _text_sizes(state)
    dim = sizes["embed_dim"]
    return {
        **sizes,
        "num_heads": _heads(dim, language.SIZES),
        "overcomplete": len(state["transformer.h.0.ista.weight"]) // dim,
        "final_norm": "transformer.ln_f.weight" in state,  # the complete one has none
    }


def _crate_lm_adapt(state: State) -> State:
    """A complete dictionary is stored with its atoms in columns, an overcomplete one in rows."""
    adapted = {}
    for key, value in _tied(state).items():
        dictionary = re.fullmatch(r"(layers\.\d+\.sparsify\.)ista", key)
        if not dictionary:
            adapted[key] = value
        elif value.shape[0] == value.shape[1]:
            adapted[f"{dictionary[1]}dictionary"] = value
        else:
            adapted[f"{dictionary[1]}coder.dictionary"] = value.mT.contiguous()
    if any(key.endswith(".sparsify.dictionary") for key in adapted):  # its norm is the step's door
        adapted = {re.sub(r"(\.sparsify)\.norm\.", r"\1.enter.", key): v for key, v in adapted.items()}
    return adapted


_GPT_KEYS = (
    (r"transformer\.wte\.", "embed.words."),
    (r"transformer\.wpe\.", "embed.places."),
    (r"transformer\.ln_f\.", "norm."),
)

_CRATE_LM = Family(
    name="CRATE for language (crate-lm)",
    signature=(
        r"transformer\.wte\.weight",
        r"transformer\.h\.0\.attn\.c_attn\.weight",
        r"transformer\.h\.0\.prenorm_1\.weight",
        r"transformer\.h\.0\.ista\.weight",
    ),
    keys=(
        *_GPT_KEYS,
        (r"transformer\.h\.(\d+)\.prenorm_1\.", r"layers.\1.compress.norm."),
        (r"transformer\.h\.(\d+)\.attn\.c_attn\.", r"layers.\1.compress.subspaces."),
        (r"transformer\.h\.(\d+)\.attn\.c_proj\.", r"layers.\1.compress.output."),
        (r"transformer\.h\.(\d+)\.prenorm_2\.", r"layers.\1.sparsify.norm."),
        (r"transformer\.h\.(\d+)\.ista\.weight$", r"layers.\1.sparsify.ista"),
    ),
    sizes=_crate_lm_sizes,
    architecture=lambda sizes: _text_name(
        "crate_gpt" if sizes["overcomplete"] == 1 else "crate_overcomplete_gpt", sizes
    ),
    ignored=(r"transformer\.h\.\d+\.attn\.bias",),  # the causal mask
    adapt=_crate_lm_adapt,
)


def _tost_lm_sizes(state: State, hints: Mapping[str, Any]) -> dict[str, Any]:
    return {
        **_text_sizes(state),
        "num_heads": len(state["transformer.h.0.attn.temp"]),
        "bias": "transformer.h.0.attn.c_attn.bias" in state,
        "offset": "transformer.h.0.attn.denom_bias" in state,
        "mlp_ratio": len(state["transformer.h.0.mlp.c_fc.weight"]) / state["transformer.wte.weight"].shape[1],
    }


def _tost_lm_adapt(state: State) -> State:
    """Temperatures and offsets without their last axis, which has one entry."""
    scalars = (".temperature", ".offset")
    return {key: value.squeeze(-1) if key.endswith(scalars) else value for key, value in _tied(state).items()}


_TOST_LM = Family(
    name="ToST for language",
    signature=(
        r"transformer\.wte\.weight",
        r"transformer\.h\.0\.attn\.c_attn\.weight",
        r"transformer\.h\.0\.attn\.temp",
        r"transformer\.h\.0\.mlp\.c_fc\.weight",
    ),
    keys=(
        *_GPT_KEYS,
        (r"transformer\.h\.(\d+)\.gamma1$", r"layers.\1.compress.layer_scale"),
        (r"transformer\.h\.(\d+)\.ln_1\.", r"layers.\1.compress.norm."),
        (r"transformer\.h\.(\d+)\.attn\.temp$", r"layers.\1.compress.temperature"),
        (r"transformer\.h\.(\d+)\.attn\.denom_bias$", r"layers.\1.compress.offset"),
        (r"transformer\.h\.(\d+)\.attn\.c_attn\.", r"layers.\1.compress.subspaces."),
        (r"transformer\.h\.(\d+)\.attn\.c_proj\.", r"layers.\1.compress.output."),
        (r"transformer\.h\.(\d+)\.gamma2$", r"layers.\1.sparsify.layer_scale"),
        (r"transformer\.h\.(\d+)\.ln_2\.", r"layers.\1.sparsify.norm."),
        (r"transformer\.h\.(\d+)\.mlp\.c_fc\.", r"layers.\1.sparsify.fc1."),
        (r"transformer\.h\.(\d+)\.mlp\.c_proj\.", r"layers.\1.sparsify.fc2."),
    ),
    sizes=_tost_lm_sizes,
    architecture=lambda sizes: _text_name("tost_gpt", sizes),
    adapt=_tost_lm_adapt,
)

FAMILIES = (_CRATE, _ALPHA, _MAE, _TOST, _CRATE_LM, _TOST_LM, _DINOV2, _DINO)
"""Layouts that load; the first whose signature fits is taken."""

REFUSED = (
    (
        "a CRATE-alpha CLIPA checkpoint",
        (r"visual\.transformer\.resblocks\.0\.attn\.in_proj_weight",),
        "its layout is known, but its outputs were never verified against the published program - "
        "take a CRATE-alpha classifier instead",
    ),
    (
        "a language model laid out as GPT-2",
        (r"(transformer\.)?h\.0\.attn\.c_attn\.weight",),
        "of this layout only CRATE's (crate-lm) and ToST's load - take one of those",
    ),
)
"""Layouts that are recognised and do not load: name, signature, reason."""
