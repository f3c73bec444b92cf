"""The encoder on bytes: equal to the path of normalised images, and nothing stale is ever taken from the cache."""

import copy
import pickle
import threading

import pytest
import torch

pytest.importorskip("triton")

from segmenter import create_segmenter, ops
from segmenter.cache import Cache
from segmenter.inference.images import NORMALIZATION, normalize
from segmenter.kernels import launch, reference
from segmenter.layers import pad_to_multiple
from segmenter.model import Segmenter
from tests.support.parity import DEVICE, assert_bitwise_equal
from tests.support.tiny import tiny_config, tiny_model

VIT = NORMALIZATION["vit"]
# Patch rows beyond the image are zeros, whose norm the interpreter divides by in the mask head; they are not stored.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def images(B=2, H=40, W=56):
    return torch.randint(0, 256, (B, H, W, 3), generator=torch.Generator().manual_seed(0)).byte()


def floats(pixels, stats="vit"):
    return pad_to_multiple(torch.stack([normalize(p.numpy(), stats) for p in pixels]), 16)


def fast(model):
    """The same model on the kernels."""
    if not ops._interpreting() and DEVICE == "cpu":
        pytest.skip("needs a GPU or Triton's interpreter")
    twin = create_segmenter(model.config, impl="triton").eval()
    twin.load_state_dict(model.state_dict())
    return twin.to(DEVICE)


def tokens(model, pixels):
    return model.encoder.embed_pixels(pixels.to(next(model.parameters()).device), *VIT)


@pytest.mark.parametrize("distilled", [False, True])
@pytest.mark.parametrize("check", ["tokens", "grid"])
def test_kernels_equal_the_float_path(distilled, check):
    overrides = {"distilled": distilled, "normalization": "deit" if distilled else "vit", "pos_embed_check": check}
    model, pixels = tiny_model(**overrides), images()
    want = model.double().masks(floats(pixels, model.info.normalization).double())
    model.float()
    with torch.inference_mode():
        assert_bitwise_equal(model.masks_of_pixels(pixels), model.masks(floats(pixels, model.info.normalization)))
        got = fast(model).masks_of_pixels(pixels.to(DEVICE))
        torch.testing.assert_close(got.cpu().double(), want, atol=1e-3, rtol=1e-3)
        for shape in ((1, 64, 64), (1, 16, 256), (1, 1, 1)):  # the model's grid; as many tokens; one padded patch
            a, b = (tokens(m, images(*shape)).cpu() for m in (model, fast(model)))
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_half_precision_and_autocast():
    model, pixels = tiny_model(), images()
    exact = model.encoder.double().embed(floats(pixels).double())
    quick = fast(model.float())
    with torch.inference_mode():
        with torch.autocast(DEVICE, torch.bfloat16):
            low = tokens(quick, pixels)
        assert low.dtype == torch.float32 and 1e-4 < (low.cpu() - exact).norm() / exact.norm() < 4e-3
        torch.testing.assert_close(tokens(quick, pixels).cpu().double(), exact, atol=1e-4, rtol=1e-4)
        low = tokens(quick.to(torch.bfloat16), pixels)
        assert low.dtype == torch.bfloat16 and (low.cpu() - exact).norm() / exact.norm() < 1e-2


def test_wrong_images_are_refused(model):
    for pixels in (torch.zeros(1, 8, 8, 3), torch.zeros(1, 8, 8, 3, dtype=torch.int64)):
        for function in (model.masks_of_pixels, lambda x: model.encoder.embed_pixels(x, *VIT)):
            with pytest.raises(TypeError, match="for normalised images use"):
                function(pixels)
    with pytest.raises(TypeError, match="got list"):
        model.masks_of_pixels([1])
    for shape in ((8, 8, 3), (1, 3, 8, 8), (1, 0, 8, 3)):
        with pytest.raises(ValueError, match=r"pixels must be \(B, H, W, 3\)"):
            model.masks_of_pixels(torch.zeros(shape, dtype=torch.uint8))


@pytest.mark.parametrize("what", ["hook", "adapted", "convolution"])
def test_a_patch_embedding_that_does_more_is_called(what):
    model, pixels = tiny_model(), images()
    quick = fast(model)
    embed = quick.encoder.patch_embed
    if what == "hook":
        embed.proj.register_forward_hook(lambda module, args, out: out + 1)
    elif what == "adapted":
        embed.proj = torch.nn.Sequential(embed.proj, torch.nn.Identity())
    else:
        embed.proj = torch.nn.Conv2d(3, 64, 16, 16, padding_mode="zeros", dilation=1, padding=(0, 0), groups=1)
        embed.proj.padding = "valid"
    assert quick.encoder.why_not_bytes() is not None
    assert ops.parts(quick)["pixels_to_tokens"].startswith("layer by layer (")
    with torch.inference_mode():
        want = quick.encoder.embed(floats(pixels).to(DEVICE))
        assert_bitwise_equal(tokens(quick, pixels), want)


def test_encoders_with_hooks_and_foreign_ones_are_called(model):
    pixels, calls = images(), []
    want = model.masks(floats(pixels))
    handle = model.encoder.register_forward_hook(lambda *a: calls.append(1))
    assert_bitwise_equal(model.masks_of_pixels(pixels), want)
    assert calls == [1]
    handle.remove()
    encoder = model.encoder

    class Foreign(torch.nn.Module):
        patch_size, distilled = 16, False

        def forward(self, im, return_features):
            return encoder(im, return_features)

    model.encoder = Foreign()
    assert_bitwise_equal(model.masks_of_pixels(pixels), want)


def test_gradients_reach_all_parameters_of_the_embedding():
    model, pixels = tiny_model(distilled=True), images()
    names = ("cls_token", "dist_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias")
    grads = []
    for m, out in ((model, lambda e: e.embed(floats(pixels))), (q := fast(model), lambda e: tokens(q, pixels))):
        parameters = dict(m.encoder.named_parameters())
        result = out(m.encoder)
        grads.append(torch.autograd.grad(result.square().sum(), [parameters[name] for name in names]))
        assert len(m.encoder.cache) == 0
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b.cpu(), rtol=1e-3, atol=1e-3 * a.abs().max().item())


def test_compiles_into_one_graph():
    quick, pixels = fast(tiny_model()), images().to(DEVICE)
    compiled = torch.compile(lambda x: quick.encoder.embed_pixels(x, *VIT), backend="aot_eager", fullgraph=True)
    with torch.inference_mode():
        torch.testing.assert_close(compiled(pixels), tokens(quick, pixels))


# ---------------------------------------------------------------------------------------------------------------------
# What is cached


def changed_in_place(model):
    with torch.no_grad():
        for parameter in model.encoder.parameters():
            parameter.mul_(1.5)


def changed_under_inference(model):
    with torch.inference_mode():
        model.encoder.pos_embed.add_(1)
        model.encoder.patch_embed.proj.weight.mul_(-1)


def loaded(model):
    model.load_state_dict(tiny_model(seed=5).state_dict())


def assigned(model):
    state = {k: v.clone() for k, v in tiny_model(seed=5).state_dict().items()}
    model.load_state_dict(state, assign=True)


def half_and_back(model):
    model.to(torch.bfloat16).float()


def replaced_data(model):
    for parameter in (model.encoder.pos_embed, model.encoder.patch_embed.proj.weight):
        parameter.data = parameter.data * 1.01


def other_bias(model):
    with torch.no_grad():
        model.encoder.patch_embed.proj.bias.add_(1)


def other_parameter(model):
    weight = model.encoder.patch_embed.proj.weight
    model.encoder.patch_embed.proj.weight = torch.nn.Parameter(weight.detach().flip(0))


def fused_optimizer(model):
    """Its kernel does not count its writes in `_version`."""
    parameters = [model.encoder.pos_embed, model.encoder.patch_embed.proj.weight]
    optimizer = torch.optim.AdamW(parameters, lr=0.1, fused=True)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def cleared(model):
    model.encoder.pos_embed.data.mul_(2)  # which nobody can see
    model.encoder.cache.clear()


CHANGES = [changed_in_place, changed_under_inference, loaded, assigned, half_and_back, replaced_data, other_bias,
           other_parameter, fused_optimizer, cleared]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_nothing_stale_is_taken_from_the_cache(change):
    """After every way to change weights, both paths compute what a model without a cache computes."""
    model, pixels = fast(tiny_model()), images(1, 24, 40)
    im = floats(pixels).to(DEVICE)
    with torch.inference_mode():
        before = tokens(model, pixels), model.encoder.embed(im)
        assert len(model.encoder.cache) == 2
        tokens(model, pixels)
    change(model)
    with torch.inference_mode():
        after = tokens(model, pixels), model.encoder.embed(im)
        fresh = create_segmenter(model.config, impl="triton").eval().to(DEVICE)
        fresh.load_state_dict(model.state_dict())
        assert_bitwise_equal(after[0], tokens(fresh, pixels))
        assert_bitwise_equal(after[1], fresh.encoder.embed(im))
    assert not torch.equal(after[0], before[0]) or change is half_and_back


def test_what_is_cached_is_used(monkeypatch):
    model, pixels = fast(tiny_model()), images(1, 24, 40)
    made, fold = [], reference.fold_normalization
    monkeypatch.setattr(reference, "fold_normalization", lambda *args: made.append(args[5]) or fold(*args))
    with torch.inference_mode():
        first = tokens(model, pixels)
        assert_bitwise_equal(tokens(model, pixels), first)
        positions = model.encoder.positions((2, 3))
        assert model.encoder.positions((2, 3)) is positions and not positions.is_inference()
        tokens(model, images(1, 40, 24))  # padded alike
        assert made == [(8, 8)]
        tokens(model, images(1, 41, 24))
        with torch.autocast(DEVICE, torch.bfloat16):
            tokens(model, pixels)
        assert made == [(8, 8), (9, 8), (8, 8)]
    with torch.no_grad():
        assert_bitwise_equal(tokens(model, pixels), first)
    assert len(made) == 3
    tokens(model, pixels)  # gradients are recorded
    model.encoder.train()
    with torch.no_grad():
        tokens(model, pixels)
        assert len(made) == 5 and len(model.encoder.cache) == 0


def test_copies_and_files_hold_an_empty_cache():
    model, pixels = fast(tiny_model()), images(1, 24, 40)
    names = set(model.state_dict())
    with torch.inference_mode():
        want = tokens(model, pixels)
        for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model.encoder.cache))):
            cache = again if isinstance(again, Cache) else again.encoder.cache
            assert len(cache) == 0 and cache.limit == 16 and cache is not model.encoder.cache
        twin = copy.deepcopy(model)
        twin.encoder.pos_embed.mul_(2)
        assert not torch.equal(tokens(twin, pixels), want)
        assert_bitwise_equal(tokens(model, pixels), want)
    assert set(model.state_dict()) == names == set(twin.state_dict())


def test_least_recently_used_goes_first():
    cache, weight, made = Cache(limit=3), torch.nn.Parameter(torch.ones(2)), []
    with torch.no_grad():
        for key in (1, 2, 3, 1, 4, 1, 2):
            cache(key, (weight,), lambda key=key: made.append(key) or weight * key)
    assert made == [1, 2, 3, 4, 2] and len(cache) == 3


def test_old_weights_are_not_kept():
    cache = Cache()
    with torch.no_grad():
        weights = [torch.nn.Parameter(torch.ones(2)) for _ in range(3)]
        for i in (0, 1):
            cache(i, (weights[i],), lambda i=i: weights[i] * 2)
        assert len(cache) == 2
        weights[0].add_(1)
        weights[1] = weights[2]
        cache(2, (weights[2],), lambda: weights[2] * 2)
    assert len(cache) == 1


def test_where_nothing_is_cached():
    def value(cache, parameter):
        return cache("key", (parameter,), lambda: parameter * 2)

    cache = Cache()
    with torch.inference_mode():
        value(cache, torch.nn.Parameter(torch.ones(2)))  # made here: no version
    with torch.no_grad():
        weight = torch.nn.Parameter(torch.ones(2))
        weight.grad = torch.ones(2)  # a step is near
        value(cache, weight)
        torch.func.vmap(lambda w: value(cache, w))(torch.ones(3, 2))
        with torch.autograd.forward_ad.dual_level():
            value(cache, torch.autograd.forward_ad.make_dual(torch.ones(2), torch.ones(2)))
        with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
            value(cache, torch.nn.Parameter(torch.ones(2)))
    assert len(cache) == 0
    leaf = torch.nn.Parameter(torch.ones(2))
    with torch.no_grad():
        value(cache, leaf)
    assert len(cache) == 1
    assert value(cache, leaf).requires_grad and len(cache) == 0


def test_threads_may_ask_at_once():
    cache, weights = Cache(limit=2), [torch.nn.Parameter(torch.full((4,), float(i))) for i in range(4)]
    wrong = []

    def ask():
        with torch.no_grad():
            for n in range(200):
                i = n % 4
                if not torch.equal(cache(i % 3, (weights[i],), lambda i=i: weights[i] + 1), weights[i] + 1):
                    wrong.append(i)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and len(cache) <= 2


def test_eager_models_cache_positions_only(monkeypatch):
    model = tiny_model()
    monkeypatch.setattr(launch.Plan, "run", lambda *args: pytest.fail("launched"))
    with torch.inference_mode():
        tokens(model, images())
    assert len(model.encoder.cache) == 1
    assert create_segmenter(tiny_config(), impl="eager").encoder.ops.name == "eager"


@pytest.mark.parametrize("way", ["subclass", "instance"])
def test_masks_of_ones_own_are_those_of_pixels(way):
    """Whoever replaces `masks` means labels, too."""

    class Doubled(Segmenter):
        def masks(self, im):
            return 2 * super().masks(im)

    model, pixels = tiny_model().eval(), images(1)
    with torch.no_grad():
        want = 2 * model.masks_of_pixels(pixels)
        if way == "subclass":
            model.__class__ = Doubled
        else:
            masks = model.masks
            model.masks = lambda im: 2 * masks(im)
        torch.testing.assert_close(model.masks_of_pixels(pixels), want)
