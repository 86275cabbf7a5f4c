"""LeWM beside other models. Trainings that were stopped go on, and finished rows are not trained again.

    python -m extras.compare pldm           # a loss with seven terms
    python -m extras.compare ablations      # parts changed or left out, for two seeds
    python -m extras.compare lambda         # searches the weight of SIGReg
    python -m extras.compare dino-wm        # what planning with 196 patch tokens a frame would cost
    python -m extras.compare simulator      # the planner with a perfect model

The first three train for hours; --steps, --pairs and --train_episodes shorten them. Each row of a table is a
folder with a checkpoint and trial.json, which holds its settings and its numbers.
"""

import argparse
import dataclasses
import functools
import json
import math
import os
import sys
from pathlib import Path

import torch

import lewm
import probe
import pusht
from extras import models
from extras.dino_wm import dino_wm

# ======== Rows of a table =============================================================================

class Setting:
    """What all rows of a comparison share: the preset nano with some changes, recorded episodes, and `pairs`
    held-out pairs of a split. Nothing is recorded before a row needs it."""
    def __init__(self, out, device=None, pairs=200, split="test", **changes):
        self.out = Path(out)
        self.device = lewm.pick_device(device)
        self.count = pairs
        self.split = split
        self.cfg = lewm.Config.preset("nano", **changes)

    @functools.cached_property
    def lessons(self):
        return pusht.collect_lessons(self.cfg.train_episodes, self.cfg.seed)

    @functools.cached_property
    def pairs(self):
        return pusht.held_out_pairs(self.count, self.split, 0, self.cfg.goal_distance)

    def data(self, cfg):
        """The episodes for a Config: of both lessons, or those of the second alone and no column `lesson`."""
        if cfg.first_lesson_share:
            return self.lessons
        second = self.lessons["lesson"] == 1
        data = {name: column for name, column in self.lessons.items() if name != "lesson"}
        data["ep_len"] = data["ep_len"][second]
        data["ep_offset"] = data["ep_offset"][second]
        return data

def written(path, content):
    with lewm.replacing(path) as partial:
        partial.write_text(json.dumps(content, indent=1, default=float), encoding="utf-8")

def trial(setting, name, kind=lewm.LeWM, **changes):
    """Train one row, plan and probe -> {what: number}. kind: class of the model. changes: fields of Config.
    Numbers that are in the row's trial.json are reused, and other settings there are refused. All rows plan
    as the paper does, without a proposal, so that success speaks of the model."""
    cfg = dataclasses.replace(setting.cfg, **changes)
    cfg = dataclasses.replace(cfg, proposal_steps=0, **lewm.FULL_SEARCH)
    folder = setting.out / name
    path = folder / "trial.json"
    torch.manual_seed(cfg.seed)
    model = kind(cfg)
    settings = {**vars(cfg), "kind": kind.__name__, "pairs": setting.count, "split": setting.split}
    settings["weights"] = dict(getattr(model, "weights", {}))
    saved = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"settings": settings}
    wrong = [key for key in settings if saved["settings"].get(key) != settings[key]]
    lewm.require(not wrong, f"{path} has other {', '.join(wrong)}: use another --out, or delete it")
    if "row" not in saved:
        written(path, saved)                        # before the training, which may be stopped and go on
        data = setting.data(cfg)
        model = lewm.train(cfg, data, folder, True, setting.device, pusht.render, model)
        saved["row"] = {**planned(model, setting.pairs), **last_metrics(folder), **known(model)}
        written(path, saved)
    print("\n".join(probe.summary(name, saved["row"])), flush=True)
    return saved["row"]

def planned(model, pairs):
    """Success (rate, low, high of its 95 % interval), and distances to the goal at the end."""
    result, _ = lewm.evaluate(model, pusht, pairs)
    score = result["policies"]["LeWM + CEM"]
    return {"success": [float(score["success"]), *score["interval"]],
            "object_success": float(score["object_success"]),
            "px_to_goal": float(score["final_agent_px"] + score["final_t_px"])}

def last_metrics(folder):
    metrics = pusht.read_metrics(folder)
    names = ("val_prediction", "val_copy_last", "val_shuffled_ratio", "effective_rank", "straightness")
    return {name: float(metrics[name][-1]) for name in names}

def known(model):
    """Pearson's r of linear probes on held-out trajectories."""
    held = probe.held_out(model)
    truth = probe.probe_targets(held.states)
    read = probe.fit_linear(probe.to_fit(held.z), probe.to_fit(truth))
    guess = read(probe.to_judge(held.z)).flatten(0, 1)
    scores = probe.score(guess, probe.to_judge(truth).flatten(0, 1))
    return {f"linear r of {group}": row["r"] for group, row in scores.items()}

def compare(setting, rows):
    """rows {name: what `trial` takes by keyword} -> {name: its numbers}."""
    return {name: trial(setting, name, **row) for name, row in rows.items()}

# ======== Comparisons that train ======================================================================

def pldm(out, device=None, **changes):
    """LeWM beside PLDM, and a picture -> rows. Shorter than the default run, with a first lesson as long."""
    setting = Setting(out, device, **{"steps": 4500, "first_lesson_share": 0.4, **changes})
    rows = compare(setting, {"LeWM": {}, "PLDM": {"kind": models.PLDM}})
    lewm.draw(draw_pldm, setting.out / "pldm.png", rows)
    return rows

def draw_pldm(path, rows):
    curves = ("val_prediction", "effective_rank", "min_std")
    figure, axes = probe.canvas(13, 3.2, [["success", *curves]])
    for (name, row), colour in zip(rows.items(), ("black", "tab:red")):
        rate, low, high = row["success"]
        interval = [[rate - low], [high - rate]]
        axes["success"].bar(name, rate, yerr=interval, color=colour, ecolor="gray", capsize=6)
        metrics = pusht.read_metrics(path.parent / name)
        for title in curves:
            axes[title].plot(metrics["step"], metrics[title], label=name)
            axes[title].set(xlabel="step")
    axes["success"].set(ylim=(0, 1), ylabel="share of pairs, 95 % interval")
    axes["val_prediction"].set(yscale="log")
    axes["val_prediction"].legend(fontsize=8)
    figure.savefig(path, dpi=110)

LAMBDA = lewm.SMALL["sigreg_weight"]                # of the default run
ABLATIONS = {
    "as it is": {},
    "no SIGReg": {"sigreg_weight": 0.0},
    "a tenth of lambda": {"sigreg_weight": LAMBDA / 10},
    "ten times lambda": {"sigreg_weight": LAMBDA * 10},
    "LayerNorm": {"kind": models.LayerNorms},
    "appended action": {"kind": models.AppendedAction},
    "no dropout": {"dropout": 0.0},
    "ImageNet colours": {"whiten": False},
    "no first lesson": {"first_lesson_share": 0.0},
    "first lesson alone": {"first_lesson_share": 0.99999}}

def ablations(out, device=None, seeds=(3072, 1), **changes):
    """The default run with one part changed or left out, for each seed of the training -> rows."""
    setting = Setting(out, device, **changes)
    rows = {}
    for seed in seeds:
        for name, row in ABLATIONS.items():
            rows[f"{name}, seed {seed}"] = {**row, "seed": seed}
    return compare(setting, rows)

def search_lambda(out, device=None, runs=5, **changes):
    """The weight of SIGReg with the most success on development pairs, by golden-section search from 0.001 to
    10 -> {weight: row}. Each run after the second shrinks the range by the factor 0.62."""
    shorter = {"pairs": 50, "steps": 1800, "train_episodes": 4000}
    setting = Setting(out, device, split="dev", **{**shorter, **changes})
    rows = {}

    def success(exponent):
        weight = float(f"{10 ** exponent:.3g}")
        if weight not in rows:
            rows[weight] = trial(setting, f"{weight:g}", sigreg_weight=weight)
        return rows[weight]["success"][0]

    golden = (math.sqrt(5) - 1) / 2
    low = -3.0
    high = 1.0
    for _ in range(runs - 1):                       # from the second time on one of the two is known already
        lower = high - golden * (high - low)
        upper = low + golden * (high - low)
        if success(lower) < success(upper):
            low = lower
        else:
            high = upper
    rows = dict(sorted(rows.items()))
    lewm.draw(draw_lambda, setting.out / "lambda.png", rows)
    return rows

def draw_lambda(path, rows):
    figure, axes = probe.canvas(8, 3.2, [["success", "effective_rank"]])
    for title, axis in axes.items():
        line = {title: [row[title] for row in rows.values()]}
        probe.draw_lines(axis, [*rows], line, xlabel="weight of SIGReg", xscale="log", ylim=(0, None))
    figure.savefig(path, dpi=110)

# ======== The simulator in the model's place ==========================================================

def simulator(out, device=None, pairs=50, seed=0):
    """Plan on development pairs with Push-T itself as the model -> what lewm.evaluate gives."""
    search = {**lewm.FULL_SEARCH, "context": 1}     # a state holds the velocity: one frame is enough
    cfg = lewm.Config.preset("nano", **search)
    recorded = pusht.collect(200, seed)
    model = models.Simulator(cfg, lewm.action_statistics(recorded["action"]))
    problems = pusht.held_out_pairs(pairs, "dev", seed, cfg.goal_distance)
    planner = models.StatePlanner(model, problems[1], seed)
    result, _ = lewm.evaluate(model, pusht, problems, seed, planner)
    policies = {name.replace("LeWM", "simulator"): row for name, row in result["policies"].items()}
    result["policies"] = policies
    print(pusht.table(result))
    return result

# ======== Command line ================================================================================

COMPARISONS = {"pldm": pldm, "ablations": ablations, "lambda": search_lambda, "dino-wm": dino_wm,
               "simulator": simulator}
SHORTER = ("steps", "pairs", "train_episodes")      # flags of the comparisons that train
FLAGS = {"dino-wm": (), "simulator": ("pairs",)}    # and of the others

def parse_arguments(argv):
    parser = argparse.ArgumentParser(description="LeWM beside other models.", allow_abbrev=False)
    parser.error = lambda text: sys.exit(f"compare.py: {text}; see python -m extras.compare --help")
    flag = parser.add_argument
    flag("what", choices=COMPARISONS, help="see the first lines of this file")
    flag("--out", metavar="DIR", help="where rows and pictures go; default: runs/WHAT")
    flag("--device", help="cpu, cuda, cuda:1, mps; default: the best there is")
    flag("--steps", type=int, help="optimizer steps of each training; default: the comparison's")
    flag("--pairs", type=int, help="held-out pairs to plan for; default: the comparison's")
    flag("--train_episodes", type=int, help="episodes to record; default: the comparison's")
    given = parser.parse_args(argv)
    chosen = {name: getattr(given, name) for name in SHORTER}
    given.changes = {name: value for name, value in chosen.items() if value is not None}
    for name, value in given.changes.items():
        lewm.require(name in FLAGS.get(given.what, SHORTER), f"{given.what} takes no --{name}")
        lewm.require(value > 0, f"--{name} is {value}, not at least 1")
    return given

def main(argv):
    given = parse_arguments(argv)
    os.environ.pop("MPLBACKEND", None)              # a notebook sets one that may be missing here
    out = Path(given.out or f"runs/{given.what}").expanduser()
    out.mkdir(parents=True, exist_ok=True)          # refused now, not after hours
    result = COMPARISONS[given.what](out, given.device, **given.changes)
    command = "python -m extras.compare " + " ".join(argv)
    written(out / "result.json", {"command": command, given.what: result})
    print(f"all numbers in {out}")

if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"compare.py: {' '.join(str(error).split())}")
    except KeyboardInterrupt:
        sys.exit("compare.py: stopped; the same command goes on")
