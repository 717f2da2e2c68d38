"""The one configuration tree: every section, key, default and unit.

The trees are frozen; the descriptions below are the text of docs/configuration.md (`kvtier config reference`).
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from kvtier.config.units import GiB, MiB
from kvtier.config.values import Bytes, FilePath, FixedFormat, NumaMode, PageFormat, Place, Switch
from kvtier.config.wording import comment_lines, yaml_lines

PolicyName = Literal[
    "a2cr",
    "lru",
    "fifo",
    "lru-2",
    "lfu",
    "lfu-in-cache",
    "lfu-da",
    "depth-discounted",
    "slru",
    "arc",
    "s3-fifo",
    "sieve",
    "w-tinylfu",
    "gdsf",
    "marconi",
    "reuse-probability",
    "a2cr-classic",
]
"""The names that `kvtier.policy.make_policy` knows."""
WritePolicy = Literal["write_back", "write_through", "write_through_selective"]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


_WRITE_POLICY = (
    "When pages are copied into this tier. `write_back`: when they are evicted from the tier above, or ahead of that once its pressure is "
    "over `mover.clean_pressure`. `write_through`: at once when they are committed above. `write_through_selective`: at use number "
    "`selective_uses`; pages that never reach it are dropped at eviction."
)
_SELECTIVE_USES = "The use at which `write_through_selective` copies a page into this tier; being committed counts as the first use."


class ModelConfig(_Section):
    name: str = Field(default="unnamed", description="Name of the model; part of every page key, so its pages are only found under it.")
    revision: str = Field(default="", description="Revision of its weights; part of every page key. Change it when they change.")


class PagesConfig(_Section):
    page_tokens: int = Field(default=16, ge=1, le=1024, description="Tokens per page, the unit that is placed, moved and reused.")


class DeviceConfig(_Section):
    capacity_bytes: Bytes = Field(default=1 * GiB, gt=0, description="Memory for pages the engine attends over, always stored raw.")
    place: Place = Field(default="auto", description="Where that memory is. `auto`: the current CUDA device, or the CPU.")
    free_memory_fraction: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="On a GPU: the share of its free memory to take at start, instead of `capacity_bytes`. 0: `capacity_bytes` counts.",
    )


class HostConfig(_Section):
    capacity_bytes: Bytes = Field(default=4 * GiB, gt=0, description="Host memory for copies.")
    format: FixedFormat = Field(
        default="q8", description="Page format (docs/formats.md), without byte stage. Only `raw` gives every bit back."
    )
    write_policy: WritePolicy = Field(default="write_back", description=_WRITE_POLICY)
    selective_uses: int = Field(default=2, ge=1, description=_SELECTIVE_USES)
    mlock: Switch = Field(default="auto", description="Never swap this memory out. `auto`: if the system allows it; `on`: or fail.")
    pin: Switch = Field(default="auto", description="Pin this memory for faster CUDA copies. `auto`: if CUDA is in use; `on`: or fail.")
    huge_pages: Switch = Field(
        default="auto",
        description="Pages of 2 MiB: faster start, fewer address translations. `on`: from the system's pool (`vm.nr_hugepages`), or fail. "
        "`auto`: from the pool if it has enough, else as many as the kernel finds. `off`: pages of 4 KiB.",
    )
    numa: NumaMode = Field(
        default="auto",
        description="Which NUMA nodes this memory is on. `auto`: that of the CUDA device, then the next nearest; left to the kernel where "
        "there is one node, or no device whose node is known. `interleave`: page by page over all nodes. `explicit`: those of "
        "`numa_nodes`, or fail. `layers`: of every page, each of `numa_nodes` has a range of layers. `off`: left to the kernel. Workers "
        "and storage threads run on the same nodes; pages go to the node they are used from.",
    )
    numa_nodes: tuple[int, ...] = Field(
        default=(),
        strict=False,
        title="a list of node numbers",
        description="Nodes of `numa: explicit`, which share the memory evenly and are filled in this order, or of `layers`, in the order "
        "of the layers. `kvtier numa topo` lists them.",
    )

    @model_validator(mode="after")
    def _nodes_are_named(self) -> HostConfig:
        if (self.numa in ("explicit", "layers")) != bool(self.numa_nodes):
            raise ValueError("numa: explicit (or layers) and numa_nodes belong together; give both, or neither")
        if len(set(self.numa_nodes)) != len(self.numa_nodes):
            raise ValueError(f"numa_nodes names a node twice: {list(self.numa_nodes)}")
        return self


class DiskConfig(_Section):
    path: FilePath = Field(description="Directory of the store; made if missing. Relative to the working directory; `~` is your home.")
    capacity_bytes: Bytes = Field(default=16 * GiB, gt=0, description="Disk space for copies.")
    format: PageFormat = Field(
        default="q4", description="Page format (docs/formats.md): one name, or `{k, v, layers, stage}`. Byte stages gain most on `raw`."
    )
    write_policy: WritePolicy = Field(default="write_back", description=_WRITE_POLICY)
    selective_uses: int = Field(default=2, ge=1, description=_SELECTIVE_USES)
    compress: Literal["always", "auto"] = Field(
        default="always",
        description="When the byte stage of `format` works. `always`: to save room, so not where the file system cannot punch holes and "
        "every copy takes the same. `auto`: only while the bytes it saves would take longer to write and read than packing them, as "
        "measured.",
    )
    durability: Literal["process", "power"] = Field(
        default="process",
        description="What committed copies survive. `process`: a crash of the process. `power`: a power cut too, with slower writes.",
    )
    io_engine: Literal["auto", "direct", "buffered", "aiofiles", "gds"] = Field(
        default="auto",
        description="How files are read and written. `direct`: past the page cache. `buffered`: through it. `aiofiles`: the same by "
        "asyncio, slower. `gds`: `direct`, and pages on their way to a GPU are read straight into its memory and verified there "
        "(GPUDirect Storage, kvtier[gds]; docs/performance.md); `format` without byte stage. `auto`: `direct` where the directory takes "
        "it, else `buffered`.",
    )
    io_depth: int = Field(default=8, ge=1, le=256, description="Most reads and writes under way at once, each on a thread of its own.")


class Band(_Section):
    above: float = Field(ge=0, lt=1, description="The band applies from this pressure (used / capacity) to the next band.")
    eviction_threshold: float = Field(ge=0, le=1, description="`policy.eviction_threshold` within the band.")
    time_decay_factor: float = Field(ge=0, description="`policy.time_decay_factor` within the band, per second.")


class PolicyConfig(_Section):
    name: PolicyName = Field(
        default="a2cr",
        description="Which pages leave a full tier (docs/policies.md). `a2cr`: those that promise least reuse per second, as learned from "
        "the tier's own traffic (docs/eviction.md); it has no weights to set. `lru`: the least recently used. `a2cr-classic`: those of "
        "least attention, use and recency, summed. The others are published baselines. On the Mooncake conversation trace, with room for "
        "5 % of the pages, these three find .2346, .2001 and .1345 of the tokens.",
    )
    admission: Literal["auto", "always"] = Field(
        default="auto",
        description="With `write_back`: which of the pages that leave a tier are written into the next. `auto`: those whose chance of "
        "another use, if the policy can tell, is at least that of the pages which leave the cache to make room. `always`: all of them.",
    )
    attention_weight: float = Field(default=0.4, ge=0, description="a2cr-classic: weight of the attention paid to a page, if reported.")
    frequency_weight: float = Field(default=0.3, ge=0, description="a2cr-classic: weight of how often a page is used.")
    recency_weight: float = Field(default=0.3, ge=0, description="a2cr-classic: weight of how recently a page was used.")
    time_decay_factor: float = Field(default=0.05, ge=0, description="a2cr-classic: decay of recency per second; larger forgets sooner.")
    eviction_threshold: float = Field(default=0.2, ge=0, le=1, description="a2cr-classic: pages scored below may leave before they must.")
    cleanup_interval: float = Field(
        default=60.0,
        gt=0,
        description="Seconds between checkpoints of the disk store, which shorten the start after a crash; a2cr-classic: also between "
        "looks for pages below the threshold.",
    )
    adaptive: bool = Field(
        default=True, description="a2cr-classic: take threshold and decay from `bands`, by pressure, not from the two keys above."
    )
    bands: tuple[Band, ...] = Field(
        default=(
            Band(above=0.0, eviction_threshold=0.2, time_decay_factor=0.02),
            Band(above=0.7, eviction_threshold=0.3, time_decay_factor=0.05),
            Band(above=0.9, eviction_threshold=0.4, time_decay_factor=0.1),
        ),
        strict=False,
        description="The bands of `adaptive`, by rising pressure: keep pages under 0.7, balance up to 0.9, then clean aggressively.",
    )
    hysteresis: float = Field(default=0.05, ge=0, lt=1, description="A band is left downwards once pressure is this far below its `above`.")

    @model_validator(mode="after")
    def _fits(self) -> PolicyConfig:
        if self.attention_weight + self.frequency_weight + self.recency_weight <= 0:
            raise ValueError("attention_weight, frequency_weight and recency_weight are all 0; at least one must be above 0")
        if not self.bands or self.bands[0].above != 0:
            raise ValueError("bands must start with one at above: 0")
        for lower, upper in zip(self.bands, self.bands[1:], strict=False):
            if upper.above <= lower.above:
                raise ValueError(f"bands must be ascending, but above: {upper.above} follows above: {lower.above}")
            if upper.above - lower.above <= self.hysteresis:
                raise ValueError(f"hysteresis {self.hysteresis} must be smaller than the gap of bands {lower.above} and {upper.above}")
        return self


class MoverConfig(_Section):
    workers: int = Field(default=2, ge=1, le=256, description="Threads that carry pages between tiers.")
    staging_bytes: Bytes = Field(
        default=64 * MiB,
        gt=0,
        description="Most scratch memory for transfers under way. Where a disk is below host memory, one worker's share more: for what is "
        "in memory and must not wait while all workers wait for the disk.",
    )
    restore: Literal["auto", "always"] = Field(
        default="auto",
        description="Which cached pages are brought up. `auto`: as many of a prefix's first ones as are faster to restore than to compute "
        "again, once the engine tells what computing takes (`record_prefill`); what that says too little about counts for restoring. "
        "`always`: all of them.",
    )
    prefetch_budget_bytes: Bytes | None = Field(
        default=None,
        ge=0,
        title='bytes, as a number or like "8GiB", or null',
        description="Most bytes prefetched but not yet used; 0: no prefetching. `null`: half of the device tier, one page at least.",
    )
    queue_bytes: Bytes = Field(default=256 * MiB, gt=0, description="Most bytes queued per link (pair of tiers) before back-pressure.")
    patience_s: float = Field(
        default=10.0,
        gt=0,
        description="In vLLM's connector, the longest a request waits for cached pages in all, in seconds; what has not come by then is "
        "computed.",
    )
    clean_pressure: float = Field(
        default=0.7, gt=0, le=1, description="With `write_back`: above this pressure, pages are copied down ahead."
    )


class AttentionConfig(_Section):
    digest_bytes: Bytes = Field(
        default=0,
        ge=0,
        description="Most memory, beside the device tier's, for page digests: what `record_queries` tells from how much attention a page "
        "gets. They take 3 % of the bytes of 16-token pages and half that of 64-token ones. 0: none are kept.",
    )


class Workload(_Section):
    name: str = Field(min_length=1, description="What requests of this class call themselves.")
    fetch_above: float = Field(
        ge=0, le=1, description="Share of attention on pages in host memory above which they are fetched, all else equal."
    )


class RoutingConfig(_Section):
    mode: Literal["auto", "fetch", "in_place"] = Field(
        default="auto",
        description="What `acquire_in_place` does with pages in host memory. `fetch`: bring them to the device. `in_place`: attend to them "
        "with the cores of their NUMA node. `auto`: whichever costs less, per request (docs/attention.md).",
    )
    threads_per_node: int = Field(default=2, ge=1, le=256, description="Threads on each NUMA node that attend in place.")
    attention_weight: float = Field(default=0.5, ge=0, description="Weight of the share of attention that goes to the pages in question.")
    utilisation_weight: float = Field(default=0.3, ge=0, description="Weight of how busy a side is: cores, or device and workers.")
    queue_weight: float = Field(default=0.2, ge=0, description="Weight of a side's share of everything that is queued.")
    measured_weight: float = Field(
        default=7.0,
        ge=0,
        description="Weight of what both ways took so far: the one expected to take r times as long costs so many times ln r more. With 7, "
        "attention never outweighs more than a tenth of the time at thresholds from 0.3 to 0.7. 0: loads and attention alone decide.",
    )
    workloads: tuple[Workload, ...] = Field(
        default=(
            Workload(name="default", fetch_above=0.5),
            Workload(name="creative_writing", fetch_above=0.3),
            Workload(name="code_generation", fetch_above=0.5),
            Workload(name="simple_qa", fetch_above=0.7),
        ),
        strict=False,
        description="Workload classes and their thresholds: a lower one sends more to the device. One is called `default`.",
    )

    @model_validator(mode="after")
    def _has_a_default(self) -> RoutingConfig:
        names = [workload.name for workload in self.workloads]
        if len(set(names)) != len(names) or "default" not in names:
            raise ValueError(f"workloads are {names}; expected one called default, and no name twice")
        return self


class Config(_Section):
    """Everything that can be configured. Build it with `load_config`, which names the file or variable a mistake came from."""

    model: ModelConfig = Field(default=ModelConfig(), description="Whose KV is cached.")
    pages: PagesConfig = Field(default=PagesConfig(), description="The unit of placement.")
    device: DeviceConfig = Field(default=DeviceConfig(), description="The tier the engine attends over.")
    host: HostConfig | None = Field(default=HostConfig(), description="Host memory below the device. `null`: no such tier.")
    disk: DiskConfig | None = Field(default=None, description="A store below the host that survives restarts. `null`: no such tier.")
    policy: PolicyConfig = Field(default=PolicyConfig(), description="Which pages leave a full tier; one policy object per tier.")
    mover: MoverConfig = Field(default=MoverConfig(), description="How bytes travel between the tiers, and the bounds on that.")
    attention: AttentionConfig = Field(default=AttentionConfig(), description="What is known of the attention that pages get.")
    routing: RoutingConfig = Field(default=RoutingConfig(), description="Whether pages in host memory are fetched or attended in place.")

    def to_yaml(self, comments: bool = False) -> str:
        """The whole tree as YAML that `load_config` reads back to an equal one; with `comments`, each key is explained."""
        lines = []
        for name, field in type(self).model_fields.items():
            section = getattr(self, name)
            lines += ["", *comment_lines(field, "")] if comments else []
            lines.append(f"{name}: null" if section is None else f"{name}:")
            for key, about in (type(section).model_fields if section is not None else {}).items():
                lines += comment_lines(about, "  ") if comments else []
                lines += yaml_lines(key, getattr(section, key))
        return "\n".join(lines).lstrip("\n") + "\n"
