"""Results as lines of plain text, for the command line."""

from collections.abc import Iterable

import pandas as pd

paths = "\n".join


def columns(rows: Iterable[dict]) -> str:
    """Rows as aligned columns, numbers with four digits."""
    return pd.DataFrame(rows).to_string(index=False, float_format=lambda value: f"{value:.4g}")


def left(counts: dict) -> str:
    """What pruning leaves, by layer and in all; `counts` as of `explib.study.networks.counts`."""
    keys = ("name", "kernels", "nominal", "pruned", "macs_dense", "macs")
    lines = [columns([{key: row[key] for key in keys} for row in counts["layers"]])]
    macs, weights = counts["macs"], counts["weights"]
    cut = 100 * (1 - macs["left"] / macs["dense"])
    published = 100 * (1 - macs["published_m"] / (macs["dense"] / 1e6))
    lines += [
        "",
        f"kernels pruned      {100 * counts['sparsity']:.2f} %"
        f" (asked for: {100 * counts['nominal_sparsity']:.2f} %)",
        f"multiply-adds left  {macs['left'] / 1e6:.2f} of {macs['dense'] / 1e6:.2f} M",
        f"true cut            {cut:.2f} %",
        f"published cut       {published:.2f} % (its convention mixes units)",
        f"weights left        {weights['left'] / 1e6:.3f} of {weights['dense'] / 1e6:.3f} M",
    ]
    return "\n".join([*lines, f"masks in {counts['masks']}"] if "masks" in counts else lines)


def run(record: dict) -> str:
    """A record in a few lines: its state, its accuracies in per cent, its folder."""
    top1 = {k: v for k, v in record["accuracy"].items() if v is not None}
    lines = [f"{record['kind']} {record['params']['name']}: {record['status']}"]
    lines += [f"{name:12s} {value:.2f} %" for name, value in top1.items() if name != "best_epoch"]
    return "\n".join([*lines, f"files in {record['params']['job_dir']}"])


def control(row: dict) -> str:
    """A row of `explib.study.controls.measure`: setting, mean top-1 over the mask seeds."""
    setting = f"{row['pruning_way']:8s} {row['survivors']:7s} {row['changed']:15s}"
    return f"{row['arch']} {row['cut_pct']} % {setting} {sum(row['top1']) / len(row['top1']):6.2f}"


def recipe(row: dict) -> str:
    """A row of `explib.study.recipes.compare`."""
    return f"{row['recipe']:40s} {row['before']:6.2f} → {row['last']:.2f} %"


def classified(row: dict) -> str:
    """A row of `explib.engine.images.classify`: the file, its classes and their scores."""
    return "  ".join([row["file"], *(f"{c['class']} {c['score']:.3f}" for c in row["classes"])])


def ran(found: dict) -> str:
    """How fast `explib run` was, and with what."""
    count, report = len(found["images"]), found["ran"]
    reading, network = (sum(row[k] for row in found["images"]) for k in ("reading_s", "network_s"))
    where = "torch" if report["engine"] == "torch" else "the engine"
    threads = f"{report['threads']} thread" + "s" * (report["threads"] > 1)
    vectors = report.get("instructions", "").partition(",")[0]
    if not count:
        return "no image could be read"
    return (
        f"{count} images, {count / network:.4g} images/s, with reading "
        f"{count / (reading + network):.4g}; in {where}, "
        + ", ".join(filter(None, [report["dtype"], threads, vectors]))
    )


def evaluated(rows: list[dict]) -> str:
    """The rows of `explib.study.verify.verify`, of one network."""
    return columns(
        {
            "computed in": row["way"],
            "top-1": f"{row['top1']:.2f}",
            "recorded": f"{row['recorded']:.2f}",
            "other answers": row["differ"],
            "computed twice %": f"{row['rechecked_pct']:.1f}",
        }
        for row in rows
    )


def accuracy(row: dict) -> str:
    """A row of `explib.study.verify.verify_all`; its columns are those of ACCURACY."""
    found = f"{row['top1']:6.2f} {row['recorded']:9.2f} {row['differ']:14d}"
    return f"{row['network']:28s} {row['way']:24s} {found}"


ACCURACY = (
    f"{'network':28s} {'computed in':24s} {'top-1':>6s} {'recorded':>9s} {'other answers':>14s}"
)


def verified(found: dict) -> str:
    """The largest differences of `explib.study.verify.worst`, and the file written."""
    lines = [
        f"{row['way']}: the worst of {row['networks']} off by {row['off']:.2f}, "
        f"allowed {row['allowed']}"
        for row in found["worst"]
    ]
    return "\n".join(lines + [found["file"]] * bool(found["file"]))


def growth(row: dict) -> str:
    """A row of `explib.study.bench.processes.measure`."""
    speed = f"{row['images_per_s']:.0f} images/s, {row['efficiency']:.2f} of linear"
    return f"{row['processes']} processes: {speed}"


def training(row: dict) -> str:
    """A row of `explib.study.bench.training.record`, of either kind."""
    if "pruned_pct" in row:
        name = f"{row['network']}, {row['pruned_pct']:.0f} % pruned, all and surviving kernels"
        return f"{name:45s} {row['all_kernels']:10.0f} {row['surviving_kernels']:10.0f} images/s"
    name = f"{row['network']}, {row.get('task', 'train')}, {row['loop']}"
    speed = row["images_per_s"]
    return f"{name:45s} " + ("failed" if speed is None else f"{speed:10.0f} images/s")


def gpu(row: dict) -> str:
    """A row of `explib.study.bench.gpu.measure`."""
    if "at_once" in row:
        speed = f"{row['images_per_s']:,.0f} images/s ({row['trained_by']}, {row['precision']})"
        return f"{row['network']}, {row['at_once']} at once: {speed}"
    what = {
        "recorded": "recorded steps against the same ones begun one by one",
        "resumed": "an interrupted run against one that was not",
    }[row["part"]]
    off, equal = row["largest_difference"], row["of_two_equal_runs"]
    return f"{row['network']}, {what}: off by {off:.2g}, two equal runs by {equal:.2g}"


def values(found: dict[str, float]) -> str:
    """Named numbers, one a line."""
    return "\n".join(f"{name:45s} {value:10.4g}" for name, value in found.items())


def ratios(found: dict) -> str:
    """The ratios of a record of `explib.study.bench.training`."""
    return values(found["ratios"])


def speeds(found: dict) -> str:
    """Images per second of a record of `explib.study.bench.inference`, by network and batch."""
    lines = []
    for row in found["networks"]:
        lines.append(f"{row['arch']} batch {row['batch']}")
        lines += [f"  {name:16s} {s:10.1f} images/s" for name, s in row["images_per_s"].items()]
    return "\n".join(lines)


def compared(row: dict) -> str:
    """A row of `explib.study.bench.comparison.measure`: images/s by way, and what is lacking."""
    if "kept" in row:
        return f"{row['arch']}: measured already, {row['kept']}; --again measures it anew"
    cut = f"{row['cut_pct']:.1f} % of the multiply-adds cut"
    lines = [f"{row['label']} batch {row['batch']}, {cut}"]
    for way, speed in row["images_per_s"].items():
        spread = f"± {row['spread_pct'][way] / 2:.0f} %, {row['calls'][way]} calls"
        lines.append(f"  {way:24s} {speed:10.1f} images/s {spread}")
    for found in row["sweep"]:
        name = f"engine fp32 at {found['density']:g}"
        lines.append(f"  {name:24s} {found['images_per_s']['engine fp32']:10.1f} images/s")
    lines += [f"  top-1 of {name}: {value:.2f} %" for name, value in row["top1"].items()]
    return "\n".join(lines + [f"  not timed: {n}: {why}" for n, why in row["lacking"].items()])


def done(rows: list[dict]) -> str:
    """The last line after rows that were printed one by one."""
    return f"{len(rows)} rows"
