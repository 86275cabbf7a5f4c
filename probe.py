"""What the latent space of a LeWorldModel knows, and what surprises it: section 5 of arXiv 2603.19312.

    python probe.py assets/nano.pt                           # all parts, 1 to 3 minutes; see --only
    python probe.py --ceiling simulator                      # how far the planner gets with a perfect model
    python probe.py --speed nano                             # how fast is this machine?
    python probe.py --compare pldm                           # LeWM beside a loss with seven terms
    python probe.py --compare ablations                      # LeWM with parts changed or left out, in hours
    python probe.py --compare dino-wm                        # what would planning with patch tokens cost?
    python probe.py --bisect-lambda                          # searches the weight of SIGReg
    python probe.py --curves runs/a runs/b --out curves.png  # compares the course of trainings
    python probe.py --import weights.pt --out checkpoint.pt  # turns the authors' weights into a checkpoint
    python probe.py --export checkpoint.pt --out weights.pt  # turns a checkpoint into such weights

Map: Held-out data and pictures / 1 Probes / 2 Surprise / 3 Geometry, imagination and actions / 4 Planning /
5 Comparisons / 6 Speed / 7 The authors' weights / 8 Command line. Letters as in lewm.py. A part takes Held
and gives numbers and a picture.
"""

import argparse
import contextlib
import dataclasses
import json
import math
import sys
import time
import timeit
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import lewm
import pusht

FIRST_SEED = 3_000_000              # of the episodes used here; training takes seeds below 1,000,000
CONTEXT, AHEAD, MOMENT = 3, 8, 6    # frames to imagine from, blocks to imagine; frame of the surprise
TARGETS = ["agent x (px)", "agent y (px)", "block x (px)", "block y (px)", "sin(angle)", "cos(angle)"]
GROUPS = {"agent": slice(0, 2), "block": slice(2, 4), "angle": slice(4, 6)}     # of TARGETS
RED, GREY = np.array([200, 40, 40]), np.array(pusht.COLOURS["block"])


# ======== Held-out data and pictures ==================================================================

@dataclasses.dataclass
class Held:
    """Trajectories that no training can see: T frames, `frame_skip` env steps apart, and blocks between."""
    model: lewm.LeWM
    states: np.ndarray              # float32 (E,T,7)
    actions: np.ndarray             # raw (E,T-1,skip,2)
    blocks: torch.Tensor            # the same actions, z-scored (E,T-1,A)
    pixels: torch.Tensor            # uint8 (E,T,3,S,S)
    z: torch.Tensor                 # (E,T,D)
    untrained: torch.Tensor         # (E,T,D) by an encoder that was never trained
    seed: int = 0                   # of the trajectories, and of what is drawn at random
    steps: int = 1500               # optimizer steps of each MLP probe and of the decoder


def trajectories(episodes, cfg, seed=0):
    """One trajectory an episode: states float32 (E,T,7), raw actions (E,T-1,skip,2)."""
    skip, span = cfg.frame_skip, cfg.frame_skip * (CONTEXT + AHEAD - 1)
    data = pusht.collect(2 * episodes, FIRST_SEED + seed)       # twice as many, as some are too short
    long = np.flatnonzero(data["ep_len"] > span)[:episodes]
    lewm.require(len(long) == episodes, f"too few episodes have {span + 1} steps: lower frame_skip {skip}")
    starts = [np.random.default_rng([seed, e]).integers(data["ep_len"][e] - span) for e in long]
    rows = (data["ep_offset"][long] + starts)[:, None] + np.arange(span + 1)            # (E,span+1)
    return data["state"][rows[:, ::skip]], data["action"][rows[:, :-1]].reshape(episodes, -1, skip, 2)


def draw(states, size, colour=GREY):
    """states (...,7) -> pixels uint8 (...,3,S,S)."""
    parts = torch.as_tensor(states).flatten(0, -2).split(256)
    return torch.cat([pusht.render(some, size, colour) for some in parts]).unflatten(0, states.shape[:-1])


@torch.no_grad()
def encode(model, pixels):
    """pixels (...,3,S,S) -> embeddings (...,D) on the CPU."""
    device, parts = model.action_stats.device, pixels.flatten(0, -4).split(128)
    return torch.cat([model.encode(some.to(device)).cpu() for some in parts]).unflatten(0, pixels.shape[:-3])


@torch.no_grad()
def imagine(model, z, blocks):
    """Open loop: context z (E,T0,D), blocks (E,T-1,A) -> (E,T,D): the context, then predictions alone."""
    device, first = model.action_stats.device, max(0, z.shape[1] - model.cfg.history)
    seen, blocks = z[:, first:].to(device), blocks[:, None, first:].to(device)
    return torch.cat([z, model.rollout(seen, blocks)[:, 0, seen.shape[1] - 1:].cpu()], dim=1)


def played(starts, actions):
    """Play raw actions (E,n,skip,2) without looking, from states (E,7) -> states after each block (E,n,7)."""
    paths = []
    for env, blocks in zip(pusht.environments(starts, starts, 8), actions):
        paths.append([[env.step(action)[0] for action in block][-1] for block in blocks])
    return np.array(paths, np.float32)


def probe_targets(states):
    """states (...,7) -> what probes read, the TARGETS (...,6)."""
    states = torch.as_tensor(states).float()
    return torch.cat([states[..., :4], states[..., 4:5].sin(), states[..., 4:5].cos()], dim=-1)


def untrained(model):
    """A new LeWM of the same Config and data statistics, to compare a trained one with."""
    new = lewm.LeWM(model.cfg)
    new.load_state_dict({name: getattr(model, name) for name in STATISTICS}, strict=False)
    return new.to(model.action_stats.device).eval()


def canvas(width, height, rows, **ratios):
    """-> a figure, and its axes by their titles in `rows`; a title that is repeated spans its places."""
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplot_mosaic(rows, **ratios)
    for title, axis in axes.items():
        axis.set_title(title, fontsize=10)
        axis.set_prop_cycle(color=["black", "tab:red", "tab:blue", "tab:gray"], ls=["-", "--", ":", "-."])
    return figure, axes


def interval(x):
    """x (n,...) -> mean over n, and the two ends of its 95 % interval, (...,3)."""
    mean, half = x.mean(0).double(), 1.96 * x.std(0).double() / math.sqrt(len(x))
    return torch.stack([mean, mean - half, mean + half], -1)


def draw_lines(axis, x, lines, xlabel, **others):
    """lines: {name: n numbers, or (n,3) of `interval`}."""
    for name, y in lines.items():
        mean, *ends = np.asarray(y).T if np.ndim(y) == 2 else [y]
        line, = axis.plot(x, mean, label=name, marker=".")
        if ends:
            axis.fill_between(x, *ends, color=line.get_color(), alpha=0.2, lw=0)
    axis.set(xlabel=xlabel, **others)
    if len(lines) > 1:
        axis.legend(fontsize=8)


def draw_films(axis, films, titles):
    """films: {name: pictures (n,3,S,S)}, one below the other; titles: n texts over the first."""
    rows = [film.permute(2, 0, 3, 1).flatten(1, 2) for film in films.values()]      # each (S,n*S,3)
    axis.imshow(torch.cat(rows).numpy(), extent=(0, len(titles), len(films), 0))
    axis.set_title("")
    axis.xaxis.tick_top()
    axis.set_xticks(np.arange(len(titles)) + 0.5, titles, fontsize=8)
    axis.set_yticks(np.arange(len(films)) + 0.5, films, fontsize=8)


def draw_curves(runs, out):
    """Compare trainings: do the embeddings keep their spread while the prediction gets better?"""
    lewm.require(len(runs) <= 4, f"--curves draws up to 4 runs, not {len(runs)}")
    figure, axes = canvas(13, 3.2, [["std", "min_std", "effective_rank", "val_prediction"]])
    for run in runs:
        metrics = pusht.read_metrics(run)
        lewm.require(metrics is not None, f"{run} has no metrics.csv of a training, or one without rows")
        for name, axis in axes.items():
            axis.plot(metrics["step"], metrics[name], label=Path(run).resolve().name)
            axis.set(xlabel="step", yscale="log" if name == "val_prediction" else "linear")
    axes["std"].legend(fontsize=8)
    figure.savefig(out, dpi=110)


# ======== 1 Probes ====================================================================================
# What lies open in a code (linear), what is there at all (MLP)? Raw pixels and a new encoder stand beside it.

def fit_linear(x, y, ridge=1e-3):
    """Ridge regression on standardised codes, x (n,D), y (n,k) -> a function (m,D) -> (m,k)."""
    x, y = x.double(), y.double()
    centre, scale, mean = x.mean(0), x.std(0).clamp(min=1e-8), y.mean(0)
    x = (x - centre) / scale
    penalty = ridge * len(x) * torch.eye(x.shape[1], dtype=x.dtype)
    weights = torch.linalg.solve(x.T @ x + penalty, x.T @ (y - mean))
    return lambda new: ((new.double() - centre) / scale @ weights + mean).float()


def fit_mlp(x, y, steps=1500, width=256, seed=0, batch=256):
    """Two hidden layers between standardised numbers, x (n,D), y (n,k) -> a function (m,D) -> (m,k)."""
    centre, scale = x.mean(0), x.std(0).clamp(min=1e-8)
    mean, spread = y.mean(0), y.std(0).clamp(min=1e-4)
    x, y = (x - centre) / scale, (y - mean) / spread
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers = [nn.Linear(x.shape[1], width), nn.GELU(), nn.Linear(width, width), nn.GELU()]
        net = nn.Sequential(*layers, nn.Linear(width, y.shape[1]))
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, weight_decay=1e-2)
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = 1e-3 * (1 - step / steps)
            index = torch.randint(len(x), (batch,))
            error = (net(x[index]) - y[index]).square().mean()
            optimizer.zero_grad()
            error.backward()
            optimizer.step()
    net.requires_grad_(False)
    return lambda new: net((new - centre) / scale) * spread + mean


def pearson(a, b):
    """(n,k) each -> Pearson r of each column, float64 (k,); 0 for a column that is constant."""
    a, b = (x.double() - x.double().mean(0) for x in (a, b))
    return nn.functional.cosine_similarity(a, b, dim=0)


def score(guess, truth):
    """(n,6) each -> {group: {"r": of Pearson, "error": the median, in px or degrees}}."""
    r, off = pearson(guess, truth), guess - truth
    a, b = (torch.atan2(x[:, 4], x[:, 5]) for x in (guess, truth))
    turn = torch.rad2deg(torch.atan2((a - b).sin(), (a - b).cos()).abs())
    errors = zip(GROUPS.items(), (off[:, :2].norm(dim=1), off[:, 2:4].norm(dim=1), turn))
    return {name: {"r": r[columns].mean().item(), "error": error.median().item()}
            for (name, columns), error in errors}


def with_interval(guess, truth):
    """`score` of (E,T,6), and "r_interval", 95 %, from resampling trajectories, whose frames are alike."""
    result, rng = score(guess.flatten(0, 1), truth.flatten(0, 1)), np.random.default_rng(0)
    picks = [rng.integers(len(guess), size=len(guess)) for _ in range(1000)]
    r = torch.stack([pearson(guess[pick].flatten(0, 1), truth[pick].flatten(0, 1)) for pick in picks])
    for name, columns in GROUPS.items():
        result[name]["r_interval"] = np.percentile(r[:, columns].mean(1), (2.5, 97.5)).tolist()
    return result


def probes(held):
    """Both probes on three codes, and on what the model predicts 5 blocks ahead."""
    truth, half, result = probe_targets(held.states), len(held.z) // 2, {}
    x = held.pixels.flatten(2) / 255
    count = min(held.z.shape[2], len(x) * x.shape[1] // 4)
    _, _, components = torch.pca_lowrank(x[:half].flatten(0, 1), q=count, niter=3)
    pixels = (x - x[:half].mean((0, 1))) @ components
    ahead = imagine(held.model, held.z[half:, :CONTEXT], held.blocks[half:])[:, CONTEXT + 4, None]
    figure, axes = canvas(10, 7, [TARGETS[::2], TARGETS[1::2]])
    looks = {"linear": dict(marker="x", color="tab:gray"), "mlp": dict(marker=".", color="black")}
    for code, x in {"LeWM": held.z, "untrained encoder": held.untrained, "pixels, PCA": pixels}.items():
        known = x[:half].flatten(0, 1), truth[:half].flatten(0, 1)
        for kind, read in {"linear": fit_linear(*known), "mlp": fit_mlp(*known, held.steps)}.items():
            guess = read(x[half:])
            result[f"{code}, {kind}"] = with_interval(guess, truth[half:])
            if code == "LeWM":
                row = with_interval(read(ahead), truth[half:, CONTEXT + 4, None])
                result[f"predicted 5 ahead, {kind}"] = row
                for i, name in enumerate(TARGETS):
                    points = truth[half:, :, i].flatten(), guess[:, :, i].flatten()
                    label = f"{kind}, r = {pearson(*points):.2f}"
                    axes[name].scatter(*points, s=6, alpha=0.5, lw=0.7, label=label, **looks[kind])
    for name, middle in zip(TARGETS, truth[half:].mean((0, 1))):
        axes[name].axline([middle, middle], slope=1, color="tab:red", lw=1)
        axes[name].set(xlabel="true", ylabel="read off the embedding")
        axes[name].legend(fontsize=8)
    return result, figure


# ======== 2 Surprise ==================================================================================
# How far off is a prediction when the block suddenly turns red, or when agent and block are elsewhere?

def surprise(model, z, blocks):
    """z (E,T,D), blocks (E,T-1,A) -> (E,T-1): squared error of predicting each frame from those before."""
    guesses = [imagine(model, z[:, :t], blocks[:, :t])[:, -1] for t in range(1, z.shape[1])]
    return (torch.stack(guesses, 1) - z[:, 1:]).square().sum(-1)


def teleported(states, actions, distance, seed):
    """From frame MOMENT on, agent and block are `distance` px away, or anywhere if None; actions stay."""
    rng, result = np.random.default_rng(seed), states.copy()
    if distance is None:
        moved = [pusht.random_state(rng) for _ in states]
    else:
        moved = displaced(states[:, MOMENT], "block px", distance, seed)
        moved = displaced(moved, "agent px", distance, seed + 1)
    result[:, MOMENT], result[:, MOMENT + 1:] = moved, played(moved, actions[:, MOMENT:])
    return result


def paired(disturbed, clean, flips=10_000):
    """(n,) each -> mean difference, Cohen's d of the differences, two-sided p of a paired sign-flip test."""
    difference = np.asarray(disturbed - clean, np.float64)
    signs = np.random.default_rng(0).choice((-1.0, 1.0), (flips, len(difference)))
    mean, std = difference.mean(), difference.std(ddof=1)
    extreme = np.abs((signs * difference).mean(1)) >= abs(mean) - 1e-12
    effect_size, p = mean / max(std, 1e-12), (1 + extreme.sum()) / (1 + flips)
    return {"difference": mean, "effect_size": effect_size, "p": p}


def roc_area(positive, negative):
    """Probability that a positive scores above a negative, ties counting half."""
    return np.heaviside(np.subtract.outer(positive, negative), 0.5).mean()


def surprises(held):
    """Curves of surprise, paired tests, a detector of teleports, and the effect of weaker disturbances."""
    model, states, actions, shown = held.model, held.states, held.actions, range(MOMENT - 3, MOMENT + 3)

    def watch(states, colour=GREY):         # (n,T,7) -> a film of the first trajectory, surprise (n,T-1)
        later = draw(states[:, MOMENT:], model.cfg.image_size, colour)
        film = torch.cat([held.pixels[:len(states), :MOMENT], later], 1)
        return film[0, shown], surprise(model, encode(model, film), held.blocks[:len(states)])

    def over_clean(curve):
        disturbed, calm = (x[:len(curve), MOMENT - 1] for x in (curve, curves["clean"]))
        return {"ratio": (disturbed.mean() / calm.mean()).item(), **paired(disturbed, calm)}

    moved = teleported(states, actions, None, held.seed)
    watched = {"clean": watch(states), "block turns red": watch(states, RED), "teleport": watch(moved)}
    films = {name: film for name, (film, _) in watched.items()}
    curves = {name: curve for name, (_, curve) in watched.items()}
    result = {name: over_clean(curves[name]) for name in ("block turns red", "teleport")}
    result["teleport"]["roc_area"] = roc_area(curves["teleport"][:, MOMENT - 1], curves["clean"].ravel())
    by_distance, by_colour = {}, {}
    for distance in (5, 10, 20, 40, 80, 160):
        moved = teleported(states[:60], actions[:60], distance, held.seed)
        by_distance[distance] = over_clean(watch(moved)[1])
    for change in np.outer((0.25, 0.5, 0.75, 1.0), RED - GREY):                     # on the way to red
        by_colour[round(np.linalg.norm(change))] = over_clean(watch(states[:60], GREY + change)[1])
    result.update(by_teleport_px=by_distance, by_colour_distance=by_colour)
    weaker = {"teleport (px)": by_distance, "colour (RGB)": by_colour}
    figure, axes = canvas(10, 7.5, [["films"] * 4, ["surprise"] * 2 + [*weaker]])
    draw_films(axes["films"], films, [f"frame {t}" for t in shown])
    lines = {name: interval(curve) for name, curve in curves.items()}
    draw_lines(axes["surprise"], range(1, states.shape[1]), lines, "frame", ylabel="squared latent distance")
    for name, rows in weaker.items():
        line = {name: [row["ratio"] for row in rows.values()]}
        draw_lines(axes[name], [*rows], line, "strength", ylabel="surprise / clean", ylim=(0, None))
    return result, figure


# ======== 3 Geometry, imagination and actions =========================================================
# SIGReg promised the spectrum and the quantiles. Nobody asked for the sheet, or for straighter paths.

def geometry(held):
    """Straightening, principal components of two grids, the covariance's spectrum, random projections."""
    codes = {"LeWM": held.z, "untrained encoder": held.untrained, "pixels": held.pixels.flatten(2).float()}
    result = {f"straightening of {name}": lewm.straightness(x) for name, x in codes.items()}
    model, z = held.model, held.z.flatten(0, 1)
    figure, axes = canvas(10, 6.5, [["agent, by x (px)", "agent, by y (px)", "spectrum"],
                                    ["block, by x (px)", "block, by y (px)", "8 random projections"]])
    centre = pusht.centre(0, np.exp(0.8j))                      # of the block, seen from its position
    for what, reach, shift in (("agent", 196, 0), ("block", 100, [centre.real, centre.imag])):
        line = pusht.BOARD / 2 + np.linspace(-reach, reach, 14)
        places = np.stack(np.meshgrid(line, line), -1).reshape(-1, 2)
        states = np.tile(np.array([60, 60, 256, 230, 0.8, 0, 0], np.float32), (len(places), 1))
        states[:, GROUPS[what]] = places - shift                # the other one is at rest
        sheet = encode(model, draw(states, model.cfg.image_size))               # (14^2,D)
        u, s, _ = torch.linalg.svd(sheet - sheet.mean(0), full_matrices=False)
        result[f"{what} grid, share of 2 components"] = (s[:2].square().sum() / s.square().sum()).item()
        for name, colour in zip("xy", places.T):
            axis = axes[f"{what}, by {name} (px)"]
            figure.colorbar(axis.scatter(*(u * s)[:, :2].T, c=colour, s=14), ax=axis)
            axis.set(xlabel="component 1", ylabel="component 2")
    rank, smallest = lewm.effective_rank(z), z.std(0).min().item()
    result.update(effective_rank=rank, dimensions=z.shape[1], smallest_std=smallest)
    spectrum = torch.linalg.eigvalsh(torch.cov(z.T)).flip(0)
    lines = {"embeddings": spectrum, "N(0, I)": torch.ones(len(spectrum))}
    draw_lines(axes["spectrum"], range(1, len(spectrum) + 1), lines, "component", yscale="log")
    directions = torch.randn(z.shape[1], 8, generator=torch.Generator().manual_seed(0))
    levels = torch.linspace(0.01, 0.99, 99)
    expected = torch.special.ndtri(levels)
    quantiles = (z @ nn.functional.normalize(directions, dim=0)).quantile(levels, dim=0)    # (99,8)
    axis = axes["8 random projections"]
    axis.plot(expected, quantiles, color="black", ls="-", lw=0.7)
    axis.plot(expected, expected, color="tab:red", ls="--")
    axis.set(xlabel="quantiles of N(0, 1)", ylabel="quantiles of the embeddings")
    return result, figure


def imagination(held):
    """Open-loop error beside copying the last frame, and films by a decoder that is fitted only here."""
    z, truth, half, result = held.z, probe_targets(held.states), len(held.z) // 2, {}
    read = fit_mlp(z[:half].flatten(0, 1), truth[:half].flatten(0, 1), held.steps)
    imagined = imagine(held.model, z[half:, :CONTEXT], held.blocks[half:])
    future, last = z[half:, CONTEXT:], z[half:, CONTEXT - 1:CONTEXT]                # (n,AHEAD,D), (n,1,D)
    guesses = {"open loop": imagined[:, CONTEXT:], "copy last frame": last.expand_as(future),
               "encoded true frame": future}
    for name, guess in guesses.items():
        scores = [score(read(guess[:, t]), truth[half:, CONTEXT + t]) for t in range(AHEAD)]
        result[name] = {"latent": (guess - future).square().mean((0, 2)).tolist()}
        result[name].update({f"{group}_error": [row[group]["error"] for row in scores] for group in GROUPS})
    pictures = lewm.fit_pictures(held.pixels[:half].flatten(0, 1), 32).flatten(1) / 255
    decode = fit_mlp(z[:half].flatten(0, 1), pictures, held.steps, width=512, batch=128)
    films = {"true": lewm.fit_pictures(held.pixels[half], 32) / 255}
    for name, codes in (("decoded", z[half]), ("imagined", imagined[0])):
        films[name] = decode(codes).clamp(0, 1).view(-1, 3, 32, 32)
    figure, axes = canvas(11, 6.5, [["films"] * 4, [*result["open loop"]]], height_ratios=(1.25, 1))
    draw_films(axes["films"], films, ["context"] * CONTEXT + [f"+{t + 1}" for t in range(AHEAD)])
    for key in result["open loop"]:
        unit = {"latent": "squared error a dimension", "angle_error": "degrees"}.get(key, "px")
        lines = {name: row[key] for name, row in result.items()}
        draw_lines(axes[key], range(1, AHEAD + 1), lines, "blocks ahead", ylabel=unit)
    return result, figure


def action_use(held):
    """Open-loop latent error with true, shuffled and zero (mean) actions: does the model heed them?"""
    z, true, result = held.z, held.blocks, {}
    for name, blocks in (("true", true), ("shuffled", true.roll(1, 0)), ("zero", torch.zeros_like(true))):
        error = imagine(held.model, z[:, :CONTEXT], blocks) - z
        result[f"{name} actions"] = error[:, CONTEXT:].square().mean((0, 2)).tolist()
    figure, axes = canvas(6, 3.5, [["squared latent error, a dimension"]])
    draw_lines(*axes.values(), range(1, AHEAD + 1), result, "blocks ahead")
    return result, figure


# ======== 4 Planning ==================================================================================
# Does the planner's cost grow with the distance in the world? Does what a plan promises come true, and when
# does more search no longer help? How far does the planner get with a perfect model?

def clear(states):
    """Which of states (...,7) can happen: the agent does not lie on the block."""
    agent, block = (states[..., i] + 1j * states[..., i + 1] for i in (0, 2))
    return np.vectorize(pusht.gap)(agent, block, np.exp(1j * states[..., 4])) > pusht.AGENT_RADIUS - 1


def displaced(states, what, amount, seed=0):
    """states (E,7) with agent or block moved in random directions, or the block turned about its centre."""
    rng, states = np.random.default_rng(seed), states.astype(np.float64)
    if what == "block degrees":
        spin, turn = np.exp(1j * states[:, 4]), np.radians(amount) * rng.choice((-1, 1), len(states))
        shift = pusht.centre(0, spin) - pusht.centre(0, spin * np.exp(1j * turn))   # so that the centre stays
        states[:, 2:5] += np.stack([shift.real, shift.imag, turn], 1)
        return states
    columns = GROUPS[what.removesuffix(" px")]
    angle = rng.uniform(0, 2 * np.pi, (64, len(states)))                    # 64 directions to choose from
    moved = np.repeat(states[None], 64, axis=0)                             # (64,E,7)
    moved[..., columns] += amount * np.stack([np.cos(angle), np.sin(angle)], -1)
    # the best direction stays on the board (all inside are equal) and keeps the agent off the block
    outside = np.abs(moved[..., columns] - pusht.BOARD / 2).max(-1).clip(min=pusht.BOARD / 2 - 60)
    return moved[(outside + 0.1 * ~clear(moved)).argmin(0), np.arange(len(states))]


def landscape(held):
    """Latent cost of a displacement as a share of unrelated states': mean, and ends of its 95 % interval."""
    model, states, z = held.model, held.states[:, CONTEXT], held.z[:, CONTEXT]
    unrelated, result, places = 2 * z.var(0).sum(), {}, (5, 10, 20, 40, 80, 160)
    ranges = {"agent px": places, "block px": places, "block degrees": (5, 10, 20, 45, 90, 180)}
    figure, axes = canvas(9, 3, [[*ranges]])
    for what, amounts in ranges.items():
        result[what] = {}
        for amount in amounts:
            moved = displaced(states, what, amount, held.seed)
            possible = clear(moved)                             # the turned block does not lie on the agent
            there = encode(model, draw(moved[possible], model.cfg.image_size))
            result[what][amount] = interval((there - z[possible]).square().sum(-1) / unrelated).tolist()
        lines, ylabel = {what: [*result[what].values()]}, "latent cost / unrelated states'"
        draw_lines(axes[what], amounts, lines, "displacement", ylabel=ylabel, ylim=(0, 1.2))
    return result, figure


def replanned(model, starts, goals):
    """Look and plan anew after each block -> embeddings (E,H+1,D) of a plan's end: as it was imagined before
    each of the H blocks, and as it came true after the last."""
    size, everyone, ends = model.cfg.image_size, np.arange(len(starts)), []
    pictures, cfg = draw(goals, size).permute(0, 2, 3, 1).numpy(), dataclasses.replace(model.cfg, replan=1)
    planner, environments = lewm.Planner(model, pictures, cfg), pusht.environments(starts, goals, size)
    for _ in range(cfg.horizon):                                # all go on, even where the goal is reached
        for env, block in zip(environments, planner(everyone, environments)):
            for action in block:
                env.step(action)
        first = max(0, planner.seen.shape[1] - cfg.context)     # the planner has forgotten those before
        ends.append(imagine(model, planner.seen[:, first:].cpu(), planner.blocks[:, first:].cpu())[:, -1])
    ends.append(encode(model, draw(np.stack([env.state for env in environments]), size)))
    return torch.stack(ends, 1)


def beliefs(held):
    """Squared latent distance to the goal at the end of plans, means over up to 40 pairs. A plan is made once
    and played without looking: "imagined" and "true", by iterations of CEM. Or a Planner plans again after
    each block: H imagined values, then the true one."""
    model, counts, pairs = held.model, (1, 2, 4, 8, 16, 32), min(40, len(held.z))
    starts, goals, _ = pusht.held_out_pairs(pairs, "dev", held.seed, model.cfg.goal_distance)
    size, device = model.cfg.image_size, model.action_stats.device
    z, z_goal = encode(model, draw(np.stack([starts, goals], 1), size)).split(1, 1)     # (E,1,D) each

    def distance(ends):                                         # (E,n,D) -> n means with intervals
        return interval((ends - z_goal).square().sum(-1)).tolist()

    lines = {"imagined": [], "true": []}
    for count in counts:
        plans = lewm.cem(model, z.to(device), z_goal.to(device), iterations=count)
        actions = model.to_actions(plans).unflatten(1, (-1, model.cfg.frame_skip)).cpu().numpy()
        true = encode(model, draw(played(starts, actions), size))
        paths = dict(imagined=imagine(model, z, plans), true=torch.cat([z, true], 1))   # (E,1+H,D) each
        for name, path in paths.items():
            lines[name] += distance(path[:, -1:])
    later = {"replanned, the last one true": distance(replanned(model, starts, goals))}
    figure, axes = canvas(13, 3.6, [["by search", "by replanning", "five plans, from circle to star"]])
    looks = dict(ylim=(0, None), ylabel="squared latent distance to the goal")
    draw_lines(axes["by search"], counts, lines, "iterations of CEM", xscale="log", **looks)
    axes["by search"].set_xticks(counts, counts)
    draw_lines(axes["by replanning"], range(model.cfg.horizon + 1), later, "blocks played", **looks)
    _, _, v = torch.pca_lowrank(held.z.flatten(0, 1), q=2)
    plane = axes["five plans, from circle to star"]
    for path, look in zip(paths.values(), ("k-", "r--")):
        for line in path[:5] @ v:                                               # (1+H,2)
            plane.plot(*line.T, look, marker="o", markevery=[0])
    plane.plot(*(z_goal[:5, 0] @ v).T, "*", color="tab:green", markersize=9)
    return {"iterations": counts, **lines, **later}, figure


class Simulator(nn.Module):
    """The world itself as a LeWM. Its "embedding" is the state, scaled so that success is a distance of 1."""
    to_blocks, to_actions = lewm.LeWM.to_blocks, lewm.LeWM.to_actions

    def __init__(self, cfg, action_stats):
        super().__init__()
        self.cfg, self.action_stats = cfg, action_stats

    def encode(self, states):
        """states (...,7) -> (...,8): places in 20 px, angle in 20 degrees, velocities that hardly count."""
        turn = torch.stack([states[..., 4].cos(), states[..., 4].sin()], -1) / math.radians(20)
        return torch.cat([states[..., :4] / 20, turn, states[..., 5:] / 1e4], -1)

    def rollout(self, z, plans):
        """z (B,1,8), plans (B,N,H,A) -> (B,N,H,8), by playing every plan."""
        actions = self.to_actions(plans).unflatten(2, (-1, self.cfg.frame_skip)).numpy()    # (B,N,H,skip,2)
        x = z[:, -1].double()
        angle = torch.atan2(x[:, 5:6], x[:, 4:5]) % (2 * math.pi)
        states = torch.cat([20 * x[:, :4], angle, 1e4 * x[:, 6:]], 1).numpy()               # (B,7)
        ends = [played([state] * len(some), some) for state, some in zip(states, actions)]
        return self.encode(torch.from_numpy(np.stack(ends)))


class StatePlanner(lewm.Planner):
    """lewm.Planner on the state in place of a picture."""
    def encode(self, states):
        return self.model.encode(torch.from_numpy(np.stack(states)).float())

    def __call__(self, running, environments):
        seen = {e: SimpleNamespace(render=lambda e=e: environments[e].state) for e in running}
        return super().__call__(running, seen)


def ceiling(pairs, seed=0):
    """Plan on development pairs with the simulator as the model -> a dictionary like `pusht.evaluate`'s."""
    cfg = lewm.Config.preset("nano", context=1)                 # a state shows the speed: one is enough
    model = Simulator(cfg, lewm.action_statistics(pusht.collect(200, seed)["action"]))
    problems = pusht.held_out_pairs(pairs, "dev", seed, cfg.goal_distance)
    result = pusht.evaluate(model, cfg, problems, seed, planner=StatePlanner(model, problems[1], cfg, seed))
    rows = {name.replace("LeWM", "simulator"): row for name, row in result["policies"].items()}
    return {**result, "policies": rows}


# ======== 5 Comparisons ===============================================================================
# LeWM beside another loss (PLDM), with parts changed or left out, with other weights of SIGReg, and beside
# patch tokens (DINO-WM, its cost alone).

PLDM_WEIGHTS = {"variance": 1.0, "covariance": 0.4, "time variance": 0.1, "time covariance": 0.01,
                "smoothness": 0.1, "inverse dynamics": 0.1}


def vicreg(z):
    """z (groups,n,D) -> how far the standard deviations stay below 1, and the covariances, squared: the two
    terms of VICReg (Bardes, Ponce and LeCun, arXiv 2105.04906), over the n vectors of each group."""
    z = z - z.mean(1, keepdim=True)
    with torch.autocast(z.device.type, enabled=False):                      # as in SIGReg
        covariance = z.mT @ z / (z.shape[1] - 1)                            # (groups,D,D)
    diagonal = covariance.diagonal(dim1=1, dim2=2)                          # (groups,D)
    others = covariance.square().sum((1, 2)) - diagonal.square().sum(1)
    return torch.relu(1 - (diagonal + 1e-4).sqrt()).mean(), others.mean() / z.shape[2]


class PLDM(lewm.LeWM):
    """LeWM's networks with the loss of PLDM (Sobal et al., arXiv 2502.14819): in place of SIGReg six terms,
    each with a weight to tune. VICReg's two over the batch at each time, the same over time in each window,
    short steps, and actions that can be read off two consecutive embeddings."""
    def __init__(self, cfg, weights=PLDM_WEIGHTS):
        super().__init__(cfg)
        self.weights, inputs = weights, 2 * cfg.embed_dim
        self.inverse = nn.Sequential(nn.Linear(inputs, 256), nn.GELU(), nn.Linear(256, cfg.action_block))

    def loss(self, pixels, blocks):
        """pixels (B,T,3,S,S), blocks (B,T-1,A), T = history + 1 -> scalar, {name of a term: scalar}."""
        z, share, terms = self.encode(pixels).float(), self.cfg.rollout_share, {}       # (B,T,D)
        now, later = z[:, :-1], z[:, 1:]
        prediction = (self.predict(now, blocks).float() - later).square().mean()
        prediction = (1 - share) * prediction + share * self.own_error(z, blocks)
        terms["variance"], terms["covariance"] = vicreg(z.transpose(0, 1))  # T groups of B
        terms["time variance"], terms["time covariance"] = vicreg(z)        # B groups of T
        terms["smoothness"] = (later - now).square().mean()
        terms["inverse dynamics"] = (self.inverse(torch.cat([now, later], -1)) - blocks).square().mean()
        parts = {"prediction": prediction, **terms, "std": z.std(0).mean()}
        loss = prediction + sum(self.weights[name] * term for name, term in terms.items())
        return loss, {name: part.detach() for name, part in parts.items()}


def trial(cfg, data, problems, out, device, kind=lewm.LeWM, **fields):
    """Train a model of this kind, with these fields of Config changed, plan, probe -> {what: number}, success
    with its interval. What the folder `out` has is not done again."""
    cfg, path = dataclasses.replace(cfg, **fields), out / "trial.pt"
    torch.manual_seed(cfg.seed)
    model = kind(cfg)
    made = {"kind": kind.__name__, **vars(cfg), "pairs": len(problems[0])}
    made["weights"] = dict(getattr(model, "weights", {}))
    saved = lewm.read_weights(path) if path.exists() else {"made": made}
    wrong = [name for name in made if saved["made"].get(name) != made[name]]
    lewm.require(not wrong, f"{path} has other {', '.join(wrong)}: use another --out, or delete it")
    if "row" in saved:
        return saved["row"]
    lewm.write_weights(path, saved)             # before the training, which may be stopped and go on
    model = lewm.train(cfg, data, out, True, device, model=model)
    planned = pusht.evaluate(model, cfg, problems)["policies"]["LeWM + CEM"]
    row = {"success": [planned["success"], *planned["interval"]], "object_success": planned["object_success"],
           "px_to_goal": planned["final_agent_px"] + planned["final_block_px"]}
    metrics = pusht.read_metrics(out)
    for name in ("val_prediction", "val_copy_last", "val_shuffled_ratio", "effective_rank", "straightness"):
        row[name] = metrics[name][-1]
    states, half = trajectories(240, cfg)[0], 120
    z, truth = encode(model, draw(states, cfg.image_size)), probe_targets(states)       # (E,T,D), (E,T,6)
    read = fit_linear(z[:half].flatten(0, 1), truth[:half].flatten(0, 1))
    known = score(read(z[half:]).flatten(0, 1), truth[half:].flatten(0, 1))
    row.update({f"linear r, {group}": known[group]["r"] for group in GROUPS})
    row = {name: np.asarray(x, float).tolist() for name, x in row.items()}      # plain numbers
    lewm.write_weights(path, {"made": made, "row": row})
    print("\n".join(summary(out.name, row)), flush=True)
    return row


def compare(rows, out, device, pairs=200, **changes):
    """rows {name: what `trial` takes by keyword}, all with the same data, test pairs, and Config (the preset
    nano with `changes`) -> {name: row of `trial`}."""
    cfg = lewm.Config.preset("nano", **changes)
    data = pusht.collect_lessons(cfg.train_episodes, cfg.seed)
    problems = pusht.held_out_pairs(pairs, "test", 0, cfg.goal_distance)
    return {name: trial(cfg, data, problems, out / name, device, **row) for name, row in rows.items()}


def compare_pldm(out, device, steps=4500, first_lesson=0.4, **changes):
    """LeWM beside PLDM, and one picture of both trainings -> `compare`'s rows. Shorter than the default, but
    with 1,800 steps in the first lesson, too."""
    rows = {"LeWM": {}, "PLDM": {"kind": PLDM}}
    result = compare(rows, out, device, steps=steps, first_lesson=first_lesson, **changes)
    draw_curves([out / name for name in rows], out / "pldm.png")
    return result


class LayerNorms(lewm.LeWM):
    """With LayerNorm in place of BatchNorm in both projectors."""
    def __init__(self, cfg):
        super().__init__(cfg)
        self.projector[1], self.pred_proj[1] = (nn.LayerNorm(cfg.projector_hidden) for _ in range(2))


class AppendedAction(lewm.LeWM):
    """With the action appended to the embedding, in place of AdaLN: no shift, no scale, every gate open."""
    def __init__(self, cfg):
        super().__init__(cfg)
        self.predictor.widen = nn.Linear(cfg.embed_dim + cfg.predictor_width, cfg.predictor_width)
        for layer in self.predictor.layers:
            weights = layer.adaLN_modulation.requires_grad_(False)[-1]          # (6W,W), zeros
            weights.bias.view(6, -1)[[2, 5]] = 1                                # the two gates

    def predict(self, z, blocks):
        """z (B,T,D), blocks (B,T,A) -> z_hat (B,T,D)."""
        c = self.action_encoder(blocks)                                         # (B,T,W)
        return self.pred_proj(self.predictor(torch.cat([z, c], -1), c).flatten(0, 1)).view(z.shape)


LAMBDA = lewm.SMALL["sigreg_weight"]         # of the default
ABLATIONS = {
    "as it is": {}, "no SIGReg": {"sigreg_weight": 0.0}, "a tenth of lambda": {"sigreg_weight": LAMBDA / 10},
    "ten times lambda": {"sigreg_weight": LAMBDA * 10}, "LayerNorm": {"kind": LayerNorms},
    "appended action": {"kind": AppendedAction}, "no dropout": {"dropout": 0.0},
    "one step ahead only": {"rollout_share": 0.0}, "no first lesson": {"first_lesson": 0.0},
    "first lesson alone": {"first_lesson": 0.99999}}


def ablations(out, device, seeds=(3072, 1), **changes):
    """The default with one part changed or left out, for each seed of the training -> `compare`'s rows."""
    rows = {f"{name}, seed {seed}": {**fields, "seed": seed}
            for seed in seeds for name, fields in ABLATIONS.items()}
    return compare(rows, out, device, **changes)


def bisect_lambda(out, device, runs=5, pairs=50, steps=1800, episodes=4000):
    """The weight of SIGReg with the most success on development pairs, by golden-section search -> {weight:
    row of `trial`}. Each further run cuts the range to 0.62."""
    cfg, rows = lewm.Config.preset("nano", steps=steps, train_episodes=episodes), {}
    data = pusht.collect_lessons(episodes, cfg.seed)
    problems, share = pusht.held_out_pairs(pairs, "dev", 0, cfg.goal_distance), (math.sqrt(5) - 1) / 2

    def success(x):
        weight = float(f"{10 ** x:.3g}")
        if weight not in rows:
            rows[weight] = trial(cfg, data, problems, out / f"{weight:g}", device, sigreg_weight=weight)
        return rows[weight]["success"][0]

    low, high = -3.0, 1.0
    for _ in range(runs - 1):               # from the second time on one of the two places is known already
        left, right = high - share * (high - low), low + share * (high - low)
        low, high = (left, high) if success(left) < success(right) else (low, right)
    rows = dict(sorted(rows.items()))
    figure, axes = canvas(11, 3.2, [["success", "px_to_goal", "effective_rank"]])
    for name, axis in axes.items():
        line = {name: [row[name] for row in rows.values()]}
        draw_lines(axis, [*rows], line, "weight of SIGReg", xscale="log", ylim=(0, None))
    figure.savefig(out / "lambda.png", dpi=110)
    return rows


PATCHES, PATCH, ACTION = 196, 384, 10   # DINO-WM: P tokens a frame, numbers in one, and of the action


class DinoWM(lewm.LeWM):
    """DINO-WM (arXiv 2411.04983), untrained, as a LeWM. Its z is the P tokens of a frame, concatenated."""
    def __init__(self, cfg):
        super().__init__(cfg)                           # encoder, projectors and AdaLN go unused
        self.action_encoder, L = nn.Linear(cfg.action_block, ACTION), cfg.history * PATCHES
        wide = dict(embed_dim=PATCH + ACTION, predictor_width=PATCH + ACTION)
        self.predictor = lewm.Predictor(dataclasses.replace(cfg, history=L, frames=L + 1, **wide))
        for layer in self.predictor.layers:
            layer.attn[1].causal = False                # a frame's tokens see each other: `mask` below

    def predict(self, z, blocks):
        """z (B,T,P*384), blocks (B,T,A) -> z_hat (B,T,P*384). Tokens see their frame and those before."""
        c = self.action_encoder(blocks)[:, :, None].expand(-1, -1, PATCHES, -1)         # (B,T,P,10)
        x = torch.cat([z.unflatten(2, (PATCHES, -1)), c], 3).flatten(1, 2)              # (B,T*P,W)
        frame = torch.arange(x.shape[1], device=x.device) // PATCHES
        mask = frame[:, None] >= frame
        x = x + self.predictor.pos_embedding[:, :x.shape[1]]
        for norm, attn, mlp in ((*layer.attn[:2], layer.mlp) for layer in self.predictor.layers):
            x = x + attn(norm(x), mask)
            x = x + mlp(x)
        return self.predictor.norm(x)[..., :PATCH].reshape(z.shape)


def compare_dino_wm(_, device):
    """Costs of a plan from one frame -> {what: {"LeWM", "DINO-WM", "factor"}}. Multiply-adds of a layer on L
    tokens of width W, I = heads x head_dim:  L (4 W I + 2 W mlp)  for matrices  +  2 L^2 I  for attention.
    `others`, for each frame: AdaLN, action encoder and pred_proj of LeWM, the action encoder of DINO-WM."""
    cfg, columns = lewm.Config.preset("paper"), []
    W, I, A = cfg.predictor_width, cfg.predictor_heads * cfg.predictor_head_dim, cfg.action_block
    others = 6 * cfg.predictor_depth * W * W + A * A + 4 * W * (A + W) + 2 * W * cfg.projector_hidden
    for model, P, D, width, rest, N in ((lewm.LeWM(cfg), 1, W, W, others, 300),   # N candidates are timed
                                        (DinoWM(cfg), PATCHES, PATCH, PATCH + ACTION, A * ACTION, 4)):
        model, z = model.to(device).eval(), torch.randn(2, 1, P * D, device=device)
        each = seconds_a_call(lambda: lewm.cem(model, *z, candidates=N, elites=2, iterations=1)) / N
        L = P * np.minimum(np.arange(cfg.horizon) + 1, cfg.history)         # of each prediction
        layer = L * width * (4 * I + 2 * cfg.predictor_mlp) + 2 * L ** 2 * I
        count = (cfg.predictor_depth * layer + L / P * rest).mean() / 1e6   # for an imagined frame
        plan = each * cfg.candidates * cfg.iterations                       # linear in both, on a CPU
        columns.append((P, width, count / P, count / 1e3, 1000 * each / cfg.horizon, plan / 60))
    names = ("tokens a frame", "width of a token", "million multiply-adds for each token",
             "billion for an imagined frame, the product", "ms for an imagined frame", "minutes for a plan")
    return {name: {"LeWM": a, "DINO-WM": b, "factor": b / a} for name, a, b in zip(names, *columns)}


# ======== 6 Speed =====================================================================================
# How fast is this machine, and how long will `lewm.py --train` take? What is timed is that very code.

def seconds_a_call(work):
    """Seconds that work() takes: once to warm up, once for a guess, then for about 2 s."""
    work()
    calls = max(2, round(2 / timeit.timeit(work, number=1)))
    return timeit.timeit(work, number=calls) / calls


def seconds_a_step(cfg, data, device, least=15.0):
    """Seconds a step of lewm.train takes. It is stopped from within, where it has its pictures drawn."""
    times = []                                                  # the first ones are of its preparations

    def render(states, size):
        times.append(time.time())
        if len(times) > 12 and times[-1] - times[9] > least:
            raise StopIteration
        return pusht.render(states, size)

    with contextlib.suppress(StopIteration):
        lewm.train(cfg, data, device=device, render=render)
    return (times[-1] - times[9]) / (len(times) - 10)


def loss_of(model, pixels, blocks):
    """The loss as lewm.train computes it."""
    with torch.autocast(pixels.device.type, torch.bfloat16, enabled=pixels.device.type == "cuda"):
        return model.loss(pixels, blocks)[0]


def gradient(model, pixels, blocks):
    """Loss and gradient, and wait until they are there."""
    loss_of(model, pixels, blocks).backward()
    return model.encoder.cls_token.grad.sum().item()


def speed(preset, device):
    """-> {what: how fast}, for each part of `lewm.py --train --preset ...` on this machine."""
    cfg, began = lewm.Config.preset(preset), time.time()
    data = pusht.collect(100, seed=0)
    recording = (time.time() - began) / 100
    step, model = seconds_a_step(cfg, data, device), lewm.LeWM(cfg).to(device)
    pixels, blocks = lewm.get_batch(model, data, np.arange(cfg.batch_size), pusht.render)
    forward = seconds_a_call(lambda: loss_of(model, pixels, blocks).item())
    both = seconds_a_call(lambda: gradient(model, pixels, blocks))
    with FlopCounterMode(display=False) as counter:
        gradient(model, pixels, blocks)
    tflop = counter.get_total_flops() / 1e12
    square = torch.randn(4096, 4096, device=device)
    square = square.bfloat16() if device.type == "cuda" else square
    product = seconds_a_call(lambda: (square @ square)[0, 0].item())
    z = torch.randn(cfg.batch_size, cfg.frames, cfg.embed_dim, device=device, requires_grad=True)
    sigreg = seconds_a_call(lambda: torch.autograd.grad(model.sigreg(z), z)[0].sum().item())
    model.eval()
    seen, past = z[:1, :cfg.context], blocks[:1, :cfg.context - 1]
    plan = seconds_a_call(lambda: lewm.cem(model, seen, z[1:2, 0], past=past).cpu())
    states, env = torch.from_numpy(data["state"][:256]).to(device), pusht.PushT()
    drawing = seconds_a_call(lambda: pusht.render(states, cfg.image_size).cpu()) / 256
    stepping = seconds_a_call(lambda: env.step([0.1, 0.1]))
    plans = cfg.episodes * sum(pusht.plan_lengths(cfg, cfg.budget)) / cfg.horizon   # whole ones, at most
    episodes = cfg.train_episodes * (1.25 if cfg.first_lesson else 1)   # as in pusht.collect_lessons
    total = recording * episodes + step * cfg.steps + plans * plan
    parts = {"a step": step, "drawing its pictures": drawing * cfg.batch_size * cfg.frames,
             "the loss, not compiled": forward, "its gradient, not compiled": both - forward,
             "SIGReg, in both": sigreg, "a plan": plan}
    return {"training steps a second": 1 / step, **{f"ms of {name}": 1000 * x for name, x in parts.items()},
            "TFLOP in a step": tflop, "TFLOP/s in training": tflop / step,
            "TFLOP/s in one large matrix product": 2 * 4096 ** 3 / 1e12 / product,
            "pictures drawn a second": 1 / drawing, "env steps a second": 1 / stepping,
            "episodes recorded a second": 1 / recording, "minutes for --train, at most": total / 60}


def kept_bytes(work):
    """Bytes that autograd keeps for the gradient of what work() returns, weights too, each tensor once."""
    kept = {}

    def keep(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        alive = work()                                          # so that no address is used twice
    return sum(kept.values())


def cost(cfg, device, of_plan):
    """-> {"seconds"} of a plan, or {"seconds", "GB"} of a training step without its optimizer."""
    model, z = lewm.LeWM(cfg).to(device), torch.randn(1, cfg.embed_dim, device=device)
    if of_plan:
        return {"seconds": seconds_a_call(lambda: lewm.cem(model.eval(), z, z).cpu())}
    shape = cfg.batch_size, cfg.frames, 3, cfg.image_size, cfg.image_size
    pixels = torch.randint(0, 256, shape, dtype=torch.uint8, device=device)
    blocks = torch.randn(cfg.batch_size, cfg.frames - 1, cfg.action_block, device=device)
    seconds = seconds_a_call(lambda: gradient(model, pixels, blocks))
    return {"seconds": seconds, "GB": kept_bytes(lambda: loss_of(model, pixels, blocks)) / 1e9}


def growth(cfg, device):
    """How cost grows with one setting at a time -> {setting: {its value: `cost`}}, and a figure."""
    ranges = {"image_size": [n * cfg.patch_size for n in (1, 2, 4, 7)], "batch_size": [16, 32, 64, 128],
              "candidates": [50, 100, 200, 400], "horizon": [1, 2, 4, 8]}
    result, (figure, axes) = {}, canvas(11, 3, [[*ranges]])
    for name, values in ranges.items():
        of_plan = name in ("candidates", "horizon")
        rows = [cost(dataclasses.replace(cfg, **{name: value}), device, of_plan) for value in values]
        result[name] = dict(zip(values, rows))
        lines = {unit: [row[unit] for row in rows] for unit in rows[0]}
        title = "seconds of a plan" if of_plan else "a training step"
        draw_lines(axes[name], values, lines, name, title=title, ylim=(0, None))
        axes[name].set_xticks(values)
    return result, figure


# ======== 7 The authors' weights ======================================================================
# Tables from names here to the authors'. {} stands for three matrices of theirs that are one here.

PREDICTOR_NAMES = {
    "projector.": "projector.net.", "pred_proj.": "pred_proj.net.", ".mlp.": ".mlp.net.",
    "predictor.norm.": "predictor.transformer.norm.", ".layers.": ".transformer.layers.",
    ".attn.0.": ".attn.norm.", ".attn.1.to_qkv.": ".attn.to_qkv.", ".attn.1.to_out.": ".attn.to_out.0."}
VIT_NAMES = {".norm.": ".layernorm.", ".norm1.": ".layernorm_before.", ".norm2.": ".layernorm_after.",
             ".cls_token": ".embeddings.cls_token", ".pos_embedding": ".embeddings.position_embeddings",
             ".patch_embed.": ".embeddings.patch_embeddings.projection."}
ENCODER_NAMES = {                   # by the version of transformers
    4: {**VIT_NAMES, ".layers.": ".encoder.layer.", ".attn.to_qkv.": ".attention.attention.{}.",
        ".attn.to_out.": ".attention.output.dense.", ".mlp.0.": ".intermediate.dense.",
        ".mlp.2.": ".output.dense."},
    5: {**VIT_NAMES, ".attn.to_qkv.": ".attention.{}_proj.", ".attn.to_out.": ".attention.o_proj.",
        ".mlp.0.": ".mlp.fc1.", ".mlp.2.": ".mlp.fc2."}}
PARTS_OF_QKV = {4: ("query", "key", "value"), 5: ("q", "k", "v")}
STATISTICS = ("picture_mean", "colour_map", "action_stats")     # not in the authors' files
EXPERT_ACTION_STATS = [[-0.0087, 0.0068], [0.2019, 0.2002], [-1.0, -1.0], [1.0, 1.0]]   # of Push-T


def official_weights(model, transformers=4):
    """{the authors' name: tensor}. The tensors are views of the model's: writing into them changes it."""
    fine, weights = not model.cfg.whiten and model.cfg.embed_dim == model.cfg.predictor_width, {}
    lewm.require(fine, "the authors' layout has no place for colour statistics and predictor.widen: "
                       "whiten must be off, and embed_dim must equal predictor_width")
    for name, x in model.state_dict().items():
        table = ENCODER_NAMES[transformers] if name.startswith("encoder.") else PREDICTOR_NAMES
        for here, there in table.items():
            name = name.replace(here, there)
        if "{}" in name:
            weights.update(zip(map(name.format, PARTS_OF_QKV[transformers]), x.chunk(3)))
        elif name not in STATISTICS:                            # what is linear here is a Conv1d there
            weights[name] = x[..., None] if name == "action_encoder.patch_embed.weight" else x
    return weights


def load_official(path, cfg=None, action_stats=EXPERT_ACTION_STATS, device="cpu"):
    """The authors' weights -> LeWM in evaluation mode. cfg: of the same sizes, the paper's when not given.
    action_stats (4,a): mean, std, lowest and highest of the raw actions that they were trained with."""
    model = lewm.LeWM(cfg or lewm.Config())
    given = lewm.read_weights(path)
    given = given.get("state_dict", given)                      # as in a checkpoint of Lightning
    given = {str(name).removeprefix("model."): x for name, x in given.items()}
    wanted = official_weights(model, 5 if any("encoder.layers." in name for name in given) else 4)
    there = {name: [*getattr(x, "shape", [type(x).__name__])] for name, x in given.items()}
    here = {name: [*x.shape] for name, x in wanted.items()}
    wrong = [f"missing: {name} {here[name]}" for name in here if name not in there]
    wrong += [f"unexpected: {name}" for name in there if name not in here]
    wrong += [f"{k} is {there[k]}, not {x}" for k, x in here.items() if there.get(k, x) != x]
    lewm.require(not wrong, f"{path} does not fit, {len(wrong)} tensors are wrong: {'; '.join(wrong)}")
    for name, x in wanted.items():
        x.copy_(given[name])
    model.action_stats.copy_(torch.as_tensor(action_stats))
    return model.to(device).eval()


def save_official(model, path, transformers=4):
    """Write the weights in the authors' layout, with the names of transformers 4 or 5."""
    weights = official_weights(model, transformers).items()
    lewm.write_weights(path, {name: x.cpu().clone() for name, x in weights})


# ======== 8 Command line ==============================================================================

PARTS = {"probes": probes, "surprise": surprises, "geometry": geometry, "imagination": imagination,
         "actions": action_use, "landscape": landscape, "beliefs": beliefs}
COMPARISONS = {"pldm": compare_pldm, "dino-wm": compare_dino_wm, "ablations": ablations,
               "lambda": bisect_lambda}


def summary(name, result):
    """Nested numbers as lines of text, one for each innermost dictionary."""
    if isinstance([*result.values()][0], dict):
        return [line for key, x in result.items() for line in summary(f"{name}, {key}", x)]
    cells = (f"{key} " + " ".join(f"{number:.3g}" for number in np.ravel(x)) for key, x in result.items())
    return [f"{name}: {', '.join(cells)}"]


def parse_arguments(argv):
    parser = argparse.ArgumentParser(description="What a LeWorldModel knows.", allow_abbrev=False)
    parser.error = lambda text: sys.exit(f"probe.py: {text}; see python probe.py --help")
    flag = parser.add_argument
    flag("checkpoint", metavar="CKPT", nargs="?", help="of lewm.py, such as assets/nano.pt")
    flag("--ceiling", choices=["simulator"], help="instead: plan with a perfect model")
    flag("--compare", choices=["pldm", "dino-wm", "ablations"], help="instead: LeWM beside other models")
    flag("--bisect-lambda", action="store_true", help="instead: search the weight of SIGReg")
    flag("--speed", choices=lewm.PRESETS, help="instead: time this machine; --out draws growth")
    flag("--curves", metavar="RUN", nargs="+", help="instead: draw metrics.csv of up to 4 trainings")
    flag("--import", dest="weights", metavar="FILE", help="instead: read the authors' weights")
    flag("--export", metavar="CKPT", help="instead: write a checkpoint in the authors' layout")
    flag("--out", metavar="PATH", help="file or folder to write; default of a folder: in runs")
    flag("--only", default=",".join(PARTS), metavar="PARTS", help="default: %(default)s")
    flag("--episodes", type=int, default=240, help="trajectories, half to fit probes; default: 240")
    flag("--steps", type=int, default=1500, help="of probes and decoder; default: 1500")
    flag("--pairs", type=int, default=50, help="pairs to plan in for --ceiling; default: 50")
    flag("--seed", type=int, default=0, help="which held-out episodes; default: 0")
    flag("--device", help="cpu, cuda, mps; default: the best there is")
    args = parser.parse_args(argv)
    modes = [args.checkpoint, args.ceiling, args.compare, args.bisect_lambda, args.speed, args.curves,
             args.weights, args.export]
    lewm.require(sum(map(bool, modes)) == 1, "say which checkpoint, as in: python probe.py "
                 "assets/nano.pt; or one flag of those with \"instead\" in --help")
    lewm.require(args.out or any(modes[:5]), "say where the result goes with --out FILE")
    picture = args.out if args.speed or args.curves else None
    lewm.require(picture is None or picture.endswith(".png"), f"--out is {picture}, not a picture's .png")
    args.compare = "lambda" if args.bisect_lambda else args.compare
    other = [f"--{name}" for name in ("only", "episodes", "steps", "pairs", "seed")
             if args.compare and vars(args)[name] != parser.get_default(name)]
    lewm.require(not other, f"{', '.join(other)}: a comparison has its own, see COMPARISONS in probe.py")
    lewm.require({*args.only.split(",")} <= {*PARTS}, f"--only {args.only}: the parts are {','.join(PARTS)}")
    for name, least in dict(episodes=8, steps=1, pairs=1, seed=0).items():
        lewm.require(vars(args)[name] >= least, f"--{name} is {vars(args)[name]}, not at least {least}")
    lewm.require(args.seed < 1_000_000, f"--seed is {args.seed}, not below 1,000,000")
    return args


def held_out(args):
    """The checkpoint, and trajectories of seeds that no training can use."""
    model, cfg, _ = lewm.load_checkpoint(args.checkpoint, lewm.pick_device(args.device))
    lewm.require(cfg.action_dim == 2, f"{args.checkpoint} has action_dim {cfg.action_dim}, but Push-T has 2")
    states, actions = trajectories(args.episodes, cfg, args.seed)
    pixels, raw = draw(states, cfg.image_size), torch.from_numpy(actions).flatten(1, 2)
    torch.manual_seed(0)                # of the untrained encoder, and of the search for pixels' components
    z = [encode(one, pixels) for one in (model, untrained(model))]
    blocks = model.to_blocks(raw.to(model.action_stats.device)).cpu()
    return Held(model, states, actions, blocks, pixels, *z, args.seed, args.steps)


def main(argv):
    args = parse_arguments(argv)
    Path(args.out or ".").parent.mkdir(parents=True, exist_ok=True)     # refused now, not after minutes
    if args.curves:
        draw_curves(args.curves, args.out)
    if args.weights:
        lewm.save_checkpoint(args.out, load_official(args.weights))
    if args.export:
        save_official(lewm.load_checkpoint(args.export)[0], args.out)
    if args.curves or args.weights or args.export:
        return print(f"{args.out} is written")
    if args.speed:
        device = lewm.pick_device(args.device)
        for name, value in speed(args.speed, device).items():
            print(f"{name:36}{value:12,.4g}")
        if args.out:
            result, figure = growth(lewm.Config.preset(args.speed), device)
            print("\n".join(summary("growth", result)))
            figure.savefig(args.out, dpi=110)
        return
    out = Path(args.out or f"runs/{args.compare or 'probe'}")
    out.mkdir(parents=True, exist_ok=True)
    result = {"command": "python probe.py " + " ".join(argv)}
    if args.ceiling:
        result.update(seed=args.seed, n=args.pairs, ceiling=ceiling(args.pairs, args.seed))
        print(pusht.table(result["ceiling"]))
    elif args.compare:
        result[args.compare] = COMPARISONS[args.compare](out, lewm.pick_device(args.device))
        print("\n".join(summary(args.compare, result[args.compare])))
    else:
        held = held_out(args)
        result.update(seed=args.seed, n=args.episodes)
        for name in [name for name in PARTS if name in args.only.split(",")]:
            result[name], figure = PARTS[name](held)
            figure.savefig(out / f"{name}.png", dpi=110)
            print("\n".join(summary(name, result[name])), flush=True)
    path = out / ("probe.json" if args.checkpoint else f"{[*result][-1]}.json")
    path.write_text(json.dumps(result, indent=1, default=float), encoding="utf-8")
    print(f"all numbers and pictures in {out}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, OSError) as error:
        sys.exit(f"probe.py: {' '.join(str(error).split())}")
    except KeyboardInterrupt:
        sys.exit("probe.py: stopped")
