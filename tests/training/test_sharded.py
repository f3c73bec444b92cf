"""Steps with weights split by FSDP2, and steps as one graph of torch.compile: the gradients of the plain step."""

import re
from collections import Counter

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

pytest.importorskip("triton")

from segmenter import create_segmenter, guard, layers
from segmenter.training.distributed import shard
from segmenter.weights.load import from_pretrained
from tests.support.processes import torchrun
from tests.support.sharded_step import data, distance, make, mean_loss_of, sharded_distance

WAYS = [("eager", 1), ("triton", 1), *(pytest.param("triton", level, marks=pytest.mark.more) for level in (0, 2, 3))]
BATCH_NORM = {"name": "linear", "batch_norm": True}
BACKWARD = {"attention_backward", "layernorm_linear_backward", "layernorm_mlp_backward", "mask_head_backward"}


@pytest.fixture
def one_process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize(("impl", "level"), WAYS)
def test_one_process_has_the_plain_gradients(impl, level, one_process, monkeypatch):
    """Bit for bit; and fused operators run within the blocks, whose weights are ordinary tensors there."""
    halves, fused = [], layers.fused_mlp
    monkeypatch.setattr(layers, "fused_mlp", lambda *args: halves.append(args[1].weight) or fused(*args))
    assert sharded_distance(impl, level) == 0
    assert len(halves) >= 2 * 3 and all(type(weight) is torch.nn.Parameter for weight in halves)


@pytest.mark.parametrize("changes", [{"pos_embed": "patches"}, {"pos_embed": "rotary", "decoder": BATCH_NORM}])
def test_encoders_of_other_projects(changes, one_process):
    """LayerScale, registers and rotary positions; batch norm too."""
    assert sharded_distance("triton", 1, layer_scale=True, n_registers=2, **changes) == 0


def test_saved_once_its_weights_are_gathered(one_process, tmp_path):
    plain, model = make("eager", 1), shard(make("eager", 1), mesh=dist.init_device_mesh("cpu", (1,)))
    with pytest.raises(ValueError, match="cls_token is split among processes"):
        model.save_pretrained(tmp_path)
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    whole = create_segmenter(model.config)
    whole.load_state_dict(state)
    whole.save_pretrained(tmp_path)
    for name, tensor in from_pretrained(tmp_path).state_dict().items():
        assert torch.equal(tensor, plain.state_dict()[name]), name


@pytest.mark.more
@pytest.mark.parametrize(("impl", "level"), [("eager", 1), ("triton", 2)])
def test_two_processes_have_them(impl, level):
    printed = torchrun("-m", "tests.support.sharded_step", impl, str(level))
    found = {rank: float(value) for value, rank in re.findall(r"distance (\S+) of (\d)", printed)}
    assert found.keys() == {"0", "1"} and max(found.values()) < 1e-5


# ---------------------------------------------------------------------------------------------------------------------
# torch.compile


def captured(graphs):
    """A backend that runs the graphs as they are, and notes our operators in them."""
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    def note(module, inputs):
        targets = [str(node.target) for node in module.graph.nodes if node.op == "call_function"]
        graphs.append(Counter(name.split(".")[1] for name in targets if name.startswith("segmenter.")))
        return make_boxed_func(module.forward)

    return aot_autograd(fw_compiler=note, bw_compiler=note)


@pytest.mark.more
@pytest.mark.parametrize("whole", [False, True], ids=["model and loss", "backward too"])
@pytest.mark.parametrize(("impl", "level"), [("eager", 1), ("triton", 1), ("triton", 3)])
def test_one_graph_has_the_plain_gradients(impl, level, whole):
    """No graph break in model and loss, nor where PyTorch can trace it in the backward pass; kernels are in it."""
    plain, model, graphs = make(impl, level), make(impl, level), []
    images, labels = data(plain.n_cls)
    expected = mean_loss_of(plain, impl)(images, labels)
    expected.backward()
    mean_loss = mean_loss_of(model, impl)

    def step(images, labels):
        loss = mean_loss(images, labels)
        if whole:
            loss.backward()
        return loss.detach() if whole else loss

    if whole and not hasattr(torch._dynamo.config, "trace_autograd_ops"):
        pytest.skip("this PyTorch cannot trace backward()")
    torch._dynamo.reset()
    with torch._dynamo.config.patch(**({"trace_autograd_ops": True} if whole else {})):
        loss = torch.compile(step, backend=captured(graphs), fullgraph=True)(images, labels)
    if not whole:
        loss.backward()
    torch.testing.assert_close(loss, expected)
    assert distance(model, plain) < 1e-4
    assert len(graphs) == (1 if whole else 2)
    operators = sum(graphs, Counter())
    assert operators.keys() >= BACKWARD if impl == "triton" else not operators
    if impl == "triton":
        assert operators["attention_half"] == (6 if level == 3 else 3) and operators["upsample_cross_entropy"] == 1


@pytest.mark.more
@pytest.mark.parametrize("changes", [{"pos_embed": "patches"}, {"pos_embed": "rotary", "decoder": BATCH_NORM}])
def test_one_graph_of_encoders_of_other_projects(changes):
    changes = {"layer_scale": True, "n_registers": 2, **changes}
    plain, model = (make("triton", 1, **changes) for _ in range(2))
    images, labels = data(plain.n_cls)
    expected = mean_loss_of(plain, "triton")(images, labels)
    expected.backward()
    torch._dynamo.reset()
    loss = torch.compile(mean_loss_of(model, "triton"), backend="aot_eager", fullgraph=True)(images, labels)
    loss.backward()
    torch.testing.assert_close(loss, expected)
    assert distance(model, plain) < 1e-4


@pytest.mark.more
def test_one_graph_for_sizes_that_vary(monkeypatch):
    """Also as the first thing that a process does with a model: tracing starts again, and has to find what it found."""
    for cls in [cls for cls in guard.METHODS if cls.__module__.startswith("segmenter.")]:
        monkeypatch.delitem(guard.METHODS, cls)
    plain, model = make("triton", 1), make("triton", 1)
    torch._dynamo.reset()
    compiled = torch.compile(mean_loss_of(model, "triton"), backend="aot_eager", fullgraph=True, dynamic=True)
    for height, width in ((32, 48), (37, 29)):
        images, labels = torch.randn(2, 3, height, width), torch.randint(0, plain.n_cls, (2, height, width))
        model.zero_grad(), plain.zero_grad()
        loss, expected = compiled(images, labels), mean_loss_of(plain, "triton")(images, labels)
        loss.backward(), expected.backward()
        torch.testing.assert_close(loss, expected)
        assert distance(model, plain) < 1e-4
