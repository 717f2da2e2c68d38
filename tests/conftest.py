"""What holds for all tests, before they import anything: Triton's interpreter where there is no GPU, and no clock in property tests."""

from __future__ import annotations

import os
from importlib.util import find_spec

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported

if find_spec("hypothesis"):  # the environments of the real engines have none
    from hypothesis import HealthCheck, settings

    profile = settings.get_current_profile_name()
    settings.register_profile("kvtier", settings.get_profile(profile), deadline=None, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("kvtier")
