"""Looking at what was learnt: does each layer do its step, and how well does the whole do its task."""

from pellucid.measure.attention import attention_maps
from pellucid.measure.audit import Audit, audit
from pellucid.measure.cache import run_with_cache
from pellucid.measure.scores import Scores, evaluate, predict

__all__ = ["Audit", "Scores", "attention_maps", "audit", "evaluate", "predict", "run_with_cache"]
