"""Tiny models of transformers with random weights, and a padded batch for each."""

from collections.abc import Callable

import torch
import transformers as hf
from torch import Tensor, nn

V = 99
SMALL = {
    "vocab_size": V,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
GROUPED = SMALL | {"num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0}
VISION = {k: v for k, v in SMALL.items() if k not in ("vocab_size", "max_position_embeddings")} | {
    "image_size": 24,
    "patch_size": 4,
}
LAYERS = ["sliding_attention", "sliding_attention", "full_attention"]

DECODERS: dict[str, Callable[[], nn.Module]] = {
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**GROUPED)),
    "mistral": lambda: hf.MistralForCausalLM(hf.MistralConfig(**GROUPED, sliding_window=5)),
    "qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**GROUPED)),
    "gemma2": lambda: hf.Gemma2ForCausalLM(
        hf.Gemma2Config(**GROUPED, sliding_window=5, attn_logit_softcapping=3.0, query_pre_attn_scalar=8)
    ),
    "gemma3": lambda: hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**GROUPED, sliding_window=5, layer_types=LAYERS)),
    "gpt_oss": lambda: hf.GptOssForCausalLM(
        hf.GptOssConfig(
            **GROUPED,
            sliding_window=5,
            num_local_experts=2,
            num_experts_per_tok=2,
            rope_parameters={"rope_type": "default", "rope_theta": 1e4},
        )
    ),
}
ENCODERS: dict[str, Callable[[], nn.Module]] = {
    "bert": lambda: hf.BertModel(hf.BertConfig(**SMALL)),
    "roberta": lambda: hf.RobertaModel(hf.RobertaConfig(**SMALL, pad_token_id=0)),
    "modernbert": lambda: hf.ModernBertModel(
        hf.ModernBertConfig(**SMALL, pad_token_id=0, local_attention=6, global_attn_every_n_layers=2)
    ),
}


def t5() -> nn.Module:
    config = hf.T5Config(
        vocab_size=V,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        decoder_start_token_id=0,
        relative_attention_num_buckets=8,
        relative_attention_max_distance=16,
    )
    return hf.T5ForConditionalGeneration(config)


def whisper() -> nn.Module:
    config = hf.WhisperConfig(
        vocab_size=V,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        num_mel_bins=8,
        max_source_positions=12,
        max_target_positions=32,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        dropout=0.0,
    )
    return hf.WhisperForConditionalGeneration(config)


def clip() -> nn.Module:
    text = hf.CLIPTextConfig(**SMALL, eos_token_id=V - 1, bos_token_id=1, projection_dim=16)
    config = hf.CLIPConfig(
        text_config=text.to_dict(), vision_config={**VISION, "projection_dim": 16}, projection_dim=16
    )
    return hf.CLIPModel(config)


OTHERS: dict[str, Callable[[], nn.Module]] = {
    "t5": t5,
    "vit": lambda: hf.ViTModel(hf.ViTConfig(**VISION)),
    "whisper": whisper,
    "clip": clip,
}
MODELS = DECODERS | ENCODERS | OTHERS


def build(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The model, in eval mode, with weights large enough that attention is far from uniform."""
    torch.manual_seed(0)
    model = MODELS[name]()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.3)
            else:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    # Draws of torch.empty are poisoned in the tests: a model made right is finite.
    return model.to(dtype).eval()


def padded(side: str, lengths: tuple[int, ...] = (12, 5, 9)) -> dict[str, Tensor]:
    """Token ids and attention mask; ids avoid the special ones."""
    M = max(lengths)
    column = torch.arange(M)
    real = [column < n if side == "right" else column >= M - n for n in lengths]
    mask = torch.stack(real)
    return {"input_ids": torch.randint(3, V - 1, mask.shape) * mask, "attention_mask": mask.long()}


def batch(name: str, seed: int = 1) -> dict[str, Tensor]:
    """Inputs of a model, padded where it knows padding."""
    torch.manual_seed(seed)
    if name in DECODERS:
        return padded("left")
    if name in ENCODERS:
        return padded("right")
    if name == "t5":
        return padded("right") | {"decoder_input_ids": torch.randint(3, V - 1, (3, 7))}
    if name == "vit":
        return {"pixel_values": torch.randn(2, 3, 24, 24)}
    if name == "whisper":
        return {"input_features": torch.randn(2, 8, 24), "decoder_input_ids": torch.randint(3, V - 1, (2, 7))}
    return padded("right") | {"pixel_values": torch.randn(3, 3, 24, 24)}


def result(name: str, model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """The model's output at real tokens, `[tokens, …]`."""
    output = model(**inputs)
    if name == "clip":
        return torch.cat([output.text_embeds, output.image_embeds])
    found = output.logits if hasattr(output, "logits") else output.last_hidden_state
    if name in DECODERS or name in ENCODERS:
        return found[inputs["attention_mask"].bool()]
    return found.flatten(0, 1)
