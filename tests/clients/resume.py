#!/usr/bin/env python3
"""Generates a completion over several gateways: when one goes away, the text goes on at the next.

    pip install grpcio grpcio-tools googleapis-common-protos
    tests/clients/resume.py 10.0.0.4:7171 10.0.0.5:7171 --prompt $'KING HENRY.\\n' --seed 1

`Gateways.generate` is all there is to it: keep the seed and the token ids that came, and when the
stream breaks off send the same request with them as `resume` to another gateway. One request has one
output, so the text is the one that would have come.
"""

import argparse
import itertools
import pathlib
import random
import sys
import time

import grpc
from google.rpc import error_details_pb2, status_pb2

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2] / "proto"))
inference, services = grpc.protos_and_services("tercet/v1/inference.proto")

# Attempts in a row without a new token after which a stream is given up, and seconds.
ATTEMPTS = 8
FIRST_PAUSE, LONGEST_PAUSE = 0.25, 4.0
PATIENCE = 120.0

# What a call may end with although the request is in order. RESOURCE_EXHAUSTED says when to come
# back; UNKNOWN is what a connection looks like that was cut off between two messages.
GOES_ON = {
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.UNKNOWN,
}
# How an HTTP/2 stream ends whose server is torn down.
TORN_DOWN = ("RST_STREAM", "GOAWAY", "Socket closed", "Connection reset")
# A server that vanished without a word is noticed within seconds.
CHANNEL = [("grpc.keepalive_time_ms", 5_000), ("grpc.keepalive_timeout_ms", 5_000),
           ("grpc.http2.max_pings_without_data", 0), ("grpc.enable_retries", 0)]


class Broken(Exception):
    """A stream that ended too early, as a server that is torn down may make it."""


class Gateways:
    """Gateways of the same cluster, one of them in use."""

    def __init__(self, addresses):
        self.addresses = list(addresses)
        self.current = 0
        self.stubs = [
            services.InferenceStub(grpc.insecure_channel(address, options=CHANNEL))
            for address in self.addresses
        ]

    def generate(self, request):
        """Yields the events of one completion, as if one stream brought them all."""
        seed, ids, echoed, text_alone = None, [], False, None
        failed, since, not_before = 0, None, [0.0] * len(self.addresses)
        for stream in itertools.count():
            try:
                for message in self.stubs[self.current].Generate(request):
                    event = message.WhichOneof("event")
                    if event == "started":
                        if seed is not None:
                            continue  # told already
                        seed = message.started.seed
                    elif event == "prompt":
                        if echoed:
                            continue
                        echoed = True
                    elif event == "delta":
                        delta = message.delta
                        if not delta.token_ids:
                            # Text alone has no index: a resumed stream tells it again.
                            told, text_alone = text_alone, (stream, len(ids))
                            if told is not None and told[0] != stream and told[1] == len(ids):
                                continue
                        elif delta.index + len(delta.token_ids) <= len(ids):
                            continue  # a repeat
                        elif delta.index != len(ids):
                            raise Broken(f"tokens from index {delta.index}, expected {len(ids)}")
                        else:
                            ids.extend(delta.token_ids)
                            failed, since = 0, None
                    yield message
                    if event == "finished":
                        return
                raise Broken("the stream ended without `finished`")
            except (grpc.RpcError, Broken) as error:
                if not may_go_on(error) or failed >= ATTEMPTS:
                    raise
                broken = error
            now = time.monotonic()
            since = now if since is None else since
            not_before[self.current] = now + asked_pause(broken)
            self.current = (self.current + 1) % len(self.addresses)
            # Each gateway once without a pause, unless it asked for one.
            pause = 0.0
            if failed >= len(self.addresses):
                doubled = FIRST_PAUSE * 2 ** (failed - len(self.addresses))
                pause = min(doubled, LONGEST_PAUSE) * random.uniform(0.5, 1)
            pause = max(pause, not_before[self.current] - now)
            if now + pause > since + PATIENCE:
                raise broken
            time.sleep(pause)
            failed += 1
            print(f"resuming after {len(ids)} tokens: {reason(broken)}", file=sys.stderr)
            if seed is not None:
                resumed = inference.GenerateRequest()
                resumed.CopyFrom(request)
                resumed.resume.CopyFrom(inference.Resume(seed=seed, token_ids=ids))
                request = resumed


def may_go_on(error):
    if isinstance(error, Broken) or error.code() in GOES_ON:
        return True
    is_torn = any(word in (error.details() or "") for word in TORN_DOWN)
    return error.code() in (grpc.StatusCode.INTERNAL, grpc.StatusCode.CANCELLED) and is_torn


def asked_pause(error):
    """Returns the seconds after which a gateway asks to be called again (RetryInfo)."""
    metadata = () if isinstance(error, Broken) else error.trailing_metadata() or ()
    for key, value in metadata:
        if key == "grpc-status-details-bin":
            for detail in status_pb2.Status.FromString(value).details:
                info = error_details_pb2.RetryInfo()
                if detail.Unpack(info):
                    return info.retry_delay.ToTimedelta().total_seconds()
    return 0.0


def reason(error):
    return str(error) if isinstance(error, Broken) else f"{error.code().name} {error.details()}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("addresses", nargs="+", metavar="HOST:PORT")
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--model", default="")
    parser.add_argument("--max-tokens", type=int)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--ignore-eos", action="store_true")
    parser.add_argument("--ids", action="store_true", help="prints token ids, not text")
    args = parser.parse_args()
    request = inference.GenerateRequest(model=args.model, prompt=args.prompt)
    if args.seed is not None:
        request.sampling.seed = args.seed
    if args.max_tokens is not None:
        request.stop.max_tokens = args.max_tokens
    if args.ignore_eos:
        request.stop.ignore_eos = True
    try:
        for message in Gateways(args.addresses).generate(request):
            if args.ids:
                print(*message.delta.token_ids, sep="\n", end="\n" if message.delta.token_ids else "",
                      flush=True)
            else:
                print(message.delta.text, end="", flush=True)
    except (grpc.RpcError, Broken) as error:
        sys.exit(f"error: {reason(error)}")


if __name__ == "__main__":
    main()
