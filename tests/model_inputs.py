"""Inputs of a model, and what arrives at them of a source of samples."""

import numpy as np

from qcompiler.samples import Samples, check_sample

X = np.arange(12, dtype=np.float32).reshape(1, 3, 4)


class Input:
    def __init__(self, name, shape, type="tensor(float)"):
        self.name, self.shape, self.type = name, shape, type


ONE = [Input("x", [1, 3, 4])]
TWO = [*ONE, Input("y", [2], "tensor(int64)")]


def arrays(source, inputs=ONE, preprocess=None):
    samples = Samples(source, preprocess)
    samples.check(inputs)
    return [check_sample(name, sample, inputs) for name, sample in samples]
