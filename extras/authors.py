"""The authors' files: their weights become a checkpoint and back, their data sets become a folder.

    python -m extras.authors --weights-in weights.pt --out runs/authors/checkpoint.pt
    python -m extras.authors --weights-out runs/authors/checkpoint.pt --out weights.pt
    python -m extras.authors --hdf5 FILE.h5 --out data/expert           # pip install h5py hdf5plugin

An output that exists is never overwritten. Needs lewm.py alone.
"""

import argparse
import shutil
import sys
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import lewm

# ======== Weights =====================================================================================
# Tables from names here to the authors' names. {} is replaced by query, key and value: theirs are three
# matrices, ours is one.

PREDICTOR_NAMES = {
    "projector.": "projector.net.",
    "pred_proj.": "pred_proj.net.",
    "predictor.norm.": "predictor.transformer.norm.",
    ".layers.": ".transformer.layers.",
    ".mlp.": ".mlp.net.",
    ".attn.0.": ".attn.norm.",
    ".attn.1.to_qkv.": ".attn.to_qkv.",
    ".attn.1.to_out.": ".attn.to_out.0."}
VIT_NAMES = {
    ".cls_token": ".embeddings.cls_token",
    ".pos_embedding": ".embeddings.position_embeddings",
    ".patch_embed.": ".embeddings.patch_embeddings.projection.",
    ".norm.": ".layernorm.",
    ".norm1.": ".layernorm_before.",
    ".norm2.": ".layernorm_after."}
TRANSFORMERS_4 = {
    ".layers.": ".encoder.layer.",
    ".attn.to_qkv.": ".attention.attention.{}.",
    ".attn.to_out.": ".attention.output.dense.",
    ".mlp.0.": ".intermediate.dense.",
    ".mlp.2.": ".output.dense."}
TRANSFORMERS_5 = {
    ".attn.to_qkv.": ".attention.{}_proj.",
    ".attn.to_out.": ".attention.o_proj.",
    ".mlp.0.": ".mlp.fc1.",
    ".mlp.2.": ".mlp.fc2."}
# by the version of transformers that the weights were saved with
ENCODER_NAMES = {4: {**VIT_NAMES, **TRANSFORMERS_4}, 5: {**VIT_NAMES, **TRANSFORMERS_5}}
PARTS_OF_QKV = {4: ("query", "key", "value"), 5: ("q", "k", "v")}
EXPERT_ACTION_STATS = [[-0.0087, 0.0068], [0.2019, 0.2002], [-1.0, -1.0], [1.0, 1.0]]   # of their Push-T data

def official_weights(model, transformers=4):
    """{the authors' name: tensor}. The tensors are views of the model's: writing into them changes it. What
    helps the planner alone, a proposal, is left out."""
    lewm.require(not model.cfg.whiten, "whiten must be off: their layout has no place for its statistics")
    same_width = model.cfg.embed_dim == model.cfg.predictor_width
    lewm.require(same_width, "embed_dim must equal predictor_width: their layout has no predictor.widen")
    statistics = dict(model.named_buffers(recurse=False))           # not in the authors' files
    weights = {}
    for name, x in model.state_dict().items():
        table = ENCODER_NAMES[transformers] if name.startswith("encoder.") else PREDICTOR_NAMES
        theirs = name
        for here, there in table.items():
            theirs = theirs.replace(here, there)
        if "{}" in theirs:
            for part, matrix in zip(PARTS_OF_QKV[transformers], x.chunk(3)):
                weights[theirs.format(part)] = matrix
        elif name == "action_encoder.patch_embed.weight":
            weights[theirs] = x[..., None]                          # theirs is a Conv1d: one axis more
        elif name not in statistics and not name.startswith("proposal."):
            weights[theirs] = x
    return weights

def differences(given, wanted):
    """Two dictionaries of tensors -> a list of texts, one for each tensor that `given` has not as wanted."""
    texts = []
    for name, x in wanted.items():
        shape = [*getattr(given.get(name), "shape", [])]
        if name not in given:
            texts.append(f"missing: {name} {[*x.shape]}")
        elif not torch.is_tensor(given[name]) or shape != [*x.shape]:
            texts.append(f"{name} is {shape}, not {[*x.shape]}")
    return texts + [f"unexpected: {name}" for name in given if name not in wanted]

def load_official(path, cfg=None, action_stats=EXPERT_ACTION_STATS, device="cpu"):
    """The authors' weights, saved with transformers 4 or 5 -> LeWM in evaluation mode. cfg: of the same
    sizes, by default the paper's. action_stats (4,a): mean, std, lowest and highest of their raw actions."""
    model = lewm.LeWM(cfg or lewm.Config())
    content = lewm.read_weights(path)
    content = content.get("state_dict", content)                    # as in a checkpoint of Lightning
    given = {str(name).removeprefix("model."): x for name, x in content.items()}
    version = 5 if any("encoder.layers." in name for name in given) else 4
    wanted = official_weights(model, version)
    wrong = differences(given, wanted)
    lewm.require(not wrong, f"{path} does not fit, {len(wrong)} tensors are wrong: {'; '.join(wrong[:9])}")
    for name, x in wanted.items():
        x.copy_(given[name])
    for name, numbers in zip(("mean", "std", "low", "high"), torch.as_tensor(action_stats)):
        getattr(model, f"action_{name}").copy_(numbers)
    return model.to(device).eval()

def save_official(model, path, transformers=4):
    """Write the weights in the authors' layout, with the names of transformers 4 or 5."""
    weights = official_weights(model, transformers)
    with lewm.replacing(path) as partial:
        torch.save({name: x.cpu().clone() for name, x in weights.items()}, partial)

# ======== Data ========================================================================================
# HDF5 files hold pixels (R,S,S,3) uint8, action (R,a), maybe state, and either ep_len and ep_offset (E,), or
# episode_idx and step_idx (R,). They become a folder of .npy files, which pusht.load maps into memory.

def open_hdf5(source):
    try:
        import h5py
        import hdf5plugin  # noqa: F401   importing it registers the decompressors
    except ImportError as error:
        raise ValueError("reading HDF5 needs two more packages: pip install h5py hdf5plugin") from error
    try:
        return h5py.File(source, "r")
    except OSError as error:
        raise ValueError(f"{source} is not there, damaged, cut short or no HDF5 file ({error})") from error

def read(file, column, rows=slice(None)):
    """Rows of a column. A read error becomes a ValueError: it must not look like a full disk."""
    try:
        return file[column][rows]
    except (OSError, KeyError, RuntimeError) as error:
        raise ValueError(f"{file.filename}: cannot read {column} ({error})") from error

def episodes_of(file):
    """-> ep_len, ep_offset, int64 (E,) each."""
    if "ep_len" in file:
        length = read(file, "ep_len").reshape(-1).astype(np.int64)
        return length, read(file, "ep_offset").reshape(-1).astype(np.int64)
    episode = read(file, "episode_idx").reshape(-1)
    step = read(file, "step_idx").reshape(-1)
    offset = np.flatnonzero(np.diff(episode, prepend=episode[0] - 1))
    length = np.diff(offset, append=len(episode))
    together = len(np.unique(episode)) == len(length)
    in_order = (np.diff(step)[np.diff(episode) == 0] == 1).all()
    lewm.require(together and in_order,
                 f"{file.filename}: rows of an episode must lie together, in the order of step_idx")
    return length, offset

def write_column(file, column, array, path, chunk):
    """Write what np.save would write, `chunk` rows at a time."""
    with open(path, "wb") as target:
        header = np.lib.format.header_data_from_array_1_0(array)
        np.lib.format.write_array_header_1_0(target, header)
        for begin in tqdm(range(0, len(array), chunk), desc=f"importing {column}"):
            rows = read(file, column, slice(begin, begin + chunk))
            target.write(rows.astype(array.dtype).tobytes())

def import_hdf5(source, out, chunk=1024):
    """Convert an HDF5 file in the authors' layout to a folder -> (episodes, rows). `chunk` rows are in memory
    at a time. The folder appears when it is complete."""
    out = Path(out)
    lewm.require(not out.exists(), f"{out} exists already: choose another --out, or delete it")
    file = open_hdf5(source)
    data = {"action": read(file, "action").astype(np.float32)}
    data["ep_len"], data["ep_offset"] = episodes_of(file)
    # stand-ins of the right shape that take no memory, so that everything is checked before it is written
    large = {}
    for column, kind in {"pixels": None, "state": np.float32}.items():
        if column in file:
            zero = np.zeros((), kind or file[column].dtype)
            large[column] = np.broadcast_to(zero, file[column].shape)
    lewm.check_data({**large, **data}, lewm.Config(action_dim=data["action"].shape[-1]))
    partial = Path(f"{out}.partial")
    shutil.rmtree(partial, ignore_errors=True)                      # of a process that was killed
    partial.mkdir(parents=True)
    try:
        needed = sum(array.nbytes for array in large.values())
        free = shutil.disk_usage(partial).free
        if needed > free:
            raise OSError(f"{out} needs {needed / 1e9:.1f} GB, its disk has {free / 1e9:.1f} GB left")
        for column, array in data.items():
            np.save(partial / f"{column}.npy", array)
        for column, array in large.items():
            write_column(file, column, array, partial / f"{column}.npy", chunk)
        partial.replace(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return len(data["ep_len"]), len(data["action"])

# ======== Command line ================================================================================

def parse_arguments(argv):
    parser = argparse.ArgumentParser(description="The authors' weights and data.", allow_abbrev=False)
    parser.error = lambda text: sys.exit(f"authors.py: {text}; see python -m extras.authors --help")
    flag = parser.add_mutually_exclusive_group(required=True).add_argument
    flag("--weights-in", metavar="FILE", help="the authors' weights, to become a checkpoint")
    flag("--weights-out", metavar="CKPT", help="a checkpoint of the preset paper, to become such weights")
    flag("--hdf5", metavar="FILE.h5", help="a data set of theirs, to become a folder for lewm.py --data")
    parser.add_argument("--out", required=True, metavar="PATH", help="what to write; it must not exist yet")
    return parser.parse_args(argv)

def main(argv):
    given = parse_arguments(argv)
    out = Path(given.out)
    lewm.require(not out.exists(), f"{out} exists already: choose another --out, or delete it")
    if given.weights_in:
        model = load_official(given.weights_in)
        lewm.save_checkpoint(out, model)
        numbers = sum(x.numel() for x in model.parameters())
        print(f"{out}: a checkpoint with {numbers:,} weights; python lewm.py --eval {out}")
    elif given.weights_out:
        model, _ = lewm.load_checkpoint(given.weights_out)
        save_official(model, out)
        print(f"{out}: {len(official_weights(model))} tensors with the authors' names")
    else:
        episodes, rows = import_hdf5(given.hdf5, out)
        print(f"{out}: {episodes:,} episodes, {rows:,} rows; python lewm.py --train --data {out}")

if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, OSError) as error:
        sys.exit(f"authors.py: {' '.join(str(error).split())}")
    except KeyboardInterrupt:
        sys.exit("authors.py: stopped")
