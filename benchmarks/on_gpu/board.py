"""Results of a run as they come: JSON, tables and a picture. Knows no GPU."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from on_gpu.works import Work


def _title(row: dict[str, Any]) -> str:
    return str(Work(*(row[name] for name in Work._fields)))


class Board:
    """Rows of results, written after each."""

    def __init__(self, out: Path):
        self.out, self.rows, self.head = out, list[dict[str, Any]](), dict[str, Any]()

    def add(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        line = row.pop("line")
        print(line, flush=True)
        if "direction" not in row and "decode" not in row:
            row["text"] = line
        (self.out / "bench.json").write_text(json.dumps({**self.head, "rows": self.rows}, indent=1))
        (self.out / "bench.md").write_text(self.table())

    def table(self) -> str:
        """What was timed, as the documentation shows it."""
        ceiling = self.head.get("matmul_tflops", math.nan)
        lines = [", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in self.head.items()), "",
                 "| work | pass | Keyspan TFLOP/s | of GEMM | peers' TFLOP/s | best peer's time ÷ Keyspan's "
                 "| peak MiB |",
                 "|---|---|--:|--:|---|--:|--:|"]  # fmt: skip
        for row in self.rows:
            if "tflops" in row and "direction" in row:
                rates = dict(row["tflops"])
                own = rates.pop("keyspan", math.nan)
                peers = ", ".join(f"{n} {r:.0f}" for n, r in rates.items()) or "–"
                ratio = f"{row['ratio']:.2f} ({row['best_peer']})" if row["ratio"] else "–"
                peak = f"{row['peak_mib']['keyspan']:.0f}" if "keyspan" in row["peak_mib"] else "–"
                cells = (_title(row), row["direction"], f"{own:.0f}", f"{own / ceiling:.0%}", peers, ratio, peak)
                lines.append(f"| {' | '.join(cells)} |")
        lines += ["", "| decoding | TB/s of keys and values, read once | µs |", "|---|---|---|"]
        for row in self.rows:
            if row.get("decode"):
                name = f"B{row['B']} N{row['N']} H{row['H']}/{row['G']} D{row['D']} "
                name += f"pages of {row['page']}" if row["page"] else "contiguous"
                rates = ", ".join(f"{n} {r:.2f}" for n, r in row["tb_per_s"].items())
                spent = ", ".join(f"{n} {ms * 1e3:.0f}" for n, ms in row["ms"].items())
                lines.append(f"| {name} | {rates} | {spent} |")
        lines += ["", *(row["text"] for row in self.rows if "text" in row)]
        return "\n".join(lines) + "\n"

    def plot(self) -> None:
        """TFLOP/s of every work and provider, forward and backward, as bars."""
        try:
            from matplotlib.figure import Figure
        except ImportError:
            return
        timed = [row for row in self.rows if "direction" in row]
        labels = list(dict.fromkeys(_title(row) for row in timed))
        names = [n for n in ("keyspan", "cudnn", "flash", "efficient", "flex") if any(n in r["tflops"] for r in timed)]
        if not labels:
            return
        figure = Figure(figsize=(12, 1.5 + 0.55 * len(labels)), layout="constrained")
        axes = figure.subplots(1, 2, sharex=True, sharey=True)
        height = 0.8 / len(names)
        for direction, axis in zip(("forward", "backward"), axes, strict=True):
            for n, name in enumerate(names):
                at, rates = [], []
                for row in timed:
                    if row["direction"] == direction and name in row["tflops"]:
                        # Those that have a rate stand together.
                        before = sum(x in row["tflops"] for x in names[:n])
                        at.append(labels.index(_title(row)) + (before + 0.5) * height - 0.4)
                        rates.append(row["tflops"][name])
                axis.barh(at, rates, height=height, label=name)
            axis.axvline(self.head.get("matmul_tflops", 0), color="grey", linestyle="--", linewidth=1)
            axis.set_title(f"{direction}, bf16")
            axis.set_xlabel("TFLOP/s over the visible area (dashed: a large matrix product)")
            axis.grid(axis="x", alpha=0.3)
        axes[0].set_yticks(range(len(labels)), labels)
        axes[0].margins(y=0.01)
        axes[0].invert_yaxis()
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(names))
        figure.suptitle(f"{self.head['device']}, torch {self.head['torch']}, triton {self.head['triton']}")
        figure.savefig(self.out / "bench.png", dpi=100)
