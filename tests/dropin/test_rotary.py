"""Blocks that get rotary positions with every call: which conventions are found out, and which calls are whose."""

import copy
import itertools

import pytest
import torch
import torch.nn as nn

pytest.importorskip("triton")

from segmenter import ops
from segmenter.dropin.accelerate import AccelerationError, accelerate, restore, why_not
from tests.support.blocks import (
    DEVICE,
    MLP,
    ROTARY,
    SEPARATE_ROTARY,
    TIGHT,
    WIDTH,
    PlainBlock,
    SeparateBlock,
    original,
    replace,
)
from tests.support.spies import kernels_run
from tests.support.supported import SUPPORTED

HEADS, COLUMNS, EXTRA, PATCHES = 2, WIDTH // 2, 2, 6


@pytest.fixture
def kernels(monkeypatch):
    """Names of the kernels and operators that ran."""
    return kernels_run(monkeypatch)


def turned(x, cos, sin, interleaved=False, sign=1):
    """(B, h, n, d), as libraries write it."""
    if interleaved:
        other = torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)
    else:
        other = torch.cat([-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]], -1)
    return x * cos + sign * other * sin


class Settings:
    """How the attention layers below turn what. As a plain object, whose values are compared on every call."""

    def __init__(self, **how):
        self.joined = self.sines_first = self.interleaved = self.values = self.normed = False
        self.sign, self.extra = 1, None
        vars(self).update(how)


class Norm(nn.Module):
    """Of queries or keys, of no kind that the kernels know."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(COLUMNS))

    def forward(self, x):
        return self.weight * x / (1 + x.abs().amax(-1, keepdim=True))


class Turning(nn.Module):
    """Attention with rotary positions, of qkv or of three layers."""

    def __init__(self, how, packed):
        super().__init__()
        self.num_heads, self.how = HEADS, how
        if how.normed:
            self.q_norm, self.k_norm = Norm(), Norm()
        if packed:
            self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
            self.num_prefix_tokens = EXTRA
        else:
            self.q_proj, self.k_proj = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH, bias=False)
            self.v_proj, self.o_proj = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x, positions=None, mask=None):
        how, packed = self.how, "qkv" in self._modules
        qkv = self.qkv(x).chunk(3, -1) if packed else (self.q_proj(x), self.k_proj(x), self.v_proj(x))
        q, k, v = (t.unflatten(2, (HEADS, -1)).transpose(1, 2) for t in qkv)
        if how.normed:
            q, k = self.q_norm(q), self.k_norm(k)
        if positions is not None:
            first, second = positions.chunk(2, -1) if how.joined else positions
            cos, sin = (second, first) if how.sines_first else (first, second)
            extra = x.shape[1] - cos.shape[-2] if how.extra is None else how.extra
            q, k, v = (self._turned(t, cos, sin, extra) if i < 2 or how.values else t for i, t in enumerate((q, k, v)))
        elif not packed:
            raise TypeError("positions are needed")
        scores = q @ k.transpose(-2, -1) * COLUMNS**-0.5
        scores = scores if mask is None else scores + mask
        y = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        return self.proj(y) if packed else (self.o_proj(y), None)

    def _turned(self, x, cos, sin, extra):
        new = turned(x[:, :, extra:], cos, sin, self.how.interleaved, self.how.sign)
        return torch.cat([x[:, :, :extra], new.type_as(x)], 2)


class PackedBlock(PlainBlock):
    def __init__(self, **how):
        super().__init__()
        self.attn = Turning(Settings(**{"extra": EXTRA, **how}), packed=True)

    def forward(self, x, positions=None, mask=None):
        x = x + self.attn(self.norm1(x), positions=positions, mask=mask)
        return x + self.mlp(self.norm2(x))


class SeparateTurningBlock(SeparateBlock):
    def __init__(self, **how):
        super().__init__()
        self.attention = Turning(Settings(**how), packed=False)

    def forward(self, hidden_states, mask=None, positions=None):
        attended, _ = self.attention(self.layernorm_before(hidden_states), mask=mask, positions=positions)
        hidden_states = self.dropout(self.layer_scale1(attended)) + hidden_states
        inner = self.layer_scale2(self.mlp(self.layernorm_after(hidden_states)))
        return self.dropout(inner) + hidden_states


def block(cls, seed=0, **how):
    torch.manual_seed(seed)
    made = cls(**how).to(DEVICE).eval()
    with torch.no_grad():
        for p in made.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return made


def tokens(n=EXTRA + PATCHES, batch=2, **kwargs):
    return torch.randn(batch, n, WIDTH, generator=torch.Generator().manual_seed(1)).to(DEVICE, **kwargs)


def tables(*lead, how=None, n=PATCHES, seed=2, **kwargs):
    """What a block of these settings is called with: the angles of a pair are not those of another."""
    generator = torch.Generator().manual_seed(seed)
    angles = 3 * torch.randn(*lead, n, COLUMNS // 2, generator=generator)
    angles = angles.repeat_interleave(2, -1) if how and how.interleaved else torch.cat([angles, angles], -1)
    cos, sin = (t.to(DEVICE, **kwargs) for t in (angles.cos(), angles.sin()))
    pair = (sin, cos) if how and how.sines_first else (cos, sin)
    return torch.cat(pair, -1) if how and how.joined else pair


FORMS = [
    dict(zip(("joined", "sines_first", "interleaved"), flags, strict=True))
    for flags in itertools.product((True, False), repeat=3)
]
BLOCKS = {PackedBlock: ROTARY, SeparateTurningBlock: SEPARATE_ROTARY}
of_both = pytest.mark.parametrize("cls", BLOCKS, ids=["packed", "separate"])


@of_both
@pytest.mark.parametrize("form", FORMS, ids=lambda form: " ".join(k for k, v in form.items() if v) or "plain")
def test_every_form_is_found_out(cls, form, kernels):
    module = block(cls, **form)
    how, x = Settings(**form), tokens()
    want = module(x, positions=tables(how=how))
    (row,) = [row for row in accelerate(module).rows if not row.name]
    assert (row.became, row.reason) == ("attention and MLP", None)
    got = module(x, positions=tables(how=how))
    torch.testing.assert_close(got, want, **TIGHT)
    assert kernels == BLOCKS[cls] + MLP
    assert (got - module(x, positions=tables(how=how, seed=3))).abs().max() > 0.05


@of_both
@pytest.mark.parametrize("how", [{"sign": -1}, {"values": True}, {"extra": 0}, {"extra": EXTRA - 1}], ids=str)
def test_other_rotations_are_the_models(cls, how, kernels):
    """Turned the other way, values turned, extra tokens turned: none of it is what the kernel computes."""
    module = block(cls, **how)
    n = EXTRA + PATCHES - how.get("extra", EXTRA)
    x, positions = tokens(), tables(n=n)
    want = module(x, positions=positions)
    report = accelerate(module)
    torch.testing.assert_close(module(x, positions=positions), want, **TIGHT)
    assert kernels == ([] if cls is PackedBlock else MLP), report  # a call by itself with more than tokens


def test_norms_of_queries_and_keys(kernels):
    """Are called, in front of the rotation, whatever they compute; with hooks the model's own attention is."""
    module, x, calls = block(PackedBlock, normed=True), tokens(), []
    accelerate(module)
    ran = ["layernorm_linear", "rotate", *ROTARY[1:]]
    for positions, runs in ((tables(), ran), (None, [name for name in ran if name != "rotate"])):
        kernels.clear()
        torch.testing.assert_close(module(x, positions), original(module)(x, positions), **TIGHT)
        assert kernels == runs + MLP
    with torch.no_grad():
        before = module(x, tables())
        module.attn.k_norm.weight.mul_(-2)
        assert (module(x, tables()) - before).abs().max() > 0.05
    torch.testing.assert_close(module(x, tables()), original(module)(x, tables()), **TIGHT)
    module.attn.q_norm.register_forward_hook(lambda *a: calls.append(1))
    kernels.clear()
    module(x, tables())
    assert calls == [1] and kernels == MLP


def test_norms_of_three_projections(kernels):
    timm = pytest.importorskip("timm")
    sizes = {"img_size": 56, "depth": 1, "embed_dim": 64, "num_heads": 2}
    model = timm.create_model("eva02_base_patch14_224", **sizes, qk_norm=True).to(DEVICE).eval()
    twin, im = copy.deepcopy(model), torch.randn(1, 3, 56, 56, device=DEVICE)
    accelerate(model)
    with torch.no_grad():
        torch.testing.assert_close(model(im), twin(im), **TIGHT)
    assert kernels == SEPARATE_ROTARY


@of_both
def test_tables_by_image_and_head(cls, kernels):
    """As frequencies of timm's that are learned by head, and grids of images from which patches were dropped."""
    module, x = block(cls), tokens()
    accelerate(module)
    for lead in ((HEADS,), (1, HEADS), (2, 1), (2, HEADS)):
        positions = tables(*lead)
        torch.testing.assert_close(module(x, positions=positions), original(module)(x, positions=positions), **TIGHT)
    assert kernels == 4 * (BLOCKS[cls] + MLP)


def test_calls_of_other_kinds(kernels):
    """Without positions the block computes what it did; with ones that do not fit, its own forward says so."""
    module, x, positions = block(PackedBlock), tokens(), tables()
    twin = copy.deepcopy(module)
    accelerate(module)
    torch.testing.assert_close(module(x), twin(x), **TIGHT)
    assert kernels == ["layernorm_linear", "attention", "linear", *MLP]
    kernels.clear()
    wide = tuple(t.double() for t in positions)
    mask = torch.randn(x.shape[1], x.shape[1], device=DEVICE)
    for kwargs in ({"positions": positions, "mask": mask}, {"mask": mask}):
        torch.testing.assert_close(module(x, **kwargs), twin(x, **kwargs), **TIGHT)
        assert "such as " in str(why_not(module))
    torch.testing.assert_close(module(x, wide), twin(x, wide), **TIGHT)
    assert "positions of another type or on another device" in str(why_not(module))
    assert kernels == 3 * MLP
    with pytest.raises(RuntimeError) as theirs:
        twin(tokens(9), positions)
    with pytest.raises(RuntimeError) as ours:
        module(tokens(9), positions)
    assert str(ours.value) == str(theirs.value)
    assert "positions of (6, 16) for 9 tokens" in str(why_not(module))
    kernels.clear()
    torch.testing.assert_close(module(x, positions), twin(x, positions), **TIGHT)
    assert why_not(module) == {} and kernels == ROTARY + MLP
    accelerate(module, strict=True)
    module(x, positions)
    with pytest.raises(AccelerationError, match="attention: arguments besides the tokens, such as positions, mask"):
        module(x, positions, mask)


def test_blocks_that_use_positions_themselves_are_left_alone(kernels):
    class Greedy(SeparateTurningBlock):
        def forward(self, hidden_states, mask=None, positions=None):
            return super().forward(hidden_states, mask, positions) + (0 if isinstance(positions, tuple) else 1)

    module = block(Greedy)
    with pytest.warns(UserWarning, match="nothing in"):
        (row,) = accelerate(module).rows
    assert row.reason == "it does more with its positions than hand them on"


def test_any_number_of_extra_tokens_where_the_layer_names_none(kernels):
    module, positions = block(SeparateTurningBlock), tables()
    accelerate(module)
    for n in (PATCHES, PATCHES + 1, PATCHES + 5):
        x = tokens(n)
        torch.testing.assert_close(module(x, positions=positions), original(module)(x, positions=positions), **TIGHT)
    assert kernels == 3 * (SEPARATE_ROTARY + MLP)
    with pytest.raises(TypeError, match="positions are needed"):
        module(x)


@of_both
def test_half_a_block_as_one_operator(cls):
    """Without gradients it is repeated from notes: for other tokens, and tables that change."""
    before = {formula: len(repeated.programs) for formula, repeated in ops._COMPOSED.items()}
    for joined in (False, True):
        module = block(cls, joined=joined)
        how, twin = module.get_submodule("attn" if cls is PackedBlock else "attention").how, copy.deepcopy(module)
        accelerate(module, strict=True)
        with torch.no_grad():
            for i in range(3):
                x, positions = tokens() + i, tables(how=how, seed=i)
                for _ in range(2):
                    torch.testing.assert_close(module(x, positions=positions), twin(x, positions=positions), **TIGHT)
                    (positions if joined else positions[1]).mul_(-0.5)
    new = {formula.__name__ for formula, r in ops._COMPOSED.items() if len(r.programs) > before.get(formula, 0)}
    assert ("_rotary_half" if cls is PackedBlock else "_separate_attention_half") in new


@of_both
def test_gradients(cls, kernels):
    """Of all parameters, the tokens and learned tables."""
    module, grads = block(cls).train(), []
    accelerate(module)
    for m in (module, original(module)):
        x, positions = tokens().requires_grad_(), tuple(t.requires_grad_() for t in tables())
        (m(x, positions=positions) * tokens(batch=2)).sum().backward()
        grads.append({"x": x.grad, "cos": positions[0].grad, **{n: p.grad for n, p in m.named_parameters()}})
    assert kernels[: len(BLOCKS[cls])] == BLOCKS[cls]
    for name, want in grads[1].items():
        torch.testing.assert_close(grads[0][name], want, atol=1e-4, rtol=1e-3, msg=name)
        assert want.abs().max() > 0.01


@of_both
def test_hooks_and_adapters_are_honoured(cls, kernels):
    first = "attn.qkv" if cls is PackedBlock else "attention.k_proj"

    class Adapter(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base, self.a = base, nn.Parameter(torch.randn(WIDTH, base.out_features, device=DEVICE))

        weight, bias = property(lambda self: self.base.weight), property(lambda self: self.base.bias)

        def forward(self, x):
            return self.base(x) + x @ self.a

    class Quantised(nn.Linear):
        def __init__(self, linear):
            super().__init__(*linear.weight.T.shape, linear.bias is not None, device=DEVICE)
            self.load_state_dict(linear.state_dict())

        def forward(self, x):
            return nn.functional.linear(x, (8 * self.weight).round() / 8, self.bias)

    x, positions, calls = tokens(), tables(), []
    for change, differs in (
        (lambda m: m.get_submodule(first).register_forward_hook(lambda *a: calls.append(1)), False),
        (lambda m: nn.utils.parametrizations.weight_norm(m.get_submodule(first)), False),
        (lambda m: replace(m, first, Adapter), True),
        (lambda m: replace(m, first, Quantised), True),
    ):
        module = block(cls)
        accelerate(module)
        plain = module(x, positions=positions)
        kernels.clear()
        change(module)
        got = module(x, positions=positions)
        assert kernels == MLP and first in str(why_not(module))
        torch.testing.assert_close(got, original(module)(x, positions=positions), **TIGHT)
        assert not differs or (got - plain).abs().max() > 0.02
    assert len(calls) == 2  # of the accelerated block, and of its original


# ---------------------------------------------------------------------------------------------------------------------
# The libraries themselves


def model_of(name, library):
    return next(kind for kind in SUPPORTED if kind.name == name and kind.library == library).build()


@pytest.mark.parametrize(("library", "ran"), [("timm", ROTARY), ("transformers", SEPARATE_ROTARY)])
def test_grids_that_are_no_squares(library, ran, kernels):
    """Rows are not taken for columns: an image and its transpose differ, each as in the library."""
    pytest.importorskip(library)
    model, _ = model_of("DINOv3", library)
    model = model.to(DEVICE)
    twin, im = copy.deepcopy(model), torch.randn(1, 3, 32, 64, device=DEVICE)
    accelerate(model)
    with torch.no_grad():
        for x in (im, im.transpose(2, 3).contiguous()):
            kernels.clear()
            ours, theirs = ((out if isinstance(out, torch.Tensor) else out[0]) for out in (model(x), twin(x)))
            torch.testing.assert_close(ours, theirs, **TIGHT)
            assert kernels == 2 * (ran + MLP)


def test_biases_of_their_own_are_followed(kernels):
    """EVA-02's attention holds those of q, k and v itself: no copy of them is kept."""
    pytest.importorskip("timm")
    model, im = model_of("DINOv3 with biases of q, k, v", "timm")
    model, im = model.to(DEVICE), im.to(DEVICE)
    accelerate(model)
    attention = model.blocks[0].attn
    with torch.no_grad():
        before = model(im)
        for name in ("q_bias", "k_bias", "v_bias"):
            getattr(attention, name).add_(torch.randn(64, device=DEVICE))
            after = model(im)
            torch.testing.assert_close(after, original(model)(im), **TIGHT)
            assert name == "k_bias" or (after - before).abs().max() > 1e-3
            before = after
    assert kernels == 8 * (ROTARY + MLP)


@pytest.mark.parametrize("library", ["timm", "transformers"])
def test_training_and_compiling(library, kernels):
    pytest.importorskip(library)
    model, im = model_of("DINOv3", library)
    model, im, grads = model.to(DEVICE), im.to(DEVICE), []
    accelerate(model)
    for m in (model, original(model)):
        out = m(im)
        (out if isinstance(out, torch.Tensor) else out[0]).square().mean().backward()
        grads.append({n: p.grad for n, p in m.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys() and len(grads[0]) > 20 and "rotate" in kernels
    for name, want in grads[1].items():
        torch.testing.assert_close(grads[0][name], want, atol=1e-4, rtol=1e-3, msg=name)
    with torch.no_grad():
        want = original(model)(im)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(im)
    ours, theirs = ((out if isinstance(out, torch.Tensor) else out[0]) for out in (compiled, want))
    torch.testing.assert_close(ours, theirs, **TIGHT)
    assert restore(model) > 0
