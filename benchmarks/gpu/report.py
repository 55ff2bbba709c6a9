"""GPU records -> one CSV, and from it the table of ``docs/performance-gpu.md``."""

from __future__ import annotations

import csv
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.problems import ASKED_MEMORY, JOBS, TAILS, asked_ms
from benchmarks.processes import describe_environment, installed_version
from benchmarks.report import format_bytes, table

COLUMNS = (
    *("problem", "job", "B", "T", "K", "C", "dtype", "status"),
    *("median_ms", "q1_ms", "q3_ms", "min_ms", "repeats", "asked_ms", "met"),
    *("events_median_ms", "peak_bytes", "peak_over_scores", "asked_memory"),
    *("memory_met", "check_error", "date", "device", "driver", "cuda", "torch", "triton"),
    *("python", "commit"),
)

Record = dict[str, Any]


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.split()[0] if done.stdout.split() else "unknown"


def describe_device(device: str, commit: str | None) -> dict[str, str]:
    """Device, driver, versions and commit (git's, unless one is given)."""
    found = describe_environment()
    if torch.device(device).type == "cuda":
        found |= {"device": torch.cuda.get_device_name(device), "driver": _driver()}
    return {
        "date": found["date"],
        "device": found["device"],
        "driver": found.get("driver", "none"),
        "cuda": torch.version.cuda or "none",
        "torch": torch.__version__,
        "triton": installed_version("triton"),
        "python": platform.python_version(),
        "commit": commit or found["commit"],
    }


def _yes(met: bool) -> str:
    return "yes" if met else "no"


def judge(record: Record) -> Record:
    """Add what was asked of a record, and whether it was met."""
    asked = {"asked_ms": asked_ms(record["problem"], record["job"])}
    bound = ASKED_MEMORY.get(record["job"])
    if bound is not None:
        asked["asked_memory"] = bound
    if record["status"] != "ok":
        return {**record, **asked, "met": "no"}
    asked["met"] = _yes(record["median_ms"] <= asked["asked_ms"])
    if record["peak_bytes"] is not None:
        ratio = record["peak_bytes"] / (4 * record["B"] * record["T"] * record["C"])
        asked["peak_over_scores"] = ratio
        if bound is not None:
            asked["memory_met"] = _yes(ratio <= bound)
    return {**record, **asked}


def _cell(value: Any) -> Any:
    return f"{value:.4g}" if isinstance(value, float) else value


def write_csv(path: Path, records: list[Record]) -> None:
    """Write records with the columns `COLUMNS`, figures to four digits."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows({k: _cell(v) for k, v in record.items()} for record in records)


def read_csv(path: Path) -> list[dict[str, str]]:
    """The rows that `write_csv` wrote, as text."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def _row(row: dict[str, str]) -> list[str]:
    shape = f"{row['B']}, {int(row['T']):,}, {row['K']}, {row['C']}"
    if row["problem"] in TAILS:
        shape += ", with a tail"
    start = [shape, JOBS[row["job"]]]
    if row["status"] != "ok":
        return [*start, row["status"].replace("|", "/"), "", f"{row['asked_ms']} ms", "**no**", ""]
    quartiles = f"{float(row['q1_ms']):.3g} to {float(row['q3_ms']):.3g} ms"
    memory = ""
    if row["peak_bytes"]:
        ratio = f"{float(row['peak_over_scores']):.2g} x"
        mark = " (**above the bound**)" if row["memory_met"] == "no" else ""
        memory = f"{format_bytes(float(row['peak_bytes']))}, {ratio}{mark}"
    met = "yes" if row["met"] == "yes" else "**no**"
    median = f"{float(row['median_ms']):.3g} ms"
    return [*start, median, quartiles, f"{row['asked_ms']} ms", met, memory]


def render(rows: list[dict[str, str]]) -> str:
    """The generated part of the page, from the rows of the CSV."""
    where = (
        "{device}, driver {driver}, CUDA {cuda}; Python {python}, torch {torch}, Triton {triton}; "
        "commit {commit}, {date}."
    ).format(**rows[0])
    header = ["B, T, K, C", "job", "median", "quartiles", "asked: at most", "met"]
    header.append("peak extra memory, and over the float32 scores")
    return f"{where}\n\n{table(header, map(_row, rows))}"
