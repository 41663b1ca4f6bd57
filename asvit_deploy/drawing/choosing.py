"""What of many is shown: cuts of a row, and pictures of a gallery."""

from __future__ import annotations

from collections.abc import Sequence

PANELS = 6  # cuts that a row shows, where nobody says
_EACH = 2  # pictures of a kind in the gallery


def shown(cuts: int, most: int) -> list[int]:
    """At most so many of the cuts, evenly spread from the first to the last; of one the last."""
    count = min(cuts, most)
    if count == 1:
        return [cuts - 1]
    return [round(place * (cuts - 1) / (count - 1)) for place in range(count)]


def kinds_of(kept: Sequence[int]) -> list[tuple[str, list[int]]]:
    """Which pictures a gallery shows: easy, normal and hard ones, by how many tokens they keep.

    Args:
        kept: of each picture, the sum over the cuts.

    Returns:
        kinds and places in `kept`; one kind without a name where all are alike.
    """
    order = sorted(range(len(kept)), key=lambda place: (kept[place], place))
    if kept[order[0]] == kept[order[-1]]:
        return [("", [order[place] for place in shown(len(order), 3 * _EACH)])]
    if len(order) == 2:
        return [("easy", order[:1]), ("hard", order[1:])]
    each = min(_EACH, len(order) // 3)
    middle = (len(order) - each) // 2
    return [("easy", order[:each]), ("normal", order[middle : middle + each]),
            ("hard", order[-each:])]  # fmt: skip
