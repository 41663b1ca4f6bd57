"""`visualize`: the drawings of its folder, and how many tokens each picture keeps."""

from __future__ import annotations

from collections import Counter
from typing import Any

from asvit_deploy.drawing.choosing import PANELS, kinds_of, shown
from asvit_deploy.page.facts import Facts, Gallery, Histograms, Picture
from asvit_deploy.page.schema import (
    ACCOUNT,
    COMMON,
    Refused,
    count,
    each,
    named,
    plain_name,
    record,
    share,
    text,
)
from asvit_deploy.page.schema import any_number as score
from asvit_deploy.page.wording import percent

_MOST_TOKENS = 20_000
_ANSWER = record({"label": text}, {"index": count, "probability": share, "score": score})
_PICTURE = record(
    {"image": text, "file": plain_name, "kept": each(each(count, _MOST_TOKENS), 200)},
    {"added": each(count, 200), "answer": _ANSWER},
)
_FIELDS = record({"kind": text, "model": text, "image_tokens": count,
                  "pictures": each(_PICTURE, 100_000)}, {
    **COMMON, **ACCOUNT, "images": text, "blocks": each(count, 200), "panels": each(count, 200),
    "runner": named(text, 20),
})  # fmt: skip


def SCHEMA(value: object, at: str) -> dict[str, Any]:
    """Its fields, whose parts belong together: every picture has the same cuts."""
    fields: dict[str, Any] = _FIELDS(value, at)
    pictures = fields["pictures"]
    if not pictures or not (cuts := len(pictures[0]["kept"])):
        raise Refused("pictures has none, or none with a cut")
    if not 1 <= fields["image_tokens"] <= _MOST_TOKENS:
        raise Refused(f"image_tokens is {fields['image_tokens']}, of 1 to {_MOST_TOKENS:,}")
    for place, one in enumerate(pictures):
        if len(one["kept"]) != cuts:
            raise Refused(f"pictures[{place}] has {len(one['kept'])} cuts, the first has {cuts}")
        if any(len(stage) > fields["image_tokens"] for stage in one["kept"]):
            raise Refused(f"pictures[{place}] keeps more tokens than there are")
    if any(panel >= cuts for panel in fields["panels"] or []):
        raise Refused(f"panels names a cut of {cuts} that is not there")
    return fields


def tell(report: dict[str, Any]) -> Facts:
    facts = Facts(report["model"], "visualize", report["sha256"],
                  command=report["command"], machine=report["machine"])  # fmt: skip
    pictures, tokens = report["pictures"], report["image_tokens"]
    cuts = len(pictures[0]["kept"])
    places = report["panels"] or shown(cuts, PANELS)
    chosen = [
        Picture(one["image"], one["file"], kind, _answer(one["answer"]),
                [("input", f"{tokens} tokens"), *_captions(report, one, places, cuts)])
        for kind, numbers in kinds_of([sum(map(len, one["kept"])) for one in pictures])
        for one in (pictures[number] for number in numbers)
    ]  # fmt: skip
    facts.add("gallery", Gallery(_caption(chosen, len(pictures)), chosen, len(pictures)))
    counts = [Counter(len(one["kept"][cut]) for one in pictures) for cut in range(cuts)]
    facts.histograms = Histograms(
        report["images"] or "pictures of the drawings",
        [(f"after stage {cut}", [found[k] for k in range(tokens + 1)])
         for cut, found in enumerate(counts, 1)],
    )  # fmt: skip
    return facts


def _caption(chosen: list[Picture], of: int) -> str:
    said = f"{len(chosen)} of {of:,} picture{'s' * (of != 1)}"
    if chosen[0].kind:
        return f"{said}: easy ones keep the fewest tokens over the cuts, hard ones the most"
    return f"{said}, all of which keep the same number of tokens" if of > 1 else said


def _captions(
    report: dict[str, Any], one: dict[str, Any], places: list[int], cuts: int
) -> list[tuple[str, str]]:
    blocks, added = report["blocks"] or [], one["added"] or []
    found = []
    for cut in places:
        head = f"cut {cut + 1} of {cuts}"
        head += f", block\u00a0{blocks[cut]}" if cut < len(blocks) else ""
        more = f", {added[cut]} added" if cut < len(added) and added[cut] else ""
        found.append((head, f"{len(one['kept'][cut])} of {report['image_tokens']} stay{more}"))
    return found


def _answer(answer: dict[str, Any] | None) -> str:
    if answer is None:
        return ""
    if answer["score"] is not None:
        return f"score {answer['score']:.6g} {answer['label']}".rstrip()
    if answer["probability"] is None:
        return str(answer["label"])
    return f"{answer['label']}, {percent(answer['probability'])}"
