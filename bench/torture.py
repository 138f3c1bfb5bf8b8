"""Kill conversions, repeat the command, compare: `python bench/torture.py --kills 200`.

Each run converts a synthetic checkpoint of several files in a child (`python -m requant convert`),
which gets SIGKILL, SIGTERM or SIGINT when a random number of bytes lies in OUT, at a random moment
of the last steps, or while it starts. The same command then continues, and is killed again. After
every kill, whatever has its final name must be final, and nothing may be loadable that is not
complete; at the end the folder must hold the bytes of an undisturbed run. Exits with 1 otherwise.

With `--processes N` torchrun starts N processes at a time, and the signal goes to it or to one of
them; what is left is continued by 1 to N.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parent.parent
INDEX, JOURNAL, MANIFEST = "model.safetensors.index.json", ".requant-journal.jsonl", "requant.json"

#: What is converted into what: one pass and two, with and without a search, wider and narrower.
PAIRS = (
    ("bf16", "fp8-block"),
    ("fp8-block", "bf16"),
    ("bf16", "int4[group_size=32,method=mse]"),
    ("fp8-block", "nvfp4"),
    ("bf16", "fp32"),
    ("fp8-block", "int4-awq"),
)
SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
#: How a child may end that got a signal: by it, or with the shell's number for it.
ENDS = {sign: (-sign, 128 + sign) for sign in SIGNALS}
HIDDEN, WIDTH, LAYERS_A_FILE = 1024, 2816, 1
POLL_SECONDS = 0.001
#: A run is left in peace after so many kills.
MOST_KILLS = 7
CHILD_SECONDS = 300
#: What was killed, and those who worked with it, end within so many.
PATIENCE_SECONDS = 60


@dataclass
class Kill:
    """One kill: the signal, the phase it hit, the share of the weights' bytes that lay in OUT, and
    who got it: `process 0` and so on, or the `launcher`.

    `wrong` lists what should not be so.
    """

    signal: str
    phase: str
    share: float
    victim: str
    wrong: list[str] = field(default_factory=list)
    loadable: bool = False


@dataclass
class Run:
    """One conversion, killed several times and completed."""

    pair: str
    workers: int
    processes: int
    kills: list[Kill] = field(default_factory=list)
    resumes: int = 0
    mismatches: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)


class Target:
    """A source, a format, and the hashes of the undisturbed result."""

    def __init__(self, source: Path, to: str, folder: Path) -> None:
        self.source, self.to = source, to
        out = folder / "whole"
        done = subprocess.run(self.command(out, 2, 1), cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{source.name} -> {to}: {done.stderr}")
        self.hashes = hashes(out)
        self.weights = {n: (out / n).stat().st_size for n in self.hashes if is_weights(n)}
        shutil.rmtree(out)

    def command(self, out: Path, workers: int, processes: int) -> list[str]:
        """The command that is repeated; several processes need a launcher."""
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
                    str(processes)] if processes > 1 else []  # fmt: skip
        return [sys.executable, *launcher, "-m", "requant", "convert", str(self.source), str(out),
                "--to", self.to, "--workers", str(workers), "--json"]  # fmt: skip


def main() -> None:
    """Parse, torture, print."""
    options = _options()
    started = time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix="torture-", dir=options.dir)).resolve()
    try:
        runs = torture(
            folder, options.kills, options.seed, options.size_mb, options.lanes, options.processes
        )
    finally:
        shutil.rmtree(folder)
    report = summary(runs, time.monotonic() - started)
    if options.json:
        print(json.dumps({**report, "details": [asdict(run) for run in runs]}))
    else:
        for key, value in report.items():
            print(f"{key:>22}: {value}")
    raise SystemExit(0 if report["ok"] else 1)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=200, help="kills in all, at least (200)")
    parser.add_argument("--seed", type=int, default=0, help="of moments and signals (0)")
    parser.add_argument("--size-mb", type=float, default=150, help="size of the BF16 source (150)")
    parser.add_argument("--lanes", type=int, default=2, help="runs at a time (2)")
    parser.add_argument("--processes", type=int, default=1, help="processes of a run, at most (1)")
    parser.add_argument("--dir", type=Path, default=None, help="working folder (the temporary one)")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    return parser.parse_args()


def torture(
    folder: Path, kills: int, seed: int, size_mb: float, lanes: int, processes: int
) -> list[Run]:
    """Runs until there were `kills` kills; every lane has its own pairs and its own chance."""
    bf16 = make_source(folder / "bf16", size_mb)
    sources = {"bf16": bf16, "fp8-block": folder / "fp8-block"}
    subprocess.run(
        [sys.executable, "-m", "requant", "convert", bf16, sources["fp8-block"], "--to",
         "fp8-block", "--quiet"],
        cwd=ROOT, check=True,
    )  # fmt: skip

    def lane(number: int) -> list[Run]:
        chance = random.Random(f"{seed} {number}")
        place = folder / f"lane-{number}"
        place.mkdir()
        share = kills // lanes + (number < kills % lanes)
        targets: dict[int, Target] = {}
        runs: list[Run] = []
        while (left := share - sum(len(run.kills) for run in runs)) > 0:
            pair = (number + len(runs) * lanes) % len(PAIRS)
            if pair not in targets:
                stored, to = PAIRS[pair]
                targets[pair] = Target(sources[stored], to, place)
            most = min(left, MOST_KILLS)
            runs.append(one_run(targets[pair], place / "out", chance, most, processes))
        return runs

    with ThreadPoolExecutor(lanes) as pool:
        return [run for runs in pool.map(lane, range(lanes)) for run in runs]


def one_run(target: Target, out: Path, chance: random.Random, most: int, processes: int) -> Run:
    """Convert into `out`, kill up to `most` times, complete, compare, remove."""
    run = Run(f"{target.source.name} -> {target.to}", chance.choice((1, 2, 3)), processes)
    shutil.rmtree(out, ignore_errors=True)
    done = False
    while not done and len(run.kills) < most:
        count = chance.randint(1, processes) if run.kills else processes
        victim = chance.randrange(count) if count > 1 and chance.random() < 0.7 else None
        sign = chance.choice(SIGNALS)
        command = target.command(out, run.workers, count)
        ended = killed(command, out, sign, moment(target, out, chance), victim)
        if ended.code == 0:  # it was faster
            break
        name = "launcher" if victim is None and count > 1 else f"process {victim or 0}"
        kill = Kill(sign.name, *standing(target, out, ended.claimed), name)
        kill.wrong += misconduct(ended, sign, kill.phase, count)
        run.kills.append(kill)
        examine(target, out, kill)
        done = kill.phase == "finished"
    run.resumes = len(run.kills)
    last = subprocess.run(
        target.command(out, run.workers, chance.randint(1, processes)),
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    if last.returncode:
        run.wrong.append(f"cannot be completed: {last.stderr[-500:]}")
    found = hashes(out) if out.is_dir() else {}
    run.mismatches = sorted(
        n for n in found.keys() | target.hashes.keys() if found.get(n) != target.hashes.get(n)
    )
    shutil.rmtree(out, ignore_errors=True)
    return run


def moment(target: Target, out: Path, chance: random.Random) -> Callable[[bool], bool]:
    """When to kill: most often after a number of bytes, sometimes near the end or at the start.

    Returns a question to ask again and again, with whether the child has claimed OUT: what the one
    before it left there does not count.
    """
    total = sum(target.weights.values())
    what = chance.random()
    pause = chance.uniform(0, 0.01)
    due: float | None = None

    def after(event: bool, seconds: float) -> bool:
        nonlocal due
        if event and due is None:
            due = time.monotonic() + seconds
        return due is not None and time.monotonic() >= due

    if what < 0.08:  # while Python starts, or a little after the folder is claimed
        seconds = chance.uniform(0.1, 4)
        return lambda claimed: after(True, seconds)
    if what < 0.25:  # side files, index, config, check, manifest
        seconds = chance.uniform(0, 0.04)
        return lambda claimed: after(
            claimed and all((out / name).exists() for name in target.weights), seconds
        )
    begin = sum(n for name, n in target.weights.items() if (out / name).exists())
    threshold = chance.uniform(begin, begin + 0.9 * (total - begin))
    return lambda claimed: after(claimed and weight_bytes(out) > threshold, pause)


@dataclass
class Ended:
    """How a child ended: its exit status (0: it was faster), what it said, whether it had claimed
    OUT, and the processes it had started that did not end with it."""

    code: int
    stderr: str
    claimed: bool
    left: list[int]


def killed(
    command: Sequence[str],
    out: Path,
    sign: signal.Signals,
    is_due: Callable[[bool], bool],
    victim: int | None,
) -> Ended:
    """Start a child and send the signal when it is due: to it, or to that of its processes."""
    claimed = False
    started_by: dict[int, int] = {}
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=errors) as process,
    ):
        started = time.monotonic()
        while process.poll() is None and not is_due(claimed):
            if "torch.distributed.run" in command:
                started_by |= processes_of(process.pid)
            first = started_by.get(0, process.pid)
            claimed = claimed or has_open(first, out / JOURNAL)
            if time.monotonic() - started > CHILD_SECONDS:
                process.kill()
                raise SystemExit(f"{' '.join(command)}: no end after {CHILD_SECONDS} s")
            time.sleep(POLL_SECONDS)
        try:
            if process.poll() is None:
                os.kill(started_by.get(victim, process.pid), sign)  # type: ignore[arg-type]
        except ProcessLookupError:  # it has just ended
            pass
        try:
            code = process.wait(timeout=PATIENCE_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            code = 999
        errors.seek(0)
        return Ended(code, errors.read(), claimed, outlived(list(started_by.values())))


def processes_of(launcher: int) -> dict[int, int]:
    """The processes that a launcher has started: rank -> pid. Needs Linux."""
    found: dict[int, int] = {}
    try:
        for pid in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split():
            for variable in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                if variable.startswith(b"RANK="):
                    found[int(variable[5:])] = int(pid)
    except OSError:  # one of them has gone
        pass
    return found


def outlived(pids: Sequence[int]) -> list[int]:
    """Those of the processes that do not end by themselves in good time; they are killed."""
    end = time.monotonic() + PATIENCE_SECONDS
    while (left := [pid for pid in pids if is_running(pid)]) and time.monotonic() < end:
        time.sleep(0.01)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    return left


def is_running(pid: int) -> bool:
    """Whether a process exists, and is not only waiting for somebody to notice its end."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def misconduct(ended: Ended, sign: signal.Signals, phase: str, count: int) -> list[str]:
    """What a command that is killed may not do."""
    wrong = []
    said = f"{sign.name}, exit status {ended.code}: {ended.stderr[-500:]}"
    dying_python = sign == signal.SIGINT and phase == "start-up"  # has a status of its own
    if count == 1 and ended.code not in ENDS[sign] and not dying_python:
        wrong.append(f"wrong exit status: {said}")
    if count == 1 and sign == signal.SIGINT and "Traceback" in ended.stderr and not dying_python:
        wrong.append(f"a traceback: {said}")
    if ended.code == 999 or ended.left:
        wrong.append(f"{len(ended.left)} processes run on after {PATIENCE_SECONDS} s: {said}")
    if "this is a bug in requant" in ended.stderr:
        wrong.append(f"a bug: {said}")
    return wrong


def has_open(pid: int, path: Path) -> bool:
    """Whether a process has a file open. Needs Linux."""
    try:
        descriptors = list(Path(f"/proc/{pid}/fd").iterdir())
        return any(os.readlink(link) == str(path) for link in descriptors)
    except OSError:  # the process, or one of its files, has gone
        return False


def standing(target: Target, out: Path, claimed: bool) -> tuple[str, float]:
    """The phase that a kill hit, and the share of the weights' bytes that lies in OUT."""
    share = round(weight_bytes(out) / sum(target.weights.values()), 3)
    if (out / MANIFEST).exists() and not (out / JOURNAL).exists():
        return "finished", share
    if not claimed:
        return "start-up", share
    if all((out / name).exists() for name in target.weights):
        return "last steps", share
    return "writing", share


def examine(target: Target, out: Path, kill: Kill) -> None:
    """What lies in OUT after a kill must be final, or look like nothing that a loader takes."""
    found = hashes(out) if out.is_dir() else {}
    for name in filter(is_weights, found):
        try:
            with safe_open(out / name, "pt") as opened:
                opened.keys()
        except (SafetensorError, OSError) as error:
            kill.wrong.append(f"{name}: has its final name, and safetensors says {error}")
        if found[name] != target.hashes.get(name):
            kill.wrong.append(f"{name}: has its final name and is not final")
    complete = all(found.get(n) == h for n, h in target.hashes.items() if n != MANIFEST)
    for name in ("config.json", INDEX, MANIFEST):
        if name in found and found[name] != target.hashes[name]:
            kill.wrong.append(f"{name}: is not the final one")
    # transformers, vLLM, SGLang and requant all begin with config.json.
    kill.loadable = not complete and "config.json" in found
    if INDEX in found and not all(found.get(n) == target.hashes[n] for n in target.weights):
        kill.loadable = True
    if MANIFEST in found and not complete:
        kill.wrong.append(f"{MANIFEST}: there before all is")
    if found and JOURNAL not in found and MANIFEST not in found:
        kill.wrong.append(f"neither journal nor manifest beside {min(found)}")


def summary(runs: Sequence[Run], seconds: float) -> dict[str, Any]:
    """The figures; `ok` when nothing was wrong."""
    kills = [kill for run in runs for kill in run.kills]
    wrong = [text for run in runs for text in run.wrong] + [w for k in kills for w in k.wrong]
    mismatches = sum(bool(run.mismatches) for run in runs)
    loadable = sum(kill.loadable for kill in kills)
    writing = Counter(min(int(k.share * 4), 3) for k in kills if k.phase == "writing")
    return {
        "ok": not (wrong or mismatches or loadable),
        "runs": len(runs),
        "pairs": dict(Counter(run.pair for run in runs)),
        "kills": len(kills),
        "by_signal": dict(Counter(kill.signal for kill in kills)),
        "by_victim": dict(Counter(kill.victim for kill in kills)),
        "by_phase": dict(Counter(kill.phase for kill in kills)),
        "writing_by_quarter": [writing[quarter] for quarter in range(4)],
        "resumes": sum(run.resumes for run in runs),
        "mismatches": mismatches,
        "loadable_intermediates": loadable,
        "wrong": wrong,
        "wall_seconds": round(seconds, 1),
    }


def make_source(folder: Path, size_mb: float) -> Path:
    """A small Llama-like BF16 checkpoint of about this size, one layer a file."""
    generator = torch.Generator().manual_seed(0)

    def matrix(rows: int, cols: int) -> torch.Tensor:
        return (torch.randn(rows, cols, generator=generator) * 0.05).to(torch.bfloat16)

    shapes = {f"self_attn.{n}_proj": (HIDDEN, HIDDEN) for n in "qkvo"}
    shapes |= {f"mlp.{n}_proj": (WIDTH, HIDDEN) for n in ("gate", "up")}
    shapes["mlp.down_proj"] = (HIDDEN, WIDTH)
    layer_bytes = 2 * sum(rows * cols for rows, cols in shapes.values())
    layers = max(2, round(size_mb * 1e6 / layer_bytes))
    files = -(-layers // LAYERS_A_FILE)
    folder.mkdir(parents=True)
    places: dict[str, str] = {}
    for number in range(files):
        tensors: dict[str, torch.Tensor] = {}
        if number == 0:
            tensors["model.embed_tokens.weight"] = matrix(512, HIDDEN)
            tensors["model.norm.weight"] = torch.ones(HIDDEN, dtype=torch.bfloat16)
        for layer in range(number * LAYERS_A_FILE, min((number + 1) * LAYERS_A_FILE, layers)):
            prefix = f"model.layers.{layer}"
            tensors |= {f"{prefix}.{m}.weight": matrix(*shape) for m, shape in shapes.items()}
            tensors[f"{prefix}.input_layernorm.weight"] = torch.ones(HIDDEN, dtype=torch.bfloat16)
        name = f"model-{number + 1:05}-of-{files:05}.safetensors"
        save_file(tensors, folder / name, {"format": "pt"})
        places |= dict.fromkeys(tensors, name)
    config = {"model_type": "llama", "num_hidden_layers": layers, "torch_dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    (folder / "tokenizer.json").write_bytes(bytes(range(256)) * 4000)
    (folder / "figures").mkdir()
    (folder / "figures/plot.png").write_bytes(b"\x89PNG")
    return folder


def is_weights(name: str) -> bool:
    """Whether a path in OUT is a weight file under its final name."""
    return name.endswith(".safetensors")


def weight_bytes(out: Path) -> int:
    """Bytes of all weight files in OUT, finished or not. A file may vanish while we look."""
    total = 0
    try:
        with os.scandir(out) as entries:
            for entry in entries:
                if is_weights(entry.name.removesuffix(".partial")):
                    total += entry.stat().st_size
    except OSError:
        pass
    return total


def hashes(folder: Path) -> dict[str, str]:
    """Every file below a folder, hidden ones too, with its SHA-256."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


if __name__ == "__main__":
    main()
