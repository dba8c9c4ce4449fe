"""A result as one page, `report.html`: pictures drawn here as SVG, no script, nothing from the network.

What is drawn is taken from the scores before anything is removed (`picture`); the page is made of that and of what
`pruning.json` holds (`page`).
"""

import html
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from lib import baselines
from lib.mlp import Block, Layer, of_tower
from lib.prune import METHODS, Method, Selection, blocks_of, pruned_towers, sums_of_tower, weight_masks
from lib.vectors import ModelVector

BINS = 48  # of a histogram, and along each side of the map of two parts
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
WIDTH, HEIGHT = 360, 220  # of a picture, in the units of its text: a phone shows them one to one
LEFT, RIGHT, TOP, BOTTOM = 44, 8, 8, 34


# --- what is drawn ----------------------------------------------------------------------------------


@dataclass
class Picture:
    """One tower's scores in numbers that fit on a page.

    kept: per layer the share of its neurons (or weights) that stays;  quantiles: of each layer's scores, `[layers, 5]`;
    edges: of the histogram's bins, in scores, `[BINS + 1]`;  counts: what goes and what stays in each, `[2, BINS]`;
    parts: of methods with two sums, what goes and what stays by the logarithms of both, `[2, BINS, BINS]`;
    ranges: of those logarithms (base 10), lowest and highest;  names: of the two sums.
    """

    tower: str
    kept: list[float] = field(default_factory=list)
    quantiles: list[list[float]] = field(default_factory=list)
    edges: np.ndarray | None = None
    counts: np.ndarray | None = None
    parts: np.ndarray | None = None
    ranges: list[tuple[float, float]] = field(default_factory=list)
    names: tuple[str, ...] = ()


def pictures(
    layers: Sequence[Layer],
    sums: dict[str, ModelVector],
    method: Method,
    neuron_score: str,
    selection: Selection,
    seed: int = 0,
) -> list[Picture]:
    """A picture per tower, of the dense model and what was selected of it. One layer's scores at a time are held."""
    sums, found, start = baselines.of_weights(blocks_of(layers), seed) | sums, [], 0
    for tower in pruned_towers(layers):
        blocks = blocks_of(of_tower(layers, tower))
        own = sums_of_tower(sums, layers, tower)
        kept = selection.kept[start : start + len(blocks)]
        start += len(blocks)
        masks = ModelVector(len(blocks), lambda i, b=blocks, k=kept: _mask(b[i], k[i], selection.structured))
        found.append(_picture(tower, own, method.scores(own, neuron_score), method, masks))
    return found


def _mask(block: Block, kept: torch.Tensor, structured: bool) -> torch.Tensor:
    """Which neurons `[d_ff]`, or weights `[projections, d_ff, d]`, stay."""
    if not structured:
        return weight_masks(block, kept)
    mask = torch.zeros(block.width, dtype=torch.bool)
    mask[kept] = True
    return mask


def _picture(tower: str, sums, scores: ModelVector, method: Method, masks: ModelVector) -> Picture:
    picture = Picture(tower)
    extremes, spread = [], []
    for score, mask in zip(scores, masks):
        values = score.double().flatten().numpy()
        picture.kept.append(float(mask.double().mean()))
        picture.quantiles.append(np.quantile(values, QUANTILES).tolist())
        extremes.append((values.min(), values.max()))
        spread.append(float(np.subtract(*np.quantile(values, (0.75, 0.25)))))
    low, high = min(e[0] for e in extremes), max(e[1] for e in extremes)
    # Scores have long tails: bins are even in asinh, which is a line around the middle and a logarithm far from it.
    middle, unit = float(np.median(picture.quantiles, 0)[2]), max(float(np.median(spread)), 1e-30)
    ends = np.arcsinh((np.array([low, high]) - middle) / unit)
    picture.edges = middle + unit * np.sinh(np.linspace(*ends, BINS + 1))
    picture.edges[0], picture.edges[-1] = low, max(high, np.nextafter(low, np.inf))
    picture.counts = np.zeros((2, BINS), dtype=np.int64)
    for score, mask in zip(scores, masks):
        values, stays = score.double().flatten().numpy(), mask.flatten().numpy()
        for which in (0, 1):
            picture.counts[which] += np.histogram(values[stays == which], picture.edges)[0]
    if len(method.summed) == 2 and method.by_gradients:
        _two_parts(picture, [sums[name] for name in method.summed], masks)
        picture.names = tuple(f"A_{name.upper()}" for name in method.summed)
    return picture


def _two_parts(picture: Picture, parts: Sequence[ModelVector], masks: ModelVector) -> None:
    """Count what goes and what stays on a map of both parts' logarithms; values of 0 stand at the lower edge."""
    for part in parts:
        positive = [value[value > 0] for value in part if (value > 0).any()]
        ends = [(float(p.min()), float(p.max())) for p in positive] or [(1.0, 1.0)]
        low, high = np.log10(min(e[0] for e in ends)), np.log10(max(e[1] for e in ends))
        picture.ranges.append((max(low, high - 8), high if high > low else low + 1))
    picture.parts = np.zeros((2, BINS, BINS), dtype=np.int64)
    for index, mask in enumerate(masks):
        places = []
        for part, (low, high) in zip(parts, picture.ranges, strict=True):
            logs = np.log10(np.maximum(part[index].double().flatten().numpy(), 10**low))
            places.append(np.clip(((logs - low) / (high - low) * BINS).astype(int), 0, BINS - 1))
        np.add.at(picture.parts, (mask.flatten().numpy().astype(int), *places), 1)


# --- the page ---------------------------------------------------------------------------------------

STYLE = """
:root{--ink:#1c2330;--soft:#667085;--line:#e1e5ec;--card:#fff;--ground:#f5f6f9;--stay:#2563a8;--go:#d9792b}
@media(prefers-color-scheme:dark){:root{--ink:#e6e9ef;--soft:#98a2b3;--line:#2c3442;--card:#1a202b;--ground:#10141b;
--stay:#6aa6e8;--go:#e89a57}}
*{box-sizing:border-box}
body{margin:0;background:var(--ground);color:var(--ink);font:15px/1.5 system-ui,sans-serif}
main{max-width:1180px;margin:auto;padding:16px}
h1{font-size:1.3rem;margin:.2em 0}h2{font-size:1rem;margin:1.6em 0 .5em}h3{font-size:.9rem;margin:0 0 .4em}
p{margin:.3em 0;color:var(--soft)}h1,p,td,dd{overflow-wrap:anywhere}
dl{display:grid;grid-template-columns:repeat(auto-fit,minmax(210px,1fr));gap:10px;margin:14px 0}
dl div,figure{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:10px 12px;margin:0}
dt{color:var(--soft);font-size:.8rem}dd{margin:0;font-weight:600}
.all{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(340px,100%),1fr));gap:12px}
svg{display:block;width:100%;height:auto}svg text{fill:var(--soft);font:11px system-ui,sans-serif}
figcaption{color:var(--soft);font-size:.8rem;margin-top:.4em}
.stay{fill:var(--stay)}.go{fill:var(--go)}.axis{stroke:var(--line)}.key{font-weight:700}
b.stay{color:var(--stay)}b.go{color:var(--go)}
pre{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:10px 12px;white-space:pre-wrap;
overflow-wrap:anywhere;font-size:.85rem}
"""


def page(report: dict, pictures: Sequence[Picture]) -> str:
    """The page, from what `pruning.json` holds and a picture per tower (none where nothing was scored)."""
    arguments = report["arguments"]
    what = "neurons" if METHODS[arguments["prune_method"]].structured else "weights"
    title = f"{arguments['prune_method']}, {arguments['pruning_ratio']:.4g} of the MLP {what} removed"
    facts = "".join(f"<div><dt>{_text(k)}</dt><dd>{_text(v)}</dd></div>" for k, v in _facts(report))
    sections = [_tower(report, picture, what) for picture in pictures]
    if not pictures:
        sections = ["<p>Nothing was scored: everything stays.</p>"]
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{_text(title)}</title><style>{STYLE}</style></head><body><main>\n"
        f"<h1>{_text(arguments['model'])}</h1><p>{_text(title)}</p>\n<dl>{facts}</dl>\n"
        f"{''.join(sections)}\n<h2>Command</h2><pre>{_text(report['command'])}</pre>\n"
        f"</main></body></html>\n"
    )


def _text(value) -> str:
    return html.escape(str(value))


def _facts(report: dict) -> Iterator[tuple[str, str]]:
    """What a person wants to know first."""
    found = report["perplexity"]
    if found:
        yield "perplexity, dense to pruned", f"{found['dense']:.2f} → {found['pruned']:.2f}"
        yield "measured on", found["measured_on"]
    else:
        yield "perplexity", "not measured (--eval_ppl)"
    shares = report["sparsity"]
    yield "sparsity of the MLPs", f"{shares['mlp']:.2%}"
    yield "sparsity of the whole model", f"{shares['model']:.2%}"
    yield "parameters", f"{report['parameters']['dense']:,} → {report['parameters']['kept']:,}"
    data = report["data"]
    if "set" in data:
        yield "calibration", f"{data['set']}, {data['samples']} samples, {data['tokens']:,} tokens"
    fits = report["compensation"]
    if fits:
        before, after = (sum(fits[name]) / len(fits[name]) for name in ("error_before", "error_after"))
        yield "error of the MLPs, compensated", f"{before:.1%} → {after:.1%} (held out)"
    yield "seconds", ", ".join(f"{name} {value:.0f}" for name, value in report["seconds"].items())


def _tower(report: dict, picture: Picture, what: str) -> str:
    of = [index for index, tower in enumerate(report["towers"]) if tower == picture.tower]
    dense, kept = ([report["widths"][when][index] for index in of] for when in ("dense", "kept"))
    several = len(set(report["towers"])) > 1
    figures = [
        _figure("Width of each layer", _widths(dense, kept), "neurons kept, of those there were")
        if what == "neurons"
        else "",
        _figure("Share kept in each layer", _shares(picture.kept), f"of the {what}; the line is the mean"),
        _figure("Scores", _histogram(picture), f"of all {what}; both axes shrink what is large"),
        _figure("Scores by layer", _quantiles(picture), "median, middle half, and 5% to 95%"),
    ]
    if picture.parts is not None:
        caption = "each cell in the colour of the majority, paler where there are few; both axes are logarithms"
        figures.append(_figure(f"{picture.names[0]} against {picture.names[1]}", _map(picture), caption))
    head = f"<h2>{_text(picture.tower)}</h2>" if several else "<h2>Layers and scores</h2>"
    legend = '<p><b class="stay">blue</b> stays, <b class="go">orange</b> goes</p>'
    return f'{head}{legend}<div class="all">{"".join(figures)}</div>'


def _figure(title: str, drawing: str, caption: str) -> str:
    picture = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{_text(title)}">{drawing}</svg>'
    return f"<figure><h3>{_text(title)}</h3>{picture}<figcaption>{_text(caption)}</figcaption></figure>"


# --- drawing ----------------------------------------------------------------------------------------


def _x(share: float) -> float:
    return LEFT + share * (WIDTH - LEFT - RIGHT)


def _y(share: float) -> float:
    return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)


def _bar(left: float, right: float, low: float, high: float, kind: str, opacity: float = 1.0) -> str:
    """A rectangle; all in shares of the drawing area."""
    x, y = _x(left), _y(high)
    faded = f' opacity="{opacity:.2f}"' if opacity < 1 else ""
    return (
        f'<rect class="{kind}" x="{x:.1f}" y="{y:.1f}" width="{max(_x(right) - x, 0):.1f}" '
        f'height="{max(_y(low) - y, 0):.1f}"{faded}/>'
    )


def _axes(horizontal: dict[float, str], vertical: dict[float, str], name: str) -> str:
    """Lines at marks, by their share of the axis, and the name of the horizontal one."""
    lines = []
    for share, mark in vertical.items():
        y = _y(share)
        lines.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        lines.append(f'<text x="{LEFT - 5}" y="{y + 4:.1f}" text-anchor="end">{_text(mark)}</text>')
    for share, mark in horizontal.items():
        anchor = "end" if share > 0.97 else "start" if share < 0.03 else "middle"
        at = f'x="{_x(share):.1f}" y="{HEIGHT - BOTTOM + 14}"'
        lines.append(f'<text {at} text-anchor="{anchor}">{_text(mark)}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    return "".join(lines) + f'<text x="{middle}" y="{HEIGHT - 4}" text-anchor="middle">{_text(name)}</text>'


def _layer_marks(n: int) -> dict[float, str]:
    step = max(1, -(-n // 6))
    return {(index + 0.5) / n: str(index) for index in range(0, n, step)}


def _widths(dense: Sequence[int], kept: Sequence[int]) -> str:
    highest, n = max(dense), len(dense)
    bars = []
    for index, (before, after) in enumerate(zip(dense, kept, strict=True)):
        sides = ((index + 0.1) / n, (index + 0.9) / n)
        bars.append(_bar(*sides, 0, after / highest, "stay"))
        bars.append(_bar(*sides, after / highest, before / highest, "go", 0.35))
    marks = {share: f"{share * highest:.0f}" for share in (0, 0.5, 1)}
    return _axes(_layer_marks(n), marks, "layer") + "".join(bars)


def _shares(kept: Sequence[float]) -> str:
    n, mean = len(kept), sum(kept) / len(kept)
    bars = [_bar((i + 0.1) / n, (i + 0.9) / n, 0, share, "stay") for i, share in enumerate(kept)]
    line = f'<line stroke="currentColor" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{_y(mean):.1f}" y2="{_y(mean):.1f}"/>'
    return _axes(_layer_marks(n), {0: "0%", 0.5: "50%", 1: "100%"}, "layer") + "".join(bars) + line


def _histogram(picture: Picture) -> str:
    """Bars as high as the square root of a bin's count, so that tails are seen."""
    total = picture.counts.sum(0)
    highest = max(float(total.max()), 1.0)
    bars = []
    for index in range(BINS):
        gone, all_of_it = picture.counts[0, index], total[index]
        height = (all_of_it / highest) ** 0.5
        split = height * gone / all_of_it if all_of_it else 0.0
        sides = (index / BINS, (index + 0.9) / BINS)
        bars.append(_bar(*sides, 0, split, "go") + _bar(*sides, split, height, "stay"))
    marks = {share: _short(picture.edges[round(share * BINS)]) for share in (0, 0.25, 0.5, 0.75, 1)}
    return _axes(marks, {share: _count(share**2 * highest) for share in (0, 0.5, 1)}, "score") + "".join(bars)


def _quantiles(picture: Picture) -> str:
    """Every layer's scores on the histogram's axis, upright."""
    places = np.linspace(0, 1, BINS + 1)
    spots = np.interp(picture.quantiles, picture.edges, places)
    n, bars = len(spots), []
    for index, (least, low, middle, high, most) in enumerate(spots):
        at = lambda share, index=index: (index + share) / n  # noqa: E731
        bars.append(_bar(at(0.4), at(0.6), least, most, "stay", 0.4) + _bar(at(0.15), at(0.85), low, high, "stay", 0.6))
        bars.append(_bar(at(0.1), at(0.9), middle - 0.006, middle + 0.006, "stay"))
    marks = {share: _short(picture.edges[round(share * BINS)]) for share in (0, 0.25, 0.5, 0.75, 1)}
    return _axes(_layer_marks(n), marks, "layer") + "".join(bars)


def _map(picture: Picture) -> str:
    total = picture.parts.sum(0)
    highest = max(float(np.log1p(total.max())), 1.0)
    cells = []
    for across, up in np.argwhere(total):
        stays = 2 * picture.parts[1, across, up] >= total[across, up]
        opacity = 0.25 + 0.75 * np.log1p(total[across, up]) / highest
        sides = (across / BINS, (across + 1) / BINS, up / BINS, (up + 1) / BINS)
        cells.append(_bar(*sides, "stay" if stays else "go", opacity))
    marks = [
        {share: _short(10 ** (low + share * (high - low))) for share in (0, 0.5, 1)} for low, high in picture.ranges
    ]
    return _axes(*marks, picture.names[0]) + "".join(cells)


def _short(value: float) -> str:
    """At most six characters, which is what fits beside an axis."""
    if value and not 1e-3 <= abs(value) < 1e5:
        return f"{value:.0e}"
    return f"{value:.0f}" if abs(value) >= 10 else f"{value:.2g}"


def _count(value: float) -> str:
    return f"{value / 1e6:.1f}M" if value >= 1e6 else f"{value / 1e3:.0f}k" if value >= 1e4 else f"{value:.0f}"
