"""The language model: what it computes, what it writes to the depth stream, and its size."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from moda_ops.nn import MoDABlock, MoDAConfig, MoDALanguageModel, Slot, rotary_angles, rotate

CONFIG = MoDAConfig(vocab_size=61, layers=3, width=36, heads=6, kv_heads=2, head_dim=10, hidden=50)


@pytest.fixture
def model() -> MoDALanguageModel:
    torch.manual_seed(0)
    return MoDALanguageModel(CONFIG)


def tokens_like(batch: int, length: int) -> Tensor:
    return torch.randint(CONFIG.vocab_size, (batch, length), generator=torch.Generator())


def test_a_token_changes_no_earlier_logits(model: MoDALanguageModel) -> None:
    tokens = tokens_like(2, 23)
    changed = tokens.clone()
    changed[:, 11] = (changed[:, 11] + 1) % CONFIG.vocab_size
    before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[:, :11], after[:, :11])
    assert (before[:, 11:] - after[:, 11:]).abs().amax((0, 2)).min() > 1e-4


def test_each_block_reads_two_slots_of_each_block_before_it(model: MoDALanguageModel) -> None:
    slots: list[int] = []
    for block in model.blocks:
        block.attention.register_forward_pre_hook(lambda _, args: slots.append(len(args[2])))
    model(tokens_like(1, 5))
    assert slots == [0, 2, 4]
    x, rotary, stream = torch.randn(1, 5, CONFIG.width), model.rotary(5), []
    for block in model.blocks:
        x, stream = block(x, rotary, stream)
    assert len(stream) == 2 * CONFIG.layers - 1  # the last feed-forward writes nothing
    assert {tuple(part.shape) for slot in stream for part in slot} == {(1, 5, 2, 10)}


def test_blocks_do_not_change_the_stream_they_are_given(model: MoDALanguageModel) -> None:
    stream: list[Slot] = []
    model.blocks[0](torch.randn(1, 5, CONFIG.width), model.rotary(5), stream)
    assert stream == []


def test_the_sequence_key_is_the_depth_key(model: MoDALanguageModel) -> None:
    attention = model.blocks[0].attention
    x, rotary = torch.randn(1, 5, CONFIG.width), model.rotary(5)
    _, slot = attention(x, rotary, [])
    for written, used in zip(slot, attention.project(x, rotary)[1:], strict=True):
        assert torch.equal(written, used)


def test_every_parameter_gets_a_gradient(model: MoDALanguageModel) -> None:
    tokens = tokens_like(2, 17)
    F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()).backward()
    without = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []


def test_parameter_count(model: MoDALanguageModel) -> None:
    c = CONFIG
    kv = 2 * c.width * c.kv_heads * c.head_dim
    attention = 2 * c.width * c.heads * c.head_dim + kv
    block = attention + 3 * c.width * c.hidden + 2 * c.width
    expected = c.vocab_size * c.width + c.layers * block + (c.layers - 1) * kv
    assert sum(p.numel() for p in model.parameters()) == expected


def test_logits_at_initialization_are_near_uniform(model: MoDALanguageModel) -> None:
    tokens = tokens_like(4, 32)
    loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
    uniform = torch.tensor(float(CONFIG.vocab_size)).log()
    assert abs(loss - uniform) < 0.1


@pytest.mark.parametrize("position", [1, 1000])
def test_depth_scores_do_not_depend_on_the_position(position: int) -> None:
    """One token, so only depth is read: its position must not matter, in any block."""
    torch.manual_seed(0)
    x = torch.randn(3, 1, CONFIG.width)

    def last_output(at: int) -> Tensor:
        torch.manual_seed(1)
        y, stream = x, []
        rotary = rotary_angles(torch.tensor([at]), CONFIG.head_dim, CONFIG.rope_base)
        for i in range(3):
            y, stream = MoDABlock(CONFIG, last=i == 2)(y, rotary, stream)
        return y

    torch.testing.assert_close(last_output(position), last_output(0))


def test_rotation_makes_scores_relative() -> None:
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 16, dtype=torch.float64)

    def score(query_at: int, key_at: int) -> Tensor:
        angles = [rotary_angles(torch.tensor([at]), 16, 1e4) for at in (query_at, key_at)]
        return (rotate(q, angles[0]) * rotate(k, angles[1])).sum()

    torch.testing.assert_close(score(9, 4), score(105, 100), rtol=1e-5, atol=1e-5)
    assert (score(9, 4) - score(9, 5)).abs() > 1e-3


def test_compiles_as_one_graph_and_trains_as_in_eager(model: MoDALanguageModel) -> None:
    tokens = tokens_like(2, 19)

    def loss_of(tokens: Tensor) -> Tensor:
        return F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())

    def gradients(loss: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(loss, list(model.parameters())))

    eager = loss_of(tokens)
    compiled = torch.compile(loss_of, fullgraph=True)(tokens)
    torch.testing.assert_close(compiled, eager)
    torch.testing.assert_close(gradients(compiled), gradients(eager))


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"heads": 5}, "kv_heads = 2 must divide heads = 5"),
        ({"head_dim": 7}, "head_dim = 7 must be even"),
    ],
)
def test_config_refuses_sizes_that_do_not_fit(sizes: dict[str, int], message: str) -> None:
    fitting = {"layers": 2, "width": 8, "heads": 4, "kv_heads": 2, "head_dim": 4, "hidden": 8}
    with pytest.raises(ValueError, match=message):
        MoDAConfig(vocab_size=3, **{**fitting, **sizes})
