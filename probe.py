"""What the latent space of a LeWorldModel knows, and what surprises it: section 5 of arXiv 2603.19312.

    python probe.py assets/nano.pt                             # everything, 1 to 3 minutes
    python probe.py assets/nano.pt --only probes,surprise      # two of the six parts
    python probe.py --curves runs/a runs/b --out curves.png    # compare the course of trainings

Map: Held-out data / Drawing / 1 Probes / 2 Surprise / 3 Geometry / 4 Imagination / 5 Planning /
6 Command line. Letters are those of lewm.py. Each part is a function of a Held and returns (numbers, shown):
numbers for probe.json, and what else its picture shows. The function `draw_...` below it makes the picture.
"""

import argparse
import dataclasses
import json
import math
import os
import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn

import lewm
import pusht

FIRST_SEED = 3_000_000      # seeds of the trajectories begin here; those of trainings are below 1,000,000
CONTEXT = 3                 # frames to imagine from
AHEAD = 8                   # blocks to imagine, one frame for each
MOMENT = 6                  # the frame in which something surprising happens
FILM = 96                   # px, side of a picture in the film of imagination
PLACES = (5, 10, 20, 40, 80, 160)       # px, how far things are displaced
RED = np.array([200, 40, 40])
GREY = np.array(pusht.COLOURS["T"])
TARGETS = ["agent x (px)", "agent y (px)", "T x (px)", "T y (px)", "sin(angle)", "cos(angle)"]
GROUPS = {"agent": [0, 1], "T": [2, 3], "angle": [4, 5]}        # columns of TARGETS, and of a state
STATISTICS = ("picture_mean", "colour_map", "action_mean", "action_std", "action_low", "action_high")

# ======== Held-out data ===============================================================================

@dataclasses.dataclass
class Held:
    """Held-out trajectories of T frames, `frame_skip` env steps apart, and what the model makes of them."""
    model: lewm.LeWM
    states: np.ndarray              # float32 (E,T,7)
    actions: np.ndarray             # raw (E,T-1,frame_skip,2)
    blocks: torch.Tensor            # the same actions, z-scored (E,T-1,A)
    pixels: torch.Tensor            # uint8 (E,T,3,S,S)
    z: torch.Tensor                 # (E,T,D)
    untrained: torch.Tensor         # (E,T,D), embeddings by an encoder that was never trained
    seed: int = 0                   # seed of the trajectories and of all random draws
    steps: int = 1500               # optimizer steps of each MLP probe

def held_out(model, episodes=240, seed=0, steps=1500):
    """Record trajectories that no training can see, and encode them -> Held."""
    cfg = model.cfg
    lewm.require(cfg.action_dim == 2, f"action_dim is {cfg.action_dim}: Push-T, which is probed, has 2")
    states, actions = trajectories(episodes, cfg, seed)
    raw = torch.from_numpy(actions).flatten(1, 2)               # (E,(T-1)*frame_skip,2)
    blocks = model.to_blocks(raw.to(model.device)).cpu()
    pixels = render(states, cfg.image_size)
    torch.manual_seed(0)                    # for the untrained weights, and for the components of raw pixels
    z = encode(model, pixels)
    return Held(model, states, actions, blocks, pixels, z, encode(untrained(model), pixels), seed, steps)

def trajectories(episodes, cfg, seed=0):
    """A part of each episode, T = CONTEXT + AHEAD frames: states float32 (E,T,7), raw actions
    (E,T-1,frame_skip,2)."""
    skip = cfg.frame_skip
    span = skip * (CONTEXT + AHEAD - 1)
    data = pusht.collect(2 * episodes, FIRST_SEED + seed)       # twice as many, as some are too short
    chosen = np.flatnonzero(data["ep_len"] > span)[:episodes]
    lewm.require(len(chosen) == episodes, f"frame_skip {skip} is too high: few episodes have {span} steps")
    begin = np.random.default_rng(seed).integers(data["ep_len"][chosen] - span)
    rows = (data["ep_offset"][chosen] + begin)[:, None] + np.arange(span + 1)   # (E,span+1)
    actions = data["action"][rows[:, :-1]].reshape(episodes, -1, skip, 2)
    return data["state"][rows[:, ::skip]], actions

def untrained(model):
    """A new LeWM with the Config and the data statistics of a trained one, to compare it with."""
    new = lewm.LeWM(model.cfg)
    new.load_state_dict({name: getattr(model, name) for name in STATISTICS}, strict=False)
    return new.to(model.device).eval()

def render(states, size, t_colour=GREY):
    """pusht.render for any leading dimensions, in batches of 256: states (...,7) -> uint8 (...,3,S,S)."""
    rows = torch.as_tensor(states).flatten(0, -2)
    pixels = [pusht.render(batch, size, t_colour) for batch in rows.split(256)]
    return torch.cat(pixels).view(*states.shape[:-1], 3, size, size)

@torch.no_grad()
def encode(model, pixels):
    """pixels (...,3,S,S) -> embeddings (...,D) on the CPU, 128 pictures at a time."""
    batches = pixels.flatten(0, -4).split(128)
    z = torch.cat([model.encode(batch.to(model.device)).cpu() for batch in batches])
    return z.view(*pixels.shape[:-3], -1)

@torch.no_grad()
def imagine(model, z, blocks):
    """Open loop: context z (E,T0,D), blocks (E,T-1,A) -> (E,T,D): the context, then predictions alone."""
    T0 = z.shape[1]
    begin = max(0, T0 - model.cfg.history)                      # the predictor sees no frame before this one
    seen = z[:, begin:].to(model.device)
    plans = blocks[:, None, begin:].to(model.device)            # (E,1,n,A), one plan each
    predicted = model.rollout(seen, plans)[:, 0].cpu()          # (E,n,D), from frame begin + 1 on
    return torch.cat([z, predicted[:, T0 - begin - 1:]], dim=1)

def played(starts, actions):
    """Play raw actions (E,n,frame_skip,2) from states (E,7) -> states after each block, float32 (E,n,7)."""
    paths = []
    skip = actions.shape[2]
    for env, blocks in zip(pusht.environments(starts, starts, 8), actions):
        states = [env.step(action)[0] for action in blocks.reshape(-1, 2)]
        paths.append(states[skip - 1::skip])
    return np.float32(paths)

def interval(x):
    """x (n,...) -> (...,3): the mean over n, and the two ends of its 95 % interval."""
    mean = x.mean(0).double()
    half = 1.96 * x.std(0).double() / math.sqrt(len(x))
    return torch.stack([mean, mean - half, mean + half], dim=-1)

# ======== Drawing =====================================================================================
# Figures are made without pyplot and its backends, so these functions work in a notebook as in a terminal.

def canvas(width, height, rows, **options):
    """-> a figure of so many inches, and its axes by their titles in `rows`. A title that appears several
    times makes one wide panel."""
    from matplotlib.figure import Figure                        # here, so that numbers need no matplotlib
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplot_mosaic(rows, **options)
    for title, axis in axes.items():
        axis.set_title(title, fontsize=10)
        axis.set_prop_cycle(color=["black", "tab:red", "tab:blue", "tab:gray"], ls=["-", "--", ":", "-."])
    return figure, axes

def draw_lines(axis, x, lines, **labels):
    """lines {name: n numbers, or n rows (mean, low, high)}. labels: what Axes.set takes, such as xlabel."""
    for name, y in lines.items():
        columns = np.asarray(y).T
        if columns.ndim == 1:
            axis.plot(x, y, label=name, marker=".")
        else:
            mean, low, high = columns
            line, = axis.plot(x, mean, label=name, marker=".")
            axis.fill_between(x, low, high, color=line.get_color(), alpha=0.2)
    axis.set(**labels)
    if len(lines) > 1:
        axis.legend(fontsize=8)

def draw_films(axis, films, titles):
    """films {name: pictures (n,3,S,S)}, one below the other. titles: n texts, one over each column."""
    rows = [film.permute(2, 0, 3, 1).flatten(1, 2) for film in films.values()]  # (S,n*S,3) each
    axis.imshow(torch.cat(rows).numpy(), extent=(0, len(titles), len(films), 0))
    axis.xaxis.tick_top()
    axis.set_xticks(np.arange(len(titles)) + 0.5, titles, fontsize=8)
    axis.set_yticks(np.arange(len(films)) + 0.5, films, fontsize=8)

# ======== 1 Probes ====================================================================================
# What can be read from an embedding with a linear map, and what only with an MLP? Raw pixels and an untrained
# encoder are the baselines. One half of the trajectories fits the probes, the other half judges them.

def to_fit(x):
    """x (E,T,...) -> all frames of the first half of the trajectories (n,...)."""
    return x[:len(x) // 2].flatten(0, 1)

def to_judge(x):
    """x (E,T,...) -> the second half of the trajectories."""
    return x[len(x) // 2:]

def standardised(x):
    """x (n,D) -> x with mean 0 and std 1 in each column, and that mean and std (D,)."""
    mean = x.mean(0)
    std = x.std(0).clamp(min=1e-6)
    return (x - mean) / std, mean, std

def fit_linear(x, y, ridge=1e-3):
    """Ridge regression on standardised embeddings, x (n,D), y (n,k) -> a function (m,D) -> (m,k)."""
    x, mean, std = standardised(x.double())
    y_mean = y.double().mean(0)
    penalty = ridge * len(x) * torch.eye(x.shape[1]).double()
    weights = torch.linalg.solve(x.T @ x + penalty, x.T @ (y - y_mean))         # (D,k)
    def read(new):
        return (y_mean + (new - mean) / std @ weights).float()
    return read

def fit_mlp(x, y, steps=1500, width=256, batch=256):
    """An MLP with two hidden layers, on standardised numbers, x (n,D), y (n,k) -> a function like that."""
    x, mean, std = standardised(x)
    y, y_mean, y_std = standardised(y)
    with torch.random.fork_rng(devices=[]):                     # leaves the random numbers of others alone
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Linear(x.shape[1], width), nn.GELU(),
            nn.Linear(width, width), nn.GELU(),
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
    def read(new):
        return y_mean + net((new - mean) / std) * y_std
    return read

def probe_targets(states):
    """states (...,7) -> the numbers that probes read, TARGETS (...,6)."""
    states = torch.as_tensor(states).float()
    angle = states[..., 4:5]
    return torch.cat([states[..., :4], angle.sin(), angle.cos()], dim=-1)

def angle_of(targets):
    """TARGETS (...,6) -> the angle (...), rad."""
    return torch.atan2(targets[..., 4], targets[..., 5])

def pearson(a, b):
    """a, b (n,k) -> Pearson's r of each column, float64 (k,); 0 for a column that is constant."""
    a = a.double() - a.double().mean(0)
    b = b.double() - b.double().mean(0)
    return nn.functional.cosine_similarity(a, b, dim=0)

def score(guess, truth):
    """guess, truth (n,6) -> {group: {"r": Pearson's r, "error": the median error in px or degrees}}."""
    r = pearson(guess, truth)                                   # (6,)
    result = {}
    for group, columns in GROUPS.items():
        error = (guess - truth)[:, columns].norm(dim=1)         # (n,), px
        if group == "angle":
            turn = angle_of(guess) - angle_of(truth)
            error = torch.atan2(turn.sin(), turn.cos()).abs().rad2deg()
        result[group] = {"r": r[columns].mean().item(), "error": error.median().item()}
    return result

def pixel_components(pixels, count):
    """pixels (E,T,3,S,S) -> their first principal components (E,T,count), fitted as the probes are."""
    x = pixels.flatten(2) / 255
    fitted = to_fit(x)
    _, _, axes = torch.pca_lowrank(fitted, q=min(count, len(fitted) // 2), niter=3)
    return (x - fitted.mean(0)) @ axes

def probes(held):
    """Both probes on three kinds of embeddings of the same pictures."""
    truth = probe_targets(held.states)                          # (E,T,6)
    embeddings = {
        "LeWM": held.z,
        "untrained encoder": held.untrained,
        "raw pixels": pixel_components(held.pixels, held.z.shape[2])}
    numbers = {}
    shown = {"truth": to_judge(truth)}
    for name, x in embeddings.items():
        readers = {
            "linear": fit_linear(to_fit(x), to_fit(truth)),
            "MLP": fit_mlp(to_fit(x), to_fit(truth), held.steps)}
        for kind, read in readers.items():
            guess = read(to_judge(x))                           # (E/2,T,6)
            numbers[f"{name}, {kind}"] = score(guess.flatten(0, 1), to_judge(truth).flatten(0, 1))
            shown[f"{name}, {kind}"] = guess
    return numbers, shown

def draw_probes(path, numbers, shown):
    figure, axes = canvas(10, 7, [TARGETS[::2], TARGETS[1::2]])
    for i, target in enumerate(TARGETS):
        axis = axes[target]
        true = shown["truth"][..., i].flatten()
        for kind, colour in {"linear": "tab:gray", "MLP": "black"}.items():
            guess = shown[f"LeWM, {kind}"][..., i].flatten()
            label = f"{kind}, r = {pearson(true, guess):.3f}"
            axis.scatter(true, guess, s=3, alpha=0.5, color=colour, label=label)
        axis.axline([true.mean()] * 2, slope=1, color="tab:red", lw=1)
        axis.set(xlabel="true", ylabel="read from the embedding")
        axis.legend(fontsize=8, markerscale=3)
    figure.savefig(path, dpi=110)

# ======== 2 Surprise ==================================================================================
# How wrong is a prediction when the T suddenly turns red, or when agent and T are suddenly somewhere else?

def displaced(states, what, amount, seed=0):
    """states (E,7) with "agent px" or "T px" moved in a random direction, or with the T turned either way by
    "T degrees" about its centre of gravity."""
    rng = np.random.default_rng(seed)
    states = states.astype(np.float64)
    if what == "T degrees":
        turn = np.radians(amount) * rng.choice((-1, 1), len(states))
        spin = np.exp(1j * states[:, 4])
        shift = pusht.centre(0, spin) - pusht.centre(0, spin * np.exp(1j * turn))       # complex, x + iy
        states[:, 2:5] += np.stack([shift.real, shift.imag, turn], axis=1)
        return states
    columns = GROUPS[what.removesuffix(" px")]
    angle = rng.uniform(0, 2 * np.pi, (64, len(states)))                        # 64 directions to choose from
    moved = np.repeat(states[None], 64, axis=0)                                 # (64,E,7)
    moved[..., columns] += amount * np.stack([np.cos(angle), np.sin(angle)], axis=-1)
    # the best direction ends at least 60 px from the border, and keeps the agent off the T
    off_centre = np.abs(moved[..., columns] - pusht.BOARD / 2).max(-1)          # (64,E)
    badness = off_centre.clip(min=pusht.BOARD / 2 - 60) + 0.1 * ~pusht.clear(moved)
    return moved[badness.argmin(0), np.arange(len(states))]

def teleported(states, actions, distance, seed):
    """Agent and T are moved in frame MOMENT, by `distance` px, or anywhere if None; actions stay the same."""
    if distance is None:
        rng = np.random.default_rng(seed)
        moved = np.stack([pusht.random_state(rng) for _ in states])             # (E,7)
    else:
        moved = displaced(states[:, MOMENT], "T px", distance, seed)
        moved = displaced(moved, "agent px", distance, seed + 1)
    result = states.copy()
    result[:, MOMENT] = moved
    result[:, MOMENT + 1:] = played(moved, actions[:, MOMENT:])
    return result

def surprise(model, z, blocks):
    """z (E,T,D), blocks (E,T-1,A) -> (E,T-1): squared error of predicting each frame from those before it."""
    errors = []
    for t in range(1, z.shape[1]):
        guess = imagine(model, z[:, :t], blocks[:, :t])[:, -1]  # (E,D)
        errors.append((guess - z[:, t]).square().sum(-1))
    return torch.stack(errors, dim=1)

def watch(held, states, t_colour=GREY):
    """states (n,T,7) of the first n trajectories, disturbed from frame MOMENT on -> 6 pictures of the first
    one, and surprise (n,T-1)."""
    n = len(states)
    later = render(states[:, MOMENT:], held.model.cfg.image_size, t_colour)
    pixels = torch.cat([held.pixels[:n, :MOMENT], later], dim=1)
    curves = surprise(held.model, encode(held.model, pixels), held.blocks[:n])
    return pixels[0, MOMENT - 3:MOMENT + 3], curves

def multiple(curves, clean):
    """Surprise (n,T-1) at disturbed films in frame MOMENT, divided by the mean of that at the same films when
    they are clean, in (E,T-1): (mean, low, high)."""
    usual = clean[:len(curves), MOMENT - 1].mean()
    return interval(curves[:, MOMENT - 1] / usual).tolist()

def surprises(held):
    """Surprise at a T that turns red and at a teleport, in multiples of that at clean films; and at smaller
    changes of place and colour, in 60 films."""
    states = held.states
    anywhere = teleported(states, held.actions, None, held.seed)
    films = {}
    curves = {}
    films["clean"], curves["clean"] = watch(held, states)
    films["the T turns red"], curves["the T turns red"] = watch(held, states, RED)
    films["teleport"], curves["teleport"] = watch(held, anywhere)
    clean = curves["clean"]
    numbers = {name: multiple(curves[name], clean) for name in ("the T turns red", "teleport")}
    numbers["by_teleport_px"] = {}
    numbers["by_colour_distance"] = {}
    for distance in PLACES:
        moved = teleported(states[:60], held.actions[:60], distance, held.seed)
        _, curve = watch(held, moved)
        numbers["by_teleport_px"][distance] = multiple(curve, clean)
    for share in (0.25, 0.5, 0.75, 1.0):                        # of the way from grey to red
        change = share * (RED - GREY)
        _, curve = watch(held, states[:60], GREY + change)
        numbers["by_colour_distance"][round(np.linalg.norm(change))] = multiple(curve, clean)
    return numbers, {"films": films, "curves": curves}

def draw_surprises(path, numbers, shown):
    panels = {"smaller teleports": ("by_teleport_px", "agent and T moved by (px)"),
              "smaller changes of colour": ("by_colour_distance", "RGB distance from grey")}
    figure, axes = canvas(10, 7.5, [["films"] * 4, ["surprise", "surprise", *panels]])
    titles = [f"frame {t}" for t in range(MOMENT - 3, MOMENT + 3)]
    draw_films(axes["films"], shown["films"], titles)
    lines = {name: interval(curve) for name, curve in shown["curves"].items()}
    draw_lines(axes["surprise"], range(1, CONTEXT + AHEAD), lines, xlabel="frame", ylabel="squared error")
    for title, (key, xlabel) in panels.items():
        labels = dict(xlabel=xlabel, ylabel="surprise, in multiples of clean films'", ylim=(0, None))
        draw_lines(axes[title], [*numbers[key]], {title: [*numbers[key].values()]}, **labels)
    figure.savefig(path, dpi=110)

# ======== 3 Geometry ==================================================================================
# SIGReg asks for a flat spectrum and Gaussian quantiles. Two things come without being asked for: positions
# on the board form a two-dimensional sheet, and latent paths become straighter.

GRIDS = {"agent": ((256, 256), 196), "T": ((288, 225), 100)}    # middle and half width of a grid, px

def sheet(model, what):
    """Agent or T on a grid of 14 x 14 places, the other one at rest -> places (196,2), the two principal
    components of their embeddings (196,2), and the share of the variance that these hold."""
    middle, reach = GRIDS[what]
    line = np.linspace(-reach, reach, 14)
    places = np.stack(np.meshgrid(line, line), axis=-1).reshape(-1, 2) + middle
    states = np.tile(np.float32([60, 60, 288, 225, 0.8, 0, 0]), (len(places), 1))
    states[:, GROUPS[what]] = places
    z = encode(model, render(states, model.cfg.image_size))             # (196,D)
    z = nn.functional.pad(z - z.mean(0), (0, 1))                        # a column of zeros more: D may be 1
    u, s, _ = torch.linalg.svd(z, full_matrices=False)
    share = s[:2].square().sum() / s.square().sum()
    return places, (u * s)[:, :2], share.item()

def geometry(held):
    """Straightness of paths, sheets of positions, spectrum, quantiles of random projections. The spectrum is
    the variances along principal components. A coordinate's variance is a weighted mean of these, so the
    smallest std of a coordinate may be near 1 where the last components are small."""
    z = held.z.flatten(0, 1)                                            # (n,D)
    numbers = {
        "dimensions": z.shape[1],
        "effective_rank": lewm.effective_rank(z),
        "smallest_std": z.std(0).min().item(),
        "straightness": lewm.straightness(held.z),
        "straightness, untrained encoder": lewm.straightness(held.untrained),
        "straightness, raw pixels": lewm.straightness(held.pixels.flatten(2).float())}
    sheets = {}
    for what in GRIDS:
        *sheets[what], share = sheet(held.model, what)
        numbers[f"{what} on a grid, share of 2 components"] = share
    spectrum = torch.linalg.svdvals(z - z.mean(0)).square() / len(z)
    directions = torch.randn(z.shape[1], 8, generator=torch.Generator().manual_seed(0))
    projections = z @ nn.functional.normalize(directions, dim=0)        # (n,8)
    return numbers, {"sheets": sheets, "spectrum": spectrum, "projections": projections}

def draw_geometry(path, numbers, shown):
    figure, axes = canvas(10.5, 6.5, [
        ["agent on a grid: its x (px)", "agent on a grid: its y (px)", "spectrum"],
        ["T on a grid: its x (px)", "T on a grid: its y (px)", "8 random projections"]])
    for what, (places, components) in shown["sheets"].items():
        for name, colour in zip("xy", places.T):
            axis = axes[f"{what} on a grid: its {name} (px)"]
            points = axis.scatter(*components.T, c=colour, s=14)
            axis.set(xlabel="component 1", ylabel="component 2")
            figure.colorbar(points, ax=axis)
    spectrum = shown["spectrum"]
    lines = {"embeddings": spectrum, "N(0, I)": torch.ones(len(spectrum))}
    labels = dict(xlabel="principal component", ylabel="variance along the component", yscale="log")
    draw_lines(axes["spectrum"], range(1, 1 + len(spectrum)), lines, **labels)
    levels = torch.linspace(0.01, 0.99, 99)
    gaussian = torch.special.ndtri(levels)
    quantiles = shown["projections"].quantile(levels, dim=0)            # (99,8)
    axis = axes["8 random projections"]
    axis.plot(gaussian, quantiles, color="black", ls="-", lw=0.7)
    axis.plot(gaussian, gaussian, color="tab:red", ls="--")
    axis.set(xlabel="quantiles of N(0, 1)", ylabel="quantiles of the embeddings")
    figure.savefig(path, dpi=110)

# ======== 4 Imagination ===============================================================================
# How far ahead can the model see with its eyes closed, and does it use the actions?

UNITS = {"latent error": "squared per number", "agent error": "px", "T error": "px", "angle error": "degrees"}

def imagination(held):
    """Median errors of open-loop imagination by blocks ahead: with the true actions, and with another
    trajectory's; beside copying the last frame, and beside the true embedding, where only reading it errs."""
    truth = probe_targets(held.states)                          # (E,T,6)
    read = fit_mlp(to_fit(held.z), to_fit(truth), held.steps)
    truth = to_judge(truth)
    z = to_judge(held.z)                                        # (n,T,D)
    blocks = to_judge(held.blocks)
    context = z[:, :CONTEXT]
    embeddings = {
        "imagined": imagine(held.model, context, blocks),
        "with shuffled actions": imagine(held.model, context, blocks.roll(1, 0)),
        "last frame copied": context[:, -1:].expand_as(z),
        "true embedding": z}
    numbers = {}
    for name, x in embeddings.items():
        errors = (x - z).square().mean((0, 2))                  # (T,)
        scores = [score(read(x[:, t]), truth[:, t]) for t in range(z.shape[1])]
        numbers[name] = {"latent error": errors[CONTEXT:].tolist()}
        for group in GROUPS:
            numbers[name][f"{group} error"] = [row[group]["error"] for row in scores[CONTEXT:]]
    readings = {"true": truth[0], "read from\nits embedding": read(z[0])}
    readings["imagined"] = read(embeddings["imagined"][0])
    return numbers, readings

def draw_imagination(path, numbers, readings):
    """The films are drawn from positions: the true ones, and those that an MLP reads from embeddings."""
    title = "what happens, and what the model imagines after three frames of context"
    figure, axes = canvas(11, 6.5, [[title] * 4, [*UNITS]], height_ratios=(1.25, 1))
    films = {}
    for name, targets in readings.items():
        states = torch.cat([targets[:, :4], angle_of(targets)[:, None]], dim=1)     # velocity is not drawn
        films[name] = render(states, FILM)
    ahead = range(1, AHEAD + 1)
    draw_films(axes[title], films, ["context"] * CONTEXT + [f"+{t}" for t in ahead])
    for name, unit in UNITS.items():
        lines = {kind: row[name] for kind, row in numbers.items()}
        draw_lines(axes[name], ahead, lines, xlabel="blocks ahead", ylabel=unit)
        if name != "latent error":
            axes[name].get_legend().remove()                    # one is enough, and it covers lines
    figure.savefig(path, dpi=110)

# ======== 5 Planning ==================================================================================
# Does the planner's cost grow with the distance in the world? Does what a plan promises come true?

RANGES = {"agent px": PLACES, "T px": PLACES, "T degrees": (5, 10, 20, 45, 90, 180)}

def cost(model, z, z_goal):
    """The planner's cost (n,) of ending at z (n,D) when the goal is z_goal (n,D)."""
    scale = lewm.latent_scale(model, model.cfg.distance_power).cpu()
    return ((z - z_goal) @ scale).square().sum(-1)

def landscape(held):
    """The planner's cost after a displacement, divided by that between unrelated states: (mean, low, high)
    for each amount."""
    states = held.states[:, CONTEXT]
    z = held.z[:, CONTEXT]
    unrelated = cost(held.model, z, z.roll(1, 0)).mean()
    numbers = {}
    for what, amounts in RANGES.items():
        numbers[what] = {}
        for amount in amounts:
            moved = displaced(states, what, amount, held.seed)
            possible = pusht.clear(moved)                       # a T that turns may come to lie on the agent
            z_moved = encode(held.model, render(moved[possible], held.model.cfg.image_size))
            costs = cost(held.model, z_moved, z[possible])      # (n,)
            numbers[what][amount] = interval(costs / unrelated).tolist()
    return numbers, None

def draw_landscape(path, numbers, _):
    figure, axes = canvas(9, 3, [[*numbers]])
    for what, rows in numbers.items():
        labels = dict(xlabel="displacement", ylabel="cost / cost of unrelated states", ylim=(0, 1.2))
        draw_lines(axes[what], [*rows], {what: [*rows.values()]}, **labels)
    figure.savefig(path, dpi=110)

def beliefs(held):
    """Squared latent distance from the end of a plan to the goal: as imagined when it was made, and as it
    came true when it was played without looking. (mean, low, high) over 40 pairs, by iterations of CEM."""
    model = held.model
    cfg = model.cfg
    pairs = min(40, len(held.z))
    starts, goals, _ = pusht.held_out_pairs(pairs, "dev", held.seed, cfg.goal_distance)
    z = encode(model, render(starts, cfg.image_size)).to(model.device)          # (E,D)
    z_goal = encode(model, render(goals, cfg.image_size)).to(model.device)
    numbers = {"as imagined": {}, "as it came true": {}}
    for iterations in (1, 2, 4, 8, 16, 32):
        search = {**lewm.FULL_SEARCH, "iterations": iterations}                 # without a proposal
        plans = lewm.cem(model, z, z_goal, **search)                            # (E,H,A)
        actions = model.to_actions(plans).unflatten(1, (-1, cfg.frame_skip))
        states = played(starts, actions.cpu().numpy())                          # (E,H,7)
        ends = {"as imagined": imagine(model, z[:, None].cpu(), plans)[:, -1],
                "as it came true": encode(model, render(states[:, -1], cfg.image_size))}
        for name, end in ends.items():
            numbers[name][iterations] = interval((end - z_goal.cpu()).square().sum(-1)).tolist()
    return numbers, None

def draw_beliefs(path, numbers, _):
    title = "How close to its goal does a plan end?"
    figure, axes = canvas(6.5, 4, [[title]])
    counts = [*numbers["as imagined"]]
    lines = {name: [*rows.values()] for name, rows in numbers.items()}
    labels = dict(xlabel="iterations of CEM", ylabel="squared latent distance to the goal")
    draw_lines(axes[title], counts, lines, xscale="log", ylim=(0, None), **labels)
    axes[title].set_xticks(counts, counts)
    axes[title].minorticks_off()
    figure.savefig(path, dpi=110)

# ======== 6 Command line ==============================================================================

PARTS = {
    "probes": (probes, draw_probes), "surprise": (surprises, draw_surprises),
    "geometry": (geometry, draw_geometry), "imagination": (imagination, draw_imagination),
    "landscape": (landscape, draw_landscape), "beliefs": (beliefs, draw_beliefs)}

def summary(name, numbers):
    """Nested numbers as lines of text, one for each dictionary that holds numbers."""
    lines = []
    cells = []
    for key, value in numbers.items():
        if isinstance(value, dict):
            lines += summary(f"{name}, {key}", value)
        else:
            cells.append(f"{key} " + " ".join(f"{number:.3g}" for number in np.ravel(value)))
    if cells:
        lines.insert(0, f"{name}: {', '.join(cells)}")
    return lines

def parse_arguments(argv):
    parser = argparse.ArgumentParser(description="What a LeWorldModel knows.", allow_abbrev=False)
    parser.error = lambda text: sys.exit(f"probe.py: {text}; python probe.py --help lists all flags")
    flag = parser.add_argument
    flag("checkpoint", metavar="CKPT", nargs="?", help="a checkpoint of lewm.py, such as assets/nano.pt")
    flag("--only", default=",".join(PARTS), metavar="PARTS", help="parts to do; default: %(default)s")
    flag("--episodes", type=int, default=240, help="trajectories, half of them to fit probes; default: 240")
    flag("--steps", type=int, default=1500, help="optimizer steps of an MLP probe; default: 1500")
    flag("--seed", type=int, default=0, help="which held-out trajectories; default: 0")
    flag("--device", help="cpu, cuda, cuda:1, mps; default: the best there is")
    flag("--curves", metavar="RUN", nargs="+", help="instead: draw metrics.csv of one or more trainings")
    flag("--out", help="folder of the results; default: runs/probe. With --curves: the picture")
    given = parser.parse_args(argv)
    if bool(given.checkpoint) == bool(given.curves) or (given.curves and not given.out):
        parser.error("say which checkpoint, or --curves RUN --out FILE.png")
    for name in given.only.split(","):
        lewm.require(name in PARTS, f"--only {name}: the parts are {','.join(PARTS)}")
    for name, least in {"episodes": 8, "steps": 1, "seed": 0}.items():
        value = getattr(given, name)
        lewm.require(least <= value < 1_000_000, f"--{name} is {value}: not from {least} to below 1000000")
    return given

def main(argv):
    given = parse_arguments(argv)
    os.environ.pop("MPLBACKEND", None)                  # a notebook sets one that may be missing here
    if given.curves:
        pusht.draw_curves(given.curves, given.out)
        print(f"{given.out} is written")
        return
    model, _ = lewm.load_checkpoint(given.checkpoint, lewm.pick_device(given.device))
    out = Path(given.out or "runs/probe").expanduser()
    out.mkdir(parents=True, exist_ok=True)              # refused now, not after minutes
    held = held_out(model, given.episodes, given.seed, given.steps)
    result = {"command": "python probe.py " + " ".join(argv), "seed": given.seed, "n": given.episodes}
    for name in given.only.split(","):
        measure, draw = PARTS[name]
        result[name], shown = measure(held)
        print("\n".join(summary(name, result[name])), flush=True)
        with lewm.replacing(out / "probe.json") as partial:
            partial.write_text(json.dumps(result, indent=1, default=float), encoding="utf-8")
        lewm.draw(draw, out / f"{name}.png", result[name], shown)
    print(f"all numbers and pictures in {out}")

if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"probe.py: {' '.join(str(error).split())}")
    except KeyboardInterrupt:
        sys.exit("probe.py: stopped")
