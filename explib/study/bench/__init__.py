"""How fast this machine is: one module a benchmark, each `explib bench NAME`."""
