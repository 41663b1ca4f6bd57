"""The plugin on device buffers, against the oracle: results, graphs, contexts."""

from __future__ import annotations

from collections.abc import Iterator

from gpu_parts.calls import (
    TYPES,
    Call,
    chains,
    check,
    check_chain,
    drive,
    plain,
    random_calls,
    stored_calls,
)
from gpu_parts.kit import Kit, Report

KINDS = range(len(TYPES))


def oracle_calls(kit: Kit) -> Iterator[list[Call]]:
    """Calls over the ranges of the contract and beyond, in portions that fit a pipe."""
    yield random_calls(200, 1)
    for kind in KINDS:
        yield stored_calls(kit.root, kind)
        for rows in (2, 3, 33, 197, 577):
            for width in (64, 192, 384, 768):
                yield [plain((images, rows, width), kind, threshold)
                       for images in (1, 2, 8) for threshold in (0.3, 2.0, -1.0)]  # fmt: skip
        for rows, prefix in ((3, 2), (198, 2), (201, 5), (261, 5), (1374, 5)):
            yield [plain((images, rows, 384), kind, threshold, prefix)
                   for images in (1, 8) for threshold in (0.3, 2.0, -1.0)]  # fmt: skip
        yield [plain((256, 197, 384), kind, 0.3), plain((256, 2, 64), kind, 0.5)]
        yield [plain((256, 201, 384), kind, 0.3, 5), plain((1, 4096, 64), kind, 2.0, 4095)]
        yield [plain((64, 577, 768), kind, 0.3), plain((1, 4096, 64), kind, 0.5)]


def oracle(kit: Kit) -> Report:
    """One kept and all kept, ties, NaN, infinities, prefixes, three types, B to 256: equal bits."""
    driver, plugin = kit.program("driver"), kit.file("plugin")
    count = 0
    for number, calls in enumerate(oracle_calls(kit)):
        # A rehearsal keeps the small portions whole; the others take gigabytes.
        if kit.rehearse and number > 1:
            break
        check(driver, plugin, calls)
        count += len(calls)
        kit.save({"calls": count})
    return {"calls": count, "types": list(TYPES)}


def graph_capture(kit: Kit) -> Report:
    """The launch captured before its inputs are there, replayed twice; both widths of `size`."""
    driver, plugin = kit.program("driver"), kit.file("plugin")
    calls = kit.some([call for kind in KINDS for call in stored_calls(kit.root, kind)])
    for bits in (32, 64):
        check(driver, plugin, calls, "graph", bits)
    return {"calls": len(calls), "size_bits": [32, 64]}


def contexts(kit: Kit) -> Report:
    """What a runtime does around `enqueue`: clones, changing shapes, chains, two streams."""
    driver, plugin = kit.program("driver"), kit.file("plugin")
    drive(driver, plugin, "configure", b"")
    cases = kit.some([call for kind in KINDS for call in stored_calls(kit.root, kind)], 4)
    busy = [plain(shape, kind, 0.3) for kind in KINDS
            for shape in ((8, 197, 384), (1, 577, 768), (64, 197, 384), (3, 33, 64))]  # fmt: skip
    busy += [plain((8, rows, 384), kind, 0.3, prefix) for kind in KINDS
             for rows, prefix in ((198, 2), (261, 5))]  # fmt: skip
    pairs = busy if not kit.rehearse else busy[::2][: len(busy) // 4 * 2]
    chained = [calls for kind in KINDS for calls in chains(kit.root, kind)]
    done: Report = {"configure": "passed"}
    for bits in (32, 64):
        check(driver, plugin, cases, "run", bits)
        check(driver, plugin, cases, "reshape", bits)
        check(driver, plugin, pairs[: len(pairs) // 2 * 2], "streams", bits)
        for calls in chained:
            check_chain(driver, plugin, calls, bits)
        done[f"size_{bits}_bits"] = {
            "calls": len(cases), "shape_changes": len(cases), "on_two_streams": len(pairs),
            "chains_of_three": len(chained),
        }  # fmt: skip
        kit.save(done)
    return done
