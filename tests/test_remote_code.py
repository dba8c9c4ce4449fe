"""Code that a checkpoint names is not run, not asked about and not saved, whatever names it."""

import functools
import json
import os
import pty
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from conftest import GATED, ROOT, fresh_environment, make_tokenizer, sentences, special_tokens, write_model
from lm_eval.api.registry import get_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPVisionConfig,
    FalconConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaImageProcessorPil,
    LlavaProcessor,
    Phi3Config,
)

from lib import builder, checkpoint, llava, lm_harness, remote_code, tasks
from lib.errors import UserError
from lib.mlp import find_layers
from lib.prune import blocks_of, remove, select_neurons

assert lm_harness  # registers its models
# Names that must not be in any configuration of a result, as text.
MENTIONS = re.compile(r'"(auto_map|custom_generate|custom_pipelines|trust_remote_code|configuration_files)"')


@pytest.fixture
def marker(tmp_path) -> Path:
    """The file that hostile code leaves."""
    return tmp_path / "it-ran"


@pytest.fixture
def evil(tmp_path, marker) -> Path:
    """A folder, not the model's, with code for every purpose."""
    return write_evil(tmp_path / "elsewhere" / "mod.py", marker).parent


def write_evil(file: Path, marker: Path) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(
        textwrap.dedent(f"""
        open({str(marker)!r}, "w").close()
        from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
        class C(LlamaConfig): pass
        class M(LlamaForCausalLM): pass
        class T(PreTrainedTokenizerFast): pass
        def generate(model, *args, **kwargs): pass
        """)
    )
    return file


def edit(file: Path, **fields) -> None:
    held = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(held | fields))


# --- attacks: each takes a model's folder, the folder elsewhere, and the marker ----------------------


def model_elsewhere(folder, evil, marker):
    edit(folder / "config.json", auto_map={"AutoModelForCausalLM": f"{evil}--mod.M"})


def config_elsewhere(folder, evil, marker):
    edit(folder / "config.json", auto_map={"AutoConfig": f"{evil}--mod.C"})


def relative_to_the_working_directory(folder, evil, marker):
    edit(folder / "config.json", auto_map={"AutoModelForCausalLM": f"{evil.name}--mod.M"})


def beside_the_weights(folder, evil, marker):
    write_evil(folder / "mod.py", marker)
    edit(folder / "config.json", auto_map={"AutoConfig": "mod.C", "AutoModelForCausalLM": "mod.M"})


def in_a_subfolder(folder, evil, marker):
    write_evil(folder / "sub" / "mod.py", marker)
    edit(folder / "config.json", auto_map={"AutoModelForCausalLM": "sub/mod.M"})


def behind_a_link(folder, evil, marker):
    (folder / "sub").symlink_to(evil)
    edit(folder / "config.json", auto_map={"AutoModelForCausalLM": "sub/mod.M"})


def of_another_configuration(folder, evil, marker):
    other = json.loads((folder / "config.json").read_text()) | {"auto_map": {"AutoModelForCausalLM": f"{evil}--mod.M"}}
    edit(folder / "config.4.0.0.json", **other)
    edit(folder / "config.json", configuration_files=["config.4.0.0.json"])


def tokenizer_elsewhere(folder, evil, marker):
    edit(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": [None, f"{evil}--mod.T"]})


def tokenizer_in_the_old_form(folder, evil, marker):
    write_evil(folder / "sub" / "mod.py", marker)
    edit(folder / "tokenizer_config.json", auto_map=["sub/mod.T", "sub/mod.T"])


def generation(folder, evil, marker):
    write_evil(folder / "custom_generate" / "generate.py", marker)
    edit(folder / "generation_config.json", custom_generate=str(folder), trust_remote_code=True)


def nested(folder, evil, marker):
    named = {"auto_map": {"AutoModel": f"{evil}--mod.M"}, "model_type": "llama"}
    edit(folder / "config.json", vision_stage=named, custom_pipelines={"a": {"impl": "mod.M", "pt": [named]}})


ATTACKS = [
    model_elsewhere, config_elsewhere, relative_to_the_working_directory, beside_the_weights, in_a_subfolder,
    behind_a_link, of_another_configuration, tokenizer_elsewhere, tokenizer_in_the_old_form, generation, nested,
]  # fmt: skip
by_name = pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.__name__)


@pytest.fixture
def hostile(tiny_model, tmp_path, evil, marker):
    """`hostile(attack)` -> a tiny Llama's folder after the attack."""

    def copy(attack) -> Path:
        folder = shutil.copytree(tiny_model("llama"), tmp_path / "hostile")
        attack(folder, evil, marker)
        return folder

    return copy


@pytest.fixture(scope="module")
def genuine(tiny_model, tmp_path_factory):
    """A result of differing widths with its report, of this tool. Never change it."""
    loaded = builder.load(str(tiny_model("llama")), "float32")
    scores = [torch.rand(b.width, generator=torch.Generator().manual_seed(1)) for b in blocks_of(loaded.layers)]
    remove(loaded.model, find_layers(loaded.model), select_neurons(scores, 0.4, across_layers=True))
    folder = tmp_path_factory.mktemp("genuine") / "result"
    folder.mkdir()
    checkpoint.save(folder, loaded.model, find_layers(loaded.model), loaded.tokenizer, ["hf"])
    checkpoint.save_report(folder, {})
    return folder


def result_with_foreign_code(folder: Path) -> list[str]:
    """The mentions of code in the configurations of a result, without that of our own file."""
    found = []
    for file in folder.glob("*config*.json"):
        text = file.read_text()
        own = re.compile(r'"auto_map": \{\s*"AutoModelForCausalLM": "modeling_pruned\.PrunedLlamaForCausalLM"\s*\}')
        found += MENTIONS.findall(own.sub("", text))
    return found


# --- main.py ----------------------------------------------------------------------------------------


@pytest.fixture
def prune(run_cli, tmp_path):
    """`prune(model, *flags)` prunes with calibration text of its own -> the result's folder."""
    (tmp_path / "text.txt").write_text("\n".join(sentences(60)))

    def run(model, *flags, to="result"):
        command = ["--model", model, "--dataset", tmp_path / "text.txt", "--seqlen", 16, "--nsamples", 1]
        command += ["--dtype", "float32", "--pruning_ratio", 0.25, "--prune_method", "structured_snip"]
        done = run_cli(*command, "--save_model", tmp_path / to, *flags)
        assert (done.code, done.err) == (0, ""), done.err
        assert "loaded back" in done.out
        return tmp_path / to

    return run


@by_name
def test_a_hostile_model_is_pruned_without_its_code_and_saved_without_its_name(attack, hostile, prune, marker, evil):
    differ = attack in (nested, beside_the_weights)
    folder = prune(hostile(attack), *(["--global_pruning"] if differ else []))
    assert not marker.exists()
    assert result_with_foreign_code(folder) == []
    assert [file.name for file in folder.rglob("*.py")] == (["modeling_pruned.py"] if differ else [])
    if differ:
        model, tokenizer = checkpoint.load_bin(folder)
        assert not MENTIONS.search(json.dumps([model.config.to_dict(), model.generation_config.to_dict()]))


LAYOUTS = {
    "phi3": (
        Phi3Config(**GATED, **special_tokens()),
        {"AutoConfig": "configuration_phi3.Phi3Config", "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"},
    ),
    "falcon": (
        FalconConfig(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, **special_tokens()),
        {
            name: f"tiiuae/falcon-7b--{value}"
            for name, value in {
                "AutoConfig": "configuration_falcon.FalconConfig",
                "AutoModel": "modeling_falcon.FalconModel",
                "AutoModelForSequenceClassification": "modeling_falcon.FalconForSequenceClassification",
                "AutoModelForCausalLM": "modeling_falcon.FalconForCausalLM",
            }.items()
        },
    ),
}
FORMS = [["--save_format", "both"], ["--prune_method", "afr"], ["--global_pruning"]]


def test_published_layouts_that_name_code_prune_and_load_in_a_fresh_process(prune, tmp_path, marker):
    program = """
        import sys, torch
        from pathlib import Path
        from transformers import AutoModelForCausalLM, AutoTokenizer
        for folder in map(Path, sys.argv[1:]):
            remote = (folder / "modeling_pruned.py").exists()
            AutoTokenizer.from_pretrained(folder)
            ids = torch.arange(3, 9)[None]
            found = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=remote or None)(ids)
            if (folder / "model.bin").exists():
                held = torch.load(folder / "model.bin", weights_only=False)
                assert not hasattr(held["model"].config, "auto_map")
                assert torch.equal(held["model"](ids).logits, found.logits), folder
            print(folder.name, found.logits.shape[-1])
    """
    results = []
    for family, (config, auto_map) in LAYOUTS.items():
        source = write_model(config, tmp_path / family)
        edit(source / "config.json", auto_map=auto_map)
        edit(source / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
        if family == "phi3":  # Falcon's code is fetched from its repository
            for value in auto_map.values():
                write_evil(source / f"{value.split('.')[0]}.py", marker)
        for number, flags in enumerate(FORMS):
            results.append(prune(source, *flags, to=f"{family}-{number}"))
            text = "".join(file.read_text() for file in results[-1].glob("*config*.json"))
            assert "configuration_" not in text and "modeling_" not in text.replace("modeling_pruned.Pruned", "")
            assert ("auto_map" in text) == ("--global_pruning" in flags)
    assert not marker.exists()
    command = [sys.executable, "-c", textwrap.dedent(program), *results]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ, cwd=tmp_path)
    size = str(special_tokens()["vocab_size"])
    assert done.stdout.splitlines() == [f"{folder.name} {size}" for folder in results], done.stderr


REMOTE_ONLY = {
    "baichuan": "modeling_baichuan.BaichuanForCausalLM",
    "qwen": "modeling_qwen.QWenLMHeadModel",
    "chatglm": "modeling_chatglm.ChatGLMForConditionalGeneration",
    "internlm2": "modeling_internlm2.InternLM2ForCausalLM",
    "RefinedWebModel": "modelling_RW.RWForCausalLM",
}


@pytest.mark.parametrize("family", [*REMOTE_ONLY, "made_up"])
def test_a_family_that_is_only_code_is_refused_before_its_weights_are_read(family, tmp_path, run_cli, marker):
    model = tmp_path / "model"
    fields = {"model_type": family, "hidden_size": 32}
    if reference := REMOTE_ONLY.get(family):
        write_evil(model / f"{reference.split('.')[0]}.py", marker)
        fields["auto_map"] = {"AutoConfig": reference, "AutoModelForCausalLM": reference}
    model.mkdir(exist_ok=True)
    edit(model / "config.json", **fields)
    (tmp_path / "text.txt").write_text("text\n")
    done = run_cli("--model", model, "--dataset", tmp_path / "text.txt", "--pruning_ratio", 0.5)
    assert done.code == 2 and done.err.count("\n") == 1
    assert f"the family '{family}' is unknown to transformers" in done.err
    assert (f"exists only as code that comes with the checkpoint ({reference})" in done.err) == bool(reference)
    assert not marker.exists()


def test_nothing_is_asked_at_a_terminal(hostile, evil, marker, tmp_path):
    """At a pseudo-terminal where every question would get a 'y': an unknown family, a tokenizer that is only code."""
    unknown = shutil.copytree(hostile(tokenizer_elsewhere), tmp_path / "unknown")
    edit(unknown / "config.json", model_type="qwen", auto_map={"AutoConfig": f"{evil}--mod.C"})
    tokenizer = shutil.copytree(tmp_path / "hostile", tmp_path / "tokenizer")
    edit(tokenizer / "config.json", model_type="timesfm")  # no tokenizer of transformers belongs to it
    edit(tokenizer / "tokenizer_config.json", tokenizer_class="T")
    program = """
        import sys, main
        from lib import builder, checkpoint
        builder.quiet_libraries()
        for folder in sys.argv[1:]:
            print("code", main.main(["--model", folder, "--dataset", "text.txt", "--pruning_ratio", "0.5"]))
            for read in (lambda: builder.find_source(folder, "").load(),
                         lambda: builder.AutoTokenizer.from_pretrained(folder),
                         lambda: checkpoint.load_folder(folder)):
                try:
                    read()
                except Exception as error:
                    print("refused", type(error).__name__)
    """
    (tmp_path / "text.txt").write_text("text\n")
    master, slave = pty.openpty()
    os.write(master, b"y\n" * 20)
    command = [sys.executable, "-c", textwrap.dedent(program), unknown, tokenizer]
    env = fresh_environment() | {"TQDM_DISABLE": "1"}
    with subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave, env=env, cwd=tmp_path) as process:
        os.close(slave)
        said = "".join(iter(functools.partial(read_terminal, master), ""))
    assert process.returncode == 0 and "[y/N]" not in said and "Do you wish" not in said, said
    assert said.count("error: ") == said.count("code 2") == 2 and said.count("refused ") == 5, said
    assert not marker.exists()


def read_terminal(master: int) -> str:
    """The next words at a pseudo-terminal; none when its last process has ended."""
    try:
        return os.read(master, 4096).decode()
    except OSError:
        return ""


# --- evaluation -------------------------------------------------------------------------------------


@by_name
def test_a_result_that_was_tampered_with_is_refused_and_runs_nothing_even_when_it_is_loaded(
    attack, genuine, tmp_path, evil, marker, capfd, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    folder = shutil.copytree(genuine, tmp_path / "copy")
    assert tasks.main(["arguments", str(folder)]) == 0
    attack(folder, evil, marker)
    capfd.readouterr()
    assert tasks.main(["arguments", str(folder)]) == 2
    out, err = capfd.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1 and "TRUST=1" in err
    with pytest.raises(UserError):
        checkpoint.load_folder(folder)
    assert "trust_remote_code=True" in tasks.arguments(str(folder), trust=True)[3]
    model = get_model("pruned_folder")(pretrained=str(folder), device="cpu")
    assert type(model.model).__module__ == "lib.modeling_pruned"
    assert not marker.exists()


@pytest.mark.parametrize("attack", [model_elsewhere, in_a_subfolder, tokenizer_elsewhere, generation],
                         ids=lambda attack: attack.__name__)  # fmt: skip
def test_a_dense_model_is_evaluated_without_its_code_unless_trusted(attack, hostile, marker):
    folder = hostile(attack)
    kind, arguments = tasks.arguments(str(folder))[1::2]
    assert (kind, arguments) == ("hf", f"pretrained={folder},dtype=auto")
    get_model(kind).create_from_arg_string(arguments, {"device": "cpu"})
    assert not marker.exists()
    kind, arguments = tasks.arguments(str(folder), trust=True)[1::2]
    assert (kind, arguments) == ("hf", f"pretrained={folder},trust_remote_code=True,dtype=auto")
    get_model(kind).create_from_arg_string(arguments, {"device": "cpu"})
    assert marker.exists()  # so the attack would have worked


def test_an_evaluated_family_that_is_only_code_is_refused_unless_trusted(hostile):
    folder = hostile(beside_the_weights)
    edit(folder / "config.json", model_type="qwen")
    with pytest.raises(UserError, match=r"only as code .*mod\.M.*TRUST=1"):
        tasks.arguments(str(folder))
    assert "trust_remote_code=True" in tasks.arguments(str(folder), trust=True)[3]


def test_a_folder_of_differing_widths_is_the_same_model_by_our_code_as_by_its_own(genuine):
    own = get_model("pruned_folder")(pretrained=str(genuine), device="cpu", dtype="float32")
    wanted = AutoModelForCausalLM.from_pretrained(genuine, trust_remote_code=True)
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        assert torch.equal(own.model(ids).logits, wanted(ids).logits)
    assert own.tokenizer("herons").input_ids == AutoTokenizer.from_pretrained(genuine)("herons").input_ids


@pytest.mark.parametrize("reference", [
    "modeling_pruned.LlamaForCausalLM", "evil--modeling_pruned.PrunedLlamaForCausalLM", "modeling_pruned.Pruned.X",
    "sub/modeling_pruned.PrunedLlamaForCausalLM", "./modeling_pruned.PrunedLlamaForCausalLM", "", None, 5, ["a.B"],
])  # fmt: skip
def test_only_our_file_and_our_classes_may_be_named(reference, genuine, tmp_path):
    folder = shutil.copytree(genuine, tmp_path / "copy")
    assert remote_code.names_own_code(folder)
    edit(folder / "config.json", auto_map={"AutoModelForCausalLM": reference})
    with pytest.raises(UserError, match="auto_map"):
        remote_code.names_own_code(folder)


def test_a_label_or_a_token_of_that_name_stays():
    config = LlamaConfig(auto_map={"AutoConfig": "a.B"}, stage=[{"auto_map": "a.B", "x": 1}])
    config.label2id = {"auto_map": 0}
    remote_code.forget(config)
    assert config.label2id == {"auto_map": 0}
    assert not hasattr(config, "auto_map") and config.stage == [{"x": 1}]


def test_a_folder_of_data_is_not_taken_for_tasks_nor_for_modules(tmp_path):
    """The harness starts where the data lie."""
    python = tmp_path / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\nif [ "$2" = lib.tasks ]; then echo --model; else echo "safe=$PYTHONSAFEPATH"; fi\n')
    python.chmod(0o755)
    settings = {"VENV": str(tmp_path / "venv"), "WORK": str(tmp_path / "data"), "TASKS": "gqa", "BATCH_SIZE": "1"}
    command = f'set -eu; . "{ROOT}/lib/evaluation.sh"; evaluate lib.lmms model "{tmp_path}/out" ""'

    def run():
        environment = os.environ | settings
        return subprocess.run(["bash", "-c", command], env=environment, capture_output=True, text=True, cwd=tmp_path)

    (tmp_path / "data").mkdir()
    assert run().stdout == "safe=1\n"
    (tmp_path / "data" / "gqa").mkdir()
    done = run()
    assert done.returncode == 2 and done.stdout == "" and done.stderr.startswith("error: TASKS=gqa: ")


# --- LLaVA ------------------------------------------------------------------------------------------


def test_a_llava_is_loaded_and_saved_without_the_code_that_it_names(tmp_path, evil, marker, monkeypatch):
    folder = tmp_path / "llava-hf"
    write_llava(folder)
    dense = json.loads((folder / "config.json").read_text())
    named = {"auto_map": {name: f"{evil}--mod.{kind}" for name, kind in {
        "AutoConfig": "C", "AutoModel": "M", "AutoModelForCausalLM": "M", "AutoModelForImageTextToText": "M",
        "AutoProcessor": "M", "AutoImageProcessor": "M", "AutoTokenizer": "T"}.items()}}  # fmt: skip
    text, vision = (dense[name] | named for name in ("text_config", "vision_config"))
    edit(folder / "config.json", **named, text_config=text, vision_config=vision)
    for file in ("processor_config.json", "preprocessor_config.json"):
        edit(folder / file, **named)
    edit(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": [f"{evil}--mod.T", f"{evil}--mod.T"]})
    monkeypatch.setattr("builtins.input", lambda question="": pytest.fail(f"asked: {question}"))
    model, processor = llava.load(str(folder), "unused")
    (tmp_path / "result").mkdir()
    checkpoint.save(tmp_path / "result", model, find_layers(model), processor, ["hf", "bin"])
    assert result_with_foreign_code(tmp_path / "result") == []
    assert json.loads((tmp_path / "result" / "config.json").read_text()).keys() == dense.keys()
    assert not marker.exists()


def test_a_llava_whose_processor_is_only_code_is_one_line(tmp_path, evil, marker):
    folder = tmp_path / "llava-hf"
    write_llava(folder)
    edit(folder / "processor_config.json", processor_class="Own", auto_map={"AutoProcessor": f"{evil}--mod.P"})
    (held := json.loads((folder / "processor_config.json").read_text()))["image_processor"] |= {
        "image_processor_type": "Own", "auto_map": {"AutoImageProcessor": f"{evil}--mod.P"}}  # fmt: skip
    edit(folder / "processor_config.json", **held)
    edit(folder / "preprocessor_config.json", **held["image_processor"])
    with pytest.raises(UserError, match="which is not run"):
        llava.load(str(folder), "unused")
    assert not marker.exists()


def write_llava(folder: Path) -> None:
    """A tiny LLaVA in the form of transformers, with its processor."""
    vision = CLIPVisionConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
                              image_size=8, patch_size=4)  # fmt: skip
    text = LlamaConfig(**GATED, **special_tokens())
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=5, image_seq_length=4)
    tokenizer = make_tokenizer()
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    images = LlavaImageProcessorPil(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8}, do_pad=True)
    LlavaProcessor(images, tokenizer, patch_size=4, image_token="<s>").save_pretrained(folder)
