"""What the released model needs and takes on some machines, from their data sheets, into README.md: make machines

The plans are those of minqwen/plans.py, to the byte; the times follow from the sheets, and nobody ran them.
"""

from tables import ROOT, put

from minqwen.doctor import BITS, Machine, in_time, released
from minqwen.pipeline import AREA
from minqwen.plans import SPARE, in_bytes, plans

SHARE, STEPS = 0.5, 50  # of what a data sheet promises; of an edit of 1024x1024 pixels with guidance
# GB of card and host; dense bfloat16 operations and bytes of the bus a second, in 10^12 and 10^9; a disk of 3 GB/s
NAMED = [
    Machine(f"{name}, {card} GB; {host} GB", card * 1e9, host * 1e9, SHARE * rate * 1e12, SHARE * link * 1e9, 3e9)
    for name, card, host, rate, link in [
        ("RTX 4060", 8, 32, 30, 16),
        ("RTX 3060", 12, 32, 25, 32),
        ("RTX 4090", 24, 64, 165, 32),
        ("H100", 80, 128, 989, 64),
    ]
]


def lines() -> list[str]:
    """Of each machine the way that takes least time there; of equals that of the most bits."""
    of_bits = {bits: plans(released(bits, "cuda"), AREA) for bits in BITS}
    table = ["| card; host | the released weights | way | at the peak | a step | a picture |", "|---" * 6 + "|"]
    for machine in NAMED:
        ways = [(machine.seconds(plan), -bits, plan) for bits, found in of_bits.items() for plan in found]
        step, bits, plan = min(way for way in ways if way[2].peak <= SPARE * machine.free)
        told = machine.name, BITS[-bits], plan.way, in_bytes(plan.peak), in_time(step), in_time(STEPS * step)
        table.append(f"| {' | '.join(told)} |")
    return table


if __name__ == "__main__":
    put(ROOT / "README.md", "machines", lines())
