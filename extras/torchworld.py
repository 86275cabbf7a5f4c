"""LeWM in lewm.py beside LeWM in torch-world, a library of world models: which takes less time on a CPU?

    pip install torch-world==0.2.0
    python -m extras.torchworld            # a minute of one core's time

Timed is one thread's CPU time, so that other programs matter less. The two take turns; a ratio is of one
round. Made equal: the paper's sizes, float32, nothing compiled, the same normalised pictures, two windows of
four frames; loss, gradient, clipping and the same fused AdamW. A plan has the same number of rollouts, elites
and iterations, the same bounds for actions, and starts from one encoded frame. What differs: torch-world has
a fixed sin-cos position embedding, biases in the predictor's q, k, v, no second LayerNorm in its branches,
and dropout in fewer places; lewm.py computes the last encoder layer's MLP for the CLS token alone, checks
what it is given, and measures the std of the embeddings for its log.
"""

import sys
import time

import numpy as np
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import lewm

def models(cfg):
    """-> the LeWM of lewm.py and that of torch-world, of the same sizes. There all widths are embed_dim."""
    from torch_world.models import LeWM
    from torch_world.nn import CLSEncoder
    encoder = CLSEncoder(cfg.image_size, cfg.patch_size, cfg.embed_dim, cfg.encoder_depth, cfg.encoder_heads)
    theirs = LeWM(
        encoder, cfg.action_block, cfg.embed_dim, cfg.history, cfg.predictor_depth, cfg.predictor_heads,
        cfg.predictor_head_dim, cfg.predictor_mlp, cfg.projector_hidden, cfg.dropout, cfg.sigreg_weight)
    return lewm.LeWM(cfg), theirs

def step_of(model, loss_of, cfg):
    """-> a function that makes one training step and returns its loss."""
    optimizer = torch.optim.AdamW(model.parameters(), cfg.lr, weight_decay=cfg.weight_decay, fused=True)
    def step():
        loss = loss_of()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip)
        optimizer.step()
        return loss.item()

    return step

def works(cfg):
    """-> {"step", "plan": [of lewm.py, of torch-world]}, functions that do it once."""
    from torch_world.planning import CEM
    ours, theirs = models(cfg)
    pixels = torch.randn(cfg.batch_size, cfg.frames, 3, cfg.image_size, cfg.image_size)
    blocks = torch.randn(cfg.batch_size, cfg.frames, cfg.action_block)
    steps = [step_of(ours, lambda: ours.loss(pixels, blocks[:, :-1])[0], cfg),
             step_of(theirs, lambda: theirs(pixels, blocks)["loss"], cfg)]
    z, goal = torch.randn(2, 1, cfg.embed_dim)
    cem = CEM(cfg.horizon, cfg.action_block, cfg.candidates, cfg.elites, cfg.iterations, bounds=(-1.0, 1.0))
    plans = [lambda: lewm.cem(ours.eval(), z, goal), lambda: cem(theirs.eval(), z[:, None], goal)]
    return {"step": steps, "plan": plans}

def take_turns(functions, rounds):
    """-> CPU seconds (rounds,2), and the GFLOP of each, counted in a warm-up call."""
    gflop = []
    for function in functions:
        with FlopCounterMode(display=False) as counter:
            function()
        gflop.append(counter.get_total_flops() / 1e9)
    seconds = np.zeros((rounds, len(functions)))
    for row in seconds:
        for column, function in enumerate(functions):
            began = time.process_time()
            function()
            row[column] = time.process_time() - began
    return seconds, gflop

def main(rounds=5, **changes):
    cfg = lewm.Config.preset("paper", **{"batch_size": 2, "iterations": 3, **changes})
    for what, functions in works(cfg).items():
        seconds, gflop = take_turns(functions, rounds)
        for name, median, count in zip(("lewm.py", "torch-world"), np.median(seconds, axis=0), gflop):
            print(f"{what}  {name:12}{median:8.3f} s{count:8.1f} GFLOP")
        low, ratio, high = np.quantile(seconds[:, 1] / seconds[:, 0], (0, 0.5, 1))
        print(f"{what}  torch-world / lewm.py{ratio:6.2f} ({low:.2f} to {high:.2f})", flush=True)

if __name__ == "__main__":
    torch.set_num_threads(1)
    try:
        main()
    except ImportError as error:
        sys.exit(f"torchworld.py: pip install torch-world==0.2.0 ({error})")
