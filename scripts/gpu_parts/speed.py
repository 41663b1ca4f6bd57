"""The kernel's bandwidth and latency."""

from __future__ import annotations

import json

from gpu_parts.calls import drive
from gpu_parts.kit import Kit, Report, target

COPY_SHARE, LATENCY_US = 0.70, 10.0


def speed(kit: Kit) -> Report:
    """Bandwidth beside a device copy at B=64, M=577, D=768; latency at B=1, M=197, D=384; half."""
    said = drive(kit.program("driver"), kit.file("plugin"), "bench", b"").read()
    result = json.loads(said)
    share = min(row["share"] for row in result["bandwidth"])
    return {
        **result,
        "share_of_a_copy": target(share, COPY_SHARE, at_most=False),
        "us_a_call": target(result["latency"]["in_stream_us"], LATENCY_US, at_most=True),
    }
