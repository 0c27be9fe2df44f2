#!/usr/bin/env python3
"""Decode, prefill and batched decode of Tercet beside llama.cpp and ik_llama.cpp, alternating.

All compute the same shape with the same threads and the same type of head, from files that
`tercet model synth` makes: Tercet from I2_S, llama.cpp (PyPI llama-cpp-python) from TQ2_0,
ik_llama.cpp (PyPI ik-llama-cpp-python) from IQ2_BN and IQ2_BN_R4, which its own llama-quantize makes
from I2_S. Random weights: rates, not quality. The peers need not choose a token; Tercet does.

Each program measures each phase in a process of its own, in turn, --runs times. What is measured is
appended to --out at once, so a comparison can be made in short pieces; --table prints it all, with
the ratio of our median to that of the fastest peer of the phase.

    pip install llama-cpp-python                # compiles for some minutes
    pip install ik-llama-cpp-python             # as a wheel: its source package 0.1.5 lacks a file
    python3 tests/bench/peer.py --threads 2
    python3 tests/bench/peer.py --shape 125m --phase decode --runs 9
    python3 tests/bench/peer.py --table
"""
import argparse
import ctypes
import importlib
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time

# The 125M-class shape that peers were measured with differs from the built-in one in these sizes.
SHAPES = {
    "bitnet-2b-4t": [],
    "125m": ["--mlp", "3072", "--vocab", "32000"],
}
# Tokens of a prompt and streams. What is generated depends on the shape.
PHASES = {
    "decode": (16, 1),
    "prefill128": (128, 1),
    "prefill512": (512, 1),
    "batch8": (4, 8),
    "batch32": (4, 32),
}
# Tokens that each stream generates, for one stream and for several.
GENERATED = {"bitnet-2b-4t": (48, 12), "125m": (384, 48)}
# Program, file and Python module.
CONTENDERS = {
    "tercet": ("i2_s", None),
    "llama.cpp TQ2_0": ("tq2_0", "llama_cpp"),
    "ik_llama.cpp IQ2_BN": ("iq2_bn", "ik_llama_cpp"),
    "ik_llama.cpp IQ2_BN_R4": ("iq2_bn_r4", "ik_llama_cpp"),
}
LIMIT = 90  # seconds, of any one measurement


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tercet", default="target/release/tercet", help="the binary")
    parser.add_argument("--shape", default="bitnet-2b-4t", choices=SHAPES)
    parser.add_argument("--head", default="q6_k", choices=["f16", "q8_0", "q6_k"],
                        help="type of the head in the file")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--phase", default=",".join(PHASES), help="those to measure, separated by commas")
    parser.add_argument("--runs", type=int, default=5, help="runs of each, alternating")
    parser.add_argument("--llama-cpp", metavar="PYTHON", default=sys.executable,
                        help="the Python that has llama-cpp-python")
    parser.add_argument("--ik-llama-cpp", metavar="PYTHON", default=sys.executable,
                        help="the Python that has ik-llama-cpp-python")
    parser.add_argument("--dir", default="target/bench", help="where the models are kept, several GB")
    parser.add_argument("--out", help="where figures are appended [default: DIR/peer.jsonl]")
    parser.add_argument("--table", action="store_true", help="measure nothing, print what --out holds")
    parser.add_argument("--measure", nargs=5, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.out = pathlib.Path(args.out or pathlib.Path(args.dir) / "peer.jsonl")
    args.phases = args.phase.split(",")
    for phase in args.phases:
        if phase not in PHASES:
            parser.error(f"unknown phase {phase}: expected some of {', '.join(PHASES)}")
    return args


# What follows runs in the peer's own Python.

class Peer:
    """A model in llama.cpp or in its fork: the same calls, apart from a few names."""

    def __init__(self, module, path, threads, streams, positions):
        package = importlib.import_module(module)
        # The fork keeps its bindings in a module of their own.
        self.api = package if hasattr(package, "llama_decode") else importlib.import_module(f"{module}._ctypes_api")
        api = self.api
        if hasattr(api, "llama_log_set"):
            # Kept: a callback must live as long as the library.
            self.silence = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda *_: None)
            api.llama_log_set(self.silence, None)
        api.llama_backend_init()
        self.model = api.llama_model_load_from_file(path.encode(), api.llama_model_default_params())
        if not self.model:
            raise SystemExit(f"{module} cannot read {path}")
        params = api.llama_context_default_params()
        # A cell for each token of each stream; the fork takes multiples of 256.
        params.n_ctx = (streams * positions + 255) // 256 * 256
        params.n_batch, params.n_ubatch, params.n_seq_max = 2048, 512, streams
        params.n_threads = params.n_threads_batch = threads
        if hasattr(params, "kv_unified"):
            # One cache of all streams, as the fork has: each needs its share of it only.
            params.kv_unified = True
        if hasattr(params, "flash_attn") and streams > 1:
            # Of the fork: its flash attention of several streams ends at an assertion, S > 0.
            params.flash_attn = False
        self.context = api.llama_init_from_model(self.model, params)
        if not self.context:
            raise SystemExit(f"{module} has no room for {streams} streams of {positions} tokens")
        self.batch = api.llama_batch_init(2048, 0, 1)

    def clear(self):
        if hasattr(self.api, "llama_memory_clear"):
            self.api.llama_memory_clear(self.api.llama_get_memory(self.context), True)
        else:
            self.api.llama_kv_cache_clear(self.context)

    def decode(self, rows):
        """Computes rows of (token, position, stream, whether its logits are wanted)."""
        batch = self.batch
        batch.n_tokens = len(rows)
        for i, (token, position, stream, wanted) in enumerate(rows):
            batch.token[i], batch.pos[i], batch.logits[i] = token, position, wanted
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = stream
        status = self.api.llama_decode(self.context, batch)
        if status != 0:
            raise SystemExit(f"llama_decode of {len(rows)} tokens returned {status}")
        # Reading a logit waits for the computation.
        self.api.llama_get_logits_ith(self.context, len(rows) - 1)[0]


def measure_peer(module, path, threads, phase, generate):
    prompt, streams = PHASES[phase]
    peer = Peer(module, path, threads, streams, prompt + generate + 8)

    def prefill(length):
        peer.decode([(1000 + (7 * i + 31 * stream) % 5000, i, stream, i == length - 1)
                     for stream in range(streams) for i in range(length)])

    def step(position):
        peer.decode([(1000 + (11 * position + 13 * stream) % 5000, position, stream, 1) for stream in range(streams)])

    # Maps the file and warms the caches, as `tercet bench` does.
    prefill(min(prompt, 128))
    if generate:
        step(min(prompt, 128))
    peer.clear()
    begun = time.perf_counter()
    prefill(prompt)
    prefilled = time.perf_counter()
    for i in range(generate):
        step(prompt + i)
    decoded = time.perf_counter()
    if generate:
        return streams * generate / (decoded - prefilled)
    return streams * prompt / (prefilled - begun)


# What follows runs in the Python that was called.

def progress(text):
    print(text, file=sys.stderr, flush=True)


def call(command, **more):
    """Returns what a command says, or None and why not."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT, check=True, **more)
        return done.stdout, None
    except subprocess.TimeoutExpired:
        return None, f"it took more than {LIMIT} s"
    except (OSError, subprocess.CalledProcessError) as error:
        said = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        return None, said[-1] if said else str(error)


def python_of(args, module):
    return {"llama_cpp": args.llama_cpp, "ik_llama_cpp": args.ik_llama_cpp}[module]


def version(args, module):
    """Returns the version of a peer, or None and why it cannot be measured."""
    package = module.replace("_", "-") + "-python"
    # Found is not enough: the library must load on this CPU.
    code = (f"import importlib.metadata, {module}\n"
            f"from ctypes import c_void_p\nprint(importlib.metadata.version('{package}'))")
    said, why = call([python_of(args, module), "-c", code])
    return (said.split()[-1], None) if said else (None, why)


def synth(args, kind, head):
    path = pathlib.Path(args.dir) / f"{args.shape}-{kind}-{head}.gguf"
    if not path.exists():
        progress(f"making {path}")
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part.gguf")
        subprocess.run([args.tercet, "model", "synth", "--shape", args.shape, *SHAPES[args.shape], "--type", kind,
                        "--head", head, "--seed", "1", "--out", part], check=True, stdout=subprocess.DEVNULL)
        part.rename(path)
    return path


def requantized(args, kind):
    """Has the fork make its own type, the head as the others have it."""
    path = pathlib.Path(args.dir) / f"{args.shape}-{kind}-{args.head}.gguf"
    if not path.exists():
        code = "from ik_llama_cpp.quantize import find_quantize_bin; print(find_quantize_bin() or '')"
        said, why = call([args.ik_llama_cpp, "-c", code])
        program = (said or "").strip()
        if not program:
            raise RuntimeError(why or "the package has no llama-quantize")
        progress(f"making {path}")
        part = path.with_suffix(".part.gguf")
        head = [f"--{which}-type={args.head}" for which in ("token-embedding", "output-tensor")]
        command = [program, "--allow-requantize", *[word for flag in head for word in flag.split("=")],
                   synth(args, "i2_s", "f16"), part, kind]
        _, why = call(command)
        if why:
            part.unlink(missing_ok=True)
            raise RuntimeError(f"llama-quantize to {kind}: {why}")
        part.rename(path)
    return path


def contenders(args):
    """Returns what can be measured, and tells what cannot."""
    found = {}
    for name, (kind, module) in CONTENDERS.items():
        try:
            installed = None
            if module:
                installed, why = version(args, module)
                if why:
                    raise RuntimeError(f"{module} is not usable in {python_of(args, module)}: {why}")
            path = requantized(args, kind) if kind.startswith("iq") else synth(args, kind, args.head)
            found[name] = (str(path), module, installed)
        except RuntimeError as error:
            progress(f"LEFT OUT: {name}: {error}")
    return found


def measure(args, phase, path, module):
    """Returns a rate and the report it is from, or None and why not."""
    prompt, streams = PHASES[phase]
    generate = 0 if phase.startswith("prefill") else GENERATED[args.shape][streams > 1]
    if module:
        said, why = call([python_of(args, module), os.path.abspath(__file__), "--measure", module, path,
                          str(args.threads), phase, str(generate)])
        return (json.loads(said.splitlines()[-1]), None, None) if said else (None, None, why)
    said, why = call([args.tercet, "bench", "--model", path, "--threads", str(args.threads), "--prompt", str(prompt),
                      "--generate", str(generate), "--batch", str(streams), "--repeat", "1", "--json"])
    if not said:
        return None, None, why
    report = json.loads(said)
    rate = report["decode_tokens_per_second"] or report["prefill_tokens_per_second"]
    return rate["median"], report, None


def run(args):
    found = contenders(args)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    for phase in args.phases:
        for turn in range(args.runs):
            for name, (path, module, installed) in found.items():
                rate, report, why = measure(args, phase, path, module)
                progress(f"{phase} {turn + 1}/{args.runs} {name}: {f'{rate:.2f} tokens/s' if rate else f'FAILED: {why}'}")
                if rate is None:
                    continue
                record = {"shape": args.shape, "head": args.head, "threads": args.threads, "phase": phase,
                          "contender": name, "version": installed, "tokens_per_second": rate, "report": report}
                with open(args.out, "a") as out:
                    out.write(json.dumps(record) + "\n")


def spread(values, digits=1):
    if not values:
        return ""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f}-{max(values):.{digits}f})"


def table(args):
    records = [json.loads(line) for line in args.out.read_text().splitlines()] if args.out.exists() else []
    if not records:
        raise SystemExit(f"{args.out} holds no figures: measure first")
    names = [name for name in CONTENDERS if any(record["contender"] == name for record in records)]
    versions = {record["contender"]: record["version"] for record in records}
    heads = [name if name == "tercet" else f"{name} ({versions[name]})" for name in names]
    print(f"| shape, head, threads | tokens/s | {' | '.join(heads)} | beside the best peer | runs |")
    print("|---" * (len(names) + 4) + "|")
    setups = sorted({(record["shape"], record["head"], record["threads"]) for record in records},
                    key=lambda setup: (list(SHAPES).index(setup[0]), setup[1], -setup[2]))
    for setup in setups:
        own = [record for record in records if (record["shape"], record["head"], record["threads"]) == setup]
        for phase in PHASES:
            rates = {name: [record["tokens_per_second"] for record in own
                            if (record["phase"], record["contender"]) == (phase, name)] for name in names}
            peers = [statistics.median(values) for name, values in rates.items() if values and name != "tercet"]
            ours = rates.get("tercet")
            if not any(rates.values()):
                continue
            ratio = f"{statistics.median(ours) / max(peers):.2f}" if ours and peers else ""
            counts = sorted({len(values) for values in rates.values() if values})
            cells = [spread(rates[name]) for name in names]
            print(f"| {setup[0]}, {setup[1].upper()}, {setup[2]} | {phase} | {' | '.join(cells)} | {ratio} "
                  f"| {'-'.join(str(count) for count in counts)} |")
    print()
    memory(records, setups)


def memory(records, setups):
    """Prints what our own runs say of bytes, bandwidth, fairness, memory and the start."""
    print("| shape, head, threads | phase | MB a step | GB/s | machine GB/s | share, % | tokens of a stream "
          "| resident MB, most | allowed | start to first token beyond the prefill, s |")
    print("|---" * 10 + "|")
    for setup in setups:
        for phase, (_, streams) in PHASES.items():
            reports = [record["report"] for record in records if record["report"] and record["phase"] == phase
                       and (record["shape"], record["head"], record["threads"]) == setup]
            if not reports or phase.startswith("prefill"):
                continue

            def figures(of):
                return [of(report) for report in reports]

            bandwidth = figures(lambda report: max(rate["median"] for rate in report["machine"]["read_bytes_per_second"]
                                                   if rate["threads"] == report["threads"]) / 1e9)
            tokens = {end: choose(report["stream_tokens"][end] for report in reports)
                      for end, choose in (("min", min), ("max", max))}
            loads = [report["load"] for report in reports]
            peaks = [load["peak_resident_bytes"] for load in loads if load["peak_resident_bytes"]]
            allowed = max(1.05 * load["weight_bytes"] + load["kv_bytes"] + (64 << 20) for load in loads)
            beyond = [report["load"]["first_token_seconds"] - report["first_token_seconds"]["min"] for report in reports]
            print(f"| {setup[0]}, {setup[1].upper()}, {setup[2]} | {phase} | {reports[0]['step_bytes'] / 1e6:.1f} "
                  f"| {spread(figures(lambda report: report['decode_bytes_per_second'] / 1e9))} | {spread(bandwidth)} "
                  f"| {spread(figures(lambda report: 100 * report['bandwidth_share']), 0)} "
                  f"| {tokens['min']}-{tokens['max']} "
                  f"| {max(peaks) / 1e6 if peaks else 0:.0f} | {allowed / 1e6:.0f} "
                  f"| {spread(beyond, 2)} |")


def main():
    args = arguments()
    if args.measure:
        module, path, threads, phase, generate = args.measure
        print(json.dumps(measure_peer(module, path, int(threads), phase, int(generate))))
        return
    if not args.table:
        run(args)
    table(args)


main()
