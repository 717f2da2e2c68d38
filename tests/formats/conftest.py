"""What tests of the native codecs share."""

from __future__ import annotations

import pytest

from tests.formats.rig import loaded


@pytest.fixture
def codecs():
    assert loaded is not None
    chosen = loaded.features()
    yield loaded
    loaded.use(chosen)
