"""Sampling of logits and masks at points."""

import torch
import torch.nn.functional as F

from xseg.losses.points import generator, sample_logits, sample_masks, uncertain_points, uniform


def test_masks_read_by_gather_equal_bilinear_sampling_of_floats() -> None:
    g = generator("cpu", 1)
    masks = (torch.rand(5, 9, 9, generator=g) > 0.5).to(torch.uint8)
    rows = torch.tensor([[4, 0], [1, 1], [2, 3]])
    coords = torch.cat([torch.rand(3, 40, 2, generator=g), torch.tensor([[0.0, 0], [1, 1], [0, 1]]).expand(3, 3, 2)], 1)
    expected = F.grid_sample(masks[rows].float(), 2 * coords[:, :, None] - 1, align_corners=False)[..., 0]
    torch.testing.assert_close(sample_masks(masks, rows, coords), expected, atol=1e-5, rtol=0)


def test_a_pixel_centre_gives_the_pixel() -> None:
    logits = torch.arange(12.0).reshape(1, 1, 3, 4)
    centre = torch.tensor([[[(2 + 0.5) / 4, (1 + 0.5) / 3]]])
    assert sample_logits(logits, centre).item() == logits[0, 0, 1, 2]


def test_uncertain_points_are_the_candidates_nearest_to_the_boundary() -> None:
    ramp = torch.linspace(-4, 4, 16).expand(1, 16, 16)
    candidates = torch.rand(1, 300, 2, generator=generator("cpu", 2))
    remainder = torch.full((1, 10, 2), 0.25)
    points = uncertain_points(ramp, candidates, remainder, 40)
    assert points.shape == (1, 40, 2)
    assert torch.equal(points[:, 30:], remainder)
    kept = (points[0, :30, 0] - 0.5).abs().max()
    assert ((candidates[0, :, 0] - 0.5).abs() <= kept + 1e-6).sum() == 30


def test_randoms_depend_on_the_key_alone() -> None:
    def draw(*key: int) -> torch.Tensor:
        return uniform(generator("cpu", *key), "matcher", 2, [1, 3], (4, 2), torch.device("cpu"))

    assert draw(7, 0, 3).shape == (2, 4, 4, 2)
    assert torch.equal(draw(7, 0, 3), draw(7, 0, 3))
    assert not torch.equal(draw(7, 0, 3), draw(7, 1, 3))
    assert not torch.equal(draw(7, 0, 3), draw(7, 0, 4))


def test_a_draw_is_asked_for_every_layer_and_item() -> None:
    asked = []

    def draw(kind: str, layer: int, item: int, shape: tuple[int, ...]) -> torch.Tensor:
        asked.append((kind, layer, item, shape))
        return torch.full(shape, layer + item / 10)

    out = uniform(draw, "candidates", 2, [2, 0, 1], (5, 2), torch.device("cpu"))
    assert out[:, :, 0, 0].tolist() == torch.tensor([[0.0, 0.0, 0.2], [1.0, 1.0, 1.2]]).tolist()
    assert asked[1] == ("candidates", 0, 1, (0, 5, 2))
