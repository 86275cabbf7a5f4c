"""How fast is this machine, and how long will `lewm.py --train` take on it?

    python -m extras.speed nano                     # about a minute; nano is the preset to time
    python -m extras.speed nano --out growth.png    # two minutes: also how cost grows with a setting

It times the code that --train runs.
"""

import argparse
import dataclasses
import os
import sys
import time
import timeit

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

import lewm
import probe
import pusht

# ======== Parts of a training =========================================================================

def seconds_a_call(work):
    """Seconds that work() takes: once to warm up, once for a guess, then for about 2 s."""
    work()
    calls = max(2, round(2 / timeit.timeit(work, number=1)))
    return timeit.timeit(work, number=calls) / calls

class Enough(Exception):
    pass

def seconds_a_step(cfg, data, device, least=15.0):
    """Seconds a step of lewm.train takes, measured for at least `least` seconds. lewm.train calls `render`
    once or twice before the first step and once in each step; an exception in it ends the training."""
    cfg = dataclasses.replace(cfg, first_lesson_share=0.0, steps=1_000_000)     # so many that none is logged
    times = []
    warm = 9                                        # calls before the first step that counts

    def render(states, size):
        times.append(time.perf_counter())
        if len(times) > warm + 3 and times[-1] - times[warm] > least:
            raise Enough
        return pusht.render(states, size)

    try:
        lewm.train(cfg, data, device=device, render=render)
    except Enough:
        pass
    return (times[-1] - times[warm]) / (len(times) - 1 - warm)

def loss_of(model, pixels, blocks):
    """The loss as lewm.train computes it."""
    with torch.autocast(pixels.device.type, torch.bfloat16, enabled=pixels.device.type == "cuda"):
        loss, _ = model.loss(pixels, blocks)
    return loss

def gradient(model, pixels, blocks):
    """Compute the gradient; `.item()` waits for the GPU."""
    loss_of(model, pixels, blocks).backward()
    return model.encoder.cls_token.grad.sum().item()

def time_losses(cfg, data, device):
    """-> {"loss", "gradient", "sigreg", "plan": seconds, "tflop": TFLOP in loss and gradient}."""
    model = lewm.LeWM(cfg).to(device)
    pixels, blocks = lewm.get_batch(model, data, np.arange(cfg.batch_size), pusht.render)
    z = torch.randn(cfg.batch_size, cfg.frames, cfg.embed_dim, device=device, requires_grad=True)
    loss = seconds_a_call(lambda: loss_of(model, pixels, blocks).item())
    both = seconds_a_call(lambda: gradient(model, pixels, blocks))
    sigreg = seconds_a_call(lambda: torch.autograd.grad(model.sigreg(z), z)[0].sum().item())
    with FlopCounterMode(display=False) as counter:
        gradient(model, pixels, blocks)
    model.eval()
    seen = z[:1, :cfg.context].detach()
    past = blocks[:1, :cfg.context - 1]
    plan = seconds_a_call(lambda: lewm.cem(model, seen, z[1:2, 0], past=past).cpu())
    return {"loss": loss, "gradient": both - loss, "sigreg": sigreg, "plan": plan,
            "tflop": counter.get_total_flops() / 1e12}

def time_proposal(cfg, data, device, steps=200):
    """Seconds that the planner's proposal takes -> of encoding an episode, of a step."""
    model = lewm.LeWM(cfg).to(device)
    seconds = {}
    for count in (1, 1 + steps):
        model.cfg = dataclasses.replace(cfg, proposal_steps=count)
        began = time.perf_counter()
        lewm.fit_planner(model, data, pusht.render)
        seconds[count] = time.perf_counter() - began
    return seconds[1] / len(data["ep_len"]), (seconds[1 + steps] - seconds[1]) / steps

def matrix_tflops(device, n=4096):
    """TFLOP/s in one large matrix product."""
    square = torch.randn(n, n, device=device)
    if device.type == "cuda":
        square = square.bfloat16()
    return 2 * n ** 3 / 1e12 / seconds_a_call(lambda: (square @ square)[0, 0].item())

def speed(preset, device):
    """-> {what: how fast}, for each part of `lewm.py --train --preset ...` on this machine."""
    cfg = lewm.Config.preset(preset)
    began = time.perf_counter()
    data = pusht.collect(100, seed=0)
    recording = (time.perf_counter() - began) / 100
    step = seconds_a_step(cfg, data, device)
    seconds = time_losses(cfg, data, device)
    states = torch.from_numpy(data["state"][:256]).to(device)
    drawing = seconds_a_call(lambda: pusht.render(states, cfg.image_size).cpu()) / 256
    env = pusht.PushT()
    stepping = seconds_a_call(lambda: env.step([0.1, 0.1]))
    recorded = cfg.train_episodes * (1.25 if cfg.first_lesson_share else 1)         # lesson 0: a quarter more
    # an upper limit: a plan is shorter as its deadline nears, and an episode ends at its goal
    plans = cfg.episodes * np.ceil(cfg.budget / cfg.frame_skip / cfg.replan)
    encoding, proposal_step = time_proposal(cfg, data, device)
    proposal = encoding * recorded * (cfg.proposal_steps > 0) + proposal_step * cfg.proposal_steps
    total = recording * recorded + step * cfg.steps + proposal + plans * seconds["plan"]
    return {
        "training steps a second": 1 / step,
        "ms of a step": 1000 * step,
        "ms of drawing its pictures": 1000 * drawing * cfg.batch_size * cfg.frames,
        "ms of the loss, not compiled": 1000 * seconds["loss"],
        "ms of its gradient, not compiled": 1000 * seconds["gradient"],
        "ms of SIGReg, in both": 1000 * seconds["sigreg"],
        "ms of a plan": 1000 * seconds["plan"],
        "TFLOP in a step": seconds["tflop"],
        "TFLOP/s in training": seconds["tflop"] / step,
        "TFLOP/s in one large matrix product": matrix_tflops(device),
        "pictures drawn a second": 1 / drawing,
        "env steps a second": 1 / stepping,
        "episodes recorded a second": 1 / recording,
        "seconds to fit the proposal": proposal,
        "minutes for --train, at most": total / 60}

# ======== How cost grows ==============================================================================

def kept_bytes(work):
    """Bytes that autograd keeps for the gradient of what work() returns, weights too, each tensor once."""
    kept = {}

    def keep(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        result = work()             # kept alive, so that no freed address is counted for another tensor
    del result
    return sum(kept.values())

def cost_of_a_plan(cfg, device):
    """-> {"seconds of a plan"}."""
    model = lewm.LeWM(cfg).to(device).eval()
    z = torch.randn(1, cfg.embed_dim, device=device)
    return {"seconds of a plan": seconds_a_call(lambda: lewm.cem(model, z, z).cpu())}

def cost_of_a_step(cfg, device):
    """-> {"seconds of a step", "GB for its gradient"}: loss and gradient, without the optimizer."""
    model = lewm.LeWM(cfg).to(device)
    shape = (cfg.batch_size, cfg.frames, 3, cfg.image_size, cfg.image_size)
    pixels = torch.randint(0, 256, shape, dtype=torch.uint8, device=device)
    blocks = torch.randn(cfg.batch_size, cfg.frames - 1, cfg.action_block, device=device)
    return {"seconds of a step": seconds_a_call(lambda: gradient(model, pixels, blocks)),
            "GB for its gradient": kept_bytes(lambda: loss_of(model, pixels, blocks)) / 1e9}

def growth(cfg, device):
    """How cost grows with one setting at a time -> {setting: {its value: {what: cost}}}."""
    sizes = [n * cfg.patch_size for n in (1, 2, 4, 7)]
    costs = {"image_size": (cost_of_a_step, sizes), "batch_size": (cost_of_a_step, (16, 32, 64, 128)),
             "candidates": (cost_of_a_plan, (50, 100, 200, 400)), "horizon": (cost_of_a_plan, (1, 2, 4, 8))}
    result = {}
    for setting, (cost, values) in costs.items():
        result[setting] = {}
        for value in values:
            changed = dataclasses.replace(cfg, **{setting: value})
            result[setting][value] = cost(changed, device)
    return result

def draw_growth(path, result):
    panels = {f"{what}, by {setting}": (setting, what) for setting, rows in result.items()
              for what in [*rows.values()][0]}
    titles = [*panels]
    figure, axes = probe.canvas(11, 6, [titles[::2], titles[1::2]])
    for title, (setting, what) in panels.items():
        rows = result[setting]
        costs = {title: [row[what] for row in rows.values()]}
        probe.draw_lines(axes[title], [*rows], costs, xlabel=setting, ylabel=what, ylim=(0, None))
        axes[title].set_xticks([*rows])
    figure.savefig(path, dpi=110)

# ======== Command line ================================================================================

def parse_arguments(argv):
    parser = argparse.ArgumentParser(description="How fast is this machine?", allow_abbrev=False)
    parser.error = lambda text: sys.exit(f"speed.py: {text}; see python -m extras.speed --help")
    flag = parser.add_argument
    flag("preset", choices=lewm.PRESETS, help="the settings to time")
    flag("--out", metavar="FILE.png", help="also measure how cost grows, and draw it here")
    flag("--device", help="cpu, cuda, cuda:1, mps; default: the best there is")
    return parser.parse_args(argv)

def main(argv):
    given = parse_arguments(argv)
    os.environ.pop("MPLBACKEND", None)              # a notebook sets one that may be missing here
    device = lewm.pick_device(given.device)
    for what, value in speed(given.preset, device).items():
        print(f"{what:36}{value:12,.4g}", flush=True)
    if given.out:
        result = growth(lewm.Config.preset(given.preset), device)
        print("\n".join(probe.summary("growth", result)))
        lewm.draw(draw_growth, given.out, result)

if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"speed.py: {' '.join(str(error).split())}")
    except KeyboardInterrupt:
        sys.exit("speed.py: stopped")
