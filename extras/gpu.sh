#!/usr/bin/env bash
# What to measure on a GPU, about half an hour, in the order of use. It may be cut off at any point: what is
# finished stays in runs/gpu.    bash extras/gpu.sh 2>&1 | tee gpu.log
cd "$(dirname "$0")/.." || exit 1
python -m pytest -q
python lewm.py --train --compile --episodes 500 --out runs/gpu/nano
python -m extras.speed nano
python -m extras.speed paper
python lewm.py --train --compile --steps 22000 --first_lesson_share 0.0909 --lr 6e-4 --train_episodes 12000 \
    --seed 1 --episodes 500 --out runs/gpu/long
python -m extras.planning runs/gpu/long/checkpoint.pt far --pairs 500 --out runs/gpu/planning
python lewm.py --train --preset fast --steps 10000 --episodes 500 --out runs/gpu/fast
