#!/usr/bin/env bash
# Synthetic images, a small detector trained on them, its AP, and drawings of what it detects.
# What a former run has finished is kept; remove output/quickstart to start again.
#
#   tools/quickstart.sh            PYTHON=... chooses the interpreter
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python}
out=output/quickstart
config=configs/synthetic_demo.yaml

step() { printf '\n==> %s\n' "$1"; }
# Show a command as a user would type it, then run it.
run() {
    local word line=+
    for word in "$@"; do
        [[ $word =~ ^[a-zA-Z0-9_./:=-]+$ ]] || word="'$word'"
        line+=" $word"
    done
    echo "$line"
    "$@"
}

datasets='[["shapes_train","DATA/train.json","DATA/train"],["shapes_val","DATA/val.json","DATA/val"]]'
datasets=${datasets//DATA/$out/data}
options=(DATASETS.COCO_FORMAT "$datasets" OUTPUT_DIR "$out")
weights=$out/model_final.pth

step "Synthetic images: 2000 to train on, 200 held out"
run "$python" -m ddetr_d2.data.synthetic --output "$out/data" --train 2000 --val 200

step "Training"
if [ "$weights" -nt "$config" ]; then
    echo "$weights is there already"
else
    resume=()
    # goes on where an interrupted run of the same configuration stopped
    if [ "$out/last_checkpoint" -nt "$config" ]; then resume=(--resume); fi
    run "$python" train_net.py --config-file "$config" "${resume[@]}" "${options[@]}"
fi

step "Evaluation on the 200 held-out images"
run "$python" train_net.py --config-file "$config" --eval-only \
    "${options[@]}" MODEL.WEIGHTS "$weights" | tee "$out/evaluation.txt"

step "Drawing detections"
mkdir -p "$out/drawings"
run "$python" demo/demo.py --config-file "$config" --input "$out/data/val/00000?.jpg" \
    --output "$out/drawings" --confidence-threshold 0.4 --opts MODEL.WEIGHTS "$weights"

run "$python" tools/plot_training.py "$out"

step "Done: AP on the held-out images"
awk '/Evaluation results for bbox/ { found = 1 } found && /^\|/ && n++ < 3' "$out/evaluation.txt"
cat <<END

Drawings:  $PWD/$out/drawings
Curves:    $PWD/$out/training.png
Weights:   $PWD/$weights

Train on your own data, in COCO format (the number of classes is taken from it):

    $python train_net.py --config-file $config MODEL.WEIGHTS $weights OUTPUT_DIR output/mine \\
        DATASETS.TRAIN "('mine_train',)" DATASETS.TEST "('mine_test',)" \\
        DATASETS.COCO_FORMAT "[['mine_train','train.json','images'],['mine_test','test.json','images']]"
END
