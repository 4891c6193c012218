"""Eq. (1)-(8) against arithmetic done by hand. Inputs are asymmetric and mostly binary-exact, so
that a transposed matrix, a leaking negative or a wrong mean changes the answer."""

import math
import re

import open_clip
import pytest
import torch
from torch import tensor

from ce_clip import (
    adaptive_threshold,
    ce_clip_loss,
    cmr_loss,
    imc_loss,
    imc_loss_released,
    itc_hn_loss,
    itc_loss,
    looking_loss,
    own_pairs,
    similarities,
)


def close(value):
    return pytest.approx(value, rel=1e-6)


SIM = tensor([[2.0, 0.5], [1.0, 3.0]])  # image by text; the true pairs lie on the diagonal
SIM_NEG = tensor([[[1.0, 99.0], [0.0, -1.0]], [[2.0, 99.0], [2.5, 0.25]]])  # [image, caption, kind]
VALID = tensor(
    [[True, False], [True, True]]
)  # caption 0 has no negative of kind 1: its 99s must not count
# the images against their own negatives: SIM_NEG[0, 0] = (1, -), SIM_NEG[1, 1] = (2.5, 0.25)
POS = tensor([2.0, 3.0])
NEG = tensor([[1.0, 99.0], [2.5, 0.25]])


# ---- Eq. (1) -------------------------------------------------------------------------------------


def test_itc_by_hand():
    # -log(e^a / (e^a + e^b)) = log(1 + e^(b-a))
    #   image to text (rows)  2 against .5: log(1 + e^-1.5)   3 against 1: log(1 + e^-2)
    #   text to image (cols)  2 against 1:  log(1 + e^-1)     3 against .5: log(1 + e^-2.5)
    expected = sum(math.log1p(math.exp(-d)) for d in (1.5, 2, 1, 2.5)) / 2
    assert itc_loss(SIM).item() == close(expected)


def test_itc_is_twice_open_clips_loss():
    torch.manual_seed(0)
    image, text = torch.nn.functional.normalize(torch.randn(2, 5, 8), dim=-1)
    theirs = open_clip.ClipLoss()(image, text, tensor(20.0))
    assert itc_loss(20 * image @ text.T).item() == close(2 * theirs.item())


def test_itc_gradient_by_hand():
    # d/dS_ij = (softmax over row i + softmax over column j - 2 [i = j]) / B
    sim = SIM.clone().requires_grad_()
    itc_loss(sim).backward()
    expected = (SIM.softmax(1) + SIM.softmax(0) - 2 * torch.eye(2)) / 2
    torch.testing.assert_close(sim.grad, expected)


def test_itc_of_one_pair_is_zero_and_at_chance_2_log_b():
    assert itc_loss(tensor([[7.0]])).item() == 0
    assert itc_loss(torch.ones(4, 4)).item() == close(2 * math.log(4))


# ---- Eq. (2) -------------------------------------------------------------------------------------


def test_itc_hn_by_hand():
    # image to text, all negatives that exist of the whole batch in the denominator:
    #   image 0   e^2 / (e^2 + e^.5 + e^1 + e^0 + e^-1)
    #   image 1   e^3 / (e^1 + e^3 + e^2 + e^2.5 + e^.25)
    # text to image: as in Eq. (1), no negatives
    e = math.exp
    i2t = -math.log(e(2) / (e(2) + e(0.5) + e(1) + e(0) + e(-1)))
    i2t -= math.log(e(3) / (e(1) + e(3) + e(2) + e(2.5) + e(0.25)))
    t2i = math.log1p(e(-1)) + math.log1p(e(-2.5))
    assert itc_hn_loss(SIM, SIM_NEG, VALID).item() == close((i2t + t2i) / 2)


@pytest.mark.parametrize("k", [0, 2])
def test_itc_hn_without_negatives_is_itc(k):
    loss = itc_hn_loss(SIM, SIM_NEG[:, :, :k], torch.zeros(2, k, dtype=torch.bool))
    assert loss.item() == itc_loss(SIM).item()


def test_itc_hn_pushes_every_image_from_every_negative_that_exists():
    sim_neg = SIM_NEG.clone().requires_grad_()
    itc_hn_loss(SIM, sim_neg, VALID).backward()
    assert ((sim_neg.grad > 0) == VALID.expand(2, 2, 2)).all()
    assert (sim_neg.grad[:, 0, 1] == 0).all()


# ---- Eq. (3) -------------------------------------------------------------------------------------


def test_imc_by_hand():
    # caption 0: one negative at 1.5:          log e^1.5 - 2 = -.5 (no lower bound at 0)
    # caption 1: negatives at 2 and 2 + log 3: log(e^2 + 3 e^2) - 3 = log 4 - 1
    text_neg = tensor([[1.5, 99.0], [2.0, 2.0 + math.log(3)]])
    assert imc_loss(POS, text_neg, VALID).item() == close((-0.5 + math.log(4) - 1) / 2)


def test_imc_gradient_by_hand():
    # d/dS(I_i,T_i) = -1/B whatever the negatives: S(I,T) is not in the denominator
    # d/dS(T_i,T_ik) = softmax over the caption's own negatives / B = (1/4, 3/4) / 2 for caption 1
    pos = POS.clone().requires_grad_()
    text_neg = tensor([[1.5, 99.0], [2.0, 2.0 + math.log(3)]], requires_grad=True)
    imc_loss(pos, text_neg, VALID).backward()
    torch.testing.assert_close(pos.grad, tensor([-0.5, -0.5]))
    torch.testing.assert_close(text_neg.grad, tensor([[0.5, 0.0], [0.125, 0.375]]))


def test_imc_caption_without_negatives_adds_nothing_but_counts_in_the_mean():
    pos = POS.clone().requires_grad_()
    text_neg = tensor([[99.0, 99.0], [2.0, 2.0]], requires_grad=True)
    loss = imc_loss(pos, text_neg, tensor([[False, False], [True, True]]))
    assert loss.item() == close((math.log(2) + 2 - 3) / 2)
    loss.backward()
    assert pos.grad.tolist() == [0, -0.5]
    torch.testing.assert_close(text_neg.grad, tensor([[0.0, 0.0], [0.25, 0.25]]))


def test_imc_released_by_hand_and_unlike_eq_3():
    # every caption's target is negative (0, 0), in a denominator over all negatives of the batch:
    #   caption 0   log(e^1.5 + e^2 + e^0) - 1.5
    #   caption 1   log(e^.5 + e^2.5 + e^1) - .5
    e = math.exp
    text_neg = tensor([[[1.5, 99.0], [2.0, 0.0]], [[0.5, 99.0], [2.5, 1.0]]], requires_grad=True)
    loss = imc_loss_released(text_neg, VALID)
    expected = math.log(e(1.5) + e(2) + e(0)) - 1.5 + math.log(e(0.5) + e(2.5) + e(1)) - 0.5
    assert loss.item() == close(expected / 2)
    own = text_neg.detach().diagonal(dim1=0, dim2=1).T
    assert loss.item() != close(imc_loss(POS, own, VALID).item())
    # the two pull caption 0 in opposite directions from its own first negative
    loss.backward()
    own.requires_grad_()
    imc_loss(POS, own, VALID).backward()
    assert text_neg.grad[0, 0, 0] < 0 < own.grad[0, 0]


def test_imc_released_targets_the_first_negative_that_exists():
    text_neg = tensor([[[5.0, 1.0]], [[7.0, 0.0]]]).expand(2, 2, 2)
    valid = tensor([[False, True], [False, True]])
    assert imc_loss_released(text_neg, valid).item() == close(math.log(2))


# ---- Eq. (4) and (6) -----------------------------------------------------------------------------


def test_cmr_by_hand():
    # neg - pos + Th         k=0                          k=1
    #   i=0                  1 - 2 + 1.5 = .5 -> .5       missing; leaking it would add 97.25
    #   i=1                  2.5 - 3 + 1.5 = 1 -> 1       .25 - 3 + .25 = -2.5 -> 0
    loss = cmr_loss(POS, NEG, threshold=tensor([1.5, 0.25]), valid=VALID)
    assert loss.item() == (0.5 + 1) / 2


def test_cmr_gradient_by_hand():
    # each active term adds +1/B to its negative and -1/B to its pair; Th is a constant
    pos, neg = POS.clone().requires_grad_(), NEG.clone().requires_grad_()
    threshold = tensor([1.5, 0.25], requires_grad=True)
    cmr_loss(pos, neg, threshold, VALID).backward()
    assert pos.grad.tolist() == [-0.5, -0.5]
    assert neg.grad.tolist() == [[0.5, 0], [0.5, 0]]
    assert threshold.grad is None


def test_cmr_stops_once_a_pair_leads_by_the_threshold():
    pos, neg = tensor([2.0]), tensor([[1.5]])  # a lead of exactly .5
    valid = tensor([[True]])
    assert cmr_loss(pos, neg, tensor([0.5]), valid).item() == 0
    assert cmr_loss(pos, neg, tensor([0.75]), valid).item() == 0.25


def test_cmr_of_one_constant_for_all_kinds_by_hand():
    # Eq. (4), neg - pos + 2   k=0                      k=1
    #   i=0                    1 - 2 + 2 = 1            missing; leaking it would add 99
    #   i=1                    2.5 - 3 + 2 = 1.5        .25 - 3 + 2 = -.75 -> 0
    assert cmr_loss(POS, NEG, threshold=2.0, valid=VALID).item() == (1 + 1.5) / 2
    assert cmr_loss(POS, NEG, threshold=2, valid=VALID).item() == (1 + 1.5) / 2


# ---- Eq. (5) and (7) -----------------------------------------------------------------------------


def test_threshold_by_hand():
    # lead pos - neg    k=0               k=1
    #   i=0             2 - 1 = 1         missing
    #   i=1             3 - 2.5 = .5      3 - .25 = 2.75
    #   paired mean     .75               2.75, bounded by u = 2
    # (a mean of pos over all pairs, as in the authors' code, would give 2.25 for k=1)
    threshold = adaptive_threshold(POS, NEG, VALID, upper_bound=2.0)
    assert threshold.tolist() == [0.75, 2.0]
    assert adaptive_threshold(POS, NEG, VALID, upper_bound=10.0).tolist() == [0.75, 2.75]


def test_threshold_is_a_mean_over_pairs_that_have_the_kind():
    valid = tensor([[True, True], [True, False]])
    threshold = adaptive_threshold(tensor([4.0, 2.0]), tensor([[1.0, 3.0], [5.0, -99.0]]), valid)
    assert threshold.tolist() == [(3 - 3) / 2, 1]  # unpaired: mean pos 3 - 3 = 0 for k=1


def test_threshold_may_be_negative():
    threshold = adaptive_threshold(tensor([1.0]), tensor([[3.0]]), tensor([[True]]))
    assert threshold.tolist() == [-2]


def test_threshold_of_an_absent_kind_is_unchanged():
    valid = tensor([[True, False], [True, False]])
    previous = tensor([9.0, 4.5])
    assert adaptive_threshold(POS, NEG, valid, previous=previous).tolist() == [0.75, 4.5]
    assert adaptive_threshold(POS, NEG, valid).tolist() == [0.75, 0]


def test_threshold_has_no_gradient():
    threshold = adaptive_threshold(POS.clone().requires_grad_(), NEG, VALID)
    assert not threshold.requires_grad


# ---- Eq. (8) -------------------------------------------------------------------------------------


def test_ce_clip_by_hand():
    text_neg = tensor([[1.5, 99.0], [2.0, 2.0]])
    threshold = tensor([1.5, 0.25])
    loss, terms = ce_clip_loss(SIM, SIM_NEG, text_neg, threshold, VALID, alpha=0.5, beta=0.25)
    imc = (-0.5 + math.log(2) - 1) / 2
    assert terms["itc"].item() == itc_hn_loss(SIM, SIM_NEG, VALID).item()
    assert terms["imc"].item() == close(imc)
    assert terms["cmr"].item() == 0.75
    assert loss.item() == close(terms["itc"].item() + 0.5 * imc + 0.25 * 0.75)


def test_ce_clip_defaults_are_the_papers():
    text_neg, threshold = tensor([[1.5, 99.0], [2.0, 2.0]]), tensor([1.5, 0.25])
    loss, t = ce_clip_loss(SIM, SIM_NEG, text_neg, threshold, VALID)
    assert loss.item() == close((t["itc"] + 0.2 * t["imc"] + 0.4 * t["cmr"]).item())


def test_own_pairs_are_the_diagonals():
    pos, neg = own_pairs(SIM, SIM_NEG)
    assert pos.tolist() == POS.tolist()
    assert neg.tolist() == NEG.tolist()


def test_similarities_by_hand():
    # at a scale of 2     caption 0 (4, 1)  negative (0, 3)  caption 1 (5, -1)  negative (-2, 1)
    #   image 0 (1, 0)    2 * 4 = 8         2 * 0            2 * 5 = 10         2 * -2 = -4
    #   image 1 (1, 2)    2 * 6 = 12        2 * 6 = 12       2 * 3 = 6          2 * 0
    #   its own caption                     2 * 3 = 6                           2 * -11 = -22
    image = tensor([[1.0, 0.0], [1.0, 2.0]])
    text = tensor([[[4.0, 1.0], [0.0, 3.0]], [[5.0, -1.0], [-2.0, 1.0]]])
    sim, sim_neg, text_neg = similarities(image, text, tensor(2.0))
    assert sim.tolist() == [[8, 10], [12, 6]]
    assert sim_neg.tolist() == [[[0], [-4]], [[12], [0]]]
    assert text_neg.tolist() == [[6], [-22]]


# ---- looking_loss (ours) -------------------------------------------------------------------------

IMAGE = tensor([[1.0, 0.5], [0.25, 1.0]])
TEXT = tensor([[[1.0, 0.0], [0.2, 0.4], [9.0, 9.0]], [[0.0, 1.0], [5.0, 5.0], [0.0, 0.5]]])
ONE_EACH = tensor([[True, False], [False, True]])  # the 9s and 5s must not count
SCALE = tensor(1.0)
# Caption 0 less its negative is (.8, -.4), so d = (2, -1) / sqrt 5, and I.d is 1.5 / sqrt 5 for its
# own image and -.5 / sqrt 5 for the other one. Its lead is .8 - .2 = .6.
# Caption 1 less its negative is (0, .5), so d = (0, 1), and I.d is 1 for its own image and .5 for
# the other one. Its lead is .5.
# With one other image the loss of a pair is log(1 + e^-(own less other)).


def test_looking_by_hand():
    first, second = math.log1p(math.exp(-2 / math.sqrt(5))), math.log1p(math.exp(-0.5))
    loss = looking_loss(IMAGE, TEXT, SCALE, ONE_EACH).item()
    assert loss == close((0.6 * first + 0.5 * second) / 2)
    # Twice the scale: leads of 1.2 and 1, of which at most 1 counts
    first, second = math.log1p(math.exp(-4 / math.sqrt(5))), math.log1p(math.exp(-1))
    assert looking_loss(IMAGE, TEXT, 2 * SCALE, ONE_EACH).item() == close((first + second) / 2)


def test_looking_is_the_text_to_image_half_of_eq_1_of_the_directions():
    torch.manual_seed(0)
    image, text = torch.randn(5, 8), torch.randn(5, 2, 8)
    text[:, 0] = text[:, 1] + image + 0.5 * torch.randn(5, 8)  # each caption leads by far
    difference = text[:, 0] - text[:, 1]
    sim = 9 * image @ (difference / difference.norm(dim=1, keepdim=True)).T
    loss = looking_loss(image, text, tensor(9.0), torch.ones(5, 1, dtype=torch.bool))
    assert loss.item() == close(torch.nn.functional.cross_entropy(sim.T, torch.arange(5)).item())


def test_looking_ignores_what_all_images_share_and_how_far_a_negative_is():
    """All pairs lead by more than one logit here, before and after."""
    loss = looking_loss(IMAGE, TEXT, 3 * SCALE, ONE_EACH)
    shifted = looking_loss(IMAGE + tensor([7.0, 3.0]), TEXT, 3 * SCALE, ONE_EACH)
    longer = TEXT.clone()
    longer[1, 2] = tensor([0.0, -3.0])  # (0, 1) less (0, -3): eight times as far, the same way
    assert shifted.item() == close(loss.item())
    assert looking_loss(IMAGE, longer, 3 * SCALE, ONE_EACH).item() == close(loss.item())


def test_looking_counts_no_pair_that_does_not_lead():
    """Both images lead the other way, and other images would have to."""
    text = TEXT[:, [1, 0, 2]].clone().requires_grad_()
    loss = looking_loss(IMAGE, text, SCALE, tensor([[True, False], [False, False]]))
    loss.backward()
    assert loss.item() == 0 and text.grad.abs().max() == 0


def test_looking_gradient_by_hand():
    """With caption 1 alone, its weight is .5; the other image has a share of p = 1 / (1 + e^.5).
    dL/dI = 1/B * .5 * p * d, with a minus for the own image. dL/dd = 1/B * .5 * p * (I_0 - I_1) =
    p / 4 * (.75, -.5); of it the part across d turns T - T_n, divided by its length .5:
    p * (.375, 0)."""
    image, text = IMAGE.clone().requires_grad_(), TEXT.clone().requires_grad_()
    only = tensor([[False, False], [False, True]])
    looking_loss(image, text, SCALE, only).backward()
    p = 1 / (1 + math.exp(0.5))
    assert image.grad.flatten().tolist() == close([0, p / 4, 0, -p / 4])
    assert text.grad[1].flatten().tolist() == close([0.375 * p, 0, 0, 0, -0.375 * p, 0])
    assert text.grad[0].abs().max() == 0


@pytest.mark.parametrize(
    ("pairs", "valid"), [(1, ONE_EACH[:1]), (2, torch.zeros_like(ONE_EACH)), (2, ONE_EACH[:, :0])]
)
def test_looking_is_zero_for_one_pair_and_without_negatives(pairs, valid):
    text = TEXT[:pairs, : 1 + valid.shape[1]].clone().requires_grad_()
    loss = looking_loss(IMAGE[:pairs], text, SCALE, valid)
    loss.backward()
    assert loss.item() == 0 and text.grad.abs().max() == 0


@pytest.mark.parametrize("distance", [0, 1e-12, 1e-6])
def test_looking_of_a_negative_close_to_its_caption_has_a_small_gradient(distance):
    """d has the length 1 however close they are, but the weight falls with the distance."""
    text = TEXT.clone()
    text[0, 1] = text[0, 0] - distance * tensor([1.0, -0.5])
    text.requires_grad_()
    looking_loss(IMAGE, text, SCALE, tensor([[True, False], [False, False]])).backward()
    assert text.grad.isfinite().all() and text.grad.abs().max() < 1


# ---- All of them ---------------------------------------------------------------------------------


def test_matrix_equals_plain_loop():
    torch.manual_seed(1)
    B, K, exp = 5, 4, math.exp
    sim, sim_neg, text_neg = torch.randn(B, B), torch.randn(B, B, K), torch.randn(B, K)
    valid, threshold = torch.rand(B, K) < 0.6, torch.randn(K)
    valid[2] = False  # a caption without negatives
    itc = imc = cmr = 0.0
    lead = [[] for _ in range(K)]
    for i in range(B):
        own = [k for k in range(K) if valid[i, k]]
        texts = sum(exp(sim[i, j]) for j in range(B))
        hard = sum(exp(sim_neg[i, j, k]) for j in range(B) for k in range(K) if valid[j, k])
        images = sum(exp(sim[j, i]) for j in range(B))
        itc -= math.log(exp(sim[i, i]) / images) + math.log(exp(sim[i, i]) / (texts + hard))
        if own:
            imc -= math.log(exp(sim[i, i]) / sum(exp(text_neg[i, k]) for k in own))
        for k in own:
            gap = (sim[i, i] - sim_neg[i, i, k]).item()
            cmr += max(0.0, threshold[k].item() - gap)
            lead[k].append(gap)
    loss, terms = ce_clip_loss(sim, sim_neg, text_neg, threshold, valid)
    assert [t.item() for t in terms.values()] == [close(itc / B), close(imc / B), close(cmr / B)]
    new = adaptive_threshold(*own_pairs(sim, sim_neg), valid, upper_bound=0.1)
    assert new.tolist() == [close(min(0.1, sum(g) / len(g))) for g in lead]


@pytest.mark.parametrize("k", [0, 3])
def test_nothing_valid_is_plain_clip_with_finite_gradients(k):
    sim = SIM.clone().requires_grad_()
    sim_neg = torch.full((2, 2, k), 99.0, requires_grad=True)
    text_neg = torch.full((2, k), 99.0, requires_grad=True)
    valid, threshold = torch.zeros(2, k, dtype=torch.bool), torch.ones(k)
    loss, terms = ce_clip_loss(sim, sim_neg, text_neg, threshold, valid)
    assert loss.item() == itc_loss(SIM).item()
    assert terms["imc"].item() == terms["cmr"].item() == 0
    loss.backward()
    for x in (sim_neg, text_neg):
        assert x.grad is None or (x.grad == 0).all()
    assert sim.grad.isfinite().all()
    assert imc_loss_released(torch.full((2, 2, k), 99.0), valid).item() == 0
    kept = adaptive_threshold(POS, torch.full((2, k), 99.0), valid, previous=threshold)
    assert kept.tolist() == threshold.tolist()


@pytest.mark.parametrize("scale", [100.0, 1e4])
def test_extreme_logits_stay_finite(scale):
    sim = (scale * SIM).requires_grad_()
    sim_neg = (scale * SIM_NEG).requires_grad_()
    text_neg = (-scale * NEG).requires_grad_()
    loss, _ = ce_clip_loss(sim, sim_neg, text_neg, tensor([scale, -scale]), VALID)
    loss.backward()
    assert loss.isfinite()
    assert all(x.grad.isfinite().all() for x in (sim, sim_neg, text_neg))


def test_an_infinite_missing_negative_does_not_leak():
    neg = tensor([[1.0, torch.inf], [2.5, 0.25]], requires_grad=True)
    threshold = tensor([1.5, 0.25])
    cmr_loss(POS, neg, threshold, VALID).backward()
    assert neg.grad.isfinite().all()
    assert adaptive_threshold(POS, neg, VALID).tolist() == [0.75, 2.75]


T = torch.ones(3, 2, dtype=torch.bool)
WRONG = {
    "itc_loss: sim has shape (2, 3), expected (2, 2)": lambda: itc_loss(torch.ones(2, 3)),
    "itc_hn_loss: sim_neg has shape (3, 2, 2), expected (2, 2, 2)": lambda: itc_hn_loss(
        SIM, torch.ones(3, 2, 2), VALID
    ),
    "itc_hn_loss: valid has shape (3, 2), expected (2, 2)": lambda: itc_hn_loss(SIM, SIM_NEG, T),
    "imc_loss: pos has shape (2,), expected (3,)": lambda: imc_loss(POS, torch.ones(3, 2), T),
    "imc_loss_released: all_text_neg has shape (2, 2), expected (2, 2, 2)": lambda: (
        imc_loss_released(NEG, VALID)
    ),
    "cmr_loss: threshold has shape (3,), expected (2,)": lambda: cmr_loss(
        POS, NEG, torch.zeros(3), VALID
    ),
    "looking_loss: image has shape (3, 2), expected (2, 2)": lambda: looking_loss(
        torch.ones(3, 2), TEXT, SCALE, VALID
    ),
    "looking_loss: text has shape (2, 2, 2), expected (2, 3, 2)": lambda: looking_loss(
        IMAGE, TEXT[:, 1:], SCALE, VALID
    ),
    "adaptive_threshold: previous has shape (1,), expected (2,)": lambda: adaptive_threshold(
        POS, NEG, VALID, previous=torch.zeros(1)
    ),
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_shapes_are_named(message):
    with pytest.raises(ValueError, match=re.escape(message)):
        WRONG[message]()


def test_valid_must_be_bool():
    """Of integers torch would take ~1 = -2, which is not False."""
    for loss in (
        lambda valid: itc_hn_loss(SIM, SIM_NEG, valid),
        lambda valid: imc_loss(POS, NEG, valid),
        lambda valid: cmr_loss(POS, NEG, torch.zeros(2), valid),
        lambda valid: adaptive_threshold(POS, NEG, valid),
        lambda valid: looking_loss(IMAGE, TEXT, SCALE, valid),
    ):
        with pytest.raises(RuntimeError, match="boolean mask"):
            loss(VALID.long())
