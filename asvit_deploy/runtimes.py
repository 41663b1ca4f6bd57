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
AUTO = "auto"  # what `bench --save-choice` found, where a runtime is to be chosen
# What `check` runs where nobody names a runtime: one more would double its time, and its answer is
# of interest to those who ship in it.
CHECKED = (ONNXRUNTIME, TENSORRT)
# What runs an artefact, by the kind that its sidecar or its name's ending says.
OF_KIND = {
    "onnx": (ONNXRUNTIME, OPENVINO, OPENVINO_BF16, TORCH),
    "engine": (TENSORRT,),
    "bucketed": (TENSORRT,),
}


def chosen(given: str | Sequence[str] | None, auto: bool = False) -> tuple[str, ...]:
    """The runtimes named, each once, in the order of `NAMES`; none stands for the usual ones.

    Args:
        given: names; each may be several with commas.
        auto: take `AUTO` too, alone.

    Raises:
        UserError: one is none.
    """
    texts = [given] if isinstance(given, str) else list(given or ())
    named = [name.strip() for text in texts for name in text.split(",")]
    if AUTO in named:
        if not auto:
            raise UserError(
                "runtime auto is what bench finds out, so bench cannot be told it; name runtimes, "
                "or leave it out for all that are installed"
            )
        if set(named) != {AUTO}:
            raise UserError("runtime auto chooses by itself; give it alone, or leave it out")
        return (AUTO,)
    for name in named:
        if name not in NAMES:
            all_of_them = ", ".join(NAMES) + (f", or {AUTO}" if auto else "")
            raise UserError(f"runtime has {name!r}; give some of {all_of_them}")
    return tuple(name for name in NAMES if name in named)


def chosen_one(given: str | None) -> str | None:
    """As `chosen` with `auto`, where only one can be run.

    Raises:
        UserError: it is none, or several.
    """
    named = chosen(given, auto=True)
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


def require_library_used(library: object | None, named: Sequence[str]) -> None:
    """Raise UserError for an op's library where none of the runtimes named loads it."""
    if library is not None and named and not {ONNXRUNTIME, AUTO} & set(named):
        raise UserError(
            f"--library {library} is for {ONNXRUNTIME} alone, and {' and '.join(named)} would run "
            "here; leave it out"
        )


def require_auto(choice: object | None, named: Sequence[str]) -> None:
    """Raise UserError for a choice file that nothing would read."""
    if choice is not None and tuple(named) != (AUTO,):
        raise UserError(f"--choice {choice} is read by --runtime {AUTO} alone; add that")


def require_used(named: Sequence[str], kinds: Sequence[str]) -> None:
    """Raise UserError for a runtime named that none of the artefacts' kinds is for."""
    for name in named:
        if name == AUTO:
            if set(kinds) - {"onnx"}:
                raise UserError(
                    f"--runtime {AUTO} is for ONNX files, and only {TENSORRT} runs engines; name "
                    "the ONNX files alone"
                )
        elif kinds and not any(name in OF_KIND[kind] for kind in kinds):
            what = "no engine" if name == TENSORRT else "no ONNX file"
            raise UserError(f"--runtime names {name}, and there is {what} for it to run")
