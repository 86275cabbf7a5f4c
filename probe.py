"""What the latent space of a LeWorldModel knows, and what surprises it: section 5 of arXiv 2603.19312.

    python probe.py assets/nano.pt                           # all parts, 1 to 3 minutes
    python probe.py assets/nano.pt --only surprise,geometry
    python probe.py --ceiling simulator                      # how far the planner gets with a perfect model
    python probe.py --curves runs/a runs/b --out curves.png  # compares the course of trainings
    python probe.py --import weights.pt --out checkpoint.pt  # turns the authors' weights into a checkpoint
    python probe.py --export checkpoint.pt --out weights.pt  # turns a checkpoint into such weights

Map: Held-out data / Pictures / 1 Probes / 2 Surprise / 3 Straightening and geometry / 4 Imagination and
actions / 5 Cost landscape / 6 Ceiling / 7 The authors' weights / 8 Command line.

Everything is measured on scripted episodes whose seeds no training can use. Probes are fitted on one half
of the episodes and judged on the other. A part takes a `Held`, and returns numbers and one picture. The
letters are those of lewm.py: E episodes, T frames, D width of an embedding, A numbers in an action block.
"""

import argparse
import cmath
import json
import math
import os
import sys
import time
from dataclasses import dataclass
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
MOMENT = 6                          # the frame at which a trajectory of `surprises` is disturbed
TARGETS = ["agent x (px)", "agent y (px)", "block x (px)", "block y (px)", "sine of angle", "cosine of angle"]
GROUPS = {"agent": slice(0, 2), "block": slice(2, 4), "angle": slice(4, 6)}     # of TARGETS


# ======== Held-out data ===============================================================================
# A trajectory is T frames, `frame_skip` env steps apart, with the T - 1 action blocks between them.

@dataclass
class Held:
    """Held-out trajectories and what the model makes of them: all that a part is given."""
    model: lewm.LeWM
    states: np.ndarray              # float32 (E,T,7)
    actions: np.ndarray             # raw (E,T-1,skip,2)
    blocks: torch.Tensor            # the same actions, z-scored (E,T-1,A)
    pixels: torch.Tensor            # uint8 (E,T,3,S,S)
    z: torch.Tensor                 # (E,T,D)
    untrained: torch.Tensor         # (E,T,D) by an encoder that was never trained
    seed: int = 0                   # of the trajectories, and of what is drawn at random
    steps: int = 1500               # optimizer steps of each MLP probe and of the decoder
    run: Path = Path(".")           # folder of the checkpoint, where metrics.csv may lie


def trajectories(episodes, cfg, seed=0):
    """One trajectory an episode: states float32 (E,T,7), raw actions (E,T-1,skip,2); T = CONTEXT + AHEAD."""
    T, skip = CONTEXT + AHEAD, cfg.frame_skip
    span, states, actions = skip * (T - 1), [], []
    data = pusht.collect(2 * episodes, FIRST_SEED + seed)       # twice as many, as some are too short
    long = np.flatnonzero(data["ep_len"] > span)[:episodes]
    lewm.require(len(long) == episodes, f"too few episodes have {span + 1} steps: lower frame_skip {skip}")
    for e in long:
        t = data["ep_offset"][e] + np.random.default_rng([seed, e]).integers(data["ep_len"][e] - span)
        states.append(data["state"][t:t + span + 1:skip])
        actions.append(data["action"][t:t + span].reshape(T - 1, skip, -1))
    return np.stack(states), np.stack(actions)


def draw(states, size, colour=pusht.COLOURS["block"]):
    """states (...,7) -> pixels uint8 (...,3,S,S)."""
    states = torch.as_tensor(np.asarray(states, np.float32))
    parts = states.flatten(0, -2).split(256)
    return torch.cat([pusht.render(some, size, colour) for some in parts]).unflatten(0, states.shape[:-1])


@torch.no_grad()
def encode(model, pixels):
    """pixels (E,T,3,S,S) -> embeddings (E,T,D) on the CPU."""
    device, parts = model.action_stats.device, pixels.flatten(0, 1).split(128)
    return torch.cat([model.encode(some.to(device)).cpu() for some in parts]).unflatten(0, pixels.shape[:2])


@torch.no_grad()
def imagine(model, z, blocks):
    """Open loop: context z (E,T0,D), blocks (E,T-1,A) -> (E,T,D): the context, then predictions alone."""
    device, first = model.action_stats.device, max(0, z.shape[1] - model.cfg.history)
    seen, blocks = z[:, first:].to(device), blocks[:, None, first:].to(device)
    return torch.cat([z, model.rollout(seen, blocks)[:, 0, seen.shape[1] - 1:].cpu()], dim=1)


def probe_targets(states):
    """states (...,7) -> what probes read, the TARGETS (...,6)."""
    states = torch.as_tensor(states).float()
    return torch.cat([states[..., :4], states[..., 4:5].sin(), states[..., 4:5].cos()], dim=-1)


def untrained(model):
    """A new LeWM of the same Config and data statistics, to compare a trained one with."""
    new = lewm.LeWM(model.cfg)
    new.load_state_dict({name: getattr(model, name) for name in STATISTICS}, strict=False)
    return new.to(model.action_stats.device).eval()


# ======== Pictures ====================================================================================

STYLE = (dict(color="black", ls="-"), dict(color="tab:red", ls="--"),
         dict(color="tab:blue", ls=":"), dict(color="tab:gray", ls="-."))


def canvas(width, height, rows, **ratios):
    """-> a figure, and its axes by their titles in `rows`; a title that is repeated spans its places."""
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplot_mosaic(rows, **ratios)
    for title, axis in axes.items():
        axis.set_title(title, fontsize=10)
    return figure, axes


def draw_lines(axis, x, lines, xlabel, **others):
    """lines: {name: n numbers, or (n,3) with an interval}, each in its own style."""
    for (name, y), style in zip(lines.items(), STYLE):
        if np.ndim(y) == 2:
            y, low, high = np.transpose(y)
            axis.fill_between(x, low, high, color=style["color"], alpha=0.2, lw=0)
        axis.plot(x, y, label=name, marker=".", **style)
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
    lewm.require(len(runs) <= len(STYLE), f"--curves draws up to {len(STYLE)} runs, not {len(runs)}")
    figure, axes = canvas(13, 3.2, [["std", "min_std", "effective_rank", "val_prediction"]])
    for run, style in zip(runs, STYLE):
        metrics = pusht.read_metrics(run)
        lewm.require(metrics is not None, f"{run} has no metrics.csv of a training, or one without rows")
        for name, axis in axes.items():
            axis.plot(metrics["step"], metrics[name], label=Path(run).resolve().name, **style)
            axis.set_xlabel("step")
    axes["std"].legend(fontsize=8)
    axes["val_prediction"].set_yscale("log")
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110)


# ======== 1 Probes ====================================================================================
# A linear probe asks what lies open in an embedding, an MLP what is there at all. Beside them stand codes
# that nobody trained for this, because r = 0.9 says nothing until one knows what raw pixels give.

def fit_ridge(x, y, ridge=1e-3):
    """Closed-form ridge regression on standardised codes, x (n,D), y (n,k) -> a function (m,D) -> (m,k)."""
    centre, scale, mean = x.mean(0), x.std(0).clamp(min=1e-8), y.mean(0)
    x = (x - centre) / scale
    penalty = ridge * len(x) * torch.eye(x.shape[1], dtype=x.dtype)
    weights = torch.linalg.solve(x.T @ x + penalty, x.T @ (y - mean))
    return lambda new: (new - centre) / scale @ weights + mean


def fit_linear(x, y):
    """`fit_ridge` in double precision."""
    read = fit_ridge(x.double(), y.double())
    return lambda new: read(new.double()).float()


def fit_mlp(x, y, steps=1500, width=256, seed=0, batch=256):
    """Two hidden layers between standardised numbers, x (n,D), y (n,k) -> a function (m,D) -> (m,k)."""
    centre, scale, mean, spread = x.mean(0), x.std(0).clamp(min=1e-8), y.mean(0), y.std(0).clamp(min=1e-4)
    x, y = (x - centre) / scale, (y - mean) / spread
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(x.shape[1], width), nn.GELU(), nn.Linear(width, width), nn.GELU(),
                            nn.Linear(width, y.shape[1]))
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


def principal_components(pixels, half, count):
    """pixels (E,T,3,S,S) -> (E,T,count), on principal components of the first `half` trajectories."""
    x = pixels.flatten(2).float() / 255
    count = min(count, len(x) * x.shape[1] // 4)
    _, _, axes = torch.pca_lowrank(x[:half].flatten(0, 1), q=count, niter=3)    # starts from random axes
    return (x - x[:half].mean((0, 1))) @ axes


def pearson(a, b):
    """(n,k) each -> Pearson r of each column, float64 (k,); 0 for a column that is constant."""
    a, b = (x.double() - x.double().mean(0) for x in (a, b))
    return (a * b).sum(0) / ((a * a).sum(0) * (b * b).sum(0)).sqrt().clamp(min=1e-12)


def score(guess, truth):
    """(n,6) each -> {group: {"mse" of standardised targets, "mse_spread", "r", "error" in px or degrees}}."""
    mse, r = ((guess - truth) / truth.std(0)).square().mean(0), pearson(guess, truth)
    a, b = (torch.atan2(x[:, 4], x[:, 5]) for x in (guess, truth))
    turn = torch.rad2deg(torch.atan2((a - b).sin(), (a - b).cos()).abs())
    agent, block = (guess - truth)[:, :2].norm(dim=1), (guess - truth)[:, 2:4].norm(dim=1)
    error = {"agent": agent, "block": block, "angle": turn}
    return {name: {"mse": mse[columns].mean().item(), "mse_spread": mse[columns].std(correction=0).item(),
                   "r": r[columns].mean().item(), "error": error[name].median().item()}
            for name, columns in GROUPS.items()}


def with_interval(guess, truth, draws=1000, seed=0):
    """`score` of (E,T,6), and "r_interval", 95 %, from resampling trajectories, whose frames are alike."""
    rng, result = np.random.default_rng(seed), score(guess.flatten(0, 1), truth.flatten(0, 1))
    picks = [rng.integers(len(guess), size=len(guess)) for _ in range(draws)]
    r = torch.stack([pearson(guess[pick].flatten(0, 1), truth[pick].flatten(0, 1)) for pick in picks])
    for name, columns in GROUPS.items():
        result[name]["r_interval"] = np.percentile(r[:, columns].mean(1).numpy(), (2.5, 97.5)).tolist()
    return result


def probes(held):
    """Both probes on all codes, and on what the model predicts 1 and 5 blocks ahead."""
    z, truth, half, result, reads = held.z, probe_targets(held.states), len(held.z) // 2, {}, {}
    pixels = principal_components(held.pixels, half, z.shape[2])
    for code, x in {"LeWM": z, "untrained encoder": held.untrained, "pixels, PCA": pixels}.items():
        x_fit, y_fit = x[:half].flatten(0, 1), truth[:half].flatten(0, 1)
        reads[code] = {"linear": fit_linear(x_fit, y_fit), "mlp": fit_mlp(x_fit, y_fit, held.steps)}
        for kind, read in reads[code].items():
            result[f"{code}, {kind}"] = with_interval(read(x[half:]), truth[half:])
    imagined = imagine(held.model, z[half:, :CONTEXT], held.blocks[half:])
    for ahead in (1, 5):
        frame = slice(CONTEXT - 1 + ahead, CONTEXT + ahead)
        for name, x in {"predicted": imagined, "encoded": z[half:]}.items():
            for kind, read in reads["LeWM"].items():
                row = with_interval(read(x[:, frame]), truth[half:, frame])
                result[f"{name} {ahead} ahead, {kind}"] = row
    guesses = {kind: read(z[half:].flatten(0, 1)) for kind, read in reads["LeWM"].items()}
    return result, draw_probes(guesses, truth[half:].flatten(0, 1))


def draw_probes(guesses, truth):
    """What is read off the embeddings over the truth. guesses: {kind: (n,6)}, truth (n,6)."""
    looks = {"linear": dict(marker="x", color="tab:gray"), "mlp": dict(marker=".", color="black")}
    figure, axes = canvas(10, 7, [TARGETS[::2], TARGETS[1::2]])
    for i, name in enumerate(TARGETS):
        for kind, guess in guesses.items():
            text = f"{kind}, r = {pearson(guess, truth)[i]:.2f}"
            axes[name].scatter(truth[:, i], guess[:, i], s=6, alpha=0.5, lw=0.7, label=text, **looks[kind])
        axes[name].axline([truth[:, i].mean()] * 2, slope=1, color="tab:red", lw=1)
        axes[name].set(xlabel="true", ylabel="read off the embedding")
        axes[name].legend(fontsize=8)
    return figure


# ======== 2 Surprise ==================================================================================
# Violation of expectation: ||z_hat_t - z_t||^2, where z_hat_t comes from the true history. There are three
# matched films: one as it was, one in which the block turns red at frame MOMENT, and one in which agent and
# block are somewhere else from then on.

RED, GREY = np.array([200, 40, 40]), np.array(pusht.COLOURS["block"])


@torch.no_grad()
def surprise(model, z, blocks):
    """z (E,T,D), blocks (E,T-1,A) -> (E,T-1): squared error of predicting frame t + 1 from those up to t."""
    device, errors = model.action_stats.device, []
    for t in range(z.shape[1] - 1):
        seen = slice(max(0, t + 1 - model.cfg.history), t + 1)
        z_hat = model.predict(z[:, seen].to(device), blocks[:, seen].to(device))[:, -1].cpu()
        errors.append((z_hat - z[:, t + 1]).square().sum(-1))
    return torch.stack(errors, 1)


def recoloured(states, pixels, share):
    """The same films, but from frame MOMENT on the block has gone this share of the way from grey to red."""
    colour = tuple((1 - share) * GREY + share * RED)
    return torch.cat([pixels[:, :MOMENT], draw(states[:, MOMENT:], pixels.shape[-1], colour)], 1)


def teleported(states, actions, distance, seed):
    """From frame MOMENT on, agent and block are `distance` px away, or anywhere if None; actions stay."""
    rng, result, skip = np.random.default_rng(seed), states.copy(), actions.shape[2]
    if distance is None:
        moved = [pusht.random_state(rng) for _ in states]
    else:
        moved = displaced(states[:, MOMENT], "block px", distance, seed)
        moved = displaced(moved, "agent px", distance, seed + 1)
    for e, here in enumerate(moved):
        env = pusht.PushT()
        env.reset(options={"state": here})
        later = [env.step(action)[0] for action in actions[e, MOMENT:].reshape(-1, 2)]
        result[e, MOMENT:] = [here, *later[skip - 1::skip]]
    return result


def paired(disturbed, clean, flips=10_000, seed=0):
    """(n,) each -> mean difference, Cohen's d of the differences, two-sided p of a paired sign-flip test."""
    difference = np.asarray(disturbed - clean, np.float64)
    signs = np.random.default_rng(seed).choice((-1.0, 1.0), (flips, len(difference)))
    mean, std = difference.mean(), difference.std(ddof=1)
    extreme = np.abs((signs * difference).mean(1)) >= abs(mean) - 1e-12
    return {"difference": mean, "effect_size": mean / max(std, 1e-12),
            "p": (1 + extreme.sum()) / (1 + flips), "n": len(difference)}


def roc_area(positive, negative):
    """Probability that a positive scores above a negative, ties counting half."""
    positive, negative = np.asarray(positive)[:, None], np.asarray(negative)
    return float((positive > negative).mean() + (positive == negative).mean() / 2)


def surprises(held):
    """Curves of surprise, paired tests, a detector of teleports, and the effect of weaker disturbances."""
    states, actions, pixels, few = held.states, held.actions, held.pixels, slice(0, 60)
    size, now = pixels.shape[-1], MOMENT - 1                    # `now`: the column about frame MOMENT

    def watch(film):                                            # of all trajectories, or of the first few
        return surprise(held.model, encode(held.model, film), held.blocks[:len(film)]).numpy()

    films = {"clean": pixels, "block turns red": recoloured(states, pixels, 1.0),
             "teleport": draw(teleported(states, actions, None, held.seed), size)}
    curves = {name: watch(film) for name, film in films.items()}
    clean = curves["clean"][:, now]
    result = {name: paired(curves[name][:, now], clean) for name in ("block turns red", "teleport")}
    result["teleport"]["roc_area"] = roc_area(curves["teleport"][:, now], curves["clean"].ravel())

    def over_clean(film):
        disturbed = watch(film)[:, now]
        return {"ratio": disturbed.mean() / clean[few].mean(), **paired(disturbed, clean[few])}

    by_distance, by_colour = {}, {}
    for distance in (5, 10, 20, 40, 80, 160):
        moved = teleported(states[few], actions[few], distance, held.seed)
        by_distance[distance] = over_clean(draw(moved, size))
    for share in (0.25, 0.5, 0.75, 1.0):
        change = round(share * float(np.linalg.norm(RED - GREY)))
        by_colour[change] = over_clean(recoloured(states[few], pixels[few], share))
    result.update(by_teleport_px=by_distance, by_colour_distance=by_colour)
    return result, draw_surprise(films, curves, result)


def draw_surprise(films, curves, result):
    """The first films, the mean curves with their 95 % bands, and surprise over the strength."""
    strengths = {"teleport (px)": result["by_teleport_px"], "colour (RGB)": result["by_colour_distance"]}
    figure, axes = canvas(10, 7.5, [["films"] * 4, ["surprise"] * 2 + list(strengths)])
    shown, (n, frames) = range(MOMENT - 3, MOMENT + 3), curves["clean"].shape
    first = {name: film[0, shown] for name, film in films.items()}
    draw_films(axes["films"], first, [f"frame {t}" for t in shown])
    bands = {}
    for name, curve in curves.items():
        mean, half = curve.mean(0), 1.96 * curve.std(0) / math.sqrt(n)
        bands[name] = np.stack([mean, mean - half, mean + half], 1)
    draw_lines(axes["surprise"], range(1, frames + 1), bands, "frame", ylabel="squared latent distance")
    for name, rows in strengths.items():
        ratios = {name: [row["ratio"] for row in rows.values()]}
        draw_lines(axes[name], list(rows), ratios, "strength", ylabel="surprise / clean", ylim=(0, None))
    return figure


# ======== 3 Straightening and geometry ================================================================
# Nothing asks for it, yet latent paths become straighter than those of pixels while the model learns. The
# board should come back as a sheet. The spectrum and the quantiles show what SIGReg promised.

def straightening(held):
    """Mean cosine of consecutive velocities, the paper's measure; and its course in training, where known."""
    codes = {"LeWM": held.z, "untrained encoder": held.untrained, "pixels": held.pixels.flatten(2).float()}
    result, metrics = {name: lewm.straightness(x) for name, x in codes.items()}, pusht.read_metrics(held.run)
    titles = ["straightness"] if metrics is None else ["straightness", "over training"]
    figure, axes = canvas(8, 3.2, [titles])
    axes["straightness"].bar(list(result), list(result.values()), color=["black", "gray", "lightgray"])
    axes["straightness"].set_ylabel("mean cosine")
    if metrics is not None:
        draw_lines(axes["over training"], metrics["step"], {"LeWM": metrics["straightness"]}, "step")
    return result, figure


def grid(what, side=14):
    """Agent or block on a grid, the other at rest -> places (side^2,2) in px, states (side^2,7)."""
    reach = 196 if what == "agent" else 100                     # the block's centre seldom leaves the middle
    line = pusht.BOARD / 2 + np.linspace(-reach, reach, side)
    places = np.stack(np.meshgrid(line, line), -1).reshape(-1, 2)
    states = np.tile(np.array([60, 60, 256, 230, 0.8, 0, 0], np.float32), (len(places), 1))
    if what == "agent":
        states[:, :2] = places
    else:
        centre = pusht.centre(0, cmath.rect(1, 0.8))            # seen from the block's position
        states[:, 2:4] = places - np.array([centre.real, centre.imag])
    return places, states


def geometry(held):
    """Principal components of two grids, the covariance's spectrum, quantiles on random directions."""
    model, z, result = held.model, held.z.flatten(0, 1), {}
    figure, axes = canvas(10, 6.5, [["agent, by x (px)", "agent, by y (px)", "spectrum"],
                                    ["block, by x (px)", "block, by y (px)", "8 random projections"]])
    for what in ("agent", "block"):
        places, states = grid(what)
        sheet = encode(model, draw(states[None], model.cfg.image_size))[0]      # (side^2,D)
        sheet = sheet - sheet.mean(0)
        _, s, v = torch.linalg.svd(sheet, full_matrices=False)
        result[f"{what} grid, share of 2 components"] = (s[:2].square().sum() / s.square().sum()).item()
        for name, colour in zip("xy", places.T):
            axis = axes[f"{what}, by {name} (px)"]
            figure.colorbar(axis.scatter(*(sheet @ v[:2].T).T, c=colour, s=14), ax=axis)
            axis.set(xlabel="component 1", ylabel="component 2")
    std = z.std(0)
    result.update(effective_rank=lewm.effective_rank(z), dimensions=z.shape[1],
                  smallest_std=std.min().item(), largest_std=std.max().item())
    spectrum = torch.linalg.eigvalsh(torch.cov(z.T)).flip(0)
    lines = {"embeddings": spectrum, "N(0, I)": torch.ones(len(spectrum))}
    draw_lines(axes["spectrum"], range(1, len(spectrum) + 1), lines, "component", yscale="log")
    directions = torch.randn(z.shape[1], 8, generator=torch.Generator().manual_seed(0))
    levels = torch.linspace(0.01, 0.99, 99)
    expected = math.sqrt(2) * torch.erfinv(2 * levels - 1)
    quantiles = (z @ nn.functional.normalize(directions, dim=0)).quantile(levels, dim=0)        # (99,8)
    axis = axes["8 random projections"]
    axis.plot(expected, quantiles, color="black", lw=0.7)
    axis.plot(expected, expected, **STYLE[1])
    axis.set(xlabel="quantiles of N(0, 1)", ylabel="quantiles of the embeddings")
    return result, figure


# ======== 4 Imagination and actions ===================================================================
# The model has no decoder. This one is trained afterwards, on frozen embeddings, only to look at them. A
# model that ignores actions predicts as well with the wrong ones.

def fit_decoder(z, pixels, steps=1500, side=32, seed=0):
    """z (n,D), pixels uint8 (n,3,S,S) -> a function (m,D) -> float (m,3,side,side) in [0, 1]."""
    read = fit_mlp(z, lewm.fit_pictures(pixels, side).flatten(1) / 255, steps, 512, seed, batch=128)
    return lambda new: read(new).clamp(0, 1).view(-1, 3, side, side)


def imagination(held):
    """Open-loop error over the horizon beside copying the last context frame, and a film strip."""
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
    decode = fit_decoder(z[:half].flatten(0, 1), held.pixels[:half].flatten(0, 1), held.steps)
    films = {"true": lewm.fit_pictures(held.pixels[half], 32) / 255, "decoded": decode(z[half]),
             "imagined": decode(imagined[0])}
    figure, axes = canvas(11, 6.5, [["films"] * 4, list(result["open loop"])], height_ratios=(1.25, 1))
    draw_films(axes["films"], films, ["context"] * CONTEXT + [f"+{t + 1}" for t in range(AHEAD)])
    for key in result["open loop"]:
        unit = {"latent": "squared error a dimension", "angle_error": "degrees"}.get(key, "px")
        lines = {name: row[key] for name, row in result.items()}
        draw_lines(axes[key], range(1, AHEAD + 1), lines, "blocks ahead", ylabel=unit)
    return result, figure


def action_use(held):
    """Open-loop latent error by horizon with true, shuffled and zero (mean) actions."""
    z, true, result = held.z, held.blocks, {}
    variants = {"true": true, "shuffled": true.roll(1, 0), "zero": torch.zeros_like(true)}
    for name, blocks in variants.items():
        error = imagine(held.model, z[:, :CONTEXT], blocks) - z
        result[f"{name} actions"] = error[:, CONTEXT:].square().mean((0, 2)).tolist()
    figure, axes = canvas(6, 3.5, [["squared latent error, a dimension"]])
    draw_lines(*axes.values(), range(1, AHEAD + 1), result, "blocks ahead")
    return result, figure


# ======== 5 Cost landscape ============================================================================
# The planner descends the squared distance to the goal's embedding, so that distance had better grow with
# the distance in the world. Where it is as large as between any two states, it tells the planner nothing.

DISPLACEMENTS = {"agent px": (5, 10, 20, 40, 80, 160), "block px": (5, 10, 20, 40, 80, 160),
                 "block degrees": (5, 10, 20, 45, 90, 180)}


def clear(states):
    """Which of states (...,7) can happen: the agent does not lie on the block."""
    rows = states.reshape(-1, 7).tolist()
    gaps = [pusht.gap(complex(*row[:2]), complex(*row[2:4]), cmath.rect(1, row[4])) for row in rows]
    return np.reshape(np.array(gaps) > pusht.AGENT_RADIUS - 1, states.shape[:-1])


def displaced(states, what, amount, seed=0):
    """states (E,7) with agent or block moved in random directions, or the block turned about its centre."""
    rng, states = np.random.default_rng(seed), states.astype(np.float64)
    if what == "block degrees":
        turn = np.radians(amount) * rng.choice((-1, 1), len(states))
        before, after = np.exp(1j * states[:, 4]), np.exp(1j * (states[:, 4] + turn))
        shift = pusht.centre(0, before) - pusht.centre(0, after)            # so that the centre stays
        states[:, 2:5] += np.stack([shift.real, shift.imag, turn], 1)
        return states
    columns = slice(0, 2) if what == "agent px" else slice(2, 4)
    angle = rng.uniform(0, 2 * np.pi, (64, len(states)))                    # 64 directions to choose from
    moved = np.repeat(states[None], 64, axis=0)                             # (64,E,7)
    moved[..., columns] += amount * np.stack([np.cos(angle), np.sin(angle)], -1)
    # the best direction stays on the board; of those that do, one that keeps the agent off the block
    half = pusht.BOARD / 2
    outside = np.maximum(np.abs(moved[..., columns] - half).max(-1), half - 60)     # equal for all inside
    return moved[(outside + 0.1 * ~clear(moved)).argmin(0), np.arange(len(states))]


def landscape(held):
    """Squared latent distance after a displacement, as a share of that between unrelated states."""
    model, states, z = held.model, held.states[:, CONTEXT], held.z[:, CONTEXT]
    unrelated, result = 2 * z.var(0).sum(), {}
    figure, axes = canvas(9, 3, [list(DISPLACEMENTS)])
    for what, amounts in DISPLACEMENTS.items():
        result[what], rows = {}, []
        for amount in amounts:
            moved = displaced(states, what, amount, held.seed)
            possible = clear(moved)                             # the turned block does not lie on the agent
            there = encode(model, draw(moved[None, possible], model.cfg.image_size))[0]
            share = (there - z[possible]).square().sum(-1) / unrelated
            mean, half = share.mean().item(), 1.96 * share.std().item() / math.sqrt(len(share))
            result[what][amount] = {"mean": mean, "interval": [mean - half, mean + half], "n": len(share)}
            rows.append([mean, mean - half, mean + half])
        ylabel = "latent cost / unrelated states'"
        draw_lines(axes[what], amounts, {what: rows}, "displacement", ylabel=ylabel, ylim=(0, 1.2))
    return result, figure


# ======== 6 Ceiling ===================================================================================
# What limits planning, the model or the planner? The simulator in the model's place answers that.

class Simulator(nn.Module):
    """The world itself as a LeWM. Its "embedding" is the state, scaled so that success is a distance of 1."""
    to_blocks, to_actions = lewm.LeWM.to_blocks, lewm.LeWM.to_actions

    def __init__(self, cfg, action_stats):
        super().__init__()
        self.cfg, self.action_stats, self.env = cfg, action_stats, pusht.PushT()

    def encode(self, states):
        """states (...,7) -> (...,8): places in 20 px, angle in 20 degrees, velocities that hardly count."""
        turn = torch.stack([states[..., 4].cos(), states[..., 4].sin()], -1) / math.radians(20)
        return torch.cat([states[..., :4] / 20, turn, states[..., 5:] / 1e4], -1)

    def rollout(self, z, plans):
        """z (B,1,8), plans (B,N,H,A) -> (B,N,H,8), by playing every plan."""
        actions, skip = self.to_actions(plans).numpy(), self.cfg.frame_skip         # (B,N,H*skip,2)
        ends = torch.zeros(*plans.shape[:3], z.shape[-1])
        for b, n in np.ndindex(*plans.shape[:2]):
            x = z[b, -1].double()
            angle = torch.atan2(x[5], x[4]) % (2 * math.pi)
            self.env.reset(options={"state": torch.cat([20 * x[:4], angle[None], 1e4 * x[6:]]).numpy()})
            states = np.stack([self.env.step(action)[0] for action in actions[b, n]])
            ends[b, n] = self.encode(torch.from_numpy(states[skip - 1::skip]).float())
        return ends


class StatePlanner(lewm.Planner):
    """lewm.Planner on the state in place of a picture."""
    def encode(self, states):
        return self.model.encode(torch.from_numpy(np.stack(states)).float())

    def __call__(self, running, environments):
        seen = {e: SimpleNamespace(render=lambda e=e: environments[e].state) for e in running}
        return super().__call__(running, seen)


def ceiling(pairs, seed=0):
    """Plan on development pairs with the simulator as the model -> a dictionary like `pusht.evaluate`'s."""
    cfg = lewm.Config.preset("nano")
    model = Simulator(cfg, lewm.action_statistics(pusht.collect(200, seed)["action"]))
    problems = pusht.held_out_pairs(pairs, "dev", seed, cfg.goal_distance)
    planner = StatePlanner(model, problems[1], cfg, seed)
    result = pusht.evaluate(model, cfg, problems, seed, planner=planner)
    rows = {name.replace("LeWM", "simulator"): row for name, row in result["policies"].items()}
    return {**result, "policies": rows}


# ======== 7 The authors' weights ======================================================================
# The released weights are 303 tensors. The networks are the same, the names are not quite: these tables
# translate ours into theirs. Their encoder is the ViT of transformers, whose versions 4 and 5 differ; {}
# stands for three matrices that are one here.

PREDICTOR_NAMES = {
    "projector.": "projector.net.", "pred_proj.": "pred_proj.net.", ".mlp.": ".mlp.net.",
    "predictor.norm.": "predictor.transformer.norm.", ".layers.": ".transformer.layers.",
    ".attn.0.": ".attn.norm.", ".attn.1.to_qkv.": ".attn.to_qkv.", ".attn.1.to_out.": ".attn.to_out.0."}
VIT_NAMES = {
    ".norm.": ".layernorm.", ".norm1.": ".layernorm_before.", ".norm2.": ".layernorm_after.",
    ".cls_token": ".embeddings.cls_token", ".pos_embedding": ".embeddings.position_embeddings",
    ".patch_embed.": ".embeddings.patch_embeddings.projection."}
ENCODER_NAMES = {
    4: {**VIT_NAMES, ".layers.": ".encoder.layer.", ".attn.to_qkv.": ".attention.attention.{}.",
        ".attn.to_out.": ".attention.output.dense.", ".mlp.0.": ".intermediate.dense.",
        ".mlp.2.": ".output.dense."},
    5: {**VIT_NAMES, ".attn.to_qkv.": ".attention.{}_proj.", ".attn.to_out.": ".attention.o_proj.",
        ".mlp.0.": ".mlp.fc1.", ".mlp.2.": ".mlp.fc2."}}
PARTS_OF_QKV = {4: ("query", "key", "value"), 5: ("q", "k", "v")}
STATISTICS = ("picture_mean", "colour_map", "action_stats")     # these have no place in the authors' files
EXPERT_ACTION_STATS = [[-0.0087, 0.0068], [0.2019, 0.2002], [-1.0, -1.0], [1.0, 1.0]]   # of their Push-T data


def official_names(name, transformers=4):
    """A parameter's name here -> the authors' names of its parts: one, or three for query, key and value."""
    table = ENCODER_NAMES[transformers] if name.startswith("encoder.") else PREDICTOR_NAMES
    for here, there in table.items():
        name = name.replace(here, there)
    return [name.format(part) for part in PARTS_OF_QKV[transformers]] if "{}" in name else [name]


def official_weights(model, transformers=4):
    """{the authors' name: tensor}. The tensors are views of the model's: writing into them changes it."""
    cfg, weights, nowhere = model.cfg, {}, "the authors' layout has no place for"
    lewm.require(transformers in ENCODER_NAMES, f"transformers is {transformers}, not 4 or 5")
    lewm.require(not cfg.whiten, f"{nowhere} the colour statistics of a model with whiten")
    fine = cfg.embed_dim == cfg.predictor_width
    lewm.require(fine, f"{nowhere} predictor.widen: embed_dim must equal predictor_width")
    for name, x in model.state_dict().items():
        names = official_names(name, transformers)
        if name not in STATISTICS:
            weights.update(zip(names, x.chunk(3) if len(names) == 3 else [x]))
    name = "action_encoder.patch_embed.weight"
    weights[name] = weights[name][..., None]                    # theirs is a Conv1d of kernel 1
    return weights


def load_official(path, cfg=None, action_stats=EXPERT_ACTION_STATS, device="cpu"):
    """The authors' weights -> LeWM in evaluation mode. Their names may have "model." in front.

    cfg: a Config, of which the sizes matter; the paper's when not given. action_stats (4,a): mean, std,
    lowest and highest of the raw actions that the weights were trained with. A ValueError lists every
    tensor that does not fit."""
    given, stats = lewm.read_weights(path), torch.as_tensor(action_stats)
    model = lewm.LeWM(cfg or lewm.Config())
    fine = stats.shape == model.action_stats.shape
    lewm.require(fine, f"action_stats are {tuple(stats.shape)}, not {tuple(model.action_stats.shape)}")
    given = given.get("state_dict", given)                      # as in a checkpoint of Lightning
    lewm.require(isinstance(given, dict), f"{path} holds no dictionary of tensors")
    given = {str(name).removeprefix("model."): x for name, x in given.items()}
    wanted = official_weights(model, 5 if any("encoder.layers." in name for name in given) else 4)
    found = {name: list(getattr(x, "shape", [type(x).__name__])) for name, x in given.items()}
    shapes = {name: list(x.shape) for name, x in wanted.items()}
    wrong = [f"missing: {name} {shapes[name]}" for name in shapes if name not in found]
    wrong += [f"unexpected: {name}" for name in found if name not in shapes]
    both = [name for name in shapes if name in found]
    wrong += [f"{name} is {found[name]}, not {shapes[name]}" for name in both if found[name] != shapes[name]]
    lewm.require(not wrong, f"{path} does not fit, {len(wrong)} tensors are wrong: {'; '.join(wrong)}")
    for name, x in wanted.items():
        x.copy_(given[name])
    model.action_stats.copy_(stats)
    return model.to(device).eval()


def save_official(model, path, transformers=4):
    """Write the weights in the authors' layout, with the names of transformers 4 or 5."""
    weights = {name: x.cpu().clone() for name, x in official_weights(model, transformers).items()}
    partial = Path(f"{path}.partial")
    torch.save(weights, partial)
    os.replace(partial, path)                                   # so a kill leaves the old file or the new one


# ======== 8 Command line ==============================================================================

PARTS = {"probes": probes, "surprise": surprises, "straightening": straightening, "geometry": geometry,
         "imagination": imagination, "actions": action_use, "landscape": landscape}
SHOWN = ("r", "error", "ratio", "effect_size", "p", "roc_area", "mean", "success")       # in print


def summary(name, result):
    """A part's numbers as lines of text. Of tables only the columns in SHOWN; all are in probe.json."""
    cells, lines = [], []
    for key, x in result.items():
        if not isinstance(x, dict):
            cells.append(f"{key} " + " ".join(f"{number:.3g}" for number in np.ravel(x)))
        elif shown := [f"{column} {x[column]:.3g}" for column in SHOWN if column in x]:
            cells.append(f"{key} " + " ".join(shown))
        else:
            lines += summary(f"{name}, {key}", x)
    return [f"{name}: {', '.join(cells)}", *lines] if cells else lines


def parse_arguments(argv):
    parser = argparse.ArgumentParser(description="What a LeWorldModel knows.", allow_abbrev=False)
    parser.error = lambda text: sys.exit(f"probe.py: {text}; python probe.py --help lists all flags")
    flag = parser.add_argument
    flag("checkpoint", metavar="CKPT", nargs="?", help="of lewm.py; one comes with it: assets/nano.pt")
    flag("--ceiling", choices=["simulator"], help="instead: plan with a perfect model")
    flag("--curves", metavar="RUN", nargs="+", help="instead: draw metrics.csv of up to four trainings")
    flag("--import", dest="weights", metavar="FILE", help="instead: make the authors' weights a checkpoint")
    flag("--export", metavar="CKPT", help="instead: write a checkpoint in the authors' layout")
    flag("--out", metavar="PATH", help="the file to write; for parts and ceiling a folder, runs/probe")
    flag("--only", default=",".join(PARTS), metavar="PARTS", help="default: %(default)s")
    flag("--episodes", type=int, default=240, help="held-out trajectories; default: 240, half to fit probes")
    flag("--steps", type=int, default=1500, help="optimizer steps of probes and decoder; default: 1500")
    flag("--pairs", type=int, default=50, help="pairs to plan in for --ceiling; default: 50")
    flag("--seed", type=int, default=0, help="which held-out episodes; default: 0")
    flag("--preset", choices=lewm.PRESETS, default="paper", help="sizes for --import; default: paper")
    flag("--transformers", type=int, choices=(4, 5), default=4, help="names that --export writes; default: 4")
    flag("--device", help="cpu, cuda, mps; default: the best there is")
    args = parser.parse_args(argv)
    modes = [args.checkpoint, args.ceiling, args.curves, args.weights, args.export]
    fine = sum(map(bool, modes)) == 1
    lewm.require(fine, "say which checkpoint, as in: python probe.py assets/nano.pt; or one of --ceiling, "
                       "--curves, --import and --export")
    lewm.require(args.out or any(modes[:2]), "say where the result goes with --out FILE")
    lewm.require({*args.only.split(",")} <= {*PARTS}, f"--only {args.only}: the parts are {','.join(PARTS)}")
    for name, least in (("episodes", 8), ("steps", 1), ("pairs", 1), ("seed", 0)):
        value = getattr(args, name)
        lewm.require(value >= least, f"--{name} is {value}, it must be at least {least}")
    return args


def run_parts(args, out):
    """Run the parts of args.only -> their numbers. Each leaves its picture in the folder `out`."""
    model, cfg, _ = lewm.load_checkpoint(args.checkpoint, lewm.pick_device(args.device))
    fine = cfg.action_dim == 2
    lewm.require(fine, f"{args.checkpoint} has action_dim {cfg.action_dim}, but Push-T has 2")
    states, actions = trajectories(args.episodes, cfg, args.seed)
    pixels = draw(states, cfg.image_size)
    blocks = model.to_blocks(torch.from_numpy(actions).to(model.action_stats.device).flatten(1, 2)).cpu()
    torch.manual_seed(0)                # of the untrained encoder, and of the search for pixels' components
    z = [encode(one, pixels) for one in (model, untrained(model))]
    run = Path(args.checkpoint).parent
    held = Held(model, states, actions, blocks, pixels, *z, args.seed, args.steps, run)
    result = {}
    for name in tqdm([name for name in PARTS if name in args.only.split(",")], desc="parts"):
        result[name], figure = PARTS[name](held)
        figure.savefig(out / f"{name}.png", dpi=110)
    return result


def main(argv):
    args, began = parse_arguments(argv), time.time()
    if args.curves:
        draw_curves(args.curves, args.out)
    elif args.weights:
        lewm.save_checkpoint(args.out, load_official(args.weights, lewm.Config.preset(args.preset)))
    elif args.export:
        save_official(lewm.load_checkpoint(args.export)[0], args.out, args.transformers)
    else:
        out = Path(args.out or "runs/probe")
        out.mkdir(parents=True, exist_ok=True)                  # refused now, not after minutes
        parts = {"ceiling": ceiling(args.pairs, args.seed)} if args.ceiling else run_parts(args, out)
        result = {"command": "python probe.py " + " ".join(argv), "seed": args.seed, "n": args.episodes,
                  **parts, "minutes": (time.time() - began) / 60}
        path = out / ("ceiling.json" if args.ceiling else "probe.json")
        path.write_text(json.dumps(result, indent=1, default=float), encoding="utf-8")
        print("\n".join(line for name, part in parts.items() for line in summary(name, part)))
        print(f"{result['minutes']:.1f} minutes; all numbers and pictures in {out}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, OSError) as error:
        sys.exit(f"probe.py: {' '.join(str(error).split())}")
    except KeyboardInterrupt:
        sys.exit("probe.py: stopped")
