"""Fine-tune CLIP on hard-negative captions with the CE-CLIP losses (arXiv 2306.08832, Eq. 1-8).

    torchrun --nproc_per_node 2 ce_clip.py --data coco                  # the paper's run (Sec. 4.1)
    torchrun --nproc_per_node 2 ce_clip.py --data coco --losses itc,hn --out runs/itc-hn  # Table 4
    python ce_clip.py --data negatives.jsonl --images DIR               # any file of negatives.py

Shape letters: B pairs in the global batch, b of them on this process, K kinds of negative in the
order of KINDS; L tokens, D embedding width. S(.,.) is always a logit, exp(logit_scale) * cosine.
The same gradient comes out on any number of processes, but for models with batch norm or dropout,
and X-VLM's matching loss, which draws among a process's pairs.
"""

import argparse
import hashlib
import itertools
import json
import math
import os
import re
import tempfile
import zipfile
from array import array
from collections import defaultdict, namedtuple
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path, PosixPath

import numpy as np
import open_clip
import torch
import torch.distributed as dist
import torch.nn.functional as F
from open_clip.model import get_model_preprocess_cfg, resize_pos_embed
from PIL import Image
from safetensors.torch import load_file
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from torch.utils.data import ConcatDataset, DataLoader, Dataset
from tqdm import tqdm

import negatives
from negatives import FOUR, KINDS, BadInput, at_least, naming, run

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
    hard = sim_neg.masked_fill(~valid, -torch.inf).flatten(1)  # (B, B*K); valid is the texts'
    image_to_text = F.cross_entropy(torch.cat([sim, hard], 1), target)
    text_to_image = F.cross_entropy(sim.T, target)
    return text_to_image + image_to_text


def imc_loss(pos: Tensor, text_neg: Tensor, valid: Tensor) -> Tensor:
    """Intra-modal contrast: push a caption away from its own negatives. Eq. (3).

        L = 1/B * sum_i - log e^S(I_i,T_i) / sum_k e^S(T_i,T_ik)

    pos       (B,)    S(I_i, T_i)
    text_neg  (B, K)  S(T_i, T_ik), caption by its own negatives
    valid     (B, K)  bool, True = exists; a caption without negatives adds 0
    returns   ()      may be below 0, and is in the tens for a CLIP at a scale of 100: S(I,T) is in
                      the numerator only. ValueError on a shape mismatch.
    The numerator is cross-modal: pushing captions apart alone would let the text tower drift away
    from the image tower, and the paper found it unstable (Sec. 3.2).
    Differs from the authors' code, see imc_loss_released.
    """
    B, K = text_neg.shape
    _check("imc_loss", pos=(pos, (B,)), valid=(valid, (B, K)))
    log_sum = text_neg.masked_fill(~valid, -torch.inf).logsumexp(1)  # (B,), -inf without any
    return torch.where(valid.any(1), log_sum - pos, 0).sum() / B


def imc_loss_released(text_neg: Tensor, valid: Tensor) -> Tensor:
    """Not the paper's: what the authors' released get_imc_loss computes in place of Eq. (3).

        L = 1/B * sum_i - log e^S(T_i,T_n) / sum_jk e^S(T_i,T_jk)

    text_neg  (B, B, K)  S(T_i, T_jk), every caption against every negative of the batch
    valid     (B, K)     bool, True = exists; in the authors' code missing ones count, as "###"
    returns   ()         0 when nothing is valid. Raises ValueError on a shape mismatch.
    T_n is the first negative of the batch: every caption is pulled towards that one. The released
    code has no image-text term, which Eq. (3) has in the numerator.
    """
    B, K = valid.shape
    _check("imc_loss_released", text_neg=(text_neg, (B, B, K)), valid=(valid, (B, K)))
    if not valid.any():
        return (text_neg * 0).sum()
    first = valid.flatten().float().argmax()
    texts = text_neg.masked_fill(~valid, -torch.inf).flatten(1)  # (B, B*K)
    return F.cross_entropy(texts, first.expand(B))


def cmr_loss(pos: Tensor, neg: Tensor, threshold: Tensor | float, valid: Tensor) -> Tensor:
    """Keep a pair ahead of its own hard negatives by a threshold per kind. Eq. (4) and (6).

        L = 1/B * sum_i sum_k max(0, S(I_i,T_ik) - S(I_i,T_i) + Th_k)

    pos        (B,)    S(I_i, T_i)
    neg        (B, K)  S(I_i, T_ik), image by its own negatives
    threshold  (K,)    Th_k: a constant (Eq. 4; a plain number does), or adaptive_threshold of the
                       previous step (Eq. 6); no gradient flows into it
    valid      (B, K)  bool, True = exists
    returns    ()      0 when nothing is valid. Raises ValueError on a shape mismatch.
    paper: sum over the batch / authors' code: also divides by K, missing negatives (which add 0)
    included / we: mean over B, sum over the kinds that exist.
    """
    B, K = neg.shape
    if not isinstance(threshold, Tensor):
        threshold = neg.new_full((K,), threshold)
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
    Why it adapts: a curriculum (Sec. 3.2, 4.3). Early on pairs lead by little and little is asked;
    as the lead grows, more is. Why u: swapped nouns make sentences that are wrong without a look at
    the picture, so that the lead over relation negatives, and with it what is asked, runs away.
    A threshold below 0 is harmless: it lets a pair stay behind, by no more than the mean just was.
    paper: only an upper bound / authors' code: also clamps at 0, averages the two terms over
    different captions, restarts at 0 every epoch, and is nan for an absent kind / we: Eq. (5), (7).
    """
    B, K = neg.shape
    previous = pos.new_zeros(K) if previous is None else previous
    shapes = {"pos": (pos, (B,)), "valid": (valid, (B, K)), "previous": (previous, (K,))}
    _check("adaptive_threshold", **shapes)
    count = valid.sum(0)  # (K,)
    mean_lead = (pos[:, None] - neg).masked_fill(~valid, 0).sum(0) / count.clamp(min=1)
    return torch.where(count > 0, mean_lead.clamp(max=upper_bound), previous)


def ce_clip_loss(
    sim: Tensor,
    sim_neg: Tensor,
    text_neg: Tensor,
    threshold: Tensor,
    valid: Tensor,
    alpha: float = 0.2,
    beta: float = 0.4,
) -> tuple[Tensor, dict[str, Tensor]]:
    """L = L_itc(hn) + alpha * L_imc + beta * L_cmr. Eq. (8).

    sim        (B, B)     S(I_i, T_j)
    sim_neg    (B, B, K)  S(I_i, T_jk); K = 0 leaves Eq. (1)
    text_neg   (B, K)     S(T_i, T_ik)
    threshold  (K,)       Th_k of the previous step
    valid      (B, K)     bool, True = exists
    alpha, beta           the paper's search found 0.2 and 0.4 (Sec. 4.1)
    returns    the loss (), and {"itc", "imc", "cmr"}: its terms, unweighted
    """
    pos, neg = own_pairs(sim, sim_neg)
    terms = {
        "itc": itc_hn_loss(sim, sim_neg, valid),
        "imc": imc_loss(pos, text_neg, valid),
        "cmr": cmr_loss(pos, neg, threshold, valid),
    }
    return terms["itc"] + alpha * terms["imc"] + beta * terms["cmr"], terms


def own_pairs(sim: Tensor, sim_neg: Tensor) -> tuple[Tensor, Tensor]:
    """pos (B,) = S(I_i, T_i) and neg (B, K) = S(I_i, T_ik): the diagonals of sim and sim_neg."""
    return sim.diagonal(), sim_neg.diagonal(dim1=0, dim2=1).T


def similarities(image: Tensor, text: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of the features image (B, D), text (B, 1 + K, D), a caption before its negatives.

    sim       (B, B)     S(I_i, T_j), images by captions
    sim_neg   (B, B, K)  S(I_i, T_jk), images by negatives
    text_neg  (B, K)     S(T_i, T_ik), captions by their own negatives
    """
    caption, negative = text[:, 0], text[:, 1:]
    sim = scale * image @ caption.T
    sim_neg = scale * torch.einsum("id,jkd->ijk", image, negative)
    text_neg = scale * torch.einsum("id,ikd->ik", caption, negative)
    return sim, sim_neg, text_neg


# ---- Models and checkpoints: open_clip's CLIPs, and X-VLM ----------------------------------------


# a model with what must travel with it: with name and config, its activation cannot be lost
Loaded = namedtuple("Loaded", "model name config train_transform eval_transform tokenizer")


def build_model(name: str, tag=None, config=None, preprocess=None) -> Loaded:
    """A model by its open_clip name, "xvlm", or the path of a model config (.json); with random
    weights, or those of a tag. OpenAI's and some others need QuickGELU, which open_clip 3 only
    warns about: we take the model's -quickgelu twin. `config`, if given, is what `name` shall mean,
    `preprocess` open_clip's image_mean, image_std ..., where no tag says them."""
    if name.endswith(".json"):
        with naming(name, "a model config"):
            config = dict(json.loads(Path(name).read_text(encoding="utf-8")))
        name = Path(name).stem
    if name == "xvlm" or (config and config.get("architecture") == "xvlm"):
        import xvlm  # here, for it needs more of transformers than CLIP does

        config = config or xvlm.CONFIG
        model, *others = xvlm.build(config)
        return Loaded(model, name, config, *others)
    if config and open_clip.get_model_config(name) != config:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, f"{name}.json")
            path.write_text(json.dumps(config))
            open_clip.add_model_config(path)
    if tag and open_clip.get_pretrained_cfg(name, tag).get("quick_gelu"):
        name = name.removesuffix("-quickgelu") + "-quickgelu"
    buildable = "a model that open_clip can build (offline: name a file)"
    with naming(f"{name} {tag or ''}".strip(), buildable):
        parts = open_clip.create_model_and_transforms(name, pretrained=tag, **(preprocess or {}))
        tokenizer = open_clip.get_tokenizer(name)
    return Loaded(parts[0], name, open_clip.get_model_config(name), *parts[1:], tokenizer)


DEFAULT_MODEL = "ViT-B-32-quickgelu"  # [Sec. 4.1]


def load_model(source: str, name: str = DEFAULT_MODEL) -> Loaded:
    """A model with its weights, by the name of

    a file of ours    which knows its model; `name` is not looked at
    a file of others  weights of a model `name`: see read_checkpoint, load_weights
    a folder          the same, of transformers' CLIPModel
    ViT-L-14/openai   a model of open_clip, and a tag of its weights
    openai            a tag of model `name`
    """
    path = Path(source)
    model, _, tag = source.rpartition("/")
    if not path.is_file() and tag in open_clip.list_pretrained_tags_by_model(model or name):
        return build_model(model or name, tag)
    if path.is_dir():
        files = [path / file for file in WEIGHT_FILES if (path / file).exists()]
        if not files:
            raise BadInput(f"{path} has none of {', '.join(WEIGHT_FILES)}: name a file")
        path = files[0]
    elif not path.exists():
        raise BadInput(f"{source} is no file, and no TAG or MODEL/TAG of open_clip's weights")
    with naming(path, f"a checkpoint of {name}"):
        saved = read_checkpoint(path)
        if "config" in saved and isinstance(saved.get("model"), str):
            loaded = build_model(saved["model"], None, saved["config"], saved["preprocess"])
        else:
            loaded = build_model(name)
            tqdm.write(f"warning: {path} is read as a {name}; its activation is not checked")
        load_weights(loaded.model, saved)
    return loaded


WEIGHT_FILES = ["open_clip_model.safetensors", "open_clip_pytorch_model.bin"]  # of open_clip, or
WEIGHT_FILES += ["model.safetensors", "pytorch_model.bin"]  # of transformers, first to last
# what lies beside weights and does no harm: settings, paths, numbers of numpy
SAFE = [argparse.Namespace, (PosixPath, "pathlib.PosixPath"), PosixPath, np.dtype]
SAFE += [(lambda _=None: {}, "collections.defaultdict"), list, dict, int, float]
SAFE += [type(np.dtype(kind)) for kind in ("bool", "int32", "int64", "float32", "float64")]
_scalar = np.float64(0).__reduce__()[0]
SAFE += [_scalar, (_scalar, "numpy.core.multiarray.scalar")]


def read_checkpoint(path: Path) -> dict:
    """What is in a file of torch of any age, a .safetensors, or a TorchScript archive of OpenAI's.
    A file of others must not be able to run code: nothing but tensors and SAFE is read, and no
    other TorchScript, which can write files when it is loaded."""
    with path.open("rb") as file:
        start = file.read(99).lstrip()
    if not start:
        raise ValueError("it is empty")
    if start.startswith(b"version https://git-lfs"):
        raise ValueError("it is a pointer of Git LFS: git lfs pull gets the file")
    if start.startswith(b"<"):
        raise ValueError("it is a web page: download the file itself")
    if path.suffix == ".safetensors":
        return load_file(path)
    archive = zipfile.is_zipfile(path)
    if archive and any("/code/" in name for name in zipfile.ZipFile(path).namelist()):
        if hashlib.sha256(path.read_bytes()).hexdigest() not in openai_digests():
            raise ValueError("it is TorchScript, but not OpenAI's: save model.state_dict()")
        saved = torch.jit.load(path, map_location="cpu").state_dict()
        for integer in ("input_resolution", "context_length", "vocab_size"):
            saved.pop(integer, None)
        return saved
    try:
        with torch.serialization.safe_globals(SAFE):
            saved = torch.load(path, map_location="cpu", weights_only=True, mmap=archive)
    except Exception as e:
        why = "torch cannot read it: damaged, or no checkpoint"
        if unsafe := re.search(r"GLOBAL (\S+)", str(e)):
            why = f"it holds {unsafe[1]}, which might run code: save model.state_dict() alone"
        raise ValueError(why) from e
    if not isinstance(saved, dict):
        raise ValueError(f"it holds a {type(saved).__name__}, not a state dict")
    return saved


def openai_digests() -> set[str]:
    """Sums of what OpenAI published; they stand in its addresses: .../sha256/ViT-B-32.pt."""
    names = open_clip.list_pretrained_models_by_tag("openai")
    return {open_clip.get_pretrained_cfg(name, "openai")["url"].split("/")[-2] for name in names}


def load_weights(model: nn.Module, saved: dict) -> None:
    """Load a state dict: `saved`, or what it has under one of four names; with the prefixes that
    DistributedDataParallel and torch.compile leave, in open_clip's names or transformers'."""
    for key in ("state_dict", "model", "model_state_dict", "state_dict_ema"):
        if isinstance(saved.get(key), dict):
            saved = saved[key]
    state = {re.sub(r"^((module|_orig_mod|model)\.)+", "", key): saved[key] for key in saved}
    if "vision_model.post_layernorm.weight" in state:
        state = from_transformers(state)
    table = state.get("visual.positional_embedding")
    if table is not None:
        state["visual.positional_embedding"] = table = table.float()
        resize_pos_embed(state, model)
        if state["visual.positional_embedding"] is not table:
            tqdm.write("warning: weights of another picture size: their position table is resized")
    missing, unknown = model.load_state_dict(state, strict=False)
    wrong = []
    for keys, what in ((missing, "missing"), (unknown, "unknown")):
        if keys:
            wrong.append(f"{len(keys)} weights are {what} ({', '.join(keys[:3])})")
    if wrong:
        raise ValueError(", ".join(wrong))


TRANSFORMERS = {  # in names of transformers' CLIPModel: in open_clip's
    "text_model.": "",
    "vision_model.": "visual.",
    "embeddings.": "",
    "encoder.layers": "transformer.resblocks",
    "position_embedding.weight": "positional_embedding",
    "patch_embedding": "conv1",
    "pre_layrnorm": "ln_pre",
    "post_layernorm": "ln_post",
    "final_layer_norm": "ln_final",
    "layer_norm": "ln_",
    "self_attn.q_proj.": "attn.in_proj_",
    "self_attn": "attn",
    "fc1": "c_fc",
    "fc2": "c_proj",
    "text_projection.weight": "text_projection",
    "visual_projection.weight": "visual.proj",
}


def from_transformers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of transformers' CLIPModel in open_clip's names; q, k, v are one matrix there,
    and projections stand the other way round."""
    found = {}
    for name, value in state.items():
        if "k_proj" in name or "v_proj" in name or "position_ids" in name:
            continue
        if "q_proj" in name:
            value = torch.cat([state[name.replace("q_proj", f"{x}_proj")] for x in "qkv"])
        if "projection" in name:
            value = value.T
        for theirs, ours in TRANSFORMERS.items():
            name = name.replace(theirs, ours)
        found[name] = value
    return found


def save_checkpoint(path: Path, loaded: Loaded, **more) -> None:
    """Atomic: the file is whole or absent. Plain tensors and numbers, so weights_only=True loads
    it, and so does open_clip: create_model_and_transforms(saved["model"], pretrained=path)."""
    kept = get_model_preprocess_cfg(loaded.model)
    keys = ("mean", "std", "interpolation", "resize_mode")
    preprocess = {f"image_{key}": kept[key] for key in keys if key in kept}
    saved = {"model": loaded.name, "config": loaded.config, "preprocess": preprocess}
    saved.update(state_dict=loaded.model.state_dict(), **more)
    part = path.with_suffix(".part")
    with naming(path, "written (is the disk full?)"):
        torch.save(saved, part)
        os.replace(part, path)


def encode_text(model: nn.Module, tokens: Tensor) -> Tensor:
    """Unit text features (N, D) of tokens (N, L), which are best on the CPU.

    CLIP attends causally and pools at the end-of-text token (the highest id): what follows a
    batch's last one can be cut off. Captions are encoded in a few chunks sorted by length.
    """
    device = model.logit_scale.device
    clip = type(model) is open_clip.CLIP
    if not clip or model.attn_mask is None or model.text_pool_type != "argmax":
        return model.encode_text(tokens.to(device), normalize=True)
    length = tokens.argmax(1) + 1  # (N,)
    order = length.argsort(stable=True)
    features = []
    for rows in order.chunk(min(4, 1 + len(tokens) // 128)):
        longest = int(length[rows[-1]])
        shorter = {
            "positional_embedding": model.positional_embedding[:longest],
            "attn_mask": model.attn_mask[:longest, :longest],
        }
        captions = tokens[rows, :longest].to(device, non_blocking=True)
        # a forward pass with these shorter tables: (None, unit text features, scale)
        features.append(torch.func.functional_call(model, shorter, (None, captions))[1])
    return torch.cat(features)[order.argsort().to(device, non_blocking=True)]


# ---- Processes -----------------------------------------------------------------------------------


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def gather(x: Tensor) -> Tensor:
    """The rows of x of all processes in rank order, with gradient; x itself on one process.

    Every process computes the same loss, so the gradient of its own rows is the true one without
    communication; DistributedDataParallel then divides by the number of processes, which the hook
    makes up for. logit_scale needs no gather: every process holds its whole gradient, and the mean
    of equal values is the value.
    """
    if world_size() == 1:
        return x
    rows = [torch.empty_like(x) for _ in range(world_size())]
    dist.all_gather(rows, x.detach().contiguous())
    if x.requires_grad:
        x.register_hook(lambda grad: grad * world_size())
    rows[rank()] = x
    return torch.cat(rows)


# ---- Data: pictures with a caption and its negatives ---------------------------------------------


# below --data-root/NAME: captions, pictures, and negatives, which are made if they are not there
DATA = {
    "coco": ("annotations/captions_train2014.json", "train2014", "negatives_train2014.jsonl"),
    "cc3m": ("images", "images", "negatives.jsonl"),  # by img2dataset --output_format files
    "vg": ("region_descriptions.json", "images", "negatives.jsonl"),
}


class Records(Dataset):
    """The lines of a file of negatives.py as (picture, box or None, [caption, negatives ...]), ""
    for a missing negative. Read when asked for: 9 million of them take 72 MB."""

    def __init__(self, path: Path, images: Path, kinds: list[str]):
        self.path, self.images, self.kinds = path, images, kinds
        self.file = None  # each loader process opens it for itself
        self.starts = array("q", [0])
        digest = hashlib.sha256()
        pictures = set()
        with naming(path), path.open("rb") as file:
            for line in file:
                digest.update(line)
                self.starts.append(self.starts[-1] + len(line))
                if rank() == 0:
                    pictures.update(PICTURE.findall(line))
            find_pictures(images, pictures)
        self.digest = digest.hexdigest()  # so that a run is not resumed on other captions

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, i: int) -> tuple[Path, list | None, list[str]]:
        with naming(f"{self.path}, line {i + 1},", "a record of negatives.py"):
            self.file = self.file or self.path.open("rb")
            self.file.seek(self.starts[i])
            record = json.loads(self.file.readline())
            texts = [record["caption"]] + [record[kind] or "" for kind in self.kinds]
            return self.images / record["image"], record.get("box"), texts


# the JSON string of a line's picture: to parse all of the line takes four times as long
PICTURE = re.compile(rb'"image": *("[^"\\]*(?:\\.[^"\\]*)*")')


def find_pictures(images: Path, names: set[bytes]) -> None:
    """Names a picture that is missing, before hours of work. Lists folders: on a network disk it
    takes long to look for each file."""
    folders = defaultdict(set)
    for name in json.loads(b"[" + b",".join(names) + b"]"):
        folder, file = os.path.split(name)
        folders[folder].add(file)
    for folder, files in folders.items():
        with naming(images / folder):
            missing = files.difference(os.listdir(images / folder))
        for file in sorted(missing):
            path = images / folder / file
            if not path.exists():  # one name can be spelt in two ways
                raise BadInput(f"{path}: no such picture ({len(missing)} are missing there)")


def load_records(args: argparse.Namespace, kinds: list[str]) -> ConcatDataset:
    """The records of all --data: names of DATA, and files of negatives.py, whose pictures lie in
    --images."""
    parts = []
    for name in args.data:
        if name in DATA:
            captions, images, made = (Path(args.data_root, name, path) for path in DATA[name])
            if not images.exists():
                raise BadInput(f"--data {name} needs {images}: docs/data.md says where to get it")
            if not made.exists() and rank() == 0:
                try:
                    negatives.generate(captions, made)
                except OSError as e:
                    elsewhere = f"negatives.py --out FILE, then --data FILE --images {images}"
                    raise BadInput(f"{e} (elsewhere: {elsewhere})") from e
            if world_size() > 1:
                dist.barrier()
            parts.append(Records(made, images, kinds))
        else:
            parts.append(Records(Path(name), Path(args.images), kinds))
    return ConcatDataset(parts)


def open_image(path: str | Path, box: tuple | None = None, draft: int = 0) -> Image.Image:
    """One picture in RGB, cropped to what of box (left, top, right, bottom) lies in it. A JPEG at
    least twice `draft` pixels wide and high is decoded at half the size, or less."""
    with naming(path, "a picture"), Image.open(path) as image:
        if draft and not box:
            image.draft("RGB", (draft, draft))
        if image.mode == "F":
            raise ValueError("its values have no known range: save it with 8 bits a channel")
        if image.mode.startswith("I"):  # 16 bits, which convert would cut off at 255
            values = np.asarray(image)
            values = values // 256 if values.max() > 255 else values
            image = Image.fromarray(values.clip(0, 255).astype(np.uint8))
        image = image.convert("RGB")
        if not box:
            return image
        left, top, right, bottom = box
        inside = (max(left, 0), max(top, 0), min(right, image.width), min(bottom, image.height))
        if not (inside[0] < inside[2] and inside[1] < inside[3]):
            raise ValueError(f"its size is {image.size}, the box {box} lies outside")
        return image.crop(inside)


class Pairs(Dataset):
    """Item (epoch, i) -> image (3, H, W), tokens (1 + K, L), valid (K,). A picture's augmentation
    depends on (seed, epoch, i) alone, not on workers or processes."""

    def __init__(self, records: Dataset, loaded: Loaded, seed: int):
        self.records, self.seed = records, seed
        self.transform, self.tokenizer = loaded.train_transform, loaded.tokenizer
        self.size = torch.tensor(loaded.model.visual.image_size).max().item()

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
        path, box, texts = self.records[key[1]]
        # torch.manual_seed would also seed CUDA, at 0.2 ms an item
        torch.default_generator.manual_seed(hash((self.seed, *key)) % 2**63)
        image = self.transform(open_image(path, box, self.size))
        valid = torch.tensor([text != "" for text in texts[1:]], dtype=torch.bool)
        return image, self.tokenizer(texts), valid


def batch_keys(n: int, batch_size: int, epochs: int, seed: int) -> Iterator[list[tuple[int, int]]]:
    """This process's share of every global batch, as (epoch, i) keys for Pairs; the batches do not
    depend on the number of processes. An epoch's last, incomplete one is left out."""
    share = batch_size // world_size()
    for epoch in range(epochs):
        generator = torch.Generator().manual_seed(hash((seed, epoch)) % 2**63)
        order = torch.randperm(n, generator=generator).tolist()
        for start in range(rank() * share, n // batch_size * batch_size, batch_size):
            yield [(epoch, i) for i in order[start : start + share]]


# ---- Training ------------------------------------------------------------------------------------


class Encoder(nn.Module):
    """What DistributedDataParallel wraps: one forward for pictures and all captions that exist.
    With micro_batch only so many pairs at a time have a graph, which the backward pass computes
    again [gradient caching]: the same gradient in less memory."""

    def __init__(self, model: nn.Module, bf16: bool = False, micro_batch: int = 0):
        super().__init__()
        self.model, self.bf16, self.micro_batch = model, bf16, micro_batch

    def forward(self, images: Tensor, tokens: Tensor, valid: Tensor):
        """images   (b, 3, H, W)
        tokens   (b, 1 + K, L), and valid (b, K): on the CPU, to be indexed without a device sync
        returns  unit features of pictures (b, D) and texts (b, 1 + K, D), 0 where a negative is
                 missing; exp(logit_scale) (); the matching loss (1,) of an X-VLM, else 0
        """
        if self.micro_batch:
            chunks = [x.split(self.micro_batch) for x in (images, tokens, valid)]
            parts = [checkpoint(self.encode, *c, use_reentrant=False) for c in zip(*chunks)]
            image, text, itm = (torch.cat(part) for part in zip(*parts))
        else:
            image, text, itm = self.encode(images, tokens, valid)
        return image, text, self.model.logit_scale.exp(), itm.mean(0, keepdim=True)

    def encode(self, images: Tensor, tokens: Tensor, valid: Tensor) -> tuple[Tensor, ...]:
        exists = F.pad(valid, (1, 0), value=True)  # (b, 1 + K): the caption always does
        itm = images.new_zeros(1)
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.bf16):
            if hasattr(self.model, "match"):  # an X-VLM
                image, encoded, itm = self.model(images, tokens[exists], exists)
            else:
                image = self.model.encode_image(images, normalize=True)
                encoded = encode_text(self.model, tokens[exists])
        text = images.new_zeros(exists.numel(), image.shape[-1])
        where = exists.flatten().nonzero()[:, 0].to(images.device, non_blocking=True)
        text = text.index_copy(0, where, encoded.float())
        return image.float(), text.view(*exists.shape, -1), itm.float().reshape(1)


def lr_factor(step: int, warmup: int, total: int) -> float:
    """Linear warm-up, then a cosine to 0; `step` from 0 [authors' code]."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))


# not compared on resuming: what changes no result, and paths (digests stand for the captions)
NOT_COMPARED = ("data", "data_root", "images", "out", "workers", "micro_batch")
NOT_COMPARED += ("grad_checkpointing", "resume", "save_every", "log_every")


def last_state(out: Path, settings: dict) -> dict | None:
    """The run's whole checkpoint of the most steps; BadInput for other settings or captions."""
    newest = None
    for path in out.glob("*.pt"):
        try:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            if "settings" in state and (newest is None or state["step"] > newest["step"]):
                newest = state
        except Exception as e:
            tqdm.write(f"{path} is damaged, passed over: {' '.join(str(e).split())[:200]}")
    begun = newest["settings"] if newest else settings
    differ = [f"{key} {begun.get(key)}" for key in settings if begun.get(key) != settings[key]]
    if differ:
        raise BadInput(f"{out} was begun with {', '.join(differ)}: resume with the same")
    return newest


def begin(args: argparse.Namespace, kinds: list[str], settings: dict, device: torch.device):
    """(Loaded, optimizer, threshold, steps done) at the start of a run, or where it was left."""
    out = Path(args.out)
    state = last_state(out, settings) if args.resume else None
    if state is None and any(out.glob("*.pt")):
        raise BadInput(f"{out} holds checkpoints: --resume a run of ours, or give another --out")
    torch.manual_seed(args.seed)
    if args.pretrained == "none":
        loaded = build_model(args.model)
    else:
        loaded = load_model(args.pretrained, args.model)
    if args.no_augmentation:
        loaded = loaded._replace(train_transform=loaded.eval_transform)
    # channels_last: faster convolutions of ResNets
    model = loaded.model.to(device, memory_format=torch.channels_last).train()
    if args.lock_image:  # of a timm tower all but its head, as open_clip
        getattr(model.visual, "trunk", model.visual).requires_grad_(False).eval()
    if args.grad_checkpointing:
        model.set_grad_checkpointing()
    # no decay of biases, gains, norms and logit_scale [open_clip, authors' code]
    groups = param_groups_weight_decay(model, args.weight_decay, no_weight_decay_list=["*bias*"])
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.98), eps=1e-6, fused=True)
    # Eq. 5 speaks of step t - 1, and before the first step there is none: Th^0 = 0 [authors' code]
    threshold, step = torch.full((len(kinds),), args.threshold or 0.0), 0
    if state:
        model.load_state_dict(state["state_dict"])
        optimizer.load_state_dict(state["optimizer"])
        threshold, step = state["threshold"], state["step"]
    if rank() == 0:
        out.mkdir(parents=True, exist_ok=True)
        (out / "config.json").write_text(json.dumps(settings, indent=1))
        with (out / "log.jsonl").open("a") as log:
            log.truncate(min(state["log"], log.tell()) if state else 0)  # no step twice
    return loaded, optimizer, threshold.to(device), step


def train(args: argparse.Namespace, device: torch.device) -> None:
    used = args.losses.split(",")  # the rows of Table 4 are settings of Eq. 8, not other code
    kinds = args.kinds if "hn" in used else []  # no kinds: K = 0, and Eq. 2 is Eq. 1
    alpha = args.alpha if "imc" in used else 0.0
    beta = args.beta if "cmr" in used else 0.0

    records = load_records(args, kinds)
    epoch_steps = len(records) // args.batch_size
    total = epoch_steps * args.epochs
    if total == 0:
        raise BadInput(f"{len(records)} captions do not fill one batch of {args.batch_size}")
    settings = {key: value for key, value in vars(args).items() if key not in NOT_COMPARED}
    settings["captions"] = [[len(part), part.digest] for part in records.datasets]
    loaded, optimizer, threshold, start = begin(args, kinds, settings, device)
    model, out = loaded.model, Path(args.out)
    encoder = Encoder(model, args.precision == "bf16", args.micro_batch)
    if world_size() > 1:
        # a CLIP uses all it trains; CoCa has a decoder, SigLIP a bias that no softmax loss moves
        unused = type(model) is not open_clip.CLIP
        encoder = DistributedDataParallel(encoder, find_unused_parameters=unused)
    keys = batch_keys(len(records), args.batch_size, args.epochs, args.seed)
    batches = DataLoader(
        Pairs(records, loaded, args.seed),
        batch_sampler=itertools.islice(keys, start, None),
        num_workers=args.workers,
        pin_memory=device.type == "cuda",
    )
    with tqdm(total=total, initial=start, desc=str(out), unit="step", disable=rank() > 0) as bar:
        for step, (images, tokens, valid) in enumerate(batches, start + 1):
            lr = args.lr * lr_factor(step - 1, args.warmup, total)
            for group in optimizer.param_groups:
                group["lr"] = lr
            torch.manual_seed(hash((args.seed, step, rank())) % 2**63)  # dropout, X-VLM's draws

            image, text, scale, itm = encoder(images.to(device, non_blocking=True), tokens, valid)
            image, text, valid = gather(image), gather(text), gather(valid.to(device))
            sim, sim_neg, text_neg = similarities(image, text, scale)  # S(I,T), S(I,T_k), S(T,T_k)
            loss, terms = ce_clip_loss(sim, sim_neg, text_neg, threshold, valid, alpha, beta)
            if "imc_released" in used:  # in place of Eq. 3, whose weight alpha is 0 here
                all_neg = scale * torch.einsum("id,jkd->ijk", text[:, 0], text[:, 1:])  # (B, B, K)
                terms["imc"] = imc_loss_released(all_neg, valid)
                loss = loss + args.alpha * terms["imc"]
            terms["itm"] = gather(itm).mean()  # each process has drawn its own pairs
            loss = loss + terms["itm"]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            model.logit_scale.data.clamp_(0, math.log(100))  # [CLIP, authors' code]

            bar.update()
            epoch_ends = step % epoch_steps == 0
            save = epoch_ends or step % args.save_every == 0
            if save or step % args.log_every == 0:  # looking at a value costs a device sync
                line = {"step": step, "epoch": math.ceil(step / epoch_steps), "lr": lr}
                line.update(loss=loss.item(), logit_scale=scale.item())
                line.update({name: term.item() for name, term in terms.items()})
                line.update({f"threshold_{kind}": th.item() for kind, th in zip(kinds, threshold)})
                if not math.isfinite(line["loss"]):
                    raise BadInput(f"the loss is not finite: {json.dumps(line)}")
                bar.set_postfix_str(f"loss {line['loss']:.3f}", refresh=False)
                if rank() == 0:
                    with open(out / "log.jsonl", "a") as log:
                        log.write(json.dumps(line) + "\n")
            if args.threshold is None:  # Eq. 5 and 7, for the next step
                pos, neg = own_pairs(sim, sim_neg)
                threshold = adaptive_threshold(pos, neg, valid, args.upper_bound, threshold)
            if save and rank() == 0:
                name = f"epoch_{step // epoch_steps}.pt" if epoch_ends else "last.pt"
                now = {"step": step, "threshold": threshold, "optimizer": optimizer.state_dict()}
                now.update(settings=settings, log=(out / "log.jsonl").stat().st_size)
                save_checkpoint(out / name, loaded, **now)


# ---- Command line --------------------------------------------------------------------------------

LOSSES = ["itc,hn,imc,cmr", "itc", "itc,hn", "itc,hn,imc", "itc,hn,cmr", "itc,hn,imc_released,cmr"]


def parse_args() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = p.add_argument
    add("--data", nargs="+", default=["coco"], help=f"{', '.join(DATA)}, or .jsonl of negatives.py")
    add("--images", default=".", help="picture folder of the .jsonl")
    add("--data-root", default="data", help="where the named data lie [ours]")
    add("--no-augmentation", action="store_true", help="pictures as in evaluation [for toy.sh]")
    add("--workers", type=at_least(0), default=4, help="loader processes [authors' code: 0]")
    add("--model", default=DEFAULT_MODEL, help="open_clip's, xvlm, or a .json [Sec. 4.1]")
    add("--pretrained", default="openai", help="open_clip tag, file, or none [Sec. 4.1]")
    add("--lock-image", action="store_true", help="train the text tower (and a timm tower's head)")
    add("--losses", choices=LOSSES, default=LOSSES[0], help="[Eq. 8, Table 4]")
    add("--kinds", nargs="+", choices=KINDS, default=FOUR, help="[Fig. 4; Sec. 4.4]")
    add("--alpha", type=at_least(0.0), default=0.2, help="weight of IMC, Eq. 8 [Sec. 4.1]")
    add("--beta", type=at_least(0.0), default=0.4, help="weight of CMR, Eq. 8 [Sec. 4.1]")
    add("--upper-bound", type=at_least(-math.inf), default=10.0, help="u of Eq. 7 [Sec. 4.4]")
    add("--threshold", type=at_least(-math.inf), help="a fixed one in place of Eq. 5-7 [Fig. 5a]")
    add("--epochs", type=at_least(1), default=5, help="[Sec. 4.1]")
    add("--batch-size", type=at_least(1), default=256, help="over all processes [Sec. 4.1]")
    add("--lr", type=at_least(0.0), default=5e-6, help="[authors' code; paper: default]")
    add("--warmup", type=at_least(0), default=50, help="steps [authors' code]")
    add("--weight-decay", type=at_least(0.0), default=0.1, help="[authors' code]")
    precision = "bf16" if torch.cuda.is_available() else "fp32"
    add("--precision", choices=("bf16", "fp32"), default=precision, help="[authors' code: fp16]")
    add("--micro-batch", type=at_least(0), default=0, help="pairs encoded at a time, 0: all")
    add("--grad-checkpointing", action="store_true", help="less memory, one more forward pass")
    add("--seed", type=int, default=42, help="[authors' code]")
    add("--out", help="run folder [runs/DATA]")
    add("--resume", action="store_true", help="go on with what --out holds, if anything")
    add("--save-every", type=at_least(1), default=1000, help="steps between states to resume")
    add("--log-every", type=at_least(1), default=10, help="steps")
    args = p.parse_args()
    if args.batch_size % world_size():
        p.error(f"--batch-size {args.batch_size} does not split over {world_size()} processes")
    args.kinds = [kind for kind in KINDS if kind in args.kinds]  # in the order of KINDS
    args.out = args.out or str(Path("runs", "+".join(Path(name).stem for name in args.data)))
    return args


def main() -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    if "WORLD_SIZE" in os.environ:  # torchrun; hours may pass while one process makes negatives
        dist.init_process_group(timeout=timedelta(days=1))
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    try:
        train(parse_args(), device)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    run(main)
