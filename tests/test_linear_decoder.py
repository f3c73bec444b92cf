"""The linear decoder with batch norm: one product in evaluation, and never of statistics that have changed since."""

import copy

import pytest
import torch
import torch.nn as nn

from segmenter.config import ConfigError
from segmenter.data.datasets import open_dataset
from segmenter.decoder import DecoderLinear
from segmenter.export.program import trace
from segmenter.training.initial_model import starting_model
from segmenter.training.optimizer import averaged
from segmenter.training.recipe import Recipe, RecipeError
from segmenter.weights.load import from_pretrained, load_any
from segmenter.weights.read import CheckpointError
from tests.support.data_sets import make_data_set
from tests.support.tiny import tiny_config, tiny_model

D, CLASSES, SIZE = 48, 5, (48, 80)  # 15 patches
BATCH_NORM = {"name": "linear", "batch_norm": True}


def decoder(seed=0):
    """Every weight and statistic random, with means far from zero and deviations far from one."""
    module, generator = DecoderLinear(CLASSES, 16, D, batch_norm=True), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in (*module.parameters(), module.norm.running_mean):
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
        module.norm.running_var.copy_(torch.rand(D, generator=generator) * 9 + 0.01)
    return module.eval()


def tokens(seed=1, dtype=torch.float32):
    return (2 * torch.randn(2, 15, D, generator=torch.Generator().manual_seed(seed)) + 1).to(dtype)


def separate(module, x):
    """The definition: each column normalised, then a product."""
    y = module.norm(x.reshape(-1, D)).reshape(x.shape)
    return (y @ module.head.weight.T + module.head.bias).transpose(1, 2).reshape(2, CLASSES, 3, 5)


def assert_right(module, x=None):
    x = tokens() if x is None else x
    want = separate(copy.deepcopy(module).double(), x.double())
    torch.testing.assert_close(module(x, SIZE).double(), want, atol=1e-4, rtol=1e-4)


def test_one_product_in_evaluation():
    module = decoder()
    with torch.inference_mode():
        assert_right(module)
        assert module.why_not_folded() is None and len(module.cache) == 1
        assert module.folded()[0] is module.folded()[0], "computed once"


def test_statistics_of_the_batch_in_training():
    module, twin = decoder().train(), decoder().train()
    got, want = module(tokens(), SIZE), separate(twin, tokens())
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        torch.testing.assert_close(getattr(module.norm, name), getattr(twin.norm, name))
    mixed = decoder()
    mixed.norm.train()
    torch.testing.assert_close(mixed(tokens(), SIZE), want, atol=1e-4, rtol=1e-4)


def step(module):
    """Of training, with an optimiser that writes without counting versions where it can."""
    module.train()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    module(tokens(2), SIZE).square().mean().backward()
    optimizer.step()
    module.zero_grad(set_to_none=True)
    module.eval()


def only_statistics(module):
    module.norm.train()
    with torch.no_grad():
        module(tokens(3), SIZE)
    module.norm.eval()


CHANGES = {
    "a step of training": step,
    "statistics alone, by the norm's own mode": only_statistics,
    "weights in place": lambda module: module.head.weight.detach().mul_(-2),
    "a factor in place": lambda module: module.norm.weight.detach().add_(1),
    "statistics in place": lambda module: module.norm.running_var.mul_(3),
    "another mean": lambda module: module.norm.register_buffer("running_mean", torch.ones(D)),
    "weights read": lambda module: module.load_state_dict(decoder(7).state_dict()),
    "another epsilon": lambda module: setattr(module.norm, "eps", 1.0),
    "another type and back": lambda module: module.bfloat16().float(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_nothing_stale(change):
    module = decoder()
    with torch.no_grad():
        before = module(tokens(), SIZE)
        assert len(module.cache) == 1
    CHANGES[change](module)
    with torch.no_grad():
        assert_right(module)
        if change != "another type and back":
            assert (module(tokens(), SIZE) - before).abs().max() > 1e-3


def test_what_does_more_is_called():
    for name in ("norm", "head"):
        module, calls = decoder(), []
        getattr(module, name).register_forward_hook(lambda *args, calls=calls: calls.append(1))
        got = module(tokens(), SIZE)
        assert calls == [1] and module.why_not_folded() == "hooks"
        torch.testing.assert_close(got, decoder()(tokens(), SIZE), atol=1e-4, rtol=1e-4)
    module = decoder()
    module.norm = nn.BatchNorm1d(D, track_running_stats=False).eval()
    assert module.why_not_folded() == "statistics of the batch"
    torch.testing.assert_close(module(tokens(), SIZE), separate(module, tokens()), atol=1e-4, rtol=1e-4)
    plain = decoder()
    plain.norm = nn.BatchNorm1d(D, affine=False).eval()
    plain.norm.running_mean.fill_(0.7)
    assert_right(plain)
    synchronised = nn.SyncBatchNorm.convert_sync_batchnorm(decoder())
    assert type(synchronised.norm) is nn.SyncBatchNorm and synchronised.why_not_folded() is None
    torch.testing.assert_close(synchronised(tokens(), SIZE), decoder()(tokens(), SIZE))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types(dtype):
    """The rule of kernels: at most twice the error of the layers themselves, for columns of ordinary means."""
    module, x = decoder(), tokens(dtype=dtype)
    module.norm.running_mean.fill_(1.0)
    module.norm.running_var.fill_(4.0)
    exact = separate(copy.deepcopy(module).double(), x.double())
    module = module.to(dtype)
    with torch.no_grad():
        got, eager = (y.double() - exact for y in (module(x, SIZE), separate(module, x)))
    assert got.norm() <= 2 * eager.norm() + torch.finfo(dtype).eps * exact.norm()


def test_gradients_in_evaluation():
    grads = []
    for run in (lambda module, x: module(x, SIZE), separate):
        module, x = decoder(), tokens().requires_grad_()
        (run(module, x) * torch.arange(15.0).view(3, 5)).sum().backward()
        grads.append([x.grad, *(p.grad for p in module.parameters())])
        assert len(module.cache) == 0
    for got, want in zip(*grads, strict=True):
        torch.testing.assert_close(got, want, atol=1e-3, rtol=1e-4)


def random_model(seed=0):
    model = tiny_model(seed, decoder=BATCH_NORM)
    model.decoder.norm.running_mean.normal_(generator=torch.Generator().manual_seed(seed))
    model.decoder.norm.running_var.uniform_(0.5, 4.0, generator=torch.Generator().manual_seed(seed))
    model.decoder.norm.num_batches_tracked.fill_(70_000)
    return model


@pytest.mark.parametrize(("dtype", "tolerance"), [(None, 0), (torch.float16, 5e-3), (torch.int8, 5e-2)])
def test_folders(dtype, tolerance, tmp_path):
    model, im = random_model(), torch.randn(1, 3, 48, 64, generator=torch.Generator().manual_seed(1))
    model.save_pretrained(tmp_path, dtype=dtype)
    again = from_pretrained(tmp_path)
    assert again.config == model.config and again.config.decoder == BATCH_NORM
    assert again.decoder.norm.num_batches_tracked == 70_000
    with torch.inference_mode():
        want, got = model.masks(im), again.masks(im)
    assert (got - want).abs().max() <= tolerance * want.abs().max()
    plain = tiny_model(decoder={"name": "linear"})
    plain.save_pretrained(tmp_path / "plain")
    with pytest.raises(CheckpointError, match="a linear decoder with batch norm was asked for, the file"):
        load_any(tmp_path / "plain", decoder=BATCH_NORM)


def test_exported():
    model = random_model()
    program = trace(model, "masks").module()
    pixels = torch.randint(0, 256, (1, 61, 50, 3), generator=torch.Generator().manual_seed(3)).byte()
    with torch.inference_mode():
        torch.testing.assert_close(program(pixels), model.masks_of_pixels(pixels), atol=1e-4, rtol=1e-4)


def test_an_average_of_weights_has_the_statistics():
    module = decoder().train()
    mean = averaged(module, 0.5)
    step(module)
    mean.update_parameters(module)
    assert torch.equal(mean.module.norm.running_mean, module.norm.running_mean)
    with torch.no_grad():
        assert_right(mean.module.eval())


def test_how_to_ask_for_it(tmp_path):
    assert tiny_config(decoder={"name": "linear"}).decoder == {"name": "linear"}
    with pytest.raises(ConfigError, match="batch_norm must be true or false, found 1"):
        tiny_config(decoder={"name": "linear", "batch_norm": 1})
    settings = {"data": "d", "crop_size": 64, "epochs": 1, "batch_size": 2, "learning_rate": 0.1, "n_layers": 1}
    settings |= {"decoder_batch_norm": True}
    dataset = open_dataset(make_data_set(tmp_path / "data", n=1))
    model = starting_model(Recipe(**settings, model="Seg-T/16").completed("folder"), dataset)
    assert model.config.decoder == BATCH_NORM and isinstance(model.decoder.norm, nn.BatchNorm1d)
    tiny_model(decoder={"name": "linear"}).save_pretrained(tmp_path / "plain")
    for name, more, message in (
        ("Seg-T-Mask/16", {}, "decoder_batch_norm is of a linear decoder, which this model has not"),
        (str(tmp_path / "plain"), {"decoder": "linear"}, "batch norm was asked for, the file .* new_decoder: true"),
    ):
        with pytest.raises((RecipeError, CheckpointError), match=message):
            starting_model(Recipe(**settings, model=name, **more).completed("folder"), dataset)
