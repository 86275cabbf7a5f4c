"""Push-T: a disc pushes a T-shaped block about a 512 x 512 board. The world, its pictures and its data in one file.

    python pusht.py --show push.gif                                # look at one episode
    python pusht.py --episodes 2000 --seed 0 --out data/train      # 250,000 steps, under a minute on 2 cores

    from pusht import PushT, render, success, collect
    env = PushT(); state, info = env.reset(seed=0); state, reward, terminated, truncated, info = env.step([0.2, 0.0])

Map of this file: The world / Pictures / The scripted policy / Data sets / Command line.

State (7 numbers): agent x, y (px), block x, y (px), block angle (rad, in [0, 2 pi)), agent velocity x, y (px/s). The y axis points down.
Action (2 numbers in [-1, 1]): where the agent is told to go, in units of 100 px from where it is; held for one step of 0.1 s.

The dynamics are those of the Push-T of Diffusion Policy (Chi et al., arXiv 2303.04137) with the relative actions of DINO-WM
(Zhou et al., arXiv 2411.04983), as used by LeWorldModel (arXiv 2603.19312). One deviation: see `PushT.step`.
"""

import argparse
import math
import multiprocessing
import os
import sys
import tempfile
import time
import zipfile
from functools import partial
from pathlib import Path

import numpy as np
import pymunk
import torch
from tqdm import tqdm

BOARD = 512                        # px, side of the board
WALL_LOW, WALL_HIGH = 5, 506       # px, the walls' centre lines
AGENT_RADIUS = 15                  # px
ACTION_SCALE = 100                 # px of commanded displacement for an action of 1
PHYSICS_DT, SUBSTEPS = 0.01, 10    # s, and physics steps in one env step: control runs at 10 Hz
STIFFNESS, DAMPING = 100, 20       # 1/s^2 and 1/s, of the controller that moves the agent (critically damped)
BAR = (-60, 0, 60, 30)             # px, left, top, right, bottom in the block's own frame (scale 30)
STEM = (-15, 30, 15, 120)
CENTRE_OF_GRAVITY = (0, 45)        # px, in the block's own frame


# ------------------------------------------------------------------------------------------------------------------
# The world. pymunk does the physics. Space damping 0 means that the block stops dead when it is not pushed, so the
# seven numbers of the state say all that lasts. Setting another state starts a fresh space, so that what follows depends on
# the state and the actions alone.

def _corners(box):
    left, top, right, bottom = box
    return [(left, top), (right, top), (right, bottom), (left, bottom)]


def distances(states, goals):
    """How far states are from goals (both (N, 7)): agent (px), block (px) and block angle (degrees, 0 to 180), each (N,)."""
    states, goals = np.asarray(states, np.float64), np.asarray(goals, np.float64)
    agent, block = (np.linalg.norm(states[..., i:i + 2] - goals[..., i:i + 2], axis=-1) for i in (0, 2))
    turn = (states[..., 4] - goals[..., 4] + np.pi) % (2 * np.pi) - np.pi
    return agent, block, np.degrees(np.abs(turn))


def success(states, goals, object_only=False):
    """Which states reach their goal: ||(agent xy, block xy) - goal|| < 20 px and block angle within pi/9 (20 degrees).

    states, goals: (N, 7), or anything that broadcasts to it. Returns bool (N,).
    `object_only` leaves the agent out of the distance: the easier rule that some reports use.
    """
    agent, block, turn = distances(states, goals)
    return (np.hypot(0 if object_only else agent, block) < 20) & (turn < 20)


class PushT:
    """The environment, with Gymnasium's signatures and without the package.

    `reset` takes options={"state": (7,), "goal": (7,)}; what is not given is drawn at random from `seed`.
    There is no time limit: `truncated` is always False, and the caller's budget ends an episode.
    """

    def __init__(self):
        self._rng = np.random.default_rng()
        self.goal = None
        self._build(np.array([256.0, 400, 256, 300, 0, 0, 0]))

    @property
    def state(self):
        """float64 (7,): agent x, y, block x, y, block angle, agent vx, vy. Setting what was read changes nothing."""
        return self._state.copy()

    @state.setter
    def state(self, state):
        state = _checked_state(state, "state")
        if not np.array_equal(state, self._state):
            self._build(state)

    def _build(self, state):
        space = self._space = pymunk.Space()
        space.damping = 0
        corners = [(WALL_LOW, WALL_HIGH), (WALL_LOW, WALL_LOW), (WALL_HIGH, WALL_LOW), (WALL_HIGH, WALL_HIGH)]
        for a, b in zip(corners, corners[1:] + corners[:1]):
            space.add(pymunk.Segment(space.static_body, a, b, 2))

        self._agent = pymunk.Body(body_type=pymunk.Body.KINEMATIC)
        self._agent.position = tuple(state[:2])
        self._agent.velocity = tuple(state[5:])
        space.add(self._agent, pymunk.Circle(self._agent, AGENT_RADIUS))

        # The reference adds the bar's moment twice instead of the bar's and the stem's, and sets friction on the body,
        # where pymunk ignores it. Both are part of the world that published numbers come from, so they stay.
        moment = 2 * pymunk.moment_for_poly(1, _corners(BAR))
        self._block = pymunk.Body(1, moment)
        self._block.center_of_gravity = CENTRE_OF_GRAVITY
        self._block.angle = state[4]                    # before the position: pymunk turns about the centre of gravity
        self._block.position = tuple(state[2:4])
        space.add(self._block, pymunk.Poly(self._block, _corners(BAR)), pymunk.Poly(self._block, _corners(STEM)))
        space.reindex_shapes_for_body(self._block)
        self._state = state

    def reset(self, seed=None, options=None):
        """Returns (state (7,), info). Without options: agent and block at random and apart, and a random goal."""
        options = options or {}
        unknown = set(options) - {"state", "goal"}
        if unknown:
            raise ValueError(f"reset(options) knows 'state' and 'goal', not {sorted(unknown)}")
        if seed is not None:
            self._rng = np.random.default_rng(seed)
        state, goal = options.get("state"), options.get("goal")
        self._build(random_state(self._rng) if state is None else _checked_state(state, "state"))
        self.goal = _checked_state(random_state(self._rng) if goal is None else goal, "goal")
        return self.state, self._info()

    def step(self, action):
        """One env step (0.1 s). action (2,) in [-1, 1], clipped. Returns (state, reward, terminated, truncated, info).

        reward is 1.0 and terminated True where `success(state, goal)`.
        The commanded target is kept on the board, so that the agent cannot leave it. The reference lets it: this is the
        one deviation, and it changes nothing as long as targets lie on the board.
        """
        action = np.asarray(action, np.float64)
        if action.shape != (2,) or not np.isfinite(action).all():
            raise ValueError(f"action must be 2 finite numbers in [-1, 1], got {action!r}")
        action = action.clip(-1, 1)
        agent, space = self._agent, self._space
        x, y = agent.position
        vx, vy = agent.velocity
        target_x = min(max(x + ACTION_SCALE * float(action[0]), 0), BOARD)
        target_y = min(max(y + ACTION_SCALE * float(action[1]), 0), BOARD)
        for _ in range(SUBSTEPS):
            vx += (STIFFNESS * (target_x - x) - DAMPING * vx) * PHYSICS_DT
            vy += (STIFFNESS * (target_y - y) - DAMPING * vy) * PHYSICS_DT
            agent.velocity = vx, vy                     # the agent is kinematic: it pushes and is never pushed
            space.step(PHYSICS_DT)
            x, y = agent.position
        block = self._block
        self._state = np.array([x, y, *block.position, block.angle % (2 * math.pi), vx, vy])
        reached = self.goal is not None and bool(success(self._state, self.goal))
        return self.state, float(reached), reached, False, self._info()

    def _info(self):
        return {"goal": None if self.goal is None else self.goal.copy()}

    def render(self, size=224):
        """The current state as uint8 (size, size, 3)."""
        return render(self._state[None], size)[0].permute(1, 2, 0).numpy()


def _checked_state(state, name):
    state = np.array(state, np.float64)
    if state.shape != (7,) or not np.isfinite(state).all():
        raise ValueError(f"{name} must be 7 finite numbers (agent x, y, block x, y, angle, agent vx, vy), got {state!r}")
    return state


def random_state(rng):
    """float64 (7,): the block's centre of gravity mid-board (std 40 px) at any angle, the agent at rest and clear of it."""
    angle = rng.uniform(0, 2 * np.pi)
    cos, sin = math.cos(angle), math.sin(angle)
    block = rng.normal(BOARD / 2, 40, 2) - centre(0, 0, cos, sin)
    while True:
        agent = rng.uniform(40, BOARD - 40, 2)
        if _distance_to_block(*agent, *block, cos, sin) > AGENT_RADIUS + 5:
            return np.array([*agent, *block, angle, 0, 0])


def _distance_to_block(x, y, block_x, block_y, cos, sin):
    """Signed distance (px) from a point to the T's outline, negative inside. Plain floats: the policy asks often."""
    dx, dy = x - block_x, y - block_y
    u, v = abs(cos * dx + sin * dy), cos * dy - sin * dx                    # the T is symmetric in u
    nearest = math.inf
    for left, top, right, bottom in (BAR, STEM):
        du, dv = u - right, abs(v - (top + bottom) / 2) - (bottom - top) / 2
        outside = math.hypot(max(du, 0), max(dv, 0))
        nearest = min(nearest, outside if outside > 0 else max(du, dv))
    return nearest


def play(starts, goals, budget, policy):
    """Run the episodes side by side, each until it succeeds or the budget of env steps ends. -> states (L,7) of each.

    policy(which (n,), states (n,7)) -> raw actions (n,k,a) for the next k steps of the episodes `which`.
    """
    environments = [PushT() for _ in starts]
    states = [[env.reset(options={"state": s, "goal": g})[0]] for env, s, g in zip(environments, starts, goals)]
    running, step = list(range(len(starts))), 0
    while running and step < budget:
        actions = policy(np.array(running), np.stack([states[e][-1] for e in running]))[:, :budget - step]
        step += actions.shape[1]
        for e, sequence in zip(tuple(running), actions):
            for action in sequence:
                state, _, reached, _, _ = environments[e].step(action)
                states[e].append(state)
                if reached:
                    running.remove(e)
                    break
    return [np.stack(history) for history in states]


# ------------------------------------------------------------------------------------------------------------------
# Pictures. Every shape is a signed distance d (negative inside), and a pixel's share of it is clamp(1/2 - d / pixel):
# that is all of anti-aliasing. A batch is drawn at once on whatever device the states are, and only inside the small
# window that a shape can touch, so drawing is cheap enough to happen anew for every training batch.

COLOURS = {"agent": (65, 105, 225), "block": (119, 136, 153), "landmark": (144, 238, 144), "wall": (211, 211, 211)}
OUTLINE = 2.5                      # px, how far an outline reaches to each side of a polygon's edge
LANDMARK = (256, 256, math.pi / 4)  # x, y, angle of the green T: a fixed mark on the board, not the goal of an episode


def _t_distances(x, y, block_x, block_y, angle):
    """Signed distances (px) of the points (x, y) to the bar and to the stem of a T; all arguments broadcast."""
    cos, sin = torch.cos(angle), torch.sin(angle)
    dx, dy = x - block_x, y - block_y
    u, v = (cos * dx + sin * dy).abs(), cos * dy - sin * dx
    return [torch.maximum(u - right, (v - (top + bottom) / 2).abs() - (bottom - top) / 2)
            for left, top, right, bottom in (BAR, STEM)]


def _wall_distance(x, y):
    """Distance (px) of the points (x, y) to the walls' centre lines: a square ring."""
    middle, half = (WALL_LOW + WALL_HIGH) / 2, (WALL_HIGH - WALL_LOW) / 2
    return (torch.maximum((x - middle).abs(), (y - middle).abs()) - half).abs()


def _paint(under, distance, edge, core, colour, core_colour, pixel):
    """Lay a shape with an outline over `under` (N,3,h,w): `colour` up to distance `edge`, `core_colour` up to `core`."""
    outer = (0.5 - (distance - edge) / pixel).clamp(0, 1)[:, None]                    # (N,1,h,w), distance is (N,h,w)
    inner = (0.5 - (distance - core) / pixel).clamp(0, 1)[:, None]
    return under + outer * (colour - under) + inner * (core_colour - colour)


def _paint_window(frames, centre, radius, draw):
    """Apply `draw(patch (N,3,w,w), x (N,1,w), y (N,w,1)) -> patch` to the window that holds a disc around each centre (N,2)."""
    count, size = len(frames), frames.shape[-1]
    pixel = BOARD / size
    width = min(size, math.ceil(2 * radius / pixel) + 1)
    first = ((centre - radius) / pixel).floor().clamp(0, size - width).long()         # (N, 2), column and row
    steps = torch.arange(width, device=centre.device)
    columns, rows = first[:, 0, None, None] + steps, first[:, 1, None, None] + steps[:, None]
    where = (rows * size + columns).flatten(1)[:, None].expand(-1, 3, -1)             # (N, 3, w * w)
    flat = frames.flatten(2)                                                          # a view: writing it draws
    patch = flat.gather(2, where).view(count, 3, width, width).float()
    patch = draw(patch, (columns + 0.5) * pixel - 0.5, (rows + 0.5) * pixel - 0.5)
    flat.scatter_(2, where, patch.round().to(torch.uint8).flatten(2))


def render(states, size=224, block_colour=COLOURS["block"]):
    """Draw a batch of states.

    states: (N, 7) tensor or array (only the first five columns are used). size: px, side of the picture.
    block_colour: three numbers in [0, 255], or a (N, 3) tensor.
    Returns uint8 (N, 3, size, size) on the states' device.
    """
    states = torch.as_tensor(states)
    if states.ndim != 2 or states.shape[1] < 5:
        raise ValueError(f"states must be (N, 7), got {tuple(states.shape)}")
    if not 8 <= size <= 4096:
        raise ValueError(f"size must be between 8 and 4096 px, got {size}")
    if not torch.isfinite(states[:, :5]).all():
        raise ValueError("states hold NaN or infinity")
    states, device, count = states.float(), states.device, len(states)
    pixel = BOARD / size
    smooth = max(1.0, pixel)                                                          # width of an edge, px

    def colour(value):                                                                # (3,) or (N, 3)
        value = torch.as_tensor(value, dtype=torch.float32, device=device)[..., None, None]
        return value, (1.2 * value).clamp(max=255)                                    # outline, and the lighter inside

    # the empty board, once: white, the green landmark, the walls
    x = (torch.arange(size, device=device) + 0.5) * pixel - 0.5                       # pixel centres on the board, px
    y = x[:, None]
    landmark = torch.minimum(*_t_distances(x, y, *torch.tensor(LANDMARK, device=device)))
    green, grey = colour(COLOURS["landmark"])[0], colour(COLOURS["wall"])[0]
    board = torch.full((1, 3, size, size), 255.0, device=device)
    board = _paint(board, landmark[None], 0.5, 0.5, green, green, smooth)
    board = _paint(board, _wall_distance(x, y)[None], OUTLINE, OUTLINE, grey, grey, smooth)
    frames = board.round().to(torch.uint8).repeat(count, 1, 1, 1)                     # (N, 3, S, S)

    agent_x, agent_y, block_x, block_y, angle = states[:, :5].T[:, :, None, None]     # each (N, 1, 1)

    def draw_block(patch, x, y):                                      # the stem, the bar over it, the walls over both
        bar, stem = _t_distances(x, y, block_x, block_y, angle)
        for part in (stem, bar):
            patch = _paint(patch, part, OUTLINE, -OUTLINE, *colour(block_colour), smooth)
        return _paint(patch, _wall_distance(x, y), OUTLINE, OUTLINE, grey, grey, smooth)

    def draw_agent(patch, x, y):
        distance = torch.sqrt((x - agent_x) ** 2 + (y - agent_y) ** 2)
        return _paint(patch, distance, AGENT_RADIUS, AGENT_RADIUS - 4, *colour(COLOURS["agent"]), smooth)

    axis = torch.stack([-torch.sin(states[:, 4]), torch.cos(states[:, 4])], 1)        # from the bar down the stem
    middle = (BAR[1] + STEM[3]) / 2
    _paint_window(frames, states[:, 2:4] + middle * axis, math.hypot(BAR[2], middle) + OUTLINE + smooth, draw_block)
    _paint_window(frames, states[:, :2], AGENT_RADIUS + smooth, draw_agent)
    return frames


# ------------------------------------------------------------------------------------------------------------------
# The scripted policy. It chooses a point on the T's outline, goes there from outside, pushes through it for a while and
# chooses again; now and then it wanders or rests. Commands are smooth, and noise is added: it is part of the recorded
# action, so that the data resemble the random plans that the planner tries. Pushes keep the block mid-board, spread about
# as far (std 53 px) as in the authors' demonstrations: where it was spread half as far again, short runs of LeWM satisfied
# SIGReg with functions of its place alone and did not learn its angle. Three others stand beside it to compare with: jitter
# around the block, correlated noise, and a mixture of all.

POLICIES = ("purposeful", "jitter", "noise", "mixture")
OUTLINE_CORNERS = [(-60, 0), (60, 0), (60, 30), (15, 30), (15, 120), (-15, 120), (-15, 30), (-60, 30)]  # clockwise on screen
OUTLINE_EDGES = list(zip(OUTLINE_CORNERS, OUTLINE_CORNERS[1:] + OUTLINE_CORNERS[:1]))
EDGE_SHARES = np.cumsum([math.dist(a, b) for a, b in OUTLINE_EDGES]) / sum(math.dist(a, b) for a, b in OUTLINE_EDGES)


def centre(block_x, block_y, cos, sin):
    """x and y (px) of the block's centre of gravity on the board. Floats or arrays."""
    return block_x - CENTRE_OF_GRAVITY[1] * sin, block_y + CENTRE_OF_GRAVITY[1] * cos


def _choose_contact(rng, x, y, block_x, block_y, cos, sin):
    """A point on the outline and the direction to push, both in the block's frame: (px, py, nx, ny), n pointing inwards.

    Of four random points, one near the agent whose push brings the block towards the middle is the likelier choice.
    """
    centre_x, centre_y = centre(block_x, block_y, cos, sin)
    best, best_score = None, -math.inf
    for _ in range(4):
        (ax, ay), (bx, by) = OUTLINE_EDGES[int(np.searchsorted(EDGE_SHARES, rng.random()))]
        length, share = math.hypot(bx - ax, by - ay), rng.uniform(0.1, 0.9)
        px, py = ax + share * (bx - ax), ay + share * (by - ay)
        nx, ny = -(by - ay) / length, (bx - ax) / length                    # inwards, as the corners go round clockwise
        push_x, push_y = cos * nx - sin * ny, sin * nx + cos * ny           # on the board
        homeward = push_x * (BOARD / 2 - centre_x) + push_y * (BOARD / 2 - centre_y)
        way = math.hypot(block_x + cos * px - sin * py - x, block_y + sin * px + cos * py - y)
        score = homeward / 20 - way / 25 + rng.gumbel()
        if score > best_score:
            best, best_score = (px, py, nx, ny), score
    return best


def _blocked(x, y, to_x, to_y, block):
    """Would the agent touch the block on the straight way from (x, y) to (to_x, to_y)?"""
    return any(_distance_to_block(x + s * (to_x - x), y + s * (to_y - y), *block) < AGENT_RADIUS for s in (0.15, 0.4, 0.65, 0.9))


def _way_round(x, y, to_x, to_y, centre_x, centre_y):
    """A point to head for when the block is in the way: a little further round a circle about the block."""
    here, there = math.atan2(y - centre_y, x - centre_x), math.atan2(to_y - centre_y, to_x - centre_x)
    turn = (there - here + math.pi) % (2 * math.pi) - math.pi
    angle = here + math.copysign(min(abs(turn), 0.7), turn)
    return centre_x + 115 * math.cos(angle), centre_y + 115 * math.sin(angle)


def _inside(x, y, action_x, action_y):
    """The action, shortened where its target would come nearer than 30 px to the board's edge, in [-1, 1]. Plain floats."""
    target_x = min(max(x + ACTION_SCALE * action_x, 30), BOARD - 30)
    target_y = min(max(y + ACTION_SCALE * action_y, 30), BOARD - 30)
    return min(max((target_x - x) / ACTION_SCALE, -1), 1), min(max((target_y - y) / ACTION_SCALE, -1), 1)


def _aimless(rng, env, policy, states, actions):
    """Fill an episode with jitter (a target anywhere in the 200 px square about the block's position) or noise (slowly changing random actions)."""
    action = np.zeros(2)
    for t in range(len(states)):
        states[t] = env.state
        if policy == "jitter":
            action = (states[t, 2:4] + rng.uniform(-100, 100, 2) - states[t, :2]) / ACTION_SCALE
        else:
            action = 0.9 * action + rng.normal(0, 0.1, 2)                   # correlated over about 10 steps, std 0.23
        actions[t] = _inside(*states[t, :2].tolist(), *action.tolist())
        env.step(actions[t])
    return states, actions


def _episode(seed, index, policy="purposeful"):
    """One scripted episode: state float32 (L, 7) and action float32 (L, 2), action[t] taken in state[t]; 49 <= L <= 246."""
    rng = np.random.default_rng([seed, index])
    length = 49 + int(198 * rng.beta(1.7, 2.7))
    env = PushT()
    state, _ = env.reset(options={"state": random_state(rng)})
    states, actions = np.zeros((length, 7), np.float32), np.zeros((length, 2), np.float32)
    policy = POLICIES[index % 3] if policy == "mixture" else policy
    if policy != "purposeful":
        return _aimless(rng, env, policy, states, actions)
    mode, steps_left, pace, contact, goal, slant = "choose", 0, 0.0, None, None, 0.0
    command_x = command_y = 0.0
    for t in range(length):
        x, y, block_x, block_y, angle = state[:5].tolist()
        cos, sin = math.cos(angle), math.sin(angle)
        block = (block_x, block_y, cos, sin)
        if mode == "choose":
            draw, pace = rng.random(), rng.uniform(0.35, 0.65)
            if draw < 0.03:
                mode, steps_left = "rest", int(rng.integers(2, 8))
            elif draw < 0.1:
                mode, steps_left, goal = "wander", int(rng.integers(5, 25)), rng.uniform(40, BOARD - 40, 2).tolist()
            else:
                mode, steps_left, contact = "approach", 40, _choose_contact(rng, x, y, *block)
        if contact is not None:                                             # the contact point, on the board
            px, py, nx, ny = contact
            point_x, point_y = block_x + cos * px - sin * py, block_y + sin * px + cos * py
            push_x, push_y = cos * nx - sin * ny, sin * nx + cos * ny
        if mode == "approach":
            goal = (point_x - 24 * push_x, point_y - 24 * push_y)
            if math.hypot(goal[0] - x, goal[1] - y) < 9:
                mode, steps_left, slant, pace = "push", int(rng.integers(10, 45)), rng.normal(0, 0.3), rng.uniform(0.08, 0.28)

        if mode == "rest":
            want_x = want_y = 0.0
        elif mode == "push":
            cos_slant, sin_slant = math.cos(slant), math.sin(slant)
            want_x, want_y = pace * (cos_slant * push_x - sin_slant * push_y), pace * (sin_slant * push_x + cos_slant * push_y)
        else:                                                               # go to the goal, round the block
            to_x, to_y = goal
            if _blocked(x, y, to_x, to_y, block):
                to_x, to_y = _way_round(x, y, to_x, to_y, *centre(*block))
            gap = math.hypot(to_x - x, to_y - y)
            speed = min(pace, gap / ACTION_SCALE) / max(gap, 1e-6)
            want_x, want_y = speed * (to_x - x), speed * (to_y - y)

        command_x, command_y = 0.4 * command_x + 0.6 * want_x, 0.4 * command_y + 0.6 * want_y
        noise_x, noise_y = rng.normal(0, 0.15, 2).tolist()
        states[t] = state
        actions[t] = _inside(x, y, command_x + noise_x, command_y + noise_y)
        state = env.step(actions[t])[0]

        steps_left -= 1
        centre_x, centre_y = centre(state[2], state[3], math.cos(state[4]), math.sin(state[4]))
        outwards = push_x * (centre_x - BOARD / 2) + push_y * (centre_y - BOARD / 2) if mode == "push" else 0
        astray = outwards > 0 and max(abs(centre_x - BOARD / 2), abs(centre_y - BOARD / 2)) > 60
        lost = mode == "push" and _distance_to_block(x, y, *block) > AGENT_RADIUS + 15
        if steps_left <= 0 or astray or lost:
            mode, contact = "choose", None
    return states, actions


# ------------------------------------------------------------------------------------------------------------------
# Data sets: flat arrays with the column names of the authors' files, all episodes end to end.
#   state (F, 7) float32, action (F, 2) float32 (action[t] is taken in state[t]), ep_len (E,), ep_offset (E,) int64,
#   and where there are pictures, pixels (F, S, S, 3) uint8. States alone are enough: `render` draws them when needed.

COLUMNS = ("state", "action", "ep_len", "ep_offset", "pixels")
SPLIT_SEEDS = {"dev": 1_000_000, "test": 2_000_000}     # episodes of a split come from seeds in [this, this + 1e6); training has those below


def _in_parallel(function, count, workers, what):
    """[function(0), ..., function(count - 1)] over processes, in order, with a progress bar. Each call seeds itself."""
    workers = workers or os.cpu_count() or 1
    bar = partial(tqdm, total=count, desc=what, unit="ep", leave=False, disable=count < 50)
    if workers == 1 or count < 50:                                          # not worth starting processes for
        return list(bar(map(function, range(count))))
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    with context.Pool(min(workers, count)) as pool:
        return list(bar(pool.imap(function, range(count), chunksize=8)))


def collect(episodes, seed=0, workers=None, policy="purposeful"):
    """Record scripted episodes: {"state", "action", "ep_len", "ep_offset"} as described above.

    An episode depends on (seed, its index, policy) alone: not on `workers` (default: one per core) nor on how many there are.
    """
    if episodes < 1 or seed < 0 or policy not in POLICIES:
        raise ValueError(f"collect needs at least 1 episode, a seed >= 0 and a policy of {', '.join(POLICIES)}; got {episodes}, {seed} and {policy!r}")
    recorded = _in_parallel(partial(_episode, seed, policy=policy), episodes, workers, "recording")
    lengths = np.array([len(states) for states, _ in recorded], np.int64)
    return {"state": np.concatenate([states for states, _ in recorded]),
            "action": np.concatenate([actions for _, actions in recorded]),
            "ep_len": lengths, "ep_offset": np.cumsum(lengths) - lengths}


def describe(data, span=25):
    """A line of statistics: spreads, and in how many windows of `span` env steps the block moves 10 px or turns 10 degrees."""
    state, action = data["state"], data["action"]
    first = np.concatenate([offset + np.arange(max(0, length - span)) for offset, length in zip(data["ep_offset"], data["ep_len"])])
    _, moved, turned = distances(state[first], state[first + span])
    return (f"std of actions {action.std(0).mean():.2f}, agent {state[:, :2].std(0).mean():.0f} px and {state[:, 5:7].std(0).mean():.0f} px/s, "
            f"block {state[:, 2:4].std(0).mean():.0f} px; of the windows of {span} steps {np.mean(moved >= 10):.0%} move the block 10 px, "
            f"{np.mean(turned >= 10):.0%} turn it 10 degrees")


def _pair(seed, distance, policy, index):
    """(start, goal, the recorded actions between them) from one episode, or None where the start satisfies the goal."""
    states, actions = _episode(seed, index, policy)
    if len(states) <= distance:
        return None
    t = int(np.random.default_rng([seed, index, 1]).integers(len(states) - distance))
    start, goal = states[t], states[t + distance]
    return None if success(start, goal) else (start, goal, actions[t:t + distance])


def check_pairs(count, split, seed, distance, policy="purposeful"):
    """Refuse what `held_out_pairs` cannot give."""
    if split not in SPLIT_SEEDS or count < 1 or not 0 <= seed < 1_000_000 or not 1 <= distance <= 150 or policy not in POLICIES:
        raise ValueError(f"held_out_pairs: need a split of {sorted(SPLIT_SEEDS)}, count >= 1, 0 <= seed < 1000000, 1 <= distance <= 150 "
                         f"and a policy of {', '.join(POLICIES)}; got {split!r}, {count}, {seed}, {distance}, {policy!r}")


def held_out_pairs(count, split="test", seed=0, distance=25, workers=None, policy="purposeful"):
    """Planning problems from episodes that no training sees: starts (N, 7), goals (N, 7), recorded actions (N, distance, 2).

    One pair an episode: a random state and the one `distance` env steps later. Starts that already satisfy their goal are
    left out. split "dev" is for choosing settings, "test" for the figure that is reported.
    """
    check_pairs(count, split, seed, distance, policy)
    pairs, tried = [], count
    while len(pairs) < count:                                               # grows until enough pairs are unsolved
        tried = int(1.2 * tried) + 5
        found = _in_parallel(partial(_pair, SPLIT_SEEDS[split] + seed, distance, policy), tried, workers, f"{split} pairs")
        pairs = [pair for pair in found if pair is not None]
    return tuple(np.stack(column) for column in zip(*pairs[:count]))


def save(path, data):
    """Write a data set as one `.npz`, or as a folder of `.npy` files that `load` maps into memory. Never overwrites."""
    path = Path(path)
    if path.exists():
        raise FileExistsError(f"{path} exists already: choose another --out or delete it first")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=path.name + ".", dir=path.parent))     # renamed when complete
    if path.suffix == ".npz":
        np.savez(temporary / "data.npz", **data)
        os.replace(temporary / "data.npz", path)
        temporary.rmdir()
    else:
        for name, array in data.items():
            np.save(temporary / f"{name}.npy", array)
        temporary.chmod(0o755)
        os.replace(temporary, path)


def load(path):
    """Read what `save` wrote, or any `.npz` or folder with the same columns; `ep_offset` may be missing.

    Files in a folder are memory-mapped: a data set larger than memory is fine. Nothing in a file is ever executed.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no data at {path}; make some: python pusht.py --episodes 2000 --out {path}")
    try:
        if path.is_dir():
            data = {name: np.load(path / f"{name}.npy", mmap_mode="r", allow_pickle=False)
                    for name in COLUMNS if (path / f"{name}.npy").exists()}
        else:
            with np.load(path, allow_pickle=False) as file:
                data = {name: file[name] for name in COLUMNS if name in file}
    except (ValueError, EOFError, OSError, AttributeError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is damaged or not a data set of plain arrays: {error}") from error
    missing = [name for name in ("action", "ep_len") if name not in data]
    if missing or not ({"state", "pixels"} & set(data)):
        raise ValueError(f"{path} lacks {missing or ['state or pixels']}; a data set has the columns {', '.join(COLUMNS)}")
    data.setdefault("ep_offset", np.cumsum(data["ep_len"]) - data["ep_len"])
    return data


def import_hdf5(source, out, chunk_bytes=2**26):
    """Convert an HDF5 file in the authors' layout to a folder that `load` maps into memory. A killed import goes on when repeated.

    source: `pixels` (F,S,S,3) uint8, `action` (F,a), and `state` if there is one, with `ep_len` and `ep_offset` (E,), or with
    `episode_idx` and `step_idx` (F,) instead. `proprio` is part of the state and is left out. About `chunk_bytes` of pixels are
    in memory at a time. Returns (episodes, rows). Raises ValueError that names what is wrong, FileExistsError for `out`.
    """
    try:
        import h5py
    except ImportError as error:
        raise ValueError("reading HDF5 needs one more package: pip install h5py (and hdf5plugin, for compressed files)") from error
    try:
        import hdf5plugin  # noqa: F401   importing it registers the decompressors
    except ImportError:
        hdf5plugin = None
    source, out = Path(source), Path(out)
    if out.exists():
        raise FileExistsError(f"{out} exists already: choose another --out or delete it first")
    if not source.is_file():
        raise FileNotFoundError(f"no file at {source}")
    try:
        with h5py.File(source, "r") as file:
            return _convert(file, source, out, chunk_bytes)
    except (OSError, KeyError, RuntimeError) as error:
        hint = "" if hdf5plugin else "; if it is compressed: pip install hdf5plugin"
        raise ValueError(f"{source} is damaged, cut short or no HDF5 file ({' '.join(str(error).split())[:150]}){hint}") from error


def _episodes_of(file, source):
    """ep_len and ep_offset of an HDF5 file, given as such or as an episode and a step number in each row."""
    if "ep_len" in file:
        length = file["ep_len"][:].astype(np.int64).reshape(-1)
        offset = file["ep_offset"][:].astype(np.int64).reshape(-1) if "ep_offset" in file else np.cumsum(length) - length
    elif "episode_idx" in file and "step_idx" in file:
        episode, step = (file[name][:].astype(np.int64).reshape(-1) for name in ("episode_idx", "step_idx"))
        if len(episode) != len(step):
            raise ValueError(f"{source}: episode_idx has {len(episode)} rows, step_idx {len(step)}")
        offset = np.flatnonzero(np.r_[True, episode[1:] != episode[:-1]]) if len(episode) else np.zeros(0, np.int64)
        length = np.diff(np.r_[offset, len(episode)])
        if len(np.unique(episode[offset])) != len(offset) or not np.array_equal(step - step[np.repeat(offset, length)],
                                                                              np.arange(len(step)) - np.repeat(offset, length)):
            raise ValueError(f"{source}: rows of an episode must lie together, in the order of step_idx")
    else:
        raise ValueError(f"{source} has neither ep_len nor episode_idx and step_idx; it has {', '.join(sorted(file))}")
    return length, offset


def _convert(file, source, out, chunk_bytes):
    """The work of `import_hdf5`: copy rows into `out`.partial, note after each chunk how far it got, rename when complete."""
    missing = [name for name in ("pixels", "action") if name not in file]
    if missing:
        raise ValueError(f"{source} lacks {' and '.join(missing)}; it has {', '.join(sorted(file))}")
    length, offset = _episodes_of(file, source)
    columns = [name for name in ("pixels", "action", "state") if name in file]
    rows = len(file["action"])
    if file["pixels"].ndim != 4 or file["pixels"].shape[3] != 3 or file["pixels"].dtype != np.uint8 or file["action"].ndim != 2:
        raise ValueError(f"{source}: pixels are {file['pixels'].shape} {file['pixels'].dtype} and action {file['action'].shape}, "
                         "not (rows, S, S, 3) uint8 and (rows, numbers)")
    if any(len(file[name]) != rows for name in columns):
        raise ValueError(f"{source}: columns differ in length: " + ", ".join(f"{name} {len(file[name])}" for name in columns))
    if len(length) != len(offset) or not len(length) or min(length.min(), offset.min()) < 0 or (offset + length).max() > rows:
        raise ValueError(f"{source}: {len(length)} episodes do not fit into {rows} rows")

    partial_out, mark = out.with_name(out.name + ".partial"), f"{source.resolve()} {source.stat().st_size} {source.stat().st_mtime_ns}"
    progress = partial_out / "progress.txt"
    done = 0
    if progress.exists():
        before, _, count = progress.read_text().rpartition(" ")
        if before != mark:
            raise FileExistsError(f"{partial_out} is the beginning of another file's import: delete it first")
        done = int(count)
    partial_out.mkdir(parents=True, exist_ok=True)
    paths = {name: partial_out / f"{name}.npy" for name in columns}
    for name, path in paths.items():
        if not done:
            np.lib.format.open_memmap(path, "w+", np.uint8 if name == "pixels" else np.float32, file[name].shape)
    chunk = max(1, chunk_bytes // max(1, math.prod(file["pixels"].shape[1:])))
    with tqdm(total=rows, initial=done, desc=f"importing {source.name}", unit="row", unit_scale=True) as bar:
        for start in range(done, rows, chunk):
            for name, path in paths.items():
                array = np.load(path, mmap_mode="r+")                        # opened anew, so that memory stays constant
                array[start:start + chunk] = file[name][start:start + chunk]
                array.flush()                                               # on disk before it counts as done
            temporary = progress.with_suffix(".new")
            temporary.write_text(f"{mark} {min(start + chunk, rows)}")
            os.replace(temporary, progress)
            bar.update(min(chunk, rows - start))
    np.save(partial_out / "ep_len.npy", length)
    np.save(partial_out / "ep_offset.npy", offset)
    progress.unlink(missing_ok=True)
    os.replace(partial_out, out)
    return len(length), rows


def save_gif(path, frames, fps=10):
    """frames (N, H, W, 3) uint8 -> a looping GIF."""
    from PIL import Image                                                    # comes with matplotlib
    images = [Image.fromarray(frame).quantize(64, dither=Image.Dither.NONE) for frame in frames]
    images[0].save(path, save_all=True, append_images=images[1:], duration=round(1000 / fps), loop=0)


def draw_outcomes(path, histories, goals, won, size=160):
    """A GIF of the first success and, below it, the first failure; from left to right: start, goal, what happened.

    histories: one (L, 7) array an episode; goals (E, 7); won bool (E,).
    """
    chosen = [e for outcome in (True, False) for e in np.flatnonzero(np.asarray(won) == outcome)[:1]]
    length = max(len(histories[e]) for e in chosen) + 8                      # the last picture stays a while

    def draw(states):
        pictures = render(np.asarray(states), size).permute(0, 2, 3, 1).numpy()
        return np.pad(pictures, ((0, 0), (2, 2), (2, 2), (0, 0)), constant_values=120)

    frames = [[] for _ in range(length)]
    for e in chosen:
        start, goal, moving = draw(histories[e][:1])[0], draw(goals[e][None])[0], draw(histories[e])
        for t in range(length):
            frames[t].append(np.concatenate([start, goal, moving[min(t, len(moving) - 1)]], axis=1))
    save_gif(path, [np.concatenate(rows) for rows in frames])


def parse_arguments(argv):
    parser = argparse.ArgumentParser(description="Push-T: record scripted episodes, or look at one.", allow_abbrev=False,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--episodes", type=int, metavar="N", help="record N episodes")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same episodes; 1000000 and up are held-out")
    parser.add_argument("--out", metavar="PATH", help="where to: a folder (memory-mapped when read) or a file that ends in .npz")
    parser.add_argument("--policy", choices=POLICIES, default=POLICIES[0], help="how the agent moves")
    parser.add_argument("--import", dest="source", metavar="FILE.h5", help="convert the authors' HDF5 data set to a folder (--out)")
    parser.add_argument("--workers", type=int, help="processes (one per core when not given); does not change the data")
    parser.add_argument("--size", type=int, default=224, help="side of the picture for --show, px")
    parser.add_argument("--show", metavar="PATH.gif", help="draw the first episode of --seed")
    args = parser.parse_args(argv)
    if (args.episodes or args.source) and not args.out:
        parser.error("--episodes and --import need --out PATH")
    if not (args.show or args.episodes or args.source):
        parser.print_help()
        sys.exit()
    return args


def main(argv):
    args = parse_arguments(argv)
    if args.show:
        states, _ = _episode(args.seed, 0, args.policy)
        save_gif(args.show, render(states, args.size).permute(0, 2, 3, 1).numpy())
        print(f"{args.show}: {len(states)} steps of 0.1 s")
    if args.episodes:
        began = time.time()
        data = collect(args.episodes, args.seed, args.workers, args.policy)
        save(args.out, data)
        print(f"{args.out}: {args.episodes} episodes, {len(data['action']):,} steps, {time.time() - began:.0f} s\n{describe(data)}")
    if args.source:
        began = time.time()
        episodes, rows = import_hdf5(args.source, args.out)
        print(f"{args.out}: {episodes:,} episodes, {rows:,} rows, {time.time() - began:.0f} s")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, OSError) as error:
        sys.exit(f"pusht.py: {error}")
