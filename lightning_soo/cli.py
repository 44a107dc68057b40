"""``lightning-soo``: look at configurations, plans and checkpoints before device time is spent, and copy recipes."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_soo._version import __version__
from lightning_soo.config import import_yaml, load_config
from lightning_soo.planning.command import add_arguments
from lightning_soo.recipe_files import copy_recipe, list_recipes


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code, 1 where something is wrong."""
    given = _parser().parse_args(arguments)
    try:
        return int(given.run(given))
    except (ImportError, OSError, TypeError, ValueError) as error:
        print(f"lightning-soo: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="lightning-soo", description=__doc__)
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    what = "a yaml or json file, or a line such as method=shampoo,precondition_frequency=50; SOO_CONFIG if left out"
    config = commands.add_parser("config", help="print a configuration with every option and its default")
    config.add_argument("source", nargs="?", help=what)
    config.set_defaults(run=_config)
    check = commands.add_parser("check", help="say what is wrong with a configuration, and with one of Accelerate's")
    check.add_argument("source", nargs="?", help=what)
    check.add_argument("--config_file", help="the yaml of accelerate launch that goes with it")
    check.set_defaults(run=_check)
    plan = commands.add_parser("plan", help="say what an optimizer would take on machines that are not here")
    add_arguments(plan, what)
    inspect = commands.add_parser("inspect", help="list what a checkpoint holds, and compare it with its checksums")
    inspect.add_argument("checkpoint", help="a folder or a file of lightning_soo, Lightning, Accelerate or DeepSpeed")
    inspect.set_defaults(run=_inspect)
    export = commands.add_parser(
        "export", help="write a checkpoint's weights and an AdamW's (or SGD's) state to a file"
    )
    export.add_argument("checkpoint", help="a folder or a file, as of inspect")
    export.add_argument("output", type=Path, help="a file that torch.load reads: state_dict, and optimizer_states")
    export.set_defaults(run=_export)
    recipes = commands.add_parser("recipes", help="list the recipes, or copy one").add_subparsers(
        dest="what", required=True, metavar="list|copy"
    )
    recipes.add_parser("list", help="names and what they are").set_defaults(run=_list_recipes)
    copy = recipes.add_parser("copy", help="copy a recipe and what it shares with others to ./recipes")
    copy.add_argument("name")
    copy.add_argument("--to", type=Path, default=Path(), help="another folder than the working directory")
    copy.set_defaults(run=_copy_recipe)
    return parser


def _config(given: argparse.Namespace) -> int:
    yaml = import_yaml("lightning-soo config")
    resolved: dict[str, Any] = load_config(given.source).resolved()
    print("# taken over from an AdamW, Adam or SGD unless set: lr, betas, eps, weight_decay, momentum")
    print(yaml.safe_dump(resolved, sort_keys=False), end="")
    return 0


def _check(given: argparse.Namespace) -> int:
    problems = []
    try:
        config = load_config(given.source)
    except (OSError, TypeError, ValueError) as error:
        problems.append(str(error))
    if given.config_file is not None:
        from lightning_soo.integrations.launch_config import launch_problems

        problems += launch_problems(given.config_file)
    for problem in problems:
        print(problem, file=sys.stderr)
    if problems:
        print(f"{len(problems)} problem{'s' * (len(problems) > 1)}", file=sys.stderr)
        return 1
    options = ", ".join(f"{key}={value!r}" for key, value in config.options.items())
    print(f"{config.source}: {config.method}{f' with {options}' if options else ''}: good")
    if given.config_file is not None:
        print(f"{given.config_file}: good")
    return 0


def _inspect(given: argparse.Namespace) -> int:
    from lightning_soo.checkpoint.inspection import inspect

    found = inspect(given.checkpoint)
    print("\n".join(found.lines))
    for problem in found.problems:
        print(problem, file=sys.stderr)
    count = len(found.problems)
    print(f"{count} problem{'s' * (count > 1)}" if count else "every checksum is right")
    return int(count > 0)


def _export(given: argparse.Namespace) -> int:
    import torch

    from lightning_soo.checkpoint.export import export

    found = export(given.checkpoint)
    torch.save({"state_dict": found.state_dict, "optimizer_states": found.optimizers}, given.output)
    for name, why in found.anew.items():
        print(f"{name} starts anew: {why}")
    kinds = " and ".join(f"the state of torch.optim.{kind}" for kind in found.kinds) or "no optimizer"
    print(f"{given.output}: {len(found.state_dict)} weights, {kinds}")
    return 0


def _list_recipes(given: argparse.Namespace) -> int:
    recipes = list_recipes()
    width = max(map(len, recipes))
    for name, heading in recipes.items():
        print(f"{name:{width}}  {heading}")
    return 0


def _copy_recipe(given: argparse.Namespace) -> int:
    folder = copy_recipe(given.name, given.to)
    print(f"{folder}: begin with {folder / 'README.md'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
