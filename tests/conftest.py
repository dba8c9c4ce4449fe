"""What the tests share: tiny random models of several families, made-up data sets, and ways to run the command line."""

import atexit
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
# Before any library is imported: nothing asks a network, nothing comes from an earlier cache, no progress bars, and
# one thread, since tiny matrices lose far more by threads that wait for each other than they gain.
HF_HOME = tempfile.mkdtemp(prefix="tests-hf-home-")
atexit.register(shutil.rmtree, HF_HOME, ignore_errors=True)
os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "HF_HOME": HF_HOME,
    "TOKENIZERS_PARALLELISM": "false",
    "TQDM_DISABLE": "1",
    "OMP_NUM_THREADS": "1",
}
# A shell that starts the tests in the background, or by nohup, has them ignore what they send themselves.
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
for name in ("HF_DATASETS_CACHE", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "TRANSFORMERS_CACHE"):
    os.environ.pop(name, None)

import pytest  # noqa: E402
import torch  # noqa: E402
from datasets import ClassLabel, Dataset, DatasetDict, Features, List, Value  # noqa: E402
from tokenizers import ByteLevelBPETokenizer, processors  # noqa: E402
from transformers import (  # noqa: E402
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    OPTConfig,
    Phi3Config,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

import main  # noqa: E402

N_LAYERS = 3
CONTEXT = 128  # tokens that the tiny models are made for
WORDS = (
    "the quick river bends under old stone bridges while seven grey herons wait for fish and a miller "
    "counts sacks of rye flour before rain clouds gather above hills where children fly paper kites"
).split()


def sentences(n: int, seed: int = 0) -> list[str]:
    """`n` made-up sentences, no two alike."""
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randint(len(WORDS), (n, 12), generator=generator).tolist()
    return [f"{' '.join(WORDS[i] for i in pick)} {number}." for number, pick in enumerate(picks)]


# --- tiny models ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Family:
    """A model family: its tiny configuration, and where its own code keeps the MLP weights.

    mlp: module name of layer {}'s MLP;  inputs, output: children of it;  width: neurons;
    width_field: what its configuration calls them.
    """

    config: type
    sizes: dict
    mlp: str = "model.layers.{}.mlp"
    inputs: tuple[str, ...] = ("gate_proj", "up_proj")
    output: str = "down_proj"
    width: int = 48
    width_field: str = "intermediate_size"

    def mlps(self) -> list[str]:
        """The names of all MLPs, in order."""
        return [self.mlp.format(index) for index in range(N_LAYERS)]


GATED = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": N_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
}
TINY_MODELS = {
    "llama": Family(LlamaConfig, GATED),
    "qwen2": Family(Qwen2Config, GATED),
    "qwen3": Family(Qwen3Config, GATED | {"head_dim": 8}),
    "gemma2": Family(Gemma2Config, GATED | {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 16}),
    "phi3": Family(Phi3Config, GATED, inputs=("gate_up_proj",)),
    "opt": Family(
        OPTConfig,
        {
            "hidden_size": 32,
            "word_embed_proj_dim": 32,
            "ffn_dim": 48,
            "num_attention_heads": 4,
            "num_hidden_layers": N_LAYERS,
            "max_position_embeddings": CONTEXT,
        },
        mlp="model.decoder.layers.{}",
        inputs=("fc1",),
        output="fc2",
        width_field="ffn_dim",
    ),
    # n_inner stays unset, as in the real checkpoints: the width is four times n_embd.
    "gpt2": Family(
        GPT2Config,
        {"n_embd": 24, "n_head": 4, "n_layer": N_LAYERS, "n_positions": CONTEXT},
        mlp="transformer.h.{}.mlp",
        inputs=("c_fc",),
        output="c_proj",
        width=96,
        width_field="n_inner",
    ),
}


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer that starts every text with its bos token, as Llama's does."""
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(sentences(50), vocab_size=320, special_tokens=["<s>", "</s>", "<pad>"])
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


def write_model(config, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """A random model with its tokenizer; weights large enough to matter, and biases and norms that are not trivial."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.15)
            else:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    model.to(dtype).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def special_tokens() -> dict:
    """The part of a configuration that has to fit the tokenizer."""
    return {"vocab_size": len(make_tokenizer()), "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """`tiny_model(family, dtype)` -> folder of a saved random model. Written once: never change it, copy it."""
    written = {}

    def model(family: str, dtype: torch.dtype = torch.float32) -> Path:
        if (family, dtype) not in written:
            config = TINY_MODELS[family].config(**TINY_MODELS[family].sizes, **special_tokens())
            written[family, dtype] = write_model(config, tmp_path_factory.mktemp(family) / "model", dtype)
        return written[family, dtype]

    return model


# --- made-up data sets ------------------------------------------------------------------------------

TEXT = Features({"text": Value("string")})
MMLU = Features(
    {
        "question": Value("string"),
        "subject": Value("string"),
        "choices": List(Value("string")),
        "answer": ClassLabel(names=["A", "B", "C", "D"]),
    }
)
HELLASWAG = Features(
    {
        "ind": Value("int32"),
        **{name: Value("string") for name in ("activity_label", "ctx_a", "ctx_b", "ctx")},
        "endings": List(Value("string")),
        **{name: Value("string") for name in ("source_id", "split", "split_type", "label")},
    }
)
WINOGRANDE = Features({name: Value("string") for name in ("sentence", "option1", "option2", "answer")})
ARC = Features(
    {
        "id": Value("string"),
        "question": Value("string"),
        "choices": {"text": List(Value("string")), "label": List(Value("string"))},
        "answerKey": Value("string"),
    }
)

# The columns and splits of the sets as they are published, and the one split that may be calibrated on.
COLUMNS = {
    "wikitext2": TEXT,
    "mmlu": MMLU,
    "hellaswag": HELLASWAG,
    "winogrande": WINOGRANDE,
    "arc_challenge": ARC,
    "arc_easy": ARC,
}
SPLITS = {
    "wikitext2": ("train", "validation", "test"),
    "mmlu": ("dev", "validation", "test"),
    "hellaswag": ("train", "validation"),
    "winogrande": ("train", "validation"),
    "arc_challenge": ("train", "validation", "test"),
    "arc_easy": ("train", "validation", "test"),
}
CALIBRATED = {
    "wikitext2": "train",
    "mmlu": "validation",
    "hellaswag": "train",
    "winogrande": "train",
    "arc_challenge": "train",
    "arc_easy": "train",
}


def made_up_row(name: str, text: str, number: int) -> dict:
    """One row of a set, with `text` in it."""
    if name == "wikitext2":
        return {"text": text}
    if name == "mmlu":
        return {
            "question": f"Which is {text}?",
            "subject": "herons",
            "choices": ["one", "two", "three", "four"],
            "answer": number % 4,
        }
    if name == "hellaswag":
        return {
            "ind": number,
            "activity_label": "Fishing",
            "ctx_a": text,
            "ctx_b": "she",
            "ctx": f"{text} she",
            "endings": ["sits.", "stands.", "waits.", "leaves."],
            "source_id": f"activitynet~v_{number}",
            "split": "train",
            "split_type": "indomain",
            "label": str(number % 4),
        }
    if name == "winogrande":
        return {
            "sentence": f"{text} because _ was late.",
            "option1": "Ada",
            "option2": "Bea",
            "answer": str(number % 2 + 1),
        }
    return {
        "id": f"X_{number}",
        "question": f"Which is {text}?",
        "answerKey": "ABCD"[number % 4],
        "choices": {"text": ["one", "two", "three", "four"], "label": list("ABCD")},
    }


def save_set(data_dir: Path, name: str, splits: dict[str, list[dict]]) -> Path:
    """Write rows in the published form of the set `name` to `data_dir/name`."""
    DatasetDict(
        {split: Dataset.from_list(rows, features=COLUMNS[name]) for split, rows in splits.items()}
    ).save_to_disk(data_dir / name)
    return data_dir / name


def save_made_up_set(data_dir: Path, name: str, n: int, mark: dict[str, str] | None = None) -> Path:
    """Write `n` made-up rows in every split of the set `name`; `mark` puts a word into each row of a split."""
    return save_set(
        data_dir,
        name,
        {
            split: [
                made_up_row(name, f"{(mark or {}).get(split, '')}{text}", number)
                for number, text in enumerate(sentences(n, seed=place))
            ]
            for place, split in enumerate(SPLITS[name])
        },
    )


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory) -> Path:
    """All six sets, made up, 40 rows a split. Written once: never change it, copy it."""
    folder = tmp_path_factory.mktemp("data")
    for name in COLUMNS:
        save_made_up_set(folder, name, 40)
    return folder


# --- the command line -------------------------------------------------------------------------------


@pytest.fixture
def run_cli(capfd, monkeypatch, tmp_path):
    """`run_cli(*args, cwd=..., env=...)` runs `main.py` in this process -> code, out, err. By default in `tmp_path`."""

    def run(*args, cwd: Path | None = None, env: dict | None = None) -> SimpleNamespace:
        capfd.readouterr()
        with monkeypatch.context() as patch:
            patch.chdir(cwd or tmp_path)
            for name, value in (env or {}).items():
                patch.setenv(name, value)
            try:
                code = main.main([str(arg) for arg in args])
            except SystemExit as leaving:
                code = leaving.code
        out, err = capfd.readouterr()
        return SimpleNamespace(code=code, out=out, err=err)

    return run


# A process that has loaded the libraries the way main.py does and forks once per command: each command meets
# the state and the real stdout and stderr of a fresh process, without seconds of imports.
FORKING = """
import gc, json, os, resource, sys, tempfile
reply = os.fdopen(os.dup(1), "w")
os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
import main
try:
    main.main(["--help"])
except SystemExit:
    pass
import encodings.utf_8_sig, lib.dry_run  # all that a child may need and may not read as another user
from transformers import LlamaForCausalLM
gc.freeze()
for line in sys.stdin:
    task = json.loads(line)
    child = os.fork()
    if not child:
        for name, number in (("out", 1), ("err", 2)):
            os.dup2(os.open(task[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        os.chdir(task["cwd"])
        os.environ.update(task["env"])
        tempfile.tempdir = None  # read TMPDIR again
        if task["largest_file"] is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (task["largest_file"], resource.RLIM_INFINITY))
        sys.argv = ["main.py", *task["args"]]
        exec(task["before"])
        sys.exit(main.main())
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), file=reply, flush=True)
"""


def fresh_environment() -> dict[str, str]:
    """This process's environment for another one that runs the project: its modules found, progress bars left to it."""
    environment = {name: value for name, value in os.environ.items() if name != "TQDM_DISABLE"}
    return environment | {"PYTHONPATH": str(ROOT)}


@pytest.fixture(scope="session")
def _forking_process():
    with subprocess.Popen(
        [sys.executable, "-c", FORKING],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=fresh_environment(),
    ) as process:
        yield process
        process.stdin.close()


@pytest.fixture
def run_fresh(_forking_process, tmp_path_factory, tmp_path):
    """As `run_cli`, in a process of its own. `largest_file` makes every write beyond so many bytes of a file fail;
    `before` is code that the process runs first."""

    def run(*args, cwd: Path | None = None, env: dict | None = None, largest_file: int | None = None, before: str = ""):
        folder = tmp_path_factory.mktemp("streams")
        task = {
            "args": [str(arg) for arg in args],
            "cwd": str(cwd or tmp_path),
            "env": env or {},
            "out": str(folder / "out"),
            "err": str(folder / "err"),
            "largest_file": largest_file,
            "before": before,
        }
        print(json.dumps(task), file=_forking_process.stdin, flush=True)
        code = int(_forking_process.stdout.readline())
        return SimpleNamespace(code=code, out=(folder / "out").read_text(), err=(folder / "err").read_text())

    return run


def files_below(folder: Path) -> dict[str, bytes | None]:
    """Every path below `folder` with its content (None for a folder): equal before and after means untouched."""
    return {
        str(path.relative_to(folder)): None if path.is_dir() else path.read_bytes()
        for path in sorted(folder.rglob("*"))
    }
