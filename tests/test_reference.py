"""Images that a network is meant for: how far others are from them, and which are alike."""

from __future__ import annotations

import csv
import dataclasses
import json

import numpy as np
import pytest
from conftest import an_explanation
from PIL import Image

import explainability
from explainability import (
    CLASS_NAMES, FAMILIES, Evidence, Landmarks, Likeness, Radiograph, Reference, SimilarCase, Spread,
    explain_batch, findings_of,
)  # fmt: skip

pytestmark = pytest.mark.slow  # the quick tests are for work in progress on other parts

EVERYWHERE = Landmarks(np.ones((7, 7)), ())


def clouds(count, seed, away=0.0, size=24):
    """Features of two classes, correlated, and the classes."""
    generator = np.random.default_rng(seed)
    mixed = np.random.default_rng(0).normal(size=(size, size)) / size**0.5
    features = generator.normal(size=(2 * count, size)) @ mixed
    features[:count, 0] += 4
    return features + 5 + away, np.repeat(CLASS_NAMES, count)


def a_reference(count=60, seed=1, **changed):
    features, classes = clouds(count, seed)
    picture = explainability.thumbnail_of(Radiograph(np.full((30, 20, 3), 77, np.uint8)))
    labels = np.array([f"{index}.png" for index in range(2 * count)])
    usual = {"features": features, "classes": classes, "labels": labels, "thumbnails": (picture,) * 2 * count}
    return Reference(**{**usual, **changed})


def p_values(reference, features):
    return np.array([each.p_value for each in reference.likenesses(features)])


def test_the_distance_is_mahalanobis_with_the_shrunk_covariance():
    features, classes = clouds(20, seed=3)
    means = np.stack([features[classes == name].mean(axis=0) for name in CLASS_NAMES])
    centred = features - means.repeat(20, axis=0)
    covariance = centred.T @ centred / 40
    covariance = 0.9 * covariance + 0.1 * np.trace(covariance) / 24 * np.eye(24)
    other = clouds(5, seed=4)[0]
    expected = [min((each - mean) @ np.linalg.inv(covariance) @ (each - mean) for mean in means) for each in other]
    assert Spread.of(features, classes).distances(other) == pytest.approx(expected, rel=1e-8)


def test_of_images_of_the_references_kind_as_many_are_flagged_as_it_says():
    reference = a_reference(200)
    same, other = p_values(reference, clouds(1000, seed=2)[0]), p_values(reference, clouds(20, seed=2, away=3)[0])
    for share in (0.05, 0.2, 0.5):
        assert (same <= share).mean() == pytest.approx(share, abs=0.03)
    assert other.max() <= 1 / 401 + 1e-9
    own = p_values(reference, reference.features)  # four of five folds know them
    assert own.mean() > 0.5


def test_each_image_is_held_out_from_the_statistics_that_measure_it():
    features, classes = clouds(60, seed=1)
    features[7] += 1000  # is far from all others, and must not make itself near
    reference = a_reference(features=features)
    (likeness,) = reference.likenesses(clouds(1, seed=9)[0][:1] + 500)
    assert likeness.nearer >= 118 and likeness.p_value <= 3 / 121


def test_similar_cases_are_the_nearest_by_cosine_and_never_the_image_itself():
    reference = a_reference()
    asked = reference.features[[3, 100]] * 2.0
    unit = reference.features / np.linalg.norm(reference.features, axis=1, keepdims=True)
    for image, told in zip((3, 100), reference.likenesses(asked)):
        cosines = unit @ unit[image]
        expected = [index for index in np.argsort(-cosines) if index != image][:3]
        assert [case.label for case in told.similar] == [f"{index}.png" for index in expected]
        assert [case.class_name for case in told.similar] == [CLASS_NAMES[index // 60] for index in expected]
        assert [case.likeness for case in told.similar] == pytest.approx(cosines[expected])
        assert told.similar[0].picture.shape == (30, 20) and abs(int(told.similar[0].picture.mean()) - 77) < 3


def likeness(nearer=100, classes=(0, 0, 1), images=150):
    picture = np.zeros((9, 7), np.uint8)
    cases = [SimilarCase(f"{index}.png", CLASS_NAMES[each], 0.9, picture) for index, each in enumerate(classes)]
    return Likeness(nearer, images, tuple(cases))


@pytest.mark.parametrize(("nearer", "p_value", "is_flagged"), [(143, 8 / 151, False), (144, 7 / 151, True), (150, 1 / 151, True)])
def test_what_is_unlike_the_reference_is_told(nearer, p_value, is_flagged):
    found = findings_of(Evidence(an_explanation(likeness=likeness(nearer)), EVERYWHERE))
    (told,) = (each for each in found if each.check == "unlike")
    assert told.value == pytest.approx(p_value) and told.is_flagged == is_flagged
    words = f"arther from the reference images than {nearer} of the 150 themselves"
    start = "⚠️  Unlike the reference: f" if is_flagged else "F"
    assert explainability.marked_text(told) == start + words


@pytest.mark.parametrize(("classes", "count"), [((0, 0, 1), 2), ((1, 0, 1), 1), ((1, 1, 1), 0)])
def test_similar_cases_that_all_contradict_are_flagged(classes, count):
    found = findings_of(Evidence(an_explanation(likeness=likeness(classes=classes), explained=1), EVERYWHERE))
    (told,) = (each for each in found if each.check == "neighbours")
    assert told.is_flagged == (count == 0)
    assert told.text == f"{count} of the 3 most similar reference images are Comminuted Fracture"


def test_without_a_reference_nothing_is_told():
    checks = {each.check for each in findings_of(Evidence(an_explanation(), EVERYWHERE))}
    assert not checks & {"unlike", "neighbours"} and an_explanation().similar == ()


def test_the_same_pass_gives_each_image_its_own_features(tiny_classifiers):
    import torch

    for key, classifier in tiny_classifiers.items():
        inputs = np.random.default_rng(1).normal(size=(2, 3, 64, 64)).astype(np.float32)
        head = classifier.network.get_submodule(FAMILIES[key].head)
        features, passes = [], []
        with head.register_forward_pre_hook(lambda layer, given: features.append(given[0].numpy())), torch.no_grad():
            for each in torch.from_numpy(inputs):
                classifier.network(each[None])
        reference = a_reference(5, features=np.random.default_rng(2).normal(size=(10, features[0].shape[1])))
        expected = reference.likenesses(np.concatenate(features))
        known = dataclasses.replace(classifier, reference=reference)
        with classifier.network.register_forward_hook(lambda *_: passes.append(1)):
            told = explain_batch(known, inputs, None, ["gradcam", "refinecam"])
        assert len(passes) == 2 and not head._forward_pre_hooks  # one of them is refinecam's
        for index, explanation in enumerate(told):
            assert explanation.similar[0].label == expected[index // 2].similar[0].label
            assert explanation.similar[0].likeness == pytest.approx(expected[index // 2].similar[0].likeness, abs=1e-5)


# Whole runs


@pytest.fixture
def training_images(tmp_path):
    """Fifty small images of each class: bright at the top or at the bottom."""
    generator = np.random.default_rng(4)
    for name in ("comminuted_fracture", "simple_fracture"):
        folder = tmp_path / "training" / name
        folder.mkdir(parents=True)
        for index in range(50):
            pixels = generator.integers(0, 100, (32, 24), dtype=np.uint8)
            pixels[:16] += np.uint8(100 if name[0] == "c" else 0)
            Image.fromarray(pixels).save(folder / f"{index:02}.png")
    return tmp_path / "training"


def test_a_run_tells_what_is_unlike_and_what_is_similar(tiny_arguments, training_images, tmp_path, capsys):
    (tmp_path / "asked").mkdir()
    Image.open(training_images / "simple_fracture" / "07.png").save(tmp_path / "asked" / "same.png")
    Image.fromarray(np.eye(40, dtype=np.uint8) * 255).save(tmp_path / "asked" / "other.png")
    options = ["--reference", str(training_images), "--no-figures", "--save-maps", "--model", "efficientnet"]
    run = [*tiny_arguments, "--image", str(tmp_path / "asked"), *options]
    assert explainability.main(run) == 0
    (file,) = (tmp_path / "figures").glob("reference_efficientnet_*.npz")
    written = file.stat().st_mtime_ns
    with open(tmp_path / "figures" / "summary.csv", newline="") as table:
        other, same = csv.DictReader(table)
    assert "unlike" in other["efficientnet_flags"].split(", ") and float(other["efficientnet_unlike"]) == pytest.approx(1 / 101, abs=1e-6)
    assert "unlike" not in same["efficientnet_flags"] and "07.png" not in same["efficientnet_similar"]
    assert same["efficientnet_similar"].count("simple_fracture/") == 3
    told = json.loads((tmp_path / "figures" / "map_efficientnet_same.json").read_text())
    assert told["similar"][0]["class"] == "Simple Fracture" and told["checks"]["neighbours"]["value"] in (0, 1)
    said = capsys.readouterr().out
    assert "  Unlike the reference: 1 of 2 images; contradicted by similar cases: " in said and "Reference saved" in said
    assert explainability.main([*run, "--skip-existing"]) == 0
    assert "left alone: 2 images" in capsys.readouterr().out and file.stat().st_mtime_ns == written
    Image.fromarray(np.zeros((9, 9), np.uint8)).save(training_images / "simple_fracture" / "50.png")
    assert explainability.main([*run, "--skip-existing"]) == 0  # another reference, other findings
    assert "left alone" not in capsys.readouterr().out
    assert len(list((tmp_path / "figures").glob("reference_efficientnet_*.npz"))) == 2


def test_too_few_images_of_a_class_are_refused(tiny_arguments, training_images, xray, capsys):
    (training_images / "simple_fracture" / "00.png").unlink()
    run = [*tiny_arguments, "--image", str(xray), "--no-figures", "--reference", str(training_images)]
    assert explainability.main(run) == 1
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert "49 images in folders named Simple Fracture, too few" in line and "50 or more of each class" in line


def test_an_image_that_cannot_be_read_is_told_and_left_out(tiny_classifiers, training_images, capsys):
    (training_images / "simple_fracture" / "00.png").write_bytes(b"no image")
    cases = explainability.reference_cases(
        explainability.images_below(training_images), training_images, CLASS_NAMES, False
    )
    reference = explainability.reference_of(tiny_classifiers["efficientnet"], cases, 8)
    assert len(reference.labels) == len(reference.features) == len(reference.thumbnails) == 99
    assert "00.png" in capsys.readouterr().err
    anonymous = explainability.reference_cases([each for each, *_ in cases], training_images, CLASS_NAMES, True)
    assert not any("png" in label or "fracture" in label for _, label, _ in anonymous)


def test_what_is_written_is_read_again_for_the_same_network_alone(tmp_path):
    reference, path = a_reference(), tmp_path / "reference.npz"
    explainability.write_reference(reference, path, "this network")
    again = explainability.read_reference(path, "this network")
    assert (again.features == reference.features).all() and again.thumbnails == reference.thumbnails
    assert (again.labels == reference.labels).all() and (again.classes == reference.classes).all()
    assert explainability.read_reference(path, "another") is None
    path.write_bytes(path.read_bytes()[:-100])
    assert explainability.read_reference(path, "this network") is None


@pytest.mark.parametrize("key", FAMILIES)
def test_the_demo_networks_bring_a_reference_of_their_own(key):
    family = FAMILIES[key]
    classifier = explainability.load_classifier(family, explainability.find_checkpoint(family, explainability.CHECKPOINT_FOLDER), "cpu")
    assert explainability.read_reference(explainability.own_reference(family), explainability.network_mark(classifier)) is not None
    assert sum(explainability.own_reference(each).stat().st_size for each in FAMILIES.values()) <= 1e6


def test_a_figure_shows_the_similar_cases_where_there_is_room():
    for height, width in ((200, 100), (100, 120)):
        view = explainability.View(np.full((height, width, 3), 9, np.uint8), "", explainability.FigureStyle(dpi=30))
        plain, shown = (
            explainability.explanation_figure(view, an_explanation(likeness=each)) for each in (None, likeness())
        )
        pictures = [item for item in shown.items if isinstance(item, explainability.Picture)]
        assert [each.title for each in pictures[-3:]] == [f"{CLASS_NAMES[index]}, 0.900" for index in (0, 0, 1)]
        assert len(pictures) == 3 + len([item for item in plain.items if isinstance(item, explainability.Picture)])
        for picture in pictures[-3:]:
            assert picture.y + picture.pixels.shape[0] / 30 < shown.height
