"""Ranges that are known are not measured again."""

import onnx_ir as ir
from calibrated import planned
from sensitive_models import CHAIN, CHAIN_WEIGHTS, OBSERVE, RUN

from qcompiler.passes.keep_sensitive import KeepSensitive
from qcompiler.passes.known_ranges import KnownRanges


def test_the_model_is_calibrated_once():
    calls = []

    def counted(model, names):
        calls.append(list(names))
        return OBSERVE(model, names)

    model = planned(CHAIN, CHAIN_WEIGHTS)
    ranges = KnownRanges(counted)
    KeepSensitive(RUN, ranges, KeepSensitive.Options(outputs=200))(model)
    assert len(calls) == 1
    first = ranges(model, {"x": None})
    model.graph[0].replace_input_with(1, model.graph.initializers["a"])
    assert ranges(model, {"x": None}) == first and len(calls) == 1
    weight = model.graph.initializers["a"]
    weight.const_value = ir.tensor(weight.const_value.numpy() * 2, name="a")
    ranges(model, {"x": None})
    assert len(calls) == 2  # another model


def test_ranges_are_carried_to_a_model_of_the_same_numbers():
    calls = []

    def counted(model, names):
        calls.append(list(names))
        return OBSERVE(model, names)

    model = planned(CHAIN, CHAIN_WEIGHTS)
    ranges = KnownRanges(counted)
    first, other = ranges(model, {"x": None, "r": None}), model.clone()
    weight = other.graph.initializers["a"]
    weight.const_value = ir.tensor(weight.const_value.numpy().copy(), name="a")
    ranges.carry(other, model)  # of which nothing is known
    ranges.carry(model, other)
    assert ranges(other, {"x": None, "r": None, "s": None}) | first and calls[1:] == [["s"]]
    ranges(model, {"x": None})
    assert len(calls) == 3
