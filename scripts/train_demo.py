"""Train the demo model and export it as a DeepSeek-V3 FP8 checkpoint.

    python scripts/train_demo.py [--steps N] [--out DIR]

The number of steps is fixed and everything is seeded: CPython 3.11, torch 2.13 and two threads
give the same files again on the same kind of CPU. Two free CPU cores reach about 2,700 tokens/s,
18 minutes; with two other jobs on them it took 28. On glibc `MALLOC_MMAP_MAX_=0` and
`MALLOC_TRIM_THRESHOLD_=4000000000` in the environment save page faults and change no result.
"""

import argparse
import copy
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from demo_corpus import BOS, build_corpus, train_tokenizer, training_stream
from demo_export import export_checkpoint, round_to_stored
from demo_model import DemoConfig, DemoModel
from tokenizers import Tokenizer
from torch import Tensor

SEED = 20250101
THREADS = 2
STEPS = 700
WARMUP_STEPS = 50
BATCH, WINDOW = 8, 512
PEAK_LR, FINAL_LR_SHARE = 4e-3, 0.02
WEIGHT_DECAY = 0.1
MTP_LOSS_WEIGHT = 0.3
BALANCE_SPEED = 0.002
CORPUS_SHA256 = "6577131a5502db18ba0d54388cb37b36556693f1b5385461861869fba4b4e769"
DEFAULT_OUT = Path(__file__).resolve().parent.parent / "requant" / "demo"


def batches(stream: Tensor, steps: int) -> Iterator[Tensor]:
    """Yield `steps` batches [BATCH, WINDOW + 2]; every pass cuts the stream at another offset."""
    generator = torch.Generator().manual_seed(SEED)
    waiting: list[Tensor] = []
    for _ in range(steps):
        while len(waiting) < BATCH:
            offset = int(torch.randint(WINDOW, (1,), generator=generator))
            starts = torch.arange(offset, len(stream) - WINDOW - 2, WINDOW)
            starts = starts[torch.randperm(len(starts), generator=generator)]
            waiting += [stream[start : start + WINDOW + 2] for start in starts.tolist()]
        yield torch.stack(waiting[:BATCH])
        waiting = waiting[BATCH:]


def losses(model: DemoModel, window: Tensor) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy in nats per token of the main head and of the MTP head."""
    main, ahead = model(window[:, :-1])
    return (
        F.cross_entropy(main.flatten(0, 1), window[:, 1:-1].flatten()),
        F.cross_entropy(ahead.flatten(0, 1), window[:, 2:].flatten()),
    )


def learning_rate(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine down to FINAL_LR_SHARE of the peak."""
    warm = min(1.0, (step + 1) / WARMUP_STEPS)
    wave = 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps)))
    return PEAK_LR * warm * (FINAL_LR_SHARE + (1 - FINAL_LR_SHARE) * wave)


def make_optimizer(model: DemoModel) -> torch.optim.Optimizer:
    """AdamW that leaves norms and embeddings undecayed."""
    decayed, free = [], []
    for name, parameter in model.named_parameters():
        plain = parameter.ndim < 2 or "embed_tokens" in name
        (free if plain else decayed).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": WEIGHT_DECAY},
        {"params": free, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=PEAK_LR, betas=(0.9, 0.95), fused=True)


def train(model: DemoModel, stream: Tensor, steps: int, state: Path | None) -> None:
    """Run the fixed number of steps; keep a copy of the weights in `state` on the way."""
    optimizer = make_optimizer(model)
    started, shown = time.monotonic(), [0.0, 0.0]
    for step, window in enumerate(batches(stream, steps)):
        for each in optimizer.param_groups:
            each["lr"] = learning_rate(step, steps)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            main, ahead = losses(model, window)
        (main + MTP_LOSS_WEIGHT * ahead).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        for router in model.routers():
            router.rebalance(BALANCE_SPEED)
        shown = [shown[0] + main.item(), shown[1] + ahead.item()]
        every = 10 if step < 50 else 50
        if (step + 1) % every == 0 or step + 1 == steps:
            count = (step % every) + 1
            rate = (step + 1) * BATCH * WINDOW / (time.monotonic() - started)
            print(
                f"step {step + 1}/{steps}  loss {shown[0] / count:.4f}"
                f"  mtp {shown[1] / count:.4f}  {rate:.0f} tokens/s",
                flush=True,
            )
            shown = [0.0, 0.0]
            if state:
                torch.save(model.state_dict(), state)


@torch.inference_mode()
def evaluate(model: DemoModel, text: str, tokenizer: Tokenizer) -> dict[str, object]:
    """Measure held-out text in float32, in windows of WINDOW tokens that start with BOS."""
    ids = torch.tensor(tokenizer.encode(text).ids)
    bos = torch.tensor([tokenizer.token_to_id(BOS)])
    rows = [
        torch.cat((bos, ids[start : start + WINDOW + 1]))
        for start in range(0, len(ids) - WINDOW - 1, WINDOW)
    ]
    for router in model.routers():
        router.load.zero_()
    main_sum = ahead_sum = agree_sum = 0.0
    for row in rows:
        window = row[None]
        main, ahead = model(window[:, :-1])
        main_sum += F.cross_entropy(main[0], window[0, 1:-1]).item()
        ahead_sum += F.cross_entropy(ahead[0], window[0, 2:]).item()
        agree_sum += (ahead[0, :-1].argmax(-1) == main[0, 1:].argmax(-1)).float().mean().item()
    shares = [(router.load / router.load.sum()).tolist() for router in model.routers()]
    return {
        "tokens": len(rows) * WINDOW,
        "bytes_per_token": len(text.encode()) / len(ids),
        "loss": main_sum / len(rows),
        "mtp_loss": ahead_sum / len(rows),
        "mtp_agreement": agree_sum / len(rows),
        "expert_shares": [[round(share, 3) for share in layer] for layer in shares],
    }


def main() -> None:
    """Build, train, measure, export."""
    parser = argparse.ArgumentParser(description="Train the demo model and export it in FP8.")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help="the folder to write to")
    parser.add_argument("--save-state", type=Path, help="keep the float32 weights in this file")
    parser.add_argument("--load-state", type=Path, help="export these weights, do not train")
    args = parser.parse_args()

    torch.manual_seed(SEED)
    torch.set_num_threads(THREADS)
    torch.use_deterministic_algorithms(True)
    # Every buffer here is written before it is read; filling it first costs 5 % of the time.
    torch.utils.deterministic.fill_uninitialized_memory = False
    corpus = build_corpus(SEED)
    print(f"corpus sha256 {corpus.sha256}")
    if corpus.sha256 != CORPUS_SHA256:
        print("warning: another corpus than the recorded one (other Python?)", file=sys.stderr)
    tokenizer = train_tokenizer(corpus.train_texts())
    stream = torch.tensor(training_stream(corpus, tokenizer, SEED))
    model = DemoModel(DemoConfig(vocab_size=tokenizer.get_vocab_size()))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{len(stream)} training tokens, {parameters} parameters", flush=True)
    if args.load_state:
        model.load_state_dict(torch.load(args.load_state, weights_only=True))
    else:
        train(model, stream, args.steps, args.save_state)
    before = evaluate(model, corpus.heldout, tokenizer)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "heldout.txt").write_text(corpus.heldout, encoding="utf-8")
    # The card shows figures of the stored weights. They come from a copy: the export starts from
    # the float32 weights, as quantising twice need not give what quantising once gives.
    rounded = copy.deepcopy(model)
    round_to_stored(rounded)
    figures = evaluate(rounded, corpus.heldout, tokenizer)
    figures |= {"loss_before": before["loss"], "steps": args.steps}
    for name, value in figures.items():
        print(f"heldout {name}: {value}")
    total = export_checkpoint(model, tokenizer, figures, args.out / "checkpoint")
    print(f"wrote {args.out}: {total} bytes of tensors")


if __name__ == "__main__":
    main()
