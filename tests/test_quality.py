"""The table of qualities on a tiny model: what it measures, that it goes on where it stopped, what it shows."""

import importlib.util

import pandas as pd
import pytest
from conftest import ROOT

from lib.errors import UserError

SPEC = importlib.util.spec_from_file_location("quality", ROOT / "benchmarks" / "quality.py")
quality = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(quality)

METHODS = ["structured_flap:layer:bias", "structured_snip:token_fisher:global"]


@pytest.fixture(scope="module")
def command(tiny_model, data_dir, tmp_path_factory):
    return ["--model", str(tiny_model("llama")), "--data_dir", str(data_dir), "--nsamples", "4", "--seqlen", "16",
            "--eval_seqlen", "24", "--eval_windows", "2", "--compensate", "none", "auto", "--tasks", "arc_easy",
            "--limit", "3", "--task_seeds", "1", "--ratios", "0.25", "--dtype", "float32",
            "--out", str(tmp_path_factory.mktemp("quality"))]  # fmt: skip


@pytest.fixture(scope="module")
def measured(command):
    quality.main([*command, "--seeds", "0", "1", "--methods", *METHODS])
    return pd.read_csv(f"{command[-1]}/quality.csv", keep_default_na=False, na_values=["nan"])


def asked(command, *methods):
    return quality.rows_of(quality.parse([*command, "--methods", *methods]))[1:]


def test_what_a_row_leaves_open_is_run_in_every_way(command):
    found = asked(command, "structured_afr:abs_sum")
    assert [(r.neuron_score, r.scope, r.compensation) for r in found] == [
        ("abs_sum", scope, kind) for scope in ("layer", "global") for kind in ("none", "auto")
    ]
    assert len(asked(command, "structured_wanda:layer")) == 2
    assert [r.compensation for r in asked(command, "afr:global")] == ["none"]  # single weights
    assert [r.rounds for r in asked(command, "structured_snip:layer:auto:3")] == [3]


@pytest.mark.parametrize("written, wrong", [
    ("structured_best", "unknown"),
    ("structured_afr:locl", "'locl'"),
    ("structured_wanda:snr", "leave snr out"),
    ("afr:snr", "leave snr out"),
])  # fmt: skip
def test_a_wrong_word_is_named(command, written, wrong):
    with pytest.raises(UserError, match=wrong):
        asked(command, written)


def test_every_row_is_measured_once_with_what_it_is_asked(measured):
    assert len(measured) == 1 + 2 * 3 and not measured.duplicated(quality.KEY).any()
    assert measured[["wikitext2", "hellaswag text"]].gt(1).all(axis=None)
    has_task = measured["arc_easy"].notna()
    assert set(measured[has_task].seed) == {-1, 0} and set(measured[~has_task].seed) == {1}
    pruned = measured[measured.method != "dense"]
    assert pruned.mlp_sparsity.between(0.24, 0.26).all() and (pruned.model_sparsity < pruned.mlp_sparsity).all()
    assert (pruned.peak_mib > 0).all() and (pruned.score_seconds > 0).all()
    assert ((pruned.compensate_seconds > 0) == (pruned.compensation != "none")).all()


@pytest.mark.parametrize("rounds", [1, 2])
def test_figures_are_those_of_the_command_line(measured, command, run_cli, rounds):
    """Oracle: the program itself."""
    if rounds > 1:
        quality.main([*command, "--seeds", "1", "--methods", f"{METHODS[1]}:auto:{rounds}"])
        measured = pd.read_csv(f"{command[-1]}/quality.csv", keep_default_na=False, na_values=["nan"])
    done = run_cli(*command[:8], "--prune_method", "structured_snip", "--neuron_score", "token_fisher",
                   "--global_pruning", "--pruning_ratio", 0.25, "--eval_ppl", *command[8:12], "--dtype", "float32",
                   "--compensate", "auto", "--seed", 1, "--rounds", rounds)  # fmt: skip
    row = measured[(measured.method == "structured_snip") & (measured.compensation == "auto") & (measured.seed == 1)
                   & (measured.rounds == rounds)]  # fmt: skip
    assert f"-> {row.wikitext2.item():.2f} " in done.out


def test_a_second_run_measures_nothing_and_shows_the_same(measured, command, capsys, monkeypatch):
    monkeypatch.setattr(quality.Bench, "measure", lambda *_: pytest.fail("measured again"))
    quality.main([*command, "--seeds", "0", "1", "--methods", *METHODS])
    shown = capsys.readouterr().out
    assert "| structured_flap | layer |" in shown and " ± " in shown and "**" in shown
    out = quality.Path(command[-1])
    assert (out / "quality.md").read_text() in shown
    assert (out / "quality.png").read_bytes().startswith(b"\x89PNG")


def test_what_a_later_command_asks_besides_is_added_to_the_row(measured, command):
    quality.main([*command, "--seeds", "0", "--methods", METHODS[0], "--tasks", "arc_easy", "winogrande"])
    after = pd.read_csv(f"{command[-1]}/quality.csv", keep_default_na=False, na_values=["nan"])
    assert not after.duplicated(quality.KEY).any()
    assert set(map(tuple, measured[quality.KEY].values)) <= set(map(tuple, after[quality.KEY].values))
    assert after.winogrande.notna().sum() == 2  # the dense model's and the row's


def test_show_measures_nothing_and_says_where_seeds_are_missing(measured, command, capsys, monkeypatch):
    monkeypatch.setattr(quality, "Bench", lambda _: pytest.fail("loaded"))
    asked = ["--seeds", "0", "1", "2", "--methods", METHODS[0], "structured_magnitude", "--show"]
    quality.main([*command, *asked])
    shown = capsys.readouterr().out
    assert "structured_magnitude" not in shown
    row = next(line for line in shown.splitlines() if line.startswith("| structured_flap"))
    assert row.count(" (2)") == 1 and " ± " in row
    with pytest.raises(UserError, match="leave --show out"):
        quality.main([*command, "--seeds", "7", "--show"])
    with pytest.raises(UserError, match="leave --show out"):
        quality.main([*command[:-1], f"{command[-1]}/nowhere", "--show"])
    assert not quality.Path(command[-1], "nowhere").exists()


@pytest.mark.parametrize("flag, value", [("--limit", "2"), ("--eval_windows", "1"), ("--text", "winogrande")])
def test_rows_of_one_folder_are_measured_on_the_same(measured, command, flag, value):
    with pytest.raises(UserError, match=f"{flag} {value}: .* choose another --out"):
        quality.main([*command, "--methods", METHODS[0], flag, value])


def test_a_folder_of_some_windows_takes_no_rows_of_all(measured, command):
    at = command.index("--eval_windows")
    with pytest.raises(UserError, match="--eval_windows all: .* measured with 2;"):
        quality.main([*command[:at], *command[at + 2 :], "--methods", METHODS[0]])


def test_other_samples_have_scores_of_their_own(measured, command):
    asked = ["--seeds", "0", "--methods", METHODS[1], "--compensate", "none", "--nsamples", "3"]
    quality.main([*command, *asked])
    after = pd.read_csv(f"{command[-1]}/quality.csv", keep_default_na=False, na_values=["nan"])
    assert set(after[(after.method == "structured_snip") & (after.seed == 0)].nsamples) == {3, 4}
