"""Images that a network is meant for: how far others are from them, and which are alike."""

import csv
import dataclasses
import io
import json

import numpy as np
import pytest
from conftest import an_explanation
from PIL import Image

import explainability as tool
from explainability import CLASS_NAMES, FAMILIES, Evidence, Likeness, Reference, SimilarCase

pytestmark = pytest.mark.slow  # the quick tests are for work in progress on other parts


def clouds(count, seed, away=0.0, size=24):
    """Features of two classes, correlated, and the classes."""
    generator = np.random.default_rng(seed)
    mixed = np.random.default_rng(0).normal(size=(size, size)) / size**0.5
    features = generator.normal(size=(2 * count, size)) @ mixed
    features[:count, 0] += 4
    return features + 5 + away, np.repeat(CLASS_NAMES, count)


def a_reference(count=60, **changed):
    features, classes = clouds(count, seed=1)
    labels, file = np.array([f"{index}.png" for index in range(2 * count)]), io.BytesIO()
    Image.new("L", (20, 30), 77).save(file, "JPEG")
    usual = {"features": features, "classes": classes, "labels": labels}
    return Reference(**{**usual, "thumbnails": (file.getvalue(),) * 2 * count, **changed})


def p_values(reference, features):
    return np.array([each.p_value for each in reference.likenesses(features)])


def test_the_distance_is_mahalanobis_with_the_shrunk_covariance():
    features, classes = clouds(20, seed=3)
    means = np.stack([features[classes == name].mean(axis=0) for name in CLASS_NAMES])
    centred = features - means.repeat(20, axis=0)
    covariance = centred.T @ centred / 40
    inverse = np.linalg.inv(0.9 * covariance + 0.1 * np.trace(covariance) / 24 * np.eye(24))
    other = clouds(5, seed=4)[0]
    expected = [min((each - mean) @ inverse @ (each - mean) for mean in means) for each in other]
    assert tool.mahalanobis(features, classes)(other) == pytest.approx(expected, rel=1e-8)


def test_of_images_of_the_references_kind_as_many_are_flagged_as_it_says():
    reference = a_reference(200)
    same, other = (p_values(reference, clouds(1000, seed=2, away=away)[0]) for away in (0, 3))
    for share in (0.05, 0.2, 0.5):
        assert (same <= share).mean() == pytest.approx(share, abs=0.03)
    assert other.max() <= 1 / 401 + 1e-9
    assert p_values(reference, reference.features).mean() > 0.5  # four of five folds know them


def test_similar_cases_are_the_nearest_by_cosine_and_never_the_image_itself():
    reference = a_reference()
    unit = reference.features / np.linalg.norm(reference.features, axis=1, keepdims=True)
    for image, told in zip((3, 100), reference.likenesses(reference.features[[3, 100]] * 2.0)):
        cosines = unit @ unit[image]
        expected = [index for index in np.argsort(-cosines) if index != image][:3]
        assert [case.label for case in told.similar] == [f"{index}.png" for index in expected]
        assert [case.class_name for case in told.similar] == [CLASS_NAMES[index // 60] for index in expected]
        assert [case.likeness for case in told.similar] == pytest.approx(cosines[expected])
        picture = told.similar[0].picture
        assert picture.shape == (30, 20) and abs(int(picture.mean()) - 77) < 3


def likeness(nearer=100, classes=(0, 0, 1)):
    cases = [SimilarCase("a.png", CLASS_NAMES[each], 0.9, np.zeros((9, 7), np.uint8)) for each in classes]
    return Likeness(nearer, 150, tuple(cases))


def reference_findings(**changed):
    found = tool.findings_of(Evidence(an_explanation(**changed), tool.Landmarks(np.ones((7, 7)), ())))
    return {each.check: each for each in found if tool.CHECKS[each.check].about == "reference"}


def test_what_is_unlike_the_reference_and_similar_cases_that_all_contradict_are_flagged():
    for nearer, is_flagged in ((143, False), (144, True), (150, True)):
        told = reference_findings(likeness=likeness(nearer))["unlike"]
        assert told.value == pytest.approx((151 - nearer) / 151) and told.is_flagged == is_flagged
        start = "⚠️  Unlike the reference: f" if is_flagged else "F"
        words = f"arther from the reference images than {nearer} of the 150 themselves"
        assert tool.marked_text(told) == start + words
    for classes, count in (((0, 0, 1), 2), ((1, 0, 1), 1), ((1, 1, 1), 0)):
        told = reference_findings(likeness=likeness(classes=classes), explained=1)["neighbours"]
        assert told.value == pytest.approx(count / 3) and told.is_flagged == (count == 0)
        assert told.text == f"{count} of the 3 most similar reference images are Comminuted Fracture"
    assert not reference_findings() and an_explanation().similar == ()  # without a reference nothing


@pytest.mark.parametrize("key", FAMILIES)
def test_the_same_pass_gives_each_image_its_own_features(tiny_classifiers, key):
    import torch

    network, passes = tiny_classifiers[key].network, []
    inputs = np.random.default_rng(1).normal(size=(2, 3, 64, 64)).astype(np.float32)
    with torch.no_grad():
        features = network.forward_head(network.forward_features(torch.from_numpy(inputs)), pre_logits=True)
    reference = a_reference(5, features=np.random.default_rng(2).normal(size=(10, features.shape[1])))
    known = dataclasses.replace(tiny_classifiers[key], reference=reference)
    with network.register_forward_hook(lambda *_: passes.append(1)):
        told = tool.explain_batch(known, inputs, None, ["gradcam", "refinecam"])
    assert len(passes) == 2  # one of them is refinecam's
    for explanation, alone in zip(told, np.repeat(reference.likenesses(features.numpy()), 2)):
        case, expected = explanation.similar[0], alone.similar[0]
        assert case.label == expected.label and case.likeness == pytest.approx(expected.likeness, abs=1e-5)


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
    asked, results, trained = tmp_path / "asked", tmp_path / "figures", training_images / "simple_fracture"
    asked.mkdir()
    (asked / "same.png").write_bytes((trained / "07.png").read_bytes())
    Image.fromarray(np.eye(40, dtype=np.uint8) * 255).save(asked / "other.png")
    run = [*tiny_arguments, f"--reference={training_images}", f"--image={asked}", "--model=efficientnet"]
    run += ["--no-figures", "--save-maps", "--skip-existing"]
    assert tool.main(run) == 0
    (file,) = results.glob("reference_efficientnet_*.npz")
    written = file.stat().st_mtime_ns
    with open(results / "summary.csv", newline="") as table:
        other, same = csv.DictReader(table)
    assert "unlike" in other["efficientnet_flags"].split(", ") and "unlike" not in same["efficientnet_flags"]
    assert float(other["efficientnet_unlike"]) == pytest.approx(1 / 101, abs=1e-6)
    assert same["efficientnet_similar"].count("simple_fracture/") == 3
    assert "07.png" not in same["efficientnet_similar"]
    told = json.loads((results / "map_efficientnet_same.json").read_text())
    assert "Simple Fracture" in told["similar"][0] and len(told["similar"]) == 3
    assert told["checks"]["neighbours"]["value"] in (0, 1)
    said = capsys.readouterr().out
    assert "Reference saved" in said and "  Unlike the reference: 1 of 2 images; contradicted by sim" in said
    assert tool.main(run) == 0
    assert "left alone: 2 images" in capsys.readouterr().out and file.stat().st_mtime_ns == written
    Image.fromarray(np.zeros((9, 9), np.uint8)).save(trained / "50.png")
    assert tool.main(run) == 0  # another reference, other findings
    assert "left alone" not in capsys.readouterr().out
    assert len(list(results.glob("reference_efficientnet_*.npz"))) == 2


def test_too_few_images_of_a_class_are_refused(tiny_arguments, training_images, xray, capsys):
    (training_images / "simple_fracture" / "00.png").unlink()
    run = [*tiny_arguments, "--no-figures", f"--image={xray}", f"--reference={training_images}"]
    assert tool.main(run) == 1
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert "49 images in folders named Simple Fracture, too few" in line and "50 or more of each" in line


def test_a_reference_is_read_again_for_its_network_alone(tiny_classifiers, training_images, tmp_path, capsys):
    (training_images / "simple_fracture" / "00.png").write_bytes(b"no image")
    images = tool.images_below(training_images)
    cases = tool.reference_cases(images, training_images, CLASS_NAMES, False)
    reference = tool.reference_of(tiny_classifiers["efficientnet"], cases, 8)
    path = tmp_path / "reference.npz"
    assert "00.png" in capsys.readouterr().err  # it is told and left out
    tool.write_reference(reference, path, "this network")
    again = tool.read_reference(path, "this network")
    read = [(label, name) for path, label, name in cases if label != "simple_fracture/00.png"]
    assert len(read) == len(again.features) == 99 and list(zip(again.labels, again.classes)) == read
    assert (again.features == reference.features).all() and again.thumbnails == reference.thumbnails
    bright = [np.asarray(Image.open(io.BytesIO(each)))[:16].mean() > 100 for each in again.thumbnails]
    assert bright == [name == CLASS_NAMES[0] for name in again.classes]
    assert tool.read_reference(path, "another") is None
    path.write_bytes(path.read_bytes()[:-100])
    assert tool.read_reference(path, "this network") is None
    anonymous = tool.reference_cases(images, training_images, CLASS_NAMES, True)
    assert not any("png" in label or "fracture" in label for _, label, _ in anonymous)


def test_the_demo_networks_bring_a_reference_of_their_own():
    for family in FAMILIES.values():
        checkpoint = tool.find_checkpoint(family, tool.CHECKPOINT_FOLDER)
        mark = tool.network_mark(tool.load_classifier(family, checkpoint, "cpu"))
        assert tool.read_reference(tool.own_reference(family), mark) is not None
    assert sum(tool.own_reference(each).stat().st_size for each in FAMILIES.values()) <= 1e6


def test_a_figure_shows_the_similar_cases_where_there_is_room():
    for height, width in ((200, 100), (100, 120)):
        view = tool.View(np.full((height, width, 3), 9, np.uint8), "", tool.FigureStyle(dpi=30))
        sheets = [tool.explanation_figure(view, an_explanation(likeness=each)) for each in (None, likeness())]
        plain, shown = ([each for each in sheet.items if isinstance(each, tool.Picture)] for sheet in sheets)
        assert [each.title for each in shown[-3:]] == [f"{CLASS_NAMES[index]}, 0.900" for index in (0, 0, 1)]
        assert len(shown) == 3 + len(plain)
        assert all(each.y + each.pixels.shape[0] / 30 < sheets[1].height for each in shown[-3:])
