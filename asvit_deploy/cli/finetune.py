"""`asvit-deploy finetune`."""

from __future__ import annotations

from pathlib import Path

import click

from asvit_deploy.cli import options


@click.command()
@click.option(
    "--data", required=True,
    help="`digits`, or a folder of class folders (perhaps within train/ and val/).",
)  # fmt: skip
@click.option("--arch", "arch_name", help="Architecture [default: the one of --pretrained].")
@click.option("--pretrained", type=options.CheckpointPath(), help="Weights to start from.")
@click.option("--dense", is_flag=True, help="Train a dense network, from scratch if need be.")
@click.option("--budget", type=float, help="MACs as a fraction of the dense [default: 0.65].")
@click.option("-o", "--output", type=options.PATH, help="`.safetensors` [default: by arch, here].")
@click.option("--image-size", type=int, help="Another image size than that of the arch.")
@click.option("--epochs", type=click.IntRange(1), help="Epochs [default: 30].")
@click.option("--steps", type=click.IntRange(1), help="Steps, in place of --epochs.")
@click.option(
    "--batch-size", type=click.IntRange(1), default=64, show_default=True,
    help="Pictures of a step.",
)  # fmt: skip
@click.option("--lr", type=float, help="[default: 2e-5 * batch / 512; dense from scratch: 1e-3]")
@click.option("--min-lr", type=float, help="[default: lr / 10; dense from scratch: lr / 1000]")
@click.option("--warmup", type=click.IntRange(0), default=0, help="Warm-up steps.")
@click.option(
    "--weight-decay", type=float, default=1e-6, show_default=True,
    help="AdamW's; thresholds have none.",
)  # fmt: skip
@click.option("--clip", type=float, default=0.0, help="Clip the gradient's norm; 0 does not.")
@click.option("--smoothing", type=float, default=0.0, help="Label smoothing.")
@click.option("--flops-weight", type=float, help="Of L_flops in Eq. 13, per GMAC [default: 2].")
@click.option("--distill-weight", type=float, help="Of L_distill in Eq. 13 [default: 0.5].")
@click.option(
    "--seed", type=click.IntRange(0), default=0, show_default=True,
    help="Of weights, order and augmentation.",
)  # fmt: skip
@click.option("--bf16", is_flag=True, help="bfloat16 products; scores and thresholds stay float32.")
@click.option("--save-every", type=click.IntRange(1), default=200, help="Steps between states.")
@click.option("--log-every", type=click.IntRange(1), default=20, help="Steps between log lines.")
@click.option("--validation-limit", type=click.IntRange(1), help="Validate on so many pictures.")
@click.option("--resume", is_flag=True, help="Go on with the unfinished run of this output.")
@options.force
def command(
    data: str,
    arch_name: str | None,
    pretrained: Path | None,
    dense: bool,
    budget: float | None,
    output: Path | None,
    image_size: int | None,
    epochs: int | None,
    steps: int | None,
    batch_size: int,
    lr: float | None,
    min_lr: float | None,
    warmup: int,
    weight_decay: float,
    clip: float,
    smoothing: float,
    flops_weight: float | None,
    distill_weight: float | None,
    seed: int,
    bf16: bool,
    save_every: int,
    log_every: int,
    validation_limit: int | None,
    resume: bool,
    force: bool,
) -> None:
    """Train to a MACs budget (Eq. 10-13 of AS-ViT), or train a dense network.

    \b
    asvit-deploy finetune --data DIR --pretrained deit_small.pth --budget 0.65
    asvit-deploy finetune --data digits --arch as_deit_mini --dense --steps 4000

    A run that was stopped goes on with the same command and --resume.
    """
    from asvit_deploy.artifact import check_target
    from asvit_deploy.errors import UserError
    from asvit_deploy.files import sha256
    from asvit_deploy.models.checkpoint import load_checkpoint
    from asvit_deploy.models.registry import arch
    from asvit_deploy.training.data import open_source
    from asvit_deploy.training.finetune import Interrupted, Intervals, Recipe, finetune
    from asvit_deploy.training.state import state_path

    given = {"budget": budget, "flops-weight": flops_weight, "distill-weight": distill_weight}
    for name, value in given.items():
        if dense and value is not None:
            raise UserError(f"--dense has no {name}; drop one of --dense and --{name}")
    if steps is not None and epochs is not None:
        raise UserError("--steps and --epochs say the same thing; drop one")
    if not dense and pretrained is None:
        raise UserError(
            "adaptive training starts from dense weights: pass --pretrained FILE, "
            "or train them first with --dense"
        )
    if arch_name is None and pretrained is None:
        raise UserError("nothing says which network to train; pass --arch or --pretrained")
    checkpoint = load_checkpoint(pretrained, image_size, arch_name) if pretrained else None
    config = checkpoint.config if checkpoint else arch(arch_name or "").at(image_size)
    target = output or Path(f"{config.name}{'_dense' if dense else ''}.safetensors")
    check_target(target, "checkpoint", force or resume, source=pretrained)
    state = state_path(target)
    if state.exists() and not (resume or force):
        raise UserError(f"{state} holds an unfinished run; pass --resume to go on, or --force")
    source = open_source(data, config, seed)
    config = config.at(num_classes=len(source.classes))
    scratch = checkpoint is None
    if lr is None:
        lr = 1e-3 if scratch else 2e-5 * batch_size / 512
    recipe = Recipe(
        steps=steps or max(1, (epochs or 30) * source.epoch // batch_size),
        batch_size=batch_size,
        budget=None if dense else 0.65 if budget is None else budget,
        lr=lr,
        min_lr=min_lr if min_lr is not None else lr / (1000 if scratch else 10),
        warmup=warmup,
        weight_decay=weight_decay,
        clip=clip,
        smoothing=smoothing,
        flops_weight=2.0 if flops_weight is None else flops_weight,
        distill_weight=0.5 if distill_weight is None else distill_weight,
        seed=seed,
        bf16=bf16,
    )
    identity = {
        "arch": config.name,
        "image_size": config.image_size,
        "pretrained": sha256(pretrained) if pretrained else None,
    }
    options.status(
        f"{config.name}, {config.image_size} px, {len(source.classes)} classes of {source.name}: "
        f"{recipe.steps} steps of {batch_size}, learning rate {recipe.lr:g}"
    )
    try:
        result = finetune(
            config, source, checkpoint, recipe, target, identity, resume,
            Intervals(save_every, log_every), validation_limit, force,
        )  # fmt: skip
    except Interrupted as stopped:
        options.status(str(stopped))
        click.get_current_context().exit(130)
    if fit := result.fit:
        options.status(
            f"{fit.after:.4f} of the dense MACs on {fit.pictures} training pictures, "
            f"budget {fit.budget:g}"
        )
        if fit.missed:
            options.status(
                f"missed the budget by {fit.off:+.1%}: these weights' scores are too much alike "
                "for any thresholds; train longer, or start from better weights"
            )
    if result.validation:
        options.status(", ".join(f"{n} {value:.4g}" for n, value in result.validation.items()))
    click.echo(target)
