"""An invented results file with every kind of row, for the tests of the report."""

import json

from bench.shapes import Shape


def row(kind, provider, median, noise=0.01, shape=None, **info):
    """One entry of `benchmarks`; `noise` is half the relative interquartile range."""
    shape = shape or Shape("S", 16, 512, 8)
    stats = {"median": median, "q1": median * (1 - noise), "q3": median * (1 + noise), "rounds": 20}
    named = {"kind": kind, "provider": provider, "model": shape.name, "shape": shape._asdict(), "tokens": shape.tokens}
    rates = {"tflops": 12.34, "percent_flops": 4.0, "floor_seconds": median / 4, "percent_of_floor": 25.0}
    extra = {"dtype": "bf16", "timing": "graph", "peak_bytes": 3 << 20, "gate": "largest error 1e-3"}
    return {
        "name": f"{kind}-{provider}",
        "fullname": f"{kind}-{provider}-{shape.id}",
        "extra_info": {**named, **rates, **extra, **info},
        "stats": stats,
    }


def gone(kind, provider, reason, shape=None, **more):
    shape = shape and shape._asdict()
    return {"kind": kind, "provider": provider, "shape": shape, "name": f"{kind}-{provider}", "reason": reason, **more}


def results(device="cuda"):
    """A small file with every kind of row; what it says is invented."""
    gpu = {"device": "cuda", "name": "GPU X", "driver_version": "1.2", "power.limit": "700 W"}
    cpu = {"device": "cpu", "name": "CPU Y, 2 threads", "cores": 2}
    software = {"cpu": "CPU Y", "threads": 2, "torch": "2.9", "triton": "3.6", "commit": "abc", "command": "run <all>"}
    small, large = Shape("S", 16, 512, 8), Shape("S", 16, 1024, 1)
    seconds = {"eager": 8e-4, "sdpa-flash": 2e-4, "sdpa-cudnn": 1e-4, "triton": 1.25e-4}
    rows = [row("attention", name, s, shape=shape) for shape in (small, large) for name, s in seconds.items()]
    for name, s, same in (("eager", 80, 1.0), ("sdpa-flash", 20, 0.99998), ("bands", 16, 0.99), ("triton", 10, 0.99)):
        rows.append(row("model", name, s / 1e3, images_per_second=8e3 / s, agreement=same, timing="wall"))
    for i, name, s in ((0, "eager fp32", 80), (2, "bfloat16", 40), (3, "graph", 50)):
        more = {"step": i, "agreement": 1.0, "miou": 58.3, "miou_pictures": 12, "timing": "wall"}
        rows.append(row("waterfall", name, s / 1e3, images_per_second=8e3 / s, **more))
    source = {"source": "https://example.org/x", "gpu": "H100"}
    published = {"im_s": 92, "ss": 58.4, "ms": None, "params_m": 316, **source}
    entry = row("peers", "EoMT-L", 0.1, images_per_second=80.0, published=published, size=512, batch=4, group="today")
    for name in ("shape", "tokens"):
        del entry["extra_info"][name]
    rows.append(entry)
    rows += [row("long", "triton", 1e-3 * 4**i, shape=Shape("S", 8, 256 * 2**i)) for i in range(3)]
    rows.append(row("loss", "eager", 1e-3))
    missing = [
        gone("attention", "sdpa-efficient", "<script>alert(1)</script>", small),
        gone("long", "eager", "out of memory", Shape("S", 8, 1024)),
        gone("peers", "ACNet", "no code", published={"ms": 45.9}, group="poster"),
        {**gone("waterfall", "compile", "compiler error", small), "name": "waterfall-1"},
    ]
    roofs = {"dtype": "bfloat16", "flops_per_second": 7e14, "bytes_per_second": 4e12, "flops_spread": 0.01}
    return {
        "machine_info": {**(gpu if device == "cuda" else cpu), **software},
        "ceilings": roofs,
        "datetime": "2025-01-02T03:04:05+00:00",
        "complete": True,
        "steps": [{"name": "core", "state": "done", "seconds": 12.0}],
        "benchmarks": rows,
        "unavailable": missing,
    }


def saver(folder):
    """(content, name) -> path of the file that holds it."""

    def run(content, name="gpu.json"):
        (folder / name).write_text(json.dumps(content))
        return folder / name

    return run
