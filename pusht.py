"""Push-T: a disc pushes a T-shaped block about a 512 x 512 board. The world, its pictures and its data.

    python pusht.py --show push.gif                            # look at one episode
    python pusht.py --episodes 2000 --seed 0 --out data/train  # 250,000 steps, under a minute on 2 cores

    from pusht import PushT, render, success, collect
    env = PushT()
    state, info = env.reset(seed=0)
    state, reward, terminated, truncated, info = env.step([0.2, 0.0])

State (7 numbers): agent x, y (px), block x, y (px), block angle (rad, in [0, 2 pi)), agent velocity x, y
(px/s). The y axis points down. Action (2 numbers in [-1, 1]): where the agent is told to go, in units of
100 px from where it is; held for one step of 0.1 s.

The dynamics are those of Diffusion Policy's Push-T (Chi et al., arXiv 2303.04137), the relative actions
those of DINO-WM (Zhou et al., arXiv 2411.04983), as in LeWorldModel. One deviation: see `PushT.step`.
"""

import argparse
import cmath
import math
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
import zipfile
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from contextlib import contextmanager
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
STIFFNESS, DAMPING = 100, 20       # 1/s^2 and 1/s, of the agent's controller (critically damped)
BAR = (-60, 0, 60, 30)             # px, left, top, right, bottom in the block's own frame (scale 30)
STEM = (-15, 30, 15, 120)
CENTRE_OF_GRAVITY = (0, 45)        # px, in the block's own frame


# ======== The world ===================================================================================
# pymunk does the physics. Space damping 0 means that the block stops dead when it is not pushed, so the seven
# numbers of the state say all that lasts. Setting another state starts a fresh space, so that what follows
# depends on the state and the actions alone.

def distances(states, goals):
    """How far states are from goals, (N,7) each: agent (px), block (px), block angle (degrees), each (N,)."""
    states, goals = np.asarray(states, np.float64), np.asarray(goals, np.float64)
    agent, block = (np.linalg.norm((states - goals)[..., i:i + 2], axis=-1) for i in (0, 2))
    turn = (states[..., 4] - goals[..., 4] + np.pi) % (2 * np.pi) - np.pi
    return agent, block, np.degrees(np.abs(turn))


def success(states, goals, object_only=False):
    """Which states (N,7) reach their goals (N,7), or anything that broadcasts to it -> bool (N,).

    The rule: ||(agent xy, block xy) - goal|| < 20 px and the block's angle within pi/9 (20 degrees).
    `object_only` leaves the agent out of the distance: the easier rule that some reports use."""
    agent, block, turn = distances(states, goals)
    return (np.hypot(0 if object_only else agent, block) < 20) & (turn < 20)


class PushT:
    """The environment, with Gymnasium's signatures and without a time limit. size: px, of `render`."""

    def __init__(self, size=224):
        self.size, self.goal, self._rng = size, None, np.random.default_rng()
        self._build(np.array([256.0, 400, 256, 300, 0, 0, 0]))

    @property
    def state(self):
        """float64 (7,), as described above. Setting what was read changes nothing."""
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

        # The reference adds the bar's moment twice instead of the bar's and the stem's, and sets friction on
        # the body, where pymunk ignores it. Published numbers come from that world, so both stay.
        bar, stem = ([(left, top), (right, top), (right, bottom), (left, bottom)]
                     for left, top, right, bottom in (BAR, STEM))
        self._block = pymunk.Body(1, 2 * pymunk.moment_for_poly(1, bar))
        self._block.center_of_gravity = CENTRE_OF_GRAVITY
        self._block.angle = state[4]  # first: pymunk turns about the centre of gravity
        self._block.position = tuple(state[2:4])
        space.add(self._block, pymunk.Poly(self._block, bar), pymunk.Poly(self._block, stem))
        self._state = state

    def reset(self, seed=None, options=None):
        """-> state (7,), info. options: {"state": (7,), "goal": (7,)}; what is not given is random."""
        options = options or {}
        if not set(options) <= {"state", "goal"}:
            raise ValueError(f"reset(options) knows 'state' and 'goal', got {sorted(options)}")
        if seed is not None:
            self._rng = np.random.default_rng(seed)
        state, goal = options.get("state"), options.get("goal")
        self._build(random_state(self._rng) if state is None else _checked_state(state, "state"))
        self.goal = random_state(self._rng) if goal is None else _checked_state(goal, "goal")
        return self.state, {"goal": self.goal.copy()}

    def step(self, action):
        """One env step (0.1 s). action (2,), clipped. -> state, reward, terminated, truncated, info.

        reward is 1.0 and terminated True where `success(state, goal)`; truncated is always False. The
        deviation from the reference: the target is kept on the board, so that the agent cannot leave it."""
        action = np.asarray(action, np.float64)
        if action.shape != (2,) or not np.isfinite(action).all():
            raise ValueError(f"action must be 2 finite numbers in [-1, 1], got {action!r}")
        agent, block, space = self._agent, self._block, self._space
        right, down = action.clip(-1, 1).tolist()
        x, y = agent.position
        vx, vy = agent.velocity
        target_x = min(max(x + ACTION_SCALE * right, 0), BOARD)
        target_y = min(max(y + ACTION_SCALE * down, 0), BOARD)
        for _ in range(SUBSTEPS):
            vx += (STIFFNESS * (target_x - x) - DAMPING * vx) * PHYSICS_DT
            vy += (STIFFNESS * (target_y - y) - DAMPING * vy) * PHYSICS_DT
            agent.velocity = vx, vy  # kinematic: it pushes and is never pushed
            space.step(PHYSICS_DT)
            x, y = agent.position
        self._state = np.array([x, y, *block.position, block.angle % (2 * math.pi), vx, vy])
        goal = None if self.goal is None else self.goal.copy()
        reached = goal is not None and bool(success(self._state, goal))
        return self.state, float(reached), reached, False, {"goal": goal}

    def render(self, size=None):
        """The current state as uint8 (size,size,3)."""
        return render(self._state[None], size or self.size)[0].permute(1, 2, 0).numpy()


def _checked_state(state, name):
    state = np.array(state, np.float64)
    if state.shape != (7,) or not np.isfinite(state).all():
        fields = "agent x, y, block x, y, angle, agent vx, vy"
        raise ValueError(f"{name} must be 7 finite numbers ({fields}), got {state.tolist()}")
    return state


# ======== Pictures ====================================================================================
# Every shape is a signed distance d (negative inside), and a pixel's share of it is clamp(1/2 - d / pixel):
# that is all of anti-aliasing. A batch is drawn at once, on the device of the states, and a shape only in the
# small window that it can touch: cheap enough to draw every training batch anew.

COLOURS = {"agent": (65, 105, 225), "block": (119, 136, 153), "landmark": (144, 238, 144),
           "wall": (211, 211, 211)}
OUTLINE = 2.5                      # px, how far an outline reaches to each side of a polygon's edge
LANDMARK = (256, 256, math.pi / 4)  # x, y, angle of the green T, a fixed mark: it is not the goal


def _t_distances(x, y, block_x, block_y, angle):
    """Signed distances (px) of points (x, y) to the bar and to the stem of a T; all arguments broadcast."""
    cos, sin = torch.cos(angle), torch.sin(angle)
    dx, dy = x - block_x, y - block_y
    u, v = (cos * dx + sin * dy).abs(), cos * dy - sin * dx
    return [torch.maximum(u - right, (v - (top + bottom) / 2).abs() - (bottom - top) / 2)
            for left, top, right, bottom in (BAR, STEM)]


def _wall_distance(x, y):
    """Distance (px) of the points (x, y) to the walls' centre lines: a square ring."""
    middle, half = (WALL_LOW + WALL_HIGH) / 2, (WALL_HIGH - WALL_LOW) / 2
    return (torch.maximum((x - middle).abs(), (y - middle).abs()) - half).abs()


def _paint(under, distance, pixel, colour, edge, core=-math.inf):
    """Lay a shape over `under` (N,3,h,w): `colour` up to distance (N,h,w) `edge`, lighter up to `core`."""
    outer = (0.5 - (distance - edge) / pixel).clamp(0, 1)[:, None]
    inner = (0.5 - (distance - core) / pixel).clamp(0, 1)[:, None]
    return under + outer * (colour - under) + inner * ((1.2 * colour).clamp(max=255) - colour)


def _paint_window(frames, centre, radius, draw):
    """Apply `draw(patch (N,3,w,w), x (N,1,w), y (N,w,1)) -> patch` around each centre (N,2)."""
    size, pixel = frames.shape[-1], BOARD / frames.shape[-1]
    width = min(size, math.ceil(2 * radius / pixel) + 1)
    first = ((centre - radius) / pixel).floor().clamp(0, size - width).long()  # (N,2): column, row
    steps = torch.arange(width, device=centre.device)
    columns, rows = first[:, 0, None, None] + steps, first[:, 1, None, None] + steps[:, None]
    where = (rows * size + columns).flatten(1)[:, None].expand(-1, 3, -1)  # (N,3,w*w)
    flat = frames.flatten(2)  # a view: writing it draws
    patch = flat.gather(2, where).unflatten(2, (width, width)).float()
    patch = draw(patch, (columns + 0.5) * pixel - 0.5, (rows + 0.5) * pixel - 0.5)
    flat.scatter_(2, where, patch.round().to(torch.uint8).flatten(2))


def render(states, size=224, block_colour=COLOURS["block"]):
    """Draw states (N,7), a tensor or array of which five columns count -> uint8 (N,3,size,size) beside them.

    size: px, side of the picture. block_colour: three numbers in [0, 255], or a (N,3) tensor."""
    states = torch.as_tensor(states)
    if states.ndim != 2 or states.shape[1] < 5 or not 8 <= size <= 4096:
        raise ValueError(f"states must be (N, 7), got {tuple(states.shape)}; size 8 to 4096 px, got {size}")
    if not torch.isfinite(states[:, :5]).all():
        raise ValueError("states hold NaN or infinity")
    states, device, pixel = states.float(), states.device, BOARD / size
    smooth = max(1.0, pixel)  # width of an edge, px
    colours = {name: torch.as_tensor(colour, dtype=torch.float32, device=device)[..., None, None]
               for name, colour in {**COLOURS, "block": block_colour}.items()}

    # the empty board, once: white, the landmark, the walls
    x = (torch.arange(size, device=device) + 0.5) * pixel - 0.5  # pixel centres on the board, px
    y = x[:, None]
    distance = torch.minimum(*_t_distances(x, y, *torch.tensor(LANDMARK, device=device)))
    board = torch.full((1, 3, size, size), 255.0, device=device)
    board = _paint(board, distance[None], smooth, colours["landmark"], 0.5)
    board = _paint(board, _wall_distance(x, y)[None], smooth, colours["wall"], OUTLINE)
    frames = board.round().to(torch.uint8).repeat(len(states), 1, 1, 1)  # (N,3,S,S)

    agent_x, agent_y, block_x, block_y, angle = states[:, :5].T[:, :, None, None]  # each (N,1,1)

    def draw_block(patch, x, y):  # the stem, the bar over it, the walls over both
        for part in reversed(_t_distances(x, y, block_x, block_y, angle)):
            patch = _paint(patch, part, smooth, colours["block"], OUTLINE, -OUTLINE)
        return _paint(patch, _wall_distance(x, y), smooth, colours["wall"], OUTLINE)

    def draw_agent(patch, x, y):
        distance = torch.sqrt((x - agent_x) ** 2 + (y - agent_y) ** 2)
        return _paint(patch, distance, smooth, colours["agent"], AGENT_RADIUS, AGENT_RADIUS - 4)

    axis = torch.stack([-torch.sin(states[:, 4]), torch.cos(states[:, 4])], 1)  # of the stem
    middle = (BAR[1] + STEM[3]) / 2
    reach = math.hypot(BAR[2], middle) + OUTLINE + smooth
    _paint_window(frames, states[:, 2:4] + middle * axis, reach, draw_block)
    _paint_window(frames, states[:, :2], AGENT_RADIUS + smooth, draw_agent)
    return frames


# ======== The scripted policy =========================================================================
# It chooses a point on the T's outline, goes there from outside, pushes through it for a while and chooses
# again; now and then it wanders or rests. Commands are smooth, and noise is added: it is part of the recorded
# action, so that the data resemble the random plans that the planner tries. A push that leads the block
# outwards, further than 1.5 `spread` from the middle of the board, ends. A place is a complex number x + iy,
# and turning by an angle is multiplying by `spin` = e^(i angle): plain Python, as the policy asks often.

SPREAD = 40                        # px, std of the block's centre at the start of an episode
OUTLINE_CORNERS = [-60, 60, 60 + 30j, 15 + 30j, 15 + 120j, -15 + 120j, -15 + 30j, -60 + 30j]
OUTLINE_EDGES = list(zip(OUTLINE_CORNERS, OUTLINE_CORNERS[1:] + OUTLINE_CORNERS[:1]))
EDGE_SHARES = np.cumsum([abs(b - a) for a, b in OUTLINE_EDGES]) / sum(abs(b - a) for a, b in OUTLINE_EDGES)
MIDDLE = complex(BOARD / 2, BOARD / 2)


def centre(block, spin):
    """The block's centre of gravity on the board. Complex numbers or arrays of them."""
    return block + spin * complex(*CENTRE_OF_GRAVITY)


def gap(agent, block, spin):
    """Signed distance (px) from a place to the T's outline, negative inside."""
    place = (agent - block) * spin.conjugate()  # in the block's own frame
    nearest = math.inf
    for left, top, right, bottom in (BAR, STEM):  # the T is symmetric in x
        dx = abs(place.real) - right
        dy = abs(place.imag - (top + bottom) / 2) - (bottom - top) / 2
        nearest = min(nearest, math.hypot(max(dx, 0), max(dy, 0)) + min(max(dx, dy), 0))
    return nearest


def random_state(rng, spread=SPREAD):
    """float64 (7,): the block's centre of gravity about the middle at any angle, the agent clear of it."""
    angle = rng.uniform(0, 2 * np.pi)
    spin = cmath.rect(1, angle)
    block = complex(*rng.normal(BOARD / 2, spread, 2)) - centre(0, spin)
    while True:
        agent = complex(*rng.uniform(40, BOARD - 40, 2))
        if gap(agent, block, spin) > AGENT_RADIUS + 5:
            return np.array([agent.real, agent.imag, block.real, block.imag, angle, 0, 0])


def _choose_contact(rng, agent, block, spin):
    """A point on the outline and the direction to push there (inwards, of length 1), in the block's frame.

    Of four random points, one near the agent whose push brings the block inwards is the likelier choice."""
    choices, home = [], MIDDLE - centre(block, spin)
    for _ in range(4):
        a, b = OUTLINE_EDGES[int(np.searchsorted(EDGE_SHARES, rng.random()))]
        point = a + rng.uniform(0.1, 0.9) * (b - a)
        inwards = 1j * (b - a) / abs(b - a)  # as the corners go clockwise
        homeward = (spin * inwards * home.conjugate()).real  # a scalar product
        score = homeward / 20 - abs(block + spin * point - agent) / 25 + rng.gumbel()
        choices.append((score, point, inwards))
    return max(choices, key=lambda choice: choice[0])[1:]


def _way_round(agent, goal, block, spin):
    """Where to head for: the goal, or a little further round a circle about the block that is in the way."""
    way = [agent + share * (goal - agent) for share in (0.15, 0.4, 0.65, 0.9)]
    if all(gap(place, block, spin) >= AGENT_RADIUS for place in way):
        return goal
    middle = centre(block, spin)
    turn = cmath.phase((goal - middle) / (agent - middle))
    angle = cmath.phase(agent - middle) + math.copysign(min(abs(turn), 0.7), turn)
    return middle + cmath.rect(115, angle)


def _episode(seed, index, spread=SPREAD):
    """One scripted episode: state float32 (L,7), action float32 (L,2), action[t] taken in state[t]."""
    rng = np.random.default_rng([seed, index])
    length = 49 + int(198 * rng.beta(1.7, 2.7))  # to 246, as in the authors' data
    env = PushT()
    state, _ = env.reset(options={"state": random_state(rng, spread)})
    states, actions = np.zeros((length, 7), np.float32), np.zeros((length, 2), np.float32)
    mode, steps_left, command = "choose", 0, 0j
    for t in range(length):
        agent, block, spin = complex(*state[:2]), complex(*state[2:4]), cmath.rect(1, state[4])
        if mode == "choose":
            draw, pace = rng.random(), rng.uniform(0.35, 0.65)
            if draw < 0.03:
                mode, steps_left = "rest", int(rng.integers(2, 8))
            elif draw < 0.1:
                mode, steps_left = "wander", int(rng.integers(5, 25))
                goal = complex(*rng.uniform(40, BOARD - 40, 2))
            else:
                mode, steps_left = "approach", 40
                point, inwards = _choose_contact(rng, agent, block, spin)
        if mode == "approach":
            goal = block + spin * point - 24 * spin * inwards  # outside, opposite the point
            if abs(goal - agent) < 9:
                mode, steps_left = "push", int(rng.integers(10, 45))
                slant, pace = rng.normal(0, 0.3), rng.uniform(0.08, 0.28)

        if mode == "rest":
            want = 0
        elif mode == "push":
            want = pace * cmath.rect(1, slant) * spin * inwards
        else:
            way = _way_round(agent, goal, block, spin) - agent
            want = min(pace, abs(way) / ACTION_SCALE) * way / max(abs(way), 1e-6)
        command = 0.4 * command + 0.6 * want  # smooth, and noise on top
        target = agent + ACTION_SCALE * (command + complex(*rng.normal(0, 0.15, 2)))
        target = np.clip([target.real, target.imag], 30, BOARD - 30)  # away from the walls
        states[t], actions[t] = state, np.clip((target - state[:2]) / ACTION_SCALE, -1, 1)
        state = env.step(actions[t])[0]

        steps_left -= 1
        off = centre(complex(*state[2:4]), cmath.rect(1, state[4])) - MIDDLE
        far = max(abs(off.real), abs(off.imag)) > 1.5 * spread
        astray = mode == "push" and far and (off * (spin * inwards).conjugate()).real > 0
        lost = mode == "push" and gap(agent, block, spin) > AGENT_RADIUS + 15
        if steps_left <= 0 or lost or astray:
            mode = "choose"
    return states, actions


# ======== Data sets ===================================================================================
# Flat arrays with the column names of the authors' files, all episodes end to end.
#   state (R,7) float32, action (R,2) float32 (action[t] is taken in state[t]), ep_len (E,), ep_offset (E,)
#   int64; where there are pictures, pixels (R,S,S,3) uint8; where there are lessons, lesson (E,) int64.
# States alone are enough: `render` draws them when needed.

COLUMNS = ("state", "action", "ep_len", "ep_offset", "pixels", "lesson")
NARROW = 10                        # px, spread of the block in the first lesson
SPLIT_SEEDS = {"dev": 1_000_000, "test": 2_000_000}  # the first of each; training has those below


def _end_with_the_parent():
    """Before a worker begins: Ctrl-C is its parent's to answer, and where that is killed it ends, too."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def _in_parallel(function, count, workers):
    """[function(0), ..., function(count - 1)] over processes, with a progress bar. Each call seeds itself."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    workers = min(workers or cores or 1, count)
    bar = partial(tqdm, total=count, desc="recording", unit="ep", leave=False, disable=count < 50)
    if workers == 1 or count < 50:  # not worth starting processes for
        return list(bar(map(function, range(count))))
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else None)
    try:
        with ProcessPoolExecutor(workers, context, _end_with_the_parent) as pool:
            return list(bar(pool.map(function, range(count), chunksize=8)))
    except BrokenExecutor as error:
        remedy = 'put what your script does below if __name__ == "__main__":, or pass workers=1'
        raise ValueError(f"recording in several processes failed: {remedy}") from error


def collect(episodes, seed=0, workers=None, spread=SPREAD):
    """Record scripted episodes: {"state", "action", "ep_len", "ep_offset"} as described above.

    An episode depends on (seed, its index, spread) alone: not on `workers` (default: one per core).
    spread: px, std of the block's centre at the start; also how far pushes may lead it, times 1.5."""
    if episodes < 1 or seed < 0 or not 0 < spread < math.inf:
        raise ValueError(f"collect needs episodes >= 1, seed >= 0, spread > 0; got {episodes, seed, spread}")
    states, actions = zip(*_in_parallel(partial(_episode, seed, spread=spread), episodes, workers))
    lengths = np.array([len(some) for some in states], np.int64)
    return {"state": np.concatenate(states), "action": np.concatenate(actions),
            "ep_len": lengths, "ep_offset": np.cumsum(lengths) - lengths}


def collect_lessons(episodes, seed=0, workers=None):
    """Two lessons: a quarter as many episodes with the block near the middle, then `episodes` ordinary ones.

    -> the columns of `collect`, and "lesson" (E,), 0 or 1."""
    narrow = collect(math.ceil(episodes / 4), seed, workers, NARROW)
    ordinary = collect(episodes, seed, workers)
    data = {name: np.concatenate([narrow[name], ordinary[name]]) for name in narrow}
    data["ep_offset"] = np.cumsum(data["ep_len"]) - data["ep_len"]
    return {**data, "lesson": np.repeat([0, 1], [len(narrow["ep_len"]), episodes])}


def held_out_pairs(count, split="test", seed=0, distance=25, workers=None):
    """Planning problems that no training sees -> starts (N,7), goals (N,7), actions (N,distance,2).

    One pair an episode: a random state and the one `distance` env steps later. Starts that already satisfy
    their goal are left out. split "dev" is for choosing settings, "test" for the figure that is reported."""
    if not (split in SPLIT_SEEDS and count >= 1 and 0 <= seed < 1_000_000 and 1 <= distance <= 150):
        needed = "a split of dev or test, count >= 1, 0 <= seed < 1000000, 1 <= distance <= 150"
        raise ValueError(f"held_out_pairs needs {needed}; got {split!r}, {count}, {seed}, {distance}")
    seed, pairs, tried = SPLIT_SEEDS[split] + seed, [], count
    while len(pairs) < count:  # until enough are unsolved
        tried, pairs = int(1.2 * tried) + 5, []
        data = collect(tried, seed, workers)
        for index, (first, length) in enumerate(zip(data["ep_offset"], data["ep_len"])):
            if length > distance:
                t = first + np.random.default_rng([seed, index, 1]).integers(length - distance)
                start, goal = data["state"][[t, t + distance]]
                if not success(start, goal):
                    pairs.append((start, goal, data["action"][t:t + distance]))
    return tuple(np.stack(column) for column in zip(*pairs[:count]))


EXISTS = "{} exists already: choose another --out or delete it first"


@contextmanager
def _whole(path):
    """Where to write what becomes `path` once it is complete; what fails or is stopped leaves nothing."""
    path, folder = Path(path), Path(f"{path}.partial")
    if path.exists():
        raise FileExistsError(EXISTS.format(path))
    shutil.rmtree(folder, ignore_errors=True)  # of a process that was killed
    try:
        folder.mkdir(parents=True)
        yield folder / path.name
        os.replace(folder / path.name, path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def save(path, data):
    """Write a data set as one `.npz`, or as a folder of `.npy` files that `load` maps into memory."""
    with _whole(path) as whole:
        if whole.suffix == ".npz":
            np.savez(whole, **data)
        else:
            whole.mkdir()
            for name, array in data.items():
                np.save(whole / f"{name}.npy", array)


def load(path):
    """Read what `save` wrote, or any `.npz` or folder with the same columns; `ep_offset` may be missing.

    Files in a folder are memory-mapped, so they may be larger than memory. Nothing is executed."""
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no data at {path}; make some: python pusht.py --episodes 2000 --out {path}")
    try:
        if path.is_dir():
            files = [path / f"{name}.npy" for name in COLUMNS if (path / f"{name}.npy").exists()]
            data = {file.stem: np.load(file, mmap_mode="r", allow_pickle=False) for file in files}
        else:
            with np.load(path, allow_pickle=False) as file:
                data = {name: file[name] for name in COLUMNS if name in file}
    except (ValueError, TypeError, EOFError, OSError, AttributeError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is damaged or not a data set of plain arrays: {error}") from error
    for name in ("action", "ep_len"):
        if name not in data:
            raise ValueError(f"{path} lacks {name}; a data set has {', '.join(COLUMNS)}")
    largest = np.nanmax(np.abs(data["action"]), initial=0)
    if largest > 2:
        raise ValueError(f"{path} has actions up to {largest:.0f}, not 1: use (target - agent) / 100 instead")
    data.setdefault("ep_offset", np.cumsum(data["ep_len"]) - data["ep_len"])
    return data


def import_hdf5(source, out, chunk=1024):
    """Convert an HDF5 file in the authors' layout to a folder that `load` maps -> (episodes, rows).

    source: `pixels` (R,S,S,3) uint8, `action` (R,a), and `state` if there is one, with `ep_len` and
    `ep_offset` (E,), or with `episode_idx` and `step_idx` (R,). `chunk` rows are in memory at a time."""
    from lewm import Config, check_data
    try:
        import h5py
        import hdf5plugin  # noqa: F401   importing it registers the decompressors
    except ImportError as error:
        raise ValueError("reading HDF5 needs two more packages: pip install h5py hdf5plugin") from error

    def read(column, rows=slice(None)):  # so that a source that fails is not taken for a full disk
        try:
            return file[column][rows]
        except (OSError, KeyError, RuntimeError) as error:
            raise ValueError(f"{source}: cannot read {column} ({error})") from error

    try:
        file = h5py.File(source, "r")
    except OSError as error:
        raise ValueError(f"{source} is not there, damaged, cut short or no HDF5 file ({error})") from error
    data = {"action": read("action").astype(np.float32)}
    if "ep_len" in file:
        data.update({name: read(name).astype(np.int64).reshape(-1) for name in ("ep_len", "ep_offset")})
    else:
        episode, step = read("episode_idx").reshape(-1), read("step_idx").reshape(-1)
        data["ep_offset"] = np.flatnonzero(np.diff(episode, prepend=episode[0] - 1))
        data["ep_len"] = np.diff(data["ep_offset"], append=len(episode))
        together = len(set(episode)) == len(data["ep_len"])
        if not together or (np.diff(step)[np.diff(episode) == 0] != 1).any():
            raise ValueError(f"{source}: rows of an episode must lie together, in the order of step_idx")
    # arrays as large as what is to be written, for all checks before the first write: they take no memory
    large = {name: np.broadcast_to(np.zeros((), kind or file[name].dtype), file[name].shape)
             for name, kind in (("pixels", None), ("state", np.float32)) if name in file}
    check_data({**large, **data}, Config(action_dim=data["action"].shape[-1]))
    with _whole(out) as whole:
        needed = sum(array.nbytes for array in large.values())
        free = shutil.disk_usage(whole.parent).free
        if needed > free:
            raise OSError(f"{out} needs {needed / 1e9:.1f} GB, its disk has {free / 1e9:.1f} GB left")
        whole.mkdir()
        for name, array in data.items():
            np.save(whole / f"{name}.npy", array)
        for name, array in large.items():
            with open(whole / f"{name}.npy", "wb") as target:  # as np.save does, but in chunks
                np.lib.format.write_array_header_1_0(target, np.lib.format.header_data_from_array_1_0(array))
                for start in tqdm(range(0, len(array), chunk), desc=f"importing {name}"):
                    target.write(read(name, slice(start, start + chunk)).astype(array.dtype).tobytes())
    return len(data["ep_len"]), len(data["action"])


# ======== Evaluation ==================================================================================
# The planner on held-out pairs, beside three baselines on the same ones. A rate without its interval and its
# baselines says little, so they are always reported together.

def wilson(successes, n):
    """95 % Wilson score interval of a success rate -> (low, high)."""
    rate, q = successes / n, 1.96
    middle, half = rate + q * q / (2 * n), q * math.sqrt(rate * (1 - rate) / n + q * q / (4 * n * n))
    return max(0.0, (middle - half) / (1 + q * q / n)), min(1.0, (middle + half) / (1 + q * q / n))


def score(histories, goals):
    """states (L,7) of each episode, goals (E,7) -> success rate, interval, and how far off the ends are."""
    won = [bool(success(states, goal).any()) for states, goal in zip(histories, goals)]
    object_won = [success(states, goal, object_only=True).any() for states, goal in zip(histories, goals)]
    agent, block, turn = distances(np.stack([states[-1] for states in histories]), goals)
    return {"success": np.mean(won), "interval": wilson(sum(won), len(won)), "won": won,
            "object_success": np.mean(object_won), "final_agent_px": agent.mean(),
            "final_block_px": block.mean(), "final_turn_deg": turn.mean()}


def environments(starts, goals, size):
    """One environment for each start and goal (E,7), with pictures of `size` px."""
    made = [PushT(size) for _ in starts]
    for env, start, goal in zip(made, starts, goals):
        env.reset(options={"state": start, "goal": goal})
    return made


def baselines(recorded, budget, action_stats, seed=0):
    """-> {name: policy for lewm.play}. recorded (E,k,2): actions that lead to the goals.

    action_stats (4,2): mean, std, lowest and highest of the random actions."""
    mean, std, low, high = action_stats
    idle = np.zeros((len(recorded), budget, 2))
    noise = [np.random.default_rng([seed, e]).normal(mean, std, (budget, 2)) for e in range(len(recorded))]
    random, replayed = np.clip(noise, low, high), np.concatenate([recorded, idle], axis=1)
    return {"random actions": lambda running, _: random[running],
            "doing nothing": lambda running, _: idle[running],
            "recorded actions": lambda running, _: replayed[running]}


def plan_lengths(cfg, steps):
    """Blocks in each of the plans that a lewm.Planner makes in an episode of so many env steps."""
    played = range(math.ceil(steps / cfg.frame_skip))           # blocks before a plan
    return [cfg.horizon - t % cfg.horizon for t in played if t % cfg.horizon % cfg.replan == 0]


def evaluate(model, cfg, pairs, seed=0, gif=None, planner=None):
    """Plan with a LeWM on pairs of `held_out_pairs` and play the baselines on them -> a dictionary for JSON.

    cfg: a Config, for the planner's settings. seed: of the planner's noise. gif: where to draw two outcomes.
    planner: instead of a new lewm.Planner."""
    from lewm import Planner, play                              # only here: this file stands alone
    (starts, goals, recorded), size = pairs, cfg.image_size
    if planner is None:
        planner = Planner(model, render(goals, size).permute(0, 2, 3, 1).numpy(), cfg, seed)
    others = baselines(recorded, cfg.budget, model.action_stats.cpu().numpy(), seed)
    result = {"episodes": len(starts), "policies": {}}
    for name, policy in {"LeWM + CEM": planner, **others}.items():
        began = time.time()
        histories, _ = play(environments(starts, goals, size), policy, cfg.budget)
        result["policies"][name] = score(histories, goals)
        if policy is planner:
            plans = sum(len(plan_lengths(cfg, len(states))) for states in histories)
            result["seconds_per_plan"] = (time.time() - began) / plans
            if gif:
                draw_outcomes(gif, starts, goals, histories)
    return result


def table(result):
    """What `evaluate` returned, as text."""
    lines = [f"{'':18}success   95 % interval   object only   at the end: agent px  block px  turn deg"]
    for name, row in result["policies"].items():
        lines.append("{:18}{success:6.1%}   {:6.1%} - {:6.1%}   {object_success:10.1%}{final_agent_px:24.0f}"
                     "{final_block_px:10.0f}{final_turn_deg:10.0f}".format(name, *row["interval"], **row))
    return "\n".join(lines)


def save_gif(path, frames, fps=10):
    """frames (N,H,W,3) uint8 -> a looping GIF."""
    from PIL import Image                                                   # comes with matplotlib
    images = [Image.fromarray(frame).quantize(64, dither=Image.Dither.NONE) for frame in frames]
    images[0].save(path, save_all=True, append_images=images[1:], duration=round(1000 / fps), loop=0)


def draw_outcomes(path, starts, goals, histories, size=160):
    """A GIF of the first success and, below it, the first failure: start, goal, what happened."""
    won = np.array([success(states, goal).any() for states, goal in zip(histories, goals)])
    chosen = [e for outcome in (True, False) for e in np.flatnonzero(won == outcome)[:1]]
    length = max(len(histories[e]) for e in chosen) + 9  # the last picture stays a while
    rows = []
    for e in chosen:
        states = np.concatenate([starts[e][None], histories[e]])
        shown = [(starts[e], goals[e], states[min(t, len(states) - 1)]) for t in range(length)]
        pictures = render(np.reshape(shown, (-1, 7)), size).permute(0, 2, 3, 1).numpy()
        framed = np.pad(pictures, ((0, 0), (2, 2), (2, 2), (0, 0)), constant_values=120)
        rows.append(np.concatenate([framed[column::3] for column in range(3)], axis=2))
    save_gif(path, np.concatenate(rows, axis=1))


MARKS = {"val_prediction": None, "sigreg": 1.0525, "std": 1, "effective_rank": None, "val_shuffled_ratio": 1,
         "straightness": -0.5, "grad_norm": 1, "lr": None}      # what to compare each curve with


def read_metrics(run):
    """metrics.csv in the folder of a training, as columns; None where there is none, or no row yet."""
    path = Path(run) / "metrics.csv"
    there = path.is_file() and path.stat().st_size > 1
    return np.genfromtxt(path, delimiter=",", names=True, ndmin=1) if there else None


def draw_curves(out):
    """out/metrics.csv -> out/curves.png: what to look at after training; the README explains the marks."""
    from matplotlib.figure import Figure
    rows = read_metrics(out)
    beside = {"val_prediction": ("prediction", "val_copy_last"), "std": ("min_std",)}
    figure = Figure(figsize=(15, 6), layout="constrained")
    for axis, (name, mark) in zip(figure.subplots(2, 4).flat, MARKS.items()):
        for style, column in zip(("k-", "k--", "k:"), (name, *beside.get(name, ()))):
            axis.plot(rows["step"], rows[column], style, label=column)
        if mark is not None:
            axis.axhline(mark, color="tab:orange")
        log = name in ("val_prediction", "sigreg", "grad_norm")
        axis.set(xlabel="step", yscale="log" if log else "linear")
        axis.legend(fontsize=8)
    figure.savefig(Path(out) / "curves.png")


# ======== Command line ================================================================================

def parse_arguments(argv):
    parser = argparse.ArgumentParser(description="Push-T: record episodes, or see one.", allow_abbrev=False)
    parser.error = lambda text: sys.exit(f"pusht.py: {text}; python pusht.py --help lists all flags")
    flag = parser.add_argument
    flag("--episodes", type=int, metavar="N", help="record N episodes")
    flag("--seed", type=int, default=0, help="same seed, same episodes; default 0, from 1000000 on: held out")
    flag("--workers", type=int, help="processes; default: one per core; does not change the data")
    flag("--import", dest="source", metavar="FILE.h5", help="convert the authors' data to a folder")
    flag("--out", metavar="PATH", help="a folder (memory-mapped when read) or a file that ends in .npz")
    flag("--show", metavar="PATH.gif", help="draw the first episode of --seed")
    args = parser.parse_args(argv or ["--help"])
    if not (args.out if args.episodes or args.source else args.show):
        parser.error("say --show PATH.gif, --episodes N --out PATH or --import FILE.h5 --out PATH")
    if (args.episodes or args.source) and Path(args.out).exists():  # refused now, not after minutes
        parser.error(EXISTS.format(args.out))
    return args


def main(argv):
    args, began = parse_arguments(argv), time.time()
    if args.show:
        states, _ = _episode(args.seed, 0)
        save_gif(args.show, render(states).permute(0, 2, 3, 1).numpy())
        print(f"{args.show}: {len(states)} steps of 0.1 s")
    if args.episodes:
        data = collect(args.episodes, args.seed, args.workers)
        save(args.out, data)
        print(f"{args.out}: {args.episodes} episodes, {len(data['action']):,} steps, "
              f"{time.time() - began:.0f} s; std of the actions {data['action'].std(0).mean():.2f}")
    if args.source:
        episodes, rows = import_hdf5(args.source, args.out)
        print(f"{args.out}: {episodes:,} episodes, {rows:,} rows, {time.time() - began:.0f} s")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"pusht.py: {' '.join(str(error).split())}")
    except KeyboardInterrupt:
        sys.exit("pusht.py: stopped")
