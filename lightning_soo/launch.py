"""Run an unmodified script of Accelerate or of the Transformers Trainer with second-order optimizers.

SOO_CONFIG=soo.yaml accelerate launch --config_file fsdp2.yaml -m lightning_soo.launch train.py --its --own arguments
SOO_CONFIG=soo.yaml accelerate launch --config_file fsdp2.yaml -m lightning_soo.launch -m package.module --its arguments
torchrun --nproc_per_node 2 -m lightning_soo.launch train.py --optim_args soo=soo.yaml    (a script of the Trainer)
"""

from __future__ import annotations

import os
import runpy
import sys
from collections.abc import Sequence

from lightning_soo.config import ENVIRONMENT_VARIABLE, load_config
from lightning_soo.integrations import cpu
from lightning_soo.integrations.accelerate_session import Session
from lightning_soo.integrations.accelerate_takeover import install


def run(arguments: Sequence[str]) -> None:
    """Run a script, or ``-m`` and a module, as ``python`` would, with its own arguments."""
    if arguments[0] == "-m":
        sys.argv = [arguments[1], *arguments[2:]]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        return
    sys.argv = list(arguments)
    sys.path[0] = os.path.dirname(os.path.abspath(arguments[0]))
    runpy.run_path(arguments[0], run_name="__main__")


def main(arguments: Sequence[str] | None = None) -> None:
    """Read ``SOO_CONFIG``, install it and run. Without it the arguments of a Trainer have to say what is meant.

    Raises:
        SystemExit: a configuration that is refused, a missing script, or a script that gave no optimizer to
            ``Accelerator.prepare``.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[:2] == ["-m"] or given[0] in ("-h", "--help"):
        sys.exit(f"usage:\n{(__doc__ or '').partition('.')[2].strip()}")
    try:
        config = load_config() if os.environ.get(ENVIRONMENT_VARIABLE) else None
    except (ImportError, OSError, ValueError) as error:
        sys.exit(f"lightning_soo.launch: {error}")
    if given[0] != "-m" and not os.path.isfile(given[0]):
        sys.exit(f"lightning_soo.launch: there is no script {given[0]!r}; a module is run by -m {given[0]}")
    if cpu.is_asked_for():
        cpu.train_on_cpu()
    install(config, everywhere=True)
    try:
        run(given)
    except SystemExit as leaving:
        if leaving.code not in (None, 0):
            raise
    if not Session.taken_over:
        sys.exit(
            f"lightning_soo.launch: {given[0]} ended, and no optimizer was taken over: Accelerator.prepare was given "
            "none. Scripts of Lightning opt in by the SecondOrder callback"
        )


if __name__ == "__main__":
    main()
