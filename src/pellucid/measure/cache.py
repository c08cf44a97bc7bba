"""What every layer did in one pass, by the names that TransformerLens gives to it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from pellucid.errors import ConfigError, suggest
from pellucid.measure.watch import Sighting, Text, arguments, has_steps, watch
from pellucid.models.language import LanguageModel
from pellucid.models.modes import in_eval_mode
from pellucid.steps import ISTA, MHSA, MLP, OvercompleteISTA, Step, StepRecord, SubspaceStep
from pellucid.steps.mssa import AttentionStep

NamesFilter = str | Collection[str] | Callable[[str], bool] | None


@torch.no_grad()
def run_with_cache(
    model: Any, inputs: Tensor | Text, names_filter: NamesFilter = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """The model's output and, by TransformerLens's names, the activations on the way there.

    Layers count **from 0** here, as TransformerLens counts; everywhere else in pellucid they count from 1.

    ================================  ===================  =====================================
    key                               shape                in a white box
    ================================  ===================  =====================================
    ``blocks.{l}.hook_resid_pre``     ``(b, n, d)``        tokens in front of the layer
    ``blocks.{l}.attn.hook_q``        ``(b, n, K, p)``     projections: query, key, value
    ``blocks.{l}.attn.hook_pattern``  ``(b, K, n, n)``     attention weights, ``[query, key]``
    ``blocks.{l}.hook_resid_mid``     ``(b, n, d)``        tokens after ``compress``
    ``blocks.{l}.mlp.hook_post``      ``(b, n, m)``        the sparse code
    ``blocks.{l}.hook_resid_post``    ``(b, n, d)``        tokens after the layer
    ================================  ===================  =====================================

    Black boxes have ``attn.hook_k`` and ``attn.hook_v`` as well, and ``mlp.hook_post`` is what their
    non-linearity gives. In CRATE the code takes the token's place, so ``mlp.hook_post`` and
    ``hook_resid_post`` are one tensor. What a layer does not have is not in the cache: TSSA and exact
    compression form no weights, and an attention or MLP of another kind than timm's plain one is not guessed.
    No weight goes to padding; what stands in the places of padding itself means nothing.

    Args:
        model: CRATE or any model made of steps, or a timm ViT. Runs in eval mode and without gradients.
        inputs: images as the model takes them, on its device; for a language model a batch of text, or
            words by their numbers ``(b, n)``.
        names_filter: None for all, a name, several, or a function of a name that says whether to keep it.
            Nothing else is computed: the n x n attention weights are formed only where they are kept.

    Raises:
        ConfigError: a name that the model does not have, with the nearest; a model not to be looked into.
    """
    if isinstance(names_filter, str):
        names_filter = {names_filter}
    keep = names_filter if callable(names_filter) else _keep(names_filter)
    cache: dict[str, Tensor] = {}
    offered: set[str] = set()

    def offer(layer: int, name: str, make: Callable[[], Tensor]) -> None:
        key = f"blocks.{layer - 1}.{name}"
        offered.add(key)
        if keep(key):
            cache.pop(key, None)  # a layer's last step has the last word, and comes last
            cache[key] = make()

    watch_names = _watch_steps if has_steps(model) else _watch_blocks
    with in_eval_mode(model):
        tokens = watch_names(model, inputs, offer)
        if isinstance(model, LanguageModel) and model.classifier is not None:
            output = model.classify(tokens, *arguments(inputs)[1:])
        else:
            output = model.forward_head(tokens)
    missing = set() if callable(names_filter) or names_filter is None else {*names_filter} - offered
    if missing:
        name = min(missing)
        first = [known for known in offered if known.startswith("blocks.0.")]
        raise ConfigError(f"no activation is called '{name}'{suggest(name, offered, sorted(first))}")
    return output, cache


Offer = Callable[[int, str, Callable[[], Tensor]], None]
Parts = Iterator[tuple[str, Callable[[], Any]]]


def _keep(names: Collection[str] | None) -> Callable[[str], bool]:
    return lambda name: names is None or name in names


def _watch_steps(model: Any, inputs: Tensor | Text, offer: Offer) -> Tensor:
    """Ours: a step says what it is made of, and its ``enter`` has seen the tokens in front of it."""
    entered: dict[nn.Module, Tensor] = {}
    seen = 0

    def see(sighting: Sighting) -> None:
        nonlocal seen
        record = sighting.record
        assert record is not None
        before = entered[record.step.enter]
        entered.clear()
        offer(record.layer, "hook_resid_mid" if record.layer == seen else "hook_resid_pre", lambda: before)
        for name, make in _parts(record):
            offer(record.layer, name, make)
        offer(record.layer, "hook_resid_post", lambda: record.z_next)
        seen = record.layer

    with ExitStack() as hooks:
        for step in (module for module in model.modules() if isinstance(module, Step)):
            hook = step.enter.register_forward_pre_hook(lambda door, args: entered.update({door: args[0]}))
            hooks.callback(hook.remove)
        return watch(model, inputs, see)


def _watch_blocks(model: Any, inputs: Tensor | Text, offer: Offer) -> Tensor:
    """A timm ViT: hooks before each block, its attention and its MLP; ``watch`` sees what comes after."""

    def see(sighting: Sighting) -> None:
        name = "hook_resid_mid" if sighting.name == "attention" else "hook_resid_post"
        offer(sighting.layer, name, lambda: sighting.tokens)

    def before(layer: int) -> Callable[[nn.Module, Any], None]:
        return lambda module, args: offer(layer, "hook_resid_pre", lambda: args[0])

    def inside(layer: int) -> Callable[[nn.Module, Any], None]:
        def offer_parts(module: nn.Module, args: Any) -> None:
            for name, make in _block_parts(module, args[0]):
                offer(layer, name, make)

        return offer_parts

    with ExitStack() as hooks:
        for layer, block in enumerate(getattr(model, "blocks", []), start=1):
            hooks.callback(block.register_forward_pre_hook(before(layer)).remove)
            for part in (getattr(block, "attn", None), getattr(block, "mlp", None)):
                if part is not None:
                    hooks.callback(part.register_forward_pre_hook(inside(layer)).remove)
        return watch(model, inputs, see)


def code(record: StepRecord) -> Float[Tensor, "b n m"] | None:
    """How strongly each atom of a dictionary, or each hidden unit of an MLP, responds to each token.

    None for a step that has neither.
    """
    step, z = record.step, record.z
    if isinstance(step, ISTA):
        return record.z_next
    if isinstance(step, OvercompleteISTA):
        return step.code(z)
    return F.gelu(step.fc1(step.norm(z))) if isinstance(step, MLP) else None


def pattern(record: StepRecord) -> Float[Tensor, "b K n n"] | None:
    """The attention weights of a step, ``[query, key]``, none of them on padding; None without attention."""
    step = record.step
    if not isinstance(step, AttentionStep | MHSA):
        return None
    weights = step.attention(record.z)
    if record.real is None or step.sees != "all":  # causal: padding comes last and is not seen
        return weights
    weights = weights * record.real[:, None, None, :]
    return weights / weights.sum(-1, keepdim=True)


def _parts(record: StepRecord) -> Parts:
    """What a step is made of, each to be computed when it is asked for."""
    step, z = record.step, record.z
    if isinstance(step, SubspaceStep):
        yield "attn.hook_q", lambda: _rows(step.project(z))
    if isinstance(step, MHSA):
        for i, name in enumerate("qkv"):
            yield f"attn.hook_{name}", lambda i=i: _rows(step.heads(step.norm(z))[i])  # type: ignore[misc]
    if isinstance(step, AttentionStep | MHSA):
        yield "attn.hook_pattern", lambda: pattern(record)
    if isinstance(step, ISTA | OvercompleteISTA | MLP):
        yield "mlp.hook_post", lambda: code(record)


def _block_parts(module: Any, tokens: Float[Tensor, "b n d"]) -> Parts:
    """Of timm's plain attention and MLP, which hand nothing out: computed again from what they are given."""
    from timm.layers import Attention, Mlp

    if type(module) is Attention:
        for i, name in enumerate("qkv"):
            yield f"attn.hook_{name}", lambda i=i: _rows(_heads(module, tokens)[i])  # type: ignore[misc]
        yield "attn.hook_pattern", lambda: _pattern(module, tokens)
    if type(module) is Mlp:
        yield "mlp.hook_post", lambda: module.act(module.fc1(tokens))


def _heads(attention: Any, tokens: Float[Tensor, "b n d"]) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value, each ``(b, K, n, p)``."""
    qkv = attention.qkv(tokens).unflatten(-1, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
    return attention.q_norm(qkv[0]), attention.k_norm(qkv[1]), qkv[2]


def _pattern(attention: Any, tokens: Float[Tensor, "b n d"]) -> Float[Tensor, "b K n n"]:
    query, key, _ = _heads(attention, tokens)
    return (query @ key.mT * attention.scale).softmax(-1)


def _rows(heads: Float[Tensor, "b K n p"]) -> Float[Tensor, "b n K p"]:
    """Tokens before heads, as TransformerLens has them."""
    return heads.transpose(-3, -2)
