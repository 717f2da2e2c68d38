"""Arithmetic that the quantized codecs share: finite numbers, sums, fp16 scales, rotated vectors back to the page's dtype.

Each step rounds once and in a stated order, so that the reference gives the same bytes on every machine, and so do the Triton kernels.
"""

from __future__ import annotations

import torch

FP16_MAX = 65504.0


def finite(numbers: torch.Tensor, limit: float) -> torch.Tensor:
    """fp32 `numbers` with NaN as 0 and everything within +-limit; the same tensor if nothing had to change."""
    limit = min(limit, torch.finfo(numbers.dtype).max)
    numbers = numbers.float()
    if numbers.numel() == 0:
        return numbers
    lowest, highest = torch.aminmax(numbers)
    if bool(lowest >= -limit) and bool(highest <= limit):
        return numbers
    return numbers.clamp(-limit, limit).nan_to_num_(nan=0.0)


def sum_by_halves(numbers: torch.Tensor, dim: int) -> torch.Tensor:
    """Sum along `dim`, which stays with size 1: filled up with zeros to a power of two, then the second half is added to the first until
    one number is left."""
    count = numbers.shape[dim]
    size = 1 << (count - 1).bit_length()
    if size > count:
        numbers = torch.cat([numbers, torch.zeros_like(numbers.narrow(dim, 0, size - count))], dim)
    while size > 1:
        size //= 2
        numbers = numbers.narrow(dim, 0, size) + numbers.narrow(dim, size, size)
    return numbers


def divided(numbers: torch.Tensor, divisor: float) -> torch.Tensor:
    """`numbers / divisor`, rounded once. Written plainly, CUDA would multiply by the inverse of a divisor that is a plain number."""
    return numbers / torch.full((), divisor, dtype=numbers.dtype, device=numbers.device)


def root(numbers: torch.Tensor) -> torch.Tensor:
    """Square roots of fp32 `numbers`, rounded once. By way of double precision, because MKL's, which torch takes on a CPU, are not."""
    return numbers.double().sqrt_().float()


def fp16_scale(scale: torch.Tensor) -> torch.Tensor:
    """`scale` as fp16, saturated instead of infinite."""
    return scale.clamp(max=FP16_MAX).half()


def numbers_of(coded: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Bytes `[..., n]` of a larger tensor, of any strides and offset, as numbers `[..., n / size]`. A copy."""
    # Not contiguous(): a batch of one block counts as contiguous whatever its stride, which view() then refuses.
    return coded.clone(memory_format=torch.contiguous_format).view(dtype)


def inverse(scale: torch.Tensor) -> torch.Tensor:
    """1 / scale in fp32; 0 where the scale is 0 or too small to have a finite inverse, so that such a vector codes as zeros."""
    scale = scale.float()
    return torch.where(scale >= torch.finfo(torch.float32).smallest_normal, 1 / scale, 0.0)


def as_page_dtype(numbers: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """fp32 `numbers` in a page's dtype, saturating where fp16 would overflow."""
    return numbers.clamp(-FP16_MAX, FP16_MAX).half() if dtype == torch.float16 else numbers.to(dtype)


def symmetric_codes(vectors: torch.Tensor, largest_code: int, unit: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Whole numbers -largest_code..largest_code (fp32) for `vectors * unit` `[..., head_dim]` and their fp16 scales `[..., 1]`.

    The scale is rounded to fp16 before its inverse is taken, so that encoder and decoder agree. `unit` goes into the scale and into its
    inverse, so that each number is multiplied only once.
    """
    scales = fp16_scale(divided(vectors.abs().amax(-1, keepdim=True) * unit, largest_code))
    return (vectors * (inverse(scales) * unit)).round_().clamp_(-largest_code, largest_code), scales
