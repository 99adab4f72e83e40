#!/usr/bin/env bash
# Makes a compressor like this one, in an hour on one CPU core; README.md beside this file says what it is. In an
# environment with the extras demo, eval and train:
#
#     bash sglang_metasoft/compressor/shipped/smollm2-135m-instruct/train.sh
#
# Run again after an interruption, it goes on where it was.
set -euo pipefail

sglang-metasoft demo-model
python -m sglang_metasoft.train.fetch_texts .train-data
sglang-metasoft eval-data
OMP_NUM_THREADS=1 sglang-metasoft fit .demo/SmolLM2-135M-Instruct --data .train-data --exclude .eval-data \
  --minutes 60 --seed 0 --work .train-run/work --output .train-run/compressor
