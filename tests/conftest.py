"""Before anything imports Triton: without a GPU its kernels run in its interpreter. It reads this when it is imported.

Where that is decided already, torch is not imported for it: in an emulated machine that takes half a minute."""

from __future__ import annotations

import os

if "TRITON_INTERPRET" not in os.environ:
    import torch

    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"
