#!/usr/bin/env bash
# Makes a compressor like this one; README.md beside this file says what each run is. In an environment with the extras
# demo, eval and train:
#
#     bash sglang_metasoft/compressor/shipped/smollm2-135m-instruct/train.sh
#
# Attention maps first; from there seven runs with the answers in the loss, and their mean; from there three that reckon
# with biased keys, and their mean, which is .train-run/last/compressor. Four hours on one CPU core; runs of one stage may
# go side by side. Run again after an interruption, it goes on where it was.
set -euo pipefail

run() {  # NAME SETTING...
  local name=$1
  shift
  sglang-metasoft train --model .demo/SmolLM2-135M-Instruct --data .train-data --exclude .eval-data \
    --prepared .train-run/prepared --output ".train-run/$name" \
    --max-prefix-tokens 1000 --repeat-share 0.5 --validate-every 800 "$@"
}

second() {
  run "second-$1" --consolidation none --init .train-run/first/compressor \
    --selector-steps 20 --learning-rate 0.01 "${@:2}"
}

third() {
  run "third-$1" --init .train-run/mean/compressor --cases 300 \
    --selector-steps 0 --learning-rate 0.006 --answer-weight 2 "${@:2}"
}

sglang-metasoft demo-model
python -m sglang_metasoft.train.fetch_texts .train-data
sglang-metasoft eval-data

run first --consolidation none --cases 300 --steps 400 --selector-steps 20 --answer-weight 0

second span --cases 300 --steps 300
second span-high --cases 300 --steps 300 --ratios 4 8 8 16 16 32
second prompt --cases 300 --steps 300 --answer-cut prompt
for seed in 1 2 3 4; do
  second "prompt-$seed" --seed "$seed" --cases 80 --steps 240 --answer-cut prompt
done
run mean --consolidation none --steps 0 --selector-steps 0 --init .train-run/second-*/compressor

third span --steps 300
third prompt --steps 300 --answer-cut prompt
third long --steps 600
run last --steps 0 --selector-steps 0 --init .train-run/third-*/compressor
