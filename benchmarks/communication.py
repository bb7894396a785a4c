"""Data-parallel training with compressed messages: loss curves, bytes between machines, and time behind a slow link.

    python benchmarks/communication.py --text FILE                            # loss curves and bytes, 2, 4 and 8 ranks
    python benchmarks/communication.py --text FILE --links 1000 100           # time per step; needs root, or user namespaces

A byte-level GPT learns a real text on gloo processes, two of them to a "machine" (with two ranks, one). Bytes are counted at the collectives,
those of the library's own as the least that any algorithm sends. With --links every machine is a network namespace of its own that
is bridged to the others through token buckets of so many Mbit/s; there the bytes on the wires are read from the interfaces, too.
Ranks of a machine talk over its loopback, which nothing slows down. All schemes of a table run in turns of one process group.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import arrondi
from arrondi.distributed.links import Count
from arrondi.distributed.scripts import Exchange
from arrondi.distributed.topology import topology_of

VOCABULARY: Final = 256
SUBNET: Final = "10.77.0."


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.heads = max(width // 32, 1)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(batch, length, width)
        x = x + self.out(mixed)
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    def __init__(self, width: int, layers: int, length: int) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(VOCABULARY, width), nn.Embedding(length, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, VOCABULARY, bias=False)
        for p in self.parameters():
            if p.ndim > 1:
                nn.init.normal_(p, std=0.05)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.words(ids) + self.places.weight[: ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


# ---- schemes ---------------------------------------------------------------------------------------------------------

Wrapped = tuple[nn.Module, Callable[[], Count]]
"""A model, and the bytes that it has sent so far."""


def ddp(scheme: str | None, **options: Any) -> Callable[[nn.Module, int], Wrapped]:
    def wrap(model: nn.Module, per_node: int) -> Wrapped:
        wrapped = DistributedDataParallel(model)
        if scheme == "fp16":
            wrapped.register_comm_hook(None, default_hooks.fp16_compress_hook)
        elif scheme == "powersgd":
            arrondi.compress_gradients(wrapped, scheme, **options)
        elif scheme is not None:
            state = arrondi.compress_gradients(wrapped, scheme, per_node=per_node, **options)
            return wrapped, lambda: Count(state.links.count.intra, state.links.count.inter)
        sent = Count()
        numbers = sum(p.numel() for p in model.parameters())
        payload = torch.empty(numbers, dtype=torch.float16 if scheme == "fp16" else torch.float32, device="meta")

        def step() -> Count:  # one all-reduce of all gradients since it was asked last
            if scheme == "powersgd":
                return Count(float("nan"), float("nan"))
            sent.add(Exchange("sum", "all", payload), topology_of(dist.get_world_size(), per_node))
            return Count(sent.intra, sent.inter)

        return wrapped, step

    return wrap


def fsdp(*, hpz: bool = False, half: bool = False, **options: Any) -> Callable[[nn.Module, int], Wrapped]:
    def wrap(model: nn.Module, per_node: int) -> Wrapped:
        reshard: bool | int = per_node if hpz and 1 < per_node < dist.get_world_size() else True
        for block in model.blocks:
            fully_shard(block, reshard_after_forward=reshard)
        fully_shard(model, reshard_after_forward=reshard)
        if options:
            state = arrondi.compress_fsdp(model, per_node=per_node, **options)
            return model, lambda: state.count
        sent, whole = Count(), sum(p.numel() for p in model.parameters()) * 4
        topology = topology_of(dist.get_world_size(), per_node)

        def step() -> Count:
            for kind in ("all_gather", "all_gather", "reduce_scatter"):
                sent.least(kind, whole, topology)
            return Count(sent.intra, sent.inter)

        return model, step

    return wrap


SCHEMES: dict[str, Callable[[nn.Module, int], Wrapped]] = {
    "DDP fp32": ddp(None),
    "DDP fp16": ddp("fp16"),
    "int8": ddp("int8"),
    "block8": ddp("block8"),
    "block4": ddp("block4"),
    "qgz": ddp("qgz"),
    "qgz, ef": ddp("qgz", error_feedback="ef"),
    "qgz, loco": ddp("qgz", error_feedback="loco"),
    "onebit": ddp("onebit"),
    "onebit, plain for 20 steps": ddp("onebit", start_iter=20),
    "powersgd, rank 4": ddp("powersgd", rank=4, start_iter=2),
    "FSDP2 fp32": fsdp(),
    "FSDP2 qwz": fsdp(weights="int8", gradients="none"),
    "FSDP2 qgz": fsdp(weights="none", gradients="int4"),
    "FSDP2 qwz + qgz": fsdp(weights="int8", gradients="int4"),
    "FSDP2 qwz + hpz + qgz": fsdp(weights="int8", gradients="int4", hpz=True),
}


# ---- one rank --------------------------------------------------------------------------------------------------------


def train(name: str, seed: int, options: argparse.Namespace, text: torch.Tensor, held: torch.Tensor) -> dict[str, Any]:
    """A run of one scheme: losses of every step (mean over ranks), held-out loss, seconds and bytes of a step."""
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(seed)
    model, sent = SCHEMES[name](GPT(options.width, options.layers, options.length), options.per_node)
    optimizer = torch.optim.AdamW(model.parameters(), options.lr)
    losses, seconds, counts, wires = [], [], [], []
    for step in range(options.steps):
        generator = torch.Generator().manual_seed((seed * 1_000_003 + step) * 64 + rank)
        starts = torch.randint(len(text) - options.length - 1, (options.batch,), generator=generator)
        ids = torch.stack([text[s : s + options.length + 1] for s in starts.tolist()]).long()
        dist.barrier()
        wire, start = on_the_wire(), time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = options.lr * min(1.0, (step + 1) / 20)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        dist.barrier()
        seconds.append(time.perf_counter() - start)
        wires.append(on_the_wire() - wire)
        counts.append(sent())
        total = loss.detach().clone()
        dist.all_reduce(total)
        losses.append(float(total) / world)
    with torch.no_grad():
        windows = held[: 32 * (options.length + 1)].view(32, -1).long()
        after = float(F.cross_entropy(model(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten()))
    steps = min(len(counts) - 3, 10)  # at the end, where everything is compressed
    grown = torch.tensor(
        [(getattr(counts[-1], w) - getattr(counts[-1 - steps], w)) / steps for w in ("intra", "inter")]
        if steps > 0
        else [0.0, 0.0]
    )
    dist.all_reduce(grown)
    wire = torch.tensor(float(statistics.median(wires[3:] or wires)) if rank % options.per_node == 0 else 0.0)
    dist.all_reduce(wire)
    return {
        "name": name, "seed": seed, "world": world, "losses": losses, "held": after, "seconds": statistics.median(seconds[3:] or seconds),
        "spread": [min(seconds[3:] or seconds), max(seconds[3:] or seconds)], "intra": float(grown[0]), "inter": float(grown[1]), "wire": float(wire),
        "parameters": sum(p.numel() for p in model.parameters()),
    }  # fmt: skip


def on_the_wire() -> int:
    """Bytes that have left this machine's interface; 0 where machines are not apart."""
    counter = Path(f"/sys/class/net/{os.environ.get('COMMUNICATION_INTERFACE', '-')}/statistics/tx_bytes")
    return int(counter.read_text()) if counter.exists() else 0


def worker(rank: int, world: int, host: str, port: int, options: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    store = dist.TCPStore(host, port, is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    data = torch.frombuffer(bytearray(Path(options.text).read_bytes()), dtype=torch.uint8)
    cut = len(data) * 9 // 10
    found = []
    for name, seed in options.runs:
        found.append(train(name, seed, options, data[:cut], data[cut:]))
        if rank == 0:
            Path(options.out).write_text(json.dumps(found), encoding="utf-8")
            print(
                f"{name}, seed {seed}: {found[-1]['held']:.4f}, {found[-1]['seconds']:.3f} s",
                file=sys.stderr,
                flush=True,
            )
    dist.destroy_process_group()


# ---- launching -------------------------------------------------------------------------------------------------------


def launch(
    options: argparse.Namespace, runs: Sequence[tuple[str, int]], how: str, before: Sequence[str] = (), **more: Any
) -> list[dict[str, Any]] | None:
    """The runs, in a process of their own that starts the ranks; None if that failed."""
    with tempfile.TemporaryDirectory() as folder:
        out = f"{folder}/out.json"
        given = {k: getattr(options, k) for k in ("text", "width", "layers", "length", "batch", "lr", "steps")}
        given |= {**more, "out": out, "runs": json.dumps(list(runs))}
        words = [f"--{key.replace('_', '-')}={value}" for key, value in given.items()]
        done = subprocess.run([*before, sys.executable, __file__, how, *words], check=False)
        if done.returncode or not Path(out).exists():
            return None
        found: list[dict[str, Any]] = json.loads(Path(out).read_text(encoding="utf-8"))
        return found


def fork(host: str, port: int, ranks: Sequence[int], options: argparse.Namespace) -> None:
    """Starts ranks, which share what was imported, and waits for them."""
    context = torch.multiprocessing.get_context("fork")
    options.runs = [tuple(r) for r in json.loads(options.runs)]
    world = options.nodes * options.per_node
    started = [context.Process(target=worker, args=(r, world, host, port, options)) for r in ranks]
    for process in started:
        process.start()
    for process in started:
        process.join()
    if any(process.exitcode for process in started):
        sys.exit(1)


def on_loopback(options: argparse.Namespace) -> None:
    """All ranks of all machines, over loopback."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    fork("127.0.0.1", server.port, range(options.nodes * options.per_node), options)


def run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)


def machines(nodes: int, rate: float) -> None:
    """Namespaces node0 … that are bridged, each through a token bucket in both directions. Within a namespace of our own."""
    run("ip", "link", "add", "wire", "type", "bridge")
    run("ip", "link", "set", "wire", "up")
    for n in range(nodes):
        run("ip", "netns", "add", f"node{n}")
        run("ip", "link", "add", f"port{n}", "type", "veth", "peer", "name", "eth0", "netns", f"node{n}")
        run("ip", "link", "set", f"port{n}", "master", "wire", "up")
        inside = ("ip", "-n", f"node{n}")
        run(*inside, "link", "set", "lo", "up")
        run(*inside, "addr", "add", f"{SUBNET}{n + 1}/24", "dev", "eth0")
        run(*inside, "link", "set", "eth0", "up")
        if rate:
            limit = ("root", "tbf", "rate", f"{rate:g}mbit", "burst", "128kb", "latency", "100ms")
            run("tc", "qdisc", "add", "dev", f"port{n}", *limit)
            run("ip", "netns", "exec", f"node{n}", "tc", "qdisc", "add", "dev", "eth0", *limit)


def linked(options: argparse.Namespace) -> None:
    """In network and mount namespaces of our own: the machines, and a process for each that starts its ranks."""
    run("mkdir", "-p", "/run/netns")
    run("mount", "-t", "tmpfs", "tmpfs", "/run/netns")
    machines(options.nodes, options.rate)
    own = [sys.executable, __file__, *(a for a in sys.argv[1:] if a != "--linked")]
    environment = {**os.environ, "COMMUNICATION_INTERFACE": "eth0", "GLOO_SOCKET_IFNAME": "eth0"}
    started = [
        subprocess.Popen(["ip", "netns", "exec", f"node{n}", *own, "--node", str(n)], env=environment)
        for n in range(options.nodes)
    ]
    codes = [process.wait() for process in started]
    if any(codes):
        sys.exit(1)


def one_machine(options: argparse.Namespace) -> None:
    """The ranks of one machine; the first machine holds the store."""
    host, port = f"{SUBNET}1", 29400
    server = dist.TCPStore(host, port, is_master=True, wait_for_workers=False) if options.node == 0 else None
    first = options.node * options.per_node
    fork(host, port, range(first, first + options.per_node), options)
    if server is not None:
        time.sleep(2)  # it must outlive the last rank of the other machines


def namespaces() -> list[str] | None:
    """The command that gives us namespaces of our own; None where there are none."""
    if any(shutil.which(tool) is None for tool in ("ip", "tc", "unshare")):
        return None
    return ["unshare", *([] if os.geteuid() == 0 else ["-r"]), "-n", "-m"]


# ---- tables ----------------------------------------------------------------------------------------------------------


def curves(options: argparse.Namespace) -> list[dict[str, Any]]:
    everything = []
    for world in options.worlds:
        names = options.schemes or list(SCHEMES)
        plain = [(names[0], seed) for seed in range(options.seeds)]
        topology = topology_of(world, 2 if world > 2 else 1)
        found = launch(
            options,
            [*plain, *((name, 0) for name in names[1:])],
            "--local",
            nodes=topology.nodes,
            per_node=topology.per_node,
        )
        if found is None:
            sys.exit(f"{world} ranks did not come to an end.")
        everything += found
        noise = [r["held"] for r in found[: options.seeds]]
        half = next((r["inter"] for r in found if r["name"] == "DDP fp16"), None)
        print(
            f"\n{topology.nodes} machines × {topology.per_node} ranks, byte-level GPT of {found[0]['parameters']:,} parameters on {Path(options.text).name}, "
            f"{options.steps} steps, batch {options.batch} × {options.length} a rank; {names[0]} with {options.seeds} seeds: "
            f"held-out loss {min(noise):.4f} … {max(noise):.4f}"
        )
        print(
            "| scheme | loss, last 20 steps | held-out loss | kB between machines a step | of fp16's | kB inside | s/step |"
        )
        print("|---|---|---|---|---|---|---|")
        for row in [found[0], *found[options.seeds :]]:
            last = statistics.mean(row["losses"][-20:])
            share = "" if not half else f"{row['inter'] / half:.3f}"
            print(
                f"| {row['name']} | {last:.4f} | {row['held']:.4f} | {row['inter'] / 1e3:,.0f} | {share} | {row['intra'] / 1e3:,.0f} | {row['seconds']:.3f} |"
            )
    return everything


LINKED: Final = (
    "DDP fp32",
    "DDP fp16",
    "int8",
    "block4",
    "qgz",
    "qgz, ef",
    "onebit",
    "FSDP2 fp32",
    "FSDP2 qwz + qgz",
    "FSDP2 qwz + hpz + qgz",
)


def slow(options: argparse.Namespace) -> list[dict[str, Any]]:
    names = options.schemes or list(LINKED)
    tables: dict[float, list[dict[str, Any]]] = {}
    for rate in options.links:
        before = namespaces()
        found = before and launch(
            options, [(name, 0) for name in names], "--linked", before, nodes=options.nodes, per_node=2, rate=rate
        )
        if found is None:
            print(
                "\nTime behind a slow link: not possible here (network namespaces need root or user namespaces, ip and tc)."
            )
            return []
        tables[rate] = found
    first = next(iter(tables.values()))
    print(
        f"\nOne step in seconds (median of {options.steps - 3}) on {options.nodes} machines × 2 ranks behind links of so many Mbit/s; "
        f"GPT of {first[0]['parameters']:,} parameters"
    )
    titles = [f"{rate:g} Mbit/s" if rate else "no limit" for rate in tables]
    print(f"| scheme | MB on the wires a step | counted | {' | '.join(titles)} |")
    print("|---|---|---|" + "---|" * len(titles))
    for i, name in enumerate(names):
        rows = [table[i] for table in tables.values()]
        base = [
            table[names.index(names[0] if not name.startswith("FSDP2") else "FSDP2 fp32")]["seconds"]
            for table in tables.values()
        ]
        cells = " | ".join(f"{r['seconds']:.3f} ({b / r['seconds']:.2f}×)" for r, b in zip(rows, base, strict=True))
        print(f"| {name} | {rows[-1]['wire'] / 1e6:.2f} | {rows[-1]['inter'] / 1e6:.2f} | {cells} |")
    return [r for table in tables.values() for r in table]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--text", required=True, help="a text to learn")
    parser.add_argument("--worlds", type=int, nargs="*", default=[2, 4, 8])
    parser.add_argument("--schemes", nargs="*", help="names of rows")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--length", type=int, default=32)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument(
        "--links", type=float, nargs="*", help="Mbit/s; then time behind links is measured instead; 0 is no limit"
    )
    parser.add_argument("--nodes", type=int, default=2)
    parser.add_argument("--json", help="file for all numbers")
    for hidden in ("--linked", "--local"):
        parser.add_argument(hidden, action="store_true", help=argparse.SUPPRESS)
    for hidden, kind in (("--node", int), ("--rate", float), ("--per-node", int), ("--runs", str), ("--out", str)):
        parser.add_argument(hidden, type=kind, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.node is not None:
        one_machine(options)
    elif options.linked:
        linked(options)
    elif options.local:
        on_loopback(options)
    else:
        rows = slow(options) if options.links is not None else curves(options)
        if options.json:
            Path(options.json).write_text(json.dumps(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
