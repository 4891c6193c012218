"""Fine-tune CLIP on hard-negative captions with the CE-CLIP losses (arXiv 2306.08832, Eq. 1-8).

    torchrun --nproc_per_node 2 ce_clip.py --data coco             # the paper's CE-CLIP (Sec. 4.1)
    torchrun --nproc_per_node 2 ce_clip.py --data coco cc3m vg     # CE-CLIP+ (Sec. 4.1, Table 4)
    python ce_clip.py --data negatives.jsonl --images DIR          # any file of negatives.py

Shape letters: B pairs in the global batch, b of them on this process, K kinds of negative in the
order of KINDS; N texts, L tokens, D embedding width; W processes. T_jk is negative k of caption j.
S(.,.) is always a logit: exp(logit_scale) * cosine.
"""

import argparse
import itertools
import json
import math
import os
import tempfile
from collections import namedtuple
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import open_clip
import torch
import torch.distributed as dist
import torch.nn.functional as F
from open_clip_train.scheduler import cosine_lr
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from torch.utils.data import ConcatDataset, DataLoader, Dataset
from tqdm import tqdm

import files
import negatives
from files import BadInput, at_least, one_line_errors, run_main
from negatives import KINDS, PAPER_KINDS

# ---- The inputs of the losses --------------------------------------------------------------------


def similarities(image: Tensor, text: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The inputs of the losses, from unit features of the images (B, D), of each caption with its K
    negatives after it (B, 1 + K, D; 0 where one is missing), and scale () = exp(logit_scale), the
    paper's 1 / tau.

    sim       (B, B)     S(I_i, T_j), images by captions
    sim_neg   (B, B, K)  S(I_i, T_jk), images by negatives
    text_neg  (B, K)     S(T_i, T_ik), captions by their own negatives
    """
    caption, negative = text[:, 0], text[:, 1:]
    sim = scale * image @ caption.T
    sim_neg = scale * torch.einsum("id,jkd->ijk", image, negative)
    text_neg = scale * torch.einsum("id,ikd->ik", caption, negative)
    return sim, sim_neg, text_neg


def own_pairs(sim: Tensor, sim_neg: Tensor) -> tuple[Tensor, Tensor]:
    """pos (B,) = S(I_i, T_i) and neg (B, K) = S(I_i, T_ik): the diagonals of sim and sim_neg."""
    own = sim_neg.diagonal(dim1=0, dim2=1)  # (K, B): diagonal puts the axis i = j last
    return sim.diagonal(), own.T


def check(where: str, **expected: tuple[Tensor, tuple[int, ...]]) -> None:
    """Raise ValueError if an input has another shape than expected. Each keyword is the name of an
    input, with its tensor and the shape that it must have."""
    for name, (tensor, shape) in expected.items():
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{where}: {name} has shape {tuple(tensor.shape)}, expected {shape}")


# ---- Losses and threshold (Sec. 3.2): functions of tensors alone ---------------------------------
#
# Where the paper sums over the batch we take the mean over B (the authors' code does so, too). This
# scales all terms alike: alpha and beta keep their meaning, and the loss does not grow with B.
# `valid` is True where a negative exists; a missing one counts in no loss and in no threshold.


def itc_loss(sim: Tensor) -> Tensor:
    """Image-text contrast within the batch, both directions. Eq. (1), Sec. 3.2.

        L = 1/B * sum_i - log e^S(I_i,T_i) / sum_j e^S(I_i,T_j)
          + 1/B * sum_i - log e^S(I_i,T_i) / sum_j e^S(I_j,T_i)

    sim      (B, B)  S(I_i, T_j), images by captions
    returns  ()      0 for B = 1, 2 log B at chance. Raises ValueError if `sim` is not square.
    The directions are summed as printed: twice open_clip's ClipLoss, which averages them.
    """
    check("itc_loss", sim=(sim, (len(sim), len(sim))))
    target = torch.arange(len(sim), device=sim.device)
    return F.cross_entropy(sim, target) + F.cross_entropy(sim.T, target)


def itc_hn_loss(sim: Tensor, sim_neg: Tensor, valid: Tensor) -> Tensor:
    """Eq. (1) with the hard negatives as further texts of the image-to-text direction. Eq. (2).

        L = 1/B * sum_i - log e^S(I_i,T_i) / sum_j e^S(I_j,T_i)
          + 1/B * sum_i - log e^S(I_i,T_i) / ( sum_j e^S(I_i,T_j) + sum_jk e^S(I_i,T_jk) )

    sim      (B, B)     S(I_i, T_j), images by captions
    sim_neg  (B, B, K)  S(I_i, T_jk), every image against every negative of the batch
    valid    (B, K)     bool, True = negative k of caption j exists
    returns  ()         Eq. (1) when nothing is valid or K = 0. ValueError on a shape mismatch.
    T_hn in the paper: either the pair's four or all of the batch / in the authors' code: all of the
    batch, missing ones as the text "###", in a loss that is half of ours / here: all that exist.
    """
    B, K = len(sim), sim_neg.shape[-1]
    check("itc_hn_loss", sim=(sim, (B, B)), sim_neg=(sim_neg, (B, B, K)), valid=(valid, (B, K)))
    target = torch.arange(B, device=sim.device)
    # valid[j, k] speaks of text k of caption j, so it holds for every image i
    hard = sim_neg.masked_fill(~valid, -torch.inf).flatten(1)  # (B, B*K)
    image_to_text = F.cross_entropy(torch.cat([sim, hard], 1), target)
    text_to_image = F.cross_entropy(sim.T, target)
    return text_to_image + image_to_text


def imc_loss(pos: Tensor, text_neg: Tensor, valid: Tensor) -> Tensor:
    """Intra-modal contrast: push a caption away from its own negatives. Eq. (3).

        L = 1/B * sum_i - log e^S(I_i,T_i) / sum_k e^S(T_i,T_ik)

    pos       (B,)    S(I_i, T_i)
    text_neg  (B, K)  S(T_i, T_ik), captions by their own negatives
    valid     (B, K)  bool, True = exists; a caption without negatives adds 0
    returns   ()      may be below 0, because S(I,T) is not in the denominator. We expect CLIP to
                      start at about 60, with some 90 logits of a caption and its negative, and 30
                      of caption and image. Raises ValueError on a shape mismatch.
    The numerator is cross-modal: to push captions apart alone would let the text tower drift away
    from the image tower, and the paper found that unstable (Sec. 3.2).
    Differs from the authors' code, see imc_loss_released.
    """
    B, K = text_neg.shape
    check("imc_loss", pos=(pos, (B,)), valid=(valid, (B, K)))
    log_sum = text_neg.masked_fill(~valid, -torch.inf).logsumexp(1)  # (B,), -inf without negatives
    # those rows become 0; their gradient is nan in logsumexp, and masked_fill sets it to 0
    return torch.where(valid.any(1), log_sum - pos, 0).sum() / B


def cmr_loss(pos: Tensor, neg: Tensor, threshold: Tensor | float, valid: Tensor) -> Tensor:
    """Keep a pair ahead of its own hard negatives by a threshold per kind. Eq. (4) and (6).

        L = 1/B * sum_i sum_k max(0, S(I_i,T_ik) - S(I_i,T_i) + Th_k)

    pos        (B,)    S(I_i, T_i)
    neg        (B, K)  S(I_i, T_ik), images by their own negatives
    threshold  (K,)    Th_k: a constant (Eq. 4), which may also be a number, or what the previous
                       step's adaptive_threshold returned (Eq. 6); no gradient flows into it
    valid      (B, K)  bool, True = exists
    returns    ()      0 when nothing is valid. Raises ValueError on a shape mismatch.
    paper: sum over the batch / authors' code: also divides by K, and missing negatives count as 0
    in that mean / we: mean over B, sum over the kinds that exist.
    """
    B, K = neg.shape
    if not isinstance(threshold, Tensor):
        threshold = neg.new_full((K,), threshold)
    check("cmr_loss", pos=(pos, (B,)), threshold=(threshold, (K,)), valid=(valid, (B, K)))
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

    The lead of a caption over its negative is the difference of their similarities to the image.

    pos          (B,)    S(I_i, T_i)
    neg          (B, K)  S(I_i, T_ik)
    valid        (B, K)  bool, True = exists
    upper_bound  u, in logits: 10 is a cosine of 0.10 at a scale of 100 (paper Sec. 4.4)
    previous     (K,)    what a kind absent from the whole batch keeps; zeros by default
    returns      (K,)    without gradient; may be negative. Raises ValueError on a shape mismatch.
    Why it adapts: a curriculum (Sec. 3.2, 4.3). At first the lead is small, so little is asked.
    Why u: a swap of nouns is often a wrong sentence, which is known without the image. The lead of
    such captions, and with it the threshold of relation, would grow without limit.
    A threshold below 0 means that the negatives lead in the mean. Then only pairs whose caption is
    further behind than the mean add to the loss.
    paper: only an upper bound / authors' code: also clamps at 0, averages the two terms over
    different captions, restarts at 0 every epoch, and is nan for an absent kind / we: Eq. (7), and
    Eq. (5) over the captions that have the kind.
    """
    B, K = neg.shape
    previous = pos.new_zeros(K) if previous is None else previous
    check("adaptive_threshold", pos=(pos, (B,)), previous=(previous, (K,)), valid=(valid, (B, K)))
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
    threshold  (K,)       Th_k, which adaptive_threshold made in the previous step
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


def imc_loss_released(all_text_neg: Tensor, valid: Tensor) -> Tensor:
    """Not the paper's: what the authors' released get_imc_loss computes in place of Eq. (3).

        L = 1/B * sum_i - log e^S(T_i,T_n) / sum_jk e^S(T_i,T_jk)

    all_text_neg  (B, B, K)  S(T_i, T_jk), every caption against every negative of the batch
    valid         (B, K)     bool, True = exists; in the authors' code missing ones count, as "###"
    returns       ()         0 when nothing is valid. Raises ValueError on a shape mismatch.
    T_n is the first negative of the batch: every caption is pulled towards that one. The released
    code has no image-text term, which Eq. (3) has in the numerator.
    """
    B, K = valid.shape
    check("imc_loss_released", all_text_neg=(all_text_neg, (B, B, K)), valid=(valid, (B, K)))
    if not valid.any():
        return all_text_neg.sum() * 0  # 0, but with a graph, so that backward() works
    first = valid.flatten().nonzero()[0]  # (1,), the index of T_n among the B*K negatives
    texts = all_text_neg.masked_fill(~valid, -torch.inf).flatten(1)  # (B, B*K)
    return F.cross_entropy(texts, first.expand(B))


def looking_loss(image: Tensor, text: Tensor, scale: Tensor, valid: Tensor) -> Tensor:
    """Ours, not the paper's: a caption should lead its negative by more in its own image than in
    the other images of the batch.

        L = 1/B * sum_i sum_k - w_ik * log e^S(I_i,d_ik) / sum_j e^S(I_j,d_ik)
        d_ik = (T_i - T_ik) / |T_i - T_ik|
        w_ik = min(1, max(0, S(I_i,T_i) - S(I_i,T_ik))), through which no gradient flows

    image    (B, D)         unit features I_i
    text     (B, 1 + K, D)  T_i, and behind it its negatives T_ik
    scale    ()             exp(logit_scale)
    valid    (B, K)         bool, True = exists
    returns  ()             0 for B = 1, or when nothing is valid. ValueError on a shape mismatch.
    It is the text-to-image half of Eq. (1) with the direction from a negative to its caption in
    place of the caption. A lead that the text alone gives is the same in all images, and counts for
    nothing. But L also falls if the features of those texts that the text tower takes for negatives
    depend less on what the sentence says. So the loss teaches a model to look at the image only if
    the text does not tell negatives from captions (docs/evidence.md).
    A pair counts as far as its caption leads, up to one logit, because d_ik is noise where the two
    texts have almost the same features. The loss stands beside Eq. (2), which makes captions lead.
    """
    B, K = valid.shape
    D = image.shape[-1]
    check("looking_loss", image=(image, (B, D)), text=(text, (B, 1 + K, D)))
    difference = text[:, :1] - text[:, 1:]  # (B, K, D)
    lead = scale * torch.einsum("ikd,id->ik", difference, image)
    direction = F.normalize(difference, dim=2)
    logits = scale * torch.einsum("ikd,jd->ijk", direction, image)  # [caption, image, kind]
    target = torch.arange(B, device=image.device)[:, None].expand(B, K)
    loss = lead.detach().clamp(0, 1) * F.cross_entropy(logits, target, reduction="none")
    return loss.masked_fill(~valid, 0).sum() / B


# ---- A batch: from images and texts to features --------------------------------------------------


class Encoder(nn.Module):
    """What DistributedDataParallel wraps: one forward for the images and all texts that exist.

    With `micro_batch` only the activations of so many pairs are kept; the backward pass computes
    each part again (activation checkpointing). The gradient is that of the whole batch, except for
    batch norm, dropout, and the pairs that X-VLM's matching loss draws.
    """

    def __init__(self, model: nn.Module, bf16: bool = False, micro_batch: int = 0):
        super().__init__()
        self.model, self.bf16, self.micro_batch = model, bf16, micro_batch

    def forward(self, images: Tensor, tokens: Tensor, valid: Tensor) -> tuple[Tensor, ...]:
        """images   (b, 3, H, W)
        tokens   (b, 1 + K, L), and valid (b, K): on the CPU, to be indexed without a device sync
        returns  unit features of the images (b, D) and of the texts (b, 1 + K, D), 0 where a
                 negative is missing; exp(logit_scale) (); an X-VLM's image-text matching
                 loss (ITM) (1,), else 0
        """
        if self.micro_batch:
            parts = []
            n = self.micro_batch
            for part in zip(images.split(n), tokens.split(n), valid.split(n)):
                parts.append(checkpoint(self.encode, *part, use_reentrant=False))
            image, text, itm = (torch.cat(of_all_parts) for of_all_parts in zip(*parts))
        else:
            image, text, itm = self.encode(images, tokens, valid)
        return image, text, self.model.logit_scale.exp(), itm.mean(0, keepdim=True)

    def encode(self, images: Tensor, tokens: Tensor, valid: Tensor) -> tuple[Tensor, ...]:
        exists = F.pad(valid, (1, 0), value=True)  # (b, 1 + K): the caption always does
        itm = images.new_zeros(1)
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.bf16):
            if hasattr(self.model, "match"):  # an X-VLM: its forward gives the matching loss, too
                image, encoded, itm = self.model(images, tokens[exists], exists)
            else:
                image = self.model.encode_image(images, normalize=True)
                encoded = encode_text(self.model, tokens[exists])
        # text[exists] = encoded, without waiting for the device to count what exists
        text = images.new_zeros(exists.numel(), image.shape[-1])
        rows = exists.flatten().nonzero()[:, 0].to(images.device, non_blocking=True)
        text = text.index_copy(0, rows, encoded.float())
        return image.float(), text.view(*exists.shape, -1), itm.float().reshape(1)


def encode_text(model: nn.Module, tokens: Tensor) -> Tensor:
    """Unit text features (N, D) of tokens (N, L). The tokens are best on the CPU.

    They are those of model.encode_text(tokens, normalize=True), in less time. CLIP attends causally
    and pools at the end-of-text token, whose number is the highest, so what follows it changes
    nothing. Captions of similar length are encoded together and cut after the last one's end. Text
    towers of other kinds get all L tokens.
    """
    device = model.logit_scale.device
    clip = type(model) is open_clip.CLIP
    if not clip or model.attn_mask is None or model.text_pool_type != "argmax":
        return model.encode_text(tokens.to(device), normalize=True)
    length = tokens.argmax(1) + 1  # (N,)
    order = length.argsort(stable=True)
    chunks = min(4, 1 + len(tokens) // 128)  # more of them would be cut shorter, but fill no GPU
    features = []
    for rows in order.chunk(chunks):
        longest = int(length[rows[-1]])
        cut = tokens[rows, :longest].to(device, non_blocking=True)
        # CLIP's forward takes captions of its own length only, so it is lent shorter tables
        shorter = {
            "positional_embedding": model.positional_embedding[:longest],
            "attn_mask": model.attn_mask[:longest, :longest],
        }
        _, of_chunk, *_ = torch.func.functional_call(model, shorter, (None, cut))
        features.append(of_chunk)
    return torch.cat(features)[order.argsort().to(device, non_blocking=True)]  # the old order


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def gather(x: Tensor) -> Tensor:
    """The rows of x of all W processes in rank order, with gradient; x itself on one process.

    Every process computes the same loss of all rows, so it knows the true gradient of its own rows
    without communication. Passed back through its own encoder, that is its share of the gradient of
    the weights: what its rows contribute. The gradient is the sum of the W shares. But
    DistributedDataParallel takes their mean, the sum / W, so the hook multiplies by W.
    logit_scale needs no gather: each process holds its whole gradient, and the mean of W equal
    values is that value.
    """
    if world_size() == 1:
        return x
    rows = [torch.empty_like(x) for _ in range(world_size())]
    dist.all_gather(rows, x.detach().contiguous())
    if x.requires_grad:
        x.register_hook(lambda grad: grad * world_size())
    rows[rank()] = x
    return torch.cat(rows)


# ---- Training ------------------------------------------------------------------------------------


def train(args: argparse.Namespace, device: torch.device) -> None:
    losses = args.losses.split(",")  # the rows of Table 4 are settings of Eq. 8, not other code
    kinds = args.kinds if "hn" in losses else []  # without kinds K = 0, and Eq. 2 is Eq. 1
    alpha = args.alpha if "imc" in losses else 0.0
    beta = args.beta if "cmr" in losses else 0.0

    records = load_records(args, kinds)
    epoch_steps = len(records) // args.batch_size
    total = epoch_steps * args.epochs
    if total == 0:
        raise BadInput(f"{len(records)} captions do not fill one batch of {args.batch_size}")
    settings = {key: value for key, value in vars(args).items() if key not in NOT_COMPARED}
    settings["captions"] = [f"{len(part)}, sha256 {part.digest[:16]}" for part in records.datasets]
    loaded, optimizer, threshold, start = prepare_run(args, kinds, settings, device)
    model, out = loaded.model, Path(args.out)
    if start == total and rank() == 0:
        files.say(f"{out} is finished: it has made all of its {total} steps")
    encoder = Encoder(model, args.precision == "bf16", args.micro_batch)
    if world_size() > 1:
        # parameters without a gradient would stop it: those of CoCa's decoder, SigLIP's bias
        unused = type(model) is not open_clip.CLIP or model.logit_bias is not None
        encoder = DistributedDataParallel(encoder, find_unused_parameters=unused)
    # There is no loop over epochs: they are one stream, and a resumed run skips `start` batches
    keys = batch_keys(len(records), args.batch_size, args.epochs, args.seed)
    batches = DataLoader(
        Pairs(records, loaded, args.seed),
        batch_sampler=itertools.islice(keys, start, None),
        num_workers=args.workers,
        pin_memory=device.type == "cuda",
    )
    # linear warm-up, then a cosine to 0 [authors' code]
    set_lr = cosine_lr(optimizer, args.lr, args.warmup, total)
    same = 0  # negatives with their caption's tokens, since the last line of the log
    bar = tqdm(batches, str(out), total, initial=start, unit="step", disable=rank() > 0)
    for step, (images, tokens, valid) in enumerate(bar, start + 1):
        lr = set_lr(step - 1)
        torch.manual_seed(seed_of(args.seed, step, rank()))  # for dropout, and X-VLM's draws

        image, text, scale, itm = encoder(images.to(device, non_blocking=True), tokens, valid)
        image, text, valid = gather(image), gather(text), gather(valid.to(device))
        sim, sim_neg, text_neg = similarities(image, text, scale)
        loss, terms = ce_clip_loss(sim, sim_neg, text_neg, threshold, valid, alpha, beta)  # Eq. 8
        if "imc_released" in losses:  # in place of Eq. 3: "imc" is not in losses, so alpha is 0
            all_text_neg = scale * torch.einsum("id,jkd->ijk", text[:, 0], text[:, 1:])
            terms["imc"] = imc_loss_released(all_text_neg, valid)
            loss = loss + args.alpha * terms["imc"]
        if "look" in losses:
            terms["look"] = looking_loss(image, text, scale, valid)
            loss = loss + args.gamma * terms["look"]
        terms["itm"] = gather(itm).mean()  # each process has drawn its own pairs
        loss = loss + terms["itm"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model.logit_scale.data.clamp_(0, math.log(100))  # [CLIP, authors' code]
        next_threshold = threshold
        if args.threshold is None:
            pos, neg = own_pairs(sim, sim_neg)  # Eq. 5 and 7
            next_threshold = adaptive_threshold(pos, neg, valid, args.upper_bound, threshold)

        same += same_tokens(tokens).sum().item()
        epoch_ends = step % epoch_steps == 0
        save = epoch_ends or step % args.save_every == 0
        if save or step % args.log_every == 0:  # to print a value, one must wait for the device
            line = {"step": step, "epoch": math.ceil(step / epoch_steps), "lr": lr}
            for name, value in {"loss": loss, "logit_scale": scale, **terms}.items():
                line[name] = value.item()
            for kind, value in zip(kinds, threshold):  # the thresholds that this step has used
                line[f"threshold_{kind}"] = value.item()
            line["same_tokens"] = gather(torch.tensor([same], device=device)).sum().item()
            write_log(out / "log.jsonl", line)
            same = 0
            bar.set_postfix_str(f"loss {line['loss']:.3f}", refresh=False)
        threshold = next_threshold
        if save and rank() == 0:
            name = f"epoch_{step // epoch_steps}.pt" if epoch_ends else "last.pt"
            state = {"step": step, "threshold": threshold, "optimizer": optimizer.state_dict()}
            state.update(settings=settings, log=(out / "log.jsonl").stat().st_size)
            files.save_checkpoint(out / name, loaded, **state)


def write_log(path: Path, line: dict) -> None:
    """The first process appends a line to log.jsonl. Raises BadInput if the loss is not finite."""
    if not math.isfinite(line["loss"]):
        raise BadInput(f"the loss is not finite: {json.dumps(line)}")
    if line["same_tokens"]:
        files.say_once("warning: negatives with the same tokens as their captions count as missing")
    if rank() == 0:
        with path.open("a") as log:
            log.write(json.dumps(line) + "\n")


# Not compared on resuming: what hardly changes a result, and paths of data and runs. (The captions
# are compared, by digests of their files.)
NOT_COMPARED = ["data", "data_root", "images", "out", "workers", "micro_batch"]
NOT_COMPARED += ["grad_checkpointing", "resume", "save_every", "log_every"]


def prepare_run(args: argparse.Namespace, kinds: list[str], settings: dict, device: torch.device):
    """(Loaded, optimizer, threshold, steps done) of a new run, or with --resume of its newest saved
    state. The first process also makes the run's folder, or cuts its log to that state."""
    state = files.newest_state(Path(args.out), settings, args.resume)
    torch.manual_seed(args.seed)
    if args.pretrained == "none":
        loaded = build_model(args.model)
    else:
        loaded = load_model(args.pretrained, args.model)
    if args.no_augmentation:
        loaded = loaded._replace(train_transform=loaded.eval_transform)
    # channels_last makes the convolutions of ResNets faster
    model = loaded.model.to(device, memory_format=torch.channels_last).train()
    if args.lock_image:  # a timm tower keeps its head trainable, as in open_clip
        getattr(model.visual, "trunk", model.visual).requires_grad_(False).eval()
    if args.grad_checkpointing:
        model.set_grad_checkpointing()
    # No decay of what has one axis or none: biases, gains of norms, logit_scale ... [open_clip,
    # authors' code]. "*bias*" is for X-VLM's tables of position biases, which have two axes.
    groups = param_groups_weight_decay(model, args.weight_decay, no_weight_decay_list=["*bias*"])
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.98), eps=1e-6, fused=True)
    # Th^t is made from step t - 1 (Eq. 5), and the first step has none: Th^1 = 0 [authors' code]
    threshold = torch.full((len(kinds),), args.threshold or 0.0)  # a fixed one, or 0
    steps_done, log_size = 0, 0
    if state:
        model.load_state_dict(state["state_dict"])
        optimizer.load_state_dict(state["optimizer"])
        threshold, steps_done, log_size = state["threshold"], state["step"], state["log"]
    if rank() == 0:
        files.begin_run(Path(args.out), settings, log_size)
    return loaded, optimizer, threshold.to(device), steps_done


def seed_of(*numbers: int) -> int:
    """A seed for torch. Python's hash of integers is the same in every process, that of texts is
    not."""
    return hash(numbers) % 2**63


# ---- Data: images with a caption and its negatives -----------------------------------------------

# Below --data-root/NAME: captions, images, and negatives, which are made if they are not there.
DATA = {
    "coco": ("annotations/captions_train2014.json", "train2014", "negatives_train2014.jsonl"),
    "cc3m": ("images", "images", "negatives.jsonl"),  # as img2dataset --output_format files does
    "vg": ("region_descriptions.json", "images", "negatives.jsonl"),
}


def load_records(args: argparse.Namespace, kinds: list[str]) -> ConcatDataset:
    """The records of all --data: of names in DATA, and of files of negatives.py, whose images lie
    in --images."""
    parts = []
    for name in args.data:
        file, images = Path(name), Path(args.images)
        if name in DATA:
            captions, images, file = (Path(args.data_root, name, path) for path in DATA[name])
            if not images.exists():
                raise BadInput(f"--data {name} needs {images}: docs/data.md says where to get it")
            if not file.exists() and rank() == 0:
                negatives.generate(captions, file)
            if world_size() > 1:
                dist.barrier()  # the other processes wait for the first one's negatives
        parts.append(files.Records(file, images, kinds, look_for_images=rank() == 0))
    return ConcatDataset(parts)


class Pairs(Dataset):
    """Item (epoch, i) -> image (3, H, W), tokens (1 + K, L), valid (K,): a negative exists, and the
    model can tell it from the caption. An image's augmentation depends on (seed, epoch, i) alone,
    not on workers or processes."""

    def __init__(self, records: Dataset, loaded: "Loaded", seed: int):
        self.records, self.seed = records, seed
        self.transform, self.tokenizer = loaded.train_transform, loaded.tokenizer
        self.size = torch.tensor(loaded.model.visual.image_size).max().item()

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
        epoch, i = key
        path, box, texts = self.records[i]
        # torch.manual_seed would also seed CUDA, which takes 0.2 ms an item
        torch.default_generator.manual_seed(seed_of(self.seed, epoch, i))
        image = self.transform(files.open_image(path, box, draft=self.size))
        tokens = self.tokenizer(texts)
        exists = torch.tensor([text != "" for text in texts[1:]], dtype=torch.bool)
        return image, tokens, exists & ~same_tokens(tokens)


def same_tokens(tokens: Tensor) -> Tensor:
    """Whether a negative has the same tokens as its caption. It has if the two differ only behind
    the last token that the model reads, or only in words that its tokenizer does not know.
    tokens (..., 1 + K, L) -> (..., K)."""
    return (tokens[..., 1:, :] == tokens[..., :1, :]).all(-1)


def batch_keys(n: int, batch_size: int, epochs: int, seed: int) -> Iterator[list[tuple[int, int]]]:
    """This process's part of every global batch, as (epoch, i) keys for Pairs. The global batches
    do not depend on the number of processes. An epoch's last, incomplete one is left out."""
    per_process = batch_size // world_size()
    for epoch in range(epochs):
        generator = torch.Generator().manual_seed(seed_of(seed, epoch))
        order = torch.randperm(n, generator=generator).tolist()
        for batch in range(n // batch_size):
            start = batch * batch_size + rank() * per_process
            yield [(epoch, i) for i in order[start : start + per_process]]


# ---- Models: by name, tag or file ----------------------------------------------------------------

DEFAULT_MODEL = "ViT-B-32-quickgelu"  # [Sec. 4.1]

# A model with its name, its config (which knows its activation, QuickGELU or GELU), the transforms
# of its images in training and in evaluation, and its tokenizer.
Loaded = namedtuple("Loaded", "model name config train_transform eval_transform tokenizer")


def load_model(source: str, name: str = DEFAULT_MODEL) -> Loaded:
    """A model with its weights. `source` is a tag of open_clip's weights for the model `name`, or
    MODEL/TAG, hf-hub:ORG/REPO, a file or a folder: see "Which checkpoints" in docs/benchmarks.md. A
    file of ours knows its model, and then `name` is not looked at."""
    path = Path(source)
    if model_and_tag := find_tag(source, name):
        return build_model(*model_and_tag)
    if (path / "open_clip_config.json").exists():
        source = f"local-dir:{path}"
    if source.startswith(("hf-hub:", "local-dir:")):
        return build_model(source)
    with one_line_errors(f"{path} is not a checkpoint of {name}"):
        content = files.read_weights(path)
        if "config" in content and isinstance(content.get("model"), str):
            loaded = build_model(content["model"], None, content["config"], content["preprocess"])
        elif (path / "config.json").exists():
            config, preprocess = files.read_transformers_config(path)
            loaded = build_model(path.resolve().name, None, config, preprocess)
        else:
            loaded = build_model(name)
            files.say(
                f"warning: {path} is read as a {name}: its activation, image mean and image "
                "standard deviation are assumed"
            )
        files.load_weights(loaded.model, content)
    return loaded


def find_tag(source: str, name: str) -> tuple[str, str] | None:
    """(model, tag) if `source` is a tag of open_clip's weights for `name`, or MODEL/TAG. Raises
    BadInput if it is nothing that load_model knows; nothing is read for that."""
    model_name, _, tag = source.rpartition("/")
    model_name = model_name or name
    if not Path(source).is_file() and tag in open_clip.list_pretrained_tags_by_model(model_name):
        return model_name, tag
    if not source.startswith(("hf-hub:", "local-dir:")) and not Path(source).exists():
        raise BadInput(f"{source} is not a file, and not a TAG or MODEL/TAG of open_clip's weights")
    return None


def build_model(name: str, tag=None, config=None, preprocess=None) -> Loaded:
    """A model with random weights, or with those of a tag.

    name        of a model of open_clip, "xvlm", or the path of a model config (.json); a name that
                begins with hf-hub: or local-dir: brings open_clip's weights along
    tag         of open_clip's weights. Those of OpenAI and some others need QuickGELU, about which
                open_clip 3 only warns: they get the model whose name ends in -quickgelu
    config      the model config of that name, if a checkpoint has brought it
    preprocess  open_clip's image_mean, image_std ..., if a checkpoint has brought them
    """
    if name.endswith(".json"):
        with one_line_errors(f"{name} is not a model config"):
            config = dict(json.loads(Path(name).read_text(encoding="utf-8")))
        name = Path(name).stem
    if name == "xvlm" or (config and config.get("architecture") == "xvlm"):
        import xvlm  # here, because it needs more of transformers than CLIP does

        model, *transforms_and_tokenizer = xvlm.build(config or xvlm.CONFIG)
        return Loaded(model, name, config or xvlm.CONFIG, *transforms_and_tokenizer)
    if tag and open_clip.get_pretrained_cfg(name, tag).get("quick_gelu"):
        name = name.removesuffix("-quickgelu") + "-quickgelu"
    what = f"{name} {tag}" if tag else name
    has_weights = name.startswith(("hf-hub:", "local-dir:"))
    known_as = name  # what open_clip calls it
    with one_line_errors(f"{what} cannot be had from open_clip (offline: name a file)"):
        if config:  # open_clip learns it from a file; the digest tells it from others of this name
            known_as = f"{name}-{files.sha256(json.dumps(config))[:8]}"
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder, f"{known_as}.json")
                path.write_text(json.dumps(config))
                open_clip.add_model_config(path)
        options = {"pretrained": tag, "require_pretrained": has_weights, **(preprocess or {})}
        model, *transforms = open_clip.create_model_and_transforms(known_as, **options)
        tokenizer = open_clip.get_tokenizer(known_as)
        config = open_clip.get_model_config(known_as)
    if has_weights:  # from now on the model is called like its folder or repository
        name = Path(name.partition(":")[2]).resolve().name
    return Loaded(model, name, config, *transforms, tokenizer)


# ---- Command line --------------------------------------------------------------------------------

LOSSES = ["itc,hn,imc,cmr", "itc", "itc,hn", "itc,hn,imc", "itc,hn,cmr", "itc,hn,imc_released,cmr"]
LOSSES += [f"{losses},look" for losses in LOSSES if "hn" in losses]


def parse_args() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = p.add_argument
    add("--data", nargs="+", default=["coco"], help=f"{', '.join(DATA)}, or .jsonl of negatives.py")
    add("--images", default=".", help="image folder of the .jsonl")
    add("--data-root", default="data", help="where the named data lie [ours]")
    add("--no-augmentation", action="store_true", help="images as in evaluation [for toy.sh]")
    add("--workers", type=at_least(0), default=4, help="loader processes [authors' code: 0]")
    add("--model", default=DEFAULT_MODEL, help="open_clip's name, xvlm, or a .json [Sec. 4.1]")
    add("--pretrained", default="openai", help="tag, file, folder, hf-hub:..., or none [Sec. 4.1]")
    add("--lock-image", action="store_true", help="train the text tower (and a timm tower's head)")
    add("--losses", choices=LOSSES, default=LOSSES[0], help="hn: Eq. 2, not Eq. 1 [Eq. 8, Table 4]")
    add("--kinds", nargs="+", choices=KINDS, default=PAPER_KINDS, help="[Fig. 4; Sec. 4.4]")
    add("--alpha", type=at_least(0.0), default=0.2, help="weight of IMC, Eq. 8 [Sec. 4.1]")
    add("--beta", type=at_least(0.0), default=0.4, help="weight of CMR, Eq. 8 [Sec. 4.1]")
    add("--gamma", type=at_least(0.0), default=0.2, help="weight of looking_loss [ours]")
    add("--upper-bound", type=at_least(-math.inf), default=10.0, help="u of Eq. 7 [Sec. 4.4]")
    add("--threshold", type=at_least(-math.inf), help="a fixed one in place of Eq. 5-7 [Fig. 5a]")
    add("--epochs", type=at_least(1), default=5, help="[Sec. 4.1]")
    add("--batch-size", type=at_least(1), default=256, help="over all processes [Sec. 4.1]")
    add("--lr", type=at_least(0.0), default=5e-6, help="[authors' code; the paper: its default]")
    add("--warmup", type=at_least(0), default=50, help="steps [authors' code]")
    add("--weight-decay", type=at_least(0.0), default=0.1, help="[authors' code]")
    precision = "bf16" if torch.cuda.is_available() else "fp32"
    add("--precision", choices=["bf16", "fp32"], default=precision, help="[authors' code: fp16]")
    add("--micro-batch", type=at_least(0), default=0, help="pairs encoded at a time; 0: all")
    add("--grad-checkpointing", action="store_true", help="less memory, one more forward pass")
    add("--seed", type=int, default=42, help="[authors' code]")
    add("--out", help="run folder [runs/DATA]")
    add("--resume", action="store_true", help="go on with what --out holds, if anything")
    add("--save-every", type=at_least(1), default=1000, help="steps between states to resume")
    add("--log-every", type=at_least(1), default=10, help="steps between lines of log.jsonl")
    args = p.parse_args()
    processes = int(os.environ.get("WORLD_SIZE") or 1)  # torchrun says it
    if args.batch_size % processes:
        p.error(f"--batch-size {args.batch_size} does not split over WORLD_SIZE = {processes}")
    args.kinds = [kind for kind in KINDS if kind in args.kinds]  # in the order of KINDS
    args.out = args.out or str(Path("runs", "+".join(Path(name).stem for name in args.data)))
    return args


def main() -> None:
    args = parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    if os.environ.get("WORLD_SIZE"):  # hours may pass while one process makes negatives
        with one_line_errors("no other processes found (start with torchrun, or unset WORLD_SIZE)"):
            dist.init_process_group(timeout=timedelta(days=1))
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    if device.type == "cpu":  # the backward pass of flash attention is slow there
        torch.backends.cuda.enable_flash_sdp(False)
    train(args, device)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    run_main(main)
