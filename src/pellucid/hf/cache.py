"""What a causal model keeps of a text, behind transformers' interface for caches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from pellucid.hf.config import TextConfig
from pellucid.steps import Memory


class TextCache(Cache):
    """A :class:`~pellucid.steps.Memory` with transformers' words for it.

    CRATE keeps one tensor for each layer, where query, key and value are one; ordinary attention two; ToST
    three sums, as large after a thousand tokens as after one. ``generate`` makes one by itself; given to it
    by hand (``cache=TextCache(model.config)``) it can be kept, copied and gone on from.

    Args:
        config: of the model that fills it.

    Attributes:
        memory: what the steps keep; None before the first token.
    """

    def __init__(self, config: TextConfig) -> None:
        super().__init__(layers=[])
        self.depth = config.depth
        self.is_sum = config.model_type == "tost_lm"
        self.memory: Memory | None = None
        self._arrived: list[tuple[int, Tensor | None]] = []

    def memory_for(self, batch: int, device: torch.device) -> Memory:
        """What the steps keep of this many rows."""
        if self.memory is None:
            self.memory = Memory(batch, device)
        if len(self.memory.lengths) != batch:
            raise ValueError(f"the cache holds {len(self.memory.lengths)} rows, and {batch} arrive")
        return self.memory

    def arrived(self, count: int, real: Tensor | None) -> None:
        """So many places of input are in the memory; ``real`` (b, count): which held tokens, None for all."""
        self._arrived.append((count, real))

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Places of input so far, padding included."""
        return sum(count for count, _ in self._arrived)

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: it grows; the model's context ends it."""
        return -1

    get_max_cache_shape = get_max_length

    def get_mask_sizes(self, query_length: Any, layer_idx: int = 0) -> tuple[int, int]:
        """Places and the first of them."""
        arriving = query_length if isinstance(query_length, int) else query_length.shape[0]
        return self.get_seq_length() + arriving, 0

    def update(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("steps put into this cache what they keep, which is no keys and values")

    def reset(self) -> None:
        """Begin anew."""
        self.memory, self._arrived = None, []

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Go on with these rows, in this order."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Go on with these rows, in this order."""
        if self.memory is not None:
            rows = torch.as_tensor(indices, device=self.memory.lengths.device)
            rows = rows.nonzero()[:, 0] if rows.dtype == torch.bool else rows
            self.memory.take(rows)
            self._arrived = [(n, None if real is None else real[rows]) for n, real in self._arrived]

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row so many times, one beside the other."""
        if self.memory is not None:
            rows = torch.arange(len(self.memory.lengths), device=self.memory.lengths.device)
            self.batch_select_indices(rows.repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last ``-tokens_to_remove`` places, as assisted decoding does with what it rejects.

        A positive number is how many to keep, as older versions of transformers ask.

        Raises:
            ValueError: more than there are, or any of a cache of sums.
        """
        total = self.get_seq_length()
        back = -tokens_to_remove if tokens_to_remove <= 0 else max(0, total - tokens_to_remove)
        if back == 0 or self.memory is None:
            return
        if back > total:
            raise ValueError(f"crop({tokens_to_remove}) of {total} places - there are no more to take back")
        if self.is_sum:
            raise ValueError("sums of tokens take none of them back - keep a copy of the cache")
        real = torch.cat([self._real(n, real) for n, real in self._arrived], 1)
        self.memory.forget(real[:, total - back :].sum(1))
        kept = real[:, : total - back]
        self._arrived = [(total - back, None if bool(kept.all()) else kept)] if total > back else []

    def _real(self, count: int, real: Tensor | None) -> Tensor:
        assert self.memory is not None
        lengths = self.memory.lengths
        return lengths.new_ones(len(lengths), count, dtype=torch.bool) if real is None else real

    def numel(self) -> int:
        """Numbers kept, room for more included."""
        return 0 if self.memory is None else self.memory.numel()

    def __len__(self) -> int:
        return self.depth

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.get_seq_length()} places, {self.numel()} numbers)"

    @property
    def batch_size(self) -> int:
        return -1 if self.memory is None else len(self.memory.lengths)

    max_batch_size = batch_size

    @property
    def is_initialized(self) -> bool:
        return self.memory is not None

    @property
    def is_compileable(self) -> bool:
        return False

    @property
    def is_croppable(self) -> bool:
        return not self.is_sum

    @property
    def is_sliding(self) -> list[bool]:
        return [False] * self.depth

    is_linear = is_dummy = is_sliding
