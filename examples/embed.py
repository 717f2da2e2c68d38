"""A toy engine that embeds kvtier: look up, restore, compute what is missing, attend, keep it. Run: python examples/embed.py"""

from __future__ import annotations

import tempfile

import torch

from kvtier import PageLayout, TieredKVCache

LAYOUT = PageLayout(layers=2, planes=2, page_tokens=16, kv_heads=2, head_dim=64, dtype="fp32")


def compute_kv(tokens: list[int]) -> torch.Tensor:
    """Stands for the model's forward pass: `[layers, planes, tokens, kv_heads, head_dim]`, the same for the same tokens."""
    rows = [torch.randn(2, 2, 1, 2, 64, generator=torch.Generator().manual_seed(token)) for token in tokens]
    return torch.cat(rows, dim=2)


def attend(pool: torch.Tensor, block_table: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    """Attention of one query `[kv_heads, head_dim]` over the pages of a block table, in one layer."""
    keys, values = pool[block_table].permute(1, 3, 0, 2, 4).flatten(2, 3)  # each [kv_heads, tokens, head_dim]
    return torch.nn.functional.scaled_dot_product_attention(query[:, None], keys, values)[:, 0]


def serve(cache: TieredKVCache, prompt: list[int]) -> int:
    """One request; returns how many of its tokens did not have to be computed."""
    with cache.acquire(cache.lookup(prompt)) as lease:  # starts the transfers, returns at once
        lease.wait()
        reused = lease.tokens
        cache.append(lease, prompt[reused:], compute_kv(prompt[reused:]))
        table = torch.from_numpy(lease.block_table)
        for layer in range(LAYOUT.layers):
            attend(lease.layer(layer), table, torch.ones(2, 64))
    return reused


def main() -> None:
    """More sessions than the device and the host can hold; then each comes back."""
    with tempfile.TemporaryDirectory() as store:
        settings = {
            "model.name": "toy",
            "device.capacity_bytes": 24 * LAYOUT.page_bytes,
            "host.capacity_bytes": 16 * LAYOUT.page_bytes,
            "host.format": "raw",
            "disk.path": store,
            "disk.capacity_bytes": "64MiB",
            "disk.format": "raw+lz4",
        }
        with TieredKVCache.open(None, LAYOUT, settings) as cache:
            prompts = [[1000 * session + position for position in range(160)] for session in range(8)]
            first = [serve(cache, prompt) for prompt in prompts]
            again = [serve(cache, [*prompt, 7]) for prompt in prompts]
            print(f"first visit: {sum(first)} tokens reused; second visit: {sum(again)} of {sum(map(len, prompts))}")


if __name__ == "__main__":
    main()
