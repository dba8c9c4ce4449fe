"""lm-eval with two more models: `custom_checkpoint`, a `model.bin` or a `.gguf` file, and `pruned_folder`, a folder of
differing widths.

    python -m lib.lm_harness --model custom_checkpoint \\
        --model_args pretrained=BASE,checkpoint=DIR/model.bin,device_map=auto,dtype=float16 \\
        --tasks arc_easy,hellaswag --batch_size auto

    python -m lib.lm_harness --model pruned_folder --model_args pretrained=DIR --tasks arc_easy

`pruned_folder` takes the arguments of lm-eval's `hf` and runs no code in the folder: this repository has the same.
`--trust_checkpoint` (or trust_checkpoint=True among the model's arguments) unpickles a file that names more than a
saved model needs. Everything else is lm-eval's own command line, with all its subcommands and models. From another
folder, put the repository's root in PYTHONPATH. `accelerate launch -m lib.lm_harness ...` shares the questions among
processes.
"""

import os
import sys
from pathlib import Path

from lib import terminal

# The libraries read these when they are imported.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if not terminal.watched():
    os.environ.setdefault("TQDM_DISABLE", "1")

from lib import modeling_pruned, remote_code
from lib.devices import checked_dtype, placement, spread_over_gpus
from lib.errors import UserError

try:
    # This import also fills lm-eval's registry with the built-in models; to register ours first would hide them.
    from lm_eval.models.huggingface import HFLM
except ImportError as error:
    if __name__ != "__main__":
        raise
    print(f"error: lm-eval is needed: pip install -r requirements-eval.txt ({error})", file=sys.stderr)
    sys.exit(2)
from lm_eval.api.registry import register_model
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

CPU_BATCH = 4
TRUST_FLAG = "--trust_checkpoint"
# Arguments of `--model hf` that mean the same here. The others would have no effect, so they are refused.
PASSED_ON = {
    "add_bos_token", "backend", "batch_size", "chat_template_args", "enable_thinking", "logits_cache",
    "max_batch_size", "max_length", "mixed_precision_dtype", "prefix_token_id", "revision", "softmax_dtype",
    "think_end_token", "tokenizer", "truncation", "trust_remote_code", "use_fast_tokenizer",
}  # fmt: skip
# How those errors of lm-eval begin that are the user's to mend; it lets them end in a traceback.
MENDABLE = (
    "Tasks not found",
    "No tasks specified",
    "Attempted to load model",
    "The checkpoint you are trying to load",
)


@register_model("custom_checkpoint")
class CustomCheckpoint(HFLM):
    """A pruned model and its tokenizer from a `model.bin`, evaluated as lm-eval's `hf` evaluates a folder."""

    def __init__(self, checkpoint=None, pretrained=None, trust_checkpoint=False, dtype="auto", device_map=None,
                 device="cuda:0", parallelize=False, **options):  # fmt: skip
        """Load `checkpoint`: a `model.bin`, the folder that holds one, or a `.gguf` file.

        `dtype` "auto" keeps what was saved.

        `pretrained` names the dense model in the results, and gives the tokenizer where the checkpoint has none;
        its weights are never loaded. `device_map` "auto" spreads the model over the GPUs, if there are any.
        Raises UserError for a checkpoint that cannot be loaded and for arguments that do not apply to one.
        """
        if not checkpoint:
            raise UserError("--model custom_checkpoint: needs --model_args checkpoint=FOLDER/model.bin")
        if unknown := sorted(options.keys() - PASSED_ON):
            raise UserError(
                f"--model_args {unknown[0]}={options[unknown[0]]}: custom_checkpoint takes no such argument"
            )
        self._requested = str(checkpoint), checked_dtype(dtype), trust_checkpoint is True
        self._base = str(pretrained) if pretrained else None
        self._spread, device = placement(device_map or ("auto" if parallelize else None), device)
        super().__init__(str(checkpoint), dtype=dtype, device=device, parallelize=bool(self._spread), **options)
        if hasattr(self, "accelerator"):  # lm-eval itself shares the work only among GPUs
            self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes

    # The three steps that lm-eval splits loading into, in its order.

    def _get_config(self, pretrained, **unused):
        from lib.builder import find_source
        from lib.checkpoint import load_bin
        from lib.gguf_file import is_gguf

        checkpoint, dtype, _ = self._requested
        if is_gguf(Path(checkpoint)):
            self._model, self._saved_tokenizer = find_source(checkpoint, "").load(dtype)
        else:
            self._model, self._saved_tokenizer = load_bin(*self._requested)
        self._config = self._model.config

    def _create_tokenizer(self, pretrained, tokenizer, add_bos_token=None, **options):
        if tokenizer or self._saved_tokenizer is None:
            name = tokenizer or self._base
            if not name:
                raise UserError(f"{pretrained}: holds no tokenizer; name one with --model_args tokenizer=NAME")
            super()._create_tokenizer(name, None, add_bos_token=add_bos_token, **options)
            return
        self.tokenizer = self._saved_tokenizer
        if add_bos_token is not None:
            self.tokenizer.add_bos_token = add_bos_token

    def _create_model(self, *unused, **also_unused):
        if self._spread:
            self._model = spread_over_gpus(self._model, self._spread)
        else:
            self._model.to(self.accelerator.device if hasattr(self, "accelerator") else self.device)

    def _detect_batch_size(self, requests=None, pos=0):
        # The search for the largest batch ends when memory runs out; without a GPU, so does the process.
        if self.device.type == "cpu":
            return min(CPU_BATCH, self.max_batch_size)
        return super()._detect_batch_size(requests, pos)

    def get_model_info(self):
        """What the results file says of the model; lm-eval's own asks the Hub about `pretrained`."""
        return {"model_num_parameters": self.model.num_parameters(), "model_dtype": self.model.dtype}


@register_model("pruned_folder")
class PrunedFolder(HFLM):
    """A Hugging Face folder whose widths differ by layer, built by the code here instead of its copy in the folder."""

    def _get_config(self, pretrained, **options):
        super()._get_config(pretrained, **options)
        if type(self._config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
            raise UserError(
                f"pretrained={pretrained}: is no causal language model; a LLaVA is evaluated with lmms-eval.sh"
            )
        self.AUTO_MODEL_CLASS = modeling_pruned.pruned(MODEL_FOR_CAUSAL_LM_MAPPING[type(self._config)])


def main() -> int:
    """Run lm-eval's command line; returns the exit code: 0, 2 for what the user can mend, 130 when interrupted."""
    from lm_eval.__main__ import cli_evaluate

    remote_code.never_ask()
    if TRUST_FLAG in sys.argv:
        place = sys.argv.index(TRUST_FLAG)
        sys.argv[place : place + 1] = ["--model_args", "trust_checkpoint=True"]
    try:
        cli_evaluate()
        return 0
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except (UserError, OSError) as error:
        reason = error
    except ValueError as error:
        if not (str(error).startswith(MENDABLE) or remote_code.is_refusal(error)):
            raise
        reason = error
    if os.environ.get("RANK", "0") == "0":
        print(f"error: {' '.join(str(reason).split())[:400]}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
