"""The paper's simplest world, complete, with no other file than lewm.py: record, train, plan, baselines.
Two rooms, and a dot that learns from pixels alone to go through the door between them, in about 5 minutes.

    python -m extras.tworoom            # or copy this file beside lewm.py: python tworoom.py

A `render` function draws states batch by batch on the training device, so no pictures are stored.
"""

import argparse
import dataclasses
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import lewm

SIZE = 64           # px, side of a picture; a place is (x, y) in a square of side 1
SPEED = 0.1         # the longest step
NEAR = 0.07         # the goal is reached at this distance
DOOR = 0.12         # half the width of the door

def move(xy, action):
    """Places and actions (n,2) -> next places (n,2), at most SPEED away. The dot slides along walls."""
    length = np.linalg.norm(action, axis=1, keepdims=True)
    step = SPEED * action / np.maximum(1, length)
    for axis in np.eye(2):
        new = np.clip(xy + step * axis, 0.06, 0.94)
        in_the_wall = abs(new[:, :1] - 0.5) < 0.07
        beside_the_door = abs(new[:, 1:] - 0.5) > DOOR
        xy = np.where(in_the_wall & beside_the_door, xy, new)
    return xy

def draw(xy, size):
    """Places, a tensor (n,2) -> pictures uint8 (n,3,size,size): a grey wall with a door, a red dot."""
    x = (torch.arange(size, device=xy.device) + 0.5) / size             # (size,), centres of the pixels
    y = x[:, None]
    wall = 0.6 * ((x - 0.5).abs() < 0.02) * ((y - 0.5).abs() > DOOR + 0.05)
    distance = torch.hypot(x - xy[:, :1, None], y - xy[:, 1:, None])    # (n,size,size), from the dot
    dot = ((0.05 - distance) * size).clamp(0, 1)
    red = (1 - wall).expand_as(dot)
    return (255 * torch.stack([red, red - dot, red - dot], dim=1)).byte()

def pictures(xy):
    """Places, an array (n,2) -> uint8 (n,SIZE,SIZE,3), as lewm.Planner takes them."""
    return draw(torch.tensor(xy), SIZE).permute(0, 2, 3, 1).numpy()

class TwoRoom:
    """The environment: `step` and `render`, as lewm.play needs them."""
    def __init__(self, start, goal):
        self.xy = start
        self.goal = goal
        self.frames = []                                                # all that was rendered

    def step(self, action):
        self.xy = move(self.xy[None], action[None])[0]
        reached = np.linalg.norm(self.xy - self.goal) < NEAR
        return self.xy, float(reached), reached, False, {}

    def render(self):
        self.frames.append(pictures(self.xy[None])[0])
        return self.frames[-1]

def film(path, environments, goals):
    """Write a GIF of the first six episodes, as they were rendered; below each, its goal picture."""
    for env in environments[:6]:
        env.render()                                                    # the end, which nobody looked at
    images = []
    for t in range(max(len(env.frames) for env in environments[:6])):
        row = []
        for env, goal in zip(environments[:6], goals):
            pair = [env.frames[min(t, len(env.frames) - 1)], goal]
            row.append(np.vstack([np.pad(x, ((1, 1), (1, 1), (0, 0)), constant_values=128) for x in pair]))
        image = Image.fromarray(np.hstack(row))
        images.append(image.resize((2 * image.width, 2 * image.height)))
    path.parent.mkdir(parents=True, exist_ok=True)
    images[0].save(path, save_all=True, append_images=images[1:], duration=300, loop=0)

def record(walks, steps, seed):
    """Swaying walks to random places, often through the door -> places and actions (walks,steps,2)."""
    rng = np.random.default_rng(seed)
    xy = np.full((walks, 2), 0.5)                                       # all begin in the door
    aim = xy
    sway = 0
    places = []
    actions = []
    for _ in range(steps):
        to_the_door = rng.random((walks, 1)) < 0.25
        new_aim = np.where(to_the_door, 0.5, rng.uniform(-0.5, 1.5, (walks, 2)))
        aim = np.where(rng.random((walks, 1)) < 0.2, new_aim, aim)
        sway = 0.8 * sway + 0.4 * rng.normal(size=(walks, 2))
        action = np.clip(5 * (aim - xy) + sway, -1, 1)
        places.append(xy)
        actions.append(action)
        xy = move(xy, action)
    return np.stack(places, axis=1), np.stack(actions, axis=1)

def trained(walks, steps, embed_dim=2, seed=0, out=None):
    """Record walks of 50 env steps and train on them -> LeWM. Two dimensions, as this world has no more.
    out: folder of the checkpoint, from which a stopped training goes on."""
    places, actions = record(walks, 50, seed)
    data = {
        "state": np.float32(places).reshape(-1, 2),
        "action": np.float32(actions).reshape(-1, 2),
        "ep_len": np.full(walks, 50),
        "ep_offset": 50 * np.arange(walks)}
    cfg = lewm.Config.preset("smoke", first_lesson_share=0.0, embed_dim=embed_dim, frame_skip=2, seed=seed,
                             patch_size=32, batch_size=64, steps=steps, lr=1e-3, proposal_steps=1500)
    return lewm.train(cfg, data, out=out, resume=True, render=draw)

def main(walks=2000, steps=1200, pairs=100, embed_dim=2, seed=0, out=None):
    """Train, and plan for held-out pairs of start and goal in different rooms -> {policy: bool (pairs,)}."""
    model = trained(walks, steps, embed_dim, seed, out)
    places, actions = record(20 * pairs, 30, seed=1_000_000)            # held out
    far = abs(places[:, 19, 0] - places[:, 29, 0]) > 0.4                # a room is 0.37 wide
    starts = places[far, 19][:pairs]
    goals = places[far, 29][:pairs]
    goal_pictures = pictures(goals)
    recorded = actions[far, 19:29][:pairs]
    random = np.random.default_rng(2).uniform(-1, 1, (pairs, 20, 2))
    cfg = model.cfg
    policies = {
        "LeWM + CEM": {},
        "proposal alone": {"iterations": 0},
        "search alone": lewm.FULL_SEARCH,
        "search, p = 1": {**lewm.FULL_SEARCH, "distance_power": 1.0},
        "random actions": lambda running, _: random[running],
        "doing nothing": lambda running, _: 0 * random[running],
        "recorded actions": lambda running, _: recorded[running]}
    won = {}
    for name, policy in policies.items():
        if isinstance(policy, dict):
            model.cfg = dataclasses.replace(cfg, **policy)
            policy = lewm.Planner(model, goal_pictures)
        environments = [TwoRoom(start, goal) for start, goal in zip(starts, goals)]
        _, won[name] = lewm.play(environments, policy, budget=20)
        if out and len(won) == 1:                                       # the first policy
            film(Path(out, "plan.gif"), environments, goal_pictures)
        low, high = lewm.wilson(won[name].sum(), len(starts))
        print(f"{name:17}{won[name].mean():6.0%}   (95 % interval: {low:.0%} to {high:.0%})", flush=True)
    return won

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Two rooms from pixels, recorded, learned and planned in.")
    parser.add_argument("--walks", type=int, default=2000, help="walks to record; default: 2000")
    parser.add_argument("--steps", type=int, default=1200, help="optimizer steps; default: 1200")
    parser.add_argument("--pairs", type=int, default=100, help="starts and goals to plan for; default: 100")
    parser.add_argument("--embed_dim", type=int, default=2, help="width of an embedding; default: 2")
    parser.add_argument("--seed", type=int, default=0, help="of walks and of training; default: 0")
    parser.add_argument("--out", default="runs/tworoom", help="folder of results; default: runs/tworoom")
    try:
        main(**vars(parser.parse_args()))
    except (ValueError, OSError) as error:
        sys.exit(f"tworoom.py: {error}")
    except KeyboardInterrupt:
        sys.exit("tworoom.py: stopped; the same command goes on")
