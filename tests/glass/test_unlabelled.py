"""What is collected of real runs without labels, held against brute force and how they were trained."""

import base64
import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

from pellucid.data import draws, load_data
from pellucid.glass.bundle import collect, facts, label
from pellucid.glass.feed import eval_view
from pellucid.glass.report import render
from pellucid.glass.unlabelled import training_views
from pellucid.models import create_model
from pellucid.training import open_run, train
from pellucid.training.masked import MAE
from pellucid.training.pictures import Pictures
from pellucid.training.run import OBJECTIVES, set_up

TINY = {"embed_dim": 16, "depth": 1, "num_heads": 2}


def pixels(uri):
    kind, data = uri.split(",")
    assert kind in ("data:image/png;base64", "data:image/jpeg;base64")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))


def folder_of(folder, count, size):
    """Pictures of two kinds, in one folder."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    for i in range(count):
        picture = rng.integers(0, 60, (*size, 3), dtype=np.uint8)
        picture[size[0] // 4 : size[0] // 2, size[1] // 4 :, i % 2] = rng.integers(150, 255)
        Image.fromarray(picture).save(folder / f"{i:02d}.png")
    return folder


@pytest.fixture(scope="module")
def digits():
    return load_data("digits")


@pytest.fixture(scope="module")
def simdino(tmp_path_factory, digits):
    out = str(tmp_path_factory.mktemp("simdino") / "run")
    options = {"model": "crate_digits", "model_args": {**TINY, "global_pool": "avg"}}
    train(digits, objective="simdinov2", epochs=1, seed=3, out=out, progress=False, **options)
    return open_run(out)


@pytest.fixture(scope="module")
def collected(simdino, digits):
    return collect([simdino], digits)["models"][0]


@pytest.fixture(scope="module")
def mae(tmp_path_factory, digits):
    out = str(tmp_path_factory.mktemp("mae") / "run")
    options = {"model": "crate_mae_digits", "model_args": {**TINY, "decoder_depth": 1}}
    return train(digits, objective="mae", epochs=1, out=out, progress=False, **options)


def features_of(model, part):
    """Of every picture, one by one."""
    view = eval_view(model)
    with torch.no_grad():
        rows = [model(view.batch([part.image(i)], [i])) for i in range(len(part))]
    return torch.nn.functional.normalize(torch.cat(rows), dim=-1)


def test_json_holds_it_and_the_report_shows_it(simdino, digits):
    bundle = collect([simdino], digits, command="pellucid train digits")
    text = json.dumps(bundle, allow_nan=False)
    html = render(json.loads(text))
    assert "without labels, by SimDINOv2" in html
    verdict = bundle["models"][0]["health"]["text"]
    assert verdict[1:] in html


def test_the_accuracy_is_that_of_the_run(simdino, collected):
    scores = collected["scores"]
    assert scores["accuracy"] == pytest.approx(simdino.measures["knn accuracy"], abs=1e-6)
    low, high = scores["interval"]
    assert low < scores["accuracy"] < high
    assert (scores["by"], scores["neighbours"], scores["train"], scores["count"]) == (
        "neighbours", 20, 1347, 450,
    )  # fmt: skip


def test_what_it_learnt_from_and_how_it_fares_are_the_runs(simdino, collected):
    assert collected["learnt"]["objective"] == "simdinov2"
    assert collected["learnt"]["labels"] is False
    assert collected["learnt"]["settings"] == simdino.config.objective_args
    assert {"eps", "gamma", "group_size", "patches", "momentum"} <= collected["learnt"]["settings"].keys()
    last = [line for line in simdino.metrics if line["split"] == "test"][-1]
    assert collected["health"] == {"state": last["health"], "text": last["verdict"]}
    test = collected["curves"]["test"]
    assert test["health"][0] == "untrained"
    assert test["effective rank"][-1] == last["effective rank"]
    assert "verdict" not in test
    assert len({len(column) for column in test.values()}) == 1
    assert collected["features"]["effective_rank"] == pytest.approx(last["effective rank"], rel=1e-4)


def test_neighbours_are_the_nearest(simdino, collected, digits):
    test, others = features_of(simdino.model, digits.test), features_of(simdino.model, digits.train)
    names = [digits.train.name(i) for i in range(len(digits.train))]
    shown = collected["features"]["neighbours"]
    assert [query["label"] for query in shown] == list("012345")
    for query in shown:
        row = next(i for i in range(len(digits.test)) if digits.test.name(i) == query["name"])
        cosines = (test[row] @ others.mT).sort(descending=True).values
        assert [hit["cosine"] for hit in query["near"]] == pytest.approx(cosines[:6].tolist(), abs=1e-5)
        for hit in query["near"]:
            i = names.index(hit["name"])
            assert hit["label"] == digits.class_names[int(digits.train.labels[i])]
            assert float(test[row] @ others[i]) == pytest.approx(hit["cosine"], abs=1e-5)
            np.testing.assert_array_equal(pixels(hit["png"]), digits.train.image(i)[0].numpy())


def test_the_map_is_the_principal_plane(simdino, collected, digits):
    unit = features_of(simdino.model, digits.test).double()
    centred = unit - unit.mean(0)
    values, vectors = torch.linalg.eigh(centred.mT @ centred)
    shares = (values.flip(0)[:2] / values.sum()).tolist()
    found = collected["features"]["map"]
    assert found["shares"] == pytest.approx(shares, rel=1e-3)
    points = torch.tensor([point[:2] for point in found["points"]], dtype=torch.double)
    assert len(points) == 450
    assert [point[2] for point in found["points"]] == [str(int(k)) for k in digits.test.labels]
    plane = (centred @ vectors.flip(1)[:, :2]).abs()  # the sign of a direction is free
    torch.testing.assert_close(points.abs(), plane, atol=2e-3, rtol=0)
    places = [(tile["column"], tile["row"]) for tile in found["pictures"]]
    assert len(set(places)) == len(places) > 10
    assert all(0 <= x < found["grid"][0] and 0 <= y < found["grid"][1] for x, y in places)
    top = max(found["points"], key=lambda point: point[1])  # the highest point lies in the uppermost row
    assert any(tile["row"] == 0 and tile["label"] == top[2] for tile in found["pictures"])


def test_views_are_those_of_the_training(simdino, collected, digits):
    material = set_up(simdino.config, Pictures(digits, OBJECTIVES["simdino"])).material
    assert isinstance(material, Pictures)
    assert training_views(simdino, digits) == material.views
    for shown in collected["views"]["images"]:
        i = next(i for i in range(len(digits.train)) if digits.train.name(i) == shown["name"])
        crops = material.views.batch([digits.train.image(i)], [i])
        assert len(shown["large"]) == 2
        assert shown["small"] == []
        for k, uri in enumerate(shown["large"]):
            seen = (crops.large[0, k, 0] * digits.std[0] + digits.mean[0]) * 255
            hidden = crops.mask[0, k].view(4, 4).repeat_interleave(2, 0).repeat_interleave(2, 1)
            seen[hidden] = digits.mean[0] * 255
            np.testing.assert_allclose(pixels(uri), seen.round().clamp(0, 255).numpy(), atol=1)


def test_attention_and_audit_need_no_classifier(collected):
    assert collected["audit"]["samples"] == 256
    assert [row["step"] for row in collected["audit"]["rows"]] == ["compress", "sparsify"]
    images = collected["attention"]["images"]
    assert [image["label"] for image in images] == list("01234567")
    assert all(image["predicted"] is None and image["layers"] for image in images)


def test_hidden_patches_are_filled_in(mae, digits):
    shown = collect([mae], digits)["models"][0]
    assert shown["label"] == "CRATE-MAE"
    assert shown["views"]["kind"] == "hidden"
    assert shown["views"]["share"] == mae.config.objective_args["mask_ratio"]
    masking = MAE(mae.model, **mae.config.objective_args).masking
    for image in shown["views"]["images"]:
        i = next(i for i in range(len(digits.test)) if digits.test.name(i) == image["name"])
        mask = masking.mask(draws(0, 0, [i], masking.draws)).view(4, 4)
        hidden = mask.repeat_interleave(2, 0).repeat_interleave(2, 1).numpy()
        original, masked, filled = (pixels(image[key]) for key in ("png", "masked", "filled"))
        np.testing.assert_array_equal(original[~hidden], masked[~hidden])
        np.testing.assert_array_equal(original[~hidden], filled[~hidden])
        assert len(np.unique(masked[hidden])) == 1
        assert len(np.unique(filled[hidden])) > 1


def test_photos_without_labels(tmp_path):
    images = load_data(folder_of(tmp_path / "photos", 20, (80, 96)), labels="optional")
    sizes = {**TINY, "img_size": 64, "patch_size": 16, "global_pool": "avg"}
    options = {"model": "crate_tiny_patch16_224", "model_args": sizes, "batch_size": 9, "small_crops": 3}
    run = train(images, objective="simdino", epochs=1, out=str(tmp_path / "run"), progress=False, **options)
    bundle = collect([run], images)
    json.dumps(bundle, allow_nan=False)
    model = bundle["models"][0]
    assert model["scores"] is None
    assert model["features"]["images"] == 2
    assert [len(query["near"]) for query in model["features"]["neighbours"]] == [6, 6]
    assert {query["label"] for query in model["features"]["neighbours"]} == {None}
    assert {image["label"] for image in model["attention"]["images"]} == {None}
    views = model["views"]
    assert (views["size"], views["small_size"]) == ([64, 64], [32, 32])
    for image in views["images"]:
        assert [pixels(uri).shape for uri in image["large"]] == [(64, 64, 3)] * 2
        assert [pixels(uri).shape for uri in image["small"]] == [(32, 32, 3)] * 3
    html = render(bundle)
    assert "3 small ones of less, 32 × 32 pixels" in html
    assert "tells images apart in" in html or "learnt nothing" in html or "collaps" in html


def test_a_supervised_run_beside_one_without_labels(simdino, digits, tmp_path):
    options = {"model": "vit_digits", "model_args": TINY, "epochs": 1, "progress": False}
    supervised = train(digits, out=str(tmp_path / "run"), **options)
    for runs in ([simdino, supervised], [supervised, simdino]):
        bundle = collect(runs, digits)
        by = {model["learnt"]["objective"]: model["scores"]["by"] for model in bundle["models"]}
        assert by == {"simdinov2": "neighbours", "supervised": "classifier"}
        assert [model["features"] is None for model in bundle["models"]] == [
            run is supervised for run in runs
        ]
        render(bundle)


def test_features_that_are_one_point_have_no_map(simdino, digits):
    for parameter in simdino.model.norm.parameters():
        parameter.data.zero_()
    try:
        model = collect([simdino], digits)["models"][0]
    finally:
        simdino.model.load_state_dict(open_run(simdino.out).model.state_dict())
    assert model["features"]["map"] is None
    assert 'id="map"' not in render({"models": [model]})


@pytest.mark.parametrize(
    ("name", "called", "known"),
    [
        ("crate_alpha_digits", "CRATE", {"heads": "8, subspaces of dimension 8", "atoms": "256"}),
        ("mhsa_mlp_digits", "CRATE", {"heads": "8", "compression": "MHSA"}),
        ("mssa_mlp_digits", "CRATE", {"heads": "8, subspaces of dimension 8"}),
        ("tost_digits", "ToST", {"depth": "4", "compression": "UntiedTSSA"}),
        ("crate_mae_digits", "CRATE-MAE", {"decoder": "4 layers", "pooling": "mean of patches"}),
        ("vit_mae_digits", "ViT-MAE", {"heads": "4", "decoder": "4 layers"}),
        ("vit_digits", "ViT", {"heads": "4", "depth": "4"}),
    ],
)
def test_every_family_has_its_facts(name, called, known):
    model = create_model(name)
    assert label(model) == called
    assert known.items() <= dict(map(tuple, facts(model))).items()
