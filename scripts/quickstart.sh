#!/usr/bin/env bash
# Sets up, fetches SmolLM2-135M-Instruct, builds four small datasets from the standard library's source, and trains four LoRA
# adapters on them in one run over two pipeline stages. At the end: loss curves, and each adapter's answer before and after.
#
#     bash scripts/quickstart.sh [key=value ...]         overrides go to `megatron-lora train`, for example seed=1
#
# Settings, from the environment: those of scripts/setup_env.sh, among them PYTHON=python3. Takes less than 10 minutes on two
# CPU cores the first time; set-up, model and data are reused by later runs. Every run gets a new numbered directory.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup_env.sh

model=models/SmolLM2-135M-Instruct
data=data/quickstart

[ -f "$model/config.json" ] || python scripts/fetch_model.py "$model"
[ -f "$data/held_out.json" ] || python scripts/make_tasks.py "$data"

mkdir -p runs
number=1
until mkdir "runs/quickstart-$number" 2>/dev/null; do number=$((number + 1)); done
run=runs/quickstart-$number

echo "Training into $run ..."
megatron-lora train configs/quickstart.yaml output_dir="$run" "$@"
python scripts/plot_losses.py "$run"
python scripts/show_answers.py "$run" "$data/held_out.json"
echo "Done. Adapters: $run/jobs/*/  loss curves: $run/losses.png  everything else: docs/running.md"
