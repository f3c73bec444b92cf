"""`segmenter info`: what runs here, what a model is."""

import argparse
import dataclasses
import json
import platform
from importlib import metadata
from typing import Any

import torch

import segmenter
from segmenter.cli.errors import OK
from segmenter.cli.loading import load_for_labels
from segmenter.cli.output import out
from segmenter.inference.precision import cpu_has_bfloat16
from segmenter.ops import IMPLEMENTATIONS, explain, parts


def run(args: argparse.Namespace) -> int:
    facts = machine_facts()
    if args.model:
        facts["model"] = model_facts(args)
    out(*(json.dumps(facts, indent=2).splitlines() if args.json else _lines(facts)))
    return OK


def machine_facts() -> dict[str, Any]:
    """Versions, devices and what each implementation argument stands for. Does not import timm."""
    return {
        "versions": {
            "segmenter": segmenter.__version__,
            "python": platform.python_version(),
            **{name: _version(name) for name in ("torch", "triton", "timm", "numpy", "pillow")},
        },
        "cpu": {"machine": platform.machine(), "threads": torch.get_num_threads(), "bfloat16": cpu_has_bfloat16()},
        "cuda": [
            {
                "name": torch.cuda.get_device_name(i),
                "capability": "{}.{}".format(*torch.cuda.get_device_capability(i)),
                "memory_gib": round(torch.cuda.get_device_properties(i).total_memory / 2**30, 1),
            }
            for i in range(torch.cuda.device_count())
        ],
        "implementation": {impl: dict(zip(("runs", "why"), explain(impl), strict=True)) for impl in IMPLEMENTATIONS},
    }


def model_facts(args: argparse.Namespace) -> dict[str, Any]:
    """Configuration, size and origin of a model."""
    model = load_for_labels(args, torch.device("cpu"))
    return {
        "path": args.model,
        "impl": model.impl,
        "parts": parts(model),
        "parameters": sum(p.numel() for p in model.parameters()),
        **dataclasses.asdict(model.info),
        "config": model.config.to_dict(),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _lines(facts: dict[str, Any]) -> list[str]:
    lines = [f"{name:<15} {version or 'not installed'}" for name, version in facts["versions"].items()]
    cpu = facts["cpu"]
    bfloat16 = "with" if cpu["bfloat16"] else "without"
    lines.append(f"{'cpu':<15} {cpu['machine']}, {cpu['threads']} threads, {bfloat16} bfloat16 instructions")
    for i, gpu in enumerate(facts["cuda"]):
        text = f"{gpu['name']}, capability {gpu['capability']}, {gpu['memory_gib']} GiB"
        lines.append(f"{f'cuda:{i}':<15} {text}")
    if not facts["cuda"]:
        lines.append(f"{'cuda':<15} none")
    for impl, choice in facts["implementation"].items():
        lines.append(f"{'impl ' + impl:<15} {choice['runs']} ({choice['why']})")
    if "model" in facts:
        config, parts_used = facts["model"].pop("config"), facts["model"].pop("parts")
        lines += [f"model {name:<14} {value}" for name, value in facts["model"].items()]
        lines += [f"runs {name:<36} {value}" for name, value in parts_used.items()]
        lines += [f"config {name:<13} {value}" for name, value in config.items()]
    return lines
