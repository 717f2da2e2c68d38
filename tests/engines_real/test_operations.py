"""What the page on operations shows for Prometheus runs. Here, because vLLM brings `prometheus_client` along."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from prometheus_client import CollectorRegistry

from kvtier import PageLayout, TieredKVCache

PAGE = Path(__file__).parents[2] / "docs" / "operations.md"


def test_the_collector_exports_what_the_cache_counts():
    block = next(block for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL) if "Collector" in block)
    layout, ids = PageLayout(2, 2, 16, 2, 64, "fp32"), list(range(64))
    with TieredKVCache.open(None, layout, {"device.capacity_bytes": "1MiB", "host.capacity_bytes": "1MiB"}) as cache:
        cache.put(ids, torch.zeros(2, 2, 64, 2, 64))
        cache.acquire(cache.lookup(ids)).release()
        registry = CollectorRegistry()
        exec(block.replace("import REGISTRY", "import CollectorRegistry"), {"cache": cache, "REGISTRY": registry})
        assert registry.get_sample_value("kvtier_tier_used_bytes", {"tier": "device"}) == 4 * layout.page_bytes
        assert registry.get_sample_value("kvtier_tier_hit_tokens_total", {"tier": "device"}) == 64
