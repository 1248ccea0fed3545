"""What the pretend device counts, in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PROGRAM = """
import json, os, torch
from benchmarks.pretend_device import DEVICE, pretend_device

with pretend_device() as counts:
    host, x = torch.ones(3), torch.ones(3, device=DEVICE)

    def after(action):
        before = counts.copy()
        action()
        return counts.since(before).totals()

    found = {
        "item": after(lambda: x.sum().item()),
        "tolist": after(lambda: x.tolist()),
        "to host": after(lambda: x.cpu()),
        "to host without a wait": after(lambda: x.to("cpu", non_blocking=True)),
        "equal": after(lambda: torch.equal(x, x)),
        "pageable": after(lambda: host.to(DEVICE)),
        "pinned": after(lambda: host.pin_memory().to(DEVICE, non_blocking=True)),
        "constant": after(lambda: x.new_tensor([1.0, 2.0])),
        "mixed": after(lambda: x + host),
        "number": after(lambda: x * 2.0 + torch.tensor(0.5)),
        "view": after(lambda: x.view(3, 1).expand(3, 2)),
        "gradient": after(lambda: (x.clone().requires_grad_() ** 2).sum().backward()),
    }
    z = torch.tensor([1 + 2j, 3 - 1j])
    y = z.to(DEVICE)
    same = [torch.equal((y * y.conj()).cpu(), z * z.conj()), torch.equal(y.conj().imag.cpu(), z.conj().imag)]
found = {k: {n: c for n, c in v.items() if c} for k, v in found.items()}
print(json.dumps(found | {"conjugate": same}), flush=True)
os._exit(0)  # a backward pass leaves a thread of the device behind, which torch cannot end
"""


def test_pretend_device_counts_what_a_gpu_punishes() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert found["item"] == {"syncs": 1, "launches": 2}
    assert found["tolist"] == {"syncs": 1}
    assert found["to host"]["syncs"] == found["equal"]["syncs"] == 1
    assert found["to host without a wait"]["pinned"] == 1 and "syncs" not in found["to host without a wait"]
    assert found["pageable"]["copies"] == found["constant"]["copies"] == 1
    assert found["pinned"]["pinned"] == 1 and "copies" not in found["pinned"]
    assert found["mixed"]["mixes"] == 1
    assert found["number"] == {"launches": 2}
    assert found["view"] == {}
    assert found["gradient"].keys() == {"launches"}
    assert found["conjugate"] == [True, True]
