"""What transformers' configs call networks: those that are read here, and others by their names.

A config of another network is refused for what it says, before its weights are looked at: their
names alone would make a less helpful message.
"""

from __future__ import annotations

import re

from asvit_deploy.checkpoints.reading import listed, quoted
from asvit_deploy.checkpoints.refused import Refused

PLAIN = ("vit", "deit", "dinov2", "dinov2_with_registers", "clip_vision_model", "clip")
_PLAIN_NAMES = "ViT, DeiT, DINOv2 or CLIP"

_ATTENTION = "pools its tokens by attention and has no class token; pass a CLIP"
_ROPE = (
    "has rotary position embeddings (RoPE), which come later; pass a DINOv2, with registers or "
    "without"
)
_BIASED = "has relative position biases, which are not computed; pass a ViT, DeiT or DINOv2"
_WINDOWS = "attends in windows and has no class token; pass a ViT, DeiT or DINOv2"
_CONVOLUTIONS = "is made of convolutions and has no tokens; pass a ViT, DeiT or DINOv2"
_GATED_ROPE = (
    "has rotary position embeddings (RoPE) and gated MLPs (SwiGLU), which are not computed; pass "
    "a ViT, DeiT, DINOv2 or CLIP"
)
_APART = (
    "keeps the biases of its queries and values apart, which is not read; pass a ViT, DeiT, DINOv2 "
    "or CLIP"
)
_AVERAGES = "averages its tokens and has no class token; pass a ViT, DeiT, DINOv2 or CLIP"
_BRANCHES = "has parallel branches in its blocks, which are not computed; pass a ViT or DeiT"
_HYBRID = "begins with a convolutional network, which is not computed; pass a ViT or DeiT"
_NORMS = "normalises what its layers give, which is not computed; pass a ViT or DeiT"
_DECODER = (
    "comes with a decoder; pass its encoder, as ViTModel.from_pretrained(FOLDER)."
    "save_pretrained(OTHER) writes it"
)
_LAST_BLOCKS = "lets its class token in behind its blocks only; pass a ViT, DeiT or DINOv2"
_ELSE = f"is none that is computed here; pass a {_PLAIN_NAMES}"
_OTHERS: dict[str, tuple[str, str]] = {
    "siglip": ("SigLIP", _ATTENTION), "siglip_vision_model": ("SigLIP", _ATTENTION),
    "siglip2": ("SigLIP 2", _ATTENTION), "siglip2_vision_model": ("SigLIP 2", _ATTENTION),
    "dinov3_vit": ("DINOv3", _ROPE), "dinov3_convnext": ("DINOv3's ConvNeXt", _CONVOLUTIONS),
    "eva": ("EVA", _ROPE), "eva02": ("EVA-02", _GATED_ROPE), "eva_clip": ("EVA-CLIP", _ROPE),
    "beit": ("BEiT", _BIASED), "data2vec-vision": ("Data2Vec", _BIASED),
    "swin": ("Swin", _WINDOWS), "swinv2": ("Swin V2", _WINDOWS), "swin2sr": ("Swin2SR", _WINDOWS),
    "convnext": ("ConvNeXt", _CONVOLUTIONS), "convnextv2": ("ConvNeXt V2", _CONVOLUTIONS),
    "resnet": ("ResNet", _CONVOLUTIONS), "regnet": ("RegNet", _CONVOLUTIONS),
    "vit_mae": ("ViT-MAE", _DECODER),
    **dict.fromkeys(
        ("vit_msn", "ijepa", "vit_hybrid", "yolos", "pvt", "pvt_v2", "levit", "mobilevit", "cvt",
         "segformer", "videomae", "vivit", "timesformer", "dpt", "depth_anything", "blip",
         "clipseg", "chinese_clip", "altclip", "owlvit", "sam", "efficientnet", "mobilenet_v2",
         "bit", "poolformer", "dinat", "nat", "focalnet", "hiera", "vitdet", "metaclip_2"),
        ("network", _ELSE),
    ),
}  # fmt: skip
KNOWN = frozenset((*PLAIN, *_OTHERS))

# The same by timm's names for them: (how one begins, what it is, what is odd about it). The weights
# of these are much like a plain ViT's, of some name by name.
_ALIKE: tuple[tuple[str, str, str], ...] = (
    (r"(?:vit|naflexvit)_\w*siglip2?_gap", "SigLIP without its head", _AVERAGES),
    (r"(?:vit|naflexvit)_\w*siglip2?", "SigLIP", _ATTENTION),
    (r"eva02_enormous\w*|eva_\w+", "EVA", _APART),
    (r"eva02\w*", "EVA-02", _GATED_ROPE),
    (r"beit3\w*|naflexvit_\w+", "network", _ELSE),
    (r"beit\w*", "BEiT", _BIASED),
    (r"vit_\w*dinov3\w*", "DINOv3", _ROPE),
    (r"vit_pe_\w+", "Perception Encoder", _ROPE),
    (r"vit_\w*_rope\w*|rope_\w+", "ViT of that name", _ROPE),
    (r"vit_s?relpos_\w+", "ViT of that name", _BIASED),
    (r"vit_\w*patch\d+\w*_gap", "ViT of that name", _AVERAGES),
    (r"vit_\w*patch\d+\w*_map", "ViT of that name", _ATTENTION),
    (r"vit_\w*patch\d+\w*_rpn", "ViT of that name", _NORMS),
    (r"vit_\w*patch\d+\w*_(?:xp|\d+x\d+)", "ViT of that name", _BRANCHES),
    (r"vit_\w+_(?:r\d*_s\d+|resnet\d+d?)", "ViT of that name", _HYBRID),
    (r"vit_\w+_(?:radio|lingbot|sapiens2?|tipsv2|mci)\w*", "network", _ELSE),
)
# And those whose weights have other names.
_UNLIKE: tuple[tuple[str, str, str], ...] = (
    (r"convnext\w*", "ConvNeXt", _CONVOLUTIONS), (r"resnet\w*", "ResNet", _CONVOLUTIONS),
    (r"swin\w*", "Swin", _WINDOWS), (r"cait\w*", "CaiT", _LAST_BLOCKS),
)  # fmt: skip

# Classes whose output is no vector of the picture: (a pattern of their names, what it is, advice).
_CLASSES: tuple[tuple[str, str, str], ...] = (
    (r"CLIPForImageClassification",
     "whose classifier reads the mean of a CLIP's tokens",
     "pass the CLIP itself, or a classifier of ViT, DeiT or DINOv2"),
    (r"CLIPText\w+", "which reads texts", "pass CLIPVisionModel or CLIPVisionModelWithProjection"),
    (r"\w+(?:Backbone|ForMaskedImageModeling|ForDepthEstimation|ForSemanticSegmentation"
     r"|ForUniversalSegmentation|ForInstanceSegmentation|ForObjectDetection|ForPreTraining)",
     "whose output is one for each patch, and not one for the picture",
     "save its base model instead, such as ViTModel or Dinov2Model"),
)  # fmt: skip


def refuse(model_type: str | None, architectures: tuple[str, ...], said_by: str) -> None:
    """Refuse a network of another kind by the name that its config has for it.

    Raises:
        Refused: it is none that is computed here.
    """
    if model_type in _OTHERS:
        name, why = _OTHERS[model_type]
        raise Refused(f"is no plain ViT: {said_by} says model_type {quoted(model_type)}, and "
                      f"{_article(name)} {why}")  # fmt: skip
    for one in architectures:
        for pattern, what, advice in _CLASSES:
            if re.fullmatch(pattern, one):
                raise Refused(f"cannot be loaded: {said_by} says {quoted(one)[1:-1]}, {what}; "
                              f"{advice}")  # fmt: skip


def named_other(name: str, unlike: bool = True) -> tuple[str, str] | None:
    """What another network is and why it is not loaded, by timm's name for it; else None.

    Args:
        unlike: also one whose weights could not be taken for a ViT's.
    """
    stem = name.rsplit("/", 1)[-1].partition(".")[0].lower()
    for pattern, what, why in (*_ALIKE, *(_UNLIKE if unlike else ())):
        if re.match(rf"(?:{pattern})(?![a-z])", stem):
            return what, why
    return None


def refuse_name(name: str, said_by: str, unlike: bool = True) -> None:
    """Refuse another network by timm's name for it, whatever its weights look like.

    Args:
        unlike: as for `named_other`.

    Raises:
        Refused: it is one.
    """
    if other := named_other(name, unlike):
        raise Refused(
            f"is no plain ViT: {said_by} {quoted(name)}, and {_article(other[0])} {other[1]}"
        )


def refuse_headless(bare: bool, architectures: tuple[str, ...], said_by: str) -> None:
    """Refuse weights without the classifier that a config says they have.

    Raises:
        Refused: they would pass for a network that gives embeddings.
    """
    named = [name for name in architectures if "ForImageClassification" in name]
    if bare and named:
        raise Refused(
            f"lacks its classifier, where {said_by} says {quoted(named[0])[1:-1]}; save it again "
            "with save_pretrained, or correct what the config says"
        )


def _article(name: str) -> str:
    if name == "network":
        return "such a network"
    return f"an {name}" if name[0] in "AEI" or name.startswith("SAM") else f"a {name}"


# Configs that may lie beside weights whose names are not transformers': a plain ViT's says what
# timm's names leave open, and timm's own wrapper writes the last.
_BESIDE_OTHERS = ("vit", "deit", "timm_wrapper")


def refuse_unlike(model_type: str | None, types: tuple[str, ...], name: str, said_by: str) -> None:
    """Refuse weights of one of transformers' networks beside the config of another.

    Args:
        types: the model types whose weights have such names; none where they are not
            transformers', which only a plain ViT's config fits.
        name: what messages call them.
    """
    types = types or _BESIDE_OTHERS
    if model_type is not None and model_type not in types:
        raise Refused(
            f"holds {name} where {said_by} says model_type {quoted(model_type)}, not "
            f"{listed(types)}: one of them is another network's; correct or remove what it says"
        )
