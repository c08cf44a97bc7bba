"""transformers' own common tests on our language models, where the source of that version is at hand.

They are not part of the installed package. ``TRANSFORMERS_TESTS`` names the folder ``tests`` of the source
archive of the installed version; docs/transformers.md says how to get it, and what each test found.
"""

import importlib
import os
import sys
import unittest
from pathlib import Path
from types import ModuleType

import pytest
import torch
import transformers

SOURCE = Path(os.environ.get("TRANSFORMERS_TESTS", ""))
FOUND = bool(os.environ.get("TRANSFORMERS_TESTS")) and (SOURCE / "test_modeling_common.py").is_file()

pytestmark = pytest.mark.slow

MISSING = {
    "exporters.test_export": "ExportTesterMixin",
    "generation.test_utils": "GenerationTesterMixin",
    "utils.test_configuration_utils": "config_common_kwargs",
}
"""Not in the archive; what is imported from them."""

SMALL = {"vocab_size": 97, "context": 64, "embed_dim": 32, "depth": 2, "num_heads": 4}

NAMES = {
    "MODEL_MAPPING_NAMES": {"crate_lm": "CrateModel", "tost_lm": "TostModel"},
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES": {"crate_lm": "CrateForCausalLM", "tost_lm": "TostForCausalLM"},
    "MODEL_FOR_MASKED_LM_MAPPING_NAMES": {"crate_lm": "CrateForMaskedLM"},
    "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES": {
        "crate_lm": "CrateForSequenceClassification",
        "tost_lm": "TostForSequenceClassification",
    },
}
"""By these tables the common tests know what a class is for."""

OWN_LAYERS = (
    "layers are this library's and no GradientCheckpointingLayer; recomputation is held to its gradients"
)
EXCLUDED = {
    "test_can_init_all_missing_weights": "seeds each call of an init function, as weights begun twice meet; "
    "from one seed they are the same: test_what_no_file_gives_begins_as_a_fresh_model",
    "test_generation_tester_mixin_inheritance": "GenerationTesterMixin is not in the archive",
    "test_gradient_checkpointing_enable_disable": OWN_LAYERS,
    "test_training_gradient_checkpointing": OWN_LAYERS,
    "test_training_gradient_checkpointing_use_reentrant_false": OWN_LAYERS,
    "test_training_gradient_checkpointing_use_reentrant_true": OWN_LAYERS,
}
"""Test -> why it cannot be run here, or does not hold."""


def common(module: str) -> ModuleType:
    """A module of the archive's tests, beside empty ones in place of those that it lacks."""
    package = "transformers_common"
    if package not in sys.modules:
        root = sys.modules[package] = ModuleType(package)
        root.__path__ = [str(SOURCE)]
        for name, wanted in MISSING.items():
            if not (SOURCE / f"{name.replace('.', '/')}.py").is_file():
                folder = f"{package}.{name.split('.')[0]}"
                sys.modules.setdefault(folder, ModuleType(folder)).__path__ = []
                empty = sys.modules[f"{package}.{name}"] = ModuleType(f"{package}.{name}")
                setattr(empty, wanted, {} if wanted.islower() else type(wanted, (), {}))
    with pytest.MonkeyPatch.context() as patch:  # it looks for transformers beside the tests
        patch.setattr(transformers.utils, "direct_transformers_import", lambda path: transformers)
        return importlib.import_module(f"{package}.{module}")


class Inputs:
    """What the common tests ask of a model: small sizes, a batch."""

    batch_size, seq_length, is_training = 3, 9, True

    def __init__(self, parent, config_class, **options):
        self.parent, self.config_class, self.options = parent, config_class, options
        self.hidden_size, self.num_hidden_layers = SMALL["embed_dim"], SMALL["depth"]
        self.num_attention_heads, self.vocab_size = SMALL["num_heads"], SMALL["vocab_size"]

    def get_config(self):
        return self.config_class(**SMALL, **self.options, pad_token_id=0, bos_token_id=0, eos_token_id=0)

    def prepare_config_and_inputs_for_common(self):
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(1, SMALL["vocab_size"], (self.batch_size, self.seq_length), generator=generator)
        mask = torch.ones_like(ids)
        mask[1, 6:] = 0
        return self.get_config(), {"input_ids": ids, "attention_mask": mask}


if FOUND:
    pytest.importorskip("parameterized")
    from pellucid import hf

    modeling = common("test_modeling_common")
    for table, known in NAMES.items():
        setattr(modeling, table, {**getattr(modeling, table), **known})
    ModelTests = modeling.ModelTesterMixin
    ConfigTests = common("test_configuration_common").ConfigTester

    class Common(ModelTests):
        config_class = hf.CrateConfig
        options: dict = {}  # noqa: RUF012
        has_attentions = False  # weights that are given back: they are never formed

        def setUp(self):
            self.model_tester = Inputs(self, self.config_class, **self.options)
            self.config_tester = ConfigTests(self, config_class=self.config_class, has_text_modality=True)
            name = self._testMethodName
            if reason := EXCLUDED.get(name):
                self.skipTest(reason)

        def _prepare_config_and_inputs_for_retain_grad_hidden_states_attentions(self):
            config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
            return config, {"input_ids": inputs["input_ids"]}  # of padded rows hidden states are copies

        def test_config(self):
            self.config_tester.run_common_tests()

    class TestCausalCrate(Common, unittest.TestCase):
        all_model_classes = (hf.CrateModel, hf.CrateForCausalLM, hf.CrateForSequenceClassification)

    class TestMaskedCrate(Common, unittest.TestCase):
        options = {"causal": False}  # noqa: RUF012
        all_model_classes = (hf.CrateModel, hf.CrateForMaskedLM, hf.CrateForSequenceClassification)

    class TestTost(Common, unittest.TestCase):
        config_class = hf.TostConfig
        options = {"layer_scale": 1.0}  # noqa: RUF012
        all_model_classes = (hf.TostModel, hf.TostForCausalLM, hf.TostForSequenceClassification)

else:

    def test_common_tests_of_transformers():
        pytest.skip("TRANSFORMERS_TESTS names no folder of transformers' tests")
