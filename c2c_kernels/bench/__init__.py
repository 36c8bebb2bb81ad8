"""The benchmark: what a machine can do, and how near to it the operators come, next to PyTorch's own.

    from c2c_kernels.bench import machine, measure, shapes

    limits = machine.measure(threads=2)
    line = measure.measure(shapes.grid(quick=True)[0], limits, measure.QUICK)

`c2c-kernels bench` and the pytest-benchmark cases in `bench/` are built on it.
"""
