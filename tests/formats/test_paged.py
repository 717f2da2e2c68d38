"""Laws checked: a description of an engine's tensors is refused where their memory cannot be read as numbers."""

from __future__ import annotations

import pytest
import torch

from kvtier.errors import LayoutError
from kvtier.formats.paged import PagedKV
from kvtier.layout import PageLayout


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_tensors_that_begin_inside_a_number_are_refused(dtype: str) -> None:
    layout = PageLayout(2, 2, 16, 2, 64, dtype)
    memory = bytearray(3 * layout.page_bytes + 1)
    pool = torch.frombuffer(memory, dtype=layout.torch_dtype, offset=1).view(3, *layout.shape)
    with pytest.raises(LayoutError, match="layer 0, plane 0 begins at address"):
        PagedKV.of_pool(pool, layout)
    assert PagedKV.of_pool(pool.clone(), layout).layout is layout
