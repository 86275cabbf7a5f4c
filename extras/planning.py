"""What the parts of the planner give, on Push-T and with one trained model.

    python -m extras.planning assets/nano.pt rollouts   # success against rollouts a plan, and a picture
    python -m extras.planning assets/nano.pt goals      # goals that nobody recorded
    python -m extras.planning assets/nano.pt far        # goals 25, 50 and 75 env steps away

Each takes an hour or so on one core; --pairs shortens it. A row is written as soon as it is measured, and a
command that was stopped goes on with the next row.
"""

import argparse
import dataclasses
import json
import math
import os
import sys
import time
from pathlib import Path

import numpy as np

import lewm
import pusht
from extras.compare import written

PROPOSAL_ALONE = {"iterations": 0}
SEARCHES = {                                            # by the number of rollouts a plan
    32: {"candidates": 16, "iterations": 2, "elites": 4},
    120: {"candidates": 30, "iterations": 4, "elites": 5},
    384: {"candidates": 64, "iterations": 6, "elites": 8},
    1800: {"candidates": 150, "iterations": 12, "elites": 15}}

def planned(model, starts, goals, budget):
    """Plan and play -> the states (k,7) of each episode, and the planner."""
    planner = lewm.Planner(model, pusht.pictures(goals, model.cfg.image_size))
    environments = pusht.environments(starts, goals, model.cfg.image_size)
    return lewm.play(environments, planner, budget)[0], planner

def measure(model, pairs, **changes):
    """Plan on pairs with some settings of the planner changed -> one row of numbers."""
    model.cfg = dataclasses.replace(model.cfg, **changes)
    starts, goals, _ = pairs
    began = time.monotonic()
    histories, planner = planned(model, starts, goals, model.cfg.budget)
    row = {"seconds_per_plan": (time.monotonic() - began) / planner.plans, **pusht.score(histories, goals)}
    return {**row, "interval": lewm.wilson(sum(row["won"]), len(starts)), "settings": changes}

def measure_all(path, rows, load):
    """rows {name: (pairs, changes)} -> {name: numbers}; those that are in the file `path` already stay."""
    saved = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"of": load.of, "rows": {}}
    lewm.require(saved["of"] == load.of, f"{path} is of {saved['of']}, not {load.of}: use another --out")
    done = saved["rows"]
    for name, (pairs, changes) in rows.items():
        if name not in done:
            done[name] = measure(load(), pairs, **changes)
            written(path, saved)
        row = done[name]
        low, high = row["interval"]
        print(f"{name:34} {row['success']:6.1%} ({low:5.1%} - {high:6.1%}), the T alone "
              f"{row['object_success']:6.1%}; {1000 * row['seconds_per_plan']:4.0f} ms a plan", flush=True)
    return done

# ======== Success against rollouts a plan =============================================================

STARTS = {"from a proposal": {}, "from nothing": {"use_proposal": False}}

def rollouts(load, out, pairs, split):
    """Search from a proposal and from nothing with 32 to 1,800 rollouts a plan, and the proposal alone."""
    problems = pusht.held_out_pairs(pairs, split)
    rows = {"the proposal alone": (problems, PROPOSAL_ALONE)}
    for start, begin in STARTS.items():
        for count in SEARCHES:
            rows[f"{start}, {count}"] = (problems, {**begin, **SEARCHES[count]})
    done = measure_all(out / "rollouts.json", rows, load)
    lewm.draw(draw_rollouts, out / "rollouts.png", done)

def draw_rollouts(path, rows):
    from matplotlib.figure import Figure
    figure = Figure(figsize=(7, 4), layout="constrained")
    axis = figure.subplots()
    alone = rows["the proposal alone"]
    axis.axhline(alone["success"], color="tab:orange", label="the proposal alone, no search")
    axis.axhspan(*alone["interval"], color="tab:orange", alpha=0.1, linewidth=0)
    for start, colour in zip(STARTS, ("tab:blue", "tab:red")):
        line = [rows[f"{start}, {count}"] for count in SEARCHES]
        success = [row["success"] for row in line]
        low, high = zip(*[row["interval"] for row in line])
        axis.plot([*SEARCHES], success, marker="o", color=colour, label=f"search {start}")
        axis.fill_between([*SEARCHES], low, high, color=colour, alpha=0.1, linewidth=0)
    axis.set(xscale="log", ylim=(0, 1), xlabel="imagined plans for each plan that is played",
             ylabel=f"success in {len(alone['won'])} held-out pairs")
    axis.set_xticks([*SEARCHES], [f"{count:,}" for count in SEARCHES])
    axis.minorticks_off()
    axis.legend(loc="lower right")
    figure.savefig(path, dpi=110)

# ======== More than imitation? ========================================================================
# The proposal imitates the recorder. These are pairs that the recorder would not have made.

def swapped(pairs, split):
    """From the recorded goal back to the start. Not all of it can be done in the budget."""
    starts, goals, actions = pusht.held_out_pairs(pairs, split)
    return goals, starts, actions

def aimless(pairs, split, steps=25):
    """The goal is where noise leads from a recorded start: steps in a random direction for half a second,
    then in another. Only pairs in which the T has moved by at least 10 px or 10 degrees."""
    chosen = []
    tried = pairs
    while len(chosen) < pairs:
        tried *= 3
        starts, _, _ = pusht.held_out_pairs(tried, split)
        chosen = []
        for e, start in enumerate(starts):
            target = np.random.default_rng([e, 7]).uniform(-0.3, 0.3, (math.ceil(steps / 5), 2))
            actions = np.repeat(target, 5, axis=0)[:steps]
            goal = walk(start, actions)
            _, t_distance, turn = pusht.distances(goal, start)
            if max(t_distance, turn) >= 10 and not pusht.success(start, goal):
                chosen.append((start, goal, actions))
    return tuple(np.stack(column) for column in zip(*chosen[:pairs]))

def walk(start, actions):
    env = pusht.PushT()
    env.reset(options={"state": start, "goal": start})
    return [env.step(action)[0] for action in actions][-1]

def played(load, pairs, split, steps=25):
    """The goal is where the planner itself is after 25 env steps, on its way to another pair's goal."""
    starts, goals, actions = pusht.held_out_pairs(2 * pairs, split)
    histories, _ = planned(load(), starts, np.roll(goals, 1, axis=0), steps)
    ends = np.stack([states[-1] for states in histories])
    kept = [not pusht.success(start, end) for start, end in zip(starts, ends)]
    return starts[kept][:pairs], ends[kept][:pairs], actions[kept][:pairs]

def goals(load, out, pairs, split):
    """Recorded pairs beside three kinds of others: the proposal alone, search alone, and both."""
    kinds = {"recorded": pusht.held_out_pairs(pairs, split), "swapped": swapped(pairs, split),
             "aimless": aimless(pairs, split), "played": played(load, pairs, split)}
    rows = {}
    for kind, problems in kinds.items():
        rows[f"{kind}: both"] = (problems, {})
        rows[f"{kind}: the proposal alone"] = (problems, PROPOSAL_ALONE)
        rows[f"{kind}: search alone"] = (problems, lewm.FULL_SEARCH)
    measure_all(out / "goals.json", rows, load)

# ======== Further goals ===============================================================================

FAR = (25, 50, 75)

def far(load, out, pairs, split):
    """Goals 25, 50 and 75 env steps away, with a budget of twice that."""
    rows = {}
    for steps in FAR:
        problems = pusht.held_out_pairs(pairs, split, 0, steps)
        reach = load().cfg.reaching(steps)
        planners = {"both": {}, "both, p = 1": {"distance_power": 1.0}, "the proposal alone": PROPOSAL_ALONE,
                    "search alone": lewm.FULL_SEARCH}
        for name, changes in planners.items():
            rows[f"{steps} env steps: {name}"] = (problems, {**reach, **changes})
    measure_all(out / "far.json", rows, load)

# ======== Command line ================================================================================

TABLES = {"rollouts": rollouts, "goals": goals, "far": far}

def parse_arguments(argv):
    parser = argparse.ArgumentParser(description="What the planner's parts give.", allow_abbrev=False)
    parser.error = lambda text: sys.exit(f"planning.py: {text}; see python -m extras.planning --help")
    flag = parser.add_argument
    flag("checkpoint", type=os.path.expanduser, help="a model of Push-T with a proposal")
    flag("what", choices=TABLES, help="see the first lines of this file")
    flag("--out", metavar="DIR", help="where rows and pictures go; default: runs/planning")
    flag("--pairs", type=int, default=200, help="held-out pairs a row; default 200")
    flag("--split", choices=("dev", "test"), default="test", help="held-out pairs; default: test")
    flag("--device", help="cpu, cuda, cuda:1, mps; default: the best there is")
    return parser.parse_args(argv)

def main(argv):
    given = parse_arguments(argv)
    os.environ.pop("MPLBACKEND", None)                  # a notebook sets one that may be missing here
    device = lewm.pick_device(given.device)

    def load():
        return lewm.load_checkpoint(given.checkpoint, device)[0]

    load.of = [Path(given.checkpoint).resolve().name, given.pairs, given.split]
    model = load()
    lewm.require(model.proposal, f"{given.checkpoint} has no proposal: train with --proposal_steps 8000")
    longest = model.cfg.proposal_horizon * model.cfg.frame_skip
    reach = longest >= FAR[-1] or given.what != "far"
    lewm.require(reach, f"its proposal reaches {longest} env steps, not {FAR[-1]}: --proposal_horizon 15")
    out = Path(given.out or "runs/planning").expanduser()
    TABLES[given.what](load, out, given.pairs, given.split)

if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"planning.py: {' '.join(str(error).split())}")
    except KeyboardInterrupt:
        sys.exit("planning.py: stopped; the same command goes on")
