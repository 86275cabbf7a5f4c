"""Tests of the files in this folder, with the helpers of ../test_lewm.py.

    pytest -q extras                            # from the project's folder; pytest -q there runs these, too
    pytest -q extras -k "not Slow"

Tests that read HDF5 or move MuJoCo's arms are skipped where these packages are missing.
"""

import ast
import dataclasses
import functools
import importlib
import inspect
import json
import math
import os
import re
import shlex
import shutil
import sys
import zlib
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image, ImageSequence
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parents[1]))

from test_lewm import (  # noqa: E402, F401   `recorded` is a fixture
    HERE, ONE_LINE, awake, counting_data, differing, imports_of, lewm, noise, random_pictures, readme,
    recorded, run_side_by_side, stops, tiny, tiny_model, with_nan)

if Path(lewm.__file__) != HERE / "lewm.py":
    pytest.skip("extras/ goes with the project's own lewm.py", allow_module_level=True)

if sys.platform == "linux":
    os.environ.setdefault("MUJOCO_GL", "egl")       # a second attempt to draw without a screen would crash

import probe  # noqa: E402
import pusht  # noqa: E402
from extras import (  # noqa: E402
    authors, compare, cube, dino_wm, models, mutate, planning, play, reacher, speed,  # noqa: E402
    torchworld, tworoom)

CPU = torch.device("cpu")
COURSE = (HERE / "extras" / "COURSE.md").read_text(encoding="utf-8")

def small_presets(monkeypatch):
    """Every preset becomes a small one that plans quickly, also with the full search."""
    search = dict(candidates=8, elites=4, iterations=2)
    small = tiny(embed_dim=24, **search)
    monkeypatch.setattr(lewm, "FULL_SEARCH", search)
    monkeypatch.setattr(
        lewm.Config, "preset", lambda name, **changes: dataclasses.replace(small, **changes))
    return small

# ======== The authors' weights ========================================================================
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
    authors.save_official(lewm.LeWM(lewm.Config()), path)
    layout = torch.load(path, weights_only=True)
    weights = {name: filled(name, tensor.shape) for name, tensor in layout.items()}
    torch.save(weights, path)
    return path, weights

class TestAuthorsWeightsSlow:
    def test_they_give_the_authors_numbers_under_all_their_names(self, full_size_weights):
        """Catches a wrong name, a swapped query and key, another norm, another history while planning: parity
        to 1e-4."""
        path, weights = full_size_weights
        assert len(weights) == 303 and "predictor.transformer.layers.5.mlp.net.4.weight" in weights
        model = authors.load_official(path)
        pixels = filled("pixels", (2, 3, 3, 224, 224))[:1]
        goal = filled("goal", (1, 1, 3, 224, 224))
        blocks = filled("actions", (2, 3, 10))[:1]
        plans = filled("candidates", (1, 4, 5, 10))
        with torch.no_grad():
            z = model.encode(pixels)
            z_hat = model.predict(z, blocks)
            ends = model.rollout(z[:, :1], plans)[:, :, -1]
            cost = (ends - model.encode(goal)).square().sum(-1)[0] / 100
        for name, ours, theirs in (("encode", z[0, 0, :8], OFFICIAL_ENCODE),
                                   ("predict", z_hat[0, 2, :8], OFFICIAL_PREDICT),
                                   ("rollout", ends[0, 0, :8], OFFICIAL_ROLLOUT),
                                   ("cost", cost, OFFICIAL_COST)):
            worst = np.abs(ours.numpy() - theirs).max()
            assert worst < 1e-4, f"{name}: {ours.numpy().round(5)}, the authors' code says {theirs}"

    def test_they_become_a_checkpoint_and_come_back_exactly(self, full_size_weights, tmp_path):
        """Catches a command that leaves out a tensor or the statistics of actions, and a checkpoint of
        another size."""
        path, weights = full_size_weights
        authors.main(["--weights-in", str(path), "--out", str(tmp_path / "c.pt")])
        model, _ = lewm.load_checkpoint(tmp_path / "c.pt")
        assert model.cfg == lewm.Config.preset("paper")
        stats = [[-0.0087, 0.0068], [0.2019, 0.2002], [-1, -1], [1, 1]]     # of the authors' Push-T data
        ours = [model.action_mean, model.action_std, model.action_low, model.action_high]
        assert torch.allclose(torch.stack(ours), torch.tensor(stats))
        authors.main(["--weights-out", str(tmp_path / "c.pt"), "--out", str(tmp_path / "back.pt")])
        back = torch.load(tmp_path / "back.pt", weights_only=True)
        assert back.keys() == weights.keys()
        assert all(torch.equal(back[name], weights[name]) for name in back), "the round trip is not exact"

class TestAuthorsWeights:
    @pytest.mark.parametrize("prefix", ["", "model."])
    @pytest.mark.parametrize("transformers, name", [
        (4, "encoder.encoder.layer.0.attention.attention.query.weight"),
        (5, "encoder.layers.0.attention.q_proj.weight")], ids=["transformers 4", "transformers 5"])
    def test_they_are_read_with_both_libraries_names_and_both_prefixes(
            self, tmp_path, transformers, name, prefix):
        """Catches a name that one version of the library has and the other has not."""
        cfg = tiny(embed_dim=24, whiten=False)
        model = awake(lewm.LeWM(cfg))
        authors.save_official(model, tmp_path / "w.pt", transformers)
        weights = torch.load(tmp_path / "w.pt", weights_only=True)
        assert name in weights
        torch.save({prefix + key: value for key, value in weights.items()}, tmp_path / "w.pt")
        statistics = torch.stack([model.action_mean, model.action_std, model.action_low, model.action_high])
        again = authors.load_official(tmp_path / "w.pt", cfg, statistics)
        assert not differing(model, again) and not again.training

    def test_a_proposal_is_left_out(self, tmp_path):
        """Catches weights that the authors' code cannot read."""
        model = tiny_model(embed_dim=24, whiten=False)
        plain = authors.official_weights(model)
        model.proposal = lewm.Proposal(model.cfg)
        assert authors.official_weights(model).keys() == plain.keys()

    def test_weights_that_do_not_fit_are_refused_with_a_full_list(self, tmp_path):
        """Catches loading with strict=False, and messages that name only the first problem."""
        cfg = tiny(embed_dim=24, whiten=False)
        authors.save_official(lewm.LeWM(cfg), tmp_path / "good.pt")
        weights = torch.load(tmp_path / "good.pt", weights_only=True)
        del weights["projector.net.0.bias"]
        weights.update({"pred_proj.net.3.bias": torch.zeros(5), "extra": torch.zeros(1)})
        torch.save(weights, tmp_path / "bad.pt")
        with pytest.raises(ValueError) as caught:
            authors.load_official(tmp_path / "bad.pt", cfg)
        for words in ("3 tensors", "missing: projector.net.0.bias [32]",
                      "pred_proj.net.3.bias is [5], not [24]", "unexpected: extra"):
            assert words in str(caught.value), str(caught.value)

    @pytest.mark.parametrize("changes, words", [
        (dict(embed_dim=24, whiten=True), "whiten must be off"),
        (dict(embed_dim=16, whiten=False), "embed_dim must equal predictor_width")])
    def test_weights_without_a_place_in_the_authors_layout_are_refused(self, changes, words, tmp_path):
        """Catches an export that silently leaves out the colours' statistics or the widening of
        embeddings."""
        with pytest.raises(ValueError, match=words):
            authors.save_official(tiny_model(**changes), tmp_path / "never.pt")
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize("flag", ["--weights-in", "--weights-out", "--hdf5"])
    def test_an_output_that_exists_is_refused(self, flag, tmp_path):
        """Catches a checkpoint that is written over."""
        (tmp_path / "taken").write_text("mine")
        with pytest.raises(ValueError, match="taken exists already"):
            authors.main([flag, "source", "--out", str(tmp_path / "taken")])
        assert (tmp_path / "taken").read_text() == "mine"

# ======== The authors' data ===========================================================================

def write_hdf5(path, columns, **compression):
    h5py = pytest.importorskip("h5py", reason="reading HDF5 is optional: pip install h5py hdf5plugin")
    pytest.importorskip("hdf5plugin", reason="reading HDF5 is optional: pip install h5py hdf5plugin")
    with h5py.File(path, "w") as file:
        for name, values in columns.items():
            more = compression if name == "pixels" else {}
            file.create_dataset(name, data=values, **more)

@pytest.fixture(scope="module")
def authors_columns(recorded):  # noqa: F811
    """The recorded episodes in the authors' layout: pictures, and NaN actions where an episode ends."""
    actions = with_nan(recorded["action"], np.cumsum(recorded["ep_len"]) - 1)
    return {"pixels": pusht.pictures(recorded["state"], 32), "action": actions, "state": recorded["state"],
            "proprio": recorded["state"][:, [0, 1, 5, 6]],
            "ep_len": recorded["ep_len"], "ep_offset": recorded["ep_offset"]}

class TestAuthorsData:
    def test_it_becomes_a_folder_from_both_layouts_also_after_a_kill(self, tmp_path, authors_columns):
        """Catches rows out of place, compressed pictures that cannot be read, NaN actions that break
        training, or an import that keeps half a chunk."""
        hdf5plugin = pytest.importorskip("hdf5plugin", reason="optional: pip install h5py hdf5plugin")
        lengths = authors_columns["ep_len"]
        indices = {name: authors_columns[name] for name in ("pixels", "action", "state", "proprio")}
        indices["episode_idx"] = np.repeat(np.arange(len(lengths)), lengths)
        indices["step_idx"] = np.concatenate([np.arange(length) for length in lengths])
        write_hdf5(tmp_path / "offsets.h5", authors_columns)
        write_hdf5(tmp_path / "indices.h5", indices, chunks=(50, 32, 32, 3), **hdf5plugin.Blosc())
        (tmp_path / "indices.partial").mkdir()              # what SIGKILL leaves behind
        (tmp_path / "indices.partial/pixels.npy").write_bytes(b"half a file")
        for name in ("offsets", "indices"):
            counts = authors.import_hdf5(tmp_path / f"{name}.h5", tmp_path / name, chunk=100)
            assert counts == (len(lengths), lengths.sum())
            data = pusht.load(tmp_path / name)
            assert set(data) == {"pixels", "action", "state", "ep_len", "ep_offset"}
            for column in data:
                nan = column == "action"
                assert np.array_equal(data[column], authors_columns[column], equal_nan=nan), column
        lewm.train(tiny(steps=2), data, device="cpu")

    @pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
    def test_an_import_that_fails_leaves_nothing_behind_and_can_be_repeated(
            self, error, tmp_path, authors_columns, monkeypatch):
        """Catches half a data set that looks like a whole one, and files of an earlier, killed import in this
        one."""
        write_hdf5(tmp_path / "source.h5", authors_columns)

        def stops_in_the_third_chunk(starts, *args, **kwargs):
            for count, start in enumerate(starts):
                if count == 2:
                    raise error
                yield start

        with monkeypatch.context() as patch, pytest.raises(type(error)):
            patch.setattr(authors, "tqdm", stops_in_the_third_chunk)
            authors.import_hdf5(tmp_path / "source.h5", tmp_path / "out", chunk=100)
        assert [path.name for path in tmp_path.iterdir()] == ["source.h5"]
        (tmp_path / "out.partial").mkdir()                  # SIGKILL cannot tidy up
        np.save(tmp_path / "out.partial/lesson.npy", np.zeros(3))
        authors.import_hdf5(tmp_path / "source.h5", tmp_path / "out", chunk=100)
        assert set(pusht.load(tmp_path / "out")) == {"pixels", "action", "state", "ep_len", "ep_offset"}
        assert {path.name for path in tmp_path.iterdir()} == {"source.h5", "out"}

    @pytest.mark.parametrize("name, words", [
        ("half", "half.h5 is .*damaged, cut short"), ("wrong", "wrong.h5"), ("mixed", "must lie together"),
        ("backwards", "in the order of"), ("poor", "lacks state"), ("none", "none.h5 is not there")])
    def test_what_cannot_be_read_is_refused(self, name, words, tmp_path, authors_columns):
        """Catches a file that was cut short, and episodes in pieces."""
        some = {name: authors_columns[name][:90] for name in ("pixels", "action")}
        rows = np.arange(90)
        columns = {"half": authors_columns, "wrong": some,
                   "mixed": {**some, "episode_idx": rows % 2, "step_idx": rows // 2},
                   "backwards": {**some, "episode_idx": 0 * rows, "step_idx": rows[::-1]},
                   "poor": {name: authors_columns[name] for name in ("action", "ep_len", "ep_offset")}}
        path = tmp_path / f"{name}.h5"
        write_hdf5(path, columns.get(name, {}))
        if name == "half":
            path.write_bytes(path.read_bytes()[:50_000])
        if name == "none":
            path.unlink()
        with pytest.raises((ValueError, OSError), match=words) as caught:
            authors.import_hdf5(path, tmp_path / "new")
        assert "\n" not in str(caught.value) and not list(tmp_path.glob("new*"))

    def test_a_disk_that_is_too_small_is_refused(self, tmp_path, authors_columns, monkeypatch):
        """Catches a full disk that is noticed after an hour."""
        write_hdf5(tmp_path / "good.h5", authors_columns)
        little = shutil.disk_usage(tmp_path)._replace(free=1_000_000)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: little)
        with pytest.raises(OSError, match=r"new needs 0.0 GB, its disk has 0.0 GB left"):
            authors.import_hdf5(tmp_path / "good.h5", tmp_path / "new")
        assert not list(tmp_path.glob("new*")), "nothing is written before the space is known to be there"

# ======== The simulator in the model's place ==========================================================

class TestSimulator:
    def test_it_imagines_what_happens(self, recorded):  # noqa: F811
        """Catches a perfect model that is none: one that loses the angle, the velocity or the scale of the
        actions."""
        states = torch.from_numpy(recorded["state"])
        actions = torch.from_numpy(recorded["action"])
        model = models.Simulator(lewm.Config(), lewm.action_statistics(recorded["action"]))
        for start in (0, 17):
            plans = model.to_blocks(actions[start:start + 25])[None, None]
            imagined = model.rollout(model.encode(states[None, start:start + 1]), plans)[0, 0]
            happened = model.encode(states[start + 5:start + 26:5])
            assert torch.allclose(imagined, happened, atol=0.02), "0.4 px, 0.4 degrees"
        for column, limit in ((0, 20), (4, math.radians(20))):
            other = states[0].clone()
            other[column] += limit
            distance = (model.encode(other) - model.encode(states[0])).norm()
            assert distance == pytest.approx(1, rel=0.02), "the rule's limit is a distance of 1"

    def test_it_plans_beside_the_baselines(self, tmp_path, monkeypatch):
        """Catches a part that breaks where nobody looks, since it takes minutes, and a planner that sees
        pictures."""
        collect = pusht.collect
        small = tiny(candidates=4, elites=2, iterations=1, budget=30)
        monkeypatch.setattr(pusht, "collect", lambda n, *args, **kw: collect(min(n, 20), *args, **kw))
        monkeypatch.setattr(lewm.Config, "preset", lambda *args, **kwargs: small)
        monkeypatch.setattr(pusht.PushT, "render", stops)
        compare.main(["simulator", "--pairs", "2", "--out", str(tmp_path)])
        policies = json.loads((tmp_path / "result.json").read_text())["simulator"]["policies"]
        assert {*policies} == {"simulator + CEM", "random actions", "doing nothing", "recorded actions"}
        assert policies["recorded actions"]["success"] == 1

# ======== The planner's parts =========================================================================

class TestPlanningPartsSlow:
    @pytest.mark.parametrize("what, rows", [("rollouts", 5), ("goals", 12), ("far", 12)])
    def test_each_table_is_measured_once(self, what, rows, tmp_path, monkeypatch):
        """Catches a row that breaks where nobody looks, since it takes an hour, and one measured again."""
        small = {"candidates": 4, "iterations": 1, "elites": 2}
        monkeypatch.setattr(lewm, "FULL_SEARCH", {"use_proposal": False, **small})
        monkeypatch.setattr(planning, "SEARCHES", {4: small, 8: {**small, "iterations": 2}})
        path = tmp_path / "model.pt"
        model = tiny_model(proposal_steps=1, proposal_horizon=15, **small)
        model.proposal = lewm.Proposal(model.cfg)
        lewm.save_checkpoint(path, model)
        argv = [str(path), what, "--pairs", "2", "--split", "dev", "--out", str(tmp_path)]
        planning.main(argv)
        table = json.loads((tmp_path / f"{what}.json").read_text())["rows"]
        assert len(table) == rows and all(len(row["won"]) == 2 for row in table.values())
        assert (tmp_path / "rollouts.png").exists() == (what == "rollouts")
        monkeypatch.setattr(planning, "measure", stops)
        planning.main(argv)
        with pytest.raises(ValueError, match=f"{what}.json is of .*use another --out"):
            planning.main([*argv, "--pairs", "3"])

    def test_goals_that_nobody_recorded_can_be_reached(self):
        """Catches goals beyond the T's reach, and pairs in which there is nothing to do."""
        starts, goals, actions = planning.aimless(3, "dev")
        for start, goal, sequence in zip(starts, goals, actions):
            assert np.array_equal(planning.walk(start, sequence), goal)
            assert not pusht.success(start, goal)

# ======== Other models ================================================================================

class TestModels:
    def test_the_terms_of_vicreg_have_known_answers(self):
        """Catches a batch that is pooled with time, a diagonal that counts, and collapse that goes
        unnoticed."""
        z = noise(3, 20_000, 4)                             # three groups of N(0, I)
        assert all(term < 0.01 for term in models.vicreg(z))
        points = 0 * z + torch.arange(3)[:, None, None]     # each group is one point
        variance, covariance = models.vicreg(points)
        assert variance == pytest.approx(0.99) and covariance < 1e-9
        variance, covariance = models.vicreg(z[..., :1].expand(-1, -1, 4))
        assert variance < 0.01 and covariance == pytest.approx(3, rel=0.05)     # 12 covariances of 1, by 4
        _, covariance = models.vicreg(torch.tensor([[[0.0, 0], [1, 1]]]))
        assert covariance == pytest.approx(0.25)            # two of 0.5, n - 1

    def test_pldm_is_trained_by_each_of_its_terms(self):
        """Catches a term without a gradient or a weight, a batch pooled with time, and half an input."""
        none = dict.fromkeys(models.PLDM_WEIGHTS, 0.0)
        model = models.PLDM(tiny(), none).eval()
        blocks = noise(4, 3, 10)
        brightness = torch.arange(4, dtype=torch.uint8)[:, None, None, None, None]
        pixels = random_pictures(4, 4, 3, 32, 32) // 4 * brightness
        least, parts = model.loss(pixels, blocks)
        _, plain = lewm.LeWM.latent_loss(model, model.encode(pixels), blocks)
        assert least == parts["prediction"] == plain["prediction"]
        assert {*models.PLDM_WEIGHTS, "std"} < {*parts}
        for name in models.PLDM_WEIGHTS:
            model.weights = {**none, name: 2.0}
            more = model.loss(pixels, blocks)[0] - least
            assert more.item() == pytest.approx(2 * parts[name].item(), abs=1e-5)
            gradient, = torch.autograd.grad(more, model.encoder.cls_token, retain_graph=True)
            assert gradient.abs().sum() > 0, name
        z = model.encode(pixels)
        smoothness = (z[:, 1:] - z[:, :-1]).square().mean().item()
        assert parts["smoothness"].item() == pytest.approx(smoothness)
        _, still = model.loss(pixels[:, :1].expand_as(pixels), blocks)      # only windows differ
        assert still["smoothness"] < 1e-9 and still["time variance"].item() == pytest.approx(0.99)
        assert still["variance"] < 0.98
        pixels[:, -1] = 255 - pixels[:, -1]
        assert model.loss(pixels, blocks)[1]["inverse dynamics"] != parts["inverse dynamics"]

    def test_the_ablated_models_lack_what_their_names_say(self):
        """Catches BatchNorm left in one projector, and an appended action that modulates or has no effect."""
        kinds = {type(part) for part in models.LayerNorms(tiny()).modules()}
        assert torch.nn.BatchNorm1d not in kinds and torch.nn.LayerNorm in kinds
        cfg = tiny()
        model = models.AppendedAction(cfg).eval()
        z = noise(2, 3, cfg.embed_dim)
        blocks = noise(2, 3, 10, seed=1)
        assert (model.predict(z, blocks) - model.predict(z, -blocks)).abs().max() > 0.01    # at once
        x = noise(2, 3, cfg.predictor_width)
        layer = model.predictor.layers[0]
        expected = x + layer.attn(layer.norm1(x))
        expected = expected + layer.mlp(layer.norm2(expected))
        torch.testing.assert_close(layer(x, noise(*x.shape, seed=2)), expected)
        assert not any(p.requires_grad for p in layer.adaLN_modulation.parameters())

    @pytest.mark.parametrize("kind", [models.PLDM, models.LayerNorms, models.AppendedAction])
    def test_they_resume_exactly(self, kind, tmp_path):
        """Catches a subclass whose checkpoint cannot be read again."""
        cfg = tiny(image_size=8, patch_size=8, steps=4, checkpoint_minutes=0)

        def run(folder, batches=99):
            torch.manual_seed(0)
            model = kind(cfg)
            loss = model.loss
            counted = iter(range(batches))
            model.loss = lambda *batch: loss(*batch) if next(counted, None) is not None else stops()
            return lewm.train(cfg, counting_data(), folder, resume=True, device="cpu", model=model)

        with pytest.raises(ZeroDivisionError):
            run(tmp_path / "stopped", batches=2)
        assert not differing(run(tmp_path / "stopped"), run(tmp_path / "whole"))

# ======== Comparisons =================================================================================

class TestCompare:
    def test_it_trains_both_models_once_and_refuses_other_settings(self, tmp_path, monkeypatch):
        """Catches a model compared with itself, minutes spent twice, and old numbers taken for new ones."""
        small_presets(monkeypatch)
        few = probe.trajectories(8, tiny())
        monkeypatch.setattr(probe, "trajectories", lambda *args: few)
        pldm = functools.partial(compare.pldm, tmp_path, "cpu", train_episodes=12)
        rows = pldm(pairs=2, steps=2)
        assert list(rows) == ["LeWM", "PLDM"] and rows["LeWM"] != rows["PLDM"]
        for row in rows.values():
            success, low, high = row["success"]
            assert 0 <= low <= success <= high <= 1
        assert (tmp_path / "pldm.png").read_bytes()[:4] == b"\x89PNG"
        monkeypatch.setattr(lewm, "train", None)            # again: nothing is trained
        assert pldm(pairs=2, steps=2) == rows
        with pytest.raises(ValueError, match="trial.json has other steps: use another --out"):
            pldm(pairs=2, steps=3)
        with pytest.raises(ValueError, match="has other pairs"):
            pldm(pairs=3, steps=2)
        trial = tmp_path / "PLDM/trial.json"
        saved = json.loads(trial.read_text())
        del saved["row"]                                    # as one that was stopped in mid-training
        trial.write_text(json.dumps(saved))
        monkeypatch.setitem(models.PLDM_WEIGHTS, "variance", 9.0)
        with pytest.raises(ValueError, match="has other weights"):
            pldm(pairs=2, steps=2)

    def test_each_ablation_differs_from_the_default_as_its_name_says(self, tmp_path, monkeypatch):
        """Catches a row that is the default again, another row's model, data that differ, and a lost seed."""
        seen = {}

        def trial(setting, name, kind=lewm.LeWM, **changes):
            seen[name] = setting, kind, vars(dataclasses.replace(setting.cfg, **changes))
            return {"success": [0, 0, 1]}

        monkeypatch.setattr(compare, "trial", trial)
        rows = compare.ablations(tmp_path, "cpu", pairs=2)
        assert list(seen) == list(rows) and len(rows) == 2 * len(compare.ABLATIONS) == 20
        assert len({str(row) for row in seen.values()}) == 20
        assert len({id(setting) for setting, _, _ in seen.values()}) == 1
        default = vars(lewm.Config.preset("nano"))
        for name, (_, kind, cfg) in seen.items():
            changed = {field for field in cfg if default[field] != cfg[field]} - {"seed"}
            assert len(changed) + (kind is not lewm.LeWM) == (not name.startswith("as it is")), name
            assert name.endswith(f"seed {cfg['seed']}")

    def test_without_a_first_lesson_the_second_is_the_data(self, tmp_path, monkeypatch):
        """Catches a row that is trained on easy episodes, too, or refused for its column of lessons."""
        lessons = {"lesson": np.array([0, 1, 1]), "ep_len": np.array([5, 6, 7])}
        lessons["ep_offset"] = np.array([0, 5, 11])
        monkeypatch.setattr(pusht, "collect_lessons", lambda *args: lessons)
        setting = compare.Setting(tmp_path, "cpu")
        assert setting.data(tiny(first_lesson_share=0.5)) is lessons
        data = setting.data(tiny(first_lesson_share=0.0))
        assert data["ep_len"].tolist() == [6, 7] and data["ep_offset"].tolist() == [5, 11]
        assert "lesson" not in data

    @pytest.mark.parametrize("summit", [0.004, 0.12, 3.0])
    def test_the_search_for_lambda_closes_in_on_the_best(self, summit, tmp_path, monkeypatch):
        """Catches a range that is cut on the wrong side, and places that are tried twice."""
        tried = []

        def hill(setting, name, sigreg_weight):
            tried.append(sigreg_weight)
            away = abs(math.log(sigreg_weight / summit))
            return {"success": [math.exp(-away), 0, 1], "effective_rank": 1, "px_to_goal": away}

        monkeypatch.setattr(compare, "trial", hill)
        rows = compare.search_lambda(tmp_path, "cpu", runs=7, pairs=2)
        assert list(rows) == sorted(tried) and len(tried) == 7
        best = min(rows, key=lambda weight: rows[weight]["px_to_goal"])
        assert abs(math.log10(best / summit)) < 4 * 0.618 ** 6
        assert (tmp_path / "lambda.png").read_bytes()[:4] == b"\x89PNG"

    def test_the_multiply_adds_of_dino_wm_and_lewm_are_those_that_are_counted(self, monkeypatch):
        """Catches a wrong formula, and plans that are timed without a part of them."""
        def counted(work):                                  # "seconds" are multiply-adds
            with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
                work()
            return counter.get_total_flops() / 2

        small = small_presets(monkeypatch)
        monkeypatch.setattr(dino_wm, "PATCHES", 3)
        monkeypatch.setattr(dino_wm, "seconds_a_call", counted)
        result = dino_wm.dino_wm(None, "cpu", candidates=(8, 4))
        for name in ("LeWM", "DINO-WM"):
            row = result[name]
            count = row["multiply-adds of an imagined frame"]
            ours = row["ms for an imagined frame"] / 1000
            assert ours == pytest.approx(count, rel=0.005), "the distance to the goal is not in the formula"
            of_plan = ours * small.horizon * small.candidates * small.iterations
            assert row["minutes for a plan"] == pytest.approx(of_plan / 60)

    @pytest.mark.parametrize("argv, words", [
        ("", "what"), ("everything", "everything"), ("dino-wm --steps 3", "dino-wm takes no --steps"),
        ("simulator --train_episodes 3", "simulator takes no --train_episodes"),
        ("pldm --steps 0", "--steps is 0"), ("pldm --seed 1", "--seed")])
    def test_what_is_impossible_is_refused(self, argv, words):
        """Catches hours of work before a wrong flag is noticed, and tracebacks."""
        with pytest.raises(ONE_LINE) as caught:
            compare.main(argv.split())
        assert words in str(caught.value) and "\n" not in str(caught.value), str(caught.value)

# ======== Speed =======================================================================================

class TestSpeedSlow:
    def test_it_is_that_of_the_projects_own_code(self, monkeypatch):
        """Catches a part that is timed as zero, and a training that is not stopped."""
        calls = []
        step = speed.seconds_a_step
        monkeypatch.setattr(speed, "seconds_a_call", lambda work: calls.append(work()) or 0.5)
        monkeypatch.setattr(speed, "seconds_a_step", lambda *setup: step(*setup, least=0.0))
        rows = speed.speed("smoke", CPU)
        gradient = rows.pop("ms of its gradient, not compiled")
        assert gradient == 0, "the loss takes as long with it as without"
        assert len(calls) == 7 and all(0 < value < math.inf for value in rows.values()), rows
        assert rows["ms of a plan"] == rows["ms of the loss, not compiled"] == 500
        assert rows["ms of a step"] == pytest.approx(1000 / rows["training steps a second"])
        assert rows["pictures drawn a second"] == 512       # 256 in half a second, 32 x 4 in a step
        assert rows["ms of drawing its pictures"] == 250

    def test_growth_is_that_of_the_setting_that_grows(self, tmp_path, monkeypatch):
        """Catches a setting that is not passed on, and a plan that is timed as a training step."""
        def counted(work):                                  # "seconds" are floating-point operations
            with FlopCounterMode(display=False) as counter:
                work()
            return counter.get_total_flops()

        monkeypatch.setattr(speed, "seconds_a_call", counted)
        result = speed.growth(tiny(), CPU)
        assert [*result["image_size"]] == [16, 32, 64, 112]
        for setting, rows in result.items():
            trains = setting in ("image_size", "batch_size")
            seconds = [row["seconds of a step" if trains else "seconds of a plan"] for row in rows.values()]
            assert seconds == sorted(set(seconds)) and len(seconds) == 4, setting
        row, twice = result["batch_size"][64], result["batch_size"][128]
        assert twice["seconds of a step"] == 2 * row["seconds of a step"]
        assert 1.5 < twice["GB for its gradient"] / row["GB for its gradient"] < 2     # weights are kept, too
        speed.draw_growth(tmp_path / "growth.png", result)
        assert (tmp_path / "growth.png").read_bytes()[:4] == b"\x89PNG"

class TestSpeed:
    def test_the_memory_that_a_gradient_needs_is_counted_once(self):
        """Catches a tensor that is counted twice, or none."""
        x = torch.zeros(1000, requires_grad=True)
        assert speed.kept_bytes(lambda: x * x) == 4000 and speed.kept_bytes(lambda: x + x) == 0
        assert speed.kept_bytes(lambda: (x * x) * x) == 8000
        assert speed.kept_bytes(lambda: x[:500] * x[500:]) == 4000      # two views of one memory

class TestTorchWorld:
    def test_both_do_the_same_work_at_the_papers_sizes(self):
        """Catches sizes that are not passed on, and a plan or a step that one of the two does not make."""
        pytest.importorskip("torch_world.models", reason="torch-world is optional")
        models = torchworld.models(lewm.Config.preset("paper"))
        ours, theirs = (sum(p.numel() for p in model.parameters()) for model in models)
        assert abs(ours / theirs - 1) < 0.01
        cfg = tiny(encoder_width=24, embed_dim=24, iterations=1)
        for what, functions in torchworld.works(cfg).items():
            seconds, (ours, theirs) = torchworld.take_turns(functions, 2)
            assert 0.8 < ours / theirs < 1.05 and (seconds > 0).all(), what

# ======== Mutants =====================================================================================

class TestMutantsSlow:
    def test_each_differs_from_the_file_in_one_place(self):
        """Catches a mutant that changes nothing, one that is no Python, and sections that are left out."""
        source = (HERE / "lewm.py").read_text(encoding="utf-8")
        places = mutate.places(source)
        assert {section for _, section, *_ in places} == {*"23456789"} and len(places) > 800
        plain = ast.unparse(ast.parse(source))
        for place in places[::100]:
            changed, before, after = mutate.mutant(source, *place[2:4])
            compile(changed, "mutant", "exec")
            assert changed != plain, place

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="mutants run in forked processes")
    def test_a_mistake_is_noticed_and_the_file_itself_is_right(self, tmp_path):
        """Catches a search for survivors that finds none because every run fails."""
        source = (HERE / "lewm.py").read_text(encoding="utf-8")
        wrong = source.replace("return len(z) * (error", "return (error")
        (tmp_path / "right.py").write_text(source, encoding="utf-8")
        (tmp_path / "wrong.py").write_text(wrong, encoding="utf-8")
        call = "from extras import mutate; print(mutate.fails({!r} + '.py', 'SIGReg', 300))"
        calls = [("-c", call.format(str(tmp_path / name))) for name in ("right", "wrong")]
        runs = run_side_by_side(calls, cwd=HERE, OMP_NUM_THREADS="1")     # a process without threads can fork
        for run, expected in zip(runs, ("False", "True")):
            assert run.stdout.split()[-1:] == [expected], run.stderr

# ======== Play ========================================================================================

class TestPlay:
    def test_a_goal_is_dragged_turned_and_planned_for(self, monkeypatch):
        """Catches pixels of the window for those of the board, a drag of the wrong part, and no plan."""
        figure = Figure(figsize=(4, 2))
        model = tiny_model(candidates=4, elites=2, iterations=1, horizon=1)
        board = play.Board(model, figure)
        canvas = figure.canvas
        monkeypatch.setattr(canvas, "start_event_loop", lambda seconds: None)
        monkeypatch.setattr(canvas, "flush_events", lambda: None)

        def event(x, y, step=0):
            place = (x * play.SIZE / pusht.BOARD, y * play.SIZE / pusht.BOARD)
            return mock.Mock(inaxes=board.axes[0], xdata=place[0], ydata=place[1], step=step)

        start = board.state
        board.goal = np.array([100.0, 100, 256, 256, 0, 0, 0])
        board.press(event(105, 95))
        board.move(event(60, 400))
        assert np.allclose(board.goal, [60, 400, 256, 256, 0, 0, 0])
        board.turn(event(9, 9, step=-1))
        assert board.goal[4] == pytest.approx(np.radians(350))
        board.release(event(0, 0))
        assert board.axes[1].get_title().startswith("not reached: agent") and (board.state != start).any()
        board.press(event(300, 300))
        board.move(event(60, 390))
        moved = board.state
        board.release(event(60, 390))
        assert np.allclose(board.goal[:4], [60, 400, 60, 390]) and board.state is moved
        assert "on the T" in board.axes[1].get_title()

    def test_where_no_window_can_be_opened_it_says_what_to_do_instead(self, monkeypatch, tmp_path):
        """Catches a program that waits without a window, or ends without a word."""
        monkeypatch.setenv("MPLBACKEND", "agg")
        lewm.save_checkpoint(tmp_path / "c.pt", tiny_model())
        with pytest.raises(ValueError, match="no window can be opened here; python lewm.py --eval .*--goal"):
            play.main([str(tmp_path / "c.pt")])

# ======== Worlds ======================================================================================

class TestOtherWorldsSlow:
    def test_two_rooms_are_recorded_trained_and_planned_in(self, tmp_path, monkeypatch, capsys):
        """Catches Push-T in the training or the planner, and an example that does not run as it stands."""
        preset = lewm.Config.preset
        monkeypatch.setattr(
            lewm.Config, "preset", lambda name, **changes: preset(name, **{**changes, "proposal_steps": 2}))
        monkeypatch.setattr(lewm, "FULL_SEARCH", {"use_proposal": False, "iterations": 1})
        won = tworoom.main(walks=20, steps=2, pairs=3, out=tmp_path)
        planners = ["LeWM + CEM", "proposal alone", "search alone", "search, p = 1"]
        assert list(won) == [*planners, "random actions", "doing nothing", "recorded actions"]
        assert won["recorded actions"].tolist() == [True] * 3 and not won["doing nothing"].any()
        assert capsys.readouterr().out.count("95 % interval") == 7
        assert {path.name for path in tmp_path.iterdir()} == {"checkpoint.pt", "metrics.csv", "plan.gif"}

class TestOtherWorlds:
    def test_the_dot_goes_through_the_door_and_not_through_the_wall(self):
        """Catches a wall that lets the dot through, and a door that does not."""
        xy = np.array([[0.4, 0.5], [0.4, 0.8]])
        for _ in range(5):
            xy = tworoom.move(xy, np.array([[1.0, 0], [1.0, 0]]))
        assert xy[0, 0] > 0.6 and xy[1, 0] < 0.5

    @pytest.mark.parametrize("world", [tworoom, reacher, cube])
    def test_a_film_shows_each_episode_to_its_end_above_its_goal(self, world, tmp_path):
        """Catches a film that stops where the shortest episode does, and a goal of another episode."""
        class Frames:
            def __init__(self, greys):
                self.frames = [np.full((64, 64, 3), grey, np.uint8) for grey in greys]

            def render(self):
                self.frames.append(np.full((64, 64, 3), 240, np.uint8))

        same = inspect.getsource(world.film) == inspect.getsource(tworoom.film)
        assert same, "each world must run alone, so there are three copies"
        goals = [np.full((64, 64, 3), grey, np.uint8) for grey in (50, 100)]
        world.film(tmp_path / "new" / "plan.gif", [Frames([10]), Frames([20, 30])], goals)
        seen = []
        with Image.open(tmp_path / "new" / "plan.gif") as gif:
            for image in ImageSequence.Iterator(gif):
                grey = np.asarray(image.convert("L"))
                seen.append([grey[row, column] for row in (66, 198) for column in (66, 198)])
        assert np.allclose(seen, [[10, 20, 50, 100], [240, 30, 50, 100], [240, 240, 50, 100]], atol=2)

    @pytest.mark.parametrize("name", ["tworoom", "reacher", "cube"])
    def test_a_world_needs_nothing_but_lewm(self, name):
        """Catches an example that cannot be copied beside lewm.py."""
        ours = {path.stem for path in HERE.glob("*.py")} | {"extras"}
        assert imports_of(HERE / f"extras/{name}.py") & ours == {"lewm"}

@pytest.fixture(scope="module")
def arm():
    try:
        shared = reacher.make_arm()
    except Exception as error:
        pytest.skip(f"no MuJoCo, or nothing can be drawn here: {error}")
    return shared

class TestReacherSlow:
    def test_it_is_recorded_trained_and_planned_in(self, arm, tmp_path, monkeypatch, capsys):
        """Catches an environment that starts elsewhere than its episode, pairs that doing nothing solves, and
        rows of other planners than they say."""
        preset = lewm.Config.preset
        monkeypatch.setitem(lewm.FULL_SEARCH, "iterations", 1)
        monkeypatch.setattr(
            lewm.Config, "preset", lambda name, **changes: preset(name, **{**changes, "proposal_steps": 2}))
        won = reacher.main(episodes=4, steps=2, pairs=2, out=tmp_path)
        assert len(won) == 7 and won["recorded torques"].tolist() == [True] * 2 and not won["no torque"].any()
        assert (tmp_path / "plan.gif").exists()
        assert capsys.readouterr().out.count("0.15 rad") == 7

    def test_it_is_reached_at_any_moment_when_both_joints_are_near_and_not_a_turn_away(self, arm):
        """Catches one joint that is enough, an angle that wraps, and a look at the end of a block alone."""
        still = np.zeros(10)
        for off, expected in (([0.04, -0.04], True), ([0.04, 0.06], False), ([2 * np.pi, 0], False)):
            env = reacher.Reacher(arm, [1.0, 0.5, 0, 0], np.add([1.0, 0.5], off))
            nearest, _, reached, _, _ = env.step(still)
            assert reached == expected and abs(nearest - np.abs(off).max()) < 1e-3
        env = reacher.Reacher(arm, np.zeros(4), np.zeros(2))
        _, _, reached, _, _ = env.step(np.full(10, 0.2))
        assert reached and abs(env.data.qpos).max() > 0.05          # it has left again

    def test_a_torque_lasts_two_time_steps_and_is_no_larger_than_1(self, arm):
        """Catches another time step or control rate than the authors', and torques that nothing limits."""
        ends = []
        for torque in (1.0, 9.0):
            env = reacher.Reacher(arm, np.zeros(4), np.zeros(2))
            env.step(np.full(10, torque))
            ends.append(env.data.qpos.copy())
        assert np.array_equal(*ends) and math.isclose(env.data.time, 5 * 0.04)

    def test_the_picture_shows_a_turn_of_less_than_a_pixel_and_not_the_goal(self, arm):
        """Catches hard edges: 0.05 rad of the wrist move the finger by half a pixel. And a goal in view."""
        first = reacher.Reacher(arm, [1.0, 0.5, 0, 0], np.zeros(2)).render()
        again = reacher.Reacher(arm, [1.0, 0.5, 0, 0], np.ones(2)).render()
        turned = reacher.Reacher(arm, [1.0, 0.53, 0, 0], np.zeros(2)).render()
        assert first.shape == (64, 64, 3) and np.array_equal(first, again)
        assert (first != turned).any()

@pytest.fixture(scope="module")
def robot():
    try:
        shared = cube.make_arm()
        cube.picture(shared)
    except Exception as error:
        pytest.skip(f"no OGBench, or nothing can be drawn here: {error}")
    return shared

class TestCubeSlow:
    def test_a_replay_is_exact_and_the_cube_is_seen_where_it_is(self, robot):
        """Catches a start that is not quite its episode's, a picture of another state, and swapped views."""
        pixels, states, actions = cube.record(robot, 2, seed=5)
        world = cube.Cube(robot, states[40], goal=np.full(3, np.inf))
        for row in range(40, 60):
            assert np.array_equal(world.state, states[row]) and np.array_equal(world.render(), pixels[row])
            world.step(actions[row])
        red = 1.0 * (pixels[..., 0] > 80)
        rows, columns = np.mgrid[:64, :64]
        x, y, z = states[:, cube.CUBE].T
        above = (slice(0, 32), slice(0, 64)), 15.5 + 78 * (x - 0.425), 31.5 + 78 * y
        front = (slice(32, 64), slice(0, 32)), 47.5 - 78 * (z - 0.19), 15.5 + 39 * y
        for view, row, column in (above, front):
            seen = red[:, *view] / red[:, *view].sum((1, 2), keepdims=True)
            assert abs((seen * rows[view]).sum((1, 2)) - row).max() < 1.5
            assert abs((seen * columns[view]).sum((1, 2)) - column).max() < 1.5
        near = red[:, 32:, 32:].sum((1, 2))
        assert near.min() == 0 and 100 < near.max() < 200, "around the gripper the cube has 11 x 11 px"

    def test_it_is_recorded_trained_and_planned_in(self, robot, tmp_path, monkeypatch, capsys):
        """Catches an example that does not run as it stands."""
        monkeypatch.setitem(lewm.PRESETS["nano"], "proposal_steps", 2)
        monkeypatch.setitem(lewm.FULL_SEARCH, "iterations", 1)
        won = cube.main(episodes=2, steps=2, pairs=3, out=tmp_path)
        assert len(won) == 6 and won["recorded actions"].tolist() == [True] * 3
        assert (tmp_path / "plan.gif").exists()
        assert re.search(r"recorded actions +all +100.0% of 3 ", capsys.readouterr().out)

# ======== README ======================================================================================

class TestExtrasReadme:
    def test_every_test_that_the_course_names_exists(self):
        """Catches an exercise that sends a student to a test of an earlier version."""
        here = (HERE / "test_lewm.py").read_text(encoding="utf-8")
        named = re.findall(r"`(Test\w+)\.(test_\w+)`", COURSE)
        assert len(named) > 5
        for unit, name in named:
            assert re.search(rf"class {unit}:(?:(?!\nclass ).)*def {name}\(", here, re.S), f"{unit}.{name}"

    def test_every_command_exists(self):
        """Catches a README that promises flags which are not there, in its blocks and in its tables."""
        text = readme() + readme("extras") + COURSE
        commands = re.findall(r"python -m extras\.(\w+) ?([^`#\"\n|;&]*)", text)
        files = "authors compare cube mutate planning play reacher speed torchworld tworoom"
        assert {name for name, _ in commands} == set(files.split())
        for name, arguments in commands:
            argv = shlex.split(arguments)
            module = importlib.import_module(f"extras.{name}")
            if hasattr(module, "parse_arguments") and argv != ["--help"]:
                module.parse_arguments(argv)
            source = Path(module.__file__).read_text(encoding="utf-8")
            for flag in set(re.findall(r"--\w[\w-]*", arguments)) - {"--help"}:
                assert f'"{flag}"' in source, f"extras/{name}.py has no {flag}"
        for file, arguments in re.findall(r"python (lewm|probe|pusht)\.py ([^`#\"\n|;&]*)", text):
            {"lewm": lewm, "probe": probe, "pusht": pusht}[file].parse_arguments(shlex.split(arguments))
