"""What the arguments of a Transformers Trainer ask for: ``optim`` and ``optim_args``."""

from __future__ import annotations

from typing import Any

from lightning_soo.config import Config, load_config, split_at_commas

KEY = "soo"
# what each optimizer of the Trainer that can be taken over reads from optim_args
_READS: dict[str, tuple[str, ...]] = {
    "adamw_torch_fused": (),
    "adamw_torch": (),
    "sgd": ("momentum", "dampening", "weight_decay", "nesterov"),
}
_REASONS = {
    "paged": "pages its state of bitsandbytes between devices",
    "galore": "projects gradients to a low rank itself",
    "apollo": "projects gradients to a low rank itself",
    "lomo": "updates parameters in the backward pass",
    "schedule_free": "keeps weights of its own",
    "adafactor": "keeps factored moments of its own",
}
_BITSANDBYTES = ("bnb", "8bit", "4bit", "32bit", "ademamix", "lion")


def read_optim_args(optim_args: str | None, optim: str) -> tuple[Config | None, str | None]:
    """The configuration behind ``soo=`` and what is left for the Trainer, which splits at commas and knows no quotes.

    ``soo=soo.yaml``, ``soo=shampoo`` or ``soo=method=shampoo;precondition_frequency=50``, options separated by
    semicolons.

    Raises:
        ValueError: a configuration that is refused, two of them, or a key beside it that nobody would read.
        FileNotFoundError: the file is missing.
    """
    parts = [part.strip() for part in split_at_commas(optim_args or "")]
    ours = [part.partition("=")[2] for part in parts if part.partition("=")[0].strip() == KEY]
    rest = [part for part in parts if part.partition("=")[0].strip() != KEY]
    if not ours:
        return None, optim_args
    if len(ours) > 1:
        raise ValueError(f"optim_args={optim_args!r}: {KEY}= is given {len(ours)} times")
    for part in rest:
        name = part.partition("=")[0].strip()
        if name not in _READS.get(optim, (name,)):
            raise ValueError(
                f"optim_args={optim_args!r}: {optim} reads no {name!r}, and the Trainer would ignore it. Options of "
                f"{KEY}= are separated by semicolons: {KEY}=method=shampoo;precondition_frequency=50"
            )
    config = load_config(ours[0].replace(";", ",").strip())
    return config, ",".join(rest) or None


def refuse_optimizer(arguments: Any) -> None:
    """
    Raises:
        ValueError: ``optim`` names an optimizer that cannot be taken over.
    """
    optim = str(getattr(arguments.optim, "value", arguments.optim))
    if optim in _READS:
        return
    reason = next((why for word, why in _REASONS.items() if word in optim), "")
    if not reason and any(word in optim for word in _BITSANDBYTES):
        reason = "keeps quantised or fused state of its own"
    raise ValueError(
        f"optim={optim!r} cannot be taken over{f': it {reason}' if reason else ''}. Write --optim adamw_torch "
        f"(or {' or '.join(name for name in _READS if name != 'adamw_torch')}), or do not opt in to second order"
    )
