"""X-VLM (arXiv 2111.08276), the paper's second model, for CE-XVLM (arXiv 2306.08832, Tables 1, 2).

    torchrun --nproc_per_node 2 ce_clip.py --data coco --model xvlm --pretrained 16m_base_*.th \\
        --batch-size 64 --lr 3e-5 --warmup 3235 --weight-decay 0.01
    python eval_bench.py --ckpt checkpoint_9.pth --model xvlm    # X-VLM's own, XVLM-coco

A Swin Transformer encodes the image, and the first layers of a BERT encode the caption. The last
layers of the BERT also attend to the image, and a head on them says whether image and caption match
(ITM). Its loss is added to Eq. (8), and its logit is a part of the score in ARO and VALSE.

Shape letters: N images or captions, P patches of width W, L tokens of width D; b pairs on this
process, K kinds of negative.
"""

import open_clip
import torch
import torch.nn.functional as F
from timm.models import SwinTransformer
from torch import Tensor, nn
from torchvision import transforms
from transformers import BertConfig, BertModel, BertTokenizer

from files import BadInput, finite, one_line_errors

# All other sizes are the defaults of timm's SwinTransformer and of BertConfig (bert-base-uncased).
# A .json file like this one, given as --model, describes a model of another size.
CONFIG = {
    "architecture": "xvlm",
    "embed_dim": 256,
    "temperature": 0.07,
    "fusion_layer": 6,  # the first layer of the BERT that attends to the image
    "context_length": 40,
    "tokenizer": "bert-base-uncased",  # a folder, or a name on the hub
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
    """The model of a config like CONFIG. `ours` renames X-VLM's weights to the names used here."""

    def __init__(self, config: dict):
        super().__init__()
        self.vision_encoder = SwinTransformer(**config["swin"], num_classes=0, global_pool="")
        self.vision_encoder.image_size = config["swin"]["img_size"]
        # In transformers only a decoder has cross attention. Our masks let each word see all words.
        bert = BertConfig(**config["bert"], is_decoder=True, add_cross_attention=True)
        self.text_encoder = BertModel(bert, add_pooling_layer=False)
        self.fusion_layer = config["fusion_layer"]
        image_width, width = self.vision_encoder.num_features, bert.hidden_size
        for layer in self.text_encoder.encoder.layer[: self.fusion_layer]:
            del layer.crossattention
        for layer in self.text_encoder.encoder.layer[self.fusion_layer :]:
            attention = layer.crossattention.self
            attention.key = nn.Linear(image_width, width)
            nn.init.normal_(attention.key.weight, std=bert.initializer_range)
            attention.value = nn.Linear(image_width, width)
            nn.init.normal_(attention.value.weight, std=bert.initializer_range)
        self.vision_proj = nn.Linear(image_width, config["embed_dim"])
        self.text_proj = nn.Linear(width, config["embed_dim"])
        self.logit_scale = nn.Parameter(-torch.tensor(config["temperature"]).log())
        self.itm_head = nn.Sequential(
            nn.Linear(width, 2 * width), nn.LayerNorm(2 * width), nn.GELU(), nn.Linear(2 * width, 2)
        )

    @property
    def visual(self) -> nn.Module:
        return self.vision_encoder  # under the name that open_clip's models give it

    def image_states(self, images: Tensor) -> Tensor:
        """images (N, 3, H, W) -> (N, 1 + P, W): the mean of the patches, then the patches."""
        patches = self.vision_encoder.forward_features(images).flatten(1, 2)
        return torch.cat([patches.mean(1, keepdim=True), patches], 1)

    def text_states(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """tokens (N, L) -> states (N, L', D) of the captions from the layers without the image, and
        (N, L'), bool: True where there is a token. L' is the length of the longest caption."""
        pad = self.text_encoder.config.pad_token_id
        longest = (tokens != pad).sum(1).max()
        tokens = tokens[:, :longest].to(self.logit_scale.device, non_blocking=True)
        is_token = tokens != pad
        text = self.text_encoder.embeddings(tokens)
        for layer in self.text_encoder.encoder.layer[: self.fusion_layer]:
            text = layer(text, is_token[:, None, None])
        return text, is_token

    def encode_image(self, images: Tensor, normalize: bool = False) -> Tensor:
        """Features (N, embed_dim) of images (N, 3, H, W), or of what image_states made of them."""
        states = self.image_states(images) if images.ndim == 4 else images
        feature = self.vision_proj(states[:, 0])
        return F.normalize(feature, dim=-1) if normalize else feature

    def encode_text(self, tokens: Tensor, normalize: bool = False) -> Tensor:
        """Features (N, embed_dim) of captions (N, L)."""
        states, _ = self.text_states(tokens)
        feature = self.text_proj(states[:, 0])
        return F.normalize(feature, dim=-1) if normalize else feature

    def itm_logits(self, image: Tensor, text: Tensor, is_token: Tensor) -> Tensor:
        """Logits (N, 2) of "no match" and "match", from image_states and the two text_states."""
        for layer in self.text_encoder.encoder.layer[self.fusion_layer :]:
            text = layer(text, is_token[:, None, None], image)
        with torch.autocast(text.device.type, enabled=False):  # in bf16 close logits become equal
            return self.itm_head(text[:, 0].float())

    def match(self, images: Tensor, captions: Tensor, which: Tensor | None = None) -> Tensor:
        """(N,): the logit of "match" for captions (N, L) and their images (M, 3, H, W), or the
        image_states of these. `which` (N,) says which image each caption has; without it caption n
        has image n. X-VLM and ARO rank by this logit too, not by its lead over the other one."""
        states = self.image_states(images) if images.ndim == 4 else images
        states = states if which is None else states[which]
        return self.itm_logits(states, *self.text_states(captions))[:, 1]

    @torch.inference_mode()
    def match_all(self, scorer, texts_of: dict) -> dict[tuple, float]:
        """{(image, text): the logit of "match"} for each image of eval_bench.py and its texts.
        The scorer then knows the features of the images, too."""
        matches = {}
        for batch, pixels in scorer.batches(list(texts_of)):
            states = self.image_states(pixels)
            features = self.encode_image(states, normalize=True)
            scorer.images.update(zip(batch, finite(features)))
            pairs = [(n, text) for n, image in enumerate(batch) for text in texts_of[image]]
            which, texts = zip(*pairs)
            logits = self.match(states, scorer.tokenizer(texts), torch.tensor(which))
            for (n, text), logit in zip(pairs, finite(logits).tolist()):
                matches[batch[n], text] = logit
        return matches

    def forward(self, images: Tensor, tokens: Tensor, exists: Tensor):
        """Unit image features (b, embed_dim), unit text features (n, embed_dim), and the image-text
        matching loss (), a mean of 3 b cross entropies. Each pair should match, each caption should
        not match another image, and each image should not match another caption: see draw_other.

        images  (b, 3, H, W), b > 1
        tokens  (n, L), the captions and negatives that exist, one pair after the other
        exists  (b, 1 + K), bool; column 0 is the caption, which always exists
        """
        if len(images) < 2:
            raise BadInput("the matching loss of X-VLM needs at least two pairs on each process")
        states = self.image_states(images)
        text, is_token = self.text_states(tokens)
        image_feature = self.encode_image(states, normalize=True)
        text_feature = F.normalize(self.text_proj(text[:, 0]), dim=-1)
        texts_of_pair = exists.sum(1)
        own_image = torch.arange(len(images), device=images.device)  # (b,) rows of images
        own_text = (texts_of_pair.cumsum(0) - texts_of_pair).to(images.device)  # and of tokens
        with torch.no_grad():
            sim = self.logit_scale.exp() * image_feature @ text_feature[own_text].T  # (b, b)
            other_text = own_text[draw_other(sim)]
            other_image = draw_other(sim.T)
        image_rows = torch.cat([own_image, other_image, own_image])  # (3 b,)
        text_rows = torch.cat([own_text, own_text, other_text])
        logits = self.itm_logits(states[image_rows], text[text_rows], is_token[text_rows])
        matches = torch.arange(len(logits), device=images.device) < len(images)  # the first b
        return image_feature, text_feature, F.cross_entropy(logits, matches.long())

    def set_grad_checkpointing(self) -> None:
        self.vision_encoder.set_grad_checkpointing()
        self.text_encoder.gradient_checkpointing_enable()

    def load_state_dict(self, state_dict, strict: bool = True, assign: bool = False):
        """Also takes the names of X-VLM's checkpoints: see `ours`."""
        return super().load_state_dict(ours(state_dict, self.state_dict()), strict, assign)


def draw_other(sim: Tensor) -> Tensor:
    """sim (b, b) -> (b,): for each row a column that is not its own, drawn with the odds softmax +
    1e-5. X-VLM leaves out other captions of the same image / we do not, as in Eq. (1)."""
    odds = sim.softmax(1).nan_to_num() + 1e-5
    return odds.fill_diagonal_(0).multinomial(1).squeeze(1)


# ---- Checkpoints of X-VLM: other names, more heads, other window sizes ---------------------------

# heads that fine-tuning drops, and tables that the model makes from its sizes
DROPPED = ("bbox_head", "text_encoder.cls", "position_ids", "relative_position_index", "attn_mask")


def ours(state: dict[str, Tensor], model_state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of X-VLM, pre-trained (text_encoder.bert.*) or fine-tuned, in our names. One in
    our names is returned as it is. X-VLM downsamples at the end of a stage, timm at the start of
    the next. X-VLM's temp is 1 / e^logit_scale. Position tables get the sizes of `model_state`."""
    if "temp" not in state:
        return state
    renamed = {"logit_scale": -state["temp"].log()}
    for name, value in state.items():
        if name == "temp" or any(part in name for part in DROPPED):
            continue
        name = name.replace("text_encoder.bert.", "text_encoder.")
        if ".downsample." in name:  # vision_encoder.layers.0.downsample.norm.bias
            stage = int(name.split(".")[2])
            name = name.replace(f".layers.{stage}.", f".layers.{stage + 1}.")
        if name.endswith("relative_position_bias_table") and name in model_state:
            value = resize_table(value, len(model_state[name]))
        renamed[name] = value
    return renamed


def resize_table(table: Tensor, length: int) -> Tensor:
    """Relative position biases ((2 w - 1)^2, heads) for another window: (length, heads). As X-VLM,
    from BEiT: the old distances 0, 1, 2, 3 ... become 0, 1, 1 + q, 1 + q + q^2 ... up to the new
    border (q is at most 1.5). A bicubic not-a-knot spline goes through the old values there. It is
    read at whole distances, and is constant outside. X-VLM called scipy's interp2d, which is gone;
    timm's resize is linear without scipy."""
    old, new = round(len(table) ** 0.5), round(length**0.5)
    if old == new:
        return table
    low, high = 1.01, 1.5
    while high - low > 1e-6:
        q = (low + high) / 2
        if sum(q**i for i in range(old // 2)) > new // 2:
            high = q
        else:
            low = q
    half = (q ** torch.arange(old // 2).double()).cumsum(0)  # 1, 1 + q, 1 + q + q^2 ...
    knots = torch.cat([-half.flip(0), torch.zeros(1), half])
    at = torch.arange(-(new // 2), new // 2 + 1).double().clamp(knots[0], knots[-1])
    x = torch.cat([knots, at])[:, None]
    # a basis of the splines: powers, and a cube from each knot on except the outer two at each end
    basis = torch.cat([x ** torch.arange(4), (x - knots[2:-2]).relu() ** 3], 1)
    weights = torch.linalg.solve(basis[:old], basis[old:], left=False)  # (new, old)
    resized = torch.einsum("ai,bj,ijh->abh", weights, weights, table.double().view(old, old, -1))
    return resized.flatten(0, 1).to(table.dtype)


class RandAugment(transforms.RandAugment):
    """An operation of X-VLM's RandomAugment(2, 7); its sign is random if it is in `signed`. `build`
    draws two operations, and applies each of them with probability 1/2."""

    sizes = {"Identity": 0, "AutoContrast": 0, "Equalize": 0, "Brightness": 0.36, "Sharpness": 0.36}
    signed = {"ShearX": 0.21, "ShearY": 0.21, "TranslateX": 7, "TranslateY": 7, "Rotate": 21}

    def _augmentation_space(self, bins: int, _) -> dict[str, tuple[Tensor, bool]]:
        space = {}
        for name, size in (self.sizes | self.signed).items():
            space[name] = (torch.full((bins,), float(size)), name in self.signed)
        return space


class Tokenizer:
    """Texts -> token numbers (N, context_length); 0 is padding. [CLS] comes first. No [SEP] comes
    last, as in X-VLM's copy of the tokenizer. X-VLM takes punctuation out in training, ARO and
    VALSE do not / we never do. Raises BadInput."""

    def __init__(self, name: str, context_length: int):
        self.context_length = context_length
        message = f"the tokenizer {name!r} is neither a folder with a vocab.txt nor on the hub"
        with one_line_errors(message):
            self.bert = BertTokenizer.from_pretrained(name)
            if len(self.bert) <= len(self.bert.all_special_tokens):  # all that transformers 5 says
                raise ValueError("it has no words")

    def __call__(self, texts: list[str]) -> Tensor:
        length = self.context_length + 1
        encoded = self.bert(list(texts), padding="max_length", max_length=length, truncation=True)
        tokens = torch.tensor(encoded["input_ids"])
        return tokens.masked_fill(tokens == self.bert.sep_token_id, self.bert.pad_token_id)[:, :-1]


def build(config: dict) -> tuple:
    """(model, train_transform, eval_transform, tokenizer), with random weights. Raises BadInput."""
    with one_line_errors("the config is not one of an X-VLM, see xvlm.CONFIG"):
        model = XVLM(config)
        tokenizer = Tokenizer(config["tokenizer"], config["context_length"])
        bert = model.text_encoder.config
        if not 0 < config["fusion_layer"] < bert.num_hidden_layers:
            raise ValueError("fusion_layer must be a layer of the BERT, and not the first (0)")
        if config["context_length"] > bert.max_position_embeddings:
            raise ValueError("context_length is above max_position_embeddings")
        if len(tokenizer.bert) > bert.vocab_size or tokenizer.bert.pad_token_id != 0:
            raise ValueError("the tokenizer has more words than vocab_size, or its [PAD] is not 0")
    size = model.visual.image_size
    evaluate = open_clip.image_transform(size, is_train=False, resize_mode="squash")  # no crop
    mode = transforms.InterpolationMode
    crop = transforms.RandomResizedCrop(size, scale=(0.5, 1), interpolation=mode.BICUBIC)
    flip = transforms.RandomHorizontalFlip()
    augment = transforms.RandomApply([RandAugment(1, interpolation=mode.BILINEAR, fill=[128] * 3)])
    train = transforms.Compose([crop, flip, augment, augment, *evaluate.transforms[1:]])
    return model, train, evaluate, tokenizer
