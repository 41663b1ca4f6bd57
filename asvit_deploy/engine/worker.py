"""The builder's own process, which `process` starts: one argument, the job's file.

TensorRT ends the process on some faults, and Polygraphy's switch to RTX holds for a whole process:
so a build gets one of its own. It speaks in JSON lines on what was its stdout; what libraries print
goes to stderr.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from asvit_deploy.engine.job import Job

Send = Callable[..., None]  # a message: what it is about, and its fields


class Refused(Exception):
    """The build cannot go on, for a reason that needs no traceback."""


def _open_channel() -> Send:
    """Take stdout for messages and give everyone else stderr."""
    channel = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    return lambda event, **fields: print(json.dumps({"event": event, **fields}), file=channel)


def _leave_interrupts() -> None:
    """Ctrl-C is the parent's business; that this ends with it, `child.command` sees to."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _import_binding(job: Job) -> Any:
    """The binding, also under the plain name that Polygraphy imports."""
    trt = importlib.import_module(job.module)
    sys.modules.setdefault("tensorrt" if job.enterprise else "tensorrt_rtx", trt)
    return trt


def _logger(trt: Any, send: Send, errors: list[str]) -> Any:
    class Logger(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity == trt.ILogger.Severity.WARNING:
                send("warning", message=message)
            elif severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                errors.append(message)

    return Logger()


def _monitor(trt: Any, send: Send) -> Any:
    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.steps: dict[str, int] = {}  # of the outermost phases

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            if parent is None:
                self.steps[phase] = steps
                send("progress", phase=phase, done=0, of=steps)

        def step_complete(self, phase: str, step: int) -> bool:
            if phase in self.steps:
                send("progress", phase=phase, done=step + 1, of=self.steps[phase])
            return True

        def phase_finish(self, phase: str) -> None:
            if phase in self.steps:
                send("progress", phase=phase, done=self.steps[phase], of=self.steps[phase])

    return Monitor()


def _load_plugin(trt: Any, path: str, creator: tuple[str, str, str]) -> None:
    registry = trt.get_plugin_registry()
    try:
        handle = registry.load_library(path)
    except Exception as error:
        raise Refused(f"the plugin library {path} cannot be loaded ({error})") from None
    if handle is None:
        raise Refused(f"the plugin library {path} cannot be loaded")
    creators = [(c.name, c.plugin_version, c.plugin_namespace) for c in registry.all_creators]
    if creator not in creators:
        raise Refused(f"{path} holds no plugin {creator[0]} of version {creator[1]}")


def _config(trt: Any, job: Job, send: Send) -> Callable[..., Any]:
    """The builder's configuration as a Polygraphy loader."""
    from polygraphy.backend.trt import CreateConfig, PostprocessConfig, Profile

    profiles = []
    for shapes in job.profiles or [{}]:
        profiles.append(Profile())
        for name, bounds in shapes.items():
            profiles[-1].add(name, *bounds)
    common: dict[str, Any] = {"profiles": profiles, "progress_monitor": _monitor(trt, send)}
    if job.workspace is not None:
        common["memory_pool_limits"] = {trt.MemoryPoolType.WORKSPACE: job.workspace}
    if job.level is not None:
        common["builder_optimization_level"] = job.level
    if job.enterprise:
        config = CreateConfig(**common, **_enterprise_options(trt, job))
    else:
        from polygraphy.backend.tensorrt_rtx import CreateConfigRTX

        targets = [(int(sm[:-1]), int(sm[-1])) for sm in job.target_sms]
        known = [name for name in trt.ComputeCapability.__members__ if name.startswith("SM")]
        for sm in job.target_sms:
            if f"SM{sm}" not in known:
                numbers = ", ".join(name.removeprefix("SM") for name in known)
                raise Refused(f"it does not build for SM{sm}; it knows {numbers}")
        config = CreateConfigRTX(compute_capabilities=targets or None, **common)

    def finish(builder: Any, network: Any, config: Any) -> None:
        # Polygraphy turns TF32 off for the enterprise flavour alone; float32 means float32 on both.
        config.clear_flag(trt.BuilderFlag.TF32)
        # RTX promises CUDA graphs only where nothing is allocated while an engine runs.
        flag = trt.BuilderFlag.__members__.get("REQUIRE_USER_ALLOCATION")
        if flag is not None and not job.stages:
            config.set_flag(flag)
        if job.embed_plugin:
            config.plugins_to_serialize = [job.plugin]

    return PostprocessConfig(config, finish)


def _enterprise_options(trt: Any, job: Job) -> dict[str, Any]:
    """Enterprise only, not executed yet."""
    options: dict[str, Any] = {"version_compatible": job.version_compatible}
    if job.hardware_compatible:
        options["hardware_compatibility_level"] = trt.HardwareCompatibilityLevel.AMPERE_PLUS
    if (cache := _timing_cache(trt, job)) and Path(cache).is_file():
        options["load_timing_cache"] = cache
    return options


def _timing_cache(trt: Any, job: Job) -> str | None:
    """The cache's file; timings of one version say nothing about another."""
    return job.timing_cache and str(Path(job.timing_cache) / f"timing-{trt.__version__}.cache")


def _flags(trt: Any) -> list[Any]:
    """Parser flags by name: what a version lacks, it does not need."""
    known = trt.OnnxParserFlag.__members__
    return [known[n] for n in ("NATIVE_INSTANCENORM", "ENABLE_PLUGIN_OVERRIDE") if n in known]


def build(job: Job, send: Send) -> None:
    """Build the engine and send messages about it; a fault that TensorRT reports is one of them."""
    send("stage", name="starting")
    trt = _import_binding(job)
    from polygraphy.backend.trt import EngineBytesFromNetwork, NetworkFromOnnxPath, util
    from polygraphy.exception import PolygraphyException
    from polygraphy.logger import G_LOGGER

    errors: list[str] = []
    G_LOGGER.module_severity = G_LOGGER.CRITICAL
    util.TRT_LOGGER = _logger(trt, send, errors)  # Polygraphy has no other door for a logger
    try:
        if job.plugin:
            send("stage", name="loading the plugin")
            _load_plugin(trt, job.plugin, job.creator)
        send("stage", name="reading the graph")
        typed = "STRONGLY_TYPED" in trt.NetworkDefinitionCreationFlag.__members__
        parsed = NetworkFromOnnxPath(job.onnx, flags=_flags(trt), strongly_typed=typed)()
        kinds = [parsed[1].get_layer(i).type.name for i in range(parsed[1].num_layers)]
        if kinds.count("PLUGIN_V3") != job.stages:
            raise Refused(f"the network holds {kinds.count('PLUGIN_V3')} plugin layers of "
                          f"{job.stages}: the op was not taken from the plugin")  # fmt: skip
        send("stage", name="building")
        config = _config(trt, job, send)
        cache = _timing_cache(trt, job)
        plan = bytes(EngineBytesFromNetwork(parsed, config=config, save_timing_cache=cache)())
        Path(job.plan).write_bytes(plan)
        if job.layers:
            _inspect(trt, plan, job)
        given = [parsed[1].get_output(i) for i in range(parsed[1].num_outputs)]
        outputs = {one.name: [one.dtype.name, *one.shape] for one in given}
        send("done", version=trt.__version__, layers=len(kinds),
             plugin_layers=kinds.count("PLUGIN_V3"), outputs=outputs)  # fmt: skip
    except (Refused, PolygraphyException) as error:
        send("error", message=str(error), log=errors)


def _inspect(trt: Any, plan: bytes, job: Job) -> None:
    """Enterprise only, not executed yet: the engine's layers as JSON. Needs the GPU."""
    runtime = trt.Runtime(_logger(trt, lambda *_, **__: None, []))
    if job.embed_plugin or job.version_compatible:
        runtime.engine_host_code_allowed = True
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        raise Refused("the engine was built, but cannot be opened for --layers")
    inspector = engine.create_engine_inspector()
    text = inspector.get_engine_information(trt.LayerInformationFormat.JSON)
    Path(job.layers or "").write_text(text)


def main() -> None:
    """Run one job."""
    _leave_interrupts()
    send = _open_channel()
    build(Job.load(Path(sys.argv[1])), send)
    # Destructors of a half-built network may crash; everything is written by now.
    sys.stderr.flush()
    os._exit(0)
