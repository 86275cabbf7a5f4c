"""Tests by invariant: each says in its name what must hold and in its docstring which mistake it catches.

    pytest -q -k "not Slow"                     # all that takes seconds
    pytest -q                                   # all of it, minutes
    pytest -q -k SIGReg                         # one unit, as the classes below name it
    LEWM=student.py pytest -q -k Predictor      # the same tests on another file

The units: Encoder, Predictor, SIGReg, Loss, Imagination, Planning, Data, Training, Recipes, Proposal, Worlds;
then Config, Checkpoints, CommandLine, Files, PushT, Probes, Readme. The order is that of lewm.py, but its
sections 1, 11 and 12 come after the method. Numbers without a source beside them follow from the formula in
the test.
"""

import argparse
import ast
import contextlib
import copy
import csv
import dataclasses
import functools
import importlib.util
import inspect
import itertools
import json
import math
import multiprocessing
import os
import pickle
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch

HERE = Path(__file__).parent

# ======== Helpers =====================================================================================

def load_tested_file():
    """Load lewm.py, or the file that LEWM names: student, student.py or a path. It is imported under the name
    lewm, so that probe.py uses it, too."""
    name = os.environ.get("LEWM") or "lewm"
    named = Path(name if name.endswith(".py") else f"{name}.py").resolve()
    path = next((path for path in (named, HERE / named.name) if path.is_file()), None)
    if path is None:
        raise pytest.Collector.CollectError(f"LEWM={name}: no file {named.name} is here or in {HERE}")
    spec = importlib.util.spec_from_file_location("lewm", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["lewm"] = module
    spec.loader.exec_module(module)
    return module

class NoRegulariser(torch.nn.Module):
    """In the place of SIGReg, where a test is about something else or a file has none yet."""
    def __init__(self, *settings):
        super().__init__()

    def forward(self, z):
        return z.new_zeros(())

lewm = load_tested_file()
vars(lewm).setdefault("SIGReg", NoRegulariser)

def tiny(**changes):
    """A Config small enough for a test."""
    small = dict(image_size=32, patch_size=16, encoder_width=24, embed_dim=16, projector_hidden=32,
                 predictor_width=24, predictor_mlp=48, directions=32, batch_size=8, steps=8,
                 first_lesson_share=0.0, proposal_steps=0, candidates=50, iterations=5, elites=10)
    return lewm.Config.preset("smoke", **{**small, **changes})

def tiny_model(**changes):
    """A model with such a Config."""
    return lewm.LeWM(tiny(**changes))

def noise(*shape, seed=0):
    """Normal numbers, the same at each call."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))

def random_pictures(*shape):
    """uint8 of that shape, the same at each call."""
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))

def awake(model):
    """Noise for every matrix of zeros in the predictor, so that actions have an effect, as after training."""
    with torch.no_grad():
        for x in model.predictor.parameters():
            if x.ndim > 1 and not x.any():
                x.copy_(noise(*x.shape, seed=1))
    return model

def set_actions(model, **statistics):
    """Set what the model knows of raw actions: mean, std, low, high."""
    for name, numbers in statistics.items():
        getattr(model, f"action_{name}").copy_(torch.as_tensor(numbers))
    return model

def adder(**changes):
    """A toy world that is known exactly: an embedding moves by the first numbers of the action block."""
    model = tiny_model(**{"embed_dim": 4, **changes}).eval()
    model.predict = lambda z, blocks: z + blocks[..., :z.shape[-1]]
    return model

def counting_data(lengths=(30, 16, 15, 40), column="pixels"):
    """A data set in which every frame and every action is its own row number."""
    rows = sum(lengths)
    number = np.arange(rows)[:, None]
    frames = number.astype(np.float32)
    if column == "pixels":
        frames = np.broadcast_to(number[:, :, None, None], (rows, 8, 8, 3)).astype(np.uint8)
    return {"action": number.repeat(2, 1).astype(np.float32), column: frames,
            "ep_len": np.array(lengths), "ep_offset": np.cumsum(lengths) - lengths}

COUNTING = dict(image_size=8, patch_size=8)                 # a Config for such data
STATISTICS = ("picture_mean", "colour_map", "action_mean", "action_std", "action_low", "action_high")

def with_nan(action, rows):
    action = action.copy()
    action[rows] = np.nan
    return action

def stops(*args, **kwargs):
    raise ZeroDivisionError

def differing(a, b):
    """Two models -> the names of parameters and buffers that are not equal, to the last bit."""
    theirs = b.state_dict()
    return [name for name, x in a.state_dict().items() if not torch.equal(x, theirs[name])]

def run_python(*argv, cwd, **environment):
    """Python in another process -> its output and how it ended."""
    return subprocess.run([sys.executable, *map(str, argv)], cwd=cwd, env={**os.environ, **environment},
                          capture_output=True, encoding="utf-8", timeout=600)

def run_side_by_side(commands, **options):
    """run_python for several command lines at once -> what each of them gave."""
    with ThreadPoolExecutor() as pool:
        return list(pool.map(lambda argv: run_python(*argv, **options), commands))

def project(folder, *others):
    """Copy the tested file, as lewm.py, and other files of the project into a folder."""
    shutil.copy(lewm.__file__, folder / "lewm.py")
    for name in others:
        shutil.copy(HERE / name, folder)
    return folder

def contents(folder):
    """{file: (bytes, time of the last change)} of everything in a folder."""
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}

@pytest.fixture
def shipped():
    """The model in assets/. A file whose modules have other names cannot load it, which is no mistake."""
    try:
        model, _ = lewm.load_checkpoint(HERE / "assets/nano.pt")
    except ValueError as error:
        if Path(lewm.__file__) == HERE / "lewm.py":
            raise
        pytest.skip(str(error))
    return model

@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    """Each test runs in an empty folder of its own."""
    monkeypatch.chdir(tmp_path)

@pytest.fixture(scope="module")
def recorded():
    return importlib.import_module("pusht").collect(12, seed=5)

@pytest.fixture(scope="module")
def pusht():
    return importlib.import_module("pusht")

@pytest.fixture(scope="module")
def probe():
    return importlib.import_module("probe")

# ======== 2 ViT encoder ===============================================================================

class TestEncoder:
    def test_it_sees_where_things_are(self):
        """Catches a lost position embedding: without it two orders of the same patches look alike."""
        model = tiny_model().eval()
        picture = noise(1, 1, 3, 32, 32)
        moved = picture.roll(16, dims=-1)                   # the same patches in another order
        gap = (model.encode(picture) - model.encode(moved)).abs().max().item()
        assert gap > 1e-4, f"moving the patches changes the embedding by {gap:.1g}, expected a visible change"

    def test_bytes_and_normalised_floats_are_encoded_alike(self):
        """Catches scaling done twice, or not at all."""
        model = tiny_model().eval()
        pixels = random_pictures(2, 2, 3, 32, 32)
        mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
        std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
        normalised = (pixels.float() / 255 - mean) / std
        assert torch.allclose(model.encode(pixels), model.encode(normalised), atol=1e-5)

    def test_pictures_may_have_any_leading_dimensions(self):
        """Catches a reshape that mixes windows and frames, and one that wants exactly five dimensions."""
        model = tiny_model().eval()
        pixels = random_pictures(6, 3, 32, 32)
        z = model.encode(pixels)
        assert z.shape == (6, 16)
        assert torch.allclose(model.encode(pixels.view(2, 3, 3, 32, 32)), z.view(2, 3, 16), atol=1e-5)
        assert torch.allclose(model.encode(pixels[4]), z[4], atol=1e-5)

    @pytest.mark.parametrize("pixels, words", [
        (random_pictures(2, 3, 32, 32) / 255, "pictures are floats .*: give uint8"),
        (random_pictures(2, 3, 32, 32).float(), "pictures are floats .*: give uint8"),
        (random_pictures(2, 3, 32, 20), "fit_pictures")])
    def test_a_picture_of_another_range_or_size_is_refused(self, pixels, words):
        """Catches floats that are neither bytes nor normalised, and an error of broadcasting, deep inside."""
        with pytest.raises(ValueError, match=words):
            tiny_model().encode(pixels)

    def test_the_model_in_assets_sees_what_it_saw(self, shipped):
        """Catches another encoder than the one that was trained: a lost branch, another sign."""
        pixels = torch.outer(torch.arange(64), torch.arange(64)).remainder(251).byte().expand(3, 64, 64)
        with torch.no_grad():
            z = shipped.encode(pixels)
        assert torch.allclose(z[:4], torch.tensor([0.77991, 0.98390, -0.66127, -0.32216]), atol=1e-3)
        assert z.norm().item() == pytest.approx(4.33446, abs=1e-3)

# ======== 3 Action encoder and AdaLN-zero predictor ===================================================

class TestPredictor:
    def test_actions_have_no_effect_at_first_and_have_one_after_a_step(self):
        """Catches AdaLN layers that do not start at zero, and ones that never learn."""
        torch.manual_seed(0)
        model = tiny_model(dropout=0.0)
        z = noise(8, 3, 16)
        blocks = noise(8, 3, 10, seed=1)
        effect = lambda: (model.predict(z, blocks) - model.predict(z, -blocks)).abs().max().item()
        assert effect() == 0, "at initialisation actions must not matter"
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        (model.predict(z, blocks) - noise(8, 3, 16, seed=2)).square().mean().backward()
        optimizer.step()
        assert effect() > 1e-3, f"after one step actions change the prediction by only {effect():.1g}"

    def test_every_layer_is_the_identity_at_first(self):
        """Catches a gate that starts open."""
        x = noise(2, 3, 24)
        layers = [part for part in tiny_model().modules() if isinstance(part, lewm.PredictorLayer)]
        same = layers and all(torch.equal(layer(x, noise(2, 3, 24, seed=1)), x) for layer in layers)
        assert same, "a new layer changes its input: is a gate missing, or not 0 at first?"

    @pytest.mark.parametrize("changed", ["frame", "action"])
    @pytest.mark.parametrize("k", [0, 1, 2])
    def test_it_never_looks_ahead(self, k, changed):
        """Catches a missing causal mask, and actions shifted by one: input k reaches outputs k and later."""
        model = awake(tiny_model().eval())
        inputs = {"frame": noise(2, 3, 16), "action": noise(2, 3, 10, seed=1)}
        before = model.predict(inputs["frame"], inputs["action"])
        inputs[changed][:, k] += 1
        after = model.predict(inputs["frame"], inputs["action"])
        gap = (after - before).abs().amax((0, 2))
        assert (gap[:k] < 1e-6).all(), f"{changed} {k} changes earlier outputs: {gap.tolist()}"
        assert (gap[k:] > 1e-4).all(), f"{changed} {k} does not reach outputs {k} and later: {gap.tolist()}"

    def test_the_order_of_frames_matters_up_to_its_history(self):
        """Catches a lost position embedding."""
        model = awake(tiny_model(predictor_depth=1).eval())     # two causal layers know the order without it
        z = noise(1, 4, 16)
        blocks = torch.zeros(1, 4, 10)
        swapped = z[:, [1, 0, 2]]
        seen, otherwise = (model.predict(x, blocks[:, :3])[:, -1] for x in (z[:, :3], swapped))
        gap = (seen - otherwise).abs().max().item()
        assert gap > 1e-5, f"swapping two frames changes the prediction by {gap:.1g}"

    def test_the_model_in_assets_predicts_what_it_predicted(self, shipped):
        """Catches another predictor than the one that was trained, where both would learn."""
        with torch.no_grad():
            z_hat = shipped.predict(noise(1, 3, 32), noise(1, 3, 10, seed=1))
        assert torch.allclose(z_hat[0, :, 0], torch.tensor([-1.17539, 0.03167, -0.30997]), atol=1e-3)
        assert z_hat.norm().item() == pytest.approx(7.65778, abs=1e-3)

    def test_what_does_not_fit_is_refused(self):
        """Catches blocks that are silently everybody's, and an error of broadcasting, deep inside."""
        with pytest.raises(ValueError, match="do not fit z"):
            tiny_model().predict(noise(2, 3, 16), noise(1, 3, 10))
        with pytest.raises(ValueError, match="4 frames are more than history 3"):
            tiny_model().predict(noise(1, 4, 16), noise(1, 4, 10))

# ======== 4 SIGReg ====================================================================================

# The integral of phi (1 - phi^2) over [-3, 3], where phi(s) = exp(-s^2/2): sampling noise, at any batch size.
GAUSSIAN_SCORE = (math.sqrt(2 * math.pi) * math.erf(3 / math.sqrt(2))
                  - math.sqrt(2 * math.pi / 3) * math.erf(3 * math.sqrt(1.5)))          # 1.0527

class TestSIGReg:
    def setup_method(self):
        assert lewm.SIGReg is not NoRegulariser, "the tested file has no class SIGReg"

    @pytest.mark.parametrize("B", [32, 256])
    def test_a_gaussian_scores_the_same_at_any_batch_size(self, B):
        """Catches a missing factor B (weight 1/B too small), a missing doubling, a wrong weight."""
        torch.manual_seed(0)
        sigreg = lewm.SIGReg(directions=64)
        values = [sigreg(torch.randn(B, 2, 64)).item() for _ in range(60)]
        mean = np.mean(values)
        error = np.std(values) / math.sqrt(60)
        near = abs(mean - GAUSSIAN_SCORE) < 5 * error + 0.01
        assert near, f"mean {mean:.4f} +- {error:.4f}, expected {GAUSSIAN_SCORE:.4f}"

    def test_it_agrees_with_complex_numbers_in_plain_loops(self):
        """Catches slips in the formula: phi, weights, trapezoid ends, averaging. float64, complex, loops."""
        z = noise(16, 3, 8)
        directions = noise(8, 5, seed=1)
        points = np.linspace(0, 3, 17)
        phi = np.exp(-points ** 2 / 2)
        values = []
        for t in range(3):
            for m in range(5):
                line = (directions[:, m] / directions[:, m].norm()).double().numpy()
                shadow = z[:, t].double().numpy() @ line
                of_batch = np.array([np.exp(1j * s * shadow).mean() for s in points])
                values.append(16 * 2 * np.trapezoid(phi * abs(of_batch - phi) ** 2, dx=3 / 16))
        assert lewm.SIGReg()(z, directions).item() == pytest.approx(np.mean(values), abs=1e-4)

    @pytest.mark.parametrize("knots", [2, 17])
    def test_its_gradient_is_its_slope(self, knots):
        """Catches a detached or wrong gradient."""
        sigreg = lewm.SIGReg(knots=knots)
        directions = noise(8, 5, seed=1)
        z = noise(16, 3, 8).requires_grad_()
        way = noise(16, 3, 8, seed=2)
        gradient, = torch.autograd.grad(sigreg(z, directions), z)
        rise = sigreg(z + 0.01 * way, directions) - sigreg(z - 0.01 * way, directions)
        assert rise.item() / 0.02 == pytest.approx((gradient * way).sum().item(), rel=0.01)

    @pytest.mark.parametrize("change, expected", [
        (lambda z: 0 * z, 51.46), (lambda z: 2 * z, 31.7), (lambda z: z + 1, 50.6),
        (lambda z: z * (torch.arange(192) < 96), 7.3), (lambda z: z[:, :1].expand(-1, 4, -1), 1.13),
        (lambda z: (z - z.mean(0)) / z.std(0), 0.56)],
        ids="collapsed twice_as_wide shifted half_dead standing_still evened_by_batch_norm".split())
    def test_it_has_known_values(self, change, expected):
        """Catches a regulariser that lets collapse pay, or pools time steps: 4.4 for clips standing still."""
        torch.manual_seed(0)
        value = lewm.SIGReg()(change(noise(128, 4, 192))).item()
        assert abs(value / expected - 1) < 0.15, f"{value:.2f}, expected about {expected}"

    def test_it_draws_new_directions_each_time(self):
        """Catches directions that are drawn once: the embeddings would become Gaussian along those alone."""
        z = 2 * noise(16, 2, 64)
        sigreg = lewm.SIGReg(directions=4)
        assert sigreg(z) != sigreg(z)

    def test_vectors_without_time_steps_are_refused(self):
        """Catches a batch (B,D) that is taken for one vector a time step."""
        with pytest.raises(ValueError, match="windows B, frames T"):
            lewm.SIGReg()(noise(64, 64))

# ======== 5 LeWM ======================================================================================

class TestLoss:
    def test_it_is_the_prediction_error_plus_lambda_times_the_regulariser(self):
        """Catches a wrong target frame, a sum in place of a mean, a lost lambda."""
        model = awake(tiny_model(dropout=0.0, sigreg_weight=0.3))
        model.sigreg.forward = lambda z: z.square().sum()
        pixels = noise(8, 4, 3, 32, 32)
        blocks = noise(8, 3, 10, seed=1)
        loss, parts = model.loss(pixels, blocks)
        z = model.encode(pixels)
        z_hat = model.predict(z[:, :3], blocks)
        prediction = (z_hat - z[:, 1:]).square().mean()
        assert torch.allclose(parts["prediction"], prediction, atol=1e-5)
        assert torch.allclose(parts["sigreg"], z.square().sum(), rtol=1e-4)
        assert torch.allclose(parts["std"], z.std(0).mean(), rtol=1e-4)
        assert torch.allclose(loss, prediction + 0.3 * z.square().sum(), rtol=1e-4)

    def test_gradients_flow_through_both_sides_of_the_error(self):
        """Catches a detached target, which the paper does not have."""
        model = awake(tiny_model(sigreg_weight=0.0))
        model.sigreg = NoRegulariser()
        model.projector.eval()                              # batch norm would carry a gradient between frames
        pixels = noise(4, 4, 3, 32, 32).requires_grad_()
        model.loss(pixels, noise(4, 3, 10, seed=1))[0].backward()
        reach = pixels.grad.abs().amax((0, 2, 3, 4))
        assert (reach > 0).all(), f"gradient at frames 0 to 3: {reach.tolist()}; the last is only a target"

    def test_the_paper_preset_has_the_authors_size_and_every_weight_gets_a_gradient(self):
        """Catches a missing bias, a merged matrix of the wrong size, a forgotten layer."""
        model = lewm.LeWM(lewm.Config.preset("paper"))
        model.sigreg = NoRegulariser()
        assert sum(p.numel() for p in model.parameters()) == 18_034_478, "the authors' weights"
        large = [name for name, p in model.named_parameters() if p.abs().max() > 1]
        assert not large, f"{large} begin larger than 1"
        loss, _ = awake(model).loss(random_pictures(2, 4, 3, 224, 224), noise(2, 3, 10))
        loss.backward()
        missing = [name for name, p in model.named_parameters() if p.grad is None]
        assert math.isfinite(loss.item()) and not missing, f"no gradient reaches {missing}"

class TestImagination:
    def test_to_blocks_and_to_actions_undo_each_other_and_z_score_each_action_number(self):
        """Catches the mean or std of another action number, and actions laid into blocks in another order."""
        model = set_actions(tiny_model(), mean=[10.0, 20], std=[2.0, 4])
        actions = noise(4, 2, 15, 2)                        # any leading dimensions, here (4,2)
        blocks = model.to_blocks(actions)
        assert blocks.shape == (4, 2, 3, 10)
        seventh = (actions[..., 7, :] - torch.tensor([10, 20])) / torch.tensor([2, 4])
        assert torch.allclose(blocks[..., 1, 4:6], seventh, atol=1e-5)      # block 1 holds actions 5 to 9
        assert torch.allclose(model.to_actions(blocks), actions, atol=1e-5)

    @pytest.mark.parametrize("context", [1, 2, 3])
    def test_it_is_one_prediction_after_the_other(self, context):
        """Catches a rollout that is off by one, reuses an action, or shows another history."""
        model = awake(tiny_model().eval())
        z = noise(2, context, 16)
        plans = noise(2, 3, 6, 10, seed=1)
        rollout = model.rollout(z, plans)
        assert rollout.shape == (2, 3, 6, 16)
        for n in range(3):
            known = list(z.unbind(1))
            for t in range(context - 1, 6):                 # from one to three frames, one block at a time
                window = slice(max(0, t - 2), t + 1)
                frames = torch.stack(known[window], 1)
                known.append(model.predict(frames, plans[:, n, window])[:, -1])
            assert torch.allclose(rollout[:, n, context - 1:], torch.stack(known[context:], 1), atol=1e-5)
            seen = model.predict(z, plans[:, n, :context])
            assert torch.allclose(rollout[:, n, :context], seen, atol=1e-5), "context is given, not imagined"

    def test_plans_without_a_block_for_each_frame_are_refused(self):
        """Catches a rollout that invents the blocks between its context frames."""
        with pytest.raises(ValueError, match="at least 3 action blocks"):
            tiny_model().rollout(noise(1, 3, 16), noise(1, 2, 2, 10))

# ======== 6 Planning with CEM =========================================================================

SEARCH = dict(horizon=3, candidates=200, iterations=25, elites=20)

def toy_planner(**changes):
    """A planner for the toy world. Its actions lie between -2 and 2 when they are z-scored."""
    return set_actions(adder(**changes), mean=[1.0, -2], std=[0.5, 1], low=[0.0, -4], high=[2.0, 0])

class TestPlanning:
    def test_it_finds_a_known_optimum_within_the_bounds(self):
        """Catches a wrong sign, elites from the wrong end, and bounds not z-scored or of another number."""
        goal = torch.tensor([[3.0, -2, 1, 0], [100, -100, 100, -100]])
        plan = lewm.cem(toy_planner(), torch.zeros(2, 4), goal, **SEARCH)
        largest = plan.abs().max().item()
        assert plan.shape == (2, 3, 10)
        assert largest <= 2 + 1e-6, f"an action of {largest:.2f}, expected at most 2"
        end = plan[0, :, :4].sum(0)
        assert (end - goal[0]).abs().max() < 0.1, f"the plan ends at {end.tolist()}, not {goal[0].tolist()}"
        at_bounds = (plan[1, :, :4] - 2 * goal[1].sign()).abs().max() < 0.2
        assert at_bounds, f"a goal out of reach wants each action at its bound, got {plan[1, :, :4].tolist()}"

    def test_the_gaussian_is_refitted_to_the_cheapest_plans(self):
        """Catches elites of another iteration, a spread that is theirs by n - 1, and one that is kept."""
        seen = []
        model = toy_planner()
        model.predict = lambda z, blocks: seen.append(blocks[:, 0]) or z + blocks[..., :4]
        goal = torch.full((1, 4), 0.3)
        lewm.cem(model, torch.zeros(1, 4), goal, horizon=1, iterations=2, candidates=4000, elites=4)
        first, second = seen                                # (4000,10) each
        cheapest = first[(first[:, :4] - goal).square().sum(1).argsort()[:4]]
        assert torch.allclose(second.mean(0), cheapest.mean(0), atol=0.05)
        spread = second.std(0) / cheapest.std(0, correction=0)
        assert abs(spread.median() - 1) < 0.03, f"{spread.median():.2f} times the spread of the elites"

    def test_settings_that_are_not_given_are_the_models(self):
        """Catches the paper's numbers of candidates where the Config has others."""
        model = toy_planner()
        z = noise(2, 4)
        goal = noise(2, 4, seed=1)
        plan = lewm.cem(model, z, goal)
        names = ("horizon", "candidates", "iterations", "elites")
        given = {name: getattr(model.cfg, name) for name in names}
        assert torch.equal(plan, lewm.cem(model, z, goal, **given))
        for name in names:
            other = lewm.cem(model, z, goal, **{**given, name: given[name] - 1})
            assert other.shape != plan.shape or not torch.equal(other, plan), name

    def test_a_plan_depends_on_its_own_episode_alone(self):
        """Catches random numbers shared by a batch: plans that change with its size, or from run to run."""
        model = set_actions(awake(tiny_model(dropout=0.5)).eval(), low=[-3.0, -3], high=[3.0, 3])
        z = noise(3, 16)
        goal = noise(3, 16, seed=1)
        before = copy.deepcopy(model)

        def plan(episodes, seeds):
            generators = [torch.Generator().manual_seed(seed) for seed in seeds]
            return lewm.cem(model, z[episodes], goal[episodes], generators,
                            horizon=3, candidates=40, iterations=6, elites=8)

        together = plan([0, 1, 2], [0, 1, 2])
        alone = torch.cat([plan([e], [e]) for e in range(3)])
        assert not together.requires_grad, "a plan needs no gradient"
        random = torch.get_rng_state()
        same = lewm.cem(model, z, goal, horizon=3, candidates=40, iterations=6, elites=8)
        assert torch.equal(same, together) and torch.equal(random, torch.get_rng_state()), "seeds 0, 1, 2"
        assert torch.equal(together, alone), f"plans differ by {(together - alone).abs().max():.2g}"
        assert not torch.allclose(together[:1], plan([0], [9]))
        assert not differing(before, model), "planning changed a batch norm"

    @pytest.mark.parametrize("z, z_goal, options, words", [
        (noise(2, 4), noise(2, 4), dict(candidates=20, elites=30), "elites 30 > candidates 20"),
        (noise(2, 4), noise(1, 4), {}, r"goals are \[1, 1, 4\]"),
        (noise(2, 4), noise(4, 2), {}, r"goals are \[4, 1, 2\], starts \[2, 1, 4\]"),
        (noise(2, 4), noise(2, 4), dict(generators=[torch.Generator()]), "1 generators for 2 starts"),
        (noise(2, 4), noise(2, 4), dict(frame_skip=3), "frame_skip is 5 .*, not 3"),
        (noise(2, 4), noise(2, 4), dict(iterations=0), "0 iterations .* there is none"),
        (noise(1, 2, 4), noise(1, 4), dict(past=torch.zeros(1, 2, 2)), r"past is \[1, 2, 2\], frames 2"),
        (noise(1, 4) * math.nan, noise(1, 4), dict(iterations=2), "not finite")])
    def test_a_search_that_makes_no_sense_is_refused(self, z, z_goal, options, words):
        """Catches a goal that is silently everybody's, blocks of other frames, and elites among NaN."""
        with pytest.raises(ValueError, match=words):
            lewm.cem(toy_planner(), z, z_goal, **options)
        with pytest.raises(ValueError, match="model.eval"):
            lewm.cem(toy_planner().train(), z, z_goal)

# ======== 7 Windows of data ===========================================================================

class TestData:
    def test_each_frame_goes_with_the_actions_that_follow_it(self):
        """Catches blocks that are off by one step, interleaved the wrong way, or not z-scored."""
        model = set_actions(tiny_model(**COUNTING), mean=[10.0, 20], std=[2.0, 4])
        pixels, blocks = lewm.get_batch(model, counting_data(), np.array([0, 7, 61]))
        assert pixels.shape == (3, 4, 3, 8, 8) and blocks.shape == (3, 3, 10)
        for row, start in enumerate([0, 7, 61]):
            assert pixels[row, :, 0, 0, 0].tolist() == [start, start + 5, start + 10, start + 15]
            for k in range(3):
                steps = [start + 5 * k + i for i in range(5)]
                expected = [(step - mean) / std for step in steps for mean, std in ((10, 2), (20, 4))]
                assert blocks[row, k].tolist() == expected, f"block {k} of the window at {start}"

    def test_states_are_drawn_where_there_are_no_pictures(self):
        """Catches states of another frame or of double precision, and pictures of another size."""
        seen = []
        data = counting_data(column="state")
        data["state"] = data["state"].astype(np.float64)
        drawn = torch.zeros(8, 3, 9, 9, dtype=torch.uint8)
        render = lambda states, size: seen.append((states, size)) or drawn
        pixels, _ = lewm.get_batch(tiny_model(**COUNTING), data, np.array([2, 50]), render)
        (states, size), = seen
        assert states.dtype == torch.float32 and size == 8 and pixels.shape == (2, 4, 3, 8, 8)
        assert states[:, 0].tolist() == [2, 7, 12, 17, 50, 55, 60, 65]

    def test_windows_begin_at_every_valid_row_and_never_cross_an_episodes_end(self):
        """Catches windows over the gap between two episodes and starts that are never drawn."""
        starts = lewm.window_starts(counting_data(), tiny(), range(4))
        expected = [*range(0, 15), 30, *range(61, 86)]      # lengths 30, 16, 15, 40 leave 15, 1, 0, 25 starts
        assert starts.tolist() == expected

    def test_whitened_colours_weigh_a_small_object_as_much_as_a_large_one(self):
        """Catches a colour map that is transposed, not inverted, or not applied."""
        generator = torch.Generator().manual_seed(0)
        pixels = torch.full((400, 3, 16, 16), 200, dtype=torch.uint8)
        for picture in pixels:
            x, y, u, v = torch.randint(0, 10, (4,), generator=generator).tolist()
            picture[:, y:y + 6, x:x + 6] = torch.tensor([100, 110, 120])[:, None, None]     # grey and large
            picture[:, v:v + 2, u:u + 2] = torch.tensor([30, 60, 220])[:, None, None]       # blue and small
        mean, colour_map = lewm.colour_statistics(pixels, floor=1e-6)
        seen = torch.einsum("cd,ndhw->nchw", colour_map, pixels / 255 - mean)
        colours = seen.transpose(0, 1).flatten(1)           # (3, n)
        variances = torch.linalg.eigvalsh(colours @ colours.T / colours.shape[1])
        assert colours.mean(1).abs().max() < 1e-3
        assert (variances[1:] - 1).abs().max() < 1e-2, f"the variances are {variances}, expected 1"
        model = tiny_model(image_size=16, whiten=True).eval()
        model.picture_mean.copy_(mean)
        model.colour_map.copy_(colour_map)
        assert torch.allclose(model.encode(pixels[None, :4]), model.encode(seen[None, :4]), atol=1e-4)

    def test_episodes_are_split_by_seed_and_never_cut(self):
        """Catches validation windows that overlap training windows."""
        kept, held_out = lewm.split_episodes(100, 0.1, seed=1)
        assert len(held_out) == 10 and sorted([*kept, *held_out]) == list(range(100))
        assert lewm.split_episodes(100, 0.1, seed=1)[1].tolist() == held_out.tolist()
        assert lewm.split_episodes(100, 0.1, seed=2)[1].tolist() != held_out.tolist()
        assert len(lewm.split_episodes(1, 0.5, seed=0)[0]) == 1, "one episode must stay to learn from"

    def test_nan_after_an_episodes_last_frame_is_let_through_and_left_out(self):
        """Catches a check that refuses the authors' files, and statistics that become NaN on them."""
        data = counting_data()
        last = data["ep_offset"] + data["ep_len"] - 1
        lewm.check_data({**data, "action": with_nan(data["action"], last)}, tiny())
        action = np.array([[1.0, 2], [3, 2], [np.nan, np.nan]])
        assert lewm.action_statistics(action).tolist() == [[2, 2], [1, 1], [1, 2], [3, 2]]
        model = tiny_model(**COUNTING, held_out=0.0)
        lewm.prepare(model, data, model.cfg, None)
        assert model.action_low.tolist() == [0, 0] and model.action_high.tolist() == [100, 100]

    def test_pictures_are_cut_from_the_middle(self):
        """Catches a crop from the corner, and pictures squeezed instead of cut."""
        pixels = torch.zeros(4, 3, 24, 40, dtype=torch.uint8)
        pixels[:, :, 8:16, 16:24] = 200
        small = lewm.fit_pictures(pixels, 8)
        assert small.shape == (4, 3, 8, 8) and small.dtype == torch.uint8
        assert small.float().mean().item() == pytest.approx(200 / 9, abs=1)     # 8 x 8 of 24 x 24 px
        same = lewm.fit_pictures(pixels, 24)
        assert (same[:, :, 8:16, 8:16] == 200).all() and same.float().mean() < 23

    def test_pictures_with_colours_last_are_refused(self):
        """Catches rows that are taken for colours."""
        with pytest.raises(ValueError, match="not uint8"):
            lewm.fit_pictures(torch.zeros(4, 24, 40, 3, dtype=torch.uint8), 24)

    @pytest.mark.parametrize("change, words", [
        (lambda d: {"ep_len": None}, "lacks ep_len"), (lambda d: {"pixels": None}, "lacks state"),
        (lambda d: {"action": d["action"][:, :1]}, r"action is \(101, 1\), not \(rows, 2\)"),
        (lambda d: {"ep_len": d["ep_len"] + 1}, "do not fit"),
        (lambda d: {"ep_len": d["ep_len"][:-1]}, "equally long"),
        (lambda d: {"ep_len": d["ep_len"] / 1}, "whole numbers"),
        (lambda d: {"pixels": d["pixels"] / 1}, "uint8"),
        (lambda d: {"action": d["action"][:-9]}, "92 actions for 101 rows of pixels"),
        (lambda d: {"action": d["action"][:-4]}, "97 actions for 101 rows of pixels"),  # one less an episode
        (lambda d: {"action": torch.tensor(d["action"])}, "action is a Tensor of torch.float32, not"),
        (lambda d: {"pixels": torch.tensor(d["pixels"])}, "pixels is a Tensor .*not a plain NumPy array"),
        (lambda d: {"action": d["action"] + 1j}, "action is a ndarray of complex"),
        (lambda d: {"action": with_nan(d["action"], 7)}, "nan.* in row 7, inside an episode"),
        (lambda d: {"action": with_nan(d["action"], [45, 50])}, "nan.* in row 50, inside an episode")])
    def test_what_does_not_fit_is_refused(self, change, words):
        """Catches training on garbage, and errors that only show up deep inside torch."""
        data = counting_data()
        data = {name: array for name, array in {**data, **change(data)}.items() if array is not None}
        with pytest.raises(ValueError, match=words) as caught:
            lewm.check_data(data, tiny(**COUNTING))
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize("share, lesson", [
        (0.5, None), (0.0, [0, 0, 1, 1]), (0.5, [1] * 4), (0.5, [0] * 4), (0.5, [0, 1, 2, 2]),
        (0.5, [0, 0.5, 1, 1]), (0.5, [0] + [0, 1] * 50)])       # the last: a number for each row
    def test_lessons_that_do_not_go_with_their_share_are_refused(self, share, lesson):
        """Catches a lesson never used, two humps of the learning rate on one lesson, and a column of rows."""
        data = {**counting_data(), "lesson": np.array(lesson)}
        if lesson is None:
            del data["lesson"]
        with pytest.raises(ValueError, match="lesson.*(first_lesson_share|one number an episode)") as caught:
            lewm.check_data(data, tiny(first_lesson_share=share))
        assert "\n" not in str(caught.value)

# ======== 8 Training ==================================================================================

def interrupted_loss(batch, stop):
    """In the place of LeWM.loss: calls `stop` in the middle of the step with that batch, counted from 1."""
    loss = lewm.LeWM.loss
    batches = itertools.count(1)

    def interrupted(model, pixels, blocks):
        if next(batches) == batch:
            stop()
        return loss(model, pixels, blocks)

    return interrupted

def metrics_without_times(folder):
    lines = (folder / "metrics.csv").read_text(encoding="utf-8").splitlines()
    return [{name: cell for name, cell in row.items() if name != "seconds"} for row in csv.DictReader(lines)]

@pytest.fixture(scope="module")
def whole_run(tmp_path_factory, recorded, pusht):
    """A training that nothing has stopped: its Config, folder and model."""
    cfg = tiny(steps=12, checkpoint_minutes=0)
    folder = tmp_path_factory.mktemp("whole")
    return cfg, folder, lewm.train(cfg, recorded, folder, device="cpu", render=pusht.render)

class TestTraining:
    def test_the_learning_rate_warms_up_and_falls_to_zero_in_each_lesson(self):
        """Catches one cosine over both lessons, a second one without a warm-up, and the peak of the other."""
        one = tiny(steps=100, warmup=0.1, lr=1.0)
        two = tiny(steps=100, warmup=0.1, lr=1.0, first_lesson_share=0.4, first_lr=0.5)
        whole, halves = ([lewm.learning_rate(step, cfg) for step in range(100)] for cfg in (one, two))
        assert whole[0] == pytest.approx(0.1) and whole[9] == 1.0 == max(whole) and whole[-1] < 0.01
        assert halves[:4] == pytest.approx([0.125, 0.25, 0.375, 0.5])
        assert max(halves[:40]) == 0.5 and halves[39] < 0.005
        assert halves[40] == pytest.approx(1 / 6) and halves[45] == 1.0 == max(halves[40:])
        assert halves[-1] < 0.005
        for cosine in (whole[10:], halves[4:40], halves[46:]):
            assert all(a > b for a, b in zip(cosine, cosine[1:])), "each lesson has its own cosine"

    def test_no_number_comes_from_held_out_episodes_but_the_held_out_error(self, tmp_path):
        """Catches a held-out error that is the training one, and statistics that see held-out episodes."""
        cfg = tiny(**COUNTING, steps=3, held_out=0.5, whiten=True, proposal_steps=1)
        data = counting_data((30, 30, 30, 30))
        _, held_out = lewm.split_episodes(4, 0.5, cfg.seed)
        other = {name: array.copy() for name, array in data.items()}
        for e in held_out:
            other["pixels"][30 * e:30 * e + 30] = 255 - other["pixels"][30 * e:30 * e + 30]
            other["action"][30 * e:30 * e + 30] *= -3
        models = [lewm.train(cfg, changed, tmp_path / name, device="cpu")
                  for name, changed in {"data": data, "other": other}.items()]
        assert not differing(*models), "other held-out episodes, another model"
        row, other_row = (metrics_without_times(tmp_path / name)[-1] for name in ("data", "other"))
        for name in row:
            judged = name.startswith("val_") or name in ("straightness", "effective_rank", "min_std")
            assert (row[name] != other_row[name]) == judged, name

    def test_it_draws_from_the_first_lesson_alone_and_then_from_the_second_alone(self):
        """Catches lessons that are mixed or swapped, and a held-out error measured on the first lesson."""
        cfg = tiny(**COUNTING, steps=7, first_lesson_share=0.57, held_out=0.5, whiten=False)
        data = {**counting_data((16,) * 12), "lesson": np.repeat([0, 1], 6)}
        model = lewm.LeWM(cfg)
        seen = {True: [], False: []}                        # episodes of each batch, by model.training

        def encode(pixels):
            assert not torch.is_autocast_enabled("cpu"), "bfloat16 is for GPUs"
            seen[model.training].append({row // 16 for row in pixels.unique().tolist()})
            return lewm.LeWM.encode(model, pixels)

        model.encode = encode
        lewm.train(cfg, data, device="cpu", model=model)
        kept, held_out = (set(side.tolist()) for side in lewm.split_episodes(12, 0.5, cfg.seed))
        easy = set(range(6))
        assert len(seen[True]) == 7 and set().union(*seen[False]) == held_out - easy
        assert set().union(*seen[True][:4]) == kept & easy and set().union(*seen[True][4:]) == kept - easy

    def test_any_arrays_can_be_learned_from(self, tmp_path):
        """Catches Push-T's sizes in the code: 3 action numbers, blocks of 2 steps and 20 px pictures."""
        rng = np.random.default_rng(0)
        data = {"pixels": rng.integers(0, 256, (200, 20, 20, 3), dtype=np.uint8),
                "action": rng.normal(size=(200, 3)), "ep_len": np.full(4, 50, np.uint8),
                "ep_offset": np.arange(4, dtype=np.uint8) * 50}
        cfg = tiny(action_dim=3, frame_skip=2, steps=2)
        model = lewm.LeWM(cfg)
        before = copy.deepcopy(model)
        random = torch.get_rng_state()
        assert lewm.train(cfg, data, device="cpu", model=model) is model and not model.training
        assert torch.equal(random, torch.get_rng_state()), "the caller's random numbers are his own"
        moved = differing(before, model)
        for part, module in model.named_children():
            names = {f"{part}.{name}" for name, _ in module.named_parameters()}
            assert names & {*moved} or not names, f"two steps did not move {part}"
        assert model.predict(noise(2, 3, 16), noise(2, 3, 6)).shape == (2, 3, 16)
        assert not list(tmp_path.iterdir()), "without `out` nothing is written"

    def test_diagnostics_have_known_answers(self):
        """Catches a rank that ignores a dead dimension, and a straightness not of velocities."""
        z = noise(4000, 8)
        assert abs(lewm.effective_rank(z + 5) - 8) < 0.1
        assert abs(lewm.effective_rank(z * (torch.arange(8) < 4)) - 4) < 0.1
        assert lewm.effective_rank(z[:, :1] * torch.ones(8)) < 1.001
        assert lewm.effective_rank(torch.ones(9, 8)) == 1.0, "collapse is a number, too"
        line = torch.arange(5.0)[None, :, None] * noise(3, 1, 8)
        assert abs(lewm.straightness(line) - 1) < 1e-5
        # independent frames turn back half the time
        assert abs(lewm.straightness(noise(4000, 5, 64)) + 0.5) < 0.05, "expected a cosine of -0.5"

    def test_diagnostics_in_a_known_world(self):
        """Catches an error against the wrong frame, a copy of the goal, and actions that are not shuffled."""
        model = adder()
        model.encode = lambda pixels: pixels                # a picture is its own embedding
        blocks = noise(8, 3, 10)
        z = torch.cat([torch.zeros(8, 1, 4), blocks[..., :4].cumsum(1)], 1)
        row = lewm.diagnose(model, z, blocks)
        assert row["val_prediction"] < 1e-10 and row["val_shuffled_ratio"] > 1e6
        assert row["val_copy_last"] == pytest.approx(blocks[..., :4].square().mean().item(), rel=1e-5)
        z[:, -1] += 2                                       # the last of three predictions is off by 2
        row = lewm.diagnose(model, z, blocks)
        shuffled = (z[:, :-1] + blocks.roll(1, 0)[..., :4] - z[:, 1:]).square().mean().item()
        assert row["min_std"] == pytest.approx(z.flatten(0, 1).std(0).min().item(), rel=1e-5)
        assert row["val_prediction"] == pytest.approx(4 / 3, rel=1e-5)
        assert row["val_shuffled_ratio"] == pytest.approx(shuffled / (4 / 3), rel=1e-5)

    def test_diagnostics_do_not_change_the_model(self):
        """Catches diagnostics that move batch-norm averages or the random state: logging changes the run."""
        model = tiny_model().train()
        before = copy.deepcopy(model)
        random = torch.get_rng_state()
        numbers = lewm.diagnose(model, torch.zeros(8, 4, 3, 32, 32, dtype=torch.uint8), noise(8, 3, 10))
        assert model.training and torch.equal(random, torch.get_rng_state())
        assert all(isinstance(x, float) and math.isfinite(x) for x in numbers.values())
        assert not differing(before, model)

    def test_a_resumed_run_equals_a_whole_one(self, tmp_path, recorded, whole_run, monkeypatch, pusht):
        """Catches any state that is missing from the checkpoint: optimizer, random numbers, sampler, step."""
        cfg, folder, whole = whole_run
        ctrl_c = interrupted_loss(7, lambda: signal.raise_signal(signal.SIGINT))
        before = signal.signal(signal.SIGINT, signal.default_int_handler)   # jobs in the background ignore it
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(lewm.LeWM, "loss", ctrl_c)
            lewm.train(cfg, recorded, tmp_path, device="cpu", render=pusht.render)
        signal.signal(signal.SIGINT, before)
        assert 0 < lewm.read_weights(tmp_path / "checkpoint.pt")["step"] < 12
        with torch.no_grad():                               # as a notebook's cell may have it
            model = lewm.train(cfg, recorded, tmp_path, resume=True, device="cpu", render=pusht.render)
        assert not differing(whole, model)
        assert metrics_without_times(folder) == metrics_without_times(tmp_path)
        assert b"\r" not in Path("metrics.csv").read_bytes()
        with open("metrics.csv") as file:
            rows = [{name: float(cell) for name, cell in row.items()} for row in csv.DictReader(file)]
        seconds = [row["seconds"] for row in rows]
        assert seconds == sorted(seconds) and 0 < seconds[0] < seconds[-1] < 600, "they go on, too"

    def test_other_settings_or_data_are_refused_on_the_way(self, tmp_path, recorded, whole_run, pusht):
        """Catches a run that goes on with others than it began with, and a training that is written over."""
        cfg, folder, trained = whole_run
        shutil.copy(folder / "checkpoint.pt", tmp_path)
        with pytest.raises(ValueError, match="checkpoint.pt is there already.*resume"):
            lewm.train(cfg, recorded, tmp_path, device="cpu", render=pusht.render)
        for name, new in {"lr": 0.5, "steps": 20, "seed": 5}.items():
            other = dataclasses.replace(cfg, **{name: new})
            with pytest.raises(ValueError, match=f"{name} is .*, not {new}"):
                lewm.train(other, recorded, tmp_path, True, "cpu", pusht.render)
        with pytest.raises(ValueError, match="other data"):
            other = {**recorded, "action": 2 * recorded["action"]}
            lewm.train(cfg, other, tmp_path, True, "cpu", pusht.render)

    def test_settings_of_running_may_change_on_the_way(self, tmp_path, recorded, whole_run, pusht):
        """Catches a run that cannot save more rarely, or plan otherwise, than it began."""
        cfg, folder, trained = whole_run
        shutil.copy(folder / "checkpoint.pt", tmp_path)
        other = dataclasses.replace(cfg, checkpoint_minutes=9.0, candidates=77)
        model = lewm.train(other, recorded, tmp_path, True, "cpu", pusht.render)
        assert model.cfg == other and not differing(trained, model)

    def test_finished_weights_are_trained_on(self, tmp_path, recorded, whole_run, monkeypatch, pusht):
        """Catches a training that begins anew, and one that does not ask the schedule."""
        cfg, folder, trained = whole_run
        before = contents(folder)
        model, _ = lewm.load_checkpoint(folder / "checkpoint.pt")
        further = dataclasses.replace(cfg, steps=2, lr=1e-4, seed=1)
        monkeypatch.setattr(lewm, "learning_rate", lambda step, cfg: 0.0)
        lewm.train(further, recorded, tmp_path, device="cpu", render=pusht.render, model=model)
        again, saved = lewm.load_checkpoint(tmp_path / "checkpoint.pt")
        moved = {*differing(trained, again)} & {name for name, _ in again.named_parameters()}
        assert not moved and saved["step"] == 2 and again.cfg == further
        assert contents(folder) == before

    @pytest.mark.parametrize("data, embed_dim, words", [
        (counting_data(), 8, "embed_dim is 16 .*, not 8"), (counting_data(column="state"), 16, "render="),
        (counting_data((5, 5, 5, 5)), 16, "no episode holds a window")])
    def test_what_does_not_fit_is_refused(self, data, embed_dim, words):
        """Catches a Config that is not the model's, a loop that knows Push-T, errors deep inside torch."""
        cfg = tiny(**COUNTING, embed_dim=embed_dim)
        with pytest.raises(ValueError, match=words):
            lewm.train(cfg, data, device="cpu", model=tiny_model(**COUNTING))

    def test_a_folder_may_be_named_from_home(self, tmp_path, monkeypatch):
        """Catches a folder of the name ~."""
        for name in ("HOME", "USERPROFILE"):
            monkeypatch.setenv(name, str(tmp_path))
        lewm.train(tiny(**COUNTING, steps=1), counting_data(), "~/here", device="cpu")
        assert {path.name for path in tmp_path.iterdir()} == {"here"}

    def test_training_under_inference_mode_is_refused(self):
        """Catches an error deep inside torch."""
        with torch.inference_mode(), pytest.raises(ValueError, match="no inference_mode"):
            lewm.train(tiny(**COUNTING), counting_data(), device="cpu")

    def test_nan_is_refused(self):
        """Catches hours of training on NaN."""
        model = tiny_model(**COUNTING)
        model.latent_loss = lambda z, blocks: (z.sum() * math.nan, {})
        with pytest.raises(ValueError, match="not finite at step"):
            lewm.train(model.cfg, counting_data(), device="cpu", model=model)

def dying_run(moment, settings, folder):
    """In another process: a training that is killed in its fifth step, or half-way through a write."""
    save = torch.save
    die = lambda: os.kill(os.getpid(), signal.SIGKILL)

    def dying_save(state, path):
        save(state, path)
        if state["step"] == 8:
            os.truncate(path, 5000)
            die()

    if moment == "step":
        lewm.LeWM.loss = interrupted_loss(5, die)
    else:
        torch.save = dying_save
    world = importlib.import_module("pusht")
    data = world.collect(12, seed=5, workers=1)
    lewm.train(lewm.Config(**settings), data, folder, resume=True, device="cpu", render=world.render)

class TestTrainingSlow:
    @pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="there is no SIGKILL here")
    def test_a_run_that_was_killed_twice_equals_a_whole_one(self, tmp_path, recorded, whole_run, pusht):
        """Catches a checkpoint that a kill spoils, in the middle of a step or half-way through a write."""
        cfg, folder, whole = whole_run
        steps = []
        for moment in ("step", "write"):
            arguments = (moment, vars(cfg), tmp_path)
            run = multiprocessing.get_context("spawn").Process(target=dying_run, args=arguments)
            run.start()
            run.join(600)
            assert run.exitcode == -signal.SIGKILL
            steps.append(lewm.read_weights(tmp_path / "checkpoint.pt")["step"])
        assert 0 < steps[0] <= 4 and steps[0] <= steps[1] < 8
        model = lewm.train(cfg, recorded, tmp_path, resume=True, device="cpu", render=pusht.render)
        assert not differing(whole, model)
        assert metrics_without_times(folder) == metrics_without_times(tmp_path)

    def test_a_compiled_run_equals_one_that_is_not(self, monkeypatch):
        """Catches a compiled step that is another function, and a setting that compiles nothing."""
        # the backend leaves out what takes minutes: to generate code
        compile_ = torch.compile
        compiler = mock.Mock(side_effect=lambda f, **_: compile_(f, backend="aot_eager"))
        monkeypatch.setattr(torch, "compile", compiler)
        small = dict(**COUNTING, dropout=0.0, encoder_depth=1, predictor_depth=1, steps=2)
        cfgs = [tiny(compile=on, **small) for on in (True, False)]
        runs = [lewm.train(cfg, counting_data(), device="cpu") for cfg in cfgs]
        assert compiler.call_count == 1
        for (name, a), b in zip(runs[0].named_parameters(), runs[1].parameters()):
            assert torch.allclose(a, b, atol=1e-5), f"{name}: {(a - b).abs().max():.1g}"

# ---- Recipes: another part, in a few lines ----

def with_convolutions(cfg):
    model = lewm.LeWM(cfg)
    model.encoder = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 4, 4), torch.nn.ReLU(),
        torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(8, cfg.encoder_width))
    return model

def with_a_second_term(cfg):
    class Inverse(lewm.LeWM):
        def latent_loss(self, z, blocks):
            loss, parts = super().latent_loss(z, blocks)
            pairs = torch.cat([z[:, :-1], z[:, 1:]], dim=-1)
            parts["inverse"] = (self.read_action(pairs) - blocks).square().mean()
            return loss + parts["inverse"], parts

    model = Inverse(cfg)
    model.read_action = torch.nn.Linear(2 * cfg.embed_dim, cfg.action_block)
    return model

def with_variance_alone(cfg):
    class Variance(torch.nn.Module):
        def forward(self, z):
            return (1 - z.std(0)).relu().mean()

    model = lewm.LeWM(cfg)
    model.sigreg = Variance()
    return model

@pytest.mark.parametrize("make", [with_convolutions, with_a_second_term, with_variance_alone])
class TestRecipes:
    def test_it_trains_saves_loads_and_resumes(self, make, tmp_path):
        """Catches a hook that is not called, a part that does not learn, and an unreadable checkpoint."""
        cfg = tiny(**COUNTING, steps=2, checkpoint_minutes=0)
        model = make(cfg)
        before = copy.deepcopy(model)
        lewm.train(cfg, counting_data(), tmp_path, device="cpu", model=model)
        own = {name for name, _ in model.named_parameters()} - {*tiny_model(**COUNTING).state_dict()}
        assert own <= {*differing(before, model)}, "a part has not learned"
        again, _ = lewm.load_checkpoint(tmp_path / "checkpoint.pt", model=make(cfg))
        resumed = lewm.train(cfg, counting_data(), tmp_path, resume=True, device="cpu", model=make(cfg))
        assert not differing(model, again) and not differing(model, resumed)
        pixels = random_pictures(4, 4, 3, 8, 8)
        blocks = noise(4, 3, 10)
        torch.manual_seed(0)
        loss, parts = again.eval().loss(pixels, blocks)
        torch.manual_seed(0)
        plain_loss, _ = lewm.LeWM.latent_loss(again, again.encode(pixels), blocks)
        added = parts.get("inverse", torch.zeros(())).item()
        assert (loss - plain_loss).item() == pytest.approx(added, abs=1e-5)
        assert {*parts} < {*metrics_without_times(tmp_path)[-1]}, "the parts of a loss are logged"

# ======== 9 A distance and a proposal =================================================================

class Dot:
    """A world that is not Push-T: a dot on a line of 32 px. Its only action number moves the dot, in px."""
    def __init__(self, place, goal):
        self.place = place
        self.goal = goal
        self.observation = np.zeros(1)                      # the same array each time, as in some worlds

    def step(self, action):
        self.place = min(max(self.place + float(action[0]), 0), 31)
        self.observation[:] = self.place
        return self.observation, 0.0, abs(self.place - self.goal) < 1, False, {}

    def render(self):
        picture = np.zeros((32, 32, 3), np.uint8)
        picture[:, round(self.place)] = 255
        return picture[::-1]                                # MuJoCo's are mirrored views, too

def dot_model(**changes):
    """Knows that world exactly: z is the dot's place. `calls`: what `predict` was asked, by picture."""
    model = tiny_model(action_dim=1, frame_skip=2, embed_dim=1, **changes).eval()
    model.calls = []

    def encode(pixels):
        model.calls.append([])
        bright = pixels.float().mean((-3, -2))              # (...,32), one number a column
        return (bright * torch.arange(32)).sum(-1, keepdim=True) / bright.sum(-1, keepdim=True)

    def predict(z, blocks):
        model.calls[-1].append((z, blocks))
        return z + model.to_actions(blocks).unflatten(-2, (-1, 2)).sum(-2)

    model.encode = encode
    model.predict = predict
    return set_actions(model, mean=[1.0], std=[2.0], low=[-3.0], high=[5.0])

class TestProposal:
    def test_the_search_measures_the_distance_of_the_formula(self):
        """Catches a power of the wrong matrix, one that is ignored, and a scale on one side alone."""
        model = toy_planner(proposal_steps=1)
        root = noise(4, 4)
        model.change.copy_(root @ root.T)
        variance, axes = torch.linalg.eigh(model.change + 0.01 * model.change.trace() / 4 * torch.eye(4))
        expected = axes @ torch.diag(variance.rsqrt()) @ axes.T
        scale = lewm.latent_scale(model, 1.0)
        assert torch.allclose(scale, expected * (2 / expected.norm()), atol=1e-4)
        assert torch.allclose(lewm.latent_scale(model, 0.0), torch.eye(4), atol=1e-6)
        start = torch.zeros(2, 4)
        goal = 20 * noise(2, 4, seed=1)                     # out of reach, so that the distance decides
        plan = lewm.cem(model, start, goal, **SEARCH, distance_power=1.0)
        assert not torch.allclose(plan, lewm.cem(model, start, goal, **SEARCH), atol=0.1)
        model.predict = lambda z, blocks: z + blocks[..., :4] @ scale
        assert torch.allclose(plan, lewm.cem(model, start, goal @ scale, **SEARCH), atol=1e-3)

    def test_it_is_learned_from_known_episodes(self):
        """Catches changes or goals of another episode, and blocks that do not lie between frame and goal."""
        rng = np.random.default_rng(0)
        pace = rng.choice([-1.0, 1.0], (60, 1))             # px a step, all through an episode
        places = rng.integers(12, 20, (60, 1)) + pace * np.arange(13)       # (60,13)
        data = {"pixels": np.stack([Dot(place, None).render() for place in places.flat]),
                "action": pace.repeat(13, 0), "ep_len": np.full(60, 13), "ep_offset": 13 * np.arange(60)}
        model = dot_model(proposal_steps=200, proposal_horizon=3, horizon=3).train()
        lewm.fit_planner(model, data)
        assert not model.training, "embeddings that no longer change are those of evaluation mode"
        assert model.change.item() == pytest.approx(4, rel=1e-3), "2 px from frame to frame"
        z = torch.from_numpy(places[:, :1]).float()
        for k in (1, 2, 3):
            goals = torch.from_numpy(places[:, 2 * k:2 * k + 1]).float()
            with torch.no_grad():
                plans = model.proposal(z, goals, torch.full((60,), k))[:, :k]
            assert plans.shape == (60, k, 2)
            error = (model.to_actions(plans)[..., 0] - torch.from_numpy(pace)).square().mean()
            assert error < 0.2, f"{k} blocks ahead: {error:.2f}, expected far below the variance, 1"

    @pytest.mark.parametrize("use", [True, False])
    def test_the_planner_searches_around_it(self, use):
        """Catches a proposal that is not used, one that cannot be switched off, and one for another goal."""
        model = dot_model(candidates=2, elites=2, iterations=1, horizon=2, replan=1, use_proposal=use)

        class Straight(torch.nn.Module):
            def forward(self, z, z_goal, k):
                actions = ((z_goal - z) / (2 * k[:, None]))[:, None].repeat(1, 6, 1)
                return model.to_blocks(actions)             # for three blocks

        model.proposal = Straight()
        worlds = [Dot(2, goal=20), Dot(16, goal=3)]
        goals = [Dot(world.goal, None).render() for world in worlds]
        _, reached = lewm.play(worlds, lewm.Planner(model, goals), budget=24)
        assert reached.all() == use, f"the dots are at {[world.place for world in worlds]}, goals 20 and 3"

    def test_the_search_around_it_is_half_as_wide_as_one_from_nothing(self):
        """Catches a search that leaves the proposal at once, or one that cannot leave it."""
        seen = []
        model = toy_planner()
        model.predict = lambda z, blocks: seen.append(blocks) or z
        for start in (None, torch.zeros(1, 1, 10)):
            lewm.cem(model, noise(1, 4), noise(1, 4), start=start, horizon=1, iterations=1, candidates=2000)
        nothing, around = (blocks.std().item() for blocks in seen)
        assert around == pytest.approx(0.5, rel=0.03) and nothing == pytest.approx(0.96, rel=0.03)

    def test_the_one_in_assets_proposes_what_it_proposed(self, shipped):
        """Catches another proposal than the one that was trained, where both would learn."""
        z, z_goal = noise(2, 1, 32)
        with torch.no_grad():
            plans = shipped.proposal(z, z_goal, torch.tensor([15]))
        assert plans.shape == (1, 15, 10) and plans.norm().item() == pytest.approx(3.17994, abs=1e-3)

    def test_without_iterations_it_is_the_plan(self):
        """Catches a plan outside the data's range, and a search that cannot do without an iteration."""
        start = 3 * noise(2, 3, 10)
        plan = lewm.cem(toy_planner(), noise(2, 4), noise(2, 4), start=start, horizon=3, iterations=0)
        assert torch.equal(plan, start.clamp(-2, 2))

    def test_a_fit_that_was_stopped_is_made_up_for(self, tmp_path, monkeypatch):
        """Catches weights that are lost when the planner cannot be fitted, and a resumed run without one."""
        cfg = tiny(**COUNTING, steps=2, proposal_steps=2)
        with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
            patch.setattr(lewm, "fit_planner", stops)
            lewm.train(cfg, counting_data(), tmp_path, device="cpu")
        resumed = lewm.train(cfg, counting_data(), tmp_path, True, "cpu")
        assert not differing(lewm.train(cfg, counting_data(), device="cpu"), resumed)

    def test_it_travels_with_the_weights(self, tmp_path):
        """Catches a checkpoint that forgets what was fitted after the training, or cannot be read again."""
        cfg = tiny(**COUNTING, steps=1, proposal_steps=2)
        model = lewm.train(cfg, counting_data(), tmp_path, device="cpu")
        again, _ = lewm.load_checkpoint(tmp_path / "checkpoint.pt")
        assert not differing(model, again)
        z = noise(3, 16)
        k = torch.tensor([1, 2, 5])
        assert torch.equal(model.proposal(z, z + 1, k), again.proposal(z, z + 1, k))
        assert not torch.equal(again.change, torch.eye(16)), "the changes were not measured"
        resumed = lewm.train(cfg, counting_data(), tmp_path, resume=True, device="cpu", model=again)
        assert not differing(model, resumed), "a finished run must stay as it is"

# ======== 10 Planning in a world ======================================================================

class TestWorlds:
    def test_a_plan_made_anew_keeps_its_deadline(self):
        """Catches a goal that stays as many blocks away at each plan: it would be put off for ever."""
        model = dot_model(candidates=4, iterations=1, elites=2, horizon=5, replan=2, context=1)
        planner = lewm.Planner(model, [Dot(31, None).render()])
        lewm.play([Dot(0, goal=1000)], planner, budget=20)
        predictions = [len(calls) for calls in model.calls[1:]]     # after the goal: one picture a block
        blocks = [5 * count / predictions[0] for count in predictions]
        assert blocks == [5, 0, 3, 0, 1, 5, 0, 3, 0, 1], "plans of 5 blocks, made anew after 2"
        assert planner.plans == 6

    @pytest.mark.parametrize("context", [1, 2, 3])
    def test_a_plan_starts_from_the_last_frames_and_the_blocks_between_them(self, context):
        """Catches frames or blocks of another episode or time, and what is lost when an episode ends."""
        model = dot_model(candidates=40, iterations=3, elites=4, horizon=4, replan=1, context=context)
        worlds = [Dot(10, goal=14), Dot(5, goal=1000), Dot(25, goal=1000)]  # the first ends on the way
        goals = [Dot(place, None).render() for place in (15, 15, 15)]
        _, reached = lewm.play(worlds, lewm.Planner(model, goals), budget=12)
        assert reached.tolist() == [True, False, False]
        plans = [calls for calls in model.calls if calls]
        assert {calls[0][0].shape[1] for calls in plans} == set(range(1, context + 1))
        for z, blocks in (call for calls in plans for call in calls):
            moved = z[0, :, 0].diff()                       # frames are exact to half a px
            told = model.to_actions(blocks[0])[:, 0].view(-1, 2).sum(1)[:-1]
            assert ((moved - told).abs() <= 1).all(), f"the dot moved by {moved}, the blocks say {told}"

    def test_an_episode_is_played_the_same_alone_and_beside_others(self):
        """Catches a shared generator, and a goal, picture or count that goes by the number running."""
        torch.manual_seed(0)
        model = awake(tiny_model(
            action_dim=1, frame_skip=2, candidates=10, iterations=2, elites=3, horizon=3, replan=2))
        set_actions(model.eval(), mean=[0.0], std=[2.0], low=[-5.0], high=[5.0])

        def played(starts, seed=0):
            goals = [Dot(31 - start, None).render() for start in starts]
            worlds = [Dot(start, goal=start + 4) for start in starts]       # ends whenever it comes by there
            return lewm.play(worlds, lewm.Planner(model, goals, seed=seed), budget=20)[0]

        few = played([3, 12])
        many = played([3, 12, 20, 27])
        assert all(map(np.array_equal, few, many)), "in company the two went another way"
        assert not np.array_equal(few[0], played([3], seed=1)[0]), "another seed, another plan"

    def test_an_episode_stops_at_its_goal_and_all_of_them_at_the_budget(self):
        """Catches a world played on after its goal or the budget, and observations that are not copied."""
        asked = []
        worlds = [Dot(0, goal=4), Dot(0, goal=100)]

        def three_steps_to_the_right(running, environments):
            assert environments is worlds
            asked.append(running.tolist())
            return np.ones((len(running), 3, 1))

        histories, reached = lewm.play(worlds, three_steps_to_the_right, budget=8)
        assert asked == [[0, 1], [0, 1], [1]] and reached.tolist() == [True, False]
        assert histories[0].tolist() == [[1], [2], [3], [4]] and worlds[0].place == 4
        assert histories[1].shape == (8, 1) and worlds[1].place == 8

    def test_a_second_play_with_one_planner_is_refused(self):
        """Catches a planner that goes on with the frames of another episode."""
        planner = lewm.Planner(dot_model(candidates=4, elites=2, iterations=1), [Dot(31, None).render()])
        lewm.play([Dot(0, goal=1000)], planner, budget=2)
        with pytest.raises(ValueError, match="plays once"):
            lewm.play([Dot(0, goal=1000)], planner, budget=2)

    def test_pictures_of_other_kinds_are_the_same_or_refused(self):
        """Catches Gymnasium's None and lists of frames, and an environment that draws into one buffer."""
        model = dot_model()
        first, second = (Dot(place, None).render() for place in (3, 20))
        z = lewm.Planner(model, [first, second]).z_goal
        frozen = first.copy()
        frozen.flags.writeable = False
        buffer = np.zeros_like(first)

        def drawn(picture):
            buffer[:] = picture
            return buffer

        for same in ([torch.tensor(first.copy()), second], [frozen, second], map(drawn, [first, second])):
            planner = lewm.Planner(model, [first, second])
            assert torch.equal(planner.encode(same), z)
        for wrong, words in ((None, "NoneType of shape .*rgb_array"), ([first], "list of shape .*rgb_array"),
                             (first / 255.0, "float64, not uint8"), (first[..., 0], "not .height, width, 3")):
            with pytest.raises(ValueError, match=words):
                lewm.Planner(model, [wrong])

    @pytest.mark.parametrize("shape", [(2, 0, 1), (1, 1, 1), (2, 1)])
    def test_a_policy_without_an_action_for_each_episode_is_refused(self, shape):
        """Catches a play that never ends, and an episode that stands still without a word."""
        with pytest.raises(ValueError, match=r"not actions \(2,j,a\)"):
            lewm.play([Dot(0, 9), Dot(1, 9)], lambda running, environments: np.zeros(shape), budget=2)

    def test_evaluation_plays_the_planner_and_the_worlds_baselines(self):
        """Catches Push-T in the planner, goals of another episode, plans played z-scored, lost baselines."""
        given = []

        def baselines(recorded, budget, action_stats, seed):
            given.append((recorded, budget, action_stats.tolist()))
            return {"still": lambda running, environments: np.zeros((len(running), 1, 1))}

        def won(histories, goals):
            return [abs(history[-1, 0] - goal) < 1 for history, goal in zip(histories, goals)]

        world = types.SimpleNamespace(
            baselines=baselines, score=lambda histories, goals: {"won": won(histories, goals)},
            pictures=lambda places, size: [Dot(place, None).render() for place in places],
            environments=lambda starts, goals, size: [Dot(*pair) for pair in zip(starts, goals)])
        pairs = ([2, 16, 30, 10], [20, 3, 25, 11], "recorded")
        result, histories = lewm.evaluate(dot_model(replan=1, budget=30), world, pairs)
        assert given == [("recorded", 30, [[1.0], [2.0], [-3.0], [5.0]])]
        assert result["episodes"] == 4 and result["seconds_per_plan"] > 0
        rows = result["policies"]
        assert rows["LeWM + CEM"] == {"won": [True] * 4, "interval": lewm.wilson(4, 4)}
        assert rows["still"] == {"won": [False] * 4, "interval": lewm.wilson(0, 4)}
        assert all(won(histories, pairs[1]))

    def test_evaluation_gives_the_same_pairs_the_same_outcome_in_any_company(self, monkeypatch, pusht):
        """Catches pairs, noise or pictures that depend on how many episodes are evaluated."""
        torch.manual_seed(0)
        model = awake(tiny_model(candidates=10, iterations=2, elites=3, budget=10, horizon=2, replan=1))
        play = lewm.play
        played = []
        monkeypatch.setattr(lewm, "play", lambda *args: played.append(play(*args)) or played[-1])
        for n in (2, 4):
            result, _ = lewm.evaluate(model.eval(), pusht, pusht.held_out_pairs(n, "dev"))
        names = ["LeWM + CEM", "random actions", "doing nothing", "recorded actions"]
        assert list(result["policies"]) == names and len(played) == 8
        for name, (two, _), (four, _) in zip(names, played[:4], played[4:]):
            assert all(map(np.array_equal, two, four)), f"{name} goes another way in company"

    def test_the_wilson_interval_has_known_values(self):
        """Catches the normal approximation: 100 % +- 0 for 50 of 50. Values from the literature."""
        known = {(48, 50): (0.8654, 0.9890), (50, 50): (0.9287, 1.0), (0, 100): (0.0, 0.0370)}
        for (successes, n), expected in known.items():
            assert np.allclose(lewm.wilson(successes, n), expected, atol=2e-4)

# ======== 1 Config ====================================================================================

class TestConfig:
    def test_numpys_numbers_are_taken_and_plain_ones_are_stored(self):
        """Catches a checkpoint that holds NumPy objects, which a loader that executes nothing refuses."""
        cfg = tiny(steps=np.int64(7), lr=np.float32(0.5), whiten=np.True_, dropout=0)
        assert (cfg.steps, cfg.lr, cfg.whiten, cfg.dropout) == (7, 0.5, True, 0.0)
        for field in dataclasses.fields(cfg):
            assert type(getattr(cfg, field.name)) is field.type, field.name

    def test_a_window_has_one_frame_more_than_the_history(self):
        """Catches a frame that is never a target, and a number of frames that can contradict the history."""
        assert [tiny(history=n).frames for n in (1, 3, 5)] == [2, 4, 6]

    @pytest.mark.parametrize("changes, words", [
        ({"compile": "no"}, "compile is 'no'"), ({"compile": 1}, "compile is 1"),
        ({"steps": 2.0}, "steps is 2.0"), ({"steps": "8"}, "steps is '8'"), ({"knots": 1}, "knots is 1"),
        ({"lr": math.nan}, "lr is nan"), ({"lr": math.inf}, "lr is inf"),
        ({"dropout": 1.0}, "dropout is 1.0"), ({"first_lesson_share": 1.0}, "first_lesson_share is 1.0"),
        ({"image_size": 30}, "image_size 30 is not a multiple"), ({"seed": 10**6}, "seed is 1000000"),
        ({"distance_power": 1.0}, "proposal_steps > 0"), ({"frames": 5}, "frames"),
        ({"proposal_steps": 1, "proposal_horizon": 5, "horizon": 6}, "horizon 6 > proposal_horizon 5"),
        ({"candidate": 5}, "candidate")])
    def test_what_is_impossible_is_refused(self, changes, words):
        """Catches text that counts as true, settings that fail later, and a typo that changes nothing."""
        with pytest.raises((ValueError, TypeError), match=words) as caught:
            tiny(**changes)
        assert "\n" not in str(caught.value)

# ======== 11 Checkpoints ==============================================================================

class Trap:
    def __reduce__(self):
        return (os.system, ("touch trap-was-sprung",))

class TestCheckpoints:
    def test_a_damaged_foreign_or_missing_file_is_refused(self):
        """Catches torch.load without weights_only, half a file that loads, and a new model for none."""
        lewm.save_checkpoint("good.pt", tiny_model())
        good = Path("good.pt").read_bytes()
        content = torch.load("good.pt", weights_only=True)
        unsafe = "would run code.*refused"
        foreign = "no checkpoint of this version"
        files = {
            "half": (good[:len(good) // 2], unsafe), "empty": (b"", unsafe), "text": (b"hello", unsafe),
            "bare": (pickle.dumps({"weights": Trap()}, protocol=2), unsafe),
            "trap": ({"config": Trap()}, unsafe), "module": (torch.nn.Linear(2, 2), unsafe),
            "list": ([1, 2], "no dictionary"), "foreign": ({"weights": torch.zeros(3)}, foreign),
            "misfit": ({**content, "config": {**content["config"], "embed_dim": 17}}, foreign),
            "newer": ({**content, "config": {**content["config"], "new_field": 1}}, foreign),
            "hollow": ({"config": {}}, foreign)}
        for name, (wrong, words) in files.items():
            path = Path(f"{name}.pt")
            path.write_bytes(wrong) if isinstance(wrong, bytes) else torch.save(wrong, path)
            with pytest.raises(ValueError, match=f"{name}.pt.*{words}") as caught:
                lewm.load_checkpoint(path)
            assert "\n" not in str(caught.value), str(caught.value)
        assert not Path("trap-was-sprung").exists(), "loading a checkpoint executed code in it"
        with pytest.raises(FileNotFoundError, match="missing.pt.*--train"):
            lewm.load_checkpoint("missing.pt")

    def test_only_settings_of_running_may_change(self, tmp_path, monkeypatch):
        """Catches an evaluation with other settings than the training's, and a rule by position in Config."""
        @dataclasses.dataclass
        class Config(lewm.Config):
            new_field: int = 7                              # at the end; older files do not have it

        path = tmp_path / "c.pt"
        cfg = tiny(proposal_steps=1, proposal_horizon=9)
        lewm.save_checkpoint(path, lewm.LeWM(cfg))
        monkeypatch.setattr(lewm, "Config", Config)
        allowed = ("compile", "checkpoint_minutes", "horizon", "candidates", "iterations", "elites", "replan",
                   "context", "use_proposal", "distance_power", "budget", "goal_distance", "episodes")
        valid = {"patch_size": 8, "encoder_heads": 3, "image_size": 64, "encoder_width": 48, "held_out": 0.5}
        for field in dataclasses.fields(Config):
            old = getattr(cfg, field.name, 7)
            new = not old if field.type is bool else valid.get(field.name, old + field.type(1))
            if field.name in allowed:
                model, _ = lewm.load_checkpoint(path, changes={field.name: new})
                assert getattr(model.cfg, field.name) == new and model.cfg.new_field == 7
            else:
                with pytest.raises(ValueError, match=f"{field.name} is {old} .* cannot change"):
                    lewm.load_checkpoint(path, changes={field.name: new})

    def test_the_measured_statistics_are_kept(self, whole_run):
        """Catches a resumed or evaluated model that sees other colours than the trained one."""
        cfg, folder, model = whole_run
        again, _ = lewm.load_checkpoint(folder / "checkpoint.pt")
        fresh = lewm.LeWM(cfg)
        for name in STATISTICS:
            assert torch.equal(getattr(model, name), getattr(again, name))
            assert not torch.equal(getattr(model, name), getattr(fresh, name)), f"{name} was not measured"

    @pytest.mark.parametrize("error", [OSError(28, "No space left"), RuntimeError("failed\nwriting")])
    def test_a_write_that_dies_leaves_the_old_file(self, tmp_path, monkeypatch, error):
        """Catches checkpoints written in place: a kill would lose both the old and the new one."""
        path = tmp_path / "c.pt"
        lewm.save_checkpoint(path, tiny_model())
        before = contents(tmp_path)

        def dies(state, file, *args, **kwargs):
            Path(file).write_bytes(b"half a file")
            raise error

        monkeypatch.setattr(torch, "save", dies)
        with pytest.raises(OSError, match="disk full") as caught:
            lewm.save_checkpoint(path, tiny_model())
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)
        assert contents(tmp_path) == before, "the old file must be as it was, and the only one"

# ======== 12 Command line =============================================================================

ONE_LINE = (SystemExit, ValueError, OSError)                # what a refusal of the command line may be

class TestCommandLine:
    @pytest.mark.parametrize("argv, words", [
        ("--train --image_size 60 --patch_size 7", "60 is not a multiple of patch_size 7"),
        ("--train --preset nano --elites 4000", "elites 4000 > candidates"),
        ("--train --lr -1", "lr is -1.0"), ("--train --steps 0", "steps is 0"),
        ("--train --steps two", "two"), ("--train --preset big", "big"),
        ("--train --data nowhere --episodes 1", "nowhere"), ("--train --device warp9", "warp9"),
        ("--eval nothing.pt", "nothing.pt"), ("--eval a.pt --train", "say --train"),
        ("--seed 1", "say --train"), ("--eval a.pt --resume", "say --train"),
        ("--eval a.pt --data b.npz", "--data goes with --train"), ("--train --bogus 1", "--bogus"),
        ("--train --preset smoke --goal_distance 200 --horizon 9", "distance <= 150"),
        ("--train --goal_distance 80", "horizon 16 > proposal_horizon 15"),
        ("--train --goal 99,99,256,300,45", "--goal with --eval"), ("--eval a.pt --start 1", "--start goes"),
        ("--train --action_dim 3", "action_dim is 3")])
    def test_what_is_impossible_is_refused(self, argv, words):
        """Catches silent clipping, ignored flags and tracebacks."""
        with pytest.raises(ONE_LINE) as caught:
            lewm.main(argv.split())
        assert words in str(caught.value) and "\n" not in str(caught.value), str(caught.value)

    def test_a_folder_that_holds_a_checkpoint_is_refused(self, tmp_path):
        """Catches a training or its results that the same command without --resume, or --eval, replaces."""
        lewm.save_checkpoint("checkpoint.pt", tiny_model())
        Path("metrics.csv").write_text("step\n1\n")
        before = contents(tmp_path)
        for argv, words in {"--train --preset smoke": "checkpoint.pt is there already: --resume goes on",
                            "--eval checkpoint.pt": "holds a training.*another --out"}.items():
            with pytest.raises(ValueError, match=words):
                lewm.main([*argv.split(), "--device", "cpu", "--out", "."])
        assert contents(tmp_path) == before

    def test_every_field_of_config_is_a_flag_with_its_comment(self, capsys):
        """Catches a field without a flag, or without an explanation."""
        with pytest.raises(SystemExit):
            lewm.main([])
        text = " ".join(capsys.readouterr().out.split())
        for field in dataclasses.fields(lewm.Config):
            kind = f", --no-{field.name}" if field.type is bool else f" {field.type.__name__}"
            explained = rf"--{field.name}{kind} ((?!--).)+ \(preset paper: {field.default}\)"
            assert re.search(explained, text), f"{field.name} is not explained"
        assert "D, width of an embedding" in text

    @pytest.mark.parametrize("has_cuda", [True, False])
    def test_the_default_preset_is_nano_on_every_device(self, has_cuda, monkeypatch, pusht):
        """Catches a preset that nobody has measured as the default of those who own a GPU."""
        seen = []
        monkeypatch.setattr(lewm, "pick_device", lambda name: torch.device("cuda" if has_cuda else "cpu"))
        for name in ("collect", "collect_lessons", "held_out_pairs"):
            monkeypatch.setattr(pusht, name, lambda *args: counting_data())
        monkeypatch.setattr(lewm, "train", lambda cfg, *args, **kwargs: seen.append(cfg) or stops())
        with pytest.raises(ZeroDivisionError):
            lewm.main(["--train"])
        assert seen == [lewm.Config.preset("nano")]
        assert [path.name for path in Path("runs").iterdir()] == ["nano"]

    @pytest.mark.parametrize("flags, expected", [
        ("", dict(horizon=5, budget=50, goal_distance=25, candidates=50)),
        ("--goal_distance 40", dict(horizon=8, budget=80, goal_distance=40)),
        ("--goal_distance 40 --horizon 5 --budget 60", dict(horizon=5, budget=60, goal_distance=40)),
        ("--full_search", dict(use_proposal=False, candidates=150, iterations=12)),
        ("--full_search --candidates 20", dict(use_proposal=False, candidates=20, iterations=12))])
    def test_a_flag_for_several_overrules_none(self, flags, expected, monkeypatch, pusht):
        """Catches further goals that no plan can reach, and flags that are overruled."""
        seen = []
        lewm.save_checkpoint("c.pt", tiny_model())
        monkeypatch.setattr(lewm, "evaluate", lambda *args: seen.append(args) or stops())
        with pytest.raises(ZeroDivisionError):
            lewm.main(f"--eval c.pt --episodes 2 --device cpu {flags}".split())
        (model, world, pairs), = seen
        assert {name: getattr(model.cfg, name) for name in expected} == expected
        assert world is pusht and pairs[2].shape == (2, model.cfg.goal_distance, 2)

    def test_a_goal_of_your_own_is_planned_for_once(self, capsys):
        """Catches a goal in radians, a start that is ignored, and a plan too short for a goal far away."""
        small = dict(candidates=4, elites=2, iterations=1, proposal_steps=1, proposal_horizon=6)
        lewm.save_checkpoint("c.pt", tiny_model(**small))
        at = ["--start", "400,380,256,300,45", "--goal", "410,380,256,300,60"]
        lewm.main(["--eval", "c.pt", *at, "--device", "cpu", "--out", "out"])
        result = json.loads(Path("out/result.json").read_text())
        assert re.match(r"(not )?reached: agent \d+ px, T \d+ px and \d+ degrees", capsys.readouterr().out)
        assert list(result["policies"]) == ["LeWM + CEM", "random actions", "doing nothing"]
        assert (result["config"]["horizon"], result["config"]["budget"]) == (6, 60)
        assert result["policies"]["doing nothing"]["final_turn_deg"] == pytest.approx(15, abs=0.1)
        assert Path("out/plan.gif").is_file()

    def test_numbers_are_written_where_no_picture_can_be_drawn(self, monkeypatch, capsys, pusht):
        """Catches an hour of planning that is lost with its picture."""
        lewm.save_checkpoint("c.pt", tiny_model(candidates=4, elites=2, iterations=1, budget=5))
        monkeypatch.setattr(pusht, "draw_outcomes", stops)
        lewm.main("--eval c.pt --episodes 1 --device cpu --out out".split())
        assert [path.name for path in Path("out").iterdir()] == ["result.json"]
        assert "no picture" in capsys.readouterr().out

class TestCommandLineSlow:
    def test_it_trains_resumes_evaluates_and_probes_also_in_a_notebook_and_in_ascii(self, tmp_path):
        """Catches promised files that are missing, a need of extras/, and a UnicodeEncodeError at the end."""
        runs = project(tmp_path, "pusht.py", "probe.py") / "runs"
        notebook = {"MPLBACKEND": "module://matplotlib_inline.backend_inline", "PYTHONIOENCODING": "ascii"}

        def run(*commands):
            argvs = [[*command.split(), "--device", "cpu"] for command in commands]
            all_ended = run_side_by_side(argvs, cwd=tmp_path, **notebook)
            for ended in all_ended:
                assert ended.returncode == 0 and "no picture" not in ended.stdout, ended.stdout + ended.stderr
            return "".join(ended.stdout for ended in all_ended)

        def files(folder):
            return {path.name for path in (runs / folder).iterdir()}

        printed = run("lewm.py --train --preset smoke --train_episodes 6 --steps 6 --proposal_steps 2 "
                      "--episodes 2 --candidates 8 --elites 3 --iterations 1 --budget 10 --replan 2")
        assert "8 episodes" in printed, "6 ordinary episodes and 2 narrow ones"
        for name in ("LeWM + CEM", "random actions", "doing nothing", "recorded actions"):
            assert re.search(rf"^{re.escape(name)} .*%", printed, re.M), printed
        assert files("smoke") == {"checkpoint.pt", "metrics.csv", "curves.png", "plan.gif", "result.json"}
        result = json.loads((runs / "smoke/result.json").read_text())
        assert result["episodes"] == 2 and result["config"]["steps"] == 6
        assert result["torch"] == torch.__version__ and result["split"] == "test"
        before = (runs / "smoke/checkpoint.pt").read_bytes()
        printed = run("lewm.py --train --resume --out runs/smoke",
                      "lewm.py --eval runs/smoke/checkpoint.pt --episodes 3 --split dev",
                      "probe.py runs/smoke/checkpoint.pt --episodes 8 --steps 2 --only geometry")
        assert (runs / "smoke/checkpoint.pt").read_bytes() == before, "a finished run must not train on"
        assert printed.count("LeWM + CEM") == 2 and "geometry" in printed
        result = json.loads((runs / "eval/result.json").read_text())
        assert result["episodes"] == 3 and result["split"] == "dev"
        assert files("eval") == {"result.json", "plan.gif"}
        assert files("probe") == {"probe.json", "geometry.png"}

ALONE = """
import sys
import numpy as np
import torch
import lewm

DOT
model, _ = lewm.load_checkpoint("c.pt")
x = torch.randn(1, 2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
print(model.encode(x).double().sum().item())
cfg = lewm.Config.preset("smoke", action_dim=1, frame_skip=2, steps=2, candidates=5, elites=2, iterations=1,
                         first_lesson_share=0.0, proposal_steps=2)
rng = np.random.default_rng(0)
data = {"pixels": np.stack([Dot(place, None).render() for place in rng.uniform(0, 31, 90)]),
        "action": rng.normal(size=(90, 1)), "ep_len": np.full(3, 30), "ep_offset": 30 * np.arange(3)}
planner = lewm.Planner(lewm.train(cfg, data, device="cpu"), [Dot(20, None).render()])
histories, reached = lewm.play([Dot(3, goal=1000)], planner, budget=5)
print(histories[0].shape, reached, sorted({"pusht", "pymunk", "matplotlib"} & set(sys.modules)))
"""

class TestFilesSlow:
    def test_the_file_alone_loads_a_checkpoint_trains_and_plans_in_another_world(self, tmp_path):
        """Catches work at import, weights that are not saved, and a file that cannot be copied alone."""
        torch.manual_seed(0)
        model = awake(tiny_model()).eval()
        lewm.save_checkpoint(tmp_path / "c.pt", model)
        (project(tmp_path) / "mine.py").write_text(ALONE.replace("DOT", inspect.getsource(Dot)))
        ended = run_python("mine.py", cwd=tmp_path)
        lines = ended.stdout.splitlines()
        assert lines[-1] == "(5, 1) [False] []", ended.stdout + ended.stderr
        expected = model.encode(noise(1, 2, 3, 32, 32)).double().sum().item()
        assert float(lines[0]) == pytest.approx(expected, abs=1e-5)

    def test_every_file_has_help_and_names_what_it_lacks(self, tmp_path):
        """Catches a traceback where pusht.py was forgotten, and a help text read from a docstring."""
        ended = run_python("lewm.py", "--train", cwd=project(tmp_path))
        assert ended.returncode == 1 and ended.stderr.splitlines() == ["lewm.py: No module named 'pusht'"]
        project(tmp_path, "pusht.py", "probe.py")
        helps = [("-OO", name, "--help") for name in ("lewm.py", "pusht.py", "probe.py")]   # no docstrings
        for (_, name, _), ended in zip(helps, run_side_by_side(helps, cwd=tmp_path)):
            assert ended.returncode == 0 and f"usage: {name}" in ended.stdout, ended.stderr

    def test_a_changed_copy_plans_with_its_own_planner_and_is_executed_once(self, tmp_path):
        """Catches a world that imports lewm.py, which would run twice, with two classes of each name."""
        source = Path(lewm.__file__).read_text(encoding="utf-8")
        begin = 'if __name__ == "__main__":'
        own = "call = Planner.__call__\nPlanner.__call__ = lambda *given: print('my own') or call(*given)"
        student = project(tmp_path, "pusht.py") / "student.py"
        student.write_text(source.replace(begin, f"{own}\n{begin}"), encoding="utf-8")
        lewm.save_checkpoint(tmp_path / "c.pt", tiny_model(candidates=4, elites=2, iterations=1, budget=5))
        ended = run_python("-X", "importtime", "student.py", "--eval", "c.pt", "--episodes", "2",
                           "--device", "cpu", cwd=tmp_path)
        assert ended.returncode == 0 and "my own" in ended.stdout, ended.stderr[-2000:]
        imported = set(re.findall(r"\| +(\w+)$", ended.stderr, re.M))
        assert "pusht" in imported and not imported & {"lewm", "student", "probe"}

def imports_of(path):
    """Names of the modules that a file imports, wherever in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add((node.module or "extras").split(".")[0])
    return names

class TestFiles:
    @pytest.mark.parametrize("name, forbidden", [
        ("pusht.py", {"lewm", "probe", "extras", "test_lewm"}), ("lewm.py", {"probe", "extras", "test_lewm"}),
        ("probe.py", {"extras", "test_lewm"}), ("test_lewm.py", {"extras"})])
    def test_no_file_imports_one_that_stands_above_it(self, name, forbidden):
        """Catches a circle, and a file that cannot do without extras/."""
        path = Path(lewm.__file__) if name == "lewm.py" else HERE / name
        assert not imports_of(path) & forbidden

# ======== pusht.py ====================================================================================

class TestPushTStorage:
    @pytest.mark.parametrize("name", ["data.npz", "folder"])
    def test_a_data_set_survives_writing_reading_and_a_second_writing(self, name, tmp_path, recorded, pusht):
        """Catches a lost column, an overwritten data set, and temporary files that are left behind."""
        pusht.save(tmp_path / name, recorded)
        with pytest.raises(FileExistsError, match=f"{name} exists already"):
            pusht.save(tmp_path / name, {})
        back = pusht.load(tmp_path / name)
        assert {*back} == {*recorded} and all(np.array_equal(back[key], recorded[key]) for key in recorded)
        assert isinstance(back["state"], np.memmap) == (name == "folder")
        assert [path.name for path in tmp_path.iterdir()] == [name]

    @pytest.mark.parametrize("name, words", [
        ("broken.npz", "damaged"), ("code.npz", "damaged"), ("poor.npz", "lacks ep_len"),
        ("words.npz", "no column of numbers"), ("number.npz", "no column of numbers"),
        ("none", "make some"), ("absolute.npz", r"actions up to \d{3}.*\(target - agent\) / 100")])
    def test_a_file_that_is_no_data_set_is_refused(self, name, words, tmp_path, recorded, pusht):
        """Catches a lost column, files that would run code, and places up to 512 in the place of actions."""
        objects = np.array([{"a": 1}], dtype=object)
        absolute = recorded["state"][:, :2] + 100 * recorded["action"]
        columns = {"poor.npz": dict(action=np.zeros((5, 2))), "broken.npz": recorded,
                   "code.npz": dict(action=objects, ep_len=np.array([1]), state=np.zeros((1, 7))),
                   "words.npz": {**recorded, "action": np.array(["up"])},
                   "number.npz": {**recorded, "ep_len": np.int64(9)},
                   "absolute.npz": {**recorded, "action": absolute}}
        if name in columns:
            np.savez(tmp_path / name, **columns[name])
        if name == "broken.npz":
            (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:1000])
        with pytest.raises((ValueError, FileNotFoundError), match=f"{name}.*{words}"):
            pusht.load(tmp_path / name)

    def test_recording_into_what_exists_is_refused(self, tmp_path, pusht):
        """Catches minutes of recording before the refusal, and a refused picture that needs no --out."""
        with pytest.raises(SystemExit, match="exists already"):
            pusht.main(["--episodes", "1000000", "--out", str(tmp_path)])
        assert pusht.parse_arguments(["--show", "a.gif", "--out", str(tmp_path)]).show == "a.gif"

# A trajectory of the reference Push-T (pymunk 7.3.1): the agent pushes and turns the T from step 5 on.

REFERENCE_START = [214.358267, 366.055692, 221.756585, 228.79937, 5.926156, 0.0, 0.0]
REFERENCE_ACTIONS = np.array("""
    -0.149 -0.274   0.046 -0.145   0.12 -0.146    0.103 -0.289   0.061 -0.281   0.114 -0.347
    -0.005 -0.211  -0.129  0.168   0.16 -0.079    0.113 -0.211   0.248  0.022  -0.126 -0.024
     0.226 -0.174   0.39  -0.107   0.117 -0.236  -0.089  0.022   0.326 -0.086   0.098 -0.285
     0.223 -0.348   0.169 -0.12   -0.033 -0.497  -0.429 -0.094  -0.28  -0.102  -0.393  0.09
    -0.267 -0.099  -0.336 -0.357""".split(), float).reshape(-1, 2)
REFERENCE_AFTER = {
    10: [230.773599, 294.539292, 228.951782, 225.576807, 5.814101, 41.884367, -78.748763],
    20: [294.531662, 239.141323, 281.63769, 184.241672, 5.503515, 62.6858, -44.049152],
    26: [229.390038, 198.702069, 288.455671, 142.825106, 5.85723, -125.065335, -133.326554]}

def replayed(pusht, start, actions):
    """The states (n,7) after each of the actions, from a start."""
    env = pusht.PushT()
    env.reset(options={"state": start})
    return np.stack([env.step(action)[0] for action in actions])

class TestPushT:
    def test_it_follows_the_reference_trajectory(self, pusht):
        """Catches a changed constant, integration order, moment of inertia or pymunk version."""
        states = replayed(pusht, REFERENCE_START, REFERENCE_ACTIONS)
        for step, expected in REFERENCE_AFTER.items():
            assert np.allclose(states[step - 1], expected, rtol=0, atol=1e-3), f"after {step} steps"

    def test_setting_the_state_that_was_read_changes_nothing(self, pusht):
        """Catches a setter that goes through the centre of gravity: it comes back with other last digits."""
        env = pusht.PushT()
        env.state = REFERENCE_START
        for action, expected in zip(REFERENCE_ACTIONS, replayed(pusht, REFERENCE_START, REFERENCE_ACTIONS)):
            before = env.state
            env.state = before
            assert np.array_equal(env.state, before)
            assert np.array_equal(env.step(action)[0], expected), "set to its own state it goes another way"

    def test_what_follows_depends_on_the_state_that_was_set_and_not_on_the_past(self, pusht):
        """Catches contacts or velocities of an earlier episode that survive in the physics engine."""
        env = pusht.PushT()
        env.state = REFERENCE_START
        for action in REFERENCE_ACTIONS[:12]:
            env.step(action)
        env.state = REFERENCE_AFTER[10]
        states = [env.step(action)[0] for action in REFERENCE_ACTIONS[10:]]
        assert np.array_equal(states, replayed(pusht, REFERENCE_AFTER[10], REFERENCE_ACTIONS[10:]))

    def test_the_agent_cannot_leave_the_board(self, pusht):
        """Catches the reference's trap: relative targets drive the agent hundreds of pixels outside."""
        env = pusht.PushT()
        rng = np.random.default_rng(0)
        env.reset(seed=0)
        places = []
        for t in range(400):
            action = rng.choice([-1.0, 1.0], 2) if t % 40 == 0 else np.sign(np.sin([t / 30, t / 47]))
            places.append(env.step(action)[0][:2])
        low, high = np.quantile(places, [0, 1])
        assert low >= -1e-6 and high <= 512 + 1e-6, f"went to {low:.1f} .. {high:.1f}, expected 0 .. 512"
        assert low < 1 and high > 511, "the test must reach the border to mean something"

    def test_reset_and_step_have_gymnasiums_signatures(self, pusht):
        """Catches a swapped tuple, an ignored seed and an ignored goal."""
        env = pusht.PushT()
        first = env.reset(seed=3)[0]
        assert np.array_equal(first, env.reset(seed=3)[0])
        assert not np.array_equal(first, env.reset(seed=4)[0])
        state, info = env.reset(options={"state": REFERENCE_START, "goal": REFERENCE_START})
        assert state.shape == (7,) and np.allclose(info["goal"], REFERENCE_START)
        state, reward, terminated, truncated, info = env.step(np.zeros(2))
        assert (reward, terminated, truncated) == (1.0, True, False), "standing on the goal is success"
        assert env.render(96).shape == (96, 96, 3) and env.render(96).dtype == np.uint8
        assert pusht.PushT(48).render().shape == (48, 48, 3)

    def test_what_is_not_2_or_7_finite_numbers_is_refused(self, pusht):
        """Catches NaN in the physics engine, which never leaves it, and a state without its velocity."""
        for action in ([0.0, np.nan], [0.1], [[0.1, 0.2]]):
            with pytest.raises(ValueError, match="2 finite numbers"):
                pusht.PushT().step(action)
        with pytest.raises(ValueError, match="7 finite numbers"):
            pusht.PushT().state = [1, 2, 3]

    def test_success_counts_agent_and_t_together_and_turns_on_the_circle(self, pusht):
        """Catches a rule on the T alone and an angle difference that breaks at 2 pi."""
        goal = np.array([100.0, 100, 200, 200, 0.1, 0, 0])
        near = goal + [12, 0, 12, 0, 0, 0, 0]               # 17.0 px
        far = goal + [15, 0, 15, 0, 0, 0, 0]                # 21.2 px
        turned = goal + [0, 0, 0, 0, 2 * np.pi - 0.2, 0, 0]     # 0.2 rad the other way
        twisted = goal + [0, 0, 0, 0, 0.36, 0, 0]           # 20.6 degrees
        assert pusht.success([near, far, turned, twisted], goal).tolist() == [True, False, True, False]
        assert pusht.success([far, twisted], goal, object_only=True).tolist() == [True, False]

class TestPushTPictures:
    def test_they_match_the_reference(self, pusht):
        """Catches a shifted, mirrored or recoloured drawing. From a reference frame, (row, column): RGB."""
        state = [231.4928, 344.6232, 203.0655, 331.7839, 1.959295, 0, 0]
        frame = pusht.render(np.array([state]), 224)[0].permute(1, 2, 0).numpy().astype(float)
        pixels = {(112, 2): (211, 211, 211), (140, 60): (119, 136, 153), (118, 85): (119, 136, 153),
                  (151, 101): (78, 126, 255), (125, 41): (122, 139, 157), (200, 200): (255, 255, 255)}
        for place, colour in pixels.items():
            assert np.allclose(frame[place], colour, rtol=0, atol=25), f"pixel {place}"
        assert np.allclose(frame.mean((0, 1)), [247.40, 249.60, 248.94], rtol=0, atol=0.3)
        assert np.allclose(frame.std((0, 1)), [26.58, 19.69, 20.67], rtol=0, atol=0.6)

    def test_a_picture_is_the_same_alone_and_in_a_batch(self, recorded, pusht):
        """Catches state leaking between rows and windows that are cut off at the border."""
        states = torch.from_numpy(recorded["state"][::40]).clone()
        states[0, :2] = torch.tensor([3.0, 509.0])
        states[1, 2:4] = torch.tensor([470.0, 480.0])
        batch = pusht.render(states, 64)
        assert all(torch.equal(batch[i], pusht.render(states[i:i + 1], 64)[0]) for i in range(len(states)))
        assert np.array_equal(pusht.pictures(states, 64), batch.permute(0, 2, 3, 1))
        red = pusht.render(states, 64, t_colour=(200, 0, 0))
        changed = (red != batch).any(1).float().mean().item()
        assert 0.02 < changed < 0.12, f"another colour changes {changed:.1%} of the pixels, expected the T's"

    def test_outcomes_show_the_first_success_and_the_first_failure(self, tmp_path, recorded, pusht):
        """Catches a failure that is left out, and an episode cut short."""
        from PIL import Image
        states = recorded["state"]
        sizes = []
        for won in ([True, True, False], [False, False, False]):
            path = tmp_path / f"{sum(won)}.gif"
            histories = [states[1:9], states[2:4], states[3:5]]
            pusht.draw_outcomes(path, states[:3], states[9:12], histories, won, size=64)
            with Image.open(path) as image:
                assert image.n_frames >= 8
                sizes.append(image.size[1])
        assert sizes[0] == sizes[1] + 64, "two rows of 64 px, and one"

LAST_AGENT_X = {                                            # seed: of its first eight episodes, in px
    3072: [395.144, 424.637, 169.358, 110.993, 253.258, 255.771, 152.281, 154.630],
    1_000_000: [229.569, 275.988, 180.114, 374.748, 225.302, 263.512, 275.814, 309.227],
    2_000_000: [245.389, 121.308, 188.281, 214.754, 332.510, 369.720, 256.862, 212.014]}

class TestPushTPolicySlow:
    def test_it_is_the_one_of_the_published_figures(self, pusht):
        """Catches a change of the policy, however small: every published figure belongs to these episodes."""
        for seed, places in LAST_AGENT_X.items():
            data = pusht.collect(8, seed, workers=1)
            last = data["ep_offset"] + data["ep_len"] - 1
            assert np.allclose(data["state"][last, 0], places, atol=0.01), f"seed {seed}"
        data = pusht.collect(1, 3072)
        states = data["state"]
        assert states.shape == (102, 7) and states.dtype == data["action"].dtype == np.float32
        assert np.allclose(data["action"].mean(0), [0.0500, -0.0597], atol=1e-3)

    def test_episodes_depend_on_seed_and_index_alone(self, recorded, pusht):
        """Catches a generator that episodes share: results change with the number of processes."""
        more = pusht.collect(60, seed=5, workers=2)
        assert np.array_equal(more["state"][:len(recorded["state"])], recorded["state"])
        assert not np.array_equal(pusht.collect(1, seed=6)["state"][:49], recorded["state"][:49])
        assert pusht.collect(60, seed=5, workers=1)["action"].tobytes() == more["action"].tobytes()

    def test_episodes_push_the_t_and_keep_it_on_the_board(self, pusht):
        """Catches a policy that jitters, loses the T at a wall, or moves at another scale than nano's."""
        data = pusht.collect(60, seed=11)
        states = data["state"]
        lengths = data["ep_len"]
        assert lengths.min() >= 49 and lengths.max() <= 246 and 105 < lengths.mean() < 145
        std = data["action"].std(0)
        assert np.allclose(std, 0.26, rtol=0, atol=0.04), f"action std {std} (the authors' data: 0.20)"
        assert states[:, :4].min() > 15 and states[:, :4].max() < 497, "something left the board"
        spread = states[:, 2:4].std(0)
        assert spread.max() < 65, f"the T's std is {spread} px, expected 55 as in the data of the authors"
        rows = np.concatenate([np.arange(first, first + 24, 6) for first in data["ep_offset"]])
        moved = (pusht.distances(states[rows], states[rows + 25])[1] > 5).mean()
        assert moved > 0.6, f"the T moves in {moved:.0%} of 25-step windows, expected most"

    def test_recorded_actions_lead_to_the_recorded_states(self, recorded, pusht):
        """Catches action[t] stored beside state[t + 1]."""
        states = recorded["state"]
        played = replayed(pusht, states[0], recorded["action"][:20])
        assert np.allclose(played[:, :2], states[1:21, :2], rtol=0, atol=0.01)

    def test_lessons_begin_with_the_t_near_the_middle_and_go_on_with_ordinary_episodes(self, pusht):
        """Catches lessons in the wrong order or of one kind, and other episodes than `collect` makes."""
        lessons = pusht.collect_lessons(30, seed=7, workers=1)
        ordinary = pusht.collect(30, seed=7, workers=1)
        assert lessons["lesson"].tolist() == [0] * 8 + [1] * 30
        first_row = lessons["ep_offset"][8]
        for column in ("state", "action"):
            assert np.array_equal(lessons[column][first_row:], ordinary[column])
        assert np.array_equal(lessons["ep_len"][8:], ordinary["ep_len"])
        assert np.array_equal(lessons["ep_offset"], np.cumsum(lessons["ep_len"]) - lessons["ep_len"])
        states = lessons["state"][lessons["ep_offset"]].astype(float)       # at the start of each episode
        centres = pusht.centre(states[:, 2] + 1j * states[:, 3], np.exp(1j * states[:, 4]))
        away = np.abs(centres - complex(256, 256))
        narrow, wide = map(np.median, (away[:8], away[8:]))
        assert narrow < 25 < wide, f"{narrow:.0f} and {wide:.0f} px from the middle, expected about 12 and 47"

GUARDLESS = """
import multiprocessing
import pusht
spawn = multiprocessing.get_context("spawn")                # as on Windows and macOS
multiprocessing.get_context = lambda method=None: spawn
pusht.collect(60, workers=2)
"""

class TestPushTSlow:
    @pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="needs /proc to see processes")
    def test_recording_that_is_killed_leaves_no_process_and_no_file_behind(self, tmp_path):
        """Catches workers that wait for ever for a parent that is gone."""
        def lives(process):
            with contextlib.suppress(OSError):
                return bool(Path(f"/proc/{process}/cmdline").read_bytes())      # empty of a zombie

        command = [sys.executable, HERE / "pusht.py", "--episodes", "9999", "--workers", "2", "--out", "data"]
        recording = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.DEVNULL)
        children = Path(f"/proc/{recording.pid}/task/{recording.pid}/children")
        ends = time.time() + 300
        workers = []
        while time.time() < ends and len(workers) < 2:
            time.sleep(0.1)
            workers = children.read_text().split()
        time.sleep(1)
        recording.kill()
        recording.wait()
        while time.time() < ends and any(map(lives, workers)):
            time.sleep(0.1)
        assert len(workers) == 2 and time.time() < ends and not list(tmp_path.iterdir())

    def test_recording_in_a_script_without_a_main_guard_says_what_is_missing(self, tmp_path):
        """Catches a pool that starts processes which start processes, and never ends."""
        shutil.copy(HERE / "pusht.py", tmp_path)
        (tmp_path / "script.py").write_text(GUARDLESS)
        ended = run_python("script.py", cwd=tmp_path)
        last_line = ended.stderr.splitlines()[-1]
        assert ended.returncode != 0 and 'if __name__ == "__main__":' in last_line, ended.stderr

class TestPushTProblems:
    def test_a_pair_of_your_own_is_a_state_that_can_be(self, pusht):
        """Catches degrees taken for radians, and an agent inside the T."""
        starts, goals, actions = pusht.own_pair("300, 200, 256, 300, -90", "400,380,230,260,45")
        assert np.allclose(goals, [[300, 200, 256, 300, 1.5 * np.pi, 0, 0]])
        assert np.allclose(starts, [[400, 380, 230, 260, np.pi / 4, 0, 0]]) and actions.shape == (1, 0, 2)
        assert pusht.clear(pusht.own_pair("300,200,256,300,45")[0]).all()
        wrong = {"1,2": "is not x,y", "a,b,c,d,e": "is not x,y", "256,330,256,300,0": "on the T",
                 "600,1,256,300,0": "between 0 and 512", "9,9,256,300,nan": "not 7 finite"}
        for text, words in wrong.items():
            with pytest.raises(ValueError, match=words):
                pusht.own_pair(text)

    def test_held_out_pairs_are_unsolved_and_replaying_their_actions_solves_them(self, pusht):
        """Catches pairs that are won by doing nothing, and starts and goals from different episodes."""
        starts, goals, actions = pusht.held_out_pairs(20, "dev", seed=3)
        assert not pusht.success(starts, goals).any()
        few = pusht.held_out_pairs(5, "dev", seed=3)[0]
        assert np.array_equal(starts[:5], few), "the first pairs must not depend on how many there are"
        assert not np.array_equal(starts, pusht.held_out_pairs(20, "test", seed=3)[0])
        replay = pusht.baselines(actions, 25, np.ones((4, 2)))["recorded actions"]
        histories, reached = lewm.play(pusht.environments(starts, goals, 8), replay, 25)
        won = [pusht.success(states[-1], goal) for states, goal in zip(histories, goals)]
        assert sum(won) >= 19 and reached.tolist() == won

    @pytest.mark.parametrize("problems", [(1, "train"), (0, "dev"), (1, "dev", 10**6), (1, "dev", 0, 151)])
    def test_impossible_problems_are_refused(self, problems, pusht):
        """Catches pairs of training episodes, and a goal that lies behind the end of every episode."""
        with pytest.raises(ValueError, match="held_out_pairs needs"):
            pusht.held_out_pairs(*problems)

    def test_a_score_counts_what_was_reached_at_any_step(self, pusht):
        """Catches a success that is lost again, a T that is judged with the agent, and the wrong ends."""
        goals = np.array([[100.0, 100, 200, 200, 0, 0, 0]] * 3)
        through = np.stack([goals[0], goals[0] + [60, 80, 0, 0, 0, 0, 0]])
        beside = goals[1][None] + [30, 40, 0, 0, 0, 0, 0]
        turned = goals[2][None] + [0, 0, 6, 8, np.pi / 2, 0, 0]
        row = pusht.score([through, beside, turned], goals)
        assert row["won"] == [True, False, False]
        assert row["success"] == pytest.approx(1 / 3) and row["object_success"] == pytest.approx(2 / 3)
        assert row["final_agent_px"] == pytest.approx(150 / 3) and row["final_t_px"] == pytest.approx(10 / 3)
        assert row["final_turn_deg"] == pytest.approx(90 / 3)
        line = pusht.table({"policies": {"a policy": {**row, "interval": (0.25, 0.75)}}}).splitlines()[-1]
        assert line.split() == "a policy 33.3% 25.0% - 75.0% 66.7% 50 3 30".split()

# ======== probe.py ====================================================================================

def random_states(count, low, high):
    """float64 (count,7) with places in [low, high] px and any angle."""
    states = np.random.default_rng(0).uniform(low, high, (count, 7))
    states[:, 4] = np.random.default_rng(1).uniform(0, 2 * np.pi, count)
    return states

def held(probe, model, **columns):
    """A probe.Held of which only the given columns are there."""
    empty = dict.fromkeys(("states", "actions", "blocks", "pixels", "z", "untrained"))
    return probe.Held(model.eval(), **{**empty, **columns})

TWO_STARTS = np.array([[100.0, 100, 256, 300, 1, 0, 0], [400, 90, 250, 260, 2, 0, 0]])

class TestProbes:
    def test_they_are_judged_on_episodes_that_they_were_not_fitted_on(self, probe):
        """Catches a probe that peeks: nothing can be read off noise, except by heart."""
        T = probe.CONTEXT + probe.AHEAD
        z = noise(12, T, 64)
        states = np.random.default_rng(0).uniform(60, 450, (12, T, 7)).astype(np.float32)
        pixels = random_pictures(12, T, 3, 8, 8)
        nothing = held(probe, adder(embed_dim=64), z=z, untrained=z, states=states, pixels=pixels, steps=2)
        numbers, _ = probe.probes(nothing)
        for row in numbers["LeWM, linear"].values():
            assert abs(row["r"]) < 0.35

    def test_an_untrained_model_has_new_weights_and_the_statistics_of_the_trained_one(self, probe):
        """Catches a comparison of a model with itself, or with one that sees other colours."""
        model = tiny_model(whiten=True)
        for name in STATISTICS:
            getattr(model, name).copy_(noise(*getattr(model, name).shape))
        other = probe.untrained(model)
        different = differing(model, other)
        assert any(name.startswith("encoder.") for name in different) and not other.training
        assert not {*STATISTICS} & {*different}

    def test_held_out_pairs_and_trajectories_come_from_seeds_above_a_million(self, probe, monkeypatch, pusht):
        """Catches problems and probes from training episodes: the seeds of these end at 1,000,000."""
        collect = pusht.collect
        seeds = []
        monkeypatch.setattr(
            pusht, "collect", lambda n, seed=0, *rest: seeds.append(seed) or collect(n, seed, *rest))
        for split in ("dev", "test"):
            pusht.held_out_pairs(1, split)
        probe.trajectories(2, tiny())
        assert len({*seeds}) == 3 and min(seeds) >= 1_000_000, f"episodes came from seeds {seeds}"

    def test_surprise_of_an_exact_model_is_zero_until_the_teleport(self, probe):
        """Catches a prediction compared with the wrong frame: a world of sums, moved at frame 4."""
        blocks = noise(3, 7, 10)
        z = torch.cat([torch.zeros(3, 1, 4), blocks[..., :4].cumsum(1)], 1)
        z[:, 4:] += 2.0
        expected = torch.zeros(3, 7)
        expected[:, 3] = 16                                 # 4 dimensions are off by 2 at frame 4
        assert torch.allclose(probe.surprise(adder(), z, blocks), expected, atol=1e-6)

    def test_teleported_episodes_are_the_same_until_the_moment(self, probe, pusht):
        """Catches a jump too early or none at all, and a world that stands still after it."""
        states, actions = probe.trajectories(8, tiny())
        moment = probe.MOMENT
        for distance in (5, 40, 160):
            moved = probe.teleported(states, actions, distance, seed=0)
            for gap in pusht.distances(states[:, moment], moved[:, moment])[:2]:
                assert np.allclose(gap, distance, atol=0.01)
        for distance in (None, 40):
            moved = probe.teleported(states, actions, distance, seed=0)
            assert np.array_equal(moved[:, :moment], states[:, :moment]) and np.isfinite(moved).all()
            assert (np.abs(moved[:, moment, :4] - states[:, moment, :4]).max(1) > 1).all()
            later = replayed(pusht, moved[0, moment], actions[0, moment:].reshape(-1, 2))[4::5]
            assert np.allclose(later, moved[0, moment + 1:], atol=1e-3), "the recorded actions go on there"

    def test_imagination_with_true_actions_is_told_from_that_with_others(self, probe):
        """Catches raw actions given to the model, shuffled ones that are true, and errors of the context."""
        T = probe.CONTEXT + probe.AHEAD
        model = set_actions(adder(), mean=[1.0, -1], std=[2.0, 0.5])
        blocks = model.to_blocks(noise(8, 5 * (T - 1), 2))
        z = torch.cat([torch.zeros(8, 1, 4), blocks[..., :4].cumsum(1)], 1)
        states = np.random.default_rng(0).uniform(60, 450, (8, T, 7)).astype(np.float32)
        numbers, _ = probe.imagination(held(probe, model, z=z, blocks=blocks, states=states, steps=2))
        errors = {name: row["latent error"] for name, row in numbers.items()}
        assert max(errors["imagined"]) < 1e-8 and max(errors["true embedding"]) == 0
        assert min(errors["with shuffled actions"]) > 0.1
        moved = z[4:, probe.CONTEXT:] - z[4:, probe.CONTEXT - 1:probe.CONTEXT]
        assert errors["last frame copied"] == pytest.approx(moved.square().mean((0, 2)).tolist(), rel=1e-4)

    def test_displaced_states_are_displaced_by_what_the_axis_says(self, probe, pusht):
        """Catches a landscape that turns the T about a corner, and so moves it too."""
        centre = lambda s: s[:, 2:4] + 45 * np.stack([-np.sin(s[:, 4]), np.cos(s[:, 4])], 1)    # of gravity
        states = random_states(50, 100, 400)
        for column, (what, amount) in enumerate((("agent px", 40), ("T px", 20), ("T degrees", 90))):
            moved = probe.displaced(states, what, amount)
            assert np.allclose(pusht.distances(states, moved)[column], amount)
            shift = np.linalg.norm(centre(moved) - centre(states), axis=1)
            assert np.allclose(shift, 20 if what == "T px" else 0)
        far = probe.displaced(states, "agent px", 160)[:, :2]
        assert 60 <= far.min() and far.max() <= pusht.BOARD - 60, "an agent off the board cannot be seen"
        for what in ("agent px", "T px"):
            assert pusht.clear(probe.displaced(states, what, 40)).all(), "the agent cannot lie on the T"
        assert not pusht.clear(np.array([[256.0, 256, 256, 240, 0, 0, 0]]))[0]

    def test_plans_are_played_in_raw_actions_from_where_they_were_imagined(self, probe, pusht):
        """Catches plans played z-scored, from other starts, or seen at other times than imagination does."""
        model = set_actions(tiny_model(), mean=[0.1, -0.1], std=[0.5, 0.4])
        raw = model.to_actions(noise(2, 3, 10)).numpy()
        for start, actions, states in zip(TWO_STARTS, raw, probe.played(TWO_STARTS, raw.reshape(2, 3, 5, 2))):
            assert np.allclose(states, replayed(pusht, start, actions)[4::5], atol=1e-4)

class TestProbesSlow:
    def test_they_have_known_answers(self, probe):
        """Catches a probe that cannot fit a linear map, and a score in the wrong unit."""
        states = random_states(600, 50, 450)
        truth = probe.probe_targets(states)
        code = ((truth - truth.mean(0)) / truth.std(0)) @ noise(6, 12, seed=2)
        random_code = noise(600, 12, seed=3)
        for fit in (probe.fit_linear, functools.partial(probe.fit_mlp, steps=300)):
            known = probe.score(fit(code[:400], truth[:400])(code[400:]), truth[400:])
            unknown = probe.score(fit(random_code[:400], truth[:400])(random_code[400:]), truth[400:])
            for group in probe.GROUPS:
                assert known[group]["r"] > 0.99 and abs(unknown[group]["r"]) < 0.25
        moved = states + [3, 4, 0, 0, 0.1, 0, 0]
        answer = probe.score(probe.probe_targets(moved), truth)
        assert answer["agent"]["error"] == pytest.approx(5)
        assert answer["angle"]["error"] == pytest.approx(math.degrees(0.1), rel=1e-3)

    def test_beliefs_are_those_of_the_plans_that_the_search_makes(self, probe, monkeypatch, pusht):
        """Catches ends imagined from other frames or of another plan, and a truth that is seen too early."""
        model = set_actions(awake(tiny_model()).eval(), mean=[0.1, -0.1], std=[0.5, 0.4])
        search = dict(candidates=8, elites=4)
        monkeypatch.setattr(lewm, "FULL_SEARCH", search)
        goals = TWO_STARTS + [20, 30, 0, 0, 0, 0, 0]
        monkeypatch.setattr(pusht, "held_out_pairs", lambda *args: (TWO_STARTS, goals, None))
        numbers, _ = probe.beliefs(held(probe, model, z=torch.zeros(2)))
        z, z_goal = (probe.encode(model, pusht.render(states, 32)) for states in (TWO_STARTS, goals))
        for iterations in numbers["as imagined"]:
            plans = lewm.cem(model, z, z_goal, iterations=iterations, **search)
            imagined = model.rollout(z[:, None], plans[:, None])[:, 0, -1]
            states = probe.played(TWO_STARTS, model.to_actions(plans).unflatten(1, (-1, 5)).numpy())
            true = probe.encode(model, pusht.render(states[:, -1], 32))
            for name, end in {"as imagined": imagined, "as it came true": true}.items():
                mean = (end - z_goal).square().sum(-1).mean().item()
                assert numbers[name][iterations][0] == pytest.approx(mean, rel=1e-4), name

    def test_it_draws_the_curves_of_several_runs(self, probe, whole_run):
        """Catches a comparison of runs that draws one of them twice, or none where a run is still young."""
        shutil.copytree(whole_run[1], "old")
        Path("young").mkdir()
        lines = Path("old/metrics.csv").read_text().splitlines()
        Path("young/metrics.csv").write_text("\n".join(lines[:2]) + "\n")
        probe.main("--curves old young --out both.png".split())
        probe.main("--curves old --out one.png".split())
        both, one = (Path(name).read_bytes() for name in ("both.png", "one.png"))
        assert both[:4] == one[:4] == b"\x89PNG" and both != one

    def test_the_command_line_leaves_pictures_and_numbers(self, probe, monkeypatch, capsys):
        """Catches a part that breaks on another checkpoint, and figures that are not written down."""
        monkeypatch.setattr(lewm, "FULL_SEARCH", dict(candidates=8, elites=4))
        lewm.save_checkpoint("c.pt", awake(tiny_model()))
        probe.main("c.pt --episodes 12 --steps 5 --out here --device cpu".split())
        result = json.loads(Path("here/probe.json").read_text())
        assert {*probe.PARTS} < {*result} and result["n"] == 12 and result["seed"] == 0
        files = {path.name for path in Path("here").iterdir()}
        assert files == {"probe.json", *(f"{part}.png" for part in probe.PARTS)}
        printed = capsys.readouterr().out
        assert "straightness" in printed and "here" in printed and "no picture" not in printed

class TestProbesCommandLine:
    def test_parts_get_what_they_need(self, probe, monkeypatch, pusht):
        """Catches raw actions, pictures of other frames, and an untrained code that is the trained one."""
        model = set_actions(awake(tiny_model()).eval(), mean=[1.0, -1], std=[2.0, 0.5])
        lewm.save_checkpoint("c.pt", model)
        seen = []
        monkeypatch.setitem(probe.PARTS, "geometry", (lambda held: (seen.append(held) or {}, None), stops))
        probe.main("c.pt --only geometry --episodes 8 --device cpu --out .".split())
        held, = seen
        scored = (held.actions - [1.0, -1]) / [2.0, 0.5]    # (E,T-1,5,2)
        assert np.allclose(held.blocks, scored.reshape(8, -1, 10), atol=1e-5)
        picture = pusht.render(held.states[3, 2:3], 32)
        assert torch.equal(held.pixels[3, 2], picture[0])
        with torch.no_grad():
            assert torch.allclose(held.z[3, 2], model.encode(picture)[0], atol=1e-4)
        assert not torch.allclose(held.untrained, held.z, atol=0.1) and held.z.shape == held.untrained.shape

    @pytest.mark.parametrize("argv, words", [
        ("", "say which checkpoint"), ("c.pt --curves a --out b.png", "say which checkpoint"),
        ("c.pt --only everything", "the parts are probes,surprise"), ("nothing.pt", "no file at"),
        ("--curves run", "--out FILE.png"), ("--curves nowhere --out a.png", "nowhere"),
        ("c.pt --episodes 2", "--episodes is 2: not from 8"), ("c.pt --bogus", "--bogus")])
    def test_what_is_impossible_is_refused(self, probe, argv, words):
        """Catches minutes of work before a wrong flag is noticed, and tracebacks."""
        with pytest.raises(ONE_LINE) as caught:
            probe.main(argv.split())
        assert words in str(caught.value) and "\n" not in str(caught.value), str(caught.value)

# ======== README ======================================================================================

def readme(*folders):
    return Path(HERE, *folders, "README.md").read_text(encoding="utf-8")

def python_blocks(text):
    return re.findall(r"```python\n(.*?)```", text, re.S)

class TestReadme:
    def test_every_command_exists(self, probe, pusht):
        """Catches a README that promises flags which are not there, in its blocks and in its tables."""
        commands = re.findall(r"python (lewm|probe|pusht)\.py ([^`#\"\n|;&]*)", readme())
        assert "lewm" in dict(commands) and len(commands) >= 5
        for file, arguments in commands:
            argv = shlex.split(arguments)
            if argv != ["--help"]:
                sys.modules[file].parse_arguments(argv)

    def test_every_name_in_its_python_exists(self, probe, pusht):
        """Catches an example that was right for an earlier version."""
        text = "\n".join(python_blocks(readme()))
        used = re.findall(r"\b(lewm|probe|pusht)\.(\w+)", text)
        for file, names in re.findall(r"^from (lewm|probe|pusht) import ([\w, ]+)", text, re.M):
            used += [(file, name.strip()) for name in names.split(",")]
        assert used, "the README shows no example"
        missing = [f"{file}.{name}" for file, name in used if not hasattr(sys.modules[file], name)]
        assert not missing, missing

class TestReadmeSlow:
    def test_its_python_runs_as_it_stands(self, tmp_path):
        """Catches an example that needs more than it shows, unless it names the reader's environment."""
        blocks = [block for block in python_blocks(readme()) if "MyEnvironment" not in block]
        assert blocks, "the README shows no example"
        (project(tmp_path, "pusht.py") / "example.py").write_text("\n".join(blocks), encoding="utf-8")
        ended = run_python("example.py", cwd=tmp_path)
        assert ended.returncode == 0, ended.stderr[-2000:]

# ======== In a course =================================================================================
# python test_lewm.py --holes student.py [--units SIGReg Loss]    lewm.py, where a student writes these units
# python test_lewm.py --score score.json [-k SIGReg]              the points of the file that LEWM names

HOLES = {
    "Encoder": ("Attention.forward", "EncoderLayer.forward", "ViT.forward"),
    "Predictor": ("action_encoder", "modulate", "PredictorLayer.forward", "Predictor.forward"),
    "SIGReg": ("SIGReg.forward",),
    "Loss": ("LeWM.latent_loss",),
    "Imagination": ("LeWM.rollout",),
    "Planning": ("final_embeddings", "cem"),
    "Data": ("split_episodes", "window_starts", "action_statistics", "get_blocks", "get_batch"),
    "Training": ("learning_rate", "effective_rank", "straightness", "diagnose", "train"),
    "Proposal": ("latent_scale", "Proposal.forward", "fit_planner"),
    "Worlds": ("Planner.__call__", "play", "wilson"),
}

def with_holes(source, units):
    """Python source -> the same with holes in the functions of these units. Their docstring stays, and so
    does what leads to the last `require` before the first loop."""
    lines = source.splitlines()
    holes = {name for unit in units for name in HOLES[unit]}
    tree = ast.parse(source)
    scopes = [("", tree), *((f"{node.name}.", node) for node in tree.body if isinstance(node, ast.ClassDef))]
    functions = [(prefix + node.name, node) for prefix, scope in scopes for node in scope.body
                 if isinstance(node, ast.FunctionDef)]
    for name, function in sorted(functions, key=lambda pair: -pair[1].lineno):      # from the end backwards
        if name in holes:
            before = itertools.takewhile(lambda node: not isinstance(node, ast.For), function.body)
            checks = [i for i, node in enumerate(before, 1) if ast.unparse(node).startswith("require(")]
            kept = max(checks, default=bool(ast.get_docstring(function)))
            indent = " " * (function.col_offset + 4)
            hole = f'{indent}raise NotImplementedError("{name}: not written yet")'
            lines[function.body[kept].lineno - 1:function.end_lineno] = [hole]
    return "\n".join(lines) + "\n"

class Score:
    """A pytest plugin: each test's result, in the form of Gradescope's results.json."""
    def __init__(self):
        self.tests = {}

    def pytest_itemcollected(self, item):
        mistake = " ".join((item.function.__doc__ or "").split())
        self.tests[item.nodeid] = {"name": item.nodeid.split("::", 1)[1], "score": 0, "max_score": 1,
                                   "output": mistake}

    def pytest_deselected(self, items):
        for item in items:
            del self.tests[item.nodeid]

    def pytest_runtest_logreport(self, report):
        if report.when == "call" and report.passed:
            self.tests[report.nodeid].update(score=1, output="")
        if report.skipped:
            del self.tests[report.nodeid]

    def write(self, path):
        units = {}
        for test in self.tests.values():
            unit = test["name"].split("::")[0].removeprefix("Test").removesuffix("Slow")
            units.setdefault(unit, []).append(test["score"])
        for unit, scores in units.items():
            print(f"{unit:14} {sum(scores):3} of {len(scores)}")
        Path(path).write_text(json.dumps({"tests": [*self.tests.values()]}, indent=1), encoding="utf-8")

class TestCourse:
    def test_holes_are_where_a_student_writes_and_nowhere_else(self):
        """Catches a hole that does not exist any more, an answer that stays, and a file that is no Python."""
        source = (HERE / "lewm.py").read_text(encoding="utf-8")
        assert with_holes(source, []) == source
        for unit, names in HOLES.items():
            holed = with_holes(source, [unit])
            compile(holed, unit, "exec")
            missing = re.findall(r'NotImplementedError\("(.*): not written yet"\)', holed)
            assert sorted(missing) == sorted(names), unit
        holed = with_holes(source, HOLES)
        assert ast.dump(ast.parse(with_holes(holed, HOLES))) == ast.dump(ast.parse(holed))

def main():
    parser = argparse.ArgumentParser(description="For a course; the tests themselves: pytest test_lewm.py")
    parser.add_argument("--holes", metavar="FILE.py", help="write lewm.py with holes to this new file")
    parser.add_argument("--units", nargs="+", choices=HOLES, default=[*HOLES], help="where; default: in all")
    parser.add_argument("--score", metavar="FILE.json", help="run the tests; other arguments go to pytest")
    given, others = parser.parse_known_args()
    if given.holes and others:
        parser.error(f"--holes does not know {' '.join(others)}")
    if given.holes and Path(given.holes).exists():
        parser.error(f"{given.holes} exists already, and may be somebody's work: choose another name")
    if given.holes:
        source = (HERE / "lewm.py").read_text(encoding="utf-8")
        Path(given.holes).write_text(with_holes(source, given.units), encoding="utf-8")
    elif given.score:
        score = Score()
        pytest.main([__file__, "-q", "--tb=no", *others], plugins=[score])
        score.write(given.score)
    else:
        parser.error("say --holes FILE.py or --score FILE.json")

if __name__ == "__main__":
    main()
