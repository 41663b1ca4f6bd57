"""The winner as files: checkpoint, ONNX, and how this machine runs it fastest."""

from __future__ import annotations

import json
from typing import Any

from asvit_deploy import sidecar
from asvit_deploy.artefacts.onnx_file import OnnxArtefact
from asvit_deploy.checkpoints.load import save_checkpoint
from asvit_deploy.checkpoints.places import fingerprint, source_of
from asvit_deploy.evaluation.machine import machine
from asvit_deploy.evaluation.saved_choice import choice_fields
from asvit_deploy.files import write_text
from asvit_deploy.sidecar import provenance
from asvit_deploy.tuning.graphs import BF16, Graphs
from asvit_deploy.tuning.latency import Timing
from asvit_deploy.tuning.pictures import Pictures
from asvit_deploy.tuning.place import Place
from asvit_deploy.tuning.verdict import Verdict


def write(
    verdict: Verdict, timing: Timing, graphs: Graphs, pictures: Pictures, place: Place,
    threads: int, promise: dict[str, Any],
) -> None:  # fmt: skip
    """Put the winner into its folder: the bytes that were judged and timed.

    Each file replaces an earlier run's only once it is whole: a full disk takes nothing away.

    Raises:
        UserError: it cannot be written.
    """
    won = verdict.winner
    assert won is not None
    candidate, checkpoint = won.test.candidate, graphs.checkpoint
    described = graphs.described(candidate)
    metadata = {
        **described.metadata, **checkpoint.origins.metadata(),
        "source_sha256": fingerprint(checkpoint.path),
        "calibration": json.dumps({**candidate.fields(), "pictures": pictures.source}),
        "provenance": json.dumps(provenance(["torch"])),
    }  # fmt: skip
    precision = "float32" if won.entry.precision == BF16 else won.entry.precision
    made = graphs.artefact(candidate, precision, won.entry.size(timing.batch))
    save_checkpoint(place.checkpoint, graphs.network(candidate), metadata)
    made.write(
        place.model, source=source_of(place.checkpoint, format="asvit-deploy", ema=False),
        compared={"pictures": pictures.source, **pictures.account}, tuned=promise,
    )  # fmt: skip
    place.choice.unlink(missing_ok=True)  # an earlier run's is of another file
    artefact = OnnxArtefact(place.model)
    way = next(iter(artefact.ways(threads, runtimes=(won.entry.runtime,)).runtimes))
    fields = choice_fields(
        place.model.name, artefact.fields, won.entry.runtime, way, threads, won.p50_ms,
        won.entry.name, timing.runners[won.number], machine(), timing.batch, verdict="adaptive",
        speedup=won.over, runs=len(timing.seconds[won.number]), images=pictures.source,
    )  # fmt: skip
    write_text(place.choice, sidecar.signed(fields))
