"""A ViT's forward pass written out from the weights and traits alone, in plain arithmetic."""

from __future__ import annotations

import math

import torch


def norm(x, state, name, eps):
    mean, variance = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, unbiased=False)
    return (x - mean) / (variance + eps).sqrt() * state[f"{name}.weight"] + state[f"{name}.bias"]


def linear(x, state, name):
    return x @ state[f"{name}.weight"].T + state.get(f"{name}.bias", 0)


def activate(x, kind):
    if kind == "quick_gelu":
        return x / (1 + torch.exp(-1.702 * x))
    if kind == "gelu_tanh":
        return x / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    return x / 2 * (1 + torch.erf(x / math.sqrt(2)))


def written_out(state, config, image):
    """Logits of one image [3, H, W], dense, in float64."""
    c, g, p = config, config.grid, config.patch_size
    patches = image.double().reshape(3, g, p, g, p).permute(1, 3, 0, 2, 4).reshape(g * g, -1)
    weight = state["patch_embed.proj.weight"].flatten(1)
    image_rows = patches @ weight.T + state.get("patch_embed.proj.bias", 0)
    first = [state["cls_token"][0]] + ([state["reg_token"][0]] if c.prefix > 1 else [])
    if c.positions == "image":
        x = torch.cat([*first, image_rows + state["pos_embed"][0]])
    else:
        x = torch.cat([*first, image_rows]) + state["pos_embed"][0]
    x = norm(x, state, "norm_pre", c.eps) if c.norm_pre else x
    for i in range(c.depth):
        b = f"blocks.{i}"
        y = linear(norm(x, state, f"{b}.norm1", c.eps), state, f"{b}.attn.qkv")
        q, k, v = y.reshape(len(x), 3, c.heads, -1).permute(1, 2, 0, 3)
        weights = (q @ k.transpose(1, 2) / math.sqrt(c.dim // c.heads)).softmax(2)
        y = linear((weights @ v).permute(1, 0, 2).flatten(1), state, f"{b}.attn.proj")
        x = x + y * state.get(f"{b}.ls1.gamma", 1) * c.residual
        y = activate(
            linear(norm(x, state, f"{b}.norm2", c.eps), state, f"{b}.mlp.fc1"), c.activation
        )
        y = linear(y, state, f"{b}.mlp.fc2")
        x = x + y * state.get(f"{b}.ls2.gamma", 1) * c.residual
    if c.head == "mean_norm":
        mean = x[c.prefix :].mean(0, keepdim=True)
        return linear(norm(mean, state, "norm", c.eps)[0], state, "head")
    x = norm(x, state, "norm", c.eps)
    tokens = x[c.prefix :]
    if c.head == "mean":
        return linear(tokens.mean(0), state, "head")
    if c.head == "class_and_tokens":
        return linear(x[0], state, "head") + linear(tokens, state, "aux_head").amax(0) / 2
    if c.head == "class_and_mean":
        return linear(torch.cat([x[0], tokens.mean(0)]), state, "head")
    if c.head == "two_classes":
        return (linear(x[0], state, "head") + linear(x[1], state, "head_dist")) / 2
    return x[0] if c.head == "none" else linear(x[0], state, "head")
