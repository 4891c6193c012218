#!/bin/bash
# The runs of docs/evidence.md: Flickr8k's photographs, three seeds; about 4 hours on 2 CPU cores.
#
#     bash docs/evidence.sh      # from the repository's folder; goes on where it was stopped
#
# It needs matplotlib, and these files:
# - data/flickr8k: images/, captions_train.json and captions_dev.json (COCO's layout, official splits)
# - data/mobilenetv1_100.pt: ImageNet weights with timm's names, without the classifier. Ours were
#   Google's, for which the mean and the std of the pixels are 0.5.
# SugarCrepe, SugarCrepe++ and VALSE are scored if they lie in data/ (see docs/benchmarks.md).
set -e
trap 'kill $(jobs -p) 2> /dev/null || true' EXIT
export OMP_NUM_THREADS=1
# glibc keeps the memory that it has, in large pages: a step takes 6.3 s, otherwise 7.5 s
export MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=100000000000 MALLOC_TOP_PAD_=268435456
export GLIBC_TUNABLES=glibc.malloc.hugetlb=1
DATA=data/flickr8k
OUT=runs/photographs
mkdir -p $OUT

# a CLIP with an ImageNet image tower and a random text tower
cat > $OUT/photo.json <<END
{"embed_dim": 256,
 "vision_cfg": {"timm_model_name": "mobilenetv1_100", "timm_model_pretrained": false,
                "timm_pool": "avg", "timm_proj": "linear", "image_size": 128},
 "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 256, "heads": 4, "layers": 3}}
END
[ -e $OUT/start.pt ] || python - <<END
import json, pathlib, torch, ce_clip, files
torch.manual_seed(0)
config = json.load(open("$OUT/photo.json"))
pixels = {"image_mean": (0.5, 0.5, 0.5), "image_std": (0.5, 0.5, 0.5)}
loaded = ce_clip.build_model("photo", None, config, pixels)
weights = torch.load("data/mobilenetv1_100.pt", weights_only=True)
loaded.model.visual.trunk.load_state_dict(weights)
files.save_checkpoint(pathlib.Path("$OUT/start.pt"), loaded)
END

# negatives of two older generators: that of commit c83cc2f, and the one before the rules for number,
# sort and plausibility
mkdir -p $OUT/generator
for FILE in negatives.py english.py files.py; do
    git show c83cc2f:$FILE > $OUT/generator/$FILE
done
git show 056ced49:negatives.py > $OUT/negatives_old.py
for SPLIT in train dev; do
    [ -e $OUT/new_$SPLIT.jsonl ] || python $OUT/generator/negatives.py --filler ngram \
        --captions $DATA/captions_$SPLIT.json --out $OUT/new_$SPLIT.jsonl
    [ -e $OUT/old_$SPLIT.jsonl ] || python $OUT/negatives_old.py --filler ngram \
        --captions $DATA/captions_$SPLIT.json --out $OUT/old_$SPLIT.jsonl
done

# the base: five epochs of Eq. 1; its image tower is pre-trained, its text tower starts at random
TRAIN="ce_clip.py --data $OUT/new_train.jsonl --images $DATA/images --lock-image"
TRAIN="$TRAIN --batch-size 256 --precision bf16 --workers 0 --resume"
torchrun --nproc_per_node 2 $TRAIN --pretrained $OUT/start.pt --losses itc --lr 1e-3 --epochs 5 \
    --out $OUT/base

tune() {  # NAME FLAGS: one epoch from the base, three seeds at a time
    JOBS=
    for SEED in 1 2 3; do
        python $TRAIN --pretrained $OUT/base/epoch_5.pt --lr 1e-3 --warmup 20 --epochs 1 \
            --seed $SEED --out $OUT/$1-$SEED "${@:2}" &
        JOBS="$JOBS $!"
    done
    for JOB in $JOBS; do
        wait $JOB
    done
}
tune eq1 --losses itc
tune eq2 --losses itc,hn
tune imc --losses itc,hn,imc
tune cmr --losses itc,hn,cmr
tune eq8 --losses itc,hn,imc,cmr
tune imc-released --losses itc,hn,imc_released,cmr
tune eq8-old --losses itc,hn,imc,cmr --data $OUT/old_train.jsonl
tune cmr-bound-2 --losses itc,hn,cmr --upper-bound 2
tune eq8-bound-2 --losses itc,hn,imc,cmr --upper-bound 2

score() {  # FOLDER FLAGS
    [ -e $OUT/$1/items.jsonl ] || python eval_bench.py --blind --images $DATA/images \
        --out $OUT/$1 "${@:2}"
}
NEW="--pairs $OUT/new_dev.jsonl --captions $DATA/captions_dev.json"
NEW="$NEW --bench sugarcrepe sugarcrepe_pp valse"
for SEED in 1 2 3; do
    score terms/$SEED $NEW --ckpt $OUT/*-$SEED/epoch_1.pt
    score old-negatives/$SEED --pairs $OUT/old_dev.jsonl \
        --ckpt $OUT/{eq2,eq8,eq8-old}-$SEED/epoch_1.pt
done
score terms/wise $NEW --base $OUT/base/epoch_5.pt --ckpt $OUT/eq8-?/epoch_1.pt --wise 0.5
python docs/evidence.py $OUT/{terms,old-negatives} --less eq2 --csv $OUT/evidence.csv
python docs/evidence.py $OUT/{terms,old-negatives} --less eq8
python figures.py --csv $OUT/evidence.csv --out $OUT/figures
python figures.py --results $OUT/terms/1 --out $OUT/figures
