"""Soak: a camera at 30 Hz for twenty minutes with random faults; does the node's memory grow?

    python test/ros/soak.py --minutes 20 [--weights scfeat-s] [--output soak.json]

Without weights a small random network runs, which leaves most time to everything around it.
Not part of `make test`. Exit status 1 if the node died, stopped serving, or its resident memory
at the end differs by more than 2% from that after the first minute.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path

from rig import Rig
from sensor_msgs.msg import Image, PointCloud2

SIZE = (160, 120)
OUTPUTS = {"features": PointCloud2, "matches": PointCloud2, "overlay": Image}


def faults(rig: Rig, stamp: float) -> dict:
    """Every fault by name; a call carries it out once, with stamps from `stamp` on."""

    def send(kind: str = "rgb8", count: int = 3, rate: float = 30, **command) -> None:
        rig.camera(
            **{"send": kind, "count": count, "rate": rate, "size": SIZE, "start": stamp, **command}
        )

    def silence() -> None:
        time.sleep(4)

    def lifecycle() -> None:
        rig.transition("deactivate")
        send()
        rig.transition("activate")

    def quality() -> None:
        rig.camera(qos="best_effort")
        send(count=60)
        rig.camera(qos="reliable")

    def parameters() -> None:
        rig.set_parameter("max_keypoints", 100)
        send()
        rig.set_parameter("max_keypoints", 0)  # refused
        rig.set_parameter("max_keypoints", 1000)

    kinds = (
        "truncated zero_size nan all_nan unknown short_row padded mono8 bgr8 bayer_rggb8 mono16 "
        "32FC1 yuv422"
    ).split()
    return {
        **{kind: (lambda kind=kind: send(kind)) for kind in kinds},
        "burst": lambda: send(count=40, rate=0),
        "smaller": lambda: send(size=(96, 80)),
        "larger": lambda: send(size=(320, 240)),
        "portrait": lambda: send(size=(120, 160)),
        "time back": lambda: send(start=stamp - 50),
        "frame id": lambda: send(frame_id="another"),
        "no camera_info": lambda: send(camera_info=False),
        "silence": silence,
        "lifecycle": lifecycle,
        "quality of service": quality,
        "parameters": parameters,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--weights", help="model or file (default: a small random network)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="soak"))
    weights = arguments.weights or small_model(folder / "small.safetensors")
    rig = Rig(folder / "node.log")
    print(f"log of the node: {rig.log_path}", flush=True)
    received = dict.fromkeys(OUTPUTS, 0)
    memory: list[tuple[float, float]] = []
    done = threading.Event()

    def count(name: str) -> None:
        received[name] += 1

    for name, message_type in OUTPUTS.items():
        rig.observer.create_subscription(
            message_type, f"/extractor/{name}", lambda _, name=name: count(name), 5
        )
    rig.start_node(weights=weights, threads=arguments.threads, device="cpu", diagnostics_period=0.2)
    pid = rig.node_process.pid

    def watch() -> None:
        started = time.monotonic()
        while not done.wait(1.0):
            pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
            memory.append((time.monotonic() - started, pages * resource.getpagesize() / 2**20))

    rig.camera(send="rgb8", count=30, rate=30, size=SIZE, start=1)
    threading.Thread(target=watch, daemon=True).start()
    chooser = random.Random(arguments.seed)
    deck: list[str] = []
    counts: dict[str, int] = {}
    stamp, end = 1000.0, time.monotonic() + 60 * arguments.minutes
    try:
        while time.monotonic() < end and rig.node_process.poll() is None:
            # a shuffled deck, so that every fault has been seen in the first minute
            if not deck:
                deck = list(faults(rig, stamp))
                chooser.shuffle(deck)
            name = deck.pop()
            rig.settle()
            faults(rig, stamp)[name]()
            rig.settle()  # the fault must be served, not dropped
            counts[name] = counts.get(name, 0) + 1
            frames = chooser.randrange(20, 60)
            rig.camera(send="rgb8", count=frames, rate=30, size=SIZE, start=stamp + 10, step=1 / 30)
            stamp += 20
        alive = rig.node_process.poll() is None
        before = received["features"]
        if alive:
            rig.camera(send="rgb8", count=60, rate=30, size=SIZE, start=stamp)
            time.sleep(3)
        serves = received["features"] > before
        done.set()
        status = rig.statuses()[-1]
    finally:
        done.set()
        rig.close()
    first = statistics.median(m for t, m in memory if 60 <= t < 75)
    last = statistics.median(m for t, m in memory[-15:])
    result = {
        "minutes": arguments.minutes,
        "alive": alive,
        "serves at the end": serves,
        "resident memory after the first minute (MiB)": round(first, 1),
        "resident memory at the end (MiB)": round(last, 1),
        "change (%)": round(100 * (last - first) / first, 2),
        "largest (MiB)": round(max(m for _, m in memory), 1),
        "by minute (MiB)": [
            round(statistics.median(m for t, m in memory if 60 * i <= t < 60 * (i + 1)), 1)
            for i in range(int(memory[-1][0] // 60))
        ],
        "received": received,
        "faults": counts,
        "diagnostics": status[2],
        "tracebacks in the log": rig.log.count("Traceback"),
    }
    print(json.dumps(result, indent=2))
    if arguments.output:
        arguments.output.write_text(json.dumps(result, indent=2))
    good = alive and serves and abs(last - first) <= 0.02 * first
    return 0 if good and not result["tracebacks in the log"] else 1


def small_model(path: Path) -> Path:
    """Weights of a small network, at random."""
    import torch

    from scfeat_ros.model.scfeat import SCFeat, SCFeatConfig, save_model

    torch.manual_seed(0)
    save_model(SCFeat(SCFeatConfig("small", "resnet10", (32, 32), 32, (8, 8, 8))), path, {})
    return path


if __name__ == "__main__":
    sys.exit(main())
