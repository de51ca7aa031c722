"""What is computed beside an anomaly map, on maps whose figures are known."""

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
EXTENTS = ("long", "short", "ratio")


def extents(figures: Tensor, name: str) -> Tensor:
    """[B, NUM_FIGURES] → one figure of every sharpness, [B, len(SHARPNESS)]."""
    return figures[:, EXTENTS.index(name) : len(EXTENTS) * len(SHARPNESS) : len(EXTENTS)]


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


def of(anomaly_map: Tensor, count: float = 0) -> Tensor:
    return evidence(anomaly_map, torch.full(anomaly_map.shape[:1], float(count)))


def test_a_diagonal_line_is_long_and_thin_and_a_square_is_not() -> None:
    along = torch.arange(S)
    line = ((along[:, None] - along).abs() < CELL).float()[None]
    for drawn in (line, line.flip(1)):
        figures = of(drawn)
        torch.testing.assert_close(
            extents(figures, "long"), torch.full((1, 3), 4 * (2 / 3) ** 0.5), atol=0.15, rtol=0
        )
        assert torch.all(extents(figures, "short") < 0.3)
        assert torch.all(extents(figures, "ratio") < 0.1)
    figures = of(square(1.0))
    # Four cells, 2/31 apart.
    torch.testing.assert_close(
        extents(figures, "long"), torch.full((1, 3), 4 * 1.25**0.5 * 2 / 31), atol=0.01, rtol=0
    )
    assert torch.all(extents(figures, "ratio") > 0.85)


def test_sharper_weights_see_less_of_what_is_lower() -> None:
    anomaly_map = torch.maximum(square(1.0), 0.7 * torch.ones(1, S, S))
    long = extents(of(anomaly_map), "long")[0].tolist()
    assert long == sorted(long, reverse=True)
    assert long[0] > 2 * long[2]


def test_levels_of_the_map() -> None:
    anomaly_map = torch.full((1, S, S), 0.25)
    for row, level in enumerate((0.875, 0.75, 0.625, 0.5)):
        anomaly_map[:, row * CELL : (row + 1) * CELL, :CELL] = level
    expected = torch.tensor([[0.875, (0.875 + 0.75 + 0.625 + 0.5 + 0.25) / 5, 0.25]])
    torch.testing.assert_close(levels(of(anomaly_map)), expected)


def test_the_median_is_of_all_cells() -> None:
    cells = torch.randperm((S // CELL) ** 2).float().reshape(1, 1, S // CELL, -1)
    anomaly_map = cells.repeat_interleave(CELL, 2).repeat_interleave(CELL, 3)[:, 0] / 1024
    median = levels(of(anomaly_map))[0, 2]
    assert float(median) == pytest.approx(512 / 1024, abs=1e-5)


def test_the_number_of_normal_samples() -> None:
    one = torch.rand(1, S, S)
    counts = (0, 1, 2, 4)
    figures = torch.cat([of(one, count) for count in counts])
    assert shots(figures) == [[0, 0], [1, 0], [1, 1], [1, 1]]
    assert torch.equal(figures[1:, : -len(SHOTS)], figures[:-1, : -len(SHOTS)])


def test_each_of_a_batch_is_what_it_is_alone() -> None:
    torch.manual_seed(0)
    maps = torch.rand(4, S, S) ** 4
    counts = torch.tensor([0.0, 1.0, 3.0, 4.0])
    together = evidence(maps, counts)
    assert together.shape == (4, NUM_FIGURES)
    alone = torch.cat([evidence(maps[i : i + 1], counts[i : i + 1]) for i in range(4)])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("level", [-1e-7, 0.0, 1e-9, 1e-4, 1.0])
def test_flat_maps_have_finite_figures(level: float) -> None:
    figures = of(torch.full((2, S, S), level))
    assert torch.isfinite(figures).all()
    assert figures.abs().max() < 10
