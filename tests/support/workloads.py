"""Workloads that take no time: what the benchmark's own tests run."""

from bench.workloads import BankWorkload, Workload

TINY = Workload("tiny", B=3, N=5, z_dim=4, H=6, sizes=(3, 7, 2))
TINY_SINE = Workload("tiny_sine", B=2, N=3, z_dim=4, H=5, sizes=(2, 4, 3, 1), activation="sin")
TINY_SINGLE = Workload("tiny_single", B=1, N=1, z_dim=4, H=6, sizes=(3, 7, 2))
TINY_BANK = BankWorkload("tiny_bank", tasks=11, rows=63, sizes=(3, 7, 2), requests=2)
