"""PQ and mIoU: hand counts with crowd, void and empty images, and agreement with hotcoco's reading of PNG files."""

import json
from pathlib import Path

import numpy as np
import pytest
from hotcoco.panoptic import pq_compute
from PIL import Image

from xseg.metrics import truth
from xseg.metrics.panoptic import PanopticQuality
from xseg.metrics.semantic import MeanIoU
from xseg.types import Categories, Instance, Masks, Prediction, Sample, Score, Segment

CATEGORIES = Categories(("cat", "dog", "grass"), (3, 5, 9), (True, True, False))


def sample_of(id_map: np.ndarray, classes: dict[int, int], crowd: tuple[int, ...] = (), key: str = "s") -> Sample:
    """``classes``: id -> category index."""
    masks = Masks(id_map.shape, id_map=id_map.astype(np.int32), ids=tuple(classes))
    instances = tuple(Instance(k, c, is_crowd=i in crowd, id=i) for k, (i, c) in enumerate(classes.items()))
    return Sample(key, (), id_map.shape, masks, instances, CATEGORIES)


def prediction_of(id_map: np.ndarray, classes: tuple[int, ...]) -> Prediction:
    lut = np.array([-1, *classes])
    segments = tuple(Segment(truth.encode(id_map == k + 1), c) for k, c in enumerate(classes))
    return Prediction("s", segments, panoptic=id_map.astype(np.int32), semantic=lut[id_map])


def scores(metric: PanopticQuality | MeanIoU) -> dict[str, Score]:
    return {s.metric: s for s in metric.compute()}


def row(*runs: tuple[int, int]) -> np.ndarray:
    """One line of pixels: (value, length) runs."""
    return np.concatenate([np.full(n, v) for v, n in runs])[None]


def test_hand_count_with_void_crowd_and_misses() -> None:
    # truth: cat 7 (10 px), dog 8 (10 px), crowd of cats 9 (10 px), void (10 px), grass 4 (10 px)
    true = sample_of(row((7, 10), (8, 10), (9, 10), (0, 10), (4, 10)), {7: 0, 8: 1, 9: 0, 4: 2}, crowd=(9,))
    # cat: 8 of 10 px -> IoU 0.8. dog: 5 of 10 px plus 2 px of the cat -> 5/12, missed and false.
    # a "cat" on the crowd with 4 px of void: ignored. A "dog" on 6 void and 1 grass pixel too. Grass: 9 px.
    found = row((1, 8), (2, 7), (0, 5), (3, 10), (3, 4), (4, 6), (4, 1), (5, 9))
    metric = PanopticQuality()
    assert metric.update(prediction_of(found, (0, 1, 0, 1, 2)), true) == {"PQ": pytest.approx(100 * 1.7 / 3)}
    got = scores(metric)
    assert got["PQ things"].value == pytest.approx(100 * (0.8 + 0) / 2)
    assert got["PQ stuff"].value == pytest.approx(90)
    assert got["PQ"].value == pytest.approx(100 * (0.8 + 0 + 0.9) / 3)
    assert got["RQ"].value == pytest.approx(100 * 2 / 3)
    assert got["SQ"].value == pytest.approx(100 * (0.8 + 0 + 0.9) / 3)


def test_a_wrong_category_is_one_miss_and_one_false_find() -> None:
    true = sample_of(row((7, 10)), {7: 0})
    metric = PanopticQuality()
    metric.update(prediction_of(row((1, 10)), (1,)), true)
    assert metric.counts[0].tolist() == [[0, 0, 0, 1], [0, 0, 1, 0], [0, 0, 0, 0]]
    assert scores(metric)["PQ"].value == 0


def test_unseen_categories_have_scores_of_their_own() -> None:
    # the dog is found, the cat missed; of the two names without masks in training one occurs
    true = sample_of(row((7, 10), (8, 10)), {7: 0, 8: 1})
    metric = PanopticQuality(["dog"])
    metric.update(prediction_of(row((0, 10), (1, 8), (0, 2)), (1,)), true)
    found = scores(metric)
    assert found["PQ unseen"].value == pytest.approx(80) and found["PQ"].value == pytest.approx(40)
    assert "unseen, without a mask in training: dog" in found["PQ unseen"].protocol
    plain = PanopticQuality()
    plain.update(prediction_of(row((0, 10), (1, 8), (0, 2)), (1,)), true)
    assert not [name for name in scores(plain) if "unseen" in name]


def test_empty_image_and_missing_map() -> None:
    empty = sample_of(row((0, 10)), {})
    metric = PanopticQuality()
    metric.update(prediction_of(row((1, 10)), (0,)), empty)  # on void: neither right nor wrong
    assert metric.counts[0].sum() == 0 and metric.compute() == []
    metric.update(Prediction("s"), sample_of(row((7, 10)), {7: 0}))
    assert scores(metric)["PQ"].value == 0


def random_pairs(count: int) -> list[tuple[Sample, Prediction]]:
    rng = np.random.default_rng(0)
    pairs = []
    for k in range(count):
        blocks = rng.integers(0, 6, (4, 5))
        true = np.kron(blocks, np.ones((6, 7), int))
        classes = {i: int(rng.integers(3)) for i in np.unique(true) if i}
        crowd_class = next((c for c in classes.values() if c < 2), None)
        crowd = tuple(i for i, c in classes.items() if c == crowd_class)[:1]
        moved = np.where(rng.random(true.shape) < 0.1, rng.integers(0, 6, true.shape), np.roll(true, k % 3, axis=1))
        ids = [i for i in np.unique(moved) if i]
        found = np.searchsorted(np.array([0, *ids]), moved)
        guess = tuple(classes[i] if i in classes and rng.random() < 0.8 else int(rng.integers(3)) for i in ids)
        pairs.append((sample_of(true, classes, crowd, key=str(k)), prediction_of(found, guess)))
    return pairs


def write_coco(folder: Path, name: str, maps: list[np.ndarray], segments: list[list[dict[str, int]]]) -> Path:
    (folder / name).mkdir()
    for k, id_map in enumerate(maps):
        Image.fromarray(np.stack([id_map % 256, id_map // 256, id_map * 0], -1).astype(np.uint8)).save(
            folder / name / f"{k}.png"
        )
    height, width = maps[0].shape
    data = {
        "images": [{"id": k, "height": height, "width": width} for k in range(len(maps))],
        "annotations": [{"image_id": k, "file_name": f"{k}.png", "segments_info": s} for k, s in enumerate(segments)],
        "categories": [
            {"id": k, "name": n, "isthing": int(t)}
            for k, (n, t) in enumerate(zip(CATEGORIES.names, CATEGORIES.is_thing))
        ],
    }
    path = folder / f"{name}.json"
    path.write_text(json.dumps(data))
    return path


def test_equals_panopticapi_rules_on_png_files(tmp_path: Path) -> None:
    pairs = random_pairs(25)
    metric = PanopticQuality()
    true_segments, found_segments = [], []
    for sample, prediction in pairs:
        metric.update(prediction, sample)
        assert sample.masks is not None and sample.masks.id_map is not None and prediction.panoptic is not None
        true_segments.append(
            [
                {
                    "id": int(i.id),
                    "category_id": i.category,
                    "iscrowd": int(i.is_crowd),
                    "area": int((sample.masks.id_map == i.id).sum()),
                }
                for i in sample.instances
            ]
        )
        found_segments.append([{"id": k + 1, "category_id": s.category} for k, s in enumerate(prediction.segments)])
    true = write_coco(tmp_path, "true", [s.masks.id_map for s, _ in pairs], true_segments)  # type: ignore[union-attr,misc]
    found = write_coco(tmp_path, "found", [p.panoptic for _, p in pairs], found_segments)  # type: ignore[misc]
    want = pq_compute(str(true), str(found))
    got = scores(metric)
    for group, suffix in (("All", ""), ("Things", " things"), ("Stuff", " stuff")):
        for key in ("pq", "sq", "rq"):
            assert got[key.upper() + suffix].value == pytest.approx(100 * want[group][key], abs=1e-9)
    assert 0 < got["PQ"].value < 100


def test_merging_halves_equals_the_whole_and_interval_holds_the_value() -> None:
    for kind in (PanopticQuality, MeanIoU):
        whole, left, right = kind(), kind(), kind()
        for k, (sample, prediction) in enumerate(random_pairs(12)):
            whole.update(prediction, sample)
            (left if k % 2 else right).update(prediction, sample)
        left += right  # type: ignore[operator,assignment]
        for one, other in zip(whole.compute(), left.compute(), strict=True):
            assert one.value == pytest.approx(other.value)
            assert one.n == 12 and one.ci95 is not None and one.ci95[0] < one.value < one.ci95[1]
        assert whole.compute() == whole.compute()


def test_rle_truth_paints_crowd_below_and_equals_the_id_map() -> None:
    id_map = row((7, 6), (8, 4), (9, 5))
    by_map = sample_of(id_map, {9: 0, 7: 1, 8: 2}, crowd=(9,))
    rles = tuple(truth.encode(id_map == i) for i in (9, 7, 8))
    over = truth.encode(id_map >= 8)  # the crowd region reaches below segment 8
    by_rle = Sample("r", (), id_map.shape, Masks(id_map.shape, (over, *rles[1:])), by_map.instances, CATEGORIES)
    assert (truth.segment_map(by_map) == truth.segment_map(by_rle)).all()
    assert truth.segment_map(by_map).dtype == truth.segment_map(by_rle).dtype == np.int32
    assert truth.segment_map(by_map).tolist() == row((2, 6), (3, 4), (1, 5)).tolist()


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 16, 63, 64, 65, 200])
def test_stretches_of_any_length_are_those_counted_pixel_by_pixel(size: int) -> None:
    rng = np.random.default_rng(size)
    for chance in (0.02, 0.3, 1.0):
        one, two = (np.cumsum(rng.random((1, size)) < chance, axis=1, dtype=np.int32) for _ in range(2))
        pairs = list(zip(one[0].tolist(), two[0].tolist(), strict=True))
        want = [k for k in range(size) if k == 0 or pairs[k] != pairs[k - 1]]
        starts, lengths = truth.stretches(one, two)
        assert starts.tolist() == want and (starts + lengths).tolist() == [*want[1:], size][: len(want)]


def test_mean_iou_by_hand() -> None:
    true = sample_of(row((7, 10), (4, 10), (0, 10)), {7: 0, 4: 2})
    # cat: 6 of 10 px, 2 on grass -> 6/12; grass 8 of 10, and 3 px of the cat -> 8/13; void and the dog on it are free
    found = row((1, 6), (2, 3), (0, 1), (1, 2), (2, 8), (3, 10))
    metric = MeanIoU()
    own = metric.update(prediction_of(found, (0, 2, 1)), true)
    assert own == {"mIoU": scores(metric)["mIoU"].value} == {"mIoU": pytest.approx(100 * (6 / 12 + 8 / 13) / 2)}
    metric.update(Prediction("s"), true)
    assert scores(metric)["mIoU"].value == pytest.approx(100 * (6 / 22 + 8 / 23) / 2)
    assert MeanIoU().update(Prediction("s"), sample_of(row((0, 10)), {})) == {}, "no pixel is annotated"


def test_wrong_shape_is_an_error_that_names_the_sample() -> None:
    for metric in (PanopticQuality(), MeanIoU()):
        with pytest.raises(ValueError, match="s: "):
            metric.update(prediction_of(row((1, 9)), (0,)), sample_of(row((7, 10)), {7: 0}))
