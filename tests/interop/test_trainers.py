"""The page for trainers: its code for litgpt and torchtune, where they are installed.

The test set-up does not bring them: each wants some 50 MB of packages that nothing else here uses.
"""

import importlib
import re
from pathlib import Path

import pytest
import torch

PAGE = Path(__file__).parents[2] / "docs/coming_from/trainers.md"


def code_of(package, **names):
    """What the page's block for a package defines."""
    text = PAGE.read_text(encoding="utf-8")
    (block,) = (block for block in re.findall(r"^```py\n(.*?)^```", text, re.S | re.M) if package in block)
    exec(compile(block, f"{PAGE.name}, {package}", "exec"), names)
    return names


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_litgpt(softcap):
    model = pytest.importorskip("litgpt.model", exc_type=ImportError)
    torch.manual_seed(0)
    config = model.Config(
        block_size=32, n_layer=2, n_embd=32, n_head=4, n_query_groups=2, padded_vocab_size=64,
        attention_logit_softcapping=softcap,
    )  # fmt: skip
    gpt, ids = model.GPT(config), torch.randint(64, (2, 20))
    want = gpt(ids)
    before = model.CausalSelfAttention.scaled_dot_product_attention
    try:
        code_of("litgpt")
        assert model.CausalSelfAttention.scaled_dot_product_attention is not before
        torch.testing.assert_close(gpt(ids), want)
    finally:
        model.CausalSelfAttention.scaled_dot_product_attention = before


def test_torchtune():
    pytest.importorskip("torchtune.modules", exc_type=ImportError)
    llama2 = importlib.import_module("torchtune.models.llama2").llama2
    torch.manual_seed(0)
    model = llama2(vocab_size=64, num_layers=2, num_heads=4, num_kv_heads=2, embed_dim=32, max_seq_len=32)
    ids, mask = torch.randint(64, (2, 20)), torch.ones(20, 20, dtype=torch.bool).tril().expand(2, 20, 20)
    want = [model(ids), model(ids, mask=mask)]
    code_of("model.layers", model=model)
    torch.testing.assert_close([model(ids), model(ids, mask=mask)], want)
