"""Looking at what was learnt: does each layer do its step, and how well does the whole do its task."""

from pellucid.measure.atoms import Atoms, pushed_words, read_atoms
from pellucid.measure.attention import attention_maps
from pellucid.measure.audit import Audit, audit
from pellucid.measure.cache import run_with_cache
from pellucid.measure.language import TextScores, score_text
from pellucid.measure.scores import Scores, evaluate, predict

__all__ = [
    "Atoms",
    "Audit",
    "Scores",
    "TextScores",
    "attention_maps",
    "audit",
    "evaluate",
    "predict",
    "pushed_words",
    "read_atoms",
    "run_with_cache",
    "score_text",
]
