"""The fuzz command: some cases, that a case repeats, and that a fault is seen and reported."""

import itertools

import pytest
import torch

import fuzz
from fuzz_draw import COMPILED, FAMILY
from moda_ops.operators import eager
from moda_ops.stream.operators import _Kept

QUICK = [kind for kind in fuzz.KINDS if kind != "compiled"]  # tests of their own compile


def failures(count, kinds=QUICK, device="cpu", seed=0):
    chosen = itertools.islice(fuzz.cases(seed, kinds), count)
    return (line for case in chosen if (line := fuzz.failure(*case, device)))


def test_some_cases():
    assert list(failures(25)) == []


def test_some_cases_of_the_kernels():
    device = "cuda" if torch.cuda.is_available() else "interpreter"
    assert list(failures(4, ["decode", "mass", "depth_attention"], device)) == []


def test_an_integer_determines_a_case():
    draws = []
    for kind, seed in itertools.islice(fuzz.cases(1, QUICK), 6):
        for _ in range(2):
            draw = fuzz.Draw(kind, seed, "cpu")
            with fuzz.operators_on("cpu"):
                fuzz.KINDS[kind][0](draw)
            draws.append((draw.drawn, [base for base, *_ in draw.memory]))
    for first, second in zip(draws[::2], draws[1::2], strict=True):
        assert str(first[0]) == str(second[0])
        for a, b in zip(first[1], second[1], strict=True):
            assert torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))


def test_on_a_gpu_a_family_shares_what_kernels_are_compiled_for():
    def compiled(kind, case):
        draw = fuzz.Draw(kind, case, "cuda")
        draw.shape(), draw.options()
        return {name: x for name, x in draw.drawn.items() if name in COMPILED}

    cases = list(itertools.islice(fuzz.cases(0, QUICK), 6))
    families = [compiled(*case) for case in cases]
    assert families[1:] == families[:-1]
    assert compiled(cases[0][0], cases[0][1] + FAMILY) != families[0]


def gradient_off_by_a_percent(i):
    """Of q, k, v, k_depth or v_depth."""

    def mutate(monkeypatch):
        right = eager.attention_backward

        def wrong(*arguments, **options):
            grads = right(*arguments, **options)
            for x in grads[i] if isinstance(grads[i], list) else [grads[i]]:
                x.mul_(1.01)
            return grads

        monkeypatch.setattr(eager, "attention_backward", wrong)

    mutate.__name__ = f"gradient_{i}_off_by_a_percent"
    return mutate


def mask_off_by_one(monkeypatch):
    right = eager._visible

    def wrong(T, S, left, side, *rest):
        return right(T, S, left, None if side is None else side + 1, *rest)

    monkeypatch.setattr(eager, "_visible", wrong)


def window_off_by_one(monkeypatch):
    right = eager._visible
    monkeypatch.setattr(
        eager, "_visible", lambda T, S, left, *rest: right(T, S, left and left - 1, *rest)
    )


def another_slot_is_read(monkeypatch):
    right = _Kept.of.__func__

    def wrong(cls, slots, places):
        kept = right(cls, slots, places)
        return kept if places is None else kept._replace(places=sorted(kept.places)[::-1])

    monkeypatch.setattr(_Kept, "of", classmethod(wrong))


def an_input_is_written(monkeypatch):
    right = eager.attention

    def wrong(q, *arguments, **options):
        results = right(q, *arguments, **options)
        q[..., -1:].add_(1)
        return results

    monkeypatch.setattr(eager, "attention", wrong)


FAULTS = [
    *map(gradient_off_by_a_percent, range(5)),
    mask_off_by_one,
    window_off_by_one,
    another_slot_is_read,
    an_input_is_written,
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_fault_is_found(fault, monkeypatch):
    fault(monkeypatch)
    kind, seed = ("stream", 4) if fault is another_slot_is_read else ("attention", 0)
    assert next(failures(25, [kind], seed=seed), None)


def test_a_failure_is_one_line_that_says_how_to_repeat_it(monkeypatch, capsys):
    mask_off_by_one(monkeypatch)
    line = next(failures(25, ["attention"]))
    command = line.split("  # ")[0]
    assert command.startswith("python tests/fuzz.py --device cpu --case attention:")
    assert fuzz.main(command.split()[2:]) == 1
    assert capsys.readouterr().out.splitlines()[0] == line
    monkeypatch.undo()
    assert fuzz.main(command.split()[2:]) == 0


def test_a_run_counts_its_cases(capsys):
    assert fuzz.main(["--seconds", "0", "--only", "depth_attention"]) == 0
    kind, total = capsys.readouterr().out.splitlines()
    assert kind.split()[:2] == ["depth_attention", "1"] and total.split()[:2] == ["all", "1"]
