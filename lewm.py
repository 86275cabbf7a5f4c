"""LeWorldModel in one file: a world model learned end to end from pixels with two loss terms, that plans.

LeWorldModel (LeWM): Maes, Le Lidec, Scieur, LeCun, Balestriero, arXiv 2603.19312. A ViT encodes a frame
into one vector, a causal transformer predicts the next vector from the action, SIGReg keeps the vectors
Gaussian so that they cannot collapse, and the cross-entropy method plans in that space.

    python lewm.py --train                          # data, training, planning: see README for minutes
    python lewm.py --eval runs/nano/checkpoint.pt   # plan again with a trained model

Map: 1 Config / 2 ViT / 3 Predictor / 4 SIGReg / 5 LeWM / 6 CEM / 7 Data / 8 Training / 9 Planning in a world
/ 10 Checkpoints / 11 Command line. Sections 2 to 6 are the method.

Letters:
    B windows in a batch     T frames in a window        D width of an embedding    A numbers in a block
    S side of a picture      P patches in a picture      W width in a network       M SIGReg directions
    N candidate plans        H blocks in a plan          K elite plans              E episodes
    R rows of a data set     a numbers in an action      L tokens                   n any number
B is whatever is batched (in `cem`: episodes), T0 context frames; z is an embedding, z_hat a predicted one.
`actions` are raw; block t holds the `frame_skip` actions from frame t to frame t + 1, z-scored.
"DIFFERS:" marks where the paper and the authors' code disagree, or where this file leaves them.
"""

import argparse
import dataclasses
import difflib
import inspect
import json
import math
import re
import sys
import time
import zipfile
import zlib
from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm


def require(fine, message):
    """Every refusal of this file: one line that names the value and the limit."""
    if not fine:
        raise ValueError(message)


# ======== 1 Config ====================================================================================
# Every number one may want to change. The defaults are the paper's; a preset changes some of them. Each
# field is also a flag of the command line (`--batch_size 64`), and the comment behind it is its help.

@dataclasses.dataclass
class Config:
    # pictures and actions
    image_size: int = 224           # px, side of a picture
    patch_size: int = 14            # px, side of a patch; must divide image_size
    action_dim: int = 2             # numbers in one action of the environment
    frame_skip: int = 5             # env steps from one frame to the next
    whiten: bool = False            # `encode` whitens with the data's statistics, not ImageNet's
    # encoder: ViT-Tiny
    encoder_width: int = 192        # width of the encoder
    encoder_depth: int = 12         # layers
    encoder_heads: int = 3          # attention heads; must divide encoder_width
    position_std: float = 0.02      # of the position embeddings at the start; larger learns sooner
    embed_dim: int = 192            # D, width of an embedding
    projector_hidden: int = 2048    # hidden width of the two projectors
    # predictor
    predictor_width: int = 192      # width of the predictor
    predictor_depth: int = 6        # layers
    predictor_heads: int = 16       # attention heads
    predictor_head_dim: int = 64    # width of a head; heads x head_dim need not equal the width
    predictor_mlp: int = 2048       # hidden width of the predictor's MLPs
    dropout: float = 0.1            # in the predictor; 0 costs 18 points of success in the paper
    history: int = 3                # frames the predictor sees at most
    frames: int = 4                 # T, frames in a training window; must exceed history
    # loss
    sigreg_weight: float = 0.09     # lambda, the one knob. DIFFERS: 0.1 in the paper's text
    rollout_share: float = 0.0      # share of the error made on own predictions. DIFFERS: none in the paper
    directions: int = 1024          # M, random directions of SIGReg, fresh at each step
    knots: int = 17                 # points of its integral on [0, 3], half of its range
    # training
    batch_size: int = 128           # B, windows in a batch
    steps: int = 60_000             # optimizer steps. DIFFERS: about 200,000 in the paper
    lr: float = 5e-5                # peak learning rate of AdamW
    first_lesson: float = 0.0       # share of the steps in the first of two lessons. DIFFERS: see README
    first_lr: float = 1e-3          # peak learning rate of that lesson
    weight_decay: float = 1e-3      # of AdamW
    warmup: float = 0.05            # share of the steps in which the learning rate rises
    grad_clip: float = 1.0          # largest norm of the gradient
    train_episodes: int = 20_000    # episodes to record when no data set is given
    held_out: float = 0.1           # share of the episodes kept for validation
    seed: int = 3072                # of everything random in training; below 1,000,000
    # what follows may change when a run is resumed or evaluated
    compile: bool = True            # torch.compile of the training step; off in the small presets
    checkpoint_minutes: float = 3.0  # between checkpoints: what a crash costs at most
    # planning
    horizon: int = 5                # H, blocks in a plan; fewer as its deadline nears
    candidates: int = 300           # N, plans tried in an iteration
    iterations: int = 30            # of the cross-entropy method
    elites: int = 30                # K, best plans to which mean and deviation are refitted
    replan: int = 5                 # blocks executed before planning again, up to the same deadline
    context: int = 3                # frames that a plan starts from, up to history. DIFFERS: paper 1
    budget: int = 50                # env steps allowed
    goal_distance: int = 25         # env steps from start to goal in the recorded episode
    episodes: int = 100             # held-out episodes to plan in, one start and goal each

    @property
    def action_block(self):         # A
        return self.action_dim * self.frame_skip

    @staticmethod
    def preset(name, **changes):
        """A named Config, "paper", "fast", "nano" or "smoke", with further fields changed by keyword."""
        require(name in PRESETS, f"preset {name!r} does not exist; there are {', '.join(PRESETS)}")
        for new in changes:
            near = difflib.get_close_matches(new, vars(Config()), 1)
            require(new in near, f"Config has no field {new}; the nearest is {near}")
        return Config(**{**PRESETS[name], **changes})

    def __post_init__(self):
        kinds = {bool: (bool, np.bool_), int: (int, np.integer), float: (int, float, np.integer, np.floating)}
        least = dict(seed=0, batch_size=2, knots=2, elites=2)
        most = dict(seed=1e6, dropout=1, held_out=1, warmup=1, first_lesson=1, rollout_share=1)
        for field in dataclasses.fields(self):
            name, kind, value = field.name, field.type, getattr(self, field.name)
            low, high = least.get(name, int(kind is int)), most.get(name, math.inf)
            fine = isinstance(value, kinds[kind]) and (kind is bool or low <= value < high)
            require(fine, f"{name} is {value!r}: not a {kind.__name__} from {low} to below {high:g}")
            setattr(self, name, kind(value))                # NumPy's numbers become plain ones
        for whole, part in (("image_size", "patch_size"), ("encoder_width", "encoder_heads")):
            a, b = getattr(self, whole), getattr(self, part)
            require(a % b == 0, f"{whole} {a} is not a multiple of {part} {b}")
        require(self.elites <= self.candidates, f"elites {self.elites} > candidates {self.candidates}")
        require(self.history < self.frames, f"history {self.history} is not below frames {self.frames}")


SMALL = dict(
    image_size=64, patch_size=32, encoder_width=192, encoder_depth=3, encoder_heads=4, position_std=0.5,
    embed_dim=32, projector_hidden=256, predictor_width=96, predictor_depth=3, predictor_heads=4,
    predictor_head_dim=32, predictor_mlp=384, whiten=True, sigreg_weight=0.12, rollout_share=0.5,
    directions=256, batch_size=64, lr=5e-4, compile=False, candidates=150, iterations=12, elites=15, replan=1)
PRESETS = {
    "paper": dict(),                                                # 18.0 M parameters, for one GPU
    "fast": dict(image_size=112, lr=2e-4, steps=30_000, replan=1),  # smaller pictures, for one GPU
    "nano": dict(SMALL, steps=5400, first_lesson=1 / 3, train_episodes=8_000),  # for a laptop
    "smoke": dict(SMALL, batch_size=32, steps=120, first_lesson=0.5, train_episodes=100,
                  candidates=50, iterations=5, elites=10, episodes=20)}


# ======== 2 ViT encoder ===============================================================================
# A plain pre-norm Vision Transformer, by hand. The embedding of a frame is the CLS token after the last
# norm: one vector for a whole picture, because planning compares and predicts single vectors.

class Attention(nn.Module):
    """Multi-head self-attention over L tokens, (B,L,W) -> (B,L,W). `causal`, or a mask, hides tokens."""
    def __init__(self, width, heads, head_dim, qkv_bias=True, dropout=0.0, causal=False):
        super().__init__()
        self.heads, self.dropout, self.causal = heads, dropout, causal
        self.to_qkv = nn.Linear(width, 3 * heads * head_dim, bias=qkv_bias)
        self.to_out = nn.Linear(heads * head_dim, width)

    def forward(self, x, mask=None):
        B, L, _ = x.shape
        q, k, v = self.to_qkv(x).view(B, L, 3, self.heads, -1).permute(2, 0, 3, 1, 4)  # (B,heads,L,-1) each
        y = F.scaled_dot_product_attention(q, k, v, mask, self.dropout * self.training, self.causal)
        return self.to_out(y.transpose(1, 2).flatten(2))                                # (B,L,W)


class EncoderLayer(nn.Module):
    """One encoder layer: x + attention(norm(x)), then x + mlp(norm(x)), for the first few tokens or all."""
    def __init__(self, width, heads):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-12)
        self.attn = Attention(width, heads, width // heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-12)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x, first=None):
        x = (x + self.attn(self.norm1(x)))[:, :first]
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """Frames to vectors. x float (B,3,S,S), normalised -> (B,W)."""
    def __init__(self, cfg):
        super().__init__()
        self.p, width, heads = cfg.patch_size, cfg.encoder_width, cfg.encoder_heads
        self.patch_embed = nn.Conv2d(3, width, self.p, self.p)      # computed as a matrix product: faster
        self.cls_token = nn.Parameter(0.02 * torch.randn(1, 1, width))
        P = (cfg.image_size // self.p) ** 2
        self.pos_embedding = nn.Parameter(cfg.position_std * torch.randn(1, 1 + P, width))
        self.layers = nn.ModuleList(EncoderLayer(width, heads) for _ in range(cfg.encoder_depth))
        self.norm = nn.LayerNorm(width, eps=1e-12)

    def forward(self, x):
        x = x.unfold(2, self.p, self.p).unfold(3, self.p, self.p)               # (B,3,rows,columns,p,p)
        x = x.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)                # (B,P,3*p^2)
        x = F.linear(x, self.patch_embed.weight.flatten(1), self.patch_embed.bias)      # (B,P,W)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.pos_embedding
        for layer in self.layers[:-1]:
            x = layer(x)                                                        # (B,1+P,W)
        return self.norm(self.layers[-1](x, first=1)[:, 0])                     # (B,W), the CLS token alone


# ======== 3 Action encoder and AdaLN-zero predictor ===================================================
# The action enters as in DiT (Peebles and Xie, arXiv 2212.09748): it shifts, scales and gates each branch
# of each layer. The Linear that makes these numbers starts at zero: at first layers are the identity, actions
# have no effect. Attention is causal: the prediction after frame t knows frames and actions up to t.

def action_encoder(A, W):
    """Blocks to vectors, (B,T,A) -> (B,T,W). The first layer is the authors' Conv1d of kernel 1."""
    embed = nn.Sequential(nn.Linear(A, 4 * W), nn.SiLU(), nn.Linear(4 * W, W))
    return nn.Sequential(OrderedDict(patch_embed=nn.Linear(A, A), embed=embed))


class PredictorLayer(nn.Module):
    """One predictor layer: attention and MLP, each shifted, scaled and gated by the action c (B,T,W)."""
    def __init__(self, cfg):
        super().__init__()
        W, hidden, dropout = cfg.predictor_width, cfg.predictor_mlp, cfg.dropout
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(W, 6 * W))
        nn.init.zeros_(self.adaLN_modulation[-1].weight)
        nn.init.zeros_(self.adaLN_modulation[-1].bias)
        self.norm1 = nn.LayerNorm(W, eps=1e-6, elementwise_affine=False)        # AdaLN shifts and scales
        self.norm2 = nn.LayerNorm(W, eps=1e-6, elementwise_affine=False)
        # DIFFERS: each branch starts with a second norm, as in the authors' code; not in the paper
        attention = Attention(W, cfg.predictor_heads, cfg.predictor_head_dim, False, dropout, causal=True)
        self.attn = nn.Sequential(nn.LayerNorm(W), attention, nn.Dropout(dropout))
        self.mlp = nn.Sequential(nn.LayerNorm(W), nn.Linear(W, hidden), nn.GELU(), nn.Dropout(dropout),
                                 nn.Linear(hidden, W), nn.Dropout(dropout))

    def forward(self, x, c):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=-1)
        x = x + gate1 * self.attn(self.norm1(x) * (1 + scale1) + shift1)        # (B,T,W)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


class Predictor(nn.Module):
    """z (B,T,D), encoded actions c (B,T,W) -> (B,T,W), of which pred_proj makes the next embeddings."""
    def __init__(self, cfg):
        super().__init__()
        D, W, self.history = cfg.embed_dim, cfg.predictor_width, cfg.history
        self.widen = nn.Identity() if D == W else nn.Linear(D, W)
        self.pos_embedding = nn.Parameter(0.02 * torch.randn(1, self.history, W))
        self.layers = nn.ModuleList(PredictorLayer(cfg) for _ in range(cfg.predictor_depth))
        self.norm = nn.LayerNorm(W)

    def forward(self, z, c):
        require(z.shape[1] <= self.history, f"{z.shape[1]} frames are more than history {self.history}")
        x = self.widen(z) + self.pos_embedding[:, :z.shape[1]]      # (B,T,W)
        for layer in self.layers:
            x = layer(x, c)
        return self.norm(x)


# ======== 4 SIGReg ====================================================================================
# The Sketched Isotropic Gaussian Regulariser (LeJEPA, Balestriero and LeCun, arXiv 2511.08544). A cloud of
# vectors is N(0, I) exactly when its shadow on every line is N(0, 1) (Cramer-Wold), so look at the shadows on
# random lines and test each by its characteristic function (Epps-Pulley). A perfect Gaussian sample scores
# 1.05 on average at any batch size, not 0; a collapsed batch of B scores 0.40 B or more.

class CharacteristicFunction(torch.autograd.Function):
    """x (B,...) -> (2,...,n): means over B of cos(kx) and sin(kx), the parts of e^(ikx), k = 0 .. n - 1. As
    powers of e^(ix), with Horner's rule for the gradient: much faster than cosines under autograd."""
    @staticmethod
    def forward(ctx, x, n):
        c, s = x.cos(), x.sin()
        ctx.save_for_backward(c, s)
        cos, sin, means = torch.ones_like(c), torch.zeros_like(s), []
        for _ in range(n):
            means.append(torch.stack([cos.mean(0), sin.mean(0)]))
            cos, sin = cos * c - sin * s, sin * c + cos * s
        return torch.stack(means, dim=-1)

    @staticmethod
    def backward(ctx, grad):        # -Im(sum over k of k (grad_cos - i grad_sin) e^(ikx)) / B
        c, s = ctx.saved_tensors
        re = im = torch.zeros_like(c)
        for k in range(grad.shape[-1] - 1, 0, -1):
            re, im = re + k * grad[0, ..., k], im - k * grad[1, ..., k]
            re, im = re * c - im * s, im * c + re * s
        return -im / len(c), None


class SIGReg(nn.Module):
    """z (B,T,D) -> scalar: B * integral_-3^3 phi(s) |phi_B(s) - phi(s)|^2 ds, phi(s) = exp(-s^2/2), averaged
    over M directions and T time steps. phi_B(s) = mean_b exp(i s x_b), of the B projections x_b.
    Time steps are never pooled: frames of one window are not independent samples."""
    def __init__(self, directions=1024, knots=17):
        super().__init__()
        self.directions = directions
        s = torch.linspace(0, 3, knots)                     # multiples of s[1]; twice [0, 3] is [-3, 3]
        weights = torch.full((knots,), 2 * 3 / (knots - 1))
        weights[[0, -1]] /= 2                               # the trapezoid rule
        phi = torch.exp(-s ** 2 / 2)                        # characteristic function of N(0, 1)
        for name, x in dict(s=s, phi=phi, weights=weights * phi).items():   # the weight is phi, too
            self.register_buffer(name, x, persistent=False)

    def forward(self, z, directions=None):
        """`directions` (D,M), columns of any length, replaces the random ones (for tests)."""
        require(z.ndim == 3, f"SIGReg takes (windows B, frames T, width D), got {tuple(z.shape)}")
        with torch.autocast(z.device.type, enabled=False):                  # a statistic needs float32
            if directions is None:
                directions = torch.randn(z.shape[-1], self.directions, device=z.device)
            x = z.float() @ F.normalize(directions.float(), dim=0)          # (B,T,M), unit columns
            cos, sin = CharacteristicFunction.apply(x * self.s[1], len(self.s))     # phi_B, (T,M,knots) each
            error = (cos - self.phi) ** 2 + sin ** 2                        # |phi_B - phi|^2, as phi is real
            return len(z) * (error @ self.weights).mean()


# ======== 5 LeWM ======================================================================================
# Everything put together. `loss` is the paper's pseudo-code: encode, predict, squared error, SIGReg, sum.
# Gradients flow through both sides of the error; SIGReg alone keeps the embeddings from collapsing.

def projector(width, hidden, out):
    """BatchNorm is needed: a network's last LayerNorm fixes a vector's length, and a Gaussian's varies."""
    return nn.Sequential(nn.Linear(width, hidden), nn.BatchNorm1d(hidden), nn.GELU(), nn.Linear(hidden, out))


class LeWM(nn.Module):
    """The world model. Call `loss`, `encode`, `predict` or `rollout`; there is no `forward`."""
    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.encoder = ViT(cfg)
        self.projector = projector(cfg.encoder_width, cfg.projector_hidden, cfg.embed_dim)
        self.action_encoder = action_encoder(cfg.action_block, cfg.predictor_width)
        self.predictor = Predictor(cfg)
        self.pred_proj = projector(cfg.predictor_width, cfg.projector_hidden, cfg.embed_dim)
        self.sigreg = SIGReg(cfg.directions, cfg.knots)
        # statistics of the training data travel with the weights; of the colours at first those of ImageNet
        mean = torch.tensor([0.485, 0.456, 0.406])[:, None, None].repeat(1, cfg.image_size, cfg.image_size)
        stats = torch.tensor([[0.0], [1.0], [-1.0], [1.0]]).repeat(1, cfg.action_dim)
        self.register_buffer("picture_mean", mean)          # (3,S,S)
        self.register_buffer("colour_map", torch.diag(1 / torch.tensor([0.229, 0.224, 0.225])))     # (3,3)
        self.register_buffer("action_stats", stats)         # (4,a): mean, std, lowest, highest

    def encode(self, pixels):
        """pixels (...,3,S,S) -> z (...,D). uint8 is normalised here; floats must be normalised already."""
        shape, S, raw = tuple(pixels.shape[-3:]), self.cfg.image_size, pixels.dtype == torch.uint8
        require(shape == (3, S, S), f"pictures are {shape}, not (3, {S}, {S}): see fit_pictures")
        require(raw or pixels.min() < 0 or pixels.max() > 1, "pictures in [0, 1]: give uint8")
        if raw:
            pixels = (self.colour_map @ (pixels / 255 - self.picture_mean).flatten(-2)).view(pixels.shape)
        return self.projector(self.encoder(pixels.reshape(-1, *shape))).view(*pixels.shape[:-3], -1)

    def predict(self, z, blocks):
        """z (B,T,D), blocks (B,T,A), T <= history -> z_hat (B,T,D): z_hat[:, t] predicts z[:, t + 1]."""
        x = self.predictor(z, self.action_encoder(blocks))          # (B,T,W)
        return self.pred_proj(x.flatten(0, 1)).view(z.shape)

    def loss(self, pixels, blocks):
        """pixels (B,T,3,S,S), blocks (B,T-1,A) -> scalar, {"prediction", "sigreg", "std"}.

            L = mean (z_hat[t] - z[t + 1])^2  +  lambda * SIGReg(z)       Section 3 of the paper
        z_hat[t] is the paper's z_hat_t+1; `rollout_share` of this error is `own_error`."""
        z, n = self.encode(pixels), self.cfg.history + 1            # (B,T,D)
        examples = z.unfold(1, n, 1).flatten(0, 1).mT               # (B*(T-history),history+1,D), its pieces
        actions = blocks.unfold(1, n - 1, 1).flatten(0, 1).mT       # (B*(T-history),history,A)
        z_hat = self.predict(examples[:, :-1], actions)
        prediction = F.mse_loss(z_hat.float(), examples[:, 1:].float())     # no detach on either side
        if share := self.cfg.rollout_share:
            prediction = (1 - share) * prediction + share * self.own_error(z, blocks)
        sigreg, std = self.sigreg(z), z.detach().float().std(0).mean()
        parts = {"prediction": prediction.detach(), "sigreg": sigreg.detach(), "std": std}
        return prediction + self.cfg.sigreg_weight * sigreg, parts

    def own_error(self, z, blocks):
        """The same error on the model's own predictions, from the first frame alone, like a first plan."""
        own = self.rollout(z[:, :1], blocks[:, None])[:, 0]         # (B,T-1,D)
        error = (own.float() - z[:, 1:].float()).square().mean((0, 2))      # (T-1,)
        return error @ torch.softmax(-0.2 * torch.arange(len(error), device=z.device), 0)   # .4 .33 .27

    def rollout(self, z, plans):
        """Imagine. z (B,T0,D) context frames, T0 <= history, plans (B,N,H,A) -> (B,N,H,D). Here H counts the
        T0 - 1 blocks between context frames, too. plans[:, :, t] follows frame t; the result at t predicts
        frame t + 1. For T0 = 1 the predictor sees z0, then z0 z1', z0 z1' z2', z1' z2' z3' (history 3)."""
        (B, T0, D), (_, N, H, _) = z.shape, plans.shape
        require(T0 <= H, f"{T0} context frames need at least {T0} action blocks, got {H}")
        seen, plans = z[:, None].expand(B, N, T0, D).flatten(0, 1), plans.flatten(0, 1)
        imagined = [self.predict(seen, plans[:, :T0])]              # (B*N,T0,D): attention is causal
        for t in range(T0, H):
            seen = torch.cat([seen, imagined[-1][:, -1:]], 1)[:, -self.cfg.history:]
            window = slice(t + 1 - seen.shape[1], t + 1)
            imagined.append(self.predict(seen, plans[:, window])[:, -1:])
        return torch.cat(imagined, 1).view(B, N, H, D)

    def to_blocks(self, actions):
        """Raw actions (...,n * frame_skip,a) -> action blocks (...,n,A)."""
        scored = (actions - self.action_stats[0]) / self.action_stats[1]
        return scored.unflatten(-2, (-1, self.cfg.frame_skip)).flatten(-2)

    def to_actions(self, blocks):
        """Action blocks (...,n,A) -> raw actions (...,n * frame_skip,a), in the world's units."""
        scored = blocks.unflatten(-1, (self.cfg.frame_skip, -1)).flatten(-3, -2)
        return scored * self.action_stats[1] + self.action_stats[0]


# ======== 6 Planning with CEM =========================================================================
# The cross-entropy method: draw plans from a Gaussian, imagine where each ends, keep the best few, refit
# the Gaussian to them, again:  plan_n ~ N(mean, std^2),  cost_n = ||z_hat_H(plan_n) - z_goal||^2,
# mean, std <- those of the K cheapest. Start and goal are encoded once; only actions change. Each episode
# draws from its own generator, so its plan does not depend on which others are planned with it.

@torch.no_grad()
def cem(model, z, z_goal, generators=None, past=None, **settings):
    """z (B,D) now, z_goal (B,D) -> plans (B,H,A): action blocks within the range of the data's actions.
    z may be the last frames, too, (B,T0,D), with past (B,T0-1,A), the blocks between them. generators: of the
    CPU, one an episode (default: seeds 0, 1, ...). settings: of Config, in place of model.cfg's."""
    cfg, B, device = dataclasses.replace(model.cfg, **settings), len(z), z.device
    H, N, K, A = cfg.horizon, cfg.candidates, cfg.elites, cfg.action_block
    require(len(z_goal) == B, f"{B} starts and {len(z_goal)} goals: each start needs its own goal")
    generators = generators or [torch.Generator().manual_seed(b) for b in range(B)]
    z, z_goal = z.reshape(B, -1, z.shape[-1]), z_goal.reshape(B, 1, -1)
    past = z.new_zeros(B, 0, A) if past is None else past
    require(past.shape == (B, z.shape[1] - 1, A), f"past is {[*past.shape]}, frames {z.shape[1]}")
    low, high = model.to_blocks(model.action_stats[2:].repeat_interleave(model.cfg.frame_skip, 0))
    mean, std = torch.zeros(B, H, A, device=device), torch.ones(B, H, A, device=device)
    # One episode at a time on a CPU: as fast there, and a product's last bits depend on how many rows it has.
    chunk = 1 if device.type == "cpu" else 64
    for _ in range(cfg.iterations):
        noise = torch.stack([torch.randn(N, H, A, generator=g) for g in generators]).to(device)
        plans = mean[:, None] + std[:, None] * noise                        # (B,N,H,A)
        plans[:, 0] = mean                                                  # the best guess competes too
        plans = plans.clamp(low, high)                                      # DIFFERS: the authors do not
        whole = torch.cat([past[:, None].expand(-1, N, -1, -1), plans], 2)  # (B,N,T0-1+H,A)
        parts = zip(z.split(chunk), whole.split(chunk))
        ends = torch.cat([model.rollout(*part)[:, :, -1] for part in parts])  # (B,N,D)
        cost = (ends - z_goal).square().sum(-1)                             # (B,N)
        best = cost.topk(K, dim=1, largest=False).indices                   # (B,K)
        elite = plans[torch.arange(B, device=device)[:, None], best]        # (B,K,H,A)
        mean, std = elite.mean(1), elite.std(1, correction=0).clamp(min=0.01)
    require(cost.isfinite().all(), "the planning cost is not finite: the model or a picture holds NaN")
    return mean


# ======== 7 Windows of data ===========================================================================
# A data set is a dictionary of flat NumPy arrays, all episodes end to end: "action" (R,a), "ep_len" (E,),
# "ep_offset" (E,), maybe "lesson" (E,), 0 or 1, and "pixels" (R,height,width,3) uint8 or "state" (R,...),
# which `render(states, size) -> uint8 (n,3,size,size)` draws on the training device, batch by batch.
# action[t] is taken in frame t. A window is T frames `frame_skip` steps apart with the blocks between them.

def check_data(data, cfg):
    """Refuse arrays that do not fit together, naming what is wrong and where."""
    name = "pixels" if "pixels" in data else "state"
    for column in ("action", "ep_len", "ep_offset", name):
        require(column in data, f"data lacks {column}; it has {', '.join(sorted(data))}")
        require(isinstance(data[column], np.ndarray), f"{column} is not a NumPy array")
    action, frames, length, first = (data[c] for c in ("action", name, "ep_len", "ep_offset"))
    a, rows, looks = cfg.action_dim, len(frames), f"{frames.shape} {frames.dtype}"
    require(action.shape[1:] == (a,), f"action is {action.shape}, not (rows, action_dim {a})")
    fine = name == "state" or (frames.dtype == np.uint8 and frames.ndim == 4 and frames.shape[3] == 3)
    require(fine, f"pixels are {looks}, not (rows, height, width, 3) uint8")
    fine = length.shape == first.shape == (length.size,) and {length.dtype.kind, first.dtype.kind} <= {*"iu"}
    require(fine, "ep_len and ep_offset must be two equally long lists of whole numbers")
    fine = len(length) and min(length.min(), first.min()) >= 0 and (first + length).max() <= rows
    require(fine, f"{len(length)} episodes do not fit into {rows} rows of {name}")
    require(len(action) == rows, f"{len(action)} actions for {rows} rows of {name}, last ones included")
    bad, last = ~np.isfinite(action).all(1), (first + length - 1)[length > 0]
    bad[last] = np.isinf(action[last]).any(1)               # NaN may stand where an episode ends
    require(not bad.any(), f"action is {action[bad.argmax()]} in row {bad.argmax()}, inside an episode")


def split_episodes(episodes, held_out, seed):
    """Whole episodes to training or to validation: overlapping windows must not be on both sides."""
    order = np.random.default_rng(seed).permutation(episodes)
    count = min(math.ceil(held_out * episodes), episodes - 1)
    return np.sort(order[count:]), np.sort(order[:count])


def window_starts(data, cfg, episodes):
    """Rows of all valid first frames, (n,): the window's last frame is still in the same episode."""
    span, first, length = cfg.frame_skip * (cfg.frames - 1), data["ep_offset"], data["ep_len"]
    windows = [np.arange(first[e], first[e] + length[e] - span) for e in episodes]
    return np.concatenate([np.zeros(0, np.int64), *windows])


def action_statistics(action):
    """action (R,a) -> float32 (4,a): mean, std, lowest, highest. Rows with NaN are left out."""
    action = np.asarray(action[~np.isnan(action).any(1)], np.float64)
    std = np.where(action.std(0) < 1e-6, 1, action.std(0))          # a constant action stays as it is
    return torch.tensor(np.stack([action.mean(0), std, action.min(0), action.max(0)])).float()


def colour_statistics(pixels, floor=1e-3):
    """pixels uint8 (n,3,S,S) -> for `encode`: mean picture (3,S,S), map (3,3) that whitens colours: rare ones
    (the agent's) then weigh as much as common ones (the block's). floor: share of the largest variance."""
    pixels = pixels.cpu().float() / 255                             # not every device has eigh
    mean = pixels.mean(0)
    colours = (pixels - mean).permute(0, 2, 3, 1).reshape(-1, 3)
    variance, axes = torch.linalg.eigh(colours.T @ colours / len(colours))
    return mean, axes @ torch.diag((variance + floor * variance.max() + 1e-12).rsqrt()) @ axes.T


def fit_pictures(pixels, size):
    """uint8 (n,3,height,width) -> what `encode` takes, (n,3,size,size): the middle square, resized."""
    fine = pixels.ndim == 4 and pixels.shape[1] == 3 and pixels.dtype == torch.uint8
    require(fine, f"pictures are {tuple(pixels.shape)} {pixels.dtype}, not uint8 (n, 3, height, width)")
    side = min(pixels.shape[2:])
    top, left = ((length - side) // 2 for length in pixels.shape[2:])
    pixels = pixels[:, :, top:top + side, left:left + side]
    if side != size:
        pixels = F.interpolate(pixels.float(), size, mode="bilinear", antialias=True).round().byte()
    return pixels


def get_batch(model, data, starts, render=None):
    """starts (B,) -> pixels uint8 (B,T,3,S,S), blocks (B,T-1,A), on the model's device."""
    cfg, device, size = model.cfg, model.action_stats.device, model.cfg.image_size
    rows = starts[:, None] + cfg.frame_skip * np.arange(cfg.frames)             # (B,T)
    steps = starts[:, None] + np.arange(cfg.frame_skip * (cfg.frames - 1))      # (B,skip*(T-1))
    frames = data["pixels" if "pixels" in data else "state"][rows.reshape(-1)]
    frames, actions = (torch.from_numpy(x).to(device) for x in (frames, data["action"][steps]))
    pixels = frames.permute(0, 3, 1, 2) if "pixels" in data else render(frames.float(), size)
    return fit_pictures(pixels, size).unflatten(0, rows.shape), model.to_blocks(actions.float())


# ======== 8 Training ==================================================================================
# One flat loop. Everything random in step k follows from (seed, k), so a run that was stopped and resumed
# is the run that was not.

def learning_rate(step, cfg):
    """Linear warm-up, then a cosine to zero, over the whole of each lesson."""
    first = round(cfg.first_lesson * cfg.steps)
    start, end, peak = (0, first, cfg.first_lr) if step < first else (first, cfg.steps, cfg.lr)
    warmup = max(1, round(cfg.warmup * (end - start)))
    rise, fall = (step - start + 1) / warmup, (step - start - warmup) / max(1, end - start - warmup)
    return peak * min(rise, (1 + math.cos(math.pi * max(0, fall))) / 2)


def effective_rank(z):
    """z (n,D) -> exp(entropy of the normalised singular values): D if isotropic, 1 if on a line."""
    s = torch.linalg.svdvals((z - z.mean(0)).cpu().double())
    return torch.special.entr(s / s.sum().clamp(min=1e-30)).sum().exp().item()


def straightness(z):
    """z (n,T,D) -> mean cosine of consecutive latent velocities. Nothing in the loss asks for it."""
    velocity = z[:, 1:] - z[:, :-1]
    return F.cosine_similarity(velocity[:, 1:], velocity[:, :-1], dim=-1).mean().item()


@torch.no_grad()
def diagnose(model, pixels, blocks):
    """Held-out windows -> does prediction beat copying the last frame, do actions matter, no collapse?"""
    was_training, history = model.training, model.cfg.history
    model.eval()
    z = torch.cat([model.encode(some) for some in pixels.split(64)]).float()        # (n,T,D)
    past, future, blocks = z[:, :history], z[:, 1:history + 1], blocks[:, :history]
    error = (model.predict(past, blocks) - future).square().mean().item()
    shuffled = (model.predict(past, blocks.roll(1, 0)) - future).square().mean().item()
    model.train(was_training)
    return dict(val_prediction=error, val_copy_last=(past - future).square().mean().item(),
                val_shuffled_ratio=shuffled / max(error, 1e-12), straightness=straightness(z),
                effective_rank=effective_rank(z.flatten(0, 1)), min_std=z.flatten(0, 1).std(0).min().item())


def pick_device(name=None):
    """torch.device of that name, or the best there is: CUDA, then Apple's MPS, then the CPU."""
    has = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    name = name or next(kind for kind in has if has[kind])
    require(has.get(name.split(":")[0]), f"device {name} cannot be used here; try --device cpu")
    return torch.device(name)


def train(cfg, data, out=None, resume=False, device=None, render=None, model=None):
    """Train on `data` (section 7 of this file) and return the LeWM in evaluation mode.
    out: folder for checkpoint.pt and metrics.csv. resume: go on from the checkpoint there. render: draws
    states where there are no pixels (default: Push-T's). model: a LeWM to train, maybe of a subclass."""
    check_data(data, cfg)
    path, device = Path(out or ".") / "checkpoint.pt", torch.device(device or pick_device())
    if render is None and "pixels" not in data:
        from pusht import render                            # only then, so that this file can be copied alone
    torch.set_float32_matmul_precision("high" if device.type == "cuda" else "highest")  # TF32 beside bf16
    torch.manual_seed(cfg.seed)
    model = (model or LeWM(cfg)).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), cfg.lr, weight_decay=cfg.weight_decay, fused=True)

    # data: whole episodes are held out; statistics come from the others alone
    E, rng = len(data["ep_len"]), np.random.default_rng(cfg.seed)
    episodes, held_out = split_episodes(E, cfg.held_out, cfg.seed)
    lesson = data.get("lesson", np.zeros(E, int))           # 0 the first, 1 the second, if there are two
    starts = [window_starts(data, cfg, episodes[lesson[episodes] == k]) for k in (0, lesson.max())]
    val_starts = window_starts(data, cfg, held_out[lesson[held_out] == lesson.max()])
    short = (data["ep_len"] <= cfg.frame_skip * (cfg.frames - 1)).sum()
    print(f"{short} of {E} episodes are too short; {len(val_starts)} windows are held out")
    require(min(map(len, starts)), "no episode holds a window: lower --frame_skip or --frames")
    rows = [np.arange(n) + first for n, first in zip(data["ep_len"][episodes], data["ep_offset"][episodes])]
    model.action_stats.copy_(action_statistics(data["action"][np.concatenate(rows)]))
    if ((model.action_stats[2:] - model.action_stats[0]).abs() > 20 * model.action_stats[1]).any():
        print("an action lies over 20 std from the mean: an error in the data? Planning will try it, too")
    if cfg.whiten:
        pixels, _ = get_batch(model, data, rng.choice(starts[1], 256), render)
        model.picture_mean[:], model.colour_map[:] = colour_statistics(pixels[:, 0])
    some = rng.permutation(val_starts if len(val_starts) else starts[1])[:256]
    look_at = get_batch(model, data, some, render)
    columns = (data[name][some].tobytes() for name in ("action", "pixels" if "pixels" in data else "state"))
    checksum = zlib.crc32(b"".join(columns))

    step, seconds, metrics = 0, 0.0, []
    if resume and out and path.exists():
        _, _, saved = load_checkpoint(path, device, vars(cfg), model)
        require(saved.get("checksum") == checksum, f"{path} is of other data: use the same --data")
        optimizer.load_state_dict(saved["optimizer"])
        step, seconds, metrics = saved["step"], saved["seconds"], saved["metrics"]
    loss_function = model.train().loss
    if cfg.compile:
        try:
            torch.compile(lambda x: x.sin() + 1)(torch.ones(2, device=device))  # is there a compiler?
            loss_function = torch.compile(model.loss)       # the very function that is called
        except Exception as error:
            print(f"torch.compile does not work here ({type(error).__name__}): going on without it")
    began, last_save, look_every = time.time() - seconds, 0.0, max(1, cfg.steps // 40)

    with tqdm(total=cfg.steps, initial=step, unit="step") as bar:
        while step < cfg.steps:
            optimizer.param_groups[0]["lr"] = lr = learning_rate(step, cfg)
            choice = starts[int(step >= round(cfg.first_lesson * cfg.steps))]      # of lesson 0 or 1
            index = np.random.default_rng([cfg.seed, step]).integers(len(choice), size=cfg.batch_size)
            pixels, blocks = get_batch(model, data, choice[index], render)
            torch.manual_seed(1_000_003 * cfg.seed + step)              # SIGReg's directions, dropout
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                loss, parts = loss_function(pixels, blocks)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            grad_norm = nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip)
            optimizer.step()
            step += 1

            # ---- diagnostics and checkpoints only below ----
            bar.update()
            seconds, last = time.time() - began, step == cfg.steps
            look = last or step % look_every == 0
            save = out and (last or time.time() - last_save > 60 * cfg.checkpoint_minutes)
            if look or save or step % 10 == 0:
                now = {"loss": loss.item(), **{name: part.item() for name, part in parts.items()}}
                bar.set_postfix(now, refresh=False)
                require(math.isfinite(now["loss"]), f"loss not finite at step {step}: lower --lr {lr:g}")
            if look:
                now.update(grad_norm=grad_norm.item(), lr=lr, seconds=seconds, **diagnose(model, *look_at))
                metrics.append({"step": step, **now})
                due = step - look_every < cfg.steps / 3 <= step and now["val_shuffled_ratio"] < 1.05
                if due and now["val_prediction"] > now["val_copy_last"]:
                    tqdm.write(f"after {step} steps actions do not matter yet: see README")
            if save:
                state = dict(step=step, seconds=seconds, metrics=metrics, checksum=checksum)
                save_checkpoint(path, model, optimizer=optimizer.state_dict(), **state)
                lines = [",".join(map(str, row)) for row in (*metrics[:1], *(m.values() for m in metrics))]
                path.with_name("metrics.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
                last_save = time.time()
    return model.eval()


# ======== 9 Planning in a world =======================================================================
# Model-predictive control: look, encode, plan, act, look again. An environment needs two methods:
#     step(action (a,)) -> observation, reward, terminated, truncated, info    terminated: goal reached
#     render() -> uint8 (height,width,3)                                       the picture the model sees

class Planner:
    """A policy for one `play`. goals: a picture for each episode, uint8 (height,width,3). It remembers frames
    and blocks, because one picture shows no speed: a plan starts from the last `context` frames."""
    def __init__(self, model, goals, cfg=None, seed=0):
        self.model, self.cfg, self.running = model.eval(), cfg or model.cfg, np.arange(len(goals))
        self.generators = [torch.Generator().manual_seed(1_000_003 * seed + e) for e in range(len(goals))]
        self.z_goal = self.encode(goals)                            # (E,D)
        self.seen = self.z_goal.new_zeros(len(goals), 0, self.z_goal.shape[1])      # (n,t,D) of n that go on
        self.blocks = self.z_goal.new_zeros(len(goals), 0, model.cfg.action_block)  # (n,t+left,A): past, plan

    @torch.no_grad()
    def encode(self, pictures):
        """n pictures, uint8 (height,width,3) -> z (n,D). One at a time, for the reason given in `cem`."""
        device, size = self.model.action_stats.device, self.model.cfg.image_size
        pixels = [torch.tensor(x.copy(), device=device).permute(2, 0, 1) for x in pictures]
        return torch.cat([self.model.encode(fit_pictures(x[None], size)) for x in pixels])

    def __call__(self, running, environments):
        """running (n,): numbers of the episodes that go on -> raw actions (n,skip,a) of their next block."""
        cfg, t = self.cfg, self.seen.shape[1]                       # blocks played, the same for all
        go_on, self.running = np.isin(self.running, running), running
        z = self.encode([environments[e].render() for e in running])
        self.seen, self.blocks = torch.cat([self.seen[go_on], z[:, None]], 1), self.blocks[go_on]
        if t % cfg.horizon % cfg.replan == 0:
            left = cfg.horizon - t % cfg.horizon                    # DIFFERS: a deadline every H blocks
            first = max(0, t + 1 - min(cfg.context, self.model.cfg.history))
            noise, past = [self.generators[e] for e in running], self.blocks[:, first:t]
            settings = {**vars(cfg), "horizon": left}
            plans = cem(self.model, self.seen[:, first:], self.z_goal[running], noise, past, **settings)
            self.blocks = torch.cat([self.blocks[:, :t], plans], 1)
        return self.model.to_actions(self.blocks[:, t:t + 1]).cpu().numpy()


def play(environments, policy, budget):
    """Run episodes side by side, each until it reaches its goal or `budget` env steps are over.
    policy(indices (n,) of the running ones, environments) -> raw actions (n,j,a) to take next.
    -> observations (k,...) of each episode, k <= budget, and which have reached their goal, bool (E,)."""
    histories, reached = [[] for _ in environments], np.zeros(len(environments), bool)
    running, step = np.arange(len(environments)), 0
    while len(running) and step < budget:
        actions = policy(running, environments)[:, :budget - step]
        step += actions.shape[1]
        for e, sequence in zip(running, actions):
            for action in sequence:
                if not reached[e]:
                    observation, _, reached[e], _, _ = environments[e].step(action)
                    histories[e].append(observation)
        running = running[~reached[running]]
    return [np.stack(history) for history in histories], reached


# ======== 10 Checkpoints ==============================================================================
# A dictionary of tensors and plain numbers, so that loading one executes nothing.

def save_checkpoint(path, model, **state):
    """Config and weights are all that planning needs; `state` is what training needs to go on."""
    write_weights(path, dict(state, config=vars(model.cfg), model=model.state_dict()))


def write_weights(path, content):
    """With torch.save, and so that a kill leaves the old file or the new one, never a part of it."""
    partial = Path(f"{path}.partial")
    partial.parent.mkdir(parents=True, exist_ok=True)
    try:
        torch.save(content, partial)
        partial.replace(path)
    except (OSError, RuntimeError) as error:
        partial.unlink(missing_ok=True)
        raise OSError(f"{path} cannot be written, is the disk full? ({str(error)[:80]!r})") from error


def read_weights(path):
    """What torch.save wrote -> the dictionary. weights_only: nothing in the file is executed."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"no file at {path}; python lewm.py --train makes a checkpoint")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        wrong = zipfile.is_zipfile(path) and zipfile.ZipFile(path).testzip()    # torch checks no sums
        require(isinstance(content, dict) and not wrong, f"no dictionary, or a wrong checksum: {wrong}")
    except Exception as error:                          # there is no end to the ways a file can be wrong
        raise ValueError(f"{path} is damaged, or would run code: refused ({str(error)[:80]!r})") from error
    return content


def load_checkpoint(path, device="cpu", changes={}, model=None):
    """-> LeWM in evaluation mode, its Config, and the whole dictionary. changes: {field: value} of Config;
    only fields from `compile` on may differ from the checkpoint's. model: to load into, maybe a subclass."""
    saved = read_weights(path)
    try:
        cfg = Config(**saved["config"])
        names = list(vars(cfg))
        for name in names[:names.index("compile")]:
            old, new = getattr(cfg, name), changes.get(name, getattr(cfg, name))
            require(old == new, f"{name} is {old} in {path}, not {new}: leave it out, or use another --out")
        model = model or LeWM(cfg)
        model.load_state_dict(saved["model"])
    except (RuntimeError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no checkpoint of this version ({str(error)[:80]!r})") from error
    model.cfg = dataclasses.replace(cfg, **changes)
    return model.to(device).eval(), model.cfg, saved


# ======== 11 Command line =============================================================================

def parse_arguments(argv):
    parser = argparse.ArgumentParser(description="LeWorldModel on Push-T.", allow_abbrev=False)
    parser.error = lambda text: sys.exit(f"lewm.py: {text}; python lewm.py --help lists all flags")
    flag = parser.add_argument
    flag("--train", action="store_true", help="record data, train, and plan in held-out episodes")
    flag("--eval", metavar="CKPT", help="plan in held-out episodes with a trained model")
    flag("--preset", choices=PRESETS, help="named settings; default: fast with CUDA, nano without")
    flag("--data", metavar="PATH", help="train on this data set: .npz or folder, see pusht.py")
    flag("--out", metavar="DIR", help="where results go; default: runs/PRESET, or runs/eval")
    flag("--resume", action="store_true", help="go on from DIR/checkpoint.pt, if it is there")
    flag("--device", help="cpu, cuda, cuda:1, mps; default: the best there is")
    flag("--split", choices=("dev", "test"), default="test", help="held-out pairs; default: test")
    comments = dict(re.findall(r"^    (\w+): .*?# (.*)$", inspect.getsource(Config), re.M))
    flag = parser.add_argument_group("Config", "default: the preset's, or the checkpoint's").add_argument
    for field in dataclasses.fields(Config):
        kind = {"type": field.type, "metavar": field.type.__name__}
        kind = {"action": argparse.BooleanOptionalAction} if field.type is bool else kind
        text = f"{comments[field.name]} (preset paper: {field.default})"
        flag(f"--{field.name}", default=argparse.SUPPRESS, help=text, **kind)
    given = parser.parse_args(argv or ["--help"])
    if given.train == bool(given.eval) or (given.eval and (given.resume or given.data)):
        parser.error("say --train, --train --resume or --eval CKPT; --data goes with --train")
    return given


def main(argv):
    import pusht as world
    began, given = time.time(), parse_arguments(argv)
    device = pick_device(given.device)
    preset = given.preset or ("fast" if device.type == "cuda" else "nano")
    out = Path(given.out or (f"runs/{preset}" if given.train else "runs/eval"))
    path = Path(given.eval or out / "checkpoint.pt")
    changes = {name: value for name, value in vars(given).items() if name in vars(Config())}
    if given.eval or (given.resume and path.exists()):
        asked = vars(Config.preset(preset, **changes)) if given.preset else changes
        model, cfg, _ = load_checkpoint(path, device, asked)
    else:
        require(not path.exists(), f"{path} is there already: --resume goes on, --out DIR starts anew")
        cfg = Config.preset(preset, **changes)
    require(cfg.action_dim == 2, f"action_dim is {cfg.action_dim}: Push-T has 2; for others see README")
    out.mkdir(parents=True, exist_ok=True)              # refused now, not after hours
    pairs = world.held_out_pairs(cfg.episodes, given.split, 0, cfg.goal_distance)
    if given.train:
        record = world.collect_lessons if cfg.first_lesson else world.collect
        data = world.load(given.data) if given.data else record(cfg.train_episodes, cfg.seed)
        print(f"data: {len(data['ep_len']):,} episodes, {len(data['action']):,} steps", flush=True)
        once, plans = dataclasses.replace(cfg, budget=1), len(world.plan_lengths(cfg, cfg.budget))
        one = world.evaluate(LeWM(cfg).to(device), once, [x[:1] for x in pairs])["seconds_per_plan"]
        print(f"planning takes {one * plans * cfg.episodes / 60:.1f} minutes at most", flush=True)
        model = train(cfg, data, out, given.resume, device)
        world.draw_curves(out)
    result = world.evaluate(model, cfg, pairs, gif=out / "plan.gif")
    result.update(command="python lewm.py " + " ".join(argv), split=given.split, config=vars(cfg))
    result.update(minutes=(time.time() - began) / 60, device=str(device), torch=torch.__version__)
    (out / "result.json").write_text(json.dumps(result, indent=1, default=float), encoding="utf-8")
    print(world.table(result))
    print(f"{result['seconds_per_plan']:.2f} s per plan, {result['minutes']:.1f} minutes; results in {out}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"lewm.py: {error}")
    except KeyboardInterrupt:
        sys.exit("lewm.py: stopped; a training goes on with the same command and --resume")
