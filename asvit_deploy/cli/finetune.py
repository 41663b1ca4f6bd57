"""`asvit-deploy finetune`."""

from __future__ import annotations

from functools import partial
from typing import Any

import click

from asvit_deploy.cli import options
from asvit_deploy.errors import UserError
from asvit_deploy.status import first_process, silent

_BARE = "average"  # --ema without a value


def _ema(context: click.Context, parameter: click.Parameter, text: str | None):
    """True for the bare option, the decay where it has its older meaning."""
    if text is None or text == _BARE:
        return text == _BARE
    try:
        return float(text)
    except ValueError:
        raise click.BadParameter(f"{text!r} is no decay; --ema alone takes averaged weights") from (
            None
        )


def _numbers(kind: type, context: click.Context, parameter: click.Parameter, text: str | None):
    """`1,2,3` as a tuple; `fit`, which thresholds may be, as it is."""
    if text is None or (text == "fit" and kind is float):
        return text
    try:
        return tuple(kind(part) for part in text.split(","))
    except ValueError:
        raise click.BadParameter(f"{text!r} is no list such as 1,2,3") from None


@click.command()
@click.option(
    "--data", required=True,
    help="`digits`, or a folder of class folders or of .tar shards (perhaps in train/ and val/).",
)  # fmt: skip
@click.option("--arch", help="Architecture [default: the one of --pretrained].")
@click.option("--pretrained", type=options.CheckpointPath(), help="Weights to start from.")
@click.option("--teacher", type=options.CheckpointPath(), help="[default: those of --pretrained]")
@click.option("--dense", is_flag=True, help="Train a dense network, from scratch if need be.")
@click.option("-o", "--output", type=options.PATH, help="`.safetensors` [default: by arch, here].")
@click.option("--image-size", type=int, help="Another image size than that of the arch.")
@click.option(
    "--stages", callback=partial(_numbers, int), help="Blocks before which tokens leave: 3,6,9.",
)  # fmt: skip
@click.option(
    "--method", metavar="NAME",
    help="threshold (AS-ViT's), size-passing, tome, tome-stages, topk-nearest, topk-scalar, topk, "
    "topk-attention, evit, bat, schedule, dynamicvit or ltmp [default: the checkpoint's own, or "
    "threshold].",
)  # fmt: skip
@click.option("--per-picture", is_flag=True, help="Thresholds that learn in place of fixed counts.")
@click.option(
    "--cuts", type=options.Blocks(),
    help="Blocks at which tokens leave [default: the method's own].",
)  # fmt: skip
@click.option(
    "--train", type=click.Choice(["all", "thresholds"]),
    help="What learns: the weights too, or what is the method's own [default: all].",
)  # fmt: skip
@click.option(
    "--labels", type=click.Choice(["data", "none"]),
    help="none: learn from the dense network alone, on any folder of pictures [default: data].",
)  # fmt: skip
@click.option(
    "--recipe", type=options.PATH,
    help="TOML file of the options below; those given here win.",
)  # fmt: skip
@click.option("--budget", type=float, help="MACs as a fraction of the dense.")
@click.option("--epochs", type=click.IntRange(1), help="Epochs.")
@click.option("--steps", type=click.IntRange(1), help="Steps, in place of --epochs.")
@click.option(
    "--batch-size", type=click.IntRange(1),
    help="Pictures of a step, all processes together [default: 64].",
)  # fmt: skip
@click.option("--lr", type=float, help="[default: 2e-5 * batch / 512; dense from scratch: 1e-3]")
@click.option("--min-lr", type=float, help="[default: lr / 10; dense from scratch: lr / 1000]")
@click.option("--warmup", type=click.IntRange(0), help="Warm-up steps.")
@click.option("--weight-decay", type=float, help="AdamW's [default: 1e-6]; thresholds have none.")
@click.option("--clip", type=float, help="Clip the gradient's norm; 0 does not.")
@click.option("--smoothing", type=float, help="Label smoothing.")
@click.option("--randaugment", type=float, help="Its magnitude, of 10; 0 is off.")
@click.option("--mixup", type=float, help="Its alpha; 0 is off.")
@click.option("--cutmix", type=float, help="Its alpha; 0 is off.")
@click.option("--erase", type=float, help="Probability of random erasing.")
@click.option("--repeats", type=click.IntRange(1), help="Copies of a picture in a batch.")
@click.option("--flops-weight", type=float, help="Of L_flops in Eq. 13, per GMAC [default: 2].")
@click.option("--distill-weight", type=float, help="Of L_distill in Eq. 13 [default: 0.5].")
@click.option("--temperature", type=float, help="T of Eq. 9 [default: 10000].")
@click.option(
    "--thresholds", callback=partial(_numbers, float),
    help="Where they start: 1e-3,2e-3,3e-3; `fit` puts them onto the budget first.",
)  # fmt: skip
@click.option("--masking", help="`attention` (the method), or `activation`.")
@click.option(
    "--ema", is_flag=False, flag_value=_BARE, callback=_ema, metavar="",
    help="Start from averaged weights, of --pretrained and --teacher.",
)  # fmt: skip
@click.option("--ema-decay", type=float, help="Of a moving average of the weights; 0 keeps none.")
@click.option(
    "--amp", help="`bf16` or `fp16` products [default: no]; scores and thresholds stay float32.",
)  # fmt: skip
@click.option("--seed", type=click.IntRange(0), help="Of weights, order and augmentation.")
@click.option("--save-every", type=click.IntRange(1), default=200, help="Steps between states.")
@click.option("--log-every", type=click.IntRange(1), default=20, help="Steps between log lines.")
@click.option("--validation-limit", type=click.IntRange(1), help="Validate on so many pictures.")
@click.option(
    "--workers", type=click.IntRange(0, 1024), default=0, help="Processes that make batches."
)
@options.skip_limit
@click.option(
    "--classes", type=options.PATH,
    help="The data's classes in the order of the outputs: text, one a line, or JSON.",
)  # fmt: skip
@click.option("--tensorboard", type=options.PATH, help="Folder for TensorBoard's events.")
@options.facts
@click.option("--resume", is_flag=True, help="Go on with the unfinished run of this output.")
@options.force
def command(ema: bool | float, **chosen: Any) -> None:
    """Train to a MACs budget (Eq. 10-13 of AS-ViT), or train a dense network.

    \b
    asvit-deploy finetune --data DIR --pretrained deit_small.pth --budget 0.65
    asvit-deploy finetune --data DIR --pretrained clip --labels none --train thresholds
    asvit-deploy finetune --data digits --arch as_deit_mini --dense --steps 4000

    Options that are not given are the paper's, by arch. With several GPUs or machines, start it
    with `torchrun --nproc-per-node 8 -m asvit_deploy finetune ...` or `accelerate launch`.

    A run that was stopped goes on with the same command and --resume.
    """
    import asvit_deploy

    say = options.status if first_process() else silent
    if not isinstance(ema, bool):
        if chosen["ema_decay"] is not None:
            raise UserError(f"--ema {ema:g} and --ema-decay say the same thing; drop one")
        say(f"--ema {ema:g} is the older spelling of --ema-decay {ema:g}")
        ema, chosen["ema_decay"] = False, ema
    result = asvit_deploy.finetune(ema=ema, **chosen, say=say)
    if first_process():
        options.echo(result.output)
