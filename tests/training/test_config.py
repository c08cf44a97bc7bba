"""Options: checked, explained, written down and accepted back."""

from dataclasses import fields

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from pellucid.errors import ConfigError
from pellucid.training import TrainConfig, read_config, train
from pellucid.training.config import FIXED, FORK, FREE, OPTION_HELP, refuse_changes

NAMES = [field.name for field in fields(TrainConfig)]

OTHER = {
    "data": "cifar10", "out": "elsewhere", "model": "vit_digits", "model_args": {"depth": 3}, "seed": 1,
    "objective": "other", "epochs": 3, "batch_size": 64, "lr": 1e-2, "matrix_lr": 2e-2, "weight_decay": 0.1,
    "warmup": 0.2, "label_smoothing": 0.2, "incoherence": 0.1, "objective_args": {"eps": 1.0},
    "weight_decay_end": 0.4, "large_crops": 3, "small_crops": 5, "small_size": 4, "crop_split": 0.5,
    "stop_on_collapse": True, "tokenizer": "bpe", "vocab_size": 300, "cross_documents": True,
    "clip": 1.0, "average": 0.5, "augment": "photo", "flip": True,
    "precision": "bf16", "accumulate": 2, "workers": 3, "eval_every": 2, "save_every": 7,
    "init_from": "there", "new_head": True, "max_bad": 0.5, "download": True, "data_root": "root",
    "threads": 2, "engine": "plain", "accelerator": "cpu", "devices": 2, "nodes": 2,
    "strategy": "fsdp", "checkpoint_format": "sharded", "data_timeout": 5, "max_skipped": 1, "exact": 4,
    "ista_bound": "stop",
}  # fmt: skip
"""A valid value of every option that is not its default."""


def test_every_option_is_known_to_these_tests():
    assert OTHER.keys() == set(NAMES)
    defaults = TrainConfig(data="digits")
    assert all(getattr(defaults, name) != value for name, value in OTHER.items())


@pytest.mark.parametrize("name", NAMES)
def test_every_option_is_explained(name):
    assert len(OPTION_HELP[name]) >= 10
    assert OPTION_HELP[name][0].islower() or OPTION_HELP[name][0] == "`"


def test_nothing_else_is_explained():
    assert OPTION_HELP.keys() == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_misspelt_option_suggests_the_right_one(name):
    wrong = name[:-1] + "x" if len(name) > 2 else name + "x"
    with pytest.raises(ConfigError, match=f"unknown option '{wrong}' - did you mean '{name}'"):
        TrainConfig.from_mapping({"data": "digits", wrong: 1})


def test_an_option_like_no_other_lists_them_all():
    with pytest.raises(ConfigError, match=r"unknown option 'qqqq' - known: accelerator, .*workers"):
        TrainConfig.from_mapping({"data": "digits", "qqqq": 1})
    with pytest.raises(ConfigError, match="unknown option '1'"):
        TrainConfig.from_mapping({"data": "digits", 1: 1})


WRONG_TYPES = {
    name: [["a"], 3 if name.endswith("_args") else {"a": 1}]
    for name in NAMES
} | {
    "epochs": ["many", True, None, [1]],
    "batch_size": [1.5, "128", True, None],
    "flip": [1, "yes", 0.0],
    "new_head": [1, "true", None],
    "seed": [0.0, "0", False],
    "devices": [1.5, True, None],
    "model_args": ["depth=3", [3], None],
    "init_from": [3, False],
    "data": [3, ["digits"]],
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_wrong_type_is_refused_by_name(name):
    for value in WRONG_TYPES[name]:
        with pytest.raises(ConfigError, match=rf"^{name} is ") as error:
            TrainConfig.from_mapping({"data": "digits", name: value})
        assert str(value) in str(error.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[(name, 0) for name in ("epochs", "batch_size", "accumulate", "lr", "matrix_lr")],
        *[
            (name, -1)
            for name in ("epochs", "batch_size", "weight_decay", "clip", "workers", "threads", "seed")
        ],
        *[(name, -1) for name in ("eval_every", "save_every")],
        *[(name, 1) for name in ("warmup", "label_smoothing", "average", "max_bad")],
        *[(name, -0.1) for name in ("warmup", "label_smoothing", "average", "max_bad")],
        *[
            (name, value)
            for name in ("epochs", "lr", "weight_decay", "clip", "eval_every", "warmup")
            for value in (float("nan"), float("inf"), "nan", "inf")
        ],
    ],
)
def test_a_value_out_of_range_is_refused_by_name(name, value):
    with pytest.raises(ConfigError, match=rf"^{name} is {value}; it must"):
        TrainConfig(data="digits", **{name: value})


def test_a_choice_suggests():
    with pytest.raises(ConfigError, match="augment is 'smal' - did you mean 'small'"):
        TrainConfig(data="digits", augment="smal")
    with pytest.raises(ConfigError, match="precision is '64' - known: 32, bf16"):
        TrainConfig(data="digits", precision="64")


def test_no_data_says_what_to_name():
    for options in ({}, {"data": ""}, {"data": None}):
        with pytest.raises(ConfigError, match="no data given - name a folder"):
            TrainConfig.from_mapping(options)


@pytest.mark.parametrize("name", NAMES)
def test_every_option_comes_back_from_yaml(name):
    config = TrainConfig.from_mapping({"data": "digits", name: OTHER[name]})
    assert TrainConfig.from_mapping(yaml.safe_load(config.to_yaml())) == config


text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=12)
configs = st.fixed_dictionaries(
    {"data": text, "seed": st.integers(0, 2**63 - 1), "lr": st.floats(1e-30, 1e30)},
    optional={
        "out": text,
        "epochs": st.floats(1e-3, 1e6) | st.integers(1, 10**6),
        "flip": st.none() | st.booleans(),
        "init_from": st.none() | text,
        "precision": st.sampled_from(["32", "bf16", 32]),
        "devices": st.integers(1, 8) | st.sampled_from(["auto", "0,1"]),
        "model_args": st.dictionaries(
            text, st.integers() | st.booleans() | text | st.tuples(st.integers(), st.integers()) | st.none()
        ),
    },
)


@given(configs)
def test_any_config_comes_back_from_yaml(options):
    config = TrainConfig.from_mapping(options)
    again = TrainConfig.from_mapping(yaml.safe_load(config.to_yaml()))
    assert again == config
    assert again.to_yaml() == config.to_yaml()
    refuse_changes(again, config)


def test_yaml_reads_exponents_as_text_and_is_understood():
    assert TrainConfig.from_mapping(yaml.safe_load("{data: digits, lr: 1e-3}")).lr == 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_an_option_of_a_resumed_run_is_fixed_or_free(name):
    saved = TrainConfig(data="digits")
    asked = TrainConfig.from_mapping({"data": "digits", name: OTHER[name]})
    change = f"{name} {getattr(saved, name)} -> {getattr(asked, name)}"
    assert sum(name in kind for kind in (FREE, FORK, FIXED)) == 1
    if name in FREE:
        assert refuse_changes(saved, asked) == ([] if name == "out" else [f"{change} (allowed)"])
        return
    with pytest.raises(ConfigError, match="cannot resume with other options") as error:
        refuse_changes(saved, asked)
    assert f"{change} ({'in a new run only' if name in FORK else 'never'}" in str(error.value)
    assert ("--init-from" in str(error.value)) == (name in FORK)


def test_what_is_free_computes_the_same():
    """Nothing that the result depends on may be changed on resuming."""
    places = {"out", "data_root", "download", "save_every", "workers", "threads", "engine"}
    places |= {"accelerator", "devices", "nodes", "strategy", "checkpoint_format"}
    assert places | {"stop_on_collapse", "data_timeout", "max_skipped", "ista_bound"} == FREE


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a: [1", "is not YAML"),
        ("- 1\n- 2\n", "holds no options"),
        ("", "holds no options"),
        ("!!python/object/apply:os.system ['true']", "is not YAML"),
    ],
)
def test_a_config_file_that_is_none(tmp_path, content, message):
    (tmp_path / "c.yaml").write_text(content)
    with pytest.raises(ConfigError, match=message) as error:
        read_config(tmp_path / "c.yaml")
    assert "c.yaml" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_config_file_that_is_not_there_or_not_text(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot read config .*no\.yaml \(No such file"):
        read_config(tmp_path / "no.yaml")
    (tmp_path / "c.yaml").write_bytes(b"data: \xff\xfe\n")
    with pytest.raises(ConfigError, match=r"c\.yaml"):
        read_config(tmp_path / "c.yaml")


# --- with runs ----------------------------------------------------------------------------------------


def test_the_config_of_a_run_makes_the_run_again(digits, tmp_path, differences, command):
    options = {"average": 0.9, "lr": 1e-3, "accumulate": 2, "seed": 5}
    first = digits.reference(**options)
    config = read_config(first / "config.yaml")
    assert TrainConfig.from_mapping(config) == TrainConfig(**config)
    again = tmp_path / "again"
    assert command("train", "--config", first / "config.yaml", "--out", again, "--no-report") == 0
    assert differences(first, again) == []
    assert read_config(again / "config.yaml") == {**config, "out": str(again)}


def test_what_was_left_to_the_data_is_written_down(digits):
    config = read_config(digits.reference() / "config.yaml")
    assert (config["augment"], config["flip"], config["model_args"]) == ("small", False, {"depth": 2})


def test_a_resumed_run_refuses_another_option(digits, tmp_path, differences):
    run = tmp_path / "run"
    digits.stopped(run, 3)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(
        ConfigError, match=r"other options - leave them.*\n  seed 0 -> 1.*\n  lr 0\.003 -> 0\.1"
    ):
        digits.train(run, resume=True, lr=0.1, seed=1)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    digits.train(run, resume=True, save_every=4, engine="plain", threads=1)
    assert differences(run, digits.reference()) == []


def test_pictures_that_are_not_square_resume_too(digits, tmp_path):
    """Their model is chosen with a pair of sizes, which YAML gives back as a list."""
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "wide.npz", x=rng.integers(0, 256, (80, 6, 10), np.uint8), y=np.arange(80) % 2)
    options = {"out": str(tmp_path / "run"), "epochs": 2, "batch_size": 16, "progress": False}
    run = train(tmp_path / "wide.npz", **options)
    assert run.config.model_args["img_size"] == [6, 10]
    again = train(tmp_path / "wide.npz", resume=True, **options)
    assert again.accuracy == run.accuracy
    assert again.model.embed.img_size == (6, 10)
