"""Language models as transformers knows them: configs, models for its Auto classes, folders that it loads.

Importing this imports transformers, and makes ``AutoModelForCausalLM`` and its like know the two kinds.
"""

try:
    import transformers
except ImportError as error:
    raise ImportError("pellucid.hf needs transformers - pip install 'pellucid[lm]'") from error

from pellucid.hf.cache import TextCache
from pellucid.hf.config import CrateConfig, TextConfig, TostConfig
from pellucid.hf.convert import to_pellucid, to_transformers
from pellucid.hf.flat import carry_code
from pellucid.hf.folder import is_folder, save_folder
from pellucid.hf.modeling import (
    CrateForCausalLM,
    CrateForMaskedLM,
    CrateForSequenceClassification,
    CrateModel,
    TostForCausalLM,
    TostForSequenceClassification,
    TostModel,
)

__all__ = [
    "CrateConfig",
    "CrateForCausalLM",
    "CrateForMaskedLM",
    "CrateForSequenceClassification",
    "CrateModel",
    "TextCache",
    "TostConfig",
    "TostForCausalLM",
    "TostForSequenceClassification",
    "TostModel",
    "is_folder",
    "save_folder",
    "to_pellucid",
    "to_transformers",
]

TextConfig.carry = carry_code

transformers.AutoConfig.register("crate_lm", CrateConfig, exist_ok=True)
transformers.AutoModel.register(CrateConfig, CrateModel, exist_ok=True)
transformers.AutoModelForCausalLM.register(CrateConfig, CrateForCausalLM, exist_ok=True)
transformers.AutoModelForMaskedLM.register(CrateConfig, CrateForMaskedLM, exist_ok=True)
transformers.AutoModelForSequenceClassification.register(
    CrateConfig, CrateForSequenceClassification, exist_ok=True
)
transformers.AutoConfig.register("tost_lm", TostConfig, exist_ok=True)
transformers.AutoModel.register(TostConfig, TostModel, exist_ok=True)
transformers.AutoModelForCausalLM.register(TostConfig, TostForCausalLM, exist_ok=True)
transformers.AutoModelForSequenceClassification.register(
    TostConfig, TostForSequenceClassification, exist_ok=True
)
