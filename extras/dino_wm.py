"""What planning with DINO-WM's patch tokens would cost: python -m extras.compare dino-wm"""

import numpy as np
import torch
from torch import nn

import lewm
import probe
from extras.speed import seconds_a_call

# DINO-WM (arXiv 2411.04983) plans with 196 patch tokens of 384 numbers a frame, each with 10 numbers of the
# action. A transformer layer on L tokens of width W, I = heads x head_dim, takes L (4 W I + 2 W mlp)
# multiply-adds for its matrices and 2 L^2 I for attention.

PATCHES = 196                                       # tokens a frame
PATCH_WIDTH = 384 + 10

def patch_predictor(cfg):
    """An untrained transformer as large as DINO-WM's predictor, (n,L,394) -> (n,L,394). Its mask is left out:
    that decides which tokens are seen, and not what they cost."""
    layers = []
    for _ in range(cfg.predictor_depth):
        layer = lewm.EncoderLayer(PATCH_WIDTH, cfg.predictor_heads)
        layer.attn = lewm.Attention(PATCH_WIDTH, cfg.predictor_heads, cfg.predictor_head_dim)
        layer.mlp[0] = nn.Linear(PATCH_WIDTH, cfg.predictor_mlp)
        layer.mlp[2] = nn.Linear(cfg.predictor_mlp, PATCH_WIDTH)
        layers.append(layer)
    return nn.Sequential(*layers)

def frames_seen(cfg):
    """How many frames the predictor sees for each block of a plan that begins with one frame, (H,)."""
    return np.minimum(np.arange(cfg.horizon) + 1, cfg.history)

def multiply_adds(cfg, patches, width, others=0):
    """Of an imagined frame, the mean over a plan. others: for each frame, outside the layers."""
    inner = cfg.predictor_heads * cfg.predictor_head_dim
    L = frames_seen(cfg) * patches
    layer = L * width * (4 * inner + 2 * cfg.predictor_mlp) + 2 * L ** 2 * inner
    return (cfg.predictor_depth * layer + frames_seen(cfg) * others).mean()

def dino_wm(out, device=None, candidates=(300, 4)):
    """What planning costs with one token a frame and with 196 -> {"LeWM", "DINO-WM", "factor": numbers}.
    candidates: how many plans are timed; the cost of a plan is linear in them."""
    device = lewm.pick_device(device)
    cfg = lewm.Config.preset("paper")
    W = cfg.predictor_width
    A = cfg.action_block
    modulation = 6 * cfg.predictor_depth * W * W
    action_encoder = A * A + 4 * W * (A + W)
    others = modulation + action_encoder + 2 * W * cfg.projector_hidden
    counts = {"LeWM": multiply_adds(cfg, 1, W, others), "DINO-WM": multiply_adds(cfg, PATCHES, PATCH_WIDTH)}
    model = lewm.LeWM(cfg).to(device).eval()
    z = torch.randn(1, cfg.embed_dim, device=device)
    patches = patch_predictor(cfg).to(device).eval()
    shapes = [(candidates[1], frames * PATCHES, PATCH_WIDTH) for frames in frames_seen(cfg)]
    tokens = [torch.randn(shape, device=device) for shape in shapes]    # one for each block of a plan

    @torch.no_grad()
    def plan_with_patches():
        return sum(patches(x)[0, 0, 0].item() for x in tokens)

    one = dict(candidates=candidates[0], elites=2, iterations=1)
    seconds = {"LeWM": seconds_a_call(lambda: lewm.cem(model, z, z, **one)) / candidates[0],
               "DINO-WM": seconds_a_call(plan_with_patches) / candidates[1]}
    result = {}
    for name, count in counts.items():
        plan = seconds[name] * cfg.candidates * cfg.iterations
        result[name] = {"multiply-adds of an imagined frame": count,
                        "ms for an imagined frame": 1000 * seconds[name] / cfg.horizon,
                        "minutes for a plan": plan / 60}
    result["factor"] = {what: result["DINO-WM"][what] / value for what, value in result["LeWM"].items()}
    print("\n".join(probe.summary("dino-wm", result)))
    return result
