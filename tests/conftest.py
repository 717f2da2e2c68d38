"""What holds for all tests, before they import anything: one thread for torch, Triton's interpreter where there is no GPU, and no
clock in property tests.

What is decided already, or not needed, is not imported: in an emulated machine that takes half a minute.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator

import pytest

# Read when torch is imported, also by what tests start. `make test` runs as many tests at once as there are cores; threads of each that
# wait for each other over small tensors would only be in the others' way.
os.environ.setdefault("OMP_NUM_THREADS", "1")

if "TRITON_INTERPRET" not in os.environ:
    import torch

    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported


def pytest_configure(config: pytest.Config) -> None:
    """A busy machine is no failure. The environments of the real engines, and the emulated machine, do without Hypothesis."""
    if config.pluginmanager.has_plugin("hypothesispytest"):
        from hypothesis import HealthCheck, settings

        profile = settings.get_profile(settings.get_current_profile_name())
        settings.register_profile("kvtier", profile, deadline=None, suppress_health_check=[HealthCheck.too_slow])
        settings.load_profile("kvtier")


class _Failed(logging.Handler):
    """Keeps what an event loop says went wrong where nobody waits for it: a callback, a task that nobody asked."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(self.format(record))


@pytest.fixture(autouse=True)
def no_callback_fails() -> Iterator[None]:
    """Callbacks of event loops raise to nobody: the test in which one did fails."""
    failed = _Failed()
    logging.getLogger("asyncio").addHandler(failed)
    yield
    logging.getLogger("asyncio").removeHandler(failed)
    assert not failed.messages, "\n".join(failed.messages)
