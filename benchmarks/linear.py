"""Seconds of scoring at three sizes each of samples, tokens and layers: the cost per sample, token and layer stays.

    python benchmarks/linear.py

Random Llama models without a vocabulary worth mentioning; the first run of every size is not counted.
"""

import argparse
import sys
import time
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lib import prune  # noqa: E402
from lib.mlp import find_layers  # noqa: E402
from lib.sums import InMemory  # noqa: E402
from lib.tape import collate  # noqa: E402

SIZES = {"samples": (4, 8, 16), "tokens": (128, 256, 512), "layers": (4, 8, 16)}
BASE = {"samples": 4, "tokens": 256, "layers": 8}


def parse() -> argparse.Namespace:
    """The command line of this benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden_size", type=int, default=512)
    parser.add_argument("--intermediate_size", type=int, default=1536)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--cuda", action="store_true")
    return parser.parse_args()


def seconds(args: argparse.Namespace, samples: int, tokens: int, layers: int) -> float:
    """The shorter of two runs, after one to warm up."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=args.hidden_size,
        intermediate_size=args.intermediate_size,
        num_hidden_layers=layers,
        num_attention_heads=8,
        max_position_embeddings=tokens,
    )
    model = LlamaForCausalLM._from_config(config, dtype=getattr(torch, args.dtype)).eval()
    model.to("cuda" if args.cuda else "cpu")
    found = find_layers(model)
    batches = collate([torch.randint(0, 64, (tokens,)) for _ in range(samples)], 1)
    times = []
    for _ in range(3):
        start = time.perf_counter()
        prune.score(model, found, batches, prune.METHODS["structured_afr"], "trimmed_mean", InMemory())
        times.append(time.perf_counter() - start)
    return min(times[1:])


def main() -> None:
    """Print one Markdown row per size."""
    args = parse()
    print(
        f"Llama, hidden size {args.hidden_size}, MLP {args.intermediate_size}, {args.dtype}; "
        f"where nothing else is said {', '.join(f'{n} {name}' for name, n in BASE.items())}\n"
    )
    print("| | seconds | ms for each of them |\n|---|---:|---:|")
    for name, sizes in SIZES.items():
        for size in sizes:
            took = seconds(args, **BASE | {name: size})
            print(f"| {size} {name} | {took:.2f} | {took / size * 1000:.2f} |", flush=True)


if __name__ == "__main__":
    main()
