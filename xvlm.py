"""X-VLM (arXiv 2111.08276), the paper's second model, for CE-XVLM (arXiv 2306.08832, Tables 1, 2).

    torchrun --nproc_per_node 2 ce_clip.py --data coco --model xvlm --pretrained 16m_base_*.th
    python eval_bench.py --ckpt runs/coco/epoch_5.pt --data-root data
    python eval_bench.py --ckpt checkpoint_9.pth --model xvlm --data-root data    # XVLM-coco

To losses, trainer and evaluator it is a dual encoder like any other: a Swin Transformer, and the
first layers of a BERT. The last layers of the BERT also attend to the picture, and a head on them
says whether picture and caption match (ITM): in training a further loss, in ARO and VALSE a part of
the score. N pictures or captions, P patches, W their width, L tokens, D width of the BERT.
"""

import argparse
import re
from pathlib import Path

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from timm.models import SwinTransformer
from torch import Tensor, nn
from torchvision import transforms
from transformers import BertConfig, BertModel, BertTokenizer

from negatives import BadInput, reading

# What is not named is the default of timm's SwinTransformer and of BertConfig, bert-base-uncased.
# A .json of this form, given as --model, is another size, or has another tokenizer (hub or folder).
CONFIG = {
    "embed_dim": 256,
    "temperature": 0.07,
    "fusion_layer": 6,  # the first layer of the BERT that attends to the picture
    "context_length": 40,
    "tokenizer": "bert-base-uncased",
    "swin": {
        "img_size": 384,
        "window_size": 12,
        "embed_dim": 128,
        "depths": [2, 2, 18, 2],
        "num_heads": [4, 8, 16, 32],
    },
    "bert": {"num_hidden_layers": 12},
}
# Sec. 4.1: batch 64, 5 epochs, the rest "default": X-VLM's configs/Retrieval_coco.yaml and optim.py
RECIPE = {"pretrained": "16m_base_model_state_step_199999.th", "batch_size": 64, "itm": True}
RECIPE |= {"lr": 3e-5, "lr_mult": 2.0, "schedule": "linear", "warmup": 0.1}
RECIPE |= {"weight_decay": 0.01, "adam_eps": 1e-8}


def add_arguments(p: argparse.ArgumentParser) -> None:
    add = p.add_argument_group("X-VLM: with --model xvlm its recipe is the default").add_argument
    add("--itm", action=argparse.BooleanOptionalAction, help="add its matching loss")
    add("--itm-negatives", action="store_true", help="the generated negatives do not match either")
    add("--lr-mult", type=float, help="rate of projections and heads, times --lr")


def check(args: argparse.Namespace, of_xvlm: bool, processes: int) -> None:
    """Refuse a user's mistakes before hours of work. Raises BadInput."""
    if not of_xvlm:
        if args.itm or args.itm_negatives or args.lr_mult != 1:
            raise BadInput("--itm, --itm-negatives and --lr-mult are X-VLM's: --model xvlm")
        return
    if args.micro_batch:
        raise BadInput("--micro-batch needs two equal passes, which dropout forbids an X-VLM")
    if args.itm and args.batch_size < 2 * processes:
        raise BadInput("--itm needs two pairs or more a process")
    if args.itm_negatives and not args.itm:
        raise BadInput("--itm-negatives needs --itm")
    if args.pretrained:
        existing(args.pretrained)


def existing(weights: str) -> str:
    if not Path(weights).is_file():
        home = "https://github.com/zengyan-97/X-VLM#checkpoints"
        raise BadInput(f"{weights} is no file: X-VLM's weights are at {home}")
    return weights


class XVLM(nn.Module):
    """X-VLM's retrieval model, of a config like CONFIG. Its parameters have the names of X-VLM's
    checkpoints, but for what `ours` changes."""

    heads = "vision_proj", "text_proj", "itm_head", "logit_scale"  # what --lr-mult is about

    def __init__(self, config: dict):
        super().__init__()
        self.vision_encoder = SwinTransformer(**config["swin"], num_classes=0, global_pool="")
        self.vision_encoder.image_size = config["swin"]["img_size"]
        # a decoder to transformers, but not a causal one: see _layers
        bert = BertConfig(**config["bert"], is_decoder=True, add_cross_attention=True)
        self.text_encoder = BertModel(bert, add_pooling_layer=False)
        self.fusion_layer = config["fusion_layer"]
        image_width, width = self.vision_encoder.num_features, bert.hidden_size
        for layer in self.text_encoder.encoder.layer[: self.fusion_layer]:
            del layer.crossattention
        for layer in self.text_encoder.encoder.layer[self.fusion_layer :]:
            for name in ("key", "value"):
                linear = nn.Linear(image_width, width)
                nn.init.normal_(linear.weight, std=bert.initializer_range)
                setattr(layer.crossattention.self, name, linear)
        self.vision_proj = nn.Linear(image_width, config["embed_dim"])
        self.text_proj = nn.Linear(width, config["embed_dim"])
        self.logit_scale = nn.Parameter(-torch.tensor(config["temperature"]).log())
        self.itm_head = nn.Sequential(
            nn.Linear(width, 2 * width), nn.LayerNorm(2 * width), nn.GELU(), nn.Linear(2 * width, 2)
        )

    @property
    def visual(self) -> nn.Module:
        """The image tower, as open_clip calls it."""
        return self.vision_encoder

    def image_states(self, images: Tensor) -> Tensor:
        """images (N, 3, H, W) -> (N, 1 + P, W): the mean of the patches, then the patches."""
        patches = self.vision_encoder.forward_features(images).flatten(1, 2)
        return torch.cat([patches.mean(1, keepdim=True), patches], 1)

    def text_states(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """tokens (N, L) -> the states (N, L', D) before the picture comes in, and where there are
        tokens (N, L'), bool; L' is the length of the longest caption."""
        exists = tokens != self.text_encoder.config.pad_token_id
        longest = exists.sum(1).max()
        device = self.logit_scale.device
        tokens, exists = (x[:, :longest].to(device, non_blocking=True) for x in (tokens, exists))
        embedded = self.text_encoder.embeddings(tokens)
        return self._layers(slice(self.fusion_layer), embedded, exists), exists

    def _layers(self, which: slice, text: Tensor, exists: Tensor, image: Tensor | None = None):
        for layer in self.text_encoder.encoder.layer[which]:  # a mask that is given is not causal
            text = layer(text, exists[:, None, None], image)
        return text

    def encode_image(self, images: Tensor, normalize: bool = False) -> Tensor:
        """Features (N, embed_dim) of images (N, 3, H, W), or of their image_states."""
        states = self.image_states(images) if images.ndim == 4 else images
        return _feature(self.vision_proj, states, normalize)

    def encode_text(self, tokens: Tensor, normalize: bool = False) -> Tensor:
        """Features (N, embed_dim) of captions (N, L)."""
        return _feature(self.text_proj, self.text_states(tokens)[0], normalize)

    def itm_logits(self, image: Tensor, text: Tensor, exists: Tensor) -> Tensor:
        """(N, 2): do not match, match; of image_states (N, 1 + P, W) and text_states."""
        text = self._layers(slice(self.fusion_layer, None), text, exists, image)
        with torch.autocast(text.device.type, enabled=False):  # bf16 would make ties of near ones
            return self.itm_head(text[:, 0].float())

    def match(self, images: Tensor, captions: Tensor, which: Tensor | None = None) -> Tensor:
        """The ITM logit (N,) that captions (N, L) match their pictures: the second of itm_logits,
        not a difference, as X-VLM and ARO rank by.

        images  (M, 3, H, W), or their image_states
        which   (N,) the picture of each caption; without it they come in pairs
        """
        states = self.image_states(images) if images.ndim == 4 else images
        which = torch.arange(len(captions)) if which is None else which
        found = [
            self.itm_logits(states[of_these], *self.text_states(these))[:, 1]
            for of_these, these in zip(which.split(256), captions.split(256))
        ]
        return torch.cat(found)

    def forward(self, images: Tensor, tokens: Tensor, exists: Tensor, generated: bool = False):
        """What a training step needs from one pass: image features (b, embed_dim), text features
        (n, embed_dim), both of length 1, and X-VLM's image-text matching loss.

            L = mean of the cross entropies of "match" for the b pairs, and of "do not match" for
                each caption with another picture and each picture with another caption of the b

        images     (b, 3, H, W), b > 1
        tokens     (n, L), the captions and negatives that exist
        exists     (b, 1 + K), bool: which these are, row by row; column 0 is the caption, all True
        generated  the negatives too are pairs that do not match, each with its own picture
        The other is drawn with a probability that grows with the similarity, its softmax plus 1e-5,
        within this process. X-VLM leaves out captions of the same picture / we, as Eq. (1): do not.
        """
        states, (text, words) = self.image_states(images), self.text_states(tokens)
        image = _feature(self.vision_proj, states, normalize=True)
        feature = _feature(self.text_proj, text, normalize=True)
        pair, column = exists.nonzero().to(image.device).T
        caption = (column == 0).nonzero().squeeze(1)  # (b,) rows of tokens
        with torch.no_grad():
            sim = self.logit_scale.exp() * image @ feature[caption].T  # (b, b)
            other_text, other_image = (
                (s.softmax(1).nan_to_num() + 1e-5).fill_diagonal_(0).multinomial(1).squeeze(1)
                for s in (sim, sim.T)
            )
        every = torch.arange(len(images), device=image.device)
        pictures = [every, other_image, every]
        captions = [caption, caption, caption[other_text]]
        if generated:
            pictures.append(pair[column > 0])
            captions.append((column > 0).nonzero().squeeze(1))
        pictures, captions = torch.cat(pictures), torch.cat(captions)
        logits = self.itm_logits(states[pictures], text[captions], words[captions])
        matches = torch.arange(len(pictures), device=image.device) < len(images)
        return image, feature, F.cross_entropy(logits, matches.long())

    def lock_image_tower(self, **_) -> None:
        self.vision_encoder.requires_grad_(False).eval()  # no stochastic depth
        self.vision_proj.requires_grad_(False)

    def set_grad_checkpointing(self) -> None:
        self.vision_encoder.set_grad_checkpointing()
        self.text_encoder.gradient_checkpointing_enable()

    def load_state_dict(self, state_dict, strict: bool = True, assign: bool = False):
        """Also takes the names of X-VLM's checkpoints: see `ours`."""
        return super().load_state_dict(ours(state_dict, self.state_dict()), strict, assign)


def _feature(projection: nn.Linear, states: Tensor, normalize: bool) -> Tensor:
    feature = projection(states[:, 0])
    return F.normalize(feature, dim=-1) if normalize else feature


# ---- Checkpoints of X-VLM: other names, more heads, other window sizes ---------------------------

# heads that fine-tuning drops, and tables that follow from the sizes
_DROPPED = r"bbox_head|text_encoder\.cls|.*(position_ids|relative_position_index|attn_mask)$"
_DOWNSAMPLE = r"(?<=vision_encoder\.layers\.)\d+(?=\.downsample)"  # X-VLM: at the end of a stage


def ours(state: dict[str, Tensor], shapes: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of X-VLM, pre-trained or fine-tuned, in our names; one of ours as it is.

    text_encoder.bert.* of the pre-training loses its prefix; timm downsamples at the start of the
    next stage; temp is 1 / e^logit_scale; tables of relative positions get the sizes of `shapes`.
    """
    found = {}
    state = {name.removeprefix("module."): value for name, value in state.items()}
    of_xvlm = "temp" in state
    for name, value in state.items():
        if of_xvlm:
            if re.match(_DROPPED, name):
                continue
            name = name.replace("text_encoder.bert.", "text_encoder.")
            name = re.sub(_DOWNSAMPLE, lambda stage: str(int(stage[0]) + 1), name)
            name, value = ("logit_scale", -value.log()) if name == "temp" else (name, value)
        if name.endswith("relative_position_bias_table") and name in shapes:
            value = resize_table(value, len(shapes[name]))
        found[name] = value
    return found


def published(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our state dict with the names of X-VLM's fine-tuned checkpoints, the inverse of `ours`: saved
    as {"model": published(state)} it is a checkpoint for X-VLM's code."""
    found = {
        re.sub(_DOWNSAMPLE, lambda stage: str(int(stage[0]) - 1), k): v for k, v in state.items()
    }
    return found | {"temp": (-found.pop("logit_scale")).exp()}


def resize_table(table: Tensor, length: int) -> Tensor:
    """Relative position biases ((2 w - 1)^2, heads) for another window, (length, heads).

    As X-VLM, which has it from BEiT: the distances of the old window are taken to be a geometric
    progression that just reaches the new one's border, and a bicubic spline goes through the old
    values (scipy's interp2d: not-a-knot ends, held constant outside).
    """
    old, new = round(len(table) ** 0.5), round(length**0.5)
    if old == new:
        return table
    low, high = 1.01, 1.5
    while high - low > 1e-6:
        ratio = (low + high) / 2
        if (1 - ratio ** (old // 2)) / (1 - ratio) > new // 2:
            high = ratio
        else:
            low = ratio
    distances = np.cumsum(ratio ** np.arange(old // 2))
    knots = np.concatenate([-distances[::-1], [0], distances])
    at = np.arange(-(new // 2), new // 2 + 1).clip(knots[0], knots[-1])

    def basis(x):  # of the cubic splines: powers, and a cube that begins at each knot but two
        return np.hstack([x[:, None] ** np.arange(4), (x[:, None] - knots[2:-2]).clip(0) ** 3])

    weights = torch.from_numpy(np.linalg.solve(basis(knots).T, basis(at).T).T)  # (new, old)
    square = table.double().view(old, old, -1)
    resized = torch.einsum("ai,bj,ijh->abh", weights, weights, square)
    return resized.flatten(0, 1).to(table.dtype)


# ---- What else makes a model: pictures, captions, weights ----------------------------------------


class RandAugment(transforms.RandAugment):
    """X-VLM's RandomAugment(2, 7), of which each operation is done or left by a coin."""

    sizes = {"Identity": 0, "AutoContrast": 0, "Equalize": 0, "Brightness": 0.36, "Sharpness": 0.36}
    sizes |= {"ShearX": 0.21, "ShearY": 0.21, "TranslateX": 7, "TranslateY": 7, "Rotate": 21}

    def _augmentation_space(self, bins: int, _) -> dict[str, tuple[Tensor, bool]]:
        signed = ("ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate")
        return {op: (torch.full((bins,), float(s)), op in signed) for op, s in self.sizes.items()}


class Tokenizer:
    """Texts -> (N, context_length) token numbers, 0 where there is none.

    [CLS] comes first and, as in X-VLM's copy of the tokenizer, no [SEP] last. X-VLM also takes out
    punctuation in training, ARO and VALSE do not / we: never. Raises BadInput.
    """

    def __init__(self, name: str, context_length: int):
        self.context_length = context_length
        try:
            self.bert = BertTokenizer.from_pretrained(name)
            if len(self.bert) <= len(self.bert.all_special_tokens):  # all that transformers 5 says
                raise ValueError("it has no words")
        except Exception as e:  # of the hub
            reason = str(e).splitlines()[0]
            raise BadInput(
                f"no tokenizer {name!r}, neither a folder nor on the hub: {reason}"
            ) from e

    def __call__(self, texts: list[str]) -> Tensor:
        options = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
        length = self.context_length + 1
        tokens = self.bert(list(texts), max_length=length, **options)["input_ids"]
        return tokens.masked_fill(tokens == self.bert.sep_token_id, self.bert.pad_token_id)[:, :-1]


def build(config: dict, weights: str | None = None) -> tuple:
    """(model, train_transform, eval_transform, tokenizer) of a config, with random weights or those
    of a file: X-VLM's, or ce_clip.py's. Raises BadInput."""
    with reading("the config", "one of an X-VLM, see xvlm.CONFIG"):
        model = XVLM(config)
        tokenizer = Tokenizer(config["tokenizer"], config["context_length"])
        bert = model.text_encoder.config
        if not 0 < config["fusion_layer"] < bert.num_hidden_layers:
            raise ValueError("fusion_layer must be one of the BERT's, not the first")
        if config["context_length"] > bert.max_position_embeddings:
            raise ValueError("context_length is above max_position_embeddings")
        if len(tokenizer.bert) > bert.vocab_size or tokenizer.bert.pad_token_id != 0:
            raise ValueError("the tokenizer has more words than vocab_size, or its [PAD] is not 0")
    size = model.visual.image_size
    evaluate = open_clip.image_transform(size, is_train=False, resize_mode="squash")  # no crop
    mode = transforms.InterpolationMode
    augment = transforms.RandomApply([RandAugment(1, interpolation=mode.BILINEAR, fill=[128] * 3)])
    crop = transforms.RandomResizedCrop(size, scale=(0.5, 1), interpolation=mode.BICUBIC)
    flip = transforms.RandomHorizontalFlip()
    train = transforms.Compose([crop, flip, augment, augment, *evaluate.transforms[1:]])
    if weights:
        with reading(weights, "a checkpoint of this X-VLM"):
            saved = torch.load(existing(weights), map_location="cpu", weights_only=True, mmap=True)
            model.load_state_dict(saved.get("state_dict", saved))
    return model, train, evaluate, tokenizer
