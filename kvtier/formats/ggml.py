"""q8_0, q4_0, q8_k, q4_k: the block formats of ggml (llama.cpp), byte for byte: no rotation, no mean. For comparison and exchange.

Layouts: `block_q8_0`, `block_q4_0`, `block_q8_K`, `block_q4_K` in ggml-common.h. A coded block is a row of ggml blocks, which run along its
contiguous numbers `[tokens, heads, head_dim]`; ggml's own `dequantize_row_*` or the `gguf` package read it. Little-endian:
    q8_0   32 numbers,  34 bytes   d fp16; codes int8 [32]                                          value = d * code
    q4_0   32 numbers,  18 bytes   d fp16; codes uint8 [16], i in the low, i + 16 in the high half  value = d * (code - 8)
    q8_k  256 numbers, 292 bytes   d fp32; codes int8 [256]; sums int16 [16] of 16 codes each       value = d * code
    q4_k  256 numbers, 144 bytes   d, dmin fp16; scales uint8 [12]; codes uint8 [128]               value = d * scale * code - dmin * min
The 12 bytes of q4_k are eight 6-bit scales s and mins m, one each per 32 numbers: byte i < 4 is s[i] with the high two bits of s[i + 4]
above it, byte i + 4 the same of m, byte i + 8 the low four bits of s[i + 4] and of m[i + 4]. Its codes: 32 bytes for every 64 numbers, the
first 32 in the low halves.

q8_0, q4_0 and q8_k encode as ggml's reference does (`quantize_row_*_ref`). q4_k searches scale and min of each 32 numbers as ggml's
`make_qkx2_quants` does, with 5 candidates instead of 21 and without weights. Relative rms error on real keys and values (SmolLM2-135M) and
torch encode speed, bf16 side, one thread: min and max alone 0.101 / 0.082, 0.50 GB/s; 5 candidates 0.094 / 0.076, 0.10 GB/s;
21 candidates 0.093 / 0.075, 0.03 GB/s.

The *_0 formats need a head_dim that is a multiple of 32, the *_k formats tokens * heads * head_dim that is one of 256. NaN counts as 0;
magnitudes saturate at 127 * 65504 (q8_0), 8 * 65504 (q4_0), 3e38 (q8_k), 63 * 65504 (q4_k), and 65504 in an fp16 page. One infinity makes
its neighbours in the block vanish. Zeros stay zeros. Blocks of magnitude below 4e-6 (q8_0), 2.4e-7 (q4_0), about 3e-5 (q4_k) come back as
zeros or coarse, because d is an fp16 subnormal. Output is always finite. The *_k formats have no native kernels.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import torch

from kvtier.errors import LayoutError
from kvtier.formats.codec import BlockCodec, BlockShape
from kvtier.formats.numbers import FP16_MAX, as_page_dtype, finite, fp16_scale, inverse, numbers_of

CANDIDATES = (-1.0, -0.5, 0.0, 0.5, 1.0)
"""How many levels more or fewer than 15 the range of 32 numbers is divided into by each candidate of q4_k's search."""

FP32_LIMIT = 3e38


class _GgmlCodec(BlockCodec):
    """A row of ggml blocks of `block_values` numbers in `coded_bytes` bytes each; magnitudes saturate at `limit`."""

    block_values: int
    coded_bytes: int
    limit: float

    @abstractmethod
    def quantize(self, numbers: torch.Tensor) -> torch.Tensor:
        """ggml blocks, uint8 `[n, coded_bytes]`, of finite fp32 `numbers` `[n, block_values]`."""

    @abstractmethod
    def dequantize(self, coded: torch.Tensor) -> torch.Tensor:
        """fp32 `[n, block_values]` of uint8 `[n, coded_bytes]`."""

    def block_bytes(self, shape: BlockShape) -> int:
        values = shape.vectors * shape.head_dim
        if self.block_values == 32 and shape.head_dim % 32:
            raise LayoutError(f"{self.name} codes 32 numbers along head_dim at a time, and {shape.head_dim} is no multiple; use q8 or q4")
        if values % self.block_values:
            geometry = f"{shape.tokens} tokens * {shape.heads} heads * head_dim {shape.head_dim}"
            remedy = "use other pages.page_tokens, or q8 or q4"
            raise LayoutError(f"{self.name} codes {self.block_values} numbers at a time, and {geometry} is no multiple; {remedy}")
        return values // self.block_values * self.coded_bytes

    def encode(self, blocks: torch.Tensor, shape: BlockShape) -> torch.Tensor:
        return self.quantize(finite(blocks, self.limit).reshape(-1, self.block_values)).view(-1, self.block_bytes(shape))

    def decode(self, coded: torch.Tensor, shape: BlockShape) -> torch.Tensor:
        numbers = self.dequantize(coded.reshape(-1, self.coded_bytes))
        return as_page_dtype(numbers, shape.torch_dtype).view(-1, shape.tokens, shape.heads, shape.head_dim)


@dataclass(frozen=True)
class Q8Zero(_GgmlCodec):
    """See the file's head."""

    name = "q8_0"
    native_id = 5
    block_values = 32
    coded_bytes = 34
    limit = 127 * FP16_MAX

    def quantize(self, numbers: torch.Tensor) -> torch.Tensor:
        scales = numbers.abs().amax(-1, keepdim=True) / 127
        codes = _round_half_away(numbers * inverse(scales)).to(torch.int8)
        return torch.cat([_bytes_of(fp16_scale(scales)), _bytes_of(codes)], 1)

    def dequantize(self, coded: torch.Tensor) -> torch.Tensor:
        scales, codes = coded.split_with_sizes([2, 32], 1)
        return numbers_of(scales, torch.float16).float() * numbers_of(codes, torch.int8)


@dataclass(frozen=True)
class Q4Zero(_GgmlCodec):
    """See the file's head."""

    name = "q4_0"
    native_id = 6
    block_values = 32
    coded_bytes = 18
    limit = 8 * FP16_MAX

    def quantize(self, numbers: torch.Tensor) -> torch.Tensor:
        scales = _signed_largest(numbers) / -8
        inverses = inverse(scales.abs()).copysign(scales)
        codes = (numbers * inverses + 8.5).trunc_().clamp_(0, 15).to(torch.uint8)
        return torch.cat([_bytes_of(scales.half()), codes[:, :16] | codes[:, 16:] << 4], 1)

    def dequantize(self, coded: torch.Tensor) -> torch.Tensor:
        scales, packed = coded.split_with_sizes([2, 16], 1)
        codes = torch.cat([packed & 15, packed >> 4], 1).float() - 8
        return numbers_of(scales, torch.float16).float() * codes


@dataclass(frozen=True)
class Q8K(_GgmlCodec):
    """See the file's head."""

    name = "q8_k"
    block_values = 256
    coded_bytes = 292
    limit = FP32_LIMIT

    def quantize(self, numbers: torch.Tensor) -> torch.Tensor:
        largest = _signed_largest(numbers)
        inverses = (-127 / largest).nan_to_num_(posinf=0.0, neginf=0.0)
        codes = (numbers * inverses).round_().clamp_(-128, 127)
        sums = codes.view(-1, 16, 16).sum(-1).to(torch.int16)
        scales = (1 / inverses).nan_to_num_(posinf=0.0, neginf=0.0)
        return torch.cat([_bytes_of(scales), _bytes_of(codes.to(torch.int8)), _bytes_of(sums)], 1)

    def dequantize(self, coded: torch.Tensor) -> torch.Tensor:
        scales, codes, _ = coded.split_with_sizes([4, 256, 32], 1)
        return numbers_of(scales, torch.float32) * numbers_of(codes, torch.int8)


@dataclass(frozen=True)
class Q4K(_GgmlCodec):
    """See the file's head."""

    name = "q4_k"
    block_values = 256
    coded_bytes = 144
    limit = 63 * FP16_MAX

    def quantize(self, numbers: torch.Tensor) -> torch.Tensor:
        parts = numbers.view(-1, 8, 32)
        scales, mins = _search(parts)
        super_scale, scale_codes = _six_bits(scales)
        super_min, min_codes = _six_bits(mins)
        offsets = super_min.float() * min_codes
        codes = ((parts + offsets) * inverse(super_scale.float() * scale_codes)).round_().clamp_(0, 15)
        pairs = codes.to(torch.uint8).view(-1, 4, 2, 32)
        packed = pairs[:, :, 0] | pairs[:, :, 1] << 4
        sixes = _pack_sixes(scale_codes.to(torch.uint8).flatten(1), min_codes.to(torch.uint8).flatten(1))
        return torch.cat([_bytes_of(super_scale.flatten(1)), _bytes_of(super_min.flatten(1)), sixes, packed.flatten(1)], 1)

    def dequantize(self, coded: torch.Tensor) -> torch.Tensor:
        super_scale, super_min, sixes, packed = coded.split_with_sizes([2, 2, 12, 128], 1)
        scale_codes, min_codes = _unpack_sixes(sixes)
        scales = (numbers_of(super_scale, torch.float16).float() * scale_codes)[..., None]
        mins = (numbers_of(super_min, torch.float16).float() * min_codes)[..., None]
        packed = packed.reshape(-1, 4, 1, 32)
        codes = torch.cat([packed & 15, packed >> 4], 2).view(-1, 8, 32)
        return (scales * codes - mins).view(-1, 256)


def _search(parts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales and mins `[n, 8, 1]`, both >= 0, with the least squared error of scale * code - min among the candidates."""
    lowest = parts.amin(-1, keepdim=True).clamp_(max=0.0)
    extent = parts.amax(-1, keepdim=True) - lowest
    scales, offsets = extent / 15, lowest
    least = _squared_error(parts, ((parts - offsets) * inverse(scales)).round_().clamp_(0, 15), scales, offsets)
    for more in CANDIDATES:
        codes = ((parts - lowest) * ((15 + more) * inverse(extent))).round_().clamp_(0, 15)
        fitted_scales, fitted_offsets = _fit(parts, codes)
        error = _squared_error(parts, codes, fitted_scales, fitted_offsets)
        # A fit that does not exist (all codes equal) is NaN, which is never less.
        better = (error < least) & (fitted_scales >= 0)
        least = torch.where(better, error, least)
        scales, offsets = torch.where(better, fitted_scales, scales), torch.where(better, fitted_offsets, offsets)
    return scales, -offsets


def _fit(parts: torch.Tensor, codes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Least-squares scale and offset of parts = scale * codes + offset, offset at most 0."""
    total, squares = codes.sum(-1, keepdim=True), codes.square().sum(-1, keepdim=True)
    numbers, products = parts.sum(-1, keepdim=True), (parts * codes).sum(-1, keepdim=True)
    determinant = 32 * squares - total * total
    scales, offsets = (32 * products - numbers * total) / determinant, (squares * numbers - total * products) / determinant
    return torch.where(offsets > 0, products / squares, scales), offsets.clamp_(max=0.0)


def _squared_error(parts: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    return (scales * codes + offsets - parts).square_().sum(-1, keepdim=True)


def _six_bits(scales: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Super-scales fp16 `[n, 1, 1]` and whole numbers 0..63 (fp32, `[n, 8, 1]`) whose products are near `scales`."""
    supers = fp16_scale(scales.amax(1, keepdim=True) / 63)
    return supers, (scales * inverse(supers)).round_().clamp_(0, 63)


def _pack_sixes(scales: torch.Tensor, mins: torch.Tensor) -> torch.Tensor:
    parts = [scales[:, :4] | scales[:, 4:] >> 4 << 6, mins[:, :4] | mins[:, 4:] >> 4 << 6, scales[:, 4:] & 15 | mins[:, 4:] << 4]
    return torch.cat(parts, 1)


def _unpack_sixes(packed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scales, mins, low = packed.split_with_sizes([4, 4, 4], 1)
    late_scales, late_mins = low & 15 | scales >> 6 << 4, low >> 4 | mins >> 6 << 4
    return torch.cat([scales & 63, late_scales], 1), torch.cat([mins & 63, late_mins], 1)


def _signed_largest(numbers: torch.Tensor) -> torch.Tensor:
    """The number of largest magnitude of each row, with its sign, `[n, 1]`; the first of equals, as in ggml."""
    lowest, highest = torch.aminmax(numbers, dim=-1, keepdim=True)
    tied = numbers.gather(-1, (numbers.abs() == torch.maximum(-lowest, highest)).int().argmax(-1, keepdim=True))
    return torch.where(-lowest == highest, tied, torch.where(-lowest > highest, lowest, highest))


def _round_half_away(numbers: torch.Tensor) -> torch.Tensor:
    """C's roundf, which ggml uses here; torch rounds halves to even."""
    whole = numbers.trunc()
    return whole + ((numbers - whole).abs() >= 0.5) * numbers.sign()


def _bytes_of(numbers: torch.Tensor) -> torch.Tensor:
    return numbers.contiguous().view(torch.uint8)
