"""`kinetoscope doctor`: what this machine offers."""

from __future__ import annotations

import argparse
import json

NAME = "doctor"
HELP = "device, dtype and software of this machine, and which attention serves where and why"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    parser.add_argument("--json", action="store_true", help="as JSON")


def run(args: argparse.Namespace) -> int:
    """Print the facts."""
    from kinetoscope.runtime.doctor import examine

    facts = examine(args.device)
    if args.json:
        print(json.dumps(facts, indent=2))
        return 0
    print("software   " + ", ".join(f"{k} {v}" for k, v in facts["versions"].items()))
    for module, version in facts["extensions"].items():
        print(f"extension  {module} {version or ''}".rstrip())
    for name, why in facts["failed_extensions"].items():
        print(f"left out   extension {name}: {why}")
    print(f"cpu        {facts['cpu']}, {facts['threads']} threads")
    print(f"cuda       {', '.join(facts['cuda_devices']) or 'none'}")
    print(f"default    device {facts['device']}, dtype {facts['dtype']}")
    for dtype, why in facts["slow_dtypes"].items():
        print(f"slow       {dtype}: {why}")
    for dtype, table in facts["attention"].items():
        print(f"attention in {dtype} on {facts['device']}")
        if (setting := table["setting"])["attention"] != "auto":
            why = f"cannot serve: {setting['refused']}" if setting["refused"] else "serves"
            print(f"  KINETOSCOPE_ATTENTION={setting['attention']}: {why}")
        for role, choice in table["roles"].items():
            print(f"  auto for {role:6} {choice['backend']:8} {choice['reason']}")
        for name, facts_of in table["backends"].items():
            print(f"  {name:14} {facts_of['serves']:17} {facts_of['exactness']:6} {facts_of['why']}".rstrip())
    return 0
