"""A prefix that is read in parts, the first of which is on its way before the others are planned: what one part lacks, the lease lacks."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvtier.formats import native
from kvtier.io import native_pool
from kvtier.io.files import BLOCK_BYTES
from kvtier.residency import copying
from kvtier.tiers.disk import DiskTier
from tests.cache.rig import assert_right, flip_on_disk, hold, make_cache, push_out, put, run, tiers_of

PAGES = 8
compiled = pytest.mark.skipif(
    bool(native.why_missing() or native_pool.why_missing()), reason=f"{native.why_missing()} {native_pool.why_missing()}"
)


@compiled
@pytest.mark.parametrize("torn", [[], [0], [2], [3], [7], [1, 6], [5, 6]])
def test_law_1_a_torn_page_in_any_part_cuts_the_prefix_before_it_and_the_others_are_right(tmp_path: Path, monkeypatch, torn: list[int]):
    begun: list[int] = []
    place_ahead = DiskTier.place_ahead

    def noted(self, slots, *others):
        some = place_ahead(self, slots, *others)
        begun.append(0 if some is None else len(slots))
        return some

    monkeypatch.setattr(DiskTier, "place_ahead", noted)
    monkeypatch.setattr(copying, "FIRST_BYTES", 3 * BLOCK_BYTES)  # so much a record has here
    with make_cache(tmp_path / "store", device_pages=PAGES, host_pages=None, disk__format="raw", mover__workers=2) as cache:
        tokens = run(1, PAGES)
        put(cache, tokens)
        push_out(cache)
        table = cache._residency.table
        for number in torn:
            flip_on_disk(cache, table.row(cache.lookup(tokens).keys[number]), 300)
        begun.clear()
        with hold(cache, tokens) as lease:
            assert begun == [3, PAGES - 3], "both parts are read ahead of the workers"
            assert lease.tokens == min(torn, default=PAGES) * len(tokens) // PAGES
            assert_right(lease, tokens)
        cache.check_integrity()
        assert sum(cache.stats()["tiers"]["disk"]["refused"].values()) == len(torn)
        assert [bool(tiers) for tiers in tiers_of(cache, tokens)] == [number not in torn for number in range(PAGES)]
        put(cache, tokens)
        push_out(cache)
        with hold(cache, tokens) as lease:
            assert lease.tokens == len(tokens)
            assert_right(lease, tokens)
        assert cache._residency.mover.staging._idle[None].qsize() == 2


@compiled
def test_a_prefix_larger_than_the_device_comes_as_far_as_there_is_room(tmp_path: Path):
    with make_cache(tmp_path / "store", device_pages=PAGES, host_pages=None, disk__format="raw", mover__workers=2) as cache:
        tokens, other = run(1, PAGES), run(2, 3)
        put(cache, tokens)
        push_out(cache)
        put(cache, other)
        with hold(cache, other), hold(cache, tokens) as lease:
            assert lease.tokens == (PAGES - 3) * len(tokens) // PAGES
            assert_right(lease, tokens)
        cache.check_integrity()
