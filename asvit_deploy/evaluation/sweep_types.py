"""What a sweep of `bench` found, as it stands in the JSON."""

from __future__ import annotations

from typing import Literal, TypedDict

from asvit_deploy.evaluation.timing import Interval, Macs

Over = Literal["batch", "budget", "size"]
Kind = Literal["dense", "adaptive", "static"]


class SweepMacs(Macs):
    """As PyTorch counts them in float32; `share` is of the dense MACs as budgets have it, and
    `asked` the one that thresholds or counts were fitted to, None where they are the file's own."""

    share: float
    asked: float | None


class _Timed(TypedDict):
    name: str
    runtime: str
    kind: Kind
    singly: bool
    packed: bool
    precision: str
    runner: dict[str, str]
    gmacs: float
    p50_ms: float
    p90_ms: float
    p99_ms: float
    min_ms: float


class SweepRow(_Timed, total=False):
    """A variant at one point: times and MACs are per picture.

    `singly` says that a batch was run one picture after the other, `packed` that its linear layers
    ran on the rows of all pictures and nothing padded them. `speedup` is over the fastest
    dense row of the runtime, `over_static` of an adaptive row over its fastest static one.
    """

    speedup: Interval
    share_of_macs_ratio: Interval
    over_static: Interval


class SweepPoint(TypedDict):
    """One value of what a sweep goes over; `warmup` and `runs` are rounds of a whole batch."""

    at: float
    batch: int
    image_size: int
    warmup: int
    runs: int
    macs: SweepMacs
    rows: list[SweepRow]
    notes: list[str]
    busy: str | None


class Sweep(TypedDict):
    """All points, in rising order, and for each runtime from where on adaptive wins."""

    over: Over
    points: list[SweepPoint]
    notes: list[str]
    verdict: list[str]
