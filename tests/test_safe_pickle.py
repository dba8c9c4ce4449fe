"""A `model.bin` made to harm: nothing it names is looked up, and whatever it asks for ends soon, in one line."""

import collections
import os
import pickle
import struct
import sys
import zipfile

import pytest
import torch
from test_checkpoint import logits, pruned_model, saved, tokenizer
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, Trainer, pipeline

from lib import checkpoint, inert_pickle, safe_pickle
from lib.errors import OutOfMemory, UserError
from lib.inert_pickle import Built, RefusedPickleError

STORED, DEFLATED = zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED


class Call:
    """Pickled as a call of `function` with `arguments`."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


@pytest.fixture
def model():
    return pruned_model("llama", False)[0]


def load(folder, model, words=None, **more):
    torch.save({"model": model, "tokenizer": words or tokenizer()} | more, folder / "model.bin")
    return checkpoint.load_bin(folder)


def assert_refused(folder, saying, load=checkpoint.load_bin):
    with pytest.raises(UserError, match=saying) as caught:
        load(folder)
    assert "\n" not in str(caught.value) and str(caught.value).startswith(str(folder / "model.bin"))
    assert len(str(caught.value)) < 600


def write(folder, records: dict[str, bytes], compression=STORED):
    with zipfile.ZipFile(folder / "model.bin", "w", compression) as archive:
        for name, data in records.items():
            archive.writestr(name, data)


def rewrite(folder, change):
    """Write the archive again with `change(records)` instead of its records."""
    with zipfile.ZipFile(folder / "model.bin") as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    write(folder, change(records) or records)


def shared(levels=60, make=lambda part: [part, part]):
    """A value that unfolds to 2 ** levels parts and takes a few bytes to write."""
    part = []
    for _ in range(levels):
        part = make(part)
    return part


# --- names ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", [torch.load, torch.hub.load, torch.hub.load_state_dict_from_url, pipeline, os.system])
def test_a_function_that_is_named_stays_a_name(call):
    held, names = inert_pickle.run(pickle.dumps(Call(call, "touch nothing"), protocol=2))
    assert isinstance(held, Built) and names == {held.of} and held.arguments == ("touch nothing",)
    assert held.of.name == call.__name__


@pytest.mark.parametrize("protocol", [0, 1, 4, 5])
def test_only_what_torch_writes_is_read(protocol):
    with pytest.raises(RefusedPickleError, match="opcode"):
        inert_pickle.run(pickle.dumps({"set": {1.5, 2**70}, "call": Call(os.system, "true")}, protocol))


@pytest.mark.parametrize("place", ["model", "module", "config", "tokenizer"])
def test_no_attribute_makes_a_module_be_imported(tmp_path, monkeypatch, model, place):
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass LlamaForCausalLM: pass\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    words = tokenizer()
    target = {"model": model, "module": model.lm_head, "config": model.config, "tokenizer": words}[place]
    vars(target)["path"] = ("evil", "LlamaForCausalLM")
    found, _ = load(tmp_path, model, words)
    assert torch.equal(logits(found), logits(model))
    assert not (tmp_path / "ran").exists() and "evil" not in sys.modules


@pytest.mark.parametrize("field, value", [
    ("auto_map", {"AutoModelForCausalLM": "evil--modeling.X", "AutoConfig": "evil--modeling.X"}),
    ("_attn_implementation_internal", "evil/kernels"),
    ("_attn_implementation_internal", "flash_attention_2"),
    ("_experts_implementation_internal", "evil/kernels"),
    ("transformers_weights", "/etc/passwd"),
    ("fusion_config", {"evil": True}),
    ("sub_configs", {"evil": 1}),
    ("to_dict", "evil"),
    ("_name_or_path", "evil/repository"),
])  # fmt: skip
def test_a_configuration_makes_nothing_else_be_loaded(tmp_path, monkeypatch, model, field, value):
    wanted = logits(model)
    vars(model.config)[field] = value
    monkeypatch.setattr("transformers.dynamic_module_utils.get_class_from_dynamic_module", forbidden)
    monkeypatch.setattr("transformers.modeling_utils.lazy_import_flash_attention", forbidden)
    found, _ = load(tmp_path, model)
    assert torch.equal(logits(found), wanted) and not hasattr(found.config, "auto_map")


def forbidden(*_, **__):
    raise AssertionError("something else was to be loaded")


def test_quantised_weights_are_not_taken_for_plain_ones(tmp_path, model):
    model.config.quantization_config = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    torch.save({"model": model, "tokenizer": tokenizer()}, tmp_path / "model.bin")
    assert_refused(tmp_path, "quantised")
    del model.config.quantization_config
    model.lm_head._parameters["weight"] = model.lm_head.weight.to(torch.int8)
    torch.save({"model": model, "tokenizer": tokenizer()}, tmp_path / "model.bin")
    assert_refused(tmp_path, "lm_head.weight")


@pytest.mark.parametrize("words", [
    Call(Trainer, "a"), Call(pipeline, "a"), Call(AutoTokenizer.from_pretrained, "a"), Call(AutoModelForCausalLM, "a"),
    Call(LlamaConfig, 5), Call(torch.zeros, 10**12), {"a": [torch.ones(2)]}, [[Call(torch.device, "cpu")]],
    torch.Tensor,
])  # fmt: skip
def test_only_data_come_beside_the_model(tmp_path, model, words):
    torch.save({"model": model, "tokenizer": words}, tmp_path / "model.bin")
    assert_refused(tmp_path, "names|holds")


def test_a_class_that_is_not_its_configurations_is_refused(tmp_path, model):
    model.config = pruned_model("qwen2", False)[0].config
    torch.save({"model": model, "tokenizer": tokenizer()}, tmp_path / "model.bin")
    assert_refused(tmp_path, "LlamaForCausalLM that does not belong to its Qwen2Config")


# --- time and memory --------------------------------------------------------------------------------


def share_modules(model, words):
    model.bomb = shared(60, lambda part: nn.ModuleList([part or nn.Linear(2, 2)] * 2))


def deepen_modules(model, words):
    model.bomb = shared(70, lambda part: nn.ModuleList([part] if isinstance(part, nn.Module) else []))


def many_layers(model, words):
    model.config.num_hidden_layers = 10**9


def large_tables(model, words):
    model.config.max_position_embeddings = 10**12


def long_vocabulary(model, words):
    model.config.vocab_size = 10**12


def expanded(model, words):
    model.lm_head.weight = nn.Parameter(torch.zeros(1).expand(10**6, 10**6))


@pytest.mark.parametrize("spoil, saying", [
    (share_modules, "more modules"),
    (deepen_modules, "more modules"),
    (lambda model, words: vars(model.config).update(bomb=shared()), "nested or repeated"),
    (lambda model, words: words.init_kwargs.update(bomb=shared(60, lambda part: {"a": part, "b": part})), "repeated"),
    (lambda model, words: vars(model.generation_config).update(bomb=shared(100, lambda part: [part])), "nested"),
    (lambda model, words: vars(model.config).update(bomb={2**80: 1}), "key"),
    (lambda model, words: vars(model.config).update(bomb={frozenset([1]): 1}), "damaged"),
    (lambda model, words: vars(model.config).update(bomb=Call(str, shared())), "builtins?__?.str|names"),
    (lambda model, words: vars(model.config).update(bomb=Call(list, range(10**10))), "list"),
    (lambda model, words: vars(model.config).update(bomb=Call(bytearray, 10**12)), "bytearray"),
    (many_layers, "many more layers"),
    (long_vocabulary, "another shape"),
    (expanded, "beyond its storage"),
], ids=lambda value: getattr(value, "__name__", None))  # fmt: skip
def test_a_small_file_that_asks_for_much_is_refused_at_once(tmp_path, model, spoil, saying):
    words = tokenizer()
    spoil(model, words)
    torch.save({"model": model, "tokenizer": words}, tmp_path / "model.bin")
    assert (tmp_path / "model.bin").stat().st_size < 200_000
    assert_refused(tmp_path, saying)


def test_buffers_that_a_configuration_makes_large_are_refused(tmp_path):
    model = pruned_model("xglm", False)[0]  # its table of positions is computed, so no file holds it
    model.config.max_position_embeddings = 10**9
    torch.save({"model": model, "tokenizer": tokenizer()}, tmp_path / "model.bin")
    assert_refused(tmp_path, "more memory")


NESTED = 100_000


@pytest.mark.parametrize("program, saying", [
    (b"\x80\x02N" + b"r" + struct.pack("<I", 2**32 - 1) + b".", "does not hold a model"),  # as memo index
    (b"\x80\x02\x8b" + struct.pack("<i", 2**31 - 1) + b".", "opcode"),  # LONG4
    (b"\x80\x02X" + struct.pack("<I", 2**32 - 1) + b"a.", "ends too early"),
    (b"\x80\x02})" + b"\x85" * NESTED + b"Ns.", "key"),
    (b"\x80\x02})q\0" + b"0h\0h\0\x86q\0" * 60 + b"Ns.", "key"),  # takes 2 ** 60 steps to hash
    (b"\x80\x02" + b"]" * NESTED + b"a" * (NESTED - 1) + b".", "does not hold a model"),
    (b"\x80\x02}X\x05\0\0\0model" + b"]" * NESTED + b"a" * (NESTED - 1) + b"s.", "does not hold a model"),
    (b"\x80\x02" + b"(" * NESTED + b".", "damaged"),
    (b"\x80\x02" + b"2" * 10 + b".", "opcode"),  # DUP
    (b"\x80\x02ctorch\nload", "damaged"),
    (b"", "ends too early"),
], ids=["memo", "long", "text", "nested key", "shared key", "nested list", "nested model", "marks", "dup", "name",
        "empty"])  # fmt: skip
def test_a_hostile_program_neither_crashes_nor_takes_memory(tmp_path, program, saying):
    write(tmp_path, {"x/data.pkl": program})
    assert_refused(tmp_path, saying)


def test_a_long_program_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(inert_pickle, "MOST_OPCODES", 1000)
    write(tmp_path, {"x/data.pkl": b"\x80\x02" + b"]0" * 1000 + b"N."})
    assert_refused(tmp_path, "1000 steps")


@pytest.mark.parametrize("compressed", ["data.pkl", "data/"])
def test_what_is_compressed_is_refused_before_it_is_unpacked(tmp_path, compressed):
    saved(tmp_path, formats=["bin"])
    with zipfile.ZipFile(tmp_path / "model.bin") as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(tmp_path / "model.bin", "w") as archive:
        for name, data in records.items():
            bomb = compressed in name
            archive.writestr(name, data + bytes(10**6) if bomb else data, DEFLATED if bomb else STORED)
    assert_refused(tmp_path, "compressed")


def test_sizes_that_the_file_does_not_have_are_refused(tmp_path):
    saved(tmp_path, formats=["bin"])
    path = tmp_path / "model.bin"
    data = path.read_bytes()
    entry = data.index(b"PK\x01\x02")  # the first of the archive's list of contents
    path.write_bytes(data[: entry + 20] + struct.pack("<II", 2**31, 2**31) + data[entry + 28 :])
    assert_refused(tmp_path, "claims to hold more")


def test_two_programs_are_refused(tmp_path):
    saved(tmp_path, formats=["bin"])
    rewrite(tmp_path, lambda records: records | {"other/data.pkl": b"N."})
    assert_refused(tmp_path, "more than once")


def test_the_other_byte_order_is_not_taken_for_this_one(tmp_path):
    saved(tmp_path, formats=["bin"])
    other = {"little": b"big", "big": b"little"}[sys.byteorder]
    rewrite(tmp_path, lambda records: {n: other if n.endswith("byteorder") else d for n, d in records.items()})
    assert_refused(tmp_path, "byte order")


@pytest.mark.parametrize("where", ["run", "weights", "rebuild"])
@pytest.mark.parametrize("error", [
    MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory"), OSError(12, "Cannot allocate memory"),
], ids=lambda error: type(error).__name__)  # fmt: skip
def test_memory_that_runs_out_is_said_and_is_no_damage(tmp_path, monkeypatch, where, error):
    saved(tmp_path, formats=["bin"])

    def fail(*_):
        raise error

    owner = {"run": inert_pickle, "weights": safe_pickle.Saved, "rebuild": checkpoint}[where]
    monkeypatch.setattr(owner, where, fail)
    assert_refused(tmp_path, "does not fit into memory")
    with pytest.raises(OutOfMemory):
        checkpoint.load_bin(tmp_path)


# --- weights ----------------------------------------------------------------------------------------


def tensor_of(offset, shape, stride, elements=6):
    storage = torch.arange(elements, dtype=torch.float32).storage()
    return Call(torch._utils._rebuild_tensor_v2, storage, offset, shape, stride, False, collections.OrderedDict())


@pytest.mark.filterwarnings("ignore:TypedStorage")
@pytest.mark.parametrize("offset, shape, stride", [
    (1, (2, 3), (3, 1)), (0, (2, 3), (4, 1)), (0, (2, 3), (2**40, 2**40)), (-1, (2, 3), (3, 1)), (0, (-2, 3), (3, 1)),
    (0, (2, 3), (-3, 1)), (0, (2, 3), (0, 0)), (0, (2.0, 3), (3, 1)), (0, (True, 3), (3, 1)), (2**70, (2, 3), (3, 1)),
    (0, (2, 3), (3,)), (0, [2, 3], (3, 1)), (None, (2, 3), (3, 1)), (0, ((2,), 3), (3, 1)),
    (0, (2**40, 2**40), (0, 0)), (0, (1,) * 200, (1,) * 200), (0, (2, 2, 2), (1, 1, 1)),
])  # fmt: skip
def test_a_weight_never_reaches_beyond_its_storage(tmp_path, model, offset, shape, stride):
    model.lm_head._parameters["weight"] = tensor_of(offset, shape, stride)
    torch.save({"model": model, "tokenizer": tokenizer()}, tmp_path / "model.bin")
    assert_refused(tmp_path, "weight")


@pytest.mark.parametrize("weight", [
    Call(os.getcwd), Call(torch.zeros, 3), "text", [1.0], Call(torch._utils._rebuild_parameter),
])  # fmt: skip
def test_a_weight_is_nothing_else(tmp_path, model, weight):
    model.lm_head._parameters["weight"] = weight
    torch.save({"model": model, "tokenizer": tokenizer()}, tmp_path / "model.bin")
    assert_refused(tmp_path, "weight|names|damaged")


def test_a_storage_that_is_cut_short_is_refused(tmp_path):
    saved(tmp_path, formats=["bin"])
    rewrite(tmp_path, lambda records: {n: d[:4] if "/data/" in n else d for n, d in records.items()})
    assert_refused(tmp_path, "beyond its storage")


def test_every_weight_is_used_or_named(tmp_path, model):
    model.extra_head = nn.Linear(3, 3)
    torch.save({"model": model, "tokenizer": tokenizer()}, tmp_path / "model.bin")
    assert_refused(tmp_path, "extra_head.weight, for which its configuration has no place")


def test_tied_weights_are_read_once_and_are_one_tensor(tmp_path, monkeypatch):
    saved(tmp_path, "gemma", formats=["bin"])
    reads, read = [], safe_pickle.Saved._storage
    monkeypatch.setattr(safe_pickle.Saved, "_storage", lambda *args: reads.append(args[2].key) or read(*args))
    found, _ = checkpoint.load_bin(tmp_path)
    assert found.config.tie_word_embeddings and len(reads) == len(set(reads))
    head, embedding = found.lm_head.weight, found.model.embed_tokens.weight
    assert head is embedding and head.untyped_storage().data_ptr() == embedding.untyped_storage().data_ptr()


@pytest.mark.parametrize("dtype", ["auto", torch.bfloat16])
def test_weights_that_share_a_storage_in_the_file_are_written_apart(tmp_path, model, dtype):
    first, second = (layer.mlp.down_proj for layer in model.model.layers[:2])
    second.weight = nn.Parameter(first.weight.detach())
    found, _ = load(tmp_path, model)
    first, second = (layer.mlp.down_proj.weight for layer in found.model.layers[:2])
    assert torch.equal(first, second)
    first.zero_()
    assert second.abs().sum() > 0


def test_the_attributes_of_tokenizer_and_configuration_come_back(tmp_path, model):
    words = tokenizer()
    words.init_kwargs["kept"] = {"a": [1, 2.5, None, True, (3, "x")]}
    model.config.kept = {"n": 2**40, "set": {1, 2}, "dtype": torch.bfloat16}
    model.generation_config.temperature = 0.5
    found, back = load(tmp_path, model, words)
    assert back.init_kwargs["kept"] == {"a": [1, 2.5, None, True, (3, "x")]}
    assert found.config.kept == {"n": 2**40, "set": {1, 2}, "dtype": torch.bfloat16}
    assert found.generation_config.temperature == 0.5
    assert back("a b")["input_ids"] == words("a b")["input_ids"]
