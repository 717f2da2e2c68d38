"""Law checked: a warning that comes by the thousand is said at once, then once a minute with how many there were."""

from __future__ import annotations

import logging

from kvtier.repeated import EVERY_S, RepeatedWarning


def test_each_kind_is_said_at_once_and_then_now_and_then_with_how_often_it_was_not(caplog):
    now = 0.0
    warnings = RepeatedWarning(logging.getLogger("kvtier.some"), clock=lambda: now)
    for number in range(1000):
        warnings.say("io", "cannot write %d", number)
        warnings.say("checksum", "damaged")
    assert caplog.messages == ["cannot write 0", "damaged"]
    now = EVERY_S
    warnings.say("io", "cannot write %d", 7)
    now = 2 * EVERY_S
    warnings.say("io", "cannot write %d", 8)
    assert caplog.messages[2:] == ["cannot write 7 (and 999 more like it in the last 60 s)", "cannot write 8"]
