#!/bin/bash
# The paper's ablations on the toy world: Table 4, Fig. 4, 5 and 6. Half an hour a seed on 2 cores.
#
#     bash ablate.sh [SEED]        # runs toy.sh SEED first, if that was not done
#
# Runs are in runs/ablate-SEED. Tables and figures of all seeds so far are in runs/ablations.
set -e
SEED=${1:-42}
TOY=runs/toy-$SEED
OUT=runs/ablate-$SEED
ALL=runs/ablations
export OMP_NUM_THREADS=1

[ -e $TOY/ce-clip/epoch_2.pt ] || bash toy.sh $SEED
TRAIN=ce_clip.py
tune() {  # a run of Eq. 8 as in toy.sh, with other flags
    python $TRAIN --data data/toy/negatives_train.jsonl --images data/toy/images \
        --model data/toy/model.json --batch-size 64 --workers 1 --no-augmentation --seed $SEED \
        --pretrained $TOY/pretrained/epoch_4.pt --epochs 2 --lr 2e-3 --resume --out $OUT/"$@"
}
score() {  # FIGURE CHECKPOINTS
    python eval_bench.py --pairs data/toy/negatives_test.jsonl --captions data/toy/captions_test.json \
        --images data/toy/images --blind --out $ALL/$1/$SEED --ckpt "${@:2}"
}
PLAIN=$TOY/ce-clip/epoch_2.pt

tune imc --losses itc,hn,imc
tune cmr --losses itc,hn,cmr
tune imc-released --losses itc,hn,imc_released,cmr
score table-4 $TOY/{itc,itc-hn}/epoch_2.pt $OUT/{imc,cmr,imc-released}/epoch_2.pt $PLAIN

for KIND in relation attribute action object; do
    tune $KIND --kinds $KIND
done
score fig-4 $OUT/{relation,attribute,action,object}/epoch_2.pt $PLAIN

for THRESHOLD in 2 5 10; do
    tune threshold-$THRESHOLD --threshold $THRESHOLD
done
score fig-5a $OUT/threshold-{2,5,10}/epoch_2.pt $PLAIN

for BOUND in 1 2 5 20; do
    tune bound-$BOUND --upper-bound $BOUND
done
score fig-5c $OUT/bound-{1,2,5,20}/epoch_2.pt $PLAIN

for ALPHA in 0.1 0.4 0.8; do
    tune alpha-$ALPHA --alpha $ALPHA
done
for BETA in 0.2 0.8 1.6; do
    tune beta-$BETA --beta $BETA
done
score fig-6 $OUT/alpha-{0.1,0.4,0.8}/epoch_2.pt $OUT/beta-{0.2,0.8,1.6}/epoch_2.pt $PLAIN

# beyond the paper: why does L_cmr alone not teach word order here?
tune cmr-relation --losses itc,hn,cmr --kinds relation
tune cmr-bound-2 --losses itc,hn,cmr --upper-bound 2
tune cmr-threshold-5 --losses itc,hn,cmr --threshold 5
tune hn-relation --losses itc,hn --kinds relation
score cmr $TOY/itc-hn/epoch_2.pt $OUT/{hn-relation,cmr,cmr-relation,cmr-bound-2,cmr-threshold-5}/epoch_2.pt

# beyond the paper: looking_loss, and without its weights
tune look --losses itc,hn,look
tune cmr-look --losses itc,hn,cmr,look
tune eq8-look --losses itc,hn,imc,cmr,look
TRAIN="docs/variants.py unweighted none"
tune look-unweighted --losses itc,hn,look
tune eq8-look-unweighted --losses itc,hn,imc,cmr,look
score look $TOY/{itc,itc-hn}/epoch_2.pt $OUT/{cmr,look,look-unweighted,cmr-look}/epoch_2.pt \
    $OUT/{eq8-look,eq8-look-unweighted}/epoch_2.pt $PLAIN

python docs/evidence.py $ALL/{table-4,fig-4,fig-5a,fig-5c,fig-6,cmr,look} --mean --csv $ALL/ablations.csv
python figures.py --csv $ALL/ablations.csv --out $ALL/figures
python figures.py --results $ALL/table-4/$SEED --out $ALL/figures  # Fig. 5b and 5d of these runs
