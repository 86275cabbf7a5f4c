"""Which mistakes do the tests notice? Each mutant is lewm.py with one place of sections 2 to 9 changed.

    python -m extras.mutate             # 400 mutants; a command that was stopped goes on
    python -m extras.mutate --show      # those that no test has noticed

A mutant is noticed if a test fails, first among those of its own units, then among all that are not slow.
What never ends, or ends the process, counts as noticed. Which places change is drawn with a seed. Needs fork:
Linux or macOS.
"""

import argparse
import ast
import copy
import json
import os
import random
import re
import signal
import sys
import tempfile
import time
from pathlib import Path

import numpy  # noqa: F401   imported once here, so that the forked processes need not do it
import pytest
import torch

import lewm
from extras.compare import written

HERE = Path(__file__).parents[1]
UNITS = {                                       # which tests go with a section of lewm.py
    "2": "Encoder", "3": "Predictor", "4": "SIGReg", "5": "Loss or Imagination or Encoder",
    "6": "Planning", "7": "Data", "8": "Training", "9": "Proposal"}
OTHERS = "not Slow and not PushT and not Probes and not Readme and not Course and not Files"
SWAPS = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.Pow: ast.Mult,
         ast.FloorDiv: ast.Mult, ast.Mod: ast.FloorDiv, ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE,
         ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.And: ast.Or, ast.Or: ast.And,
         ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In}
NOT_MISTAKES = ("require", "print")             # their words are no mathematics; dropping a check is one

# ======== One changed place ===========================================================================

def other_operator(node):
    """a + b -> a - b and a; a < b -> a <= b; a and b -> a or b."""
    if isinstance(node, (ast.BinOp, ast.BoolOp)) and type(node.op) in SWAPS:
        yield "other operator", {"op": SWAPS[type(node.op)]()}
    if isinstance(node, ast.Compare) and type(node.ops[0]) in SWAPS:
        yield "other comparison", {"ops": [SWAPS[type(node.ops[0])](), *node.ops[1:]]}
    if isinstance(node, ast.BinOp) and isinstance(node.op, (ast.Add, ast.Sub)):
        yield "dropped term", node.left
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.MatMult):
        yield "swapped factors", {"left": node.right, "right": node.left}
    if isinstance(node, ast.UnaryOp):
        yield "dropped sign", node.operand

def other_number(node):
    """0 -> 1, 3 -> 4, 0.5 -> 1.0, True -> False."""
    if isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield "other truth", {"value": not node.value}
    elif isinstance(node, ast.Constant) and isinstance(node.value, int):
        yield "other number", {"value": node.value + 1}
    elif isinstance(node, ast.Constant) and isinstance(node.value, float):
        yield "other number", {"value": 2 * node.value or 1.0}

def other_call(node):
    """f(a, b) -> f(b, a); x.detach() -> x; f(x, flag=y) -> f(x)."""
    if isinstance(node, ast.Call) and len(node.args) > 1 and ast.dump(node.args[0]) != ast.dump(node.args[1]):
        yield "swapped arguments", {"args": [node.args[1], node.args[0], *node.args[2:]]}
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and not node.args:
        yield "dropped call", node.func.value
    if isinstance(node, ast.Call) and node.keywords and node.keywords[-1].arg:
        yield "dropped keyword", {"keywords": node.keywords[:-1]}

def other_statement(node):
    """A statement, a decorator or a condition that is left out."""
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call) or isinstance(node, ast.AugAssign):
        yield "dropped statement", ast.copy_location(ast.Pass(), node)
    if isinstance(node, ast.FunctionDef) and node.decorator_list:
        yield "dropped decorator", {"decorator_list": node.decorator_list[1:]}
    if isinstance(node, (ast.If, ast.IfExp, ast.While)):
        yield "other condition", {"test": ast.UnaryOp(ast.Not(), node.test)}

KINDS = (other_operator, other_number, other_call, other_statement)

def places(source):
    """-> [(line, section, index of the node among all nodes, index of the change, what changes)]."""
    sections = {}
    for number, line in enumerate(source.splitlines(), 1):
        match = re.match(r"# =+ (\d+) ", line)
        sections[number] = match[1] if match else sections.get(number - 1, "0")
    found = []
    skipped = set()
    for index, node in enumerate(ast.walk(ast.parse(source))):
        if isinstance(node, ast.JoinedStr):                             # words, without places of their own
            skipped.update(map(id, ast.walk(node)))
        name = getattr(getattr(node, "func", None), "id", "")
        if isinstance(node, ast.Call) and name in NOT_MISTAKES:         # of `require`, only the message
            skipped.update(map(id, ast.walk(node.args[-1])))
        section = sections.get(getattr(node, "lineno", 0), "0")
        if section in UNITS and id(node) not in skipped and name not in NOT_MISTAKES:
            changes = [what for kind in KINDS for what, _ in kind(node)]
            found += [(node.lineno, section, index, change, what) for change, what in enumerate(changes)]
    return found

class Replace(ast.NodeTransformer):
    def __init__(self, old, new):
        self.old = old
        self.new = new

    def visit(self, node):
        return self.new if node is self.old else super().generic_visit(node)

def replaced(source, node, new):
    """Put `new` where `node` stands in the source. All else stays as it is: the help texts are comments."""
    lines = source.encode().splitlines(keepends=True)                   # places are counted in bytes
    first = min([node.lineno, *(decorator.lineno for decorator in getattr(node, "decorator_list", []))])
    start = b"".join(lines[:first - 1]) + lines[first - 1][:node.col_offset]
    rest = lines[node.end_lineno - 1][node.end_col_offset:] + b"".join(lines[node.end_lineno:])
    text = ast.unparse(new).replace("\n", "\n" + " " * node.col_offset)
    if isinstance(new, ast.expr):
        text = f"({text})"
    if lines[first - 1][node.col_offset:].startswith(b"elif"):
        text = f"el{text}"
    return start.decode() + text + rest.decode()

def mutant(source, index, change):
    """Source with one change -> (changed source, the changed node before, and after)."""
    tree = ast.parse(source)
    node = list(ast.walk(tree))[index]
    before = ast.unparse(node).splitlines()[0]
    _, new = [pair for kind in KINDS for pair in kind(node)][change]
    if isinstance(new, dict):
        fields = new
        new = copy.copy(node)
        vars(new).update(fields)
    changed = replaced(source, node, new)
    tree = ast.fix_missing_locations(Replace(node, new).visit(tree))
    assert ast.unparse(ast.parse(changed)) == ast.unparse(tree), f"{before} in line {node.lineno}"
    return changed, before, ast.unparse(new).splitlines()[0]

# ======== Tests =======================================================================================

def fails(path, tests, seconds):
    """Run some tests on a file, in a forked process -> does one fail, or does it take too long?"""
    child = os.fork()
    if child == 0:
        signal.alarm(seconds)                   # ends the process
        os.environ["LEWM"] = str(path)
        for name in ("lewm", "probe", "test_lewm"):
            sys.modules.pop(name, None)
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        argv = [str(HERE / "test_lewm.py"), "-x", "-q", "-p", "no:cacheprovider", "-k", tests]
        os._exit(int(pytest.main(argv)))
    return os.waitpid(child, 0)[1] != 0

def judge(source, place, folder):
    """-> one row: the place, the change, and whether a test has noticed it."""
    line, section, index, change, what = place
    changed, before, after = mutant(source, index, change)
    path = Path(folder, "student.py")
    path.write_text(changed, encoding="utf-8")
    own = f"({UNITS[section]}) and not Slow"
    noticed = fails(path, own, 120)
    by = "its unit" if noticed else "another unit"
    if not noticed:
        noticed = fails(path, OTHERS, 300)
    return {"line": line, "section": section, "what": what, "before": before, "after": after,
            "noticed": by if noticed else ""}

# ======== Command line ================================================================================

def main(argv):
    parser = argparse.ArgumentParser(description="Which mistakes do the tests notice?", allow_abbrev=False)
    flag = parser.add_argument
    flag("--mutants", type=int, default=400, help="how many; default 400")
    flag("--seed", type=int, default=0, help="which ones; default 0")
    flag("--out", type=Path, default=Path("runs/mutants.json"), help="default: runs/mutants.json")
    flag("--show", action="store_true", help="print what was not noticed, and run nothing")
    given = parser.parse_args(argv)
    torch.set_num_threads(1)
    source = (HERE / "lewm.py").read_text(encoding="utf-8")
    everything = places(source)
    chosen = random.Random(given.seed).sample(everything, min(given.mutants, len(everything)))
    done = json.loads(given.out.read_text(encoding="utf-8")) if given.out.exists() else {}
    given.out.parent.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    right = given.show or not fails(HERE / "lewm.py", OTHERS, 300)
    lewm.require(right, "lewm.py itself fails its tests: then every mutant would seem to be noticed")
    for place in [] if given.show else chosen:
        key = " ".join(map(str, place))
        if key not in done:
            with tempfile.TemporaryDirectory() as folder:
                done[key] = judge(source, place, folder)
            written(given.out, done)
    noticed = sum(bool(row["noticed"]) for row in done.values())
    for row in sorted(done.values(), key=lambda row: row["line"]):
        if not row["noticed"]:
            print("{line:5} {what}: {before}  ->  {after}".format(**row))
    print(f"{noticed} of {len(done)} noticed; there are {len(everything)} places; "
          f"{(time.monotonic() - began) / 60:.0f} minutes")

if __name__ == "__main__":
    main(sys.argv[1:])
