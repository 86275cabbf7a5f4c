"""A world with speed: MuJoCo's Reacher-v5 from pixels, planned from three frames and from one.

    pip install "gymnasium[mujoco]"
    python -m extras.reacher            # or copy this file beside lewm.py: python reacher.py

Where there is no screen, begin with MUJOCO_GL=egl or MUJOCO_GL=osmesa. The arm starts as it was in a held-out
episode, moving, and should come to how it stood 25 env steps later: both joint angles within 0.15 rad (9
degrees), at any of 50 env steps. The target is made invisible: it is constant within an episode, so
predicting it is free. It would fill the embedding, and the model would ignore its actions.
"""

import argparse
import dataclasses
import sys

import numpy as np

import lewm

SIZE = 64           # px, side of a picture
TORQUE = 0.05       # std of the recorded torques; 1 is the largest, which would spin the arm
NEAR = 0.15         # rad, for both joints
LENGTH = 50         # env steps in a recorded episode

def make_arm():
    """-> the simulator, seen from above. All environments share it: each puts its own state there."""
    try:
        import gymnasium
        import mujoco  # noqa: F401   gymnasium needs it
    except ImportError as error:
        raise ValueError('this world needs more packages: pip install "gymnasium[mujoco]"') from error
    from_above = {"distance": 0.62, "elevation": -90.0, "azimuth": 90.0, "lookat": np.zeros(3)}
    arm = gymnasium.make("Reacher-v5", render_mode="rgb_array", width=SIZE, height=SIZE,
                         default_camera_config=from_above).unwrapped
    arm.reset(seed=0)
    arm.model.geom("target").rgba[3] = 0
    return arm

def state_of(arm):
    """-> (2,4): angles of the two joints and the target's place; their speeds."""
    return np.stack([arm.data.qpos, arm.data.qvel])

def turn(angles, goal):
    """How far joint angles (...,2) are from the goal's, rad (...): the larger of the two."""
    difference = (angles - goal + np.pi) % (2 * np.pi) - np.pi
    return abs(difference).max(-1)

class Reacher:
    """The environment: `step` and `render`, as lewm.play needs them. state (2,4), goal (2,), angles."""
    def __init__(self, arm, state, goal):
        self.arm = arm
        self.state = state
        self.goal = goal

    def step(self, action):
        self.arm.set_state(*self.state)
        self.arm.step(np.clip(action, -1, 1))
        self.state = state_of(self.arm)
        reached = turn(self.state[0, :2], self.goal) < NEAR
        return self.state, float(reached), reached, False, {}

    def render(self):
        self.arm.set_state(*self.state)
        return self.arm.render()

def record(arm, episodes, seed):
    """Smooth random torques, from rest -> pixels (episodes,LENGTH,SIZE,SIZE,3), actions (episodes,LENGTH,2),
    states (episodes,LENGTH,2,4)."""
    rng = np.random.default_rng(seed)
    pixels = []
    actions = []
    states = []
    for _ in range(episodes):
        angles = rng.uniform(-3, 3, 2)
        arm.set_state(np.append(angles, [0, 0]), np.zeros(4))
        action = TORQUE * rng.normal(size=2)
        for _ in range(LENGTH):
            pixels.append(arm.render())
            actions.append(action)
            states.append(state_of(arm))
            arm.step(action)
            action = 0.9 * action + 0.44 * TORQUE * rng.normal(size=2)
    rows = (episodes, LENGTH)
    return (np.reshape(pixels, (*rows, SIZE, SIZE, 3)), np.reshape(actions, (*rows, 2)),
            np.reshape(states, (*rows, 2, 4)))

def trained(arm, episodes, steps, out=None):
    """Record episodes and train on them -> LeWM. out: folder of the checkpoint, from which a stopped training
    goes on."""
    pixels, actions, _ = record(arm, episodes, seed=0)
    data = {
        "pixels": pixels.reshape(-1, SIZE, SIZE, 3),
        "action": np.float32(actions).reshape(-1, 2),
        "ep_len": np.full(episodes, LENGTH),
        "ep_offset": LENGTH * np.arange(episodes)}
    cfg = lewm.Config.preset("nano", first_lesson_share=0.0, patch_size=32, embed_dim=8, steps=steps, lr=1e-3,
                             proposal_steps=0, candidates=100, iterations=8, elites=15)
    return lewm.train(cfg, data, out=out, resume=True)

def main(episodes=400, steps=2200, pairs=100, out=None):
    """Train, and plan for held-out pairs of start and goal -> {policy: bool (pairs,), goal reached}."""
    arm = make_arm()
    model = trained(arm, episodes, steps, out)
    pixels, actions, states = record(arm, 2 * pairs, seed=1)            # held out
    starts = states[:, 20]                                              # (n,2,4)
    angles = states[:, 45, 0, :2]                                       # (n,2), the goals
    far = np.flatnonzero(turn(starts[:, 0, :2], angles) > NEAR)[:pairs]
    random = np.random.default_rng(2).choice(actions.reshape(-1, 2), (len(far), 50))
    policies = {
        "LeWM + CEM, 3 frames": 3,
        "LeWM + CEM, 1 frame": 1,
        "random torques": lambda running, _: random[running],
        "no torque": lambda running, _: 0 * random[running],
        "recorded torques": lambda running, _: actions[far[running], 20:45]}
    won = {}
    for name, policy in policies.items():
        if isinstance(policy, int):
            model.cfg = dataclasses.replace(model.cfg, context=policy)
            policy = lewm.Planner(model, pixels[far, 45])
        environments = [Reacher(arm, starts[e], angles[e]) for e in far]
        _, won[name] = lewm.play(environments, policy, budget=50)
        low, high = lewm.wilson(won[name].sum(), len(far))
        print(f"{name:22}{won[name].mean():6.0%}   (95 % interval: {low:.0%} to {high:.0%})", flush=True)
    return won

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="MuJoCo's Reacher from pixels, learned and planned in.")
    parser.add_argument("--episodes", type=int, default=400, help="episodes to record; default: 400")
    parser.add_argument("--steps", type=int, default=2200, help="optimizer steps; default: 2200")
    parser.add_argument("--pairs", type=int, default=100, help="starts and goals to plan for; default: 100")
    parser.add_argument("--out", default="runs/reacher", help="folder of the training; default: runs/reacher")
    try:
        main(**vars(parser.parse_args()))
    except (ValueError, OSError) as error:
        sys.exit(f"reacher.py: {error}")
    except KeyboardInterrupt:
        sys.exit("reacher.py: stopped; the same command goes on")
