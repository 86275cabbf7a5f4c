"""Tests by invariant: each says in its name what must hold and in its docstring which mistake it catches.

    pytest -q                                   # all of it, two minutes on two cores
    pytest -q -k sigreg                         # one unit: encoder, predictor, loss, data, training, planning
    LEWM=student pytest -q -k "not cli"         # the same tests on a file student.py

The method comes first, then files, Push-T, the probes and the command line. Sections have the titles of the
tested file's, which is lewm.py where none is named. Numbers without a source beside them follow from the
formula in the test.
"""

import contextlib
import csv
import dataclasses
import importlib
import inspect
import json
import math
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

lewm = sys.modules["lewm"] = importlib.import_module(os.environ.get("LEWM", "lewm"))
import probe  # noqa: E402   probe.py and pusht.py then use the same file
import pusht  # noqa: E402

HERE = Path(__file__).parent


# ======== Helpers =====================================================================================

def tiny(**changes):
    """A Config small enough for a test."""
    small = dict(image_size=32, patch_size=16, encoder_width=24, embed_dim=16, projector_hidden=32,
                 predictor_width=24, predictor_mlp=48, directions=32, batch_size=8, steps=8,
                 first_lesson=0.0, rollout_share=0.0)
    return lewm.Config.preset("smoke", **{**small, **changes})


def noise(*shape, seed=0):
    """Normal numbers, the same at each call."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def random_pictures(*shape):
    """uint8 of that shape, the same at each call."""
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def awake(model, seed=1):
    """Give the AdaLN layers weights, so that actions have an effect, as after training."""
    with torch.no_grad():
        for layer in model.predictor.layers:
            modulation = layer.adaLN_modulation[-1]
            modulation.weight.copy_(0.3 * noise(*modulation.weight.shape, seed=seed))
            modulation.bias.fill_(0.5)
    return model


def counting_data(lengths=(30, 16, 15, 40), column="pixels"):
    """A data set in which every frame and every action is its own row number."""
    rows = sum(lengths)
    number = np.arange(rows)[:, None]
    frames = {"pixels": np.broadcast_to(number[:, :, None, None], (rows, 8, 8, 3)).astype(np.uint8),
              "state": number.astype(np.float32)}
    return {"action": number.repeat(2, 1).astype(np.float32), column: frames[column],
            "ep_len": np.array(lengths), "ep_offset": np.cumsum(lengths) - lengths}


class Drawer:
    """A `render` for states that are row numbers: it keeps which rows each call has drawn."""

    def __init__(self):
        self.calls = []

    def __call__(self, states, size):
        self.calls.append(states[:, 0].long().unique())
        return states[:, :1, None, None].byte().expand(-1, 3, size, size)


class Adder(lewm.LeWM):
    """A toy world that is known exactly: an embedding moves by the first numbers of the action block."""

    def predict(self, z, blocks):
        return z + blocks[..., :z.shape[-1]]


class Mover(Adder):
    """The same, and a picture is its own embedding."""

    def encode(self, pixels):
        return pixels


class Dot:
    """A world that is not Push-T: a dot on a line of 32 px. Its only action number moves the dot, in px."""

    def __init__(self, place, goal):
        self.place, self.goal = place, goal

    def step(self, action):
        self.place = min(max(self.place + float(action[0]), 0), 31)
        return np.array([self.place]), 0.0, abs(self.place - self.goal) < 1, False, {}

    def render(self):
        picture = np.zeros((32, 32, 3), np.uint8)
        picture[:, round(self.place)] = 255
        return picture[::-1]                                # MuJoCo's are mirrored views, too


class Extra(lewm.LeWM):
    """A subclass with more weights, and more to say when it is made."""
    def __init__(self, cfg, extra):
        super().__init__(cfg)
        self.more = torch.nn.Linear(extra, 1)


class DotModel(lewm.LeWM):
    """Knows that world exactly: an embedding is the dot's place. It keeps how many blocks ahead it was
    asked."""

    def __init__(self, **changes):
        super().__init__(tiny(action_dim=1, frame_skip=2, embed_dim=1, **changes))
        self.action_stats.copy_(torch.tensor([[1.0], [2], [-3], [5]]))
        self.horizons, self.contexts = [], []

    def encode(self, pixels):
        bright = pixels.float().mean((-3, -2))                              # (...,32), one number a column
        return (bright * torch.arange(32)).sum(-1, keepdim=True) / bright.sum(-1, keepdim=True)

    def predict(self, z, blocks):
        return z + self.to_actions(blocks).unflatten(-2, (-1, 2)).sum(-2)

    def rollout(self, z, plans):
        self.horizons.append(1 + plans.shape[2] - z.shape[1])
        self.contexts.append((z[..., 0], self.to_actions(plans[:, 0, :z.shape[1] - 1])[..., 0]))
        return super().rollout(z, plans)


def run_python(*argv, cwd, **environment):
    """Python in another process -> its output and how it ended."""
    return subprocess.run([sys.executable, *map(str, argv)], cwd=cwd, env={**os.environ, **environment},
                          capture_output=True, encoding="utf-8", timeout=120)


def project(folder, *others):
    """Copy the lewm.py that is tested, and other files of the project, into a folder."""
    (folder / "lewm.py").write_text(Path(lewm.__file__).read_text(encoding="utf-8"), encoding="utf-8")
    for name in others:
        shutil.copy(HERE / name, folder)
    return folder


def contents(folder):
    """{file: (bytes, time of the last change)} of everything in a folder."""
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}


@pytest.fixture(scope="module")
def recorded():
    return pusht.collect(12, seed=5)


# ======== 4 SIGReg ====================================================================================

GAUSSIAN_SCORE = 2 * sum(
    math.exp(-s * s / 2) * (1 - math.exp(-s * s)) * 3e-4 for s in np.arange(0, 3, 3e-4))       # 1.0525


@pytest.mark.parametrize("B", [32, 256])
def test_sigreg_of_a_gaussian_is_the_same_at_any_batch_size(B):
    """Catches a missing factor B (weight 1/B too small), a missing doubling, a wrong weight. Theory:
    1.0525."""
    torch.manual_seed(0)
    sigreg = lewm.SIGReg(directions=64)
    values = torch.stack([sigreg(torch.randn(B, 2, 64)) for _ in range(60)])
    mean, error = values.mean().item(), values.std().item() / math.sqrt(len(values))
    fine = abs(mean - GAUSSIAN_SCORE) < 5 * error + 0.01
    assert fine, f"mean {mean:.4f} +- {error:.4f}, expected {GAUSSIAN_SCORE:.4f}"


def test_sigreg_agrees_with_a_slow_complex_version():
    """Catches slips in the formula: phi, weights, trapezoid ends, averaging. float64, complex, loops."""
    B, T, D, M = 16, 3, 8, 5
    z, directions = noise(B, T, D), noise(D, M, seed=1)
    total, knots = 0.0, np.linspace(0, 3, 17)
    for t in range(T):
        for m in range(M):
            line = (directions[:, m] / directions[:, m].norm()).double().numpy()
            shadow = z[:, t].double().numpy() @ line
            error = []
            for s in knots:
                phi, weight = np.exp(-s * s / 2), np.exp(-s * s / 2)
                error.append(weight * abs(np.exp(1j * s * shadow).mean() - phi) ** 2)
            total += B * 2 * sum((a + b) / 2 * 3 / 16 for a, b in zip(error, error[1:]))
    ours = lewm.SIGReg()(z, directions).item()
    assert abs(ours - total / (T * M)) < 1e-4, f"{ours:.6f}, expected {total / (T * M):.6f}"


@pytest.mark.parametrize("knots", [2, 17])
def test_the_gradient_of_sigreg_is_that_of_its_formula(knots):
    """Catches a slip in the gradient written by hand: a power too many, a sign, the mean over the batch."""
    z, directions = noise(16, 3, 8).requires_grad_(), noise(8, 5, seed=1)
    s = torch.linspace(0, 3, knots)
    weights = torch.exp(-s ** 2 / 2) * torch.tensor([0.5, *[1] * (knots - 2), 0.5]) * 6 / (knots - 1)
    xs = (z @ torch.nn.functional.normalize(directions, dim=0))[..., None] * s
    error = (xs.cos().mean(0) - torch.exp(-s ** 2 / 2)) ** 2 + xs.sin().mean(0) ** 2
    expected, = torch.autograd.grad(16 * (error @ weights).mean(), z)
    gradient, = torch.autograd.grad(lewm.SIGReg(knots=knots)(z, directions), z)
    assert torch.allclose(gradient, expected, atol=1e-6), (gradient - expected).abs().max()


@pytest.mark.parametrize("name, expected", [
    ("zero", 51.46), ("twice as wide", 31.7), ("shifted by 1", 50.6), ("half dead", 7.3)])
def test_sigreg_punishes_what_is_not_gaussian(name, expected):
    """Catches a regulariser that lets collapse pay. Known values at B 128, D 192, within 15 %."""
    z = noise(128, 4, 192)
    alive = torch.arange(192) < 96
    z = {"zero": 0 * z, "twice as wide": 2 * z, "shifted by 1": z + 1, "half dead": z * alive}[name]
    torch.manual_seed(0)
    value = lewm.SIGReg()(z).item()
    assert abs(value / expected - 1) < 0.15, f"{value:.2f}, expected about {expected}"


def test_sigreg_draws_new_directions_each_time():
    """Catches directions that are drawn once: the embeddings would become Gaussian along those alone."""
    z, sigreg = 2 * noise(16, 2, 64), lewm.SIGReg(directions=4)
    assert sigreg(z) != sigreg(z)


def test_sigreg_never_pools_time_steps():
    """Catches the wrong axis: for clips that stand still, pooling B * T rows gives about 4.2 instead of
    1.05."""
    torch.manual_seed(0)
    sigreg = lewm.SIGReg(directions=256)
    value = np.mean([sigreg(torch.randn(64, 1, 64).expand(-1, 4, -1)).item() for _ in range(20)])
    assert abs(value - GAUSSIAN_SCORE) < 0.2, f"{value:.2f}, expected {GAUSSIAN_SCORE:.2f}"
    with pytest.raises(ValueError, match="windows B, frames T"):
        sigreg(torch.randn(64, 64))


# ======== 2 ViT encoder ===============================================================================

def test_the_encoder_sees_where_things_are():
    """Catches a lost position embedding: without it a ViT cannot tell two pictures with the same patches
    apart."""
    model = lewm.LeWM(tiny()).eval()
    picture = noise(1, 1, 3, 32, 32)
    moved = picture.roll(16, dims=-1)                       # the same patches in another order
    gap = (model.encode(picture) - model.encode(moved)).abs().max().item()
    assert gap > 1e-4, f"moving the patches changes the embedding by {gap:.1g}, expected a visible change"


def test_bytes_and_normalised_floats_encode_alike_in_the_encoder():
    """Catches scaling done twice, or not at all."""
    model = lewm.LeWM(tiny()).eval()
    pixels = random_pictures(2, 2, 3, 32, 32)
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    normalised = (pixels.float() / 255 - mean) / std
    assert torch.allclose(model.encode(pixels), model.encode(normalised), atol=1e-5)
    with pytest.raises(ValueError, match=r"pictures in \[0, 1\]: give uint8"):
        model.encode(pixels.float() / 255)                  # the embedding of a picture that nobody has seen


def test_the_encoder_takes_pictures_with_any_leading_dimensions():
    """Catches a reshape that mixes windows and frames, and one that wants exactly five dimensions."""
    model = lewm.LeWM(tiny()).eval()
    pixels = random_pictures(6, 3, 32, 32)
    z = model.encode(pixels)
    assert z.shape == (6, 16)
    assert torch.allclose(model.encode(pixels.view(2, 3, 3, 32, 32)), z.view(2, 3, 16), atol=1e-5)
    assert torch.allclose(model.encode(pixels[4]), z[4], atol=1e-5)
    with pytest.raises(ValueError, match="fit_pictures"):
        model.encode(pixels[..., :20])


# ======== 3 Action encoder and AdaLN-zero predictor ===================================================

def test_at_initialisation_actions_have_no_effect_and_after_one_step_they_do_in_the_predictor():
    """Catches AdaLN layers that do not start at zero, and ones that never learn."""
    torch.manual_seed(0)
    model = lewm.LeWM(tiny(dropout=0.0))
    z, blocks = noise(8, 3, 16), noise(8, 3, 10, seed=1)
    same = torch.equal(model.predict(z, blocks), model.predict(z, -blocks))
    assert same, "at initialisation actions must not matter"
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    (model.predict(z, blocks) - noise(8, 3, 16, seed=2)).square().mean().backward()
    optimizer.step()
    gap = (model.predict(z, blocks) - model.predict(z, -blocks)).abs().max().item()
    assert gap > 1e-3, f"after one step actions change the prediction by {gap:.1g}, expected more than 0.001"


def test_at_initialisation_every_predictor_layer_is_the_identity():
    """Catches a gate that starts open."""
    predictor = lewm.LeWM(tiny()).predictor
    x, c = noise(2, 3, 24), noise(2, 3, 24, seed=1)
    assert all(torch.equal(layer(x, c), x) for layer in predictor.layers)


@pytest.mark.parametrize("k", [0, 1, 2])
def test_the_predictor_never_looks_ahead(k):
    """Catches a missing causal mask and actions shifted by one: frame or action k may change outputs k and
    later only."""
    model = awake(lewm.LeWM(tiny()).eval())
    z, blocks = noise(2, 3, 16), noise(2, 3, 10, seed=1)
    base = model.predict(z, blocks)
    for changed in ("frame", "action"):
        z2, blocks2 = z.clone(), blocks.clone()
        (z2 if changed == "frame" else blocks2)[:, k] += 1
        gap = (model.predict(z2, blocks2) - base).abs().amax((0, 2))
        assert (gap[:k] < 1e-6).all(), f"{changed} {k} changes earlier outputs: {gap.tolist()}"
        assert (gap[k:] > 1e-4).all(), f"{changed} {k} does not reach outputs {k} and later: {gap.tolist()}"


def test_the_order_of_frames_matters_to_the_predictor():
    """Catches a lost position embedding in the predictor."""
    model = awake(lewm.LeWM(tiny(predictor_depth=1)).eval())    # two causal layers know the order without it
    z, blocks = noise(1, 3, 16), torch.zeros(1, 3, 10)
    swapped = z[:, [1, 0, 2]]
    gap = (model.predict(z, blocks)[:, -1] - model.predict(swapped, blocks)[:, -1]).abs().max().item()
    assert gap > 1e-5, f"swapping two frames changes the prediction by {gap:.1g}"


def test_the_predictor_refuses_more_frames_than_its_history():
    """Catches an error of broadcasting, deep inside, in place of one that names the limit."""
    with pytest.raises(ValueError, match="4 frames are more than history 3"):
        lewm.LeWM(tiny()).predict(noise(2, 4, 16), noise(2, 4, 10))


# ======== 5 LeWM ======================================================================================

def test_the_paper_preset_has_the_authors_size_and_takes_a_step():
    """Catches a missing bias, a merged matrix of the wrong size, a forgotten layer. The authors' weights:
    18,034,478."""
    model = lewm.LeWM(lewm.Config.preset("paper", batch_size=2))
    assert sum(p.numel() for p in model.parameters()) == 18_034_478
    loss, _ = model.loss(random_pictures(2, 4, 3, 224, 224), noise(2, 3, 10))
    loss.backward()
    missing = [name for name, p in awake(model).named_parameters() if p.grad is None]
    assert math.isfinite(loss.item()) and not missing, f"no gradient reaches {missing}"


def test_the_loss_is_prediction_plus_lambda_sigreg():
    """Catches a wrong target frame, a sum in place of a mean, a lost lambda."""
    model = awake(lewm.LeWM(tiny(dropout=0.0, sigreg_weight=0.3)))
    pixels, blocks = noise(8, 4, 3, 32, 32), noise(8, 3, 10, seed=1)
    torch.manual_seed(7)
    loss, parts = model.loss(pixels, blocks)
    z = model.encode(pixels)
    z_hat = model.predict(z[:, :3], blocks)
    prediction = (z_hat - z[:, 1:]).square().mean()
    torch.manual_seed(7)
    expected = prediction + 0.3 * model.sigreg(z)
    assert torch.allclose(loss, expected, atol=1e-5)
    assert torch.allclose(parts["prediction"], prediction, atol=1e-5)


@pytest.mark.parametrize("rollout_share", [0.0, 1.0])
def test_gradients_flow_through_both_sides_of_the_error_of_the_loss(rollout_share):
    """Catches a detached target, which the paper does not have."""
    model = awake(lewm.LeWM(tiny(sigreg_weight=0.0)))
    model.cfg.rollout_share = rollout_share                 # one of the two errors alone
    pixels = noise(4, 4, 3, 32, 32).requires_grad_()
    model.projector.eval()                                  # batch norm would carry a gradient between frames
    model.loss(pixels, noise(4, 3, 10, seed=1))[0].backward()
    reach = pixels.grad.abs().amax((0, 2, 3, 4))
    assert (reach > 0).all(), f"gradient at frames 0 to 3: {reach.tolist()}; the last is only ever a target"


def test_long_windows_hold_several_examples_of_the_loss():
    """Catches predictions that see more than `history` frames, or a future frame paired with the wrong
    past."""
    model = awake(lewm.LeWM(tiny(dropout=0.0, sigreg_weight=0.0, frames=6)).eval())
    pixels, blocks = noise(4, 6, 3, 32, 32), noise(4, 5, 10, seed=1)
    pieces = [model.loss(pixels[:, s:s + 4], blocks[:, s:s + 3])[0] for s in range(3)]
    assert torch.allclose(model.loss(pixels, blocks)[0], torch.stack(pieces).mean(), atol=1e-5)


def test_the_rollout_share_of_the_loss_is_the_error_on_own_predictions():
    """Catches true frames where the model should go on from its own, and wrong weights of near and far
    steps."""
    plain = dict(dropout=0.0, sigreg_weight=0.0, frames=5)
    model = awake(lewm.LeWM(tiny(rollout_share=0.25, **plain)).eval())
    pixels, blocks = noise(4, 5, 3, 32, 32), noise(4, 4, 10, seed=1)
    z = model.encode(pixels)
    one = model.predict(z[:, :1], blocks[:, :1])[:, -1]     # by hand, from the first frame alone
    two = model.predict(torch.stack([z[:, 0], one], 1), blocks[:, :2])[:, -1]
    three = model.predict(torch.stack([z[:, 0], one, two], 1), blocks[:, :3])[:, -1]
    four = model.predict(torch.stack([one, two, three], 1), blocks[:, 1:4])[:, -1]
    errors = [(own - z[:, t]).square().mean() for t, own in enumerate((one, two, three, four), start=1)]
    weights = np.exp(-0.2 * np.arange(4)) / np.exp(-0.2 * np.arange(4)).sum()
    own_error = sum(weight * error for weight, error in zip(weights, errors))
    teacher = lewm.LeWM(tiny(**plain)).eval()
    teacher.load_state_dict(model.state_dict())
    expected = 0.75 * teacher.loss(pixels, blocks)[0] + 0.25 * own_error
    assert torch.allclose(model.loss(pixels, blocks)[0], expected, atol=1e-5)


def test_without_a_rollout_share_the_loss_imagines_nothing(monkeypatch):
    """Catches a plain loss that pays for what it does not use, or that is another one than the paper's."""
    def not_asked_for(*args, **kwargs):
        raise AssertionError("rollout_share is 0")

    model = awake(lewm.LeWM(tiny(rollout_share=0.0)))
    monkeypatch.setattr(model, "rollout", not_asked_for)
    model.loss(noise(4, 4, 3, 32, 32), noise(4, 3, 10, seed=1))


def test_to_blocks_and_to_actions_undo_each_other_and_z_score_each_action_number():
    """Catches the mean or std of another action number, and actions laid into blocks in another order."""
    model, mean, std = lewm.LeWM(tiny()), torch.tensor([10.0, 20]), torch.tensor([2.0, 4])
    model.action_stats[:2] = torch.stack([mean, std])
    actions = noise(4, 2, 15, 2)                            # any leading dimensions, here (4,2)
    blocks = model.to_blocks(actions)
    assert blocks.shape == (4, 2, 3, 10)
    seventh = (actions[..., 7, :] - mean) / std             # block 1 holds actions 5 to 9
    assert torch.allclose(blocks[..., 1, 4:6], seventh, atol=1e-5)
    assert torch.allclose(model.to_actions(blocks), actions, atol=1e-5)


def test_imagination_pairs_each_action_with_the_frame_before_it_in_planning():
    """Catches a rollout that is off by one, or that reuses an action."""
    model, plans = Adder(tiny(embed_dim=4)), noise(2, 3, 6, 10)
    z = noise(2, 1, 4, seed=1)
    assert torch.allclose(model.rollout(z, plans), z[:, None] + plans[..., :4].cumsum(2), atol=1e-5)
    context = noise(2, 3, 4, seed=2)
    ends = model.rollout(context, plans)
    given, imagined = context[:, None, :2] + plans[:, :, :2, :4], plans[:, :, 2:, :4].cumsum(2)
    assert ends.shape == (2, 3, 6, 4)
    assert torch.allclose(ends[:, :, :2], given), "context is given, not imagined"
    assert torch.allclose(ends[:, :, 2:], context[:, None, 2:] + imagined, atol=1e-5)
    with pytest.raises(ValueError, match="at least 3 action blocks"):
        model.rollout(context, plans[:, :, :2])


@pytest.mark.parametrize("context", [1, 2, 3])
def test_imagination_is_prediction_again_and_again_in_planning(context):
    """Catches a rollout that shows the predictor another history than training does, or pairs its frames
    with other blocks."""
    model = awake(lewm.LeWM(tiny()).eval())
    z, plans = noise(2, context, 16), noise(2, 2, 6, 10, seed=1)
    for n in range(2):
        known = list(z.unbind(1))
        for t in range(6):                                  # from one to three frames, one block at a time
            window = slice(max(0, t - 2), t + 1)
            z_hat = model.predict(torch.stack(known[window], 1), plans[:, n, window])[:, -1]
            known += [z_hat] if len(known) == t + 1 else []
        imagined = model.rollout(z, plans)[:, n]
        assert torch.allclose(imagined[:, context - 1:], torch.stack(known[context:], 1), atol=1e-5)
    assert torch.allclose(imagined[:, :context], model.predict(z, plans[:, 1, :context]), atol=1e-5)


# ======== 7 Windows of data ===========================================================================

def test_windows_of_data_pair_each_frame_with_the_actions_that_follow_it():
    """Catches blocks that are off by one step, interleaved the wrong way, or not z-scored."""
    model = lewm.LeWM(tiny(image_size=8, patch_size=8))
    model.action_stats.copy_(torch.tensor([[10.0, 20], [2, 4], [-1, -1], [1, 1]]))
    pixels, blocks = lewm.get_batch(model, counting_data(), np.array([0, 7, 61]))
    assert pixels.shape == (3, 4, 3, 8, 8) and blocks.shape == (3, 3, 10)
    for row, start in enumerate([0, 7, 61]):
        assert pixels[row, :, 0, 0, 0].tolist() == [start, start + 5, start + 10, start + 15]
        for k in range(3):
            steps = [start + 5 * k + i for i in range(5)]
            expected = [(step - mean) / std for step in steps for mean, std in ((10, 2), (20, 4))]
            assert blocks[row, k].tolist() == expected, f"block {k} of the window at {start}"


def test_windows_of_data_cover_every_valid_start_and_never_cross_an_episodes_end():
    """Catches windows over the gap between two episodes and starts that are never drawn."""
    starts = lewm.window_starts(counting_data(), tiny(), range(4))
    expected = [*range(0, 15), 30, *range(61, 86)]          # lengths 30, 16, 15, 40 leave 15, 1, 0, 25 starts
    assert starts.tolist() == expected


def test_whitened_colours_of_data_weigh_a_small_object_as_much_as_a_large_one():
    """Catches a colour map that is transposed, not inverted, or not applied, and statistics that a checkpoint
    forgets."""
    generator = torch.Generator().manual_seed(0)
    grey, blue = (torch.tensor(colour, dtype=torch.uint8)[:, None, None]
                  for colour in ([100, 110, 120], [30, 60, 220]))
    pixels = torch.full((400, 3, 16, 16), 200, dtype=torch.uint8)
    for picture in pixels:
        x, y, u, v = torch.randint(0, 10, (4,), generator=generator).tolist()
        picture[:, y:y + 6, x:x + 6] = grey                 # large
        picture[:, v:v + 2, u:u + 2] = blue                 # small
    mean, colour_map = lewm.colour_statistics(pixels, floor=1e-6)
    seen = torch.einsum("cd,ndhw->nchw", colour_map, pixels / 255 - mean)
    colours = seen.permute(0, 2, 3, 1).reshape(-1, 3)
    covariance = colours.T @ colours / len(colours)
    variances = torch.linalg.eigvalsh(covariance)
    assert colours.mean(0).abs().max() < 1e-3
    assert (variances[1:] - 1).abs().max() < 1e-2, f"covariance {covariance}"

    model = lewm.LeWM(tiny(image_size=16, whiten=True)).eval()
    model.picture_mean.copy_(mean)
    model.colour_map.copy_(colour_map)
    assert torch.allclose(model.encode(pixels[None, :4]), model.encode(seen[None, :4]), atol=1e-4)


def test_a_whitened_run_keeps_its_statistics_of_data_in_the_checkpoint(tmp_path, recorded):
    """Catches a resumed or evaluated model that sees other colours than the trained one."""
    cfg = tiny(steps=3, whiten=True)
    model = lewm.train(cfg, recorded, tmp_path, device="cpu")
    again, _, _ = lewm.load_checkpoint(tmp_path / "checkpoint.pt")
    fresh = lewm.LeWM(cfg)
    for name in ("picture_mean", "colour_map", "action_stats"):
        assert torch.equal(getattr(model, name), getattr(again, name))
        assert not torch.equal(getattr(model, name), getattr(fresh, name)), f"{name} was not measured"


def test_episodes_of_data_are_split_whole_by_seed_and_before_anything_else():
    """Catches validation windows that overlap training windows."""
    train, held_out = lewm.split_episodes(100, 0.1, seed=1)
    assert len(held_out) == 10 and sorted([*train, *held_out]) == list(range(100))
    assert lewm.split_episodes(100, 0.1, seed=1)[1].tolist() == held_out.tolist()
    assert lewm.split_episodes(100, 0.1, seed=2)[1].tolist() != held_out.tolist()
    assert len(lewm.split_episodes(1, 0.5, seed=0)[0]) == 1, "one episode must stay for training"


def test_action_statistics_of_data_ignore_the_nan_rows_at_episode_ends():
    """Catches statistics that become NaN on the authors' files."""
    action = np.array([[1.0, 2], [3, 2], [np.nan, np.nan]])
    assert lewm.action_statistics(action).tolist() == [[2, 2], [1, 1], [1, 2], [3, 2]]


def with_nan(action, row):
    action = action.copy()
    action[row] = np.nan
    return action


@pytest.mark.parametrize("change, words", [
    (lambda d: {"ep_len": None}, "lacks ep_len"),
    (lambda d: {"pixels": None}, "lacks state"),
    (lambda d: {"action": d["action"][:, :1]}, "action_dim"),
    (lambda d: {"ep_len": d["ep_len"] + 1}, "do not fit"),
    (lambda d: {"ep_len": d["ep_len"][:-1]}, "equally long"),
    (lambda d: {"pixels": d["pixels"].astype(float)}, "uint8"),
    (lambda d: {"ep_len": np.array([5, 5, 5, 5])}, "no episode holds a window"),
    (lambda d: {"action": d["action"][:-9]}, "92 actions for 101 rows of pixels"),
    (lambda d: {"action": d["action"][:-4]}, "97 actions for 101 rows of pixels"),     # one less an episode
    (lambda d: {"action": torch.tensor(d["action"])}, "action is not a NumPy array"),
    (lambda d: {"pixels": torch.tensor(d["pixels"])}, "pixels is not a NumPy array"),
    (lambda d: {"action": with_nan(d["action"], 7)}, "nan.* in row 7, inside an episode"),
    (lambda d: {"action": with_nan(d["action"], [45, 50])}, "nan.* in row 50, inside an episode")])
def test_arrays_of_data_that_do_not_fit_are_refused_by_name(change, words):
    """Catches training on garbage, and errors that only show up deep inside torch."""
    data = counting_data()
    data = {name: array for name, array in {**data, **change(data)}.items() if array is not None}
    with pytest.raises(ValueError, match=words):
        lewm.train(tiny(image_size=8, patch_size=8), data)


def test_data_may_have_nan_in_an_episodes_last_row_alone():
    """Catches a check that refuses the authors' files: after the last frame of an episode nothing is done."""
    data = counting_data()
    last = data["ep_offset"] + data["ep_len"] - 1
    lewm.check_data({**data, "action": with_nan(data["action"], last)}, tiny())


def test_stored_pictures_of_data_are_cut_from_the_middle():
    """Catches a crop from the corner, and pictures that are squeezed instead of cut."""
    pixels = np.zeros((60, 24, 40, 3), np.uint8)
    pixels[:, 8:16, 16:24] = 200
    data = {"pixels": pixels, "action": np.zeros((60, 2)), "ep_len": np.array([60])}
    data["ep_offset"] = np.array([0])
    model = lewm.LeWM(tiny(image_size=8, patch_size=4))
    small, _ = lewm.get_batch(model, data, np.array([0]))
    assert small.shape == (1, 4, 3, 8, 8)
    assert small[0, 0, 0].float().mean().item() == pytest.approx(200 / 9, abs=1)        # 8 x 8 of 24 x 24 px
    same = lewm.fit_pictures(torch.tensor(pixels).permute(0, 3, 1, 2), 24)
    assert same.shape == (60, 3, 24, 24)
    assert (same[:, :, 8:16, 8:16] == 200).all() and same.float().mean() < 23
    with pytest.raises(ValueError, match="not uint8"):
        lewm.fit_pictures(torch.tensor(pixels), 24)         # the colours must come first


# ======== 8 Training ==================================================================================

def test_the_learning_rate_of_training_warms_up_and_falls_to_zero():
    """Catches a cosine that does not span the whole run."""
    cfg = tiny(steps=100, warmup=0.1, lr=1.0)
    rates = [lewm.learning_rate(step, cfg) for step in range(100)]
    assert rates[0] == 0.1 and rates[9] == 1.0 and max(rates) == 1.0 and rates[-1] < 0.01
    assert all(a >= b for a, b in zip(rates[9:], rates[10:]))


def test_the_learning_rate_of_each_lesson_of_training_has_its_own_peak_and_falls_to_zero():
    """Catches one cosine over both lessons, a second lesson without a warm-up, and the peak of the other
    one."""
    cfg = tiny(steps=100, first_lesson=0.4, warmup=0.1, first_lr=0.5, lr=1.0)
    rates = [lewm.learning_rate(step, cfg) for step in range(100)]
    assert rates[:4] == [0.125, 0.25, 0.375, 0.5] and max(rates[:40]) == 0.5 and rates[39] < 0.005
    assert rates[40] == pytest.approx(1 / 6) and rates[45] == 1.0 == max(rates[40:]) and rates[-1] < 0.005
    for start, end in ((4, 39), (46, 99)):
        assert all(rates[k] > rates[k + 1] for k in range(start, end)), "each lesson has a cosine of its own"


def test_the_learning_rate_is_the_schedules_in_training(monkeypatch):
    """Catches a schedule that is computed and not used: without a learning rate nothing may move."""
    monkeypatch.setattr(lewm, "learning_rate", lambda *args: 0.0)
    cfg = tiny(image_size=8, patch_size=8, steps=2)
    torch.manual_seed(cfg.seed)
    fresh = lewm.LeWM(cfg)
    trained = lewm.train(cfg, counting_data(), device="cpu")
    assert all(torch.equal(a, b) for a, b in zip(trained.parameters(), fresh.parameters()))


def test_no_number_of_training_comes_from_held_out_episodes():
    """Catches a held-out error that is the training one, and statistics or batches that see held-out
    episodes."""
    data, draw = counting_data((30, 30, 30, 30), "state"), Drawer()
    cfg = tiny(image_size=8, patch_size=8, steps=3, held_out=0.5, whiten=True)
    model = lewm.train(cfg, data, device="cpu", render=draw)
    train, held_out = lewm.split_episodes(4, 0.5, cfg.seed)
    colours, looked_at, *batches = [set((rows // 30).tolist()) for rows in draw.calls]
    assert colours == set(train) and looked_at == set(held_out)
    assert len(batches) == 3 and set().union(*batches) == set(train)
    rows = np.concatenate([np.arange(30 * e, 30 * e + 30) for e in train])
    assert torch.equal(model.action_stats, lewm.action_statistics(data["action"][rows]))


def test_training_draws_from_the_first_lesson_alone_and_then_from_the_second_alone():
    """Catches lessons that are mixed or swapped, and a held-out error measured on the first lesson."""
    data, draw = counting_data((30,) * 12, "state"), Drawer()
    data["lesson"] = np.repeat([0, 1], 6)
    cfg = tiny(image_size=8, patch_size=8, steps=7, first_lesson=0.57, held_out=0.5, whiten=False)
    lewm.train(cfg, data, device="cpu", render=draw)
    train, held_out = (set(side.tolist()) for side in lewm.split_episodes(12, 0.5, cfg.seed))
    first, second = set(range(6)), set(range(6, 12))
    looked_at, *batches = [set((rows // 30).tolist()) for rows in draw.calls]
    assert looked_at == held_out & second
    assert len(batches) == 7 and set().union(*batches[:4]) == train & first
    assert set().union(*batches[4:]) == train & second


def test_other_peoples_arrays_train_too_in_training(tmp_path, monkeypatch):
    """Catches Push-T's sizes hidden in the code: a world with 3 action numbers, blocks of 2 steps and 20 px
    pictures."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    data = {"pixels": rng.integers(0, 256, (200, 20, 20, 3), dtype=np.uint8),
            "action": rng.normal(size=(200, 3)), "ep_len": np.full(4, 50), "ep_offset": np.arange(4) * 50}
    cfg = tiny(action_dim=3, frame_skip=2, steps=2)
    model = lewm.train(cfg, data, device="cpu")
    torch.manual_seed(cfg.seed)
    fresh = lewm.LeWM(cfg)
    for part in ("encoder.cls_token", "projector.0.weight", "action_encoder.patch_embed.weight",
                 "predictor.norm.weight", "pred_proj.0.weight"):
        moved = not torch.equal(model.get_parameter(part), fresh.get_parameter(part))
        assert moved, f"two steps did not move {part}"
    assert model.predict(noise(2, 3, 16), noise(2, 3, 6)).shape == (2, 3, 16)
    assert not list(tmp_path.iterdir()), "without `out` nothing is written"


def test_training_takes_a_model_with_another_loss():
    """Catches a `model` that is ignored, and a loss that is looked up on the class."""
    class Lazy(lewm.LeWM):
        def loss(self, pixels, blocks):
            return self.predictor.norm.bias.square().sum(), {"prediction": torch.zeros(())}

    cfg = tiny(image_size=8, patch_size=8, steps=2)
    model = Lazy(cfg)
    before = {name: p.clone() for name, p in model.named_parameters()}
    assert lewm.train(cfg, counting_data(), device="cpu", model=model) is model and not model.training
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]), f"{name} has no part in this loss"


def test_diagnostics_of_training_have_known_answers():
    """Catches a rank that ignores a dead dimension, and a straightness that is not a cosine of velocities."""
    z = noise(4000, 8)
    assert abs(lewm.effective_rank(z) - 8) < 0.1
    assert abs(lewm.effective_rank(z * (torch.arange(8) < 4)) - 4) < 0.1
    assert lewm.effective_rank(z[:, :1] * torch.ones(8)) < 1.001
    line = torch.arange(5.0)[None, :, None] * noise(3, 1, 8)
    assert abs(lewm.straightness(line) - 1) < 1e-5
    # independent frames turn back half the time
    assert abs(lewm.straightness(noise(4000, 5, 64)) + 0.5) < 0.05, "expected a cosine of -0.5"


def test_diagnostics_of_training_in_a_known_world():
    """Catches an error against the wrong frame, a copy baseline that copies the goal, and actions that are
    not shuffled."""
    blocks = noise(8, 3, 10)
    z = torch.cat([torch.zeros(8, 1, 4), blocks[..., :4].cumsum(1)], 1)
    row = lewm.diagnose(Mover(tiny(embed_dim=4)), z, blocks)
    assert row["val_prediction"] < 1e-10 and row["val_shuffled_ratio"] > 1e6
    assert row["val_copy_last"] == pytest.approx(blocks[..., :4].square().mean().item(), rel=1e-5)


def test_looking_at_a_model_in_training_does_not_change_it():
    """Catches diagnostics that move batch-norm averages or the random state, so that logging changes the
    run."""
    model = lewm.LeWM(tiny()).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    numbers = lewm.diagnose(model, torch.zeros(8, 4, 3, 32, 32, dtype=torch.uint8), noise(8, 3, 10))
    assert model.training and torch.equal(random, torch.get_rng_state())
    assert all(map(math.isfinite, numbers.values()))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def metrics_without_times(folder):
    with open(folder / "metrics.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        del row["seconds"]
    return rows


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory, recorded):
    """A training run that nothing has stopped: its Config, folder and model."""
    cfg, folder = tiny(steps=12, checkpoint_minutes=0), tmp_path_factory.mktemp("whole")
    return cfg, folder, lewm.train(cfg, recorded, folder, device="cpu")


def assert_same_run(whole_run, folder, model):
    _, whole_folder, whole = whole_run
    weights = model.state_dict()
    different = [name for name, value in whole.state_dict().items() if not torch.equal(value, weights[name])]
    assert not different, f"these differ from a run that was not stopped: {different}"
    assert metrics_without_times(whole_folder) == metrics_without_times(folder)


def test_a_training_run_that_was_stopped_and_resumed_equals_one_that_was_not(tmp_path, recorded, whole_run):
    """Catches any state that is missing from the checkpoint: optimizer, random numbers, sampler, step."""
    cfg, calls = whole_run[0], []

    def stops_after_a_while(states, size):
        calls.append(size)
        if len(calls) == 7:
            signal.raise_signal(signal.SIGINT)              # Ctrl-C in the middle of a step
        return pusht.render(states, size)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)   # a job in the background ignores it
    with pytest.raises(KeyboardInterrupt):
        lewm.train(cfg, recorded, tmp_path, device="cpu", render=stops_after_a_while)
    signal.signal(signal.SIGINT, before)
    assert 0 < lewm.read_weights(tmp_path / "checkpoint.pt")["step"] < 12
    assert_same_run(whole_run, tmp_path, lewm.train(cfg, recorded, tmp_path, resume=True, device="cpu"))


DIES = """
import json, os, signal, sys
import torch
import lewm, pusht

moment, config, calls, save = sys.argv[1], json.loads(sys.argv[2]), [], torch.save

def die_in(name, count):
    calls.append(name)
    if moment == name and calls.count(name) == count:
        os.kill(os.getpid(), signal.SIGKILL)

def render(states, size):
    die_in("step", 6)
    return pusht.render(states, size)

def half_a_file(state, path):
    save(state, path)
    if moment == "write" and calls.count("write") == 3:
        os.truncate(path, 5000)
    die_in("write", 4)

torch.save = half_a_file
data = pusht.collect(12, seed=5, workers=1)
lewm.train(lewm.Config(**config), data, "run", resume=True, device="cpu", render=render)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="there is no SIGKILL here")
def test_a_training_run_that_was_killed_twice_and_resumed_equals_one_that_was_not(
        tmp_path, recorded, whole_run):
    """Catches a checkpoint that a kill can spoil: in the middle of a step, and half-way through a write."""
    cfg, steps = whole_run[0], []
    (project(tmp_path, "pusht.py") / "dies.py").write_text(DIES)
    for moment in ("step", "write"):
        ended = run_python("dies.py", moment, json.dumps(vars(cfg)), cwd=tmp_path)
        assert ended.returncode == -signal.SIGKILL, ended.stderr
        steps.append(lewm.read_weights(tmp_path / "run/checkpoint.pt")["step"])
    assert steps == [3, 6] and (tmp_path / "run/checkpoint.pt.partial").stat().st_size == 5000
    model = lewm.train(cfg, recorded, tmp_path / "run", resume=True, device="cpu")
    assert_same_run(whole_run, tmp_path / "run", model)


@pytest.mark.parametrize("changes, column, words", [
    ({"lr": 0.5}, None, "lr is .* in .*checkpoint.pt, not 0.5"), ({}, "state", "other data"),
    ({}, "action", "other data")])
def test_resumed_training_refuses_what_makes_it_another_run(
        tmp_path, recorded, whole_run, changes, column, words):
    """Catches a run that goes on with other settings, pictures or actions than it began with."""
    cfg, folder, _ = whole_run
    shutil.copy(folder / "checkpoint.pt", tmp_path)
    data = {**recorded, column: recorded[column] * np.float32(0.5)} if column else recorded
    with pytest.raises(ValueError, match=words):
        lewm.train(dataclasses.replace(cfg, **changes), data, tmp_path, resume=True, device="cpu")


def test_compiled_and_eager_training_give_the_same_number(monkeypatch, capsys):
    """Catches a compiled step that is another function, and a missing compiler that ends the run."""
    from torch._inductor import config
    changes = dict(dropout=0.0, sigreg_weight=0.0, encoder_depth=1, predictor_depth=1)
    model = awake(lewm.LeWM(tiny(**changes)))
    pixels, blocks = noise(4, 4, 3, 32, 32), noise(4, 3, 10, seed=1)
    eager = model.loss(pixels, blocks)[0].item()
    assert abs(torch.compile(model.loss)(pixels, blocks)[0].item() - eager) < 1e-4 * max(1, abs(eager))

    torch.compiler.reset()
    monkeypatch.setattr(config.cpp, "cxx", ("no-such-compiler",))
    monkeypatch.setattr(config, "fx_graph_cache", False)
    changes.update(image_size=8, patch_size=8, steps=2)
    runs = [lewm.train(tiny(compile=on, **changes), counting_data(), device="cpu") for on in (True, False)]
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*(run.parameters() for run in runs)))
    assert "going on without it" in capsys.readouterr().out


@pytest.mark.parametrize("glitch", [False, True])
def test_training_names_an_outlier_among_the_actions(glitch, capsys):
    """Catches a sensor's one error that silently becomes the range in which plans are tried."""
    data = counting_data((800, 800))
    data["action"] = np.random.default_rng(0).normal(size=(1600, 2)).astype(np.float32)
    data["action"][[3, 803], 1] += 1e4 * glitch             # in both episodes, as one of them is held out
    lewm.train(tiny(image_size=8, patch_size=8, steps=1), data, device="cpu")
    assert ("over 20 std from the mean" in capsys.readouterr().out) == glitch


@pytest.mark.parametrize("ratio, error, told", [(1.0, 0.5, True), (1.0, 0.1, False), (3.0, 0.5, False)])
def test_training_says_once_that_actions_do_not_matter(ratio, error, told, monkeypatch, capsys):
    """Catches a silent failure: a target that rests in each episode makes a model that ignores actions."""
    seen = dict(val_shuffled_ratio=ratio, val_prediction=error, val_copy_last=0.2)
    monkeypatch.setattr(lewm, "diagnose", lambda *look_at: seen)
    lewm.train(tiny(image_size=8, patch_size=8, steps=9), counting_data(), device="cpu")
    assert capsys.readouterr().out.count("after 3 steps actions do not matter yet") == told


# ======== 6 Planning with CEM =========================================================================

SEARCH = dict(horizon=3, candidates=200, iterations=25, elites=20)


def toy_planner():
    model = Adder(tiny(embed_dim=4)).eval()
    model.action_stats.copy_(torch.tensor([[0.0, 0], [1, 1], [-2, -2], [2, 2]]))
    return model


def test_planning_finds_a_known_optimum_within_the_bounds():
    """Catches a sign error in the cost, elites taken from the wrong end, and plans outside the data's
    range."""
    model, z = toy_planner(), torch.zeros(2, 4)
    goal = torch.tensor([[3.0, -2, 1, 0], [100, 100, 100, 100]])
    plan = lewm.cem(model, z, goal, **SEARCH)
    end, largest = plan[..., :4].sum(1), plan.abs().max().item()
    assert plan.shape == (2, 3, 10) and largest <= 2 + 1e-6, f"an action of {largest:.2f}, expected at most 2"
    near = (end[0] - goal[0]).abs().max() < 0.1
    assert near, f"the plan ends at {end[0].tolist()}, expected {goal[0].tolist()}"
    far = (end[1] > 5.5).all()
    assert far, f"a goal out of reach wants each action at its bound, 3 x 2 = 6; got {end[1].tolist()}"


def test_the_bounds_of_planning_are_the_datas_in_the_datas_units():
    """Catches bounds that are not z-scored like the plans, and the bounds of another action number."""
    model, goal = toy_planner(), torch.tensor([[100.0, -100, 100, -100]])
    model.action_stats.copy_(torch.tensor([[1.0, -2], [0.5, 2], [0, -6], [2, 2]]))
    plan = lewm.cem(model, torch.zeros(1, 4), goal, **SEARCH)
    raw = model.to_actions(plan).view(3, 5, 2)[:, :2]       # the two actions that this toy world looks at
    fine = (raw - torch.tensor([2.0, -6])).abs().max() < 0.2
    assert fine, f"expected the bounds 2 and -6, got {raw.tolist()}"


def test_planning_takes_what_is_not_given_from_the_models_config_and_refuses_what_is_impossible():
    """Catches the paper's numbers of candidates where the Config has others, and goals that do not match."""
    model, z, goal = toy_planner(), noise(2, 4), noise(2, 4, seed=1)
    cfg = model.cfg
    given = dict(horizon=cfg.horizon, candidates=cfg.candidates, iterations=cfg.iterations, elites=cfg.elites)
    assert torch.equal(lewm.cem(model, z, goal), lewm.cem(model, z, goal, **given))
    for name in given:
        other = lewm.cem(model, z, goal, **{**given, name: given[name] - 1})
        assert other.shape != (2, cfg.horizon, 10) or not torch.equal(other, lewm.cem(model, z, goal)), name
    with pytest.raises(ValueError, match="elites 30 > candidates 20"):
        lewm.cem(model, z, goal, candidates=20, elites=30)
    with pytest.raises(ValueError, match="2 starts and 1 goals"):
        lewm.cem(model, z, goal[:1])


def test_a_plan_depends_on_its_own_episode_alone_in_planning():
    """Catches random numbers shared by a batch: results that change with the batch size, and plans that
    differ from run to run."""
    model = awake(lewm.LeWM(tiny(dropout=0.5))).eval()
    model.action_stats[2:] *= 3
    z, goal = noise(3, 16), noise(3, 16, seed=1)
    buffers = {name: value.clone() for name, value in model.named_buffers()}

    def plan(episodes, seeds):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return lewm.cem(model, z[episodes], goal[episodes], generators,
                        horizon=3, candidates=40, iterations=6, elites=8)

    together = plan([0, 1, 2], [0, 1, 2])
    alone = torch.cat([plan([e], [e]) for e in range(3)])
    assert torch.equal(together, alone), f"plans differ by {(together - alone).abs().max():.2g}"
    assert not torch.allclose(together[:1], plan([0], [9]))
    for name, value in model.named_buffers():
        assert torch.equal(value, buffers[name]), "planning changed a batch norm"


def test_a_cost_of_nan_in_planning_is_an_error_and_not_a_plan():
    """Catches a planner that picks its elites among NaN."""
    with pytest.raises(ValueError, match="not finite"):
        lewm.cem(toy_planner(), torch.full((1, 4), math.nan), torch.zeros(1, 4), iterations=2)


# ======== 9 Planning in a world =======================================================================

def test_planning_reaches_its_goals_in_a_world_that_is_not_push_t():
    """Catches Push-T in the planner: another number of actions, plans played z-scored, goals of other
    episodes."""
    worlds = [Dot(2, goal=20), Dot(16, goal=3), Dot(30, goal=25), Dot(10, goal=11)]
    goals = [Dot(world.goal, None).render() for world in worlds]
    planner = lewm.Planner(DotModel(replan=1), goals)
    histories, reached = lewm.play(worlds, planner, budget=30)
    assert reached.all(), f"the dots are at {[world.place for world in worlds]}, expected 20, 3, 25, 11"
    assert all(abs(history[-1, 0] - world.goal) < 1 for history, world in zip(histories, worlds))


def test_a_plan_made_anew_keeps_its_deadline_in_planning():
    """Catches a goal that stays as many blocks away however often one plans again: the planner would put it
    off for ever."""
    model = DotModel(candidates=4, iterations=1, elites=2, horizon=5, replan=2)
    never = Dot(0, goal=1000)
    lewm.play([never], lewm.Planner(model, [Dot(31, None).render()]), budget=20)
    assert model.horizons == [5, 3, 1, 5, 3, 1], "20 env steps are 10 blocks: plans of 5, made anew after 2"
    assert pusht.plan_lengths(model.cfg, 20) == model.horizons, "the world counts other plans than are made"


@pytest.mark.parametrize("context", [1, 2, 3])
def test_a_plan_starts_from_the_last_frames_and_the_blocks_between_them_in_planning(context):
    """Catches frames or blocks of another episode or another time, and what is lost when an episode ends."""
    model = DotModel(candidates=40, iterations=3, elites=4, horizon=4, replan=1, context=context)
    worlds = [Dot(10, goal=14), Dot(5, goal=1000), Dot(25, goal=1000)]      # the first ends on the way
    goals = [Dot(place, None).render() for place in (15, 15, 15)]
    _, reached = lewm.play(worlds, lewm.Planner(model, goals), budget=12)
    assert reached.tolist() == [True, False, False]
    assert {z.shape[1] for z, _ in model.contexts} == set(range(1, context + 1))
    for z, actions in model.contexts:
        for pair in zip(z.diff(dim=1)[0], actions.view(-1, 2).sum(1)):      # frames are exact to half a px
            assert abs(pair[0] - pair[1]) <= 1, f"the dot moved by {pair[0]}, the block says {pair[1]}"
    with pytest.raises(ValueError, match=r"past is \[1, 2, 2\], frames 2"):
        lewm.cem(model, torch.zeros(1, 2, 1), torch.zeros(1, 1), past=torch.zeros(1, 2, 2))


def test_an_episode_is_played_the_same_alone_and_beside_others_in_planning():
    """Catches a generator that episodes share, and a goal, picture or count that goes by the number
    running."""
    torch.manual_seed(0)
    cfg = tiny(action_dim=1, frame_skip=2, candidates=10, iterations=2, elites=3, horizon=3, replan=2)
    model = awake(lewm.LeWM(cfg)).eval()
    model.action_stats.copy_(torch.tensor([[0.0], [2], [-5], [5]]))

    def played(starts, seed=0):
        goals = [Dot(31 - start, None).render() for start in starts]
        worlds = [Dot(start, goal=start + 4) for start in starts]       # ends whenever it comes by there
        return lewm.play(worlds, lewm.Planner(model, goals, seed=seed), budget=20)[0]

    few, many = played([3, 12]), played([3, 12, 20, 27])
    assert all(np.array_equal(a, b) for a, b in zip(few, many)), "in company the first two went another way"
    assert not np.array_equal(few[0], played([3], seed=1)[0]), "another seed, another plan"


def test_the_world_stops_an_episode_at_its_goal_and_all_of_them_at_the_budget_in_planning():
    """Catches a world that is played on after its goal, and a last plan that is played beyond the budget."""
    asked, worlds = [], [Dot(0, goal=4), Dot(0, goal=100)]

    def three_steps_to_the_right(running, environments):
        assert environments is worlds
        asked.append(running.tolist())
        return np.ones((len(running), 3, 1))

    histories, reached = lewm.play(worlds, three_steps_to_the_right, budget=8)
    assert asked == [[0, 1], [0, 1], [1]] and reached.tolist() == [True, False]
    assert histories[0].tolist() == [[1], [2], [3], [4]] and worlds[0].place == 4
    assert histories[1].shape == (8, 1) and worlds[1].place == 8


def test_planning_in_another_world_needs_this_one_file(tmp_path):
    """Catches a planner, or a training on pictures, that cannot do without pusht.py."""
    script = "import sys\nimport numpy as np\nimport lewm\n\n\n" + inspect.getsource(Dot) + """
cfg = lewm.Config.preset("smoke", action_dim=1, frame_skip=2, steps=2, candidates=5, elites=2, iterations=1)
rng = np.random.default_rng(0)
data = {"pixels": np.stack([Dot(place, None).render() for place in rng.uniform(0, 31, 90)]),
        "action": rng.normal(size=(90, 1)), "ep_len": np.full(3, 30), "ep_offset": 30 * np.arange(3)}
model = lewm.train(cfg, data, device="cpu")
planner = lewm.Planner(model, [Dot(20, None).render()])
histories, reached = lewm.play([Dot(3, goal=1000)], planner, budget=5)
print(histories[0].shape, reached, sorted({"pusht", "pymunk", "matplotlib"} & set(sys.modules)))
"""
    (project(tmp_path) / "mine.py").write_text(script)
    ended = run_python("mine.py", cwd=tmp_path)
    assert ended.stdout.endswith("\n(5, 1) [False] []\n"), ended.stdout + ended.stderr


def test_the_readmes_other_world_is_recorded_trained_and_planned_in_with_this_one_file(tmp_path):
    """Catches Push-T in the training or the planner, and an example that does not run as it stands."""
    blocks = re.findall(r"```python\n(.*?)```", (HERE / "README.md").read_text(encoding="utf-8"), re.S)
    script, = [block for block in blocks if "class TwoRoom" in block]
    assert script.count("\n") <= 60 and script.count("steps=600") == 1 and script.count("[:100]") == 1
    script = script.replace("steps=600", "steps=2").replace("[:100]", "[:3]")
    (project(tmp_path) / "tworoom.py").write_text(script, encoding="utf-8")
    ended = run_python("tworoom.py", cwd=tmp_path)
    rows = [line.split("%")[0].split() for line in ended.stdout.splitlines() if "interval" in line]
    names = ["LeWM + CEM", "random", "nothing", "recorded"]
    assert [" ".join(row[:-1]) for row in rows] == names, ended.stdout + ended.stderr
    assert rows[2][-1] == "0" and rows[3][-1] == "3", "nothing reaches no goal, recorded actions reach all"


def test_importing_the_file_does_nothing_and_needs_no_push_t(tmp_path):
    """Catches work at import, and a file that cannot be copied into another project alone."""
    code = "import sys, lewm; print(sorted({'pusht', 'pymunk', 'matplotlib'} & set(sys.modules)))"
    ended = run_python("-c", code, cwd=project(tmp_path))
    assert ended.returncode == 0 and ended.stdout.strip() == "[]" and not ended.stderr, ended.stderr


# ======== 1 Config ====================================================================================

def test_config_takes_numpys_numbers_and_stores_plain_ones():
    """Catches a checkpoint that holds NumPy objects, which a loader that executes nothing refuses."""
    cfg = tiny(steps=np.int64(7), lr=np.float32(0.5), held_out=np.float64(0.25), whiten=np.True_, dropout=0)
    assert (cfg.steps, cfg.lr, cfg.held_out, cfg.whiten, cfg.dropout) == (7, 0.5, 0.25, True, 0.0)
    for field in dataclasses.fields(cfg):
        assert type(getattr(cfg, field.name)) is field.type, field.name


@pytest.mark.parametrize("changes, words", [
    ({"compile": "no"}, "compile is 'no'"), ({"compile": 1}, "compile is 1"),
    ({"steps": 2.0}, "steps is 2.0"), ({"steps": "8"}, "steps is '8'"), ({"knots": 1}, "knots is 1"),
    ({"lr": math.nan}, "lr is nan"), ({"lr": math.inf}, "lr is inf"), ({"dropout": 1.0}, "dropout is 1.0"),
    ({"image_size": 30}, "image_size 30 is not a multiple"), ({"seed": 10**6}, "seed is 1000000"),
    ({"Lr": 5}, "no field Lr"),
    ({"candidate": 5}, "no field candidate; the nearest is .*candidates")])
def test_config_refuses_what_is_impossible_and_names_it(changes, words):
    """Catches text that counts as true, settings that fail later or not at all, and a typo that changes
    nothing."""
    with pytest.raises(ValueError, match=words) as caught:
        tiny(**changes)
    assert "\n" not in str(caught.value)


# ======== 10 Checkpoints ==============================================================================

def test_a_checkpoint_loads_in_a_fresh_process_with_the_same_outputs(tmp_path):
    """Catches weights that are not saved, and key names with a compiler's prefix."""
    torch.manual_seed(0)
    model = awake(lewm.LeWM(tiny())).eval()
    lewm.save_checkpoint(tmp_path / "c.pt", model)
    code = ("import torch, lewm; model, cfg, _ = lewm.load_checkpoint('c.pt'); "
            "g = torch.Generator().manual_seed(0); x = torch.randn(1, 2, 3, 32, 32, generator=g); "
            "print(model.encode(x).double().sum().item())")
    ended = run_python("-c", code, cwd=project(tmp_path))
    expected = model.encode(noise(1, 2, 3, 32, 32)).double().sum().item()
    assert float(ended.stdout) == pytest.approx(expected, abs=1e-5)


class Trap:
    def __reduce__(self):
        return (os.system, ("touch trap-was-sprung",))


def test_damaged_and_foreign_checkpoints_are_refused_and_never_executed(tmp_path, monkeypatch):
    """Catches torch.load without weights_only, and half a file that loads as half a model."""
    monkeypatch.chdir(tmp_path)
    lewm.save_checkpoint("good.pt", lewm.LeWM(tiny()))
    good = Path("good.pt").read_bytes()
    Path("half.pt").write_bytes(good[:len(good) // 2])
    Path("empty.pt").write_bytes(b"")
    Path("text.pt").write_text("hello")
    torch.save({"weights": torch.zeros(3)}, "foreign.pt")
    torch.save([1, 2], "list.pt")
    torch.save({"config": Trap()}, "trap.pt")
    content = torch.load("good.pt", weights_only=True)
    torch.save({**content, "config": {**content["config"], "embed_dim": 17}}, "misfit.pt")
    torch.save({**content, "config": {**content["config"], "new_field": 1}}, "newer.pt")
    torch.save({"config": {}}, "hollow.pt")
    torch.save(torch.nn.Linear(2, 2), "module.pt")
    Path("bare.pt").write_bytes(pickle.dumps({"weights": Trap()}))
    flipped = bytearray(good)
    flipped[len(flipped) // 2] ^= 255                       # one byte of a weight
    Path("flipped.pt").write_bytes(flipped)
    unsafe, foreign = "would run code.*refused", "no checkpoint of this version"
    reasons = {"half.pt": unsafe, "empty.pt": unsafe, "text.pt": unsafe, "trap.pt": unsafe,
               "module.pt": unsafe, "bare.pt": unsafe, "flipped.pt": "wrong checksum",
               "list.pt": "no dictionary", "foreign.pt": foreign, "misfit.pt": foreign, "newer.pt": foreign,
               "hollow.pt": foreign}
    for name, words in reasons.items():
        with pytest.raises(ValueError, match=f"{name}.*{words}") as caught:
            lewm.load_checkpoint(name)
        assert "\n" not in str(caught.value), str(caught.value)
    assert not Path("trap-was-sprung").exists(), "loading a checkpoint executed code in it"
    with pytest.raises(FileNotFoundError, match="--train"):
        lewm.load_checkpoint("missing.pt")


@pytest.mark.parametrize("error", [
    OSError(28, "No space left on device"), RuntimeError("PytorchStreamWriter failed\nwriting the file")],
    ids=["OSError", "RuntimeError"])
def test_a_write_that_dies_leaves_the_old_file(tmp_path, monkeypatch, error):
    """Catches checkpoints written in place: a kill in the middle would lose both the old and the new one."""
    path, model = tmp_path / "c.pt", lewm.LeWM(tiny())
    lewm.save_checkpoint(path, model)
    before = contents(tmp_path)

    def dies(state, file, *args, **kwargs):
        Path(file).write_bytes(b"half a file")
        raise error

    monkeypatch.setattr(torch, "save", dies)
    with pytest.raises(OSError, match="disk full") as caught:
        lewm.save_checkpoint(path, model)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    assert contents(tmp_path) == before, "the old file must be as it was, and the only one"


# ======== probe.py: The authors' weights ==============================================================
# What the authors' code answers when its weights are numbers that follow from their names (seed 1).

OFFICIAL_ENCODE = [                                         # first frame, first 8 numbers
    1.18324, 0.04966, -0.38597, 1.48278, 0.08722, 1.19622, -0.11769, -1.21076]
OFFICIAL_PREDICT = [                                        # after 3 frames
    -0.72220, 0.27340, -0.09558, 0.25573, 0.15269, -0.83470, 0.04648, -0.52153]
OFFICIAL_ROLLOUT = [                                        # first plan, after 5 blocks
    -1.00459, 0.02961, -1.25545, -0.11934, 0.73192, -0.01402, -0.51713, 0.05496]
OFFICIAL_COST = [1.43226, 1.46615, 1.49128, 1.36126]        # of four plans


def filled(name, shape):
    """float32 normals that depend on the name alone, of a size that keeps activations near 1."""
    rng = np.random.Generator(np.random.PCG64([zlib.crc32(name.encode()), 1]))
    x = rng.standard_normal(tuple(shape)).astype(np.float32)
    if name.endswith("num_batches_tracked"):
        return torch.tensor(0)
    if name.endswith("running_var"):
        x = 1 + 0.2 * np.abs(x)
    elif name.endswith("running_mean"):
        x = 0.1 * x
    elif "adaLN" in name:
        x = (0.05 if name.endswith("weight") else 0.3) * x
    elif name.endswith(("cls_token", "position_embeddings", "pos_embedding")):
        x = 0.5 * x
    elif "." in name and len(shape) >= 2:
        x = x / np.sqrt(np.prod(shape[1:]))
    elif "." in name:
        x = 1 + 0.1 * x if name.endswith("weight") else 0.05 * x
    return torch.tensor(x, dtype=torch.float32)


@pytest.fixture(scope="module")
def full_size_weights(tmp_path_factory):
    """A file in the authors' layout, full size, with those numbers: (its path, {name: tensor})."""
    path = tmp_path_factory.mktemp("official") / "weights.pt"
    probe.save_official(lewm.LeWM(lewm.Config()), path)
    layout = torch.load(path, weights_only=True)
    weights = {name: filled(name, tensor.shape) for name, tensor in layout.items()}
    torch.save(weights, path)
    return path, weights


def test_the_authors_weights_give_the_authors_numbers_under_all_their_names(full_size_weights):
    """Catches a wrong name, a swapped query and key, another norm, another history while planning: parity to
    1e-4."""
    path, weights = full_size_weights
    assert len(weights) == 303 and "predictor.transformer.layers.5.mlp.net.4.weight" in weights
    model = probe.load_official(path)
    pixels, goal = filled("pixels", (2, 3, 3, 224, 224))[:1], filled("goal", (1, 1, 3, 224, 224))
    blocks, plans = filled("actions", (2, 3, 10))[:1], filled("candidates", (1, 4, 5, 10))
    with torch.no_grad():
        z, z_goal = model.encode(pixels), model.encode(goal)
        z_hat, ends = model.predict(z, blocks), model.rollout(z[:, :1], plans)[:, :, -1]
    cost = (ends - z_goal).square().sum(-1)[0] / 100
    for name, ours, theirs in (("encode", z[0, 0, :8], OFFICIAL_ENCODE),
                               ("predict", z_hat[0, 2, :8], OFFICIAL_PREDICT),
                               ("rollout", ends[0, 0, :8], OFFICIAL_ROLLOUT), ("cost", cost, OFFICIAL_COST)):
        worst = np.abs(ours.numpy() - theirs).max()
        assert worst < 1e-4, f"{name}: {ours.numpy().round(5)}, the authors' code says {theirs}"


def test_the_authors_weights_become_a_checkpoint_and_come_back_exactly(full_size_weights, tmp_path):
    """Catches a command that leaves out a tensor or the statistics of actions, and a checkpoint of another
    size."""
    path, weights = full_size_weights
    probe.main(["--import", str(path), "--out", str(tmp_path / "c.pt")])
    model, cfg, _ = lewm.load_checkpoint(tmp_path / "c.pt")
    assert cfg == lewm.Config.preset("paper")
    stats = [[-0.0087, 0.0068], [0.2019, 0.2002], [-1, -1], [1, 1]]         # of the authors' Push-T data
    assert torch.allclose(model.action_stats, torch.tensor(stats))
    probe.main(["--export", str(tmp_path / "c.pt"), "--out", str(tmp_path / "back.pt")])
    back = torch.load(tmp_path / "back.pt", weights_only=True)
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[name], weights[name]) for name in back), "the round trip is not exact"


@pytest.mark.parametrize("prefix", ["", "model."])
@pytest.mark.parametrize("transformers, name", [
    (4, "encoder.encoder.layer.0.attention.attention.query.weight"),
    (5, "encoder.layers.0.attention.q_proj.weight")], ids=["transformers 4", "transformers 5"])
def test_the_authors_weights_are_read_with_both_libraries_names_and_both_prefixes(
        tmp_path, transformers, name, prefix):
    """Catches a name that one version of the library has and the other has not."""
    cfg = tiny(embed_dim=24, whiten=False)
    model = awake(lewm.LeWM(cfg))
    probe.save_official(model, tmp_path / "w.pt", transformers)
    weights = torch.load(tmp_path / "w.pt", weights_only=True)
    assert name in weights
    torch.save({prefix + key: value for key, value in weights.items()}, tmp_path / "w.pt")
    again = probe.load_official(tmp_path / "w.pt", cfg, model.action_stats)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values()))
    assert not again.training


def test_weights_that_do_not_fit_are_refused_with_a_full_list(tmp_path):
    """Catches loading with strict=False, and messages that name only the first problem."""
    cfg = tiny(embed_dim=24, whiten=False)
    probe.save_official(lewm.LeWM(cfg), tmp_path / "good.pt")
    weights = torch.load(tmp_path / "good.pt", weights_only=True)
    del weights["projector.net.0.bias"]
    weights.update({"pred_proj.net.3.bias": torch.zeros(5), "extra": torch.zeros(1)})
    torch.save(weights, tmp_path / "bad.pt")
    with pytest.raises(ValueError) as caught:
        probe.load_official(tmp_path / "bad.pt", cfg)
    for words in ("3 tensors", "missing: projector.net.0.bias [32]", "pred_proj.net.3.bias is [5], not [24]",
                  "unexpected: extra"):
        assert words in str(caught.value), str(caught.value)


def test_weights_without_a_place_in_the_authors_layout_are_refused(tmp_path):
    """Catches an export that silently leaves out the colours' statistics or the widening of embeddings."""
    for changes, words in ((dict(embed_dim=24, whiten=True), "colour statistics"),
                           (dict(embed_dim=16, whiten=False), "embed_dim must equal predictor_width")):
        with pytest.raises(ValueError, match=words):
            probe.save_official(lewm.LeWM(tiny(**changes)), tmp_path / "never.pt")
    assert not list(tmp_path.iterdir())


# ======== pusht.py: Data sets =========================================================================

def test_data_sets_survive_writing_and_reading(tmp_path, recorded):
    """Catches a lost column, an overwritten data set, and files that would run code."""
    for name in ("data.npz", "folder"):
        pusht.save(tmp_path / name, recorded)
        back = pusht.load(tmp_path / name)
        assert all(np.array_equal(back[column], recorded[column]) for column in recorded)
        with pytest.raises(FileExistsError):
            pusht.save(tmp_path / name, recorded)
    assert isinstance(pusht.load(tmp_path / "folder")["state"], np.memmap)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["data.npz", "folder"], "temporary files were left behind"
    (tmp_path / "broken.npz").write_bytes((tmp_path / "data.npz").read_bytes()[:1000])
    objects = np.array([{"a": 1}], dtype=object)
    np.savez(tmp_path / "code.npz", action=objects, ep_len=np.array([1]), state=np.zeros((1, 7)))
    np.savez(tmp_path / "poor.npz", action=np.zeros((5, 2)))
    for name, words in (("broken.npz", "damaged"), ("code.npz", "damaged"), ("poor.npz", "lacks ep_len"),
                        ("none", "make some")):
        with pytest.raises((ValueError, FileNotFoundError), match=words):
            pusht.load(tmp_path / name)


def test_data_sets_with_absolute_targets_are_refused(tmp_path, recorded):
    """Catches the original Push-T's actions, places up to 512, which would be clipped to the board's
    corner."""
    target = recorded["state"][:, :2] + 100 * recorded["action"]
    pusht.save(tmp_path / "absolute.npz", {**recorded, "action": target})
    with pytest.raises(ValueError, match=r"absolute.npz has actions up to \d{3}.*\(target - agent\) / 100"):
        pusht.load(tmp_path / "absolute.npz")


def write_hdf5(path, columns, **compression):
    h5py = pytest.importorskip("h5py", reason="reading HDF5 is optional: pip install h5py hdf5plugin")
    pytest.importorskip("hdf5plugin", reason="reading HDF5 is optional: pip install h5py hdf5plugin")
    with h5py.File(path, "w") as file:
        for name, values in columns.items():
            more = compression if name == "pixels" else {}
            file.create_dataset(name, data=values, **more)


@pytest.fixture(scope="module")
def authors_columns(recorded):
    """The recorded episodes in the authors' layout: pictures, and NaN actions where an episode ends."""
    actions = with_nan(recorded["action"], np.cumsum(recorded["ep_len"]) - 1)
    pixels = pusht.render(recorded["state"], 32).permute(0, 2, 3, 1).numpy()
    return {"pixels": pixels, "action": actions, "state": recorded["state"],
            "proprio": recorded["state"][:, [0, 1, 5, 6]],
            "ep_len": recorded["ep_len"], "ep_offset": recorded["ep_offset"]}


def test_the_authors_hdf5_files_of_data_become_folders_in_both_layouts_also_after_a_kill(
        tmp_path, recorded, authors_columns):
    """Catches rows out of place, compressed pictures that cannot be read, NaN actions that break training, or
    an import that keeps half a chunk."""
    hdf5plugin = pytest.importorskip("hdf5plugin", reason="optional: pip install h5py hdf5plugin")
    lengths = recorded["ep_len"]
    indices = {name: authors_columns[name] for name in ("pixels", "action", "state", "proprio")}
    indices["episode_idx"] = np.repeat(np.arange(len(lengths)), lengths)
    indices["step_idx"] = np.concatenate([np.arange(length) for length in lengths])
    write_hdf5(tmp_path / "offsets.h5", authors_columns)
    write_hdf5(tmp_path / "indices.h5", indices, chunks=(50, 32, 32, 3), **hdf5plugin.Blosc())
    (tmp_path / "indices.partial").mkdir()                  # what SIGKILL leaves behind
    (tmp_path / "indices.partial/pixels.npy").write_bytes(b"half a file")
    for name in ("offsets", "indices"):
        counts = pusht.import_hdf5(tmp_path / f"{name}.h5", tmp_path / name, chunk=100)
        assert counts == (len(lengths), len(recorded["action"]))
        data = pusht.load(tmp_path / name)
        for column in (*recorded, "pixels"):
            assert np.array_equal(data[column], authors_columns[column], equal_nan=column == "action"), column
    lewm.train(tiny(steps=2), data, device="cpu")


def test_an_import_of_hdf5_data_that_fails_leaves_nothing_behind_and_can_be_repeated(
        tmp_path, authors_columns, monkeypatch):
    """Catches half a data set that looks like a whole one, and files of an earlier, killed import in this
    one."""
    write_hdf5(tmp_path / "source.h5", authors_columns)
    out = tmp_path / "out"

    def stops_in_the_third_chunk(starts, *args, **kwargs):
        for count, start in enumerate(starts):
            if count == 2:
                raise error
            yield start

    for error in (KeyboardInterrupt(), OSError(28, "No space left on device")):
        with monkeypatch.context() as patch:
            patch.setattr(pusht, "tqdm", stops_in_the_third_chunk)
            with pytest.raises(type(error)):
                pusht.import_hdf5(tmp_path / "source.h5", out, chunk=100)
        assert [path.name for path in tmp_path.iterdir()] == ["source.h5"]
    killed = tmp_path / "out.partial"                       # SIGKILL cannot tidy up
    killed.mkdir()
    np.save(killed / "lesson.npy", np.zeros(3))
    pusht.import_hdf5(tmp_path / "source.h5", out, chunk=100)
    assert set(pusht.load(out)) == {"pixels", "action", "state", "ep_len", "ep_offset"}
    assert {path.name for path in tmp_path.iterdir()} == {"source.h5", "out"}


def test_the_import_of_hdf5_data_refuses_what_it_cannot_read_or_store(tmp_path, authors_columns, monkeypatch):
    """Catches a file that was cut short, episodes in pieces, and a full disk that is noticed after an
    hour."""
    write_hdf5(tmp_path / "good.h5", authors_columns)
    (tmp_path / "half.h5").write_bytes((tmp_path / "good.h5").read_bytes()[:50_000])
    some = {name: authors_columns[name][:90] for name in ("pixels", "action")}
    write_hdf5(tmp_path / "wrong.h5", some)
    mixed = {**some, "episode_idx": np.arange(90) % 2, "step_idx": np.arange(90) // 2}
    write_hdf5(tmp_path / "mixed.h5", mixed)
    backwards = {**some, "episode_idx": np.zeros(90, int), "step_idx": np.arange(90)[::-1]}
    write_hdf5(tmp_path / "backwards.h5", backwards)
    no_frames = {name: authors_columns[name] for name in ("action", "ep_len", "ep_offset")}
    write_hdf5(tmp_path / "poor.h5", no_frames)
    (tmp_path / "taken").mkdir()
    for name, out, words in (("half", "new", "half.h5 is .*damaged, cut short"), ("wrong", "new", "wrong.h5"),
                             ("mixed", "new", "must lie together"), ("backwards", "new", "in the order of"),
                             ("poor", "new", "lacks state"),
                             ("none", "new", "none.h5 is not there"), ("good", "taken", "exists already")):
        with pytest.raises((ValueError, OSError), match=words) as caught:
            pusht.import_hdf5(tmp_path / f"{name}.h5", tmp_path / out)
        assert "\n" not in str(caught.value)

    little = shutil.disk_usage(tmp_path)._replace(free=1_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: little)
    with pytest.raises(OSError, match=r"new needs 0.0 GB, its disk has 0.0 GB left"):
        pusht.import_hdf5(tmp_path / "good.h5", tmp_path / "new")
    assert not list(tmp_path.glob("new*")), "nothing may be written before the space is known to be there"


def test_recording_into_what_exists_is_refused_at_once_in_data(tmp_path, capsys):
    """Catches minutes of recording before the refusal, and a picture refused for an --out it does not use."""
    argv = ["--episodes", "1000000", "--out", str(tmp_path)]
    with pytest.raises(SystemExit, match="exists already"):
        pusht.main(argv)
    assert pusht.parse_arguments(["--show", "a.gif", "--out", str(tmp_path)]).show == "a.gif"


# ======== pusht.py: The world =========================================================================
# A trajectory of the reference Push-T (pymunk 7.3.1): the agent pushes and turns the block from step 5 on.

REFERENCE_START = [214.358267, 366.055692, 221.756585, 228.79937, 5.926156, 0.0, 0.0]
REFERENCE_ACTIONS = np.array([
    -0.149, -0.274,  0.046, -0.145,  0.12, -0.146,  0.103, -0.289,  0.061, -0.281,  0.114, -0.347,
    -0.005, -0.211,  -0.129, 0.168,  0.16, -0.079,  0.113, -0.211,  0.248, 0.022,  -0.126, -0.024,
    0.226, -0.174,  0.39, -0.107,  0.117, -0.236,  -0.089, 0.022,  0.326, -0.086,  0.098, -0.285,
    0.223, -0.348,  0.169, -0.12,  -0.033, -0.497,  -0.429, -0.094,  -0.28, -0.102,  -0.393, 0.09,
    -0.267, -0.099,  -0.336, -0.357,
]).reshape(-1, 2)
REFERENCE_AFTER = {
    10: [230.773599, 294.539292, 228.951782, 225.576807, 5.814101, 41.884367, -78.748763],
    20: [294.531662, 239.141323, 281.63769, 184.241672, 5.503515, 62.6858, -44.049152],
    26: [229.390038, 198.702069, 288.455671, 142.825106, 5.85723, -125.065335, -133.326554],
}


def test_the_world_follows_the_reference_trajectory():
    """Catches a changed constant, integration order, moment of inertia or pymunk version."""
    env = pusht.PushT()
    env.reset(options={"state": REFERENCE_START})
    for step, action in enumerate(REFERENCE_ACTIONS, start=1):
        state = env.step(action)[0]
        if step in REFERENCE_AFTER:
            worst = np.abs(state - REFERENCE_AFTER[step]).max()
            assert worst < 1e-3, f"after {step} steps off by {worst:.2g}, expected below 1e-3"


def test_setting_the_state_that_was_read_changes_nothing():
    """Catches a setter that goes through pymunk's centre of gravity and comes back with other last digits."""
    twins = [pusht.PushT(), pusht.PushT()]
    for env in twins:
        env.reset(options={"state": REFERENCE_START})
    for action in REFERENCE_ACTIONS:
        before = twins[0].state
        twins[0].state = before
        assert np.array_equal(twins[0].state, before)
        a, b = (env.step(action)[0] for env in twins)
        assert np.array_equal(a, b), "the twin that was set to its own state went another way"


def test_what_follows_depends_on_the_state_that_was_set_and_not_on_the_past():
    """Catches contacts or velocities of an earlier episode that survive in the physics engine."""
    used, fresh = pusht.PushT(), pusht.PushT()
    used.reset(options={"state": REFERENCE_START})
    for action in REFERENCE_ACTIONS[:12]:
        used.step(action)
    middle = np.array(REFERENCE_AFTER[10])
    for env in (used, fresh):
        env.state = middle
    for action in REFERENCE_ACTIONS[10:]:
        assert np.array_equal(used.step(action)[0], fresh.step(action)[0])


def test_the_agent_cannot_leave_the_board():
    """Catches the reference's trap: relative targets drive the agent hundreds of pixels outside."""
    env, rng, places = pusht.PushT(), np.random.default_rng(0), []
    env.reset(seed=0)
    for t in range(400):
        action = rng.choice([-1.0, 1.0], 2) if t % 40 == 0 else np.sign(np.sin([t / 30, t / 47]))
        places.append(env.step(action)[0][:2])
    low, high = np.min(places), np.max(places)
    assert low >= -1e-6 and high <= 512 + 1e-6, f"went to {low:.1f} .. {high:.1f}, expected 0 .. 512"
    assert low < 1 and high > 511, "the test must reach the border to mean something"


def test_reset_and_step_have_gymnasiums_signatures():
    """Catches a swapped tuple, an ignored seed and an ignored goal."""
    env = pusht.PushT()
    first, second = env.reset(seed=3)[0], env.reset(seed=3)[0]
    assert np.array_equal(first, second) and not np.array_equal(first, env.reset(seed=4)[0])
    state, info = env.reset(options={"state": REFERENCE_START, "goal": REFERENCE_START})
    assert state.shape == (7,) and np.allclose(info["goal"], REFERENCE_START)
    state, reward, terminated, truncated, info = env.step(np.zeros(2))
    assert (reward, terminated, truncated) == (1.0, True, False), "standing on the goal is success"
    assert env.render(96).shape == (96, 96, 3) and env.render(96).dtype == np.uint8
    assert pusht.PushT(48).render().shape == (48, 48, 3)
    for wrong in ([0.0, np.nan], [0.1], [[0.1, 0.2]]):
        with pytest.raises(ValueError, match="2 finite numbers"):
            env.step(wrong)
    with pytest.raises(ValueError, match="7 finite numbers"):
        env.state = [1, 2, 3]


def test_success_counts_agent_and_block_together_and_turns_on_the_circle():
    """Catches a rule on the block alone and an angle difference that breaks at 2 pi."""
    goal = np.array([100.0, 100, 200, 200, 0.1, 0, 0])
    near, far = goal + [12, 0, 12, 0, 0, 0, 0], goal + [15, 0, 15, 0, 0, 0, 0]     # 17.0 px and 21.2 px
    turned = goal + [0, 0, 0, 0, 2 * np.pi - 0.2, 0, 0]     # 0.2 rad the other way
    twisted = goal + [0, 0, 0, 0, 0.36, 0, 0]               # 20.6 degrees
    together = pusht.success(np.stack([near, far, turned, twisted]), goal)
    assert together.tolist() == [True, False, True, False]
    assert pusht.success(np.stack([far, twisted]), goal, object_only=True).tolist() == [True, False]


# ======== pusht.py: Pictures ==========================================================================

def test_pictures_match_the_reference():
    """Catches a shifted, mirrored or recoloured drawing. Values read off a reference frame at 224 px, (row,
    column): RGB."""
    state = [231.4928, 344.6232, 203.0655, 331.7839, 1.959295, 0, 0]
    frame = pusht.render(np.array([state]), 224)[0].permute(1, 2, 0).numpy().astype(float)
    pixels = {(112, 2): (211, 211, 211), (140, 60): (119, 136, 153), (118, 85): (119, 136, 153),
              (151, 101): (78, 126, 255), (125, 41): (122, 139, 157), (200, 200): (255, 255, 255)}
    for place, colour in pixels.items():
        fine = np.abs(frame[place] - colour).max() < 25
        assert fine, f"pixel {place} is {frame[place]}, expected {colour}"
    mean, std = frame.mean((0, 1)), frame.std((0, 1))
    assert np.abs(mean - [247.40, 249.60, 248.94]).max() < 0.3, "expected the reference's mean colour"
    assert np.abs(std - [26.58, 19.69, 20.67]).max() < 0.6, "expected the reference's spread of colour"


def test_a_picture_is_the_same_alone_and_in_a_batch(recorded):
    """Catches state leaking between rows and windows that are cut off at the border."""
    states = torch.from_numpy(recorded["state"][::40]).clone()
    states[0, :2], states[1, 2:4] = torch.tensor([3.0, 509.0]), torch.tensor([470.0, 480.0])
    batch = pusht.render(states, 64)
    assert all(torch.equal(batch[i], pusht.render(states[i:i + 1], 64)[0]) for i in range(len(states)))
    red = pusht.render(states, 64, block_colour=(200, 0, 0))
    changed = (red != batch).any(1).float().mean().item()
    assert 0.02 < changed < 0.12, f"another colour changes {changed:.1%} of the pixels, expected the block's"


# ======== pusht.py: The scripted policy ===============================================================

LAST_AGENT_X = {                                            # seed: of its first eight episodes, in px
    3072: [395.144, 424.637, 169.358, 110.993, 253.258, 255.771, 152.281, 154.630],
    1_000_000: [229.569, 275.988, 180.114, 374.748, 225.302, 263.512, 275.814, 309.227],
    2_000_000: [245.389, 121.308, 188.281, 214.754, 332.510, 369.720, 256.862, 212.014]}


def test_the_scripted_policy_is_the_one_of_the_published_figures():
    """Catches a change of the policy, however small: every published figure belongs to these episodes."""
    states, actions = pusht._episode(3072, 0)
    assert states.shape == (102, 7) and states.dtype == actions.dtype == np.float32
    assert np.allclose(states[20], [312.876, 245.389, 237.853, 245.117, 6.1755, -71.295, -62.054], atol=0.01)
    assert np.allclose(states[-1], [395.144, 199.519, 262.063, 157.455, 5.2835, 92.319, -175.728], atol=0.01)
    assert np.allclose(actions.mean(0), [0.0500, -0.0597], atol=1e-3)
    for seed, places in LAST_AGENT_X.items():
        episodes = [pusht._episode(seed, index)[0] for index in range(8)]
        assert np.allclose([states[-1, 0] for states in episodes], places, atol=0.01), f"seed {seed}"


def test_scripted_episodes_depend_on_seed_and_index_alone(recorded):
    """Catches random numbers drawn from a shared generator: results that change with the number of
    processes."""
    more = pusht.collect(60, seed=5, workers=2)
    assert np.array_equal(more["state"][:len(recorded["state"])], recorded["state"])
    assert not np.array_equal(pusht.collect(1, seed=6)["state"][:49], recorded["state"][:49])
    assert pusht.collect(60, seed=5, workers=1)["action"].tobytes() == more["action"].tobytes()


def test_scripted_episodes_push_the_block_and_keep_it_on_the_board():
    """Catches a policy that jitters, loses the block at a wall or moves at another scale than the one that
    `nano` was measured with."""
    data = pusht.collect(60, seed=11)
    states, lengths, std = data["state"], data["ep_len"], data["action"].std(0)
    assert lengths.min() >= 49 and lengths.max() <= 246 and 105 < lengths.mean() < 145
    fine = (abs(std - 0.26) < 0.04).all()
    assert fine, f"action std {std}, expected near 0.26 (the authors' data: 0.20)"
    assert states[:, :4].min() > 15 and states[:, :4].max() < 497, "something left the board"
    spread = states[:, 2:4].std(0)
    assert spread.max() < 65, f"block position std {spread}, expected 55 as in the data of the authors"
    rows = np.concatenate([np.arange(first, first + 24, 6) for first in data["ep_offset"]])
    moved = (pusht.distances(states[rows], states[rows + 25])[1] > 5).mean()
    assert moved > 0.6, f"the block moves in {moved:.0%} of 25-step windows, expected most"


def test_recorded_actions_lead_to_the_recorded_states(recorded):
    """Catches action[t] stored beside state[t + 1]."""
    env, first = pusht.PushT(), slice(0, recorded["ep_len"][0])
    states, actions = recorded["state"][first], recorded["action"][first]
    env.reset(options={"state": states[0]})
    worst = max(np.abs(env.step(actions[t])[0][:2] - states[t + 1][:2]).max() for t in range(20))
    assert worst < 0.01, f"replaying 20 actions misses by {worst:.3f} px, expected below 0.01"


def test_lessons_begin_with_the_block_near_the_middle_and_go_on_with_ordinary_episodes():
    """Catches lessons in the wrong order or of one kind, and ordinary episodes that are not those of
    `collect`."""
    lessons, ordinary = pusht.collect_lessons(30, seed=7, workers=1), pusht.collect(30, seed=7, workers=1)
    assert lessons["lesson"].tolist() == [0] * 8 + [1] * 30
    first_row = lessons["ep_offset"][8]
    for column in ("state", "action"):
        assert np.array_equal(lessons[column][first_row:], ordinary[column])
    assert np.array_equal(lessons["ep_len"][8:], ordinary["ep_len"])
    assert np.array_equal(lessons["ep_offset"], np.cumsum(lessons["ep_len"]) - lessons["ep_len"])
    states = lessons["state"][lessons["ep_offset"]].astype(float)           # at the start of each episode
    centres = pusht.centre(states[:, 2] + 1j * states[:, 3], np.exp(1j * states[:, 4]))
    away = np.abs(centres - complex(256, 256))
    narrow, wide = np.median(away[:8]), np.median(away[8:])
    assert narrow < 25 < wide, f"{narrow:.0f} and {wide:.0f} px from the middle, expected about 12 and 47"


GUARDLESS = """
import multiprocessing
import pusht
spawn = multiprocessing.get_context("spawn")                # as on Windows and macOS
multiprocessing.get_context = lambda method=None: spawn
pusht.collect(60, workers=2)
"""


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="needs /proc to see processes")
def test_recording_that_is_killed_leaves_no_process_and_no_file_behind(tmp_path):
    """Catches workers that wait for ever for a parent that is gone."""
    def lives(process):
        with contextlib.suppress(OSError):
            return bool(Path(f"/proc/{process}/cmdline").read_bytes())      # empty of a zombie

    command = [sys.executable, HERE / "pusht.py", "--episodes", "9999", "--workers", "2", "--out", "data"]
    recording = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.DEVNULL)
    children, ends = Path(f"/proc/{recording.pid}/task/{recording.pid}/children"), time.time() + 60
    while time.time() < ends and len(workers := children.read_text().split()) < 2:
        time.sleep(0.1)
    time.sleep(1)
    recording.kill()
    recording.wait()
    while time.time() < ends and any(map(lives, workers)):
        time.sleep(0.1)
    assert len(workers) == 2 and time.time() < ends and not list(tmp_path.iterdir())


def test_recording_in_a_script_without_a_main_guard_says_what_is_missing(tmp_path):
    """Catches a pool that starts processes which start processes, and never ends."""
    (project(tmp_path, "pusht.py") / "script.py").write_text(GUARDLESS)
    ended = run_python("script.py", cwd=tmp_path)
    last_line = ended.stderr.splitlines()[-1]
    assert ended.returncode != 0 and 'if __name__ == "__main__":' in last_line, ended.stderr


# ======== pusht.py: Evaluation ========================================================================

def test_held_out_pairs_are_unsolved_and_replaying_their_actions_solves_them():
    """Catches pairs that are won by doing nothing, and starts and goals from different episodes."""
    starts, goals, actions = pusht.held_out_pairs(20, "dev", seed=3)
    assert not pusht.success(starts, goals).any()
    same = np.array_equal(starts[:5], pusht.held_out_pairs(5, "dev", seed=3)[0])
    assert same, "the first pairs must not depend on how many there are"
    assert not np.array_equal(starts, pusht.held_out_pairs(20, "test", seed=3)[0])
    replay = pusht.baselines(actions, 25, np.ones((4, 2)))["recorded actions"]
    histories, reached = lewm.play(pusht.environments(starts, goals, 8), replay, 25)
    won = [pusht.success(states[-1], goal) for states, goal in zip(histories, goals)]
    assert sum(won) >= 19 and reached.tolist() == won


def test_what_is_judged_comes_from_seeds_that_training_cannot_take(monkeypatch):
    """Catches held-out pairs and probes from training episodes: training seeds end at 1,000,000."""
    episode, seeds = pusht._episode, set()

    def spy(seed, *args, **kwargs):
        seeds.add(seed)
        return episode(seed, *args, **kwargs)

    monkeypatch.setattr(pusht, "_episode", spy)
    for split in ("dev", "test"):
        pusht.held_out_pairs(1, split)
    probe.trajectories(2, tiny())
    assert len(seeds) == 3 and min(seeds) >= 1_000_000, f"episodes came from seeds {sorted(seeds)}"
    with pytest.raises(ValueError, match="split"):
        pusht.held_out_pairs(1, "train")


def test_the_wilson_interval_has_known_values():
    """Catches the normal approximation, which promises 100 % +- 0 for 50 of 50. Values from the
    literature."""
    known = {(48, 50): (0.8654, 0.9890), (50, 50): (0.9287, 1.0), (0, 100): (0.0, 0.0370)}
    for (successes, n), expected in known.items():
        assert np.allclose(pusht.wilson(successes, n), expected, atol=2e-4)


def test_evaluation_gives_the_same_pairs_the_same_outcome_in_any_company(tmp_path, monkeypatch):
    """Catches pairs, noise or pictures that depend on how many episodes are evaluated; and baselines that are
    not played."""
    torch.manual_seed(0)
    model = awake(lewm.LeWM(tiny())).eval()
    cfg = tiny(candidates=10, iterations=2, elites=3, budget=10, horizon=2, replan=1)
    play, played = lewm.play, []

    def spy(*args, **kwargs):
        played.append(play(*args, **kwargs))
        return played[-1]

    monkeypatch.setattr(lewm, "play", spy)
    for n in (2, 4):
        result = pusht.evaluate(model, cfg, pusht.held_out_pairs(n, "dev"), gif=tmp_path / f"{n}.gif")
    names = ["LeWM + CEM", "random actions", "doing nothing", "recorded actions"]
    assert list(json.loads(json.dumps(result))["policies"]) == names and len(played) == 8
    for name, (two, _), (four, _) in zip(names, played[:4], played[4:]):
        same = all(np.array_equal(a, b) for a, b in zip(two, four))
        assert same, f"{name}: the first two episodes went another way in company"
    assert (tmp_path / "4.gif").stat().st_size > 1000


STEP_STATS = np.array([[0.5, -0.2], [0.1, 0.3], [0.3, -0.8], [0.7, 0.4]])      # bounds: 2 std from the mean


def is_near(states, goals, object_only=False):
    return np.linalg.norm(states - goals, axis=-1) < 0.5


def as_pictures(states, size=4):
    """states (n,2) -> uint8 (n,3,4,4), pictures whose first eight bytes are those of the two numbers."""
    pixels = torch.zeros(len(states), 48, dtype=torch.uint8)
    pixels[:, :8] = torch.tensor(np.asarray(states, np.float32)).view(torch.uint8)
    return pixels.view(-1, 3, 4, 4)


class Walker:
    """In the place of Push-T: a point that moves by z-scored actions."""

    def __init__(self, size):
        self.state = self.goal = None

    def reset(self, options):
        self.state, self.goal = options["state"], options["goal"]

    def step(self, action):
        self.state = self.state + (action - STEP_STATS[0]) / STEP_STATS[1]
        return self.state, 0.0, bool(is_near(self.state, self.goal)), False, {}

    def render(self):
        return as_pictures(self.state[None])[0].permute(1, 2, 0).numpy()


class Reader(Adder):
    """Knows that world exactly: an embedding is the state in the picture."""

    def encode(self, pixels):
        return pixels.flatten(-3)[..., :8].contiguous().view(torch.float32)


def test_evaluation_plays_plans_in_the_worlds_units_towards_each_episodes_own_goal(monkeypatch):
    """Catches plans that are played z-scored, goals of another episode or of the start, and a baseline that
    is not played."""
    stand_ins = {"PushT": Walker, "render": as_pictures, "success": is_near,
                 "distances": lambda a, b: [np.linalg.norm(a - b, axis=-1)] * 3}
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(pusht, name, stand_in)
    starts = np.array([[0.0, 0], [1, 1], [2, -1], [-1, 3]])
    steps = np.array([[1.0, 0], [-1.5, 1.5], [1.5, 1.5], [1.5, -1.5]])
    goals = starts + [[1], [6], [6], [6]] * steps           # the first is reached long before the others
    recorded = (steps * STEP_STATS[1] + STEP_STATS[0])[:, None].repeat(6, 1)
    cfg = tiny(image_size=4, patch_size=4, embed_dim=2, frame_skip=1, horizon=3, replan=3, budget=6,
               candidates=100, iterations=10, elites=10)
    model = Reader(cfg)
    model.action_stats.copy_(torch.from_numpy(STEP_STATS))
    result = pusht.evaluate(model, cfg, (starts, goals, recorded))
    won = {name: row["success"] for name, row in result["policies"].items()}
    assert won["LeWM + CEM"] == won["recorded actions"] == 1, won
    assert won["random actions"] < 1 and won["doing nothing"] == 0, won


# ======== probe.py: Probes ============================================================================

def random_states(count, low, high):
    """float64 (count,7) with places in [low, high] px and any angle."""
    states = np.random.default_rng(0).uniform(low, high, (count, 7))
    states[:, 4] = np.random.default_rng(1).uniform(0, 2 * np.pi, count)
    return states


def held(model, **columns):
    """A probe.Held of which only the given columns are there."""
    empty = dict.fromkeys(("states", "actions", "blocks", "pixels", "z", "untrained"))
    return probe.Held(model.eval(), **{**empty, **columns})


def test_probes_have_known_answers():
    """Catches a probe that cannot fit a linear map, and a score in the wrong unit."""
    states = random_states(600, 50, 450)
    truth = probe.probe_targets(states)
    code = ((truth - truth.mean(0)) / truth.std(0)) @ noise(6, 12, seed=2)
    random_code = noise(600, 12, seed=3)
    for fit in (probe.fit_linear, probe.fit_mlp):
        known, unknown = (probe.score(fit(x[:400], truth[:400])(x[400:]), truth[400:])
                          for x in (code, random_code))
        for group in probe.GROUPS:
            assert known[group]["r"] > 0.99 and abs(unknown[group]["r"]) < 0.25
    moved = states + [3, 4, 0, 0, 0.1, 0, 0]
    answer = probe.score(probe.probe_targets(moved), truth)
    assert answer["agent"]["error"] == pytest.approx(5)
    assert answer["angle"]["error"] == pytest.approx(math.degrees(0.1), rel=1e-3)


def test_probes_are_judged_on_episodes_that_they_were_not_fitted_on():
    """Catches a probe that peeks: nothing can be read off noise, except by heart. The intervals must say so
    too."""
    E, D, T = 12, 64, probe.CONTEXT + probe.AHEAD
    z = noise(E, T, D)
    states = np.random.default_rng(0).uniform(60, 450, (E, T, 7)).astype(np.float32)
    nothing = held(Adder(tiny(embed_dim=D)), z=z, untrained=z, states=states, blocks=torch.zeros(E, T - 1, D),
                   pixels=random_pictures(E, T, 3, 8, 8), steps=2)
    result, _ = probe.probes(nothing)
    for row in result["LeWM, linear"].values():
        low, high = row["r_interval"]
        assert abs(row["r"]) < 0.35 and low < row["r"] < high and low < 0.1


def test_an_untrained_model_has_new_weights_and_the_statistics_of_the_trained_one():
    """Catches a comparison of a model with itself, or with one that sees other colours."""
    model = lewm.LeWM(tiny(whiten=True))
    for name in ("picture_mean", "colour_map", "action_stats"):
        getattr(model, name).copy_(noise(*getattr(model, name).shape))
    other = probe.untrained(model)
    assert not torch.equal(model.encoder.cls_token, other.encoder.cls_token) and not other.training
    for name in ("picture_mean", "colour_map", "action_stats"):
        assert torch.equal(getattr(model, name), getattr(other, name))


# ======== probe.py: Surprise ==========================================================================

def test_surprise_of_an_exact_model_is_zero_until_the_teleport():
    """Catches a prediction compared with the wrong frame: a toy world that adds its actions, moved at frame
    4."""
    model, blocks = Adder(tiny(embed_dim=4)).eval(), noise(3, 7, 10)
    z = torch.cat([torch.zeros(3, 1, 4), blocks[..., :4].cumsum(1)], 1)
    z[:, 4:] += 2.0
    surprise = probe.surprise(model, z, blocks)
    teleport = torch.full((3,), 16.0)                       # 4 dimensions are off by 2 at frame 4
    assert torch.allclose(surprise[:, 3], teleport, atol=1e-4)
    surprise[:, 3] = 0
    assert surprise.abs().max() < 1e-6


def test_paired_tests_and_roc_areas_have_known_values():
    """Catches a test that ignores the pairing and an area that counts ties wrongly."""
    base = np.random.default_rng(0).normal(0, 100, 40)
    shifted = probe.paired(base + 1, base)
    assert shifted["p"] < 0.001 and shifted["difference"] == pytest.approx(1)
    assert probe.paired(base + np.tile([1, -1], 20), base)["p"] > 0.5
    assert probe.paired(np.array([1.0, 2, 3]), np.zeros(3))["effect_size"] == pytest.approx(2)
    assert probe.roc_area([2, 3], [0, 1]) == 1
    assert probe.roc_area([1, 1], [1, 1]) == 0.5 and probe.roc_area([0], [1]) == 0


def test_teleported_episodes_are_the_same_until_the_moment():
    """Catches a disturbance that starts early, one that is not there, and a world that stands still after
    it."""
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
        env = pusht.PushT()
        env.reset(options={"state": moved[0, moment]})
        later = [env.step(action)[0] for action in actions[0, moment:].reshape(-1, 2)][4::5]
        assert np.allclose(later, moved[0, moment + 1:], atol=1e-3), "the recorded actions go on from there"


# ======== probe.py: Imagination and actions ===========================================================

def test_action_use_tells_true_actions_from_others():
    """Catches raw actions given to the model, and shuffled or zero ones that are the true ones."""
    model, T = Adder(tiny(embed_dim=4)), probe.CONTEXT + probe.AHEAD
    mean, std = torch.tensor([1.0, -1]), torch.tensor([2.0, 0.5])
    model.action_stats[:2] = torch.stack([mean, std])
    raw = noise(6, 5 * (T - 1), 2)
    scored = ((raw - mean) / std).view(6, T - 1, 10)
    z = torch.cat([torch.zeros(6, 1, 4), scored[..., :4].cumsum(1)], 1)
    errors, _ = probe.action_use(held(model, z=z, blocks=model.to_blocks(raw)))
    assert max(errors["true actions"]) < 1e-8 and min(errors["shuffled actions"]) > 0.1
    standing = [scored[:, 2:3 + k, :4].sum(1).square().mean().item() for k in range(probe.AHEAD)]
    assert errors["zero actions"] == pytest.approx(standing, rel=1e-4)


# ======== probe.py: Cost landscape ====================================================================

def test_displaced_states_are_displaced_by_what_the_axis_says():
    """Catches a landscape that turns the block about a corner, and so moves it too."""
    states = random_states(50, 100, 400)
    for column, (what, amount) in enumerate((("agent px", 40), ("block px", 20), ("block degrees", 90))):
        moved = probe.displaced(states, what, amount)
        assert np.allclose(pusht.distances(states, moved)[column], amount)
        axes = [np.stack([-np.sin(s[:, 4]), np.cos(s[:, 4])], 1) for s in (states, moved)]
        before, after = (s[:, 2:4] + 45 * axis for s, axis in zip((states, moved), axes))
        shift = np.linalg.norm(before - after, axis=1)      # of the block's centre of gravity
        assert np.allclose(shift, 20 if what == "block px" else 0)
    far = probe.displaced(states, "agent px", 160)[:, :2]
    assert 60 <= far.min() and far.max() <= pusht.BOARD - 60, "an agent off the board cannot be seen"
    for what in ("agent px", "block px"):
        assert probe.clear(probe.displaced(states, what, 40)).all(), "the agent cannot lie on the block"
    assert not probe.clear(np.array([[256.0, 256, 256, 240, 0, 0, 0]]))[0]


# ======== probe.py: Ceiling ===========================================================================

def test_the_simulator_as_a_model_imagines_what_happens(recorded):
    """Catches a ceiling that is none: a perfect model that loses the angle, the velocity or the scale of the
    actions."""
    states, actions = (torch.from_numpy(recorded[name]) for name in ("state", "action"))
    model = probe.Simulator(lewm.Config(), lewm.action_statistics(recorded["action"]))
    for start in (0, 17):
        plans = model.to_blocks(actions[start:start + 25])[None, None]
        imagined = model.rollout(model.encode(states[None, start:start + 1]), plans)[0, 0]
        happened = model.encode(states[start + 5:start + 26:5])
        assert torch.allclose(imagined, happened, atol=0.02), "0.4 px, 0.4 degrees"
    near, turned = states[0].clone(), states[0].clone()
    near[0] += 20
    turned[4] += math.radians(20)
    for other in (near, turned):
        distance = (model.encode(other) - model.encode(states[0])).norm()
        assert distance == pytest.approx(1, rel=0.02), "the rule's margin is a distance of 1"


def test_the_ceiling_reports_every_kind_of_policy(tmp_path, monkeypatch):
    """Catches a part that breaks where nobody looks, since it takes minutes."""
    collect, small = pusht.collect, tiny(candidates=4, elites=2, iterations=1)

    def few(episodes, *args, **kwargs):
        return collect(min(episodes, 20), *args, **kwargs)

    monkeypatch.setattr(pusht, "collect", few)
    monkeypatch.setattr(lewm.Config, "preset", lambda *args, **kwargs: small)
    probe.main(["--ceiling", "simulator", "--pairs", "2", "--out", str(tmp_path)])
    written, = tmp_path.glob("ceiling*.json")
    policies = json.loads(written.read_text())["ceiling"]["policies"]
    assert len(policies) == 4 and policies["recorded actions"]["success"] == 1
    assert {"random actions", "doing nothing", "recorded actions"} < set(policies)


# ======== probe.py: Comparisons =======================================================================

def test_the_terms_of_vicreg_have_known_answers():
    """Catches a batch that is pooled with time, a diagonal that counts, and collapse that goes unnoticed."""
    z = noise(3, 20_000, 4)                                 # three groups of N(0, I)
    assert all(term < 0.01 for term in probe.vicreg(z))
    variance, covariance = probe.vicreg(0 * z + torch.arange(3)[:, None, None])     # three points
    assert variance == pytest.approx(0.99) and covariance < 1e-9
    variance, covariance = probe.vicreg(z[..., :1].expand(-1, -1, 4))
    assert variance < 0.01 and covariance == pytest.approx(3, rel=0.05)     # 12 covariances of 1, by 4
    assert probe.vicreg(torch.tensor([[[0.0, 0], [1, 1]]]))[1] == pytest.approx(0.25)   # two of 0.5, n - 1


def test_pldm_is_trained_by_each_of_its_terms():
    """Catches a term without a gradient or a weight, a batch pooled with time, and half an input."""
    model = probe.PLDM(tiny(rollout_share=0.5), dict.fromkeys(probe.PLDM_WEIGHTS, 0.0)).eval()
    pixels, blocks = random_pictures(4, 4, 3, 32, 32), noise(4, 3, 10)
    pixels = pixels // 4 * torch.arange(4, dtype=torch.uint8)[:, None, None, None, None]     # ever brighter
    least, parts = model.loss(pixels, blocks)
    assert least == parts["prediction"] == lewm.LeWM.loss(model, pixels, blocks)[1]["prediction"]
    assert {*probe.PLDM_WEIGHTS, "std"} < {*parts}
    for name in probe.PLDM_WEIGHTS:
        model.weights = {**dict.fromkeys(probe.PLDM_WEIGHTS, 0.0), name: 2.0}
        more = model.loss(pixels, blocks)[0] - least
        assert more.item() == pytest.approx(2 * parts[name].item(), abs=1e-5)
        gradient, = torch.autograd.grad(more, model.encoder.cls_token, retain_graph=True)
        assert gradient.abs().sum() > 0, name
    z = model.encode(pixels)
    assert parts["smoothness"] == pytest.approx((z[:, 1:] - z[:, :-1]).square().mean().item())
    still = model.loss(pixels[:, :1].expand_as(pixels), blocks)[1]      # nothing moves, yet windows differ
    assert still["smoothness"] < 1e-9 and still["time variance"] == pytest.approx(0.99)
    assert still["variance"] < 0.98
    pixels[:, -1] = 255 - pixels[:, -1]
    assert model.loss(pixels, blocks)[1]["inverse dynamics"] != parts["inverse dynamics"]


@pytest.mark.parametrize("kind", [probe.PLDM, lambda cfg: Extra(cfg, 3)])
def test_a_subclass_resumes_exactly(kind, tmp_path):
    """Catches a subclass whose checkpoint cannot be read again."""
    cfg, data = tiny(steps=4, checkpoint_minutes=0.0), counting_data()

    def trained(out, stop):
        torch.manual_seed(0)
        model, losses = kind(cfg), []
        whole = model.loss
        model.loss = lambda *batch: losses.append(1) or (stop and len(losses) == 3 and 1 / 0) or whole(*batch)
        return lewm.train(cfg, data, out, resume=True, device="cpu", model=model)

    with pytest.raises(ZeroDivisionError):
        trained(tmp_path / "stopped", True)
    models = [trained(tmp_path / name, False) for name in ("stopped", "whole")]
    for a, b in zip(*(model.state_dict().values() for model in models)):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_a_comparison_trains_both_models_once_and_refuses_other_settings(tmp_path, monkeypatch):
    """Catches a model compared with itself, minutes spent twice, and old numbers taken for new ones."""
    settings, few = dict(pairs=2, steps=2, train_episodes=12), probe.trajectories(8, tiny())
    monkeypatch.setattr(probe, "trajectories", lambda episodes, cfg: few)
    small = tiny(candidates=8, elites=4, iterations=2)
    monkeypatch.setattr(lewm.Config, "preset", lambda name, **changes: dataclasses.replace(small, **changes))
    rows = probe.compare_pldm(tmp_path, "cpu", **settings)
    assert list(rows) == ["LeWM", "PLDM"] and rows["LeWM"] != rows["PLDM"]
    for row in rows.values():
        success, low, high = row["success"]
        assert 0 <= low <= success <= high <= 1
    assert (tmp_path / "pldm.png").read_bytes()[:4] == b"\x89PNG"
    monkeypatch.setattr(lewm, "train", None)                # again: nothing is trained
    assert probe.compare_pldm(tmp_path, "cpu", **settings) == rows
    with pytest.raises(ValueError, match="trial.pt has other steps: use another --out"):
        probe.compare_pldm(tmp_path, "cpu", **{**settings, "steps": 3})
    with pytest.raises(ValueError, match="has other pairs"):
        probe.compare_pldm(tmp_path, "cpu", **{**settings, "pairs": 3})
    stopped = tmp_path / "PLDM" / "trial.pt"                # in mid-training: without a row
    lewm.write_weights(stopped, {"made": lewm.read_weights(stopped)["made"]})
    monkeypatch.setitem(probe.PLDM_WEIGHTS, "variance", 9.0)
    with pytest.raises(ValueError, match="has other weights"):
        probe.compare_pldm(tmp_path, "cpu", **settings)


def test_each_ablation_differs_from_the_default_as_its_name_says(tmp_path, monkeypatch):
    """Catches a row that is the default again, another row's model, data that differ, and a lost seed."""
    seen = []

    def trial(cfg, data, problems, out, device, kind=lewm.LeWM, **fields):
        cfg = dataclasses.replace(cfg, **fields)
        seen.append((id(data), kind, tuple(vars(cfg).items()), out.name))
        return {"success": [0, 0, 1]}

    monkeypatch.setattr(probe, "trial", trial)
    monkeypatch.setattr(pusht, "collect_lessons", lambda *args: {})
    rows = probe.ablations(tmp_path, "cpu", pairs=2)
    assert [row[-1] for row in seen] == list(rows) and len(rows) == 20 == len({row[1:3] for row in seen})
    assert len({row[0] for row in seen}) == 1
    default = vars(lewm.Config.preset("nano"))
    for _, kind, cfg, name in seen:
        changed = {k for k, x in cfg if default[k] != x}
        assert len(changed - {"seed"}) + (kind is not lewm.LeWM) == (not name.startswith("as it is"))
        assert f"seed {dict(cfg)['seed']}" in name


def test_the_ablated_models_lack_what_their_names_say():
    """Catches BatchNorm left in one projector, and an appended action that modulates or has no effect."""
    kinds = {type(part) for part in probe.LayerNorms(tiny()).modules()}
    assert torch.nn.BatchNorm1d not in kinds and torch.nn.LayerNorm in kinds
    model, z = probe.AppendedAction(tiny()).eval(), noise(2, 3, tiny().embed_dim)
    blocks = noise(2, 3, 10, seed=1)
    assert (model.predict(z, blocks) - model.predict(z, -blocks)).abs().max() > 0.01   # at once
    x = noise(2, 3, tiny().predictor_width)
    layer = model.predictor.layers[0]
    expected = x + layer.attn(layer.norm1(x))
    expected = expected + layer.mlp(layer.norm2(expected))
    torch.testing.assert_close(layer(x, noise(*x.shape, seed=2)), expected)
    assert not any(p.requires_grad for p in layer.adaLN_modulation.parameters())


@pytest.mark.parametrize("summit", [0.004, 0.12, 3.0])
def test_the_search_for_lambda_closes_in_on_the_best(summit, tmp_path, monkeypatch):
    """Catches a range that is cut on the wrong side, and places that are tried twice."""
    tried = []

    def hill(cfg, data, problems, out, device, sigreg_weight):
        tried.append(sigreg_weight)
        away = abs(math.log(sigreg_weight / summit))
        return {"success": [math.exp(-away), 0, 1], "effective_rank": 1, "px_to_goal": away}

    monkeypatch.setattr(probe, "trial", hill)
    monkeypatch.setattr(pusht, "collect_lessons", lambda *args: None)
    rows = probe.bisect_lambda(tmp_path, "cpu", runs=7, pairs=2)
    assert list(rows) == sorted(tried) and len(tried) == 7
    best = min(rows, key=lambda weight: rows[weight]["px_to_goal"])
    assert abs(math.log10(best / summit)) < 4 * 0.618 ** 6
    assert (tmp_path / "lambda.png").read_bytes()[:4] == b"\x89PNG"


def test_the_multiply_adds_of_dino_wm_and_lewm_are_those_that_are_counted(monkeypatch):
    """Catches a wrong formula, and plans that are timed without a part of them."""
    def counted(work):                                          # "seconds" are million multiply-adds
        with probe.FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            work()
        return counter.get_total_flops() / 2e6

    small = tiny(embed_dim=24)
    for of, name, x in ((probe, "PATCHES", 3), (probe, "seconds_a_call", counted),
                        (lewm.Config, "preset", lambda name: small)):
        monkeypatch.setattr(of, name, x)
    *_, count, each, plan = probe.compare_dino_wm(None, "cpu").values()
    for name in ("LeWM", "DINO-WM"):
        assert each[name] == pytest.approx(1e6 * count[name], rel=1e-9)
        of_plan = each[name] / 1000 * small.horizon * small.candidates * small.iterations
        assert plan[name] == pytest.approx(of_plan / 60)


def test_dino_wms_tokens_see_their_own_frame_and_those_before(monkeypatch):
    """Catches a mask of tokens instead of frames, or none, and actions without effect."""
    monkeypatch.setattr(probe, "PATCHES", 3)
    z, blocks = noise(1, 3, 3 * 384).requires_grad_(), noise(1, 3, 10).requires_grad_()
    y = probe.DinoWM(tiny()).eval().predict(z, blocks).view(3, 3, 384)
    for t in range(3):
        grads = torch.autograd.grad(y[t, 0, 0], (z, blocks), retain_graph=True)
        seen, heard = grads[0].view(3, 3, 384).abs().amin(2), grads[1][0].abs().amin(1)
        expected = torch.arange(3) <= t
        assert ((seen > 0) == expected[:, None]).all() and ((heard > 0) == expected).all()


# ======== probe.py: Command line ======================================================================

def test_beliefs_play_the_plans_that_were_imagined():
    """Catches plans played z-scored, from other starts, or seen at other times than imagination does."""
    model = lewm.LeWM(tiny()).eval()
    model.action_stats.copy_(torch.tensor([[0.1, -0.1], [0.5, 0.4], [-1, -1], [1, 1]]))
    starts, plans = np.array([[100.0, 100, 256, 300, 1, 0, 0], [400, 90, 250, 260, 2, 0, 0]]), noise(2, 3, 10)
    raw, env = model.to_actions(plans).numpy(), pusht.PushT()
    for start, actions, states in zip(starts, raw, probe.played(starts, raw.reshape(2, 3, 5, 2))):
        env.reset(options={"state": start})
        path = [env.step(action)[0] for action in actions]
        assert np.allclose(states, path[4::5], atol=1e-4)


@pytest.mark.parametrize("context", [1, 3])
def test_beliefs_after_each_block_are_those_of_the_planner(context, monkeypatch):
    """Catches ends imagined from other frames or of another plan than the planner's, or too early a truth."""
    model = awake(lewm.LeWM(tiny(candidates=8, elites=4, iterations=2, context=context)))
    starts = np.array([[100.0, 100, 256, 300, 1, 0, 0], [400, 90, 250, 260, 2, 0, 0]])
    goals, actions, expected = starts + [20, 30, 0, 0, 0, 0, 0], [], []
    cem, call = lewm.cem, lewm.Planner.__call__

    def planned(model, z, z_goal, generators, past, **settings):
        plans = cem(model, z, z_goal, generators, past, **settings)
        expected.append(model.rollout(z, torch.cat([past, plans], 1)[:, None])[:, 0, -1])
        return plans

    monkeypatch.setattr(lewm, "cem", planned)
    monkeypatch.setattr(lewm.Planner, "__call__", lambda *args: actions.append(call(*args)) or actions[-1])
    ends = probe.replanned(model, starts, goals)                # (2,H+1,D)
    assert len(expected) == 5 and ends.shape == (2, 6, 16)
    torch.testing.assert_close(ends[:, :5], torch.stack(expected, 1))
    last = probe.played(starts, np.stack(actions, 1))[:, -1]
    torch.testing.assert_close(ends[:, -1], probe.encode(model, probe.draw(last, 32)))


def test_the_speed_of_this_machine_is_that_of_the_projects_own_code(monkeypatch):
    """Catches a part that is timed as zero, and a training that is not stopped."""
    calls = []
    monkeypatch.setattr(probe, "seconds_a_call", lambda work: calls.append(work()) or 0.5)
    step = probe.seconds_a_step
    monkeypatch.setattr(probe, "seconds_a_step", lambda *setup: step(*setup, least=0.0))
    rows = probe.speed("smoke", torch.device("cpu"))
    assert rows.pop("ms of its gradient, not compiled") == 0    # as the loss takes as long with it as without
    assert len(calls) == 7 and all(0 < value < math.inf for value in rows.values()), rows
    assert rows["ms of a plan"] == rows["ms of the loss, not compiled"] == 500
    assert rows["ms of a step"] == pytest.approx(1000 / rows["training steps a second"])
    assert rows["pictures drawn a second"] == 512               # 256 in half a second, 32 x 4 in a step
    assert rows["ms of drawing its pictures"] == 250


def test_the_memory_that_a_gradient_needs_is_counted_once():
    """Catches a tensor that is counted twice, or none."""
    x = torch.zeros(1000, requires_grad=True)
    assert probe.kept_bytes(lambda: x * x) == 4000 and probe.kept_bytes(lambda: x + x) == 0
    assert probe.kept_bytes(lambda: (x * x) * x) == 8000
    assert probe.kept_bytes(lambda: x[:500] * x[500:]) == 4000      # two views of one memory


def test_the_growth_of_cost_is_that_of_the_setting_that_grows(monkeypatch):
    """Catches a setting that is not passed on, and a plan that is timed as a training step."""
    def counted(work):                                          # "seconds" are floating-point operations
        with probe.FlopCounterMode(display=False) as counter:
            work()
        return counter.get_total_flops()

    monkeypatch.setattr(probe, "seconds_a_call", counted)
    result, figure = probe.growth(tiny(), torch.device("cpu"))
    for name, rows in result.items():
        seconds = [row["seconds"] for row in rows.values()]
        assert seconds == sorted(set(seconds)) and len(seconds) == 4, name
        assert (name in ("image_size", "batch_size")) == ("GB" in [*rows.values()][0])
    seconds, memory = zip(*((row["seconds"], row["GB"]) for row in result["batch_size"].values()))
    assert seconds[3] == 2 * seconds[2] and 1.5 < memory[3] / memory[2] < 2         # weights are kept, too
    assert [*result["image_size"]] == [16, 32, 64, 112]


def test_probe_cli_leaves_its_pictures_and_numbers(tmp_path, capsys):
    """Catches a part that breaks on another checkpoint, and figures that are not written down."""
    path, out = str(tmp_path / "c.pt"), tmp_path / "out"
    lewm.save_checkpoint(path, awake(lewm.LeWM(tiny())))
    probe.main([path, "--episodes", "12", "--steps", "5", "--out", str(out), "--device", "cpu"])
    result = json.loads((out / "probe.json").read_text())
    assert set(probe.PARTS) < set(result) and result["n"] == 12 and result["seed"] == 0
    assert {file.name for file in out.iterdir()} == {f"{part}.png" for part in probe.PARTS} | {"probe.json"}
    printed = capsys.readouterr().out
    assert "straightening" in printed and str(out) in printed


def test_probe_cli_gives_its_parts_what_they_need(tmp_path, monkeypatch):
    """Catches raw actions, pictures of other frames, and an untrained code that is the trained one."""
    model, seen = awake(lewm.LeWM(tiny())).eval(), []
    model.action_stats[:2] = torch.tensor([[1.0, -1], [2, 0.5]])
    lewm.save_checkpoint(tmp_path / "c.pt", model)

    def part(held):
        seen.append(held)
        return probe.action_use(held)

    monkeypatch.setitem(probe.PARTS, "actions", part)
    probe.main([str(tmp_path / "c.pt"), "--only", "actions", "--episodes", "8", "--out", str(tmp_path)])
    held, = seen
    raw = torch.tensor(held.actions)                        # (E,T-1,5,2)
    scored = (raw - model.action_stats[0]) / model.action_stats[1]
    assert torch.allclose(held.blocks, scored.flatten(2), atol=1e-5)
    picture = pusht.render(held.states[3, 2:3], 32)
    assert torch.equal(held.pixels[3, 2], picture[0])
    with torch.no_grad():
        assert torch.allclose(held.z[3, 2], model.encode(picture)[0], atol=1e-4)
    assert not torch.allclose(held.untrained, held.z, atol=0.1) and held.z.shape == held.untrained.shape


def test_probe_cli_draws_the_curves_of_several_runs(tmp_path, whole_run):
    """Catches a comparison of runs that draws one of them twice, or none where a run is still young."""
    run, young = whole_run[1], tmp_path / "young"
    young.mkdir()
    lines = (run / "metrics.csv").read_text().splitlines()
    (young / "metrics.csv").write_text("\n".join(lines[:2]) + "\n")
    probe.main(["--curves", str(run), str(young), "--out", str(tmp_path / "both.png")])
    probe.main(["--curves", str(run), "--out", str(tmp_path / "one.png")])
    both, one = ((tmp_path / name).read_bytes() for name in ("both.png", "one.png"))
    assert both[:4] == one[:4] == b"\x89PNG" and both != one
    with pytest.raises(ValueError, match="nowhere has no metrics.csv"):
        probe.main(["--curves", str(run), str(tmp_path / "nowhere"), "--out", str(tmp_path / "no.png")])


@pytest.mark.parametrize("argv, words", [
    ("", "say which checkpoint"), ("c.pt --ceiling simulator", "say which checkpoint"),
    ("c.pt --only everything", "the parts are probes,surprise"), ("nothing.pt", "no file at"),
    ("--import w.pt", "say where"), ("--curves run", "say where"), ("c.pt --episodes 2", "at least 8"),
    ("--compare pldm --pairs 9 --seed 1", "--pairs, --seed: a comparison has its own"),
    ("--bisect-lambda --steps 9", "--steps: a comparison"),
    ("--ceiling states", "states"), ("c.pt --bogus", "--bogus")])
def test_probe_cli_refuses_what_is_impossible_in_one_line_that_names_it(argv, words, tmp_path, monkeypatch):
    """Catches minutes of work before a wrong flag is noticed, and tracebacks."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises((SystemExit, ValueError, OSError)) as caught:
        probe.main(argv.split())
    assert words in str(caught.value) and "\n" not in str(caught.value), str(caught.value)


# ======== 11 Command line =============================================================================

@pytest.mark.parametrize("argv, words", [
    ("--train --bogus 1", "--bogus"),
    ("--train --image_size 60 --patch_size 7", "60 is not a multiple of patch_size 7"),
    ("--train --preset nano --elites 4000", "elites 4000 > candidates 150"),
    ("--train --history 4", "history 4 is not below frames 4"),
    ("--train --lr -1", "lr is -1.0"), ("--train --steps 0", "steps is 0"), ("--train --steps two", "two"),
    ("--train --preset big", "big"), ("--train --dropout 1.0", "dropout is 1.0"),
    ("--train --seed 1000000", "seed is 1000000"), ("--train --data nowhere --episodes 1", "nowhere"),
    ("--train --device warp9", "warp9"), ("--eval nothing.pt", "nothing.pt"),
    ("--eval a.pt --train", "say --train"), ("--seed 1", "say --train"),
    ("--eval a.pt --resume", "say --train"),
    ("--train --preset smoke --goal_distance 200", "distance <= 150"), 
    ("--train --action_dim 3", "action_dim is 3")])
def test_cli_refuses_what_is_impossible_in_one_line_that_names_it(argv, words, tmp_path, monkeypatch):
    """Catches silent clipping, ignored flags and tracebacks."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises((SystemExit, ValueError, OSError)) as caught:
        lewm.main(argv.split())
    assert words in str(caught.value) and "\n" not in str(caught.value), str(caught.value)


def test_cli_offers_every_field_of_config_with_its_comment(capsys):
    """Catches a field without a flag, or without an explanation."""
    with pytest.raises(SystemExit):
        lewm.main([])
    text = " ".join(capsys.readouterr().out.split())
    for field in dataclasses.fields(lewm.Config):
        assert f"--{field.name}" in text
    assert "D, width of an embedding" in text


SMALL_RUN = ("--train --preset smoke --device cpu --train_episodes 6 --steps 6 --episodes 2 --candidates 8 "
             "--elites 3 --iterations 1 --budget 10 --replan 2").split()


def test_cli_trains_evaluates_and_resumes(tmp_path):
    """Catches a command line that does not do what the functions do; every file that it promises must be
    there."""
    out = ["--device", "cpu", "--out", str(tmp_path)]
    lewm.main([*SMALL_RUN, *out])
    files = {"checkpoint.pt", "metrics.csv", "curves.png", "plan.gif", "result.json"}
    assert {path.name for path in tmp_path.iterdir()} == files
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["episodes"] == 2 and result["config"]["steps"] == 6 and result["torch"] == torch.__version__
    before = (tmp_path / "checkpoint.pt").read_bytes()
    lewm.main(["--train", "--resume", *out])
    assert (tmp_path / "checkpoint.pt").read_bytes() == before, "a finished run must not train on"
    lewm.main(["--eval", str(tmp_path / "checkpoint.pt"), "--episodes", "3", "--split", "dev", *out])
    assert json.loads((tmp_path / "result.json").read_text())["episodes"] == 3


def test_cli_says_before_it_trains_how_long_planning_takes(tmp_path, monkeypatch, capsys):
    """Catches plans that are counted wrongly: 2 episodes of 10 env steps, 2 blocks of 5 a plan."""
    asked = []
    monkeypatch.setattr(pusht, "evaluate", lambda *args: asked.append(args) or {"seconds_per_plan": 12.0})
    monkeypatch.setattr(lewm, "train", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        lewm.main([*SMALL_RUN, "--out", str(tmp_path)])
    assert "planning takes 0.4 minutes at most" in capsys.readouterr().out
    (_, cfg, pairs), = asked                                # one plan for one pair tells the time
    assert cfg.budget == 1 and [len(x) for x in pairs] == [1, 1, 1]


def test_cli_does_not_train_over_a_checkpoint(tmp_path):
    """Catches a day of training that the same command, typed again without --resume, would write over."""
    lewm.save_checkpoint(tmp_path / "checkpoint.pt", lewm.LeWM(tiny()))
    (tmp_path / "metrics.csv").write_text("step\n1\n")
    before = contents(tmp_path)
    with pytest.raises(ValueError, match="checkpoint.pt is there already: --resume goes on"):
        lewm.main(["--train", "--preset", "smoke", "--device", "cpu", "--out", str(tmp_path)])
    assert contents(tmp_path) == before


def test_cli_prints_its_table_where_the_terminal_knows_ascii_alone(tmp_path):
    """Catches a run of an hour that ends in a UnicodeEncodeError; its training has two lessons."""
    files = project(tmp_path, "pusht.py")
    ended = run_python("lewm.py", *SMALL_RUN, "--first_lesson", "0.5", cwd=files, PYTHONIOENCODING="ascii")
    assert ended.returncode == 0, ended.stderr
    assert "8 episodes" in ended.stdout, "6 ordinary episodes and 2 narrow ones"
    for name in ("LeWM + CEM", "random actions", "doing nothing", "recorded actions"):
        assert re.search(rf"^{re.escape(name)} .*%", ended.stdout, re.M), ended.stdout


HELP = """
for name in ("lewm", "pusht", "probe"):
    try:
        __import__(name).main(["--help"])
    except SystemExit as end:
        print(name, "ended with", end.code)
"""


def test_cli_has_help_also_where_python_drops_docstrings(tmp_path):
    """Catches a help text that is read from a docstring."""
    ended = run_python("-OO", "-c", HELP, cwd=project(tmp_path, "pusht.py", "probe.py"))
    assert re.findall(r"(\w+) ended with 0", ended.stdout) == ["lewm", "pusht", "probe"], ended.stderr


def test_cli_of_the_file_alone_fails_in_one_line(tmp_path):
    """Catches a traceback where somebody copied lewm.py and forgot pusht.py."""
    ended = run_python("lewm.py", "--train", cwd=project(tmp_path))
    assert ended.returncode == 1 and ended.stderr.splitlines() == ["lewm.py: No module named 'pusht'"]


# ======== README ======================================================================================

def test_every_command_in_the_readme_exists():
    """Catches a README that promises flags which are not there, in its blocks and in its tables."""
    text = (HERE / "README.md").read_text(encoding="utf-8")
    commands = re.findall(r"python (lewm|probe|pusht)\.py ([^`#\"\n]*)", text)
    assert {file for file, _ in commands} == {"lewm", "probe", "pusht"} and len(commands) >= 10
    for file, arguments in commands:
        if arguments.split() != ["--help"]:
            {"lewm": lewm, "probe": probe, "pusht": pusht}[file].parse_arguments(arguments.split())


def test_every_name_that_the_readme_imports_exists():
    """Catches an example that was right for an earlier version."""
    text = (HERE / "README.md").read_text(encoding="utf-8")
    imports = re.findall(r"^from (lewm|probe|pusht) import ([\w, ]+)", text, re.M)
    assert imports, "the README shows no example"
    for file, names in imports:
        missing = [name for name in names.split(", ") if not hasattr(sys.modules[file], name.strip())]
        assert not missing, f"from {file} import {', '.join(missing)}"
