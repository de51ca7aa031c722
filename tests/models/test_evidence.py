"""What is computed beside an anomaly map, on pictures whose figures are known."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from anomalygpt_edge.models.evidence import (
    CELL,
    NUM_FIGURES,
    SHARPNESS,
    SHOTS,
    evidence,
)

S = 224
SQUARE = slice(10 * CELL, 14 * CELL)
# Of each sharpness, in this order.
LOOKS = ("near", "wide", "brightest", "darkest", "rough", "relative", "long", "short", "ratio")


def looks(figures: Tensor, name: str) -> Tensor:
    """[B, NUM_FIGURES] → one figure of every sharpness, [B, len(SHARPNESS)]."""
    return figures[:, LOOKS.index(name) : len(LOOKS) * len(SHARPNESS) : len(LOOKS)]


def levels(figures: Tensor) -> Tensor:
    """[B, 3]: the peak, the mean of the highest five cells, the median."""
    return figures[:, -len(SHOTS) - 3 : -len(SHOTS)] / 4


def shots(figures: Tensor) -> list[list[float]]:
    return figures[:, -len(SHOTS) :].tolist()


def square(level: float, ground: float = 0.0) -> Tensor:
    """[1, S, S] with a square."""
    plane = torch.full((1, S, S), ground)
    plane[:, SQUARE, SQUARE] = level
    return plane


def colour(plane: Tensor) -> Tensor:
    return plane[:, None].expand(-1, 3, -1, -1)


def of(anomaly_map: Tensor, pixels: Tensor, count: float = 0) -> Tensor:
    return evidence(anomaly_map, pixels, torch.full(anomaly_map.shape[:1], float(count)))


@pytest.mark.parametrize("ground", [-1.0, 0.0, 1.0])
@pytest.mark.parametrize("step", [-0.5, 0.5])
def test_dark_and_bright_differ_in_sign(step: float, ground: float) -> None:
    """The square is 4 cells wide and the surroundings 5 and 9."""
    figures = of(square(1.0), colour(square(ground + step, ground)))
    assert torch.all(looks(figures, "near") * step > 0)
    assert torch.all(looks(figures, "wide") * step > 0)
    assert torch.all(looks(figures, "wide").abs() > looks(figures, "near").abs())
    assert torch.all(looks(figures, "relative") * step > 0)
    torch.testing.assert_close(
        looks(figures, "wide"), torch.full((1, 3), step * (1 - 16 / 81)), atol=1e-3, rtol=0
    )
    extreme = "brightest" if step > 0 else "darkest"
    torch.testing.assert_close(looks(figures, extreme), looks(figures, "wide"), atol=1e-3, rtol=0)


def test_what_is_elsewhere_is_not_seen() -> None:
    anomaly_map = square(1.0)
    pixels = torch.zeros(1, S, S)
    pixels[:, -5 * CELL :] = 2.0
    seen, grey = of(anomaly_map, colour(pixels)), of(anomaly_map, colour(torch.zeros(1, S, S)))
    torch.testing.assert_close(seen, grey, atol=1e-5, rtol=0)


def test_a_speck_in_a_cell_shows_in_its_extremes() -> None:
    pixels = torch.zeros(1, S, S)
    pixels[:, 12 * CELL + 3, 12 * CELL + 3] = -2.0
    anomaly_map = torch.zeros(1, S, S)
    anomaly_map[:, 12 * CELL : 13 * CELL, 12 * CELL : 13 * CELL] = 1.0
    figures = of(anomaly_map, colour(pixels))
    assert torch.all(looks(figures, "darkest") < -1.9)
    assert torch.all(looks(figures, "brightest") < 0.01)
    assert torch.all(looks(figures, "wide").abs() < 0.05)


def test_rough_is_the_deviation_around() -> None:
    cells = (torch.arange(S) // CELL) % 2
    checks = ((cells[:, None] + cells) % 2 * 2 - 1).float()[None]
    anomaly_map = square(1.0)
    rough = looks(of(anomaly_map, colour(checks)), "rough")
    torch.testing.assert_close(rough, torch.ones(1, 3), atol=1e-2, rtol=0)
    assert torch.all(looks(of(anomaly_map, colour(0 * checks)), "rough") < 2e-3)


def test_a_diagonal_line_is_long_and_thin_and_a_square_is_not() -> None:
    along = torch.arange(S)
    line = ((along[:, None] - along).abs() < CELL).float()[None]
    grey = torch.zeros(1, 3, S, S)
    for drawn in (line, line.flip(1)):
        figures = of(drawn, grey)
        torch.testing.assert_close(
            looks(figures, "long"), torch.full((1, 3), 4 * (2 / 3) ** 0.5), atol=0.15, rtol=0
        )
        assert torch.all(looks(figures, "short") < 0.3)
        assert torch.all(looks(figures, "ratio") < 0.1)
    figures = of(square(1.0), grey)
    # Four cells, 2/31 apart.
    torch.testing.assert_close(
        looks(figures, "long"), torch.full((1, 3), 4 * 1.25**0.5 * 2 / 31), atol=0.01, rtol=0
    )
    assert torch.all(looks(figures, "ratio") > 0.85)


def test_sharper_weights_see_less_of_what_is_lower() -> None:
    anomaly_map = torch.maximum(square(1.0), 0.7 * torch.ones(1, S, S))
    long = looks(of(anomaly_map, torch.zeros(1, 3, S, S)), "long")[0].tolist()
    assert long == sorted(long, reverse=True)
    assert long[0] > 2 * long[2]


def test_levels_of_the_map() -> None:
    anomaly_map = torch.full((1, S, S), 0.25)
    for row, level in enumerate((0.875, 0.75, 0.625, 0.5)):
        anomaly_map[:, row * CELL : (row + 1) * CELL, :CELL] = level
    expected = torch.tensor([[0.875, (0.875 + 0.75 + 0.625 + 0.5 + 0.25) / 5, 0.25]])
    torch.testing.assert_close(levels(of(anomaly_map, torch.zeros(1, 3, S, S))), expected)


def test_the_median_is_of_all_cells() -> None:
    cells = torch.randperm((S // CELL) ** 2).float().reshape(1, 1, S // CELL, -1)
    anomaly_map = cells.repeat_interleave(CELL, 2).repeat_interleave(CELL, 3)[:, 0] / 1024
    median = levels(of(anomaly_map, torch.zeros(1, 3, S, S)))[0, 2]
    assert float(median) == pytest.approx(512 / 1024, abs=1e-5)


def test_the_number_of_normal_samples() -> None:
    one = torch.rand(1, S, S)
    counts = (0, 1, 2, 4)
    figures = torch.cat([of(one, colour(one), count) for count in counts])
    assert shots(figures) == [[0, 0], [1, 0], [1, 1], [1, 1]]
    assert torch.equal(figures[1:, : -len(SHOTS)], figures[:-1, : -len(SHOTS)])


def test_each_of_a_batch_is_what_it_is_alone() -> None:
    torch.manual_seed(0)
    maps, pixels = torch.rand(4, S, S) ** 4, torch.randn(4, 3, S, S)
    counts = torch.tensor([0.0, 1.0, 3.0, 4.0])
    together = evidence(maps, pixels, counts)
    assert together.shape == (4, NUM_FIGURES)
    alone = torch.cat([evidence(maps[i : i + 1], pixels[i : i + 1], counts[i : i + 1]) for i in range(4)])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("level", [-1e-7, 0.0, 1e-9, 1e-4, 1.0])
def test_flat_maps_and_pictures_have_finite_figures(level: float) -> None:
    for brightness in (-2.0, 0.0, 2.5):
        figures = of(torch.full((2, S, S), level), torch.full((2, 3, S, S), brightness))
        assert torch.isfinite(figures).all()
        assert figures.abs().max() < 10
