"""How many of a trace's pages the tiers hold: as said on the command line, or as a configuration's bytes make it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from kvtier.config import Config, format_bytes
from kvtier.errors import KVTierError
from kvtier.replay.capacities import Capacity, Layout
from kvtier.replay.trace import Trace

TIERS = ("device", "host", "disk")


@dataclass(frozen=True)
class Room:
    """Tiers, warmest first, and what they hold. `cut`: more than a trace has is all it has, rather than a mistake."""

    text: str
    names: tuple[str, ...]
    capacities: tuple[Capacity, ...]
    cut: bool = False

    def pages(self, trace: Trace) -> list[int]:
        """Pages of each tier. KVTierError for more than the trace has, unless they are `cut`."""
        return [trace.distinct if self.cut and size.count > trace.distinct else size.pages(trace) for size in self.capacities]


def rooms_given(config: Config, capacities: str | None, tiers: Sequence[str]) -> list[Room]:
    """Rooms from `--capacity 1%,5%` (one tier each) or `--tiers device=1%,host=9%`. KVTierError for what the configuration has not."""
    if capacities is not None:
        return [Room(size.text, ("device",), (size,)) for size in map(Capacity.parse, capacities.split(","))]
    rooms = []
    for text in tiers:
        layout = Layout.parse(text)
        known = [name for name in TIERS if name in layout.names]
        if list(layout.names) != known:
            raise KVTierError(f"--tiers {text}: expected tiers of a configuration, warmest first: {', '.join(TIERS)}")
        missing = [name for name in known if getattr(config, name) is None]
        if missing:
            raise KVTierError(f"--tiers {text}: the configuration has no {missing[0]}; leave it out here, or add it there")
        rooms.append(Room(layout.text, layout.names, layout.capacities))
    if len({room.names for room in rooms}) > 1:
        raise KVTierError("--tiers names different tiers; expected the same ones in every --tiers, so that one configuration fits all")
    return rooms


def room_implied(config: Config, traces: Sequence[Trace], page_bytes: int) -> Room:
    """The room of the configuration's tiers if a page of the traces takes `page_bytes` raw.

    KVTierError if a tier holds none, or the first all. What a byte stage of the disk's format saves is not known beforehand: it counts as
    nothing.
    """
    names = tuple(name for name in TIERS if getattr(config, name) is not None)
    sizes = []
    for name in names:
        section = getattr(config, name)
        share = 1.0 if name == "device" else _encoded_share(config, section.format)
        pages = int(section.capacity_bytes / (page_bytes * share))
        if pages < 1:
            held = f"{format_bytes(section.capacity_bytes)} of {name} hold no page of {format_bytes(int(page_bytes * share))}"
            raise KVTierError(f"{held}, as --page-bytes makes it; raise {name}.capacity_bytes, or give --capacity or --tiers")
        sizes.append(Capacity(f"{pages}", None, pages))
    for trace in traces:
        if sizes[0].count >= trace.distinct:
            many = f"the device holds {sizes[0].count} pages, {trace.name} has {trace.distinct}"
            raise KVTierError(f"{many}: nothing ever has to leave; give a longer trace, or --capacity or --tiers")
    return Room(",".join(f"{name}={size.text}" for name, size in zip(names, sizes, strict=True)), names, tuple(sizes), cut=True)


def _encoded_share(config: Config, name: str) -> float:
    """Bytes in this format for a raw one, in pages like those of Llama-3-8B."""
    from kvtier.format_spec import parse_format
    from kvtier.formats import get_format
    from kvtier.layout import PageLayout

    layout = PageLayout(layers=32, planes=2, page_tokens=config.pages.page_tokens, kv_heads=8, head_dim=128)
    return get_format(replace(parse_format(name), stage=None)).payload_bytes(layout) / layout.page_bytes
