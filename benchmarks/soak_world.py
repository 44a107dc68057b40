"""The processes of one life: started as torchrun does, killed, waited for, and what they leave behind."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from torch.distributed import TCPStore

PROGRAM = Path(__file__).with_name("soak_worker.py")
MARK = "LIGHTNING_SOO_SOAK"  # in the environment of all that a soak starts
SHARED_MEMORY = Path("/dev/shm")


class World:
    """``ranks`` processes of the soak's program, each with a log in the folder."""

    def __init__(self, folder: Path, name: str, ranks: int, arguments: list[str]) -> None:
        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # outlives ranks, as torchrun's
        common = {
            **os.environ,
            "WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(self._store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "OMP_NUM_THREADS": "1",
            MARK: str(folder),
        }
        self.logs = [folder / f"log-{name}-{rank}" for rank in range(ranks)]
        self.processes = []
        for rank, log in enumerate(self.logs):
            environment = {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            with log.open("wb") as file:
                command = [sys.executable, str(PROGRAM), str(folder), *arguments]
                self.processes.append(
                    subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=file, stderr=file)
                )

    @property
    def statuses(self) -> list[int | None]:
        """Of each rank; None while it runs."""
        return [process.poll() for process in self.processes]

    def kill(self, ranks: list[int]) -> None:
        for rank in ranks:
            self.processes[rank].kill()

    def wait(self, seconds: float) -> list[int]:
        """Ranks that have not ended by then; they are killed."""
        limit = time.monotonic() + seconds
        while None in self.statuses and time.monotonic() < limit:
            time.sleep(0.01)
        late = [rank for rank, status in enumerate(self.statuses) if status is None]
        self.kill(late)
        for process in self.processes:
            process.wait()
        return late

    def root_workers(self, rank: int) -> list[int]:
        """Process identifiers of a rank's workers."""
        found = []
        for pid in _children(self.processes[rank].pid):
            with contextlib.suppress(OSError):
                if b"refresh/worker.py" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    found.append(pid)
        return found

    def end_of_log(self, rank: int) -> str:
        return self.logs[rank].read_text(errors="replace")[-2000:].strip()


def kill_process(pid: int) -> bool:
    """Whether it was still there."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
        return True
    return False


def left_processes(folder: Path, seconds: float = 5.0) -> list[str]:
    """Processes that a soak has started and that go on although their ranks have ended; they are killed."""
    mark, limit = f"{MARK}={folder}".encode(), time.monotonic() + seconds
    while (found := _marked(mark)) and time.monotonic() < limit:
        time.sleep(0.02)
    for pid in found:
        kill_process(pid)
    return [f"{pid} ({command})" for pid, command in found.items()]


def shared_memory() -> set[Path]:
    """Files in shared memory, of whomever."""
    return set(SHARED_MEMORY.iterdir()) if SHARED_MEMORY.is_dir() else set()


def left_shared_memory(before: set[Path]) -> list[str]:
    """Files that were not there before and that no process has mapped or opened: others may use this machine, too."""
    in_use = set()
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            in_use |= {line.split()[-1] for line in (process / "maps").read_text().splitlines() if "/dev/shm/" in line}
            in_use |= {os.readlink(entry) for entry in (process / "fd").iterdir()}
    return sorted(str(path) for path in shared_memory() - before if str(path) not in in_use)


def _children(pid: int) -> list[int]:
    found: list[int] = []
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            found += map(int, (task / "children").read_text().split())
    return found


def _marked(mark: bytes) -> dict[int, str]:
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if mark in (process / "environ").read_bytes().split(b"\0"):
                command = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
                if command:  # else it has ended and is about to be waited for
                    found[int(process.name)] = command
    return found
