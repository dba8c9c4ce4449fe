"""Peak memory of loading a `model.bin` for evaluation, beside the checkpoint's size in the chosen dtype.

A random Llama model is saved once; each dtype is loaded in a process of its own, by lm-eval's `custom_checkpoint`
and by plain `torch.load` followed by a conversion. Memory in use before loading (the libraries) is subtracted.

    python benchmarks/loading.py --layers 12
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

MIB = 2**20


def parse() -> argparse.Namespace:
    """The command line of this benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--hidden_size", type=int, default=2048)
    parser.add_argument("--intermediate_size", type=int, default=5632)
    parser.add_argument("--saved_dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--one", nargs=3, metavar=("WAY", "DTYPE", "FILE"), help=argparse.SUPPRESS)
    return parser.parse_args()


def save(args: argparse.Namespace, folder: str) -> None:
    """Write a random model whose widths differ by layer, with a tokenizer."""
    import torch
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from lib import checkpoint, prune
    from lib.mlp import find_layers

    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=args.hidden_size,
        intermediate_size=args.intermediate_size,
        num_hidden_layers=args.layers,
        num_attention_heads=16,
        num_key_value_heads=16,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).to(getattr(torch, args.saved_dtype))
    layers = find_layers(model)
    scores = [torch.rand(block.width) for block in prune.blocks_of(layers)]
    prune.remove(model, layers, prune.select_neurons(scores, 0.2, across_layers=True))
    words = Tokenizer(WordLevel({"<s>": 0}, unk_token="<s>"))
    words = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<s>")
    checkpoint.save(Path(folder), model, layers, words, ["bin"])


def load(way: str, dtype: str, file: str) -> str:
    """Load in this process; one row of the table."""
    import torch

    from lib import memory
    from lib.lm_harness import CustomCheckpoint

    cpu, peaks = torch.device("cpu"), {}
    with memory.peak_memory(cpu, peaks, "before"):
        pass
    with memory.peak_memory(cpu, peaks, "loading"):
        if way == "custom_checkpoint":
            model = CustomCheckpoint(checkpoint=file, dtype=dtype, device="cpu").model
        else:
            model = torch.load(file, weights_only=False)["model"].to(getattr(torch, dtype))
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    used = peaks["loading"] - peaks["before"]
    return f"| {way} | {dtype} | {size / MIB:.0f} | {used / MIB:.0f} | {used / size:.2f} |"


def main() -> None:
    """Save, then load in every way and dtype."""
    args = parse()
    if args.one:
        print(load(*args.one))
        return
    with tempfile.TemporaryDirectory() as folder:
        save(args, folder)
        print(
            f"random Llama, hidden size {args.hidden_size}, {args.layers} layers, 20% of the MLPs removed across "
            f"layers, saved in {args.saved_dtype}\n"
        )
        print("| way | dtype | checkpoint MiB | peak MiB | ratio |\n|---|---|---:|---:|---:|")
        for way in ("custom_checkpoint", "torch.load"):
            for dtype in ("float32", "bfloat16", "float16"):
                command = [sys.executable, __file__, "--one", way, dtype, f"{folder}/model.bin"]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                print(done.stdout.strip().splitlines()[-1], flush=True)


if __name__ == "__main__":
    main()
