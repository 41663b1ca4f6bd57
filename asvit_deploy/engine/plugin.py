"""The op's TensorRT library, for a build that needs it."""

from __future__ import annotations

from dataclasses import replace

from asvit_deploy.engine.build import Options
from asvit_deploy.errors import UserError
from asvit_deploy.ops import trt_library
from asvit_deploy.runners.trt_flavour import Flavour
from asvit_deploy.status import Say


def with_plugin(options: Options, flavour: Flavour, say: Say) -> Options:
    """The options with the op's library: the one named, the one built before, or built now.

    Raises:
        UserError: the one named is none that will do, or none can be built.
    """
    runs = flavour.enterprise or options.embed_plugin
    if (named := options.plugin) is not None:
        if not named.is_file():
            raise UserError(
                f"{named} does not exist; `asvit-deploy build-plugins trt` makes the plugin"
            )
        if runs and not trt_library.runs_on_gpus(named):
            why = "--embed-plugin" if options.embed_plugin else flavour.title
            raise UserError(
                f"{named} holds no CUDA code (a host twin, for building only) and {why} needs it; "
                "`asvit-deploy build-plugins trt` makes a plugin that has it"
            )
        return options
    if found := trt_library.find_trt_plugin():
        return replace(options, plugin=found)
    try:
        return replace(options, plugin=trt_library.build_trt())
    except UserError:
        # RTX never runs the kernel while it builds, so the plugin's host twin will do there.
        if runs:
            raise
        twin = trt_library.build_trt(twin=True)
        say("no CUDA compiler here: built with the plugin's host twin; to run the engine, "
            "`asvit-deploy build-plugins trt` where there is one")  # fmt: skip
        return replace(options, plugin=twin)
