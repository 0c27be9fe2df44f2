#!/usr/bin/env python3
"""Cost of the gateway beside nginx's and HAProxy's, before the same workers, alternating in one run.

Two workers without a model send one message per token; a load generator asks for all streams at once
and holds each to its indices. Told of each proxy: CPU seconds (user and system, of all its processes)
per million delivered messages, and what it adds to the time of a token from worker to client.

    apt-get install nginx haproxy
    cargo build --release --package tercet-cli --package tercet-tests --bins
    python3 tests/bench/gateway.py
    python3 tests/bench/gateway.py --slow       # memory of 10,000 slow streams on one gateway
"""
import argparse
import json
import os
import pathlib
import resource
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time

NGINX = """
daemon off;
pid {dir}/nginx.pid;
error_log {dir}/nginx.log warn;
worker_processes {threads};
events {{ worker_connections 8192; }}
http {{
    access_log off;
    upstream workers {{
        least_conn;
{servers}
        keepalive 1024;
        keepalive_requests 1000000;
    }}
    server {{
        listen 127.0.0.1:{port} http2;
        http2_max_concurrent_streams 4096;
        keepalive_requests 1000000;
        location / {{
            grpc_pass grpc://workers;
            grpc_read_timeout 300s;
            grpc_send_timeout 300s;
        }}
    }}
}}
"""

HAPROXY = """
global
    nbthread {threads}
    maxconn 8192
    tune.h2.max-concurrent-streams 4096
defaults
    mode http
    timeout connect 5s
    timeout client 300s
    timeout server 300s
frontend front
    bind 127.0.0.1:{port} proto h2
    default_backend workers
backend workers
    balance leastconn
    http-reuse always
{servers}
"""


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tercet", default="target/release/tercet", help="the binary")
    parser.add_argument("--before", help="another `tercet`, measured as well")
    parser.add_argument("--helpers", default="target/release", help="where synthetic-worker and token-load are")
    parser.add_argument("--etcd", default="target/tools/bin/etcd")
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--connections", type=int, default=16, help="of the client")
    parser.add_argument("--rate", type=float, default=20.0, help="tokens per second of each stream")
    parser.add_argument("--seconds", type=float, default=5.0, help="that each run takes about")
    parser.add_argument("--runs", type=int, default=5, help="of each, alternating")
    parser.add_argument("--threads", type=int, default=2, help="of nginx, HAProxy and tercet-threads; tercet has 1")
    parser.add_argument("--only", default="direct,tercet,tercet-threads,before,nginx,haproxy", help="what to measure")
    parser.add_argument("--slow", action="store_true", help="only the memory of 10,000 slow streams")
    return parser.parse_args()


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def reachable(port, process):
    """Waits until something listens there."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if process.poll() is not None:
            sys.exit(f"{process.args[0]} ended with {process.returncode}")
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            time.sleep(0.05)
    sys.exit(f"{process.args[0]} does not listen")


def line(process, prefix):
    for text in process.stdout:
        if text.startswith(prefix):
            return text[len(prefix):].strip()
    sys.exit(f"{process.args[0]} ended with {process.wait()} before it said {prefix!r}")


def tree(pid):
    """Returns a process and its children."""
    found = [pid]
    for task in pathlib.Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            found += tree(int(child))
    return found


def cpu_seconds(pid):
    ticks = 0
    for process in tree(pid):
        fields = pathlib.Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def resident_mib(pid):
    for row in pathlib.Path(f"/proc/{pid}/status").read_text().splitlines():
        if row.startswith("VmRSS:"):
            return int(row.split()[1]) / 1024
    sys.exit(f"process {pid} is gone")


class Stage:
    """Everything that runs, taken down at the end."""

    def __init__(self, args):
        self.args = args
        self.dir = tempfile.mkdtemp(prefix="gateway-bench-")
        self.running = []

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in reversed(self.running):
            process.terminate()
        for process in self.running:
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
        shutil.rmtree(self.dir)

    def start(self, *command):
        process = subprocess.Popen([str(part) for part in command], stdout=subprocess.PIPE, stdin=subprocess.DEVNULL,
                                   stderr=subprocess.DEVNULL, text=True)
        self.running.append(process)
        return process

    def etcd(self):
        port, peer = free_port(), free_port()
        url = f"http://127.0.0.1:{port}"
        process = self.start(self.args.etcd, "--data-dir", f"{self.dir}/etcd", "--listen-client-urls", url,
                             "--advertise-client-urls", url, "--listen-peer-urls", f"http://127.0.0.1:{peer}",
                             "--initial-advertise-peer-urls", f"http://127.0.0.1:{peer}",
                             "--initial-cluster", f"default=http://127.0.0.1:{peer}")
        reachable(port, process)
        return url

    def worker(self, number, etcd, rate, slots):
        process = self.start(f"{self.args.helpers}/synthetic-worker", "--id", f"worker-{number}", "--etcd", etcd,
                             "--rate", rate, "--slots", slots, "--stamp", "--drain-millis", 100)
        address = line(process, "listening on ")
        line(process, "registered")
        return address

    def gateway(self, binary, etcd, *settings):
        process = self.start(binary, "gateway", "--listen", "127.0.0.1:0", "--etcd", etcd, "--cluster", "default",
                             "--metrics-listen", "127.0.0.1:0", "--drain-timeout", "100ms", *settings)
        address = line(process, "listening on ")
        return address, process.pid

    def configured(self, template, servers, command):
        port = free_port()
        path = pathlib.Path(self.dir) / f"{command[0]}.conf"
        path.write_text(template.format(dir=self.dir, port=port, threads=self.args.threads, servers="\n".join(servers)))
        process = self.start(*command, path)
        reachable(port, process)
        return f"127.0.0.1:{port}", process.pid

    def nginx(self, workers):
        servers = [f"        server {worker};" for worker in workers]
        return self.configured(NGINX, servers, ["nginx", "-c"])

    def haproxy(self, workers):
        servers = [f"    server w{n} {worker} proto h2" for n, worker in enumerate(workers)]
        return self.configured(HAPROXY, servers, ["haproxy", "-db", "-f"])

    def load(self, target, streams, connections, tokens, spread):
        command = [f"{self.args.helpers}/token-load", target, "--streams", streams, "--connections", connections,
                   "--tokens", tokens, "--spread-millis", spread]
        done = subprocess.run([str(part) for part in command], stdout=subprocess.PIPE, text=True, check=True)
        return json.loads(done.stdout)


def spread(values, digits=1):
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f}-{max(values):.{digits}f})"


def compare(args, stage):
    etcd = stage.etcd()
    workers = [stage.worker(number, etcd, args.rate, args.streams) for number in range(2)]
    makers = {
        "direct": lambda: (workers[0], None),
        "tercet": lambda: stage.gateway(args.tercet, etcd),
        "tercet-threads": lambda: stage.gateway(args.tercet, etcd, "--io-threads", args.threads),
        "before": lambda: stage.gateway(args.before, etcd),
        "nginx": lambda: stage.nginx(workers),
        "haproxy": lambda: stage.haproxy(workers),
    }
    only = [name for name in args.only.split(",") if name != "before" or args.before]
    targets = {name: makers[name]() for name in only}
    tokens = max(1, round(args.rate * args.seconds))
    runs = {name: [] for name in targets}
    for run in range(-1, args.runs):
        # The first of each warms up.
        for name, (address, pid) in targets.items():
            begun = cpu_seconds(pid) if pid else 0
            told = stage.load(address, args.streams, args.connections, tokens, 500)
            told["cpu"] = (cpu_seconds(pid) - begun if pid else 0) / told["messages"] * 1e6
            if run >= 0:
                runs[name].append(told)
                print(f"{run} {name:14} {told['messages']} messages, CPU {told['cpu']:.1f} s per million, latency "
                      f"{told['latency_micros']} us, {told['seconds']:.1f} s", file=sys.stderr)
    print(f"{args.streams} streams on {args.connections} connections, {args.streams * args.rate:.0f} messages/s, "
          f"{args.runs} runs of {args.seconds:g} s, median (least-most)")
    print("| | CPU s per million messages | beside nginx | us per token, p50 | p99 |")
    print("|---|---|---|---|---|")
    nginx = statistics.median(told["cpu"] for told in runs["nginx"]) if runs.get("nginx") else None
    for name, done in runs.items():
        cpu = [told["cpu"] for told in done]
        ratio = f"{statistics.median(cpu) / nginx:.2f}" if nginx and targets[name][1] else ""
        p50 = spread([told["latency_micros"]["p50"] for told in done], 0)
        p99 = spread([told["latency_micros"]["p99"] for told in done], 0)
        print(f"| {name} | {spread(cpu) if targets[name][1] else ''} | {ratio} | {p50} | {p99} |")


def slow(args, stage):
    streams = 10_000
    etcd = stage.etcd()
    for number in range(2):
        stage.worker(number, etcd, 0.1, streams)
    address, pid = stage.gateway(args.tercet, etcd, "--max-streams", 2 * streams)
    idle = resident_mib(pid)
    command = [f"{args.helpers}/token-load", address, "--streams", streams, "--connections", 100, "--tokens", 4,
               "--spread-millis", 10_000]
    load = subprocess.Popen([str(part) for part in command], stdout=subprocess.PIPE, text=True)
    most = idle
    while load.poll() is None:
        most = max(most, resident_mib(pid))
        time.sleep(0.5)
    told = json.loads(load.stdout.read())
    print(f"{streams} streams, {told['messages']} messages in {told['seconds']:.0f} s: "
          f"at most {most:.0f} MiB, {idle:.0f} MiB before")
    if most >= 1024:
        sys.exit("more than 1 GiB")


def main():
    args = arguments()
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    with Stage(args) as stage:
        (slow if args.slow else compare)(args, stage)


if __name__ == "__main__":
    main()
