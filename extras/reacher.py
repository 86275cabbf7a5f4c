"""A world with speed: dm_control's arm from pixels, by the rules of the LeWM authors' Reacher.

    pip install mujoco
    python -m extras.reacher            # or copy this file beside lewm.py: python reacher.py

Where there is no screen, begin with MUJOCO_GL=egl or MUJOCO_GL=osmesa. Data: new random torques at every env
step (0.04 s). Planning: from a moving start, come to how the arm stood 25 env steps later in a held-out
episode. At any moment of 50, both joints must be within 0.05 rad (3 degrees) of that, at any speed.
dm_control's target is left out: it is constant within an episode, so predicting it is free, and it would fill
the embedding. A block of five env steps is one action of ten torques here, so only every fifth is drawn.
"""

import argparse
import dataclasses
import sys
import types
from pathlib import Path

import numpy as np
from PIL import Image

import lewm

SIZE = 64                       # px, side of a picture
TORQUES = 10                    # numbers in a block: five env steps of two joints
LENGTH = 20                     # blocks in a recorded episode
START, GOAL = 5, 10             # the blocks of an episode at which a held-out pair starts and ends
BUDGET = 10                     # blocks allowed
RULES = 0.05, 0.15              # rad: the authors' rule, and an easier one

XML = """<mujoco>
  <option timestep="0.02"> <flag contact="disable"/> </option>
  <visual> <quality offsamples="0"/> </visual>
  <default> <geom type="capsule" size="0.01" rgba="0.7 0.5 0.3 1"/> <joint axis="0 0 1" damping="0.01"/>
    <motor gear="0.05" ctrlrange="-1 1"/> </default>
  <worldbody> <light pos="0 0 1" castshadow="false"/> <camera pos="0 0 0.75"/>
    <body pos="0 0 0.01"> <joint name="shoulder"/> <geom fromto="0 0 0  0.12 0 0"/>
      <body pos="0.12 0 0"> <joint name="wrist" range="-160 160"/> <geom fromto="0 0 0  0.1 0 0"/>
        <geom type="sphere" pos="0.12 0 0" rgba="0.7 0.4 0.2 1"/> </body> </body> </worldbody>
  <actuator> <motor joint="shoulder"/> <motor joint="wrist"/> </actuator>
</mujoco>"""

def make_arm():
    """-> what all environments share: MuJoCo, its model of the arm, and what draws it."""
    try:
        import mujoco
        model = mujoco.MjModel.from_xml_string(XML)
        renderer = mujoco.Renderer(model, 2 * SIZE, 2 * SIZE)
    except ImportError as error:
        raise ValueError(f"this world needs one more package: pip install mujoco ({error})") from error
    except Exception as error:                          # of many kinds, by platform
        raise ValueError(f"MuJoCo cannot draw here: begin with MUJOCO_GL=egl or osmesa ({error})") from error
    return types.SimpleNamespace(mujoco=mujoco, model=model, renderer=renderer)

class Reacher:
    """The environment: `step` and `render`, as lewm.play needs them. A step is a block of five env steps.
    state (4,): the angles of shoulder and wrist in rad, their speeds in rad/s. goal (2,): two angles."""
    def __init__(self, arm, state, goal):
        self.arm = arm
        self.goal = goal
        self.data = arm.mujoco.MjData(arm.model)
        self.data.qpos[:] = state[:2]
        self.data.qvel[:] = state[2:]
        self.frames = []                                                # all that was rendered

    def step(self, action):
        """Observed: how far off the worse joint was at the best moment, in rad. Angles do not wrap."""
        nearest = np.inf
        for torques in np.repeat(action.reshape(5, 2), 2, axis=0):      # an env step is two time steps
            self.data.ctrl[:] = torques                                 # MuJoCo clips them to [-1, 1]
            self.arm.mujoco.mj_step(self.arm.model, self.data)
            nearest = min(nearest, abs(self.data.qpos - self.goal).max())
        return nearest, -nearest, nearest < RULES[0], False, {}

    def render(self):
        """Drawn twice as large: the mean of four pixels shows also a move of less than a pixel."""
        self.arm.mujoco.mj_forward(self.arm.model, self.data)
        self.arm.renderer.update_scene(self.data, camera=0)
        fine = self.arm.renderer.render()
        self.frames.append(fine.reshape(SIZE, 2, SIZE, 2, 3).mean((1, 3)).astype(np.uint8))
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
    """Episodes from rest -> pixels (episodes,LENGTH,SIZE,SIZE,3), blocks (...,TORQUES), states (...,4)."""
    rng = np.random.default_rng(seed)
    angles = rng.uniform(-1, 1, (episodes, 2)) * np.radians([180, 160])
    blocks = rng.uniform(-1, 1, (episodes, LENGTH, TORQUES)).astype(np.float32)
    pixels = np.zeros((episodes, LENGTH, SIZE, SIZE, 3), np.uint8)
    states = np.zeros((episodes, LENGTH, 4))
    for e in lewm.trange(episodes, desc="recording", disable=sys.stderr is None):
        env = Reacher(arm, [*angles[e], 0, 0], angles[e])
        for t in range(LENGTH):
            states[e, t] = [*env.data.qpos, *env.data.qvel]
            pixels[e, t] = env.render()
            env.step(blocks[e, t])
    return pixels, blocks, states

def trained(arm, episodes, steps, seed=0, out=None):
    """Record and train -> LeWM. out: folder of the checkpoint, from which a stopped training goes on."""
    pixels, blocks, _ = record(arm, episodes, seed)
    data = {"pixels": pixels.reshape(-1, SIZE, SIZE, 3), "action": blocks.reshape(-1, TORQUES),
            "ep_len": np.full(episodes, LENGTH), "ep_offset": LENGTH * np.arange(episodes)}
    cfg = lewm.Config.preset("nano", first_lesson_share=0.0, action_dim=TORQUES, frame_skip=1, embed_dim=8,
                             patch_size=32, encoder_width=128, encoder_depth=2, steps=steps, lr=1e-3,
                             seed=seed, proposal_steps=3000, proposal_horizon=GOAL - START)
    return lewm.train(cfg, data, out=out, resume=True)

def main(episodes=1500, steps=2000, pairs=200, seed=0, out=None):
    """Train, and plan for held-out pairs of start and goal -> {policy: bool (pairs,), within RULES[0]}."""
    arm = make_arm()
    model = trained(arm, episodes, steps, seed, out)
    cfg = model.cfg
    pixels, blocks, states = record(arm, 2 * pairs, seed=1_000_000)     # held out

    def play(policy, chosen):
        environments = [Reacher(arm, states[e, START], states[e, GOAL, :2]) for e in chosen]
        histories, _ = lewm.play(environments, policy, BUDGET)
        return environments, np.array([history.min() for history in histories])     # and (n,) rad

    nothing = np.zeros((2 * pairs, BUDGET, TORQUES))
    _, nearest = play(lambda running, _: nothing[running], range(2 * pairs))
    idle = nearest < RULES[0]
    far = np.flatnonzero(~idle)[:pairs]
    print(f"{idle.sum()} of {len(idle)} pairs are left out: without torques the arm comes by its goal")
    policies = {                                                        # settings of the planner, or torques
        "LeWM + CEM from a proposal, 3 frames": {},
        "the same from 1 frame": {"context": 1},
        "the proposal alone": {"iterations": 0},
        "search alone, 3 frames": lewm.FULL_SEARCH,
        "random torques": np.random.default_rng(2).uniform(-1, 1, nothing.shape),
        "no torque": nothing,
        "recorded torques": blocks[far, START:GOAL]}
    won = {}
    for name, plans in policies.items():
        policy = lambda running, _: plans[running]
        if isinstance(plans, dict):
            model.cfg = dataclasses.replace(cfg, **plans)
            policy = lewm.Planner(model, pixels[far, GOAL])
        environments, nearest = play(policy, far)
        if out and not won:                                             # the first policy
            film(Path(out, "plan.gif"), environments, pixels[far, GOAL])
        row = f"{name:36}"
        for rule in RULES:
            low, high = lewm.wilson((nearest < rule).sum(), len(far))
            row += f"   {rule} rad: {(nearest < rule).mean():4.0%} ({low:.0%} to {high:.0%})"
        print(row, flush=True)
        won[name] = nearest < RULES[0]
    return won

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="dm_control's arm from pixels, learned and planned in.")
    for name, default in (("episodes", 1500), ("steps", 2000), ("pairs", 200), ("seed", 0),
                          ("out", "runs/reacher")):
        parser.add_argument(f"--{name}", type=type(default), default=default, help=f"default: {default}")
    try:
        main(**vars(parser.parse_args()))
    except (ValueError, OSError) as error:
        sys.exit(f"reacher.py: {error}")
    except KeyboardInterrupt:
        sys.exit("reacher.py: stopped; the same command goes on")
