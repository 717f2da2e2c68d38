"""What callers of `kvtier.cache` hold, and what they do with it.

`lease.py` is the hold itself. How it gets its pages (`reading.py`), how an engine's KV, or another device's pages, get into pages
(`writing.py`, `fresh.py`), where attention goes (`attending.py`, `digesting.py`); sequences larger than their share of the device
(`budget.py`, `parked.py`), pages attended to in host memory (`in_place.py`, `routing.py`), pages by key for engines with a paged cache of
their own (`keyed.py`).
"""
