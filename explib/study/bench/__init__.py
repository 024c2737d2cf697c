"""How fast this machine is: one module a benchmark, each `python -m explib.study.bench.NAME`."""
