from __future__ import annotations

import pytest
import torch

from kvtier.formats.hadamard import block_size, rotate, signs, unrotate_factor, unrotate_whole


@pytest.mark.parametrize(("head_dim", "block"), [(1, 1), (63, 1), (64, 64), (80, 16), (96, 32), (128, 128), (192, 64), (256, 256)])
def test_block_is_the_largest_power_of_two_that_divides(head_dim: int, block: int) -> None:
    assert block_size(head_dim) == block


@pytest.mark.parametrize("block", [1, 2, 64, 128])
def test_signs_are_a_symmetric_hadamard_matrix(block: int) -> None:
    matrix = signs(block, torch.device("cpu"))
    assert bool((matrix.abs() == 1).all())
    assert torch.equal(matrix, matrix.T)
    assert torch.equal(matrix @ matrix, block * torch.eye(block))


@pytest.mark.parametrize("head_dim", [63, 64, 80, 128])
def test_rotation_keeps_norms_and_comes_back(head_dim: int) -> None:
    vectors = torch.randn(5, 3, head_dim, generator=torch.Generator().manual_seed(0))
    rotated = rotate(vectors)
    torch.testing.assert_close(rotated.norm(dim=-1), vectors.norm(dim=-1))
    torch.testing.assert_close(unrotate_whole(rotated) * unrotate_factor(head_dim), vectors)


def test_rotation_spreads_a_channel_over_its_block() -> None:
    one = torch.zeros(80)
    one[17] = 4.0
    assert rotate(one).abs().tolist() == [0.0] * 16 + [1.0] * 16 + [0.0] * 48


def test_whole_numbers_rotate_back_exactly() -> None:
    codes = torch.randint(-127, 128, (1000, 128), generator=torch.Generator().manual_seed(0))
    exact = codes @ signs(128, torch.device("cpu")).long()
    assert torch.equal(unrotate_whole(codes.float()), exact.float())
    assert torch.equal(unrotate_whole(codes[:1].float()), exact[:1].float())
