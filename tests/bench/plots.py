#!/usr/bin/env python3
"""How rates grow with threads, context and batch, and a roofline of each kernel: tables and plots.

Measures with `tercet bench --json`, a process for each point, and with the example `kernels`; draws
from what they print. Points that are in DIR already are not measured again, so that a sweep can be
made in short pieces: --seconds ends a piece, and the same command goes on with it.

    DIR/sweep.jsonl     what `tercet bench --json` said of each point
    DIR/kernels.jsonl   what `kernels --json` said
    DIR/tables.md       the tables
    DIR/threads.svg, context.svg, batch.svg, roofline.svg

    pip install matplotlib
    cargo build --release -p tercet-kernels --example kernels
    python3 tests/bench/plots.py --model target/bench/bitnet-2b-4t-i2_s-q6_k.gguf --out target/plots
    python3 tests/bench/plots.py --out target/plots --draw      # measures nothing
"""
import argparse
import json
import pathlib
import subprocess
import sys
import time

# Tokens of the prompts of which batches are measured: short, since only their decoding is shown.
BATCH_PROMPT = 16
# What the rates over threads are shown for: tokens of the prompt and sequences.
SHOWN = [(128, 1), (BATCH_PROMPT, 8)]
LIMIT = 300  # seconds, of any one measurement


def numbers(text):
    return [int(number) for number in text.split(",")]


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, type=pathlib.Path, metavar="DIR", help="where all of it goes")
    parser.add_argument("--tercet", default="target/release/tercet", help="the binary")
    parser.add_argument("--model", help="what to measure [default: the built-in model]")
    parser.add_argument("--threads", type=numbers, default=[1, 2])
    parser.add_argument("--contexts", type=numbers, default=[128, 256, 512, 1024, 2048, 4096],
                        help="tokens of the prompt of one sequence")
    parser.add_argument("--batches", type=numbers, default=[1, 2, 4, 8, 16, 32, 64], help="sequences at once")
    parser.add_argument("--generate", type=int, default=16, help="tokens that each generates")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--kernels", default="target/release/examples/kernels", help="the example, built")
    parser.add_argument("--only", help="measure the kernels whose names have this in them alone")
    parser.add_argument("--tokens", default="1,2,4,8,16,32,64,128", help="tokens in a call of a kernel")
    parser.add_argument("--ms", default="60", help="how long each call of a kernel is repeated")
    parser.add_argument("--seconds", type=float, help="begin no measurement after so long")
    parser.add_argument("--draw", action="store_true", help="measure nothing")
    parser.add_argument("--tables", action="store_true", help="draw nothing, make the tables alone")
    return parser.parse_args()


def progress(text):
    print(text, file=sys.stderr, flush=True)


class Watch:
    """Says when no more is to be begun."""

    def __init__(self, seconds):
        self.end = time.monotonic() + seconds if seconds else None
        self.left = 0

    def is_over(self):
        over = self.end is not None and time.monotonic() > self.end
        self.left += over
        return over


def call(command):
    """Returns what a command says; None, and tells why, if it fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=LIMIT, check=True).stdout
    except subprocess.TimeoutExpired:
        progress(f"LEFT OUT: {' '.join(command)}: it took more than {LIMIT} s")
    except (OSError, subprocess.CalledProcessError) as error:
        said = getattr(error, "stderr", None) or str(error)
        progress(f"LEFT OUT: {' '.join(command)}: {said.strip()}")
    return None


def read(path):
    """Reads objects, one a line; a last line that was cut off is measured again."""
    records = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            records.append(json.loads(line))
        except ValueError:
            progress(f"{path} has a broken line: it is passed over")
    return records


def append(path, records):
    with open(path, "a") as out:
        out.writelines(json.dumps(record) + "\n" for record in records)


def key(report):
    return report["threads"], report["prompt"], report["batch"]


def sweep(args, watch):
    """Measures what is missing of all points."""
    path = args.out / "sweep.jsonl"
    wanted = [(threads, *load) for threads in args.threads
              for load in dict.fromkeys([*((context, 1) for context in args.contexts),
                                         *((BATCH_PROMPT, batch) for batch in args.batches)])]
    done = {key(report) for report in read(path)}
    for threads, prompt, batch in wanted:
        if (threads, prompt, batch) in done or watch.is_over():
            continue
        begun = time.monotonic()
        command = [args.tercet, "bench", "--json", "--threads", str(threads), "--prompt", str(prompt), "--batch",
                   str(batch), "--generate", str(args.generate), "--repeat", str(args.repeat)]
        said = call(command + (["--model", args.model] if args.model else []))
        if said:
            report = json.loads(said)
            append(path, [report])
            progress(f"{threads} threads, {batch} x {prompt}: decode "
                     f"{report['decode_tokens_per_second']['median']:.1f}, prefill "
                     f"{report['prefill_tokens_per_second']['median']:.1f} tokens/s "
                     f"({time.monotonic() - begun:.0f} s)")


def roofline(args, watch):
    """Measures what is missing of all kernels."""
    if not pathlib.Path(args.kernels).exists():
        progress(f"LEFT OUT: no kernels are measured: {args.kernels} is not there, build it or name it with --kernels")
        return
    path = args.out / "kernels.jsonl"
    done = {record["kernel"] for record in read(path)}
    if args.only:
        names = [args.only]
    else:
        said = call([args.kernels, "--json", "--tokens", "1", "--threads", "1", "--ms", "1", "--mib", "1"]) or ""
        names = list(dict.fromkeys(json.loads(line)["kernel"] for line in said.splitlines()))
    for name in names:
        if name in done or watch.is_over():
            continue
        said = call([args.kernels, "--json", "--only", name, "--tokens", args.tokens, "--ms", args.ms,
                     "--threads", ",".join(map(str, args.threads))])
        records = [json.loads(line) for line in (said or "").splitlines()]
        # A name can be a part of another.
        append(path, [record for record in records if args.only or record["kernel"] == name])
        progress(f"{name}: {len(records)} figures")


def cell(spread, digits=1):
    if not spread:
        return ""
    return f"{spread['median']:.{digits}f} ({spread['min']:.{digits}f}-{spread['max']:.{digits}f})"


def bandwidth(reports, threads):
    """Returns the median rate, in GB/s, at which so many threads read memory, over all reports."""
    rates = sorted(rate["median"] for report in reports for rate in report["machine"]["read_bytes_per_second"]
                   if rate["threads"] == threads)
    return rates[len(rates) // 2] / 1e9 if rates else None


def tables(reports, kernels):
    """Returns the tables in Markdown; with each rate its range over the repeats."""
    points = {key(report): report for report in reports}
    threads = sorted({point[0] for point in points})
    lines = []

    def table(head, rows):
        lines.extend([f"| {' | '.join(head)} |", "|---" * len(head) + "|"])
        lines.extend(f"| {' | '.join(row)} |" for row in rows)
        lines.append("")

    if reports:
        first = reports[0]
        lines.append(f"{first['model']}, {first['isa']}, {first['machine']['cpu'] or 'an unnamed CPU'}; tokens/s, "
                     f"medians and ranges of {first['repeat']}, {first['generate']} tokens generated by each sequence.\n")
        rows = []
        for count in threads:
            row = [str(count), f"{bandwidth(reports, count) or 0:.1f}"]
            for prompt, batch in SHOWN:
                report = points.get((count, prompt, batch))
                row += [cell(report and report["decode_tokens_per_second"]),
                        f"{100 * report['bandwidth_share']:.0f}" if report and report["bandwidth_share"] else ""]
            report = points.get((count, *SHOWN[0]))
            rows.append(row + [cell(report and report["prefill_tokens_per_second"])])
        head = ["threads", "GB/s read"]
        for prompt, batch in SHOWN:
            head += [f"decode, {batch} x {prompt}", "of GB/s, %"]
        table([*head, f"prefill of {SHOWN[0][0]}"], rows)
        contexts = sorted({prompt for _, prompt, batch in points if batch == 1 and prompt != BATCH_PROMPT})
        columns = [(phase, count) for phase in ("decode", "prefill") for count in threads]
        table(["context", *(f"{phase}, {count} threads" for phase, count in columns)],
              [[str(prompt), *(cell(points.get((count, prompt, 1), {}).get(f"{phase}_tokens_per_second"))
                               for phase, count in columns)] for prompt in contexts])
        batches = sorted({batch for _, prompt, batch in points if prompt == BATCH_PROMPT})
        fair = {batch: [points[point]["stream_tokens"] for point in points if point[1:] == (BATCH_PROMPT, batch)]
                for batch in batches}
        table(["batch", *(f"decode of all, {count} threads" for count in threads), "tokens of a stream"],
              [[str(batch), *(cell(points.get((count, BATCH_PROMPT, batch), {}).get("decode_tokens_per_second"))
                              for count in threads),
                f"{min(tokens['min'] for tokens in fair[batch])}-{max(tokens['max'] for tokens in fair[batch])}"]
               for batch in batches])
    if kernels:
        lines.append(f"Kernels, {kernels[0]['isa']}; GOPS, medians and ranges from the slowest to the fastest tenth; "
                     "a multiplication and an addition are two operations.\n")
        table(["kernel", "tokens", "threads", "operations a byte", "GOPS", "GB/s"],
              [[record["kernel"], str(record["tokens"]), str(record["threads"]), f"{record['intensity']:.1f}",
                f"{record['gops']['median']:.1f} ({record['gops']['worst']:.1f}-{record['gops']['best']:.1f})",
                f"{record['bytes_per_second'] / 1e9:.2f}"] for record in kernels])
    return "\n".join(lines)


def draw(args, reports, kernels):
    try:
        import matplotlib
    except ImportError:
        raise SystemExit("matplotlib is not installed, so nothing is drawn: pip install matplotlib, or ask for "
                         "--tables alone")
    matplotlib.use("Agg")
    # The same figures give the same file; text stays text.
    matplotlib.rcParams.update({"svg.hashsalt": "tercet", "svg.fonttype": "none", "font.size": 9})
    from matplotlib import pyplot

    def save(figure, name):
        figure.tight_layout()
        figure.savefig(args.out / f"{name}.svg", metadata={"Date": None})
        pyplot.close(figure)
        progress(f"drew {args.out / name}.svg")

    def line(axes, points, phase, label):
        """Draws medians over something, with their ranges."""
        points = sorted((at, report[f"{phase}_tokens_per_second"]) for at, report in points
                        if report[f"{phase}_tokens_per_second"])
        if not points:
            return
        at, spreads = zip(*points)
        middle = [spread["median"] for spread in spreads]
        below = [spread["median"] - spread["min"] for spread in spreads]
        above = [spread["max"] - spread["median"] for spread in spreads]
        axes.errorbar(at, middle, yerr=[below, above], marker="o", capsize=3, label=label)

    def finish(axes, title, across, values, log=True):
        axes.set_title(title)
        axes.set_xlabel(across)
        axes.set_ylabel("tokens/s")
        axes.set_ylim(bottom=0)
        if log:
            axes.set_xscale("log", base=2)
        values = sorted(set(values))
        axes.set_xticks(values, [str(value) for value in values])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend()

    if reports:
        points = {key(report): report for report in reports}
        threads = sorted({point[0] for point in points})
        figure, pair = pyplot.subplots(1, 2, figsize=(8, 3.2))
        for prompt, batch in SHOWN:
            line(pair[0], [(count, points[point]) for point in points for count in threads
                           if point == (count, prompt, batch)], "decode", f"{batch} x {prompt}")
        line(pair[1], [(count, points[point]) for point in points for count in threads
                       if point == (count, *SHOWN[0])], "prefill", f"prompt of {SHOWN[0][0]}")
        finish(pair[0], "decode", "threads", threads, log=False)
        finish(pair[1], "prefill", "threads", threads, log=False)
        save(figure, "threads")

        figure, pair = pyplot.subplots(1, 2, figsize=(8, 3.2))
        contexts = [prompt for _, prompt, batch in points if batch == 1 and prompt != BATCH_PROMPT]
        for axes, phase in zip(pair, ("decode", "prefill")):
            for count in threads:
                line(axes, [(point[1], points[point]) for point in points
                            if point[0] == count and point[2] == 1 and point[1] in contexts], phase, f"{count} threads")
            finish(axes, f"{phase}, one sequence", "tokens of the prompt", contexts)
        save(figure, "context")

        figure, axes = pyplot.subplots(figsize=(5, 3.2))
        batches = [batch for _, prompt, batch in points if prompt == BATCH_PROMPT]
        for count in threads:
            line(axes, [(point[2], points[point]) for point in points if point[:2] == (count, BATCH_PROMPT)],
                 "decode", f"{count} threads")
        finish(axes, "decode of all sequences together", "sequences", batches)
        save(figure, "batch")

    if kernels:
        names = list(dict.fromkeys(record["kernel"] for record in kernels))
        columns = min(3, len(names))
        rows = -(-len(names) // columns)
        figure, grid = pyplot.subplots(rows, columns, figsize=(3.4 * columns, 2.6 * rows), squeeze=False)
        spots = [axes for row in grid for axes in row]
        for axes, name in zip(spots, names):
            own = [record for record in kernels if record["kernel"] == name]
            low, high = (choose(record["intensity"] for record in own) for choose in (min, max))
            ends = [low / 2, high * 2]
            for index, count in enumerate(sorted({record["threads"] for record in own})):
                mine = sorted((record["intensity"], record["gops"]["median"]) for record in own
                              if record["threads"] == count)
                axes.plot(*zip(*mine), marker="o", color=f"C{index}", linestyle="", label=f"{count} threads")
                roof, best = bandwidth(reports, count), max(gops for _, gops in mine)
                axes.plot(ends, [best, best], color=f"C{index}", linewidth=0.8, linestyle=":")
                if roof:
                    slope = [end * roof for end in ends]
                    axes.plot(ends, slope, color=f"C{index}", linewidth=0.8)
            axes.set(xscale="log", yscale="log", title=name)
            # Beyond what was reached, the slope of the memory goes on for long.
            axes.set_ylim(min(record["gops"]["median"] for record in own) / 2,
                          max(record["gops"]["median"] for record in own) * 4)
            axes.grid(alpha=0.3)
            axes.legend(fontsize=7)
        for axes in spots[len(names):]:
            axes.set_visible(False)
        figure.supxlabel("operations for each byte of weights (or keys and values); slope: memory read, dots: most reached",
                         fontsize=8)
        figure.supylabel("GOPS")
        save(figure, "roofline")


def main():
    args = arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    if not args.draw:
        watch = Watch(args.seconds)
        sweep(args, watch)
        roofline(args, watch)
        if watch.left:
            progress(f"{watch.left} measurements are left: call again")
    reports, kernels = read(args.out / "sweep.jsonl"), read(args.out / "kernels.jsonl")
    if not reports and not kernels:
        raise SystemExit(f"{args.out} holds no figures: measure first")
    models = sorted({report["model"] for report in reports})
    if len(models) > 1:
        raise SystemExit(f"{args.out} holds figures of several models ({', '.join(models)}): give each its own --out")
    text = tables(reports, kernels)
    (args.out / "tables.md").write_text(text)
    print(text)
    if not args.tables:
        draw(args, reports, kernels)


main()
