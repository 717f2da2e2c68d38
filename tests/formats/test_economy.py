"""Whether a byte stage pays, told from numbers alone."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtier.formats.economy import BEFORE_JUDGING, PROBE_EVERY, StageEconomy

MB = 1_000_000
SLOW, FAST = 100 * MB, 10_000 * MB


def fed(economy: StageEconomy, times: int, bytes_out: int, seconds: float, bytes_per_s: float = SLOW) -> StageEconomy:
    for _ in range(times):
        economy = economy.after(MB, bytes_out, seconds, bytes_per_s)
    return economy


def test_it_compresses_until_it_knows_better() -> None:
    assert StageEconomy().compress_next
    economy = fed(StageEconomy(), BEFORE_JUDGING - 1, MB, 1.0)
    assert economy.compress_next
    assert not fed(economy, 1, MB, 1.0).compress_next


@given(st.floats(0.01, 1), st.floats(1e-5, 1), st.floats(1e6, 1e11))
def test_it_pays_if_writing_and_reading_fewer_bytes_saves_more_time_than_it_takes(ratio: float, seconds: float, bytes_per_s: float) -> None:
    economy = fed(StageEconomy(), 50, round(ratio * MB), seconds, bytes_per_s)
    saved = 2 * (MB - round(ratio * MB)) / bytes_per_s
    if saved > 1.3 * seconds:
        assert economy.pays
    if saved < seconds / 1.3:
        assert not economy.pays


def test_the_same_pages_pay_on_a_slow_tier_and_not_on_a_fast_one() -> None:
    assert fed(StageEconomy(), 20, 700_000, 0.001, SLOW).pays
    assert not fed(StageEconomy(), 20, 700_000, 0.001, FAST).pays


def test_near_the_border_it_stays_as_it_is() -> None:
    """Saved 6 ms: neither 6.5 ms nor 5.5 ms of work change the verdict, whatever it was."""
    on = fed(StageEconomy(), 30, 700_000, 0.001)
    off = fed(StageEconomy(), 30, 700_000, 0.1)
    assert on.pays
    assert not off.pays
    for seconds in (0.0065, 0.0055):
        assert fed(on, 200, 700_000, seconds).pays
        assert not fed(off, 200, 700_000, seconds).pays


def test_one_odd_batch_changes_nothing_but_many_do() -> None:
    economy = fed(StageEconomy(), 30, 700_000, 0.003)
    assert fed(economy, 1, MB, 0.003).pays
    assert not fed(economy, 30, MB, 0.003).pays


def test_once_off_it_tries_again_now_and_then_and_comes_back_when_it_pays() -> None:
    economy = fed(StageEconomy(), 10, MB, 0.01)
    tries = 0
    for _ in range(10 * PROBE_EVERY):
        if economy.compress_next:
            tries += 1
            economy = economy.after(MB, MB, 0.01, SLOW)
        else:
            economy = economy.stored()
    assert tries == 9
    for _ in range(60 * PROBE_EVERY):
        economy = economy.after(MB, 500_000, 0.001, SLOW) if economy.compress_next else economy.stored()
    assert economy.pays


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 2 * MB), st.floats(0, 1)), max_size=60))
def test_what_it_remembers_is_bounded(history: list[tuple[bool, int, float]]) -> None:
    economy = StageEconomy()
    for compressed, bytes_out, seconds in history:
        economy = economy.after(MB, bytes_out, seconds, SLOW) if compressed else economy.stored()
    assert 0 <= economy.spent_s <= 10 + 1e-9
    assert -0.2 - 1e-9 <= economy.saved_s <= 0.2 + 1e-9


@pytest.mark.parametrize(("seconds", "bytes_per_s"), [(-0.1, 1.0), (0.1, 0.0), (0.1, -5.0)])
def test_impossible_measurements_are_refused(seconds: float, bytes_per_s: float) -> None:
    with pytest.raises(ValueError, match="stage economy"):
        StageEconomy().after(MB, MB, seconds, bytes_per_s)
