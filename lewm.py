"""LeWorldModel in one file: a world model learned end to end from pixels with two loss terms, that plans.

LeWorldModel (LeWM): Maes, Le Lidec, Scieur, LeCun, Balestriero, arXiv 2603.19312. A ViT encodes a frame into one vector, a
causal transformer predicts the next vector from the action, SIGReg keeps the vectors Gaussian so that they cannot
collapse, and the cross-entropy method plans in that space. No decoder, no reward, no stop-gradient, no moving average.

    python lewm.py --train                                  # data, training, planning, pictures: see README for minutes
    python lewm.py --train --preset smoke                   # the same in under a minute, to see that everything runs
    python lewm.py --eval runs/nano/checkpoint.pt           # plan again with a trained model

Map: 1 Config / 2 ViT encoder / 3 Action encoder and AdaLN-zero predictor / 4 SIGReg / 5 LeWM / 6 Windows of data /
7 Training / 8 The authors' weights / 9 Planning with CEM / 10 Evaluation / 11 Command line.

Letters:
    B windows in a batch        T frames in a window         D width of an embedding      A numbers in an action block
    S side of a picture (px)    P patches in a picture       W width inside a network     M SIGReg directions
    N candidate plans           H planned action blocks      K elite plans                E episodes
    F rows of a data set        a numbers in one action      L tokens                     n any number of things
B is whatever is batched: frames in `ViT`, episodes in `cem`.
`z` is an embedding, `z_hat` a predicted one. An action block is `frame_skip` consecutive actions, z-scored, end to end.
"DIFFERS:" marks places where the paper and the authors' code do not agree, or this file leaves them; README lists them all.
"""

import argparse
import dataclasses
import inspect
import json
import math
import os
import pickle
import platform
import re
import signal
import sys
import threading
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import nn
from tqdm import tqdm


# ======== 1 Config ====================================================================================================
# Every number one may want to change, on one screen. The defaults are the paper's; a preset changes some of them. Each
# field is also a flag of the command line (`--batch_size 64`), and the comment behind it is the flag's help.

@dataclass
class Config:
    # pictures and actions
    image_size: int = 224           # px, side of a picture
    crop: int = 0                   # px, side of the square cut from the middle of stored pictures, then resized; 0: all there is
    patch_size: int = 14            # px, side of a patch; must divide image_size
    action_dim: int = 2             # numbers in one action of the environment
    frame_skip: int = 5             # env steps from one frame to the next, so an action block has 5 x 2 = 10 numbers
    # encoder: ViT-Tiny
    encoder_width: int = 192        # width of the encoder
    encoder_depth: int = 12         # layers
    encoder_heads: int = 3          # attention heads; must divide encoder_width
    position_std: float = 0.02      # spread of the position embeddings at the start; larger learns sooner in short runs
    embed_dim: int = 192            # D, width of an embedding
    projector_hidden: int = 2048    # hidden width of the two projectors
    # predictor
    predictor_width: int = 192      # width of the predictor
    predictor_depth: int = 6        # layers
    predictor_heads: int = 16       # attention heads
    predictor_head_dim: int = 64    # width of a head; heads x head_dim need not equal the width
    predictor_mlp: int = 2048       # hidden width of the predictor's MLPs
    dropout: float = 0.1            # in the predictor; 0 costs 18 points of planning success in the paper
    history: int = 3                # frames the predictor sees at most
    frames: int = 4                 # T, frames in a training window; must exceed history
    # what short runs need to see a small agent (section 6); the paper does not need it
    whiten: bool = False            # centre and whiten colours with the data's own statistics instead of ImageNet's
    # loss
    sigreg_weight: float = 0.09     # lambda, the one knob. DIFFERS: 0.1 in the paper's text, 0.09 in its released config
    directions: int = 1024          # M, random directions of SIGReg, fresh at each step
    knots: int = 17                 # points of its integral over [0, 3]
    # training
    batch_size: int = 128           # B, windows in a batch
    steps: int = 60_000             # optimizer steps. DIFFERS: about 200,000 in the paper; replications find 60,000 no worse
    lr: float = 5e-5                # peak learning rate of AdamW
    weight_decay: float = 1e-3      # of AdamW
    warmup: float = 0.05            # share of the steps in which the learning rate rises; then it falls as a cosine
    grad_clip: float = 1.0          # largest norm of the gradient
    train_episodes: int = 20_000    # episodes to record when no data set is given
    held_out: float = 0.1           # share of the episodes kept for validation. DIFFERS: the authors split windows instead
    seed: int = 3072                # of everything random in training; below 1000000, where held-out planning pairs begin
    compile: bool = None            # torch.compile of the training step; on by default on CUDA only
    checkpoint_minutes: float = 3.0  # between checkpoints
    # planning
    horizon: int = 5                # H, action blocks in a plan; fewer as its deadline nears
    candidates: int = 300           # N, plans tried in an iteration
    iterations: int = 30            # of the cross-entropy method
    elites: int = 30                # K, best plans to which mean and deviation are refitted
    replan: int = 5                 # blocks executed before planning again, up to the same deadline; 1 in the other presets
    budget: int = 50                # env steps allowed
    goal_distance: int = 25         # env steps from start to goal in the recorded episode
    episodes: int = 100             # held-out episodes to plan in, one start and goal each

    @property
    def action_block(self):         # A
        return self.action_dim * self.frame_skip

    @staticmethod
    def preset(name, **changes):
        """A named Config: "paper", "fast", "nano" or "smoke", with further fields changed by keyword."""
        if name not in PRESETS:
            raise ValueError(f"preset {name!r} does not exist; there are {', '.join(PRESETS)}")
        return Config(**{**PRESETS[name], **changes})

    def __post_init__(self):
        """Refuse impossible values in one line that names the value and the limit."""
        for name, kind in [(field.name, field.type) for field in dataclasses.fields(self) if field.type is not bool]:
            value, limit = getattr(self, name), "at least 0" if name in MAY_BE_ZERO else "above 0"
            if type(value) not in (int, kind) or not math.isfinite(value) or value < 0 or (value == 0 and "above" in limit):
                raise ValueError(f"{name} is {value!r}: it must be a finite {kind.__name__} {limit}")
        for fine, message in (
                (not self.image_size % self.patch_size, "image_size {image_size} is not a multiple of patch_size {patch_size}"),
                (not self.encoder_width % self.encoder_heads,
                 "encoder_width {encoder_width} is not a multiple of encoder_heads {encoder_heads}"),
                (self.history < self.frames, "history {history} must be less than the {frames} frames of a window"),
                (2 <= self.elites <= self.candidates, "elites {elites} must be from 2 to candidates {candidates}"),
                (self.replan <= self.horizon, "replan {replan} is more than horizon {horizon}"),
                (self.batch_size >= 2 and self.knots >= 2, "batch_size {batch_size} and knots {knots} must each be at least 2"),
                (self.dropout < 1 and self.held_out < 1 and self.warmup < 1,
                 "dropout {dropout}, held_out {held_out} and warmup {warmup} must each be below 1"),
                (self.seed < 1_000_000, "seed {seed} must be below 1000000, where the seeds of held-out episodes begin")):
            if not fine:
                raise ValueError(message.format(**vars(self)))


MAY_BE_ZERO = "crop dropout sigreg_weight weight_decay warmup held_out seed checkpoint_minutes".split()
MAY_CHANGE_LATER = "compile horizon candidates iterations elites replan budget goal_distance episodes checkpoint_minutes".split()

SMALL = dict(image_size=64, patch_size=32, encoder_width=192, encoder_depth=3, encoder_heads=4, position_std=0.5, embed_dim=32,
             projector_hidden=256, predictor_width=96, predictor_depth=3, predictor_heads=4, predictor_head_dim=32,
             predictor_mlp=384, whiten=True, sigreg_weight=0.12, directions=256, batch_size=64, lr=1e-3,
             candidates=150, iterations=12, elites=15, replan=1)
PRESETS = {
    "paper": dict(),                                                    # the paper's sizes, 18.0 M parameters, for one GPU
    "fast": dict(image_size=112, lr=2e-4, steps=30_000, replan=1),      # the same networks, smaller pictures, for one GPU
    "nano": dict(SMALL, steps=3000, train_episodes=4_000),              # small networks, for a laptop without a GPU
    "smoke": dict(SMALL, batch_size=32, steps=120, train_episodes=100, candidates=50, iterations=5, elites=10, episodes=20),
}


# ======== 2 ViT encoder ===============================================================================================
# A plain pre-norm Vision Transformer, written out by hand. The embedding of a frame is the CLS token after the last
# norm: one vector for a whole picture, because planning compares and predicts single vectors.

class Attention(nn.Module):
    """Multi-head self-attention. x (B,L,W) -> (B,L,W), over L tokens; `causal` hides later tokens from earlier ones."""
    def __init__(self, width, heads, head_dim, qkv_bias=True, dropout=0.0, causal=False):
        super().__init__()
        self.heads, self.dropout, self.causal = heads, dropout, causal
        self.qkv = nn.Linear(width, 3 * heads * head_dim, bias=qkv_bias)
        self.out = nn.Linear(heads * head_dim, width)

    def forward(self, x):
        B, L, _ = x.shape
        q, k, v = self.qkv(x).view(B, L, 3, self.heads, -1).permute(2, 0, 3, 1, 4)      # 3 x (B, heads, L, head_dim)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal, dropout_p=self.dropout if self.training else 0.0)
        return self.out(y.transpose(1, 2).flatten(2))                                   # (B, L, W)


class Block(nn.Module):
    """One encoder layer: x + attention(norm(x)), then x + mlp(norm(x))."""
    def __init__(self, width, heads):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-12)
        self.attention = Attention(width, heads, width // heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-12)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """Frames to vectors. x float (B,3,S,S), normalised -> (B,W). Section 3 of the paper; sizes from its appendix."""
    def __init__(self, image_size=224, patch_size=14, width=192, depth=12, heads=3, position_std=0.02):
        super().__init__()
        self.patches = nn.Conv2d(3, width, kernel_size=patch_size, stride=patch_size)
        self.cls = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.position = nn.Parameter(position_std * torch.randn(1, 1 + (image_size // patch_size) ** 2, width))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-12)

    def forward(self, x):
        size, weight = self.patches.kernel_size[0], self.patches.weight                 # a convolution without overlap is a
        x = x.unfold(2, size, size).unfold(3, size, size).permute(0, 2, 3, 1, 4, 5)     # matrix product, which trains faster on
        x = F.linear(x.flatten(3).flatten(1, 2), weight.flatten(1), self.patches.bias)  # a CPU: (B, P, 3 * patch^2) -> (B, P, W)
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], dim=1) + self.position      # (B, 1 + P, W)
        for block in self.blocks:
            x = block(x)
        return self.norm(x[:, 0])                                                       # (B, W), the CLS token


# ======== 3 Action encoder and AdaLN-zero predictor ===================================================================
# The action enters as in DiT (Peebles and Xie, arXiv 2212.09748): it shifts, scales and gates each branch of each layer.
# The layers that make these numbers start at zero, so at first every layer is the identity and actions have no effect;
# the model learns to use them. Attention is causal: the prediction after frame t knows frames and actions up to t.

class ActionEncoder(nn.Module):
    """Action blocks to vectors. a (B,T,A), z-scored -> (B,T,W)."""
    def __init__(self, action_block=10, width=192):
        super().__init__()
        self.mix = nn.Linear(action_block, action_block)        # the authors' Conv1d with kernel 1 is this same map
        self.mlp = nn.Sequential(nn.Linear(action_block, 4 * width), nn.SiLU(), nn.Linear(4 * width, width))

    def forward(self, actions):
        return self.mlp(self.mix(actions))


class ConditionalBlock(nn.Module):
    """One predictor layer: attention and MLP, each shifted, scaled and gated by the action c (B,T,W)."""
    def __init__(self, width, heads, head_dim, mlp, dropout):
        super().__init__()
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        nn.init.zeros_(self.modulation[-1].weight)
        nn.init.zeros_(self.modulation[-1].bias)
        self.norm1 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)            # AdaLN brings shift and scale
        self.norm2 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        # DIFFERS: each branch starts with a second norm, as in the authors' code; the paper does not mention it.
        self.attention = nn.Sequential(
            nn.LayerNorm(width),
            Attention(width, heads, head_dim, qkv_bias=False, dropout=dropout, causal=True), nn.Dropout(dropout))
        self.mlp = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, mlp), nn.GELU(), nn.Dropout(dropout),
                                 nn.Linear(mlp, width), nn.Dropout(dropout))

    def forward(self, x, c):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(c).chunk(6, dim=-1)      # each (B, T, W)
        x = x + gate1 * self.attention(self.norm1(x) * (1 + scale1) + shift1)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


class Predictor(nn.Module):
    """The next embedding from the last ones and the actions. z (B,T,D), c (B,T,W) -> (B,T,W), with T <= history."""
    def __init__(self, embed_dim=192, width=192, depth=6, heads=16, head_dim=64, mlp=2048, dropout=0.1, history=3):
        super().__init__()
        self.history = history
        self.widen = nn.Identity() if embed_dim == width else nn.Linear(embed_dim, width)
        self.position = nn.Parameter(0.02 * torch.randn(1, history, width))
        self.blocks = nn.ModuleList(ConditionalBlock(width, heads, head_dim, mlp, dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(width)

    def forward(self, z, c):
        if z.shape[1] > self.history:
            raise ValueError(f"the predictor sees at most {self.history} frames, got {z.shape[1]}")
        x = self.widen(z) + self.position[:, :z.shape[1]]                               # (B, T, W)
        for block in self.blocks:
            x = block(x, c)
        return self.norm(x)


# ======== 4 SIGReg ====================================================================================================
# The Sketched Isotropic Gaussian Regulariser (LeJEPA, Balestriero and LeCun, arXiv 2511.08544). A cloud of vectors is
# N(0, I) exactly when its shadow on every line is N(0, 1) (Cramer-Wold), so look at the shadows on random lines and test
# each by its characteristic function (Epps-Pulley). A perfect Gaussian sample scores 1.05 on average, not 0, whatever the
# batch size; one spread more evenly than chance scores less. A collapsed batch of B scores 0.40 B: it does not pay.

class SIGReg(nn.Module):
    """z (B,T,D) -> scalar: B * integral w(t) |phi_B(t) - exp(-t^2/2)|^2 dt, averaged over M directions and T time steps.

    phi_B is the empirical characteristic function of the B projections at one time step; here t is its frequency, not a time.
    Time steps are never pooled: frames of one window are not independent samples. With several processes, average cos and
    sin over all of them first.
    """
    def __init__(self, directions=1024, knots=17):
        super().__init__()
        self.directions = directions
        t = torch.linspace(0, 3, knots)                                                 # the integral over [-3, 3] is
        weights = torch.full((knots,), 2 * 3 / (knots - 1))                             # twice that over [0, 3] (even in
        weights[[0, -1]] /= 2                                                           # t), by the trapezoid rule
        self.register_buffer("t", t, persistent=False)
        self.register_buffer("phi", torch.exp(-t ** 2 / 2), persistent=False)           # of N(0, 1)
        self.register_buffer("weights", weights * self.phi, persistent=False)           # w(t) happens to be phi(t) too

    def forward(self, z, directions=None):
        """`directions` (D,M), columns of any length, replaces the random ones (for tests)."""
        if z.ndim != 3:
            raise ValueError(f"SIGReg takes (windows B, frames T, width D), got {tuple(z.shape)}")
        with torch.autocast(z.device.type, enabled=False):                              # a test statistic needs float32
            if directions is None:
                directions = torch.randn(z.shape[-1], self.directions, device=z.device)
            x = z.float() @ F.normalize(directions.float(), dim=0)                      # (B, T, M), unit columns
            xt = x[..., None] * self.t                                                  # (B, T, M, knots)
            # phi_B = mean cos + i mean sin, and phi is real, so |phi_B - phi|^2 is:
            error = (xt.cos().mean(0) - self.phi) ** 2 + xt.sin().mean(0) ** 2          # (T, M, knots)
            return len(z) * (error @ self.weights).mean()


# ======== 5 LeWM ======================================================================================================
# Everything put together. `loss` is the paper's pseudo-code: encode, predict, squared error, SIGReg, sum. Gradients flow
# through both sides of the error; SIGReg alone keeps the embeddings from collapsing.

IMAGE_MEAN, IMAGE_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)                    # of ImageNet


def imagenet_map():
    """(3,3) that divides each colour by ImageNet's std: how colours are scaled unless the data's own statistics are used."""
    return torch.diag(1 / torch.tensor(IMAGE_STD))


def projector(width, hidden, out):
    """BatchNorm on purpose: the networks end in a LayerNorm, which fixes each vector's length; batch statistics undo that."""
    return nn.Sequential(nn.Linear(width, hidden), nn.BatchNorm1d(hidden), nn.GELU(), nn.Linear(hidden, out))


class LeWM(nn.Module):
    """The world model. cfg: a Config. Call `loss`, `encode`, `predict` or `rollout`; there is no `forward`."""
    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.encoder = ViT(cfg.image_size, cfg.patch_size, cfg.encoder_width, cfg.encoder_depth, cfg.encoder_heads,
                           cfg.position_std)
        self.projector = projector(cfg.encoder_width, cfg.projector_hidden, cfg.embed_dim)
        self.action_encoder = ActionEncoder(cfg.action_block, cfg.predictor_width)
        self.predictor = Predictor(cfg.embed_dim, cfg.predictor_width, cfg.predictor_depth, cfg.predictor_heads,
                                   cfg.predictor_head_dim, cfg.predictor_mlp, cfg.dropout, cfg.history)
        self.prediction_projector = projector(cfg.predictor_width, cfg.projector_hidden, cfg.embed_dim)
        self.sigreg = SIGReg(cfg.directions, cfg.knots)
        # Statistics of the training data, needed to plan, so they travel with the weights: of the pictures, a mean and the map
        # that scales the colours; of the raw actions, mean, std, lowest and highest.
        mean = torch.tensor(IMAGE_MEAN)[:, None, None].repeat(1, cfg.image_size, cfg.image_size)
        self.register_buffer("picture_mean", mean)                                      # (3, S, S)
        self.register_buffer("colour_map", imagenet_map())                              # (3, 3)
        self.register_buffer("action_stats", torch.tensor([[0.0], [1.0], [-1.0], [1.0]]).repeat(1, cfg.action_dim))

    def encode(self, pixels):
        """pixels (B,T,3,S,S) -> z (B,T,D). uint8 is scaled and normalised here; float is taken as already normalised."""
        B, T = pixels.shape[:2]
        if pixels.shape[2:] != self.picture_mean.shape:
            raise ValueError(f"pictures are {tuple(pixels.shape[2:])}, this encoder takes {tuple(self.picture_mean.shape)}: "
                             "fit_pictures resizes them")
        if pixels.dtype == torch.uint8:
            pixels = torch.einsum("cd,btdhw->btchw", self.colour_map, pixels / 255 - self.picture_mean)
        return self.projector(self.encoder(pixels.flatten(0, 1))).view(B, T, -1)        # one batch norm over B * T frames

    def predict(self, z, actions):
        """z (B,T,D), actions (B,T,A) z-scored, T <= history -> z_hat (B,T,D): z_hat[:, t] predicts z[:, t + 1]."""
        B, T = z.shape[:2]
        return self.prediction_projector(self.predictor(z, self.action_encoder(actions)).flatten(0, 1)).view(B, T, -1)

    def loss(self, pixels, actions):
        """pixels (B,T,3,S,S), actions (B,T-1,A), more are ignored -> (scalar, {"prediction", "sigreg", "std"}). Section 3.

            L = mean (z_hat[t] - z[t + 1])^2  +  lambda * SIGReg(z)         z_hat[t], made after frame t, is the paper's z_hat_t+1

        A window longer than history + 1 frames holds several training examples, all of which are used.
        """
        z = self.encode(pixels)                                                         # (B, T, D)
        history = self.cfg.history
        starts = range(z.shape[1] - history)
        past = torch.cat([z[:, s:s + history] for s in starts])                         # (examples, history, D)
        future = torch.cat([z[:, s + 1:s + 1 + history] for s in starts])
        z_hat = self.predict(past, torch.cat([actions[:, s:s + history] for s in starts]))
        prediction = (z_hat.float() - future.float()).square().mean()                   # no detach on either side
        sigreg = self.sigreg(z)
        parts = {"prediction": prediction.detach(), "sigreg": sigreg.detach(), "std": z.detach().float().std(0).mean()}
        return prediction + self.cfg.sigreg_weight * sigreg, parts

    def rollout(self, z, actions):
        """Imagine. z (B,T0,D) context frames, actions (B,N,H,A) for N plans each -> (B,N,H,D).

        actions[:, :, t] follows frame t, so the first T0 - 1 blocks lie between the context frames, and the result at t is
        the predicted frame t + 1, made from the context as long as it lasts and from predictions after that. As in training
        the predictor sees the last `history` frames at most; a start from a single frame grows to that. For T0 = 1, history
        3 it sees z0, then z0 z1', then z0 z1' z2', then z1' z2' z3' (' marks predictions).
        """
        B, T0, D = z.shape
        _, N, H, _ = actions.shape
        if H < T0:
            raise ValueError(f"{T0} context frames need at least {T0} action blocks, got {H}")
        frames = list(z[:, None].expand(B, N, T0, D).flatten(0, 1).unbind(1))           # each (B * N, D)
        actions = actions.flatten(0, 1)                                                 # (B * N, H, A)
        predictions = []
        for t in range(H):
            first = max(0, t + 1 - self.cfg.history)
            z_hat = self.predict(torch.stack(frames[first:t + 1], 1), actions[:, first:t + 1])[:, -1]
            predictions.append(z_hat)
            if t + 1 >= T0:
                frames.append(z_hat)
        return torch.stack(predictions, 1).view(B, N, H, D)


# ======== 6 Windows of data ===========================================================================================
# A data set is a dictionary of flat arrays, all episodes end to end: "action" (F,a), "ep_len" (E,), "ep_offset" (E,), and
# "pixels" (F,height,width,3) uint8 or "state" (F,...), which `render(states, size) -> uint8 (n,3,size,size)` turns into pictures on
# the training device, batch by batch. A window is T frames `frame_skip` steps apart with the action blocks between them.

def check_data(data, cfg):
    """Refuse arrays that do not fit together, naming what is wrong."""
    missing = [name for name in ("action", "ep_len", "ep_offset") if name not in data]
    if missing or not {"pixels", "state"} & set(data):
        raise ValueError(f"data lacks {', '.join(missing) or 'pixels or state'}; it has {', '.join(sorted(data))}")
    for name in sorted({"action", "pixels", "state"} & set(data)):
        if not isinstance(data[name], np.ndarray):
            raise ValueError(f"{name} is a {type(data[name]).__name__}, not a NumPy array; of a tensor: .numpy()")
    action, frames = data["action"], data["pixels"] if "pixels" in data else data["state"]
    length, offset = np.asarray(data["ep_len"]), np.asarray(data["ep_offset"])
    if action.ndim != 2 or action.shape[1] != cfg.action_dim:
        raise ValueError(f"action is {action.shape}, not (rows, action_dim {cfg.action_dim})")
    if "pixels" in data and (frames.ndim != 4 or frames.shape[3] != 3 or frames.dtype != np.uint8):
        raise ValueError(f"pixels are {frames.shape} {frames.dtype}, not (rows, height, width, 3) uint8")
    if "pixels" in data and cfg.crop > min(frames.shape[1:3]):
        raise ValueError(f"crop {cfg.crop} is more than the stored pictures have, {frames.shape[1]} x {frames.shape[2]} px")
    if length.ndim != 1 or length.shape != offset.shape or {length.dtype.kind, offset.dtype.kind} - {"i", "u"}:
        raise ValueError("ep_len and ep_offset must be two equally long lists of whole numbers")
    if not len(length) or min(length.min(), offset.min()) < 0 or (offset + length).max() > min(len(action), len(frames)):
        raise ValueError(f"{len(length)} episodes do not fit into {len(action)} actions and {len(frames)} frames")


def split_episodes(episodes, held_out, seed):
    """Whole episodes to training or to validation: overlapping windows of one episode must not be on both sides."""
    order = np.random.default_rng(seed).permutation(episodes)
    count = min(math.ceil(held_out * episodes), episodes - 1)
    return np.sort(order[count:]), np.sort(order[:count])


def window_starts(data, cfg, episodes):
    """Rows of all valid first frames, int64 (n,): the window's last frame must still be in the same episode."""
    span = cfg.frame_skip * (cfg.frames - 1)
    first, length = np.asarray(data["ep_offset"], np.int64), np.asarray(data["ep_len"], np.int64)
    return np.concatenate([np.arange(first[e], first[e] + length[e] - span) for e in episodes] or [np.zeros(0, np.int64)])


def action_statistics(action):
    """action (F,a) -> float32 (4,a): mean, std, lowest, highest. Rows with NaN (some files end episodes so) are left out."""
    action = np.asarray(action, np.float64)
    action = action[~np.isnan(action).any(1)]
    if not len(action) or not np.isfinite(action).all():
        raise ValueError("action holds infinity, or no row without NaN")
    std = action.std(0)
    std[std < 1e-6] = 1                                                                 # a constant action stays as it is
    return torch.tensor(np.stack([action.mean(0), std, action.min(0), action.max(0)]), dtype=torch.float32)


def colour_statistics(pixels, floor=1e-3):
    """pixels uint8 (n,3,S,S) -> mean picture (3,S,S) and the map (3,3) that whitens colours, both for values in [0, 1].

    Against the mean picture a resting background is zero, and whitening weighs rare colours (the agent's) as much as common
    ones (the block's). floor: added to each variance, as a share of the largest, so that rounding noise stays small.
    """
    pixels = pixels.cpu().float() / 255                                                 # not every device has eigh
    mean = pixels.mean(0)
    colours = (pixels - mean).permute(0, 2, 3, 1).reshape(-1, 3)
    variance, axes = torch.linalg.eigh(colours.T @ colours / len(colours))
    return mean, axes @ torch.diag((variance + floor * variance.max() + 1e-12).rsqrt()) @ axes.T


def read_windows(data, starts, cfg):
    """starts (B,) -> frames (B * T, ...), pixels or states as they are stored, and raw actions (B, skip * (T - 1), a). NumPy."""
    rows = (starts[:, None] + cfg.frame_skip * np.arange(cfg.frames)).reshape(-1)       # (B * T,)
    steps = starts[:, None] + np.arange(cfg.frame_skip * (cfg.frames - 1))              # (B, skip * (T - 1))
    return data["pixels" if "pixels" in data else "state"][rows], data["action"][steps]


def fit_pictures(pixels, cfg):
    """Stored pictures, uint8 (n,3,height,width) -> what `encode` takes, (n,3,S,S): `crop` px from the middle (0: all), resized."""
    side, size = cfg.crop or min(pixels.shape[2:]), cfg.image_size
    top, left = ((length - side) // 2 for length in pixels.shape[2:])
    pixels = pixels[:, :, top:top + side, left:left + side]
    if side == size:
        return pixels
    return F.interpolate(pixels.float(), size=(size, size), mode="bilinear", antialias=True).round().to(torch.uint8)


def get_batch(data, starts, cfg, action_stats, device, render=None, windows=None):
    """starts (B,) -> pixels uint8 (B,T,3,S,S) and z-scored action blocks (B,T-1,A), on `device`.

    windows: what `read_windows` gave for these starts, if it has been called already.
    """
    B, T = len(starts), cfg.frames
    frames, actions = windows or read_windows(data, starts, cfg)
    if "pixels" in data:
        pixels = fit_pictures(torch.from_numpy(frames).to(device).permute(0, 3, 1, 2), cfg)             # (B * T, 3, S, S)
    else:
        pixels = render(torch.from_numpy(frames).float().to(device), cfg.image_size)
    mean, std = action_stats[:2].to(device)
    actions = (torch.from_numpy(actions).float().to(device) - mean) / std               # (B, skip * (T - 1), a)
    return pixels.unflatten(0, (B, T)), actions.view(B, T - 1, cfg.action_block)


# ======== 7 Training ==================================================================================================
# One flat loop. Everything random in step k follows from (seed, k), so a run that was stopped and resumed is the run that
# was not. The diagnostics say whether the model learns what it should: on held-out windows the prediction must beat
# copying the last frame, must get worse with shuffled actions, and the embeddings must not collapse.

def learning_rate(step, cfg):
    """Linear warm-up, then a cosine to zero over the whole run."""
    warmup = max(1, round(cfg.warmup * cfg.steps))
    if step < warmup:
        return cfg.lr * (step + 1) / warmup
    return cfg.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, cfg.steps - warmup)))


def effective_rank(z):
    """z (n,D) -> exp(entropy of the normalised singular values): D for isotropic vectors, 1 when all lie on a line."""
    s = torch.linalg.svdvals((z - z.mean(0)).cpu().double())
    p = s / s.sum().clamp(min=1e-30)
    return torch.exp(-(p * p.clamp(min=1e-30).log()).sum()).item()


def straightness(z):
    """z (n,T,D) -> mean cosine between consecutive latent velocities, in [-1, 1]. Nothing in the loss asks for it."""
    velocity = z[:, 1:] - z[:, :-1]
    return F.cosine_similarity(velocity[:, 1:], velocity[:, :-1], dim=-1).mean().item()


@torch.no_grad()
def diagnose(model, pixels, actions):
    """Held-out windows -> diagnostics. Draws no random numbers and leaves the model, batch norms included, as it was."""
    was_training, history = model.training, model.cfg.history
    model.eval()
    z = torch.cat([model.encode(part) for part in pixels.split(64)]).float()            # (n, T, D)
    past, future = z[:, :history], z[:, 1:history + 1]
    error, shuffled = ((model.predict(past, a[:, :history]) - future).square().mean().item() for a in (actions, actions.roll(1, 0)))
    model.train(was_training)
    return {"val_prediction": error, "val_copy_last": (past - future).square().mean().item(),
            "val_shuffled_ratio": shuffled / max(error, 1e-12), "effective_rank": effective_rank(z.flatten(0, 1)),
            "min_std": z.flatten(0, 1).std(0).min().item(), "straightness": straightness(z)}


def pick_device(name=None):
    """torch.device of that name, or the best there is: CUDA, then Apple's MPS, then the CPU."""
    name = name or ("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")
    try:
        return torch.empty(1, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {name!r} cannot be used here ({str(error).splitlines()[0]}); try --device cpu") from error


def compiled(function):
    """torch.compile of the very function that is called (of a module it would compile `forward`); where that is impossible,
    a line says so and it runs eagerly."""
    run = torch.compile(function)
    def call(*args):
        nonlocal run
        try:
            return run(*args)
        except Exception as error:                                                      # no compiler, no Triton, ...
            if run is function:
                raise
            print(f"torch.compile does not work here ({type(error).__name__}): going on without it", file=sys.stderr)
            run = function
            return run(*args)
    return call


@contextmanager
def postponed_interrupt():
    """Ctrl-C only leaves a mark in the list that this yields: a checkpoint from the middle of a step could not be resumed."""
    marks = []
    main_thread = threading.current_thread() is threading.main_thread()                 # Python allows handlers only there
    before = main_thread and signal.signal(signal.SIGINT, lambda *_: marks.append("interrupted"))
    try:
        yield marks
    finally:
        if main_thread:
            signal.signal(signal.SIGINT, before)


def train(cfg, data, out=None, resume=False, device=None, render=None):
    """Train on `data` (section 6) and return the LeWM in evaluation mode.

    out: folder for checkpoint.pt, metrics.csv and curves.png; nothing is written without it. resume: go on from the
    checkpoint there, if there is one. render: draws states where `data` has no pixels (Push-T's when not given).
    """
    check_data(data, cfg)
    device = torch.device(device or pick_device())
    if render is None and "pixels" not in data:
        render = push_t().render
    torch.set_float32_matmul_precision("high" if device.type == "cuda" else "highest")  # TF32 where bf16 does not apply
    episodes, held_out_episodes = split_episodes(len(data["ep_len"]), cfg.held_out, cfg.seed)
    starts, held_out_starts = window_starts(data, cfg, episodes), window_starts(data, cfg, held_out_episodes)
    if not len(starts):
        raise ValueError(f"no episode has the {cfg.frame_skip * (cfg.frames - 1) + 1} steps of a window of {cfg.frames} frames; "
                         "lower --frame_skip, or --frames and --history")
    ranges = [np.arange(data["ep_offset"][e], data["ep_offset"][e] + data["ep_len"][e]) for e in episodes]
    action_stats = action_statistics(data["action"][np.concatenate(ranges)])

    torch.manual_seed(cfg.seed)
    step, seconds, rows, state = 0, 0.0, [], None
    path = Path(out) / "checkpoint.pt" if out else None
    if resume and path and path.exists():
        model, _, state = load_checkpoint(path, expect=dataclasses.asdict(cfg))
        if not torch.equal(model.action_stats, action_stats):
            raise ValueError(f"the run at {path} was trained on other data: resume with the same --data")
        model.cfg = cfg                                         # what may change later may have changed
    else:
        model = LeWM(cfg)
        model.action_stats.copy_(action_stats)
        if cfg.whiten:
            some = np.random.default_rng(cfg.seed).choice(starts, 1024)
            pixels, _ = get_batch(data, some, cfg, action_stats, device, render)
            for buffer, value in zip((model.picture_mean, model.colour_map), colour_statistics(pixels.flatten(0, 1))):
                buffer.copy_(value)
    model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=cfg.lr, weight_decay=cfg.weight_decay, fused=device.type in ("cuda", "cpu"))
    if state:
        if "optimizer" not in state:
            raise ValueError(f"{path} holds weights alone: it can be evaluated, not trained on")
        step, seconds, rows = state["step"], state["seconds"], state["rows"]
        optimizer.load_state_dict(state["optimizer"])

    if not len(held_out_starts):
        print("no held-out episode is long enough: the val_ columns are of training windows", file=sys.stderr)
    look_at = np.random.default_rng(cfg.seed).permutation(held_out_starts if len(held_out_starts) else starts)[:256]
    look_at = get_batch(data, look_at, cfg, action_stats, device, render)
    loss_function = compiled(model.loss) if (device.type == "cuda" if cfg.compile is None else cfg.compile) else model.loss
    bfloat16 = torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")
    began, last_save, look_every = time.time() - seconds, time.time(), max(1, cfg.steps // 40)
    bar = tqdm(total=cfg.steps, initial=step, desc="training", unit="step", mininterval=1)
    def read(step):                                             # in another thread; the same seed draws the same windows there
        generator = torch.Generator().manual_seed(1_000_003 * cfg.seed + step)
        return read_windows(data, starts[torch.randint(len(starts), (cfg.batch_size,), generator=generator).numpy()], cfg)

    with postponed_interrupt() as interrupted, bar, ThreadPoolExecutor(1) as reader:
        upcoming = reader.submit(read, step)
        while step < cfg.steps and not interrupted:
            lr = learning_rate(step, cfg)
            for group in optimizer.param_groups:
                group["lr"] = lr
            torch.manual_seed(1_000_003 * cfg.seed + step)                              # windows, directions and dropout
            index = torch.randint(len(starts), (cfg.batch_size,)).numpy()               # the same as in `read`
            pixels, actions = get_batch(data, starts[index], cfg, action_stats, device, render, upcoming.result())
            upcoming = reader.submit(read, step + 1)                                    # while this step computes
            with bfloat16:
                loss, parts = loss_function(pixels, actions)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            grad_norm = nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip)
            optimizer.step()
            step += 1

            # ---- diagnostics and checkpoints only below ----
            bar.update()
            look, seconds = step % look_every == 0 or step == cfg.steps, time.time() - began
            keep = path and (interrupted or step == cfg.steps or time.time() - last_save > 60 * cfg.checkpoint_minutes)
            if look or keep or step % 10 == 0:
                numbers = {"loss": loss.item(), **{name: value.item() for name, value in parts.items()}}
                if not math.isfinite(numbers["loss"]):
                    raise FloatingPointError(f"the loss is {numbers['loss']} at step {step}: try a lower --lr than {cfg.lr}")
                bar.set_postfix({name: f"{number:.3f}" for name, number in numbers.items()}, refresh=False)
            if look:
                rows.append({"step": step, **numbers, "grad_norm": grad_norm.item(), "lr": lr, "seconds": seconds,
                             "steps_per_second": step / seconds, **diagnose(model, *look_at)})
                if out:
                    table = "".join(",".join(map(str, line)) + "\n" for line in [rows[0], *(row.values() for row in rows)])
                    write_atomically(Path(out) / "metrics.csv", lambda temporary: temporary.write_text(table))
            if keep:
                save_checkpoint(path, model, optimizer=optimizer.state_dict(), step=step, seconds=seconds, rows=rows)
                last_save = time.time()
    if interrupted:
        advice = "; go on with the same command and --resume, from Python with resume=True" if path else ""
        print(f"stopped after step {step}{advice}", file=sys.stderr)
        raise KeyboardInterrupt
    if out:
        draw_curves(Path(out) / "curves.png", rows, cfg)
    return model.eval()


def write_atomically(path, write):
    """write(temporary path), then rename: whoever reads `path` finds a whole file, also after a kill."""
    temporary = Path(path).with_name(f".partial.{Path(path).name}")
    temporary.parent.mkdir(parents=True, exist_ok=True)
    write(temporary)
    os.replace(temporary, path)


def write_json(path, result):
    """A result to a file, atomically. Numbers of numpy and torch become plain ones."""
    write_atomically(path, lambda temporary: temporary.write_text(json.dumps(result, indent=1, default=float)))


def draw_curves(path, rows, cfg):
    """What to look at after training, each with the mark to compare it with."""
    errors = {"training": "prediction", "held-out": "val_prediction", "held-out, copy last frame": "val_copy_last"}
    panels = [  # title, {label: column}, (mark, its label), scale
        ("prediction error", errors, None, "log"),
        ("SIGReg", {"training": "sigreg"}, (1.0525, "a Gaussian sample"), "log"),
        ("embedding std", {"mean": "std", "smallest": "min_std"}, (1, "N(0, I)"), "linear"),
        ("effective rank", {"held-out": "effective_rank"}, (cfg.embed_dim, "all dimensions"), "linear"),
        ("error with shuffled / with true actions", {"held-out": "val_shuffled_ratio"}, (1, "actions ignored"), "linear"),
        ("temporal straightness (cosine)", {"held-out": "straightness"}, (-0.5, "frames without any order"), "linear"),
        ("gradient norm", {"training": "grad_norm"}, (cfg.grad_clip, "clipped above"), "log"),
        ("learning rate", {"training": "lr"}, None, "linear")]
    figure = Figure(figsize=(15, 6), layout="constrained")
    for axis, (title, lines, mark, scale) in zip(figure.subplots(2, 4).flat, panels):
        for style, (label, name) in zip(("k-", "k--", "k:"), lines.items()):
            axis.plot([row["step"] for row in rows], [row[name] for row in rows], style, label=label)
        if mark:
            axis.axhline(mark[0], color="tab:orange", label=mark[1])
        axis.set(title=title, xlabel="step", yscale=scale)
        axis.legend(fontsize=8)
    write_atomically(path, figure.savefig)


def save_checkpoint(path, model, **state):
    """Config, weights and action statistics, which is all that planning needs; `state` is what training needs to go on."""
    content = {"format": "lewm", "version": 2, "config": dataclasses.asdict(model.cfg), "model": model.state_dict(), **state}
    write_atomically(path, lambda temporary: torch.save(content, temporary))


def read_weights(path):
    """What torch.save wrote -> the dictionary. Nothing in the file is executed: a file that needs that is refused."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"no file at {path}; python lewm.py --train makes a checkpoint")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        if zipfile.is_zipfile(path) and (part := zipfile.ZipFile(path).testzip()):      # torch does not check the sums
            raise ValueError(f"the checksum of {part} is wrong")
    except (pickle.UnpicklingError, RuntimeError, OSError, EOFError, ValueError, LookupError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())
        code = re.search(r"unsupported (global|class|operand).{0,60}", reason, re.I)
        if code:
            raise ValueError(f"{path} is no file of torch.save, or holds pickled objects, whose loading would run code: refused "
                             f"({code[0]}); where it was made, save tensors alone: torch.save(model.state_dict(), 'weights.pt')") from error
        raise ValueError(f"{path} is damaged, cut short or not a file of torch.save ({reason[:120]})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not a dictionary of tensors")
    return content


def load_checkpoint(path, device="cpu", expect={}):
    """-> (LeWM in evaluation mode, Config, the whole dictionary). Nothing in the file is executed.

    expect: {field: value} that its Config must agree with, planning aside. Raises FileNotFoundError, or ValueError for a
    file that is damaged, foreign or of another Config.
    """
    state = read_weights(path)
    if "format" not in state:
        raise ValueError(f"{path} is no checkpoint of this program; the authors' weights are read by load_official, or --eval")
    try:
        if state["format"] != "lewm" or state["version"] != 2:
            raise ValueError("another format or version")
        cfg = Config(**state["config"])
        model = LeWM(cfg)
        model.load_state_dict(state["model"])
    except (RuntimeError, ValueError, LookupError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:120]
        raise ValueError(f"{path} is damaged or no checkpoint of this program ({reason})") from error
    for name, value in expect.items():
        if value != getattr(cfg, name) and name not in MAY_CHANGE_LATER:
            raise ValueError(f"{name} is {value} in the command or its preset, {path} has {getattr(cfg, name)}: leave it out, "
                             "or train with another --out")
    return model.to(device).eval(), cfg, state


# ======== 8 The authors' weights ======================================================================================
# The released weights are a state dictionary of 303 tensors. The networks are the same, the names are not: this table is
# all there is to translate. "#" is the number of a layer; {} stands for three matrices that are one here.

OFFICIAL_NAMES = {
    "encoder.cls": "encoder.embeddings.cls_token",
    "encoder.position": "encoder.embeddings.position_embeddings",
    "encoder.patches": "encoder.embeddings.patch_embeddings.projection",
    "encoder.norm": "encoder.layernorm",
    "action_encoder.mix": "action_encoder.patch_embed",
    "action_encoder.mlp": "action_encoder.embed",
    "predictor.position": "predictor.pos_embedding",
    "predictor.norm": "predictor.transformer.norm",
    "predictor.blocks.#.modulation": "predictor.transformer.layers.#.adaLN_modulation",
    "predictor.blocks.#.attention.0": "predictor.transformer.layers.#.attn.norm",
    "predictor.blocks.#.attention.1.qkv": "predictor.transformer.layers.#.attn.to_qkv",
    "predictor.blocks.#.attention.1.out": "predictor.transformer.layers.#.attn.to_out.0",
    "predictor.blocks.#.mlp": "predictor.transformer.layers.#.mlp.net",
    "projector": "projector.net",
    "prediction_projector": "pred_proj.net"}
ENCODER_LAYER = {  # as saved with transformers 4 and with transformers 5
    "encoder.blocks.#.norm1": ("encoder.encoder.layer.#.layernorm_before", "encoder.layers.#.layernorm_before"),
    "encoder.blocks.#.norm2": ("encoder.encoder.layer.#.layernorm_after", "encoder.layers.#.layernorm_after"),
    "encoder.blocks.#.attention.qkv": ("encoder.encoder.layer.#.attention.attention.{}", "encoder.layers.#.attention.{}_proj"),
    "encoder.blocks.#.attention.out": ("encoder.encoder.layer.#.attention.output.dense", "encoder.layers.#.attention.o_proj"),
    "encoder.blocks.#.mlp.0": ("encoder.encoder.layer.#.intermediate.dense", "encoder.layers.#.mlp.fc1"),
    "encoder.blocks.#.mlp.2": ("encoder.encoder.layer.#.output.dense", "encoder.layers.#.mlp.fc2")}
STATISTICS = ("picture_mean", "colour_map", "action_stats")                             # these have no place in their files
EXPERT_ACTION_STATS = [[-0.0087, 0.0068], [0.2019, 0.2002], [-1.0, -1.0], [1.0, 1.0]]   # of the authors' Push-T data


def official_names(name, transformers=4):
    """A parameter's name here -> the authors' names of its parts: one, or three for query, key and value."""
    layer, parts = re.search(r"blocks\.(\d+)", name), ("query", "key", "value") if transformers == 4 else "qkv"
    pattern = re.sub(r"blocks\.\d+", "blocks.#", name)
    table = {**OFFICIAL_NAMES, **{ours: theirs[transformers - 4] for ours, theirs in ENCODER_LAYER.items()}}
    ours = next((start for start in table if pattern == start or pattern.startswith(start + ".")), None)
    if ours is None:                                                                    # predictor.widen
        raise ValueError(f"the authors' layout has no place for {name}: embed_dim must equal predictor_width")
    theirs = (table[ours] + pattern[len(ours):]).replace("#", layer[1] if layer else "")
    return [theirs.format(part) for part in parts] if "{}" in theirs else [theirs]


def load_official(path, cfg=None, action_stats=EXPERT_ACTION_STATS, device="cpu"):
    """The authors' weights -> LeWM in evaluation mode. With or without "model." before the names.

    cfg: a Config, of which the sizes matter (the paper's when not given). action_stats (4,a): mean, std, lowest and highest
    of the raw actions the weights were trained with. Raises ValueError that lists every tensor that does not fit.
    """
    model, given = LeWM(cfg or Config()), read_weights(path)
    given = given.get("state_dict", given)                                              # as in a checkpoint of Lightning
    given = {str(name).removeprefix("model."): tensor for name, tensor in given.items()}
    transformers = 5 if any(name.startswith("encoder.layers.") for name in given) else 4
    weights, wrong = {name: getattr(model, name) for name in STATISTICS}, []
    weights["action_stats"] = torch.tensor(action_stats)
    for name, ours in model.state_dict().items():
        if name in STATISTICS:
            continue
        parts = official_names(name, transformers)
        shape = [len(ours) // len(parts), *ours.shape[1:]] if ours.ndim else []
        shape = shape + [1] if name == "action_encoder.mix.weight" else shape           # theirs is a Conv1d of kernel 1
        found = [given.pop(part, None) for part in parts]
        for part, tensor in zip(parts, found):
            if tensor is None:
                wrong.append(f"missing: {part} {shape}")
            elif not isinstance(tensor, torch.Tensor) or list(tensor.shape) != shape:
                wrong.append(f"{part} is {list(getattr(tensor, 'shape', [type(tensor).__name__]))}, not {shape}")
        if not wrong:
            weights[name] = (torch.cat(found) if ours.ndim else found[0]).reshape(ours.shape)
    wrong += [f"unexpected: {name}" for name in given]
    if wrong:
        raise ValueError(f"{path} does not fit this Config, {len(wrong)} tensors are wrong:\n  " + "\n  ".join(wrong))
    model.load_state_dict(weights)
    return model.to(device).eval()


def save_official(model, path, transformers=4):
    """Write the weights in the authors' layout, with names as of transformers 4 or 5. Statistics of the data have no place in it."""
    if not torch.equal(model.colour_map.cpu(), imagenet_map()):
        raise ValueError("the authors' layout has no place for the colour statistics of a model trained with whiten")
    weights = {}
    for name, ours in model.state_dict().items():
        if name not in STATISTICS:
            parts = official_names(name, transformers)
            theirs = ours[..., None] if name == "action_encoder.mix.weight" else ours
            weights.update(zip(parts, theirs.chunk(3) if len(parts) == 3 else [theirs]))
    weights = {name: tensor.cpu().clone() for name, tensor in weights.items()}          # so that no part drags the whole along
    write_atomically(path, lambda temporary: torch.save(weights, temporary))


# ======== 9 Planning with CEM =========================================================================================
# The cross-entropy method: draw plans from a Gaussian, imagine where each ends, keep the best few, refit the Gaussian to
# them, again:   plan_n ~ N(mean, std^2),   cost_n = ||z_hat_H(plan_n) - z_goal||^2,   mean, std <- those of the K cheapest.
# Start and goal are encoded once; only actions change. Each episode draws from its own generator, so its plan is the same in
# any company.

@torch.no_grad()
def cem(model, z, z_goal, generators=None, horizon=5, candidates=300, iterations=30, elites=30, min_std=0.01):
    """z (B,D) or (B,1,D) now, z_goal (B,D) -> plans (B,H,A): z-scored action blocks within the data's range. Section 4.

    The defaults are the paper's, not those of model.cfg. generators: a CPU torch.Generator per episode (seeds 0, 1, ... when
    not given). min_std: floor of the Gaussian's std. A cost of NaN raises FloatingPointError.
    """
    if not 2 <= elites <= candidates:
        raise ValueError(f"elites {elites} must be from 2 to candidates {candidates}")
    B, A, device = len(z), model.cfg.action_block, z.device
    generators = generators or [torch.Generator().manual_seed(b) for b in range(B)]
    z, z_goal = z.reshape(B, 1, -1), z_goal.reshape(B, 1, -1)
    data_mean, data_std, low, high = model.action_stats
    low, high = (((bound - data_mean) / data_std).repeat(model.cfg.frame_skip) for bound in (low, high))        # (A,)
    mean, std = torch.zeros(B, horizon, A, device=device), torch.ones(B, horizon, A, device=device)
    # One episode at a time on a CPU: as fast there, and the last bits of a matrix product depend on how many rows it has.
    together = 1 if device.type == "cpu" else 64
    for _ in range(iterations):
        noise = torch.stack([torch.randn(candidates, horizon, A, generator=g) for g in generators]).to(device)
        plans = mean[:, None] + std[:, None] * noise                                    # (B, N, H, A)
        plans[:, 0] = mean                                                              # the best guess competes too
        plans = plans.clamp(low, high)                                                  # DIFFERS: the authors do not clamp
        ends = torch.cat([model.rollout(z[b:b + together], plans[b:b + together])[:, :, -1] for b in range(0, B, together)])
        cost = (ends - z_goal).square().sum(-1)                                         # (B, N)
        if not torch.isfinite(cost).all():
            raise FloatingPointError("the planning cost is not finite: the model or its input holds NaN or infinity")
        best = cost.topk(elites, dim=1, largest=False).indices                          # (B, K)
        elite = plans.gather(1, best[:, :, None, None].expand(-1, -1, horizon, A))      # (B, K, H, A)
        mean, std = elite.mean(1), elite.std(1, correction=0).clamp(min=min_std)
    return mean


# ======== 10 Evaluation ================================================================================================
# Model-predictive control on held-out pairs: start = a state of an episode that training never saw, goal = the picture 25
# steps later. A rate without its interval and its baselines says little, so they are always reported together.

def push_t():
    """The world for callers who bring none. Imported only when needed, so that this file can be copied alone."""
    import pusht
    return pusht


def wilson(successes, n):
    """95 % Wilson score interval of a success rate -> (low, high)."""
    rate, q = successes / n, 1.96
    middle, half = rate + q * q / (2 * n), q * math.sqrt(rate * (1 - rate) / n + q * q / (4 * n * n))
    return max(0.0, (middle - half) / (1 + q * q / n)), min(1.0, (middle + half) / (1 + q * q / n))


def evaluate(model, cfg, split="test", episodes=None, pairs_seed=0, world=None, gif=None):
    """Plan on held-out pairs, and play the baselines on the same pairs. -> a dictionary that can be written as JSON.

    split: "dev" to choose settings, "test" to report. world: a module with render, success, distances, play and
    held_out_pairs, and draw_outcomes for a gif (Push-T when not given). gif: where to draw a success and a failure.
    """
    world, episodes, device = world or push_t(), episodes or cfg.episodes, model.action_stats.device
    starts, goals, recorded = world.held_out_pairs(episodes, split, pairs_seed, cfg.goal_distance)
    mean, std, low, high = model.action_stats.cpu().numpy()
    plan_seconds, plan_count, blocks_played = 0.0, 0, 0         # all episodes play in step, so one count of blocks serves all
    @torch.no_grad()
    def encode(states):                                         # one picture at a time, for the reason given in `cem`
        pixels = world.render(torch.as_tensor(states, dtype=torch.float32, device=device), cfg.image_size)
        return torch.cat([model.encode(picture[None, None])[0] for picture in pixels])                          # (n, D)

    generators = [torch.Generator().manual_seed(1_000_003 * pairs_seed + e) for e in range(episodes)]
    idle = np.zeros((episodes, cfg.budget, cfg.action_dim))
    random = np.stack([np.random.default_rng([pairs_seed, e]).normal(mean, std, idle.shape[1:]) for e in range(episodes)])
    model.eval()
    z_goal = encode(goals)

    def plan(which, states):
        nonlocal plan_seconds, plan_count, blocks_played
        began = time.time()
        left = cfg.horizon - blocks_played % cfg.horizon        # DIFFERS: a plan made anew before its end keeps its deadline
        blocks = cem(model, encode(states), z_goal[which], [generators[e] for e in which],
                     left, cfg.candidates, cfg.iterations, cfg.elites)[:, :cfg.replan].cpu().numpy()
        blocks_played += blocks.shape[1]
        plan_seconds, plan_count = plan_seconds + time.time() - began, plan_count + len(which)
        return blocks.reshape(len(which), -1, cfg.action_dim) * std + mean

    policies = {
        "LeWM + CEM": plan,
        "random actions": lambda which, _: random.clip(low, high)[which],
        "doing nothing": lambda which, _: idle[which],
        "recorded actions": lambda which, _: np.concatenate([recorded, idle], axis=1)[which]}
    names = ("agent_px", "block_px", "turn_deg")
    gaps = {name: {"mean": gap.mean().item(), "quartiles": np.percentile(gap, (25, 50, 75)).tolist()}
            for name, gap in zip(names, world.distances(starts, goals))}
    result = {"split": split, "pairs_seed": pairs_seed, "episodes": episodes, "start_to_goal": gaps, "policies": {}}
    for policy_name, policy in policies.items():
        histories = world.play(starts, goals, cfg.budget, policy)
        won, object_won = (np.array([world.success(states[1:], goal, rule).any() for states, goal in zip(histories, goals)])
                           for rule in (False, True))
        final = world.distances(np.stack([states[-1] for states in histories]), goals)
        result["policies"][policy_name] = {
            "success": won.mean().item(), "interval": wilson(won.sum().item(), episodes),
            "object_success": object_won.mean().item(),
            **{f"final_{name}": gap.mean().item() for name, gap in zip(names, final)}}
        if gif and policy is plan:
            write_atomically(gif, lambda temporary: world.draw_outcomes(temporary, histories, goals, won))
    return {**result, "seconds_per_plan": plan_seconds / plan_count}


def probe_targets(states):
    """states (...,7) -> what probes read: agent x, y, block x, y (px), sine and cosine of the block's angle, (...,6)."""
    return torch.cat([states[..., :4], states[..., 4:5].sin(), states[..., 4:5].cos()], dim=-1)


def fit_ridge(x, y, ridge=1e-3):
    """Closed-form ridge regression on standardised codes, x (n,D), y (n,k) -> a function (m,D) -> (m,k)."""
    centre, scale, mean = x.mean(0), x.std(0).clamp(min=1e-8), y.mean(0)
    x = (x - centre) / scale
    weights = torch.linalg.solve(x.T @ x + ridge * len(x) * torch.eye(x.shape[1], dtype=x.dtype), x.T @ (y - mean))
    return lambda new: (new - centre) / scale @ weights + mean


def untrained(model):
    """A new LeWM of the same Config and data statistics, to compare a trained one with."""
    new = LeWM(model.cfg)
    new.load_state_dict({name: getattr(model, name) for name in STATISTICS}, strict=False)
    return new.to(model.action_stats.device).eval()


@torch.no_grad()
def probe(model, world=None, episodes=40):
    """What can be read off an embedding with a linear map? Pearson r on held-out episodes for agent, block and angle."""
    world, device = world or push_t(), model.action_stats.device
    z, y = [], []
    for part in range(2):                                                               # fit on one half, test on the other
        states = torch.from_numpy(world.collect(episodes, seed=1_900_000 + part)["state"][::2])     # dev seeds
        pixels = (world.render(some.to(device), model.cfg.image_size) for some in states.split(256))
        z.append(torch.cat([model.encode(some[None])[0] for some in pixels]).cpu().double())
        y.append(probe_targets(states).double())
    guess = fit_ridge(z[0], y[0])(z[1])
    r = [np.corrcoef(a, b)[0, 1] for a, b in zip(guess.T.numpy(), y[1].T.numpy())]
    return {"agent": float(np.mean(r[:2])), "block": float(np.mean(r[2:4])), "angle": float(np.mean(r[4:]))}


# ======== 11 Command line =============================================================================================

def parse_arguments(argv):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.error = lambda message: sys.exit(f"lewm.py: {message}; python lewm.py --help lists all flags")
    parser.add_argument("--train", action="store_true", help="record data, train, plan in held-out episodes, draw pictures")
    parser.add_argument("--eval", metavar="CKPT", help="plan in held-out episodes with a trained model, or with the authors' weights")
    parser.add_argument("--preset", choices=PRESETS, help="named settings; default: fast with CUDA, nano without")
    parser.add_argument("--data", metavar="PATH", help="train on this data set: .npz or folder with the columns of pusht.py; with "
                        "--eval and the authors' weights: z-score actions with its statistics instead of the expert set's")
    parser.add_argument("--out", metavar="DIR", help="where results go; default: runs/PRESET or runs/eval")
    parser.add_argument("--resume", action="store_true", help="go on from DIR/checkpoint.pt, if there is one")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps; default: the best there is")
    parser.add_argument("--split", choices=("dev", "test"), default="test", help="held-out pairs to plan on; default: test")
    parser.add_argument("--pairs-seed", type=int, default=0, help="which held-out pairs; default: 0")
    group = parser.add_argument_group("fields of Config", "when not given: the preset's value, or the checkpoint's")
    comments = dict(re.findall(r"^    (\w+): .*?# (.*)$", inspect.getsource(Config), re.M))         # a comment is the help
    for field in dataclasses.fields(Config):
        kind = {"type": field.type, "metavar": field.type.__name__}
        kind = {"action": argparse.BooleanOptionalAction} if field.type is bool else kind
        group.add_argument(f"--{field.name}", default=argparse.SUPPRESS, **kind,
                           help=f"{comments[field.name]} (preset paper: {field.default})")
    if not argv:
        parser.print_help()
        sys.exit()
    given = vars(parser.parse_args(argv))
    if given["train"] == bool(given["eval"]) or (given["eval"] and given["resume"]):
        parser.error("say --train, --train --resume or --eval CKPT")
    return given


def main(argv):
    began, given = time.time(), parse_arguments(argv)
    changes = {field.name: given[field.name] for field in dataclasses.fields(Config) if field.name in given}
    device, world = pick_device(given["device"]), push_t()
    preset = given["preset"] or ("fast" if device.type == "cuda" else "nano")
    out = Path(given["out"] or (f"runs/{preset}" if given["train"] else "runs/eval"))
    checkpoint = Path(given["eval"] or out / "checkpoint.pt")
    if given["eval"] and "format" not in read_weights(checkpoint):
        cfg = Config.preset(given["preset"] or "paper", **changes)
        stats = action_statistics(world.load(given["data"])["action"]).tolist() if given["data"] else EXPERT_ACTION_STATS
        model = load_official(checkpoint, cfg, stats, device)
    elif given["eval"] or (given["resume"] and checkpoint.exists()):
        if given["eval"] and given["data"]:
            raise ValueError("--data goes with --train, or with the authors' weights: a checkpoint has its own action statistics")
        expect = dataclasses.asdict(Config.preset(preset, **changes)) if given["preset"] else changes
        model, cfg, _ = load_checkpoint(checkpoint, device, expect)
        cfg = dataclasses.replace(cfg, **changes)
    else:
        if given["resume"]:
            print(f"no checkpoint at {checkpoint}: a new run", file=sys.stderr)
        cfg = Config.preset(preset, **changes)
    if cfg.action_dim != 2:
        raise ValueError(f"action_dim is {cfg.action_dim}, actions of Push-T have 2 numbers; for another world call train() "
                         "from Python")
    world.check_pairs(cfg.episodes, given["split"], given["pairs_seed"], cfg.goal_distance)             # now, not after training
    if given["train"]:
        data = world.load(given["data"]) if given["data"] else world.collect(cfg.train_episodes, cfg.seed)
        print(f"{len(data['ep_len']):,} episodes, {len(data['action']):,} steps ({time.time() - began:.0f} s)", flush=True)
        model = train(cfg, data, out, given["resume"], device)
    print(f"planning in {cfg.episodes} held-out episodes ({given['split']})", flush=True)
    result = evaluate(model, cfg, given["split"], pairs_seed=given["pairs_seed"], world=world, gif=out / "plan.gif")
    torch.manual_seed(cfg.seed)
    if given["train"]:
        result["probe_r"] = {"trained": probe(model, world), "untrained": probe(untrained(model), world)}
    result.update(
        command="python lewm.py " + " ".join(argv), seed=cfg.seed, minutes=(time.time() - began) / 60,
        hardware=torch.cuda.get_device_name(device) if device.type == "cuda" else f"{os.cpu_count()} cores, {platform.machine()}",
        versions={"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
        parameters=sum(p.numel() for p in model.parameters()), config=dataclasses.asdict(cfg))
    write_json(out / "result.json", result)
    print(f"\n{'':18}success   95 % interval   object only   and at the end: agent px  block px  turn deg")
    for name, row in result["policies"].items():
        low, high = row["interval"]
        print(f"{name:18}{row['success']:6.1%}   {low:6.1%} - {high:6.1%}   {row['object_success']:10.1%}   "
              f"{row['final_agent_px']:24.0f}{row['final_block_px']:10.0f}{row['final_turn_deg']:10.0f}")
    for name, row in result.get("probe_r", {}).items():
        print(f"linear probe, {name} encoder: " + ", ".join(f"{what} r = {r:.2f}" for what, r in row.items()))
    print(f"{result['seconds_per_plan']:.2f} s per plan, {result['minutes']:.1f} minutes in all; results and pictures in {out}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, OSError, FloatingPointError) as error:
        sys.exit(f"lewm.py: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
