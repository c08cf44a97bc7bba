"""A folder for transformers: it carries this library's own code, and is read where the library is not."""

import ast
import json
import os
import subprocess
import sys

import pytest
import torch

import pellucid
from pellucid.cli import main
from pellucid.data import ByteTokenizer
from pellucid.data.tokenizers import train_bpe
from pellucid.errors import CheckpointError
from pellucid.hf import TextCache, flat, folder, is_folder, save_folder, to_transformers
from pellucid.models import create_model
from pellucid.models.saved import describe_text_model

SMALL = {"embed_dim": 24, "depth": 2, "num_heads": 3, "context": 32}


def small(kind, **options):
    torch.manual_seed(1)
    model = create_model(f"{kind}_bytes", **{**SMALL, **options}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    return model


def model_folder(path, model, tokenizer=None):
    """As a run leaves its model."""
    from safetensors.torch import save_file

    path.mkdir(parents=True)
    weights = {name: value.contiguous().clone() for name, value in model.state_dict().items()}
    save_file(weights, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(describe_text_model(model, weights)))
    if tokenizer is not None:
        (path / "tokenizer.json").write_text(tokenizer.to_json())
    return path


# --- the code -----------------------------------------------------------------------------------------------


def test_it_is_this_librarys_code_but_for_its_imports():
    files = flat.flattened()
    assert {"pellucid_hf_modeling.py", "pellucid_steps_mssa.py", "pellucid_errors.py"} <= files.keys()
    package = os.path.dirname(pellucid.__file__)
    for name, text in files.items():
        module = text.splitlines()[0].split(", ")[1].split(":")[0]
        assert name == module.replace(".", "_") + ".py"
        with open(os.path.join(package, *module.split(".")[1:]) + ".py", encoding="utf-8") as source:
            theirs = ast.parse(source.read())
        ours = ast.parse(text)
        kept = [
            [
                ast.dump(node)
                for node in tree.body
                if not isinstance(node, ast.ImportFrom | ast.Import | ast.Try)
            ]
            for tree in (ours, theirs)
        ]
        assert kept[0] == kept[1], name
        assert len(kept[0]) >= 2, name


def test_it_asks_for_torch_and_transformers_alone():
    """Outside of ``try``, as transformers itself looks for what is missing."""
    allowed = {"torch", "transformers", *sys.stdlib_module_names}
    files = flat.flattened()
    for name, text in files.items():
        tree = ast.parse(text)
        tried = {
            id(node) for block in ast.walk(tree) if isinstance(block, ast.Try) for node in ast.walk(block)
        }
        for node in ast.walk(tree):
            if id(node) in tried:
                continue
            if isinstance(node, ast.Import):
                assert {alias.name.split(".")[0] for alias in node.names} <= allowed, name
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                assert node.module.split(".")[0] in allowed, name
            elif isinstance(node, ast.ImportFrom):
                assert f"{node.module}.py" in files, name


@pytest.mark.parametrize(("code", "message"), [
    ("import pellucid.errors\n", "import names from a module"),
    ("from .errors import ConfigError\n", "import names from a module"),
    ("from pellucid.models import language\n", "pellucid.models does not import it from a module"),
    ("def f():\n    from pellucid import __version__\n", "pellucid does not import it from a module"),
])  # fmt: skip
def test_an_import_that_cannot_be_carried_is_told(code, message, monkeypatch):
    source = flat._source

    def changed(module):
        text = source(module)
        return text + code if module == "pellucid.steps.memory" else text

    monkeypatch.setattr(flat, "_source", changed)
    with pytest.raises(ValueError, match=message):
        flat.flattened.__wrapped__()
    monkeypatch.setattr(
        flat, "_source", lambda module: source(module).replace("from __future__", "from future")
    )
    with pytest.raises(ValueError, match="needs 'from __future__ import annotations' to be carried"):
        flat.flattened.__wrapped__()


# --- where the library is not -------------------------------------------------------------------------------

ALONE = """
import json, sys
for name in ("pellucid", "jaxtyping", "timm", "lightning"):
    sys.modules[name] = None
try:
    import pellucid
except ImportError:
    pass
else:
    raise AssertionError("pellucid is there")
import torch, transformers
from safetensors.torch import load_file, save_file
torch.set_num_threads(1)
root = sys.argv[1]
given = load_file(root + "/given.safetensors")
found = {}
with torch.no_grad():
    for kind, auto in json.loads(sys.argv[2]).items():
        load = getattr(transformers, auto).from_pretrained
        model = load(f"{root}/{kind}", trust_remote_code=True)
        assert type(model).__module__.startswith("transformers_modules."), type(model).__module__
        found[f"{kind}/scores"] = model(given["ids"]).logits
        found[f"{kind}/padded"] = model(given["ids"], attention_mask=given["mask"]).logits
        if model.can_generate():
            options = {"attention_mask": given["mask"], "max_new_tokens": 8}
            found[f"{kind}/greedy"] = model.generate(given["ids"], do_sample=False, **options)
            found[f"{kind}/beams"] = model.generate(given["ids"], num_beams=3, **options)
        model.save_pretrained(f"{root}/{kind}-again")
        again = load(f"{root}/{kind}-again", trust_remote_code=True)
        assert torch.equal(again(given["ids"]).logits, found[f"{kind}/scores"])
write = transformers.pipeline("text-generation", f"{root}/crate_gpt", trust_remote_code=True)
(wrote,) = write("In the beginning", max_new_tokens=12, do_sample=False)
prompts = write.tokenizer(["In the beginning", "And"], return_tensors="pt", padding=True)
text = wrote["generated_text"].encode()
found["text"] = torch.tensor(list(text))
found["prompts"], found["real"] = prompts["input_ids"], prompts["attention_mask"]
save_file({name: value.contiguous() for name, value in found.items()}, root + "/found.safetensors")
"""


@torch.no_grad()
def test_it_is_read_where_the_library_is_not(tmp_path):
    from safetensors.torch import load_file, save_file

    models = {
        "crate_gpt": (small("crate_gpt"), "AutoModelForCausalLM"),
        "tost_gpt": (small("tost_gpt", offset=True), "AutoModelForCausalLM"),
        "crate_bert": (small("crate_bert"), "AutoModelForMaskedLM"),
        "crate_alpha_gpt": (small("crate_alpha_gpt", num_labels=3), "AutoModelForSequenceClassification"),
    }
    for kind, (model, _) in models.items():
        save_folder(model, tmp_path / kind, ByteTokenizer())
    ids = torch.randint(0, 256, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    save_file({"ids": ids, "mask": mask}, tmp_path / "given.safetensors")
    kinds = json.dumps({kind: auto for kind, (_, auto) in models.items()})
    outside = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    outside |= {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    outside.pop("HF_MODULES_CACHE", None)
    command = [sys.executable, "-c", ALONE, str(tmp_path), kinds]
    done = subprocess.run(command, cwd=tmp_path, env=outside, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = load_file(tmp_path / "found.safetensors")
    for kind, (model, _) in models.items():
        made = to_transformers(model)
        made.config.pad_token_id = made.config.eos_token_id = 256
        if made.can_generate():
            made.generation_config.pad_token_id = made.generation_config.eos_token_id = 256
        assert torch.equal(found[f"{kind}/scores"], model(ids))
        assert torch.equal(found[f"{kind}/padded"], made(ids, attention_mask=mask).logits)
        if made.can_generate():
            options = {"attention_mask": mask, "max_new_tokens": 8}
            assert torch.equal(found[f"{kind}/greedy"], made.generate(ids, do_sample=False, **options))
            assert torch.equal(found[f"{kind}/beams"], made.generate(ids, num_beams=3, **options))
        first, again = (
            {path.name: path.read_bytes() for path in (tmp_path / name).glob("*.py")}
            for name in (kind, f"{kind}-again")
        )
        assert first == again  # what was carried is carried on, byte for byte
        assert len(first) > 10
    prompt = torch.tensor([256, *b"In the beginning"])
    (row,) = pellucid.generate(models["crate_gpt"][0], [prompt], 12, temperature=0, stop=256)
    words = [word for word in row.tolist() if word != 256]
    assert bytes(found["text"].tolist()).decode() == bytes(words).decode("utf-8", "replace")
    assert found["prompts"].tolist() == [[256, *b"In the beginning"], [256] * 13 + [256, *b"And"]]
    assert found["real"].tolist() == [[1] * 17, [0] * 13 + [1] * 4]


# --- what is written ----------------------------------------------------------------------------------------


def test_a_folder_and_its_tokenizer(tmp_path):
    tokenizer = train_bpe([b"In the beginning God created the heaven and the earth. " * 20], 280)
    model = small("crate_bert", vocab_size=tokenizer.vocab_size)
    files = save_folder(model, tmp_path / "bert", tokenizer)
    assert {"config.json", "model.safetensors", "tokenizer.json", "pellucid_hf_modeling.py"} <= set(files)
    assert sorted(os.listdir(tmp_path / "bert")) == files
    from transformers import AutoTokenizer

    words = AutoTokenizer.from_pretrained(tmp_path / "bert")
    text = "In the beginning, 1 < 2."
    encoded = words(text)
    assert encoded.keys() == {"input_ids", "attention_mask"}
    assert encoded["input_ids"] == [tokenizer.end, *tokenizer.encode(text.encode()).tolist(), tokenizer.end]
    assert (words.mask_token_id, words.eos_token_id) == (tokenizer.mask, tokenizer.end)
    assert words.padding_side == "right"
    assert words.model_max_length == 32
    assert words.decode(encoded["input_ids"], skip_special_tokens=True) == text
    config = json.loads((tmp_path / "bert" / "config.json").read_text())
    assert config["auto_map"] == {
        "AutoConfig": "pellucid_hf_config.CrateConfig",
        "AutoModel": "pellucid_hf_modeling.CrateModel",
        "AutoModelForMaskedLM": "pellucid_hf_modeling.CrateForMaskedLM",
        "AutoModelForSequenceClassification": "pellucid_hf_modeling.CrateForSequenceClassification",
    }
    assert config["pad_token_id"] == tokenizer.end
    assert not any(path.is_dir() for path in (tmp_path / "bert").iterdir())


def test_a_folder_that_gives_other_scores_or_words_is_told(tmp_path, monkeypatch):
    model = small("tost_gpt")

    class Other(ByteTokenizer):
        def encode(self, data):
            return super().encode(data)[::-1]

    with pytest.raises(CheckpointError, match="gives other words than the model's own tokenizer"):
        save_folder(model, tmp_path / "words", Other())
    text = dict(flat.flattened())
    text["pellucid_steps_blackbox.py"] = text["pellucid_steps_blackbox.py"].replace("F.gelu(", "F.relu(")
    monkeypatch.setattr(flat, "flattened", lambda: text)
    with pytest.raises(CheckpointError, match=r"what it carries gives other scores than the model, by up to"):
        save_folder(model, tmp_path / "scores")


def test_it_knows_its_own_folders(tmp_path):
    save_folder(small("crate_gpt"), tmp_path / "ours")
    assert is_folder(tmp_path / "ours")
    (tmp_path / "ours" / "README.md").write_text("mine")
    assert not is_folder(tmp_path / "ours")
    assert not is_folder(tmp_path)
    assert not is_folder(model_folder(tmp_path / "model", small("crate_gpt")))


def test_nothing_of_a_check_is_left_behind(tmp_path):
    before = set(sys.modules)
    save_folder(small("crate_gpt"), tmp_path / "ours")
    assert not [name for name in set(sys.modules) - before if name.startswith("carried_")]
    assert folder.logging.is_progress_bar_enabled()
    assert TextCache.__module__ == "pellucid.hf.cache"


# --- the command --------------------------------------------------------------------------------------------


def said(capsys, *argv, code=0):
    capsys.readouterr()
    assert main(["export", *map(str, argv)]) == code
    out, err = capsys.readouterr()
    if code:
        assert out == ""
        assert err.startswith("error: ")
        assert len(err.splitlines()) == 1
    return err if code else out


def test_the_command_writes_a_run_for_transformers(tmp_path, capsys):
    from transformers import AutoModelForCausalLM

    model = small("tost_gpt")
    run = model_folder(tmp_path / "run" / "model", model, ByteTokenizer()).parent
    out = tmp_path / "out"
    lines = said(capsys, run, "--format", "transformers", "-o", out).splitlines()
    assert lines[0].startswith(f"{out}: TostForCausalLM, 0.")
    assert lines[0].endswith("files, with its tokenizer")
    assert lines[1] == "checked with the code that lies there: the same scores to the last bit"
    assert "transformers.AutoModelForCausalLM.from_pretrained(" in lines[2]
    assert len(lines) == 3
    ids = torch.arange(9)[None]
    with torch.no_grad():
        assert torch.equal(AutoModelForCausalLM.from_pretrained(out)(ids).logits, model(ids))
    assert "give --overwrite" in said(capsys, run, "--format", "transformers", "-o", out, code=2)
    said(capsys, run, "--format", "transformers", "-o", out, "--overwrite")
    (out / "notes.txt").write_text("mine")
    argv = [run, "--format", "transformers", "-o", out, "--overwrite"]
    assert "holds more or other things" in said(capsys, *argv, code=2)
    assert (out / "notes.txt").read_text() == "mine"
    bare = model_folder(tmp_path / "bare", small("crate_bert"))
    assert "it has no tokenizer" in said(capsys, bare, "--format", "transformers", "-o", tmp_path / "bert")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bare", "bert", "out", "run"]


@pytest.mark.parametrize(("argv", "message"), [
    (["crate_gpt_bytes", "-o", "x.onnx"], "reads text - give --format transformers"),
    (["crate_digits", "-o", "x", "--format", "transformers"], "crate_digits sees images"),
    (["crate_gpt_bytes", "-o", "x", "--format", "transformers", "--output", "logits"], "goes with images"),
    (["crate_digits", "-o", "x.pt2", "--format", "onnx"], "writes a file that ends in .onnx"),
])  # fmt: skip
def test_wrong_words(argv, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert message in said(capsys, *argv, code=2)
    assert list(tmp_path.iterdir()) == []


def test_without_transformers_the_command_says_what_is_missing(tmp_path, capsys, monkeypatch):
    for name in [name for name in sys.modules if name.startswith("pellucid.hf")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "transformers", None)
    argv = ["crate_gpt_bytes", "-o", tmp_path / "x", "--format", "transformers"]
    error = said(capsys, *argv, code=2)
    assert error == "error: pellucid.hf needs transformers - pip install 'pellucid[lm]'\n"
