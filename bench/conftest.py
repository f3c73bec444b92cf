"""Options and order of `pytest bench`, and the session's harness.

pytest bench                                   the core sweep, timed      -k patch8, -k "attention and B-patch16" ...
pytest bench --sweep full                      every model, patch size, resolution and batch
pytest bench --benchmark-disable               smoke test: every provider once on tiny inputs, checked, not timed
pytest bench --results DIR                     also keeps the rows in DIR/<device>_<torch>_<triton>_<dtype>.json
"""

import gc
import os
import time
from pathlib import Path

import pytest
import torch

from bench import machine, results, shapes, timing
from bench.harness import Harness

# Most telling first: a run that is cut short has these.
ORDER = (
    "bench_model", "bench_waterfall", "bench_attention", "bench_attention_backward", "bench_layernorm_mlp",
    "bench_mask_head", "bench_masks_to_labels", "bench_noise_to_labels", "bench_peers", "bench_eomt", "bench_loss",
    "bench_train_step", "bench_attention_half_backward", "bench_layernorm_mlp_backward", "bench_linear_backward",
    "bench_layernorm_backward", "bench_mask_head_backward", "bench_pixels_to_tokens_backward",
    "bench_layernorm_mlp_scaled", "bench_rotate", "bench_queries_to_labels",
    "bench_maps_statistics", "bench_maps_transposed", "bench_maps_rows",
)  # fmt: skip


def pytest_addoption(parser):
    group = parser.getgroup("segmenter's benchmark")
    group.addoption("--sweep", choices=shapes.SWEEPS, help="default: core; smoke with --benchmark-disable")
    group.addoption("--dtype", choices=machine.DTYPES, help="default: bf16 on a GPU, fp32 on a CPU")
    group.addoption("--device", choices=("cuda", "cpu"), help="default: a GPU if there is one")
    group.addoption("--results", type=Path, metavar="DIR", help="folder of the results file")
    group.addoption("--missing", action="store_true", help="only rows that the results file does not hold yet")
    group.addoption("--row-seconds", type=float, default=1.0, help="what the rounds of one row should take")
    group.addoption("--deadline", type=float, default=float("inf"), help="Unix time after which no row starts")
    group.addoption("--failed", nargs="+", default=(), metavar="OPERATION", help="that the kernels are not timed in")
    group.addoption("--camvid", type=Path, metavar="DIR", help="CamVid (images/test, annotations/test), for mIoU")


def pytest_configure(config):
    config.pluginmanager.unregister(name="faulthandler")  # its time limit is for tests; crashes are still reported
    smoke = config.option.benchmark_disable
    device = torch.device(config.option.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if smoke and device.type == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton: there kernels can only be interpreted
    from torch._inductor import config as inductor  # imports Triton

    from tests.support.quick_interpreter import quicken

    if os.environ.get("TRITON_INTERPRET") == "1":
        quicken()
    inductor.force_disable_caches = True  # or compile times would be those of an earlier run
    config.option.device = device
    config.option.sweep = config.option.sweep or ("smoke" if smoke else "core")
    config.option.dtype = machine.DTYPES[config.option.dtype or ("bf16" if device.type == "cuda" else "fp32")]


def pytest_generate_tests(metafunc):
    if "shape" not in metafunc.fixturenames:
        return
    option = metafunc.config.option
    name, of_sweep = metafunc.definition.originalname, (option.sweep, option.device.type == "cuda")
    chosen = shapes.training(*of_sweep) if name == "bench_train_step" else shapes.sweep(*of_sweep)
    if name == "bench_loss":
        chosen = [shape for shape in chosen if shapes.trainable(shape, of_sweep[1])]
    metafunc.parametrize("shape", chosen, ids=[shape.id for shape in chosen])


def pytest_collection_modifyitems(config, items):
    """The core sweep before the rest; then by ORDER; what takes long to compile after its neighbours."""
    core = shapes.sweep("core", config.option.device.type == "cuda")

    def rank(item):
        params = item.callspec.params if hasattr(item, "callspec") else {}
        order = ORDER.index(item.originalname) if item.originalname in ORDER else len(ORDER)
        compiled = params.get("provider") == "compile"
        whole = item.originalname in ("bench_model", "bench_train_step")  # a minute to compile
        return (params.get("shape", core[0]) not in core, compiled and whole, order, compiled)

    items[:] = sorted((item for item in items if item.path.parent.name == "bench"), key=rank)
    for item in items:
        item.add_marker(pytest.mark.benchmark(timer=timing.CLOCK))
        item.add_marker(pytest.mark.timeout(0))  # rows take what they take


@pytest.fixture(scope="session")
def harness(request):
    option = request.config.option
    gc.freeze()  # what imports made stays, so the collection before each row need not look at it
    path = option.results and option.results / machine.results_name(option.device, option.dtype)
    try:
        file = path and results.ResultsFile(path, machine.facts(option.device))
    except results.ResultsError as error:
        pytest.exit(str(error), returncode=4)
    known = file.names() if file is not None and option.missing else frozenset()
    limits = option.row_seconds, option.deadline
    return Harness(option.device, option.dtype, option.benchmark_disable, file, *limits, known, option.failed)


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info.pop("node", None)  # the host's name is nobody's business
    machine_info.update(machine.facts(config.option.device))


def pytest_benchmark_update_commit_info(config, commit_info):
    commit_info.clear()  # the commit stands in machine_info


def pytest_report_header(config):
    option = config.option
    ends = "" if option.deadline == float("inf") else time.strftime(", until %H:%M:%S", time.localtime(option.deadline))
    what = f"{machine.device_name(option.device)}, {machine.SHORT[option.dtype]}, {option.sweep} sweep"
    return f"segmenter bench: {what}{ends}"
