"""Run an unmodified script of Accelerate or of the Transformers Trainer with second-order optimizers.

SOO_CONFIG=soo.yaml accelerate launch --config_file fsdp2.yaml -m lightning_soo.launch train.py --its --own arguments
SOO_CONFIG=soo.yaml accelerate launch --config_file fsdp2.yaml -m lightning_soo.launch -m package.module --its arguments
SOO_CONFIG=soo.yaml accelerate launch --config_file fsdp2.yaml -m lightning_soo.launch console-script --its arguments
torchrun --nproc_per_node 2 -m lightning_soo.launch train.py --optim_args soo=soo.yaml    (a script of the Trainer)
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from lightning_soo.config import ENVIRONMENT_VARIABLE, load_config
from lightning_soo.integrations import cpu, programs
from lightning_soo.integrations.accelerate_session import Session
from lightning_soo.integrations.accelerate_takeover import install
from lightning_soo.integrations.packages import require_accelerate


def main(arguments: Sequence[str] | None = None) -> None:
    """Read ``SOO_CONFIG``, install it and run. Without it the arguments of a Trainer have to say what is meant.

    Raises:
        SystemExit: a configuration that is refused, a missing script, command or package, or a script that gave no
            optimizer to ``Accelerator.prepare``.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[:2] == ["-m"] or given[0] in ("-h", "--help"):
        sys.exit(f"usage:\n{(__doc__ or '').partition('.')[2].strip()}")
    try:
        config = load_config() if os.environ.get(ENVIRONMENT_VARIABLE) else None
        require_accelerate("it")
    except (ImportError, OSError, ValueError) as error:
        sys.exit(f"lightning_soo.launch: {error}")
    name = given[1] if given[0] == "-m" else given[0]
    if cpu.is_asked_for():
        cpu.train_on_cpu()
    install(config, everywhere=True)
    try:
        programs.run(given)
    except programs.ProgramNotFound as error:
        sys.exit(f"lightning_soo.launch: {error}")
    except SystemExit as leaving:
        if leaving.code not in (None, 0):
            raise
    if not Session.taken_over:
        sys.exit(
            f"lightning_soo.launch: {name} ended, and no optimizer was taken over: Accelerator.prepare was given "
            "none. Scripts of Lightning opt in by the SecondOrder callback"
        )


if __name__ == "__main__":
    main()
