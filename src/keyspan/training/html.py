"""`keyspan report`: training runs as one HTML page that needs nothing else, neither network nor scripts."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path
from typing import Any

from keyspan.core.checks import as_path, check_type
from keyspan.files import write_file
from keyspan.training.config import TrainConfig
from keyspan.training.loop import read_config
from keyspan.training.report import read_metrics, short

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b8860b", "#56b4e9", "#8c564b", "#777777")
"""Of the runs in turn: Okabe and Ito's palette, which colour-blind readers tell apart."""
POINTS = 400
"""Most points of a line: a longer run shows means of adjacent steps."""
WIDTH, HEIGHT, LEFT, BOTTOM = 480, 240, 52, 26
"""Of a chart, in its own units, and the margins of its numbers."""

STYLE = """
:root { color-scheme: light dark; --text: #1c1e21; --soft: #60656c; --line: #d8dbe0; --back: #fff; --card: #f7f8fa }
@media (prefers-color-scheme: dark) {
  :root { --text: #e6e8eb; --soft: #9aa1a9; --line: #3a3f46; --back: #15171a; --card: #1d2024 } }
* { box-sizing: border-box }
body { font: 15px/1.45 system-ui, sans-serif; color: var(--text); background: var(--back); max-width: 1120px;
  margin: 0 auto; padding: 16px }
h1 { font-size: 22px; margin: 0 0 12px } h2 { font-size: 15px; margin: 0 0 6px }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 440px), 1fr)); gap: 12px }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 12px; margin: 0 0 12px;
  min-width: 0 }
.charts .card { margin: 0 } .wide { overflow-x: auto }
svg { display: block; width: 100%; height: auto } svg text { font-size: 11px; fill: var(--soft) }
.axis { stroke: var(--line); stroke-width: 1 } .curve { fill: none; stroke-width: 1.6; stroke-linejoin: round }
.key { display: inline-block; width: 12px; height: 12px; border-radius: 3px; margin-right: 6px; vertical-align: -1px }
table { border-collapse: collapse; font-size: 14px; width: 100% }
td, th { text-align: left; padding: 4px 14px 4px 0; border-bottom: 1px solid var(--line); vertical-align: top }
td.number, th.number { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums }
.charts + h2, details { margin-top: 12px } summary { cursor: pointer }
pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: 4px 0 10px; font-size: 13px }
.soft { color: var(--soft) }
"""


@dataclass(frozen=True)
class Run:
    """What a report shows of a run."""

    name: str
    config: TrainConfig
    records: list[dict[str, Any]]
    result: dict[str, Any]
    """Of result.json; empty where the run has not ended."""
    samples: list[tuple[str, str]]
    """Prompts and what the model wrote after them."""
    colour: str

    def line(self, name: str) -> list[tuple[float, float]]:
        """(step, value) of the records that have a figure, at most `POINTS`."""
        found = [(float(r["step"]), float(r[name])) for r in self.records if name in r and math.isfinite(r[name])]
        size = -(-len(found) // POINTS) or 1
        groups = [found[at : at + size] for at in range(0, len(found), size)]
        return [(group[-1][0], sum(y for _, y in group) / len(group)) for group in groups]

    @property
    def last(self) -> dict[str, Any]:
        """The last step's figures."""
        return next((r for r in reversed(self.records) if "loss" in r), {})


def report(runs: Sequence[Path | str], out: Path | str, samples: Sequence[str] = (), sample_tokens: int = 120) -> Path:
    """Write one page that shows and compares training runs; returns its path.

    Args:
        runs: folders of training runs, finished or not.
        out: the file to write.
        samples: prompts that each run's model continues, greedily.
        sample_tokens: most tokens of a continuation.

    Raises ValueError for no runs, and for a folder that is none.
    """
    check_type("runs", runs, list, tuple)
    if not runs:
        raise ValueError("runs: got none, want at least one folder of a training run")
    folders, out = [as_path("runs", run) for run in runs], as_path("out", out)
    found = []
    for number, folder in enumerate(folders):
        config = read_config(folder)
        records = read_metrics(folder)
        if not records:
            raise ValueError(f"{folder}: holds no metrics yet; want a run that has taken a step")
        path = folder / "result.json"
        result = json.loads(path.read_bytes()) if path.is_file() else {}
        written = [(prompt, _continue(folder, prompt, sample_tokens)) for prompt in samples]
        name = str(folder) if sum(x.name == folder.name for x in folders) > 1 else folder.resolve().name
        found.append(Run(name, config, records, result, written, COLOURS[number % len(COLOURS)]))
    write_file(out, page(found).encode())
    return out


def _continue(folder: Path, prompt: str, tokens: int) -> str:
    from keyspan.inference.engine import Engine
    from keyspan.inference.pages import PagedCache
    from keyspan.inference.sampling import Sampling
    from keyspan.inference.serve import load_model

    model, tokenizer = load_model(folder, None, "cpu")
    given = tokenizer.encode(prompt)
    pages = -(-(len(given) + tokens) // 16) + 1
    engine = Engine(
        model, tokenizer, memory=pages * PagedCache.bytes_per_page(model.config, 16, model.embedding.weight.dtype)
    )
    return "".join(event.text for event in engine.stream(given, Sampling(tokens, 0.0)))


def page(runs: Sequence[Run]) -> str:
    """The page's HTML."""
    metric = next((r.result["metric"] for r in runs if "metric" in r.result), None) or next(
        (name for name in ("bits_per_byte", "exact_match") for r in runs if r.line(name)), "held_out_loss"
    )
    charts: list[tuple[str, str, float, Callable[[float], str]]] = [
        ("Training loss (nats per token)", "loss", 1, _number),
        (f"Held-out {metric.replace('_', ' ')}", metric, 1, _number),
        ("Tokens per second", "tokens_per_second", 1, short),
        ("Gradient norm", "grad_norm", 1, _number),
        ("Peak memory (MiB)", "memory", 2**20, short),
        ("Learning rate", "lr", 1, _number),
    ]
    drawn = []
    for name, figure, unit, form in charts:
        lines = [(r.colour, [(x, y / unit) for x, y in r.line(figure)]) for r in runs]
        drawn.append(_card(name, chart(lines, form)))
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} training runs"
    parts = [
        f"<h1>{escape(title)}</h1>",
        f'<div class="card wide">{_summary(runs, metric)}</div>',
        f'<div class="charts">{"".join(drawn)}</div>',
        _samples(runs),
        _configurations(runs),
    ]
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style>"
    )
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body>\n' + "\n".join(parts) + "\n</body></html>\n"


def _card(title: str, body: str) -> str:
    return f'<section class="card"><h2>{escape(title)}</h2>{body}</section>'


def _named(run: Run) -> str:
    return f'<span class="key" style="background:{run.colour}"></span>{escape(run.name)}'


def _summary(runs: Sequence[Run], metric: str) -> str:
    names = ["step", "tokens", "filled", "loss", metric.replace("_", " "), "tokens/s", "time"]
    head = "".join(f'<th class="number">{escape(name)}</th>' for name in names)
    rows = []
    for run in runs:
        last, checks = run.last, [r[metric] for r in run.records if metric in r]
        seconds = run.result.get("seconds", last.get("seconds", 0))
        tokens = sum(r.get("tokens", 0) for r in run.records)
        filled = [r["filled"] for r in run.records if "filled" in r]  # share of a batch's positions
        cells = [
            f"{last.get('step', 0):,} of {run.config.steps:,}",
            short(tokens),
            f"{100 * sum(filled) / len(filled):.1f} %" if filled else "",
            _number(last["loss"]) if last else "",
            _number(checks[-1]) if checks else "",
            short(tokens / seconds) if seconds else "",
            _time(seconds),
        ]
        rows.append(f"<tr><td>{_named(run)}</td>" + "".join(f'<td class="number">{x}</td>' for x in cells) + "</tr>")
    baselines: dict[str, float] = next((r.result["baselines"] for r in runs if r.result.get("baselines")), {})
    also = ", ".join(f"{escape(name)} {_number(x)}" for name, x in baselines.items())
    note = f'<p class="soft">For comparison: {also}</p>' if also else ""
    return f"<table><tr><th>run</th>{head}</tr>{''.join(rows)}</table>{note}"


def _samples(runs: Sequence[Run]) -> str:
    if not any(run.samples for run in runs):
        return ""
    texts = ""
    for run in runs:
        written = (f'<pre><span class="soft">{escape(prompt)}</span>{escape(x)}</pre>' for prompt, x in run.samples)
        texts += f"<div>{_named(run)}{''.join(written)}</div>"
    return f'<section class="card" style="margin-top:12px"><h2>Samples</h2>{texts}</section>'


def _configurations(runs: Sequence[Run]) -> str:
    """The options: those in which the runs differ, then all."""
    options = [{name: _word(value) for name, value in asdict(run.config).items()} for run in runs]
    differing = [name for name in options[0] if len({x[name] for x in options}) > 1 and name not in ("out", "resume")]

    def table(names: Sequence[str]) -> str:
        head = "".join(f"<th>{_named(run)}</th>" for run in runs)
        rows = [f"<tr><td>{n}</td>{''.join(f'<td>{escape(x[n])}</td>' for x in options)}</tr>" for n in names]
        return f'<div class="wide"><table><tr><th>option</th>{head}</tr>{"".join(rows)}</table></div>'

    shown = f"<h2>Where the runs differ</h2>{table(differing)}" if differing else ""
    every = f"<details><summary>All options</summary>{table(list(options[0]))}</details>"
    return f'<section class="card" style="margin-top:12px">{shown}{every}</section>'


def chart(lines: Sequence[tuple[str, Sequence[tuple[float, float]]]], form: Callable[[float], str]) -> str:
    """Lines (colour, points) as an SVG picture with both axes; a note where there are no points."""
    points = [point for _, line in lines for point in line]
    if not points:
        return '<p class="soft">not recorded</p>'
    x0, x1 = _span([x for x, _ in points])
    y0, y1 = _span([y for _, y in points])
    right, top = WIDTH - 10, 8

    def place(x: float, y: float) -> tuple[float, float]:
        return LEFT + (x - x0) / (x1 - x0) * (right - LEFT), HEIGHT - BOTTOM - (y - y0) / (y1 - y0) * (
            HEIGHT - BOTTOM - top
        )

    drawn = []
    for y in ticks(y0, y1):
        at = place(x0, y)[1]
        drawn.append(f'<line class="axis" x1="{LEFT}" x2="{right}" y1="{at:.1f}" y2="{at:.1f}"/>')
        drawn.append(f'<text x="{LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{form(y)}</text>')
    for x in ticks(x0, x1):
        at = place(x, y0)[0]
        drawn.append(f'<text x="{at:.1f}" y="{HEIGHT - 8}" text-anchor="middle">{short(x)}</text>')
    for colour, line in lines:
        path = " ".join("{:.1f},{:.1f}".format(*place(*point)) for point in line)
        if len(line) == 1:
            cx, cy = place(*line[0])
            drawn.append(f'<circle cx="{cx:.1f}" cy="{cy:.1f}" r="3" fill="{colour}"/>')
        elif line:
            drawn.append(f'<polyline class="curve" stroke="{colour}" points="{path}"/>')
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img">{"".join(drawn)}</svg>'


def _span(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    room = (high - low) * 0.04 or abs(high) * 0.1 or 1.0
    return low - room, high + room


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers between low and high, 1, 2 or 5 times a power of ten apart."""
    step = 10.0 ** math.floor(math.log10((high - low) / most))
    step = next(step * factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) <= most)
    return [n * step for n in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _number(x: float) -> str:
    return f"{x:.4g}"


def _time(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _word(value: Any) -> str:
    return "" if value is None else str(value)
