"""Triton kernels that gather, code and scatter pages on a GPU; `why_missing(device)` says where they cannot be used, and why.

One source for every engine layout and codec (`pages.py`), launched by `launch.py`; `kvtier.formats.on_device` chooses between them and
the torch reference, whose bytes they give. They also run in Triton's interpreter on a CPU (TRITON_INTERPRET=1), slowly: for tests.
Importing this file needs no Triton.
"""

from kvtier.cuda.kernels import triton_version, why_missing

__all__ = ["triton_version", "why_missing"]
