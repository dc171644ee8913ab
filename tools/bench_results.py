"""Write benchmarks/RESULTS.md from the output of `make bench`.

Run `make bench | tee bench.log`, then `python tools/bench_results.py bench.log`.
"""

import json
import sys
from itertools import groupby
from pathlib import Path
from typing import Any

TARGET = Path(__file__).parents[1] / "benchmarks" / "RESULTS.md"
Rows = list[tuple[str, str, str]]
AIMS = ("", "measured", "aim")


def main() -> None:
    lines = Path(sys.argv[1]).read_text(encoding="utf-8").splitlines()
    found = json.loads(lines[-1])
    shown = ["\n".join(block) for table, block in groupby(lines, lambda line: line.startswith("|")) if table]
    environment = ", ".join(f"{name} {value}" for name, value in found["training"]["environment"].items())
    parts = [
        "# Results",
        f"The output of one run of `make bench`, {found['seconds'] / 60:.0f} minutes on one machine. "
        "Ratios hold on other machines; seconds do not.\n\n"
        "The *original* is the system that this project replaces, "
        "[100类动物图像生成器](https://github.com/xiaozhou-alt/Animals_Generationn).",
        f"Environment: {environment}.",
        training(found["training"]),
        inference(found["inference"], shown),
        *([fast(found["fast"])] if "cold" in found["fast"] else []),
        data(found["data"], shown),
        using(found["using"]),
        programs(found["programs"]),
        tracking(found["tracking"]),
        *(gpu(json.loads(file.read_text(encoding="utf-8"))) for file in sorted(TARGET.parent.glob("gpu-*.json"))),
    ]
    TARGET.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    print(TARGET)


def training(result: dict[str, Any]) -> str:
    gpu = result["environment"]["device_type"] == "cuda"
    text = (
        "## Training (`python benchmarks/training.py`)\n\n"
        "UNet, VAE and text encoder have Stable Diffusion 1.5's size and random weights. Our training is compared\n"
        "with a loop that does what the original does, in a separate process with the C library's default memory\n"
        "settings. The overhead is the share of our step that the bare step, run in turn with it, does not need: the\n"
        f"median (minimum to maximum) of a few measurements. A matrix product reaches "
        f"{result['matmul_gflops_per_second']:,.0f} GFLOP/s\n"
        f"here; an image takes {result['training'][0]['gflop_per_image']:.0f} GFLOP "
        f"at {result['training'][0]['resolution']} px."
    )
    tables = []
    for row in result["training"]:
        rows = [
            ("seconds per image", f"{row['seconds_per_image']:.2f}", ""),
            ("the original's loop", f"{row['original_seconds_per_image']:.2f}", ""),
            ("ours / the original's", f"{row['share_of_original']:.3f}", "0.333"),
            (
                "share of the matrix product's rate",
                f"{100 * row['share_of_matmul_rate']:.0f} %",
                "35 %" if gpu else "75 %",
            ),
            ("peak memory", f"{row['peak_memory_mib']:,.0f} MiB", ""),
        ]
        if row["overhead_share"] is not None:
            rows.insert(4, ("overhead around the step", overhead(row, "overhead_share"), "3 %"))
        how = ", compiled" if row["compiled"] else ""
        tables.append(table(rows, (f"{row['resolution']} px, batch {row['batch_size']}{how}", *AIMS[1:])))
    rest = [
        (f"encoding / the VAE's forward pass alone, {row['resolution']} px", f"{row['ratio_to_vae']:.2f}", "1.1")
        for row in result["encoding"]
    ]
    rest.append(("overhead around the step, bundled base", overhead(result, "bundled_overhead_share"), "25 %"))
    return "\n\n".join([text, *tables, table(rest)])


def overhead(row: dict[str, Any], name: str) -> str:
    median, least, most = (100 * row[key] for key in (name, f"{name}_least", f"{name}_most"))
    return f"{median:.1f} % ({least:.1f} to {most:.1f})"


def inference(result: dict[str, Any], shown: list[str]) -> str:
    bundled, large = (block for name in ("cmmd_to_original", "step_s") for block in shown if f"\n| {name} |" in block)
    return (
        "## Inference (`python benchmarks/inference.py`)\n\n"
        "The default setting is compared with the original's way: DDPM, 100 steps, guidance at every step. Both\n"
        "samplers are stochastic, so single pictures cannot be compared. CMMD compares all pictures together,\n"
        "generated from different noise; it is 0 for two sets of the same kind.\n\n"
        f"On the bundled base, {result['bundled']['pictures']} pictures:\n\n{bundled}\n\n"
        f"At Stable Diffusion 1.5's size, {result['sd15_size']['resolution']} px, "
        f"scaled from {result['sd15_size']['timed_steps']} steps:\n\n{large}"
    )


def fast(result: dict[str, Any]) -> str:
    def seconds(size: str) -> str:
        ways = {name: way for name, way in result[size].items() if isinstance(way, dict)}
        rows = [
            "| way | passes | text s | denoise s | decode s | total s | times faster | peak MiB |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for name, way in ways.items():
            parts = (f"{way[part]:,.3g}" for part in ("text_s", "denoise_s", "decode_s"))
            total = f"{way['total_s']:,.3g}{' (extrapolated)' if way['extrapolated'] else ''}"
            cells = [
                name,
                way["passes"],
                *parts,
                total,
                f"{way['times_faster']:,.0f}",
                f"{way['peak_memory_mib']:,.0f}",
            ]
            rows.append(f"| {' | '.join(map(str, cells))} |")
        return "\n".join(rows)

    cold, export, large = result["cold"], result["export"], result["sd15_size"]
    aims = [
        ("times faster than the original's way, warm", f"{large['fast']['times_faster']:,.0f}", "200"),
        ("a cold `bestiary generate`", f"{cold['seconds']:.1f} s (compiling: {cold['first_s']:.1f} s)", "15 s"),
        ("its peak memory", f"{cold['peak_memory_mib']:,.0f} MiB", "4,096 MiB"),
        (f"export to {export['precision']}", f"{export['seconds']:.0f} s, {export['size_mib']:,.0f} MiB", ""),
        ("error of the UNet's predictions", f"{export['unet_error']:.1%}", ""),
    ]
    return (
        "## The fast variant (`python benchmarks/fast.py`)\n\n"
        "Two passes with OpenVINO and a tiny decoder, compared with our default and the original's way in torch.\n"
        "Single pictures, warm. Extrapolated seconds are from a few timed guided steps.\n\n"
        f"On the bundled base:\n\n{seconds('bundled')}\n\n"
        f"At Stable Diffusion 1.5's size with random weights, {large['resolution']} px:\n\n{seconds('sd15_size')}\n\n"
        f"{table(aims)}"
    )


def data(result: dict[str, Any], shown: list[str]) -> str:
    download, hashes = result["download"], result["near_duplicates"]
    rows = [
        (
            f"cleaning / only decoding, {row['images']:,} JPEGs",
            f"{row['ratio']:.2f} ({row['images_per_second']:,.0f} images/s, {row['peak_memory_mib']:.0f} MiB)",
            "2.5",
        )
        for row in result["cleaning"]
    ]
    rows.append((f"download / bare HTTP loop, {download['files']:,} files", f"{download['ratio']:.2f}", "1.5"))
    rows.append((f"near-duplicates among {hashes['hashes']:,} hashes", f"{hashes['seconds']:.1f} s", "60 s"))
    (faults,) = (block for block in shown if block.startswith("| planted |"))
    return (
        f"## Data (`python benchmarks/data.py`)\n\n{table(rows)}\n\nFaults planted in the bundled sample:\n\n{faults}"
    )


def using(result: dict[str, Any]) -> str:
    rows = [
        ("`bestiary --help`", f"{result['help_s']:.2f} s", "0.5 s"),
        (
            "`bestiary generate` to the first picture",
            f"{result['generate_s']:.1f} s, of which {result['import_s']:.1f} s for imports",
            "8 s",
        ),
        ("growth of the page's memory over 50 pictures", f"{100 * result['page_growth']:.2f} %", "5 %"),
    ]
    return f"## Using the adapter (`python benchmarks/using.py`)\n\n{table(rows)}"


def programs(result: dict[str, Any]) -> str:
    rows = [
        (
            f"overhead of the API, {result['pictures']} pictures in one request",
            f"{result['overhead_share']:.1%} ({result['cpu_overhead_share']:.1%} of CPU time)",
            "2 %",
        ),
        ("the command's loop beside itself", f"{result['control_share']:.1%}", "0 %: how exact this is"),
    ]
    return (
        "## Programs (`python benchmarks/programs.py`)\n\n"
        "OpenAI's images API is compared with the command's own loop, in turns: the same pictures, on the bundled\n"
        "base.\n\n"
        f"{table(rows)}"
    )


def tracking(result: dict[str, Any]) -> str:
    rows = [
        (
            f"{name}: waiting for MLflow",
            f"{row['waiting_s'] / row['recording_s']:.1%}, {row['waiting_s']:.2f} s of {row['recording_s']:.1f} s",
            "1 %",
        )
        for name, row in result.items()
        if isinstance(row, dict)
    ]
    rows.append(("`bestiary lineage` among 1,000 runs", f"{result['lineage_s']:.2f} s", "2 s"))
    return (
        "## Recording (`python benchmarks/tracking.py`)\n\n"
        "The time for which a stage waits for its recorder, which works in a separate process. "
        f"The training is cut to {result['training_steps']} steps.\n\n{table(rows)}"
    )


def gpu(result: dict[str, Any]) -> str:
    """The tables of a card whose runs of benchmarks/gpu.py are kept in a file."""
    runs = result["runs"]
    environment = ", ".join(f"{key} {value}" for key, value in runs[0]["environment"].items())
    parts = [
        f"## {runs[0]['gpu']} (`python benchmarks/gpu.py`)",
        f"{len(runs)} runs, the first with {environment}. The official script is the work of diffusers' "
        "train_text_to_image_lora.py at its best batch.",
    ]
    for number, run in enumerate(runs, 1):
        parts += [f"Run {number}, {run['date']}. {run['note']}", gpu_rows(run["rows"])]
    return "\n\n".join(parts)


def gpu_rows(rows: dict[str, dict[str, Any]]) -> str:
    official = {
        side: max(rates)
        for side in (256, 512)
        if (rates := [row["images_per_second"] for name, row in rows.items() if _is_official(name, row, side)])
    }
    lines = []
    for name, row in rows.items():
        rate, share = row.get("images_per_second"), row.get("share_of_matmul_rate")
        side = next((side for side in official if f"{side} px" in name), None)
        cells = (
            name,
            f"{rate:.4g}" if rate else "failed" if "error" in row else "",
            f"{100 * share:.1f} %" if share else "",
            f"{rate / official[side]:.2f}" if rate and side and name.startswith("our") else "",
            f"{row['peak_gib']:.1f}" if "peak_gib" in row else "",
        )
        lines.append(f"| {' | '.join(cells)} |")
    head = (
        "| what | images/s | share of the matmul rate | times the official script | peak GiB |\n|---|---|---|---|---|"
    )
    return "\n".join([head, *lines])


def _is_official(name: str, row: dict[str, Any], side: int) -> bool:
    return name.startswith(f"official script, {side}") and "images_per_second" in row


def table(rows: Rows, head: tuple[str, str, str] = AIMS) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ("---",) * 3, *rows))


if __name__ == "__main__":
    main()
