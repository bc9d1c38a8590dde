"""AttachLogitProcessing against loops in Python, through the pipeline in which it runs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tvm
from tvm import relax as rx

from qcc.compiler.passes import pipeline
from qcc.compiler.passes.attach_logit_processing import AttachLogitProcessing
from qcc.compiler.passes.attach_metadata import AttachMetadata
from qcc.compiler.passes.hoist_repack import HoistRepack
from qcc.targets.cpu import TARGET
from qcc.targets.spec import BuildOptions

NAMES = ("apply_logit_bias_inplace", "apply_penalty_inplace", "apply_bitmask_inplace")
LOWEST = np.finfo("float32").min


@pytest.fixture(scope="module", params=[31, 361, 512, 32000])
def vocab(request: pytest.FixtureRequest) -> tuple[int, Any]:
    target, _ = TARGET.resolve(BuildOptions())
    schedule = TARGET.passes("schedule", target, 2)
    metadata = AttachMetadata(lambda usage: {})
    lowering = pipeline.lowering({}, [], HoistRepack(), schedule, metadata)
    module = pipeline.run(tvm.IRModule(), [AttachLogitProcessing(request.param), *lowering], target)
    with target:
        executable = rx.build(module, target, relax_pipeline=None)
    return request.param, rx.VirtualMachine(executable, tvm.cpu())


def random_logits(b: int, v: int) -> np.ndarray:
    return (np.random.default_rng(v).normal(size=(b, v)) * 4).astype("float32")


def apply(vm: Any, name: str, logits: np.ndarray, *args: Any) -> np.ndarray:
    """Call `name`; lists of ints and int arrays are passed as int32, the others as float32."""
    tensors = [tvm.runtime.tensor(logits)]
    for arg in args:
        array = np.asarray(arg)
        dtype = "int32" if array.dtype.kind == "i" else "float32"
        tensors.append(tvm.runtime.tensor(array.astype(dtype)))
    result = vm[name](*tensors)
    after = tensors[0].numpy()
    np.testing.assert_array_equal(result.numpy(), after)  # the same tensor comes back
    return after


def test_pass_adds_to_the_module() -> None:
    before = tvm.IRModule()
    after = AttachLogitProcessing(361)(before)
    rx.analysis.well_formed(after)
    names = {gv.name_hint for gv, f in after.functions_items() if isinstance(f, rx.Function)}
    assert names == set(NAMES)
    roles = {str(f.attrs["qcc.role"]) for f in after.functions.values() if "qcc.role" in f.attrs}
    assert roles == set(NAMES)
    assert not before.get_global_vars()


@pytest.mark.parametrize("name", NAMES)
def test_clients_find_the_functions(vocab: tuple[int, Any], name: str) -> None:
    _, vm = vocab
    assert vm.module.get_function(name) is not None
    assert vm.module.get_function(name, query_imports=True) is not None  # as WebLLM asks


def test_logit_bias(vocab: tuple[int, Any]) -> None:
    v, vm = vocab
    logits = random_logits(3, v)
    rows = [0, 2, 2, 2, 0]
    tokens = [0, v - 1, 5, 5, 7]  # token 5 of row 2 twice: both count
    bias = np.array([1.5, -2.25, 100, -0.5, -1e30], "float32")
    expected = logits.copy()
    for row, token, value in zip(rows, tokens, bias, strict=True):
        expected[row, token] += value
    got = apply(vm, NAMES[0], logits, rows, tokens, bias)
    np.testing.assert_array_equal(got, expected)


def test_penalty(vocab: tuple[int, Any]) -> None:
    v, vm = vocab
    logits = random_logits(4, v)
    logits[3, :3] = 4, -4, 0.5
    seq_ids = [3, 0]  # row of each sequence
    penalties = np.array([[0.5, 0.25, 1.5], [-0.5, -1, 0.75]], "float32")
    pos2seq = [0, 0, 0, 1, 1, 0]
    tokens = [0, 1, 2, 4, v - 1, 9]
    counts = [1, 2, 1, 7, 1, 300]
    expected = logits.copy()
    for seq, token, count in zip(pos2seq, tokens, counts, strict=True):
        presence, frequency, repetition = penalties[seq]
        value = logits[seq_ids[seq], token] - (presence + np.float32(count) * frequency)
        value = value * repetition if value < 0 else value / repetition
        expected[seq_ids[seq], token] = value
    got = apply(vm, NAMES[1], logits, seq_ids, pos2seq, tokens, counts, penalties)
    np.testing.assert_allclose(got, expected, rtol=1e-6)
    # by hand: (4 - 0.75) / 1.5, (-4 - 1) * 1.5, (0.5 - 0.75) * 1.5: the sign after subtracting
    np.testing.assert_allclose(got[3, :3], [3.25 / 1.5, -7.5, -0.375], rtol=1e-6)
    untouched = np.ones((4, v), bool)
    untouched[[seq_ids[s] for s in pos2seq], tokens] = False
    np.testing.assert_array_equal(got[untouched], logits[untouched])


def test_neutral_penalties_change_nothing(vocab: tuple[int, Any]) -> None:
    v, vm = vocab
    logits = random_logits(2, v)
    tokens = list(range(min(v, 500)))
    args = ([1], [0] * len(tokens), tokens, [3] * len(tokens), np.array([[0, 0, 1]], "float32"))
    np.testing.assert_array_equal(apply(vm, NAMES[1], logits, *args), logits)


@pytest.mark.parametrize("seq_ids", [[0], [2, 0], [1, 3]])
def test_bitmask(vocab: tuple[int, Any], seq_ids: list[int]) -> None:
    v, vm = vocab
    words = -(-v // 32)
    rng = np.random.default_rng(v)
    mask = rng.integers(-(2**31), 2**31, size=(4, words), dtype="int64")
    mask[:, 0] = [0, -1, 1, -(2**31)]  # nothing, everything, the first, the last of the word
    logits = random_logits(4, v)
    expected = logits.copy()
    for row in seq_ids:
        for token in range(v):
            if not (int(mask[row, token // 32]) >> (token % 32)) & 1:
                expected[row, token] = LOWEST
    got = apply(vm, NAMES[2], logits, seq_ids, mask)
    np.testing.assert_array_equal(got, expected)


def test_bitmask_size_is_checked(vocab: tuple[int, Any]) -> None:
    v, vm = vocab
    with pytest.raises(RuntimeError, match=r"apply_bitmask_inplace, .*param=bitmask"):
        apply(vm, NAMES[2], random_logits(1, v), [0], np.zeros((1, v // 32 + 2), "int64"))
