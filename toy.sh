#!/bin/bash
# Compare Eq. 1, Eq. 2 and Eq. 8 from one pre-trained model, in minutes on a laptop's CPU.
#
#     bash toy.sh [SEED]        # world and negatives in data/toy, runs and tables in runs/toy-SEED
#     bash toy.sh --quick       # one epoch each, to see that everything runs: runs/toy-quick
set -e
SEED=${1:-42}
OUT=runs/toy-$SEED
FIRST=4  # epochs of pre-training
NEXT=2   # epochs of fine-tuning
if [ "$SEED" = --quick ]; then
    SEED=42
    OUT=runs/toy-quick
    FIRST=1
    NEXT=1
fi
export OMP_NUM_THREADS=1  # a model this small is fastest on one core, with its loader on another
WORLD="--data data/toy/negatives_train.jsonl --images data/toy/images --model data/toy/model.json"

[ -e data/toy/captions_train.json ] || python toy.py --out data/toy
[ -e data/toy/negatives_train.jsonl ] || python negatives.py \
    --captions data/toy/captions_train.json --out data/toy/negatives_train.jsonl --filler ngram

# Pre-train with Eq. 1, then fine-tune briefly with each loss, always with the same settings.
TRAIN="python ce_clip.py $WORLD --batch-size 64 --workers 1 --no-augmentation --seed $SEED --resume"
$TRAIN --pretrained none --losses itc --epochs $FIRST --lr 7e-4 --out $OUT/pretrained
TUNE="$TRAIN --pretrained $OUT/pretrained/epoch_$FIRST.pt --epochs $NEXT --lr 2e-3"
$TUNE --losses itc --out $OUT/itc
$TUNE --losses itc,hn --out $OUT/itc-hn
$TUNE --losses itc,hn,imc,cmr --out $OUT/ce-clip

python eval_bench.py --pairs data/toy/negatives_test.jsonl --captions data/toy/captions_test.json \
    --images data/toy/images --blind --out $OUT/results --ckpt $OUT/pretrained/epoch_$FIRST.pt \
    $OUT/itc/epoch_$NEXT.pt $OUT/itc-hn/epoch_$NEXT.pt $OUT/ce-clip/epoch_$NEXT.pt
