"""A CLIP tower written so that llama.cpp, which puts the class token in the wrong place, gives the right features.

llama.cpp appends the class token behind the patches and then treats it as if it stood before them (issue 25814): every
patch gets its neighbour's position, the first patch is dropped, and the class token is shown to the language model. The
files alone can set this right. The tower gets one head more, and so some channels more, and one block before its own:

* every position carries a code in the new channels, far longer than what a patch says, so that ``ln1`` of the first
  block divides by the same number everywhere and its attention sees codes alone: position i looks at position i - 1,
  and the first one at the last, where the class token is. What they say is copied, the code is taken away again.
* its MLP then does what ``pre_layrnorm`` does (act(x) - act(-x) = x for GELU and QuickGELU), now in the right order.
* from there on the new channels hold the mean of the others, so that a LayerNorm over all is the tower's own, times a
  constant; everything that adds to the hidden state keeps it so, because it is linear.

What is left of the state before is smaller than what follows it by 2**-11 each time: embeddings are ``EMBEDDED`` times
as large as the tower's own, what is copied ``COPIED``, and everything from there on ``LOUD``. llama.cpp computes
patches in 16 bits, so the pixels have to be fainter too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

State = dict[str, Tensor]
EPSILON = 1e-15  # of every LayerNorm: the first two see faint numbers
PIXELS, PATCHES = 2.0**-10, 2.0**-8
EMBEDDED, COPIED, LOUD = PIXELS * PATCHES, 2.0**-7, 2.0**4
MARGIN = 40.0  # by which the right position's attention logit exceeds the others: exp(-40) of them is seen
LENGTH = 8.0  # of a code, in longest patches
BRIGHTEST = 3.0  # of normalised pixels


@dataclass(frozen=True, slots=True)
class Sizes:
    """Of a tower: channels, heads, patches, blocks that are run, and channels that are added."""

    width: int
    heads: int
    patches: int
    blocks: int

    @property
    def more(self) -> int:
        """Channels of one head."""
        return self.width // self.heads

    @property
    def whole(self) -> int:
        """Channels with those that are added."""
        return self.width + self.more


def turned(tower: State, sizes: Sizes) -> State:
    """The tower's weights in llama.cpp's names, for its embeddings, the block in front, and the tower's own blocks.

    ``tower`` has transformers' names. There is no ``v.pre_ln``.
    """
    written: State = {}
    for number in range(sizes.blocks):
        prefix = f"encoder.layers.{number}."
        own = {key.removeprefix(prefix): weight for key, weight in tower.items() if key.startswith(prefix)}
        written |= {f"v.blk.{number + 1}.{key}": weight for key, weight in _widened(own, sizes).items()}
    codes, right, basis = _codes(sizes)
    patch = tower["embeddings.patch_embedding.weight"]
    position, token = tower["embeddings.position_embedding.weight"], tower["embeddings.class_embedding"]
    longest = float(position.norm(dim=1).max() + token.norm() + (BRIGHTEST * patch.flatten(1).abs().sum(1)).norm())
    length = LENGTH * longest
    written["v.patch_embd.weight"] = PATCHES * torch.cat([patch, patch.new_zeros(sizes.more, *patch.shape[1:])])
    written["v.class_embd"] = EMBEDDED * torch.cat([token, token.new_zeros(sizes.more)])
    behind = torch.cat([position[1:], position[:1]])  # patches first, then the class token
    written["v.position_embd.weight"] = EMBEDDED * torch.cat([behind, length * codes @ basis.T], 1)
    return written | {f"v.blk.0.{key}": weight for key, weight in _shift(tower, sizes, right, basis, length).items()}


def _codes(sizes: Sizes) -> tuple[Tensor, Tensor, Tensor]:
    """A unit code for every position, what turns a code into the next position's, and where codes lie in the channels.

    Codes are (positions, C) points on circles; ``basis`` is (more, C), orthonormal, its columns without a mean.
    """
    count = sizes.patches + 1
    room = min((sizes.more - 1) // 2, (count - 1) // 2)
    generator = torch.Generator().manual_seed(0)
    best, frequencies = math.inf, torch.arange(1, room + 1)
    steps = torch.arange(1, count, dtype=torch.float64)
    for _ in range(200):
        tried = torch.randperm((count - 1) // 2, generator=generator)[:room] + 1
        nearest = float(torch.cos(2 * math.pi * steps[:, None] * tried / count).sum(1).max())
        if nearest < best:
            best, frequencies = nearest, tried
    angles = 2 * math.pi * torch.arange(count, dtype=torch.float64)[:, None] * frequencies / count
    codes = torch.cat([angles.cos(), angles.sin()], 1) / math.sqrt(room)
    step = 2 * math.pi * frequencies.double() / count
    turn = torch.cat([
        torch.cat([step.cos().diag(), -step.sin().diag()], 1), torch.cat([step.sin().diag(), step.cos().diag()], 1),
    ])  # fmt: skip
    plain = torch.cat([torch.ones(sizes.more, 1), torch.randn(sizes.more, 2 * room, generator=generator)], 1).double()
    basis = torch.linalg.qr(plain).Q[:, 1:]
    return codes.float(), turn.float(), basis.float()


def _shift(tower: State, sizes: Sizes, turn: Tensor, basis: Tensor, length: float) -> State:
    """The block in front: every position takes what the one before it said, then ``pre_layrnorm``."""
    width, more, whole, kinds = sizes.width, sizes.more, sizes.whole, basis.shape[1]
    codes, _, _ = _codes(sizes)
    nearest = float((codes @ codes[0])[1:].max())
    sharp = math.sqrt(MARGIN * math.sqrt(more) / (1 - nearest) / whole)
    read = torch.zeros(more, whole)  # one head's view of the code; ln1 gives it the length sqrt(whole)
    read[:kinds, width:] = basis.T
    key = torch.zeros(more, whole)
    key[:kinds, width:] = turn @ basis.T
    back = length / math.sqrt(whole)  # by what ln1 has divided, over the scale of the embeddings
    value = torch.zeros(whole, whole)
    value[:width, :width] = back * torch.eye(width)
    value[width:] = read
    out = torch.zeros(whole, whole)
    out[:width, :width] = COPIED * torch.eye(width)
    out[width:, :width] = COPIED / width
    out[width:, width : width + kinds] = -EMBEDDED * back * basis @ turn
    weight, bias = tower["pre_layrnorm.weight"], tower["pre_layrnorm.bias"]
    up = torch.zeros(num_hidden(tower), whole)
    up[:width, :width], up[width : 2 * width, :width] = torch.eye(width), -torch.eye(width)
    down = torch.zeros(width, num_hidden(tower))
    down[:, :width], down[:, width : 2 * width] = weight.diag(), -weight.diag()
    none = torch.zeros(whole)
    return {
        "ln1.weight": torch.ones(whole), "ln1.bias": none,
        "attn_q.weight": (sharp * read).repeat(sizes.heads + 1, 1), "attn_q.bias": none,
        "attn_k.weight": (sharp * key).repeat(sizes.heads + 1, 1), "attn_k.bias": none,
        "attn_v.weight": value, "attn_v.bias": none,
        "attn_out.weight": out, "attn_out.bias": none,
        "ln2.weight": _norm(torch.ones(width), sizes), "ln2.bias": none,
        "ffn_up.weight": up, "ffn_up.bias": torch.zeros(len(up)),
        "ffn_down.weight": _with_mean(down, sizes), "ffn_down.bias": _with_mean(bias, sizes),
    }  # fmt: skip


def num_hidden(tower: State) -> int:
    """Hidden units of a block's MLP; twice the channels are needed."""
    return len(tower["encoder.layers.0.mlp.fc1.bias"])


def _widened(block: State, sizes: Sizes) -> State:
    """One of the tower's own blocks, blind to the channels that were added, and keeping the mean in them."""
    written: State = {}
    for theirs, ours in (("layer_norm1", "ln1"), ("layer_norm2", "ln2")):
        written[f"{ours}.weight"] = _norm(block[f"{theirs}.weight"], sizes)
        written[f"{ours}.bias"] = _with_zeros(block[f"{theirs}.bias"], sizes)
    for theirs, ours in (("q_proj", "attn_q"), ("k_proj", "attn_k"), ("v_proj", "attn_v")):
        weight = _with_zeros(block[f"self_attn.{theirs}.weight"].T, sizes).T
        written[f"{ours}.weight"] = _with_zeros(weight, sizes)
        written[f"{ours}.bias"] = _with_zeros(block[f"self_attn.{theirs}.bias"], sizes)
    out = _with_zeros(block["self_attn.out_proj.weight"].T, sizes).T
    written["attn_out.weight"] = _with_mean(out, sizes)
    written["attn_out.bias"] = _with_mean(block["self_attn.out_proj.bias"], sizes)
    written["ffn_up.weight"] = _with_zeros(block["mlp.fc1.weight"].T, sizes).T
    written["ffn_up.bias"] = block["mlp.fc1.bias"]
    written["ffn_down.weight"] = _with_mean(block["mlp.fc2.weight"], sizes)
    written["ffn_down.bias"] = _with_mean(block["mlp.fc2.bias"], sizes)
    return written


def _norm(weight: Tensor, sizes: Sizes) -> Tensor:
    """A LayerNorm's weight where the variance is taken over the channels with those that add nothing to it."""
    return _with_zeros(weight * math.sqrt(sizes.width / sizes.whole), sizes)


def _with_zeros(weight: Tensor, sizes: Sizes) -> Tensor:
    """Zeros for the rows that were added."""
    return torch.cat([weight, weight.new_zeros(sizes.more, *weight.shape[1:])])


def _with_mean(weight: Tensor, sizes: Sizes) -> Tensor:
    """The mean of the rows for each that was added, and all of it ``LOUD``."""
    return LOUD * torch.cat([weight, weight.mean(0, keepdim=True).expand(sizes.more, *weight.shape[1:])])
