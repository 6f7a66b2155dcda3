"""Rate and latency of the node by stage, from its own diagnostics.

    python test/ros/latency.py [--weights scfeat-s] [--size 640 480] [--rate 30] [--seconds 30]

Not part of `make test`: it wants a computer that does nothing else.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path

from rig import Rig
from sensor_msgs.msg import Image, PointCloud2

from scfeat_ros.diagnostics import STAGES

OUTPUTS = {"features": PointCloud2, "matches": PointCloud2, "overlay": Image}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", default="scfeat-s")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--size", type=int, nargs=2, default=(640, 480))
    parser.add_argument("--rate", type=float, default=30)
    parser.add_argument("--seconds", type=float, default=30)
    parser.add_argument("--max-keypoints", type=int, default=2048)
    parser.add_argument("--overlay", action="store_true", help="subscribe to the overlay, too")
    arguments = parser.parse_args()
    rig = Rig(Path(tempfile.mkdtemp(prefix="latency")) / "node.log")
    received = dict.fromkeys(OUTPUTS, 0)

    def count(name: str) -> None:
        received[name] += 1

    for name, message_type in OUTPUTS.items():
        if name != "overlay" or arguments.overlay:
            rig.observer.create_subscription(
                message_type, f"/extractor/{name}", lambda _, name=name: count(name), 5
            )
    try:
        rig.start_node(
            weights=arguments.weights,
            device=arguments.device,
            max_keypoints=arguments.max_keypoints,
            warm_up_width=arguments.size[0],
            warm_up_height=arguments.size[1],
        )
        rig.connect(size=arguments.size)
        rig.transition("deactivate")
        rig.transition("activate")  # forgets the times so far
        time.sleep(2)
        rig.camera(
            send="rgb8",
            size=arguments.size,
            rate=arguments.rate,
            count=int(arguments.rate * arguments.seconds),
            start=100,
            step=1 / arguments.rate,
        )
        _, message, values = rig.statuses()[-1]
        print(f"load average {os.getloadavg()[0]:.1f}; {message}")
        shown = ("rate in (Hz)", "rate out (Hz)", "keypoints", "matches", "threads", "device")
        print(", ".join(f"{name} {values[name]}" for name in shown))
        for stage in STAGES:
            median, p95 = values[f"{stage} median (ms)"], values[f"{stage} p95 (ms)"]
            print(f"{stage:10} median {median:>9} ms   p95 {p95:>9} ms")
        print(f"received {received}")
    finally:
        rig.close()


if __name__ == "__main__":
    main()
