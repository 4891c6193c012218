#!/bin/bash
# The runs of docs/evidence.md: Flickr8k's photographs, three seeds; about 3 hours on 2 CPU cores.
#
#     bash docs/evidence.sh      # from the repository's folder; goes on where it was stopped
#
# It needs matplotlib, scikit-learn, and these files:
# - data/flickr8k: images/, captions_train.json and captions_dev.json (COCO's layout, official splits)
# - data/mobilenetv1_100.pt: ImageNet weights with timm's names, without the classifier. Ours were
#   Google's, for which the mean and the std of the pixels are 0.5.
# SugarCrepe, SugarCrepe++ and VALSE are scored if they lie in data/ (see docs/benchmarks.md).
set -e
trap 'kill $(jobs -p) 2> /dev/null || true' EXIT
export OMP_NUM_THREADS=1
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

for SPLIT in train dev; do
    [ -e $OUT/all_$SPLIT.jsonl ] || python negatives.py --filler ngram \
        --captions $DATA/captions_$SPLIT.json --out $OUT/all_$SPLIT.jsonl
done
# the last 500 photographs of the training split are not trained on: gamma is chosen on them
[ -e $OUT/tune.jsonl ] || python - <<END
import json
from pathlib import Path

lines = Path("$OUT/all_train.jsonl").read_text().splitlines(keepends=True)
images = [json.loads(line)["image"] for line in lines]
held_out = set(list(dict.fromkeys(images))[-500:])
for name in ("train", "tune"):
    kept = [line for line, image in zip(lines, images) if (image in held_out) == (name == "tune")]
    Path(f"$OUT/{name}.jsonl").write_text("".join(kept))
END

# The base: five epochs of Eq. 1. Its image tower is pre-trained, its text tower starts at random.
# The features of 8 augmentations of each photograph are computed once for all runs.
TRAIN="--data $OUT/train.jsonl --images $DATA/images --lock-image --batch-size 256"
TRAIN="$TRAIN --precision bf16 --workers 0 --resume --lr 1e-3"
python docs/variants.py as-is $OUT/trunk.pt $TRAIN --pretrained $OUT/start.pt --losses itc \
    --epochs 5 --out $OUT/base

tune() {  # NAME VARIANT FLAGS: one epoch from the base, three seeds at a time
    JOBS=
    for SEED in 1 2 3; do
        python docs/variants.py $2 $OUT/trunk.pt $TRAIN --pretrained $OUT/base/epoch_5.pt \
            --warmup 20 --epochs 1 --seed $SEED --out $OUT/$1-$SEED "${@:3}" &
        JOBS="$JOBS $!"
    done
    for JOB in $JOBS; do  # a run that fails ends the script
        wait $JOB
    done
}
tune eq1 as-is --losses itc
tune eq2 as-is --losses itc,hn
tune imc as-is --losses itc,hn,imc
tune cmr as-is --losses itc,hn,cmr
tune eq8 as-is --losses itc,hn,imc,cmr
tune imc-released as-is --losses itc,hn,imc_released,cmr
tune eq8-centred centred --losses itc,hn,imc,cmr
# with looking_loss; gamma was looked at on tune.jsonl
tune eq2-look as-is --losses itc,hn,look
tune eq2-look-0.1 as-is --losses itc,hn,look --gamma 0.1
tune eq2-look-0.5 as-is --losses itc,hn,look --gamma 0.5
tune eq2-look-unweighted unweighted --losses itc,hn,look
tune eq2-look-own-length own-length --losses itc,hn,look
tune eq2-look-residual residual --losses itc,hn,look --gamma 1
tune cmr-look as-is --losses itc,hn,cmr,look
tune eq8-look as-is --losses itc,hn,imc,cmr,look
tune imc-released-look as-is --losses itc,hn,imc_released,cmr,look

score() {  # FOLDER FLAGS
    [ -e $OUT/$1/items.jsonl ] || python eval_bench.py --blind --images $DATA/images \
        --out $OUT/$1 "${@:2}"
}
DEV="--pairs $OUT/all_dev.jsonl --captions $DATA/captions_dev.json"
DEV="$DEV --bench sugarcrepe sugarcrepe_pp valse"
score gamma --pairs $OUT/tune.jsonl --ckpt $OUT/eq2{,-look,-look-0.1,-look-0.5}-1/epoch_1.pt
for SEED in 1 2 3; do
    score terms/$SEED $DEV --ckpt $OUT/*-$SEED/epoch_1.pt
done
score terms/wise $DEV --base $OUT/base/epoch_5.pt --wise 0.5 \
    --ckpt $OUT/{eq8,eq2-look}-?/epoch_1.pt
python docs/text_only.py --train $OUT/train.jsonl --test $OUT/all_dev.jsonl --out $OUT/text_only.csv
TABLES="python docs/evidence.py $OUT/terms --text-only $OUT/text_only.csv"
$TABLES --less eq2 --csv $OUT/evidence.csv
$TABLES --less eq8
python figures.py --csv $OUT/evidence.csv --out $OUT/figures
python figures.py --results $OUT/terms/1 --out $OUT/figures
