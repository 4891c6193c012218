"""Fine-tune CLIP on hard-negative captions with the CE-CLIP losses (arXiv 2306.08832, Eq. 1-8).

    python ce_clip.py                                       # the toy world, on a CPU, in minutes
    torchrun --nproc_per_node 2 ce_clip.py --data coco      # the paper's run (Sec. 4.1)
    python ce_clip.py --data negatives.jsonl --images DIR --losses itc,hn   # a row of Table 4

Shape letters: B pairs in the global batch, b of them on this process, K = 4 kinds of negative in
the order relation, attribute, action, object; L tokens, D embedding width. S(.,.) is always a
logit, exp(logit_scale) * cosine. The same gradient comes out on any number of processes, but for
models with batch norm or dropout, and X-VLM's --itm, which are each process's own.
"""

import argparse
import contextlib
import functools
import itertools
import json
import math
import os
import signal
import sys
import tempfile
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import numpy as np
import open_clip
import torch
import torch.distributed as dist
import torch.nn.functional as F
from open_clip.model import get_model_preprocess_cfg
from PIL import Image
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import ConcatDataset, DataLoader, Dataset
from tqdm import tqdm

import negatives
import toy
import xvlm
from negatives import KINDS, BadInput, read_json, reading, run

# ---- Losses (Sec. 3.2). Tensors in, scalar out: no args object, no files, no torch.distributed. --
#
# Where the paper sums over the batch we take the mean over B, so that the learning rate and the
# weights alpha and beta mean the same at every batch size (so does the authors' code).
# `valid` is True where a negative exists; a missing one counts in no loss and in no threshold.


def _check(where: str, **expected: tuple[Tensor, tuple[int, ...]]) -> None:
    for name, (tensor, shape) in expected.items():
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{where}: {name} has shape {tuple(tensor.shape)}, expected {shape}")
        if name == "valid" and tensor.dtype != torch.bool:
            raise ValueError(f"{where}: valid must be bool (True = exists), not {tensor.dtype}")


def itc_loss(sim: Tensor) -> Tensor:
    """Image-text contrast within the batch, both directions. Eq. (1), Sec. 3.2.

        L = 1/B * sum_i - log e^S(I_i,T_i) / sum_j e^S(I_i,T_j)
          + 1/B * sum_i - log e^S(I_i,T_i) / sum_j e^S(I_j,T_i)

    sim      (B, B)  S(I_i, T_j), image by text
    returns  ()      0 for B = 1, 2 log B at chance. Raises ValueError if `sim` is not square.
    The directions are summed as printed: twice open_clip's ClipLoss, which averages them.
    """
    _check("itc_loss", sim=(sim, (len(sim), len(sim))))
    target = torch.arange(len(sim), device=sim.device)
    return F.cross_entropy(sim, target) + F.cross_entropy(sim.T, target)


def itc_hn_loss(sim: Tensor, sim_neg: Tensor, valid: Tensor) -> Tensor:
    """Eq. (1) with the hard negatives as further texts of the image-to-text direction. Eq. (2).

        L = 1/B * sum_i - log e^S(I_i,T_i) / sum_j e^S(I_j,T_i)
          + 1/B * sum_i - log e^S(I_i,T_i) / ( sum_j e^S(I_i,T_j) + sum_jk e^S(I_i,T_jk) )

    sim      (B, B)     S(I_i, T_j), image by text
    sim_neg  (B, B, K)  S(I_i, T_jk), every image against every negative of the batch
    valid    (B, K)     bool, True = negative k of caption j exists
    returns  ()         Eq. (1) when nothing is valid or K = 0. ValueError on a shape mismatch.
    paper: T_hn, the pair's or the batch's / authors' code: the batch's, with missing ones as "###",
    and half of the sum / we: the batch's that exist, and the sum.
    """
    B, K = len(sim), sim_neg.shape[-1]
    _check("itc_hn_loss", sim=(sim, (B, B)), sim_neg=(sim_neg, (B, B, K)), valid=(valid, (B, K)))
    target = torch.arange(B, device=sim.device)
    hard = sim_neg.masked_fill(~valid, -torch.inf).flatten(1)  # (B, B*K)
    image_to_text = F.cross_entropy(torch.cat([sim, hard], 1), target)
    return F.cross_entropy(sim.T, target) + image_to_text


def imc_loss(pos: Tensor, text_neg: Tensor, valid: Tensor) -> Tensor:
    """Intra-modal contrast: push a caption away from its own negatives. Eq. (3).

        L = 1/B * sum_i - log e^S(I_i,T_i) / sum_k e^S(T_i,T_ik)

    pos       (B,)    S(I_i, T_i)
    text_neg  (B, K)  S(T_i, T_ik), caption by its own negatives
    valid     (B, K)  bool, True = exists; a caption without negatives adds 0
    returns   ()      may be below 0, and is in the tens for a CLIP at a scale of 100: S(I,T) is in
                      the numerator only. ValueError on a shape mismatch.
    Differs from the authors' code, see imc_loss_released.
    """
    B, K = text_neg.shape
    _check("imc_loss", pos=(pos, (B,)), valid=(valid, (B, K)))
    negatives_mass = text_neg.masked_fill(~valid, -torch.inf).logsumexp(1)  # (B,), -inf without any
    return torch.where(valid.any(1), negatives_mass - pos, 0).sum() / B


def imc_loss_released(pos: Tensor, text_neg: Tensor, valid: Tensor) -> Tensor:
    """Not the paper's: what the authors' released get_imc_loss computes in place of Eq. (3).

        L = 1/B * sum_i - log e^S(T_i,T_n) / sum_jk e^S(T_i,T_jk)

    pos       (B,)       unused: the released code has no image-text term
    text_neg  (B, B, K)  S(T_i, T_jk), every caption against every negative of the batch
    valid     (B, K)     bool, True = exists; in the authors' code missing ones count, as "###"
    returns   ()         0 when nothing is valid. Raises ValueError on a shape mismatch.
    T_n is the first negative of the batch: every caption is pulled towards that one. See Eq. (3).
    """
    B, K = valid.shape
    shapes = {"pos": (pos, (B,)), "text_neg": (text_neg, (B, B, K)), "valid": (valid, (B, K))}
    _check("imc_loss_released", **shapes)
    if not valid.any():
        return (text_neg * 0).sum()
    first = valid.flatten().float().argmax()
    texts = text_neg.masked_fill(~valid, -torch.inf).flatten(1)  # (B, B*K)
    return F.cross_entropy(texts, first.expand(B))


def cmr_loss(pos: Tensor, neg: Tensor, threshold: Tensor, valid: Tensor) -> Tensor:
    """Keep a pair ahead of its own hard negatives by a threshold per kind. Eq. (4) and (6).

        L = 1/B * sum_i sum_k max(0, S(I_i,T_ik) - S(I_i,T_i) + Th_k)

    pos        (B,)    S(I_i, T_i)
    neg        (B, K)  S(I_i, T_ik), image by its own negatives
    threshold  (K,)    Th_k: a constant (Eq. 4), or adaptive_threshold of the previous step (Eq. 6);
                       no gradient flows into it
    valid      (B, K)  bool, True = exists
    returns    ()      0 when nothing is valid. Raises ValueError on a shape mismatch.
    paper: sum over the batch / authors' code: also divides by K and counts missing negatives / we:
    mean over B, sum over the kinds that exist.
    """
    B, K = neg.shape
    _check("cmr_loss", pos=(pos, (B,)), threshold=(threshold, (K,)), valid=(valid, (B, K)))
    hinge = F.relu(neg - pos[:, None] + threshold.detach())  # (B, K)
    return hinge.masked_fill(~valid, 0).sum() / B


@torch.no_grad()
def adaptive_threshold(
    pos: Tensor,
    neg: Tensor,
    valid: Tensor,
    upper_bound: float = 10.0,
    previous: Tensor | None = None,
) -> Tensor:
    """The next step's threshold for each kind: the mean lead of a pair. Eq. (5), bounded by (7).

        Th_k = min( u, mean over i where k exists of S(I_i,T_i) - S(I_i,T_ik) )

    pos          (B,)    S(I_i, T_i)
    neg          (B, K)  S(I_i, T_ik)
    valid        (B, K)  bool, True = exists
    upper_bound  u, in logits: 10 is a cosine of 0.10 at a scale of 100 (paper Sec. 4.4)
    previous     (K,)    what a kind absent from the whole batch keeps; zeros by default
    returns      (K,)    without gradient; may be negative. Raises ValueError on a shape mismatch.
    paper: only an upper bound / authors' code: also clamps at 0, averages the two terms over
    different captions, restarts at 0 every epoch, and is nan for an absent kind / we: Eq. (5), (7).
    """
    B, K = neg.shape
    previous = pos.new_zeros(K) if previous is None else previous
    shapes = {"pos": (pos, (B,)), "valid": (valid, (B, K)), "previous": (previous, (K,))}
    _check("adaptive_threshold", **shapes)
    count = valid.sum(0)  # (K,)
    lead = (pos[:, None] - neg).masked_fill(~valid, 0).sum(0) / count.clamp(min=1)
    return torch.where(count > 0, lead.clamp(max=upper_bound), previous)


def ce_clip_loss(
    sim: Tensor,
    sim_neg: Tensor,
    text_neg: Tensor,
    threshold: Tensor,
    valid: Tensor,
    alpha: float = 0.2,
    beta: float = 0.4,
    imc: Callable[[Tensor, Tensor, Tensor], Tensor] = imc_loss,
) -> tuple[Tensor, dict[str, Tensor]]:
    """L = L_itc(hn) + alpha * L_imc + beta * L_cmr. Eq. (8).

    sim        (B, B)     S(I_i, T_j)
    sim_neg    (B, B, K)  S(I_i, T_jk); K = 0 leaves Eq. (1)
    text_neg   (B, K)     S(T_i, T_ik); (B, B, K) for imc=imc_loss_released
    threshold  (K,)       Th_k of the previous step
    valid      (B, K)     bool, True = exists
    alpha, beta           the paper's search found 0.2 and 0.4 (Sec. 4.1)
    returns    the loss (), and {"itc", "imc", "cmr"}: its terms, unweighted
    """
    pos, neg = own_pairs(sim, sim_neg)
    terms = {
        "itc": itc_hn_loss(sim, sim_neg, valid),
        "imc": imc(pos, text_neg, valid),
        "cmr": cmr_loss(pos, neg, threshold, valid),
    }
    return terms["itc"] + alpha * terms["imc"] + beta * terms["cmr"], terms


def own_pairs(sim: Tensor, sim_neg: Tensor) -> tuple[Tensor, Tensor]:
    """pos (B,) = S(I_i, T_i) and neg (B, K) = S(I_i, T_ik): the diagonals of sim and sim_neg."""
    return sim.diagonal(), sim_neg.diagonal(dim1=0, dim2=1).T


# ---- Models and checkpoints: open_clip's CLIPs, X-VLM, and the toy world's -----------------------


class Loaded(NamedTuple):
    """A model with what must travel with it: its name and config (so that the activation cannot be
    lost), its two image transforms and its tokenizer."""

    model: nn.Module
    name: str
    config: dict
    train_transform: Callable
    eval_transform: Callable
    tokenizer: Callable


def named_config(name: str) -> tuple[str, dict | None]:
    """(name, config) of a value of --model; no config where open_clip has it."""
    if name.endswith(".json"):
        with reading(name, "a model config"):
            return Path(name).stem, dict(read_json(Path(name)))
    return name, {"toy": toy.MODEL, "xvlm": xvlm.CONFIG}.get(name)


def build_model(
    name: str,
    pretrained: str | None = None,
    config: dict | None = None,
    preprocess: dict | None = None,
) -> Loaded:
    """A model by its open_clip name, "toy", "xvlm", or the path of a model config (.json).

    pretrained  an open_clip tag, or a weights file; None = random weights
    config      open_clip's model config, for a name that open_clip does not know
    preprocess  open_clip's mean, std, interpolation and resize_mode, where the tag does not say
    Some weights, OpenAI's among them, need QuickGELU, which open_clip 3 only warns about: we take
    the model's -quickgelu twin. Raises BadInput.
    """
    if config is None:
        name, config = named_config(name)
    if config and "fusion_layer" in config:
        model, *others = xvlm.build(config, pretrained)
        return Loaded(model, name, config, *others)
    tag = open_clip.get_pretrained_cfg(name, pretrained) if pretrained else None
    if tag and tag.get("quick_gelu") and open_clip.get_model_config(f"{name}-quickgelu"):
        name += "-quickgelu"
    if config and open_clip.get_model_config(name) != config:
        with tempfile.TemporaryDirectory() as folder:
            (path := Path(folder, f"{name}.json")).write_text(json.dumps(config))
            open_clip.add_model_config(path)
    if open_clip.get_model_config(name) is None:
        raise BadInput(f"open_clip has no model {name!r} (a config file must end in .json)")
    of_images = ("mean", "std", "interpolation", "resize_mode")
    options = {f"image_{key}": preprocess[key] for key in of_images if preprocess}
    try:
        parts = open_clip.create_model_and_transforms(name, pretrained=pretrained, **options)
    except Exception as e:  # a hub error, a damaged file, a state dict of another model
        reason = " ".join(map(str.strip, str(e).splitlines()[:2]))
        raise BadInput(f"cannot load {pretrained!r} into {name}: {reason}") from e
    tokenizer = toy.tokenize if name == "toy" else open_clip.get_tokenizer(name)
    return Loaded(parts[0], name, open_clip.get_model_config(name), *parts[1:], tokenizer)


# a number of numpy, which older trainers left as the lr in a checkpoint [NegCLIP, CE-CLIP]
_scalar = np.float64(0).__reduce__()[0]
NUMPY = [_scalar, (_scalar, "numpy.core.multiarray.scalar"), np.dtype, np.dtypes.Float64DType]


def load_model(weights: str, name: str | None = None) -> Loaded:
    """A checkpoint of ours, which knows its model; or a tag, or a weights file, of model `name`.

    A file of weights is a state dict, or holds one as "state_dict" or "model", its names with or
    without "module.": the layouts of open_clip, NegCLIP, CE-CLIP and most others. Raises BadInput.
    """
    if not Path(weights).is_file():
        return build_model(name or "ViT-B-32-quickgelu", weights)
    with torch.serialization.safe_globals(NUMPY):
        return _load_file(weights, name)


def _load_file(weights: str, name: str | None) -> Loaded:
    try:
        saved = torch.load(weights, map_location="cpu", weights_only=True, mmap=True)
    except Exception as e:
        raise BadInput(f"{weights} is not a readable checkpoint: {str(e).splitlines()[0]}") from e
    if isinstance(saved, dict) and "config" in saved and isinstance(saved.get("model"), str):
        return build_model(saved["model"], weights, saved["config"], saved.get("preprocess"))
    if name is None:
        raise BadInput(f"{weights} does not say which model it holds: give --model")
    if open_clip.get_model_config(f"{name}-quickgelu"):
        tqdm.write(
            f"warning: {weights} does not say its activation: if it was trained from OpenAI's "
            f"weights, its numbers are wrong with the GELU of {name}: --model {name}-quickgelu",
            sys.stderr,
        )
    if not isinstance(saved, dict) or not isinstance(saved.get("model"), dict):
        return build_model(name, weights)
    loaded = build_model(name)
    with reading(weights, f"a checkpoint of {name}"):
        state = {key.removeprefix("module."): value for key, value in saved["model"].items()}
        loaded.model.load_state_dict(state)
    return loaded


def save_checkpoint(path: Path, loaded: Loaded, **more) -> None:
    """Atomic: the file is whole or absent. Plain tensors and numbers, so weights_only=True loads
    it, and so does open_clip: create_model_and_transforms(saved["model"], pretrained=path)."""
    saved = {"model": loaded.name, "config": loaded.config}
    saved |= {"preprocess": get_model_preprocess_cfg(loaded.model)}
    saved |= {"state_dict": loaded.model.state_dict(), **more}
    part = path.with_suffix(".part")
    with part.open("wb") as file:
        torch.save(saved, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


CHUNK = 128  # captions at least that are encoded together, cut to the longest of them


def encode_text(model: nn.Module, tokens: Tensor) -> Tensor:
    """Unit text features (N, D) of tokens (N, L), on the model's device; `tokens` best on the CPU.

    open_clip's CLIP attends causally and pools at the end-of-text token (the highest id), so that
    cutting a batch after its last one changes nothing: captions are encoded in a few chunks sorted
    by length. Other text towers get their full length.
    """
    device = next(model.parameters(), tokens).device
    causal_argmax = getattr(model, "text_pool_type", "") == "argmax" and model.attn_mask is not None
    if type(model) is not open_clip.CLIP or not causal_argmax or not len(tokens):
        return model.encode_text(tokens.to(device), normalize=True)
    length = tokens.argmax(1) + 1  # (N,)
    order = length.argsort(stable=True)
    features = []
    for rows in order.chunk(min(4, 1 + len(tokens) // CHUNK)):
        end = int(length[rows[-1]])
        cut = {
            "positional_embedding": model.positional_embedding[:end],
            "attn_mask": model.attn_mask[:end, :end],
        }
        chunk = tokens[rows, :end].to(device, non_blocking=True)
        features.append(torch.func.functional_call(model, cut, (None, chunk))[1])
    return torch.cat(features)[order.argsort().to(device, non_blocking=True)]


# ---- Processes -----------------------------------------------------------------------------------


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def barrier() -> None:
    if world_size() > 1:
        dist.barrier()


def gather(x: Tensor) -> Tensor:
    """The rows of x of all processes in rank order, with gradient; x itself on one process.

    Every process computes the same loss from the same gathered rows, so the gradient of its own
    rows is the true one without communication; DistributedDataParallel then divides by the number
    of processes, which the hook makes up for.
    """
    if world_size() == 1:
        return x
    rows = [torch.empty_like(x) for _ in range(world_size())]
    dist.all_gather(rows, x.detach().contiguous())
    if x.requires_grad:
        own = x.view_as(x)
        own.register_hook(lambda grad: grad * world_size())
        rows[rank()] = own
    return torch.cat(rows)


# ---- Data: pictures with a caption and its negatives ---------------------------------------------


class Source(NamedTuple):
    """A captions file, its pictures and its negatives, below --data-root/NAME."""

    captions: str
    images: str
    negatives: str
    filler: str  # of negatives.py
    get: str  # where a user finds the files


COCO = "http://images.cocodataset.org"
GET = {
    "coco": f"unzip {COCO}/annotations/annotations_trainval2014.zip and {COCO}/zips/train2014.zip",
    "cc3m": "img2dataset --output_format files --output_folder images, of the urls of CC3M",
    "vg": "unzip region_descriptions.json.zip, images.zip and images2.zip (flat, into images) of "
    "https://homes.cs.washington.edu/~ranjay/visualgenome",
}
TRAIN2014 = "annotations/captions_train2014.json", "train2014", "negatives_train2014.jsonl"
DATA = {
    "toy": Source("captions_train.json", "images", "negatives_train.jsonl", "ngram", ""),
    "coco": Source(*TRAIN2014, "mlm", GET["coco"]),
    "cc3m": Source("images", "images", "negatives.jsonl", "mlm", GET["cc3m"]),
    "vg": Source("region_descriptions.json", "images", "negatives.jsonl", "mlm", GET["vg"]),
}


class Negatives(Sequence):
    """The records of a file of negatives.py, "image" made a path below `images`, "box" (left, top,
    right, bottom) in pixels, or None. Parsed when asked for: 9 million take 72 MB.

    missing  the pictures that are not there
    Raises BadInput, which names the line.
    """

    def __init__(self, path: Path, images: Path):
        self.path, self.images, self.starts = path, images, array("q", [0])
        pictures = set()
        with reading(path, "a file of negatives.py"), path.open("rb") as file:
            for number, line in enumerate(file, 1):
                with reading(f"{path}, line {number},", "a record of negatives.py"):
                    pictures.add(self._record(line)["image"])
                self.starts.append(self.starts[-1] + len(line))
        self.missing = {picture for picture in pictures if not os.path.exists(picture)}

    def _record(self, line: bytes) -> dict:
        record = json.loads(line)
        texts = [record[kind] for kind in KINDS if record[kind] is not None]
        if not all(isinstance(text, str) for text in (record["caption"], *texts)):
            raise TypeError("a caption that is not text")
        box = record.get("box") and tuple(map(int, record["box"]))
        return record | {"image": str(self.images / record["image"]), "box": box}

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, i: int) -> dict:
        if not 0 <= i < len(self):
            raise IndexError(i)
        start, end = self.starts[i : i + 2]
        with self.path.open("rb") as file:
            file.seek(start)
            return self._record(file.read(end - start))


def prepare(name: str, root: Path) -> tuple[Path, Path]:
    """(negatives file, picture folder) of a named source; what can be made is made first."""
    source = DATA[name]
    captions, images, out = (root / name / p for p in source[:3])
    if name == "toy" and rank() == 0 and not captions.exists():
        toy.make_world(captions.parent)
    barrier()
    for path in (captions, images):
        if not path.exists():
            raise BadInput(f"--data {name} needs {path}: {source.get} in {root / name}")
    if not out.exists():  # the same for all processes: none writes it before all have come
        negatives.generate(captions, out, source.filler)
    barrier()
    return out, images


def collect_records(args: argparse.Namespace) -> ConcatDataset:
    """The records of all --data; what does not exist yet is made by all processes together."""
    files = [name for name in args.data if name not in DATA]
    if unknown := [name for name in files if not Path(name).is_file()]:
        raise BadInput(f"--data {unknown[0]}: neither a file nor one of {', '.join(DATA)}")
    folders = args.images * len(files) if len(args.images) == 1 else args.images
    if len(folders) != len(files):
        raise BadInput(
            f"--images: one folder, or one for each of the {len(files)} .jsonl of --data"
        )
    given = {file: (Path(file), Path(folder)) for file, folder in zip(files, folders)}
    places = [given.get(name) or prepare(name, Path(args.data_root)) for name in args.data]
    parts = [Negatives(*place) for place in places]
    missing = sorted(set().union(*(part.missing for part in parts)))
    if len(missing) > args.max_bad_images:
        raise BadInput(f"{len(missing)} pictures are missing: {missing[0]} ...")
    return ConcatDataset(parts)


def load_image(path: str, transform: Callable, box=None, draft: int = 0) -> Tensor:
    """One picture through `transform`, cropped to box (left, top, right, bottom) if given.

    draft  a JPEG at least twice that many pixels wide and high is decoded at half the size, or less
    """
    with reading(f"the picture {path}", "a picture"), Image.open(path) as image:
        if draft and not box:
            image.draft("RGB", (draft, draft))
        image = image.convert("RGB")
        if box and not (box[0] < min(box[2], image.width) and box[1] < min(box[3], image.height)):
            raise ValueError(f"its size is {image.size}, the box {box} lies outside")
        return transform(image.crop(box) if box else image)


class Pairs(Dataset):
    """Item (epoch, i) -> image (3, H, W), tokens (1 + K, L), valid (K,), bad ().

    A picture's augmentation depends on (seed, epoch, i) alone, not on workers or processes. With
    `skip_bad`, a picture that cannot be read gives way to the next that can; bad = i then, else -1.
    """

    def __init__(self, records: Sequence, kinds, load: Callable, tokenizer, seed, skip_bad=False):
        self.records, self.kinds, self.load = records, kinds, load
        self.tokenizer, self.seed, self.skip_bad = tokenizer, seed, skip_bad

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        with torch.random.fork_rng(devices=[]):
            # torch.manual_seed would also seed CUDA, at 0.2 ms an item
            torch.default_generator.manual_seed(hash((self.seed, *key)) % 2**63)
            for i in itertools.chain(range(key[1], len(self.records)), range(key[1])):
                record = self.records[i]
                try:
                    image = self.load(record["image"], box=record.get("box"))
                    break
                except BadInput:
                    if not self.skip_bad:
                        raise
            else:
                raise BadInput("none of the pictures can be read")
        texts = [record["caption"], *(record[kind] or "" for kind in self.kinds)]
        valid = torch.tensor([bool(text) for text in texts[1:]], dtype=torch.bool)
        bad = torch.tensor(-1 if i == key[1] else key[1])
        return image, self.tokenizer(texts), valid, bad


def batch_keys(n: int, batch_size: int, epochs: int, seed: int) -> Iterator[list[tuple[int, int]]]:
    """This process's share of every global batch, as (epoch, index) keys for Pairs.

    The global batches do not depend on the number of processes. An epoch's last, incomplete batch
    is left out.
    """
    share = batch_size // world_size()
    for epoch in range(epochs):
        generator = torch.Generator().manual_seed(hash((seed, epoch)) % 2**63)
        order = torch.randperm(n, generator=generator).tolist()
        for start in range(rank() * share, n // batch_size * batch_size, batch_size):
            yield [(epoch, i) for i in order[start : start + share]]


# ---- Training ------------------------------------------------------------------------------------


class Encoder(nn.Module):
    """What DistributedDataParallel wraps: one forward for pictures and all captions that exist."""

    def __init__(self, model: nn.Module, precision="fp32", itm=False, itm_negatives=False):
        super().__init__()
        self.bf16, self.itm, self.itm_negatives = precision == "bf16", itm, itm_negatives
        self.model = model.to(memory_format=torch.channels_last)  # ResNets: faster convolutions
        for module in model.modules():  # but 8x slower norms of few channels on a CPU: the toy's
            if isinstance(module, nn.BatchNorm2d) and module.num_features <= 8:
                module.register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(),))

    def forward(self, images: Tensor, tokens: Tensor, valid: Tensor):
        """images (b, 3, H, W), tokens (b, 1 + K, L), valid (b, K) -> unit features image (b, D),
        text (b, 1 + K, D), 0 where a negative is missing, exp(logit_scale), and with --itm X-VLM's
        matching loss of these pairs.

        `tokens` and `valid` stay on the CPU: what is to be encoded is known without a device sync.
        """
        exists = F.pad(valid, (1, 0), value=True)  # (b, 1 + K)
        images = images.contiguous(memory_format=torch.channels_last)
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.bf16):
            if self.itm:
                own = tokens[exists]
                image, encoded, *itm = self.model(images, own, exists, self.itm_negatives)
            else:
                image = self.model.encode_image(images, normalize=True)
                encoded, itm = encode_text(self.model, tokens[exists]), ()
        image, encoded = image.float(), encoded.float()
        text = image.new_zeros(exists.numel(), image.shape[-1])
        where = exists.flatten().nonzero().squeeze(1).to(images.device, non_blocking=True)
        text = text.index_copy(0, where, encoded).view(*exists.shape, -1)
        return image, text, self.model.logit_scale.exp(), *itm


def similarities(image: Tensor, text: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """image (B, D), text (B, 1 + K, D) -> sim (B, B), sim_neg (B, B, K), text_neg (B, B, K):
    images by captions, images by negatives and captions by negatives, as logits."""
    caption, negative = text[:, 0], text[:, 1:]
    return (
        scale * image @ caption.T,
        scale * torch.einsum("id,jkd->ijk", image, negative),
        scale * torch.einsum("id,jkd->ijk", caption, negative),
    )


def prepare_model(model: nn.Module, args: argparse.Namespace) -> None:
    """The flags, and no dropout in a text tower of transformers: two passes must be the same."""
    text = getattr(model, "text", None)
    if type(text).__name__ == "HFTextEncoder":
        text.transformer.eval()
    try:
        if args.lock_image:
            model.lock_image_tower(freeze_bn_stats=True)
        if args.grad_checkpointing:
            model.set_grad_checkpointing()
    except (AttributeError, NotImplementedError, AssertionError) as e:
        flags = "--lock-image or --grad-checkpointing"
        raise BadInput(f"{args.model} cannot do {flags}: {e!r}") from e


def parameter_groups(model: nn.Module, weight_decay: float, lr_mult: float = 1.0) -> list[dict]:
    """No decay of biases, gains, batch and layer norms, logit_scale [open_clip, authors' code]; the
    projections and heads of an X-VLM at lr_mult times the rate."""
    groups = {(True, False): [], (False, False): []}
    for name, p in model.named_parameters():
        if p.requires_grad:
            exempt = p.ndim < 2 or any(s in name for s in ("bn", "ln", "bias", "logit_scale"))
            head = name.startswith(getattr(model, "heads", ()))
            groups.setdefault((exempt, head), []).append(p)
    return [
        {
            "params": parameters,
            "weight_decay": 0.0 if exempt else weight_decay,
            "lr_mult": lr_mult if head else 1.0,
        }
        for (exempt, head), parameters in groups.items()
    ]


def lr_factor(step: int, warmup: float, total: int, schedule: str = "cosine") -> float:
    """Linear warmup, then a cosine or a line to 0; `step` from 0; a warmup below 1 is a share."""
    warmup = warmup if warmup >= 1 else int(warmup * total)
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, total - warmup)
    return 1 - done if schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))


FULL = "itc,hn,imc,cmr"  # Eq. (8)
LOSSES = ("itc", "itc,hn", "itc,hn,imc", "itc,hn,cmr", FULL, "itc,hn,imc_released,cmr")


class Objective(NamedTuple):
    """What a value of --losses means: rows of Table 4 are settings of Eq. (8), not other code."""

    kinds: tuple[str, ...]  # () leaves Eq. (1)
    alpha: float
    beta: float
    imc: Callable

    @classmethod
    def parse(cls, losses: str, alpha: float, beta: float) -> "Objective":
        terms = losses.split(",")
        return cls(
            kinds=KINDS if "hn" in terms else (),
            alpha=alpha if "imc" in terms or "imc_released" in terms else 0.0,
            beta=beta if "cmr" in terms else 0.0,
            imc=imc_loss_released if "imc_released" in terms else imc_loss,
        )


def batch_loss(features: list[Tensor], valid: Tensor, threshold: Tensor, objective: Objective):
    """(loss, its terms, pos (B,), neg (B, K), valid (B, K)) of one global batch, Eq. (8), from this
    process's features and valid (b, K)."""
    image, text, scale, *itm = features
    image, text, valid = gather(image), gather(text), gather(valid)
    sim, sim_neg, text_neg = similarities(image, text, scale)
    if objective.imc is imc_loss:  # Eq. (3) knows a caption's own negatives only
        text_neg = text_neg.diagonal(dim1=0, dim2=1).T  # (B, K)
    _, alpha, beta, imc = objective
    loss, terms = ce_clip_loss(sim, sim_neg, text_neg, threshold, valid, alpha, beta, imc)
    if itm:  # each process has drawn its own pairs
        terms["itm"] = gather(itm[0].float()[None]).mean()
        loss = loss + terms["itm"]
    terms = {"loss": loss, **terms, "logit_scale": scale}
    return loss, terms, *own_pairs(sim.detach(), sim_neg.detach()), valid


def backward(encoder: nn.Module, batch, threshold: Tensor, objective: Objective, micro: int = 0):
    """Add the gradient of one global batch to the parameters; returns what batch_loss does.

    batch  images (b, 3, H, W), on the device, tokens (b, 1 + K, L) and valid (b, K) on the CPU
    micro  0, or how many pairs at a time have a graph (gradient caching): the features of all are
           computed without one, the loss gives their gradients, and these go through the encoder in
           chunks. Same gradient, the memory of `micro` pairs, one more forward pass.
    """
    valid = batch[2].to(batch[0].device, non_blocking=True)
    if not micro:
        loss, *rest = batch_loss(encoder(*batch), valid, threshold, objective)
        loss.backward()
        return loss, *rest
    chunks = list(zip(*(x.split(micro) for x in batch)))
    with torch.no_grad():
        images, texts, scales = zip(*(getattr(encoder, "module", encoder)(*c) for c in chunks))
    features = [torch.cat(images), torch.cat(texts), scales[0].clone()]
    loss, *rest = batch_loss([f.requires_grad_() for f in features], valid, threshold, objective)
    loss.backward()
    image, text, scale = (f.grad for f in features)
    for n, (chunk, *grads) in enumerate(zip(chunks, image.split(micro), text.split(micro)), 1):
        last = n == len(chunks)  # the processes' gradients are added up once
        with contextlib.nullcontext() if last or world_size() == 1 else encoder.no_sync():
            torch.autograd.backward(encoder(*chunk), [*grads, scale / len(chunks)])
    return loss, *rest


def make_loader(args, records: Sequence, kinds, loaded: Loaded, start: int) -> DataLoader:
    """The batches of the whole run after step `start`."""
    size = torch.tensor(loaded.model.visual.image_size).max().item()
    load = functools.partial(load_image, transform=loaded.train_transform, draft=size)
    if args.data == ["toy"]:  # small pictures, jittered when they were drawn: each is decoded once
        load = functools.cache(functools.partial(load_image, transform=loaded.eval_transform))
    keys = batch_keys(len(records), args.batch_size, args.epochs, args.seed)
    return DataLoader(
        Pairs(records, kinds, load, loaded.tokenizer, args.seed, args.max_bad_images > 0),
        batch_sampler=itertools.islice(keys, start, None),
        num_workers=args.workers,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=outlive_signals,
    )


def outlive_signals(_worker: int) -> None:
    """Ctrl-C is the trainer's alone; a SIGTERM to every process leaves it 30 s to end its step."""
    os.setsid()
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(30))


class RunFolder:
    """A run's folder as the first process writes it: config.json, log.jsonl, MODEL.json for
    open_clip.add_model_config, checkpoints; and the progress bar. The others write nothing.

    Steps are kept on the device until `flush`; after `start` of them a resumed run goes on.
    """

    def __init__(self, out: Path, config: dict, loaded: Loaded, start: int, total: int, bad: set):
        self.out, self.config, self.loaded = out, config, loaded
        self.bad, self.named = bad, set(bad)  # pictures that could not be read
        self.waiting, self.clock = [], time.perf_counter()
        bar = {"total": total, "initial": start, "desc": str(out), "unit": "step"}
        self.bar = tqdm(**bar, disable=rank() > 0)
        if rank() > 0:
            return
        out.mkdir(parents=True, exist_ok=True)
        self.log = negatives.open_locked(out / "log.jsonl")
        self.log.truncate(sum(map(len, itertools.islice(self.log, start))))
        old = [*out.glob("*.part")]
        if not start:
            old += [*out.glob("epoch_*.pt"), *out.glob("step_*.pt")]
        for path in old:
            path.unlink()
        for name, content in (("config", config), (loaded.name, loaded.config)):
            (part := out / f"{name}.part").write_text(json.dumps(content, indent=1))
            os.replace(part, out / f"{name}.json")

    def add(self, step: int, epoch: int, lr: float, terms: dict[str, Tensor]) -> None:
        values = torch.stack([t.detach().float().squeeze() for t in terms.values()])
        self.waiting.append(({"step": step, "epoch": epoch, "lr": lr}, list(terms), values))

    def flush(self, stop: bool) -> bool:
        """Write a line for each waiting step: every loss term and threshold, exp(logit_scale), lr,
        pairs/s, and how many pictures could not be read, each of which is named once. Returns
        whether any process is to stop. Raises BadInput for a loss that is not finite, and for too
        many bad pictures."""
        stop, self.bad = agree(stop, self.bad)
        for path in sorted(self.bad - self.named) if rank() == 0 else ():
            tqdm.write(f"{path} cannot be read: another picture takes its place", sys.stderr)
        self.named |= self.bad
        rows = torch.stack([values for *_, values in self.waiting]).tolist()  # one transfer
        seconds, self.clock = time.perf_counter() - self.clock, time.perf_counter()
        speed = self.config["batch_size"] * len(rows) / seconds
        for (line, names, _), row in zip(self.waiting, rows):
            line |= dict(zip(names, row)) | {"pairs_per_s": speed, "bad_images": len(self.bad)}
            if not math.isfinite(line["loss"]):
                raise BadInput(f"the loss is not finite: {json.dumps(line)}")
            if rank() == 0:
                self.log.write(json.dumps(line).encode() + b"\n")
        if rank() == 0:
            self.log.flush()
        self.bar.set_postfix_str(f"loss {line['loss']:.3f}", refresh=False)
        self.bar.update(len(rows))
        self.waiting = []
        if len(self.bad) > self.config["max_bad_images"]:
            raise BadInput(f"{len(self.bad)} pictures cannot be read, more than --max-bad-images")
        return stop

    def save(self, name: str, **more) -> None:
        """A checkpoint; the log on the disk holds every step that it has seen."""
        if rank() == 0:
            os.fsync(self.log.fileno())
            save_checkpoint(self.out / name, self.loaded, run=self.config, **more)
            for old in sorted(self.out.glob("step_*.pt"))[:-2]:
                old.unlink()


OPERATION = {"out", "resume", "overwrite", "workers", "save_every", "max_bad_images", "processes"}
OPERATION |= {"micro_batch", "grad_checkpointing"}
# what an X-VLM's settings are for other models, and in runs begun before there were any
RECIPE = {"schedule": "cosine", "itm": False, "itm_negatives": False, "lr_mult": 1.0}
RECIPE |= {"adam_eps": 1e-6}


def last_state(out: Path, config: dict) -> dict:
    """What the newest whole step_*.pt of a run holds, {} if none; a damaged one is passed over.

    Refuses a run of other settings; OPERATION may differ, for it changes no result.
    """
    if not (out / "config.json").exists():
        if any(out.glob("*.pt")):
            raise BadInput(f"{out} holds checkpoints of no run of ours: give another --out")
        return {}
    old, new = RECIPE | read_json(out / "config.json"), json.loads(json.dumps(config))
    differ = [k for k, v in new.items() if k not in OPERATION and old.get(k) != v]
    if was := "; ".join(f"{k} {old.get(k)}, now {new[k]}" for k in differ):
        raise BadInput(f"{out} was begun with {was}: resume with the same settings")
    for path in sorted(out.glob("step_*.pt"), reverse=True):
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except Exception as e:
            tqdm.write(f"{path} is damaged, passed over: {str(e).splitlines()[0]}", sys.stderr)
    if any(out.glob("epoch_*.pt")):
        raise BadInput(f"{out} holds checkpoints but no state to resume: --overwrite begins again")
    return {}


def set_up(args: argparse.Namespace, state: dict, device):
    """(the model, what encodes for all processes, its optimizer), as a run begins or goes on."""
    torch.manual_seed(args.seed)
    if state:
        loaded = build_model(state["model"], None, state["config"], state.get("preprocess"))
    elif args.pretrained and Path(args.pretrained).is_file():
        loaded = load_model(args.pretrained, args.model)
        if loaded.name != Path(args.model).name.removesuffix(".json"):
            raise BadInput(f"{args.pretrained} holds a {loaded.name}, not a {args.model}: --model")
    else:
        loaded = build_model(args.model, args.pretrained)
    model = loaded.model.to(device).train()
    prepare_model(model, args)
    encoder = Encoder(model, args.precision, args.itm, args.itm_negatives)
    groups = parameter_groups(model, args.weight_decay, args.lr_mult)
    options = {"betas": (0.9, 0.98), "eps": args.adam_eps, "fused": True}
    optimizer = torch.optim.AdamW(groups, lr=args.lr, **options)
    if state:
        model.load_state_dict(state["state_dict"])
        optimizer.load_state_dict(state["optimizer"])
    if world_size() > 1:
        # a CLIP uses all it trains; CoCa has a decoder, SigLIP a bias that no softmax loss moves,
        # X-VLM without --itm half a BERT
        unused = type(model) is not open_clip.CLIP
        encoder = DistributedDataParallel(encoder, find_unused_parameters=unused)
    return loaded, encoder, optimizer


def train(args: argparse.Namespace, losses: str, out: Path, records: Sequence, device) -> Path:
    """Fine-tune one model with one set of losses (see RunFolder); returns the last checkpoint."""
    objective = Objective.parse(losses, args.alpha, args.beta)
    steps = len(records) // args.batch_size  # an epoch
    if steps == 0:
        raise BadInput(f"{len(records)} captions do not fill one batch of {args.batch_size}")
    config = vars(args) | {"losses": losses, "processes": world_size(), "captions": len(records)}
    state = last_state(out, config) if args.resume else {}
    start, total = state.get("step", 0), steps * args.epochs
    loaded, encoder, optimizer = set_up(args, state, device)
    # before the first step there is no earlier one: Th^0 = 0, as in the authors' code
    first = torch.full((len(objective.kinds),), args.threshold or 0.0)
    threshold = state.get("threshold", first).to(device)
    folder = RunFolder(out, config, loaded, start, total, set(state.get("bad", ())))
    often = 10 if device.type == "cuda" else 1  # looking at a value costs a device sync
    batches = iter(make_loader(args, records, objective.kinds, loaded, start))
    with folder.bar, stop_signals() as asked, ending(batches):
        for step, (images, tokens, valid, bad) in enumerate(batches, start + 1):
            batch = [images.to(device, non_blocking=True), tokens, valid]
            lr = args.lr * lr_factor(step - 1, args.warmup, total, args.schedule)
            for group in optimizer.param_groups:
                group["lr"] = lr * group.get("lr_mult", 1)
            # dropout, and --itm's draws, as in the uninterrupted run
            torch.manual_seed(hash((args.seed, step, rank())) % 2**63)
            optimizer.zero_grad()
            _, terms, *own, valid = backward(encoder, batch, threshold, objective, args.micro_batch)
            optimizer.step()
            loaded.model.logit_scale.data.clamp_(0, math.log(100))  # [CLIP, authors' code]

            terms |= {f"threshold_{kind}": t for kind, t in zip(KINDS, threshold)}
            folder.add(step, math.ceil(step / steps), lr, terms)
            folder.bad |= {records[i]["image"] for i in bad[bad >= 0].tolist()}
            if args.threshold is None:
                threshold = adaptive_threshold(*own, valid, args.upper_bound, threshold)
            due = step % steps == 0 or step % args.save_every == 0
            if not due and step % often:
                continue
            stop = folder.flush(bool(asked))
            now = {"threshold": threshold.cpu(), "step": step}
            if step % steps == 0:
                folder.save(f"epoch_{step // steps}.pt", **now)
            if stop or due:
                now |= {"optimizer": optimizer.state_dict(), "bad": sorted(folder.bad)}
                folder.save(f"step_{step:08d}.pt", **now)
            if stop:
                raise BadInput(f"stopped after step {step} of {total}: --resume goes on")
    barrier()  # the checkpoint is there for every process that loads it next
    return out / f"epoch_{args.epochs}.pt"


@contextlib.contextmanager
def ending(batches: Iterator) -> Iterator[None]:
    """End a loader's processes, which an exception would keep for the 30 s of outlive_signals."""
    try:
        yield
    finally:
        getattr(batches, "_shutdown_workers", int)()


@contextlib.contextmanager
def stop_signals() -> Iterator[list]:
    """A list that is empty until SIGTERM or Ctrl-C has come: both wait for the end of a step."""
    asked = []
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = [signal.signal(number, lambda *got: asked.append(got)) for number in numbers]
    try:
        yield asked
    finally:
        for number, handler in zip(numbers, before):
            signal.signal(number, handler)


def agree(stop: bool, bad: set[str]) -> tuple[bool, set[str]]:
    """(whether any process is to stop, the bad pictures of all)."""
    seen = [(stop, bad)] * world_size()
    if world_size() > 1:
        dist.all_gather_object(seen, (stop, bad))
    return any(s for s, _ in seen), set().union(*(b for _, b in seen))


# ---- Command line --------------------------------------------------------------------------------

# The toy world's own settings; everything else stays the paper's.
TOY = {"model": "toy", "pretrained": None, "losses": ["itc", "itc,hn", FULL], "workers": 0}
TOY |= {"epochs": 2, "batch_size": 64, "lr": 2e-3}
TOY_PRETRAINING = {"epochs": 4, "lr": 7e-4}


def arguments() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add = p.add_argument_group("data").add_argument
    add("--data", nargs="+", default=["toy"], help=f"{', '.join(DATA)}, or .jsonl of negatives.py")
    add("--images", nargs="+", default=[], help="picture folder of each .jsonl, or one for all")
    add("--data-root", default="data", help="where the named data lie [ours]")
    add("--workers", type=int, default=4, help="loader processes [authors' code: 0]")
    add = p.add_argument_group("model").add_argument
    add("--model", default="ViT-B-32-quickgelu", help="open_clip's, xvlm, or .json [Sec. 4.1]")
    add("--pretrained", default="openai", help="open_clip tag, file, or none [Sec. 4.1]")
    add = p.add_argument_group("loss").add_argument
    one_of = f"one run each: {' '.join(LOSSES)} [Table 4]"
    add("--losses", nargs="+", choices=LOSSES, default=[FULL], metavar="TERMS", help=one_of)
    add("--alpha", type=float, default=0.2, help="weight of IMC, Eq. 8 [Sec. 4.1]")
    add("--beta", type=float, default=0.4, help="weight of CMR, Eq. 8 [Sec. 4.1]")
    add("--upper-bound", type=float, default=10.0, help="u of Eq. 7 [Sec. 4.4]")
    add("--threshold", type=float, help="a fixed one in place of Eq. 5-7 [Fig. 5a]")
    add = p.add_argument_group("optimisation").add_argument
    add("--epochs", type=int, default=5, help="[Sec. 4.1]")
    add("--batch-size", type=int, default=256, help="over all processes [Sec. 4.1]")
    add("--lr", type=float, default=5e-6, help="[authors' code; paper: default]")
    add("--warmup", type=float, default=50, help="steps, below 1: a share [authors' code]")
    add("--schedule", choices=("cosine", "linear"), help="[authors' code: cosine]")
    add("--weight-decay", type=float, default=0.1, help="[authors' code]")
    default = "bf16" if torch.cuda.is_available() else "fp32"
    add("--precision", choices=("bf16", "fp32"), default=default, help="[authors' code: fp16]")
    add("--micro-batch", type=int, default=0, help="pairs a process encodes at a time, 0: all")
    add("--grad-checkpointing", action="store_true", help="less memory, one more forward pass")
    add("--lock-image", action="store_true", help="train the text tower alone")
    add("--seed", type=int, default=42, help="[authors' code]")
    xvlm.add_arguments(p)
    p.add_argument("--out", help="run folder [runs/DATA]; other losses get -LOSSES added")
    p.add_argument("--overwrite", action="store_true", help="replace runs that are there")
    p.add_argument("--resume", action="store_true", help="go on with what --out holds, if anything")
    p.add_argument("--save-every", type=int, default=1000, help="steps between states to resume")
    p.add_argument("--max-bad-images", type=int, default=0, help="go on without so many pictures")
    p.set_defaults(**RECIPE)
    return p


def parse_args() -> argparse.Namespace:
    p = arguments()
    known = p.parse_known_args()[0]
    if known.data == ["toy"]:
        p.set_defaults(**TOY)
    if of_xvlm := "fusion_layer" in (named_config(known.model)[1] or ()):
        p.set_defaults(**xvlm.RECIPE)
    args = p.parse_args()
    if min(args.batch_size, args.epochs, args.save_every) < 1:
        p.error("--batch-size, --epochs and --save-every must be at least 1")
    if args.batch_size % world_size():
        p.error(f"--batch-size {args.batch_size} does not split over {world_size()} processes")
    args.out = args.out or str(Path("runs", "+".join(Path(name).stem for name in args.data)))
    args.pretrained = None if args.pretrained == "none" else args.pretrained
    xvlm.check(args, of_xvlm, world_size())
    return args


def main() -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if "WORLD_SIZE" in os.environ:  # torchrun
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        # hours may pass while the first process makes negatives
        dist.init_process_group(timeout=timedelta(days=1))
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    args = parse_args()
    suffix = {losses: "" if losses == FULL else f"-{losses.replace(',', '-')}" for losses in LOSSES}
    runs = {Path(args.out + suffix[losses]): losses for losses in args.losses}
    first = Path(f"{args.out}-pretrained")
    pretrain = args.data == ["toy"] and args.pretrained is None
    for out in [first] * pretrain + list(runs):  # before hours of work, not after
        there = (out / "config.json").exists() or any(out.glob("epoch_*.pt"))
        if there and not (args.overwrite or args.resume):
            raise BadInput(f"{out} holds a run: give another --out, --resume or --overwrite")
    records = collect_records(args)
    if pretrain:
        settings = argparse.Namespace(**(vars(args) | TOY_PRETRAINING))
        args.pretrained = str(train(settings, "itc", first, records, device))
    for out, losses in runs.items():
        train(args, losses, out, records, device)


if __name__ == "__main__":
    try:
        run(main)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
