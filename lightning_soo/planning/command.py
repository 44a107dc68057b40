"""``lightning-soo plan``: what an optimizer would take on machines that are not here."""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from lightning_soo.config import ENVIRONMENT_VARIABLE, Config, from_config, load_config
from lightning_soo.dtypes import parse_dtype
from lightning_soo.linalg.product_rates import MUCH_FASTER, bfloat16_gain
from lightning_soo.optim.planned import PlannedOptimizer
from lightning_soo.optim.takeover import METHODS
from lightning_soo.placement.costs import product_flops
from lightning_soo.placement.plan import Plan
from lightning_soo.placement.simulated import ENGINES
from lightning_soo.placement.wrapping import modules_to_shard
from lightning_soo.planning.estimates import estimate
from lightning_soo.planning.machine import Machine, measured
from lightning_soo.planning.models import build_model, layer_classes
from lightning_soo.planning.report import Report


def add_arguments(parser: argparse.ArgumentParser, source: str) -> None:
    """The options of ``plan``; ``source`` says what a configuration is."""
    default = Machine()
    parser.add_argument("source", nargs="?", help=source + ", without it the defaults of --method")
    parser.add_argument(
        "--model",
        required=True,
        help="a folder with config.json, such a file, a Transformers model type, or module:function",
    )
    parser.add_argument("--model-options", default="{}", help="json: other values of the configuration, or arguments")
    parser.add_argument("--method", choices=list(METHODS), help="shampoo unless the configuration says another")
    parser.add_argument("--world-size", type=int, default=1, help="ranks in all")
    parser.add_argument("--engine", choices=ENGINES, help="ddp, or single for one rank, if left out")
    parser.add_argument("--shard-size", type=int, help="ranks that share one copy of the model: hsdp, hybrid fsdp1")
    parser.add_argument(
        "--wrap", nargs="+", metavar="CLASS", help="fsdp1: wrapped classes; the model's layers if left out"
    )
    parser.add_argument("--sub-group-size", type=int, default=10**9, help="zero3: DeepSpeed's sub_group_size")
    parser.add_argument(
        "--dtype", help="of the parameters: float32 (where there are masters, theirs), bfloat16, float64"
    )
    parser.add_argument("--step-seconds", type=float, help="of one step of the first-order run, measured")
    parser.add_argument("--flops", type=float, default=default.flops, help="FLOP/s of products (%(default).3g)")
    parser.add_argument("--statistics-flops", type=float, help="FLOP/s of float32 products, as --flops if left out")
    parser.add_argument(
        "--core-rate", type=float, default=default.core_rate, help="float64 FLOP/s of a CPU core (%(default).3g)"
    )
    parser.add_argument(
        "--cores", type=float, default=default.cores, help="CPU cores for a rank's refreshes (%(default)g)"
    )
    parser.add_argument(
        "--bandwidth",
        type=float,
        nargs="+",
        default=[default.shard_bandwidth],
        metavar="BYTES",
        help="bytes/s of a rank; two are within a copy of the model and between copies (%(default)s)",
    )
    parser.add_argument(
        "--memory-bandwidth", type=float, default=default.memory_bandwidth, help="bytes/s (%(default).3g)"
    )
    parser.add_argument("--latency", type=float, default=default.latency, help="of a collective, s (%(default).3g)")
    parser.add_argument("--operation", type=float, default=default.operation, help="of a kernel, s (%(default).3g)")
    parser.add_argument(
        "--slow-bfloat16",
        action="store_true",
        help="products are no faster in bfloat16: compute_dtype='auto' is float32",
    )
    parser.add_argument("--measure", action="store_true", help="take products, cores and memory of this machine's CPU")
    parser.add_argument("--json", action="store_true", help="plain data in place of tables")
    parser.set_defaults(run=run)


def run(given: argparse.Namespace) -> int:
    """Print the plan; returns the exit code."""
    report = make_report(given)
    print(json.dumps(report.data(), indent=2) if given.json else report.text())
    return 0


def make_report(given: argparse.Namespace) -> Report:
    """What the command's arguments ask for.

    Raises:
        ValueError: an argument that cannot be, named with its value.
    """
    model = _model(given)
    optimizer = from_config(_config(given), model)
    engine = given.engine or ("single" if given.world_size == 1 else "ddp")
    how: dict[str, Any] = {"shard_size": given.shard_size, "sub_group_size": given.sub_group_size}
    if engine == "fsdp1":
        how["units"] = modules_to_shard(model, given.wrap or layer_classes(model))
    elif given.wrap:
        raise ValueError(f"--wrap {' '.join(given.wrap)}: engine {engine!r} does not wrap modules; 'fsdp1' does")
    fast = not given.slow_bfloat16 and (not given.measure or bfloat16_gain("cpu") >= MUCH_FASTER)
    plan = optimizer.plan_elsewhere(engine, given.world_size, fast_bfloat16=fast, **how)
    return Report(
        optimizer=optimizer,
        found=estimate(optimizer, plan),
        machine=_machine(given, optimizer, plan),
        engine=engine,
        step_seconds=given.step_seconds,
    )


def _model(given: argparse.Namespace) -> nn.Module:
    try:
        options = json.loads(given.model_options)
    except json.JSONDecodeError as error:
        raise ValueError(f"--model-options {given.model_options}: not JSON: {error}") from None
    if not isinstance(options, Mapping):
        raise ValueError(
            f"--model-options {given.model_options}: expected an object, such as '{{\"vocab_size\": 1000}}'"
        )
    return build_model(given.model, options, parse_dtype("--dtype", given.dtype))


def _config(given: argparse.Namespace) -> Config:
    if given.source is None and (given.method is not None or not os.environ.get(ENVIRONMENT_VARIABLE)):
        return load_config({"method": given.method or "shampoo"})
    config = load_config(given.source)
    if given.method is not None and given.method != config.method:
        raise ValueError(f"--method {given.method}: {config.source} says method={config.method!r}")
    return config


def _machine(given: argparse.Namespace, optimizer: PlannedOptimizer, plan: Plan) -> Machine:
    if len(given.bandwidth) > 2:
        raise ValueError(f"--bandwidth: one or two numbers, not {len(given.bandwidth)}")
    if given.step_seconds is not None and not given.step_seconds > 0:
        raise ValueError(f"--step-seconds {given.step_seconds}: must be above 0")
    if given.sub_group_size < 1:
        raise ValueError(f"--sub-group-size {given.sub_group_size}: must be at least 1")
    for number in given.bandwidth:
        if not 0 < number < math.inf:
            raise ValueError(f"--bandwidth {number:g}: must be above 0")
    machine = Machine(
        flops=given.flops,
        statistics_flops=given.statistics_flops,
        core_rate=given.core_rate,
        cores=given.cores,
        memory_bandwidth=given.memory_bandwidth,
        shard_bandwidth=given.bandwidth[0],
        replicate_bandwidth=given.bandwidth[-1],
        latency=given.latency,
        operation=given.operation,
    )
    if given.measure:
        # of the block with the most work
        largest = max(plan.units, key=lambda unit: product_flops(unit.block), default=None)
        dtype = parse_dtype("--dtype", given.dtype) or torch.float32
        return measured(machine, optimizer.root_dtype(dtype, largest.block) if largest else dtype)
    return machine
