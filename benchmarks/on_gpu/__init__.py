"""What the commands in benchmarks/ share that run on a GPU. Needs torch and triton of the machine, and a checkout."""
