"""What a picture tells where a map is raised: figures that depend on contrast and place, not on light or scale."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from anomalygpt_edge.models.look import (
    LOOKS,
    STRONGEST,
    LookNet,
    contrast,
    means_where,
    probabilities,
    raised,
)

SIZE = 224


def picture(level: float, row: int = 100, column: int = 60, side: int = 8) -> torch.Tensor:
    """A grey part with a spot of another level: [1, 3, S, S]."""
    pixels = torch.full((1, 3, SIZE, SIZE), 0.3)
    pixels[..., row : row + side, column : column + side] += level
    return pixels


def peak(row: int = 104, column: int = 64) -> torch.Tensor:
    rows, columns = torch.arange(SIZE)[:, None], torch.arange(SIZE)
    return 0.3 * torch.exp(-((rows - row) ** 2 + (columns - column) ** 2) / 200.0)[None]


@pytest.mark.parametrize("level", [-0.5, 0.5])
def test_contrast_has_the_sign_of_the_spot_and_is_nowhere_else(level: float) -> None:
    found = contrast(picture(level))
    assert found.shape == (1, 2, SIZE // 2, SIZE // 2)
    for scale in found[0]:
        assert (scale[50:54, 30:34] * level > 0).all()
        assert scale[:, 50:].abs().max() < 0.01 * scale[51, 31].abs()


def test_contrast_does_not_depend_on_light() -> None:
    pixels = torch.randn(1, 3, SIZE, SIZE, generator=torch.manual_seed(0))
    torch.testing.assert_close(contrast(1.7 * pixels + 0.4), contrast(pixels), atol=0.05, rtol=0.05)
    assert contrast(pixels).abs().max() <= STRONGEST / 2


def test_a_part_of_one_grey_has_none() -> None:
    assert contrast(torch.full((1, 3, SIZE, SIZE), 0.7)).abs().max() < 1e-4


def test_a_map_counts_as_a_share_of_its_peak() -> None:
    torch.testing.assert_close(raised(peak()), raised(0.1 * peak()), atol=1e-4, rtol=1e-3)
    for nothing in (torch.zeros(1, SIZE, SIZE), torch.full((1, SIZE, SIZE), -1e-7)):
        assert torch.equal(raised(nothing), torch.ones(1, 1, SIZE // 2, SIZE // 2))


def test_means_are_taken_where_the_map_is_raised() -> None:
    features = torch.zeros(1, 1, SIZE // 2, SIZE // 2)
    features[..., 47:57, 27:37] = 1
    there, elsewhere = (means_where(features, raised(peak(*at)), (4, 32)) for at in ((104, 64), (20, 200)))
    assert 0.4 < float(there[0]) < float(there[1])
    assert float(there[1]) > 0.9
    assert max(float(each) for each in elsewhere) < 1e-6


def test_it_looks_where_the_map_is_raised() -> None:
    """Two spots, one dark and one bright: the map says which is meant."""
    pixels = torch.cat([picture(s) + picture(-s, 20, 160) - 0.3 for s in (0.6, -0.6)])
    torch.manual_seed(0)
    look = LookNet((4, 8, 8))
    optimizer = torch.optim.Adam(look.parameters(), lr=3e-3)
    maps = torch.cat([peak(), peak()])
    for _ in range(60):
        loss = F.cross_entropy(look(pixels, maps)[:, :3], torch.tensor([1, 0]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    elsewhere = torch.cat([peak(24, 164), peak(24, 164)])
    with torch.no_grad():
        assert probabilities(look(pixels, maps))[:, :2].argmax(dim=1).tolist() == [1, 0]
        assert probabilities(look(pixels, elsewhere))[:, :2].argmax(dim=1).tolist() == [0, 1]


def test_parts_of_a_batch_do_not_see_each_other() -> None:
    look, pixels, maps = LookNet((4, 8, 8)), torch.randn(3, 3, SIZE, SIZE), torch.rand(3, SIZE, SIZE)
    with torch.no_grad():
        alone = torch.cat([look(pixels[i : i + 1], maps[i : i + 1]) for i in range(3)])
        torch.testing.assert_close(look(pixels, maps), alone, atol=1e-5, rtol=1e-4)


def test_shades_exclude_each_other_and_a_line_does_not() -> None:
    found = probabilities(torch.tensor([[1.0, 2.0, 3.0, 4.0]]))
    assert found.shape == (1, len(LOOKS))
    assert float(found[0, :3].sum()) == pytest.approx(1)
    assert float(found[0, 3]) == pytest.approx(0.982, abs=1e-3)
