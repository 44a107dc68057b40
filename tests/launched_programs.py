"""Programs of users that have worker processes, and the launchers that start them."""

from __future__ import annotations

import socket
from pathlib import Path

# what a rank says is one write: ranks share a pipe, and unbuffered print writes the end of a line by itself
PLAIN = """
import os, torch
os.write(1, b"running %d\\n" % int(os.environ.get("RANK", "0")))
from lightning_soo import Shampoo
torch.set_num_threads(1)
torch.manual_seed(0)
net = torch.nn.Linear(30, 30)
"""
LOOP = """
for step in range(8):
    optimizer.zero_grad()
    loss = net(torch.randn(4, 30)).square().mean()
    {backward}
    optimizer.step()
inner = getattr(optimizer, "optimizer", optimizer)
assert inner.diagnostics()["condition_number"] > 1
assert inner._refresher.executor.kind == "process"
inner.close()
os.write(1, b"done %d\\n" % int(os.environ.get("RANK", "0")))
"""
ONE = (
    PLAIN
    + """
optimizer = Shampoo(net, precondition_frequency=2, workers="process")
"""
    + LOOP.format(backward="loss.backward()")
)
ACCELERATE = (
    PLAIN
    + """
from accelerate import Accelerator
accelerator = Accelerator(cpu=True)
assert accelerator.num_processes == 2
optimizer = Shampoo(net, precondition_frequency=2, workers="process")
net, optimizer = accelerator.prepare(net, optimizer)
"""
    + LOOP.format(backward="accelerator.backward(loss)")
    + """
accelerator.wait_for_everyone()  # gloo aborts now and then when a peer leaves first
accelerator.end_training()
"""
)
LIGHTNING = (
    PLAIN.replace('os.environ.get("RANK", "0")', 'os.environ.get("LOCAL_RANK", "0")')
    + """
import lightning as L
from lightning_soo.callbacks import SecondOrder

class Model(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = net
    def training_step(self, batch, index):
        return self.net(batch).square().mean()
    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters())

callback = SecondOrder(precondition_frequency=2, workers="process")
trainer = L.Trainer(accelerator="cpu", devices=2, strategy="ddp", max_epochs=1, logger=False, callbacks=[callback],
                    enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
trainer.fit(Model(), torch.utils.data.DataLoader(torch.randn(64, 30), batch_size=4))
assert trainer.optimizers[0].diagnostics()["condition_number"] > 1
os.write(1, b"done %d\\n" % int(os.environ.get("LOCAL_RANK", "0")))
torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""
)
RANKS = (
    PLAIN
    + """
torch.distributed.init_process_group("gloo")
assert torch.distributed.get_world_size() == 2
net = torch.nn.parallel.DistributedDataParallel(net)
optimizer = Shampoo(net, precondition_frequency=2, workers="process")
optimizer.attach(net)
"""
    + LOOP.format(backward="loss.backward()")
    + """
torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""
)
DEEPSPEED = (
    """
import os, sys
assert sys.argv[1:] == ["--local_rank=" + os.environ["LOCAL_RANK"], "--of", "the user"]
"""
    + RANKS
)
# by launcher: the program, and how many ranks run it
PROGRAMS = {
    "stdin": (ONE, 1),
    "python": (ONE, 1),
    "torchrun": (RANKS, 2),
    "accelerate": (ACCELERATE, 2),
    "lightning": (LIGHTNING, 2),
    "deepspeed": (DEEPSPEED, 2),
}
ACCELERATE_LAUNCH = [
    "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
    "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0",
]  # fmt: skip
DEEPSPEED_LAUNCH = ["-m", "deepspeed.launcher.runner", "--num_accelerators", "2"]


def command_of(launcher: str, script: Path) -> list[str]:
    """What Python is to run for ``script``, by one of several launchers."""
    return {
        "stdin": ["-"],
        "python": [str(script)],
        "torchrun": ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)],
        "accelerate": [*ACCELERATE_LAUNCH, str(script)],
        "lightning": [str(script)],
        "deepspeed": [*DEEPSPEED_LAUNCH, "--master_port", str(free_port()), str(script), "--of", "the user"],
    }[launcher]


def free_port() -> int:
    """The deepspeed launcher takes no port 0, and its default may be in use."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])
