"""TensorRT's warnings: those that say nothing about our graphs, each with the reason."""

from __future__ import annotations

import re
from collections.abc import Iterable

# (pattern, why it needs nobody's attention)
EXPECTED = (
    (
        r"Make sure (input|output) \w+ has Int64 binding",
        "our token counts are int64 by contract, and runners bind them so",
    ),
)


def unexpected(warnings: Iterable[str]) -> list[str]:
    """The warnings that are not on the list, each once, in order."""
    rest = (w for w in warnings if not any(re.search(pattern, w) for pattern, _ in EXPECTED))
    return list(dict.fromkeys(rest))
