"""Kernels beside torch's own operations on the same numbers; part of `kvtier bench gpu`.

- `sparse24.matmul`: microseconds of a prefix's values times the attention of 64 queries, one KV head, with two of every four values kept
  and torch's semi-structured product, beside the dense one; less is better. Tensor cores skip what is zero along the dimension that is
  summed over, here tokens; the format `sparse24` keeps two of four along head_dim, so pages would have to be pruned the other way for this.
- `digest.encode`, `digest.score`: microseconds for the digests of a lane's pages, and for scoring a prefix by those of one layer, beside
  torch's operations; less is better.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from kvtier.attention import digest, on_device
from kvtier.attention.digest import DigestLayout
from kvtier.cuda.surface import Accelerator
from kvtier.errors import KVTierError
from kvtier.formats.codec import BlockShape
from kvtier.formats.sparse24 import Sparse24
from kvtier.tiers.gpu import GpuPool

from .gpu_timing import Sizes, in_turns, seconds
from .measure import Row, Run

QUERIES = 64


def digests(run: Run, gpu: Accelerator, sizes: Sizes) -> list[Row]:
    layout, count, stream = sizes.layout, sizes.pages, gpu.new_stream()
    shape, slots = DigestLayout.of(layout), list(range(count))
    pool = GpuPool(layout, count * layout.page_bytes, gpu)
    pool.reserve(count)
    numbers = torch.randn(count, *layout.shape, generator=torch.Generator().manual_seed(0)).to(layout.torch_dtype)
    pool.scatter(slots, numbers)
    made = digest.encode(pool.keys(slots[:1]))[:, 0]
    digests = made.repeat(sizes.prefix_tokens // layout.page_tokens, 1, 1)
    queries = torch.randn(1, 4 * layout.kv_heads, layout.head_dim, device=gpu.device)

    def by_torch() -> torch.Tensor:
        return digest.encode(torch.stack([pool.layer(layer)[:count, 0] for layer in range(layout.layers)], 1))

    def timed(work: Callable[[], object]) -> Callable[[], float]:
        return lambda: seconds(lambda: stream.run(work), stream)

    pool.fences.before(stream)
    took = in_turns(
        run,
        {
            "encode": timed(lambda: on_device.encode_paged(pool.paged, slots)),
            "encode by torch": timed(by_torch),
            "score": timed(lambda: on_device.page_logits(digests, queries, shape)),
            "score by torch": timed(lambda: digest.page_logits(digests, queries, shape)),
        },
    )
    pool.close()
    return [Row(f"digest.{what}", took[what] * 1e6, "us", took[f"{what} by torch"] * 1e6) for what in ("encode", "score")]


def sparse_product(run: Run, gpu: Accelerator, sizes: Sizes) -> Row:
    tokens, dim, stream = sizes.prefix_tokens, sizes.layout.head_dim, gpu.new_stream()
    # As tensor cores take values: tokens are the last dimension.
    shape = BlockShape(tokens=dim, heads=1, head_dim=tokens, dtype="bf16", keys=False)
    numbers = torch.randn(2, dim, tokens, generator=torch.Generator().manual_seed(0)).bfloat16()
    values = Sparse24().decode(Sparse24().encode(numbers[:1, :, None], shape), shape)[0, :, 0].to(gpu.device)
    attention = numbers[1, :QUERIES].float().softmax(-1).bfloat16().T.contiguous().to(gpu.device)
    sparse = torch.sparse.to_sparse_semi_structured(values)
    difference = (torch.mm(sparse, attention) - torch.mm(values, attention)).float().norm()
    if not difference < 0.02 * torch.mm(values, attention).float().norm():
        raise KVTierError("bench gpu: torch's semi-structured product is not that of the same numbers as a dense matrix")

    def product(first: torch.Tensor) -> float:
        return seconds(lambda: stream.run(lambda: [torch.mm(first, attention) for _ in range(sizes.steps)]), stream)

    took = in_turns(run, {"sparse": partial(product, sparse), "dense": partial(product, values)})
    return Row("sparse24.matmul", took["sparse"] / sizes.steps * 1e6, "us", took["dense"] / sizes.steps * 1e6)
