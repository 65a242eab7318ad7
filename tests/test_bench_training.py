"""The training benchmark: all providers train the same model, and one that computes something else gets no figure."""

import json
import time

import pytest
import torch

from keyspan import cli
from keyspan.bench import training
from keyspan.bench.training import SIZES, Bench, documents, main, padded
from keyspan.models.gpt import GPT

CPU = torch.device("cpu")
FEW = ("keyspan", "SDPA, padded, sorted", "SDPA, dense mask", "SDPA, rows that leak")


def test_providers_compute_the_same_loss_and_are_all_reported(tmp_path, capsys):
    words = ["bench", "training", "--size", "tiny", "--repeats", "1", "--out", str(tmp_path), "--providers", *FEW]
    assert cli.main(words) == 0
    assert "MFU" in capsys.readouterr().out
    rows = {row["provider"]: row for row in json.loads((tmp_path / "results.json").read_text())["rows"]}
    assert list(rows) == list(FEW)
    for name, row in rows.items():
        assert row["tokens_per_second"] > 0
        assert row["peak_mib"] > 0
        assert row["note"] == (training.LEAKS if "leak" in name else "")
    assert rows["keyspan"]["loss"] == pytest.approx(rows["SDPA, dense mask"]["loss"], rel=1e-5)
    assert rows["keyspan"]["loss"] != pytest.approx(rows["SDPA, rows that leak"]["loss"], rel=1e-5)
    assert (tmp_path / "results.png").stat().st_size > 0


def test_a_provider_with_another_loss_gets_no_figure(monkeypatch, tmp_path, capsys):
    leaking = training.PROVIDERS["SDPA, rows that leak"]
    monkeypatch.setitem(training.PROVIDERS, "SDPA, dense mask", leaking)
    rows = main(Bench("tiny", providers=("keyspan", "SDPA, dense mask"), repeats=1, out=tmp_path))
    assert rows[0].tokens_per_second is not None
    assert rows[1].tokens_per_second is None
    assert rows[1].note.startswith("its loss differs")


def test_a_provider_with_other_gradients_gets_no_figure(monkeypatch, tmp_path):
    def partly(gpt, data, size, fast):
        found = training._keyspan(gpt, data, size, fast)
        mlp = found.model.blocks[0].mlp
        mlp.register_forward_hook(lambda module, inputs, out: out.detach())
        return found

    monkeypatch.setitem(training.PROVIDERS, "SDPA, dense mask", (partly, False))
    rows = main(Bench("tiny", providers=("keyspan", "SDPA, dense mask"), repeats=1, out=tmp_path))
    assert rows[0].tokens_per_second is not None
    assert rows[1].tokens_per_second is None
    assert rows[1].loss == rows[0].loss
    assert rows[1].note.startswith("its gradient's norm differs")


def test_times_that_spread_give_no_ratio():
    def row(provider, spread):
        return training.Row(provider, 100.0, 1.0, spread, 1.0, 1.0, 0.5, 2.0, 3.0)

    assert "| 1.00 |" in training.table([row("keyspan", 0.2), row("other", 0.3)]).splitlines()[-1]
    for spreads in ((0.9, 0.1), (0.1, 0.9)):
        rows = [row(name, x) for name, x in zip(("keyspan", "other"), spreads, strict=True)]
        assert training.table(rows).splitlines()[-1].endswith("| none: times spread by 90% |")


def test_goals_are_judged_by_the_fastest_and_the_leanest():
    def row(provider, speed, peak):
        return training.Row(provider, speed, 1.0, 0.0, 1.0, peak, 0.5)

    rows = [row("keyspan", 100.0, 50.0), row("SDPA, padded", 10.0, 40.0), row("transformers, padded", 25.0, 100.0)]
    (line,) = training.judge(rows, Bench("10m"))
    assert line == (
        "keyspan ÷ transformers, padded: speed 4.00 (wanted 5.00: short); "
        "peak memory ÷ SDPA, padded's 1.25 (wanted at most 1.00: short)"
    )
    assert not training.judge(rows[1:], Bench("10m"))
    for goals in training.GOALS.values():
        for goal in goals:
            assert {goal.ours, *goal.against} <= set(training.PROVIDERS)


def test_kernels_are_counted_by_kind():
    names = {
        "attention": ["forward_kernel", "hopper_backward_kernel", "pytorch_flash::flash_fwd_kernel<>",
                      "triton_tem_fused_flex_attention_backward_3"],
        "cross-entropy": ["cross_entropy_kernel", "triton_red_fused__log_softmax_nll_loss_forward_1"],
        "products": ["nvjet_hsh_128x256_64x4", "sm90_xmma_gemm_bf16bf16", "void cublasLt::splitKreduce_kernel<32>"],
        "optimizer": ["void at::native::multi_tensor_apply_kernel<FusedAdamMathFunctor>"],
        "elementwise": ["rms_norm_forward_kernel", "triton_poi_fused_add_silu_2", "Memset (Device)"],
    }  # fmt: skip
    found = training.by_kind((name, 1.0) for some in names.values() for name in some)
    assert found == {kind: len(some) for kind, some in names.items()}
    row = training.Row("keyspan", device=found)
    assert training.device_table([training.Row("other"), row]).splitlines()[2:] == [
        "| keyspan | 4.0 | 2.0 | 3.0 | 1.0 | 3.0 | 13.0 |"
    ]


def test_a_provider_that_takes_too_long_is_a_line(monkeypatch, tmp_path, capsys):
    def slow(*_):
        time.sleep(60)

    monkeypatch.setitem(training.PROVIDERS, "SDPA, dense mask", (slow, False))
    rows = main(Bench("tiny", providers=("keyspan", "SDPA, dense mask"), repeats=1, limit=0.5, out=tmp_path))
    assert rows[1].note == "TimeoutError: not ready after 0.5 s, compilation included"
    assert rows[0].tokens_per_second is not None


def test_a_provider_that_fails_is_a_line(monkeypatch, tmp_path, capsys):
    def broken(*_):
        raise RuntimeError("no kernel for this device")

    monkeypatch.setitem(training.PROVIDERS, "SDPA, dense mask", (broken, False))
    rows = main(Bench("tiny", providers=("keyspan", "SDPA, dense mask"), repeats=1, out=tmp_path))
    assert rows[1].note == "RuntimeError: no kernel for this device"


def test_gradients_are_those_of_the_plain_model():
    size = SIZES["tiny"]
    torch.manual_seed(0)
    gpt, data = GPT(size.config), documents(size, CPU)
    grads = []
    for name in ("keyspan", "SDPA, padded, sorted"):
        make, fast = training.PROVIDERS[name]
        trained = make(gpt, data, size, fast)
        for batch in trained.batches:
            batch().backward()
        grads.append({name: p.grad for name, p in trained.model.named_parameters()})
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        torch.testing.assert_close(grad, grads[1][name], rtol=1e-4, atol=1e-6)


def test_padded_batches_hold_every_token_once_and_keep_the_budget():
    data = documents(SIZES["10m"], CPU)
    batches = padded(data, range(len(data.lengths)), 4096)
    assert sum(int((targets != -100).sum()) for _, targets, _ in batches) == sum(data.lengths) == 4096
    for tokens, _, _ in batches:
        assert tokens.numel() <= max(4096, tokens.shape[1])
    rounded = padded(data, range(len(data.lengths)), 4096, 64)
    assert all(tokens.shape[1] % 64 == 0 for tokens, _, _ in rounded)
    assert sum(int((targets != -100).sum()) for _, targets, _ in rounded) == 4096


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": "huge"}, "size: got 'huge', want one of tiny"),
        ({"precision": "fp8"}, "precision: got 'fp8', want fp32 or bf16"),
        ({"providers": ("mine",)}, "providers: got 'mine', want some of keyspan"),
        ({"repeats": 0}, "repeats: got 0, want at least 1"),
        ({"limit": 0.0}, "limit: got 0.0, want a positive number"),
    ],
)
def test_wrong_options(change, message):
    with pytest.raises(ValueError, match=message):
        main(Bench(**change))


def test_what_a_provider_computes():
    """Documents of 3, 1 and 2 tokens, at most 6 a batch: as they come [3, 1] and [2], sorted [3, 2] and [1]."""
    size = training.Size(SIZES["tiny"].config, 6, 1, 3)
    data = training.Documents(torch.zeros(6, dtype=torch.int64), torch.zeros(6, dtype=torch.int64), [3, 1, 2])
    wanted = {
        "keyspan": (6, 6 + 1 + 3),
        "flex, packed, compiled": (6, 6 + 1 + 3),
        "SDPA, padded": (2 * 3 + 2, 2 * 6 + 3),
        "SDPA, padded, sorted": (2 * 3 + 1, 2 * 6 + 1),
        "SDPA, padded, compiled": (3 * 64, 3 * 64 * 65 // 2),
        "SDPA, dense mask": (6, 36),
        "SDPA, rows that leak": (6, 21),
    }
    assert {name: training.computed(name, size, data) for name in wanted} == wanted
