"""What the latent space of a LeWorldModel knows, and what surprises it: section 5 of the paper (arXiv 2603.19312) on any checkpoint.

    python probe.py assets/nano.pt                              # all parts but transfer, 1 to 3 minutes; pictures in runs/probe
    python probe.py runs/nano/checkpoint.pt --only surprise,geometry
    python probe.py assets/nano.pt --only transfer              # planning on pairs of other policies and further goals: slower
    python probe.py --ceiling simulator                         # how far the planner gets with a perfect model
    python probe.py --ceiling states --policy jitter            # and with perfect eyes; compares data policies

Map: Data and codes / 1 Probes / 2 Surprise / 3 Straightening / 4 Latent geometry / 5 Imagination / 6 Action use / 7 Cost
landscape / 8 Transfer and ceilings / Command line.

Everything is measured on scripted episodes whose seeds no training can use. Probes are fitted on one half of the episodes
and judged on the other. Each part returns numbers for probe.json and leaves one picture.
"""

import argparse
import csv
import dataclasses
import math
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import nn
from tqdm import tqdm

import lewm
import pusht

FIRST_SEED = 3_000_000              # of the episodes used here; training takes seeds below 1,000,000
CONTEXT, AHEAD = 3, 8               # frames that imagination starts from, and blocks that it goes on
MOMENT = 6                          # the frame at which a trajectory of `surprise` is disturbed
STYLE = (dict(color="black", ls="-"), dict(color="tab:red", ls="--"), dict(color="tab:blue", ls=":"), dict(color="tab:gray", ls="-."))
GROUPS = {"agent": slice(0, 2), "block": slice(2, 4), "angle": slice(4, 6)}
PAPER = {"linear": {"agent": 0.974, "block": 0.986, "angle": 0.902}, "mlp": {"agent": 0.998, "block": 0.999, "angle": 0.990}}


# ------------------------------------------------------------------------------------------------------------------
# Data and codes. A trajectory is K frames, `frame_skip` env steps apart, with the K - 1 action blocks between them.

def trajectories(episodes, cfg, seed=0):
    """One trajectory an episode: states float32 (E,K,7), raw actions (E,K-1,skip,2), with K = CONTEXT + AHEAD."""
    K, skip = CONTEXT + AHEAD, cfg.frame_skip
    span, states, actions = skip * (K - 1), [], []
    data = pusht.collect(2 * episodes, FIRST_SEED + seed)                   # some episodes are too short
    for e, (first, length) in enumerate(zip(data["ep_offset"], data["ep_len"])):
        if length > span and len(states) < episodes:
            start = first + np.random.default_rng([seed, e]).integers(length - span)
            states.append(data["state"][start:start + span + 1:skip])
            actions.append(data["action"][start:start + span].reshape(K - 1, skip, -1))
    if len(states) < episodes:
        raise ValueError(f"only {len(states)} of {2 * episodes} episodes have {span + 1} steps: frame_skip {skip} is too long")
    return np.stack(states), np.stack(actions)


def draw(states, size, colour=pusht.COLOURS["block"]):
    """states (..., 7) -> pixels uint8 (..., 3, S, S)."""
    states = torch.as_tensor(np.asarray(states, np.float32))
    pixels = torch.cat([pusht.render(some, size, colour) for some in states.flatten(0, -2).split(256)])
    return pixels.unflatten(0, states.shape[:-1])


@torch.no_grad()
def encode(model, pixels):
    """pixels (E,K,3,S,S) -> embeddings (E,K,D) on the CPU."""
    device = model.action_stats.device
    return torch.cat([model.encode(some[None].to(device))[0].cpu() for some in pixels.flatten(0, 1).split(128)]).unflatten(0, pixels.shape[:2])


def blocks(model, actions):
    """raw actions (E,K-1,skip,a) -> z-scored action blocks (E,K-1,A)."""
    mean, std = model.action_stats[:2].cpu()
    return ((torch.as_tensor(actions, dtype=torch.float32) - mean) / std).flatten(2)


@torch.no_grad()
def imagine(model, z, actions):
    """Open loop: context z (E,T0,D), action blocks (E,K-1,A) -> (E,K,D): the context, then predictions alone."""
    device, T0 = model.action_stats.device, z.shape[1]
    ahead = model.rollout(z.to(device), actions[:, None].to(device))[:, 0, T0 - 1:].cpu()
    return torch.cat([z, ahead], dim=1)


def targets(states):
    """states (...,7), an array -> what probes read, float32 (...,6): see `lewm.probe_targets`."""
    return lewm.probe_targets(torch.as_tensor(np.asarray(states, np.float32)))


def untrained_code(world):
    """Embeddings (E,K,D) of the same frames by an encoder that was never trained; made once, for whichever parts ask."""
    if "untrained" not in world:
        torch.manual_seed(0)
        world["untrained"] = encode(lewm.untrained(world["model"]), world["pixels"])
    return world["untrained"]


# ------------------------------------------------------------------------------------------------------------------
# 1 Probes. A linear probe asks what lies open in an embedding, an MLP what is there at all. Beside it stand codes that
# nobody trained for this, because r = 0.9 says nothing until one knows what raw pixels give.

def fit_linear(x, y):
    """lewm.fit_ridge in double precision, x (n,D), y (n,k) -> a function (m,D) -> (m,k)."""
    read = lewm.fit_ridge(x.double(), y.double())
    return lambda new: read(new.double()).float()


def fit_mlp(x, y, steps=1500, width=256, seed=0):
    """Two hidden layers, AdamW. x (n,D), y (n,k) -> a function (m,D) -> (m,k)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        centre, scale, mean, spread = x.mean(0), x.std(0).clamp(min=1e-8), y.mean(0), y.std(0).clamp(min=1e-8)
        net = nn.Sequential(nn.Linear(x.shape[1], width), nn.GELU(), nn.Linear(width, width), nn.GELU(), nn.Linear(width, y.shape[1]))
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, weight_decay=1e-2)
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = 1e-3 * (1 - step / steps)
            index = torch.randint(len(x), (256,))
            error = (net((x[index] - centre) / scale) - (y[index] - mean) / spread).square().mean()
            optimizer.zero_grad()
            error.backward()
            optimizer.step()
    net.requires_grad_(False)
    return lambda new: net((new - centre) / scale) * spread + mean


def pearson(a, b):
    """(n,k) each -> Pearson r of each column, float64 (k,); 0 for a column that is constant."""
    a, b = (x.double() - x.double().mean(0) for x in (a, b))
    return (a * b).sum(0) / ((a * a).sum(0) * (b * b).sum(0)).sqrt().clamp(min=1e-12)


def score(guess, truth):
    """(n,6) each -> {group: {"mse" of standardised targets, "mse_spread" over targets, "r", "error" in px or degrees}}."""
    result = {}
    mse, r = ((guess - truth) / truth.std(0)).square().mean(0), pearson(guess, truth)
    for name, columns in GROUPS.items():
        a, b = guess[:, columns], truth[:, columns]
        if name == "angle":
            turn = torch.atan2(a[:, 0], a[:, 1]) - torch.atan2(b[:, 0], b[:, 1])
            error = torch.rad2deg(torch.atan2(turn.sin(), turn.cos()).abs()).median()
        else:
            error = (a - b).norm(dim=1).median()
        result[name] = {"mse": mse[columns].mean().item(), "mse_spread": mse[columns].std(correction=0).item(),
                        "r": r[columns].mean().item(), "error": error.item()}
    return result


def with_interval(guess, truth, draws=1000, seed=0):
    """`score` of (E,T,6) each, and per group "r_interval", 95 %: whole trajectories are resampled, as their frames are alike."""
    rng, result = np.random.default_rng(seed), score(guess.flatten(0, 1), truth.flatten(0, 1))
    picks = (rng.integers(len(guess), size=len(guess)) for _ in range(draws))
    r = torch.stack([pearson(guess[pick].flatten(0, 1), truth[pick].flatten(0, 1)) for pick in picks])             # (draws, 6)
    for name, columns in GROUPS.items():
        result[name]["r_interval"] = np.percentile(r[:, columns].mean(1).numpy(), (2.5, 97.5)).tolist()
    return result


def probes(world):
    """Tables of all codes; and the MLP probe of the embeddings, which `imagination` uses again."""
    model, z, truth = world["model"], world["z"], targets(world["states"])
    half = len(z) // 2
    untrained = untrained_code(world)
    pixels = world["pixels"].flatten(2).float() / 255
    flat, centre = pixels.flatten(0, 1), pixels[:half].mean((0, 1))
    _, _, axes = torch.pca_lowrank(pixels[:half].flatten(0, 1), q=min(z.shape[2], len(flat) // 4), niter=3)
    codes = {"LeWM": z, "untrained encoder": untrained, "pixels, PCA": ((flat - centre) @ axes).unflatten(0, z.shape[:2])}
    result, figure = {}, Figure(figsize=(10, 7), layout="constrained")
    fits = {}
    for code, x in codes.items():
        for kind, fit in (("linear", fit_linear), ("mlp", lambda a, b: fit_mlp(a, b, world["steps"]))):
            read = fits[code, kind] = fit(x[:half].flatten(0, 1), truth[:half].flatten(0, 1))
            result[f"{code}, {kind}"] = with_interval(read(x[half:]), truth[half:])
    imagined = imagine(model, z[half:, :CONTEXT], world["blocks"][half:])
    for ahead in (1, 5):
        frame = slice(CONTEXT - 1 + ahead, CONTEXT + ahead)
        for name, code in ((f"predicted {ahead} ahead", imagined), (f"encoded {ahead} ahead", z[half:])):
            for kind in ("linear", "mlp"):
                result[f"{name}, {kind}"] = with_interval(fits["LeWM", kind](code[:, frame]), truth[half:, frame])
    labels = ("agent x (px)", "agent y (px)", "block x (px)", "block y (px)", "sine of angle", "cosine of angle")
    guesses = {kind: fits["LeWM", kind](z[half:].flatten(0, 1)) for kind in ("linear", "mlp")}
    for i, axis in enumerate(figure.subplots(2, 3).T.flat):
        actual = truth[half:].flatten(0, 1)[:, i]
        for (kind, guess), look in zip(guesses.items(), (dict(marker="x", color="tab:gray"), dict(marker=".", color="black"))):
            axis.scatter(actual, guess[:, i], s=6, alpha=0.5, lw=0.7, label=f"{kind}, r = {np.corrcoef(actual, guess[:, i])[0, 1]:.2f}", **look)
        axis.axline((actual.mean(), actual.mean()), slope=1, color="tab:red", lw=1)
        axis.set(title=labels[i], xlabel="true", ylabel="read off the embedding")
        axis.legend(fontsize=8)
    world["read"] = fits["LeWM", "mlp"]
    return result, figure


# ------------------------------------------------------------------------------------------------------------------
# 2 Surprise, or violation of expectation: ||z_hat_t - z_t||^2, z_hat from the true history. Three matched trajectories: one
# as it was, one in which the block changes colour at frame MOMENT, one in which agent and block are somewhere else from then on.

def surprise(model, z, actions):
    """z (E,K,D), action blocks (E,K-1,A) -> (E,K-1): squared error of predicting frame t + 1 from the frames up to t."""
    N, device = model.cfg.history, model.action_stats.device
    with torch.no_grad():
        steps = [model.predict(z[:, max(0, t + 1 - N):t + 1].to(device), actions[:, max(0, t + 1 - N):t + 1].to(device))[:, -1].cpu()
                 for t in range(z.shape[1] - 1)]
    return (torch.stack(steps, 1) - z[:, 1:]).square().sum(-1)


def teleported(states, actions, distance, seed):
    """From frame MOMENT on, agent and block are `distance` px away (anywhere on the board for None); the same actions follow."""
    rng, result = np.random.default_rng(seed), states.copy()
    if distance is None:
        moved = [pusht.random_state(rng) for _ in states]
    else:
        moved = displaced(displaced(states[:, MOMENT], "block px", distance, seed), "agent px", distance, seed + 1)
    for e, here in enumerate(moved):
        env = pusht.PushT()
        env.reset(options={"state": here, "goal": here})
        result[e, MOMENT] = here
        for t in range(MOMENT, states.shape[1] - 1):
            for action in actions[e, t]:
                result[e, t + 1] = env.step(action)[0]
    return result


def paired(disturbed, clean, flips=10_000, seed=0):
    """(n,) each -> mean difference, Cohen's d of the differences, and the two-sided p of a paired sign-flip test."""
    difference = np.asarray(disturbed - clean, np.float64)
    signs = np.random.default_rng(seed).choice((-1.0, 1.0), (flips, len(difference)))
    extreme = np.abs((signs * difference).mean(1)) >= abs(difference.mean()) - 1e-12
    return {"difference": difference.mean(), "effect_size": difference.mean() / max(difference.std(ddof=1), 1e-12),
            "p": (1 + extreme.sum()) / (1 + flips), "n": len(difference)}


def roc_area(positive, negative):
    """Probability that a positive scores above a negative, ties counting half."""
    positive, negative = np.asarray(positive)[:, None], np.sort(np.asarray(negative))
    below, upto = (np.searchsorted(negative, positive, side=side) for side in ("left", "right"))
    return float((below + upto).mean() / (2 * len(negative)))


def surprises(world):
    """Mean curves with a 95 % band, paired tests, sensitivities, and the area under a teleport detector's ROC curve."""
    model, actions, states, size, seed = world["model"], world["blocks"], world["states"], world["model"].cfg.image_size, world["seed"]
    raw, clean = world["actions"], world["pixels"]
    red, grey = np.array([200, 40, 40]), np.array(pusht.COLOURS["block"])

    def recoloured(share):
        return torch.cat([clean[:, :MOMENT], draw(states[:, MOMENT:], size, tuple((1 - share) * grey + share * red))], 1)

    films = {"clean": clean, "block turns red": recoloured(1.0), "teleport": draw(teleported(states, raw, None, seed), size)}
    curves = {name: surprise(model, encode(model, film), actions).numpy() for name, film in films.items()}
    at = MOMENT - 1                                                         # surprise about frame MOMENT
    result = {name: paired(curves[name][:, at], curves["clean"][:, at]) for name in list(films)[1:]}
    result["teleport"]["roc_area"] = roc_area(curves["teleport"][:, at], curves["clean"].ravel())
    some = slice(0, min(60, len(states)))

    def over_clean(film):
        """`paired` of surprise at the moment, and its mean as a multiple of the clean films'."""
        at_moment, usual = surprise(model, encode(model, film), actions[some])[:, at].numpy(), curves["clean"][some, at]
        return {"ratio": at_moment.mean() / usual.mean(), **paired(at_moment, usual)}

    by_distance = {distance: over_clean(draw(teleported(states[some], raw[some], distance, seed), size))
                   for distance in (5, 10, 20, 40, 80, 160)}
    by_colour = {round(share * float(np.linalg.norm(red - grey))): over_clean(recoloured(share)[some])
                 for share in (0.25, 0.5, 0.75, 1.0)}
    result.update(by_teleport_px=by_distance, by_colour_distance=by_colour)

    figure = Figure(figsize=(10, 7.5), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=(1, 1.1))
    shown = range(MOMENT - 3, MOMENT + 3)
    for row, (name, film) in zip(top.subplots(3, len(shown)), films.items()):
        for axis, t in zip(row, shown):
            axis.imshow(film[0, t].permute(1, 2, 0).numpy())
            axis.set(xticks=[], yticks=[], title=f"frame {t}" if name == "clean" else "")
        row[0].set_ylabel(name, fontsize=8)
    left, middle, right = bottom.subplots(1, 3, width_ratios=(2, 1, 1))
    for (name, curve), style in zip(curves.items(), STYLE):
        mean, band = curve.mean(0), 1.96 * curve.std(0) / math.sqrt(len(curve))
        left.plot(range(1, curve.shape[1] + 1), mean, label=name, **style)
        left.fill_between(range(1, curve.shape[1] + 1), mean - band, mean + band, color=style["color"], alpha=0.2, lw=0)
    left.axvline(MOMENT, color="tab:gray", lw=1)
    left.set(title=f"surprise, mean and 95 % band, n = {len(states)}", xlabel=f"frame ({model.cfg.frame_skip / 10:g} s apart)", ylabel="squared latent distance")
    left.legend(fontsize=8)
    for axis, values, label in ((middle, by_distance, "teleport (px)"), (right, by_colour, "colour change (RGB distance)")):
        axis.plot(list(values), [row["ratio"] for row in values.values()], "k.-")
        axis.axhline(1, color="tab:gray", ls=":")
        axis.set(title="surprise / clean", xlabel=label)
    return result, figure


# ------------------------------------------------------------------------------------------------------------------
# 3 Straightening. Nothing asks for it, yet latent paths become straighter than the pixels' while the model learns to predict.

def straightening(world):
    """The paper's measure (mean cosine of consecutive latent velocities), and its course in training where metrics.csv has it."""
    result = {"LeWM": lewm.straightness(world["z"]), "untrained encoder": lewm.straightness(untrained_code(world)),
              "pixels": lewm.straightness(world["pixels"].flatten(2).float())}
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.bar(list(result), list(result.values()), color=("black", "tab:gray", "lightgray"), edgecolor="black")
    left.axhline(0, color="black", lw=0.8)
    left.set(title="straightness, held-out", ylabel="mean cosine")
    if world["metrics"].is_file():
        with open(world["metrics"]) as file:
            rows = list(csv.DictReader(file))
        right.plot([int(row["step"]) for row in rows], [float(row["straightness"]) for row in rows], **STYLE[0])
        right.set(title="over training", xlabel="step", ylabel="mean cosine")
    else:
        right.set_axis_off()
        right.text(0.5, 0.5, "no metrics.csv beside the checkpoint:\nno course over training", ha="center")
    return result, figure


# ------------------------------------------------------------------------------------------------------------------
# 4 Latent geometry. The board should come back as a sheet; the spectrum and the quantiles show what SIGReg promised.

def geometry(world, side=14):
    """Principal components of a grid of states, the covariance's spectrum, and quantiles of random projections against N(0, 1)."""
    model, z = world["model"], world["z"].flatten(0, 1)
    figure, result = Figure(figsize=(10, 6.5), layout="constrained"), {}
    axes = figure.subplots(2, 3)
    shift = pusht.centre(0, 0, math.cos(0.8), math.sin(0.8))                # from the block's position to its centre
    for row, (what, base, reach) in enumerate((("agent", [0, 0, 256, 230, 0.8, 0, 0], 196), ("block", [60, 60, 0, 0, 0.8, 0, 0], 100))):
        line = pusht.BOARD / 2 + np.linspace(-reach, reach, side)           # the block's centre seldom leaves the middle
        places = np.stack(np.meshgrid(line, line), -1).reshape(-1, 2)
        states = np.tile(np.array(base, np.float32), (len(places), 1))
        states[:, 2 * row:2 * row + 2] = places - np.array(shift) * row
        grid = encode(model, draw(states[None], model.cfg.image_size))[0]
        grid = grid - grid.mean(0)
        _, s, v = torch.linalg.svd(grid, full_matrices=False)
        result[f"{what} grid, share of 2 components"] = (s[:2].square().sum() / s.square().sum()).item()
        for axis, colour, name in ((axes[row, 0], places[:, 0], "x"), (axes[row, 1], places[:, 1], "y")):
            dots = axis.scatter(*(grid @ v[:2].T).T, c=colour, cmap="viridis", s=14)
            figure.colorbar(dots, ax=axis, label=f"{what} {name} (px)")
            axis.set(title=f"{what} moved over the board", xlabel="component 1", ylabel="component 2")
    spectrum = torch.linalg.eigvalsh(torch.cov(z.T)).flip(0)
    result.update(effective_rank=lewm.effective_rank(z), dimensions=z.shape[1], smallest_std=z.std(0).min().item(), largest_std=z.std(0).max().item())
    axes[0, 2].plot(range(1, len(spectrum) + 1), spectrum, "k.-")
    axes[0, 2].axhline(1, color="tab:red", ls="--", label="N(0, I)")
    axes[0, 2].set(title=f"spectrum, eff. rank {result['effective_rank']:.1f}", xlabel="component", ylabel="variance", yscale="log")
    axes[0, 2].legend(fontsize=8)
    generator = torch.Generator().manual_seed(0)
    directions = nn.functional.normalize(torch.randn(z.shape[1], 8, generator=generator), dim=0)
    levels = torch.linspace(0.01, 0.99, 99)
    expected = math.sqrt(2) * torch.erfinv(2 * levels - 1)
    for projected in (z @ directions).T:
        axes[1, 2].plot(expected, projected.quantile(levels), color="black", lw=0.7, alpha=0.6)
    axes[1, 2].axline((0, 0), slope=1, color="tab:red", ls="--", label="N(0, 1)")
    axes[1, 2].set(title="8 random projections", xlabel="quantiles of N(0, 1)", ylabel="quantiles of the embeddings")
    axes[1, 2].legend(fontsize=8)
    return result, figure


# ------------------------------------------------------------------------------------------------------------------
# 5 Imagination. The model has no decoder; this one is trained afterwards, on frozen embeddings, only to look at them.

def fit_decoder(z, pixels, steps=1500, side=32, seed=0):
    """z (n,D), pixels uint8 (n,3,S,S) -> a function (m,D) -> float (m,3,side,side) in [0, 1]."""
    small = nn.functional.interpolate(pixels.float() / 255, size=(side, side), mode="bilinear", antialias=True)
    mean = small.mean(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(z.shape[1], 512), nn.GELU(), nn.Linear(512, 512), nn.GELU(), nn.Linear(512, small[0].numel()))
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
        for step in tqdm(range(steps), desc="decoder", leave=False):
            optimizer.param_groups[0]["lr"] = 1e-3 * (1 - step / steps)
            index = torch.randint(len(z), (128,))
            error = (net(z[index]).view(-1, 3, side, side) + mean - small[index]).square().mean()
            optimizer.zero_grad()
            error.backward()
            optimizer.step()
    net.requires_grad_(False)
    return lambda new: (net(new).view(-1, 3, side, side) + mean).clamp(0, 1)


def imagination(world):
    """A film strip, and the open-loop error against the horizon beside copying the last context frame."""
    model, z, truth = world["model"], world["z"], targets(world["states"])
    half = len(z) // 2
    read = world.get("read") or fit_mlp(z[:half].flatten(0, 1), truth[:half].flatten(0, 1), world["steps"])
    decode = fit_decoder(z[:half].flatten(0, 1), world["pixels"][:half].flatten(0, 1), world["steps"])
    imagined = imagine(model, z[half:, :CONTEXT], world["blocks"][half:])
    copied = z[half:, CONTEXT - 1:CONTEXT].expand(-1, AHEAD, -1)
    result = {}
    for name, guess in (("open loop", imagined[:, CONTEXT:]), ("copy last frame", copied), ("encoded true frame", z[half:, CONTEXT:])):
        by_horizon = [score(read(guess[:, t]), truth[half:, CONTEXT + t]) for t in range(AHEAD)]
        result[name] = {"latent": (guess - z[half:, CONTEXT:]).square().mean((0, 2)).tolist(),
                        **{f"{group}_error": [row[group]["error"] for row in by_horizon] for group in GROUPS}}
    figure = Figure(figsize=(11, 6.5), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=(1.25, 1))
    film = {"true": world["pixels"][half].float() / 255, "decoded": decode(z[half]), "imagined": decode(imagined[0])}
    for row, (name, pictures) in zip(top.subplots(3, CONTEXT + AHEAD), film.items()):
        for t, axis in enumerate(row):
            axis.imshow(pictures[t].permute(1, 2, 0).numpy())
            axis.set(xticks=[], yticks=[], title=("context" if t < CONTEXT else f"+{t - CONTEXT + 1}") if name == "true" else "")
            axis.title.set_fontsize(8)
        row[0].set_ylabel(name, fontsize=8)
    for axis, (key, unit) in zip(bottom.subplots(1, 4), (("latent", "squared error a dimension"), ("agent_error", "px"), ("block_error", "px"), ("angle_error", "degrees"))):
        for (name, row), style in zip(result.items(), STYLE):
            axis.plot(range(1, AHEAD + 1), row[key], label=name, **style)
        axis.set(title=key.replace("_", " "), xlabel=f"blocks ahead ({model.cfg.frame_skip / 10:g} s)", ylabel=unit)
    axis.legend(fontsize=7)
    return result, figure


# ------------------------------------------------------------------------------------------------------------------
# 6 Action use. A model that ignores actions predicts as well with the wrong ones.

def action_use(world):
    """Open-loop latent error by horizon with true, shuffled and zero (mean) actions."""
    model, z, true = world["model"], world["z"], world["blocks"]
    variants = {"true actions": true, "shuffled actions": true.roll(1, 0), "zero actions": torch.zeros_like(true)}
    result = {name: (imagine(model, z[:, :CONTEXT], actions) - z)[:, CONTEXT:].square().mean((0, 2)).tolist() for name, actions in variants.items()}
    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axis = figure.subplots()
    for (name, errors), style in zip(result.items(), STYLE):
        axis.plot(range(1, AHEAD + 1), errors, label=name, **style)
    axis.set(title=f"does it use its actions? n = {len(z)}", xlabel=f"blocks ahead ({model.cfg.frame_skip / 10:g} s)", ylabel="squared latent error a dimension")
    axis.legend(fontsize=8)
    return result, figure


# ------------------------------------------------------------------------------------------------------------------
# 7 Cost landscape. The planner descends the squared distance to the goal's embedding, so that distance had better grow with the
# distance in the world: where it is already as large as between any two states, it tells the planner nothing.

DISPLACEMENTS = {"agent px": (5, 10, 20, 40, 80, 160), "block px": (5, 10, 20, 40, 80, 160), "block degrees": (5, 10, 20, 45, 90, 180)}


def clear(states):
    """Which of states (...,7) can happen: the agent does not lie on the block."""
    gap = [pusht._distance_to_block(x, y, block_x, block_y, math.cos(angle), math.sin(angle))
           for x, y, block_x, block_y, angle in states.reshape(-1, 7)[:, :5].tolist()]
    return np.reshape(np.array(gap) > pusht.AGENT_RADIUS - 1, states.shape[:-1])


def displaced(states, what, amount, seed=0):
    """states (E,7) with the agent or the block moved in random directions, or the block turned about its centre of gravity.

    Of the directions one is taken that stays on the board and keeps the agent off the block, where there is one.
    """
    rng, states = np.random.default_rng(seed), states.astype(np.float64)
    if what == "block degrees":
        x, y, angle = states[:, 2:5].T
        turned = angle + np.radians(amount) * rng.choice((-1, 1), len(states))
        before, after = (np.stack(pusht.centre(x, y, np.cos(a), np.sin(a)), 1) for a in (angle, turned))
        states[:, 2:4] += before - after                                    # so that the centre stays
        states[:, 4] = turned
    else:
        columns, angle = slice(0, 2) if what == "agent px" else slice(2, 4), rng.uniform(0, 2 * np.pi, (64, len(states)))
        moved = np.repeat(states[None], 64, 0)                                                          # (64, E, 7), to choose from
        moved[..., columns] += amount * np.stack([np.cos(angle), np.sin(angle)], -1)
        outside = np.maximum(np.abs(moved[..., columns] - pusht.BOARD / 2).max(-1), pusht.BOARD / 2 - 60)           # equal for all on the board
        states = moved[(outside + 0.1 * ~clear(moved)).argmin(0), np.arange(len(states))]               # the first of the best
    return states


def landscape(world):
    """Squared latent distance after a displacement, as a share of that between unrelated states: mean, its 95 % interval, n.

    States in which the turned block would lie on the agent are left out.
    """
    model, states, z = world["model"], world["states"][:, CONTEXT], world["z"][:, CONTEXT]
    unrelated = 2 * z.var(0).sum()
    figure, result = Figure(figsize=(9, 3), layout="constrained"), {}
    for axis, (what, amounts) in zip(figure.subplots(1, 3, sharey=True), DISPLACEMENTS.items()):
        result[what] = {}
        for amount in amounts:
            moved = displaced(states, what, amount, world["seed"])
            possible = clear(moved)
            share = (encode(model, draw(moved[None, possible], model.cfg.image_size))[0] - z[possible]).square().sum(-1) / unrelated
            mean, half = share.mean().item(), 1.96 * share.std().item() / math.sqrt(len(share))
            result[what][amount] = {"mean": mean, "interval": [mean - half, mean + half], "n": len(share)}
        axis.plot(amounts, [row["mean"] for row in result[what].values()], "k.-")
        axis.axhline(1, color="tab:gray", ls=":")
        axis.set(title="latent cost / unrelated states'", xlabel=f"displacement, {what}", ylim=(0, 1.2))
    return result, figure


# ------------------------------------------------------------------------------------------------------------------
# 8 Transfer and ceilings. Does the model plan towards further goals, and on another policy's pairs? And what limits it: the
# planner, the model or the eyes? The simulator in the model's place shows the planner's limit; training on the state's numbers in
# place of pictures spares the eyes. All of it on development pairs.

PAIRS = (("purposeful", 25), ("purposeful", 50), ("purposeful", 75), ("jitter", 25))      # data policy, env steps to the goal


def plan_in(model, cfg, episodes, policy="purposeful", distance=25, render=pusht.render, seed=0):
    """`lewm.evaluate` on development pairs of a data policy, with twice `distance` env steps allowed and any `render`."""
    world = SimpleNamespace(**{**vars(pusht), "render": render, "held_out_pairs": partial(pusht.held_out_pairs, policy=policy)})
    cfg = dataclasses.replace(cfg, goal_distance=distance, budget=2 * distance)
    result = lewm.evaluate(model, cfg, "dev", episodes, seed, world)
    row = result["policies"]["LeWM + CEM"]
    print(f"pairs of {policy}, {distance} steps: {row['success']:.1%} ({row['interval'][0]:.1%} to {row['interval'][1]:.1%}), n = {episodes}, "
          f"random {result['policies']['random actions']['success']:.1%}, {result['seconds_per_plan']:.2f} s per plan", flush=True)
    return result


def transfer(world):
    """Planning towards further goals, with deadlines as far as before, and on pairs of another policy than the training data's."""
    model = world["model"]
    result = {f"{policy}, {distance} steps": plan_in(model, model.cfg, world["pairs"], policy, distance, seed=world["seed"]) for policy, distance in PAIRS}
    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axis = figure.subplots()
    for place, (name, style) in enumerate((("LeWM + CEM", "ko"), ("random actions", "ks"))):
        rows = [row["policies"][name] for row in result.values()]
        success, ends = np.array([row["success"] for row in rows]), np.array([row["interval"] for row in rows]).T
        axis.errorbar(np.arange(len(rows)) + 0.15 * place, success, np.abs(ends - success), fmt=style, capsize=3, label=name, fillstyle=("full", "none")[place])
    axis.set(xticks=range(len(result)), xticklabels=result, ylim=(0, 1), ylabel="success, 95 % interval", title=f"development pairs, n = {world['pairs']} each")
    axis.legend(fontsize=8)
    return result, figure


class Simulator:
    """The world itself in the place of a LeWM. An "embedding" is the state, scaled so that success is roughly a distance of 1."""
    def __init__(self, cfg, action_stats):
        self.cfg, self.action_stats, self.env = cfg, action_stats, pusht.PushT()

    def eval(self):
        return self

    def encode(self, states):
        """states (...,7) -> (...,8): agent and block in 20 px, angle in 20 degrees, and velocities that hardly count."""
        turn = torch.stack([states[..., 4].cos(), states[..., 4].sin()], -1) / math.radians(20)
        return torch.cat([states[..., :4] / 20, turn, states[..., 5:] / 1e4], -1)

    def rollout(self, z, plans):
        """z (B,1,8), plans (B,N,H,A), z-scored -> (B,N,H,8), by playing every plan."""
        mean, std = self.action_stats[:2]
        actions = (plans.unflatten(-1, (self.cfg.frame_skip, -1)) * std + mean).numpy()              # (B,N,H,skip,2)
        ends = torch.zeros(*plans.shape[:3], z.shape[-1])
        for b, n in np.ndindex(*plans.shape[:2]):
            x = z[b, -1].double()
            angle = torch.atan2(x[5], x[4]) % (2 * math.pi)
            self.env.reset(options={"state": torch.cat([20 * x[:4], angle[None], 1e4 * x[6:]]).numpy()})
            for h, block in enumerate(actions[b, n]):
                for action in block:
                    self.env.step(action)
                ends[b, n, h] = self.encode(torch.from_numpy(self.env.state).float())
        return ends


def numbers_as_pictures(states, size=8):
    """states (n,7) -> uint8 (n,3,8,8) that hold agent x, y, block x, y, sine and cosine, each rounded in 32 ways."""
    y = lewm.probe_targets(torch.as_tensor(states).float())                                          # (n, 6)
    share = torch.cat([y[:, :4] / pusht.BOARD, (y[:, 4:] + 1) / 2], 1).clamp(0, 1)
    return (255 * share[:, :, None] + torch.arange(32, device=share.device) / 32).floor().clamp(max=255).to(torch.uint8).view(-1, 3, size, size)


def ceiling(kind, policy, episodes, seed, steps, out, device):
    """-> {pairs: result of `lewm.evaluate`}: with the simulator as the model, on pairs of a data policy, or with a LeWM trained on its states."""
    if kind == "simulator":
        cfg = lewm.Config.preset("nano", seed=seed)
        stats = lewm.action_statistics(pusht.collect(200, seed, policy=policy)["action"])
        return {f"{policy}, 25 steps": plan_in(Simulator(cfg, stats), cfg, episodes, policy, render=lambda states, size: states)}
    cfg = lewm.Config.preset("nano", seed=seed, steps=steps, image_size=8, patch_size=8, embed_dim=32, whiten=False)
    data = pusht.collect(2000, seed, policy=policy)
    data["pixels"] = numbers_as_pictures(data["state"]).permute(0, 2, 3, 1).numpy()
    model = lewm.train(cfg, data, out / f"states_{policy}", device=device)
    return {f"{pairs}, 25 steps": plan_in(model, cfg, episodes, pairs, render=numbers_as_pictures) for pairs in ("purposeful", "jitter")}


# ------------------------------------------------------------------------------------------------------------------
# Command line.

PARTS = {"probes": probes, "surprise": surprises, "straightening": straightening, "geometry": geometry, "imagination": imagination, "actions": action_use,
         "landscape": landscape, "transfer": transfer}


def summary(result):
    """The tables that are printed, as one string."""
    lines = []
    if "probes" in result:
        lines.append(f"{'probe':28}" + "".join(f"{name + ' mse':>12}{'r':>7}{'error':>9}" for name in GROUPS))
        for code, row in result["probes"].items():
            lines.append(f"{code:28}" + "".join(f"{row[name]['mse']:12.3f}{row[name]['r']:7.3f}{row[name]['error']:6.1f}{' °' if name == 'angle' else ' px'}" for name in GROUPS))
        lines += [f"{'paper, ' + kind:28}" + "".join(f"{'':12}{r:7.3f}{'':9}" for r in row.values()) for kind, row in PAPER.items()]
    for name in ("block turns red", "teleport") if "surprise" in result else ():
        row = result["surprise"][name]
        lines.append(f"surprise, {name}: {row['difference']:+.2f} over clean, effect size {row['effect_size']:.2f}, p = {row['p']:.4f}, n = {row['n']}"
                     + (f", ROC area {row['roc_area']:.2f}" if "roc_area" in row else ""))
    if "straightening" in result:
        lines.append("straightness: " + ", ".join(f"{name} {value:.2f}" for name, value in result["straightening"].items()))
    if "geometry" in result:
        lines.append("effective rank {effective_rank:.1f} of {dimensions}, std {smallest_std:.2f} to {largest_std:.2f}".format(**result["geometry"]))
    for what, shares in result.get("landscape", {}).items():
        lines.append(f"latent cost by {what}: " + ", ".join(f"{amount}: {row['mean']:.2f}" for amount, row in shares.items()))
    for name, errors in result.get("actions", {}).items():
        lines.append(f"{name}: latent error {errors[0]:.3f} one block ahead, {errors[4]:.3f} five ahead")
    return "\n".join(lines)


def parse_arguments(argv):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("checkpoint", metavar="CKPT", nargs="?", help="of lewm.py; one comes with the project: assets/nano.pt")
    parser.add_argument("--only", help=f"parts to run, with commas between: {','.join(PARTS)}; default: all but transfer")
    parser.add_argument("--ceiling", choices=("simulator", "states"), help="instead: plan with a perfect model, or train one with perfect eyes")
    parser.add_argument("--policy", choices=pusht.POLICIES, help="whose data, for --ceiling states, or pairs, for --ceiling simulator; default: purposeful")
    parser.add_argument("--pairs", type=int, help="development pairs to plan in, for transfer and --ceiling; default: 50")
    parser.add_argument("--out", default="runs/probe", metavar="DIR", help="where pictures and probe.json go; default: %(default)s")
    parser.add_argument("--seed", type=int, help="which held-out episodes; with --ceiling, of data and training; default: 0")
    parser.add_argument("--device", help="cpu, cuda, mps; default: the best there is")
    parser.add_argument("--steps", type=int, help="optimizer steps of each MLP probe, of the decoder and of --ceiling states; default: 1500")
    parser.add_argument("--episodes", type=int, help="held-out trajectories; half of them fit the probes; default: 240")
    args = parser.parse_args(argv)
    wanted = args.only.split(",") if args.only else list(PARTS)[:-1]
    if set(wanted) - set(PARTS):
        raise ValueError(f"--only {args.only}: the parts are {','.join(PARTS)}")
    if bool(args.checkpoint) == bool(args.ceiling):
        raise ValueError("say which checkpoint, as in: python probe.py assets/nano.pt, or --ceiling simulator, or --ceiling states")
    for flag, fits, least, default in (
            ("policy", args.ceiling, None, "purposeful"), ("only", args.checkpoint, None, None), ("episodes", args.checkpoint, 8, 240),
            ("pairs", args.ceiling or "transfer" in wanted, 1, 50), ("steps", args.ceiling != "simulator", 1, 1500), ("seed", True, 0, 0)):
        value = getattr(args, flag)
        if value is not None and not fits:
            raise ValueError(f"--{flag} {value} has no effect here: leave it out; python probe.py --help says what it goes with")
        if value is not None and least is not None and value < least:
            raise ValueError(f"--{flag} is {value}, it must be at least {least}")
        setattr(args, flag, default if value is None else value)
    return args, wanted


def main(argv):
    args, wanted = parse_arguments(argv)
    began, device, out = time.time(), lewm.pick_device(args.device), Path(args.out)
    if args.ceiling:
        result = {"command": "python probe.py " + " ".join(argv), "seed": args.seed,
                  **ceiling(args.ceiling, args.policy, args.pairs, args.seed, args.steps, out, device), "minutes": (time.time() - began) / 60}
        lewm.write_json(out / f"ceiling_{args.ceiling}_{args.policy}.json", result)
        return
    model, cfg, _ = lewm.load_checkpoint(args.checkpoint, device)
    if cfg.action_dim != 2:
        raise ValueError(f"{args.checkpoint} was trained with action_dim {cfg.action_dim}: these are probes of Push-T, which has 2")
    states, actions = trajectories(args.episodes, cfg, args.seed)
    pixels = draw(states, cfg.image_size)
    world = {"model": model, "states": states, "actions": actions, "blocks": blocks(model, actions), "pixels": pixels,
             "z": encode(model, pixels), "metrics": Path(args.checkpoint).parent / "metrics.csv", "seed": args.seed, "steps": args.steps, "pairs": args.pairs}
    result = {"command": "python probe.py " + " ".join(argv), "seed": args.seed, "n": args.episodes, "paper_r": PAPER}
    for name in tqdm([part for part in PARTS if part in wanted], desc="parts"):
        result[name], figure = PARTS[name](world)
        lewm.write_atomically(out / f"{name}.png", lambda temporary: figure.savefig(temporary, dpi=110))
    result["minutes"] = (time.time() - began) / 60
    lewm.write_json(out / "probe.json", result)
    print(summary(result))
    print(f"{result['minutes']:.1f} minutes; pictures and probe.json in {out}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, OSError, FloatingPointError) as error:
        sys.exit(f"probe.py: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
