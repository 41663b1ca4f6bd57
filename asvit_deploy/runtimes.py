"""The names of `--runtime`, and of the parameter `runtime`: all of them, here.

Nothing here imports a runtime, nor what runs one: `--help` lists them.
"""

from __future__ import annotations

from collections.abc import Sequence

from asvit_deploy.errors import UserError

ONNXRUNTIME, OPENVINO, TORCH, TENSORRT = "onnxruntime", "openvino", "torch", "tensorrt"
# OpenVINO rounding to bfloat16, as it would by itself on a CPU that can: it moves tokens, so it
# is run only where somebody names it.
OPENVINO_BF16 = "openvino-bf16"
NAMES = (ONNXRUNTIME, OPENVINO, OPENVINO_BF16, TORCH, TENSORRT)
# What `check` runs where nobody names a runtime: one more would double its time, and its answer is
# of interest to those who ship in it.
CHECKED = (ONNXRUNTIME, TENSORRT)
# What runs an artefact, by the kind that its sidecar or its name's ending says.
OF_KIND = {
    "onnx": (ONNXRUNTIME, OPENVINO, OPENVINO_BF16, TORCH),
    "engine": (TENSORRT,),
    "bucketed": (TENSORRT,),
}


def chosen(given: str | Sequence[str] | None) -> tuple[str, ...]:
    """The runtimes named, each once, in the order of `NAMES`; none stands for the usual ones.

    Args:
        given: names; each may be several with commas.

    Raises:
        UserError: one is none.
    """
    texts = [given] if isinstance(given, str) else list(given or ())
    named = [name.strip() for text in texts for name in text.split(",")]
    for name in named:
        if name not in NAMES:
            raise UserError(f"runtime has {name!r}; give some of {', '.join(NAMES)}")
    return tuple(name for name in NAMES if name in named)


def chosen_one(given: str | None) -> str | None:
    """As `chosen`, where only one can be run.

    Raises:
        UserError: it is none, or several.
    """
    named = chosen(given)
    if len(named) > 1:
        raise UserError(f"runtime has {', '.join(named)}; give one of them")
    return named[0] if named else None


def of_kind(path: object, kind: str, named: Sequence[str]) -> tuple[str, ...]:
    """Those of the runtimes named that run an artefact of this kind.

    Raises:
        UserError: some are named, and none of them does.
    """
    fit = tuple(name for name in named if name in OF_KIND[kind])
    if named and not fit:
        if kind == "onnx":
            hint = "an ONNX file; `asvit-deploy build-engine` makes an engine of it"
        else:
            hint = f"an engine, which only {TENSORRT} runs; name its ONNX file"
        raise UserError(f"{path} cannot be run by {' or '.join(named)}: it is {hint}")
    return fit


def require_used(named: Sequence[str], kinds: Sequence[str]) -> None:
    """Raise UserError for a runtime named that none of the artefacts' kinds is for."""
    for name in named:
        if kinds and not any(name in OF_KIND[kind] for kind in kinds):
            what = "no engine" if name == TENSORRT else "no ONNX file"
            raise UserError(f"--runtime names {name}, and there is {what} for it to run")
