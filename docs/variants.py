"""ce_clip.py as docs/evidence.sh and ablate.sh run it, with two changes that only they need.

    python docs/variants.py VARIANT CACHE.pt [FLAGS of ce_clip.py]

VARIANT changes a loss:
as-is        nothing
unweighted   looking_loss with w_ik = 1: a pair counts whether its caption leads or not
own-length   looking_loss with d_ik = T_i - T_ik, not divided by its length
residual     looking_loss without what S(I_j,T_i) + S(I_j,T_ik) tells of a lead: what is left of it
             after a linear regression on that sum over the images I_j of the batch
centred      all losses except for looking_loss see the images less the mean of their batch

CACHE.pt has the features of a locked timm trunk, which are the same in every run. It keeps those of
8 augmentations of each training image, and a run draws one of them in place of a new augmentation.
Only the projection behind the trunk and the text tower are trained. Checkpoints are the usual
ones: they hold the trunk, too. With `none` in place of CACHE.pt nothing is cached.
"""

import argparse
import functools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import ce_clip
import files

VIEWS = 8  # of an image
load_model, open_image, similarities = ce_clip.load_model, files.open_image, ce_clip.similarities


@torch.inference_mode()
def make_cache(path: Path, args: argparse.Namespace) -> None:
    """Save {name of an image: features (VIEWS, C)} of the images of --data, with seed 0."""
    loaded = load_model(args.pretrained, args.model)
    trunk = loaded.model.visual.trunk.eval()
    torch.manual_seed(0)
    cache = {}
    images = dict.fromkeys(image for image, *_ in ce_clip.load_records(args, args.kinds))
    for image in tqdm(images, "views"):
        opened = open_image(image, draft=max(loaded.model.visual.image_size))
        pixels = [loaded.train_transform(opened) for _ in range(VIEWS)]
        cache[image.name] = trunk(torch.stack(pixels)).half()
    with files.whole_file(path) as new:
        torch.save(cache, new)


def use_cache(path: Path) -> None:
    """ce_clip.py gets a view's features (C, 1, 1) for an image, and the trunk hands them on."""
    cache = torch.load(path, weights_only=True, mmap=True)

    def draw(image: Path) -> Tensor:  # Pairs has set the seed, as for an augmentation
        of_image = cache[image.name]
        return of_image[torch.randint(len(of_image), ())].float()[:, None, None]

    def load_with_cache(*source: str) -> ce_clip.Loaded:
        loaded = load_model(*source)
        loaded.model.visual.trunk.forward = lambda features: features.flatten(1)
        return loaded._replace(train_transform=draw)

    ce_clip.load_model = load_with_cache
    files.open_image = lambda path, box=None, draft=0: path


def other_looking_loss(image: Tensor, text: Tensor, scale: Tensor, valid: Tensor, variant: str):
    """ce_clip.looking_loss with one thing changed: see the head of this script."""
    difference = text[:, :1] - text[:, 1:]  # (B, K, D)
    weight = (scale * torch.einsum("ikd,id->ik", difference, image)).detach().clamp(0, 1)
    if variant == "unweighted":
        weight = torch.ones_like(weight)
    if variant != "own-length":
        difference = F.normalize(difference, dim=2)
    logits = scale * torch.einsum("ikd,jd->ijk", difference, image)
    if variant == "residual":  # of a regression over the images of the batch
        both = torch.einsum("ikd,jd->ijk", F.normalize(text[:, :1] + text[:, 1:], dim=2), image)
        both = both - both.mean(1, keepdim=True)
        logits = logits - logits.mean(1, keepdim=True)
        squares = (both**2).sum(1, keepdim=True).clamp(min=1e-4)
        logits = logits - (logits * both).sum(1, keepdim=True) / squares * both
    target = torch.arange(len(image))[:, None].expand(valid.shape)
    loss = weight * F.cross_entropy(logits, target, reduction="none")
    return loss.masked_fill(~valid, 0).sum() / len(image)


def main() -> None:
    variant, cache = sys.argv[1], Path(sys.argv[2])
    sys.argv[1:3] = []
    args = ce_clip.parse_args()
    if cache != Path("none"):
        if not cache.exists():
            make_cache(cache, args)
        use_cache(cache)
    if variant in ("unweighted", "own-length", "residual"):
        ce_clip.looking_loss = functools.partial(other_looking_loss, variant=variant)
    elif variant == "centred":
        ce_clip.similarities = lambda image, text, scale: similarities(
            image - image.mean(0), text, scale
        )
    elif variant != "as-is":
        raise files.BadInput(f"{variant} is not a variant: the head of this script names them")
    ce_clip.main()


if __name__ == "__main__":
    files.run_main(main)
