"""Every mixer with every head in every kind of model: it learns from what it is given, or it is refused."""

from itertools import product

import pytest
import torch
import torch.nn.functional as F

from grassland.archs import CosineHead, create_model
from grassland.archs.registry import slot_choices

CAUSAL = [name for name in slot_choices("mixer") if name != "bidirectional"]
BLOCKS = {"dim": 16, "depth": 2, "ffn_dim": 24}
TEXT = {"vocab_size": 31, "max_len": 24, **BLOCKS}
KINDS = {
    "lm": ("lm", TEXT),
    "mlm": ("mlm", {"embed_dim": 12, "num_classes": 3, **TEXT}),
    "mlm-tokens": ("mlm", {"embed_dim": 12, "pooler": False, **TEXT}),
    "vision": ("vision", {"image_size": 12, "patch_size": 4, "num_classes": 5, **BLOCKS}),
    "vision-cls": ("vision", {"image_size": 12, "patch_size": 4, "num_classes": 5, "pooling": "cls", **BLOCKS}),
}
COMBINATIONS = list(product(KINDS, slot_choices("mixer"), slot_choices("head")))


def refusal(kind, mixer, head):
    """What the error must say, None for a combination that is a model."""
    if kind == "lm" and mixer not in CAUSAL:
        return "mixer must be causal in a language model, got 'bidirectional'"
    if kind == "mlm" and mixer in CAUSAL:
        return f"pooler must be False with the causal mixer '{mixer}'"
    if kind == "vision-cls" and mixer in CAUSAL:
        return f"pooling must be 'mean' with the causal mixer '{mixer}'"
    if kind.startswith("vision") and head == "tied":
        return "head='tied' needs a model with a token embedding; use head='linear'"
    return None


def build(kind, mixer, head):
    torch.manual_seed(0)
    name, sizes = KINDS[kind]
    options = {"subspace_dim": 3} if head == "grassmann" else {}
    return create_model(name, mixer=mixer, head=head, dtype=torch.float64, **sizes, **options)


def batch(kind):
    """Two inputs that differ at the end alone, and sets of labels by keyword."""
    if kind.startswith("vision"):
        images = torch.randn(2, 3, 12, 12, dtype=torch.float64)
        images[1, :, :8] = images[0, :, :8]
        return images, [{"labels": torch.tensor([0, 4])}, {"labels": torch.randn(2, 5).softmax(-1)}]
    tokens = torch.randint(31, (1, 9)).repeat(2, 1)
    tokens[1, -1] = (tokens[0, -1] + 1) % 31
    labels = torch.randint(31, (2, 9))
    labels[0, :2] = -100
    classes = [{"classes": torch.tensor([0, 2])}] if kind == "mlm" else []
    return tokens, [{"labels": labels}, *classes]


@pytest.mark.parametrize(("kind", "mixer", "head"), COMBINATIONS)
def test_a_combination_learns_from_its_input_or_is_refused(kind, mixer, head):
    if (said := refusal(kind, mixer, head)) is not None:
        with pytest.raises(ValueError, match=said):
            build(kind, mixer, head)
        return
    model = build(kind, mixer, head)
    inputs, targets = batch(kind)
    outputs = [model.eval()(inputs), *([model.classify(inputs)] if kind == "mlm" else [])]
    for output in outputs:
        first, second = output if output.dim() == 2 else output[:, -1]
        assert output.isfinite().all() and not torch.equal(first, second)
    # So small a step that each head's loss must fall.
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
    for target in targets:
        losses = []
        for _ in range(2):
            losses.append(model.train()(inputs, **target))
            optimizer.zero_grad()
            losses[-1].backward()
            optimizer.step()
        assert losses[0].isfinite() and losses[1] < losses[0]


@pytest.mark.parametrize("head", slot_choices("head"))
def test_every_head_has_the_cross_entropy_of_its_logits(head):
    model = build("lm", "attention", head).eval()
    tokens, labels = torch.randint(31, (2, 9)), torch.randint(31, (2, 9))
    logits = model(tokens)
    torch.testing.assert_close(model(tokens, labels=labels), F.cross_entropy(logits.flatten(0, 1), labels.flatten()))
    x, soft = torch.randn(2, 3, 16, dtype=torch.float64), torch.rand(2, 3, 31, dtype=torch.float64).softmax(-1)
    expected = F.cross_entropy(model.head.logits(x).flatten(0, 1), soft.flatten(0, 1), label_smoothing=0.1)
    torch.testing.assert_close(model.head.loss(x, soft, label_smoothing=0.1), expected)
    hard = labels[:, :3]
    expected = F.cross_entropy(model.head.logits(x).flatten(0, 1), hard.flatten(), label_smoothing=0.1)
    torch.testing.assert_close(model.head.loss(x, hard, label_smoothing=0.1), expected)


def test_the_cosine_head_is_scaled_cosines():
    head = CosineHead(6, 4, scale=7.0, dtype=torch.float64)
    x = torch.randn(3, 6, dtype=torch.float64)
    expected = 7 * F.cosine_similarity(x[:, None], head.weight, dim=-1)
    torch.testing.assert_close(head(x), expected, atol=1e-13, rtol=0)


@pytest.mark.parametrize("head", slot_choices("head"))
def test_labels_of_another_shape_are_named(head):
    model = build("lm", "attention", head)
    for labels in (torch.zeros(6, dtype=torch.int64), torch.rand(2, 3, 30)):
        with pytest.raises(ValueError, match=r"labels|target"):
            model.head.loss(torch.randn(2, 3, 16, dtype=torch.float64), labels)
