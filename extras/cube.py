"""A robot arm that moves a cube: OGBench's cube-single, recorded, learned from pixels and planned in.

    pip install ogbench
    python -m extras.cube               # or copy this file beside lewm.py: python cube.py

Where there is no screen, begin with MUJOCO_GL=egl or MUJOCO_GL=osmesa. The cube should come within 4 cm of
where it was 25 env steps later in a held-out episode, at any of 50 env steps; the arm does not count. In some
of these pairs it hardly moves: the second line of each policy is of those in which it moves by 4 cm or more.
A picture is three views: from above, from the front, and from above the gripper, turned with it, as a camera
at the wrist would see. Without the third, nobody could see how the cube is turned. Only the cube and the
fingertips are drawn: the whole gripper takes many times as long. Five env steps (of five numbers: move
along x, y and z, turn, close) are one action here, a block, so only every fifth state is drawn.
"""

import argparse
import dataclasses
import sys
from pathlib import Path

import numpy as np
from PIL import Image

import lewm

SIZE = 64           # px, side of a picture
FINE = 4            # pictures are drawn this many times larger, and averaged
SKIP = 5            # env steps in a block
BLOCKS = 40         # blocks in a recorded episode
AHEAD = 5           # blocks from start to goal
NEAR = 0.04         # m, between the cube's centre and the goal's
CUBE = slice(14, 17)    # the numbers of a state that are the cube's centre, m

def simulator():
    import mujoco
    from ogbench.manipspace.envs.cube_env import CubeEnv
    from ogbench.manipspace.oracles.markov.cube_markov import CubeMarkovOracle
    arm = CubeEnv("single", mode="data_collection", terminate_at_goal=False, visualize_info=False,
                  width=FINE * SIZE, height=FINE * SIZE // 2)
    arm.reset(seed=0)
    arm.script = CubeMarkovOracle(env=arm)
    model = arm.model
    model.vis.quality.offsamples = 0
    model.vis.headlight.ambient[:] = 1                                  # flat colours,
    model.light_active[:] = False
    model.tex_data[:] = 0                                               # and no stars in the sky
    model.geom_group[:] = 3                                             # this group is not drawn
    model.geom("object_0").group = 0
    for name in ("left_pad1", "left_pad2", "right_pad1", "right_pad2"):
        model.geom("ur5e/robotiq/" + name).group = 0
        model.geom("ur5e/robotiq/" + name).rgba = (0, 1, 0, 1)
    model.vis.global_.orthographic = True                               # no perspective
    arm.eye = mujoco.MjvCamera()
    mujoco.mjv_defaultFreeCamera(model, arm.eye)
    return arm

def make_arm():
    """-> the simulator, with OGBench's script. All environments share it: each puts its own state there."""
    try:
        arm = simulator()
        picture(arm)
    except ImportError as error:
        raise ValueError(f"this world needs one more package: pip install ogbench ({error})") from error
    except Exception as error:                          # of many kinds, by platform
        raise ValueError(f"MuJoCo cannot draw here: begin with MUJOCO_GL=egl or osmesa ({error})") from error
    return arm

def view(arm, centre, azimuth, elevation, height, width):
    """What is around `centre` (3,), seen from there (degrees), `height` m high. -> float (SIZE/2,width,3), in
    px: squeezed, if `width` is below SIZE."""
    arm.model.vis.global_.fovy = height
    arm.eye.lookat[:] = centre
    arm.eye.azimuth = azimuth
    arm.eye.elevation = elevation
    fine = arm.render(camera=arm.eye)                                   # (FINE*SIZE/2,FINE*SIZE,3)
    return fine.reshape(SIZE // 2, FINE, width, -1, 3).mean((1, 3))

def picture(arm):
    """-> uint8 (SIZE,SIZE,3): from above; below that from the front, squeezed, and around the gripper."""
    table = 0.425, 0, 0.19
    gripper = arm.data.site("ur5e/robotiq/pinch")
    turn = np.degrees(np.arctan2(gripper.xmat[3], gripper.xmat[0]))
    above = view(arm, table, 180, -90, 0.41, SIZE)
    front = view(arm, table, 180, 0, 0.41, SIZE // 2)
    near = view(arm, gripper.xpos, turn, -90, 0.12, SIZE)[:, SIZE // 4:-SIZE // 4]
    return np.vstack([above, np.hstack([front, near])]).round().astype(np.uint8)

def state_of(arm):
    """-> (41,): positions of joints and cube, and their speeds."""
    return np.concatenate([arm.data.qpos, arm.data.qvel])

def put(arm, state):
    """So begins each block, recorded or played, which makes a replay exact."""
    arm.data.qacc_warmstart[:] = 0                                      # all that the solver remembers
    arm.set_state(*np.split(state, [arm.model.nq]))

class Cube:
    """The environment: `step` and `render`, as lewm.play needs them. A step is a block (25,)."""
    def __init__(self, arm, state, goal):
        self.arm = arm
        self.state = state                                              # (41,)
        self.goal = goal                                                # (3,), m
        self.frames = []                                                # all that was rendered

    def step(self, block):
        put(self.arm, self.state)
        for action in np.clip(block, -1, 1).reshape(SKIP, 5):
            self.arm.step(action)
            reached = np.linalg.norm(self.arm.data.qpos[CUBE] - self.goal) <= NEAR
            if reached:
                break
        self.state = state_of(self.arm)
        return self.state, float(reached), reached, False, {}

    def render(self):
        put(self.arm, self.state)
        self.frames.append(picture(self.arm))
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

def record(arm, episodes, seed):
    """The script brings the cube to random places, with the noise of OGBench's "noisy" data. -> of each block
    the picture and the state at its beginning, and its actions: (n,SIZE,SIZE,3), (n,41), (n,25)."""
    rows = []
    for episode in lewm.trange(episodes, desc="recording", disable=sys.stderr is None):
        np.random.seed([seed, episode])                                 # the script draws from it, too
        seen, info = arm.reset(seed=1_000_000 * seed + episode)
        arm.script.reset(seen, info)
        noise = np.random.uniform(0, 0.1) * np.array([1, 1, 1, 3, 10])
        for _ in range(BLOCKS):
            put(arm, state_of(arm))
            rows.append([picture(arm), state_of(arm), []])
            for _ in range(SKIP):
                action = arm.script.select_action(seen, info) + noise * np.random.normal(size=5)
                if np.random.random() < 0.1:
                    action = np.random.uniform(-1, 1, 5)
                rows[-1][2].extend(np.clip(action, -1, 1))
                seen, _, _, _, info = arm.step(rows[-1][2][-5:])
                if arm.script.done:
                    seen, info = arm.set_new_target(p_stack=0)
                    arm.script.reset(seen, info)
    return [np.array(column) for column in zip(*rows)]

def trained(arm, episodes, steps, out=None):
    """Record and train -> LeWM. out: folder of the checkpoint, from which a stopped training goes on."""
    pixels, _, actions = record(arm, episodes, seed=0)
    data = {"pixels": pixels, "action": np.float32(actions),
            "ep_len": np.full(episodes, BLOCKS), "ep_offset": BLOCKS * np.arange(episodes)}
    cfg = lewm.Config.preset("nano", action_dim=5 * SKIP, frame_skip=1, first_lesson_share=0.0, steps=steps,
                             patch_size=32, lr=1e-3, proposal_horizon=AHEAD)
    return lewm.train(cfg, data, out=out, resume=True)

def main(episodes=600, steps=6000, pairs=300, out=None):
    """Train, and plan for held-out pairs of start and goal -> {policy: bool (pairs,), goal reached}."""
    arm = make_arm()
    model = trained(arm, episodes, steps, out)
    pixels, states, actions = record(arm, 1 + pairs // 4, seed=1)       # held out
    starts = np.arange(len(states)).reshape(-1, BLOCKS)[:, :-AHEAD].ravel()
    starts = np.random.default_rng(2).permutation(starts)[:pairs]
    goals = states[starts + AHEAD, CUBE]
    goal_pictures = pixels[starts + AHEAD]
    moved = np.linalg.norm(goals - states[starts, CUBE], axis=1) >= NEAR
    random = np.random.default_rng(3).uniform(-1, 1, (pairs, 2 * AHEAD, 5 * SKIP))
    policies = {
        "LeWM + CEM": {},
        "proposal alone": {"iterations": 0},
        "search alone": lewm.FULL_SEARCH,
        "random actions": lambda running, _: random[running],
        "doing nothing": lambda running, _: 0 * random[running],
        "recorded actions": lambda running, _: actions[starts[running, None] + np.arange(AHEAD)]}
    cfg = model.cfg
    won = {}
    for name, policy in policies.items():
        if isinstance(policy, dict):
            model.cfg = dataclasses.replace(cfg, **policy)
            policy = lewm.Planner(model, goal_pictures)
        environments = [Cube(arm, states[start], goal) for start, goal in zip(starts, goals)]
        _, won[name] = lewm.play(environments, policy, 2 * AHEAD, name)
        if out and len(won) == 1:                                       # the first policy
            film(Path(out, "plan.gif"), environments, goal_pictures)
        for kind, wins in (("all", won[name]), ("moved", won[name][moved])):
            low, high = lewm.wilson(wins.sum(), len(wins))
            print(f"{name:17}{kind:6}{wins.mean():6.1%} of {len(wins)} ({low:.0%} to {high:.0%})", flush=True)
    return won

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="A robot arm and a cube: recorded, learned, planned in.")
    parser.add_argument("--episodes", type=int, default=600, help="episodes to record; default: 600")
    parser.add_argument("--steps", type=int, default=6000, help="optimizer steps; default: 6000")
    parser.add_argument("--pairs", type=int, default=300, help="starts and goals to plan for; default: 300")
    parser.add_argument("--out", default="runs/cube", help="folder of the training; default: runs/cube")
    try:
        main(**vars(parser.parse_args()))
    except (ValueError, OSError) as error:
        sys.exit(f"cube.py: {error}")
    except KeyboardInterrupt:
        sys.exit("cube.py: stopped; the same command goes on")
