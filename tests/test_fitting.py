"""``pellucid fit``: every method from the command line to its page, and back from the files it leaves."""

import base64
import copy
import io
import json
import re

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from pellucid import analytic, fitting
from pellucid.analytic import NearestSubspace, ReduNet
from pellucid.analytic.saved import DESCRIPTION, TENSORS, load_estimator, save_estimator
from pellucid.cli import main
from pellucid.data import load_data
from pellucid.errors import CheckpointError, ConfigError, DataError
from pellucid.fitting import METHODS, fit, make_rows
from pellucid.glass.report import render_fit
from pellucid.glass.sheets import FALL, PAGE, RISE, RULE, sheet

QUICK: dict[str, list[str]] = {
    "dictionary": ["--option", "max_iter=3"],
    "complete-dictionary": ["--option", "max_iter=50"],
    "redunet": ["--option", "n_layers=3"],
    "lista": ["--option", "n_layers=2", "--option", "epochs=2"],
    "diffusion": ["--option", "train_steps=20", "--option", "width=16", "--option", "sampling_steps=3"],
}
"""What keeps a method short; a warning that it has not converged is part of its news."""


@pytest.fixture(autouse=True)
def few_patches(monkeypatch):
    monkeypatch.setattr(fitting, "PATCHES", 400)


@pytest.fixture(scope="module")
def digits():
    return load_data("digits")


def command(method, out, *more):
    return [
        "fit",
        method,
        "digits",
        "-o",
        str(out),
        "--limit",
        "150",
        *QUICK.get(method, []),
        *map(str, more),
    ]


def answers(estimator, rows):
    """Everything that a fitted estimator can be asked."""
    asked = [name for name in ("transform", "predict", "predict_proba") if hasattr(estimator, name)]
    found = {name: torch.as_tensor(getattr(estimator, name)(rows)) for name in asked}
    if hasattr(estimator, "denoise"):
        found["denoise"] = estimator.denoise(rows, 0.5)
        found["sample"] = estimator.sample(len(rows))
    assert found
    return found


@pytest.mark.parametrize("method", METHODS)
def test_a_method_is_fitted_measured_saved_and_shown(method, tmp_path, capsys, digits):
    out = tmp_path / "fit"
    assert main(command(method, out)) == 0
    said = capsys.readouterr().out
    result = json.loads((out / "result.json").read_text())
    assert result["method"] == method
    assert result["measures"]
    for name, value in result["measures"].items():
        assert np.isfinite(value), name
        assert f"{name}: {value:.4g}" in said
    page = (out / "report.html").read_text()
    assert METHODS[method].lead in re.sub("&#x27;", "'", page)
    assert not re.search(r"(?:src|href)=.https?:", page)
    assert page.count("<figure") == len(METHODS[method].figures)

    kept = load_estimator(out)
    assert type(kept).__name__ == METHODS[method].estimator
    again = fit(
        method, digits, out=tmp_path / "again", limit=150, options=dict(_pairs(QUICK.get(method, [])))
    )
    assert again["measures"] == result["measures"]
    for file in (DESCRIPTION, TENSORS):
        assert (out / file).read_bytes() == (tmp_path / "again" / file).read_bytes(), (
            "the same seed, the same bits"
        )
    rows = make_rows(
        digits, METHODS[method].kind, limit=150, side=METHODS[method].side, dims=METHODS[method].dims
    ).test
    for name, value in answers(kept, rows).items():
        assert len(value) == len(rows), name
        assert torch.equal(value, answers(load_estimator(tmp_path / "again"), rows)[name])


def _pairs(argv):
    return [(key, int(value)) for key, _, value in (pair.partition("=") for pair in argv[1::2])]


def test_every_method_is_named_in_the_help(capsys):
    assert main(["fit", "--help"]) == 0
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert all(re.search(rf"\b{method}\b", shown) for method in METHODS)


def refused(capsys, argv, *parts, code=2):
    assert main(argv) == code
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert all(part in error for part in parts), error
    assert error.count("\n") <= 5


def test_what_cannot_be_is_told_before_the_work(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(fitting, "load_data", lambda *args, **more: pytest.fail("data were read first"))
    out = tmp_path / "fit"
    refused(capsys, command("pcas", out), "unknown method 'pcas'", "did you mean 'pca'?")
    refused(
        capsys,
        command("pca", out, "--option", "n_component=3"),
        "'n_component'",
        "did you mean 'n_components'?",
    )
    refused(
        capsys,
        command("pca", out, "--option", "n_components"),
        "--option is 'n_components'",
        "n_components=20",
    )
    out.mkdir()
    (out / "thesis.tex").write_text("mine")
    refused(capsys, command("pca", out, "--overwrite"), "not a fit's folder", "left as it is")
    assert (out / "thesis.tex").read_text() == "mine"


@pytest.mark.parametrize(
    ("more", "parts"),
    [
        (["--option", "n_components=1000"], ["pca: ", "1000"]),
        (["--option", "n_components=many"], ["pca: "]),
        (["--dims", "65"], ["dims is 65", "1 to 64"]),
        (["--dims", "0"], ["dims is 0"]),
        (["--side", "0"], ["side is 0"]),
        (["--limit", "1"], ["limit 1"]),
        (["--limit", "0"], ["limit 0"]),
    ],
)
def test_what_does_not_fit_the_data_is_told(more, parts, tmp_path, capsys):
    refused(capsys, ["fit", "pca", "digits", "-o", str(tmp_path / "fit"), *more], *parts)
    assert not (tmp_path / "fit").exists()


def test_a_fit_is_replaced_only_when_asked(tmp_path, capsys):
    out = tmp_path / "fit"
    assert main(command("pca", out)) == 0
    before = (out / "result.json").read_bytes()
    refused(capsys, command("pca", out, "--option", "n_components=3"), "holds a fit already", "--overwrite")
    assert (out / "result.json").read_bytes() == before
    assert main(command("pca", out, "--option", "n_components=3", "--overwrite")) == 0
    assert json.loads((out / "result.json").read_text())["options"]["n_components"] == 3
    assert [path.name for path in tmp_path.iterdir()] == ["fit"]


def test_measures_against_scikit_learn(tmp_path, digits):
    from sklearn import decomposition
    from sklearn.metrics import accuracy_score, r2_score

    rows = make_rows(digits, "images")
    ours = fit("pca", digits, out=tmp_path / "pca", options={"n_components": 10})["measures"]
    theirs = decomposition.PCA(10).fit(rows.train.numpy().astype(float))
    back = theirs.inverse_transform(theirs.transform(rows.test.numpy().astype(float)))
    mean = rows.train.numpy().mean(0)
    missed = ((rows.test.numpy() - back) ** 2).sum() / ((rows.test.numpy() - mean) ** 2).sum()
    assert ours["explained variance"] == pytest.approx(1 - missed, abs=1e-5)
    assert ours["explained variance"] == pytest.approx(
        r2_score(rows.test.numpy(), back, multioutput="variance_weighted"), abs=0.01
    )
    assert ours["noise"] == pytest.approx(theirs.noise_variance_**0.5, rel=1e-3)

    found = fit("nearest-subspace", digits, out=tmp_path / "subspace")["measures"]["accuracy"]
    guesses = NearestSubspace().fit(rows.train, rows.labels).predict(rows.test)
    assert found == pytest.approx(accuracy_score(rows.test_labels, guesses))
    assert found > 0.95


# --- rows ---------------------------------------------------------------------------------------------------


def test_rows_of_images_are_their_pixels(digits):
    rows = make_rows(digits, "images", limit=100)
    assert rows.train.shape == (100, 64)
    assert rows.size == (1, 8, 8)
    assert 0 <= float(rows.train.min()) < float(rows.train.max()) <= 1
    first = digits.train.image(0).float().flatten() / 255
    torch.testing.assert_close(rows.train[0], first, atol=1e-6, rtol=0)
    assert int(rows.labels[0]) == int(digits.train.labels[0])
    assert torch.equal(rows.pictures(rows.train[:2])[1, 0].flatten(), rows.train[1])


def test_rows_of_patches_are_centred_scaled_and_never_flat(digits):
    rows = make_rows(digits, "patches", limit=100, patch_size=5, seed=1)
    assert rows.size == (1, 5, 5)
    assert rows.labels is None
    assert len(rows.train) == 400
    assert len(rows.test) == 100
    torch.testing.assert_close(rows.train.mean(1), torch.zeros(400), atol=1e-6, rtol=0)
    assert float(rows.train.std()) == pytest.approx(1, abs=1e-4)
    assert float(rows.train.norm(dim=1).min()) > 0.1
    assert torch.equal(rows.train, make_rows(digits, "patches", limit=100, patch_size=5, seed=1).train)
    assert not torch.equal(rows.train, make_rows(digits, "patches", limit=100, patch_size=5, seed=2).train)


def test_a_patch_lies_in_its_picture():
    """On a ramp of known slopes every patch is the same, whatever place it was cut from."""
    y, x = np.mgrid[0:16, 0:16]
    images = np.repeat((3 * x + 10 * y).astype(np.uint8)[None], 12, 0)
    data = from_images(images, np.arange(12) % 2)
    rows = make_rows(data, "patches", patch_size=4)
    torch.testing.assert_close(rows.train, rows.train[:1].expand_as(rows.train), atol=1e-5, rtol=0)
    patch = rows.pictures(rows.train[:1])[0, 0]
    across, down = (patch[0, 1] - patch[0, 0]).item(), (patch[1, 0] - patch[0, 0]).item()
    assert down / across == pytest.approx(10 / 3, rel=1e-4)


def test_coordinates_go_back_to_pictures(digits):
    pixels, rows = make_rows(digits, "images"), make_rows(digits, "images", dims=30)
    assert rows.train.shape == (1347, 30)
    back = rows.pictures(rows.test).flatten(1)
    assert float((back - pixels.test).square().mean() / pixels.test.var(0).mean()) < 0.05


def test_larger_pictures_are_made_small_and_colour_is_kept():
    images = np.random.default_rng(0).integers(0, 256, (12, 40, 20, 3), dtype=np.uint8)
    rows = make_rows(from_images(images, np.arange(12) % 2), "images", side=10)
    assert rows.size == (3, 10, 5)


def test_pictures_of_one_colour_have_no_patches():
    images = np.full((12, 8, 8), 7, dtype=np.uint8)
    with pytest.raises(DataError, match="of one colour"):
        make_rows(from_images(images, np.arange(12) % 2), "patches")


@pytest.mark.parametrize("patch", [1, 9])
def test_a_patch_that_cannot_be_cut(patch, digits):
    with pytest.raises(ConfigError, match="take 2 to 8"):
        make_rows(digits, "patches", patch_size=patch)


def from_images(images, labels):
    from pellucid.data.dataset import ArrayImages, from_arrays

    tensor = torch.from_numpy(images if images.ndim == 4 else images[..., None]).permute(0, 3, 1, 2)
    part = ArrayImages(tensor.contiguous(), torch.from_numpy(labels), "made")
    return from_arrays("made", part, part, ["a", "b"])


# --- files --------------------------------------------------------------------------------------------------


def blobs(classes=("cat", "dog", "owl")):
    random = np.random.default_rng(0)
    names = np.array(classes)[np.arange(60) % 3]
    X = random.normal(size=(60, 6)) + 3 * np.eye(6)[np.arange(60) % 3]
    return X, names


def written(estimator, folder):
    folder.mkdir(exist_ok=True)
    for name, content in save_estimator(estimator).items():
        (folder / name).write_bytes(content)
    return folder


@pytest.mark.parametrize("estimator", [NearestSubspace(2), ReduNet(2), ReduNet(2, step_size=[0.5, 0.1])])
def test_an_estimator_comes_back_whole(estimator, tmp_path):
    X, names = blobs()
    estimator.fit(X, names)
    kept = load_estimator(written(estimator, tmp_path / "a"))
    assert kept.get_params() == estimator.get_params()
    assert vars(kept).keys() == vars(estimator).keys()
    assert kept.classes_.tolist() == ["cat", "dog", "owl"]
    assert (kept.predict(X) == estimator.predict(X)).all()
    np.testing.assert_array_equal(kept.decision_function(X), estimator.decision_function(X))
    assert save_estimator(kept) == save_estimator(estimator)


def test_what_cannot_be_saved_is_named():
    X, names = blobs()
    estimator = NearestSubspace(2).fit(X, names)
    estimator.secret_ = lambda: None
    with pytest.raises(ConfigError, match=r"cannot save state\.secret_, a function"):
        save_estimator(estimator)
    estimator.secret_ = nn.Bilinear(1, 1, 1)
    with pytest.raises(ConfigError, match="a Bilinear"):
        save_estimator(estimator)


def damage(folder, **changes):
    path = folder / DESCRIPTION
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("name", ["os.system", "Estimator", "base", "covering", "Path"])
def test_a_name_in_a_file_selects_only_estimators_of_ours(name, tmp_path):
    X, names = blobs()
    folder = written(NearestSubspace(2).fit(X, names), tmp_path / "a")
    damage(folder, estimator=name)
    with pytest.raises(CheckpointError, match="nothing of ours is called"):
        load_estimator(folder)


def test_a_module_in_a_file_is_a_step_of_ours(tmp_path):
    X, names = blobs()
    folder = written(ReduNet(2).fit(X, names), tmp_path / "a")
    state = json.loads((folder / DESCRIPTION).read_text())["state"]
    state["readout_"]["module"] = "Bilinear"
    damage(folder, state=state)
    with pytest.raises(CheckpointError, match="'Bilinear'"):
        load_estimator(folder)


def test_damaged_files_are_told(tmp_path):
    X, names = blobs()
    folder = written(NearestSubspace(2).fit(X, names), tmp_path / "a")
    good = {name: (folder / name).read_bytes() for name in (DESCRIPTION, TENSORS)}
    with pytest.raises(CheckpointError, match="no fitted estimator"):
        load_estimator(tmp_path)
    for name, content in good.items():
        for bad in (b"", content[: len(content) // 2], b"\x80\x04" + content):
            (folder / name).write_bytes(bad)
            with pytest.raises(CheckpointError, match="damaged"):
                load_estimator(folder)
        (folder / name).write_bytes(content)
    for changes in ({"state": {"classes_": {"tensor": "gone"}}}, {"state": None}, {"options": {"wings": 2}}):
        damage(folder, **changes)
        with pytest.raises(CheckpointError, match="damaged"):
            load_estimator(folder)
    (folder / DESCRIPTION).write_bytes(good[DESCRIPTION])
    damage(folder, schema=99)
    with pytest.raises(CheckpointError, match="another version"):
        load_estimator(folder)


def test_every_method_is_a_public_estimator():
    for name, method in METHODS.items():
        assert method.estimator in analytic.__all__, name


# --- the page -----------------------------------------------------------------------------------------------


def pixels(uri):
    assert uri.startswith("data:image/png;base64,")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))).convert("RGB"))


def test_a_sheet_shows_signs_as_colours_and_keeps_its_order():
    atoms = torch.tensor([[2.0, 0.0], [0.0, -2.0]]).reshape(1, 1, 2, 2).repeat(3, 1, 1, 1)
    atoms[1] = -atoms[1] / 7  # each is scaled to its own largest
    seen = pixels(sheet(atoms, 2, signed=True, width=5))
    assert seen.shape == (5, 5, 3)
    assert [tuple(seen[at]) for at in ((0, 0), (0, 1), (1, 0), (1, 1))] == [RISE, PAGE, PAGE, FALL]
    assert [tuple(seen[at]) for at in ((0, 3), (1, 4))] == [FALL, RISE]
    assert tuple(seen[2, 0]) == tuple(seen[0, 2]) == RULE
    assert tuple(seen[3, 0]) == RISE
    assert (seen[3:, 2:] == PAGE).all()  # the fourth place is empty


def test_a_sheet_is_enlarged_by_whole_pixels():
    pictures = torch.rand(6, 3, 5, 4)
    seen = pixels(sheet(pictures, 3, width=330))
    zoom, gap = 27, 3
    assert seen.shape == (2 * 5 * zoom + gap, 3 * 4 * zoom + 2 * gap, 3)
    assert seen.shape[1] == 330
    middle = seen[zoom // 2, zoom // 2] / 255
    assert np.abs(middle - pictures[0, :, 0, 0].numpy()).max() < 0.1  # a palette of 256 colours
    assert pixels(sheet(torch.rand(2, 1, 50, 900), 2)).shape == (50, 1801, 3)


@pytest.fixture(scope="module")
def bundle(digits):
    """What the page of a real fit is drawn from."""
    kept = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fitting, "render_fit", lambda given: kept.update(given) or "")
        patch.setattr(fitting, "_write_folder", lambda out, files: None)
        fit("pca", digits, out="unwritten", limit=100)
    return kept


def paths(value, at=()):
    yield at
    items = (
        value.items() if isinstance(value, dict) else enumerate(value[:3]) if isinstance(value, list) else ()
    )
    for key, inner in items:
        yield from paths(inner, (*at, key))


def test_no_hole_breaks_the_page(bundle):
    whole = render_fit(bundle)
    assert "Components" in whole
    holes = [at for at in paths(bundle) if at]
    assert len(holes) > 60
    for at in holes:
        for content in (None, "<b>x</b>", [{}], -1):
            broken = copy.deepcopy(bundle)
            place = broken
            for key in at[:-1]:
                place = place[key]
            place[at[-1]] = content
            page = render_fit(broken)
            assert page.startswith("<!DOCTYPE html>")
            assert "<b>x</b>" not in page
    assert "holds no estimator" in render_fit({})


def test_a_picture_that_is_none_is_left_out(bundle):
    for png in ("javascript:alert(1)", "data:image/svg+xml;base64,PHN2Zz4=", "https://example.org/x.png"):
        broken = copy.deepcopy(bundle)
        broken["fit"]["figures"] = [{"kind": "sheet", "heading": "Atoms", "png": png}]
        page = render_fit(broken)
        assert "<img" not in page
        assert png not in page
