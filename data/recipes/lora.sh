#!/bin/bash
cd /work/swap; PY=/work/main/.venv/bin/python; export PYTHONPATH=/work/swap:/work/swap/data/recipes OMP_NUM_THREADS=1
set -e
R=/work/main/runs/ft; rm -rf $R/c1 $R/o1
$PY data/recipes/make_finetune_set.py
$PY -m minqwen.precompute data/finetune/images --control data/finetune/control --cache $R/c1 --model data/tiny > /tmp/w/n/pre.log 2>&1
$PY -m minqwen.finetune $R/c1 --out $R/o1 --model data/tiny --steps 480 --batch-size 24 --lr 2e-3 --rank 32 --dtype bfloat16 --targets to_q to_k to_v to_out.0 add_q_proj add_k_proj add_v_proj to_add_out net.0.proj net.2 > /tmp/w/n/ft.log 2>&1
cp $R/o1/lora.safetensors data/finetune/mirror_lora.safetensors
touch /tmp/w/n/GO_LORA
$PY data/recipes/evaluate.py --lora data/finetune/mirror_lora.safetensors --rows 50 --kinds mirror replace remove add move swap background --out /tmp/w/n/ftcounts.jsonl > /tmp/w/n/ftc.log 2>&1
touch /tmp/w/n/GO_COUNTS
