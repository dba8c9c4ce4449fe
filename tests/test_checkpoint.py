"""Every saved form is loaded back by what its users load it with; what is hostile or damaged is refused."""

import json
import os
import pickle
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from conftest import GATED, special_tokens, write_model
from families import FAMILIES, FIXED_WIDTH, WIDTH_BY_LAYER, build
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from lib import checkpoint, target
from lib.errors import OutOfMemory, UserError
from lib.mlp import find_layers
from lib.prune import blocks_of, remove, select_neurons

ROOT = Path(__file__).resolve().parents[1]
IDS = torch.tensor([[5, 6, 7, 9, 11]])


def pruned_model(family, differing):
    model, _ = build(family)
    layers = find_layers(model)
    generator = torch.Generator().manual_seed(1)
    scores = [torch.rand(b.width, generator=generator) for b in blocks_of(layers)]
    remove(model, layers, select_neurons(scores, 0.4, across_layers=differing))
    return model, layers


def tokenizer():
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    words = Tokenizer(WordLevel({"a": 0, "b": 1}, unk_token="a"))
    words.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words)


def saved(folder, family="llama", differing=True, formats=("hf", "bin")):
    model, layers = pruned_model(family, differing)
    with target.reserve(str(folder)) as place, place.writing() as partial:
        checkpoint.save(partial, model, layers, tokenizer(), formats)
        place.put(partial)
    return model


@torch.no_grad()
def logits(model):
    return model(IDS).logits


def assert_same(found, model):
    torch.testing.assert_close(logits(found), logits(model), rtol=0, atol=0)


# --- every family, every form -----------------------------------------------------------------------


@pytest.mark.parametrize("differing", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_folder_loads_generates_and_saves_again(tmp_path, family, differing):
    model = saved(tmp_path / "once", family, differing, ["hf"])
    remote = differing and family not in WIDTH_BY_LAYER or family in FIXED_WIDTH
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "once", trust_remote_code=remote or None)
    assert_same(found, model)
    assert found.generate(IDS, max_new_tokens=3, min_new_tokens=3, do_sample=False).shape == (1, 8)
    found.save_pretrained(tmp_path / "twice")
    assert_same(AutoModelForCausalLM.from_pretrained(tmp_path / "twice", trust_remote_code=remote or None), model)
    assert (tmp_path / "twice" / "modeling_pruned.py").exists() == remote


@pytest.mark.parametrize("differing", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_model_bin_is_rebuilt_with_equal_logits(tmp_path, family, differing):
    model = saved(tmp_path / "out", family, differing, ["bin"])
    found, words = checkpoint.load_bin(tmp_path / "out")
    assert_same(found, model)
    assert words("b a b")["input_ids"] == [1, 0, 1]
    assert found.generate(IDS, max_new_tokens=2, do_sample=False).shape[0] == 1


@pytest.mark.parametrize("family", ["apertus", "gemma4"])
def test_model_bin_is_rebuilt_when_it_was_saved_after_a_folder(tmp_path, family):
    model = saved(tmp_path / "out", family, True, ["hf", "bin"])
    assert_same(checkpoint.load_bin(tmp_path / "out")[0], model)
    assert_same(torch.load(tmp_path / "out" / "model.bin", weights_only=False)["model"], model)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in WIDTH_BY_LAYER])
def test_differing_widths_without_trust_fail_loudly(tmp_path, family):
    saved(tmp_path / "out", family, True, ["hf"])
    with pytest.raises(Exception):  # noqa: B017  transformers chooses the kind; silence would be the fault
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_both_forms_load_in_a_fresh_process_without_this_repository(tmp_path):
    model = saved(tmp_path / "out")
    torch.save(logits(model), tmp_path / "logits.pt")
    program = """
        import sys, torch
        from transformers import AutoModelForCausalLM
        folder, ids = sys.argv[1], torch.tensor([[5, 6, 7, 9, 11]])
        wanted = torch.load(folder + "/../logits.pt")
        held = torch.load(folder + "/model.bin", weights_only=False)
        assert torch.equal(AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)(ids).logits, wanted)
        assert torch.equal(held["model"](ids).logits, wanted) and sorted(held) == ["model", "tokenizer"]
        assert "lib" not in sys.modules
        print("same")
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), str(tmp_path / "out")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.stdout.endswith("same\n"), done.stderr


def test_weights_come_in_the_dtype_asked_for(tmp_path):
    model = saved(tmp_path / "out", formats=["bin"])
    found, _ = checkpoint.load_bin(tmp_path / "out", torch.bfloat16)
    state = model.state_dict()
    for name, weight in found.state_dict().items():
        assert weight.dtype == torch.bfloat16
        assert torch.equal(weight, state[name].bfloat16())


def test_tied_embeddings_stay_tied(tmp_path):
    saved(tmp_path / "out", "gemma", formats=["bin"])
    found, _ = checkpoint.load_bin(tmp_path / "out")
    assert found.get_output_embeddings().weight is found.get_input_embeddings().weight


def test_a_model_that_recorded_hidden_states_is_saved_and_rebuilt(tmp_path):
    model, layers = pruned_model("llama", True)
    model(IDS, output_hidden_states=True)
    checkpoint.save(tmp_path, model, layers, tokenizer(), ["bin"])
    found, _ = checkpoint.load_bin(tmp_path)
    assert len(found(IDS, output_hidden_states=True).hidden_states) == 4


# --- verification -----------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["hf", "bin"])
def test_verification_notices_a_form_that_computes_something_else(tmp_path, form):
    model = saved(tmp_path / "out", formats=[form])
    checkpoint.verify(tmp_path / "out", model, {"input_ids": IDS}, [form])
    with torch.no_grad():
        model.get_input_embeddings().weight.add_(0.05)
    with pytest.raises(UserError, match="is not the pruned model"):
        checkpoint.verify(tmp_path / "out", model, {"input_ids": IDS}, [form])


def edit_config(folder, **fields):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))


def test_verification_compares_logits(tmp_path):
    model = saved(tmp_path / "out", differing=False, formats=["hf"])
    edit_config(tmp_path / "out", hidden_act="gelu")  # no weight tells
    with pytest.raises(UserError, match="its logits differ"):
        checkpoint.verify(tmp_path / "out", model, {"input_ids": IDS}, ["hf"])


@pytest.mark.parametrize("form", ["hf", "bin"])
def test_verification_compares_weights(tmp_path, form):
    model = saved(tmp_path / "out", formats=[form])
    with torch.no_grad():
        model.model.embed_tokens.weight[3].add_(1e-6)  # no logits tell: the token does not occur
    assert 3 not in IDS
    with pytest.raises(UserError, match=r"embed_tokens\.weight differs"):
        checkpoint.verify(tmp_path / "out", model, {"input_ids": IDS}, [form])


def overflow(model):
    """Weights that are finite in float16, and activations that are not."""
    with torch.no_grad():
        for projection in (model.model.layers[1].mlp.up_proj, model.model.layers[1].mlp.down_proj):
            projection.weight.mul_(3e4 / projection.weight.abs().max())
    return model.half()


def overflowing(folder, formats):
    model, layers = pruned_model("llama", False)
    checkpoint.save(folder, overflow(model), layers, tokenizer(), formats)
    assert not logits(model).isfinite().all() and all(weight.isfinite().all() for weight in model.parameters())
    return model


@pytest.mark.parametrize("form", ["hf", "bin"])
def test_float16_that_overflows_is_verified_in_float32(tmp_path, form):
    model = overflowing(tmp_path, [form])
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    checkpoint.verify(tmp_path, model, {"input_ids": IDS}, [form])
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, before[name]) and weight.dtype == before[name].dtype


def test_what_only_logits_see_is_seen_where_float16_overflows(tmp_path):
    model = overflowing(tmp_path, ["hf"])
    edit_config(tmp_path, hidden_act="gelu")
    with pytest.raises(UserError, match="its logits differ"):
        checkpoint.verify(tmp_path, model, {"input_ids": IDS}, ["hf"])


def test_a_model_that_computes_no_numbers_is_said_to(tmp_path):
    model = saved(tmp_path / "out", formats=["hf"])
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(UserError, match="NaN") as caught:
        checkpoint.verify(tmp_path / "out", model, {"input_ids": IDS}, ["hf"])
    assert "\n" not in str(caught.value) and "is not the pruned model" not in str(caught.value)


def test_tokens_that_a_model_forbids_do_not_disturb_verification(tmp_path, monkeypatch):
    model = saved(tmp_path / "out", formats=["hf"])
    computed = checkpoint.logits_in
    monkeypatch.setattr(checkpoint, "logits_in", lambda *args: computed(*args).index_fill(-1, IDS[0], -torch.inf))
    checkpoint.verify(tmp_path / "out", model, {"input_ids": IDS}, ["hf"])
    edit_config(tmp_path / "out", rms_norm_eps=1.0)
    with pytest.raises(UserError, match="its logits differ"):
        checkpoint.verify(tmp_path / "out", model, {"input_ids": IDS}, ["hf"])


@pytest.mark.parametrize("error", [
    MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes"),
    torch.OutOfMemoryError("CUDA out of memory"),
], ids=lambda error: type(error).__name__)  # fmt: skip
def test_memory_that_runs_out_while_verifying_is_no_difference(tmp_path, monkeypatch, error):
    model = saved(tmp_path / "out")

    def fail(*_):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "load_folder", fail)
        with pytest.raises(type(error)):
            checkpoint.verify(tmp_path / "out", model, {"input_ids": IDS}, ["hf"])
    monkeypatch.setattr(checkpoint, "rebuild", fail)
    with pytest.raises(OutOfMemory, match="does not fit into memory"):
        checkpoint.verify(tmp_path / "out", model, {"input_ids": IDS}, ["bin"])


def test_a_float16_checkpoint_that_overflows_is_pruned_and_saved(tmp_path, run_cli, data_dir):
    source = write_model(LlamaConfig(**GATED, **special_tokens()), tmp_path / "source")
    overflow(AutoModelForCausalLM.from_pretrained(source)).save_pretrained(source)
    command = ["--model", source, "--data_dir", data_dir, "--nsamples", 2, "--seqlen", 32, "--pruning_ratio", 0.25]
    done = run_cli(*command, "--save_format", "both", "--save_model", tmp_path / "out")
    assert (done.code, done.err) == (0, "") and "same logits" in done.out
    for found in (AutoModelForCausalLM.from_pretrained(tmp_path / "out"), checkpoint.load_bin(tmp_path / "out")[0]):
        assert found.dtype == torch.float16 and found.config.intermediate_size == 36


# --- hostile and damaged files ----------------------------------------------------------------------


class Hostile:
    def __init__(self, call, *arguments):
        self.call, self.arguments = call, arguments

    def __reduce__(self):
        return self.call, self.arguments


@pytest.mark.parametrize(
    "call, name",
    [
        (os.system, "posix.system"),
        (eval, "eval"),
        (exec, "exec"),
        (__import__, "__import__"),
        (getattr, "getattr"),
        (subprocess.Popen, "Popen"),
        (shutil.rmtree, "shutil.rmtree"),
        (pickle.loads, "pickle.loads"),
    ],
)
def test_a_hostile_pickle_is_refused_by_name_and_nothing_in_it_runs(tmp_path, monkeypatch, call, name):
    witness = tmp_path / "witness"
    argument = f"touch {witness}" if call is os.system else f"open({str(witness)!r}, 'w')"
    model, _ = pruned_model("llama", True)
    torch.save({"model": model, "tokenizer": Hostile(call, argument)}, tmp_path / "model.bin")
    with pytest.raises(UserError, match=name.replace(".", r"\.")):
        checkpoint.load_bin(tmp_path)
    assert not witness.exists()


def test_a_hostile_pickle_loads_only_when_trusted(tmp_path):
    model, _ = pruned_model("llama", True)
    witness = tmp_path / "witness"
    torch.save({"model": model, "tokenizer": Hostile(os.mkdir, str(witness))}, tmp_path / "model.bin")
    with pytest.raises(UserError):
        checkpoint.load_bin(tmp_path)
    assert not witness.exists()
    assert_same(checkpoint.load_bin(tmp_path, trust=True)[0], model)
    assert witness.exists()


@pytest.mark.parametrize("damage", ["truncated", "empty", "text", "flipped", "other", "no model"])
def test_a_damaged_file_is_one_clear_line(tmp_path, damage):
    saved(tmp_path / "out", formats=["bin"])
    path = tmp_path / "out" / "model.bin"
    data = path.read_bytes()
    if damage == "other":
        torch.save({"model": {"a": torch.ones(2)}, "tokenizer": None}, path)
    elif damage == "no model":
        torch.save([1, 2], path)
    else:
        middle = len(data) // 2
        path.write_bytes(
            {
                "truncated": data[:middle],
                "empty": b"",
                "text": b"hello" * 99,
                "flipped": data[:middle] + bytes(64) + data[middle + 64 :],
            }[damage]
        )
    with pytest.raises(UserError) as caught:
        checkpoint.load_bin(path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def test_a_missing_weight_is_not_made_up(tmp_path):
    model, layers = pruned_model("llama", False)
    model.model.layers[1].mlp.up_proj._parameters.pop("weight")
    torch.save({"model": model, "tokenizer": tokenizer()}, tmp_path / "model.bin")
    with pytest.raises(UserError, match="damaged"):
        checkpoint.load_bin(tmp_path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        checkpoint.load_bin(tmp_path)


# --- complete or absent -----------------------------------------------------------------------------


def test_a_full_disk_is_one_line_and_nothing_stays(tmp_path):
    program = """
        import resource, signal, sys
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))  # every file ends here, as on a full disk
        sys.path[:0] = sys.argv[2:]
        from test_checkpoint import saved
        from lib.errors import OutOfMemory, UserError
        for form in ("hf", "bin"):
            try:
                saved(sys.argv[1] + "/out", formats=[form])
            except UserError as error:
                print("one line:", str(error).count(chr(10)), "cannot be written" in str(error))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), str(tmp_path), str(ROOT), str(ROOT / "tests")],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"},
    )
    assert done.stdout.splitlines() == ["one line: 0 True"] * 2, done.stdout + done.stderr
    assert list(tmp_path.iterdir()) == []


def test_files_have_the_permissions_of_the_umask(tmp_path):
    saved(tmp_path / "out")
    mask = os.umask(0)
    os.umask(mask)
    assert all(p.stat().st_mode & 0o777 == 0o666 & ~mask for p in (tmp_path / "out").iterdir())


def test_the_report_is_readable_json(tmp_path):
    report = {"widths": {"kept": (1, 2, 3)}, "text": "a [b] c", "none": None}
    checkpoint.save_report(tmp_path, report)
    text = (tmp_path / "pruning.json").read_text()
    assert "[ 1, 2, 3 ]" in text and json.loads(text) == {
        "widths": {"kept": [1, 2, 3]},
        "text": "a [b] c",
        "none": None,
    }
