"""The page beside a result: its numbers against the scores, and that it needs nothing but itself."""

import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from families import build
from test_llava_score import tiny_llava

from lib import baselines, prune, report
from lib.mlp import find_layers
from lib.prune import METHODS, blocks_of
from lib.vectors import ModelVector

CHOSEN = ["structured_afr", "structured_snip", "structured_wanda", "afr", "random"]


def made_up_sums(layers, method, seed=1):
    generator = torch.Generator().manual_seed(seed)
    shapes = prune.sum_shapes(layers, method)
    blocks = blocks_of(layers)
    sums = {}
    for name in method.summed:
        values = [torch.rand(shapes[f"{b.name}.{name}"], generator=generator) ** 4 for b in blocks]
        sums[name] = ModelVector(len(blocks), lambda i, values=values: values[i])
    return sums


def drawn(name, model=None, ratio=0.4):
    layers, method = find_layers(model or build("llama")[0]), METHODS[name]
    sums = made_up_sums(layers, method)
    selection = prune.select(layers, sums, method, ratio, across_layers=True)
    return layers, method, sums, selection, report.pictures(layers, sums, method, "trimmed_mean", selection)


@pytest.mark.parametrize("name", CHOSEN)
def test_every_neuron_or_weight_is_counted_once_as_what_stays_or_goes(name):
    layers, method, sums, selection, (picture,) = drawn(name)
    blocks = blocks_of(layers)
    total = sum(b.width if method.structured else b.n_weights for b in blocks)
    assert picture.counts.sum() == total and picture.counts[1].sum() == selection.n_kept()
    if len(method.summed) == 2 and method.by_gradients:
        assert picture.parts.sum() == total and picture.parts[1].sum() == selection.n_kept()
    else:
        assert picture.parts is None
    shares = [len(kept) / b.width for kept, b in zip(selection.kept, blocks)] if method.structured else None
    assert picture.kept == pytest.approx(shares) if shares else all(0 < share < 1 for share in picture.kept)


def test_what_goes_has_the_lower_scores():
    layers, method, sums, selection, (picture,) = drawn("structured_afr")
    scores = torch.cat(list(method.scores(sums, "trimmed_mean")))
    threshold = scores.sort().values[scores.numel() - selection.n_kept()].item()
    assert not picture.counts[0][picture.edges[:-1] > threshold].any()
    assert not picture.counts[1][picture.edges[1:] < threshold].any()
    for layer, quantiles in zip(method.scores(sums, "trimmed_mean"), picture.quantiles):
        assert quantiles == pytest.approx(np.quantile(layer.numpy(), report.QUANTILES), rel=1e-5, abs=1e-6)


def test_a_cell_of_the_map_stands_where_both_sums_are():
    layers, method = find_layers(build("llama")[0]), METHODS["structured_afr"]
    blocks = blocks_of(layers)
    fo, ce = ([torch.full((b.width,), value) for b in blocks] for value in (1e-3, 10.0))
    fo[0][0], ce[0][0] = 1.0, 1e-1  # one neuron elsewhere: largest in one, smallest in the other
    sums = {"fo": ModelVector(len(blocks), fo.__getitem__), "ce": ModelVector(len(blocks), ce.__getitem__)}
    selection = prune.select(layers, sums, method, 0.5)
    (picture,) = report.pictures(layers, sums, method, "trimmed_mean", selection)
    assert picture.parts.sum(0)[-1, 0] == 1 and picture.parts.sum(0)[0, -1] == picture.parts.sum() - 1
    assert picture.ranges == [pytest.approx((-3, 0)), pytest.approx((-1, 1))]


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_equal_scores_are_drawn_too(value):
    layers, method = find_layers(build("llama")[0]), METHODS["structured_afr"]
    blocks = blocks_of(layers)
    equal = ModelVector(len(blocks), lambda i: torch.full((blocks[i].width,), value))
    sums = {"fo": equal, "ce": equal}
    selection = prune.select(layers, sums, method, 0.5)
    (picture,) = report.pictures(layers, sums, method, "trimmed_mean", selection)
    assert picture.counts.sum() == sum(b.width for b in blocks)
    assert "nan" not in report._histogram(picture) + report._map(picture) + report._quantiles(picture)


def test_towers_are_drawn_each_by_itself():
    model = tiny_llava()
    layers = find_layers(model)
    method = METHODS["structured_afr_llava"]
    sums = made_up_sums(layers, method) | baselines.of_weights(blocks_of(layers))
    selection = prune.select(layers, sums, method, 0.5)
    pictures = report.pictures(layers, sums, method, "trimmed_mean", selection)
    assert [p.tower for p in pictures] == ["vision", "language"]
    assert sum(p.counts[1].sum() for p in pictures) == selection.n_kept()


class _Page(HTMLParser):
    """Collects tags and attributes; refuses what is not closed."""

    VOID = {"meta", "rect", "line"}

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.attributes = [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes.extend(attributes)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag


@pytest.mark.parametrize("flags", [
    ["--global_pruning", "--compensate", "auto", "--eval_ppl", "--eval_windows", 2],
    ["--prune_method", "afr"],
    ["--prune_method", "structured_random"],
    ["--pruning_ratio", 0],
], ids=["global", "weights", "random", "nothing"])  # fmt: skip
def test_the_command_line_writes_a_page_that_needs_nothing_else(run_cli, tiny_model, data_dir, tmp_path, flags):
    done = run_cli("--model", tiny_model("llama"), "--data_dir", data_dir, "--nsamples", 4, "--seqlen", 24,
                   "--pruning_ratio", 0.25, "--save_model", tmp_path / "a<b", "--report", *flags)  # fmt: skip
    assert done.code == 0, done.err
    assert f"{tmp_path / 'a<b'}/report.html" in done.out
    text = (tmp_path / "a<b" / "report.html").read_text()
    page = _Page(text)
    assert not {"script", "img", "link", "iframe"} & set(page.tags)
    assert not any(name in ("src", "href", "onload") for name, _ in page.attributes)
    assert not re.search(r"https?:|url\(|@import|\bnan\b", text)
    assert page.tags.count("svg") == {"afr": 4, "structured_random": 4}.get(flags[1], 5 if len(flags) > 2 else 0)
    facts = json.loads((tmp_path / "a<b" / "pruning.json").read_text())
    facts["command"] = facts["arguments"]["model"] = "<b>&\"'"
    assert report.page(facts, []).count("&lt;b&gt;&amp;&quot;&#x27;") == 2


def test_without_a_folder_there_is_no_place_for_it(run_cli, tiny_model):
    done = run_cli("--model", tiny_model("llama"), "--report")
    assert done.code == 2 and done.err.startswith("error: --report:") and "--save_model" in done.err
