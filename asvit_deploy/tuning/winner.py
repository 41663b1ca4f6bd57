"""The winner as files: checkpoint, ONNX, its engine, and how this machine runs it fastest."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from asvit_deploy import sidecar
from asvit_deploy.artefacts import bundle
from asvit_deploy.artefacts.engine_file import EngineArtefact, way_of
from asvit_deploy.artefacts.onnx_file import OnnxArtefact
from asvit_deploy.artefacts.opening import open_artefact
from asvit_deploy.artefacts.runtime_choice import engine_fields
from asvit_deploy.checkpoints.load import save_checkpoint
from asvit_deploy.checkpoints.places import fingerprint, source_of
from asvit_deploy.evaluation.machine import machine
from asvit_deploy.evaluation.saved_choice import choice_fields
from asvit_deploy.files import write_text
from asvit_deploy.precision import FLOAT32
from asvit_deploy.runtimes import TENSORRT
from asvit_deploy.sidecar import provenance
from asvit_deploy.tuning.graphs import INT8, Graphs
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
    # All else is computed in by what runs the file, or by an engine that is built from it.
    precision = INT8 if won.entry.precision == INT8 else FLOAT32.name
    made = graphs.artefact(candidate, precision, graphs.size(won.entry, timing.batch))
    save_checkpoint(place.checkpoint, graphs.network(candidate), metadata)
    made.write(
        place.model, source=source_of(place.checkpoint, format="asvit-deploy", ema=False),
        compared={"pictures": pictures.source, **pictures.account}, tuned=promise,
    )  # fmt: skip
    place.choice.unlink(missing_ok=True)  # an earlier run's is of another file
    library = graphs.library if won.entry.library else None
    artefact, more = OnnxArtefact(place.model, library), dict[str, Any]()
    if won.entry.runtime == TENSORRT:
        engine = _put_engine(graphs.engine(won.entry, timing.batch), artefact, place, promise)
        way, more["engine"] = way_of(won.entry.graph), engine_fields(engine)
        place.clear_engines(keep=engine.path)
    else:
        # Of ONNX Runtime's the function comes before the library.
        *_, way = artefact.ways(threads, runtimes=(won.entry.runtime,))
        place.clear_engines()
    fields = choice_fields(
        place.model.name, artefact.fields, won.entry.runtime, way, threads, won.p50_ms,
        won.entry.name, timing.runners[won.number], machine(), timing.batch, verdict="adaptive",
        speedup=won.over, runs=len(timing.seconds[won.number]), images=pictures.source, **more,
    )  # fmt: skip
    write_text(place.choice, sidecar.signed(fields))


def _put_engine(
    built: Path, onnx: OnnxArtefact, place: Place, promise: dict[str, Any]
) -> EngineArtefact:
    """The plan that was judged and timed, or the folder of them, beside the file that it was built
    from.

    Raises:
        UserError: it cannot be written.
    """
    own = open_artefact(built).fields
    source = sidecar.source_of(onnx.path, checkpoint=onnx.fields["source"])
    fields = {**own, "source": source, "tuned": promise}
    if built.is_dir():
        target = place.bundle
        bundle.write(target, {name: (built / name).read_bytes() for name in own["files"]}, fields)
    else:
        target = place.engine
        sidecar.write(target, built.read_bytes(), fields)
    artefact = open_artefact(target)
    assert isinstance(artefact, EngineArtefact)
    return artefact
