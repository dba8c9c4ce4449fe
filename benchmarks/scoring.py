"""Seconds and memory of scoring, beside what the arithmetic must cost on this machine and beside the plain way.

    python benchmarks/scoring.py --model MODEL.gguf --nsamples 8 --seqlen 512
    python benchmarks/scoring.py --config llama-3-8b --cuda --nsamples 128
    python benchmarks/scoring.py --config llama-3-70b --layers 8 --offload cpu --cuda

The plain way builds the graph of the whole model, takes `autograd.grad` of each objective over all MLP weights and
sorts; it runs in `--plain_dtype`. Every measurement has a process of its own. With `--layers` the cost is measured
with that many layers and with half of them, and extrapolated to the configuration's own number.
"""

import argparse
import json
import math
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

GIB = 2**30
LLAMA = {"vocab_size": 128256, "num_key_value_heads": 8, "rope_theta": 500000.0}
CONFIGS = {
    "smollm2": {"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
                "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True},
    "llama-2-7b": {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
                   "num_attention_heads": 32},
    "llama-3-8b": LLAMA | {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
                           "num_attention_heads": 32},
    "llama-3-70b": LLAMA | {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
                            "num_attention_heads": 64},
}  # fmt: skip
KINDS = ("matrix products", "attention", "reductions", "the rest")


def parse() -> argparse.Namespace:
    """The command line of this benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder, .gguf file or Hub name")
    parser.add_argument("--config", choices=list(CONFIGS), help="random weights of this shape instead of a model")
    parser.add_argument("--layers", type=int, help="with --config: measure so many layers and extrapolate")
    parser.add_argument("--nsamples", type=int, default=8)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32", "float16"])
    parser.add_argument("--plain_dtype", default="float32", choices=["bfloat16", "float32", "float16"])
    parser.add_argument("--plain_samples", type=int, default=2, help="0 leaves the plain way out")
    parser.add_argument("--offload", default="none", choices=["none", "cpu", "disk"])
    parser.add_argument("--cuda", action="store_true")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if bool(args.model) == bool(args.config):
        parser.error("give --model or --config")
    return args


# --- the model and its samples ----------------------------------------------------------------------


def load(args, dtype: str):
    """`(model, layers, placement, samples)`: random tokens, which cost what any tokens cost."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from lib import builder
    from lib.mlp import find_layers
    from lib.offload import Resources

    builder.quiet_libraries()
    if args.model:
        loaded = builder.load(args.model, dtype, args.cuda, seqlen=args.seqlen, offload=args.offload)
        model, layers, placement = loaded.model, loaded.layers, loaded.placement
    else:
        config = LlamaConfig(**CONFIGS[args.config] | {"max_position_embeddings": args.seqlen})
        config.num_hidden_layers = args.layers or config.num_hidden_layers
        device = torch.device("cuda" if args.cuda else "cpu")
        with torch.device(device if args.offload == "none" else "cpu"):
            model = LlamaForCausalLM._from_config(config, dtype=getattr(torch, dtype)).eval()
        layers = find_layers(model)
        placement = Resources(device, getattr(torch, dtype), args.offload).place(model, layers)
    torch.manual_seed(0)
    samples = [torch.randint(0, model.config.vocab_size, (args.seqlen,)) for _ in range(args.nsamples)]
    return model, layers, placement, samples


def arithmetic(model, layers) -> dict[str, int]:
    """Floating-point operations per token of what scoring must multiply, and the parameters they come from.

    Forward and recomputation 2 P each, two backwards of 2 P + 2 M each, the head 2 H forward and 2 H back: P, M and H
    are the elements of the layers' and the MLPs' matrices and of the output head.
    """
    in_layers = sum(p.numel() for layer in layers for p in layer.module.parameters() if p.ndim == 2)
    in_mlps = sum(layer.block.n_weights for layer in layers)
    in_head = model.get_output_embeddings().weight.numel()
    return {
        "P": in_layers,
        "M": in_mlps,
        "H": in_head,
        "flop": 2 * 2 * in_layers + 2 * (2 * in_layers + 2 * in_mlps) + 4 * in_head,
    }


def matrix_rate(layers, tokens: int, dtype, device) -> float:
    """Operations per second of this machine's products at the shapes of one layer, as many as a sample takes."""
    import torch

    shapes = [tuple(p.shape) for p in layers[0].module.parameters() if p.ndim == 2]
    mlp = [tuple(m.weight.shape) for m in layers[0].block.modules]
    made = {shape: torch.randn(shape, dtype=dtype, device=device) for shape in set(shapes)}
    sides = {n: torch.randn(tokens, n, dtype=dtype, device=device) for shape in shapes for n in shape}

    def once():
        for rows, columns in shapes:
            weight, entered, left = made[rows, columns], sides[columns], sides[rows]
            for _ in range(2):
                entered @ weight.t()
                left @ weight
        for rows, columns in mlp:
            for _ in range(2):
                sides[rows].t() @ sides[columns]

    work = 2 * tokens * (4 * sum(r * c for r, c in shapes) + 2 * sum(r * c for r, c in mlp))
    return work / best_seconds(once, device)


def best_seconds(run, device, repeats: int = 7) -> float:
    """The shortest of several runs, after two to warm up."""
    import torch

    times = []
    for number in range(repeats + 2):
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if number > 1:
            times.append(time.perf_counter() - start)
    return min(times)


# --- one measurement, in a process of its own -------------------------------------------------------


def ours(args) -> dict:
    """Seconds per sample and peak memory of the engine, and what it is compared with."""
    import torch

    from lib import memory, prune
    from lib.sums import InMemory
    from lib.tape import HiddenStates, collate

    model, layers, placement, samples = load(args, args.dtype)
    device, peaks = placement.main, {}
    batches = collate(samples, 1)

    def score(some):
        with HiddenStates(pinned=device.type == "cuda") as hidden:
            prune.score(model, layers, some, prune.METHODS["structured_afr"], "trimmed_mean", InMemory(), placement,
                        hidden)  # fmt: skip

    score(batches[:1])
    with memory.peak_memory(device, peaks, "before"):
        pass
    start = time.perf_counter()
    with memory.peak_memory(device, peaks, "scoring"):
        score(batches)
    seconds = (time.perf_counter() - start) / len(samples)
    dtype = getattr(torch, args.dtype)
    layer = sum(p.numel() for p in layers[0].module.parameters())
    states = len(samples) * args.seqlen * model.config.get_text_config().hidden_size * dtype.itemsize
    weights = sum(p.numel() * dtype.itemsize for p in model.parameters())
    return arithmetic(model, layers) | {
        "seconds": seconds,
        "rate": matrix_rate(layers, args.seqlen, dtype, device),
        "beyond": peaks["scoring"] - (peaks["before"] if device.type == "cpu" else weights),
        "peak": peaks["scoring"],
        "weights": weights,
        "hidden": 0 if device.type == "cuda" else (len(layers) + 3) * states,
        "layer": layer * dtype.itemsize,
        "mlp": layers[0].block.n_weights,
    }


def plain(args) -> dict:
    """The same work done the plain way, for as many samples as asked for."""
    import torch
    from torch.nn import functional as F

    from lib import memory

    model, layers, placement, samples = load(args, args.plain_dtype)
    device, peaks = placement.main, {}
    modules = [module for layer in layers for module in layer.block.modules]
    weights = [module.weight.requires_grad_(True) for module in modules]

    def score(ids):
        outputs = {}
        hooks = [m.register_forward_hook(lambda m, _, y: outputs.__setitem__(m, y)) for m in modules]
        logits = model(ids[None].to(device), use_cache=False).logits
        for hook in hooks:
            hook.remove()
        entropy = F.cross_entropy(logits[0, :-1].float(), ids[1:].to(device))
        norms = sum(torch.linalg.vector_norm(outputs[m], dtype=torch.float32) for m in modules)
        for module in modules:  # the objective as it is defined
            torch.linalg.svdvals(outputs[module].detach().flatten(1).float().cpu())
        for objective in (norms, entropy):
            slopes = torch.autograd.grad(objective, weights, retain_graph=True)
            for start in range(0, len(slopes), 3):
                gate, up, down = (w.detach() * g for w, g in zip(weights[start : start + 3], slopes[start : start + 3]))
                rows = (gate.float() + up.float() + down.t().float()).sort(-1).values
                drop = int(0.02 * rows.shape[-1])
                rows[:, drop : rows.shape[-1] - drop].mean(-1).abs()

    score(samples[0])
    with memory.peak_memory(device, peaks, "before"):
        pass
    start = time.perf_counter()
    with memory.peak_memory(device, peaks, "plain"):
        for ids in samples[: args.plain_samples]:
            score(ids)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    # What the process holds after the first sample is the model and memory that is free for the next one.
    return {
        "seconds": (time.perf_counter() - start) / args.plain_samples,
        "beyond": peaks["plain"] - (baseline(args.plain_dtype, args) if device.type == "cpu" else size),
    }


def baseline(dtype: str, args) -> int:
    """Peak of a process that only loads the model."""
    return measure("loaded", args, dtype=dtype)["peak"]


def loaded(args) -> dict:
    """Memory of the process with the model alone."""
    from lib import memory

    _, _, placement, _ = load(args, args.dtype)
    peaks = {}
    with memory.peak_memory(placement.main, peaks, "loaded"):
        pass
    return {"peak": peaks["loaded"]}


def profile(args) -> dict[str, float]:
    """Seconds per sample by kind of work, on the CPU.

    Reductions are timed by the clock, in a run without the profiler: its overhead would double these short steps.
    """
    import torch
    from torch.profiler import record_function

    import lib.score
    from lib import attention, prune
    from lib.sums import InMemory
    from lib.tape import collate

    if args.one == "profile plain kernels":
        attention.LONGEST = {}
        lib.score.AT_ONCE_IN_CACHE = 2**40
        prune.trimmed_moments = lambda rows, with_std=False: (_torch_sorted(rows).mean(-1), None)
    reduce, spent = lib.score._reduce, []

    def timed(*arguments):
        with record_function("reduction"):
            start = time.perf_counter()
            reduce(*arguments)
            spent.append(time.perf_counter() - start)

    lib.score._reduce = timed
    model, layers, placement, samples = load(args, args.dtype)
    batches = collate(samples[: max(args.nsamples // 4, 1)], 1)

    def score():
        spent.clear()
        prune.score(model, layers, batches, prune.METHODS["structured_afr"], "trimmed_mean", InMemory(), placement)

    score()
    score()
    seconds = dict.fromkeys(KINDS, 0.0) | {"reductions": sum(spent) / len(batches)}
    with torch.profiler.profile() as found:
        score()
    for event in found.events():
        kind = kind_of(event)
        if kind != "reductions":
            seconds[kind] += event.self_cpu_time_total / 1e6 / len(batches)
    return seconds


def _torch_sorted(rows):
    drop = int(0.02 * rows.shape[-1])
    return rows.sort(-1).values[..., drop : rows.shape[-1] - drop]


def kind_of(event) -> str:
    """What an operation is for, by its name and those of the operations around it."""
    names, around = [], event
    while around is not None:
        names.append(around.name)
        around = around.cpu_parent
    if any("scaled_dot_product" in name or "_Blockwise" in name for name in names):
        return "attention"
    if event.name in ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm"):
        return "matrix products"
    return "reductions" if "reduction" in names else "the rest"


def kept(args) -> dict:
    """The neurons that stay at 20% and 50%, per layer and across layers."""
    from lib import prune
    from lib.sums import InMemory
    from lib.tape import collate

    model, layers, placement, samples = load(args, args.dtype)
    method = prune.METHODS["structured_afr"]
    sums = prune.score(model, layers, collate(samples, 1), method, "trimmed_mean", InMemory(), placement)
    return {
        f"{ratio:.0%} {'global' if across else 'per layer'}": [
            k.tolist() for k in prune.select(layers, sums, method, ratio, across).kept
        ]
        for ratio in (0.2, 0.5)
        for across in (False, True)
    }


def measure(what: str, args, **changed) -> dict:
    """Run one measurement in a process of its own."""
    flags = vars(args) | {"one": what} | changed
    command = [sys.executable, __file__]
    for name, value in flags.items():
        if value is not None and value is not False:
            command += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["killed"])[-1]
        raise RuntimeError(f"{what}: {reason}")
    return json.loads(done.stdout.splitlines()[-1])


MEASUREMENTS = {"ours": ours, "plain": plain, "loaded": loaded, "kept": kept, "profile": profile,
                "profile plain kernels": profile}  # fmt: skip


# --- the report -------------------------------------------------------------------------------------


def main() -> None:
    """Measure everything, print tables."""
    args = parse()
    if args.one:
        print(json.dumps(MEASUREMENTS[args.one](args)))
        return
    name = args.config or Path(args.model).name
    print(f"{name}, structured_afr, {args.nsamples} samples of {args.seqlen} tokens, {args.dtype}\n", flush=True)
    found = measure("ours", args)
    print_cost(args, found)
    if args.layers:
        print_extrapolated(args, found)
    if args.plain_samples:
        print_beside_plain(args, found)
    if not args.cuda and args.offload == "none":
        print_kinds(args)
    if args.model:
        print_agreement(args)


def print_cost(args, found: dict) -> None:
    """Arithmetic, rates and memory."""
    achieved = found["flop"] * args.seqlen / found["seconds"]
    print(f"- {found['seconds']:.3f} s a sample, {args.seqlen / found['seconds']:.0f} tokens/s")
    print(
        f"- arithmetic: {found['flop'] / 1e9:.2f} GFLOP a token (P {found['P'] / 1e6:.0f} M, "
        f"M {found['M'] / 1e6:.0f} M, H {found['H'] / 1e6:.0f} M), "
        f"{found['flop'] * args.seqlen / 1e9:.0f} GFLOP a sample"
    )
    print(
        f"- achieved {achieved / 1e9:.0f} GFLOP/s; matrix products alone at these shapes {found['rate'] / 1e9:.0f} "
        f"GFLOP/s: {achieved / found['rate']:.2f} of it"
    )
    # One layer at work: its activations aside, its MLP's weights, two gradients and M in float32.
    count = found["hidden"] + found["layer"] + 4 * 4 * found["mlp"]
    print(
        f"- peak memory {found['peak'] / GIB:.2f} GiB; beyond the weights {found['beyond'] / GIB:.2f} GiB; count: "
        f"hidden states {found['hidden'] / GIB:.2f}, one MLP in float32, four times {16 * found['mlp'] / GIB:.2f} "
        f"({count / GIB:.2f} with its weights)\n",
        flush=True,
    )


def print_extrapolated(args, found: dict) -> None:
    """The cost with all layers of the configuration, from that with `--layers` and with half of them."""
    half = measure("ours", args, layers=math.ceil(args.layers / 2))
    step = args.layers - math.ceil(args.layers / 2)
    per_layer = (found["seconds"] - half["seconds"]) / step
    whole = CONFIGS[args.config]["num_hidden_layers"]
    seconds = found["seconds"] + (whole - args.layers) * per_layer
    print(f"- {per_layer:.3f} s a layer and sample; {whole} layers: {seconds:.2f} s a sample (extrapolated)\n")


def print_beside_plain(args, found: dict) -> None:
    """Ratios of time and memory to the plain way, in its dtype and in ours."""
    columns = (
        "the plain way in",
        "s a sample",
        "beyond the weights, GiB",
        "time: plain / ours",
        "memory: ours / plain",
    )
    print(f"| {' | '.join(columns)} |\n|---|---:|---:|---:|---:|")
    for dtype in dict.fromkeys((args.plain_dtype, args.dtype)):
        try:
            other = measure("plain", args, plain_dtype=dtype)
        except RuntimeError as error:
            print(f"| {dtype} | {str(error)[:60]} | | | |")
            continue
        print(
            f"| {dtype} | {other['seconds']:.2f} | {other['beyond'] / GIB:.2f} | "
            f"{other['seconds'] / found['seconds']:.2f} | {found['beyond'] / other['beyond']:.2f} |",
            flush=True,
        )
    print()


def print_kinds(args) -> None:
    """Where the time goes, with PyTorch's own kernels and with ours."""
    before, after = measure("profile plain kernels", args), measure("profile", args)
    print("| s a sample, profiled | fused attention, torch.sort | | as it is | |\n|---|---:|---:|---:|---:|")
    for kind in KINDS:
        shares = (before[kind] / sum(before.values()), after[kind] / sum(after.values()))
        print(f"| {kind} | {before[kind]:.2f} | {shares[0]:.0%} | {after[kind]:.2f} | {shares[1]:.0%} |")
    print(flush=True)


def print_agreement(args) -> None:
    """The share of neurons that stay whether scores are computed in `--dtype` or in float32."""
    if args.dtype == "float32":
        return
    low, full = measure("kept", args), measure("kept", args, dtype="float32")
    print(f"| neurons that stay in both, {args.dtype} and float32 | share |\n|---|---:|")
    for name, wanted in full.items():
        pairs = list(zip(wanted, low[name], strict=True))
        common = sum(len(set(a) & set(b)) for a, b in pairs) / sum(len(a) for a, _ in pairs)
        print(f"| {name} | {common:.1%} |")


if __name__ == "__main__":
    main()
