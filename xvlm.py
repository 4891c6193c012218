"""X-VLM (arXiv 2111.08276), the paper's second model, for CE-XVLM (arXiv 2306.08832, Tables 1, 2).

    torchrun --nproc_per_node 2 ce_clip.py --data coco --model xvlm --pretrained 16m_base_*.th \\
        --batch-size 64 --lr 3e-5 --warmup 3235 --weight-decay 0.01
    python eval_bench.py --ckpt checkpoint_9.pth --model xvlm    # X-VLM's own, XVLM-coco

A dual encoder: a Swin Transformer, and the first layers of a BERT. Its last layers also attend to
the picture, and a head on them says whether picture and caption match (ITM): one more loss, and in
ARO and VALSE a part of the score. N pictures or captions, P patches, W their width, L tokens, D
width of the BERT; b pairs on this process, K kinds of negative.
"""

import open_clip
import torch
import torch.nn.functional as F
from timm.models import SwinTransformer
from torch import Tensor, nn
from torchvision import transforms
from transformers import BertConfig, BertModel, BertTokenizer

from negatives import BadInput, naming

# What is not named is the default of timm's SwinTransformer and of BertConfig, bert-base-uncased.
# A .json of this form, given as --model, is another size, or has another tokenizer (hub or folder).
CONFIG = {
    "architecture": "xvlm",
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


class XVLM(nn.Module):
    """The retrieval model of a config like CONFIG; X-VLM's names, but for what `ours` changes."""

    def __init__(self, config: dict):
        super().__init__()
        self.vision_encoder = SwinTransformer(**config["swin"], num_classes=0, global_pool="")
        self.vision_encoder.image_size = config["swin"]["img_size"]
        # to transformers a decoder; its layers are not causal here, for they are given a mask
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
    def visual(self) -> nn.Module:  # open_clip's name
        return self.vision_encoder

    def image_states(self, images: Tensor) -> Tensor:
        """images (N, 3, H, W) -> (N, 1 + P, W): the mean of the patches, then the patches."""
        patches = self.vision_encoder.forward_features(images).flatten(1, 2)
        return torch.cat([patches.mean(1, keepdim=True), patches], 1)

    def text_states(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """tokens (N, L) -> the states (N, L', D) before the picture comes in, and where there are
        tokens (N, L'), bool; L' is the length of the longest caption."""
        pad = self.text_encoder.config.pad_token_id
        longest = (tokens != pad).sum(1).max()
        tokens = tokens[:, :longest].to(self.logit_scale.device, non_blocking=True)
        exists = tokens != pad
        text = self.text_encoder.embeddings(tokens)
        for layer in self.text_encoder.encoder.layer[: self.fusion_layer]:
            text = layer(text, exists[:, None, None])
        return text, exists

    def encode_image(self, images: Tensor, normalize: bool = False) -> Tensor:
        """Features (N, embed_dim) of images (N, 3, H, W), or of their image_states."""
        states = self.image_states(images) if images.ndim == 4 else images
        feature = self.vision_proj(states[:, 0])
        return F.normalize(feature, dim=-1) if normalize else feature

    def encode_text(self, tokens: Tensor, normalize: bool = False) -> Tensor:
        """Features (N, embed_dim) of captions (N, L)."""
        states, _ = self.text_states(tokens)
        feature = self.text_proj(states[:, 0])
        return F.normalize(feature, dim=-1) if normalize else feature

    def itm_logits(self, image: Tensor, text: Tensor, exists: Tensor) -> Tensor:
        """(N, 2): do not match, match; of image_states (N, 1 + P, W) and text_states."""
        for layer in self.text_encoder.encoder.layer[self.fusion_layer :]:
            text = layer(text, exists[:, None, None], image)
        with torch.autocast(text.device.type, enabled=False):  # bf16 would make ties of near ones
            return self.itm_head(text[:, 0].float())

    def match(self, images: Tensor, captions: Tensor, which: Tensor | None = None) -> Tensor:
        """The ITM logit (N,) that captions (N, L) match their pictures: the second of itm_logits,
        not a difference, as X-VLM and ARO rank by. Of images (M, 3, H, W), or image_states; `which`
        (N,) is the picture of each caption, without it they come in pairs."""
        states = self.image_states(images) if images.ndim == 4 else images
        states = states if which is None else states[which]
        return self.itm_logits(states, *self.text_states(captions))[:, 1]

    def forward(self, images: Tensor, tokens: Tensor, exists: Tensor):
        """Unit image features (b, embed_dim), unit text features (n, embed_dim), and the image-text
        matching loss (): the mean of the cross entropies of "match" for the b pairs, and of "do not
        match" for each caption with another picture and each picture with another caption.

        images  (b, 3, H, W), b > 1
        tokens  (n, L), the captions and negatives that exist
        exists  (b, 1 + K), bool: which these are, row by row; column 0 is the caption, all True
        """
        if len(images) < 2:
            raise BadInput("the matching loss of an X-VLM needs two pairs or more a process")
        states = self.image_states(images)
        text, words = self.text_states(tokens)
        image_feature = self.encode_image(states, normalize=True)
        text_feature = F.normalize(self.text_proj(text[:, 0]), dim=-1)
        caption = (exists.sum(1).cumsum(0) - exists.sum(1)).to(images.device)  # (b,) rows of tokens
        with torch.no_grad():
            sim = self.logit_scale.exp() * image_feature @ text_feature[caption].T  # (b, b)
            other_caption = caption[draw_other(sim)]
            other_image = draw_other(sim.T)
        image = torch.arange(len(images), device=images.device)
        i = torch.cat([image, other_image, image])  # (3b,) pairs, of which the first b match
        t = torch.cat([caption, caption, other_caption])
        logits = self.itm_logits(states[i], text[t], words[t])
        matches = torch.arange(len(i), device=images.device) < len(images)
        return image_feature, text_feature, F.cross_entropy(logits, matches.long())

    def set_grad_checkpointing(self) -> None:
        self.vision_encoder.set_grad_checkpointing()
        self.text_encoder.gradient_checkpointing_enable()

    def load_state_dict(self, state_dict, strict: bool = True, assign: bool = False):
        """Also takes the names of X-VLM's checkpoints: see `ours`."""
        return super().load_state_dict(ours(state_dict, self.state_dict()), strict, assign)


def draw_other(sim: Tensor) -> Tensor:
    """sim (b, b) -> (b,): for each row a column but its own, drawn by softmax plus 1e-5. X-VLM
    leaves out captions of the same picture / we, as Eq. (1): do not."""
    odds = sim.softmax(1).nan_to_num() + 1e-5
    return odds.fill_diagonal_(0).multinomial(1).squeeze(1)


# ---- Checkpoints of X-VLM: other names, more heads, other window sizes ---------------------------

# heads that fine-tuning drops, and tables that follow from the sizes
DROPPED = ("bbox_head", "text_encoder.cls", "position_ids", "relative_position_index", "attn_mask")


def ours(state: dict[str, Tensor], shapes: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of X-VLM, pre-trained (text_encoder.bert.*) or fine-tuned, in our names; one of
    ours as it is. timm downsamples at the start of the next stage, temp is 1 / e^logit_scale, and
    tables of relative positions get the sizes of `shapes`."""
    if "temp" not in state:
        return state
    found = {"logit_scale": -state["temp"].log()}
    for name, value in state.items():
        if name == "temp" or any(part in name for part in DROPPED):
            continue
        name = name.replace("text_encoder.bert.", "text_encoder.")
        if ".downsample." in name:  # vision_encoder.layers.0.downsample.norm.bias
            stage = int(name.split(".")[2])
            name = name.replace(f".layers.{stage}.", f".layers.{stage + 1}.")
        if name.endswith("relative_position_bias_table") and name in shapes:
            value = resize_table(value, len(shapes[name]))
        found[name] = value
    return found


def resize_table(table: Tensor, length: int) -> Tensor:
    """Relative position biases ((2 w - 1)^2, heads) for another window, (length, heads). As X-VLM,
    from BEiT: the old distances become 1, 1 + q, 1 + q + q^2, ... up to the new border, or q = 1.5,
    and a bicubic spline goes through the old values, not-a-knot, constant outside, as scipy's
    interp2d did (timm's resize is linear without scipy)."""
    old, new = round(len(table) ** 0.5), round(length**0.5)
    if old == new:
        return table
    low, high = 1.01, 1.5
    while high - low > 1e-6:
        q = (low + high) / 2
        too_far = sum(q**i for i in range(old // 2)) > new // 2
        low, high = (low, q) if too_far else (q, high)
    half = (q ** torch.arange(old // 2).double()).cumsum(0)
    knots = torch.cat([-half.flip(0), torch.zeros(1), half])
    at = torch.arange(-(new // 2), new // 2 + 1).double().clamp(knots[0], knots[-1])
    x = torch.cat([knots, at])[:, None]
    # a basis of the splines: powers, and a cube that begins at each knot but the outer two
    basis = torch.cat([x ** torch.arange(4), (x - knots[2:-2]).relu() ** 3], 1)
    weights = torch.linalg.solve(basis[:old], basis[old:], left=False)  # (new, old)
    resized = torch.einsum("ai,bj,ijh->abh", weights, weights, table.double().view(old, old, -1))
    return resized.flatten(0, 1).to(table.dtype)


class RandAugment(transforms.RandAugment):
    """X-VLM's RandomAugment(2, 7), of which each operation is done or left by a coin."""

    sizes = {"Identity": 0, "AutoContrast": 0, "Equalize": 0, "Brightness": 0.36, "Sharpness": 0.36}
    signed = {"ShearX": 0.21, "ShearY": 0.21, "TranslateX": 7, "TranslateY": 7, "Rotate": 21}

    def _augmentation_space(self, bins: int, _) -> dict[str, tuple[Tensor, bool]]:
        space = {}
        for name, size in (self.sizes | self.signed).items():
            space[name] = torch.full((bins,), float(size)), name in self.signed
        return space


class Tokenizer:
    """Texts -> (N, context_length) token numbers, 0 where there is none; [CLS] comes first and, as
    in X-VLM's copy of the tokenizer, no [SEP] last. X-VLM also takes out punctuation in training,
    ARO and VALSE do not / we: never. Raises BadInput."""

    def __init__(self, name: str, context_length: int):
        self.context_length = context_length
        with naming(f"the tokenizer {name!r}", "a folder with a vocab.txt, or on the hub"):
            self.bert = BertTokenizer.from_pretrained(name)
            if len(self.bert) <= len(self.bert.all_special_tokens):  # all that transformers 5 says
                raise ValueError("it has no words")

    def __call__(self, texts: list[str]) -> Tensor:
        length = self.context_length + 1
        found = self.bert(list(texts), padding="max_length", max_length=length, truncation=True)
        tokens = torch.tensor(found["input_ids"])
        return tokens.masked_fill(tokens == self.bert.sep_token_id, self.bert.pad_token_id)[:, :-1]


def build(config: dict) -> tuple:
    """(model, train_transform, eval_transform, tokenizer), with random weights. Raises BadInput."""
    with naming("the config", "one of an X-VLM, see xvlm.CONFIG"):
        model = XVLM(config)
        tokenizer = Tokenizer(config["tokenizer"], config["context_length"])
        bert = model.text_encoder.config
        if not 0 < config["fusion_layer"] < bert.num_hidden_layers:
            raise ValueError("fusion_layer must be one of the BERT's, not the first")
        if config["context_length"] > bert.max_position_embeddings:
            raise ValueError("context_length is above max_position_embeddings")
        if len(tokenizer.bert) > bert.vocab_size or tokenizer.bert.pad_token_id != 0:
            raise ValueError("the tokenizer has more words than vocab_size, or its [PAD] is not 0")
    size, mode = model.visual.image_size, transforms.InterpolationMode
    evaluate = open_clip.image_transform(size, is_train=False, resize_mode="squash")  # no crop
    crop = transforms.RandomResizedCrop(size, scale=(0.5, 1), interpolation=mode.BICUBIC)
    flip = transforms.RandomHorizontalFlip()
    augment = transforms.RandomApply([RandAugment(1, interpolation=mode.BILINEAR, fill=[128] * 3)])
    train = transforms.Compose([crop, flip, augment, augment, *evaluate.transforms[1:]])
    return model, train, evaluate, tokenizer
