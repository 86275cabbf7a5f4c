"""Tests by invariant: each says in its name what must hold and in its docstring which mistake it catches.

    pytest -q                                   # all of it, two minutes on two cores
    LEWM=student pytest -q -k "not cli"         # the same tests on a file student.py

Numbers without a source beside them follow from the formula in the test.
"""

import dataclasses
import importlib
import json
import math
import os
import pickle
import re
import signal
import subprocess
import sys
import types
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

lewm = sys.modules["lewm"] = importlib.import_module(os.environ.get("LEWM", "lewm"))     # probe.py is tested with the same file
import probe
import pusht

HERE = Path(__file__).parent


def tiny(**changes):
    """A Config small enough for a test."""
    return lewm.Config.preset("smoke", **{**dict(image_size=32, patch_size=16, encoder_width=24, embed_dim=16, projector_hidden=32,
                                                 predictor_width=24, predictor_mlp=48, directions=32, batch_size=8, steps=8), **changes})


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def awake(model, seed=1):
    """Give the AdaLN layers weights, so that actions have an effect, as after training."""
    with torch.no_grad():
        for block in model.predictor.blocks:
            block.modulation[-1].weight.copy_(0.3 * noise(*block.modulation[-1].weight.shape, seed=seed))
            block.modulation[-1].bias.fill_(0.5)
    return model


@pytest.fixture(scope="module")
def recorded():
    return pusht.collect(12, seed=5)


# ---- the world ---------------------------------------------------------------------------------------------------
# A trajectory of the reference Push-T (pymunk 7.3.1): the agent pushes and turns the block from step 5 on.

REFERENCE_START = [214.358267, 366.055692, 221.756585, 228.79937, 5.926156, 0.0, 0.0]
REFERENCE_ACTIONS = np.array([
    -0.149, -0.274,  0.046, -0.145,  0.12, -0.146,  0.103, -0.289,  0.061, -0.281,  0.114, -0.347,  -0.005,
    -0.211,  -0.129, 0.168,  0.16, -0.079,  0.113, -0.211,  0.248, 0.022,  -0.126, -0.024,  0.226, -0.174,  0.39,
    -0.107,  0.117, -0.236,  -0.089, 0.022,  0.326, -0.086,  0.098, -0.285,  0.223, -0.348,  0.169, -0.12,
    -0.033, -0.497,  -0.429, -0.094,  -0.28, -0.102,  -0.393, 0.09,  -0.267, -0.099,  -0.336, -0.357,
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
    env, rng = pusht.PushT(), np.random.default_rng(0)
    env.reset(seed=0)
    places = np.array([env.step(rng.choice([-1.0, 1.0], 2) if t % 40 == 0 else action)[0][:2]
                       for t in range(400) for action in [np.sign(np.sin([t / 30, t / 47]))]])
    assert places.min() >= -1e-6 and places.max() <= 512 + 1e-6, f"went to {places.min():.1f} .. {places.max():.1f}, expected 0 .. 512"
    assert places.min() < 1 and places.max() > 511, "the test must reach the border to mean something"


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
    for wrong in ([0.0, np.nan], [0.1], [[0.1, 0.2]]):
        with pytest.raises(ValueError, match="2 finite numbers"):
            env.step(wrong)
    with pytest.raises(ValueError, match="7 finite numbers"):
        env.state = [1, 2, 3]


def test_success_counts_agent_and_block_together_and_turns_on_the_circle():
    """Catches a rule on the block alone and an angle difference that breaks at 2 pi."""
    goal = np.array([100.0, 100, 200, 200, 0.1, 0, 0])
    near, far = goal + [12, 0, 12, 0, 0, 0, 0], goal + [15, 0, 15, 0, 0, 0, 0]             # 17.0 px and 21.2 px
    turned = goal + [0, 0, 0, 0, 2 * np.pi - 0.2, 0, 0]                                     # 0.2 rad the other way
    twisted = goal + [0, 0, 0, 0, 0.36, 0, 0]                                               # 20.6 degrees
    assert pusht.success(np.stack([near, far, turned, twisted]), goal).tolist() == [True, False, True, False]
    assert pusht.success(np.stack([far, twisted]), goal, object_only=True).tolist() == [True, False]


def test_pictures_match_the_reference():
    """Catches a shifted, mirrored or recoloured drawing. Values read off a reference frame at 224 px, (row, column): RGB."""
    state = [231.4928, 344.6232, 203.0655, 331.7839, 1.959295, 0, 0]
    frame = pusht.render(np.array([state]), 224)[0].permute(1, 2, 0).numpy().astype(float)
    for (row, column), colour in {(112, 2): (211, 211, 211), (140, 60): (119, 136, 153), (118, 85): (119, 136, 153),
                                  (151, 101): (78, 126, 255), (125, 41): (122, 139, 157), (200, 200): (255, 255, 255)}.items():
        assert np.abs(frame[row, column] - colour).max() < 25, f"pixel {row, column} is {frame[row, column]}, expected {colour}"
    assert np.abs(frame.mean((0, 1)) - [247.40, 249.60, 248.94]).max() < 0.3, "expected the reference's mean colour"
    assert np.abs(frame.std((0, 1)) - [26.58, 19.69, 20.67]).max() < 0.6, "expected the reference's spread of colour"


def test_a_picture_is_the_same_alone_and_in_a_batch(recorded):
    """Catches state leaking between rows and windows that are cut off at the border."""
    states = torch.from_numpy(recorded["state"][::40]).clone()
    states[0, :2], states[1, 2:4] = torch.tensor([3.0, 509.0]), torch.tensor([470.0, 480.0])
    batch = pusht.render(states, 64)
    assert all(torch.equal(batch[i], pusht.render(states[i:i + 1], 64)[0]) for i in range(len(states)))
    red = pusht.render(states, 64, block_colour=(200, 0, 0))
    changed = (red != batch).any(1).float().mean().item()
    assert 0.02 < changed < 0.12, f"another block colour changes {changed:.1%} of the pixels, expected the block's share"


def test_scripted_episodes_depend_on_seed_and_index_alone(recorded):
    """Catches random numbers drawn from a shared generator: results that change with the number of processes."""
    more = pusht.collect(60, seed=5, workers=2)
    assert np.array_equal(more["state"][:len(recorded["state"])], recorded["state"])
    assert not np.array_equal(pusht.collect(1, seed=6)["state"][:49], recorded["state"][:49])
    assert pusht.collect(60, seed=5, workers=1)["action"].tobytes() == more["action"].tobytes()


def test_scripted_episodes_push_the_block_and_keep_it_on_the_board():
    """Catches a policy that jitters, loses the block at a wall or moves at another scale than the one that `nano` was measured with."""
    data = pusht.collect(60, seed=11)
    states, lengths = data["state"], data["ep_len"]
    assert lengths.min() >= 49 and lengths.max() <= 246 and 105 < lengths.mean() < 145
    assert (abs(data["action"].std(0) - 0.26) < 0.04).all(), f"action std {data['action'].std(0)}, expected near 0.26 (the authors' data: 0.20)"
    assert states[:, :4].min() > 15 and states[:, :4].max() < 497, "something left the board"
    assert states[:, 2:4].std(0).max() < 65, f"block position std {states[:, 2:4].std(0)}, expected 55 as in the data of the authors"
    pairs = [(data["state"][o], data["state"][o + 25]) for o in data["ep_offset"] for o in range(o, o + 24, 6)]
    starts, goals = (np.stack(side) for side in zip(*pairs))
    moved = (pusht.distances(starts, goals)[1] > 5).mean()
    assert moved > 0.6, f"the block moves in {moved:.0%} of 25-step windows, expected most"


def test_the_policies_to_compare_with_differ_as_their_names_say():
    """Catches a --policy that changes nothing, and jitter or noise mixed up."""
    data = {policy: pusht.collect(30, seed=5, workers=1, policy=policy) for policy in pusht.POLICIES}
    assert all(np.array_equal(data["purposeful"]["ep_len"], other["ep_len"]) for other in data.values()), "same lengths for all"
    change = {policy: np.corrcoef(d["action"][1:, 0], d["action"][:-1, 0])[0, 1] for policy, d in data.items()}
    assert change["noise"] > 0.75 > 0.3 > change["jitter"], f"correlation from one action to the next: {change}"
    far = {policy: np.median(pusht.distances(d["state"], d["state"][:, [2, 3, 2, 3, 4, 5, 6]])[0]) for policy, d in data.items()}
    assert far["jitter"] < 110 < far["noise"], f"median px from agent to block: {far}"
    first, second = data["mixture"]["ep_offset"][1:3]
    assert np.array_equal(data["mixture"]["action"][first:second], data["jitter"]["action"][first:second]), "episodes take turns"
    with pytest.raises(ValueError, match="'wild'"):
        pusht.collect(1, policy="wild")
    assert not np.array_equal(pusht.held_out_pairs(3, "dev", policy="jitter")[0], pusht.held_out_pairs(3, "dev")[0])


def test_statistics_of_a_data_set_have_known_values():
    """Catches windows over the gap between episodes, and a turn that is counted as a move."""
    state = np.zeros((60, 7))
    state[:, 2] = np.arange(60)                                              # 1 px a step, and a jump back between the episodes
    state[30:, 2], state[30:, 4] = 0, 0.1 * np.arange(30)
    data = {"state": state, "action": np.tile([[0.0, 0], [1, 1]], (30, 1)), "ep_len": np.array([30, 30]), "ep_offset": np.array([0, 30])}
    line = pusht.describe(data)
    assert "actions 0.50" in line and "50% move" in line and "50% turn" in line, line


def test_recorded_actions_lead_to_the_recorded_states(recorded):
    """Catches action[t] stored beside state[t + 1]."""
    env, first = pusht.PushT(), slice(0, recorded["ep_len"][0])
    states, actions = recorded["state"][first], recorded["action"][first]
    env.reset(options={"state": states[0]})
    worst = max(np.abs(env.step(actions[t])[0][:2] - states[t + 1][:2]).max() for t in range(20))
    assert worst < 0.01, f"replaying 20 actions misses by {worst:.3f} px, expected below 0.01"


def test_held_out_pairs_are_unsolved_and_replaying_their_actions_solves_them():
    """Catches pairs that are won by doing nothing, and starts and goals from different episodes."""
    starts, goals, actions = pusht.held_out_pairs(20, "dev", seed=3)
    assert not pusht.success(starts, goals).any()
    assert np.array_equal(starts[:5], pusht.held_out_pairs(5, "dev", seed=3)[0]), "the first pairs must not depend on how many"
    assert not np.array_equal(starts, pusht.held_out_pairs(20, "test", seed=3)[0])
    episodes = pusht.play(starts, goals, 25, lambda which, states: actions[which])
    assert sum(pusht.success(states[-1], goal) for states, goal in zip(episodes, goals)) >= 19


def test_what_is_judged_comes_from_seeds_that_training_cannot_take(monkeypatch):
    """Catches held-out pairs and probes from training episodes: training seeds end at 1,000,000."""
    episode, seeds = pusht._episode, set()
    monkeypatch.setattr(pusht, "_episode", lambda seed, index, policy="purposeful": (seeds.add(seed), episode(seed, index, policy))[1])
    for split in ("dev", "test"):
        pusht.held_out_pairs(1, split)
    probe.trajectories(2, tiny())
    lewm.probe(lewm.LeWM(tiny()).eval(), episodes=1)
    assert len(seeds) == 5 and min(seeds) >= 1_000_000, f"episodes came from seeds {sorted(seeds)}"
    with pytest.raises(ValueError, match="split"):
        pusht.held_out_pairs(1, "train")


def test_data_sets_survive_writing_and_reading(tmp_path, recorded):
    """Catches a lost column, an overwritten data set, and files that would run code."""
    for name in ("data.npz", "folder"):
        pusht.save(tmp_path / name, recorded)
        back = pusht.load(tmp_path / name)
        assert all(np.array_equal(back[column], recorded[column]) for column in recorded)
        with pytest.raises(FileExistsError):
            pusht.save(tmp_path / name, recorded)
    assert isinstance(pusht.load(tmp_path / "folder")["state"], np.memmap)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data.npz", "folder"], "temporary files were left behind"
    (tmp_path / "broken.npz").write_bytes((tmp_path / "data.npz").read_bytes()[:1000])
    np.savez(tmp_path / "code.npz", action=np.array([{"a": 1}], dtype=object), ep_len=np.array([1]), state=np.zeros((1, 7)))
    np.savez(tmp_path / "poor.npz", action=np.zeros((5, 2)))
    for name, words in (("broken.npz", "damaged"), ("code.npz", "damaged"), ("poor.npz", "lacks"), ("none", "make some")):
        with pytest.raises((ValueError, FileNotFoundError), match=words):
            pusht.load(tmp_path / name)


# ---- the networks ------------------------------------------------------------------------------------------------

def test_the_paper_preset_has_the_authors_size_and_takes_a_step():
    """Catches a missing bias, a merged matrix of the wrong size, a forgotten layer. The authors' weights: 18,034,478."""
    model = lewm.LeWM(lewm.Config.preset("paper", batch_size=2))
    assert sum(p.numel() for p in model.parameters()) == 18_034_478
    pixels = torch.randint(0, 256, (2, 4, 3, 224, 224), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    loss, _ = model.loss(pixels, noise(2, 3, 10))
    loss.backward()
    missing = [name for name, p in awake(model).named_parameters() if p.grad is None]
    assert math.isfinite(loss.item()) and not missing, f"no gradient reaches {missing}"


def test_the_encoder_sees_where_things_are():
    """Catches a lost position embedding: without it a ViT cannot tell two pictures with the same patches apart."""
    model = lewm.LeWM(tiny()).eval()
    picture = noise(1, 1, 3, 32, 32)
    moved = picture.roll(16, dims=-1)                                       # the same patches in another order
    gap = (model.encode(picture) - model.encode(moved)).abs().max().item()
    assert gap > 1e-4, f"moving the patches changes the embedding by {gap:.1g}, expected a visible change"


def test_bytes_and_normalised_floats_encode_alike():
    """Catches scaling done twice, or not at all."""
    model = lewm.LeWM(tiny()).eval()
    pixels = torch.randint(0, 256, (2, 2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    mean, std = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    assert torch.allclose(model.encode(pixels), model.encode((pixels.float() / 255 - mean) / std), atol=1e-5)


def test_at_initialisation_actions_have_no_effect_and_after_one_step_they_do():
    """Catches AdaLN layers that do not start at zero, and ones that never learn."""
    torch.manual_seed(0)
    model = lewm.LeWM(tiny(dropout=0.0))
    z, actions = noise(8, 3, 16), noise(8, 3, 10, seed=1)
    assert torch.equal(model.predict(z, actions), model.predict(z, -actions)), "at initialisation actions must not matter"
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    (model.predict(z, actions) - noise(8, 3, 16, seed=2)).square().mean().backward()
    optimizer.step()
    gap = (model.predict(z, actions) - model.predict(z, -actions)).abs().max().item()
    assert gap > 1e-3, f"after one step actions change the prediction by {gap:.1g}, expected more than 0.001"


def test_at_initialisation_every_predictor_layer_is_the_identity():
    """Catches a gate that starts open."""
    predictor = lewm.LeWM(tiny()).predictor
    x, c = noise(2, 3, 24), noise(2, 3, 24, seed=1)
    assert all(torch.equal(block(x, c), x) for block in predictor.blocks)


@pytest.mark.parametrize("k", [0, 1, 2])
def test_the_predictor_never_looks_ahead(k):
    """Catches a missing causal mask and actions shifted by one: frame or action k may change outputs k and later only."""
    model = awake(lewm.LeWM(tiny()).eval())
    z, actions = noise(2, 3, 16), noise(2, 3, 10, seed=1)
    base = model.predict(z, actions)
    for changed in ("frame", "action"):
        z2, actions2 = z.clone(), actions.clone()
        (z2 if changed == "frame" else actions2)[:, k] += 1
        gap = (model.predict(z2, actions2) - base).abs().amax((0, 2))
        assert (gap[:k] < 1e-6).all(), f"{changed} {k} changes earlier outputs: {gap.tolist()}"
        assert (gap[k:] > 1e-4).all(), f"{changed} {k} does not reach outputs {k} and later: {gap.tolist()}"


def test_the_order_of_frames_matters_to_the_predictor():
    """Catches a lost position embedding in the predictor."""
    model = awake(lewm.LeWM(tiny(predictor_depth=1)).eval())                 # two causal layers know the order without it
    z, actions = noise(1, 3, 16), torch.zeros(1, 3, 10)
    gap = (model.predict(z, actions)[:, -1] - model.predict(z[:, [1, 0, 2]], actions)[:, -1]).abs().max().item()
    assert gap > 1e-5, f"swapping two frames changes the prediction by {gap:.1g}"


# ---- the loss ----------------------------------------------------------------------------------------------------

GAUSSIAN_SCORE = 2 * sum(math.exp(-t * t / 2) * (1 - math.exp(-t * t)) * 3e-4 for t in np.arange(0, 3, 3e-4))    # 1.0525


@pytest.mark.parametrize("B", [32, 256])
def test_sigreg_of_a_gaussian_is_the_same_at_any_batch_size(B):
    """Catches a missing factor B (weight 1/B too small), a missing doubling, a wrong weight. Theory: 1.0525."""
    torch.manual_seed(0)
    sigreg = lewm.SIGReg(directions=64)
    values = torch.stack([sigreg(torch.randn(B, 2, 64)) for _ in range(60)])
    error = values.std().item() / math.sqrt(len(values))
    assert abs(values.mean().item() - GAUSSIAN_SCORE) < 5 * error + 0.01, f"mean {values.mean():.4f} +- {error:.4f}, expected {GAUSSIAN_SCORE:.4f}"


def test_sigreg_agrees_with_a_slow_complex_version():
    """Catches slips in the formula: phi, weights, trapezoid ends, averaging. float64, complex, loops."""
    B, T, D, M = 16, 3, 8, 5
    z, directions = noise(B, T, D), noise(D, M, seed=1)
    total, knots = 0.0, np.linspace(0, 3, 17)
    for t in range(T):
        for m in range(M):
            line = (directions[:, m] / directions[:, m].norm()).double().numpy()
            shadow = z[:, t].double().numpy() @ line
            error = [abs(np.exp(1j * k * shadow).mean() - np.exp(-k * k / 2)) ** 2 * np.exp(-k * k / 2) for k in knots]
            total += B * 2 * np.trapezoid(error, knots)
    ours = lewm.SIGReg()(z, directions).item()
    assert abs(ours - total / (T * M)) < 1e-4, f"{ours:.6f}, expected {total / (T * M):.6f}"


@pytest.mark.parametrize("name, expected", [("zero", 51.46), ("twice as wide", 31.7), ("shifted by 1", 50.6), ("half dead", 7.3)])
def test_sigreg_punishes_what_is_not_gaussian(name, expected):
    """Catches a regulariser that lets collapse pay. Known values at B 128, D 192, within 15 %."""
    z = noise(128, 4, 192)
    z = {"zero": 0 * z, "twice as wide": 2 * z, "shifted by 1": z + 1, "half dead": z * (torch.arange(192) < 96)}[name]
    torch.manual_seed(0)
    value = lewm.SIGReg()(z).item()
    assert abs(value / expected - 1) < 0.15, f"{value:.2f}, expected about {expected}"


def test_sigreg_draws_new_directions_each_time():
    """Catches directions that are drawn once: the embeddings would become Gaussian along those alone."""
    z, sigreg = 2 * noise(16, 2, 64), lewm.SIGReg(directions=4)
    assert sigreg(z) != sigreg(z)


def test_sigreg_never_pools_time_steps():
    """Catches the wrong axis: for clips that stand still, pooling B * T rows gives about 4.2 instead of 1.05."""
    torch.manual_seed(0)
    sigreg = lewm.SIGReg(directions=256)
    value = np.mean([sigreg(torch.randn(64, 1, 64).expand(-1, 4, -1)).item() for _ in range(20)])
    assert abs(value - GAUSSIAN_SCORE) < 0.2, f"{value:.2f}, expected {GAUSSIAN_SCORE:.2f}"
    with pytest.raises(ValueError, match="windows B, frames T"):
        sigreg(torch.randn(64, 64))


def test_the_loss_is_prediction_plus_lambda_sigreg():
    """Catches a wrong target frame, a sum in place of a mean, a lost lambda."""
    model = awake(lewm.LeWM(tiny(dropout=0.0, sigreg_weight=0.3)))
    pixels, actions = noise(8, 4, 3, 32, 32), noise(8, 3, 10, seed=1)
    torch.manual_seed(7)
    loss, parts = model.loss(pixels, actions)
    z = model.encode(pixels)
    z_hat = model.predict(z[:, :3], actions)
    prediction = (z_hat - z[:, 1:]).square().mean()
    torch.manual_seed(7)
    expected = prediction + 0.3 * model.sigreg(z)
    assert torch.allclose(loss, expected, atol=1e-5) and torch.allclose(parts["prediction"], prediction, atol=1e-5)


def test_gradients_flow_through_both_sides_of_the_error():
    """Catches a detached target, which the paper does not have."""
    model = awake(lewm.LeWM(tiny(sigreg_weight=0.0)))
    pixels = noise(4, 4, 3, 32, 32).requires_grad_()
    model.projector.eval()                                  # batch norm would carry a gradient from frame to frame
    model.loss(pixels, noise(4, 3, 10, seed=1))[0].backward()
    reach = pixels.grad.abs().amax((0, 2, 3, 4))
    assert (reach > 0).all(), f"gradient at frames 0 to 3: {reach.tolist()}; the last frame is only ever a target"


def test_long_windows_hold_several_examples():
    """Catches predictions that see more than `history` frames, or a future frame paired with the wrong past."""
    model = awake(lewm.LeWM(tiny(dropout=0.0, sigreg_weight=0.0, frames=6)).eval())
    pixels, actions = noise(4, 6, 3, 32, 32), noise(4, 5, 10, seed=1)
    pieces = [model.loss(pixels[:, s:s + 4], actions[:, s:s + 3])[0] for s in range(3)]
    assert torch.allclose(model.loss(pixels, actions)[0], torch.stack(pieces).mean(), atol=1e-5)


# ---- windows of data ---------------------------------------------------------------------------------------------

def counting_data(lengths=(30, 16, 15, 40)):
    """A data set in which every frame and every action is its own row number."""
    rows = sum(lengths)
    data = {"action": np.arange(rows, dtype=np.float32)[:, None].repeat(2, 1), "ep_len": np.array(lengths),
            "ep_offset": np.cumsum(lengths) - lengths, "pixels": np.zeros((rows, 8, 8, 3), np.uint8)}
    data["pixels"][:] = np.arange(rows, dtype=np.uint8)[:, None, None, None]
    return data


def test_windows_pair_each_frame_with_the_actions_that_follow_it():
    """Catches blocks that are off by one step, interleaved the wrong way, or not z-scored."""
    cfg, data = tiny(image_size=8, patch_size=8), counting_data()
    stats = torch.tensor([[10.0, 20], [2, 4], [-1, -1], [1, 1]])
    pixels, actions = lewm.get_batch(data, np.array([0, 7, 61]), cfg, stats, torch.device("cpu"))
    assert pixels.shape == (3, 4, 3, 8, 8) and actions.shape == (3, 3, 10)
    for row, start in enumerate([0, 7, 61]):
        assert pixels[row, :, 0, 0, 0].tolist() == [start, start + 5, start + 10, start + 15]
        for k in range(3):
            expected = [(start + 5 * k + i - mean) / std for i in range(5) for mean, std in ((10, 2), (20, 4))]
            assert actions[row, k].tolist() == expected, f"block {k} of the window at {start}"


def test_windows_cover_every_valid_start_and_never_cross_an_episodes_end():
    """Catches windows over the gap between two episodes and starts that are never drawn."""
    data = counting_data()
    starts = lewm.window_starts(data, tiny(), range(4))
    expected = [*range(0, 15), 30, *range(61, 86)]          # lengths 30, 16, 15, 40 leave 15, 1, 0 and 25 starts
    assert starts.tolist() == expected


def test_whitened_colours_weigh_a_small_object_as_much_as_a_large_one():
    """Catches a colour map that is transposed, not inverted, or not applied, and statistics that a checkpoint forgets."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.full((400, 3, 16, 16), 200, dtype=torch.uint8)
    for picture in pixels:
        x, y, u, v = torch.randint(0, 10, (4,), generator=generator).tolist()
        picture[:, y:y + 6, x:x + 6] = torch.tensor([100, 110, 120], dtype=torch.uint8)[:, None, None]      # large and grey
        picture[:, v:v + 2, u:u + 2] = torch.tensor([30, 60, 220], dtype=torch.uint8)[:, None, None]        # small and blue
    mean, colour_map = lewm.colour_statistics(pixels, floor=0.0)
    seen = torch.einsum("cd,ndhw->nchw", colour_map, pixels / 255 - mean).permute(0, 2, 3, 1).reshape(-1, 3)
    scale = seen.T @ seen / len(seen)
    eigenvalues = torch.linalg.eigvalsh(scale)
    assert seen.mean(0).abs().max() < 1e-3 and (eigenvalues[1:] - 1).abs().max() < 1e-2, f"covariance {scale}"

    model = lewm.LeWM(tiny(image_size=16, whiten=True)).eval()
    model.picture_mean.copy_(mean)
    model.colour_map.copy_(colour_map)
    normalised = seen.view(400, 16, 16, 3).permute(0, 3, 1, 2)
    assert torch.allclose(model.encode(pixels[None, :4]), model.encode(normalised[None, :4]), atol=1e-4)
    with pytest.raises(ValueError, match="colour statistics"):
        lewm.save_official(model, "never.pt")


def test_a_whitened_run_keeps_its_statistics_in_the_checkpoint(tmp_path):
    """Catches a resumed or evaluated model that sees other colours than the trained one."""
    cfg, data = tiny(steps=3, whiten=True), pusht.collect(12, seed=5, workers=1)
    model = lewm.train(cfg, data, tmp_path)
    again, _, _ = lewm.load_checkpoint(tmp_path / "checkpoint.pt")
    for name in lewm.STATISTICS:
        assert torch.equal(getattr(model, name), getattr(again, name)) and torch.equal(getattr(model, name), getattr(lewm.untrained(model), name))
    assert not torch.equal(model.colour_map, lewm.LeWM(cfg).colour_map)
    assert not torch.equal(model.encoder.cls, lewm.untrained(model).encoder.cls), "an untrained model has new weights"


def test_episodes_are_split_whole_by_seed_and_before_anything_else():
    """Catches validation windows that overlap training windows."""
    train, held_out = lewm.split_episodes(100, 0.1, seed=1)
    assert len(held_out) == 10 and sorted([*train, *held_out]) == list(range(100))
    assert lewm.split_episodes(100, 0.1, seed=1)[1].tolist() == held_out.tolist() != lewm.split_episodes(100, 0.1, seed=2)[1].tolist()
    assert len(lewm.split_episodes(1, 0.5, seed=0)[0]) == 1, "one episode must stay for training"


def test_action_statistics_ignore_the_nan_rows_at_episode_ends():
    """Catches statistics that become NaN on the authors' files."""
    action = np.array([[1.0, 2], [3, 2], [np.nan, np.nan]])
    assert lewm.action_statistics(action).tolist() == [[2, 2], [1, 1], [1, 2], [3, 2]]


@pytest.mark.parametrize("change, words", [
    (lambda d: d.pop("ep_len"), "lacks ep_len"), (lambda d: d.pop("pixels"), "pixels or state"),
    (lambda d: d.update(action=d["action"][:, :1]), "action_dim"), (lambda d: d.update(ep_len=d["ep_len"] + 1), "do not fit"),
    (lambda d: d.update(pixels=d["pixels"].astype(float)), "uint8"), (lambda d: d.update(ep_len=np.array([5, 5, 5, 5])), "steps of a window")])
def test_arrays_that_do_not_fit_are_refused_by_name(change, words):
    """Catches training on garbage, and errors that only show up deep inside torch."""
    data = counting_data()
    change(data)
    with pytest.raises(ValueError, match=words):
        lewm.train(tiny(image_size=8, patch_size=8), data)


# ---- training ----------------------------------------------------------------------------------------------------

def test_the_learning_rate_warms_up_and_falls_to_zero():
    """Catches a cosine that does not span the whole run."""
    cfg = tiny(steps=100, warmup=0.1, lr=1.0)
    rates = [lewm.learning_rate(step, cfg) for step in range(100)]
    assert rates[0] == 0.1 and rates[9] == 1.0 and max(rates) == 1.0 and rates[-1] < 0.01
    assert all(a >= b for a, b in zip(rates[9:], rates[10:]))


def test_diagnostics_have_known_answers():
    """Catches a rank that ignores a dead dimension, and a straightness that is not a cosine of velocities."""
    z = noise(4000, 8)
    assert abs(lewm.effective_rank(z) - 8) < 0.1 and abs(lewm.effective_rank(z * (torch.arange(8) < 4)) - 4) < 0.1
    assert lewm.effective_rank(z[:, :1] * torch.ones(8)) < 1.001
    line = torch.arange(5.0)[None, :, None] * noise(3, 1, 8)
    assert abs(lewm.straightness(line) - 1) < 1e-5
    assert abs(lewm.straightness(noise(4000, 5, 64)) + 0.5) < 0.05, "independent frames turn back half the time: cosine -0.5"


def test_diagnostics_of_a_known_world():
    """Catches an error against the wrong frame, a copy baseline that copies the goal, and actions that are not shuffled."""
    actions = noise(8, 3, 10)
    z = torch.cat([torch.zeros(8, 1, 4), actions[..., :4].cumsum(1)], 1)
    row = lewm.diagnose(Mover(tiny(embed_dim=4)), z, actions)
    assert row["val_prediction"] < 1e-10 and row["val_shuffled_ratio"] > 1e6
    assert row["val_copy_last"] == pytest.approx(actions[..., :4].square().mean().item(), rel=1e-5)


def test_looking_at_a_model_does_not_change_it():
    """Catches diagnostics that move batch-norm averages or the random state, so that logging changes the run."""
    model = lewm.LeWM(tiny()).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    numbers = lewm.diagnose(model, torch.zeros(8, 4, 3, 32, 32, dtype=torch.uint8), noise(8, 3, 10))
    assert model.training and torch.equal(random, torch.get_rng_state()) and all(map(math.isfinite, numbers.values()))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_run_that_was_stopped_and_resumed_equals_one_that_was_not(tmp_path, recorded):
    """Catches any state that is missing from the checkpoint: optimizer, random numbers, sampler, step."""
    cfg = tiny(steps=12)
    whole = lewm.train(cfg, recorded, tmp_path / "whole", device="cpu")
    calls = []

    def stops_after_a_while(states, size):
        calls.append(1)
        if len(calls) == 7:
            signal.raise_signal(signal.SIGINT)              # Ctrl-C in the middle of a step
        return pusht.render(states, size)

    with pytest.raises(KeyboardInterrupt):
        lewm.train(cfg, recorded, tmp_path / "stopped", device="cpu", render=stops_after_a_while)
    step = torch.load(tmp_path / "stopped/checkpoint.pt", weights_only=True)["step"]
    assert 0 < step < 12
    resumed = lewm.train(cfg, recorded, tmp_path / "stopped", resume=True, device="cpu")
    different = [name for name, value in whole.state_dict().items() if not torch.equal(value, resumed.state_dict()[name])]
    assert not different, f"after stopping at step {step} these differ: {different}"
    tables = [(tmp_path / name / "metrics.csv").read_text().splitlines() for name in ("whole", "stopped")]
    assert [row.split(",")[:6] for row in tables[0]] == [row.split(",")[:6] for row in tables[1]]
    with pytest.raises(ValueError, match="lr is 0.5"):
        lewm.train(tiny(steps=12, lr=0.5), recorded, tmp_path / "stopped", resume=True, device="cpu")
    with pytest.raises(ValueError, match="other data"):
        lewm.train(cfg, {**recorded, "action": recorded["action"] * 0.5}, tmp_path / "stopped", resume=True, device="cpu")


def test_a_checkpoint_loads_in_a_fresh_process_with_the_same_outputs(tmp_path):
    """Catches weights that are not saved, and key names with a compiler's prefix."""
    torch.manual_seed(0)
    model = awake(lewm.LeWM(tiny())).eval()
    lewm.save_checkpoint(tmp_path / "c.pt", model)
    code = ("import sys, torch, importlib; lewm = importlib.import_module(sys.argv[1]); model, cfg, _ = lewm.load_checkpoint(sys.argv[2]);"
            "g = torch.Generator().manual_seed(0); print(model.encode(torch.randn(1, 2, 3, 32, 32, generator=g)).double().sum().item())")
    answer = subprocess.run([sys.executable, "-c", code, lewm.__name__, tmp_path / "c.pt"], capture_output=True, text=True, cwd=HERE, check=True)
    assert float(answer.stdout) == pytest.approx(model.encode(noise(1, 2, 3, 32, 32)).double().sum().item(), abs=1e-5)


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
    torch.save({"format": "lewm", "version": 2, "config": Trap()}, "trap.pt")
    content = torch.load("good.pt", weights_only=True)
    torch.save({**content, "config": {**content["config"], "embed_dim": 17}}, "misfit.pt")
    torch.save(torch.nn.Linear(2, 2), "module.pt")
    Path("bare.pt").write_bytes(pickle.dumps({"weights": Trap()}))
    torch.save(lewm.LeWM(tiny()).state_dict(), "large.pt")
    flipped = bytearray(Path("large.pt").read_bytes())
    flipped[len(flipped) // 2] ^= 255
    Path("flipped.pt").write_bytes(flipped)
    for name, words in {"half.pt": "damaged, cut short", "empty.pt": "damaged, cut short", "text.pt": "damaged, cut short",
                        "flipped.pt": "checksum", "list.pt": "holds a list", "trap.pt": "would run code: refused",
                        "module.pt": "would run code: refused", "bare.pt": "would run code: refused",
                        "foreign.pt": "no checkpoint of this program", "misfit.pt": "no checkpoint of this program"}.items():
        with pytest.raises(ValueError, match=f"{name}.*{words}"):
            lewm.load_checkpoint(name)
    assert not Path("trap-was-sprung").exists(), "loading a checkpoint executed code in it"
    with pytest.raises(FileNotFoundError, match="--train"):
        lewm.load_checkpoint("missing.pt")


def test_a_write_that_dies_leaves_the_old_file(tmp_path):
    """Catches checkpoints written in place: a kill in the middle would lose both the old and the new one."""
    lewm.write_atomically(tmp_path / "file", lambda temporary: temporary.write_text("old"))

    def dies(temporary):
        temporary.write_text("ne")
        raise OSError("disk full")

    with pytest.raises(OSError):
        lewm.write_atomically(tmp_path / "file", dies)
    assert (tmp_path / "file").read_text() == "old"


def test_compiled_and_eager_give_the_same_number(monkeypatch, capsys):
    """Catches a compiled step that is another function, and a missing compiler that ends the run."""
    model = awake(lewm.LeWM(tiny(dropout=0.0, sigreg_weight=0.0, encoder_depth=1, predictor_depth=1)))
    pixels, actions = noise(4, 4, 3, 32, 32), noise(4, 3, 10, seed=1)
    eager = model.loss(pixels, actions)[0].item()
    assert abs(lewm.compiled(model.loss)(pixels, actions)[0].item() - eager) < 1e-4 * max(1, abs(eager))

    def no_compiler(function):
        def fails(*args):
            raise RuntimeError("no compiler here")
        return fails

    monkeypatch.setattr(torch, "compile", no_compiler)
    assert lewm.compiled(model.loss)(pixels, actions)[0].item() == pytest.approx(eager, rel=1e-5)
    assert "going on without it" in capsys.readouterr().err


def test_other_peoples_arrays_train_too(tmp_path):
    """Catches Push-T's sizes hidden in the code: a world with 3 action numbers, blocks of 2 steps and 20 px pictures."""
    rng = np.random.default_rng(0)
    data = {"pixels": rng.integers(0, 256, (200, 20, 20, 3), dtype=np.uint8), "action": rng.normal(size=(200, 3)),
            "ep_len": np.full(4, 50), "ep_offset": np.arange(4) * 50}
    cfg = tiny(action_dim=3, frame_skip=2, steps=2)
    model = lewm.train(cfg, data, device="cpu")
    torch.manual_seed(cfg.seed)
    fresh = lewm.LeWM(cfg)
    for part in ("encoder.cls", "projector.0.weight", "action_encoder.mix.weight", "predictor.norm.weight", "prediction_projector.0.weight"):
        assert not torch.equal(model.get_parameter(part), fresh.get_parameter(part)), f"two steps did not move {part}"
    assert model.predict(noise(2, 3, 16), noise(2, 3, 6)).shape == (2, 3, 16) and not list(tmp_path.iterdir())


def test_no_number_of_training_comes_from_held_out_episodes(monkeypatch):
    """Catches a held-out error that is the training one, and statistics or batches that see held-out episodes."""
    data, cfg, seen = counting_data((30, 30, 30, 30)), tiny(image_size=8, patch_size=8, steps=3, held_out=0.5, whiten=False), {"held out": set(), "trained": set()}
    fetch = lewm.get_batch
    def spy(data, starts, cfg, stats, device, render=None, windows=None):
        seen["held out" if windows is None else "trained"] |= set(starts.tolist())       # only batches are read ahead
        return fetch(data, starts, cfg, stats, device, render, windows)
    monkeypatch.setattr(lewm, "get_batch", spy)
    model = lewm.train(cfg, data, device="cpu")
    train, held_out = lewm.split_episodes(4, 0.5, cfg.seed)
    assert {row // 30 for row in seen["trained"]} == set(train) and {row // 30 for row in seen["held out"]} == set(held_out)
    rows = np.concatenate([np.arange(30 * e, 30 * e + 30) for e in train])
    assert torch.equal(model.action_stats, lewm.action_statistics(data["action"][rows]))


def test_the_learning_rate_is_the_schedules(monkeypatch):
    """Catches a schedule that is computed and not used: without a learning rate nothing may move."""
    monkeypatch.setattr(lewm, "learning_rate", lambda step, cfg: 0.0)
    cfg = tiny(image_size=8, patch_size=8, steps=2)
    torch.manual_seed(cfg.seed)
    fresh = lewm.LeWM(cfg)
    assert all(torch.equal(a, b) for a, b in zip(lewm.train(cfg, counting_data(), device="cpu").parameters(), fresh.parameters()))


# ---- the authors' weights and files ------------------------------------------------------------------------------
# What the authors' code answers when its weights are filled with numbers that follow from their names (seed 1).

OFFICIAL_ENCODE = [1.18324, 0.04966, -0.38597, 1.48278, 0.08722, 1.19622, -0.11769, -1.21076]    # first frame, first 8 numbers
OFFICIAL_PREDICT = [-0.72220, 0.27340, -0.09558, 0.25573, 0.15269, -0.83470, 0.04648, -0.52153]    # after 3 frames
OFFICIAL_ROLLOUT = [-1.00459, 0.02961, -1.25545, -0.11934, 0.73192, -0.01402, -0.51713, 0.05496]    # first plan, after 5 blocks
OFFICIAL_COST = [1.43226, 1.46615, 1.49128, 1.36126]    # of four plans


def filled(name, shape):
    """float32 normals that depend on the name alone, of a size that keeps activations near 1."""
    x = np.random.Generator(np.random.PCG64([zlib.crc32(name.encode()), 1])).standard_normal(tuple(shape)).astype(np.float32)
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


def test_the_authors_weights_give_the_authors_numbers_under_all_their_names(tmp_path):
    """Catches a wrong name, a swapped query and key, another norm, another history while planning: parity to 1e-4."""
    blank = lewm.LeWM(lewm.Config())
    lewm.save_official(blank, tmp_path / "blank.pt")
    layout = torch.load(tmp_path / "blank.pt", weights_only=True)
    assert len(layout) == 303 and "predictor.transformer.layers.5.mlp.net.4.weight" in layout
    weights = {name: filled(name, tensor.shape) for name, tensor in layout.items()}
    torch.save({"model." + name: tensor for name, tensor in weights.items()}, tmp_path / "four.pt")
    model = lewm.load_official(tmp_path / "four.pt")

    lewm.save_official(model, tmp_path / "back.pt")
    back = torch.load(tmp_path / "back.pt", weights_only=True)
    assert back.keys() == weights.keys() and all(torch.equal(back[name], weights[name]) for name in back), "the round trip is not exact"
    lewm.save_official(model, tmp_path / "five.pt", transformers=5)
    five = torch.load(tmp_path / "five.pt", weights_only=True)
    assert "encoder.layers.0.attention.q_proj.weight" in five and len(five) == 303
    again = lewm.load_official(tmp_path / "five.pt")
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values()))

    pixels, actions, plans = filled("pixels", (2, 3, 3, 224, 224)), filled("actions", (2, 3, 10)), filled("candidates", (1, 4, 5, 10))
    with torch.no_grad():
        z, z_goal = model.encode(pixels[:1]), model.encode(filled("goal", (1, 1, 3, 224, 224)))
        ends = model.rollout(z[:, :1], plans)[:, :, -1]
        answers = {"encode": (z[0, 0, :8], OFFICIAL_ENCODE), "predict": (model.predict(z, actions[:1])[0, 2, :8], OFFICIAL_PREDICT),
                   "rollout": (ends[0, 0, :8], OFFICIAL_ROLLOUT), "cost": ((ends - z_goal).square().sum(-1)[0] / 100, OFFICIAL_COST)}
    for name, (ours, theirs) in answers.items():
        assert np.abs(ours.numpy() - theirs).max() < 1e-4, f"{name}: {ours.numpy().round(5)}, the authors' code says {theirs}"


def test_weights_that_do_not_fit_are_refused_with_a_full_list(tmp_path):
    """Catches loading with strict=False, and messages that name only the first problem."""
    cfg = tiny(embed_dim=24)
    lewm.save_official(lewm.LeWM(cfg), tmp_path / "good.pt")
    weights = torch.load(tmp_path / "good.pt", weights_only=True)
    del weights["projector.net.0.bias"]
    torch.save({**weights, "pred_proj.net.3.bias": torch.zeros(5), "extra": torch.zeros(1)}, tmp_path / "bad.pt")
    with pytest.raises(ValueError) as caught:
        lewm.load_official(tmp_path / "bad.pt", cfg)
    for words in ("3 tensors", "missing: projector.net.0.bias [32]", "pred_proj.net.3.bias is [5], not [24]", "unexpected: extra"):
        assert words in str(caught.value)
    with pytest.raises(ValueError, match="embed_dim must equal predictor_width"):
        lewm.save_official(lewm.LeWM(tiny()), tmp_path / "no.pt")


def test_the_authors_hdf5_files_become_folders_in_both_layouts_also_after_a_kill(tmp_path, recorded, monkeypatch):
    """Catches rows out of place, NaN actions that break training, and an import that starts anew or keeps half a chunk."""
    h5py = pytest.importorskip("h5py", reason="reading HDF5 is optional: pip install h5py")
    rows, lengths = len(recorded["action"]), recorded["ep_len"]
    pixels = pusht.render(recorded["state"], 32).permute(0, 2, 3, 1).numpy()
    actions = recorded["action"].copy()
    actions[np.cumsum(lengths) - 1] = np.nan
    common = {"pixels": pixels, "action": actions, "state": recorded["state"], "proprio": recorded["state"][:, [0, 1, 5, 6]]}
    layouts = {"offsets": {"ep_len": lengths, "ep_offset": recorded["ep_offset"]},
               "indices": {"episode_idx": np.repeat(np.arange(len(lengths)), lengths), "step_idx": np.concatenate([np.arange(n) for n in lengths])}}
    for name, episodes in layouts.items():
        with h5py.File(tmp_path / f"{name}.h5", "w") as file:
            for column, values in {**common, **episodes}.items():
                file[column] = values

    replace, calls = os.replace, []

    def killed(*paths):                                             # as if by SIGKILL, in the third chunk
        calls.append(paths)
        if len(calls) == 3:
            raise KeyboardInterrupt
        replace(*paths)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            pusht.import_hdf5(tmp_path / "indices.h5", tmp_path / "indices", chunk_bytes=100 * 32 * 32 * 3)
    assert not (tmp_path / "indices").exists()
    for name in layouts:
        assert pusht.import_hdf5(tmp_path / f"{name}.h5", tmp_path / name, chunk_bytes=100 * 32 * 32 * 3) == (len(lengths), rows)
        data = pusht.load(tmp_path / name)
        for column, expected in {**recorded, "pixels": pixels, "action": actions}.items():
            assert np.array_equal(data[column], expected, equal_nan=column == "action"), column
    lewm.train(tiny(steps=2), data, device="cpu")
    Path(tmp_path / "half.h5").write_bytes((tmp_path / "offsets.h5").read_bytes()[:50_000])
    with pytest.raises(ValueError, match="damaged"):
        pusht.import_hdf5(tmp_path / "half.h5", tmp_path / "half")
    with h5py.File(tmp_path / "wrong.h5", "w") as file:
        file["pixels"], file["action"] = pixels, actions
    with pytest.raises(ValueError, match="neither ep_len nor episode_idx"):
        pusht.import_hdf5(tmp_path / "wrong.h5", tmp_path / "wrong")


def test_stored_pictures_are_cut_from_the_middle():
    """Catches a crop from the corner, and pictures that are squeezed instead of cut."""
    pixels = np.zeros((60, 24, 40, 3), np.uint8)
    pixels[:, 8:16, 16:24] = 200
    data = {"pixels": pixels, "action": np.zeros((60, 2)), "ep_len": np.array([60]), "ep_offset": np.array([0])}
    stats = lewm.action_statistics(data["action"])
    crop = lambda **changes: lewm.get_batch(data, np.array([0]), tiny(image_size=8, patch_size=4, **changes), stats, "cpu")[0]
    assert crop(crop=8).min() == 200 and crop(crop=8).shape == (1, 4, 3, 8, 8)
    assert crop()[0, 0, 0].float().mean().item() == pytest.approx(200 / 9, abs=1)       # a 24 px square, a ninth of it bright


# ---- imagination and planning ------------------------------------------------------------------------------------

class Adder(lewm.LeWM):
    """A toy world that is known exactly: an embedding moves by the first numbers of the action block."""

    def predict(self, z, actions):
        return z + actions[..., :z.shape[-1]]


class Mover(Adder):
    """The same, and a picture is its own embedding."""

    def encode(self, pixels):
        return pixels


def test_imagination_pairs_each_action_with_the_frame_before_it():
    """Catches a rollout that is off by one, or that reuses an action."""
    model, actions = Adder(tiny(embed_dim=4)), noise(2, 3, 6, 10)
    z = noise(2, 1, 4, seed=1)
    assert torch.allclose(model.rollout(z, actions), z[:, None] + actions[..., :4].cumsum(2), atol=1e-5)
    context = noise(2, 3, 4, seed=2)
    ends = model.rollout(context, actions)
    assert ends.shape == (2, 3, 6, 4)
    assert torch.allclose(ends[:, :, :2], context[:, None, :2] + actions[:, :, :2, :4]), "context is given, not imagined"
    assert torch.allclose(ends[:, :, 2:], context[:, None, 2:] + actions[:, :, 2:, :4].cumsum(2), atol=1e-5)
    with pytest.raises(ValueError, match="at least 3 action blocks"):
        model.rollout(context, actions[:, :, :2])


def test_imagination_agrees_with_prediction_on_known_frames():
    """Catches a rollout that shows the predictor another history than training does."""
    model = awake(lewm.LeWM(tiny()).eval())
    z, actions = noise(2, 3, 16), noise(2, 3, 10, seed=1)
    assert torch.allclose(model.rollout(z, actions[:, None])[:, 0], model.predict(z, actions), atol=1e-5)


def toy_planner():
    model = Adder(tiny(embed_dim=4)).eval()
    model.action_stats.copy_(torch.tensor([[0.0, 0], [1, 1], [-2, -2], [2, 2]]))
    return model


def test_planning_finds_a_known_optimum_within_the_bounds():
    """Catches a sign error in the cost, elites taken from the wrong end, and plans outside the data's range."""
    model, z = toy_planner(), torch.zeros(2, 4)
    goal = torch.tensor([[3.0, -2, 1, 0], [100, 100, 100, 100]])
    plan = lewm.cem(model, z, goal, horizon=3, candidates=200, iterations=25, elites=20)
    end = plan[..., :4].sum(1)
    assert plan.shape == (2, 3, 10) and plan.abs().max() <= 2 + 1e-6, f"an action of {plan.abs().max():.2f}, expected at most 2"
    assert (end[0] - goal[0]).abs().max() < 0.1, f"the plan ends at {end[0].tolist()}, expected {goal[0].tolist()}"
    assert (end[1] > 5.5).all(), f"a goal out of reach wants every action at its bound, 3 x 2 = 6; got {end[1].tolist()}"
    model.action_stats.copy_(torch.tensor([[1.0, -2], [0.5, 2], [0, -6], [2, 2]]))
    plan = lewm.cem(model, z[:1], torch.tensor([[100.0, -100, 100, -100]]), horizon=3, candidates=200, iterations=25, elites=20)
    raw = plan.view(3, 5, 2)[:, :2] * model.action_stats[1] + model.action_stats[0]
    assert (raw - torch.tensor([2.0, -6])).abs().max() < 0.2, f"the bounds are the data's, 2 and -6, in the data's units; got {raw.tolist()}"
    with pytest.raises(ValueError, match="elites 30 must be from 2 to candidates 20"):
        lewm.cem(model, z, goal, candidates=20)


def test_a_plan_depends_on_its_own_episode_alone():
    """Catches random numbers shared by a batch: results that change with the batch size, and plans that differ from run to run."""
    model = awake(lewm.LeWM(tiny(dropout=0.5))).eval()
    model.action_stats[2:] *= 3
    z, goal, settings = noise(3, 16), noise(3, 16, seed=1), dict(horizon=3, candidates=40, iterations=6, elites=8)
    buffers = {name: value.clone() for name, value in model.named_buffers()}
    generator = lambda e: torch.Generator().manual_seed(e)
    together = lewm.cem(model, z, goal, [generator(e) for e in range(3)], **settings)
    alone = torch.cat([lewm.cem(model, z[e:e + 1], goal[e:e + 1], [generator(e)], **settings) for e in range(3)])
    assert torch.equal(together, alone), f"plans differ by {(together - alone).abs().max():.2g}"
    assert not torch.allclose(together[0], lewm.cem(model, z[:1], goal[:1], [generator(9)], **settings)[0])
    assert all(torch.equal(value, buffers[name]) for name, value in model.named_buffers()), "planning changed a batch norm"


def test_a_cost_of_nan_is_an_error_and_not_a_plan():
    """Catches a planner that picks its elites among NaN."""
    with pytest.raises(FloatingPointError, match="not finite"):
        lewm.cem(toy_planner(), torch.full((1, 4), math.nan), torch.zeros(1, 4), iterations=2)


def test_the_wilson_interval_has_known_values():
    """Catches the normal approximation, which promises 100 % +- 0 for 50 of 50. Values from the literature."""
    for (successes, n), expected in {(48, 50): (0.8654, 0.9890), (50, 50): (0.9287, 1.0), (0, 100): (0.0, 0.0370)}.items():
        assert np.allclose(lewm.wilson(successes, n), expected, atol=2e-4)


def test_evaluation_gives_the_same_pairs_the_same_outcome_in_any_company(tmp_path):
    """Catches pairs, noise or pictures that depend on how many episodes are evaluated; and baselines that are not played."""
    torch.manual_seed(0)
    model = awake(lewm.LeWM(tiny())).eval()
    cfg = tiny(candidates=10, iterations=2, elites=3, budget=10, horizon=2, replan=1)
    seen = {}

    def spy(n):
        world = types.SimpleNamespace(**{name: getattr(pusht, name) for name in ("play", "render", "success", "distances", "held_out_pairs")})
        world.draw_outcomes = lambda path, histories, goals, won: (seen.update({n: histories}), pusht.draw_outcomes(path, histories, goals, won))
        return lewm.evaluate(model, cfg, "dev", episodes=n, world=world, gif=tmp_path / f"{n}.gif")

    results = [spy(n) for n in (2, 4)]
    assert all(np.array_equal(a, b) for a, b in zip(seen[2], seen[4])), "the first two episodes went another way in company"
    assert json.loads(json.dumps(results[1]))["policies"].keys() == {"LeWM + CEM", "random actions", "doing nothing", "recorded actions"}
    assert (tmp_path / "4.gif").stat().st_size > 1000


def test_a_plan_made_anew_keeps_its_deadline(monkeypatch):
    """Catches a goal that stays as many blocks away however often one plans again: the planner would put it off for ever."""
    cfg, asked, plan = tiny(candidates=4, iterations=1, elites=2, horizon=5, replan=2, budget=50), [], lewm.cem
    monkeypatch.setattr(lewm, "cem", lambda model, z, z_goal, generators, horizon, *rest: (asked.append(horizon), plan(model, z, z_goal, generators, horizon, *rest))[1])
    lewm.evaluate(awake(lewm.LeWM(cfg)), cfg, "dev", 2)
    assert asked == [5, 3, 1, 5, 3, 1], "50 env steps are 10 blocks: plans of 5, made anew after 2"


def test_evaluation_plays_plans_in_the_worlds_units_towards_each_episodes_own_goal(monkeypatch):
    """Catches plans that are played z-scored, goals of another episode or of the start, and a baseline that is not played."""
    stats = np.array([[0.5, -0.2], [0.1, 0.3], [0.3, -0.8], [0.7, 0.4]])       # bounds: 2 std from the mean
    near = lambda states, goals, object_only=False: np.linalg.norm(states - goals, axis=-1) < 0.5
    class Walker:                                                              # moves by z-scored actions
        def reset(self, options):
            self.state, self.goal = options["state"], options["goal"]
            return self.state, {}
        def step(self, action):
            self.state = self.state + (action - stats[0]) / stats[1]
            return self.state, 0.0, bool(near(self.state, self.goal)), False, {}
    starts = np.array([[0.0, 0], [1, 1], [2, -1], [-1, 3]])
    steps = np.array([[1.0, 0], [-1.5, 1.5], [1.5, 1.5], [1.5, -1.5]])         # the first goal is reached long before the others
    goals, recorded = starts + 6 * steps * [[1 / 6], [1], [1], [1]], (steps * stats[1] + stats[0])[:, None].repeat(6, 1)
    monkeypatch.setattr(pusht, "PushT", Walker)
    world = types.SimpleNamespace(**{**vars(pusht), "render": lambda states, size: states, "success": near,
        "distances": lambda a, b: [np.linalg.norm(a - b, axis=-1)] * 3, "held_out_pairs": lambda *_: (starts, goals, recorded)})
    cfg = tiny(embed_dim=2, frame_skip=1, horizon=3, replan=3, budget=6, candidates=100, iterations=10, elites=10)
    model = Mover(cfg)
    model.action_stats.copy_(torch.from_numpy(stats))
    won = {name: row["success"] for name, row in lewm.evaluate(model, cfg, "dev", 4, world=world)["policies"].items()}
    assert won["LeWM + CEM"] == won["recorded actions"] == 1 and won["random actions"] < 1 and won["doing nothing"] == 0, won


# ---- probing -----------------------------------------------------------------------------------------------------

def test_probes_have_known_answers():
    """Catches a probe that cannot fit a linear map, and a score in the wrong unit."""
    states = np.random.default_rng(0).uniform(50, 450, (600, 7))
    states[:, 4] = np.random.default_rng(1).uniform(0, 2 * np.pi, 600)
    truth = probe.targets(states)
    code, random_code = ((truth - truth.mean(0)) / truth.std(0)) @ noise(6, 12, seed=2), noise(600, 12, seed=3)
    for fit in (probe.fit_linear, probe.fit_mlp):
        known, unknown = (probe.score(fit(x[:400], truth[:400])(x[400:]), truth[400:]) for x in (code, random_code))
        for group in probe.GROUPS:
            assert known[group]["r"] > 0.99 and abs(unknown[group]["r"]) < 0.25
    moved = truth + torch.tensor([3.0, 4, 0, 0, 0, 0])
    moved[:, 4:] = torch.stack([(torch.as_tensor(states[:, 4]) + 0.1).sin(), (torch.as_tensor(states[:, 4]) + 0.1).cos()], 1)
    answer = probe.score(moved, truth)
    assert answer["agent"]["error"] == pytest.approx(5) and answer["angle"]["error"] == pytest.approx(math.degrees(0.1), rel=1e-3)


def test_probes_are_judged_on_episodes_that_they_were_not_fitted_on():
    """Catches a probe that peeks: nothing can be read off noise, except by heart. The intervals must say so too."""
    E, D, K = 12, 64, probe.CONTEXT + probe.AHEAD
    z = noise(E, K, D)
    world = {"model": Adder(tiny(embed_dim=D)).eval(), "z": z, "untrained": z, "steps": 2, "blocks": torch.zeros(E, K - 1, D),
             "states": np.random.default_rng(0).uniform(60, 450, (E, K, 7)).astype(np.float32),
             "pixels": torch.randint(0, 256, (E, K, 3, 8, 8), dtype=torch.uint8)}
    for row in probe.probes(world)[0]["LeWM, linear"].values():
        assert abs(row["r"]) < 0.35 and row["r_interval"][0] < row["r"] < row["r_interval"][1] and row["r_interval"][0] < 0.1


def test_action_use_tells_true_actions_from_others():
    """Catches raw actions given to the model, and shuffled or zero ones that are the true ones."""
    model = Adder(tiny(embed_dim=4)).eval()
    model.action_stats.copy_(torch.tensor([[1.0, -1], [2, 0.5], [-9, -9], [9, 9]]))
    raw = noise(6, probe.CONTEXT + probe.AHEAD - 1, 5, 2)
    scored = ((raw - torch.tensor([1.0, -1])) / torch.tensor([2.0, 0.5])).flatten(2)
    z = torch.cat([torch.zeros(6, 1, 4), scored[..., :4].cumsum(1)], 1)
    errors, _ = probe.action_use({"model": model, "z": z, "blocks": probe.blocks(model, raw)})
    assert max(errors["true actions"]) < 1e-8 and min(errors["shuffled actions"]) > 0.1
    assert errors["zero actions"] == pytest.approx([scored[:, 2:3 + k, :4].sum(1).square().mean().item() for k in range(probe.AHEAD)], rel=1e-4)


def test_the_simulator_as_a_model_imagines_what_happens(recorded):
    """Catches a ceiling that is none: a perfect model that loses the angle, the velocity or the scale of the actions."""
    states, actions = (torch.from_numpy(recorded[name]) for name in ("state", "action"))
    stats = lewm.action_statistics(recorded["action"])
    model = probe.Simulator(lewm.Config(), stats)
    for start in (0, 17):
        plans = ((actions[start:start + 25] - stats[0]) / stats[1]).view(1, 1, 5, 10)
        imagined = model.rollout(model.encode(states[None, start:start + 1]), plans)[0, 0]
        assert torch.allclose(imagined, model.encode(states[start + 5:start + 26:5]), atol=0.02), "0.4 px, 0.4 degrees"
    near, turned = states[0].clone(), states[0].clone()
    near[0] += 20
    turned[4] += math.radians(20)
    for other in (near, turned):
        assert (model.encode(other) - model.encode(states[0])).norm() == pytest.approx(1, rel=0.02), "the rule's margin is a distance of 1"


def test_displaced_states_are_displaced_by_what_the_axis_says():
    """Catches a landscape that turns the block about a corner, and so moves it too."""
    states = np.random.default_rng(0).uniform(100, 400, (50, 7))
    states[:, 4] = np.random.default_rng(1).uniform(0, 2 * np.pi, 50)
    for column, (what, amount) in enumerate((("agent px", 40), ("block px", 20), ("block degrees", 90))):
        moved = probe.displaced(states, what, amount)
        assert np.allclose(pusht.distances(states, moved)[column], amount)
        centres = [s[:, 2:4] + 45 * np.stack([-np.sin(s[:, 4]), np.cos(s[:, 4])], 1) for s in (states, moved)]
        assert np.allclose(np.linalg.norm(centres[0] - centres[1], axis=1), 20 if what == "block px" else 0)
    far = probe.displaced(states, "agent px", 160)[:, :2]
    assert 60 <= far.min() and far.max() <= pusht.BOARD - 60, "an agent off the board cannot be seen"
    for what in ("agent px", "block px"):
        assert probe.clear(probe.displaced(states, what, 40)).all(), "the agent cannot lie on the block"
    assert not probe.clear(np.array([[256.0, 256, 256, 240, 0, 0, 0]]))[0]


def test_a_picture_of_numbers_holds_the_state():
    """Catches perfect eyes that are not: a number cut off, or angle and place mixed up."""
    states = np.random.default_rng(0).uniform(20, 490, (500, 7)).astype(np.float32)
    states[:, 4] = np.random.default_rng(1).uniform(0, 2 * np.pi, 500)
    pixels = probe.numbers_as_pictures(states)
    assert pixels.shape == (500, 3, 8, 8) and pixels.dtype == torch.uint8
    read = pixels.double().view(500, 6, 32).mean(2) / 255
    error = (read[:, :4] - torch.from_numpy(states[:, :4]) / pusht.BOARD).abs().max(), (2 * read[:, 4:] - 1 - probe.targets(states)[:, 4:]).abs().max()
    assert max(error) < 0.002, f"off by {error}, expected a quarter of what one byte can hold (0.004 and 0.008) at most"


def test_ceiling_and_transfer_report_every_kind_of_pair(tmp_path, monkeypatch):
    """Catches a part that breaks where nobody looks, since it takes minutes."""
    collect, asked = pusht.collect, []
    def few(episodes, seed=0, workers=None, policy="purposeful"):
        asked.append(policy)
        return collect(min(episodes, 20), seed, 1, policy)
    monkeypatch.setattr(pusht, "collect", few)
    small = tiny(candidates=4, elites=2, iterations=1)
    monkeypatch.setattr(lewm.Config, "preset", lambda name, **changes: dataclasses.replace(small, **changes))
    for argv in (["--ceiling", "simulator"], ["--ceiling", "states", "--policy", "jitter", "--steps", "3"]):
        probe.main([*argv, "--pairs", "2", "--out", str(tmp_path)])
    assert asked == ["purposeful", "jitter"], "training data must come from the policy that was asked for"
    kinds = {f"{policy}, {distance} steps" for policy, distance in probe.PAIRS}
    assert {"purposeful, 25 steps", "jitter, 25 steps"} < set(json.loads((tmp_path / "ceiling_states_jitter.json").read_text()))
    assert (tmp_path / "ceiling_simulator_purposeful.json").exists()
    lewm.save_checkpoint(tmp_path / "c.pt", lewm.LeWM(lewm.Config.preset("nano")))
    probe.main([str(tmp_path / "c.pt"), "--only", "transfer", "--pairs", "2", "--episodes", "8", "--out", str(tmp_path)])
    result = json.loads((tmp_path / "probe.json").read_text())["transfer"]
    assert kinds == set(result) and (tmp_path / "transfer.png").exists()
    assert len({row["start_to_goal"]["agent_px"]["mean"] for row in result.values()}) == len(kinds), "other pairs for each kind"
    for argv, words in (([], "say which"), ([str(tmp_path / "c.pt"), "--ceiling", "simulator"], "say which"),
                        ([str(tmp_path / "c.pt"), "--policy", "jitter"], "--policy jitter has no effect"), (["--ceiling", "states", "--only", "probes"], "--only probes has no effect")):
        with pytest.raises(ValueError, match=words):
            probe.main(argv)


def test_surprise_of_an_exact_model_is_zero_until_the_teleport():
    """Catches a prediction compared with the wrong frame: a toy world that adds its actions, moved at frame 4."""
    model = Adder(tiny(embed_dim=4)).eval()
    actions = noise(3, 7, 10)
    z = torch.cat([torch.zeros(3, 1, 4), actions[..., :4].cumsum(1)], 1)
    z[:, 4:] += 2.0
    surprise = probe.surprise(model, z, actions)
    assert torch.allclose(surprise[:, 3], torch.full((3,), 16.0), atol=1e-4), "4 dimensions off by 2 at frame 4"
    surprise[:, 3] = 0
    assert surprise.abs().max() < 1e-6


def test_paired_tests_and_roc_areas_have_known_values():
    """Catches a test that ignores the pairing and an area that counts ties wrongly."""
    base = np.random.default_rng(0).normal(0, 100, 40)
    assert probe.paired(base + 1, base)["p"] < 0.001 and probe.paired(base + 1, base)["difference"] == pytest.approx(1)
    assert probe.paired(base + np.tile([1, -1], 20), base)["p"] > 0.5
    assert probe.paired(np.array([1.0, 2, 3]), np.zeros(3))["effect_size"] == pytest.approx(2)
    assert probe.roc_area([2, 3], [0, 1]) == 1 and probe.roc_area([1, 1], [1, 1]) == 0.5 and probe.roc_area([0], [1]) == 0


def test_teleported_episodes_are_the_same_until_the_moment():
    """Catches a disturbance that starts early, one that is not there, and a world that stands still after it."""
    states, actions = probe.trajectories(8, tiny())
    for distance in (5, 40, 160):
        moved = probe.teleported(states, actions, distance, seed=0)
        for gap in pusht.distances(states[:, probe.MOMENT], moved[:, probe.MOMENT])[:2]:
            assert np.allclose(gap, distance, atol=0.01)
    for distance in (None, 40):
        moved = probe.teleported(states, actions, distance, seed=0)
        assert np.array_equal(moved[:, :probe.MOMENT], states[:, :probe.MOMENT]) and np.isfinite(moved).all()
        assert (np.abs(moved[:, probe.MOMENT, :4] - states[:, probe.MOMENT, :4]).max(1) > 1).all()
        env = pusht.PushT()
        env.reset(options={"state": moved[0, probe.MOMENT]})
        later = [env.step(action)[0] for action in actions[0, probe.MOMENT:].reshape(-1, 2)][4::5]
        assert np.allclose(later, moved[0, probe.MOMENT + 1:], atol=1e-3), "the recorded actions go on from there"


def test_probe_cli_leaves_its_pictures_and_numbers(tmp_path, capsys):
    """Catches a part that breaks on another checkpoint, and figures that are not written down."""
    model = awake(lewm.LeWM(tiny()))
    lewm.save_checkpoint(tmp_path / "c.pt", model)
    probe.main([str(tmp_path / "c.pt"), "--episodes", "12", "--steps", "5", "--out", str(tmp_path / "out"), "--device", "cpu"])
    result = json.loads((tmp_path / "out" / "probe.json").read_text())
    parts = set(probe.PARTS) - {"transfer"}                                 # slow, so only when asked for
    assert parts < set(result) and "transfer" not in result and result["n"] == 12 and result["seed"] == 0
    assert {p.name for p in (tmp_path / "out").iterdir()} == {f"{part}.png" for part in parts} | {"probe.json"}
    assert "straightness" in capsys.readouterr().out
    with pytest.raises(ValueError, match="the parts are probes,surprise"):
        probe.main([str(tmp_path / "c.pt"), "--only", "everything"])
    with pytest.raises(FileNotFoundError, match="no file at"):
        probe.main([str(tmp_path / "nothing.pt")])


# ---- the command line --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("argv, words", [
    ("--train --bogus 1", "--bogus"), ("--train --image_size 60 --patch_size 7", "60 is not a multiple of patch_size 7"),
    ("--train --preset nano --elites 4000", "elites 4000 must be from 2 to candidates"), ("--train --history 4", "history 4 must be less than the 4"),
    ("--train --lr -1", "lr is -1.0"), ("--train --steps 0", "steps is 0"), ("--train --steps two", "two"), ("--train --preset big", "big"),
    ("--train --dropout 1.0", "dropout 1.0"), ("--train --seed 1000000", "seed 1000000"), ("--train --data nowhere", "nowhere"),
    ("--train --device warp9", "warp9"), ("--eval nothing.pt", "nothing.pt"), ("--eval a.pt --train", "say --train"), ("--seed 1", "say --train"), ("--eval a.pt --resume", "say --train"),
    ("--train --preset smoke --goal_distance 200", "distance <= 150"), ("--train --pairs-seed -1", "-1"), ("--train --action_dim 3", "action_dim is 3")])
def test_cli_refuses_what_is_impossible_in_one_line_that_names_it(argv, words):
    """Catches silent clipping, ignored flags and tracebacks."""
    with pytest.raises((SystemExit, ValueError, OSError)) as caught:
        lewm.main(argv.split())
    assert words in str(caught.value) and "\n" not in str(caught.value), str(caught.value)


def test_cli_offers_every_field_of_config_with_its_comment(capsys):
    """Catches a field without a flag, or without an explanation."""
    with pytest.raises(SystemExit):
        lewm.main([])
    text = " ".join(capsys.readouterr().out.split())
    for field in lewm.dataclasses.fields(lewm.Config):
        assert f"--{field.name}" in text
    assert "D, width of an embedding" in text


def test_cli_trains_evaluates_and_resumes(tmp_path):
    """Catches a command line that does not do what the functions do; every file that it promises must be there."""
    small = "--train_episodes 6 --steps 6 --episodes 2 --candidates 8 --elites 3 --iterations 1 --budget 10 --replan 2".split()
    lewm.main(["--train", "--preset", "smoke", "--device", "cpu", "--out", str(tmp_path), *small])
    assert {p.name for p in tmp_path.iterdir()} == {"checkpoint.pt", "metrics.csv", "curves.png", "plan.gif", "result.json"}
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["episodes"] == 2 and result["config"]["steps"] == 6 and result["versions"]["torch"] == torch.__version__
    before = (tmp_path / "checkpoint.pt").read_bytes()
    lewm.main(["--train", "--resume", "--device", "cpu", "--out", str(tmp_path)])
    assert (tmp_path / "checkpoint.pt").read_bytes() == before, "a finished run must not train on"
    lewm.main(["--eval", str(tmp_path / "checkpoint.pt"), "--episodes", "3", "--split", "dev", "--device", "cpu", "--out", str(tmp_path)])
    assert json.loads((tmp_path / "result.json").read_text())["episodes"] == 3


def test_importing_the_file_does_nothing_and_needs_no_push_t(tmp_path):
    """Catches work at import, and a file that cannot be copied into another project alone."""
    (tmp_path / "lewm.py").write_text(Path(lewm.__file__).read_text())
    answer = subprocess.run([sys.executable, "-c", "import sys, lewm; print(sorted({'pusht', 'pymunk', 'matplotlib.pyplot'} & set(sys.modules)))"],
                            cwd=tmp_path, capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]" and not answer.stderr


def test_every_command_in_the_readme_exists():
    """Catches a README that promises flags which are not there, in its blocks and in its tables."""
    commands = re.findall(r"python (lewm|probe|pusht)\.py ([^`#\"\n]*)", (HERE / "README.md").read_text())
    assert {file for file, _ in commands} == {"lewm", "probe", "pusht"} and len(commands) >= 20
    for file, arguments in commands:
        if arguments.split() != ["--help"]:
            {"lewm": lewm, "probe": probe, "pusht": pusht}[file].parse_arguments(arguments.split())
